"""The muxer: windows are enforced, streams do not disturb each other, silence and nonsense end the session."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from peer.yamux import ACK, DATA, FIN, GO_AWAY, HEADER, PING, RST, SYN, WINDOW, MuxStream, Session
from protocol import params

WINDOW_BYTES = params.MUX_WINDOW_BYTES


class MemoryWire:
    """A Wire in memory. `stalled` makes sending hang, as a full socket does, and `seconds` makes it slow."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream, self.stalled, self.seconds = stream, False, 0.0
        self.longest = 0  # of what was given at once

    async def receive(self) -> bytes:
        return bytes(await self.stream.receive_some(70_000))

    async def send(self, data: bytes | memoryview, *more: bytes | memoryview) -> None:
        if self.stalled:
            await trio.sleep_forever()
        if self.seconds:
            await trio.sleep(self.seconds)
        self.longest = max(self.longest, len(data) + sum(map(len, more)))
        await self.stream.send_all(b"".join((data, *more)))

    async def aclose(self) -> None:
        await self.stream.aclose()


@asynccontextmanager
async def session_against_raw() -> AsyncIterator[tuple[Session, MemoryWire]]:
    """A listening session, and the bare wire of whoever attacks it."""
    left, right = map(MemoryWire, trio.testing.memory_stream_pair())
    async with trio.open_nursery() as nursery:
        session = Session(left, initiator=False)
        nursery.start_soon(session.run)
        yield session, right
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def two_sessions() -> AsyncIterator[tuple[Session, Session]]:
    left, right = map(MemoryWire, trio.testing.memory_stream_pair())
    async with trio.open_nursery() as nursery:
        pair = Session(left, initiator=True), Session(right, initiator=False)
        for session in pair:
            nursery.start_soon(session.run)
        yield pair
        nursery.cancel_scope.cancel()


async def streams(one: Session, other: Session) -> tuple[MuxStream, MuxStream]:
    ours = await one.open_stream()
    return ours, await other.accept_stream()


async def read_all(stream: MuxStream) -> bytes:
    parts = []
    while part := await stream.receive_some(100_000):
        parts.append(part)
    return b"".join(parts)


async def frame(wire: MemoryWire) -> tuple[int, int, int, int]:
    """The next frame without payload the session sends: kind, flags, stream, length."""
    data = b""
    while len(data) < HEADER.size:
        data += bytes(await wire.stream.receive_some(HEADER.size - len(data)))
    _, kind, flags, number, length = HEADER.unpack(data)
    return kind, flags, number, length


async def test_bytes_arrive_in_order_both_ways_beyond_the_window() -> None:
    data = bytes(range(256)) * 20_000  # 5 MB, many windows
    async with two_sessions() as (one, other), trio.open_nursery() as nursery:
        ours, theirs = await streams(one, other)

        async def send(stream: MuxStream) -> None:
            await stream.send_all(data)
            stream.close_write()

        nursery.start_soon(send, ours)
        nursery.start_soon(send, theirs)
        assert await read_all(theirs) == data and await read_all(ours) == data
        assert one.streams == {} and other.streams == {}


async def test_what_its_owner_changes_afterwards_is_sent_as_it_was() -> None:
    async with two_sessions() as (one, other):
        ours, theirs = await streams(one, other)
        data = bytearray(b"first" * 1000)
        await ours.send_all(data)
        data[:] = bytes(len(data))
        await ours.send_all(memoryview(data)[:3])
        data[:3] = b"xyz"
        ours.close_write()
        assert await read_all(theirs) == b"first" * 1000 + bytes(3)


@pytest.mark.parametrize(("seconds", "frame_bytes"), [(0.0, 256 * 1024), (0.03, params.MUX_FRAME_BYTES_MAX)])
async def test_only_a_quick_wire_is_given_long_frames(
    seconds: float, frame_bytes: int, autojump_clock: MockClock
) -> None:
    async with two_sessions() as (one, other), trio.open_nursery() as nursery:
        one.wire.seconds = seconds  # type: ignore[attr-defined]
        ours, theirs = await streams(one, other)
        theirs.window_max = 4 * frame_bytes
        nursery.start_soon(ours.send_all, bytes(10**7))
        left = 10**7
        while left:
            left -= len(await theirs.receive_some(left))
        longest = one.wire.longest  # type: ignore[attr-defined]
        assert one.frame_bytes_max == frame_bytes <= longest <= frame_bytes + params.MUX_SHORT_BYTES + HEADER.size


async def test_half_close_lets_the_answer_through() -> None:
    async with two_sessions() as (one, other):
        ours, theirs = await streams(one, other)
        await ours.send_all(b"question")
        ours.close_write()
        assert await read_all(theirs) == b"question"
        await theirs.send_all(b"answer")
        theirs.aclose()
        assert await read_all(ours) == b"answer"
        with pytest.raises(trio.BrokenResourceError):
            await ours.send_all(b"more")


