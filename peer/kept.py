"""Units of a run that the submitter's own peer holds (`[privacy] keep`): no deal, its own sandbox, the same links.

Their segments are delivered to peer/runs.py like those of solvers, with their neighbours' signatures. What they are
made of and what they make is served to nobody. Sans-IO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from peer.deals import Job, task_of
from peer.desk import Desk
from peer.events import Protect, SegmentMade, StartWork, StepMade, StopWork, WorkEnded
from peer.jobs import JobDesk
from peer.run_events import LinkEnds
from peer.units import Complaint, Delivered, Units, stage_of
from protocol import params
from protocol.errors import VerificationFailed
from protocol.script import content_of
from protocol.sealing import NO_KEYS
from protocol.task import FIGURES, TaskSpec

__all__ = ["KeptUnits"]


@dataclass
class KeptUnits:
    """See the module docstring. `deliver(job, segment, end)` has every segment, in order, until it is taken;
    `complain(job, complaint)` what keeps the one that is due from its end."""

    desk: Desk
    units: Units
    jobs: JobDesk
    deliver: Callable[[Job, int, Delivered], None]
    complain: Callable[[Job, Complaint], None]
    working: dict[bytes, int] = field(default_factory=dict)  # job -> workers of it that failed in a row
    made: dict[tuple[bytes, int], tuple[SegmentMade, LinkEnds]] = field(default_factory=dict)

    def withhold(self, job: Job) -> None:
        """From now on what a unit is made of is for nobody else."""
        self.desk.add(Protect(tuple(sorted(content_of(task_of(job.task)))), NO_KEYS))

    def launch(self, job: Job, *, epoch: int, peers: Sequence[bytes], since: Sequence[int]) -> None:
        """Start a unit where all others are known, or tell its worker where they are now."""
        stage, task = stage_of(job.task), task_of(job.task)
        assert stage is not None, "a unit that is kept is a unit"
        news = self.units.seat(job.id, stage, epoch, list(peers), list(since))
        if job.id in self.working:
            if news:
                self.units.relink(job.id)
            return
        if job.segment >= task.segments or self.desk.paused_ns:
            return
        self.working[job.id] = 0
        self._start(job)

    def _start(self, job: Job) -> None:
        task = task_of(job.task)
        self.withhold(job)  # again: a crash may have come between the commit that opened the run and this
        self.desk.add(
            StartWork(
                work=job.id,
                task=task,
                base=job.base_blob,
                first_segment=job.segment,
                last_segment=task.segments,
                checkpoint_bytes=params.BLOB_BYTES_MAX,
                memory_bytes=max(self.desk.means.memory_bytes, job.memory_bytes),
                keys=NO_KEYS,
                run=self.units.order(job.id),
            )
        )

    def end(self, job: Job) -> None:
        """Stop a unit, and forget what was not taken."""
        if self.working.pop(job.id, None) is not None:
            self.desk.add(StopWork(job.id))
        self.units.drop(job.id)
        for key in [key for key in self.made if key[0] == job.id]:
            del self.made[key]

    def paused(self) -> None:
        """The workers are gone; the next launch, after the pause, starts them again."""
        self.working.clear()

    def tick(self) -> None:
        """Ask again for signatures that lack, and say which neighbour keeps a unit from the end of its segment."""
        for work in list(self.working):
            job = self.jobs.jobs[work]
            complaint = self.units.disputed.get((work, job.segment))
            if complaint is None:
                self.offer(job)
            else:
                self.complain(job, complaint)

    def offer(self, job: Job) -> None:
        """Deliver the segment that is due, if it is made and the neighbours have signed for it."""
        found = self.made.get((job.id, job.segment))
        if found is None:
            return
        handovers = self.units.handovers(job.id, job.segment)
        if handovers is None:
            self.units.ask(job.id, job.segment)
            return
        event, ends = found
        self.deliver(job, job.segment, Delivered(event.out_root, event.checkpoint, ends, handovers))
        for key in [key for key in self.made if key[0] == job.id and key[1] < job.segment]:
            del self.made[key]

    # --- what the worker says --------------------------------------------------------------------------------
    def on_segment(self, event: SegmentMade) -> None:
        """A segment is done here."""
        if event.work not in self.working:
            return
        if event.ends is None:
            raise VerificationFailed("a unit's segment came without what went over its links")
        job = self.jobs.jobs[event.work]
        self.working[job.id] = 0
        self.made[job.id, event.segment] = event, event.ends
        self.units.ended(job.id, event.segment, event.ends)
        self.offer(job)

    def on_step(self, event: StepMade) -> None:
        """For people."""
        if event.work in self.working:
            job = self.jobs.jobs[event.work]
            task = task_of(job.task)
            figure = FIGURES[task.kind] if isinstance(task, TaskSpec) else ""
            self.desk.emit("step", job.id, step=event.step, loss=event.loss, figure=figure, of=task.steps)

    def on_work_ended(self, event: WorkEnded) -> None:
        """A worker that failed starts again from the last segment that all agree on, a bounded number of times."""
        if event.work not in self.working or not event.error:
            return
        job = self.jobs.jobs[event.work]
        done = [segment for work, segment in self.made if work == job.id]
        if self.units.complains(job.id, event.blames, max(done, default=job.segment - 1) + 1):
            return
        self.working[event.work] += 1
        self.desk.emit("problem", job.id, what=f"the worker failed: {event.error}")
        for key in [key for key in self.made if key[0] == job.id]:
            del self.made[key]
        if self.working[event.work] < params.WORK_FAILURES_MAX:
            self._start(job)
        else:
            self.end(job)
            job.fruitless = params.FRUITLESS_DEALS_MAX
            self.jobs.reoffer(job, f"its own worker here failed: {event.error}"[:300])
