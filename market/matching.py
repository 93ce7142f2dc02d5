"""Who gets the work: a deterministic rule over signed bids, so that anyone holding them can audit a match.

Score, in micro-credits, smaller is better: the price of the work, plus what a failure would cost times its
pessimistic probability, plus the price of waiting for it, and for what moves between the two peers. Every bid that is
passed over gets a typed reason. DESIGN §9.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from market.reputation import Reputation
from protocol import params
from protocol.codec import blake
from protocol.credits import credits_of
from protocol.forced import NO_ERRORS
from protocol.params import SANDBOX_LEVELS as LEVELS
from protocol.profile import EXACT
from protocol.records import Bid, Offer, amount_for

__all__ = [
    "UNKNOWN",
    "Choice",
    "Proven",
    "Record",
    "Refusal",
    "Scored",
    "believed_ns",
    "draws_newcomer",
    "eta_ns",
    "match_round",
    "refuse_bid",
    "refuse_device",
    "refuse_offer",
    "refuse_time",
    "transfer_bytes",
    "transfer_ns",
]

HOUR_NS: Final = 3600 * 10**9
SANDBOX_CONTAINED: Final = LEVELS.index("CONTAINED")
SANDBOX_NAMESPACED: Final = LEVELS.index("NAMESPACED")


@dataclass(frozen=True)
class Record:
    """A solver's bare history from co-signed evidence: deals that ended right, and deals that ended wrong. What it is
    trusted by is its Reputation.

    streak: how many ended right since the last that did not; the rate of checks follows from it.
    """

    right: int = 0
    wrong: int = 0
    streak: int = 0

    def after_right(self) -> Record:
        """One more that ended right."""
        return Record(self.right + 1, self.wrong, self.streak + 1)

    def after_wrong(self, *, taken_back: bool = False) -> Record:
        """One more that ended wrong; taken_back: it had been counted as right before."""
        return Record(max(0, self.right - taken_back), self.wrong + 1, 0)


@dataclass(frozen=True)
class Proven:
    """What is known of a solver's speed. grade: who timed its bench card: this peer, somebody else, nobody.

    operations_per_second: of pure products, which no job exceeds; 0 without a card.
    """

    grade: Literal["witnessed", "self-timed", "none"]
    operations_per_second: int

    @property
    def fastest(self) -> int:
        """Operations per second that it is believed to reach at most: without a card that this peer timed itself never
        more than UNPROVEN_SPEED_MAX."""
        speed = self.operations_per_second or params.UNPROVEN_SPEED_MAX
        return speed if self.grade == "witnessed" else min(speed, params.UNPROVEN_SPEED_MAX)


UNKNOWN: Final = Proven("none", 0)
"""What is known of the speed of a stranger."""

SLOWDOWN: Final = {
    "witnessed": 1000,
    "self-timed": params.SELF_TIMED_SLOWDOWN_PERMILLE,
    "none": params.UNPROVEN_SLOWDOWN_PERMILLE,
}


def believed_ns(operations: int, eta_ns: int, proven: Proven) -> int:
    """How long `operations` are expected to take, in ns, of a solver that says `eta_ns`; rounded down.

    Never less than the work takes at the speed of the card, which multiplies and does nothing else; and without a
    card that this peer timed itself never less than at UNPROVEN_SPEED_MAX, and longer than the solver says: a word
    alone must not win against a measurement.
    """
    return max(eta_ns * SLOWDOWN[proven.grade] // 1000, operations * 10**9 // proven.fastest)


def transfer_bytes(offer: Offer) -> int:
    """All that moves between the two peers: program, data and first state to the solver, the checkpoint of each segment
    back. A profile comes back in a message."""
    checkpoints = 0 if offer.mode == "profile" else offer.checkpoint_bytes * (offer.last_segment - offer.first_segment)
    return offer.content_bytes + checkpoints


def transfer_ns(offer: Offer, bytes_per_second: int) -> int:
    """How long that takes, in ns, rounded down."""
    return transfer_bytes(offer) * 10**9 // max(1, bytes_per_second)


def eta_ns(offer: Offer, operations_per_second: int) -> int:
    """How long the work takes at such a speed, in ns, rounded down; of a script its operations are nanoseconds."""
    return offer.operations if offer.mode == "script" else offer.operations * 10**9 // max(1, operations_per_second)


@dataclass(frozen=True)
class Refusal:
    """Why not: a stable code, and a sentence with the values that decided."""

    code: str
    why: str


class Scored(msgspec.Struct, frozen=True, gc=False):
    """A feasible bid and the parts of its score, in micro-credits. A large round makes thousands at once: as a Struct
    of plain values they cost a fifth, and nothing to the garbage collector."""

    bid_id: bytes
    solver: bytes
    price_micro: int
    risk_micro: int
    wait_micro: int
    transfer_micro: int = 0

    @property
    def score_micro(self) -> int:
        """The sum that is minimised."""
        return self.price_micro + self.risk_micro + self.wait_micro + self.transfer_micro


@dataclass(frozen=True)
class Choice:
    """One round's outcome: the winner (or None), every feasible bid best first, every refused one with its why."""

    winner: Scored | None
    ranked: tuple[Scored, ...]
    refused: tuple[tuple[bytes, Refusal], ...]
    explored: bool = False
    more: int = 0  # feasible bids behind those that are ranked: a large round tells the best


