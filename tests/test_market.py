"""The order book and the match: bounded, order-free, auditable, and never without a reason."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from market.book import OrderBook
from market.matching import Proven, match_round, refuse_offer
from market.quoting import channel_micro, quote, sampled_segments
from market.reputation import Reputation
from protocol import params
from protocol.codec import blake
from protocol.errors import LimitExceeded, MalformedRecord, VerificationFailed
from protocol.forced import NO_ERRORS
from protocol.network import Rules
from protocol.records import Ask, Bid, Offer, amount_for

NETWORK = bytes(32)
NOW = 10**18


def peer(number: int) -> bytes:
    return number.to_bytes(32, "big")


def offer(**changes: object) -> Offer:
    fields: dict[str, object] = {
        "network": NETWORK,
        "submitter": peer(1),
        "nonce": 1,
        "task": bytes(32),
        "program": bytes(32),
        "data": bytes(32),
        "mode": "exact",
        "first_segment": 0,
        "last_segment": 10,
        "operations": 10**12,
        "memory_bytes": 2**20,
        "checkpoint_bytes": 100,
        "sandbox": 2,
        "unit_price_max": 1000,
        "budget_micro": 10**7,
        "check_permille": 200,
        "lock_micro": 100,
        "created_ns": NOW,
        "expires_ns": NOW + 10**9,
    }
    return Offer(**{**fields, **changes})  # type: ignore[arg-type]


def bid(solver: int, **changes: object) -> tuple[bytes, Bid]:
    fields: dict[str, object] = {
        "network": NETWORK,
        "offer": blake("offer"),
        "solver": peer(solver),
        "unit_price": 500,
        "operations_cap": 10**12,
        "lock_micro": 100,
        "eta_ns": 10**9,
        "sandbox": 2,
        "seed_commitment": bytes(32),
        "forced_commitment": b"c" * 32,
        "nonce": 1,
        "created_ns": NOW,
        "expires_ns": NOW + 10**9,
    }
    made = Bid(**{**fields, **changes})  # type: ignore[arg-type]
    return blake("bid", msgspec.msgpack.encode(made)), made


def ask(number: int, **changes: object) -> Ask:
    fields: dict[str, object] = {
        "network": NETWORK,
        "peer": peer(number),
        "slot": 0,
        "sequence": 1,
        "roles": 1,
        "unit_price": 100 * number,
        "memory_bytes": 2**30,
        "sandbox": 4,
        "operations_per_second": 10**9,
        "created_ns": NOW,
        "expires_ns": NOW + 10**9,
    }
    return Ask(**{**fields, **changes})  # type: ignore[arg-type]


def match(
    bids: list[tuple[bytes, Bid]],
    *,
    stake: int = 1000,
    round_number: int = 0,
    records: dict[bytes, Reputation] | None = None,
    excluded: tuple[bytes, ...] = (),
    offer_id: bytes = b"o",
    proven: dict[bytes, Proven] | None = None,
):  # type: ignore[no-untyped-def]
    return match_round(
        offer(),
        offer_id,
        bids,
        round_number=round_number,
        free_stake_micro=lambda _: stake,
        reputation_of=lambda p: (records or {}).get(p, Reputation.known(20, 0)),
        excluded=excluded,
        reachable=lambda p: p != peer(99),
        proven=lambda p: (proven or {}).get(p, Proven("none", 0)),
    )


def test_the_cheaper_of_two_equals_wins_whatever_the_order() -> None:
    bids = [bid(2, unit_price=700), bid(3, unit_price=600), bid(4, unit_price=650)]
    winners = {match(random.Random(i).sample(bids, 3)).winner.solver for i in range(10)}
    assert winners == {peer(3)}


def test_a_measured_speed_wins_against_a_boast_of_the_same_price() -> None:
    hour = 3600 * 10**9
    bids = [bid(2, eta_ns=6 * hour // 10), bid(3, eta_ns=hour)]
    assert match(bids).winner.solver == peer(2)
    assert match(bids, proven={peer(3): Proven("witnessed", 10**15)}).winner.solver == peer(3)


def test_a_card_exposes_a_bid_that_promises_more_than_the_device_does() -> None:
    hour = 3600 * 10**9
    bids = [bid(2, eta_ns=1), bid(3, eta_ns=hour)]
    slow = max(1, offer().operations // 7200)  # two hours for this work, however short the bid says
    proven = {peer(2): Proven("witnessed", slow), peer(3): Proven("witnessed", 10**15)}
    assert match(bids).winner.solver == peer(2)
    assert match(bids, proven=proven).winner.solver == peer(3)


def test_a_bad_record_costs_more_than_a_small_discount() -> None:
    bids = [bid(2, unit_price=490), bid(3, unit_price=500)]
    records = {peer(2): Reputation.known(3, 3), peer(3): Reputation.known(30, 0)}
    assert match(bids, records=records).winner.solver == peer(3)


@pytest.mark.parametrize(
    ("code", "bids", "more"),
    [
        ("price", [bid(2, unit_price=1001)], {}),
        ("lock", [bid(2, lock_micro=99)], {}),
        ("stake", [bid(2)], {"stake": 50}),
        ("operations", [bid(2, operations_cap=10**11)], {}),
        ("sandbox", [bid(2, sandbox=1)], {}),
        ("excluded", [bid(2)], {"excluded": (peer(2),)}),
        ("unreachable", [bid(99)], {}),
        ("self", [bid(1)], {}),
    ],
)
def test_every_refused_bid_gets_its_reason(code: str, bids: list[tuple[bytes, Bid]], more: dict[str, object]) -> None:
    choice = match(bids, **more)
    assert choice.winner is None
    assert [refusal.code for _, refusal in choice.refused] == [code]


def test_a_job_on_credit_goes_to_the_best_of_those_who_give_enough_of_it() -> None:
    on_credit = offer(budget_micro=0)
    need = amount_for(on_credit.operations, 600)
    bids = [bid(2, unit_price=500), bid(3, unit_price=600), bid(4, unit_price=600)]
    choice = match_round(
        on_credit, b"o", bids, round_number=0, free_stake_micro=lambda _: 10**9,
        reputation_of=lambda _: Reputation.known(20, 0),
        excluded=(), reachable=lambda _: True, credit_micro=lambda p: {peer(3): need, peer(4): need - 1}.get(p, 0),
    )  # fmt: skip
    assert choice.winner is not None
    assert choice.winner.solver == peer(3)
    assert [(solver, refusal.code) for solver, refusal in choice.refused] == [(peer(2), "credit"), (peer(4), "credit")]
    assert match(bids).winner.solver == peer(2), "one with a budget asks nobody for credit"


def test_newcomers_get_their_share_of_rounds_and_the_audit_sees_why() -> None:
    bids = [bid(2, unit_price=500), bid(3, unit_price=600)]
    records = {peer(2): Reputation.known(50, 0), peer(3): Reputation.known(0, 0)}
    explored = [match(bids, round_number=i, records=records) for i in range(2000)]
    share = sum(c.explored and c.winner.solver == peer(3) for c in explored) / 2000
    assert abs(share - params.EXPLORATION_PERMILLE / 1000) < 0.02
    assert match(bids, round_number=7, records=records) == match(bids, round_number=7, records=records)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_trust_is_a_pessimistic_probability(right: int, wrong: int) -> None:
    ppm = Reputation.known(right, wrong).bound_ppm
    assert 0 <= ppm <= 1_000_000 * (right + 1) // (right + wrong + 2)
    assert Reputation.known(right + 1, wrong).bound_ppm >= ppm


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("price", {"unit_price_max": 99}),
        ("memory", {"memory_bytes": 2**31}),
        ("sandbox", {"sandbox": 4}),
        ("mode", {"mode": "tolerant"}),
        ("mode", {"tolerance": b"t" * 32}),
        ("role", {"mode": "profile"}),
        ("stake", {"lock_micro": 10**9}),
    ],
)
def test_a_solver_that_does_not_bid_knows_why(code: str, changes: dict[str, object]) -> None:
    means = {"unit_price": 100, "memory_bytes": 2**30, "sandbox": 3, "stake_micro": 1000, "slots_free": 1}
    refusal = refuse_offer(offer(**changes), **means)
    assert refusal is not None
    assert refusal.code == code
    assert refuse_offer(offer(), **means) is None
    if code == "sandbox":
        assert refusal.why == "needs sandbox level CONTAINED, this machine has NAMESPACED"
    busy = refuse_offer(offer(), **{**means, "slots_free": 0})
    assert busy is not None
    assert busy.code == "busy"


def test_the_newest_ask_stands_and_two_of_one_number_are_equivocation() -> None:
    book = OrderBook()
    assert book.add_ask(ask(2, sequence=2), now_ns=NOW)
    assert not book.add_ask(ask(2, sequence=1), now_ns=NOW)
    assert not book.add_ask(ask(2, sequence=2), now_ns=NOW)
    with pytest.raises(VerificationFailed, match="equivocates"):
        book.add_ask(ask(2, sequence=2, unit_price=1), now_ns=NOW)
    assert book.equivocations == {peer(2): 1}


def test_one_author_cannot_fill_the_book() -> None:
    book = OrderBook()
    for i in range(params.BOOK_OFFERS_PER_AUTHOR_MAX):
        book.add_offer(blake("o", i.to_bytes(2, "big")), offer(nonce=i), now_ns=NOW)
    with pytest.raises(LimitExceeded):
        book.add_offer(blake("one more"), offer(nonce=9999), now_ns=NOW)
    book.add_offer(blake("another's"), offer(submitter=peer(5)), now_ns=NOW)


def test_an_author_whose_offers_and_asks_left_may_bring_others() -> None:
    """The counts follow what stands, whichever way it leaves: by its time, by an award, or with its author."""
    book = OrderBook()
    for i in range(params.BOOK_OFFERS_PER_AUTHOR_MAX):
        book.add_offer(blake("o", i.to_bytes(2, "big")), offer(nonce=i, expires_ns=NOW + 1 + i % 2), now_ns=NOW)
    half = params.BOOK_OFFERS_PER_AUTHOR_MAX // 2
    assert len(book.expire(now_ns=NOW + 1)) == half
    for i in range(half):
        book.add_offer(blake("p", i.to_bytes(2, "big")), offer(nonce=i), now_ns=NOW + 1)
    with pytest.raises(LimitExceeded):
        book.add_offer(blake("one more"), offer(), now_ns=NOW + 1)
    book.take_offer(blake("p", bytes(2)), now_ns=NOW + 1)
    assert book.add_offer(blake("one more"), offer(), now_ns=NOW + 1)
    for slot in range(params.BOOK_ASKS_PER_AUTHOR_MAX):
        book.add_ask(ask(2, slot=slot), now_ns=NOW)
    with pytest.raises(LimitExceeded):
        book.add_ask(ask(2, slot=99), now_ns=NOW)
    book.remove_peer(peer(2))
    assert book.add_ask(ask(2, slot=99), now_ns=NOW)


def test_an_award_is_remembered_as_long_as_a_copy_of_its_offer_could_live() -> None:
    book = OrderBook()
    book.add_offer(b"a", offer(), now_ns=NOW)
    book.take_offer(b"a", now_ns=NOW)
    for other in range(500):  # offers that come and go do not make it forgotten
        book.add_offer(bytes([other % 256, other // 256]), offer(nonce=other), now_ns=NOW)
        book.remove_offer(bytes([other % 256, other // 256]))
    book.expire(now_ns=NOW + params.RECORD_LIFETIME_NS_MAX - 1)
    assert book.taken
    book.expire(now_ns=NOW + params.RECORD_LIFETIME_NS_MAX)
    assert not book.taken


def test_a_place_for_a_bid_is_taken_from_one_past_its_time() -> None:
    book = OrderBook()
    book.add_offer(blake("offer"), offer(), now_ns=NOW)
    for number in range(params.BOOK_BIDS_PER_OFFER_MAX):
        book.add_bid(*bid(number + 2, expires_ns=NOW + 1 + (number > 0)), now_ns=NOW, envelope=b"e")
    with pytest.raises(LimitExceeded):
        book.add_bid(*bid(999), now_ns=NOW)
    assert book.add_bid(*bid(999), now_ns=NOW + 1, envelope=b"e")
    assert len(book.live_bids(blake("offer"), now_ns=NOW + 1)) == params.BOOK_BIDS_PER_OFFER_MAX
    assert len(book.envelopes) == params.BOOK_BIDS_PER_OFFER_MAX
    bids, packed = book.round_bids(blake("offer"), now_ns=NOW + 1)
    assert sorted(bids) == book.live_bids(blake("offer"), now_ns=NOW + 1)
    assert len(packed) == 72 * sum(bool(book.envelopes.get(bid_id)) for bid_id, _ in bids)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"created_ns": NOW + params.CLOCK_SKEW_NS_MAX + 10**9, "expires_ns": NOW + 10**15}, VerificationFailed),
        ({"expires_ns": NOW}, VerificationFailed),
        ({"expires_ns": NOW + params.RECORD_LIFETIME_NS_MAX + 1}, MalformedRecord),
        ({"operations": 0}, MalformedRecord),
        ({"first_segment": 10}, MalformedRecord),
    ],
)
def test_records_out_of_time_or_sense_are_refused(changes: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        OrderBook().add_offer(b"o", offer(**changes), now_ns=NOW)


def test_what_expires_leaves_and_what_was_taken_does_not_come_back() -> None:
    book = OrderBook()
    book.add_offer(b"a", offer(), now_ns=NOW)
    book.add_offer(b"b", offer(nonce=2), now_ns=NOW)
    book.add_bid(*bid(3, offer=blake("a")), now_ns=NOW)
    book.take_offer(b"b", now_ns=NOW)
    assert not book.add_offer(b"b", offer(nonce=2), now_ns=NOW)
    assert book.expire(now_ns=NOW + 2 * 10**9) == [b"a"]
    assert (book.offers, book.bids) == ({}, {})


@given(st.integers(1, 200), st.integers(1, 10**12), st.integers(0, 10**6))
def test_a_channel_always_covers_the_work_and_twice_its_checks(segments: int, per_segment: int, price: int) -> None:
    rules = Rules()
    total = segments * per_segment
    held = channel_micro(
        rules,
        operations=total,
        segments=segments,
        unit_price=price,
        operations_per_segment=per_segment,
        permille=200,
    )
    checks = 2 * sampled_segments(rules, segments, 200) * per_segment
    assert held >= (total + checks) * price // 10**9 - 1


def test_a_quote_tells_price_speed_and_who_is_too_dear() -> None:
    book = OrderBook()
    for number in (2, 3, 9):
        book.add_ask(ask(number), now_ns=NOW)
    made = quote(book.asks.shelf(role=1, now_ns=NOW), operations=10**12, unit_price_max=500)
    assert (made.solvers, made.low_micro, made.median_micro, made.high_micro) == (3, 200_000, 300_000, 900_000)
    assert (made.too_dear, made.limit_for_all, made.fastest_seconds) == (1, 900, 1000.0)
    nobody = book.asks.shelf(role=1, now_ns=NOW, memory_bytes=2**40)
    assert quote(nobody, operations=1, unit_price_max=None).solvers == 0


def test_only_a_unit_of_a_parallel_job_is_bid_on_without_ordered_errors() -> None:
    """Else a solver could keep whistleblowers away from any work by its bid."""
    for units, accepted in ((0, False), (2, True)):
        book = OrderBook()
        book.add_offer(blake("offer"), offer(units=units), now_ns=NOW)
        made = bid(1, forced_commitment=NO_ERRORS)
        if accepted:
            assert book.add_bid(*made, now_ns=NOW)
        else:
            with pytest.raises(VerificationFailed, match="rules ordered errors out"):
                book.add_bid(*made, now_ns=NOW)
