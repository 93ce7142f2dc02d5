"""The house of a network, and who is paid by it. Re-runs are in peer/reruns.py; availability is here.

Once a period, at a moment nobody knows before, the house has everybody who asks for work prove what their asks claim,
and pays for each challenge that was passed, and for nothing else.

All are called together, in one batch if there are no more than can be challenged at a time: one machine behind many
names shares its time among them, and is paid for what it shares (protocol/house.py). A peer that works at that moment
has no bench and no pay: it earns already. The other side, the peer that is paid, is here too. Where notaries certify
openings, the peer signs first and the house brings them the agreement: it is its money that they set aside. Sans-IO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from peer.certificates import Certificates
from peer.challenger import Challenger
from peer.deals import Deal, move
from peer.desk import SETTLEMENT, Desk
from peer.jobs import JobDesk
from peer.messages import HousePay
from peer.reruns import Reruns
from peer.settler import Settler
from protocol import params
from protocol.bench_card import OpenCard
from protocol.certificate import takes_certificate
from protocol.errors import VerificationFailed
from protocol.house import (
    AVAILABILITY_NS,
    availability_micro,
    check_pay,
    is_availability,
    pay_agreement,
    pay_settlement,
)
from protocol.lifecycle import Event, State
from protocol.network import House as Terms
from protocol.records import ROLE_SOLVER, Agreement, Ask, Claim, Settlement, add_signature, open_record

__all__ = ["House"]

_DAY_NS = 86_400 * 10**9


class _Pay(msgspec.Struct, kw_only=True):
    """A row: what the house signed for one peer in one period. deal: the agreement's id."""

    peer: bytes
    period: int
    day: int
    micro: int
    deal: bytes
    agreement: bytes
    settlement: bytes  # with the peer's signature too, once it gave both to be certified
    given_up: bool = False  # notaries did not certify it


