"""The best placement of few devices, by looking at every one: all balanced partitions, the best path through each.

Groups are sets of devices, so each of them and each pair of them is priced once; partitions are then rows of numbers,
looked at from the smallest lower bound up until none left can be better. numpy alone, the same on every machine.
Refuses to know problems with more than PARTITIONS_MAX partitions: those are searched (market/placement_search.py).
"""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Final

import numpy as np
import numpy.typing as npt

from market.placement_cost import Floats, Problem, Table

__all__ = ["PARTITIONS_MAX", "STAGES_EXACT_MAX", "best_path", "best_plan", "partitions"]

PARTITIONS_MAX: Final = 16_000  # N = 12 has at most 15,400: about 50 ms
STAGES_EXACT_MAX: Final = 12  # a table of 2^K x K numbers: 0.4 MB
_AT_ONCE: Final = 512  # partitions whose paths are found together: they fit a cache
_SETS_MAX: Final = 1_000  # possible groups: every pair of them is priced

Index = npt.NDArray[np.int64]


def partitions(problem: Problem) -> int:
    """How many ways there are to cut the devices into groups; more than PARTITIONS_MAX where it is out of reach."""
    if len(problem) != problem.placed or max(problem.stages, problem.replicas) > STAGES_EXACT_MAX:
        return PARTITIONS_MAX + 1
    if comb(len(problem), problem.replicas) > _SETS_MAX:
        return PARTITIONS_MAX + 1
    count = 1
    for left in range(problem.stages, 0, -1):
        count *= comb(left * problem.replicas - 1, problem.replicas - 1)
    return count


def best_plan(problem: Problem) -> Table:
    """A plan of least cost, (stages, replicas), its columns not yet pipelines. The problem has at most PARTITIONS_MAX
    partitions. Ties go to the first found."""
    assert partitions(problem) <= PARTITIONS_MAX, "ask partitions first"
    sets = np.array(list(combinations(range(len(problem)), problem.replicas)), np.int64)
    sync = problem.sync[sets[:, :, None], sets[:, None, :]].sum(axis=2).max(axis=1)
    work = problem.work[sets].max(axis=1)
    cuts = _cuts(sets, len(problem), problem.stages)
    pairs = _pair_costs(problem, sets)
    still = sync[cuts].max(axis=1) + work[cuts].sum(axis=1)
    between = pairs[cuts[:, :, None], cuts[:, None, :]]  # infinite on the diagonal
    nearest = between.min(axis=2) if problem.stages > 1 else np.zeros((len(cuts), 1))
    # All stages of a path but its last pay for a boundary of their own.
    floor = still + nearest.sum(axis=1) - nearest.max(axis=1)
    best = np.inf
    plan: Table = sets[cuts[0]]
    order = np.argsort(floor, kind="stable")
    for start in range(0, len(order), _AT_ONCE):
        some = order[start : start + _AT_ONCE]
        some = some[floor[some] < best]
        if not len(some):
            break
        lengths = still[some] + _path_lengths(between[some])
        at = int(lengths.argmin())
        if lengths[at] < best:
            best = lengths[at]
            plan = sets[cuts[some[at]][best_path(between[some[at]])]]
    return plan


def best_path(costs: Floats) -> list[int]:
    """The shortest path through all K nodes with free ends, by Held and Karp (1962). costs: (K, K), K <= 12."""
    count = len(costs)
    assert count <= STAGES_EXACT_MAX, "2^K x K numbers"
    table = _held_karp(costs[:, :, None])[:, :, 0]
    mask, last = (1 << count) - 1, int(table[-1].argmin())
    path = [last]
    while len(path) < count:
        mask ^= 1 << last
        last = int((table[mask] + costs[:, last]).argmin())
        path.append(last)
    return path


def _cuts(sets: Index, devices: int, stages: int) -> Index:
    """Every partition as the sorted places of its groups in `sets`, (P, stages): the lowest free device leads each
    group."""
    bits = (1 << sets).sum(axis=1)
    lowest = sets[:, 0]
    found = np.zeros((1, 0), np.int64)
    taken = np.zeros(1, np.int64)
    for _ in range(stages):
        # The lowest bit that is not set, as the place of a device.
        lead = np.log2(~taken & (taken + 1)).astype(np.int64)
        grown, bases = [], []
        for device in range(devices):
            rows = np.flatnonzero(lead == device)
            groups = np.flatnonzero(lowest == device)
            if not len(rows) or not len(groups):
                continue
            apart = (taken[rows][:, None] & bits[groups][None]) == 0
            which, group = np.nonzero(apart)
            grown.append(np.column_stack([found[rows[which]], groups[group]]))
            bases.append(taken[rows[which]] | bits[groups[group]])
        found, taken = np.concatenate(grown), np.concatenate(bases)
    return found


def _pair_costs(problem: Problem, sets: Index) -> Floats:
    """The bottleneck of every two disjoint groups, (S, S), infinite elsewhere.

    Row by row: least[m] is the bottleneck of the first |m| devices of one group with the columns in m.
    """
    bits = (1 << sets).sum(axis=1)
    first, second = np.nonzero(np.triu((bits[:, None] & bits[None]) == 0))
    costs = np.full((len(sets), len(sets)), np.inf)
    size = problem.replicas
    edges = problem.hop[sets[first][:, :, None], sets[second][:, None, :]].transpose(1, 2, 0)
    least = np.full((1 << size, len(first)), np.inf)
    least[0] = 0
    for mask in range(1, 1 << size):
        row = mask.bit_count() - 1
        for column in range(size):
            if mask >> column & 1:
                np.minimum(least[mask], np.maximum(least[mask ^ 1 << column], edges[row, column]), out=least[mask])
    costs[first, second] = costs[second, first] = least[-1]
    return costs


def _path_lengths(costs: Floats) -> Floats:
    """The length of the shortest path through all nodes of each of P matrices: (P, K, K) to (P,)."""
    lengths: Floats = _held_karp(np.ascontiguousarray(costs.transpose(1, 2, 0)))[-1].min(axis=0)
    return lengths


def _held_karp(costs: Floats) -> Floats:
    """table[m, v, p]: the shortest path through the nodes in m that ends in v. (K, K, P) to (2^K, K, P).

    P is innermost, so that numpy works along it.
    """
    count, _, problems = costs.shape
    table = np.full((1 << count, count, problems), np.inf)
    masks = np.arange(1 << count)
    sizes = np.array([mask.bit_count() for mask in range(1 << count)])
    for node in range(count):
        table[1 << node, node] = 0
    for size in range(1, count):
        for node in range(count):
            before = masks[(sizes == size) & (masks >> node & 1 == 0)]
            table[before | 1 << node, node] = (table[before] + costs[:, node]).min(axis=1)
    return table
