"""What a notary signs about an agreement, beside its certificate. Import it from protocol/records.py, like all."""

from __future__ import annotations

import msgspec

from protocol.codec import Digest, PeerKey

__all__ = ["Beacon", "Void"]


class _Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    network: Digest
    notary: PeerKey


class Beacon(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/beacon/1"):
    """A notary's share of the randomness of `subject`, an agreement or a proof: a signature nobody foresees."""

    subject: Digest


class Void(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/void/1"):
    """A notary has not certified the agreement and never will. A quorum of these proves that it can never open."""

    agreement: Digest
