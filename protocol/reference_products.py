"""Matrix products, sums and maxima by their definition in integers. docs/exact.md, "Products" and "Sums".

`exponent_of`, `quantised` and `scaled` are the leaves of a product, each a function of one row, or of two exponents
and one integer: what lies between them is a sum of products of integers, which may be cut into blocks anywhere.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from math import prod

from protocol import params
from protocol.errors import LimitExceeded, LocalProtocolError, MalformedRecord
from protocol.operations import TensorType
from protocol.reference_movement import Array, Element, Rule, offset, position
from protocol.softfloat import BINARY32, round_to_even

__all__ = [
    "EXPONENT_POISONED",
    "EXPONENT_ZERO",
    "REDUCTIONS",
    "WIDTHS",
    "exponent_of",
    "in_units",
    "largest",
    "over",
    "product_rules",
    "quantised",
    "scaled",
    "sum_bits",
    "sum_scaled",
    "total",
]

WIDTHS = (8, 15, 22)
EXPONENT_ZERO = -149  # of a row of zeros: one below that of the smallest subnormal
EXPONENT_POISONED = 129  # of a row with a NaN or an infinity: one above that of the largest number
_SUM_BITS_MAX = 30


def exponent_of(values: Sequence[int]) -> int:
    """e with the largest magnitude f * 2**e, 1/2 <= f < 1; or one of the two exponents above. values: float32."""
    exponent = EXPONENT_ZERO
    for x in values:
        if not BINARY32.is_finite(x):
            return EXPONENT_POISONED
        mantissa, unit = BINARY32.split(x)
        if mantissa:
            exponent = max(exponent, unit + mantissa.bit_length())
    return exponent


def in_units(values: Sequence[int], unit: int) -> list[int]:
    """float32 values as integers of 2**unit, ties to even."""
    found = []
    for x in values:
        mantissa, exponent = BINARY32.split(x)
        magnitude = round_to_even(abs(mantissa), unit - exponent)
        found.append(-magnitude if mantissa < 0 else magnitude)
    return found


def quantised(values: Sequence[int], exponent: int, width: int) -> list[int]:
    """float32 values as integers of `width` bits, sign included, times 2**(exponent - width + 1).

    exponent: theirs, by `exponent_of`. What would round up to 2**(width - 1) is one less. Poisoned values are 0.
    """
    if exponent == EXPONENT_POISONED:
        return [0] * len(values)
    bound = (1 << (width - 1)) - 1
    return [max(-bound, min(bound, a)) for a in in_units(values, exponent - (width - 1))]


def scaled(whole: int, row_exponent: int, column_exponent: int, width: int) -> int:
    """An element of a product from the exact sum of its integer products, rounded once to float32."""
    if EXPONENT_POISONED in (row_exponent, column_exponent):
        return BINARY32.nan
    found = BINARY32.rounded(whole, row_exponent + column_exponent - 2 * (width - 1))
    return 0 if BINARY32.is_zero(found) else found  # a negative result that rounds to zero is +0.0 too


def _product(result: TensorType, x: Array, y: Array, *, width: int) -> Element:
    """mm, and bmm, which is an mm of each pair of matrices."""
    rows, inner, columns = x.shape[-2], x.shape[-1], y.shape[-1]
    if width == 22 and inner > params.PRODUCT_LENGTH_22_MAX:
        raise LimitExceeded(f"a product over {inner} at width 22, at most {params.PRODUCT_LENGTH_22_MAX}")

    @functools.cache
    def row(matrix: int, at: int) -> tuple[int, list[int]]:
        first = (matrix * rows + at) * inner
        values = x.elements[first : first + inner]
        exponent = exponent_of(values)
        return exponent, quantised(values, exponent, width)

    @functools.cache
    def column(matrix: int, at: int) -> tuple[int, list[int]]:
        first = matrix * inner * columns
        values = y.elements[first + at : first + inner * columns : columns]
        exponent = exponent_of(values)
        return exponent, quantised(values, exponent, width)

    def element(index: int) -> int:
        matrix, place = divmod(index, rows * columns)
        (row_exponent, a), (column_exponent, b) = row(matrix, place // columns), column(matrix, place % columns)
        whole = sum(p * q for p, q in zip(a, b, strict=True))
        return scaled(whole, row_exponent, column_exponent, width)

    return element


def product_rules(width: int) -> dict[str, Rule]:
    """The rules of mm and bmm at `width`, one of WIDTHS."""
    if width not in WIDTHS:
        raise LocalProtocolError(f"no exact product of width {width}", next_step=f"use a width of {WIDTHS}")
    rule = functools.partial(_product, width=width)
    return {"mm.default": rule, "bmm.default": rule}


# --- sums and maxima ---------------------------------------------------------------------------------------
def sum_bits(count: int) -> int:
    """The bits kept of each of `count` values: 30, or fewer if their sum could reach 2**53."""
    bits = _SUM_BITS_MAX
    while count << bits > 2**53:
        bits -= 1
    return bits


def total(values: Sequence[int]) -> int:
    """The sum of float32 values, at least one, as float32: rounded to a common unit, added, rounded once."""
    return _total(values, exponent_of(values), sum_bits(len(values)))


def _total(values: Sequence[int], exponent: int, bits: int) -> int:
    if exponent == EXPONENT_POISONED:
        return BINARY32.nan
    return sum_scaled(sum(in_units(values, exponent - bits)), exponent, bits)


def sum_scaled(whole: int, exponent: int, bits: int) -> int:
    """A sum from the exact sum of its integers, rounded once to float32; NaN if its values are poisoned."""
    return BINARY32.nan if exponent == EXPONENT_POISONED else BINARY32.rounded(whole, exponent - bits)


def largest(values: Sequence[int]) -> int:
    """The largest of float32 values, at least one: NaN if any is, +0.0 for either zero."""
    if any(BINARY32.is_nan(x) for x in values):
        return BINARY32.nan
    found = max(values, key=BINARY32.order)
    return 0 if BINARY32.is_zero(found) else found


def over(x: Array, dims: tuple[int, ...], place: Sequence[int]) -> Iterator[int]:
    """The elements of x that one result reads; place: of that result, with the dimensions `dims` kept."""
    at = list(place)
    for inner in itertools.product(*(range(x.shape[dim]) for dim in dims)):
        for dim, i in zip(dims, inner, strict=True):
            at[dim] = i
        yield x.elements[offset(at, x.shape)]


def _sum(result: TensorType, x: Array, dims: tuple[int, ...], keepdim: bool) -> Element:
    kept = tuple(1 if axis in dims else size for axis, size in enumerate(x.shape))
    return lambda index: total(list(over(x, dims, position(index, kept))))


def _amax(result: TensorType, x: Array, dims: tuple[int, ...], keepdim: bool) -> Element:
    kept = tuple(1 if axis in dims else size for axis, size in enumerate(x.shape))
    return lambda index: largest(list(over(x, dims, position(index, kept))))


def _embedding_backward(result: TensorType, grad: Array, index: Array, rows: int, padding: int, scale: bool) -> Element:
    columns = grad.shape[-1]
    count = prod(index.shape)
    for row in index.elements:
        if not 0 <= row < rows:
            raise MalformedRecord(f"embedding gradient of row {row} of {rows}")

    @functools.cache
    def exponent(column: int) -> int:
        return exponent_of(grad.elements[column::columns])

    def element(at: int) -> int:
        row, column = divmod(at, columns)
        places = [place for place, number in enumerate(index.elements) if number == row]
        if row == padding or not places:
            return 0
        values = [grad.elements[place * columns + column] for place in places]
        return _total(values, exponent(column), sum_bits(count))

    return element


REDUCTIONS: dict[str, Rule] = {
    "sum.dim_IntList": _sum,
    "amax.default": _amax,
    "embedding_dense_backward.default": _embedding_backward,
}
