"""Training by segments: from a task, its Program and its data to checkpoints, roots and losses. DESIGN §5.3.

Everything a step reads follows from the task: the batch from (seed, step), the learning rate from the schedule,
the random numbers from (seed, step, node). So a verifier that starts from the same checkpoint gets the same roots,
and no caller can slip other inputs in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocol import params
from protocol.batches import batch_of, check_batches
from protocol.errors import LocalProtocolError, MalformedRecord, VerificationFailed
from protocol.profile import Gauge, distance, put_back
from protocol.program import (
    INIT_STREAM,
    Input,
    Program,
    longest_product,
    operations_per_step,
    program_id,
    state_layout,
)
from protocol.task import TaskSpec, learning_rate
from worker import cheats, checkpoint, exact, frauds
from worker.exact import compiled
from worker.executor import DTYPES, Diverged, Executor

__all__ = [
    "Batches",
    "Data",
    "FalseEnd",
    "Ordered",
    "Partial",
    "SegmentResult",
    "Suspended",
    "arithmetic_of",
    "check_task",
    "drawn",
    "initial_root",
    "initial_state",
    "put_back_gauges",
    "rate_of",
    "run_segments",
    "state_before",
]

Data = bytes | memoryview


@dataclass(frozen=True)
class SegmentResult:
    """What one segment gave. last_step is exclusive; after divergence it is the step that diverged.

    losses: of each step done, before its update; of a resumed segment, from the step it was resumed at.
    operations: charged for the whole segment. checkpoint: the end state as safetensors, whose root is out_root.
    distance: of the end that was to be compared with this one, in ppb of the update: L1 and L2.
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
    false_end: FalseEnd | None = None
    distance: tuple[int, int] | None = None


@dataclass(frozen=True)
class FalseEnd:
    """The wrong end of a segment, as safetensors, and its root: what the fraud would have given that was asked for.

    The segment's result has the true end; its last loss is the fraud's, as a receipt with this root has to state it.
    """

    root: bytes
    checkpoint: bytes


@dataclass(frozen=True)
class Ordered:
    """An error to make beside the true end of `segment` (protocol/forced.py): a fraud of cheats.FALSE_ENDS."""

    segment: int
    fraud: str


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
        self._program = program
        self._arrays: dict[str, NDArray[Any]] = {}
        for ref in task.arrays:
            if ref.name not in arrays:
                if ref not in task.fetched:
                    continue
                raise MalformedRecord(f"array {ref.name} is missing")
            data = memoryview(arrays[ref.name])
            if data.nbytes != ref.size_bytes:
                raise MalformedRecord(f"array {ref.name} has {data.nbytes} bytes, the task says {ref.size_bytes}")
            dtype = np.dtype(ref.dtype).newbyteorder("<")
            self._arrays[ref.name] = np.frombuffer(data, dtype).reshape(ref.shape)
        check_batches(task, program)

    def of(self, step: int, *, seed: int | None = None) -> dict[str, Tensor]:
        """The batch of `step`, by input name. seed: the task's, unless a demonstration of fraud says otherwise."""
        cut = batch_of(self._task, self._program, self._arrays, step, seed=seed)
        return {name: torch.from_numpy(array) for name, array in cut.items()}


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


