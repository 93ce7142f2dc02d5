"""Which solver gets which unit of a parallel job, for all units that have none at once.

The cost of a choice, in micro-credits, smaller is better: the price and the risk of every unit as in a match
(market/matching.py), and the price of the time of all steps, as market/step_time.py models it from the bytes that each
border and each exchange takes by the codecs of the run. Deterministic: the same figures give the same choice. Refuses
to know bids and peers' keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Final

import numpy as np
import numpy.typing as npt

from market.placement import Planner
from market.placement_cost import Links, Problem, Table
from market.step_time import Pace, Paths, Volume, step_time

__all__ = ["Candidates", "choose_units", "fullest", "tries_of"]

_MOVES: Final = 20_000  # of the planner, where it cannot be exact: some 0.1 s for 64 devices
_EXACT_MAX: Final = 2_000  # choices that are all looked at: four units among seven devices; some 0.1 s
_TRIES_MAX: Final = 10_000  # exchanges that are looked at: all, twice, of 64 units among 80 devices; below 2 s


@dataclass(frozen=True)
class Candidates:
    """Who may have what. toll: for each unit (stage * replicas + replica) the rows of `links` that may run it and what
    each asks, in micro-credits; a unit that has its device already has just that one. volume: what a step sends.
    work_s: seconds of a step on each device; second_micro: what a second of a step costs over the whole job."""

    stages: int
    replicas: int
    toll: Sequence[Mapping[int, int]]
    links: Links
    volume: Volume
    work_s: Sequence[float]
    second_micro: int

    @cached_property
    def _pace(self) -> Pace:
        return Pace(self.links)

    @cached_property
    def _work(self) -> npt.NDArray[np.float64]:
        return np.asarray(self.work_s, np.float64)

    def table(self, chosen: Sequence[int]) -> Table:
        """A choice of one device a unit as (stages, replicas)."""
        return np.array(chosen, np.int64).reshape(self.stages, self.replicas)

    def paths(self, chosen: Sequence[int]) -> Paths:
        """The links that a choice uses."""
        return Paths.of(self._pace, self.table(chosen))

    def work(self, chosen: Sequence[int]) -> npt.NDArray[np.float64]:
        """Seconds of a step of the slowest device of each stage: (stages,)."""
        slowest: npt.NDArray[np.float64] = self._work[self.table(chosen)].max(axis=1)
        return slowest

    def cost_micro(self, chosen: Sequence[int]) -> int:
        """What a choice costs."""
        asked = sum(self.toll[unit][device] for unit, device in enumerate(chosen))
        step_s = step_time(self.volume, self.work(chosen), self.paths(chosen)).total_s
        return asked + int(step_s * self.second_micro)

    def problem(self) -> Problem:
        """The planner's, which knows one size for all borders and one for all stages, and no pipeline: a start."""
        pace, volume, borders = self._pace, self.volume, max(1, self.stages - 1)
        ahead, back = float(volume.ahead.sum()) / borders, float(volume.back.sum()) / borders
        hop = pace.round_trip + ahead * pace.per_byte + back * pace.per_byte.T
        sync = (pace.delay + max(volume.shared, default=0.0) * pace.slower) / volume.every
        asked = [
            sum(units[device] for units in self.toll) / len(self.toll) / max(1, self.second_micro)
            for device in range(len(self.links))
        ]
        ids = np.arange(len(self.links), dtype=np.int64)
        symmetric = np.maximum(hop, hop.T)
        return Problem(self.stages, self.replicas, sync, symmetric, self._work, np.array(asked), ids)


def fullest(toll: Sequence[Mapping[int, int]]) -> list[int]:
    """The device of each unit, -1 for one that gets none, so that as many units as can have one, and each its own.

    Of those the cheap go first; Kuhn's augmenting paths. Ties to the smaller number.
    """
    holder: dict[int, int] = {}
    cheapest = [[device for _, device in sorted((asked, d) for d, asked in units.items())] for units in toll]

    def give(unit: int, seen: set[int]) -> bool:
        for device in cheapest[unit]:
            if device in seen:
                continue
            seen.add(device)
            if device not in holder or give(holder[device], seen):
                holder[device] = unit
                return True
        return False

    for unit in sorted(range(len(toll)), key=lambda u: (len(toll[u]), u)):
        give(unit, set())
    found = {unit: device for device, unit in holder.items()}
    return [found.get(unit, -1) for unit in range(len(toll))]


def tries_of(units: int, devices: int) -> int:
    """How many placements of so many units `choose_units` looks at, about; what it takes grows with it. Where it does
    not look at all, its start takes as long as that."""
    every = math.perm(devices, units)
    return every if every <= _EXACT_MAX else max(_EXACT_MAX, min(_TRIES_MAX, 2 * units * devices))


def choose_units(candidates: Candidates) -> list[int] | None:
    """The device of each unit, all different; None while there is no such choice.

    The best of all where they are few. Else it starts from the cheapest full choice, and from the planner's where every
    device may run every unit, and makes exchanges while one lowers the cost.
    """
    first = fullest(candidates.toll)
    if -1 in first:
        return None
    if math.perm(len(candidates.links), len(first)) <= _EXACT_MAX:
        every_choice = (list(order) for order in permutations(range(len(candidates.links)), len(first)))
        fitting = (c for c in every_choice if all(d in t for d, t in zip(c, candidates.toll, strict=True)))
        return min(fitting, key=lambda chosen: (candidates.cost_micro(chosen), chosen))
    starts = [first]
    every = set(range(len(candidates.links)))
    if all(set(units) == every for units in candidates.toll):
        planner = Planner(candidates.problem(), seed=0)
        for _ in planner.run(moves=_MOVES):
            pass
        starts.append([device for row in planner.plan().assignment for device in row])
    improved = [_improve(candidates, start) for start in starts]
    return min(improved, key=lambda chosen: (candidates.cost_micro(chosen), chosen))


def _improve(candidates: Candidates, start: Sequence[int]) -> list[int]:
    """Exchange devices of two units, or one for a device that is left, while that lowers the cost."""
    best, cost, tries = list(start), candidates.cost_micro(start), 0
    while tries < _TRIES_MAX:
        before = cost
        for unit in range(len(best)):
            for device in sorted(candidates.toll[unit]):
                other = best.index(device) if device in best else -1
                if device == best[unit] or (other >= 0 and best[unit] not in candidates.toll[other]):
                    continue
                tried, tries = list(best), tries + 1
                tried[unit] = device
                if other >= 0:
                    tried[other] = best[unit]
                found = candidates.cost_micro(tried)
                if found < cost:
                    best, cost = tried, found
                if tries >= _TRIES_MAX:
                    return best
        if cost == before:
            break
    return best
