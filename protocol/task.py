"""What a job asks for: a Program, its data, where it starts, and how long it runs. DESIGN §4.

A TaskSpec fixes every input of every step, so two peers that hold it and the blobs it names must reach the
same state. It holds integers, hashes and short names only.
"""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from protocol import params
from protocol.codec import Digest, Uint, blake, decode, encode
from protocol.errors import MalformedRecord, WrongNetwork
from protocol.stage import Stage, check_stage

__all__ = [
    "FIGURES",
    "PRESENT",
    "ArrayRef",
    "BatchRule",
    "Initial",
    "Kind",
    "Schedule",
    "TaskSpec",
    "learning_rate",
    "task_id",
]

Kind: TypeAlias = Literal["train", "evaluate", "infer", "generate"]
FIGURES: Final[dict[Kind, str]] = {"train": "loss", "evaluate": "loss", "infer": "", "generate": "surprise"}
"""What the one number of a step is to people, by the kind of task; nothing where it says nothing. The surprise of a
generation is the mean of -log of the chances of the symbols written, in nats."""

PRESENT: Final = "ichiba.present"
"""The batch input that says which rows of a batch by the rule `sequence` are real: bool (size,)."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Dim = Annotated[int, msgspec.Meta(ge=0, le=params.TENSOR_ELEMENTS_MAX)]


class ArrayRef(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One array of the data: a raw little-endian blob and how to read it."""

    name: Name
    dtype: Literal["uint8", "int32", "int64", "float32"]
    shape: Annotated[tuple[Dim, ...], msgspec.Meta(min_length=1, max_length=params.TENSOR_RANK_MAX)]
    blob: Digest
    size_bytes: Uint


