"""Commands that move credits into the stake and out of it: wallet stake, wallet unstake."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import click

from peer.cli_money import wallet
from peer.cli_output import CREDITS, Terminal, common, credits_of, short_id

__all__ = ["wallet"]

_POLL_SECONDS = 0.3
_TIMED_OUT = 10


def _waiting(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of both commands that say how long they stay."""
    command = click.option(
        "--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Wait no longer than this."
    )(command)
    return click.option(
        "--wait/--detach",
        default=True,
        help="Wait until it counts, or is refused (the default), or return as soon as it is signed.",
    )(command)


@wallet.command()
@click.argument("amount", type=CREDITS)
@_waiting
@common
def stake(terminal: Terminal, amount: int, wait: bool, timeout: float | None) -> None:
    """Move AMOUNT free credits into the stake of this peer.

    A stake is what work that is checked locks, and what makes the word of a verifier count. It counts as soon as it is
    in everybody's log: at once, or where the network has notaries when a quorum of them has certified the move. It is
    lost when this peer is proved wrong; `ichiba wallet unstake` takes it out again.

    \b
    ichiba wallet stake 5
    ichiba wallet stake 2.5 --json
    """
    with terminal.client() as client:
        found = client.stake(amount)
        if wait:
            found |= _settled(terminal, client, found["move"], timeout)
        now = client.wallet()
    _told(terminal, found, now)
    terminal.say(f"{credits_of(amount)} credits are staked; {credits_of(now['stake_micro'])} are free to lock now")


@wallet.command()
@click.argument("amount", type=CREDITS)
@_waiting
@click.option("--until-free", is_flag=True, help="Wait until the credits are free to spend: see `ichiba wallet`.")
@common
def unstake(terminal: Terminal, amount: int, wait: bool, timeout: float | None, until_free: bool) -> None:
    """Begin to take AMOUNT credits out of the stake of this peer.

    From then on they lock nothing new and make no word count. They still answer for what this peer signed before, until
    nothing of that can be found wrong any more: a time that follows from the network's windows, and is shown. Then they
    are free credits. What runs on a lock is not touched. Free credits stay in the network: they came with its file,
    which keeps no money outside, so there is nothing they could be paid out to.

    \b
    ichiba wallet unstake 5
    ichiba wallet unstake 5 --until-free
    """
    with terminal.client() as client:
        found = client.unstake(amount)
        ends = None if timeout is None else time.monotonic() + timeout
        if wait or until_free:
            found |= _settled(terminal, client, found["move"], timeout)
        if until_free:
            left = None if ends is None else max(0.0, ends - time.monotonic())
            _await(terminal, client, left, "unbonding", lambda w: found["move"] not in _leaving(w))
        now = client.wallet()
    found["frees_ns"] = _leaving(now).get(found["move"], 0)
    _told(terminal, found, now)
    if found["frees_ns"]:
        terminal.say(f"{credits_of(amount)} credits leave the stake, {frees(found['frees_ns'])}")
        terminal.say("until then they lock nothing new, and answer for what this peer signed; see `ichiba wallet`")
    else:
        terminal.say(f"{credits_of(amount)} credits are free to spend")


def frees(at_ns: int) -> str:
    """When something is free, in words."""
    left = max(0, at_ns - time.time_ns()) // 10**9
    at = datetime.fromtimestamp(at_ns / 1e9)
    return f"free at {at:%Y-%m-%d %H:%M:%S} (in {left // 3600} h {left % 3600 // 60} min {left % 60} s)"


def _leaving(now: dict[str, Any]) -> dict[str, int]:
    return {one["move"]: one["frees_ns"] for one in now["unbonding"]}


def _settled(terminal: Terminal, client: Any, move: str, timeout: float | None) -> dict[str, Any]:
    """Wait until the move stands, or notaries refused it; the move then."""

    def state(now: dict[str, Any]) -> dict[str, Any]:
        return next(dict(one) for one in now["moves"] if one["move"] == move)

    now = _await(
        terminal, client, timeout, "certifying", lambda w: state(w)["state"] not in ("certifying", "waiting")
    )
    return state(now)


def _await(
    terminal: Terminal, client: Any, timeout: float | None, what: str, over: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Ask for the wallet until `over` says so of it. Ends the command with 10 when the time is over."""
    began = time.monotonic()
    with terminal.progress() as live:
        bar = live.add_task(what, total=None, note="") if live is not None else None
        while not over(now := dict(client.wallet())):
            spent = time.monotonic() - began
            if timeout is not None and spent >= timeout:
                terminal.note("the time of --timeout is over; the move goes on: `ichiba wallet`")
                raise SystemExit(_TIMED_OUT)
            if live is not None and bar is not None:
                live.update(bar, note=f"{spent:.0f} s")
            time.sleep(_POLL_SECONDS)
    return now


def _told(terminal: Terminal, found: dict[str, Any], now: dict[str, Any]) -> None:
    """The record of the move; ends the command with the reason where it does not stand."""
    terminal.record(
        "ichiba.stake-move/1",
        {**found, "free_micro": now["free_micro"], "stake_micro": now["stake_micro"],
         "unbonding_micro": now["unbonding_micro"]},
    )  # fmt: skip
    if found["state"] in ("given-up", "void"):
        from protocol.errors import IchibaError

        raise IchibaError(
            f"no quorum of notaries certified the move {short_id(found['move'])} in time ({found['code']})",
            why=found["why"],
            next_step="it may still come to stand: `ichiba wallet` says what became of it",
        )
    if found["state"] != "done":
        terminal.say(f"signed; it is {found['state']}: `ichiba wallet` says when it counts")
        raise SystemExit(0)
