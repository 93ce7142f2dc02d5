"""The frauds a demonstration solver commits, so that people can watch verification catch them.

Only `ichiba demo` and tests ask for these. Each fraud is what a lazy or greedy solver would really do: skip work,
train on other data, hand in what it had, or copy somebody's proof. The first segment stays honest, except in the
last, so that a check of the first segment alone does not expose it.
"""

from __future__ import annotations

from protocol.errors import LocalProtocolError

__all__ = ["CHEATS", "FALSE_ENDS", "UNIT_CHEATS", "check", "copies"]

CHEATS = (
    "skip-step", "wrong-data", "wrong-batch", "stale-checkpoint", "copied-proof", "stale-gradient", "low-precision",
    "wrong-label", "reordered-batches", "extrapolated-checkpoint", "unproven-base", "wrong-rate",
)  # fmt: skip
UNIT_CHEATS = ("garbage-activations", "skip-backward")
"""The frauds of a unit of a parallel job, whose neighbours wait for its tensors: noise in place of them, or no training
at all, with zeros as the gradients that it owes."""

FALSE_ENDS = ("skip-step", "wrong-batch")
"""The frauds that only change a segment's last step: what an ordered error (protocol/forced.py) is made to look like,
by the code that commits them."""


def check(cheat: str | None, *, unit: bool = False) -> None:
    """Refuse the name of a fraud that this work cannot commit. Raises LocalProtocolError."""
    known = UNIT_CHEATS if unit else CHEATS
    if cheat is not None and cheat not in known:
        what = "fraud of a unit" if unit else "fraud"
        raise LocalProtocolError(f"no {what} is called {cheat!r}", next_step=f"use one of {', '.join(known)}")


def copies(cheat: str | None) -> bool:
    """Whether the roots are those of another job, with the first one replaced to match: copied-proof."""
    return cheat == "copied-proof"
