"""Activations and arithmetic rewritten as operations of protocol/operations.py.

Like worker/lowering.py: one function for each ATen overload, float32 unless said, formulas as in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from worker.lowering import lowers, scaled

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


# --- arithmetic --------------------------------------------------------------------------------------------
_POWERS: dict[float, Callable[[Tensor], Tensor]] = {
    0.5: aten.sqrt.default,
    -0.5: lambda x: aten.reciprocal.default(aten.sqrt.default(x)),
    1.5: lambda x: x * aten.sqrt.default(x),
    -1.0: aten.reciprocal.default,
    -2.0: lambda x: aten.reciprocal.default(x * x),
    0.0: torch.ones_like,
    1.0: lambda x: x.clone(),
    2.0: lambda x: x * x,
    3.0: lambda x: x * x * x,
    4.0: lambda x: (x * x) * (x * x),
}


@lowers(aten.pow.Tensor_Scalar)
def power(x: Tensor, exponent: float) -> Any:
    if float(exponent) not in _POWERS:
        return NotImplemented
    return _POWERS[float(exponent)](x)


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


@lowers(aten.clamp_min.default)
def clamp_min(x: Tensor, low: float) -> Tensor:
    return clamp(x, low)


@lowers(aten.clamp_max.default)
def clamp_max(x: Tensor, high: float) -> Tensor:
    return clamp(x, None, high)
