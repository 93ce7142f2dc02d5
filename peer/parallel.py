"""Units of runs on the market: bids are gathered until each unit can have a solver of its own, then all are awarded.

One round a second, like the ordinary ones; a unit whose solver declined is awarded alone beside the others, which stay
where they are. A large round is played in a thread and waited for (docs/decisions/0017-large-rounds.md): on return what
is no longer as it was is not awarded, and is placed beside the others in the next. A round that awards is journalled as
it was played (market/placing.py). Sans-IO.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from market.link_table import LinkTable
from market.matching import Choice, Refusal
from market.placing import PlaceUnits, UnitsPlaced
from market.step_time import Volume
from market.unit_round import UnitBids, UnitRound
from peer.deals import Job, JobState, task_of
from peer.desk import Desk
from peer.jobs import JobDesk
from peer.overtaken import dealt, taken_since
from peer.settler import Settler
from protocol import params
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


@dataclass(frozen=True)
class _Awaited:
    """A round that is played: its number, the jobs of its units, the deals of this peer's jobs when it began."""

    number: int
    jobs: Mapping[int, bytes]
    dealt: frozenset[bytes]


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
    awaited: dict[bytes, _Awaited] = field(default_factory=dict)  # run -> its round that is played in a thread
    begun: int = 0  # rounds of this process

    def round(self, wanted: Wanted) -> None:
        """Award all units that lack a solver, or note why they cannot be yet. Once a round of the network."""
        now, round_ns = self.desk.now_ns, self.desk.network.rules.round_ms * 10**6
        open_jobs = [job for job in wanted.jobs if job.state == JobState.OFFERED]
        if not open_jobs or now < self.next_ns.setdefault(wanted.run, now + round_ns) or wanted.run in self.awaited:
            return
        self.next_ns[wanted.run] = now + round_ns
        for job in open_jobs:
            if job.offer_id not in self.desk.book.offers:
                self.jobs.offer(job)  # it ran out
        self.table.expire(now_ns=self.desk.wall_ns)
        played, self.begun = self._played(wanted, open_jobs), self.begun + 1
        large = played.tries >= params.PLACING_THREAD_MIN
        bids, known = [bid_id for one in played.units.values() for bid_id, _ in one.bids], self.desk.book.envelopes
        effect = PlaceUnits(
            number=self.begun,
            run=wanted.run,
            network=self.desk.network.id,
            round=played,
            offers={job.unit: job.offer for job in open_jobs},
            envelopes={bid_id: known[bid_id] for bid_id in bids if bid_id in known},
        )
        deals = dealt(self.jobs.jobs.values()) if large else frozenset[bytes]()
        awaited = _Awaited(self.begun, {job.unit: job.id for job in open_jobs}, deals)
        if large:
            self.awaited[wanted.run] = awaited
            self.desk.add(effect)
        else:
            self._award(awaited, effect.play())

    def on_placed(self, event: UnitsPlaced) -> None:
        """The round that was waited for: propose to those who can still have the work."""
        awaited = self.awaited.get(event.run)
        if awaited is None or awaited.number != event.number:
            return  # one from before a restart, or of a run that lacks nothing any more, counts for nothing
        del self.awaited[event.run]
        self.next_ns[event.run] = self.desk.now_ns + self.desk.network.rules.round_ms * 10**6
        self._award(awaited, event, late=True)

    def _award(self, awaited: _Awaited, event: UnitsPlaced, *, late: bool = False) -> None:
        """late: things may have changed since the round began. A unit whose winner is not as it was stays offered: the
        next round places it beside the others, as one whose solver declined."""
        self._note(event)
        if event.chosen is None:
            return
        assert event.written is not None, "a choice is written down"
        every, deals = self.jobs.jobs, [b""] * len(event.chosen)
        taken = taken_since(every.values(), awaited.dealt) if late else set()
        for place, (unit, won) in enumerate(sorted(event.chosen.items())):
            open_unit, job = event.round.units[unit], every[awaited.jobs[unit]]
            if job.state != JobState.OFFERED or job.offer_id != open_unit.offer_id:
                continue
            if late and self.jobs.overtaken(job, job.offer_id, won.scored, taken):
                continue
            scored = [one.scored for one in event.round.scored[unit].values()]
            ranked = tuple(sorted(scored, key=lambda one: (one != won.scored, one.score_micro, one.bid_id)))
            self.award(job, open_unit.offer, won.bid, Choice(won.scored, ranked, ()))
            deals[place] = job.deal
        if any(deals):
            self.jobs.matches.placed(event.run, event.round.now_ns, event.written, deals)

    def _played(self, wanted: Wanted, open_jobs: Sequence[Job]) -> UnitRound:
        """The round as it stands now, and stays: nothing in it changes when the book does."""
        book, now_ns = self.desk.book, self.desk.wall_ns
        units = {
            job.unit: UnitBids(
                job.offer_id, offer, book.round_bids(job.offer_id, now_ns=now_ns)[0], self.jobs.excluded(job)
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
            table=self.table.as_now(),
            now_ns=now_ns,
        )

    def _note(self, event: UnitsPlaced) -> None:
        """Keep the round for `why`, and say what changed."""
        played, run = event.round, event.run
        scored, given = played.scored, played.given
        left = tuple(unit for unit in scored if given[unit] < 0)
        solvers = len({peer for found in scored.values() for peer in found})
        bids = {unit: len(found) for unit, found in scored.items()}
        told = Standing(bids, played.refused, left, solvers, played.stages * played.replicas)
        known, self.standing[run] = self.standing.get(run), told
        if left and (known is None or known.left != left):
            self.desk.emit("waiting", run, why="; ".join(self.why(run)))

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
        self.awaited.pop(run, None)
