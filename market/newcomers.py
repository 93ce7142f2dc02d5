"""Whom a house orders re-runs of, and how long they are: one rule for the house that asks and the peer that wonders.

Pure. Money in micro-credits, prices in micro-credits per giga-operation.
"""

from __future__ import annotations

from dataclasses import dataclass

from market.matching import Record, Refusal
from protocol import params
from protocol.credits import credits_of
from protocol.network import Reruns
from protocol.records import amount_for

__all__ = ["Newcomer", "left_micro", "refuse_newcomer", "steps_for"]


@dataclass(frozen=True)
class Newcomer:
    """What is known of a peer. proven: operations per second of its bench card, 0 without one that the house timed.
    spent_micro, spent_on_it_micro: of the house's budget today, for all and for this peer, open orders included."""

    history: Record
    stake_micro: int
    unit_price: int
    proven: int
    spent_micro: int
    spent_on_it_micro: int


def left_micro(terms: Reruns, *, spent_micro: int, spent_on_it_micro: int) -> int:
    """What the house may still spend today on one peer."""
    return max(0, min(terms.daily_micro - spent_micro, terms.peer_daily_micro - spent_on_it_micro))


def refuse_newcomer(one: Newcomer, terms: Reruns, *, stake_min_micro: int) -> Refusal | None:
    """Why the house orders nothing of a peer now, or None. stake_min_micro: with so much it can have paid work."""
    if one.history.wrong:
        return Refusal("wrong-before", f"{one.history.wrong} of its deals ended wrong")
    if one.history.right >= params.NEWCOMER_DEALS:
        return Refusal("not-new", f"{one.history.right} deals of it ended right: it is no newcomer any more")
    if one.stake_micro >= stake_min_micro:
        return Refusal("staked", f"a stake of {credits_of(one.stake_micro)} credits gets it work that others pay for")
    if one.unit_price > terms.unit_price:
        return Refusal("price", f"it asks {one.unit_price} per Gop, the house pays {terms.unit_price}")
    if not one.proven:
        return Refusal("no-card", "it has passed no challenge of the house yet: one comes by surprise every hour")
    if one.spent_on_it_micro >= terms.peer_daily_micro:
        return Refusal("peer-budget", f"{credits_of(terms.peer_daily_micro)} credits a peer and day are spent")
    if one.spent_micro >= terms.daily_micro:
        return Refusal("budget", f"the {credits_of(terms.daily_micro)} credits of the day are spent")
    return None


def steps_for(terms: Reruns, one: Newcomer, *, steps: int, operations_per_step: int) -> int:
    """How many steps a re-run has, `steps` at most: what the budgets bear and the peer's proven speed does in time. 0
    where a single one is too much, or all are worth less than a micro-credit."""
    left = left_micro(terms, spent_micro=one.spent_micro, spent_on_it_micro=one.spent_on_it_micro)
    paid = left * 10**9 // (terms.unit_price * operations_per_step)  # amounts are rounded down
    timely = one.proven // params.BENCH_JOB_SHARE * params.RERUN_SECONDS // operations_per_step
    found = min(steps, paid, max(1, timely))
    return found if amount_for(found * operations_per_step, terms.unit_price) else 0
