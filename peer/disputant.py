"""A player's desk: a solver that defends its receipt, a checker that presses its challenge, a submitter that watches.

A player runs the same game as the notaries, asks its own sandbox what the game asks of its side (Inspect), signs the
answer and gives it to every notary. It takes a round as closed when more than f notaries say so, so an honest one does.
Its moves are journalled before they leave, so that it never signs two for one round, whatever crashes in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from peer.case import Case
from peer.deals import Deal, agreement_of
from peer.desk import SETTLEMENT, Desk
from peer.dispute_file import DisputeFile, Kept, Parts, Seen, open_file, parts_of
from peer.events import BlobRead, Fetch, Fetched, Inspect, Inspected, Release, StopWork
from peer.messages import (
    BaseAsk,
    BaseGiven,
    CheckRequest,
    DisputeAsk,
    DisputeDecline,
    DisputeOpen,
    GameAt,
    MoveOffer,
    OpeningOffer,
)
from peer.rulings import Rulings
from peer.settler import Settler
from protocol import params
from protocol.codec import blake
from protocol.credits import credits_of
from protocol.dispute import Side
from protocol.forced import draws_from
from protocol.network import Network
from protocol.records import Challenge, Move, Ruling, open_record
from protocol.script import blobs_of

__all__ = ["Disputant", "Play", "request_of"]


@dataclass
class Play:
    """One dispute that this peer plays in, or looks on at."""

    file: DisputeFile
    closed: dict[int, dict[bytes, Seen]] = field(default_factory=dict)  # round -> notary -> how it closed
    heard: set[bytes] = field(default_factory=set)  # notaries that have the challenge, or declined it
    missing: set[bytes] = field(default_factory=set)  # blobs on their way
    asked: bytes = b""  # the question before the sandbox
    asked_ns: int = 0
    failures: int = 0
    again_ns: int = 0  # not before, after a failure
    opening: bytes = b""
    next_ns: int = 0
    withheld: bool = False  # nobody gave the base; people are told once
    warned: bool = False  # that a pause loses it
    parts: Parts = field(default_factory=Parts)

    def done(self, now_ns: int) -> bool:
        """Whether it is over, and there is nothing left to see of how."""
        if not self.file.over:
            return False
        game = self.file.game
        return game is None or game.result is not None or now_ns > self.file.kept.ended_ns + params.DISPUTE_WATCH_NS

    @property
    def side(self) -> Side | None:
        """The side this peer plays; none for a looker-on."""
        part = self.file.kept.part
        return part if part == "solver" or part == "challenger" else None

    @property
    def number(self) -> int:
        """The open round."""
        return len(self.file.rounds)

    @property
    def work(self) -> bytes:
        """The id of its work in the sandbox."""
        return blake("ichiba/dispute-work", self.file.id)


def request_of(deal: Deal, receipts: list[bytes], segment: int, network: Network) -> CheckRequest | None:
    """The evidence of a deal as its own party has it; None before both seeds are known or given up, and for a solver
    where notaries' randomness was mixed in, which is given to the submitter alone."""
    reveals = tuple(reveal for reveal in (deal.own_reveal, deal.other_reveal) if reveal)
    mixed = draws_from(network, agreement_of(deal, network.id))
    if not deal.proof or not reveals or not receipts or (mixed and not deal.draw_beacons):
        return None
    return CheckRequest(
        agreement=deal.agreement,
        task=deal.task,
        base_blob=deal.base_blob,
        receipts=tuple(receipts),
        proof=deal.proof,
        reveals=reveals,
        segments=(segment,),
        role="whistleblower",
        beacons=tuple(deal.draw_beacons),
        profiles=tuple(deal.profiles),
    )


