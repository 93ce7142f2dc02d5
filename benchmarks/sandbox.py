"""Warm workers: how soon a job starts, how fast its data arrives, how surely it ends. Prints one JSON line last.

    python benchmarks/sandbox.py [--rounds 9] [--size-mb 256]

start: from `Workshop.run` to the first step told, less the median time of the later steps, so what is left is the
hand-over, the graph filter, reading the task and program, the first state, and all that only a first step does. The
baseline is the same job in a worker that is started for it. tensors_in: bytes per second that a child process has
read once, as an array, from the hand-over on: by a sealed memfd that the parent fills, or as it is done, by a file of
the store that the child maps; the baselines are a socket pair and a pipe. deadline: from `run` to its
error, of a job of a million steps with a deadline of 1 s. death: from the kill to the proof that the worker and a
grandchild in a session of its own are dead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_WRITE, fcntl
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import trio

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # a script's own folder comes first there, and this file would be taken for the package

from peer.workshop import SegmentDone, WorkFailed, WorkOrder, Workshop  # noqa: E402
from protocol.codec import encode  # noqa: E402
from protocol.program import program_id  # noqa: E402
from protocol.task import TaskSpec  # noqa: E402
from worker.cage import Cage, Level  # noqa: E402
from worker.frames import Attempted, Frames, Ready, Rehearsal  # noqa: E402
from worker.prepare import prepare  # noqa: E402
from worker.seccomp import Tier  # noqa: E402

STEPS = 6
MIB = 1024 * 1024


def processor() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def summary(values: list[float], digits: int = 1) -> dict[str, float]:
    """Median, least and most, in the unit of the values."""
    found = {"p50": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def demo_order(folder: Path) -> WorkOrder:
    """A segment of STEPS steps of the demo's character GPT."""
    prepared = prepare(ROOT / "examples" / "char_gpt", bytes(32))
    (folder / "program").write_bytes(prepared.program)
    paths = {}
    for item in prepared.arrays:
        paths[item.name] = folder / f"array-{item.name}"
        paths[item.name].write_bytes(item.data)
    task = prepared.make_task(program=program_id(prepared.program), arrays=dict.fromkeys(paths, bytes(32)))
    task = msgspec.structs.replace(task, steps=STEPS, steps_per_segment=STEPS)
    return WorkOrder(
        work_id="bench", task=encode(task), program=folder / "program", arrays=paths, base=None, first_segment=0,
        last_segment=1, threads=1, memory_bytes=prepared.memory_bytes, wall_seconds=120,
        checkpoint_bytes_max=prepared.checkpoint_bytes,
    )  # fmt: skip


class Heard:
    """When each step of a job was told, in seconds since `start`."""

    def __init__(self) -> None:
        self.start, self.times = time.perf_counter(), list[float]()

    def step(self, step: int, loss: float | None) -> None:
        self.times.append(time.perf_counter() - self.start)

    async def segment(self, done: SegmentDone) -> None:
        done.checkpoint.unlink()

    @property
    def step_ms(self) -> float:
        return statistics.median(b - a for a, b in zip(self.times, self.times[1:], strict=False)) * 1e3

    @property
    def start_ms(self) -> float:
        return self.times[0] * 1e3 - self.step_ms


async def warm(workshop: Workshop) -> None:
    """Wait until a worker of the pool is warm."""
    workshop.prewarm()
    while not workshop.warm:  # noqa: ASYNC110  # it has no event, for nobody else waits for it
        await trio.sleep(0.01)


