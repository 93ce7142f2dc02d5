"""Profiles as deals: a tolerant job waits for those of its task, pays for them, and is offered by what they come to.

For the submitter `Profiles` opens one small job for each profile it needs and reads their answers; for a verifier
`profile_end` signs what its sandbox found. Sans-IO. All it decides follows from the rows of jobs and deals, so a
restart at any moment changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peer.deals import Deal, Job, JobState, agreement_of, task_of
from peer.desk import Desk
from peer.events import Effect, Emit, ProfileMade, SegmentMade
from peer.jobs import JobDesk
from peer.settler import Settler
from protocol import params
from protocol.codec import blake, encode
from protocol.errors import IchibaError, VerificationFailed
from protocol.keys import peer_name
from protocol.profile import EXACT, Gauge, Profile, ProfilesDisagree, Tolerance, combine, refuse_tolerance, tolerance_id
from protocol.profile_task import ProfileSpec, check_answer, profile_from, profile_root
from protocol.records import Agreement, Receipt, open_record
from protocol.task import TaskSpec, task_id
from protocol.tolerance import open_profiles, open_tolerance

__all__ = ["Profiles", "gauges_of", "handed_in", "open_answer", "profile_end", "tolerance_for"]


# --- what a profile's deal hands in --------------------------------------------------------------------------
def profile_end(desk: Desk, deal: Deal, event: ProfileMade) -> SegmentMade:
    """Sign what a sandbox found, keep it in the deal, and say how its one segment ended. Raises MalformedRecord."""
    spec = task_of(deal.task)
    assert isinstance(spec, ProfileSpec)
    profile = profile_from(
        event.findings,
        spec,
        verifier=desk.me,
        operations_per_second=event.operations_per_second,
        now_ns=desk.wall_ns,
    )
    sealed = desk.seal(profile)
    deal.profiles, root = [sealed], profile_root(sealed)
    return SegmentMade(
        work=event.work,
        segment=0,
        in_root=task_id(spec),
        out_root=root,
        losses=(),
        operations=spec.operations_per_step,
        checkpoint=root,
        checkpoint_bytes=len(sealed),
    )


def open_answer(sealed: bytes, receipt: Receipt, spec: ProfileSpec, *, verifier: bytes, network: bytes) -> None:
    """Raise a RemoteProtocolError unless `sealed` is the profile that was ordered and that `receipt` is for."""
    profile, _, signers = open_record(sealed, network=network)
    if not isinstance(profile, Profile) or signers != {verifier}:
        raise VerificationFailed("a profile comes from its verifier, with its signature alone")
    if {receipt.out_root, receipt.checkpoint} != {profile_root(sealed)}:
        raise VerificationFailed("the receipt of a profile names another one")
    check_answer(profile, spec, verifier=verifier)


def handed_in(deal: Deal) -> bytes:
    """The sealed Profile that goes with the receipt of a profile's deal; empty in any other."""
    return deal.profiles[0] if isinstance(task_of(deal.task), ProfileSpec) else b""


# --- what the work of a tolerant job is judged by ------------------------------------------------------------
def gauges_of(deal: Deal, agreement: Agreement) -> tuple[Gauge, ...]:
    """The parts of the state that every segment of a deal ends with as it began. Its profiles were checked."""
    tolerance = open_tolerance(
        deal.profiles, network=agreement.network, task=agreement.task, expected=agreement.tolerance
    )
    return tolerance.gauges if tolerance is not None else ()


def tolerance_for(settler: Settler, sealed: Sequence[bytes], task: TaskSpec, *, expected: bytes) -> Tolerance | None:
    """What work on `task` is judged by, from profiles of verifiers that have a checker's stake now; None of an exact
    task. Raises VerificationFailed, MalformedRecord, ProfilesDisagree, ToleranceRefused."""
    network, task_hash = settler.desk.network, task_id(task)
    if (task.mode == "tolerant") != (expected != EXACT):
        raise VerificationFailed(f"a {task.mode} task with the tolerance {expected.hex()[:12]}")
    tolerance = open_tolerance(sealed, network=network.id, task=task_hash, expected=expected)
    for profile in open_profiles(sealed, network=network.id, task=task_hash):
        if settler.free_stake(profile.verifier) < network.rules.checker_stake_min_micro:
            raise VerificationFailed(f"{peer_name(profile.verifier)} profiled the task and has no checker's stake")
    if tolerance is not None:
        refuse_tolerance(tolerance, task.segments)
    return tolerance


