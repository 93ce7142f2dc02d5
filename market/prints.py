"""What work was sold for: the prints of a market, and what they say of its price.

A print is an Agreement of the settlement log: both parties signed it, a channel was funded on it, so a price that
nobody paid is no print. Its time is the submitter's word. Who trades with itself through two keys still pays fees and
locks a stake, but may do it to move the price: trades between the same two peers count once a day. Integers only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from protocol import params
from protocol.profile import EXACT
from protocol.records import Agreement, amount_for

__all__ = ["Print", "Statistics", "Suggestion", "power_floor", "print_of", "statistics", "suggest_ask", "suggest_limit"]

_DAY_NS: Final = 86_400 * 10**9


@dataclass(frozen=True)
class Print:
    """One trade. unit_price: micro-credits per giga-operation. mode `unchecked`: a script, whose giga-operation is a
    second of its machine, or a profile; neither has a price that work on a graph could be compared with."""

    agreement: bytes
    submitter: bytes
    solver: bytes
    mode: Literal["exact", "tolerant", "unchecked"]
    operations: int
    unit_price: int
    time_ns: int

    @property
    def price_micro(self) -> int:
        """The price of all of it."""
        return amount_for(self.operations, self.unit_price)


def print_of(agreement_id: bytes, agreement: Agreement) -> Print:
    """The print of a co-signed agreement."""
    checked: Literal["exact", "tolerant"] = "exact" if agreement.tolerance == EXACT else "tolerant"
    return Print(
        agreement=agreement_id,
        submitter=agreement.submitter,
        solver=agreement.solver,
        mode=checked if agreement.check_permille else "unchecked",
        operations=agreement.operations,
        unit_price=agreement.unit_price,
        time_ns=agreement.created_ns,
    )


@dataclass(frozen=True)
class Statistics:
    """Prices in micro-credits per giga-operation, of `count` prints after those between one pair on one day became
    one; `raw` were there before. All prices are 0 where count is. dispersion_permille: the distance between the
    quartiles over the median."""

    raw: int
    count: int
    pairs: int
    operations: int
    vwap: int
    low: int
    quartile: int
    median: int
    upper_quartile: int
    high: int
    dispersion_permille: int
    oldest_ns: int
    newest_ns: int

    @property
    def enough(self) -> bool:
        """Whether the sample says something."""
        return self.count >= params.PRINTS_MIN and self.pairs >= params.PRINT_PAIRS_MIN


def statistics(
    prints: Iterable[Print], *, now_ns: int, without: Collection[bytes] = (), within_ns: int = 0
) -> Statistics:
    """What work on graphs sold for. without: peers whose trades do not count, so that nobody follows its own prices.
    within_ns: only so young a print counts; 0 for any. VWAP is weighted by operations and rounded down."""
    counted = [
        one
        for one in prints
        if one.mode != "unchecked"
        and not {one.submitter, one.solver} & set(without)
        and one.time_ns <= now_ns + params.CLOCK_SKEW_NS_MAX
        and not (within_ns and one.time_ns < now_ns - within_ns)
    ]
    days: dict[tuple[frozenset[bytes], int], list[Print]] = {}
    for one in counted:
        days.setdefault((frozenset((one.submitter, one.solver)), one.time_ns // _DAY_NS), []).append(one)
    # A day of one pair: its own mean price, with the weight of its largest trade, however often it was repeated.
    points = sorted(
        (_vwap([(p.unit_price, p.operations) for p in day]), max(p.operations for p in day)) for day in days.values()
    )
    prices = [price for price, _ in points]
    first, middle, third = (_quantile(prices, share) for share in (250, 500, 750))
    return Statistics(
        raw=len(counted),
        count=len(points),
        pairs=len({pair for pair, _ in days}),
        operations=sum(weight for _, weight in points),
        vwap=_vwap(points),
        low=prices[0] if prices else 0,
        quartile=first,
        median=middle,
        upper_quartile=third,
        high=prices[-1] if prices else 0,
        dispersion_permille=1000 * (third - first) // middle if middle else 0,
        oldest_ns=min((p.time_ns for p in counted), default=0),
        newest_ns=max((p.time_ns for p in counted), default=0),
    )


def _vwap(points: Sequence[tuple[int, int]]) -> int:
    weight = sum(operations for _, operations in points)
    return sum(price * operations for price, operations in points) // weight if weight else 0


def _quantile(ordered: Sequence[int], permille: int) -> int:
    """The smallest value that at least so many of a thousand do not exceed; 0 of nothing."""
    return ordered[max(0, -(-len(ordered) * permille // 1000) - 1)] if ordered else 0


def power_floor(*, watts: int, kwh_micro: int, operations_per_second: int) -> int:
    """What the electricity of a giga-operation costs, in micro-credits, rounded up: below it a solver pays to work.

    kwh_micro: micro-credits a kilowatt-hour. 3.6 million watt-seconds are one.
    """
    return -(-watts * kwh_micro * 10**9 // (3_600_000 * max(1, operations_per_second)))


@dataclass(frozen=True)
class Suggestion:
    """A unit price and what it rests on. unit_price 0: nothing is known that a price could rest on.

    basis: `prints`; `asks` where too few prints are there; `power` where that is above both; `none`.
    """

    unit_price: int
    low: int
    high: int
    basis: Literal["prints", "asks", "power", "none"]


def suggest_limit(found: Statistics, asks: Iterable[int]) -> Suggestion:
    """A price limit for a submitter: three of four trades were at no more. asks: unit prices of who could take the
    job now; where some are here the limit reaches at least the cheapest of them, or nothing would happen."""
    standing = sorted(asks)
    if found.enough:
        least = standing[0] if standing else 0
        return Suggestion(max(found.upper_quartile, least), found.median, max(found.high, least), "prints")
    if standing:
        return Suggestion(_quantile(standing, 500), standing[0], standing[-1], "asks")
    return Suggestion(0, 0, 0, "none")


def suggest_ask(found: Statistics, asks: Iterable[int], *, floor: int) -> Suggestion:
    """An ask for a solver: the middle of what work sold for, else of what others ask, and never below its power."""
    standing = sorted(asks)
    if found.enough:
        low, price, high, basis = found.quartile, found.median, found.upper_quartile, "prints"
    elif standing:
        low, price, high, basis = standing[0], _quantile(standing, 500), standing[-1], "asks"
    else:
        return Suggestion(floor, floor, floor, "power" if floor else "none")
    return Suggestion(max(price, floor), max(low, floor), max(high, floor), "power" if floor > price else basis)  # type: ignore[arg-type]
