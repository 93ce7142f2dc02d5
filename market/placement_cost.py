"""What a placement costs: seconds of communication an iteration, by the model of arXiv:2206.01288.

A plan is a table of devices, stages x replicas: row s is the group that holds pipeline stage s, column r one pipeline.
With the extensions off (`Devices` and codings left out) the cost is the paper's. Costs are float64 seconds. Refuses to
know how a plan is found, files and clocks.

A link may be measured in both directions: one exchange goes both ways, so the paper's 2 (latency + size / bandwidth) is
taken as the sum of the two directions, which is the same number where they are equal. The diagonals are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from protocol.errors import IchibaError
from protocol.params import (
    PLACEMENT_DELAY_MS_MAX,
    PLACEMENT_DEVICES_MAX,
    PLACEMENT_GB_MAX,
    PLACEMENT_GBPS_MAX,
    PLACEMENT_GBPS_MIN,
)

__all__ = [
    "Coding",
    "Cost",
    "Devices",
    "Links",
    "PlacementRefused",
    "Problem",
    "Traffic",
    "bottleneck",
    "chosen_bits",
    "cost_of",
    "model",
    "straight_cost",
]

Floats = npt.NDArray[np.float64]
Table = npt.NDArray[np.int64]

_BITS_PER_BYTE: Final = 8
_MS_PER_S: Final = 1e3


class PlacementRefused(IchibaError):
    """Links, sizes or a plan that the cost model cannot take."""

    code = "placement"
    exit_code = 2


@dataclass(frozen=True)
class Links:
    """Delays (ms) and bandwidths (Gbit/s) from device i (row) to device j (column), both (N, N). Raises
    PlacementRefused."""

    delay_ms: Floats
    gbps: Floats

    def __post_init__(self) -> None:
        for name, array in (("delay_ms", self.delay_ms), ("gbps", self.gbps)):
            if array.ndim != 2 or array.shape[0] != array.shape[1] or array.shape != self.delay_ms.shape:
                raise PlacementRefused(
                    f"{name} has the shape {array.shape}",
                    why="delay_ms and gbps must be square and alike: one row and one column for each device",
                    next_step="measure every pair of devices and save both as N x N arrays",
                )
            if array.dtype.kind not in "fiu":
                raise PlacementRefused(f"{name} holds {array.dtype}, not real numbers", next_step="save it as float64")
        if not 1 <= len(self.delay_ms) <= PLACEMENT_DEVICES_MAX:
            raise PlacementRefused(
                f"links of {len(self.delay_ms)} devices",
                why=f"a plan takes 1 to {PLACEMENT_DEVICES_MAX} devices: each holds a row of every matrix",
                next_step="leave out the devices you would not use anyway",
            )
        object.__setattr__(self, "delay_ms", _off_diagonal(self.delay_ms, 0))
        object.__setattr__(self, "gbps", _off_diagonal(self.gbps, 1))
        self._check("delay_ms", self.delay_ms, least=0, most=PLACEMENT_DELAY_MS_MAX, unit="ms")
        self._check("gbps", self.gbps, least=PLACEMENT_GBPS_MIN, most=PLACEMENT_GBPS_MAX, unit="Gbit/s")

    @staticmethod
    def _check(name: str, array: Floats, *, least: float, most: float, unit: str) -> None:
        wrong = ~((array >= least) & (array <= most))  # NaN is wrong too
        if wrong.any():
            i, j = (int(place) for place in np.argwhere(wrong)[0])
            raise PlacementRefused(
                f"{name}[{i}, {j}] is {array[i, j]}",
                why=f"it must be a number from {least:g} to {most:g} {unit}; {int(wrong.sum())} entries are not",
                next_step=f"measure device {i} to device {j} again, or leave one of the two out",
            )

    def __len__(self) -> int:
        return len(self.delay_ms)


@dataclass(frozen=True)
class Coding:
    """One way to send a number: its bits, the time to code it, and what its noise is worth to avoid."""

    bits: float
    seconds_per_gb: float = 0.0  # of the uncompressed size, both ends together
    penalty_s: float = 0.0  # seconds an iteration one would wait rather than use it on a link


@dataclass(frozen=True)
class Traffic:
    """What an iteration sends. Sizes in gigabytes at `full_bits`; the codings among which each link chooses."""

    gradient_gb: float = 0.65
    activation_gb: float = 0.4712
    full_bits: float = 32.0
    gradient_codings: tuple[Coding, ...] = ()
    activation_codings: tuple[Coding, ...] = ()

    def __post_init__(self) -> None:
        for name in ("gradient_gb", "activation_gb"):
            _bounded(name, getattr(self, name), PLACEMENT_GB_MAX, "GB")
        _bounded("full_bits", self.full_bits, 64, "", least=1)
        for coding in (*self.gradient_codings, *self.activation_codings):
            _bounded("the bits of a coding", coding.bits, self.full_bits, "", least=0.01)
            _bounded("seconds_per_gb", coding.seconds_per_gb, 1e6, "s")
            _bounded("penalty_s", coding.penalty_s, 1e6, "s")


@dataclass(frozen=True)
class Devices:
    """What the paper leaves out, by device: all (N,), each left out where it is empty.

    work_s: seconds one stage takes on the device for one iteration (a pipeline waits for the slowest of each group).
    memory_gb: what it has; below `memory_needed_gb` it is not used. price_credits: of an iteration; a credit is worth
    `seconds_per_credit` of waiting. failure: probability that it fails in an iteration, which costs `recovery_s`.
    """

    work_s: Sequence[float] = ()
    memory_gb: Sequence[float] = ()
    price_credits: Sequence[float] = ()
    failure: Sequence[float] = ()
    memory_needed_gb: float = 0.0
    seconds_per_credit: float = 0.0
    recovery_s: float = 0.0

    def column(self, name: str, count: int, *, most: float) -> Floats:
        """One of them as (count,) float64, zeros where it was left out. Raises PlacementRefused."""
        given: Sequence[float] = getattr(self, name)
        if len(given) == 0:
            return np.zeros(count)
        try:
            values = np.asarray(given, np.float64)
        except (TypeError, ValueError) as error:
            raise PlacementRefused(f"{name} is no list of numbers: {error}") from None
        if values.shape != (count,):
            raise PlacementRefused(f"{name} has the shape {values.shape}", why=f"there are {count} devices")
        wrong = ~((values >= 0) & (values <= most))
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise PlacementRefused(f"{name}[{at}] is {values[at]}", why=f"it must be a number from 0 to {most:g}")
        return values


@dataclass(frozen=True)
class Problem:
    """A placement to be found. sync, hop: (N, N) seconds of a pair in one group and of a pair in neighbouring stages,
    symmetric, zero on the diagonal; work, toll: (N,) seconds of the device; ids: (N,) its row in the links."""

    stages: int
    replicas: int
    sync: Floats
    hop: Floats
    work: Floats
    toll: Floats
    ids: Table

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def placed(self) -> int:
        """How many devices a plan uses."""
        return self.stages * self.replicas


@dataclass(frozen=True)
class Cost:
    """Seconds an iteration, by cause."""

    sync_s: float  # the group that takes longest to agree on its gradients
    pipeline_s: float  # the boundaries between the stages
    work_s: float = 0.0  # the slowest device of each stage
    toll_s: float = 0.0  # prices and failures in seconds
    boundaries_s: tuple[float, ...] = field(default=(), compare=False)

    @property
    def total_s(self) -> float:
        """All of it. The paper's cost, where the extensions are off."""
        return self.sync_s + self.pipeline_s + self.work_s + self.toll_s


