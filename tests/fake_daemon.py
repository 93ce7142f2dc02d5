"""A daemon with nothing behind it but a store of blobs and a list of events: what stands behind the control socket
in the tests of the socket, the client and the command line."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from peer.blobs import BlobStore
from peer.control import serve_control
from protocol.errors import IchibaError, InsufficientFunds, NotFound

JOB = "ab" * 32
Answer = Callable[[dict[str, Any]], dict[str, Any]]


class FakeDaemon:
    """Commands answer from a table of functions; events are whatever a test `tell`s."""

    def __init__(self, directory: Path, *, listener_events_max: int = 4096) -> None:
        self.blobs = BlobStore(directory / "blobs", 1 << 30)
        self.answers: dict[str, Answer] = {"job": self._job, "submit": self._poor}
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.past: list[dict[str, Any]] = []
        self.late: list[dict[str, Any]] = []  # told, but not yet in the history: it is in it after a command
        self.listeners: list[tuple[str | None, trio.MemorySendChannel[dict[str, Any]]]] = []
        self.listener_events_max = listener_events_max
        self.stopped = trio.Event()
        self.lines: list[dict[str, Any]] = []
        self.on_history: Callable[[], None] = lambda: None
        self.connected: list[str] = []

    @staticmethod
    def _job(arguments: dict[str, Any]) -> dict[str, Any]:
        if not JOB.startswith(arguments["job"]):
            raise NotFound("no jobs match", next_step="`ichiba job ls` lists their ids")
        return {"job": JOB, "raw": b"\xff\x00"}

    @staticmethod
    def _poor(arguments: dict[str, Any]) -> dict[str, Any]:
        raise InsufficientFunds("the budget is 5, 3 are free", why="poor", next_step="see `ichiba wallet`")

    async def command(self, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answer from the table; by then everything told is in the history."""
        self.seen.append((verb, arguments))
        await trio.lowlevel.checkpoint()
        self.past += self.late
        self.late.clear()
        return self.answers[verb](arguments) if verb in self.answers else {"verb": verb}

    @asynccontextmanager
    async def subscribe(self, job: str | None) -> AsyncIterator[trio.MemoryReceiveChannel[dict[str, Any]]]:
        """As peer/daemon.py: a full channel loses the newest."""
        send, receive = trio.open_memory_channel[dict[str, Any]](self.listener_events_max)
        self.listeners.append((job, send))
        try:
            yield receive
        finally:
            self.listeners.remove((job, send))
            send.close()

    def history(self, job: str | None, since: int = 0) -> list[dict[str, Any]]:
        """Past events of a job."""
        found = [event for event in self.past if event["job"] == job and event["seq"] > since]
        self.on_history()
        return found

    def tell(self, seq: int, kind: str = "step", *, late: bool = False, job: str | None = JOB, **data: Any) -> None:
        """An event happens. late: its row is not on the disk yet."""
        event = {"seq": seq, "time_ns": seq, "kind": kind, "job": job, **data}
        (self.late if late else self.past).append(event)
        for wanted, channel in self.listeners:
            if wanted is None or wanted == job:
                with suppress(trio.WouldBlock):
                    channel.send_nowait(event)

    async def connect(self, address_or_invite: str) -> dict[str, Any]:
        """Note it."""
        self.connected.append(address_or_invite)
        return {"connected": address_or_invite}

    def invite(self) -> str:
        """A word."""
        return "ichiba1qqq"

    def doctor(self) -> list[dict[str, Any]]:
        """Whatever the test wants."""
        return self.lines

    def stop(self) -> None:
        """End `running`."""
        self.stopped.set()


@contextmanager
def running(daemon_dir: Path, prepare: Callable[[FakeDaemon], None] = lambda daemon: None) -> Iterator[FakeDaemon]:
    """A fake daemon that serves its real control socket from a thread, for clients that know no trio."""
    ready, box, errors = threading.Event(), [], []  # type: ignore[var-annotated]

    async def main() -> None:
        daemon = FakeDaemon(daemon_dir)
        prepare(daemon)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_control, daemon, daemon_dir / "control.sock")
            box.extend((daemon, trio.lowlevel.current_trio_token()))
            ready.set()
            await daemon.stopped.wait()
            nursery.cancel_scope.cancel()

    def run() -> None:
        try:
            trio.run(main)
        except* (IchibaError, OSError) as group:
            errors.append(group)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    assert not errors, errors
    daemon, token = box
    daemon.soon = lambda function, *values: token.run_sync_soon(function, *values)
    try:
        yield daemon
    finally:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(daemon.stop)
        thread.join()


def talk(path: Path, data: bytes) -> bytes:
    """Send raw bytes to the socket, close our side, and return all that comes back."""
    with socket.socket(socket.AF_UNIX) as wire:
        wire.settimeout(20)
        wire.connect(str(path))
        try:
            wire.sendall(data)
            wire.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer = b""
        try:
            while part := wire.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        return answer
