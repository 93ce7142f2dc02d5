"""Work suspended in the middle of a segment goes on with the same bits: in one process, and through real sandboxes."""

from __future__ import annotations

import fcntl
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import trio
import trio.testing
from torch import nn

from peer.blobs import BlobStore
from peer.effects import Performer
from peer.events import Input, Release, SegmentMade, StartWork, StepMade, StopWork, Suspend, WorkEnded
from peer.suspension import SuspendedStates
from peer.unit_work import UnitRunner
from peer.workshop import WorkFailed, WorkOrder, Workshop
from protocol.codec import encode
from protocol.errors import MalformedRecord, VerificationFailed
from protocol.program import Program, state_layout
from protocol.task import ArrayRef, BatchRule, TaskSpec
from tests.test_training import gpt_task, task_of, whole
from worker import checkpoint
from worker.cage import Cage
from worker.capture import Training, capture_built
from worker.frames import Partial
from worker.training import Partial as Stand
from worker.training import SegmentResult, run_segments
from worker.training import Suspended as Stopped

SEND, RECEIVE = Cage.send, Cage.receive
WORK = b"w" * 32
STEPS = 300  # of a segment: more than a worker can be ahead of a test that asks it to stop (see `asking_early`)


# --- one process -------------------------------------------------------------------------------------------
def stop_before(task: TaskSpec, program: Program, arrays: dict[str, bytes], step: int) -> tuple[Stopped, list[float]]:
    """Run from the start until just before `step`; what was handed over and the losses of its segment so far."""
    losses: dict[int, float] = {}
    with pytest.raises(Stopped) as stopped:
        whole(task, program, arrays, on_step=losses.__setitem__, stop=lambda: len(losses) == step)
    assert stopped.value.step == step
    first = task.steps_of(stopped.value.segment).start
    return stopped.value, [losses[i] for i in range(first, step)]


def go_on(
    task: TaskSpec, program: Program, arrays: dict[str, bytes], stopped: Stopped, **changes: Any
) -> list[SegmentResult]:
    root = checkpoint.state_root(checkpoint.load(stopped.state, state_layout(program)))
    stand = Stand(**{"step": stopped.step, "in_root": stopped.in_root, "root": root, **changes})
    rest = range(stopped.segment, task.segments)
    return list(
        run_segments(task=task, program=program, arrays=arrays, base=stopped.state, segments=rest, partial=stand)
    )


@pytest.mark.parametrize("step", [0, 1, 3, 4, 6, 9])
def test_adamw_with_dropout_goes_on_with_the_same_bits_from_any_step(step: int) -> None:
    task, program, arrays = gpt_task(mode="exact")
    straight = uninterrupted(task, program, arrays)
    stopped, losses = stop_before(task, program, arrays, step)
    resumed = go_on(task, program, arrays, stopped)
    expected = straight[stopped.segment :]
    assert resumed[1:] == expected[1:]
    assert (*losses, *resumed[0].losses) == expected[0].losses
    for name in ("in_root", "out_root", "checkpoint", "operations", "first_step", "last_step", "diverged_step"):
        assert getattr(resumed[0], name) == getattr(expected[0], name), name


_STRAIGHT: list[list[SegmentResult]] = []


def uninterrupted(task: TaskSpec, program: Program, arrays: dict[str, bytes]) -> list[SegmentResult]:
    """The run of `gpt_task(mode="exact")` without a pause, once for the module."""
    if not _STRAIGHT:
        _STRAIGHT.append(whole(task, program, arrays))
    return _STRAIGHT[0]


def test_the_optimizer_and_the_step_number_matter_to_those_bits() -> None:
    """So that the test above can fail: weights alone, or another step number, give other roots."""
    task, program, arrays = gpt_task(mode="exact")
    straight = uninterrupted(task, program, arrays)[1].out_root
    stopped, _ = stop_before(task, program, arrays, 6)
    assert go_on(task, program, arrays, stopped, step=7)[0].out_root != straight
    state = checkpoint.load(stopped.state, state_layout(program))
    moment = next(name for name, tensor in state.items() if name.startswith("optimizer.square") and tensor.any())
    stopped.state = checkpoint.dump(state | {moment: torch.zeros_like(state[moment])})
    assert go_on(task, program, arrays, stopped)[0].out_root != straight


