"""The compiled helper: the hot loops of exact arithmetic in C, with the bits of the Python beside them.

It is optional twice over. Installation builds it where there is a C compiler and goes on where there is none, and a
processor without AVX2 (of the x86 ones) does not use it. `compiled_kernels` then gives an empty table, and torch's
operations do the same arithmetic (tests compare the two bit for bit). Nothing here decides a bit.

The files in worker/exact/c/ are plain C, loaded by ctypes: no build needs torch's headers, and the
interpreter's lock is free while they run.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from protocol.compiled import Function, compiled_library
from worker.exact import elementary, random, reductions

__all__ = [
    "PRODUCT_INNER_MAX",
    "PRODUCT_WIDTH_MAX",
    "compiled_kernels",
    "has_products",
    "product",
    "shared_out",
    "uniform",
]

_VERSION = 1  # ICHIBA_VERSION of compiled.h: a helper of other sources than these is not used
_INT, _LONG, _POINTER, _WORD, _SEED = (
    ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64,
)  # fmt: skip
_SIGNATURES: dict[str, Function] = {
    "ichiba_version": (_INT, ()),
    "ichiba_has_products": (_INT, ()),
    "ichiba_has_elementwise": (_INT, ()),
    "ichiba_product": (_INT, (_POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, _POINTER, _INT)),
    **dict.fromkeys(("ichiba_exp", "ichiba_log", "ichiba_erf", "ichiba_tanh"), (None, (_POINTER, _POINTER, _LONG))),
    "ichiba_sum": (None, (_POINTER, _POINTER, _LONG, _LONG, _LONG, _INT)),
    "ichiba_uniform": (None, (_SEED, _SEED, _WORD, _LONG, _LONG, _POINTER)),
}
_SPLIT_MIN = 2**16  # elements, or multiply-adds / 64: for less, handing work to another thread costs more than it saves
PRODUCT_WIDTH_MAX = 15  # bits: the 16-bit multiply-add takes no more
PRODUCT_INNER_MAX = 2**25  # K: at width 15 a sum of more may pass 2**53, where float64 no longer holds it


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The helper, or None where it was not built, is of another build, or this processor lacks what it needs."""
    library = compiled_library(__file__, "_compiled", _SIGNATURES, version="ichiba_version", wanted=_VERSION)
    return library if library is not None and library.ichiba_has_elementwise() else None


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="exact")


