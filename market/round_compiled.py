"""The compiled half of a large round, market/c/rounds.c: the bids of one offer scored in one pass, and the auction.

It gives the bits that market/scoring.py and market/assignment.py give without it, which is how they go on where there
is no C compiler; tests hold the two against each other. It knows no rule: what the numbers mean is said there.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from protocol.compiled import Function, compiled_library

__all__ = ["Asked", "Auction", "Known", "Rankings", "rounds_library"]

_VERSION: Final = 2  # of market/c/rounds.c: a helper of other sources than these is not used
_FOUND_BYTES: Final = 24  # `found` of the C
_BLOCK: Final = 64  # the C's, and:
_MEDIAN_BITS: Final = 14
_PLACE_BITS_MAX: Final = 16
_THREADS_FROM: Final = 32_768  # bids of a round: some 4 ms of one thread
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
        "ichiba_rounds_threads": (whole, ()),
        "ichiba_rounds_rank": (None, (pointer, whole, pointer, pointer, whole, pointer, whole, whole)),
        "ichiba_rounds_present": (None, (pointer, whole, pointer, pointer, pointer)),
        "ichiba_rounds_costs": (None, (pointer, whole, pointer, pointer, pointer, whole, whole, pointer, pointer)),
        "ichiba_rounds_most": (whole, (pointer, whole, whole, pointer)),
        "ichiba_rounds_scale": (whole, (pointer, whole, whole, whole, ctypes.c_int32, pointer, pointer)),
        "ichiba_rounds_worth": (None, (pointer, whole, whole, whole)),
        "ichiba_rounds_auction": (None, (pointer, pointer, whole, whole, ctypes.c_int32, *(pointer,) * 7)),
    }
    if sys.byteorder != "little":
        return None
    return compiled_library(__file__, "_rounds", functions, version="ichiba_rounds_version", wanted=_VERSION)


class _Bidders(ctypes.Structure):
    """`bidders` of market/c/rounds.c."""

    _fields_ = [(name, ctypes.c_int64) for name in ("count", "speeds_count", "links_count", "shift")] + [
        (name, ctypes.c_void_p)
        for name in ("heads", "places", "stake", "doubt_ppm", "slowdown", "speed", "link", "speeds", "links")
    ]


class _Ranked(ctypes.Structure):
    """`ranked` of market/c/rounds.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("rows", "who", "scores", "able", "moving_micro")]


@dataclass(frozen=True)
class Asked:
    """An offer and the bids on it. terms: `terms` of the C, in order. packed: `count` bids. may: bool (n), whether a
    bidder can have this job at all."""

    terms: Sequence[int]
    packed: bytes
    count: int
    may: npt.NDArray[np.bool_]


class Rankings:
    """What `Known.rank` found, of each offer in its order. `whole`: no two bids that tie have the same head."""

    def __init__(self, library: ctypes.CDLL, counts: Ints, links: int) -> None:
        self._library, self._counts = library, counts
        self._starts = np.concatenate(([0], counts.cumsum())).astype(np.int64)
        total = int(self._starts[-1])
        self._rows, self._who = np.empty(total, np.int32), np.empty(total, np.int32)
        self._scores = np.empty(total, np.int64)
        self._able = np.zeros(counts.size, np.int64)
        self._moving = np.zeros((counts.size, links), np.int64)
        columns = self._rows, self._who, self._scores, self._able, self._moving
        self.shared = _Ranked(*(column.ctypes.data for column in columns))

    @property
    def starts(self) -> list[int]:
        """Where the bids on each begin among those on all."""
        return self._starts[:-1].tolist()  # type: ignore[no-any-return]

    @property
    def whole(self) -> bool:
        """See above. A bid of a stranger stops it."""
        assert not (self._able == -2).any(), "a bid of a solver who is not among the bidders"
        return not (self._able < 0).any()

    def of(self, number: int) -> tuple[Small, Small, Ints, Ints, Small]:
        """Row, solver and score of each feasible bid on an offer, best first; what the transfer costs by place of a
        link; the rows of the refused."""
        start, able, count = int(self._starts[number]), int(self._able[number]), int(self._counts[number])
        here = slice(start, start + able)
        refused = self._rows[start + able : start + count]
        return self._rows[here], self._who[here], self._scores[here], self._moving[number], refused

    def present(self, numbers: Ints, bidders: int) -> npt.NDArray[np.bool_]:
        """Which of so many bidders have a feasible bid on one of these offers."""
        found = np.zeros(bidders, np.bool_)
        self._library.ichiba_rounds_present(
            numbers.ctypes.data, numbers.size, self._starts.ctypes.data, ctypes.byref(self.shared), found.ctypes.data
        )
        return found

    def costs(self, numbers: Ints, column: Ints, columns: int, never: int) -> tuple[Ints, Ints]:
        """The scores of these offers, (offers, columns), `never` where there is none; and the largest of each. column:
        of each bidder, -1 for none."""
        costs, dearest = np.empty((numbers.size, columns), np.int64), np.zeros(numbers.size, np.int64)
        self._library.ichiba_rounds_costs(
            numbers.ctypes.data, numbers.size, self._starts.ctypes.data, ctypes.byref(self.shared), column.ctypes.data,
            columns, never, costs.ctypes.data, dearest.ctypes.data,
        )  # fmt: skip
        return costs, dearest


