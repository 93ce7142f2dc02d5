"""docs/adversaries.md, made by running every adversary once: `python -m tests.adversaries.table` writes it."""

from __future__ import annotations

from pathlib import Path

from protocol.credits import credits_of
from tests.adversaries.catalogue import Adversary
from tests.adversaries.judge import NAMED, outcome_of
from tests.adversaries.stage import Outcome
from worker.cheats import CHEATS

__all__ = ["PAGE", "SEED", "page", "row"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adversaries.md"
SEED = 0  # a calm one
HEAD = """# Adversaries

Made by `python -m tests.adversaries.table`; `tests/adversaries` fails if it says anything else. Each is a strategy
around a real node in the simulator (seed 0, calm, a job of 60,000 micro-credits, exact mode unless it says tolerant);
with each runs its honest control, the same market without it, in which nobody loses anything. Level and cause are those
of the ruling, gains those of the dishonest in credits, free and staked together. "swarm": it also runs on real
processes, by `ichiba swarm demo --cheat NAME`.

| adversary | who | found | level, cause | who loses stake | their gain | submitter | seconds | swarm | note |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def row(one: Adversary, outcome: Outcome) -> str:
    """One line of the table."""
    gained = {name: outcome.free[name] + outcome.stakes[name] for name in sorted(one.cast())}
    cells = (
        one.name,
        one.who,
        ", ".join(outcome.findings) or "no dispute",
        f"{outcome.level}, {outcome.cause}" if outcome.level else "",
        ", ".join(f"{name} {credits_of(micro)}" for name, micro in sorted(outcome.culprits.items())),
        ", ".join(f"{name} {credits_of(micro)}" for name, micro in gained.items()),
        credits_of(outcome.free["alice"]),
        f"{outcome.delay_s:.0f}",
        "yes" if one.name in CHEATS else "",
        one.note,
    )
    return "| " + " | ".join(cells) + " |"


def page() -> str:
    """The whole page."""
    return HEAD + "\n".join(row(one, outcome_of(name, SEED)) for name, one in NAMED.items()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
