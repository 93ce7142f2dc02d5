"""Blobs: big bytes named by their hash, in chunks that can be checked one by one.

Promises: a blob id fixes every byte and the length; a manifest is believed only if it hashes to the id asked for,
and a chunk only if it hashes to its place in the manifest. Pure: where bytes lie and how they travel is elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec

from protocol import params
from protocol.codec import Digest, blake, decode
from protocol.errors import LimitExceeded, MalformedRecord, VerificationFailed

__all__ = ["MANIFEST_BYTES_MAX", "BlobManifest", "blob_id", "chunk_hash", "manifest_of"]

CHUNKS_MAX = -(-params.BLOB_BYTES_MAX // params.BLOB_CHUNK_BYTES)
MANIFEST_BYTES_MAX = 64 + 34 * CHUNKS_MAX  # msgpack writes a 32-byte string as 34 bytes


class BlobManifest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ichiba/blob/1"):
    """`size` bytes cut into chunks of params.BLOB_CHUNK_BYTES (the last may be shorter), and the hash of each.

    An empty blob has no chunks.
    """

    size: Annotated[int, msgspec.Meta(ge=0, le=params.BLOB_BYTES_MAX)]
    chunks: Annotated[tuple[Digest, ...], msgspec.Meta(max_length=CHUNKS_MAX)]

    @classmethod
    def from_bytes(cls, data: bytes, *, blob: bytes, size_max: int = params.BLOB_BYTES_MAX) -> BlobManifest:
        """The manifest of `blob` from hostile bytes.

        Raises MalformedRecord, VerificationFailed if it is another blob's, LimitExceeded if the blob is larger than
        `size_max` (in that order: whoever sent a true manifest of too large a blob has done nothing wrong).
        """
        manifest = decode(cls, data, bytes_max=MANIFEST_BYTES_MAX)
        wanted = -(-manifest.size // params.BLOB_CHUNK_BYTES)
        if len(manifest.chunks) != wanted:
            raise MalformedRecord(f"{len(manifest.chunks)} chunks for {manifest.size} bytes, which are {wanted}")
        if (found := blob_id(manifest)) != blob:
            raise VerificationFailed(f"a manifest of blob {found.hex()[:12]} instead of {blob.hex()[:12]}")
        if manifest.size > size_max:
            raise LimitExceeded(f"blob {blob.hex()[:12]} has {manifest.size} bytes, at most {size_max} are wanted")
        return manifest

    def chunk_bytes(self, index: int) -> int:
        """The length of chunk `index` in bytes."""
        if not 0 <= index < len(self.chunks):
            raise MalformedRecord(f"chunk {index} of a blob of {len(self.chunks)}")
        return min(params.BLOB_CHUNK_BYTES, self.size - index * params.BLOB_CHUNK_BYTES)

    def check_chunk(self, index: int, data: bytes | memoryview) -> None:
        """Raises VerificationFailed unless `data` is chunk `index`. About 1 ms: call it off the event loop."""
        if len(data) != self.chunk_bytes(index) or chunk_hash(data) != self.chunks[index]:
            raise VerificationFailed(f"chunk {index} does not have the hash the manifest states")


def chunk_hash(data: bytes | memoryview) -> bytes:
    """The 32-byte hash of one chunk."""
    return blake("ichiba/chunk", data)  # type: ignore[arg-type]  # hashlib takes any buffer


def blob_id(manifest: BlobManifest) -> bytes:
    """The 32-byte name of a blob: BLAKE2b-256 over its size (8 bytes, little-endian) and chunk hashes."""
    return blake("ichiba/blob", manifest.size.to_bytes(8, "little"), b"".join(manifest.chunks))


def manifest_of(chunks: Iterable[bytes]) -> BlobManifest:
    """The manifest of the blob whose chunks these are: all of params.BLOB_CHUNK_BYTES but the last.

    Raises LimitExceeded above params.BLOB_BYTES_MAX and MalformedRecord for a short chunk before the last.
    """
    size, hashes, last = 0, [], params.BLOB_CHUNK_BYTES
    for chunk in chunks:
        if last != params.BLOB_CHUNK_BYTES or not 0 < len(chunk) <= params.BLOB_CHUNK_BYTES:
            raise MalformedRecord(f"a chunk of {last} bytes before the last, or of {len(chunk)}")
        size, last = size + len(chunk), len(chunk)
        if size > params.BLOB_BYTES_MAX:
            raise LimitExceeded(f"a blob of more than {params.BLOB_BYTES_MAX} bytes")
        hashes.append(chunk_hash(chunk))
    return BlobManifest(size, tuple(hashes))
