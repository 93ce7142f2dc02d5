"""Hostile records of the market: each is refused by a typed reason and counted, and nothing else changes."""

from __future__ import annotations

import itertools
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from market.ledger import Ledger
from peer import messages as m
from peer.desk import MARKET, SETTLEMENT, Desk, Means
from peer.drops import REASONS, Drops, merged
from peer.events import Emit, GossipIn, MessageIn, Penalise, Post, Publish, Save, Tick
from peer.intake import Bundle, records_in, refuse_bundle
from peer.messages import pack
from peer.node import Node
from peer.simulator import SECOND, Faults, Simulation
from peer.standing import GossipRates
from protocol import params
from protocol.codec import decode, encode
from protocol.errors import LimitExceeded, MalformedRecord
from protocol.keys import SigningKey
from protocol.network import Network, Rules
from protocol.records import Ask, Bid, Envelope, Offer, Record, seal
from tests.swarm_scenario import make_swarm, submit

EVE, MALLORY = SigningKey.from_seed(b"e" * 32), SigningKey.from_seed(b"m" * 32)
NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def market() -> Simulation:
    """A swarm in which alice's offer stands and nobody can take it: its price is too low."""
    simulation = make_swarm(31, Faults(until_ns=0))
    simulation.run(seconds=3)
    submit(simulation, unit_price_max=1)
    simulation.run(seconds=2)
    return simulation


def node_of(simulation: Simulation, name: str = "alice") -> Node:
    node = simulation.peers[name].node
    assert node is not None
    return node


def made(simulation: Simulation, kind: str, **changes: object) -> Record:
    now = simulation.now_ns
    fresh: dict[str, Any] = {"network": simulation.network.id, "created_ns": now, "expires_ns": now + 60 * SECOND}
    if kind == "ask":
        fields = {
            "peer": EVE.public, "slot": 0, "sequence": next(NUMBERS), "roles": 1, "unit_price": 1, "memory_bytes": 1,
            "sandbox": 1, "operations_per_second": 1,
        }  # fmt: skip
        return Ask(**{**fresh, **fields, **changes})
    if kind == "bid":
        offer_id = next(i for i, o in node_of(simulation).desk.book.offers.items() if o.submitter != EVE.public)
        fields = {
            "offer": offer_id, "solver": EVE.public, "unit_price": 1, "operations_cap": 10**12, "lock_micro": 0,
            "eta_ns": 1, "sandbox": 4, "seed_commitment": bytes(32), "forced_commitment": b"c" * 32,
            "nonce": next(NUMBERS),
        }  # fmt: skip
        return Bid(**{**fresh, **fields, **changes})
    fields = {
        "submitter": EVE.public, "nonce": next(NUMBERS), "task": bytes(32), "program": bytes(32), "data": bytes(32),
        "mode": "exact", "first_segment": 0, "last_segment": 1, "operations": 10**9, "memory_bytes": 1,
        "checkpoint_bytes": 1, "sandbox": 1, "unit_price_max": 1, "budget_micro": 1, "check_permille": 50,
        "lock_micro": 0,
    }  # fmt: skip
    return Offer(**{**fresh, **fields, **changes})


def state(node: Node) -> object:
    """All that a record of the market could change, or the money it must not."""
    book = node.desk.book
    return (
        dict(book.offers), sorted(map(encode, book.asks)), {o: dict(b) for o, b in book.bids.items()},
        dict(book.taken), dict(node.witness.barred), node.desk.ledger.balances(), dict(node.settler.log),
        dict(node.settler.pending),
    )  # fmt: skip


def refused(simulation: Simulation, *envelopes: bytes, sender: SigningKey = EVE, direct: bool = False) -> list[str]:
    """Give them to alice; the typed reasons, in order. Fails if anything else changed, or a refusal is not counted."""
    node = node_of(simulation)
    before, drops = state(node), dict(node.desk.drops.totals)
    event: GossipIn | MessageIn = GossipIn(MARKET, sender.public, encode(list(envelopes)))
    if direct:
        event = MessageIn(sender.public, pack(m.Records(envelopes)))
    effects = node.handle(event, simulation.now_ns)
    assert state(node) == before
    assert not [e for e in effects if isinstance(e, Save | Post | Publish)]
    codes = [str(e.data["code"]) for e in effects if isinstance(e, Emit) and e.kind == "refused-bytes"]
    grown = {why: count - drops.get(why, 0) for why, count in node.desk.drops.totals.items()}
    for code in codes:
        assert grown[f"refused-{code}"] == codes.count(code)
        assert any(isinstance(e, Penalise) and e.peer == sender.public for e in effects) or code == "limit-exceeded"
    return codes or [why for why, count in grown.items() for _ in range(count)]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", ["ask", "bid", "offer"])