async def starts(workshop: Workshop, order: WorkOrder, rounds: int) -> dict[str, Any]:
    """Milliseconds from the pool and, as pairs in one run, in a worker started for the job."""
    found: dict[str, list[float]] = {"pool": [], "pool_in_steps": [], "pool_first_step": [], "cold": [], "step": []}
    for number in range(rounds):
        for kind in ("pool", "cold") if number < max(2, rounds // 3) else ("pool",):
            if kind == "pool":
                await warm(workshop)
            heard = Heard()
            await workshop.run(order, on_step=heard.step, on_segment=heard.segment)
            found[kind].append(heard.start_ms)
            if kind == "pool":
                found["pool_in_steps"].append(heard.start_ms / heard.step_ms)  # a loaded machine slows both alike
                found["pool_first_step"].append(heard.times[0] * 1e3)
                found["step"].append(heard.step_ms)
    return {name: summary(values, 2 if "steps" in name else 1) for name, values in found.items()}


async def deadlines(workshop: Workshop, order: WorkOrder, rounds: int) -> dict[str, float]:
    """Seconds until a job of a million steps with a deadline of 1 s has ended in its error."""
    task = msgspec.msgpack.decode(order.task, type=TaskSpec)
    endless = replace(
        order,
        task=encode(msgspec.structs.replace(task, steps=10**6, steps_per_segment=10**6)),
        wall_seconds=1.0,
    )
    took = []
    for _ in range(rounds):
        await warm(workshop)
        heard = Heard()
        try:
            await workshop.run(endless, on_step=heard.step, on_segment=heard.segment)
        except WorkFailed as failure:
            assert failure.code == "deadline", failure
        took.append(time.perf_counter() - heard.start)
    return summary(took, 3)


async def deaths(level: Level, rounds: int) -> dict[str, float]:
    """Milliseconds from the kill of a worker with a grandchild to the proof that all are dead."""
    took = []
    for _ in range(rounds):
        cage = await Cage.start(level, tier=Tier.BASE, torch=False)
        frames, left = Frames(), False
        while not left:
            for reply in frames.feed(await cage.receive()):
                if isinstance(reply, Ready):
                    decoys: dict[str, str | int] = {"speak": "", "then": "hang"}
                    await cage.send(Rehearsal(attempts=("leave-grandchild", "speak"), decoys=decoys))
                left = left or isinstance(reply, Attempted)
        start = time.perf_counter()
        await cage.kill()
        took.append((time.perf_counter() - start) * 1e3)
    return summary(took)


CHILD = """
import mmap, os, socket, sys
import numpy
kind, size, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
channel = socket.socket(fileno=number)
channel.send(b"r")
if kind in ("memfd", "file"):
    _, (lent,), _, _ = socket.recv_fds(channel, 1, 1)
    taken = mmap.mmap(lent, size, prot=mmap.PROT_READ)
else:
    taken = bytearray(size)
    view = memoryview(taken)
    source = os.fdopen(int(sys.argv[4]), "rb", buffering=0) if kind == "pipe" else None
    while view:
        view = view[(source.readinto(view) if source else channel.recv_into(view)):]
channel.send(int(numpy.frombuffer(taken, dtype="<u8").sum()).to_bytes(8, "little"))
"""


def hand_over(kind: str, data: bytes, folder: Path) -> float:
    """MB/s at which a child process has taken a copy of `data` by way of `kind`, the daemon's part included."""
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    passed = (theirs.fileno(), reader)
    child = subprocess.Popen([sys.executable, "-c", CHILD, kind, str(len(data)), *map(str, passed)], pass_fds=passed)
    theirs.close()
    os.close(reader)
    path = folder / "lent"
    if kind == "file":  # a blob of the store is there before the job
        path.write_bytes(data)
    with ours:
        assert ours.recv(1) == b"r"
        start = time.perf_counter()
        if kind in ("memfd", "file"):
            lent = _sealed(data) if kind == "memfd" else os.open(path, os.O_RDONLY)
            socket.send_fds(ours, [b"x"], [lent])
            os.close(lent)
        elif kind == "pipe":
            _write_all(lambda part: os.write(writer, part), data)
        else:
            _write_all(ours.send, data)
        summed = int.from_bytes(ours.recv(8), "little")
        took = time.perf_counter() - start
    os.close(writer)
    child.wait()
    assert summed == int(np.frombuffer(data, dtype="<u8").sum()), "every byte arrived"
    return len(data) / 1e6 / took


def _sealed(data: bytes) -> int:
    number = os.memfd_create("tensors", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    _write_all(lambda part: os.write(number, part), data)
    fcntl(number, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
    return number


def _write_all(write: Callable[[memoryview], int], data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[write(left) :]


async def measure(rounds: int, folder: Path) -> dict[str, Any]:
    """All that needs a workshop."""
    order = demo_order(folder)
    async with Workshop(folder / "scratch", pool=1) as workshop:
        level = workshop.report.level
        return {
            "level": level.name,
            "prove_s": round(workshop.report.seconds, 2),
            "start_ms": await starts(workshop, order, rounds),
            "deadline_s": await deadlines(workshop, order, max(3, rounds // 3)),
            "death_ms": await deaths(level, rounds),
        }


def main() -> None:
    """Measure, and print what was measured on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size-mb", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ichiba-bench-") as name:
        folder = Path(name)
        data = os.urandom(MIB) * options.size_mb
        kinds = ("file", "memfd", "socketpair", "pipe")
        rates = {kind: [] for kind in kinds}
        for _ in range(max(3, options.rounds // 3)):
            for kind in kinds:
                rates[kind].append(hand_over(kind, data, folder))
        found = trio.run(measure, options.rounds, folder)
    print(
        json.dumps(
            {
                "benchmark": "sandbox",
                "machine": {"processor": processor(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)},
                **found,
                "tensors_in_mb_s": {kind: summary(values, 0) for kind, values in rates.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