def arithmetic_of(task: TaskSpec) -> Literal["exact", "native"]:
    """What the executor computes a task's steps with: tolerant mode takes torch's own kernels."""
    return "native" if task.mode == "tolerant" else "exact"


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
    gauges: tuple[Gauge, ...] = (),
    ordered: Ordered | None = None,
    compare: Data | None = None,
) -> Iterator[SegmentResult]:
    """Run `segments` one after the other and yield each result.

    base: the checkpoint at the start of segments.start as safetensors; None if the task starts from its seed and
    segments.start is 0. cheat: a fraud of worker/cheats.py. on_step: called with each step's number and loss.
    After a step that diverges, the segment's result says so and is the last. stop: asked before every step; true
    raises Suspended. partial: base is the state it stands for, within segments.start, which goes on from there; the
    bits are those of an uninterrupted run, because a step reads nothing but the state and its number. gauges: state of
    a tolerant task that every segment ends with as it began. ordered: make a false end beside the true one of its
    segment; the work goes on from the true one. compare: another end of the one segment, a checkpoint, whose distance
    from this one is wanted.
    Raises MalformedRecord, VerificationFailed for a task, program, data, base or partial that do not fit each other.
    """
    cheats.check(cheat)
    check_task(task, program)
    if task.stage is not None:
        raise LocalProtocolError("a unit of a parallel job is run by worker/stage_run.py")
    if not len(segments) or segments.step != 1 or segments.start < 0 or segments.stop > task.segments:
        raise LocalProtocolError(f"segments {segments} of a task of {task.segments}")
    whole = cheat is not None or bool(gauges) or compare is not None
    if whole:
        # A demonstrated fraud leaves steps out: no step number says where it stands. And a state within a segment does
        # not say what the segment's start was, which gauges are put back to and distances are counted from.
        stop = None
    if partial is not None and (whole or partial.step not in task.steps_of(segments.start)):
        raise MalformedRecord(f"step {partial.step} is not one where segment {segments.start} can go on")
    claimed = checkpoint.load(compare, state_layout(program)) if compare is not None else None
    if claimed is not None and (len(segments) != 1 or task.mode != "tolerant"):
        raise LocalProtocolError("an end of one segment of a tolerant task can be compared, and nothing else")
    if ordered is not None and (cheat is not None or ordered.fraud not in cheats.FALSE_ENDS):
        raise LocalProtocolError(
            f"an ordered error by {ordered.fraud!r}, or in a fraud", next_step="see cheats.FALSE_ENDS"
        )
    if cheats.copies(cheat):
        other = msgspec.structs.replace(task, seed=task.seed ^ 1)
        true_root = checkpoint.state_root(state_before(task, program, base, segments))
        for result in _run(other, program, arrays, base, segments, threads, None, on_step, None, None, gauges, None):
            first = result.segment == segments.start
            yield replace(result, in_root=true_root) if first else result
        return
    made = _run(task, program, arrays, base, segments, threads, cheat, on_step, stop, partial, gauges, ordered)
    if claimed is None:
        yield from made
        return
    (result,) = made
    start = state_before(task, program, base, segments)
    own = checkpoint.load(result.checkpoint, state_layout(program))
    yield replace(result, distance=_distance(start, own, claimed, gauges))


def state_before(
    task: TaskSpec, program: Program, base: Data | None, segments: range, partial: Partial | None = None
) -> dict[str, Tensor]:
    """The state that `segments` begin with. Raises MalformedRecord, VerificationFailed if `base` is not it."""
    if segments.start == 0 and partial is None:
        return initial_state(task, program, base)
    if base is None:
        raise MalformedRecord(f"segment {segments.start} needs the checkpoint it starts from")
    return checkpoint.load(base, state_layout(program))


def put_back_gauges(
    start: Mapping[str, Tensor], end: dict[str, Tensor], gauges: tuple[Gauge, ...]
) -> dict[str, Tensor]:
    """`end` with its gauge parts as they were at `start`: what is committed to and what the next segment begins at."""
    before, after = (
        {gauge.name: state[gauge.name].numpy() for gauge in gauges if gauge.name in state} for state in (start, end)
    )
    return end | {name: torch.from_numpy(array) for name, array in put_back(before, after, gauges).items()}


