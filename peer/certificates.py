"""The parties' side of a certified order: whom they ask, how long, and how what was given up comes to an end.

The submitter asks every notary once both parties signed, and again until a quorum has signed or the time is over; then
the deal is declined with the reason they gave. From then on either party, for each holds what both signed, sees to it
that no notary sets money aside for it for ever: what f + 1 notaries signed is asked of all, opened and claimed back;
what fewer signed is given up by the promises of a quorum never to sign it, which free what those few set aside. A deal
is in doubt until one or the other: money of it is not promised again. A move of stake goes the same way, with its owner
as the one party. Sans-IO.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from peer.certificate_messages import CertificateMessage, Certified, CertifyAsk, CertifyRefuse, CertifyRelease, Voided
from peer.deals import Deal, agreement_of, save
from peer.desk import Desk
from peer.moves import Moves, Moving
from peer.notary import Notary
from peer.receipt_rows import Rows
from peer.settler import Settler
from peer.witness import Witness
from protocol import params
from protocol.certificate import Bucket, Order, asked_by_ns, attach, certifiers, takes, takes_certificate
from protocol.equivocation import ordered_twice
from protocol.errors import LimitExceeded, VerificationFailed
from protocol.lifecycle import State
from protocol.records import Equivocation, StakeMove, Void, open_record

__all__ = ["Certificates"]


@dataclass
class _Asked:
    """One order in doubt, and what each notary said of it last. The signatures come again after a restart."""

    deal: Deal | Moving
    order: Order
    signatures: dict[bytes, bytes] = field(default_factory=dict)
    refusals: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    voids: dict[bytes, bytes] = field(default_factory=dict)
    resend_ns: int = 0

    @property
    def given_up(self) -> bool:
        """Whether nobody wants it any more."""
        return self.deal.given_up if isinstance(self.deal, Moving) else self.deal.lifecycle == State.DECLINED

    @property
    def envelope(self) -> bytes:
        """The order with the signatures of its parties, and those that were put to it."""
        return self.deal.envelope if isinstance(self.deal, Moving) else self.deal.agreement

    @property
    def ours(self) -> bool:
        """Whether this peer has it certified, not the other party."""
        return isinstance(self.deal, Moving) or self.deal.side != "solver"

    def never(self, quorum: int) -> bool:
        """Whether it is certain that it never stands, though some notary may hold its money back still."""
        return len(self.voids) >= quorum


@dataclass
class Certificates:
    """See the module docstring. `on_certified` opens the submitter's deal, `on_refused` declines it (code, why); the
    other two do the same with the house's pay for availability (peer/house.py)."""

    desk: Desk
    settler: Settler
    witness: Witness
    on_certified: Callable[[Deal], None] = lambda _: None
    on_refused: Callable[[Deal, str, str], None] = lambda *_: None
    on_pay_certified: Callable[[Deal], None] = lambda _: None
    on_pay_refused: Callable[[Deal, str, str], None] = lambda *_: None
    asked: dict[bytes, _Asked] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.notary = Notary(self.desk, self.settler, self.witness)
        self.moves = Moves(self.desk, self.settler, self.certify_move, self.in_doubt_micro)
        self.witness.on_caught = self._caught_here

    def watch(self, deal: Deal) -> None:
        """Both parties signed: it is in doubt from here on, if it takes a certificate. The caller journals the deal."""
        agreement = agreement_of(deal, self.desk.network.id)
        if takes_certificate(agreement, self.desk.network):
            deal.doubt = True
            self.asked[deal.id] = _Asked(deal, agreement)

    def certify(self, deal: Deal) -> None:
        """The submitter has the solver's signature: journal that, and ask the notaries, if it takes them."""
        self.watch(deal)
        save(self.desk, deal)
        if deal.doubt:
            self._tick(self.asked[deal.id])
        else:
            self._open_it(deal)

    def _open_it(self, deal: Deal) -> None:
        (self.on_pay_certified if deal.side == "house" else self.on_certified)(deal)

    def certify_move(self, row: Moving) -> None:
        """This peer signed a move of its stake: journal that, and ask the notaries from the next tick on."""
        row.doubt = True
        self._watch_move(row)
        self._keep(self.asked[row.id])

    def _watch_move(self, row: Moving) -> None:
        move, _, _ = open_record(row.envelope, network=self.desk.network.id)
        assert isinstance(move, StakeMove), "it was signed here as one"
        self.asked[row.id] = _Asked(row, move)

    def _keep(self, asked: _Asked) -> None:
        if isinstance(asked.deal, Moving):
            self.moves.save(asked.deal)
        else:
            save(self.desk, asked.deal)

    def in_doubt_micro(self, bucket: Bucket) -> int:
        """What orders in doubt may still take of this peer's free credits or stake. Not to be promised again: two
        orders of an honest peer must not starve each other. Free credits: jobs reserve what theirs take."""
        counted = (
            one
            for one in self._open()
            if bucket == "stake" or isinstance(one.deal, Moving) or one.deal.side == "house"
        )
        return sum(self._takes(one, bucket) for one in counted)

    def _takes(self, asked: _Asked, bucket: Bucket) -> int:
        return sum(micro for peer, of, micro in takes(asked.order) if (peer, of) == (self.desk.me, bucket))

    def _open(self) -> list[_Asked]:
        """The orders that may stand yet: they may take money of this peer."""
        quorum = self.desk.network.notary_quorum
        return [asked for asked in self.asked.values() if not asked.never(quorum)]

    def caught(self, proof: Equivocation, envelope: bytes) -> None:
        """Two records of one place, shown by somebody: a bar, and of two orders a stake. Raises as they do."""
        self.witness.on_proof(proof)
        self._log(proof, envelope)

    def _caught_here(self, proof: Equivocation, envelope: bytes) -> None:
        with suppress(LimitExceeded):  # one pair more or less: whoever asked this notary must have its answer
            self._log(proof, envelope)

    def _log(self, proof: Equivocation, envelope: bytes) -> None:
        if ordered_twice(proof) is not None:
            self.settler.accept(envelope)

    # --- what is said ----------------------------------------------------------------------------------------
    def message(self, peer: bytes, message: CertificateMessage) -> None:
        """Asked of this peer as a notary, or an answer to what it asked. Raises VerificationFailed."""
        match message:
            case Certified(agreement=agreement_id, signature=signature):
                self._on_signature(peer, agreement_id, signature)
            case CertifyRefuse(agreement=agreement_id, code=code, why=why):
                if (asked := self._asked_of(peer, agreement_id)) is not None:
                    asked.refusals[peer] = (code[:40], why[:300])
            case Voided(void=void):
                self._on_void(peer, void)
            case _:
                self.notary.message(peer, message)

    def _asked_of(self, peer: bytes, agreement_id: bytes) -> _Asked | None:
        asked = self.asked.get(agreement_id)
        if asked is not None and peer not in certifiers(self.desk.network, asked.order):
            raise VerificationFailed("an order is certified by the notaries that are no party to it")
        return asked

    def _on_signature(self, peer: bytes, agreement_id: bytes, signature: bytes) -> None:
        asked = self._asked_of(peer, agreement_id)
        if asked is None or peer in asked.signatures:
            return
        open_record(attach(asked.envelope, {peer: signature}), network=self.desk.network.id)
        asked.signatures[peer] = signature
        asked.refusals.pop(peer, None)
        if len(asked.signatures) >= self.desk.network.notary_quorum:
            self._certified(asked)
        elif asked.never(self.desk.network.notary_quorum):
            self._release(asked)

    def _on_void(self, peer: bytes, envelope: bytes) -> None:
        void, _, _ = open_record(envelope, network=self.desk.network.id)
        if not isinstance(void, Void) or void.notary != peer:
            raise VerificationFailed("a promise never to certify comes from its notary")
        asked = self._asked_of(peer, void.agreement)
        if asked is None:
            return
        asked.voids[peer] = envelope
        if asked.never(self.desk.network.notary_quorum):
            self._release(asked)

    # --- what comes of it ------------------------------------------------------------------------------------
    def _certified(self, asked: _Asked) -> None:
        """A quorum signed: the move stands, the deal opens; where it was given up, to claim what it holds back."""
        deal, envelope = asked.deal, attach(asked.envelope, asked.signatures)
        if isinstance(deal, Moving):
            deal.envelope = envelope
        else:
            deal.agreement = envelope
        self._keep(asked)
        if isinstance(deal, Moving) or asked.given_up:
            self.settler.accept(envelope, publish=True)
        else:
            self._open_it(deal)

    def _release(self, asked: _Asked) -> None:
        """A quorum never signs: who did lets go of the money. One that has said nothing yet may have signed too, and
        the answer got lost: it is asked on, for a day, or it held the money back for ever."""
        voids = tuple(envelope for _, envelope in sorted(asked.voids.items()))
        left = [n for n in certifiers(self.desk.network, asked.order) if n not in asked.voids]
        for notary in left:
            if notary in asked.signatures:
                self.desk.send(notary, CertifyRelease(asked.deal.id, voids))
        late_ns = min(self.desk.now_ns, self.desk.wall_ns) - asked_by_ns(asked.order)
        silent = not asked.signatures.keys() & set(left)
        if not left or (silent and late_ns > params.CERTIFY_NEVER_NS):
            self._settled(asked)

    def _settled(self, asked: _Asked) -> None:
        del self.asked[asked.deal.id]
        asked.deal.doubt = False
        if isinstance(asked.deal, Moving):
            asked.deal.void = asked.deal.id not in self.settler.log
        self._keep(asked)

    def opened(self, order_id: bytes) -> None:
        """Settler: an order is folded, whoever had it certified."""
        self.notary.opened(order_id)
        if (asked := self.asked.get(order_id)) is not None:
            self._settled(asked)

    def moved(self, move_id: bytes) -> None:
        """Settler: a move of stake is folded."""
        self.opened(move_id)
        self.moves.folded(move_id)

    # --- time ------------------------------------------------------------------------------------------------
    def tick(self) -> None:
        """Ask again, and give up what took too long."""
        for asked in list(self.asked.values()):
            self.desk.attempt(self._tick, asked)
        self.notary.tick()

    def _tick(self, asked: _Asked) -> None:
        if asked.deal.id in self.settler.log:
            self._settled(asked)
        elif asked.given_up:
            if self.desk.now_ns >= asked.resend_ns:
                asked.resend_ns = self.desk.now_ns + params.CERTIFY_END_NS
                self._end(asked)
        elif asked.ours:
            self._press(asked)

    def _press(self, asked: _Asked) -> None:
        """Ask for the certificate of an order that is wanted, or give it up."""
        if refusal := self._hopeless(asked):
            asked.resend_ns = 0
            if isinstance(asked.deal, Moving):
                self.moves.refused(asked.deal, *refusal)
            else:
                asked.deal.uncertified = refusal[0]
                (self.on_pay_refused if asked.deal.side == "house" else self.on_refused)(asked.deal, *refusal)
        elif self.desk.now_ns >= asked.resend_ns and self._short(asked) is None:
            asked.resend_ns = self.desk.now_ns + params.RESEND_NS
            self._ask(asked, end=False)

    def _short(self, asked: _Asked) -> str | None:
        """What is left of the own balance, or stake, beside other orders in doubt, if that is too little for this one,
        in words."""
        held: dict[Bucket, int] = {"free": self.settler.free_micro(self.desk.me)}
        held["stake"] = self.settler.free_stake(self.desk.me)
        for bucket, micro in held.items():
            wanted = self._takes(asked, bucket)
            left = micro - sum(self._takes(other, bucket) for other in self._open() if other is not asked)
            if wanted and left < wanted:
                return f"{left} micro-credits of {bucket} are left beside orders that are not ended yet"
        return None

    def _hopeless(self, asked: _Asked) -> tuple[str, str] | None:
        """Why no quorum will sign in time, or None while it may."""
        quorum, able = self.desk.network.notary_quorum, certifiers(self.desk.network, asked.order)
        if not able:
            return "notaries", f"its parties are notaries, and fewer than {quorum} others are left to certify it"
        codes = Counter(code for code, _ in asked.refusals.values())
        over_ns = asked.deal.entered_ns + 2 * self.desk.network.rules.proposal_ms * 10**6  # one for the solver
        if codes["sequence"] <= len(able) - quorum and self.desk.now_ns < over_ns:
            return None
        if short := self._short(asked):
            return "funds", short
        heard = len(asked.signatures) + len(asked.refusals)
        if not codes:
            return "silence", f"{heard} of {len(able)} notaries answered in time, {quorum} certify an order"
        (code, count), *_ = sorted(codes.items(), key=lambda item: (-item[1], item[0]))
        why = next(why for known, why in asked.refusals.values() if known == code)
        return code, f"{count} of {len(able)} notaries did not certify it: {why}"

    def _ask(self, asked: _Asked, *, end: bool) -> None:
        envelope = attach(asked.envelope, asked.signatures)
        for notary in certifiers(self.desk.network, asked.order):
            if notary not in asked.signatures and notary not in asked.voids:
                self.desk.send(notary, CertifyAsk(envelope, end))

    def _end(self, asked: _Asked) -> None:
        """One more step towards the end of a deal that was given up."""
        quorum = self.desk.network.notary_quorum
        if len(asked.signatures) >= quorum:
            self._certified(asked)
        elif not certifiers(self.desk.network, asked.order):
            self._settled(asked)
        else:
            self._ask(asked, end=True)
            if asked.never(quorum):
                self._release(asked)

    def restore(self, rows: Rows, *deals: Mapping[bytes, Deal]) -> None:
        """What this notary holds, and the deals of either side and moves that were in doubt: they still are."""
        self.notary.restore(rows)
        for each in deals:
            for deal in each.values():
                if deal.doubt:
                    self.watch(deal)
        self.moves.restore(rows)
        for row in self.moves.rows.values():
            if row.doubt:
                self._watch_move(row)
