"""Why a solver or verifier gets no work, and which of its own terms would bring some.

Its terms are moved, one by one, against every offer it does not bid on, by the rule it bids by (`refuse_offer`); what
is told has been tried. Of offers it bids on it says where somebody asks less. Pure, as market/reasons.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from market.matching import Refusal, refuse_offer, required_level
from market.reasons import Advice, Reason, mebibytes, percent_of
from protocol.credits import credits_of
from protocol.params import SANDBOX_LEVELS as LEVELS
from protocol.records import ROLE_SOLVER, ROLE_VERIFIER, Offer

__all__ = ["Demand", "Own", "explain_own"]

_MOVES_MAX: Final = 8  # as in market/reasons.py
_ADVICE_MAX: Final = 8


@dataclass(frozen=True)
class Demand:
    """An offer of somebody else. price: what this peer asks for it per giga-operation. bids: unit prices of others."""

    offer: Offer
    price: int
    bids: tuple[int, ...] = ()
    bid_on: bool = False
    now_ns: int = 0
    takes_ns: int = 0  # this peer, from now to the end of the work, with all transfers
    credit_micro: int = 0  # what is left of the line this peer gives the submitter, of an offer on credit


@dataclass(frozen=True)
class Own:
    """What a peer brings. unit_price: micro-credits per giga-operation; its price for a Demand moves in proportion."""

    roles: int
    unit_price: int
    memory_bytes: int
    sandbox: int
    stake_micro: int
    slots_free: int
    checker_stake_min_micro: int = 0
    device: str = "cpu"
    device_memory_bytes: int = 0

    def refuse(self, demand: Demand, price: int) -> Refusal | None:
        """As the market's own rule."""
        return refuse_offer(
            demand.offer,
            unit_price=price,
            memory_bytes=self.memory_bytes,
            sandbox=self.sandbox,
            stake_micro=self.stake_micro,
            slots_free=self.slots_free,
            solves=bool(self.roles & ROLE_SOLVER),
            verifies=bool(self.roles & ROLE_VERIFIER),
            checker_stake_min_micro=self.checker_stake_min_micro,
            device=self.device,
            device_memory_bytes=self.device_memory_bytes,
            now_ns=demand.now_ns,
            takes_ns=demand.takes_ns,
            credit_micro=demand.credit_micro,
        )


_OWN_WORDS: Final = {
    "price": "pay less than this peer asks",
    "memory": "need more memory than this peer allows",
    "sandbox": "need a stronger sandbox than this machine has",
    "stake": "ask for more stake than is free here",
    "busy": "would fit, but every slot is taken",
    "role": "are for another role",
    "mode": "contradict themselves",
    "device": "need another kind of device",
    "vram": "need more memory on the graphics card than there is",
    "too-long": "would take this peer more than a year",
    "deadline": "must be done sooner than this peer can",
    "credit": "are on credit, and their submitters have too little with this peer",
    "outbid": "have a lower bid of somebody else",
}


def explain_own(own: Own, demands: Sequence[Demand]) -> tuple[int, list[Reason], list[Advice]]:
    """On how many offers this peer can bid as it is, why not on the others, and what would bring them, most first."""
    able = 0
    paths: list[_Path] = []
    for demand in demands:
        codes, moved, price = _own_moved(own, demand)
        if not codes:
            able += 1
            if demand.bid_on and demand.bids and min(demand.bids) < demand.price:
                paths.append((("outbid",), own, min(demand.bids), demand))
        else:
            paths.append((codes, moved, price, demand))
    counted = Counter(code for codes, *_ in paths for code in codes)
    advice = _own_advice(own, paths)
    reasons = [
        Reason(
            "offer", code, count, _OWN_WORDS.get(code, code),
            next((one.words for one in advice if one.changes.keys() <= _OWN_TERMS.get(code, set())), ""),
            severity=2 if able else 1,
        )
        for code, count in sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    ]  # fmt: skip
    return able, reasons, advice


_OWN_TERMS: Final[dict[str, set[str]]] = {
    "price": {"percent_less", "unit_price"}, "outbid": {"percent_less", "unit_price"}, "memory": {"memory_bytes"},
    "sandbox": {"sandbox"}, "stake": {"stake_micro"}, "busy": {"slots_free"}, "role": {"roles"},
}  # fmt: skip
_Path = tuple[tuple[str, ...], "Own | None", int, Demand]


