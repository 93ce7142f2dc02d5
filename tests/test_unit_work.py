"""Units of a parallel job in real sandboxes: two that train as the whole does, and checks from their tapes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import trio

from peer.unit_exchange import keys_on_tape
from peer.work_order import SegmentDone, WorkDone
from peer.workshop import WorkFailed, Workshop
from protocol.blob import blob_id, manifest_of
from protocol.codec import encode
from protocol.errors import LocalProtocolError
from protocol.payload import PayloadKey, received_key
from protocol.stage import RECEIVED, SENT, TAPE
from tests.unit_scene import (
    STEPS,
    Heard,
    MemoryNet,
    Unit,
    data,
    first_state,
    made_unit,
    run_threads,
    stage_of,
    task_of,
    whole_program,
)
from worker import checkpoint
from worker.training import run_segments


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Unit, Unit]:
    return made_unit(tmp_path, stage_of(0)), made_unit(tmp_path, stage_of(1))


async def run(workshop: Workshop, unit: Unit, net: MemoryNet | None, heard: Heard, **changed: Any) -> WorkDone:
    order = replace(unit.order, **changed)
    return await workshop.run(order, on_step=heard.step, on_segment=heard.segment, port=net)


async def run_pair(workshop: Workshop, pair: tuple[Unit, Unit], net: MemoryNet, **changed: Any) -> list[Heard]:
    heard = [Heard(), Heard()]
    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            for unit, one in zip(pair, heard, strict=True):
                nursery.start_soon(partial(run, workshop, unit, net, one, **changed))
    return heard


def state_of(done: SegmentDone) -> dict[str, torch.Tensor]:
    return checkpoint.load(done.checkpoint.read_bytes())


def trained_whole() -> list[dict[str, torch.Tensor]]:
    """The ends of the whole's segments."""
    program = whole_program()
    base = first_state(program)
    made = run_segments(
        task=task_of(program, None, base), program=program, arrays={n: a.tobytes() for n, a in data().items()},
        base=checkpoint.dump(base), segments=range(3),
    )  # fmt: skip
    return [checkpoint.load(result.checkpoint) for result in made]


async def test_two_units_train_bit_for_bit_as_the_whole_does(workshop: Workshop, pair: tuple[Unit, Unit]) -> None:
    net = MemoryNet()
    first, second = await run_pair(workshop, pair, net)
    for number, whole in enumerate(trained_whole()):
        one, other = state_of(first.segments[number]), state_of(second.segments[number])
        assert torch.equal(one["w"], whole["w"])
        assert torch.equal(other["v"], whole["v"])
        assert torch.equal(one[SENT], other[RECEIVED]), "both ends of a link have one hash"
        assert torch.equal(other[SENT], one[RECEIVED])
        assert not torch.equal(one[SENT], one[RECEIVED])
        for done, state in ((first.segments[number], one), (second.segments[number], other)):
            assert done.tape is not None
            assert bytes(state[TAPE].tolist()) == blob_id(manifest_of([done.tape.read_bytes()]))
            assert checkpoint.state_root(state) == done.out_root
    assert [step for step, _ in first.steps] == [step for step, _ in second.steps] == list(range(STEPS))
    assert len(net.sent) == 4 * STEPS
    assert net.again == 0


async def test_a_unit_is_checked_alone_from_its_tapes(workshop: Workshop, pair: tuple[Unit, Unit]) -> None:
    heard = await run_pair(workshop, pair, MemoryNet())
    for unit, ran in zip(pair, heard, strict=True):
        checker = Heard()
        tapes = tuple(done.tape for done in ran.segments[1:] if done.tape is not None)
        base = ran.segments[0].checkpoint
        await run(workshop, unit, None, checker, work_id="check", first_segment=1, base=base, tapes=tapes)
        assert [(d.in_root, d.out_root) for d in checker.segments] == [
            (d.in_root, d.out_root) for d in ran.segments[1:]
        ]
        assert all(done.tape is None for done in checker.segments)


