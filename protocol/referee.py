"""The referee: recomputes the one element, or the one block of terms, that a dispute ends at. DESIGN §7.

It believes nothing it is shown: each tile it reads has a path to a root that both sides agreed on, and what was not
opened is not read. It needs neither torch nor the model, only protocol.reference. The players' machines learn from
`places_read`, which runs the same rule on the whole operands, what they must open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from protocol import merkle, params
from protocol.batches import source_of
from protocol.blob import BlobManifest
from protocol.bounds import Bound, bound_of
from protocol.codec import decode
from protocol.dispute_facts import Facts
from protocol.dispute_partials import Partial
from protocol.dispute_wire import DATA_OPENING_BYTES_MAX, DataOpening, Opening, OpenTensor, ShowOperands
from protocol.errors import MalformedRecord, VerificationFailed
from protocol.operations import ITEM_BYTES, OPERATIONS, TensorType
from protocol.reference import rules
from protocol.reference_movement import Array, PartialArray
from protocol.softfloat import BINARY32
from protocol.task import ArrayRef

__all__ = ["Agreed", "DataPlace", "Finding", "bound_at", "data_place", "judge", "places_read"]

Read = Callable[[int, int], int]  # of a value's number and a row-major element of it


@dataclass(frozen=True)
class Agreed:
    """What both sides stand by when the leaf is reached.

    before: the root of the state before the step. traces: each side's root of the step's trace; they agree on every
    leaf before the disputed one, so a path under either will do. start: the partial result before the disputed terms.
    base: the root of the state before the segment, whose gauge parts are put back.
    """

    before: bytes
    traces: tuple[bytes, ...]
    start: Partial | None = None
    base: bytes = b""


@dataclass(frozen=True)
class Finding:
    """The referee's own result: an element, a partial result or a root; of a node of a tolerant task what an honest
    element may be. None: the operation has none, because an index it reads is out of range, so no side's value follows.
    operations: spent on it."""

    result: int | Partial | bytes | Bound | None
    operations: int


@dataclass(frozen=True)
class DataPlace:
    """Where a batch element stands: chunk `chunk` of blob `blob`, which is an array of the task; `at` in the chunk."""

    array: ArrayRef
    element: int
    chunk: int
    at: int


class _Elements(Sequence[int]):
    """The elements of one value, each read when it is asked for."""

    def __init__(self, value: int, count: int, read: Read) -> None:
        self._value, self._count, self._read = value, count, read

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return (self._read(self._value, at) for at in range(self._count))

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return [self._read(self._value, at) for at in range(*index.indices(self._count))]
        return self._read(self._value, index)


# --- the rules ---------------------------------------------------------------------------------------------
def bound_at(facts: Facts, step: int, value: int, element: int, opened: Read) -> Bound:
    """What an honest float32 machine may make of one element of a node. opened: operands that are not computed.

    Raises MalformedRecord if an index it reads is out of range: then there is no such element.
    """
    node = facts.node(value)
    assert node is not None, "only a node's result is computed"
    return bound_of(node.op, facts.arguments(node, _operands(facts, step, opened)), element)


def _operands(facts: Facts, step: int, opened: Read) -> Callable[[int], Array]:
    def operand(value: int) -> Array:
        kind = facts.type_of(value)
        held = facts.computed(value, step)
        return held or PartialArray(kind.dtype, kind.shape, _Elements(value, kind.elements, opened))

    return operand


def _run(facts: Facts, ask: ShowOperands, start: Partial | None, opened: Read) -> int | Partial:
    """The element, or the partial result after the disputed terms. opened: operands that are not computed."""
    known: dict[int, Array | None] = {}

    def array(value: int) -> Array | None:
        if value not in known:
            known[value] = facts.computed(value, ask.step)
        return known[value]

    def read(value: int, element: int) -> int:
        held = array(value)
        return held.elements[element] if held is not None else opened(value, element)

    node = facts.node(ask.value)
    assert node is not None, "a leaf is a node, a batch input or state"
    chain = facts.chain(ask.value, ask.element)
    if chain is None:
        rule = rules(facts.task.width)[node.op]
        operands = facts.arguments(node, _operands(facts, ask.step, opened))
        return _canonical(rule(node.type, *operands)(ask.element), node.dtype)
    partial = chain.start if start is None else start
    for term in range(ask.low, ask.high):
        partial = chain.advance(partial, term, [read(*place) for place in chain.reads(term)])
    return partial


def _canonical(element: int, dtype: str) -> int:
    return BINARY32.nan if dtype == "float32" and BINARY32.is_nan(element) else element


def places_read(facts: Facts, ask: ShowOperands, operands: Mapping[int, NDArray[Any]]) -> set[tuple[int, int]]:
    """The (value, element) pairs that the referee will read for `ask`, but for those it computes itself.

    operands: whole, by their value's number. An index out of range among them is read like any other.
    """
    chain = facts.chain(ask.value, ask.element)
    bounded = facts.task.mode == "tolerant"
    if chain is not None and not bounded:
        terms = (chain.reads(term) for term in range(ask.low, min(ask.high, chain.terms)))
        return {place for places in terms for place in places if place[0] in operands}
    seen: set[tuple[int, int]] = set()

    def read(value: int, element: int) -> int:
        seen.add((value, element))
        held = operands[value]
        if held.dtype == np.float32:
            return int(np.ascontiguousarray(held).reshape(-1)[element : element + 1].view(np.uint32)[0])
        return int(held.reshape(-1)[element])

    try:
        if bounded:
            bound_at(facts, ask.step, ask.value, ask.element, read)
        else:
            _run(facts, ask, None, read)
    except MalformedRecord:
        return seen  # the referee will come as far, and find that the operation has no result
    return seen


# --- what is opened ----------------------------------------------------------------------------------------
class _Opened:
    """The operands of an opening, each proven when this is made, and which of them were read."""

    def __init__(self, facts: Facts, ask: ShowOperands, agreed: Agreed, opening: Opening) -> None:
        self._facts = facts
        values = [tensor.value for tensor in opening.tensors]
        if values != sorted(set(values)):
            raise VerificationFailed("the opening names a tensor twice, or not in order")
        tensors = {tensor.value: tensor for tensor in opening.tensors}
        for tensor in opening.tensors:
            _check_tensor(facts, ask, agreed, tensor)
        keys = [(tile.value, tile.tile) for tile in opening.tiles]
        if keys != sorted(set(keys)):
            raise VerificationFailed("the opening shows a tile twice, or not in order")
        for tile in opening.tiles:
            if tile.value not in tensors:
                raise VerificationFailed(f"a tile of value {tile.value}, whose root is not opened")
            kind, tensor = facts.type_of(tile.value), tensors[tile.value]
            merkle.verify_tile(
                tensor.root,
                tile=tile.tile,
                data=tile.data,
                path=tile.path,
                tree=tensor.tree,
                shape=kind.shape,
                dtype=kind.dtype,
            )
        self._tiles = {(tile.value, tile.tile): tile.data for tile in opening.tiles}
        self._unread = set(self._tiles)
        self._rootless = set(tensors) - {tile.value for tile in opening.tiles}

    def read(self, value: int, element: int) -> int:
        """One element. Raises VerificationFailed if it was not opened."""
        kind = self._facts.type_of(value)
        tile, word = merkle.tile_of(element, shape=kind.shape, dtype=kind.dtype)
        data = self._tiles.get((value, tile))
        if data is None:
            raise VerificationFailed(f"tile {tile} of value {value} is read and was not opened")
        self._unread.discard((value, tile))
        return merkle.tile_element(data, word, dtype=kind.dtype)

    def check_all_read(self) -> None:
        """Raises VerificationFailed if something was opened that the rule does not read."""
        if self._unread or self._rootless:
            raise VerificationFailed("the opening holds more than the operation reads")


def _check_tensor(facts: Facts, ask: ShowOperands, agreed: Agreed, tensor: OpenTensor) -> None:
    """Raise VerificationFailed unless the tensor's root is agreed: no input of the operation is free."""
    node = facts.node(ask.value)
    operands = set(node.refs()) if node is not None else {ask.value}
    if tensor.value not in operands:
        raise VerificationFailed(f"value {tensor.value} is opened, and the operation does not read it")
    place, leaf = facts.state_index(tensor.value), facts.trace_leaf(tensor.value)
    if place is not None:
        (hashed,) = facts.hashes("state", [tensor.root], place)
        tree = merkle.path_root_of(hashed, index=place, count=len(facts.names), path=tensor.path)
        back = facts.puts_back(ask.step) and facts.is_gauge(ask.value, ask.element)
        if facts.wrapped("state", 0, tree) != (agreed.base if back else agreed.before):
            raise VerificationFailed(
                f"value {tensor.value} is not in the state before the {'segment' if back else 'step'}"
            )
        return
    if leaf is None:
        raise VerificationFailed(f"value {tensor.value} is computed by the referee and not opened")
    count = facts.leaves("trace", 0)
    if merkle.path_root(tensor.root, index=leaf, count=count, path=tensor.path) not in agreed.traces:
        raise VerificationFailed(f"value {tensor.value} is not in the trace that both sides agree on")


