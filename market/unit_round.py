"""One round for the units of a run that have no solver: every bid weighed, all units placed at once.

What a submitter plays in a round is all in one value (UnitRound). How it is written down, and played again by others,
is market/placing.py's. Pure: refuses to know who asks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from market.audit import Known
from market.joint_placement import Candidates, choose_units, fullest, tries_of
from market.link_table import LinkTable
from market.matching import Refusal, Scored, believed_ns, refuse_bid, transfer_ns
from market.placement_cost import Links
from market.step_time import Volume
from protocol import params
from protocol.records import Bid, Offer, amount_for

__all__ = ["UnitBids", "UnitRound", "WeighedBid"]

_HOUR_S: Final = 3600
_BIDS_A_TRY: Final = 10  # bids that are weighed in the time that one placement takes


@dataclass(frozen=True)
class UnitBids:
    """A unit without a solver: its offer, the bids that stand, and who may not have it."""

    offer_id: bytes
    offer: Offer
    bids: Sequence[tuple[bytes, Bid]]
    excluded: Collection[bytes]


@dataclass(frozen=True)
class WeighedBid:
    """A bid that may have a unit, and how long its solver would take for it, in ns."""

    scored: Scored
    bid: Bid
    run_ns: int

    @property
    def toll_micro(self) -> int:
        """What it asks, beside the time that it takes."""
        return self.scored.price_micro + self.scored.risk_micro + self.scored.transfer_micro


@dataclass(frozen=True)
class UnitRound:
    """All that a round is played from. units: by number, those without a solver; solvers: of the others. step_micro:
    what a step of the whole run costs at its price limits. known: what the submitter knows of each bidder."""

    stages: int
    replicas: int
    volume: Volume
    steps: int
    step_micro: int
    units: Mapping[int, UnitBids]
    solvers: Mapping[int, bytes]
    known: Mapping[bytes, Known]
    table: LinkTable
    now_ns: int

    @cached_property
    def _weighed(self) -> dict[int, tuple[dict[bytes, WeighedBid], tuple[Refusal, ...]]]:
        return {unit: self._weigh(bids) for unit, bids in sorted(self.units.items())}

    @cached_property
    def scored(self) -> dict[int, dict[bytes, WeighedBid]]:
        """Of each unit the bids that may have it, by solver."""
        return {unit: found for unit, (found, _) in self._weighed.items()}

    @cached_property
    def refused(self) -> dict[int, tuple[Refusal, ...]]:
        """Of each unit why the other bids may not."""
        return {unit: refused for unit, (_, refused) in self._weighed.items()}

    def _weigh(self, unit: UnitBids) -> tuple[dict[bytes, WeighedBid], tuple[Refusal, ...]]:
        offer, taken = unit.offer, set(self.solvers.values())
        found: dict[bytes, WeighedBid] = {}
        refused: list[Refusal] = []
        hour_micro = amount_for(offer.operations, offer.unit_price_max)
        for bid_id, bid in sorted(unit.bids):
            fact = self.known[bid.solver]
            run_ns = believed_ns(offer.operations, bid.eta_ns, fact.proven)
            moving_ns = transfer_ns(offer, fact.bytes_per_second)
            refusal = refuse_bid(
                offer, bid, free_stake_micro=fact.free_stake_micro, excluded=unit.excluded, reachable=fact.reachable,
                now_ns=self.now_ns, takes_ns=run_ns + moving_ns,
            )  # fmt: skip
            if refusal is None and bid.solver in taken:
                refusal = Refusal("taken", "it has another unit of this run")
            price = amount_for(offer.operations, bid.unit_price)
            if refusal is None and not price:
                refusal = Refusal("price", "at its price the unit comes to less than a micro-credit")
            if refusal is not None:
                refused.append(refusal)
                continue
            risk = price * (1_000_000 - fact.reputation.bound_ppm) // 1_000_000
            wait, moving = (hour_micro * each_ns // (_HOUR_S * 10**9) for each_ns in (run_ns, moving_ns))
            found[bid.solver] = WeighedBid(Scored(bid_id, bid.solver, price, risk, wait, moving), bid, run_ns)
        return found, tuple(refused)

    @cached_property
    def rows(self) -> list[bytes]:
        """The devices of the model: the bidders in order, then who has a unit already, once for each of its units."""
        bidders = sorted({peer for bids in self.scored.values() for peer in bids})
        return bidders + [solver for _, solver in sorted(self.solvers.items())]

    @cached_property
    def toll(self) -> list[dict[int, int]]:
        """As Candidates.toll: of each unit, the rows that may have it and what each asks."""
        place = {peer: row for row, peer in enumerate(self.rows[: len(self.rows) - len(self.solvers)])}
        found: list[dict[int, int]] = [{} for _ in range(self.stages * self.replicas)]
        for unit, bids in self.scored.items():
            found[unit] = {place[peer]: one.toll_micro for peer, one in bids.items()}
        for row, unit in enumerate(sorted(self.solvers), start=len(place)):
            found[unit] = {row: 0}
        return found

    @property
    def tries(self) -> int:
        """How many placements there are to look at, as far as that is known before anything is weighed: where they are
        few all, else each unit with each bidder. What a round takes grows with it."""
        bids = sum(len(one.bids) for one in self.units.values())
        bidders = len({bid.solver for one in self.units.values() for _, bid in one.bids})
        return max(tries_of(len(self.units), bidders), bids // _BIDS_A_TRY)

    @cached_property
    def given(self) -> list[int]:
        """A row for each unit, -1 where one is left over when each takes its own."""
        return fullest(self.toll)

    @cached_property
    def candidates(self) -> Candidates:
        """The problem of placing them all."""
        took = {peer: one.run_ns for bids in self.scored.values() for peer, one in bids.items()}
        return Candidates(
            stages=self.stages,
            replicas=self.replicas,
            toll=self.toll,
            links=self._links(),
            volume=self.volume,
            work_s=[took.get(peer, 0) / 1e9 / self.steps for peer in self.rows],
            second_micro=self.step_micro * self.steps**2 // _HOUR_S,  # of each step; an hour is worth what all costs
        )

    def choose(self) -> dict[int, WeighedBid] | None:
        """The bid that gets each of the open units; None while there is no full choice."""
        if -1 in self.given:
            return None
        chosen = choose_units(self.candidates)
        assert chosen is not None, "each unit can have a device of its own"
        return {unit: bids[self.rows[chosen[unit]]] for unit, bids in self.scored.items()}

    def cost_micro(self, chosen: Mapping[int, WeighedBid]) -> int:
        """What a choice costs by the rule."""
        given = {unit: row for unit, units in enumerate(self.toll) for row in units if unit in self.solvers}
        place = {peer: row for row, peer in enumerate(self.rows[: len(self.rows) - len(self.solvers)])}
        every = given | {unit: place[one.bid.solver] for unit, one in chosen.items()}
        return self.candidates.cost_micro([every[unit] for unit in range(self.stages * self.replicas)])

    def _links(self) -> Links:
        """The links between the devices of the model, as they were reported, or usual. Two of one peer are as near as
        can be."""
        found, places = self.table.matrices(self.rows), dict[bytes, list[int]]()
        for row, peer in enumerate(self.rows):
            places.setdefault(peer, []).append(row)
        for same in places.values():
            found.delay_ms[np.ix_(same, same)], found.gbps[np.ix_(same, same)] = 0.0, params.LINK_SPEED_MAX * 8 / 1e9
        return Links(found.delay_ms, found.gbps)
