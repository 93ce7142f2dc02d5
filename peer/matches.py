"""The matches that this peer made, kept so that they can be made again (market/audit.py, `ichiba audit match`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from market.audit import Known, Match, note_match
from market.matching import Choice, Proven
from market.placing import Written
from market.reputation import DAY_NS
from market.rounds import Candidate
from peer.desk import Desk
from peer.settler import Settler
from protocol import params
from protocol.codec import blake, encode
from protocol.records import Agreement, open_record

__all__ = ["Matches"]


class Placed(msgspec.Struct):
    """A row of the store: a placing, and the proposals that it led to in the order of its units; b"" for a unit whose
    winner was no longer as it was when the round ended."""

    run: bytes
    now_ns: int
    deals: list[bytes]
    placing: bytes  # empty: it takes size_bytes, and limit_bytes are kept
    size_bytes: int = 0
    limit_bytes: int = 0


def not_kept(size_bytes: int, limit_bytes: int) -> str:
    """What people are told of a placing that is too large, and what they can do."""
    size, limit = (f"{each / 2**20:.1f} MiB" for each in (size_bytes, limit_bytes))
    return (
        f"a placing of its units is not kept for an audit: {size}, limit {limit}; for one that is, cut the run into "
        "fewer units, or lower its price limit, so that fewer solvers bid"
    )


@dataclass
class Matches:
    """Written before the proposal is sent; the oldest go when there are more than MATCHES_KEPT_MAX."""

    desk: Desk
    settler: Settler
    kept: dict[bytes, Match] = field(default_factory=dict)  # proposal -> how it came about
    placings: dict[bytes, Placed] = field(default_factory=dict)  # by their ids, the oldest first
    _noted: dict[bytes, Match] = field(default_factory=dict)  # offer -> of the round that runs

    def note(
        self,
        candidate: Candidate,
        choice: Choice,
        offer: bytes,
        offers: int,
        taken: Collection[bytes],
        facts: Mapping[bytes, Known],
        standing: Mapping[bytes, bytes],
    ) -> None:
        """A round found a winner for an offer; the proposal comes next. taken: the winners of the other offers. facts,
        standing: what was known of each bidder, and the envelopes of the bids, when the round began."""
        assert choice.winner is not None, "only a match is kept"
        envelopes = {i: e for i, _ in candidate.bids if (e := standing.get(i)) is not None}
        if choice.winner.bid_id not in envelopes:
            return
        known = []
        for solver in [bid.solver for bid_id, bid in candidate.bids if bid_id in envelopes]:
            excluded, gone = solver in candidate.excluded, solver in taken
            fact = facts[solver]
            known.append(msgspec.structs.replace(fact, excluded=excluded, taken=gone) if excluded or gone else fact)
        self._noted = {
            candidate.offer_id: note_match(candidate, choice, envelopes, offer=offer, known=known, offers=offers)
        }

    def gather(self, candidates: Iterable[Candidate], proven: Callable[[bytes], Proven]) -> dict[bytes, Known]:
        """What this peer knows now of each who bids on one of these offers."""
        return self.facts({bid.solver for one in candidates for _, bid in one.bids}, proven)

    def facts(self, solvers: Iterable[bytes], proven: Callable[[bytes], Proven]) -> dict[bytes, Known]:
        """What this peer knows now of each of these."""
        return {solver: self._known(solver, proven) for solver in sorted(solvers)}

    def _known(self, solver: bytes, proven: Callable[[bytes], Proven]) -> Known:
        history, speed, weighed = self.settler.history(solver), proven(solver), self.settler.reputation(solver)
        return Known(
            solver=solver,
            free_stake_micro=self.settler.free_stake(solver),
            right=history.right,
            wrong=history.wrong,
            streak=history.streak,
            grade=speed.grade,
            operations_per_second=speed.operations_per_second,
            bytes_per_second=self.desk.link_speed(solver),
            reachable=solver in self.desk.peers,
            excluded=False,
            taken=False,
            right_ppm=weighed.right_ppm,
            wrong_ppm=weighed.wrong_ppm,
            deals=weighed.deals,
            evidence_day=self.desk.wall_ns // DAY_NS,
            credit_micro=self.settler.credit.left_micro(creditor=solver, debtor=self.desk.me),
        )

    def proposed(self, deal_id: bytes, offer_id: bytes, agreement: bytes) -> None:
        """The match led to this proposal: journal it."""
        match = self._noted.pop(offer_id, None)
        if match is None:
            return
        while len(self.kept) >= params.MATCHES_KEPT_MAX:
            oldest = next(iter(self.kept))
            del self.kept[oldest]
            self.desk.save("matches", oldest, None)
        self.kept[deal_id] = msgspec.structs.replace(match, agreement=agreement)
        self.desk.save("matches", deal_id, self.kept[deal_id])

    def placed(self, run: bytes, now_ns: int, written: Written, deals: Sequence[bytes]) -> None:
        """A round of a run led to these proposals: journal it; where it is larger than a row may be, journal that."""
        while len(self.placings) >= params.PLACINGS_KEPT_MAX:
            oldest = next(iter(self.placings))
            del self.placings[oldest]
            self.desk.save("placings", oldest, None)
        key = blake("ichiba/placing", run, now_ns.to_bytes(8, "big"), *deals)
        limit = params.PLACING_BYTES_MAX
        self.placings[key] = Placed(run, now_ns, list(deals), written.data, written.size_bytes, limit)
        if not written.data:
            self.desk.emit("waiting", run, why=not_kept(written.size_bytes, limit))
        self.desk.save("placings", key, self.placings[key])

    def _told(self, one: Placed) -> dict[str, Any]:
        told: dict[str, Any] = {"deals": [i.hex() for i in one.deals], "placing": one.placing.hex()}
        if not one.placing:
            told |= {"not_kept": not_kept(one.size_bytes, one.limit_bytes)}
        return told

    def describe(self, deals: Collection[bytes], run: bytes = b"") -> dict[str, Any]:
        """The matches of these deals, and the placings of a run or of these deals as its units; in hex, as
        `market.audit.read_match` and `market.placing.read_placing` take them; of one that is not kept why."""
        placings = [one for one in self.placings.values() if one.run == run or set(one.deals) & set(deals)]
        return {
            "matches": [{"deal": i.hex(), "match": encode(self.kept[i]).hex()} for i in deals if i in self.kept],
            "placings": [self._told(one) for one in placings],
        }

    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """What was journalled; oldest proposals first."""
        found = [(key, msgspec.msgpack.decode(value, type=Match)) for key, value in rows("matches")]
        self.kept = dict(sorted(found, key=lambda row: self._made_ns(row[1])))
        placed = [(key, msgspec.msgpack.decode(value, type=Placed)) for key, value in rows("placings")]
        self.placings = dict(sorted(placed, key=lambda row: (row[1].now_ns, row[0])))

    def _made_ns(self, match: Match) -> int:
        agreement, _, _ = open_record(match.agreement, network=self.desk.network.id)
        assert isinstance(agreement, Agreement), "it was journalled with its proposal"
        return agreement.created_ns
