"""Proposals that wait for this peer's signature: gathered for about a round, then the best are signed.

Sans-IO. Nothing of it is journalled: whoever has no answer proposes again, and a restart gathers anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from market.acceptance import Proposal, choose
from market.matching import Refusal
from peer import messages as m
from peer.bidding import Bidder
from peer.deals import Deal
from peer.desk import Desk
from protocol import params
from protocol.lifecycle import State
from protocol.records import Agreement, add_signature, amount_for
from protocol.script import AnyTask, read_task

__all__ = ["Acceptance"]

_WINDOW_SHARE: Final = 4  # of the time that a proposal may wait for its answer: the way back needs some too


@dataclass(frozen=True)
class _Waiting:
    """A proposal that could be signed, and from whom it came."""

    peer: bytes
    message: m.Propose
    agreement: Agreement
    task: AnyTask | None


@dataclass
class Acceptance:
    """See the module docstring. `take(deal)` has each deal that this peer signed."""

    desk: Desk
    bidder: Bidder
    slots_free: Callable[[], int]
    take: Callable[[Deal], None]
    waiting: dict[bytes, _Waiting] = field(default_factory=dict)  # by the id of the agreement
    closes_ns: int = 0

    def receive(self, peer: bytes, message: m.Propose, agreement: Agreement, agreement_id: bytes) -> None:
        """A proposal that came from its submitter: decline it, keep it till the window closes, or sign it at once where
        nobody else can come. Raises as `read_task`."""
        if agreement_id in self.waiting:
            return
        task = read_task(message.task, network=self.desk.network.id) if message.task else None
        refusal = self._refuse(agreement, task, message)
        if refusal is not None:
            self.desk.send(peer, m.Decline(agreement_id, refusal.code, refusal.why))
            return
        if not self.waiting:
            rules = self.desk.network.rules
            self.closes_ns = self.desk.now_ns + min(rules.round_ms, rules.proposal_ms // _WINDOW_SHARE) * 10**6
        self.waiting[agreement_id] = _Waiting(peer, message, agreement, task)
        if not self.bidder.awaited() - {one.agreement.offer for one in self.waiting.values()}:
            self._close()

    def _refuse(self, agreement: Agreement, task: AnyTask | None, message: m.Propose) -> Refusal | None:
        if any(one.agreement.bid == agreement.bid for one in self.waiting.values()):
            return Refusal("terms", "another proposal on this bid waits for its answer")
        if len(self.waiting) >= params.PROPOSALS_WAITING_MAX:
            return Refusal("busy", "as many proposals wait here as this peer keeps")
        theirs = sum(1 for one in self.waiting.values() if one.agreement.submitter == agreement.submitter)
        if theirs >= params.PROPOSALS_PER_SUBMITTER_MAX:
            return Refusal("busy", f"{theirs} proposals of this submitter wait here: as many as of any one")
        return self.bidder.refuse_proposal(agreement, task, message.profiles)

    def withdraw(self, agreement_id: bytes, peer: bytes) -> None:
        """Its submitter does not want it any more."""
        if agreement_id in self.waiting and self.waiting[agreement_id].peer == peer:
            del self.waiting[agreement_id]

    def tick(self) -> None:
        """Close the window when it is time."""
        if self.waiting and self.desk.now_ns >= self.closes_ns:
            self._close()

    def _close(self) -> None:
        """Sign the best, decline the rest. What was acceptable when it came may not be so by now."""
        held, self.waiting = self.waiting, {}
        proposals = []
        for agreement_id, one in held.items():
            refusal = self.bidder.refuse_proposal(one.agreement, one.task, one.message.profiles)
            if refusal is None:
                proposals.append(self._proposal(agreement_id, one.agreement))
            else:
                self.desk.send(one.peer, m.Decline(agreement_id, refusal.code, refusal.why))
        signed, passed = choose(proposals, slots=self.slots_free())
        for proposal in signed:
            one = held[proposal.id]
            refusal = self.bidder.refuse_proposal(one.agreement, one.task, one.message.profiles)
            if refusal is not None:  # what was signed just now took the stake that this one needs
                self.desk.send(one.peer, m.Decline(proposal.id, refusal.code, refusal.why))
                continue
            self._sign(proposal.id, one)
        if passed and self.slots_free() > 0:  # the slot of one that was refused so: the next may fit
            self.waiting = {other.id: held[other.id] for other, _ in passed}
            self._close()
            return
        for proposal, refusal in passed:
            self.desk.send(held[proposal.id].peer, m.Decline(proposal.id, refusal.code, refusal.why))
        if passed:
            self.desk.emit("passed-over", signed=[one.id for one in signed], declined=len(passed), why=passed[0][1].why)

    def _sign(self, agreement_id: bytes, one: _Waiting) -> None:
        seed, secret, _ = self.bidder.seeds.pop(one.agreement.bid)
        now, agreement, message = self.desk.now_ns, one.agreement, one.message
        self.bidder.sold()
        self.take(
            Deal(
                id=agreement_id,
                side="solver",
                state=State.PROPOSED,
                agreement=add_signature(message.agreement, self.desk.key, network=self.desk.network.id),
                task=message.task,
                base_blob=message.base_blob,
                profiles=list(message.profiles),
                seed=seed,
                secret=secret,
                created_ns=now,
                base_root=agreement.base_root,
                last_root=agreement.base_root,
                last_blob=message.base_blob,
                news_ns=now,
                entered_ns=now,
            )
        )

    def _proposal(self, agreement_id: bytes, agreement: Agreement) -> Proposal:
        offer, bid = self.desk.book.offers[agreement.offer], self.bidder.seeds[agreement.bid][2]
        return Proposal(
            id=agreement_id,
            worth_micro=self.bidder.pricer.backed_micro(offer),
            price_micro=amount_for(agreement.operations, agreement.unit_price),
            takes_ns=bid.eta_ns,
            limit=offer.unit_price_max,
            unit_price=agreement.unit_price,
        )
