"""The bytes of /ichiba/<tag>/tensor/1: how two daemons talk about the payloads that one unit sends another. Pure.

The daemon of the unit that sends opens the stream and greets with one frame, a Hello; the other answers with one, a
Greeting, and ends there if it refuses. Then both send items, each a kind and fixed fields, big-endian:

    1 PART   flow u8, micro-batch u16, index u32, length u32, step u64, total u64, offset u64; then `length` bytes
    2 BEAT   the unit it waits for u16 (65535: none), since how many ms u32, stamp u64
    3 ECHO   stamp u64, of a BEAT
    4 GRANT  credit u64: bytes it takes since the greeting; done u64: payloads it has whole since then

PART goes to the receiver, GRANT comes from it, the others go both ways.
"""

from __future__ import annotations

import struct
from typing import Annotated, Final, Literal, NamedTuple

import msgspec

from protocol import params
from protocol.codec import Digest, Uint
from protocol.errors import MalformedRecord
from protocol.payload import PayloadKey
from protocol.stage import FLOWS

__all__ = [
    "BEAT", "ECHO", "GRANT", "NOBODY", "PART", "PROTOCOL", "SIZES", "Beat", "Grant", "Greeting", "Hello", "Part",
    "Refusal", "stamp_of",
]  # fmt: skip

PROTOCOL: Final = "tensor"
PART, BEAT, ECHO, GRANT = 1, 2, 3, 4
NOBODY: Final = 0xFFFF
Unit = Annotated[int, msgspec.Meta(ge=0, le=params.PARALLEL_UNITS_MAX)]
Refusal = Literal["", "unknown-run", "not-yours", "no-link"]

_PART: Final = struct.Struct("!BHIIQQQ")
_BEAT: Final = struct.Struct("!HIQ")
_ECHO: Final = struct.Struct("!Q")
_GRANT: Final = struct.Struct("!QQ")
SIZES: Final = {PART: _PART.size, BEAT: _BEAT.size, ECHO: _ECHO.size, GRANT: _GRANT.size}
_HEAD: Final = tuple(bytes([kind]) for kind in range(5))


class Hello(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="hello"):
    """Who sends to whom. epoch: how often the sending unit was given to somebody, so that who lost it is known by that.
    session: drawn when the sender's port opened; while it is the same, a half-sent payload goes on where it stopped."""

    run: Digest
    unit: Unit
    to: Unit
    epoch: Uint
    session: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Greeting(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="greeting"):
    """What the receiver has: all before step `floor`, `have`, and `partial_bytes` of the payload `partial`."""

    refused: Refusal = ""
    floor: Uint = 0
    credit: Uint = 0
    have: Annotated[tuple[PayloadKey, ...], msgspec.Meta(max_length=params.TENSOR_HAVE_MAX)] = ()
    partial: PayloadKey | None = None
    partial_bytes: Uint = 0


class Part(NamedTuple):
    """`length` bytes at `offset` of the `total` of one payload."""

    key: PayloadKey
    length: int
    total: int
    offset: int

    def pack(self) -> bytes:
        """Its head; the bytes follow."""
        key = self.key
        return _HEAD[PART] + _PART.pack(
            FLOWS.index(key.flow), key.micro_batch, key.index, self.length, key.step, self.total, self.offset
        )

    @classmethod
    def unpack(cls, fields: bytes | memoryview, unit: int) -> Part:
        """Of a unit. Raises MalformedRecord."""
        flow, micro_batch, index, length, step, total, offset = _PART.unpack(fields)
        if flow >= len(FLOWS) or length > params.TENSOR_PART_BYTES or offset + length > total or step >= 2**63:
            raise MalformedRecord(f"a part of {length} bytes at {offset} of {total}, flow {flow}, step {step}")
        if not length and total:
            raise MalformedRecord("a part of no bytes of a payload that has some")
        return cls(PayloadKey(step, FLOWS[flow], micro_batch, index, unit), length, total, offset)


class Beat(NamedTuple):
    """A sign of life. waits_for: the unit that the sender's own worker waits for, since `waited_ms`."""

    waits_for: int
    waited_ms: int
    stamp: int

    def pack(self) -> bytes:
        """As an item."""
        return _HEAD[BEAT] + _BEAT.pack(self.waits_for, min(self.waited_ms, 2**32 - 1), self.stamp)

    @classmethod
    def unpack(cls, fields: bytes | memoryview) -> Beat:
        """Of the fields of an item."""
        return cls(*_BEAT.unpack(fields))

    def echo(self) -> bytes:
        """The answer, as an item."""
        return _HEAD[ECHO] + _ECHO.pack(self.stamp)


class Grant(NamedTuple):
    """Both count since the greeting."""

    credit: int
    done: int

    def pack(self) -> bytes:
        """As an item."""
        return _HEAD[GRANT] + _GRANT.pack(self.credit, self.done)

    @classmethod
    def unpack(cls, fields: bytes | memoryview) -> Grant:
        """Of the fields of an item."""
        return cls(*_GRANT.unpack(fields))


def stamp_of(fields: bytes | memoryview) -> int:
    """The stamp of an ECHO."""
    stamp: int = _ECHO.unpack(fields)[0]
    return stamp
