"""The tensors of one segment of a unit, in and out: coded, hashed, taped. DESIGN §11, docs/decisions/0023-parallel.md.

What a wire carries is hostile: each payload is decoded into the dtype and shape that the Program states, or refused.
Everything here is a function of the checkpoint and the tape alone, so a checker comes to the same hashes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from protocol.errors import LimitExceeded, MalformedRecord
from protocol.operations import TensorType
from protocol.payload import LinkHash, PayloadKey, payload_digest, received_key, sent_key
from protocol.program import Program
from protocol.stage import (
    IN_PREFIX,
    KEPT_PREFIX,
    OUTER_PREFIX,
    RECEIVED,
    RESIDUAL_PREFIX,
    SEEN_PREFIX,
    SENT,
    TAPE,
    Crossing,
    Link,
    links_in,
    links_out,
)
from protocol.tape import TapeHash, TapeReader
from protocol.task import TaskSpec
from worker.link_codecs import LinkCodecs, OuterChange, check_memory
from worker.stage_frames import CrossingTalk

__all__ = ["BadTape", "Crossings", "TapeWire", "Wire", "check_unit"]

_OURS: Final = (KEPT_PREFIX, SEEN_PREFIX, OUTER_PREFIX, RESIDUAL_PREFIX, SENT, RECEIVED, TAPE)


class BadTape(MalformedRecord):
    """A tape is not what its segment asks for: no worker can have been fed so."""

    code = "bad-tape"


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

    Raises BadTape for a tape that is not exactly what its segment asks for, in that order.
    """

    def __init__(self, first: int, tapes: list[memoryview]) -> None:
        self._first, self._tapes = first, tapes
        self._reader = TapeReader(memoryview(b""))

    def begin(self, segment: int) -> None:
        """Read the tape of `segment` from its start."""
        self._reader = TapeReader(self._tapes[segment - self._first])

    def receive(self, key: PayloadKey) -> tuple[memoryview, memoryview]:
        """The next entry, which has to be that of `key`."""
        try:
            entry, head, payload = self._reader.next()
        except (MalformedRecord, LimitExceeded) as error:
            raise BadTape(error.what, why=error.why) from error
        if entry.key != key:
            raise BadTape(f"the tape has {entry.key} where {key} is needed")
        return head, payload

    def send(self, key: PayloadKey, payload: memoryview) -> None:
        """Nothing: its hash is all that a check compares."""

    def end(self) -> None:
        """The tape must have been read to its end."""
        if self._reader.left:
            raise BadTape(f"{self._reader.left} bytes of the tape are of nothing that the segment needs")


def check_unit(task: TaskSpec, program: Program) -> None:
    """Refuse a unit whose crossings or state are not of its program. Raises MalformedRecord, LimitExceeded."""
    stage = task.stage
    assert stage is not None, "an ordinary task has nothing to check here"
    CrossingTalk.of(stage, program)  # every crossing is of a value, and small enough to travel
    inputs = {item.name: number for number, item in enumerate(program.inputs)}
    due = set()
    for crossing in stage.receives:
        name = f"{IN_PREFIX}{crossing.flow}.{crossing.replica}.{crossing.micro_batch}.{crossing.index}"
        if inputs.get(name) != crossing.value or program.inputs[crossing.value].role != "batch":
            raise MalformedRecord(f"value {crossing.value} of the program is not the batch input {name}")
        due.add(name)
    strange = sorted(name for name in inputs if name.startswith(IN_PREFIX) and name not in due)
    if strange:
        raise MalformedRecord(f"input {strange[0]} is received from nobody")
    out, into = len(links_out(stage)), len(links_in(stage))
    rows = {SENT: (out, 32), RECEIVED: (into, 32), TAPE: (32,)} if out or into else {}
    after = {update.name: update.value for update in program.updates}
    for name, shape in rows.items():
        if name not in after or program.inputs[inputs[name]].type != TensorType("uint8", shape):
            raise MalformedRecord(f"the program of this unit has no state {name}, uint8 {shape}")
    for name, value in after.items():
        if name.startswith(_OURS) and inputs[name] != value:
            raise MalformedRecord(f"the program changes the state {name}, which it may only hand on")
    check_memory(task, program)


class Crossings:
    """One segment's payloads. `receive` and `send` are what the Executor calls; `turn` comes after each step done.

    state: at the segment's start; its memories of links are written in place.
    """

    def __init__(self, task: TaskSpec, program: Program, wire: Wire, state: Mapping[str, Tensor]) -> None:
        stage = task.stage
        assert stage is not None, "only a unit has crossings"
        self._task, self._stage, self._program, self._wire = task, stage, program, wire
        self._codecs = LinkCodecs(task, program, state)
        self._start = state
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
        self._codecs.begin(step)

    def receive(self, value: int) -> Tensor:
        """The tensor of input `value`, as soon as it is there. Raises BadPayload, MalformedRecord."""
        key = received_key(self._stage, self._into[value], self._step)
        return self._codecs.decode(key, self._fetch(key), self._program.types[value])

    def _fetch(self, key: PayloadKey) -> memoryview:
        head, payload = self._wire.receive(key)
        self._tape.add(head)
        self._tape.add(payload)
        self._received[Link(key.flow, key.unit)].add(key, payload_digest(payload))
        return payload

    def send(self, value: int, tensor: Tensor) -> Tensor:
        """Hand over `tensor`, the Program's value of that number, wherever it goes; what the unit itself goes on with.

        Raises Diverged for what cannot be compressed.
        """
        own = tensor
        for crossing in self._out[value]:
            key = sent_key(self._stage, crossing, self._step)
            payload, decoded = self._codecs.encode(key, tensor)
            self._hand_over(key, payload)
            own = decoded if crossing.flow == "sync" else own
        return own

    def _hand_over(self, key: PayloadKey, payload: bytes) -> None:
        digest = payload_digest(payload)
        for link, kept in self._sent.items():
            if link.flow == key.flow:
                kept.add(key, digest)
        self._wire.send(key, memoryview(payload))

    def outer(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state after the outer step, from the one after the segment's last step. Raises BadPayload, Diverged."""
        if self._stage.sync != "local":
            return state
        change = OuterChange(self._task, self._start, state, self._step)
        for key in change.keys:
            self._hand_over(key, change.encode(key))
        units = [link.other for link in self._received if link.flow == "outer"]
        new: dict[str, Tensor] = {}
        for key in change.keys:
            others = {unit: self._fetch(msgspec.structs.replace(key, unit=unit)) for unit in units}
            new |= change.taken(key, others)
        return {**state, **new}

    def turn(self) -> None:
        """The step is done."""
        for kept in (*self._sent.values(), *self._received.values()):
            kept.turn()

    def undo(self) -> None:
        """The step diverged: the memories of links are as before it."""
        self._codecs.undo()

    def end(self) -> Mapping[str, Tensor]:
        """The state that tells what went over the links in this segment, and their memories."""
        self._wire.end()
        if not self._sent and not self._received:
            return {}
        return {
            SENT: _rows([kept.digest for kept in self._sent.values()]),
            RECEIVED: _rows([kept.digest for kept in self._received.values()]),
            TAPE: _rows([self._tape.blob])[0],
            **self._codecs.state(),
        }


def _rows(digests: list[bytes]) -> Tensor:
    """uint8 (digests, 32)."""
    return torch.from_numpy(np.frombuffer(b"".join(digests), np.uint8).copy().reshape(-1, 32))
