"""What a job can cost before anyone bids, and what the market seen from here would charge. Integers only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from market.ask_index import Shelf
from protocol.incentives import lock_needed
from protocol.network import Rules
from protocol.records import amount_for

__all__ = ["Quote", "channel_micro", "lock_micro", "quote", "sampled_segments"]


def sampled_segments(rules: Rules, segments: int, permille: int) -> int:
    """How many segments of a deal of `segments` are re-executed (protocol.sampling.select_segments)."""
    return min(segments, max(rules.check_segments_min, -(-segments * permille // 1000)))


def channel_micro(
    rules: Rules, *, operations: int, segments: int, unit_price: int, operations_per_segment: int, permille: int
) -> int:
    """The micro-credits a deal's channel must hold: the work, and its checks at the same unit price.

    Checks: every sampled segment twice (a verifier may have to be replaced) and one audit. What is not used goes
    back to the submitter when the channel closes.
    """
    checks = (2 * sampled_segments(rules, segments, permille) + 1) * operations_per_segment
    return amount_for(operations, unit_price) + amount_for(checks, unit_price)


def lock_micro(rules: Rules, price_micro: int) -> int:
    """The least stake that work of this price takes: a newcomer's. Who is checked less locks more."""
    return lock_needed(rules, price_micro, rules.newcomer_permille)


@dataclass(frozen=True)
class Quote:
    """Price against speed for one job, from the asks a peer has heard."""

    solvers: int
    low_micro: int
    median_micro: int
    high_micro: int
    fastest_seconds: float
    too_dear: int  # solvers that a given price limit leaves out
    limit_for_all: int  # the unit price at which every one of them could bid


def quote(able: Shelf, *, operations: int, unit_price_max: int | None) -> Quote:
    """Summarise the live solver asks that could run the job. Zero solvers is an answer, not an error."""
    prices = np.sort(able.unit_prices)
    solvers = len(prices)
    # An amount never falls as its price rises, so the middle amount is that of the middle price.
    low, median, high = (int(prices[place]) if solvers else 0 for place in (0, solvers // 2, solvers - 1))
    fastest = int(able.speeds.max(initial=0))
    return Quote(
        solvers=solvers,
        low_micro=amount_for(operations, low),
        median_micro=amount_for(operations, median),
        high_micro=amount_for(operations, high),
        fastest_seconds=operations / fastest if fastest else 0.0,
        too_dear=0 if unit_price_max is None else int(np.count_nonzero(prices > unit_price_max)),
        limit_for_all=high,
    )
