"""The frauds a demonstration solver commits, so that people can watch verification catch them.

Only `ichiba demo` and tests ask for these. Each fraud is what a lazy or greedy solver would really do: skip work,
train on other data, hand in what it had, or copy somebody's proof. The first segment stays honest, except in the
last, so that a check of the first segment alone does not expose it.
"""

from __future__ import annotations

from protocol.errors import LocalProtocolError

__all__ = ["CHEATS", "batch_seed", "check", "copies", "is_stale", "steps_done"]

CHEATS = ("skip-step", "wrong-data", "stale-checkpoint", "copied-proof")


def check(cheat: str | None) -> None:
    """Refuse the name of a fraud we do not know. Raises LocalProtocolError."""
    if cheat is not None and cheat not in CHEATS:
        raise LocalProtocolError(f"no fraud is called {cheat!r}", next_step=f"use one of {', '.join(CHEATS)}")


def steps_done(cheat: str | None, segment: int, steps: range) -> range:
    """The steps that are really taken of `steps`: skip-step omits the last one."""
    return steps[:-1] if cheat == "skip-step" and segment > 0 else steps


def batch_seed(cheat: str | None, segment: int, seed: int) -> int:
    """The seed that batches are drawn with: wrong-data draws others."""
    return seed ^ 1 if cheat == "wrong-data" and segment > 0 else seed


def is_stale(cheat: str | None, segment: int) -> bool:
    """Whether the segment hands in the state it started from: stale-checkpoint, which saves all work."""
    return cheat == "stale-checkpoint" and segment > 0


def copies(cheat: str | None) -> bool:
    """Whether the roots are those of another job, with the first one replaced to match: copied-proof."""
    return cheat == "copied-proof"
