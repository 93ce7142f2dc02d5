"""The exact kernels on another device than the CPU: what must be made there, and the proof that its bits are right.

Most kernels are torch operations that run where their operands lie. Here stand those that make tensors, draw random
numbers or scatter sums, and `prove`, which compares every kernel on the device with the CPU's on adversarial numbers
before a device may work. No GPU has run this code yet: the tests run it on the CPU, through the same functions.

What a device needs: IEEE float32 and float64 with subnormals (CUDA's default), no contraction across torch
operations (there is none: each is a kernel of its own), exact int8 products (torch._int_mm on tensor cores).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from protocol.errors import LocalProtocolError, MalformedRecord
from protocol.program import NODE_STREAM
from worker.exact.random import normal
from worker.exact.reductions import check_index, sum_bits
from worker.exact.scales import anchor64

__all__ = ["arange", "checked_device", "device_kernels", "full", "number", "prove", "seed_and_step"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ANCHOR = 1.5 * 2.0**52  # an anchor's value in units

Kernels = Mapping[str, Callable[..., Tensor]]


def checked_device(name: str) -> torch.device:
    """The device `cpu`, `cuda` or `cuda:N`. Raises LocalProtocolError if this machine does not have it."""
    kind, _, index = name.partition(":")
    if name == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (index and not index.isdigit()):
        raise LocalProtocolError(f"no device {name!r}", next_step="use cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise LocalProtocolError(
            f"device {name} is not there: torch sees {count} CUDA devices",
            why="the driver is missing, or the CPU build of PyTorch is installed",
            next_step="`TORCH=cuda make setup` installs the CUDA build; `nvidia-smi` shows the driver",
        )
    return torch.device(name)


def _product_words(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of word * multiplier, int64 below 2**32. The product may wrap into the sign: harmless."""
    product = word * multiplier
    return (product >> 32) & _MASK, product & _MASK


