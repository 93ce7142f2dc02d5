"""Units of runs on the market: bids are gathered until each unit can have a solver of its own, then all are awarded.

One round a second, like the ordinary ones; a unit whose solver declined is awarded alone beside the others, which stay
where they are. A round that awards is journalled as it was played (market/unit_round.py). Sans-IO.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from market.joint_placement import fullest
from market.link_table import LinkTable
from market.matching import Choice, Refusal
from market.step_time import Volume
from market.unit_round import OpenUnit, Placing, UnitBids, UnitRound, WeighedBid
from peer.deals import Job, JobState, task_of
from peer.desk import Desk
from peer.jobs import JobDesk
from peer.settler import Settler
from protocol.records import Bid, Offer, amount_for

__all__ = ["ParallelDesk", "Wanted"]


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
        for job in open_jobs:
            if job.offer_id not in self.desk.book.offers:
                self.jobs.offer(job)  # it ran out
        self.table.expire(now_ns=self.desk.wall_ns)
        played = self._played(wanted, open_jobs)
        self._note(wanted, played)
        chosen = played.choose()
        if chosen is None:
            return
        placing = self._placing(wanted, played, chosen)
        deals = []
        for job in open_jobs:
            if job.unit not in chosen:
                continue
            won, unit = chosen[job.unit], played.units[job.unit]
            every = [one.scored for one in played.scored[job.unit].values()]
            ranked = tuple(sorted(every, key=lambda one: (one != won.scored, one.score_micro, one.bid_id)))
            self.award(job, unit.offer, won.bid, Choice(won.scored, ranked, ()))
            deals.append(job.deal)
        self.jobs.matches.placed(wanted.run, placing, deals)

    def _played(self, wanted: Wanted, open_jobs: Sequence[Job]) -> UnitRound:
        """The round as it stands now."""
        book, now_ns = self.desk.book, self.desk.wall_ns
        units = {
            job.unit: UnitBids(
                job.offer_id, offer, sorted(book.round_bids(job.offer_id, now_ns=now_ns)[0]), self.jobs.excluded(job)
            )
            for job in open_jobs
            if (offer := book.offers.get(job.offer_id)) is not None
        }
        return UnitRound(
            stages=wanted.stages,
            replicas=wanted.replicas,
            volume=wanted.volume,
            steps=task_of(wanted.jobs[0].task).steps,
            step_micro=sum(
                amount_for(task_of(job.task).operations_per_step, job.unit_price_max) for job in wanted.jobs
            ),
            units=units,
            solvers=wanted.solvers,
            known=self.jobs.matches.facts(
                {bid.solver for one in units.values() for _, bid in one.bids}, self.jobs.speed_of
            ),
            table=self.table,
            now_ns=now_ns,
        )

    def _placing(self, wanted: Wanted, played: UnitRound, chosen: Mapping[int, WeighedBid]) -> Placing:
        """The round as it is written down."""
        envelopes, volume = self.desk.book.envelopes, wanted.volume
        offers = {job.unit: job.offer for job in wanted.jobs}
        return Placing(
            network=self.desk.network.id,
            run=wanted.run,
            stages=wanted.stages,
            replicas=wanted.replicas,
            micro_batches=volume.micro_batches,
            borders=tuple((int(ahead), int(back)) for ahead, back in volume.borders),
            shared=tuple(int(each) for each in volume.shared),
            every=volume.every,
            steps=played.steps,
            step_micro=played.step_micro,
            units=tuple(
                OpenUnit(
                    unit,
                    offers[unit],
                    tuple(envelopes[bid_id] for bid_id, _ in one.bids if bid_id in envelopes),
                    tuple(sorted({bid.solver for _, bid in one.bids} & set(one.excluded))),
                    chosen[unit].scored.bid_id,
                )
                for unit, one in sorted(played.units.items())
            ),
            solvers=tuple(sorted(wanted.solvers.items())),
            known=tuple(fact for _, fact in sorted(played.known.items())),
            reports=tuple(self.table.envelopes(played.rows)),
            now_ns=played.now_ns,
        )

    def _note(self, wanted: Wanted, played: UnitRound) -> None:
        """Keep the round for `why`, and say what changed."""
        scored, given = played.scored, fullest(played.toll)
        left = tuple(unit for unit in scored if given[unit] < 0)
        solvers = len({peer for found in scored.values() for peer in found})
        bids = {unit: len(found) for unit, found in scored.items()}
        told = Standing(bids, played.refused, left, solvers, len(wanted.jobs))
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
