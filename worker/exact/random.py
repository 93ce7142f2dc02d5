"""Random tensors that are a function of (seed, step, stream): the same bits everywhere. DESIGN §4.

torch's own generators give other bits on other instruction sets; these come from Philox 4x32-10
(protocol/philox.py) and from float operations that round the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from protocol import philox
from worker.exact.elementary import horner, log, sqrt

__all__ = ["normal", "uniform"]


def uniform(seed: int, step: int, stream: int, shape: Sequence[int]) -> Tensor:
    """float32 `shape`, uniform on the multiples of 2**-24 in [0, 1): the upper 24 bits of each word.

    Raises LocalProtocolError for a seed, step or stream out of range.
    """
    words = philox.words(seed, step, stream, math.prod(shape))
    # numpy has no fast conversion from uint32; below 2**31 the signed one gives the same value.
    drawn = np.right_shift(words, 8).view(np.int32)
    return torch.from_numpy(drawn).to(torch.float32).mul_(2.0**-24).reshape(tuple(shape))


_CENTRE = (
    (5.9109374720e1, 1.5929113202e2, 5.0434271938e1, 3.3871327179e0),
    (6.7187563600e1, 7.8757757664e1, 1.7895169469e1, 1.0),
)
_TAIL = (
    (1.7023821103e-1, 1.3067284816e0, 2.7568153900e0, 1.4234372777e0),
    (1.2021132975e-1, 7.3700164250e-1, 1.0),
)
_FAR_TAIL = (
    (1.7337203997e-2, 4.2868294337e-1, 3.0812263860e0, 6.6579051150e0),
    (1.2258202635e-2, 2.4197894225e-1, 1.0),
)


def _tails(p: Tensor, q: Tensor) -> Tensor:
    """z of the p, float32 (N,), whose q = p - 1/2 is far from 0."""
    tail = sqrt(log(torch.minimum(p, 1.0 - p)).neg_())
    near, far = tail - 1.6, tail - 5.0
    z = torch.where(
        tail <= 5.0,
        horner(near, _TAIL[0]).div_(horner(near, _TAIL[1])),
        horner(far, _FAR_TAIL[0]).div_(horner(far, _FAR_TAIL[1])),
    )
    return torch.where(q < 0.0, -z, z)


def normal(
    seed: int,
    step: int,
    stream: int,
    shape: Sequence[int],
    mean: float = 0.0,
    std: float = 1.0,
    *,
    draw: Callable[[int, int, int, Sequence[int]], Tensor] = uniform,
) -> Tensor:
    """float32 `shape`, normal: mean + std * z, each rounded once more to float32.

    z is the inverse of the normal distribution at (k + 1/2) * 2**-23, k the upper 23 bits of each word; |z| is at
    most 5.3. draw: `uniform`, or what gives its bits. Error of z: 1e-6 absolutely. Source: Wichura, algorithm
    AS 241 (1988), PPND7.
    """
    k = draw(seed, step, stream, (math.prod(shape),)).mul_(2.0**23).floor_()
    p = k.add_(0.5).mul_(2.0**-23)  # exact: 24 bits
    q = p - 0.5
    r = 0.180625 - q * q
    z = (horner(r, _CENTRE[0]) * q).div_(horner(r, _CENTRE[1]))
    outside = (q.abs() > 0.425).nonzero().squeeze(1)  # 15 in 100: the tails cost twice the centre
    z[outside] = _tails(p[outside], q[outside])
    return z.mul_(std).add_(mean).reshape(tuple(shape))
