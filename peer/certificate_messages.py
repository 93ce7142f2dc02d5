"""Direct messages by which a channel's opening is certified: see peer/notary.py and peer/certificates.py.

Part of peer/messages.py, which is where to import them from.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from protocol import params
from protocol.codec import Digest, Signature

__all__ = [
    "CertificateMessage",
    "Certified",
    "CertifyAsk",
    "CertifyRefuse",
    "CertifyRelease",
    "Sealed",
    "Shares",
    "Text",
    "Voided",
]

Sealed = Annotated[bytes, msgspec.Meta(max_length=params.GOSSIP_RECORD_BYTES_MAX)]
Shares = Annotated[tuple[Sealed, ...], msgspec.Meta(max_length=params.NOTARIES_MAX)]  # envelopes, of a notary each
Text = Annotated[str, msgspec.Meta(max_length=500)]


class CertifyAsk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="certify"):
    """A party to a notary: certify this agreement, which both parties signed and perhaps other notaries.

    end: the deal was given up, so sign only what was signed before or cannot be stopped any more; else promise, when
    it is late enough, that you never will.
    """

    agreement: Sealed
    end: bool = False


class Certified(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="certified"):
    """The notary's signature over the agreement: the money it takes is reserved here."""

    agreement: Digest
    signature: Signature


class CertifyRefuse(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="certify-refuse"):
    """The notary does not certify it now, with a typed reason. It may later."""

    agreement: Digest
    code: Text
    why: Text


class Voided(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="voided"):
    """The notary's Void: it never certifies this agreement, or a quorum of others does not."""

    void: Sealed


class CertifyRelease(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="certify-release"):
    """To a notary that certified an agreement: a quorum never does, so its money is free. Voided answers it."""

    agreement: Digest
    voids: Shares


CertificateMessage: TypeAlias = CertifyAsk | Certified | CertifyRefuse | Voided | CertifyRelease
