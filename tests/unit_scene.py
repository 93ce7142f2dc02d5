"""A tiny run of two stages, cut by hand, beside the whole that it is the parts of; and a port in memory.

The whole: two linear layers, squared error, gradient descent, `micro_batches` of two rows each, gradients added up in
the order of the micro-batches. Stage 0 holds w (3, 4), stage 1 holds v (4, 1).
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import trio

from peer.work_order import SegmentDone, WorkOrder
from protocol.codec import encode
from protocol.errors import IchibaError
from protocol.payload import PayloadKey
from protocol.program import Init, Input, Items, Node, Program, Ref, Update, operations_per_step, program_id
from protocol.stage import (
    KEPT_PREFIX,
    OUTER_PREFIX,
    RECEIVED,
    RESIDUAL_PREFIX,
    SEEN_PREFIX,
    SENT,
    TAPE,
    Codec,
    Crossing,
    Stage,
    links_in,
    links_out,
    replica_seed,
)
from protocol.tape import entry_head
from protocol.task import ArrayRef, BatchRule, Initial, Schedule, TaskSpec
from worker import checkpoint
from worker.crossings import TapeWire, Wire
from worker.stage_run import run_unit
from worker.training import SegmentResult

F32 = "float32"
ROWS, MICRO_BATCHES, STEPS, PER_SEGMENT = 16, 2, 6, 2
SIZE = 2 * MICRO_BATCHES
RAW = Codec("float32")
STATE = {"w": torch.linspace(-1, 1, 12).reshape(3, 4), "v": torch.linspace(0.5, -0.5, 4).reshape(4, 1)}


class Builder:
    """Values by name, in the order they are made: inputs first, then nodes."""

    def __init__(self) -> None:
        self.inputs: list[Input] = []
        self.nodes: list[Node] = []
        self.of: dict[str, int] = {}

    def take(self, name: str, role: Any, shape: tuple[int, ...], dtype: Any = F32) -> None:
        state = role in ("parameter", "optimizer", "buffer")
        self.of[name] = len(self.inputs)
        self.inputs.append(Input(name, role, dtype, shape, Init.of("given") if state else None))

    def node(self, name: str, op: str, args: tuple[Any, ...], shape: tuple[int, ...]) -> None:
        self.of[name] = len(self.inputs) + len(self.nodes)
        filled = tuple(Ref(self.of[arg]) if isinstance(arg, str) else arg for arg in args)
        self.nodes.append(Node(op, filled, F32, shape, ""))

    def program(self, updates: dict[str, str], loss: str) -> Program:
        made = Program(
            tuple(self.inputs), (), tuple(self.nodes),
            tuple(Update(name, self.of[value]) for name, value in sorted(updates.items())), self.of[loss],
        )  # fmt: skip
        made.check()
        return made

    # --- the parts of a step; m is a micro-batch -------------------------------------------------------------
    def slice_of(self, name: str, array: str, m: int, width: int) -> None:
        self.node(name, "slice.Tensor", (array, 0, 2 * m, 2 * m + 2, 1), (2, width))

    def forward_0(self, m: int) -> None:
        self.slice_of(f"x{m}", "x", m, 3)
        self.node(f"h{m}", "mm.default", (f"x{m}", "w"), (2, 4))

    def stage_1(self, m: int, hidden: str) -> None:
        self.slice_of(f"y{m}", "y", m, 1)
        self.node(f"out{m}", "mm.default", (hidden, "v"), (2, 1))
        self.node(f"e{m}", "sub.Tensor", (f"out{m}", f"y{m}"), (2, 1))
        self.node(f"s{m}", "mul.Tensor", (f"e{m}", f"e{m}"), (2, 1))
        self.node(f"loss{m}", "sum.dim_IntList", (f"s{m}", Items((0, 1)), False), ())
        self.node(f"ht{m}", "permute.default", (hidden, Items((1, 0))), (4, 2))
        self.node(f"gv{m}", "mm.default", (f"ht{m}", f"e{m}"), (4, 1))
        self.node(f"vt{m}", "permute.default", ("v", Items((1, 0))), (1, 4))
        self.node(f"gh{m}", "mm.default", (f"e{m}", f"vt{m}"), (2, 4))

    def backward_0(self, m: int, gradient: str) -> None:
        self.node(f"xt{m}", "permute.default", (f"x{m}", Items((1, 0))), (3, 2))
        self.node(f"gw{m}", "mm.default", (f"xt{m}", gradient), (3, 4))

    def added(self, name: str, stem: str, shape: tuple[int, ...]) -> None:
        total = f"{stem}0"
        for m in range(1, MICRO_BATCHES):
            self.node(f"{name} to {m}", "add.Tensor", (total, f"{stem}{m}"), shape)
            total = f"{name} to {m}"
        self.of[name] = self.of[total]

    def descent(self, name: str, gradient: str, shape: tuple[int, ...]) -> None:
        self.node(f"move {name}", "mul.Tensor", (gradient, "rate"), shape)
        self.node(f"new {name}", "sub.Tensor", (name, f"move {name}"), shape)


def whole_program() -> Program:
    made = Builder()
    made.take("w", "parameter", (3, 4))
    made.take("v", "parameter", (4, 1))
    made.take("x", "batch", (SIZE, 3))
    made.take("y", "batch", (SIZE, 1))
    made.take("rate", "learning_rate", ())
    for m in range(MICRO_BATCHES):
        made.forward_0(m)
        made.stage_1(m, f"h{m}")
        made.backward_0(m, f"gh{m}")
    for name, stem, shape in (("gw", "gw", (3, 4)), ("gv", "gv", (4, 1)), ("loss", "loss", ())):
        made.added(name, stem, shape)
    made.descent("w", "gw", (3, 4))
    made.descent("v", "gv", (4, 1))
    return made.program({"w": "new w", "v": "new v"}, "loss")


def stage_of(number: int, **fields: Any) -> Stage:
    """A stage of the run without its crossings."""
    plain: dict[str, Any] = {
        "run": bytes(32), "stage": number, "stages": 2, "replica": 0, "replicas": 1, "micro_batches": MICRO_BATCHES,
        "forward": RAW, "backward": RAW, "sync": "none", "shared": RAW,
    }  # fmt: skip
    return Stage(**{**plain, **fields})


def unit_program(stage: Stage) -> tuple[Program, Stage]:
    """The program of a stage, and the stage with its crossings."""
    made, name, shape = Builder(), "wv"[stage.stage], ((3, 4), (4, 1))[stage.stage]
    made.take(name, "parameter", shape)
    own = own_state(stage, name, shape)
    for state, (dtype, size) in own.items():
        made.take(state, "buffer", size, dtype)
    made.take("xy"[stage.stage], "batch", (SIZE, 3 if stage.stage == 0 else 1))
    flows: Any = ("forward", "backward") if stage.stage == 0 else ("backward", "forward")
    came = [(flows[1], stage.replica, m) for m in range(MICRO_BATCHES)]
    for flow, replica, m in came:
        made.take(f"ichiba.in.{flow}.{replica}.{m}.0", "batch", (2, 4))
    others = [replica for replica in range(stage.replicas) if replica != stage.replica and stage.sync == "step"]
    for replica in others:
        came.append(("sync", replica, 0))
        made.take(f"ichiba.in.sync.{replica}.0.0", "batch", shape)
    made.take("rate", "learning_rate", ())
    out = []
    for m in range(MICRO_BATCHES) if stage.stage == 0 else ():
        made.forward_0(m)
        out.append((flows[0], m, f"h{m}"))
    for m in range(MICRO_BATCHES):
        if stage.stage == 0:
            made.backward_0(m, f"ichiba.in.backward.{stage.replica}.{m}.0")
        else:
            made.stage_1(m, f"ichiba.in.forward.{stage.replica}.{m}.0")
            out.append((flows[0], m, f"gh{m}"))
    made.added("own", f"g{name}", shape)
    made.of["all 0"] = made.of["own"] if stage.replica == 0 or not others else made.of["ichiba.in.sync.0.0.0"]
    for replica in range(1, stage.replicas) if others else ():
        term = "own" if replica == stage.replica else f"ichiba.in.sync.{replica}.0.0"
        made.node(f"all {replica}", "add.Tensor", (f"all {replica - 1}", term), shape)
    gradient = f"all {stage.replicas - 1 if others else 0}"
    out += [("sync", 0, "own")] if others else []
    if stage.stage == 0:
        made.node("loss", "sum.dim_IntList", ("own", Items((0, 1)), False), ())
    else:
        made.added("loss", "loss", ())
    made.descent(name, gradient, shape)
    sends = tuple(Crossing(flow, stage.replica, m, 0, made.of[value]) for flow, m, value in out)
    receives = tuple(
        Crossing(flow, replica, m, 0, made.of[f"ichiba.in.{flow}.{replica}.{m}.0"]) for flow, replica, m in came
    )
    program = made.program({name: f"new {name}", **{state: state for state in own}}, "loss")
    return program, msgspec.structs.replace(stage, sends=sends, receives=receives)


def own_state(stage: Stage, name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The state that a unit has beside its parameter."""
    own: dict[str, tuple[str, tuple[int, ...]]] = {
        SENT: ("uint8", (len(links_out(stage)), 32)), RECEIVED: ("uint8", (len(links_in(stage)), 32)),
        TAPE: ("uint8", (32,)),
    }  # fmt: skip
    if stage.forward.kind == "change":
        end = f"{'send' if stage.stage == 0 else 'recv'}.forward.0"
        own |= {KEPT_PREFIX + end: (F32, (ROWS, 4)), SEEN_PREFIX + end: ("uint8", (ROWS,))}
    if stage.sync == "local":
        own |= {OUTER_PREFIX + name: (F32, shape), RESIDUAL_PREFIX + name: (F32, shape)}
    return own


