"""The compiled half of a large round, market/c/rounds.c: the bids of one offer scored in one pass, and the auction.

It gives the bits that market/scoring.py and market/assignment.py give without it, which is how they go on where there
is no C compiler; tests hold the two against each other. It knows no rule: what the numbers mean is said there.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from protocol.compiled import Function, compiled_library

__all__ = ["Auction", "Known", "rounds_library"]

_VERSION: Final = 1  # of market/c/rounds.c: a helper of other sources than these is not used
_FOUND_BYTES: Final = 24  # `found` of the C
_ROWS: Final = 4  # of its answer
_BLOCK: Final = 64
_UNMATCHED: Final = -1

Ints = npt.NDArray[np.int64]
Small = npt.NDArray[np.int32]


@functools.cache
def rounds_library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they were not built, are of other sources, or would read packed bids in
    another order of bytes."""
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    functions: dict[str, Function] = {
        "ichiba_rounds_version": (whole, ()),
        "ichiba_rounds_rank": (whole, (pointer, ctypes.c_char_p, whole, *(pointer,) * 4)),
        "ichiba_rounds_most": (whole, (pointer, whole, whole, pointer)),
        "ichiba_rounds_scale": (None, (pointer, whole, whole, whole, ctypes.c_int32, pointer, pointer)),
        "ichiba_rounds_worth": (None, (pointer, whole, whole, whole)),
        "ichiba_rounds_auction": (None, (pointer, pointer, whole, whole, ctypes.c_int32, *(pointer,) * 8)),
    }
    if sys.byteorder != "little":
        return None
    return compiled_library(__file__, "_rounds", functions, version="ichiba_rounds_version", wanted=_VERSION)


class _Bidders(ctypes.Structure):
    """`bidders` of market/c/rounds.c."""

    _fields_ = [(name, ctypes.c_int64) for name in ("count", "speeds_count", "links_count")] + [
        (name, ctypes.c_void_p)
        for name in (
            "heads", "stake", "doubt_ppm", "slowdown", "speed", "link", "speeds", "links", "floors_ns", "moving_ns",
            "moving_micro",
        )
    ]  # fmt: skip


_Terms = ctypes.c_int64 * 13


class Known:
    """What is known of the bidders, as the C reads it. heads: uint64 (n), strictly ascending; columns: int64 (n) each,
    the free stake, doubt in ppm, slowdown in permille, and the places of the speed and of the link among `speeds` and
    `links`, int64, per second. One thread at a time."""

    def __init__(
        self, library: ctypes.CDLL, heads: npt.NDArray[np.uint64], columns: Sequence[Ints], speeds: Ints, links: Ints
    ) -> None:
        self._rank = library.ichiba_rounds_rank
        arrays = [heads, *columns, speeds, links, *(np.empty(of.size, np.int64) for of in (speeds, links, links))]
        self._kept = [np.ascontiguousarray(array) for array in arrays]
        assert all(array.dtype.itemsize == 8 for array in self._kept)
        sizes = heads.size, speeds.size, links.size
        self._shared = _Bidders(*sizes, *(array.ctypes.data for array in self._kept))
        self._scratch = np.empty(0, np.uint8)

    @classmethod
    def of(cls, heads: npt.NDArray[np.uint64], columns: Sequence[Ints], speeds: Ints, links: Ints) -> Known | None:
        """None where nothing is compiled."""
        library = rounds_library()
        return None if library is None else cls(library, heads, columns, speeds, links)

    def rank(
        self, terms: Sequence[int], packed: bytes, count: int, may: npt.NDArray[np.bool_]
    ) -> tuple[Ints, Ints, Ints, Ints, Ints] | None:
        """Row, solver and score of each feasible one of `count` bids, best first; what the transfer costs by place of a
        link; the rows of the refused. None where two bids that tie have the same head. terms: `terms` of the C, in
        order; may: (n), whether a bidder can have this job at all."""
        if self._scratch.size < 2 * count * _FOUND_BYTES:
            self._scratch = np.empty(2 * count * _FOUND_BYTES, np.uint8)
        out = np.empty((_ROWS, count), np.int64)
        able = self._rank(
            _Terms(*terms), packed, count, ctypes.byref(self._shared), may.ctypes.data, out.ctypes.data,
            self._scratch.ctypes.data,
        )  # fmt: skip
        assert able != -2, "a bid of a solver who is not among the bidders"
        if able < 0:
            return None
        rows, solvers, scores = out[:3, :able]
        return rows, solvers, scores, self._kept[-1].copy(), out[3, : count - able]


class Auction:
    """market.assignment.assign, compiled, in its steps; `of` gives None where it is not. costs: int64 (rows, columns),
    `never` and more where a pair must not be. dearest: of the others, 0 for none."""

    def __init__(self, library: ctypes.CDLL, costs: Ints, never: int) -> None:
        self._library, self._never = library, never
        self._costs = np.ascontiguousarray(costs, np.int64)
        most = ctypes.c_int64()
        self._possible = library.ichiba_rounds_most(self._costs.ctypes.data, costs.size, never, ctypes.byref(most))
        self.dearest = max(0, most.value)

    @classmethod
    def of(cls, costs: Ints, never: int) -> Auction | None:
        """For these costs, not empty."""
        library = rounds_library()
        return None if library is None else cls(library, costs, never)

    def scale(self, shift: int, dear: int) -> Small:
        """The possible costs shifted so, in order; `dear` stands for the others from now on."""
        self._scaled: Small = np.empty(self._costs.shape, np.int32)
        possible = np.empty(self._possible + 1, np.int32)  # the C writes one past the last
        self._library.ichiba_rounds_scale(
            self._costs.ctypes.data, self._costs.size, self._never, shift, dear, self._scaled.ctypes.data,
            possible.ctypes.data,
        )  # fmt: skip
        return possible[:-1]

    def run(self, reserves: Small, step: int) -> Ints:
        """The column of each row, -1 for none. reserves: (rows,), shifted likewise."""
        rows, columns = self._scaled.shape
        reserves = np.ascontiguousarray(reserves)
        prices, offered = np.zeros(columns, np.int32), np.zeros(columns, np.int32)
        holder, by = np.full(columns, _UNMATCHED, np.int64), np.full(columns, _UNMATCHED, np.int64)
        column_of, waiting = np.full(rows, _UNMATCHED, np.int64), np.full(rows, _UNMATCHED, np.int64)
        largest, out = np.empty(columns // _BLOCK + 1, np.int32), np.zeros(rows, np.uint8)
        self._library.ichiba_rounds_worth(self._scaled.ctypes.data, rows, columns, step)
        self._library.ichiba_rounds_auction(
            self._scaled.ctypes.data, reserves.ctypes.data, rows, columns, step, prices.ctypes.data,
            holder.ctypes.data, column_of.ctypes.data, offered.ctypes.data, by.ctypes.data, waiting.ctypes.data,
            largest.ctypes.data, out.ctypes.data,
        )  # fmt: skip
        return column_of
