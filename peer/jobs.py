"""The submitter's jobs before a deal: budget, offer, matching rounds, and starting over after a deal that failed.

Sans-IO. What a job needs from a deal reaches it through `peer/submitter.py`; the chosen bid leaves by `on_choice`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from market.matching import Choice, Proven, match_round
from market.quoting import channel_micro, lock_micro
from peer.deals import Job, JobState, operations_per_check, task_of
from peer.desk import MARKET, Desk
from peer.settler import Settler
from protocol import params
from protocol.codec import blake
from protocol.errors import InsufficientFunds, LimitExceeded
from protocol.records import Agreement, Bid, Offer, amount_for, open_record
from protocol.script import blobs_of
from protocol.task import task_id

__all__ = ["JobDesk"]


@dataclass
class JobDesk:
    """All jobs of this peer, and the offers of the open ones. `on_choice(job, offer, bid, choice)` proposes."""

    desk: Desk
    settler: Settler
    on_choice: Callable[[Job, Offer, Bid, Choice], None] = lambda *_: None
    speed_of: Callable[[bytes], Proven] = lambda _: Proven("none", 0)
    jobs: dict[bytes, Job] = field(default_factory=dict)
    rounds: dict[bytes, int] = field(default_factory=dict)  # job -> next round at
    repeats: dict[bytes, int] = field(default_factory=dict)  # job -> gossip the offer again at
    told: dict[bytes, Choice] = field(default_factory=dict)  # job -> last round, for `why`

    def submit(self, job: Job) -> Job:
        """Open a job. Raises InsufficientFunds or LimitExceeded before anything is journalled."""
        if job.id in self.jobs:
            return self.jobs[job.id]
        if sum(1 for other in self.jobs.values() if other.open) >= params.JOBS_OPEN_MAX:
            raise LimitExceeded(f"{params.JOBS_OPEN_MAX} jobs are open", next_step="wait, or `ichiba job cancel JOB`")
        needed = self._channel_for(job, task_of(job.task).segments)
        if needed > job.budget_micro:
            raise InsufficientFunds(
                f"the job can cost {needed} micro-credits with its checks, the budget is {job.budget_micro}",
                next_step=f"raise the budget to {needed / 1e6:.6f} credits or lower the price limit",
            )
        reserved = sum(o.budget_micro - o.spent_micro for o in self.jobs.values() if o.open and not o.deal)
        free = self.settler.free_micro(self.desk.me)
        if free - reserved < job.budget_micro:
            raise InsufficientFunds(
                f"the budget is {job.budget_micro} micro-credits, {free - reserved} are free",
                why=f"{reserved} are reserved for other open jobs" if reserved else "",
                next_step="see `ichiba wallet`",
            )
        self.jobs[job.id] = job
        self.offer(job)
        return job

    def _channel_for(self, job: Job, segments_end: int) -> int:
        return channel_micro(
            self.desk.network.rules,
            operations=self._operations(job),
            segments=segments_end - job.segment,
            unit_price=job.unit_price_max,
            operations_per_segment=operations_per_check(task_of(job.task)),
        )

    def _operations(self, job: Job) -> int:
        task = task_of(job.task)
        return task.operations_per_step * (task.steps - task.steps_of(job.segment).start)

    def offer(self, job: Job) -> None:
        """Gossip the rest of the job under a new nonce, or fail it where the budget does not reach."""
        task, now, rules = task_of(job.task), self.desk.now_ns, self.desk.network.rules
        if job.offer_id:
            self.desk.book.remove_offer(job.offer_id)
        job.nonce += 1
        operations, checked = self._operations(job), bool(operations_per_check(task))
        needed = self._channel_for(job, task.segments)
        if needed > job.budget_micro - job.spent_micro:
            self.end(
                job,
                JobState.FAILED,
                f"the rest of the job can cost {needed} micro-credits, {job.budget_micro - job.spent_micro} of the "
                "budget are left; submit it again with a larger --budget",
            )
            return
        offer = Offer(
            network=self.desk.network.id,
            submitter=self.desk.me,
            nonce=int.from_bytes(job.id[:6], "big") * 2**15 + job.nonce % 2**15,
            task=task_id(task),
            program=task.program,
            data=blake("ichiba/data", *(blob for blob in blobs_of(task) if blob != task.program)),
            mode=task.mode,
            first_segment=job.segment,
            last_segment=task.segments,
            operations=operations,
            memory_bytes=job.memory_bytes,
            checkpoint_bytes=job.checkpoint_bytes,
            sandbox=job.sandbox,
            unit_price_max=job.unit_price_max,
            budget_micro=needed,
            # Nothing of a script is re-executed, so no stake could be lost over it: none is asked for.
            check_permille=rules.check_permille if checked else 0,
            lock_micro=lock_micro(rules, amount_for(operations, job.unit_price_max)) if checked else 0,
            created_ns=now,
            expires_ns=now + rules.offer_lifetime_ms * 10**6,
        )
        job.offer = self.desk.seal(offer)
        job.offer_id = open_record(job.offer, network=self.desk.network.id)[1]
        job.offered_ns, job.state, job.deal = now, JobState.OFFERED, b""
        self.desk.book.add_offer(job.offer_id, offer, now_ns=now)
        self.rounds[job.id] = now + rules.round_ms * 10**6
        self.repeats[job.id] = now + params.OFFER_REPEAT_NS
        self.save(job)
        self.desk.publish(MARKET, job.offer)
        self.desk.emit(
            "offer",
            job.id,
            offer=job.offer_id,
            segments=[job.segment, task.segments],
            operations=operations,
            unit_price_max=job.unit_price_max,
            budget_micro=job.budget_micro,
        )

    def _round(self, job: Job) -> None:
        rules, now, book = self.desk.network.rules, self.desk.now_ns, self.desk.book
        self.rounds[job.id] = now + rules.round_ms * 10**6
        offer = book.offers.get(job.offer_id)
        if offer is None:
            self.offer(job)
            return
        choice = match_round(
            offer,
            job.offer_id,
            book.live_bids(job.offer_id, now_ns=now),
            round_number=(now - job.offered_ns) // (rules.round_ms * 10**6),
            free_stake_micro=self.settler.free_stake,
            record_of=self.settler.history,
            excluded={*job.culprits, *self._siblings(job), *(p for p, until in job.resting.items() if now < until)},
            reachable=lambda peer: peer in self.desk.peers,
            proven=self.speed_of,
        )
        if self.told.get(job.id) != choice:
            self.told[job.id] = choice
            self.desk.emit(
                "round",
                job.id,
                ranked=[
                    {"solver": s.solver, "price": s.price_micro, "risk": s.risk_micro, "wait": s.wait_micro}
                    for s in choice.ranked
                ],
                refused=[{"solver": peer, "code": r.code, "why": r.why} for peer, r in choice.refused],
                explored=choice.explored,
            )
        if choice.winner is not None:
            self.on_choice(job, offer, dict(book.live_bids(job.offer_id, now_ns=now))[choice.winner.bid_id], choice)

    def _siblings(self, job: Job) -> set[bytes]:
        """Who runs, or ran, another replica of this job: two runs on one machine say nothing of each other."""
        others = [other for other in self.jobs.values() if job.group and other.group == job.group and other is not job]
        return {solver for other in others for solver in other.solvers}

    def note(self, job_id: bytes, outcome: str) -> None:
        """How a script ended, for people."""
        if outcome:
            self.jobs[job_id].outcome = outcome
            self.save(self.jobs[job_id])

    def agreement(self, job: Job, offer: Offer, bid: Bid, bid_id: bytes, seed_commitment: bytes) -> Agreement:
        """The terms of a deal on `bid`, from the job's next segment to its end."""
        task, rules, now = task_of(job.task), self.desk.network.rules, self.desk.now_ns
        job.solvers.append(bid.solver)
        return Agreement(
            network=self.desk.network.id,
            offer=job.offer_id,
            bid=bid_id,
            task=task_id(task),
            submitter=self.desk.me,
            solver=bid.solver,
            sequence=now,
            first_segment=job.segment,
            last_segment=task.segments,
            base_root=job.base_root,
            operations=offer.operations,
            unit_price=bid.unit_price,
            channel_micro=channel_micro(
                rules,
                operations=offer.operations,
                segments=task.segments - job.segment,
                unit_price=bid.unit_price,
                operations_per_segment=operations_per_check(task),
            ),
            lock_micro=bid.lock_micro,
            check_permille=offer.check_permille,
            submitter_commitment=seed_commitment,
            solver_commitment=bid.seed_commitment,
            accept_before_ns=now + rules.proposal_ms * 10**6,
            segment_deadline_ns=rules.segment_silence_ms * 10**6,
            created_ns=now,
        )

    def reoffer(self, job: Job, why: str) -> None:
        """Back to the market after a deal that did not finish the job."""
        job.deal = b""
        job.fruitless += 1
        if job.cancelled:
            self.end(job, JobState.CANCELLED, why)
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
        for job in list(self.jobs.values()):
            if job.state == JobState.OFFERED and now >= self.rounds.setdefault(job.id, now):
                self._round(job)
            if job.state == JobState.OFFERED and now >= self.repeats.setdefault(job.id, now):
                self.repeats[job.id] = now + params.OFFER_REPEAT_NS
                self.desk.publish(MARKET, job.offer)

    def live_offers(self) -> list[bytes]:
        """The envelopes a peer just met should hear of."""
        return [job.offer for job in self.jobs.values() if job.state == JobState.OFFERED and job.offer]

    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """Rebuild the jobs, and their offers where they still stand."""
        for key, value in rows("jobs"):
            job = self.jobs[key] = msgspec.msgpack.decode(value, type=Job)
            offer = open_record(job.offer, network=self.desk.network.id)[0] if job.offer else None
            if job.state == JobState.OFFERED and isinstance(offer, Offer) and offer.expires_ns > self.desk.now_ns:
                self.desk.book.add_offer(job.offer_id, offer, now_ns=self.desk.now_ns)

    def save(self, job: Job) -> None:
        """Journal the job."""
        self.desk.save("jobs", job.id, msgspec.msgpack.encode(job))
