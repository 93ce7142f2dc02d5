"""Reductions as a sequence of partial results, so that a search finds the one term two players differ in. DESIGN §7.

An element of a product or a sum reads a row of others. Its value is the end of a sequence: first the running exponents
of what it reads, then the running exact sum, then one scaling. Partial result p + 1 follows from partial result p and
the operands of term p alone, for every p, so two sides that agree on p and differ on p + 1 differ in one multiply-add.

Each rule says it twice: `advance`, by the leaves of protocol.reference_products, for a referee; `partials`, by numpy,
for a player who has the whole row. Numbers of terms: a product over K and a sum over n have 2K and 2n, `amax` has n.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from protocol import params
from protocol.errors import MalformedRecord
from protocol.operations import TensorType
from protocol.program import Items, Node, Program, Ref
from protocol.reference_movement import offset, position
from protocol.reference_products import (
    EXPONENT_POISONED,
    EXPONENT_ZERO,
    exponent_of,
    in_units,
    largest,
    quantised,
    scaled,
    sum_bits,
    sum_scaled,
)
from protocol.softfloat import BINARY32

__all__ = ["REDUCTIONS", "Arrays", "Chain", "Partial", "chain_of", "fits_opening", "tiles_read"]

Partial: TypeAlias = tuple[int, ...]
Place: TypeAlias = tuple[int, int]  # the number of an operand's value, and its row-major element
Arrays: TypeAlias = "Callable[[int], NDArray[Any]]"

_EXPONENT = (EXPONENT_ZERO, EXPONENT_POISONED)
_WHOLE = (-(2**63), 2**63 - 1)


class Chain(Protocol):
    """The partial results of one element. terms: how many follow the start. start: agreed by everybody."""

    @property
    def terms(self) -> int:
        """How many partial results follow `start`."""

    @property
    def start(self) -> Partial:
        """The one before the first term."""

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """The least and the largest that each number of a partial result can be: what lies outside is nobody's sum."""

    def reads(self, term: int) -> tuple[Place, ...]:
        """The operands' elements that term `term` reads."""

    def advance(self, partial: Partial, term: int, values: Sequence[int]) -> Partial:
        """The partial result after `term`. values: what `reads` names. Raises MalformedRecord for an index beyond."""

    def finish(self, partial: Partial) -> int:
        """The element, from the last partial result: float32 bits."""

    def partials(self, arrays: Arrays, positions: Sequence[int]) -> list[Partial]:
        """The partial results after so many terms each. arrays: the operands by their value's number."""


def _exponents(x: NDArray[Any]) -> NDArray[np.int64]:
    """The running exponent after each of the float32 values x, as `exponent_of` has it of them all."""
    with np.errstate(invalid="ignore"):  # a signalling NaN is quieted
        mantissa, exponent = np.frexp(x.astype(np.float64))
    each = np.where(mantissa == 0, EXPONENT_ZERO, exponent)
    each = np.where(np.isfinite(x), each, EXPONENT_POISONED)
    return np.maximum.accumulate(each.astype(np.int64))


def _integers(x: NDArray[Any], exponent: int, bits: int) -> NDArray[np.int64]:
    """x as integers of 2**(exponent - bits), ties to even; zeros if poisoned. A power of two scales exactly."""
    if exponent == EXPONENT_POISONED:
        return np.zeros(x.shape, dtype=np.int64)
    return np.rint(np.ldexp(x.astype(np.float64), bits - exponent)).astype(np.int64)


@dataclass(frozen=True)
class _Product:
    """One element of mm or bmm: terms 0 to K-1 find the exponents of its row and column, K to 2K-1 add."""

    left: int
    right: int
    inner: int
    first: int  # of the row, in the left operand
    second: int  # of the column, in the right one
    stride: int
    width: int
    start: Partial = (EXPONENT_ZERO, EXPONENT_ZERO, 0)
    bounds: tuple[tuple[int, int], ...] = (_EXPONENT, _EXPONENT, _WHOLE)

    @property
    def terms(self) -> int:
        return 2 * self.inner

    def reads(self, term: int) -> tuple[Place, ...]:
        k = term % self.inner
        return (self.left, self.first + k), (self.right, self.second + k * self.stride)

    def advance(self, partial: Partial, term: int, values: Sequence[int]) -> Partial:
        row, column, whole = partial
        a, b = values
        if term < self.inner:
            return max(row, exponent_of([a])), max(column, exponent_of([b])), whole
        if not _finite(values):  # the exponents that were agreed on deny it: it counts as zero, as if they had not
            return partial
        (p,), (q,) = quantised([a], row, self.width), quantised([b], column, self.width)
        return row, column, whole + p * q

    def finish(self, partial: Partial) -> int:
        row, column, whole = partial
        return scaled(whole, row, column, self.width)

    def partials(self, arrays: Arrays, positions: Sequence[int]) -> list[Partial]:
        a = arrays(self.left).reshape(-1)[self.first : self.first + self.inner]
        last = self.second + (self.inner - 1) * self.stride
        b = arrays(self.right).reshape(-1)[self.second : last + 1 : self.stride]
        rows, columns = _exponents(a), _exponents(b)
        bound = (1 << (self.width - 1)) - 1
        p = _integers(a, int(rows[-1]), self.width - 1).clip(-bound, bound)
        q = _integers(b, int(columns[-1]), self.width - 1).clip(-bound, bound)
        sums = np.cumsum(p * q)
        found: list[Partial] = []
        for place in positions:
            at = min(place, self.inner) - 1
            whole = int(sums[place - self.inner - 1]) if place > self.inner else 0
            found.append((int(rows[at]), int(columns[at]), whole) if place else self.start)
        return found


