"""The encrypted wire: the messages of the Noise framework, whatever the pieces, and nothing that was tampered with."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from noise.backends.default.backend import DefaultNoiseBackend
from noise.noise_protocol import NoiseProtocol
from noise.state import CipherState

from peer.links import Stream
from peer.noise_wire import LENGTH, MESSAGE_BYTES_MAX, PLAIN_BYTES_MAX, SHORT_BYTES, TAG, NoiseWire
from protocol import params

KEYS = (b"a" * 32, b"b" * 32)
SIZES = (0, 1, 12, SHORT_BYTES - 1, SHORT_BYTES, PLAIN_BYTES_MAX, PLAIN_BYTES_MAX + 1, PLAIN_BYTES_MAX + SHORT_BYTES)


def cipher(key: bytes) -> CipherState:
    """Another implementation of one direction."""
    state = CipherState(NoiseProtocol(b"Noise_XX_25519_ChaChaPoly_SHA256", DefaultNoiseBackend()))
    state.initialize_key(key)
    return state


def message(state: CipherState, plain: bytes) -> bytes:
    """The next message of that implementation."""
    sealed: bytes = state.encrypt_with_ad(b"", plain)
    return len(sealed).to_bytes(LENGTH, "big") + sealed


async def opened(state: CipherState, raw: trio.abc.ReceiveStream) -> list[bytes]:
    """Every message until the end, opened by that implementation."""
    data = b"".join([part async for part in raw])
    found = []
    while data:
        end = LENGTH + int.from_bytes(data[:LENGTH], "big")
        found.append(state.decrypt_with_ad(b"", data[LENGTH:end]))
        data = data[end:]
    return found


@asynccontextmanager
async def wire_and_raw() -> AsyncIterator[tuple[NoiseWire, trio.abc.Stream, trio.abc.Stream]]:
    near, far = trio.testing.memory_stream_pair()
    yield NoiseWire(Stream(near), seal=KEYS[0], open=KEYS[1]), near, far


async def test_what_is_sent_is_read_by_another_implementation_in_full_messages() -> None:
    rng = random.Random(1)
    async with wire_and_raw() as (wire, near, far):
        sent = [[rng.randbytes(rng.choice(SIZES)) for _ in range(rng.randint(1, 9))] for _ in range(40)]
        for first, *more in sent:
            await wire.send(first, *map(memoryview, more))
        await near.aclose()
        found = await opened(cipher(KEYS[0]), far)
    assert b"".join(found) == b"".join(b"".join(pieces) for pieces in sent)
    assert max(map(len, found)) == PLAIN_BYTES_MAX
    assert min(map(len, found)) > 0


async def test_one_long_piece_takes_as_few_messages_as_can_be() -> None:
    async with wire_and_raw() as (wire, near, far):
        await wire.send(b"head", bytes(4 * PLAIN_BYTES_MAX + 60), b"tail")
        await near.aclose()
        found = await opened(cipher(KEYS[0]), far)
    assert list(map(len, found)) == [4, *[PLAIN_BYTES_MAX] * 4, 64]


async def test_short_pieces_travel_together() -> None:
    async with wire_and_raw() as (wire, near, far):
        await wire.send(b"one", *[b"two"] * 1000, bytes(SHORT_BYTES - 1), b"", *[bytes(SHORT_BYTES - 1)] * 20)
        await near.aclose()
        found = await opened(cipher(KEYS[0]), far)
    assert len(found) == 2 and found[0].startswith(b"onetwotwo")
    assert sum(map(len, found)) == 3003 + 21 * (SHORT_BYTES - 1)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000, 65_536, 10**6])
async def test_messages_cut_anywhere_are_read_as_they_were_sent(size: int) -> None:
    rng, other = random.Random(size), cipher(KEYS[1])
    lengths = [0, 1, 0, 100, 5] if size < 1000 else [PLAIN_BYTES_MAX, 0, 1, PLAIN_BYTES_MAX, 70, *[40_000] * 40]
    sent = [rng.randbytes(length) for length in lengths]
    data = b"".join(message(other, plain) for plain in sent)
    async with wire_and_raw() as (wire, _, far), trio.open_nursery() as nursery:

        async def pour() -> None:
            for start in range(0, len(data), size):
                await far.send_all(data[start : start + size])
                await trio.testing.wait_all_tasks_blocked()
            await far.aclose()

        nursery.start_soon(pour)
        found = []
        while plain := await wire.receive():
            found.append(plain)
        assert found == [plain for plain in sent if plain], "an empty message says nothing"
        assert len(wire._in) <= params.NOISE_BUFFER_BYTES


async def test_its_buffers_grow_to_their_bound_and_no_further() -> None:
    async with wire_and_raw() as (wire, _, far), trio.open_nursery() as nursery:
        assert len(wire._in) == MESSAGE_BYTES_MAX and not len(wire._out), "an idle link holds one message"
        other, rounds = NoiseWire(Stream(far), seal=KEYS[1], open=KEYS[0]), 20

        async def pour() -> None:
            for _ in range(rounds):
                await other.send(bytes(400_000))
            await far.aclose()

        nursery.start_soon(pour)
        left = 400_000 * rounds
        while plain := await wire.receive():
            left -= len(plain)
        assert not left
        assert len(wire._in) <= params.NOISE_BUFFER_BYTES and len(other._out) <= params.NOISE_BUFFER_BYTES


@pytest.mark.parametrize("at", [0, 1, LENGTH, LENGTH + 40, -1])
async def test_a_changed_bit_breaks_the_connection(at: int) -> None:
    other = cipher(KEYS[1])
    data = bytearray(message(other, bytes(100)) + message(other, bytes(65_000)))
    data[at] ^= 1
    async with wire_and_raw() as (wire, _, far):
        await far.send_all(data)
        await far.aclose()
        with pytest.raises(trio.BrokenResourceError):
            while await wire.receive():
                pass


@pytest.mark.parametrize(
    "forged",
    [b"\0\0", b"\0\x05hello", b"\0\x10" + bytes(TAG), b"\xff\xff" + bytes(65_535)],
    ids=["nothing", "no tag", "a tag of nothing", "the longest"],
)
async def test_what_no_key_has_sealed_breaks_the_connection(forged: bytes) -> None:
    async with wire_and_raw() as (wire, _, far), trio.open_nursery() as nursery:
        nursery.start_soon(far.send_all, forged)
        with pytest.raises(trio.BrokenResourceError, match="encrypted"):
            await wire.receive()


async def test_a_message_that_comes_again_or_before_its_turn_breaks_the_connection() -> None:
    other = cipher(KEYS[1])
    one, two = message(other, b"one"), message(other, b"two")
    for order in ((one, one), (two, one)):
        async with wire_and_raw() as (wire, _, far):
            await far.send_all(b"".join(order))
            with pytest.raises(trio.BrokenResourceError):
                while await wire.receive():
                    pass


async def test_a_socket_that_breaks_breaks_the_wire() -> None:
    for ends in ("near", "far"):
        near, far = map(trio.SocketStream, trio.socket.socketpair())
        wire, other = (
            NoiseWire(Stream(socket), seal=KEYS[ours], open=KEYS[1 - ours]) for ours, socket in ((0, near), (1, far))
        )
        await other.send(b"hello")
        assert await wire.receive() == b"hello"
        await wire.send(b"never read")
        await (near if ends == "near" else far).aclose()  # with bytes unread: the far end resets the connection
        with pytest.raises(trio.BrokenResourceError):
            await wire.receive()
        with pytest.raises(trio.BrokenResourceError):
            await wire.send(b"more")
        await near.aclose()
        await far.aclose()
