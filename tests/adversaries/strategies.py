"""The strategies. Each is what somebody might do for gain or out of spite, by means of a real node that it wraps."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from peer.case import Case, open_evidence
from peer.certificate_messages import CertifyAsk
from peer.deals import agreement_of
from peer.disputant import request_of
from peer.events import Effect, GossipIn, Input, Inspected, SegmentMade, Send, Tick
from peer.messages import (
    CheckRequest,
    Message,
    MoveOffer,
    OpeningOffer,
    ProofOffer,
    ReceiptBack,
    ReceiptOffer,
    RevealOffer,
    SettleOffer,
    pack,
    unpack,
)
from peer.node import Node
from peer.simulated_frauds import WRONG_PRODUCT
from protocol import params
from protocol.codec import blake, decode
from protocol.records import Agreement, Move, Proof, Receipt, Verdict, add_signature, open_record
from tests.adversaries.stage import Stage, Strategy

__all__ = [
    "Cheat",
    "Colluder",
    "Copier",
    "DoubleReservation",
    "Equivocator",
    "ForgedOpenings",
    "ForgingChallenger",
    "FriendlyFire",
    "Lazy",
    "Liar",
    "NeverSettles",
    "Reroller",
    "TwoReceipts",
    "Unpaying",
    "Vanishing",
    "Withholder",
    "WrongChunks",
]


def message_of(effect: Effect) -> Message | None:
    """The message that an effect sends, if it sends one."""
    return unpack(effect.data) if isinstance(effect, Send) else None


# --- solvers -----------------------------------------------------------------------------------------------
class Cheat(Strategy):
    """A solver that commits a fraud of worker/cheats.py, and defends it to the last."""

    def __init__(self, cheat: str) -> None:
        self.cheat = cheat


class Reroller(Cheat):
    """A cheat that knows the submitter's seed, and signs another proof before it reveals its own: for another draw."""

    def does(self, effects: list[Effect], node: Node, stage: Stage) -> list[Effect]:
        """A second proof before each reveal."""
        found: list[Effect] = []
        for effect in effects:
            message = message_of(effect)
            if isinstance(effect, Send) and isinstance(message, RevealOffer):
                deal = next(deal for deal in node.solver.deals.values() if deal.own_reveal == message.reveal)
                proof, _, _ = open_record(deal.proof, network=node.desk.network.id)
                assert isinstance(proof, Proof)
                other = msgspec.structs.replace(proof, root=blake("other checkpoints", proof.root))
                found.append(Send(effect.peer, pack(ProofOffer(node.desk.seal(other)))))
            found.append(effect)
        return found


class Withholder(Strategy):
    """A solver that hands in receipts and gives nobody a checkpoint."""

    def __init__(self, *names: str) -> None:
        self.withholds = frozenset(names)


class WrongChunks(Strategy):
    """A solver that gives the checkpoint before for the one that its receipt names."""

    def hears(self, event: Input, stage: Stage) -> Input | None:
        """Its sandbox's own word for it, from the second segment on."""
        if isinstance(event, SegmentMade) and event.segment:
            before = next(blob for blob, root in stage.roots.items() if root == event.in_root)
            return replace(event, checkpoint=before)
        return event


class TwoReceipts(Strategy):
    """A solver that signs two receipts under one number, with two roots."""

    def does(self, effects: list[Effect], node: Node, stage: Stage) -> list[Effect]:
        """The other one comes first."""
        found: list[Effect] = []
        for effect in effects:
            message = message_of(effect)
            if isinstance(effect, Send) and isinstance(message, ReceiptOffer):
                receipt, _, _ = open_record(message.receipt, network=node.desk.network.id)
                assert isinstance(receipt, Receipt)
                other = msgspec.structs.replace(receipt, out_root=blake("another end", receipt.out_root))
                found.append(Send(effect.peer, pack(ReceiptOffer(node.desk.seal(other)))))
            found.append(effect)
        return found


