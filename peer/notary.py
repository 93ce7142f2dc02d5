"""A notary's desk: it certifies an order once it has set aside the money that it takes, an agreement's opening of a
channel or a move of stake.

Promises that no two orders it certified take more than their owners have free and staked, that it certifies one order
for a sequence number, and that it answers what it was asked before as it did, across restarts.
What it sets aside it gives back when the order is folded, for then its own ledger holds the money, or when a quorum
of notaries has promised never to certify it, and never because time passed: whoever holds enough signatures may show
them late. Sans-IO. Why it is so, and what an owner that orders twice can do: docs/decisions/0011-certified-openings.md.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import msgspec

from peer.certificate_messages import CertificateMessage, Certified, CertifyAsk, CertifyRefuse, CertifyRelease, Voided
from peer.desk import Desk
from peer.receipt_rows import Rows
from peer.settler import Settler
from peer.witness import Witness
from protocol import params
from protocol.certificate import (
    Order,
    asked_by_ns,
    certifiers,
    check_cosigned,
    check_voided,
    ordered_by,
    provable,
    signed_by,
    takes,
)
from protocol.codec import decode
from protocol.errors import VerificationFailed
from protocol.records import (
    Agreement,
    Envelope,
    StakeMove,
    Void,
    add_signature,
    decode_body,
    open_record,
    parties,
)

__all__ = ["Notary", "Reservation"]

_OF_WHOM = {
    (Agreement, "free"): "submitter's balance",
    (Agreement, "stake"): "solver's stake",
    (StakeMove, "free"): "owner's balance",
    (StakeMove, "stake"): "owner's stake",
}
CLEAN_NS = 60 * 10**9  # between two looks for promises that are too old to matter


class Reservation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A row. order: its envelope with its parties' signatures. void: its money is not set aside, and this notary never
    certifies it (again)."""

    order: bytes
    void: bool = False


