"""What a segment of local steps changed, sent to every other replica, and the step that all then take (DiLoCo).

A delta is the parameters at the segment's end less those at its start. What a codec drops stays in the sender's
residual and is added to the next delta (error feedback). Each replica takes the mean of what was *sent*, its own delta
as the others decode it, in the order of the replicas: so all of them stay equal to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.errors import LocalProtocolError, MalformedRecord
from protocol.payload_size import noise_key, payload_bytes, tile_form
from protocol.stage import Codec
from worker.compression.codecs import checked_length, flat, from_bytes, to_bytes
from worker.compression.sparse import pack_sparse, unpack_sparse
from worker.compression.tiles import NotFinite, pack_tiles, unpack_tiles

__all__ = ["decode_outer", "encode_outer", "mean_of", "outer_step"]


def encode_outer(
    codec: Codec, delta: Tensor, residual: Tensor, *, seed: int, step: int, stream: int
) -> tuple[bytes, Tensor, Tensor]:
    """One parameter's delta and residual, float32 of one shape, as (payload, what it decodes to, the new residual).

    sent + new residual = delta + residual, but for the rounding of the two sums: each is within half a unit in the last
    place of its exact value. codec: float32, tile or sparse. seed, step, stream: as for encode. The payload has
    payload_bytes(codec, "float32", shape, flow="outer") bytes. Raises NotFinite for NaN, infinity or a sum of 2**127
    or more, LocalProtocolError for another shape, dtype or codec.
    """
    if delta.shape != residual.shape:
        raise LocalProtocolError(f"a delta of {tuple(delta.shape)} with a residual of {tuple(residual.shape)}")
    total = delta.detach().to("cpu") + residual.detach().to("cpu")
    if codec.kind == "float32":
        if not bool(total.isfinite().all()):
            raise NotFinite(f"a delta of shape {tuple(delta.shape)}")
        payload = to_bytes(total)
    elif codec.kind == "tile":
        payload = pack_tiles(flat(total), tile_form(codec.bits, "outer"), key=noise_key(seed, stream), step=step)
    elif codec.kind == "sparse":
        payload = pack_sparse(flat(total))
    else:
        raise LocalProtocolError(f"the codec {codec.kind} carries no outer deltas")
    sent = decode_outer(codec, payload, tuple(delta.shape), seed=seed, step=step, stream=stream)
    return payload, sent, total - sent


def decode_outer(
    codec: Codec, payload: bytes | memoryview, shape: Sequence[int], *, seed: int, step: int, stream: int
) -> Tensor:
    """The float32 `shape` that a payload of encode_outer stands for; seed, step, stream as when it was made.

    Raises MalformedRecord as decode does.
    """
    due = payload_bytes(codec, "float32", shape, flow="outer")
    checked_length(payload, due, f"a delta of {tuple(shape)} by {codec.kind}")
    if codec.kind == "float32":
        whole = from_bytes(payload, "float32", shape)
        if not bool(whole.isfinite().all()):
            raise MalformedRecord(f"a delta of {tuple(shape)} holds NaN or infinity")
        return whole
    count = math.prod(shape)
    if codec.kind == "tile":
        values = unpack_tiles(payload, tile_form(codec.bits, "outer"), count, key=noise_key(seed, stream), step=step)
    else:
        values = unpack_sparse(payload, count)
    return torch.from_numpy(values).reshape(tuple(shape))


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of float32 tensors of one shape: added in their order, then divided by their number, rounded each time.

    Raises LocalProtocolError for none, another dtype or different shapes.
    """
    if not tensors or any(one.shape != tensors[0].shape or one.dtype != torch.float32 for one in tensors):
        raise LocalProtocolError("a mean is of one or more float32 tensors of one shape")
    total = tensors[0].clone()
    for one in tensors[1:]:
        total.add_(one)
    return total.div_(torch.tensor(float(len(tensors)), dtype=torch.float32))


def outer_step(
    start: Tensor, mean_delta: Tensor, momentum: Tensor, rate: float, momentum_factor: float
) -> tuple[Tensor, Tensor]:
    """Nesterov's step from where the segment began, as (parameters, momentum); float32 of one shape, nothing in place.

    momentum' = factor * momentum + mean_delta; parameters' = start + rate * (mean_delta + factor * momentum'): SGD with
    Nesterov momentum on the outer gradient -mean_delta, DiLoCo (arXiv 2311.08105), which advises rate 0.7, factor 0.9.
    Each operation is rounded by itself, no multiply-add is fused: the same bits everywhere.
    """
    pace, factor = (torch.tensor(value, dtype=torch.float32) for value in (rate, momentum_factor))
    after = (momentum * factor).add_(mean_delta)
    return start + (after * factor).add_(mean_delta).mul_(pace), after
