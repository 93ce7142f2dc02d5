"""Activations as the change since the example was last sent, which both ends remember (AQ-SGD, arXiv 2206.01299).

Both ends hold kept, float32 (examples, ...), and seen, uint8 (examples,). A row of a micro-batch whose example was
never sent travels as bfloat16; another as what it changed, in tiles; both ends then keep the example as decoded. An
example may stand in a micro-batch twice: each of its rows is sent against the memory *before* the micro-batch, and the
first of them is kept. All is therefore a function of the memory, the row numbers and the payload.

Every payload begins with a checksum over the row numbers, the place of the message (key and step) and the decoded rows.
A lost, doubled or foreign payload leaves the memories apart, and the first row on which they differ raises OutOfStep:
it cannot go on unnoticed. Against a sender that means harm it says nothing; that is what receipts are for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocol.codec import blake
from protocol.errors import LocalProtocolError, MalformedRecord, RemoteProtocolError
from protocol.payload_size import CHECKSUM_BYTES, FIRST_ITEM_BYTES, noise_key, payload_bytes, tile_form
from protocol.stage import Codec
from worker.compression.codecs import checked_length, flat
from worker.compression.tiles import LARGEST, NotFinite, pack_tiles, unpack_tiles

__all__ = ["OutOfStep", "decode_change", "encode_change", "unseen_rows"]


class OutOfStep(RemoteProtocolError):
    """The two ends of a link remember different activations, or speak of different examples: a payload was lost or
    doubled, or one end lies."""

    code = "out-of-step"


class _Micro:
    """The memory of one link, looked at for one micro-batch."""

    def __init__(self, kept: Tensor, seen: Tensor, rows: Sequence[int]) -> None:
        if kept.dtype != torch.float32 or seen.dtype != torch.uint8 or tuple(seen.shape) != tuple(kept.shape[:1]):
            raise LocalProtocolError(
                f"a memory of {kept.dtype} {tuple(kept.shape)} and {seen.dtype} {tuple(seen.shape)}: "
                "float32 (examples, ...) and uint8 (examples,) are due"
            )
        if not (kept.is_contiguous() and seen.is_contiguous() and kept.device.type == seen.device.type == "cpu"):
            raise LocalProtocolError("the memory of a link must be dense and on the CPU")
        self.rows = np.asarray(rows, dtype=np.int64)
        if self.rows.ndim != 1 or (self.rows.size and not 0 <= self.rows.min() <= self.rows.max() < len(kept)):
            raise LocalProtocolError(f"the rows of a micro-batch are not all in [0, {len(kept)})")
        self.shape = (self.rows.size, *kept.shape[1:])
        self.width = math.prod(kept.shape[1:])
        self._kept = kept.detach().reshape(len(kept), self.width).numpy()
        self._seen = seen.numpy()
        self.known = self._seen[self.rows] > 0
        self.before = self._kept[self.rows[self.known]]  # a copy
        self.unseen = int(self.rows.size - self.known.sum())

    def after(self, full: NDArray[np.float32], change: NDArray[np.float32]) -> NDArray[np.float32]:
        """The decoded rows, float32 (rows, values of one)."""
        new = np.empty((self.rows.size, self.width), dtype=np.float32)
        new[~self.known] = full.reshape(self.unseen, self.width)
        new[self.known] = self.before + change.reshape(self.before.shape)
        return new

    def checksum(self, new: NDArray[np.float32], key: int, step: int) -> bytes:
        """Of what both ends now agree on."""
        place = key.to_bytes(8, "little") + step.to_bytes(8, "little")
        held = new.astype("<f4", copy=False).tobytes()
        return blake("ichiba/kept", place, self.rows.astype("<i8").tobytes(), held)[:CHECKSUM_BYTES]

    def remember(self, new: NDArray[np.float32]) -> None:
        """Keep the first row of each example."""
        examples, first = np.unique(self.rows, return_index=True)
        self._kept[examples] = new[first]
        self._seen[examples] = 1


def _rounded(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Finite float32 to the nearest bfloat16, ties to even, as its bits."""
    bits = values.astype("<f4", copy=False).view("<u4")
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")