class ForgedOpenings(Cheat):
    """A cheat that floods the notaries with operands of its own making when the leaf is reached."""

    def does(self, effects: list[Effect], node: Node, stage: Stage) -> list[Effect]:
        """Bytes that prove nothing, to every notary."""
        found = list(effects)
        for dispute, play in node.disputes.disputant.plays.items():
            if play.file.game is not None and not play.file.over and play.file.game.wants_opening():
                forged = pack(OpeningOffer(dispute, 0, 1, b"operands that suit me"))
                found += [Send(notary, forged) for notary in sorted(node.desk.network.notary_keys)]
        return found


# --- checkers ----------------------------------------------------------------------------------------------
class Liar(Strategy):
    """A checker that finds all wrong that it looks at, challenges it, and plays. lie: how far it tells the truth."""

    def __init__(self, lie: str = WRONG_PRODUCT, *, silent: bool = False) -> None:
        self.lie, self.silent = lie, silent


class ForgingChallenger(Liar):
    """A liar that opens operands which suit its lie."""

    def hears(self, event: Input, stage: Stage) -> Input | None:
        """What its sandbox opens, with some bits turned."""
        if isinstance(event, Inspected) and event.opening:
            opening = bytearray(event.opening)
            opening[len(opening) // 2] ^= 0xFF
            return replace(event, opening=bytes(opening))
        return event


def charge(case: Case) -> None:
    """The operations that an honest check would have taken."""
    case.operations = sum(case.receipt(segment).operations for segment in case.request.segments)


class Lazy(Strategy):
    """A verifier that signs `right`, executes nothing, and charges for it."""

    def plug(self, node: Node, stage: Stage) -> None:
        """Its check is over before it begins."""
        checker, honest = node.checker, node.checker._run

        def run(case: Case) -> None:
            if self.spares(case, stage):
                charge(case)
                checker._conclude(case, "right")
            else:
                honest(case)

        checker._run = run  # type: ignore[method-assign]

    def spares(self, case: Case, stage: Stage) -> bool:
        """Whose work it does not look at."""
        return True


class Colluder(Lazy):
    """A verifier that is honest, but to its friend's work."""

    def __init__(self, friend: str) -> None:
        self.friend = friend

    def spares(self, case: Case, stage: Stage) -> bool:
        """The friend's."""
        return case.agreement.solver == stage.public(self.friend)


class Copier(Strategy):
    """A checker that waits for another's verdict, and signs the same."""

    def __init__(self) -> None:
        self.heard: dict[bytes, Verdict] = {}
        self.held: list[bytes] = []

    def plug(self, node: Node, stage: Stage) -> None:
        """It executes nothing: a case waits for somebody else's verdict."""
        node.checker._run = lambda case: self.held.append(case.id)  # type: ignore[method-assign]

    def hears(self, event: Input, stage: Stage) -> Input | None:
        """Verdicts of others, in gossip; and at each tick, what can be signed by now."""
        name = next(name for name, strategy in stage.cast.items() if strategy is self)
        node = stage.node(name)
        if isinstance(event, GossipIn):
            for envelope in decode(list[bytes], event.data, bytes_max=params.GOSSIP_RECORD_BYTES_MAX + 4096):
                record, _, _ = open_record(envelope, network=stage.network.id)
                if isinstance(record, Verdict) and record.checker != node.desk.me:
                    self.heard.setdefault(record.agreement, record)
        if isinstance(event, Tick):
            for case in [node.checker.cases[i] for i in self.held if i in node.checker.cases]:
                self._sign(node, case)
        return event

    def _sign(self, node: Node, case: Case) -> None:
        verdict = self.heard.get(case.agreement_id)
        if verdict is None:
            return
        self.held.remove(case.id)
        charge(case)
        if verdict.finding == "wrong" and verdict.wrong_segment in case.request.segments:
            at = verdict.wrong_segment, verdict.claimed_root, verdict.found_root
            node.checker._conclude(case, "wrong", at)
        else:
            node.checker._conclude(case, "right")


class FriendlyFire(Strategy):
    """A whistleblower that challenges its friend the cheat first, and loses, so that nobody else may."""

    silent = True

    def __init__(self, friend: str) -> None:
        self.friend, self.done = friend, False

    def hears(self, event: Input, stage: Stage) -> Input | None:
        """As soon as the friend has what a challenge takes."""
        alice = stage.peers["alice"].node  # who gives the case to whoever asks for it
        if isinstance(event, Tick) and alice is not None and not self.done:
            name = next(name for name, strategy in stage.cast.items() if strategy is self)
            for deal_id, deal in alice.submitter.deals.items():
                agreement = agreement_of(deal, stage.network.id)
                if agreement.solver != stage.public(self.friend) or deal.receipts < 2:  # segment 1 was never done
                    continue
                receipts, segment = alice.submitter.receipts[deal_id], agreement.first_segment + 1
                request = request_of(deal, receipts, segment, network=stage.network)
                if request is not None:
                    self._press(stage.node(name), request)
        return event

    def _press(self, node: Node, request: CheckRequest) -> None:
        case = open_evidence(request, network=node.desk.network)
        node.settler.accept(case.request.agreement)
        node.disputes.disputant.challenge(case, blake("a root that nobody reaches"))
        self.done = True


# --- either player -----------------------------------------------------------------------------------------
class Equivocator(Strategy):
    """A player that shows two notaries one move of a round, and the others another."""

    def __init__(self, *, cheat: str = "", lie: str = "") -> None:
        self.cheat, self.lie = cheat, lie

    def does(self, effects: list[Effect], node: Node, stage: Stage) -> list[Effect]:
        """Another signed body for the first two notaries, from the second round on."""
        return [self._doubled(effect, node) for effect in effects]

    @staticmethod
    def _doubled(effect: Effect, node: Node) -> Effect:
        message = message_of(effect)
        if not isinstance(effect, Send) or not isinstance(message, MoveOffer):
            return effect
        move, _, _ = open_record(message.move, network=node.desk.network.id)
        fooled = sorted(node.desk.network.notary_keys)[:2]
        if not isinstance(move, Move) or move.player != node.desk.me or not move.number or effect.peer not in fooled:
            return effect
        return Send(effect.peer, pack(MoveOffer(node.desk.seal(msgspec.structs.replace(move, body=b"other")))))


# --- submitters --------------------------------------------------------------------------------------------
class Unpaying(Strategy):
    """A submitter that takes receipts and gives no voucher back."""

    dropped: tuple[type[Message], ...] = (ReceiptBack,)

    def does(self, effects: list[Effect], node: Node, stage: Stage) -> list[Effect]:
        """Everything but that."""
        return [effect for effect in effects if not isinstance(message_of(effect), self.dropped)]


class NeverSettles(Unpaying):
    """A submitter that has the work checked, and never signs the settlement."""

    dropped = (SettleOffer,)


class DoubleReservation(Strategy):
    """A submitter that asks some notaries to certify one agreement and, with `other` in league, the rest another one
    under the same sequence number; then it is gone."""

    def __init__(self, asked: int = 2, other: str = "carol") -> None:
        self.asked, self.other = asked, other  # notaries that see the first one; empty: the rest sees nothing
        self.done = False

    def does(self, effects: list[Effect], node: Node, stage: Stage) -> list[Effect]:
        """The first question to each notary, and nothing after it."""
        found = [self._shown(effect, node, stage) for effect in effects]
        if self.done:
            stage.gone.add("alice")
            stage.crash("alice", for_ns=0)
        return [effect for effect in found if effect is not None]

    def _shown(self, effect: Effect, node: Node, stage: Stage) -> Effect | None:
        message = message_of(effect)
        if not isinstance(effect, Send) or not isinstance(message, CertifyAsk):
            return effect
        self.done = True
        if effect.peer in sorted(node.desk.network.notary_keys)[: self.asked]:
            return effect
        agreement, _, _ = open_record(message.agreement, network=node.desk.network.id)
        if not self.other or not isinstance(agreement, Agreement):
            return None
        second = msgspec.structs.replace(agreement, solver=stage.public(self.other))
        key = stage.peers[self.other].key
        both = add_signature(node.desk.seal(second), key, network=node.desk.network.id)
        return Send(effect.peer, pack(CertifyAsk(both)))


class Vanishing(Strategy):
    """A submitter that is gone for good when the proof is there."""

    def hears(self, event: Input, stage: Stage) -> Input | None:
        """The proof comes to nobody."""
        node = stage.peers["alice"].node
        if node is not None and any(deal.proof for deal in node.submitter.deals.values()):
            stage.gone.add("alice")
            stage.crash("alice", for_ns=0)
            return None
        return event
