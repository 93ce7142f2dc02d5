"""Direct messages between the peers of a parallel job: see peer/runs.py and peer/units.py.

Part of peer/messages.py, which is where to import them from. Each is repeated by its sender until the state moves on.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from protocol import params
from protocol.codec import Digest, PeerKey, Uint

__all__ = [
    "HandoverAsk",
    "HandoverGiven",
    "Handovers",
    "Held",
    "Launch",
    "Launched",
    "RunMessage",
    "UnitDisputed",
    "UnitWaiting",
]

Unit = Annotated[int, msgspec.Meta(ge=0, lt=params.PARALLEL_UNITS_MAX)]
Handovers = Annotated[
    tuple[Annotated[bytes, msgspec.Meta(max_length=params.HANDOVER_BYTES_MAX)], ...],
    msgspec.Meta(max_length=params.PARALLEL_UNITS_MAX + 2),
]


class Launch(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="launch"):
    """The submitter to a unit's solver: who runs which unit, and since which epoch. A higher epoch replaces a lower."""

    run: Digest
    agreement: Digest
    epoch: Annotated[int, msgspec.Meta(ge=1, le=2**32)]
    units: Annotated[
        tuple[tuple[Unit, PeerKey, Uint], ...], msgspec.Meta(min_length=1, max_length=params.PARALLEL_UNITS_MAX)
    ]


class Launched(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="launched"):
    """The solver has the launch of this epoch."""

    agreement: Digest
    epoch: Uint


class Held(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="held"):
    """The submitter has this receipt and its checkpoint, and signs when those of the other units are there."""

    agreement: Digest
    sequence: Uint


class HandoverAsk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="handover-ask"):
    """The peer that runs unit `other` to the one that runs `unit`: sign what you sent it in this segment."""

    run: Digest
    unit: Unit
    other: Unit
    segment: Uint


class HandoverGiven(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="handover"):
    """Signed Handovers (protocol/handover.py) of links into the receiver's unit."""

    handovers: Handovers


class UnitWaiting(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="unit-waiting"):
    """Unsigned news: this unit stands still, for the tensors of these units do not come."""

    agreement: Digest
    units: Annotated[tuple[Unit, ...], msgspec.Meta(min_length=1, max_length=params.PARALLEL_UNITS_MAX)]


class UnitDisputed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="unit-disputed"):
    """A solver hands in no receipt of this segment, for what it received of `unit`, from this peer, is not what that
    signed (`differs`), or was no tensor of its crossing (`no-tensor`)."""

    agreement: Digest
    segment: Uint
    unit: Unit
    peer: PeerKey
    what: Literal["differs", "no-tensor"]


RunMessage: TypeAlias = Launch | Launched | Held | HandoverAsk | HandoverGiven | UnitWaiting | UnitDisputed
