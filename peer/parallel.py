"""Units of runs on the market: bids are gathered until each unit can have a solver of its own, then all are awarded.

One round a second, like the ordinary ones; a unit whose solver declined is awarded alone beside the others, which stay
where they are. Sans-IO. What a choice costs is market/joint_placement.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from market.joint_placement import Candidates, choose_units, fullest
from market.link_table import LinkTable
from market.matching import Choice, Refusal, Scored, believed_ns, refuse_bid, transfer_ns
from market.placement_cost import Links
from market.step_time import Volume
from peer.deals import Job, JobState, task_of
from peer.desk import Desk
from peer.jobs import JobDesk
from peer.settler import Settler
from protocol import params
from protocol.records import Bid, Offer, amount_for

__all__ = ["ParallelDesk", "Wanted"]

_HOUR_S: Final = 3600
_Bids: TypeAlias = dict[bytes, tuple[Scored, Bid, int]]
"""The bids that may have a unit, by solver, with how long each would take for it, in ns."""


@dataclass(frozen=True)
class Wanted:
    """A run that lacks solvers. jobs: of all its units. solvers: of those that have one, this peer itself for those it
    keeps. volume: what a step sends."""

    run: bytes
    stages: int
    replicas: int
    jobs: Sequence[Job]
    solvers: Mapping[int, bytes]
    volume: Volume


@dataclass(frozen=True)
class Standing:
    """How a round of a run ended: for each unit without a solver how many bid, and why the others of them cannot have
    it; the units that are left over when each solver takes one; how long the run has waited."""

    bids: dict[int, int]
    refused: dict[int, tuple[Refusal, ...]]
    left: tuple[int, ...]
    solvers: int
    units: int


@dataclass
class ParallelDesk:
    """See the module docstring. `award(job, offer, bid, choice)` proposes."""

    desk: Desk
    settler: Settler
    jobs: JobDesk
    award: Callable[[Job, Offer, Bid, Choice], None] = lambda *_: None
    table: LinkTable = field(default_factory=LinkTable)  # what peers reported of their links
    standing: dict[bytes, Standing] = field(default_factory=dict)  # run -> its last round, for `why`
    next_ns: dict[bytes, int] = field(default_factory=dict)

    def round(self, wanted: Wanted) -> None:
        """Award all units that lack a solver, or note why they cannot be yet. Once a round of the network."""
        now, round_ns = self.desk.now_ns, self.desk.network.rules.round_ms * 10**6
        open_jobs = [job for job in wanted.jobs if job.state == JobState.OFFERED]
        if not open_jobs or now < self.next_ns.setdefault(wanted.run, now + round_ns):
            return
        self.next_ns[wanted.run] = now + round_ns
        scored: dict[int, _Bids] = {}
        refused: dict[int, tuple[Refusal, ...]] = {}
        for job in open_jobs:
            if job.offer_id not in self.desk.book.offers:
                self.jobs.offer(job)  # it ran out
            scored[job.unit], refused[job.unit] = self._weigh(job, set(wanted.solvers.values()))
        rows = sorted({peer for bids in scored.values() for peer in bids})  # the devices of the model
        place = {peer: row for row, peer in enumerate(rows)}
        toll: list[dict[int, int]] = [{} for _ in wanted.jobs]
        for unit, bids in scored.items():
            toll[unit] = {
                place[peer]: one.price_micro + one.risk_micro + one.transfer_micro for peer, (one, _, _) in bids.items()
            }
        for unit, solver in sorted(wanted.solvers.items()):  # this peer stands there once for each unit that it keeps
            rows.append(solver)
            toll[unit] = {len(rows) - 1: 0}
        self._note(wanted, scored, refused, toll)
        chosen = self._choose(wanted, toll, scored, rows)
        if chosen is None:
            return
        for job in open_jobs:
            one, bid, _ = scored[job.unit][rows[chosen[job.unit]]]
            every = (other for other, _, _ in scored[job.unit].values())
            ranked = tuple(sorted(every, key=lambda other: (other != one, other.score_micro, other.bid_id)))
            self.award(job, self.desk.book.offers[job.offer_id], bid, Choice(one, ranked, ()))

    def _weigh(self, job: Job, taken: set[bytes]) -> tuple[_Bids, tuple[Refusal, ...]]:
        """The bids that may have a unit, by solver, with how long each takes in ns; and why the others may not."""
        offer, book = self.desk.book.offers.get(job.offer_id), self.desk.book
        found: _Bids = {}
        refused: list[Refusal] = []
        if offer is None:
            return found, ()
        hour_micro = amount_for(offer.operations, offer.unit_price_max)
        bids, _ = book.round_bids(job.offer_id, now_ns=self.desk.wall_ns)
        for bid_id, bid in sorted(bids):
            run_ns = believed_ns(offer.operations, bid.eta_ns, self.jobs.speed_of(bid.solver))
            moving_ns = transfer_ns(offer, self.desk.link_speed(bid.solver))
            refusal = refuse_bid(
                offer,
                bid,
                free_stake_micro=self.settler.free_stake(bid.solver),
                excluded=self.jobs.excluded(job),
                reachable=bid.solver in self.desk.peers,
                now_ns=self.desk.wall_ns,
                takes_ns=run_ns + moving_ns,
            )
            if refusal is None and bid.solver in taken:
                refusal = Refusal("taken", "it has another unit of this run")
            price = amount_for(offer.operations, bid.unit_price)
            if refusal is None and not price:
                refusal = Refusal("price", "at its price the unit comes to less than a micro-credit")
            if refusal is not None:
                refused.append(refusal)
                continue
            risk = price * (1_000_000 - self.settler.reputation(bid.solver).bound_ppm) // 1_000_000
            wait, moving = (hour_micro * each_ns // (_HOUR_S * 10**9) for each_ns in (run_ns, moving_ns))
            found[bid.solver] = Scored(bid_id, bid.solver, price, risk, wait, moving), bid, run_ns
        return found, tuple(refused)

    def _choose(
        self, wanted: Wanted, toll: list[dict[int, int]], scored: dict[int, _Bids], rows: list[bytes]
    ) -> list[int] | None:
        """The row of each unit, or None while there is no full choice."""
        if -1 in fullest(toll):
            return None
        task = task_of(wanted.jobs[0].task)
        took = {peer: run_ns for bids in scored.values() for peer, (_, _, run_ns) in bids.items()}
        step = sum(amount_for(task_of(job.task).operations_per_step, job.unit_price_max) for job in wanted.jobs)
        candidates = Candidates(
            stages=wanted.stages,
            replicas=wanted.replicas,
            toll=toll,
            links=self._links(rows),
            volume=wanted.volume,
            work_s=[took.get(peer, 0) / 1e9 / task.steps for peer in rows],
            second_micro=step * task.steps**2 // _HOUR_S,  # of each step, where an hour is worth what the whole costs
        )
        return choose_units(candidates)

    def _links(self, rows: Sequence[bytes]) -> Links:
        """The links between the devices of the model, as they were reported, or usual. Two of one peer are as near as
        can be."""
        found = self.table.matrices(rows)
        for row, column in [(i, j) for i, a in enumerate(rows) for j, b in enumerate(rows) if a == b]:
            found.delay_ms[row, column], found.gbps[row, column] = 0.0, params.LINK_SPEED_MAX * 8 / 1e9
        return Links(found.delay_ms, found.gbps)

    def _note(
        self,
        wanted: Wanted,
        scored: dict[int, _Bids],
        refused: dict[int, tuple[Refusal, ...]],
        toll: list[dict[int, int]],
    ) -> None:
        """Keep the round for `why`, and say what changed."""
        given = fullest(toll)
        left = tuple(unit for unit in scored if given[unit] < 0)
        solvers = len({peer for found in scored.values() for peer in found})
        told = Standing({u: len(found) for u, found in scored.items()}, refused, left, solvers, len(wanted.jobs))
        known, self.standing[wanted.run] = self.standing.get(wanted.run), told
        if left and (known is None or known.left != left):
            self.desk.emit("waiting", wanted.run, why="; ".join(self.why(wanted.run)))

    def why(self, run: bytes) -> list[str]:
        """Why a run waits for solvers, in sentences; none if it does not."""
        told = self.standing.get(run)
        if told is None or not told.left:
            return []
        words = [f"{told.units - len(told.left)} of {told.units} units have a solver, or bids of one"]
        for unit in told.left:
            codes = Counter(refusal.code for refusal in told.refused[unit])
            if told.bids[unit]:
                words.append(f"unit {unit} has bids only of solvers that other units need: {told.solvers} bid in all")
            elif codes:
                first = next(r for r in told.refused[unit] if r.code == codes.most_common(1)[0][0])
                words.append(f"unit {unit} has no bid that it can take ({first.code}: {first.why})")
            else:
                words.append(f"nobody bids on unit {unit}")
        return words

    def forget(self, run: bytes) -> None:
        """It lacks nothing."""
        self.standing.pop(run, None)
        self.next_ns.pop(run, None)
