"""Prices and acceptance by rule: never below the floor, never past the goal, the same whatever came first."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from market.acceptance import PASSED_OVER, Proposal, choose
from market.matching import refuse_bid
from market.pricing import Terms, clearing_price, goes_without, next_price, rounds_until_next
from protocol import params
from protocol.codec import blake
from tests.test_market import bid, offer

PRICE = st.integers(0, 10**12)
TERMS = st.builds(Terms, st.integers(1, 12), st.integers(1, 3))
PATIENCE = params.PRICE_PATIENCE_ROUNDS
ROUNDS = st.integers(0, 3 * PATIENCE)


# --- prices ------------------------------------------------------------------------------------------------
@given(PRICE, PRICE, PRICE, PRICE, ROUNDS)
def test_a_price_is_never_below_its_floor_nor_past_what_it_moves_to(
    price: int, floor: int, left: int, best: int, idle: int
) -> None:
    before = max(price, floor)
    after = next_price(price, floor=floor, left=left, best=best, idle_rounds=idle)
    assert floor <= after <= max(before, left)
    assert after == next_price(price, floor=floor, left=left, best=best, idle_rounds=idle)
    assert after - before <= max(left - before, 0) // params.PRICE_MOVE_SHARE + 1, "bounded upwards"
    assert before - after <= before // params.PRICE_MOVE_SHARE + 1, "and downwards"


def move(price: int, **changes: int) -> int:
    return next_price(price, **{"floor": 50, "left": 0, "best": 0, "idle_rounds": 0, **changes})


def test_a_price_follows_what_goes_without_and_falls_while_nothing_does() -> None:
    assert [move(100, left=200, idle_rounds=idle) for idle in (0, 1, PATIENCE)] == [125, 125, 125]
    assert move(300, left=200, idle_rounds=1) == 275
    assert move(100, idle_rounds=1) == 98
    assert move(100) == 100, "of a taken slot it stands while all that is wanted is served"


def test_who_waits_in_vain_for_work_that_goes_without_asks_less() -> None:
    price, seen = 100, []
    for idle in range(1, 60):
        price = move(price, left=200, idle_rounds=idle)
        seen.append(price)
    assert seen[:PATIENCE] == sorted(seen[:PATIENCE])
    assert seen[PATIENCE:] == sorted(seen[PATIENCE:], reverse=True)


def test_work_at_hand_that_pays_nearly_as_much_is_taken() -> None:
    assert move(160, left=200, best=150, idle_rounds=3) == 150
    assert move(160, left=200, best=149, idle_rounds=3) == 170, "a sixteenth less is nearly as much, more is not"
    assert move(160, left=200, best=150, idle_rounds=0) == 170, "a taken slot takes nothing"
    assert move(51, best=49, idle_rounds=3) == 50, "the floor stays the floor"


@given(PRICE, PRICE)
def test_a_price_reaches_its_goal_and_stays(floor: int, above: int) -> None:
    price = floor
    for _ in range(400):
        price = next_price(price, floor=floor, left=floor + above, best=0, idle_rounds=0)
    assert price == floor + above
    for _ in range(3000):
        price = next_price(price, floor=floor, left=0, best=0, idle_rounds=1)
    assert price == floor


def test_a_price_moves_each_round_only_while_its_slot_has_just_become_free() -> None:
    calm = params.PRICE_CALM_ROUNDS
    assert [rounds_until_next(idle) for idle in (0, 1, PATIENCE, PATIENCE + 1)] == [calm, 1, 1, calm]


@given(st.lists(st.integers(1, 20), max_size=8), st.lists(st.integers(1, 20), max_size=8))
def test_the_clearing_price_is_the_highest_at_which_more_is_wanted_than_is_free(
    limits: list[int], asks: list[int]
) -> None:
    short = [
        price for price in limits if sum(limit >= price for limit in limits) > 1 + sum(ask <= price for ask in asks)
    ]
    found = clearing_price(sorted(limits, reverse=True), sorted(asks))
    if not short:
        # Of several offers at one limit the first may clear and the last not: then that limit is what clears.
        assert found == 0
    else:
        assert found == max(short)


@given(st.lists(TERMS, max_size=6), st.lists(TERMS, max_size=6), st.integers(1, 3), st.randoms(use_true_random=False))
def test_what_goes_without_is_a_limit_that_the_slot_could_serve_and_no_order_matters(
    wanted: list[Terms], free: list[Terms], memory: int, rng: random.Random
) -> None:
    def found() -> int:
        return goes_without(
            sorted(wanted, key=lambda one: (-one.unit_price, one.memory_bytes)),
            sorted(free, key=lambda one: one.unit_price),
            memory_bytes=memory,
        )

    left = found()
    assert left <= max((one.unit_price for one in wanted), default=0)
    if all(one.memory_bytes > memory for one in wanted) or len(wanted) < 2:
        assert left == 0, "its slot is enough"
    rng.shuffle(wanted)
    rng.shuffle(free)
    assert found() == left


def test_large_work_competes_for_large_slots_only() -> None:
    small, large = 8, 16
    wanted = [Terms(900, large), Terms(800, large), Terms(500, small)]
    assert goes_without(wanted, [], memory_bytes=small) == 0, "the small slot takes the small work"
    assert goes_without(wanted, [Terms(100, large)], memory_bytes=small) == 0, "the large one is taken by large work"
    assert goes_without(wanted, [], memory_bytes=large) == 800
    assert goes_without([*wanted, Terms(400, small)], [Terms(100, large)], memory_bytes=small) == 400
    assert goes_without([*wanted, Terms(400, small)], [Terms(450, small)], memory_bytes=small) == 400, "asks too much"
    assert goes_without([*wanted, Terms(400, small)], [Terms(300, small)], memory_bytes=small) == 0


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