async def test_a_reader_that_stops_stops_only_its_own_sender(autojump_clock: MockClock) -> None:
    async with two_sessions() as (one, other), trio.open_nursery() as nursery:
        stuck, _unread = await streams(one, other)
        nursery.start_soon(stuck.send_all, bytes(10 * WINDOW_BYTES))
        free, read = await streams(one, other)
        for _ in range(10):
            await free.send_all(bytes(50_000))
            left = 50_000
            while left:
                left -= len(await read.receive_some(left))
        assert stuck.send_window == 0
        nursery.cancel_scope.cancel()


async def test_a_cancelled_sender_breaks_no_frame() -> None:
    async with two_sessions() as (one, other):
        ours, theirs = await streams(one, other)
        with trio.move_on_after(0):
            await ours.send_all(bytes(10 * WINDOW_BYTES))
        second, accepted = await streams(one, other)
        await second.send_all(b"fine")
        assert await accepted.receive_some(10) == b"fine"
        ours.reset()
        with pytest.raises(trio.BrokenResourceError):
            while await theirs.receive_some(100_000):
                pass


async def test_closing_with_the_peer_still_sending_resets_it() -> None:
    async with two_sessions() as (one, other):
        ours, theirs = await streams(one, other)
        ours.aclose()
        assert await theirs.receive_some(1) == b""
        with pytest.raises(trio.BrokenResourceError):
            for _ in range(100):
                await theirs.send_all(bytes(WINDOW_BYTES // 4))
                await trio.testing.wait_all_tasks_blocked()


async def test_a_ping_comes_back() -> None:
    async with two_sessions() as (one, other):
        assert 0 <= await one.ping() < 5
        assert 0 <= await other.ping() < 5


@pytest.mark.parametrize(
    ("attack", "why"),
    [
        (HEADER.pack(1, DATA, 0, 1, 0), "version 1"),
        (HEADER.pack(0, 9, 0, 1, 0), "type 9"),
        (HEADER.pack(0, WINDOW, SYN, 2, 0), "not its to open"),
        (HEADER.pack(0, WINDOW, SYN, 0, 0), "not its to open"),
        (HEADER.pack(0, WINDOW, SYN, 1, 0) * 2, "not its to open"),
        (HEADER.pack(0, DATA, SYN, 1, WINDOW_BYTES + 1), f"{WINDOW_BYTES + 1} bytes"),
        (HEADER.pack(0, DATA, SYN, 1, 2**32 - 1), "bytes on a stream"),
        (HEADER.pack(0, WINDOW, SYN, 1, 2**32 - 1), "a window of more"),
        (HEADER.pack(0, WINDOW, SYN | FIN, 1, 0) + HEADER.pack(0, DATA, 0, 1, 1), "1 bytes"),
    ],
)
async def test_a_broken_rule_ends_the_session_and_is_named(attack: bytes, why: str) -> None:
    async with session_against_raw() as (session, attacker):
        await attacker.send(attack)
        await session.ended.wait()
        assert why in session.violation


async def test_an_overrun_window_is_a_violation_not_memory() -> None:
    async with session_against_raw() as (session, attacker):
        await attacker.send(HEADER.pack(0, WINDOW, SYN, 1, 0))
        await session.accept_stream()
        with pytest.raises(trio.BrokenResourceError):
            for _ in range(1000):
                await attacker.send(HEADER.pack(0, DATA, 0, 1, 60_000) + bytes(60_000))
                await trio.testing.wait_all_tasks_blocked()
        assert "window" in session.violation


@pytest.mark.parametrize("filler", [0, 50], ids=["single-bytes", "among-idle-frames"])
async def test_what_lies_unread_takes_no_more_memory_than_its_window(filler: int) -> None:
    count = 4_000
    async with session_against_raw() as (session, wire):
        await wire.send(HEADER.pack(0, WINDOW, SYN, 1, 0))
        stream = await session.accept_stream()
        idle = HEADER.pack(0, PING, ACK, 0, 0) * filler
        tracemalloc.start()
        try:
            for number in range(count):
                await wire.send(HEADER.pack(0, DATA, 0, 1, 1) + bytes([number % 256]) + idle)
            await trio.testing.wait_all_tasks_blocked()
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < 200_000, f"{count} unread bytes hold {held}"
        found = b""
        while len(found) < count:
            found += await stream.receive_some(700)
        assert found == bytes(number % 256 for number in range(count))


async def test_too_many_streams_are_reset_one_by_one() -> None:
    async with session_against_raw() as (session, attacker):
        for number in range(params.MUX_STREAMS_INBOUND_MAX + 3):
            await attacker.send(HEADER.pack(0, WINDOW, SYN, 2 * number + 1, 0))
        answers = [(await frame(attacker))[:3] for _ in range(params.MUX_STREAMS_INBOUND_MAX + 3)]
        assert [flags for _, flags, _ in answers] == [ACK] * params.MUX_STREAMS_INBOUND_MAX + [RST] * 3
        assert len(session.streams) == params.MUX_STREAMS_INBOUND_MAX and not session.ended.is_set()


async def test_bytes_of_a_stream_long_gone_are_dropped() -> None:
    async with session_against_raw() as (session, attacker):
        await attacker.send(HEADER.pack(0, WINDOW, SYN, 7, 0))
        (await session.accept_stream()).reset()
        assert [(await frame(attacker))[:3] for _ in range(2)] == [(WINDOW, ACK, 7), (WINDOW, RST, 7)]
        await attacker.send(HEADER.pack(0, DATA, 0, 7, 4) + b"gone" + HEADER.pack(0, PING, SYN, 0, 42))
        assert await frame(attacker) == (PING, ACK, 0, 42)
        assert session.streams == {} and not session.ended.is_set()
        # Its window was all it could have sent before it knew.
        await attacker.send(HEADER.pack(0, DATA, 0, 7, WINDOW_BYTES))
        await session.ended.wait()
        assert "closed" in session.violation


async def test_who_floods_and_does_not_read_cannot_fill_memory() -> None:
    async with session_against_raw() as (session, attacker):
        session.wire.stalled = True  # type: ignore[attr-defined]
        for _ in range(5):
            await attacker.send(HEADER.pack(0, PING, SYN, 0, 1) * 1000)
            await trio.testing.wait_all_tasks_blocked()
        assert len(session._control) <= params.MUX_CONTROL_FRAMES_MAX and not session.ended.is_set()
        with suppress(trio.BrokenResourceError):
            for number in range(params.MUX_CONTROL_FRAMES_MAX + 100):
                await attacker.send(HEADER.pack(0, WINDOW, SYN, 2 * number + 1, 0))
        await session.ended.wait()
        assert "provokes" in session.violation


async def test_a_silent_peer_is_noticed(autojump_clock: MockClock) -> None:
    async with session_against_raw() as (session, _):
        started = trio.current_time()
        await session.ended.wait()
        waited = trio.current_time() - started
        assert params.MUX_SILENCE_SECONDS_MAX <= waited <= params.MUX_SILENCE_SECONDS_MAX + 15
        assert "silent" in session.reason and not session.violation


async def test_an_idle_session_between_living_peers_stays(autojump_clock: MockClock) -> None:
    async with two_sessions() as (one, other):
        await trio.sleep(3600)
        assert not one.ended.is_set() and not other.ended.is_set()
        assert one.bytes_in < 3600 * 12


async def test_a_socket_that_takes_nothing_is_noticed(autojump_clock: MockClock) -> None:
    async with session_against_raw() as (session, attacker), trio.open_nursery() as nursery:
        session.wire.stalled = True  # type: ignore[attr-defined]
        stream = await session.open_stream()

        async def alive() -> None:
            while True:
                await attacker.send(HEADER.pack(0, PING, SYN, 0, 1))
                await trio.sleep(5)

        nursery.start_soon(alive)
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(bytes(10 * WINDOW_BYTES))
        assert "takes no bytes" in session.reason
        nursery.cancel_scope.cancel()


async def test_a_stream_the_peer_never_closes_is_reset_after_a_while(autojump_clock: MockClock) -> None:
    async with two_sessions() as (one, other):
        ours, theirs = await streams(one, other)
        ours.aclose()
        await trio.sleep(params.MUX_LINGER_SECONDS_MAX + params.MUX_KEEPALIVE_SECONDS + 1)
        assert one.streams == {} and theirs.broken and not one.ended.is_set()


@pytest.mark.parametrize("goodbye", [b"", HEADER.pack(0, GO_AWAY, 0, 0, 0)])
async def test_the_end_wakes_everybody_who_waits(goodbye: bytes) -> None:
    async with session_against_raw() as (session, attacker), trio.open_nursery() as nursery:
        stream = await session.open_stream()
        ended = []

        async def wait(what: str) -> None:
            try:
                if what == "read":
                    await stream.receive_some(1)
                elif what == "write":
                    await stream.send_all(bytes(2 * WINDOW_BYTES))
                elif what == "ping":
                    await session.ping()
                else:
                    await session.accept_stream()
            except (trio.BrokenResourceError, trio.EndOfChannel):
                ended.append(what)

        for what in ("read", "write", "ping", "accept"):
            nursery.start_soon(wait, what)
        await trio.testing.wait_all_tasks_blocked()
        if goodbye:
            await attacker.send(goodbye)
        else:
            await attacker.aclose()
        await session.ended.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(ended) == ["accept", "ping", "read", "write"]
        with pytest.raises(trio.BrokenResourceError):
            await session.open_stream()


async def test_frames_cut_anywhere_mean_the_same() -> None:
    sent = HEADER.pack(0, WINDOW, SYN, 1, 0) + HEADER.pack(0, DATA, 0, 1, 5) + b"hello"
    sent += HEADER.pack(0, DATA, FIN, 1, 0)
    for size in (1, 2, 11, 13, 17):
        async with session_against_raw() as (session, attacker):
            for start in range(0, len(sent), size):
                await attacker.send(sent[start : start + size])
            assert await read_all(await session.accept_stream()) == b"hello"
