"""How far an honest float32 evaluation of one element may lie from the exact value, operation by operation.

The referee of tolerant mode: both sides follow the solver's own trace, so the operands of the disputed element are the
solver's, and the question is only whether its float32 machine can have got that value from them. Every bound is proven
for any order of evaluation, fused or not, or is a stated number of units in the last place; nothing here is a
statistical guess, so an honest machine is never convicted.

- Movement, integers, comparisons, logic, maxima, random draws, + - * / : no error. IEEE 754 rounds the last four to
  nearest on every processor and GPU, so there is one right result; but for a division of all by one number.
- Sums and products of n terms: gamma(n) * sum|a_i b_i|, gamma(n) = n u / (1 - n u), u = 2**-24, and half the smallest
  subnormal for each product (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., §3.1 and §4.2).
- sqrt, reciprocal and the elementary functions: `ULPS`, around the reference of docs/exact.md.

A zero has no sign here, and every NaN is one: kernels differ in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from protocol.errors import LimitExceeded, LocalProtocolError, VerificationFailed
from protocol.operations import OPERATIONS, TensorType, result_type
from protocol.reference import Argument, rules, typed
from protocol.reference_movement import Array, Element, position
from protocol.reference_products import over
from protocol.softfloat import BINARY32

__all__ = ["ACCUMULATED", "PRODUCT_TERMS_MAX", "ULPS", "Bound", "bound_of", "check_within", "judge"]

UNIT_ROUNDOFF: Final = Fraction(1, 2**24)
_SUBNORMAL_HALF: Final = Fraction(1, 2**150)  # half of the smallest subnormal
_LARGEST: Final = Fraction((2**24 - 1) * 2**104)
PRODUCT_TERMS_MAX: Final = 2**23  # above it n u nears 1 and the bound says nothing

ULPS: Final = {
    "sqrt.default": 1, "reciprocal.default": 1, "exp.default": 4, "log.default": 4, "erf.default": 5,
    "tanh.default": 5, "sin.default": 5, "cos.default": 5,
}  # fmt: skip
"""Representable numbers between an honest result and the reference's: the error of the reference (docs/exact.md, 9: 0.5
for sqrt and reciprocal, 2 for sin and cos, 1 for the others), the error that kernels promise (SLEEF u10 and MKL's high
accuracy 1, CUDA's functions at most 2), and one for results at a power of two. torch's vectorised sqrt is off by one
for one number in six."""

_RECIPROCAL_ULPS: Final = 2  # two roundings instead of one, each half a unit, and a result at a power of two
ACCUMULATED: Final = ("mm.default", "bmm.default", "sum.dim_IntList", "embedding_dense_backward.default")
"""Operations whose elements are sums of many terms; every other one reads an element or two."""


@dataclass(frozen=True)
class Bound:
    """What an honest element may be: `value` within `error` of `exact`, or, where `exact` is None, only `allowed`.

    Elements as protocol/reference_movement.py says. ulps: so many representable numbers around each `allowed`.
    """

    exact: Fraction | None
    error: Fraction
    allowed: frozenset[int]
    ulps: int = 0


def judge(name: str, args: Sequence[Argument], index: int, value: int) -> None:
    """Refuse `value` as element `index`, row-major, of operation `name` on `args`, whose float32 are patterns.

    Raises VerificationFailed if no honest evaluation gives it; MalformedRecord for arguments that the operation does
    not take or an index of them out of range; LimitExceeded for a product that is too long to judge.
    """
    kind = result_type(name, [typed(arg) for arg in args])
    check_within(value, bound_of(name, args, index), kind.dtype, f"element {index} of {name}")


def check_within(value: int, bound: Bound, dtype: str, what: str) -> None:
    """Raises VerificationFailed if `value`, an element of that dtype, lies outside. what: its name, for people."""
    if _inside(value, bound, dtype):
        return
    expected = (
        f"{float(bound.exact):.9g} within {float(bound.error):.3g}"
        if bound.exact is not None
        else f"{', '.join(_told(v, dtype) for v in sorted(bound.allowed))} within {bound.ulps} ulp"
    )
    raise VerificationFailed(
        f"{what} is {_told(value, dtype)}, and an honest machine gives {expected}",
        why="no order of float32 operations reaches it from these operands",
    )


def bound_of(name: str, args: Sequence[Argument], index: int) -> Bound:
    """What an honest element `index` may be. Raises as `judge`, but VerificationFailed."""
    kind = result_type(name, [typed(arg) for arg in args])
    if not 0 <= index < kind.elements:
        raise LocalProtocolError(f"element {index} of a result of {kind.elements}")
    if name in ACCUMULATED:
        return _accumulated(*_terms(name, kind, args, index))
    rule: Element = rules()[name](kind, *args)
    wild = name == "to.dtype" and kind.dtype == "int64" and _beyond_int64(args, index)
    ulps = _RECIPROCAL_ULPS if name == "div.Tensor" and _one_divisor(args[1]) else ULPS.get(name, 0)
    return Bound(None, Fraction(0), frozenset() if wild else frozenset((rule(index),)), ulps)


def _one_divisor(divisor: Argument) -> bool:
    """Whether all is divided by one number, which torch on a GPU turns into a product with its reciprocal."""
    return not isinstance(divisor, Array) or len(divisor.elements) == 1


def _beyond_int64(args: Sequence[Argument], index: int) -> bool:
    """A float that no int64 holds becomes what the machine likes: C leaves it undefined."""
    x = args[0]
    assert isinstance(x, Array), "refused by result_type"
    if x.dtype != "float32":
        return False
    bits = x.elements[index]
    return not BINARY32.is_finite(bits) or abs(BINARY32.truncated(bits)) >= 2**63


# --- what is added up --------------------------------------------------------------------------------------
def _terms(name: str, kind: TensorType, args: Sequence[Argument], index: int) -> tuple[list[tuple[int, ...]], bool]:
    """The factors of each term of element `index`, float32 patterns, and whether they are multiplied."""
    if name in ("mm.default", "bmm.default"):
        x, y = args[0], args[1]
        assert isinstance(x, Array), "refused by result_type"
        assert isinstance(y, Array), "refused by result_type"
        rows, inner, columns = x.shape[-2], x.shape[-1], y.shape[-1]
        matrix, place = divmod(index, rows * columns)
        line, column = divmod(place, columns)
        first, below = (matrix * rows + line) * inner, matrix * inner * columns
        left = x.elements[first : first + inner]
        return list(zip(left, y.elements[below + column : below + inner * columns : columns], strict=True)), True
    if name == "sum.dim_IntList":
        x, dims = args[0], args[1]
        assert isinstance(x, Array), "refused by result_type"
        assert isinstance(dims, tuple), "refused by result_type"
        axes = [dim for dim in dims if isinstance(dim, int)]
        kept = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
        return [(term,) for term in over(x, tuple(axes), position(index, kept))], False
    grad, places, padding = args[0], args[1], args[3]
    assert isinstance(grad, Array), "refused by result_type"
    assert isinstance(places, Array), "refused by result_type"
    rules()[name](kind, *args)  # refuses an index out of range
    columns = grad.shape[-1]
    row, column = divmod(index, columns)
    if row == padding:
        return [], False
    return [(grad.elements[i * columns + column],) for i, n in enumerate(places.elements) if n == row], False


def _accumulated(terms: list[tuple[int, ...]], products: bool) -> Bound:
    """The bound of a sum of terms, each one float32 or the product of two."""
    count = len(terms)
    if count > PRODUCT_TERMS_MAX:
        raise LimitExceeded(f"a sum of {count} terms is too long to judge", why=f"at most {PRODUCT_TERMS_MAX}")
    if not all(BINARY32.is_finite(factor) for term in terms for factor in term):
        return Bound(None, Fraction(0), _not_finite(terms))
    # Integers over one power of two: Fractions would reduce at each step.
    split = [[BINARY32.split(factor) for factor in term] for term in terms]
    low = 2 * BINARY32.unit_exponent_min if products else BINARY32.unit_exponent_min
    whole = magnitude = 0
    for factors in split:
        mantissa, exponent = 1, 0
        for m, e in factors:
            mantissa, exponent = mantissa * m, exponent + e
        scaled = mantissa << (exponent - low)
        whole, magnitude = whole + scaled, magnitude + abs(scaled)
    exact, total = Fraction(whole, 2**-low), Fraction(magnitude, 2**-low)
    roundings = count if products else max(0, count - 1)
    gamma = roundings * UNIT_ROUNDOFF / (1 - roundings * UNIT_ROUNDOFF)
    error = gamma * total + (count * _SUBNORMAL_HALF * (1 + gamma) if products else 0)
    # A partial sum may overflow on the way: then the result is infinite or, of two such, NaN.
    allowed = frozenset((BINARY32.nan, BINARY32.infinity, BINARY32.infinity | BINARY32.sign))
    return Bound(exact, error, allowed if total + error > _LARGEST else frozenset())


def _not_finite(terms: list[tuple[int, ...]]) -> frozenset[int]:
    """IEEE's result, in any order, of a sum with a term that is not finite."""
    found: set[int] = set()
    for term in terms:
        value = term[0] if len(term) == 1 else BINARY32.multiply(term[0], term[1])
        if BINARY32.is_nan(value):
            return frozenset((BINARY32.nan,))
        if any(not BINARY32.is_finite(factor) for factor in term):
            found.add(value)
    if len(found) == 2:
        return frozenset((BINARY32.nan,))
    (one,) = found
    # The finite terms may overflow to the other infinity.
    return frozenset((one, BINARY32.nan)) if len(terms) > 1 else frozenset((one,))


# --- inside or not -----------------------------------------------------------------------------------------
def _inside(value: int, bound: Bound, dtype: str) -> bool:
    if dtype != "float32":
        return not bound.allowed or value in bound.allowed
    plain = _plain(value)
    if plain in {_plain(allowed) for allowed in bound.allowed}:
        return True
    if BINARY32.is_nan(plain):
        return False
    if bound.exact is None:
        orders = [BINARY32.order(allowed) for allowed in bound.allowed if not BINARY32.is_nan(allowed)]
        return any(abs(BINARY32.order(plain) - order) <= bound.ulps for order in orders)
    if not BINARY32.is_finite(plain):
        return False
    mantissa, exponent = BINARY32.split(plain)
    return abs(mantissa * Fraction(2) ** exponent - bound.exact) <= bound.error


def _plain(value: int) -> int:
    """float32 patterns of one number as one: any NaN, either zero."""
    if BINARY32.is_nan(value):
        return BINARY32.nan
    return 0 if BINARY32.is_zero(value) else value


def _told(value: int, dtype: str) -> str:
    if dtype != "float32" or not BINARY32.is_finite(value):
        return f"{value:#x}" if dtype == "float32" else str(value)
    mantissa, exponent = BINARY32.split(value)
    return f"{float(mantissa * Fraction(2) ** exponent):.9g}"


def _check_complete() -> None:
    """Every operation has a bound: those not named above follow the reference to the last bit."""
    unknown = (set(ULPS) | set(ACCUMULATED)) - set(OPERATIONS)
    assert not unknown, f"bounds of unknown operations {sorted(unknown)}"


_check_complete()
