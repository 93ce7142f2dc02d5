"""What a job can cost before anyone bids, and what the market seen from here would charge. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.incentives import lock_needed
from protocol.network import Rules
from protocol.records import Ask, amount_for

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


def quote(
    asks: Sequence[Ask], *, operations: int, memory_bytes: int, sandbox: int, unit_price_max: int | None
) -> Quote:
    """Summarise the live solver asks that could run the job. Zero solvers is an answer, not an error."""
    able = [a for a in asks if a.memory_bytes >= memory_bytes and a.sandbox >= sandbox]
    prices = sorted(amount_for(operations, a.unit_price) for a in able)
    speeds = [a.operations_per_second for a in able if a.operations_per_second]
    return Quote(
        solvers=len(able),
        low_micro=prices[0] if prices else 0,
        median_micro=prices[len(prices) // 2] if prices else 0,
        high_micro=prices[-1] if prices else 0,
        fastest_seconds=operations / max(speeds) if speeds else 0.0,
        too_dear=sum(1 for a in able if unit_price_max is not None and a.unit_price > unit_price_max),
        limit_for_all=max((a.unit_price for a in able), default=0),
    )
