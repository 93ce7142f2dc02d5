"""The swarm's money: who holds how many micro-credits in which bucket.

Promises: an entry is applied once however often it is posted, no account but the outside world goes below
zero, and the sum of all buckets is deposits minus withdrawals. Refuses to know records, signatures, time
and disks. The same entries in the same order make the same ledger on every peer. What an entry is stands in
market/entries.py and is exported from here as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from market.entries import (
    BURNED,
    NULL_KEY,
    POOL,
    WORLD,
    Account,
    ConflictingEntry,
    Entry,
    Overdrawn,
    UnbalancedEntry,
    apply_entry,
    close_key,
    deposit,
    jackpot,
    open_channel,
    open_key,
    refuse_conflict,
    settle,
    slash,
    stake_add,
    unbond,
    unbonded,
    withdraw,
)
from protocol.errors import IchibaError

__all__ = [
    "BURNED",
    "NULL_KEY",
    "POOL",
    "WORLD",
    "Account",
    "ConflictingEntry",
    "ConservationBroken",
    "Entry",
    "Flow",
    "Ledger",
    "MoneyRow",
    "MoneyTable",
    "Overdrawn",
    "UnbalancedEntry",
    "apply_entry",
    "close_key",
    "deposit",
    "jackpot",
    "money_table",
    "open_channel",
    "open_key",
    "refuse_conflict",
    "settle",
    "slash",
    "stake_add",
    "unbond",
    "unbonded",
    "withdraw",
]


class ConservationBroken(IchibaError):
    """Money appeared or vanished. This is a bug or a damaged store, never something a peer can cause."""

    code = "conservation-broken"


@dataclass(slots=True)
class Flow:
    """What went through one owner's hands since the first entry, in micro-credits.

    earned: settled credits. awarded: metered costs, compensations and jackpots. paid: what settled channels
    cost, refund taken off. slashed: locks lost. A peer that is both sides of one payment nets it out:
    paying oneself is no income. Always: held == deposited - withdrawn + earned + awarded - paid - slashed.
    """

    deposited_micro: int = 0
    withdrawn_micro: int = 0
    earned_micro: int = 0
    awarded_micro: int = 0
    paid_micro: int = 0
    slashed_micro: int = 0

    @property
    def net_micro(self) -> int:
        """What the owner must hold over all buckets."""
        gained_micro = self.deposited_micro + self.earned_micro + self.awarded_micro
        return gained_micro - self.withdrawn_micro - self.paid_micro - self.slashed_micro


@dataclass
class Ledger:
    """All balances, the digest of each applied entry by its key, and the flows for `money_table`."""

    _balances: dict[Account, int] = field(default_factory=dict)
    _applied: dict[bytes, bytes] = field(default_factory=dict)
    _flows: dict[bytes, Flow] = field(default_factory=dict)

    def post(self, entry: Entry) -> bool:
        """Apply `entry` whole or not at all. True if applied, False if this very entry was applied before.

        Raises ConflictingEntry for other content under the same key, and what `apply_entry` raises.
        """
        digest = entry.digest()
        known = self._applied.get(entry.key)
        if known is not None:
            refuse_conflict(entry, digest, known)
            return False
        after = apply_entry(entry, self.balance_micro)
        for account, micro in after.items():
            if micro:
                self._balances[account] = micro
            else:
                # A closed channel must not cost memory for ever.
                self._balances.pop(account, None)
        self._applied[entry.key] = digest
        self._count_flows(entry)
        return True

    def applied(self, key: bytes) -> bool:
        """Whether an entry with this key has been applied."""
        return key in self._applied

    def digest_of(self, key: bytes) -> bytes | None:
        """The digest of the entry applied under `key`, 32 bytes; None if there is none."""
        return self._applied.get(key)

    def copy(self) -> Ledger:
        """A ledger of the same content that goes its own way. O(accounts + entries)."""
        flows = {owner: replace(flow) for owner, flow in self._flows.items()}
        return Ledger(dict(self._balances), dict(self._applied), flows)

    @classmethod
    def resumed(cls, balances: dict[Account, int], flows: dict[bytes, Flow], applied: dict[bytes, bytes]) -> Ledger:
        """The ledger that `balances()` and `flows()` were taken of, with the digests of its entries by key, in the
        order applied. Raises ConservationBroken if they do not add up."""
        ledger = cls(balances, applied, flows)
        ledger.check()
        return ledger

    def balance_micro(self, account: Account) -> int:
        """The balance in micro-credits; 0 for an account never used."""
        return self._balances.get(account, 0)

    def balances(self) -> dict[Account, int]:
        """A copy of every balance that is not zero, in micro-credits."""
        return dict(self._balances)

    def knows(self, owner: bytes) -> bool:
        """Whether any money ever went through the hands of `owner`: keys cost nothing, money does."""
        return owner in self._flows

    def flows(self) -> dict[bytes, Flow]:
        """The flows of each owner; read them, do not change them."""
        return dict(self._flows)

    def total_micro(self) -> int:
        """The sum of all buckets inside: deposits minus withdrawals."""
        return sum(self._balances.values()) - self.balance_micro(WORLD)

    def check(self) -> None:
        """Recompute every promise from the balances. Raises ConservationBroken with the figures.

        O(accounts): run it after a rebuild, in tests and in `doctor`, not after each entry.
        """
        held_micro: dict[bytes, int] = {}
        for account, micro in self._balances.items():
            if micro < 0 and account != WORLD:
                raise ConservationBroken(f"account {account} holds {micro} micro-credits")
            if account.owner != NULL_KEY:
                held_micro[account.owner] = held_micro.get(account.owner, 0) + micro
        total_micro, outside_micro = self.total_micro(), self.balance_micro(WORLD)
        flows = self._flows.values()
        net_micro = sum(f.deposited_micro - f.withdrawn_micro for f in flows)
        if not total_micro == -outside_micro == net_micro:
            raise ConservationBroken(
                f"buckets hold {total_micro} micro-credits, {-outside_micro} came in from outside",
                why=f"deposits minus withdrawals are {net_micro}",
                next_step="stop the daemon and restore the last backup of the store",
            )
        for owner in sorted(held_micro.keys() | self._flows.keys()):
            flow, held = self._flows.get(owner, Flow()), held_micro.get(owner, 0)
            if flow.net_micro != held:
                raise ConservationBroken(f"peer {owner.hex()[:12]} holds {held}, its flows say {flow.net_micro}")

    def _flow(self, owner: bytes) -> Flow:
        flow = self._flows.get(owner)
        if flow is None:
            flow = self._flows[owner] = Flow()
        return flow

    def _count_flows(self, entry: Entry) -> None:
        payers = {a.owner for a, delta in entry.postings if a.bucket.startswith("channel:") and delta < 0}
        for account, delta_micro in entry.postings:
            if account.owner == NULL_KEY:
                continue
            flow = self._flow(account.owner)
            bucket = account.bucket.partition(":")[0]
            match entry.kind, bucket:
                case "deposit", _:
                    flow.deposited_micro += delta_micro
                case "withdraw", _:
                    flow.withdrawn_micro -= delta_micro
                case "settle", "channel":
                    flow.paid_micro -= delta_micro
                case "settle", "free" if account.owner in payers:
                    flow.paid_micro -= delta_micro
                case "settle", "free":
                    flow.earned_micro += delta_micro
                case "slash" | "convict", "lock":
                    flow.slashed_micro -= delta_micro
                case "lost-challenge" | "fault" | "equivocation", "stake" | "unbonding":
                    flow.slashed_micro -= delta_micro
                case ("slash" | "convict", "free" | "channel") | ("jackpot" | "lost-challenge", "free"):
                    # The channel's debit cancels its refund, so only what came from the lock is counted.
                    flow.awarded_micro += delta_micro
                case _:
                    pass  # one owner's money between its own buckets


@dataclass(frozen=True, slots=True)
class MoneyRow:
    """One line of the money table; every figure in micro-credits.

    free + stake + unbonding + channels + locks == deposited - withdrawn + earned + awarded - paid - slashed.
    """

    name: str
    deposited_micro: int = 0
    withdrawn_micro: int = 0
    free_micro: int = 0
    stake_micro: int = 0
    unbonding_micro: int = 0
    channels_micro: int = 0
    locks_micro: int = 0
    earned_micro: int = 0
    awarded_micro: int = 0
    paid_micro: int = 0
    slashed_micro: int = 0

    @property
    def held_micro(self) -> int:
        """All that the peer owns, spendable or not."""
        return self.free_micro + self.stake_micro + self.unbonding_micro + self.channels_micro + self.locks_micro


@dataclass(frozen=True, slots=True)
class MoneyTable:
    """A row for each peer, their totals, and the buckets nobody owns.

    totals.held + burned + pool == totals.deposited - totals.withdrawn, in micro-credits.
    """

    rows: tuple[MoneyRow, ...]
    totals: MoneyRow
    burned_micro: int
    pool_micro: int


def money_table(ledger: Ledger, names: Mapping[bytes, str]) -> MoneyTable:
    """What every peer put in, holds, earned and lost, by name; 12 hex digits of the key stand in for a
    name.

    Raises ConservationBroken if the columns do not add up to the deposits: a table of money never shows a
    sum that is not one.
    """
    held: dict[bytes, dict[str, int]] = {owner: {} for owner in ledger.flows()}
    for account, micro in ledger.balances().items():
        if account.owner != NULL_KEY:
            buckets = held.setdefault(account.owner, {})
            bucket = account.bucket.partition(":")[0]
            buckets[bucket] = buckets.get(bucket, 0) + micro
    flows = ledger.flows()
    rows = []
    for owner, buckets in held.items():
        flow = flows.get(owner, Flow())
        rows.append(
            MoneyRow(
                name=names.get(owner, owner.hex()[:12]),
                free_micro=buckets.get("free", 0),
                stake_micro=buckets.get("stake", 0),
                unbonding_micro=buckets.get("unbonding", 0),
                channels_micro=buckets.get("channel", 0),
                locks_micro=buckets.get("lock", 0),
                **{figure.name: getattr(flow, figure.name) for figure in fields(Flow)},
            )
        )
    rows.sort(key=lambda row: row.name)
    sums = {f.name: sum(getattr(row, f.name) for row in rows) for f in fields(MoneyRow) if f.name != "name"}
    totals = MoneyRow(name="total", **sums)
    burned_micro, pool_micro = ledger.balance_micro(BURNED), ledger.balance_micro(POOL)
    shown_micro = totals.held_micro + burned_micro + pool_micro
    net_micro = totals.deposited_micro - totals.withdrawn_micro
    if shown_micro != net_micro:
        raise ConservationBroken(f"the table shows {shown_micro} micro-credits of {net_micro}")
    return MoneyTable(tuple(rows), totals, burned_micro, pool_micro)