class Known:
    """What is known of the bidders, as the C reads it. heads: uint64 (n), strictly ascending; columns: int64 (n) each,
    the free stake, doubt in ppm, slowdown in permille, and the places of the speed and of the link among `speeds` and
    `links`, int64, per second."""

    def __init__(
        self, library: ctypes.CDLL, heads: npt.NDArray[np.uint64], columns: Sequence[Ints], speeds: Ints, links: Ints
    ) -> None:
        self._library = library
        bits = min(_PLACE_BITS_MAX, heads.size.bit_length())  # about two places a head
        bounds = np.arange(1 << bits, dtype=np.uint64) << np.uint64(64 - bits) if bits else np.zeros(1, np.uint64)
        places = np.append(np.searchsorted(heads, bounds), heads.size).astype(np.int64)
        self._kept = [np.ascontiguousarray(array) for array in (heads, places, *columns, speeds, links)]
        assert all(array.dtype.itemsize == 8 for array in self._kept)
        sizes = heads.size, speeds.size, links.size, 64 - bits
        self._shared = _Bidders(*sizes, *(array.ctypes.data for array in self._kept))
        self._sizes = speeds.size, links.size

    @classmethod
    def of(cls, heads: npt.NDArray[np.uint64], columns: Sequence[Ints], speeds: Ints, links: Ints) -> Known | None:
        """None where nothing is compiled."""
        library = rounds_library()
        return None if library is None else cls(library, heads, columns, speeds, links)

    def rank(self, asked: Sequence[Asked], *, threads: int = 0) -> Rankings:
        """Refuse or score every bid, and order those on each offer. threads: 0 for as many as are of use; any number
        finds the same."""
        counts = np.array([one.count for one in asked], np.int64)
        found = Rankings(self._library, counts, self._sizes[1])
        offers = np.array(
            [
                (*one.terms, _address(one.packed), one.may.ctypes.data, one.count, start)
                for one, start in zip(asked, found.starts, strict=True)
            ],
            np.int64,
        )
        most = int(counts.max(initial=0))
        if not threads:
            threads = self._library.ichiba_rounds_threads() if counts.sum() >= _THREADS_FROM else 1
        room_bytes = 2 * most * _FOUND_BYTES + 8 * sum(self._sizes)
        room = np.empty(threads * room_bytes, np.uint8)
        self._library.ichiba_rounds_rank(
            offers.ctypes.data, len(asked), ctypes.byref(self._shared), ctypes.byref(found.shared), threads,
            room.ctypes.data, room_bytes, most,
        )  # fmt: skip
        return found


def _address(data: bytes) -> int:
    """Where the bytes lie; `data` must outlive it."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


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

    def scale(self, shift: int, dear: int) -> int:
        """Shift the costs so; `dear` stands for those that must not be from now on. Returns the median of the others,
        rounded down, 0 for none."""
        self._scaled: Small = np.empty(self._costs.shape, np.int32)
        room = np.empty(1 << _MEDIAN_BITS, np.int64)
        return self._library.ichiba_rounds_scale(  # type: ignore[no-any-return]
            self._costs.ctypes.data, self._costs.size, self._never, shift, dear, self._scaled.ctypes.data,
            room.ctypes.data,
        )  # fmt: skip

    def run(self, reserves: Small, step: int) -> Ints:
        """The column of each row, -1 for none. reserves: (rows,), shifted likewise."""
        rows, columns = self._scaled.shape
        blocks = (columns + _BLOCK - 1) // _BLOCK
        reserves = np.ascontiguousarray(reserves)
        prices, offered = np.zeros(columns, np.int32), np.zeros(columns, np.int32)
        holder, by = np.full(columns, _UNMATCHED, np.int64), np.full(columns, _UNMATCHED, np.int64)
        column_of, waiting = np.full(rows, _UNMATCHED, np.int64), np.empty(2 * rows, np.int64)
        largest = np.empty(blocks, np.int32)
        self._library.ichiba_rounds_worth(self._scaled.ctypes.data, rows, columns, step)
        self._library.ichiba_rounds_auction(
            self._scaled.ctypes.data, reserves.ctypes.data, rows, columns, step, prices.ctypes.data,
            holder.ctypes.data, column_of.ctypes.data, offered.ctypes.data, by.ctypes.data, waiting.ctypes.data,
            largest.ctypes.data,
        )  # fmt: skip
        return column_of
