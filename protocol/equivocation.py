"""Proof that a peer signed two records of which only one may exist.

Two asks of one slot and sequence number, two bids of one nonce on one offer, two orders under one sequence number of
their owner (agreements of a submitter, moves of its stake), two credit lines of one number to one debtor: whoever holds
both can show them to anybody, and nobody can make them but the peer itself.
"""

from __future__ import annotations

from typing import TypeAlias

from protocol.certificate import signed_by
from protocol.credit_records import NO_CREDIT, CreditLine
from protocol.errors import VerificationFailed
from protocol.records import Agreement, Ask, Bid, Equivocation, Record, StakeMove, open_record

__all__ = ["Placed", "check_equivocation", "ordered_twice", "place_of", "prove"]

Placed: TypeAlias = Ask | Bid | Agreement | StakeMove | CreditLine


def place_of(record: Record) -> tuple[bytes, tuple[object, ...]] | None:
    """(peer, place) of a record whose place its peer may fill once, else None. Of an agreement the peer is the
    submitter, whose openings and moves of stake have one series of sequence numbers."""
    match record:
        case Ask(peer=peer, slot=slot, sequence=number):
            return peer, ("ask", slot, number)
        case Bid(solver=peer, offer=offer, nonce=number):
            return peer, ("bid", offer, number)
        case Agreement(submitter=peer, sequence=number) | StakeMove(owner=peer, sequence=number):
            return peer, ("order", number)
        case CreditLine(creditor=peer, debtor=debtor, sequence=number):
            return peer, ("credit", debtor, number)
    return None


def prove(first: bytes, second: bytes, *, network: bytes) -> Equivocation:
    """The record that shows two envelopes to anybody; whoever publishes it signs it. Raises VerificationFailed if they
    prove nothing, and what `open_record` raises."""
    opened = [(open_record(envelope, network=network), envelope) for envelope in (first, second)]
    place = place_of(opened[0][0][0])
    if place is None:
        raise VerificationFailed("a record of which there may be many")
    # Its signature alone: an agreement may carry those of notaries as well, on each peer of others.
    found = sorted((record_id, signed_by(envelope, place[:1])) for (_, record_id, _), envelope in opened)
    proof = Equivocation(
        network=network,
        culprit=place[0],
        first=found[0][1],
        second=found[1][1],
    )
    check_equivocation(proof)
    return proof


def check_equivocation(proof: Equivocation) -> tuple[Placed, Placed]:
    """The two records, both signed by the culprit, of one place and not the same. Raises VerificationFailed, and what
    `open_record` raises."""
    (one, first, signed_one), (two, second, signed_two) = (
        open_record(envelope, network=proof.network) for envelope in (proof.first, proof.second)
    )
    if first >= second:
        raise VerificationFailed("an equivocation of one record, or not in the order of their ids")
    place = place_of(one)
    if place is None or place != place_of(two) or not isinstance(one, Placed) or not isinstance(two, Placed):
        raise VerificationFailed("two records that may both exist", why="they do not fill one place")
    if place[0] != proof.culprit or proof.culprit not in signed_one & signed_two:
        raise VerificationFailed("an equivocation that its culprit did not sign")
    return one, two


def ordered_twice(proof: Equivocation) -> int | None:
    """The sequence number under which the culprit signed two orders that take its money, openings of channels or moves
    of stake; None for other places, and for deals on credit, which take none. Raises what `check_equivocation` does."""
    orders = check_equivocation(proof)
    if not all(_takes_money(order) for order in orders):
        return None
    assert isinstance(orders[0], Agreement | StakeMove)
    return orders[0].sequence


def _takes_money(order: Placed) -> bool:
    return isinstance(order, StakeMove) or (isinstance(order, Agreement) and order.credit == NO_CREDIT)