def _own_moved(own: Own, demand: Demand) -> tuple[tuple[str, ...], Own | None, int]:
    """What of this peer's terms must move for it to bid, those terms, and its price for this offer then."""
    codes: list[str] = []
    moved: Own | None = own
    price = demand.price
    for _ in range(_MOVES_MAX):
        assert moved is not None
        refusal = moved.refuse(demand, price)
        if refusal is None:
            return tuple(codes), moved, price
        if refusal.code in codes:
            break
        codes.append(refusal.code)
        if refusal.code == "price":
            price = demand.offer.unit_price_max
            continue
        moved = _own_move(moved, demand.offer, refusal.code)
        if moved is None:
            break
    return tuple(codes), None, price


def _own_move(own: Own, offer: Offer, code: str) -> Own | None:
    match code:
        case "memory":
            return replace(own, memory_bytes=offer.memory_bytes)
        case "sandbox":
            return replace(own, sandbox=required_level(offer))
        case "stake":
            wanted = max(offer.lock_micro, own.checker_stake_min_micro if offer.mode == "profile" else 0)
            return replace(own, stake_micro=max(own.stake_micro + 1, wanted))
        case "busy":
            return replace(own, slots_free=1)
        case "role":
            return replace(own, roles=own.roles | (ROLE_VERIFIER if offer.mode == "profile" else ROLE_SOLVER))
        case _:
            return None


def _own_advice(own: Own, paths: Sequence[_Path]) -> list[Advice]:
    by_codes: dict[frozenset[str], list[_Path]] = {}
    for path in paths:
        if path[1] is not None:
            by_codes.setdefault(frozenset(path[0]), []).append(path)
    found = []
    for codes in sorted(by_codes, key=lambda c: (len(c), -len(by_codes[c]), sorted(c))):
        ordered = sorted(by_codes[codes], key=lambda path: _own_distance(own, path))
        for last in sorted({0, -(-len(ordered) // 2) - 1, len(ordered) - 1}):
            found.append(_own_words(own, codes, ordered[: last + 1]))
    singles = [one for one in found if len(one.changes) == 1 or set(one.changes) == {"percent_less", "unit_price"}]
    return (singles or found)[:_ADVICE_MAX]


def _own_distance(own: Own, path: _Path) -> tuple[int, ...]:
    _, moved, price, demand = path
    assert moved is not None
    cheaper = percent_of(demand.price, price)
    return cheaper, moved.memory_bytes - own.memory_bytes, moved.stake_micro - own.stake_micro


def _own_words(own: Own, codes: frozenset[str], paths: Sequence[_Path]) -> Advice:
    """One change that serves all of `paths`."""
    count = len(paths)
    parts: list[str] = []
    changes: dict[str, int | str] = {}
    moved = [path[1] for path in paths if path[1] is not None]
    if codes & {"price", "outbid"}:
        percent = max(percent_of(demand.price, max(0, price - ("outbid" in codes))) for _, _, price, demand in paths)
        unit_price = own.unit_price * (100 - min(100, percent)) // 100
        changes |= {"percent_less": percent, "unit_price": unit_price}
        parts.append(f"ask {percent} % less (--price {credits_of(unit_price)})")
    if "memory" in codes:
        changes["memory_bytes"] = most = max(one.memory_bytes for one in moved)
        parts.append(f"allow a job {mebibytes(most)} (--memory {-(-most >> 20)}M)")
    if "sandbox" in codes:
        changes["sandbox"] = level = max(one.sandbox for one in moved)
        parts.append(f"make sandbox level {LEVELS[level]} work here (`ichiba doctor`)")
    if "stake" in codes:
        changes["stake_micro"] = stake = max(one.stake_micro for one in moved)
        more = credits_of(stake - own.stake_micro)
        parts.append(f"lock {more} credits more (`ichiba wallet stake {more}`)")
    if "busy" in codes:
        changes["slots_free"] = 1
        parts.append("wait until a slot is free")
    if "role" in codes:
        changes["roles"] = roles = max(one.roles for one in moved)
        parts.append(
            f"take the role too (--roles with {'verifier' if roles & ROLE_VERIFIER & ~own.roles else 'solver'})"
        )
    end = (
        f"{count} offer{'s' * (count != 1)} would take you" if "outbid" not in codes else f"the cheapest bid on {count}"
    )
    return Advice(f"{' and '.join(parts)}: {end}", count, changes)