def required_level(offer: Offer) -> int:
    """The sandbox level that `offer` takes: what it says; but for a script CONTAINED, and for a sealed job at least
    NAMESPACED, as its content must be kept from the other programs of the machine."""
    sealed = SANDBOX_NAMESPACED if offer.privacy == "sealed" else 0
    return max(offer.sandbox, SANDBOX_CONTAINED if offer.mode == "script" else sealed)


def refuse_device(offer: Offer, device: str, device_memory_bytes: int) -> Refusal | None:
    """Why work on this device is not what `offer` wants, or None."""
    if offer.device not in ("any", device):
        return Refusal("device", f"a {offer.device} is needed, this is a {device}")
    if device_memory_bytes < offer.device_memory_bytes:
        needed, has = offer.device_memory_bytes >> 20, device_memory_bytes >> 20
        return Refusal("vram", f"needs {needed} MiB on the graphics card, there are {has}")
    return None


def refuse_time(offer: Offer, *, now_ns: int, takes_ns: int) -> Refusal | None:
    """Why work that takes so long from now, with its transfer, is not done in time, or None."""
    if takes_ns > params.RUN_NS_MAX:
        return Refusal("too-long", f"takes {takes_ns // (86_400 * 10**9)} days with its transfer")
    if not offer.deadline_ns or now_ns + takes_ns <= offer.deadline_ns:
        return None
    left_s = max(0, offer.deadline_ns - now_ns) // 10**9
    return Refusal("deadline", f"takes {-(-takes_ns // 10**9)} s with its transfer, {left_s} s are left")


def refuse_offer(
    offer: Offer,
    *,
    unit_price: int,
    memory_bytes: int,
    sandbox: int,
    stake_micro: int,
    slots_free: int,
    solves: bool = True,
    verifies: bool = False,
    checker_stake_min_micro: int = 0,
    device: str = "cpu",
    device_memory_bytes: int = 0,
    now_ns: int = 0,
    takes_ns: int = 0,
    credit_micro: int = 0,
) -> Refusal | None:
    """Why a peer with these means does not bid on `offer`, or None. Profiles are for verifiers with a stake, all else
    is for solvers. takes_ns: from now to the end of its work, with all transfers. credit_micro: what is left of the
    credit line that this peer gives the submitter."""
    profile = offer.mode == "profile"
    if not (verifies if profile else solves):
        return Refusal("role", f"this peer is no {'verifier' if profile else 'solver'}")
    if profile and stake_micro < checker_stake_min_micro:
        return Refusal("stake", f"a profile takes {checker_stake_min_micro} of stake, {stake_micro} are free")
    if offer.unit_price_max < unit_price:
        return Refusal("price", f"offers at most {offer.unit_price_max}, this peer asks {unit_price} per Gop")
    if offer.memory_bytes > memory_bytes:
        return Refusal("memory", f"needs {offer.memory_bytes >> 20} MiB, {memory_bytes >> 20} MiB are allowed")
    needed = required_level(offer)
    if needed > sandbox:
        return Refusal("sandbox", f"needs sandbox level {LEVELS[needed]}, this machine has {LEVELS[sandbox]}")
    if refusal := refuse_device(offer, device, device_memory_bytes):
        return refusal
    if refusal := refuse_time(offer, now_ns=now_ns, takes_ns=takes_ns):
        return refusal
    if (offer.mode == "tolerant") != (offer.tolerance != EXACT):
        return Refusal("mode", "a tolerance belongs to tolerant work, and tolerant work needs one")
    if offer.lock_micro > stake_micro:
        return Refusal("stake", f"locks {offer.lock_micro} of stake, {stake_micro} micro-credits are free")
    if refusal := _refuse_credit(offer, unit_price, credit_micro, "this peer gives its submitter"):
        return refusal
    if not slots_free:
        return Refusal("busy", "every slot of this peer is taken")
    return None


def _refuse_credit(offer: Offer, unit_price: int, left_micro: int, who: str) -> Refusal | None:
    """Why an offer on credit does not fit what is left of its solver's line. One with a budget needs none."""
    need_micro = amount_for(offer.operations, unit_price)
    if offer.budget_micro or need_micro <= left_micro:
        return None
    need, left = credits_of(need_micro), credits_of(left_micro)
    return Refusal("credit", f"the job is on credit and can come to {need} credits, {who} {left} of it")


