"""Random operations rewritten as `ichiba.uniform`, the generator every peer has. DESIGN §4.

torch's own generators give other bits on other instruction sets (NOTES), so dropout, rand, randn and bernoulli
become draws keyed by (task seed, step, node number).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from worker.lowering import lowers

__all__ = ["random_key"]

aten = torch.ops.aten
_key: ContextVar[Tensor] = ContextVar("step key of the capture in progress")


@torch.library.custom_op("ichiba::uniform", mutates_args=())
def uniform(step_key: Tensor, number: int, shape: Sequence[int]) -> Tensor:
    """float32 of `shape` in [0, 1). While a step is being traced the numbers do not matter, only the shape."""
    return torch.full(list(shape), 0.5)


@uniform.register_fake
def _(step_key: Tensor, number: int, shape: Sequence[int]) -> Tensor:
    return torch.empty(list(shape))


@contextmanager
def random_key(step_key: Tensor) -> Iterator[None]:
    """Within, random operations are traced as `ichiba.uniform` keyed by `step_key`, int64[2]."""
    token = _key.set(step_key)
    try:
        yield
    finally:
        _key.reset(token)


def _random(shape: Sequence[int]) -> Tensor:
    return torch.ops.ichiba.uniform(_key.get(), 0, list(shape))


@lowers(aten.bernoulli.p)
def bernoulli_p(x: Tensor, p: float = 0.5, *, generator: Any = None) -> Tensor:
    return (_random(x.shape) < p).to(x.dtype)


@lowers(aten.bernoulli.default)
def bernoulli(x: Tensor, *, generator: Any = None) -> Tensor:
    return (_random(x.shape) < x).to(x.dtype)


@lowers(aten.native_dropout.default)
def native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if not train or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    keep = _random(x.shape) >= p
    return x * keep.to(x.dtype) * (1 / (1 - p)), keep


@lowers(aten.rand_like.default)
def rand_like(x: Tensor, **_options: Any) -> Tensor:
    return _random(x.shape)


@lowers(aten.rand.default)
def rand(size: Sequence[int], **_options: Any) -> Tensor:
    return _random(size)


@lowers(aten.uniform.default)
def uniform_between(x: Tensor, low: float = 0.0, high: float = 1.0, *, generator: Any = None) -> Tensor:
    return _random(x.shape) * (high - low) + low


def _normal(shape: Sequence[int]) -> Tensor:
    # Box-Muller; 1 - u lies in (0, 1], so the logarithm is finite.
    radius = aten.sqrt.default(aten.log.default(-_random(shape) + 1) * -2)
    return radius * aten.cos.default(_random(shape) * (2 * math.pi))


@lowers(aten.randn.default)
def randn(size: Sequence[int], **_options: Any) -> Tensor:
    return _normal(size)


@lowers(aten.randn_like.default)
def randn_like(x: Tensor, **_options: Any) -> Tensor:
    return _normal(x.shape)


@lowers(aten.normal_functional.default)
def normal(x: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Any = None) -> Tensor:
    return _normal(x.shape) * std + mean
