"""Whether the peer behind a standing ask could take an offer at all, judged from what both say in public."""

from __future__ import annotations

from market.matching import Refusal, required_level
from protocol.params import SANDBOX_LEVELS as LEVELS
from protocol.records import ROLE_SOLVER, ROLE_VERIFIER, Ask, Offer

__all__ = ["refuse_ask"]


def refuse_ask(offer: Offer, ask: Ask, *, now_ns: int, reachable: bool, free_stake_micro: int) -> Refusal | None:
    """Why `ask` cannot serve `offer`, or None. now_ns: for the deadline."""
    role = ROLE_VERIFIER if offer.mode == "profile" else ROLE_SOLVER
    price = ask.unit_price
    if offer.mode == "script":  # its giga-operation is a second (peer/bidding.py)
        price = -(-price * ask.operations_per_second // 10**9)
    needed = required_level(offer)
    if ask.peer == offer.submitter:
        return Refusal("self", "a submitter does not solve its own job")
    if not ask.roles & role:
        return Refusal("role", f"is no {'verifier' if offer.mode == 'profile' else 'solver'}")
    if not reachable:
        return Refusal("unreachable", "no connection to the solver at present")
    if offer.device != "any" and ask.device != offer.device:
        return Refusal("device", f"has a {ask.device}, a {offer.device} is needed")
    if ask.device_memory_bytes < offer.device_memory_bytes:
        return Refusal(
            "device-memory",
            f"{ask.device_memory_bytes >> 20} MiB on its card, {offer.device_memory_bytes >> 20} needed",
        )
    if ask.memory_bytes < offer.memory_bytes:
        return Refusal("memory", f"allows {ask.memory_bytes >> 20} MiB, {offer.memory_bytes >> 20} MiB are needed")
    if ask.sandbox < needed:
        return Refusal("sandbox", f"has sandbox level {LEVELS[ask.sandbox]}, {LEVELS[needed]} is needed")
    if offer.deadline_ns and now_ns + run_ns(offer, ask) > offer.deadline_ns:
        return Refusal("deadline", f"takes {run_ns(offer, ask) // 10**9} s, longer than there is")
    if price > offer.unit_price_max:
        return Refusal("price", f"asks {price} per Gop, limit {offer.unit_price_max}")
    if free_stake_micro < offer.lock_micro:
        return Refusal("stake", f"{free_stake_micro} of stake are free, {offer.lock_micro} are asked")
    return None


def run_ns(offer: Offer, ask: Ask) -> int:
    """How long the work takes at the speed that `ask` says; of a script its operations are nanoseconds."""
    return offer.operations if offer.mode == "script" else offer.operations * 10**9 // max(1, ask.operations_per_second)
