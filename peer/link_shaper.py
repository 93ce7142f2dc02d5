"""A slow link on a fast machine: delay, bandwidth and jitter of what one connection sends, for demonstrations and
benchmarks. It sits at the raw socket, so gossip, blobs and tensors all pass through it.

Each end shapes what it sends, so a link is slow both ways when both daemons are told. A token bucket says when a byte
has left, a delay line when it arrives; order is kept, as TCP keeps it. Nothing is lost: a loss shows on TCP as
jitter. Refuses to be a network: it knows no congestion, and two links of a peer do not share its bandwidth.
"""

from __future__ import annotations

import random
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

import trio

from protocol.errors import LocalProtocolError
from protocol.keys import peer_key

__all__ = ["Shape", "ShapedSocket", "Shaper", "Socket", "parse_shaper"]

CHUNK_BYTES: Final = 8 * 1024  # leaves at one moment: 6.5 ms at 10 Mbit/s
BUFFER_SECONDS: Final = 0.05  # of the rate, that may wait to leave: a small buffer, as a well-kept router has
BUFFER_BYTES_MIN: Final = 64 * 1024
FLIGHT_BYTES_MAX: Final = 64 * 1024**2  # in the delay line: 1 Gbit/s for half a second
FAULTS: Final = (trio.BrokenResourceError, trio.ClosedResourceError)


@dataclass(frozen=True)
class Shape:
    """delay_s: one way. bytes_per_second: 0 for no bound. jitter_s: added to the delay, evenly between 0 and this."""

    delay_s: float = 0.0
    bytes_per_second: float = 0.0
    jitter_s: float = 0.0

    def words(self) -> str:
        """As `parse_shaper` reads it."""
        rate = f",{self.bytes_per_second * 8 / 1e6:g}mbit" if self.bytes_per_second else ""
        jitter = f",jitter={1000 * self.jitter_s:g}ms" if self.jitter_s else ""
        return f"{1000 * self.delay_s:g}ms{rate}{jitter}"


@dataclass(frozen=True)
class Shaper:
    """The shapes of a host's links: by peer, and of all others."""

    others: Shape = Shape()
    by_peer: dict[bytes, Shape] = field(default_factory=dict)

    def of(self, peer: bytes) -> Shape:
        """The shape of what is sent to `peer`."""
        return self.by_peer.get(peer, self.others)


def parse_shaper(text: str) -> Shaper:
    """A Shaper from words such as `50ms,100mbit,jitter=5ms;12D3KooW...=10mbit,200ms`: of all peers, then of some.

    Raises LocalProtocolError for words that are none.
    """
    others, by_peer = Shape(), {}
    for part in filter(None, text.split(";")):
        if part.startswith("12D3"):
            name, _, words = part.partition("=")
            by_peer[peer_key(name)] = _shape(words)
        else:
            others = _shape(part)
    return Shaper(others, by_peer)


def _shape(words: str) -> Shape:
    delay_s = rate = jitter_s = 0.0
    for word in filter(None, words.replace(" ", "").split(",")):
        try:
            if word.startswith("jitter=") and word.endswith("ms"):
                jitter_s = float(word[7:-2]) / 1000
            elif word.endswith("ms"):
                delay_s = float(word[:-2]) / 1000
            elif word.endswith("mbit"):
                rate = float(word[:-4]) * 1e6 / 8
            else:
                raise ValueError
        except ValueError:
            raise LocalProtocolError(
                f"{word!r} shapes no link", next_step="write as in `50ms,100mbit,jitter=5ms`"
            ) from None
    if not (0 <= delay_s <= 60 and 0 <= jitter_s <= 60 and 0 <= rate < 1e12):
        raise LocalProtocolError(f"no link is like {words!r}", why="delays are at most a minute")
    return Shape(delay_s, rate, jitter_s)


class Socket(Protocol):
    """What a link needs of its socket (trio.SocketStream)."""

    async def send_all(self, data: bytes | memoryview) -> None:
        """Send all of `data`."""

    async def receive_some(self, bytes_max: int) -> bytes:
        """Some bytes, none at the end."""

    async def aclose(self) -> None:
        """Close it."""


class ShapedSocket:
    """A socket whose sending side is shaped. `run` moves the bytes until it is closed; `shape` may change meanwhile."""

    def __init__(self, socket: Socket, shape: Shape, rng: random.Random) -> None:
        self.shape = shape
        self._socket, self._rng = socket, rng
        self._line: deque[tuple[float, float, bytes]] = deque()  # when it has left, when it arrives, what
        self._bytes = 0
        self._left_at = self._arrives_at = 0.0
        self._changed = trio.lowlevel.ParkingLot()
        self._fault: Exception | None = None
        self._scope = trio.CancelScope()

    async def __aenter__(self) -> ShapedSocket:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def receive_some(self, bytes_max: int) -> bytes:
        """As the socket does."""
        return await self._socket.receive_some(bytes_max)

    async def send_all(self, data: bytes | memoryview) -> None:
        """Put `data` on its way; waits as a full socket does. Raises what the socket raised."""
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        while len(view):
            await self._room()
            chunk, view = bytes(view[:CHUNK_BYTES]), view[CHUNK_BYTES:]
            now, shape = trio.current_time(), self.shape
            spent_s = len(chunk) / shape.bytes_per_second if shape.bytes_per_second else 0.0
            self._left_at = max(self._left_at, now) + spent_s
            late_s = shape.delay_s + (self._rng.uniform(0, shape.jitter_s) if shape.jitter_s else 0.0)
            self._arrives_at = max(self._arrives_at, self._left_at + late_s)
            self._line.append((self._left_at, self._arrives_at, chunk))
            self._bytes += len(chunk)
            self._changed.unpark_all()

    async def _room(self) -> None:
        while True:
            if self._fault is not None:
                raise trio.BrokenResourceError(str(self._fault)) from None
            rate = self.shape.bytes_per_second
            excess_s = self._left_at - trio.current_time() - max(BUFFER_SECONDS, BUFFER_BYTES_MIN / rate if rate else 0)
            if self._bytes > FLIGHT_BYTES_MAX:
                await self._changed.park()
            elif excess_s > 1e-6:  # a smaller one may not move the clock at all
                await trio.sleep(excess_s)
            else:
                return

    async def run(self) -> None:
        """Deliver what is due, in order, until closed."""
        with self._scope:
            while True:
                while not self._line:
                    await self._changed.park()
                await trio.sleep_until(self._line[0][1])
                now, due = trio.current_time(), []
                while self._line and self._line[0][1] <= now:
                    due.append(self._line.popleft()[2])
                try:
                    await self._socket.send_all(b"".join(due))
                except FAULTS as fault:
                    self._fault = fault
                    self._line.clear()
                    self._bytes = 0
                self._bytes -= sum(map(len, due)) if self._fault is None else 0
                self._changed.unpark_all()

    async def aclose(self) -> None:
        """Let what is on its way arrive, if that does not take long; then close."""
        patience_s = self.shape.delay_s + self.shape.jitter_s + 1
        with trio.CancelScope(shield=True, deadline=trio.current_time() + patience_s):
            while self._line and self._fault is None:
                await self._changed.park()
        self._scope.cancel()
        self._fault = self._fault or trio.ClosedResourceError("closed")
        self._changed.unpark_all()
        with suppress(*FAULTS):
            await self._socket.aclose()
