"""What the trades say of a price: nobody moves it by trading with itself, and nothing is said of too little."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from market.matching import Proven
from market.prints import Print, Statistics, power_floor, statistics, suggest_ask, suggest_limit
from market.waiting import Supply, ladder
from protocol import params
from tests.test_market import ask, peer

NOW = 1_700_000_000 * 10**9
DAY = 86_400 * 10**9
HOUR = 3600 * 10**9


def sale(number: int, price: int, **changes: object) -> Print:
    fields: dict[str, object] = {
        "agreement": peer(1000 + number), "submitter": peer(1 + 2 * number), "solver": peer(2 + 2 * number),
        "mode": "exact", "operations": 10**12, "unit_price": price, "time_ns": NOW - HOUR,
    }  # fmt: skip
    return Print(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_statistics_of_twelve_pairs() -> None:
    found = statistics([sale(i, 100 * (i + 1), operations=10**12 * (i + 1)) for i in range(12)], now_ns=NOW)
    assert (found.raw, found.count, found.pairs, found.enough) == (12, 12, 12, True)
    assert (found.low, found.quartile, found.median, found.upper_quartile, found.high) == (100, 300, 600, 900, 1200)
    assert found.vwap == sum(100 * i * i for i in range(1, 13)) // sum(range(1, 13))
    assert found.dispersion_permille == 1000


def test_trades_of_the_same_pair_count_once_a_day_however_many_and_whichever_way() -> None:
    honest = [sale(i, 1000) for i in range(10)]
    washed = [sale(99, 9_000_000, submitter=peer(7001), solver=peer(7002), time_ns=NOW - i) for i in range(500)]
    washed += [sale(99, 9_000_000, submitter=peer(7002), solver=peer(7001), time_ns=NOW - i) for i in range(500)]
    found = statistics(honest + washed, now_ns=NOW)
    assert (found.raw, found.count, found.pairs) == (1010, 11, 11)
    assert (found.median, found.upper_quartile) == (1000, 1000)
    assert found.operations == 11 * 10**12, "a thousand repetitions weigh as much as one"
    again = statistics(
        [*honest, *washed, sale(99, 9_000_000, submitter=peer(7001), solver=peer(7002), time_ns=NOW - DAY)], now_ns=NOW
    )
    assert again.count == 12, "the day before is another day"


def test_scripts_own_trades_old_ones_and_ones_from_the_future_do_not_count() -> None:
    prints = [
        sale(0, 500),
        sale(1, 1, mode="unchecked"),
        sale(2, 2, submitter=peer(4000)),
        sale(3, 3, solver=peer(4000)),
        sale(4, 4, time_ns=NOW - 8 * DAY),
        sale(5, 5, time_ns=NOW + params.CLOCK_SKEW_NS_MAX + 1),
        sale(6, 600, mode="tolerant"),
    ]
    found = statistics(prints, now_ns=NOW, without=(peer(4000),), within_ns=7 * DAY)
    assert (found.count, found.low, found.high) == (2, 500, 600)
    assert not found.enough


@given(
    st.lists(
        st.tuples(st.integers(0, 10**12), st.integers(0, 5), st.integers(0, 5), st.integers(1, 2**60)), max_size=40
    )
)
def test_the_statistics_are_ordered_whatever_was_sold(rows: list[tuple[int, int, int, int]]) -> None:
    prints = [sale(i, p, submitter=peer(a), solver=peer(b), operations=ops) for i, (p, a, b, ops) in enumerate(rows)]
    found = statistics(prints, now_ns=NOW)
    assert found.low <= found.quartile <= found.median <= found.upper_quartile <= found.high
    assert found.low <= found.vwap <= found.high
    assert found.count <= found.raw == len(rows)
    assert found == statistics(prints[::-1], now_ns=NOW), "in whatever order they are told"


def many(price: int = 1000) -> Statistics:
    return statistics([sale(i, price + i) for i in range(12)], now_ns=NOW)


def few() -> Statistics:
    return statistics([sale(0, 77)], now_ns=NOW)


def test_a_limit_rests_on_trades_then_on_asks_then_on_nothing() -> None:
    assert suggest_limit(many(), []).unit_price == many().upper_quartile
    assert suggest_limit(many(), [5000, 9000]).unit_price == 5000, "below the cheapest ask nothing would happen"
    assert suggest_limit(few(), [300, 100, 200]).basis == "asks"
    assert suggest_limit(few(), [300, 100, 200]).unit_price == 200
    none = suggest_limit(few(), [])
    assert (none.basis, none.unit_price, none.high) == ("none", 0, 0), "no default, least of all an infinite one"


def test_an_ask_is_never_below_the_power_it_takes() -> None:
    # 360 W at 0.25 credits a kilowatt-hour: 25 micro-credits a second, over ten giga-operations a second, rounded up.
    assert power_floor(watts=360, kwh_micro=250_000, operations_per_second=10**10) == 3
    assert power_floor(watts=360, kwh_micro=250_000, operations_per_second=10**9) == 25
    assert power_floor(watts=1, kwh_micro=1, operations_per_second=10**15) == 1, "rounded up, never to nothing"
    assert suggest_ask(many(), [], floor=3).unit_price == many().median
    dear = suggest_ask(many(), [], floor=5000)
    assert (dear.unit_price, dear.low, dear.basis) == (5000, 5000, "power")
    assert suggest_ask(few(), [100, 400], floor=0).basis == "asks"
    assert suggest_ask(few(), [], floor=9).unit_price == 9
    assert suggest_ask(few(), [], floor=0).basis == "none"


@pytest.mark.parametrize("limit", [None, 150, 5000])
def test_a_ladder_has_ten_rungs_at_most_and_a_higher_limit_never_reaches_fewer(limit: int | None) -> None:
    supply = [
        Supply(ask(i, unit_price=100 * i, operations_per_second=10**9), i % 2 == 0, 10**9 * i, True, Proven("none", 0))
        for i in range(1, 31)
    ]
    rungs = ladder(
        supply, operations=10**12, limit=limit, rivals=[100, 3000, 3000], prints=[sale(1, 2000, time_ns=NOW - 1)] * 6,
        now_ns=NOW, round_ns=10**9, cost=lambda price: (price * 1000, price * 1500),
    )  # fmt: skip
    assert len(rungs) <= params.QUOTE_ROWS_MAX
    assert limit is None or limit in [rung.unit_price_max for rung in rungs]
    assert [rung.solvers for rung in rungs] == sorted(rung.solvers for rung in rungs)
    assert all(rung.free <= rung.solvers for rung in rungs)
    assert all(rung.budget_micro == rung.unit_price_max * 1500 for rung in rungs)
    last = max(rung.unit_price_max for rung in rungs)
    assert last >= 3000 and rungs[-1].solvers == 30


def test_waiting_is_rounds_if_one_is_free_else_until_one_is_else_the_rate_of_matches_else_unknown() -> None:
    facts: Any = {
        "operations": 10**12, "limit": None, "now_ns": NOW, "round_ns": 10**9, "cost": lambda price: (price, price),
    }  # fmt: skip
    busy = [
        Supply(ask(i, unit_price=100, operations_per_second=0), True, i * 60 * 10**9, True, Proven("none", 0))
        for i in (2, 1)
    ]
    (first,) = ladder(busy, rivals=[], prints=[], **facts)
    assert (first.wait_ns, first.run_ns, first.free) == (62 * 10**9, None, 0), "until the first is done"
    (second,) = ladder(busy, rivals=[100], prints=[], **facts)
    assert second.wait_ns == 122 * 10**9, "the first goes to the offer that pays as much"
    (unknown,) = ladder(busy, rivals=[100, 200], prints=[], **facts)
    assert unknown.wait_ns is None
    (slow,) = ladder(busy, rivals=[100, 200], prints=[sale(1, 100, time_ns=NOW - 1)] * 4, **facts)
    assert slow.wait_ns == 2 * 10**9 + 3 * HOUR // 4, "two ahead, and then this, at four an hour"
    idle = [Supply(ask(1, unit_price=100, operations_per_second=10**9), False, 0, True, Proven("witnessed", 0))]
    (soon,) = ladder(idle, rivals=[50], prints=[], **facts)
    assert (soon.wait_ns, soon.run_ns) == (2 * 10**9, 1000 * 10**9), "who pays less is not ahead"
    assert ladder([], rivals=[], prints=[], **facts) == []