def judge(facts: Facts, ask: ShowOperands, agreed: Agreed, data: bytes) -> Finding:
    """The referee's result for `ask` from an opening of its operands; of what is put back, the operand itself.

    Raises MalformedRecord, LimitExceeded, VerificationFailed for an opening that does not prove what is read.
    """
    item = facts.input(ask.value)
    if item is not None and item.role == "batch":
        return Finding(_batch_element(facts, ask, data), 1)
    opening = decode(Opening, data, bytes_max=params.OPENING_BYTES_MAX)
    if facts.puts_back(ask.step):
        opened = _Opened(facts, ask, agreed, opening)
        found = opened.read(ask.value, ask.element)
        opened.check_all_read()
        return Finding(found, 1)
    if item is not None:  # state that the step hands on untouched: its root is all there is to know
        tensors = {tensor.value: tensor for tensor in opening.tensors}
        if set(tensors) != {ask.value} or len(opening.tensors) != 1 or opening.tiles:
            raise VerificationFailed(f"the opening is not of the root of value {ask.value} alone")
        _check_tensor(facts, ask, agreed, tensors[ask.value])
        return Finding(tensors[ask.value].root, 1)
    opened = _Opened(facts, ask, agreed, opening)
    node = facts.node(ask.value)
    assert node is not None, "a literal is no leaf"
    operations = 2 * (ask.high - ask.low) if ask.high else OPERATIONS[node.op].weight
    result: int | Partial | Bound
    try:
        if facts.task.mode == "tolerant":
            result = bound_at(facts, ask.step, ask.value, ask.element, opened.read)
            chain = facts.chain(ask.value, ask.element)
            operations = chain.terms if chain is not None else operations  # a multiplication and an addition a term
        else:
            result = _run(facts, ask, agreed.start, opened.read)
    except MalformedRecord:
        opened.check_all_read()
        return Finding(None, operations)
    opened.check_all_read()
    return Finding(result, operations)


