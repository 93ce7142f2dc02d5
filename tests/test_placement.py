"""Placement: the paper's cost, the exact answer, a search whose every step prices what a fresh look would, a bound."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import combinations, pairwise, permutations
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from market.placement import (
    Coding,
    Devices,
    Links,
    PlacementRefused,
    Planner,
    Problem,
    Traffic,
    cost_of,
    lower_bound,
    model,
    random_mean,
)
from market.placement_cost import bottleneck, chosen_bits
from market.placement_exact import PARTITIONS_MAX, best_path, best_plan, partitions
from market.placement_search import Search, greedy_groups, greedy_pipelines
from market.placement_state import State, library
from protocol.params import PLACEMENT_DEVICES_MAX

SHARES = (100, 600, 700)
KINDS = ("uniform", "clustered", "star", "bad", "equal", "directed")
SHAPES = [(4, 2, 8), (3, 3, 9), (2, 5, 10), (5, 2, 10), (3, 4, 12), (4, 3, 13), (6, 1, 6), (1, 4, 6), (2, 7, 16)]
Array = npt.NDArray[np.float64]


def drawn_links(kind: str, count: int, seed: int) -> Links:
    """Links of a shape that placement must cope with."""
    rng = np.random.default_rng(seed)
    delay, gbps = rng.uniform(1, 300, (count, count)), rng.uniform(0.05, 3, (count, count))
    if kind == "clustered":
        city = rng.integers(0, max(2, count // 4), count)
        near = city[:, None] == city[None]
        delay, gbps = np.where(near, 5, 150) * rng.uniform(0.8, 1.2, delay.shape), np.where(near, 2, 0.3) + gbps / 10
    if kind == "star":
        to_hub = np.arange(1.0, count + 1)
        delay, gbps = to_hub[:, None] + to_hub[None], np.minimum(2 / to_hub[:, None], 2 / to_hub[None])
    if kind == "bad":
        delay[0], delay[:, 0], gbps[0], gbps[:, 0] = 5000, 5000, 1e-3, 1e-3
    if kind == "equal":
        delay[:], gbps[:] = 10, 1
    if kind != "directed":
        delay, gbps = (delay + delay.T) / 2, (gbps + gbps.T) / 2
    return Links(delay, gbps)


def drawn_problem(kind: str, stages: int, replicas: int, count: int, seed: int) -> Problem:
    """A problem of that kind, with the extensions on where the seed is odd."""
    rng = np.random.default_rng(seed)
    devices = Devices()
    if seed % 2:
        devices = Devices(
            work_s=rng.uniform(0, 3, count).tolist(), failure=rng.uniform(0, 1, count).tolist(), recovery_s=2,
            price_credits=rng.uniform(0, 5, count).tolist(), seconds_per_credit=0.3,
        )  # fmt: skip
    return model(drawn_links(kind, count, seed), stages=stages, replicas=replicas, devices=devices, spare=True)


def brute_force(problem: Problem) -> float:
    """The least cost, found by nothing that market/placement*.py has: every partition, path and matching."""

    def between(a: tuple[int, ...], b: tuple[int, ...]) -> float:
        return min(max(problem.hop[i, j] for i, j in zip(a, order, strict=True)) for order in permutations(b))

    def cuts(left: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
        if not left:
            yield []
            return
        for rest in combinations(left[1:], problem.replicas - 1):
            group = (left[0], *rest)
            for others in cuts(tuple(device for device in left if device not in group)):
                yield [group, *others]

    priced: dict[frozenset[tuple[int, ...]], float] = {}
    best = np.inf
    for groups in cuts(tuple(range(len(problem)))):
        still = max(sum(problem.sync[i, j] for j in group) for group in groups for i in group)
        still += sum(max(problem.work[i] for i in group) for group in groups) + problem.toll.sum()
        for a, b in combinations(groups, 2):
            if frozenset((a, b)) not in priced:
                priced[frozenset((a, b))] = between(a, b)
        for path in permutations(groups):
            if path[0] <= path[-1]:
                best = min(best, still + sum(priced[frozenset(pair)] for pair in pairwise(path)))
    return float(best)


# --- the cost ------------------------------------------------------------------------------------------------
def test_the_cost_is_the_papers_by_hand() -> None:
    delay = np.array([[0, 10, 20, 30], [10, 0, 40, 50], [20, 40, 0, 60], [30, 50, 60, 0.0]])
    gbps = np.array([[9, 1, 2, 4], [1, 9, 5, 8], [2, 5, 9, 10], [4, 8, 10, 9.0]])
    problem = model(Links(delay, gbps), stages=2, replicas=2, traffic=Traffic(gradient_gb=1, activation_gb=2))
    cost = cost_of(problem, np.array([[0, 1], [2, 3]]))
    assert cost.sync_s == pytest.approx(max(2 * (0.010 + 8 / (2 * 1)), 2 * (0.060 + 8 / (2 * 10))))
    straight = max(2 * (0.020 + 16 / 2), 2 * (0.050 + 16 / 8))
    crossed = max(2 * (0.030 + 16 / 4), 2 * (0.040 + 16 / 5))
    assert cost.pipeline_s == pytest.approx(min(straight, crossed))
    assert cost.total_s == cost.sync_s + cost.pipeline_s


def test_extensions_that_are_off_move_nothing() -> None:
    links = drawn_links("uniform", 12, 3)
    off = model(links, stages=4, replicas=3)
    on = model(
        links, stages=4, replicas=3, spare=True, traffic=Traffic(activation_codings=(Coding(32),)),
        devices=Devices(work_s=[0.0] * 12, memory_gb=[8.0] * 12, price_credits=[5.0] * 12, failure=[0.5] * 12),
    )  # fmt: skip
    table = np.arange(12).reshape(4, 3)
    assert cost_of(off, table) == cost_of(on, table)
    assert (off.sync == on.sync).all()
    assert (off.hop == on.hop).all()


def test_a_link_that_differs_by_direction_costs_both() -> None:
    delay, gbps = np.array([[0, 10], [30, 0.0]]), np.array([[1, 2], [4, 1.0]])
    problem = model(Links(delay, gbps), stages=2, replicas=1, traffic=Traffic(activation_gb=1))
    assert cost_of(problem, np.array([[0], [1]])).pipeline_s == pytest.approx(0.010 + 8 / 2 + 0.030 + 8 / 4)


def test_the_diagonal_is_not_read() -> None:
    delay, gbps = np.full((4, 4), 10.0), np.full((4, 4), 1.0)
    np.fill_diagonal(delay, np.nan)
    np.fill_diagonal(gbps, 0)
    assert cost_of(model(Links(delay, gbps), stages=2, replicas=2), np.arange(4).reshape(2, 2)).total_s > 0


def test_slow_dear_and_failing_devices_are_left_to_be_spare() -> None:
    devices = Devices(
        work_s=[1, 1, 50, 1, 1, 1, 1], failure=[0, 0, 0, 0.9, 0, 0, 0], recovery_s=100,
        price_credits=[0, 0, 0, 0, 900, 0, 0], seconds_per_credit=1,
        memory_gb=[8, 2, 8, 8, 8, 8, 8], memory_needed_gb=4,
    )  # fmt: skip
    problem = model(drawn_links("equal", 7, 0), stages=3, replicas=1, devices=devices, spare=True)
    planner = Planner(problem, seed=1)
    assert list(planner.run(moves=2000))
    assert sorted(device for stage in planner.plan().assignment for device in stage) == [0, 5, 6]


def test_slow_devices_share_a_stage() -> None:
    work = [9.0 if device % 2 else 1.0 for device in range(8)]
    problem = model(drawn_links("equal", 8, 0), stages=2, replicas=4, devices=Devices(work_s=work))
    planner = Planner(problem, seed=1)
    assert list(planner.run(moves=1))
    assert {tuple(sorted(stage)) for stage in planner.plan().assignment} == {(0, 2, 4, 6), (1, 3, 5, 7)}


def test_each_link_takes_the_coding_that_is_cheapest_on_it() -> None:
    delay, gbps = np.zeros((4, 4)), np.full((4, 4), 100.0)
    gbps[:2, 2:] = gbps[2:, :2] = 0.1
    codings = (Coding(32), Coding(4, penalty_s=0.5))
    traffic = Traffic(activation_gb=1, activation_codings=codings)
    bits = chosen_bits(Links(delay, gbps), traffic, replicas=2, kind="activation")
    assert bits[0, 1] == 32
    assert bits[0, 2] == 4
    hop = model(Links(delay, gbps), stages=2, replicas=2, traffic=traffic).hop
    assert hop[0, 1] == pytest.approx(2 * 8 / 100)
    assert hop[0, 2] == pytest.approx(2 * 8 / 8 / 0.1 + 0.5)


@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_bottleneck_is_the_least_of_all_matchings(size: int, seed: int) -> None:
    costs = np.random.default_rng(seed).integers(0, 12, (size, size)).astype(float)
    value, match = bottleneck(costs)
    every = range(size)
    assert value == min(max(costs[i, order[i]] for i in every) for order in permutations(every))
    assert value == max(costs[i, match[i]] for i in every)
    assert sorted(match) == list(every)


# --- few devices ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (3, 3), (2, 5), (8, 1), (1, 6)], ids=str)
def test_few_devices_are_placed_as_brute_force_would(kind: str, shape: tuple[int, int]) -> None:
    stages, replicas = shape
    for seed in (0, 1):
        problem = drawn_problem(kind, stages, replicas, stages * replicas, seed)
        planner = Planner(problem, seed=seed)
        assert list(planner.run(moves=1))
        plan = planner.plan()
        assert plan.exact
        assert plan.cost.total_s == pytest.approx(brute_force(problem), rel=1e-12)


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 6, 12])
def test_twelve_devices_are_within_reach(replicas: int) -> None:
    problem = drawn_problem("uniform", 12 // replicas, replicas, 12, 0)
    assert partitions(problem) <= PARTITIONS_MAX
    searched = Search(problem, seed=1)
    if searched.can_move():
        searched.anneal(20_000, share=0.5, expected=20_000)
    assert cost_of(problem, best_plan(problem)).total_s <= cost_of(problem, searched.best).total_s * (1 + 1e-12)


def test_more_devices_are_searched() -> None:
    for stages, replicas in ((8, 8), (7, 2), (2, 8), (13, 1), (1, 20)):
        assert partitions(drawn_problem("uniform", stages, replicas, stages * replicas, 0)) > PARTITIONS_MAX


@given(st.integers(2, 7), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_the_best_path_is_the_shortest(count: int, seed: int) -> None:
    costs = np.random.default_rng(seed).uniform(0, 1, (count, count))
    costs = costs + costs.T

    def length(path: tuple[int, ...] | list[int]) -> float:
        return float(sum(costs[a, b] for a, b in pairwise(path)))

    assert length(best_path(costs)) == pytest.approx(min(length(path) for path in permutations(range(count))))


# --- the search ----------------------------------------------------------------------------------------------
def test_the_compiled_moves_are_built_where_there_is_a_compiler() -> None:
    assert library() is not None or shutil.which("cc") is None, "run setup.sh: a compiler is here, the moves are not"


def begun(problem: Problem, seed: int, *, compiled: bool) -> State:
    table = np.random.default_rng(seed).permutation(len(problem))[: problem.placed]
    table = table.reshape(problem.stages, problem.replicas)
    return State(problem, table, seed=seed, shares=SHARES, compiled=compiled)


@given(st.sampled_from(KINDS), st.sampled_from(SHAPES), st.integers(0, 2**32 - 1), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_every_move_prices_what_a_fresh_look_would(
    kind: str, shape: tuple[int, int, int], seed: int, warmth: int
) -> None:
    """Incremental and full evaluation agree on every number, after moves at any temperature."""
    problem = drawn_problem(kind, *shape, seed)
    state = begun(problem, seed, compiled=True)
    state.anneal(150, 2**warmth)
    kept = {name: array.copy() for name, array in state.arrays().items()}
    state.matching[:] = np.tile(np.arange(state.size, dtype=np.int32), state.groups**2)
    state.reckon()
    for name in ("totals", "rows", "sync", "slowest", "slot_of", "place"):
        assert (kept[name] == state.arrays()[name]).all(), name
    state.boundaries(list(combinations(range(state.groups), 2)))
    known = kept["known"].astype(bool)
    assert (kept["boundary"][known] == state.boundary[known]).all()
    best = cost_of(problem, state.best_table()).total_s
    rounding = 2 * (state.groups + state.devices) * state.unit_s  # each of its terms is cut to whole units
    assert best == pytest.approx(float(state.totals[1]) * state.unit_s, rel=0, abs=rounding)


@pytest.mark.skipif(library() is None, reason="no C compiler: there is nothing to compare")
@given(st.sampled_from(KINDS), st.sampled_from(SHAPES), st.integers(0, 2**32 - 1), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_compiled_and_python_moves_are_the_same(
    kind: str, shape: tuple[int, int, int], seed: int, warmth: int
) -> None:
    problem = drawn_problem(kind, *shape, seed)
    both = [begun(problem, seed, compiled=compiled) for compiled in (True, False)]
    for heat in (2**warmth, 2**warmth // 8):
        for state in both:
            state.anneal(120, heat)
        for (name, fast), slow in zip(both[0].arrays().items(), both[1].arrays().values(), strict=True):
            assert (fast == slow).all(), name


@pytest.mark.skipif(library() is None, reason="no C compiler: there is nothing to compare")
@pytest.mark.parametrize("kind", KINDS)
def test_without_the_compiled_moves_the_plan_is_the_same(kind: str) -> None:
    problem = drawn_problem(kind, 4, 4, 16, 2)
    plans = []
    for compiled in (True, False):
        planner = Planner(problem, seed=7, compiled=compiled)
        assert list(planner.run(moves=600))
        plans.append(planner.plan())
    assert plans[0] == plans[1]
    assert plans[0].moves == 600


def test_the_same_seed_and_moves_give_the_same_plan_and_another_seed_another_way() -> None:
    problem = drawn_problem("uniform", 5, 5, 25, 4)

    def planned(seed: int) -> list[float]:
        planner = Planner(problem, seed=seed)
        way = [step.best_s for step in planner.run(moves=20_000)]
        return [*way, planner.plan().cost.total_s]

    assert planned(1) == planned(1)
    assert planned(1) != planned(2)


def test_a_search_can_be_left_at_any_time_and_only_gets_better() -> None:
    problem = drawn_problem("clustered", 6, 4, 24, 2)
    planner = Planner(problem, seed=0)
    before = planner.plan().cost.total_s
    assert before <= planner.plan().greedy_s
    for count, step in enumerate(planner.run(moves=30_000)):
        assert step.best_s <= before * (1 + 1e-6)
        before = step.best_s
        if count == 200:
            break
    plan = planner.plan()
    assert plan.cost.total_s == pytest.approx(before, rel=1e-6)
    assert sorted(device for stage in plan.assignment for device in stage) == list(range(24))


def test_a_search_with_seconds_ends_in_time_on_a_machine_of_any_speed() -> None:
    problem = drawn_problem("uniform", 5, 4, 20, 2)
    for stall_s in (0.0, 0.4):
        planner, calls = Planner(problem, seed=0), [0]

        def clock(planner: Planner = planner, stall_s: float = stall_s, calls: list[int] = calls) -> float:
            calls[0] += 1  # 10 microseconds a look, and 50 a move; after 2000 moves it stalls once
            return 1e-5 * calls[0] + 5e-5 * planner.plan().moves + (stall_s if planner.plan().moves > 2000 else 0)

        shares = [step.share for step in planner.run(seconds=1.0, clock=clock)]
        assert shares == sorted(shares)
        assert 0.9 < clock() < 1.05
        assert planner.plan().cost.total_s <= planner.plan().greedy_s


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_beats_greed_and_respects_the_bound(kind: str) -> None:
    for seed in (0, 1):
        problem = drawn_problem(kind, 4, 6, 24, seed)
        planner = Planner(problem, seed=0)
        assert list(planner.run(moves=20_000))
        plan = planner.plan()
        assert lower_bound(problem) <= plan.cost.total_s <= plan.greedy_s
        assert plan.cost.total_s <= random_mean(problem, Random(0)) * (1 + 1e-9)


@given(st.sampled_from(KINDS), st.sampled_from([(2, 4), (4, 2), (3, 3), (5, 2), (6, 1)]), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_nothing_is_below_the_bound(kind: str, shape: tuple[int, int], seed: int) -> None:
    problem = drawn_problem(kind, *shape, shape[0] * shape[1], seed)
    assert lower_bound(problem) <= cost_of(problem, best_plan(problem)).total_s


@given(st.sampled_from(KINDS), st.sampled_from(SHAPES), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_nothing_is_below_the_bound_where_some_are_spare(kind: str, shape: tuple[int, int, int], seed: int) -> None:
    problem = drawn_problem(kind, *shape, seed)
    planner = Planner(problem, seed=seed)
    assert list(planner.run(moves=300))
    assert lower_bound(problem) <= planner.plan().cost.total_s


def test_columns_of_a_plan_are_its_best_pipelines() -> None:
    problem = drawn_problem("directed", 5, 6, 30, 2)
    planner = Planner(problem, seed=3)
    assert list(planner.run(moves=3000))
    plan = planner.plan()
    for a, b, seconds in zip(plan.assignment, plan.assignment[1:], plan.cost.boundaries_s, strict=False):
        assert max(problem.hop[i, j] for i, j in zip(a, b, strict=True)) == seconds


def test_greedy_plans_use_every_device_once() -> None:
    for kind in KINDS:
        problem = drawn_problem(kind, 4, 5, 20, 1)
        for plan in (greedy_pipelines(problem), greedy_groups(problem)):
            assert sorted(plan.ravel().tolist()) == list(range(20))


# --- what is refused -----------------------------------------------------------------------------------------
GOOD = np.full((4, 4), 1.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, 1e300])
@pytest.mark.parametrize("name", ["delay_ms", "gbps"])
def test_numbers_that_are_no_link_are_refused_with_their_place(name: str, value: float) -> None:
    arrays = {"delay_ms": GOOD.copy(), "gbps": GOOD.copy()}
    arrays[name][1, 2] = value
    with pytest.raises(PlacementRefused, match=rf"{name}\[1, 2\] is .*must be a number"):
        Links(**arrays)


def test_a_link_without_bandwidth_is_refused() -> None:
    gbps = GOOD.copy()
    gbps[3, 0] = 0
    with pytest.raises(PlacementRefused, match=r"gbps\[3, 0\] is 0"):
        Links(GOOD, gbps)


@pytest.mark.parametrize(
    ("delay", "gbps"),
    [
        (np.ones((3, 4)), np.ones((3, 4))), (np.ones((3, 3)), np.ones((4, 4))), (np.ones(4), np.ones(4)),
        (np.ones((2, 2, 2)), np.ones((2, 2, 2))), (np.ones((0, 0)), np.ones((0, 0))),
        (GOOD.astype(complex), GOOD), (GOOD.astype(bool), GOOD), (GOOD.astype(str), GOOD), (GOOD.astype(object), GOOD),
        (np.ones((PLACEMENT_DEVICES_MAX + 1,) * 2, np.int8), np.ones((PLACEMENT_DEVICES_MAX + 1,) * 2, np.int8)),
    ],
)  # fmt: skip
def test_arrays_that_are_no_links_are_refused(delay: Array, gbps: Array) -> None:
    with pytest.raises(PlacementRefused):
        Links(delay, gbps)


@pytest.mark.parametrize(
    ("stages", "replicas"), [(3, 2), (2, 3), (0, 4), (4, 0), (-2, -2), (10**9, 10**9), (True, 4), (2.0, 2), (1, 1)]
)
def test_stages_and_replicas_that_do_not_fit_are_refused(stages: int, replicas: int) -> None:
    with pytest.raises(PlacementRefused):
        model(Links(GOOD, GOOD), stages=stages, replicas=replicas)


@pytest.mark.parametrize("value", [np.nan, -1, np.inf, 1e10, True, "1"])
def test_sizes_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(PlacementRefused):
        Traffic(gradient_gb=value)
    with pytest.raises(PlacementRefused):
        Traffic(activation_codings=(Coding(value),))
    with pytest.raises(PlacementRefused):
        model(Links(GOOD, GOOD), stages=2, replicas=2, devices=Devices(recovery_s=value))


@pytest.mark.parametrize("column", [[1, 2, 3], [1, 2, 3, -1], [1, 2, 3, np.nan], [[1], [2], [3], [4]], ["a", 1, 2, 3]])
@pytest.mark.parametrize("name", ["work_s", "memory_gb", "price_credits", "failure"])
def test_columns_that_do_not_fit_are_refused(name: str, column: list[float]) -> None:
    with pytest.raises(PlacementRefused):
        model(Links(GOOD, GOOD), stages=2, replicas=2, devices=Devices(**{name: column}))  # type: ignore[arg-type]


def test_too_few_devices_with_memory_are_refused() -> None:
    devices = Devices(memory_gb=[8, 8, 8, 1], memory_needed_gb=4)
    with pytest.raises(PlacementRefused, match="1 lack the memory"):
        model(Links(GOOD, GOOD), stages=2, replicas=2, devices=devices, spare=True)


@pytest.mark.parametrize(
    "table", [[[0, 1], [2, 2]], [[0, 1], [2, 4]], [[0, 1], [2, -1]], [[0, 1, 2, 3]], [[0.0, 1], [2, 3]]]
)
def test_a_plan_that_is_none_has_no_cost(table: list[list[int]]) -> None:
    with pytest.raises(PlacementRefused):
        cost_of(model(Links(GOOD, GOOD), stages=2, replicas=2), np.array(table))


@pytest.mark.parametrize(
    "budget", [{}, {"moves": 1, "seconds": 1.0}, {"seconds": np.nan}, {"seconds": -1.0}, {"seconds": 1.0}]
)
def test_a_search_without_a_budget_is_refused(budget: dict[str, float]) -> None:
    planner = Planner(model(Links(GOOD, GOOD), stages=2, replicas=2), seed=0)
    with pytest.raises(PlacementRefused):
        list(planner.run(**budget))  # type: ignore[arg-type]


def test_a_bad_seed_is_refused() -> None:
    with pytest.raises(PlacementRefused):
        Planner(model(Links(GOOD, GOOD), stages=2, replicas=2), seed=-1)
