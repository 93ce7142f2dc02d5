"""The blob store: content-addressed files in a directory, and their transfer between peers.

Promises: a blob that `has` reports is whole, checked and on the disk, also after a crash; an interrupted download
goes on where it stopped, with whichever peer; a wrong chunk is never kept and its sender is penalised; pinned blobs
are never evicted; a full disk loses nothing. Hashing and disk work run in threads. Refuses to know what blobs mean.

Wire, on /ichiba/<tag>/blob/1: the asker sends the id (32 bytes); the server answers with one frame, a status byte
and then the manifest if it is 0; the asker sends chunk numbers (4 bytes, big-endian), up to
params.BLOB_PIPELINE_CHUNKS ahead, and gets each chunk's bytes in that order. A blob of a sealed job is not here to who
asks for its id; to who asks for its locator (protocol/sealing.py) it comes, behind a status byte of 3, as ciphertext.
"""

from __future__ import annotations

import errno
import functools
import io
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import trio

from peer.blob_download import DiskFull, Download, Progress
from peer.links import PeerUnreachable, Stream
from peer.sealed_blobs import NO_ACCESS, Secrets, read_manifest, sealed_chunk, unseal_file
from protocol import params
from protocol.blob import MANIFEST_BYTES_MAX, BlobManifest, blob_id, manifest_of
from protocol.codec import encode
from protocol.errors import CorruptStore, LimitExceeded, NotFound, RemoteProtocolError
from protocol.keys import short
from protocol.sealing import NO_KEYS, Keys, check_sealable, locator_of, sealed_bytes

__all__ = ["PROTOCOL", "BlobHost", "BlobStore", "DiskFull", "Progress"]

log = logging.getLogger(__name__)
PROTOCOL: Final = "blob"
HERE, ABSENT, BUSY, SEALED = 0, 1, 2, 3


class BlobHost(Protocol):
    """What a transfer needs of a host (peer.host.Host)."""

    async def open_stream(self, peer: bytes, protocol_name: str, *, bytes_max: int | None = None) -> Stream:
        """A stream to `peer`."""

    def penalise(self, peer: bytes, reason: str) -> None:
        """Count a penalty."""


@dataclass
class _Entry:
    size: int
    used: float  # seconds since the epoch
    pins: set[str] = field(default_factory=set)