async def test_a_check_refuses_a_tape_that_lacks_an_entry(workshop: Workshop, tmp_path: Path) -> None:
    mine = run_threads([made_unit(tmp_path, stage_of(number)) for number in range(2)])[1]
    (tmp_path / "base").write_bytes(mine.base(1))
    (tmp_path / "tape").write_bytes(bytes(mine.wire.tapes[1])[:-1])
    with pytest.raises(WorkFailed) as failed:
        await run(
            workshop, mine.unit, None, Heard(), first_segment=1, last_segment=2, base=tmp_path / "base",
            tapes=(tmp_path / "tape",),
        )  # fmt: skip
    assert failed.value.code == "bad-tape", failed.value


async def test_a_unit_killed_in_a_segment_starts_again_from_its_tape(
    workshop: Workshop, pair: tuple[Unit, Unit], tmp_path: Path
) -> None:
    expected = run_threads(list(pair))
    net, first, killed, second = MemoryNet(), Heard(), Heard(), Heard()
    with trio.fail_after(240):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, workshop, pair[0], net, first)
            with trio.CancelScope() as life:
                order = pair[1].order

                def step(number: int, loss: float | None) -> None:
                    killed.step(number, loss)
                    if number == 2:  # the first of segment 1
                        life.cancel()

                await workshop.run(order, on_step=step, on_segment=killed.segment, port=net)
            assert len(killed.segments) == 1
            assert not await workshop.suspend(order.work_id), "a unit is never suspended"
            tape = tmp_path / "tapes" / f"{order.work_id}-1.tape"
            fed = keys_on_tape(order, 1)
            assert {key.step for key in fed} >= {2}
            with tape.open("ab") as file:
                file.write(b"\x20\x00\x00\x00 torn")
            assert keys_on_tape(order, 1) == fed
            asked = len(net.asked)
            await run(workshop, pair[1], net, second, first_segment=1, base=killed.segments[0].checkpoint)
            assert not set(net.asked[asked:]) & set(fed), "what is on the tape is asked of nobody again"
    assert net.again >= 2, "what it sent twice was dropped"
    roots = [done.out_root for done in [*killed.segments, *second.segments]]
    assert roots == [result.out_root for result in expected[1].results]
    assert [done.out_root for done in first.segments] == [result.out_root for result in expected[0].results]
    for done, whole in zip([*killed.segments, *second.segments], expected[1].wire.tapes, strict=True):
        assert done.tape is not None
        assert done.tape.read_bytes() == whole


async def test_a_neighbours_bad_payload_ends_the_work_and_names_it(workshop: Workshop, pair: tuple[Unit, Unit]) -> None:
    async def short(key: PayloadKey, payload: bytes) -> bytes:
        return payload[:-4]

    net = MemoryNet(meddle=short)
    for key in (received_key(pair[1].stage, crossing, 0) for crossing in pair[1].stage.receives):
        await net.send(key, (1,), bytes(32))
    with trio.fail_after(120), pytest.raises(WorkFailed) as failed:
        await run(workshop, pair[1], net, Heard())
    assert failed.value.code == "bad-payload", failed.value
    assert "unit 0" in str(failed.value) and failed.value.unit == 0


@pytest.mark.parametrize("how", ["neither", "both", "no folder", "an ordinary task"])
async def test_an_order_that_is_neither_a_run_nor_a_check_is_refused(
    workshop: Workshop, pair: tuple[Unit, Unit], how: str, tmp_path: Path
) -> None:
    tape = tmp_path / "tape"
    tape.write_bytes(b"")
    changed: dict[str, Any] = {"neither": {}, "both": {"tapes": (tape,) * 3}, "no folder": {"tape_folder": None}}.get(
        how, {"task": encode(msgspec.structs.replace(pair[0].task, stage=None))}
    )
    with pytest.raises(LocalProtocolError):
        await run(workshop, pair[0], None if how == "neither" else MemoryNet(), Heard(), **changed)
