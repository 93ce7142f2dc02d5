"""A solver's deals on units of runs: launched by their submitter, held until all hand in, in dispute with a neighbour.

Sans-IO; what passes between the units themselves is peer/units.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peer import run_messages as rm
from peer.deals import Deal, agreement_of
from peer.desk import Desk
from peer.events import UnitWaits
from peer.solver import Solver
from peer.units import Units, stage_of
from protocol import params
from protocol.errors import VerificationFailed
from protocol.lifecycle import State

__all__ = ["UnitDeals"]


@dataclass
class UnitDeals:
    """See the module docstring."""

    desk: Desk
    units: Units
    solver: Solver
    held_ns: dict[tuple[bytes, int], int] = field(default_factory=dict)  # (deal, sequence) -> first held at

    def on_launch(self, peer: bytes, message: rm.Launch) -> None:
        """The submitter has a solver for every unit: begin, or go on with other neighbours. Raises
        VerificationFailed."""
        deal = self._deal(peer, message.agreement)
        if deal is None:
            return
        stage = stage_of(deal.task)
        if stage is None:
            raise VerificationFailed("a launch of a deal that is no unit of a run")
        if deal.lifecycle != State.RUNNING or deal.ended_early:
            return
        news = self.units.launch(deal.id, stage, message)
        self.desk.send(peer, rm.Launched(deal.id, self.units.seats[deal.id].epoch))
        deal.news_ns = self.desk.now_ns
        if news and deal.id in self.solver.working:
            self.units.relink(deal.id)
        elif news:
            self.desk.emit("launched", deal=deal.id, unit=stage.unit, epoch=message.epoch)
            self.solver.go(deal)

    def on_held(self, peer: bytes, message: rm.Held) -> None:
        """The submitter has our receipt and waits for the others: it is not silent, but not for ever."""
        deal = self._deal(peer, message.agreement)
        if deal is None or message.sequence != deal.receipts or not self.units.order(deal.id):
            return
        self.held_ns = {key: at for key, at in self.held_ns.items() if key[0] != deal.id or key[1] == message.sequence}
        first = self.held_ns.setdefault((deal.id, message.sequence), self.desk.now_ns)
        most_ns = params.HELD_SILENCES_MAX * self.desk.network.rules.check_silence_ms * 10**6
        if self.desk.now_ns - first < most_ns:
            deal.news_ns = self.desk.now_ns

    def on_waits(self, event: UnitWaits) -> None:
        """The work stands still: its submitter has to know for whom."""
        deal = self.solver.deals.get(event.work)
        if deal is not None and deal.lifecycle == State.RUNNING:
            self.desk.send(self._submitter(deal), rm.UnitWaiting(deal.id, event.units))

    def tick(self) -> None:
        """Give up what is never launched; tell again of what is disputed; ask for what lacks."""
        for over in [key for key in self.held_ns if key[0] not in self.units.seats]:
            del self.held_ns[over]
        for deal in list(self.solver.deals.values()):
            if deal.state != State.RUNNING or deal.ended_early or stage_of(deal.task) is None:
                continue
            if self.units.waits(deal):
                if self.desk.now_ns - deal.entered_ns > params.LAUNCH_WAIT_NS:
                    self.solver.give_up(deal, "not-launched", "the other units of the run were not to be had in time")
                continue
            segment = agreement_of(deal, self.desk.network.id).first_segment + deal.receipts
            blamed = self.units.disputed.get((deal.id, segment))
            again = self.desk.now_ns >= self.units.ask_again.get(deal.id, 0)
            if blamed is not None and again:
                self.units.ask_again[deal.id] = self.desk.now_ns + params.RESEND_NS
                self.desk.send(self._submitter(deal), rm.UnitDisputed(deal.id, segment, *blamed))
            elif deal.receipts < deal.made and self.units.handovers(deal.id, segment) is None:
                self.units.ask(deal.id, segment)

    def _deal(self, peer: bytes, agreement: bytes) -> Deal | None:
        deal = self.solver.deals.get(agreement)
        return deal if deal is not None and self._submitter(deal) == peer else None

    def _submitter(self, deal: Deal) -> bytes:
        return agreement_of(deal, self.desk.network.id).submitter
