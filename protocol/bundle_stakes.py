"""The stakes behind a bundle's verdicts: what the network file gives, and what moves in the bundle show to be added."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.bundle_case import Case, open_as
from protocol.certificate import check_certified
from protocol.errors import VerificationFailed
from protocol.records import StakeMove

__all__ = ["open_stakes"]


def open_stakes(case: Case, moves: Sequence[str]) -> None:
    """Count what signed moves, certified where the network has notaries, add to the stakes of those who made them.

    Withdrawals may be left out of a file, and a stake of the network file taken out as well: whether a stake was still
    there the settlement log alone says, and the report says that. Raises Refused.
    """
    seen: set[bytes] = set()
    for text in moves:
        move, move_id, signers = open_as(text, StakeMove, "move of stake", case.number, case.network)
        if move_id in seen or move.kind != "add":
            raise case.refuse("stake", "a move of stake is given twice, or adds nothing")
        try:
            check_certified(move, signers, case.network)
        except VerificationFailed as error:
            raise case.refuse("stake", error.what, why=error.why) from None
        seen.add(move_id)
        case.stakes[move.owner] = case.stakes.get(move.owner, 0) + move.amount_micro
