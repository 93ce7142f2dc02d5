"""Units of parallel jobs at work on this machine: their workers joined to the links between daemons, their tapes kept.

A unit's port stays open when its worker is done, for its neighbours may still need what it sent; it closes when the
deal is over. It knows nothing of bids, money or receipts.
"""

from __future__ import annotations

import mmap
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from peer.blobs import BlobStore
from peer.events import Input, StartWork
from peer.fetching import link_ends
from peer.run_events import LinkEnds, RunOrder, UnitWaits
from peer.tensor_links import Place, Seat, TensorLinks, TensorPort, expected_of, receivers_of
from peer.work_order import SegmentDone, WorkDone, WorkOrder
from peer.workshop import Workshop
from protocol import params
from protocol.errors import IchibaError
from protocol.payload import PayloadKey
from protocol.program import Program
from protocol.sealing import Keys
from protocol.tape import TapeReader, whole_entries
from protocol.task import TaskSpec

__all__ = ["UnitRunner"]

_LOOK_SECONDS = 1.0  # between two looks at what a unit waits for


@dataclass
class UnitRunner:
    """See the module docstring. folder: of the tapes that are being written."""

    links: TensorLinks
    blobs: BlobStore
    inbox: trio.MemorySendChannel[Input]
    folder: Path
    ports: dict[bytes, TensorPort] = field(default_factory=dict)  # by work
    orders: dict[bytes, RunOrder] = field(default_factory=dict)

    async def run(
        self,
        order: StartWork,
        asked: WorkOrder,
        workshop: Workshop,
        *,
        on_step: Callable[[int, float | None], None],
        on_segment: Callable[[SegmentDone], Awaitable[None]],
    ) -> WorkDone:
        """Run a launched unit beside its neighbours. Raises WorkFailed as Workshop.run does; IchibaError, OSError."""
        assert order.run is not None and isinstance(order.task, TaskSpec), "only a launched unit comes here"
        asked = replace(asked, tape_folder=self.folder)
        tape = self.folder / f"{asked.work_id}-{order.first_segment}.tape"
        outer, have = await trio.to_thread.run_sync(_known, asked.program, order.task, tape)
        port = self._port(order.work, order.run, order.task, outer, have)
        ended: WorkDone | IchibaError | OSError
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._mind, order.work, port)
            try:
                ended = await workshop.run(asked, on_step=on_step, on_segment=on_segment, port=port)
            except (IchibaError, OSError) as error:
                ended = error
            nursery.cancel_scope.cancel()
        if isinstance(ended, WorkDone):
            return ended
        raise ended

    def _port(
        self, work: bytes, order: RunOrder, task: TaskSpec, outer: int, have: frozenset[PayloadKey]
    ) -> TensorPort:
        """The port of a piece of work: that of its last worker, if it had one."""
        if work in self.ports and not self.ports[work].closed:
            return self.ports[work]
        stage = task.stage
        assert stage is not None, "a launched unit is a unit"
        same = [old for old, one in self.orders.items() if (one.run, one.unit) == (order.run, order.unit)]
        for old in [old for old in same if old != work]:
            self.close(old)  # the run went back, and this peer has the unit again
        order = self.orders.setdefault(work, order)
        place = Place(
            order.run, order.unit, order.since[order.unit], receivers_of(stage),
            expected_of(stage, steps=range(task.steps), outer=outer),
        )  # fmt: skip
        port = self.ports[work] = self.links.open(place, _seats(order), have=have)
        return port

    def relink(self, work: bytes, order: RunOrder) -> None:
        """Some of the neighbours are elsewhere now."""
        before, self.orders[work] = self.orders.get(work), order
        port = self.ports.get(work)
        if port is None or port.closed:
            return
        known = _seats(before) if before is not None else {}
        for unit, seat in _seats(order).items():
            if known.get(unit) != seat:
                port.replace(unit, seat.peer, seat.epoch)

    def settled(self, work: bytes, before_step: int) -> None:
        """What was sent in the steps before is not asked for again."""
        if work in self.ports and not self.ports[work].closed:
            self.ports[work].release(before_step)

    def close(self, work: bytes) -> None:
        """The unit has no more to give."""
        self.orders.pop(work, None)
        port = self.ports.pop(work, None)
        if port is not None:
            port.close()

    def forget(self, work: bytes) -> None:
        """The deal is over: its tapes are blobs by now, or of no use."""
        self.close(work)
        for path in self.folder.glob(f"{work.hex()[:32]}-*.tape"):
            path.unlink(missing_ok=True)

    async def ended(self, work: bytes, checkpoint: Path, tape: Path, keys: Keys | None) -> LinkEnds:
        """A segment ended with this checkpoint: its tape becomes a blob, under `keys` as BlobStore.put_file has it.
        Raises MalformedRecord, OSError."""
        blob = await self.blobs.put_file(tape, keys=keys)
        self.blobs.pin(blob, work.hex())
        await trio.to_thread.run_sync(tape.unlink)
        return await trio.to_thread.run_sync(link_ends, checkpoint)

    async def _mind(self, work: bytes, port: TensorPort) -> None:
        """Say for whom a unit waits, while it does."""
        while True:
            await trio.sleep(_LOOK_SECONDS)
            slow = [one.unit for one in port.waiting_for() if one.seconds * 1e9 >= params.UNIT_WAIT_NS]
            if slow:
                try:
                    self.inbox.send_nowait(UnitWaits(work, tuple(sorted(set(slow)))))
                except trio.WouldBlock:
                    continue  # said again in a second


def _seats(order: RunOrder) -> dict[int, Seat]:
    """Who has the other units."""
    every = enumerate(zip(order.peers, order.since, strict=True))
    return {unit: Seat(peer, since) for unit, (peer, since) in every if unit != order.unit}


def _known(program: Path, task: TaskSpec, tape: Path) -> tuple[int, frozenset[PayloadKey]]:
    """How many tensors of the flow `outer` each replica sends, and what a tape of an earlier life holds already."""
    assert task.stage is not None, "a launched unit is a unit"
    parameters = sum(item.role == "parameter" for item in Program.from_bytes(program.read_bytes()).inputs)
    found: set[PayloadKey] = set()
    if tape.exists() and tape.stat().st_size:
        with tape.open("rb") as file:
            kept = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        reader = TapeReader(kept[: whole_entries(kept)])
        while reader.left:
            found.add(reader.next()[0].key)
    return parameters if task.stage.sync == "local" else 0, frozenset(found)
