"""The units of parallel jobs that this peer runs: where their neighbours are, what was handed over at their borders.

A unit starts when it is launched. At the end of a segment the peer signs, for each neighbour, what it sent
(protocol/handover.py), and waits for the like of each link into its unit: a receipt goes out only with signatures for
all that it says was received. Sans-IO; used by peer/solver.py, and by peer/runs.py for the units a submitter keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

from peer.deals import Deal, task_of
from peer.desk import Desk
from peer.messages import ReceiptOffer
from peer.receipt_rows import Rows
from peer.run_events import LinkEnds, Relink, RunOrder, Settled
from peer.run_messages import HandoverAsk, HandoverGiven, Launch
from protocol import params
from protocol.errors import RemoteProtocolError, VerificationFailed
from protocol.handover import Handover, check_handover, hand_over, open_handover
from protocol.stage import Link, Stage, links_in, links_out
from protocol.task import TaskSpec

__all__ = ["Complaint", "Delivered", "Seat", "Units", "faults_of", "row_of", "stage_of"]

_SEATS, _HANDED = "seats", "handed"
_SEGMENTS_AHEAD = 2  # a neighbour is at most about a step ahead: handovers of later segments are not kept


def stage_of(encoded: bytes) -> Stage | None:
    """Of an encoded task that was checked when it came in: its place, if it is a unit of a run."""
    task = task_of(encoded)
    return task.stage if isinstance(task, TaskSpec) else None


def row_of(rows: bytes, links: tuple[Link, ...], link: Link) -> bytes:
    """The 32 bytes of one link in a state SENT or RECEIVED."""
    return LinkEnds.row(rows, links.index(link))


class Seat(msgspec.Struct, kw_only=True):
    """A unit that is launched here. `work` is its deal, or at a submitter that keeps it its job. stage: its place,
    without its crossings. ended: the number of segments that ended here, from the first of the task on."""

    work: bytes
    run: bytes
    unit: int
    epoch: int
    peers: list[bytes]
    since: list[int]
    stage: Stage
    ended: int = 0


class Complaint(NamedTuple):
    """Why a unit hands in no receipt of a segment: what came from the unit of that number, then at that peer."""

    unit: int
    peer: bytes
    what: Literal["differs", "no-tensor"]


@dataclass(frozen=True)
class Delivered:
    """A unit's segment that waits for those of the others. offer: of a solver; a unit that is kept has none."""

    root: bytes
    blob: bytes
    ends: LinkEnds
    handovers: tuple[bytes, ...]
    deal: bytes = b""
    offer: ReceiptOffer | None = None


def faults_of(
    here: Mapping[int, Delivered], stages: Sequence[Stage], peers: Sequence[bytes], *, network: bytes, run: bytes,
    segment: int, before: Sequence[Collection[bytes]] = (),
) -> tuple[dict[int, str], dict[int, Complaint]]:  # fmt: skip
    """Where the two ends of a link differ at a segment's end: the units at fault, and what is no fault that is shown.

    At fault is who signed what its own receipt does not claim, or claims to have received what nobody signed. What one
    of `before` signed, who had that unit earlier, is the fault of nobody who is there now: it is a complaint of the
    unit that got it. All by the numbers of units.
    """
    found: dict[int, str] = {}
    left: dict[int, Complaint] = {}
    for unit, one in sorted(here.items()):
        into = links_in(stages[unit])
        for index, link in enumerate(into):
            there, received = Link(link.flow, unit), LinkEnds.row(one.ends.received, index)
            if row_of(here[link.other].ends.sent, links_out(stages[link.other]), there) == received:
                continue
            expected = Handover(network=network, run=run, unit=link.other, link=there, segment=segment, root=received)
            signer = _signer_of(one.handovers[index] if index < len(one.handovers) else b"", expected)
            if signer == peers[link.other]:
                found[link.other] = f"signed for unit {unit} what its own receipt does not claim"
            elif before and signer in before[link.other]:
                left[unit] = Complaint(link.other, signer, "differs")
            else:
                found[unit] = f"claims to have received of unit {link.other} what that did not sign"
    return found, left