def shared_out(total: int, work: int, call: Callable[[int, int], None], *, multiple: int = 1) -> None:
    """call(first, last) over [0, total), cut for torch's number of threads at multiples of `multiple`.

    Every output belongs to one call, so the cuts move no bit.
    """
    threads = torch.get_num_threads() if work >= _SPLIT_MIN else 1
    step = -(-total // threads // multiple) * multiple
    if threads == 1 or step >= total:
        call(0, total)
        return
    parts = [(first, min(first + step, total)) for first in range(0, total, step)]
    for done in [_threads(threads).submit(call, *part) for part in parts]:
        done.result()


def has_products() -> bool:
    """Whether `product` works here."""
    library = _library()
    return library is not None and bool(library.ichiba_has_products())


def _takes(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"


def product(a: Tensor, b: Tensor, width: int) -> Tensor:
    """The exact product at `width` (8 or 15) bits: float32 (M, N) or (B, M, N), as worker/exact/products.py defines it.

    a: float32 (M, K) or (B, M, K), b: (K, N) or (B, K, N), on the CPU, each row-major or column-major, none empty;
    K at most PRODUCT_INNER_MAX. Raises MemoryError.
    """
    library = _library()
    assert library is not None, "ask has_products first"
    assert width <= PRODUCT_WIDTH_MAX, "the 16-bit multiply-add takes no more"
    left, right = (x if x.dim() == 3 else x.unsqueeze(0) for x in (a, b))
    batch, rows, inner = left.shape
    columns = right.shape[2]
    out = torch.empty((batch, rows, columns), dtype=torch.float32)
    strides = (ctypes.c_int64 * 6)(*left.stride(), *right.stride())
    for place, lane in ((1, 2), (5, 4)):  # a dimension of one element may have any stride: say that it is dense
        if strides[place] != 1 and strides[lane] != 1:
            strides[lane] = 1
    failed: list[int] = []

    def some(first: int, last: int) -> None:
        whole = batch == 1  # then rows are shared out, else matrices
        x, y, z = (
            left.data_ptr() + 4 * first * strides[1 if whole else 0],
            right.data_ptr() + (0 if whole else 4 * first * strides[3]),
            out.data_ptr() + 4 * first * columns * (1 if whole else rows),
        )
        count, high = (1, last - first) if whole else (last - first, rows)
        failed.append(library.ichiba_product(x, y, z, count, high, inner, columns, strides, width))

    shared_out(rows if batch == 1 else batch, batch * rows * inner * columns // 64, some)
    if any(failed):
        raise MemoryError(f"no memory to arrange a product of {tuple(left.shape)} and {tuple(right.shape)}")
    return out if a.dim() == 3 else out[0]


def _elementwise(name: str, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`plain` by the C function `name` wherever it takes the operand."""
    call = getattr(_library(), name)

    @functools.wraps(plain)
    def compiled(x: Tensor) -> Tensor:
        if not _takes(x):
            return plain(x)
        x = x.contiguous()
        out = torch.empty_like(x)
        start, end, count = x.data_ptr(), out.data_ptr(), x.numel()
        shared_out(count, 8 * count, lambda first, last: call(start + 4 * first, end + 4 * first, last - first))
        return out

    return compiled


def _sum_over(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """reductions.sum_over, compiled."""
    dims = list(dims)
    if not _takes(x) or not x.numel():
        return reductions.sum_over(x, dims, keepdim)
    kept = [dim for dim in range(x.dim()) if dim not in dims]
    shape = [1 if dim in dims else size for dim, size in enumerate(x.shape)] if keepdim else [x.shape[d] for d in kept]
    if dims != list(range(dims[0], dims[0] + len(dims))):
        x = x.permute(*kept, *dims)
        dims = list(range(len(kept), x.dim()))
    x = x.contiguous()
    sizes = list(x.shape)
    outer, count = math.prod(sizes[: dims[0]]), math.prod(sizes[dims[0] : dims[-1] + 1])
    inner = math.prod(sizes[dims[-1] + 1 :])
    out = torch.empty(shape, dtype=torch.float32)
    library, start, end = _library(), x.data_ptr(), out.data_ptr()
    assert library is not None, "compiled_kernels gives this function only where the helper is"
    bits = reductions.sum_bits(count)

    def some(first: int, last: int) -> None:
        library.ichiba_sum(
            start + 4 * first * count * inner, end + 4 * first * inner, last - first, count, inner, bits
        )

    shared_out(outer, x.numel(), some)
    return out


def uniform(seed: int, step: int, stream: int, shape: Sequence[int]) -> Tensor:
    """worker.exact.random.uniform, compiled where the helper is. Raises LocalProtocolError as that does."""
    library, count = _library(), math.prod(shape)
    # What the generator refuses is left to it, so that the refusal has one home.
    if library is None or not (0 <= seed < 2**64 and 0 <= step < 2**64 and 0 <= stream < 2**32 and count <= 2**34):
        return random.uniform(seed, step, stream, shape)
    draw = library.ichiba_uniform
    out = torch.empty(tuple(shape), dtype=torch.float32)
    end = out.data_ptr()

    def some(first: int, last: int) -> None:
        draw(seed, step, stream, first, last - first, end + 4 * first)

    shared_out(count, 4 * count, some, multiple=4)
    return out


def compiled_kernels() -> dict[str, Callable[..., Tensor]]:
    """The kernels that the helper has, by operation; empty where it is missing."""
    if _library() is None:
        return {}
    return {
        "exp.default": _elementwise("ichiba_exp", elementary.exp),
        "log.default": _elementwise("ichiba_log", elementary.log),
        "erf.default": _elementwise("ichiba_erf", elementary.erf),
        "tanh.default": _elementwise("ichiba_tanh", elementary.tanh),
        "sum.dim_IntList": _sum_over,
    }