def test_a_forged_record_is_refused(market: Simulation, kind: str, direct: bool) -> None:
    record = made(market, kind)
    stranger = seal(record, MALLORY)  # signed by who is no party
    torn = bytearray(seal(record, EVE))
    torn[-1] ^= 1
    unsigned = encode([msgspec.msgpack.decode(seal(record, EVE), type=Envelope).body, []])
    swapped = msgspec.msgpack.decode(seal(made(market, kind), EVE), type=Envelope)
    other = encode(Envelope(msgspec.msgpack.decode(seal(record, EVE), type=Envelope).body, swapped.signatures))
    for envelope, code in (
        (stranger, "verification-failed"), (bytes(torn), "verification-failed"), (unsigned, "malformed"),
        (other, "verification-failed"),
    ):  # fmt: skip
        assert refused(market, envelope, direct=direct) == [code]


@pytest.mark.parametrize("kind", ["ask", "bid", "offer"])
def test_a_stale_record_and_one_of_the_future_are_refused(market: Simulation, kind: str) -> None:
    now = market.now_ns
    late = {"created_ns": now - 70 * SECOND, "expires_ns": now - SECOND}
    early = now + params.CLOCK_SKEW_NS_MAX + SECOND
    for_ever = {"expires_ns": now + params.RECORD_LIFETIME_NS_MAX + 1}
    assert refused(market, seal(made(market, kind, **late), EVE)) == ["expired"]
    assert refused(market, seal(made(market, kind, created_ns=early, expires_ns=early + 1), EVE)) == [
        "verification-failed"
    ]
    assert refused(market, seal(made(market, kind, **for_ever), EVE)) == ["malformed"]
    assert refused(market, seal(made(market, kind, network=bytes(32)), EVE)) == ["wrong-network"]


AMOUNTS = {
    "ask": ("unit_price", "memory_bytes", "operations_per_second", "slot", "sequence", "roles", "sandbox"),
    "bid": ("unit_price", "operations_cap", "lock_micro", "eta_ns", "nonce", "sandbox"),
    "offer": (
        "unit_price_max", "budget_micro", "lock_micro", "operations", "memory_bytes", "first_segment", "last_segment",
        "check_permille", "sandbox", "deadline_ns", "device_memory_bytes",
    ),
}  # fmt: skip
BOUNDED = {"unit_price", "unit_price_max", "lock_micro", "budget_micro", "roles", "sandbox", "check_permille"}


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, fields in AMOUNTS.items() for field in fields])
def test_a_negative_a_fractional_and_an_overflowing_amount_are_refused(
    market: Simulation, kind: str, field: str
) -> None:
    for value in (-1, -(2**63), 1.5, "7", None, True, 2**64 - 1):
        if value == 2**64 - 1 and field not in BOUNDED:
            continue  # a Uint may be that large; whoever adds it up does so in Python's integers
        if value is True:
            continue  # msgpack's true is no number, but Python would send 1
        assert refused(market, seal(made(market, kind, **{field: value}), EVE)) == ["malformed"], value


def test_an_offer_of_no_work_is_refused(market: Simulation) -> None:
    for changes in ({"operations": 0}, {"last_segment": 0}, {"first_segment": 9, "last_segment": 9}):
        assert refused(market, seal(made(market, "offer", **changes), EVE)) == ["malformed"]


def test_numbers_as_large_as_they_may_be_stop_no_round(market: Simulation) -> None:
    node, most = node_of(market), 2**63 - 1
    bid = made(market, "bid", operations_cap=most, eta_ns=most, lock_micro=params.AMOUNT_MICRO_MAX)
    node.handle(GossipIn(MARKET, EVE.public, encode([seal(bid, EVE)])), market.now_ns)
    market.run(seconds=3)
    (choice,) = [choice for choice in node.jobs.told.values() if choice is not None]
    assert choice.winner is None or choice.winner.solver != EVE.public
    node.desk.book.remove_peer(EVE.public)


