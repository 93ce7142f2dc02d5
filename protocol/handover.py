"""A sender's word for what it sent over one link of a run in one segment: evidence between two units that disagree.

A unit's receipt binds, in the state that its checkpoint holds, the hash of all that it sent and received. The receiver
hands in no receipt before it holds a Handover of each link into it that says just what it received. So of two ends that
differ one is at fault, and it shows which: who signed two things, or who claims what nobody signed.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from protocol import params
from protocol.codec import Digest, PeerKey, Signature, Uint, decode, encode
from protocol.errors import VerificationFailed, WrongNetwork
from protocol.keys import SigningKey, verify
from protocol.stage import Link

__all__ = ["Handover", "check_handover", "hand_over", "open_handover"]

_DOMAIN = "ichiba/handover"


class Handover(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """In segment `segment` of `run` unit `unit` sent over `link` what has the hash `root`: 32 bytes, a row of its state
    protocol.stage.SENT."""

    network: Digest
    run: Digest
    unit: Annotated[int, msgspec.Meta(ge=0, le=params.PARALLEL_UNITS_MAX)]
    link: Link
    segment: Uint
    root: Digest


class _Signed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    handover: Handover
    peer: PeerKey
    signature: Signature


def hand_over(handover: Handover, key: SigningKey) -> bytes:
    """The bytes of a Handover with the signature of the peer that runs its unit."""
    return encode(_Signed(handover, key.public, key.sign(_DOMAIN, handover.network, encode(handover))))


def open_handover(data: bytes, *, network: bytes) -> tuple[Handover, bytes]:
    """A Handover from hostile bytes, and who signed it. Raises MalformedRecord, LimitExceeded, WrongNetwork,
    VerificationFailed."""
    signed = decode(_Signed, data, bytes_max=params.HANDOVER_BYTES_MAX)
    if signed.handover.network != network:
        raise WrongNetwork(f"handover of network {signed.handover.network.hex()[:12]}, this is {network.hex()[:12]}")
    verify(signed.peer, _DOMAIN, network, encode(signed.handover), signed.signature)
    return signed.handover, signed.peer


def check_handover(data: bytes, expected: Handover, peer: bytes) -> None:
    """Raise a RemoteProtocolError unless `peer` signed just this."""
    handover, signer = open_handover(data, network=expected.network)
    if signer != peer:
        raise VerificationFailed("a handover comes from the peer that runs its unit")
    if handover != expected:
        raise VerificationFailed(
            f"unit {handover.unit} hands over another tensor stream than unit {expected.link.other} received"
        )
