"""One tensor on its way between two units of a parallel job: its key, its size, and the hash that both ends keep.

The key says which tensor of a run it is, so a payload sent twice is known, and nobody has to agree on an order of
arrival. See docs/decisions/0023-parallel.md for the names. Pure: how payloads travel is elsewhere.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from protocol import params
from protocol.codec import Uint, blake, encode
from protocol.errors import LimitExceeded
from protocol.operations import TensorType
from protocol.payload_size import payload_bytes
from protocol.stage import Codec, Crossing, Flow, Stage

__all__ = ["LinkHash", "PayloadKey", "payload_bytes_max", "payload_digest", "received_key", "receivers", "sent_key"]


class PayloadKey(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, order=True):
    """Which payload of a run.

    micro_batch and index: as in its Crossing. Of the flow `outer`: step is the segment's last, micro_batch 0, and index
    that of the parameter in the order of names. unit: the number of the unit that it comes from.
    """

    step: Uint
    flow: Flow
    micro_batch: Annotated[int, msgspec.Meta(ge=0, le=params.MICRO_BATCHES_MAX)]
    index: Annotated[int, msgspec.Meta(ge=0, le=params.PROGRAM_INPUTS_MAX)]
    unit: Annotated[int, msgspec.Meta(ge=0, le=params.PARALLEL_UNITS_MAX)]


def sent_key(stage: Stage, crossing: Crossing, step: int) -> PayloadKey:
    """The key of what a unit sends over `crossing` in `step`."""
    return PayloadKey(step, crossing.flow, crossing.micro_batch, crossing.index, stage.unit)


def received_key(stage: Stage, crossing: Crossing, step: int) -> PayloadKey:
    """The key of what a unit receives over `crossing` in `step`."""
    unit = stage.unit_of(stage.stage, crossing.replica)
    if crossing.flow != "sync":
        unit = stage.unit_of(stage.stage - 1 if crossing.flow == "forward" else stage.stage + 1, stage.replica)
    return PayloadKey(step, crossing.flow, crossing.micro_batch, crossing.index, unit)


def receivers(stage: Stage, flow: Flow) -> tuple[int, ...]:
    """The numbers of the units that a payload of `flow` goes to from this one."""
    if flow in ("forward", "backward"):
        return (stage.unit_of(stage.stage + (1 if flow == "forward" else -1), stage.replica),)
    return tuple(stage.unit_of(stage.stage, other) for other in range(stage.replicas) if other != stage.replica)


def payload_bytes_max(kind: TensorType, codec: Codec, flow: Flow) -> int:
    """The most bytes that a tensor of this kind travels in. Of the codec `change` it may be fewer; of others it is all.

    Raises LimitExceeded if the tensor itself is too large to travel.
    """
    if kind.size_bytes > params.CROSSING_BYTES_MAX:
        raise LimitExceeded(
            f"a tensor of {kind.size_bytes} bytes between two units, at most {params.CROSSING_BYTES_MAX} travel",
            next_step="make the micro-batches smaller, or cut elsewhere",
        )
    if codec.kind == "change":
        return kind.size_bytes + params.PAYLOAD_HEAD_BYTES_MAX
    return payload_bytes(codec, kind.dtype, kind.shape, flow=flow)


def payload_digest(payload: bytes | memoryview) -> bytes:
    """The hash of one payload: 32 bytes."""
    return blake("ichiba/payload", payload)  # type: ignore[arg-type]  # hashlib takes any buffer


class LinkHash:
    """The hash of all that went over one link in a segment: the same at both ends, in whatever order each saw it.

    Within a step the payloads are put in the order of their keys; `turn` ends a step. What came after the last `turn`,
    in a step that diverged, is not in it.
    """

    def __init__(self) -> None:
        self._chain = bytes(32)
        self._now: list[tuple[PayloadKey, bytes]] = []

    def add(self, key: PayloadKey, digest: bytes) -> None:
        """One payload of the present step, by its `payload_digest`."""
        self._now.append((key, digest))

    def turn(self) -> None:
        """The present step is over."""
        self._chain = blake("ichiba/link", self._chain, encode(sorted(self._now)))
        self._now.clear()

    @property
    def digest(self) -> bytes:
        """32 bytes."""
        return self._chain
