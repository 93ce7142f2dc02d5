"""The turns of a node: take inputs together, verify ahead, handle, commit, then perform.

The crash rule lives here: what a turn changed is committed in one transaction, and only then leaves the machine what it
sends. Order is kept throughout. Three turns are under way at once, each in one stage: while one is written to the disk,
the next is in the node, and the signatures of the one after are computed in threads. A stage hands over when the next
is free, so a burst waits in the inbox, which is bounded, and makes the turns larger. A commit that fails ends all: a
node that knows more than its disk would promise what it cannot keep.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio

from peer.clock import Clock, Reading
from peer.events import Effect, Emit, Input, Post, Save
from peer.store import Batch, Store
from peer.store import Event as LogLine
from peer.verifying import Verifier
from protocol import params
from protocol.keys import peer_name

__all__ = ["Turns", "open_clock", "readable"]

CLOCK_TABLE: Final = "clock"
CLOCK_KEY: Final = b"now"  # node time of the last commit, ns: 8 bytes, big-endian
PEER_FIELDS: Final = frozenset(("solver", "submitter", "checker", "challenger", "notary", "peer"))


def steady_ns() -> int:
    """A clock that nobody sets and that goes on while the machine sleeps, where the system has one."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def open_clock(store: Store) -> Clock:
    """The clock of a peer whose last life wrote this store."""
    last_ns = int.from_bytes(store.get(CLOCK_TABLE, CLOCK_KEY) or b"", "big")
    return Clock(wall_ns=time.time_ns(), steady_ns=steady_ns(), last_ns=last_ns)


def readable(data: Any, name: str = "") -> Any:
    """Event data for people and JSON: peers by name, other bytes in hex."""
    if isinstance(data, bytes):
        return peer_name(data) if name in PEER_FIELDS else data.hex()
    if isinstance(data, dict):
        return {key: readable(value, key) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [readable(value, name) for value in data]
    return data


@dataclass(frozen=True)
class _Turn:
    """What a node made of its inputs at one time."""

    time: Reading
    effects: list[Effect]


class Turns:
    """See the module docstring. handle: the node's. perform: an effect that leaves the machine. tell: an event, once it
    is journalled, as people and JSON see it. foresee: work that inputs will need from the node and that is better done
    before, in a thread and for all of them at once; None where there is none."""

    def __init__(
        self,
        *,
        handle: Callable[[Input, int, int], list[Effect]],
        store: Store,
        verifier: Verifier,
        clock: Clock,
        perform: Callable[[Effect], None],
        tell: Callable[[dict[str, Any]], None] = lambda _: None,
        foresee: Callable[[Sequence[Input]], Callable[[], None] | None] = lambda _: None,
    ) -> None:
        self._handle, self._store, self._verifier, self._clock = handle, store, verifier, clock
        self._perform, self._tell, self._foresee = perform, tell, foresee
        self._last_seq = 0
        self.time = Reading(clock.now_ns, clock.now_ns)  # of the last turn in the node

    async def run(self, inputs: trio.MemoryReceiveChannel[Input]) -> None:
        """Until `inputs` are closed and all of them done. Raises what `Store.commit` raises."""
        verified_in, verified = trio.open_memory_channel[list[Input]](0)
        handled_in, handled = trio.open_memory_channel[_Turn](0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._verify_all, inputs, verified_in)
            nursery.start_soon(self._handle_all, verified, handled_in)
            async with handled:
                async for turn in handled:
                    await self._commit(turn)
                    for effect in turn.effects:
                        if not isinstance(effect, Save | Post | Emit):
                            self._perform(effect)

    async def _verify_all(
        self, inputs: trio.MemoryReceiveChannel[Input], verified: trio.MemorySendChannel[list[Input]]
    ) -> None:
        async with verified:
            async for first in inputs:
                batch = [first]
                while len(batch) < params.INPUTS_PER_COMMIT_MAX:
                    try:
                        batch.append(inputs.receive_nowait())
                    except (trio.WouldBlock, trio.EndOfChannel):
                        break
                if len(batch) > 1:
                    await trio.to_thread.run_sync(self._verifier.ahead_of, batch)
                await verified.send(batch)

    async def _handle_all(
        self, verified: trio.MemoryReceiveChannel[list[Input]], handled: trio.MemorySendChannel[_Turn]
    ) -> None:
        async with verified, handled:
            async for batch in verified:
                if len(batch) >= params.SIGNATURES_AHEAD_MIN and (work := self._foresee(batch)) is not None:
                    await trio.to_thread.run_sync(work)
                now = self.time = self._clock.read(wall_ns=time.time_ns(), steady_ns=steady_ns())
                effects: list[Effect] = [Emit("problem", b"", {"what": now.words()})] if now.jumped_ns else []
                for one in batch:
                    effects += self._handle(one, now.now_ns, now.wall_ns)
                if effects:
                    await handled.send(_Turn(now, effects))

    async def _commit(self, turn: _Turn) -> None:
        puts: list[tuple[str, bytes, bytes | None]] = []
        entries, events = [], []
        for effect in turn.effects:
            match effect:
                case Save(table=table, key=key, value=value):
                    puts.append((table, key, value))
                case Post(entry=entry):
                    entries.append(entry)
                case Emit():
                    events.append(self._event(effect, turn.time))
                case _:
                    pass
        lines = [LogLine(event["job"], event["time_ns"], json.dumps(event)) for event in events if event["job"]]
        if puts or entries or lines:
            # Whatever leaves after this commit bears no later time or number than the next life will begin with.
            puts.append((CLOCK_TABLE, CLOCK_KEY, turn.time.now_ns.to_bytes(8, "big")))
            await trio.to_thread.run_sync(self._store.commit, [Batch(tuple(puts), tuple(entries), tuple(lines))])
        for event in events:  # only what is journalled is told
            self._tell(event)

    def _event(self, effect: Emit, now: Reading) -> dict[str, Any]:
        self._last_seq = max(self._last_seq + 1, now.now_ns)
        head = {"seq": self._last_seq, "time_ns": now.wall_ns, "kind": effect.kind}
        return head | {"job": effect.job.hex() if effect.job else None} | dict(readable(effect.data))