class BlobStore:
    """Blobs under `directory`, at most `bytes_max` in all; one process at a time."""

    def __init__(self, directory: Path, bytes_max: int) -> None:
        self.directory, self.bytes_max = directory, bytes_max
        self._blobs, self._partial, self._pins = (directory / name for name in ("blobs", "partial", "pins"))
        for folder in (self._blobs, self._partial, self._pins):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._entries: dict[bytes, _Entry] = {}
        self._downloads: dict[bytes, trio.Event] = {}
        self._reserved = 0  # bytes promised to imports and downloads under way
        self._serving: Counter[bytes] = Counter()
        self._load()
        self.secrets = Secrets(directory / "secrets", here=self._entries)

    def _load(self) -> None:
        """Read the directory; what a crash left half done is removed, partial downloads stay."""
        for leftover in self._blobs.glob("*.new"):
            leftover.unlink()
        for data in self._blobs.glob("*.data"):
            if len(data.stem) == 64 and data.with_suffix(".manifest").exists():
                status = data.stat()
                self._entries[bytes.fromhex(data.stem)] = _Entry(status.st_size, status.st_mtime)
            else:
                data.unlink()
        for pin in self._pins.iterdir():
            name, _, owner = pin.name.partition(".")
            entry = self._entries.get(bytes.fromhex(name)) if len(name) == 64 else None
            if entry is not None:
                entry.pins.add(owner)

    # --- what is here --------------------------------------------------------------------------------------

    def has(self, blob: bytes) -> bool:
        """Whether the whole blob is here."""
        return blob in self._entries

    def path(self, blob: bytes) -> Path:
        """Where its bytes lie, to be read only. Counts as a use. Raises NotFound."""
        self._touch(blob)
        return self._file(blob, "data")

    def size(self, blob: bytes) -> int:
        """Its length in bytes. Raises NotFound."""
        return self._entry(blob).size

    def manifest(self, blob: bytes) -> BlobManifest:
        """Its manifest. Raises NotFound, or CorruptStore if the file on the disk was changed."""
        self._entry(blob)
        return self._read_manifest(blob)

    def total_bytes(self) -> int:
        """What all blobs take, and what is promised to those on their way."""
        return sum(entry.size for entry in self._entries.values()) + self._reserved

    def pin(self, blob: bytes, owner: str = "user") -> None:
        """Keep it until `owner` (letters, digits and dashes) unpins it, also after a restart. Raises NotFound."""
        if not owner.replace("-", "").isalnum() or len(owner) > 80:
            raise ValueError(f"{owner!r} cannot name the owner of a pin")
        self._entry(blob).pins.add(owner)
        (self._pins / f"{blob.hex()}.{owner}").touch()

    def unpin(self, blob: bytes, owner: str = "user") -> None:
        """Take `owner`'s pin away, if it has one."""
        if blob in self._entries:
            self._entries[blob].pins.discard(owner)
        (self._pins / f"{blob.hex()}.{owner}").unlink(missing_ok=True)

    def release(self, owner: str, *, keep: bytes = b"") -> None:
        """Take all of `owner`'s pins away, but the one on `keep`."""
        for blob in [b for b, entry in self._entries.items() if owner in entry.pins and b != keep]:
            self.unpin(blob, owner)

    def evict(self, *, bytes_wanted: int) -> int:
        """Remove unpinned blobs, the longest unused first, until `bytes_wanted` are freed; returns the bytes freed."""
        freed = 0
        for blob, entry in sorted(self._entries.items(), key=lambda item: item[1].used):
            if freed >= bytes_wanted:
                break
            if not entry.pins:
                del self._entries[blob]
                self._file(blob, "data").unlink(missing_ok=True)
                self._file(blob, "manifest").unlink(missing_ok=True)
                freed += entry.size
        return freed

    # --- putting -------------------------------------------------------------------------------------------

    async def put_bytes(self, data: bytes, *, keys: Keys | None = None) -> bytes:
        """Store `data`; returns its blob id. Raises DiskFull, LimitExceeded."""
        return await self._put(lambda: io.BytesIO(data), len(data), keys)

    async def put_file(self, path: Path, *, keys: Keys | None = None) -> bytes:
        """Store a copy of the file; returns its blob id. keys: of the sealed job that it belongs to: it is never served
        as it is; with none in them, to nobody yet. Raises DiskFull, LimitExceeded, OSError."""
        size = (await trio.to_thread.run_sync(path.stat)).st_size
        return await self._put(lambda: path.open("rb"), size, keys)

    def protect(self, blobs: Sequence[bytes], keys: Keys) -> None:
        """From now on serve these blobs only sealed, to who knows their keys; with NO_KEYS to nobody.

        On the disk when it returns. Raises NotFound for one that is not here, LimitExceeded for one too long to be
        sealed.
        """
        for blob in blobs if keys != NO_KEYS else ():
            check_sealable(self.size(blob))
        self.secrets.protect({blob: _access(keys, blob) for blob in blobs}, hide=True)

    async def _put(self, opener: Callable[[], BinaryIO], size: int, keys: Keys | None) -> bytes:
        if size > params.BLOB_BYTES_MAX:
            raise LimitExceeded(f"a blob of {size} bytes, at most {params.BLOB_BYTES_MAX} are stored")
        if keys is not None:
            check_sealable(size)
        with self._room(size):
            temporary = self._blobs / f"{os.urandom(8).hex()}.new"
            try:
                blob, manifest = await trio.to_thread.run_sync(_copy, opener, temporary, size, self._disk_full)
                await trio.to_thread.run_sync(self._mark, blob, keys)
                if not self.has(blob):
                    await trio.to_thread.run_sync(self._install, blob, manifest, temporary)
                    self._entries[blob] = _Entry(manifest.size, time.time())
                self._touch(blob)
                return blob
            finally:
                temporary.unlink(missing_ok=True)

    def _mark(self, blob: bytes, keys: Keys | None) -> None:
        """Before a blob of a sealed job is here. One that was here openly is no secret, and goes on being served."""
        if keys is not None:
            self.secrets.protect({blob: _access(keys, blob)}, hide=not self.has(blob) or self.secrets.hides(blob))

    def _install(self, blob: bytes, manifest: BlobManifest, data: Path) -> None:
        """Manifest first, then the data under its name: whoever sees the data has both. In a thread."""
        try:
            _write_durably(self._file(blob, "manifest"), encode(manifest))
            os.replace(data, self._file(blob, "data"))
            _sync_directory(self._blobs)
        except OSError as error:
            raise self._disk_full(error, manifest.size) from None

    # --- serving -------------------------------------------------------------------------------------------

    async def serve(self, peer: bytes, stream: Stream) -> None:
        """The handler for `host.serve("blob", store.serve)`: give out one blob, chunk by chunk."""
        if self._serving[peer] >= params.BLOB_STREAMS_PER_PEER_MAX or self._serving.total() >= params.BLOB_STREAMS_MAX:
            return await stream.send_frame(bytes([BUSY]))
        self._serving[peer] += 1
        try:
            with suppress(trio.TooSlowError):  # an asker that stalls is hung up on, not punished
                await self._serve(stream)
        finally:
            self._serving[peer] -= 1
            self._serving += Counter()  # forgets those at zero

    async def _serve(self, stream: Stream) -> None:
        with trio.fail_after(params.BLOB_IDLE_SECONDS_MAX):
            asked = await stream.receive_exactly(32)
        sought = self.secrets.sought(asked)
        blob, access = sought or (asked, b"")
        if not self.has(blob) or (not sought and self.secrets.hides(blob)):
            return await stream.send_frame(bytes([ABSENT]))
        # The first time it costs a pass over a sealed blob: no clock runs here, and who hangs up may come again.
        sealed = functools.partial(self.secrets.manifest, blob, access, self._file(blob, "data"))
        manifest = await trio.to_thread.run_sync(sealed) if sought else self.manifest(blob)
        with trio.fail_after(params.BLOB_IDLE_SECONDS_MAX):
            await stream.send_frame(bytes([SEALED if sought else HERE]) + encode(manifest))
        with self.path(blob).open("rb") as file:  # open once: eviction meanwhile does not hurt
            while True:
                with trio.fail_after(params.BLOB_IDLE_SECONDS_MAX):
                    head = await stream.receive_some(4)
                    if not head:
                        return None
                    head += await stream.receive_exactly(4 - len(head)) if len(head) < 4 else b""
                    index = int.from_bytes(head, "big")
                    count, offset = manifest.chunk_bytes(index), index * params.BLOB_CHUNK_BYTES
                    if sought:
                        last = index == len(manifest.chunks) - 1
                        chunk = await trio.to_thread.run_sync(sealed_chunk, file.fileno(), access, index, last)
                    else:
                        chunk = await trio.to_thread.run_sync(os.pread, file.fileno(), count, offset)
                    await stream.send_all(chunk)

    # --- fetching ------------------------------------------------------------------------------------------

    async def fetch(
        self,
        host: BlobHost,
        blob: bytes,
        peers: Sequence[bytes],
        *,
        size_max: int,
        progress: Progress | None = None,
        keys: Keys | None = None,
    ) -> Path:
        """Bring `blob` here from the first of `peers` that gives it whole and right; its path.

        A peer that fails half-way is followed by the next, which goes on from there; calls for one blob share one
        download. keys: of the sealed job that it belongs to: it comes sealed, and is opened and checked here.
        Raises NotFound if no peer gives it (with what each did), LimitExceeded if it is larger than `size_max`,
        DiskFull.
        """
        access = keys.access(blob) if keys is not None else b""
        await trio.to_thread.run_sync(self._mark, blob, keys)
        while not self.has(blob):
            if (running := self._downloads.get(blob)) is not None:
                await running.wait()  # its caller may fail or be cancelled: then this one goes on
                continue
            done = self._downloads[blob] = trio.Event()
            try:
                await self._fetch_from(host, blob, peers, size_max, progress or (lambda here, total: None), access)
            finally:
                del self._downloads[blob]
                done.set()
        return self.path(blob)

    async def _fetch_from(
        self, host: BlobHost, blob: bytes, peers: Sequence[bytes], size_max: int, progress: Progress, access: bytes
    ) -> None:
        told: list[str] = []
        for peer in peers:
            try:
                stream = await host.open_stream(peer, PROTOCOL)
                try:
                    return await self._download(stream, blob, size_max, progress, access)
                finally:
                    stream.reset()
            except _TooLarge as fault:
                raise LimitExceeded(fault.what) from None
            except RemoteProtocolError as fault:
                host.penalise(peer, f"{fault.code}: {fault}")
                told.append(f"{short(peer)}: {fault}")
            except (PeerUnreachable, NotFound) as fault:
                told.append(f"{short(peer)}: {fault}")
            except trio.TooSlowError:
                told.append(f"{short(peer)}: no byte for {params.BLOB_IDLE_SECONDS_MAX:.0f} s")
        raise NotFound(
            f"no peer gave blob {blob.hex()[:16]}",
            why="; ".join(told) or "nobody is known to have it",
            next_step="wait for a peer that has it, or connect to one",
        )

    async def _download(self, stream: Stream, blob: bytes, size_max: int, progress: Progress, access: bytes) -> None:
        stream.widen(params.BLOB_STREAM_WINDOW_BYTES)
        with trio.fail_after(params.BLOB_IDLE_SECONDS_MAX):
            await stream.send_all(locator_of(access) if access else blob)
            reply = await stream.receive_frame(MANIFEST_BYTES_MAX + 1) or bytes([ABSENT])
        if reply[0] != (SEALED if access else HERE):
            raise NotFound("it is busy" if reply[0] == BUSY else "it does not have it")
        if access:
            manifest, size_max = await trio.to_thread.run_sync(read_manifest, reply[1:]), sealed_bytes(size_max)
        else:
            manifest = await trio.to_thread.run_sync(lambda: BlobManifest.from_bytes(reply[1:], blob=blob))
        if manifest.size > size_max:
            raise _TooLarge(f"blob {blob.hex()[:12]} has {manifest.size} bytes, at most {size_max} are wanted")
        partial = self._partial / f"{blob.hex()}.data"
        with self._room(manifest.size * (2 if access else 1)):
            self._forget_old_partials(keep=partial)
            file, missing = await trio.to_thread.run_sync(self._open_partial, partial, manifest)
            with file:
                await Download(stream, manifest, file, missing, progress, self._disk_full).run()
                await trio.to_thread.run_sync(os.fsync, file.fileno())
            if access:
                opened = self._blobs / f"{os.urandom(8).hex()}.new"
                try:
                    manifest = await trio.to_thread.run_sync(unseal_file, partial, opened, blob, access)
                    await trio.to_thread.run_sync(self._install, blob, manifest, opened)
                finally:
                    opened.unlink(missing_ok=True)
                    partial.unlink(missing_ok=True)
            else:
                await trio.to_thread.run_sync(self._install, blob, manifest, partial)
            self._entries[blob] = _Entry(manifest.size, time.time())

    def _open_partial(self, partial: Path, manifest: BlobManifest) -> tuple[BinaryIO, list[int]]:
        """The partial file and the chunks it lacks: what is there is re-hashed, so a crash needs no notes."""
        try:
            file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
        except OSError as error:
            raise self._disk_full(error, manifest.size) from None
        have = os.fstat(file.fileno()).st_size
        missing = []
        for index in range(len(manifest.chunks)):
            count, offset = manifest.chunk_bytes(index), index * params.BLOB_CHUNK_BYTES
            try:
                if offset + count > have:
                    raise LimitExceeded("not here yet")
                manifest.check_chunk(index, os.pread(file.fileno(), count, offset))
            except RemoteProtocolError:
                missing.append(index)
        if have > manifest.size:
            os.ftruncate(file.fileno(), manifest.size)
        return file, missing

    def _forget_old_partials(self, *, keep: Path) -> None:
        others = sorted((p for p in self._partial.iterdir() if p != keep), key=lambda p: p.stat().st_mtime)
        busy = {f"{blob.hex()}.data" for blob in self._downloads}
        for old in [p for p in others if p.name not in busy][: max(0, len(others) + 1 - params.BLOB_PARTIALS_MAX)]:
            old.unlink(missing_ok=True)

    # --- small things --------------------------------------------------------------------------------------

    @contextmanager
    def _room(self, size: int) -> Iterator[None]:
        """Keep `size` bytes of the cap for what happens inside, evicting what is needed. Raises DiskFull."""
        over = self.total_bytes() + size - self.bytes_max
        evictable = sum(entry.size for entry in self._entries.values() if not entry.pins)
        if over > evictable:  # then evicting would not help either: touch nothing
            raise DiskFull(
                f"no room for {size} bytes: {over - evictable} too many",
                why=f"the store may hold {self.bytes_max} bytes and the rest of it is pinned or in use",
                next_step="raise the store's size in the configuration, or cancel jobs that hold blobs",
            )
        if over > 0:
            self.evict(bytes_wanted=over)
        self._reserved += size
        try:
            yield
        finally:
            self._reserved -= size

    def _disk_full(self, error: OSError, size: int) -> Exception:
        """A full disk as DiskFull; any other error as itself."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        return DiskFull(
            f"the disk is full: no room for {size} bytes in {self.directory}",
            why=os.strerror(error.errno),
            next_step=f"free space there (`df -h {self.directory}`) and try again; what was fetched is kept",
        )

    def _file(self, blob: bytes, suffix: str) -> Path:
        return self._blobs / f"{blob.hex()}.{suffix}"

    def _entry(self, blob: bytes) -> _Entry:
        entry = self._entries.get(blob)
        if entry is None:
            raise NotFound(f"blob {blob.hex()[:16]} is not here", next_step="fetch it from a peer that has it")
        return entry

    def _touch(self, blob: bytes) -> None:
        self._entry(blob).used = time.time()
        with suppress(OSError):
            os.utime(self._file(blob, "data"))  # survives a restart; losing it only makes eviction less wise

    def _read_manifest(self, blob: bytes) -> BlobManifest:
        try:
            return BlobManifest.from_bytes(self._file(blob, "manifest").read_bytes(), blob=blob)
        except (RemoteProtocolError, OSError) as error:
            raise CorruptStore(
                f"the manifest of blob {blob.hex()[:16]} does not read back", why=str(error), next_step="fetch it again"
            ) from None


def _access(keys: Keys, blob: bytes) -> bytes:
    return keys.access(blob) if keys != NO_KEYS else NO_ACCESS


class _TooLarge(NotFound):
    """The true size is above what the caller wants; the peer did nothing wrong."""


def _copy(
    opener: Callable[[], BinaryIO], target: Path, size: int, disk_full: Callable[[OSError, int], Exception]
) -> tuple[bytes, BlobManifest]:
    """Copy what `opener` opens to `target`, hashing on the way; fsynced. In a thread."""

    def chunks(source: BinaryIO, copy: BinaryIO) -> Iterator[bytes]:
        left = size  # a file that grows while it is read is cut where it ended when it was put
        while left and (chunk := source.read(min(params.BLOB_CHUNK_BYTES, left))):
            try:
                copy.write(chunk)
            except OSError as error:
                raise disk_full(error, size) from None
            left -= len(chunk)
            yield chunk

    with opener() as source, target.open("xb") as copy:
        manifest = manifest_of(chunks(source, copy))
        try:
            copy.flush()
            os.fsync(copy.fileno())
        except OSError as error:
            raise disk_full(error, size) from None
    return blob_id(manifest), manifest


def _write_durably(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