@dataclass
class Notary:
    """See the module docstring. `witness` shows two orders of one number to everybody."""

    desk: Desk
    settler: Settler
    witness: Witness
    rows: dict[bytes, Reservation] = field(default_factory=dict)  # by the id of the order
    terms: dict[bytes, Order] = field(default_factory=dict)  # of the rows
    places: dict[tuple[bytes, int], bytes] = field(default_factory=dict)  # owner, sequence -> order
    free: Counter[bytes] = field(default_factory=Counter)  # micro-credits set aside of a peer's free balance
    stake: Counter[bytes] = field(default_factory=Counter)  # and of its stake
    count: Counter[bytes] = field(default_factory=Counter)  # rows of an owner
    strangers: set[bytes] = field(default_factory=set)  # rows of owners that never had money: promises alone
    clean_ns: int = 0

    # --- what it is asked ------------------------------------------------------------------------------------
    def message(self, peer: bytes, message: CertificateMessage) -> None:
        """Answer one. Raises VerificationFailed for what no honest peer sends a notary."""
        match message:
            case CertifyAsk():
                self.desk.send(peer, self.on_ask(peer, message))
            case CertifyRelease():
                self._on_release(peer, message)
            case _:
                raise VerificationFailed("a notary's answer where nothing was asked")

    def on_ask(self, peer: bytes, message: CertifyAsk) -> CertificateMessage:
        """Certify, refuse, or promise never to. Raises VerificationFailed."""
        order, order_id, signers = open_record(message.agreement, network=self.desk.network.id)
        if not isinstance(order, Agreement | StakeMove) or peer not in parties(order):
            raise VerificationFailed("a certificate is for an agreement or a move of stake, and for its parties")
        shown = check_cosigned(order, signers, self.desk.network)
        if self.desk.me not in certifiers(self.desk.network, order):
            raise VerificationFailed("this peer certifies nothing of that order")
        known = self.rows.get(order_id)
        if known is not None and known.void:
            return self._promise(order_id)
        if known is None and order_id not in self.settler.log:
            # It signs by the later of its two clocks and promises by the earlier: it never does both.
            late_ns = max(self.desk.now_ns, self.desk.wall_ns) - asked_by_ns(order)
            unstoppable = len(shown) >= provable(self.desk.network) and late_ns < params.CERTIFY_NEVER_NS
            if message.end and not unstoppable:
                return self._end(order, order_id, message.agreement)
            refusal = self._refuse(order, order_id, message.agreement)
            if refusal is None and late_ns > params.CERTIFY_LATE_NS and not unstoppable:
                refusal = "late", f"it was to be accepted {late_ns // 10**9} s ago, by the clock of this notary"
            if refusal is not None:
                return CertifyRefuse(order_id, *refusal)
            self._hold(order_id, order, message.agreement)
        signed = add_signature(message.agreement, self.desk.key, network=self.desk.network.id)
        signatures = dict(msgspec.msgpack.decode(signed, type=Envelope).signatures)
        return Certified(order_id, signatures[self.desk.me])

    def _refuse(self, order: Order, order_id: bytes, envelope: bytes) -> tuple[str, str] | None:
        """Why it cannot be certified now, whatever the hour."""
        if refusal := self._taken(order, order_id, envelope) or self._full(order):
            return refusal
        if isinstance(order, StakeMove):
            # Or it would hold the money of an owner with a fast clock back for as long as nobody may fold it.
            if order.created_ns > self.desk.wall_ns + params.CLOCK_SKEW_NS_MAX:
                return "early", "it is dated too far ahead of the clock of this notary"
            lost = self.settler.stakes.lost[order.owner]
            if order.kind == "withdraw" and order.lost_micro != lost:
                return "stake", f"its owner lost {lost} of its stake by what is known here, it says {order.lost_micro}"
            if order.kind == "withdraw" and self.settler.stakes.crowded(order.owner):
                return "busy", f"{params.UNBONDINGS_OF_OWNER_MAX} withdrawals of its owner are under way"
        elif order.first_segment >= order.last_segment or not order.operations or not order.channel_micro:
            raise VerificationFailed("an agreement about no work, or without a channel")
        for peer, bucket, micro in takes(order):
            left = self.settler.free_micro(peer) - self.free[peer]
            if bucket == "stake":
                left = self.settler.free_stake(peer) - self.stake[peer]
            if left < micro:
                code = "funds" if bucket == "free" else "stake"
                return code, f"it takes {micro} of the {_OF_WHOM[type(order), bucket]}, {left} are free"
        return None

    def _taken(self, order: Order, order_id: bytes, envelope: bytes) -> tuple[str, str] | None:
        """Whether another order has the sequence number: then both together prove a fraud."""
        place = ordered_by(order)
        rival = self.places.get(place) or self.settler.sequences.get(place)
        if rival is None or rival == order_id:
            return None
        held = self.rows[rival].order if rival in self.rows else self.settler.log[rival]
        self.witness.convict(held, envelope)
        return "sequence", "its owner signed another order under the same sequence number"

    def _full(self, order: Order) -> tuple[str, str] | None:
        """Whether there is no room. Promises cost nothing to ask for, so those about the orders of keys without money
        have a share of their own, which leaves room for who has some."""
        owner, _ = ordered_by(order)
        mine = self.count[owner]
        known = self.desk.ledger.knows(owner)
        room = known or len(self.strangers) < params.RESERVATIONS_OF_STRANGERS_MAX
        if room and len(self.rows) < params.RESERVATIONS_MAX and mine < params.RESERVATIONS_PER_SUBMITTER_MAX:
            return None
        return "busy", f"this notary holds {len(self.rows)} orders that are not folded, {mine} of this owner"

    # --- given up --------------------------------------------------------------------------------------------
    def _end(self, order: Order, order_id: bytes, envelope: bytes) -> CertificateMessage:
        """Promise never to certify an order, when it is too late for it to be asked for in earnest."""
        self._taken(order, order_id, envelope)
        late_ns = min(self.desk.now_ns, self.desk.wall_ns) - asked_by_ns(order)
        if late_ns <= params.CERTIFY_LATE_NS:
            wait_s = (params.CERTIFY_LATE_NS - late_ns) // 10**9 + 1
            return CertifyRefuse(order_id, "early", f"it may still be asked for in earnest for {wait_s} s")
        if late_ns < params.CERTIFY_NEVER_NS:  # beyond that nothing is certified anyhow, and nothing has to be kept
            if refusal := self._full(order):
                return CertifyRefuse(order_id, *refusal)
            self._hold(order_id, order, envelope, void=True)
        return self._promise(order_id)

    def _promise(self, order_id: bytes) -> Voided:
        return Voided(self.desk.seal(Void(network=self.desk.network.id, notary=self.desk.me, agreement=order_id)))

    def _on_release(self, peer: bytes, message: CertifyRelease) -> None:
        """A quorum never certifies what this notary did: what it set aside is free."""
        known = self.rows.get(message.agreement)
        if known is None:
            return
        order = self.terms[message.agreement]
        if peer not in parties(order):
            raise VerificationFailed("an order is given up by its parties")
        check_voided(message.voids, message.agreement, order, self.desk.network)
        if not known.void:
            self._drop(message.agreement)
            self._hold(message.agreement, order, known.order, void=True)
        self.desk.send(peer, self._promise(message.agreement))

    # --- the table -------------------------------------------------------------------------------------------
    def _hold(self, order_id: bytes, order: Order, envelope: bytes, *, void: bool = False) -> None:
        row = Reservation(signed_by(envelope, parties(order)), void)
        self._place(order_id, order, row)
        self.desk.save("reservations", order_id, row)

    def _place(self, order_id: bytes, order: Order, row: Reservation) -> None:
        self.rows[order_id], self.terms[order_id] = row, order
        place = ordered_by(order)
        if not row.void or place not in self.places:
            self.places[place] = order_id
        self.count[place[0]] += 1
        if not self.desk.ledger.knows(place[0]):
            self.strangers.add(order_id)
        if not row.void:
            for peer, bucket, micro in takes(order):
                (self.free if bucket == "free" else self.stake)[peer] += micro

    def _drop(self, order_id: bytes) -> None:
        row, order = self.rows.pop(order_id), self.terms.pop(order_id)
        place = ordered_by(order)
        if self.places.get(place) == order_id:
            del self.places[place]
        self.count[place[0]] -= 1
        self.strangers.discard(order_id)
        if not row.void:
            for peer, bucket, micro in takes(order):
                (self.free if bucket == "free" else self.stake)[peer] -= micro
        for counter in (self.count, self.free, self.stake):
            for peer in parties(order):
                if not counter[peer]:
                    del counter[peer]
        self.desk.save("reservations", order_id, None)

    def opened(self, order_id: bytes) -> None:
        """Settler: the order is folded, so the ledger has the money where it belongs."""
        if order_id in self.rows:
            self._drop(order_id)

    def tick(self) -> None:
        """Forget promises about orders that nothing can certify any more."""
        if self.desk.now_ns < self.clean_ns:
            return
        self.clean_ns = self.desk.now_ns + CLEAN_NS
        oldest_ns = min(self.desk.now_ns, self.desk.wall_ns) - params.CERTIFY_NEVER_NS - params.CLOCK_SKEW_NS_MAX
        for order_id, row in list(self.rows.items()):
            if row.void and asked_by_ns(self.terms[order_id]) < oldest_ns:
                self._drop(order_id)

    def restore(self, rows: Rows) -> None:
        """What was set aside stays so, but for what is folded by now."""
        for order_id, value in rows("reservations"):
            row = decode(Reservation, value, bytes_max=params.STORE_VALUE_BYTES_MAX)
            body = msgspec.msgpack.decode(row.order, type=Envelope).body
            order = decode_body(body, network=self.desk.network.id)
            assert isinstance(order, Agreement | StakeMove), "it was certified as one"
            if order_id not in self.settler.log:
                self._place(order_id, order, row)
