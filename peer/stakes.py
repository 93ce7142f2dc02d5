"""The fold of stake moves: what every peer makes of the records by which owners stake credits and take them out.

Promises: an add counts at once; what is withdrawn counts no more at once, answers for its owner until its window ends
by the local clock, as a claim's does, and is free then, less what it was made to pay meanwhile. The same moves and the
same penalties leave the same stakes in whatever order they came: a penalty takes the stake first and then what unbonds;
a withdrawal waits for a stake that is not there yet, but not for one that a penalty reached first: it takes the rest.
Refuses to know who signed: the caller checks records first. Why it is so: docs/decisions/0020-stake-moves.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from market import entries as money
from market.entries import Account, Entry, unbonding_of
from market.penalties import Holdings
from peer.channel import Channel
from peer.desk import Desk
from protocol import params
from protocol.codec import blake
from protocol.errors import InsufficientFunds, RemoteProtocolError, VerificationFailed
from protocol.stake_records import StakeMove, unbonding_ns

__all__ = ["NotYet", "Stakes", "Unbonding"]

_SECOND = 10**9


class NotYet(RemoteProtocolError):
    """The record depends on one that is not here yet: keep it and try again."""


@dataclass(frozen=True)
class Unbonding:
    """One withdrawal whose window has not ended. until_ns: by this peer's node time."""

    owner: bytes
    sequence: int
    until_ns: int


