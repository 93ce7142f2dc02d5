"""A solver's bids: every offer gets its answer in time, and one that nothing changed for costs no tick anything."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from market.ledger import Ledger, deposit
from peer.bidding import Bidder
from peer.desk import Desk, Means
from peer.settler import Settler
from protocol import params
from protocol.codec import blake
from protocol.keys import SigningKey
from protocol.network import Network, Rules
from protocol.records import Bid, Offer
from tests.test_market import offer

NETWORK = Network(name="bidding", rules=Rules(), deposits=())
KEY = SigningKey.from_seed(bytes(32))
START_NS = 10**18
LIFETIME_NS = NETWORK.rules.bid_lifetime_ms * 10**6


class Solver:
    """A bidder with a clock, whose looks at offers are counted."""

    def __init__(self, **means: Any) -> None:
        ledger = Ledger()
        ledger.post(deposit(bytes(32), KEY.public, 10**9, 10**9))
        terms = Means(**{"roles": 1, "unit_price": 500, "memory_bytes": 2**30, "sandbox": 4, **means})
        self.desk = Desk(key=KEY, network=NETWORK, rng=random.Random(1), ledger=ledger, means=terms, now_ns=START_NS)
        self.bidder = Bidder(self.desk, Settler(self.desk), slots_free=lambda: self.free)
        self.free, self.looks = 1, 0
        consider = self.bidder.consider

        def counted(offer_id: bytes, one: Offer) -> None:
            self.looks += 1
            consider(offer_id, one)

        self.bidder.consider = counted  # type: ignore[method-assign]

    def hear(self, number: int, **terms: Any) -> bytes:
        offer_id = blake("offer", number.to_bytes(4, "big"))
        lasting = {"expires_ns": START_NS + 3600 * 10**9, "created_ns": START_NS}
        author = {"network": NETWORK.id, "submitter": (number + 1).to_bytes(32, "big"), "nonce": number}
        one = offer(**{**author, **lasting, **terms})
        self.desk.book.add_offer(offer_id, one, now_ns=self.desk.now_ns)
        self.bidder.consider(offer_id, one)
        return offer_id

    def tick(self, *, after_ns: int = params.TICK_MS * 10**6) -> int:
        """The looks of one tick."""
        self.desk.now_ns += after_ns
        self.looks = 0
        self.bidder.tick()
        return self.looks

    def bids(self) -> list[Bid]:
        return [bid for on_offer in self.desk.book.bids.values() for _, bid in on_offer.values()]


def test_an_offer_that_was_refused_is_looked_at_again_only_after_a_change() -> None:
    solver = Solver()
    refused = solver.hear(1, memory_bytes=2**31)
    solver.tick()
    assert [solver.tick() for _ in range(20)] == [0] * 20
    assert solver.bidder.refusals[refused].code == "memory"
    solver.desk.means = replace(solver.desk.means, memory_bytes=2**31)
    assert solver.tick() == 1
    assert (solver.bidder.refusals, len(solver.bids())) == ({}, 1)


@pytest.mark.parametrize("change", ["slot", "price", "stake", "pause"])
def test_whatever_brings_a_bid_within_reach_is_noticed(change: str) -> None:
    solver = Solver(unit_price=2000 if change == "price" else 500)
    solver.free = 0 if change == "slot" else 1
    solver.desk.paused_ns = START_NS if change == "pause" else 0
    solver.hear(1, lock_micro=2 * 10**9 if change == "stake" else 100)
    solver.tick()
    assert not solver.bids()
    match change:
        case "slot":
            solver.free = 1
        case "price":
            solver.desk.means = replace(solver.desk.means, unit_price=1000)
        case "stake":
            solver.desk.post(deposit(b"m" * 32, KEY.public, 0, 10**9))
        case "pause":
            solver.desk.paused_ns = 0
    solver.tick()
    assert len(solver.bids()) == 1


def test_what_changed_and_changed_back_between_two_ticks_is_noticed() -> None:
    """A slot is taken and freed within a tenth of a second, and an offer comes in between."""
    solver = Solver()
    solver.tick()
    solver.free = 0
    solver.hear(1)
    assert not solver.bids()
    solver.free = 1
    solver.tick()
    assert len(solver.bids()) == 1


def test_a_bid_is_renewed_at_half_its_life_and_never_past_its_offers_end() -> None:
    solver = Solver()
    solver.hear(1)
    short = solver.hear(2, expires_ns=START_NS + LIFETIME_NS // 4)
    made = {bid.nonce for bid in solver.bids()}
    solver.tick()
    assert {bid.nonce for bid in solver.bids()} == made
    assert solver.tick(after_ns=LIFETIME_NS // 8) == 0
    assert [i for i in solver.bidder.bid_on if i == short] == [short]
    solver.desk.now_ns = START_NS
    assert solver.tick(after_ns=LIFETIME_NS // 2) == 1
    (renewed,) = [bid for bid in solver.bids() if bid.nonce not in made]
    assert renewed.expires_ns == solver.desk.now_ns + LIFETIME_NS
    solver.desk.book.expire(now_ns=solver.desk.now_ns)
    solver.tick()
    assert list(solver.bidder.bid_on) == [renewed.offer]
    assert len(solver.bidder.seeds) == 2, "the first bid can still be awarded"
    solver.tick(after_ns=LIFETIME_NS // 2)
    assert next(kept[2] for kept in solver.bidder.seeds.values()) == renewed


def test_a_full_book_is_looked_through_in_turns_and_then_rests() -> None:
    solver = Solver()
    count = 3 * params.OFFERS_LOOKED_AT_MAX
    for number in range(count):
        solver.hear(number, unit_price_max=1)
    solver.tick()
    looks = [solver.tick() for _ in range(4)]
    assert looks == [params.OFFERS_LOOKED_AT_MAX, params.OFFERS_LOOKED_AT_MAX, 0, 0]
    solver.desk.means = replace(solver.desk.means, unit_price=1)
    looks = [solver.tick() for _ in range(5)]
    assert looks == [params.OFFERS_LOOKED_AT_MAX] * 3 + [0, 0]
    assert len(solver.bids()) == count
