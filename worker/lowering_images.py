"""Movement, convolutions and pools rewritten as operations of protocol/operations.py.

A convolution becomes its window's shifted slices joined into columns and one matrix product, a pool becomes
maxima or sums over the same slices; their gradients pad each slice back to its place and add in a fixed order.
So no accumulation of unknown order remains, and every piece has a kernel and a referee rule already.
Source: im2col, Chellapilla et al. 2006.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocol.errors import UnsupportedModel
from worker.lowering import lowers, total

__all__: list[str] = []

aten = torch.ops.aten


# --- movement ----------------------------------------------------------------------------------------------
@lowers(aten.view.default, aten._unsafe_view.default)
def view(x: Tensor, size: Sequence[int]) -> Any:
    # PyTorch asked for a view of its own kernel's memory order; ours may have left another, and order is not a value.
    if x.is_contiguous():
        return NotImplemented
    return aten.view.default(aten.clone.default(x, memory_format=torch.contiguous_format), size)


@lowers(aten.copy.default)
def copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(x.dtype).expand(x.shape).clone()


@lowers(aten.masked_fill.Scalar)
def masked_fill(x: Tensor, mask: Tensor, value: float) -> Tensor:
    return torch.where(mask, torch.full((), value, dtype=x.dtype), x)


@lowers(aten.masked_fill.Tensor)
def masked_fill_tensor(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask, value.to(x.dtype), x)


def _band(x: Tensor, diagonal: int, lower: bool) -> Tensor:
    rows = torch.arange(x.shape[-2]).view(-1, 1) + diagonal
    columns = torch.arange(x.shape[-1])
    keep = (columns <= rows) if lower else (columns >= rows)
    if x.dtype == torch.bool:
        return aten.logical_and.default(keep, x)
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype))


@lowers(aten.tril.default)
def tril(x: Tensor, diagonal: int = 0) -> Tensor:
    return _band(x, diagonal, True)


@lowers(aten.triu.default)
def triu(x: Tensor, diagonal: int = 0) -> Tensor:
    return _band(x, diagonal, False)


@lowers(aten.stack.default)
def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    dim %= tensors[0].dim() + 1
    return torch.cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


@lowers(aten.unbind.int)
def unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
    return [x.select(dim, place) for place in range(x.shape[dim])]


@lowers(aten.split_with_sizes.default)
def split_sizes(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    starts = list(itertools.accumulate(sizes, initial=0))
    return [x.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=False)]


@lowers(aten.split.Tensor)
def split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    whole = x.shape[dim]
    return split_sizes(x, [min(size, whole - start) for start in range(0, whole, size)], dim)


@lowers(aten.repeat.default)
def repeat(x: Tensor, times: Sequence[int]) -> Tensor:
    shape = [1] * (len(times) - x.dim()) + list(x.shape)
    pairs = [part for size in shape for part in (1, size)]
    spread = [part for count, size in zip(times, shape, strict=True) for part in (count, size)]
    return x.reshape(pairs).expand(spread).reshape([a * b for a, b in zip(times, shape, strict=True)])


def _pads(rank: int, dim: int, before: int, after: int) -> list[int]:
    """The padding list of constant_pad_nd (last dimension first) for one dimension."""
    pads = [0] * (2 * (rank - dim))
    pads[-2:] = [before, after]
    return pads


def _dilate(x: Tensor, dim: int, step: int) -> Tensor:
    """Put step - 1 zeros between the elements along `dim`."""
    if step == 1 or x.shape[dim] <= 1:
        return x
    wide = aten.constant_pad_nd.default(x.unsqueeze(dim + 1), _pads(x.dim() + 1, dim + 1, 0, step - 1), 0.0)
    flat = wide.reshape([*x.shape[:dim], x.shape[dim] * step, *x.shape[dim + 1 :]])
    return flat.narrow(dim, 0, (x.shape[dim] - 1) * step + 1)


Cuts = list[tuple[int, int, int, int]]


def _plain_cuts(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Cuts | None:
    """(dim, start, end, step) of the slices of a contiguous `x` that a strided view of it is, or None.

    Guessed from the strides, then confirmed on element numbers with numpy's strides.
    """
    if not x.is_contiguous() or not 0 < x.numel() <= 2**24:
        return None
    places = np.arange(x.numel(), dtype=np.int64).reshape(tuple(x.shape))
    wanted = np.lib.stride_tricks.as_strided(
        places.reshape(-1)[offset:], tuple(size), [8 * step for step in stride], writeable=False
    )
    cuts, found, left = [], places, list(zip(size, stride, strict=True))
    for dim, start in enumerate(int(start) for start in np.unravel_index(offset, tuple(x.shape))):
        count, step = 1, 1
        if left and left[0][1] % x.stride(dim) == 0 and left[0][0] <= x.shape[dim] - start:
            count, step = left[0][0], max(1, left[0][1] // x.stride(dim))
            left.pop(0)
        end = min(start + (count - 1) * step + 1, x.shape[dim])
        cuts.append((dim, start, end, step))
        found = found[(slice(None),) * dim + (slice(start, end, step),)]
    if found.size != wanted.size or not (found.reshape(wanted.shape) == wanted).all():
        return None
    return cuts


# Autograd of writes into slices asks for strided views; those that are plain slices are lowered.
@lowers(aten.as_strided.default)
def as_strided(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Any:
    cuts = _plain_cuts(x, size, stride, offset or 0)
    if cuts is None:
        return NotImplemented
    for dim, start, end, step in cuts:
        x = aten.slice.Tensor(x, dim, start, end, step)
    return x.reshape(size)


@lowers(aten.as_strided_scatter.default)
def as_strided_scatter(
    x: Tensor, source: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Any:
    cuts = _plain_cuts(x, size, stride, offset or 0)
    if cuts is None or any(step != 1 for *_, step in cuts):
        return NotImplemented
    return _put(x, source.reshape([end - start for _, start, end, _ in cuts]), cuts)


def _put(x: Tensor, source: Tensor, cuts: Cuts) -> Tensor:
    if not cuts:
        return source
    (dim, start, end, step), *rest = cuts
    inner = _put(aten.slice.Tensor(x, dim, start, end, step), source, rest)
    return slice_scatter(x, inner, dim, start, end)


@lowers(aten.slice_backward.default)
def slice_backward(grad: Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Tensor:
    dim %= len(sizes)
    start = min(max(start + sizes[dim] if start < 0 else start, 0), sizes[dim])
    spread = _dilate(grad, dim, step)
    after = sizes[dim] - start - spread.shape[dim]
    return aten.constant_pad_nd.default(spread, _pads(grad.dim(), dim, start, after), 0.0)


@lowers(aten.select_backward.default)
def select_backward(grad: Tensor, sizes: Sequence[int], dim: int, index: int) -> Tensor:
    dim, index = dim % len(sizes), index % sizes[dim]
    pads = _pads(len(sizes), dim, index, sizes[dim] - index - 1)
    return aten.constant_pad_nd.default(grad.unsqueeze(dim), pads, 0.0)


@lowers(aten.slice_scatter.default)
def slice_scatter(
    x: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    if step != 1:
        return NotImplemented
    first, last, _ = slice(start, end).indices(x.shape[dim])
    if first == 0 and last == x.shape[dim]:
        return source.expand(x.shape).clone()
    return torch.cat([x.narrow(dim, 0, first), source, x.narrow(dim, last, x.shape[dim] - last)], dim)


@lowers(aten.select_scatter.default)
def select_scatter(x: Tensor, source: Tensor, dim: int, index: int) -> Any:
    dim, index = dim % x.dim(), index % x.shape[dim]
    return slice_scatter(x, source.unsqueeze(dim), dim, index, index + 1)


# --- windows -----------------------------------------------------------------------------------------------
def _each(value: Sequence[int], rank: int) -> list[int]:
    return list(value) * (rank if len(value) == 1 else 1)


class _Window:
    """The places of a sliding window over the last dimensions of (N, C, *spatial), and the way back."""

    def __init__(self, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, fill: float) -> None:
        self.rank = x.dim() - 2
        self.kernel, self.padding = _each(kernel, self.rank), _each(padding, self.rank)
        self.stride, self.dilation = _each(stride or kernel, self.rank), _each(dilation, self.rank)
        self.space = list(x.shape[2:])
        padded = [size + 2 * pad for size, pad in zip(self.space, self.padding, strict=True)]
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        self.out = [(p - r) // s + 1 for p, r, s in zip(padded, reach, self.stride, strict=True)]
        self.places = list(itertools.product(*(range(size) for size in self.kernel)))
        self.padded = padded
        self.fill = fill

    def slices(self, x: Tensor) -> list[Tensor]:
        """(N, C, *out) for each place of the window."""
        if any(self.padding):
            pads = [pad for size in reversed(self.padding) for pad in (size, size)]
            x = aten.constant_pad_nd.default(x, pads, self.fill)
        found = []
        for place in self.places:
            part = x
            for axis, offset in enumerate(place):
                start, step = offset * self.dilation[axis], self.stride[axis]
                end = start + step * (self.out[axis] - 1) + 1
                part = aten.slice.Tensor(part, axis + 2, start, end, step)
            found.append(part)
        return found

    def back(self, grads: Sequence[Tensor]) -> Tensor:
        """(N, C, *spatial): each place's gradient put back and added, in the order of the places."""
        summed: Tensor | None = None
        for place, grad in zip(self.places, grads, strict=True):
            part = grad
            pads: list[int] = []
            for axis, offset in enumerate(place):
                part = _dilate(part, axis + 2, self.stride[axis])
                start = offset * self.dilation[axis]
                pads = [start, self.padded[axis] - start - part.shape[axis + 2], *pads]
            part = aten.constant_pad_nd.default(part, pads, 0.0)
            summed = part if summed is None else summed + part
        assert summed is not None
        for axis, pad in enumerate(self.padding):
            summed = summed.narrow(axis + 2, pad, self.space[axis])
        return summed


