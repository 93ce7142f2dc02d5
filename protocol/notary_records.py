"""What a notary signs about an agreement, beside its certificate. Import them from protocol/records.py, like all."""

from __future__ import annotations

from typing import Literal

import msgspec

from protocol.codec import Digest, PeerKey, Uint

__all__ = ["Beacon", "Ruling", "Void"]


class _Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    network: Digest
    notary: PeerKey


class Beacon(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/beacon/1"):
    """A notary's share of the randomness of `subject`, an agreement or a proof: a signature nobody foresees."""

    subject: Digest


class Void(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/void/1"):
    """A notary has not certified the agreement and never will. A quorum of these proves that it can never open."""

    agreement: Digest


class Ruling(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/ruling/1"):
    """One notary's finding on a dispute: the work is wrong, it is right, or its error was ordered. Level and cause say
    how far the descent came and what ended it; `both`: at the leaf neither side's value is right."""

    dispute: Digest
    agreement: Digest
    segment: Uint
    finding: Literal["wrong", "right", "forced"]
    level: Literal["segment", "step", "state", "node", "tile", "element", "block"]
    cause: Literal["leaf", "both", "silence", "withheld", "malformed", "equivocation", "forced", "jury"]
    operations: Uint  # metered by the referee
    transcript: Digest
