"""What a solver asks: between the least its owner works for and what the market bears, by one integer rule a round.

The rule looks for the price at which as many want work done as can do it. While more is offered than free machines can
take, whoever goes without would have paid its limit: a price below that sells a slot to less than it is worth, so the
price rises towards it (the uniform price of a multi-unit Vickrey auction, in which nobody gains by hiding its limit:
Vickrey, 1961; Wurman et al., 1998). While a slot stands idle the price falls towards the floor; while it is taken it
follows what others sold for. Each move is a fixed share of the way, so it never passes where it goes, and one false
offer moves it little (the adaptive traders of Cliff, "Minimal-intelligence agents for bargaining behaviors", 1997).
Pure: integers in, an integer out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from protocol import params

__all__ = ["Wanted", "goes_without", "next_price"]


@dataclass(frozen=True)
class Wanted:
    """Work that a solver could do: the most it pays per giga-operation, in micro-credits, and the memory it takes."""

    limit: int
    memory_bytes: int


def goes_without(wanted: Iterable[Wanted], free_memory_bytes: Sequence[int]) -> int:
    """The highest limit that is left when every free slot has taken work, best limit first; 0 if all of it is taken.

    wanted: highest limit first, and is read no further than the first that is left.
    free_memory_bytes: of each free slot of the market, this solver's own among them. Work goes to the smallest slot
    that it fits, so that what is left could not be had by moving anything: slots differ by memory alone, of which who
    has more can do all that who has less can, and for such sets the greedy choice is the best one.
    """
    free = sorted(free_memory_bytes)
    for one in wanted:
        place = bisect_left(free, one.memory_bytes)
        if place == len(free):
            return one.limit
        del free[place]
    return 0


def next_price(price: int, *, floor: int, left: int, sold: int, idle_rounds: int) -> int:
    """The price of the next round; never below `floor`, and never past what it moves towards.

    All prices in micro-credits per giga-operation. left: what `goes_without` says. sold: the middle of what others sold
    for of late, 0 if nothing tells. idle_rounds: for how many rounds a slot has been free; 0 while all are taken. Who
    has waited PRICE_PATIENCE_ROUNDS for work that is said to go without does not believe in it any more.
    """
    price = max(price, floor)
    if left > price and idle_rounds <= params.PRICE_PATIENCE_ROUNDS:
        return price + _share(left - price, params.PRICE_RISE_SHARE)
    if idle_rounds:
        least = max(floor, left) if idle_rounds <= params.PRICE_PATIENCE_ROUNDS else floor
        return price - _share(max(0, price - least), params.PRICE_FALL_SHARE)
    return price + _share(max(0, sold - price), params.PRICE_FOLLOW_SHARE)


def _share(distance: int, part: int) -> int:
    """One part of a distance, rounded up, so that the last micro-credit is gone too."""
    return -(-distance // part)
