"""One round for the units of a run that have no solver: every bid weighed, all units placed at once, and made again.

What a submitter plays in a round is all in one value (UnitRound), and a round that awarded units is written down as a
Placing: the signed offers, bids and reports of links, and what the submitter knew besides. From that anybody plays it
again (`ichiba audit match`). As with a match (market/audit.py), the signed parts prove themselves, and the facts beside
them do not: they are named. Pure: refuses to know who asks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Final

import msgspec
import numpy as np

from market.audit import Known
from market.joint_placement import Candidates, choose_units, fullest
from market.link_table import LinkTable
from market.matching import Refusal, Scored, believed_ns, refuse_bid, transfer_ns
from market.placement_cost import Links
from market.step_time import Volume
from protocol import params
from protocol.codec import Digest, PeerKey, Uint, decode
from protocol.errors import VerificationFailed
from protocol.link_report import LinkReport
from protocol.records import Bid, Offer, amount_for, open_record

__all__ = [
    "OpenUnit", "Placing", "PlacingAudit", "UnitBids", "UnitRound", "WeighedBid", "check_placing", "read_placing",
]  # fmt: skip

_HOUR_S: Final = 3600
_UNITS: Final = params.PARALLEL_UNITS_MAX


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
        if -1 in fullest(self.toll):
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


# --- written down ------------------------------------------------------------------------------------------
class OpenUnit(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A unit that was awarded: envelopes of its offer and of every bid, who might not have it, the id of the bid that
    got it."""

    unit: Annotated[int, msgspec.Meta(ge=0, lt=_UNITS)]
    offer: bytes
    bids: Annotated[tuple[bytes, ...], msgspec.Meta(max_length=params.BOOK_BIDS_PER_OFFER_MAX)]
    excluded: Annotated[tuple[PeerKey, ...], msgspec.Meta(max_length=params.BOOK_BIDS_PER_OFFER_MAX)]
    winner: Digest


