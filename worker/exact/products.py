"""Matrix products that never accumulate floats: the same bits from any library, order and device. DESIGN §6.

Each row of A and column of B is rounded to integers of `width` bits times a power of two (worker/exact/scales.py).
Their sum over K is an exact integer; it is scaled and rounded to float32 once. Three backends compute the integer:

  float64: BLAS on the rounded values. Every partial sum is a multiple of unit_i * unit_j and at most
    K * 2**(2 * width - 2) of them, below 2**53, so no addition in it rounds, in whatever order, fused or not.
  int8: each integer is cut into signed bytes, and torch._int_mm multiplies the bytes into int32. One call gives
    all pairs of bytes, because the bytes of A are stacked below each other and those of B beside each other.
  int16: the compiled helper (worker/exact/compiled.py, widths 8 and 15) multiplies the integers as they are, with
    the multiply-add of 16-bit integers that every x86 processor since 2013 has, as fast as float32 products.

A zero result is +0.0. A row of A or column of B that holds a NaN or an infinity gives NaN in its whole row or
column, so that divergence stays visible. Result error: at most K * 2**(ea + eb + 2 - width) and half a unit in the
last place, with ea, eb the exponents of the row and the column; half of it where nothing is clamped.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from protocol import params
from protocol.errors import LimitExceeded, LocalProtocolError
from worker.exact import compiled
from worker.exact.scales import Rounded, round_for_product

__all__ = ["BACKENDS", "WIDTHS", "Products", "int8_is_exact", "int8_is_faster"]

BACKENDS = ("auto", "float64", "int8", "int16")
WIDTHS = (8, 15, 22)
_INT32_INNER_MAX = 2**15  # K per int32 product: the sum of two products, 2 * K * 2**14, stays below 2**31
_BLOCK_OUTPUTS = 2**17  # outputs made at a time: their four int32 products fill 2 MiB
_BLOCK_COLUMNS = 1024
_BLOCK_ROWS_MIN = 64  # fewer rows at a time and the library spends its time arranging B
_CUDA_ROWS_MIN = 17  # torch._int_mm on CUDA takes more than 16 rows, and K and N in multiples of 8
_AUTO_WORK_MIN = 2**20  # multiply-adds below which one BLAS call beats the slicing (measured)


@functools.cache
def int8_is_exact() -> bool:
    """Whether torch._int_mm multiplies int8 exactly here.

    On processors without integer dot products oneDNN adds pairs of byte products in saturating 16 bits (seen with
    ONEDNN_MAX_CPU_ISA=AVX2 and AVX512_CORE), so the extremes are tried, in sizes and memory orders that exercise
    whole vectors and remainders.
    """
    for rows, inner, columns in ((128, 512, 128), (33, 129, 35), (16, 28, 128), (1, 7, 3)):
        ramp = torch.arange(rows * inner).remainder_(251).sub_(125).to(torch.int8).reshape(rows, inner)
        for left in (torch.full((rows, inner), -128, dtype=torch.int8), ramp):
            for value in (-128, 127):
                right = torch.full((inner, columns), value, dtype=torch.int8)
                right[::2, ::2] = -128
                expected = left.long() @ right.long()
                for b in (right, right.t().contiguous().t()):
                    for a in (left, left.t().contiguous().t()):
                        try:
                            product = torch._int_mm(a, b)
                        except RuntimeError:
                            return False
                        if not torch.equal(product.long(), expected):
                            return False
    return True


@functools.cache
def int8_is_faster() -> bool:
    """Whether byte products beat the other backends here. Decides speed only: all give the same bits.

    Sizes are small because a processor without integer dot products takes a hundred times as long; such a one is
    told from the time alone, before exactness is tried.
    """
    narrow, wide = torch.ones((2 * 96, 256), dtype=torch.int8), torch.ones((96, 256), dtype=torch.float32)

    def best_of(call: Callable[[], Tensor]) -> float:
        taken = []
        for _ in range(4):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return min(taken)

    if compiled.has_products():
        other = best_of(lambda: compiled.product(wide, wide.t(), 15))
    else:
        other = best_of(lambda: wide.double() @ wide.double().t())
    return best_of(lambda: torch._int_mm(narrow, narrow.t())) < other and int8_is_exact()


def _dense(x: Tensor) -> Tensor:
    """x itself if it is a row-major or column-major matrix (per batch), else a copy that is."""
    if x.is_contiguous() or x.mT.is_contiguous():
        return x
    return x.contiguous()


def _round_to_odd(total: Tensor) -> Tensor:
    """int64 as float64 such that a later rounding to float32 rounds as if from the integer itself.

    Integers above 2**53 keep 53 bits, the last of which says whether anything was cut off. Source: Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums" (2008).
    """
    cut = (total & ~1023) | ((total & 1023) != 0).to(torch.int64).bitwise_left_shift_(10)
    return torch.where(total.abs() > 2**53, cut, total).double()


def _bytes(sums: Tensor, count: int, *, rows: bool) -> Tensor:
    """The signed bytes of rounded integers, least significant first; a = sum over s of byte_s * 256**s.

    sums: float32 values plus their anchors (scales.py), used up; (M, K) for rows, giving int8 (count * M, K);
    (K, N) for columns, giving (K, count * N). Memory order is kept, so that nothing is transposed.
    """
    flipped = sums.stride(0) == 1 and sums.stride(1) != 1
    bits = (sums.t() if flipped else sums).view(torch.int32)
    if count == 3:  # the third byte would meet the anchor's own bits, 22 and above
        bits.bitwise_and_(0x7FFFFF).sub_(1 << 22)
    height, width = bits.shape
    stacked = rows != flipped
    out = bits.new_empty((count * height, width) if stacked else (height, count * width), dtype=torch.int8)
    for index in range(count):
        if index:
            bits.add_(128).bitwise_right_shift_(8)  # carries what a negative low byte left out
        first, last = (index * height, (index + 1) * height) if stacked else (index * width, (index + 1) * width)
        part = out[first:last] if stacked else out[:, first:last]
        part.copy_(bits)  # conversion to int8 keeps the low byte, as a signed one
    return out.t() if flipped else out


def _joined(pairs: Tensor, count: int, whole: Tensor, *, inner: int) -> None:
    """The whole integers, into float64 `whole` (rows, columns), from all pairs of bytes over a K of `inner`.

    pairs: int32 (count, rows, count, columns). Sums of pairs of one weight stay in int32: at most 3 * K * 2**14
    for three bytes, where K <= 2**11, and 2 * K * 2**14 for two, with K <= 2**15. Above, float64 holds integers
    below 2**53, so multiplying by 256 and adding are exact, fused or not.
    """
    if count == 1:
        whole.copy_(pairs[0, :, 0])
        return
    if count == 2:
        middle = torch.add(pairs[0, :, 1], pairs[1, :, 0])
        if inner <= 1024:  # |high * high| <= 2**12, so 256 * K * 2**12 and the middle stay below 2**31
            whole.copy_(middle.add_(pairs[1, :, 1], alpha=256))
        else:
            whole.copy_(pairs[1, :, 1]).mul_(256.0).add_(middle.double())
        torch.add(pairs[0, :, 0].double(), whole, alpha=256.0, out=whole)
        return
    whole.copy_(pairs[2, :, 2])
    for group in (
        (pairs[1, :, 2], pairs[2, :, 1]),
        (pairs[0, :, 2], pairs[1, :, 1], pairs[2, :, 0]),
        (pairs[0, :, 1], pairs[1, :, 0]),
    ):
        total = torch.add(group[0], group[1])
        for other in group[2:]:
            total.add_(other)
        torch.add(total.double(), whole, alpha=256.0, out=whole)
    torch.add(pairs[0, :, 0].double(), whole, alpha=256.0, out=whole)


class Products:
    """mm and bmm of one width and backend. See the module's text for the arithmetic."""

    def __init__(self, width: int = 15, backend: str = "auto", *, helper: bool = True, padded: bool = False) -> None:
        """helper: whether `auto` may choose the compiled helper. padded: whether int8 products take whole eights only,
        as on CUDA; `auto` then always takes int8, for which tensor cores are made.

        Raises LocalProtocolError for a width or backend that is not known, or not there or not exact here.
        """
        if width not in WIDTHS or backend not in BACKENDS:
            raise LocalProtocolError(
                f"no exact product of width {width} with backend {backend!r}",
                next_step=f"use a width of {WIDTHS} and a backend of {BACKENDS}",
            )
        if backend == "int8" and not int8_is_exact():
            raise LocalProtocolError(
                "int8 products are not exact on this machine", next_step='use backend="float64", which gives equal bits'
            )
        helped = helper and compiled.has_products() and width <= compiled.PRODUCT_WIDTH_MAX
        if backend == "int16" and not helped:
            raise LocalProtocolError(
                f"no int16 products of width {width} on this machine",
                why="they take the compiled helper, AVX2 and a width of 8 or 15",
                next_step='use backend="float64", which gives equal bits',
            )
        self.width, self.backend, self._helped, self._padded = width, backend, helped, padded
        self._inner_max = 2 ** (53 - 2 * (width - 1))  # the largest K whose sums stay below 2**53
        self._count = {8: 1, 15: 2, 22: 3}[width]

    def _chosen(self, a: Tensor, b: Tensor) -> str:
        """The backend for these operands."""
        rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
        plain = a.device.type == "cpu" and inner <= compiled.PRODUCT_INNER_MAX
        if self.backend == "int16" and not plain:
            return "float64"
        if self.backend != "auto":
            return self.backend
        if self._padded:
            return "int8"
        if rows >= 16 and columns >= 16 and rows * inner * columns >= _AUTO_WORK_MIN and int8_is_faster():
            return "int8"
        return "int16" if self._helped and plain else "float64"

    def mm(self, a: Tensor, b: Tensor) -> Tensor:
        """aten.mm of float32 (M, K) and (K, N): float32 (M, N)."""
        return self._product(a, b)

    def bmm(self, a: Tensor, b: Tensor) -> Tensor:
        """aten.bmm of float32 (B, M, K) and (B, K, N): float32 (B, M, N)."""
        return self._product(a, b)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        inner = a.shape[-1]
        shape = (*a.shape[:-1], b.shape[-1])
        if self.width == 22 and inner > params.PRODUCT_LENGTH_22_MAX:
            raise LimitExceeded(
                f"a product over {inner} elements at width 22, at most {params.PRODUCT_LENGTH_22_MAX}",
                why="its sum may not fit 64 bits",
                next_step="use width 15, or a smaller batch",
            )
        if 0 in shape or not inner:
            return a.new_zeros(shape)
        a, b, backend = _dense(a), _dense(b), self._chosen(a, b)
        if backend == "int16":
            return compiled.product(a, b, self.width)
        left = round_for_product(a, -1, self.width)
        right = round_for_product(b, -2, self.width)
        if backend == "int8":
            result = self._by_bytes(left, right, shape)
        elif inner <= self._inner_max:
            result = torch.matmul(left.values64(), right.values64()).to(torch.float32)
        else:
            whole = self._whole_float64(left, right)
            result = whole.mul_(left.unit()).mul_(right.unit()).to(torch.float32)
        result += 0.0  # -0.0 becomes +0.0: which zero a sum of zeros gives depends on the library
        for bad in (left.bad, right.bad):
            if bad is not None:
                result.masked_fill_(bad, torch.nan)
        return result

    def _whole_float64(self, left: Rounded, right: Rounded) -> Tensor:
        """The exact sums over a K too large for float64, rounded to odd: float64 (..., M, N)."""
        a, b = left.integers64(), right.integers64()
        total = torch.zeros((), dtype=torch.int64, device=a.device)
        for first in range(0, a.shape[-1], self._inner_max):
            last = first + self._inner_max
            total = total + torch.matmul(a[..., first:last], b[..., first:last, :]).long()
        return _round_to_odd(total)

    def _by_bytes(self, left: Rounded, right: Rounded, shape: tuple[int, ...]) -> Tensor:
        """The scaled product through int8 products: float32 `shape`, (M, N) or (B, M, N)."""
        result = torch.empty(shape, dtype=torch.float32, device=left.sums.device)
        if len(shape) == 2:
            self._matrix_by_bytes(left, right, result)
        else:
            for index in range(shape[0]):
                self._matrix_by_bytes(left.at(index), right.at(index), result[index])
        return result

    def _matrix_by_bytes(self, left: Rounded, right: Rounded, result: Tensor) -> None:
        """One matrix of `_by_bytes`, into float32 `result` (M, N), in blocks whose products stay in cache."""
        inner, (rows, columns), count = left.sums.shape[1], result.shape, self._count
        step = min(_INT32_INNER_MAX, self._inner_max)
        wide = min(columns, _BLOCK_COLUMNS)
        high = min(rows, max(_BLOCK_ROWS_MIN, _BLOCK_OUTPUTS // wide))
        pairs = torch.empty(count * high * count * wide, dtype=torch.int32, device=result.device)
        scratch = torch.empty(high * wide, dtype=torch.float64, device=result.device)
        row_unit, column_unit = left.unit(), right.unit()
        tops = [_bytes(left.sums[at : at + high], count, rows=True) for at in range(0, rows, high)]
        for column in range(0, columns, wide):
            side = _bytes(right.sums[:, column : column + wide], count, rows=False)
            n = side.shape[1] // count
            for top, row in zip(tops, range(0, rows, high), strict=True):
                m = top.shape[0] // count
                product = pairs[: count * m * count * n].view(count * m, count * n)
                whole = scratch[: m * n].view(m, n)
                if inner <= step:
                    self._int_mm(top, side, product)
                    _joined(product.view(count, m, count, n), count, whole, inner=inner)
                else:
                    self._long_inner(top, side, step, product, whole)
                # Exact: the units are powers of two and nothing leaves the range of float64.
                whole.mul_(row_unit[row : row + m]).mul_(column_unit[:, column : column + n])
                result[row : row + m, column : column + n] = whole

    def _int_mm(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """int32 out (M, N) = int8 a (M, K) @ b (K, N); zeros make up what CUDA's kernel cannot take."""
        if not self._padded:
            torch._int_mm(a, b, out=out)
            return
        rows, columns = out.shape
        high = max(_CUDA_ROWS_MIN, rows) - rows
        deep, wide = -a.shape[1] % 8, -columns % 8
        a, b = torch.nn.functional.pad(a, (0, deep, 0, high)), torch.nn.functional.pad(b, (0, wide, 0, deep))
        out.copy_(torch._int_mm(a, b)[:rows, :columns])

    def _long_inner(self, top: Tensor, side: Tensor, step: int, product: Tensor, whole: Tensor) -> None:
        """As one product and `_joined`, for a K above `step`, rounded to odd above 2**53."""
        inner = top.shape[1]
        count = self._count
        long = inner > self._inner_max
        total = torch.zeros(whole.shape, dtype=torch.int64 if long else torch.float64, device=whole.device)
        for first in range(0, inner, step):
            self._int_mm(top[:, first : first + step], side[first : first + step], product)
            _joined(product.view(count, whole.shape[0], count, whole.shape[1]), count, whole, inner=step)
            total += whole.long() if long else whole
        whole.copy_(_round_to_odd(total) if long else total)
