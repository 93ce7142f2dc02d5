"""Power-of-two scales and rounding to them, by bit moves and IEEE additions alone. DESIGN §6.

A float32 value x is rounded to the nearest multiple of a power of two u, ties to even, by adding and taking
away an *anchor*: 1.5 * 2**p * u, where p is the number of fraction bits of the format that the addition is
done in. The sum has unit u in its last place, so the addition itself rounds; the subtraction is exact. One
element costs two additions, and the rounded integer stands in the low bits of the sum, where `bits` finds it
for nothing. Source: the well-known "magic number" rounding; see Muller et al., Handbook of Floating-Point
Arithmetic (2nd ed., 2018), §11.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Rounded", "anchor64", "round_for_product"]

_LARGE_EXPONENT = 64  # rows whose anchor would overflow are scaled down by 2**-64 first


def _exponents(m64: Tensor) -> Tensor:
    """e with m = f * 2**e, f in [1/2, 1), as int64; -1022 for zero and 1025 for NaN or infinity.

    m64: float64, not negative, converted from float32, so that float32 subnormals are normal here. Bit moves
    rather than torch.frexp, whose answer for zero and infinity the standard leaves open. The sign is masked, because
    the NaN that a vectorized maximum makes has all bits set.
    """
    return (m64.view(torch.int64) >> 52).bitwise_and_(0x7FF).sub_(1022)


def _power64(exponent: Tensor) -> Tensor:
    """2**exponent as float64, for int64 exponents in [-1022, 1023]."""
    return (exponent + 1023).bitwise_left_shift_(52).view(torch.float64)


def anchor64(m: Tensor, bits: int) -> Tensor:
    """The float64 anchor that rounds values of magnitude at most m to `bits` bits below 2**e, m < 2**e.

    m: float32, not negative. A NaN or infinity in m gives a NaN anchor, which makes every value it touches NaN.
    """
    if m.device.type == "cpu":  # numpy takes a third of the time for the few values that m has
        wide = m.numpy().astype(np.float64)
        anchor = ((((wide.view(np.int64) >> 52) + (53 - bits)) << 52) | (1 << 51)).view(np.float64)
        bad = ~np.isfinite(wide)
        if bad.any():
            anchor[bad] = np.nan
        return torch.from_numpy(anchor)
    m64 = m.double()
    field = (m64.view(torch.int64) >> 52).add_(53 - bits)
    found = field.bitwise_left_shift_(52).bitwise_or_(1 << 51).view(torch.float64)
    return found.masked_fill_(~m64.isfinite(), torch.nan)


@dataclass
class Rounded:
    """One operand of a product, rounded to integers a of `width` bits times a unit per row.

    sums: float32, the operand plus its anchor; the low 23 bits of its pattern are 2**22 + a. anchor: float32
    and exponent: int64, size 1 along the dimension that the product sums over; the unit is 2**exponent.
    bad: rows that hold a NaN or an infinity (their integers are 0), or None if no row does. lift: float64, a
    power of two by which `sums` is smaller than the operand where that is too large to be rounded in float32,
    or None; the exponent includes it.
    """

    sums: Tensor
    anchor: Tensor
    exponent: Tensor
    bad: Tensor | None = None
    lift: Tensor | None = None

    def at(self, index: int) -> Rounded:
        """One matrix of a batch; the fields that only `values64` and masking need are left out."""
        return Rounded(self.sums[index], self.anchor[index], self.exponent[index])

    def unit(self) -> Tensor:
        """The units as float64."""
        return _power64(self.exponent)

    def values64(self) -> Tensor:
        """The rounded operand as float64, a * unit exactly. Uses `sums` up."""
        values = self.sums.sub_(self.anchor).double()
        return values if self.lift is None else values.mul_(self.lift)

    def integers64(self) -> Tensor:
        """The integers a as float64."""
        return (self.sums.view(torch.int32) & 0x7FFFFF).sub_(1 << 22).double()


def round_for_product(x: Tensor, dim: int, width: int) -> Rounded:
    """Round x to `width` bits with one power-of-two scale for each slice along `dim`.

    x: float32, any rank, not empty along `dim`. With m the largest magnitude of a slice and m = f * 2**e by
    frexp, unit = 2**(e - width + 1), a = rne(x / unit) clamped to |a| <= 2**(width-1) - 1. Where that unit is
    below the smallest subnormal 2**-149, 2**-149 is used: x / unit is then an integer with either, so the
    product's value is the same.
    """
    m = x.abs().amax(dim, keepdim=True)
    if m.device.type == "cpu":
        pattern = m.numpy().view(np.int32)
        field = pattern >> 23  # e + 126 for a normal m, 0 for zero and subnormals
        top = 0x800000 - (1 << (24 - width))
        plain = field.min() > 0 and field.max() <= 229 + width and (pattern & 0x7FFFFF).max() < top
        if plain:  # every slice is a normal number whose anchor exists, and nothing rounds up to 2**(width-1)
            anchor = torch.from_numpy((field + (25 - width)) << 23 | 0x400000).view(torch.float32)
            return Rounded(x + anchor, anchor, torch.from_numpy(field.astype(np.int64) - (125 + width)))
    return _round_any(x, m, width)


def _round_any(x: Tensor, m: Tensor, width: int) -> Rounded:
    """`round_for_product` for any x: with NaN, infinities, zero or subnormal or huge slices, values to clamp."""
    e = _exponents(m.double())
    bad: Tensor | None = None
    shift: Tensor | None = None
    if int(e.max()) > 103 + width:
        bad = e > 128
        x, m, e = x.masked_fill(bad, 0.0), m.masked_fill(bad, 0.0), e.masked_fill(bad, -1022)
        large = e > 64
        # Values that fall below the normal range here are far below half a unit: they round to 0 either way.
        factor = torch.where(large, 2.0**-_LARGE_EXPONENT, 1.0).to(torch.float32)
        x, m = x * factor, m * factor
        shift = large.to(torch.int64) * _LARGE_EXPONENT
        e = e - shift
        bad = bad if bool(bad.any()) else None
    e = e.clamp_min(width - 150)
    pattern = (e + (151 - width)).bitwise_left_shift_(23).bitwise_or_(0x400000).to(torch.int32)
    anchor = pattern.view(torch.float32)
    sums = x + anchor
    # The largest element of one slice in 2**(width-1) rounds up to 2**(width-1); the others are not touched.
    bound = (1 << (width - 1)) - 1
    sums = torch.minimum(sums, (pattern + bound).view(torch.float32))
    sums = torch.maximum(sums, (pattern - bound).view(torch.float32))
    exponent = e - (width - 1)
    if shift is None:
        return Rounded(sums, anchor, exponent, bad)
    return Rounded(sums, anchor, exponent + shift, bad, _power64(shift))