@pytest.mark.parametrize("kind", ["ask", "bid", "offer"])
def test_what_is_replayed_or_comes_late_changes_nothing(market: Simulation, kind: str) -> None:
    key = SigningKey.from_seed(kind.encode().ljust(32, b"r"))
    author = {"ask": "peer", "bid": "solver", "offer": "submitter"}[kind]
    old, new = (seal(made(market, kind, **{author: key.public}), key) for _ in range(2))
    node = node_of(market)
    node.handle(GossipIn(MARKET, key.public, encode([new])), market.now_ns)
    assert refused(market, new, sender=key) == []  # known: neither news nor a crime
    assert refused(market, new, new, sender=MALLORY, direct=True) == []
    if kind != "offer":  # of which one author may have many
        assert refused(market, old, sender=key) == ["superseded"]
    node.desk.book.remove_peer(key.public)


def test_records_in_any_order_make_the_same_book(market: Simulation) -> None:
    key = SigningKey.from_seed(b"o" * 32)
    envelopes = [seal(made(market, "ask", peer=key.public, slot=n % 3), key) for n in range(9)]
    books = []
    for seed in range(4):
        random.Random(seed).shuffle(envelopes)
        node = node_of(market)
        node.handle(GossipIn(MARKET, key.public, encode(envelopes)), market.now_ns)
        books.append(sorted((a.slot, a.sequence) for a in node.desk.book.asks if a.peer == key.public))
        node.desk.book.remove_peer(key.public)
    assert all(book == books[0] for book in books)


def test_two_records_of_one_place_cost_their_author_its_place(market: Simulation) -> None:
    key = SigningKey.from_seed(b"2" * 32)
    one, two = (made(market, "ask", peer=key.public, sequence=5, unit_price=price) for price in (1, 2))
    node, before = node_of(market), node_of(market).desk.ledger.balances()
    effects = node.handle(GossipIn(MARKET, key.public, encode([seal(one, key), seal(two, key)])), market.now_ns)
    assert [e.data["code"] for e in effects if isinstance(e, Emit) and e.kind == "refused-bytes"] == [
        "verification-failed"
    ]
    assert key.public in node.witness.barred
    assert not [a for a in node.desk.book.asks if a.peer == key.public]
    assert node.desk.ledger.balances() == before
    assert refused(market, seal(made(market, "ask", peer=key.public), key), sender=key) == ["verification-failed"]


def test_a_bid_on_nothing_is_not_kept(market: Simulation) -> None:
    assert refused(market, seal(made(market, "bid", offer=b"n" * 32), EVE)) == ["no-offer"]


def test_an_oversize_record_or_bundle_is_refused(market: Simulation) -> None:
    good = [seal(made(market, "ask", slot=slot), EVE) for slot in range(params.BUNDLE_RECORDS_MAX + 1)]
    assert refused(market, *good) == ["malformed"]
    assert refused(market, bytes(params.GOSSIP_RECORD_BYTES_MAX)) == ["malformed"]
    assert refused(market, *[bytes(900)] * 60) == ["limit-exceeded"]
    for bundle in (good, [bytes(1000)] * 40):
        with pytest.raises(LimitExceeded):
            refuse_bundle(MARKET, EVE.public, encode(bundle))
    refuse_bundle(MARKET, EVE.public, encode(good[:64]))


