"""Links: authenticated connections to other peers over TCP, and the streams on them.

Promises: nobody unauthenticated holds a place for longer than params.HANDSHAKE_SECONDS_MAX or pushes out somebody
who is authenticated; what any one peer or address can take is bounded; no fault of one link reaches another. A link
speaks libp2p on the wire: multistream-select 1.0, then whatever `secure` is (Noise), then yamux. Refuses to know
libp2p's code: the handshake is passed in.
"""

from __future__ import annotations

import errno
import logging
import random
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import trio

from peer.addresses import Address
from peer.link_shaper import ShapedSocket, Shaper
from peer.yamux import MuxStream, Session, Wire
from protocol import params
from protocol.errors import IchibaError, LimitExceeded, MalformedRecord, RemoteProtocolError
from protocol.keys import short

__all__ = ["CannotListen", "Link", "Links", "PeerUnreachable", "Stream", "answer", "propose"]

log = logging.getLogger(__name__)
MULTISTREAM: Final = b"/multistream/1.0.0"
NOISE: Final = "/noise"
YAMUX: Final = "/yamux/1.0.0"
READ_BYTES: Final = 256 * 1024
CARRIER_FAULTS = (trio.BrokenResourceError, trio.ClosedResourceError)


class CannotListen(IchibaError):
    """An address this machine cannot listen at."""

    code = "cannot-listen"


class PeerUnreachable(IchibaError):
    """A peer that cannot be connected, or a connection that broke under a call."""

    code = "peer-unreachable"
    exit_code = 4


class Carrier(Protocol):
    """What a Stream rides on: a socket, an encrypted wire, a stream of a session."""

    async def receive_some(self, bytes_max: int) -> bytes:
        """Some bytes, none at the end."""

    async def send_all(self, data: bytes | memoryview) -> None:
        """Send all of `data`."""


