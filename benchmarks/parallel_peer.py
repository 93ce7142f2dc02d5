"""One peer of benchmarks/parallel.py: a real host, a real workshop, real links, in a process of its own.

It reads commands from its input and tells what happens on its output, both as lines of JSON. A unit's segments pass a
gate: what crosses its borders in a step at or behind the gate waits until the command `go` moves it, so one run may
stand still while another is measured, and all units of a segment begin at once. Times are of CLOCK_MONOTONIC, which
all processes of a machine share.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import trio

from peer.blobs import BlobStore
from peer.host import HostConfig, open_host
from peer.link_shaper import Shaper, parse_shaper
from peer.tensor_links import PROTOCOL, Place, Seat, TensorLinks, TensorPort, expected_of, receivers_of
from peer.work_order import SegmentDone, WorkFailed, WorkOrder
from peer.workshop import Workshop
from protocol.errors import IchibaError
from protocol.payload import PayloadKey
from protocol.program import Program, state_layout
from protocol.stage import OUTER_PREFIX
from protocol.task import TaskSpec

STORE_BYTES = 8 * 1024**3
WALL_SECONDS = 3600.0
POLL_SECONDS = 0.1  # between two looks at who is waited for


def tell(kind: str, **fields: Any) -> None:
    """One event to whoever drives."""
    print(json.dumps({"kind": kind, "t": time.monotonic(), **fields}), flush=True)


@dataclass(eq=False)
class Gate:
    """The StagePort of a unit, behind a gate; counts the payload bytes that leave, by flow."""

    port: TensorPort
    before_step: int
    sent: Counter[str] = field(default_factory=Counter)
    _moved: trio.Event = field(default_factory=trio.Event)

    def go(self, before_step: int) -> None:
        """Let pass what is of steps before."""
        self.before_step = before_step
        self._moved.set()
        self._moved = trio.Event()

    async def _pass(self, step: int) -> None:
        while step >= self.before_step:
            await self._moved.wait()

    async def send(self, key: PayloadKey, others: tuple[int, ...], payload: bytes) -> None:
        """As StagePort."""
        await self._pass(key.step)
        self.sent[key.flow] += len(payload) * len(others)
        await self.port.send(key, others, payload)

    async def want(self, key: PayloadKey) -> bytes:
        """As StagePort."""
        await self._pass(key.step)
        return await self.port.want(key)


@dataclass(eq=False)
class Peer:
    """All that this process has. runs: by the name of the run and the unit."""

    folder: Path
    host: Any
    links: TensorLinks
    workshop: Workshop
    store: BlobStore
    nursery: trio.Nursery
    runs: dict[tuple[str, int], Gate] = field(default_factory=dict)
    scopes: dict[tuple[str, int], trio.CancelScope] = field(default_factory=dict)
    gone: dict[str, int] = field(default_factory=dict)  # run -> where its gate is, also for a unit still on its way

    # --- commands ------------------------------------------------------------------------------------------
    async def connect(self, addresses: list[str]) -> None:
        """Be linked to these."""
        for address in addresses:
            await self.host.connect(address)
        tell("connected")

    async def shape(self, words: str) -> None:
        """From now on the links of this peer are so slow."""
        self.host.links.reshape(parse_shaper(words))
        tell("shaped")

    async def warm(self) -> None:
        """Have a worker ready."""
        self.workshop.prewarm()
        while not self.workshop.warm:
            if self.workshop.warm_failure:
                raise RuntimeError(self.workshop.warm_failure)
            await trio.sleep(POLL_SECONDS)
        tell("warm")

    async def keep(self, path: str) -> None:
        """Take a file into the store, to give it to others."""
        tell("kept", path=path, blob=(await self.store.put_file(Path(path))).hex())

    async def fetch(self, blob: str, source: str, size: int) -> Path:
        """Bring a blob here."""
        began = time.monotonic()
        path = await self.store.fetch(self.host, bytes.fromhex(blob), [bytes.fromhex(source)], size_max=size)
        tell("fetched", blob=blob, seconds=time.monotonic() - began, bytes=path.stat().st_size)
        return path

    async def go(self, run: str, before_step: int) -> None:
        """Move the gate of every unit of a run here."""
        self.gone[run] = before_step
        for (name, _), gate in self.runs.items():
            if name == run:
                gate.go(before_step)

    async def release(self, run: str, before_step: int) -> None:
        """What was sent before is not needed any more."""
        for (name, _), gate in self.runs.items():
            if name == run:
                gate.port.release(before_step)

    async def replace(self, run: str, unit: int, peer: str, epoch: int) -> None:
        """Somebody else has a unit."""
        for (name, mine), gate in self.runs.items():
            if name == run and mine != unit:
                gate.port.replace(unit, bytes.fromhex(peer), epoch)

    async def stop(self, run: str, unit: int) -> None:
        """Leave a unit."""
        self.scopes[run, unit].cancel()

    async def unit(
        self, run: str, unit: str, seats: dict[str, tuple[str, int]], *, before_step: int, first_segment: int = 0,
        epoch: int = 0, base: tuple[str, str, int] | None = None,
    ) -> None:  # fmt: skip
        """Run a unit whose files are told in the file `unit`. base: the blob it starts from, who has it, its size."""
        told = told_in(unit)
        order = order_of(told, self.folder, f"{run}-{told['unit']}")
        task = msgspec.msgpack.decode(order.task, type=TaskSpec)
        stage = task.stage
        assert stage is not None
        if base is not None:
            order = replace(order, base=await self.fetch(*base), first_segment=first_segment)
        place = Place(
            stage.run, stage.unit, epoch, receivers_of(stage),
            expected_of(stage, steps=range(task.steps), outer=outer_of(order.program.read_bytes(), task)),
        )  # fmt: skip
        known = {int(other): Seat(bytes.fromhex(peer), age) for other, (peer, age) in seats.items()}
        key = run, stage.unit
        with trio.CancelScope() as scope, self.links.open(place, known) as port:
            self.scopes[key] = scope
            gate = self.runs[key] = Gate(port, max(before_step, self.gone.get(run, 0)))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, run, stage.unit, port)
                await self._work(run, stage.unit, order, gate)
                await trio.sleep_forever()  # neighbours may still need what was sent
        del self.runs[key], self.scopes[key]
        tell("stopped", run=run, unit=stage.unit)

    async def _watch(self, run: str, unit: int, port: TensorPort) -> None:
        """Tell of neighbours that are waited for and not there."""
        told: set[tuple[int, bytes]] = set()
        while True:
            await trio.sleep(POLL_SECONDS)
            missing = {(wait.unit, wait.peer) for wait in port.waiting_for() if not wait.linked}
            for neighbour, peer in sorted(missing - told):
                tell("lost", run=run, unit=unit, neighbour=neighbour, peer=peer.hex())
            told = missing

    async def _work(self, run: str, unit: int, order: WorkOrder, gate: Gate | None) -> None:
        async def ended(done: SegmentDone) -> None:
            tell(
                "segment", run=run, unit=unit, segment=done.segment, root=done.out_root.hex(),
                losses=done.losses, checkpoint=str(done.checkpoint), tape=str(done.tape) if done.tape else "",
                checkpoint_bytes=done.checkpoint_bytes, sent=dict(gate.sent) if gate else {},
            )  # fmt: skip
            if gate:
                gate.sent.clear()

        def stepped(step: int, loss: float | None) -> None:
            tell("step", run=run, unit=unit, step=step, loss=loss)

        try:
            done = await self.workshop.run(order, on_step=stepped, on_segment=ended, port=gate)
        except WorkFailed as error:
            tell("failed", run=run, unit=unit, what=f"{error.code}: {error}", log=error.log_tail[-2000:])
        else:
            tell("done", run=run, unit=unit, seconds=done.seconds, memory=done.memory_peak_bytes)

    async def check(self, run: str, unit: str, segment: int, base: str, tapes: list[str], name: str) -> None:
        """Compute one segment of a run again from its base and tape, as a checker does, under a name of its own."""
        order = order_of(told_in(unit), self.folder, name)
        order = replace(
            order, base=Path(base), first_segment=segment, last_segment=segment + 1, tape_folder=None,
            tapes=tuple(map(Path, tapes)),
        )  # fmt: skip
        await self._work(name, -1, order, None)

    async def plain(self, order: str, name: str, base: tuple[str, str, int]) -> None:
        """Fetch a state and train from it, as a peer that has just come does."""
        made = order_of(told_in(order), self.folder, name)
        await self._work(name, 0, replace(made, base=await self.fetch(*base), tape_folder=None), None)


def told_in(path: str) -> dict[str, Any]:
    """A unit's description (parallel_job.py)."""
    return dict(json.loads(Path(path).read_text()))


