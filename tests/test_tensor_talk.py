"""One stream of the tensor protocol: what one neighbour sends keeps nobody else of the daemon waiting."""

from __future__ import annotations

from typing import Any

import trio

from peer.tensor_talk import Talk
from peer.tensor_wire import Beat

VIEWS = 50


class FullStream:
    """As a stream of the muxer whose window is full of beats; then it ends."""

    def __init__(self) -> None:
        self.left = VIEWS

    def view_here(self, count: int) -> memoryview | None:
        if not self.left:
            return None
        self.left -= 1
        return memoryview(Beat(0, 0, 0).pack() * 1000)

    async def receive_view(self, count: int) -> memoryview:
        await trio.lowlevel.checkpoint()
        return memoryview(b"")


async def test_a_window_full_of_short_items_lets_others_have_their_turns() -> None:
    stream: Any = FullStream()
    turns, over = 0, trio.Event()

    async def other() -> None:
        nonlocal turns
        while not over.is_set():
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        assert await Talk(stream, lambda stamp: Beat(0, 0, stamp)).next_item() is None
        over.set()
    assert turns >= VIEWS
