"""The transport messages of Noise: an encrypted Wire, once the handshake has given both sides their keys.

A message is 2 bytes length, big-endian, then at most 65,535 bytes of ciphertext: a plaintext and its tag of 16 bytes.
Promises: what is sent is copied once, by the cipher; what one side makes us hold is one buffer of constant size.
Refuses to know libp2p and the handshake: it gets two keys.

Source: the Noise protocol framework, revision 34, section 5.1 (the nonce of ChaChaPoly: section 12.3); libp2p noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from peer.links import PeerUnreachable, Stream
from protocol import params

__all__ = ["NoiseWire"]

LENGTH: Final = 2
TAG: Final = 16
PLAIN_BYTES_MAX: Final = 65_535 - TAG
MESSAGE_BYTES_MAX: Final = LENGTH + 65_535
SHORT_BYTES: Final = 4 * 1024  # shorter pieces are copied together into one message


class NoiseWire:
    """See the module docstring: a peer.yamux.Wire over `raw`.

    seal, open: the key of 32 bytes of each direction, neither used before; a message's number is its nonce.
    """

    def __init__(self, raw: Stream, *, seal: bytes, open: bytes) -> None:
        self._raw = raw
        self._seal, self._open = ChaCha20Poly1305(seal), ChaCha20Poly1305(open)
        self._sealed_count = self._opened_count = 0
        self._in, self._out = _buffer(MESSAGE_BYTES_MAX), _buffer(0)  # they grow while they are filled
        self._at = self._end = 0  # of what the socket gave and is not yet used, in _in

    async def receive(self) -> bytes:
        """The next message's bytes, empty at the end. Raises trio.BrokenResourceError."""
        while True:
            start = self._at + LENGTH
            end = start + int.from_bytes(self._in[self._at : start], "big")
            if start > self._end or end > self._end:
                if not await self._fill():
                    return b""
                continue
            self._at = end
            try:
                plain = self._open.decrypt(_nonce(self._opened_count), self._in[start:end], None)
            except InvalidTag:
                raise trio.BrokenResourceError("a message that was not encrypted by the peer") from None
            self._opened_count += 1
            if plain:
                return plain

    async def _fill(self) -> bool:
        """Read what there is behind the part of a message that is here; False at the end."""
        rest = self._in[self._at : self._end]
        here = len(rest)
        if self._end == len(self._in) < params.NOISE_BUFFER_BYTES:
            self._in = _buffer(2 * len(self._in))
        self._in[:here] = rest
        self._at, self._end = 0, here
        try:
            count = await self._raw.receive_into(self._in[here:])
        except PeerUnreachable as fault:
            raise trio.BrokenResourceError(str(fault)) from None
        self._end += count
        return count > 0

    async def send(self, data: bytes | memoryview, *more: bytes | memoryview) -> None:
        """Send all of `data` and what follows it. Raises trio.BrokenResourceError."""
        at, due = 0, len(data) + sum(map(len, more))
        due += LENGTH + TAG + due // SHORT_BYTES * (LENGTH + TAG)
        if len(self._out) < min(due, params.NOISE_BUFFER_BYTES):
            self._out = _buffer(max(due, MESSAGE_BYTES_MAX))
        for plain in _messages((data, *more)):
            start, end = at + LENGTH, at + LENGTH + len(plain) + TAG
            if end > len(self._out):
                await self._give(at)
                start, end, at = LENGTH, end - at, 0
            self._out[at:start] = (end - start).to_bytes(LENGTH, "big")
            self._seal.encrypt_into(_nonce(self._sealed_count), plain, None, self._out[start:end])
            self._sealed_count += 1
            at = end
        await self._give(at)

    async def _give(self, count: int) -> None:
        try:
            await self._raw.send_all(self._out[:count])
        except PeerUnreachable as fault:
            raise trio.BrokenResourceError(str(fault)) from None

    async def aclose(self) -> None:
        """Close now."""
        await self._raw.aclose()


def _buffer(size: int) -> memoryview:
    return memoryview(bytearray(min(size, params.NOISE_BUFFER_BYTES)))


def _nonce(number: int) -> bytes:
    return b"\0\0\0\0" + number.to_bytes(8, "little")


def _messages(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The plaintexts of messages: long pieces as they are, cut where they must be; short ones together."""
    short: list[bytes | memoryview] = []
    size = 0
    for piece in pieces:
        rest = piece
        if len(piece) >= SHORT_BYTES:
            if short:
                yield b"".join(short)
                short, size = [], 0
            whole = memoryview(piece)
            while len(whole) >= SHORT_BYTES:
                yield whole[:PLAIN_BYTES_MAX]
                whole = whole[PLAIN_BYTES_MAX:]
            rest = whole
        if size + len(rest) > PLAIN_BYTES_MAX:
            yield b"".join(short)
            short, size = [], 0
        if len(rest):
            short.append(rest)
            size += len(rest)
    if short:
        yield b"".join(short)
