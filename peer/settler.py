"""The settlement log: which signed records this peer has, and what they make of everybody's money.

Every peer folds the same records into the same ledger: openings (co-signed agreements), moves of stake
(peer/stakes.py), settlements, claims and slashes. Records that depend on one not here yet wait, bounded; anti-entropy
(node.py) brings what gossip lost.
What the fold cannot decide alone (two conflicting closings of one channel) is stated in docs/decisions/0001. Records of
deals on credit are not folded: they are handed to peer/credit.py, and go no further.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from market import entries as money
from market.entries import NULL_KEY, Account, close_key
from market.matching import Record as History
from market.penalties import release_key
from market.reputation import DAY_NS, Reputation, Reputations
from peer.channel import Channel
from peer.desk import SETTLEMENT, Desk
from peer.evidence import claimed_micro, wrong_verdicts
from peer.judgement import Judgement, NotYet
from peer.netting import Nettings
from peer.stakes import Stakes
from protocol import params
from protocol.arbitration import Judged
from protocol.certificate import check_certified
from protocol.codec import ids_digest
from protocol.errors import CorruptStore, InsufficientFunds, LimitExceeded, RemoteProtocolError, VerificationFailed
from protocol.keys import peer_key
from protocol.network import Network
from protocol.records import (
    Agreement,
    Arbitration,
    Claim,
    Envelope,
    Equivocation,
    Fault,
    Record,
    Settlement,
    Slash,
    StakeMove,
    Verdict,
    amount_for,
    decode_body,
    open_record,
)

__all__ = ["Channel", "Logged", "Settler"]

Logged: TypeAlias = Agreement | StakeMove | Settlement | Claim | Slash | Arbitration | Fault | Equivocation
"""What the log is made of."""


def backed_by(network: Network) -> frozenset[bytes]:
    """Who brought a deposit into the network that is worth a checker's stake: money, unlike a key, is not free."""
    least = network.rules.checker_stake_min_micro
    return frozenset(peer_key(d.peer) for d in network.deposits if d.free_micro + d.stake_micro >= least)


