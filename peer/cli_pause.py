"""Commands for an owner who wants the machine back: pause, and resume."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import click

from peer.cli_output import Terminal, ago, common, short_id, size_of
from protocol import params

__all__ = ["finishing_line", "pause", "paused_line", "resume"]

_FATES = {
    "kept": "stands after step {step}, {bytes} kept",
    "restarts": "starts again from its last checkpoint: {why}",
    "finished": "was finished first",
    "failed": "failed: {why}",
}


def _until(lost_after_ns: int) -> str:
    """How long a pause may last, in words."""
    left = (lost_after_ns - time.time_ns()) // 10**9
    if left <= 0:
        return "its other side may have given it up by now"
    at = datetime.fromtimestamp(lost_after_ns / 1e9)
    return f"resume by {at:%H:%M:%S} (in {left // 60} min {left % 60} s) or lose it"


def _fate(fate: dict[str, Any]) -> str:
    words = _FATES.get(fate.get("fate", ""), "waits")
    return words.format(step=fate.get("step"), bytes=size_of(fate.get("bytes", 0)), why=fate.get("why"))


def paused_line(found: dict[str, Any]) -> str:
    """Of `ichiba status`: whether the peer is paused, since when, why, and what waits."""
    since_ns = found.get("paused_since_ns", 0)
    if not since_ns:
        return "no"
    works = found.get("paused_works", [])
    soonest = min((work["lost_after_ns"] for work in works), default=0)
    waits = f"; {len(works)} works wait, {_until(soonest)}" if works else ""
    by = found.get("paused_by", "owner")
    rule = f" by the rule {by}: {found['paused_why']}" if by not in ("", "owner") else ""
    return f"since {datetime.fromtimestamp(since_ns / 1e9):%Y-%m-%d %H:%M:%S} ({ago(since_ns)}){rule}{waits}"


def finishing_line(found: dict[str, Any]) -> str:
    """Of `ichiba status`: whether the peer takes new work, and what it still has to finish."""
    if not found.get("finishing_since_ns", 0):
        return "no"
    left = found["unfinished"]
    return f"{left} deals and checks are left" if left else "all is finished; next: ichiba earn start"


@click.command()
@click.option(
    "--within",
    type=click.IntRange(0, params.SUSPEND_SECONDS_MAX),
    default=params.SUSPEND_SECONDS,
    show_default=True,
    help="Seconds a worker may take to finish its step and hand over its state; 0 kills it at once.",
)
@common
def pause(terminal: Terminal, within: int) -> None:
    """Free this machine: stop all work at its next step, and keep where it stands.

    Memory, and that of a GPU, is free when this returns: workers are ended, not stopped. The deals stay, for as long
    as their other sides wait in silence, and no work is sought until `ichiba resume`, even over a restart. A worker
    that does not hand over its state in time is killed, and its segment starts again from the last checkpoint.

    \b
    ichiba pause
    ichiba pause --within 60     for a model with very long steps
    ichiba earn pause
    """
    with terminal.client() as client:
        found = client.pause(within_ms=within * 1000)
    terminal.record("ichiba.pause/1", found)
    fates = dict(found["fates"])
    if found["already"]:
        terminal.say(f"paused already, {paused_line(found)}")
        return
    if fates:
        terminal.say(f"paused: {len(fates)} workers ended, their memory free after {found['freed_ms'] / 1000:.2f} s")
    else:
        terminal.say("paused: no work was running")
    for work in found["paused_works"]:
        fate = fates.pop(work["work"], {})
        terminal.say(f"{work['kind']} {short_id(work['work'])} {_fate(fate)}; {_until(work['lost_after_ns'])}")
    for name, fate in fates.items():
        terminal.say(f"work {short_id(name)} {_fate(fate)}")
    terminal.say("next: ichiba resume")


@click.command()
@common
def resume(terminal: Terminal) -> None:
    """Go on after a pause.

    Work continues at the very step it stopped before, and the result is that of work that was never paused, bit for
    bit.

    \b
    ichiba resume
    """
    with terminal.client() as client:
        found = client.resume()
    terminal.record("ichiba.resume/1", found)
    if not found["resumed"]:
        terminal.say("this peer is not paused")
        return
    seconds = found["paused_for_ns"] // 10**9
    terminal.say(f"resumed after {seconds // 60} min {seconds % 60} s; {found['works']} works go on")
