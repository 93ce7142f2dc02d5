"""Choosing, counting and scattering rewritten as comparisons with arange, maxima, sums and embeddings.

Like worker/lowering.py: one function for each ATen overload. Where several elements are equal the lowest index is
chosen, always; PyTorch leaves that open. Counts and indices pass through float32, exact below 2**24, and larger
dimensions are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from protocol.errors import UnsupportedModel
from worker.lowering import lowers, total

__all__ = ["TOPK_MAX", "shape_known_functions"]

aten = torch.ops.aten
_PLACES_MAX = 2**24  # float32 holds every integer up to here
_ROUNDS_MAX = 32  # columns that a scatter unrolls into
TOPK_MAX = 128  # rounds, of five operations, that a topk unrolls into: what people sample text from is 40 or 50
_CUMSUM_MAX = 4096  # a running sum costs the square of its length


def _axis(x: Tensor, dim: int) -> int:
    return dim % max(1, x.dim())


def _places(x: Tensor, dim: int) -> Tensor:
    """arange along `dim`, int64, of size 1 elsewhere."""
    if x.shape[dim] > _PLACES_MAX:
        raise UnsupportedModel(
            f"an index over {x.shape[dim]} elements", why=f"at most {_PLACES_MAX} are told apart",
            next_step="split the dimension",
        )  # fmt: skip
    return torch.arange(x.shape[dim]).view([-1 if axis == dim else 1 for axis in range(x.dim())])


def _first_hit(hit: Tensor, dim: int) -> Tensor:
    """int64, size 1 along `dim`: the lowest place where bool `hit` is true; the last one if it is nowhere (NaN)."""
    places = _places(hit, dim).to(torch.float32)
    last = torch.full((), float(1 - hit.shape[dim]))
    return (-aten.amax.default(torch.where(hit, -places, last), [dim], True)).to(torch.int64)


def _chosen(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The largest value along `dim` and its lowest index, both of size 1 there."""
    peak = aten.amax.default(x, [dim], True)
    return peak, _first_hit(x == peak, dim)


