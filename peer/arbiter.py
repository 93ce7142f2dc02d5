"""A notary's desk: it hears challenges, runs their games, keeps the players' clocks, and rules.

It believes nobody. It opens each case itself, takes a move only with its player's signature, and lets a round close
only when a quorum of notaries saw the same in it (2f + 1 of 3f + 1), so that no player can show two notaries two games.
A notary signs one Ruling a dispute and never another (peer/rulings.py).

A move sent to one notary reaches all: each says every `params.RESEND_NS` what it saw, and is sent what it lacks. A
clock that runs out is a thing seen like a move: it counts when a quorum's clocks ran out, `params.DISPUTE_GRACE_NS`
after moves from players are no longer taken, so that a move that came to one notary in time has come to all. A notary
never hears a dispute that it is a party to or pressed itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from peer.delivery import ask_base, base_fetched
from peer.desk import Desk
from peer.dispute_file import SILENT, WITHHELD, DisputeFile, Kept, Parts, open_file, parts_of
from peer.events import BlobRead, Fetched, Release
from peer.hearing import Hearing
from peer.jury import Jury
from peer.messages import (
    BaseAsk,
    CheckRequest,
    DisputeAsk,
    DisputeDecline,
    DisputeOpen,
    GameAt,
    MoveOffer,
    OpeningOffer,
    Records,
)
from peer.rulings import Rulings
from peer.settler import Settler
from protocol import params
from protocol.codec import blake
from protocol.dispute import SIDES, Side
from protocol.errors import VerificationFailed
from protocol.jury import Word, cause_of
from protocol.records import Challenge, Ruling, Verdict, open_record

__all__ = ["Arbiter"]


@dataclass
class Arbiter:
    """See the module docstring. It does nothing on a peer that is no notary of its network."""

    desk: Desk
    settler: Settler
    rulings: Rulings
    ordered: Callable[[DisputeFile], bool] = lambda _: False  # whether the segment's error was ordered (Forced)
    hearings: dict[bytes, Hearing] = field(default_factory=dict)
    juries: dict[bytes, Jury] = field(default_factory=dict)  # of the hearings that have no game

    @property
    def sits(self) -> bool:
        """Whether this peer is a notary."""
        return self.desk.me in self.desk.network.notary_keys

    # --- opening ---------------------------------------------------------------------------------------------
    def on_open(self, peer: bytes, message: DisputeOpen) -> None:
        """A challenge with its evidence: hear it, or say why not. Raises RemoteProtocolError for forged evidence."""
        challenge, dispute, _ = open_record(message.challenge, network=self.desk.network.id)
        if not isinstance(challenge, Challenge):
            raise VerificationFailed("a dispute is opened by a challenge")
        if dispute in self.hearings:
            self.tell(self.hearings[dispute], peer, answer=False)
            return
        refusal = self._refuse_challenger(challenge, dispute)  # before the thousand signatures of its evidence
        if refusal is None:
            file = open_file(message.challenge, message.case, desk=self.desk, part="notary")
            self.settler.accept(message.case.agreement)  # the case may overtake the gossip
            refusal = self._refuse(file)
        if refusal is not None:
            self.desk.send(peer, DisputeDecline(dispute, *refusal))
            return
        self._make_room()
        file.save(self.desk)
        self.hearings[dispute] = Hearing(file)
        self.desk.emit(
            "dispute", dispute=dispute, deal=file.challenge.agreement, segment=file.challenge.segment,
            challenger=file.challenge.challenger, solver=file.case.agreement.solver, state="opened",
        )  # fmt: skip
        self._seat(file.root)

    def _refuse_challenger(self, challenge: Challenge, dispute: bytes) -> tuple[str, str] | None:
        """Why this notary hears no challenge of this peer now, or nothing."""
        going = [h.file for h in self.hearings.values() if not h.file.over]
        mine = sum(f.challenge.challenger == challenge.challenger for f in going)
        stake = self.settler.judgement.staked(challenge, dispute)
        least = self.desk.network.rules.checker_stake_min_micro
        if not self.sits:
            return "no-notary", "this peer is no notary of the network"
        if challenge.challenger == self.desk.me:
            return "party", "this notary pressed the challenge itself"
        if dispute in self.rulings.found:
            return "judged", "the notaries have ruled on this challenge"
        if stake < least:
            return "stake", f"a challenge takes a stake of {least} micro-credits, its challenger has {stake}"
        if len(going) >= params.DISPUTES_OPEN_MAX:
            return "busy", f"{len(going)} disputes are open here"
        if mine >= params.DISPUTES_PER_CHALLENGER_MAX:
            return "too-many", f"its challenger has {mine} disputes open here"
        return None

    def _refuse(self, file: DisputeFile) -> tuple[str, str] | None:
        """Why this notary does not hear a dispute, or nothing."""
        agreement, channel = file.case.agreement, self.settler.channels.get(file.case.agreement_id)
        going = [h.file for h in self.hearings.values() if not h.file.over]
        if self.desk.me in (agreement.submitter, agreement.solver):
            return "party", "this notary is a party to what is disputed"
        if channel is None:
            return "not-funded", "the agreement has no channel"
        if not channel.locked:
            return "too-late", "the solver's lock is gone: the window for challenges is over"
        if any(f.root == file.root and f.challenge.challenger == file.challenge.challenger for f in going):
            return "twice", "its challenger disputes this already"
        return None

    def _make_room(self) -> None:
        ended = sorted((h.file for h in self.hearings.values() if h.file.over), key=lambda f: f.kept.ended_ns)
        for file in ended[: max(0, len(ended) - params.DISPUTES_KEPT_MAX + 1)]:
            del self.hearings[file.id]
            file.forget(self.desk)
            self.desk.save("disputes", file.id, None)

    def _seat(self, root: tuple[bytes, bytes, int]) -> None:
        """Give the next dispute of a root its turn: one whose game has begun goes on, else the oldest challenge."""
        waiting = [h for h in self.hearings.values() if h.file.root == root and not h.file.over]
        if not waiting:
            return
        begun = [h for h in waiting if h.number]
        first = min(waiting, key=lambda h: h.file.age)
        for hearing in waiting:
            if hearing in begun or (not begun and hearing is first):
                if not hearing.opened_ns:
                    self._begin(hearing)
            elif not hearing.number and not self.rulings.own(hearing.file.id):
                hearing.opened_ns = 0  # an older challenge came after it: it waits

    def _begin(self, hearing: Hearing) -> None:
        hearing.opened_ns = self.desk.now_ns
        if hearing.file.game is None:
            hearing.file.ask_program(self.desk)
        if hearing.file.by_jury:
            jury = Jury(self.desk, hearing, self._found_by_jury, self.hearings, self.rulings.own)
            self.juries[hearing.file.id] = jury
        if self.ordered(hearing.file):
            self._rule(hearing, "forced", "segment", "forced", 0, bytes(32))

    def on_fetched(self, event: Fetched) -> None:
        """A Program, or the base of a segment, that was asked for."""
        hearing = self.hearings.get(event.token)
        if hearing is None or hearing.file.over:
            return
        file = hearing.file
        if event.blob == file.task.program:
            if not event.error and file.game is None:
                file.read_program(self.desk)
        elif event.blob == file.case.base(file.challenge.segment) and hearing.base_for:
            base_fetched(self.desk, hearing, event)

    def on_read(self, event: BlobRead) -> None:
        """The Program's bytes: the game can be set up."""
        hearing = self.hearings.get(event.token)
        if hearing is None or hearing.file.over or hearing.file.game is not None or event.error:
            return
        hearing.file.take_program(event.data)
        if hearing.file.twins() is not None:
            self._convict_twins(hearing)
        if hearing.opened_ns:  # else an older challenge came in the meantime
            hearing.opened_ns = self.desk.now_ns
        self.tell_all(hearing, answer=True)
        self._advance(hearing)

    # --- moves -----------------------------------------------------------------------------------------------
    def on_move(self, peer: bytes, message: MoveOffer, dispute: bytes) -> None:
        """A move, from its player or from another notary. Raises RemoteProtocolError for a forged one."""
        hearing = self.hearings.get(dispute)
        if hearing is None:
            self.desk.send(peer, DisputeAsk(dispute))
            return
        file = hearing.file
        side, number, move_id = file.read_move(message.move, network=self.desk.network.id)
        if file.over or (dispute in self.rulings.held and self.desk.me in self.rulings.held[dispute]):
            return
        late = hearing.opened_ns and self.desk.now_ns > hearing.opened_ns + hearing.clock_ns(self.desk.network.rules)
        known = file.moves.get((side, number), {})
        if number > hearing.number + params.DISPUTE_CATCH_UP_ROUNDS or (number < hearing.number and not known):
            return  # it is sent again when its round is near
        if peer not in self.desk.network.notary_keys and late and number == hearing.number and not known:
            return
        if file.add_move(message.move, network=self.desk.network.id) is None:
            return
        file.save_move(self.desk, side, number, move_id)
        if file.twins() is not None:
            self._convict_twins(hearing)
            return
        self.desk.emit("move", dispute=dispute, side=side, number=number, bytes=len(message.move))
        self._see(hearing, side, number, move_id)
        self._advance(hearing)

    def _see(self, hearing: Hearing, side: Side, number: int, value: bytes) -> None:
        """What this notary saw first in a place; it says nothing else of it later, but see `_reconsider`."""
        said = hearing.said.setdefault((side, number), {})
        if self.desk.me in said:
            self._reconsider(hearing, side, number)
            return
        said[self.desk.me] = value
        key = hearing.file.id + SIDES.index(side).to_bytes(1, "big") + number.to_bytes(2, "big")
        self.desk.save("dispute-seen", key, value)
        if number == hearing.number and hearing.own(self.desk.me, number).count(b"") == 0:
            self.tell_all(hearing, answer=False)

    def _reconsider(self, hearing: Hearing, side: Side, number: int) -> None:
        """A clock ran out here, but more than f others saw a move in time, so an honest one did: believe it."""
        said = hearing.said.setdefault((side, number), {})
        if said.get(self.desk.me) != SILENT:
            return
        for move_id in hearing.file.moves.get((side, number), {}):
            others = sum(value == move_id for notary, value in said.items() if notary != self.desk.me)
            if others > len(self.desk.network.notaries) - self.desk.network.notary_quorum:
                del said[self.desk.me]
                self._see(hearing, side, number, move_id)

    def _advance(self, hearing: Hearing) -> None:
        """Close every round that a quorum saw alike, and rule when the game is over."""
        file = hearing.file
        while file.game is not None and file.game.result is None and not file.over:
            number = hearing.number
            solver, challenger = (
                hearing.agreed(side, number, quorum=self.desk.network.notary_quorum) for side in SIDES
            )
            if file.game.wants_opening():
                solver = solver or SILENT  # nothing is owed by it any more
            if not solver or not challenger or not file.here(number, (solver, challenger)):
                break
            file.close_round((solver, challenger))
            file.save_round(self.desk, number)
            hearing.opened_ns = self.desk.now_ns
            self._tell_players(hearing, number)
            if file.game.result is None and file.game.wants_opening() and file.opening:
                self._take_opening(hearing, file.opening)
        if file.game is not None and file.game.result is not None and not file.over:
            result = file.game.result
            finding = "wrong" if result.loser == "solver" else "right"
            cause = "both" if result.both_wrong else result.cause
            self._rule(hearing, finding, result.level, cause, result.operations, file.game.transcript())

    def _convict_twins(self, hearing: Hearing) -> None:
        """Two signed moves for one round: show both to the other notaries, and end the game."""
        file = hearing.file
        side = file.twins()
        assert side is not None, "there are two"
        for (mover, _), variants in sorted(file.moves.items()):
            if mover == side and len(variants) > 1:
                for notary in self._others():
                    for envelope in variants.values():
                        self.desk.send(notary, MoveOffer(envelope))
        if file.game is not None:
            file.game.forfeit(side, "equivocation")
            self._advance(hearing)

    # --- saying where it stands ------------------------------------------------------------------------------
    def _others(self) -> list[bytes]:
        return sorted(self.desk.network.notary_keys - {self.desk.me})

    def tell(self, hearing: Hearing, peer: bytes, *, answer: bool) -> None:
        """Say to one peer where the dispute stands here; of one that is ruled on, the ruling."""
        ruling = self.rulings.held.get(hearing.file.id, {}).get(self.desk.me)
        if ruling is not None:
            self.desk.send(peer, Records((ruling[1],)))
        if hearing.opened_ns or hearing.file.over:
            self.desk.send(peer, hearing.position(self.desk.me, answer=answer and not hearing.file.over))

    def tell_all(self, hearing: Hearing, *, answer: bool) -> None:
        """Say it to the other notaries; with `answer` to the players too."""
        if not hearing.opened_ns:
            return
        hearing.tell_ns = self.desk.now_ns + params.RESEND_NS
        for notary in self._others():
            self.tell(hearing, notary, answer=answer)
        if answer:
            for side in SIDES:
                self.tell(hearing, hearing.file.player(side), answer=True)

    def _tell_players(self, hearing: Hearing, number: int) -> None:
        """A round closed: each player learns how, and f + 1 notaries, one of them honest, pass on the other's move."""
        order = sorted(
            self.desk.network.notary_keys, key=lambda n: blake("ichiba/messenger", hearing.file.id, bytes([number]), n)
        )
        spare = len(order) - self.desk.network.notary_quorum
        for side in SIDES:
            other = SIDES[1 - SIDES.index(side)]
            if order.index(self.desk.me) <= spare:
                self._send_moves(hearing, hearing.file.player(side), number, (other,))
            self.desk.send(hearing.file.player(side), hearing.closed(number))

    def _send_moves(self, hearing: Hearing, peer: bytes, number: int, sides: Iterable[Side]) -> None:
        for side in sides:
            for envelope in hearing.file.moves.get((side, number), {}).values():
                self.desk.send(peer, MoveOffer(envelope))

    def on_game_at(self, peer: bytes, message: GameAt) -> None:
        """Where another notary, a player or a looker-on stands: count what it saw, send what it lacks."""
        hearing = self.hearings.get(message.dispute)
        if hearing is None:
            if peer in self.desk.network.notary_keys and self.sits:
                self.desk.send(peer, DisputeAsk(message.dispute))
            return
        notary = peer in self.desk.network.notary_keys - hearing.file.parties
        if not notary and peer not in hearing.file.parties:
            raise VerificationFailed("a position in a dispute by a peer that has no part in it")
        if notary and not hearing.file.over and 0 <= message.number - hearing.number <= params.DISPUTE_CATCH_UP_ROUNDS:
            self._count(hearing, peer, message)
        if not message.answer:
            return
        sides: list[Side] = [side for side in SIDES if not notary and hearing.file.side_of(peer) != side] or list(SIDES)
        if message.number < hearing.number:
            last = min(hearing.number, message.number + params.DISPUTE_CATCH_UP_ROUNDS)
            for number in range(message.number, last):
                self._send_moves(hearing, peer, number, sides)
                self.desk.send(peer, hearing.closed(number))
        elif message.number == hearing.number and notary:
            for side, value in zip(SIDES, (message.solver, message.challenger), strict=True):
                if hearing.file.moves.get((side, message.number), {}).keys() - {value}:
                    self._send_moves(hearing, peer, message.number, (side,))
            self.desk.send(peer, hearing.position(self.desk.me, answer=False))
        if message.opening and hearing.file.opening:
            for part in parts_of(hearing.file.id, hearing.file.opening):
                self.desk.send(peer, part)
        if self.desk.me in self.rulings.held.get(hearing.file.id, {}):
            self.tell(hearing, peer, answer=False)

    def _count(self, hearing: Hearing, notary: bytes, message: GameAt) -> None:
        for side, value in zip(SIDES, (message.solver, message.challenger), strict=True):
            if len(value) not in (0, 32):
                raise VerificationFailed("a position with half an id")
            said = hearing.said.setdefault((side, message.number), {})
            if value and said.get(notary, SILENT) == SILENT:  # the first counts; see `_reconsider`
                said[notary] = value
                self._reconsider(hearing, side, message.number)
        if not hearing.opened_ns and message.number:
            hearing.opened_ns = self.desk.now_ns  # the others have begun with it
            if hearing.file.game is None:
                hearing.file.ask_program(self.desk)
        self._advance(hearing)

    def on_ask(self, peer: bytes, message: DisputeAsk) -> None:
        """Somebody was told of a dispute that it does not know."""
        hearing = self.hearings.get(message.dispute)
        if hearing is not None and peer in self.desk.network.notary_keys | hearing.file.parties:
            self.desk.send(peer, DisputeOpen(hearing.file.kept.challenge, hearing.file.case.request))

    # --- the leaf --------------------------------------------------------------------------------------------
    def on_opening(self, peer: bytes, message: OpeningOffer) -> None:
        """Operands, which prove themselves, from a player or a notary. Raises RemoteProtocolError if they do not."""
        hearing = self.hearings.get(message.dispute)
        if hearing is None or hearing.file.over:
            return
        if peer not in self.desk.network.notary_keys and hearing.file.side_of(peer) is None:
            raise VerificationFailed("an opening by a peer that has no part in the dispute")
        if not hearing.position(self.desk.me, answer=False).opening:
            return
        whole = hearing.parts.setdefault(peer, Parts()).add(message)
        if whole is None:
            return
        del hearing.parts[peer]
        self._take_opening(hearing, whole)

    def _take_opening(self, hearing: Hearing, opening: bytes) -> None:
        game = hearing.file.game
        assert game is not None, "the game is at its leaf"
        game.open(opening)
        hearing.file.opening = opening
        hearing.file.save_opening(self.desk)
        self._advance(hearing)

    def on_base_ask(self, peer: bytes, message: BaseAsk) -> None:
        """A player cannot get the base of the disputed segment."""
        hearing = self.hearings.get(message.dispute)
        if hearing is not None and not hearing.file.over and hearing.file.side_of(peer) is not None:
            ask_base(self.desk, hearing, peer)

    # --- the jury --------------------------------------------------------------------------------------------
    def on_verdict(self, verdict: Verdict) -> None:
        """A juror's answer to this notary or another."""
        for jury in list(self.juries.values()):
            jury.on_verdict(verdict)

    def _found_by_jury(self, hearing: Hearing, word: Word) -> None:
        self._rule(hearing, word.finding, "segment", cause_of(word, hearing.file.challenge), 0, bytes(32))

    # --- ruling ----------------------------------------------------------------------------------------------
    def _rule(self, hearing: Hearing, finding: Any, level: Any, cause: Any, operations: int, transcript: bytes) -> None:
        """Sign the one ruling of this notary on a dispute, and tell those who need it."""
        file = hearing.file
        if self.desk.me in self.rulings.held.get(file.id, {}):
            return
        ruling = Ruling(
            network=self.desk.network.id,
            notary=self.desk.me,
            dispute=file.id,
            agreement=file.challenge.agreement,
            segment=file.challenge.segment,
            finding=finding,
            level=level,
            cause=cause,
            operations=min(operations, 2**62),
            transcript=transcript,
        )
        envelope = self.desk.seal(ruling)
        self.rulings.add(ruling, envelope, file)
        self.desk.emit("ruling", dispute=file.id, finding=finding, level=level, cause=cause, notary=self.desk.me)
        for peer in (*self._others(), *map(file.player, SIDES)):
            self.desk.send(peer, Records((envelope,)))
        hearing.tell_ns = self.desk.now_ns + params.RESEND_NS
        self.rulings.publish(file)

    def on_ruling(self, ruling: Ruling, envelope: bytes) -> None:
        """Another notary's ruling. Raises VerificationFailed."""
        hearing = self.hearings.get(ruling.dispute)
        if hearing is not None and not hearing.file.over and self.rulings.add(ruling, envelope, hearing.file):
            self.rulings.publish(hearing.file)

    def ended(self, dispute: bytes, finding: str) -> None:
        """An Arbitration is in the log, or the dispute lapsed: the next of its root has its turn."""
        hearing = self.hearings.get(dispute)
        if hearing is None or hearing.file.over:
            return
        file = hearing.file
        self.desk.emit("dispute", dispute=dispute, state=finding)
        for other in [h for h in self.hearings.values() if h.file.root == file.root and not h.file.over]:
            # A root found wrong, or ordered to be, is judged: who else challenged it was right too.
            if other is hearing or finding in ("wrong", "forced"):
                other.file.kept.rulings = self.rulings.forget(other.file.id)
                other.file.end(self.desk, finding)
                self.juries.pop(other.file.id, None)
                other.file.tell_words(self.desk)
                self.desk.add(Release(other.file.id))
        self._seat(file.root)

    # --- time ------------------------------------------------------------------------------------------------
    def tick(self) -> None:
        """Say again where each dispute stands, and let clocks run out."""
        for hearing in list(self.hearings.values()):
            if hearing.opened_ns and not hearing.file.over:
                self.desk.attempt(self._tick, hearing)

    def _tick(self, hearing: Hearing) -> None:
        now, file, clock = self.desk.now_ns, hearing.file, hearing.clock_ns(self.desk.network.rules)
        self.rulings.publish(file)
        if file.over:
            return
        if file.id in self.juries:
            self.juries[file.id].tick()
        grace = max(params.DISPUTE_GRACE_NS, clock // params.DISPUTE_GRACE_SHARE)
        if now >= hearing.tell_ns:
            self.tell_all(hearing, answer=True)
        if file.game is None:
            if now >= file.asked_ns + params.RESEND_NS:
                file.ask_program(self.desk)
        elif file.game.result is None and now >= hearing.opened_ns + clock + grace:
            self._clock_out(hearing)
        if now >= hearing.opened_ns + params.DISPUTE_LAPSE_CLOCKS * (clock + grace):
            self.desk.emit("problem", what=f"dispute {file.id.hex()[:12]} lapses: no quorum of notaries in time")
            self.ended(file.id, "lapsed")

    def _clock_out(self, hearing: Hearing) -> None:
        """The clock of the open round ran out: whoever owes a move is silent, or the solver withholds its data."""
        game, number = hearing.file.game, hearing.number
        assert game is not None, "the round is open"
        withheld = hearing.file.challenge.challenger in hearing.base_for and not hearing.base_here
        owing: tuple[Side, ...] = ("challenger",) if game.wants_opening() else SIDES
        for side in owing:
            if not hearing.file.moves.get((side, number)):
                self._see(hearing, side, number, WITHHELD if withheld and side == "challenger" else SILENT)
        if hearing.own(self.desk.me, number) != (b"", b""):
            self._advance(hearing)

    # --- rows ------------------------------------------------------------------------------------------------
    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """The disputes of this notary as they stood; every open round gets its whole clock again."""
        for key, value in rows("disputes"):
            kept = msgspec.msgpack.decode(value, type=Kept)
            if kept.part != "notary":
                continue
            request = msgspec.msgpack.decode(kept.case, type=CheckRequest)
            file = open_file(kept.challenge, request, desk=self.desk, part="notary", kept=kept)
            hearing = self.hearings[key] = Hearing(file)
            file.restore(rows)
            hearing.restore(rows("dispute-seen"), self.desk.me)
        for root in sorted({h.file.root for h in self.hearings.values() if not h.file.over}):
            self._seat(root)
