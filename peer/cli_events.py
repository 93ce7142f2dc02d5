"""Events of a job in one line each, for people. Says why nothing happens, when nothing happens."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

from protocol.credits import credits_of

__all__ = ["ENDINGS", "figure_of", "line_of", "stamped", "tolerance_of"]

ENDINGS: Final = frozenset(("done", "failed", "cancelled"))
"""The kinds after which nothing more happens to a job."""

_Event = dict[str, Any]


def _who(name: object) -> str:
    return str(name)[-8:]


def _round(event: _Event) -> str:
    ranked, refused = event.get("ranked", []), event.get("refused", [])
    if ranked:
        best = ranked[0]
        why = ", to give a newcomer its turn" if event.get("explored") else ""
        bids = len(ranked) + event.get("more", 0)
        return f"{bids} bid(s); the best is {_who(best['solver'])}'s at {credits_of(best['price'])} credits{why}"
    if not refused:
        return "no bids yet: no solver that heard of this job bids on it; see `ichiba book`"
    reasons = "; ".join(f"{_who(one['solver'])} {one['why']}" for one in refused)
    return f"{len(refused)} bid(s), none acceptable: {reasons}"


def _refused(event: _Event) -> str:
    return f"{_who(event.get('solver') or event.get('checker'))} declined: {event.get('why', '')}"


def _closed(event: _Event) -> str:
    fees = sum(fee["micro"] for fee in event.get("fees", []))
    return (
        f"{event['kind']}: {credits_of(event['paid_micro'])} credits to solver {_who(event.get('solver'))}, "
        f"{credits_of(fees)} to checkers"
    )


def _verdict(event: _Event) -> str:
    where = f" at segment {event['wrong_segment']}" if event["finding"] == "wrong" else ""
    return f"{event['role']} {_who(event['checker'])} found {_span(event['segments'])} {event['finding']}{where}"


def _profiled(event: _Event) -> str:
    names = ", ".join(map(_who, event["profiled_by"]))
    return f"profiled by {names}: {tolerance_of(event)}; the job is offered"


def tolerance_of(found: dict[str, Any]) -> str:
    """What tolerant work is judged by, from what a node says of it (peer/profiles.py)."""
    left_out = f", without {', '.join(found['gauges'])}" if found["gauges"] else ""
    return f"thresholds of {found['l1_ppb'] / 1e9:.1e} (L2 {found['l2_ppb'] / 1e9:.1e}) of an update{left_out}"


def _span(segments: list[int]) -> str:
    return f"segment{'s' if len(segments) != 1 else ''} {', '.join(map(str, segments))}"


def figure_of(event: _Event) -> str:
    """The number of a step with what it is, as `loss 0.1234`; nothing for a job whose steps have none."""
    name = event.get("figure", "loss")
    return f"{name} {event['loss']:.4f}" if name else ""


_OF_PROFILE: Final = "profile-"  # what happens to a profile is told in its job's log under such a kind
_RULED: Final = {"forced": "wrong by order: its error was drawn, and its finder gets the jackpot"}
_LINES: Final[dict[str, Callable[[_Event], str]]] = {
    "offer": lambda e: (
        f"offered: {e['operations'] / 1e9:.1f} Gop at up to {credits_of(e['unit_price_max'])} credits each, "
        f"segments {e['segments'][0]} to {e['segments'][1] - 1}"
    ),
    "round": _round,
    "profiling": lambda e: (
        f"tolerant mode: {e['wanted']} verifiers profile the task first, for at most {credits_of(e['budget_micro'])} "
        "credits"
    ),
    "profile": lambda e: (
        f"profile {e['number'] + 1} is ordered: {e['operations'] / 1e9:.1f} Gop{': ' if e['why'] else ''}{e['why']}"
    ),
    "profile-agreed": lambda e: f"profile: verifier {_who(e['solver'])} runs the task under several kernels",
    "profile-step": lambda e: f"profile: step {e['step'] + 1} of {e['of']}",
    "profile-paid": lambda e: f"profile: handed in and paid: {credits_of(e['amount_micro'])} credits",
    "profile-done": lambda _: "profile: settled",
    "profiled": _profiled,
    "matched": lambda e: (
        f"chose solver {_who(e['solver'])} at {credits_of(e['unit_price'])} credits per giga-operation"
    ),
    "agreed": lambda e: f"solver {_who(e['solver'])} signed after {e['after_ns'] / 1e9:.1f} s and begins",
    "refused": _refused,
    "said": lambda e: f"{e['used_ns'] / 1e9:.1f} s: {e['text'].rstrip() or '(it runs)'}",
    "unchecked": lambda e: f"settled without a check; {e['why']}",
    "step": lambda e: f"step {e['step'] + 1}: {figure_of(e) or 'done'}",
    "solver-paused": lambda e: (
        f"solver {_who(e['solver'])} is paused by its owner; it is lost if nothing comes for {e['silence_s']} s"
    ),
    "solver-resumed": lambda e: f"solver {_who(e['solver'])} goes on",
    "paid": lambda e: (
        f"segment {e['segment']} done and paid: {credits_of(e['amount_micro'])} credits "
        f"({credits_of(e['cumulative_micro'])} so far), state {e['out_root'][:12]}"
    ),
    "proof": lambda e: f"proof committed over {e['receipts']} segments; now both seeds are revealed",
    "forfeit": lambda e: f"forfeit: {e['why']}",
    "draw": lambda e: f"drawn for re-execution: {_span(e['segments'])} of {e['of']}",
    "check": lambda e: f"{e['role']} {_who(e['checker'])} is asked to re-execute {_span(e['segments'])}",
    "verdict": _verdict,
    "challenged": lambda e: (
        f"{_who(e['challenger'])} challenges segment {e['segment']} before the notaries; "
        f"follow it with: ichiba dispute show {e['dispute'][:12]}"
    ),
    "arbitrated": lambda e: f"the notaries ruled: segment {e['segment']} is {_RULED.get(e['finding'], e['finding'])}",
    "waiting": lambda e: f"waiting: {e['why']}",
    "lost": lambda e: f"solver {_who(e['solver'])} is lost after {e['receipts']} segments: {e['why']}",
    "reoffer": lambda e: f"offered again from segment {e['segment']}: {e['why']}",
    "slashed": lambda e: f"solver {_who(e['solver'])} is slashed: {credits_of(e['lock_micro'])} credits of stake",
    "settled": _closed,
    "claimed": _closed,
    "claim": lambda e: f"closing alone: {e['why']}",
    "problem": lambda e: f"problem: {e['what']}",
    "done": lambda e: f"done: final state {e['final_root'][:12]}",
    "failed": lambda e: f"failed: {e['reason']}",
    "cancelled": lambda e: f"cancelled: {e['reason']}",
}


def line_of(event: _Event) -> str:
    """An event in words. One of a kind, or shape, that this program does not know is shown as it is."""
    make = _LINES.get(event["kind"])
    if make is None and event["kind"].startswith(_OF_PROFILE):
        return f"profile: {line_of({**event, 'kind': event['kind'].removeprefix(_OF_PROFILE)})}"
    if make is not None:
        try:
            return make(event)
        except (KeyError, TypeError, IndexError, AttributeError):
            pass  # a newer or older daemon: what it said is better than nothing
    rest = ", ".join(f"{key}={value}" for key, value in event.items() if key not in ("seq", "time_ns", "kind", "job"))
    return f"{event['kind']}: {rest}" if rest else str(event["kind"])


def stamped(event: _Event) -> str:
    """The line with the local time before it."""
    return f"{datetime.fromtimestamp(event['time_ns'] / 1e9):%H:%M:%S} {line_of(event)}"
