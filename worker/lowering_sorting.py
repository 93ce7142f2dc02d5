"""Sorts, indices of several tensors and diagonals, rewritten as comparisons, masked sums and embeddings.

Like worker/lowering_indices.py, which chooses and scatters. Ties go to the lowest index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from protocol.errors import UnsupportedModel
from worker.lowering import lowers, total

__all__: list[str] = []

aten = torch.ops.aten

PLACES_MAX = 2**24
"""Elements of one comparison of every index with every place: 64 MiB of float32, as in one large activation."""


def _bounded(elements: int, what: str) -> None:
    if elements > PLACES_MAX:
        raise UnsupportedModel(
            f"{what} compares {elements} pairs of places, above {PLACES_MAX}",
            next_step="work on a shorter dimension, or do it outside the step",
        )


def _places(x: Tensor, dim: int) -> Tensor:
    """int64 0 .. n-1 along `dim` of x, size 1 along the others."""
    return torch.arange(x.shape[dim]).view([-1 if axis == dim else 1 for axis in range(x.dim())])


def _float(x: Tensor, what: str) -> Tensor:
    if x.dtype == torch.int64:
        raise UnsupportedModel(f"{what} of integers is not supported", next_step="convert to float32 first")
    return x.to(torch.float32)


def _first(hit: Tensor, dim: int) -> Tensor:
    """int64, size 1 along `dim`: the lowest place where `hit` is true, and the last place where none is."""
    backwards = hit.shape[dim] - 1 - _places(hit, dim)
    best = aten.amax.default(torch.where(hit, backwards.to(torch.float32), torch.zeros(())), [dim], True)
    return (-best + (hit.shape[dim] - 1)).to(torch.int64)


def _order(x: Tensor, dim: int, count: int) -> Tensor:
    """int64 indices of the `count` largest along `dim`, largest first, by how many are before each."""
    moved = x.movedim(dim, -1)
    size = moved.shape[-1]
    _bounded(moved.numel() * max(size, count), "a sort")
    mine, other = moved.unsqueeze(-1), moved.unsqueeze(-2)
    place = torch.arange(size)
    earlier = aten.logical_and.default(other == mine, place < place.view(-1, 1))
    before = aten.logical_or.default(other > mine, earlier)
    rank = total(before.to(torch.float32), [-1], False)  # exact: below 2**24
    here = rank.unsqueeze(-2) == torch.arange(count).to(torch.float32).view(-1, 1)  # (..., count, size)
    return _first(here, here.dim() - 1).squeeze(-1).movedim(-1, dim)


@lowers(aten.sort.default)
def sort(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    dim %= x.dim()
    index = _order(_float(x if descending else -x, "sort"), dim, x.shape[dim])
    return aten.gather.default(x, dim, index), index


@lowers(aten.sort.stable)
def sort_stable(
    x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    return sort(x, dim, descending)


@lowers(aten.any.default, aten.any.dim, aten.any.dims)
def any_of(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    dims = [dim] if isinstance(dim, int) else list(dim if dim is not None else range(x.dim()))
    return aten.amax.default((x != 0).to(torch.float32), dims, keepdim) > 0


@lowers(aten.all.default, aten.all.dim, aten.all.dims)
def all_of(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return aten.logical_not.default(any_of(x == 0, dim, keepdim))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index] along dimension 0. index: int64 of any shape, 0 <= index < x.shape[0]."""
    flat = x.reshape(x.shape[0], -1)
    if x.dtype == torch.float32:
        return aten.embedding.default(flat, index).reshape([*index.shape, *x.shape[1:]])
    wide = index.reshape(-1, 1).expand(index.numel(), flat.shape[1])
    return aten.gather.default(flat, 0, wide).reshape([*index.shape, *x.shape[1:]])


def _wrapped(index: Tensor, size: int) -> Tensor:
    return torch.where(index < 0, index + size, index)


