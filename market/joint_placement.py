"""Which solver gets which unit of a parallel job, for all units that have none at once.

The cost of a choice, in micro-credits, smaller is better: the price and the risk of every unit as in a match
(market/matching.py), and the price of the time that the links and the slowest devices take, by the model of
market/placement_cost.py. Deterministic: the same figures give the same choice. Refuses to know bids and peers' keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final

import numpy as np

from market.placement import Planner
from market.placement_cost import Devices, Links, Problem, Traffic, model, straight_cost

__all__ = ["Candidates", "choose_units", "fullest"]

_MOVES: Final = 20_000  # of the planner, where it cannot be exact: some 0.1 s for 64 devices
_EXACT_MAX: Final = 2_000  # choices that are all looked at: four units among seven devices; some 0.05 s
_ROUNDS_MAX: Final = 50  # of looking at every exchange; each lowers the cost, so few are ever needed


@dataclass(frozen=True)
class Candidates:
    """Who may have what. toll: for each unit (stage * replicas + replica) the rows of `links` that may run it and what
    each asks, in micro-credits; a unit that has its device already has just that one. work_s: seconds of a step on each
    device; second_micro: what a second of a step costs over the whole job."""

    stages: int
    replicas: int
    toll: Sequence[Mapping[int, int]]
    links: Links
    traffic: Traffic
    work_s: Sequence[float]
    second_micro: int

    def problem(self, devices: Sequence[int]) -> Problem:
        """The planner's problem over these rows, which may be fewer than a plan takes."""
        chosen = np.ix_(devices, devices)
        links = Links(self.links.delay_ms[chosen], self.links.gbps[chosen])
        known = Devices(work_s=[self.work_s[at] for at in devices])
        return model(links, stages=self.stages, replicas=self.replicas, traffic=self.traffic, devices=known, spare=True)

    def cost_micro(self, problem: Problem, chosen: Sequence[int]) -> int:
        """What a choice of one device a unit costs. problem: over all rows of the links."""
        table = np.array(chosen).reshape(self.stages, self.replicas)
        asked = sum(self.toll[unit][device] for unit, device in enumerate(chosen))
        return asked + int(straight_cost(problem, table) * self.second_micro)


def fullest(toll: Sequence[Mapping[int, int]]) -> list[int]:
    """The device of each unit, -1 for one that gets none, so that as many units as can have one, and each its own.

    Of those the cheap go first; Kuhn's augmenting paths. Ties to the smaller number.
    """
    holder: dict[int, int] = {}

    def give(unit: int, seen: set[int]) -> bool:
        for device in sorted(toll[unit], key=lambda d: (toll[unit][d], d)):
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


def choose_units(candidates: Candidates) -> list[int] | None:
    """The device of each unit, all different; None while there is no such choice.

    The best of all where they are few. Else it starts from the cheapest full choice, and from the planner's where every
    device may run every unit, and makes exchanges while one lowers the cost.
    """
    first = fullest(candidates.toll)
    if -1 in first:
        return None
    problem = candidates.problem(range(len(candidates.links)))
    if math.perm(len(candidates.links), len(first)) <= _EXACT_MAX:
        every_choice = (list(order) for order in permutations(range(len(candidates.links)), len(first)))
        fitting = (c for c in every_choice if all(d in t for d, t in zip(c, candidates.toll, strict=True)))
        return min(fitting, key=lambda chosen: (candidates.cost_micro(problem, chosen), chosen))
    starts = [first]
    every = set(range(len(candidates.links)))
    if all(set(units) == every for units in candidates.toll):
        planner = Planner(_tolled(candidates, problem), seed=0)
        for _ in planner.run(moves=_MOVES):
            pass
        starts.append([device for row in planner.plan().assignment for device in row])
    improved = [_improve(candidates, problem, start) for start in starts]
    return min(improved, key=lambda chosen: (candidates.cost_micro(problem, chosen), chosen))


def _tolled(candidates: Candidates, problem: Problem) -> Problem:
    """The problem with what a device asks for a unit, on average, in its seconds."""
    asked = [
        sum(units[device] for units in candidates.toll) / len(candidates.toll) / max(1, candidates.second_micro)
        for device in range(len(candidates.links))
    ]
    return Problem(
        problem.stages, problem.replicas, problem.sync, problem.hop, problem.work, np.array(asked), problem.ids
    )


def _improve(candidates: Candidates, problem: Problem, start: Sequence[int]) -> list[int]:
    """Exchange devices of two units, or one for a device that is left, while that lowers the cost."""
    best, cost = list(start), candidates.cost_micro(problem, start)
    for _ in range(_ROUNDS_MAX):
        before = cost
        for unit in range(len(best)):
            for device in sorted(candidates.toll[unit]):
                other = best.index(device) if device in best else -1
                if device == best[unit] or (other >= 0 and best[unit] not in candidates.toll[other]):
                    continue
                tried = list(best)
                tried[unit] = device
                if other >= 0:
                    tried[other] = best[unit]
                found = candidates.cost_micro(problem, tried)
                if found < cost:
                    best, cost = tried, found
        if cost == before:
            break
    return best
