"""Sums that never accumulate floats: integers of one scale, added exactly. DESIGN §6.

The values that one result adds up are rounded to `sum_bits` bits below the largest of them and added in float64,
where such a sum is exact in any order and on any number of threads (scales.py says how the rounding works). The
result is rounded to float32 once; a zero result is +0.0. A NaN or an infinity among the values gives NaN.
Error before that rounding: at most n * 2**-(sum_bits + 1) * 2**e for n values of magnitude below 2**e.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.errors import MalformedRecord
from worker.exact.scales import anchor64

__all__ = ["amax", "check_index", "embedding_dense_backward", "sum_bits", "sum_over"]

_BITS_MAX = 30  # 24 would keep the largest values whole; six more keep most others so


def sum_bits(count: int) -> int:
    """The bits kept of each of `count` values, so that their sum stays below 2**53: 30 up to 2**23 values."""
    return min(_BITS_MAX, 53 - (count - 1).bit_length())


def _rounded(x: Tensor, anchor: Tensor) -> Tensor:
    """float32 x rounded to the anchor's unit, as float64."""
    return x.double().add_(anchor).sub_(anchor)


def sum_over(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """aten.sum.dim_IntList of float32 x over `dims`."""
    dims = list(dims)
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    if not x.numel():
        return x.sum(dims, keepdim)  # zeros
    anchor = anchor64(x.abs().amax(dims, keepdim=True), sum_bits(count))
    return _rounded(x, anchor).sum(dims, keepdim).to(torch.float32).add_(0.0)


def amax(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """aten.amax of float32 x. Its order is free but for the sign of a zero: a zero result is +0.0."""
    return torch.amax(x, list(dims), keepdim=keepdim).add_(0.0)


def check_index(index: Tensor, size: int, what: str) -> None:
    """Raise MalformedRecord unless every element of int64 `index` is in [0, size)."""
    if index.numel():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= size:
            raise MalformedRecord(
                f"{what} reads row {low if low < 0 else high} of {size}",
                why="the data holds a number that the model has no row for",
                next_step="make the model's table as large as the data's largest number plus one",
            )


def embedding_dense_backward(
    grad: Tensor, index: Tensor, rows: int, padding: int = -1, scale_by_frequency: bool = False
) -> Tensor:
    """aten.embedding_dense_backward: row r of float32 (rows, D) is the sum of the `grad` rows whose index is r.

    grad: float32 (..., D); index: int64 (...). Each column has one scale over all rows of `grad`. Rows equal to
    `padding` are left out. Raises MalformedRecord for an index out of range.
    """
    check_index(index, rows, "embedding gradient")
    assert not scale_by_frequency, "capture never makes it"
    flat, places = grad.reshape(index.numel(), grad.shape[-1]), index.reshape(-1)
    total = torch.zeros((rows, flat.shape[1]), dtype=torch.float64, device=grad.device)
    if flat.numel():
        anchor = anchor64(flat.abs().amax(0, keepdim=True), sum_bits(flat.shape[0]))
        total.index_add_(0, places, _rounded(flat, anchor))
    if padding >= 0:
        total[padding] = 0.0
    return total.to(torch.float32).add_(0.0)