@dataclass(frozen=True)
class _Reduced:
    """What one element of a sum or an `amax` reads of its operand x."""

    operand: int
    kind: TensorType
    dims: tuple[int, ...]
    place: tuple[int, ...]  # of the result, with the dimensions `dims` kept

    @property
    def count(self) -> int:
        """How many elements it reads."""
        return math.prod(self.kind.shape[dim] for dim in self.dims)

    def element(self, k: int) -> int:
        """The row-major element of x that is read as number k."""
        at = list(self.place)
        for dim, i in zip(self.dims, position(k, tuple(self.kind.shape[dim] for dim in self.dims)), strict=True):
            at[dim] = i
        return offset(at, self.kind.shape)

    def values(self, arrays: Arrays) -> NDArray[Any]:
        """All of them in their order."""
        cut = tuple(slice(None) if axis in self.dims else at for axis, at in enumerate(self.place))
        return np.asarray(arrays(self.operand)[cut]).reshape(-1)


@dataclass(frozen=True)
class _Sum:
    """One element of a sum: terms 0 to n-1 find the exponent, n to 2n-1 add."""

    over: _Reduced
    start: Partial = (EXPONENT_ZERO, 0)
    bounds: tuple[tuple[int, int], ...] = (_EXPONENT, _WHOLE)

    @property
    def terms(self) -> int:
        return 2 * self.over.count

    def reads(self, term: int) -> tuple[Place, ...]:
        return ((self.over.operand, self.over.element(term % self.over.count)),)

    def advance(self, partial: Partial, term: int, values: Sequence[int]) -> Partial:
        exponent, whole = partial
        if term < self.over.count:
            return max(exponent, exponent_of(values)), whole
        if exponent == EXPONENT_POISONED:
            return partial
        (added,) = in_units(values, exponent - sum_bits(self.over.count)) if _finite(values) else (0,)
        return exponent, whole + added

    def finish(self, partial: Partial) -> int:
        return sum_scaled(partial[1], partial[0], sum_bits(self.over.count))

    def partials(self, arrays: Arrays, positions: Sequence[int]) -> list[Partial]:
        x = self.over.values(arrays)
        exponents = _exponents(x)
        sums = np.cumsum(_integers(x, int(exponents[-1]), sum_bits(len(x))))
        found: list[Partial] = []
        for at in positions:
            whole = int(sums[at - len(x) - 1]) if at > len(x) else 0
            found.append((int(exponents[min(at, len(x)) - 1]), whole) if at else self.start)
        return found


def _finite(values: Sequence[int]) -> bool:
    return all(BINARY32.is_finite(x) for x in values)


@dataclass(frozen=True)
class _Largest:
    """One element of `amax`: the largest so far; -1 before the first."""

    over: _Reduced
    start: Partial = (-1,)
    bounds: tuple[tuple[int, int], ...] = ((0, 2**32 - 1),)

    @property
    def terms(self) -> int:
        return self.over.count

    def reads(self, term: int) -> tuple[Place, ...]:
        return ((self.over.operand, self.over.element(term)),)

    def advance(self, partial: Partial, term: int, values: Sequence[int]) -> Partial:
        (so_far,) = partial
        return (largest([*([so_far] if so_far >= 0 else []), *values]),)

    def finish(self, partial: Partial) -> int:
        return partial[0]

    def partials(self, arrays: Arrays, positions: Sequence[int]) -> list[Partial]:
        with np.errstate(invalid="ignore"):  # a signalling NaN is quieted; of either zero it makes the positive one
            x = np.maximum.accumulate(self.over.values(arrays)) + np.float32(0)
        bits = np.where(np.isnan(x), np.uint32(BINARY32.nan), x.view(np.uint32))
        return [(int(bits[at - 1]),) if at else self.start for at in positions]


