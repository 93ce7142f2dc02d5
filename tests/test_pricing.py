"""Prices and acceptance by rule: never below the floor, never past the goal, the same whatever came first."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from market.acceptance import PASSED_OVER, Proposal, choose
from market.matching import refuse_bid
from market.pricing import Wanted, goes_without, next_price
from protocol import params
from protocol.codec import blake
from tests.test_market import bid, offer

PRICE = st.integers(0, 10**12)
WANTED = st.builds(Wanted, st.integers(1, 20), st.integers(1, 4))
ROUNDS = st.integers(0, 3 * params.PRICE_PATIENCE_ROUNDS)


# --- prices ------------------------------------------------------------------------------------------------
@given(PRICE, PRICE, PRICE, PRICE, ROUNDS)
def test_a_price_is_never_below_its_floor_and_moves_a_share_of_the_way_at_most(
    price: int, floor: int, left: int, sold: int, idle: int
) -> None:
    before = max(price, floor)
    after = next_price(price, floor=floor, left=left, sold=sold, idle_rounds=idle)
    assert floor <= after <= max(before, left, sold), "never below the floor, never past what it moves to"
    assert after == next_price(price, floor=floor, left=left, sold=sold, idle_rounds=idle)
    up, down = max(left, sold, before) - before, before - floor
    assert -down // params.PRICE_FALL_SHARE - 1 <= after - before <= up // params.PRICE_RISE_SHARE + 1


def test_a_price_rises_while_work_goes_without_and_falls_while_the_slot_is_idle() -> None:
    assert next_price(100, floor=50, left=200, sold=0, idle_rounds=0) == 125
    assert next_price(100, floor=50, left=200, sold=0, idle_rounds=3) == 125
    assert next_price(100, floor=50, left=0, sold=500, idle_rounds=1) == 98, (
        "nobody goes without: an idle slot is cheap"
    )
    assert next_price(100, floor=50, left=0, sold=500, idle_rounds=0) == 113, "a taken one follows what others get"
    assert next_price(100, floor=50, left=0, sold=80, idle_rounds=0) == 100


def test_who_waits_in_vain_for_work_that_goes_without_asks_less() -> None:
    price, seen = 100, []
    for idle in range(1, 60):
        price = next_price(price, floor=50, left=200, sold=0, idle_rounds=idle)
        seen.append(price)
    patience = params.PRICE_PATIENCE_ROUNDS
    assert seen[:patience] == sorted(seen[:patience])
    assert seen[patience:] == sorted(seen[patience:], reverse=True)


@given(PRICE, PRICE)
def test_a_price_reaches_its_goal_and_stays(floor: int, above: int) -> None:
    price = floor
    for _ in range(400):
        price = next_price(price, floor=floor, left=floor + above, sold=0, idle_rounds=0)
    assert price == floor + above
    for _ in range(3000):
        price = next_price(price, floor=floor, left=0, sold=0, idle_rounds=1)
    assert price == floor


def left_by_search(wanted: list[Wanted], free: list[int]) -> int:
    """The best limit left over by the assignment that is worth most, by trying them all."""
    worst, result = -1, 0
    slots: list[int | None] = [*free, *[None] * len(wanted)]
    for places in set(itertools.permutations(slots, len(wanted))):
        fits = [place is not None and place >= one.memory_bytes for one, place in zip(wanted, places, strict=True)]
        if any(place is not None and not fit for place, fit in zip(places, fits, strict=True)):
            continue
        worth = sum(one.limit for one, fit in zip(wanted, fits, strict=True) if fit)
        left = max((one.limit for one, fit in zip(wanted, fits, strict=True) if not fit), default=0)
        if worth > worst or (worth == worst and left < result):
            worst, result = worth, left
    return result


@given(st.lists(WANTED, max_size=4), st.lists(st.integers(1, 4), max_size=3), st.randoms(use_true_random=False))
def test_what_goes_without_is_what_the_best_assignment_leaves(
    wanted: list[Wanted], free: list[int], rng: random.Random
) -> None:
    expected = left_by_search(wanted, free)
    for _ in range(3):
        rng.shuffle(wanted)
        rng.shuffle(free)
        best_first = sorted(wanted, key=lambda one: -one.limit)
        assert goes_without(best_first, free) == expected, "the order of like limits, or of slots, says nothing"


# --- acceptance --------------------------------------------------------------------------------------------
def proposal(number: int, *, limit: int, price: int = 100, operations: int = 10, takes_ns: int = 10**9) -> Proposal:
    return Proposal(blake("p", bytes([number])), limit * operations, price * operations, takes_ns, limit, price)


PROPOSALS = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50), st.integers(1, 9)), max_size=8).map(
    lambda rows: [proposal(n, limit=a + b, price=a, takes_ns=c * 10**9) for n, (a, b, c) in enumerate(rows)]
)


@given(PROPOSALS, st.integers(-1, 4), st.randoms(use_true_random=False))
def test_the_best_are_signed_whatever_came_first(proposals: list[Proposal], slots: int, rng: random.Random) -> None:
    signed, passed = choose(proposals, slots=slots)
    assert len(signed) == min(len(proposals), max(0, slots))
    assert {one.id for one in signed} | {one.id for one, _ in passed} == {one.id for one in proposals}
    rates = [one.worth_micro * 10**9 // one.takes_ns for one in signed]
    assert all(one.worth_micro * 10**9 // one.takes_ns <= min(rates) for one, _ in passed if rates)
    assert {refusal.code for _, refusal in passed} <= PASSED_OVER
    rng.shuffle(proposals)
    assert choose(proposals, slots=slots) == (signed, passed)


def test_who_is_outbid_is_told_what_the_slot_was_sold_at() -> None:
    best, longer, poorer = proposal(1, limit=300), proposal(2, limit=300, takes_ns=2 * 10**9), proposal(3, limit=200)
    signed, passed = choose([poorer, longer, best], slots=1)
    assert signed == (best,)
    assert [one for one, _ in passed] == [poorer, longer], "work of twice the time is worth half a second"
    assert {refusal.why for _, refusal in passed} == {"the slot went to work that pays up to 300 per Gop, sold at 100"}
    assert [refusal.code for _, refusal in choose([best], slots=0)[1]] == ["busy"]


@pytest.mark.parametrize(("price", "refused"), [(1000, False), (1001, True)])
def test_a_limit_stays_a_limit(price: int, refused: bool) -> None:
    refusal = refuse_bid(
        offer(), bid(2, unit_price=price)[1], free_stake_micro=1000, excluded=(), reachable=True
    )  # fmt: skip
    assert (refusal is not None) == refused
