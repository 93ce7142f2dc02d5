"""Whether an order over somebody's money stands: the signatures of its parties, and of a quorum of notaries over the
same body. An order is an agreement, which opens a channel, or a move of stake.

Any two quorums (2f + 1 of 3f + 1) have an honest notary in common, and an honest notary certifies no order that its
owners' free balance or stake cannot bear beside what it certified before (peer/notary.py). So no balance is reserved
twice, in whatever order peers hear of the orders. DESIGN §10, docs/decisions/0011-certified-openings.md.

A notary that is a party is not counted: its signature says that it agrees, not that it looked. A network without
notaries certifies nothing, and the parties' signatures are enough.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

from protocol import params
from protocol.codec import decode, encode
from protocol.credit_records import NO_CREDIT
from protocol.errors import VerificationFailed
from protocol.network import Network
from protocol.records import Agreement, Envelope, StakeMove, Void, open_record, parties

__all__ = [
    "Bucket",
    "Order",
    "asked_by_ns",
    "attach",
    "certifiers",
    "check_certified",
    "check_cosigned",
    "check_voided",
    "ordered_by",
    "provable",
    "signed_by",
    "takes",
    "takes_certificate",
]

Order: TypeAlias = Agreement | StakeMove
Bucket: TypeAlias = Literal["free", "stake"]


def ordered_by(order: Order) -> tuple[bytes, int]:
    """Whose order it is, and its number in the one series of that owner's orders."""
    if isinstance(order, StakeMove):
        return order.owner, order.sequence
    return order.submitter, order.sequence


def asked_by_ns(order: Order) -> int:
    """By when its certificate is asked for, as it says itself, in ns since the epoch: notaries sign nothing anew long
    after that."""
    return order.created_ns if isinstance(order, StakeMove) else order.accept_before_ns


def takes(order: Order) -> tuple[tuple[bytes, Bucket, int], ...]:
    """What it takes: (peer, bucket `free` or `stake`, micro-credits)."""
    if isinstance(order, StakeMove):
        return ((order.owner, "free" if order.kind == "add" else "stake", order.amount_micro),)
    return (order.submitter, "free", order.channel_micro), (order.solver, "stake", order.lock_micro)


def certifiers(network: Network, order: Order) -> tuple[bytes, ...]:
    """The notaries that certify an order: all but its parties, by key. Empty where they are too few for a quorum,
    or there are none."""
    return network.impartial(*parties(order))


def takes_certificate(order: Order, network: Network) -> bool:
    """Whether notaries have to certify it: where there are some, unless it is on credit and takes no money."""
    return bool(network.notaries) and (isinstance(order, StakeMove) or order.credit == NO_CREDIT)


def provable(network: Network) -> int:
    """f + 1: of so many notaries that say one thing, one is honest."""
    return len(network.notaries) - network.notary_quorum + 1


def check_cosigned(order: Order, signers: Collection[bytes], network: Network) -> frozenset[bytes]:
    """The notaries that signed beside the parties. Raises VerificationFailed if a party did not, or a stranger did."""
    who, what = parties(order), _word(order)
    if isinstance(order, Agreement) and len(who) != 2:
        raise VerificationFailed("agreement of a peer with itself")
    if not who <= set(signers):
        raise VerificationFailed(f"{what} without the signature of each party")
    others = frozenset(signers) - who
    if not others <= network.notary_keys:
        raise VerificationFailed(f"{what} signed by a peer that is neither a party nor a notary")
    return others


def check_certified(order: Order, signers: Collection[bytes], network: Network) -> None:
    """Raise VerificationFailed unless these signers (whose signatures `open_record` found right) make it stand."""
    notaries = check_cosigned(order, signers, network)
    if takes_certificate(order, network) and len(notaries) < network.notary_quorum:
        raise VerificationFailed(
            f"{_word(order)} with the signatures of {len(notaries)} notaries that are no party to it",
            why=f"{network.notary_quorum} of {len(network.notaries)} certify an order",
        )


def _word(order: Order) -> str:
    return "move of stake" if isinstance(order, StakeMove) else "agreement"


def check_voided(voids: Sequence[bytes], order_id: bytes, order: Order, network: Network) -> None:
    """Raise VerificationFailed unless a quorum of its notaries never certifies this order: envelopes of Voids.

    Of 2f + 1 that say so f + 1 are honest, and the 2f others are no quorum.
    """
    able, found = certifiers(network, order), set[bytes]()
    for envelope in voids[: params.NOTARIES_MAX]:
        void, _, _ = open_record(envelope, network=network.id)
        if not isinstance(void, Void) or void.agreement != order_id or void.notary not in able:
            raise VerificationFailed("no word of a notary of this order that it never certifies it")
        found.add(void.notary)
    if not able or len(found) < network.notary_quorum:
        raise VerificationFailed(
            f"{len(found)} notaries never certify the order", why=f"{network.notary_quorum} of them prove it"
        )


def attach(envelope: bytes, signatures: Mapping[bytes, bytes]) -> bytes:
    """The envelope with signatures that their signers sent added, unchecked: `open_record` checks them."""
    old = decode(Envelope, envelope, bytes_max=params.GOSSIP_RECORD_BYTES_MAX)
    return encode(Envelope(old.body, tuple(sorted((dict(old.signatures) | dict(signatures)).items()))))


def signed_by(envelope: bytes, signers: Iterable[bytes]) -> bytes:
    """The envelope with the signatures of these signers alone: what two peers keep of it is the same, whoever else
    signed. Raises VerificationFailed if one of them did not sign."""
    whole = decode(Envelope, envelope, bytes_max=params.GOSSIP_RECORD_BYTES_MAX)
    signatures, wanted = dict(whole.signatures), sorted(set(signers))
    if not signatures.keys() >= set(wanted):
        raise VerificationFailed("an envelope without a signature that is looked for in it")
    return encode(Envelope(whole.body, tuple((peer, signatures[peer]) for peer in wanted)))
