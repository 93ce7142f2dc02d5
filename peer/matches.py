"""The matches that this peer made, kept so that they can be made again (market/audit.py, `ichiba audit match`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from market.audit import Known, Match, note_match
from market.matching import Choice, Proven
from market.reputation import DAY_NS
from market.rounds import Candidate
from peer.desk import Desk
from peer.settler import Settler
from protocol import params
from protocol.codec import encode
from protocol.records import Agreement, open_record

__all__ = ["Matches"]


@dataclass
class Matches:
    """Written before the proposal is sent; the oldest go when there are more than MATCHES_KEPT_MAX."""

    desk: Desk
    settler: Settler
    kept: dict[bytes, Match] = field(default_factory=dict)  # proposal -> how it came about
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
        solvers = {bid.solver for one in candidates for _, bid in one.bids}
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

    def describe(self, deals: Iterable[bytes]) -> dict[str, Any]:
        """The matches of these deals, in hex, as `market.audit.read_match` takes them."""
        return {"matches": [{"deal": i.hex(), "match": encode(self.kept[i]).hex()} for i in deals if i in self.kept]}

    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """What was journalled; oldest proposals first."""
        found = [(key, msgspec.msgpack.decode(value, type=Match)) for key, value in rows("matches")]
        self.kept = dict(sorted(found, key=lambda row: self._made_ns(row[1])))

    def _made_ns(self, match: Match) -> int:
        agreement, _, _ = open_record(match.agreement, network=self.desk.network.id)
        assert isinstance(agreement, Agreement), "it was journalled with its proposal"
        return agreement.created_ns