def test_a_direct_flood_is_dropped_and_counted_by_whom(market: Simulation) -> None:
    node, flooder = node_of(market), SigningKey.from_seed(b"f" * 32)
    noise = pack(m.Records((b"x",) * 512))
    for _ in range(params.SETTLEMENT_LOG_MAX // 512 + 3):
        effects = node.handle(MessageIn(flooder.public, noise), market.now_ns)
    assert not [e for e in effects if isinstance(e, Emit | Penalise)], "what is over the limit costs nothing more"
    rows = {(row["reason"], row["count"]) for row in node.desk.drops.rows() if row["reason"] == "connection-rate"}
    assert rows == {("connection-rate", 3 * 512)}
    market.run(seconds=2)
    effects = node.handle(MessageIn(flooder.public, noise), market.now_ns)
    assert [e for e in effects if isinstance(e, Penalise)], "two seconds later it may try again"


# --- limits ------------------------------------------------------------------------------------------------
@given(st.lists(st.binary(max_size=40), max_size=70))
def test_the_head_of_a_bundle_says_how_many_it_holds(envelopes: list[bytes]) -> None:
    assert records_in(encode(envelopes)) == min(len(envelopes), params.BUNDLE_RECORDS_MAX + 1)


@given(st.binary(max_size=200))
def test_a_bundle_whose_head_lies_is_refused_by_who_decodes_it(data: bytes) -> None:
    assert 0 <= records_in(data) <= params.BUNDLE_RECORDS_MAX + 1
    try:
        bundle = decode(Bundle, data, bytes_max=200)
    except MalformedRecord:
        return
    assert len(bundle) == records_in(data)


def test_an_author_has_a_burst_and_then_its_rate_and_no_other_pays_for_it() -> None:
    rates, a, b = GossipRates(), b"a" * 32, b"b" * 32
    taken = sum(64 for _ in range(100) if not rates.refuse_author(a, records=64, now=0.0))
    assert params.GOSSIP_BURST_RECORDS - 64 < taken <= params.GOSSIP_BURST_RECORDS
    assert rates.refuse_author(a, records=64, now=0.0) == "author-rate"
    assert rates.refuse_author(b, records=64, now=0.0) == ""
    sustained = sum(20 for tick in range(1, 101) if not rates.refuse_author(a, records=20, now=tick / 10))
    assert sustained >= 10 * params.GOSSIP_RECORDS_PER_SECOND_MAX - 20
    passed = sum(64 for _ in range(100) if not rates.refuse_forwarder(a, records=64, size=10, now=0.0))
    assert passed <= 2 * params.GOSSIP_RECORDS_PER_FORWARDER_MAX


def test_we_publish_no_faster_than_others_take_and_keep_the_rest() -> None:
    desk = Desk(EVE, Network("n", Rules(), ()), random.Random(0), Ledger(), Means())
    sent: list[tuple[int, str, int]] = []
    rates, now = GossipRates(), 0
    for number in range(1000):
        desk.publish(SETTLEMENT if number % 4 == 0 else MARKET, b"%04d" % number)
    for tick in range(80):
        desk.now_ns = now = 10**18 + tick * params.TICK_MS * 10**6
        desk.flush_outbox()
        for effect in desk.effects:
            assert isinstance(effect, Publish)
            sent.append((tick, effect.topic, records_in(effect.data)))
            assert not rates.refuse_author(EVE.public, records=records_in(effect.data), now=now / 1e9)
        desk.effects.clear()
    assert sum(count for _, _, count in sent) == 1000 and not desk.outbox
    assert sent[0][1] == SETTLEMENT, "money goes first"
    last = sent[-1][0]
    assert last / 10 + 0.11 >= (1000 - params.GOSSIP_OWN_BURST_RECORDS) / params.GOSSIP_RECORDS_PER_SECOND_MAX
    for _ in range(params.OUTBOX_RECORDS_MAX + 5):
        desk.publish(MARKET, b"x")
    assert desk.drops.totals == {"outbox-full": 5}


def test_drops_are_bounded_in_authors_and_exact_in_total() -> None:
    drops, many = Drops(), params.DROP_AUTHORS_MAX + 500
    for number in range(many):
        drops.note("author-rate", number.to_bytes(32, "big"), now_ns=number, count=2)
    drops.note("busy", b"", now_ns=9)
    assert drops.totals == {"author-rate": 2 * many, "busy": 1}
    rows = drops.rows()
    assert len(rows) <= params.DROP_AUTHORS_MAX + 2
    assert sum(row["count"] for row in rows) == 2 * many + 1
    assert len(drops.news()) == 2 and drops.news() == []
    drops.note("busy", b"", now_ns=10)
    assert drops.news() == [f"dropped 1 (busy, 2 in all): {REASONS['busy']}"]
    both = merged(drops, drops)
    assert both["total"] == 2 * drops.totals.total() and both["reasons"]["busy"] == 4


def test_what_is_dropped_is_told_when_asked(market: Simulation) -> None:
    refused(market, seal(made(market, "bid", offer=b"n" * 32), EVE))
    told = market.command("alice", "drops", {}).result
    assert told["total"] == sum(told["reasons"].values()) >= 1
    assert {"no-offer"} <= {row["reason"] for row in told["rows"] if row["author"]}
    assert all(row["words"] for row in told["rows"])
    node_of(market).handle(Tick(), market.now_ns)
