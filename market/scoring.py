"""The rule of market/matching.py over columns: all bids of a large round scored and ranked at once, in integers.

It promises what `match_round` finds bid by bid, to the last micro-credit; a property test holds the two against each
other. It knows the terms for which 64 bits are enough (`fits`), and scores no others. What nobody looks at is not made:
of each offer the best bids are told in full, the others counted.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from market.feasibility import DEVICES
from market.matching import HOUR_NS, SLOWDOWN, Proven, Scored, draws_newcomer, required_level, transfer_bytes
from market.reputation import Reputation
from market.round_compiled import Asked, Known, Rankings, Small
from protocol import params
from protocol.records import Bid, Offer, amount_for

__all__ = ["Answered", "Bidders", "Ranking", "fits", "pack_bid", "rank_all"]

_ROW: Final = struct.Struct("<QQ7q")
_FIELDS: Final = _ROW.size // 8
_SPEED_MAX: Final = 2**53  # operations or bytes per second: a thousand times what there is
_PRICE_MAX: Final = 2**33  # micro-credits per giga-operation: 8,600 credits
_AMOUNT_MAX: Final = 2**41  # micro-credits: two million credits
_LONG_NS: Final = 2**60  # 36 years stand for all that is longer: what is above params.RUN_NS_MAX is refused alike
_INT64_MAX: Final = 2**63 - 1

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def pack_bid(bid_id: bytes, bid: Bid) -> bytes:
    """What `rank_all` reads of a bid, made once when it comes: a row of 72 bytes."""
    return _ROW.pack(
        int.from_bytes(bid_id[:8], "big"), int.from_bytes(bid.solver[:8], "big"), bid.unit_price, bid.operations_cap,
        bid.lock_micro, bid.eta_ns, bid.sandbox, DEVICES.index(bid.device), bid.device_memory_bytes,
    )  # fmt: skip


def fits(offer: Offer) -> bool:
    """Whether columns can hold this offer: 64 bits are enough for all its scores, and it is not on credit."""
    amount = amount_for(offer.operations, offer.unit_price_max)
    return (
        offer.budget_micro > 0 and offer.unit_price_max < _PRICE_MAX and amount < _AMOUNT_MAX
        and max(offer.operations, transfer_bytes(offer)) <= _INT64_MAX
    )  # fmt: skip


@dataclass(frozen=True)
class Bidders:
    """What a submitter knows of all who bid in a round, in order of their keys. Units as in `match_round`."""

    keys: list[bytes]
    heads: npt.NDArray[np.uint64]  # the first eight bytes of each key
    free_stake_micro: Ints
    doubt_ppm: Ints  # the chance that it does not deliver
    newcomer: Flags
    reachable: Flags
    slowdown: Ints  # permille
    speeds: Ints  # the distinct speeds there are, in operations per second
    speed: Ints  # the place of each one's among them
    links: Ints  # likewise, in bytes per second
    link: Ints

    @classmethod
    def of(
        cls,
        solvers: Collection[bytes],
        *,
        free_stake_micro: Callable[[bytes], int],
        reputation_of: Callable[[bytes], Reputation],
        reachable: Callable[[bytes], bool],
        proven: Callable[[bytes], Proven],
        link: Callable[[bytes], int],
    ) -> Bidders | None:
        """None where a column cannot tell them apart or hold what is known of them."""
        keys = sorted(solvers)
        heads = np.array([int.from_bytes(key[:8], "big") for key in keys], np.uint64)
        speeds, reputations = [proven(key) for key in keys], [reputation_of(key) for key in keys]
        fastest = [one.fastest for one in speeds]
        if (heads[1:] == heads[:-1]).any() or max(fastest, default=0) > _SPEED_MAX:
            return None
        # Most are strangers, and strangers are alike: what follows from a speed is reckoned once for all that have it.
        distinct, speed = np.unique(np.array(fastest, np.int64), return_inverse=True)
        links, at = np.unique([min(max(1, link(key)), _SPEED_MAX) for key in keys], return_inverse=True)
        return cls(
            keys,
            heads,
            np.array([min(free_stake_micro(key), _INT64_MAX) for key in keys], np.int64),
            np.array([1_000_000 - one.bound_ppm for one in reputations], np.int64),
            np.array([one.deals < params.NEWCOMER_DEALS for one in reputations], np.bool_),
            np.array([reachable(key) for key in keys], np.bool_),
            np.array([SLOWDOWN[one.grade] for one in speeds], np.int64),
            distinct,
            speed,
            links.astype(np.int64),
            at,
        )

    @cached_property
    def place_of(self) -> dict[bytes, int]:
        """Where each stands."""
        return {key: place for place, key in enumerate(self.keys)}

    @cached_property
    def compiled(self) -> Known | None:
        """The same for compiled scoring, where there is any."""
        columns = (self.free_stake_micro, self.doubt_ppm, self.slowdown, self.speed, self.link)
        return Known.of(self.heads, columns, self.speeds, self.links)

    @cached_property
    def lists(self) -> tuple[list[int], list[int]]:
        """The doubt and the place of the link of each, for one bid after the other."""
        return self.doubt_ppm.tolist(), self.link.tolist()


@dataclass
class Ranking:
    """The bids on one offer. rows: places of the feasible ones among its bids, best first by score and id; solvers: the
    place of each one's solver among the Bidders. transfer_micro: by place of a link. refused: places of the others.
    explored: the place in `rows` of a newcomer that goes first in this round, -1 for none."""

    rows: Ints | Small
    solvers: Ints | Small
    scores: Ints
    transfer_micro: Ints
    refused: Ints | Small
    explored: int = -1

    def scored(
        self, places: npt.NDArray[np.intp], offer: Offer, bids: Sequence[tuple[bytes, Bid]], bidders: Bidders
    ) -> list[Scored]:
        """The bids at these places of the ranking, in full: the wait is what is left of the score."""
        doubts, links = bidders.lists
        transfers, found = self.transfer_micro.tolist(), []
        columns = (column[places].tolist() for column in (self.rows, self.solvers, self.scores))
        for row, who, score in zip(*columns, strict=True):
            bid_id, bid = bids[row]
            price, transfer = amount_for(offer.operations, bid.unit_price), transfers[links[who]]
            risk = price * doubts[who] // 1_000_000
            found.append(Scored(bid_id, bid.solver, price, risk, score - price - risk - transfer, transfer))
        return found


@dataclass(frozen=True)
class Answered:
    """An offer and the bids on it, packed, and what `match_round` is told beside them."""

    offer: Offer
    offer_id: bytes
    packed: bytes
    round_number: int
    excluded: Collection[bytes]
    stake_min_micro: int
    now_ns: int


def rank_all(answered: Sequence[Answered], bidders: Bidders) -> tuple[list[Ranking], Rankings | None] | None:
    """The bids on each offer, best first; None where their ids cannot be told apart by their heads. Needs `fits`. Where
    scoring is compiled, all at once, and also as it came."""
    whole = None
    if bidders.compiled is None:
        found = [_rank_columns(one, bidders, *_bounds(one, bidders)) for one in answered]
    else:
        whole = bidders.compiled.rank([_asked(one, *_bounds(one, bidders)) for one in answered])
        found = [Ranking(*whole.of(number)) for number in range(len(answered))] if whole.whole else [None]
    rankings = [ranking for ranking in found if ranking is not None]
    if len(rankings) < len(answered):
        return None
    for one, ranking in zip(answered, rankings, strict=True):
        if draws_newcomer(one.offer_id, one.round_number):
            new = np.flatnonzero(bidders.newcomer[ranking.solvers])
            ranking.explored = int(new[0]) if new.size else -1
    return rankings, whole


def _bounds(one: Answered, bidders: Bidders) -> tuple[Flags, int]:
    """Which of the bidders may have it at all, and how long it may take, in ns."""
    longest_ns = params.RUN_NS_MAX
    if one.offer.deadline_ns:
        longest_ns = min(longest_ns, one.offer.deadline_ns - one.now_ns)
    may = bidders.reachable
    if out := {*one.excluded, one.offer.submitter} & bidders.place_of.keys():
        may = may.copy()
        may[[bidders.place_of[key] for key in out]] = False
    return may, longest_ns


def _asked(one: Answered, may: Flags, longest_ns: int) -> Asked:
    offer = one.offer
    terms = (
        offer.unit_price_max, offer.operations, transfer_bytes(offer), required_level(offer),
        offer.device_memory_bytes, longest_ns, offer.lock_micro, min(max(0, one.stake_min_micro), _INT64_MAX),
        -1 if offer.device == "any" else DEVICES.index(offer.device), *divmod(offer.operations, 10**9),
        amount_for(offer.operations, offer.unit_price_max), _LONG_NS,
    )  # fmt: skip
    return Asked(terms, one.packed, len(one.packed) // _ROW.size, may)


def _rank_columns(one: Answered, bidders: Bidders, may: Flags, longest_ns: int) -> Ranking | None:
    offer, packed, stake_min_micro = one.offer, one.packed, max(0, one.stake_min_micro)
    rows = np.ascontiguousarray(np.frombuffer(packed, "<i8").reshape(-1, _FIELDS).T)
    heads, solver_heads = rows[0].view(np.uint64), rows[1].view(np.uint64)
    unit_price, cap, lock, eta, sandbox, device, vram = rows[2:]
    who = np.searchsorted(bidders.heads, solver_heads)
    run_ns = np.maximum(
        _permille(np.minimum(eta, _LONG_NS), bidders.slowdown[who]),
        _nano_over(offer.operations, bidders.speeds)[bidders.speed[who]],
    )
    moving_ns = _nano_over(transfer_bytes(offer), bidders.links)
    takes_ns = run_ns + moving_ns[bidders.link[who]]
    stake = bidders.free_stake_micro[who]
    refused = (
        ~may[who] | (unit_price > offer.unit_price_max) | (cap < offer.operations)
        | (sandbox < required_level(offer)) | (vram < offer.device_memory_bytes) | (takes_ns > longest_ns)
        | (lock < offer.lock_micro) | (stake < stake_min_micro) | (lock > stake)
    )  # fmt: skip
    if offer.device != "any":
        refused |= device != DEVICES.index(offer.device)
    able = np.flatnonzero(~refused)
    price = _amounts(offer.operations, unit_price[able])
    risk = price * bidders.doubt_ppm[who[able]] // 1_000_000
    hour_micro = amount_for(offer.operations, offer.unit_price_max)
    transfer = _hourly(hour_micro, np.minimum(moving_ns, params.RUN_NS_MAX))
    scores = price + risk + _hourly(hour_micro, run_ns[able]) + transfer[bidders.link[who[able]]]
    order = np.argsort(scores)
    if (np.diff(scores[order]) == 0).any():  # ties go to the smaller id
        order = np.lexsort((heads[able], scores))
        tied = order[np.flatnonzero(np.diff(scores[order]) == 0)[:, None] + [0, 1]]
        if (heads[able[tied[:, 0]]] == heads[able[tied[:, 1]]]).any():
            return None
    able, scores = able[order], scores[order]
    return Ranking(able, who[able], scores, transfer, np.flatnonzero(refused))


def _permille(values: Ints, permille: Ints) -> Ints:
    """values * permille // 1000, for values up to _LONG_NS and permille up to 4,000."""
    whole = values // 1000
    return whole * permille + (values - whole * 1000) * permille // 1000


