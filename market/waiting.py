"""Price against waiting: for each price limit, who could take a job now, and how long until somebody does.

An estimate from what one peer hears, and it says so where it knows nothing: None, never a made-up number. Integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from market.matching import Proven, believed_ns
from market.prints import Print
from protocol import params
from protocol.records import Ask

__all__ = ["Rung", "Supply", "ladder"]

_HOUR_NS: Final = 3600 * 10**9
_ROUNDS: Final = 2  # one in which the bids come, one in which they are matched


@dataclass(frozen=True)
class Supply:
    """An ask that could run the job at some price. busy: its peer has an open channel, so it works on something, and
    may be done with it in free_in_ns."""

    ask: Ask
    busy: bool
    free_in_ns: int
    connected: bool
    proven: Proven


@dataclass(frozen=True)
class Rung:
    """One price limit, in micro-credits per giga-operation. wait_ns, run_ns: None where nothing tells.

    work_micro: the work at the middle of the prices it reaches. budget_micro: the most it costs, with all checks.
    """

    unit_price_max: int
    solvers: int
    free: int
    connected: int
    wait_ns: int | None
    run_ns: int | None
    work_micro: int
    budget_micro: int


def ladder(
    supply: Sequence[Supply],
    *,
    operations: int,
    limit: int | None,
    rivals: Sequence[int],
    prints: Sequence[Print],
    now_ns: int,
    round_ns: int,
    cost: Callable[[int], tuple[int, int]],
) -> list[Rung]:
    """At most QUOTE_ROWS_MAX limits, lowest first, spread over the prices asked; `limit` is among them if given.

    rivals: the limits of other offers that stand and that their submitters can pay: who pays as much is served before.
    prints: what was matched of late, for how soon others are served. cost: unit price -> micro-credits of the work, and
    with its checks.
    """
    prices = sorted({one.ask.unit_price for one in supply})
    room = params.QUOTE_ROWS_MAX - (limit is not None)
    if len(prices) > room:
        prices = sorted({prices[i * (len(prices) - 1) // (room - 1)] for i in range(room)})
    limits = sorted({*prices, *([limit] if limit is not None else [])})
    lately = [one.unit_price for one in prints if now_ns - _HOUR_NS <= one.time_ns <= now_ns]
    rungs = []
    for each in limits:
        reached = [one for one in supply if one.ask.unit_price <= each]
        peers = {one.ask.peer for one in reached}
        busy = {one.ask.peer for one in reached if one.busy}
        ends = sorted({one.ask.peer: one.free_in_ns for one in reached if one.busy}.values())
        ahead = sum(1 for rival in rivals if rival >= each)
        matched = sum(1 for price in lately if price <= each)
        runs = sorted(_run_ns(one, operations) for one in reached if one.ask.operations_per_second)
        asked = sorted(one.ask.unit_price for one in reached)
        rungs.append(
            Rung(
                unit_price_max=each,
                solvers=len(peers),
                free=len(peers - busy),
                connected=len({one.ask.peer for one in reached if one.connected}),
                wait_ns=_wait_ns(len(peers - busy), ends, ahead, matched, round_ns),
                run_ns=runs[len(runs) // 2] if runs else None,
                work_micro=cost(asked[len(asked) // 2])[0] if asked else 0,
                budget_micro=cost(each)[1],
            )
        )
    return rungs


def _run_ns(one: Supply, operations: int) -> int:
    return believed_ns(operations, operations * 10**9 // one.ask.operations_per_second, one.proven)


def _wait_ns(free: int, ends: Sequence[int], ahead: int, matched: int, round_ns: int) -> int | None:
    """Two rounds if a solver is free for it, or when one will be. ends: in what time each busy one is, soonest first.

    With more offers ahead than solvers are reached: at the last hour's rate of matches, until all are served.
    """
    queue = ahead - free  # so many busy ones go to others first
    if queue < 0:
        return _ROUNDS * round_ns
    if queue < len(ends):
        return _ROUNDS * round_ns + ends[queue]
    if not (free or ends) or not matched:
        return None
    return _ROUNDS * round_ns + (queue + 1) * _HOUR_NS // matched