def _distance(
    start: dict[str, Tensor], ours: dict[str, Tensor], theirs: dict[str, Tensor], gauges: tuple[Gauge, ...]
) -> tuple[int, int]:
    base, own, other = ({name: tensor.numpy() for name, tensor in state.items()} for state in (start, ours, theirs))
    found = distance(base, own, other, gauges)
    return found.l1_ppb, found.l2_ppb


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
    gauges: tuple[Gauge, ...],
    ordered: Ordered | None,
) -> Iterator[SegmentResult]:
    batches = Batches(task, program, arrays)
    fraud = frauds.Fraud(cheat)
    executors = [kind(program, arithmetic_of(task), width=task.width, threads=threads) for kind in fraud.executors]
    state = state_before(task, program, base, segments, partial)
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
        false: FalseEnd | None = None
        state = fraud.begin(segment, state)
        for step in fraud.steps(segment, range(begun, steps.stop)):
            if stop is not None and stop():
                raise Suspended(segment, step, in_root or roots.of(start_state), checkpoint.dump(state))
            last_step, before = step == steps.stop - 1, state
            drawn, seed = fraud.data_of(segment, step, task.seed, last=last_step)
            batch = fraud.batch(segment, batches.of(drawn, seed=seed), first=step == steps.start)
            rate, read = fraud.rate(segment, rate_of(task, step)), fraud.reads(segment, state)
            try:
                new, loss = executors[-1 if segment else 0].step(read, batch, rate, task.seed, step)
            except Diverged as error:
                diverged = error.step
                break
            state = fraud.after(read, state, new)
            if ordered is not None and ordered.segment == segment and last_step:
                known = losses[-1] if losses else 0.0 if begun == steps.start else None
                wrong = _wrong_ends(executors[0], task, batches, before, step, known, ordered.fraud)
                false, loss = _false_end(wrong, state, loss, start_state, gauges)
            losses.append(loss)
            on_step(step, loss)
        if gauges and state is not start_state:
            state = put_back_gauges(start_state, state, gauges)
        last = steps.stop if diverged is None else diverged
        in_root = in_root or roots.of(start_state)
        root = roots.of(state) if state is not start_state else root or in_root
        missing = last - begun - len(losses)  # only a fraud leaves steps out: it repeats the loss it had
        losses.extend([losses[-1] if losses else 0.0] * missing)
        done = (last - steps.start) * task.operations_per_step
        yield SegmentResult(
            segment, steps.start, last, in_root, root, tuple(losses), done, checkpoint.dump(state), diverged, false
        )
        if diverged is not None:
            return


def _wrong_ends(
    executor: Executor,
    task: TaskSpec,
    batches: Batches,
    before: dict[str, Tensor],
    step: int,
    known: float | None,
    fraud: str,
) -> Iterator[tuple[dict[str, Tensor], float]]:
    """What frauds of the last step make of the state before it, and of its loss: `fraud` first, then the others.

    known: the loss that skip-step repeats; None where a resumed segment does not have it.
    """
    for kind in sorted(cheats.FALSE_ENDS, key=lambda kind: kind != fraud):
        made = frauds.Fraud(kind)
        if not made.steps(1, range(step, step + 1)):
            if known is not None:
                yield before, known
            continue
        _, seed = made.data_of(1, step, task.seed, last=True)
        batch = batches.of(step, seed=seed)
        try:
            yield executor.step(before, batch, rate_of(task, step), task.seed, step)
        except Diverged:
            continue


def _false_end(
    wrong: Iterator[tuple[dict[str, Tensor], float]],
    right: dict[str, Tensor],
    loss: float,
    start: dict[str, Tensor],
    gauges: tuple[Gauge, ...],
) -> tuple[FalseEnd | None, float]:
    """The first of the wrong ends that is wrong, and its loss; none, and the true loss, if no fraud makes a difference,
    as where every step reads all of the data and changes nothing."""
    root = checkpoint.state_root(put_back_gauges(start, right, gauges))
    for made, false_loss in wrong:
        state = put_back_gauges(start, made, gauges)
        found = checkpoint.state_root(state)
        if found != root:
            return FalseEnd(found, checkpoint.dump(state)), false_loss
    return None, loss
