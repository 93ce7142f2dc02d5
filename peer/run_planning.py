"""The verb `plan-run`: how the tensors of a parallel job had better travel, before it is cut for good and offered.

Codecs are part of the tasks, and tasks are what solvers bid on, so they are fixed before anybody bids. What can be
known by then is who asks for such work, how fast those peers are, and what both ends of their links reported: the units
are placed among them as they would be among bids (market/joint_placement.py), and the links of that placing decide
(market/run_choice.py). Where fewer ask than are needed, nobody is known for the rest. Sans-IO.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np

from market.joint_placement import Candidates, tries_of
from market.link_table import LinkTable
from market.matching import believed_ns
from market.placement_cost import Links
from market.placing import ChooseUnits, UnitsChosen
from market.run_choice import TOLERANCE, Weighed, choose, volume_of
from peer.bidding import Bidder
from peer.challenger import Challenger
from peer.control_verbs import PlanRun
from peer.desk import Desk
from peer.events import Reply
from peer.run_commands import BadArguments
from protocol import params
from protocol.errors import LimitExceeded, LocalProtocolError
from protocol.keys import peer_name
from protocol.records import ROLE_SOLVER, Ask, amount_for
from protocol.run_sizes import check_sizes

__all__ = ["RunPlanning"]

_HOUR_S: Final = 3600
_NOBODY: Final = b""
_DEVICES_MIN: Final = 32  # solvers that are looked at, the cheapest; of a large run as many as it has units


@dataclass(frozen=True)
class _Device:
    """Who may have a unit: seconds of a giga-operation, and its price in micro-credits."""

    peer: bytes
    giga_s: float
    unit_price: int


@dataclass(frozen=True)
class _Asked:
    """A question that is not answered yet."""

    token: int
    given: PlanRun
    devices: list[_Device]
    candidates: Candidates


@dataclass
class RunPlanning:
    """See the module docstring."""

    desk: Desk
    bidder: Bidder
    challenger: Challenger
    table: LinkTable
    asked: dict[int, _Asked] = field(default_factory=dict)  # what a thread chooses for, by number
    begun: int = 0

    def plan(self, token: int, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Choose, and say from what. None where that takes long: a thread chooses, and the Reply follows. Raises
        BadArguments, LimitExceeded."""
        try:
            given = msgspec.convert(arguments, PlanRun)
            check_sizes(given.sizes)
        except (msgspec.ValidationError, LocalProtocolError) as error:
            raise BadArguments(f"plan-run: {error}") from None
        sizes = given.sizes
        devices = self._devices(given)
        links = self._links([device.peer for device in devices])
        candidates = self._candidates(given, devices, links)
        self.begun += 1
        asked, effect = _Asked(token, given, devices, candidates), ChooseUnits(self.begun, candidates)
        if tries_of(sizes.stages * sizes.replicas, len(devices)) < params.PLACING_THREAD_MIN:
            return self._planned(asked, effect.play())
        if len(self.asked) >= params.PLANS_AWAITED_MAX:
            raise LimitExceeded(f"{params.PLANS_AWAITED_MAX} runs are being planned", next_step="ask again in a moment")
        self.asked[self.begun] = asked
        self.desk.add(effect)
        return None

    def on_chosen(self, event: UnitsChosen) -> None:
        """A thread has chosen: answer who asked."""
        asked = self.asked.pop(event.number, None)
        if asked is not None:  # else this is another process than the one that was asked, and so is who asked
            self.desk.add(Reply(asked.token, self._planned(asked, event)))

    def _planned(self, asked: _Asked, event: UnitsChosen) -> dict[str, Any]:
        sizes, devices, candidates, chosen = asked.given.sizes, asked.devices, asked.candidates, event.chosen
        table = candidates.table(chosen)
        giga_s = np.array([device.giga_s for device in devices])
        work = np.array(sizes.operations, np.float64) / 1e9 * giga_s[table].max(axis=1)
        known, used = self._known([[devices[at].peer for at in row] for row in table.tolist()])
        made = choose(sizes, work, candidates.paths(chosen), guessed=used > 0 and not known)
        return _told(made, known=known, used=used) | {
            "peers": [peer_name(devices[at].peer) if devices[at].peer else "" for at in chosen]
        }

    # --- who may have which unit ---------------------------------------------------------------------------
    def _devices(self, given: PlanRun) -> list[_Device]:
        """This peer, once for each unit that it keeps; the cheapest solvers that are connected; nobody, so often as
        solvers lack."""
        sizes, desk = given.sizes, self.desk
        kept, units = len(set(given.sizes.kept)) * sizes.replicas, sizes.stages * sizes.replicas
        shelf = desk.book.asks.shelf(
            role=ROLE_SOLVER, now_ns=desk.wall_ns, memory_bytes=given.memory_bytes, sandbox=given.sandbox,
            device=given.device, device_memory_bytes=given.device_memory_bytes, without=(desk.me,),
        )  # fmt: skip
        asks: dict[bytes, Ask] = {}
        for ask in shelf.cheapest(params.QUOTE_ASKS_MAX):
            if ask.peer in desk.peers and (not given.unit_price_max or ask.unit_price <= given.unit_price_max):
                asks.setdefault(ask.peer, ask)
        most = max(units - kept, _DEVICES_MIN)
        found = []
        for ask in list(asks.values())[:most]:
            said_ns = 10**18 // max(1, ask.operations_per_second)
            giga_ns = believed_ns(10**9, said_ns, self.challenger.speed_of(ask.peer))
            found.append(_Device(ask.peer, giga_ns / 1e9, ask.unit_price))
        own = _Device(desk.me, 1e9 / max(1, self.bidder.speed()), 0)
        usual = sorted(found, key=lambda device: (device.giga_s, device.peer))[len(found) // 2] if found else own
        price = max((device.unit_price for device in found), default=given.unit_price_max)
        lacking = max(0, units - kept - len(found))
        return [own] * kept + found + [_Device(_NOBODY, usual.giga_s, price)] * lacking

    def _candidates(self, given: PlanRun, devices: Sequence[_Device], links: Links) -> Candidates:
        sizes, usual = given.sizes, given.sizes.usual()
        kept, mine = set(sizes.kept), sum(device.peer == self.desk.me for device in devices)
        own, toll = iter(range(mine)), []
        for stage, operations in enumerate(sizes.operations):
            asked = {
                at: amount_for(operations * sizes.steps, device.unit_price)
                for at, device in enumerate(devices)
                if at >= mine
            }
            toll += [{next(own): 0} if stage in kept else asked for _ in range(sizes.replicas)]
        most = given.unit_price_max or max(device.unit_price for device in devices)
        step = sum(amount_for(operations, most) for operations in sizes.operations) * sizes.replicas
        return Candidates(
            stages=sizes.stages,
            replicas=sizes.replicas,
            toll=toll,
            links=links,
            volume=volume_of(sizes, usual.compressions, usual.share),
            work_s=[device.giga_s * max(sizes.operations) / 1e9 for device in devices],
            second_micro=step * sizes.steps**2 // _HOUR_S,  # as in a round of bids (peer/parallel.py)
        )

    def _links(self, peers: Sequence[bytes]) -> Links:
        """As they were reported, or usual; two units of one peer are as near as can be."""
        count = len(peers)
        delay, gbps = np.zeros((count, count)), np.full((count, count), params.LINK_SPEED_MAX * 8 / 1e9)
        for row in range(count):
            for column in range(row + 1, count):
                if peers[row] == peers[column] == self.desk.me:
                    continue
                word = self.table.link(peers[row], peers[column])
                delay[row, column] = delay[column, row] = word.delay_us / 1000
                gbps[row, column] = gbps[column, row] = word.bytes_per_second * 8 / 1e9
        return Links(delay, gbps)

    def _known(self, table: Sequence[Sequence[bytes]]) -> tuple[int, int]:
        """Of the links that a placing uses, how many have a known speed, and how many there are."""
        across = [pair for here, there in itertools.pairwise(table) for pair in zip(here, there, strict=True)]
        within = [(a, b) for row in table for i, a in enumerate(row) for b in row[i + 1 :]]
        used = [(a, b) for a, b in across + within if not a == b == self.desk.me]
        known = [self.table.link(a, b).speed_known for a, b in used if a != _NOBODY and b != _NOBODY]
        return sum(known), len(used)


def _told(made: Weighed, *, known: int, used: int) -> dict[str, Any]:
    """The answer. Seconds are modelled ones of a step."""

    def rounded(seconds: Sequence[float]) -> list[float]:
        return [round(one, 6) for one in seconds]

    return {
        "choice": msgspec.to_builtins(made.choice),
        "guessed": made.guessed,
        "links_known": known,
        "links_used": used,
        "step_s": round(made.time.total_s, 6),
        "compute_s": round(made.time.compute_s, 6),
        "borders_s": round(made.time.borders_s, 6),
        "exchange_s": round(made.time.exchange_s, 6),
        "quickest_s": round(made.quickest_s, 6),
        "tolerance_permille": round(1000 * TOLERANCE),
        "compressions_s": rounded(made.compressions),
        "shares_s": rounded(made.shares),
    }
