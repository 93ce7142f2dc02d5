"""Small tensors as integers, and the operations that only move their elements. docs/exact.md, "Movement".

An element is what the machine stores, as an int: the bit pattern of a float32, the value of an int64, int32 or uint8,
0 or 1 for a bool. A rule of the reference takes the type of the result and the operation's arguments and gives a
function from the row-major index of an output element to that element, so that one element costs what it needs and
no more. Rules trust that protocol.operations.result_type accepted the arguments.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from protocol.errors import LocalProtocolError, MalformedRecord
from protocol.operations import TensorType
from protocol.softfloat import BINARY32, BINARY64

__all__ = ["MOVEMENT", "Array", "Element", "PartialArray", "Rule", "number", "offset", "position"]

Element: TypeAlias = "Callable[[int], int]"
Rule: TypeAlias = "Callable[..., Element]"

_RANGES = {
    "float32": (0, 2**32),
    "int64": (-(2**63), 2**63),
    "int32": (-(2**31), 2**31),
    "uint8": (0, 2**8),
    "bool": (0, 2),
}


@dataclass(frozen=True)
class Array:
    """A tensor: dtype by name, shape, and the elements in row-major order, each as the module says."""

    dtype: str
    shape: tuple[int, ...]
    elements: Sequence[int]

    def __post_init__(self) -> None:
        if self.dtype not in _RANGES or len(self.elements) != math.prod(self.shape):
            raise LocalProtocolError(f"{len(self.elements)} elements for a {self.dtype} of shape {self.shape}")
        low, high = _RANGES[self.dtype]
        if not all(low <= element < high for element in self.elements):
            raise LocalProtocolError(f"an element that no {self.dtype} holds")

    @property
    def type(self) -> TensorType:
        """Its dtype and shape."""
        return TensorType(self.dtype, self.shape)

    def at(self, place: Sequence[int]) -> int:
        """The element at `place`, one number for each dimension."""
        return self.elements[offset(place, self.shape)]

    def under(self, place: Sequence[int]) -> int:
        """The element that stands at `place` of a shape this one broadcasts to."""
        own = place[len(place) - len(self.shape) :]
        return self.at([0 if size == 1 else i for i, size in zip(own, self.shape, strict=True)])


@dataclass(frozen=True)
class PartialArray(Array):
    """A tensor of which a rule may read single elements, as a referee has it: `elements` answers or raises when it is
    read, and nothing is checked ahead of that."""

    def __post_init__(self) -> None:
        """What is not there cannot be checked."""


def position(index: int, shape: tuple[int, ...]) -> list[int]:
    """The place of row-major element `index` of `shape`, one number for each dimension."""
    place = []
    for size in reversed(shape):
        index, at = divmod(index, size)
        place.append(at)
    return place[::-1]


def offset(place: Sequence[int], shape: tuple[int, ...]) -> int:
    """The row-major index of `place` in `shape`."""
    index = 0
    for at, size in zip(place, shape, strict=True):
        index = index * size + at
    return index


def number(value: int | float, dtype: str) -> int:
    """A number of a Program as an element of `dtype`: rounded once to float32, infinite beyond its range."""
    if dtype != "float32":
        return int(value)
    if isinstance(value, int):
        return BINARY32.from_int(value)
    return BINARY64.convert(int.from_bytes(struct.pack("<d", value), "little"), BINARY32)


def _row(index: int, rows: int, what: str) -> int:
    if not 0 <= index < rows:
        raise MalformedRecord(f"{what} reads row {index} of {rows}", why="the data holds a number outside the table")
    return index


def _checked(index: Array, rows: int, what: str) -> None:
    if not isinstance(index, PartialArray):
        for row in index.elements:
            _row(row, rows, what)


def _reshape(result: TensorType, x: Array, shape: tuple[int, ...]) -> Element:
    return x.elements.__getitem__


def _permute(result: TensorType, x: Array, dims: tuple[int, ...]) -> Element:
    def element(index: int) -> int:
        place = position(index, result.shape)
        own = [0] * len(dims)
        for axis, dim in enumerate(dims):
            own[dim] = place[axis]
        return x.at(own)

    return element


def _expand(result: TensorType, x: Array, shape: tuple[int, ...]) -> Element:
    return lambda index: x.under(position(index, result.shape))


def _slice(result: TensorType, x: Array, dim: int, start: int, end: int, step: int) -> Element:
    def element(index: int) -> int:
        place = position(index, result.shape)
        place[dim] = start + step * place[dim]
        return x.at(place)

    return element


def _cat(result: TensorType, tensors: tuple[Array, ...], dim: int) -> Element:
    def element(index: int) -> int:
        place = position(index, result.shape)
        for x in tensors:
            if place[dim] < x.shape[dim]:
                return x.at(place)
            place[dim] -= x.shape[dim]
        raise AssertionError("an index beyond the result")

    return element


def _pad(result: TensorType, x: Array, pads: tuple[int, ...], value: float) -> Element:
    fill = number(value, x.dtype)

    def element(index: int) -> int:
        place = position(index, result.shape)
        for axis in range(len(pads) // 2):  # pairs (before, after), the last dimension first
            place[-1 - axis] -= pads[2 * axis]
        inside = all(0 <= at < size for at, size in zip(place, x.shape, strict=True))
        return x.at(place) if inside else fill

    return element


def _embedding(result: TensorType, weight: Array, index: Array) -> Element:
    _checked(index, weight.shape[0], "embedding")

    def element(at: int) -> int:
        place, column = divmod(at, weight.shape[1])
        return weight.at((_row(index.elements[place], weight.shape[0], "embedding"), column))

    return element


def _gather(result: TensorType, x: Array, dim: int, index: Array) -> Element:
    _checked(index, x.shape[dim], "gather")

    def element(at: int) -> int:
        place = position(at, result.shape)
        place[dim] = _row(index.elements[at], x.shape[dim], "gather")
        return x.at(place)

    return element


def _where(result: TensorType, condition: Array, x: Array, y: Array) -> Element:
    def element(index: int) -> int:
        place = position(index, result.shape)
        return (x if condition.under(place) else y).under(place)

    return element


def _full(result: TensorType, shape: tuple[int, ...], value: float, dtype: str) -> Element:
    fill = number(value, dtype)
    return lambda index: fill


def _arange(result: TensorType, start: int, end: int, step: int) -> Element:
    return lambda index: start + step * index


MOVEMENT: dict[str, Rule] = {
    "reshape.default": _reshape,
    "permute.default": _permute,
    "expand.default": _expand,
    "slice.Tensor": _slice,
    "cat.default": _cat,
    "constant_pad_nd.default": _pad,
    "embedding.default": _embedding,
    "gather.default": _gather,
    "where.self": _where,
    "full.default": _full,
    "arange.start_step": _arange,
}
