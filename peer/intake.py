"""The door for the records of the market: who may send how many, and what becomes of each. Sans-IO.

Limits go by who sends, never by who signed: whoever repeats another's signed records could use up the other's
allowance. What gossip brings was limited by its author before it was passed on (peer/swarm.py); what a connection
brings is limited here. Every record that is not taken is refused with a typed error or counted in `desk.drops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

import msgspec

from peer.bidding import Bidder
from peer.desk import Desk
from peer.standing import Rates
from protocol import params
from protocol.errors import LimitExceeded
from protocol.records import Ask, Bid, Offer

__all__ = ["Bundle", "Intake", "records_in", "refuse_bundle"]

Bundle: TypeAlias = Annotated[list[bytes], msgspec.Meta(max_length=params.BUNDLE_RECORDS_MAX)]
"""What one gossiped message carries: envelopes."""


def records_in(data: bytes) -> int:
    """How many records a bundle says it holds, at most one more than it may: the head of its msgpack array, for a
    message must be weighed before it is decoded. One whose head lies is refused as malformed by who decodes it."""
    most = params.BUNDLE_RECORDS_MAX + 1
    head = data[:1]
    if b"\x90" <= head <= b"\x9f":
        return min(head[0] & 15, most)
    if head in (b"\xdc", b"\xdd"):
        return min(int.from_bytes(data[1 : 3 if head == b"\xdc" else 5], "big"), most)
    return 1


def refuse_bundle(_topic: str, _author: bytes, data: bytes) -> None:
    """The transport's cheap check of a bundle, before it is passed on. Raises LimitExceeded."""
    if len(data) > params.GOSSIP_RECORD_BYTES_MAX or records_in(data) > params.BUNDLE_RECORDS_MAX:
        raise LimitExceeded(f"gossip of {len(data)} bytes and {records_in(data)} records")


def _connection_rates() -> Rates:
    return Rates(params.DIRECT_RECORDS_PER_SECOND_MAX, burst=params.SETTLEMENT_LOG_MAX)


@dataclass
class Intake:
    """See the module docstring."""

    desk: Desk
    bidder: Bidder
    _rates: Rates = field(default_factory=_connection_rates)

    def admitted(self, peer: bytes, records: Sequence[bytes]) -> Sequence[bytes]:
        """What `peer` may bring on its connection, of one message: all of it, or nothing if it was too fast. What the
        settlement log lacks for it comes again with the next comparison of logs."""
        if self._rates.take(peer, now=self.desk.now_ns / 1e9, cost=len(records)):
            return records
        self.desk.drop("connection-rate", peer, count=len(records))
        return ()

    def take(self, sender: bytes, record: Offer | Ask | Bid, record_id: bytes, envelope: bytes) -> None:
        """One verified record. Raises VerificationFailed, MalformedRecord or LimitExceeded; then nothing changed."""
        desk, now = self.desk, self.desk.wall_ns
        if record.expires_ns <= now:
            desk.drop("expired", sender)  # no error: it may have been on its way for long
            return
        match record:
            case Offer():
                if desk.book.add_offer(record_id, record, now_ns=now):
                    desk.emit("offer-seen", offer=record_id, submitter=record.submitter)
                    self.bidder.consider(record_id, record)
                elif record_id in desk.book.taken:
                    desk.drop("superseded", sender)
            case Ask():
                old = desk.book.asks.get(record.peer, record.slot)
                if not desk.book.add_ask(record, now_ns=now) and old is not None and old.sequence > record.sequence:
                    desk.drop("superseded", sender)
            case Bid():
                self._bid(sender, record, record_id, envelope)

    def _bid(self, sender: bytes, bid: Bid, bid_id: bytes, envelope: bytes) -> None:
        desk, offer = self.desk, self.desk.book.offers.get(bid.offer)
        _, old = desk.book.bids.get(bid.offer, {}).get(bid.solver, (b"", None))
        mine = offer is not None and offer.submitter == desk.me  # nobody audits another's match
        if desk.book.add_bid(bid_id, bid, now_ns=desk.wall_ns, envelope=envelope if mine else b""):
            return
        if offer is None:
            desk.drop("no-offer", sender)
        elif old is not None and old.nonce > bid.nonce:
            desk.drop("superseded", sender)
