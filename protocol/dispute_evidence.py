"""What a solver shows of its own run of a tolerant segment before anybody can challenge it: three kinds of files.

Floats computed by two honest machines differ in every step, so a challenger cannot play from its own run: it follows
the solver's, and differs where no honest machine can follow (protocol/dispute_following.py). The files are held against
the roots of the states, and the last of these is the root that the solver signed: what does not fit is no evidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from protocol import merkle, params, safetensors
from protocol.dispute_facts import Facts
from protocol.dispute_player import Tracer
from protocol.dispute_terms import Pledge
from protocol.dispute_wire import ShowState, ShowStates, ShowTrace
from protocol.errors import LimitExceeded, MalformedRecord, VerificationFailed
from protocol.operations import ITEM_BYTES
from protocol.program import state_layout

__all__ = ["Followed", "evidence", "evidence_bytes", "read_followed", "read_states"]

Data = bytes | memoryview
Arrays = Mapping[str, NDArray[Any]]

_DIGEST: Final = 32
_ALIGNMENT: Final = 64


# --- the solver's side -------------------------------------------------------------------------------------
def evidence(ask: ShowStates | ShowState | ShowTrace, tracer: Tracer) -> bytes:
    """The file asked for. Raises MalformedRecord for a step the segment does not have, LimitExceeded for a trace that
    is larger than TRACE_BYTES_MAX."""
    facts = tracer.facts
    if isinstance(ask, ShowStates):
        return b"".join(tracer.step_roots())
    if isinstance(ask, ShowState):
        if ask.step != facts.ends:  # the state before that is the end
            facts.check_step(ask.step)
        values = [facts.state_value(place) for place in range(len(facts.names))]
        held = tracer.tensors(ask.step, values)
        return safetensors.write({name: held[value] for name, value in zip(facts.names, values, strict=True)})
    facts.number_of(ask.step)
    places, size = _places(facts)
    file = bytearray(size)
    ends = b"".join(tracer.state_roots(ask.step))
    file[: len(ends)] = ends
    held = tracer.tensors(ask.step, list(places))
    for value, at in places.items():
        raw = np.ascontiguousarray(held[value]).reshape(-1).view(np.uint8)
        file[at : at + raw.size] = raw.data
    return bytes(file)


def evidence_bytes(ask: ShowStates | ShowState | ShowTrace, facts: Facts, checkpoint_bytes: int) -> int:
    """The most bytes that such a file has. checkpoint_bytes: of a state of the task. Raises as `evidence`."""
    if isinstance(ask, ShowStates):
        return _DIGEST * facts.ends
    return checkpoint_bytes if isinstance(ask, ShowState) else _places(facts)[1]


def _places(facts: Facts) -> tuple[dict[int, int], int]:
    """Where each value of a trace stands in its file, behind the roots of the state after the step; and its size."""
    places, at = {}, _aligned(_DIGEST * len(facts.names))
    for leaf in range(facts.leaves("trace", 0)):
        value = facts.trace_value(leaf)
        kind = facts.type_of(value)
        places[value] = at
        at = _aligned(at + kind.elements * ITEM_BYTES[kind.dtype])
    if at > params.TRACE_BYTES_MAX:
        raise LimitExceeded(
            f"the values of one step take {at} bytes, at most {params.TRACE_BYTES_MAX} are shown",
            why="a tolerant dispute about this task cannot be pinpointed; a quorum of checkers judges it",
        )
    return places, at


def _aligned(at: int) -> int:
    return -(-at // _ALIGNMENT) * _ALIGNMENT


# --- the challenger's side ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Followed:
    """What a solver showed of one step, all of it under roots it signed or will have to show in the game.

    states: the roots of all states of the segment. before: the state before the step; ends: the roots of the tensors
    after it. trace: of a training step, every value. base, end: where gauges are put back, the states before and after
    the segment.
    """

    step: int
    states: tuple[bytes, ...]
    before: Arrays
    ends: tuple[bytes, ...]
    trace: Mapping[int, NDArray[Any]]
    base: Arrays
    end: Arrays

    def pledge(self, facts: Facts) -> Pledge:
        """What of it a game binds the solver to."""
        leaves = [facts.trace_value(leaf) for leaf in range(facts.leaves("trace", 0))] if self.trace else []
        trace = merkle.merkle_root([merkle.tensor_root(self.trace[value]) for value in leaves])
        return Pledge(merkle.merkle_root(self.states), self.step, trace)


def read_states(facts: Facts, data: Data, claimed_root: bytes | None) -> tuple[bytes, ...]:
    """The roots of all states. claimed_root: of the solver's receipt, None where the peer has looked already.

    Raises VerificationFailed if the last is not `claimed_root`, MalformedRecord.
    """
    if len(data) != _DIGEST * facts.ends:
        raise MalformedRecord(f"{len(data)} bytes of roots where {facts.ends} states are")
    found = tuple(bytes(data[at : at + _DIGEST]) for at in range(0, len(data), _DIGEST))
    if claimed_root is not None and found[-1] != claimed_root:
        raise VerificationFailed("the states shown do not end in the root that the solver signed")
    return found


def read_followed(
    facts: Facts, step: int, states: tuple[bytes, ...], *, in_root: bytes, before: Data, after: Data, base: Data | None
) -> Followed:
    """Check the solver's files about `step`. before: the state; after: a trace file, or the checkpoint handed in where
    gauges are put back, and then base: the state that the segment starts from.

    Raises VerificationFailed for a file that is not under the roots, MalformedRecord, LimitExceeded.
    """
    facts.check_step(step)
    layout = state_layout(facts.program)
    held = safetensors.parse(before, layout)
    if merkle.state_root(held) != (states[step - 1] if step else in_root):
        raise VerificationFailed(f"the state shown before step {step} is not the one of its root")
    start: Arrays = {}
    end: Arrays = {}
    trace: dict[int, NDArray[Any]] = {}
    if facts.puts_back(step):
        if base is None:
            raise MalformedRecord("what is put back is not here: the state that the segment starts from")
        start, end = safetensors.parse(base, layout), safetensors.parse(after, layout)
        if merkle.state_root(start) != in_root:
            raise VerificationFailed("the state shown is not the one that the segment starts from")
        ends = tuple(merkle.tensor_root(end[name]) for name in facts.names)
    else:
        facts.number_of(step)
        ends, trace = _read_trace(facts, memoryview(after))
    if merkle.state_root_of(dict(zip(facts.names, ends, strict=True))) != states[step]:
        raise VerificationFailed(f"the state shown after step {step} is not the one of its root")
    return Followed(step, states, held, ends, trace, start, end)


def _read_trace(facts: Facts, data: memoryview) -> tuple[tuple[bytes, ...], dict[int, NDArray[Any]]]:
    places, size = _places(facts)
    if len(data) != size:
        raise MalformedRecord(f"a trace of {len(data)} bytes, {size} are due")
    trace = {}
    for value, at in places.items():
        kind = facts.type_of(value)
        raw = data[at : at + kind.elements * ITEM_BYTES[kind.dtype]]
        if kind.dtype == "bool" and (np.frombuffer(raw, np.uint8) > 1).any():
            raise MalformedRecord(f"value {value} of the trace holds a bool that is neither 0 nor 1")
        trace[value] = np.frombuffer(raw, np.dtype(kind.dtype).newbyteorder("<")).reshape(kind.shape)
    ends = tuple(bytes(data[_DIGEST * at : _DIGEST * (at + 1)]) for at in range(len(facts.names)))
    return ends, trace
