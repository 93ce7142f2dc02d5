"""A large round in columns is the round of records, to the last micro-credit and the last tie."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from market import rounds
from market.matching import Choice, Proven, draws_newcomer
from market.reputation import Reputation
from market.round_columns import RANKED_MAX, TAKEN, match_columns
from market.rounds import Candidate, match_offers
from market.scoring import Bidders, _hourly, _nano_over, fits, pack_bid
from protocol import params
from protocol.codec import blake
from tests.test_market import NOW, bid, offer

PEERS = [blake("peer", bytes([n])) for n in range(12)]
GRADES = ("witnessed", "self-timed", "none")
SPEEDS = st.sampled_from([0, 1, 7, 10**6, 10**9, 3 * 10**10, 10**12, 2**53])
WIDE = st.one_of(st.integers(0, 2**63 - 1), st.sampled_from([0, 1, 10**9, 10**12, 2**60, 2**61, 2**63 - 1]))
FACTS = st.fixed_dictionaries(
    {
        "stake": st.integers(0, 400), "reachable": st.sampled_from([True, True, True, False]),
        "right": st.integers(0, 30), "wrong": st.integers(0, 5),
        "proven": st.builds(Proven, st.sampled_from(GRADES), SPEEDS), "link": SPEEDS,
    }
)  # fmt: skip
OFFERS = st.fixed_dictionaries(
    {
        "operations": st.one_of(st.integers(1, 10**15), st.sampled_from([1, 10**9, 10**13, 2**63 - 1])),
        "unit_price_max": st.sampled_from([0, 1, 700, 1000, 999_999, 2**33 - 1]),
        "content_bytes": st.sampled_from([0, 1, 10**6, 10**12]), "checkpoint_bytes": st.sampled_from([0, 1, 10**9]),
        "deadline_ns": st.sampled_from([0, 0, 0, NOW - 1, NOW + 10**12, NOW + 10**14]),
        "device": st.sampled_from(["any", "any", "cpu", "gpu"]), "device_memory_bytes": st.sampled_from([0, 0, 8]),
        "mode": st.sampled_from(["exact", "exact", "script", "profile"]), "sandbox": st.integers(0, 4),
        "lock_micro": st.integers(0, 200), "submitter": st.sampled_from([*PEERS[:2], bytes(32)]),
    }
)  # fmt: skip
BIDS = st.fixed_dictionaries(
    {
        "unit_price": st.sampled_from([0, 1, 500, 501, 700, 1001, 10**12]), "lock_micro": st.integers(0, 400),
        "operations_cap": st.sampled_from([10**12, 2**63 - 1, 2**63 - 1]), "eta_ns": WIDE,
        "sandbox": st.integers(2, 4), "device": st.sampled_from(["cpu", "cpu", "gpu"]),
        "device_memory_bytes": st.sampled_from([0, 8, 9]),
    }
)  # fmt: skip


def candidates_of(drawn: list[tuple[dict[str, Any], list[tuple[int, dict[str, Any]]], int, int]]) -> list[Candidate]:
    made = []
    for number, (terms, bids, round_number, excluded) in enumerate(drawn):
        offer_id = blake("offer", bytes([number]))
        answers = [
            (blake("bid", offer_id, PEERS[who]), replace(bid(0)[1], offer=offer_id, solver=PEERS[who], **more))
            for who, more in {who: (who, more) for who, more in bids}.values()
        ]
        out = (PEERS[excluded],) if excluded < len(PEERS) else ()
        made.append(Candidate(offer_id, offer(nonce=number, **terms), answers, round_number, out, excluded % 3, NOW))
    return made


def knowledge(facts: list[dict[str, Any]]) -> dict[str, Any]:
    by_peer = dict(zip(PEERS, facts, strict=True))
    return {
        "free_stake_micro": lambda p: by_peer[p]["stake"], "reachable": lambda p: by_peer[p]["reachable"],
        "reputation_of": lambda p: Reputation.known(by_peer[p]["right"], by_peer[p]["wrong"]),
        "proven": lambda p: by_peer[p]["proven"], "link": lambda p: by_peer[p]["link"],
    }  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(
    st.lists(
        st.tuples(
            OFFERS, st.lists(st.tuples(st.integers(0, 11), BIDS), max_size=14), st.integers(0, 40), st.integers(0, 30)
        ),
        min_size=1, max_size=6,
    ),
    st.lists(FACTS, min_size=len(PEERS), max_size=len(PEERS)),
)  # fmt: skip
def test_columns_find_what_records_find(drawn: Any, facts: list[dict[str, Any]]) -> None:
    candidates, known = candidates_of(drawn), knowledge(facts)
    plain = match_offers(candidates, **known)
    solvers = {bid.solver for one in candidates for _, bid in one.bids}
    bidders = Bidders.of(solvers, **known)
    assert bidders is not None
    found = match_columns(candidates, bidders)
    if found is None:
        assert not all(fits(one.offer) for one in candidates)
        return
    assert found == plain


def market(seed: int, offers: int = 30, bidders: int = 60) -> tuple[list[Candidate], dict[str, Any]]:
    """Offers of unequal size and bids with many ties, as a market of like machines has them."""
    rng = random.Random(seed)
    peers = [blake("peer", n.to_bytes(2, "big")) for n in range(bidders)]
    made = []
    for number in range(offers):
        offer_id = blake("offer", seed.to_bytes(2, "big"), bytes([number]))
        terms = offer(
            nonce=number, operations=10 ** rng.randrange(11, 14), checkpoint_bytes=10**6, expires_ns=NOW + 10**9
        )
        answers = [
            (
                blake("bid", offer_id, key),
                replace(
                    bid(0)[1], offer=offer_id, solver=key, unit_price=rng.choice([500, 500, 600, 1001]),
                    operations_cap=10**15, eta_ns=rng.choice([10**9, 10**12]),
                ),
            )
            for key in rng.sample(peers, rng.randrange(bidders))
        ]  # fmt: skip
        explores = number % 4 == 0
        round_number = next(n for n in range(10_000) if draws_newcomer(offer_id, n) == explores)
        made.append(Candidate(offer_id, terms, answers, round_number, (), 0, NOW))
    right = {key: rng.choice([0, 0, 5, 30]) for key in peers}
    known = {
        "free_stake_micro": lambda _: 1000, "reachable": lambda key: key[0] > 20, "link": lambda _: 10**7,
        "reputation_of": lambda key: Reputation.known(right[key], 0), "proven": lambda _: Proven("none", 0),
    }  # fmt: skip
    return made, known


def short(choice: Choice) -> Choice:
    """A choice of records, with as much of it told as a large round tells."""
    told = choice.ranked[:RANKED_MAX]
    seen = {scored.solver for scored in told}
    refused = tuple(one for one in choice.refused if one[1] != TAKEN or one[0] in seen)
    return Choice(choice.winner, told, refused, choice.explored, len(choice.ranked) - len(told))


@pytest.mark.parametrize("seed", range(8))
def test_a_large_round_is_told_in_short_and_decided_alike(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, known = market(seed)
    monkeypatch.setattr(params, "ROUND_COLUMNS_MIN", 10**9)
    plain = match_offers(candidates, **known)
    assert sum(choice.winner is not None for choice in plain.values()) > 20
    assert any(choice.explored for choice in plain.values())
    monkeypatch.setattr(params, "ROUND_COLUMNS_MIN", 0)
    monkeypatch.setattr(rounds, "match_round", None)  # it is not asked
    found = match_offers(candidates, **known)
    assert found == {offer_id: short(choice) for offer_id, choice in plain.items()}
    packed = [
        Candidate(c.offer_id, c.offer, c.bids, c.round_number, (), 0, NOW, b"".join(pack_bid(*b) for b in c.bids))
        for c in reversed(candidates)
    ]
    assert match_offers(packed, **known) == found


def test_a_round_that_columns_cannot_hold_is_made_of_records(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, known = market(1, offers=3, bidders=9)
    dear = Candidate(b"d" * 32, offer(unit_price_max=2**33), candidates[0].bids, 0, now_ns=NOW)
    (_, one), *_ = candidates[0].bids
    alike = [(b"alike...1".ljust(32), one), (b"alike...0".ljust(32), replace(one, solver=b"\xff" * 32))]
    tied = Candidate(b"t" * 32, candidates[0].offer, alike, 0, now_ns=NOW)
    known |= {"reputation_of": lambda _: Reputation.known(20, 0), "reachable": lambda _: True}
    for odd in (dear, tied):
        plain = match_offers([*candidates, odd], **known)
        monkeypatch.setattr(params, "ROUND_COLUMNS_MIN", 0)
        assert match_offers([*candidates, odd], **known) == plain
        monkeypatch.undo()
    bidders = Bidders.of({one.solver, b"\xff" * 32}, **known)
    assert bidders is not None
    assert match_columns([tied], bidders) is None
    assert match_columns([dear], bidders) is None
    assert Bidders.of([b"same-head".ljust(32), b"same-head".ljust(31) + b"."], **known) is None
    assert Bidders.of([bytes(32)], **{**known, "proven": lambda _: Proven("witnessed", 2**54)}) is None


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(1, 2**53), min_size=1, max_size=5))
def test_a_quotient_of_ninety_bits_is_exact_in_sixty_four(count: int, speeds: list[int]) -> None:
    found = _nano_over(count, np.array(speeds, np.int64)).tolist()
    for speed, quotient in zip(speeds, found, strict=True):
        exact = count * 10**9 // speed
        assert quotient == exact or min(quotient, exact) > params.RUN_NS_MAX


@given(st.integers(0, 2**41 - 1), st.lists(st.integers(0, params.RUN_NS_MAX), min_size=1, max_size=5))
def test_the_price_of_waiting_is_exact(amount: int, spans: list[int]) -> None:
    assert _hourly(amount, np.array(spans, np.int64)).tolist() == [amount * ns // (3600 * 10**9) for ns in spans]
