"""HTTP/1.1 on one trio stream, over h11: bounded headers, bounded bodies, bounded silence, no polling.

Promises: whatever bytes a client sends, it gets a typed refusal or a closed connection, and nothing else happens.
Refuses to know any route. h11 is used directly because hypercorn 0.18 let one malformed websocket upgrade end the
process (its connection errors reach the server's nursery); docs/decisions/0005-control-socket.md.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Final
from urllib.parse import parse_qsl

import h11
import trio

from protocol import params
from protocol.errors import IchibaError, LimitExceeded

__all__ = ["BadRequest", "ClientGone", "Exchange", "plain", "serve_connection"]

JSON: Final = "application/json"
_QUERY_FIELDS_MAX: Final = 8
_STATUS: Final = {"not-found": 404, "no-route": 404, "method": 405, "limit-exceeded": 413, "usage": 400, "busy": 503}
_LINGER_SECONDS: Final = 1.0  # a refused sender may still be writing; without this it would miss the refusal


class BadRequest(IchibaError):
    """The request itself is wrong: no HTTP, no such route, arguments of another shape."""

    code = "usage"
    exit_code = 2

    def __init__(self, what: str, *, code: str = "usage", why: str = "", next_step: str = "") -> None:
        super().__init__(what, why=why, next_step=next_step or "see docs/control.md")
        self.code = code


class ClientGone(Exception):
    """The other side closed, or fell silent for too long: no error of anybody's, people close programs."""


class Exchange:
    """One request and its answer. Handlers read the body, then answer once."""

    def __init__(self, wire: _Wire, request: h11.Request) -> None:
        self._wire = wire
        target, _, query = request.target.decode("ascii").partition("?")
        self.method, self.path = request.method.decode("ascii"), target
        self.started = False
        self._head_only = self.method == "HEAD"
        try:
            self.query = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=_QUERY_FIELDS_MAX))
        except ValueError as error:
            raise BadRequest(f"the query is malformed: {error}") from None

    async def chunks(self, bytes_max: int) -> AsyncGenerator[bytes, None]:
        """The body, in pieces. Raises LimitExceeded above `bytes_max`, ClientGone if it does not end."""
        total = 0
        while True:
            event = await self._wire.next_event(params.CONTROL_IDLE_SECONDS_MAX)
            if isinstance(event, h11.EndOfMessage):
                return
            assert isinstance(event, h11.Data), event
            total += len(event.data)
            if total > bytes_max:
                raise LimitExceeded(f"a body of more than {bytes_max} bytes")
            yield bytes(event.data)

    async def body(self, bytes_max: int) -> bytes:
        """The whole body. Raises as `chunks`."""
        return b"".join([part async for part in self.chunks(bytes_max)])

    async def answer(self, payload: Mapping[str, Any], *, status: int = 200) -> None:
        """The answer as one JSON object."""
        data = json.dumps(plain(payload)).encode("ascii") + b"\n"
        await self.start(status, JSON, length=len(data))
        await self.send(data)
        await self.end()

    async def refuse(self, error: IchibaError) -> None:
        """The answer is an error: {"error": {code, what, why, next, exit_code}}. Too late once one has started."""
        if self.started:
            raise ClientGone
        told = {**error.as_dict(), "exit_code": error.exit_code}
        await self.answer({"error": told}, status=_STATUS.get(error.code, 422))

    async def start(self, status: int, content_type: str, *, length: int | None = None) -> None:
        """Begin an answer by hand; without a length it is chunked. `send` and `end` follow."""
        headers = [("content-type", content_type), ("cache-control", "no-store")]
        if length is not None:
            headers.append(("content-length", str(length)))
        if not self._wire.has_read_all:
            headers.append(("connection", "close"))
        self.started = True
        await self._wire.send(h11.Response(status_code=status, headers=headers))

    async def send(self, data: bytes) -> None:
        """A part of the answer. Raises ClientGone if nobody reads it."""
        if not self._head_only:
            await self._wire.send(h11.Data(data=data))

    async def end(self) -> None:
        """The answer is complete."""
        await self._wire.send(h11.EndOfMessage())

    async def until_gone(self) -> None:
        """Return when the client closes its side: what a follower that waits for news watches."""
        while await self._wire.receive():
            pass


Handler = Callable[[Exchange], Awaitable[None]]


