"""Who waits for whom in a run, who is given up for it, and what people see of its units. Sans-IO."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from market.reasons import Reason
from peer.deals import Deal, Job, JobState
from peer.desk import Desk
from peer.jobs import JobDesk
from peer.run_events import UnitWaits
from peer.run_messages import UnitWaiting
from peer.run_row import Run
from peer.submitter import Submitter
from peer.units import stage_of
from protocol import params
from protocol.keys import peer_name
from protocol.lifecycle import State

__all__ = ["RunWatch"]


@dataclass
class RunWatch:
    """See the module docstring. `held(deal)`: whether its next receipt is here and waits for those of others."""

    desk: Desk
    jobs: JobDesk
    submitter: Submitter
    held: Callable[[Deal], bool]
    waits: dict[bytes, tuple[int, tuple[int, ...]]] = field(default_factory=dict)  # deal or kept unit -> when, for whom
    launched_ns: dict[bytes, int] = field(default_factory=dict)  # run -> its last launch

    def launched(self, run: bytes, deals: Iterable[Deal]) -> None:
        """All begin to work now: nobody was silent before."""
        self.launched_ns[run] = self.desk.now_ns
        for deal in deals:
            deal.news_ns = self.desk.now_ns

    def forget(self, run: bytes, children: Iterable[Job]) -> None:
        """It is over."""
        self.launched_ns.pop(run, None)
        for child in children:
            for one in (child.id, *child.deals):
                self.waits.pop(one, None)

    def on_waiting(self, peer: bytes, message: UnitWaiting) -> None:
        """A solver says that its unit stands still."""
        deal = self.submitter.deals.get(message.agreement)
        if deal is not None and self.submitter.solver_of(deal) == peer and deal.lifecycle == State.RUNNING:
            self.waits[deal.id] = (self.desk.now_ns, message.units)

    def on_kept_waiting(self, event: UnitWaits) -> None:
        """A unit that is kept here stands still."""
        job = self.jobs.jobs.get(event.work)
        if job is not None and job.kept and job.open:
            self.waits[job.id] = (self.desk.now_ns, event.units)

    def _waits(self, children: Iterable[Job]) -> dict[int, tuple[int, ...]]:
        """The units that stand still now, and for whom."""
        since = self.desk.now_ns - 3 * params.RESEND_NS
        said = {child.unit: self.waits.get(child.deal or child.id) for child in children}
        return {unit: one[1] for unit, one in said.items() if one is not None and one[0] >= since}

    def lost(self, run: Run, children: list[Job], *, whole: bool, acked: Collection[bytes]) -> list[tuple[Deal, str]]:
        """The deals to end: others wait for those units, which wait for nobody, and they are gone or make no step.

        Who waits is not silent; who waits only for units that have handed in is: what it lacks of them, somebody else
        may get. whole: each unit has a solver. acked: the deals whose solvers have the last launch.
        """
        now, waits, found = self.desk.now_ns, self._waits(children), []
        waited_for = {unit for units in waits.values() for unit in units} - set(waits)
        deals = {child.unit: self.submitter.deals.get(child.deal) for child in children}
        handed = {unit for unit, deal in deals.items() if deal is not None and self.held(deal)}
        for child in children:
            deal = deals[child.unit]
            if deal is None or deal.lifecycle != State.RUNNING:
                continue
            excused = bool(waited_for) and not handed.issuperset(waits.get(child.unit, ()))
            if not whole or excused or child.unit in handed:
                deal.news_ns = now
            elif child.unit in waited_for and deal.id in acked:
                gone = self.submitter.solver_of(deal) not in self.desk.peers
                silent_ns = now - max(deal.news_ns, self.launched_ns.setdefault(run.id, now))
                if gone or silent_ns > params.UNIT_STALL_NS:
                    why = "its solver is gone" if gone else f"it made no step in {silent_ns // 10**9} s"
                    found.append((deal, f"others wait for unit {child.unit}, and {why}"))
        return found

    # --- for people ----------------------------------------------------------------------------------------
    def describe(self, job: Job, run: Run | None) -> dict[str, Any]:
        """A run's units: who runs each, how far it is, whom it waits for. Empty for any other job."""
        if run is None:
            return {}
        children = [self.jobs.jobs[unit] for unit in run.units]
        waits = self._waits(children)
        return {
            "epoch": run.epoch,
            "rewinds": run.rewinds,
            "units": [self._unit(child, waits.get(child.unit, ())) for child in children],
        }

    def reasons(self, children: list[Job]) -> list[Reason]:
        """Which units stand still, and for whom."""
        words = {u: ", ".join(map(str, others)) for u, others in self._waits(children).items()}
        return [Reason("work", "waits", u, f"unit {u} waits for tensors of unit {w}") for u, w in words.items()]

    def _unit(self, child: Job, waits: tuple[int, ...]) -> dict[str, Any]:
        stage, deal = stage_of(child.task), self.submitter.deals.get(child.deal)
        assert stage is not None, "it was checked when the run was opened"
        solver = self.desk.me if child.kept else self.submitter.solver_of(deal) if deal is not None else b""
        return {
            "job": child.id.hex(),
            "unit": child.unit,
            "stage": stage.stage,
            "replica": stage.replica,
            "kept": child.kept,
            "state": JobState(child.state).name.lower(),
            "deal": deal.lifecycle.name.lower() if deal is not None else "",
            "solver": peer_name(solver) if solver else "",
            "segments_done": child.segment,
            "handed_in": deal is not None and self.held(deal),
            "waiting_for": list(waits),
            "retried": child.retried,
            "spent_micro": child.spent_micro,
            "reason": child.reason,
            "checkpoint": child.base_blob.hex(),
            "root": child.base_root.hex(),
        }
