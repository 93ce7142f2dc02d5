"""What a job asks for: a Program, its data, where it starts, and how long it runs. DESIGN §4.

A TaskSpec fixes every input of every step, so two peers that hold it and the blobs it names must reach the
same state. It holds integers, hashes and short names only.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

from protocol import params
from protocol.codec import Digest, Uint, blake, decode, encode
from protocol.errors import MalformedRecord, WrongNetwork

__all__ = ["ArrayRef", "BatchRule", "Initial", "Schedule", "TaskSpec", "learning_rate", "task_id"]

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
    as `rows`, with rows step * size to (step + 1) * size - 1, so that a task reads each row once, in order.
    """

    rule: Literal["windows", "rows", "sequence"]
    size: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    length: Annotated[int, msgspec.Meta(ge=0, le=2**24)]


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
    """A whole job. `program` is the id of the Program; `steps_per_segment` is also the checkpoint interval."""

    network: Digest
    program: Digest
    program_bytes: Annotated[int, msgspec.Meta(ge=1, le=params.PROGRAM_BYTES_MAX)]
    arrays: Annotated[tuple[ArrayRef, ...], msgspec.Meta(min_length=1, max_length=64)]
    batch: BatchRule
    initial: Initial
    seed: Uint
    steps: Annotated[int, msgspec.Meta(ge=1, le=params.TASK_STEPS_MAX)]
    steps_per_segment: Annotated[int, msgspec.Meta(ge=1, le=params.TASK_STEPS_MAX)]
    mode: Literal["exact", "native"]
    width: Literal[8, 15, 22]
    schedule: Schedule
    operations_per_step: Annotated[int, msgspec.Meta(ge=1, le=2**60)]
    name: Name

    @property
    def segments(self) -> int:
        """The number of segments; the last may be shorter."""
        return math.ceil(self.steps / self.steps_per_segment)

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
        if task.batch.rule == "windows":
            if len(task.arrays) != 1 or len(task.arrays[0].shape) != 1:
                raise MalformedRecord("the batch rule `windows` takes one array of one dimension")
            if not 1 <= task.batch.length < task.arrays[0].shape[0]:
                raise MalformedRecord(f"windows of {task.batch.length} from an array of {task.arrays[0].shape[0]}")
        elif len({array.shape[0] for array in task.arrays}) != 1 or not task.arrays[0].shape[0]:
            raise MalformedRecord(
                f"the batch rule `{task.batch.rule}` takes arrays of one equal, positive number of rows"
            )
        elif task.batch.rule == "sequence" and task.steps * task.batch.size != task.arrays[0].shape[0]:
            rows = task.arrays[0].shape[0]
            raise MalformedRecord(
                f"{task.steps} steps of {task.batch.size} rows do not read {rows} rows once each",
                next_step="make steps times size the number of rows; leave rows out, or evaluate the rest apart",
            )
        return task


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
