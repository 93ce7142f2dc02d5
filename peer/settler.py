"""The settlement log: which signed records this peer has, and what they make of everybody's money.

Every peer folds the same records into the same ledger: openings (co-signed agreements), settlements, claims and
slashes. Records that depend on one not here yet wait, bounded; anti-entropy (node.py) brings what gossip lost.
What the fold cannot decide alone (two conflicting closings of one channel) is stated in docs/decisions/0003.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from market import entries as money
from market.entries import Account
from market.matching import Record as History
from peer.desk import SETTLEMENT, Desk
from peer.evidence import open_seeds
from protocol import params
from protocol.errors import CorruptStore, InsufficientFunds, LimitExceeded, RemoteProtocolError, VerificationFailed
from protocol.records import (
    Agreement,
    Claim,
    Proof,
    Record,
    Settlement,
    Slash,
    Verdict,
    Voucher,
    amount_for,
    ids_digest,
    open_record,
)
from protocol.sampling import select_segments

__all__ = ["Channel", "Settler"]


class NotYet(RemoteProtocolError):
    """The record depends on one that is not here yet: keep it and try again."""


@dataclass
class Channel:
    """One agreement's money, as the records seen so far leave it."""

    agreement: Agreement
    closed: str = ""  # "", "settled", "slashed" or "claimed"
    paid_micro: int = 0
    claim_ends_ns: int = 0
    best_voucher_micro: int = 0
    fees: tuple[tuple[bytes, int], ...] = ()
    moot: int = 0
    frozen: bool = False


