"""Who of several goes to whom, so that the sum of all costs is small: an auction over whole numbers.

Bertsekas, "The auction algorithm: a distributed relaxation method for the assignment problem" (1988), in one phase from
prices of zero, so that no column keeps a price that nobody pays. It ends with a sum at most rows x step above the least
(both in the units of the costs). Integers only, ties to the smaller row and column: every machine finds the same.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from market.round_compiled import Auction

__all__ = ["NEVER", "assign"]

NEVER: Final = 2**62
"""The cost of a pair that must not be."""

_STEPS: Final = 100  # of a median cost: finer costs time and gains less than the risk estimate in a score is worth
_BITS: Final = 28  # costs are shifted to so many bits: half the memory of int64, and prices stay below 2**31
_UNMATCHED: Final = -1

Costs = npt.NDArray[np.int64]


def assign(costs: Costs, reserves: npt.NDArray[np.int64]) -> list[int]:
    """The column of each row, -1 for a row that gets none.

    costs: (rows, columns), non-negative, NEVER where a pair must not be. reserves: (rows,), the cost of a row left
    over: it is left over where every column is taken for more. Each column goes to one row at most.
    """
    rows, columns = costs.shape
    if not rows or not columns:
        return [_UNMATCHED] * rows
    compiled = Auction.of(costs, NEVER)
    possible = costs < NEVER if compiled is None else np.empty(0, np.bool_)
    dearest = int(costs[possible].max(initial=0)) if compiled is None else compiled.dearest
    most = max(int(reserves.max()), dearest, 1)
    shift = max(0, most.bit_length() - _BITS)
    ceiling = (most >> shift) + 1
    dropped = (reserves >> shift).astype(np.int32)
    if compiled is not None:
        step = max(1, compiled.scale(shift, 4 * ceiling) // _STEPS)
        return compiled.run(dropped, step).tolist()  # type: ignore[no-any-return]
    scaled = np.where(possible, costs >> shift, 4 * ceiling).astype(np.int32)
    step = _step(scaled[possible])
    # Like offers would all want the first of like columns, and one of them would get it a round: a little noise below
    # the step, the same everywhere, sends them to different ones.
    spread = (np.arange(rows)[:, None] * 40_503 + np.arange(columns)[None] * 30_241) % 65_521
    scaled += (spread * step >> 16).astype(np.int32)
    return _auction(-scaled, dropped, step).tolist()  # type: ignore[no-any-return]


def _step(possible: npt.NDArray[np.int32]) -> int:
    return max(1, int(np.median(possible) if possible.size else 0) // _STEPS)


def _auction(worth: npt.NDArray[np.int32], reserves: npt.NDArray[np.int32], step: int) -> npt.NDArray[np.int64]:
    """Bids of all rows without a column at once, until every row has one or finds all too dear."""
    rows, columns = worth.shape
    prices = np.zeros(columns, np.int32)
    holder = np.full(columns, _UNMATCHED)
    column_of = np.full(rows, _UNMATCHED)
    out = np.zeros(rows, bool)
    bidders = np.arange(rows)
    lowest = np.iinfo(np.int32).min
    while bidders.size:
        value = worth[bidders]
        value -= prices
        place = np.arange(bidders.size)
        wanted = value.argmax(1)
        best = value[place, wanted]
        value[place, wanted] = lowest
        second = np.maximum(value.max(1), -reserves[bidders])  # nobody bids more than being left over costs
        leaves = best < -reserves[bidders]
        out[bidders[leaves]] = True
        stays = ~leaves
        bidders, wanted = bidders[stays], wanted[stays]
        bids = prices[wanted] + (best - second)[stays] + step
        order = np.lexsort((bidders, -bids, wanted))
        ranked = wanted[order]
        first = np.ones(order.size, bool)
        first[1:] = ranked[1:] != ranked[:-1]
        winners = order[first]
        taken = wanted[winners]
        lost = holder[taken]
        column_of[lost[lost >= 0]] = _UNMATCHED
        holder[taken], column_of[bidders[winners]], prices[taken] = bidders[winners], taken, bids[winners]
        bidders = np.flatnonzero((column_of < 0) & ~out)
    return column_of