class _Wire:
    """One connection's h11 state machine and its stream."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self.machine = h11.Connection(h11.SERVER, max_incomplete_event_size=params.CONTROL_HEADER_BYTES_MAX)

    async def receive(self) -> bytes:
        try:
            return bytes(await self.stream.receive_some(params.CONTROL_CHUNK_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise ClientGone from None

    async def next_event(self, seconds: float) -> h11.Event:
        """The next h11 event. Raises ClientGone after `seconds` of silence, h11.RemoteProtocolError for no HTTP."""
        if self.machine.they_are_waiting_for_100_continue:
            await self.send(h11.InformationalResponse(status_code=100, headers=[]))
        while (event := self.machine.next_event()) is h11.NEED_DATA:
            data = None
            with trio.move_on_after(seconds):
                data = await self.receive()
            if data is None:
                raise ClientGone
            self.machine.receive_data(data)
        if isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            raise ClientGone
        return event  # type: ignore[return-value]

    async def send(self, event: h11.Event) -> None:
        """Raises ClientGone if the client is gone or does not read."""
        data = self.machine.send(event)
        if not data:
            return
        with trio.move_on_after(params.CONTROL_IDLE_SECONDS_MAX) as scope:
            try:
                await self.stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                raise ClientGone from None
        if scope.cancelled_caught:
            raise ClientGone

    @property
    def has_read_all(self) -> bool:
        """Whether the body of the request was read to its end; then the connection may carry another."""
        return self.machine.their_state is h11.DONE

    async def request(self, seconds: float) -> h11.Request:
        """The next request's head, all of it within `seconds`: a trickle of bytes does not hold a connection."""
        with trio.move_on_after(seconds):
            event = await self.next_event(seconds)
            assert isinstance(event, h11.Request), event
            return event
        raise ClientGone

    async def linger(self) -> None:
        """Read on for a moment what a refused client still sends, so that it gets to read the refusal."""
        try:
            await self.stream.send_eof()
            with trio.move_on_after(_LINGER_SECONDS):
                while await self.receive():
                    pass
        except (trio.BrokenResourceError, trio.ClosedResourceError, ClientGone):
            pass


async def serve_connection(stream: trio.abc.HalfCloseableStream, handler: Handler, *, busy: bool = False) -> None:
    """Serve requests on `stream`, one after the other, and close it. busy: refuse the first and close.

    `handler` may raise IchibaError or OSError: both are told to the client. Anything else is a bug and goes up.
    """
    wire = _Wire(stream)
    async with stream:
        seconds = params.CONTROL_HEADER_SECONDS_MAX
        try:
            while await _serve_one(wire, handler, seconds, busy):
                wire.machine.start_next_cycle()
                seconds = params.CONTROL_KEEP_SECONDS_MAX
            await wire.linger()
        except ClientGone:
            return


async def _serve_one(wire: _Wire, handler: Handler, seconds: float, busy: bool) -> bool:
    """One exchange. True if the connection may carry another. Raises ClientGone."""
    exchange: Exchange | None = None
    try:
        try:
            exchange = Exchange(wire, await wire.request(seconds))
            if busy:
                raise BadRequest(
                    f"{params.CONTROL_CONNECTIONS_MAX} connections are open", code="busy", next_step="close some"
                )
            await handler(exchange)
        except h11.RemoteProtocolError as error:
            raise BadRequest(f"this is no HTTP/1.1: {error}"[:200]) from None
        except OSError as error:
            raise IchibaError(f"the daemon could not do that: {error.strerror or error}") from None
    except IchibaError as error:
        await _refuse(wire, exchange, error)
    return wire.machine.our_state is h11.DONE and wire.has_read_all


async def _refuse(wire: _Wire, exchange: Exchange | None, error: IchibaError) -> None:
    if exchange is not None:
        await exchange.refuse(error)
        return
    # There is no request to answer: after bytes that are no HTTP the machine still lets us send one response.
    if wire.machine.our_state in (h11.IDLE, h11.SEND_RESPONSE):
        told = {"error": {**error.as_dict(), "exit_code": error.exit_code}}
        data = json.dumps(told).encode("ascii") + b"\n"
        headers = [("content-type", JSON), ("content-length", str(len(data))), ("connection", "close")]
        await wire.send(h11.Response(status_code=400, headers=headers))
        await wire.send(h11.Data(data=data))
        await wire.send(h11.EndOfMessage())


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: bytes become hex."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value
