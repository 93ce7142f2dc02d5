"""How long a step of a run takes: its devices, the borders between its stages, the exchange between its replicas.

A run's step is a pipeline of micro-batches, one forward one backward, and every border is a device of that pipeline
whose work is to carry bytes. So with M micro-batches

    fill     the compute of each stage once, each border there and back once: a micro-batch all alone
    steady   (M - 1) times the slowest of all stages and directions of borders: the others hide behind it
    exchange a replica sends to each other one over its own line, one after the other; in each step, or once in `every`

Three simplifications. Round trips are hidden by the micro-batches in flight (`in_flight` says how many that takes), the
exchange hides behind nothing, and coding takes no time: 7 ns a value (docs/decisions/0024), where a float32 takes 40 ns
over the fastest link that was ever measured between two daemons. Seconds are float64. Refuses to know who the devices
are and how bytes come about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from market.placement_cost import Links

__all__ = [
    "Pace", "Paths", "StepTime", "Volume", "border_fill", "border_steady", "exchange_time", "in_flight", "step_time",
]  # fmt: skip

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Volume:
    """What a run sends. borders: of each, the bytes forward and backward in a step, of all micro-batches. shared: of
    each stage, the bytes from a replica to each other one in an exchange; empty for one replica. every: the steps
    between two exchanges."""

    micro_batches: int
    borders: Sequence[tuple[float, float]]
    shared: Sequence[float]
    every: int = 1

    @property
    def ahead(self) -> Floats:
        """Bytes forward in a step: (borders,)."""
        return np.array([pair[0] for pair in self.borders], np.float64)

    @property
    def back(self) -> Floats:
        """Likewise backward."""
        return np.array([pair[1] for pair in self.borders], np.float64)


class Pace:
    """Seconds of links, for whoever asks often. Of each pair of devices (N, N): delay, there and back; a byte, one way;
    and of replicas of one stage the slower direction."""

    def __init__(self, links: Links) -> None:
        delay = links.delay_ms / 1e3
        self.round_trip = delay + delay.T
        self.per_byte = 8 / (links.gbps * 1e9)
        self.delay = np.maximum(delay, delay.T)
        self.slower = np.maximum(self.per_byte, self.per_byte.T)
        for matrix in (self.round_trip, self.delay, self.per_byte, self.slower):
            np.fill_diagonal(matrix, 0)


@dataclass(frozen=True)
class Paths:
    """The links that a placement uses, K stages of R replicas. Of the borders (K - 1, R), a pipeline each: round_trip,
    seconds; ahead, back, seconds a byte. Of the stages (K, R), what a replica's lines to all others come to: delay,
    seconds; line, seconds a byte."""

    round_trip: Floats
    ahead: Floats
    back: Floats
    delay: Floats
    line: Floats

    @classmethod
    def of(cls, pace: Pace, table: npt.NDArray[np.int64]) -> Paths:
        """Those of a table of devices (K, R), row s the stage s, column r the pipeline r."""
        here, there = table[:-1], table[1:]
        groups = table[:, :, None], table[:, None, :]
        return cls(
            round_trip=pace.round_trip[here, there],
            ahead=pace.per_byte[here, there],
            back=pace.per_byte[there, here],
            delay=pace.delay[groups].sum(axis=2),
            line=pace.slower[groups].sum(axis=2),
        )


@dataclass(frozen=True)
class StepTime:
    """Modelled seconds of a step: on links that take no time; what the borders add; what the exchange adds."""

    compute_s: float
    borders_s: float
    exchange_s: float

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.compute_s + self.borders_s + self.exchange_s


def step_time(volume: Volume, work: Floats, paths: Paths) -> StepTime:
    """The time of a step. work: (K,) seconds of the slowest device of each stage, for all micro-batches."""
    count = volume.micro_batches
    slowest = float(work.max()) / count
    compute = float(work.sum()) / count + (count - 1) * slowest
    fill = float(border_fill(paths, volume.ahead / count, volume.back / count).sum())
    carried = border_steady(paths, volume.ahead / count, volume.back / count).max(initial=0.0)
    borders = fill + (count - 1) * (max(slowest, float(carried)) - slowest)
    return StepTime(compute, borders, exchange_time(paths, volume.shared, volume.every))


def border_fill(paths: Paths, ahead: Floats, back: Floats) -> Floats:
    """Seconds of one micro-batch over each border and back: (borders,). ahead, back: bytes of one micro-batch."""
    one: Floats = paths.round_trip + ahead[:, None] * paths.ahead + back[:, None] * paths.back
    found: Floats = one.max(axis=1)
    return found


def border_steady(paths: Paths, ahead: Floats, back: Floats) -> Floats:
    """Seconds that each border is busy with one micro-batch, in its busier direction: (borders,)."""
    busier: Floats = np.maximum(ahead[:, None] * paths.ahead, back[:, None] * paths.back).max(axis=1)
    return busier


def exchange_time(paths: Paths, shared: Sequence[float], every: int) -> float:
    """Seconds of a step that the exchange takes: of the slowest replica of the slowest stage, its share of `every`
    steps."""
    if not len(shared):
        return 0.0
    return float((paths.delay + np.asarray(shared, np.float64)[:, None] * paths.line).max()) / every


def in_flight(volume: Volume, work: Floats, paths: Paths) -> int:
    """The micro-batches that the first stage must start ahead of the last so that no round trip stops the pipeline: at
    most all of them. Between the first and the last they fall evenly (docs/decisions/0023).

    A stage that is to start c more than the next one gets a micro-batch back after it started c + 1 others, each of
    which takes as long as the slowest part of the pipeline: so much time there is for the work of both and the way
    between them. And what a stage starts in all must last until its first comes back from the end.
    """
    count, last = volume.micro_batches, len(work) - 1
    ahead, back = volume.ahead / count, volume.back / count
    fill = border_fill(paths, ahead, back)
    slowest = max(float(work.max()) / count, float(border_steady(paths, ahead, back).max(initial=0.0)))
    if slowest <= 0 or not last:
        return 1
    each = 1.0
    for stage in range(last):
        around = float(work[stage : stage + 2].sum()) / count + float(fill[stage])
        whole = float(work[stage:].sum()) / count + float(fill[stage:].sum())
        each = max(each, _whole(around / slowest) - 1, (_whole(whole / slowest) - 1) / (last - stage))
    return int(min(count, 1 + _whole(each * last)))


def _whole(number: float) -> float:
    """Rounded up, but for what rounding itself added."""
    return float(np.ceil(number * (1 - 1e-9)))
