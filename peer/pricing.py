"""What this peer asks at present, from the book and the settlement log, by the rule of market/pricing.py.

Sans-IO. The owner's price is the floor; with `Means.fixed_price` it is the price. Not journalled: a restart begins at
what work sold for of late, or at the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from market.matching import refuse_offer
from market.pricing import Wanted, goes_without, next_price
from market.prints import print_of, statistics
from peer.desk import Desk
from peer.settler import Settler
from protocol import params
from protocol.records import ROLE_SOLVER, Offer

__all__ = ["Pricer"]


@dataclass
class Pricer:
    """The asked price of one peer, in micro-credits per giga-operation. `left` is what the price follows upwards."""

    desk: Desk
    settler: Settler
    slots_free: Callable[[], int]
    left: int = 0
    sold: int = 0  # the middle of recent prints of others, 0 where they are too few
    idle_since_ns: int = 0  # 0: no slot is free
    _above: int = 0  # the floor: an owner that moves its price moves the whole of it
    _round_ns: int = 0
    _prints_ns: int = 0

    @property
    def floor(self) -> int:
        """The least that the owner works for."""
        return self.desk.means.unit_price

    @property
    def price(self) -> int:
        """What this peer asks now."""
        return self.floor if self.desk.means.fixed_price else self.floor + self._above

    def tick(self) -> None:
        """One move a round."""
        now, round_ns = self.desk.now_ns, self.desk.network.rules.round_ms * 10**6
        if now < self._round_ns or not self.desk.means.roles & ROLE_SOLVER or self.desk.means.fixed_price:
            return
        self._round_ns = now + round_ns
        if now >= self._prints_ns:
            first, self._prints_ns = not self._prints_ns, now + params.PRICE_PRINTS_NS
            self.sold = self._sold()
            self._above = max(0, self.sold - self.floor) if first else self._above
        if not self.slots_free():
            self.idle_since_ns = 0
        elif not self.idle_since_ns:
            self.idle_since_ns = now
        self.left = goes_without(self._wanted(), self._free())
        idle_rounds = (now - self.idle_since_ns) // round_ns + 1 if self.idle_since_ns else 0
        moved = next_price(self.price, floor=self.floor, left=self.left, sold=self.sold, idle_rounds=idle_rounds)
        self._above = moved - self.floor

    def _sold(self) -> int:
        prints = (print_of(i, channel.agreement) for i, channel in self.settler.channels.items())
        found = statistics(prints, now_ns=self.desk.wall_ns, without=(self.desk.me,), within_ns=params.PRINTS_AGE_NS)
        return found.median if found.enough else 0

    def _wanted(self) -> list[Wanted]:
        """The offers of others that this peer could serve with a slot free, as far as their submitters can pay: what
        costs nothing to say must not move a price."""
        means, found, due = self.desk.means, [], dict[bytes, int]()
        stake = self.settler.free_stake(self.desk.me)
        for offer in sorted(self.desk.book.offers.values(), key=lambda o: (-o.unit_price_max, o.submitter, o.nonce)):
            if offer.submitter == self.desk.me or offer.mode in ("script", "profile"):
                continue  # a script's giga-operation is another thing, and a profile is for verifiers
            if not self._could_serve(offer, stake):
                continue
            due[offer.submitter] = due.get(offer.submitter, 0) + offer.budget_micro
            if due[offer.submitter] <= self.settler.free_micro(offer.submitter):
                found.append(Wanted(offer.unit_price_max, min(offer.memory_bytes, means.memory_bytes)))
        return found

    def _could_serve(self, offer: Offer, stake_micro: int) -> bool:
        means = self.desk.means
        refusal = refuse_offer(
            offer,
            unit_price=self.floor,
            memory_bytes=means.memory_bytes,
            sandbox=means.sandbox,
            stake_micro=stake_micro,
            slots_free=1,
            device=means.device,
            device_memory_bytes=means.device_memory_bytes,
            now_ns=self.desk.wall_ns,
        )
        return refusal is None

    def _free(self) -> list[int]:
        """The memory of each free slot: one of this peer's at least, so that a taken one is priced as if it were free,
        and of each other solver without an open channel."""
        taken = self.settler.busy() | {self.desk.me}
        others = self.desk.book.asks.shelf(role=ROLE_SOLVER, now_ns=self.desk.wall_ns, without=taken)
        own = [self.desk.means.memory_bytes] * max(1, self.slots_free())
        return own + list(map(int, others.memory_bytes))
