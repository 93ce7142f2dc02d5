"""What a unit of a parallel job adds to its task: its place, what crosses its borders, how that travels. DESIGN §11.

A unit is stage `stage` of replica `replica`. See docs/decisions/0023-parallel.md for the names.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from protocol import params
from protocol.codec import Digest, Uint, blake
from protocol.errors import MalformedRecord

__all__ = [
    "IN_PREFIX",
    "KEPT_PREFIX",
    "OUTER_PREFIX",
    "RECEIVED",
    "RESIDUAL_PREFIX",
    "SEEN_PREFIX",
    "SENT",
    "TAPE",
    "Codec",
    "Crossing",
    "Flow",
    "Link",
    "Side",
    "Stage",
    "check_stage",
    "links_in",
    "links_out",
    "replica_seed",
]

Flow: TypeAlias = Literal["forward", "backward", "sync", "outer"]
Side: TypeAlias = Literal["send", "recv"]
FLOWS: Final[tuple[Flow, ...]] = ("forward", "backward", "sync", "outer")

IN_PREFIX: Final = "ichiba.in."
KEPT_PREFIX: Final = "ichiba.kept."
SEEN_PREFIX: Final = "ichiba.seen."
OUTER_PREFIX: Final = "ichiba.outer."
RESIDUAL_PREFIX: Final = "ichiba.residual."
SENT: Final = "ichiba.sent"
RECEIVED: Final = "ichiba.received"
TAPE: Final = "ichiba.tape"

Small = Annotated[int, msgspec.Meta(ge=0, le=params.PARALLEL_UNITS_MAX)]
Count = Annotated[int, msgspec.Meta(ge=1, le=params.PARALLEL_UNITS_MAX)]
MicroBatches = Annotated[int, msgspec.Meta(ge=1, le=params.MICRO_BATCHES_MAX)]


class Codec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How a tensor travels.

    float32: as it is (so do tensors of other dtypes, always). tile: `bits` a value, one scale per 32 values, stochastic
    rounding. change: the change since the example was last sent, as by `tile`; an example's first time as it is
    (AQ-SGD, arXiv 2206.01299). sparse: the largest changes alone, with error feedback; for the flow `outer`.
    """

    kind: Literal["float32", "tile", "change", "sparse"]
    bits: Annotated[int, msgspec.Meta(ge=0, le=8)] = 0