@dataclass
class Profiles:
    """The submitter's tolerant jobs until they can be offered. `deals` are the submitter's own."""

    desk: Desk
    settler: Settler
    jobs: JobDesk
    deals: Mapping[bytes, Deal]

    def tick(self) -> None:
        """Ask for the profiles that are missing; offer, or end, the jobs that have them."""
        for job in [job for job in self.jobs.jobs.values() if job.state == JobState.PROFILING]:
            self._advance(job)

    def _advance(self, job: Job) -> None:
        task, children = task_of(job.task), self.jobs.children(job)
        assert isinstance(task, TaskSpec)
        waiting = [child for child in children if child.open]
        sealed = [one for child in children if child.state == JobState.DONE and (one := self._answer(child))]
        missing, why = params.PROFILES_MIN - len(sealed), ""
        if missing <= 0 and not waiting:
            try:
                tolerance = combine(open_profiles(sealed, network=self.desk.network.id, task=task_id(task)))
                refuse_tolerance(tolerance, task.segments)
            except ProfilesDisagree as error:
                missing, why = 1, error.what
            except IchibaError as error:
                self.jobs.end(job, JobState.FAILED, "; ".join(filter(None, (error.what, error.why, error.next_step))))
                return
            else:
                job.profiles, job.tolerance = sealed, tolerance_id(tolerance)
                self.desk.emit("profiled", job.id, **self._told(tolerance, sealed))
                self.jobs.offer(job)
                return
        for _ in range(missing - len(waiting)):
            if not self._order(job, task, why):
                return

    def _answer(self, child: Job) -> bytes:
        """The profile that a finished child brought, if its verifier still has its stake."""
        last = self.deals.get(child.deals[-1]) if child.deals else None
        if last is None or not last.profiles:
            return b""
        staked = self.settler.free_stake(agreement_of(last, self.desk.network.id).solver)
        return last.profiles[0] if staked >= self.desk.network.rules.checker_stake_min_micro else b""

    def _order(self, job: Job, task: TaskSpec, why: str) -> bool:
        """Open the job of one more profile; False if there were too many, or the budget does not reach."""
        children = self.jobs.children(job)
        if len(children) >= params.PROFILES_KEPT_MAX:
            last = why or next((child.reason for child in reversed(children) if child.reason), "")
            self.jobs.end(job, JobState.FAILED, f"{len(children)} profiles gave no tolerance; the last: {last}")
            return False
        spec = ProfileSpec(network=self.desk.network.id, of=task, number=len(children))
        cost = self.jobs.profile_micro(job)
        left = job.budget_micro - self.jobs.spent(job) - sum(child.budget_micro for child in children if child.open)
        if cost + self.jobs.channel_for(job, task.segments) > left:
            words = f"one more profile can cost {cost} micro-credits, which leaves too little of the budget for the job"
            self.jobs.end(job, JobState.FAILED, f"{words}{': ' if why else ''}{why}; submit it with a larger --budget")
            return False
        child = Job(
            id=blake("ichiba/job", job.id, spec.number.to_bytes(1, "big")),
            parent=job.id,
            group=job.id,
            task=encode(spec),
            name=spec.name,
            state=JobState.OFFERED,
            unit_price_max=job.unit_price_max,
            budget_micro=cost,
            checkpoint_bytes=job.checkpoint_bytes,
            memory_bytes=job.memory_bytes,
            sandbox=job.sandbox,
            segment=0,
            base_root=task_id(spec),
            base_blob=job.base_blob,
            created_ns=self.desk.wall_ns,
            device=job.device,
            device_memory_bytes=job.device_memory_bytes,
            deadline_ns=job.deadline_ns,
        )
        self.desk.emit("profile", job.id, number=spec.number, operations=spec.operations_per_step, why=why)
        self.jobs.jobs[child.id] = child
        self.jobs.offer(child)
        return True

    def retold(self, effects: Sequence[Effect]) -> list[Effect]:
        """The effects of one turn, with what happens to a profile told in the log of the job it is for."""
        told: list[Effect] = []
        for effect in effects:
            child = self.jobs.jobs.get(effect.job) if isinstance(effect, Emit) and effect.job else None
            if isinstance(effect, Emit) and child is not None and child.unit >= 0:
                told.append(Emit(f"unit-{effect.kind}", child.parent, {**effect.data, "unit": child.unit}))
            elif isinstance(effect, Emit) and child is not None and child.parent:
                told.append(Emit(f"profile-{effect.kind}", child.parent, {**effect.data, "profile": child.id}))
            else:
                told.append(effect)
        return told

    # --- for people ----------------------------------------------------------------------------------------
    def describe(self, job: Job) -> dict[str, Any]:
        """How far the profiling of a job is: who made which profile, and what they come to. Empty for an exact job."""
        task = task_of(job.task)
        if not isinstance(task, TaskSpec) or task.mode != "tolerant":
            return {}
        children = sorted(self.jobs.children(job), key=lambda child: child.created_ns)
        told: dict[str, Any] = {"wanted": params.PROFILES_MIN, "profiles": [self._child(child) for child in children]}
        if job.profiles:
            tolerance = combine(open_profiles(job.profiles, network=self.desk.network.id, task=task_id(task)))
            told |= self._told(tolerance, job.profiles)
        return told

    def _child(self, child: Job) -> dict[str, Any]:
        deals = [self.deals[deal] for deal in child.deals if deal in self.deals]
        return {
            "job": child.id.hex(),
            "state": JobState(child.state).name.lower(),
            "verifier": peer_name(agreement_of(deals[-1], self.desk.network.id).solver) if deals else "",
            "budget_micro": child.budget_micro,
            "spent_micro": child.spent_micro,
            "reason": child.reason,
        }

    def _told(self, tolerance: Tolerance, sealed: Sequence[bytes]) -> dict[str, Any]:
        signers = [open_record(one, network=self.desk.network.id)[0] for one in sealed]
        return {
            "l1_ppb": tolerance.l1_ppb,
            "l2_ppb": tolerance.l2_ppb,
            "gauges": [f"{gauge.name}[{','.join(map(str, gauge.at))} of {gauge.parts}]" for gauge in tolerance.gauges],
            "profiled_by": sorted(peer_name(one.verifier) for one in signers if isinstance(one, Profile)),
        }
