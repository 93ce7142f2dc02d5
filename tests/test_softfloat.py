"""The IEEE arithmetic in Python integers is the processor's, bit for bit. numpy's scalars are the processor's here."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from protocol.softfloat import BINARY32, BINARY64, Format, round_to_even

FORMATS = {"binary32": (BINARY32, np.uint32, np.float32), "binary64": (BINARY64, np.uint64, np.float64)}
BINARY_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv,
}  # fmt: skip
RANDOM = 4000


def patterns(form: Format, unsigned: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Pairs: all of the odd values with each other, any with any, and any with one of nearly its exponent."""
    rng = np.random.default_rng(0)
    top, unit = form.infinity, 1 << form.fraction_bits
    odd = [
        0, 1, 2, 3, unit - 1, unit, unit + 1, 2 * unit, form.one - 1, form.one, form.one + 1, form.one + unit // 2,
        form.one + form.fraction_bits * unit, form.one + (form.fraction_bits + 1) * unit,
        form.one + (form.fraction_bits + 1) * unit + 1, top - unit, top - 2, top - 1, top, form.nan,
    ]  # fmt: skip
    special = np.array([*odd, *(form.sign | x for x in odd)], dtype=unsigned)
    bits = form.sign.bit_length()
    any_, other = (rng.integers(0, 2**bits, RANDOM, dtype=np.uint64).astype(unsigned) for _ in range(2))
    near = any_ + rng.integers(0, 4 * unit, RANDOM, dtype=np.uint64).astype(unsigned)
    left = np.concatenate([np.repeat(special, len(special)), any_, any_])
    right = np.concatenate([np.tile(special, len(special)), other, near])
    return left, right ^ np.where(rng.integers(0, 2, len(right)) == 1, unsigned(form.sign), unsigned(0))


def assert_same(form: Format, found: list[int], expected: NDArray[Any], unsigned: Any) -> None:
    for index, (got, want) in enumerate(zip(found, expected.view(unsigned).tolist(), strict=True)):
        assert got == (form.nan if form.is_nan(want) else want), index


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("operation", BINARY_OPERATIONS)
def test_arithmetic_is_the_processors(name: str, operation: str) -> None:
    form, unsigned, float_ = FORMATS[name]
    left, right = patterns(form, unsigned)
    with np.errstate(all="ignore"):
        expected = BINARY_OPERATIONS[operation](left.view(float_), right.view(float_))
    found = [getattr(form, operation)(x, y) for x, y in zip(left.tolist(), right.tolist(), strict=True)]
    assert_same(form, found, expected, unsigned)


@pytest.mark.parametrize("name", FORMATS)
def test_square_roots_and_comparisons_are_the_processors(name: str) -> None:
    form, unsigned, float_ = FORMATS[name]
    left, right = patterns(form, unsigned)
    with np.errstate(all="ignore"):
        assert_same(form, [form.square_root(x) for x in left.tolist()], np.sqrt(left.view(float_)), unsigned)
    pairs = list(zip(left.tolist(), right.tolist(), strict=True))
    assert [form.less(x, y) for x, y in pairs] == (left.view(float_) < right.view(float_)).tolist()
    assert [form.equal(x, y) for x, y in pairs] == (left.view(float_) == right.view(float_)).tolist()


def test_conversions_are_the_processors() -> None:
    narrow, wide = patterns(BINARY32, np.uint32)[0], patterns(BINARY64, np.uint64)[0]
    between = wide.copy()  # the exponents that float32 has: most float64 are beyond them
    between[:] = (wide & np.uint64(0x800FFFFFFFFFFFFF)) | (
        (wide >> np.uint64(52)) % np.uint64(300) + np.uint64(870)
    ) << 52
    with np.errstate(all="ignore"):
        found = [BINARY32.convert(x, BINARY64) for x in narrow.tolist()]
        assert_same(BINARY64, found, narrow.view(np.float32).astype(np.float64), np.uint64)
        for values in (wide, between):
            found = [BINARY64.convert(x, BINARY32) for x in values.tolist()]
            assert_same(BINARY32, found, values.view(np.float64).astype(np.float32), np.uint32)
    integers = np.concatenate([np.arange(-70, 70), wide.view(np.int64), (2**24 + np.arange(99)) << 30])
    assert_same(BINARY32, [BINARY32.from_int(n) for n in integers.tolist()], integers.astype(np.float32), np.uint32)
    assert_same(BINARY64, [BINARY64.from_int(n) for n in integers.tolist()], integers.astype(np.float64), np.uint64)
    for x in narrow.tolist():
        if BINARY32.is_finite(x):
            assert BINARY32.truncated(x) == int(np.uint32(x).view(np.float32))


@settings(derandomize=True, deadline=None, max_examples=200, database=None)
@given(st.integers(0, 2**64 - 1), st.integers(-1100, 1100))
def test_rounding_is_of_the_exact_value(value: int, exponent: int) -> None:
    # A float64 of 53 bits that is no subnormal holds value * 2**exponent exactly, so numpy rounds it to float32 once.
    kept = value >> 11
    for number in (kept, -kept):
        with np.errstate(all="ignore"):
            expected = np.float32(np.ldexp(np.float64(number), exponent))
        if abs(number) * 2 ** max(0, exponent) >= 2**1000 or (number and exponent < -1000):
            continue
        assert BINARY32.rounded(number, exponent) == int(expected.view(np.uint32))


def test_ties_go_to_even_in_both_directions() -> None:
    assert [round_to_even(n, 2) for n in range(13)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3]
    assert round_to_even(5, -3) == 40
    assert BINARY32.rounded(2**128 - 2**103 - 1, 0) == BINARY32.infinity - 1
    assert BINARY32.rounded(2**128 - 2**103, 0) == BINARY32.infinity
    assert BINARY32.rounded(1, -150) == 0 and BINARY32.rounded(3, -151) == 1
    assert BINARY32.rounded(-1, -150) == BINARY32.sign