@dataclass
class Settler:
    """See the module docstring. `on_open` and `on_close` are the node's ears."""

    desk: Desk
    on_open: Callable[[bytes], None] = lambda _: None
    on_close: Callable[[bytes, str], None] = lambda _a, _b: None
    on_judged: Callable[[bytes, Judged], None] = lambda _a, _b: None
    on_moved: Callable[[bytes], None] = lambda _: None
    channels: dict[bytes, Channel] = field(default_factory=dict)
    log: dict[bytes, bytes] = field(default_factory=dict)  # record id -> envelope
    pending: dict[bytes, bytes] = field(default_factory=dict)
    sequences: dict[tuple[bytes, int], bytes] = field(default_factory=dict)
    histories: dict[bytes, History] = field(default_factory=dict)
    _live: dict[bytes, Channel] = field(default_factory=dict)  # those whose time still matters, in order of opening
    _opened: list[bytes] = field(default_factory=list)
    _moved: list[bytes] = field(default_factory=list)
    _closed: list[tuple[bytes, str]] = field(default_factory=list)
    _waiting: dict[bytes, bytes] = field(default_factory=dict)  # of what is pending, the moves of stake -> owner
    _retrying: bool = False

    def __post_init__(self) -> None:
        self.stakes = Stakes(self.desk, self.channels, self.sequences)
        self.judgement = Judgement(self.desk, self.stakes, self.channels, self.histories, self._slashed)
        self.reputations = Reputations(backed_by(self.desk.network))
        self.netting = Nettings(self.desk, lambda deal: self.on_open(deal), lambda deal, how: self.on_close(deal, how))
        self.credit = self.netting.credit
        # The channels of the ledger, and this peer's deals on credit, which have none there.
        self.every: ChainMap[bytes, Channel] = ChainMap(self.channels, self.credit.channels)

    # --- coming in -----------------------------------------------------------------------------------------
    def accept(self, envelope: bytes, *, publish: bool = False) -> bool:
        """Take one envelope of the log: verify, journal, fold. True if it was applied now, False if it was known
        or has to wait. Raises RemoteProtocolError for what can never be right."""
        record, record_id, signers = open_record(envelope, network=self.desk.network.id)
        if self.credit.takes(record):
            return self.credit.accept(record, record_id, signers, envelope)
        if record_id in self.log:
            return False
        if len(self.log) >= params.SETTLEMENT_LOG_MAX:
            raise LimitExceeded("the settlement log is full", next_step="move this network to notaries")
        if isinstance(record, Settlement) and len(signers) != 2:
            raise VerificationFailed("settlement without both signatures")
        if isinstance(record, Agreement | StakeMove):
            check_certified(record, signers, self.desk.network)
        if isinstance(record, StakeMove) and record.created_ns > self.desk.wall_ns + params.CLOCK_SKEW_NS_MAX:
            self.desk.drop("early", record.owner)  # it comes again, and nobody is to blame who passed it on
            return False
        was = self._stage(record)
        try:
            self._fold(record, record_id, self.desk.now_ns)
        except NotYet:
            if isinstance(record, Equivocation):
                return False  # not kept: keys without a stake cost nothing; who folded it shows it again
            if isinstance(record, StakeMove) and not self._may_wait(record, record_id):
                self.desk.drop("unfunded", record.owner)
                return False  # not kept: who folded it shows it again
            if record_id not in self.pending and len(self.pending) >= params.PENDING_SETTLEMENT_MAX:
                raise LimitExceeded("too many settlement records wait for others") from None
            self.pending[record_id] = envelope
            return False
        self.log[record_id] = envelope
        self.pending.pop(record_id, None)
        order = self.desk.now_ns.to_bytes(8, "big") + len(self.log).to_bytes(4, "big")
        self.desk.save("settlement", record_id, order + bytes([was]) + envelope)
        if publish:
            self.desk.publish(SETTLEMENT, envelope)
        self._tell()
        self._retry_pending()
        return True

    def _may_wait(self, move: StakeMove, move_id: bytes) -> bool:
        """Whether one more move without funds may wait: an owner has some places, and made-up owners share some."""
        self._waiting = {one: owner for one, owner in self._waiting.items() if one in self.pending}
        if move_id in self._waiting:
            return True
        owners, knows = [*self._waiting.values()], self.desk.ledger.knows
        if knows(move.owner):
            room = owners.count(move.owner) < params.PENDING_MOVES_OF_OWNER_MAX
        else:
            strangers = sum(not knows(owner) for owner in owners)
            room = move.owner not in owners and strangers < params.PENDING_MOVES_OF_STRANGERS_MAX
        if room := room and len(owners) < params.PENDING_MOVES_MAX:
            self._waiting[move_id] = move.owner
        return room

    def _opened_again(self, envelope: bytes) -> Record:
        return open_record(envelope, network=self.desk.network.id)[0]

    def _tell(self) -> None:
        """Call the node's ears, after the record that explains the news is in the log: what they publish in answer
        must come after it, or a restart would fold the log in another order. The record stands, whatever they make
        of it, and each hears all of it: the trouble of one is told."""
        opened, self._opened = self._opened, []
        moved, self._moved = self._moved, []
        closed, self._closed = self._closed, []
        judged, self.judgement.judged = self.judgement.judged, []
        for agreement_id in opened:
            self.desk.attempt(self.on_open, agreement_id)
        for move_id in moved:
            self.desk.attempt(self.on_moved, move_id)
        for agreement_id, how in closed:
            self.desk.attempt(self.on_close, agreement_id, how)
        for agreement_id, finding in judged:
            self.desk.attempt(self.on_judged, agreement_id, finding)

    def _stage(self, record: Record) -> int:
        """Journalled with a record: 0 while its channel is open, 1 when it is closed, 2 when its lock is gone too."""
        channel = self.channels.get(getattr(record, "agreement", b""))
        return 0 if channel is None or not channel.closed else 1 if channel.locked else 2

    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """Fold the journalled log again, in the order it came; the ledger already holds its entries.

        What was judged then is not judged again: a checker's stake may be locked by now, and a record that came
        after a channel's end must not count before it.
        """
        self.netting.restore(rows)
        self.stakes.restore(rows)
        self.judgement.judging = False
        # By their number: the clock beside it may have been set back between two lives.
        for record_id, value in sorted(rows("settlement"), key=lambda row: row[1][8:12]):
            stage, envelope = value[12], value[13:]
            # Its signatures were checked when it came; since then the store's checksums vouch for it.
            body = msgspec.msgpack.decode(envelope, type=Envelope).body
            record = decode_body(body, network=self.desk.network.id)
            self.log[record_id] = envelope
            if stage:
                self._closed_before(record, lock_gone=stage == 2)
            if stage and not isinstance(record, Arbitration | Fault):
                continue
            try:
                self._fold(record, record_id, int.from_bytes(value[:8], "big"))
            except NotYet as error:
                raise CorruptStore(
                    f"the settlement log has a record before the one it rests on: {error}",
                    next_step="restore the last backup of the store",
                ) from None
        for agreement_id, _ in rows("frozen"):
            if agreement_id in self.channels:
                self.channels[agreement_id].frozen = True
        for agreement_id, until in rows("held"):
            if agreement_id in self.channels:
                self.channels[agreement_id].restore_hold(until)
        for agreement_id, channel in self.channels.items():
            # The ends of windows are no records: the ledger's entries tell of them.
            if not channel.closed and channel.claim_ends_ns and self.desk.ledger.applied(close_key(agreement_id)):
                self._close_claim(agreement_id, channel)
            if channel.closed and self.desk.ledger.applied(release_key(agreement_id)):
                channel.locked = False
        self.judgement.judging = True
        # Old news: the roles have it in their own rows.
        self._opened, self._moved, self._closed, self.judgement.judged = [], [], [], []

    def _closed_before(self, record: Record, *, lock_gone: bool) -> None:
        """A journalled record came after its channel's end. Where that end was a window's, which is no record, it has
        to come again before what follows it."""
        agreement_id = self._agreement_id(record)
        channel = self.channels.get(agreement_id)
        if channel is None:
            return
        if not channel.closed and channel.claim_ends_ns:
            self._close_claim(agreement_id, channel)
        if lock_gone:
            channel.locked = False

    def _retry_pending(self) -> None:
        """Take what waited for the record that just came, and what waited for that: in rounds, for a stranger chooses
        how many records wait, and each that is taken comes back here."""
        if self._retrying:
            return
        self._retrying = True
        try:
            while sum(self._retry(record_id, envelope) for record_id, envelope in sorted(self.pending.items())):
                pass
        finally:
            self._retrying = False

    def _retry(self, record_id: bytes, envelope: bytes) -> bool:
        """Try a record that waited once more. True if it was applied."""
        record = self._opened_again(envelope)
        if isinstance(record, StakeMove):
            ready = self.stakes.ready(record)
        else:
            ready = isinstance(record, Agreement) or self._agreement_id(record) in self.channels
        if not ready or record_id not in self.pending:
            return False
        try:
            return self.accept(envelope)
        except RemoteProtocolError:
            self.pending.pop(record_id, None)
            return False

    @staticmethod
    def _agreement_id(record: Record) -> bytes:
        assert isinstance(record, Settlement | Claim | Slash | Arbitration | Fault)
        return record.agreement

    # --- the fold ------------------------------------------------------------------------------------------
    def _fold(self, record: Record, record_id: bytes, seen_ns: int) -> None:
        if isinstance(record, Equivocation):
            self.judgement.ordered_twice(record)  # of a peer, and of no channel
            return
        if isinstance(record, StakeMove):
            self.stakes.fold(record, record_id, seen_ns)
            self._moved.append(record_id)
            return
        about = record_id if isinstance(record, Agreement) else getattr(record, "agreement", b"")
        moot = self.channels[about].moot if about in self.channels else 0
        self._apply(record, record_id, seen_ns)
        channel = self.channels[about]
        if channel.moot == moot:
            channel.records.append(record_id)
        self._weigh(about, channel)

    def _weigh(self, agreement_id: bytes, channel: Channel) -> None:
        """What has ended is evidence of its parties and checkers."""
        if channel.closed:
            self.reputations.put(channel.ending(agreement_id))

    def _apply(self, record: Record, record_id: bytes, seen_ns: int) -> None:
        match record:
            case Agreement():
                self._open(record, record_id)
            case Settlement():
                self._settle(record, seen_ns)
            case Claim():
                self._claim(record, seen_ns)
            case Slash():
                self._slash(record)
            case Arbitration():
                self.judgement.arbitrate(record.agreement, self._channel(record.agreement), record)
            case Fault():
                self.judgement.fault(self._channel(record.agreement), record)
            case _:
                raise VerificationFailed(f"{type(record).__name__} is no settlement record")

    def _open(self, agreement: Agreement, record_id: bytes) -> None:
        known = self.sequences.get((agreement.submitter, agreement.sequence))
        if known is not None and known != record_id:
            raise VerificationFailed(
                "two orders with one sequence number", why="the submitter spends its balance twice"
            )
        if agreement.first_segment >= agreement.last_segment or not agreement.operations or not agreement.channel_micro:
            # An opening that costs nothing would let anybody fill every peer's log.
            raise VerificationFailed("an agreement about no work, or without a channel")
        entry = money.open_channel(
            record_id,
            submitter=agreement.submitter,
            budget_micro=agreement.channel_micro,
            solver=agreement.solver,
            lock_micro=agreement.lock_micro,
        )
        try:
            self.desk.post(entry)
        except InsufficientFunds as error:
            raise NotYet(str(error)) from None
        self.sequences[agreement.submitter, agreement.sequence] = record_id
        self.channels[record_id] = self._live[record_id] = Channel(agreement)
        self._opened.append(record_id)

    def _channel(self, agreement_id: bytes) -> Channel:
        channel = self.channels.get(agreement_id)
        if channel is None:
            raise NotYet("the agreement is not here yet")
        return channel

    @staticmethod
    def _moot(channel: Channel) -> bool:
        """Whether a valid record comes after the end. Raises LimitExceeded."""
        if channel.closed:
            channel.count_moot()
        return bool(channel.closed)

    def _settle(self, record: Settlement, seen_ns: int) -> None:
        channel = self._channel(record.agreement)
        agreement = channel.agreement
        if (record.submitter, record.solver) != (agreement.submitter, agreement.solver):
            raise VerificationFailed("settlement of other parties than the agreement's")
        if not set(record.after) <= set(channel.findings):
            # A jackpot is what the pool holds: it must not come after the slice of this deal here and before it there.
            raise NotYet("a dispute that was judged before this settlement is not here yet")
        if self._moot(channel):
            return
        self._pay(record.agreement, channel, record.paid_micro, record.fees, "settled")
        channel.closed_ns = seen_ns

    def _pay(
        self, agreement_id: bytes, channel: Channel, paid: int, fees: tuple[tuple[bytes, int], ...], how: str
    ) -> None:
        agreement, judged = channel.agreement, channel.judged(self.desk.network)
        slice_micro = channel.pool_micro(paid, self.desk.network)
        entry = money.settle(
            agreement_id,
            submitter=agreement.submitter,
            solver=agreement.solver,
            channel_micro=agreement.channel_micro,
            lock_micro=0 if judged else agreement.lock_micro,  # a whistleblower has its time still
            paid_micro=paid - slice_micro,
            fees=(*fees, (NULL_KEY, slice_micro)),
        )
        self.desk.post(entry)
        channel.closed, channel.paid_micro, channel.fees = how, paid, fees
        channel.closed_ns, channel.locked = self.desk.now_ns, judged and bool(agreement.lock_micro)
        old = self.histories.get(agreement.solver, History())
        if paid and agreement.check_permille:  # a script that was paid says nothing of who ran it
            self.histories[agreement.solver] = old.after_right()
        self._closed.append((agreement_id, how))

    def _claim(self, record: Claim, seen_ns: int) -> None:
        channel = self._channel(record.agreement)
        agreement = channel.agreement
        if record.author not in (agreement.submitter, agreement.solver):
            raise VerificationFailed("claim by a peer that is no party to the agreement")
        if record.author == agreement.solver and record.fees:
            raise VerificationFailed("a solver cannot spend the submitter's channel on fees")
        worth = claimed_micro(record, agreement, self.desk.network.id)
        if self._moot(channel):
            return
        channel.best_voucher_micro = max(channel.best_voucher_micro, worth)
        channel.claimants.add(record.author)
        # Of several the dearest, not the last: peers hear them in different orders.
        channel.fees = max(channel.fees, record.fees, key=lambda fees: (sum(micro for _, micro in fees), fees))
        rules = self.desk.network.rules
        window_ms = rules.claim_window_ms
        if record.author == agreement.solver:
            # Its work may be unchecked: leave the time for the seeds, a check, and a second one that confirms it.
            window_ms = max(window_ms, rules.reveal_ms + 2 * rules.check_silence_ms)
        ends_ns = seen_ns + window_ms * 10**6
        channel.claim_ends_ns = min(channel.claim_ends_ns or ends_ns, ends_ns)

    def _slash(self, record: Slash) -> None:
        channel = self._channel(record.agreement)
        if not channel.agreement.check_permille:
            raise VerificationFailed("a slash over a script", why="nothing of it is re-executed, so none can be wrong")
        if self.desk.network.notaries:
            raise VerificationFailed("a slash in a network with notaries", why="there a dispute decides who is wrong")
        staked = self.stakes.at_stake if self.judgement.judging else None
        verdicts = wrong_verdicts(record, channel.agreement, self.desk.network, staked)
        if self._moot(channel):
            return
        agreement = channel.agreement
        costs = tuple(
            (v.checker, amount_for(min(v.operations, agreement.operations), agreement.unit_price)) for v in verdicts
        )
        entry = money.slash(
            record.agreement,
            submitter=agreement.submitter,
            solver=agreement.solver,
            channel_micro=agreement.channel_micro,
            lock_micro=agreement.lock_micro,
            checker_costs=costs,
        )
        self.desk.post(entry)
        channel.condemners = tuple(verdict.checker for verdict in verdicts)
        self._slashed(record.agreement, channel)

    def _slashed(self, agreement_id: bytes, channel: Channel) -> None:
        channel.closed, channel.closed_ns, channel.locked = "slashed", self.desk.now_ns, False
        old = self.histories.get(channel.agreement.solver, History())
        self.histories[channel.agreement.solver] = old.after_wrong()
        self._closed.append((agreement_id, "slashed"))

    # --- time ----------------------------------------------------------------------------------------------
    def tick(self) -> None:
        """Close claims, and free the locks, whose windows have passed. What is closed and holds no lock leaves the
        walk for good: the log may hold a hundred times more of those than of open ones."""
        for agreement_id, channel in list(self._live.items()):
            if channel.closed and not channel.locked:
                del self._live[agreement_id]
            else:
                self.lapse(agreement_id)
        self._tell()
        if self.stakes.tick():
            self.desk.attempt(self._retry_pending)  # what waits may find its funds
        self.netting.tick()

    def lapse(self, agreement_id: bytes) -> None:
        """Close the claim on one channel, and free its lock, if the window has passed."""
        channel = self.channels[agreement_id]
        over_ns = max(self._claim_over_ns(channel), channel.held_until_ns)  # and while a challenge is open
        if not channel.closed and channel.claim_ends_ns and self.desk.now_ns >= over_ns:
            self.desk.attempt(self._close_claim, agreement_id, channel)
        self.judgement.tick(agreement_id, channel)

    def _claim_over_ns(self, channel: Channel) -> int:
        """When a claim's window ends: later after a wrong verdict."""
        window_ns = self.desk.network.rules.claim_window_ms * 10**6
        return channel.claim_ends_ns + (params.FREEZE_WINDOWS * window_ns if channel.frozen else 0)

    def _close_claim(self, agreement_id: bytes, channel: Channel) -> None:
        left = channel.agreement.channel_micro - channel.best_voucher_micro
        fees = channel.fees if sum(micro for _, micro in channel.fees) <= left else ()
        self._pay(agreement_id, channel, channel.best_voucher_micro, fees, "claimed")
        channel.closed_ns = self._claim_over_ns(channel)  # not when somebody looked: a restart may look later
        channel.records.append(b"")  # the window's end is no record
        self._weigh(agreement_id, channel)

    def freeze(self, verdict: Verdict) -> None:
        """A staked checker found work wrong: a one-sided claim on it waits longer, for a quorum to gather."""
        channel = self.channels.get(verdict.agreement)
        if channel is None or channel.closed or verdict.finding != "wrong" or not channel.agreement.check_permille:
            return
        if verdict.checker in (channel.agreement.submitter, channel.agreement.solver):
            return
        if self.stakes.at_stake(verdict.checker) >= self.desk.network.rules.checker_stake_min_micro:
            channel.frozen = True
            self.desk.save("frozen", verdict.agreement, b"1")

    # --- anti-entropy --------------------------------------------------------------------------------------
    def digest(self) -> tuple[int, bytes]:
        """The log in two numbers."""
        return len(self.log), ids_digest(self.log)

    def history(self, peer: bytes) -> History:
        """How a solver's deals ended, all of them: its rate of checks follows from the streak."""
        return self.histories.get(peer, History())

    def reputation(self, peer: bytes) -> Reputation:
        """What a solver is trusted by here and today (market/reputation.py)."""
        today = self.desk.wall_ns // DAY_NS
        return self.reputations.of("solver", peer, today=today, viewer=self.desk.me).reputation

    def free_stake(self, peer: bytes) -> int:
        """The stake of `peer` that is neither locked nor withdrawn, in micro-credits."""
        return self.stakes.free_micro(peer)

    def busy(self) -> set[bytes]:
        """The solvers with an open channel: they work on it, or wait for its checks."""
        return {channel.agreement.solver for channel in self._live.values() if not channel.closed}

    def free_micro(self, peer: bytes) -> int:
        """What `peer` can spend, in micro-credits."""
        return self.desk.ledger.balance_micro(Account(peer, "free"))
