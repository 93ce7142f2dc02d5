"""One dispute as any peer holds it: the challenge, the evidence, the moves, and the game they make.

A notary, both players and a submitter that looks on hold the same file and run the same game (protocol/dispute.py);
they differ in what they may do with it. A round closes here with what a quorum of notaries saw in it, so that every
honest peer's game takes the same moves, whatever a player sends to whom. Refuses to know clocks and the network.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import msgspec

from peer.case import Case, open_evidence
from peer.deals import task_of
from peer.desk import Desk
from peer.events import Fetch, ReadBlob
from peer.messages import CheckRequest, OpeningOffer, Records
from protocol import params
from protocol.dispute import SIDES, Game, Side, Terms
from protocol.errors import VerificationFailed
from protocol.jury import jury_of, open_word
from protocol.network import Network
from protocol.program import Program
from protocol.records import Challenge, Move, Verdict, open_record
from protocol.task import TaskSpec

__all__ = [
    "SILENT", "WITHHELD", "WORDS_OF_A_JUROR_MAX", "DisputeFile", "Kept", "Parts", "open_dispute", "open_file",
    "parts_of", "story_of",
]  # fmt: skip

SILENT = bytes(32)  # instead of a move's id: its player's clock ran out
WORDS_OF_A_JUROR_MAX = 2  # that differ: they prove that it says now this, now that; more would prove no more
WITHHELD = b"\xff" * 32  # instead of a challenger's: its solver gives nobody the state that the segment starts from
Seen = tuple[bytes, bytes]  # of one round, by the solver and by the challenger


class Kept(msgspec.Struct, kw_only=True):
    """The row of a dispute in the store; moves, rounds and the opening have rows of their own."""

    challenge: bytes
    case: bytes
    part: Literal["notary", "solver", "challenger", "observer"]
    opened_ns: int
    state: bytes = b""  # the blob that a player's questions count from, once an answer gave one
    ended: str = ""  # "": it goes on; else wrong, right, forced or lapsed
    ended_ns: int = 0
    rulings: list[tuple[bytes, str, str, str]] = msgspec.field(default_factory=list)  # notary, finding, level, cause
    story: bytes = b""  # the descent as JSON, when the game is over
    words: list[bytes] = msgspec.field(default_factory=list)  # of each juror its first verdict, and one of another word
    transcript: bytes = b""  # moves, rounds and opening of a game that is over, for `ichiba dispute export`


@dataclass
class DisputeFile:
    """See the module docstring. `game` is there once the Program is."""

    id: bytes
    kept: Kept
    challenge: Challenge
    case: Case
    game: Game | None = None
    moves: dict[tuple[Side, int], dict[bytes, bytes]] = field(default_factory=dict)  # place -> move id -> envelope
    rounds: list[Seen] = field(default_factory=list)  # what each closed round closed with
    opening: bytes = b""
    asked_ns: int = 0  # when the Program was last asked for
    drawn: tuple[bytes, ...] | None = None  # see `jurors`

    @property
    def root(self) -> tuple[bytes, bytes, int]:
        """What is disputed: agreement, proof and what `Case.disputed` says. Its disputes are heard one at a time."""
        return self.challenge.agreement, self.challenge.proof, self.case.disputed(self.challenge.segment)

    def judged_with(self, challenge: Challenge) -> bool:
        """Whether a finding of wrong on that challenge decides this one as well."""
        there = (challenge.agreement, challenge.proof, self.case.disputed(challenge.segment))
        return self.root == there

    @property
    def age(self) -> tuple[int, bytes]:
        """Of two disputes of one root the one that goes first has the lower."""
        return self.challenge.created_ns, self.id

    @property
    def task(self) -> TaskSpec:
        """The task of the deal."""
        task = task_of(self.case.task)
        assert isinstance(task, TaskSpec), "of a script nothing is challenged"
        return task

    @property
    def over(self) -> bool:
        """Whether it has ended, by an Arbitration or by nobody's ruling in time."""
        return bool(self.kept.ended)

    def player(self, side: Side) -> bytes:
        """The key of one side."""
        return self.case.agreement.solver if side == "solver" else self.challenge.challenger

    def side_of(self, peer: bytes) -> Side | None:
        """The side that `peer` plays, if it plays one."""
        return next((side for side in SIDES if self.player(side) == peer), None)

    @property
    def parties(self) -> frozenset[bytes]:
        """Who is touched by it, and so judges nothing of it."""
        agreement = self.case.agreement
        return frozenset((agreement.submitter, agreement.solver, self.challenge.challenger))

    @property
    def by_jury(self) -> bool:
        """Whether no game is played, but jurors execute the segment again (peer/jury.py)."""
        return self.case.by_jury

    def jurors(self, network: Network) -> tuple[bytes, ...]:
        """Who may be asked to execute it, in order. Drawn once: anybody may send verdicts that are held against it."""
        if self.drawn is None:
            self.drawn = jury_of(self.case.random, self.challenge.segment, network, parties=self.parties)
        return self.drawn

    def words(self, *, network: bytes) -> list[Verdict]:
        """The verdicts of jurors that are kept, as they came: of one juror two where it said two words, which proves
        that it did."""
        opened = [open_record(envelope, network=network)[0] for envelope in self.kept.words]
        return [record for record in opened if isinstance(record, Verdict)]

    def add_word(self, verdict: Verdict, envelope: bytes, *, network: Network) -> bool:
        """Keep a juror's verdict on what is disputed here, if it is its first, or the first that says another word than
        that. Whether it was kept."""
        if verdict.checker not in self.jurors(network):
            return False
        try:
            word = open_word(verdict, self.challenge, self.case.tolerance)
        except VerificationFailed:
            return False
        before = [one for one in self.words(network=network.id) if one.checker == verdict.checker]
        said = {open_word(one, self.challenge, self.case.tolerance) for one in before}
        if word in said or len(said) >= WORDS_OF_A_JUROR_MAX:
            return False
        self.kept.words.append(envelope)
        return True

    def tell_words(self, desk: Desk) -> None:
        """It is over, so nobody can say after them any more: a notary gives the parties the words of the jurors."""
        for party in sorted(self.parties) if self.kept.words else ():
            desk.send(party, Records(tuple(self.kept.words)))

    # --- the Program -----------------------------------------------------------------------------------------
    def ask_program(self, desk: Desk) -> None:
        """(Again) bring the Program here; `take_program` gets it."""
        if self.by_jury:
            return
        self.asked_ns = desk.now_ns
        agreement = self.case.agreement
        sources = tuple(p for p in (self.challenge.challenger, agreement.solver, agreement.submitter) if p != desk.me)
        desk.add(Fetch(self.task.program, self.id, sources, self.task.program_bytes))

    def read_program(self, desk: Desk) -> None:
        """The Program is here as a blob: read it."""
        if not self.by_jury:
            desk.add(ReadBlob(self.task.program, self.id, params.PROGRAM_BYTES_MAX))

    def take_program(self, data: bytes) -> None:
        """Set up the game and play what is known of it. Raises RemoteProtocolError for a Program that does not fit."""
        receipt = self.case.receipt(self.challenge.segment)
        program = Program.from_bytes(data)
        terms = Terms(
            dispute=self.id,
            task=self.task,
            program=program,
            segment=self.challenge.segment,
            in_root=receipt.in_root,
            claimed_root=receipt.out_root,
            found_root=self.challenge.found_root,
            block=self.block,
        )
        self.game = Game(terms)
        for number, seen in enumerate(self.rounds):
            self._play(number, seen)
        if self.opening and self.game.wants_opening():
            self.game.open(self.opening)

    block: int = 512

    # --- moves -----------------------------------------------------------------------------------------------
    def read_move(self, envelope: bytes, *, network: bytes) -> tuple[Side, int, bytes]:
        """Side, round and id of a signed move of this dispute. Raises VerificationFailed for any other record."""
        record, move_id, _ = open_record(envelope, network=network)
        side = self.side_of(record.player) if isinstance(record, Move) and record.dispute == self.id else None
        if not isinstance(record, Move) or side is None:
            raise VerificationFailed("a move of another dispute, or by no player of this one")
        if record.number >= params.DISPUTE_ROUNDS_MAX:
            raise VerificationFailed(f"a move of round {record.number}, a game has {params.DISPUTE_ROUNDS_MAX}")
        return side, record.number, move_id

    def add_move(self, envelope: bytes, *, network: bytes, variants: int = 2) -> tuple[Side, int, bytes] | None:
        """Keep a move. Its place and id if it is new. Of one place at most `variants` are kept: two prove a fraud."""
        side, number, move_id = self.read_move(envelope, network=network)
        here = self.moves.setdefault((side, number), {})
        if move_id in here or len(here) >= variants:
            return None
        here[move_id] = envelope
        return side, number, move_id

    def here(self, number: int, seen: Seen) -> bool:
        """Whether the bodies of a round's moves are here."""
        places = zip(SIDES, seen, strict=True)
        return all(s in (SILENT, WITHHELD) or s in self.moves.get((side, number), {}) for side, s in places)

    def close_round(self, seen: Seen) -> None:
        """The open round closes with these moves, whose bodies are here, or with who was silent in it."""
        number = len(self.rounds)
        assert self.here(number, seen), "a round closes with moves that are here"
        self.rounds.append(seen)
        if self.game is not None:
            self._play(number, seen)

    def _play(self, number: int, seen: Seen) -> None:
        assert self.game is not None, "the game is set up"
        solver, challenger = seen
        if WITHHELD in seen:
            self.game.forfeit("solver", "withheld")
        elif self.game.wants_opening():
            self.game.forfeit("challenger", "withheld")  # it agrees on all that must be opened, so it can open it
        elif challenger == SILENT:
            self.game.forfeit("challenger", "silence")  # of two silent players the accuser: it does not press its case
        elif solver == SILENT:
            self.game.forfeit("solver", "silence")
        else:
            for side, move_id in zip(SIDES, seen, strict=True):
                record, _, _ = open_record(self.moves[side, number][move_id], network=self.challenge.network)
                assert isinstance(record, Move), "moves are checked when they come in"
                self.game.take(side, number, record.body)

    def twins(self) -> Side | None:
        """The side that signed two moves for one round, which proves a fraud by itself."""
        return next((side for (side, _), variants in sorted(self.moves.items()) if len(variants) > 1), None)

    # --- the store -------------------------------------------------------------------------------------------
    def save(self, desk: Desk) -> None:
        """Journal the row."""
        desk.save("disputes", self.id, msgspec.msgpack.encode(self.kept))

    def save_move(self, desk: Desk, side: Side, number: int, move_id: bytes) -> None:
        """Journal a move."""
        key = self.id + SIDES.index(side).to_bytes(1, "big") + number.to_bytes(2, "big") + move_id
        desk.save("dispute-moves", key, self.moves[side, number][move_id])

    def save_round(self, desk: Desk, number: int) -> None:
        """Journal what a round closed with."""
        desk.save("dispute-rounds", self.id + number.to_bytes(2, "big"), b"".join(self.rounds[number]))

    def save_opening(self, desk: Desk) -> None:
        """Journal the operands."""
        desk.save("dispute-openings", self.id, self.opening)

    def transcript(self) -> tuple[list[bytes], list[Seen], bytes]:
        """Every move, what the rounds closed with, and the opening; empty if they are not kept."""
        if self.kept.transcript:
            kept: tuple[list[bytes], list[Seen], bytes] = msgspec.msgpack.decode(
                self.kept.transcript, type=tuple[list[bytes], list[Seen], bytes]
            )
            return kept
        moves = [envelope for _, variants in sorted(self.moves.items()) for envelope in variants.values()]
        return moves, list(self.rounds), self.opening

    def forget(self, desk: Desk) -> None:
        """Take what only a game needs, that goes on or is looked at, out of the store; keep what proves it."""
        if self.rounds:
            kept = msgspec.msgpack.encode(self.transcript())
            if len(kept) + len(self.kept.case) + len(self.kept.story) < params.STORE_VALUE_BYTES_MAX - 4096:
                self.kept.transcript = kept
                self.save(desk)
        for (side, number), variants in self.moves.items():
            for move_id in variants:
                key = self.id + SIDES.index(side).to_bytes(1, "big") + number.to_bytes(2, "big") + move_id
                desk.save("dispute-moves", key, None)
        for number in range(len(self.rounds) + params.DISPUTE_CATCH_UP_ROUNDS + 1):
            desk.save("dispute-rounds", self.id + number.to_bytes(2, "big"), None)
            for place in range(len(SIDES)):
                desk.save("dispute-seen", self.id + bytes([place]) + number.to_bytes(2, "big"), None)
        desk.save("dispute-openings", self.id, None)
        self.moves, self.rounds, self.opening, self.game = {}, [], b"", None

    def end(self, desk: Desk, finding: str) -> None:
        """It is over."""
        self.kept.ended, self.kept.ended_ns = finding, desk.now_ns
        self.tell(desk)

    def tell(self, desk: Desk) -> None:
        """Keep the story, as far as it is known."""
        if self.game is not None:
            self.kept.story = story_of(self)
        self.save(desk)

    def restore(self, rows: Any) -> None:
        """Moves, rounds and opening from the store."""
        for key, value in _rows_of(rows("dispute-moves"), self.id):
            side, number = SIDES[key[32]], int.from_bytes(key[33:35], "big")
            self.moves.setdefault((side, number), {})[key[35:]] = value
        self.rounds = [(value[:32], value[32:]) for _, value in _rows_of(rows("dispute-rounds"), self.id)]
        self.opening = b"".join(value for _, value in _rows_of(rows("dispute-openings"), self.id))


