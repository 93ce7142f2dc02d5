"""The daemon's side of a unit at work: feeds its worker, keeps the tape, and passes on what the worker hands over.

Promises: what was fed stands on the tape first, so a worker that starts again gets the same bits; the worker's time
does not run while it waits for others, and it waits for none of them for ever. The worker's frames are checked before
they come here (worker/conversation.py).
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from peer.stage_port import StagePort
from peer.work_order import WorkFailed, WorkOrder
from protocol import params
from protocol.errors import LocalProtocolError, MalformedRecord, RemoteProtocolError
from protocol.payload import PayloadKey, receivers
from protocol.program import Program
from protocol.stage import Stage
from protocol.tape import TapeReader, entry_head, whole_entries
from worker.cage import Cage
from worker.frames import CheckpointBytes
from worker.stage_frames import FEED, CrossingTalk, Need, Sent

__all__ = ["UnitExchange", "keys_on_tape", "open_exchange"]


async def open_exchange(stage: Stage | None, order: WorkOrder, port: StagePort | None) -> UnitExchange | None:
    """What runs `order` beside its neighbours; None for an ordinary task, and for a unit that is checked from tapes.

    Raises LocalProtocolError for an order that is neither; WorkFailed for a program that the stage does not fit.
    """
    if stage is None or order.want != "train":
        if port is not None or order.tapes:
            raise LocalProtocolError("only the segments of a unit have a port or tapes")
        return None
    if port is None:
        segments = order.last_segment - order.first_segment
        if len(order.tapes) != segments or segments > params.TAPES_MAX:
            raise LocalProtocolError(
                f"{len(order.tapes)} tapes for {segments} segments, at most {params.TAPES_MAX}",
                next_step="run a unit with a port, or check it with a tape for each segment",
            )
        return None
    if order.tapes or order.tape_folder is None:
        raise LocalProtocolError("a unit that runs beside others writes its tapes into a folder, and reads none")
    try:
        talk = await trio.to_thread.run_sync(_talk_of, stage, order.program)
    except OSError as error:
        raise WorkFailed("missing-input", f"cannot read {order.program.name}: {error.strerror}") from None
    except RemoteProtocolError as error:
        raise WorkFailed("bad-program", error.what, error.why) from None
    return UnitExchange(stage, port, talk, order.tape_folder, order.work_id)


def _talk_of(stage: Stage, program: Path) -> CrossingTalk:
    return CrossingTalk.of(stage, Program.from_bytes(program.read_bytes()))


def keys_on_tape(order: WorkOrder, segment: int) -> list[PayloadKey]:
    """What a worker of `order` was fed in `segment` by an earlier daemon; its port need not have it again.

    Reads all of the tape: call it in a thread. Raises OSError.
    """
    assert order.tape_folder is not None, "a unit that runs beside others has one"
    try:
        tape = memoryview((order.tape_folder / f"{order.work_id}-{segment}.tape").read_bytes())
    except FileNotFoundError:
        return []
    reader, found = TapeReader(tape[: whole_entries(tape)]), []
    while reader.left:
        found.append(reader.next()[0].key)
    return found


@dataclass
class UnitExchange:
    """What one job's worker receives and sends. `serves` comes before anything is heard."""

    stage: Stage
    port: StagePort
    talk: CrossingTalk
    folder: Path
    work_id: str
    _cage: Cage | None = None
    _patience: trio.CancelScope | None = None
    _tape: _TapeFile | None = None
    _parts: list[bytes] = field(default_factory=list)
    fed: set[int] = field(default_factory=set)  # the units of whose tensors the worker had one

    def serves(self, cage: Cage, patience: trio.CancelScope) -> None:
        """From now on `cage` is the worker, and the deadline of `patience` its own."""
        self._cage, self._patience = cage, patience

    async def heard(self, said: Need | Sent, segment: int, bytes_max: int) -> None:
        """Act on a frame; bytes_max: of the payload needed. Raises WorkFailed, OSError for a full disk."""
        if isinstance(said, Sent):
            if not said.payload_bytes:
                await self._send(said.key, b"")
            return
        tape = await self._tape_of(segment)
        replayed = tape.replayed(said.key)
        if replayed is None:
            async with self._waiting(f"unit {said.key.unit} did not send {said.key}"):
                payload = await self.port.want(said.key)
            if len(payload) > bytes_max:
                what = f"unit {said.key.unit} sent {len(payload)} bytes for {said.key}, at most {bytes_max}"
                raise WorkFailed("bad-payload", what, unit=said.key.unit)
            head = entry_head(said.key, payload)
            await tape.append(head, payload)
        else:
            head, payload = replayed
        assert self._cage is not None, "a worker speaks only after it was given its job"
        self.fed.add(said.key.unit)
        await self._cage.feed(FEED + head, payload)

    async def bytes_of(self, header: Sent, event: CheckpointBytes) -> None:
        """The next bytes of what `header` announced."""
        self._parts.append(event.part)
        if event.last:
            payload = b"".join(self._parts)
            self._parts.clear()
            await self._send(header.key, payload)

    async def _send(self, key: PayloadKey, payload: bytes) -> None:
        async with self._waiting(f"no unit takes {key}"):
            await self.port.send(key, receivers(self.stage, key.flow), payload)

    @asynccontextmanager
    async def _waiting(self, what: str) -> AsyncIterator[None]:
        """Time that is the neighbours' and not the worker's. Raises WorkFailed above UNIT_WAIT_SECONDS_MAX."""
        scope = self._patience
        assert scope is not None, "a worker waits only after it was given its job"
        left = scope.deadline - trio.current_time()
        scope.deadline = math.inf
        try:
            with trio.fail_after(params.UNIT_WAIT_SECONDS_MAX):
                yield
        except trio.TooSlowError:
            raise WorkFailed("no-neighbour", f"{what} in {params.UNIT_WAIT_SECONDS_MAX:g} s") from None
        finally:
            scope.deadline = trio.current_time() + left

    async def _tape_of(self, segment: int) -> _TapeFile:
        if self._tape is None:
            path = self.folder / f"{self.work_id}-{segment}.tape"
            self._tape = await trio.to_thread.run_sync(_TapeFile, path)
        return self._tape

    async def end_segment(self, segment: int) -> Path:
        """The tape of the segment that has just ended, whole, now the caller's."""
        tape, self._tape = await self._tape_of(segment), None
        await trio.to_thread.run_sync(tape.finish)
        return tape.path

    def close(self) -> None:
        """The worker is gone. The tape of the unfinished segment stays."""
        if self._tape is not None:
            self._tape.close()
            self._tape = None


