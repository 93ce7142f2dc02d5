"""`ichiba why`: the reasons, the worst first, and what would change them."""

from __future__ import annotations

from typing import Any

import click

from peer.cli_output import Terminal, common

__all__ = ["why"]

_MARKS = {1: "!!", 2: "!", 3: ""}


@click.command()
@click.argument("of", metavar="[JOB|me]", required=False, default="")
@common
def why(terminal: Terminal, of: str) -> None:
    """Say why a job stands still, why this peer earns nothing, or what is wrong here.

    JOB is the beginning of a job's id: who could take it, why the others cannot, what became of bids, proposals, work,
    checks and money. `me` is this peer as a solver or verifier. Without either: all that is in the way here, the worst
    first. What would change it is tried on the book this peer has heard, one term at a time, and says what it brings.

    \b
    ichiba why 3f2a
    ichiba why me
    ichiba why --json
    """
    with terminal.client() as client:
        found = client.why(of.lower())
    terminal.record("ichiba.why/1", found)
    show_why(terminal, found)


def show_why(terminal: Terminal, found: dict[str, Any]) -> None:
    """The answer, for people."""
    terminal.say(found["headline"])
    if found["about"] == "job" and found["heard"]:
        terminal.say(f"{found['able']} of {found['heard']} that are heard of could take it as it is")
    terminal.table(
        "reasons",
        ("", "where", "code", ">count", "~why", "~then"),
        [
            (_MARKS[r["severity"]], r["step"], r["code"], r["count"], r["words"], r["counterfactual"])
            for r in found["reasons"]
        ],
    )
    if found["advice"]:
        terminal.say("what would change it:")
        for one in found["advice"]:
            terminal.say(f"  {one['words']}")
