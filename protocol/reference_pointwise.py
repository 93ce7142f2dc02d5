"""Conversion and the operations of one rounding or none for each element. docs/exact.md, "Element-wise"."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TypeAlias

from protocol.operations import TensorType
from protocol.reference_movement import Array, Element, Rule, number, position
from protocol.softfloat import BINARY32

__all__ = ["POINTWISE"]

One: TypeAlias = "Callable[[int], int]"
Two: TypeAlias = "Callable[[int, int], int]"

_INT64_FLOAT_MAX = 0x5EFFFFFF  # 2**63 - 2**39, the largest float32 that an int64 holds


def _wrapped(value: int) -> int:
    """`value` as an int64 keeps it: modulo 2**64."""
    return (value + 2**63) % 2**64 - 2**63


def _unary(floats: One, integers: One | None = None) -> Rule:
    def rule(result: TensorType, x: Array) -> Element:
        if x.dtype == "float32":
            return lambda index: floats(x.elements[index])
        assert integers is not None, "refused by result_type"
        exact = integers
        return lambda index: _wrapped(exact(x.elements[index]))

    return rule


def _binary(floats: Two, integers: Two | None = None) -> Rule:
    def rule(result: TensorType, x: Array, y: Array | int | float) -> Element:
        function = floats if x.dtype == "float32" else integers
        assert function is not None, "refused by result_type"

        def element(index: int) -> int:
            place = position(index, result.shape)
            second = y.under(place) if isinstance(y, Array) else number(y, x.dtype)
            value = function(x.under(place), second)
            return value if x.dtype == "float32" else _wrapped(value)

        return element

    return rule


def _sign(x: int) -> int:
    if BINARY32.is_nan(x) or BINARY32.is_zero(x):
        return 0
    return BINARY32.one | (x & BINARY32.sign)


def _larger(x: int, y: int) -> int:
    if BINARY32.is_nan(x) or BINARY32.is_nan(y):
        return BINARY32.nan
    return _plus_zero(y if BINARY32.less(x, y) else x)


def _smaller(x: int, y: int) -> int:
    if BINARY32.is_nan(x) or BINARY32.is_nan(y):
        return BINARY32.nan
    return _plus_zero(y if BINARY32.less(y, x) else x)


def _plus_zero(x: int) -> int:
    return 0 if BINARY32.is_zero(x) else x


def _comparison(floats: Callable[[int, int], bool], integers: Callable[[int, int], bool]) -> Rule:
    return _binary(lambda x, y: int(floats(x, y)), lambda x, y: int(integers(x, y)))


def _at_most(x: int, y: int) -> bool:
    return BINARY32.less(x, y) or BINARY32.equal(x, y)


def _logic(function: Two) -> Rule:
    return _binary(function, function)


def _logical_not(result: TensorType, x: Array) -> Element:
    return lambda index: 1 - x.elements[index]


def _to_int64(x: int) -> int:
    """Towards zero; NaN is 0, and what no int64 holds is the nearest float32 that one holds."""
    if BINARY32.is_nan(x):
        return 0
    limit = _INT64_FLOAT_MAX | (x & BINARY32.sign)
    beyond = x & (BINARY32.sign - 1) > _INT64_FLOAT_MAX
    return BINARY32.truncated(limit if beyond else x)


def _to(result: TensorType, x: Array, dtype: str) -> Element:
    if x.dtype == dtype:
        return x.elements.__getitem__
    floats = x.dtype == "float32"
    if dtype == "bool":
        return lambda index: int(not BINARY32.is_zero(x.elements[index]) if floats else x.elements[index] != 0)
    if dtype == "int64":
        return lambda index: _to_int64(x.elements[index]) if floats else x.elements[index]
    return lambda index: BINARY32.from_int(x.elements[index])


POINTWISE: dict[str, Rule] = {
    "to.dtype": _to,
    "add.Tensor": _binary(BINARY32.add, operator.add),
    "sub.Tensor": _binary(BINARY32.subtract, operator.sub),
    "mul.Tensor": _binary(BINARY32.multiply, operator.mul),
    "div.Tensor": _binary(BINARY32.divide),
    "neg.default": _unary(BINARY32.negated, operator.neg),
    "abs.default": _unary(BINARY32.magnitude, abs),
    "sqrt.default": _unary(BINARY32.square_root),
    "reciprocal.default": _unary(lambda x: BINARY32.divide(BINARY32.one, x)),
    "sign.default": _unary(_sign),
    "maximum.default": _binary(_larger, max),
    "minimum.default": _binary(_smaller, min),
    "eq.Tensor": _comparison(BINARY32.equal, operator.eq),
    "ne.Tensor": _comparison(lambda x, y: not BINARY32.equal(x, y), operator.ne),
    "lt.Tensor": _comparison(BINARY32.less, operator.lt),
    "le.Tensor": _comparison(_at_most, operator.le),
    "gt.Tensor": _comparison(lambda x, y: BINARY32.less(y, x), operator.gt),
    "ge.Tensor": _comparison(lambda x, y: _at_most(y, x), operator.ge),
    "logical_and.default": _logic(operator.and_),
    "logical_or.default": _logic(operator.or_),
    "logical_not.default": _logical_not,
}
