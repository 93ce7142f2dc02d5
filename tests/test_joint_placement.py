"""Units of a run and the peers that may have them: all or none, each its own, and the cheapest of what is tried."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from market.joint_placement import Candidates, choose_units, fullest
from market.placement_cost import Links
from market.step_time import Volume


def candidates(toll: list[dict[int, int]], *, seed: int = 0, devices: int = 5, second: int = 10**6) -> Candidates:
    rng = np.random.default_rng(seed)
    delay, gbps = rng.uniform(1, 100, (devices, devices)), rng.uniform(0.01, 1, (devices, devices))
    volume = Volume(4, [(6e6, 4e6)], [5e6, 2e6])
    return Candidates(2, 2, toll, Links(delay, gbps), volume, [0.1] * devices, second)


def test_units_are_matched_so_that_as_many_as_can_have_a_device_of_their_own() -> None:
    assert fullest([{0: 1, 1: 9}, {0: 1}, {1: 5, 2: 50}]) == [1, 0, 2]
    assert fullest([{0: 1}, {0: 2}]) == [0, -1]
    assert fullest([{}, {3: 1}]) == [-1, 3]


def test_while_a_unit_is_left_over_there_is_no_choice() -> None:
    assert choose_units(candidates([{0: 1, 1: 1}, {0: 1, 1: 1}, {0: 1, 1: 1}, {2: 1, 3: 1}])) is None


def test_a_unit_placed_alone_leaves_the_others_where_they_are() -> None:
    chosen = choose_units(candidates([{0: 0}, {1: 0}, {2: 0}, {3: 10, 4: 10}]))
    assert chosen is not None
    assert chosen[:3] == [0, 1, 2] and chosen[3] in (3, 4)


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_of_four_among_five_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    toll = [{device: int(rng.integers(0, 10**5)) for device in range(5)} for _ in range(4)]
    made = candidates(toll, seed=seed)
    best = min(made.cost_micro(order) for order in permutations(range(5), 4))
    chosen = choose_units(made)
    assert chosen is not None and len(set(chosen)) == 4
    assert made.cost_micro(chosen) == best
    assert choose_units(made) == chosen


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_of_four_among_nine_is_far_better_than_a_usual_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    toll = [{device: int(rng.integers(0, 10**5)) for device in range(9)} for _ in range(4)]
    made = candidates(toll, seed=seed, devices=9)
    costs = sorted(made.cost_micro(order) for order in permutations(range(9), 4))
    chosen = choose_units(made)
    assert chosen is not None
    assert made.cost_micro(chosen) <= costs[len(costs) // 100]  # one in a hundred is as good


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(st.integers(0, 4), st.integers(0, 1000), max_size=5), min_size=4, max_size=4))
def test_there_is_a_choice_just_when_every_unit_can_have_its_own(toll: list[dict[int, int]]) -> None:
    possible = any(
        all(device in units for device, units in zip(order, toll, strict=True)) for order in permutations(range(5), 4)
    )
    chosen = choose_units(candidates(toll))
    assert (chosen is not None) == possible
    if chosen is not None:
        assert len(set(chosen)) == 4 and all(d in units for d, units in zip(chosen, toll, strict=True))