class Placing(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """One round that awarded units. solvers: of the other units, by number. borders, shared: as in `submit-run`. every:
    the steps between two exchanges. reports: envelopes of the reports of links that counted."""

    network: Digest
    run: Digest
    stages: Annotated[int, msgspec.Meta(ge=1, le=_UNITS)]
    replicas: Annotated[int, msgspec.Meta(ge=1, le=_UNITS)]
    micro_batches: Annotated[int, msgspec.Meta(ge=1, le=params.MICRO_BATCHES_MAX)]
    borders: Annotated[tuple[tuple[Uint, Uint], ...], msgspec.Meta(max_length=_UNITS)]
    shared: Annotated[tuple[Uint, ...], msgspec.Meta(max_length=_UNITS)]
    every: Annotated[int, msgspec.Meta(ge=1, le=2**40)]
    steps: Annotated[int, msgspec.Meta(ge=1, le=2**40)]
    step_micro: Uint
    units: Annotated[tuple[OpenUnit, ...], msgspec.Meta(min_length=1, max_length=_UNITS)]
    solvers: Annotated[tuple[tuple[int, PeerKey], ...], msgspec.Meta(max_length=_UNITS)]
    known: Annotated[tuple[Known, ...], msgspec.Meta(max_length=_UNITS * params.BOOK_BIDS_PER_OFFER_MAX)]
    reports: Annotated[tuple[bytes, ...], msgspec.Meta(max_length=params.LINK_REPORTS_MAX)]
    now_ns: Uint


@dataclass(frozen=True)
class PlacingAudit:
    """A placing made again. chosen: the bid of each unit, as it was awarded. cost_micro: what that costs by the rule;
    best_micro: what the rule finds."""

    round: UnitRound
    chosen: dict[int, WeighedBid]
    cost_micro: int
    best_micro: int


def read_placing(data: bytes) -> Placing:
    """A placing from a file. Raises MalformedRecord, LimitExceeded."""
    return decode(Placing, data, bytes_max=params.STORE_VALUE_BYTES_MAX)


def check_placing(placing: Placing) -> PlacingAudit:
    """Play it again. Raises VerificationFailed where a signature, a record or a number does not fit, or where the units
    went to dearer bids than the rule finds.

    The model's seconds are float64 and may differ in the last digit from machine to machine, so a millionth of the cost
    is let pass.
    """
    played = _played(placing)
    chosen = {}
    for one in placing.units:
        found = {w.scored.bid_id: w for w in played.scored[one.unit].values()}
        if one.winner not in found:
            why = "; ".join(sorted({r.why for r in played.refused[one.unit]}))
            raise VerificationFailed(f"the bid that got unit {one.unit} could not have it", why=why)
        chosen[one.unit] = found[one.winner]
    if len({one.bid.solver for one in chosen.values()}) < len(chosen):
        raise VerificationFailed("two units of one run went to one solver")
    best = played.choose()
    assert best is not None, "there is a choice: the one that was made"
    cost, least = played.cost_micro(chosen), played.cost_micro(best)
    if cost > least + least // 1_000_000 + 1:
        moved = ", ".join(f"unit {u} to {w.bid.solver.hex()[:12]}" for u, w in sorted(best.items()) if chosen[u] != w)
        raise VerificationFailed(
            f"the rule gives {moved}, which comes to {least} micro-credits", why=f"what was awarded comes to {cost}"
        )
    return PlacingAudit(played, chosen, cost, least)


def _played(placing: Placing) -> UnitRound:
    """The round, from records that are right. Raises VerificationFailed."""
    count = placing.stages * placing.replicas
    numbers = [one.unit for one in placing.units] + [unit for unit, _ in placing.solvers]
    if sorted(numbers) != list(range(count)) or len(placing.borders) != placing.stages - 1:
        raise VerificationFailed(f"units {numbers} and {len(placing.borders)} borders of {placing.stages} stages")
    if placing.shared and len(placing.shared) != placing.stages:
        raise VerificationFailed(f"{len(placing.shared)} of {placing.stages} stages share")
    known = {one.solver: one for one in placing.known}
    units = {one.unit: _bids_of(placing, one) for one in placing.units}
    bidders = {bid.solver for one in units.values() for _, bid in one.bids}
    if bidders - set(known) or len(known) != len(placing.known):
        raise VerificationFailed("no facts, or two, about a bidder")
    submitters = {one.offer.submitter for one in units.values()}
    if len(submitters) != 1:
        raise VerificationFailed("offers of several submitters in one placing")
    table = LinkTable()
    for envelope in placing.reports:
        report, _, signers = open_record(envelope, network=placing.network)
        if not isinstance(report, LinkReport) or signers != {report.peer}:
            raise VerificationFailed("a report of links is not signed by its peer")
        table.take(report, now_ns=placing.now_ns)
    return UnitRound(
        stages=placing.stages,
        replicas=placing.replicas,
        volume=Volume(placing.micro_batches, placing.borders, placing.shared, placing.every),
        steps=placing.steps,
        step_micro=placing.step_micro,
        units=units,
        solvers=dict(placing.solvers),
        known=known,
        table=table,
        now_ns=placing.now_ns,
    )


def _bids_of(placing: Placing, one: OpenUnit) -> UnitBids:
    offer, offer_id, signers = open_record(one.offer, network=placing.network)
    if not isinstance(offer, Offer) or signers != {offer.submitter}:
        raise VerificationFailed(f"the offer of unit {one.unit} is not signed by its submitter")
    found: dict[bytes, Bid] = {}
    for envelope in one.bids:
        bid, bid_id, signers = open_record(envelope, network=placing.network)
        if not isinstance(bid, Bid) or signers != {bid.solver}:
            raise VerificationFailed(f"a bid on unit {one.unit} is not signed by its solver")
        if bid.offer != offer_id:
            raise VerificationFailed(f"a bid on unit {one.unit} is on another offer")
        found[bid_id] = bid
    return UnitBids(offer_id, offer, sorted(found.items()), set(one.excluded))