def model(
    links: Links, *, stages: int, replicas: int, traffic: Traffic | None = None, devices: Devices | None = None,
    spare: bool = False,
) -> Problem:  # fmt: skip
    """The problem of `stages` groups of `replicas` of these devices. More devices than that only if `spare` allows it:
    the best are chosen. Raises PlacementRefused."""
    traffic, known, count = traffic or Traffic(), devices or Devices(), len(links)
    for name, number in (("stages", stages), ("replicas", replicas)):
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= PLACEMENT_DEVICES_MAX:
            raise PlacementRefused(
                f"{number!r} {name}", why=f"it must be a whole number, 1 to {PLACEMENT_DEVICES_MAX}"
            )
    memory = known.column("memory_gb", count, most=1e9)
    usable = memory >= known.memory_needed_gb if len(known.memory_gb) else np.ones(count, bool)
    ids = np.flatnonzero(usable)
    need = stages * replicas
    if len(ids) < need or (len(ids) > need and not spare):
        dropped = f", of which {count - len(ids)} lack the memory" if len(ids) < count else ""
        raise PlacementRefused(
            f"{count} devices{dropped}, for {stages} stages of {replicas} replicas: {need} are placed",
            why="every stage is held by the same number of devices",
            next_step="choose stages and replicas whose product is the number of devices, or allow spares (--spare)",
        )
    for name in ("memory_needed_gb", "seconds_per_credit", "recovery_s"):
        _bounded(name, getattr(known, name), 1e9, "")
    toll = known.column("price_credits", count, most=1e9) * known.seconds_per_credit
    toll = toll + known.column("failure", count, most=1) * known.recovery_s
    chosen = np.ix_(ids, ids)
    sync = _pair_seconds(links, traffic.gradient_gb / replicas, traffic.gradient_codings, traffic.full_bits)
    hop = _pair_seconds(links, traffic.activation_gb, traffic.activation_codings, traffic.full_bits)
    work = known.column("work_s", count, most=1e9)
    return Problem(stages, replicas, sync[chosen], hop[chosen], work[ids], toll[ids], ids.astype(np.int64))