def _rows_of(rows: Iterable[tuple[bytes, bytes]], dispute: bytes) -> list[tuple[bytes, bytes]]:
    return sorted((key, value) for key, value in rows if key[:32] == dispute)


def open_file(
    envelope: bytes,
    request: CheckRequest,
    *,
    desk: Desk,
    part: Literal["notary", "solver", "challenger", "observer"],
    kept: Kept | None = None,
) -> DisputeFile:
    """The file of a challenge whose evidence holds, as `open_dispute` says. Raises RemoteProtocolError."""
    row = kept or Kept(challenge=envelope, case=msgspec.msgpack.encode(request), part=part, opened_ns=desk.now_ns)
    return open_dispute(envelope, request, network=desk.network, kept=row)


def open_dispute(envelope: bytes, request: CheckRequest, *, network: Network, kept: Kept) -> DisputeFile:
    """The file of a challenge whose evidence holds. Raises RemoteProtocolError.

    The evidence is that of a check (peer/checker.py), from scratch; the challenge is signed by a peer that is no party
    of the deal, names its proof, one of its receipted segments and the root that receipt claims, and another root.
    """
    challenge, dispute, _ = open_record(envelope, network=network.id)
    if not isinstance(challenge, Challenge):
        raise VerificationFailed("a dispute is opened by a challenge")
    case = open_evidence(request, network=network)
    agreement = case.agreement
    if (challenge.agreement, challenge.proof) != (case.agreement_id, case.proof_id):
        raise VerificationFailed("the challenge is about another deal or proof than its evidence")
    if challenge.challenger in (agreement.submitter, agreement.solver):
        raise VerificationFailed("a party of the deal challenges it")
    if not agreement.first_segment <= challenge.segment < agreement.first_segment + len(case.receipts):
        raise VerificationFailed(f"segment {challenge.segment} of the deal has no receipt")
    receipt = case.receipt(challenge.segment)
    if challenge.claimed_root != receipt.out_root or challenge.found_root == receipt.out_root:
        raise VerificationFailed("the challenge names another root than the receipt claims, or the same as its own")
    if challenge.operations > agreement.operations:
        raise VerificationFailed("the challenge charges more operations than the deal has")
    return DisputeFile(dispute, kept, challenge, case, block=network.rules.dispute_block)


