"""docs/outcomes.md, drawn from protocol/outcome_table.py: `python -m protocol.outcome_drawing > docs/outcomes.md`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from typing import Final

from protocol.outcome_table import (
    BEHAVIOURS,
    CHANCES,
    FINDINGS,
    MEANINGS,
    PARTIES,
    Cell,
    Line,
    Row,
    cells,
    impossible,
    steps,
)

__all__ = ["markdown"]

_SHORT: Final = {"verifier": "v", "next verifier": "n", "whistleblower": "w", "": ""}
_CODES: Final = {
    "settled": "settled",
    "claimed": "claimed",
    "solver lost": "lost",
    "old voucher": "old",
    "left open": "open",
    "convicted": "**wrong**",
    "convicted late": "**wrong late**",
    "forfeited": "**forfeit**",
    "forfeited late": "**forfeit late**",
    "both wrong": "**both**",
    "both wrong late": "**both late**",
    "challenge lost": "in vain",
    "ordered error found": "jackpot",
    "fault": "fault",
}


def _told(line: Line) -> str:
    if line.how == "share":
        return f"{line.to} all" if line.what == 1000 else f"{line.to} {line.what} ‰"
    return f"{line.to} the {line.what}"


def _flow(row: Row, source: str) -> str:
    """What a row does with one source, in words."""
    lines = [line for line in row.lines if line.source == source]
    before = ", ".join(_told(line) for line in lines if line.how != "share")
    shares = ", ".join(_told(line) for line in lines if line.how == "share")
    return f"{before}; rest: {shares}" if before and shares else before or shares


def _ends(cell: Cell) -> str:
    """A cell's steps in short."""
    shown = [step for step in steps(cell) if step.finding != "unlocked"]
    return ", ".join(f"{_CODES[step.finding]} {_SHORT[step.who]}".rstrip() for step in shown)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def _matrices() -> list[str]:
    """For each behaviour of submitter and solver what the checkers make of it; what is alike is drawn once."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for submitter, solver, chance in product(BEHAVIOURS, BEHAVIOURS, CHANCES):
        if impossible(Cell(submitter, solver, "honest", "honest", chance)):
            continue
        checkers = product(BEHAVIOURS, BEHAVIOURS)
        ends = tuple(_ends(Cell(submitter, solver, v, w, chance)) for v, w in checkers)
        alike.setdefault(ends, []).append(f"{submitter}, {solver}, {chance}")
    lines: list[str] = []
    for ends, places in alike.items():
        lines += ["", f"Submitter, solver, chance: {'; '.join(places)}", ""]
        rows = [(v, *ends[6 * i : 6 * i + 6]) for i, v in enumerate(BEHAVIOURS)]
        lines += _table(("verifier \\ whistleblower", *BEHAVIOURS), rows)
    return lines


def markdown() -> str:
    """docs/outcomes.md."""
    every = list(cells())
    possible = [cell for cell in every if not impossible(cell)]
    lines = [
        "# Who ends with what",
        "",
        "Drawn from `protocol/outcome_table.py` by `python -m protocol.outcome_drawing`: edit that. It is the table of",
        "a network with notaries. `tests/test_outcomes.py` plays every possible cell with the ledger's own entries.",
        "",
        f"Four parties of {len(BEHAVIOURS)} behaviours and {len(CHANCES)} chances make {len(every)} combinations. "
        f"{len(every) - len(possible)} cannot be:",
        "",
        *(f"- {why}" for why in sorted({impossible(cell) for cell in every} - {""})),
        "",
        f"The other {len(possible)} end in {len({steps(cell) for cell in possible})} ways.",
        "",
        *_table(("chance", "means"), list(CHANCES.items())),
        "",
        "## What the parties do",
        "",
        *_table(("party", *PARTIES[:2]), [(b, *(MEANINGS[p, b] for p in PARTIES[:2])) for b in BEHAVIOURS]),
        "",
        *_table(("party", *PARTIES[2:]), [(b, *(MEANINGS[p, b] for p in PARTIES[2:])) for b in BEHAVIOURS]),
        "",
        "## What each finding moves",
        "",
        "Named amounts come first, as far as the source reaches (costs pro rata); the rest is shared. Everything is",
        "rounded down and what is left burns. `who` is the checker that the finding is about. What was withdrawn",
        "from a stake and is not free yet counts as stake here, after the rest of it.",
        "",
        *_table(
            ("finding", "when", "record", "channel", "solver's lock", "stake of `who`", "pool"),
            [
                (name, row.when, row.record, *(_flow(row, source) for source in ("channel", "lock", "stake", "pool")))
                for name, row in FINDINGS.items()
            ],
        ),
        "",
        "## Every combination",
        "",
        "Findings in order; " + ", ".join(f"{code}: {name}" for name, code in _CODES.items() if code != name) + ".",
        "It is made on the word of v, the verifier, n, the next one drawn, or w, the whistleblower. After a closing",
        "without a conviction the lock is unlocked.",
        *_matrices(),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
