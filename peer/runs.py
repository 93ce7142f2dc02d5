"""The submitter's parallel jobs: units placed together, launched, signed for together, and replaced one by one.

A run is a parent job and a child job for each unit, each with deals, receipts, a proof and a settlement of its own. The
receipts of one segment are signed when all units have handed in theirs and both ends of every link agree: what is
signed is then one state of the whole model. A unit that loses its solver goes on from there with another. What proves
wrong later takes the run back to where the deal that was wrong began. Sans-IO; docs/decisions/0023-parallel.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from market.placing import UnitsPlaced
from market.reasons import Reason
from market.step_time import Volume
from peer.deals import Deal, Job, JobState, agreement_of, move, task_of
from peer.desk import Desk
from peer.events import Fetch, Release
from peer.jobs import JobDesk
from peer.kept import KeptUnits
from peer.messages import Decline, ReceiptOffer
from peer.parallel import ParallelDesk, Wanted
from peer.quarrels import Quarrels
from peer.receipt_rows import Rows
from peer.run_events import LinkEnds
from peer.run_messages import Launch, Launched
from peer.run_row import Run
from peer.run_watch import RunWatch
from peer.settler import Settler
from peer.submitter import Submitter
from peer.units import Delivered, Units, faults_of, stage_of
from protocol import params
from protocol.errors import InsufficientFunds
from protocol.keys import peer_name
from protocol.lifecycle import TERMINAL, Event, State
from protocol.records import Receipt
from protocol.stage import Stage

__all__ = ["RunDesk"]

_TABLE = "runs"
Borders: TypeAlias = list[tuple[int, int]]


@dataclass
class RunDesk:
    """See the module docstring. `units` holds the seats of the units that this peer keeps."""

    desk: Desk
    settler: Settler
    jobs: JobDesk
    submitter: Submitter
    units: Units
    market: ParallelDesk
    runs: dict[bytes, Run] = field(default_factory=dict)
    delivered: dict[bytes, dict[int, Delivered]] = field(default_factory=dict)  # run -> by unit, of its next segment
    acks: dict[bytes, int] = field(default_factory=dict)  # deal -> the epoch that its solver has
    again: dict[bytes, int] = field(default_factory=dict)  # deal -> launch again at

    def __post_init__(self) -> None:
        self.quarrels = Quarrels(self.desk, self.jobs, self.submitter, self.runs, self._save, self.rewind)
        self.kept = KeptUnits(self.desk, self.units, self.jobs, self._kept_ended, self.quarrels.of_kept)
        self.watch = RunWatch(self.desk, self.jobs, self.submitter, self.held)
        self.jobs.on_unit_back = self.unit_back
        self.submitter.on_unit_right, self.submitter.on_unit_wrong = self.unit_right, self.unit_wrong
        self.submitter.receiving.deliver, self.submitter.receiving.held = self.deliver, self.held

    # --- a run begins --------------------------------------------------------------------------------------
    def submit(self, parent: Job, children: Sequence[Job], *, border_bytes: Borders, shared_bytes: list[int]) -> Job:
        """Open a run: its job, and those of its units in their order. Raises InsufficientFunds or LimitExceeded before
        anything is journalled."""
        sold = [child for child in children if not child.kept]
        costs = [self.jobs.channel_for(child, task_of(child.task).segments) for child in sold]
        if not all(costs):
            raise InsufficientFunds(
                f"unit {sold[costs.index(0)].unit} comes to less than a micro-credit",
                why="no channel is opened for nothing",
                next_step="raise the price limit, make the task larger, or cut it into fewer units",
            )
        if sum(costs) > parent.budget_micro:
            raise InsufficientFunds(
                f"{len(sold)} units can cost {sum(costs)} micro-credits together with their checks, the budget is "
                f"{parent.budget_micro}",
                why="each has a channel of its own; a unit that is replaced takes one more until the first is closed",
                next_step=f"raise the budget to {(sum(costs) + max(costs)) / 1e6:.6f} credits or lower the price limit",
            )
        self.jobs.require(parent, sum(costs))
        parent.units, parent.state = [child.id for child in children], JobState.PLACING
        self.jobs.jobs[parent.id] = parent
        self.jobs.jobs.update({child.id: child for child in children})
        run = self.runs[parent.id] = Run(
            id=parent.id, units=parent.units, border_bytes=border_bytes, shared_bytes=shared_bytes
        )
        self.jobs.save(parent)
        self._offer_units(run)
        self.desk.emit("run", parent.id, units=len(children), kept=len(children) - len(sold), budget_micro=sum(costs))
        return parent

    def keeps(self) -> bool:
        """Whether a run is under way of which this peer has units itself."""
        return any(job.kept and job.open for job in self.jobs.jobs.values())

    def _children(self, run: Run) -> list[Job]:
        return [self.jobs.jobs[unit] for unit in run.units]

    def _stage(self, job: Job) -> Stage:
        stage = stage_of(job.task)
        assert stage is not None, "it was checked when the run was opened"
        return stage

    def _offer_units(self, run: Run) -> None:
        """Every unit without a deal goes on the market from the last segment that all agree on."""
        children = self._children(run)
        if run.segment not in run.cuts:
            run.cuts[run.segment] = [(child.base_root, child.base_blob) for child in children]
            for _, blob in run.cuts[run.segment]:  # it is here: this keeps it here
                self.desk.add(Fetch(blob, run.id, (self.desk.me,), params.BLOB_BYTES_MAX))
        for child in children:
            if child.kept:
                self.kept.withhold(child)
                child.state = JobState.RUNNING
                self.jobs.save(child)
            elif not child.deal and child.state != JobState.OFFERED:
                self._offer(run, child)
        self._save(run)

    def _offer(self, run: Run, child: Job) -> None:
        """Offer a unit, or let it wait for the money that an earlier deal still holds."""
        parent = self.jobs.jobs[run.id]
        needed = self.jobs.channel_for(child, task_of(child.task).segments)
        if needed > self.left(run, without=child):
            why = f"unit {child.unit} takes {needed} micro-credits, which earlier deals of the run still hold"
            if child.reason != why:
                self.desk.emit("waiting", run.id, why=why)
            child.state, child.reason = JobState.PLACING, why
            self.jobs.save(child)
            return
        child.reason, child.budget_micro = "", child.spent_micro + needed
        self.jobs.save(parent)
        self.jobs.offer(child)

    def left(self, run: Run, *, without: Job | None = None) -> int:
        """What is left of a run's budget beside what is spent, what channels hold, and what offered units will take."""
        parent = self.jobs.jobs[run.id]
        promised = 0
        for child in self._children(run):
            opened = child.deal in self.settler.every
            if child is not without and not child.kept and not opened and child.state in (
                JobState.OFFERED, JobState.RUNNING,
            ):  # fmt: skip
                promised += child.budget_micro - child.spent_micro
        return parent.budget_micro - self.jobs.spent(parent) - self.jobs.in_channels(parent) - promised

    # --- time ----------------------------------------------------------------------------------------------
    def tick(self) -> None:
        """Place what has no solver, launch what has all, mind who is waited for, end what is over."""
        for run in list(self.runs.values()):
            if self.jobs.jobs[run.id].open:
                self.desk.attempt(self._tick_run, run)

    def _tick_run(self, run: Run) -> None:
        parent, children = self.jobs.jobs[run.id], self._children(run)
        if self._ending(run):
            self._close(run, parent, children)
            return
        for child in children:
            if child.state == JobState.PLACING:
                self._offer(run, child)
        whole = all(self._running(child) for child in children)
        if run.segment >= task_of(parent.task).segments:
            self._finish(run, parent, children)
        elif whole:
            self.market.forget(run.id)
            self._launch(run, children)
        else:
            self._place(run, children)
        for deal, why in self.watch.lost(run, children, whole=whole, acked=self._acked(run)):
            self.submitter.lose(deal, why)

    def _ending(self, run: Run) -> bool:
        """Whether a run was cancelled, or cannot be done any more."""
        over = (JobState.FAILED, JobState.CANCELLED)
        return self.jobs.jobs[run.id].cancelled or bool(run.failed) or any(c.state in over for c in self._children(run))

    def on_placed(self, event: UnitsPlaced) -> None:
        """A round of a run that was played in a thread is over; nobody is asked for one that ends."""
        run = self.runs.get(event.run)
        if run is None or not self.jobs.jobs[run.id].open or self._ending(run):
            self.market.forget(event.run)
        else:
            self.market.on_placed(event)

    def _acked(self, run: Run) -> set[bytes]:
        """The deals whose solvers have the last launch."""
        return {deal for deal, epoch in self.acks.items() if epoch == run.epoch}

    def _deal(self, child: Job) -> Deal | None:
        return self.submitter.deals.get(child.deal)

    def _running(self, child: Job) -> bool:
        """Whether a unit has somebody to run it: its channel is open."""
        deal = self._deal(child)
        return child.kept or (deal is not None and deal.lifecycle == State.RUNNING)

    def _finish(self, run: Run, parent: Job, children: list[Job]) -> None:
        """Every segment is signed for: the run is done when all its deals are checked and closed."""
        deals = [self.submitter.deals[deal] for child in children for deal in child.deals]
        if run.lineage or any(deal.lifecycle not in TERMINAL for deal in deals):
            return
        if all(child.kept or child.state == JobState.DONE for child in children):
            for child in children:
                if child.kept:
                    self.kept.end(child)
                    self.jobs.end(child, JobState.DONE, "")
            self._over(run, parent, JobState.DONE, "")

    def _close(self, run: Run, parent: Job, children: list[Job]) -> None:
        """The run is cancelled, or one of its units cannot be had any more: end the others, then it."""
        failed = next((child for child in children if child.state == JobState.FAILED), None)
        why = run.failed or (f"unit {failed.unit}: {failed.reason}" if failed is not None else "")
        if not run.failed and failed is not None:
            run.failed = why
            self._save(run)
        self.delivered.pop(run.id, None)
        for child in children:
            if child.kept and child.open:
                self.kept.end(child)
                self.jobs.end(child, JobState.CANCELLED, why)
            elif child.open and not child.cancelled:
                self.submitter.cancel(child.id)
        deals = [self.submitter.deals[deal] for child in children for deal in child.deals]
        if any(child.open for child in children) or any(deal.lifecycle not in TERMINAL for deal in deals):
            return
        if parent.cancelled:
            self._over(run, parent, JobState.CANCELLED, f"cancelled after {run.segment} segments")
        else:
            self._over(run, parent, JobState.FAILED, why)

    def _over(self, run: Run, parent: Job, state: JobState, why: str) -> None:
        self.market.forget(run.id)
        children = self._children(run)
        self.watch.forget(run.id, children)
        for deal in [deal for child in children for deal in child.deals]:
            self.acks.pop(deal, None)
            self.again.pop(deal, None)
        run.cuts = {}
        self._save(run)
        self.desk.add(Release(run.id))
        self.jobs.end(parent, state, why)

    def _place(self, run: Run, children: list[Job]) -> None:
        stage = self._stage(children[0])
        solvers = {child.unit: self.desk.me for child in children if child.kept}
        for child in children:
            if (deal := self._deal(child)) is not None:
                solvers[child.unit] = self.submitter.solver_of(deal)
        every = task_of(children[0].task).steps_per_segment if stage.sync == "local" else 1
        borders = run.border_bytes or [(0, 0)] * (stage.stages - 1)
        volume = Volume(stage.micro_batches, borders, run.shared_bytes, every)
        self.market.round(Wanted(run.id, stage.stages, stage.replicas, children, solvers, volume))

    # --- launching -----------------------------------------------------------------------------------------
    def _launch(self, run: Run, children: list[Job]) -> None:
        """All units have a solver: tell each where the others are, until it says that it knows."""
        deals = [self._deal(child) for child in children]
        peers = [self.submitter.solver_of(deal) if deal is not None else self.desk.me for deal in deals]
        if peers != run.peers:
            run.epoch += 1
            before = dict(enumerate(zip(run.peers, run.since, strict=True)))
            kept = [(before.get(unit, (b"", 0)), peer) for unit, peer in enumerate(peers)]
            run.since = [since if peer == old else run.epoch for (old, since), peer in kept]
            run.peers = peers
            parent = self.jobs.jobs[run.id]
            parent.state = JobState.RUNNING
            self.jobs.save(parent)
            self._save(run)
            self.watch.launched(run.id, [deal for deal in deals if deal is not None])
            self.again.clear()
            self.desk.emit("launch", run.id, epoch=run.epoch, peers=peers)
        for child, deal in zip(children, deals, strict=True):
            if deal is None:
                self.kept.launch(child, epoch=run.epoch, peers=run.peers, since=run.since)
            elif self.acks.get(deal.id) != run.epoch and self.desk.now_ns >= self.again.get(deal.id, 0):
                self.again[deal.id] = self.desk.now_ns + params.RESEND_NS
                units = tuple(zip(range(len(run.peers)), run.peers, run.since, strict=True))
                self.desk.send(self.submitter.solver_of(deal), Launch(run.id, deal.id, run.epoch, units))

    def on_launched(self, peer: bytes, message: Launched) -> None:
        """A solver has the launch."""
        deal = self.submitter.deals.get(message.agreement)
        if deal is not None and self.submitter.solver_of(deal) == peer and deal.lifecycle == State.RUNNING:
            self.acks[deal.id] = message.epoch

    # --- receipts ------------------------------------------------------------------------------------------
    def held(self, deal: Deal) -> bool:
        """Receiving: whether the next receipt of a deal waits here for those of the other units."""
        job = self.jobs.jobs[deal.job]
        return any(one.deal == deal.id for one in self.delivered.get(job.parent, {}).values())

    def deliver(self, deal: Deal, message: ReceiptOffer, record: Receipt, ends: LinkEnds) -> None:
        """Receiving: a receipt, its checkpoint and its tape are here and right in themselves."""
        job = self.jobs.jobs[deal.job]
        run = self.runs[job.parent]
        launched = bool(run.peers) and run.peers[job.unit] == self.submitter.solver_of(deal)  # else it cannot be of it
        if job.deal != deal.id or record.segment != run.segment or not launched:
            return
        self._take(run, job, Delivered(record.out_root, record.checkpoint, ends, message.handovers, deal.id, message))

    def _kept_ended(self, child: Job, segment: int, one: Delivered) -> None:
        """KeptUnits: a segment of a unit that this peer runs itself, with the signatures of its neighbours."""
        run = self.runs[child.parent]
        if segment == run.segment and child.unit not in self.delivered.get(run.id, {}):
            self._take(run, child, one)

    def _take(self, run: Run, job: Job, one: Delivered) -> None:
        here = self.delivered.setdefault(run.id, {})
        here[job.unit] = one
        if len(here) < len(run.units):
            return
        del self.delivered[run.id]
        children = self._children(run)
        before = [{self.submitter.solver_of(self.submitter.deals[d]) for d in child.deals} for child in children]
        faults, complaints = faults_of(
            here, [self._stage(child) for child in children], run.peers,
            network=self.desk.network.id, run=run.id, segment=run.segment, before=before,
        )  # fmt: skip
        if faults or complaints:
            for unit, why in sorted(faults.items()):
                self.quarrels.blame(run, children[unit], why)
            words = [f"unit {unit} {why}" for unit, why in sorted(faults.items())]
            words += [self.quarrels.judge(run, children[u], run.peers[u], one) for u, one in sorted(complaints.items())]
            self.rewind(run, run.segment, "; ".join(words))
            return
        self._agree(run, children, here)

    def _agree(self, run: Run, children: list[Job], here: dict[int, Delivered]) -> None:
        """All units ended the segment, and every link agrees: sign for all."""
        for child in children:
            one = here[child.unit]
            deal = self.submitter.deals.get(one.deal)
            if one.offer is not None and deal is not None:
                self.submitter.receiving.pay(deal, one.offer.receipt)
                if deal.id not in run.lineage:
                    run.lineage.append(deal.id)
            child.segment, child.base_root, child.base_blob = run.segment + 1, one.root, one.blob
            child.fruitless = 0
            self.jobs.save(child)
        run.segment, run.fruitless = run.segment + 1, 0
        parent = self.jobs.jobs[run.id]
        parent.segment = run.segment
        self.jobs.save(parent)
        self._prune(run)
        self._save(run)
        self.desk.emit("segment", run.id, segment=run.segment - 1, of=task_of(parent.task).segments)
        for child in children:
            if child.kept:
                self.units.settled(child.id, child.task, run.segment - 1)
                self.kept.offer(child)

    def _prune(self, run: Run) -> None:
        """Forget the states that nothing goes back to any more."""
        begun = {self._first(self.submitter.deals[deal]) for deal in run.lineage}
        begun |= {self._first(deal) for child in self._children(run) if (deal := self._deal(child)) is not None}
        gone = [segment for segment in run.cuts if segment not in begun]
        for segment in gone:
            del run.cuts[segment]
        if gone:
            self.desk.add(Release(run.id))
            for _, blob in [pair for cut in run.cuts.values() for pair in cut]:
                self.desk.add(Fetch(blob, run.id, (self.desk.me,), params.BLOB_BYTES_MAX))

    def _first(self, deal: Deal) -> int:
        return agreement_of(deal, self.desk.network.id).first_segment

    # --- losing units --------------------------------------------------------------------------------------
    def unit_back(self, job: Job, why: str) -> None:
        """JobDesk: a unit has no solver any more. Another one goes on from the last segment that all agree on."""
        run = self.runs[job.parent]
        parent = self.jobs.jobs[run.id]
        self.delivered.get(run.id, {}).pop(job.unit, None)
        if parent.cancelled or job.cancelled:
            self.jobs.end(job, JobState.CANCELLED, why)
        elif run.failed or not parent.open:
            self.jobs.end(job, JobState.FAILED, why)
        elif self.jobs.late(job):
            self.jobs.end(job, JobState.FAILED, self.jobs.missed(job))
        elif job.fruitless >= params.FRUITLESS_DEALS_MAX:
            self.jobs.end(job, JobState.FAILED, f"{job.fruitless} deals brought it no further; the last: {why}")
        elif job.diverged >= params.DIVERGED_SOLVERS:
            why = f"the task diverges ({why}); lower the learning rate and submit it again"
            self.jobs.end(job, JobState.FAILED, why)
        else:
            job.retried += 1
            self.desk.emit("reoffer", job.id, why=why, segment=run.segment)
            self._offer_units(run)

    def unit_right(self, deal: Deal) -> None:
        """Submitter: the work of a deal is found right, or there is none."""
        job = self.jobs.jobs[deal.job]
        run = self.runs[job.parent]
        if deal.id in run.lineage:
            run.lineage.remove(deal.id)
            self._save(run)
        if job.deal != deal.id or not job.open:
            return
        if job.segment >= task_of(deal.task).segments:
            self.jobs.end(job, JobState.DONE, "")
        else:
            self.jobs.reoffer(job, deal.note or "the deal ended early")

    def unit_wrong(self, deal: Deal) -> None:
        """Submitter: the work of a deal is wrong. What the others computed from what it sent them is of no use either:
        all go back to the state that it began from."""
        job = self.jobs.jobs[deal.job]
        run = self.runs[job.parent]
        culprit = self.submitter.solver_of(deal)
        self.quarrels.exclude(run, culprit)
        if deal.id in run.lineage and self.jobs.jobs[run.id].open and not run.failed:
            self.rewind(run, self._first(deal), f"the work of {peer_name(culprit)[:12]} on unit {job.unit} was wrong")
        if job.deal == deal.id:  # the run did not go back
            self.jobs.reoffer(job, "the work was wrong")

    def rewind(self, run: Run, segment: int, why: str) -> None:
        """Take all units back to a segment before which the states of all are known: every deal ends with what was
        signed, which is checked and paid as ever, and the run is placed anew from there."""
        parent, cut = self.jobs.jobs[run.id], run.cuts.get(segment)
        if run.failed:
            return  # it is being ended
        run.fruitless, run.rewinds = run.fruitless + 1, run.rewinds + 1
        children = self._children(run)
        if cut is None and segment == run.segment:
            cut = [(child.base_root, child.base_blob) for child in children]
        if cut is None or run.fruitless >= params.REWINDS_MAX or parent.cancelled:
            run.failed = f"{why}; it went back {run.fruitless} times without coming further"
            self._save(run)
            return
        self.desk.emit("rewind", run.id, why=why, segment=segment, was=run.segment)
        self.delivered.pop(run.id, None)
        run.lineage = [d for d in run.lineage if self._first(self.submitter.deals[d]) < segment]
        run.segment, run.peers, run.since = segment, [], []
        parent.segment, parent.state = segment, JobState.PLACING
        for child, (root, blob) in zip(children, cut, strict=True):
            deal, child.deal = self._deal(child), b""
            child.segment, child.base_root, child.base_blob = segment, root, blob
            child.state, child.reason, child.ended_ns = JobState.PLACING, "", 0
            if child.offer_id:
                self.desk.book.remove_offer(child.offer_id)
            if child.kept:
                self.kept.end(child)
            if deal is not None:
                self._detach(child, deal, f"the run goes back to segment {segment}")
        run.cuts[segment] = cut
        self._prune_later(run, segment)
        self.jobs.save(parent)
        self._offer_units(run)

    def _prune_later(self, run: Run, segment: int) -> None:
        for later in [at for at in run.cuts if at > segment]:
            del run.cuts[later]

    def _detach(self, child: Job, deal: Deal, why: str) -> None:
        """End a deal for no fault of its solver, which may have a unit again at once."""
        solver = self.submitter.solver_of(deal)
        rests = child.resting.get(solver)
        if deal.lifecycle == State.PROPOSED and not deal.doubt:
            move(self.desk, deal, Event.REFUSED)
            self.desk.send(solver, Decline(deal.id, "expired", why))
        elif deal.lifecycle == State.RUNNING:
            self.submitter.lose(deal, why)
            child.resting.pop(solver, None)
            if rests is not None:
                child.resting[solver] = rests

    def reasons(self, job: Job) -> list[Reason]:
        """Why a run waits: for solvers, for money, or some of its units for others."""
        run = self.runs.get(job.id)
        if run is None or not job.open:
            return []
        children = self._children(run)
        found = [Reason("bids", "units", len(children), why, severity=2) for why in self.market.why(run.id)]
        found += [Reason("offer", "budget", 1, c.reason, "a larger --budget") for c in children if c.reason and c.open]
        return found + self.watch.reasons(children)

    # --- rows ----------------------------------------------------------------------------------------------
    def restore(self, rows: Rows) -> None:
        """Rebuild the runs; whoever runs a unit is told again where the others are."""
        for key, value in rows(_TABLE):
            self.runs[key] = msgspec.msgpack.decode(value, type=Run)

    def _save(self, run: Run) -> None:
        self.desk.save(_TABLE, run.id, msgspec.msgpack.encode(run))
