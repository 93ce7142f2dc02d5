"""One submitter's round over all its open offers: no two of them ask for one solver's time, and the sum of scores is
small. What each bid is worth to each offer is market/matching.py's; who goes to whom is market/assignment.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from market.assignment import NEVER, assign
from market.matching import Choice, Proven, Scored, match_round
from market.reputation import Reputation
from market.round_columns import TAKEN, match_columns
from market.scoring import Bidders
from protocol import params
from protocol.records import Bid, Offer, amount_for

if TYPE_CHECKING:
    from market.audit import Known

__all__ = ["TAKEN", "Candidate", "Played", "Round", "match_offers"]


@dataclass(frozen=True)
class Candidate:
    """An open offer and what may answer it in this round."""

    offer_id: bytes
    offer: Offer
    bids: Sequence[tuple[bytes, Bid]]
    round_number: int
    excluded: Collection[bytes] = ()
    stake_min_micro: int = 0
    now_ns: int = 0
    packed: bytes = b""  # `pack_bid` of each of the bids; empty: it is made where it is needed


@dataclass(frozen=True)
class Played:
    """What a Round came to: the choice for each offer, by its id."""

    number: int
    choices: dict[bytes, Choice]


@dataclass(frozen=True)
class Round:
    """A round and all that it rests on, so that it can be played anywhere, and made again (market/audit.py).

    known: what the submitter knows of each who bids.
    """

    number: int
    candidates: tuple[Candidate, ...]
    known: Mapping[bytes, Known]

    @property
    def bids(self) -> int:
        """How many bids it weighs."""
        return sum(len(one.bids) for one in self.candidates)

    def play(self) -> Played:
        """Match the offers."""
        known = self.known
        choices = match_offers(
            self.candidates,
            free_stake_micro=lambda peer: known[peer].free_stake_micro,
            reputation_of=lambda peer: known[peer].reputation,
            reachable=lambda peer: known[peer].reachable,
            proven=lambda peer: known[peer].proven,
            link=lambda peer: known[peer].bytes_per_second,
            credit_micro=lambda peer: known[peer].credit_micro,
            bidders=known.keys(),
        )
        return Played(self.number, choices)


def match_offers(
    candidates: Sequence[Candidate],
    *,
    free_stake_micro: Callable[[bytes], int],
    reputation_of: Callable[[bytes], Reputation],
    reachable: Callable[[bytes], bool],
    proven: Callable[[bytes], Proven],
    link: Callable[[bytes], int] = lambda _: params.LINK_BYTES_PER_SECOND,
    credit_micro: Callable[[bytes], int] = lambda _: 0,
    bidders: Collection[bytes] | None = None,
) -> dict[bytes, Choice]:
    """The choice for each offer, by its id; the winners are distinct solvers.

    With one offer it is `match_round`. With more, offers that explore take their newcomer first, in the order of their
    ids, and the auction gives the others theirs; none of those is left with a worse bid than one that nobody took. That
    an offer rests costs twice its limit: a bid is always better. bidders: all who bid, where that is known.
    """
    if sum(len(one.bids) for one in candidates) >= params.ROUND_COLUMNS_MIN:
        known = Bidders.of(
            {bid.solver for one in candidates for _, bid in one.bids} if bidders is None else bidders,
            free_stake_micro=free_stake_micro,
            reputation_of=reputation_of,
            reachable=reachable,
            proven=proven,
            link=link,
        )
        if known is not None and (found := match_columns(candidates, known)) is not None:
            return found
    choices = {
        one.offer_id: match_round(
            one.offer,
            one.offer_id,
            one.bids,
            round_number=one.round_number,
            free_stake_micro=free_stake_micro,
            reputation_of=reputation_of,
            excluded=one.excluded,
            reachable=reachable,
            proven=proven,
            link=link,
            stake_min_micro=one.stake_min_micro,
            now_ns=one.now_ns,
            credit_micro=credit_micro,
        )
        for one in sorted(candidates, key=lambda one: one.offer_id)
    }
    wanted = [one for one in candidates if choices[one.offer_id].winner is not None]
    if len(wanted) < 2:
        return choices
    return {**choices, **_shared(sorted(wanted, key=lambda one: one.offer_id), choices)}


def _shared(wanted: Sequence[Candidate], choices: dict[bytes, Choice]) -> dict[bytes, Choice]:
    """The winners of offers that compete for the same solvers."""
    taken: dict[bytes, Scored] = {}  # by offer
    for one in wanted:
        winner = choices[one.offer_id].winner
        if winner and choices[one.offer_id].explored and winner.solver not in {s.solver for s in taken.values()}:
            taken[one.offer_id] = winner
    gone = {scored.solver for scored in taken.values()}
    rest = [one for one in wanted if one.offer_id not in taken]
    solvers = sorted({s.solver for one in rest for s in choices[one.offer_id].ranked} - gone)
    column = {solver: place for place, solver in enumerate(solvers)}
    costs = np.full((len(rest), len(solvers)), NEVER, np.int64)
    for row, one in enumerate(rest):
        for scored in choices[one.offer_id].ranked:
            if scored.solver in column:
                costs[row, column[scored.solver]] = min(scored.score_micro, NEVER - 1)
    reserves = np.array([2 * amount_for(o.offer.operations, o.offer.unit_price_max) + 1 for o in rest], np.int64)
    possible = np.where(costs < NEVER, costs, 0).max(axis=1, initial=0)
    for one, place in zip(rest, assign(costs, np.maximum(reserves, possible + 1)), strict=True):
        if place >= 0:
            by_solver = {s.solver: s for s in choices[one.offer_id].ranked}
            taken[one.offer_id] = by_solver[solvers[place]]
    _settle(rest, choices, taken)
    return {one.offer_id: _outcome(choices[one.offer_id], taken, one.offer_id) for one in wanted}


def _settle(rest: Sequence[Candidate], choices: dict[bytes, Choice], taken: dict[bytes, Scored]) -> None:
    """Give each offer a better solver that nobody took, while there is one: the auction is no finer than its step,
    which is much for the least of the offers. After this, who holds the bids can see that none was passed over for a
    worse one (market/audit.py). Each move lowers the sum, so it ends."""
    in_order = {one.offer_id: sorted(choices[one.offer_id].ranked, key=_rank) for one in rest}
    used = {scored.solver for scored in taken.values()}
    moved = True
    while moved:
        moved = False
        for offer_id, ranked in in_order.items():
            had = taken.get(offer_id)
            better = next((s for s in ranked if s == had or s.solver not in used), None)
            if better is not None and better != had:
                used.discard(had.solver if had is not None else b"")
                used.add(better.solver)
                taken[offer_id], moved = better, True


def _rank(scored: Scored) -> tuple[int, bytes]:
    return scored.score_micro, scored.bid_id


def _outcome(choice: Choice, taken: dict[bytes, Scored], offer_id: bytes) -> Choice:
    """The choice with its winner, and a reason for each better bid that another offer took."""
    winner = taken.get(offer_id)
    others = {scored.solver for other, scored in taken.items() if other != offer_id}
    passed = tuple((s.solver, TAKEN) for s in choice.ranked if s.solver in others)
    explored = choice.explored and winner == choice.winner
    return replace(choice, winner=winner, refused=(*choice.refused, *passed), explored=explored)
