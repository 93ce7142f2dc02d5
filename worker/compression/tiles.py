"""Tiles: 32 values share one byte of scale, each is rounded to one of a few levels by noise that anyone can draw again.

A tile payload is a base (uint16, little-endian), a scale byte for each tile, and the codes (protocol/payload_size.py).
With K = levels - 1, the levels of a tile of scale s are (2 c - K) s for the codes c: even over [-K s, K s], none of
them 0, since at 2 bits a level kept for 0 would double the variance of what is rounded. The noise that is added before
the cut to a level is taken off again by the receiver, who draws the same (subtractive dither, Roberts 1962): the error
is then uniform over one step, whatever the value, with a third of the variance that 2 s at random has at worst.

- Scale: the largest magnitude over K, rounded up to 4 significant bits: the float32 whose bits are `base + byte`, then
  20 zeros. One byte spans 32 octaves below the largest scale of the tensor; a tile below those has the smallest of
  them. Byte 0 is a tile of zeros, whose codes are 0. There is no scale that is negative, infinite or NaN.
- Encoding: y = (x / s + K) / 2 to the nearest 2**-16; c is the integer part of y + n / 2**16, n being 16 random bits.
- Decoding: (2 (c - n / 2**16 + (1 - 2**-16) / 2) - K) s. Over the 2**16 values of n this is 2 y - K, exactly, on
  average: unbiased to 2**-17 of a step, 2 s, and the rounding to float32 of three operations.

Only IEEE operations on single values: nothing is summed. Scale formats compared in docs/decisions/0024-compression.md.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from protocol import params, philox
from protocol.errors import IchibaError, LocalProtocolError, MalformedRecord
from protocol.payload_size import HEADER_BYTES, TILE_VALUES, TileForm, tile_bytes
from worker.compression import compiled

__all__ = ["LARGEST", "NotFinite", "base_max", "pack_tiles", "unpack_tiles"]

LARGEST = 2.0**127  # magnitudes from here on are refused: what they decode to could be infinite
_NOISE_BITS = 16
_LANE = 2**20  # values that numpy takes at a time: a multiple of 64
_MANTISSA_BITS = 20  # of float32 that a scale has not


class NotFinite(IchibaError):
    """A tensor that should travel holds NaN, infinity or a magnitude of 2**127 or more: training diverged."""

    code = "not-finite"

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} holds NaN, infinity or a magnitude of 2**127 or more, and cannot be compressed",
            next_step="lower the learning rate or lengthen the warmup in job.toml",
        )


def pack_tiles(values: NDArray[np.float32], form: TileForm, *, key: int, step: int, helper: bool = True) -> bytes:
    """float32 (count,) as a tile payload of tile_bytes(form, count) bytes.

    key: of protocol.payload_size.noise_key. helper: whether the compiled form may do it; the bytes are the same. Raises
    NotFinite, and LocalProtocolError for a step outside 64 bits or more values than one draw has noise for.
    """
    _check_noise(values.size, step)
    if not values.size:
        return b""
    values = np.ascontiguousarray(values, dtype="<f4")
    scales = np.empty(-(-values.size // TILE_VALUES), dtype=np.uint16)
    fast = helper and compiled.has_tiles()
    top = compiled.tile_scales(values, form.levels, scales) if fast else scales_of(values, form.levels, scales)
    if top < 0:
        raise NotFinite(f"a tensor of {values.size} values")
    base = max(top - 255, 0)
    payload = np.empty(tile_bytes(form, values.size), dtype=np.uint8)
    payload[0], payload[1] = base & 255, base >> 8
    scale_bytes, codes = np.split(payload[HEADER_BYTES:], [scales.size])
    if fast:
        compiled.encode_tiles(
            values, scales, levels=form.levels, pair_bytes=form.code_bytes(compiled.PAIR), base=base, key=key,
            step=step, scale_bytes=scale_bytes, codes=codes,
        )  # fmt: skip
    else:
        scale_bytes[:] = np.where(scales > 0, np.maximum(scales.astype(np.int32) - base, 1), 0)
        codes[:] = packed(codes_of(values, scale_bytes, form.levels, base=base, key=key, step=step), form)
    return payload.tobytes()


def unpack_tiles(
    payload: bytes | memoryview, form: TileForm, count: int, *, key: int, step: int, helper: bool = True
) -> NDArray[np.float32]:
    """The float32 (count,) of a tile payload; key and step as when it was made.

    Raises MalformedRecord for bytes that pack_tiles cannot make: their length is compared before anything is allocated.
    Raises LocalProtocolError as pack_tiles does.
    """
    _check_noise(count, step)
    due = tile_bytes(form, count)
    if len(payload) != due:
        raise MalformedRecord(f"a tile payload of {len(payload)} bytes, {count} values take {due}")
    if not count:
        return np.empty(0, dtype=np.float32)
    held = np.frombuffer(payload, dtype=np.uint8)
    base = int(held[0]) | int(held[1]) << 8
    if base > base_max(form.levels):
        raise MalformedRecord(f"a tile payload whose scales count from {base}, at most {base_max(form.levels)}")
    scale_bytes, codes = np.split(held[HEADER_BYTES:], [-(-count // TILE_VALUES)])
    if helper and compiled.has_tiles():
        values = np.empty(count, dtype=np.float32)
        if not compiled.decode_tiles(
            scale_bytes, codes, values, levels=form.levels, pair_bytes=form.code_bytes(compiled.PAIR), base=base,
            key=key, step=step,
        ):  # fmt: skip
            raise _foreign()
        return values
    found = unpacked(codes, form, count)
    return values_of(found, scale_bytes, form.levels, base=base, key=key, step=step)


def _check_noise(count: int, step: int) -> None:
    if not 0 <= step < 2**64 or count > 2 * params.RANDOM_WORDS_MAX:
        raise LocalProtocolError(f"no noise for {count} values of step {step}")


def base_max(levels: int) -> int:
    """The base of a tensor of magnitudes just below LARGEST: what a payload decodes to is below 2**128, so finite."""
    bits = int((np.float32(LARGEST) / np.float32(levels - 1)).view(np.uint32))
    return (bits + 2**_MANTISSA_BITS - 1 >> _MANTISSA_BITS) - 255


def _foreign() -> MalformedRecord:
    return MalformedRecord("a tile payload holds codes beyond its values, or of no level")


def scales_of(values: NDArray[np.float32], levels: int, scales: NDArray[np.uint16]) -> int:
    """Fill uint16 `scales` with the upper 12 bits of each tile's scale; the largest of them, or -1 as compiled."""
    whole = values.size // TILE_VALUES * TILE_VALUES
    peaks = np.empty(scales.size, dtype=np.float32)
    tiles = values[:whole].reshape(-1, TILE_VALUES)
    np.maximum(tiles.max(axis=1, initial=0.0), -tiles.min(axis=1, initial=0.0), out=peaks[: len(tiles)])
    if whole < values.size:
        peaks[-1] = np.abs(values[whole:]).max()
    if not bool((peaks < LARGEST).all()):  # a NaN is not below either
        return -1
    quotient = (peaks / np.float32(levels - 1)).view(np.uint32)
    up = (quotient + np.uint32(2**_MANTISSA_BITS - 1)) >> np.uint32(_MANTISSA_BITS)
    scales[:] = np.where(peaks > 0, np.maximum(up, 1), 0)
    return int(scales.max())