def _linear(x: Tensor, indices: Sequence[Tensor | None]) -> tuple[int, int, Tensor] | None:
    """(first, last, index) if `indices` are integers for the dimensions first <= d < last of x and nothing else:
    the index, broadcast, into those dimensions taken as one.
    """
    given = [dim for dim, index in enumerate(indices) if index is not None]
    tensors = [index for index in indices if index is not None]
    if given != list(range(given[0], given[-1] + 1)) or any(index.dtype != torch.int64 for index in tensors):
        return None
    whole = torch.zeros((), dtype=torch.int64)
    for dim, index in zip(given, tensors, strict=True):
        whole = whole * x.shape[dim] + _wrapped(index, x.shape[dim])
    return given[0], given[-1] + 1, whole


@lowers(aten.index.Tensor)
def index(x: Tensor, indices: Sequence[Tensor | None]) -> Any:
    found = _linear(x, indices)
    if found is None:
        return NotImplemented
    first, last, whole = found
    merged = x.reshape([*x.shape[:first], math.prod(x.shape[first:last]), *x.shape[last:]])
    taken = _rows(merged.movedim(first, 0), whole)  # the index's dimensions, then those before `first`, then the rest
    where = list(range(whole.dim()))
    return taken.movedim(where, [first + axis for axis in where]) if where else taken


@lowers(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    mask = indices[0]
    if len(indices) == 1 and mask is not None and mask.dtype == torch.bool and values.numel() == 1 and not accumulate:
        wide = mask.reshape([*mask.shape, *[1] * (x.dim() - mask.dim())])
        return torch.where(wide, values.reshape(()).to(x.dtype), x)
    found = _linear(x, indices)
    if found is None or x.dtype != torch.float32 or not accumulate:
        return NotImplemented
    first, last, whole = found
    size = math.prod(x.shape[first:last])
    outer = list(x.shape[:first]) + list(x.shape[last:])
    grads = values.expand([*x.shape[:first], *whole.shape, *x.shape[last:]])
    axes = list(range(whole.dim()))
    rows = grads.movedim([first + axis for axis in axes], axes) if axes else grads
    rows = rows.reshape([*whole.shape, max(1, math.prod(outer))])
    summed = aten.embedding_dense_backward.default(rows, whole, size, -1, False)
    return x + summed.reshape([size, *outer]).movedim(0, first).reshape(x.shape)


@lowers(aten.roll.default)
def roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    if not dims:
        return roll(x.reshape(-1), shifts, [0]).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        cut = -shift % x.shape[dim]
        x = torch.cat([x.narrow(dim, cut, x.shape[dim] - cut), x.narrow(dim, 0, cut)], dim)
    return x


@lowers(aten.eye.default, aten.eye.m)
def eye(rows: int, columns: int | None = None, *, dtype: torch.dtype | None = None, **_options: Any) -> Tensor:
    width = rows if columns is None else columns
    return (torch.arange(rows).view(-1, 1) == torch.arange(width)).to(dtype or torch.float32)


@lowers(aten.diagonal.default)
def diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    if offset:
        return NotImplemented
    moved = x.movedim([dim1, dim2], [-2, -1])
    count = min(moved.shape[-2:])
    rows = moved.narrow(-2, 0, count)
    places = torch.arange(count).view(-1, 1).expand(*rows.shape[:-1], 1)
    return aten.gather.default(rows, rows.dim() - 1, places).squeeze(-1)


@lowers(aten.diagonal_backward.default)
def diagonal_backward(grad: Tensor, sizes: Sequence[int], offset: int, dim1: int, dim2: int) -> Any:
    if offset:
        return NotImplemented
    count, height, width = grad.shape[-1], sizes[dim1], sizes[dim2]
    line = aten.constant_pad_nd.default(grad, [0, height - count], 0.0).unsqueeze(-1)
    on = torch.arange(height).view(-1, 1) == torch.arange(width)
    return torch.where(on, line, torch.zeros(())).movedim([-2, -1], [dim1, dim2])
