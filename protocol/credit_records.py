"""The signed records of mutual credit: a line, the netting of two peers' debts, the clearing of a cycle of them.

None of them touches a deposit, and no ledger but those of the peers they name keeps them: a debt is between two who
know each other (DESIGN §10, "bilateral credit limits only"). docs/decisions/0013 says who can be cheated how.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec

from protocol import params
from protocol.codec import Digest, PeerKey, Uint, blake, encode
from protocol.errors import MalformedRecord, VerificationFailed

__all__ = [
    "NO_CREDIT",
    "ON_CREDIT",
    "Clearing",
    "CreditLine",
    "CreditRecord",
    "Netting",
    "Settled",
    "check_clearing",
    "check_line",
    "check_netting",
    "covered_digest",
    "pair_of",
]

Amount = Annotated[int, msgspec.Meta(ge=0, le=params.AMOUNT_MICRO_MAX)]

NO_CREDIT: Final = bytes(32)
"""The credit line of an agreement that is paid out of a channel."""

ON_CREDIT: Final = "done on credit for an acquaintance: nobody re-executed it and no stake answers for it"
"""What is known of such work, in words."""


class CreditLine(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/credit-line/1"
):
    """The creditor works for the debtor without a deposit, until `limit_micro` are owed. Signed by the creditor.

    The newest sequence number of a pair replaces; a limit of 0 closes the line for new work, and no debt with it. Two
    lines of one number prove that the creditor shows different things at different times (protocol/equivocation.py).
    """

    network: Digest
    creditor: PeerKey
    debtor: PeerKey
    sequence: Uint
    limit_micro: Amount
    created_ns: Uint
    expires_ns: Uint


class Netting(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/netting/1"
):
    """What two peers owe each other after the deals and clearings that `covered` is the hash of, which both may forget
    now. Signed by both; `first` is the smaller key and signs first. Of the two amounts at most one is not 0."""

    network: Digest
    first: PeerKey
    second: PeerKey
    sequence: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    previous: Digest  # the id of the netting before it; zero for the first
    covered: Digest
    first_owes_micro: Amount
    second_owes_micro: Amount
    created_ns: Uint


class Clearing(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/clearing/1"
):
    """Each of `parties` owes the next, and the last the first: all these debts fall by one amount, so nobody's position
    moves. It holds once every party has signed these bytes, each in an envelope of its own. number: the how-manieth of
    just these parties; with no time in it, two who find one cycle at once propose the same record."""

    network: Digest
    parties: Annotated[
        tuple[PeerKey, ...], msgspec.Meta(min_length=3, max_length=params.CREDIT_CYCLE_MAX)
    ]  # the smallest key first
    amount_micro: Annotated[int, msgspec.Meta(ge=1, le=params.AMOUNT_MICRO_MAX)]
    number: Uint


CreditRecord: TypeAlias = CreditLine | Netting | Clearing


class Settled(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One thing that a netting covers: a deal that made the debtor owe, or a clearing that took off what it owed."""

    id: Digest
    debtor: PeerKey
    micro: Annotated[int, msgspec.Meta(ge=-params.AMOUNT_MICRO_MAX, le=params.AMOUNT_MICRO_MAX)]


def covered_digest(settled: tuple[Settled, ...]) -> bytes:
    """The hash of what a netting covers, in order of ids. Raises MalformedRecord for another order or a double."""
    ids = [one.id for one in settled]
    if ids != sorted(set(ids)):
        raise MalformedRecord("what a netting covers is not in strict order of ids")
    return blake("ichiba/netting-covers", encode(settled))


def pair_of(one: bytes, other: bytes) -> tuple[bytes, bytes]:
    """Two keys in the order in which a Netting names them."""
    return (one, other) if one < other else (other, one)


def check_line(line: CreditLine) -> None:
    """Raise VerificationFailed for a line of a peer to itself, or one that ends before it begins or lives too long."""
    if line.creditor == line.debtor:
        raise VerificationFailed("a credit line of a peer to itself")
    if not line.created_ns < line.expires_ns <= line.created_ns + params.CREDIT_LIFETIME_NS_MAX:
        days = params.CREDIT_LIFETIME_NS_MAX // (86_400 * 10**9)
        raise VerificationFailed(f"a credit line ends before it begins, or after more than {days} days")


def check_netting(netting: Netting) -> None:
    """Raise VerificationFailed unless the pair is in order and only one of the two owes."""
    if netting.first >= netting.second:
        raise VerificationFailed("a netting names its pair in the wrong order")
    if netting.first_owes_micro and netting.second_owes_micro:
        raise VerificationFailed("a netting in which both still owe is none")


def check_clearing(clearing: Clearing) -> None:
    """Raise VerificationFailed unless the parties are distinct and the smallest comes first."""
    if len(set(clearing.parties)) != len(clearing.parties) or clearing.parties[0] != min(clearing.parties):
        raise VerificationFailed("a clearing names a party twice, or does not begin with the smallest key")
