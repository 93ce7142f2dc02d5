"""Links between the units of a run: payloads carried between daemons, over streams of /ichiba/<tag>/tensor/1.

Promises: what is handed over arrives once, at whoever has the unit by the word of the run, and comes from nobody else;
a lost stream is made anew and goes on where it was; everything sent is kept until it is released, so whoever gets a
lost unit is sent all of it again; memory is bounded at both ends, and a slow reader slows the writer down; what is
waited for, and since when, can be asked at any time. Refuses to know what the payloads mean, and how its peers came to
have their units: by a deal, or otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final, Protocol

import trio

from peer.links import Stream
from peer.payload_shelf import PayloadShelf
from peer.tensor_port import Difference, Place, TensorPort, Waiting
from peer.tensor_state import Expected, Seat, expected_of, receivers_of
from peer.tensor_wire import PROTOCOL, Greeting, Hello, Refusal
from protocol import params
from protocol.codec import decode, encode
from protocol.errors import IchibaError, LocalProtocolError
from protocol.payload import PayloadKey

__all__ = [
    "PROTOCOL",
    "Difference",
    "Expected",
    "Place",
    "Seat",
    "TensorHost",
    "TensorLinks",
    "TensorPort",
    "Waiting",
    "expected_of",
    "receivers_of",
]

log = logging.getLogger(__name__)
HELLO_BYTES_MAX: Final = 1024


class TensorHost(Protocol):
    """What links need of a host (peer.host.Host)."""

    peer: bytes

    async def open_stream(self, peer: bytes, protocol_name: str, *, bytes_max: int | None = None) -> Stream:
        """A stream to `peer`."""

    def penalise(self, peer: bytes, reason: str) -> None:
        """Count a penalty."""


class TensorLinks:
    """All ports of one daemon. The daemon says `host.serve(PROTOCOL, links.serve)`. directory: for what memory does not
    hold. nursery: runs the streams."""

    def __init__(self, host: TensorHost, directory: Path, nursery: trio.Nursery) -> None:
        self._host, self._directory, self._nursery = host, directory, nursery
        self._ports: dict[tuple[bytes, int], TensorPort] = {}

    def open(
        self,
        place: Place,
        seats: Mapping[int, Seat],
        *,
        have: Collection[PayloadKey] = (),
        window_bytes: int = params.TENSOR_WINDOW_BYTES,
        queue_bytes: int = params.TENSOR_QUEUE_BYTES,
        memory_bytes: int = params.TENSOR_MEMORY_BYTES,
    ) -> TensorPort:
        """The port of one unit, until it is closed, by `close` or the end of a `with` block.

        seats: who has the other units, as far as it is known; more come by `TensorPort.replace`. have: what the worker
        was given before this daemon started, and its tape holds. Raises LocalProtocolError for a unit that has one.
        """
        at = (place.run, place.unit)
        if at in self._ports and not self._ports[at].closed:
            raise LocalProtocolError(f"unit {place.unit} of run {place.run.hex()[:12]} has a port already")
        port = self._ports[at] = TensorPort(
            place, seats, open_stream=self._open_stream, penalise=self._host.penalise,
            shelf=PayloadShelf(self._directory, memory_bytes_max=memory_bytes), have=have,
            window_bytes=window_bytes, queue_bytes=queue_bytes,
        )  # fmt: skip
        self._nursery.start_soon(self._run, at, port)
        return port

    async def _run(self, at: tuple[bytes, int], port: TensorPort) -> None:
        try:
            await port.run()
        finally:
            port.close()
            if self._ports.get(at) is port:
                del self._ports[at]

    def ports(self) -> dict[tuple[bytes, int], TensorPort]:
        """By run and unit."""
        return dict(self._ports)

    async def serve(self, peer: bytes, stream: Stream) -> None:
        """The handler for `host.serve(PROTOCOL, links.serve)`. Raises RemoteProtocolError for what no peer may do."""
        with trio.fail_after(params.NEGOTIATE_SECONDS_MAX):
            said = await stream.receive_frame(HELLO_BYTES_MAX)
        hello = decode(Hello, said or b"", bytes_max=HELLO_BYTES_MAX)
        port = self._ports.get((hello.run, hello.to))
        if port is not None and port.closed:
            port = None
        # Neither is a crime: a run begins and ends at its peers at different times, and so is a unit given away.
        refused: Refusal = "unknown-run" if port is None else "" if port.admits(hello, peer) else "not-yours"
        if port is None or refused:
            with trio.fail_after(params.NEGOTIATE_SECONDS_MAX):
                return await stream.send_frame(encode(Greeting(refused=refused)))
        return await port.receive(hello, peer, stream)

    async def _open_stream(self, peer: bytes) -> Stream:
        if peer != self._host.peer:
            return await self._host.open_stream(peer, PROTOCOL)
        # Two units of one run at one peer: the same protocol, without the network.
        await trio.lowlevel.checkpoint()
        near, far = trio.socket.socketpair()

        async def serve() -> None:
            async with trio.SocketStream(far) as socket:
                try:
                    await self.serve(self._host.peer, Stream(socket, peer=self._host.peer))
                except (OSError, IchibaError, trio.TooSlowError) as fault:  # a disk's is told to the port's keeper
                    log.info("a link of this peer to itself ended: %s", fault)

        self._nursery.start_soon(serve)
        return Stream(trio.SocketStream(near), peer=self._host.peer)