def parts_of(dispute: bytes, opening: bytes) -> list[OpeningOffer]:
    """An opening as messages."""
    size = params.OPENING_PART_BYTES
    cut = [opening[at : at + size] for at in range(0, len(opening), size)]
    return [OpeningOffer(dispute, number, len(cut), data) for number, data in enumerate(cut)]


def story_of(file: DisputeFile) -> bytes:
    """The descent and the result as JSON, for people."""
    game = file.game
    assert game is not None, "the game is set up"
    result = game.result
    return msgspec.json.encode(
        {
            "level": game.level,
            "rounds": game.number,
            "message_bytes": sum(len(e) for variants in file.moves.values() for e in variants.values()),
            "opening_bytes": len(file.opening),
            "result": None if result is None else asdict(result),
            "descent": [
                {**asdict(rung), **{name: _shown(getattr(rung, name)) for name in ("solver", "challenger", "referee")}}
                for rung in game.descent()
            ],
        }
    )


def _shown(value: Any) -> Any:
    """A root in hex, an element or a partial result as numbers."""
    return value.hex() if isinstance(value, bytes) else value


@dataclass
class Parts:
    """The parts of one opening, as one peer sends them."""

    held: dict[int, bytes] = field(default_factory=dict)

    def add(self, offer: OpeningOffer) -> bytes | None:
        """The whole, once every part is here. Raises VerificationFailed for a part beyond the last."""
        if offer.part >= offer.parts:
            raise VerificationFailed(f"part {offer.part} of {offer.parts} of an opening")
        self.held[offer.part] = offer.data
        if len(self.held) < offer.parts:
            return None
        return b"".join(self.held[number] for number in range(offer.parts)) if max(self.held) < offer.parts else None
