"""What a solver says in the market: its standing ask, its bids, and why it does not bid.

Sans-IO. The seed of each bid is kept here until the bid becomes a deal (peer/solver.py) or expires; a restart
forgets it, and a proposal on a forgotten bid is declined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from market.matching import Refusal, refuse_offer
from peer.desk import MARKET, Desk
from peer.settler import Settler
from protocol import params
from protocol.records import ROLE_SOLVER, Agreement, Ask, Bid, Offer, amount_for, open_record
from protocol.sampling import commitment
from protocol.script import AnyTask, ScriptSpec
from protocol.task import task_id

__all__ = ["Bidder"]


@dataclass
class Bidder:
    """The ask and the bids of one peer. `slots_free` counts slots without an active deal."""

    desk: Desk
    settler: Settler
    slots_free: Callable[[], int] = lambda: 0
    carded: Callable[[], int] = lambda: 0  # operations a second of this peer's bench card, 0 for none
    seeds: dict[bytes, tuple[bytes, Bid]] = field(default_factory=dict)  # bid id -> its seed and terms
    bid_on: dict[bytes, int] = field(default_factory=dict)  # offer -> when our bid on it expires
    refusals: dict[bytes, Refusal] = field(default_factory=dict)  # offer -> why not, for `why`
    ask_sequence: int = 0
    ask_again_ns: int = 0
    ask: bytes = b""
    operations_per_second: int = 0

    def consider(self, offer_id: bytes, offer: Offer) -> None:
        """Bid on an offer, or note why not."""
        means, now = self.desk.means, self.desk.now_ns
        if not means.roles & ROLE_SOLVER or offer.submitter == self.desk.me:
            return
        refusal = self._paused() or refuse_offer(
            offer,
            unit_price=self.price_of(offer),
            memory_bytes=means.memory_bytes,
            sandbox=means.sandbox,
            stake_micro=self.settler.free_stake(self.desk.me),
            slots_free=self.slots_free(),
        )
        if refusal is not None:
            if self.refusals.get(offer_id) != refusal:
                self.refusals[offer_id] = refusal
                self.desk.emit("no-bid", offer=offer_id, code=refusal.code, why=refusal.why)
            return
        self.refusals.pop(offer_id, None)
        rules = self.desk.network.rules
        if self.bid_on.get(offer_id, 0) > now + rules.bid_lifetime_ms * 10**6 // 2:
            return
        seed = self.desk.rng.randbytes(32)
        expires = min(now + rules.bid_lifetime_ms * 10**6, offer.expires_ns)
        bid = Bid(
            network=self.desk.network.id,
            offer=offer_id,
            solver=self.desk.me,
            unit_price=self.price_of(offer),
            operations_cap=offer.operations,
            lock_micro=offer.lock_micro,
            eta_ns=offer.operations if offer.mode == "script" else offer.operations * 10**9 // max(1, self.speed()),
            sandbox=means.sandbox,
            seed_commitment=commitment(seed, agreement_salt=self.desk.me),
            nonce=now,
            created_ns=now,
            expires_ns=expires,
        )
        envelope = self.desk.seal(bid)
        bid_id = open_record(envelope, network=self.desk.network.id)[1]
        self.seeds[bid_id] = (seed, bid)
        self.bid_on[offer_id] = expires
        self.desk.book.add_bid(bid_id, bid, now_ns=now)
        self.desk.publish(MARKET, envelope)
        self.desk.emit("bid", offer=offer_id, unit_price=bid.unit_price, eta_s=bid.eta_ns // 10**9)

    def _paused(self) -> Refusal | None:
        return Refusal("paused", "its owner paused this peer; `ichiba resume`") if self.desk.paused_ns else None

    def price_of(self, offer: Offer) -> int:
        """The least this peer asks for, per giga-operation. One of a script's is a second, so it costs what the
        machine would earn in a second with graphs; rounded up."""
        price = self.desk.means.unit_price
        return -(-price * self.speed() // 10**9) if offer.mode == "script" else price

    def speed(self) -> int:
        """Operations per second: measured on this peer's own segments, else by its card, else the configured guess."""
        by_card = self.carded() // params.BENCH_JOB_SHARE
        return self.operations_per_second or by_card or self.desk.means.operations_per_second

    def publish_ask(self) -> None:
        """The standing ask of this peer's one slot: what it offers, in every role; while it is paused, in none."""
        means, now, rules = self.desk.means, self.desk.now_ns, self.desk.network.rules
        if not means.roles:
            return
        self.ask_sequence = max(self.ask_sequence + 1, now // 10**6)  # grows across restarts without a row
        self.ask_again_ns = now + params.ASK_REPEAT_NS
        ask = Ask(
            network=self.desk.network.id,
            peer=self.desk.me,
            slot=0,
            sequence=self.ask_sequence,
            roles=0 if self.desk.paused_ns else means.roles,
            unit_price=means.unit_price,
            memory_bytes=means.memory_bytes,
            sandbox=means.sandbox,
            operations_per_second=self.speed(),
            created_ns=now,
            expires_ns=now + rules.ask_lifetime_ms * 10**6,
        )
        self.ask = self.desk.seal(ask)
        self.desk.book.add_ask(ask, now_ns=now)
        self.desk.publish(MARKET, self.ask)

    def refuse_proposal(self, agreement: Agreement, task: AnyTask) -> Refusal | None:
        """Why the proposal is not what we bid, or cannot be run now."""
        if refusal := self._paused():
            return refusal
        if agreement.bid not in self.seeds:
            return Refusal("unknown-bid", "this peer made no such bid, or forgot it in a restart")
        _, bid = self.seeds[agreement.bid]
        offer = self.desk.book.offers.get(agreement.offer)
        if not self.slots_free():
            return Refusal("busy", "every slot of this peer is taken")
        latest_ns = self.desk.now_ns + 2 * self.desk.network.rules.proposal_ms * 10**6
        if not self.desk.now_ns < agreement.accept_before_ns <= latest_ns or bid.expires_ns <= self.desk.now_ns:
            return Refusal("expired", "the bid or the proposal is past its time")
        terms = (bid.offer, bid.unit_price, bid.lock_micro, bid.seed_commitment)
        if terms != (
            agreement.offer,
            agreement.unit_price,
            agreement.lock_micro,
            agreement.solver_commitment,
        ):
            return Refusal("terms", "the proposal differs from the bid")
        if isinstance(task, ScriptSpec) != (agreement.check_permille == 0):
            return Refusal("terms", "of a script nothing is re-executed, of a graph something is; the proposal differs")
        if isinstance(task, ScriptSpec) and task.memory_bytes > self.desk.means.memory_bytes:
            return Refusal("memory", f"the script takes {task.memory_bytes >> 20} MiB, more than its offer said")
        if offer is None or agreement.task != task_id(task) or offer.task != agreement.task:
            return Refusal("task", "the proposal is not about the task that was offered")
        span = (agreement.submitter, agreement.first_segment, agreement.last_segment)
        if span != (offer.submitter, offer.first_segment, offer.last_segment) or span[1] >= span[2]:
            return Refusal("range", "the proposal covers other segments than the offer")
        steps = range(task.steps_of(agreement.first_segment).start, task.steps_of(agreement.last_segment - 1).stop)
        operations = len(steps) * task.operations_per_step
        if (
            operations != agreement.operations
            or operations > bid.operations_cap
            or task.segments < agreement.last_segment
        ):
            return Refusal("operations", "the task has another number of operations than the offer said")
        if agreement.channel_micro < amount_for(operations, agreement.unit_price):
            return Refusal("channel", "the channel does not cover the price of the work")
        if self.settler.free_stake(self.desk.me) < agreement.lock_micro:
            return Refusal("stake", "the stake is locked elsewhere by now")
        return None

    def tick(self) -> None:
        """Repeat the ask, renew bids that run out, and look again at offers refused before."""
        now = self.desk.now_ns
        if self.desk.means.roles and now >= self.ask_again_ns:
            self.publish_ask()
        for offer_id, offer in list(self.desk.book.offers.items()):
            self.consider(offer_id, offer)
        for table in (self.bid_on, self.refusals):
            for offer_id in [i for i in table if i not in self.desk.book.offers]:
                del table[offer_id]
        self.seeds = {i: pair for i, pair in self.seeds.items() if pair[1].expires_ns > now}
