"""A whole dispute over floats between two sandboxed workers, and files of a solver that are none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peer.work_order import WorkFailed, WorkOrder
from peer.workshop import Workshop
from protocol import params
from protocol.codec import decode, encode
from protocol.dispute import SIDES, Game, Pledge, Terms
from protocol.dispute_evidence import evidence_bytes
from protocol.dispute_facts import Facts
from protocol.dispute_following import Dissented
from protocol.dispute_wire import Question, ShowDissent, ShowState, ShowStates, ShowTrace
from protocol.profile import Gauge, Tolerance
from protocol.task import TaskSpec
from tests.test_dispute_worker import asked
from tests.test_workshop import Heard, order, regression, retasked
from worker.tracing import inspect

__all__ = ["order"]  # a fixture

SEGMENT, STEP = 1, 1  # a stubborn cheat jumps to its end in the last step


def answered_here(
    order: WorkOrder, task: TaskSpec, due: bytes, *, base: Path, first_segment: int, claimed: Path | None = None,
    followed: tuple[Path, ...] = (), dissent: bytes = b"",
) -> tuple[bytes, bytes, bytes | None]:  # fmt: skip
    return inspect(
        due,
        task=task,
        program=regression(),
        arrays={name: path.read_bytes() for name, path in order.arrays.items()},
        base=base.read_bytes(),
        claimed=claimed.read_bytes() if claimed else None,
        followed=[path.read_bytes() for path in followed],
        dissent=dissent,
    )


def question(in_root: bytes, ask: Any) -> bytes:
    return encode(Question(bytes(32), "solver", 0, SEGMENT, in_root, ask))


async def test_a_float_dispute_is_played_from_sandboxes_and_the_cheat_loses_at_an_element(
    workshop: Workshop, order: WorkOrder, tmp_path: Path
) -> None:
    order = retasked(order, mode="tolerant")
    cheat = Heard()
    await cheat.run(workshop, replace(order, work_id="cheat", cheat="wrong-data"))
    start, end = cheat.segments  # the first segment is honest
    task = decode(TaskSpec, order.task, bytes_max=params.MESSAGE_BYTES_MAX)
    facts = Facts(task, regression(), SEGMENT)
    solver = {"base": start.checkpoint, "claimed": end.checkpoint, "first_segment": SEGMENT}

    files = []
    for number, ask in enumerate((ShowStates(), ShowState(STEP), ShowTrace(STEP))):
        most = evidence_bytes(ask, facts, order.checkpoint_bytes_max)
        given = {**solver, "work_id": f"evidence-{number}", "checkpoint_bytes_max": most}
        shown = await asked(workshop, order, question(start.out_root, ask), **given)
        assert shown.state is not None and not shown.body
        files.append(shown.state.rename(tmp_path / f"shown-{number}"))
    follows = {"followed": tuple(files), "base": start.checkpoint, "first_segment": SEGMENT}
    told = await asked(workshop, order, question(start.out_root, ShowDissent(STEP)), work_id="dissent", **follows)
    found = decode(Dissented, told.body, bytes_max=params.QUESTION_BYTES_MAX)
    dissent = found.dissent
    assert dissent is not None
    assert (dissent.step, dissent.value) == (STEP, regression().updates[0].value)

    roots = {"in_root": start.out_root, "claimed_root": end.out_root, "found_root": found.found_root}
    tolerance = Tolerance(20_000, 110_000, ())
    pledge = Pledge(found.steps, STEP, found.trace)
    terms = Terms(bytes(32), task, regression(), SEGMENT, **roots, block=512, tolerance=tolerance, pledge=pledge)
    game = Game(terms)
    players = {"solver": solver, "challenger": {**follows, "dissent": encode(dissent)}}
    while game.result is None:
        opening = game.wants_opening()
        for side in ("challenger",) if opening else SIDES:
            due = game.question(side)
            assert due is not None
            fields = players[side]
            if (game.number, side) in (
                (0, "challenger"),
                (3, "solver"),
            ):  # the rest in this process: a worker of its own takes a second or more
                answer = await asked(workshop, order, due, work_id=f"{side}-{game.number}", **fields)
                body, opened = answer.body, answer.opening
            else:
                body, opened, _ = answered_here(order, task, due, **fields)
            if opening:
                game.open(opened)
            else:
                game.take(side, game.number, body)
    assert (game.result.loser, game.result.cause, game.result.level) == ("solver", "leaf", "element")


async def test_a_segment_of_a_sandboxed_worker_ends_with_its_gauges_as_they_were(
    workshop: Workshop, order: WorkOrder, tmp_path: Path
) -> None:
    gauges = (Gauge("w", 3, (2,)),)
    order, kept = retasked(order, mode="tolerant"), Heard()
    await kept.run(workshop, replace(order, work_id="kept", gauges=gauges))
    weights = [segment.checkpoint.read_bytes()[-12:] for segment in kept.segments]
    assert weights[0][:8] != weights[1][:8]
    assert weights[0][8:] == weights[1][8:]
    # A question about the segment is answered with the same end.
    ask = question(kept.segments[0].out_root, ShowStates())
    given = {"base": kept.segments[0].checkpoint, "first_segment": SEGMENT, "gauges": gauges}
    shown = await asked(workshop, order, ask, work_id="shown", **given)
    assert shown.state is not None
    roots = shown.state.read_bytes()
    assert len(roots) == 3 * 32
    assert roots[-32:] == kept.segments[1].out_root


async def test_files_that_are_no_evidence_are_refused_with_words(
    workshop: Workshop, order: WorkOrder, tmp_path: Path
) -> None:
    files = [tmp_path / f"shown-{number}" for number in range(3)]
    sizes = (2 * 32, 8, evidence_bytes(ShowTrace(STEP), Facts(*spec_of(order), SEGMENT), 0))
    for path, size in zip(files, sizes, strict=True):
        path.write_bytes(bytes(size))
    ask = question(bytes(32), ShowDissent(STEP))
    with pytest.raises(WorkFailed) as failed:
        await asked(workshop, order, ask, base=None, followed=tuple(files), first_segment=SEGMENT)
    assert failed.value.code == "bad-data"


def spec_of(order: WorkOrder) -> tuple[TaskSpec, Any]:
    return decode(TaskSpec, order.task, bytes_max=params.MESSAGE_BYTES_MAX), regression()
