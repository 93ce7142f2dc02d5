"""Units of a parallel job in real sandboxes: two that train as the whole does, and checks from their tapes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

import peer.workshop
from peer.work_order import SegmentDone, WorkDone
from peer.workshop import Workshop
from protocol.blob import blob_id, manifest_of
from protocol.stage import RECEIVED, SENT, TAPE
from tests.unit_scene import (
    STEPS,
    Heard,
    MemoryNet,
    Unit,
    data,
    first_state,
    made_unit,
    stage_of,
    task_of,
    whole_program,
)
from worker import checkpoint
from worker.sandbox import SandboxReport, probe
from worker.training import run_segments


@pytest.fixture(scope="module")
def report() -> SandboxReport:
    return trio.run(probe)


@pytest.fixture
async def workshop(report: SandboxReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Workshop]:
    async def proven() -> SandboxReport:
        return report

    monkeypatch.setattr(peer.workshop, "probe", proven)
    async with Workshop(tmp_path / "scratch") as open_workshop:
        yield open_workshop
    assert not list((tmp_path / "scratch").glob("*.part")), "no half checkpoint is left"


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
