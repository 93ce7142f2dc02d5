"""The solver's side: bid, agree, run, hand in receipts, prove, settle, and claim alone if nobody answers.

Sans-IO, like peer/submitter.py; its work runs in the sandbox behind StartWork. The next segment never waits for the
voucher of the last one, so a round trip costs no training time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from peer import messages as m
from peer.acceptance import Acceptance
from peer.bidding import Bidder
from peer.deals import Deal, agreement_of, make_claim, make_proof, make_receipt, move, proof_root, save, task_of
from peer.desk import Desk
from peer.events import (
    Fetch,
    Fetched,
    ProfileMade,
    Release,
    ScriptSaid,
    SegmentMade,
    StartWork,
    StepMade,
    StopWork,
    WorkEnded,
)
from peer.forcing import Forcing
from peer.news import news_of
from peer.profiles import gauges_of, handed_in, profile_end
from peer.receipt_rows import ReceiptRows, Rows
from peer.settler import Settler
from peer.units import Units
from protocol import params
from protocol.errors import VerificationFailed
from protocol.lifecycle import TERMINAL, Event, State
from protocol.records import Agreement, Proof, Receipt, Reveal, Settlement, Voucher, add_signature, open_record
from protocol.sampling import check_reveal
from protocol.script import ScriptSpec, blobs_of

__all__ = ["Solver"]

ACTIVE = frozenset((State.PROPOSED, State.AGREED, State.RUNNING))


@dataclass
class Solver:
    """The solver's deals. `bidder` is its voice in the market."""

    desk: Desk
    settler: Settler
    bidder: Bidder
    forcing: Forcing
    units: Units
    watch: Callable[[Deal], None]  # a deal that both signed, until its channel is open or never will be
    deals: dict[bytes, Deal] = field(default_factory=dict)
    receipts: ReceiptRows = field(init=False)  # co-signed
    made: ReceiptRows = field(init=False)  # every receipt signed here, co-signed or not
    missing: dict[bytes, set[bytes]] = field(default_factory=dict)  # deal -> blobs still fetched
    working: set[bytes] = field(default_factory=set)
    waiting: set[bytes] = field(default_factory=set)  # for the end of a pause
    told_ns: dict[bytes, int] = field(default_factory=dict)  # deal -> when its submitter last had news from here
    resend: dict[bytes, int] = field(default_factory=dict)
    step_times: dict[bytes, int] = field(default_factory=dict)
    unlock: Callable[[Deal, m.Opened], None] = lambda _a, _b: None  # take the contents of a sealed job
    _unended: dict[bytes, Deal] = field(default_factory=dict)  # of the first `_known` deals
    _known: int = 0

    def __post_init__(self) -> None:
        self.receipts = ReceiptRows("receipts", lambda deal: self.deals[deal].receipts)
        self.made = ReceiptRows("made", lambda deal: self.deals[deal].made)
        self.acceptance = Acceptance(self.desk, self.bidder, self.slots_free, self.take)

    def slots_free(self) -> int:
        """Slots without an active deal."""
        return self.desk.means.slots - sum(1 for d in self._standing() if d.state in ACTIVE)

    def promised_micro(self) -> int:
        """What proposals that were signed here may still lock of the stake, beside those that notaries certify."""
        signed = (d for d in self._standing() if d.state == State.PROPOSED and not d.doubt)
        return sum(agreement_of(deal, self.desk.network.id).lock_micro for deal in signed)

    def _standing(self) -> list[Deal]:
        """The deals that have not ended, which each look at an offer counts: those that have stay in `deals`."""
        if self._known != len(self.deals):  # new ones stand behind the others
            self._unended.update(islice(self.deals.items(), self._known, None))
            self._known = len(self.deals)
        for ended in [key for key, deal in self._unended.items() if deal.state in TERMINAL]:
            del self._unended[ended]
        return list(self._unended.values())

    # --- agreeing ------------------------------------------------------------------------------------------
    def on_propose(self, peer: bytes, message: m.Propose) -> None:
        """A signed proposal on one of our bids: it is weighed against the others that come with it."""
        record, agreement_id, signers = open_record(message.agreement, network=self.desk.network.id)
        if not isinstance(record, Agreement) or record.submitter != peer or signers != {peer}:
            raise VerificationFailed("a proposal comes from its submitter, with its signature alone")
        if record.solver != self.desk.me:
            raise VerificationFailed("a proposal to another solver")
        known = self.deals.get(agreement_id)
        if known is not None:
            if known.lifecycle == State.PROPOSED:
                self.desk.send(peer, m.Accept(known.agreement))
            return
        self.acceptance.receive(peer, message, record, agreement_id)

    def take(self, deal: Deal) -> None:
        """Acceptance: this proposal is signed and takes a slot."""
        self.deals[deal.id], self.receipts[deal.id], self.made[deal.id] = deal, [], []
        self.watch(deal)
        save(self.desk, deal)
        self.resend[deal.id] = self.desk.now_ns + params.RESEND_NS
        self.desk.send(self._submitter(deal), m.Accept(deal.agreement))

    def on_decline(self, peer: bytes, message: m.Decline) -> None:
        """The submitter withdrew: the slot is free again."""
        deal = self.deals.get(message.agreement)
        self.acceptance.withdraw(message.agreement, peer)
        if deal is not None and peer == self._submitter(deal) and deal.lifecycle == State.PROPOSED:
            move(self.desk, deal, Event.REFUSED)

    def on_opened(self, peer: bytes, message: m.Opened) -> None:
        """The channel is funded: the log takes the agreement, and `opened` starts the work."""
        record, agreement_id, _ = open_record(message.agreement, network=self.desk.network.id)
        if agreement_id not in self.deals or not isinstance(record, Agreement):
            raise VerificationFailed("an opening this peer did not agree to")
        self.unlock(self.deals[agreement_id], message)
        if agreement_id not in self.settler.every:
            self.settler.accept(message.agreement)
        else:
            self.opened(agreement_id)

    def opened(self, agreement_id: bytes) -> None:
        """Settler: a channel is funded. If it is ours, fetch what the work needs."""
        deal = self.deals.get(agreement_id)
        if deal is not None and deal.lifecycle == State.DECLINED:
            self._publish_claim(deal)  # opened after we had given it up: get the stake back
        if deal is None or deal.lifecycle != State.PROPOSED or not deal.task:
            return  # of a sealed job the task comes with Opened
        deal.agreement = self.settler.log.get(deal.id, deal.agreement)  # with all the signatures that it took
        move(self.desk, deal, Event.ACCEPTED)
        move(self.desk, deal, Event.STARTED)
        self.desk.emit("started", deal=deal.id, submitter=self._submitter(deal))
        self.forcing.begin(deal)
        self._gather(deal)

    # --- working -------------------------------------------------------------------------------------------
    def _gather(self, deal: Deal) -> None:
        """Fetch program, data and base; `on_fetched` starts the worker when all are here."""
        task, sender = task_of(deal.task), (self._submitter(deal),)
        wanted = blobs_of(task)
        base = deal.last_blob if deal.made else deal.base_blob
        if base:
            wanted[base] = params.BLOB_BYTES_MAX
        self.missing[deal.id] = set(wanted)
        self.waiting.discard(deal.id)
        for blob, size in wanted.items():
            self.desk.add(Fetch(blob, deal.id, sender, size))
        if not wanted:
            self.start(deal)

    def on_fetched(self, event: Fetched) -> None:
        """One of a deal's blobs is here."""
        deal = self.deals.get(event.token)
        if deal is None or event.token not in self.missing or deal.lifecycle != State.RUNNING:
            return
        if event.error:
            self.give_up(deal, "data", f"a blob of the task cannot be had: {event.error}")
            return
        self.missing[deal.id].discard(event.blob)
        if not self.missing[deal.id]:
            del self.missing[deal.id]
            self.start(deal)

    def start(self, deal: Deal) -> None:
        """Start the worker of a deal whose blobs are here, or note that it waits for the end of a pause."""
        agreement, task = agreement_of(deal, self.desk.network.id), task_of(deal.task)
        first = agreement.first_segment + deal.made
        waits = self.forcing.waits(deal) or self.units.waits(deal)
        if first >= agreement.last_segment or waits or deal.id in self.working:
            return
        if self.desk.paused_ns:
            self.waiting.add(deal.id)
            return
        self.working.add(deal.id)
        self.step_times[deal.id] = self.desk.now_ns
        self.desk.add(
            StartWork(
                work=deal.id, task=task, base=deal.last_blob if deal.made else deal.base_blob, first_segment=first,
                last_segment=agreement.last_segment, checkpoint_bytes=params.BLOB_BYTES_MAX,
                memory_bytes=self.desk.means.memory_bytes, cheat=self.desk.means.cheat,
                ordered=self.forcing.order_of(deal), gauges=gauges_of(deal, agreement), run=self.units.order(deal.id),
            )
        )  # fmt: skip

    def on_news(self, event: StepMade | ScriptSaid) -> None:
        """A step done, or what a script printed and that it still runs: for the submitter's screen."""
        deal = self.deals.get(event.work)
        if deal is not None and deal.lifecycle == State.RUNNING:
            self.told_ns[deal.id] = self.desk.now_ns
            self.desk.send(self._submitter(deal), news_of(deal.id, event))

    def on_profile(self, event: ProfileMade) -> None:
        """A profile is done: sign it, and hand it in as the one segment of its deal."""
        deal = self.deals.get(event.work)
        if deal is not None and deal.lifecycle == State.RUNNING and not deal.ended_early and not deal.made:
            self.on_segment(profile_end(self.desk, deal, event))

    def on_segment(self, event: SegmentMade) -> None:
        """A segment is done: sign its receipt and offer it."""
        deal = self.deals.get(event.work)
        if deal is None or deal.lifecycle != State.RUNNING or deal.ended_early:
            return
        agreement, task = agreement_of(deal, self.desk.network.id), task_of(deal.task)
        if event.segment != agreement.first_segment + deal.made:
            return
        previous_root = self._made_root(deal)
        if not deal.made and event.in_root != previous_root:
            self.give_up(deal, "base", "the task's initial state has another root than the agreement says")
            return
        operations = task.operations_per_step * len(task.steps_of(event.segment))
        if isinstance(task, ScriptSpec):
            operations = event.operations
        elif deal.id in self.step_times and task.mode != "profile":  # not of what a pause cut: its time says nothing
            self.bidder.measured(operations, self.desk.now_ns - self.step_times[deal.id])
        self.step_times[deal.id] = self.desk.now_ns
        end = self.forcing.end_of(deal, event)  # the work itself goes on from its true end
        envelope = make_receipt(
            self.desk, deal, end, in_root=previous_root, operations=operations, earlier=self.made[deal.id]
        )
        self.made.add(self.desk, deal.id, envelope)
        if deal.receipts == deal.made:
            deal.news_ns = self.desk.now_ns  # an answer is due from now on, however long the segment took
        deal.made += 1
        deal.last_blob = event.checkpoint
        save(self.desk, deal)
        if event.ends is not None:
            self.units.ended(deal.id, event.segment, event.ends)
        self.offer(deal)

    def _made_root(self, deal: Deal) -> bytes:
        if not deal.made:
            return deal.base_root or agreement_of(deal, self.desk.network.id).base_root
        record, _, _ = open_record(self.made[deal.id][-1], network=self.desk.network.id)
        assert isinstance(record, Receipt)
        return record.out_root

    def _offer_receipt(self, deal: Deal) -> None:
        """(Again) offer the oldest receipt that is not co-signed."""
        self.resend[deal.id] = self.desk.now_ns + params.RESEND_NS
        if deal.receipts < deal.made and not self.forcing.holds(deal, deal.receipts):
            segment = agreement_of(deal, self.desk.network.id).first_segment + deal.receipts
            handovers = self.units.handovers(deal.id, segment)
            if handovers is not None:
                self.told_ns[deal.id], receipt = self.desk.now_ns, self.made[deal.id][deal.receipts]
                self.desk.send(self._submitter(deal), m.ReceiptOffer(receipt, handed_in(deal), handovers))

    def on_work_ended(self, event: WorkEnded) -> None:
        """The worker is gone: all done, or start it again from the last checkpoint a bounded number of times."""
        self.working.discard(event.work)
        deal = self.deals.get(event.work)
        if deal is None or deal.lifecycle != State.RUNNING or not event.error:
            return
        first = agreement_of(deal, self.desk.network.id).first_segment
        if self.units.complains(event.work, event.blames, first + deal.made):
            return  # what is done about it is its submitter's to say
        deal.failures += 1
        self.desk.emit("problem", deal=deal.id, what=f"the worker failed: {event.error}")
        if event.error.startswith("diverged"):
            self.give_up(deal, "diverged", event.error[:300])  # trying again would diverge again
        elif deal.failures >= params.WORK_FAILURES_MAX:
            self.give_up(deal, "work-failed", event.error[:300])
        else:
            save(self.desk, deal)
            self._gather(deal)

    def give_up(self, deal: Deal, code: str, why: str) -> None:
        """End a deal from this side: it goes no further, and its submitter hears why."""
        deal.ended_early, deal.note = True, why
        save(self.desk, deal)
        self.desk.add(StopWork(deal.id))
        self.desk.emit("gave-up", deal=deal.id, code=code, why=why)
        self.desk.send(self._submitter(deal), m.Decline(deal.id, code, why))

    # --- payment and proof ---------------------------------------------------------------------------------
    def on_receipt_back(self, peer: bytes, message: m.ReceiptBack) -> None:
        """A receipt with both signatures and the voucher that pays for everything so far."""
        record, receipt_id, signers = open_record(message.receipt, network=self.desk.network.id)
        voucher, _, _ = open_record(message.voucher, network=self.desk.network.id)
        if not isinstance(record, Receipt) or not isinstance(voucher, Voucher):
            raise VerificationFailed("a receipt comes back with a voucher")
        deal = self.deals.get(record.agreement)
        if deal is None or peer != self._submitter(deal) or signers != {peer, self.desk.me}:
            raise VerificationFailed("receipt of another deal, or without both signatures")
        if record.sequence != deal.receipts:
            return
        due = deal.cumulative_micro + record.amount_micro
        most = agreement_of(deal, self.desk.network.id).promise_micro
        if voucher.agreement != deal.id or voucher.submitter != peer or not due <= voucher.cumulative_micro <= most:
            raise VerificationFailed(f"voucher of {voucher.cumulative_micro} micro-credits, {due} are due")
        deal.cumulative_micro, deal.voucher = due, message.voucher
        deal.cumulative_operations += record.operations
        self.receipts.add(self.desk, deal.id, message.receipt)
        deal.receipts += 1
        deal.last_receipt, deal.last_root = receipt_id, record.out_root
        deal.news_ns = self.desk.now_ns
        save(self.desk, deal)
        self.desk.emit("earned", deal=deal.id, segment=record.segment, cumulative_micro=due)
        self.units.settled(deal.id, deal.task, record.segment)
        self._offer_receipt(deal)
        agreement = agreement_of(deal, self.desk.network.id)
        if deal.receipts == agreement.last_segment - agreement.first_segment and deal.lifecycle == State.RUNNING:
            self._prove(deal)

    def _prove(self, deal: Deal) -> None:
        deal.proof, deal.proof_id = make_proof(self.desk, deal, self.receipts[deal.id])
        move(self.desk, deal, Event.PROOF_COMMITTED)
        self._send_proof(deal)

    def _send_proof(self, deal: Deal) -> None:
        self.resend[deal.id] = self.desk.now_ns + params.RESEND_NS
        self.desk.send(self._submitter(deal), m.ProofOffer(deal.proof))

    def on_proof(self, peer: bytes, message: m.ProofOffer) -> None:
        """The submitter ended the deal early and proved it over the receipts both signed."""
        record, proof_id, _ = open_record(message.proof, network=self.desk.network.id)
        if not isinstance(record, Proof) or record.author != peer:
            raise VerificationFailed("a proof comes from its author")
        deal = self.deals.get(record.agreement)
        if deal is None or peer != self._submitter(deal) or deal.lifecycle != State.RUNNING:
            return
        if record.receipts < deal.receipts or not record.receipts:
            raise VerificationFailed("the submitter proves fewer receipts than it co-signed")
        if record.receipts > deal.receipts:
            return  # the last ReceiptBack was lost; it is repeated before the reveal counts
        if record.root != proof_root(self.receipts[deal.id], self.desk.network.id):
            raise VerificationFailed("the proof is not over the roots of its receipts")
        self.desk.add(StopWork(deal.id))
        deal.ended_early = True
        deal.proof, deal.proof_id = message.proof, proof_id
        move(self.desk, deal, Event.SOLVER_LOST)

    def on_reveal(self, peer: bytes, message: m.RevealOffer) -> None:
        """The submitter's seed, after the proof: reveal ours."""
        record, _, _ = open_record(message.reveal, network=self.desk.network.id)
        if not isinstance(record, Reveal) or record.author != peer:
            raise VerificationFailed("a reveal comes from its author")
        deal = self.deals.get(record.agreement)
        if deal is None or peer != self._submitter(deal) or not deal.proof_id or record.proof != deal.proof_id:
            return
        committed = agreement_of(deal, self.desk.network.id).submitter_commitment
        check_reveal(record.seed, committed, agreement_salt=peer)
        deal.news_ns = self.desk.now_ns
        if not deal.own_reveal:
            own = Reveal(
                network=self.desk.network.id,
                agreement=deal.id,
                proof=deal.proof_id,
                author=self.desk.me,
                seed=deal.seed,
            )
            deal.own_reveal, deal.other_reveal = self.desk.seal(own), message.reveal
            deal.other_seed = record.seed
            move(self.desk, deal, Event.SEEDS_KNOWN)
        self.desk.send(peer, m.RevealOffer(deal.own_reveal))

    def on_settle(self, peer: bytes, message: m.SettleOffer) -> None:
        """The submitter's settlement: sign it if it pays what the vouchers promise."""
        record, _, signers = open_record(message.settlement, network=self.desk.network.id)
        if not isinstance(record, Settlement) or signers != {peer}:
            raise VerificationFailed("a settlement comes from its submitter, with its signature alone")
        deal = self.deals.get(record.agreement)
        if deal is None or peer != self._submitter(deal):
            raise VerificationFailed("settlement of a deal this peer does not have")
        if deal.settlement and deal.lifecycle in TERMINAL:
            self.desk.send(peer, m.SettleBack(deal.settlement))
            return
        if record.paid_micro < deal.cumulative_micro:
            raise VerificationFailed(
                f"settlement pays {record.paid_micro}, the vouchers promise {deal.cumulative_micro} micro-credits"
            )
        if deal.lifecycle in TERMINAL or record.agreement not in self.settler.every:
            return
        both = add_signature(message.settlement, self.desk.key, network=self.desk.network.id)
        deal.settlement = both
        self.settler.accept(both, publish=True)
        save(self.desk, deal)
        self.desk.send(peer, m.SettleBack(both))

    def closed(self, agreement_id: bytes, how: str) -> None:
        """Settler: a channel closed. If it is ours, finish the deal and free the slot."""
        deal = self.deals.get(agreement_id)
        if deal is None or deal.lifecycle in TERMINAL:
            return
        self.desk.add(StopWork(deal.id))
        self.desk.add(Release(deal.id))
        self.units.drop(deal.id)
        channel = self.settler.every[agreement_id]
        # The log is the truth: whatever this side had heard so far, the deal ends as the channel did.
        deal.state = {"settled": State.SETTLED, "slashed": State.SLASHED, "claimed": State.CLAIMED}[how]
        deal.entered_ns = self.desk.now_ns
        save(self.desk, deal)
        self.desk.emit(how, deal=deal.id, paid_micro=channel.paid_micro)

    def on_cancel(self, peer: bytes, message: m.Cancel) -> None:
        """The submitter stops the deal: stop working; what is receipted is proved, checked and paid."""
        deal = self.deals.get(message.agreement)
        if deal is not None and peer == self._submitter(deal) and deal.lifecycle == State.RUNNING:
            deal.ended_early = True
            save(self.desk, deal)
            self.desk.add(StopWork(deal.id))

    # --- time ----------------------------------------------------------------------------------------------
    def tick(self) -> None:
        """Repeat what is unanswered, free what was never opened, claim what is never settled."""
        self.acceptance.tick()
        for deal in self._standing():
            self.desk.attempt(self._tick_deal, deal)

    def _tick_deal(self, deal: Deal) -> None:
        now, rules = self.desk.now_ns, self.desk.network.rules
        again = now >= self.resend.get(deal.id, 0)
        match deal.lifecycle:
            case State.PROPOSED:
                if now - deal.entered_ns >= 3 * rules.proposal_ms * 10**6:
                    move(self.desk, deal, Event.REFUSED)
                    if deal.id in self.settler.every:
                        self.opened(deal.id)
                elif again:
                    self.resend[deal.id] = now + params.RESEND_NS
                    self.desk.send(self._submitter(deal), m.Accept(deal.agreement))
            case State.RUNNING if deal.receipts < deal.made or deal.ended_early:
                if now - deal.news_ns > rules.check_silence_ms * 10**6:
                    self._claim(deal)
                elif again:
                    self._offer_receipt(deal)
            case State.PROVED:
                if now - deal.news_ns > rules.check_silence_ms * 10**6:
                    self._claim(deal)
                elif again and not deal.ended_early:
                    self._send_proof(deal)
            case State.CHECKING | State.SETTLING:
                if now - deal.entered_ns > 3 * rules.check_silence_ms * 10**6:
                    self._claim(deal)
            case _:
                pass

    def _claim(self, deal: Deal) -> None:
        """Nobody answers: publish the last voucher; after the window it is paid and the stake is free."""
        move(self.desk, deal, Event.PARTNER_SILENT)
        self._publish_claim(deal)

    def _publish_claim(self, deal: Deal) -> None:
        self.settler.accept(make_claim(self.desk, deal), publish=True)
        self.desk.emit("claim", deal=deal.id, why="the submitter does not answer")

    # --- rows ----------------------------------------------------------------------------------------------
    def restore(self, rows: Rows) -> None:
        """Rebuild the deals and go on with the work that was running."""
        self.receipts.restore(rows)
        self.made.restore(rows)
        for key, value in rows("deals"):
            deal = msgspec.msgpack.decode(value, type=Deal)
            if deal.side == "solver":
                deal.news_ns = max(deal.news_ns, self.desk.now_ns)
                self.deals[key] = deal
                if deal.lifecycle not in TERMINAL:
                    self.receipts.load(key)
                    self.made.load(key)
        for deal in self.deals.values():
            if deal.lifecycle not in TERMINAL:
                self.forcing.begin(deal)
            if deal.lifecycle == State.RUNNING and not deal.ended_early:
                self._gather(deal)

    def go(self, deal: Deal) -> None:
        """Forcing: the deal need not wait for randomness any more."""
        if deal.lifecycle == State.RUNNING and not deal.ended_early and deal.id not in self.missing:
            self.start(deal)

    def offer(self, deal: Deal) -> None:
        """Offer the next receipt, if any: the notaries know what is wrong with it, or the neighbours signed."""
        if deal.lifecycle == State.RUNNING:
            self._offer_receipt(deal)

    def _submitter(self, deal: Deal) -> bytes:
        return agreement_of(deal, self.desk.network.id).submitter
