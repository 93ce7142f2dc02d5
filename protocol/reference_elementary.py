"""exp, log, erf, tanh, sin and cos of one float32, as docs/exact.md writes them down: a fixed list of IEEE operations.

Every call of `Format` below is one rounding. The constants are the bit patterns of the specification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from protocol.operations import TensorType
from protocol.reference_movement import Array, Element, Rule
from protocol.softfloat import BINARY32, BINARY64, Format

__all__ = ["ELEMENTARY", "cos", "erf", "exp", "horner", "log", "sin", "tanh"]

_ADD, _SUB, _MUL = BINARY32.add, BINARY32.subtract, BINARY32.multiply


def horner(form: Format, x: int, coefficients: Sequence[int]) -> int:
    """c0 x**n + ... + cn: multiply by x, add the next coefficient, each rounded."""
    y = coefficients[0]
    for c in coefficients[1:]:
        y = form.add(form.multiply(y, x), c)
    return y


def _clamped(x: int, low: int, high: int) -> int:
    """x, or the bound it is beyond. x: not NaN."""
    if BINARY32.less(x, low):
        return low
    return high if BINARY32.less(high, x) else x


# --- exp and log -------------------------------------------------------------------------------------------
_EXP_LOW, _EXP_HIGH = 0xC2D00000, 0x42B20000  # -104 and 89
_LOG2_E = 0x3FB8AA3B
_MAGIC = 0x4B400000  # 1.5 * 2**23
_LN2_HIGH, _LN2_LOW = 0x3F318000, 0xB95E8083
_EXP = (0x39506967, 0x3AB743CE, 0x3C088908, 0x3D2AA9C1, 0x3E2AAAAA, 0x3F000000)


def exp(x: int) -> int:
    """e**x."""
    if BINARY32.is_nan(x):
        return x
    x = _clamped(x, _EXP_LOW, _EXP_HIGH)
    t = _ADD(_MUL(x, _LOG2_E), _MAGIC)
    k = _SUB(t, _MAGIC)
    r = _SUB(_SUB(x, _MUL(k, _LN2_HIGH)), _MUL(k, _LN2_LOW))
    p = _ADD(_ADD(_MUL(_MUL(horner(BINARY32, r, _EXP), r), r), r), BINARY32.one)
    mantissa, exponent = BINARY32.split(p)
    return BINARY32.rounded(mantissa, exponent + BINARY32.truncated(k))


_SQRT_HALF = 0x3F3504F3
_HALF = 0x3F000000
_LOG = (
    0x3D9021BB,
    0xBDEBD1B8,
    0x3DEF251A,
    0xBDFE5D4F,
    0x3E11E9BF,
    0xBE2AAE50,
    0x3E4CCEAC,
    0xBE7FFFFC,
    0x3EAAAAAA,
)


def log(x: int) -> int:
    """The natural logarithm."""
    if BINARY32.is_nan(x) or BINARY32.is_zero(x):
        return BINARY32.nan if BINARY32.is_nan(x) else BINARY32.sign | BINARY32.infinity
    if x & BINARY32.sign:
        return BINARY32.nan
    if x == BINARY32.infinity:
        return x
    mantissa, exponent = BINARY32.split(x)
    lead = BINARY32.rounded(mantissa, -mantissa.bit_length())  # in [1/2, 1)
    power = exponent + mantissa.bit_length()
    if lead < _SQRT_HALF:  # patterns of positive floats are in their order
        lead, power = BINARY32.rounded(mantissa, 1 - mantissa.bit_length()), power - 1
    k, f = BINARY32.from_int(power), _SUB(lead, BINARY32.one)
    square = _MUL(f, f)
    y = _MUL(_MUL(horner(BINARY32, f, _LOG), f), square)
    y = _SUB(_ADD(y, _MUL(k, _LN2_LOW)), _MUL(square, _HALF))
    return _ADD(_ADD(y, f), _MUL(k, _LN2_HIGH))


# --- erf and tanh ------------------------------------------------------------------------------------------
_ERF_BOUND = 0x407B3333
_ERF_NUMERATOR = (
    0x3EC129C0770149E0,
    0x3F32AADF662FE76D,
    0x3F6EE7B2666C0BA7,
    0x3FAB0497EA7B62A5,
    0x3FC8656A0EA0C31A,
    0x3FF20DD74A88711F,
)
_ERF_DENOMINATOR = (
    0x3F03F2A4DD15AA11,
    0x3F53119A7F03E755,
    0x3F8EAF8DF46E7863,
    0x3FBD3B1BC3735E9F,
    0x3FE0126013D88AE7,
    0x3FF0000000000000,
)
_TANH_BOUND = 0x411051EC
_TANH_NUMERATOR = (
    0x3E4C9A3C76FEEA0D,
    0x3EF5955687C3939F,
    0x3F6C9F85F3B82012,
    0x3FC120442881AA36,
    0x3FEFFFFFF4BE7474,
)
_TANH_DENOMINATOR = (
    0x3EAA0B867A0D7125,
    0x3F35841E14AE37AC,
    0x3F9A7DF2913912F3,
    0x3FDDE576A763618B,
    0x3FF0000000000000,
)


def _odd_rational(x: int, bound: int, numerator: Sequence[int], denominator: Sequence[int]) -> int:
    """x P(x**2) / Q(x**2) in binary64, rounded to binary32 at the end."""
    if BINARY32.is_nan(x):
        return x
    wide = BINARY32.convert(_clamped(x, bound | BINARY32.sign, bound), BINARY64)
    square = BINARY64.multiply(wide, wide)
    top = BINARY64.multiply(horner(BINARY64, square, numerator), wide)
    return BINARY64.convert(BINARY64.divide(top, horner(BINARY64, square, denominator)), BINARY32)


def erf(x: int) -> int:
    """The error function."""
    return _odd_rational(x, _ERF_BOUND, _ERF_NUMERATOR, _ERF_DENOMINATOR)


def tanh(x: int) -> int:
    """The hyperbolic tangent."""
    return _odd_rational(x, _TANH_BOUND, _TANH_NUMERATOR, _TANH_DENOMINATOR)


# --- sin and cos -------------------------------------------------------------------------------------------
_HALF_PI_BITS = 288
_HALF_PI = 0x1921FB54442D18469898CC51701B839A252049C1114CF98E804177D4C76273644A29410F3  # floor(2**288 * pi / 2)
_PARTS = (0x3FF921FB54000000, 0x3E110B4600000000, 0x3C91A62633145C07)  # pi / 2, but for 2**-107
_TWO_OVER_PI = 0x3FE45F306DC9C883
_MAGIC64 = 0x4338000000000000  # 1.5 * 2**52
_DIRECT_MAX = 0x4B800000  # 2**24
_SIN = (0xB94CA1F9, 0x3C08839E, 0xBE2AAAA3)
_COS = (0x37CCF5CE, 0xBAB6061A, 0x3D2AAAA5)


def _turned(power: int) -> tuple[int, int]:
    """2**power mod 2 pi as two binary64 patterns: 26 bits after the point, and the rest rounded."""
    left = (1 << (power + _HALF_PI_BITS)) % (4 * _HALF_PI)
    cut = _HALF_PI_BITS - 26
    high = left >> cut
    return BINARY64.rounded(high, -26), BINARY64.rounded(left - (high << cut), -_HALF_PI_BITS)


def _reduced(x: int) -> tuple[int, int]:
    """(n mod 4, r) with x = n pi / 2 + r. x: finite."""
    add, sub, mul = BINARY64.add, BINARY64.subtract, BINARY64.multiply
    rest = 0
    if x & (BINARY32.sign - 1) < _DIRECT_MAX:
        high = whole = BINARY32.convert(x, BINARY64)
    else:
        mantissa, power = BINARY32.split(x)  # of 24 bits, and at least 1
        turn_high, turn_low = _turned(power)
        wide = BINARY64.from_int(mantissa)
        high, rest = mul(wide, turn_high), mul(wide, turn_low)
        whole = add(high, rest)
    t = add(mul(whole, _TWO_OVER_PI), _MAGIC64)
    n = sub(t, _MAGIC64)
    r = high
    for part in _PARTS:
        r = sub(r, mul(n, part))
    return t & 3, BINARY64.convert(add(r, rest), BINARY32)


def _wave(x: int, ahead: int) -> int:
    if not BINARY32.is_finite(x):
        return BINARY32.nan
    quadrant, r = _reduced(x)
    quadrant += ahead
    square = _MUL(r, r)
    if quadrant & 1:
        y = _MUL(_MUL(horner(BINARY32, square, _COS), square), square)
        y = _ADD(_SUB(y, _MUL(square, _HALF)), BINARY32.one)
    else:
        y = _ADD(_MUL(_MUL(horner(BINARY32, square, _SIN), square), r), r)
    return BINARY32.negated(y) if quadrant & 2 else y


def sin(x: int) -> int:
    """The sine of x in radians."""
    return _wave(x, 0)


def cos(x: int) -> int:
    """The cosine of x in radians."""
    return _wave(x, 1)


def _each(function: Callable[[int], int]) -> Rule:
    def rule(result: TensorType, x: Array) -> Element:
        return lambda index: function(x.elements[index])

    return rule


ELEMENTARY: dict[str, Rule] = {
    "exp.default": _each(exp),
    "log.default": _each(log),
    "erf.default": _each(erf),
    "tanh.default": _each(tanh),
    "sin.default": _each(sin),
    "cos.default": _each(cos),
}