def _nano_over(count: int, per_second: Ints) -> Ints:
    """count * 10^9 // per_second, in three steps of a thousand; where it is more than _LONG_NS, at least about that.

    per_second: from 1 to _SPEED_MAX, so that a rest times a thousand fits.
    """
    per_second = np.maximum(per_second, min(_SPEED_MAX, count * 10**9 // _LONG_NS))
    quotient = count // per_second
    rest = count - quotient * per_second
    for _ in range(3):
        rest *= 1000
        digits = rest // per_second
        rest -= digits * per_second
        quotient = quotient * 1000 + digits
    return quotient


def _amounts(operations: int, unit_prices: Ints) -> Ints:
    """`amount_for` of each price up to the offer's limit."""
    giga, rest = divmod(operations, 10**9)
    return giga * unit_prices + rest * unit_prices // 10**9


def _hourly(amount: int, spans_ns: Ints) -> Ints:
    """amount * span // an hour, for an amount below _AMOUNT_MAX (2^41) and spans up to params.RUN_NS_MAX.

    An hour is below 2^42 ns, so the amount is taken in two parts of 21 and 20 bits, each of whose products fits.
    """
    hours = spans_ns // HOUR_NS
    rest = spans_ns - hours * HOUR_NS
    high, low = amount >> 20, amount & (2**20 - 1)
    product = high * rest
    quotient = product // HOUR_NS
    carried = ((product - quotient * HOUR_NS) << 20) + low * rest
    found: Ints = amount * hours + (quotient << 20) + carried // HOUR_NS
    return found
