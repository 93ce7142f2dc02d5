"""What the house paid this peer, what is left for it today, and why it pays nothing now, as typed reasons. Sans-IO.

All of it follows from the settlement log and what this peer knows of itself: the house is not asked. On the house
itself it tells what was ordered, and why nothing is of whom.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from market.matching import Refusal
from market.newcomers import Newcomer, left_micro, refuse_newcomer
from peer.bidding import Bidder
from peer.desk import Desk
from peer.earnings import earnings_of
from peer.house import House
from peer.prover import Prover
from peer.reruns import DAY_NS
from peer.settler import Settler
from protocol.credits import credits_of
from protocol.house import AVAILABILITY_NS, part_of_house
from protocol.keys import peer_name
from protocol.records import ROLE_SOLVER, Agreement

__all__ = ["HouseView"]

_PARTS = ("available", "rerun")


@dataclass
class HouseView:
    """The verbs `house` and `house-want`."""

    desk: Desk
    settler: Settler
    house: House
    bidder: Bidder
    prover: Prover

    def want(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Opt in or, with `on` false, out; the answer is how it stands then."""
        self.house.want(bool(arguments.get("on", True)))
        return self.describe(arguments)

    def describe(self, _: dict[str, Any]) -> dict[str, Any]:
        """The terms, what was paid, what is left, and why nothing is paid. Money in micro-credits."""
        network = self.desk.network
        terms, reruns = network.house, network.reruns
        earned = dict.fromkeys(_PARTS, 0)
        for row in earnings_of(self.settler, self.desk.me):
            if row["role"] in earned:
                earned[row["role"]] += row["micro"]
        pays = {
            "available": self._part("available", terms.daily_micro if terms else 0, self._no_availability()),
            "rerun": self._part("rerun", reruns.daily_micro if reruns else 0, self._no_rerun()),
        }
        return {
            "house": peer_name(network.house_key) if terms else "",
            "me": network.house_key == self.desk.me,
            "on": not self.house.off,
            "terms": {**(asdict_of(terms) if terms else {}), "reruns": asdict_of(reruns) if reruns else {}},
            "pays": [{**pays[part], "part": part, "earned_micro": earned[part]} for part in _PARTS],
            "orders": self._orders(),
            "unpaid": self._unpaid(),
        }

    # --- money ---------------------------------------------------------------------------------------------
    def _agreed_today(self, part: str) -> list[tuple[Agreement, int]]:
        """The house's deals of today for one part, and what each cost or can still cost."""
        today, found = self.desk.wall_ns // DAY_NS, []
        for channel in self.settler.channels.values():
            terms = channel.agreement
            if terms.created_ns // DAY_NS == today and part_of_house(terms, self.desk.network) == part:
                found.append((terms, channel.paid_micro if channel.closed else terms.channel_micro))
        return found

    def _part(self, part: str, daily_micro: int, refusal: Refusal | None) -> dict[str, Any]:
        deals = self._agreed_today(part)
        spent = sum(micro for _, micro in deals)
        mine = sum(micro for terms, micro in deals if terms.solver == self.desk.me)
        reruns, left = self.desk.network.reruns, max(0, daily_micro - spent)
        if part == "rerun":
            left = left_micro(reruns, spent_micro=spent, spent_on_it_micro=mine) if reruns else 0
        return {
            "today_micro": mine,
            "today_all_micro": spent,
            "left_today_micro": 0 if self.desk.network.house_key == self.desk.me else left,
            "reason": asdict(refusal) if refusal is not None else None,
        }

    # --- why not -------------------------------------------------------------------------------------------
    def _no_house(self) -> Refusal | None:
        """What stands against both parts."""
        network = self.desk.network
        if not network.house_key:
            return Refusal("no-house", "the network file names no house")
        if network.house_key == self.desk.me:
            return Refusal("is-house", "this peer is the house: it pays")
        if self.house.off:
            return Refusal("house-off", "you want nothing of the house; `ichiba earn house --on`")
        if (resting := self.desk.resting()) is not None:
            return Refusal(*resting)
        if not self.desk.means.roles & ROLE_SOLVER:
            return Refusal("role", "this peer takes no work; `ichiba earn start --as solver,verifier,whistleblower`")
        if network.house_key not in self.desk.peers:
            return Refusal("away", "the house is not connected; `ichiba status`")
        return None

    def _no_availability(self) -> Refusal | None:
        if refusal := self._no_house():
            return refusal
        terms, deals = self.desk.network.house, self._agreed_today("available")
        assert terms is not None, "there is a house"
        hour = self.desk.wall_ns // AVAILABILITY_NS
        if any(d.solver == self.desk.me and d.created_ns // AVAILABILITY_NS == hour for d, _ in deals):
            return Refusal("paid", "this hour is paid")
        if sum(micro for _, micro in deals) >= terms.daily_micro:
            return Refusal("budget", f"the {credits_of(terms.daily_micro)} credits of the day are spent")
        if not self.bidder.slots_free():
            return Refusal("at-work", "who works is not challenged")
        return None

    def _no_rerun(self) -> Refusal | None:
        reruns = self.desk.network.reruns
        if refusal := self._no_house():
            return refusal
        if reruns is None:
            return Refusal("no-reruns", "the network file names no [reruns]: the house pays for availability alone")
        deals = self._agreed_today("rerun")
        one = Newcomer(
            history=self.settler.history(self.desk.me),
            stake_micro=self.settler.free_stake(self.desk.me),
            unit_price=self.bidder.pricer.price,
            proven=self._proven(),
            spent_micro=sum(micro for _, micro in deals),
            spent_on_it_micro=sum(micro for terms, micro in deals if terms.solver == self.desk.me),
        )
        least = self.desk.network.rules.checker_stake_min_micro
        if refusal := refuse_newcomer(one, reruns, stake_min_micro=least):
            return refusal
        return None if self.bidder.slots_free() else Refusal("at-work", "every slot of this peer is taken")

    def _proven(self) -> int:
        """Operations per second by this peer's card, if it was the house that timed it."""
        opened = self.prover.opened
        return self.prover.speed() if opened and opened.card.challenger == self.desk.network.house_key else 0

    # --- the house itself ----------------------------------------------------------------------------------
    def _orders(self) -> list[dict[str, Any]]:
        rows = sorted(self.house.reruns.rows.values(), key=lambda row: (row.ordered_ns, row.id))
        return [
            {
                "job": row.id.hex(), "peer": peer_name(row.peer), "source": row.source.hex(), "micro": row.micro,
                "ordered_ns": row.ordered_ns, "outcome": row.outcome or "open",
            }
            for row in rows
        ]  # fmt: skip

    def _unpaid(self) -> list[dict[str, Any]]:
        """Whom the house orders no re-run of, and why; with an empty peer why of nobody."""
        reruns = self.house.reruns
        rows = [{"peer": peer_name(peer), **asdict(refusal)} for peer, refusal in sorted(reruns.unpaid.items())]
        return ([{"peer": "", **asdict(reruns.lacking)}] if reruns.lacking is not None else []) + rows


def asdict_of(table: Any) -> dict[str, Any]:
    """The fields of a table of the network file."""
    return {name: getattr(table, name) for name in table.__struct_fields__}
