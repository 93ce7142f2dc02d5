"""Yamux: many flow-controlled streams over one authenticated connection.

Promises: what one connection can make us hold is bounded (windows are enforced, not merely announced; streams,
queued frames and answers are counted); no call of one stream can stall or corrupt another, cancelled or not; a
silent or stalled connection ends within seconds. Never raises for what the other side sends: it ends the
session, and `violation` says why. Refuses to know libp2p, sockets and encryption: it gets a Wire.

Source: hashicorp/yamux specification, version 0, as used by libp2p. Written because py-libp2p 0.8.1's own muxer
only logs a peer that overruns its window, polls for credit, and writes from its read loop.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Final, Protocol

import trio

from protocol import params

__all__ = ["MuxStream", "Session", "Wire"]

HEADER: Final = struct.Struct("!BBHII")  # version, type, flags, stream id, length
DATA, WINDOW, PING, GO_AWAY = 0, 1, 2, 3
SYN, ACK, FIN, RST = 1, 2, 4, 8
CREDIT_MAX: Final = 2**32  # a window a peer may grant us; more is nonsense
WIRE_FAULTS = (trio.BrokenResourceError, trio.ClosedResourceError)


class Wire(Protocol):
    """An authenticated, ordered connection. Raises trio.BrokenResourceError or ClosedResourceError."""

    async def receive(self) -> bytes:
        """The next bytes, empty at the end."""

    async def send(self, data: bytes | memoryview, *more: bytes | memoryview) -> None:
        """Send all of `data` and what follows it."""

    async def aclose(self) -> None:
        """Close now."""


class MuxStream:
    """One stream of a Session: a trio-like byte stream with half-close."""

    def __init__(self, session: Session, number: int) -> None:
        self.session, self.number = session, number
        self.fin_sent = self.fin_received = self.broken = self.discarding = False
        self.closed_at = 0.0
        self._chunks: deque[memoryview | bytearray] = deque()  # views of messages, and short pieces joined
        self._readable, self._writable = trio.lowlevel.ParkingLot(), trio.lowlevel.ParkingLot()
        self.send_window = self.receive_window = self._target = params.MUX_WINDOW_BYTES
        self.window_max = params.MUX_WINDOW_BYTES_MAX  # what it grows to; who knows the peer may raise it
        self._consumed = 0

    async def receive_some(self, bytes_max: int) -> bytes:
        """1 to `bytes_max` bytes, or none at the end. Raises trio.BrokenResourceError after a reset."""
        return bytes(await self.receive_view(bytes_max))

    async def receive_view(self, bytes_max: int) -> memoryview:
        """As `receive_some`, not copied: what is kept of it keeps up to a whole message in memory."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._chunks:
            if self.broken:
                raise trio.BrokenResourceError(self.session.reason or "the peer reset the stream")
            if self.fin_received or self.discarding:
                return memoryview(b"")
            await self._readable.park()
        chunk = self.view_here(bytes_max)
        assert chunk is not None
        return chunk

    def view_here(self, bytes_max: int) -> memoryview | None:
        """1 to `bytes_max` bytes that have come, as `receive_view`; None if it would wait."""
        if not self._chunks:
            return None
        chunk = memoryview(self._chunks[0])
        if len(chunk) > bytes_max:
            self._chunks[0] = chunk[bytes_max:]
            chunk = chunk[:bytes_max]
        else:
            self._chunks.popleft()
        self._credit(len(chunk))
        return chunk

    def _credit(self, count: int) -> None:
        """Give the sender back what was read, in halves of a window that doubles while the reader keeps up."""
        self._consumed += count
        if self._consumed * 2 >= self._target and not self.fin_received:
            grown = min(self._target * 2, self.window_max)
            increment = self._consumed + grown - self._target
            self._target, self._consumed = grown, 0
            self.receive_window += increment
            self.session.control(WINDOW, 0, self.number, increment)

    async def send_all(self, data: bytes | memoryview) -> None:
        """Queue all of `data`, waiting for credit and room. Raises trio.BrokenResourceError.

        Only bytes that nobody can change any more are not copied: `bytes`, or a view of some.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        view = memoryview(data)
        lasting = isinstance(view.obj, bytes)
        while len(view):
            while not self.send_window and not self.broken and not self.fin_sent:
                await self._writable.park()
            if self.broken or self.fin_sent:
                raise trio.BrokenResourceError(self.session.reason or "the stream is closed for sending")
            take = min(len(view), self.send_window, self.session.frame_bytes_max)
            self.send_window -= take
            body = view[:take]
            await self.session.enqueue(HEADER.pack(0, DATA, 0, self.number, take), body if lasting else bytes(body))
            view = view[take:]

    def close_write(self) -> None:
        """Say that no more bytes follow; reading goes on."""
        if not self.fin_sent and not self.broken:
            self.fin_sent = True
            self.session.enqueue_last(HEADER.pack(0, WINDOW, FIN, self.number, 0))
            self._writable.unpark_all()
            self.session.forget_if_done(self)

    def aclose(self) -> None:
        """Done with the stream: half-close, and reset it if the peer goes on sending."""
        self.close_write()
        self.discarding, self.closed_at = True, trio.current_time()
        if self._chunks:
            self.reset()

    def reset(self) -> None:
        """End both directions at once; unread and unsent bytes are lost."""
        if not self.broken:
            if not (self.fin_sent and self.fin_received):
                self.session.control(WINDOW, RST, self.number, 0)
            self.end()

    def end(self) -> None:
        """The stream is gone: wake everybody who waits for it. What its window still allowed may be on its way."""
        if not self.broken and not self.fin_received:
            self.session.stray_allowed += self.receive_window
        self.broken = True
        self.session.streams.pop(self.number, None)
        self._readable.unpark_all()
        self._writable.unpark_all()

    def feed(self, chunk: memoryview, message_bytes: int) -> None:
        """Bytes from the wire, already taken from the window: a view of a message of so many bytes.

        A view keeps the whole message, and is an object of its own: a peer that sends single bytes among frames that
        cost it nothing would make each byte of a window hold 64 KiB. So short pieces are joined.
        """
        if self.discarding:
            self.reset()
        elif not self.broken:
            last = self._chunks[-1] if self._chunks else None
            if len(chunk) >= params.MUX_SHORT_BYTES and 2 * len(chunk) >= message_bytes:
                self._chunks.append(chunk)
            elif isinstance(last, bytearray) and len(last) < params.MUX_WINDOW_BYTES:
                last += chunk
            else:
                self._chunks.append(bytearray(chunk))
            self._readable.unpark_all()

    def on_flags(self, flags: int) -> None:
        """FIN and RST of a frame of this stream."""
        if flags & RST:
            self.end()
        elif flags & FIN:
            self.fin_received = True
            self._readable.unpark_all()
            self.session.forget_if_done(self)

    def grant(self, increment: int) -> None:
        """The peer takes `increment` more bytes."""
        self.send_window += increment
        self._writable.unpark_all()


class Session:
    """All streams of one connection. `run` owns it; everything else is called while `run` runs."""

    def __init__(self, wire: Wire, *, initiator: bool) -> None:
        self.wire = wire
        self.streams: dict[int, MuxStream] = {}
        self.ended = trio.Event()
        self.reason = self.violation = ""
        self.bytes_in = self.bytes_out = 0
        self._initiator = initiator
        self._next = 1 if initiator else 2
        self._accepted, self._incoming = trio.open_memory_channel[MuxStream](params.MUX_STREAMS_INBOUND_MAX)
        self._control: deque[bytes] = deque()
        self._outbox: deque[tuple[bytes, bytes | memoryview]] = deque()  # headers and what follows them
        self._outbox_bytes = 0
        self.frame_bytes_max = params.MUX_FRAME_BYTES_MAX  # of data, by how quick the wire is
        self._wake, self._room = trio.lowlevel.ParkingLot(), trio.lowlevel.ParkingLot()
        self._pings: dict[int, trio.Event] = {}
        self._ping_number = 0
        self.stray_allowed = 0  # bytes that may still come for streams we have ended
        self._heard_at = 0.0
        self._sending_since: float | None = None
        self._scope: trio.CancelScope | None = None

    async def run(self) -> None:
        """Move frames until either side ends the session. Raises nothing but trio.Cancelled."""
        self._heard_at = trio.current_time()
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                if self.ended.is_set():
                    nursery.cancel_scope.cancel()
                nursery.start_soon(self._write)
                nursery.start_soon(self._keep_alive)
                try:
                    await self._read()
                except WIRE_FAULTS as fault:
                    self.abort(f"the connection broke: {fault}")
                self.abort("the peer closed the connection")
        finally:
            self.abort("the host stops")
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await self.wire.aclose()

    def abort(self, reason: str) -> None:
        """End the session and all its streams now; the first reason stays."""
        if not self.ended.is_set():
            self.reason = reason
            self.ended.set()
            for stream in list(self.streams.values()):
                stream.end()
            self._accepted.close()
            self._room.unpark_all()
            for event in self._pings.values():
                event.set()
        if self._scope is not None:
            self._scope.cancel()

    async def aclose(self) -> None:
        """Say good-bye, give queued bytes a moment to leave, end."""
        if not self.ended.is_set():
            self.enqueue_last(HEADER.pack(0, GO_AWAY, 0, 0, 0))
            with trio.move_on_after(0.5):
                while (self._outbox or self._sending_since is not None) and not self.ended.is_set():
                    await self._room.park()
            self.abort("closed by this side")

    async def open_stream(self) -> MuxStream:
        """A new stream. Raises trio.BrokenResourceError if the session ended or has too many."""
        if self.ended.is_set():
            raise trio.BrokenResourceError(self.reason)
        own = sum(number % 2 == self._next % 2 for number in self.streams)
        if own >= params.MUX_STREAMS_OUTBOUND_MAX:
            raise trio.BrokenResourceError(f"{own} streams are open to this peer, the most there may be")
        stream = MuxStream(self, self._next)
        self._next += 2
        self.streams[stream.number] = stream
        self.enqueue_last(HEADER.pack(0, WINDOW, SYN, stream.number, 0))
        await trio.lowlevel.checkpoint()
        return stream

    async def accept_stream(self) -> MuxStream:
        """The next stream the peer opened. Raises trio.EndOfChannel when the session has ended."""
        return await self._incoming.receive()

    async def ping(self) -> float:
        """Seconds to the peer's muxer and back. Raises trio.BrokenResourceError if the session ends meanwhile."""
        self._ping_number = number = (self._ping_number + 1) % 2**32
        event = self._pings[number] = trio.Event()
        started = trio.current_time()
        self.control(PING, SYN, 0, number)
        try:
            await event.wait()
        finally:
            self._pings.pop(number, None)
        if self.ended.is_set():
            raise trio.BrokenResourceError(self.reason)
        return trio.current_time() - started

    # --- sending: one task writes, so a cancelled sender never leaves half a frame behind -------------------

    def control(self, kind: int, flags: int, number: int, length: int) -> None:
        """Queue a frame ahead of data. Answers are bounded: who provokes too many of them ends the session."""
        if len(self._control) >= params.MUX_CONTROL_FRAMES_MAX:
            self._violate("it provokes answers faster than it takes them")
        else:
            self._control.append(HEADER.pack(0, kind, flags, number, length))
            self._wake.unpark_all()

    async def enqueue(self, header: bytes, body: bytes | memoryview) -> None:
        """Queue a frame of data; wait while the outbox is full."""
        while self._outbox_bytes >= params.MUX_OUTBOX_BYTES_MAX and not self.ended.is_set():
            await self._room.park()
        self.enqueue_last(header, body)

    def enqueue_last(self, header: bytes, body: bytes | memoryview = b"") -> None:
        """Queue a frame that must follow the data before it and is too short to wait: SYN, FIN, GO_AWAY."""
        self._outbox.append((header, body))
        self._outbox_bytes += len(header) + len(body)
        self._wake.unpark_all()

    async def _write(self) -> None:
        while True:
            while self._control or self._outbox:
                pieces = self._take(self.frame_bytes_max)
                started = self._sending_since = trio.current_time()
                try:
                    await self.wire.send(*pieces)
                except WIRE_FAULTS as fault:
                    return self.abort(f"the connection broke: {fault}")
                self._sending_since = None
                self.bytes_out += sum(map(len, pieces))
                # A wire that takes much at once is given it; on a slow one what is urgent must not wait.
                quick = trio.current_time() - started < params.MUX_QUICK_SECONDS
                most = min(2 * self.frame_bytes_max, params.MUX_AT_ONCE_BYTES_MAX)
                self.frame_bytes_max = most if quick else params.MUX_FRAME_BYTES_MAX
                if self._outbox_bytes < params.MUX_OUTBOX_BYTES_MAX:
                    self._room.unpark(count=1)
            self._room.unpark_all()
            await self._wake.park()

    def _take(self, bytes_max: int) -> list[bytes | memoryview]:
        """What to send now: answers, then frames of data up to `bytes_max`, one at least."""
        pieces: list[bytes | memoryview] = []
        if self._control:
            pieces.append(b"".join(self._control))
            self._control.clear()
        taken = 0
        while self._outbox:
            header, body = self._outbox[0]
            size = len(header) + len(body)
            if taken > params.MUX_SHORT_BYTES and taken + size > bytes_max:
                break
            self._outbox.popleft()
            pieces += (header, body) if len(body) else (header,)
            taken += size
        self._outbox_bytes -= taken
        return pieces

    async def _keep_alive(self) -> None:
        while True:
            await trio.sleep(params.MUX_KEEPALIVE_SECONDS)
            now = trio.current_time()
            silent_s = now - self._heard_at
            if silent_s > params.MUX_SILENCE_SECONDS_MAX:
                self.abort(f"the peer has been silent for {silent_s:.0f} s")
            stalled_s = 0.0 if self._sending_since is None else now - self._sending_since
            if stalled_s > params.MUX_STALL_SECONDS_MAX:
                self.abort(f"the peer takes no bytes for {stalled_s:.0f} s")
            for stream in list(self.streams.values()):
                if stream.discarding and now - stream.closed_at > params.MUX_LINGER_SECONDS_MAX:
                    stream.reset()
            if silent_s >= params.MUX_KEEPALIVE_SECONDS * 0.9:
                self.control(PING, SYN, 0, 0)

    # --- receiving ---------------------------------------------------------------------------------------

    async def _read(self) -> None:
        header = bytearray()
        stream: MuxStream | None = None
        left = flags = 0
        while data := await self.wire.receive():
            self._heard_at = trio.current_time()
            self.bytes_in += len(data)
            view, at = memoryview(data), 0
            while at < len(view) and not self.ended.is_set():
                if left:
                    take = min(left, len(view) - at)
                    if stream is not None:
                        stream.feed(view[at : at + take], len(view))
                    at, left = at + take, left - take
                else:
                    take = HEADER.size - len(header)
                    header += view[at : at + take]
                    at += take
                    if len(header) < HEADER.size:
                        break
                    version, kind, flags, number, length = HEADER.unpack(header)
                    header.clear()
                    if version or kind > GO_AWAY:
                        self._violate(f"a frame of version {version} and type {kind}")
                        return
                    stream = self._on_frame(kind, flags, number, length)
                    left = length if kind == DATA else 0
                if not left and stream is not None:
                    stream.on_flags(flags)
                    stream = None

    def _on_frame(self, kind: int, flags: int, number: int, length: int) -> MuxStream | None:
        """Act on one header; the stream its payload and flags belong to, if it has one."""
        if kind == PING:
            if flags & SYN:
                # A flood of pings is answered by as many as fit; the rest is the flooder's loss.
                if len(self._control) < params.MUX_CONTROL_FRAMES_MAX // 2:
                    self.control(PING, ACK, 0, length)
            elif (event := self._pings.get(length)) is not None:
                event.set()
            return None
        if kind == GO_AWAY:
            self.abort("the peer said good-bye")
            return None
        stream = self._on_syn(number) if flags & SYN else self.streams.get(number)
        if stream is None:
            if kind == DATA and not self.ended.is_set():  # of a stream already gone: read and dropped
                self.stray_allowed -= length
                if self.stray_allowed < 0:
                    self._violate("it sends on streams that are closed")
            return None
        if kind == WINDOW:
            if stream.send_window + length > CREDIT_MAX:
                self._violate(f"a window of more than {CREDIT_MAX} bytes")
            else:
                stream.grant(length)
        elif length > stream.receive_window or stream.fin_received:
            self._violate(f"{length} bytes on a stream with a window of {stream.receive_window}")
        else:
            stream.receive_window -= length
        return stream

    def _on_syn(self, number: int) -> MuxStream | None:
        inbound = sum(known % 2 == number % 2 for known in self.streams)
        if number == 0 or (number % 2 == 1) == self._initiator or number in self.streams:
            self._violate(f"it opened stream {number}, which is not its to open")
            return None
        stream = MuxStream(self, number)
        try:
            if inbound >= params.MUX_STREAMS_INBOUND_MAX:
                raise trio.WouldBlock
            self._accepted.send_nowait(stream)
        except trio.WouldBlock:
            stream.reset()
            return None
        self.streams[number] = stream
        self.control(WINDOW, ACK, number, 0)
        return stream

    def _violate(self, what: str) -> None:
        self.violation = self.violation or what
        self.abort(f"the peer broke the protocol: {what}")

    def forget_if_done(self, stream: MuxStream) -> None:
        """Both sides have closed `stream`: nothing more comes for it; what was received stays readable."""
        if stream.fin_sent and stream.fin_received:
            self.streams.pop(stream.number, None)