def _scales(scale_bytes: NDArray[np.uint8], base: int) -> NDArray[np.float32]:
    """The float32 scale of each tile; 0 for byte 0."""
    bits = (scale_bytes.astype(np.uint32) + np.uint32(base)) << np.uint32(_MANTISSA_BITS)
    return np.where(scale_bytes > 0, bits.view(np.float32), np.float32(0.0))


def _noise(key: int, step: int, count: int) -> NDArray[np.uint16]:
    """16 random bits for each of `count` values, at least."""
    return np.ascontiguousarray(philox.words(key, step, 0, -(-count // 2)), dtype="<u4").view("<u2")


def codes_of(
    values: NDArray[np.float32], scale_bytes: NDArray[np.uint8], levels: int, *, base: int, key: int, step: int
) -> NDArray[np.uint8]:
    """The code of each value, uint8 (count,)."""
    scales, most = _scales(scale_bytes, base), np.float32(levels - 1)
    noise = _noise(key, step, values.size)
    codes = np.empty(values.size, dtype=np.uint8)
    for first in range(0, values.size, _LANE):
        lane = slice(first, min(first + _LANE, values.size))
        each = np.repeat(scales[first // TILE_VALUES : -(-lane.stop // TILE_VALUES)], TILE_VALUES)[: lane.stop - first]
        zero = each == 0
        z = np.rint((values[lane] / np.where(zero, np.float32(1.0), each) + most) * np.float32(2 ** (_NOISE_BITS - 1)))
        whole = np.clip(z.astype(np.int32), 0, (levels - 1) << _NOISE_BITS) + noise[lane].astype(np.int32)
        codes[lane] = np.where(zero, 0, whole >> _NOISE_BITS)
    return codes


def values_of(
    codes: NDArray[np.uint8], scale_bytes: NDArray[np.uint8], levels: int, *, base: int, key: int, step: int
) -> NDArray[np.float32]:
    """The float32 (count,) that codes and scales stand for. Raises MalformedRecord for a code in a tile of zeros."""
    values = np.empty(codes.size, dtype=np.float32)
    scales, noise = _scales(scale_bytes, base), _noise(key, step, codes.size)
    for first in range(0, values.size, _LANE):
        lane = slice(first, min(first + _LANE, values.size))
        each = np.repeat(scales[first // TILE_VALUES : -(-lane.stop // TILE_VALUES)], TILE_VALUES)[: lane.stop - first]
        if bool((codes[lane][each == 0] > 0).any()):
            raise _foreign()
        z = (2 * codes[lane].astype(np.int32) + 1 - levels) * 65536 + 65535 - 2 * noise[lane].astype(np.int32)
        spread = z.astype(np.float32) * np.float32(2.0**-_NOISE_BITS)  # exact: z is below 2**24
        values[lane] = np.where(each == 0, np.float32(0.0), spread * each)
    return values


def packed(codes: NDArray[np.uint8], form: TileForm) -> NDArray[np.uint8]:
    """Codes as bytes: the group's number is codes in base `levels`, first code lowest; its bits lowest first."""
    padded = np.zeros((-(-codes.size // form.group), form.group), dtype=np.uint32)
    padded.reshape(-1)[: codes.size] = codes
    numbers = padded @ (np.uint32(form.levels) ** np.arange(form.group, dtype=np.uint32))
    bits = (numbers[:, None] >> np.arange(form.group_bits, dtype=np.uint32)) & np.uint32(1)
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")


def unpacked(held: NDArray[np.uint8], form: TileForm, count: int) -> NDArray[np.uint8]:
    """`count` codes, uint8, from their bytes. Raises MalformedRecord for bits beyond them or of no level."""
    groups = -(-count // form.group)
    bits = np.unpackbits(held, bitorder="little")
    rest = bits[groups * form.group_bits :]
    numbers = np.zeros(groups, dtype=np.uint32)
    for place, column in enumerate(bits[: groups * form.group_bits].reshape(groups, form.group_bits).T):
        numbers |= column.astype(np.uint32) << np.uint32(place)
    codes = np.empty((groups, form.group), dtype=np.uint8)
    for place in range(form.group):
        numbers, codes[:, place] = np.divmod(numbers, np.uint32(form.levels))
    flat = codes.reshape(-1)
    if bool(rest.any()) or bool(numbers.any()) or bool(flat[count:].any()):
        raise _foreign()
    return flat[:count]
