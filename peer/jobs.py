"""The submitter's jobs before a deal: budget, offer, matching rounds, and starting over after a deal that failed.

Sans-IO. What a job needs from a deal reaches it through `peer/submitter.py`; the chosen bid leaves by `on_choice`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from market.matching import Choice, Proven, Scored
from market.quoting import channel_micro, lock_micro
from market.rounds import Candidate, Played, Round
from peer.deals import Job, JobState, PassedOver, operations_per_check, salt_of, task_of
from peer.desk import MARKET, Desk
from peer.matches import Matches
from peer.messages import Records
from peer.overtaken import dealt, overtaken, taken_since
from peer.settler import Settler
from protocol import params
from protocol.codec import blake
from protocol.credit_records import NO_CREDIT
from protocol.errors import InsufficientFunds, LimitExceeded, LocalProtocolError, VerificationFailed
from protocol.incentives import rate_of_deal
from protocol.profile_task import ProfileSpec
from protocol.records import Agreement, Bid, Offer, amount_for, open_record
from protocol.script import blobs_of
from protocol.sealing import masked
from protocol.task import TaskSpec, task_id

__all__ = ["JobDesk"]


@dataclass(frozen=True)
class _Awaited:
    """A round, whose offer is whose, and the envelopes of the bids when it began."""

    begun: Round
    candidates: dict[bytes, Candidate]  # by job
    envelopes: Mapping[bytes, bytes]  # by bid
    dealt: frozenset[bytes] = frozenset()  # the deals of this peer's jobs when it began


@dataclass
class JobDesk:
    """All jobs of this peer, and the offers of the open ones. `on_choice(job, offer, bid, choice)` proposes."""

    desk: Desk
    settler: Settler
    on_choice: Callable[[Job, Offer, Bid, Choice], None] = lambda *_: None
    on_unit_back: Callable[[Job, str], None] = lambda *_: None  # a unit of a run lost its solver, and why
    speed_of: Callable[[bytes], Proven] = lambda _: Proven("none", 0)
    jobs: dict[bytes, Job] = field(default_factory=dict)
    rounds: dict[bytes, int] = field(default_factory=dict)  # job -> next round at
    repeats: dict[bytes, int] = field(default_factory=dict)  # job -> gossip the offer again at
    moving_micro: Callable[[], int] = lambda: 0  # of the free credits, what moves into the stake
    sequence: int = 0  # of the last order; grows across restarts with the clock
    rounds_begun: int = 0
    awaited: _Awaited | None = None  # the round that is played in a thread
    told: dict[bytes, Choice] = field(default_factory=dict)  # job -> last round, for `why`

    def __post_init__(self) -> None:
        self.matches = Matches(self.desk, self.settler)

    def submit(self, job: Job) -> Job:
        """Open a job. Raises InsufficientFunds or LimitExceeded before anything is journalled."""
        if job.id in self.jobs:
            return self.jobs[job.id]
        if sum(1 for other in self.jobs.values() if other.open and not other.parent) >= params.JOBS_OPEN_MAX:
            raise LimitExceeded(f"{params.JOBS_OPEN_MAX} jobs are open", next_step="wait, or `ichiba job cancel JOB`")
        needed = self.channel_for(job, task_of(job.task).segments)
        profiles = params.PROFILES_MIN * self.profile_micro(job) if job.tolerant else 0
        if not needed or (job.tolerant and not profiles):
            raise InsufficientFunds(
                f"the {'profile of the job' if needed else 'job'} comes to less than a micro-credit",
                why="no channel is opened for nothing",
                next_step="raise the price limit, or make the task larger",
            )
        if needed + profiles > job.budget_micro:
            profiled = f", {profiles} of them for profiles of a tolerant task" if profiles else ""
            raise InsufficientFunds(
                f"the job can cost {needed + profiles} micro-credits with its checks{profiled}, the budget is "
                f"{job.budget_micro}",
                next_step=f"raise the budget to {(needed + profiles) / 1e6:.6f} credits or lower the price limit",
            )
        self.require(job, needed)
        self.jobs[job.id] = job
        if job.tolerant:
            job.state = JobState.PROFILING
            self.save(job)
            self.desk.emit("profiling", job.id, wanted=params.PROFILES_MIN, budget_micro=profiles)
        else:
            self.offer(job)
        return job

    def require(self, job: Job, needed: int) -> None:
        """Raise InsufficientFunds, or LocalProtocolError, where neither balance nor credit lines bear the job."""
        if job.credit and job.tolerant:
            why = "the verifiers who profile it are paid out of channels"
            hint = 'make it exact (mode = "exact"), or pay for it'
            raise LocalProtocolError("a tolerant job cannot be done on credit", why=why, next_step=hint)
        if job.credit:
            self.settler.credit.require(needed)
            return
        reserved = self.reserved_micro() + self.moving_micro()
        free = self.settler.free_micro(self.desk.me)
        if free - reserved < job.budget_micro:
            credit = self.settler.credit.words() if self.settler.credit.to_spend() else ""
            why = f"{reserved} are reserved for other open jobs and orders" if reserved else ""
            raise InsufficientFunds(
                f"the budget is {job.budget_micro} micro-credits, {free - reserved} are free",
                why="; ".join(part for part in (why, credit) if part),
                next_step="`ichiba submit --credit`, or see `ichiba wallet`" if credit else "see `ichiba wallet`",
            )

    def reserved_micro(self) -> int:
        """What of the free credits is kept for jobs that are open."""
        return sum(self._reserved(job) for job in self.jobs.values())

    def number(self) -> int:
        """The next number of an order of this peer: one series, also for moves of its stake."""
        self.sequence = max(self.sequence + 1, self.desk.now_ns)  # two orders of one moment are not one signed twice
        return self.sequence

    def children(self, job: Job) -> list[Job]:
        """The profiles that were ordered for a tolerant job; the units of a run."""
        if job.units:
            return [self.jobs[unit] for unit in job.units]
        return [other for other in self.jobs.values() if other.parent == job.id] if job.tolerant else []

    def in_channels(self, job: Job) -> int:
        """What the open channels of a job's children hold of its budget, or will when they open."""
        if not job.units:
            return sum(child.budget_micro for child in self.children(job) if child.open and child.deal)
        channels = (self.settler.channels.get(deal) for child in self.children(job) for deal in child.deals)
        return sum(channel.agreement.channel_micro for channel in channels if channel and not channel.closed)

    def spent(self, job: Job) -> int:
        """What a job cost so far, with its profiles: they are paid out of its budget."""
        return job.spent_micro + sum(child.spent_micro for child in self.children(job))

    def profile_micro(self, job: Job) -> int:
        """The most that one profile of a tolerant job costs."""
        task = task_of(job.task)
        assert isinstance(task, TaskSpec)
        spec = ProfileSpec(network=self.desk.network.id, of=task, number=0)
        return amount_for(spec.operations_per_step, job.unit_price_max)

    def _reserved(self, job: Job) -> int:
        """What an open job may still take out of the free balance."""
        if job.parent or not job.open or job.deal or job.credit:
            return 0
        return job.budget_micro - self.spent(job) - self.in_channels(job)

    def channel_for(self, job: Job, segments_end: int) -> int:
        """The most that the rest of a job costs, with its checks; on credit, and where the end is known, nobody is paid
        for any."""
        if job.credit or job.known:
            return amount_for(self._operations(job), job.unit_price_max)
        return channel_micro(
            self.desk.network.rules,
            operations=self._operations(job),
            segments=segments_end - job.segment,
            unit_price=job.unit_price_max,
            operations_per_segment=operations_per_check(task_of(job.task)),
            permille=self.desk.network.rules.newcomer_permille,  # at most so much is checked
        )

    def _operations(self, job: Job) -> int:
        task = task_of(job.task)
        return task.operations_per_step * (task.steps - task.steps_of(job.segment).start)

    def offer(self, job: Job) -> None:
        """Gossip the rest of the job under a new nonce, or fail it where the budget does not reach."""
        task, now, rules = task_of(job.task), self.desk.now_ns, self.desk.network.rules
        dated_ns = self.desk.wall_ns
        if job.offer_id:
            self.desk.book.remove_offer(job.offer_id)
        if self.late(job):
            self.end(job, JobState.FAILED, self.missed(job))
            return
        job.nonce += 1
        operations = self._operations(job)
        checked = bool(operations_per_check(task)) and not job.credit and not job.known
        needed, left = self.channel_for(job, task.segments), job.budget_micro - self.spent(job)
        if needed > left:
            self.end(
                job,
                JobState.FAILED,
                f"the rest of the job can cost {needed} micro-credits, {left} of the budget are left; submit it again "
                "with a larger --budget",
            )
            return
        offer = Offer(
            network=self.desk.network.id,
            submitter=self.desk.me,
            nonce=int.from_bytes(job.id[:6], "big") * 2**15 + job.nonce % 2**15,
            task=task_id(task),
            program=masked(salt_of(task), task.program),
            data=blake("ichiba/data", *(masked(salt_of(task), b) for b in blobs_of(task) if b != task.program)),
            mode=task.mode,
            first_segment=job.segment,
            last_segment=task.segments,
            operations=operations,
            memory_bytes=job.memory_bytes,
            checkpoint_bytes=job.checkpoint_bytes,
            sandbox=job.sandbox,
            unit_price_max=job.unit_price_max,
            budget_micro=0 if job.credit else needed,
            # Nothing of a script or a profile is re-executed, or where the end is known: no stake is at risk.
            check_permille=rules.newcomer_permille if checked else 0,
            lock_micro=lock_micro(rules, amount_for(operations, job.unit_price_max)) if checked else 0,
            created_ns=dated_ns,
            expires_ns=min(dated_ns + rules.offer_lifetime_ms * 10**6, job.deadline_ns or params.FOREVER_NS),
            tolerance=job.tolerance,
            device=job.device,
            device_memory_bytes=job.device_memory_bytes,
            deadline_ns=job.deadline_ns,
            content_bytes=sum(blobs_of(task).values()) + (job.checkpoint_bytes if job.base_blob else 0),
            privacy="sealed" if job.key else "open",
            units=len(self.jobs[job.parent].units) if job.unit >= 0 else 0,
        )
        job.offer = self.desk.seal(offer)
        job.offer_id = open_record(job.offer, network=self.desk.network.id)[1]
        job.offered_ns, job.state, job.deal = now, JobState.OFFERED, b""
        job.passed = {}
        self.desk.book.add_offer(job.offer_id, offer, now_ns=dated_ns)
        self.rounds[job.id] = now + rules.round_ms * 10**6
        self.repeats[job.id] = now + params.OFFER_REPEAT_NS
        self.save(job)
        self._spread(job)
        self.desk.emit(
            "offer",
            job.id,
            offer=job.offer_id,
            segments=[job.segment, task.segments],
            operations=operations,
            unit_price_max=job.unit_price_max,
            budget_micro=job.budget_micro,
        )

    def _spread(self, job: Job) -> None:
        """Tell the market the offer, or the one solver that it is for."""
        if job.only:
            self.desk.send(job.only, Records((job.offer,)))
        else:
            self.desk.publish(MARKET, job.offer)

    def late(self, job: Job) -> bool:
        """Whether the job's deadline has passed."""
        return 0 < job.deadline_ns <= self.desk.wall_ns

    def missed(self, job: Job) -> str:
        """Why a late job fails, and what its submitter can do."""
        ago_s, segments = (self.desk.wall_ns - job.deadline_ns) // 10**9, task_of(job.task).segments
        return (
            f"its deadline passed {ago_s} s ago with {job.segment} of {segments} segments done; what is done is paid; "
            "submit it again with a later --deadline or a higher --price (`ichiba quote` shows how fast solvers are)"
        )

    def _candidate(self, job: Job) -> Candidate | None:
        """The job's offer for the round that is due, or None if it had to be offered anew."""
        rules, now, book = self.desk.network.rules, self.desk.now_ns, self.desk.book
        self.rounds[job.id] = now + rules.round_ms * 10**6
        offer = book.offers.get(job.offer_id)
        if offer is None:
            self.offer(job)
            return None
        bids, packed = book.round_bids(job.offer_id, now_ns=self.desk.wall_ns)
        return Candidate(
            offer_id=job.offer_id,
            offer=offer,
            bids=bids,
            round_number=(now - job.offered_ns) // (rules.round_ms * 10**6),
            excluded=self.excluded(job),
            stake_min_micro=rules.checker_stake_min_micro if offer.mode == "profile" else 0,
            now_ns=self.desk.wall_ns,
            packed=packed,
        )

    def _match(self, due: list[Job]) -> None:
        """One round over all offers whose time it is. A large one is played in a thread, and waited for."""
        candidates = {job.id: found for job in due if (found := self._candidate(job)) is not None}
        known = self.matches.gather(candidates.values(), self.speed_of)
        self.rounds_begun += 1
        begun = Round(self.rounds_begun, tuple(candidates.values()), known)
        envelopes = self.desk.book.envelopes
        if begun.bids < params.ROUND_THREAD_MIN:
            self._award(_Awaited(begun, candidates, envelopes), begun.play().choices)
            return
        self.awaited = _Awaited(begun, candidates, dict(envelopes), dealt(self.jobs.values()))
        self.desk.add(begun)

    def on_played(self, event: Played) -> None:
        """The round that was waited for: propose to the winners that can still have the work."""
        awaited = self.awaited
        if awaited is not None and awaited.begun.number == event.number:  # one from before a restart counts for nothing
            self.awaited = None
            self._award(awaited, event.choices, late=True)

    def _award(self, awaited: _Awaited, choices: dict[bytes, Choice], *, late: bool = False) -> None:
        """late: things may have changed since the round began; what is not as it was waits for the next one."""
        winners = {choice.winner.solver for choice in choices.values() if choice.winner is not None}
        asked = [
            (job, one, choices[one.offer_id])
            for job_id, one in awaited.candidates.items()
            if (job := self.jobs.get(job_id)) and job.state == JobState.OFFERED and job.offer_id == one.offer_id
        ]
        for job, _, choice in asked:
            self._tell(job, choice)
        others = taken_since(self.jobs.values(), awaited.dealt) if late else set()
        for job, one, choice in asked:
            if (winner := choice.winner) is None:
                continue
            if late and self.overtaken(job, one.offer_id, winner, others, stake_min_micro=one.stake_min_micro):
                continue
            taken = winners - {winner.solver}
            offers, known = len(awaited.candidates), awaited.begun.known
            self.matches.note(one, choice, job.offer, offers, taken, known, awaited.envelopes)
            self.on_choice(job, one.offer, dict(one.bids)[winner.bid_id], choice)

    def overtaken(
        self, job: Job, offer_id: bytes, winner: Scored, taken: Collection[bytes], *, stake_min_micro: int = 0
    ) -> bool:
        """Of a job that is still offered so: see peer/overtaken.py. taken: who was given other work meanwhile."""
        offer = self.desk.book.offers.get(offer_id)
        return offer is None or overtaken(
            self.desk, self.settler, winner, offer_id, offer, excluded=self.excluded(job), taken=taken,
            proven=self.speed_of, stake_min_micro=stake_min_micro,
        )  # fmt: skip

    def _tell(self, job: Job, choice: Choice) -> None:
        """Keep the round for `why`, and say what changed."""
        if self.told.get(job.id) == choice:
            return
        self.told[job.id] = choice
        self.desk.emit(
            "round",
            job.id,
            ranked=[
                {
                    "solver": s.solver,
                    "price": s.price_micro,
                    "risk": s.risk_micro,
                    "wait": s.wait_micro,
                    "transfer": s.transfer_micro,
                }
                for s in choice.ranked
            ],
            refused=[{"solver": peer, "code": r.code, "why": r.why} for peer, r in choice.refused],
            explored=choice.explored,
            more=choice.more,
        )

    def excluded(self, job: Job) -> set[bytes]:
        """Who may not have the job now: who failed it, who rests after a refusal, who is not the one that it is for,
        and who runs, or ran, another replica of it, for two runs on one machine say nothing of each other."""
        resting = {peer for peer, until in job.resting.items() if self.desk.now_ns < until}
        others = [other for other in self.jobs.values() if job.group and other.group == job.group and other is not job]
        uninvited = self.desk.book.bids.get(job.offer_id, {}).keys() - {job.only} if job.only else set()
        return {*job.culprits, *resting, *uninvited, *(solver for other in others for solver in other.solvers)}

    def note(self, job_id: bytes, outcome: str) -> None:
        """How a script ended, for people."""
        if outcome:
            self.jobs[job_id].outcome = outcome
            self.save(self.jobs[job_id])

    def agreement(self, job: Job, offer: Offer, bid: Bid, bid_id: bytes, seed_commitment: bytes) -> Agreement:
        """The terms of a deal on `bid`, from the job's next segment to its end."""
        task, rules, now = task_of(job.task), self.desk.network.rules, self.desk.wall_ns
        job.solvers.append(bid.solver)
        line = self.settler.credit.line(creditor=bid.solver, debtor=self.desk.me) if job.credit else None
        permille = offer.check_permille and rate_of_deal(
            rules,
            price_micro=amount_for(offer.operations, bid.unit_price),
            lock_micro=bid.lock_micro,
            streak=self.settler.history(bid.solver).streak,
        )
        channel = channel_micro(
            rules,
            operations=offer.operations,
            segments=task.segments - job.segment,
            unit_price=bid.unit_price,
            operations_per_segment=operations_per_check(task) if permille else 0,
            permille=permille,
        )
        return Agreement(
            network=self.desk.network.id, offer=job.offer_id, bid=bid_id, task=task_id(task), submitter=self.desk.me,
            solver=bid.solver, sequence=self.number(), first_segment=job.segment, last_segment=task.segments,
            base_root=masked(salt_of(task), job.base_root), operations=offer.operations, unit_price=bid.unit_price,
            channel_micro=0 if job.credit else channel, lock_micro=bid.lock_micro, check_permille=permille,
            submitter_commitment=seed_commitment, solver_commitment=bid.seed_commitment,
            forced_commitment=bid.forced_commitment, accept_before_ns=now + rules.proposal_ms * 10**6,
            segment_deadline_ns=rules.segment_silence_ms * 10**6, created_ns=now, tolerance=job.tolerance,
            credit=line.id if line is not None else NO_CREDIT,
        )  # fmt: skip

    def passed_over(self, job: Job, solver: bytes, code: str, why: str) -> None:
        """The solver gave its slot to other work: nobody's fault. The offer stands, and the next round tries the next
        bid; this solver's counts again when it has another slot and says so with a new one. Who bids again and again
        and always takes other work rests as if it had failed."""
        times = job.passed[solver].times + 1 if solver in job.passed else 1
        job.passed[solver] = PassedOver(code, why[:300], times, self.desk.now_ns)
        if times >= params.PASSED_OVER_MAX:
            job.passed[solver].times = 0
            job.resting[solver] = self.desk.now_ns + params.SOLVER_REST_NS
        job.deals.remove(job.deal)  # it never was one; the solver did no replica of it either
        job.solvers.remove(solver)
        job.deal, job.state = b"", JobState.OFFERED
        self.desk.book.void_bids(solver, until_ns=self.desk.wall_ns, offer_id=job.offer_id)
        self.rounds[job.id] = self.desk.now_ns  # it has waited a round for this answer: it need not wait another
        self.save(job)

    def reoffer(self, job: Job, why: str) -> None:
        """Back to the market after a deal that did not finish the job."""
        job.deal = b""
        job.fruitless += 1
        if job.unit >= 0:
            self.on_unit_back(job, why)
            return
        if job.parent:
            job.solvers.clear()  # who made no profile may make another one
        if job.cancelled:
            self.end(job, JobState.CANCELLED, why)
            return
        if self.late(job) or job.known:
            self.end(job, JobState.FAILED, why if job.known else self.missed(job))
            return
        if job.fruitless >= params.FRUITLESS_DEALS_MAX:
            self.end(job, JobState.FAILED, f"{job.fruitless} deals brought the job no further; the last: {why}")
            return
        if job.diverged >= params.DIVERGED_SOLVERS:
            self.end(job, JobState.FAILED, f"the task diverges ({why}); lower the learning rate and submit it again")
            return
        self.desk.emit("reoffer", job.id, why=why, segment=job.segment)
        self.offer(job)

    def end(self, job: Job, state: JobState, reason: str) -> None:
        """Nothing more will happen to this job."""
        reason = reason or job.outcome
        job.state, job.reason, job.ended_ns, job.deal = state, reason, self.desk.now_ns, b""
        if job.offer_id:
            self.desk.book.remove_offer(job.offer_id)
        self.save(job)
        self.desk.emit(state.name.lower(), job.id, reason=reason, final_root=job.base_root, checkpoint=job.base_blob)

    def tick(self) -> None:
        """Matching rounds, and offers gossiped again."""
        now = self.desk.now_ns
        offered = [job for job in self.jobs.values() if job.state == JobState.OFFERED]
        for job in [job for job in self.jobs.values() if job.deadline_ns and self.late(job)]:
            if job.state in (JobState.OFFERED, JobState.PROFILING):
                self.end(job, JobState.FAILED, self.missed(job))
        offered = [job for job in offered if job.open and job.unit < 0]  # units are awarded together (peer/parallel.py)
        if self.awaited is None and any(now >= self.rounds.setdefault(job.id, now) for job in offered):
            # Those that would be due soon come along: together they are matched better than one after the other.
            soon = now + self.desk.network.rules.round_ms * 10**6 // 2
            self._match([job for job in offered if soon >= self.rounds.setdefault(job.id, now)])
        for job in list(self.jobs.values()):
            if job.state == JobState.OFFERED and now >= self.repeats.setdefault(job.id, now):
                self.repeats[job.id] = now + params.OFFER_REPEAT_NS
                self._spread(job)

    def redate(self) -> None:
        """The clock jumped: offers that bear the old time are made anew."""
        for job in list(self.jobs.values()):
            if job.state == JobState.OFFERED:
                self.desk.attempt(self.offer, job)

    def live_offers(self) -> list[bytes]:
        """The envelopes a peer just met should hear of."""
        return [job.offer for job in self.jobs.values() if job.state == JobState.OFFERED and job.offer and not job.only]

    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """Rebuild the jobs, and their offers where they still stand."""
        for key, value in rows("jobs"):
            job = self.jobs[key] = msgspec.msgpack.decode(value, type=Job)
            offer = open_record(job.offer, network=self.desk.network.id)[0] if job.offer else None
            if job.state == JobState.OFFERED and isinstance(offer, Offer):
                with suppress(VerificationFailed):  # ran out, or the clock was set back: a round makes it anew
                    self.desk.book.add_offer(job.offer_id, offer, now_ns=self.desk.wall_ns)
        self.matches.restore(rows)

    def save(self, job: Job) -> None:
        """Journal the job."""
        self.desk.save("jobs", job.id, msgspec.msgpack.encode(job))
