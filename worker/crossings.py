"""The tensors of one segment of a unit, in and out: coded, hashed, taped. DESIGN §11, docs/decisions/0023-parallel.md.

What a wire carries is hostile: each payload is decoded into the dtype and shape that the Program states, or refused.
Everything here is a function of the checkpoint and the tape alone, so a checker comes to the same hashes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from protocol.errors import MalformedRecord
from protocol.operations import TensorType
from protocol.payload import LinkHash, PayloadKey, payload_bytes_max, payload_digest, received_key, sent_key
from protocol.program import Program
from protocol.stage import IN_PREFIX, RECEIVED, SENT, TAPE, Crossing, Link, links_in, links_out
from protocol.tape import TapeHash, TapeReader
from protocol.task import TaskSpec
from worker.executor import DTYPES

__all__ = ["BadPayload", "Crossings", "TapeWire", "Wire", "check_unit"]


class BadPayload(MalformedRecord):
    """A neighbour sent what is no tensor of its crossing."""

    code = "bad-payload"


class Wire(Protocol):
    """Where a segment's payloads come from and go to."""

    def begin(self, segment: int) -> None:
        """The payloads of `segment` follow."""
        ...

    def receive(self, key: PayloadKey) -> tuple[memoryview, memoryview]:
        """The payload `key`, and before it the head of its entry on the tape."""
        ...

    def send(self, key: PayloadKey, payload: memoryview) -> None:
        """Hand `payload` over."""
        ...

    def end(self) -> None:
        """The segment is over."""
        ...


class TapeWire:
    """A wire of tapes, one for each segment from `first` on: what a check reads. What is sent goes nowhere.

    Raises MalformedRecord for a tape that is not exactly what its segment asks for, in that order.
    """

    def __init__(self, first: int, tapes: list[memoryview]) -> None:
        self._first, self._tapes = first, tapes
        self._reader = TapeReader(memoryview(b""))

    def begin(self, segment: int) -> None:
        """Read the tape of `segment` from its start."""
        if not 0 <= segment - self._first < len(self._tapes):
            raise MalformedRecord(f"no tape of segment {segment} to check it from")
        self._reader = TapeReader(self._tapes[segment - self._first])

    def receive(self, key: PayloadKey) -> tuple[memoryview, memoryview]:
        """The next entry, which has to be that of `key`."""
        entry, head, payload = self._reader.next()
        if entry.key != key:
            raise MalformedRecord(f"the tape has {entry.key} where {key} is needed")
        return head, payload

    def send(self, key: PayloadKey, payload: memoryview) -> None:
        """Nothing: its hash is all that a check compares."""

    def end(self) -> None:
        """The tape must have been read to its end."""
        if self._reader.left:
            raise MalformedRecord(f"{self._reader.left} bytes of the tape are of nothing that the segment needs")


def check_unit(task: TaskSpec, program: Program) -> None:
    """Refuse a unit whose crossings or state are not of its program. Raises MalformedRecord, LimitExceeded."""
    stage = task.stage
    assert stage is not None, "an ordinary task has nothing to check here"
    known = len(program.types)
    inputs = {item.name: number for number, item in enumerate(program.inputs) if item.role == "batch"}
    due = {}
    for crossing in (*stage.sends, *stage.receives):
        if crossing.value >= known:
            raise MalformedRecord(f"a crossing of value {crossing.value}, the program has {known}")
        payload_bytes_max(program.types[crossing.value])
    for crossing in stage.receives:
        name = f"{IN_PREFIX}{crossing.flow}.{crossing.replica}.{crossing.micro_batch}.{crossing.index}"
        if inputs.get(name) != crossing.value:
            raise MalformedRecord(f"value {crossing.value} of the program is not the batch input {name}")
        due[name] = crossing.value
    strange = sorted(name for name in inputs if name.startswith(IN_PREFIX) and name not in due)
    if strange:
        raise MalformedRecord(f"input {strange[0]} is received from nobody")
    rows = {SENT: (len(links_out(stage)), 32), RECEIVED: (len(links_in(stage)), 32), TAPE: (32,)}
    state = {item.name: (number, item) for number, item in enumerate(program.inputs)}
    after = {update.name: update.value for update in program.updates}
    for name, shape in rows.items():
        if name not in after or state[name][1].type != TensorType("uint8", shape):
            raise MalformedRecord(f"the program of a unit has the state {name}, uint8 {shape}")
    for name, value in after.items():
        if name in rows and state[name][0] != value:
            raise MalformedRecord(f"the program changes the state {name}, which is set at a segment's end")


