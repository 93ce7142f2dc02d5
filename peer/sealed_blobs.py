"""The blobs of sealed jobs in a store: which they are, how they leave, and how they are opened where they arrive.

Promises: what is protected is served only as ciphertext, and only to who asks for it by its locator, which is no guess;
that holds after a crash too, for a mark is on the disk before the blob is. The same blob under the same key is the same
ciphertext, wherever and whenever it is sealed, so a download goes on with another peer or after a restart. Sealing and
opening hold one chunk of params.BLOB_CHUNK_BYTES in memory. Refuses to know who may have a key (peer/sealing.py).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Final

from protocol import params
from protocol.blob import MANIFEST_BYTES_MAX, BlobManifest, blob_id, chunk_hash, manifest_of
from protocol.codec import decode
from protocol.errors import VerificationFailed
from protocol.sealing import PIECE_BYTES, chunks_of, locator_of, open_chunk, seal_chunk, sealed_bytes

__all__ = ["NO_ACCESS", "Secrets", "read_manifest", "sealed_chunk", "unseal_file"]

NO_ACCESS: Final = bytes(32)  # in a mark: the blob is hidden, and no key opens it yet
_MARK_BYTES: Final = 65  # blob, its key, 1 if the blob itself is hidden


class Secrets:
    """The marks of one store, in one file that only grows until the next start."""

    def __init__(self, path: Path, *, here: Container[bytes]) -> None:
        self.path = path
        self._hidden: set[bytes] = set()
        self._keys: dict[bytes, list[bytes]] = {}  # blob -> its keys, oldest first
        self._located: dict[bytes, tuple[bytes, bytes]] = {}  # locator -> blob, key
        self._manifests: OrderedDict[bytes, BlobManifest] = OrderedDict()  # by locator
        self._load(here)

    def _load(self, here: Container[bytes]) -> None:
        """Read the marks of the blobs that are here; the others, and one that a crash cut off, are dropped."""
        data = self.path.read_bytes() if self.path.exists() else b""
        marks = [data[i : i + _MARK_BYTES] for i in range(0, len(data) - _MARK_BYTES + 1, _MARK_BYTES)]
        kept = list(dict.fromkeys(mark for mark in marks if mark[:32] in here))
        for mark in kept:
            self._add(mark[:32], mark[32:64], hide=bool(mark[64]))
        if len(kept) * _MARK_BYTES != len(data):
            fresh = self.path.with_suffix(".new")
            _write(fresh, b"".join(kept), os.O_TRUNC)
            os.replace(fresh, self.path)

    def _add(self, blob: bytes, access: bytes, *, hide: bool) -> None:
        if hide:
            self._hidden.add(blob)
        keys = self._keys.setdefault(blob, [])
        if access == NO_ACCESS or access in keys:
            return
        keys.append(access)
        self._located[locator_of(access)] = (blob, access)
        if len(keys) > params.SEALED_KEYS_PER_BLOB_MAX:
            self._located.pop(locator_of(keys.pop(0)))

    def protect(self, access: Mapping[bytes, bytes], *, hide: bool) -> None:
        """Serve blobs under their keys, and, with `hide`, no other way. On the disk when it returns. Raises OSError."""
        new = {
            blob: key
            for blob, key in access.items()
            if (hide and blob not in self._hidden) or (key != NO_ACCESS and key not in self._keys.get(blob, ()))
        }
        for blob, key in new.items():
            self._add(blob, key, hide=hide)  # first: a full disk must not leave it in the open
        if new:
            marks = (blob + key + bytes([blob in self._hidden]) for blob, key in sorted(new.items()))
            _write(self.path, b"".join(marks), os.O_APPEND)

    def hides(self, blob: bytes) -> bool:
        """Whether it is served to nobody as it is."""
        return blob in self._hidden

    def sought(self, locator: bytes) -> tuple[bytes, bytes] | None:
        """The blob that is asked for by this name, and its key."""
        return self._located.get(locator)

    def manifest(self, blob: bytes, access: bytes, path: Path) -> BlobManifest:
        """The manifest of the ciphertext of a blob at `path`; the first time a pass over it. In a thread."""
        locator = locator_of(access)
        known = self._manifests.get(locator)
        if known is None:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                count = chunks_of(size)
                sealed = (sealed_chunk(file.fileno(), access, i, i == count - 1) for i in range(count))
                known = BlobManifest(sealed_bytes(size), tuple(map(chunk_hash, sealed)))
            self._manifests[locator] = known
            while len(self._manifests) > params.SEALED_MANIFESTS_MAX:
                self._manifests.popitem(last=False)
        return known


def sealed_chunk(descriptor: int, access: bytes, index: int, last: bool) -> bytes:
    """Chunk `index` of the ciphertext of an open file. In a thread."""
    return seal_chunk(access, index, os.pread(descriptor, PIECE_BYTES, index * PIECE_BYTES), last=last)


def read_manifest(data: bytes) -> BlobManifest:
    """The manifest of a ciphertext, whose id nobody can know before. Raises RemoteProtocolError.

    What it lies about is found out when the chunks are opened, and the bytes fetched until then are bounded by it.
    """
    manifest = decode(BlobManifest, data, bytes_max=MANIFEST_BYTES_MAX)
    return BlobManifest.from_bytes(data, blob=blob_id(manifest))


def unseal_file(sealed: Path, target: Path, blob: bytes, access: bytes) -> BlobManifest:
    """Open the ciphertext at `sealed` into a new file, fsynced; the plaintext's manifest. In a thread.

    Raises VerificationFailed if a chunk does not open, or if what it opens to is not `blob`; OSError.
    """
    count = -(-sealed.stat().st_size // params.BLOB_CHUNK_BYTES)
    with sealed.open("rb") as source, target.open("xb") as file:

        def pieces() -> Iterator[bytes]:
            """The plaintext, cut as a blob is."""
            held = b""
            for index in range(count):
                chunk = source.read(params.BLOB_CHUNK_BYTES)
                held += open_chunk(access, index, chunk, last=index == count - 1)
                while len(held) >= params.BLOB_CHUNK_BYTES or (held and index == count - 1):
                    piece, held = held[: params.BLOB_CHUNK_BYTES], held[params.BLOB_CHUNK_BYTES :]
                    file.write(piece)
                    yield piece

        manifest = manifest_of(pieces())
        file.flush()
        os.fsync(file.fileno())
    if (found := blob_id(manifest)) != blob:
        raise VerificationFailed(f"a sealed blob opens to {found.hex()[:12]} instead of {blob.hex()[:12]}")
    return manifest


def _write(path: Path, data: bytes, how: int) -> None:
    """Write and fsync; readable by the owner alone, for it holds keys."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