@dataclass
class Settler:
    """See the module docstring. `on_open` and `on_close` are the node's ears."""

    desk: Desk
    on_open: Callable[[bytes], None] = lambda _: None
    on_close: Callable[[bytes, str], None] = lambda _a, _b: None
    channels: dict[bytes, Channel] = field(default_factory=dict)
    log: dict[bytes, bytes] = field(default_factory=dict)  # record id -> envelope
    pending: dict[bytes, bytes] = field(default_factory=dict)
    sequences: dict[tuple[bytes, int], bytes] = field(default_factory=dict)
    histories: dict[bytes, History] = field(default_factory=dict)
    judging: bool = True
    _opened: list[bytes] = field(default_factory=list)
    _closed: list[tuple[bytes, str]] = field(default_factory=list)

    # --- coming in -----------------------------------------------------------------------------------------
    def accept(self, envelope: bytes, *, publish: bool = False) -> bool:
        """Take one envelope of the log: verify, journal, fold. True if it was applied now, False if it was known
        or has to wait. Raises RemoteProtocolError for what can never be right."""
        record, record_id, signers = open_record(envelope, network=self.desk.network.id)
        if record_id in self.log:
            return False
        if len(self.log) >= params.SETTLEMENT_LOG_MAX:
            raise LimitExceeded("the settlement log is full", next_step="move this network to notaries")
        if isinstance(record, Agreement | Settlement) and len(signers) != 2:
            raise VerificationFailed(f"{type(record).__name__.lower()} without both signatures")
        was_closed = self._is_closed(record)
        try:
            self._fold(record, record_id, self.desk.now_ns)
        except NotYet:
            if record_id not in self.pending and len(self.pending) >= params.PENDING_SETTLEMENT_MAX:
                raise LimitExceeded("too many settlement records wait for others") from None
            self.pending[record_id] = envelope
            return False
        self.log[record_id] = envelope
        self.pending.pop(record_id, None)
        order = self.desk.now_ns.to_bytes(8, "big") + len(self.log).to_bytes(4, "big")
        self.desk.save("settlement", record_id, order + bytes([was_closed]) + envelope)
        if publish:
            self.desk.publish(SETTLEMENT, envelope)
        self._tell()
        self._retry_pending()
        return True

    def _tell(self) -> None:
        """Call the node's ears, after the record that explains the news is in the log: what they publish in answer
        must come after it, or a restart would fold the log in another order."""
        opened, self._opened = self._opened, []
        closed, self._closed = self._closed, []
        for agreement_id in opened:
            self.on_open(agreement_id)
        for agreement_id, how in closed:
            self.on_close(agreement_id, how)

    def _is_closed(self, record: Record) -> bool:
        channel = self.channels.get(getattr(record, "agreement", b""))
        return channel is not None and bool(channel.closed)

    def restore(self, rows: Iterable[tuple[bytes, bytes]], frozen: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Fold the journalled log again, in the order it came; the ledger already holds its entries.

        What was judged then is not judged again: a checker's stake may be locked by now, and a record that came
        after a channel's end must not count before it.
        """
        self.judging = False
        for record_id, value in sorted(rows, key=lambda row: row[1][:12]):
            moot, envelope = value[12] == 1, value[13:]
            record, _, _ = open_record(envelope, network=self.desk.network.id)
            self.log[record_id] = envelope
            if moot:
                continue
            try:
                self._fold(record, record_id, int.from_bytes(value[:8], "big"))
            except NotYet as error:
                raise CorruptStore(
                    f"the settlement log has a record before the one it rests on: {error}",
                    next_step="restore the last backup of the store",
                ) from None
        for agreement_id, _ in frozen:
            if agreement_id in self.channels:
                self.channels[agreement_id].frozen = True
        self.judging = True
        self._opened, self._closed = [], []  # old news: the roles have it in their own rows

    def _retry_pending(self) -> None:
        for _, envelope in sorted(self.pending.items()):
            record, record_id, _ = open_record(envelope, network=self.desk.network.id)
            if isinstance(record, Agreement):
                ready = True
            else:
                ready = self._agreement_id(record) in self.channels
            if ready and record_id in self.pending:
                try:
                    self.accept(envelope)
                except RemoteProtocolError:
                    self.pending.pop(record_id, None)

    @staticmethod
    def _agreement_id(record: Record) -> bytes:
        assert isinstance(record, Settlement | Claim | Slash)
        return record.agreement

    # --- the fold ------------------------------------------------------------------------------------------
    def _fold(self, record: Record, record_id: bytes, seen_ns: int) -> None:
        match record:
            case Agreement():
                self._open(record, record_id)
            case Settlement():
                self._settle(record)
            case Claim():
                self._claim(record, seen_ns)
            case Slash():
                self._slash(record)
            case _:
                raise VerificationFailed(f"{type(record).__name__} is no settlement record")

    def _open(self, agreement: Agreement, record_id: bytes) -> None:
        known = self.sequences.get((agreement.submitter, agreement.sequence))
        if known is not None and known != record_id:
            raise VerificationFailed(
                "two openings with one sequence number", why="the submitter reserves its balance twice"
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
        self.channels[record_id] = Channel(agreement)
        self._opened.append(record_id)

    def _channel(self, agreement_id: bytes) -> Channel:
        channel = self.channels.get(agreement_id)
        if channel is None:
            raise NotYet("the agreement is not here yet")
        return channel

    @staticmethod
    def _moot(channel: Channel) -> bool:
        """Whether a valid record comes after the end. It changes nothing, but every log keeps it, or two peers
        that saw the ending from two sides would compare their logs for ever."""
        if channel.closed:
            channel.moot += 1
            if channel.moot > params.MOOT_RECORDS_MAX:
                raise LimitExceeded(
                    f"more than {params.MOOT_RECORDS_MAX} records on a channel that is {channel.closed}"
                )
        return bool(channel.closed)

    def _settle(self, record: Settlement) -> None:
        channel = self._channel(record.agreement)
        agreement = channel.agreement
        if (record.submitter, record.solver) != (agreement.submitter, agreement.solver):
            raise VerificationFailed("settlement of other parties than the agreement's")
        if self._moot(channel):
            return
        self._pay(record.agreement, channel, record.paid_micro, record.fees, "settled")

    def _pay(
        self, agreement_id: bytes, channel: Channel, paid: int, fees: tuple[tuple[bytes, int], ...], how: str
    ) -> None:
        agreement = channel.agreement
        entry = money.settle(
            agreement_id,
            submitter=agreement.submitter,
            solver=agreement.solver,
            channel_micro=agreement.channel_micro,
            lock_micro=agreement.lock_micro,
            paid_micro=paid,
            fees=fees,
        )
        self.desk.post(entry)
        channel.closed, channel.paid_micro, channel.fees = how, paid, fees
        old = self.histories.get(agreement.solver, History())
        if paid and agreement.check_permille:  # a script that was paid says nothing of who ran it
            self.histories[agreement.solver] = History(old.right + 1, old.wrong)
        self._closed.append((agreement_id, how))

    def _claim(self, record: Claim, seen_ns: int) -> None:
        channel = self._channel(record.agreement)
        agreement = channel.agreement
        if record.author not in (agreement.submitter, agreement.solver):
            raise VerificationFailed("claim by a peer that is no party to the agreement")
        if record.author == agreement.solver and record.fees:
            raise VerificationFailed("a solver cannot spend the submitter's channel on fees")
        worth = 0
        if record.voucher:
            voucher, _, _ = open_record(record.voucher, network=self.desk.network.id)
            if not isinstance(voucher, Voucher) or voucher.agreement != record.agreement:
                raise VerificationFailed("claim with a voucher of another channel")
            if voucher.submitter != agreement.submitter:
                raise VerificationFailed("claim with a voucher that the submitter did not sign")
            worth = voucher.cumulative_micro
        if worth > agreement.channel_micro:
            raise VerificationFailed(f"voucher of {worth} on a channel of {agreement.channel_micro} micro-credits")
        if self._moot(channel):
            return
        channel.best_voucher_micro = max(channel.best_voucher_micro, worth)
        if record.fees:
            channel.fees = record.fees
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
        verdicts = self._wrong_verdicts(record, channel.agreement)
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
        channel.closed = "slashed"
        old = self.histories.get(agreement.solver, History())
        self.histories[agreement.solver] = History(old.right, old.wrong + 1)
        self._closed.append((record.agreement, "slashed"))

    def _wrong_verdicts(self, record: Slash, agreement: Agreement) -> list[Verdict]:
        """The quorum inside a Slash: distinct staked checkers, no parties, one proof.

        They may name different segments (each was drawn its own), but not different roots for one segment: a
        cheat that is wrong everywhere must not escape because its judges looked in different places.
        """
        rules = self.desk.network.rules
        proof_id, drawn = self._drawn(record, agreement)
        verdicts: list[Verdict] = []
        for envelope in record.verdicts:
            verdict, _, _ = open_record(envelope, network=self.desk.network.id)
            if not isinstance(verdict, Verdict) or verdict.finding != "wrong":
                raise VerificationFailed("a slash rests on wrong verdicts only")
            if verdict.agreement != record.agreement:
                raise VerificationFailed("a slash with a verdict on another agreement")
            if verdict.checker in (agreement.submitter, agreement.solver):
                raise VerificationFailed("a party of the agreement cannot judge it")
            if verdict.proof != proof_id or verdict.wrong_segment not in drawn:
                raise VerificationFailed("a verdict on another proof, or on a segment that was not drawn")
            stake = self.desk.ledger.balance_micro(Account(verdict.checker, "stake"))
            if self.judging and stake < rules.checker_stake_min_micro:
                raise VerificationFailed(f"a checker with a stake of {stake} micro-credits cannot slash")
            verdicts.append(verdict)
        if len({v.checker for v in verdicts}) != len(verdicts) or len(verdicts) < rules.wrong_quorum:
            raise VerificationFailed(
                f"{len(verdicts)} verdicts, a slash takes {rules.wrong_quorum} of distinct checkers"
            )
        found = {(v.wrong_segment, v.claimed_root, v.found_root) for v in verdicts}
        if len({segment for segment, _, _ in found}) != len(found):
            raise VerificationFailed("the wrong verdicts do not agree on the roots")
        return sorted(verdicts, key=lambda v: v.checker)

    def _drawn(self, record: Slash, agreement: Agreement) -> tuple[bytes, tuple[int, ...]]:
        """The proof a Slash is about and the segments its seeds draw: two liars cannot pick what they condemn."""
        network, rules = self.desk.network.id, self.desk.network.rules
        proof, proof_id, _ = open_record(record.proof, network=network)
        if not isinstance(proof, Proof) or proof.agreement != record.agreement:
            raise VerificationFailed("a slash with the proof of another agreement")
        if proof.author not in (agreement.submitter, agreement.solver):
            raise VerificationFailed("a slash with a stranger's proof")
        random = open_seeds(record.reveals, agreement, record.agreement, proof_id, network)
        segments = select_segments(
            random,
            first=agreement.first_segment,
            last=min(agreement.last_segment, agreement.first_segment + proof.receipts),
            permille=agreement.check_permille,
            minimum=rules.check_segments_min,
        )
        return proof_id, segments

    # --- time ----------------------------------------------------------------------------------------------
    def tick(self) -> None:
        """Close claims whose window has passed."""
        for agreement_id, channel in list(self.channels.items()):
            window_ns = self.desk.network.rules.claim_window_ms * 10**6
            ends_ns = channel.claim_ends_ns + (params.FREEZE_WINDOWS * window_ns if channel.frozen else 0)
            if not channel.closed and channel.claim_ends_ns and self.desk.now_ns >= ends_ns:
                left = channel.agreement.channel_micro - channel.best_voucher_micro
                fees = channel.fees if sum(micro for _, micro in channel.fees) <= left else ()
                self.desk.attempt(self._pay, agreement_id, channel, channel.best_voucher_micro, fees, "claimed")
        self._tell()

    def freeze(self, verdict: Verdict) -> None:
        """A staked checker found work wrong: a one-sided claim on it waits longer, for a quorum to gather."""
        channel = self.channels.get(verdict.agreement)
        if channel is None or channel.closed or verdict.finding != "wrong" or not channel.agreement.check_permille:
            return
        if verdict.checker in (channel.agreement.submitter, channel.agreement.solver):
            return
        if self.free_stake(verdict.checker) >= self.desk.network.rules.checker_stake_min_micro:
            channel.frozen = True
            self.desk.save("frozen", verdict.agreement, b"1")

    # --- anti-entropy --------------------------------------------------------------------------------------
    def digest(self) -> tuple[int, bytes]:
        """The log in two numbers."""
        return len(self.log), ids_digest(self.log)

    def history(self, peer: bytes) -> History:
        """What co-signed evidence says of a solver."""
        return self.histories.get(peer, History())

    def free_stake(self, peer: bytes) -> int:
        """The stake of `peer` that is not locked, in micro-credits."""
        return self.desk.ledger.balance_micro(Account(peer, "stake"))

    def free_micro(self, peer: bytes) -> int:
        """What `peer` can spend, in micro-credits."""
        return self.desk.ledger.balance_micro(Account(peer, "free"))
