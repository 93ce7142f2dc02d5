"""Who makes room in a run where the two ends of a link say different things.

What a unit's own signatures disprove is its fault alone. Where a unit complains of what came from a neighbour, nobody
else can tell which of the two is wrong, for payloads are not signed one by one: neither has failed, both make room for
a while, and all units go back to the start of the segment. Who has quarrelled with more peers than the other is the
one that makes room, for good. A stake is never lost over a link. Sans-IO; docs/decisions/0023-parallel.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from peer.deals import Deal, Job, agreement_of
from peer.desk import Desk
from peer.jobs import JobDesk
from peer.run_messages import UnitDisputed
from peer.run_row import Run
from peer.submitter import Submitter
from peer.units import Complaint, stage_of
from protocol import params
from protocol.errors import VerificationFailed
from protocol.lifecycle import State
from protocol.stage import links_in

__all__ = ["Quarrels"]


@dataclass
class Quarrels:
    """See the module docstring. `rewind(run, segment, why)` takes all units of a run back."""

    desk: Desk
    jobs: JobDesk
    submitter: Submitter
    runs: Mapping[bytes, Run]
    save: Callable[[Run], None]
    rewind: Callable[[Run, int, str], None]

    def exclude(self, run: Run, solver: bytes) -> None:
        """It gets no unit of this run again."""
        for child in self._children(run):
            if solver not in child.culprits:
                child.culprits.append(solver)
                self.jobs.save(child)

    def blame(self, run: Run, child: Job, why: str) -> None:
        """A unit's solver lied about its links, and its own signatures show it."""
        deal = self.submitter.deals.get(child.deal)
        if deal is not None:
            solver = self.submitter.solver_of(deal)
            self.desk.penalise(solver, f"unit {child.unit} {why}"[:200])
            self.exclude(run, solver)

    def on_disputed(self, peer: bytes, message: UnitDisputed) -> None:
        """A solver got of a neighbour what that did not sign for, or what is no tensor. Raises VerificationFailed."""
        deal = self.submitter.deals.get(message.agreement)
        if deal is None or self.submitter.solver_of(deal) != peer:
            return
        job = self.jobs.jobs[deal.job]
        run, stage = self.runs.get(job.parent), stage_of(deal.task)
        if run is None or stage is None or not self.jobs.jobs[run.id].open:
            return
        due = agreement_of(deal, self.desk.network.id).first_segment + deal.receipts
        if message.segment != due:
            return
        complaint = Complaint(message.unit, message.peer, message.what)
        if complaint.unit not in {link.other for link in links_in(stage)} or not self._had(run, complaint):
            raise VerificationFailed(f"unit {job.unit} complains of unit {complaint.unit}, which is no neighbour")
        runs = job.deal == deal.id and deal.lifecycle == State.RUNNING and not deal.ended_early
        if not runs and (peer, complaint.peer) in run.quarrels:
            return  # said again after its deal is over: else it could keep a neighbour resting for ever
        words = self.judge(run, job, peer, complaint)
        if runs:  # of a deal that ended meanwhile it only counts
            self.rewind(run, run.segment, words)

    def of_kept(self, job: Job, complaint: Complaint) -> None:
        """KeptUnits: a unit here got such a thing."""
        run = self.runs[job.parent]
        self.rewind(run, run.segment, self.judge(run, job, self.desk.me, complaint))

    def judge(self, run: Run, job: Job, receiver: bytes, complaint: Complaint) -> str:
        """Note a quarrel, and who of the two makes room; what it is about, in words."""
        pair = (receiver, complaint.peer)
        if pair not in run.quarrels:
            run.quarrels = [*run.quarrels, pair][-params.QUARRELS_KEPT :]
        self.save(run)
        guilty = self._guilty(run, *pair)
        if guilty:
            self.exclude(run, guilty)
        for child in self._children(run):
            if not guilty:  # one longer than the other: whom they meet next tells them apart
                child.resting[complaint.peer] = self.desk.now_ns + params.SOLVER_REST_NS
                child.resting[receiver] = self.desk.now_ns + 2 * params.SOLVER_REST_NS
            for peer in self._others(run, guilty):  # their only quarrels were with it
                if self._others(run, peer) == {guilty}:
                    child.resting.pop(peer, None)
            self.jobs.save(child)
        self.desk.emit("quarrel", run.id, receiver=receiver, sender=complaint.peer, what=complaint.what, guilty=guilty)
        if complaint.what == "no-tensor":
            return f"unit {job.unit} could not decode what came from unit {complaint.unit}"
        return f"units {job.unit} and {complaint.unit} differ about what went between them"

    def _guilty(self, run: Run, receiver: bytes, sender: bytes) -> bytes:
        """Who of the two must be wrong, as far as this peer can know: not itself, and rather who quarrels with more."""
        if self.desk.me in (receiver, sender):
            return sender if receiver == self.desk.me else receiver
        more = len(self._others(run, sender)) - len(self._others(run, receiver))
        return sender if more > 0 else receiver if more < 0 else b""

    def _others(self, run: Run, peer: bytes) -> set[bytes]:
        """With whom a peer has quarrelled in a run."""
        return {two if one == peer else one for one, two in run.quarrels if peer in (one, two)}

    def _had(self, run: Run, complaint: Complaint) -> bool:
        """Whether the peer that a complaint is about has, or had, its unit."""
        child = self.jobs.jobs[run.units[complaint.unit]]
        deals: list[Deal] = [self.submitter.deals[deal] for deal in child.deals if deal in self.submitter.deals]
        solvers = {self.submitter.solver_of(deal) for deal in deals}
        return complaint.peer in (solvers | ({self.desk.me} if child.kept else set()))

    def _children(self, run: Run) -> list[Job]:
        return [self.jobs.jobs[unit] for unit in run.units]
