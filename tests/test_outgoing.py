"""The daemon's queues of messages: one for each peer that it writes to, for as long as it does."""

from __future__ import annotations

from typing import Any

import trio

from peer.effects import OUTGOING_IDLE_SECONDS, Performer
from peer.events import Send
from peer.links import PeerUnreachable


class Host:
    """Reaches every peer but those that never were."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, bytes]] = []

    async def send(self, peer: bytes, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if peer.startswith(b"nobody"):
            raise PeerUnreachable("nobody has this key")
        self.sent.append((peer, data))


async def test_a_queue_goes_with_the_last_message_and_none_is_lost(autojump_clock: object) -> None:
    host: Any = Host()
    nothing: Any = None
    inbox, _ = trio.open_memory_channel[Any](1)
    async with trio.open_nursery() as nursery:
        performer = Performer(host, nothing, nothing, nursery, inbox, nothing, nothing)
        tasks = len(nursery.child_tasks)
        for number in range(100):  # as the solvers of a run may be called by who made them up
            performer.perform(Send(b"nobody %d" % number, b"hello"))
        performer.perform(Send(b"friend", b"0"))
        for number in range(1, 4):
            await trio.sleep(OUTGOING_IDLE_SECONDS)  # just when the queue would go
            performer.perform(Send(b"friend", b"%d" % number))
        await trio.sleep(2 * OUTGOING_IDLE_SECONDS)
        assert host.sent == [(b"friend", b"%d" % number) for number in range(4)]
        assert not performer.outgoing and len(nursery.child_tasks) == tasks
        nursery.cancel_scope.cancel()
