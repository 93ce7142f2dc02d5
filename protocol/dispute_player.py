"""A player's side of the pinpoint game: what its machine answers to a question. Pure; DESIGN §7.

`answer` knows trees and openings; a Tracer knows how to compute a step, and is the only thing that differs between the
sandboxed worker (worker/tracing.py, torch) and the simulator (protocol/dispute_reference.py, Python integers). Nothing
is kept between questions but what a Tracer caches, so any machine with the segment's base can answer any question.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from protocol import merkle, params
from protocol.blob import manifest_of
from protocol.codec import decode, encode
from protocol.dispute_facts import Facts
from protocol.dispute_partials import Partial
from protocol.dispute_wire import (
    DataOpening,
    Opening,
    OpenTensor,
    OpenTile,
    Partials,
    Question,
    Revealed,
    ShowDissent,
    ShowDistance,
    ShowNodes,
    ShowOperands,
    ShowPartials,
    ShowState,
    ShowStates,
    ShowTile,
    ShowTrace,
    TileShown,
)
from protocol.errors import LocalProtocolError
from protocol.referee import data_place, places_read

__all__ = ["Answer", "Question", "Tracer", "answer", "children", "decode_question"]


@dataclass(frozen=True)
class Answer:
    """body: of the move, which the player signs. opening: operands, which prove themselves. Either may be empty.

    wants_state: the state before the step is worth handing out with it, so that later questions start there.
    """

    body: bytes
    opening: bytes
    wants_state: bool


class Tracer(abc.ABC):
    """What one machine can compute of one segment. Steps are numbered from 0 within it, values as in the Program. The
    state before step `facts.ends` is the segment's end.

    A Tracer that stands before a later step than the first answers for that step alone.
    """

    facts: Facts

    @abc.abstractmethod
    def step_roots(self) -> Sequence[bytes]:
        """The root of the state after each step of the segment, the putting back of gauges included."""

    @abc.abstractmethod
    def state_roots(self, step: int) -> Sequence[bytes]:
        """The roots of the state's tensors, in name order, after `step`; after -1 it is the segment's start."""

    @abc.abstractmethod
    def trace_roots(self, step: int) -> Sequence[bytes]:
        """The roots of the step's batch inputs, then of every node's result in order."""

    @abc.abstractmethod
    def tensors(self, step: int, values: Collection[int]) -> Mapping[int, NDArray[Any]]:
        """State inputs, batch inputs and node results of `step`, by their value's number; of a step that puts gauges
        back, and of `facts.ends`, state inputs alone."""

    @abc.abstractmethod
    def data(self, name: str) -> bytes | memoryview:
        """The array `name` of the task."""

    def partials(self, step: int, value: int, element: int, positions: Sequence[int]) -> list[Partial]:
        """The partial results of one element of a reduction after so many terms."""
        chain, node = self.facts.chain(value, element), self.facts.node(value)
        if chain is None or node is None:
            raise LocalProtocolError(f"value {value} is no reduction")
        operands = self._operands(step, set(node.refs()))
        return chain.partials(operands.__getitem__, positions)

    def _operands(self, step: int, values: Collection[int]) -> dict[int, NDArray[Any]]:
        known = {value: self.facts.computed_numpy(value, step) for value in values}
        held = self.tensors(step, [value for value, array in known.items() if array is None])
        return {value: held[value] if array is None else array for value, array in known.items()}


def decode_question(data: bytes) -> Question:
    """A question from its bytes. Raises MalformedRecord."""
    return decode(Question, data, bytes_max=params.MOVE_BYTES_MAX)


def children(ask: ShowNodes, count: int) -> tuple[int, range]:
    """The height and the places of the descendants that `ask` shows in a tree of `count` leaves."""
    height = max(0, ask.height - 4)
    width = -(-count // (1 << height))
    first = ask.position << (ask.height - height)
    return height, range(first, min(first + (1 << (ask.height - height)), width))


def answer(question: bytes, tracer: Tracer) -> Answer:
    """What `tracer` answers to `question`. Raises MalformedRecord for what is no question about its segment."""
    asked = decode_question(question)
    ask, facts = asked.ask, tracer.facts
    if asked.segment != facts.segment:
        raise LocalProtocolError(f"a question about segment {asked.segment}, this is {facts.segment}")
    if isinstance(ask, ShowStates | ShowState | ShowTrace | ShowDistance | ShowDissent):
        raise LocalProtocolError("evidence is shown before a game (protocol/dispute_evidence.py), not in one")
    facts.check_step(ask.step)
    if isinstance(ask, ShowNodes):
        # Where gauges are put back the segment's base is needed too, so a state within the segment does not help.
        top_of_state = ask.tree == "state" and ask.leaf is not None and not facts.puts_back(ask.step)
        return Answer(encode(_nodes(ask, tracer)), b"", wants_state=top_of_state)
    if isinstance(ask, ShowTile):
        cut = merkle.tiles(_shown(ask.step, ask.value, tracer))
        return Answer(encode(TileShown(bytes(cut[ask.tile]))), b"", wants_state=False)
    if isinstance(ask, ShowPartials):
        found = tracer.partials(ask.step, ask.value, ask.element, ask.positions)
        return Answer(encode(Partials(tuple(found))), b"", wants_state=False)
    return Answer(b"", _opening(ask, tracer), wants_state=False)


def _shown(step: int, value: int, tracer: Tracer) -> NDArray[Any]:
    """A value of the step; where gauges are put back, the state tensor after it."""
    at = step + 1 if tracer.facts.puts_back(step) else step
    return tracer.tensors(at, [value])[value]


def _nodes(ask: ShowNodes, tracer: Tracer) -> Revealed:
    facts = tracer.facts
    if ask.tree == "tiles":
        cut = merkle.tiles(_shown(ask.step, ask.value, tracer))
        roots = [merkle.leaf_hash(tile) for tile in cut]
    elif ask.tree == "steps":
        roots = list(tracer.step_roots())
    elif ask.tree == "state":
        roots = list(tracer.state_roots(ask.step))
    else:
        roots = list(tracer.trace_roots(ask.step))
    levels = merkle.levels_over(facts.hashes(ask.tree, roots, 0))
    height, places = children(ask, len(roots))
    shown = (levels[height] if height else roots)[places.start : places.stop]
    if ask.leaf is None:
        return Revealed(tuple(shown), (), None)
    if ask.tree == "state":
        steps = tracer.step_roots()
        return Revealed(tuple(shown), tuple(merkle.merkle_path(steps, ask.leaf)), steps[ask.leaf])
    return Revealed(tuple(shown), tuple(merkle.path_in(levels, ask.leaf)), None)


# --- openings ----------------------------------------------------------------------------------------------
def _opening(ask: ShowOperands, tracer: Tracer) -> bytes:
    facts = tracer.facts
    item = facts.input(ask.value)
    if facts.puts_back(ask.step):
        at = 0 if facts.is_gauge(ask.value, ask.element) else ask.step
        return _opened(facts, at, {(ask.value, ask.element)}, tracer.tensors(at, [ask.value]), tracer)
    if item is not None and item.role == "batch":
        return _data_opening(ask, tracer)
    if item is not None:
        return encode(Opening((_tensor(ask.value, tracer, ask.step, bytes(32)),), ()))
    node = facts.node(ask.value)
    assert node is not None, "a literal is not opened"
    held = tracer.tensors(ask.step, [v for v in set(node.refs()) if facts.computed(v, ask.step) is None])
    places = places_read(facts, ask, held)  # by the very rule the referee runs
    return _opened(facts, ask.step, places, held, tracer)


def _opened(
    facts: Facts, step: int, places: set[tuple[int, int]], held: Mapping[int, NDArray[Any]], tracer: Tracer
) -> bytes:
    values = sorted({value for value, _ in places})
    tensors: list[OpenTensor] = []
    tiles: list[OpenTile] = []
    for value in values:
        kind = facts.type_of(value)
        cut = merkle.tiles(held[value])
        levels = merkle.levels_over([merkle.leaf_hash(tile) for tile in cut])
        tensors.append(_tensor(value, tracer, step, levels[-1][0]))
        at = {merkle.tile_of(element, shape=kind.shape, dtype=kind.dtype)[0] for v, element in places if v == value}
        tiles.extend(OpenTile(value, n, bytes(cut[n]), tuple(merkle.path_in(levels, n))) for n in sorted(at))
    return encode(Opening(tuple(tensors), tuple(tiles)))


def _data_opening(ask: ShowOperands, tracer: Tracer) -> bytes:
    """Nothing if it is more than a message holds: then the chunk is fetched as a blob's (Game.wants_data)."""
    place = data_place(tracer.facts, ask)
    assert place is not None, "it is a batch input"
    data, size = memoryview(tracer.data(place.array.name)).cast("B"), params.BLOB_CHUNK_BYTES
    chunks = [bytes(data[at : at + size]) for at in range(0, len(data), size)]
    opening = encode(DataOpening(encode(manifest_of(chunks)), chunks[place.chunk]))
    return opening if len(opening) <= params.OPENING_BYTES_MAX else b""


def _tensor(value: int, tracer: Tracer, step: int, tree: bytes) -> OpenTensor:
    place = tracer.facts.state_index(value)
    if place is not None:
        roots = list(tracer.state_roots(step - 1))
        levels = merkle.levels_over(tracer.facts.hashes("state", roots, 0))
        return OpenTensor(value, roots[place], tree, tuple(merkle.path_in(levels, place)))
    leaf = tracer.facts.trace_leaf(value)
    assert leaf is not None, "a literal is not opened"
    trace = list(tracer.trace_roots(step))
    return OpenTensor(value, trace[leaf], tree, tuple(merkle.merkle_path(trace, leaf)))
