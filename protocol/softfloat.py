"""IEEE 754 binary32 and binary64 in Python integers: the arithmetic of docs/exact.md, with no float in it.

A float is its bit pattern, an int. Every operation makes the exact result as an integer times a power of two and
rounds it once, to nearest, ties to even, which is the standard's own definition; subnormals are kept. The processor's
floats are never asked, so this is a second witness of them, slow (a few microseconds an operation) and portable to
any language that has integers. Each NaN result is the quiet NaN with no payload and no sign.

Source: IEEE Std 754-2019, §4.3.1 (roundTiesToEven), §5.4.1, §6.1-6.3.
"""

from __future__ import annotations

from math import isqrt

__all__ = ["BINARY32", "BINARY64", "Format", "round_to_even"]


def round_to_even(magnitude: int, shift: int) -> int:
    """`magnitude` * 2**-shift as an integer, ties to even. magnitude: not negative; a negative shift is exact."""
    if shift <= 0:
        return magnitude << -shift
    whole, rest, half = magnitude >> shift, magnitude & ((1 << shift) - 1), 1 << (shift - 1)
    return whole + (rest > half or (rest == half and whole & 1 == 1))


class Format:
    """One binary interchange format and its operations on bit patterns."""

    def __init__(self, *, exponent_bits: int, fraction_bits: int) -> None:
        self.fraction_bits = fraction_bits
        self.precision = fraction_bits + 1
        self.bias = (1 << (exponent_bits - 1)) - 1
        self.sign = 1 << (exponent_bits + fraction_bits)
        self.infinity = ((1 << exponent_bits) - 1) << fraction_bits
        self.nan = self.infinity | 1 << (fraction_bits - 1)
        self.one = self.bias << fraction_bits
        self.unit_exponent_min = 1 - self.bias - fraction_bits  # of the smallest subnormal

    # --- taking apart and putting together -------------------------------------------------------------------
    def is_nan(self, x: int) -> bool:
        """Whether x is any NaN."""
        return x & (self.sign - 1) > self.infinity

    def is_finite(self, x: int) -> bool:
        """Whether x is neither NaN nor infinity."""
        return x & (self.sign - 1) < self.infinity

    def is_zero(self, x: int) -> bool:
        """Whether x is +0.0 or -0.0."""
        return not x & (self.sign - 1)

    def split(self, x: int) -> tuple[int, int]:
        """(m, e) with x = m * 2**e, m an integer with x's sign. x: finite."""
        assert self.is_finite(x)
        field = (x & (self.sign - 1)) >> self.fraction_bits
        mantissa = x & ((1 << self.fraction_bits) - 1)
        if field:
            mantissa |= 1 << self.fraction_bits
        exponent = max(field, 1) - 1 + self.unit_exponent_min
        return (-mantissa if x & self.sign else mantissa), exponent

    def rounded(self, value: int, exponent: int, *, negative: bool = False) -> int:
        """value * 2**exponent, rounded once; infinity where it leaves the range.

        negative: the sign of a zero result, and of nothing else.
        """
        magnitude = abs(value)
        sign = self.sign if value < 0 or (negative and not value) else 0
        if not magnitude:
            return sign
        unit = max(exponent + magnitude.bit_length() - self.precision, self.unit_exponent_min)
        mantissa = round_to_even(magnitude, unit - exponent)
        # A carry out of the mantissa runs into the exponent field, where it belongs; from the largest number it
        # gives infinity, and from the largest subnormal the smallest normal number.
        pattern = ((unit - self.unit_exponent_min) << self.fraction_bits) + mantissa
        return sign | min(pattern, self.infinity)

    # --- arithmetic ------------------------------------------------------------------------------------------
    def negated(self, x: int) -> int:
        """-x."""
        return self.nan if self.is_nan(x) else x ^ self.sign

    def magnitude(self, x: int) -> int:
        """|x|."""
        return self.nan if self.is_nan(x) else x & (self.sign - 1)

    def add(self, x: int, y: int) -> int:
        """x + y. A sum of zeros is -0.0 only if both are; an exact cancellation gives +0.0."""
        if self.is_nan(x) or self.is_nan(y):
            return self.nan
        if not (self.is_finite(x) and self.is_finite(y)):
            infinite = y if self.is_finite(x) else x
            opposed = not self.is_finite(x) and not self.is_finite(y) and x != y
            return self.nan if opposed else infinite
        (m, e), (n, f) = self.split(x), self.split(y)
        low = min(e, f)
        return self.rounded((m << (e - low)) + (n << (f - low)), low, negative=bool(x & y & self.sign))

    def subtract(self, x: int, y: int) -> int:
        """x - y, which is x + (-y)."""
        return self.add(x, self.negated(y))

    def multiply(self, x: int, y: int) -> int:
        """x * y."""
        if self.is_nan(x) or self.is_nan(y):
            return self.nan
        sign = (x ^ y) & self.sign
        if not (self.is_finite(x) and self.is_finite(y)):
            return self.nan if self.is_zero(x) or self.is_zero(y) else sign | self.infinity
        (m, e), (n, f) = self.split(x), self.split(y)
        return self.rounded(m * n, e + f, negative=bool(sign))

    def divide(self, x: int, y: int) -> int:
        """x / y. A number by zero is infinite, zero by zero and infinity by infinity are NaN."""
        if self.is_nan(x) or self.is_nan(y):
            return self.nan
        sign = (x ^ y) & self.sign
        if not self.is_finite(x):
            return sign | self.infinity if self.is_finite(y) else self.nan
        if self.is_zero(y):
            return self.nan if self.is_zero(x) else sign | self.infinity
        if not self.is_finite(y):
            return sign
        (m, e), (n, f) = self.split(x), self.split(y)
        shift = max(0, self.precision + 3 + n.bit_length() - m.bit_length())
        quotient, rest = divmod(abs(m) << shift, abs(n))
        # Three bits more than the format has; the last says whether anything is left, so one rounding is right.
        odd = quotient << 1 | (rest > 0)
        return self.rounded(-odd if sign else odd, e - f - shift - 1, negative=bool(sign))

    def square_root(self, x: int) -> int:
        """The square root; -0.0 of -0.0, NaN of what is below."""
        if self.is_nan(x) or self.is_zero(x):
            return self.nan if self.is_nan(x) else x
        if x & self.sign:
            return self.nan
        if not self.is_finite(x):
            return x
        m, e = self.split(x)
        shift = max(0, 2 * self.precision + 6 - m.bit_length())
        shift += (e - shift) & 1  # an even exponent is left
        root = isqrt(m << shift)
        odd = root << 1 | (root * root != m << shift)
        return self.rounded(odd, (e - shift) // 2 - 1)

    # --- comparison ------------------------------------------------------------------------------------------
    def order(self, x: int) -> int:
        """An integer that orders what is not NaN: infinities at the ends, both zeros at 0."""
        assert not self.is_nan(x)
        return -(x ^ self.sign) if x & self.sign else x

    def equal(self, x: int, y: int) -> bool:
        """x == y; False if either is NaN."""
        return not (self.is_nan(x) or self.is_nan(y)) and self.order(x) == self.order(y)

    def less(self, x: int, y: int) -> bool:
        """x < y; False if either is NaN."""
        return not (self.is_nan(x) or self.is_nan(y)) and self.order(x) < self.order(y)

    # --- conversion ------------------------------------------------------------------------------------------
    def from_int(self, value: int) -> int:
        """The float nearest to an integer of any size, ties to even; 0 gives +0.0."""
        return self.rounded(value, 0)

    def truncated(self, x: int) -> int:
        """x without its fraction, as an integer. x: finite."""
        m, e = self.split(x)
        magnitude = abs(m) << e if e >= 0 else abs(m) >> -e
        return -magnitude if m < 0 else magnitude

    def convert(self, x: int, to: Format) -> int:
        """x in the format `to`, rounded once if that is the narrower one."""
        if self.is_nan(x):
            return to.nan
        sign = to.sign if x & self.sign else 0
        if not self.is_finite(x):
            return sign | to.infinity
        m, e = self.split(x)
        return to.rounded(m, e, negative=bool(sign))


BINARY32 = Format(exponent_bits=8, fraction_bits=23)
BINARY64 = Format(exponent_bits=11, fraction_bits=52)
