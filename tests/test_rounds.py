"""One round over several offers of a peer: nobody is asked twice, the sum is near the least, order means nothing."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from market.assignment import NEVER, assign
from market.matching import Choice, Proven, match_round
from market.reputation import Reputation
from market.rounds import TAKEN, Candidate, match_offers
from protocol.codec import blake
from tests.test_market import bid, offer, peer

COST = st.one_of(st.integers(0, 10**9), st.just(NEVER))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    costs = draw(st.lists(st.lists(COST, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    return costs, draw(st.lists(st.integers(1, 2 * 10**9), min_size=rows, max_size=rows))


def total(costs: list[list[int]], reserves: list[int], places: tuple[int, ...] | list[int]) -> int:
    return sum(reserves[i] if place < 0 else costs[i][place] for i, place in enumerate(places))


def least(costs: list[list[int]], reserves: list[int]) -> int:
    columns = range(len(costs[0]))
    rests = (-1,) * len(costs)
    return min(
        total(costs, reserves, places)
        for places in set(itertools.permutations((*columns, *rests), len(costs)))
        if all(place < 0 or costs[i][place] < NEVER for i, place in enumerate(places))
    )


@settings(max_examples=150)
@given(problems())
def test_the_sum_is_within_a_step_a_row_of_the_least_and_no_column_goes_twice(
    problem: tuple[list[list[int]], list[int]],
) -> None:
    costs, reserves = problem
    places = assign(np.array(costs, np.int64), np.array(reserves, np.int64))
    used = [place for place in places if place >= 0]
    assert len(set(used)) == len(used)
    assert all(costs[row][place] < NEVER for row, place in enumerate(places) if place >= 0)
    possible = [cost for row in costs for cost in row if cost < NEVER]
    step = (max(possible) if possible else 0) // 100 + 64  # the median is no larger; 64: what costs are rounded to
    assert total(costs, reserves, places) <= least(costs, reserves) + 2 * len(costs) * step


def of(number: int, **changes: object) -> Candidate:
    made = offer(nonce=number, **changes)
    return Candidate(blake("offer", bytes([number])), made, [bid(s, unit_price=500 + 10 * s) for s in (2, 3, 4)], 0)


def play(candidates: list[Candidate], records: dict[bytes, Reputation] | None = None) -> dict[bytes, Choice]:
    return match_offers(
        candidates,
        free_stake_micro=lambda _: 1000,
        reputation_of=lambda p: (records or {}).get(p, Reputation.known(20, 0)),
        reachable=lambda _: True,
        proven=lambda _: Proven("none", 0),
    )


def test_one_offer_is_matched_as_ever() -> None:
    one = of(1)
    alone = match_round(
        one.offer, one.offer_id, one.bids, round_number=0, free_stake_micro=lambda _: 1000,
        reputation_of=lambda _: Reputation.known(20, 0), excluded=(), reachable=lambda _: True,
        proven=lambda _: Proven("none", 0),
    )  # fmt: skip
    assert play([one]) == {one.offer_id: alone}


def test_offers_of_one_peer_ask_for_distinct_solvers_and_say_who_was_taken() -> None:
    choices = play([of(number) for number in range(1, 6)])
    winners = [choice.winner.solver for choice in choices.values() if choice.winner is not None]
    assert sorted(winners) == sorted(map(peer, (2, 3, 4)))
    for choice in choices.values():
        others = set(winners) - ({choice.winner.solver} if choice.winner else set())
        assert {solver for solver, why in choice.refused if why == TAKEN} == others


def test_the_dearest_work_goes_to_the_cheapest_solver() -> None:
    """Together the offers pay least when the price that differs most is multiplied by the most operations."""
    small, large = of(1), of(2, operations=8 * 10**11)
    small = Candidate(small.offer_id, offer(nonce=1, operations=10**11), small.bids, 0)
    choices = play([small, large])
    winners = [choices[one.offer_id].winner for one in (small, large)]
    assert [w.solver for w in winners if w] == [peer(3), peer(2)]


def test_the_order_of_offers_and_bids_means_nothing() -> None:
    candidates = [of(number) for number in range(1, 5)]
    first = play(candidates)
    for seed in range(5):
        rng = random.Random(seed)
        mixed = [
            Candidate(c.offer_id, c.offer, rng.sample(list(c.bids), len(c.bids)), 0)
            for c in rng.sample(candidates, len(candidates))
        ]
        again = play(mixed)
        assert {i: c.winner for i, c in again.items()} == {i: c.winner for i, c in first.items()}


def test_a_newcomer_that_is_explored_goes_to_one_offer_only() -> None:
    records = {peer(4): Reputation()}
    for number in range(30):
        choices = play([of(number), of(number + 30)], records)
        winners = [choice.winner.solver for choice in choices.values() if choice.winner is not None]
        assert len(set(winners)) == len(winners) == 2


@pytest.mark.parametrize("seed", range(12))
def test_no_offer_is_left_with_a_worse_bid_than_one_that_nobody_took(seed: int) -> None:
    """Of unequal offers: what is a fine step for the large ones is most of the price of a small one."""
    rng = random.Random(seed)
    candidates = [
        Candidate(
            blake("offer", bytes([number, seed])),
            offer(nonce=number, operations=10**13 if number < 8 else 10**11),
            [bid(s, unit_price=rng.randrange(500, 900), operations_cap=10**15) for s in range(2, 2 + 6 + seed)],
            0,
        )
        for number in range(12)
    ]
    for choice in play(candidates, {peer(s): Reputation() for s in range(2, 5)}).values():
        taken = {solver for solver, why in choice.refused if why == TAKEN}
        free = [s for s in choice.ranked if s.solver not in taken]
        if choice.winner is None:
            assert not free
        elif not choice.explored:
            assert choice.winner == min(free, key=lambda s: (s.score_micro, s.bid_id))
