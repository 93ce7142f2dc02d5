"""What a submitter does about an error that was ordered in its deal: learn of it, have the true work checked, use that.

Notaries tell it when the deal is checked. The true end lay with them before the draw, but no check of what was drawn
can speak for it: so a checker re-executes that segment to its true end and the next one from there. What cannot be had
or is wrong is done again from that segment on, so the job ends where an honest one does. Sans-IO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from peer.deals import Check, Correction, Deal, agreement_of, save, task_of
from peer.desk import Desk
from peer.events import Fetch, Fetched
from peer.messages import CorrectionAsk, CorrectionGiven
from peer.settler import Settler
from protocol import params
from protocol.errors import VerificationFailed
from protocol.forced import check_forced, forced_of, givers, orders_errors
from protocol.lifecycle import State
from protocol.records import Agreement, Forced, Receipt, open_record
from protocol.task import TaskSpec

__all__ = ["Corrections"]

Ask = Callable[[Deal, Agreement, list[bytes], list[int]], bool]


@dataclass
class Corrections:
    """See the module docstring. `ask` has a checker re-execute segments of a deal without its ordered error."""

    desk: Desk
    settler: Settler
    ask: Ask = lambda _a, _b, _c, _d: False
    none_by: dict[bytes, set[bytes]] = field(default_factory=dict)  # deal -> notaries that know of no ordered error
    again_ns: dict[bytes, int] = field(default_factory=dict)  # deal -> ask the notaries, or the solver, again then

    def forced(self, deal: Deal) -> Forced | None:
        """The ordered error that a deal's receipts show, as far as this peer knows."""
        return forced_of(deal.forced, self.desk.network.id)[0] if deal.forced else None

    def excuse(self, deal: Deal, wrong: list[Check]) -> bool:
        """Whether notaries ruled that an error of this deal was ordered: then what was found wrong by it is excused,
        as soon as they say which it is."""
        channel = self.settler.channels[deal.id]
        if not any(judged.finding == "forced" for judged in channel.findings.values()):
            return False
        record = self.forced(deal)
        if record is None:
            self._learn(deal, channel.agreement)
            return deal.correction == "unknown"
        excused = [c for c in wrong if c.wrong_segment in (record.segment, record.segment + 1)]
        for check in excused:
            check.state = "excused"
        save(self.desk, deal)
        return bool(excused)

    def done(self, deal: Deal, agreement: Agreement, receipts: list[bytes]) -> bool:
        """Whether the deal may be settled, its checks being in: no error was ordered, or it is corrected, or that was
        given up. Else the next thing is done about it."""
        if deal.correction == "unknown":
            if orders_errors(self.desk.network, agreement):
                self._learn(deal, agreement)
            else:
                self._set(deal, "none")
        elif deal.correction == "fetching":
            self._fetch(deal, agreement)
        elif deal.correction == "checking":
            self._check(deal, agreement, receipts)
        return deal.correction in ("none", "done", "given-up")

    def _set(self, deal: Deal, state: Correction) -> None:
        deal.correction, deal.corrected_ns = state, self.desk.now_ns
        self.again_ns.pop(deal.id, None)
        save(self.desk, deal)

    # --- what was ordered ----------------------------------------------------------------------------------
    def _learn(self, deal: Deal, agreement: Agreement) -> None:
        if self.desk.now_ns < self.again_ns.get(deal.id, 0):
            return
        self.again_ns[deal.id] = self.desk.now_ns + params.RESEND_NS
        verdicts = tuple(c.verdict for c in deal.checks if c.state == "right")[:8]
        for notary in givers(self.desk.network, agreement):
            if notary not in self.none_by.get(deal.id, ()):
                self.desk.send(notary, CorrectionAsk(deal.id, verdicts))

    def on_given(self, deal: Deal, peer: bytes, message: CorrectionGiven, receipts: list[bytes]) -> None:
        """A notary's answer. One ordered error that proves itself decides; that there is none takes a quorum, for a
        quorum keeps each before its receipt is offered. Raises VerificationFailed."""
        agreement = agreement_of(deal, self.desk.network.id)
        if peer not in givers(self.desk.network, agreement):
            raise VerificationFailed("a deal's own notaries say what was ordered in it")
        if deal.correction != "unknown" or deal.lifecycle != State.CHECKING:
            return
        if message.forced:
            record, _, _ = open_record(message.forced, network=self.desk.network.id)
            if not isinstance(record, Forced):
                raise VerificationFailed("an ordered error comes as a Forced")
            check_forced(record, agreement, deal.id, shares=message.beacons, network=self.desk.network)
            place = record.segment - agreement.first_segment
            if place >= deal.receipts or self._receipt(receipts[place]).out_root != record.false_root:
                self._set(deal, "none")  # its receipt never came, or is not the false one
                return
            deal.forced, deal.beacons = message.forced, list(message.beacons)
            self._set(deal, "fetching")
            self.desk.emit("ordered-error", deal.job, deal=deal.id, segment=record.segment)
            return
        none_by = self.none_by.setdefault(deal.id, set())
        none_by.add(peer)
        if len(none_by) >= self.desk.network.notary_quorum:
            self._set(deal, "none")

    def _receipt(self, envelope: bytes) -> Receipt:
        record, _, _ = open_record(envelope, network=self.desk.network.id)
        assert isinstance(record, Receipt)
        return record

    # --- the true work -------------------------------------------------------------------------------------
    def _fetch(self, deal: Deal, agreement: Agreement) -> None:
        record, task = self.forced(deal), task_of(deal.task)
        assert record is not None
        assert isinstance(task, TaskSpec)
        if self.desk.now_ns - deal.corrected_ns > params.CORRECTION_WAIT_NS:
            self._set(deal, "given-up")
        elif self.desk.now_ns >= self.again_ns.get(deal.id, 0):
            self.again_ns[deal.id] = self.desk.now_ns + params.CORRECTION_FETCH_NS
            self.desk.add(
                Fetch(
                    record.checkpoint,
                    deal.id,
                    (agreement.solver,),
                    min(record.checkpoint_bytes, params.BLOB_BYTES_MAX),
                    state_root=record.true_root,
                    program=task.program,
                )
            )

    def on_fetched(self, deal: Deal, event: Fetched) -> None:
        """The true state is here, or not yet; another one than was told is as good as none."""
        record = self.forced(deal)
        if record is None or deal.correction != "fetching" or event.blob != record.checkpoint:
            return
        if event.forged:
            self.desk.penalise(record.solver, "the true state of its ordered error has another root than it told")
            self._set(deal, "given-up")
        elif not event.error:
            self._set(deal, "checking")

    def _check(self, deal: Deal, agreement: Agreement, receipts: list[bytes]) -> None:
        record = self.forced(deal)
        assert record is not None
        checks = [c for c in deal.checks if c.corrected]
        if any(c.state == "right" for c in checks):
            self._set(deal, "done")
            self.desk.emit("corrected", deal.job, deal=deal.id, segment=record.segment, root=record.true_root)
        elif sum(c.state == "wrong" for c in checks) >= self.desk.network.rules.wrong_quorum:
            self._set(deal, "given-up")
        elif not any(c.state in ("asked", "accepted") for c in checks):
            end = agreement.first_segment + deal.receipts
            wanted = {s for s in (record.segment, record.segment + 1) if s < end}
            if not self._seen(deal):
                wanted |= set(deal.drawn)
            self.ask(deal, agreement, receipts, sorted(wanted))

    @staticmethod
    def _seen(deal: Deal) -> bool:
        """Whether somebody re-executed all that was drawn, and found it right."""
        return any(c.state == "right" and c.segments == deal.drawn for c in deal.checks if not c.corrected)

    def apply(self, deal: Deal, agreement: Agreement, receipts: list[bytes]) -> None:
        """Let the job go on from the true end, or, where that was given up, from before the ordered error; or from
        before the whole deal, where nobody re-executed what was drawn."""
        record = self.forced(deal)
        if record is None or deal.useful >= 0:
            return
        place = record.segment - agreement.first_segment
        if deal.correction == "done":
            deal.useful = deal.receipts
            if place == deal.receipts - 1:
                deal.last_root, deal.last_blob = record.true_root, record.checkpoint
        else:
            deal.useful = place if self._seen(deal) else 0
            deal.last_root = self._receipt(receipts[deal.useful]).in_root
            deal.last_blob = self._receipt(receipts[deal.useful - 1]).checkpoint if deal.useful else deal.base_blob
            deal.note = deal.note or "the true state of an ordered error cannot be had"
        save(self.desk, deal)
