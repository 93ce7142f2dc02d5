"""The state of a search for a placement: whole numbers in arrays that the compiled moves and the Python ones share.

Costs become int32 multiples of one unit, 2^-30 of a cap that no better plan reaches, so sums are exact in any order,
nothing drifts however many moves update them, and C and Python agree to the last bit. Refuses to know which moves
there are.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from market.placement_anneal import Moves
from market.placement_cost import Floats, Problem, Table, straight_cost
from protocol.compiled import Function, compiled_library

__all__ = ["PATIENCE_BITS", "State", "library"]

_VERSION: Final = 1  # of market/c/placement.c: a helper of other sources than these is not used
_UNITS: Final = 2**30  # int32 with a bit to spare; a plan's sum of rounding errors is below (K + R) / 2^30 of its cost
_NEAR_MIN: Final = 12  # of a device's nearest, which a move tries first, where there are so many,
_NEAR_SHARE: Final = 8  # else one in so many of all, about a city's,
_NEAR_MAX: Final = 128  # and never more than these: 1 MB at N = 2048
PATIENCE_BITS: Final = 12  # of one draw: how much worse a move may be, from a table of the exponential distribution
_UNSEEN: Final = 2**62

_COUNTS: Final = ("devices", "groups", "size", "near_count", "path_share", "guided_share", "near_share")
_ARRAYS: Final = (
    "partner", "hop", "work", "toll", "near", "patience", "slots", "slot_of", "order", "place", "boundary", "tight",
    "matching", "rows", "sync", "slowest", "totals", "known", "witness", "best_slots", "best_order", "random",
)  # fmt: skip


class _Shared(ctypes.Structure):
    """`state` of market/c/placement.c."""

    _fields_ = [(name, ctypes.c_int64) for name in _COUNTS] + [(name, ctypes.c_void_p) for name in _ARRAYS]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled moves, or None where they were not built or are of other sources."""
    functions: dict[str, Function] = {
        "ichiba_placement_version": (ctypes.c_int64, ()),
        "ichiba_placement_boundary": (ctypes.c_int32, (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)),
        "ichiba_placement_anneal": (None, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
    }
    return compiled_library(__file__, "_placement", functions, version="ichiba_placement_version", wanted=_VERSION)


class State:
    """One plan under change, and the best so far. K groups of R of N devices; int32 unless said otherwise.

    Given: partner, hop (N, N), work, toll (N,) in units; near (N, near_count) each device's nearest others;
    patience (2^12,) int64, quantiles of the exponential distribution in 1/65536.
    The plan: slots (N,) the device in each slot, R slots to a group, spare devices last; slot_of (N,) its inverse;
    order (K,) the groups along the path; place (K,) its inverse.
    What follows from it: rows (N,) int64, a placed device's sum of partner over its group; sync (K,) int64, the
    largest of them; slowest (K,) int64, the group's largest work; totals (2,) int64, the cost of this plan and of the
    best. Of the pair g < h of groups, at g * K + h: boundary, the value of its bottleneck matching; matching (R), the
    column of each row; tight, the row of its largest edge; witness (2R) uint8, Hall's: marked rows whose edges below
    the value lead to marked columns only, one fewer; known uint8, whether these are of the present groups (else only a
    start). Neighbours on the path are always known.
    """

    def __init__(
        self, problem: Problem, table: Table, *, seed: int, shares: tuple[int, int, int], compiled: bool = True
    ) -> None:
        """table: the plan to start from. shares: of 1024 moves, those along the path, guided and to near devices.
        compiled: by compiled moves, where there are any."""
        count, groups, size = len(problem), problem.stages, problem.replicas
        cap = 2 * straight_cost(problem, table)  # an edge above it is in no plan better than this one
        self.unit_s = cap / _UNITS if cap > 0 else 1.0
        self.devices, self.groups, self.size = count, groups, size
        self.near_count = min(count - 1, max(_NEAR_MIN, min(_NEAR_MAX, count // _NEAR_SHARE)))
        self.path_share, self.guided_share, self.near_share = shares
        self.partner, self.hop = (self._units(costs, cap) for costs in (problem.sync, problem.hop))
        self.work, self.toll = (self._units(costs, cap) for costs in (problem.work, problem.toll))
        far = problem.hop.copy()
        np.fill_diagonal(far, np.inf)
        self.near = np.argsort(far, axis=1, kind="stable")[:, : self.near_count].astype(np.int32)
        steps = 2**PATIENCE_BITS
        self.patience = np.array([int(-math.log((i + 0.5) / steps) * 65536) for i in range(steps)], np.int64)
        self.slots, self.slot_of, self.best_slots = (np.zeros(count, np.int32) for _ in range(3))
        self.order, self.place, self.best_order = (np.zeros(groups, np.int32) for _ in range(3))
        self.rows, self.sync, self.slowest = np.zeros(count, np.int64), *np.zeros((2, groups), np.int64)
        self.boundary, self.tight = np.zeros((2, groups * groups), np.int32)
        self.matching = np.zeros(groups * groups * size, np.int32)
        self.known = np.zeros(groups * groups, np.uint8)
        self.witness = np.zeros(groups * groups * size * 2, np.uint8)
        self.totals = np.array([0, _UNSEEN], np.int64)
        self.random = np.array([_scrambled(seed)], np.uint64)
        self.compiled = library() if compiled else None
        self.shared = _Shared(
            *(getattr(self, name) for name in _COUNTS), *(getattr(self, name).ctypes.data for name in _ARRAYS)
        )
        self.begin(table)

    def _units(self, costs: Floats, cap: float) -> npt.NDArray[np.int32]:
        return np.ascontiguousarray(np.minimum(costs, cap) / self.unit_s).astype(np.int32)

    def begin(self, table: Table) -> None:
        """Go on from another plan, (K, R), rows in the order of the path. The best so far stays."""
        placed = np.asarray(table, np.int32).ravel()
        rest = np.setdiff1d(np.arange(self.devices, dtype=np.int32), placed)
        self.slots[:] = np.concatenate([placed, rest])
        self.order[:] = np.arange(self.groups)
        self.matching[:] = np.tile(np.arange(self.size, dtype=np.int32), self.groups * self.groups)
        self.reckon()

    @functools.cached_property
    def lists(self) -> dict[str, list[list[int]]]:
        """The matrices for moves in Python."""
        return {name: getattr(self, name).tolist() for name in ("partner", "hop", "near")}

    def anneal(self, moves: int, temperature: int) -> None:
        """Make so many moves, compiled or not: the same ones. temperature: in units of cost."""
        if self.compiled is not None:
            self.compiled.ichiba_placement_anneal(ctypes.byref(self.shared), moves, temperature)
            return
        python = Moves(self)
        python.anneal(moves, temperature)
        python.done()

    def boundaries(self, pairs: Iterable[tuple[int, int]]) -> list[int]:
        """What the boundaries of these pairs of groups cost, in units."""
        if self.compiled is not None:
            return [self.compiled.ichiba_placement_boundary(ctypes.byref(self.shared), a, b) for a, b in pairs]
        python = Moves(self)
        found = [python.boundary_of(a, b) for a, b in pairs]
        python.done()
        return found

    def reckon(self) -> None:
        """Everything that follows from the plan, afresh: what the moves keep up to date."""
        self.slot_of[self.slots] = np.arange(self.devices)
        self.place[self.order] = np.arange(self.groups)
        self.rows[:] = 0
        for group in range(self.groups):
            members = self.slots[group * self.size : (group + 1) * self.size]
            self.rows[members] = self.partner[np.ix_(members, members)].sum(axis=1, dtype=np.int64)
            self.sync[group] = self.rows[members].max()
            self.slowest[group] = self.work[members].max()
        self.known[:] = 0
        path = self.order.tolist()
        hops = sum(self.boundaries(pairwise(path)))
        placed = self.slots[: self.groups * self.size]
        self.totals[0] = self.sync.max() + self.slowest.sum() + self.toll[placed].sum(dtype=np.int64) + hops
        if self.totals[0] < self.totals[1]:
            self.totals[1] = self.totals[0]
            self.best_slots[:], self.best_order[:] = self.slots, self.order

    def coarse(self) -> bool:
        """Whether the best plan costs so much less than the first that finer units would serve it better."""
        return bool(0 < self.totals[1] < _UNITS // 32)

    def best_table(self) -> Table:
        """The best plan so far, (K, R), rows in the order of the path."""
        groups = self.best_slots[: self.groups * self.size].reshape(self.groups, self.size)
        return groups[self.best_order].astype(np.int64)

    def best_pipelines(self) -> Table:
        """The best plan so far, its columns along the matchings of neighbouring stages. The plan under change stays."""
        changing = _ARRAYS[_ARRAYS.index("slots") :]
        kept = {name: getattr(self, name).copy() for name in changing}
        self.begin(self.best_table())
        groups = self.slots[: self.groups * self.size].reshape(self.groups, self.size).astype(np.int64)
        table, rows = groups.copy(), np.arange(self.size, dtype=np.int32)  # rows: each pipeline's slot in its stage
        for stage in range(1, self.groups):  # begin numbers the groups along the path: the pair is (stage - 1, stage)
            first = ((stage - 1) * self.groups + stage) * self.size
            rows = self.matching[first : first + self.size][rows]
            table[stage] = groups[stage][rows]
        for name, array in kept.items():
            getattr(self, name)[:] = array
        return table

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Every array by name, for comparison."""
        return {name: getattr(self, name) for name in _ARRAYS}


def _scrambled(seed: int) -> int:
    """A non-zero state of the generator, well mixed. Source: splitmix64, Steele, Lea and Flood (2014)."""
    word = (seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31 or 1
