"""`ichiba earn house`: what the house of the network pays this peer, what is left today, and why it pays nothing."""

from __future__ import annotations

from typing import Any

import click

from peer.cli_output import Terminal, common, credits_of

__all__ = ["house"]

_WORDS = {"available": "standing ready", "rerun": "re-runs"}


@click.command()
@click.option("--on/--off", "on", default=None, help="Take its challenges and re-runs from now on, or none.")
@common
def house(terminal: Terminal, on: bool | None) -> None:
    """Show what the network's house paid this peer, what is left of its day, and why it pays nothing now.

    A house pays newcomers out of a daily budget: for standing ready, as long as challenges by surprise prove it, and,
    where the network file has [reruns], for running its own finished work on: without a stake, for it knows the right
    end. Take part with --on (as it is at first), or not with --off; that holds over restarts. On the house itself it
    shows what was ordered of whom, and of whom nothing is.

    \b
    ichiba earn house
    ichiba earn house --off
    ichiba earn house --json
    """
    with terminal.client() as client:
        found = client.house(on=on)
    terminal.record("ichiba.earn.house/1", found)
    if not found["house"]:
        terminal.say("the network file names no house: nobody pays for readiness or re-runs here")
        return
    terminal.pairs({"house": "this peer" if found["me"] else found["house"], "taking part": _yes(found["on"])})
    terminal.table("pays", ("for", ">earned", ">today", ">left today", ">today, to all", "why not now"),
                   [_row(part) for part in found["pays"]])  # fmt: skip
    if found["me"]:
        _show_orders(terminal, found)


def _yes(on: bool) -> str:
    return "yes" if on else "no; ichiba earn house --on"


def _row(part: dict[str, Any]) -> tuple[str, ...]:
    reason = part["reason"]
    amounts = ("earned_micro", "today_micro", "left_today_micro", "today_all_micro")
    why = f"{reason['code']}: {reason['why']}" if reason else "-"
    return (_WORDS[part["part"]], *(credits_of(part[name]) for name in amounts), why)


def _show_orders(terminal: Terminal, found: dict[str, Any]) -> None:
    rows = [(row["job"][:12], row["peer"], row["outcome"], credits_of(row["micro"])) for row in found["orders"]]
    terminal.table("re-runs", ("job", "newcomer", "outcome", ">credits"), rows)
    for row in found["unpaid"]:
        terminal.say(f"{row['peer'] or 'nobody is ordered one'} ({row['code']}): {row['why']}")