class Crossings:
    """One segment's payloads. `receive` and `send` are what the Executor calls; `turn` comes after each step done."""

    def __init__(self, task: TaskSpec, program: Program, wire: Wire) -> None:
        stage = task.stage
        assert stage is not None, "only a unit has crossings"
        self._stage, self._program, self._wire = stage, program, wire
        self._into = {crossing.value: crossing for crossing in stage.receives}
        self._out: dict[int, list[Crossing]] = {}
        for crossing in stage.sends:
            self._out.setdefault(crossing.value, []).append(crossing)
        self._tape = TapeHash()
        self._sent = {link: LinkHash() for link in links_out(stage)}
        self._received = {link: LinkHash() for link in links_in(stage)}
        self._step = 0

    def begin(self, step: int) -> None:
        """Step `step` follows."""
        self._step = step

    def receive(self, value: int) -> Tensor:
        """The tensor of input `value`, as soon as it is there. Raises BadPayload, MalformedRecord."""
        key = received_key(self._stage, self._into[value], self._step)
        return as_tensor(self._fetch(key), self._program.types[value], key)

    def _fetch(self, key: PayloadKey) -> memoryview:
        head, payload = self._wire.receive(key)
        self._tape.add(head)
        self._tape.add(payload)
        self._received[Link(key.flow, key.unit)].add(key, payload_digest(payload))
        return payload

    def send(self, value: int, tensor: Tensor) -> None:
        """Hand over `tensor`, the Program's value of that number, wherever it goes."""
        for crossing in self._out[value]:
            self._hand_over(sent_key(self._stage, crossing, self._step), as_payload(tensor))

    def _hand_over(self, key: PayloadKey, payload: memoryview) -> None:
        digest = payload_digest(payload)
        for link, kept in self._sent.items():
            if link.flow == key.flow:
                kept.add(key, digest)
        self._wire.send(key, payload)

    def turn(self) -> None:
        """The step is done."""
        for kept in (*self._sent.values(), *self._received.values()):
            kept.turn()

    def end(self) -> Mapping[str, Tensor]:
        """The state that tells what went over the links in this segment."""
        self._wire.end()
        return {
            SENT: _rows([kept.digest for kept in self._sent.values()]),
            RECEIVED: _rows([kept.digest for kept in self._received.values()]),
            TAPE: _rows([self._tape.blob])[0],
        }


def _rows(digests: list[bytes]) -> Tensor:
    """uint8 (digests, 32)."""
    return torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).copy().reshape(-1, 32))


def as_payload(tensor: Tensor) -> memoryview:
    """The bytes of `tensor` as they are: little-endian, row-major."""
    array = tensor.detach().cpu().contiguous().numpy()
    return memoryview(array.reshape(-1).view(np.uint8))


def as_tensor(payload: memoryview, kind: TensorType, key: PayloadKey) -> Tensor:
    """The tensor of a payload made by `as_payload`, in memory of its own. Raises BadPayload."""
    if len(payload) != kind.size_bytes:
        raise BadPayload(f"{key} has {len(payload)} bytes, a {kind.dtype} of shape {kind.shape} has {kind.size_bytes}")
    held = np.frombuffer(payload, np.uint8)
    if kind.dtype == "bool" and held.size and held.max() > 1:
        raise BadPayload(f"{key} holds a bool that is neither 0 nor 1")
    held = held if held.flags.writeable else held.copy()
    return torch.from_numpy(held).view(DTYPES[kind.dtype]).reshape(kind.shape)
