"""What it costs a unit of a parallel job to ask for a tensor and to hand one over, in a real sandbox.

`python -m benchmarks.unit_exchange [--json]`: a unit that receives tensors, negates and sends them on, for some
sizes. The port answers at once, so all that is left is the worker's and the daemon's own work: frames, copies, hashes,
the tape. Processor time, of both, says what that is on a machine that others use too; wall time is the fastest step's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import trio

from peer.lan import descendants
from peer.work_order import SegmentDone, WorkOrder
from peer.workshop import Workshop
from protocol.codec import encode
from protocol.payload import PayloadKey
from protocol.program import Init, Input, Items, Node, Program, Ref, Update, operations_per_step, program_id
from protocol.stage import RECEIVED, SENT, TAPE, Codec, Crossing, Stage
from protocol.task import ArrayRef, BatchRule, Initial, Schedule, TaskSpec
from worker import checkpoint
from worker.executor import DTYPES

F32: Final = "float32"
SIZES: Final = (1024, 64 * 1024, 1024**2, 16 * 1024**2)
STEPS: Final = 30


class StaticPort:
    """Gives the same bytes for every key, and takes everything."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    async def want(self, key: PayloadKey) -> bytes:
        """The bytes."""
        return self.payload

    async def send(self, key: PayloadKey, others: tuple[int, ...], payload: bytes) -> None:
        """Nothing."""


def unit(elements: int, crossings: int) -> tuple[Program, Stage]:
    """Stage 1 of 3, which hands on `crossings` tensors a step, negated, and otherwise does nothing."""
    state: list[tuple[str, Any, tuple[int, ...]]] = [
        (RECEIVED, "uint8", (2, 32)), (SENT, "uint8", (2, 32)), (TAPE, "uint8", (32,)), ("w", F32, (4,)),
    ]  # fmt: skip
    inputs = [Input(name, "buffer", dtype, shape, Init.of("constant")) for name, dtype, shape in state]
    inputs += [Input(f"ichiba.in.forward.0.0.{i}", "batch", F32, (elements,), None) for i in range(crossings)]
    first = len(inputs)
    nodes = [Node("neg.default", (Ref(4 + i),), F32, (elements,), "") for i in range(crossings)]
    nodes.append(Node("sum.dim_IntList", (Ref(3), Items((0,)), False), F32, (), ""))
    updates = tuple(Update(name, number) for number, (name, _, _) in enumerate(state))
    stage = Stage(
        run=bytes(32), stage=1, stages=3, replica=0, replicas=1, micro_batches=1, forward=Codec("float32"),
        backward=Codec("float32"), sync="none", shared=Codec("float32"),
        sends=tuple(Crossing("forward", 0, 0, i, first + i) for i in range(crossings)),
        receives=tuple(Crossing("forward", 0, 0, i, 4 + i) for i in range(crossings)),
    )  # fmt: skip
    program = Program(tuple(inputs), (), tuple(nodes), updates, first + crossings)
    program.check()
    return program, stage


def order_of(folder: Path, name: str, program: Program, stage: Stage) -> WorkOrder:
    """The whole task of one unit, its inputs in `folder`."""
    import torch

    base = {item.name: torch.zeros(item.shape, dtype=DTYPES[item.dtype]) for item in program.inputs_of("buffer")}
    task = TaskSpec(
        network=bytes(32), program=program_id(program.to_bytes()), program_bytes=len(program.to_bytes()),
        arrays=(ArrayRef("x", F32, (4, 1), bytes(32), 16),), batch=BatchRule("rows", 1, 0),
        initial=Initial("state", bytes(32), checkpoint.state_root(base)), seed=1, steps=STEPS, steps_per_segment=STEPS,
        mode="exact", width=15, schedule=Schedule("constant", 1, 0, 0), name="exchange", stage=stage,
        operations_per_step=operations_per_step(program),
    )  # fmt: skip
    (folder / f"{name}.program").write_bytes(program.to_bytes())
    (folder / f"{name}.base").write_bytes(checkpoint.dump(base))
    return WorkOrder(
        work_id=name, task=encode(task), program=folder / f"{name}.program", arrays={}, base=folder / f"{name}.base",
        first_segment=0, last_segment=1, threads=1, memory_bytes=2 * 1024**3, wall_seconds=600,
        checkpoint_bytes_max=1 << 20, tape_folder=folder / "tapes",
    )  # fmt: skip


def children_seconds() -> float:
    """The processor time of all processes below this one."""
    ticks = 0
    for number, _ in descendants([os.getpid()]):
        try:
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def run_steps(workshop: Workshop, folder: Path, size: int, crossings: int) -> dict[str, float]:
    """Of one tensor in and out, in microseconds: the fastest step's share, and processor time of worker and daemon."""
    walls: list[float] = []
    worker: list[float] = []
    daemon: list[float] = []

    def heard(step: int, loss: float | None) -> None:
        walls.append(time.perf_counter())
        if step in (0, STEPS - 1):
            worker.append(children_seconds())
            daemon.append(time.process_time())

    async def take(done: SegmentDone) -> None:
        assert done.tape is not None, "a unit beside others has a tape"
        done.tape.unlink()
        done.checkpoint.unlink()

    order = order_of(folder, f"size-{size}", *unit(size // 4, crossings))
    await workshop.run(order, on_step=heard, on_segment=take, port=StaticPort(bytes(size)))
    tensors = crossings * (STEPS - 1)
    return {
        "wall_us": 1e6 * min(after - before for before, after in itertools.pairwise(walls)) / crossings,
        "worker_us": 1e6 * (worker[1] - worker[0]) / tensors,
        "daemon_us": 1e6 * (daemon[1] - daemon[0]) / tensors,
    }


async def measured() -> dict[str, Any]:
    """The figures of each size."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        async with Workshop(Path(folder) / "scratch", pool=0) as workshop:
            for size in SIZES:
                count = max(1, min(64, 16 * 1024**2 // size))
                row = await run_steps(workshop, Path(folder), size, count)
                found[str(size)] = {name: round(value) for name, value in row.items()}
    return found


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found = trio.run(measured)
    if asked.json:
        print(json.dumps(found))
        return
    for size, row in found.items():
        print(f"{int(size):>10} bytes in and out: " + ", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
