"""The filter of a table: what it means is exact, and what means nothing is refused with its place and the keys."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from market.filters import ASK_KEYS, OFFER_KEYS, TRADE_KEYS, BadFilter, pick, read_filter
from protocol import params


def ask(**changes: Any) -> dict[str, Any]:
    row = {
        "unit_price": 1000, "memory_bytes": 2 << 30, "device_memory_bytes": 24 << 30, "device": "gpu",
        "operations_per_second": 10**10, "sandbox": 3, "roles": 3, "stake_micro": 5_000_000, "trust_ppm": 800_000,
        "proven_grade": "witnessed", "connected": True, "peer": "12D3KooWAbc", "age_ns": 90 * 10**9,
    }  # fmt: skip
    return {**row, **changes}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("", True),
        ("vram>=24 price<0.3 sandbox>=namespaced role=verifier trust>0.7", True),
        ("vram>=24.0000001", False),
        ("vram>24", False),
        ("vram=24G memory=2048M", True),
        ("vram>=24GB memory>=2048MiB", True),
        ("price<=0.001", True),
        ("price<0.001", False),
        ("price = 0.001", True),
        ("trust>0.8", False),
        ("trust>=80%", True),
        ("trust>79.9999%", True),
        ("sandbox>=3 sandbox<contained", True),
        ("sandbox>=CONTAINED", False),
        ("role=solver role=verifier", True),
        ("role=whistleblower", False),
        ("role!=whistleblower", True),
        ("speed>=10G", True),
        ("speed>10G", False),
        ("speed>9.999999999G", True),
        ("age<2m", True),
        ("age>=1.5m age<=90 age=90000ms", True),
        ("here=yes", True),
        ("here!=yes", False),
        ("device=gpu device!=cpu", True),
        ("card=witnessed", True),
        ("peer=kooWABC", True),
        ("peer!=xyz", True),
        ("PRICE<1", True),
        ("stake>=5", True),
    ],
)
def test_a_filter_means_what_it_says(text: str, holds: bool) -> None:
    assert read_filter(text, ASK_KEYS).holds(ask()) is holds


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("vrma>=24", "character 1 ", "vram"),
        ("price<0.3 vrma>=24", "character 11 ", "vram"),
        ("price<cheap", "character 7 ", "no amount of credits"),
        ("price<0.0000001", "character 7 ", "six decimals"),
        ("price<-1", "character 7 ", "no amount"),
        ("vram>=lots", "character 7 ", "K".lower()),
        ("vram>=9999999999999", "character 7 ", "no amount"),
        ("role=king", "character 6 ", "solver, verifier, whistleblower"),
        ("role>solver", "character 5 ", "role=solver"),
        ("sandbox>=strong", "character 10 ", "namespaced"),
        ("sandbox>=7", "character 10 ", "namespaced"),
        ("here=perhaps", "character 6 ", "yes"),
        ("device=tpu", "character 8 ", "cpu, gpu"),
        ("cheap", "character 1 ", "KEY"),
        ("price<0.3 and vram>2", "character 11 ", "KEY"),
        ("price<", "character 1 ", "KEY"),
        ("price<0.3vram>2", "character 7 ", "credits"),
        ("price<1<2", "character 8 ", "KEY"),
        ("price<0.3;", "character 7 ", "credits"),
        ("price\N{LESS-THAN OR EQUAL TO}3", "character 1 ", "KEY"),
        ("age<5y", "character 5 ", "ms s m h d"),
    ],
)
def test_what_means_nothing_is_refused_with_its_place_and_what_there_is(text: str, place: str, words: str) -> None:
    with pytest.raises(BadFilter) as caught:
        read_filter(text, ASK_KEYS)
    error = caught.value
    assert (error.code, error.exit_code) == ("bad-filter", 2)
    assert place in error.what, error.what
    assert words in f"{error.what} {error.why} {error.next_step}"
    assert error.next_step


def test_a_filter_longer_than_anybody_writes_is_refused() -> None:
    with pytest.raises(BadFilter, match="characters"):
        read_filter("price<1 " * (params.FILTER_CHARS_MAX // 8 + 1), ASK_KEYS)


ALPHABET = string.ascii_letters + string.digits + " <>=!.%-_\t\n\u0663\u00b2\u2264\x00"
PIECES = st.sampled_from(
    [*ASK_KEYS, *OFFER_KEYS, *TRADE_KEYS, "<", "<=", "=", "!=", ">", ">=", " ", "1", "2.5G", "80%"]
)


@given(st.one_of(st.text(max_size=60), st.text(ALPHABET, max_size=60), st.lists(PIECES, max_size=12).map("".join)))
@example("sandbox=\N{SUPERSCRIPT TWO}")
@example("price<\N{ARABIC-INDIC DIGIT THREE}")
@example("memory<iB")
@example("memory<b")
@example("vram<1e9")
def test_any_text_is_a_filter_or_a_bad_filter(text: str) -> None:
    for keys in (ASK_KEYS, OFFER_KEYS, TRADE_KEYS):
        try:
            found = read_filter(text, keys)
        except BadFilter as error:
            assert error.what
            assert error.next_step
            assert len(str(error)) < 600
        else:
            assert len(found.tests) == sum(text.count(sign) for sign in "<>=") - sum(
                text.count(sign) for sign in ("<=", ">=")
            ), "every sign that compares made one comparison"


def test_rows_are_picked_and_sorted() -> None:
    rows = [ask(unit_price=price, peer=f"p{price}") for price in (300, 100, 200, 900)]
    found = pick(rows, ASK_KEYS, where="price<0.0005", sort="price")
    assert [row["unit_price"] for row in found] == [100, 200, 300]
    assert [row["unit_price"] for row in pick(rows, ASK_KEYS, sort="-price")] == [900, 300, 200, 100]
    assert pick(rows, ASK_KEYS) == rows, "in the order they came"
    with pytest.raises(BadFilter, match="cannot sort"):
        pick(rows, ASK_KEYS, sort="colour")
    assert pick([], ASK_KEYS, where="price<1") == []


def test_every_key_can_be_asked_for_as_its_own_example_says() -> None:
    from market.filters import _example

    for keys in (ASK_KEYS, OFFER_KEYS, TRADE_KEYS):
        for name, key in keys.items():
            assert read_filter(_example(name, key).removeprefix("write it like "), keys).tests[0].key is key
