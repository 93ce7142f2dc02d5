"""A simulated market of a thousand peers: who wants what, who can do what, and how long news takes between them.

Nothing here decides who gets work: the mechanisms in benchmarks/market_rules.py do, and every one of them lives through
the same world. Times in seconds, prices and limits in micro-credits per giga-operation, work in units of UNIT_S seconds
on a machine of speed 1. All of it is drawn from one seed.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra

__all__ = ["GIGABYTE", "HORIZON_S", "UNIT_OPERATIONS", "UNIT_S", "Job", "Setting", "World", "optimum"]

HORIZON_S = 600.0  # a session; what is not done by then counts as far as it is done
UNIT_S = 60.0  # a unit of work on a machine of speed 1
UNIT_OPERATIONS = 60 * 10**9
GIGABYTE = 2**30
LINKS = 4  # that each peer opens to others; as many are opened to it
HOP_S = (0.020, 0.150)  # of one gossip hop, and of a direct message
BINS = 12  # parts of a session in which the optimum tells early from late
TICK_S = 0.1  # gossip leaves with the next tick
HISTORY = (10, 60)  # right deals of a solver that is known
NEWCOMERS = 0.2  # of the solvers of a market that is not cold


@dataclass(frozen=True)
class Setting:
    """How many there are of each side, and whether they know each other. markup: shares by which limits lie below
    values, and floors above costs, at most."""

    name: str
    submitters: int
    solvers: int
    cold: bool = False
    markup: tuple[float, float] = (0.0, 0.0)


@dataclass(eq=False)
class Job:
    """One job. value: what it is worth to its submitter, which nobody else knows; limit: what it says."""

    index: int
    submitter: int
    arrives: float
    units: int
    value: int
    limit: int
    memory_bytes: int
    state: str = "coming"  # then waiting, asked, running, done
    solver: int = -1
    agreed: float = 0.0
    starts: float = 0.0
    price: int = 0


@dataclass
class World:
    """Peers, delays, jobs and one event heap. Solvers are counted from 0; in delays they come after the submitters."""

    setting: Setting
    seed: int
    session: int = 1  # of the same peers; each has other jobs
    now: float = 0.0
    heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = field(default_factory=list)
    made: Iterator[int] = field(default_factory=itertools.count)  # events of one moment happen in this order
    double_books: int = 0
    declines: int = 0
    on_free: Callable[[int], None] = lambda _: None

    def __post_init__(self) -> None:
        self.rng, n, m = np.random.default_rng(self.seed), self.setting.submitters, self.setting.solvers
        below, above = self.setting.markup
        self.gossip = _gossip(self.rng, n + m)
        self.direct = self.rng.uniform(*HOP_S, (n, m))
        self.cost = (600 * self.rng.lognormal(0, 0.4, m)).astype(int)
        self.floor = (self.cost * (1 + self.rng.uniform(0, 1, m) * above)).astype(int)
        self.speed = self.rng.uniform(0.7, 1.3, m)
        self.memory = self.rng.choice([8, 16, 32], m, p=[0.5, 0.3, 0.2]) * GIGABYTE
        known = self.rng.uniform(0, 1, m) >= (1 if self.setting.cold else NEWCOMERS)
        self.right = np.where(known, self.rng.integers(*HISTORY, m), 0)
        self.newcomer = ~known
        self.working: list[Job | None] = [None] * m
        self.opened = np.full(m, -np.inf)  # since when a solver works, and since when it is free again
        self.freed = np.full(m, -1.0)
        self.rng = np.random.default_rng((self.seed, self.session))
        self.jobs = [job for submitter in range(n) for job in self._jobs(submitter, below)]
        for index, job in enumerate(self.jobs):
            job.index = index

    def _jobs(self, submitter: int, below: float) -> list[Job]:
        """As much work as one machine does in a session: a market of as many solvers is balanced."""
        made, left = [], round(HORIZON_S / UNIT_S)
        while left:
            units = min(left, int(self.rng.integers(1, 4)))
            left -= units
            value = int(1000 * self.rng.lognormal(0, 0.5))
            limit = int(value * (1 - self.rng.uniform(0, 1) * below))
            memory = int(self.rng.choice([4, 12, 24], p=[0.6, 0.3, 0.1])) * GIGABYTE
            arrives = float(self.rng.uniform(0, HORIZON_S))
            made.append(Job(0, submitter, arrives, units, value, limit, memory))
        return made

    # --- news --------------------------------------------------------------------------------------------
    def at(self, delay: float, act: Callable[..., None], *arguments: Any) -> None:
        """Do something `delay` seconds from now."""
        heapq.heappush(self.heap, (self.now + delay, next(self.made), act, arguments))

    def tick(self) -> float:
        """Until the next tick of whoever wants to say something."""
        return float(self.rng.uniform(0, TICK_S))

    def to_solvers(self, submitter: int) -> npt.NDArray[np.float64]:
        """How long gossip of a submitter takes to each solver."""
        return self.gossip[submitter, self.setting.submitters :]

    def to_submitter(self, solver: int, submitter: int) -> float:
        """How long gossip of a solver takes to a submitter."""
        return float(self.gossip[self.setting.submitters + solver, submitter])

    def between_solvers(self, solver: int) -> npt.NDArray[np.float64]:
        """How long news of each other solver takes to this one."""
        return self.gossip[self.setting.submitters + solver, self.setting.submitters :]

    def run(self) -> None:
        """Until the session is over."""
        while self.heap and self.heap[0][0] < HORIZON_S:
            self.now, _, act, arguments = heapq.heappop(self.heap)
            act(*arguments)

    # --- work --------------------------------------------------------------------------------------------
    def start(self, job: Job, solver: int, price: int) -> None:
        """A deal is opened. Nothing here forbids to open two on one slot: they are counted."""
        self.double_books += self.working[solver] is not None or job.state == "running"
        self.working[solver] = job
        self.opened[solver] = self.now
        job.state, job.solver, job.price, job.starts = "running", solver, price, self.now
        self.at(self.takes(job, solver), self._end, job)

    def _end(self, job: Job) -> None:
        job.state = "done"
        self.working[job.solver] = None
        self.freed[job.solver] = self.now
        self.right[job.solver] += 1
        self.on_free(job.solver)

    def takes(self, job: Job, solver: int) -> float:
        """Seconds of a job on a machine."""
        return job.units * UNIT_S / float(self.speed[solver])

    def surplus(self) -> float:
        """What all work done by the end of the session was worth above what it cost, in units x unit price."""
        total = 0.0
        for job in self.jobs:
            if job.state in ("running", "done"):
                done = min(1.0, (HORIZON_S - job.starts) / self.takes(job, job.solver))
                total += done * job.units * (job.value - int(self.cost[job.solver]))
        return total


def _gossip(rng: np.random.Generator, peers: int) -> npt.NDArray[np.float64]:
    """Seconds from each peer to each other over a random graph: news takes the fastest way, as in a flood."""
    ends = np.array([(a, b) for a in range(peers) for b in rng.choice(peers, LINKS, replace=False) if a != b])
    delays = rng.uniform(*HOP_S, len(ends))
    graph = csr_matrix((delays, (ends[:, 0], ends[:, 1])), (peers, peers))
    made: npt.NDArray[np.float64] = dijkstra(graph.maximum(graph.T), directed=False)
    return made


def optimum(world: World) -> float:
    """No mechanism, however it knows the future, gets more than this: the assignment of greatest weight of work to
    machine time, in units x unit price.

    A unit of work may take time of a machine that has its memory, after its job arrived, for the value of the unit less
    the cost of the machine. In its linear form, for as weights are a value less a cost, it is enough to say how much of
    each job is done and how much of each machine's time is used in each of BINS parts of the session: as much is done
    as is used, and by Hall's condition, for each memory size and part, no more is done of the jobs that need as much
    and arrive in it or later than is used of machines as large from its beginning on. Every schedule keeps that, and
    of what the end cuts off both sides count the part that is done. The bound is above what can be had: work of one
    job may lie on several machines, at once, in any order; arrivals are known to a part; news takes no time.
    """
    value, arrives, needs, units = map(
        np.array, zip(*((j.value, j.arrives, j.memory_bytes, j.units) for j in world.jobs), strict=True)
    )
    solvers, part = world.setting.solvers, HORIZON_S / BINS
    cost, room = np.repeat(world.cost, BINS), np.repeat(world.memory, BINS)
    begins = np.tile(np.arange(BINS) * part, solvers)
    limits = []
    for memory in np.unique(needs):
        for begin in np.arange(BINS) * part:
            done, used = (needs >= memory) & (arrives >= begin), (room >= memory) & (begins >= begin)
            limits.append(np.concatenate((done.astype(float), -used.astype(float))))
    balance = np.concatenate((np.ones(value.size), -np.ones(cost.size)))
    most = np.concatenate((units, np.repeat(world.speed * part / UNIT_S, BINS)))
    found = linprog(
        np.concatenate((-value, cost)), A_ub=csr_matrix(np.array(limits)), b_ub=np.zeros(len(limits)),
        A_eq=balance[None], b_eq=[0.0], bounds=np.column_stack((np.zeros(most.size), most)), method="highs",
    )  # fmt: skip
    assert found.success, found.message
    return float(-found.fun)
