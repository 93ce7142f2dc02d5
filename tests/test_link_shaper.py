"""A shaped link is as slow as it is told to be, loses nothing, keeps order, and stops a fast sender."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from peer.link_shaper import Shape, ShapedSocket, Shaper, parse_shaper
from protocol.errors import LocalProtocolError
from protocol.keys import peer_name

MEGABIT = 1e6 / 8


async def deliver(shape: Shape, sizes: list[int], nursery: trio.Nursery) -> tuple[list[float], float]:
    """When each of the pieces has arrived whole, and when the sender was done, from the start."""
    near, far = trio.testing.memory_stream_pair()
    shaped = ShapedSocket(near, shape, random.Random(1))
    nursery.start_soon(shaped.run)
    started, done = trio.current_time(), 0.0

    async def send() -> None:
        nonlocal done
        for number, size in enumerate(sizes):
            await shaped.send_all(bytes([number]) * size)
        done = trio.current_time() - started

    nursery.start_soon(send)
    arrived, seen = [], b""
    for number, size in enumerate(sizes):
        while len(seen) < size:
            seen += await far.receive_some(1 << 20)
        assert seen[:size] == bytes([number]) * size
        seen = seen[size:]
        arrived.append(trio.current_time() - started)
    await shaped.aclose()
    return arrived, done


async def test_a_delay_delays_and_does_not_slow(nursery: trio.Nursery, autojump_clock: object) -> None:
    arrived, done = await deliver(Shape(delay_s=0.05), [1000, 1_000_000, 10], nursery)
    assert arrived == pytest.approx([0.05] * 3, abs=1e-6)
    assert done == pytest.approx(0, abs=1e-6)


async def test_a_rate_slows_and_its_sender_waits(nursery: trio.Nursery, autojump_clock: object) -> None:
    arrived, done = await deliver(Shape(0.05, 10 * MEGABIT), [1_250_000, 1_250_000], nursery)
    assert arrived == pytest.approx([1.05, 2.05], rel=0.01)
    assert 1.9 < done < 2.0, "only a small buffer is ahead of the line"


async def test_jitter_changes_when_and_not_what(nursery: trio.Nursery, autojump_clock: object) -> None:
    arrived, _ = await deliver(Shape(0.05, 0, jitter_s=0.02), [10] * 50, nursery)
    assert arrived == sorted(arrived)
    assert 0.05 <= arrived[0] < arrived[-1] <= 0.07


async def test_a_broken_socket_is_told_to_the_sender(nursery: trio.Nursery, autojump_clock: object) -> None:
    near, far = trio.testing.memory_stream_pair()
    shaped = ShapedSocket(near, Shape(0.05), random.Random(1))
    nursery.start_soon(shaped.run)
    await trio.aclose_forcefully(far)
    await shaped.send_all(b"lost")
    await trio.sleep(1)
    with pytest.raises(trio.BrokenResourceError):
        await shaped.send_all(b"more")


def test_words_say_which_link_is_how_slow() -> None:
    far = b"\x07" * 32
    shaper = parse_shaper(f"50ms,100mbit,jitter=5ms;{peer_name(far)}=200ms,10mbit")
    assert shaper == Shaper(Shape(0.05, 100 * MEGABIT, 0.005), {far: Shape(0.2, 10 * MEGABIT)})
    assert shaper.of(far).words() == "200ms,10mbit"
    assert shaper.of(b"\x08" * 32).words() == "50ms,100mbit,jitter=5ms"
    for wrong in ("fast", "-1ms", "10mbits", "nanms", "jitter=1"):
        with pytest.raises(LocalProtocolError):
            parse_shaper(wrong)
