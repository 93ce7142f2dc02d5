"""What a run would send in a step, by each way its tensors may travel: what the choice among them is made from.

Whoever cuts a step knows the sizes (worker/run_options.py), whoever hears the market knows the links
(market/run_choice.py), and neither knows the other: this is what they tell each other.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from protocol import params
from protocol.codec import Uint
from protocol.errors import LocalProtocolError
from protocol.stage import Codec

__all__ = ["Compress", "RunChoice", "RunSizes", "Share", "check_sizes"]

Bits = Annotated[int, msgspec.Meta(ge=0, le=8)]
Pair = tuple[Uint, Uint]
_OPTIONS_MAX = 16
_UNITS = params.PARALLEL_UNITS_MAX


class Compress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bits of what crosses a border forward and backward; 0 is float32. automatic: it may be chosen where the job does
    not say."""

    forward_bits: Bits
    backward_bits: Bits
    automatic: bool = True

    def __str__(self) -> str:
        return f"{self.forward_bits}/{self.backward_bits}" if self.forward_bits else "none"


class Share(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How replicas exchange what they learned, and how often: each step, or each segment (`local`)."""

    sync: Literal["step", "local"]
    codec: Codec
    automatic: bool = True

    def __str__(self) -> str:
        if self.codec.kind == "float32":
            return "none"
        return "sparse" if self.codec.kind == "sparse" else f"{self.codec.kind} {self.codec.bits}"


class RunChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the tensors of a run are to travel: of each border the compression, and the share, by their places in the
    sizes; the micro-batches that the first stage starts ahead, 0 for as many as usual."""

    compressions: Annotated[list[int], msgspec.Meta(max_length=_UNITS)]
    share: int = 0
    in_flight: Annotated[int, msgspec.Meta(ge=0, le=params.MICRO_BATCHES_MAX)] = 0


class RunSizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A run that is cut and not yet coded.

    operations: of a unit of each stage, in a step. compressions, shares: what is open, the least lossy first; one where
    the job says it, no share where there is one replica. usual_compression, usual_share: taken while nothing is known.
    border_bytes: of each border, by each compression, what crosses forward and backward in a step. shared_bytes: of
    each stage, by each share, what a replica sends each other one in an exchange. in_flight: given by the job, or 0.
    kept: the stages that the submitter runs.
    """

    replicas: Annotated[int, msgspec.Meta(ge=1, le=_UNITS)]
    micro_batches: Annotated[int, msgspec.Meta(ge=1, le=params.MICRO_BATCHES_MAX)]
    steps: Annotated[int, msgspec.Meta(ge=1)]
    steps_per_segment: Annotated[int, msgspec.Meta(ge=1)]
    operations: Annotated[list[Uint], msgspec.Meta(min_length=1, max_length=_UNITS)]
    compressions: Annotated[list[Compress], msgspec.Meta(max_length=_OPTIONS_MAX)]
    border_bytes: Annotated[list[list[Pair]], msgspec.Meta(max_length=_UNITS)]
    shares: Annotated[list[Share], msgspec.Meta(max_length=_OPTIONS_MAX)]
    shared_bytes: Annotated[list[list[Uint]], msgspec.Meta(max_length=_UNITS)]
    usual_compression: int = 0
    usual_share: int = 0
    in_flight: Annotated[int, msgspec.Meta(ge=0, le=params.MICRO_BATCHES_MAX)] = 0
    kept: Annotated[list[int], msgspec.Meta(max_length=2)] = []

    @property
    def stages(self) -> int:
        """How many."""
        return len(self.operations)

    def usual(self) -> RunChoice:
        """What is taken where nothing is known of the links."""
        return RunChoice([self.usual_compression] * len(self.border_bytes), self.usual_share, self.in_flight)


def check_sizes(sizes: RunSizes) -> None:
    """Refuse what a decoder cannot express. Raises LocalProtocolError."""
    stages, options, shares = sizes.stages, len(sizes.compressions), len(sizes.shares)
    whole = (
        stages * sizes.replicas <= _UNITS,
        len(sizes.border_bytes) == stages - 1,
        len(sizes.shared_bytes) == (stages if sizes.replicas > 1 else 0),
        all(len(pairs) == options > 0 for pairs in sizes.border_bytes),
        all(len(found) == shares > 0 for found in sizes.shared_bytes),
        0 <= sizes.usual_compression < max(1, options),
        0 <= sizes.usual_share < max(1, shares),
        all(0 <= stage < stages for stage in sizes.kept),
    )
    if not all(whole):
        raise LocalProtocolError(f"the sizes of a run of {stages} stages by {sizes.replicas} replicas do not fit it")