class Stream:
    """Bytes to and from one peer, with exact reads. `bytes_max` bounds all that may ever be received."""

    def __init__(self, carrier: Carrier, *, peer: bytes = b"", bytes_max: int | None = None) -> None:
        self.peer = peer
        self._carrier, self._left = carrier, bytes_max

    def limit(self, bytes_max: int | None) -> None:
        """From now on receive at most `bytes_max` bytes in all."""
        self._left = bytes_max

    async def receive_some(self, bytes_max: int) -> bytes:
        """1 to `bytes_max` bytes, or none at the end. Raises PeerUnreachable, LimitExceeded."""
        return bytes(await self.receive_view(bytes_max))

    async def receive_view(self, bytes_max: int) -> memoryview:
        """As `receive_some`, without a copy where the carrier makes none; keep it only while it is used."""
        try:
            if isinstance(self._carrier, MuxStream):
                view = await self._carrier.receive_view(bytes_max)
            else:
                view = memoryview(await self._carrier.receive_some(bytes_max))
        except CARRIER_FAULTS as fault:
            raise PeerUnreachable("the stream broke", why=str(fault)) from None
        if self._left is not None:
            self._left -= len(view)
            if self._left < 0:
                raise LimitExceeded("the peer sends more on a stream than it may")
        return view

    def view_here(self, bytes_max: int) -> memoryview | None:
        """What `receive_view` would return at once; None where it may wait, or raise."""
        if self._left is not None or not isinstance(self._carrier, MuxStream):
            return None
        return self._carrier.view_here(bytes_max)

    async def receive_into(self, buffer: memoryview) -> int:
        """As `receive_some`, into `buffer`: how many bytes, 0 at the end."""
        if self._left is None and isinstance(self._carrier, trio.SocketStream):
            try:
                return await self._carrier.socket.recv_into(buffer)
            except (OSError, trio.ClosedResourceError) as fault:
                raise PeerUnreachable("the connection broke", why=str(fault)) from None
        data = await self.receive_some(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def widen(self, window_bytes_max: int) -> None:
        """Let up to so many bytes be on their way to us: for a peer that is owed them."""
        if isinstance(self._carrier, MuxStream):
            self._carrier.window_max = max(self._carrier.window_max, window_bytes_max)

    async def receive_exactly(self, count: int) -> bytes:
        """Exactly `count` bytes. Raises PeerUnreachable if the stream ends before, LimitExceeded."""
        parts: list[bytes | memoryview] = []
        have = 0
        while have < count:
            part = await self.receive_view(count - have)
            if not len(part):
                raise PeerUnreachable(f"the stream ended after {have} of {count} bytes")
            have += len(part)
            parts.append(bytes(part) if len(part) < params.MUX_SHORT_BYTES else part)
        return b"".join(parts)

    async def receive_frame(self, bytes_max: int) -> bytes | None:
        """One frame: 4 bytes length, big-endian, then the bytes. None at a clean end. Raises LimitExceeded."""
        head = await self.receive_some(4)
        if not head:
            return None
        if len(head) < 4:
            head += await self.receive_exactly(4 - len(head))
        size = int.from_bytes(head, "big")
        if size > bytes_max:
            raise LimitExceeded(f"a frame of {size} bytes, at most {bytes_max} are read")
        return await self.receive_exactly(size) if size else b""

    async def send_all(self, data: bytes | memoryview) -> None:
        """Send all of `data`, at the pace of the reader. Raises PeerUnreachable."""
        try:
            await self._carrier.send_all(data)
        except CARRIER_FAULTS as fault:
            raise PeerUnreachable("the stream broke", why=str(fault)) from None

    async def send_frame(self, data: bytes) -> None:
        """Send `data` as one frame that `receive_frame` reads."""
        await self.send_all(len(data).to_bytes(4, "big") + data)

    async def aclose(self) -> None:
        """Done: the other side reads the end after what was sent. Never blocks for long, never raises a fault."""
        if isinstance(self._carrier, MuxStream):
            self._carrier.aclose()
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        """End it at once; the other side sees an error."""
        if isinstance(self._carrier, MuxStream):
            self._carrier.reset()
        elif isinstance(self._carrier, trio.SocketStream):
            self._carrier.socket.close()


# --- multistream-select 1.0: varint length, text, newline -------------------------------------------------------


def _line(text: bytes) -> bytes:
    size = len(text) + 1
    head = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
    return head + text + b"\n"


async def _read_line(stream: Stream) -> bytes:
    size = (await stream.receive_exactly(1))[0]
    if size & 128:
        size = size & 127 | (await stream.receive_exactly(1))[0] << 7
    if not 0 < size <= params.NEGOTIATE_BYTES_MAX:
        raise LimitExceeded(f"a negotiation line of {size} bytes, at most {params.NEGOTIATE_BYTES_MAX} are read")
    text = await stream.receive_exactly(size)
    if text[-1:] != b"\n":
        raise MalformedRecord("no libp2p peer: a negotiation line without its end")
    return text[:-1]


async def propose(stream: Stream, protocol: str) -> None:
    """Ask the other side to speak `protocol`. Raises RemoteProtocolError if it will not."""
    await stream.send_all(_line(MULTISTREAM) + _line(protocol.encode()))
    if await _read_line(stream) != MULTISTREAM:
        raise MalformedRecord("no libp2p peer: it does not speak multistream-select")
    if (reply := await _read_line(stream)) != protocol.encode():
        raise RemoteProtocolError(f"the peer does not speak {protocol}", why=f"it says {reply[:40]!r}")


async def answer(stream: Stream, known: Collection[str]) -> str:
    """Agree on the first of the peer's proposals that is `known`. Raises RemoteProtocolError."""
    await stream.send_all(_line(MULTISTREAM))
    if await _read_line(stream) != MULTISTREAM:
        raise MalformedRecord("no libp2p peer: it does not speak multistream-select")
    for _ in range(16):
        wanted = (await _read_line(stream)).decode("utf-8", "replace")
        if wanted in known:
            await stream.send_all(_line(wanted.encode()))
            return wanted
        await stream.send_all(_line(b"na"))
    raise RemoteProtocolError("the peer proposed 16 protocols and we speak none of them")


# --- links ------------------------------------------------------------------------------------------------------

Secure = Callable[[Stream, bool, bytes | None], Awaitable[tuple[bytes, Wire]]]


@dataclass(eq=False)
class Link:
    """One connection to an authenticated peer. `address` is where it really comes from or goes to."""

    peer: bytes
    session: Session
    address: Address
    inbound: bool

    async def open(self, protocol: str, *, bytes_max: int | None = None) -> Stream:
        """A new stream that speaks `protocol`. Raises PeerUnreachable or RemoteProtocolError."""
        try:
            carrier = await self.session.open_stream()
        except CARRIER_FAULTS as fault:
            raise PeerUnreachable(f"no stream to {short(self.peer)}", why=str(fault)) from None
        agreed = False
        try:
            stream = Stream(carrier, peer=self.peer, bytes_max=bytes_max)
            await propose(stream, protocol)
            agreed = True
            return stream
        finally:
            if not agreed:
                carrier.reset()


class _WireCarrier:
    """A Wire as a Carrier, to negotiate the muxer on; then the Wire again, with nothing lost."""

    def __init__(self, wire: Wire) -> None:
        self._wire, self._rest = wire, b""

    async def receive_some(self, bytes_max: int) -> bytes:
        data = self._rest or await self._wire.receive()
        self._rest = data[bytes_max:]
        return data[:bytes_max]

    async def send_all(self, data: bytes | memoryview) -> None:
        await self._wire.send(data)

    async def receive(self) -> bytes:
        data, self._rest = self._rest, b""
        return data or await self._wire.receive()

    async def send(self, data: bytes | memoryview, *more: bytes | memoryview) -> None:
        await self._wire.send(data, *more)

    async def aclose(self) -> None:
        await self._wire.aclose()


class Owner(Protocol):
    """What links ask of the host."""

    def admit(self, peer: bytes) -> None:
        """Raise RemoteProtocolError to refuse `peer`."""

    async def linked(self, link: Link) -> None:
        """A link is ready."""

    async def unlinked(self, link: Link) -> None:
        """A link is gone."""

    async def on_stream(self, link: Link, carrier: MuxStream) -> None:
        """The peer opened a stream. Must not raise for what the peer does."""


@dataclass(eq=False)
class Links:
    """All links of one host. `nursery` runs them; `shaper` makes them slow, to show what happens then."""

    owner: Owner
    secure: Secure
    nursery: trio.Nursery
    shaper: Shaper | None = None
    by_peer: dict[bytes, list[Link]] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)
    _inbound: Counter[str] = field(default_factory=Counter)
    _half_open: OrderedDict[trio.CancelScope, str] = field(default_factory=OrderedDict)
    _shaped: dict[ShapedSocket, bytes] = field(default_factory=dict)  # and whom they reach

    def reshape(self, shaper: Shaper) -> None:
        """From now on links are as slow as `shaper` says, also those there are. Only of a host that was opened with
        one."""
        assert self.shaper is not None, "its links have a shaper each"
        self.shaper = shaper
        for shaped, peer in self._shaped.items():
            shaped.shape = shaper.of(peer)

    async def listen(self, address: Address) -> Address:
        """Accept connections at `address`; returns it with the real port. Raises CannotListen."""
        try:
            listeners = await trio.open_tcp_listeners(address.port, host=address.host, backlog=512)
        except OSError as error:
            raise CannotListen(
                f"cannot listen at {address}: {error.strerror or error}",
                why="another program, or another daemon, has this port" if error.errno == errno.EADDRINUSE else "",
                next_step="choose another with --listen, or port 0 for any free one",
            ) from None
        port = listeners[0].socket.getsockname()[1]
        self.nursery.start_soon(trio.serve_listeners, self._accept, listeners)
        return Address(address.kind, address.host, port)

    async def dial(self, address: Address) -> Link:
        """Connect and authenticate. Raises PeerUnreachable or RemoteProtocolError within CONNECT_SECONDS_MAX."""
        assert address.peer is not None, "only addresses that say who answers are dialled"
        with trio.move_on_after(params.CONNECT_SECONDS_MAX):
            try:
                socket = await trio.open_tcp_stream(address.host, address.port)
            except OSError as error:
                raise PeerUnreachable(
                    f"nothing answers at {address}",
                    why=str(error),
                    next_step="check that the peer runs and is not behind a NAT",
                ) from None
            link: Link = await self.nursery.start(self._run, socket, address, address.peer)
            return link
        raise PeerUnreachable(
            f"{address} did not answer within {params.CONNECT_SECONDS_MAX:.0f} s",
            next_step="check the address and that no firewall drops it",
        )

    async def _accept(self, socket: trio.SocketStream) -> None:
        async with socket:
            try:
                name = socket.socket.getpeername()
            except OSError:
                return
            host = str(name[0])
            if self._inbound[host] >= params.INBOUND_PER_ADDRESS_MAX or self.count() >= params.PEERS_MAX:
                self.counters["connections_refused"] += 1
                return
            remote = Address("ip6" if ":" in host else "ip4", host, int(name[1]))
            try:
                await self._run(socket, remote, None)
            except (IchibaError, OSError, trio.TooSlowError, *CARRIER_FAULTS) as fault:
                self.counters["handshakes_failed"] += 1
                log.debug("connection from %s refused: %s", host, fault)

    @contextmanager
    def _half_open_place(self, host: str) -> Iterator[None]:
        """A place for a handshake. When an address or all of them have too many, the oldest loses its place:
        an honest peer needs milliseconds, a flood of silent connections only pushes itself out."""
        with trio.CancelScope() as scope:
            same = [other for other, place in self._half_open.items() if place == host]
            if len(same) >= params.HALF_OPEN_PER_ADDRESS_MAX:
                self._evict(same[0])
            elif len(self._half_open) >= params.HALF_OPEN_MAX:
                self._evict(next(iter(self._half_open)))
            self._half_open[scope] = host
            try:
                yield
            finally:
                self._half_open.pop(scope, None)
        if scope.cancelled_caught:
            raise LimitExceeded("too many unauthenticated connections")

    def _evict(self, scope: trio.CancelScope) -> None:
        self.counters["half_open_evicted"] += 1
        self._half_open.pop(scope)
        scope.cancel()

    async def _handshake(self, socket: Carrier, expected: bytes | None) -> tuple[bytes, Wire]:
        initiator = expected is not None
        raw = Stream(socket)
        if initiator:
            await propose(raw, NOISE)
        else:
            await answer(raw, (NOISE,))
        peer, wire = await self.secure(raw, initiator, expected)
        self.owner.admit(peer)
        if len(self.by_peer.get(peer, ())) >= params.CONNECTIONS_PER_PEER_MAX:
            raise LimitExceeded(f"{short(peer)} is connected {params.CONNECTIONS_PER_PEER_MAX} times already")
        carrier = _WireCarrier(wire)
        if initiator:
            await propose(Stream(carrier), YAMUX)
        else:
            await answer(Stream(carrier), (YAMUX,))
        return peer, carrier

    async def _run(
        self,
        socket: trio.SocketStream,
        remote: Address,
        expected: bytes | None,
        task_status: Any = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """One connection from its handshake to its end."""
        shaped = ShapedSocket(socket, self.shaper.others, random.Random()) if self.shaper is not None else None
        async with shaped or socket as carrier:
            if shaped is not None:
                self.nursery.start_soon(shaped.run)
            if expected is None:
                with self._half_open_place(remote.host), trio.fail_after(params.HANDSHAKE_SECONDS_MAX):
                    peer, wire = await self._handshake(carrier, None)
            else:
                peer, wire = await self._handshake(carrier, expected)
            if shaped is not None and self.shaper is not None:
                shaped.shape = self.shaper.of(peer)
                self._shaped[shaped] = peer
            session = Session(wire, initiator=expected is not None)
            link = Link(peer, session, remote.of(peer), inbound=expected is None)
            self._inbound[remote.host] += link.inbound
            self.by_peer.setdefault(peer, []).append(link)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(session.run)
                    nursery.start_soon(self._streams, link, nursery)
                    await self.owner.linked(link)
                    task_status.started(link)
                    await session.ended.wait()
                    # Handlers see their streams break and may finish; those that do not are cancelled.
                    nursery.cancel_scope.deadline = trio.current_time() + 1
            finally:
                self._forget(link)
                if shaped is not None:
                    del self._shaped[shaped]
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
                    await self.owner.unlinked(link)

    def _forget(self, link: Link) -> None:
        self._inbound[link.address.host] -= link.inbound
        self._inbound += Counter()  # drops what fell to zero, so addresses do not pile up
        rest = [other for other in self.by_peer[link.peer] if other is not link]
        if rest:
            self.by_peer[link.peer] = rest
        else:
            del self.by_peer[link.peer]

    async def _streams(self, link: Link, nursery: trio.Nursery) -> None:
        with suppress(trio.EndOfChannel):
            while True:
                nursery.start_soon(self.owner.on_stream, link, await link.session.accept_stream())

    def best(self, peer: bytes) -> Link | None:
        """The newest living link to `peer`."""
        alive = [link for link in self.by_peer.get(peer, ()) if not link.session.ended.is_set()]
        return alive[-1] if alive else None

    def count(self) -> int:
        """All links."""
        return sum(map(len, self.by_peer.values()))

    def drop(self, peer: bytes, reason: str) -> None:
        """End every link to `peer` now."""
        for link in self.by_peer.get(peer, ()):
            link.session.abort(reason)
