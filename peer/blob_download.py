"""One peer's part in one download of a blob: chunks are asked for ahead, and hashed and written in threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Final

import trio

from peer.links import PeerUnreachable, Stream
from protocol import params
from protocol.blob import BlobManifest
from protocol.errors import IchibaError, RemoteProtocolError

__all__ = ["DiskFull", "Download", "Progress"]

WRITES_MAX: Final = 3  # chunks hashed and written at once; one more is being received
Progress = Callable[[int, int], None]  # bytes here, bytes in all


class DiskFull(IchibaError):
    """No room for a blob, on the disk or under the store's cap. Nothing that was stored is lost."""

    code = "disk-full"


@dataclass
class Download:
    """See the module docstring. `missing`: the chunks to bring."""

    stream: Stream
    manifest: BlobManifest
    file: BinaryIO
    missing: list[int]
    progress: Progress
    disk_full: Callable[[OSError, int], Exception]
    fault: Exception | None = None

    async def run(self) -> None:
        """Raises VerificationFailed for a wrong chunk, PeerUnreachable, trio.TooSlowError, DiskFull."""
        self.done_bytes = self.manifest.size - sum(map(self.manifest.chunk_bytes, self.missing))
        self.progress(self.done_bytes, self.manifest.size)
        slots = trio.Semaphore(WRITES_MAX)
        async with trio.open_nursery() as nursery:
            try:
                for number in range(min(params.BLOB_PIPELINE_CHUNKS, len(self.missing))):
                    await self._ask(number)
                for number, index in enumerate(self.missing):
                    with trio.fail_after(params.BLOB_IDLE_SECONDS_MAX):
                        data = await self.stream.receive_exactly(self.manifest.chunk_bytes(index))
                        if number + params.BLOB_PIPELINE_CHUNKS < len(self.missing):
                            await self._ask(number + params.BLOB_PIPELINE_CHUNKS)
                    await slots.acquire()
                    nursery.start_soon(self._keep, index, data, slots, nursery.cancel_scope)
            except (PeerUnreachable, RemoteProtocolError, trio.TooSlowError) as fault:
                self.fault = self.fault or fault  # chunks already received are still written
        if self.fault is not None:
            raise self.fault

    async def _ask(self, number: int) -> None:
        await self.stream.send_all(self.missing[number].to_bytes(4, "big"))

    async def _keep(self, index: int, data: bytes, slots: trio.Semaphore, scope: trio.CancelScope) -> None:
        try:
            await trio.to_thread.run_sync(self._check_and_write, index, data)
            self.done_bytes += len(data)
            self.progress(self.done_bytes, self.manifest.size)
        except (RemoteProtocolError, DiskFull, OSError) as fault:
            self.fault = self.fault or fault
            scope.cancel()
        finally:
            slots.release()

    def _check_and_write(self, index: int, data: bytes) -> None:
        self.manifest.check_chunk(index, data)
        view, offset = memoryview(data), index * params.BLOB_CHUNK_BYTES
        try:
            while view:
                written = os.pwrite(self.file.fileno(), view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise self.disk_full(error, self.manifest.size) from None
