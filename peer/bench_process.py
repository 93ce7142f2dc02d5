"""The bench process as the daemon and the command line hold it, and the daemon's bench effects, performed.

torch is never loaded in the daemon, and a chain takes a core for half a minute: both happen in a child
(worker/bench.py) that dies with us. What it says is bounded and decoded like everything that comes through a pipe.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import trio

from peer.blobs import BlobStore
from peer.events import (
    BenchEffect,
    BenchEnded,
    BenchFilled,
    BenchMade,
    BenchWarm,
    CheckWork,
    Input,
    MemoryOpened,
    OpenMemory,
    StartBench,
    StopBench,
    WarmBench,
    WorkChecked,
)
from peer.host import Host
from protocol import params
from protocol.bench_card import check_work, evidence_bytes
from protocol.errors import IchibaError, MalformedRecord, VerificationFailed
from worker.bench import Chain, Chained, Fill, Filled, Measure, Measured, Moved, Open, Opened, Order, Reply

__all__ = ["BenchFailed", "BenchProcess", "BenchRunner", "open_bench"]

_ROOT: Final = Path(__file__).resolve().parent.parent
_LINE_BYTES_MAX: Final = 2 * params.MESSAGE_BYTES_MAX  # openings in base64
_Answer = TypeVar("_Answer", bound=msgspec.Struct)
OnMoved = Callable[[int, int], None]


class BenchFailed(IchibaError):
    """The bench process ended before its order was done."""

    code = "bench-failed"


class BenchProcess:
    """Orders to the child, one at a time."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._buffer = bytearray()
        self._decoder = msgspec.json.Decoder(Reply)

    async def order(self, order: Order, answer: type[_Answer], on_moved: OnMoved = lambda done, total: None) -> _Answer:
        """Send an order and wait for its answer. Raises BenchFailed."""
        assert self._process.stdin is not None
        try:
            await self._process.stdin.send_all(msgspec.json.encode(order) + b"\n")
        except trio.BrokenResourceError:
            raise await self._failure() from None
        while True:
            reply = await self._reply()
            if isinstance(reply, Moved):
                on_moved(reply.done, reply.total)
            elif isinstance(reply, answer):
                return reply
            else:
                raise BenchFailed(f"the bench process answered with {type(reply).__name__}")

    async def _reply(self) -> Reply:
        assert self._process.stdout is not None
        while (end := self._buffer.find(b"\n")) < 0:
            data = await self._process.stdout.receive_some(1 << 16)
            if not data:
                raise await self._failure()
            self._buffer += data
            if len(self._buffer) > _LINE_BYTES_MAX:
                raise BenchFailed("the bench process said too much")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            reply: Reply = self._decoder.decode(line)
        except msgspec.DecodeError as error:
            raise BenchFailed(f"the bench process said what is no reply: {error}"[:300]) from None
        return reply

    async def _failure(self) -> BenchFailed:
        status = await self._process.wait()
        starved = status == -signal.SIGKILL
        return BenchFailed(
            f"the bench process ended with status {status}",
            why="the system killed it, most often for want of memory" if starved else "its last words are in the log",
            next_step="try again with less --memory" if starved else "run `ichiba doctor`",
        )


@asynccontextmanager
async def open_bench() -> AsyncIterator[BenchProcess]:
    """A bench process, dead when the block ends. torch is loaded with its first order."""
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "worker.bench"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(os.environ, PYTHONPATH=path),
    )
    try:
        yield BenchProcess(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                await pipe.aclose()


@dataclass
class BenchRunner:
    """Performs bench effects in `nursery`; results go to `inbox`. One bench process at a time."""

    host: Host
    blobs: BlobStore
    nursery: trio.Nursery
    inbox: trio.MemorySendChannel[Input]
    turn: trio.Lock  # of the machine: no job runs meanwhile
    threads: int = 1  # a job runs on one thread, so a card says what one does
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    orders: trio.MemorySendChannel[StartBench | OpenMemory] | None = None

    def perform(self, effect: BenchEffect) -> None:
        """Start one effect; returns at once."""
        match effect:
            case WarmBench():
                self.scope.cancel()
                self.scope = trio.CancelScope()
                self.orders, receive = trio.open_memory_channel[StartBench | OpenMemory](4)
                self.nursery.start_soon(self._run, self.scope, receive)
            case StopBench():
                self.scope.cancel()
            case CheckWork():
                self.nursery.start_soon(self._check, effect)
            case StartBench() | OpenMemory():
                # A full or closed channel means that the process is gone, which BenchEnded has told or will tell.
                with suppress(trio.WouldBlock, trio.BrokenResourceError):
                    if self.orders is not None:
                        self.orders.send_nowait(effect)

    async def _run(self, scope: trio.CancelScope, receive: trio.MemoryReceiveChannel[StartBench | OpenMemory]) -> None:
        error = ""
        with scope, receive:
            try:
                async with self.turn, open_bench() as bench:
                    measured = await bench.order(Measure(str(self.blobs.directory), self.threads), Measured)
                    await self.inbox.send(BenchWarm(measured.exact_per_second, measured.figures))
                    async for order in receive:
                        await self._carry_out(bench, order)
            except (IchibaError, OSError) as failure:
                error = str(failure) or type(failure).__name__
        if error:
            await self.inbox.send(BenchEnded(error))

    async def _carry_out(self, bench: BenchProcess, order: StartBench | OpenMemory) -> None:
        if isinstance(order, OpenMemory):
            opened = await bench.order(Open(order.indices), Opened)
            await self.inbox.send(MemoryOpened(order.id, opened.openings))
            return
        terms = order.challenge
        evidence = self.blobs.directory / f"bench-{order.id.hex()[:32]}.part"
        try:
            await bench.order(Chain(order.id, terms.side, terms.links, self.threads, str(evidence)), Chained)
            blob = await self.blobs.put_file(evidence)
        finally:
            evidence.unlink(missing_ok=True)
        self.blobs.pin(blob, order.id.hex())
        await self.inbox.send(BenchMade(order.id, blob))
        filled = await bench.order(Fill(order.id, terms.memory_blocks), Filled)
        await self.inbox.send(BenchFilled(order.id, filled.root))

    async def _check(self, effect: CheckWork) -> None:
        """Fetch the evidence from its peer alone, and check it in a thread: a tenth of a second for a usual chain."""
        terms, error, forged = effect.challenge, "", False
        try:
            if not self.blobs.has(effect.evidence):
                await self.blobs.fetch(self.host, effect.evidence, (terms.peer,), size_max=evidence_bytes(terms.side))
            self.blobs.pin(effect.evidence, effect.id.hex())
            evidence = await trio.Path(self.blobs.path(effect.evidence)).read_bytes()
            check = partial(check_work, terms, effect.id, evidence, randbytes=secrets.token_bytes)
            await trio.to_thread.run_sync(check)
        except (VerificationFailed, MalformedRecord) as failure:
            error, forged = failure.what, True
        except (IchibaError, OSError) as failure:
            error = str(failure) or type(failure).__name__
        await self.inbox.send(WorkChecked(effect.id, error, forged))
