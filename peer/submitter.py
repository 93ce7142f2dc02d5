"""The submitter's side of every job: offer, match, pay for receipts, have the proof checked, settle, or start over.

Sans-IO: it reads the desk's clock, changes rows, queues effects. A message may be lost, doubled or late; whatever
matters is repeated by `tick` until the deal moves on, and every handler does nothing the second time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from market.acceptance import PASSED_OVER
from market.matching import Choice
from peer.beacon import Beacons
from peer.certificates import Certificates
from peer.checking import CheckDesk
from peer.deals import (
    Deal,
    Job,
    JobState,
    agreement_of,
    make_proof,
    move,
    save,
    task_of,
)
from peer.desk import Desk
from peer.drawing import Drawing
from peer.events import Release
from peer.jobs import JobDesk
from peer.messages import (
    Accept,
    Cancel,
    Decline,
    Opened,
    Propose,
)
from peer.receipt_rows import ReceiptRows, Rows
from peer.receiving import Receiving
from peer.settler import Settler
from protocol import params
from protocol.errors import NotFound, VerificationFailed
from protocol.lifecycle import TERMINAL, Event, State
from protocol.records import (
    Agreement,
    Bid,
    Offer,
    open_record,
)
from protocol.sampling import commitment

__all__ = ["Submitter"]


@dataclass
class Submitter:
    """Jobs and the submitter's deals. `checks` runs the verification of a proved deal."""

    desk: Desk
    settler: Settler
    checks: CheckDesk
    jobs: JobDesk
    beacons: Beacons
    certificates: Certificates
    deals: dict[bytes, Deal] = field(default_factory=dict)
    receipts: ReceiptRows = field(init=False)  # deal -> co-signed envelopes
    proposals: dict[bytes, int] = field(default_factory=dict)  # deal -> resend at
    # Of a unit of a run (peer/runs.py): its deal's work is right; it is wrong.
    on_unit_right: Callable[[Deal], None] = lambda _: None
    on_unit_wrong: Callable[[Deal], None] = lambda _: None

    def __post_init__(self) -> None:
        self.receipts = ReceiptRows("receipts", lambda deal: self.deals[deal].receipts)
        self.certificates.on_certified, self.certificates.on_refused = self.certified, self.uncertified
        self.drawing = Drawing(self.desk, self.checks, self.beacons, self.deals, self.receipts)
        self.receiving = Receiving(self.desk, self.jobs, self.drawing, self.deals, self.receipts, self.lose)

    # --- a person's wishes ---------------------------------------------------------------------------------
    def cancel(self, job_id: bytes) -> Job:
        """Stop a job; receipts so far are checked and paid. Raises NotFound."""
        job = self.jobs.jobs.get(job_id)
        if job is None:
            raise NotFound(f"no job {job_id.hex()[:12]}", next_step="see `ichiba job ls`")
        if not job.open:
            return job
        job.cancelled = True
        for child in self.jobs.children(job):
            self.cancel(child.id)
        if job.units:
            self.jobs.save(job)  # it is over when its units are
            return job
        deal = self.deals.get(job.deal)
        if deal is None or deal.lifecycle == State.PROPOSED:
            if deal is not None:
                self._decline(deal, "cancelled", "the submitter cancelled the job")
            self.jobs.end(job, JobState.CANCELLED, "cancelled before any work")
        elif deal.lifecycle in (State.AGREED, State.RUNNING):
            self.lose(deal, "the submitter cancelled the job")
        self.jobs.save(job)
        return job

    # --- agreeing ------------------------------------------------------------------------------------------
    def propose(self, job: Job, offer: Offer, bid: Bid, choice: Choice) -> None:
        """JobDesk chose a bid: sign the agreement and send it."""
        assert choice.winner is not None
        now = self.desk.now_ns
        seed = self.desk.rng.randbytes(32)
        committed = commitment(seed, agreement_salt=self.desk.me)
        agreement = self.jobs.agreement(job, offer, bid, choice.winner.bid_id, committed)
        envelope = self.desk.seal(agreement)
        deal = Deal(
            id=open_record(envelope, network=self.desk.network.id)[1],
            side="submitter",
            state=State.PROPOSED,
            agreement=envelope,
            task=job.task,
            base_blob=job.base_blob,
            seed=seed,
            created_ns=now,
            profiles=list(job.profiles),
            job=job.id,
            base_root=job.base_root,
            last_root=job.base_root,
            last_blob=job.base_blob,
            news_ns=now,
            entered_ns=now,
        )
        self.deals[deal.id], self.receipts[deal.id] = deal, []
        job.deal, job.state = deal.id, JobState.RUNNING
        job.deals.append(deal.id)
        save(self.desk, deal)
        self.jobs.save(job)
        self.jobs.matches.proposed(deal.id, agreement.offer, envelope)
        self._send_proposal(deal)
        self.desk.emit("matched", job.id, deal=deal.id, solver=bid.solver, unit_price=bid.unit_price)

    def _send_proposal(self, deal: Deal) -> None:
        self.proposals[deal.id] = self.desk.now_ns + params.RESEND_NS
        self.desk.send(self.solver_of(deal), Propose(deal.agreement, deal.task, deal.base_blob, tuple(deal.profiles)))

    def _decline(self, deal: Deal, code: str, why: str) -> None:
        move(self.desk, deal, Event.REFUSED)
        self.proposals.pop(deal.id, None)
        self.desk.send(self.solver_of(deal), Decline(deal.id, code, why))

    def _withdraw(self, deal: Deal, why: str) -> None:
        """A proposal that came to nothing in its time: the job goes on without it, or is over."""
        self._decline(deal, "expired", why)
        self.jobs.reoffer(self.jobs.jobs[deal.job], why)

    # --- messages ------------------------------------------------------------------------------------------
    def on_accept(self, peer: bytes, message: Accept) -> None:
        """The solver's signature: the channel can be funded, once notaries have certified it where there are some."""
        record, agreement_id, signers = open_record(message.agreement, network=self.desk.network.id)
        deal = self.deals.get(agreement_id)
        if deal is None or not isinstance(record, Agreement) or peer != record.solver:
            raise VerificationFailed("acceptance of an agreement that was never proposed")
        if signers != {self.desk.me, peer}:
            raise VerificationFailed("an agreement is accepted with both signatures, and no others")
        if deal.lifecycle == State.DECLINED:
            self.desk.send(peer, Decline(deal.id, "too-late", "the proposal was withdrawn"))
            return
        if deal.lifecycle != State.PROPOSED:
            self.desk.send(peer, Opened(deal.agreement))
        elif self.jobs.late(self.jobs.jobs[deal.job]):
            self._withdraw(deal, "the deadline of the job passed")
        elif not deal.doubt:
            deal.agreement = message.agreement
            self.certificates.certify(deal)

    def certified(self, deal: Deal) -> None:
        """All signatures that the opening takes are on the agreement: fund the channel, and `opened` goes on."""
        with suppress(VerificationFailed):
            self.settler.accept(deal.agreement, publish=True)
        if deal.id not in self.settler.every:
            self.uncertified(deal, "funds", "the channel could not be funded: solver's stake or own balance")

    def uncertified(self, deal: Deal, code: str, why: str) -> None:
        """The notaries did not certify the opening, or its money is not there: try again with what is."""
        deal.note, deal.uncertified = why[:300], code
        self._decline(deal, code, why)
        job = self.jobs.jobs[deal.job]
        if code == "stake":
            self._rest(job, self.solver_of(deal))
        self.jobs.reoffer(job, why)

    def _begin(self, deal: Deal) -> None:
        """The channel is open: tell the solver."""
        deal.agreement = self.settler.log.get(deal.id, deal.agreement)  # on credit it is in no log
        self.proposals.pop(deal.id, None)
        move(self.desk, deal, Event.ACCEPTED)
        move(self.desk, deal, Event.STARTED)
        job = self.jobs.jobs[deal.job]
        self.desk.book.remove_offer(job.offer_id)
        solver, after_ns = self.solver_of(deal), self.desk.now_ns - job.offered_ns
        self.desk.emit("agreed", deal.job, deal=deal.id, solver=solver, after_ns=after_ns)
        self.desk.send(solver, Opened(deal.agreement))

    def on_decline(self, peer: bytes, message: Decline) -> None:
        """The solver will not, or can no longer."""
        deal = self.deals.get(message.agreement)
        if deal is None or peer != self.solver_of(deal):
            return
        self.desk.emit("refused", deal.job, solver=peer, code=message.code, why=message.why)
        job = self.jobs.jobs[deal.job]
        if deal.lifecycle == State.PROPOSED:
            deal.note = message.why[:300]
            move(self.desk, deal, Event.REFUSED)
            self.proposals.pop(deal.id, None)
            if message.code in PASSED_OVER:
                self.jobs.passed_over(job, peer, message.code, message.why)
                return
            self._rest(job, peer)
            self.jobs.reoffer(job, f"the solver declined: {message.why}")
        elif deal.lifecycle == State.RUNNING:
            job.diverged += message.code == "diverged"
            self.lose(deal, f"the solver gave up: {message.why}")

    def _rest(self, job: Job, solver: bytes) -> None:
        """Try others first: this solver may have the job again later, when it may be well again."""
        job.resting[solver] = self.desk.now_ns + params.SOLVER_REST_NS
        self.jobs.save(job)

    # --- endings -------------------------------------------------------------------------------------------
    def lose(self, deal: Deal, why: str) -> None:
        """End a running deal early: what both signed is proved, checked and paid; the rest goes back to market."""
        job = self.jobs.jobs[deal.job]
        deal.ended_early, deal.note = True, why
        self.receiving.waiting.pop(deal.id, None)
        self.desk.send(self.solver_of(deal), Cancel(deal.id))
        self.desk.emit("lost", deal.job, deal=deal.id, solver=self.solver_of(deal), why=why, receipts=deal.receipts)
        self._rest(job, self.solver_of(deal))
        if not deal.receipts:
            move(self.desk, deal, Event.NOTHING_DONE)
            self.checks.claim(deal)
            self._continue_job(deal)  # nothing was done, so nothing has to be checked before going on
            return
        envelope, proof_id = make_proof(self.desk, deal, self.receipts[deal.id])
        self.drawing.prove(deal, envelope, proof_id, Event.SOLVER_LOST)
        if job.unit >= 0 and job.deal == deal.id:
            self.jobs.reoffer(job, why)  # the others of its run wait: it goes on at once, and the checks beside it

    def checked_right(self, deal: Deal) -> None:
        """CheckDesk: the work of an ended deal is verified, so the job can go on from its last checkpoint."""
        if deal.paid_out:
            move(self.desk, deal, Event.WINDOW_CLOSED)
        if deal.ended_early or deal.paid_out:
            self._continue_job(deal)

    def opened(self, agreement_id: bytes) -> None:
        """Settler: a channel is open. If it is one we had given up, whoever held our signature back opened it: claim,
        so that our money comes back after the window."""
        deal = self.deals.get(agreement_id)
        if deal is not None and deal.lifecycle == State.DECLINED:
            self.checks.claim(deal)
        elif deal is not None and deal.lifecycle == State.PROPOSED:
            self._begin(deal)

    def closed(self, agreement_id: bytes, how: str) -> None:
        """The settler closed this channel: finish the deal and move its job."""
        deal = self.deals.get(agreement_id)
        if deal is None or deal.lifecycle in TERMINAL:
            return
        job = self.jobs.jobs[deal.job]
        channel = self.settler.every[agreement_id]
        if how == "slashed":
            move(self.desk, deal, Event.RULED_WRONG if self.desk.network.notaries else Event.FOUND_WRONG)
            job.slashed_micro += channel.agreement.lock_micro
            job.culprits.append(channel.agreement.solver)
            job.retried += 1
            culprit, lost = channel.agreement.solver, channel.agreement.lock_micro
            self.desk.emit("slashed", job.id, deal=deal.id, solver=culprit, lock_micro=lost)
            self.desk.add(Release(deal.id))
            if job.unit >= 0:
                self.on_unit_wrong(deal)
            elif job.deal == deal.id:
                self.jobs.reoffer(job, "the work was wrong and its solver is slashed")
            self.jobs.save(job)
            return
        if not deal.paid_out:
            deal.paid_out = True
            job.spent_micro += channel.paid_micro + sum(micro for _, micro in channel.fees)
            self.jobs.save(job)
            self.desk.emit(
                how,
                job.id,
                deal=deal.id,
                solver=channel.agreement.solver,
                paid_micro=channel.paid_micro,
                fees=[{"peer": peer, "micro": micro} for peer, micro in channel.fees],
            )
        if how == "claimed" and deal.lifecycle in (State.RUNNING, State.PROVED, State.CHECKING, State.DISPUTED):
            self._claimed_unchecked(deal, job)
            return
        move(self.desk, deal, Event.COSIGNED if how == "settled" else Event.WINDOW_CLOSED)
        self.desk.add(Release(deal.id, keep=deal.last_blob))  # the last checkpoint is the job's result, or its base
        if job.deal == deal.id or job.unit >= 0:
            self._continue_job(deal)

    def overtaken(self, agreement_id: bytes, how: str) -> None:
        """The store is an old one, restored: a channel was closed after it was saved. The log is the truth: whatever is
        known here of the deal, it ended as the channel did. What this peer settled it had found right, so the job goes
        on from the receipts that are left of it; the later ones, and their checkpoints, are lost."""
        deal = self.deals.get(agreement_id)
        if deal is None or deal.lifecycle in TERMINAL:
            return
        job, channel = self.jobs.jobs[deal.job], self.settler.every[agreement_id]
        deal.state = {"settled": State.SETTLED, "slashed": State.SLASHED, "claimed": State.CLAIMED}[how]
        deal.paid_out, deal.entered_ns, deal.note = True, self.desk.now_ns, "the rest was lost with a newer store"
        save(self.desk, deal)
        job.spent_micro += channel.paid_micro + sum(micro for _, micro in channel.fees)
        self.desk.emit(how, job.id, deal=deal.id, solver=channel.agreement.solver, paid_micro=channel.paid_micro)
        if how == "settled":
            self._continue_job(deal)
        elif job.deal == deal.id and job.open:
            self.jobs.reoffer(job, deal.note)
        self.jobs.save(job)

    def _claimed_unchecked(self, deal: Deal, job: Job) -> None:
        """The solver closed the channel alone before its work was checked: it is paid, and the checks go on, so
        that the job can build on the work instead of paying for it twice."""
        if deal.lifecycle != State.RUNNING:
            save(self.desk, deal)
        elif deal.receipts:
            self.lose(deal, "the solver closed the channel alone")
        else:
            move(self.desk, deal, Event.WINDOW_CLOSED)
            if job.deal == deal.id:
                self.jobs.reoffer(job, "the solver closed the channel before the first receipt")

    def paid_and_wrong(self, deal: Deal) -> None:
        """CheckDesk: a quorum convicts, but the channel is closed already: nothing builds on the work."""
        job = self.jobs.jobs[deal.job]
        move(self.desk, deal, Event.WINDOW_CLOSED)
        job.culprits.append(self.solver_of(deal))
        job.retried += 1
        self.jobs.save(job)
        if job.unit >= 0:
            self.on_unit_wrong(deal)
        elif job.deal == deal.id:
            self.jobs.reoffer(job, "the work was wrong; its solver had claimed its pay already")

    def _continue_job(self, deal: Deal) -> None:
        """After a deal's work is known to be right (or none): go on from its end, or finish."""
        job, task = self.jobs.jobs[deal.job], task_of(deal.task)
        if job.unit >= 0:
            self.on_unit_right(deal)
            return
        if job.deal != deal.id or not job.open:
            return
        useful = deal.receipts if deal.useful < 0 else deal.useful
        job.segment = agreement_of(deal, self.desk.network.id).first_segment + useful
        if deal.correction == "given-up":
            self._rest(job, self.solver_of(deal))
        if useful:
            job.fruitless = -1  # the re-offer below counts itself
        job.base_root, job.base_blob = deal.last_root, deal.last_blob
        if job.segment >= task.segments:
            self.jobs.end(job, JobState.DONE, "")
        else:
            job.retried += 1
            self.jobs.reoffer(job, deal.note or "the deal ended early")

    # --- time ----------------------------------------------------------------------------------------------
    def tick(self) -> None:
        """Everything about a deal that is overdue."""
        for deal in list(self.deals.values()):
            if deal.state not in TERMINAL:  # not `lifecycle`: thousands of finished deals are passed over
                self.desk.attempt(self._tick_deal, deal)

    def _tick_deal(self, deal: Deal) -> None:
        now, rules = self.desk.now_ns, self.desk.network.rules
        agreement = agreement_of(deal, self.desk.network.id)
        gone, grace_ns = agreement.solver not in self.desk.peers, rules.lost_grace_ms * 10**6
        match deal.lifecycle:
            case State.PROPOSED if not deal.doubt:
                if self.jobs.late(self.jobs.jobs[deal.job]):
                    self._withdraw(deal, "the deadline of the job passed")
                elif now - deal.entered_ns >= rules.proposal_ms * 10**6:  # when it says, unless the clock jumped
                    self._withdraw(deal, "the solver did not answer in time")
                elif now >= self.proposals.get(deal.id, 0):
                    self._send_proposal(deal)
            case State.RUNNING:
                if self.jobs.late(self.jobs.jobs[deal.job]):
                    self.lose(deal, "the deadline of the job passed")
                elif now - deal.news_ns > agreement.segment_deadline_ns:
                    self.lose(deal, f"no receipt for {(now - deal.news_ns) // 10**9} s")
                elif gone and now - max(deal.news_ns, self.desk.left_ns(agreement.solver)) > grace_ns:
                    self.lose(deal, "the connection to the solver is gone")
            case State.PROVED:
                self.drawing.tick(deal)
            case State.CHECKING | State.SETTLING:
                self.checks.tick(deal, agreement, self.receipts[deal.id])
            case _:
                pass

    # --- rows ----------------------------------------------------------------------------------------------
    def restore(self, rows: Rows) -> None:
        """Rebuild the deals from the store."""
        self.receipts.restore(rows)
        for key, value in rows("deals"):
            deal = msgspec.msgpack.decode(value, type=Deal)
            if deal.side == "submitter":
                deal.news_ns = max(deal.news_ns, self.desk.now_ns)  # we were away, not the solver
                self.deals[key] = deal
                if deal.lifecycle not in TERMINAL:
                    self.receipts.load(key)

    def solver_of(self, deal: Deal) -> bytes:
        """The solver's key."""
        return agreement_of(deal, self.desk.network.id).solver