@dataclass
class House:
    """See the module docstring. `claims`: what those who are called now said in their asks. `deals`: pays that both
    signed, until notaries have certified them or never will."""

    desk: Desk
    settler: Settler
    jobs: JobDesk
    challenger: Challenger
    certificates: Certificates
    off: bool = False  # the owner of this peer wants nothing of the house
    deals: dict[bytes, Deal] = field(default_factory=dict)
    pays: dict[bytes, _Pay] = field(default_factory=dict)  # row key -> it
    claims: dict[bytes, Ask] = field(default_factory=dict)
    period: int = -1
    call_ns: int = 0  # when this period's challenges begin
    waiting: list[bytes] | None = None  # whom to call still; None before the moment
    batch_ns: int = 0
    resend: dict[bytes, int] = field(default_factory=dict)  # those that may be unsigned yet -> next at

    def __post_init__(self) -> None:
        self.challenger.on_proven = self._proven
        self.certificates.on_pay_certified, self.certificates.on_pay_refused = self._certified, self._refused
        self.reruns = Reruns(self.desk, self.settler, self.jobs, self.challenger)
        self.on_segment, self.on_work_ended = self.reruns.on_segment, self.reruns.on_work_ended
        self.on_fetched = self.reruns.on_fetched

    @property
    def terms(self) -> Terms | None:
        """What the network's house pays, if it is this peer."""
        house = self.desk.network.house
        return house if house is not None and self.desk.network.house_key == self.desk.me else None

    # --- the owner's wish ----------------------------------------------------------------------------------
    def wanted(self, peer: bytes) -> bool:
        """Whether this peer takes challenges and re-runs of `peer`: of the house only while its owner wants them."""
        return not (self.off and peer == self.desk.network.house_key)

    def want(self, on: bool) -> None:
        """Take part in what the house pays for, or not, over restarts too."""
        self.off = not on
        self.desk.save("house-off", b"", None if on else b"1")

    # --- the house -----------------------------------------------------------------------------------------
    def tick(self) -> None:
        """Draw the moment of each period, call everybody when it comes, repeat what is unanswered."""
        if self.terms is None:
            return
        self.reruns.tick()
        for deal in list(self.deals.values()):
            self.desk.attempt(self._advance, deal)
        period, now = self.desk.wall_ns // AVAILABILITY_NS, self.desk.wall_ns
        if period != self.period:
            self.period, self.waiting = period, None
            self.claims.clear()
            room_ns = max(1, (period + 1) * AVAILABILITY_NS - now - params.BENCH_WINDOW_NS_MAX)
            self.call_ns = now + self.desk.rng.randrange(room_ns)
            self._take_back(period)
            self._forget(period)
        if self.waiting is None and now >= self.call_ns:
            self.waiting = self._callable(period)
        if self.waiting and self.desk.now_ns >= self.batch_ns:
            self._call()
        for key in [key for key, at in self.resend.items() if self.desk.now_ns >= at]:
            pay = self.pays[key]
            if self._settled(pay) or pay.given_up or pay.period + 1 < self.period:  # or it goes without it
                del self.resend[key]
            elif pay.deal not in self.deals:
                self._offer(key, pay)

    def _callable(self, period: int) -> list[bytes]:
        """Who asks for work, is connected, and was not paid in this period; in a drawn order."""
        asks = self.desk.book.live_asks(role=ROLE_SOLVER, now_ns=self.desk.wall_ns)
        self.claims = {a.peer: a for a in asks if a.peer in self.desk.peers and a.peer != self.desk.me}
        paid = {pay.peer for pay in self.pays.values() if pay.period == period}
        peers = sorted(self.claims.keys() - paid)
        self.desk.rng.shuffle(peers)
        return peers

    def _call(self) -> None:
        """Invite as many as can be challenged at once; the others as soon as those are through."""
        assert self.waiting is not None, "the moment has come"
        room = params.BENCH_OPEN_MAX - len(self.challenger.open) - len(self.challenger.waiting)
        batch, self.waiting = self.waiting[: max(0, room)], self.waiting[max(0, room) :]
        self.batch_ns = self.desk.now_ns + params.BENCH_ASK_NS
        for peer in batch:
            if peer in self.desk.peers:
                self.challenger.invite(peer)
        self.desk.emit("house-called", peers=len(batch), left=len(self.waiting))

    def _proven(self, card: OpenCard) -> None:
        """A challenge was passed: pay it if we called for it, and the card is as good as the ask."""
        peer, terms = card.card.peer, self.terms
        ask = self.claims.pop(peer, None)
        if terms is None or ask is None:
            return
        block = params.BENCH_MEMORY_BLOCK_BYTES
        claimed = min(ask.memory_bytes // block, params.BENCH_MEMORY_BLOCKS_MAX) * block
        if card.operations_per_second < ask.operations_per_second or card.proven_memory_bytes < claimed:
            self.desk.emit(
                "house-unpaid", peer=peer, code="claim", why="the ask claims more than the challenge proved",
                claimed=ask.operations_per_second, proven=card.operations_per_second,
            )  # fmt: skip
            return
        day, micro = self.desk.wall_ns // _DAY_NS, availability_micro(terms, card)
        spent = sum(pay.micro for pay in self.pays.values() if pay.day == day)
        open_micro = sum(pay.micro for pay in self.pays.values() if not self._settled(pay))
        if not micro:
            self.desk.emit("house-unpaid", peer=peer, code="little", why="it comes to less than a micro-credit")
        elif spent + micro > terms.daily_micro:
            self.desk.emit("house-unpaid", peer=peer, code="budget", why="the budget of the day is spent")
        elif open_micro + micro > self.settler.free_micro(self.desk.me):
            self.desk.emit("house-unpaid", peer=peer, code="funds", why="the house has no money left")
        else:
            self._pay(card, micro, day)

    def _pay(self, card: OpenCard, micro: int, day: int) -> None:
        """Sign both records, journal them, and send them: what the peer has to sign too."""
        network, peer = self.desk.network, card.card.peer
        agreement = pay_agreement(
            network, card, pay_micro=micro, sequence=self.jobs.number(), now_ns=self.desk.wall_ns
        )
        envelope = self.desk.seal(agreement)
        deal = open_record(envelope, network=network.id)[1]
        settlement = self.desk.seal(pay_settlement(agreement, deal))
        pay = _Pay(
            peer=peer, period=self.period, day=day, micro=micro, deal=deal, agreement=envelope, settlement=settlement
        )
        key = peer + self.period.to_bytes(8, "big")
        assert key not in self.pays, "once a period"
        self.pays[key] = pay
        self.desk.save("house", key, msgspec.msgpack.encode(pay))
        self._offer(key, pay)
        self.desk.emit("house-pays", peer=peer, deal=deal, micro=micro)

    def _offer(self, key: bytes, pay: _Pay) -> None:
        self.resend[key] = self.desk.now_ns + params.HOUSE_RESEND_NS
        self.desk.send(pay.peer, HousePay(pay.agreement, pay.settlement))

    def _settled(self, pay: _Pay) -> bool:
        channel = self.settler.channels.get(pay.deal)
        return channel is not None and bool(channel.closed)

    def _take_back(self, period: int) -> None:
        """Close what a peer opened and never settled, when its time is over: it was offered both at once. By the
        channels, not the rows: who opens it when the row is forgotten must not keep the house's money for ever."""
        for deal, channel in self.settler.channels.items():
            agreement = channel.agreement
            ours = agreement.submitter == self.desk.me and is_availability(agreement, self.desk.network)
            if ours and not channel.closed and agreement.created_ns // AVAILABILITY_NS + 1 < period:
                self.desk.attempt(self._claim, deal)

    def _claim(self, deal: bytes) -> None:
        claim = Claim(network=self.desk.network.id, agreement=deal, author=self.desk.me, voucher=b"", fees=())
        self.settler.accept(self.desk.seal(claim), publish=True)

    def _forget(self, period: int) -> None:
        """Rows of the day before yesterday that are settled, or that nobody came for."""
        kept = params.HOUSE_PERIODS_KEPT
        for key in [key for key, pay in self.pays.items() if pay.period + kept < period]:
            del self.pays[key]
            self.resend.pop(key, None)
            self.desk.save("house", key, None)

    # --- its pay before notaries ---------------------------------------------------------------------------
    def _on_back(self, peer: bytes, message: HousePay) -> None:
        """A pay with the signature of who is paid: the notaries have to certify it. Raises VerificationFailed."""
        agreement, deal_id, first = open_record(message.agreement, network=self.desk.network.id)
        settlement, _, second = open_record(message.settlement, network=self.desk.network.id)
        found = [(key, pay) for key, pay in self.pays.items() if (pay.deal, pay.peer) == (deal_id, peer)]
        if not found or not isinstance(agreement, Agreement):
            raise VerificationFailed("a pay that this house did not offer")
        ((key, pay),) = found
        ours, _, _ = open_record(pay.settlement, network=self.desk.network.id)
        if settlement != ours or first != {self.desk.me, peer} or second != {self.desk.me, peer}:
            raise VerificationFailed("a pay comes back as it was offered, with both signatures on both records")
        if deal_id in self.deals or deal_id in self.settler.channels or pay.given_up:
            return
        pay.settlement = message.settlement
        self.desk.save("house", key, msgspec.msgpack.encode(pay))
        now = self.desk.now_ns
        self.deals[deal_id] = Deal(
            id=deal_id, side="house", state=State.PROPOSED, agreement=message.agreement, task=b"", base_blob=b"",
            seed=b"", created_ns=now, entered_ns=now,
        )  # fmt: skip
        self.certificates.certify(self.deals[deal_id])

    def _certified(self, deal: Deal) -> None:
        self.settler.accept(deal.agreement, publish=True)
        self._advance(deal)

    def _refused(self, deal: Deal, code: str, why: str) -> None:
        """No quorum signed in time: the peer goes without it, unless as many had signed that it opens late."""
        move(self.desk, deal, Event.REFUSED)
        for key, pay in self.pays.items():
            if pay.deal == deal.id:
                pay.given_up = True
                self.desk.save("house", key, msgspec.msgpack.encode(pay))
                self.desk.emit("house-unpaid", peer=pay.peer, code=code, why=why)

    def _advance(self, deal: Deal) -> None:
        """Settle what is open, whoever opened it; forget what is settled, or never opens."""
        channel = self.settler.channels.get(deal.id)
        pay = next((pay for pay in self.pays.values() if pay.deal == deal.id), None)
        if channel is not None and not channel.closed and pay is not None:
            self.settler.accept(pay.settlement, publish=True)
        never = deal.lifecycle == State.DECLINED and not deal.doubt
        if never or (channel is not None and channel.closed):
            del self.deals[deal.id]
            self.desk.save("deals", deal.id, None)

    # --- who is paid ---------------------------------------------------------------------------------------
    def on_pay(self, peer: bytes, message: HousePay) -> None:
        """The house pays for our card: sign both records, and let everybody know; or, to the house, who is paid has
        signed them. Raises VerificationFailed."""
        network = self.desk.network
        if self.terms is not None:
            self._on_back(peer, message)
            return
        agreement, deal, first = open_record(message.agreement, network=network.id)
        settlement, _, second = open_record(message.settlement, network=network.id)
        if not isinstance(agreement, Agreement) or not isinstance(settlement, Settlement):
            raise VerificationFailed("availability pay is an agreement and its settlement")
        if first != {peer} or second != {peer} or agreement.submitter != peer or peer != network.house_key:
            raise VerificationFailed("availability pay comes from the house, with its signature alone")
        known = self.settler.channels.get(deal)
        if known is not None and known.closed:
            for envelope in self._closing(deal):  # the house has not heard of it yet
                self.desk.publish(SETTLEMENT, envelope)
            return
        check_pay(agreement, deal, settlement, network=network, me=self.desk.me)
        opening, closing = (
            add_signature(envelope, self.desk.key, network=network.id)
            for envelope in (message.agreement, message.settlement)
        )
        if known is None and takes_certificate(agreement, network):
            self.desk.send(peer, HousePay(opening, closing))  # it asks again until it has this
            return
        if known is None and not self.settler.accept(opening, publish=True):
            return  # not funded as far as this peer knows: the house asks again, and it may open meanwhile
        self.settler.accept(closing, publish=True)
        self.desk.emit("availability", deal=deal, micro=agreement.channel_micro)

    def _closing(self, deal: bytes) -> list[bytes]:
        """The records by which a pay was opened and closed, as the log has them."""
        log, found = self.settler.log, self.settler.channels[deal].records
        return [log[record_id] for record_id in found if record_id in log]

    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """What was signed before a restart, so that nobody is paid twice for one period."""
        self.off = any(True for _ in rows("house-off"))
        self.reruns.restore(rows)
        for key, value in rows("deals"):
            deal = msgspec.msgpack.decode(value, type=Deal)
            if deal.side == "house":
                self.deals[key] = deal
        for key, value in rows("house"):
            self.pays[key] = msgspec.msgpack.decode(value, type=_Pay)
            self.resend[key] = 0
