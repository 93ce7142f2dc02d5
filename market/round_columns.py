"""A large round of one submitter, in columns: what market/rounds.py finds with records, found with arrays.

The same offers explore, the same auction runs over the same scores, and the same bids are settled for; a property test
holds the one against the other. Of each offer the best bids are kept in full, and those that other offers took.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from market.assignment import NEVER, assign
from market.matching import Choice, Refusal, refuse_bid, transfer_ns
from market.round_compiled import Rankings
from market.scoring import Answered, Bidders, Flags, Ints, Ranking, fits, pack_bid, rank_all
from protocol.records import amount_for

if TYPE_CHECKING:
    from market.rounds import Candidate

__all__ = ["RANKED_MAX", "TAKEN", "match_columns"]

RANKED_MAX: Final = 16
"""The bids of one offer that a large round tells in full."""
TAKEN: Final = Refusal("taken", "another offer of this peer takes this solver in this round")


@dataclass
class _Seat:
    """An offer, its ranking, its number among all, and the place in its ranking of the bid it has now; -1 for none."""

    candidate: Candidate
    ranking: Ranking
    number: int
    place: int = -1

    @property
    def solver(self) -> int:
        """The place among the Bidders of who has it."""
        return int(self.ranking.solvers[self.place])


def match_columns(candidates: Sequence[Candidate], known: Bidders) -> dict[bytes, Choice] | None:
    """The choice for each offer, by its id; None where columns cannot hold a term, or tell two bids apart."""
    ordered = sorted(candidates, key=lambda one: one.offer_id)
    if not all(fits(one.offer) for one in ordered):
        return None
    found = rank_all([_answered(one) for one in ordered], known)
    if found is None:
        return None
    rankings, together = found
    seats = [_Seat(one, ranking, place) for place, (one, ranking) in enumerate(zip(ordered, rankings, strict=True))]
    wanted = [seat for seat in seats if seat.ranking.rows.size]
    used = np.zeros(len(known.keys), np.bool_)
    rest = []
    for seat in wanted:
        first = max(0, seat.ranking.explored)
        if (seat.ranking.explored >= 0 or len(wanted) == 1) and not used[seat.ranking.solvers[first]]:
            seat.place = first
            used[seat.solver] = True
        else:
            rest.append(seat)
    _auction(rest, used, together)
    _settle(rest, used)
    return {seat.candidate.offer_id: _choice(seat, used, known) for seat in seats}


def _answered(one: Candidate) -> Answered:
    packed = one.packed or b"".join(pack_bid(*pair) for pair in one.bids)
    return Answered(
        one.offer, one.offer_id, packed, one.round_number, one.excluded, one.stake_min_micro, one.now_ns
    )


def _auction(rest: Sequence[_Seat], used: Flags, together: Rankings | None) -> None:
    """Each offer of `rest` goes to one of the solvers that are left, or rests."""
    numbers = np.array([seat.number for seat in rest], np.int64)
    present = _present(rest, len(used)) if together is None else together.present(numbers, len(used))
    places = np.flatnonzero(present & ~used)
    column = np.full(len(used), -1, np.int64)
    column[places] = np.arange(places.size)
    if together is None:
        costs, dearest = _costs(rest, column, places.size)
    else:
        costs, dearest = together.costs(numbers, column, places.size, NEVER)
    limits = [amount_for(seat.candidate.offer.operations, seat.candidate.offer.unit_price_max) for seat in rest]
    reserves = np.array([2 * limit + 1 for limit in limits], np.int64)
    for seat, chosen in zip(rest, assign(costs, np.maximum(reserves, dearest + 1)), strict=True):
        if chosen >= 0:
            seat.place = int(np.flatnonzero(seat.ranking.solvers == places[chosen])[0])
            used[seat.solver] = True


def _present(rest: Sequence[_Seat], bidders: int) -> Flags:
    present = np.zeros(bidders, np.bool_)
    for seat in rest:
        present[seat.ranking.solvers] = True
    return present


def _costs(rest: Sequence[_Seat], column: Ints, columns: int) -> tuple[Ints, Ints]:
    """The scores by column, and of each offer the largest: the last, for they are in order."""
    costs = np.full((len(rest), columns), NEVER, np.int64)
    dearest = np.zeros(len(rest), np.int64)
    for row, seat in enumerate(rest):
        at, scores = column[seat.ranking.solvers], np.minimum(seat.ranking.scores, NEVER - 1)
        if at.size and at.min() < 0:
            at, scores = at[free := at >= 0], scores[free]
        costs[row, at] = scores
        dearest[row] = scores[-1] if scores.size else 0
    return costs, dearest


def _settle(rest: Sequence[_Seat], used: Flags) -> None:
    """As market.rounds: a better solver that nobody took, while there is one."""
    moved = True
    while moved:
        moved = False
        for seat in rest:
            better = seat.ranking.solvers if seat.place < 0 else seat.ranking.solvers[: seat.place]
            taken = used[better]
            if taken.all():
                continue
            if seat.place >= 0:
                used[seat.solver] = False
            seat.place, moved = int(taken.argmin()), True
            used[seat.solver] = True


def _choice(seat: _Seat, used: Flags, known: Bidders) -> Choice:
    one, ranking = seat.candidate, seat.ranking
    shown = list(range(min(RANKED_MAX, ranking.rows.size)))
    if ranking.explored >= 0:
        shown = [ranking.explored, *(place for place in shown if place != ranking.explored)][:RANKED_MAX]
    # The winner is told once where it is among the best, and after them where it is not.
    places = shown if seat.place < 0 or seat.place in shown else [*shown, seat.place]
    at = np.array(places, np.intp)
    told = ranking.scored(at, one.offer, one.bids, known)
    refused = [_refusal(one, row, known) for row in ranking.refused.tolist()]
    taken = [
        (scored.solver, TAKEN)
        for scored, place, gone in zip(told, shown, used[ranking.solvers[at]].tolist(), strict=False)
        if gone and place != seat.place
    ]
    return Choice(
        told[places.index(seat.place)] if seat.place >= 0 else None,
        tuple(told[: len(shown)]),
        (*refused, *taken),
        0 <= ranking.explored == seat.place,
        ranking.rows.size - len(shown),
    )


def _refusal(one: Candidate, row: int, known: Bidders) -> tuple[bytes, Refusal]:
    """Why the bid in this row cannot win, in words."""
    offer, bid = one.offer, one.bids[row][1]
    place = known.place_of[bid.solver]
    run_ns = max(
        bid.eta_ns * int(known.slowdown[place]) // 1000,
        offer.operations * 10**9 // int(known.speeds[known.speed[place]]),
    )
    refusal = refuse_bid(
        offer,
        bid,
        free_stake_micro=int(known.free_stake_micro[place]),
        excluded=one.excluded,
        reachable=bool(known.reachable[place]),
        stake_min_micro=one.stake_min_micro,
        now_ns=one.now_ns,
        takes_ns=run_ns + transfer_ns(offer, int(known.links[known.link[place]])),
    )
    assert refusal is not None, "the columns refused it"
    return bid.solver, refusal
