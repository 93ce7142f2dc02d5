"""Why nothing happens, and what would change it: typed reasons with counts, and counterfactuals that are tried.

An offer is held against every standing ask by the very rule of the market (`refuse_ask`). Where it is refused, the one
term that was in the way is moved just far enough, and the offer is held against the ask again, until the ask would take
it or nothing can be moved. So advice is never guessed: what it promises has been tried on the book, and what one change
alone does not reach is told as the pair or more that it takes. Pure: no clock, no ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from market.feasibility import refuse_ask, work_ns
from market.matching import UNKNOWN, Proven, Refusal, required_level
from protocol import params
from protocol.credits import credits_of
from protocol.params import SANDBOX_LEVELS as LEVELS
from protocol.records import Ask, Offer

__all__ = ["Advice", "Capacity", "Reason", "explain_offer", "mebibytes", "percent_of"]

_MOVES_MAX: Final = 8  # more than there are terms: a rule that never gives way must not hold us
_ADVICE_MAX: Final = 8


@dataclass(frozen=True)
class Advice:
    """A change, in words and in numbers, and how many more that alone would bring. changes: term -> new value."""

    words: str
    gain: int
    changes: dict[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reason:
    """Why something does not happen. step: where on its way. code: stable. count: of whom, or of what, it holds.

    severity: 1 nothing can happen before this is mended, 2 it is in the way, 3 it is worth knowing.
    """

    step: Literal["peer", "offer", "bids", "proposal", "work", "check", "settlement", "end"]
    code: str
    count: int
    words: str
    counterfactual: str = ""
    severity: int = 2


_Relock = Callable[[Offer], Offer]
_Tried = Callable[[Offer, bool], tuple[int, int]]


@dataclass(frozen=True)
class Capacity:
    """A standing ask and what is known of its peer here. barred: why it may not have this job, whatever its terms."""

    ask: Ask
    reachable: bool
    free_stake_micro: int
    barred: str = ""
    proven: Proven = UNKNOWN
    bytes_per_second: int = params.LINK_BYTES_PER_SECOND

    def refuse(self, offer: Offer, *, now_ns: int, connected: bool = False) -> Refusal | None:
        """Why it cannot take `offer`, by the rule of the market. connected: as if it were."""
        return refuse_ask(
            offer,
            self.ask,
            now_ns=now_ns,
            reachable=self.reachable or connected,
            free_stake_micro=self.free_stake_micro,
            proven=self.proven,
            bytes_per_second=self.bytes_per_second,
        )


@dataclass
class _Change:
    """What it takes for one peer: its first refusal, the terms that move, and the offer it would then take."""

    codes: tuple[str, ...]
    offer: Offer | None


def explain_offer(
    offer: Offer, capacities: Sequence[Capacity], *, now_ns: int, relock: _Relock
) -> tuple[int, list[Reason], list[Advice]]:
    """How many peers could take `offer` as it stands, why the others cannot (a peer counts under each of its reasons),
    and what would bring them: changes of one term, or, where none of those brings anybody, of more.

    relock: the offer with the stake that its price limit takes, for a higher limit locks more.
    """
    able: set[bytes] = set()
    changes: dict[bytes, _Change] = {}
    for one in sorted(capacities, key=lambda c: (c.ask.peer, c.ask.slot)):
        change = _moved(offer, one, now_ns, relock)
        if change is None:
            able.add(one.ask.peer)
            continue
        known = changes.get(one.ask.peer)  # the slot that takes least stands for its peer
        if known is None or (known.offer is None, len(known.codes)) > (change.offer is None, len(change.codes)):
            changes[one.ask.peer] = change
    shut = {peer: change for peer, change in changes.items() if peer not in able}
    counted = Counter(code for change in shut.values() for code in change.codes)

    def tried(far: Offer, connected: bool) -> tuple[int, int]:
        """How many peers more would take `far`, and how many that take `offer` would not."""
        takers = {c.ask.peer for c in capacities if _takes(far, c, now_ns, connected)}
        return len(takers - able), len(able - takers)

    told = _advice(offer, list(shut.values()), now_ns, relock=relock, tried=tried)
    alone = {code: one.words for terms, one in reversed(told) for code in terms if len(terms) == 1}
    reasons = [
        Reason("offer", code, count, _OFFER_WORDS.get(code, code), alone.get(code, ""), severity=2 if able else 1)
        for code, count in sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    ]
    advice = [one for terms, one in told if len(terms) == 1] or [one for _, one in told]
    return len(able), reasons, advice[:_ADVICE_MAX]


_OFFER_WORDS: Final = {
    "price": "ask more than the limit",
    "memory": "allow less memory than the job needs",
    "vram": "have too little memory on their graphics card",
    "device": "have another kind of device",
    "sandbox": "have too weak a sandbox",
    "deadline": "are too slow for the deadline",
    "too-long": "would take more than a year",
    "stake": "have too little stake free for a job of this price",
    "unreachable": "are not connected to this peer",
    "role": "do not take work of this kind",
    "self": "are this peer itself",
    "excluded": "failed this job before, or declined it just now",
    "credit": "give this peer no credit, or have too little of it left for this job",
    "privacy": "take no sealed jobs",
}


def _takes(offer: Offer, one: Capacity, now_ns: int, connected: bool) -> bool:
    return not one.barred and one.refuse(offer, now_ns=now_ns, connected=connected) is None


def _moved(offer: Offer, one: Capacity, now_ns: int, relock: _Relock) -> _Change | None:
    """The least that must move for this ask to take the offer; None if nothing must."""
    if one.barred:
        return _Change((one.barred,), None)
    codes: list[str] = []
    moved: Offer | None = offer
    connected = False
    for _ in range(_MOVES_MAX):
        assert moved is not None
        refusal = one.refuse(moved, now_ns=now_ns, connected=connected)
        if refusal is None:
            return _Change(tuple(codes), moved) if codes else None
        if refusal.code in codes:
            return _Change(tuple(codes), None)  # it moved already and that did not help
        codes.append(refusal.code)
        connected = connected or refusal.code == "unreachable"
        moved = _move(moved, one, refusal.code, now_ns, relock)
        if moved is None:
            return _Change(tuple(codes), None)
    return _Change(tuple(codes), None)


def _move(offer: Offer, one: Capacity, code: str, now_ns: int, relock: _Relock) -> Offer | None:
    """The offer with one term where this ask would take it, or None if no term of the offer is in the way."""
    ask = one.ask
    match code:
        case "unreachable":
            return offer
        case "price":
            price = ask.unit_price
            if offer.mode == "script":
                price = -(-price * ask.operations_per_second // 10**9)
            return relock(msgspec.structs.replace(offer, unit_price_max=price))
        case "stake":
            # Locks follow the limit: a lower one is covered by less stake, if the ask is below it still.
            limit = offer.unit_price_max * one.free_stake_micro // max(1, offer.lock_micro)
            lower = relock(msgspec.structs.replace(offer, unit_price_max=limit))
            return lower if limit and lower.lock_micro <= one.free_stake_micro else None
        case "memory":
            return msgspec.structs.replace(offer, memory_bytes=ask.memory_bytes) if ask.memory_bytes else None
        case "device":
            return msgspec.structs.replace(offer, device="any")
        case "vram":
            return msgspec.structs.replace(offer, device_memory_bytes=ask.device_memory_bytes)
        case "sandbox":
            weaker = msgspec.structs.replace(offer, sandbox=ask.sandbox)
            return weaker if required_level(weaker) < required_level(offer) else None
        case "deadline":
            takes_ns = work_ns(offer, ask, proven=one.proven, bytes_per_second=one.bytes_per_second)
            return msgspec.structs.replace(offer, deadline_ns=now_ns + takes_ns * 5 // 4 + 60 * 10**9)
        case _:
            return None


def _advice(
    offer: Offer, changes: list[_Change], now_ns: int, *, relock: _Relock, tried: _Tried
) -> list[tuple[frozenset[str], Advice]]:
    """For each set of terms that some peer needs moved: how far, and whom it brings, tried on all of the book; the
    sets of one term first. Up to three steps of each: as far as brings the first, half, and all that need just these.
    """
    by_terms: dict[frozenset[str], list[Offer]] = {}
    for change in changes:
        if change.offer is not None:
            by_terms.setdefault(frozenset(change.codes), []).append(change.offer)
    found: dict[str, tuple[frozenset[str], Advice]] = {}
    for terms in sorted(by_terms, key=lambda t: (len(t), -len(by_terms[t]), sorted(t))):
        for far in _steps(terms, by_terms[terms], offer, relock):
            gain, loss = tried(far, "unreachable" in terms)
            if gain:
                words = f"{_words(offer, far, terms, now_ns)}: {gain} more{f', {loss} fewer' if loss else ''}"
                found.setdefault(words, (terms, Advice(words, gain, _changes(offer, far, terms))))
    return list(found.values())


def _steps(terms: frozenset[str], moved: list[Offer], offer: Offer, relock: _Relock) -> list[Offer]:
    """The offers to tell of: the least move, and ones far enough for half and for all, where one move serves many."""
    moved.sort(key=lambda one: _distance(one, offer))
    if "stake" in terms:  # a lower limit keeps those out that a higher one reaches: only the nearest is sure
        return moved[:1]
    steps = [_joined(moved[:count], offer, relock) for count in (1, -(-len(moved) // 2), len(moved))]
    return [step for i, step in enumerate(steps) if step not in steps[:i]]


def _joined(moved: list[Offer], offer: Offer, relock: _Relock) -> Offer:
    """One offer moved as far as each of them."""
    far = msgspec.structs.replace(
        moved[0],
        unit_price_max=max(one.unit_price_max for one in moved),
        memory_bytes=min(one.memory_bytes for one in moved),
        device_memory_bytes=min(one.device_memory_bytes for one in moved),
        sandbox=min(one.sandbox for one in moved),
        deadline_ns=max(one.deadline_ns for one in moved),
    )
    return relock(far) if far.unit_price_max != offer.unit_price_max else far


def _distance(moved: Offer, offer: Offer) -> tuple[int, ...]:
    return (
        abs(moved.unit_price_max - offer.unit_price_max),
        offer.memory_bytes - moved.memory_bytes,
        offer.device_memory_bytes - moved.device_memory_bytes,
        offer.sandbox - moved.sandbox,
        moved.deadline_ns - offer.deadline_ns,
    )


def _changes(offer: Offer, far: Offer, terms: frozenset[str]) -> dict[str, int | str]:
    names = ("unit_price_max", "memory_bytes", "device", "device_memory_bytes", "sandbox", "deadline_ns")
    moved = {name: getattr(far, name) for name in names if getattr(far, name) != getattr(offer, name)}
    return moved | ({"connect": "yes"} if "unreachable" in terms else {})


def _words(offer: Offer, far: Offer, terms: frozenset[str], now_ns: int) -> str:
    parts = []
    if "unreachable" in terms:
        parts.append("connect to them (`ichiba connect ADDRESS`)")
    if far.unit_price_max != offer.unit_price_max:
        up = far.unit_price_max > offer.unit_price_max
        parts.append(
            f"{'raise' if up else 'lower'} the limit by {percent_of(offer.unit_price_max, far.unit_price_max)} % "
            f"(--price {credits_of(far.unit_price_max)})"
        )
    if far.memory_bytes != offer.memory_bytes:
        parts.append(f"need no more than {mebibytes(far.memory_bytes)} of memory")
    if far.device != offer.device:
        parts.append("take any device")
    if far.device_memory_bytes != offer.device_memory_bytes:
        parts.append(f"need no more than {mebibytes(far.device_memory_bytes)} on the card")
    if far.sandbox != offer.sandbox:
        parts.append(f"accept sandbox level {LEVELS[far.sandbox]}")
    if far.deadline_ns != offer.deadline_ns:
        minutes = -(-(far.deadline_ns - max(now_ns, offer.deadline_ns)) // (60 * 10**9))
        parts.append(f"extend the deadline by {minutes} min")
    return " and ".join(parts)


def percent_of(old: int, new: int) -> int:
    """The distance in per cent of `old`, rounded away from it: who goes so far is far enough."""
    return -(-100 * abs(new - old) // max(1, old))


def mebibytes(count: int) -> str:
    """Bytes for people, in the unit they order memory in."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
