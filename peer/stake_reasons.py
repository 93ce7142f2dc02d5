"""Why a peer that would earn has too little stake, and the command that mends it: a part of `ichiba why me`."""

from __future__ import annotations

from collections.abc import Iterable

from market.reasons import Reason
from peer.desk import Desk
from peer.settler import Settler
from protocol.credits import credits_of
from protocol.records import ROLE_VERIFIER

__all__ = ["stake_reasons"]


def stake_reasons(desk: Desk, settler: Settler, locks: Iterable[int]) -> list[Reason]:
    """What is in the way of this peer's stake. locks: what the offers it hears would lock, in micro-credits."""
    stake, checks = settler.free_stake(desk.me), desk.network.rules.checker_stake_min_micro
    verifies = bool(desk.means.roles & ROLE_VERIFIER)
    if not stake:
        wanted = checks if verifies else min((lock for lock in locks if lock), default=0)
        words = f"no stake is free: {_where(desk, settler)}; work and checks of a graph ask for stake"
        return [Reason("peer", "no-stake", 0, words, _mend(settler.free_micro(desk.me), wanted))]
    if verifies and stake < checks:
        words = f"a verifier's word counts from a stake of {credits_of(checks)} credits, {credits_of(stake)} are free"
        return [Reason("check", "little-stake", 1, words, _mend(settler.free_micro(desk.me), checks - stake))]
    return []


def _where(desk: Desk, settler: Settler) -> str:
    """What became of it."""
    locked = sum(
        c.agreement.lock_micro for c in settler.channels.values() if c.agreement.solver == desk.me and c.locked
    )
    leaving = settler.stakes.unbonding_micro(desk.me)
    parts = ((locked, "credits of it are locked"), (leaving, "are being taken out"))
    return ", ".join(f"{credits_of(micro)} {words}" for micro, words in parts if micro) or "this peer staked nothing"


def _mend(free_micro: int, wanted_micro: int) -> str:
    """The command that stakes what is wanted (0: nobody says how much), as far as there are credits for it."""
    command = f"`ichiba wallet stake {credits_of(wanted_micro) if wanted_micro else 'AMOUNT'}`"
    if free_micro >= wanted_micro > 0:
        return f"lock {credits_of(wanted_micro)} with {command}"
    if free_micro and not wanted_micro:
        return f"{command} moves free credits into it"
    return f"{command} needs more than the {credits_of(free_micro)} credits that are free; scripts pay without a stake"
