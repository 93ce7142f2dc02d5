"""Units of parallel jobs in a simulated swarm: what each computes is its own, whether it gets on depends on others.

A unit makes a segment once every unit that it shares a link with is at work on that segment, on the peer that its own
Launch names, or has made it before. What goes over a link has a hash that follows from its ends and the segment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from peer.events import Input, SegmentMade, StartWork, StepMade, UnitWaits, WorkEnded
from peer.run_events import LinkEnds, RunOrder
from peer.simulated_faults import SECOND
from peer.simulated_frauds import work_of
from protocol import params
from protocol.codec import blake
from protocol.stage import Link, Stage, links_in, links_out
from protocol.task import TaskSpec

if TYPE_CHECKING:
    from peer.simulator import SimulatedPeer, Simulation

__all__ = ["RunningUnit", "SimulatedUnits"]

_SEGMENT_NS = 2 * SECOND
_LOOK_NS = SECOND // 4


@dataclass
class RunningUnit:
    """A unit at work. segment: that it works on."""

    order: RunOrder
    stage: Stage
    segment: int
    last: int
    told_ns: int = 0
    failed: bool = False  # its worker is gone


@dataclass
class SimulatedUnits:
    """See the module docstring."""

    simulation: Simulation
    ends: dict[bytes, LinkEnds] = field(default_factory=dict)  # of each unit's checkpoint
    complaints: Counter[str] = field(default_factory=Counter)  # of the units of each peer: who slanders, of all in turn
    made: set[tuple[bytes, int, int]] = field(default_factory=set)  # run, unit, segment: what it sent is on its disk
    bad_tapes: set[bytes] = field(default_factory=set)

    def start(self, peer: SimulatedPeer, order: StartWork, root: bytes) -> None:
        """A worker of a launched unit begins, in the state with this root."""
        assert order.run is not None and isinstance(order.task, TaskSpec) and order.task.stage is not None
        stage = order.task.stage
        peer.units[order.work] = RunningUnit(order.run, stage, order.first_segment, order.last_segment)
        segments = range(order.first_segment, order.last_segment)
        every = work_of(order.task, segments, root, peer.lie if peer.liar else order.cheat, order.gauges)
        for index, (segment, (before, out)) in enumerate(zip(segments, every, strict=True)):
            blob = blake("sim/unit", out, stage.run, bytes([stage.unit, segment]))
            self.simulation.roots[blob] = out
            self.ends[blob] = self._ends(stage, segment, lies=peer.link_lie)
            if peer.bad_tape:
                self.bad_tapes.add(tape := blake("sim/bad-tape", self.ends[blob].tape))
                self.ends[blob] = replace(self.ends[blob], tape=tape)
            at = (index + 1) * _SEGMENT_NS
            first = order.task.steps_of(segment).start
            self.simulation.at(at - _SEGMENT_NS // 2, peer, StepMade(order.work, first, 1.0 / (1 + first)))
            made = SegmentMade(order.work, segment, before, out, (1.0 / (1 + segment),), 1, blob, 1000)
            self.simulation.at(at, peer, replace(made, ends=self.ends[blob]))
        self.simulation.at(len(segments) * _SEGMENT_NS + 1, peer, WorkEnded(order.work))

    def lacks(self, order: StartWork) -> bool:
        """Whether a tape that a checker's worker is given is no tape of its segment."""
        return not self.bad_tapes.isdisjoint(order.tapes)

    def relink(self, peer: SimulatedPeer, work: bytes, order: RunOrder) -> None:
        """A running unit's neighbours moved."""
        if work in peer.units:
            peer.units[work].order = order

    @staticmethod
    def _ends(stage: Stage, segment: int, *, lies: bool) -> LinkEnds:
        def row(flow: str, sender: int, receiver: int, *said: bytes) -> bytes:
            ends = bytes([segment, sender, receiver])
            return blake("sim/link", stage.run, flow.encode(), ends, *said)

        def joined(rows: Sequence[bytes]) -> bytes:
            return b"".join(rows)

        said = (b"a lie",) if lies else ()
        sent = joined([row(link.flow, stage.unit, link.other, *said) for link in links_out(stage)])
        received = joined([row(link.flow, link.other, stage.unit) for link in links_in(stage)])
        return LinkEnds(sent, received, blake("sim/tape", stage.run, bytes([stage.unit, segment])))

    def stalls(self, peer: SimulatedPeer, event: StepMade | SegmentMade | WorkEnded) -> bool:
        """Whether what a unit's worker would say now has to wait: for its own earlier segments, or its neighbours."""
        unit = peer.units.get(event.work)
        if unit is None:
            return False
        if unit.failed:
            return not (isinstance(event, WorkEnded) and event.error)
        again: Input = event
        segment = unit.segment
        if isinstance(event, WorkEnded):
            if event.error or segment >= unit.last:
                return False
        elif isinstance(event, StepMade):
            return event.step > 0 and bool(self._missing(unit))
        else:
            missing = self._missing(unit)
            if event.segment == segment and not missing and (bad := self._undecoded(peer, unit)) >= 0:
                unit.failed = True
                self.simulation.at(1, peer, WorkEnded(event.work, "bad-payload: it is no tensor", bad))
                return True
            if event.segment == segment and not missing:
                unit.segment += 1
                self.made.add((unit.order.run, unit.order.unit, segment))
                return False
            if missing and self.simulation.now_ns - unit.told_ns >= params.UNIT_WAIT_NS and event.segment == segment:
                unit.told_ns = self.simulation.now_ns
                self.simulation.at(1, peer, UnitWaits(event.work, missing))
        self.simulation.at(_LOOK_NS, peer, again)
        return True

    def _missing(self, unit: RunningUnit) -> tuple[int, ...]:
        """The neighbours that do not give a unit what it needs for its segment."""
        links: tuple[Link, ...] = links_in(unit.stage)
        return tuple(sorted({link.other for link in links if not self._gives(unit, link.other)}))

    def _undecoded(self, peer: SimulatedPeer, unit: RunningUnit) -> int:
        """The first neighbour whose tensors a unit cannot decode, or says so of; else -1."""
        others = sorted({link.other for link in links_in(unit.stage)})
        found = [o for o in others if peer.slanders or self.simulation.by_key[unit.order.peers[o]].garbles]
        if not found or not unit.segment:
            return -1
        self.complaints[peer.name] += 1
        return found[(self.complaints[peer.name] - 1) % len(found)]

    def _gives(self, unit: RunningUnit, other: int) -> bool:
        order = unit.order
        if (order.run, other, unit.segment) in self.made:
            return True
        peer = self.simulation.by_key[order.peers[other]]
        at_work = [u for work, u in peer.units.items() if work in peer.working and peer.node is not None]
        return any((u.order.run, u.order.unit) == (order.run, other) and u.segment >= unit.segment for u in at_work)
