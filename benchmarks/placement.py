"""Placement: the optimum where it can be brute-forced, the reference links, a thousand devices, and links never seen.

Run `python benchmarks/placement.py [--data DIR] [--quick] [--json]`. DIR holds matrices.json and jit64.npz; without it
the benchmark looks beside the checkout and says what it skips. Seconds are of the search; `cpu_s` says how many the
machine gave. The last line is JSON. --quick leaves out the thousand devices and the links never seen.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import combinations, permutations
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from market.placement import Links, Planner, Problem, lower_bound, model, random_mean

BESIDE = Path(__file__).resolve().parent.parent.parent
INSTANCES = 100
SHAPES = ((4, 2), (2, 4), (3, 3), (5, 2), (2, 5), (6, 2), (4, 3), (3, 4), (2, 6), (8, 1))
THOUSAND = 1000


def brute_force(problem: Problem) -> float:
    """The least cost by looking at every partition, path and matching, with nothing of the planner's."""
    groups = list(combinations(range(len(problem)), problem.replicas))
    sync = {group: max(sum(problem.sync[i, j] for j in group) for i in group) for group in groups}
    hops: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    for a, b in combinations(groups, 2):
        if not set(a) & set(b):
            edges = problem.hop[np.ix_(a, b)].tolist()
            orders = permutations(range(problem.replicas))
            hops[a, b] = hops[b, a] = min(max(edges[i][j] for i, j in enumerate(order)) for order in orders)
    best, least = [float("inf")], min(hops.values(), default=0.0)

    def grow(path: list[tuple[int, ...]], left: frozenset[int], worst: float, length: float) -> None:
        """Every path of groups, stage by stage; a branch ends when it must cost as much as the best."""
        if worst + length + least * (problem.stages - max(1, len(path))) >= best[0]:
            return
        if not left:
            best[0] = worst + length
            return
        nexts = combinations(sorted(left), problem.replicas)
        ways = [(hops[path[-1], group] if path else 0.0, group) for group in nexts]
        for step, group in sorted(ways):
            grow([*path, group], left - set(group), max(worst, sync[group]), length + step)

    grow([], frozenset(range(len(problem))), 0.0, 0.0)
    return best[0]


