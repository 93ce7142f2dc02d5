"""Training by segments: from a task, its Program and its data to checkpoints, roots and losses. DESIGN §5.3.

Everything a step reads follows from the task: the batch from (seed, step), the learning rate from the schedule,
the random numbers from (seed, step, node). So a verifier that starts from the same checkpoint gets the same roots,
and no caller can slip other inputs in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocol import params, philox
from protocol.errors import LocalProtocolError, MalformedRecord, VerificationFailed
from protocol.program import (
    BATCH_STREAM,
    INIT_STREAM,
    Input,
    Program,
    longest_product,
    operations_per_step,
    program_id,
    state_layout,
)
from protocol.task import TaskSpec, learning_rate
from worker import cheats, checkpoint, exact
from worker.exact import compiled
from worker.executor import DTYPES, Diverged, Executor

__all__ = [
    "Batches",
    "Partial",
    "SegmentResult",
    "Suspended",
    "check_task",
    "drawn",
    "initial_root",
    "initial_state",
    "rate_of",
    "run_segments",
]

Data = bytes | memoryview


@dataclass(frozen=True)
class SegmentResult:
    """What one segment gave. last_step is exclusive; after divergence it is the step that diverged.

    losses: of each step done, before its update; of a resumed segment, from the step it was resumed at.
    operations: charged for the whole segment. checkpoint: the end state as safetensors, whose root is out_root.
    """

    segment: int
    first_step: int
    last_step: int
    in_root: bytes
    out_root: bytes
    losses: tuple[float, ...]
    operations: int
    checkpoint: bytes
    diverged_step: int | None


@dataclass(frozen=True)
class Partial:
    """Where a suspended segment stands: the state before `step`, whose root is `root`. in_root: the segment's own."""

    step: int
    in_root: bytes
    root: bytes


class Suspended(Exception):  # no error: the caller asked for it
    """`stop` was true before `step`. state: the one before it, as safetensors; with in_root a Partial's contents."""

    def __init__(self, segment: int, step: int, in_root: bytes, state: bytes) -> None:
        self.segment, self.step, self.in_root, self.state = segment, step, in_root, state
        super().__init__(f"suspended before step {step}")


class Batches:
    """The batches of a task: step number in, tensors out, by the batch rule of protocol/task.py."""

    def __init__(self, task: TaskSpec, program: Program, arrays: Mapping[str, Data]) -> None:
        """Raises MalformedRecord if the arrays do not fit the task, or the task the program."""
        self._task = task
        self._inputs = program.inputs_of("batch")
        self._arrays: dict[str, NDArray[Any]] = {}
        for ref in task.arrays:
            if ref.name not in arrays:
                raise MalformedRecord(f"array {ref.name} is missing")
            data = memoryview(arrays[ref.name])
            if data.nbytes != ref.size_bytes:
                raise MalformedRecord(f"array {ref.name} has {data.nbytes} bytes, the task says {ref.size_bytes}")
            dtype = np.dtype(ref.dtype).newbyteorder("<")
            self._arrays[ref.name] = np.frombuffer(data, dtype).reshape(ref.shape)
        for item in self._inputs:
            self._check(item)

    def _check(self, item: Input) -> None:
        rule = self._task.batch
        if rule.rule == "windows":
            if item.name not in ("x", "y"):
                raise MalformedRecord(f"the batch rule `windows` has no input {item.name}, only x and y")
            (array,) = self._arrays.values()
            shape: tuple[int, ...] = (rule.size, rule.length)
        else:
            if item.name not in self._arrays:
                raise MalformedRecord(
                    f"input {item.name} has no array", next_step="name arrays after the example batch: x, y"
                )
            array = self._arrays[item.name]
            shape = (rule.size, *array.shape[1:])
        if item.shape != shape:
            raise MalformedRecord(
                f"input {item.name} has shape {item.shape}, the batch rule gives {shape}",
                next_step="make the example batch of build() as large as the batch in job.toml",
            )
        if not _fits(array.dtype.name, item.dtype):
            raise MalformedRecord(f"input {item.name} is {item.dtype}, its array is {array.dtype.name}")

    def of(self, step: int, *, seed: int | None = None) -> dict[str, Tensor]:
        """The batch of `step`, by input name. seed: the task's, unless a demonstration of fraud says otherwise."""
        rule = self._task.batch
        drawn_with = self._task.seed if seed is None else seed
        arrays = self._arrays
        if rule.rule == "windows":
            (text,) = arrays.values()
            starts = philox.integers(drawn_with, step, BATCH_STREAM, rule.size, text.shape[0] - rule.length)
            places = starts[:, None] + np.arange(rule.length)
            cut = {"x": text[places], "y": text[places + 1]}
        else:
            count = next(iter(arrays.values())).shape[0]
            if rule.rule == "sequence":
                rows = np.arange(step * rule.size, (step + 1) * rule.size)
            else:
                rows = philox.integers(drawn_with, step, BATCH_STREAM, rule.size, count)
            cut = {name: array[rows] for name, array in arrays.items()}
        return {
            item.name: torch.from_numpy(np.ascontiguousarray(cut[item.name].astype(item.dtype)))
            for item in self._inputs
        }


