"""From `pause` to memory free: how long an owner waits for a machine on which the demo's model is being trained.

Run `python benchmarks/pause.py [--pairs N]`. Each pair trains examples/char_gpt twice in a real cage until a few
steps are done. One worker is then suspended: it ends its step, hands over its state, and is proven dead. The other is
the baseline of the same run: SIGKILL and the same proof of death, with nothing kept. Both are timed from the request
to the proof; `keep_ms` is what the daemon needs afterwards to check the state and put it on the disk for good. Memory
is what was resident in the cage's processes just before, pages they share counted in each. The last line is JSON.
On a GPU the same death frees the memory there; no machine with one was at hand, so that is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import trio

from peer.lan import descendants
from peer.suspension import SuspendedStates
from peer.workshop import WorkDone, WorkOrder, Workshop
from protocol.codec import encode
from protocol.program import program_id
from protocol.task import TaskSpec
from worker.prepare import prepare

ROOT = Path(__file__).resolve().parent.parent
STEPS_BEFORE = 3  # steps done when it is paused: the worker is in the middle of its segment
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Ended:
    """How one worker ended. milliseconds: from the request to its proven death; bytes: resident before."""

    milliseconds: float
    resident_bytes: int
    done: WorkDone | None


def resident_bytes() -> int:
    """Memory resident in all processes below this one."""
    pages = 0
    for pid, _ in descendants([os.getpid()]):
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return pages * PAGE


async def end_one(workshop: Workshop, order: WorkOrder, *, suspend: bool) -> Ended:
    """Train until STEPS_BEFORE steps are done, then end the worker one way or the other."""
    reached, done = trio.Event(), list[WorkDone]()
    scope = trio.CancelScope()

    def on_step(step: int, _: float | None) -> None:
        if step + 1 >= STEPS_BEFORE:
            reached.set()

    async def no_segment(_: object) -> None:
        raise AssertionError("the segment is longer than this bench")

    async def run(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        with scope:
            done.append(await workshop.run(order, on_step=on_step, on_segment=no_segment))

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        await reached.wait()
        held = resident_bytes()
        began = trio.current_time()
        if suspend:
            assert await workshop.suspend(order.work_id)
        else:
            scope.cancel()
    return Ended(1000 * (trio.current_time() - began), held, done[0] if done else None)


def order_in(folder: Path) -> tuple[WorkOrder, TaskSpec]:
    """The demo's model as one order, its segment longer than any bench."""
    made = prepare(ROOT / "examples" / "char_gpt" / "job.toml", bytes(32))
    (folder / "program").write_bytes(made.program)
    for array in made.arrays:
        (folder / array.name).write_bytes(array.data)
    task = made.make_task(program=program_id(made.program), arrays={a.name: bytes(32) for a in made.arrays})
    task = msgspec.structs.replace(task, steps=1_000_000, steps_per_segment=1_000_000)
    order = WorkOrder(
        work_id="bench", task=encode(task), program=folder / "program",
        arrays={a.name: folder / a.name for a in made.arrays}, base=None, first_segment=0, last_segment=1, threads=1,
        memory_bytes=max(made.memory_bytes, 2 << 30), wall_seconds=600, checkpoint_bytes_max=2 * made.checkpoint_bytes,
    )  # fmt: skip
    return order, task


async def measure(pairs: int) -> dict[str, list[float]]:
    """Milliseconds and bytes of each pair."""
    found: dict[str, list[float]] = {name: [] for name in ("pause_ms", "kill_ms", "keep_ms", "freed", "state")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        order, task = order_in(folder)
        states = SuspendedStates(folder / "suspended")
        async with Workshop(folder / "scratch", pool=0) as workshop:
            for number in range(pairs):
                paused = await end_one(workshop, replace(order, work_id=f"pause-{number}"), suspend=True)
                assert paused.done is not None and paused.done.suspended is not None, "it was suspended"
                began = trio.current_time()
                await trio.to_thread.run_sync(states.keep, bytes(32), task, order.program, paused.done.suspended)
                found["keep_ms"].append(1000 * (trio.current_time() - began))
                killed = await end_one(workshop, replace(order, work_id=f"kill-{number}"), suspend=False)
                found["pause_ms"].append(paused.milliseconds)
                found["kill_ms"].append(killed.milliseconds)
                found["freed"].append(paused.resident_bytes - resident_bytes())
                found["state"].append(paused.done.suspended.state_bytes)
    return found


def main() -> None:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    found = trio.run(measure, options.pairs)
    middle = {name: statistics.median(values) for name, values in found.items()}
    print(
        f"{options.pairs} pairs: free {middle['pause_ms']:.0f} ms after pause (at most {max(found['pause_ms']):.0f}), "
        f"{middle['kill_ms']:.0f} ms after SIGKILL; {middle['freed'] / 2**20:.0f} MiB freed, "
        f"a state of {middle['state'] / 2**20:.1f} MiB kept in {middle['keep_ms']:.0f} ms more"
    )
    print(
        json.dumps(
            {
                "benchmark": "pause",
                "schema": "ichiba.benchmark.pause/1",
                "machine": {
                    "processor": platform.machine(),
                    "cores": os.cpu_count(),
                    "python": platform.python_version(),
                    "load_before": round(load_before, 2),
                },
                "pairs": options.pairs,
                "pause_ms_p50": round(middle["pause_ms"], 1),
                "pause_ms_max": round(max(found["pause_ms"]), 1),
                "kill_ms_p50": round(middle["kill_ms"], 1),
                "keep_ms_p50": round(middle["keep_ms"], 1),
                "freed_bytes": int(middle["freed"]),
                "state_bytes": int(middle["state"]),
            }
        )
    )


if __name__ == "__main__":
    main()