def unseen(kind: str, count: int, seed: int) -> Links:
    """Links of other shapes than the reference ones."""
    rng = np.random.default_rng(seed)
    jitter = np.exp(rng.normal(0, 0.25, (count, count)))
    delay, gbps = rng.uniform(1, 300, (count, count)), rng.uniform(0.1, 3, (count, count))
    if kind == "clustered":
        place = rng.uniform(0, 1, (count // 5 + 1, 2))[rng.integers(0, count // 5 + 1, count)]
        far = np.hypot(*(place[:, None] - place[None]).transpose(2, 0, 1))
        delay, gbps = (3 + 200 * far) * jitter, 2 / (1 + 8 * far) / jitter
    if kind == "star":
        up = rng.lognormal(0, 0.8, count)
        delay, gbps = (np.add.outer(1 / up, 1 / up) * 20) * jitter, np.minimum.outer(up, up) / jitter
    if kind == "one bad":
        delay[0], delay[:, 0], gbps[0], gbps[:, 0] = 2000, 2000, 0.01, 0.01
    if kind != "directed":
        delay, gbps = np.sqrt(delay * delay.T), np.sqrt(gbps * gbps.T)
    return Links(delay, gbps)


def searched(problem: Problem, seconds: float, *, seed: int = 1) -> dict[str, Any]:
    """One search, from the problem to the plan."""
    start, cpu = time.perf_counter(), time.process_time()
    planner = Planner(problem, seed=seed)
    left = max(0.01, seconds - (time.perf_counter() - start))
    for _ in planner.run(seconds=left, clock=time.perf_counter):
        pass
    plan = planner.plan()
    took = time.perf_counter() - start
    return {
        "cost": round(plan.cost.total_s, 4), "greedy": round(plan.greedy_s, 3), "seconds": round(took, 2),
        "cpu_s": round(time.process_time() - cpu, 2), "moves": plan.moves,
        "random_mean": round(random_mean(problem, Random(0)), 2), "lower_bound": round(lower_bound(problem), 2),
    }  # fmt: skip


def small() -> dict[str, Any]:
    """Brute-forced instances of 8 to 12 devices."""
    kinds = ("uniform", "clustered", "star", "one bad", "directed")
    right, gap, slowest, cpu = 0, 0.0, 0.0, 0.0
    for number in range(INSTANCES):
        stages, replicas = SHAPES[number % len(SHAPES)]
        links = unseen(kinds[number // len(SHAPES) % len(kinds)], stages * replicas, number)
        problem = model(links, stages=stages, replicas=replicas)
        start, begun = time.perf_counter(), time.process_time()
        planner = Planner(problem, seed=number)
        for _ in planner.run(seconds=0.1, clock=time.perf_counter):
            pass
        cost = planner.plan().cost.total_s
        slowest, cpu = max(slowest, time.perf_counter() - start), max(cpu, time.process_time() - begun)
        excess = float(cost / brute_force(problem) - 1)
        right, gap = right + int(excess < 1e-9), max(gap, excess)
    return {
        "instances": INSTANCES, "optimum": right, "worst_gap": round(gap, 6), "slowest_s": round(slowest, 3),
        "slowest_cpu_s": round(cpu, 3),
    }  # fmt: skip


def reference(folder: Path, skipped: list[str]) -> dict[str, Problem]:
    """The reference links that are there."""
    found = {}
    if (folder / "matrices.json").exists():
        case = json.loads((folder / "matrices.json").read_text())["matrices"]["case5_worldwide"]
        links = Links(np.array(case["delay_ms"], float), np.array(case["bandwidth_gbps"], float))
        found["case5_worldwide"] = model(links, stages=8, replicas=8)
    else:
        skipped.append("case5_worldwide and a thousand devices: no matrices.json")
    if (folder / "jit64.npz").exists():
        with np.load(folder / "jit64.npz", allow_pickle=False) as arrays:
            found["jit64"] = model(Links(arrays["d"], arrays["b"]), stages=8, replicas=8)
    else:
        skipped.append("jit64: no jit64.npz")
    return found


def thousand(folder: Path, stages: int) -> Problem:
    """A thousand devices in ten cities, as NOTES describes them."""
    pairs = json.loads((folder / "matrices.json").read_text())["region_pair_delay_ms_bandwidth_gbps"]
    names = list(dict.fromkeys(city for pair in pairs for city in pair.split("-")))
    delay, gbps = np.full((len(names),) * 2, 5.0), np.full((len(names),) * 2, 2.0)
    for pair, (delay_ms, bandwidth) in pairs.items():
        a, b = (names.index(city) for city in pair.split("-"))
        delay[a, b] = delay[b, a] = delay_ms
        gbps[a, b] = gbps[b, a] = bandwidth
    rng = np.random.default_rng(5)
    city = rng.integers(0, len(names), THOUSAND)
    jitter = np.exp(rng.normal(0, 0.25, (THOUSAND, THOUSAND)))
    jitter = np.sqrt(jitter * jitter.T)
    between = np.ix_(city, city)
    return model(Links(delay[between] * jitter, gbps[between] / jitter), stages=stages, replicas=THOUSAND // stages)


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the folder of matrices.json and jit64.npz")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="the last line only")
    given = parser.parse_args()
    folder = given.data or next(
        (up / "shared" / "data" for up in (BESIDE, BESIDE.parent) if (up / "shared" / "data").is_dir()), BESIDE
    )
    skipped: list[str] = []
    figures: dict[str, Any] = {"small": small()}
    for name, problem in reference(folder, skipped).items():
        figures[name] = searched(problem, 1.0 if name == "case5_worldwide" else 5.0)
    if not given.quick:
        if (folder / "matrices.json").exists():
            for stages in (40, 8):
                figures[f"thousand_{stages}_stages"] = searched(thousand(folder, stages), 15.0)
        for kind in ("uniform", "clustered", "star", "one bad", "directed"):
            figures[f"unseen_{kind.replace(' ', '_')}"] = searched(
                model(unseen(kind, 60, 7), stages=10, replicas=6), 2.0
            )
    figures["skipped"] = skipped
    if not given.json:
        for name, values in figures.items():
            print(f"{name:22} {values}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
