"""The market's rules against the baselines and the bound in a small simulated market; benchmarks/market.py has more."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.market_rules import Market
from benchmarks.market_sessions import SHARES, measure, setting_of
from benchmarks.market_world import World, optimum
from market.pricing import Terms, goes_without

PEERS, SEED = 60, 3


@pytest.mark.parametrize("name", sorted(SHARES))
def test_the_market_is_nearer_to_the_optimum_than_the_baselines_and_books_nothing_twice(name: str) -> None:
    found = measure(name, PEERS, SEED, truthful=True)
    efficiency = {rule: one.efficiency for rule, one in found.items()}
    assert max(efficiency.values()) <= 1, "the bound is one"
    assert efficiency["market"] > efficiency["oldest_feasible"]
    if name != "glut":  # where every solver is idle, to take the cheapest at once is as good as anything
        assert efficiency["market"] > efficiency["continuous"]
    assert found["market"].double_books == 0
    assert 0 < found["market"].p50_s <= found["market"].p95_s


def test_one_seed_makes_one_market() -> None:
    first, second = (measure("shortage", 30, SEED, truthful=False) for _ in range(2))
    assert first == second


def test_the_simulated_solvers_see_what_goes_without_by_the_rule_of_the_peers() -> None:
    world = World(setting_of("balanced", PEERS), SEED)
    market, seen = Market(world), 0

    def compare() -> None:
        nonlocal seen
        world.at(20.0, compare)
        for solver in range(world.setting.solvers):
            limits, needs = market.wanted(solver)
            free = np.flatnonzero(market.seen_free(solver))
            asks = sorted((Terms(int(market.told[s]), int(world.memory[s])) for s in free), key=lambda a: a.unit_price)
            wanted = [Terms(int(limit), int(need)) for limit, need in zip(limits, needs, strict=True)]
            left, _ = market.left(solver)
            assert left == goes_without(wanted, asks, memory_bytes=int(world.memory[solver]))
            seen += left > 0

    world.at(60.0, compare)
    world.run()
    assert seen > 50, "otherwise nothing was compared"


def test_the_optimum_of_a_market_without_conflicts_is_the_sum_of_its_surpluses() -> None:
    world = World(setting_of("glut", 8), SEED)
    (job, *others) = world.jobs
    world.jobs = [job]
    job.arrives, job.units, job.value, job.memory_bytes = 0.0, 1, 5000, int(world.memory.min())
    assert optimum(world) == pytest.approx(5000 - world.cost.min())
    job.arrives, job.units = 599.0, 9
    assert optimum(world) < 9 * (5000 - world.cost.min()), "what the end of the session cuts off does not count"
    assert others
