"""The search for a placement of many devices: greedy plans first, then rounds of annealing, the longest from the best
of them.

It can stop anywhere: the best plan so far is a function of the problem, the seed and the steps made. Refuses to know
clocks: who has so many seconds measures how fast moves are and says how far the round is (market/placement.py).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from market.placement_cost import Floats, Problem, Table, cost_of
from market.placement_exact import STAGES_EXACT_MAX, best_path
from market.placement_state import State

__all__ = ["ROUND_SHARES", "Search", "greedy_groups", "greedy_pipelines"]

ROUND_SHARES: Final = (0.05, 0.05, 0.9)  # of the budget: from one greedy plan, from the other, from the best so far
_SHARES: Final = (100, 512, 800)  # of 1024 moves: along the path, of a deciding device, with a device near it (0019)
_WARMTH: Final = 0.4  # the warmest, as a share of the cost of a stage, where there are moves enough
_MOVES_ENOUGH: Final = 300_000  # a round, for each device; with fewer it starts cooler, as it could not settle again
_COOLING: Final = 1 / 50  # from the warmest to the coldest of a round


class Search:
    """Plans for one problem, the best kept. `begin_round` chooses where to start, `anneal` makes moves; `best` is the
    plan so far."""

    def __init__(self, problem: Problem, *, seed: int, compiled: bool = True) -> None:
        self.problem, self.moves, self._seed, self._compiled = problem, 0, seed, compiled
        plans = [greedy_pipelines(problem), greedy_groups(problem)]
        self.state = State(problem, plans[0], seed=seed, shares=_SHARES, compiled=compiled)
        costs = []
        for plan in plans:
            self.state.begin(plan)
            costs.append(int(self.state.totals[0]))
        self._starts = [plans[place] for place in sorted(range(len(plans)), key=costs.__getitem__)]
        self.greedy = self.state.best_pipelines()
        self.greedy_s = cost_of(problem, self.greedy).total_s
        self.state.begin(self._starts[0])

    @property
    def best(self) -> Table:
        """The best plan so far, (stages, replicas)."""
        return self.state.best_table()

    @property
    def best_s(self) -> float:
        """About what it costs, to the rounding of the search's units."""
        return float(self.state.totals[1]) * self.state.unit_s

    def can_move(self) -> bool:
        """Whether there is another plan: not for one group of all."""
        return len(self.problem) > self.problem.replicas

    def begin_round(self, turn: int) -> None:
        """Start over: from each greedy plan once, for which of them is near the best depends on the links, then from
        the best."""
        if self.state.coarse():
            self.state = State(self.problem, self.best, seed=self._seed + turn, shares=_SHARES, compiled=self._compiled)
        self.state.begin(self._starts[turn] if turn < len(self._starts) else self.best)

    def anneal(self, moves: int, *, share: float, expected: float) -> None:
        """Make moves, as warm as fits a round that has gone this share of its way, and has so many moves in all."""
        state = self.state
        enough = min(1.0, expected / (_MOVES_ENOUGH * state.devices))
        stage = float(state.totals[1]) / (state.groups + 1)
        state.anneal(moves, int(_WARMTH * enough**0.5 * stage * _COOLING ** min(1.0, share)))
        self.moves += moves

    def straighten(self) -> None:
        """Take the best path through the best groups, where the stages are few enough to know it."""
        state, stages = self.state, self.problem.stages
        if not 2 < stages <= STAGES_EXACT_MAX:
            return
        best = self.best
        state.begin(best)
        pairs = [(a, b) for a in range(stages) for b in range(a)]
        costs = np.full((stages, stages), np.inf)
        for (a, b), cost in zip(pairs, state.boundaries(pairs), strict=True):
            costs[a, b] = costs[b, a] = cost
        state.begin(best[best_path(costs)])


def greedy_pipelines(problem: Problem) -> Table:
    """One pipeline after the other, each going on to the nearest device that is left: (stages, replicas)."""
    free = np.ones(len(problem), bool)
    table = np.zeros((problem.stages, problem.replicas), np.int64)
    order = _leaders(problem)
    for replica in range(problem.replicas):
        device = int(order[free[order]][0])
        for stage in range(problem.stages):
            if stage:
                device = _nearest(problem.hop[device] + problem.toll, free)
            table[stage, replica], free[device] = device, False
    return table


def greedy_groups(problem: Problem) -> Table:
    """One group after the other, each taking in the device that agrees fastest with it, then along the nearest
    groups."""
    free = np.ones(len(problem), bool)
    table = np.zeros((problem.stages, problem.replicas), np.int64)
    order = _leaders(problem)
    for stage in range(problem.stages):
        device = int(order[free[order]][0])
        together = problem.toll.copy()
        for replica in range(problem.replicas):
            if replica:
                device = _nearest(together, free)
            together += problem.sync[device]
            table[stage, replica], free[device] = device, False
    return table[_near_path(problem, table)]


def _leaders(problem: Problem) -> Table:
    """In which order devices begin a pipeline or a group: by number, or cheap and well connected ones first where some
    are spare."""
    if len(problem) == problem.placed:
        return np.arange(len(problem))
    return np.argsort(problem.toll + np.median(problem.hop, axis=1), kind="stable")


def _nearest(costs: Floats, free: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> int:
    return int(np.where(free, costs, np.inf).argmin())


def _near_path(problem: Problem, table: Table) -> list[int]:
    """A path from group to group, always to the one with the smallest mean cost."""
    stages = problem.stages
    group = np.zeros((stages, len(problem)))
    group[np.repeat(np.arange(stages), problem.replicas), table.ravel()] = 1 / problem.replicas
    mean = group @ problem.hop @ group.T
    path, free = [0], np.ones(stages, bool)
    free[0] = False
    while len(path) < stages:
        path.append(_nearest(mean[path[-1]], free))
        free[path[-1]] = False
    return path