class BatchRule(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How the batch of a step is cut from the arrays.

    `windows`: from the one 1-D array, `size` windows of `length`; input "x" gets a[i:i+length], input "y" gets
    a[i+1:i+1+length]. `rows`: `size` row numbers; every batch input gets the rows of the array of its name.
    Row numbers and window starts come from the generator keyed by (task seed, step), with replacement. `sequence`:
    as `rows`, with rows step * size to (step + 1) * size - 1, so that a task reads each row once, in order; with a
    length the rows are windows that do not overlap, row r being a[r*length:(r+1)*length] of the one 1-D array, and "y"
    one further. Behind the last row stands row 0 again, and the input PRESENT tells which rows are real. `whole`: every
    step gets all of every array, of `size` rows.
    """

    rule: Literal["windows", "rows", "sequence", "whole"]
    size: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    length: Annotated[int, msgspec.Meta(ge=0, le=2**24)]

    @property
    def windows(self) -> bool:
        """Whether rows are windows of one text."""
        return self.rule == "windows" or (self.rule == "sequence" and self.length > 0)

    def rows_of(self, elements: int) -> int:
        """The rows that `sequence` reads out of arrays of so many elements in their first dimension."""
        return (elements - 1) // self.length if self.length else elements


class Initial(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The state before step 0.

    `seed`: drawn by the generator from the task seed by the init rules in the Program. `state`: the checkpoint
    `blob` whose state root is `root` (weights somebody brings, or the end of a settled task).
    """

    kind: Literal["seed", "state"]
    blob: Digest
    root: Digest


class Schedule(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The learning rate of each step, in units of 1e-9. See `learning_rate`."""

    kind: Literal["constant", "warmup-cosine"]
    peak_nano: Uint
    floor_nano: Uint
    warmup_steps: Uint


class TaskSpec(
    msgspec.Struct,
    frozen=True,
    array_like=True,
    forbid_unknown_fields=True,
    tag="ichiba/task/1",
    kw_only=True,
):
    """A whole job. `program` is the id of the Program; `steps_per_segment` is also the checkpoint interval.

    kind: what it is for, told to people; solvers and checkers run steps of a Program whatever it says. salt: 32 secret
    random bytes in the task of a sealed job, so that nobody can try whether the id of the task is that of a guess.
    stage: of a unit of a parallel job, what it is of the whole.
    """

    network: Digest
    program: Digest
    program_bytes: Annotated[int, msgspec.Meta(ge=1, le=params.PROGRAM_BYTES_MAX)]
    arrays: Annotated[tuple[ArrayRef, ...], msgspec.Meta(min_length=1, max_length=64)]
    batch: BatchRule
    initial: Initial
    seed: Uint
    steps: Annotated[int, msgspec.Meta(ge=1, le=params.TASK_STEPS_MAX)]
    steps_per_segment: Annotated[int, msgspec.Meta(ge=1, le=params.TASK_STEPS_MAX)]
    mode: Literal["exact", "tolerant"]
    width: Literal[8, 15, 22]
    schedule: Schedule
    operations_per_step: Annotated[int, msgspec.Meta(ge=1, le=2**60)]
    name: Name
    kind: Kind = "train"
    salt: Annotated[bytes, msgspec.Meta(max_length=32)] = b""
    stage: Stage | None = None

    @property
    def segments(self) -> int:
        """The number of segments; the last may be shorter."""
        return math.ceil(self.steps / self.steps_per_segment)

    @property
    def fetched(self) -> tuple[ArrayRef, ...]:
        """The arrays whose bytes a solver needs: all, but of a unit those that its Program reads none of."""
        return tuple(array for array in self.arrays if self.stage is None or array.blob != bytes(32))

    def steps_of(self, segment: int) -> range:
        """The step numbers of `segment` (0-based)."""
        if not 0 <= segment < self.segments:
            raise MalformedRecord(f"segment {segment} of a task of {self.segments} segments")
        first = segment * self.steps_per_segment
        return range(first, min(first + self.steps_per_segment, self.steps))

    @classmethod
    def from_bytes(cls, data: bytes, *, network: bytes) -> TaskSpec:
        """Decode and check what a decoder cannot express. Raises RemoteProtocolError."""
        task = decode(cls, data, bytes_max=params.MESSAGE_BYTES_MAX)
        if len(task.salt) not in (0, 32):
            raise MalformedRecord(f"a salt of {len(task.salt)} bytes, it has 32 or none")
        if task.network != network:
            raise WrongNetwork(f"task of network {task.network.hex()[:12]}, this is {network.hex()[:12]}")
        if task.segments > params.TASK_SEGMENTS_MAX:
            raise MalformedRecord(
                f"{task.segments} segments, at most {params.TASK_SEGMENTS_MAX}",
                next_step="raise steps_per_segment in job.toml",
            )
        sizes = {"uint8": 1, "int32": 4, "int64": 8, "float32": 4}
        for array in task.arrays:
            if math.prod(array.shape) * sizes[array.dtype] != array.size_bytes:
                raise MalformedRecord(f"array {array.name} has {array.size_bytes} bytes for shape {array.shape}")
        if len({array.name for array in task.arrays}) != len(task.arrays):
            raise MalformedRecord("two arrays of one name")
        _check_batch(task)
        if task.stage is not None:
            _check_unit(task, task.stage)
        return task


def _check_batch(task: TaskSpec) -> None:
    rule, first = task.batch, task.arrays[0]
    if rule.windows:
        if len(task.arrays) != 1 or len(first.shape) != 1:
            raise MalformedRecord(f"windows by the batch rule `{rule.rule}` take one array of one dimension")
        if not 1 <= rule.length < first.shape[0]:
            raise MalformedRecord(f"windows of {rule.length} from an array of {first.shape[0]}")
    elif len({array.shape[0] for array in task.arrays}) != 1 or not first.shape[0]:
        raise MalformedRecord(f"the batch rule `{rule.rule}` takes arrays of one equal, positive number of rows")
    if rule.rule == "whole" and rule.size != first.shape[0]:
        raise MalformedRecord(f"a batch of {rule.size} rows by the rule `whole`, the arrays have {first.shape[0]}")
    rows = rule.rows_of(first.shape[0])
    if rule.rule == "sequence" and task.steps != -(-rows // rule.size):
        raise MalformedRecord(
            f"{task.steps} steps of {rule.size} rows do not read {rows} rows once each",
            next_step=f"make steps the number of rows over size, rounded up: {-(-rows // rule.size)}",
        )


def _check_unit(task: TaskSpec, stage: Stage) -> None:
    check_stage(stage)
    if task.mode != "exact" or task.kind != "train":
        raise MalformedRecord(
            f"a {task.mode} task of the kind {task.kind} in a parallel job",
            why="its units are checked each alone, bit for bit",
            next_step='set mode = "exact" in job.toml, or take [parallel] out',
        )
    if task.batch.rule in ("sequence", "whole") or task.batch.size % stage.micro_batches:
        raise MalformedRecord(
            f"batches of {task.batch.size} rows by the rule `{task.batch.rule}` in {stage.micro_batches} micro-batches",
            next_step="use the batch rule `rows` or `windows`, with a size that micro_batches divides",
        )
    if task.initial.kind != "state":
        raise MalformedRecord("a unit of a parallel job starts from its part of the whole's first state")


def task_id(task: msgspec.Struct) -> bytes:
    """The id of a task, a TaskSpec or a script's: 32 bytes."""
    return blake("ichiba/task", encode(task))


def learning_rate(schedule: Schedule, *, step: int, steps: int) -> int:
    """The learning rate of `step` (0-based) in units of 1e-9, by integer arithmetic alone.

    constant: the peak. warmup-cosine: linear to the peak over `warmup_steps`, then half a cosine to the floor.
    The cosine is Bhaskara's rational approximation (error below 0.0017, 7th century, Mahabhaskariya), so that
    every peer and every referee derives the same integer; DESIGN §7 has the referee recompute it.
    """
    if schedule.kind == "constant":
        return schedule.peak_nano
    if step < schedule.warmup_steps:
        return schedule.peak_nano * (step + 1) // schedule.warmup_steps
    done, whole = step - schedule.warmup_steps, max(1, steps - schedule.warmup_steps)
    # cos(pi * u) for u in [0, 1/2] is (1 - 4u^2) / (1 + u^2); antisymmetric about 1/2.
    flipped = 2 * done > whole
    u = whole - done if flipped else done
    numerator, denominator = whole * whole - 4 * u * u, whole * whole + u * u
    if flipped:
        numerator = -numerator
    span = schedule.peak_nano - schedule.floor_nano
    return schedule.floor_nano + span * (denominator + numerator) // (2 * denominator)
