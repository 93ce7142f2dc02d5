"""The compiled half of a large round gives the bits of the arrays it stands for, and the arrays go on without it."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from market import round_compiled
from market.assignment import NEVER, assign
from market.reputation import Reputation
from market.round_columns import match_columns
from market.round_compiled import Auction, Known, Rankings, rounds_library
from market.rounds import Candidate, match_offers
from market.scoring import Answered, Bidders, Ranking, fits, pack_bid, rank_all
from protocol import params
from tests.test_market import NOW
from tests.test_round_columns import BIDS, FACTS, OFFERS, PEERS, candidates_of, knowledge, market

compiled_only = pytest.mark.skipif(rounds_library() is None, reason="no C compiler: there is nothing to compare")


def test_the_compiled_rounds_are_built_where_there_is_a_compiler() -> None:
    assert rounds_library() is not None or shutil.which("cc") is None, "run setup.sh: a compiler is here, they are not"


def bidders_of(candidates: list[Candidate], known: dict[str, Any], *, compiled: bool) -> Bidders:
    facts = {name: one for name, one in known.items() if name != "credit_micro"}
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(round_compiled, "rounds_library", lambda: None)
        bidders = Bidders.of({bid.solver for one in candidates for _, bid in one.bids}, **facts)
        assert bidders is not None
        assert (bidders.compiled is not None) is compiled
    return bidders


def answered(one: Candidate) -> Answered:
    packed = b"".join(pack_bid(*pair) for pair in one.bids)
    return Answered(
        one.offer, one.offer_id, packed, one.round_number, one.excluded, one.stake_min_micro, one.now_ns
    )


def rank_of(one: Candidate, bidders: Bidders) -> Ranking | None:
    found = rank_all([answered(one)], bidders)
    return None if found is None else found[0][0]


def assert_same_ranking(one: Candidate, fast: Bidders, plain: Bidders) -> None:
    found = [rank_of(one, bidders) for bidders in (fast, plain)]
    if found[0] is None or found[1] is None:
        assert found[0] is found[1] is None
        return
    for name in ("rows", "solvers", "scores", "refused"):
        columns = [getattr(ranking, name) for ranking in found]
        assert np.array_equal(*columns), name
    assert found[0].explored == found[1].explored
    places = np.arange(found[0].rows.size)
    told = [
        ranking.scored(places, one.offer, one.bids, bidders)
        for ranking, bidders in zip(found, (fast, plain), strict=True)
        if ranking is not None
    ]
    assert told[0] == told[1]


@compiled_only
@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            OFFERS, st.lists(st.tuples(st.integers(0, 11), BIDS), max_size=14), st.integers(0, 40), st.integers(0, 30)
        ),
        min_size=1, max_size=4,
    ),
    st.lists(FACTS, min_size=len(PEERS), max_size=len(PEERS)),
)  # fmt: skip
def test_compiled_scores_are_those_of_the_arrays(drawn: Any, facts: list[dict[str, Any]]) -> None:
    candidates, known = candidates_of(drawn), knowledge(facts)
    fast, plain = (bidders_of(candidates, known, compiled=compiled) for compiled in (True, False))
    for one in candidates:
        if fits(one.offer):
            assert_same_ranking(one, fast, plain)


@compiled_only
@pytest.mark.parametrize("seed", range(6))
def test_many_bids_and_long_ties_are_ordered_alike(seed: int) -> None:
    """Of hundreds of bids with two prices: runs of ties long enough for either way of ordering them."""
    candidates, known = market(seed, offers=3, bidders=400)
    known |= {"reputation_of": lambda _: Reputation.known(9, 0), "reachable": lambda _: True}
    fast, plain = (bidders_of(candidates, known, compiled=compiled) for compiled in (True, False))
    rankings = [rank_of(one, fast) for one in candidates]
    scores = [ranking.scores for ranking in rankings if ranking is not None]
    assert max(int(np.unique(each, return_counts=True)[1].max(initial=0)) for each in scores) > 24
    for one in candidates:
        assert_same_ranking(one, fast, plain)


@compiled_only
@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.integers(0, 40))
def test_the_compiled_auction_ends_as_the_arrays_do(data: Any, rows: int, columns: int, bits: int) -> None:
    """Reserves of the size of the costs, as offers have them: what is far above them is bid up to step by step."""
    cost = st.one_of(st.integers(0, 9), st.integers(0, 1000), st.just(-1))
    drawn = data.draw(st.lists(st.lists(cost, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    costs = np.array([[NEVER if one < 0 else one << bits for one in line] for line in drawn], np.int64)
    reserves = data.draw(st.lists(st.integers(0, 2000), min_size=rows, max_size=rows))
    assert_same_assignment(costs, np.array([one << bits for one in reserves], np.int64))


@compiled_only
@pytest.mark.parametrize(("rows", "columns"), [(1, 200), (200, 1), (64, 64), (90, 129), (129, 90)])
@pytest.mark.parametrize("most", [3, 2**40])
def test_the_compiled_auction_is_the_same_over_many_blocks(rows: int, columns: int, most: int) -> None:
    rng = np.random.default_rng(rows * 1000 + columns)
    costs = rng.integers(0, most, (rows, columns), np.int64)
    costs[rng.random((rows, columns)) < 0.2] = NEVER
    for reserve in (0, most // 2, 2 * most):
        assert_same_assignment(costs, np.full(rows, reserve, np.int64))


def assert_same_assignment(costs: Any, reserves: Any) -> None:
    fast = assign(costs, reserves)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_compiled, "rounds_library", lambda: None)
        assert assign(costs, reserves) == fast


@compiled_only
@pytest.mark.parametrize("seed", range(4))
def test_a_round_without_the_compiled_half_ends_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, known = market(seed)
    monkeypatch.setattr(params, "ROUND_COLUMNS_MIN", 0)
    fast = match_offers(candidates, **known)
    monkeypatch.setattr(round_compiled, "rounds_library", lambda: None)
    assert match_offers(candidates, **known) == fast


@compiled_only
@pytest.mark.parametrize("seed", range(3))
def test_any_number_of_threads_finds_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, known = market(seed, offers=40, bidders=70)
    bidders = bidders_of(candidates, known, compiled=True)
    asked: list[Any] = []
    rank = Known.rank

    def watched(self: Known, given: Any, *, threads: int = 0) -> Rankings:
        asked.append(list(given))
        return rank(self, given, threads=threads)

    monkeypatch.setattr(Known, "rank", watched)
    assert rank_all([answered(one) for one in candidates], bidders) is not None
    assert bidders.compiled is not None
    alone = rank(bidders.compiled, asked[0], threads=1)
    assert sum(alone.of(number)[0].size for number in range(40)) > 300
    for threads in (0, 2, 3, 8, 100):
        found = rank(bidders.compiled, asked[0], threads=threads)
        for number in range(40):
            assert all(map(np.array_equal, found.of(number), alone.of(number)))


@compiled_only
def test_bidders_whose_keys_begin_alike_are_told_apart() -> None:
    """Nobody draws the keys of the others: they may lie as close together as somebody takes the pains to make them."""
    candidates, known = market(2, offers=4, bidders=200)
    for alike in (b"", b"\x00" * 4, b"\xff" * 4):
        made = [
            Candidate(
                c.offer_id, c.offer, [(i, replace(b, solver=alike + b.solver[len(alike) :])) for i, b in c.bids],
                c.round_number, now_ns=NOW,
            )
            for c in candidates
        ]  # fmt: skip
        facts = {**known, "reputation_of": lambda _: Reputation.known(9, 0), "reachable": lambda key: key[7] > 20}
        fast, plain = (bidders_of(made, facts, compiled=compiled) for compiled in (True, False))
        for one in made:
            assert_same_ranking(one, fast, plain)


@compiled_only
@given(st.lists(st.one_of(st.integers(0, 5), st.integers(0, 2**28 - 1), st.just(-1)), min_size=1, max_size=60))
def test_the_compiled_median_is_that_of_numpy(drawn: list[int]) -> None:
    costs = np.array([[NEVER if one < 0 else one for one in drawn]], np.int64)
    auction = Auction.of(costs, NEVER)
    assert auction is not None
    possible = [one for one in drawn if one >= 0]
    assert auction.scale(0, 2**30) == (int(np.median(possible)) if possible else 0)
    assert auction.dearest == max(possible, default=0)


@compiled_only
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 70), st.integers(1, 140), st.sampled_from([2, 9, 1000, 2**35]))
def test_auctions_with_many_ties_end_alike_over_many_blocks(seed: int, rows: int, columns: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.integers(0, most, (rows, columns), np.int64) * rng.integers(1, 4, (rows, 1))
    costs[rng.random((rows, columns)) < 0.3] = NEVER
    assert_same_assignment(costs, rng.integers(0, 4 * most, rows, np.int64))


@compiled_only
def test_a_bid_of_a_stranger_to_the_round_is_a_bug_and_stops_it() -> None:
    candidates, known = market(1, offers=2, bidders=20)
    few = {bid.solver for bid in [one for _, one in candidates[1].bids][:1]}
    bidders = Bidders.of(few, **known)
    assert bidders is not None
    with pytest.raises(AssertionError, match="not among the bidders"):
        match_columns(candidates, bidders)