def order_of(told: dict[str, Any], folder: Path, name: str) -> WorkOrder:
    """A unit's order from its description."""
    task = Path(told["task"]).read_bytes()
    segments = msgspec.msgpack.decode(task, type=TaskSpec).segments
    return WorkOrder(
        work_id=name, task=task, program=Path(told["program"]), base=Path(told["base"]),
        arrays={array: Path(path) for array, path in told["arrays"].items()}, first_segment=0, last_segment=segments,
        threads=1, memory_bytes=told["memory_bytes"], wall_seconds=WALL_SECONDS,
        checkpoint_bytes_max=told["checkpoint_bytes"], tape_folder=folder / "tapes",
    )  # fmt: skip


def outer_of(program: bytes, task: TaskSpec) -> int:
    """How many tensors go to each other replica at a segment's end."""
    assert task.stage is not None
    layout = state_layout(Program.from_bytes(program))
    return sum(name.startswith(OUTER_PREFIX) for name in layout) if task.stage.sync == "local" else 0


async def commands() -> AsyncIterator[dict[str, Any]]:
    """The lines of our input, until it ends."""
    async with trio.lowlevel.FdStream(sys.stdin.fileno()) as stream:
        rest = b""
        while data := await stream.receive_some():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield json.loads(line)


async def main(seed: str, folder: Path) -> None:
    """Serve commands until the input ends."""
    config = HostConfig(
        bytes.fromhex(seed), ["/ip4/127.0.0.1/tcp/0"], (), False, "benchmark", lambda *_: None, shaper=Shaper()
    )
    async with open_host(config) as host, Workshop(folder / "scratch") as workshop, trio.open_nursery() as nursery:
        links, store = TensorLinks(host, folder / "payloads", nursery), BlobStore(folder / "store", STORE_BYTES)
        host.serve(PROTOCOL, links.serve)
        host.serve("blob", store.serve)
        nursery.start_soon(drain, host)
        peer = Peer(folder, host, links, workshop, store, nursery)
        tell("ready", address=host.addresses[0], peer=host.peer.hex())

        async def obey(command: Callable[..., Any], fields: dict[str, Any]) -> None:
            try:
                await command(**fields)
            except IchibaError as error:
                tell("failed", run=fields.get("run", ""), unit=-1, what=str(error), log="")

        async for fields in commands():
            nursery.start_soon(obey, getattr(peer, fields.pop("do")), fields)
        nursery.cancel_scope.cancel()


async def drain(host: Any) -> None:
    """Nobody here wants to know."""
    async for _ in host.events:
        pass


if __name__ == "__main__":
    (Path(sys.argv[2]) / "payloads").mkdir(parents=True, exist_ok=True)
    trio.run(main, sys.argv[1], Path(sys.argv[2]))