def data() -> dict[str, np.ndarray[Any, Any]]:
    x = np.sin(np.arange(3 * ROWS)).astype("<f4").reshape(ROWS, 3)
    return {"x": x, "y": (x[:, :1] - 2 * x[:, 1:2]).astype("<f4")}


def task_of(program: Program, stage: Stage | None, base: dict[str, torch.Tensor], **fields: Any) -> TaskSpec:
    arrays = data()
    used = {item.name for item in program.inputs}
    plain: dict[str, Any] = {
        "network": bytes(32), "program": program_id(program.to_bytes()), "program_bytes": len(program.to_bytes()),
        "arrays": tuple(
            ArrayRef(name, F32, array.shape, bytes([1 if name in used else 0]) * 32, array.nbytes)
            for name, array in arrays.items()
        ),
        "batch": BatchRule("rows", SIZE, 0), "initial": Initial("state", bytes(32), checkpoint.state_root(base)),
        "seed": replica_seed(7, stage.replica if stage else 0),
        "steps": STEPS, "steps_per_segment": PER_SEGMENT, "mode": "exact", "width": 15,
        "schedule": Schedule("constant", 20_000_000, 0, 0), "operations_per_step": operations_per_step(program),
        "name": "two layers", "stage": stage,
    }  # fmt: skip
    return TaskSpec(**{**plain, **fields})


