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
from market.scoring import Bidders, Flags, Ranking, fits, pack_bid, rank
from protocol.records import amount_for

if TYPE_CHECKING:
    from market.rounds import Candidate

__all__ = ["RANKED_MAX", "TAKEN", "match_columns"]

RANKED_MAX: Final = 16
"""The bids of one offer that a large round tells in full."""
TAKEN: Final = Refusal("taken", "another offer of this peer takes this solver in this round")


@dataclass
class _Seat:
    """An offer, its ranking, and the place in it of the bid it has now; -1 for none."""

    candidate: Candidate
    ranking: Ranking
    place: int = -1

    @property
    def solver(self) -> int:
        """The place among the Bidders of who has it."""
        return int(self.ranking.solvers[self.place])


def match_columns(candidates: Sequence[Candidate], known: Bidders) -> dict[bytes, Choice] | None:
    """The choice for each offer, by its id; None where columns cannot hold a term, or tell two bids apart."""
    seats = []
    for one in sorted(candidates, key=lambda one: one.offer_id):
        ranking = _ranked(one, known) if fits(one.offer) else None
        if ranking is None:
            return None
        seats.append(_Seat(one, ranking))
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
    _auction(rest, used)
    _settle(rest, used)
    return {seat.candidate.offer_id: _choice(seat, used, known) for seat in seats}


def _ranked(one: Candidate, known: Bidders) -> Ranking | None:
    return rank(
        one.offer, one.offer_id, one.packed or b"".join(pack_bid(*pair) for pair in one.bids), known,
        round_number=one.round_number, excluded=one.excluded, stake_min_micro=one.stake_min_micro, now_ns=one.now_ns,
    )  # fmt: skip


def _auction(rest: Sequence[_Seat], used: Flags) -> None:
    """Each offer of `rest` goes to one of the solvers that are left, or rests."""
    present = np.zeros(len(used), np.bool_)
    for seat in rest:
        present[seat.ranking.solvers] = True
    places = np.flatnonzero(present & ~used)
    column = np.full(len(used), -1)
    column[places] = np.arange(places.size)
    costs = np.full((len(rest), places.size), NEVER, np.int64)
    dearest = np.zeros(len(rest), np.int64)  # of the bids on each offer that are left: the last, for they are in order
    for row, seat in enumerate(rest):
        at, scores = column[seat.ranking.solvers], np.minimum(seat.ranking.scores, NEVER - 1)
        if at.size and at.min() < 0:
            at, scores = at[free := at >= 0], scores[free]
        costs[row, at] = scores
        dearest[row] = scores[-1] if scores.size else 0
    limits = [amount_for(seat.candidate.offer.operations, seat.candidate.offer.unit_price_max) for seat in rest]
    reserves = np.array([2 * limit + 1 for limit in limits], np.int64)
    for seat, chosen in zip(rest, assign(costs, np.maximum(reserves, dearest + 1)), strict=True):
        if chosen >= 0:
            seat.place = int(np.flatnonzero(seat.ranking.solvers == places[chosen])[0])
            used[seat.solver] = True


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
    first = [ranking.explored] if ranking.explored >= 0 else []
    shown = [*first, *(place for place in range(min(RANKED_MAX, ranking.rows.size)) if place not in first)][:RANKED_MAX]
    # The winner is told once where it is among the best, and after them where it is not.
    places = shown if seat.place < 0 or seat.place in shown else [*shown, seat.place]
    told = dict(zip(places, ranking.scored(places, one.offer, one.bids, known), strict=True))
    refused = [_refusal(one, int(row), known) for row in ranking.refused]
    taken = [
        (told[place].solver, TAKEN)
        for place, gone in zip(shown, used[ranking.solvers[shown]].tolist(), strict=True)
        if gone and place != seat.place
    ]
    return Choice(
        told[seat.place] if seat.place >= 0 else None,
        tuple(told[place] for place in shown),
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
