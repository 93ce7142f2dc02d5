"""A whole dispute whose players answer from real sandboxed workers, and what a hostile worker may not answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peer.work_order import Answer, WorkFailed, WorkOrder
from peer.workshop import Workshop
from protocol import params
from protocol.codec import decode
from protocol.dispute import Game
from protocol.dispute_terms import Terms
from protocol.task import TaskSpec
from tests.test_workshop import Heard, changed, order, regression, rehearsing, said
from worker.frames import Answered, Done, Handed, Reply, Segment
from worker.tracing import inspect

__all__ = ["order"]  # a fixture


async def asked(workshop: Workshop, order: WorkOrder, question: bytes, base: Path | None, **fields: Any) -> Answer:
    done = await Heard().run(workshop, changed(order, want="answer", question=question, base=base, **fields))
    assert isinstance(done.answer, Answer)
    return done.answer


def answered_here(
    order: WorkOrder, task: TaskSpec, question: bytes, base: Path, claimed: Path | None = None
) -> tuple[bytes, bytes, bytes | None]:
    arrays = {name: path.read_bytes() for name, path in order.arrays.items()}
    end = claimed.read_bytes() if claimed else None
    return inspect(question, task=task, program=regression(), arrays=arrays, base=base.read_bytes(), claimed=end)


async def test_a_dispute_is_played_from_sandboxes_and_the_cheat_loses_at_the_leaf(
    workshop: Workshop, order: WorkOrder, tmp_path: Path
) -> None:
    honest, cheat = Heard(), Heard()
    await honest.run(workshop, replace(order, work_id="honest"))
    await cheat.run(workshop, replace(order, work_id="cheat", cheat="wrong-data"))
    right, wrong = honest.segments[1], cheat.segments[1]
    assert right.in_root == wrong.in_root
    assert right.out_root != wrong.out_root
    task = decode(TaskSpec, order.task, bytes_max=params.MESSAGE_BYTES_MAX)
    roots = {"in_root": right.in_root, "claimed_root": wrong.out_root, "found_root": right.out_root}
    game = Game(Terms(dispute=bytes(32), task=task, program=regression(), segment=1, block=2, **roots))
    start = honest.segments[0].checkpoint
    base, handed = start, 0
    while game.result is None and not game.wants_opening():
        for side in game.owes():
            question = game.question(side)
            assert question is not None
            # The rest in this process: a worker of its own takes a second or more to load torch.
            if side == "challenger" or game.number not in (0, 1, 2):
                claimed = wrong.checkpoint if side == "solver" else None
                body, _, _ = answered_here(order, task, question, start, claimed)
            else:
                answer = await asked(
                    workshop, order, question, base, work_id=f"q-{game.number}", first_segment=1,
                    claimed=wrong.checkpoint,
                )  # fmt: skip
                body = answer.body
                if answer.state is not None:
                    base, handed = answer.state, handed + 1
            game.take(side, game.number, body)
    if game.result is None:
        question = game.question("challenger")
        assert question is not None
        game.open(answered_here(order, task, question, start)[1])
    assert game.result is not None
    assert (game.result.loser, game.result.cause) == ("solver", "leaf")
    assert handed, "later questions start from the state before the step"


async def test_a_question_that_does_not_fit_the_base_is_refused_with_words(
    workshop: Workshop, order: WorkOrder
) -> None:
    honest = Heard()
    await honest.run(workshop, order)
    task = decode(TaskSpec, order.task, bytes_max=params.MESSAGE_BYTES_MAX)
    roots = {"in_root": bytes(32), "claimed_root": b"a" * 32, "found_root": b"b" * 32}
    game = Game(Terms(dispute=bytes(32), task=task, program=regression(), segment=1, block=2, **roots))
    question = game.question("solver")
    assert question is not None
    with pytest.raises(WorkFailed, match="is not the one that the segment starts from"):
        await asked(workshop, order, question, honest.segments[0].checkpoint, first_segment=1)
    with pytest.raises(WorkFailed) as failed:
        await asked(workshop, order, b"no question", honest.segments[0].checkpoint, first_segment=1)
    assert failed.value.code == "bad-data"


ANSWER = Answered(body=b"move", opening_bytes=4)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([Done()], "wrong-reply"),
        ([ANSWER, b"open", ANSWER], "wrong-reply"),
        ([Handed(8)], "wrong-reply"),
        ([ANSWER, b"open", Handed(5000)], "oversize-checkpoint"),
        ([ANSWER, b"open", Handed(4), b"stat", Handed(4)], "wrong-reply"),
        ([ANSWER, b"op"], "short-checkpoint"),
        ([ANSWER, b"open", Segment(segment=0, first_step=0, last_step=2, in_root=bytes(32), out_root=bytes(32),
                                   operations=1, checkpoint_bytes=4, diverged_step=None)], "wrong-reply"),
        ([Answered(body=bytes(params.MOVE_BYTES_MAX + 1), opening_bytes=0)], "bad-frame"),
        ([Answered(body=b"", opening_bytes=params.OPENING_BYTES_MAX + 1)], "bad-frame"),
    ],
    ids=["nothing", "twice", "state alone", "large state", "two states", "half an opening", "a segment", "large body",
         "large opening"],
)  # fmt: skip
async def test_a_hostile_worker_cannot_answer_what_was_not_asked(
    workshop: Workshop, order: WorkOrder, monkeypatch: pytest.MonkeyPatch, words: list[Reply | bytes], code: str
) -> None:
    rehearsing(monkeypatch, "speak", speak=said(*words).hex())
    with pytest.raises(WorkFailed) as failed:
        await asked(workshop, order, b"?", None)
    assert failed.value.code == code, failed.value
