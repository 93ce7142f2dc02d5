"""From a job.toml with [parallel] to the units of a run: programs, tasks, first states, and what placing them needs.

The job is prepared like any other, for one micro-batch (worker/prepare.py); then its step is cut (worker/cutting.py).
Runs on the submitter's machine only, because it executes the submitter's own code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
import torch

from protocol import params
from protocol.codec import encode
from protocol.payload_size import payload_bytes
from protocol.program import Program, operations_per_step, peak_bytes, program_id, state_layout
from protocol.run_sizes import RunSizes
from protocol.stage import KEPT_PREFIX, OUTER_PREFIX, Codec, Flow, Stage, replica_seed
from protocol.task import ArrayRef, Initial, TaskSpec
from worker import checkpoint
from worker.crossings import check_unit
from worker.cut_plan import Cut, planned
from worker.cutting import StagePart, units_of
from worker.executor import DTYPES
from worker.job_file import BadJobFile, JobFile, SettledJob
from worker.parallel_file import Parallel
from worker.prepare import Prepared, explained, prepare
from worker.run_options import Choose, RunOptions, Travel
from worker.training import Batches, check_task, initial_state

__all__ = ["PreparedRun", "PreparedUnit", "prepare_run"]

PEERS: Final = 4
"""That a job whose stages and replicas are `auto` asks for, if nobody says how many there are."""
UNIT_MEMORY_BYTES: Final = 4 * 1024**3
"""Of one peer, likewise: what a usual one has free."""
_RAW: Final = Codec("float32")


@dataclass(frozen=True)
class PreparedUnit:
    """One unit but the ids of its blobs.

    stage: its place, with `run` zero. program: its bytes. state: its part of the whole's first state as safetensors,
    whose root is `root`. reads: the arrays that it fetches. kept: the submitter runs it. operations_per_step,
    checkpoint_bytes, memory_bytes: as of any task.
    """

    stage: Stage
    program: bytes
    state: bytes
    root: bytes
    reads: frozenset[str]
    kept: bool
    operations_per_step: int
    checkpoint_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class PreparedRun:
    """All of a parallel job but the ids of its blobs. whole: the job as one micro-batch of it, whose data the units
    share. units: in the order of their numbers.

    border_bytes: of each border between stages, what crosses it forward and backward in a step, as it travels.
    shared_bytes: of each stage, what one replica sends to each other one in an exchange, which is a step, or a segment
    where replicas train alone; of none where there is one replica. operations: of the whole job.
    """

    whole: Prepared
    units: tuple[PreparedUnit, ...]
    border_bytes: tuple[tuple[int, int], ...]
    shared_bytes: tuple[int, ...]
    operations: int

    @property
    def activation_bytes(self) -> int:
        """The most that crosses a border one way in a step, as it travels."""
        return max((max(pair) for pair in self.border_bytes), default=0)

    @property
    def gradient_bytes(self) -> int:
        """The most that a replica sends another in a step, on average, as it travels."""
        stage, job = self.units[0].stage, self.whole.job
        steps = job.steps_per_segment if stage.sync == "local" else 1
        return -(-max(self.shared_bytes, default=0) // steps)

    def make_task(self, unit: int, *, program: bytes, arrays: Mapping[str, bytes], state: bytes) -> TaskSpec:
        """The task of a unit, from the blob ids of its program, of the arrays by name, and of its first state."""
        made = self.units[unit]
        return _task(self.whole, made, program=program, arrays=arrays, state=state)


def prepare_run(
    job_toml: Path,
    network: bytes,
    progress: Callable[[str], None] = lambda stage: None,
    settled: Callable[[SettledJob], Path] | None = None,
    *,
    choose: Choose = RunSizes.usual,
    peers: int = PEERS,
    unit_memory_bytes: int = UNIT_MEMORY_BYTES,
    speeds: tuple[float, ...] = (),
) -> PreparedRun:
    """Read a job.toml that has [parallel], prepare it, and cut its step into units.

    choose: how tensors travel, of what the job leaves open, by who knows the links. peers, unit_memory_bytes: what
    `auto` counts on. speeds: of the devices of each stage, in any unit; else all alike. Raises as `prepare`, and
    NotParallel for a step that does not split.
    """
    whole = prepare(job_toml, network, progress, settled)
    job = whole.job
    given = job.parallel
    if given is None:
        raise BadJobFile(f"{job.path.name} has no [parallel]", next_step="add it, or submit the job as it is")
    if job.batch.rule not in ("rows", "windows"):
        raise BadJobFile(
            f"the batch rule `{job.batch.rule}` of a parallel job", next_step='rule = "rows" or "windows" in [batch]'
        )
    progress("cutting it into stages")
    program = Program.from_bytes(whole.program)
    stages, replicas = _counts(given, whole, peers=peers, unit_memory_bytes=unit_memory_bytes)
    keep = tuple({"first": 0, "last": stages - 1}[end] for end in job.keep)
    if len(set(keep)) == stages:
        raise BadJobFile(f"you keep all {stages} stages", next_step=f"stages = {stages + 1} or more in [parallel]")
    plan = planned(
        program, stages=stages, micro_batches=given.micro_batches, in_flight=given.in_flight, replicas=replicas,
        keep=keep, speeds=speeds,
    )  # fmt: skip
    options = _options(given, whole, plan, keep)
    sizes = options.sizes()
    choice = choose(sizes)
    travel = options.travel(choice)
    parts = _parts(options.plan_of(choice), choice.in_flight, unit_memory_bytes)
    progress("computing the first state of each")
    state = _first_state(whole, program)
    stage_of = _Stages(given, plan, travel)
    units = tuple(_unit(whole, part, stage_of(part), state, kept=part.stage in keep) for part in parts)
    for unit in units:
        _check(whole, unit)
    _check_kept(units)
    first = [part for part in parts if part.replica == 0]
    operations = sum(unit.operations_per_step for unit in units) * job.steps
    borders = tuple(
        (_crossing(before, "forward", ahead), _crossing(after, "backward", back))
        for (before, after), (ahead, back) in zip(itertools.pairwise(first), travel.borders, strict=True)
    )
    shared = tuple(_shared(part, stage_of(part)) for part in first) if replicas > 1 else ()
    return PreparedRun(whole, units, borders, shared, operations)


# --- what `auto` comes to ----------------------------------------------------------------------------------
def _counts(given: Parallel, whole: Prepared, *, peers: int, unit_memory_bytes: int) -> tuple[int, int]:
    """Stages and replicas: as few stages as the memory of a peer asks for, and the other peers for replicas."""
    needed = whole.memory_bytes - params.WORKER_BASE_BYTES
    room = max(1, unit_memory_bytes - params.WORKER_BASE_BYTES)
    stages = given.stages or max(1, min(-(-needed // room), peers // (given.replicas or 1)))
    replicas = given.replicas or max(1, peers // stages)
    if stages * replicas == 1:
        stages = 2
    return stages, replicas


def _options(given: Parallel, whole: Prepared, plan: Cut, keep: tuple[int, ...]) -> RunOptions:
    job, (first, *_) = whole.job, whole.arrays
    return RunOptions(
        given,
        plan,
        steps=job.steps,
        steps_per_segment=job.steps_per_segment,
        examples=first.shape[0] - job.batch.length if job.batch.rule == "windows" else first.shape[0],
        reads=job.steps * job.batch.size * given.micro_batches,
        kept=keep,
    )


def _parts(plan: Cut, in_flight: int, unit_memory_bytes: int) -> list[StagePart]:
    """The units, with so many micro-batches in flight (0: as the plan has it) if their memory allows."""
    if in_flight and in_flight != plan.in_flight:
        parts = units_of(replace(plan, in_flight=in_flight))
        if max(peak_bytes(part.program) for part in parts) + params.WORKER_BASE_BYTES <= unit_memory_bytes:
            return parts
    return units_of(plan)


@dataclass(frozen=True)
class _Stages:
    """The Stage of each unit."""

    given: Parallel
    plan: Cut
    travel: Travel

    def __call__(self, part: StagePart) -> Stage:
        plan, travel, local = self.plan, self.travel, self.travel.sync == "local"
        ahead, forward_in, back, backward_in = travel.at(part.stage)
        return Stage(
            run=bytes(32),
            stage=part.stage,
            stages=plan.stages,
            replica=part.replica,
            replicas=plan.replicas,
            micro_batches=plan.places.micro_batches,
            forward=ahead,
            backward=back,
            sync=travel.sync,
            shared=travel.shared,
            outer_rate_nano=self.given.outer_rate_nano if local else 0,
            outer_momentum_nano=self.given.outer_momentum_nano if local else 0,
            sends=part.sends,
            receives=part.receives,
            forward_in=forward_in,
            backward_in=backward_in,
        )


# --- units -------------------------------------------------------------------------------------------------
def _first_state(whole: Prepared, program: Program) -> dict[str, torch.Tensor]:
    arrays = {array.name: bytes(32) for array in whole.arrays}
    task = whole.make_task(program=program_id(whole.program), arrays=arrays, base=bytes(32))
    return initial_state(task, program, whole.base)


def _unit(
    whole: Prepared, part: StagePart, stage: Stage, state: Mapping[str, torch.Tensor], *, kept: bool
) -> PreparedUnit:
    own = {
        name: state[name] if name in state else torch.zeros(shape, dtype=DTYPES[dtype])
        for name, (dtype, shape) in state_layout(part.program).items()
    }
    dumped = checkpoint.dump(own)
    names = {item.name for item in part.program.inputs_of("batch")}
    windows = whole.job.batch.windows
    reads = frozenset(a.name for a in whole.arrays if (names & {"x", "y"} if windows else a.name in names))
    data_bytes = sum(array.data.nbytes for array in whole.arrays if array.name in reads)
    memory = peak_bytes(part.program) + 2 * len(dumped) + data_bytes + params.WORKER_BASE_BYTES
    return PreparedUnit(
        stage=stage,
        program=part.program.to_bytes(),
        state=dumped,
        root=checkpoint.state_root(own),
        reads=reads,
        kept=kept,
        operations_per_step=operations_per_step(part.program),
        checkpoint_bytes=len(dumped),
        memory_bytes=max(memory, params.SANDBOX_MEMORY_BYTES_MIN),
    )


def _task(
    whole: Prepared, unit: PreparedUnit, *, program: bytes, arrays: Mapping[str, bytes], state: bytes
) -> TaskSpec:
    job: JobFile = whole.job
    refs = tuple(
        ArrayRef(a.name, a.dtype, a.shape, arrays[a.name] if a.name in unit.reads else bytes(32), a.data.nbytes)
        for a in whole.arrays
    )
    return TaskSpec(
        network=whole.network,
        program=program,
        program_bytes=len(unit.program),
        arrays=refs,
        batch=msgspec.structs.replace(job.batch, size=job.batch.size * unit.stage.micro_batches),
        initial=Initial("state", state, unit.root),
        seed=replica_seed(job.seed, unit.stage.replica),
        steps=job.steps,
        steps_per_segment=job.steps_per_segment,
        mode=job.mode,
        width=job.width,
        schedule=job.schedule,
        operations_per_step=unit.operations_per_step,
        name=job.name,
        kind=job.kind,
        stage=unit.stage,
    )


def _check(whole: Prepared, unit: PreparedUnit) -> None:
    """What its solver will check, before it costs anything. Raises BadJobFile."""
    named = {array.name: b"\x01" * 32 for array in whole.arrays}
    task = _task(whole, unit, program=program_id(unit.program), arrays=named, state=bytes(32))
    with explained(whole.job):
        program = Program.from_bytes(unit.program)
        TaskSpec.from_bytes(encode(task), network=whole.network)
        check_task(task, program)
        check_unit(task, program)
        Batches(task, program, {array.name: array.data for array in whole.arrays if array.name in unit.reads})


def _check_kept(units: tuple[PreparedUnit, ...]) -> None:
    """Raises BadJobFile if an array that a kept stage reads would be fetched by another's solver."""
    kept = frozenset().union(*(unit.reads for unit in units if unit.kept))
    for unit in units:
        shared = sorted(kept & unit.reads)
        if not unit.kept and shared:
            raise BadJobFile(
                f"stage {unit.stage.stage} reads {shared[0]!r}, as a stage that you keep does",
                why="its solver would fetch all of it",
                next_step='keep = ["first", "last"] in [privacy]',
            )


# --- bytes -------------------------------------------------------------------------------------------------
def _crossing(part: StagePart, flow: Flow, codec: Codec) -> int:
    """The bytes that a unit sends over one border in a step, once every example has been there."""
    program = part.program
    total = 0
    for crossing in part.sends:
        if crossing.flow == flow:
            kind = program.types[crossing.value]
            plain = codec.kind == "change" and not any(
                item.name == f"{KEPT_PREFIX}send.forward.{crossing.index}" for item in program.inputs
            )
            total += payload_bytes(_RAW if plain else codec, kind.dtype, kind.shape, flow=flow)
    return total


def _shared(part: StagePart, stage: Stage) -> int:
    """The bytes that a unit sends to each other replica in one exchange."""
    if stage.sync == "step":
        return _crossing(part, "sync", stage.shared)
    outer = [item for item in part.program.inputs if item.name.startswith(OUTER_PREFIX)]
    return sum(payload_bytes(stage.shared, item.dtype, item.shape, flow="outer") for item in outer)