def _fits(stored: str, wanted: str) -> bool:
    if stored == wanted or wanted == "float32":
        return True
    return wanted == "int64" and stored in ("uint8", "int32")


def check_task(task: TaskSpec, program: Program) -> None:
    """Refuse a task that does not speak of `program`. Raises VerificationFailed, MalformedRecord."""
    if program_id(program.to_bytes()) != task.program:
        raise VerificationFailed("the program is not the one the task names")
    if operations_per_step(program) != task.operations_per_step:
        raise MalformedRecord(
            f"the task states {task.operations_per_step} operations a step, the program has "
            f"{operations_per_step(program)}"
        )
    longest = longest_product(program)
    if task.mode == "exact" and task.width == 22 and longest > params.PRODUCT_LENGTH_22_MAX:
        raise MalformedRecord(
            f"a product over {longest} elements at width 22, at most {params.PRODUCT_LENGTH_22_MAX}",
            why="its sum may not fit 64 bits",
            next_step="use width 15, or a smaller batch",
        )


def initial_state(task: TaskSpec, program: Program, base: Data | None) -> dict[str, Tensor]:
    """The state before step 0: drawn from the seed by the init rules, or read from `base`.

    Raises MalformedRecord if a rule says `given` and no checkpoint is, or if `base` does not fit the program;
    VerificationFailed if `base` is not the state the task names.
    """
    if task.initial.kind == "state":
        if base is None:
            raise MalformedRecord("the task starts from a checkpoint, and none is given")
        state = checkpoint.load(base, state_layout(program))
        if checkpoint.state_root(state) != task.initial.root:
            raise VerificationFailed("the checkpoint is not the state the task starts from")
        return state
    rules = {item.name: item for item in program.inputs if item.init is not None}
    return {name: drawn(rules[name], task.seed, index) for index, name in enumerate(state_layout(program))}


def drawn(item: Input, seed: int, index: int) -> Tensor:
    """The first value of state tensor number `index`, in name order, by its init rule. Raises MalformedRecord."""
    init = item.init
    assert init is not None
    if init.kind == "given":
        raise MalformedRecord(
            f"{item.name} has no init rule a stranger can follow",
            why="it was filled by something else than a constant, normal or uniform draw",
            next_step='set initial = "model" in job.toml, which uploads the weights',
        )
    if init.kind == "constant":
        return torch.full(item.shape, init.a if item.dtype == "float32" else int(init.a), dtype=DTYPES[item.dtype])
    stream = INIT_STREAM + index
    if init.kind == "normal":
        return exact.normal(seed, 0, stream, item.shape, draw=compiled.uniform) * init.b + init.a
    return compiled.uniform(seed, 0, stream, item.shape) * (init.b - init.a) + init.a


def initial_root(task: TaskSpec, program: Program, base: Data | None) -> bytes:
    """The root of the state before step 0: 32 bytes. Raises as `initial_state`."""
    return checkpoint.state_root(initial_state(task, program, base))


def rate_of(task: TaskSpec, step: int) -> float:
    """The learning rate of `step` as the float32 a step reads."""
    return float(np.float32(learning_rate(task.schedule, step=step, steps=task.steps) / 1e9))