def refuse_bid(
    offer: Offer,
    bid: Bid,
    *,
    free_stake_micro: int,
    excluded: Collection[bytes],
    reachable: bool,
    stake_min_micro: int = 0,
    now_ns: int = 0,
    takes_ns: int = 0,
    credit_micro: int = 0,
) -> Refusal | None:
    """Why `bid` cannot win `offer`, or None. stake_min_micro: what its peer must hold, beside what it locks. takes_ns:
    from now to the end of its work as it is believed, with all transfers. credit_micro: what is left of the credit line
    that its peer gives the submitter."""
    if bid.solver in excluded:
        return Refusal("excluded", "this solver failed this job, and others go first")
    if bid.solver == offer.submitter:
        return Refusal("self", "a submitter does not solve its own job")
    if not reachable:
        return Refusal("unreachable", "no connection to the solver at present")
    if bid.unit_price > offer.unit_price_max:
        percent = 100 * (bid.unit_price - offer.unit_price_max) // max(1, offer.unit_price_max) + 1
        return Refusal("price", f"asks {bid.unit_price} per Gop, limit {offer.unit_price_max} ({percent} % more)")
    if bid.operations_cap < offer.operations:
        return Refusal("operations", f"caps at {bid.operations_cap} operations, {offer.operations} are needed")
    needed = required_level(offer)
    if bid.sandbox < needed:
        return Refusal("sandbox", f"has sandbox level {LEVELS[bid.sandbox]}, {LEVELS[needed]} is needed")
    if refusal := refuse_device(offer, bid.device, bid.device_memory_bytes):
        return refusal
    if refusal := refuse_time(offer, now_ns=now_ns, takes_ns=takes_ns):
        return refusal
    if offer.units and bid.forced_commitment != NO_ERRORS:
        return Refusal("mode", "would have an error ordered in a unit of a parallel job, where none is")
    if bid.lock_micro < offer.lock_micro:
        return Refusal("lock", f"locks {bid.lock_micro}, {offer.lock_micro} micro-credits are asked")
    if free_stake_micro < stake_min_micro:
        return Refusal("stake", f"holds {free_stake_micro} free stake, a profile takes {stake_min_micro}")
    if bid.lock_micro > free_stake_micro:
        return Refusal("stake", f"promises a lock of {bid.lock_micro}, holds {free_stake_micro} free stake")
    return _refuse_credit(offer, bid.unit_price, credit_micro, "this solver gives")


def draws_newcomer(offer_id: bytes, round_number: int) -> bool:
    """Whether in this round of this offer the best newcomer goes first."""
    drawn = int.from_bytes(blake("ichiba/explore", offer_id, round_number.to_bytes(8, "little"))[:8], "little")
    return drawn % 1000 < params.EXPLORATION_PERMILLE


def match_round(
    offer: Offer,
    offer_id: bytes,
    bids: Sequence[tuple[bytes, Bid]],
    *,
    round_number: int,
    free_stake_micro: Callable[[bytes], int],
    reputation_of: Callable[[bytes], Reputation],
    excluded: Collection[bytes],
    reachable: Callable[[bytes], bool],
    proven: Callable[[bytes], Proven] = lambda _: UNKNOWN,
    link: Callable[[bytes], int] = lambda _: params.LINK_BYTES_PER_SECOND,
    stake_min_micro: int = 0,
    now_ns: int = 0,
    credit_micro: Callable[[bytes], int] = lambda _: 0,
) -> Choice:
    """The best bid for one offer in one round. Ties go to the smaller bid id; nothing depends on arrival.

    In EXPLORATION_PERMILLE of rounds, drawn by the hash of offer and round, the best newcomer goes first.
    Waiting is priced so that an hour costs as much as the work itself. link: bytes per second to and from a peer.
    now_ns: when the round is, for the deadline.
    """
    scored, refused = [], []
    hour_micro = amount_for(offer.operations, offer.unit_price_max)
    for bid_id, bid in bids:
        run_ns = believed_ns(offer.operations, bid.eta_ns, proven(bid.solver))
        moving_ns = transfer_ns(offer, link(bid.solver))
        refusal = refuse_bid(
            offer,
            bid,
            free_stake_micro=free_stake_micro(bid.solver),
            excluded=excluded,
            reachable=reachable(bid.solver),
            stake_min_micro=stake_min_micro,
            now_ns=now_ns,
            takes_ns=run_ns + moving_ns,
            credit_micro=0 if offer.budget_micro else credit_micro(bid.solver),
        )
        if refusal is not None:
            refused.append((bid.solver, refusal))
            continue
        price = amount_for(offer.operations, bid.unit_price)
        risk = price * (1_000_000 - reputation_of(bid.solver).bound_ppm) // 1_000_000
        wait, moving = (hour_micro * each_ns // HOUR_NS for each_ns in (run_ns, moving_ns))
        scored.append(Scored(bid_id, bid.solver, price, risk, wait, moving))
    scored.sort(key=lambda s: (s.score_micro, s.bid_id))
    explored = False
    if draws_newcomer(offer_id, round_number):
        for index, one in enumerate(scored):
            if reputation_of(one.solver).deals < params.NEWCOMER_DEALS:
                scored.insert(0, scored.pop(index))
                explored = True
                break
    return Choice(scored[0] if scored else None, tuple(scored), tuple(refused), explored)
