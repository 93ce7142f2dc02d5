"""Whether the peer behind a standing ask could take an offer at all, judged from what both say in public.

The rule twice: `refuse_ask` for one ask, in words; `refused_rows` for columns of them, without. A property test holds
one against the other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import numpy.typing as npt

from market.matching import (
    UNKNOWN,
    Proven,
    Refusal,
    believed_ns,
    eta_ns,
    refuse_device,
    refuse_time,
    required_level,
    transfer_ns,
)
from protocol import params
from protocol.params import SANDBOX_LEVELS as LEVELS
from protocol.records import ROLE_SOLVER, ROLE_VERIFIER, Ask, Offer

__all__ = ["DEVICES", "Columns", "refuse_ask", "refused_rows", "work_ns"]

DEVICES: Final = ("cpu", "gpu")
_INT64_MAX: Final = 2**63 - 1


def refuse_ask(
    offer: Offer,
    ask: Ask,
    *,
    now_ns: int,
    reachable: bool,
    free_stake_micro: int,
    proven: Proven = UNKNOWN,
    bytes_per_second: int = params.LINK_BYTES_PER_SECOND,
) -> Refusal | None:
    """Why `ask` cannot serve `offer`, or None. now_ns: for the deadline. proven, bytes_per_second: how fast its peer
    and the link to it are known to be."""
    role = _role(offer)
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
    if refusal := refuse_device(offer, ask.device, ask.device_memory_bytes):
        return refusal
    if ask.memory_bytes < offer.memory_bytes:
        return Refusal("memory", f"allows {ask.memory_bytes >> 20} MiB, {offer.memory_bytes >> 20} MiB are needed")
    if ask.sandbox < needed:
        return Refusal("sandbox", f"has sandbox level {LEVELS[ask.sandbox]}, {LEVELS[needed]} is needed")
    takes_ns = work_ns(offer, ask, proven=proven, bytes_per_second=bytes_per_second)
    if refusal := refuse_time(offer, now_ns=now_ns, takes_ns=takes_ns):
        return refusal
    if price > offer.unit_price_max:
        return Refusal("price", f"asks {price} per Gop, limit {offer.unit_price_max}")
    if free_stake_micro < offer.lock_micro:
        return Refusal("stake", f"{free_stake_micro} of stake are free, {offer.lock_micro} are asked")
    return None


def work_ns(offer: Offer, ask: Ask, *, proven: Proven, bytes_per_second: int) -> int:
    """How long the work is believed to take at the speed that `ask` says, with all transfers."""
    run_ns = eta_ns(offer, ask.operations_per_second)
    return believed_ns(offer.operations, run_ns, proven) + transfer_ns(offer, bytes_per_second)


def _role(offer: Offer) -> int:
    return ROLE_VERIFIER if offer.mode == "profile" else ROLE_SOLVER


@dataclass(frozen=True)
class Columns:
    """What asks say, a row each. All of one length, of which the first rows are in use. Units as in `Ask`."""

    expires_ns: npt.NDArray[np.int64]
    unit_price: npt.NDArray[np.int64]
    memory_bytes: npt.NDArray[np.int64]
    device_memory_bytes: npt.NDArray[np.int64]
    operations_per_second: npt.NDArray[np.int64]
    roles: npt.NDArray[np.int8]
    sandbox: npt.NDArray[np.int8]
    device: npt.NDArray[np.int8]  # its place in DEVICES
    slot: npt.NDArray[np.int64]
    key_head: npt.NDArray[np.uint64]  # the first eight bytes of the peer's key: keys in order have theirs in order

    @classmethod
    def empty(cls, capacity: int) -> Columns:
        """Room for so many rows."""
        kinds = {"roles": np.int8, "sandbox": np.int8, "device": np.int8, "key_head": np.uint64}
        return cls(**{one.name: np.zeros(capacity, kinds.get(one.name, np.int64)) for one in fields(cls)})

    @property
    def capacity(self) -> int:
        """How many rows fit."""
        return len(self.expires_ns)

    def grown(self, capacity: int) -> Columns:
        """The same rows with room for more."""
        more = Columns.empty(capacity)
        for one in fields(self):
            getattr(more, one.name)[: self.capacity] = getattr(self, one.name)
        return more

    def write(self, row: int, ask: Ask) -> None:
        """Let `row` be of this ask."""
        self.expires_ns[row] = ask.expires_ns
        self.unit_price[row] = ask.unit_price
        self.memory_bytes[row] = ask.memory_bytes
        self.device_memory_bytes[row] = ask.device_memory_bytes
        self.operations_per_second[row] = ask.operations_per_second
        self.roles[row] = ask.roles
        self.sandbox[row] = ask.sandbox
        self.device[row] = DEVICES.index(ask.device)
        self.slot[row] = ask.slot
        self.key_head[row] = int.from_bytes(ask.peer[:8], "big")


def refused_rows(columns: Columns, size: int, offer: Offer, *, now_ns: int) -> list[tuple[str, npt.NDArray[np.bool_]]]:
    """For each reason of `refuse_ask`, in its order, which of the first `size` rows it holds for. Left out are those
    that a column does not tell: "self", "unreachable" and "stake"."""
    speed = columns.operations_per_second[:size]
    found = [("role", (columns.roles[:size] & _role(offer)) == 0)]
    if offer.device != "any":
        found.append(("device", columns.device[:size] != DEVICES.index(offer.device)))
    found.append(("vram", columns.device_memory_bytes[:size] < offer.device_memory_bytes))
    found.append(("memory", columns.memory_bytes[:size] < offer.memory_bytes))
    found.append(("sandbox", columns.sandbox[:size] < required_level(offer)))
    found.append(("too-long", speed <= _too_slow(offer, params.RUN_NS_MAX)))
    if offer.deadline_ns:
        found.append(("deadline", speed <= _too_slow(offer, offer.deadline_ns - now_ns)))
    found.append(("price", _too_dear(columns.unit_price[:size], speed, offer)))
    return found


def _too_slow(offer: Offer, left_ns: int) -> int:
    """The highest speed at which a stranger is too late; -1 if none is. `work_ns` > left, solved for the speed."""
    left_ns -= transfer_ns(offer, params.LINK_BYTES_PER_SECOND)
    if left_ns < 0 or believed_ns(offer.operations, 0, UNKNOWN) > left_ns:
        return _INT64_MAX
    # believed > left exactly where eta * permille // 1000 > left, where eta is at least this:
    late_ns = -(-(left_ns + 1) * 1000 // params.UNPROVEN_SLOWDOWN_PERMILLE)
    if offer.mode == "script":  # takes what it takes, at any speed
        return _INT64_MAX if offer.operations >= late_ns else -1
    # eta = operations * 10^9 // speed is at least `late` exactly where speed <= operations * 10^9 // late, for late
    # from 1 up; a speed of 0 counts as 1.
    limit = offer.operations * 10**9 // late_ns
    return min(limit, _INT64_MAX) if limit else -1


def _too_dear(prices: npt.NDArray[np.int64], speeds: npt.NDArray[np.int64], offer: Offer) -> npt.NDArray[np.bool_]:
    if offer.mode != "script":
        return prices > offer.unit_price_max
    # ceil(price * speed / 10^9) > limit exactly where price > limit * 10^9 // speed, which needs no more than 64 bits
    # for limits up to 9,200 credits; whoever pays more for a second is served by exact integers of any size.
    most = offer.unit_price_max * 10**9
    if most > _INT64_MAX:
        return np.array([p * s > most for p, s in zip(prices.tolist(), speeds.tolist(), strict=True)], np.bool_)
    dear: npt.NDArray[np.bool_] = (speeds > 0) & (prices > most // np.maximum(speeds, 1))
    return dear
