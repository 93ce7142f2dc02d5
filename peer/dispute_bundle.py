"""A dispute in one file: its challenge, the evidence it rests on, every move, the operands, the Program, the rulings.

Promises: `verify` believes none of it. It checks every signature, plays the game again from the moves, executes the one
operation that is left itself, and says whether that is what the notaries found. What a file cannot show, that a player
was silent, is the notaries' word, and the report says so. A dispute that has no game has the verdicts of its jurors
instead: `verify` draws them again, and counts. Refuses to know the network and the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec

from peer.dispute_file import SILENT, WITHHELD, WORDS_OF_A_JUROR_MAX, DisputeFile, Kept, open_dispute
from peer.messages import CheckRequest
from protocol import params
from protocol.arbitration import Judged, open_arbitration
from protocol.codec import decode
from protocol.errors import LocalProtocolError, NotFound, VerificationFailed
from protocol.jury import Word, cause_of, decided, open_word
from protocol.keys import short
from protocol.network import Network, load_trusted
from protocol.program import program_id
from protocol.records import Arbitration, Verdict, open_record

__all__ = ["SCHEMA", "DisputeReport", "make", "verify"]

SCHEMA: Final = "ichiba.dispute-bundle/1"

_Hex = Annotated[str, msgspec.Meta(max_length=2 * params.MESSAGE_BYTES_MAX, pattern="^([0-9a-f]{2})*$")]
_Hex32 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Bundle(msgspec.Struct, forbid_unknown_fields=True):
    """The file as decoded JSON; bytes in hex. rounds: ids of the moves each round closed with, solver's first. jurors:
    the verdicts of a dispute that has no game, and so no moves, operands and Program either."""

    schema: str
    network: Annotated[str, msgspec.Meta(max_length=params.NETWORK_FILE_BYTES_MAX)]
    challenge: _Hex
    case: _Hex
    moves: Annotated[list[_Hex], msgspec.Meta(max_length=4 * params.DISPUTE_ROUNDS_MAX)]
    rounds: Annotated[list[tuple[_Hex32, _Hex32]], msgspec.Meta(max_length=params.DISPUTE_ROUNDS_MAX)]
    opening: Annotated[str, msgspec.Meta(max_length=4 * params.MESSAGE_BYTES_MAX, pattern="^([0-9a-f]{2})*$")]
    arbitration: _Hex
    program: Annotated[str, msgspec.Meta(max_length=2 * params.PROGRAM_BYTES_MAX, pattern="^([0-9a-f]{2})*$")] = ""
    jurors: Annotated[list[_Hex], msgspec.Meta(max_length=WORDS_OF_A_JUROR_MAX * params.JURORS_MAX)] = []


@dataclass(frozen=True)
class DisputeReport:
    """What a dispute's file proves. loser: "solver" or "challenger", by the game played again, or by its jurors' words.
    finding: the notaries' ("" where they have not ruled). by_word: the game was ended by a silence, which is their
    word; or jurors who said two words are needed for a quorum, and which of them came first is. rounds: played. jurors:
    who decided, of a dispute that has no game; two_words: those who signed two words that differ."""

    dispute: bytes
    segment: int
    loser: str
    cause: str
    level: str
    what: str
    finding: str
    rounds: int
    by_word: bool
    jurors: tuple[bytes, ...] = ()
    two_words: tuple[bytes, ...] = ()


def make(file: DisputeFile, arbitration: bytes) -> dict[str, Any]:
    """The bundle of a dispute, without network file and Program, which its owner adds. Bytes stay bytes.

    Raises NotFound for a dispute whose moves, or whose jurors' words, are not kept here (any more).
    """
    moves, rounds, opening = file.transcript()
    if not rounds and not file.kept.words:
        raise NotFound(
            f"no {'words of jurors' if file.by_jury else 'moves'} of dispute {file.id.hex()[:12]} are kept here",
            why="it has not begun, or is older than what is kept",
            next_step="ask a notary, `ichiba dispute list` there",
        )
    return {
        "jurors": file.kept.words,
        "challenge": file.kept.challenge,
        "case": file.kept.case,
        "moves": moves,
        "rounds": [list(seen) for seen in rounds],
        "opening": opening,
        "arbitration": arbitration,
        "program": b"" if file.by_jury else file.task.program,
    }


def verify(bundle: Any, network_id: bytes) -> DisputeReport:
    """Check a decoded file against the network it must belong to (id, 32 bytes).

    Raises VerificationFailed, or another RemoteProtocolError, for anything that does not follow.
    """
    try:
        given = msgspec.convert(bundle, _Bundle)
    except (msgspec.ValidationError, RecursionError) as error:
        raise VerificationFailed(f"no bundle of a dispute: {error}"[:300]) from None
    network = _network(given, network_id)
    envelope, case = bytes.fromhex(given.challenge), bytes.fromhex(given.case)
    request = decode(CheckRequest, case, bytes_max=params.MESSAGE_BYTES_MAX)
    kept = Kept(challenge=envelope, case=case, part="observer", opened_ns=0)
    file = open_dispute(envelope, request, network=network, kept=kept)
    if file.by_jury:
        return _by_jury(given, file, network)
    if given.jurors:
        raise VerificationFailed("a dispute about one operation has moves, and no jurors")
    program = bytes.fromhex(given.program)
    if program_id(program) != file.task.program:
        raise VerificationFailed("the Program in the file is not the task's")
    for move in given.moves:
        file.add_move(bytes.fromhex(move), network=network.id)
    file.opening = bytes.fromhex(given.opening)
    for number, (solver, challenger) in enumerate(given.rounds):
        seen = bytes.fromhex(solver), bytes.fromhex(challenger)
        if not file.here(number, seen):
            raise VerificationFailed(f"the moves that round {number} closed with are not in the file")
        file.rounds.append(seen)
    try:
        file.take_program(program)
    except LocalProtocolError as error:
        raise VerificationFailed(f"the moves do not make a game: {error.what}") from None
    game = file.game
    assert game is not None, "the Program is here"
    if game.result is None:
        raise VerificationFailed(f"the game is not over: it stands at level {game.level} after {game.number} rounds")
    finding = _finding(given, file, network, game.result.loser)
    by_word = any(SILENT in seen or WITHHELD in seen for seen in file.rounds)
    result = game.result
    return DisputeReport(
        file.id,
        file.challenge.segment,
        result.loser,
        result.cause,
        game.level,
        result.what,
        finding,
        game.number,
        by_word,
    )


def _network(given: _Bundle, network_id: bytes) -> Network:
    if given.schema != SCHEMA:
        raise VerificationFailed(f"a file of schema {given.schema[:40]!r}, this program reads {SCHEMA}")
    return load_trusted(given.network, network_id, what="a dispute")


def _by_jury(given: _Bundle, file: DisputeFile, network: Network) -> DisputeReport:
    """A dispute that jurors decided: they are those of the draw, and a quorum of them says one word. Who says two has
    none, unless the notaries ruled by it before they heard the other."""
    if given.moves or given.rounds or given.opening or given.program:
        raise VerificationFailed("a dispute that jurors decide has no moves, no operands and no Program")
    drawn, words = file.jurors(network), dict[bytes, set[Word]]()
    for number, envelope in enumerate(given.jurors):
        verdict, _, _ = open_record(bytes.fromhex(envelope), network=network.id)
        if not isinstance(verdict, Verdict) or verdict.checker not in drawn:
            raise VerificationFailed(f"word {number} is no verdict, or of a peer that was not drawn as a juror")
        said, heard = words.setdefault(verdict.checker, set()), open_word(verdict, file.challenge, file.case.tolerance)
        if heard in said or len(said) >= WORDS_OF_A_JUROR_MAX:
            raise VerificationFailed(f"one word of juror {short(verdict.checker)} twice, or more than two of its words")
        said.add(heard)
    twice = tuple(juror for juror in drawn if len(words.get(juror, ())) > 1)
    clear = decided(words, network.rules.tolerant_quorum)
    word = clear or _ruled_before(given, words, file, network)
    if word is None:
        raise VerificationFailed(
            f"the words of {len(words)} jurors decide nothing", why=f"{network.rules.tolerant_quorum} of one word do"
        )
    loser, cause = "solver" if word.finding == "wrong" else "challenger", cause_of(word, file.challenge)
    for_it = tuple(juror for juror in drawn if word in words.get(juror, ()) and not (clear and juror in twice))
    what = f"{len(for_it)} jurors executed the segment again and found it {word.finding}"
    if cause == "both":
        what += ", and its end another than the challenger's as well"
    finding = _finding(given, file, network, loser, basis=_basis(cause, file))
    return DisputeReport(
        file.id, file.challenge.segment, loser, cause, "segment", what, finding, 0, by_word=clear is None,
        jurors=for_it, two_words=twice,
    )  # fmt: skip


def _ruled_before(
    given: _Bundle, words: Mapping[bytes, Collection[Word]], file: DisputeFile, network: Network
) -> Word | None:
    """The word that the notaries ruled by, where a quorum said it and some of those said another one as well: an order
    of words that no file can show. None without a ruling, or where no such quorum said what it finds."""
    judged = _judged(given, file, network)
    if judged is None:
        return None
    count = Counter(word for said in words.values() for word in said)
    for word, jurors in sorted(count.items()):
        told = word.finding, _basis(cause_of(word, file.challenge), file)
        if jurors >= network.rules.tolerant_quorum and told == (judged.finding, judged.basis):
            return word
    return None


def _basis(cause: str, file: DisputeFile) -> str:
    """That of protocol.arbitration.Judged for a jury's ruling."""
    return "both" if cause == "both" else "repeated" if file.case.tolerance is None else "jury"


