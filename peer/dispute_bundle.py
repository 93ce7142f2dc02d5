"""A dispute in one file: its challenge, the evidence it rests on, every move, the operands, the Program, the rulings.

Promises: `verify` believes none of it. It checks every signature, plays the game again from the moves, executes the one
operation that is left itself, and says whether that is what the notaries found. What a file cannot show, that a player
was silent, is the notaries' word, and the report says so. Refuses to know the network and the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec

from peer.dispute_file import SILENT, WITHHELD, DisputeFile, Kept, open_dispute
from peer.messages import CheckRequest
from protocol import params
from protocol.arbitration import open_arbitration
from protocol.codec import decode
from protocol.dispute import Result
from protocol.errors import LocalProtocolError, NotFound, VerificationFailed
from protocol.network import Network, load_trusted
from protocol.program import program_id
from protocol.records import Arbitration, open_record

__all__ = ["SCHEMA", "DisputeReport", "make", "verify"]

SCHEMA: Final = "ichiba.dispute-bundle/1"

_Hex = Annotated[str, msgspec.Meta(max_length=2 * params.MESSAGE_BYTES_MAX, pattern="^([0-9a-f]{2})*$")]
_Hex32 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Bundle(msgspec.Struct, forbid_unknown_fields=True):
    """The file as decoded JSON; bytes in hex. rounds: ids of the moves each round closed with, solver's first."""

    schema: str
    network: Annotated[str, msgspec.Meta(max_length=params.NETWORK_FILE_BYTES_MAX)]
    challenge: _Hex
    case: _Hex
    moves: Annotated[list[_Hex], msgspec.Meta(max_length=4 * params.DISPUTE_ROUNDS_MAX)]
    rounds: Annotated[list[tuple[_Hex32, _Hex32]], msgspec.Meta(max_length=params.DISPUTE_ROUNDS_MAX)]
    opening: Annotated[str, msgspec.Meta(max_length=4 * params.MESSAGE_BYTES_MAX, pattern="^([0-9a-f]{2})*$")]
    arbitration: _Hex
    program: Annotated[str, msgspec.Meta(max_length=2 * params.PROGRAM_BYTES_MAX, pattern="^([0-9a-f]{2})*$")] = ""


@dataclass(frozen=True)
class DisputeReport:
    """What a dispute's file proves. loser: "solver" or "challenger", by the game played again. finding: the notaries'
    ("" where they have not ruled). by_word: the game was ended by a silence, which is their word. rounds: played."""

    dispute: bytes
    segment: int
    loser: str
    cause: str
    level: str
    what: str
    finding: str
    rounds: int
    by_word: bool


def make(file: DisputeFile, arbitration: bytes) -> dict[str, Any]:
    """The bundle of a dispute, without network file and Program, which its owner adds. Bytes stay bytes.

    Raises NotFound for a dispute whose moves are not kept (any more), or that jurors decided.
    """
    moves, rounds, opening = file.transcript()
    if not rounds:
        raise NotFound(
            f"no moves of dispute {file.id.hex()[:12]} are kept here",
            why="jurors decided it" if file.by_jury else "it has not begun, or is older than what is kept",
            next_step="ask a notary, `ichiba dispute list` there",
        )
    return {
        "challenge": file.kept.challenge,
        "case": file.kept.case,
        "moves": moves,
        "rounds": [list(seen) for seen in rounds],
        "opening": opening,
        "arbitration": arbitration,
        "program": file.task.program,
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
        raise VerificationFailed("a dispute about float work has jurors, and no moves")
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
    finding = _finding(given, file, network, game.result)
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


def _finding(given: _Bundle, file: DisputeFile, network: Network, result: Result) -> str:
    """What the notaries found, which must be what the game comes to. Empty without an Arbitration."""
    if not given.arbitration:
        return ""
    record, _, _ = open_record(bytes.fromhex(given.arbitration), network=network.id)
    if not isinstance(record, Arbitration):
        raise VerificationFailed("no arbitration where one should be")
    judged = open_arbitration(record, file.case.agreement, network)
    if judged.dispute != file.id:
        raise VerificationFailed("the arbitration is of another dispute")
    if judged.finding in ("wrong", "right") and (judged.finding == "wrong") != (result.loser == "solver"):
        raise VerificationFailed(
            f"the notaries found the work {judged.finding}, the game says the {result.loser} loses"
        )
    return judged.finding
