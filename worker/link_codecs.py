"""How the tensors of one unit become payloads and come back, with the memory that the codec `change` has of a link.

The memory is part of the unit's state (docs/decisions/0023-parallel.md) and is written in place while a segment runs,
since a step changes a few rows of it: so its tensors must be nobody else's, and a step that diverges is undone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from protocol.batches import examples_of, rows_of
from protocol.errors import MalformedRecord, RemoteProtocolError
from protocol.operations import TensorType
from protocol.payload import PayloadKey
from protocol.payload_size import noise_seed, stream_number
from protocol.program import Program
from protocol.stage import KEPT_PREFIX, OUTER_PREFIX, RESIDUAL_PREFIX, SEEN_PREFIX, Codec, Side
from protocol.task import TaskSpec
from worker import compression
from worker.compression import NotFinite
from worker.executor import DTYPES, Diverged

__all__ = ["BadPayload", "LinkCodecs", "OuterChange", "check_memory"]


_SIDES: Final[tuple[Side, Side]] = ("send", "recv")


class BadPayload(MalformedRecord):
    """A neighbour, `unit`, sent what is no tensor of its crossing."""

    code = "bad-payload"

    def __init__(self, unit: int, what: str, *, why: str) -> None:
        self.unit = unit
        super().__init__(what, why=why)


def check_memory(task: TaskSpec, program: Program) -> None:
    """Refuse memories of links and of outer steps that are not as the task needs them. Raises MalformedRecord."""
    types = {item.name: item.type for item in program.inputs}
    stage = task.stage
    assert stage is not None, "only a unit has links"
    for crossings, side in ((stage.sends, "send"), (stage.receives, "recv")):
        for crossing in crossings:
            end = f"{side}.{crossing.flow}.{crossing.index}"
            kept, seen = types.get(KEPT_PREFIX + end), types.get(SEEN_PREFIX + end)
            if kept is None and seen is None:
                continue
            moved, rows = program.types[crossing.value], task.batch.size // stage.micro_batches
            examples = kept.shape[0] if kept is not None and kept.shape else 0
            if kept is None or examples < examples_of(task) or kept.dtype != "float32" or moved.dtype != "float32":
                raise MalformedRecord(f"{KEPT_PREFIX}{end} does not keep {examples_of(task)} examples of a float32")
            if seen != TensorType("uint8", (examples,)) or rows * kept.elements != examples * moved.elements:
                raise MalformedRecord(f"{KEPT_PREFIX}{end} or {SEEN_PREFIX}{end} does not fit {rows} rows of {moved}")
    for name in types:
        if name.startswith(OUTER_PREFIX):
            parameter = name.removeprefix(OUTER_PREFIX)
            alike = [types.get(parameter), types[name], types.get(RESIDUAL_PREFIX + parameter)]
            if any(kind != types[name] or kind.dtype != "float32" for kind in alike):
                raise MalformedRecord(f"{parameter}, its outer momentum and its residual are not float32 of one shape")


class LinkCodecs:
    """The codecs of one unit in one segment. state: at its start; what of it is memory of links is written in place."""

    def __init__(self, task: TaskSpec, program: Program, state: Mapping[str, Tensor]) -> None:
        stage = task.stage
        assert stage is not None, "only a unit has links"
        self._task, self._stage = task, stage
        ends = [name.removeprefix(KEPT_PREFIX) for name in state if name.startswith(KEPT_PREFIX)]
        changes = {side for side in _SIDES if stage.codec_of("forward", side).kind == "change"}
        self._memory = {
            end: (state[KEPT_PREFIX + end], state[SEEN_PREFIX + end]) for end in ends if end.split(".")[0] in changes
        }
        self._before: list[tuple[str, list[int], Tensor, Tensor]] = []
        self._step, self._rows = 0, np.zeros(0, dtype=np.int64)

    def begin(self, step: int) -> None:
        """Step `step` follows; the one before it stays."""
        self._before.clear()
        self._step = step
        if self._memory:
            self._rows = rows_of(self._task, step)

    def encode(self, key: PayloadKey, tensor: Tensor) -> tuple[bytes, Tensor]:
        """The payload of `tensor`, and what this unit goes on with. Raises Diverged for what cannot be compressed."""
        codec, where = self._codec(key, "send"), f"{key.flow}.{key.index}"
        place = self._place(key)
        try:
            if codec.kind == "change":
                kept, seen = self._memory[f"send.{where}"]
                rows = self._remembered(f"send.{where}", key.micro_batch)
                shaped = tensor.reshape(len(rows), *kept.shape[1:])
                return compression.encode_change(codec, shaped, kept=kept, seen=seen, rows=rows, **place), tensor
            if codec.kind == "float32" and _has_nan(tensor):
                raise NotFinite(f"a tensor of shape {tuple(tensor.shape)} that holds NaN")
            payload = compression.encode(codec, tensor, **place)
        except NotFinite as error:
            raise Diverged(self._step, f"{where} of micro-batch {key.micro_batch}") from error
        if key.flow != "sync" or codec.kind == "float32":
            return payload, tensor
        # The replicas stay equal only if each adds up the same: its own part as the others decode it.
        return payload, compression.decode(
            codec, payload, str(tensor.dtype).removeprefix("torch."), tensor.shape, **place
        )

    def decode(self, key: PayloadKey, payload: memoryview, kind: TensorType) -> Tensor:
        """The tensor of `payload`, in memory of its own. Raises BadPayload."""
        codec, end = self._codec(key, "recv"), f"recv.{key.flow}.{key.index}"
        place = self._place(key)
        try:
            if codec.kind == "change":
                kept, seen = self._memory[end]
                rows = self._remembered(end, key.micro_batch)
                return compression.decode_change(codec, payload, kept=kept, seen=seen, rows=rows, **place).reshape(
                    kind.shape
                )
            if codec.kind == "float32" and kind.dtype == "float32":
                return _viewed(payload, kind)
            return compression.decode(codec, payload, kind.dtype, kind.shape, **place)
        except RemoteProtocolError as error:
            raise BadPayload(key.unit, f"{key} of unit {key.unit}: {error.what}", why=error.why) from error

    def _codec(self, key: PayloadKey, side: Side) -> Codec:
        codec = self._stage.codec_of(key.flow, side)
        if codec.kind == "change" and f"{side}.{key.flow}.{key.index}" not in self._memory:
            return Codec("float32")  # no tensor of rows, so there is no example to remember
        return codec

    def _place(self, key: PayloadKey) -> dict[str, int]:
        stream = stream_number(key.flow, key.unit, key.micro_batch, key.index)
        return {"seed": noise_seed(self._stage.run), "step": self._step, "stream": stream}

    def _remembered(self, end: str, micro_batch: int) -> list[int]:
        """The rows of a micro-batch, whose memory is about to change."""
        count = len(self._rows) // self._stage.micro_batches
        rows: list[int] = self._rows[micro_batch * count : (micro_batch + 1) * count].tolist()
        kept, seen = self._memory[end]
        self._before.append((end, rows, kept[rows], seen[rows]))
        return rows

    def undo(self) -> None:
        """The memory as it was before the step that began last."""
        for end, rows, kept, seen in reversed(self._before):
            self._memory[end][0][rows], self._memory[end][1][rows] = kept, seen
        self._before.clear()

    def state(self) -> dict[str, Tensor]:
        """The memory as state, in tensor objects of their own: who knows the old ones knows not the new values."""
        found: dict[str, Tensor] = {}
        for end, (kept, seen) in self._memory.items():
            found |= {KEPT_PREFIX + end: kept.detach(), SEEN_PREFIX + end: seen.detach()}
        return found


def _viewed(payload: memoryview, kind: TensorType) -> Tensor:
    """A payload as it is, without a copy if it is in memory of its own."""
    if len(payload) != kind.size_bytes:
        raise MalformedRecord(f"{len(payload)} bytes, a {kind.dtype} of shape {kind.shape} has {kind.size_bytes}")
    held = np.frombuffer(payload, np.uint8)
    held = held if held.flags.writeable else held.copy()
    found = torch.from_numpy(held).view(DTYPES[kind.dtype]).reshape(kind.shape)
    if _has_nan(found):
        raise MalformedRecord("a tensor that holds NaN", why="who computes one diverges, and sends none")
    return found


def _has_nan(tensor: Tensor) -> bool:
    """Whether it holds what would end the task of whoever goes on with it. Infinity may be a mask, and passes."""
    return tensor.is_floating_point() and bool(tensor.isnan().any())


class OuterChange:
    """The outer step of a segment of local steps: what each parameter changed by, sent, received, and taken."""

    def __init__(self, task: TaskSpec, start: Mapping[str, Tensor], end: Mapping[str, Tensor], step: int) -> None:
        stage = task.stage
        assert stage is not None, "only a unit has an outer step"
        self._stage, self._start, self._end, self._step = stage, start, end, step
        names = sorted(name.removeprefix(OUTER_PREFIX) for name in start if name.startswith(OUTER_PREFIX))
        self.keys = {PayloadKey(step, "outer", 0, index, stage.unit): name for index, name in enumerate(names)}
        self._sent: dict[str, Tensor] = {}
        self._left: dict[str, Tensor] = {}

    def encode(self, key: PayloadKey) -> bytes:
        """What this unit sends of one of its `keys`. Raises Diverged for a change that is not finite."""
        name = self.keys[key]
        delta, residual = self._end[name] - self._start[name], self._end[RESIDUAL_PREFIX + name]
        try:
            payload, self._sent[name], self._left[name] = compression.encode_outer(
                self._stage.shared, delta, residual, **self._place(key, key.unit)
            )
        except NotFinite as error:
            raise Diverged(self._step, f"the change of {name}") from error
        return payload

    def _place(self, key: PayloadKey, unit: int) -> dict[str, int]:
        stream = stream_number("outer", unit, 0, key.index)
        return {"seed": noise_seed(self._stage.run), "step": self._step, "stream": stream}

    def taken(self, key: PayloadKey, others: Mapping[int, memoryview]) -> dict[str, Tensor]:
        """The new state of a parameter, from the other replicas' payloads by unit. Raises BadPayload, Diverged."""
        name, stage = self.keys[key], self._stage
        deltas = []
        for replica in range(stage.replicas):
            unit = stage.unit_of(stage.stage, replica)
            if unit == stage.unit:
                deltas.append(self._sent[name])
                continue
            shape, place = self._start[name].shape, self._place(key, unit)
            try:
                deltas.append(compression.decode_outer(stage.shared, others[unit], shape, **place))
            except MalformedRecord as error:
                what = f"the change of {name} by unit {unit}: {error.what}"
                raise BadPayload(unit, what, why=error.why) from error
        rate, factor = stage.outer_rate_nano / 1e9, stage.outer_momentum_nano / 1e9
        momentum = self._end[OUTER_PREFIX + name]
        new, after = compression.outer_step(self._start[name], compression.mean_of(deltas), momentum, rate, factor)
        if not bool(new.isfinite().all() & after.isfinite().all()):
            raise Diverged(self._step, name)
        return {name: new, OUTER_PREFIX + name: after, RESIDUAL_PREFIX + name: self._left[name]}
