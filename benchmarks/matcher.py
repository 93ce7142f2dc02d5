"""The market of one peer at its limits: a round over many offers, and a book full of asks and offers.

Run `python benchmarks/matcher.py [--offers N] [--asks N] [--json]`. A round's costs are made as the matcher scores
them: price times operations, times a risk of failure, plus a price of waiting; the best bid of each offer in turn is
the baseline. The book's baseline is the scan: the rule of the market held against every ask, one after the other. RSS
is what /proc says before the asks come and after. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np

from market.assignment import Costs, assign
from market.book import OrderBook
from market.feasibility import refuse_ask
from market.ledger import Ledger
from market.matching import Proven
from market.reputation import Reputation
from market.rounds import Candidate, match_offers
from market.scoring import pack_bid
from peer.bidding import Bidder
from peer.desk import Desk, Means
from peer.settler import Settler
from protocol import params
from protocol.codec import blake, decode, encode
from protocol.keys import SigningKey
from protocol.network import Network, Rules
from protocol.records import Ask, Bid, Offer

SEEDS = range(5)
NOW = 1_700_000_000 * 10**9
LINKS = 60  # connected peers, of whom more is known than their asks say
QUERIES = 200
SCANS = 5


def scores(seed: int, rows: int, columns: int) -> Costs:
    """Scores in micro-credits of `rows` offers for `columns` solvers, as a market of mixed machines has them."""
    rng = np.random.default_rng(seed)
    operations = rng.lognormal(0, 1, rows)
    price, risk, speed = rng.uniform(1, 2, columns), rng.uniform(0, 0.3, columns), rng.lognormal(0, 0.5, columns)
    wait = operations[:, None] / speed * rng.uniform(0.8, 1.2, (rows, columns))
    made: Costs = (1e6 * operations[:, None] * price * (1 + risk) + 3e5 * wait).astype(np.int64)
    return made


def in_turn(costs: Costs) -> int:
    """The sum where each offer in turn takes the best that is left."""
    free, total = costs.copy(), 0
    for row in range(len(costs)):
        best = int(free[row].argmin())
        total += int(costs[row, best])
        free[:, best] = 2**62
    return total


def candidates_of(offers: int, bids: int) -> list[Candidate]:
    """So many open offers of one peer, each with a bid of every one of so many solvers, as its book holds them."""
    keys = [blake("solver", n.to_bytes(4, "big")) for n in range(bids)]
    made = []
    for number in range(offers):
        offer_id = blake("offer", number.to_bytes(4, "big"))
        answers = [
            (blake("bid", key, number.to_bytes(4, "big")), Bid(
                network=bytes(32), offer=offer_id, solver=key, unit_price=500 + (place * 7919) % 400,
                operations_cap=2**60, lock_micro=100, eta_ns=10**9, sandbox=2, seed_commitment=bytes(32),
                forced_commitment=bytes(32), nonce=1, created_ns=NOW, expires_ns=NOW + 10**12,
            )) for place, key in enumerate(keys)
        ]  # fmt: skip
        offer = wanted(number, operations=10**12 + number * 10**9, unit_price_max=1000)
        packed = b"".join(pack_bid(*answer) for answer in answers)
        made.append(Candidate(offer_id, offer, answers, 0, (), 0, NOW, packed))
    return made


def round_ms(candidates: list[Candidate], *, columns_min: int = 0) -> tuple[float, list[bytes]]:
    """Milliseconds of a whole round over signed bids, every one refused or scored, then the auction; and who won. With
    a large columns_min by records, one bid after the other."""
    bidders = {bid.solver for one in candidates for _, bid in one.bids}  # the node gathers them before
    with patch.object(params, "ROUND_COLUMNS_MIN", columns_min):
        start = time.perf_counter()
        choices = match_offers(
            candidates, free_stake_micro=lambda _: 10**9, reputation_of=lambda _: Reputation.known(20, 0),
            reachable=lambda _: True, proven=lambda _: Proven("none", 0), bidders=bidders,
        )  # fmt: skip
        taken = (time.perf_counter() - start) * 1e3
    return taken, [choices[one.offer_id].winner.bid_id for one in candidates]  # type: ignore[union-attr]


def rounds(size: int) -> dict[str, float]:
    """Rounds in columns against rounds of records, of like size in turns, and the largest in columns alone."""
    figures: dict[str, float] = {}
    for side in (16, 64, 256):
        candidates = candidates_of(side, side)
        pairs = [(round_ms(candidates), round_ms(candidates, columns_min=2**62)) for _ in SEEDS]
        assert all(columns[1] == records[1] for columns, records in pairs), "columns and records differ"
        figures[f"round_{side}x{side}_ms"] = round(statistics.median(columns[0] for columns, _ in pairs), 1)
        figures[f"round_{side}x{side}_records_ms"] = round(statistics.median(records[0] for _, records in pairs), 1)
    candidates = candidates_of(size, size)
    figures[f"round_{size}x{size}_ms"] = round(statistics.median(round_ms(candidates)[0] for _ in SEEDS), 1)
    return figures


def wanted(number: int, **terms: object) -> Offer:
    """An offer of the author `number`."""
    made: dict[str, object] = {
        "network": bytes(32), "submitter": blake("submitter", number.to_bytes(4, "big")), "nonce": number,
        "task": bytes(32), "program": bytes(32), "data": bytes(32), "mode": "exact", "first_segment": 0,
        "last_segment": 10, "operations": 10**13, "memory_bytes": 2**31, "checkpoint_bytes": 100, "sandbox": 2,
        "unit_price_max": 1200, "budget_micro": 10**9, "check_permille": 50, "lock_micro": 100, "created_ns": NOW,
        "expires_ns": NOW + 3600 * 10**9, "deadline_ns": NOW + 600 * 10**9,
    }  # fmt: skip
    return Offer(**{**made, **terms})  # type: ignore[arg-type]


def asks_heard(count: int) -> list[bytes]:
    """The bytes of `count` asks, as gossip brings them, of a market of mixed machines."""
    rng = random.Random(1)
    return [
        encode(Ask(
            network=bytes(32), peer=blake("peer", n.to_bytes(4, "big")), slot=0, sequence=1,
            roles=rng.choice([1, 1, 1, 2, 3]), unit_price=rng.randrange(500, 2000),
            memory_bytes=rng.choice([2**30, 2**32, 2**34]), sandbox=rng.randrange(5),
            operations_per_second=rng.randrange(10**9, 10**12), created_ns=NOW, expires_ns=NOW + 600 * 10**9,
        )) for n in range(count)
    ]  # fmt: skip


def rss_mib() -> float:
    """The memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def timed(act: Callable[[], object], times: int) -> list[float]:
    """Milliseconds of each of so many runs, in order."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        act()
        taken.append((time.perf_counter() - start) * 1e3)
    return sorted(taken)


def full_book(count: int) -> dict[str, float]:
    """A book of `count` asks: its memory, what one more costs, and questions of three kinds against the scan."""
    heard = asks_heard(count)
    book, before = OrderBook(), rss_mib()
    start = time.perf_counter()
    for data in heard:
        book.add_ask(decode(Ask, data, bytes_max=4096), now_ns=NOW)
    figures = {
        "book_asks": float(count),
        "book_rss_mib": round(rss_mib() - before, 1),
        "book_put_us": round((time.perf_counter() - start) * 1e6 / count, 2),
    }
    offer = wanted(0)
    links = [blake("peer", n.to_bytes(4, "big")) for n in range(0, count, max(1, count // LINKS))]

    def known(ask: Ask, reachable: bool = True) -> object:
        return refuse_ask(offer, ask, now_ns=NOW, reachable=reachable, free_stake_micro=10**9)

    def scan() -> tuple[int, Counter[str], list[Ask]]:
        refused = [(ask, known(ask)) for ask in book.asks]
        able = sorted((a.unit_price, a.peer, a) for a, why in refused if why is None)
        return len(able), Counter(why.code for _, why in refused if why is not None), [a for *_, a in able[:100]]

    asks = book.asks
    kinds: dict[str, Callable[[], object]] = {
        "count": lambda: asks.survey(offer, now_ns=NOW),
        "cheapest_100": lambda: asks.survey(offer, now_ns=NOW, cheapest=100),
        "cheapest_100_links": lambda: asks.survey(offer, now_ns=NOW, known=links, refuse=known, cheapest=100),
        "script": lambda: asks.survey(wanted(0, mode="script", unit_price_max=10**6), now_ns=NOW, cheapest=100),
    }
    for name, ask_it in kinds.items():
        taken = timed(ask_it, QUERIES)
        figures[f"book_{name}_p50_ms"] = round(taken[QUERIES // 2], 2)
        figures[f"book_{name}_p95_ms"] = round(taken[QUERIES * 95 // 100], 2)
    figures["book_scan_p50_ms"] = round(timed(scan, SCANS)[SCANS // 2], 1)
    found = asks.survey(offer, now_ns=NOW, cheapest=100)
    assert (found.able, found.refused, list(found.cheapest)) == scan(), "the index and the scan differ"
    return figures


def full_of_offers() -> dict[str, float]:
    """A solver's tick with BOOK_OFFERS_MAX offers, none of which it takes; the baseline considers each in each tick."""
    network = Network(name="benchmark", rules=Rules(), deposits=())
    desk = Desk(
        key=SigningKey.from_seed(bytes(32)), network=network, rng=random.Random(1), ledger=Ledger(), now_ns=NOW,
        means=Means(roles=1, unit_price=5000, memory_bytes=2**33, sandbox=4),
    )  # fmt: skip
    bidder = Bidder(desk, Settler(desk), slots_free=lambda: 1)
    for number in range(params.BOOK_OFFERS_MAX):
        offer_id = blake("offer", number.to_bytes(4, "big"))
        desk.book.add_offer(offer_id, wanted(number), now_ns=NOW)
        bidder.consider(offer_id, desk.book.offers[offer_id])

    def tick() -> None:
        desk.now_ns += params.TICK_MS * 10**6
        bidder.tick()
        desk.book.expire(now_ns=desk.now_ns)
        desk.effects.clear()

    def consider_all() -> None:
        for offer_id, one in desk.book.offers.items():
            bidder.consider(offer_id, one)

    after_change = timed(tick, params.BOOK_OFFERS_MAX // params.OFFERS_LOOKED_AT_MAX)
    idle = timed(tick, QUERIES)
    return {
        "offers": float(params.BOOK_OFFERS_MAX),
        "offers_tick_idle_ms": round(idle[QUERIES // 2], 2),
        "offers_tick_after_change_ms": round(after_change[len(after_change) // 2], 2),
        "offers_consider_all_ms": round(timed(consider_all, SCANS)[SCANS // 2], 1),
    }


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--offers", type=int, default=1000)
    parser.add_argument("--asks", type=int, default=params.BOOK_ASKS_MAX)
    parser.add_argument("--json", action="store_true", help="the last line only")
    given = parser.parse_args()
    book = full_book(given.asks)  # first: what others leave behind is no part of its memory
    taken, ratios = [], []
    for seed in SEEDS:
        costs = scores(seed, given.offers, given.offers)
        start = time.perf_counter()
        places = assign(costs, costs.max(axis=1) * 2)
        taken.append((time.perf_counter() - start) * 1e3)
        ratios.append(sum(int(costs[row, place]) for row, place in enumerate(places)) / in_turn(costs))
    figures = {
        f"assign_{given.offers}x{given.offers}_ms": round(statistics.median(taken), 1),
        "cost_against_in_turn": round(statistics.mean(ratios), 4),
        **rounds(given.offers),
        **book,
        **full_of_offers(),
    }
    if not given.json:
        for name, value in figures.items():
            print(f"{name:28} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