def first_state(program: Program) -> dict[str, torch.Tensor]:
    state = [item for item in program.inputs if item.role in ("parameter", "optimizer", "buffer")]
    dtypes = {F32: torch.float32, "uint8": torch.uint8}
    return {
        item.name: STATE[item.name].clone() if item.name in STATE else torch.zeros(item.shape, dtype=dtypes[item.dtype])
        for item in sorted(state, key=lambda item: item.name)
    }


@dataclass
class Unit:
    """One unit's task and program, the file of its first state, and the order of its whole run."""

    task: TaskSpec
    program: Program
    base: Path
    made: WorkOrder | None = None

    @property
    def order(self) -> WorkOrder:
        assert self.made is not None
        return self.made

    @property
    def stage(self) -> Stage:
        assert self.task.stage is not None
        return self.task.stage


def made_unit(folder: Path, stage: Stage, program: Program | None = None, **fields: Any) -> Unit:
    """A unit whose inputs are files of `folder`."""
    if program is None:
        program, stage = unit_program(stage)
    base = first_state(program)
    task = task_of(program, stage, base, **fields)
    name = f"unit-{stage.unit}"
    (folder / f"{name}.program").write_bytes(program.to_bytes())
    (folder / f"{name}.base").write_bytes(checkpoint.dump(base))
    for array, content in data().items():
        (folder / array).write_bytes(content.tobytes())
    return Unit(
        task,
        program,
        folder / f"{name}.base",
        WorkOrder(
            work_id=name, task=encode(task), program=folder / f"{name}.program",
            arrays={ref.name: folder / ref.name for ref in task.fetched}, base=folder / f"{name}.base",
            first_segment=0, last_segment=task.segments, threads=1, memory_bytes=1024**3, wall_seconds=60,
            checkpoint_bytes_max=1 << 20, tape_folder=folder / "tapes",
        ),
    )  # fmt: skip


Meddle = Callable[[PayloadKey, bytes], Awaitable[bytes]]


async def _honest(key: PayloadKey, payload: bytes) -> bytes:
    return payload


