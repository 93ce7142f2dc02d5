"""Activations and arithmetic rewritten as operations of protocol/operations.py.

Like worker/lowering.py: one function for each ATen overload, float32 unless said, formulas as in PyTorch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from worker.lowering import lowers, scaled, total

__all__: list[str] = []

aten = torch.ops.aten


# --- activations -------------------------------------------------------------------------------------------
@lowers(aten.relu.default)
def relu(x: Tensor) -> Tensor:
    return aten.maximum.default(x, torch.zeros((), dtype=x.dtype))


@lowers(aten.threshold_backward.default)
def threshold_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    return torch.where(x > threshold, grad, torch.zeros((), dtype=grad.dtype))


@lowers(aten.leaky_relu.default)
def leaky_relu(x: Tensor, slope: float = 0.01) -> Tensor:
    return torch.where(x > 0, x, x * slope)


@lowers(aten.leaky_relu_backward.default)
def leaky_relu_backward(grad: Tensor, x: Tensor, slope: float, is_result: bool) -> Tensor:
    return torch.where(x > 0, grad, grad * slope)


@lowers(aten.sigmoid.default)
def sigmoid(x: Tensor) -> Tensor:
    return aten.reciprocal.default(aten.exp.default(-x) + 1)


@lowers(aten.sigmoid_backward.default)
def sigmoid_backward(grad: Tensor, y: Tensor) -> Tensor:
    return grad * (y * (-y + 1))


@lowers(aten.tanh_backward.default)
def tanh_backward(grad: Tensor, y: Tensor) -> Tensor:
    return grad * (-(y * y) + 1)


@lowers(aten.silu.default)
def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


@lowers(aten.silu_backward.default)
def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = sigmoid(x)
    return grad * (s * (x * (-s + 1) + 1))


_GELU_TANH = (math.sqrt(2 / math.pi), 0.044715)


@lowers(aten.gelu.default)
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "none":
        return x * (aten.erf.default(x * math.sqrt(0.5)) + 1) * 0.5
    inner = (x * x * _GELU_TANH[1] + 1) * x * _GELU_TANH[0]
    return x * (aten.tanh.default(inner) + 1) * 0.5


@lowers(aten.gelu_backward.default)
def gelu_backward(grad: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "none":
        cdf = (aten.erf.default(x * math.sqrt(0.5)) + 1) * 0.5
        pdf = aten.exp.default(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
        return grad * (cdf + x * pdf)
    square = x * x
    tanh = aten.tanh.default((square * _GELU_TANH[1] + 1) * x * _GELU_TANH[0])
    slope = (square * (3 * _GELU_TANH[1]) + 1) * _GELU_TANH[0]
    return grad * ((tanh + 1) * 0.5 + x * (-(tanh * tanh) + 1) * slope * 0.5)


@lowers(aten.elu.default)
def elu(x: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    return torch.where(x > 0, scaled(x, scale), scaled(expm1(scaled(x, input_scale)), alpha * scale))


@lowers(aten.elu_backward.default)
def elu_backward(grad: Tensor, alpha: float, scale: float, input_scale: float, is_result: bool, x: Tensor) -> Tensor:
    slope = x + alpha * scale if is_result else scaled(aten.exp.default(scaled(x, input_scale)), alpha * scale)
    return torch.where(x > 0, scaled(grad, scale), scaled(grad, input_scale) * slope)


@lowers(aten.hardtanh.default)
def hardtanh(x: Tensor, low: float = -1, high: float = 1) -> Tensor:
    return clamp(x, low, high)


@lowers(aten.hardtanh_backward.default)
def hardtanh_backward(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    inside = aten.logical_and.default(x > low, x < high)
    return torch.where(inside, grad, torch.zeros((), dtype=grad.dtype))


# --- arithmetic --------------------------------------------------------------------------------------------
POWER_MAX = 64
"""Largest whole exponent written as products: at most 12 of them."""


def _whole_power(x: Tensor, exponent: int) -> Tensor:
    result = None
    while exponent:
        if exponent & 1:
            result = x if result is None else result * x
        exponent >>= 1
        x = x * x if exponent else x
    assert result is not None
    return result


@lowers(aten.pow.Tensor_Scalar)
def power(x: Tensor, exponent: float) -> Any:
    exponent = float(exponent)
    if exponent == 0:
        return torch.ones_like(x)
    if exponent == 1:
        return x.clone()
    if not x.is_floating_point() and not exponent.is_integer():
        return NotImplemented
    if exponent < 0:
        return aten.reciprocal.default(power(x, -exponent)) if x.is_floating_point() else NotImplemented
    if (2 * exponent).is_integer() and exponent <= POWER_MAX:
        whole, half = int(exponent), not exponent.is_integer()
        root = aten.sqrt.default(x) if half else None
        if root is None or not whole:
            return _whole_power(x, whole) if root is None else root
        return _whole_power(x, whole) * root
    if exponent.is_integer():
        return NotImplemented
    return aten.exp.default(aten.log.default(x) * exponent)  # NaN below zero, as it must be


@lowers(aten.pow.Scalar)
def power_of(base: float, exponent: Tensor) -> Any:
    if base <= 0 or not exponent.is_floating_point():
        return NotImplemented
    return aten.exp.default(exponent * math.log(base))


@lowers(aten.linalg_vector_norm.default)
def vector_norm(
    x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    dims = [dim] if isinstance(dim, int) else list(dim) if dim else list(range(x.dim()))
    if ord == 2:
        return aten.sqrt.default(total(x * x, dims, keepdim))
    if ord == 1:
        return total(x.abs(), dims, keepdim)
    return aten.amax.default(x.abs(), dims, keepdim) if ord == math.inf else NotImplemented


@lowers(aten.isnan.default)
def isnan(x: Tensor) -> Tensor:
    return x != x  # only NaN differs from itself


@lowers(aten.isinf.default)
def isinf(x: Tensor) -> Tensor:
    return x.abs() == math.inf


@lowers(aten.trunc.default)
def trunc(x: Tensor) -> Tensor:
    # From 2**23 on every float32 is whole; below, int64 holds it and the conversion cuts the fraction off.
    small = x.abs() < 2.0**23
    return torch.where(small, torch.where(small, x, torch.zeros(())).to(torch.int64).to(torch.float32), x)


@lowers(aten.floor.default)
def floor(x: Tensor) -> Tensor:
    cut = trunc(x)
    return torch.where(cut > x, cut - 1, cut)


@lowers(aten.ceil.default)
def ceil(x: Tensor) -> Tensor:
    return -floor(-x)


@lowers(aten.log2.default)
def log2(x: Tensor) -> Tensor:
    return aten.log.default(x) * (1 / math.log(2))


@lowers(aten.log10.default)
def log10(x: Tensor) -> Tensor:
    return aten.log.default(x) * (1 / math.log(10))


@lowers(aten.exp2.default)
def exp2(x: Tensor) -> Tensor:
    return aten.exp.default(x * math.log(2))


@lowers(aten.tan.default)
def tan(x: Tensor) -> Tensor:
    return aten.sin.default(x) / aten.cos.default(x)


@lowers(aten.bitwise_xor.Tensor, aten.logical_xor.default)
def xor(x: Tensor, y: Tensor) -> Any:
    return x != y if x.dtype == y.dtype == torch.bool else NotImplemented


@lowers(aten.log1p.default)
def log1p(x: Tensor) -> Tensor:
    # Accurate near zero: the rounding error of 1 + x cancels in the quotient. Goldberg 1991, theorem 4.
    u = x + 1
    return torch.where(u == 1, x, aten.log.default(u) * x / (u - 1))


@lowers(aten.expm1.default)
def expm1(x: Tensor) -> Tensor:
    # Kahan's companion of the same idea; for large |x| the plain difference loses nothing.
    u = aten.exp.default(x)
    small = (u - 1) * x / aten.log.default(u)
    plain = torch.where(u == 1, x, u - 1)
    return torch.where(aten.logical_and.default(x.abs() < 1, u != 1), small, plain)


@lowers(aten.square.default)
def square(x: Tensor) -> Tensor:
    return x * x


@lowers(aten.rsqrt.default)
def rsqrt(x: Tensor) -> Tensor:
    return aten.reciprocal.default(aten.sqrt.default(x))


@lowers(aten.rsub.Scalar)
def rsub(x: Tensor, other: float, alpha: float = 1) -> Tensor:
    return scaled(-x, alpha) + other


@lowers(aten.addcmul.default)
def addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return x + scaled(a * b, value)


@lowers(aten.addcdiv.default)
def addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return x + scaled(a / b, value)


@lowers(aten.lerp.Scalar)
def lerp(x: Tensor, end: Tensor, weight: float) -> Tensor:
    return x + (end - x) * weight


@lowers(aten.clamp.default)
def clamp(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    if low is not None:
        x = aten.maximum.default(x, torch.full((), low, dtype=x.dtype))
    return x if high is None else aten.minimum.default(x, torch.full((), high, dtype=x.dtype))


@lowers(aten.clamp.Tensor)
def clamp_between(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if low is not None:
        x = aten.maximum.default(x, low)
    return x if high is None else aten.minimum.default(x, high)


@lowers(aten.clamp_min.default)
def clamp_min(x: Tensor, low: float) -> Tensor:
    return clamp(x, low)


@lowers(aten.clamp_max.default)
def clamp_max(x: Tensor, high: float) -> Tensor:
    return clamp(x, None, high)
