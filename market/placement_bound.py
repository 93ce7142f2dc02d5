"""What no placement can beat: a lower bound on the cost of every plan, proved here. Refuses to know how one is found.

K stages of R replicas, N >= K R devices; d is `sync`, w is `hop`, near(i) the smallest w of device i, and s[n] the n-th
smallest near. For any plan:

1. *Groups.* Device i, if used, pays at least c(i), the sum of its R-1 cheapest d. At most N - K R devices are left out,
   so the largest group costs at least the K R-th smallest c.
2. *Pipelines.* The matchings of neighbouring stages cut the used devices into R disjoint paths of K devices. A boundary
   costs at least the edge of each of those paths that crosses it, so the pipeline costs at least as much as each path,
   hence as their mean: 1/R of the weight of a forest of K R - R edges, and no such forest is lighter than Kruskal's.
3. *Stages.* Read the path of stages in the direction in which the stage of the used device with the largest near is not
   the last. A stage that is not the last pays at least the largest near of its devices: s[K R] or more for that one,
   and for the K-2 others together at least s[R] + s[2R] + ... + s[(K-2) R], as groups of R cannot share out the
   smallest devices better than in sorted order.
4. *Both at once* (no spare devices). i and j can share a group that costs D only if D >= v(i, j) = d(i, j) + the larger
   of the sums of the R-2 cheapest d of i and of j. So if the largest group costs less than D, each group lies in one
   component of the graph of pairs with v < D; a component whose size is no multiple of R is impossible. With c
   components the path of stages holds c-1 boundaries that span them; hang that tree on the component with the smallest
   out: every other component A pays for the boundary to its parent at least out(A), the R-th smallest over its devices
   of the smallest w that leaves A. The K - c other boundaries pay at least s[R] each. The cost of the largest group
   lies between two of any list of thresholds D: the total is at least the smallest, over those ranges, of the lower
   end plus what the pipeline then costs.

The slowest devices of the stages take at least work[R] + work[2R] + ... of the sorted work, tolls at least the K R
smallest.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from market.placement_cost import Floats, Problem

__all__ = ["lower_bound", "spanning_tree"]

_THRESHOLDS: Final = 32  # ranges looked at: each costs one pass over all pairs
_ROUNDING: Final = 1 - 1e-12  # the sums here round otherwise than those of a plan; the bound must stay below


def lower_bound(problem: Problem) -> float:
    """Seconds an iteration that every plan costs at least. float64; O(N^2) memory and time, times a small constant."""
    used, size = problem.placed, problem.replicas
    work = np.sort(problem.work)[size - 1 : used : size].sum()
    toll = np.sort(problem.toll)[:used].sum()
    if len(problem) == 1:
        return float(work + toll) * _ROUNDING
    groups = float(np.sort(_cheapest(problem.sync, size - 1))[used - 1])
    pipeline = max(_by_pipelines(problem), _by_stages(problem)) if problem.stages > 1 else 0.0
    both = groups + pipeline
    if used == len(problem) and size > 1 and problem.stages > 1:
        both = _by_thresholds(problem, groups, pipeline)
    return float(both + work + toll) * _ROUNDING


def spanning_tree(costs: Floats) -> tuple[npt.NDArray[np.int64], Floats]:
    """A minimum spanning tree by Prim's algorithm: (N-1, 2) ends and (N-1,) weights, in the order of growth."""
    count = len(costs)
    reach, parent, left = costs[0].copy(), np.zeros(count, np.int64), np.ones(count, bool)
    left[0] = False
    ends, weights = np.zeros((count - 1, 2), np.int64), np.zeros(count - 1)
    for step in range(count - 1):
        at = int(np.where(left, reach, np.inf).argmin())
        ends[step], weights[step], left[at] = (parent[at], at), reach[at], False
        nearer = left & (costs[at] < reach)
        reach[nearer], parent[nearer] = costs[at][nearer], at
    return ends, weights


def _others(costs: Floats) -> Floats:
    """The costs of pairs, a device with itself never."""
    kept = costs.copy()
    np.fill_diagonal(kept, np.inf)
    return kept


def _cheapest(costs: Floats, count: int) -> Floats:
    """The sum of the `count` cheapest pairs of each device, (N,)."""
    if count <= 0:
        return np.zeros(len(costs))
    summed: Floats = np.partition(_others(costs), count - 1, axis=1)[:, :count].sum(axis=1)
    return summed


def _by_pipelines(problem: Problem) -> float:
    _, weights = spanning_tree(problem.hop)
    edges = problem.placed - problem.replicas
    return float(np.sort(weights)[:edges].sum()) / problem.replicas


def _by_stages(problem: Problem) -> float:
    near, size = np.sort(_others(problem.hop).min(axis=1)), problem.replicas
    rest = near[size - 1 : (problem.stages - 2) * size : size]
    return float(rest.sum() + near[problem.placed - 1])


def _by_thresholds(problem: Problem, groups: float, pipeline: float) -> float:
    """Item 4, over the merges of components as thresholds."""
    rest = _cheapest(problem.sync, problem.replicas - 2)
    together = problem.sync + np.maximum(rest[:, None], rest[None])
    ends, weights = spanning_tree(together)
    thresholds = np.unique(weights)
    if len(thresholds) > _THRESHOLDS:
        thresholds = thresholds[np.linspace(0, len(thresholds) - 1, _THRESHOLDS).astype(int)]
    hop, lower, least = _others(problem.hop), 0.0, np.inf
    for upper in thresholds:
        crossings = _crossings(problem, hop, _components(ends[weights < upper], len(problem)))
        least = min(least, max(lower, groups) + max(pipeline, crossings))
        lower = float(upper)
    return float(min(least, max(lower, groups) + pipeline))


def _components(ends: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """The component of each device, (N,), in a forest of these edges."""
    parent = list(range(count))

    def root(device: int) -> int:
        while parent[device] != device:
            parent[device] = parent[parent[device]]
            device = parent[device]
        return device

    for a, b in ends.tolist():
        parent[root(a)] = root(b)
    return np.unique([root(device) for device in range(count)], return_inverse=True)[1]


def _crossings(problem: Problem, hop: Floats, component: npt.NDArray[np.int64]) -> float:
    """What the pipeline costs at least if each group lies in one component; infinite where none can."""
    sizes = np.bincount(component)
    if (sizes % problem.replicas).any():
        return float(np.inf)
    if len(sizes) == 1:
        return 0.0
    leaves = np.where(component[:, None] != component[None], hop, np.inf).min(axis=1)
    kth = problem.replicas - 1
    out = np.array([np.partition(leaves[component == one], kth)[kth] for one in range(len(sizes))])
    cheapest = np.partition(hop.min(axis=1), kth)[kth]
    return float(out.sum() - out.min() + (problem.stages - len(sizes)) * cheapest)
