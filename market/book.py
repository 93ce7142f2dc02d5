"""One peer's order book: the live offers, asks and bids it has heard of. Bounded, expiring, per-author limits.

It promises that the same records in any order make the same book, once all are in: under gossip nobody agrees on
arrival order, so nothing here depends on it. It knows neither peers' connections nor the ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from market.ask_index import AskIndex
from market.scoring import pack_bid
from protocol import params
from protocol.errors import LimitExceeded, MalformedRecord, VerificationFailed
from protocol.forced import NO_ERRORS
from protocol.records import Ask, Bid, Offer

__all__ = ["OrderBook", "check_times"]


def check_times(*, created_ns: int, expires_ns: int, now_ns: int) -> None:
    """Refuse a record from the future, already expired, or too long-lived. Raises VerificationFailed."""
    if created_ns > now_ns + params.CLOCK_SKEW_NS_MAX:
        ahead_s = (created_ns - now_ns) // 10**9
        raise VerificationFailed(
            f"record dated {ahead_s} s in the future",
            why="one of the two clocks is wrong",
            next_step="check the clock with `timedatectl`; `ichiba doctor` compares it with your peers'",
        )
    if expires_ns <= now_ns:
        raise VerificationFailed(f"record expired {(now_ns - expires_ns) // 10**9} s ago")
    if expires_ns - created_ns > params.RECORD_LIFETIME_NS_MAX or expires_ns <= created_ns:
        raise MalformedRecord("record lives longer than a day, or no time at all")


@dataclass
class OrderBook:
    """Offers by id, asks by (peer, slot), bids by offer and solver.

    A record costs the same whatever the number of others, and so does a tick in which nothing ends.
    """

    offers: dict[bytes, Offer] = field(default_factory=dict)
    asks: AskIndex = field(default_factory=AskIndex)
    bids: dict[bytes, dict[bytes, tuple[bytes, Bid]]] = field(default_factory=dict)
    envelopes: dict[bytes, bytes] = field(default_factory=dict)  # of the bids, by their ids: an audit shows them
    packed: dict[bytes, bytes] = field(default_factory=dict)  # of the same bids: what a large round reads of them
    taken: dict[bytes, int] = field(default_factory=dict)  # offers that became agreements -> when they may be forgotten
    equivocations: dict[bytes, int] = field(default_factory=dict)  # author -> times caught
    _offers_of: Counter[bytes] = field(default_factory=Counter)  # submitter -> its live offers
    _ends: list[tuple[int, bytes]] = field(default_factory=list)  # heap: when an offer, or its taking, is past its time

    def add_offer(self, offer_id: bytes, offer: Offer, *, now_ns: int) -> bool:
        """True if the offer is new. Raises VerificationFailed, MalformedRecord or LimitExceeded."""
        check_times(created_ns=offer.created_ns, expires_ns=offer.expires_ns, now_ns=now_ns)
        if offer.first_segment >= offer.last_segment or not offer.operations:
            raise MalformedRecord("offer of no work")
        if offer_id in self.offers or offer_id in self.taken:
            return False
        if self._offers_of[offer.submitter] >= params.BOOK_OFFERS_PER_AUTHOR_MAX:
            raise LimitExceeded(f"more than {params.BOOK_OFFERS_PER_AUTHOR_MAX} live offers of one submitter")
        if len(self.offers) >= params.BOOK_OFFERS_MAX:
            raise LimitExceeded("the book is full of offers")
        self.offers[offer_id] = offer
        self._offers_of[offer.submitter] += 1
        self._ends_at(offer.expires_ns, offer_id)
        return True

    def add_ask(self, ask: Ask, *, now_ns: int) -> bool:
        """True if the ask replaces what stood in its slot. Raises as `add_offer`."""
        check_times(created_ns=ask.created_ns, expires_ns=ask.expires_ns, now_ns=now_ns)
        old = self.asks.get(ask.peer, ask.slot)
        if old is not None and old.sequence >= ask.sequence:
            if old.sequence == ask.sequence and old != ask:
                self.equivocations[ask.peer] = self.equivocations.get(ask.peer, 0) + 1
                raise VerificationFailed("two asks of one slot and sequence number", why="the peer equivocates")
            return False
        if old is None:
            if self.asks.count_of(ask.peer) >= params.BOOK_ASKS_PER_AUTHOR_MAX:
                raise LimitExceeded(f"more than {params.BOOK_ASKS_PER_AUTHOR_MAX} asks of one peer")
            if len(self.asks) >= params.BOOK_ASKS_MAX:
                raise LimitExceeded("the book is full of asks")
        self.asks.put(ask)
        return True

    def add_bid(self, bid_id: bytes, bid: Bid, *, now_ns: int, envelope: bytes = b"") -> bool:
        """True if the bid is its solver's newest on an offer that stands here; other bids are not kept, or anybody
        could fill the book with bids on nothing. Raises as `add_offer`."""
        check_times(created_ns=bid.created_ns, expires_ns=bid.expires_ns, now_ns=now_ns)
        if bid.offer not in self.offers:
            return False
        if bid.forced_commitment == NO_ERRORS and not self.offers[bid.offer].units:
            raise VerificationFailed(
                "a bid that rules ordered errors out", why="only where a unit of a parallel job is offered may it do so"
            )
        on_offer = self.bids.setdefault(bid.offer, {})
        old = on_offer.get(bid.solver)
        if old is not None and old[1].nonce >= bid.nonce:
            if old[1].nonce == bid.nonce and old[0] != bid_id:
                self.equivocations[bid.solver] = self.equivocations.get(bid.solver, 0) + 1
                raise VerificationFailed("two bids of one nonce", why="the peer equivocates")
            return False
        if old is None and len(on_offer) >= params.BOOK_BIDS_PER_OFFER_MAX:
            self._drop_bids(on_offer, [s for s, (_, other) in on_offer.items() if other.expires_ns <= now_ns])
        if old is None and len(on_offer) >= params.BOOK_BIDS_PER_OFFER_MAX:
            raise LimitExceeded("too many bids on one offer")
        if old is not None:
            self._drop_bids(on_offer, [bid.solver])
        on_offer[bid.solver] = (bid_id, bid)
        if envelope:
            self.envelopes[bid_id], self.packed[bid_id] = envelope, pack_bid(bid_id, bid)
        return True

    def void_bids(self, solver: bytes, *, until_ns: int, offer_id: bytes = b"") -> None:
        """Forget what `solver` bid up to a time, on one offer or on all: its slot went to other work, and when it has
        another one it bids again."""
        for on_offer in [self.bids.get(offer_id, {})] if offer_id else list(self.bids.values()):
            if solver in on_offer and on_offer[solver][1].created_ns <= until_ns:
                self._drop_bids(on_offer, [solver])

    def remove_offer(self, offer_id: bytes) -> None:
        """Forget an offer and its bids."""
        offer = self.offers.pop(offer_id, None)
        if offer is not None:
            self._offers_of[offer.submitter] -= 1
            if not self._offers_of[offer.submitter]:
                del self._offers_of[offer.submitter]
        on_offer = self.bids.pop(offer_id, {})
        self._drop_bids(on_offer, list(on_offer))

    def remove_peer(self, peer: bytes) -> None:
        """Forget a peer's offers, asks and bids."""
        for offer_id in [i for i, offer in self.offers.items() if offer.submitter == peer]:
            self.remove_offer(offer_id)
        self.asks.remove_peer(peer)
        for on_offer in self.bids.values():
            self._drop_bids(on_offer, [peer] if peer in on_offer else [])

    def _drop_bids(self, on_offer: dict[bytes, tuple[bytes, Bid]], solvers: list[bytes]) -> None:
        for solver in solvers:
            bid_id, _ = on_offer.pop(solver)
            self.envelopes.pop(bid_id, None)
            self.packed.pop(bid_id, None)

    def take_offer(self, offer_id: bytes, *, now_ns: int) -> None:
        """The offer became an agreement: drop it, and refuse late copies for as long as any could live."""
        self.remove_offer(offer_id)
        self.taken[offer_id] = now_ns + params.RECORD_LIFETIME_NS_MAX
        self._ends_at(self.taken[offer_id], offer_id)

    def live_bids(self, offer_id: bytes, *, now_ns: int) -> list[tuple[bytes, Bid]]:
        """The unexpired bids on an offer as (id, bid), in order of their ids."""
        return sorted((i, b) for i, b in self.bids.get(offer_id, {}).values() if now_ns < b.expires_ns)

    def round_bids(self, offer_id: bytes, *, now_ns: int) -> tuple[list[tuple[bytes, Bid]], bytes]:
        """The unexpired bids on an offer, in no order, which a round does not need; and `pack_bid` of each, or nothing
        where one of them came without its envelope."""
        bids = [pair for pair in self.bids.get(offer_id, {}).values() if now_ns < pair[1].expires_ns]
        rows = [self.packed.get(bid_id) for bid_id, _ in bids]
        whole = [row for row in rows if row is not None]
        return bids, b"".join(whole) if len(whole) == len(rows) else b""

    def live_asks(self, *, role: int, now_ns: int, peers: Collection[bytes] | None = None) -> list[Ask]:
        """The unexpired asks of peers in `role`, in order of their keys; of `peers` only, if given."""
        return self.asks.live(role=role, now_ns=now_ns, peers=peers)

    def expire(self, *, now_ns: int) -> list[bytes]:
        """Drop what is past its time. Returns the ids of expired offers. Bids stay with their offer, for what is past
        its time is never handed out; they leave when there is no room for others."""
        gone = []
        while self._ends and self._ends[0][0] <= now_ns:
            _, offer_id = heappop(self._ends)
            offer = self.offers.get(offer_id)
            if offer is not None and offer.expires_ns <= now_ns:
                self.remove_offer(offer_id)
                gone.append(offer_id)
            if self.taken.get(offer_id, now_ns + 1) <= now_ns:
                del self.taken[offer_id]
        self.asks.expire(now_ns=now_ns)
        return gone

    def _ends_at(self, time_ns: int, offer_id: bytes) -> None:
        """Look at this offer again then. What stands no more leaves the heap at the latest when it is half of it."""
        heappush(self._ends, (time_ns, offer_id))
        if len(self._ends) > 2 * (len(self.offers) + len(self.taken)) + 64:
            self._ends = [(offer.expires_ns, i) for i, offer in self.offers.items()]
            self._ends += [(until_ns, i) for i, until_ns in self.taken.items()]
            heapify(self._ends)
