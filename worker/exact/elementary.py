"""sqrt, exp, log, erf, tanh, sin and cos of float32 as fixed sequences of IEEE operations. DESIGN §6.

Every step is one torch call that adds, subtracts, multiplies, divides, compares or moves bits, so no compiler
can fuse a multiplication with an addition and no vendor's approximation is used: the bits do not depend on the
processor, its instruction set, or how many threads share the work. Subnormals are kept.

Measured against float64 over all exponents (tests/test_exact_elementary.py): exp, log, erf and
tanh 1.0, sin and cos 2.0 units in the last place at most.

Sources of the polynomials: exp, log, sin, cos: Moshier, Cephes (expf, logf, sinf, cosf), after Cody and Waite,
Software Manual for the Elementary Functions (1980). erf, tanh: rational minimax fits of the form used in Eigen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["cos", "erf", "exp", "horner", "log", "sin", "sqrt", "tanh"]

_BLOCK = 2**17  # elements worked on at a time: the working arrays, 512 KiB or 1 MiB each, stay in cache
_MAGIC = 12582912.0  # 1.5 * 2**23: added and taken away, it rounds a float32 to an integer, ties to even


def _blocked(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`function` of a float32 tensor, which it leaves as it is, applied block by block to any shape."""

    @functools.wraps(function)
    def whole(x: Tensor) -> Tensor:
        if x.numel() <= _BLOCK:
            return function(x) if x.numel() else x.clone()
        flat = x.reshape(-1)
        out = torch.empty_like(flat)
        size = _BLOCK * max(1, torch.get_num_threads())  # blocks are cut, never summed: their size moves no bit
        for first in range(0, flat.numel(), size):
            out[first : first + size] = function(flat[first : first + size])
        return out.view(x.shape)

    return whole


def horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The polynomial with `coefficients`, highest power first, each step rounded twice."""
    y = x * coefficients[0]
    for c in coefficients[1:-1]:
        y.add_(c).mul_(x)
    return y.add_(coefficients[-1])


@_blocked
def _root_by_float64(x: Tensor) -> Tensor:
    """The nearest float32 to the square root, from any float64 root that is less than 4 units off.

    The root of 24 bits stays 4 units of float64 away from where the rounding to float32 changes: with x in [1, 4) of 24
    bits and m of 25 bits the difference x - m * m is a multiple of 2**-48 and not 0, so |sqrt(x) - m| >= 2**-50.
    """
    return x.double().sqrt_().to(torch.float32)


@functools.cache
def _numpy_roots() -> bool:
    """Whether numpy's float32 root is the nearest here: it is the processor's instruction, on x86-64 and 64-bit ARM."""
    x = torch.arange(0x00000001, 0x7F800000, 65_521, dtype=torch.int64).to(torch.int32).view(torch.float32)
    return torch.equal(torch.from_numpy(np.sqrt(x.numpy())), _root_by_float64(x))


def sqrt(x: Tensor) -> Tensor:
    """The square root of float32 x, rounded once. NaN below zero, -0.0 of -0.0.

    Not torch.sqrt: it asks a vector library that is one unit in the last place off for one float32 in six (MKL).
    """
    if x.device.type != "cpu" or not _numpy_roots():
        return _root_by_float64(x)
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(x.numpy())))


_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # the high part has 10 bits: its product with k is exact
_TWO_64 = 2.0**64


@_blocked
def exp(x: Tensor) -> Tensor:
    """e**x for float32 x: 2**k * p(r), with x = k ln 2 + r. Overflow gives infinity; subnormal results are kept."""
    largest = float(x.amax())  # NaN if any element is
    x_in = x
    x = x.clamp(-104.0, 89.0)
    t = (x * 1.44269504088896341).add_(_MAGIC)
    k = t - _MAGIC
    r = x.sub_(k * _LN2_HIGH).sub_(k.mul_(_LN2_LOW))
    p = horner(r, _EXP).mul_(r).mul_(r).add_(r).add_(1.0)
    # The low bits of t's pattern are k. p * 2**(k + 64) is made by adding to p's exponent, then scaled back by
    # one multiplication, which rounds a subnormal result once; k + 64 would leave the range above k = 62.
    shift = t.view(torch.int32).sub_(0x4B400000).bitwise_left_shift_(23)
    pattern = p.view(torch.int32)
    if largest <= 43.0:
        return pattern.add_(shift).add_(64 << 23).view(torch.float32).mul_(1 / _TWO_64)
    up = (pattern + shift).add_(64 << 23).view(torch.float32).mul_(1 / _TWO_64)
    down = (pattern + shift).sub_(64 << 23).view(torch.float32).mul_(_TWO_64)
    y = torch.where(x_in > 0.0, down, up)
    return torch.where(x_in != x_in, x_in, y)


_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SQRT_HALF_BITS = 0x3F3504F3
_MIN_NORMAL = 2.0**-126


@_blocked
def log(x: Tensor) -> Tensor:
    """The natural logarithm of float32 x: -infinity at 0 (either zero), NaN below."""
    small = x < _MIN_NORMAL
    lifted = torch.where(small, x * 2.0**23, x)  # subnormals become normal
    bits = lifted.view(torch.int32) - _SQRT_HALF_BITS
    # x = 2**k * m with m in [sqrt(1/2), sqrt(2)): subtracting sqrt(1/2) puts the carry into the exponent.
    k = (bits >> 23).to(torch.float32).sub_(small.to(torch.float32).mul_(23.0))
    f = bits.bitwise_and_(0x7FFFFF).add_(_SQRT_HALF_BITS).view(torch.float32).sub_(1.0)
    square = f * f
    y = horner(f, _LOG).mul_(f).mul_(square)
    y.add_(k * _LN2_LOW).sub_(square.mul_(0.5)).add_(f).add_(k.mul_(_LN2_HIGH))
    y = torch.where(x > 0.0, y, torch.where(x == 0.0, -torch.inf, torch.nan))
    return torch.where(x == torch.inf, x, y)


def _odd_rational(x: Tensor, bound: float, numerator: Sequence[float], denominator: Sequence[float]) -> Tensor:
    """x * P(x**2) / Q(x**2) in float64, with x clamped to +-bound, where the fit reaches 1.

    In float32 the roundings of the two polynomials add up to 6 units in the last place; here only the fit's own
    error and one rounding are left.
    """
    wide = x.clamp(-bound, bound).double()
    square = wide * wide
    p = horner(square, numerator).mul_(wide)
    return p.div_(horner(square, denominator)).to(torch.float32)


# Minimax in the relative error (Lawson's iteration on the linearised problem), as in Eigen's erf and tanh.
_ERF_NUMERATOR = (
    2.04600012669e-06,
    0.000284843006909,
    0.0037725910546,
    0.0527694200261,
    0.190594918387,
    1.12837914576,
)
_ERF_DENOMINATOR = (3.80474626905e-05, 0.00116386497035, 0.0149832811565, 0.114183173387, 0.502243078958, 1.0)
_TANH_NUMERATOR = (1.33190700412e-08, 2.0583488081e-05, 0.00349403536325, 0.133797187594, 0.999999979034)
_TANH_DENOMINATOR = (7.76202103574e-07, 0.000328309387151, 0.0258710766923, 0.467130340066, 1.0)


@_blocked
def erf(x: Tensor) -> Tensor:
    """The error function of float32 x. The fit's own error is 1.9e-8 of the value."""
    return _odd_rational(x, 3.925, _ERF_NUMERATOR, _ERF_DENOMINATOR)


@_blocked
def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent of float32 x. The fit's own error is 2.1e-8 of the value."""
    return _odd_rational(x, 9.02, _TANH_NUMERATOR, _TANH_DENOMINATOR)


