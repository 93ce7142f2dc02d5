"""What a solver asks: between the least its owner works for and what the market bears, by one integer rule.

The rule looks for the price at which as many want work done as can do it. While more is offered than free machines can
take, whoever goes without would have paid its limit: a price below that sells a slot to less than it is worth, so the
price rises towards it (the uniform price of a multi-unit Vickrey auction, in which nobody gains by hiding its limit:
Vickrey, 1961; Wurman et al., 1998). While a slot stands idle the price falls towards the floor. Each move is a fixed
share of the way, so it never passes where it goes, and one false offer moves it little (the adaptive traders of Cliff,
"Minimal-intelligence agents for bargaining behaviors", 1997). Pure: integers in, an integer out.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protocol import params

__all__ = ["Terms", "clearing_price", "goes_without", "next_price", "rounds_until_next"]


@dataclass(frozen=True)
class Terms:
    """One side's word: an offer's limit and the memory it needs, or a free slot's ask and the memory it has.

    unit_price: micro-credits per giga-operation.
    """

    unit_price: int
    memory_bytes: int


def clearing_price(limits: Sequence[int], asks: Sequence[int]) -> int:
    """The highest limit at which more is wanted than is free, so that it goes without; 0 if there is none.

    limits: highest first. asks: lowest first, of the other free slots; the one that is priced counts at any price. More
    are wanted and fewer are free the lower the price, so halving finds the place.
    """
    place = bisect_left(range(len(limits)), 1, key=lambda k: k + 1 > 1 + bisect_right(asks, limits[k]))
    return limits[place] if place < len(limits) else 0


def goes_without(wanted: Sequence[Terms], free: Sequence[Terms], *, memory_bytes: int) -> int:
    """The highest limit that a slot of so much memory could serve and that goes without at the price that clears; 0 if
    nothing does.

    wanted: highest limit first. free: lowest ask first, of the other free slots. Slots differ by memory, of which who
    has more can do all that who has less can: so by Hall's theorem it is enough to hold, for each need that the slot
    can serve, all that needs at least as much against all that has at least as much. Of the work that is too large for
    the slot only as much counts as there are larger slots: what has none takes nothing from anybody. Of more than
    PRICE_NEEDS_MAX different needs so many are held against the slots, from the least to the largest: whoever makes
    offers of ever other sizes must not take a solver's time, and one need says nearly what its neighbour says.
    """
    larger = sum(1 for one in free if one.memory_bytes > memory_bytes)
    counted = []
    for one in wanted:
        larger -= one.memory_bytes > memory_bytes
        if one.memory_bytes <= memory_bytes or larger >= 0:
            counted.append(one)
    limits, sizes = _columns(counted)
    asks, rooms = _columns(free)
    needs = np.unique(sizes[sizes <= memory_bytes])
    if needs.size > params.PRICE_NEEDS_MAX:
        needs = needs[np.linspace(0, needs.size - 1, params.PRICE_NEEDS_MAX).astype(np.intp)]
    prices = [0]
    for need in needs:
        prices.append(clearing_price(limits[sizes >= need].tolist(), asks[rooms >= need].tolist()))
    return max(prices)


def _columns(terms: Sequence[Terms]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Their prices and their memory, in their order."""
    prices = np.fromiter((one.unit_price for one in terms), np.int64, len(terms))
    return prices, np.fromiter((one.memory_bytes for one in terms), np.int64, len(terms))


def next_price(price: int, *, floor: int, left: int, best: int, idle_rounds: int) -> int:
    """One move of the price; never below `floor`, and never past what it moves towards.

    All prices in micro-credits per giga-operation. left: what `goes_without` says. best: the highest limit of the work
    that stands and that this solver could do, 0 if there is none. idle_rounds: for how many rounds a slot has been
    free; 0 while all are taken. Who has waited PRICE_PATIENCE_ROUNDS for work that is said to go without does not
    believe in it any more.
    """
    price = max(price, floor)
    if idle_rounds and price > best >= max(floor, price - price // params.PRICE_NEAR_SHARE):
        return best  # work that pays nearly as much is at hand: the wait for better costs more than the rest
    if left and idle_rounds <= params.PRICE_PATIENCE_ROUNDS:
        return price + _share(max(floor, left) - price, params.PRICE_MOVE_SHARE)
    return price + _share(floor - price, params.PRICE_FALL_SHARE) if idle_rounds else price


def rounds_until_next(idle_rounds: int) -> int:
    """How many rounds the price then stands: one while a slot has just become free, else PRICE_CALM_ROUNDS."""
    return 1 if 0 < idle_rounds <= params.PRICE_PATIENCE_ROUNDS else params.PRICE_CALM_ROUNDS


def _share(way: int, part: int) -> int:
    """One part of a way up or down, rounded away from zero, so that the last micro-credit is gone too."""
    return -(-way // part) if way > 0 else way // part
