"""A notary's desk for openings: it certifies an agreement once it has set aside the money that its channel takes.

Promises that no two agreements it certified take more than their submitter has free or their solver has staked, that it
certifies one agreement for a sequence number, and that it answers what it was asked before as it did, across restarts.
What it sets aside it gives back when the opening is folded, for then its own ledger holds the money, or when a quorum
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
from protocol.certificate import certifiers, check_cosigned, check_voided, provable, signed_by
from protocol.codec import decode
from protocol.errors import VerificationFailed
from protocol.records import Agreement, Envelope, Void, add_signature, decode_body, open_record

__all__ = ["Notary", "Reservation"]

CLEAN_NS = 60 * 10**9  # between two looks for promises that are too old to matter


class Reservation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A row. agreement: its envelope with both parties' signatures. void: its money is not set aside, and this notary
    never certifies it (again)."""

    agreement: bytes
    void: bool = False


@dataclass
class Notary:
    """See the module docstring. `witness` shows two agreements of one number to everybody."""

    desk: Desk
    settler: Settler
    witness: Witness
    rows: dict[bytes, Reservation] = field(default_factory=dict)  # by agreement
    terms: dict[bytes, Agreement] = field(default_factory=dict)  # of the rows
    places: dict[tuple[bytes, int], bytes] = field(default_factory=dict)  # submitter, sequence -> agreement
    free: Counter[bytes] = field(default_factory=Counter)  # micro-credits set aside of a submitter's free balance
    stake: Counter[bytes] = field(default_factory=Counter)  # and of a solver's stake
    count: Counter[bytes] = field(default_factory=Counter)  # rows of a submitter
    strangers: set[bytes] = field(default_factory=set)  # rows of submitters that never had money: promises alone
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
        agreement, agreement_id, signers = open_record(message.agreement, network=self.desk.network.id)
        if not isinstance(agreement, Agreement) or peer not in (agreement.submitter, agreement.solver):
            raise VerificationFailed("a certificate is for an agreement, and for its parties")
        shown = check_cosigned(agreement, signers, self.desk.network)
        if self.desk.me not in certifiers(self.desk.network, agreement):
            raise VerificationFailed("this peer certifies no opening of that agreement")
        known = self.rows.get(agreement_id)
        if known is not None and known.void:
            return self._promise(agreement_id)
        if known is None and agreement_id not in self.settler.channels:
            # It signs by the later of its two clocks and promises by the earlier: it never does both.
            late_ns = max(self.desk.now_ns, self.desk.wall_ns) - agreement.accept_before_ns
            unstoppable = len(shown) >= provable(self.desk.network) and late_ns < params.CERTIFY_NEVER_NS
            if message.end and not unstoppable:
                return self._end(agreement, agreement_id, message.agreement)
            refusal = self._refuse(agreement, agreement_id, message.agreement)
            if refusal is None and late_ns > params.CERTIFY_LATE_NS and not unstoppable:
                refusal = "late", f"it was to be accepted {late_ns // 10**9} s ago, by the clock of this notary"
            if refusal is not None:
                return CertifyRefuse(agreement_id, *refusal)
            self._hold(agreement_id, agreement, message.agreement)
        signed = add_signature(message.agreement, self.desk.key, network=self.desk.network.id)
        signatures = dict(msgspec.msgpack.decode(signed, type=Envelope).signatures)
        return Certified(agreement_id, signatures[self.desk.me])

    def _refuse(self, agreement: Agreement, agreement_id: bytes, envelope: bytes) -> tuple[str, str] | None:
        """Why it cannot be certified now, whatever the hour."""
        if refusal := self._taken(agreement, agreement_id, envelope) or self._full(agreement):
            return refusal
        if agreement.first_segment >= agreement.last_segment or not agreement.operations or not agreement.channel_micro:
            raise VerificationFailed("an agreement about no work, or without a channel")
        free, stake = self.settler.free_micro(agreement.submitter), self.settler.free_stake(agreement.solver)
        left = free - self.free[agreement.submitter]
        if left < agreement.channel_micro:
            return "funds", f"the channel takes {agreement.channel_micro} of the submitter's, {left} are free"
        left = stake - self.stake[agreement.solver]
        if left < agreement.lock_micro:
            return "stake", f"the lock takes {agreement.lock_micro} of the solver's stake, {left} are free"
        return None

    def _taken(self, agreement: Agreement, agreement_id: bytes, envelope: bytes) -> tuple[str, str] | None:
        """Whether another agreement has the sequence number: then both together prove a fraud."""
        place = (agreement.submitter, agreement.sequence)
        rival = self.places.get(place) or self.settler.sequences.get(place)
        if rival is None or rival == agreement_id:
            return None
        held = self.rows[rival].agreement if rival in self.rows else self.settler.log[rival]
        self.witness.convict(held, envelope)
        return "sequence", "its submitter signed another agreement under the same sequence number"

    def _full(self, agreement: Agreement) -> tuple[str, str] | None:
        """Whether there is no room. Promises cost nothing to ask for, so those about the orders of keys without money
        have a share of their own, which leaves room for who has some."""
        mine = self.count[agreement.submitter]
        known = self.desk.ledger.knows(agreement.submitter)
        room = known or len(self.strangers) < params.RESERVATIONS_OF_STRANGERS_MAX
        if room and len(self.rows) < params.RESERVATIONS_MAX and mine < params.RESERVATIONS_PER_SUBMITTER_MAX:
            return None
        return "busy", f"this notary holds {len(self.rows)} agreements that are not open, {mine} of this submitter"

    # --- given up --------------------------------------------------------------------------------------------
    def _end(self, agreement: Agreement, agreement_id: bytes, envelope: bytes) -> CertificateMessage:
        """Promise never to certify an agreement, when it is too late for it to be asked for in earnest."""
        self._taken(agreement, agreement_id, envelope)
        late_ns = min(self.desk.now_ns, self.desk.wall_ns) - agreement.accept_before_ns
        if late_ns <= params.CERTIFY_LATE_NS:
            wait_s = (params.CERTIFY_LATE_NS - late_ns) // 10**9 + 1
            return CertifyRefuse(agreement_id, "early", f"it may still be asked for in earnest for {wait_s} s")
        if late_ns < params.CERTIFY_NEVER_NS:  # beyond that nothing is certified anyhow, and nothing has to be kept
            if refusal := self._full(agreement):
                return CertifyRefuse(agreement_id, *refusal)
            self._hold(agreement_id, agreement, envelope, void=True)
        return self._promise(agreement_id)

    def _promise(self, agreement_id: bytes) -> Voided:
        return Voided(self.desk.seal(Void(network=self.desk.network.id, notary=self.desk.me, agreement=agreement_id)))

    def _on_release(self, peer: bytes, message: CertifyRelease) -> None:
        """A quorum never certifies what this notary did: what it set aside is free."""
        known = self.rows.get(message.agreement)
        if known is None:
            return
        agreement = self.terms[message.agreement]
        if peer not in (agreement.submitter, agreement.solver):
            raise VerificationFailed("an agreement is given up by its parties")
        check_voided(message.voids, message.agreement, agreement, self.desk.network)
        if not known.void:
            self._drop(message.agreement)
            self._hold(message.agreement, agreement, known.agreement, void=True)
        self.desk.send(peer, self._promise(message.agreement))

    # --- the table -------------------------------------------------------------------------------------------
    def _hold(self, agreement_id: bytes, agreement: Agreement, envelope: bytes, *, void: bool = False) -> None:
        row = Reservation(signed_by(envelope, (agreement.submitter, agreement.solver)), void)
        self._place(agreement_id, agreement, row)
        self.desk.save("reservations", agreement_id, row)

    def _place(self, agreement_id: bytes, agreement: Agreement, row: Reservation) -> None:
        self.rows[agreement_id], self.terms[agreement_id] = row, agreement
        place = (agreement.submitter, agreement.sequence)
        if not row.void or place not in self.places:
            self.places[place] = agreement_id
        self.count[agreement.submitter] += 1
        if not self.desk.ledger.knows(agreement.submitter):
            self.strangers.add(agreement_id)
        if not row.void:
            self.free[agreement.submitter] += agreement.channel_micro
            self.stake[agreement.solver] += agreement.lock_micro

    def _drop(self, agreement_id: bytes) -> None:
        row, agreement = self.rows.pop(agreement_id), self.terms.pop(agreement_id)
        place = (agreement.submitter, agreement.sequence)
        if self.places.get(place) == agreement_id:
            del self.places[place]
        self.count[agreement.submitter] -= 1
        self.strangers.discard(agreement_id)
        if not row.void:
            self.free[agreement.submitter] -= agreement.channel_micro
            self.stake[agreement.solver] -= agreement.lock_micro
        for counter in (self.count, self.free, self.stake):
            for peer in (agreement.submitter, agreement.solver):
                if not counter[peer]:
                    del counter[peer]
        self.desk.save("reservations", agreement_id, None)

    def opened(self, agreement_id: bytes) -> None:
        """Settler: the opening is folded, so the ledger has the money where it belongs."""
        if agreement_id in self.rows:
            self._drop(agreement_id)

    def tick(self) -> None:
        """Forget promises about agreements that nothing can open any more."""
        if self.desk.now_ns < self.clean_ns:
            return
        self.clean_ns = self.desk.now_ns + CLEAN_NS
        oldest_ns = min(self.desk.now_ns, self.desk.wall_ns) - params.CERTIFY_NEVER_NS - params.CLOCK_SKEW_NS_MAX
        for agreement_id, row in list(self.rows.items()):
            if row.void and self.terms[agreement_id].accept_before_ns < oldest_ns:
                self._drop(agreement_id)

    def restore(self, rows: Rows) -> None:
        """What was set aside stays so, but for what is open by now."""
        for agreement_id, value in rows("reservations"):
            row = decode(Reservation, value, bytes_max=params.STORE_VALUE_BYTES_MAX)
            body = msgspec.msgpack.decode(row.agreement, type=Envelope).body
            agreement = decode_body(body, network=self.desk.network.id)
            assert isinstance(agreement, Agreement), "it was certified as one"
            if agreement_id not in self.settler.channels:
                self._place(agreement_id, agreement, row)
