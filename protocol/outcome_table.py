"""Who ends with what: every combination of behaviours of a deal's parties, as data. DESIGN §5.8, §7 and §8.

A cell is what the submitter, the solver, the first verifier and the whistleblower do, and what chance does. `steps`
says which findings follow, in order; a finding is a row of FINDINGS, and a row says what moves from which bucket to
whom. It is the table of a network with notaries; the last row is what a network without them has in place of a
conviction. Pure: it posts nothing. market/entries.py and market/penalties.py build the entries, and
tests/test_outcomes.py holds them to this table in every cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Final, Literal, NamedTuple

from protocol.outcomes import FAULT, LOCK, STAKE

__all__ = [
    "BEHAVIOURS",
    "CHANCES",
    "FINDINGS",
    "MEANINGS",
    "PARTIES",
    "Cell",
    "Line",
    "Move",
    "Row",
    "Step",
    "cells",
    "impossible",
    "moves",
    "paid_checkers",
    "steps",
]

PARTIES: Final = ("submitter", "solver", "verifier", "whistleblower")
BEHAVIOURS: Final = ("honest", "wrong", "lazy", "silent", "withholding", "colluding")
CHANCES: Final = {
    "seen": "the segments that are looked at are those where something is wrong, if anything is",
    "unseen": "what is wrong is in a segment that nobody looks at",
    "ordered": "the beacon ordered an error (DESIGN §8), in a segment that is looked at",
}
MEANINGS: Final = {
    ("submitter", "honest"): "has the work checked, and pays it by a settlement",
    ("submitter", "wrong"): "has the work checked, then closes alone with an old voucher",
    ("submitter", "lazy"): "pays without having anything checked",
    ("submitter", "silent"): "vanishes after the receipts: reveals no seed, asks nobody, closes nothing",
    ("submitter", "withholding"): "gives no checker the case, so that nothing can be drawn or checked",
    ("submitter", "colluding"): "asks only checkers of its own; pays a solver of its own and no other",
    ("solver", "honest"): "does the work and answers every question about it",
    ("solver", "wrong"): "hands in a false root and defends it",
    ("solver", "lazy"): "skips steps and hands in what it makes up",
    ("solver", "silent"): "vanishes after some receipts, and is silent in a dispute",
    ("solver", "withholding"): "stops handing in data after some receipts, and opens none in a dispute",
    ("solver", "colluding"): "hands in a false root and relies on friends",
    ("verifier", "honest"): "re-executes, signs what it finds, challenges what is wrong",
    ("verifier", "wrong"): "signs the opposite of the truth: challenges right work, passes wrong work",
    ("verifier", "lazy"): "signs `right` without looking, or copies a verdict",
    ("verifier", "silent"): "accepts and never answers: the next one drawn does",
    ("verifier", "withholding"): "challenges whatever it gets, and makes no move",
    ("verifier", "colluding"): "passes all; challenges right work if the submitter is its friend and the solver not",
    ("whistleblower", "honest"): "re-checks by itself, challenges what is wrong",
    ("whistleblower", "wrong"): "challenges whatever it gets with a root it made up, and plays on",
    ("whistleblower", "lazy"): "signs `right` without looking, or copies a verdict",
    ("whistleblower", "silent"): "does nothing",
    ("whistleblower", "withholding"): "challenges whatever it gets, and makes no move",
    ("whistleblower", "colluding"): "challenges its friend the solver first, to lose less; or the enemy of its friend",
}

Truth = Literal["right", "wrong", "unseen", "ordered", "lost"]
TRUTH: Final[Mapping[tuple[str, str], Truth]] = {
    ("honest", "seen"): "right",
    ("honest", "ordered"): "ordered",
    **{(solver, "seen"): "wrong" for solver in ("wrong", "lazy", "colluding")},
    **{(solver, "unseen"): "unseen" for solver in ("wrong", "lazy", "colluding")},
    ("silent", "seen"): "lost",  # what both signed until then is right
    ("withholding", "seen"): "lost",
}

Act = Literal["right", "challenge", "invent", "drop", "none"]
# What a checker does about the work: it signs `right`, challenges with the true root, challenges with an invented one
# and plays on, challenges and makes no move, or does nothing.
ACTS: Final[Mapping[tuple[str, str], Mapping[Truth, Act]]] = {
    ("verifier", "honest"): {"wrong": "challenge", "ordered": "challenge"},
    ("verifier", "wrong"): {"right": "invent", "unseen": "invent", "lost": "invent"},
    ("verifier", "lazy"): {},
    ("verifier", "silent"): dict.fromkeys(("right", "wrong", "unseen", "ordered", "lost"), "none"),
    ("verifier", "withholding"): dict.fromkeys(("right", "wrong", "unseen", "ordered", "lost"), "drop"),
    ("verifier", "colluding"): {},
    ("whistleblower", "honest"): {"wrong": "challenge", "ordered": "challenge"},
    ("whistleblower", "wrong"): dict.fromkeys(("right", "wrong", "unseen", "ordered", "lost"), "invent"),
    ("whistleblower", "lazy"): {},
    ("whistleblower", "silent"): dict.fromkeys(("right", "wrong", "unseen", "ordered", "lost"), "none"),
    ("whistleblower", "withholding"): dict.fromkeys(("right", "wrong", "unseen", "ordered", "lost"), "drop"),
    ("whistleblower", "colluding"): dict.fromkeys(("right", "wrong", "unseen", "ordered", "lost"), "none"),
}  # what is not named: "right"
# Of a colluding checker whose friend is the submitter and not the solver.
FRIENDS_ACTS: Final[Mapping[Truth, Act]] = {
    "right": "invent",
    "wrong": "challenge",
    "unseen": "invent",
    "ordered": "challenge",
    "lost": "invent",
}

# What the notaries find. Nobody is believed: a false root loses at the leaf, who makes no move forfeits, and of two
# silent players the challenger loses. An ordered error is ruled at once, whoever asks and whatever its root is.
RULINGS: Final[Mapping[tuple[Truth, Act], str]] = {
    ("right", "invent"): "challenge lost",
    ("right", "drop"): "challenge lost",
    ("unseen", "invent"): "challenge lost",
    ("unseen", "drop"): "challenge lost",
    ("wrong", "challenge"): "convicted",
    ("wrong", "invent"): "both wrong",
    ("wrong", "drop"): "challenge lost",
    ("ordered", "challenge"): "ordered error found",
    ("ordered", "invent"): "ordered error found",
    ("ordered", "drop"): "ordered error found",
    ("lost", "invent"): "forfeited",
    ("lost", "drop"): "challenge lost",
}

# How a deal is closed whose solver is not convicted before: by (submitter, whether the solver is there).
CLOSINGS: Final[Mapping[tuple[str, bool], str]] = {
    ("honest", True): "settled",
    ("wrong", True): "claimed",
    ("lazy", True): "settled",
    ("silent", True): "claimed",
    ("withholding", True): "claimed",
    ("colluding", True): "claimed",  # of a solver that is not its friend
    ("honest", False): "solver lost",
    ("wrong", False): "old voucher",
    ("lazy", False): "solver lost",
    ("silent", False): "left open",
    ("withholding", False): "left open",
    ("colluding", False): "old voucher",
}


class Line(NamedTuple):
    """One movement of a row.

    source: `channel` (the submitter's), `lock` (the solver's), `stake` (of who the step is about) or `pool`. to: a
    party, `next verifier` (whoever is drawn after the first), `referees`, `who` the step is about, `burned`, `pool`, or
    `solver stake`. how: `first`, as far as the source reaches; `cost`, pro rata if costs exceed what is left; `share`,
    permille of what costs leave, the last one with what rounding leaves.
    """

    source: str
    to: str
    how: Literal["first", "cost", "share"]
    what: str | int


@dataclass(frozen=True)
class Row:
    """A finding: when it is made, the record that proves it, and what moves."""

    when: str
    record: str
    lines: tuple[Line, ...]


_PAY: Final = (
    Line("channel", "solver", "first", "pay"),
    Line("channel", "pool", "first", "slice"),
)
_FEES: Final = (
    Line("channel", "verifier", "first", "verifier fee"),
    Line("channel", "next verifier", "first", "next verifier fee"),
    Line("channel", "whistleblower", "first", "whistleblower fee"),
)
_REFUND: Final = (Line("channel", "submitter", "share", 1000),)
_COSTS: Final = (Line("lock", "who", "cost", "check cost"), Line("lock", "referees", "cost", "referee cost"))
_REPAID: Final = Line("lock", "submitter", "first", "pay and slice")
_LOCK: Final = (
    Line("lock", "who", "share", LOCK.winner),
    Line("lock", "submitter", "share", LOCK.submitter),
    Line("lock", "burned", "share", LOCK.burned),
)
_LOCK_ALONE: Final = (
    Line("lock", "submitter", "share", LOCK.submitter),
    Line("lock", "burned", "share", LOCK.burned + LOCK.winner),
)

FINDINGS: Final[Mapping[str, Row]] = {
    "settled": Row("both sign", "Settlement", (*_PAY, *_FEES, *_REFUND)),
    "claimed": Row("the solver claims alone, with its last voucher", "Claim", (*_PAY, *_REFUND)),
    "solver lost": Row("the submitter claims for both, after a check of what both signed", "Claim",
                       (*_PAY, *_FEES, *_REFUND)),
    "old voucher": Row("the submitter claims with a voucher of nothing, and the solver does not answer in the window",
                       "Claim", _REFUND),
    "left open": Row("both are gone: all stays where it is until one of them claims", "", ()),
    "unlocked": Row("nobody challenged in the window after the closing, or in vain", "",
                    (Line("lock", "solver stake", "share", 1000),)),
    "convicted": Row("a quorum of notaries finds the work wrong before the closing", "Arbitration",
                     (*_REFUND, *_COSTS, *_LOCK)),
    "convicted late": Row("the same, in the window after the closing: what the solver got comes back first",
                          "Arbitration", (_REPAID, *_COSTS, *_LOCK)),
    "forfeited": Row("the solver makes no move, or opens no data: it loses, and nobody's verdict is refuted by it",
                     "Arbitration", (*_REFUND, *_COSTS, *_LOCK)),
    "forfeited late": Row("the same, in the window after the closing", "Arbitration", (_REPAID, *_COSTS, *_LOCK)),
    "both wrong": Row("the same as convicted, but at the leaf the challenger's value is wrong as well: costs only",
                      "Arbitration", (*_REFUND, *_COSTS, *_LOCK_ALONE)),
    "both wrong late": Row("the same, in the window after the closing", "Arbitration",
                           (_REPAID, *_COSTS, *_LOCK_ALONE)),
    "challenge lost": Row("a quorum of notaries finds the work right, or the challenger makes no move", "Arbitration",
                          (Line("stake", "solver", "cost", "defence cost"),
                           Line("stake", "referees", "cost", "referee cost"),
                           Line("stake", "pool", "share", STAKE.pool),
                           Line("stake", "burned", "share", STAKE.burned))),
    "ordered error found": Row("a quorum of notaries finds that the error was ordered", "Arbitration",
                               (Line("pool", "who", "first", "jackpot"),)),
    "fault": Row("a checker signed `right` on what notaries found wrong, or on an ordered error", "Fault",
                 (Line("stake", "pool", "share", FAULT.pool), Line("stake", "burned", "share", FAULT.burned))),
    "ordered twice": Row("a peer, `who`, signed two orders over its money under one number, whatever deals they are of",
                         "Equivocation", (Line("stake", "burned", "share", 1000),)),
    "slashed": Row("in a network without notaries: a quorum of checkers finds drawn segments wrong", "Slash",
                   (*_REFUND, Line("lock", "checkers", "cost", "check cost"),
                    Line("lock", "submitter", "share", 500), Line("lock", "burned", "share", 500))),
}  # fmt: skip


class Cell(NamedTuple):
    """One combination."""

    submitter: str
    solver: str
    verifier: str
    whistleblower: str
    chance: str


class Step(NamedTuple):
    """A finding, and the checker it is about: a party, `next verifier`, or nobody."""

    finding: str
    who: str = ""


class Move(NamedTuple):
    """Micro-credits that go from a bucket to somebody."""

    source: str
    to: str
    micro: int


def cells() -> Iterator[Cell]:
    """All combinations, the impossible ones too."""
    for combination in product(*[BEHAVIOURS] * len(PARTIES), CHANCES):
        yield Cell(*combination)


def impossible(cell: Cell) -> str:
    """Why a combination cannot be, or nothing."""
    if (cell.solver, cell.chance) in TRUTH:
        return ""
    if cell.chance == "unseen":
        return "there is nothing wrong in its work that could be overlooked: see `seen`"
    return "only who does the work can be ordered to falsify it; a fraud is one, ordered or not: see `seen`"


def steps(cell: Cell) -> tuple[Step, ...]:
    """What follows from a possible combination, in order.

    A friend of a cheating solver challenges it before anybody else can. Then come the first verifier, the next one
    drawn if it is silent or lost its challenge (a lost challenge closes nothing), and the whistleblower, who by then
    may be late: the channel is closed by a settlement, and only the lock is left.
    """
    deal = _Deal(cell, TRUTH[cell.solver, cell.chance])
    if deal.truth == "wrong" and cell.solver == cell.whistleblower == "colluding":
        deal.challenge("whistleblower", "challenge")
    _check(deal)
    settled = not deal.over and deal.closing == "settled"
    sees = (cell.submitter, cell.solver) != ("colluding", "colluding")
    if settled and deal.truth == "wrong":
        deal.close()  # all who were asked say it is right
    if sees:
        deal.act("whistleblower", asked=_asks(cell))
    if not deal.over:
        deal.close()
    deal.steps += [Step("fault", who) for who in deal.right if deal.refuted]
    if deal.closed and not deal.over and deal.closing != "left open":
        deal.steps.append(Step("unlocked"))
    return tuple(deal.steps)


def paid_checkers(cell: Cell) -> tuple[str, ...]:
    """Who gets a fee when the deal is closed by the submitter's word: who signed that segments are right."""
    deal = _Deal(cell, TRUTH[cell.solver, cell.chance])
    _check(deal)
    if not deal.over:
        deal.act("whistleblower", asked=_asks(cell))
    return tuple(dict.fromkeys(deal.right + deal.rest))


