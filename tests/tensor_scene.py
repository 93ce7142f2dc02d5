"""Ports of a run in one process, on a network that can be cut: memory streams, and whatever clock the test has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio
import trio.testing

from peer.links import PeerUnreachable, Stream
from peer.tensor_links import Expected, Place, Seat, TensorLinks, TensorPort
from protocol.errors import RemoteProtocolError
from protocol.payload import PayloadKey
from protocol.stage import Flow

RUN = b"r" * 32
STEPS = range(1000)
SECONDS_MAX = 30


def peer(unit: int, epoch: int = 0) -> bytes:
    """A key for who has a unit."""
    return bytes([unit + 1, epoch]) * 16


def key(step: int, *, index: int = 0, unit: int = 0, flow: Flow = "forward", micro_batch: int = 0) -> PayloadKey:
    """A key."""
    return PayloadKey(step, flow, micro_batch, index, unit)


def expected(count: int = 8, *, bytes_max: int = 1 << 22, flow: Flow = "forward") -> Expected:
    """`count` tensors in each of two micro-batches."""
    places = frozenset((flow, micro_batch, index) for micro_batch in range(2) for index in range(count))
    return Expected(places, 4, STEPS, bytes_max)


def place(unit: int, *, to: set[int] | None = None, comes: dict[int, Expected] | None = None, epoch: int = 0) -> Place:
    """The place of a unit."""
    return Place(RUN, unit, epoch, frozenset(to or ()), comes or {})


@dataclass(eq=False)
class Net:
    """Hosts by key; `cut` says whom nobody reaches, `streams` can be broken, `penalties` are noted."""

    nursery: trio.Nursery
    hosts: dict[bytes, NetHost] = field(default_factory=dict)
    cut: set[bytes] = field(default_factory=set)
    streams: list[trio.StapledStream[trio.abc.SendStream, trio.abc.ReceiveStream]] = field(default_factory=list)
    penalties: list[tuple[bytes, str]] = field(default_factory=list)
    opened: int = 0

    def host(self, name: bytes, directory: Path) -> TensorLinks:
        """The links of a new daemon."""
        host = self.hosts[name] = NetHost(self, name)
        host.links = TensorLinks(host, directory, self.nursery)
        return host.links

    async def break_streams(self) -> None:
        """Every stream there is breaks at both ends."""
        for stream in self.streams:
            await trio.aclose_forcefully(stream)
        self.streams.clear()


@dataclass(eq=False)
class NetHost:
    """A host of the Net."""

    net: Net
    peer: bytes
    links: TensorLinks | None = None

    async def open_stream(self, peer: bytes, protocol_name: str, *, bytes_max: int | None = None) -> Stream:
        """A memory stream to a host that is there."""
        assert protocol_name == "tensor"
        assert bytes_max is None
        await trio.lowlevel.checkpoint()
        other = self.net.hosts.get(peer)
        if other is None or peer in self.net.cut or self.peer in self.net.cut:
            raise PeerUnreachable("it is cut off")
        near, far = trio.testing.memory_stream_pair()
        self.net.streams += [near, far]
        self.net.opened += 1
        self.net.nursery.start_soon(other.serve, self.peer, far)
        return Stream(near, peer=peer)

    async def serve(self, peer: bytes, far: trio.StapledStream[trio.abc.SendStream, trio.abc.ReceiveStream]) -> None:
        """As Host.on_stream."""
        assert self.links is not None
        try:
            await self.links.serve(peer, Stream(far, peer=peer))
        except RemoteProtocolError as fault:
            self.net.penalties.append((peer, fault.code))
        except (PeerUnreachable, trio.TooSlowError):
            pass
        finally:
            await trio.aclose_forcefully(far)

    def penalise(self, peer: bytes, reason: str) -> None:
        """Note it."""
        self.net.penalties.append((peer, reason))


@asynccontextmanager
async def open_net() -> AsyncIterator[Net]:
    """A Net until the block ends; at most SECONDS_MAX of real time on a real clock."""
    async with trio.open_nursery() as nursery:
        yield Net(nursery)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def pair(net: Net, directory: Path, **sizes: int) -> AsyncIterator[tuple[TensorPort, TensorPort]]:
    """Unit 0, which sends to unit 1."""
    seats = {unit: Seat(peer(unit)) for unit in (0, 1)}
    places = (place(0, to={1}), place(1, comes={0: expected()}))
    one, two = (net.host(peer(where.unit), directory).open(where, seats, **sizes) for where in places)
    with one, two:
        yield one, two