def _widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits as float32."""
    return (bits.astype("<u4") << 16).view("<f4").astype(np.float32, copy=False)


def unseen_rows(seen: Tensor, rows: Sequence[int]) -> int:
    """How many of a micro-batch's rows are of examples never sent, as payload_bytes asks."""
    return int((seen[torch.as_tensor(np.asarray(rows, dtype=np.int64))] == 0).sum())


def encode_change(
    codec: Codec, tensor: Tensor, *, kept: Tensor, seen: Tensor, rows: Sequence[int], seed: int, step: int, stream: int
) -> bytes:
    """The rows of a micro-batch, float32 (rows, ...), as a change payload; brings the memory up to date.

    kept: float32 (examples, ...), seen: uint8 (examples,), dense, on the CPU: written in place, only if nothing is
    raised. rows: the number of each row's example. seed, step, stream: as for encode. The payload: 8 bytes of checksum,
    the rows never sent as bfloat16, the changes of the others in tiles; payload_bytes(..., unseen=unseen_rows(seen,
    rows)) bytes. Raises NotFinite as encode does, LocalProtocolError for shapes or rows that do not fit.
    """
    micro, key = _Micro(kept, seen, rows), noise_key(seed, stream)
    if tuple(tensor.shape) != micro.shape:
        raise LocalProtocolError(f"activations of shape {tuple(tensor.shape)}, the memory and rows say {micro.shape}")
    values = flat(tensor).reshape(micro.rows.size, micro.width)
    full = values[~micro.known]
    first = _rounded(full)  # which may make a NaN zero, and the largest numbers too large
    whole, full = full, _widened(first)
    if not bool((np.abs(whole) < LARGEST).all() and (np.abs(full) < LARGEST).all()):
        raise NotFinite(f"an activation of shape {tuple(tensor.shape)}")
    form = tile_form(codec.bits, "forward")
    with np.errstate(over="ignore"):  # to infinity, which pack_tiles refuses
        change = (values[micro.known] - micro.before).reshape(-1)
    packed = pack_tiles(change, form, key=key, step=step)
    new = micro.after(full, unpack_tiles(packed, form, change.size, key=key, step=step))
    micro.remember(new)
    return micro.checksum(new, key, step) + first.tobytes() + packed


def decode_change(
    codec: Codec,
    payload: bytes | memoryview,
    *,
    kept: Tensor,
    seen: Tensor,
    rows: Sequence[int],
    seed: int,
    step: int,
    stream: int,
) -> Tensor:
    """The rows that a payload of encode_change stands for, float32 (rows, ...); brings the memory up to date.

    Arguments as there, of the other end's memory. Raises MalformedRecord for bytes of another length (before anything
    is allocated) or that encode_change cannot make, OutOfStep where the two memories differ; the memory is as before
    then.
    """
    micro, key = _Micro(kept, seen, rows), noise_key(seed, stream)
    due = payload_bytes(codec, "float32", micro.shape, flow="forward", unseen=micro.unseen)
    checked_length(payload, due, f"{micro.shape} with {micro.unseen} rows never sent")
    end = CHECKSUM_BYTES + FIRST_ITEM_BYTES * micro.unseen * micro.width
    full = _widened(np.frombuffer(payload[CHECKSUM_BYTES:end], dtype="<u2"))
    if not bool((np.abs(full) < LARGEST).all()):
        raise MalformedRecord("a row holds NaN, infinity or a magnitude of 2**127 or more")
    form = tile_form(codec.bits, "forward")
    change = unpack_tiles(payload[end:], form, micro.before.size, key=key, step=step)
    with np.errstate(over="ignore"):
        new = micro.after(full, change)
    if not bool(np.isfinite(new).all()):
        raise MalformedRecord("a change leads to infinity")
    if micro.checksum(new, key, step) != payload[:CHECKSUM_BYTES]:
        raise OutOfStep(
            f"a payload of step {step} does not lead to the rows that its sender keeps",
            why="a payload before it was lost or doubled, or it was changed on the way",
            next_step="both ends go back to their last checkpoints",
        )
    micro.remember(new)
    return torch.from_numpy(new).reshape(micro.shape)