def test_a_damaged_state_or_a_step_elsewhere_is_refused() -> None:
    task, program, arrays = gpt_task(mode="exact")
    stopped, _ = stop_before(task, program, arrays, 6)
    with pytest.raises(VerificationFailed, match="not the one that was kept"):
        go_on(task, program, arrays, stopped, root=bytes(32))
    with pytest.raises(MalformedRecord, match="can go on"):
        go_on(task, program, arrays, stopped, step=3)
    stopped.state = stopped.state[:-4]
    with pytest.raises(MalformedRecord):
        run = run_segments(
            task=task, program=program, arrays=arrays, base=stopped.state, segments=range(1, 3),
            partial=Stand(6, bytes(32), bytes(32)),
        )  # fmt: skip
        list(run)


def test_a_demonstrated_fraud_is_never_suspended() -> None:
    task, program, arrays = gpt_task()
    assert len(whole(task, program, arrays, cheat="skip-step", stop=lambda: True)) == task.segments


# --- real workers ------------------------------------------------------------------------------------------
def small() -> Training:
    """AdamW and dropout in steps of a millisecond."""
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    return Training(
        model, lambda out, y: ((out - y) ** 2).mean(), optimizer, {"x": torch.zeros(4, 2), "y": torch.zeros(4, 1)}
    )


@cache
def small_task() -> tuple[TaskSpec, Program, dict[str, bytes], SegmentResult]:
    """Two segments; the first one's result without a pause."""
    program = capture_built(small).program
    x = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    arrays = {"x": x, "y": x[:, :1].copy()}
    task, data = task_of(
        program, arrays, BatchRule("rows", 4, 0), mode="exact", steps=STEPS + 4, steps_per_segment=STEPS
    )
    (result,) = whole(task, program, data, segments=range(1))
    return task, program, data, result


def asking_early(monkeypatch: pytest.MonkeyPatch, ask: Any) -> None:
    """Await `ask` when the first bytes of steps have come.

    The pipe of the replies is made so small that the worker cannot be done by then, however late this process is:
    it holds 4 KiB and a Step takes 20 bytes or more, so a worker is at most 210 steps ahead.
    """
    asked = False

    async def send(cage: Cage, *request: Any) -> None:
        fcntl.fcntl(cage._replies.fileno(), fcntl.F_SETPIPE_SZ, 4096)
        await SEND(cage, *request)

    async def receive(cage: Cage) -> bytes:
        nonlocal asked
        if asked or not cage.sent:
            return await RECEIVE(cage)
        asked = True
        data = bytes(await cage._replies.receive_some(64))
        await ask()
        return data

    monkeypatch.setattr(Cage, "send", send)
    monkeypatch.setattr(Cage, "receive", receive)


def order_in(folder: Path, task: TaskSpec, program: Program, arrays: dict[str, bytes]) -> WorkOrder:
    for name, data in {"program": program.to_bytes(), **arrays}.items():
        (folder / name).write_bytes(data)
    return WorkOrder(
        work_id="job-1", task=encode(task), program=folder / "program", arrays={n: folder / n for n in arrays},
        base=None, first_segment=0, last_segment=1, threads=1, memory_bytes=1 << 30, wall_seconds=100,
        checkpoint_bytes_max=65536,
    )  # fmt: skip


