"""The inequalities of DESIGN §8, the margins of the files we ship, and the rate and lock of a deal."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from market.matching import Record
from market.quoting import sampled_segments
from peer.lan import LAN_RULES
from protocol.incentives import (
    check_rate,
    collusion_break_even,
    collusion_profit,
    exposure,
    lock_needed,
    margins,
    rate_of_deal,
    stake_needed,
    stake_per_price,
)
from protocol.network import Rules, check_incentives

RULES = Rules()


@pytest.mark.parametrize("rules", [RULES, LAN_RULES], ids=["default", "lan"])
def test_the_rules_we_ship_keep_twice_what_is_needed(rules: Rules) -> None:
    check_incentives(rules)
    found = margins(rules)
    assert set(found) > {"verifier", "pool"}
    for name, margin in found.items():
        assert margin >= (1 if name == "pool" else 2), name  # what the pool lacks, the next deals bring


def test_the_design_formula_gives_the_figures_of_the_decision() -> None:
    half = Fraction(1, 2)
    assert exposure(half, caught=half, rechecked=half, found=half) == Fraction(5, 16)
    assert stake_needed(gain=half, reward=Fraction(1), exposed=Fraction(1, 20)) == 9
    assert stake_needed(gain=half, reward=Fraction(1), exposed=Fraction(9, 10)) == 0
    assert (stake_per_price(RULES, 50), stake_per_price(RULES, 200)) == (9, Fraction(3, 2))
    assert (lock_needed(RULES, 1_000_000, 50), lock_needed(RULES, 1_000_000, 200)) == (18_000_000, 3_000_000)
    assert lock_needed(RULES, 1, 200) == 3


def test_the_rate_falls_with_valid_deals_and_one_bad_result_resets_it() -> None:
    rates = [check_rate(RULES, streak) for streak in range(2000)]
    assert rates[:10] == [200] * 10
    assert (rates[10], rates[15], rates[19], rates[20], rates[-1]) == (100, 67, 53, 50, 50)
    assert rates == sorted(rates, reverse=True)
    record = Record()
    for _ in range(25):
        record = record.after_right()
    assert (record.right, record.streak) == (25, 25)
    assert record.after_wrong() == Record(25, 1, 0)
    assert record.after_wrong(taken_back=True) == Record(24, 1, 0)


@given(st.integers(1, 10**12), st.integers(0, 10**14), st.integers(0, 100))
def test_a_deal_is_never_checked_less_than_its_lock_covers(price: int, extra: int, streak: int) -> None:
    lock = lock_needed(RULES, price, RULES.newcomer_permille) + extra
    rate = rate_of_deal(RULES, price_micro=price, lock_micro=lock, streak=streak)
    assert RULES.check_permille <= rate <= RULES.newcomer_permille
    assert rate >= check_rate(RULES, streak)
    assert lock >= lock_needed(RULES, price, rate)
    full = lock_needed(RULES, price, check_rate(RULES, streak))
    assert rate_of_deal(RULES, price_micro=price, lock_micro=full, streak=streak) == check_rate(RULES, streak)


@pytest.mark.parametrize("segments", [1, 2, 3, 5, 10, 20, 40, 100, 1024])
@pytest.mark.parametrize("streak", [0, 10, 20])
def test_no_number_of_false_segments_pays(segments: int, streak: int) -> None:
    rate = check_rate(RULES, streak)
    drawn = sampled_segments(RULES, segments, rate)
    stake = stake_per_price(RULES, rate)
    locked = Fraction(lock_needed(RULES, 10**9, rate), 10**9)
    # Of the price: what the rules allow beside the work of one segment, and what the margin bears in any deal.
    outside, most = max(Fraction(0), Fraction(RULES.gain_permille, 1000) - Fraction(1, segments)), Fraction(2, 5)
    for wrong in range(1, segments + 1):
        exposed = 1 - Fraction(comb(segments - wrong, drawn), comb(segments, drawn))
        assert Fraction(wrong, segments) + outside <= exposed * (1 + stake), wrong
        assert Fraction(wrong, segments) + most <= exposed * (1 + locked), wrong


def test_collusion_breaks_even_where_its_profit_changes_sign() -> None:
    terms = {
        "gain": Fraction(1, 2), "checked": Fraction(1, 20), "stake": Fraction(18), "verifier": Fraction(1),
        "audited": Fraction(1, 4), "watched": Fraction(0),
    }  # fmt: skip
    share = collusion_break_even(**terms)
    assert collusion_profit(share - Fraction(1, 10**6), **terms) <= 0 < collusion_profit(share, **terms)
    assert share < collusion_break_even(**{**terms, "watched": Fraction(1, 2)})
    assert collusion_break_even(**{**terms, "watched": Fraction(1)}) == 1