def run_segments(
    *,
    task: TaskSpec,
    program: Program,
    arrays: Mapping[str, Data],
    base: Data | None,
    segments: range,
    threads: int = 1,
    cheat: str | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    stop: Callable[[], bool] | None = None,
    partial: Partial | None = None,
) -> Iterator[SegmentResult]:
    """Run `segments` one after the other and yield each result.

    base: the checkpoint at the start of segments.start as safetensors; None if the task starts from its seed and
    segments.start is 0. cheat: a fraud of worker/cheats.py. on_step: called with each step's number and loss.
    After a step that diverges, the segment's result says so and is the last. stop: asked before every step; true
    raises Suspended. partial: base is the state it stands for, within segments.start, which goes on from there; the
    bits are those of an uninterrupted run, because a step reads nothing but the state and its number.
    Raises MalformedRecord, VerificationFailed for a task, program, data, base or partial that do not fit each other.
    """
    cheats.check(cheat)
    check_task(task, program)
    if not len(segments) or segments.step != 1 or segments.start < 0 or segments.stop > task.segments:
        raise LocalProtocolError(f"segments {segments} of a task of {task.segments}")
    if cheat is not None:
        stop = None  # a demonstrated fraud leaves steps out: no step number says where it stands
    if partial is not None and (cheat is not None or partial.step not in task.steps_of(segments.start)):
        raise MalformedRecord(f"step {partial.step} is not one where segment {segments.start} can go on")
    if cheats.copies(cheat):
        other = msgspec.structs.replace(task, seed=task.seed ^ 1)
        true_root = checkpoint.state_root(_start(task, program, base, segments))
        for result in _run(other, program, arrays, base, segments, threads, None, on_step, None, None):
            first = result.segment == segments.start
            yield replace(result, in_root=true_root) if first else result
        return
    yield from _run(task, program, arrays, base, segments, threads, cheat, on_step, stop, partial)


def _start(
    task: TaskSpec, program: Program, base: Data | None, segments: range, partial: Partial | None = None
) -> dict[str, Tensor]:
    if segments.start == 0 and partial is None:
        return initial_state(task, program, base)
    if base is None:
        raise MalformedRecord(f"segment {segments.start} needs the checkpoint it starts from")
    return checkpoint.load(base, state_layout(program))


def _run(
    task: TaskSpec,
    program: Program,
    arrays: Mapping[str, Data],
    base: Data | None,
    segments: range,
    threads: int,
    cheat: str | None,
    on_step: Callable[[int, float], None],
    stop: Callable[[], bool] | None,
    partial: Partial | None,
) -> Iterator[SegmentResult]:
    batches = Batches(task, program, arrays)
    executor = Executor(program, task.mode, width=task.width, threads=threads)
    state = _start(task, program, base, segments, partial)
    roots = checkpoint.Roots()
    root: bytes | None = None  # no step needs it, so a job starts sooner when it is taken after the first ones
    if partial is not None:
        root = roots.of(state)
        if root != partial.root:
            raise VerificationFailed("the suspended state is not the one that was kept", why="the file was damaged")
    for segment in segments:
        steps = task.steps_of(segment)
        start_state, in_root, begun = state, root, steps.start
        if partial is not None:
            in_root, begun, partial = partial.in_root, partial.step, None
        losses: list[float] = []
        diverged: int | None = None
        for step in cheats.steps_done(cheat, segment, range(begun, steps.stop)):
            if cheats.is_stale(cheat, segment):
                break
            if stop is not None and stop():
                raise Suspended(segment, step, in_root or roots.of(start_state), checkpoint.dump(state))
            batch = batches.of(step, seed=cheats.batch_seed(cheat, segment, task.seed))
            try:
                state, loss = executor.step(state, batch, rate_of(task, step), task.seed, step)
            except Diverged as error:
                diverged = error.step
                break
            losses.append(loss)
            on_step(step, loss)
        last = steps.stop if diverged is None else diverged
        in_root = in_root or roots.of(start_state)
        root = roots.of(state) if state is not start_state else root or in_root
        missing = last - begun - len(losses)  # only a fraud leaves steps out: it repeats the loss it had
        losses.extend([losses[-1] if losses else 0.0] * missing)
        done = last - steps.start
        yield SegmentResult(
            segment,
            steps.start,
            last,
            in_root,
            root,
            tuple(losses),
            done * task.operations_per_step,
            checkpoint.dump(state),
            diverged,
        )
        if diverged is not None:
            return