@dataclass(frozen=True)
class _EmbeddingGradient:
    """One element of embedding_dense_backward: terms 0 to R-1 find the column's exponent, R to 2R-1 add the rows whose
    index is this row's. The third number is 1 once there was one: without any the element is zero, poisoned or not."""

    grad: int
    index: int
    count: int
    columns: int
    row: int
    column: int
    rows: int
    padding: int
    start: Partial = (EXPONENT_ZERO, 0, 0)
    bounds: tuple[tuple[int, int], ...] = (_EXPONENT, _WHOLE, (0, 1))

    @property
    def terms(self) -> int:
        return 2 * self.count

    def reads(self, term: int) -> tuple[Place, ...]:
        place = term % self.count
        value = (self.grad, place * self.columns + self.column)
        return (value,) if term < self.count else (value, (self.index, place))

    def advance(self, partial: Partial, term: int, values: Sequence[int]) -> Partial:
        exponent, whole, seen = partial
        if term < self.count:
            return max(exponent, exponent_of(values)), whole, seen
        if not 0 <= values[1] < self.rows:
            raise MalformedRecord(f"embedding gradient of row {values[1]} of {self.rows}")
        if values[1] != self.row:
            return partial
        poisoned = exponent == EXPONENT_POISONED or not _finite(values[:1])
        (added,) = (0,) if poisoned else in_units(values[:1], exponent - sum_bits(self.count))
        return exponent, whole + added, 1

    def finish(self, partial: Partial) -> int:
        exponent, whole, seen = partial
        if self.row == self.padding or not seen:
            return 0
        return sum_scaled(whole, exponent, sum_bits(self.count))

    def partials(self, arrays: Arrays, positions: Sequence[int]) -> list[Partial]:
        x = arrays(self.grad).reshape(-1, self.columns)[:, self.column]
        hits = arrays(self.index).reshape(-1) == self.row
        exponents = _exponents(x)
        sums = np.cumsum(np.where(hits, _integers(x, int(exponents[-1]), sum_bits(self.count)), 0))
        found: list[Partial] = []
        for at in positions:
            exponent = int(exponents[min(at, self.count) - 1]) if at else EXPONENT_ZERO
            place = at - self.count - 1
            found.append((exponent, int(sums[place]), int(hits[: place + 1].any())) if place >= 0 else (exponent, 0, 0))
        return found


# --- which operation is which ------------------------------------------------------------------------------
Maker: TypeAlias = "Callable[[Program, Node, int, int], Chain]"


def _numbers(node: Node) -> list[int]:
    return [int(arg) for arg in node.args if isinstance(arg, int)]


def _product(program: Program, node: Node, element: int, width: int) -> Chain:
    left, right = node.refs()
    rows, inner = program.types[left].shape[-2:]
    columns = node.shape[-1]
    matrix, place = divmod(element, rows * columns)
    row, column = divmod(place, columns)
    second = matrix * inner * columns + column
    return _Product(left, right, inner, (matrix * rows + row) * inner, second, columns, width)


def _reduced(program: Program, node: Node, element: int) -> _Reduced:
    x, dims = node.args[0], node.args[1]
    assert isinstance(x, Ref), "refused by result_type"
    assert isinstance(dims, Items), "refused by result_type"
    over = tuple(dim for dim in dims.items if isinstance(dim, int))
    kind = program.types[x.value]
    kept = tuple(1 if axis in over else size for axis, size in enumerate(kind.shape))
    return _Reduced(x.value, kind, over, tuple(position(element, kept)))


def _embedding_gradient(program: Program, node: Node, element: int, width: int) -> Chain:
    grad, index = node.refs()
    rows, padding = _numbers(node)[:2]
    columns = program.types[grad].shape[-1]
    row, column = divmod(element, columns)
    return _EmbeddingGradient(grad, index, program.types[index].elements, columns, row, column, rows, padding)


REDUCTIONS: Mapping[str, Maker] = {
    "mm.default": _product,
    "bmm.default": _product,
    "sum.dim_IntList": lambda program, node, element, width: _Sum(_reduced(program, node, element)),
    "amax.default": lambda program, node, element, width: _Largest(_reduced(program, node, element)),
    "embedding_dense_backward.default": _embedding_gradient,
}


def chain_of(program: Program, node: Node, element: int, width: int) -> Chain | None:
    """The partial results of `element` of a node's result, or None if it reads only a few others directly.

    width: of the task. An embedding gradient of no rows reads nothing, so it is no reduction.
    """
    maker = REDUCTIONS.get(node.op)
    chain = maker(program, node, element, width) if maker is not None else None
    return chain if chain is not None and chain.terms else None


def tiles_read(chain: Chain, low: int, high: int, tile: Callable[[Place], tuple[int, int]]) -> int:
    """How many different tiles the terms `low` to `high` - 1 read. tile: of a place, by its operand and number."""
    places = itertools.chain.from_iterable(chain.reads(term) for term in range(low, high))
    return len({tile(place) for place in places})


def fits_opening(chain: Chain, tile: Callable[[Place], tuple[int, int]]) -> bool:
    """Whether all terms of an element can be opened at once. Looks at no more terms than that many tiles hold."""
    seen: set[tuple[int, int]] = set()
    for term in range(chain.terms):
        seen.update(tile(place) for place in chain.reads(term))
        if len(seen) > params.OPENING_TILES_MAX:
            return False
    return True
