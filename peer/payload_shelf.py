"""The payloads of one unit: those it sent and those that came for it, by key, until they are released.

Promises: at most `memory_bytes_max` of them in memory, and the oldest of the rest on disk; nothing of it outlives the
process (a unit that starts again makes the same payloads again). Refuses to know where they come from or go.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import trio

from protocol import params
from protocol.errors import IchibaError
from protocol.payload import PayloadKey

__all__ = ["PayloadShelf", "ShelfFull"]


class ShelfFull(IchibaError):
    """The payloads that a unit must keep until its segment is receipted do not fit the disk."""

    code = "shelf-full"


@dataclass(eq=False)
class _Log:
    """A nameless file of payloads: gone with the process, and with the last of them."""

    descriptor: int
    size: int = 0
    live: int = 0  # payloads in it that are not released, and reads and writes under way

    def leave(self) -> None:
        self.live -= 1
        if not self.live:
            os.close(self.descriptor)


@dataclass(eq=False)
class _Entry:
    size: int
    payload: bytes | None
    log: _Log | None = None
    offset: int = 0


class PayloadShelf:
    """See the module docstring. `directory` is made when it is needed."""

    def __init__(
        self,
        directory: Path,
        *,
        memory_bytes_max: int = params.TENSOR_MEMORY_BYTES,
        disk_bytes_max: int = params.TENSOR_DISK_BYTES_MAX,
    ) -> None:
        self.memory_bytes = self.disk_bytes = 0
        self._directory, self._memory_max, self._disk_max = directory, memory_bytes_max, disk_bytes_max
        self._entries: dict[PayloadKey, _Entry] = {}
        self._in_memory: dict[PayloadKey, None] = {}  # the oldest first
        self._log: _Log | None = None
        self._spilling = trio.Lock()

    def __contains__(self, key: PayloadKey) -> bool:
        return key in self._entries

    def size(self, key: PayloadKey) -> int:
        """Its bytes. Raises KeyError."""
        return self._entries[key].size

    def put(self, key: PayloadKey, payload: bytes) -> None:
        """Keep one; then await `settle` before the next."""
        assert key not in self._entries, key
        self._entries[key] = _Entry(len(payload), payload)
        self._in_memory[key] = None
        self.memory_bytes += len(payload)

    async def settle(self) -> None:
        """Return when memory is within its bound. Raises ShelfFull, OSError."""
        if self.memory_bytes > self._memory_max:
            async with self._spilling:
                await self._spill()

    def view(self, key: PayloadKey, offset: int, count: int) -> memoryview | None:
        """Those bytes of it, not copied; None if they are on disk. Raises KeyError."""
        payload = self._entries[key].payload
        return None if payload is None else memoryview(payload)[offset : offset + count]

    async def read(self, key: PayloadKey, offset: int, count: int) -> bytes:
        """Those bytes of it, from wherever they are. Raises KeyError, OSError."""
        entry = self._entries[key]
        if entry.payload is not None:
            whole = not offset and count == entry.size
            return entry.payload if whole else entry.payload[offset : offset + count]
        log = entry.log
        assert log is not None
        log.live += 1  # a release meanwhile must not close the file
        try:
            return await trio.to_thread.run_sync(_read, log.descriptor, entry.offset + offset, count)
        finally:
            log.leave()

    def drop(self, keys: Iterable[PayloadKey]) -> None:
        """Keep these no longer; those that are not here are none."""
        for key in keys:
            entry = self._entries.pop(key, None)
            if entry is None:
                continue
            if entry.payload is not None:
                del self._in_memory[key]
                self.memory_bytes -= entry.size
            if entry.log is not None:
                self.disk_bytes -= entry.size
                entry.log.leave()

    def close(self) -> None:
        """Drop everything."""
        self.drop(list(self._entries))
        if self._log is not None:
            self._log.leave()
            self._log = None

    async def _spill(self) -> None:
        """Move the oldest out of memory until a quarter of its bound is free."""
        chosen: list[tuple[PayloadKey, _Entry]] = []
        over = self.memory_bytes - self._memory_max * 3 // 4
        for key in self._in_memory:
            if over <= 0:
                break
            chosen.append((key, self._entries[key]))
            over -= self._entries[key].size
        total = sum(entry.size for _, entry in chosen)
        if not chosen or self.memory_bytes <= self._memory_max:
            return  # who held the lock before did it for us
        if self.disk_bytes + total > self._disk_max:
            raise ShelfFull(
                f"a unit would keep {self.disk_bytes + total} bytes of payloads on disk, at most {self._disk_max}",
                why="they are kept until a segment is receipted, for who replaces a lost unit",
                next_step="make segments shorter (`steps_per_segment` in job.toml)",
            )
        log, start = self._open_log(), 0
        start, log.size = log.size, log.size + total
        log.live += 1
        try:
            views = [entry.payload or b"" for _, entry in chosen]
            await trio.to_thread.run_sync(self._write, log.descriptor, start, views)
            for key, entry in chosen:
                if self._entries.get(key) is entry:  # not released meanwhile
                    entry.payload, entry.log, entry.offset = None, log, start
                    log.live += 1
                    del self._in_memory[key]
                    self.memory_bytes -= entry.size
                    self.disk_bytes += entry.size
                start += entry.size
        finally:
            log.leave()

    def _open_log(self) -> _Log:
        if self._log is None or self._log.size >= params.TENSOR_LOG_BYTES:
            if self._log is not None:
                self._log.leave()
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor, name = tempfile.mkstemp(dir=self._directory)
            os.unlink(name)
            self._log = _Log(descriptor, live=1)
        return self._log

    def _write(self, descriptor: int, offset: int, payloads: list[bytes]) -> None:
        try:
            for payload in payloads:
                view = memoryview(payload)
                while len(view):
                    written = os.pwrite(descriptor, view, offset)
                    offset, view = offset + written, view[written:]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ShelfFull(
                f"the disk is full: no room for a unit's payloads in {self._directory}",
                why=os.strerror(error.errno),
                next_step=f"free space there (`df -h {self._directory}`)",
            ) from None


def _read(descriptor: int, offset: int, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = os.pread(descriptor, count, offset)
        assert part, "a log of payloads is shorter than what was written to it"
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
