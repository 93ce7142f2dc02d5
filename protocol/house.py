"""Availability pay: what a network's house pays who passes a challenge that came by surprise, and how that is recorded.

By the records the ledger has: an agreement between house and peer whose channel holds the pay, and the settlement that
pays it out, both signed by both. Nothing is locked and nothing re-executed: the bench card is the proof, and the
agreement names it.
"""

from __future__ import annotations

from protocol.bench_card import OpenCard, chain_operations
from protocol.codec import blake
from protocol.errors import VerificationFailed
from protocol.keys import peer_key
from protocol.network import House, Network
from protocol.records import Agreement, Settlement

__all__ = ["AVAILABILITY_NS", "availability_micro", "check_pay", "is_availability", "pay_agreement", "pay_settlement"]

AVAILABILITY_NS = 3600 * 10**9
"""The period that one passed challenge is paid for: `availability_micro_per_hour` is its rate."""

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
    house = network.house
    return house is not None and agreement.submitter == peer_key(house.peer) and agreement.task == _task(agreement.bid)


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
