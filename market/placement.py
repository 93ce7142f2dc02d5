"""Where each of many devices goes in a training job: which stage, beside which replicas, to which neighbours.

Planner puts together the cost model (placement_cost), the exact answer for few devices (placement_exact), the search
for many (placement_search) and the bound that says how far from the best a plan can be at most (placement_bound).
Refuses to know where links are measured, files, and the time: a clock is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

import numpy as np

from market.placement_bound import lower_bound
from market.placement_cost import (
    Coding,
    Cost,
    Devices,
    Links,
    PlacementRefused,
    Problem,
    Table,
    Traffic,
    bottleneck,
    cost_of,
    model,
    straight_cost,
)
from market.placement_exact import PARTITIONS_MAX, best_plan, partitions
from market.placement_search import ROUND_SHARES, Search

__all__ = [
    "Coding",
    "Cost",
    "Devices",
    "Links",
    "PlacementRefused",
    "Plan",
    "Planner",
    "Problem",
    "Progress",
    "Traffic",
    "cost_of",
    "lower_bound",
    "model",
    "random_mean",
]

_STEPS: Final = 100  # of a round: how finely it cools, and how often one can look at it
_MOVES_FIRST: Final = 64  # before anything is known of the speed
_GROWTH: Final = 4  # of a step over the one before it
_FINISH_SHARE: Final = 0.02  # of the time, kept for making pipelines of the plan and pricing it
_SEEDS: Final = 2**63
_SAMPLES: Final = 100  # random plans of a mean: its standard error is about 1 %


@dataclass(frozen=True)
class Progress:
    """How far a search is: the cost of the best plan so far, moves made, the share of its budget used."""

    best_s: float
    moves: int
    share: float


@dataclass(frozen=True)
class Plan:
    """A placement. assignment: for each stage the device of each replica, as rows of the links; replica r of one stage
    sends to replica r of the next. exact: no plan is better."""

    assignment: tuple[tuple[int, ...], ...]
    cost: Cost
    greedy_s: float
    exact: bool
    moves: int


class Planner:
    """One problem, one seed: the same moves give the same plan, compiled or not.

    `run` does the work in steps of a few milliseconds and may be left at any of them; `plan` is the best so far.
    """

    def __init__(self, problem: Problem, *, seed: int, compiled: bool = True) -> None:
        if not 0 <= seed < _SEEDS:
            raise PlacementRefused(f"the seed {seed}", why="it must be a whole number from 0 to 2^63 - 1")
        self.problem, self.exact = problem, False
        self._search = Search(problem, seed=seed, compiled=compiled)
        self._table = self._search.best

    def run(
        self, *, moves: int = 0, seconds: float = 0.0, clock: Callable[[], float] | None = None
    ) -> Iterator[Progress]:
        """Search with a budget of `moves`, or of `seconds` by `clock`; few devices are placed exactly, whatever the
        budget.

        The same number of moves gives the same plan; seconds only decide how many are made. Raises PlacementRefused.
        """
        if (moves > 0) == (seconds > 0) or not 0 <= seconds < np.inf or (seconds > 0 and clock is None):
            raise PlacementRefused(
                f"a budget of {moves} moves and {seconds} seconds", why="it must be one of them, above zero"
            )
        if partitions(self.problem) <= PARTITIONS_MAX:
            self._table, self.exact = best_plan(self.problem), True
            yield Progress(cost_of(self.problem, self._table).total_s, 0, 1.0)
        elif not self._search.can_move():
            self.exact = True
            yield Progress(self._search.best_s, 0, 1.0)
        elif clock is None or moves:
            yield from self._run_moves(moves)
        else:
            yield from self._run_seconds(seconds, clock)

    def plan(self) -> Plan:
        """The best so far, its columns made pipelines, priced by the model itself."""
        search = self._search
        table = _piped(self.problem, self._table) if self.exact else search.state.best_pipelines()
        cost = cost_of(self.problem, table)
        if cost.total_s > search.greedy_s:  # by less than the search's units
            table, cost = search.greedy, cost_of(self.problem, search.greedy)
        assignment = tuple(tuple(int(device) for device in row) for row in self.problem.ids[table])
        return Plan(assignment, cost, search.greedy_s, self.exact, search.moves)

    def _run_moves(self, moves: int) -> Iterator[Progress]:
        search = self._search
        for turn, portion in enumerate(ROUND_SHARES):
            search.begin_round(turn)
            first, last = search.moves, int(moves * sum(ROUND_SHARES[: turn + 1]) + 0.5)
            for step in range(_STEPS):
                count = (last - first) * (step + 1) // _STEPS - (last - first) * step // _STEPS
                search.anneal(count, share=step / (_STEPS - 1), expected=moves * portion)
                yield Progress(search.best_s, search.moves, min(1.0, search.moves / moves))
            search.straighten()

    def _run_seconds(self, seconds: float, clock: Callable[[], float]) -> Iterator[Progress]:
        """Time decides how warm it is, so a machine that slows down on the way still ends cold."""
        search, start, count = self._search, clock(), _MOVES_FIRST
        seconds *= 1 - _FINISH_SHARE
        now, spent = start, 0.0  # spent: seconds of moves, to know their speed
        for turn, portion in enumerate(ROUND_SHARES):
            search.begin_round(turn)
            began, end = now, start + seconds * sum(ROUND_SHARES[: turn + 1])
            while (now := clock()) < end:
                speed = search.moves / spent if spent > 0 else count / seconds
                if search.moves:
                    count = max(1, min(_GROWTH * count, int(speed * seconds * portion / _STEPS)))
                search.anneal(count, share=(now - began) / (end - began), expected=speed * seconds * portion)
                spent += max(clock() - now, 1e-9)
                yield Progress(search.best_s, search.moves, min(1.0, (now - start) / seconds))
            search.straighten()


def random_mean(problem: Problem, rng: Random) -> float:
    """Seconds an iteration of a plan drawn at random, on average: pipelines and stages as they come. `rng` decides."""
    every = list(range(len(problem)))
    total = 0.0
    for _ in range(_SAMPLES):
        drawn = np.array(rng.sample(every, problem.placed)).reshape(problem.stages, problem.replicas)
        total += straight_cost(problem, drawn)
    return total / _SAMPLES


def _piped(problem: Problem, table: Table) -> Table:
    """The same plan with its columns along the bottleneck matchings of neighbouring stages."""
    piped = table.copy()
    for stage in range(1, problem.stages):
        _, match = bottleneck(problem.hop[np.ix_(piped[stage - 1], piped[stage])])
        piped[stage] = piped[stage][match]
    return piped
