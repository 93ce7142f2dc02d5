"""The entries in which somebody loses a lock or a stake after a dispute, and the one that ends a lock's window.

Like market/entries.py it knows no records: who may post what is decided where the records are checked. Rounding: every
share is rounded down and what is left burns, so nobody gains by provoking a rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

from market.entries import (
    BURNED,
    Account,
    Entry,
    Overdrawn,
    Posting,
    Shares,
    accounts_of,
    amount,
    close_key,
    divided,
)
from protocol.codec import blake
from protocol.outcomes import FAULT, LOCK, STAKE, Split

__all__ = [
    "convict",
    "equivocation",
    "equivocation_key",
    "fault",
    "jackpot_key",
    "lost_challenge",
    "release_key",
    "unlock",
]

Holdings = Sequence[tuple[Account, int]]  # buckets of one peer and what each holds, in micro-credits


def release_key(agreement_id: bytes) -> bytes:
    """The key of the entry that ends a lock which outlived its channel: freed or forfeited, never both. 32 bytes."""
    return blake("ichiba/entry/release", agreement_id)


def jackpot_key(agreement_id: bytes) -> bytes:
    """The key of the jackpot for the one error that may be ordered in an agreement, 32 bytes."""
    return blake("ichiba/entry/jackpot", agreement_id)


def unlock(agreement_id: bytes, *, submitter: bytes, solver: bytes, lock_micro: int) -> Entry:
    """lock -> stake of `solver`: the challenge window passed."""
    _, lock = accounts_of(agreement_id, submitter=submitter, solver=solver)
    amount(lock_micro, "lock_micro")
    return Entry(release_key(agreement_id), "unlock", ((lock, -lock_micro), (Account(solver, "stake"), lock_micro)))


def convict(
    agreement_id: bytes,
    *,
    submitter: bytes,
    solver: bytes,
    channel_micro: int,
    lock_micro: int,
    refund_micro: int,
    winner: bytes,
    rewarded: bool = True,
    costs: Sequence[tuple[bytes, int]] = (),
) -> Entry:
    """The solver was proved wrong by a referee.

    channel_micro: what is still in the channel; it returns to the submitter whole, and the entry is the end of the
    agreement. If it was closed before, channel_micro is 0, refund_micro is what the solver got, to be given back from
    the lock before anything else, and the entry ends the lock alone. rewarded: False if the winner was wrong as well;
    then its share burns.
    """
    amount(channel_micro, "channel_micro")
    amount(lock_micro, "lock_micro")
    amount(refund_micro, "refund_micro")
    channel, lock = accounts_of(agreement_id, submitter=submitter, solver=solver)
    refund_micro = min(refund_micro, lock_micro)
    postings = [
        (channel, -channel_micro),
        (lock, -lock_micro),
        (Account(submitter, "free"), channel_micro + refund_micro),
        *divided(lock_micro - refund_micro, costs, LOCK, winner=winner if rewarded else b"", submitter=submitter),
    ]
    key = close_key(agreement_id) if channel_micro else release_key(agreement_id)
    return Entry(key, "convict", tuple(postings))


def _taken(loser: bytes, micro: int, holdings: Holdings) -> list[Posting]:
    """`micro` out of the buckets that answer for a peer, in their order. Raises InsufficientFunds if they hold less."""
    if not holdings:
        return [(Account(loser, "stake"), -micro)]
    taken, left = [], micro
    for account, held in holdings:
        assert account.owner == loser, "nobody answers for another"
        taken.append((account, -min(left, held)))
        left -= min(left, held)
    if left:
        raise Overdrawn(holdings[0][0], needed_micro=micro, held_micro=micro - left)
    return taken


def _from_stake(
    key: bytes, kind: str, loser: bytes, micro: int, costs: Shares, split: Split, holdings: Holdings
) -> Entry:
    amount(micro, "micro")
    shares = divided(micro, costs, split, winner=loser, submitter=loser)
    return Entry(key, kind, (*_taken(loser, micro, holdings), *shares))


def lost_challenge(
    dispute: bytes, *, challenger: bytes, micro: int, costs: Shares = (), holdings: Holdings = ()
) -> Entry:
    """A challenger was wrong: `micro` of its stake pay the solver's and the referees' costs; of the rest half burns,
    half fills the pool. holdings: the buckets it is taken from, in order; its stake alone if none."""
    key = blake("ichiba/entry/dispute", dispute)
    return _from_stake(key, "lost-challenge", challenger, micro, costs, STAKE, holdings)


def fault(verdict: bytes, *, checker: bytes, micro: int, holdings: Holdings = ()) -> Entry:
    """A checker signed that wrong work was right: `micro` of its stake; half burns, half fills the pool. holdings: as
    for `lost_challenge`."""
    return _from_stake(blake("ichiba/entry/fault", verdict), "fault", checker, micro, (), FAULT, holdings)


def equivocation_key(culprit: bytes, sequence: int) -> bytes:
    """The key of the entry that burns a stake for two orders under one number, 32 bytes."""
    return blake("ichiba/entry/equivocation", culprit, sequence.to_bytes(8, "big"))


def equivocation(culprit: bytes, sequence: int, *, micro: int, holdings: Holdings = ()) -> Entry:
    """An owner signed two orders under one sequence number: `micro` of its stake burn, once for a number however many
    orders it signed. All of it burns, so that nobody gains by a proof. holdings: as for `lost_challenge`."""
    amount(micro, "micro")
    taken = _taken(culprit, micro, holdings)
    return Entry(equivocation_key(culprit, sequence), "equivocation", (*taken, (BURNED, micro)))
