"""The exact kernel of each operation of a Program. DESIGN §6; protocol/operations.py has the closed list.

Every kernel takes what the operation takes, changes none of its operands, and gives the dtype and shape that the
list says. Its result has the same bits for any number of threads, instruction set, backend or device. torch's own
kernels are used where IEEE 754 leaves them no freedom: movement, comparison, one correctly rounded operation per
element. The sign of a zero is fixed where it would be free (maximum, minimum, amax, sums, products: +0.0), and so
is the conversion of a float to an integer. The bits of a NaN are free: nothing that is not NaN depends on them, and
protocol/merkle.py hashes every NaN alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from worker.exact import compiled, elementary, reductions
from worker.exact.devices import arange, checked_device, device_kernels, full, number, prove, uniform_kernel
from worker.exact.memory import keep_freed_memory
from worker.exact.products import Products
from worker.exact.random import uniform

__all__ = ["Kernel", "kernels"]

aten = torch.ops.aten
Kernel = Callable[..., Tensor]

_INT64_FLOAT_MAX = 9223371487098961920.0  # the largest float32 below 2**63


def _pad(x: Tensor, pads: Sequence[int], value: float) -> Tensor:
    return torch.constant_pad_nd(x, list(pads), number(value, x.dtype))


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Conversion; a float32 that no int64 holds becomes the nearest one that float32 has, and NaN becomes 0."""
    if dtype == torch.int64 and x.is_floating_point():
        x = torch.where(x == x, x.clamp(-_INT64_FLOAT_MAX, _INT64_FLOAT_MAX), 0.0)
    return x.to(dtype)


def _embedding(weight: Tensor, index: Tensor) -> Tensor:
    reductions.check_index(index, weight.shape[0], "embedding")
    return torch.nn.functional.embedding(index, weight)


def _gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    reductions.check_index(index, x.shape[dim], "gather")
    return torch.gather(x, dim, index)


def _div(x: Tensor, y: Tensor | float) -> Tensor:
    """x / y, rounded once. Some devices divide by a number through its rounded reciprocal: a tensor prevents it."""
    if not isinstance(y, Tensor):
        y = torch.full((), number(y, x.dtype), dtype=x.dtype, device=x.device)
    return torch.div(x, y)


def _reciprocal(x: Tensor) -> Tensor:
    return torch.div(torch.ones((), dtype=x.dtype, device=x.device), x)


def _positive_zero(kernel: Callable[[Tensor, Tensor], Tensor]) -> Kernel:
    """`kernel` with -0.0 made +0.0: which of two zeros is the larger is left open."""

    @functools.wraps(kernel)
    def fixed(x: Tensor, y: Tensor) -> Tensor:
        result = kernel(x, y)
        return result.add_(0.0) if result.is_floating_point() else result

    return fixed


def _sign(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


_FIXED: dict[str, Kernel] = {
    # Movement.
    "reshape.default": lambda x, shape: x.reshape(shape),
    "permute.default": lambda x, dims: x.permute(dims),
    "expand.default": lambda x, shape: x.expand(shape),
    "slice.Tensor": aten.slice.Tensor,
    "cat.default": lambda tensors, dim: torch.cat(tensors, dim),
    "constant_pad_nd.default": _pad,
    "embedding.default": _embedding,
    "gather.default": _gather,
    "where.self": torch.where,
    "to.dtype": _to,
    "full.default": full,
    "arange.start_step": arange,
    # One rounding, or none, for each element.
    "add.Tensor": torch.add,
    "sub.Tensor": torch.sub,
    "mul.Tensor": torch.mul,
    "div.Tensor": _div,
    "neg.default": torch.neg,
    "abs.default": torch.abs,
    "sqrt.default": elementary.sqrt,
    "reciprocal.default": _reciprocal,
    "sign.default": _sign,
    "maximum.default": _positive_zero(torch.maximum),
    "minimum.default": _positive_zero(torch.minimum),
    "eq.Tensor": torch.eq,
    "ne.Tensor": torch.ne,
    "lt.Tensor": torch.lt,
    "le.Tensor": torch.le,
    "gt.Tensor": torch.gt,
    "ge.Tensor": torch.ge,
    "logical_and.default": torch.logical_and,
    "logical_or.default": torch.logical_or,
    "logical_not.default": torch.logical_not,
    # Fixed sequences of the above.
    "exp.default": elementary.exp,
    "log.default": elementary.log,
    "erf.default": elementary.erf,
    "tanh.default": elementary.tanh,
    "sin.default": elementary.sin,
    "cos.default": elementary.cos,
    # Integers, added.
    "sum.dim_IntList": reductions.sum_over,
    "amax.default": reductions.amax,
    "embedding_dense_backward.default": reductions.embedding_dense_backward,
    "ichiba.uniform": uniform_kernel(uniform),
}


@functools.cache
def kernels(
    width: int = 15, backend: str = "auto", *, helper: bool = True, device: str = "cpu"
) -> Mapping[str, Kernel]:
    """The exact kernel of each operation, by name.

    width: bits of a product's operands, 8, 15 or 22. backend: how products of integers are computed, one of
    products.BACKENDS; `auto` is the fastest of them here for each size. helper: whether the compiled helper
    (worker/exact/compiled.py) may do the rest where it is installed. device: cpu, cuda or cuda:N, where operands lie.
    The bits are the same with each of them; another device than the CPU has proved that before this returns.
    Raises LocalProtocolError for a width, backend or device that does not exist or is not exact on this machine.
    """
    torch.set_flush_denormal(False)
    keep_freed_memory()
    place = checked_device(device)
    if place.type != "cpu":
        products = Products(width, backend, helper=False, padded=True)
        there = {**_FIXED, **device_kernels(place), "mm.default": products.mm, "bmm.default": products.bmm}
        prove(there, kernels(width, helper=helper), place)
        return MappingProxyType(there)
    products = Products(width, backend, helper=helper)
    faster = {**compiled.compiled_kernels(), "ichiba.uniform": uniform_kernel(compiled.uniform)} if helper else {}
    return MappingProxyType({**_FIXED, **faster, "mm.default": products.mm, "bmm.default": products.bmm})
