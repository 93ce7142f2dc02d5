"""The largest values alone: one in 32 of each chunk of 4096, each at 2 bits, their places at 7. For outer deltas.

A chunk's values of largest magnitude travel, of equal ones those with the lower index. Two levels a chunk stand for
their magnitudes: those at the first and third quarter of them in order, so that they fit a distribution of any shape
without a sum; where there are fewer values than places (the rest being 0), 0 and the median. A level is a byte, as a
tile's scale. What is not sent is the caller's to keep (outer.py).

A chunk on the wire: the lower and the upper level; 5 bits a place within its bucket of 32; the buckets in unary (bucket
+ rank is set, Elias 1974, Fano 1971); the signs; whether it is the upper level. Compared with SparseLoCo (64 of 4096 at
12 bits a place, 146 times fewer bytes), it sends twice as many values in 112 times fewer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from protocol.errors import MalformedRecord
from protocol.payload_size import HEADER_BYTES, SPARSE_BUCKET, SPARSE_CHUNK, sparse_chunk_bytes
from worker.compression.tiles import LARGEST, NotFinite

__all__ = ["pack_sparse", "sparse_length", "unpack_sparse"]

_BASE_MAX = 254 * 8 - 255  # the base of levels just below LARGEST
_PLACE_BITS = 5
_MANTISSA_BITS = 20  # of float32 that a level has not
_LANE = 256  # chunks taken at a time


def _parts(count: int) -> Iterator[tuple[slice, int, int]]:
    """(values, chunks, values a chunk): lanes of whole chunks, then the shorter one at the end."""
    whole = count // SPARSE_CHUNK
    for first in range(0, whole, _LANE):
        last = min(first + _LANE, whole)
        yield slice(first * SPARSE_CHUNK, last * SPARSE_CHUNK), last - first, SPARSE_CHUNK
    if count % SPARSE_CHUNK:
        yield slice(whole * SPARSE_CHUNK, count), 1, count % SPARSE_CHUNK


def sparse_length(count: int) -> int:
    """The values sent of a chunk of `count`."""
    return -(-count // SPARSE_BUCKET)


def _chosen(chunks: NDArray[np.float32]) -> NDArray[np.int64]:
    """The places of each chunk's largest magnitudes, int64 (chunks, sent), ascending."""
    magnitude, sent = np.abs(chunks), sparse_length(chunks.shape[1])
    least = np.partition(magnitude, chunks.shape[1] - sent, axis=1)[:, chunks.shape[1] - sent, None]
    above, level = magnitude > least, magnitude == least
    still = sent - above.sum(axis=1, keepdims=True)
    return np.nonzero(above | (level & (np.cumsum(level, axis=1) <= still)))[1].reshape(len(chunks), sent)


