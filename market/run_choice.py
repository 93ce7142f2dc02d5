"""How the tensors of a run travel: of all ways the least lossy that is nearly as quick as the quickest.

Quickest is what sends the fewest bytes: everything as short as it may become, by itself, and replicas that train alone.
A step may take TOLERANCE longer than that, for the sake of fewer losses. The tolerance is divided evenly among the
borders and the exchange between replicas, and each takes the least lossy of its ways whose part of it suffices: so a
border between two neighbours stays float32 beside one across an ocean.

From this follows, and is tested: over links that are all so many times faster nothing travels with more loss (over ones
that differ in speed alone, no border). It does not hold of one link alone: where one border becomes fast, what another
costs is a larger part of a step. Pure and deterministic; refuses to know whose links they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from market.step_time import (
    Floats,
    Paths,
    StepTime,
    Volume,
    border_fill,
    border_steady,
    exchange_time,
    in_flight,
    step_time,
)
from protocol.run_sizes import Compress, RunChoice, RunSizes, Share

__all__ = ["TOLERANCE", "Weighed", "choose", "volume_of"]

TOLERANCE: Final = 0.1
"""How much longer than the quickest a step may take. Less than the speed of one peer changes from hour to hour."""


@dataclass(frozen=True)
class Weighed:
    """A choice and what it was made from. compressions, shares: modelled seconds of a step by each of the sizes' ways,
    the same on all borders, with the rest as chosen. guessed: no speed was known, so the usual ways are taken."""

    choice: RunChoice
    time: StepTime
    quickest_s: float
    compressions: tuple[float, ...]
    shares: tuple[float, ...]
    guessed: bool


def volume_of(sizes: RunSizes, compressions: Sequence[int], share: int) -> Volume:
    """What a run sends if its tensors travel so."""
    borders = [by_way[way] for by_way, way in zip(sizes.border_bytes, compressions, strict=True)]
    shared = [by_way[share] for by_way in sizes.shared_bytes]
    local = bool(shared) and sizes.shares[share].sync == "local"
    return Volume(sizes.micro_batches, borders, shared, sizes.steps_per_segment if local else 1)


def choose(sizes: RunSizes, work: Floats, paths: Paths, *, guessed: bool = False) -> Weighed:
    """Choose for one placement. work: (K,) seconds of a step of the slowest device of each stage. paths: the links of
    the placement. guessed: none of them is known, so the usual ways are weighed and taken."""
    borders, shares = len(sizes.border_bytes), len(sizes.shares)
    ways, waits = _open(sizes.compressions), _open(sizes.shares)
    exchange = [exchange_time(paths, v.shared, v.every) for v in (volume_of(sizes, [0] * borders, s) for s in waits)]
    least = min(exchange, default=0.0)
    shortest = ways[-1] if ways else 0  # each way sends no more than the one before it
    quickest = waits[exchange.index(least)] if waits else 0
    quick = step_time(volume_of(sizes, [shortest] * borders, quickest), work, paths)
    if guessed:
        choice = sizes.usual()
    else:
        budget = TOLERANCE * quick.total_s / max(1, borders + bool(sizes.shared_bytes))
        share = next((s for s, seconds in zip(waits, exchange, strict=True) if seconds <= least + budget), 0)
        compressions = _over_borders(sizes, work, paths, ways, budget)
        choice = RunChoice(compressions, share, _ahead(sizes, compressions, share, work, paths))

    def seconds(compressions: Sequence[int], share: int) -> float:
        return step_time(volume_of(sizes, compressions, share), work, paths).total_s

    return Weighed(
        choice=choice,
        time=step_time(volume_of(sizes, choice.compressions, choice.share), work, paths),
        quickest_s=quick.total_s,
        compressions=tuple(seconds([way] * borders, choice.share) for way in range(len(sizes.compressions))),
        shares=tuple(seconds(choice.compressions, share) for share in range(shares)),
        guessed=guessed,
    )


def _open(ways: Sequence[Compress | Share]) -> list[int]:
    """The places of those that may be chosen; all, where the job leaves just these."""
    return [place for place, way in enumerate(ways) if way.automatic] or list(range(len(ways)))


def _over_borders(sizes: RunSizes, work: Floats, paths: Paths, ways: list[int], budget_s: float) -> list[int]:
    """The way of each border: the first that makes a step at most `budget_s` longer than the last."""
    count, borders = sizes.micro_batches, len(sizes.border_bytes)
    fill, steady = {}, {}
    for way in ways:
        volume = volume_of(sizes, [way] * borders, 0)
        fill[way] = border_fill(paths, volume.ahead / count, volume.back / count)
        steady[way] = border_steady(paths, volume.ahead / count, volume.back / count)
    if not ways:
        return []
    slowest = max(float(work.max()) / count, float(steady[ways[-1]].max(initial=0.0)))

    def cost(border: int, way: int) -> float:
        return float(fill[way][border]) + (count - 1) * max(slowest, float(steady[way][border]))

    found = []
    for border in range(borders):
        most = cost(border, ways[-1]) + budget_s
        found.append(next(way for way in ways if way == ways[-1] or cost(border, way) <= most))
    return found


def _ahead(sizes: RunSizes, compressions: Sequence[int], share: int, work: Floats, paths: Paths) -> int:
    """Micro-batches ahead, 0 where as many as usual hide the round trips, or the job says how many."""
    if sizes.in_flight or len(sizes.operations) == 1:
        return sizes.in_flight
    needed = in_flight(volume_of(sizes, compressions, share), work, paths)
    usually = 1 + 2 * (sizes.stages - 1)  # worker/cut_plan.py: two more in each stage than in the one behind it
    return needed if needed > usually else 0
