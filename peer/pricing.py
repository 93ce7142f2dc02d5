"""What this peer asks at present, from the book and the settlement log, by the rule of market/pricing.py.

Sans-IO. The owner's price is the floor; with `Means.fixed_price` it is the price. Not journalled: a restart begins at
what work sold for of late, or at the floor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter

from market.matching import refuse_offer
from market.pricing import Terms, goes_without, next_price, rounds_until_next
from market.prints import print_of, statistics
from peer.desk import Desk
from peer.settler import Settler
from protocol import params
from protocol.records import ROLE_SOLVER, Offer, amount_for

__all__ = ["Pricer"]


@dataclass
class Pricer:
    """The asked price of one peer, in micro-credits per giga-operation. `left` is what the price follows upwards."""

    desk: Desk
    settler: Settler
    slots_free: Callable[[], int]
    left: int = 0
    idle_since_ns: int = 0  # 0: no slot is free
    _above: int = 0  # the floor: an owner that moves its price moves the whole of it
    _moves_ns: int = 0

    @property
    def floor(self) -> int:
        """The least that the owner works for."""
        return self.desk.means.unit_price

    @property
    def price(self) -> int:
        """What this peer asks now."""
        return self.floor if self.desk.means.fixed_price else self.floor + self._above

    def tick(self) -> None:
        """A move of the price when it is time, and at once when a slot becomes free, or the last one is taken."""
        now, round_ns = self.desk.now_ns, self.desk.network.rules.round_ms * 10**6
        if not self.desk.means.roles & ROLE_SOLVER or self.desk.means.fixed_price:
            return
        free = self.slots_free() > 0
        if free == bool(self.idle_since_ns) and now < self._moves_ns:
            return
        self.idle_since_ns = (self.idle_since_ns or now) if free else 0
        if not self._moves_ns:
            self._above = max(0, self._sold() - self.floor)
        idle_rounds = (now - self.idle_since_ns) // round_ns + 1 if free else 0
        self._moves_ns = now + rounds_until_next(idle_rounds) * round_ns
        offers, own = self._wanted(), self.desk.means.memory_bytes
        wanted = [Terms(offer.unit_price_max, offer.memory_bytes) for offer in offers]
        others = self._free(min(offer.lock_micro for offer in offers)) if offers else []
        self.left = goes_without(wanted, others, memory_bytes=own)
        best = max((one.unit_price for one in wanted if one.memory_bytes <= own), default=0)
        moved = next_price(self.price, floor=self.floor, left=self.left, best=best, idle_rounds=idle_rounds)
        self._above = moved - self.floor

    def _sold(self) -> int:
        """The middle of what others sold for of late, 0 where that is too little to tell."""
        prints = (print_of(i, channel.agreement) for i, channel in self.settler.channels.items())
        found = statistics(prints, now_ns=self.desk.wall_ns, without=(self.desk.me,), within_ns=params.PRINTS_AGE_NS)
        return found.median if found.enough else 0

    def backed_micro(self, offer: Offer) -> int:
        """What the work is worth by the limit of `offer`, in micro-credits, as far as its submitter can pay it by what
        this peer knows: what costs nothing to say must neither move a price nor win a slot."""
        worth = amount_for(offer.operations, offer.unit_price_max)
        return min(worth, offer.budget_micro or worth, self._purse(offer))

    def _purse(self, offer: Offer) -> int:
        """What its submitter pays it from: its balance, or what is left of the credit line that this peer gives it."""
        if offer.budget_micro:
            return self.settler.free_micro(offer.submitter)
        return self.settler.credit.left_micro(creditor=self.desk.me, debtor=offer.submitter)

    def _wanted(self) -> list[Offer]:
        """The offers of others that stand, highest limit first, as far as their submitters can pay for them all. What
        this peer cannot serve for another reason than memory is left out."""
        means, stake, found = self.desk.means, self.settler.free_stake(self.desk.me), []
        others = (
            offer
            for offer in self.desk.book.offers.values()
            # A script's giga-operation is another thing, and a profile is for verifiers.
            if offer.submitter != self.desk.me and offer.mode not in ("script", "profile")
        )
        for offer in self.funded(others):
            refusal = refuse_offer(
                offer,
                unit_price=0,
                memory_bytes=max(means.memory_bytes, offer.memory_bytes),
                sandbox=means.sandbox,
                stake_micro=stake,
                slots_free=1,
                device=means.device,
                device_memory_bytes=means.device_memory_bytes,
                now_ns=self.desk.wall_ns,
            )
            if refusal is None:
                found.append(offer)
        return found

    def funded(self, offers: Iterable[Offer]) -> list[Offer]:
        """Those of `offers` whose submitters can pay for them and for all of theirs with higher limits, by what this
        peer knows; highest limit first."""
        found, due = [], Counter[tuple[bytes, bool]]()
        for offer in sorted(offers, key=lambda o: (-o.unit_price_max, o.submitter, o.nonce)):
            worth, on_credit = amount_for(offer.operations, offer.unit_price_max), not offer.budget_micro
            due[offer.submitter, on_credit] += offer.budget_micro or worth
            if worth <= (offer.budget_micro or worth) and due[offer.submitter, on_credit] <= self._purse(offer):
                found.append(offer)
        return found

    def _free(self, lock_micro: int) -> list[Terms]:
        """The asks of the other solvers without an open channel that have this stake, the lowest first: who could lock
        nothing for any of the work takes none of it, whatever it says."""
        taken, staked = self.settler.busy() | {self.desk.me}, None
        if lock_micro:
            balances = self.desk.ledger.balances().items()
            staked = {account.owner for account, micro in balances if account.bucket == "stake" and micro >= lock_micro}
        asks = self.desk.book.live_asks(role=ROLE_SOLVER, now_ns=self.desk.wall_ns, peers=staked)
        free = [Terms(ask.unit_price, ask.memory_bytes) for ask in asks if ask.peer not in taken]
        return sorted(free, key=attrgetter("unit_price"))
