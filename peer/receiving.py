"""A submitter's receipts as they come in: the chain checked, the checkpoint fetched, co-signed and paid.

Of a unit of a parallel job its tape is fetched too, and it is signed together with those of the other units: see
peer/runs.py. Sans-IO.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from peer.cosigning import cosign
from peer.deals import Deal, agreement_of, check_receipt, checkpoint_program, receipt_key, save, task_of
from peer.desk import Desk
from peer.drawing import Drawing
from peer.events import Fetch, Fetched
from peer.jobs import JobDesk
from peer.messages import ReceiptBack, ReceiptOffer
from peer.profiles import open_answer
from peer.receipt_rows import ReceiptRows
from peer.run_events import LinkEnds
from peer.run_messages import Held
from peer.units import stage_of
from protocol import params
from protocol.errors import VerificationFailed
from protocol.lifecycle import State
from protocol.profile_task import ProfileSpec
from protocol.records import Receipt, open_record

__all__ = ["Receiving"]


@dataclass
class Awaited:
    """A receipt whose checkpoint, or tape, is on its way. ends: of a unit, once its checkpoint is here."""

    blob: bytes
    message: ReceiptOffer
    record: Receipt
    ends: LinkEnds | None = None


@dataclass
class Receiving:
    """See the module docstring. `lost(deal, why)` ends a deal whose solver lied. `deliver(deal, message, record, ends)`
    has each unit's receipt whose checkpoint and tape are here; `held(deal)`: it waits there for the others."""

    desk: Desk
    jobs: JobDesk
    drawing: Drawing
    deals: dict[bytes, Deal]
    receipts: ReceiptRows
    lost: Callable[[Deal, str], None]
    deliver: Callable[[Deal, ReceiptOffer, Receipt, LinkEnds], None] = lambda *_: None
    held: Callable[[Deal], bool] = lambda _: False
    waiting: dict[bytes, Awaited] = field(default_factory=dict)  # by deal

    def on_receipt(self, peer: bytes, message: ReceiptOffer) -> None:
        """A segment done: check the chain, fetch its checkpoint, then co-sign and pay."""
        record, _, signers = open_record(message.receipt, network=self.desk.network.id)
        if not isinstance(record, Receipt) or signers != {peer}:
            raise VerificationFailed("a receipt comes from its solver, with its signature alone")
        deal = self.deals.get(record.agreement)
        if deal is None or peer != self._solver(deal):
            raise VerificationFailed("receipt on an agreement this peer does not have")
        if record.sequence < deal.receipts:
            self.send_back(deal, record.sequence)
            return
        if deal.lifecycle != State.RUNNING or deal.ended_early:
            self.drawing.send_proof(deal)
            return
        if record.sequence > deal.receipts:
            return
        if self.held(deal):
            self.desk.send(peer, Held(deal.id, record.sequence))
            return
        if deal.id in self.waiting:
            return  # what is on its way is held against the root of that receipt: no other may take its place
        check_receipt(deal, record, self.desk.network.id, self.desk.now_ns)
        deal.news_ns, task = self.desk.now_ns, task_of(deal.task)
        if isinstance(task, ProfileSpec):
            open_answer(message.profile, record, task, verifier=peer, network=self.desk.network.id)
            deal.profiles = [message.profile]
            self.pay(deal, message.receipt)
            return
        job = self.jobs.jobs[deal.job]
        if job.known and record.out_root != job.known:
            job.culprits.append(peer)
            self.lost(deal, "the work ends at another root than this peer's own run of it")
            return
        if job.known:  # its checkpoint says nothing new
            self.pay(deal, message.receipt)
            return
        self.waiting[deal.id] = Awaited(record.checkpoint, message, record)
        self.desk.add(
            Fetch(
                record.checkpoint,
                deal.id,
                (peer,),
                job.checkpoint_bytes,
                state_root=record.out_root,
                program=checkpoint_program(task),
                links=job.unit >= 0,
            )
        )

    def on_fetched(self, event: Fetched) -> None:
        """The checkpoint of the awaited receipt is here (or is not what it claims to be); then, of a unit, its tape."""
        deal = self.deals.get(event.token)
        if deal is None or deal.id not in self.waiting or self.waiting[deal.id].blob != event.blob:
            return
        awaited = self.waiting.pop(deal.id)
        if deal.lifecycle != State.RUNNING or deal.ended_early:
            return
        if event.error:
            what = "tape" if awaited.ends is not None else "checkpoint"
            self.desk.emit("problem", deal.job, what=f"{what} not accepted: {event.error}")
            if event.forged:
                self.desk.penalise(self._solver(deal), "checkpoint does not have the root its receipt claims")
                self.lost(deal, "a checkpoint does not match its receipt")
            return
        stage = stage_of(deal.task)
        if stage is None:
            self.pay(deal, awaited.message.receipt)
        elif awaited.ends is not None:
            self.deliver(deal, awaited.message, awaited.record, awaited.ends)
        elif event.ends is None or not event.ends.fits(stage):
            self.lost(deal, "a unit's checkpoint does not say what went over its links")
        else:
            awaited.blob, awaited.ends = event.ends.tape, event.ends
            self.waiting[deal.id] = awaited
            self.desk.add(Fetch(event.ends.tape, deal.id, (self._solver(deal),), params.UNIT_TAPE_BYTES_MAX))

    def pay(self, deal: Deal, envelope: bytes) -> None:
        """Co-sign a receipt that was checked, with the voucher for all so far."""
        record, receipt_id, _ = open_record(envelope, network=self.desk.network.id)
        assert isinstance(record, Receipt)
        agreement = agreement_of(deal, self.desk.network.id)
        deal.cumulative_micro += record.amount_micro
        deal.cumulative_operations += record.operations
        assert deal.cumulative_micro <= agreement.promise_micro
        both, deal.voucher = cosign(
            envelope, record, receipt_id, self.desk.key,
            cumulative_micro=deal.cumulative_micro, operations=deal.cumulative_operations,
        )  # fmt: skip
        self.receipts.add(self.desk, deal.id, both)
        deal.receipts += 1
        deal.last_receipt, deal.last_root, deal.last_blob = receipt_id, record.out_root, record.checkpoint
        deal.news_ns = self.desk.now_ns
        self.desk.save("vouchers", receipt_key(deal.id, record.sequence), deal.voucher)
        save(self.desk, deal)
        self.send_back(deal, record.sequence, voucher=deal.voucher)
        self.desk.emit(
            "paid",
            deal.job,
            deal=deal.id,
            segment=record.segment,
            amount_micro=record.amount_micro,
            cumulative_micro=deal.cumulative_micro,
            out_root=record.out_root,
        )

    def send_back(self, deal: Deal, sequence: int, *, voucher: bytes = b"") -> None:
        """A receipt with both signatures, and the newest voucher, which pays for every earlier one too: cumulative."""
        receipt = self.receipts[deal.id][sequence]
        self.desk.send(self._solver(deal), ReceiptBack(receipt, voucher or deal.voucher))

    def _solver(self, deal: Deal) -> bytes:
        return agreement_of(deal, self.desk.network.id).solver