def _levels(magnitude: NDArray[np.float32]) -> NDArray[np.int64]:
    """The upper 12 bits of each chunk's lower and upper level, (chunks, 2), each rounded to 4 significant bits."""
    falling = -np.sort(-magnitude, axis=1)
    sent, each = magnitude.shape[1], np.arange(len(magnitude))
    full, some = falling[:, -1] > 0, (falling > 0).sum(axis=1)
    lower = np.where(full, falling[:, 3 * sent // 4], np.float32(0.0))
    upper = np.where(full, falling[:, sent // 4], falling[each, some // 2 * ~full])
    levels = np.stack([lower, upper], axis=1)
    rounded = (levels.view(np.uint32).astype(np.int64) + 2 ** (_MANTISSA_BITS - 1)) >> _MANTISSA_BITS
    return np.where(levels > 0, np.maximum(rounded, 1), 0)


def _magnitudes(level_bytes: NDArray[np.uint8], base: int) -> NDArray[np.float32]:
    bits = (level_bytes.astype(np.uint32) + np.uint32(base)) << np.uint32(_MANTISSA_BITS)
    return np.where(level_bytes > 0, bits.view(np.float32), np.float32(0.0))


def pack_sparse(values: NDArray[np.float32]) -> bytes:
    """float32 (count,) as a sparse payload. Raises NotFinite."""
    if not values.size:
        return b""
    found = []
    for lane, chunks, width in _parts(values.size):
        rows = values[lane].reshape(chunks, width)
        if not bool((np.abs(rows) < LARGEST).all()):
            raise NotFinite(f"a tensor of {values.size} values")
        places = _chosen(rows)
        taken = np.take_along_axis(rows, places, axis=1)
        found.append((width, places, taken, _levels(np.abs(taken))))
    base = max(max(int(levels.max()) for *_, levels in found) - 255, 0)
    parts = [base.to_bytes(HEADER_BYTES, "little")]
    for width, places, taken, levels in found:
        level_bytes = np.where(levels > 0, np.maximum(levels - base, 1), 0).astype(np.uint8)
        # In float64 the sum and the double are exact.
        middle = _magnitudes(level_bytes, base).astype(np.float64).sum(axis=1, keepdims=True)
        large = 2.0 * np.abs(taken).astype(np.float64) >= middle
        bits = np.concatenate([_place_bits(places), taken < 0, large], axis=1).astype(np.uint8)
        lines = np.concatenate([level_bytes, np.packbits(bits, axis=1, bitorder="little")], axis=1)
        assert lines.shape[1] == sparse_chunk_bytes(width)
        parts.append(lines.tobytes())
    return b"".join(parts)


def _place_bits(places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Places (chunks, sent) as 7 bits each: first the low 5 of all, then the buckets in unary."""
    chunks, sent = places.shape
    low = (places[:, :, None] >> np.arange(_PLACE_BITS)) & 1
    unary = np.zeros((chunks, 2 * sent), dtype=np.bool_)
    np.put_along_axis(unary, places // SPARSE_BUCKET + np.arange(sent), True, axis=1)
    return np.concatenate([low.reshape(chunks, -1).astype(np.bool_), unary], axis=1)


def unpack_sparse(payload: bytes | memoryview, count: int) -> NDArray[np.float32]:
    """The float32 (count,) of a sparse payload, zero where nothing was sent; its length was checked.

    Raises MalformedRecord for bytes that pack_sparse cannot make.
    """
    values = np.zeros(count, dtype=np.float32)
    held = np.frombuffer(payload, dtype=np.uint8)
    base = int.from_bytes(payload[:HEADER_BYTES], "little")
    if base > _BASE_MAX:
        raise MalformedRecord(f"a sparse payload whose levels count from {base}, at most {_BASE_MAX}")
    at = HEADER_BYTES
    for lane, chunks, width in _parts(count):
        end = at + chunks * sparse_chunk_bytes(width)
        lines, sent = held[at:end].reshape(chunks, -1), sparse_length(width)
        bits = np.unpackbits(lines[:, 2:], axis=1, bitorder="little")
        if bool(bits[:, 9 * sent :].any()):
            raise MalformedRecord("a sparse payload holds bits beyond its values")
        places = _places(bits[:, : 7 * sent], width)
        levels = _magnitudes(lines[:, :2], base)
        negative, large = np.split(bits[:, 7 * sent : 9 * sent] > 0, 2, axis=1)
        level = np.where(large, levels[:, 1:], levels[:, :1])
        taken = np.where(negative & (level > 0), -level, level)
        np.put_along_axis(values[lane].reshape(chunks, width), places, taken, axis=1)
        at = end
    return values


def _places(bits: NDArray[np.uint8], width: int) -> NDArray[np.int64]:
    """The places that _place_bits wrote. Raises MalformedRecord unless they ascend below `width`."""
    chunks, sent = len(bits), sparse_length(width)
    low = bits[:, : _PLACE_BITS * sent].reshape(chunks, sent, _PLACE_BITS) @ (1 << np.arange(_PLACE_BITS))
    unary = bits[:, _PLACE_BITS * sent :]
    if not bool((unary.sum(axis=1, dtype=np.int64) == sent).all()):
        raise MalformedRecord(f"a sparse payload does not name {sent} places of a chunk of {width}")
    bucket = np.nonzero(unary)[1].reshape(chunks, sent) - np.arange(sent)
    places: NDArray[np.int64] = bucket * SPARSE_BUCKET + low
    if not bool((np.diff(places, axis=1) > 0).all()) or int(places.max()) >= width:
        raise MalformedRecord("the places of a sparse payload do not ascend within their chunk")
    return places
