"""What a solver says in the market: its standing ask, its bids, and why it does not bid.

Sans-IO. The seed of each bid is kept here until the bid becomes a deal (peer/solver.py) or expires; a restart
forgets it, and a proposal on a forgotten bid is declined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import islice
from typing import Any

from market.matching import Refusal, eta_ns, refuse_offer, transfer_ns
from peer.desk import MARKET, Desk
from peer.pricing import Pricer
from peer.profiles import tolerance_for
from peer.settler import Settler
from protocol import params
from protocol.credit_records import NO_CREDIT
from protocol.errors import IchibaError
from protocol.forced import NO_ERRORS
from protocol.house import is_rerun, takes_rerun
from protocol.incentives import check_rate, lock_needed
from protocol.profile import EXACT
from protocol.records import ROLE_SOLVER, ROLE_VERIFIER, Agreement, Ask, Bid, Offer, amount_for, open_record
from protocol.sampling import commitment
from protocol.script import AnyTask, ScriptSpec
from protocol.task import TaskSpec, task_id

__all__ = ["Bidder"]


@dataclass
class Bidder:
    """The ask and the bids of one peer. `slots_free` counts slots without an active deal."""

    desk: Desk
    settler: Settler
    slots_free: Callable[[], int] = lambda: 0
    carded: Callable[[], int] = lambda: 0  # operations a second of this peer's bench card, 0 for none
    house_wanted: Callable[[bytes], bool] = lambda _: True  # whether the owner wants the work of that house
    in_doubt_micro: Callable[[], int] = lambda: 0  # of this peer's stake, promised to openings that may come yet
    seeds: dict[bytes, tuple[bytes, bytes, Bid]] = field(default_factory=dict)  # bid id -> seed, secret, terms
    bid_on: dict[bytes, int] = field(default_factory=dict)  # offer -> when our bid on it expires
    refusals: dict[bytes, Refusal] = field(default_factory=dict)  # offer -> why not, for `why`
    ask_sequence: int = 0
    ask_again_ns: int = 0
    ask: bytes = b""
    told_price: int = 0  # as the last ask said
    operations_per_second: int = 0
    _looks: dict[bytes, None] = field(default_factory=dict)  # offers to look at again, in turn
    _brought: Any = None  # what this peer brought when they were queued
    _renewals: list[tuple[int, bytes]] = field(default_factory=list)  # heap: when a bid on an offer is due again
    _credit_ns: int = 0  # when offers refused for credit are looked at again
    _seed_ends: list[tuple[int, bytes]] = field(default_factory=list)  # heap: when the bid of a seed is past its time

    def __post_init__(self) -> None:
        self.pricer = Pricer(self.desk, self.settler, lambda: self.slots_free())

    def consider(self, offer_id: bytes, offer: Offer) -> None:
        """Bid on an offer, or note why not."""
        means, now = self.desk.means, self.desk.wall_ns
        solves, verifies = bool(means.roles & ROLE_SOLVER), bool(means.roles & ROLE_VERIFIER)
        if not (solves or (verifies and offer.mode == "profile")) or offer.submitter == self.desk.me:
            return
        if self._brings() != self._brought:
            self._looks[offer_id] = None  # what changed since the last tick may have changed back by the next
        refusal = self._paused() or self._unwanted(offer) or refuse_offer(
            offer,
            unit_price=self.price_of(offer),
            memory_bytes=means.memory_bytes,
            sandbox=means.sandbox,
            stake_micro=self._stake(),
            slots_free=self.slots_free(),
            solves=solves,
            verifies=verifies,
            checker_stake_min_micro=self.desk.network.rules.checker_stake_min_micro,
            device=means.device,
            device_memory_bytes=means.device_memory_bytes,
            now_ns=now,
            takes_ns=self.takes_ns(offer),
            credit_micro=self.credit_for(offer),
        )
        if refusal is not None:
            known, self.refusals[offer_id] = self.refusals.get(offer_id), refusal
            if known is None or known.code != refusal.code:  # figures change with every move of a price
                self.desk.emit("no-bid", offer=offer_id, code=refusal.code, why=refusal.why)
            return
        self.refusals.pop(offer_id, None)
        lifetime_ns = self.desk.network.rules.bid_lifetime_ms * 10**6
        standing_ns = self.bid_on.get(offer_id, 0)
        if standing_ns > now + lifetime_ns // 2 or standing_ns >= offer.expires_ns:
            return
        seed, secret = self.desk.rng.randbytes(32), self.desk.rng.randbytes(32)
        expires = min(now + lifetime_ns, offer.expires_ns)
        bid = Bid(
            network=self.desk.network.id,
            offer=offer_id,
            solver=self.desk.me,
            unit_price=self.price_of(offer),
            operations_cap=offer.operations,
            lock_micro=self._lock(offer),
            eta_ns=eta_ns(offer, self.speed()),
            sandbox=means.sandbox,
            seed_commitment=commitment(seed, agreement_salt=self.desk.me),
            forced_commitment=NO_ERRORS if offer.units else commitment(secret, agreement_salt=self.desk.me),
            nonce=self.desk.now_ns,
            created_ns=now,
            expires_ns=expires,
            device=means.device,
            device_memory_bytes=means.device_memory_bytes,
        )
        envelope = self.desk.seal(bid)
        bid_id = open_record(envelope, network=self.desk.network.id)[1]
        self.seeds[bid_id] = (seed, secret, bid)
        self.bid_on[offer_id] = expires
        heappush(self._seed_ends, (expires, bid_id))
        heappush(self._renewals, (expires - lifetime_ns // 2, offer_id))
        self.desk.book.add_bid(bid_id, bid, now_ns=now)
        self.desk.publish(MARKET, envelope)
        self.desk.emit("bid", offer=offer_id, unit_price=bid.unit_price, eta_s=bid.eta_ns // 10**9)

    def credit_for(self, offer: Offer) -> int:
        """What is left of the credit line that this peer gives the submitter of an offer on credit; 0 of any other."""
        if offer.budget_micro:
            return 0
        return self.settler.credit.left_micro(creditor=self.desk.me, debtor=offer.submitter)

    def _lock(self, offer: Offer) -> int:
        """The stake for this peer's own rate, at its price, as far as it reaches, and what the offer asks."""
        if not offer.check_permille:
            return offer.lock_micro
        rules, price_micro = self.desk.network.rules, amount_for(offer.operations, self.price_of(offer))
        rate = check_rate(rules, self.settler.history(self.desk.me).streak)
        wanted = lock_needed(rules, price_micro, rate)
        return max(offer.lock_micro, min(wanted, self._stake()))

    def _stake(self) -> int:
        """What this peer can promise to lock."""
        return self.settler.free_stake(self.desk.me) - self.in_doubt_micro()

    def awaited(self) -> set[bytes]:
        """The offers whose submitters may propose at any moment: they stand, and hold a bid of this peer."""
        offers, now = self.desk.book.offers, self.desk.wall_ns
        standing = (offer_id for offer_id, until_ns in self.bid_on.items() if now < until_ns and offer_id in offers)
        return {offer_id for offer_id in standing if offers[offer_id].submitter in self.desk.peers}

    def sold(self) -> None:
        """A slot is taken: others forget this peer's bids when they hear of it, so with one left it bids again. Its
        word holds all the same: a proposal on a bid that has not run out is answered."""
        self.bid_on.clear()
        self._brought = None  # look at every offer again

    def _paused(self) -> Refusal | None:
        resting = self.desk.resting()
        return Refusal(*resting) if resting is not None else None

    def _unwanted(self, offer: Offer) -> Refusal | None:
        terms = {"check_permille": offer.check_permille, "lock_micro": offer.lock_micro}
        rerun = offer.mode == "exact" and takes_rerun(offer.submitter, network=self.desk.network, **terms)
        if not rerun or self.house_wanted(offer.submitter):
            return None
        return Refusal("house-off", "its owner wants no work of the house; `ichiba earn house --on`")

    def price_of(self, offer: Offer, *, least: bool = False) -> int:
        """What this peer asks for it now, per giga-operation. One of a script's is a second, so it costs what the
        machine would earn in a second with graphs; rounded up. A profile is no trade that others compete for: it costs
        the least that the owner works for. least: what it would ask for in an idle market."""
        price = self.pricer.floor if least or offer.mode == "profile" else self.pricer.price
        return -(-price * self.speed() // 10**9) if offer.mode == "script" else price

    def takes_ns(self, offer: Offer) -> int:
        """How long the work would take this peer from now on, with all transfers."""
        return eta_ns(offer, self.speed()) + transfer_ns(offer, self.desk.link_speed(offer.submitter))

    def speed(self) -> int:
        """Operations per second: measured on this peer's own segments, else by its card, else the configured guess."""
        by_card = self.carded() // params.BENCH_JOB_SHARE
        return self.operations_per_second or by_card or self.desk.means.operations_per_second

    def measured(self, operations: int, took_ns: int) -> None:
        """A segment of so many operations took this peer so long."""
        self.operations_per_second = int(operations / (max(1, took_ns) / 1e9))

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
            roles=0 if self.desk.resting() else means.roles,
            unit_price=self.pricer.price,
            memory_bytes=means.memory_bytes,
            sandbox=means.sandbox,
            operations_per_second=self.speed(),
            created_ns=self.desk.wall_ns,
            expires_ns=self.desk.wall_ns + rules.ask_lifetime_ms * 10**6,
            device=means.device,
            device_memory_bytes=means.device_memory_bytes,
        )
        self.ask, self.told_price = self.desk.seal(ask), ask.unit_price
        self.desk.book.add_ask(ask, now_ns=self.desk.wall_ns)
        self.desk.publish(MARKET, self.ask)

    def refuse_proposal(
        self, agreement: Agreement, task: AnyTask | None, profiles: Sequence[bytes] = ()
    ) -> Refusal | None:
        """Why the proposal is not what we bid, or cannot be run now. task: None while a sealed job's is not known;
        `refuse_task` judges it then. profiles: of a tolerant task."""
        if refusal := self._paused() or self._refuse_terms(agreement):
            return refusal
        offer = self.desk.book.offers.get(agreement.offer)
        if offer is None or offer.task != agreement.task:
            return Refusal("task", "the proposal is not about the task that was offered")
        if (offer.budget_micro == 0) != (agreement.credit != NO_CREDIT):
            return Refusal("terms", "the offer was on credit and the proposal is not, or the other way round")
        if (offer.privacy == "sealed") != (task is None):
            return Refusal("privacy", "the task of a sealed job comes after the award, that of an open one before")
        span = (agreement.submitter, agreement.first_segment, agreement.last_segment, agreement.operations)
        if span[1] >= span[2] or span != (
            offer.submitter,
            offer.first_segment,
            offer.last_segment,
            offer.operations,
        ):
            return Refusal("range", "the proposal covers other segments or operations than the offer")
        if task is not None and (refusal := self.refuse_task(agreement, task, profiles)):
            return refusal
        if self._stake() < agreement.lock_micro:
            return Refusal("stake", "the stake is locked elsewhere by now")
        return None

    def refuse_task(self, agreement: Agreement, task: AnyTask, profiles: Sequence[bytes] = ()) -> Refusal | None:
        """Why the task is not what both signed, or cannot be judged or run."""
        if agreement.task != task_id(task):
            return Refusal("task", "the proposal is not about the task that was offered")
        if refusal := self._untrusted(agreement, task, profiles):
            return refusal
        rerun = is_rerun(agreement, self.desk.network)
        checked = isinstance(task, TaskSpec) and agreement.credit == NO_CREDIT and not rerun
        if checked != (agreement.check_permille != 0):
            return Refusal("terms", "only paid work on a graph is re-executed, and always; the proposal differs")
        if isinstance(task, ScriptSpec) and task.memory_bytes > self.desk.means.memory_bytes:
            return Refusal("memory", f"the script takes {task.memory_bytes >> 20} MiB, more than its offer said")
        if task.segments < agreement.last_segment:
            return Refusal("operations", "the task has fewer segments than the offer said")
        stage, offer = (task.stage if isinstance(task, TaskSpec) else None), self.desk.book.offers.get(agreement.offer)
        if offer is not None and (stage.stages * stage.replicas if stage is not None else 0) != offer.units:
            return Refusal("task", "the task is a unit of another run than the offer said")
        steps = range(task.steps_of(agreement.first_segment).start, task.steps_of(agreement.last_segment - 1).stop)
        if len(steps) * task.operations_per_step != agreement.operations:
            return Refusal("operations", "the task has another number of operations than the offer said")
        return None

    def _refuse_terms(self, agreement: Agreement) -> Refusal | None:
        """Why the terms are not those of a bid of ours, or not those of the network."""
        if agreement.bid not in self.seeds:
            return Refusal("unknown-bid", "this peer made no such bid, or forgot it in a restart")
        _, _, bid = self.seeds[agreement.bid]
        if not self.slots_free():
            return Refusal("busy", "every slot of this peer is taken")
        latest_ns = self.desk.wall_ns + 2 * self.desk.network.rules.proposal_ms * 10**6
        if not self.desk.wall_ns < agreement.accept_before_ns <= latest_ns or bid.expires_ns <= self.desk.wall_ns:
            return Refusal("expired", "the bid or the proposal is past its time")
        terms = (bid.offer, bid.unit_price, bid.lock_micro, bid.seed_commitment, bid.forced_commitment)
        if terms != (
            agreement.offer,
            agreement.unit_price,
            agreement.lock_micro,
            agreement.solver_commitment,
            agreement.forced_commitment,
        ):
            return Refusal("terms", "the proposal differs from the bid")
        price_micro = amount_for(agreement.operations, agreement.unit_price)
        rules, rate = self.desk.network.rules, agreement.check_permille
        if rate and not rules.check_permille <= rate <= rules.newcomer_permille:
            return Refusal("terms", f"checks {rate} permille, the rules ask {rules.check_permille} to a newcomer's")
        if rate and agreement.lock_micro < lock_needed(rules, price_micro, rate):
            return Refusal("terms", f"{agreement.lock_micro} locked is less than {rate} permille of checks take")
        if agreement.operations > bid.operations_cap:
            return Refusal("operations", "the proposal has more operations than were bid on")
        if agreement.credit != NO_CREDIT:
            return self.settler.credit.refuse(agreement)
        if agreement.channel_micro < price_micro:
            return Refusal("channel", "the channel does not cover the price of the work")
        return None

    def _untrusted(self, agreement: Agreement, task: AnyTask, profiles: Sequence[bytes]) -> Refusal | None:
        """Why the work cannot be judged by the profiles that came with a proposal, or None."""
        if not isinstance(task, TaskSpec):
            extra = bool(profiles) or agreement.tolerance != EXACT
            return Refusal("profiles", "only a tolerant task has a tolerance") if extra else None
        try:
            tolerance_for(self.settler, profiles, task, expected=agreement.tolerance)
        except IchibaError as error:
            return Refusal("profiles", f"{error.what}{': ' if error.why else ''}{error.why}"[:400])
        return None

    def tick(self) -> None:
        """Repeat the ask, renew bids that run out, and look again at offers refused before."""
        self.pricer.tick()
        if self.desk.means.roles and (self.desk.now_ns >= self.ask_again_ns or self._ask_is_stale()):
            self.publish_ask()
        self._look_again()
        for table in (self.bid_on, self.refusals):
            for offer_id in table.keys() - self.desk.book.offers.keys():
                del table[offer_id]
        while self._seed_ends and self._seed_ends[0][0] <= self.desk.wall_ns:
            self.seeds.pop(heappop(self._seed_ends)[1], None)

    def _ask_is_stale(self) -> bool:
        """Whether others reckon with another price: a free slot tells what it asks now (market/pricing.py)."""
        moved = abs(self.pricer.price - self.told_price)
        rested = self.desk.now_ns >= self.ask_again_ns - params.ASK_REPEAT_NS + params.PRICE_TELL_NS
        return rested and self.slots_free() > 0 and moved * params.PRICE_TELL_SHARE > self.told_price

    def _brings(self) -> Any:
        """All but credit that `refuse_offer` knows of this peer: while it stays, what was refused would be again (time
        only brings a deadline nearer)."""
        return (
            self.desk.means,
            self.speed(),
            self.pricer.price,
            self._stake(),
            self.slots_free() > 0,
            self.desk.resting(),
            tuple(self.desk.link_speeds.items()),
        )

    def _look_again(self) -> None:
        """Consider every offer again after a change of what this peer brings, and one whose bid runs out; but no more
        in a tick than it has time for."""
        offers, brings = self.desk.book.offers, self._brings()
        if brings != self._brought:
            self._brought = brings
            self._looks.update(dict.fromkeys(offers))
        while self._renewals and self._renewals[0][0] <= self.desk.wall_ns:
            self._looks[heappop(self._renewals)[1]] = None
        if self.desk.now_ns >= self._credit_ns:  # what is left of a line moves with other deals, and with the line
            self._credit_ns = self.desk.now_ns + params.OFFER_REPEAT_NS
            self._looks.update(dict.fromkeys(i for i, refusal in self.refusals.items() if refusal.code == "credit"))
        for offer_id in list(islice(self._looks, params.OFFERS_LOOKED_AT_MAX)):
            del self._looks[offer_id]
            if offer_id in offers:
                self.consider(offer_id, offers[offer_id])

    def redate(self) -> None:
        """The clock jumped: ask anew at once, and bid anew on what is offered."""
        self.bid_on.clear()
        self._renewals.clear()
        self._looks.update(dict.fromkeys(self.desk.book.offers))
        self.ask_again_ns = 0
