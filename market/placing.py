"""A round for the units of a run as it is written down: played anywhere, and made again from what is kept of it.

A round that awarded units is a Placing: the signed offers, bids and reports of links, and what the submitter knew
besides. From that anybody plays it again (`ichiba audit match`). As with a match (market/audit.py), the signed parts
prove themselves, and the facts beside them do not: they are named. Pure: refuses to know who asks.
"""

from __future__ import annotations

import lzma
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from market.audit import Known
from market.joint_placement import Candidates, choose_units
from market.link_table import LinkTable
from market.step_time import Volume
from market.unit_round import UnitBids, UnitRound, WeighedBid
from protocol import params
from protocol.codec import Digest, PeerKey, Uint, decode, encode
from protocol.errors import LimitExceeded, MalformedRecord, VerificationFailed
from protocol.link_report import LinkReport
from protocol.records import Bid, Offer, open_record

__all__ = [
    "ChooseUnits", "OpenUnit", "PlaceUnits", "Placing", "PlacingAudit", "UnitsChosen", "UnitsPlaced", "Written",
    "check_placing", "left_out_of", "read_placing",
]  # fmt: skip

_UNITS: Final = params.PARALLEL_UNITS_MAX
_PACKED: Final = b"ichiba/placing/xz:"  # then four bytes: how many bids were left out; then the rest, by lzma
_HEAD: Final = len(_PACKED) + 4
_MEMORY_MAX: Final = 64 * 2**20  # bytes that reading may take beside what is read
_WINDOW_MAX: Final = 16 * 2**20  # bytes: seven times that is what compressing takes


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


# --- as bytes ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Written:
    """A placing as it is kept. data: empty where it is larger than a row may be. size_bytes: what it takes, without the
    bids that could not have their unit where that is needed: left_out of them."""

    data: bytes
    size_bytes: int
    left_out: int = 0


def _packed(placing: Placing, *, left_out: int = 0) -> bytes:
    """As it is, where that fits in a row; else compressed."""
    plain = encode(placing)
    if len(plain) <= params.PLACING_BYTES_MAX and not left_out:
        return plain
    # Keys and ids come again thousands of times, far apart: a wide window matters, more effort than the least does not.
    window = min(_WINDOW_MAX, 1 << len(plain).bit_length())
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": window}]
    return _PACKED + left_out.to_bytes(4, "big") + lzma.compress(plain, check=lzma.CHECK_CRC32, filters=filters)


def left_out_of(data: bytes) -> int:
    """How many bids that could not have their unit are not in these bytes of a placing, for want of room."""
    return int.from_bytes(data[len(_PACKED) : _HEAD], "big") if data.startswith(_PACKED) else 0


def _unpacked(data: bytes) -> bytes:
    """What was packed: of at most params.PLACING_PLAIN_BYTES_MAX. Raises MalformedRecord, LimitExceeded."""
    most = params.PLACING_PLAIN_BYTES_MAX
    inflate = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY_MAX)
    try:
        plain = inflate.decompress(data[_HEAD:], max_length=most)
    except lzma.LZMAError as error:
        raise MalformedRecord(f"a packed placing that cannot be read: {error}") from None
    if not inflate.eof and len(plain) >= most:
        raise LimitExceeded(f"a packed placing of more than {most} bytes")
    if not inflate.eof or inflate.unused_data:
        raise MalformedRecord("a packed placing that is cut off, or has bytes behind its end")
    return plain


# --- played anywhere ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class UnitsPlaced:
    """What a PlaceUnits came to. round: the one that was played, with all that it reckoned. chosen: the bid of each
    unit; None where there is no full choice. written: how it is kept, where there is one."""

    number: int
    run: bytes
    round: UnitRound
    chosen: Mapping[int, WeighedBid] | None
    written: Written | None


@dataclass(frozen=True)
class PlaceUnits:
    """A round of a run and all that it is written down from. Nothing in it changes any more, so it can be played in
    another thread; who plays it is the only one that looks into `round` until its outcome is there.

    offers: envelopes, by unit; envelopes: of the bids, by id.
    """

    number: int
    run: bytes
    network: bytes
    round: UnitRound
    offers: Mapping[int, bytes]
    envelopes: Mapping[bytes, bytes]

    def play(self) -> UnitsPlaced:
        """Weigh the bids and place the units."""
        chosen = self.round.choose()
        written = None if chosen is None else self._written(chosen)
        return UnitsPlaced(self.number, self.run, self.round, chosen, written)

    def _written(self, chosen: Mapping[int, WeighedBid]) -> Written:
        """With every bid, so that others see why the refused could not win; where that does not fit, with those that
        could: the rest have no part in the choice."""
        data = _packed(self._placing(chosen, {bid_id for one in self.round.units.values() for bid_id, _ in one.bids}))
        left_out = 0
        if len(data) > params.PLACING_BYTES_MAX:
            able = {one.scored.bid_id for bids in self.round.scored.values() for one in bids.values()}
            left_out = sum(len(one.bids) for one in self.round.units.values()) - len(able)
            data = _packed(self._placing(chosen, able), left_out=left_out)
        return Written(data if len(data) <= params.PLACING_BYTES_MAX else b"", len(data), left_out)

    def _placing(self, chosen: Mapping[int, WeighedBid], kept: Collection[bytes]) -> Placing:
        """kept: the ids of the bids that are written down."""
        played, volume = self.round, self.round.volume
        there = self.envelopes.keys() & kept
        bids = {
            unit: [(bid_id, bid.solver) for bid_id, bid in sorted(one.bids) if bid_id in there]
            for unit, one in sorted(played.units.items())
        }
        bidders = {solver for here in bids.values() for _, solver in here}
        return Placing(
            network=self.network,
            run=self.run,
            stages=played.stages,
            replicas=played.replicas,
            micro_batches=volume.micro_batches,
            borders=tuple((int(ahead), int(back)) for ahead, back in volume.borders),
            shared=tuple(int(each) for each in volume.shared),
            every=volume.every,
            steps=played.steps,
            step_micro=played.step_micro,
            units=tuple(
                OpenUnit(
                    unit,
                    self.offers[unit],
                    tuple(self.envelopes[bid_id] for bid_id, _ in here),
                    tuple(sorted({solver for _, solver in here} & set(played.units[unit].excluded))),
                    chosen[unit].scored.bid_id,
                )
                for unit, here in bids.items()
            ),
            solvers=tuple(sorted(played.solvers.items())),
            known=tuple(fact for solver, fact in sorted(played.known.items()) if solver in bidders),
            reports=tuple(played.table.envelopes(played.rows)),
            now_ns=played.now_ns,
        )


@dataclass(frozen=True)
class UnitsChosen:
    """What a ChooseUnits came to: a device for each unit."""

    number: int
    chosen: list[int]


@dataclass(frozen=True)
class ChooseUnits:
    """Units to be placed among devices of which each may have some, with no bids yet."""

    number: int
    candidates: Candidates

    def play(self) -> UnitsChosen:
        """Place them."""
        chosen = choose_units(self.candidates)
        assert chosen is not None, "as many devices as units were found"
        return UnitsChosen(self.number, chosen)


# --- made again --------------------------------------------------------------------------------------------
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
    if len(data) > params.STORE_VALUE_BYTES_MAX:
        raise LimitExceeded(f"a placing of {len(data)} bytes, at most {params.STORE_VALUE_BYTES_MAX} are read")
    plain = _unpacked(data) if data.startswith(_PACKED) else data
    return decode(Placing, plain, bytes_max=params.PLACING_PLAIN_BYTES_MAX)


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
