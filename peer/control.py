"""The control socket: what the owner of a daemon may ask of it, as HTTP on a Unix socket only the owner can open.

Promises: arguments are checked here, field by field, before the node sees them; a follower gets every event of a job
once and in order, however slowly it reads; an upload that fails leaves nothing behind. Refuses to know what commands
mean (peer/commands.py) and how people see them (peer/cli.py). docs/control.md lists the routes.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Protocol

import msgspec
import trio

from peer.control_http import BadRequest, ClientGone, Exchange, plain, serve_connection
from peer.control_verbs import VERBS
from peer.socket_name import socket_name
from protocol import params
from protocol.errors import IchibaError, NotFound
from protocol.sealing import Keys

__all__ = ["ControlledDaemon", "decode_command", "serve_control"]

log = logging.getLogger(__name__)

class _Connect(msgspec.Struct, forbid_unknown_fields=True):
    address: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class Blobs(Protocol):
    """What the control socket needs of the blob store (peer/blobs.py)."""

    def has(self, blob: bytes) -> bool:
        """Whether the whole blob is here."""

    def path(self, blob: bytes) -> Path:
        """Where its bytes are. Raises NotFound."""

    async def put_file(self, path: Path, *, keys: Keys | None = None) -> bytes:
        """Store a copy of a file; its id. keys: of the sealed job that it is for."""


class ControlledDaemon(Protocol):
    """What the control socket needs of the daemon (peer/daemon.py)."""

    @property
    def blobs(self) -> Blobs:
        """The blob store."""

    async def command(self, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """One verb of peer/commands.py, answered after all inputs before it are committed. Raises IchibaError."""

    def subscribe(self, job: str | None) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[dict[str, Any]]]:
        """Live events from now on."""

    def history(self, job: str | None, since: int = 0) -> list[dict[str, Any]]:
        """Past events with a `seq` above `since`, oldest first."""

    async def connect(self, address_or_invite: str) -> dict[str, Any]:
        """Dial another peer. Raises IchibaError."""

    def invite(self) -> str:
        """What another peer's `--peer` takes. Raises IchibaError."""

    def doctor(self) -> list[dict[str, Any]]:
        """Checks of the running daemon."""

    def stop(self) -> None:
        """Ask it to end."""


def decode_command(verb: str, body: bytes) -> dict[str, Any]:
    """The arguments of `verb` from a JSON body (empty: none), every field checked. Raises BadRequest."""
    kind = VERBS.get(verb)
    if kind is None:
        raise BadRequest(f"no command {verb[:40]!r}", code="no-route", next_step=f"one of: {', '.join(sorted(VERBS))}")
    return msgspec.to_builtins(_decode(kind, body, verb))


def _decode(kind: type[msgspec.Struct], body: bytes, what: str) -> msgspec.Struct:
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"{what}: {error}"[:300]) from None


# --- routes ------------------------------------------------------------------------------------------------
_BLOB: Final = re.compile(r"/v1/blobs/([0-9a-f]{64})")
_COMMAND: Final = re.compile(r"/v1/command/([a-z-]{1,32})")


