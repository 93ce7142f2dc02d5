"""From the proof to the draw, for the submitter: a commitment to all states, both seeds, the notaries' randomness.

Each comes after the one before it, and none twice: nobody chooses what is checked. Sans-IO.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peer.beacon import Beacons
from peer.checking import CheckDesk
from peer.deals import Deal, agreement_of, move, proof_root, save
from peer.desk import Desk
from peer.evidence import open_seeds
from peer.messages import ProofOffer, RevealOffer
from peer.receipt_rows import ReceiptRows
from protocol import params
from protocol.errors import VerificationFailed
from protocol.forced import draws_from
from protocol.lifecycle import Event, State
from protocol.records import Proof, Reveal, open_record
from protocol.sampling import check_reveal

__all__ = ["Drawing"]


@dataclass
class Drawing:
    """See the module docstring. `deals` and `receipts` are the submitter's own."""

    desk: Desk
    checks: CheckDesk
    beacons: Beacons
    deals: dict[bytes, Deal]
    receipts: ReceiptRows
    resend: dict[bytes, int] = field(default_factory=dict)

    def on_proof(self, peer: bytes, message: ProofOffer) -> None:
        """The solver's commitment to all checkpoints: check it against the receipts and reveal our seed."""
        record, proof_id, _ = open_record(message.proof, network=self.desk.network.id)
        if not isinstance(record, Proof) or record.author != peer:
            raise VerificationFailed("a proof comes from its solver")
        deal = self.deals.get(record.agreement)
        if deal is None or peer != self._solver(deal):
            raise VerificationFailed("proof of an agreement this peer does not have")
        if deal.proof:
            if deal.proof_id != proof_id and not deal.ended_early:
                self.desk.penalise(peer, "a second proof for one agreement")
            elif deal.own_reveal:
                self.desk.send(peer, RevealOffer(deal.own_reveal))
            return
        agreement = agreement_of(deal, self.desk.network.id)
        if deal.lifecycle != State.RUNNING or deal.receipts != agreement.last_segment - agreement.first_segment:
            return
        if (record.root, record.receipts, record.last_receipt) != (
            proof_root(self.receipts[deal.id], self.desk.network.id),
            deal.receipts,
            deal.last_receipt,
        ):
            raise VerificationFailed("the proof is not over the roots of its receipts")
        self.prove(deal, message.proof, proof_id, Event.PROOF_COMMITTED)

    def prove(self, deal: Deal, proof: bytes, proof_id: bytes, event: Event) -> None:
        """Take a proof of a deal, and reveal our seed."""
        deal.proof, deal.proof_id, deal.news_ns = proof, proof_id, self.desk.now_ns
        reveal = Reveal(
            network=self.desk.network.id,
            agreement=deal.id,
            proof=proof_id,
            author=self.desk.me,
            seed=deal.seed,
        )
        deal.own_reveal = self.desk.seal(reveal)
        move(self.desk, deal, event)
        self.send_proof(deal)
        self.desk.emit("proof", deal.job, deal=deal.id, proof=proof_id, receipts=deal.receipts)

    def send_proof(self, deal: Deal) -> None:
        """What the solver needs to reveal its seed: our proof where it gave none, and our own seed."""
        if deal.own_reveal and deal.ended_early:
            self.desk.send(self._solver(deal), ProofOffer(deal.proof))
        if deal.own_reveal:
            self.desk.send(self._solver(deal), RevealOffer(deal.own_reveal))

    def on_reveal(self, peer: bytes, message: RevealOffer) -> None:
        """The solver's seed: now the segments and the checkers are drawn."""
        record, _, _ = open_record(message.reveal, network=self.desk.network.id)
        if not isinstance(record, Reveal) or record.author != peer:
            raise VerificationFailed("a reveal comes from its author")
        deal = self.deals.get(record.agreement)
        if deal is None or peer != self._solver(deal) or record.proof != deal.proof_id:
            return
        agreement = agreement_of(deal, self.desk.network.id)
        check_reveal(record.seed, agreement.solver_commitment, agreement_salt=peer)
        if deal.lifecycle == State.PROVED and not deal.seeds_closed:
            deal.other_reveal, deal.other_seed = message.reveal, record.seed
            self._draw(deal)

    def _draw(self, deal: Deal) -> None:
        """The seeds are known, or forfeited: draw, with the notaries' randomness for just these if there is any."""
        agreement = agreement_of(deal, self.desk.network.id)
        if draws_from(self.desk.network, agreement) and not deal.draw_beacons:
            deal.seeds_closed = True
            save(self.desk, deal)
            reveals = [r for r in (deal.own_reveal, deal.other_reveal) if r]
            target = open_seeds(reveals, agreement, deal.id, deal.proof_id, self.desk.network.id)
            self.beacons.ask(
                deal.id,
                agreement,
                lambda shares: self._mixed(deal, shares),
                proof=deal.proof,
                reveals=reveals,
                target=target,
            )
            return
        move(self.desk, deal, Event.SEEDS_KNOWN)
        self.checks.begin(deal, agreement, self.receipts[deal.id])
        save(self.desk, deal)

    def _mixed(self, deal: Deal, shares: list[bytes]) -> None:
        if deal.lifecycle == State.PROVED:
            deal.draw_beacons = shares
            self._draw(deal)

    def tick(self, deal: Deal) -> None:
        """A deal that is proved and not drawn: repeat the proof, forfeit a seed that does not come."""
        now, solver = self.desk.now_ns, self._solver(deal)
        gone = solver not in self.desk.peers
        if deal.seeds_closed:
            self._draw(deal)  # after a restart; else it changes nothing
        elif now - deal.entered_ns > self.desk.network.rules.reveal_ms * 10**6 or (gone and deal.ended_early):
            self.desk.emit("forfeit", deal.job, deal=deal.id, why="the solver did not reveal its seed")
            self._draw(deal)
        elif now >= self.resend.get(deal.id, 0):
            self.resend[deal.id] = now + params.RESEND_NS
            self.send_proof(deal)

    def _solver(self, deal: Deal) -> bytes:
        return agreement_of(deal, self.desk.network.id).solver
