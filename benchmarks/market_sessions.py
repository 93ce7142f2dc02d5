"""Allocative efficiency of the market against the hindsight optimum, at a thousand peers with late news.

Run `python benchmarks/market.py [--peers N] [--seed N] [--quick] [--json]`. Four settings: as much work as machines
(balanced), a third of it (glut), three times as much (shortage), and balanced among strangers (cold: no prints, no
histories; the others begin with what a shorter session before left). Each with limits and floors that are true, and
with ones marked up. The market's own rules and the two baselines (benchmarks/market_rules.py) live through the same
world (benchmarks/market_world.py), whose `optimum` says what the bound is. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.market_rules import ContinuousBestPrice, Market, OldestFeasible
from benchmarks.market_world import Setting, World, optimum
from benchmarks.matcher import scores
from market.assignment import assign

__all__ = ["SHARES", "main", "measure", "setting_of"]

MARKUP = (0.2, 0.3)  # limits up to so far below what work is worth, floors up to so far above what it costs
SHARES = {"balanced": (0.5, 0.5), "glut": (0.25, 0.75), "shortage": (0.75, 0.25), "cold": (0.5, 0.5)}
QUICK_PEERS = 120


def setting_of(name: str, peers: int, *, truthful: bool = True) -> Setting:
    """A setting of so many peers."""
    submitters, solvers = (round(share * peers) for share in SHARES[name])
    return Setting(name, submitters, solvers, name == "cold", (0.0, 0.0) if truthful else MARKUP)


@dataclass(frozen=True)
class Outcome:
    """What a mechanism made of one session. Times in seconds; dispersion: the distance between the quartiles of prices
    over their median; newcomers: share of the deals with solvers that nobody knew, over their share of all solvers."""

    efficiency: float
    deals: int
    p50_s: float
    p95_s: float
    dispersion: float
    newcomers: float
    declines: float  # a deal
    double_books: int


def outcome_of(world: World, best: float) -> Outcome:
    """Measured once the session is over."""
    done = [job for job in world.jobs if job.solver >= 0]
    waits, prices = [job.agreed - job.arrives for job in done], [job.price for job in done]
    low, middle, high = np.quantile(prices, [0.25, 0.5, 0.75])
    strange = np.mean([world.newcomer[job.solver] for job in done]) / max(1e-9, float(world.newcomer.mean()))
    return Outcome(
        efficiency=round(world.surplus() / best, 4),
        deals=len(done),
        p50_s=round(float(np.quantile(waits, 0.5)), 2),
        p95_s=round(float(np.quantile(waits, 0.95)), 2),
        dispersion=round(float((high - low) / middle), 3),
        newcomers=round(float(strange), 2),
        declines=round(world.declines / len(done), 2),
        double_books=world.double_books,
    )


def market_of(setting: Setting, seed: int) -> World:
    """A session of the market's own rules, after another one unless it is cold."""
    world = World(setting, seed)
    if setting.cold:
        Market(world)
    else:
        before = World(setting, seed, session=0)
        earlier = Market(before)
        before.run()
        world.right = before.right
        Market(world, prices=earlier.prices)
    world.run()
    return world


def measure(name: str, peers: int, seed: int, truthful: bool) -> dict[str, Outcome]:
    """One setting under all three mechanisms."""
    setting = setting_of(name, peers, truthful=truthful)
    best = optimum(World(setting, seed))
    found = {"market": outcome_of(market_of(setting, seed), best)}
    for key, rule in (("oldest_feasible", OldestFeasible), ("continuous", ContinuousBestPrice)):
        world = World(setting, seed)
        rule(world)
        world.run()
        found[key] = outcome_of(world, best)
    return found


def round_ms(offers: int = 1000) -> float:
    """Milliseconds of one assignment of as many offers as solvers (benchmarks/matcher.py)."""
    taken = []
    for seed in range(3):
        costs = scores(seed, offers, offers)
        start = time.perf_counter()
        assign(costs, costs.max(axis=1) * 2)
        taken.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(taken), 1)


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PEERS} peers")
    parser.add_argument("--json", action="store_true", help="the last line only")
    given = parser.parse_args()
    peers = QUICK_PEERS if given.quick else given.peers
    cases = [(name, truthful) for truthful in (True, False) for name in SHARES]
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with ProcessPoolExecutor(min(len(cases), os.cpu_count() or 1)) as pool:
        running = {case: pool.submit(measure, case[0], peers, given.seed, case[1]) for case in cases}
        for case, future in running.items():
            future.add_done_callback(lambda done, case=case: progress(case, done))
        found = {case: future.result() for case, future in running.items()}
    if not given.json:
        table(found)
    print(json.dumps(summary(found, peers, given.seed)))


def progress(case: tuple[str, bool], done: Future[dict[str, Outcome]]) -> None:
    """One line for each case as it ends: a whole run takes minutes."""
    said = {rule: one.efficiency for rule, one in done.result().items()}
    print(f"{case[0]}, {'true' if case[1] else 'marked up'} prices: {said}", file=sys.stderr, flush=True)


def table(found: dict[tuple[str, bool], dict[str, Outcome]]) -> None:
    """For people."""
    head = ("efficiency", "deals", "p50 s", "p95 s", "dispersion", "newcomers", "declines", "double")
    print(f"{'setting':<10}{'prices':<10}{'rules':<17}" + "".join(f"{word:>11}" for word in head))
    for (name, truthful), by_rule in found.items():
        for rule, one in by_rule.items():
            words = (
                one.efficiency, one.deals, one.p50_s, one.p95_s, one.dispersion, one.newcomers, one.declines,
                one.double_books,
            )  # fmt: skip
            print(f"{name:<10}{'true' if truthful else 'marked up':<10}{rule:<17}" + "".join(f"{w:>11}" for w in words))


def summary(found: dict[tuple[str, bool], dict[str, Outcome]], peers: int, seed: int) -> dict[str, Any]:
    """The JSON line. Times to match, dispersion and newcomers are those of the balanced market with true prices."""

    def of(rule: str, truthful: bool) -> dict[str, float]:
        return {name: found[name, truthful][rule].efficiency for name in SHARES}

    usual = found["balanced", True]["market"]
    return {
        "peers": peers,
        "seed": seed,
        "efficiency": of("market", True),
        "oldest_feasible": of("oldest_feasible", True),
        "continuous": of("continuous", True),
        "marked_up": {rule: of(rule, False) for rule in ("market", "oldest_feasible", "continuous")},
        "match_p50_s": usual.p50_s,
        "match_p95_s": usual.p95_s,
        "price_dispersion": usual.dispersion,
        "newcomer_share": usual.newcomers,
        "declines_per_deal": usual.declines,
        "double_books": sum(by_rule["market"].double_books for by_rule in found.values()),
        "round_1000x1000_ms": round_ms(),
    }