@dataclass
class MemoryNet:
    """The links of a run within one process. Keeps all that was ever sent, by key; one sent twice must be the same."""

    sent: dict[PayloadKey, bytes] = field(default_factory=dict)
    again: int = 0  # payloads that were sent before
    asked: list[PayloadKey] = field(default_factory=list)
    meddle: Meddle = _honest
    _news: trio.Event = field(default_factory=trio.Event)

    async def send(self, key: PayloadKey, others: tuple[int, ...], payload: bytes) -> None:
        assert others, "somebody is to receive it"
        assert isinstance(payload, bytes)
        if key in self.sent:
            self.again += 1
            assert self.sent[key] == payload, f"{key} was sent before with other bits"
            return
        self.sent[key] = await self.meddle(key, payload)
        self._news.set()
        self._news = trio.Event()

    async def want(self, key: PayloadKey) -> bytes:
        self.asked.append(key)
        while key not in self.sent:
            await self._news.wait()
        return self.sent[key]


@dataclass
class Heard:
    """What a unit's run told."""

    steps: list[tuple[int, float | None]] = field(default_factory=list)
    segments: list[SegmentDone] = field(default_factory=list)

    def step(self, step: int, loss: float | None) -> None:
        self.steps.append((step, loss))

    async def segment(self, done: SegmentDone) -> None:
        self.segments.append(done)


class ThreadWire:
    """The wire of one unit whose whole run is in this process, each unit in a thread of its own.

    Keeps the tapes that a daemon would write.
    """

    def __init__(self, net: ThreadNet) -> None:
        self.net = net
        self.tapes: list[bytearray] = []

    def begin(self, segment: int) -> None:
        self.tapes.append(bytearray())

    def receive(self, key: PayloadKey) -> tuple[memoryview, memoryview]:
        payload = self.net.want(key)
        head = entry_head(key, payload)
        self.tapes[-1] += head + payload
        return memoryview(head), memoryview(payload)

    def send(self, key: PayloadKey, payload: memoryview) -> None:
        self.net.put(key, bytes(payload))

    def end(self) -> None:
        pass


class ThreadNet:
    """Payloads between threads. After a unit failed the others stop waiting."""

    def __init__(self) -> None:
        self.sent: dict[PayloadKey, bytes] = {}
        self.failed = False
        self._news = threading.Condition()

    def put(self, key: PayloadKey, payload: bytes) -> None:
        with self._news:
            assert key not in self.sent
            self.sent[key] = payload
            self._news.notify_all()

    def want(self, key: PayloadKey) -> bytes:
        with self._news:
            if not self._news.wait_for(lambda: key in self.sent or self.failed, timeout=60) or key not in self.sent:
                raise TimeoutError(f"nobody sends {key}")
            return self.sent[key]

    def fail(self) -> None:
        with self._news:
            self.failed = True
            self._news.notify_all()


@dataclass
class Ran:
    """A unit's run in a thread: its segments and tapes, and what ended it."""

    unit: Unit
    wire: ThreadWire
    arrays: dict[str, bytes]
    results: list[SegmentResult] = field(default_factory=list)
    error: BaseException | None = None

    def end(self, segment: int) -> dict[str, torch.Tensor]:
        return checkpoint.load(self.results[segment].checkpoint)

    def base(self, segment: int) -> bytes:
        return self.results[segment - 1].checkpoint if segment else self.unit.base.read_bytes()


def unit_run(mine: Ran, wire: Wire, segments: range, **more: Any) -> Iterator[SegmentResult]:
    unit, base = mine.unit, mine.base(segments.start)
    arrays = {ref.name: mine.arrays[ref.name] for ref in unit.task.fetched}
    return run_unit(
        task=unit.task, program=unit.program, arrays=arrays, base=base, segments=segments, wire=wire, **more
    )


def run_threads(
    units: list[Unit], cheats: dict[int, str] | None = None, arrays: dict[str, bytes] | None = None
) -> list[Ran]:
    """Run whole units beside each other. cheats: frauds, by the number of the unit. arrays: other data than `data`."""
    net = ThreadNet()
    arrays = arrays or {name: array.tobytes() for name, array in data().items()}
    ran = [Ran(unit, ThreadWire(net), arrays) for unit in units]

    def one(mine: Ran) -> None:
        try:
            cheat = (cheats or {}).get(mine.unit.stage.unit)
            for result in unit_run(mine, mine.wire, range(mine.unit.task.segments), cheat=cheat):
                mine.results.append(result)
        except (IchibaError, TimeoutError) as error:
            mine.error = error
            net.fail()

    threads = [threading.Thread(target=one, args=(mine,)) for mine in ran]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a unit waits for ever"
    return ran


def checked(mine: Ran, segment: int, tape: bytes | None = None) -> SegmentResult:
    """The segment computed again from its base and tape alone."""
    wire = TapeWire(segment, [memoryview(bytes(mine.wire.tapes[segment]) if tape is None else tape)])
    (result,) = unit_run(mine, wire, range(segment, segment + 1))
    return result