@lowers(aten.argmax.default)
def argmax(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    flat = x.reshape(-1) if dim is None else x
    axis = 0 if dim is None else _axis(x, dim)
    _, index = _chosen(flat.to(torch.float32), axis)
    if dim is None:
        return index.reshape([1] * x.dim() if keepdim else [])
    return index if keepdim else index.squeeze(axis)


@lowers(aten.argmin.default)
def argmin(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    return argmax(-x, dim, keepdim)


@lowers(aten.max.dim)
def max_dim(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    axis = _axis(x, dim)
    value, index = _chosen(x, axis)
    return (value, index) if keepdim else (value.squeeze(axis), index.squeeze(axis))


@lowers(aten.min.dim)
def min_dim(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    value, index = max_dim(-x, dim, keepdim)
    return -value, index


@lowers(aten.topk.default)
def topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    if k > TOPK_MAX:
        raise UnsupportedModel(
            f"topk of {k} elements", why=f"it is unrolled into rounds, at most {TOPK_MAX}",
            next_step="choose fewer, or do it outside the step",
        )  # fmt: skip
    axis = _axis(x, dim)
    left = x if largest else -x
    values, indices = [], []
    taken = torch.full((), -math.inf)
    free: Tensor | None = None  # a place that holds -inf itself must not be taken twice
    for number in range(k):
        value = aten.amax.default(left, [axis], True)
        hit = left == value
        index = _first_hit(hit if free is None else aten.logical_and.default(hit, free), axis)
        values.append(value if largest else -value)
        indices.append(index)
        if number + 1 < k:
            here = _places(x, axis) != index
            free = here if free is None else aten.logical_and.default(free, here)
            left = torch.where(free, left, taken)
    return torch.cat(values, axis), torch.cat(indices, axis)


# --- scattering --------------------------------------------------------------------------------------------
def _columns(x: Tensor, dim: int, index: Tensor, what: str) -> Iterator[tuple[int, Tensor]]:
    """(place, bool mask of x) of each index along `dim`, in their order."""
    others = [axis for axis in range(x.dim()) if axis != dim]
    if any(index.shape[axis] != x.shape[axis] for axis in others):
        raise UnsupportedModel(
            f"{what} with an index of {tuple(index.shape)} into {tuple(x.shape)}",
            why="only the dimension it goes along may differ",
            next_step="slice the tensor first, or use torch.where with a comparison against torch.arange",
        )
    if index.shape[dim] > _ROUNDS_MAX:
        raise UnsupportedModel(
            f"{what} of {index.shape[dim]} elements a row", why=f"it is unrolled, at most {_ROUNDS_MAX}",
            next_step="use torch.where with a comparison against torch.arange, or F.embedding for sums of rows",
        )  # fmt: skip
    for place in range(index.shape[dim]):
        yield place, _places(x, dim) == aten.slice.Tensor(index, dim, place, place + 1)


@lowers(aten.scatter.src)
def scatter(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    axis = _axis(x, dim)
    for place, hit in _columns(x, axis, index, "scatter"):
        x = torch.where(hit, aten.slice.Tensor(source, axis, place, place + 1), x)
    return x


@lowers(aten.scatter.value)
def scatter_value(x: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
    filled = torch.full((), value, dtype=x.dtype)
    for _, hit in _columns(x, _axis(x, dim), index, "scatter"):
        x = torch.where(hit, filled, x)
    return x


@lowers(aten.scatter_add.default)
def scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    axis = _axis(x, dim)
    for place, hit in _columns(x, axis, index, "scatter_add"):
        part = aten.slice.Tensor(source, axis, place, place + 1)
        x = x + torch.where(hit, part, torch.zeros_like(part))
    return x


# --- rows of a table ---------------------------------------------------------------------------------------
def _rows_first(x: Tensor, axis: int) -> Tensor:
    """(size of axis, the rest), float32."""
    if x.dtype != torch.float32:
        raise UnsupportedModel(
            f"choosing rows of a {str(x.dtype).removeprefix('torch.')} tensor",
            next_step="use torch.gather, or convert to float32",
        )
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


def _take(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """x with dimension `axis` replaced by those of `index`, whose elements say which row stands there."""
    rest = [size for place, size in enumerate(x.shape) if place != axis]
    taken = aten.embedding.default(_rows_first(x, axis), index.reshape(-1)).reshape([*index.shape, *rest])
    order = list(range(index.dim(), index.dim() + axis)) + list(range(index.dim()))
    return taken.permute(order + list(range(index.dim() + axis, taken.dim())))


@lowers(aten.index_select.default)
def index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return _take(x, _axis(x, dim), index.reshape(-1))


@lowers(aten.index_add.default)
def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    axis = _axis(x, dim)
    rows = _rows_first(source, axis)
    added = aten.embedding_dense_backward.default(rows, index.reshape(-1), x.shape[axis], -1, False)
    rest = [size for place, size in enumerate(x.shape) if place != axis]
    back = added.reshape([x.shape[axis], *rest]).movedim(0, axis)
    return x + (back if alpha == 1 else back * alpha)


@lowers(aten.flip.default)
def flip(x: Tensor, dims: Sequence[int]) -> Tensor:
    for dim in dims:
        axis = _axis(x, dim)
        backwards = x.shape[axis] - 1 - _places(x, axis)
        x = aten.gather.default(x, axis, backwards.expand(x.shape))
    return x


@lowers(aten.cumsum.default)
def cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """The running sum: each element is one exact sum of those before it, so its error does not grow along the row."""
    axis, kind = _axis(x, dim), dtype or (x.dtype if x.is_floating_point() else torch.int64)
    if not x.dim():
        return x.to(kind)
    size = x.shape[axis]
    if size > _CUMSUM_MAX:
        raise UnsupportedModel(
            f"cumsum of {size} elements", why=f"it costs their square, at most {_CUMSUM_MAX}",
            next_step="sum in blocks first",
        )  # fmt: skip
    rows = x.to(torch.float32).movedim(axis, -1).unsqueeze(-2)
    before = torch.arange(size).view(1, -1) <= torch.arange(size).view(-1, 1)
    summed = total(torch.where(before, rows, torch.zeros(())), [rows.dim() - 1], False)
    return summed.movedim(-1, axis).to(kind)


# --- functions that look at values only to learn a shape --------------------------------------------------------
class _ShapeKnown(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._nn.one_hot:  # looks at its data to check it against the number of classes
            return _one_hot(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _one_hot(index: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:
        raise UnsupportedModel(
            "F.one_hot without the number of classes", why="its shape would depend on the data",
            next_step="write F.one_hot(x, num_classes)",
        )  # fmt: skip
    return (index.unsqueeze(-1) == torch.arange(num_classes)).to(torch.int64)


@contextmanager
def shape_known_functions() -> Iterator[None]:
    """Within, functions that read tensor values just to know a shape take it from their arguments."""
    with _ShapeKnown():
        yield