def _signer_of(shown: bytes, expected: Handover) -> bytes:
    """Who signed just this; empty if nobody did."""
    try:
        signer = open_handover(shown, network=expected.network)[1]
        check_handover(shown, expected, signer)
    except RemoteProtocolError:
        return b""
    return signer


@dataclass
class Units:
    """See the module docstring. `on_ready(work)`: all handovers for its oldest receipt may be here now."""

    desk: Desk
    seats: dict[bytes, Seat] = field(default_factory=dict)
    handed: dict[tuple[bytes, int], LinkEnds] = field(default_factory=dict)  # (work, segment) -> its ends
    given: dict[tuple[bytes, int, Link], bytes] = field(default_factory=dict)  # link: as in links_in of the work
    disputed: dict[tuple[bytes, int], Complaint] = field(default_factory=dict)  # (work, segment)
    signed: dict[bytes, int] = field(default_factory=dict)  # work -> segments of it that all have handed in
    on_ready: Callable[[bytes], None] = lambda _: None
    ask_again: dict[bytes, int] = field(default_factory=dict)

    # --- launching -----------------------------------------------------------------------------------------
    def launch(self, work: bytes, stage: Stage, message: Launch) -> bool:
        """Take a launch from the submitter. True if it is news. Raises VerificationFailed for one of another run."""
        count = stage.stages * stage.replicas
        if message.run != stage.run or [unit for unit, _, _ in message.units] != list(range(count)):
            raise VerificationFailed(f"a launch of {len(message.units)} units, the task is of a run of {count}")
        peers, since = [peer for _, peer, _ in message.units], [epoch for _, _, epoch in message.units]
        if peers[stage.unit] != self.desk.me:
            raise VerificationFailed(f"a launch that has another peer run unit {stage.unit}")
        return self.seat(work, stage, message.epoch, peers, since)

    def seat(self, work: bytes, stage: Stage, epoch: int, peers: list[bytes], since: list[int]) -> bool:
        """The unit is launched with these peers. True if that is news."""
        known = self.seats.get(work)
        if known is not None and known.epoch >= epoch:
            return False
        bare = msgspec.structs.replace(stage, sends=(), receives=())
        ended = known.ended if known is not None else 0
        self.seats[work] = Seat(
            work=work, run=stage.run, unit=stage.unit, epoch=epoch, peers=peers, since=since, stage=bare, ended=ended
        )
        self.desk.save(_SEATS, work, msgspec.msgpack.encode(self.seats[work]))
        return True

    def order(self, work: bytes) -> RunOrder | None:
        """Where the neighbours of a launched unit are."""
        seat = self.seats.get(work)
        if seat is None:
            return None
        return RunOrder(seat.run, seat.epoch, seat.unit, tuple(seat.peers), tuple(seat.since))

    def waits(self, deal: Deal) -> bool:
        """Whether the work of a deal is a unit that is not launched yet."""
        return deal.id not in self.seats and stage_of(deal.task) is not None

    def relink(self, work: bytes) -> None:
        """A running worker's neighbours moved."""
        order = self.order(work)
        assert order is not None, "it was launched just now"
        self.desk.add(Relink(work, order))

    def drop(self, work: bytes) -> None:
        """The unit is over here."""
        if self.seats.pop(work, None) is None:
            return
        self.desk.save(_SEATS, work, None)
        for key in [key for key in self.handed if key[0] == work]:
            del self.handed[key]
            self.desk.save(_HANDED, _key(*key), None)
        for link in [link for link in self.given if link[0] == work]:
            del self.given[link]
        for at in [at for at in self.disputed if at[0] == work]:
            del self.disputed[at]
        self.ask_again.pop(work, None)
        self.signed.pop(work, None)

    # --- the end of a segment ------------------------------------------------------------------------------
    def ended(self, work: bytes, segment: int, ends: LinkEnds) -> None:
        """A segment of a unit ended so: sign for each neighbour what it was sent. Raises VerificationFailed where the
        state does not hold what a unit's holds."""
        seat = self.seats[work]
        if not ends.fits(seat.stage):
            raise VerificationFailed("the end of a unit's segment has not one row a link")
        self.handed[work, segment] = ends
        self.desk.save(_HANDED, _key(work, segment), msgspec.msgpack.encode((ends.sent, ends.received, ends.tape)))
        seat.ended = segment + 1
        self.desk.save(_SEATS, work, msgspec.msgpack.encode(seat))
        for unit in sorted({link.other for link in links_out(seat.stage)}):
            self._hand(seat, segment, unit, ends)
        for link in links_in(seat.stage):
            self._compare(seat, segment, link)

    def _hand(self, seat: Seat, segment: int, unit: int, ends: LinkEnds) -> None:
        links = links_out(seat.stage)
        signed = tuple(
            hand_over(self._handover(seat.run, seat.unit, link, segment, row_of(ends.sent, links, link)), self.desk.key)
            for link in links
            if link.other == unit
        )
        peer = seat.peers[unit]
        if peer == self.desk.me:  # a submitter that keeps both
            self.on_given(peer, HandoverGiven(signed))
        else:
            self.desk.send(peer, HandoverGiven(signed))

    def _handover(self, run: bytes, unit: int, link: Link, segment: int, root: bytes) -> Handover:
        network = self.desk.network.id
        return Handover(network=network, run=run, unit=unit, link=link, segment=segment, root=root)

    def handovers(self, work: bytes, segment: int) -> tuple[bytes, ...] | None:
        """The signatures for all that came into a unit in a segment that ended here, in the order of links_in; None
        while one is not here. Of other work there are none to have."""
        seat = self.seats.get(work)
        if seat is None:
            return ()
        found = [self.given.get((work, segment, link)) for link in links_in(seat.stage)]
        if (work, segment) not in self.handed or (work, segment) in self.disputed:
            return None
        return tuple(one for one in found if one) if all(found) else None

    def on_ask(self, peer: bytes, message: HandoverAsk) -> None:
        """A neighbour lacks ours."""
        for seat in self.seats.values():
            ends = self.handed.get((seat.work, message.segment))
            mine = seat.run == message.run and seat.unit == message.unit and ends is not None
            if mine and message.other < len(seat.peers) and seat.peers[message.other] == peer:
                assert ends is not None, "that was just asked"
                self._hand(seat, message.segment, message.other, ends)

    def on_given(self, peer: bytes, message: HandoverGiven) -> None:
        """A neighbour's signatures. Raises a RemoteProtocolError for what is none."""
        for signed in message.handovers:
            handover, signer = open_handover(signed, network=self.desk.network.id)
            if signer != peer:
                raise VerificationFailed("a handover comes from the peer that runs its unit")
            for seat in [s for s in self.seats.values() if (s.run, s.unit) == (handover.run, handover.link.other)]:
                link = Link(handover.link.flow, handover.unit)
                past = self.signed.get(seat.work, 0) - params.HANDOVERS_KEPT
                near = past <= handover.segment < seat.ended + _SEGMENTS_AHEAD
                if not near or link not in links_in(seat.stage) or seat.peers[handover.unit] != peer:
                    continue
                if self._fits(seat, handover.segment, link):
                    continue  # it has signed what was received: what else it signs is between it and its submitter
                self.given[seat.work, handover.segment, link] = signed
                self._compare(seat, handover.segment, link)
                self.on_ready(seat.work)

    def _fits(self, seat: Seat, segment: int, link: Link) -> bool:
        """Whether whoever has a neighbour's unit signed what this unit received."""
        try:
            return self._check(seat, segment, link)
        except VerificationFailed:
            return False

    def _check(self, seat: Seat, segment: int, link: Link) -> bool:
        """Whether what a neighbour signed, and what this unit received, are known. Raises VerificationFailed where they
        differ."""
        ends, signed = self.handed.get((seat.work, segment)), self.given.get((seat.work, segment, link))
        if ends is None or signed is None:
            return False
        row = row_of(ends.received, links_in(seat.stage), link)
        expected = self._handover(seat.run, link.other, Link(link.flow, seat.unit), segment, row)
        check_handover(signed, expected, seat.peers[link.other])
        return True

    def _compare(self, seat: Seat, segment: int, link: Link) -> None:
        """Whether a neighbour signed what this unit received, when both are known."""
        try:
            if not self._check(seat, segment, link):
                return
        except VerificationFailed as error:
            blamed = Complaint(link.other, seat.peers[link.other], "differs")
            self.disputed.setdefault((seat.work, segment), blamed)
            self.desk.emit("problem", what=f"segment {segment} of unit {seat.unit}: {error}")
        else:
            blamed = Complaint(link.other, seat.peers[link.other], "differs")
            if self.disputed.get((seat.work, segment)) == blamed:
                del self.disputed[seat.work, segment]  # it had signed something else before

    def complains(self, work: bytes, unit: int, segment: int) -> bool:
        """The worker of a unit could not decode what a neighbour sent in `segment`: whether that is one, and another
        peer. To start the worker again would help nothing, for its tape feeds it the same."""
        seat = self.seats.get(work)
        near = seat is not None and unit in {link.other for link in links_in(seat.stage)}
        if seat is None or not near or seat.peers[unit] == self.desk.me:
            return False
        self.disputed[work, segment] = Complaint(unit, seat.peers[unit], "no-tensor")
        self.desk.emit("problem", what=f"segment {segment} of unit {seat.unit}: unit {unit} sent what is no tensor")
        return True

    def settled(self, work: bytes, task: bytes, segment: int) -> None:
        """All units have handed in `segment`: what was sent in its steps, and those before, need not be kept; nor what
        was signed of them, but for a neighbour that restarted and asks again."""
        if work not in self.seats:
            return
        self.signed[work] = segment + 1
        for old in [key for key in self.handed if key[0] == work and key[1] + params.HANDOVERS_KEPT <= segment]:
            del self.handed[old]
            self.desk.save(_HANDED, _key(*old), None)
        for past in [at for at in self.given if at[0] == work and at[1] + params.HANDOVERS_KEPT <= segment]:
            del self.given[past]
        self.desk.add(Settled(work, task_of(task).steps_of(segment).stop))

    # --- time ----------------------------------------------------------------------------------------------
    def ask(self, work: bytes, segment: int) -> None:
        """Ask the neighbours for the signatures that a receipt of this segment lacks, once a params.RESEND_NS."""
        seat = self.seats.get(work)
        if seat is None or self.desk.now_ns < self.ask_again.get(work, 0):
            return
        self.ask_again[work] = self.desk.now_ns + params.RESEND_NS
        lacking = {link.other for link in links_in(seat.stage) if (work, segment, link) not in self.given}
        for unit in sorted(lacking):
            self.desk.send(seat.peers[unit], HandoverAsk(seat.run, unit, seat.unit, segment))

    def restore(self, rows: Rows) -> None:
        """Rebuild what was launched and what was sent; what others signed is asked for again."""
        for key, value in rows(_SEATS):
            self.seats[key] = msgspec.msgpack.decode(value, type=Seat)
        for key, value in rows(_HANDED):
            parts = msgspec.msgpack.decode(value, type=tuple[bytes, bytes, bytes])
            self.handed[key[:32], int.from_bytes(key[32:], "big")] = LinkEnds(*parts)


def _key(work: bytes, segment: int) -> bytes:
    return work + segment.to_bytes(4, "big")
