"""Whether an agreement opens a channel: the signatures of its parties, and of a quorum of notaries over the same body.

Any two quorums (2f + 1 of 3f + 1) have an honest notary in common, and an honest notary certifies no opening that its
submitter's balance or its solver's stake cannot bear beside what it certified before (peer/notary.py). So no balance is
reserved twice, in whatever order peers hear of the openings. DESIGN §10, docs/decisions/0011-certified-openings.md.

A notary that is a party is not counted: its signature says that it agrees, not that it looked. A network without
notaries certifies nothing, and both parties' signatures open a channel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from protocol import params
from protocol.codec import decode, encode
from protocol.credit_records import NO_CREDIT
from protocol.errors import VerificationFailed
from protocol.network import Network
from protocol.records import Agreement, Envelope, Void, open_record

__all__ = [
    "attach",
    "certifiers",
    "check_certified",
    "check_cosigned",
    "check_voided",
    "provable",
    "signed_by",
    "takes_certificate",
]


def certifiers(network: Network, agreement: Agreement) -> tuple[bytes, ...]:
    """The notaries that certify an agreement: all but its parties, by key. Empty where they are too few for a quorum,
    or there are none."""
    return network.impartial(agreement.submitter, agreement.solver)


def takes_certificate(agreement: Agreement, network: Network) -> bool:
    """Whether notaries have to certify it: where there are some, unless it is on credit and takes no money."""
    return bool(network.notaries) and agreement.credit == NO_CREDIT


def provable(network: Network) -> int:
    """f + 1: of so many notaries that say one thing, one is honest."""
    return len(network.notaries) - network.notary_quorum + 1


def check_cosigned(agreement: Agreement, signers: Collection[bytes], network: Network) -> frozenset[bytes]:
    """The notaries that signed beside both parties. Raises VerificationFailed if a party did not, or a stranger did."""
    parties = {agreement.submitter, agreement.solver}
    if len(parties) != 2 or not parties <= set(signers):
        raise VerificationFailed("agreement without both signatures")
    others = frozenset(signers) - parties
    if not others <= network.notary_keys:
        raise VerificationFailed("agreement signed by a peer that is neither a party nor a notary")
    return others


def check_certified(agreement: Agreement, signers: Collection[bytes], network: Network) -> None:
    """Raise VerificationFailed unless these signers (whose signatures `open_record` found right) open a channel."""
    notaries = check_cosigned(agreement, signers, network)
    if takes_certificate(agreement, network) and len(notaries) < network.notary_quorum:
        raise VerificationFailed(
            f"agreement with the signatures of {len(notaries)} notaries that are no party to it",
            why=f"{network.notary_quorum} of {len(network.notaries)} certify an opening",
        )


def check_voided(voids: Sequence[bytes], agreement_id: bytes, agreement: Agreement, network: Network) -> None:
    """Raise VerificationFailed unless a quorum of its notaries never certifies this agreement: envelopes of Voids.

    Of 2f + 1 that say so f + 1 are honest, and the 2f others are no quorum.
    """
    able, found = certifiers(network, agreement), set[bytes]()
    for envelope in voids[: params.NOTARIES_MAX]:
        void, _, _ = open_record(envelope, network=network.id)
        if not isinstance(void, Void) or void.agreement != agreement_id or void.notary not in able:
            raise VerificationFailed("no word of a notary of this agreement that it never certifies it")
        found.add(void.notary)
    if not able or len(found) < network.notary_quorum:
        raise VerificationFailed(
            f"{len(found)} notaries never certify the agreement", why=f"{network.notary_quorum} of them prove it"
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