def uniform(seed: int, step: int, stream: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """worker.exact.random.uniform, drawn on `device` in int64 arithmetic. float32 `shape`."""
    count = math.prod(shape)
    c0 = torch.arange(-(-count // 4), dtype=torch.int64, device=device)
    c1, c2, c3 = (torch.full_like(c0, word) for word in (stream, step & _MASK, step >> 32))
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        high0, low0 = _product_words(c0, _MULTIPLIERS[0])
        high1, low1 = _product_words(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    words = torch.stack((c0, c1, c2, c3), 1).reshape(-1)[:count]
    return (words >> 8).to(torch.float32).mul_(2.0**-24).reshape(tuple(shape))


def embedding_dense_backward(
    grad: Tensor, index: Tensor, rows: int, padding: int = -1, scale_by_frequency: bool = False
) -> Tensor:
    """reductions.embedding_dense_backward by int64 additions, whose order on a GPU is free and moves no bit."""
    check_index(index, rows, "embedding gradient")
    assert not scale_by_frequency, "capture never makes it"
    flat, places = grad.reshape(index.numel(), grad.shape[-1]), index.reshape(-1)
    total = torch.zeros((rows, flat.shape[1]), dtype=torch.int64, device=grad.device)
    unit = torch.ones((1, flat.shape[1]), dtype=torch.float64, device=grad.device)
    if flat.numel():
        anchor = anchor64(flat.abs().amax(0, keepdim=True), sum_bits(flat.shape[0]))
        unit = anchor / _ANCHOR  # a power of two, NaN for a column that holds NaN or infinity
        whole = (flat.double() + anchor).sub_(anchor).div_(unit)
        total.index_add_(0, places, torch.where(whole == whole, whole, 0.0).long())
    summed = (total.double() * unit).to(torch.float32).add_(0.0)
    named = torch.zeros((rows, 1), dtype=torch.bool, device=grad.device)
    named[places] = True
    if padding >= 0:
        named[padding] = False
    return torch.where(named, summed, 0.0)  # what no index names is zero, also where the unit is NaN


def number(value: float, dtype: torch.dtype) -> float:
    """`value` as an element of `dtype`: a float beyond float32 is infinite, where torch.full would refuse it."""
    if dtype != torch.float32 or isinstance(value, int):
        return value
    return float(torch.tensor(value, dtype=torch.float64).to(torch.float32))


def full(shape: Sequence[int], value: float, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
    """`shape` of `dtype`, `value` everywhere."""
    return torch.full(list(shape), number(value, dtype), dtype=dtype, device=device)


def arange(start: int, end: int, step: int, device: str | torch.device = "cpu") -> Tensor:
    """int64 start, start + step, ... below end. torch.arange loses all of it where end - start is no int64."""
    return torch.arange(len(range(start, end, step)), dtype=torch.int64, device=device).mul_(step).add_(start)


def seed_and_step(step_key: Tensor) -> tuple[int, int]:
    """What a step key of int64 (2,) holds. Raises MalformedRecord for numbers below zero."""
    seed, step = step_key.tolist()
    if seed < 0 or step < 0:
        raise MalformedRecord(
            f"a step key of {seed} and {step}, below zero", next_step="pass the program's step key on as it is"
        )
    return seed, step


def uniform_kernel(draw: Callable[[int, int, int, Sequence[int]], Tensor]) -> Callable[..., Tensor]:
    """The kernel of `ichiba.uniform` from a generator's `draw(seed, step, stream, shape)`."""

    def kernel(step_key: Tensor, number: int, shape: Sequence[int]) -> Tensor:
        seed, step = seed_and_step(step_key)
        return draw(seed, step, NODE_STREAM + number, shape)

    return kernel


def device_kernels(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """The kernels that differ on `device`, by operation."""
    return {
        "full.default": functools.partial(full, device=device),
        "arange.start_step": functools.partial(arange, device=device),
        "ichiba.uniform": uniform_kernel(functools.partial(uniform, device=device)),
        "embedding_dense_backward.default": embedding_dense_backward,
    }


def _trials() -> Iterator[tuple[str, tuple[object, ...]]]:
    """Operations and operands on the CPU that bring out what a device may do differently."""
    wild = torch.arange(-(2**31), 2**31, 2**32 // 20_011, dtype=torch.int64).to(torch.int32).view(torch.float32)
    tame = normal(1, 0, 0, (96, 160))
    for name in ("neg", "abs", "sqrt", "reciprocal", "sign", "exp", "log", "erf", "tanh", "sin", "cos"):
        yield f"{name}.default", (wild,)
    for name in ("add", "sub", "mul", "div", "eq", "lt"):
        yield f"{name}.Tensor", (wild, wild.flip(0))
        yield f"{name}.Tensor", (wild, 0.1)
    for name in ("maximum", "minimum"):
        yield f"{name}.default", (wild, wild.flip(0))
    yield "to.dtype", (wild, torch.int64)
    for x in (tame, tame * 1e-41, tame * 1e37):
        yield "sum.dim_IntList", (x, [1], False)
        yield "sum.dim_IntList", (x, [0, 1], True)
        yield "amax.default", (x, [0], False)
    steep = tame * torch.exp2(torch.arange(96.0) * 2 - 140).unsqueeze(1)
    for x in (tame, steep, tame * 1e-41):
        yield "mm.default", (x, tame.t())
        yield "mm.default", (x.t(), tame[:, :7])
        yield "bmm.default", (x.reshape(4, 24, 160), tame.reshape(4, 160, 24))
    index = torch.arange(96) * 7 % 11
    yield "embedding.default", (tame, index)
    yield "embedding_dense_backward.default", (steep, index, 11, -1, False)
    yield "ichiba.uniform", (torch.tensor([2**62 + 5, 2**40 + 3]), 9, [33, 7])
    yield "full.default", ([3, 2], 0.1, torch.float32)
    yield "arange.start_step", (3, 50, 4)


def prove(kernels: Kernels, trusted: Kernels, device: torch.device) -> int:
    """Compare `kernels`, on `device`, with `trusted` on the CPU, bit for bit (every NaN alike). The number of trials.

    Raises LocalProtocolError with the first operation that differs: such a device must not work in exact mode.
    """

    def there(value: object) -> object:
        return value.to(device) if isinstance(value, Tensor) else value

    done = 0
    for name, args in _trials():
        found, expected = kernels[name](*map(there, args)).cpu(), trusted[name](*args)
        if expected.is_floating_point():
            found, expected = (torch.where(x.isnan(), torch.nan, x).view(torch.int32) for x in (found, expected))
        if found.shape != expected.shape or not torch.equal(found, expected):
            raise LocalProtocolError(
                f"{device} gives other bits than the CPU for {name}",
                why="exact work done there would be found wrong, and the stake lost",
                next_step="run on the CPU, and report the device, its driver and this operation",
            )
        done += 1
    return done
