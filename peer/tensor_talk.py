"""One stream of the tensor protocol while it lives: items read, items written in turn, signs of life both ways.

Promises: a stream on which nothing is heard for a while is given up; whatever ends it ends all its tasks and is raised
as one error. Refuses to know what the payloads are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import trio

from peer.links import PeerUnreachable, Stream
from peer.tensor_wire import BEAT, ECHO, SIZES, Beat, stamp_of
from protocol import params
from protocol.errors import IchibaError, MalformedRecord

__all__ = ["Talk"]

READ_BYTES = 256 * 1024
STAMPS_KEPT = 64  # beats that an echo may still answer


class Talk:
    """See the module docstring. beat: the next sign of life, for a stamp. `heard_at`: when the last byte came, by the
    clock of trio; `told`: the other side's last beat; `round_trip_s`: of the last echo, its time in queues included."""

    def __init__(self, stream: Stream, beat: Callable[[int], Beat]) -> None:
        self.stream = stream
        self.heard_at = trio.current_time()
        self.told: Beat | None = None
        self.told_at = 0.0
        self.round_trip_s = 0.0
        self.round_trip_least_s = float("inf")
        self._beat = beat
        self._view = memoryview(b"")
        self._items: deque[bytes] = deque()
        self._wake = trio.Event()
        self._stamps: deque[int] = deque(maxlen=STAMPS_KEPT)
        self._fault: IchibaError | None = None
        self._scope = trio.CancelScope()

    async def run(self, *tasks: Callable[[Talk], Awaitable[None]]) -> None:
        """Run the tasks and the beats until the first of them ends or fails. Raises what it failed with."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                for task in (*tasks, Talk._keep_alive):
                    nursery.start_soon(self._guarded, task)
        if self._fault is not None:
            raise self._fault

    async def _guarded(self, task: Callable[[Talk], Awaitable[None]]) -> None:
        try:
            await task(self)
        except IchibaError as fault:
            self._fault = self._fault or fault
        self._scope.cancel()

    # --- reading -------------------------------------------------------------------------------------------

    async def next_item(self) -> tuple[int, memoryview] | None:
        """Kind and fields of the next item that is no beat or echo; None at the end.

        Raises PeerUnreachable after silence, MalformedRecord for no item.
        """
        while True:
            if not len(self._view):
                self._view = await self._receive(READ_BYTES)
                if not len(self._view):
                    return None
            kind = self._view[0]
            self._view = self._view[1:]
            if kind not in SIZES:
                raise MalformedRecord(f"an item of kind {kind}")
            fields = await self._exactly(SIZES[kind])
            if kind == BEAT:
                self.told, self.told_at = Beat.unpack(fields), trio.current_time()
                self.say(self.told.echo())
            elif kind == ECHO:
                self._on_echo(stamp_of(fields))
            else:
                return kind, fields

    async def take(self, count: int) -> memoryview:
        """1 to `count` bytes that follow an item. Raises PeerUnreachable."""
        view = self._view if len(self._view) else await self._receive(READ_BYTES)
        if not len(view):
            raise PeerUnreachable("the stream ended within a payload")
        self._view = view[count:]
        return view[:count]

    async def _exactly(self, count: int) -> memoryview:
        if len(self._view) >= count:
            fields, self._view = self._view[:count], self._view[count:]
            return fields
        parts = bytearray()
        while len(parts) < count:
            parts += await self.take(count - len(parts))
        return memoryview(parts)

    async def _receive(self, count: int) -> memoryview:
        if (here := self.stream.view_here(count)) is not None:
            self.heard_at = trio.current_time()
            await trio.lowlevel.checkpoint()  # a window full of short items must not keep the daemon
            return here
        silence_s = params.TENSOR_SILENCE_SECONDS + 8 * self.round_trip_s
        with trio.move_on_after(silence_s):
            view = await self.stream.receive_view(count)
            self.heard_at = trio.current_time()
            return view
        raise PeerUnreachable(f"nothing came for {silence_s:.1f} s")

    def _on_echo(self, stamp: int) -> None:
        if stamp in self._stamps:
            self.round_trip_s = max(0.0, trio.current_time() - stamp / 1e9)
            self.round_trip_least_s = min(self.round_trip_s, self.round_trip_least_s)

    # --- writing -------------------------------------------------------------------------------------------

    def say(self, item: bytes) -> None:
        """Queue an item. Who makes us answer more than anybody reads is cut off by the muxer's silence."""
        if len(self._items) < params.TENSOR_ITEMS_MAX:
            self._items.append(item)
            self._wake.set()

    def wake(self) -> None:
        """There is something to write."""
        self._wake.set()

    async def write(self, more: Callable[[], Awaitable[Sequence[bytes | memoryview]]] | None = None) -> None:
        """Write items, and what `more` gives between them, for ever. Raises PeerUnreachable."""
        while True:
            self._wake = trio.Event()
            pieces: list[bytes | memoryview] = list(self._items)
            self._items.clear()
            if more is not None:
                pieces += await more()
            if not pieces:
                await self._wake.wait()
                continue
            small: list[bytes | memoryview] = []
            for piece in pieces:
                if len(piece) < params.TENSOR_SMALL_BYTES:
                    small.append(piece)
                    continue
                if small:
                    await self.stream.send_all(b"".join(small))
                    small = []
                await self.stream.send_all(piece)
            if small:
                await self.stream.send_all(b"".join(small))

    async def _keep_alive(self) -> None:
        while True:
            stamp = int(trio.current_time() * 1e9)
            self._stamps.append(stamp)
            self.say(self._beat(stamp).pack())
            await trio.sleep(params.TENSOR_BEAT_SECONDS)
