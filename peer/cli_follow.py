"""Following a job to its end on the screen: live bar, loss and news; what its end means for the exit code.

Ctrl-C detaches and never cancels. A timeout says whether anybody wanted the job at all.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import click

from peer.cli_events import ENDINGS, figure_of, line_of, stamped
from peer.cli_output import Terminal, credits_of, short_id

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from peer.client import Client

__all__ = ["exit_code_of", "follow", "show_end"]

DETACHED: Final = 130
_CODES: Final = {"done": 0, "failed": 6, "cancelled": 7}
_DISPUTED, _NO_MATCH, _TIMED_OUT = 9, 5, 10


class _TimeOver(Exception):
    """The time of --timeout is over."""


@contextmanager
def _deadline(seconds: float | None) -> Iterator[None]:
    """Raise _TimeOver inside the block after `seconds`, even in the middle of a read."""
    if seconds is None:
        yield
        return

    def over(_signal: int, _frame: FrameType | None) -> None:
        raise _TimeOver

    old = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def exit_code_of(job: dict[str, Any], *, timed_out: bool = False) -> int:
    """What `submit` and `job logs -f` exit with, from what `job show` says."""
    deals = job.get("deals", [])
    accused = any(check["state"] == "wrong" for deal in deals for check in deal["checks"])
    if job["state"] == "done" and job.get("kind") == "script" and job["reason"]:
        return _CODES["failed"]  # paid for, and its outputs are there, but the script itself did not end well
    if job["state"] in _CODES:
        disputed = job["state"] == "failed" and (job["slashed_micro"] or accused)
        return _DISPUTED if disputed else _CODES[job["state"]]
    if not timed_out:
        return 0
    if not deals and job["state"] in ("profiling", "offered"):
        return _NO_MATCH
    in_dispute = any(
        deal["state"] in ("checking", "settling") and any(check["state"] == "wrong" for check in deal["checks"])
        for deal in deals
    )
    return _DISPUTED if in_dispute else _TIMED_OUT


def follow(terminal: Terminal, client: Client, job: dict[str, Any], *, timeout: float | None, since: int = 0) -> int:
    """Show the events of a job until it ends; the exit code. `job`: what submit or `job show` answered."""
    job_id = job["job"]
    try:
        with _deadline(timeout), terminal.progress() as live:
            screen = _Screen(terminal, live, job)
            for event in client.events(job_id, follow=True, since=since):
                screen.show(event)
                if event["kind"] in ENDINGS:
                    break
    except (KeyboardInterrupt, click.Abort):
        terminal.note(f"detached; the job goes on. Come back with: ichiba job logs -f {short_id(job_id)}")
        return DETACHED
    except _TimeOver:
        now = client.job(job_id)
        code = exit_code_of(now, timed_out=True)
        why = f"nobody took it: see `ichiba why {short_id(job_id)}`" if code == _NO_MATCH else "the job goes on"
        terminal.note(f"{timeout:g} s are over, {why}. Come back with: ichiba job logs -f {short_id(job_id)}")
        return code
    ended = client.job(job_id)
    show_end(terminal, ended)
    return exit_code_of(ended)


class _Screen:
    """Events as JSON lines, as a live bar with news above it, or as plain lines where nobody watches."""

    def __init__(self, terminal: Terminal, live: Progress | None, job: dict[str, Any]) -> None:
        self.terminal, self.live, self.steps = terminal, live, job["steps"]
        self.shown = -1
        self.bar: TaskID | None = None
        if live is not None:
            self.bar = live.add_task(job["name"], total=self.steps, note="waiting for bids")

    def show(self, event: dict[str, Any]) -> None:
        """One event."""
        if self.terminal.as_json:
            self.terminal.record("ichiba.event/1", event)
            return
        if event["kind"] == "step":
            self._step(event)
        elif event["kind"] == "profile-step" and (self.live is None or self.bar is None):
            if (event["step"] + 1) * 4 % event["of"] < 4:  # in a log file, some four lines a profile
                self.terminal.note(stamped(event))
        elif event["kind"] == "profile-step" and self.live is not None and self.bar is not None:
            self.live.update(self.bar, note=line_of(event))
        elif self.live is not None and self.bar is not None:
            self.live.console.print(stamped(event), markup=False, highlight=False)
            self.live.update(self.bar, note=_stage(event))
        else:
            self.terminal.note(stamped(event))

    def _step(self, event: dict[str, Any]) -> None:
        done = event["step"] + 1
        if self.live is not None and self.bar is not None:
            self.live.update(self.bar, completed=done, note=f"step {done}/{self.steps}  {figure_of(event)}".rstrip())
        elif (part := done * 20 // self.steps) > self.shown:  # in a log file, one line each 5 %
            self.shown = part
            self.terminal.note(stamped(event))


def _stage(event: dict[str, Any]) -> str:
    """A few words beside the bar."""
    stages = {
        "offer": "waiting for bids", "agreed": "the solver begins", "proof": "proving", "draw": "being checked",
        "check": "being checked",
        "profile-agreed": "being profiled", "settled": "settled", "reoffer": "waiting for bids",
    }  # fmt: skip
    return stages.get(event["kind"], line_of(event)[:40])


def show_end(terminal: Terminal, job: dict[str, Any]) -> None:
    """The end of a job, and what to do with it."""
    terminal.record("ichiba.job/1", job)
    solvers = ", ".join(sorted({deal["solver"][-8:] for deal in job.get("deals", []) if deal["paid_micro"]}))
    terminal.say(
        f"job {short_id(job['job'])} is {job['state']}: {job['steps_done']} of {job['steps']} steps, "
        f"{credits_of(job['spent_micro'])} credits spent{f', done by {solvers}' if solvers else ''}"
    )
    if job["reason"]:
        terminal.say(f"  because {job['reason']}")
    if job["slashed_micro"]:
        terminal.say(f"  {credits_of(job['slashed_micro'])} credits of stake were slashed for wrong work")
    if job["state"] == "done":
        terminal.say(f"next: ichiba job get {short_id(job['job'])}")
