"""The compiled tiles: the loops of tiles.py in C, with its bits. Optional, as worker/exact/compiled.py is.

Nothing here decides a bit: tests compare both forms over every kind of number, shape and thread count.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.compiled import Function, compiled_library
from worker.exact.compiled import shared_out

__all__ = ["PAIR", "decode_tiles", "encode_tiles", "has_tiles", "tile_scales"]

PAIR = 64  # values: two tiles, the least that every form packs into whole bytes
_VERSION = 2  # ICHIBA_TILES_VERSION of tiles.h: a library of other sources than these is not used
_INT, _LONG, _POINTER, _WORD = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_uint64
_SIGNATURES: dict[str, Function] = {
    "ichiba_tiles_version": (_INT, ()),
    "ichiba_has_tiles": (_INT, ()),
    "ichiba_tile_scales": (_INT, (_POINTER, _LONG, _INT, _POINTER)),
    "ichiba_tile_encode": (
        None, (_POINTER, _LONG, _LONG, _INT, _INT, _POINTER, _WORD, _WORD, _POINTER, _POINTER),
    ),
    "ichiba_tile_decode": (
        _INT, (_POINTER, _POINTER, _LONG, _LONG, _INT, _INT, _WORD, _WORD, _POINTER),
    ),
}  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = compiled_library(__file__, "_compiled", _SIGNATURES, version="ichiba_tiles_version", wanted=_VERSION)
    return library if library is not None and library.ichiba_has_tiles() else None


def has_tiles() -> bool:
    """Whether the functions below work here."""
    return _library() is not None


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "ask has_tiles first"
    return library


def tile_scales(values: NDArray[np.float32], levels: int, scales: NDArray[np.uint16]) -> int:
    """tiles.scales_of, compiled: fills uint16 `scales`, returns the largest, or -1 where a value is too large."""
    call, start, end, count = _loaded().ichiba_tile_scales, values.ctypes.data, scales.ctypes.data, values.size
    tops: list[int] = []

    def some(first: int, last: int) -> None:
        tops.append(call(start + 4 * first, last - first, levels, end + first // 32 * 2))

    shared_out(count, count, some, multiple=PAIR)
    return -1 if -1 in tops else max(tops)


def encode_tiles(
    values: NDArray[np.float32],
    scales: NDArray[np.uint16],
    *,
    levels: int,
    pair_bytes: int,
    base: int,
    key: int,
    step: int,
    scale_bytes: NDArray[np.uint8],
    codes: NDArray[np.uint8],
) -> None:
    """tiles.codes_of, compiled: fills `scale_bytes` and `codes`. pair_bytes: of the codes of 64 values."""
    call, places = _loaded().ichiba_tile_encode, _places(values, scales, scale_bytes, codes)

    def some(first: int, last: int) -> None:
        tile, code = first // 32, first // PAIR * pair_bytes
        call(
            places[0] + 4 * first, first, last - first, levels, base, places[1] + 2 * tile, key, step, places[2] + tile,
            places[3] + code,
        )  # fmt: skip

    shared_out(values.size, 4 * values.size, some, multiple=PAIR)


def decode_tiles(
    scale_bytes: NDArray[np.uint8],
    codes: NDArray[np.uint8],
    values: NDArray[np.float32],
    *,
    levels: int,
    pair_bytes: int,
    base: int,
    key: int,
    step: int,
) -> bool:
    """tiles.values_of, compiled: fills `values`. Whether the codes are of this form."""
    call, places = _loaded().ichiba_tile_decode, _places(scale_bytes, codes, values)
    bad: list[int] = []

    def some(first: int, last: int) -> None:
        tile, code = first // 32, first // PAIR * pair_bytes
        bad.append(
            call(
                places[0] + tile, places[1] + code, first, last - first, levels, base, key, step, places[2] + 4 * first
            )
        )  # fmt: skip

    shared_out(values.size, 4 * values.size, some, multiple=PAIR)
    return not any(bad)


def _places(*arrays: NDArray[Any]) -> list[int]:
    return [array.ctypes.data for array in arrays]
