"""One unit's payloads, out and in: the StagePort of its deal, and a stream to each unit that it sends to.

Made by peer/tensor_links.py, which says what is promised. Everything here runs in one trio task each for a stream that
goes out; streams that come in run in the host's tasks.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from peer.links import PeerUnreachable, Stream
from peer.payload_shelf import PayloadShelf
from peer.tensor_state import Expected, Incoming, Outgoing, Seat, Waits
from peer.tensor_talk import Talk
from peer.tensor_wire import GRANT, NOBODY, PART, Beat, Grant, Greeting, Hello, Part
from protocol import params
from protocol.codec import decode, encode
from protocol.errors import IchibaError, LocalProtocolError, MalformedRecord, RemoteProtocolError
from protocol.keys import short
from protocol.payload import PayloadKey

__all__ = ["Difference", "Place", "TensorPort", "Waiting"]

log = logging.getLogger(__name__)
DIFFERENCES_KEPT: Final = 64


@dataclass(frozen=True)
class Place:
    """Where a unit stands in its run.

    epoch: how often the unit was given to somebody before this peer. sends_to: the units that it sends anything.
    expected: by the unit that sends, what comes (peer.tensor_state.expected_of).
    """

    run: bytes
    unit: int
    epoch: int
    sends_to: frozenset[int]
    expected: dict[int, Expected]


@dataclass(frozen=True)
class Waiting:
    """What a unit waits for. what: `payload`, of `key`; or `room`, to send more. late: longer than is usual for this
    unit. behind: the unit that it waits for itself, by its last word, and for how long."""

    unit: int
    peer: bytes
    what: str
    key: PayloadKey | None
    seconds: float
    deadline_s: float
    linked: bool
    silent_s: float
    behind: int | None
    behind_s: float
    problem: str

    @property
    def late(self) -> bool:
        """Whether it takes longer than is usual."""
        return self.seconds > self.deadline_s

    def words(self) -> str:
        """For people."""
        key = self.key
        what = f"{key.flow} {key.index} of step {key.step}, micro-batch {key.micro_batch}" if key else "room to send"
        who = short(self.peer) if self.peer else "nobody has it"
        found = f"unit {self.unit} ({who}): {what} for {self.seconds:.1f} s"
        if not self.linked:
            return f"{found}; not connected{f': {self.problem}' if self.problem else ''}"
        if self.behind is not None:
            return f"{found}; it waits for unit {self.behind} itself, for {self.behind_s:.1f} s"
        return f"{found}; usual is up to {self.deadline_s:.1f} s" if self.late else found


@dataclass(frozen=True)
class Difference:
    """Whoever has a unit now sent other bytes under a key than who had it before: a check must say who was right."""

    key: PayloadKey
    before: Seat
    now: Seat


@dataclass(eq=False)
class _Out:
    """A unit that is sent to."""

    unit: int
    state: Outgoing = field(default_factory=Outgoing)
    room: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    waits: Waits = field(default_factory=Waits)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    talk: Talk | None = None
    greeted: bool = False  # by the stream that is open, or was last
    problem: str = ""


@dataclass(eq=False)
class _In:
    """A unit that sends to this one."""

    state: Incoming
    arrived: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    waits: Waits = field(default_factory=Waits)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    talk: Talk | None = None
    grant: Grant | None = None  # to be told


class TensorPort:
    """See the module docstring. `differences`: what a replaced unit sent otherwise. `bytes_out`, `bytes_in`: moved."""

    def __init__(
        self,
        place: Place,
        seats: Mapping[int, Seat],
        *,
        open_stream: Callable[[bytes], Awaitable[Stream]],
        penalise: Callable[[bytes, str], None],
        shelf: PayloadShelf,
        have: Collection[PayloadKey] = (),
        window_bytes: int = params.TENSOR_WINDOW_BYTES,
        queue_bytes: int = params.TENSOR_QUEUE_BYTES,
    ) -> None:
        self.place, self.seats, self.shelf = place, dict(seats), shelf
        self.differences: deque[Difference] = deque(maxlen=DIFFERENCES_KEPT)
        self.bytes_in = self.bytes_out = 0
        self._open_stream, self._penalise = open_stream, penalise
        self._session, self._queue_bytes = os.urandom(16), queue_bytes
        self._out = {unit: _Out(unit) for unit in sorted(place.sends_to)}
        self._in = {
            unit: _In(Incoming(unit, expected, window_bytes)) for unit, expected in sorted(place.expected.items())
        }
        self._taped = set(have)  # what the worker was given in another life of this daemon
        for key in self._taped:
            self._in[key.unit].state.have[key] = self.seats.get(key.unit, Seat(b""))
        self._wants: dict[PayloadKey, float] = {}
        self._sends: dict[int, float] = {}  # unit -> since when a `send` waits for room there
        self._given: set[PayloadKey] = set()
        self._released = 0
        self._fault: IchibaError | OSError | None = None
        self._scope = trio.CancelScope()
        self.closed = False

    def __enter__(self) -> TensorPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what the worker's keeper calls --------------------------------------------------------------------

    async def send(self, key: PayloadKey, others: tuple[int, ...], payload: bytes) -> None:
        """As StagePort.send. Raises LocalProtocolError for a unit that there is no link to; ShelfFull."""
        if key.unit != self.place.unit or not set(others) <= self._out.keys():
            raise LocalProtocolError(f"unit {self.place.unit} has no link for {key} to the units {others}")
        self._check_fault()
        if key.step < self._released or key in self.shelf:
            return await trio.lowlevel.checkpoint()  # a worker that started again sends the same
        self.shelf.put(key, payload)
        for other in others:
            self._out[other].state.add(key, len(payload))
            self._wake(self._out[other])
        try:
            await self.shelf.settle()
        except (IchibaError, OSError) as fault:
            self._fail(fault)
            raise
        for other in others:
            await self._room(self._out[other], key.step)
        await trio.lowlevel.checkpoint()
        return None

    async def _room(self, link: _Out, step: int) -> None:
        if link.state.waiting_bytes <= self._queue_bytes:
            return
        began = self._sends.setdefault(link.unit, trio.current_time())
        try:
            while link.state.waiting_bytes > self._queue_bytes:
                self._check_fault()
                self._regrant()
                await link.room.park()
        finally:
            self._sends.pop(link.unit, None)
        link.waits.add(step, trio.current_time() - began)

    async def want(self, key: PayloadKey) -> bytes:
        """As StagePort.want. Raises LocalProtocolError for what no unit sends, or nobody can give again; ShelfFull."""
        link = self._in.get(key.unit)
        if link is None:
            raise LocalProtocolError(f"unit {self.place.unit} gets nothing from unit {key.unit}")
        try:
            link.state.expected.check(key)
        except RemoteProtocolError as fault:
            what = f"unit {self.place.unit} wants what unit {key.unit} never sends"
            raise LocalProtocolError(what, why=str(fault)) from None
        if key.step < self._released or key in self._taped:
            raise LocalProtocolError(f"{key} was given to the worker and released", why="it is on the tape")
        self._check_fault()
        await trio.lowlevel.checkpoint()
        if key not in self.shelf:
            await self._arrival(link, key)
        payload = await self.shelf.read(key, 0, self.shelf.size(key))
        if key not in self._given:
            self._given.add(key)
            link.state.given(len(payload))
        self._regrant()
        return payload

    async def _arrival(self, link: _In, key: PayloadKey) -> None:
        began = self._wants.setdefault(key, trio.current_time())
        try:
            while key not in self.shelf:
                self._check_fault()
                self._regrant()
                await link.arrived.park()
        finally:
            self._wants.pop(key, None)
        link.waits.add(key.step, trio.current_time() - began)

    def release(self, before_step: int) -> None:
        """Both sides have what they need of the steps before: nobody sends or asks for them again."""
        self._released = max(self._released, before_step)
        for out in self._out.values():
            self._drop_sent(out.state.release(before_step))
        for link in self._in.values():
            for key in link.state.release(before_step):
                if key in self.shelf and key not in self._given:
                    link.state.given(self.shelf.size(key))
                self.shelf.drop([key])
        self._given = {key for key in self._given if key.step >= before_step}
        self._taped = {key for key in self._taped if key.step >= before_step}
        self._regrant()

    def replace(self, unit: int, peer: bytes, epoch: int) -> None:
        """`peer` has `unit` from now on; what was kept for the unit is sent to it from the start."""
        self.seats[unit] = Seat(peer, epoch)
        if (out := self._out.get(unit)) is not None:
            out.state.reset()
            out.problem = ""
            out.scope.cancel()
        if (link := self._in.get(unit)) is not None:
            link.scope.cancel()

    def waiting_for(self) -> tuple[Waiting, ...]:
        """What this unit waits for now, the longest wait first."""
        now = trio.current_time()
        found = [
            self._waiting(key.unit, "payload", key, now - since, self._in[key.unit].waits)
            for key, since in self._wants.items()
        ]
        found += [
            self._waiting(unit, "room", None, now - since, self._out[unit].waits) for unit, since in self._sends.items()
        ]
        return tuple(sorted(found, key=lambda one: -one.seconds))

    def _waiting(self, unit: int, what: str, key: PayloadKey | None, seconds: float, waits: Waits) -> Waiting:
        out, link, now = self._out.get(unit), self._in.get(unit), trio.current_time()
        talks = [side.talk for side in (out, link) if side is not None and side.talk is not None]
        told = max(talks, key=lambda talk: talk.told_at, default=None)
        beat = told.told if told is not None else None
        behind = beat.waits_for if beat is not None and beat.waits_for not in (NOBODY, self.place.unit) else None
        behind_s = beat.waited_ms / 1000 + now - told.told_at if beat is not None and told is not None else 0.0
        return Waiting(
            unit=unit,
            peer=self.seats[unit].peer if unit in self.seats else b"",
            what=what,
            key=key,
            seconds=seconds,
            deadline_s=waits.deadline_s,
            linked=bool(talks),
            silent_s=min((now - talk.heard_at for talk in talks), default=seconds),
            behind=behind,
            behind_s=behind_s if behind is not None else 0.0,
            problem=out.problem if out is not None else "",
        )

    # --- sending -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a stream to each unit that is sent to, until the port is closed."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                for out in self._out.values():
                    nursery.start_soon(self._keep, out)
                await trio.sleep_forever()  # one that only receives is there, too

    def close(self) -> None:
        """End every stream and wake whoever waits: it is told that the port is closed. Again: nothing."""
        if self.closed:
            return
        self.closed = True
        self._scope.cancel()
        self._fail(LocalProtocolError(f"the port of unit {self.place.unit} is closed"))
        for link in self._in.values():
            link.scope.cancel()
        for out in self._out.values():
            out.state.lost()  # a read of the disk is not cancelled: what comes after it finds nothing to send
        self.shelf.close()

    async def _keep(self, out: _Out) -> None:
        delay_s = params.TENSOR_RETRY_SECONDS_MIN
        while True:
            with trio.CancelScope() as out.scope:
                seat = self.seats.get(out.unit)
                out.greeted = False
                if seat is None:
                    await trio.sleep_forever()  # until `replace`
                try:
                    await self._connect(out, seat)
                except RemoteProtocolError as fault:
                    out.problem = str(fault)
                    self._penalise(seat.peer, f"{fault.code}: {fault}")
                except (PeerUnreachable, trio.TooSlowError) as fault:
                    out.problem = str(fault) or "it does not answer"
                delay_s = params.TENSOR_RETRY_SECONDS_MIN if out.greeted else delay_s
                await trio.sleep(delay_s)
                delay_s = min(2 * delay_s, params.TENSOR_RETRY_SECONDS_MAX)
            if out.scope.cancelled_caught:
                delay_s = params.TENSOR_RETRY_SECONDS_MIN

    async def _connect(self, out: _Out, seat: Seat) -> None:
        """One stream from its greeting to its end. Raises what it ended with."""
        stream = await self._open_stream(seat.peer)
        try:
            with trio.fail_after(params.NEGOTIATE_SECONDS_MAX):
                hello = Hello(self.place.run, self.place.unit, out.unit, self.place.epoch, self._session)
                await stream.send_frame(encode(hello))
                said = await stream.receive_frame(params.TENSOR_HELLO_BYTES_MAX)
            greeting = decode(Greeting, said or b"", bytes_max=params.TENSOR_HELLO_BYTES_MAX)
            if greeting.refused:
                out.problem = greeting.refused
                return
            self._drop_sent(out.state.welcome(greeting))
            out.room.unpark_all()
            out.problem, out.greeted = "", True
            out.talk = Talk(stream, self._beat)
            await out.talk.run(
                lambda talk: self._read_grants(out, talk), lambda talk: talk.write(lambda: self._parts(out))
            )
        finally:
            out.talk = None
            out.state.lost()
            stream.reset()

    async def _parts(self, out: _Out) -> Sequence[bytes | memoryview]:
        """Heads and bytes of the next parts, some 256 KiB."""
        pieces: list[bytes | memoryview] = []
        size = 0
        while size < params.TENSOR_BATCH_BYTES and (part := out.state.next_part()) is not None:
            pieces.append(part.pack())
            if part.length:
                pieces.append(await self._bytes_of(part))
            size += part.length + params.TENSOR_PAYLOAD_COST
            self.bytes_out += part.length
        return pieces

    async def _bytes_of(self, part: Part) -> bytes | memoryview:
        view = self.shelf.view(part.key, part.offset, part.length)
        if view is not None:
            return view
        try:
            return await self.shelf.read(part.key, part.offset, part.length)
        except OSError as fault:
            self._fail(fault)
            raise PeerUnreachable("our own disk does not give back what was to be sent", why=str(fault)) from None

    async def _read_grants(self, out: _Out, talk: Talk) -> None:
        while (item := await talk.next_item()) is not None:
            kind, fields = item
            if kind != GRANT:
                raise MalformedRecord(f"an item of kind {kind} from who receives")
            self._drop_sent(out.state.granted(Grant.unpack(fields)))
            if out.state.waiting_bytes <= self._queue_bytes:
                out.room.unpark_all()
            talk.wake()
        raise PeerUnreachable("the other side ended the stream")

    def _drop_sent(self, keys: Iterable[PayloadKey]) -> None:
        self.shelf.drop(key for key in keys if not any(key in out.state.sizes for out in self._out.values()))

    # --- receiving -----------------------------------------------------------------------------------------

    def admits(self, hello: Hello, peer: bytes) -> bool:
        """Whether `peer` has the unit that it sends for."""
        return hello.unit in self._in and self.seats.get(hello.unit) == Seat(peer, hello.epoch)

    async def receive(self, hello: Hello, peer: bytes, stream: Stream) -> None:
        """Take payloads from who has a unit, until the stream ends, or a newer one of it comes.

        Raises RemoteProtocolError for what was not asked for.
        """
        link = self._in[hello.unit]
        link.scope.cancel()
        link.talk = None  # whatever an older stream still holds is no longer taken
        with trio.CancelScope() as scope:
            link.scope = scope
            stream.widen(params.TENSOR_STREAM_WINDOW_BYTES)
            greeting = link.state.greet(hello.session, Seat(peer, hello.epoch))
            with trio.fail_after(params.NEGOTIATE_SECONDS_MAX):
                await stream.send_frame(encode(greeting))
            talk = link.talk = Talk(stream, self._beat)
            link.grant = None
            self._tell(link)
            try:
                await talk.run(
                    lambda talk: self._read_parts(link, talk), lambda talk: talk.write(lambda: self._grants(link))
                )
            except (OSError, IchibaError) as fault:
                if not isinstance(fault, RemoteProtocolError | PeerUnreachable):
                    self._fail(fault)  # our disk, not the peer
                raise
            finally:
                if link.talk is talk:
                    link.talk = None

    async def _read_parts(self, link: _In, talk: Talk) -> None:
        state = link.state
        while (item := await talk.next_item()) is not None:
            kind, fields = item
            if kind != PART:
                raise MalformedRecord(f"an item of kind {kind} from who sends")
            if link.talk is not talk:
                return
            part = Part.unpack(fields, state.unit)
            state.begin(part)
            left = part.length
            while left:
                chunk = await talk.take(left)
                if link.talk is not talk:
                    return
                state.feed(chunk)
                left -= len(chunk)
            self.bytes_in += part.length
            if (whole := state.finish()) is not None:
                await self._arrived(link, *whole)
            self._tell(link)

    async def _arrived(self, link: _In, key: PayloadKey, payload: bytes, double: bool) -> None:
        if not double:
            self.shelf.put(key, payload)
            link.arrived.unpark_all()
            await self.shelf.settle()
        elif key in self.shelf:
            same = self.shelf.size(key) == len(payload) and await self.shelf.read(key, 0, len(payload)) == payload
            before, now = link.state.have.get(key), self.seats.get(key.unit)
            if link.state.doubled(key, same) and before is not None and now is not None:
                self.differences.append(Difference(key, before, now))
                log.warning("unit %d sent other bytes for %s than who had it before", key.unit, key)

    async def _grants(self, link: _In) -> Sequence[bytes]:
        grant, link.grant = link.grant, None
        return [grant.pack()] if grant is not None else []

    def _tell(self, link: _In) -> None:
        """Give what credit there is to give."""
        if link.talk is not None and (grant := link.state.grant(stuck=bool(self._wants or self._sends))) is not None:
            link.grant = grant
            link.talk.wake()

    def _regrant(self) -> None:
        for link in self._in.values():
            self._tell(link)

    # --- small things --------------------------------------------------------------------------------------

    def _beat(self, stamp: int) -> Beat:
        waits = [(since, key.unit) for key, since in self._wants.items()]
        waits += [(since, unit) for unit, since in self._sends.items()]
        since, unit = min(waits, default=(0.0, NOBODY))
        return Beat(unit, int(1000 * (trio.current_time() - since)) if waits else 0, stamp)

    def _wake(self, out: _Out) -> None:
        if out.talk is not None:
            out.talk.wake()

    def _check_fault(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _fail(self, fault: IchibaError | OSError) -> None:
        self._fault = self._fault or fault
        for out in self._out.values():
            out.room.unpark_all()
        for link in self._in.values():
            link.arrived.unpark_all()