_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_HALF_PI_BITS = 288  # of pi / 2: 128 for the largest float32, 160 that are left of it after reduction
_DIRECT_MAX = 2.0**24  # below, x is reduced as it stands; from here on its unit is 1 or more, a power of two
_MAGIC64 = 6755399441055744.0  # 1.5 * 2**52


def _half_pi(bits: int) -> int:
    """floor(2**bits * pi / 2), by Machin's formula in integers."""

    def arccot(n: int, one: int) -> int:
        total, power, k = 0, one // n, 0
        while power:
            total += (-1) ** k * (power // (2 * k + 1))
            power, k = power // (n * n), k + 1
        return total

    one = 1 << (bits + 16)
    return (2 * (4 * arccot(5, one) - arccot(239, one))) >> 16


@functools.cache
def _turns() -> tuple[Tensor, Tensor, tuple[float, float, float]]:
    """2**j mod 2 pi for j in [0, 104] as float64 pairs (high of 29 bits, low), and pi / 2 in three parts.

    The first two parts have 27 bits each, so that their products with an integer below 2**26 are exact, and
    high's product with a float32's 24 bits is too.
    """
    scale = _HALF_PI_BITS
    half = _half_pi(scale)
    high, low = [], []
    for j in range(105):
        left = (1 << (j + scale)) % (4 * half)
        top = left >> (scale - 26)
        high.append(top * 2.0**-26)
        low.append((left - (top << (scale - 26))) / 2**scale)
    first = half >> (scale - 26)
    second = (half >> (scale - 53)) - (first << 27)
    third = half - (first << (scale - 26)) - (second << (scale - 53))
    parts = (first * 2.0**-26, second * 2.0**-53, third / 2**scale)
    return torch.tensor(high, dtype=torch.float64), torch.tensor(low, dtype=torch.float64), parts


def _reduced(x: Tensor) -> tuple[Tensor, Tensor]:
    """The quadrant of x (its low two bits count, int64) and the rest in [-pi/4, pi/4] as float32."""
    high, low, (first, second, third) = _turns()
    x64, rest = x.double(), None
    if not float(x.abs().amax()) < _DIRECT_MAX:
        # x = m * 2**j with an integer m of 24 bits, and 2**j mod 2 pi stands in a table.
        bits = x.view(torch.int32)
        j = ((bits >> 23) & 0xFF).sub_(150).clamp_(0, 104).long()
        large = x64.abs() >= _DIRECT_MAX
        m = torch.where(large, (bits & 0x7FFFFF | 0x800000).double(), 0.0) * torch.sign(x64)
        rest = m * low[j]
        x64 = torch.where(large, m * high[j], x64)
    t = (x64 if rest is None else x64 + rest).mul(0.6366197723675814).add_(_MAGIC64)
    n = t - _MAGIC64
    r = x64.sub_(n * first).sub_(n * second).sub_(n.mul_(third))
    if rest is not None:
        r.add_(rest)
    return t.view(torch.int64), r.to(torch.float32)


def _wave(x: Tensor, ahead: int) -> Tensor:
    quadrant, r = _reduced(x)
    quadrant = quadrant + ahead
    square = r * r
    sine = horner(square, _SIN).mul_(square).mul_(r).add_(r)
    cosine = horner(square, _COS).mul_(square).mul_(square).sub_(square * 0.5).add_(1.0)
    y = torch.where((quadrant & 1).bool(), cosine, sine)
    y = torch.where((quadrant & 2).bool(), -y, y)
    return torch.where(x.isfinite(), y, torch.nan)


@_blocked
def sin(x: Tensor) -> Tensor:
    """The sine of float32 x, in radians, of any size; NaN for an infinity."""
    return _wave(x, 0)


@_blocked
def cos(x: Tensor) -> Tensor:
    """The cosine of float32 x, in radians, of any size; NaN for an infinity."""
    return _wave(x, 1)
