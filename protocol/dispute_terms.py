"""What a dispute is about, and how it can end: the words that the game, its referees and its players share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from protocol.dispute_partials import Partial
from protocol.profile import Tolerance
from protocol.program import Program
from protocol.task import TaskSpec

__all__ = ["SIDES", "Cause", "Level", "Pledge", "Result", "Rung", "Side", "Terms", "Value"]

Side: TypeAlias = Literal["solver", "challenger"]
Level: TypeAlias = Literal["segment", "step", "state", "node", "tile", "element", "block"]
Cause: TypeAlias = Literal["leaf", "silence", "withheld", "malformed", "equivocation"]
Value: TypeAlias = "int | Partial | bytes | None"

SIDES: tuple[Side, ...] = ("solver", "challenger")


@dataclass(frozen=True)
class Pledge:
    """What a solver signed of its own run before the challenge; its answers in the game may not be others.

    steps: the root over the states' roots. step, trace: of one training step the root of its trace.
    """

    steps: bytes
    step: int
    trace: bytes


@dataclass(frozen=True)
class Terms:
    """What a dispute is about, agreed by everybody.

    dispute: the id of its Challenge. in_root: of the state the segment starts from; claimed_root and found_root: of its
    end, by the solver and by the challenger. block: how many terms of a reduction the referee repeats at most.
    tolerance: of a tolerant task, whose leaf is judged by bounds. pledge: see there.
    """

    dispute: bytes
    task: TaskSpec
    program: Program
    segment: int
    in_root: bytes
    claimed_root: bytes
    found_root: bytes
    block: int
    tolerance: Tolerance | None = None
    pledge: Pledge | None = None


@dataclass(frozen=True)
class Result:
    """How a game ended. level: how far the descent had come. operations: metered by the referee, one for each byte of
    moves and operands it took and those of the leaf. both_wrong: the challenger's value does not follow either. what:
    for people."""

    loser: Side
    cause: Cause
    level: Level
    operations: int
    both_wrong: bool = False
    what: str = ""


@dataclass(frozen=True)
class Rung:
    """One level of the descent, for people. where: the place the sides first differ at; op and source: of a node, the
    user's own line; values: of both sides, and the referee's where it came so far."""

    level: Level
    where: str
    solver: Value
    challenger: Value
    referee: Value = None
    op: str = ""
    source: str = ""
