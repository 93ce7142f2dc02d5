"""A whistleblower that nobody asked: it hears right verdicts, and re-checks those that promise more than they cost.

Enters while the expected payout at the current number of whistleblowers exceeds the cost, and leaves otherwise (DESIGN
8). It hears a right Verdict in gossip, asks a party of the deal for the case, re-executes one segment that it draws,
and challenges what it finds wrong. What it finds right is nobody's business and nobody's cost but its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from market.entries import POOL
from peer.case import open_evidence
from peer.checker import Checker
from peer.deals import Deal
from peer.desk import Desk
from peer.disputant import request_of
from peer.messages import CaseAsk, CaseGiven
from peer.settler import Settler
from protocol import params
from protocol.forced import may_order
from protocol.network import Rules
from protocol.outcomes import LOCK, jackpot_micro
from protocol.records import ROLE_WHISTLEBLOWER, Agreement, Verdict, amount_for, open_record

__all__ = ["Prospect", "Whistleblower", "prospect_of"]


@dataclass(frozen=True)
class Prospect:
    """What re-checking one segment of a deal promises, in micro-credits. cost_micro: at the re-checker's own price."""

    cost_micro: int
    expected_micro: int

    @property
    def pays(self) -> bool:
        """Whether to enter."""
        return self.expected_micro > self.cost_micro


def prospect_of(
    agreement: Agreement,
    *,
    own_price: int,
    right: int,
    wrong: int,
    others: int,
    rules: Rules,
    pool_micro: int,
) -> Prospect:
    """The expected payout of re-checking one segment of a deal whose checkers found it right, against its cost.

    right, wrong: the record of its solver; others: whistleblowers that may look at the same deal, with whom the find is
    shared. Two things can be found: a fraud that was covered, with the frequency of the solver's record, worth the
    finder's share of the lock; an error that was ordered, worth the jackpot as far as the pool reaches (DESIGN 8).
    Integers throughout, rounded down.
    """
    segments = agreement.last_segment - agreement.first_segment
    operations = agreement.operations // segments
    cost = amount_for(operations, own_price)
    bounty = agreement.lock_micro * LOCK.winner // 1000
    fraud = bounty * (wrong + 1) // (right + wrong + params.RECHECK_PRIOR_DEALS)
    ordered = jackpot_micro(agreement, rules, pool_micro) * rules.forced_ppm // (1_000_000 * segments)
    if not may_order(agreement):
        ordered = 0
    return Prospect(cost, (fraud + ordered) // (1 + others))


@dataclass
class Whistleblower:
    """See the module docstring. `deal_of` finds this peer's own deals, whose cases it gives to others who ask."""

    desk: Desk
    settler: Settler
    checker: Checker
    deal_of: Callable[[bytes], tuple[Deal, list[bytes]] | None] = lambda _: None
    weighed: OrderedDict[bytes, bool] = field(default_factory=OrderedDict)  # deal -> whether it promised to pay
    wanted: dict[bytes, tuple[int, int]] = field(default_factory=dict)  # deal -> times its case was asked for, next at
    told: dict[bytes, int] = field(default_factory=dict)  # peer -> when we last gave it a case
    early: OrderedDict[bytes, Verdict] = field(default_factory=OrderedDict)  # on deals that are not in the log yet

    def on_verdict(self, verdict: Verdict) -> None:
        """A right verdict in gossip: weigh its deal, once."""
        if verdict.finding != "right" or verdict.checker == self.desk.me:
            return
        if not self.desk.network.notaries or not self.desk.means.roles & ROLE_WHISTLEBLOWER or self.desk.paused_ns:
            return
        channel = self.settler.channels.get(verdict.agreement)
        if channel is None:  # gossip lost the agreement, and a comparison of logs will bring it
            self.early[verdict.agreement] = verdict
            while len(self.early) > params.RECHECKS_REMEMBERED_MAX:
                self.early.popitem(last=False)
            return
        agreement = channel.agreement
        if verdict.agreement in self.weighed or self.desk.me in (agreement.submitter, agreement.solver):
            return
        prospect = self.prospect(agreement)
        self.weighed[verdict.agreement] = prospect.pays
        if prospect.pays:
            self.wanted[verdict.agreement] = 0, self.desk.now_ns
        while len(self.weighed) > params.RECHECKS_REMEMBERED_MAX:
            self.weighed.popitem(last=False)
        self.desk.emit(
            "recheck" if prospect.pays else "recheck-declined", deal=verdict.agreement,
            cost_micro=prospect.cost_micro, expected_micro=prospect.expected_micro,
        )  # fmt: skip

    def prospect(self, agreement: Agreement) -> Prospect:
        """What a re-check of one segment of this deal promises now."""
        history = self.settler.history(agreement.solver)
        asks = self.desk.book.live_asks(role=ROLE_WHISTLEBLOWER, now_ns=self.desk.wall_ns)
        parties = (self.desk.me, agreement.submitter, agreement.solver)
        return prospect_of(
            agreement,
            own_price=self.desk.means.unit_price,
            right=history.right,
            wrong=history.wrong,
            others=len({ask.peer for ask in asks if ask.peer not in parties}),
            rules=self.desk.network.rules,
            pool_micro=self.desk.ledger.balance_micro(POOL),
        )

    def tick(self) -> None:
        """Ask for the cases that promise to pay: its submitter first, then its solver."""
        now = self.desk.now_ns
        for deal_id in [deal for deal in self.early if deal in self.settler.channels]:
            self.on_verdict(self.early.pop(deal_id))
        for deal_id, (times, at_ns) in list(self.wanted.items()):
            if now < at_ns:
                continue
            if times >= params.CASE_ASKS_MAX:
                del self.wanted[deal_id]
                continue
            agreement = self.settler.channels[deal_id].agreement
            self.wanted[deal_id] = times + 1, now + params.RESEND_NS
            self.desk.send((agreement.submitter, agreement.solver)[times % 2], CaseAsk(deal_id))

    def on_case(self, message: CaseGiven) -> None:
        """The evidence of a deal we weighed: re-execute a segment of it. Raises RemoteProtocolError if it is forged."""
        agreement, agreement_id, _ = open_record(message.case.agreement, network=self.desk.network.id)
        if agreement_id not in self.wanted or not isinstance(agreement, Agreement):
            return
        first = agreement.first_segment
        segment = self.desk.rng.choice(range(first, first + len(message.case.receipts)))
        request = msgspec.structs.replace(message.case, segments=(segment,), role="whistleblower")
        if self.checker.recheck(open_evidence(request, network=self.desk.network)):
            del self.wanted[agreement_id]

    def on_case_ask(self, peer: bytes, message: CaseAsk) -> None:
        """Somebody wants to check a deal of ours again: give it the case, a few at a time."""
        found = self.deal_of(message.agreement)
        recent = [p for p, at in self.told.items() if self.desk.now_ns - at < params.RESEND_NS]
        if found is None or peer in recent or len(recent) >= params.CASES_TOLD_PER_TICK_MAX:
            return
        deal, receipts = found
        request = request_of(deal, receipts, deal.drawn[0] if deal.drawn else 0, self.desk.network)
        if request is not None:
            self.told = {p: at for p, at in self.told.items() if p in recent} | {peer: self.desk.now_ns}
            self.desk.send(peer, CaseGiven(request))
