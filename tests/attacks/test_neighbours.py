"""What one hostile worker does to the others, to the daemon, and to the machine after its death: nothing."""

from __future__ import annotations

import os
import resource
import select
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from peer.workshop import WorkFailed, WorkOrder, Workshop
from protocol import params
from tests.attacks.harness import MEMORY_BYTES, START, hostile_code
from tests.test_workshop import Heard, changed, order, retasked
from worker.cage import Cage, CageFailed, Level
from worker.frames import Attempted, Frames, Ready, Rehearsal
from worker.seccomp import Tier

__all__ = ["order"]  # a fixture

MARK = f"kin{os.getpid()}"


@pytest.fixture
def hostile() -> Iterator[None]:
    with hostile_code():
        yield


@pytest.fixture
def scripts(workshop: Workshop) -> Level:
    """The level, where scripts run: graphs start no process."""
    if workshop.report.level < Level.CONTAINED:
        pytest.skip(f"{workshop.report.level.name} runs no scripts, and graphs start no process")
    return workshop.report.level


async def holding(stack: AsyncExitStack, level: Level, name: str) -> tuple[Cage, str]:
    """A script's worker in which bomb `name` has gone off, and its words. Dies with `stack`."""
    cage = await START(level, tier=Tier.BASE, torch=False, memory_bytes=MEMORY_BYTES)
    stack.push_async_callback(cage.kill)
    frames = Frames()
    decoys: dict[str, str | int] = {"memory": MEMORY_BYTES, "mark": MARK}
    while data := await cage.receive():
        for reply in frames.feed(data):
            if isinstance(reply, Ready):
                await cage.send(Rehearsal(attempts=(f"hold {name}",), decoys=decoys))
            elif isinstance(reply, Attempted):
                return cage, reply.detail
    raise AssertionError(f"{name} said nothing: {cage.log.tail()}")


def kin() -> list[int]:
    """Processes of this test's name, by their numbers outside."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == MARK:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


async def test_bombs_beside_it_change_nothing_in_an_honest_job(
    workshop: Workshop, order: WorkOrder, scripts: Level, hostile: None
) -> None:
    alone = Heard()
    await alone.run(workshop, order)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        for name in ("processes", "memory", "disk", "processor"):
            _, said[name] = await holding(stack, scripts, name)
        beside = Heard()
        await beside.run(workshop, changed(order, work_id="job-2"))
    assert said["memory"] == "a child ended with -9"
    assert said["disk"] == f"{params.SANDBOX_SCRATCH_BYTES >> 20} MiB"
    assert int(said["processes"].split()[0]) < params.SANDBOX_PROCESSES_MAX
    assert [s.out_root for s in beside.segments] == [s.out_root for s in alone.segments]
    assert beside.steps == alone.steps
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib
    assert grown_kib < 32 * 1024, f"the daemon took {grown_kib} KiB for others' bombs"


async def test_a_flood_of_log_takes_neither_the_daemons_memory_nor_the_time_of_others(
    workshop: Workshop, order: WorkOrder, hostile: None
) -> None:
    alone = Heard()
    await alone.run(workshop, order)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    beside, floods, done = Heard(), [], False

    async def flood() -> None:
        while not done or not floods:
            cage = await START(workshop.report.level, torch=False)
            try:
                await cage.receive()
                spoken: dict[str, str | int] = {"words": "", "then": "flood", "print": ""}
                await cage.send(Rehearsal(attempts=("speech",), decoys=spoken))
                with pytest.raises(CageFailed) as ended:
                    await cage.drain_log()
                floods.append((ended.value.code, len(cage.log.tail())))
            finally:
                await cage.kill()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        await beside.run(workshop, changed(order, work_id="job-2"))
        done = True
    assert set(floods) == {("log-flood", params.SANDBOX_LOG_KEPT_BYTES)}
    assert [s.out_root for s in beside.segments] == [s.out_root for s in alone.segments]
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib
    assert grown_kib < 32 * 1024, f"the daemon took {grown_kib} KiB for {len(floods)} floods of 16 MiB"


async def test_three_generations_die_with_their_worker_and_are_proven_dead(scripts: Level, hostile: None) -> None:
    async with AsyncExitStack() as stack:
        cage, _ = await holding(stack, scripts, "family")
        numbers = kin()
        living = [os.pidfd_open(number) for number in numbers]
        assert not select.select(living, [], [], 0)[0], "all live"
    dead = select.select(living, [], [], 0)[0]
    for number in living:
        os.close(number)
    assert len(numbers) == 4, "the worker and three generations, each in a session of its own"
    assert sorted(dead) == sorted(living), "none is left when kill returns"
    assert kin() == []
    assert cage.group is not None
    assert not cage.group.memory.exists()


async def test_a_real_job_past_its_deadline_ends_with_its_code_and_what_it_did_is_kept(
    workshop: Workshop, order: WorkOrder
) -> None:
    heard = Heard()
    endless = changed(retasked(order, steps=1_000_000, steps_per_segment=1000), last_segment=1000, wall_seconds=2.0)
    with pytest.raises(WorkFailed) as failed:
        await heard.run(workshop, endless)
    assert failed.value.code == "deadline", failed.value
    assert heard.steps[0][0] == 0