def _finding(given: _Bundle, file: DisputeFile, network: Network, loser: str, *, basis: str = "") -> str:
    """What the notaries found, which must be what the game, or the jury, comes to. Empty without an Arbitration.
    basis: of a jury's, by which alone it may have been found: whether the challenger is paid depends on it."""
    judged = _judged(given, file, network)
    if judged is None:
        return ""
    if judged.finding in ("wrong", "right") and (judged.finding == "wrong") != (loser == "solver"):
        said = "its jurors say" if file.by_jury else "the game says"
        raise VerificationFailed(f"the notaries found the work {judged.finding}, {said} the {loser} loses")
    if basis and judged.basis != basis:
        raise VerificationFailed(f"the notaries ruled by {judged.basis}, the words of the jurors come to {basis}")
    return judged.finding


def _judged(given: _Bundle, file: DisputeFile, network: Network) -> Judged | None:
    """What a quorum of notaries ruled on this dispute, if that is in the file. Raises VerificationFailed."""
    if not given.arbitration:
        return None
    record, _, _ = open_record(bytes.fromhex(given.arbitration), network=network.id)
    if not isinstance(record, Arbitration):
        raise VerificationFailed("no arbitration where one should be")
    judged = open_arbitration(record, file.case.agreement, network)
    if judged.dispute != file.id:
        raise VerificationFailed("the arbitration is of another dispute")
    return judged
