"""Tensors as bytes and back: whole, or in tiles. What needs a memory of its own is in change.py and outer.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocol.errors import LocalProtocolError, MalformedRecord
from protocol.payload_size import noise_key, payload_bytes, tile_form
from protocol.stage import Codec
from worker.compression.tiles import pack_tiles, unpack_tiles

__all__ = ["checked_length", "decode", "encode", "flat", "from_bytes", "to_bytes"]


def flat(tensor: Tensor) -> NDArray[np.float32]:
    """The values of a float32 tensor of any device and layout, (count,), in row-major order.

    Raises LocalProtocolError for another dtype.
    """
    if tensor.dtype != torch.float32:
        raise LocalProtocolError(f"a tensor of {tensor.dtype} cannot be compressed, only float32")
    values: NDArray[np.float32] = tensor.detach().to("cpu").contiguous().reshape(-1).numpy()
    return values


def to_bytes(tensor: Tensor) -> bytes:
    """The values of a tensor of any dtype, row-major, little-endian."""
    array = tensor.detach().to("cpu").contiguous().numpy()
    return bytes(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())


def from_bytes(payload: bytes | memoryview, dtype: str, shape: Sequence[int]) -> Tensor:
    """What to_bytes was given. Raises MalformedRecord for a bool that is neither 0 nor 1."""
    if dtype == "bool":
        held = np.frombuffer(payload, dtype=np.uint8)
        if held.size and int(held.max()) > 1:
            raise MalformedRecord(f"a bool tensor holds the byte {int(held.max())}")
        return torch.from_numpy(held.astype(np.bool_)).reshape(tuple(shape))
    little = np.frombuffer(payload, dtype=np.dtype(dtype).newbyteorder("<"))
    return torch.from_numpy(little.astype(np.dtype(dtype))).reshape(tuple(shape))


def checked_length(payload: bytes | memoryview, due: int, what: str) -> None:
    """Refuse a payload that is not `due` bytes long, before anything is made of it. Raises MalformedRecord."""
    if len(payload) != due:
        raise MalformedRecord(f"a payload of {len(payload)} bytes, {what} takes {due}")


def _whole(codec: Codec, dtype: str) -> bool:
    """Whether such a tensor travels as it is. Raises LocalProtocolError for a codec that has a memory."""
    if codec.kind == "float32" or dtype != "float32":
        return True
    if codec.kind != "tile":
        raise LocalProtocolError(f"the codec {codec.kind} has a memory: see encode_change and encode_outer")
    return False


def encode(codec: Codec, tensor: Tensor, *, seed: int, step: int, stream: int) -> bytes:
    """A tensor as `codec` (float32 or tile) sends it: payload_bytes(codec, dtype, shape) bytes.

    tensor: any shape; of another dtype than float32 it travels as it is, by either codec. seed, stream: noise_seed and
    stream_number of protocol/payload_size.py, so that both ends know them and no two tensors are rounded by the same
    noise. The bytes are a function of the arguments, on every machine and number of threads. Raises NotFinite for a
    tile of NaN, infinity or a magnitude of 2**127 or more, LocalProtocolError for numbers out of range or a codec with
    a memory.
    """
    if _whole(codec, str(tensor.dtype).removeprefix("torch.")):
        return to_bytes(tensor)
    return pack_tiles(flat(tensor), tile_form(codec.bits, "forward"), key=noise_key(seed, stream), step=step)


def decode(
    codec: Codec, payload: bytes | memoryview, dtype: str, shape: Sequence[int], *, seed: int, step: int, stream: int
) -> Tensor:
    """The tensor that a payload of `encode` stands for, on the CPU: `dtype` (its name, as in a Program), `shape`.

    seed, step, stream: as when it was made. A tile's value lies within s of what was encoded, s being the tile's scale:
    its largest magnitude over 2**bits - 1, or up to an eighth more. Raises MalformedRecord for bytes that `encode`
    cannot make, of another length above all, before it allocates anything.
    """
    due = payload_bytes(codec, dtype, shape, flow="forward")
    checked_length(payload, due, f"{dtype} {tuple(shape)} by {codec.kind}")
    if _whole(codec, dtype):
        return from_bytes(payload, dtype, shape)
    form = tile_form(codec.bits, "forward")
    values = unpack_tiles(payload, form, math.prod(shape), key=noise_key(seed, stream), step=step)
    return torch.from_numpy(values).reshape(tuple(shape))
