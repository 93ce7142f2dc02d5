"""ATen operations rewritten as the few of protocol/operations.py: reductions, products, norms, losses.

A capture runs the traced step through `LOWERINGS`, so that what remains is matrix products, sums, movement and
element-wise arithmetic: the operations with an exact kernel and a referee rule (DESIGN §6, §7). Each function has
the signature of the ATen overload it stands for; tensors are float32 unless said. Formulas are the textbook ones
and PyTorch's own (torch/_decomp); only the order of roundings differs from the fused kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["LOWERINGS", "lowers"]

aten = torch.ops.aten
LOWERINGS: dict[Any, Callable[..., Any]] = {}


def lowers(*overloads: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the rewriting of `overloads`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for overload in overloads:
            LOWERINGS[overload] = function
        return function

    return register


def total(x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    """The sum over `dims` (any order, negative allowed); over none it is x."""
    wanted = sorted(dim % max(1, x.dim()) for dim in dims)
    return aten.sum.dim_IntList(x, wanted, keepdim) if x.dim() and wanted else x


def _all_dims(x: Tensor, dims: Sequence[int] | int | None) -> list[int]:
    if isinstance(dims, int):
        return [dims]
    return list(dims) if dims else list(range(x.dim()))


def _count(x: Tensor, dims: Sequence[int]) -> int:
    return math.prod(x.shape[dim] for dim in dims) if x.dim() else 1


# --- reductions --------------------------------------------------------------------------------------------
@lowers(aten.sum.default)
def sum_all(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return total(x.to(dtype or _sum_dtype(x)), range(x.dim()), False)


@lowers(aten.sum.dim_IntList)
def sum_dims(x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    plain = sorted(dim % max(1, x.dim()) for dim in _all_dims(x, dims))
    if x.dtype == torch.float32 and x.dim() and list(dims or ()) == plain:
        return NotImplemented
    if _sum_dtype(x) == torch.int64 and dtype is None:
        # No exact integer sum is on the list; counts below 2^24 are exact in float32.
        return total(x.to(torch.float32), plain, keepdim).to(torch.int64)
    return total(x.to(torch.float32), plain, keepdim)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.int64


@lowers(aten.mean.default)
def mean_all(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return total(x.to(dtype or x.dtype), range(x.dim()), False) / max(1, x.numel())


@lowers(aten.mean.dim)
def mean_dims(x: Tensor, dims: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    over = _all_dims(x, dims)
    return total(x.to(dtype or x.dtype), over, keepdim) / _count(x, over)


@lowers(aten.var_mean.correction)
def var_mean(
    x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    over = _all_dims(x, dim)
    mean = mean_dims(x, over, True)
    centred = x - mean
    divisor = max(0, _count(x, over) - (1 if correction is None else correction))
    variance = total(centred * centred, over, keepdim) / divisor
    return variance, mean if keepdim else mean_dims(x, over, False)


@lowers(aten.var.correction)
def var(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


@lowers(aten.std.correction)
def std(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return aten.sqrt.default(var(x, dim, correction=correction, keepdim=keepdim))


@lowers(aten.amin.default)
def amin(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Tensor:
    return -aten.amax.default(-x, dim, keepdim)


@lowers(aten.max.default)
def max_all(x: Tensor) -> Tensor:
    return aten.amax.default(x, list(range(x.dim())), False)


@lowers(aten.min.default)
def min_all(x: Tensor) -> Tensor:
    return amin(x, list(range(x.dim())))


# --- products ----------------------------------------------------------------------------------------------
def scaled(x: Tensor, factor: float) -> Tensor:
    """x times a Python number, and x itself for 1."""
    return x if factor == 1 else x * factor


@lowers(aten.addmm.default)
def addmm(bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return scaled(aten.mm.default(x, y), alpha) + scaled(bias, beta)


@lowers(aten.baddbmm.default)
def baddbmm(bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return scaled(aten.bmm.default(x, y), alpha) + scaled(bias, beta)


@lowers(aten.mv.default)
def mv(x: Tensor, y: Tensor) -> Tensor:
    return aten.mm.default(x, y.view(-1, 1)).view(-1)


@lowers(aten.dot.default)
def dot(x: Tensor, y: Tensor) -> Tensor:
    return total(x * y, [0], False)


# --- normalisation, softmax, losses ------------------------------------------------------------------------
@lowers(aten.native_layer_norm.default)
def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(x.dim() - len(shape), x.dim()))
    count = math.prod(shape)
    mean = total(x, dims, True) / count
    centred = x - mean
    rstd = aten.reciprocal.default(aten.sqrt.default(total(centred * centred, dims, True) / count + eps))
    y = centred * rstd
    if weight is not None:
        y = y * weight
    return (y if bias is None else y + bias), mean, rstd


@lowers(aten.native_layer_norm_backward.default)
def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    inner = list(range(x.dim() - len(shape), x.dim()))
    outer = list(range(x.dim() - len(shape)))
    count = math.prod(shape)
    normal = (x - mean) * rstd
    weighted = grad if weight is None else grad * weight
    along = total(weighted * normal, inner, True) / count
    dx = (weighted - total(weighted, inner, True) / count - normal * along) * rstd
    dweight = total(grad * normal, outer, False) if mask[1] and weight is not None else None
    dbias = total(grad, outer, False) if mask[2] and bias is not None else None
    return (dx if mask[0] else None), dweight, dbias


@lowers(aten.native_batch_norm.default)
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dims = [dim for dim in range(x.dim()) if dim != 1]
    if training:
        count = _count(x, dims)
        mean = total(x, dims, True) / count
        centred = x - mean
        variance = total(centred * centred, dims, True) / count
        if running_mean is not None:
            running_mean.copy_(running_mean * (1 - momentum) + mean.view(-1) * momentum)
        if running_var is not None:
            unbiased = variance.view(-1) * (count / max(1, count - 1))
            running_var.copy_(running_var * (1 - momentum) + unbiased * momentum)
    else:
        assert running_mean is not None and running_var is not None
        mean, variance = _channels(running_mean, x), _channels(running_var, x)
        centred = x - mean
    rstd = aten.reciprocal.default(aten.sqrt.default(variance + eps))
    y = centred * rstd
    if weight is not None:
        y = y * _channels(weight, x)
    if bias is not None:
        y = y + _channels(bias, x)
    if not training:
        return y, x.new_zeros(0), x.new_zeros(0)
    return y, mean.view(-1), rstd.view(-1)


def _channels(x: Tensor, like: Tensor) -> Tensor:
    return x.view([-1 if dim == 1 else 1 for dim in range(like.dim())])


@lowers(aten.native_batch_norm_backward.default)
def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    save_mean: Tensor | None,
    save_rstd: Tensor | None,
    training: bool,
    eps: float,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dims = [dim for dim in range(x.dim()) if dim != 1]
    count = _count(x, dims)
    if training:
        assert save_mean is not None and save_rstd is not None
        mean, rstd = _channels(save_mean, x), _channels(save_rstd, x)
    else:
        assert running_mean is not None and running_var is not None
        mean = _channels(running_mean, x)
        rstd = aten.reciprocal.default(aten.sqrt.default(_channels(running_var, x) + eps))
    normal = (x - mean) * rstd
    sum_grad, sum_along = total(grad, dims, True), total(grad * normal, dims, True)
    scale = rstd if weight is None else rstd * _channels(weight, x)
    dx = grad * scale
    if training:
        dx = (grad - sum_grad / count - normal * (sum_along / count)) * scale
    return (dx if mask[0] else None), (sum_along.view(-1) if mask[1] else None), sum_grad.view(-1)


@lowers(aten.native_group_norm.default)
def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, channels: int, area: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.reshape(n, groups, -1)
    y, mean, rstd = layer_norm(rows, [rows.shape[-1]], None, None, eps)
    y = y.reshape(x.shape)
    if weight is not None:
        y = y * _channels(weight, x)
    return (y if bias is None else y + _channels(bias, x)), mean.view(n, groups), rstd.view(n, groups)


@lowers(aten.native_group_norm_backward.default)
def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    n: int,
    channels: int,
    area: int,
    groups: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows, mean, rstd = x.reshape(n, groups, -1), mean.view(n, groups, 1), rstd.view(n, groups, 1)
    weighted = grad if weight is None else grad * _channels(weight, x)
    inner = [True, False, False]
    dx, _, _ = layer_norm_backward(weighted.reshape(rows.shape), rows, [rows.shape[-1]], mean, rstd, None, None, inner)
    assert dx is not None
    normal = ((rows - mean) * rstd).reshape(x.shape)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    dweight = total(grad * normal, dims, False) if mask[1] else None
    return (dx.reshape(x.shape) if mask[0] else None), dweight, (total(grad, dims, False) if mask[2] else None)


@lowers(aten._softmax.default)
def softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    e = aten.exp.default(x - aten.amax.default(x, [dim], True))
    return e / total(e, [dim], True)


@lowers(aten._safe_softmax.default)
def safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    # A row that is masked everywhere gives zeros, not NaN (scaled_dot_product_attention's rule).
    peak = aten.amax.default(x, [dim], True)
    e = aten.exp.default(x - torch.where(peak == -math.inf, torch.zeros_like(peak), peak))
    norm = total(e, [dim], True)
    return e / torch.where(norm == 0, torch.ones_like(norm), norm)


@lowers(aten._softmax_backward_data.default)
def softmax_backward(grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    along = grad * y
    return along - y * total(along, [dim], True)


@lowers(aten._log_softmax.default)
def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    shifted = x - aten.amax.default(x, [dim], True)
    return shifted - aten.log.default(total(aten.exp.default(shifted), [dim], True))


@lowers(aten._log_softmax_backward_data.default)
def log_softmax_backward(grad: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return grad - aten.exp.default(y) * total(grad, [dim], True)


def _class_weights(weight: Tensor | None, safe: Tensor, kept: Tensor) -> Tensor:
    """float32 of the targets' shape: the weight of each target's class, 1 without weights, 0 where it is ignored."""
    if weight is None:
        return kept.to(torch.float32)
    each = aten.embedding.default(weight.view(-1, 1), safe).squeeze(-1)
    return torch.where(kept, each, torch.zeros(()))


@lowers(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
def nll_loss(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: int) -> tuple[Tensor, Tensor]:
    dim = 1 if x.dim() > 1 else 0
    kept = target != ignore
    safe = torch.where(kept, target, torch.zeros_like(target))
    weights = _class_weights(weight, safe, kept)
    losses = -aten.gather.default(x, dim, safe.unsqueeze(dim)).squeeze(dim)
    losses = torch.where(kept, losses if weight is None else losses * weights, torch.zeros_like(losses))
    count = total(weights, range(target.dim()), False)
    if reduction == 0:
        return losses, count
    summed = total(losses, range(losses.dim()), False)
    return (summed / count if reduction == 1 else summed), count


@lowers(aten.nll_loss_backward.default, aten.nll_loss2d_backward.default)
def nll_loss_backward(
    grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore: int, count: Tensor
) -> Tensor:
    dim = 1 if x.dim() > 1 else 0
    each = -grad / count if reduction == 1 else -grad
    if reduction == 0:
        each = each.unsqueeze(dim)
    if weight is not None:
        each = each * weight.view([-1 if axis == dim else 1 for axis in range(x.dim())])
    wanted = target.unsqueeze(dim)
    hit = aten.logical_and.default(_one_hot(wanted, x, dim), wanted != ignore)
    return torch.where(hit, each, torch.zeros_like(each))


def _one_hot(index: Tensor, like: Tensor, dim: int) -> Tensor:
    """bool of the shape of `like`: where its coordinate along `dim` equals `index` (size 1 along dim)."""
    places = torch.arange(like.shape[dim]).view([-1 if axis == dim else 1 for axis in range(like.dim())])
    return places == index