async def test_a_suspended_worker_dies_and_another_goes_on_with_the_same_bits(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, program, arrays, straight = small_task()
    order = order_in(tmp_path, task, program, arrays)
    told: list[int] = []
    made: list[Any] = []

    async def on_segment(done: Any) -> None:
        made.append(done)

    assert not await workshop.suspend("job-1"), "nobody works on it yet"

    async def ask() -> None:
        cage, _ = workshop._talks["job-1"]
        with trio.fail_after(60):
            assert await cage._job.recv(1) == b"", "the worker can say nothing through the socket that stays open"
        assert await workshop.suspend("job-1")

    asking_early(monkeypatch, ask)
    done = await workshop.run(order, on_step=lambda step, _: told.append(step), on_segment=on_segment)
    stood = done.suspended
    assert stood is not None
    assert 0 < stood.step < STEPS
    assert told == list(range(stood.step))
    assert not made
    state = stood.state.read_bytes()
    assert len(state) == stood.state_bytes
    root = checkpoint.state_root(checkpoint.load(state, state_layout(program)))
    fields = {name: getattr(order, name) for name in order.__dataclass_fields__} | {"base": stood.state}
    await workshop.run(
        WorkOrder(**fields), on_step=lambda step, _: told.append(step), on_segment=on_segment,
        partial=Partial(stood.step, stood.in_root, root), losses=stood.losses,
    )  # fmt: skip
    assert told == list(range(STEPS))
    (segment,) = made
    assert (segment.in_root, segment.out_root) == (straight.in_root, straight.out_root)
    assert segment.losses == straight.losses
    assert segment.checkpoint.read_bytes() == straight.checkpoint
    with pytest.raises(WorkFailed) as failed:
        await workshop.run(
            WorkOrder(**fields), on_step=lambda *_: None, on_segment=on_segment,
            partial=Partial(stood.step, stood.in_root, bytes(32)), losses=stood.losses,
        )  # fmt: skip
    assert failed.value.code == "bad-data"


async def test_an_emptied_pool_leaves_no_worker(workshop: Workshop) -> None:
    workshop.prewarm()
    with trio.fail_after(120):
        await workshop.empty()  # one that is still on its way
    workshop.prewarm()
    (slot,) = workshop._slots
    with trio.fail_after(120):
        await slot.ready.wait()
    assert slot.cage is not None
    process = slot.cage.process
    await workshop.empty()
    assert process.poll() is not None
    assert not workshop._slots


# --- the daemon's side: effects ----------------------------------------------------------------------------
class Machine:
    """A Performer with a real workshop, and the inputs it gave the node."""

    def __init__(self, folder: Path, workshop: Workshop, nursery: trio.Nursery) -> None:
        send, self.inputs = trio.open_memory_channel[Input](10 * STEPS)
        self.blobs = BlobStore(folder / "blobs", 1 << 30)
        states = SuspendedStates(folder / "suspended")
        units = UnitRunner(None, self.blobs, send, folder / "tapes")  # type: ignore[arg-type]
        self.performer = Performer(None, self.blobs, workshop, nursery, send, states, units)  # type: ignore[arg-type]

    async def begin(self, work: bytes = WORK) -> StartWork:
        """The first segment of the small task is to be worked on."""
        task, program, arrays, _ = small_task()
        blobs = {name: await self.blobs.put_bytes(data) for name, data in arrays.items()}
        refs = tuple(ArrayRef(a.name, a.dtype, a.shape, blobs[a.name], a.size_bytes) for a in task.arrays)
        task = msgspec.structs.replace(task, arrays=refs, program=await self.blobs.put_bytes(program.to_bytes()))
        return StartWork(
            work=work, task=task, base=b"", first_segment=0, last_segment=1, checkpoint_bytes=1 << 20,
            memory_bytes=1 << 30,
        )  # fmt: skip

    async def suspend(self, within_ms: int) -> dict[str, Any]:
        self.performer.perform(Suspend(within_ms))
        return await self.performer.suspended()

    async def until_ended(self) -> tuple[list[int], list[SegmentMade], str]:
        """Steps and segments told until the work ended, and its error."""
        told, made = [], []
        while True:
            match await self.inputs.receive():
                case StepMade(step=step):
                    told.append(step)
                case SegmentMade() as segment:
                    made.append(segment)
                case WorkEnded(error=error):
                    return told, made, error
                case other:
                    raise AssertionError(other)


async def test_a_daemon_killed_while_paused_goes_on_from_the_kept_state(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = small_task()[3]
    async with trio.open_nursery() as nursery:
        first = Machine(tmp_path, workshop, nursery)
        order = await first.begin()
        reports: list[dict[str, Any]] = []

        async def pause() -> None:
            first.performer.perform(Suspend(60_000))

        asking_early(monkeypatch, pause)
        workshop.prewarm()
        first.performer.perform(order)
        while not first.performer.suspension:
            await first.inputs.receive()
        reports.append(await first.performer.suspended())
        fate = reports[0]["fates"][WORK.hex()]
        assert fate["fate"] == "kept", fate
        assert fate["segment"] == 0
        assert 0 < fate["step"] < STEPS
        assert not first.performer.working
        assert workshop.warm == 0
        nursery.cancel_scope.cancel()  # all that was in memory is gone

    async with trio.open_nursery() as nursery:
        second = Machine(tmp_path, workshop, nursery)
        second.performer.perform(order)
        told, (segment,), error = await second.until_ended()
        assert not error
        assert told == list(range(fate["step"], STEPS)), "no step is done twice"
        assert (segment.in_root, segment.out_root) == (straight.in_root, straight.out_root)
        assert segment.losses == straight.losses
        assert second.blobs.path(segment.checkpoint).read_bytes() == straight.checkpoint
        assert list((tmp_path / "suspended").iterdir()) == [], "a finished segment needs no kept state"
        nursery.cancel_scope.cancel()


async def test_a_worker_that_gets_no_time_is_killed_and_its_segment_starts_again(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trio.open_nursery() as nursery:
        machine = Machine(tmp_path, workshop, nursery)

        async def pause() -> None:
            machine.performer.perform(Suspend(0))

        asking_early(monkeypatch, pause)
        machine.performer.perform(order := await machine.begin())
        while not machine.performer.suspension:
            await machine.inputs.receive()
        report = await machine.performer.suspended()
        assert report["fates"][WORK.hex()]["fate"] == "restarts"
        assert not machine.performer.working
        machine.performer.perform(order)
        told, (segment,), error = await machine.until_ended()
        assert (error, segment.out_root) == ("", small_task()[3].out_root)
        assert told[-STEPS:] == list(range(STEPS))
        nursery.cancel_scope.cancel()


async def test_a_worker_that_never_answers_is_killed_when_the_time_is_over(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trio.open_nursery() as nursery:
        machine = Machine(tmp_path, workshop, nursery)
        handed_over = trio.Event()

        async def send(cage: Cage, *_: Any) -> None:
            cage.sent = True  # the job never reaches the worker: it waits for it, and hears nothing else
            handed_over.set()

        monkeypatch.setattr(Cage, "send", send)
        machine.performer.perform(await machine.begin())
        await handed_over.wait()
        report = await machine.suspend(50)
        assert report["fates"][WORK.hex()] == {
            "fate": "restarts",
            "why": "its worker did not hand over its state in 0.05 s",
        }
        assert not machine.performer.working
        nursery.cancel_scope.cancel()


async def test_work_wanted_back_before_its_suspension_is_over_goes_on_then(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trio.open_nursery() as nursery:
        machine = Machine(tmp_path, workshop, nursery)
        order = await machine.begin()

        async def pause_and_resume() -> None:
            machine.performer.perform(Suspend(60_000))
            await trio.testing.wait_all_tasks_blocked()
            machine.performer.perform(order)

        asking_early(monkeypatch, pause_and_resume)
        machine.performer.perform(order)
        told, (segment,), error = await machine.until_ended()
        assert (error, segment.out_root) == ("", small_task()[3].out_root)
        assert told == list(range(STEPS))
        nursery.cancel_scope.cancel()


async def test_pausing_without_work_frees_the_pool_and_says_so(workshop: Workshop, tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        machine = Machine(tmp_path, workshop, nursery)
        assert (await machine.performer.suspended())["fates"] == {}
        report = await machine.suspend(1000)
        assert report["fates"] == {}
        machine.performer.perform(StopWork(WORK))  # a deal may end while nothing of it runs
        nursery.cancel_scope.cancel()


async def test_the_state_of_a_deal_that_ended_is_removed(workshop: Workshop, tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        machine = Machine(tmp_path, workshop, nursery)
        for name in (f"{WORK.hex()}.record", f"{WORK.hex()}.safetensors"):
            (tmp_path / "suspended" / name).touch()
        machine.performer.perform(Release(WORK))
        assert list((tmp_path / "suspended").iterdir()) == []
        nursery.cancel_scope.cancel()