def _asks(cell: Cell) -> bool:
    """Whether the submitter has the work checked by those who are drawn."""
    return cell.submitter in ("honest", "wrong")


class _Deal:
    """One cell while its steps are found."""

    def __init__(self, cell: Cell, truth: Truth) -> None:
        self.cell, self.truth = cell, truth
        self.steps: list[Step] = []
        self.right: list[str] = []  # who signed that it is right
        self.rest: list[str] = []  # who signed it of the other segments, after an ordered error was found
        self.over = self.refuted = self.closed = False

    @property
    def closing(self) -> str:
        """How it is closed if nobody is convicted."""
        if self.cell.submitter == self.cell.solver == "colluding":
            return "settled"
        return CLOSINGS[self.cell.submitter, self.truth != "lost"]

    def act(self, party: str, *, asked: bool) -> Act:
        """A checker's turn. Returns what it did."""
        cell = self.cell
        behaviour = "honest" if party == "next verifier" else getattr(cell, party)
        role = "verifier" if party == "next verifier" else party
        act = ACTS[role, behaviour].get(self.truth, "right")
        if behaviour == "colluding" and cell.submitter == "colluding" != cell.solver:
            act = FRIENDS_ACTS[self.truth]
        if act == "right" and asked:
            self.right.append(party)
        elif act in ("challenge", "invent", "drop"):
            self.challenge(party, act)
        return act

    def challenge(self, who: str, act: Act) -> None:
        """What the notaries find, if there is something left to find."""
        finding = RULINGS[self.truth, act]
        if self.over or (finding == "ordered error found" and self.refuted):
            return
        self.over = finding in ("convicted", "both wrong", "forfeited")
        if self.over and self.cell.solver == self.cell.verifier == "colluding" and "verifier" in self.right:
            finding = "forfeited"  # it gives up before the leaf, to save its friend's stake
        self.refuted = self.refuted or finding in ("convicted", "both wrong", "ordered error found")
        if self.over and self.closed:
            finding += " late"
        self.steps.append(Step(finding, who))

    def close(self) -> None:
        """The channel is closed, once."""
        if not self.closed:
            self.steps.append(Step(self.closing))
            self.closed = True


