"""One movement of money: accounts, entries that sum to zero, and the builder of each kind the market knows.

Promises: an Entry in hand is balanced, bounded and in one canonical form, and `apply_entry` is the only
rule book for what it does to balances, in memory and on disk alike. Refuses to know who may post it:
callers verify records first.

Rounding: amounts are whole micro-credits, so opening, settling and moving stakes divide nothing and round
nothing, and what a settlement does not state stays with the payer. Only `slash` divides; there each
checker's share and the submitter's compensation are rounded down and the odd micro-credits burn, so nobody
gains by provoking a rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from protocol import params
from protocol.codec import blake, encode
from protocol.errors import (
    InsufficientFunds,
    LimitExceeded,
    LocalProtocolError,
    MalformedRecord,
    VerificationFailed,
)
from protocol.outcomes import Split

__all__ = [
    "BURNED",
    "NULL_KEY",
    "POOL",
    "WORLD",
    "Account",
    "ConflictingEntry",
    "Entry",
    "Overdrawn",
    "UnbalancedEntry",
    "apply_entry",
    "close_key",
    "deposit",
    "divided",
    "jackpot",
    "open_channel",
    "open_key",
    "refuse_conflict",
    "settle",
    "slash",
    "stake_add",
    "unbond",
    "unbond_key",
    "unbonded",
    "unbonded_key",
    "unbonding_of",
    "withdraw",
]

NULL_KEY: Final = bytes(32)
KINDS: Final = frozenset(
    {
        *("deposit", "withdraw", "open", "settle", "slash", "stake-add", "unbond", "unbonded", "jackpot"),
        *("unlock", "convict", "lost-challenge", "fault", "equivocation"),  # market/penalties.py
    }
)
CLOSING_KINDS: Final = frozenset({"settle", "slash", "convict", "unlock", "unbonded"})
WORLD_SIGN: Final = {"deposit": -1, "withdraw": 1}
OWNED_BUCKET: Final = re.compile(r"free|stake|(?:channel|lock|unbonding):[0-9a-f]{64}")
_WHOLE_BUCKETS: Final = ("channel:", "lock:", "unbonding:")  # an entry that closes one takes all of it
SHARED_BUCKETS: Final = frozenset({"burned", "pool", "world"})

Shares = Sequence[tuple[bytes, int]]


class UnbalancedEntry(LocalProtocolError):
    """An entry whose postings do not sum to zero: somebody built it by hand, and wrongly."""

    code = "unbalanced-entry"


class ConflictingEntry(VerificationFailed):
    """Two different entries under one idempotency key, such as two ends of one agreement."""

    code = "conflicting-entry"


class Overdrawn(InsufficientFunds):
    """An entry takes more than `account` holds. Carries `account`, `needed_micro`, `held_micro`."""

    def __init__(self, account: Account, *, needed_micro: int, held_micro: int) -> None:
        self.account, self.needed_micro, self.held_micro = account, needed_micro, held_micro
        super().__init__(
            f"account {account} holds {held_micro} micro-credits, {needed_micro} are needed",
            next_step=f"add {needed_micro - held_micro} micro-credits to it or lower the amount",
        )


@dataclass(frozen=True, slots=True, order=True)
class Account:
    """One bucket of one owner.

    owner: a peer key of 32 bytes, NULL_KEY for the shared buckets. bucket: `free`, `stake`,
    `channel:<agreement id in hex>`, `lock:<agreement id in hex>`, `unbonding:<move id in hex>`, and for NULL_KEY
    `burned`, `pool` and `world`, the outside, which alone may be negative. Raises MalformedRecord.
    """

    owner: bytes
    bucket: str

    def __post_init__(self) -> None:
        if len(self.owner) != 32:
            raise MalformedRecord(f"account owner of {len(self.owner)} bytes, a peer key has 32")
        if self.owner == NULL_KEY:
            known = self.bucket in SHARED_BUCKETS
        else:
            known = OWNED_BUCKET.fullmatch(self.bucket) is not None
        if not known:
            raise MalformedRecord(f"no bucket {self.bucket[:80]!r} for owner {self.owner.hex()[:12]}")

    def __str__(self) -> str:
        return f"{self.owner.hex()[:12]}/{self.bucket}"


BURNED: Final = Account(NULL_KEY, "burned")
POOL: Final = Account(NULL_KEY, "pool")
WORLD: Final = Account(NULL_KEY, "world")

Posting = tuple[Account, int]


@dataclass(frozen=True, slots=True)
class Entry:
    """One movement of money, in canonical form: one posting an account, none of zero, accounts in order.

    key: 32 bytes; an entry is applied once per key. kind: one of KINDS. postings: (account, delta in
    micro-credits), brought into canonical form here, so that the order a caller lists them in never matters.
    memo: printable text of at most params.ENTRY_MEMO_CHARS_MAX. Raises UnbalancedEntry, MalformedRecord,
    LimitExceeded.
    """

    key: bytes
    kind: str
    postings: tuple[Posting, ...]
    memo: str = ""

    def __post_init__(self) -> None:
        if len(self.key) != 32:
            raise MalformedRecord(f"entry key of {len(self.key)} bytes, it has 32")
        if self.kind not in KINDS:
            raise MalformedRecord(f"no kind of entry {self.kind[:40]!r}")
        if len(self.memo) > params.ENTRY_MEMO_CHARS_MAX:
            raise LimitExceeded(f"memo of {len(self.memo)} characters, at most {params.ENTRY_MEMO_CHARS_MAX}")
        if not self.memo.isprintable():
            raise MalformedRecord("memo holds characters that do not print")
        merged: dict[Account, int] = {}
        for account, delta_micro in self.postings:
            merged[account] = merged.get(account, 0) + delta_micro
        postings = tuple(sorted((account, delta) for account, delta in merged.items() if delta))
        if len(postings) > params.ENTRY_POSTINGS_MAX:
            raise LimitExceeded(f"entry of {len(postings)} postings, at most {params.ENTRY_POSTINGS_MAX}")
        if (off_micro := sum(delta for _, delta in postings)) != 0:
            raise UnbalancedEntry(f"{self.kind} entry is {off_micro} micro-credits off balance")
        for account, delta_micro in postings:
            if account == WORLD and delta_micro * WORLD_SIGN.get(self.kind, 0) <= 0:
                raise MalformedRecord(f"a {self.kind} entry moves {delta_micro} micro-credits of the outside world")
            if account == BURNED and delta_micro < 0:
                raise MalformedRecord(f"a {self.kind} entry takes {-delta_micro} burned micro-credits back")
        object.__setattr__(self, "postings", postings)

    def digest(self) -> bytes:
        """BLAKE2b-256 of the whole content, 32 bytes: equal digests are equal entries."""
        rows = [(account.owner, account.bucket, delta) for account, delta in self.postings]
        return blake("ichiba/entry", encode((self.key, self.kind, self.memo, rows)))


def apply_entry(entry: Entry, held: Callable[[Account], int]) -> dict[Account, int]:
    """The balances of every account of `entry` after it, in micro-credits; changes nothing itself.

    held: account -> balance before. The one rule book for the ledger in memory and the balances on disk.
    Raises Overdrawn, LimitExceeded, and VerificationFailed if a settle or slash would leave money in its
    channel or lock.
    """
    after: dict[Account, int] = {}
    for account, delta_micro in entry.postings:
        before_micro = held(account)
        after_micro = before_micro + delta_micro
        if after_micro < 0 and account != WORLD:
            raise Overdrawn(account, needed_micro=-delta_micro, held_micro=before_micro)
        if abs(after_micro) > params.BALANCE_MICRO_MAX:
            raise LimitExceeded(f"account {account} would hold {after_micro} micro-credits")
        if after_micro and entry.kind in CLOSING_KINDS and account.bucket.startswith(_WHOLE_BUCKETS):
            raise VerificationFailed(
                f"{entry.kind} takes {-delta_micro} of the {before_micro} micro-credits in {account}",
                why="an agreement or a withdrawal ends once, so what it leaves behind would be locked for ever",
            )
        after[account] = after_micro
    return after


def refuse_conflict(entry: Entry, digest: bytes, known: bytes) -> None:
    """Raise ConflictingEntry unless `digest`, of `entry`, is the digest `known` under its key."""
    if digest != known:
        raise ConflictingEntry(
            f"{entry.kind} entry {entry.key.hex()[:12]} differs from the one applied under its key",
            why=f"applied {known.hex()[:12]}, offered {digest.hex()[:12]}",
            next_step="keep both records: two ends of one agreement signed by a party are proof of fraud",
        )


def open_key(agreement_id: bytes) -> bytes:
    """The key of the entry that opens the channel of an agreement, 32 bytes."""
    return blake("ichiba/entry/open", agreement_id)


def close_key(agreement_id: bytes) -> bytes:
    """The key of the entry that ends an agreement. `settle` and `slash` share it, so only one can happen."""
    return blake("ichiba/entry/close", agreement_id)


def amount(micro: int, name: str) -> int:
    """`micro` if it is an amount a record may state. Raises MalformedRecord, LimitExceeded."""
    if type(micro) is not int or micro < 0:
        raise MalformedRecord(f"{name} is {micro!r}, not a whole number of micro-credits from 0 up")
    if micro > params.AMOUNT_MICRO_MAX:
        raise LimitExceeded(f"{name} is {micro} micro-credits, at most {params.AMOUNT_MICRO_MAX}")
    return micro


def shares_total(shares: Shares, name: str) -> int:
    """The sum of `shares` in micro-credits after checking each. Raises MalformedRecord, LimitExceeded."""
    if len(shares) > params.ENTRY_SHARES_MAX:
        raise LimitExceeded(f"{len(shares)} {name}, at most {params.ENTRY_SHARES_MAX}")
    return sum(amount(micro, name) for _, micro in shares)


def accounts_of(agreement_id: bytes, *, submitter: bytes, solver: bytes) -> tuple[Account, Account]:
    """The submitter's channel and the solver's lock of an agreement (id of 32 bytes)."""
    if len(agreement_id) != 32:
        raise MalformedRecord(f"agreement id of {len(agreement_id)} bytes, it has 32")
    return Account(submitter, f"channel:{agreement_id.hex()}"), Account(solver, f"lock:{agreement_id.hex()}")


def divided(micro: int, costs: Shares, split: Split, *, winner: bytes, submitter: bytes) -> list[Posting]:
    """Where `micro` forfeited micro-credits go: costs in full, or pro rata if they exceed it, then the split. winner:
    empty if nobody is to get its share."""
    costs_micro = shares_total(costs, "costs")
    covered = [
        (Account(peer, "free"), cost if costs_micro <= micro else cost * micro // costs_micro) for peer, cost in costs
    ]
    rest = micro - sum(cost for _, cost in covered)
    if costs_micro > micro:
        return [*covered, (BURNED, rest)]  # dust of nobody's
    shares = [
        (Account(winner, "free") if winner else BURNED, rest * split.winner // 1000),
        (Account(submitter, "free"), rest * split.submitter // 1000),
        (POOL, rest * split.pool // 1000),
    ]
    return [*covered, *shares, (BURNED, rest - sum(share for _, share in shares))]


def deposit(key: bytes, owner: bytes, free_micro: int, stake_micro: int = 0, *, memo: str = "") -> Entry:
    """world -> free and stake of `owner`."""
    total_micro = amount(free_micro, "free_micro") + amount(stake_micro, "stake_micro")
    postings = (
        (WORLD, -total_micro),
        (Account(owner, "free"), free_micro),
        (Account(owner, "stake"), stake_micro),
    )
    return Entry(key, "deposit", postings, memo)


def withdraw(key: bytes, owner: bytes, micro: int, *, memo: str = "") -> Entry:
    """free of `owner` -> world."""
    amount(micro, "micro")
    return Entry(key, "withdraw", ((Account(owner, "free"), -micro), (WORLD, micro)), memo)


def stake_add(key: bytes, owner: bytes, micro: int, *, memo: str = "") -> Entry:
    """free -> stake of `owner`."""
    amount(micro, "micro")
    return Entry(key, "stake-add", ((Account(owner, "free"), -micro), (Account(owner, "stake"), micro)), memo)


def unbonding_of(owner: bytes, move: bytes) -> Account:
    """The bucket of what one withdrawal (record id of 32 bytes) takes out of a stake, until its window ends."""
    return Account(owner, f"unbonding:{move.hex()}")


def unbond_key(move: bytes) -> bytes:
    """The key of the entry that begins a withdrawal, 32 bytes."""
    return blake("ichiba/entry/unbond", move)


def unbonded_key(move: bytes) -> bytes:
    """The key of the entry that ends a withdrawal, 32 bytes."""
    return blake("ichiba/entry/unbonded", move)


def unbond(move: bytes, *, owner: bytes, micro: int) -> Entry:
    """stake -> unbonding of `owner`, by the record `move`: it counts as stake no more, and is not free yet. What is
    locked by an agreement is not in `stake` and cannot leave."""
    amount(micro, "micro")
    return Entry(
        unbond_key(move), "unbond", ((Account(owner, "stake"), -micro), (unbonding_of(owner, move), micro))
    )


def unbonded(move: bytes, *, owner: bytes, micro: int) -> Entry:
    """unbonding -> free of `owner`: the window passed. micro: all that is left of it."""
    amount(micro, "micro")
    return Entry(
        unbonded_key(move), "unbonded", ((unbonding_of(owner, move), -micro), (Account(owner, "free"), micro))
    )


def jackpot(key: bytes, checker: bytes, micro: int, *, memo: str = "") -> Entry:
    """pool -> free of who found a forced error. DESIGN §8."""
    amount(micro, "micro")
    return Entry(key, "jackpot", ((POOL, -micro), (Account(checker, "free"), micro)), memo)


def open_channel(
    agreement_id: bytes,
    *,
    submitter: bytes,
    budget_micro: int,
    solver: bytes,
    lock_micro: int,
    memo: str = "",
) -> Entry:
    """The submitter's free -> its channel, the solver's stake -> its lock, under `open_key(agreement_id)`."""
    amount(budget_micro, "budget_micro")
    amount(lock_micro, "lock_micro")
    channel, lock = accounts_of(agreement_id, submitter=submitter, solver=solver)
    postings = (
        (Account(submitter, "free"), -budget_micro),
        (channel, budget_micro),
        (Account(solver, "stake"), -lock_micro),
        (lock, lock_micro),
    )
    return Entry(open_key(agreement_id), "open", postings, memo)


def settle(
    agreement_id: bytes,
    *,
    submitter: bytes,
    solver: bytes,
    channel_micro: int,
    lock_micro: int,
    paid_micro: int,
    fees: Shares = (),
    memo: str = "",
) -> Entry:
    """The end of an agreement nobody disputes: channel -> solver's and checkers' free, the lock -> stake.

    channel_micro, lock_micro: all that the two buckets hold; lock_micro 0 leaves the lock, for `unlock` after the time
    in which the work may be challenged. paid_micro: to the solver. fees: (peer key,
    micro) on top of it; a fee to NULL_KEY goes to the pool. What is left of the channel returns to the
    submitter: the payer keeps every micro-credit that is not stated here. Raises VerificationFailed if paid
    and fees exceed the channel.
    """
    amount(channel_micro, "channel_micro")
    amount(lock_micro, "lock_micro")
    out_micro = amount(paid_micro, "paid_micro") + shares_total(fees, "fees")
    if out_micro > channel_micro:
        raise VerificationFailed(f"settlement pays {out_micro} of a channel of {channel_micro} micro-credits")
    channel, lock = accounts_of(agreement_id, submitter=submitter, solver=solver)
    postings = [
        (channel, -channel_micro),
        (Account(solver, "free"), paid_micro),
        (Account(submitter, "free"), channel_micro - out_micro),
        (lock, -lock_micro),
        (Account(solver, "stake"), lock_micro),
    ]
    postings += [(POOL if peer == NULL_KEY else Account(peer, "free"), micro) for peer, micro in fees]
    return Entry(close_key(agreement_id), "settle", tuple(postings), memo)


def slash(
    agreement_id: bytes,
    *,
    submitter: bytes,
    solver: bytes,
    channel_micro: int,
    lock_micro: int,
    checker_costs: Shares = (),
    memo: str = "",
) -> Entry:
    """The end of an agreement whose solver was proved wrong.

    The channel returns to the submitter whole. From the lock first each checker's metered cost; if they
    exceed the lock, each gets its share of the lock by cost, rounded down. Of the rest at least half burns
    (the odd micro-credit with it) and the other half compensates the submitter, so "challenging oneself
    loses", DESIGN §7.
    """
    amount(channel_micro, "channel_micro")
    amount(lock_micro, "lock_micro")
    channel, lock = accounts_of(agreement_id, submitter=submitter, solver=solver)
    postings = (
        (channel, -channel_micro),
        (lock, -lock_micro),
        (Account(submitter, "free"), channel_micro),
        *divided(lock_micro, checker_costs, Split(submitter=500), winner=submitter, submitter=submitter),
    )
    return Entry(close_key(agreement_id), "slash", postings, memo)
