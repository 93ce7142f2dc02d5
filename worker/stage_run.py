"""Runs segments of a unit of a parallel job: from a checkpoint and what it receives to the next. DESIGN §11.

A segment is a pure function of the checkpoint and the tape. Beside its neighbours a unit gets its payloads as they
come, and a checker from the tape: same bits, same root. A unit is never suspended within a segment, because it starts
again from the checkpoint and the tape at no other price than the steps themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from protocol.errors import LocalProtocolError
from protocol.program import Program
from protocol.task import TaskSpec
from worker import cheats, checkpoint, frauds
from worker.crossings import Crossings, Wire, check_unit
from worker.executor import Diverged, Executor
from worker.training import Batches, Data, FalseEnd, Ordered, SegmentResult, check_task, rate_of, state_before

__all__ = ["run_unit"]

State = dict[str, torch.Tensor]


def run_unit(
    *,
    task: TaskSpec,
    program: Program,
    arrays: Mapping[str, Data],
    base: Data | None,
    segments: range,
    wire: Wire,
    threads: int = 1,
    cheat: str | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    ordered: Ordered | None = None,
) -> Iterator[SegmentResult]:
    """Run `segments` one after the other and yield each result, as training.run_segments does of an ordinary task.

    base: the checkpoint at the start of segments.start, as safetensors. cheat: one of cheats.UNIT_CHEATS. ordered: make
    a false end beside the true one of its segment, which lacks its last step.
    Raises MalformedRecord, VerificationFailed, LimitExceeded for a task, program, data, base or tape that do not fit
    each other; link_codecs.BadPayload for what a neighbour sent.
    """
    cheats.check(cheat, unit=True)
    check_task(task, program)
    check_unit(task, program)
    if not len(segments) or segments.step != 1 or segments.start < 0 or segments.stop > task.segments:
        raise LocalProtocolError(f"segments {segments} of a task of {task.segments}")
    batches = Batches(task, program, arrays)
    assert task.stage is not None, "check_unit has seen to it"
    fraud = frauds.UnitFraud(cheat, task.stage)
    executor = Executor(program, width=task.width, threads=threads, stage=task.stage)
    state = state_before(task, program, base, segments)
    roots = checkpoint.Roots()
    root = roots.of(state)
    for segment in segments:
        steps, in_root = task.steps_of(segment), root
        crossings = Crossings(task, program, wire, state)
        wire.begin(segment)
        losses: list[float] = []
        before, diverged = state, None
        for step in steps:
            crossings.begin(step)
            batch, rate = batches.of(step), rate_of(task, step)
            send = partial(_send, crossings, fraud, segment, step)
            try:
                new, loss = executor.step(state, batch, rate, task.seed, step, receive=crossings.receive, send=send)
                new = fraud.after(segment, state, new)
                new = crossings.outer(new) if step == steps.stop - 1 else new
            except Diverged as error:
                crossings.undo()
                diverged = error.step
                break
            crossings.turn()
            before, state = state, new
            losses.append(loss)
            on_step(step, loss)
        ends = crossings.end()
        state = {**state, **ends}
        root = roots.of(state)
        last = steps.stop if diverged is None else diverged
        false = None
        if ordered is not None and ordered.segment == segment and diverged is None:
            false = _false_end({**before, **ends}, root)
            if false is not None:
                losses[-1:] = losses[-2:-1] or [0.0]
        done = (last - steps.start) * task.operations_per_step
        yield SegmentResult(
            segment, steps.start, last, in_root, root, tuple(losses), done, checkpoint.dump(state), diverged, false
        )
        if diverged is not None:
            return


def _send(
    crossings: Crossings, fraud: frauds.UnitFraud, segment: int, step: int, value: int, tensor: torch.Tensor
) -> torch.Tensor:
    return crossings.send(value, fraud.sent(segment, step, value, tensor))


def _false_end(state: State, true_root: bytes) -> FalseEnd | None:
    """The end that a segment without its last step would have; none if that step changed nothing."""
    root = checkpoint.state_root(state)
    return FalseEnd(root, checkpoint.dump(state)) if root != true_root else None