def _columns(window: _Window, x: Tensor, groups: int) -> Tensor:
    """(groups, places * channels of a group, N * out)."""
    batch, channels = x.shape[:2]
    joined = torch.stack(window.slices(x))  # (places, N, C, *out)
    split_channels = joined.reshape(len(window.places), batch, groups, channels // groups, -1)
    return split_channels.permute(2, 0, 3, 1, 4).reshape(groups, len(window.places) * channels // groups, -1)


def _filters(weight: Tensor, groups: int) -> Tensor:
    """(groups, outputs of a group, places * channels of a group)."""
    outputs, channels = weight.shape[:2]
    return (
        weight.reshape(groups, outputs // groups, channels, -1).transpose(2, 3).reshape(groups, outputs // groups, -1)
    )


def _product(x: Tensor, y: Tensor) -> Tensor:
    if x.shape[0] == 1:
        return aten.mm.default(x.squeeze(0), y.squeeze(0)).unsqueeze(0)
    return aten.bmm.default(x, y)


def _refuse_transposed(transposed: bool) -> None:
    if transposed:
        raise UnsupportedModel(
            "transposed convolutions are not supported", next_step="use nn.Conv2d, or nn.Linear and a reshape"
        )


@lowers(aten.convolution.default)
def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor:
    _refuse_transposed(transposed)
    window = _Window(x, weight.shape[2:], stride, padding, dilation, 0.0)
    product = _product(_filters(weight, groups), _columns(window, x, groups))
    y = product.reshape(weight.shape[0], x.shape[0], *window.out).transpose(0, 1)
    return y if bias is None else y + bias.view(-1, *[1] * window.rank)


@lowers(aten.convolution_backward.default)
def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _refuse_transposed(transposed)
    window = _Window(x, weight.shape[2:], stride, padding, dilation, 0.0)
    outputs, channels = weight.shape[:2]
    places, batch = len(window.places), x.shape[0]
    rows = grad.transpose(0, 1).reshape(groups, outputs // groups, -1)  # (G, O/G, N*out)
    dx = dweight = None
    if mask[0]:
        columns = _product(_filters(weight, groups).transpose(1, 2), rows)
        apart = columns.reshape(groups, places, channels, batch, *window.out)
        each = apart.permute(1, 3, 0, 2, *range(4, 4 + window.rank)).reshape(
            places, batch, groups * channels, *window.out
        )
        dx = window.back(each.unbind(0))
    if mask[1]:
        flat = _product(rows, _columns(window, x, groups).transpose(1, 2))
        dweight = flat.reshape(outputs, places, channels).transpose(1, 2).reshape(weight.shape)
    dims = [0, *range(2, grad.dim())]
    return dx, dweight, (total(grad, dims, False) if mask[2] else None)


def _no_ceil(ceil_mode: bool) -> None:
    if ceil_mode:
        raise UnsupportedModel("pools with ceil_mode=True are not supported", next_step="pad the input instead")


@lowers(aten.max_pool2d_with_indices.default)
def max_pool(
    x: Tensor, kernel: Any, stride: Any = (), padding: Any = (0,), dilation: Any = (1,), ceil_mode: bool = False
) -> tuple[Tensor, Tensor]:
    _no_ceil(ceil_mode)
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    window = _Window(batched, kernel, stride, padding, dilation, -math.inf)
    best, *others = window.slices(batched)
    for part in others:
        best = aten.maximum.default(best, part)
    best = best if x.dim() == 4 else best.squeeze(0)
    # Our gradient finds the maxima again, so the indices are never read; a model that reads them is refused.
    return best, aten.argmax.default(best).expand(best.shape)


@lowers(aten.max_pool2d_with_indices_backward.default)
def max_pool_backward(
    grad: Tensor, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, indices: Tensor
) -> Tensor:
    _no_ceil(ceil_mode)
    if x.dim() == 3:
        batch = [tensor.unsqueeze(0) for tensor in (grad, x)]
        return max_pool_backward(*batch, kernel, stride, padding, dilation, ceil_mode, indices).squeeze(0)
    window = _Window(x, kernel, stride, padding, dilation, -math.inf)
    parts = window.slices(x)
    best = parts[0]
    for part in parts[1:]:
        best = aten.maximum.default(best, part)
    left = torch.ones_like(grad, dtype=torch.bool)  # windows whose first maximum is yet to be met
    grads = []
    for part in parts:
        first = aten.logical_and.default(left, part == best)
        grads.append(torch.where(first, grad, torch.zeros((), dtype=grad.dtype)))
        left = aten.logical_and.default(left, aten.logical_not.default(first))
    return window.back(grads)


def _divisor(x: Tensor, window: _Window, count_padding: bool, divisor: int | None) -> Tensor | int:
    """What the sum over each window is divided by: a number, or float32 of the output's height and width."""
    if divisor or count_padding or not any(window.padding):
        return divisor or len(window.places)
    inside = torch.ones([1, 1, *x.shape[2:]])
    return total(torch.stack(window.slices(inside)), [0], False)


@lowers(aten.avg_pool2d.default)
def avg_pool(
    x: Tensor,
    kernel: Any,
    stride: Any = (),
    padding: Any = (0,),
    ceil_mode: bool = False,
    count_padding: bool = True,
    divisor: int | None = None,
) -> Any:
    _no_ceil(ceil_mode)
    if x.dim() != 4:
        return NotImplemented
    window = _Window(x, kernel, stride, padding, (1,), 0.0)
    return total(torch.stack(window.slices(x)), [0], False) / _divisor(x, window, count_padding, divisor)


@lowers(aten.avg_pool2d_backward.default)
def avg_pool_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_padding: bool,
    divisor: int | None,
) -> Any:
    _no_ceil(ceil_mode)
    if x.dim() != 4:
        return NotImplemented
    window = _Window(x, kernel, stride, padding, (1,), 0.0)
    return window.back([grad / _divisor(x, window, count_padding, divisor)] * len(window.places))


def _cells(x: Tensor, out: Sequence[int]) -> list[int]:
    if any(size % cells for size, cells in zip(x.shape[-2:], out, strict=True)):
        raise UnsupportedModel(
            f"adaptive average pool of {tuple(x.shape[-2:])} to {tuple(out)}: the sizes do not divide",
            next_step="choose an output size that divides the input size",
        )
    (height, width), (rows, columns) = x.shape[-2:], out
    return [*x.shape[:-2], rows, height // rows, columns, width // columns]


@lowers(aten._adaptive_avg_pool2d.default)
def adaptive_pool(x: Tensor, out: Sequence[int]) -> Tensor:
    cells = _cells(x, out)
    return total(x.reshape(cells), [len(cells) - 3, len(cells) - 1], False) / (cells[-3] * cells[-1])


@lowers(aten._adaptive_avg_pool2d_backward.default)
def adaptive_pool_backward(grad: Tensor, x: Tensor) -> Tensor:
    cells = _cells(x, grad.shape[-2:])
    each = (grad / (cells[-3] * cells[-1])).unsqueeze(-1).unsqueeze(-3)
    return each.expand(cells).reshape(x.shape)


@lowers(aten.upsample_nearest2d_backward.default)
def upsample_backward(
    grad: Tensor, out: Sequence[int], sizes: Sequence[int], rows: float | None = None, columns: float | None = None
) -> Any:
    if any(size % source for size, source in zip(out, sizes[2:], strict=True)):
        return NotImplemented
    cells = _cells(grad, sizes[2:])
    return total(grad.reshape(cells), [3, 5], False)
