"""The parties' side of a certified opening: whom they ask, how long, and how what was given up comes to an end.

The submitter asks every notary once both parties signed, and again until a quorum has signed or the time is over; then
the deal is declined with the reason they gave. From then on either party, for each holds what both signed, sees to it
that no notary sets money aside for it for ever: what f + 1 notaries signed is asked of all, opened and claimed back;
what fewer signed is given up by the promises of a quorum never to sign it, which free what those few set aside. A deal
is in doubt until one or the other: money of it is not promised again. Sans-IO.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from peer.certificate_messages import CertificateMessage, Certified, CertifyAsk, CertifyRefuse, CertifyRelease, Voided
from peer.deals import Deal, agreement_of, save
from peer.desk import Desk
from peer.notary import Notary
from peer.receipt_rows import Rows
from peer.settler import Settler
from peer.witness import Witness
from protocol import params
from protocol.certificate import attach, certifiers, takes_certificate
from protocol.equivocation import opened_twice
from protocol.errors import LimitExceeded, VerificationFailed
from protocol.lifecycle import State
from protocol.records import Agreement, Equivocation, Void, open_record

__all__ = ["Certificates"]


@dataclass
class _Asked:
    """One deal in doubt, and what each notary said of it last. The signatures come again after a restart."""

    deal: Deal
    agreement: Agreement
    signatures: dict[bytes, bytes] = field(default_factory=dict)
    refusals: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    voids: dict[bytes, bytes] = field(default_factory=dict)
    resend_ns: int = 0

    @property
    def given_up(self) -> bool:
        """Whether the deal will not be worked on."""
        return self.deal.lifecycle == State.DECLINED

    def never(self, quorum: int) -> bool:
        """Whether it is certain that it never opens, though some notary may hold its money back still."""
        return len(self.voids) >= quorum


@dataclass
class Certificates:
    """See the module docstring. `on_certified` opens the submitter's deal, `on_refused` declines it (code, why)."""

    desk: Desk
    settler: Settler
    witness: Witness
    on_certified: Callable[[Deal], None] = lambda _: None
    on_refused: Callable[[Deal, str, str], None] = lambda *_: None
    asked: dict[bytes, _Asked] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.notary = Notary(self.desk, self.settler, self.witness)
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
            self.on_certified(deal)

    def locks_in_doubt_micro(self) -> int:
        """What openings in doubt may still take of this peer's stake. Not to be promised again: two orders of an honest
        peer must not starve each other."""
        return sum(one.agreement.lock_micro for one in self._open() if one.deal.side == "solver")

    def _open(self) -> list[_Asked]:
        """The deals that may be opened yet: they may take money of this peer."""
        quorum = self.desk.network.notary_quorum
        return [asked for asked in self.asked.values() if not asked.never(quorum)]

    def caught(self, proof: Equivocation, envelope: bytes) -> None:
        """Two records of one place, shown by somebody: a bar, and of two openings a stake. Raises as they do."""
        self.witness.on_proof(proof)
        self._log(proof, envelope)

    def _caught_here(self, proof: Equivocation, envelope: bytes) -> None:
        with suppress(LimitExceeded):  # one pair more or less: whoever asked this notary must have its answer
            self._log(proof, envelope)

    def _log(self, proof: Equivocation, envelope: bytes) -> None:
        if opened_twice(proof) is not None:
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
        if asked is not None and peer not in certifiers(self.desk.network, asked.agreement):
            raise VerificationFailed("an opening is certified by the notaries that are no party to it")
        return asked

    def _on_signature(self, peer: bytes, agreement_id: bytes, signature: bytes) -> None:
        asked = self._asked_of(peer, agreement_id)
        if asked is None or peer in asked.signatures:
            return
        open_record(attach(asked.deal.agreement, {peer: signature}), network=self.desk.network.id)
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
        """A quorum signed: open it, or where the deal was given up, open it to claim what it holds back."""
        deal = asked.deal
        deal.agreement = attach(deal.agreement, asked.signatures)
        save(self.desk, deal)
        if asked.given_up:
            self.settler.accept(deal.agreement, publish=True)
        else:
            self.on_certified(deal)

    def _release(self, asked: _Asked) -> None:
        """A quorum never signs: who did lets go of the money. One that has said nothing yet may have signed too, and
        the answer got lost: it is asked on, for a day, or it held the money back for ever."""
        voids = tuple(envelope for _, envelope in sorted(asked.voids.items()))
        left = [n for n in certifiers(self.desk.network, asked.agreement) if n not in asked.voids]
        for notary in left:
            if notary in asked.signatures:
                self.desk.send(notary, CertifyRelease(asked.deal.id, voids))
        late_ns = min(self.desk.now_ns, self.desk.wall_ns) - asked.agreement.accept_before_ns
        silent = not asked.signatures.keys() & set(left)
        if not left or (silent and late_ns > params.CERTIFY_NEVER_NS):
            self._settled(asked)

    def _settled(self, asked: _Asked) -> None:
        del self.asked[asked.deal.id]
        asked.deal.doubt = False
        save(self.desk, asked.deal)

    def opened(self, agreement_id: bytes) -> None:
        """Settler: a channel is open, whoever had it certified."""
        self.notary.opened(agreement_id)
        if (asked := self.asked.get(agreement_id)) is not None:
            self._settled(asked)

    # --- time ------------------------------------------------------------------------------------------------
    def tick(self) -> None:
        """Ask again, and give up what took too long."""
        for asked in list(self.asked.values()):
            self.desk.attempt(self._tick, asked)
        self.notary.tick()

    def _tick(self, asked: _Asked) -> None:
        deal = asked.deal
        if deal.id in self.settler.channels:
            self._settled(asked)
        elif asked.given_up:
            if self.desk.now_ns >= asked.resend_ns:
                asked.resend_ns = self.desk.now_ns + params.CERTIFY_END_NS
                self._end(asked)
        elif deal.side == "submitter":
            self._press(asked)

    def _press(self, asked: _Asked) -> None:
        """Ask for the certificate of a deal that is wanted, or decline it."""
        agreement, now = asked.agreement, self.desk.now_ns
        if refusal := self._hopeless(asked):
            asked.resend_ns = 0
            asked.deal.uncertified = refusal[0]
            self.on_refused(asked.deal, *refusal)
        elif now >= asked.resend_ns and self._left(asked) >= agreement.channel_micro:
            asked.resend_ns = now + params.RESEND_NS
            self._ask(asked, end=False)

    def _left(self, asked: _Asked) -> int:
        """What is left of the own balance for this channel."""
        others = [a for a in self._open() if a.deal.side == "submitter" and a is not asked]
        return self.settler.free_micro(self.desk.me) - sum(other.agreement.channel_micro for other in others)

    def _hopeless(self, asked: _Asked) -> tuple[str, str] | None:
        """Why no quorum will sign in time, or None while it may."""
        quorum, able = self.desk.network.notary_quorum, certifiers(self.desk.network, asked.agreement)
        if not able:
            return "notaries", f"its parties are notaries, and fewer than {quorum} others are left to certify it"
        codes = Counter(code for code, _ in asked.refusals.values())
        over_ns = asked.deal.entered_ns + 2 * self.desk.network.rules.proposal_ms * 10**6  # one for the solver
        if codes["sequence"] <= len(able) - quorum and self.desk.now_ns < over_ns:
            return None
        if self._left(asked) < asked.agreement.channel_micro:
            return "funds", f"{self._left(asked)} micro-credits are left beside openings that are not ended yet"
        heard = len(asked.signatures) + len(asked.refusals)
        if not codes:
            return "silence", f"{heard} of {len(able)} notaries answered in time, {quorum} certify an opening"
        (code, count), *_ = sorted(codes.items(), key=lambda item: (-item[1], item[0]))
        why = next(why for known, why in asked.refusals.values() if known == code)
        return code, f"{count} of {len(able)} notaries did not certify the opening: {why}"

    def _ask(self, asked: _Asked, *, end: bool) -> None:
        envelope = attach(asked.deal.agreement, asked.signatures)
        for notary in certifiers(self.desk.network, asked.agreement):
            if notary not in asked.signatures and notary not in asked.voids:
                self.desk.send(notary, CertifyAsk(envelope, end))

    def _end(self, asked: _Asked) -> None:
        """One more step towards the end of a deal that was given up."""
        quorum = self.desk.network.notary_quorum
        if len(asked.signatures) >= quorum:
            self._certified(asked)
        elif not certifiers(self.desk.network, asked.agreement):
            self._settled(asked)
        else:
            self._ask(asked, end=True)
            if asked.never(quorum):
                self._release(asked)

    def restore(self, rows: Rows, *deals: Mapping[bytes, Deal]) -> None:
        """What this notary holds, and the deals of either side that were in doubt: they still are."""
        self.notary.restore(rows)
        for each in deals:
            for deal in each.values():
                if deal.doubt:
                    self.watch(deal)