# --- data --------------------------------------------------------------------------------------------------
def data_place(facts: Facts, ask: ShowOperands) -> DataPlace | None:
    """Where the disputed element of a batch stands in the data, if a batch input is disputed."""
    item = facts.input(ask.value)
    if item is None or item.role != "batch":
        return None
    ref, element = source_of(facts.task, item, facts.number_of(ask.step), ask.element)
    chunk, at = divmod(element * ITEM_BYTES[ref.dtype], params.BLOB_CHUNK_BYTES)
    return DataPlace(ref, element, chunk, at)


def _batch_element(facts: Facts, ask: ShowOperands, data: bytes) -> int:
    place, kind = data_place(facts, ask), facts.type_of(ask.value)
    assert place is not None, "asked for a batch input only"
    opening = decode(DataOpening, data, bytes_max=DATA_OPENING_BYTES_MAX)
    manifest = BlobManifest.from_bytes(opening.manifest, blob=place.array.blob)
    if manifest.size != place.array.size_bytes:
        raise VerificationFailed(f"a blob of {manifest.size} bytes, the task says {place.array.size_bytes}")
    manifest.check_chunk(place.chunk, opening.chunk)
    stored = place.array.dtype
    raw = opening.chunk[place.at : place.at + ITEM_BYTES[stored]]
    element = int.from_bytes(raw, "little", signed=stored in ("int32", "int64"))
    if stored != kind.dtype:
        one = Array(stored, (1,), (element,))
        element = rules(facts.task.width)["to.dtype"](TensorType(kind.dtype, (1,)), one, kind.dtype)(0)
    return _canonical(element, kind.dtype)