@dataclass
class _Desk:
    """The routes of one daemon. `uploads` is a directory of its own, emptied at the start."""

    daemon: ControlledDaemon
    uploads: Path
    count: int = 0
    open: int = 0
    routes: dict[tuple[str, str], Callable[[Exchange], Awaitable[None]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.routes = {
            ("PUT", "/v1/blobs"): self.put_blob,
            ("GET", "/v1/events"): self.events,
            ("POST", "/v1/connect"): self.connect,
            ("GET", "/v1/invite"): self.invite,
            ("GET", "/v1/doctor"): self.doctor,
            ("POST", "/v1/stop"): self.stop,
        }

    async def serve(self, stream: trio.SocketStream) -> None:
        """One connection."""
        self.open += 1
        try:
            await serve_connection(stream, self.handle, busy=self.open > params.CONTROL_CONNECTIONS_MAX)
        finally:
            self.open -= 1

    async def handle(self, exchange: Exchange) -> None:
        """One request. Raises IchibaError for what is refused."""
        route = self.routes.get((exchange.method, exchange.path))
        command, blob = _COMMAND.fullmatch(exchange.path), _BLOB.fullmatch(exchange.path)
        if exchange.method == "GET":
            await exchange.body(0)
        if route is not None:
            await route(exchange)
        elif command is not None and exchange.method == "POST":
            arguments = decode_command(command[1], await exchange.body(params.CONTROL_BODY_BYTES_MAX))
            await exchange.answer(await self.daemon.command(command[1], arguments))
        elif blob is not None and exchange.method == "GET":
            await self.get_blob(exchange, bytes.fromhex(blob[1]))
        elif command or blob or any(path == exchange.path for _, path in self.routes):
            raise BadRequest(f"{exchange.path} takes no {exchange.method[:16]}", code="method")
        else:
            raise BadRequest(f"no route {exchange.path[:80]}", code="no-route")

    # --- blobs ---------------------------------------------------------------------------------------------
    async def put_blob(self, exchange: Exchange) -> None:
        """Store the body; answers its id and size. With sealed=1 no peer gets it before a sealed job names it."""
        if not set(exchange.query) <= {"sealed"} or exchange.query.get("sealed", "0") not in ("0", "1"):
            raise BadRequest("a blob takes sealed=1 or nothing", next_step="PUT /v1/blobs?sealed=1")
        keys = Keys() if exchange.query.get("sealed") == "1" else None
        self.count += 1
        part = self.uploads / f"{self.count}.part"
        size = 0
        try:
            async with (
                await trio.open_file(part, "xb", buffering=0) as file,
                aclosing(exchange.chunks(params.BLOB_BYTES_MAX)) as chunks,
            ):
                async for chunk in chunks:
                    size += len(chunk)
                    left = memoryview(chunk)
                    while left:
                        left = left[await file.write(left) :]
            blob = await self.daemon.blobs.put_file(part, keys=keys)
        finally:
            part.unlink(missing_ok=True)
        await exchange.answer({"blob": blob, "size": size})

    async def get_blob(self, exchange: Exchange, blob: bytes) -> None:
        """The bytes of a blob."""
        if not self.daemon.blobs.has(blob):
            raise NotFound(f"no blob {blob.hex()[:12]} here", next_step="`ichiba job show JOB` says where a job stands")
        async with await trio.open_file(self.daemon.blobs.path(blob), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            await exchange.start(200, "application/octet-stream", length=size)
            while part := await file.read(params.CONTROL_CHUNK_BYTES):
                await exchange.send(part)
            await exchange.end()

    # --- events --------------------------------------------------------------------------------------------
    async def events(self, exchange: Exchange) -> None:
        """JSON lines: what has happened, and with follow=1 what happens from then on, until the client leaves."""
        query = exchange.query
        if not set(query) <= {"job", "follow", "since"} or query.get("follow", "0") not in ("0", "1"):
            raise BadRequest(f"{exchange.path} takes job, since and follow=1", why=str(sorted(query))[:200])
        since = query.get("since", "0")
        if not re.fullmatch("[0-9]{1,19}", since, re.ASCII):
            raise BadRequest("since is the seq of an event, a number")
        job = query.get("job") or None
        if job is not None:
            job = str((await self.daemon.command("job", decode_command("job", _as_json(job))))["job"])
        follow = query.get("follow") == "1"
        async with self.daemon.subscribe(job) as channel:
            past = await self._past(job, int(since))
            await exchange.start(200, "application/x-ndjson")
            if not follow:
                await exchange.send(_lines(past))
                await exchange.end()
                return
            await exchange.send(_lines(past))
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_leave_with_client, exchange, nursery.cancel_scope)
                    async for batch in self._live(channel, job, past[-1]["seq"] if past else int(since)):
                        await exchange.send(_lines(batch))
                    nursery.cancel_scope.cancel()
            except* ClientGone:
                pass
            except* (IchibaError, OSError) as faults:
                log.warning("a follower is cut off: %s", faults.exceptions)
        raise ClientGone  # an answer of no known length ends with its connection

    async def _past(self, job: str | None, since: int) -> list[dict[str, Any]]:
        """The history, with everything in it that was told to listeners before this call."""
        if job is None:
            return self.daemon.history(None, since)
        # Listeners may be told before the disk has it. A command is answered only after all inputs before it are
        # committed, so this one makes sure that no event falls between the history and the live channel.
        await self.daemon.command("job", {"job": job})
        # A long log is thousands of rows from the disk: not on the daemon's thread.
        return await trio.to_thread.run_sync(self.daemon.history, job, since)

    async def _live(
        self, channel: trio.MemoryReceiveChannel[dict[str, Any]], job: str | None, last: int
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """Events after seq `last`, in order and once each, in batches of what came together.

        The daemon drops what a full channel cannot take. Only this reader empties it, so a channel found full may
        have lost something, and one found not full has not; then the history says what it was.
        """
        while True:
            try:
                batch = [await channel.receive()]
            except trio.EndOfChannel:
                return
            full = channel.statistics().current_buffer_used + 1 >= channel.statistics().max_buffer_size
            with suppress(trio.WouldBlock, trio.EndOfChannel):
                while True:
                    batch.append(channel.receive_nowait())
            if full and job is not None:
                known = {event["seq"]: event for event in [*await self._past(job, last), *batch]}
                batch = [known[seq] for seq in sorted(known)]
            # What was in the history when we asked may come again on the channel.
            batch = [event for event in batch if event["seq"] > last]
            if batch:
                last = batch[-1]["seq"]
                yield batch

    # --- the daemon itself ---------------------------------------------------------------------------------
    async def connect(self, exchange: Exchange) -> None:
        """Dial a peer."""
        given = _decode(_Connect, await exchange.body(params.CONTROL_BODY_BYTES_MAX), "connect")
        assert isinstance(given, _Connect)
        await exchange.answer(await self.daemon.connect(given.address))

    async def invite(self, exchange: Exchange) -> None:
        """An invite to this peer."""
        await exchange.answer({"invite": self.daemon.invite()})

    async def doctor(self, exchange: Exchange) -> None:
        """The daemon's own checks."""
        await exchange.answer({"lines": self.daemon.doctor()})

    async def stop(self, exchange: Exchange) -> None:
        """End the daemon, after the answer is out."""
        await exchange.body(params.CONTROL_BODY_BYTES_MAX)
        await exchange.answer({"stopping": True})
        self.daemon.stop()


async def _leave_with_client(exchange: Exchange, scope: trio.CancelScope) -> None:
    """A follower is let go when it closes its side: nothing else tells us while there is no news."""
    await exchange.until_gone()
    scope.cancel()


def _as_json(job: str) -> bytes:
    return msgspec.json.encode({"job": job})


def _lines(events: list[dict[str, Any]]) -> bytes:
    return b"".join(msgspec.json.encode(plain(event)) + b"\n" for event in events)


# --- the socket --------------------------------------------------------------------------------------------
def _listen(path: Path) -> socket.socket:
    """A listening socket at `path` that only its owner can open. Replaces one whose daemon is dead."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise IchibaError(f"{path} is in the way of the control socket", next_step=f"move {path} away")
        path.unlink()  # the data directory's lock was taken before: nobody serves it
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    old_mask = os.umask(0o177)
    try:
        with socket_name(path) as name:
            listening.bind(name)
    except OSError as error:
        listening.close()
        raise IchibaError(f"no control socket can be made at {path}: {error.strerror}") from None
    finally:
        os.umask(old_mask)
    listening.listen(params.CONTROL_CONNECTIONS_MAX)
    return listening


async def serve_control(daemon: ControlledDaemon, path: Path, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    """Serve `daemon` on a Unix socket at `path` (mode 0600) until cancelled. Raises IchibaError if it cannot be made.

    Costs nothing while nobody calls: every wait is for bytes or for an event.
    """
    uploads = path.parent / "uploads"
    uploads.mkdir(mode=0o700, exist_ok=True)
    for leftover in uploads.glob("*.part"):
        leftover.unlink()
    desk = _Desk(daemon, uploads)
    listening = _listen(path)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
    try:
        task_status.started()  # the socket listens: a call made now waits in its backlog
        await trio.serve_listeners(desk.serve, [listener])
    finally:
        path.unlink(missing_ok=True)  # noqa: ASYNC240 - must happen under cancellation too
