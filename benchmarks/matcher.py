"""One round over many offers of one peer: the auction against taking them one after the other, and what a score costs.

Run `python benchmarks/matcher.py [--offers N] [--json]`. Costs are made as the matcher scores them: price times
operations, times a risk of failure, plus a price of waiting; the best bid of each offer in turn is the baseline. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from market.assignment import Costs, assign
from market.matching import Proven, Record
from market.rounds import Candidate, match_offers
from protocol.codec import blake
from protocol.records import Bid, Offer

SEEDS = range(5)


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


def signed_round(offers: int, bids: int) -> float:
    """Milliseconds of a whole round over records: every bid refused or scored, then the auction."""
    network, now = bytes(32), 1_700_000_000 * 10**9
    keys = [blake("solver", n.to_bytes(4, "big")) for n in range(bids)]
    made = []
    for number in range(offers):
        offer = Offer(
            network=network, submitter=bytes(32), nonce=number, task=network, program=network, data=network,
            mode="exact", first_segment=0, last_segment=10, operations=10**12 + number * 10**9, memory_bytes=2**20,
            checkpoint_bytes=100, sandbox=2, unit_price_max=1000, budget_micro=10**9, check_permille=50,
            lock_micro=100, created_ns=now, expires_ns=now + 10**12,
        )  # fmt: skip
        answers = [
            (blake("bid", key, number.to_bytes(4, "big")), Bid(
                network=network, offer=network, solver=key, unit_price=500 + (place * 7919) % 400,
                operations_cap=2**60, lock_micro=100, eta_ns=10**9, sandbox=2, seed_commitment=network,
                forced_commitment=network, nonce=1, created_ns=now, expires_ns=now + 10**12,
            )) for place, key in enumerate(keys)
        ]  # fmt: skip
        made.append(Candidate(blake("offer", number.to_bytes(4, "big")), offer, answers, 0))
    start = time.perf_counter()
    match_offers(
        made, free_stake_micro=lambda _: 10**9, record_of=lambda _: Record(20, 0), reachable=lambda _: True,
        proven=lambda _: Proven("none", 0),
    )  # fmt: skip
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--offers", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="the last line only")
    given = parser.parse_args()
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
        "records_256x256_ms": round(signed_round(256, 256), 1),
    }
    if not given.json:
        for name, value in figures.items():
            print(f"{name:24} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