class Crossing(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor over one border, in each step.

    replica: of the unit it comes from, where the flow is `sync` and it is received; else the unit's own. index: among
    the tensors of this flow and micro-batch, the same at both ends. value: sent, the number of the value in the unit's
    Program; received, the number of the input.
    """

    flow: Literal["forward", "backward", "sync"]
    replica: Small
    micro_batch: Annotated[int, msgspec.Meta(ge=0, le=params.MICRO_BATCHES_MAX)]
    index: Annotated[int, msgspec.Meta(ge=0, le=params.PROGRAM_INPUTS_MAX)]
    value: Uint


class Stage(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """A unit's place in its run.

    sync: `step`, gradients are averaged over the replicas in each step; `local`, each replica trains a segment alone,
    then the mean of what they changed is an outer gradient for Nesterov momentum (DiLoCo, arXiv 2311.08105); `none`,
    there is one replica. outer_rate_nano, outer_momentum_nano: of that, in units of 1e-9. forward, backward: the codecs
    of what it sends, and of what it receives too, but for forward_in (from the stage before) and backward_in (from the
    one after), where the borders before and behind a stage differ.
    """

    run: Digest
    stage: Small
    stages: Count
    replica: Small
    replicas: Count
    micro_batches: MicroBatches
    forward: Codec
    backward: Codec
    sync: Literal["none", "step", "local"]
    shared: Codec  # of the flow `sync` or `outer`
    outer_rate_nano: Uint = 0
    outer_momentum_nano: Uint = 0
    sends: Annotated[tuple[Crossing, ...], msgspec.Meta(max_length=params.CROSSINGS_MAX)] = ()
    receives: Annotated[tuple[Crossing, ...], msgspec.Meta(max_length=params.CROSSINGS_MAX)] = ()
    forward_in: Codec | None = None
    backward_in: Codec | None = None

    @property
    def unit(self) -> int:
        """The number of this unit in its run."""
        return self.unit_of(self.stage, self.replica)

    def unit_of(self, stage: int, replica: int) -> int:
        """The number of a unit."""
        return stage * self.replicas + replica

    def codec_of(self, flow: Flow, side: Side) -> Codec:
        """How tensors of `flow` travel that this unit sends, or receives."""
        if flow == "forward":
            return self.forward_in or self.forward if side == "recv" else self.forward
        if flow == "backward":
            return self.backward_in or self.backward if side == "recv" else self.backward
        return self.shared


class Link(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, order=True):
    """One flow from this unit to unit `other`, or from it."""

    flow: Flow
    other: Small


def links_out(stage: Stage) -> tuple[Link, ...]:
    """The links that leave a unit, in the order of the rows of its state SENT."""
    ahead, back = stage.stage + 1, stage.stage - 1
    found = [Link("forward", stage.unit_of(ahead, stage.replica))] if ahead < stage.stages else []
    found += [Link("backward", stage.unit_of(back, stage.replica))] if back >= 0 else []
    return (*found, *_shared(stage))


def links_in(stage: Stage) -> tuple[Link, ...]:
    """The links that end at a unit, in the order of the rows of its state RECEIVED."""
    ahead, back = stage.stage + 1, stage.stage - 1
    found = [Link("forward", stage.unit_of(back, stage.replica))] if back >= 0 else []
    found += [Link("backward", stage.unit_of(ahead, stage.replica))] if ahead < stage.stages else []
    return (*found, *_shared(stage))


def _shared(stage: Stage) -> list[Link]:
    if stage.sync == "none":
        return []
    flow: Flow = "sync" if stage.sync == "step" else "outer"
    others = (replica for replica in range(stage.replicas) if replica != stage.replica)
    return [Link(flow, stage.unit_of(stage.stage, replica)) for replica in others]


def replica_seed(seed: int, replica: int) -> int:
    """The task seed of a replica, below 2**63: the job's own for replica 0, so one replica trains as the whole does."""
    if replica == 0:
        return seed
    drawn = blake("ichiba/replica", seed.to_bytes(8, "little"), replica.to_bytes(8, "little"))
    return int.from_bytes(drawn[:8], "little") >> 1


def check_stage(stage: Stage) -> None:
    """Refuse what a decoder cannot express. Raises MalformedRecord."""
    if stage.stage >= stage.stages or stage.replica >= stage.replicas:
        raise MalformedRecord(
            f"stage {stage.stage} of {stage.stages}, replica {stage.replica} of {stage.replicas}: both count from 0"
        )
    if stage.stages * stage.replicas > params.PARALLEL_UNITS_MAX:
        raise MalformedRecord(
            f"{stage.stages} stages by {stage.replicas} replicas, at most {params.PARALLEL_UNITS_MAX} units",
            next_step="lower stages or replicas in job.toml",
        )
    if (stage.sync == "none") != (stage.replicas == 1):
        raise MalformedRecord(f"sync {stage.sync!r} with {stage.replicas} replicas")
    for codec, flows in (
        (stage.forward, "forward"), (stage.backward, "backward"), (stage.shared, "shared"),
        (stage.forward_in, "forward"), (stage.backward_in, "backward"),
    ):  # fmt: skip
        if codec is not None:
            _check_codec(codec, flows, local=stage.sync == "local")
    first, last = stage.stage == 0, stage.stage == stage.stages - 1
    if (first and stage.forward_in is not None) or (last and stage.backward_in is not None):
        raise MalformedRecord(f"stage {stage.stage} of {stage.stages} with a codec for a border that it does not have")
    if stage.forward_in == stage.forward or stage.backward_in == stage.backward:
        raise MalformedRecord("a codec of what comes in that is that of what goes out", why="it is said once then")
    out, into = {link.flow for link in links_out(stage)}, {link.flow for link in links_in(stage)}
    for crossings, flows_of, what in ((stage.sends, out, "sends"), (stage.receives, into, "receives")):
        keys = [(c.flow, c.replica, c.micro_batch, c.index) for c in crossings]
        if len(set(keys)) != len(keys):
            raise MalformedRecord(f"a unit {what} one tensor twice")
        for crossing in crossings:
            _check_crossing(stage, crossing, flows_of, what)


def _check_codec(codec: Codec, flow: str, *, local: bool) -> None:
    allowed = {"float32": (0,), "tile": (2, 3, 4, 6, 8), "change": (2, 3, 4, 6, 8), "sparse": (2,)}
    if codec.bits not in allowed[codec.kind]:
        raise MalformedRecord(f"codec {codec.kind} of {codec.bits} bits for {flow}", next_step="see docs/parallel.md")
    if (codec.kind == "change" and flow != "forward") or (codec.kind == "sparse" and not (flow == "shared" and local)):
        raise MalformedRecord(f"codec {codec.kind} cannot carry {flow} tensors")


def _check_crossing(stage: Stage, crossing: Crossing, flows: set[Flow], what: str) -> None:
    if crossing.flow not in flows:
        raise MalformedRecord(f"unit {stage.unit} {what} a tensor of the flow {crossing.flow}, and has no such link")
    if crossing.flow != "sync" and crossing.micro_batch >= stage.micro_batches:
        raise MalformedRecord(f"a tensor of micro-batch {crossing.micro_batch} of {stage.micro_batches}")
    foreign = crossing.flow == "sync" and what == "receives"
    if crossing.replica >= stage.replicas or (crossing.replica != stage.replica) != foreign:
        raise MalformedRecord(f"unit {stage.unit} {what} a {crossing.flow} tensor of replica {crossing.replica}")
