"""Canonical bytes: one encoding for each value, one hash for each encoding.

Records are `msgspec.Struct`s written as msgpack arrays whose first element is the domain tag and whose second
is the network id. `decode` refuses bytes that do not re-encode to themselves, so a record has exactly one id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

import msgspec

from protocol.errors import LimitExceeded, MalformedRecord

__all__ = ["Digest", "PeerKey", "Signature", "Uint", "blake", "decode", "encode", "ids_digest"]

Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
PeerKey = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
Uint = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def blake(domain: str, *parts: bytes) -> bytes:
    """BLAKE2b-256 of `parts` under `domain`. Each part is length-prefixed, so no two lists collide.

    Source: RFC 7693; domain separation by the `person`-free prefix of DESIGN §7 ("Hash: BLAKE2b-256").
    """
    h = hashlib.blake2b(digest_size=32)
    tag = domain.encode()
    h.update(len(tag).to_bytes(2, "little") + tag)
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.digest()


def encode(value: Any) -> bytes:
    """Canonical msgpack of a Struct or of plain values."""
    return _encoder.encode(value)


def decode(kind: type[T], data: bytes, *, bytes_max: int) -> T:
    """`data` as a `kind` (a Struct or a union of tagged Structs).

    Raises LimitExceeded above `bytes_max`, MalformedRecord for anything that is not the canonical encoding
    of a `kind`.
    """
    if len(data) > bytes_max:
        raise LimitExceeded(f"record of {len(data)} bytes, at most {bytes_max} are read")
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        value = decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedRecord(f"not a known record: {error}"[:200]) from None
    if _encoder.encode(value) != data:
        raise MalformedRecord("record is not in canonical form", why="its bytes do not re-encode to themselves")
    return value  # type: ignore[no-any-return]


def ids_digest(ids: Iterable[bytes]) -> bytes:
    """An order-free digest of a set of record ids (their XOR), for anti-entropy: equal sets, equal digests."""
    total = 0
    for one in ids:
        total ^= int.from_bytes(one, "little")
    return total.to_bytes(32, "little")
