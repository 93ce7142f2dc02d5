"""The tape of a segment: what a unit of a parallel job received in it, in the order in which its Program asked.

A tape is a row of entries, each a length (u32, little-endian), so many bytes of one canonical TapeEntry, then the
payload. The daemon writes it as it feeds its worker, a checker computes the segment again from it, and its blob id is
part of the segment's end. Hostile until read: every size is bounded and compared. Pure.
"""

from __future__ import annotations

import zlib
from typing import Annotated, Final

import msgspec

from protocol import params
from protocol.blob import BlobManifest, blob_id, chunk_hash
from protocol.codec import decode, encode
from protocol.errors import LimitExceeded, MalformedRecord
from protocol.payload import PayloadKey

__all__ = ["ENTRY_HEAD_BYTES_MAX", "TapeEntry", "TapeHash", "TapeReader", "entry_head", "read_head", "whole_entries"]

ENTRY_HEAD_BYTES_MAX: Final = 128
_PAYLOAD_BYTES_MAX: Final = params.CROSSING_BYTES_MAX + params.PAYLOAD_HEAD_BYTES_MAX


class TapeEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One payload that was received. crc: of its bytes (zlib.crc32), so a daemon that starts again after a crash knows
    a torn entry of its own file; nobody else looks at it."""

    key: PayloadKey
    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=_PAYLOAD_BYTES_MAX)]
    crc: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


def entry_head(key: PayloadKey, payload: bytes | memoryview) -> bytes:
    """What stands before `payload` on a tape: its length and its TapeEntry."""
    body = encode(TapeEntry(key, len(payload), zlib.crc32(payload)))
    return len(body).to_bytes(4, "little") + body


def read_head(data: bytes | memoryview) -> tuple[TapeEntry, int]:
    """The entry at the start of `data`, and the length of its head. Raises MalformedRecord, also for a head cut off."""
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or not 1 <= size <= ENTRY_HEAD_BYTES_MAX or len(data) < 4 + size:
        raise MalformedRecord(f"a tape's entry with a head of {size} bytes where {len(data)} are left")
    return decode(TapeEntry, bytes(data[4 : 4 + size]), bytes_max=ENTRY_HEAD_BYTES_MAX), 4 + size


class TapeReader:
    """The entries of a tape, one after the other; nothing is copied. `place` is where the next one starts."""

    def __init__(self, tape: memoryview) -> None:
        self._tape = tape
        self.place = 0

    def next(self) -> tuple[TapeEntry, memoryview, memoryview]:
        """The next entry, the bytes of its head, and its payload. Raises MalformedRecord at the end, or if it is cut
        short."""
        rest = self._tape[self.place :]
        if not rest:
            raise MalformedRecord(f"the tape ends at byte {self.place}, and more is needed")
        entry, head = read_head(rest)
        payload = rest[head : head + entry.size_bytes]
        if len(payload) != entry.size_bytes:
            raise MalformedRecord(f"the tape ends within the entry at byte {self.place}")
        self.place += head + entry.size_bytes
        return entry, rest[:head], payload

    @property
    def left(self) -> int:
        """The bytes that are still to be read."""
        return len(self._tape) - self.place


def whole_entries(tape: memoryview) -> int:
    """The length of the sound entries that a tape, ours, begins with: what a crash left of it."""
    reader = TapeReader(tape)
    while reader.left:
        place = reader.place
        try:
            entry, _, payload = reader.next()
        except MalformedRecord:
            return place
        if zlib.crc32(payload) != entry.crc:
            return place
    return reader.place


class TapeHash:
    """The blob id of a tape while it grows, holding one chunk of it."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._size = 0
        self._chunks: list[bytes] = []

    def add(self, data: bytes | memoryview) -> None:
        """The next bytes. Raises LimitExceeded above params.BLOB_BYTES_MAX."""
        self._size += len(data)
        if self._size > params.BLOB_BYTES_MAX:
            raise LimitExceeded(
                f"a segment's tape of more than {params.BLOB_BYTES_MAX} bytes",
                next_step="lower steps_per_segment in job.toml",
            )
        left = memoryview(data)
        while left:
            part = left[: params.BLOB_CHUNK_BYTES - len(self._held)]
            self._held += part
            left = left[len(part) :]
            if len(self._held) == params.BLOB_CHUNK_BYTES:
                self._chunks.append(chunk_hash(memoryview(self._held)))
                self._held = bytearray()

    @property
    def blob(self) -> bytes:
        """The id of the blob that these bytes are: 32 bytes."""
        rest = [chunk_hash(memoryview(self._held))] if self._held else []
        return blob_id(BlobManifest(self._size, (*self._chunks, *rest)))
