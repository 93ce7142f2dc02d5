"""Everything about disputes that one node holds, behind one door: notary's, players' and whistleblower's desks.

Says which of them a message is for, tells the deals of this peer when they are challenged and ruled on, and answers
what a person asks about disputes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from peer import messages as m
from peer.arbiter import Arbiter
from peer.checker import Checker
from peer.deals import Deal, move, save
from peer.desk import Desk
from peer.disputant import Disputant
from peer.dispute_bundle import make as make_bundle
from peer.dispute_file import DisputeFile, story_of
from peer.events import BlobRead, Fetched, Inspected
from peer.rulings import Rulings
from peer.settler import Settler
from peer.solver import Solver
from peer.submitter import Submitter
from peer.whistleblower import Whistleblower
from protocol.arbitration import Judged, refutes
from protocol.errors import NotFound, VerificationFailed
from protocol.keys import peer_name
from protocol.lifecycle import Event, State
from protocol.records import Arbitration, Challenge, Fault, Move, Ruling, Verdict, open_record

__all__ = ["Disputes"]


class Disputes:
    """See the module docstring."""

    def __init__(self, desk: Desk, settler: Settler, checker: Checker, submitter: Submitter, solver: Solver) -> None:
        self.desk, self.settler, self.submitter, self.solver = desk, settler, submitter, solver
        self.rulings = Rulings(desk, settler, take=lambda e: settler.accept(e, publish=True))
        self.arbiter = Arbiter(desk, settler, self.rulings)
        self.disputant = Disputant(desk, settler, self.rulings, deal_of=self.deal_of)
        self.whistleblower = Whistleblower(desk, settler, checker, deal_of=self.deal_of)
        self.checker = checker
        checker.on_wrong = self.disputant.challenge

    def deal_of(self, agreement: bytes) -> tuple[Deal, list[bytes]] | None:
        """This peer's own deal, if it is one, with its co-signed receipts."""
        for role in (self.submitter, self.solver):
            if agreement in role.deals:
                return role.deals[agreement], role.receipts[agreement]
        return None

    # --- inputs ----------------------------------------------------------------------------------------------
    def fetched(self, event: Fetched) -> None:
        """A blob that one of the desks asked for."""
        self.arbiter.on_fetched(event)
        self.disputant.on_fetched(event)

    def read(self, event: BlobRead) -> None:
        """The bytes of a Program."""
        self.arbiter.on_read(event)
        self.disputant.on_read(event)

    def inspected(self, event: Inspected) -> None:
        """The sandbox's answer to a question."""
        self.disputant.on_inspected(event)

    def tick(self) -> None:
        """Everything that is overdue."""
        self.arbiter.tick()
        self.disputant.tick()
        self.whistleblower.tick()
        for role in (self.submitter, self.solver):
            for deal in [d for d in role.deals.values() if d.state == State.DISPUTED and not self._disputed(d)]:
                move(self.desk, deal, Event.LAPSED)  # no dispute of it goes on here any more

    def message(self, peer: bytes, message: m.DisputeMessage) -> None:
        """A direct message. Raises RemoteProtocolError."""
        plays, hearings = self.disputant.plays, self.arbiter.hearings
        match message:
            case m.CaseAsk():
                self.whistleblower.on_case_ask(peer, message)
            case m.CaseGiven():
                self.whistleblower.on_case(message)
            case m.DisputeOpen():
                record, _, _ = open_record(message.challenge, network=self.desk.network.id)
                if self.deal_of(getattr(record, "agreement", b"")) is not None:
                    self.disputant.on_open(peer, message)
                else:
                    self.arbiter.on_open(peer, message)
            case m.DisputeAsk():
                self.arbiter.on_ask(peer, message)
                self.disputant.on_ask(peer, message)
            case m.DisputeDecline():
                self.disputant.on_decline(peer, message)
            case m.GameAt(dispute=dispute):
                if dispute in hearings or (self.arbiter.sits and dispute not in plays):
                    self.arbiter.on_game_at(peer, message)
                elif peer in self.desk.network.notary_keys:
                    self.disputant.on_game_at(peer, message)
                else:
                    raise VerificationFailed("a position in a dispute by a peer that is no notary")
            case m.MoveOffer(move=envelope):
                record, _, _ = open_record(envelope, network=self.desk.network.id)
                if not isinstance(record, Move):
                    raise VerificationFailed(f"a {type(record).__name__.lower()} is no move")
                if record.dispute in plays:
                    self.disputant.on_move(message, record.dispute)
                elif self.arbiter.sits:
                    self.arbiter.on_move(peer, message, record.dispute)
            case m.OpeningOffer(dispute=dispute):
                if dispute in plays and peer in self.desk.network.notary_keys:
                    self.disputant.on_opening(message)
                else:
                    self.arbiter.on_opening(peer, message)
            case m.JuryAsk():
                self.checker.on_jury(peer, message)
            case m.BaseAsk():
                self.arbiter.on_base_ask(peer, message)
            case m.BaseGiven():
                self.disputant.on_base_given(peer, message)

    # --- records ---------------------------------------------------------------------------------------------
    def on_verdict(self, verdict: Verdict, envelope: bytes) -> None:
        """A verdict: a deal to check again, or a juror's word, kept for people before it may decide."""
        self.whistleblower.on_verdict(verdict)
        for file in self._files().values() if verdict.role == "juror" else ():
            if file.by_jury and file.add_word(verdict, envelope, network=self.desk.network):
                file.save(self.desk)
        self.arbiter.on_verdict(verdict)

    def challenged(self, challenge: Challenge, dispute: bytes, envelope: bytes) -> None:
        """A challenge in gossip: this peer's own deal is disputed now. Raises RemoteProtocolError."""
        found = self.deal_of(challenge.agreement)
        if found is None or dispute in self.rulings.found:
            return
        self.disputant.on_challenge(challenge, dispute, envelope)
        deal, _ = found
        if dispute in self.disputant.plays and deal.lifecycle == State.CHECKING:
            move(self.desk, deal, Event.CHALLENGED)
            self.desk.emit(
                "challenged", deal.job, deal=deal.id, dispute=dispute, segment=challenge.segment,
                challenger=challenge.challenger,
            )  # fmt: skip

    def ruled(self, ruling: Ruling, envelope: bytes) -> None:
        """A notary's ruling. Raises RemoteProtocolError."""
        self.arbiter.on_ruling(ruling, envelope)
        self.disputant.on_ruling(ruling, envelope)

    def judged(self, agreement: bytes, judged: Judged) -> None:
        """The log took an Arbitration: its dispute is over, and so are those of a root that was judged with it."""
        self.rulings.found[judged.dispute] = judged.finding
        self.arbiter.ended(judged.dispute, judged.finding)
        self.disputant.ended(judged.dispute, judged.challenge, judged.finding)
        found = self.deal_of(agreement)
        if found is not None:
            self._deal_ruled(found[0], judged)
            self._blame(found[0], judged)

    def _blame(self, deal: Deal, judged: Judged) -> None:
        """A checker of this deal signed that a segment was right which the notaries saw was not: its stake is due."""
        if deal.side != "submitter":
            return
        for check in deal.checks:
            verdict = open_record(check.verdict, network=self.desk.network.id)[0] if check.verdict else None
            if isinstance(verdict, Verdict) and check.state == "right" and refutes(judged, verdict):
                fault = Fault(
                    network=self.desk.network.id, agreement=deal.id, author=self.desk.me, verdict=check.verdict
                )
                self.settler.accept(self.desk.seal(fault), publish=True)

    def _deal_ruled(self, deal: Deal, judged: Judged) -> None:
        """What a ruling is to this peer's deal; one that closes its channel came by the settler already."""
        deal_is_open = deal.lifecycle in (State.CHECKING, State.DISPUTED)
        challenge = judged.challenge
        self.desk.emit(
            "arbitrated", deal.job, deal=deal.id, dispute=judged.dispute, segment=challenge.segment,
            finding=judged.finding,
        )  # fmt: skip
        if judged.finding == "wrong":
            if deal_is_open and deal.side == "submitter" and deal.paid_out:
                self.submitter.paid_and_wrong(deal)
            return
        if judged.finding == "right":  # an ordered error was there: peer/correcting.py excuses who found it
            self._overrule(deal, challenge.segment, challenge.challenger)
        if deal.lifecycle == State.DISPUTED and not self._disputed(deal):
            move(self.desk, deal, Event.RULED_RIGHT)

    def _overrule(self, deal: Deal, segment: int, challenger: bytes) -> None:
        for check in deal.checks:
            if (check.state, check.wrong_segment, check.peer) == ("wrong", segment, challenger):
                check.state = "overruled"
        save(self.desk, deal)

    def _disputed(self, deal: Deal) -> bool:
        plays = self.disputant.plays.values()
        return any(p.file.challenge.agreement == deal.id and not p.file.over for p in plays)

    # --- rows ------------------------------------------------------------------------------------------------
    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """Go on with every dispute as it stood."""
        self.rulings.restore(rows("rulings"))
        self.arbiter.restore(rows)
        self.disputant.restore(rows)

    # --- what a person asks ----------------------------------------------------------------------------------
    def _files(self) -> dict[bytes, DisputeFile]:
        held: dict[bytes, Any] = {**self.arbiter.hearings, **self.disputant.plays}
        return {dispute: one.file for dispute, one in held.items()}

    def list_disputes(self, _: dict[str, Any]) -> dict[str, Any]:
        """All disputes this peer hears, plays in or looks on at, newest first."""
        files = sorted(self._files().values(), key=lambda file: -file.kept.opened_ns)
        return {"disputes": [self._line(file) for file in files]}

    def export_dispute(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """One dispute for peer/dispute_bundle.py to verify. Raises NotFound."""
        file = self._find(arguments)
        found = b""
        for envelope in self.settler.log.values():
            record, _, _ = open_record(envelope, network=self.desk.network.id)
            if isinstance(record, Arbitration) and record.challenge == file.kept.challenge:
                found = envelope
        return make_bundle(file, found)

    def _find(self, arguments: dict[str, Any]) -> DisputeFile:
        """A dispute by any unambiguous prefix of its hex id. Raises NotFound."""
        prefix = str(arguments.get("dispute", ""))
        found = [file for dispute, file in self._files().items() if prefix and dispute.hex().startswith(prefix)]
        if len(found) != 1:
            raise NotFound(
                f"{len(found) or 'no'} disputes match {prefix[:64]!r}",
                next_step="`ichiba dispute list` lists their ids",
            )
        return found[0]

    def show_dispute(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """One dispute with its descent, by any unambiguous prefix of its hex id. Raises NotFound."""
        file = self._find(arguments)
        told = file.kept.story or (story_of(file) if file.game is not None else b"{}")
        rulings = [
            {"notary": peer_name(notary), "finding": finding, "level": level, "cause": cause}
            for notary, finding, level, cause in file.kept.rulings
        ]
        exact = file.case.tolerance is None
        jurors = [
            {
                "juror": peer_name(one.checker), "finding": one.finding, "l1_ppb": one.l1_ppb, "l2_ppb": one.l2_ppb,
                "found_root": one.found_root.hex() if exact and one.finding == "wrong" else "",
            }
            for one in file.words(network=self.desk.network.id)
        ]  # fmt: skip
        return {
            **self._line(file), **msgspec.json.decode(told), "rulings": rulings, "jury": file.by_jury, "jurors": jurors,
        }  # fmt: skip

    def _line(self, file: DisputeFile) -> dict[str, Any]:
        challenge, game = file.challenge, file.game
        return {
            "dispute": file.id.hex(),
            "part": file.kept.part,
            "state": file.kept.ended or ("playing" if game is not None else "gathering"),
            "deal": challenge.agreement.hex(),
            "segment": challenge.segment,
            "solver": peer_name(file.case.agreement.solver),
            "challenger": peer_name(challenge.challenger),
            "claimed_root": challenge.claimed_root.hex(),
            "found_root": challenge.found_root.hex(),
            "root_bound": file.case.binds(self.desk.network),
            "rounds": game.number if game is not None else 0,
            "level": game.level if game is not None else "",
            "opened_ns": file.kept.opened_ns,
            "ended_ns": file.kept.ended_ns,
        }
