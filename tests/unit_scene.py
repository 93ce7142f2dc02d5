"""A tiny run of two stages, cut by hand, beside the whole that it is the parts of; and a port in memory.

The whole: two linear layers, squared error, gradient descent, `micro_batches` of two rows each, gradients added up in
the order of the micro-batches. Stage 0 holds w (3, 4), stage 1 holds v (4, 1).
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trio

from peer.work_order import SegmentDone, WorkOrder
from protocol.codec import encode
from protocol.payload import PayloadKey
from protocol.program import Init, Input, Items, Node, Program, Ref, Update, operations_per_step, program_id
from protocol.stage import RECEIVED, SENT, TAPE, Codec, Crossing, Stage, links_in, links_out
from protocol.task import ArrayRef, BatchRule, Initial, Schedule, TaskSpec
from worker import checkpoint

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
    ends = {SENT: (len(links_out(stage)), 32), RECEIVED: (len(links_in(stage)), 32), TAPE: (32,)}
    for end, size in ends.items():
        made.take(end, "buffer", size, "uint8")
    made.take("xy"[stage.stage], "batch", (SIZE, 3 if stage.stage == 0 else 1))
    flows: Any = ("forward", "backward") if stage.stage == 0 else ("backward", "forward")
    for m in range(MICRO_BATCHES):
        made.take(f"ichiba.in.{flows[1]}.{stage.replica}.{m}.0", "batch", (2, 4))
    made.take("rate", "learning_rate", ())
    out = []
    for m in range(MICRO_BATCHES) if stage.stage == 0 else ():
        made.forward_0(m)
        out.append(f"h{m}")
    for m in range(MICRO_BATCHES):
        came = f"ichiba.in.{flows[1]}.{stage.replica}.{m}.0"
        if stage.stage == 0:
            made.backward_0(m, came)
        else:
            made.stage_1(m, came)
            out.append(f"gh{m}")
    made.added(f"g{name}", f"g{name}", shape)
    if stage.stage == 0:
        made.node("loss", "sum.dim_IntList", ("gw", Items((0, 1)), False), ())
    else:
        made.added("loss", "loss", ())
    made.descent(name, f"g{name}", shape)
    sends = tuple(Crossing(flows[0], stage.replica, m, 0, made.of[value]) for m, value in enumerate(out))
    came = [made.of[f"ichiba.in.{flows[1]}.{stage.replica}.{m}.0"] for m in range(MICRO_BATCHES)]
    receives = tuple(Crossing(flows[1], stage.replica, m, 0, value) for m, value in enumerate(came))
    import msgspec

    program = made.program({name: f"new {name}", **{end: end for end in ends}}, "loss")
    return program, msgspec.structs.replace(stage, sends=sends, receives=receives)


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
        "seed": 7, "steps": STEPS, "steps_per_segment": PER_SEGMENT, "mode": "exact", "width": 15,
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
    """One unit's task, program and files."""

    task: TaskSpec
    program: Program
    order: WorkOrder

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


def float_bytes(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)
