"""What a network's house pays newcomers for, and how that is recorded: passed challenges that came by surprise, and
re-runs, which are ordinary deals but for what they lock and check (peer/reruns.py).

Availability is paid by the records the ledger has: an agreement between house and peer whose channel holds the pay, and
the settlement that pays it out, both signed by both. Nothing is locked and nothing re-executed: the bench card is the
proof, and the agreement names it.
"""

from __future__ import annotations

from typing import Literal

from protocol.bench_card import OpenCard, chain_operations
from protocol.codec import blake
from protocol.credit_records import NO_CREDIT
from protocol.errors import VerificationFailed
from protocol.network import House, Network
from protocol.records import Agreement, Settlement

__all__ = [
    "AVAILABILITY_NS",
    "KNOWN_END",
    "availability_micro",
    "check_pay",
    "is_availability",
    "is_rerun",
    "part_of_house",
    "pay_agreement",
    "pay_settlement",
    "takes_rerun",
]

AVAILABILITY_NS = 3600 * 10**9
"""The period that one passed challenge is paid for: `availability_micro_per_hour` is its rate."""

KNOWN_END = "nobody was asked to check it: the house ran it itself before, and this ends at the same root"

_ZERO = bytes(32)


def availability_micro(house: House, card: OpenCard) -> int:
    """The pay for one period, in micro-credits, rounded down: the rate for each tera-operation a second that the card
    proves. In proportion, so that a machine that shares its time among many names gains nothing by them."""
    return house.availability_micro_per_hour * card.operations_per_second // 10**12


def _task(card_id: bytes) -> bytes:
    return blake("ichiba/house-availability", card_id)


def pay_agreement(network: Network, card: OpenCard, *, pay_micro: int, sequence: int, now_ns: int) -> Agreement:
    """The agreement that holds the pay: about the challenge's chain, which was done before it was signed."""
    operations = chain_operations(card.challenge.side, card.challenge.links)
    return Agreement(
        network=network.id,
        offer=card.challenge_id,
        bid=card.id,
        task=_task(card.id),
        submitter=card.card.challenger,
        solver=card.card.peer,
        sequence=sequence,
        first_segment=0,
        last_segment=1,
        base_root=_ZERO,
        operations=operations,
        unit_price=pay_micro * 10**9 // operations,
        channel_micro=pay_micro,
        lock_micro=0,
        check_permille=0,
        submitter_commitment=_ZERO,
        solver_commitment=_ZERO,
        forced_commitment=_ZERO,
        accept_before_ns=now_ns + AVAILABILITY_NS,
        segment_deadline_ns=0,
        created_ns=now_ns,
    )


def pay_settlement(agreement: Agreement, agreement_id: bytes) -> Settlement:
    """The settlement that pays all of it out."""
    return Settlement(
        network=agreement.network,
        agreement=agreement_id,
        submitter=agreement.submitter,
        solver=agreement.solver,
        paid_micro=agreement.channel_micro,
        fees=(),
        proof=agreement.bid,
    )


def is_availability(agreement: Agreement, network: Network) -> bool:
    """Whether an agreement is the house's pay for a passed challenge, and no work."""
    return bool(network.house) and agreement.submitter == network.house_key and agreement.task == _task(agreement.bid)


def takes_rerun(submitter: bytes, *, check_permille: int, lock_micro: int, network: Network) -> bool:
    """Whether work on a graph may go unchecked and unstaked because the house orders it: it knows the right end. A
    script of the house, of which nothing can be checked, looks the same in an agreement."""
    return network.reruns is not None and submitter == network.house_key and not check_permille and not lock_micro


def is_rerun(agreement: Agreement, network: Network) -> bool:
    """Whether an agreement is on a re-run for the house, as far as can be told from it alone (`takes_rerun`)."""
    unchecked = takes_rerun(
        agreement.submitter, check_permille=agreement.check_permille, lock_micro=agreement.lock_micro, network=network
    )
    return unchecked and agreement.credit == NO_CREDIT and not is_availability(agreement, network)


def part_of_house(agreement: Agreement, network: Network) -> Literal["", "available", "rerun"]:
    """For what of its programme for newcomers the house pays by this agreement; empty if for nothing of it."""
    if is_availability(agreement, network):
        return "available"
    return "rerun" if is_rerun(agreement, network) else ""


def check_pay(
    agreement: Agreement, agreement_id: bytes, settlement: Settlement, *, network: Network, me: bytes
) -> None:
    """Raise VerificationFailed unless these two pay `me` and bind it to nothing. For which card is the house's to know:
    the newest may have another number by the time that the pay comes."""
    if not is_availability(agreement, network) or agreement.solver != me:
        raise VerificationFailed("availability pay that is not of this network's house to this peer")
    if agreement.lock_micro or agreement.check_permille or not agreement.channel_micro:
        raise VerificationFailed("availability pay that locks a stake, or pays nothing")
    if settlement != pay_settlement(agreement, agreement_id):
        raise VerificationFailed("availability pay whose settlement does not pay it")