def cost_of(problem: Problem, table: Table) -> Cost:
    """The cost of a plan, from nothing but the model. table: int (stages, replicas), rows of the problem.

    Raises PlacementRefused where a device is missing, unknown or used twice. Columns that are good pipelines make it
    fast.
    """
    table = np.asarray(table)
    flat = table.ravel()
    if table.shape != (problem.stages, problem.replicas) or table.dtype.kind not in "iu":
        raise PlacementRefused(f"a plan of the shape {table.shape}", why="it must be whole numbers, stages x replicas")
    if flat.min() < 0 or flat.max() >= len(problem) or len(np.unique(flat)) != flat.size:
        raise PlacementRefused("a plan that uses a device twice, or one that there is not")
    sync = max(float(problem.sync[np.ix_(row, row)].sum(axis=1).max()) for row in table)
    hops = tuple(float(bottleneck(problem.hop[np.ix_(a, b)])[0]) for a, b in pairwise(table))
    work = float(problem.work[table].max(axis=1).sum())
    return Cost(sync, sum(hops), work, float(problem.toll[flat].sum()), hops)


def straight_cost(problem: Problem, table: Table) -> float:
    """Seconds of a plan whose columns are its pipelines as they stand: what it costs at most, and fast to say."""
    sync = max(float(problem.sync[np.ix_(row, row)].sum(axis=1).max()) for row in table)
    hops = problem.hop[table[:-1], table[1:]].max(axis=1).sum() if problem.stages > 1 else 0.0
    return sync + float(hops + problem.work[table].max(axis=1).sum() + problem.toll[table].sum())


def bottleneck(costs: Floats) -> tuple[float, list[int]]:
    """The perfect matching whose largest edge is least: (that edge, the column of each row). costs: (R, R).

    Starts from the diagonal; frees the row of the largest edge and gives it back by the alternating path whose largest
    edge is least, until no path is below it. By Berge's theorem there is then no perfect matching of smaller edges.
    Source: Derigs and Zimmermann, "An augmenting path method for solving linear bottleneck assignment problems" (1978).
    """
    size = len(costs)
    match, holder, every = np.arange(size), np.arange(size), np.arange(size)
    while True:
        edges = costs[every, match]
        row = int(edges.argmax())
        most = edges[row]
        goal, reach, from_row = int(match[row]), costs[row].copy(), np.full(size, row)
        left = np.ones(size, bool)
        while True:
            waiting = np.where(left, reach, np.inf)
            at = int(waiting.argmin())
            if waiting[at] >= most:
                return float(most), [int(column) for column in match]
            if at == goal:
                break
            left[at] = False
            through = np.maximum(costs[holder[at]], waiting[at])
            nearer = left & (through < reach)
            reach[nearer], from_row[nearer] = through[nearer], holder[at]
        column = goal
        while True:
            taker = int(from_row[column])
            follows = int(match[taker])
            match[taker], holder[column] = column, taker
            if taker == row:
                break
            column = follows


def chosen_bits(links: Links, traffic: Traffic, *, replicas: int, kind: str) -> Floats:
    """The bits of each link's cheapest coding, (N, N). kind: `gradient` or `activation`.

    The choice of every link by itself is the best joint choice: a boundary costs the largest of its pairs and a group
    the sum of its, so neither can gain by a dearer coding on any link.
    """
    codings = traffic.gradient_codings if kind == "gradient" else traffic.activation_codings
    size = traffic.gradient_gb / replicas if kind == "gradient" else traffic.activation_gb
    if not codings:
        return np.full((len(links), len(links)), traffic.full_bits)
    seconds = np.stack([_coded_seconds(links, size, coding, traffic.full_bits) for coding in codings])
    bits: Floats = np.array([coding.bits for coding in codings])[seconds.argmin(axis=0)]
    return bits


def _coded_seconds(links: Links, size_gb: float, coding: Coding, full_bits: float) -> Floats:
    one_way = links.delay_ms / _MS_PER_S + size_gb * (coding.bits / full_bits) * _BITS_PER_BYTE / links.gbps
    seconds: Floats = one_way + one_way.T + (2 * size_gb * coding.seconds_per_gb + coding.penalty_s)
    np.fill_diagonal(seconds, 0)
    return seconds


def _pair_seconds(links: Links, size_gb: float, codings: tuple[Coding, ...], full_bits: float) -> Floats:
    """Both directions of every link, each by its cheapest coding."""
    every = codings or (Coding(full_bits),)
    least: Floats = np.min([_coded_seconds(links, size_gb, coding, full_bits) for coding in every], axis=0)
    return least


def _off_diagonal(array: npt.NDArray[np.generic], on_diagonal: float) -> Floats:
    kept = array.astype(np.float64)
    np.fill_diagonal(kept, on_diagonal)
    return kept


def _bounded(name: str, value: float, most: float, unit: str, *, least: float = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        why = f"it must be a number from {least:g} to {most:g} {unit}".rstrip()
        raise PlacementRefused(f"{name} is {value!r}", why=why)