class _TapeFile:
    """One segment's tape on disk: first what an earlier worker was fed, then what is new. Raises OSError."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        self._number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        size = os.fstat(self._number).st_size
        kept = memoryview(mmap.mmap(self._number, size, prot=mmap.PROT_READ)) if size else memoryview(b"")
        self._kept: TapeReader | None = TapeReader(kept[: whole_entries(kept)])
        self._end = 0  # of what the present worker was fed

    def replayed(self, key: PayloadKey) -> tuple[bytes, bytes] | None:
        """The head and the payload of the next entry, if it is of `key`; otherwise the tape ends here."""
        if self._kept is None:
            return None
        try:
            entry, head, payload = self._kept.next()
        except MalformedRecord:  # all of it was fed
            return None
        if entry.key != key:
            return None
        self._end = self._kept.place
        return bytes(head), bytes(payload)

    async def append(self, head: bytes, payload: bytes) -> None:
        """Write one entry behind those that were fed. Raises WorkFailed for too long a tape."""
        self._forget()
        size = self._end + len(head) + len(payload)
        if size > params.BLOB_BYTES_MAX:
            raise WorkFailed("bad-task", f"a segment's tape of {size} bytes, at most {params.BLOB_BYTES_MAX}")
        if len(payload) <= params.TAPE_WRITE_BYTES_MAX:
            self._write(head, payload)
        else:
            await trio.to_thread.run_sync(self._write, head, payload)
        self._end = size

    def _forget(self) -> None:
        """From now on the tape is what the present worker was fed."""
        if self._kept is not None:
            self._kept = None  # and with it the mapping, before the file loses bytes
            os.ftruncate(self._number, self._end)
            os.lseek(self._number, self._end, os.SEEK_SET)

    def _write(self, head: bytes, payload: bytes) -> None:
        left = memoryview(payload)[max(0, os.writev(self._number, [head, payload]) - len(head)) :]
        while left:
            left = left[os.write(self._number, left) :]

    def finish(self) -> None:
        """The segment is over, and nothing else belongs to the tape."""
        self._forget()
        self.close()

    def close(self) -> None:
        """Keep the file as it is."""
        self._kept = None
        os.close(self._number)