def _check(deal: _Deal) -> None:
    """The checkers whom the submitter asks, until one has answered, and all but an ordered error was found right."""
    cell = deal.cell
    if deal.over or not (_asks(cell) or cell.submitter == cell.verifier == "colluding"):
        return
    act = deal.act("verifier", asked=True)
    if _asks(cell) and not deal.over and not deal.refuted and act in ("none", "invent", "drop"):
        deal.act("next verifier", asked=True)
    if _asks(cell) and not deal.over and deal.refuted:
        deal.rest.append("next verifier")


def moves(finding: str, amounts: Mapping[str, int]) -> tuple[Move, ...]:
    """What a finding moves. amounts: what each source holds, and each named amount, in micro-credits.

    Everything is rounded down, and what is left of a source that a row divides burns with its last line.
    """
    done: list[Move] = []
    for source in ("channel", "lock", "stake", "pool"):
        lines = [line for line in FINDINGS[finding].lines if line.source == source]
        left = amounts[source] if lines else 0
        for line in lines:
            if line.how == "first":
                micro = min(left, amounts[str(line.what)])
                done.append(Move(source, line.to, micro))
                left -= micro
        costs = [(line.to, amounts[str(line.what)]) for line in lines if line.how == "cost"]
        total, held = sum(cost for _, cost in costs), left
        for to, cost in costs:
            micro = cost if total <= held else cost * held // total
            done.append(Move(source, to, micro))
            left -= micro
        shares = [line for line in lines if line.how == "share"]
        rest = left if total <= held else 0  # what rounding leaves of costs is nobody's: it burns
        for line in shares[:-1]:
            micro = rest * int(line.what) // 1000
            done.append(Move(source, line.to, micro))
            left -= micro
        if shares:
            done.append(Move(source, shares[-1].to, left))
    return tuple(move for move in done if move.micro)