@dataclass
class Disputant:
    """See the module docstring. `deal_of` finds this peer's own deal: its evidence, and the side it is on."""

    desk: Desk
    settler: Settler
    rulings: Rulings
    deal_of: Callable[[bytes], tuple[Deal, list[bytes]] | None] = lambda _: None
    plays: dict[bytes, Play] = field(default_factory=dict)

    # --- opening ---------------------------------------------------------------------------------------------
    def challenge(self, case: Case, found_root: bytes) -> None:
        """A checker found a segment wrong: stake a challenge, tell everybody, and give the notaries the case."""
        least = self.desk.network.rules.checker_stake_min_micro
        if not self.desk.network.notaries:
            return
        if self.settler.free_stake(self.desk.me) < least:
            words = f"a wrong segment is not challenged: that takes a free stake of {credits_of(least)} credits"
            self.desk.emit("problem", what=f"{words} (`ichiba wallet stake {credits_of(least)}`)")
            return
        root = (case.agreement_id, case.proof_id, case.disputed(case.segment))
        if any(p.file.root == root and not p.file.over for p in self.plays.values()):
            return
        challenge = Challenge(
            network=self.desk.network.id,
            challenger=self.desk.me,
            agreement=case.agreement_id,
            proof=case.proof_id,
            segment=case.segment,
            claimed_root=case.receipt(case.segment).out_root,
            found_root=case.stated_root(self.desk.me, found_root, self.desk.network),
            operations=min(case.operations, 2**62),
            created_ns=self.desk.wall_ns,
        )
        file = open_file(self.desk.seal(challenge), case.request, desk=self.desk, part="challenger")
        self._begin(file)
        if file.by_jury:
            self._lend(file, case)

    def _lend(self, file: DisputeFile, case: Case) -> None:
        """Keep what this peer executed the segment from, for jurors: who is accused may give it to nobody any more."""
        sizes = dict.fromkeys((case.base(case.segment), case.end(case.segment)), params.BLOB_BYTES_MAX)
        sizes |= {case.tape: params.UNIT_TAPE_BYTES_MAX, **blobs_of(file.task)}
        for blob, size in sizes.items():
            if blob:
                self.desk.add(Fetch(blob, file.id, (), size))  # it is here: this keeps it here

    def on_challenge(self, challenge: Challenge, dispute: bytes, envelope: bytes) -> None:
        """A challenge in gossip: if it is about a deal of this peer, defend it, or look on."""
        found = self.deal_of(challenge.agreement)
        if found is None or dispute in self.plays:
            return
        deal, receipts = found
        request = request_of(deal, receipts, challenge.segment, self.desk.network)
        if request is not None and deal.proof_id == challenge.proof:
            self._join(envelope, request, "solver" if deal.side == "solver" else "observer")

    def on_open(self, peer: bytes, message: DisputeOpen) -> None:
        """A notary tells us of a dispute we asked about, with its evidence: of a deal that its submitter ended while we
        were away we have not all of it. Raises RemoteProtocolError."""
        challenge, dispute, _ = open_record(message.challenge, network=self.desk.network.id)
        if peer not in self.desk.network.notary_keys or not isinstance(challenge, Challenge) or dispute in self.plays:
            return
        found = self.deal_of(challenge.agreement)
        if found is not None:
            self._join(message.challenge, message.case, "solver" if found[0].side == "solver" else "observer")

    def _join(self, envelope: bytes, request: CheckRequest, part: Literal["solver", "observer"]) -> None:
        going = sum(not play.file.over for play in self.plays.values())
        if going < params.DISPUTES_OPEN_MAX:
            self._begin(open_file(envelope, request, desk=self.desk, part=part))

    def _begin(self, file: DisputeFile) -> None:
        ended = sorted((p.file for p in self.plays.values() if p.file.over), key=lambda f: f.kept.ended_ns)
        for old in ended[: max(0, len(ended) - params.DISPUTES_KEPT_MAX + 1)]:
            del self.plays[old.id]
            self.desk.save("disputes", old.id, None)
        file.save(self.desk)
        play = self.plays[file.id] = Play(file)
        self.desk.emit(
            "dispute", dispute=file.id, deal=file.challenge.agreement, segment=file.challenge.segment,
            challenger=file.challenge.challenger, solver=file.case.agreement.solver, part=file.kept.part,
            state="opened",
        )  # fmt: skip
        self._gather(play)
        self._tick(play)

    # --- what it takes ---------------------------------------------------------------------------------------
    def _gather(self, play: Play) -> None:
        """Bring the Program here, and for a player the data and the base of the segment."""
        file = play.file
        if file.by_jury:
            return
        file.ask_program(self.desk)
        play.missing = {file.task.program}
        if play.side is None:
            return
        for blob, size in blobs_of(file.task).items():
            if blob != file.task.program:
                play.missing.add(blob)
                self.desk.add(Fetch(blob, file.id, self._sources(play), size))
        self._gather_base(play)

    def _sources(self, play: Play) -> tuple[bytes, ...]:
        agreement = play.file.case.agreement
        parties = (agreement.submitter, agreement.solver, play.file.challenge.challenger)
        return tuple(dict.fromkeys(peer for peer in parties if peer != self.desk.me))

    def _gather_base(self, play: Play, *, notary: bytes = b"") -> None:
        file, segment = play.file, play.file.challenge.segment
        base = file.case.base(segment)
        if base:
            play.missing.add(base)
            sources = (notary, *self._sources(play)) if notary else self._sources(play)
            root = file.case.receipt(segment).in_root
            self.desk.add(
                Fetch(base, file.id, sources, params.BLOB_BYTES_MAX, state_root=root, program=file.task.program)
            )

    def on_fetched(self, event: Fetched) -> None:
        """A blob of a dispute is here, or nobody gives it."""
        play = self.plays.get(event.token)
        if play is None or play.file.over or event.blob not in play.missing:
            return
        file = play.file
        if event.error:
            if event.blob == file.case.base(file.challenge.segment):
                if not play.withheld:
                    self.desk.emit("problem", what=f"the base of a disputed segment is withheld: {event.error}"[:300])
                play.withheld = True
                for notary in sorted(self.desk.network.notary_keys):
                    self.desk.send(notary, BaseAsk(file.id))
            return  # the next tick asks again
        play.missing.discard(event.blob)
        if event.blob == file.task.program and file.game is None:
            file.read_program(self.desk)
        self._ask(play)

    def on_base_given(self, peer: bytes, message: BaseGiven) -> None:
        """A notary has the base that nobody else gave."""
        play = self.plays.get(message.dispute)
        if play is None or peer not in self.desk.network.notary_keys or play.file.over:
            return
        if play.file.case.base(play.file.challenge.segment) in play.missing:
            self._gather_base(play, notary=peer)

    def on_read(self, event: BlobRead) -> None:
        """The Program's bytes: the game can be set up."""
        play = self.plays.get(event.token)
        if play is not None and not play.file.over and play.file.game is None and not event.error:
            play.file.take_program(event.data)
            self._advance(play)

    # --- playing ---------------------------------------------------------------------------------------------
    def _advance(self, play: Play) -> None:
        """Close the rounds that more than f notaries closed alike, then ask the sandbox for what is owed."""
        file, network = play.file, self.desk.network
        while file.game is not None and file.game.result is None:
            told = list(play.closed.get(play.number, {}).values())
            need = len(network.notaries) - network.notary_quorum + 1
            seen = next((s for s in told if told.count(s) >= need and file.here(play.number, s)), None)
            if seen is None:
                break
            file.close_round(seen)
            file.save_round(self.desk, play.number - 1)
            play.asked = b""
        self._ask(play)

    def _ask(self, play: Play) -> None:
        """Ask the sandbox what the open round asks of this side, unless it was answered or is being answered."""
        file, side = play.file, play.side
        if file.game is None or side is None or play.missing or file.over or self.desk.paused_ns:
            return
        if file.game.wants_opening():
            if side == "solver" or play.opening:
                return  # the challenger has every reason to open, and what it takes
        elif file.moves.get((side, play.number)):
            return
        question = file.game.question(side)
        if question is None or question == play.asked or self.desk.now_ns < play.again_ns:
            return
        play.asked, play.asked_ns = question, self.desk.now_ns
        self.desk.add(
            Inspect(
                work=play.work,
                task=file.task,
                base=file.kept.state or file.case.base(file.challenge.segment),
                question=question,
                memory_bytes=self.desk.means.memory_bytes,
                claimed=file.case.receipt(file.challenge.segment).checkpoint if self._stubborn(side) else b"",
            )
        )

    def _stubborn(self, side: Side) -> bool:
        """Whether this is a fraudulent solver of a demonstration, that defends what it handed in to the last."""
        return side == "solver" and bool(self.desk.means.cheat)

    def on_inspected(self, event: Inspected) -> None:
        """The sandbox's answer: sign it once, and give it to every notary."""
        play = next((p for p in self.plays.values() if p.work == event.work), None)
        if play is None or play.file.over or event.question != play.asked or play.side is None:
            return
        file, number = play.file, play.number
        if event.error:
            play.failures += 1
            play.asked = b""
            wait_ns = params.RESEND_NS << min(play.failures, 8)
            play.again_ns = self.desk.now_ns + min(wait_ns, self.desk.network.rules.dispute_move_ms * 10**6 // 4)
            self.desk.emit("problem", what=f"a question of a dispute cannot be answered: {event.error}"[:300])
            return  # a later tick asks again, until the clock decides
        if event.state and not file.kept.state:
            file.kept.state = event.state
            file.save(self.desk)
        if event.opening:
            play.opening = event.opening
        if event.body and not file.moves.get((play.side, number)):
            move = Move(
                network=self.desk.network.id, dispute=file.id, player=self.desk.me, number=number, body=event.body
            )
            added = file.add_move(self.desk.seal(move), network=self.desk.network.id)
            assert added is not None, "no move of this round is here"
            file.save_move(self.desk, *added)
            self.desk.emit("move", dispute=file.id, side=play.side, number=number, bytes=len(event.body))
        for notary in sorted(self.desk.network.notary_keys):
            self._give(play, notary, number)

    def _give(self, play: Play, notary: bytes, number: int) -> None:
        """Our own move of a round, or the opening, to one notary."""
        file = play.file
        if play.side is not None:
            for envelope in file.moves.get((play.side, number), {}).values():
                self.desk.send(notary, MoveOffer(envelope))
        if play.opening and file.game is not None and file.game.wants_opening():
            for part in parts_of(file.id, play.opening):
                self.desk.send(notary, part)

    # --- messages --------------------------------------------------------------------------------------------
    def on_game_at(self, peer: bytes, message: GameAt) -> None:
        """Where a notary stands: how a round closed, or what it lacks of us."""
        play = self.plays.get(message.dispute)
        if play is None:
            self.desk.send(peer, DisputeAsk(message.dispute))
            return
        play.heard.add(peer)
        if play.done(self.desk.now_ns):
            return
        if message.closed and 0 <= message.number - play.number <= params.DISPUTE_CATCH_UP_ROUNDS:
            play.closed.setdefault(message.number, {})[peer] = message.solver, message.challenger
            self._advance(play)
        if not message.answer:
            return
        if message.number > play.number:
            self.desk.send(peer, self._position(play))
        if play.side is not None and not (message.solver if play.side == "solver" else message.challenger):
            self._give(play, peer, message.number)

    def _position(self, play: Play) -> GameAt:
        opening = play.file.game is not None and play.file.game.wants_opening()
        return GameAt(play.file.id, play.number, b"", b"", closed=False, opening=opening, answer=True)

    def on_move(self, message: MoveOffer, dispute: bytes) -> None:
        """The other side's move, passed on by a notary; it counts when its round closes with it. Raises
        VerificationFailed. A player may sign any number: those beyond a few are only taken when a round needs them."""
        play = self.plays.get(dispute)
        if play is None or play.done(self.desk.now_ns):
            return
        file = play.file
        side, number, move_id = file.read_move(message.move, network=self.desk.network.id)
        if side == play.side or not 0 <= number - play.number <= params.DISPUTE_CATCH_UP_ROUNDS:
            return
        told = play.closed.get(number, {}).values()
        wanted = any(move_id in seen for seen in told)
        added = file.add_move(message.move, network=self.desk.network.id, variants=8 if wanted else 2)
        if added is not None:
            file.save_move(self.desk, *added)
            self._advance(play)

    def on_ask(self, peer: bytes, message: DisputeAsk) -> None:
        """A notary lacks the case of a challenge of ours."""
        play = self.plays.get(message.dispute)
        if play is not None and peer in self.desk.network.notary_keys:
            self.desk.send(peer, DisputeOpen(play.file.kept.challenge, play.file.case.request))

    def on_decline(self, peer: bytes, message: DisputeDecline) -> None:
        """A notary does not hear our challenge."""
        play = self.plays.get(message.dispute)
        if play is not None and peer in self.desk.network.notary_keys and peer not in play.heard:
            play.heard.add(peer)
            self.desk.emit("refused", dispute=message.dispute, notary=peer, code=message.code, why=message.why)

    def on_ruling(self, ruling: Ruling, envelope: bytes) -> None:
        """A notary's ruling on a dispute of ours. Raises VerificationFailed."""
        play = self.plays.get(ruling.dispute)
        if play is not None and not play.file.over and self.rulings.add(ruling, envelope, play.file):
            self.desk.emit("ruling", dispute=ruling.dispute, notary=ruling.notary, finding=ruling.finding,
                           level=ruling.level, cause=ruling.cause)  # fmt: skip
            self.rulings.publish(play.file)

    def ended(self, dispute: bytes, challenge: Challenge, finding: str) -> None:
        """An Arbitration is in the log: this dispute is over, and so are all of a root that is found wrong."""
        for play in self.plays.values():
            file = play.file
            decides = finding in ("wrong", "forced") and file.judged_with(challenge)
            if not file.over and (file.id == dispute or decides):
                file.kept.rulings = self.rulings.forget(file.id)
                file.end(self.desk, finding)
                self.desk.add(StopWork(play.work))
                self.desk.add(Release(play.work))
                play.next_ns = self.desk.now_ns
                self.desk.add(Release(file.id))
                self.desk.emit("dispute", dispute=file.id, state=finding)

    # --- time ------------------------------------------------------------------------------------------------
    def tick(self) -> None:
        """Repeat what nobody answered."""
        for play in list(self.plays.values()):
            if self.desk.now_ns >= play.next_ns and (play.file.moves or not play.file.over):
                self.desk.attempt(self._watch if play.file.over else self._tick, play)

    def _tick(self, play: Play) -> None:
        file, now = play.file, self.desk.now_ns
        play.next_ns = now + params.RESEND_NS
        rules = self.desk.network.rules
        if play.side == "challenger":
            if len(play.heard) < len(self.desk.network.notaries):
                self.desk.publish(SETTLEMENT, file.kept.challenge)
            for notary in sorted(self.desk.network.notary_keys - play.heard):
                self.desk.send(notary, DisputeOpen(file.kept.challenge, file.case.request))
        if play.missing and now >= file.asked_ns + 2 * params.RESEND_NS:
            self._gather(play)
        elif file.game is None and not play.missing:
            file.read_program(self.desk)
        if self.desk.paused_ns and play.side is not None and not play.warned:
            play.warned = True  # the notaries' clocks go on
            self.desk.emit(
                "problem", what="a dispute waits for this peer's answers: `ichiba resume`, or lose it by silence"
            )
        if self.desk.paused_ns or (play.asked and now >= play.asked_ns + rules.dispute_replay_ms * 10**6):
            play.asked = b""  # a pause ended it, or the sandbox lost it
        self._ask(play)
        if play.side is None and self.desk.network.notaries:
            notary = self.desk.rng.choice(sorted(self.desk.network.notary_keys))
            self.desk.send(notary, self._position(play))
        self.rulings.publish(file)
        silence_ns = (rules.dispute_replay_ms + rules.dispute_move_ms) * 10**6 * 4 * params.DISPUTE_LAPSE_CLOCKS
        if now >= file.kept.opened_ns + silence_ns:
            self.ended(file.id, file.challenge, "lapsed")

    def _watch(self, play: Play) -> None:
        """It is over, perhaps before this peer saw how: ask for the moves and operands that are missing, to tell."""
        play.next_ns = self.desk.now_ns + params.RESEND_NS
        if play.done(self.desk.now_ns):
            play.file.tell(self.desk)
            play.file.forget(self.desk)
        elif self.desk.network.notaries:
            notary = self.desk.rng.choice(sorted(self.desk.network.notary_keys))
            self.desk.send(notary, self._position(play))

    def on_opening(self, message: OpeningOffer) -> None:
        """Operands, from a notary, for who looks on. Raises RemoteProtocolError if they prove nothing."""
        play = self.plays.get(message.dispute)
        if play is None or play.file.game is None or not play.file.game.wants_opening():
            return
        whole = play.parts.add(message)
        if whole is not None:
            play.parts = Parts()
            play.file.game.open(whole)
            play.file.opening = whole

    # --- rows ------------------------------------------------------------------------------------------------
    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """Go on with every dispute as it stood; our own moves are in the store, so none is made twice."""
        for key, value in rows("disputes"):
            kept = msgspec.msgpack.decode(value, type=Kept)
            if kept.part == "notary":
                continue
            request = msgspec.msgpack.decode(kept.case, type=CheckRequest)
            file = open_file(kept.challenge, request, desk=self.desk, part=kept.part, kept=kept)
            play = self.plays[key] = Play(file)
            file.restore(rows)
            if not file.over:
                self._gather(play)