@dataclass
class Stakes:
    """See the module docstring. `channels` and `sequences` (owner, number -> record id) are the settler's own."""

    desk: Desk
    channels: dict[bytes, Channel]
    sequences: dict[tuple[bytes, int], bytes]
    unbonding: dict[bytes, Unbonding] = field(default_factory=dict)  # by the record that withdraws
    lost: Counter[bytes] = field(default_factory=Counter)  # micro-credits that penalties took, of what unbonds too
    judged_ns: int = 0  # when notaries last ruled here
    _of: dict[bytes, set[bytes]] = field(default_factory=dict)  # owner -> its withdrawals
    _next_ns: int = 0  # of the next look at windows
    _retry_ns: int = 0  # and at what waits

    def __post_init__(self) -> None:
        self.judged_ns = self.desk.now_ns  # or a restart would let go of what the last ruling is about to take

    # --- what there is ---------------------------------------------------------------------------------------
    def free_micro(self, owner: bytes) -> int:
        """The stake that is neither locked nor withdrawn, in micro-credits: what new locks and eligibility go by."""
        return self.desk.ledger.balance_micro(Account(owner, "stake"))

    def unbonding_micro(self, owner: bytes) -> int:
        """What the owner withdrew and cannot spend yet, in micro-credits."""
        return sum(micro for _, micro in self._withdrawn(owner))

    def at_stake(self, owner: bytes) -> int:
        """What answers for what the owner signed, in micro-credits: its free stake and what unbonds."""
        return self.free_micro(owner) + self.unbonding_micro(owner)

    def holdings(self, owner: bytes) -> Holdings:
        """The buckets a penalty takes from, in order: the stake, then withdrawals, the latest first."""
        return (Account(owner, "stake"), self.free_micro(owner)), *self._withdrawn(owner)

    def _withdrawn(self, owner: bytes) -> list[tuple[Account, int]]:
        latest = sorted(self._of.get(owner, ()), key=lambda move: (-self.unbonding[move].sequence, move))
        accounts = [unbonding_of(owner, move) for move in latest]
        return [(account, self.desk.ledger.balance_micro(account)) for account in accounts]

    def withdrawals(self, owner: bytes) -> list[tuple[bytes, int, int]]:
        """(record, micro-credits, until when in ns of node time, if no challenge is open then) of what unbonds, the
        next first."""
        rows = [(self.unbonding[move].until_ns, move) for move in self._of.get(owner, ())]
        return [(m, self.desk.ledger.balance_micro(unbonding_of(owner, m)), until) for until, m in sorted(rows)]

    def crowded(self, owner: bytes) -> bool:
        """Whether the owner has to let a withdrawal end before it may begin another."""
        return len(self._of.get(owner, ())) >= params.UNBONDINGS_OF_OWNER_MAX

    # --- the fold --------------------------------------------------------------------------------------------
    def ready(self, move: StakeMove) -> bool:
        """Whether the funds of a move are there: cheap, for it is asked of those that wait after every record."""
        if move.kind == "withdraw":
            there = self.free_micro(move.owner)
            owners_view = there + self.lost[move.owner] - move.lost_micro
            # Of a stake that penalties took whole it takes nothing, but it ends: it must not find what comes later.
            return not self.crowded(move.owner) and owners_view >= move.amount_micro
        return self.desk.ledger.balance_micro(Account(move.owner, "free")) >= move.amount_micro

    def fold(self, move: StakeMove, move_id: bytes, seen_ns: int) -> None:
        """Apply a move that this peer heard of at seen_ns. Raises NotYet while the funds are not there,
        VerificationFailed for a second order under one number."""
        if move.kind == "add" and move.lost_micro:
            raise VerificationFailed("a move into the stake that speaks of penalties")
        known = self.sequences.get((move.owner, move.sequence))
        if known is not None and known != move_id:
            raise VerificationFailed("two orders with one sequence number", why="their owner spends its balance twice")
        if move.kind == "withdraw":
            self._withdraw(move, move_id, seen_ns)
        else:
            key = blake("ichiba/entry/stake-add", move_id)
            try:
                self.desk.post(money.stake_add(key, move.owner, move.amount_micro))
            except InsufficientFunds as error:
                raise NotYet(str(error)) from None
        self.sequences[move.owner, move.sequence] = move_id

    def _withdraw(self, move: StakeMove, move_id: bytes, seen_ns: int) -> None:
        ledger = self.desk.ledger
        if ledger.applied(money.unbonded_key(move_id)):
            return  # the journal is folded again, and the window has ended
        # What it found when it came is not what it would find now: the journal holds it.
        if not ledger.applied(money.unbond_key(move_id)):
            if not self.ready(move):
                raise NotYet("the stake is not there to withdraw, or too many withdrawals are under way")
            micro = min(move.amount_micro, self.free_micro(move.owner))
            self.desk.post(money.unbond(move_id, owner=move.owner, micro=micro))
        until_ns = seen_ns + unbonding_ns(self.desk.network)
        self.unbonding[move_id] = Unbonding(move.owner, move.sequence, until_ns)
        self._of.setdefault(move.owner, set()).add(move_id)

    def penalise(self, entry: Entry) -> bool:
        """Post an entry that takes from a stake. False if it was there already. Raises InsufficientFunds."""
        if not self.desk.post(entry):
            return False
        for account, delta_micro in entry.postings:
            # Both, so that it is one sum on every peer, whether a withdrawal or the penalty came first.
            if account.bucket.startswith(("stake", "unbonding:")) and delta_micro < 0:
                self.lost[account.owner] -= delta_micro
                self.desk.save("stake-lost", account.owner, self.lost[account.owner].to_bytes(8, "big"))
        return True

    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """What penalties took: the ledger says it of stakes and locks together."""
        self.lost = Counter({owner: int.from_bytes(micro, "big") for owner, micro in rows("stake-lost")})

    # --- time ------------------------------------------------------------------------------------------------
    def tick(self) -> bool:
        """Free what was withdrawn so long ago that nothing can reach it any more. True if there was any, and every ten
        seconds: time for a look at what waits for funds, for the ends of windows are no records."""
        if self.desk.now_ns < self._next_ns:
            return False
        self._next_ns, before = self.desk.now_ns + _SECOND, len(self.unbonding)
        for move_id, one in list(self.unbonding.items()):
            if self.desk.now_ns >= one.until_ns and not self._held(one):
                self.desk.attempt(self._free, move_id, one)
        due = self.desk.now_ns >= self._retry_ns
        if due:
            self._retry_ns = self.desk.now_ns + params.PENDING_RETRY_NS
        return due or len(self.unbonding) < before

    def _held(self, one: Unbonding) -> bool:
        """Whether a dispute that is open, or was just ruled on, may still take from it: for one window more at most, or
        whoever keeps losing challenges would hold everybody's withdrawals."""
        if self.desk.now_ns >= one.until_ns + unbonding_ns(self.desk.network):
            return False
        if self.desk.now_ns < self.judged_ns + self.desk.network.rules.settle_silence_ms * _SECOND // 1000:
            return bool(self.desk.network.notaries)  # who holds a verdict that it refutes shows it now
        return any(c.locked and c.held_until_ns > self.desk.now_ns for c in self.channels.values())

    def _free(self, move_id: bytes, one: Unbonding) -> None:
        left = self.desk.ledger.balance_micro(unbonding_of(one.owner, move_id))
        del self.unbonding[move_id]
        self._of[one.owner].discard(move_id)
        if not self._of[one.owner]:
            del self._of[one.owner]
        self.desk.post(money.unbonded(move_id, owner=one.owner, micro=left))
