"""The effects of the node, performed: sends, fetches and work, each in its own bounded task.

Called only after the commit that explains them. A failed effect becomes an input or a counter, never an exception.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from market.placing import ChooseUnits, PlaceUnits
from market.rounds import Round
from peer.bench_process import BenchRunner
from peer.blobs import BlobStore
from peer.drops import Drops
from peer.events import (
    CheckWork,
    Fetch,
    Input,
    Inspect,
    Inspected,
    OpenMemory,
    Penalise,
    ProfileMade,
    Protect,
    Publish,
    ReadBlob,
    Release,
    Relink,
    ScriptSaid,
    SegmentMade,
    Send,
    Settled,
    StartBench,
    StartWork,
    StepMade,
    StopBench,
    StopWork,
    Suspend,
    WarmBench,
    WorkEnded,
)
from peer.fetching import Fetcher
from peer.host import Host, PeerUnreachable
from peer.profile_run import run_profile
from peer.scripting import ScriptOrder, run_script
from peer.suspension import SuspendedStates
from peer.unit_work import UnitRunner
from peer.work_order import SegmentDone, WorkDone, WorkFailed, WorkOrder, WorkSuspended
from peer.workshop import Workshop
from protocol import params
from protocol.codec import encode
from protocol.dispute_player import decode_question
from protocol.errors import IchibaError, RemoteProtocolError
from protocol.operations import TensorType
from protocol.profile_task import ProfileSpec
from protocol.program import Program, state_layout
from protocol.script import ScriptSpec, blobs_of
from protocol.sealing import Keys
from protocol.task import TaskSpec, task_id

__all__ = ["Performer"]

log = logging.getLogger(__name__)
OUTGOING_IDLE_SECONDS: Final = 2 * params.MUX_SILENCE_SECONDS_MAX  # without a message: whoever is gone is known to be


@dataclass(eq=False)
class _Running:
    """One piece of work. `freed`: its worker is dead; `ended`: what became of it is known too."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    freed: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    suspending: bool = False
    question: bytes = b""  # of a dispute: asked again after a pause
    fate: dict[str, Any] = field(default_factory=dict)
    again: StartWork | None = None  # wanted back before its suspension was over


@dataclass(eq=False)
class _Suspension:
    """One Suspend on its way, and its report."""

    done: trio.Event = field(default_factory=trio.Event)
    report: dict[str, Any] = field(default_factory=lambda: {"freed_ms": 0, "fates": {}})


@dataclass
class Performer:
    """Performs effects in `nursery`; results go to `inbox`, a bounded queue into the node."""

    host: Host
    blobs: BlobStore
    workshop: Workshop | None
    nursery: trio.Nursery
    inbox: trio.MemorySendChannel[Input]
    states: SuspendedStates
    units: UnitRunner
    counters: Counter[str] = field(default_factory=Counter)
    drops: Drops = field(default_factory=Drops)
    outgoing: dict[bytes, trio.MemorySendChannel[bytes]] = field(default_factory=dict)
    working: dict[bytes, _Running] = field(default_factory=dict)
    suspension: _Suspension | None = None
    turn: trio.Lock = field(default_factory=trio.Lock)  # one worker at a time: the slot of this machine
    # A dispute has a clock and must not wait for a job of hours, so its worker runs beside the slot's, one at a time.
    inspecting: trio.Lock = field(default_factory=trio.Lock)
    placing: trio.Lock = field(default_factory=trio.Lock)
    bench: BenchRunner = field(init=False)

    def __post_init__(self) -> None:
        self.fetcher = Fetcher(self.host, self.blobs, self.inbox)
        self.bench = BenchRunner(self.host, self.blobs, self.nursery, self.inbox, self.turn)

    def perform(self, effect: object) -> None:
        """Start one effect; returns at once."""
        match effect:
            case Send(peer=peer, data=data):
                self._send(peer, data)
            case Publish(topic=topic, data=data):
                self.nursery.start_soon(self._publish, topic, data)
            case Fetch():
                self.nursery.start_soon(self.fetcher.fetch, effect)
            case Protect(blobs=blobs, keys=keys):
                try:
                    self.blobs.protect(blobs, keys)
                except (IchibaError, OSError) as error:  # they are hidden all the same, but who has keys asks in vain
                    self.counters["blobs-unprotected"] += 1
                    log.error("blobs of a sealed job are not served: %s", error)
            case ReadBlob():
                self.nursery.start_soon(self.fetcher.read, effect)
            case Round():
                self.nursery.start_soon(self._play, effect)
            case PlaceUnits() | ChooseUnits():
                self.nursery.start_soon(self._place, effect)
            case StartWork():
                self._start_work(effect)
            case Inspect():
                if effect.work not in self.working:
                    self.working[effect.work] = _Running(question=effect.question)
                    self.nursery.start_soon(self._inspect, effect, self.working[effect.work])
            case StopWork(work=work):
                self.units.close(work)
                if work in self.working:
                    self.working[work].again = None
                    self.working[work].scope.cancel()
            case Relink(work=work, order=order):
                self.units.relink(work, order)
            case Settled(work=work, before_step=step):
                self.units.settled(work, step)
            case Suspend(within_ms=within_ms):
                self.suspension = _Suspension()
                self.nursery.start_soon(self._suspend, within_ms / 1000, self.suspension)
            case WarmBench() | StartBench() | OpenMemory() | StopBench() | CheckWork():
                self.bench.perform(effect)
            case Release(owner=owner, keep=keep):
                self.states.drop(owner)
                self.units.forget(owner)
                self.blobs.release(owner.hex(), keep=keep)
            case Penalise(peer=peer, reason=reason):
                self.host.penalise(peer, reason)
            case _:
                raise AssertionError(effect)

    # --- messages ------------------------------------------------------------------------------------------
    def _send(self, peer: bytes, data: bytes) -> None:
        """Queue for the one task that writes to `peer`, so that messages keep their order."""
        if peer not in self.outgoing:
            channel, receive = trio.open_memory_channel[bytes](params.OUTGOING_MESSAGES_MAX)
            self.outgoing[peer] = channel
            self.nursery.start_soon(self._sender, peer, receive)
        try:
            self.outgoing[peer].send_nowait(data)
        except trio.WouldBlock:
            self.counters["messages-dropped"] += 1
            self.drops.note("outgoing-full", peer, now_ns=time.time_ns())

    async def _sender(self, peer: bytes, receive: trio.MemoryReceiveChannel[bytes]) -> None:
        """Write what is queued for `peer`, until nothing was for a while: peers come and go, and some never were."""
        while True:
            with trio.move_on_after(OUTGOING_IDLE_SECONDS) as patience:
                data = await receive.receive()
            if patience.cancelled_caught:
                if receive.statistics().current_buffer_used:
                    continue
                del self.outgoing[peer]
                return
            try:
                await self.host.send(peer, data)
            except PeerUnreachable as error:
                self.counters["messages-unsent"] += 1
                self.drops.note("unsent", peer, now_ns=time.time_ns())
                log.debug("message not sent: %s", error)
            else:
                self.counters["messages"] += 1
                self.counters["message-bytes"] += len(data)

    async def _publish(self, topic: str, data: bytes) -> None:
        self.counters["gossip"] += 1
        self.counters["gossip-bytes"] += len(data)
        await self.host.publish(topic, data)

    # --- rounds --------------------------------------------------------------------------------------------
    async def _play(self, effect: Round) -> None:
        await self.inbox.send(await trio.to_thread.run_sync(effect.play))

    async def _place(self, effect: PlaceUnits | ChooseUnits) -> None:
        """One at a time, in the order in which they came: each takes a processor for seconds."""
        async with self.placing:
            outcome: Input = await trio.to_thread.run_sync(effect.play)
        await self.inbox.send(outcome)

    # --- work ----------------------------------------------------------------------------------------------
    def _start_work(self, order: StartWork) -> None:
        if order.work in self.working:
            running = self.working[order.work]
            if running.suspending or running.scope.cancel_called:
                self.working[order.work].again = order
            return
        self.working[order.work] = _Running()
        self.nursery.start_soon(self._work, order, self.working[order.work])

    async def _work(self, order: StartWork, running: _Running) -> None:
        error, blames, done = "", -1, None
        with running.scope:
            try:
                done = await self._run(order)
            except WorkFailed as failure:
                error, blames = f"{failure.code}: {failure}", failure.unit
                log.warning("work failed: %s\n%s", error, failure.log_tail)
                if failure.code == "bad-data":
                    self.states.drop(order.work)  # if it went on from one, the disk damaged it: the checkpoint is left
            except (IchibaError, OSError) as failure:
                error = str(failure) or type(failure).__name__
                log.warning("work failed: %s", error)
        running.freed.set()
        suspended = done.suspended if done is not None else None
        if suspended is not None:
            running.fate = await self._keep(order, suspended)
        elif done is not None or error:
            running.fate = {"fate": "failed" if error else "finished", "why": error}
        del self.working[order.work]
        running.ended.set()
        if running.again is not None:
            self._start_work(running.again)
        elif suspended is None and not running.scope.cancelled_caught:
            await self.inbox.send(WorkEnded(order.work, error, blames))

    async def _run(self, order: StartWork) -> WorkDone:
        if self.workshop is None:
            raise WorkFailed("sandbox-failed", "this machine has no sandbox", next_step="run `ichiba doctor`")
        if order.run is not None:  # it takes no turn: its neighbours may wait for a check that waits for this slot
            asked = self._training_order(order, None)
            told = partial(self._step, order.work), partial(self._segment, order.work, order.keys)
            return await self.units.run(order, asked, self.workshop, on_step=told[0], on_segment=told[1])
        async with self.turn:
            if isinstance(order.task, ScriptSpec):
                return await self._script(order, order.task, self.workshop)
            if isinstance(order.task, ProfileSpec):
                return await self._profile(order, order.task, self.workshop)
            kept = self.states.find(order.work, order.task, order.first_segment)
            return await self.workshop.run(
                self._training_order(order, kept.state if kept else None),
                on_step=lambda step, loss: self._step(order.work, step, loss),
                on_segment=partial(self._segment, order.work, order.keys),
                partial=kept.partial if kept else None,
                losses=kept.losses if kept else (),
            )

    async def _inspect(self, order: Inspect, running: _Running) -> None:
        """Answer a dispute's question in a worker of its own. One that a pause or StopWork ends is not answered."""
        answered = Inspected(order.work, order.question, error="it was stopped")
        with running.scope:
            try:
                answered = await self._answer(order)
            except (IchibaError, OSError) as failure:
                answered = Inspected(order.work, order.question, error=str(failure) or type(failure).__name__)
                log.warning("a dispute's question was not answered: %s", answered.error)
        running.fate = {"fate": "restarts", "why": "a dispute's question is asked again"}
        running.freed.set()
        del self.working[order.work]
        running.ended.set()
        if not running.scope.cancelled_caught:
            await self.inbox.send(answered)

    async def _answer(self, order: Inspect) -> Inspected:
        """Raises WorkFailed, CageFailed, OSError."""
        if self.workshop is None:
            raise WorkFailed("sandbox-failed", "this machine has no sandbox", next_step="run `ichiba doctor`")
        segment = decode_question(order.question).segment
        asked = replace(
            self._work_order(order.work, order.task, order.base, range(segment, segment + 1), order.memory_bytes),
            want="answer",
            question=order.question,
            claimed=self.blobs.path(order.claimed) if order.claimed else None,
        )
        async with self.inspecting:
            done = await self.workshop.run(asked, on_step=_no_step, on_segment=_no_segment)
        assert done.answer is not None, "a conversation ends with what was asked for"
        state = b""
        if done.answer.state is not None:
            state = await self.blobs.put_file(done.answer.state, keys=order.keys)
            self.blobs.pin(state, order.work.hex())
            done.answer.state.unlink(missing_ok=True)
        return Inspected(order.work, order.question, done.answer.body, done.answer.opening, state)

    async def _keep(self, order: StartWork, suspended: WorkSuspended) -> dict[str, Any]:
        """Keep a state, and say what became of it."""
        program = self.blobs.path(order.task.program)
        try:
            await trio.to_thread.run_sync(self.states.keep, order.work, order.task, program, suspended)
        except (RemoteProtocolError, OSError) as failure:
            log.warning("a suspended state is not kept: %s", failure)
            return {"fate": "restarts", "why": f"its state cannot be kept: {failure}"[:300]}
        where = {"segment": suspended.segment, "step": suspended.step, "bytes": suspended.state_bytes}
        return {"fate": "kept", "why": "", **where}

    async def _suspend(self, within_s: float, suspension: _Suspension) -> None:
        """End every worker, with its state if it gives it in `within_s`, and stop the idle ones."""
        began = trio.current_time()
        works = dict(self.working)
        for work, running in works.items():
            running.suspending = True
            running.fate = {"fate": "restarts", "why": f"its worker did not hand over its state in {within_s:g} s"}
            if not within_s or running.question:
                running.scope.cancel()
            elif self.workshop is None or not await self.workshop.suspend(_work_id(work)):
                running.fate["why"] = "it had no worker that can hand over a state"
                running.scope.cancel()
        with trio.move_on_after(within_s):
            for running in works.values():
                await running.freed.wait()
        for running in works.values():
            if not running.freed.is_set():
                running.scope.cancel()
        for running in works.values():
            await running.freed.wait()
        if self.workshop is not None:
            await self.workshop.empty()
        suspension.report["freed_ms"] = round(1000 * (trio.current_time() - began))
        for running in works.values():
            await running.ended.wait()
        suspension.report["fates"] = {work.hex(): running.fate for work, running in works.items()}
        suspension.done.set()

    async def suspended(self) -> dict[str, Any]:
        """The report of the last Suspend, when it is done: how long it took until the memory was free, in ms, and
        what became of each work."""
        if self.suspension is None:
            return _Suspension().report
        await self.suspension.done.wait()
        return self.suspension.report

    def _work_order(self, work: bytes, task: TaskSpec, base: bytes, segments: range, memory_bytes: int) -> WorkOrder:
        """What a worker of a task's segments is handed, whatever it is to do with them."""
        needed = blobs_of(task)
        return WorkOrder(
            work_id=_work_id(work),
            task=encode(task),
            program=self.blobs.path(task.program),
            arrays={a.name: self.blobs.path(a.blob) for a in task.arrays if a.blob in needed},
            base=self.blobs.path(base) if base else None,
            first_segment=segments.start,
            last_segment=segments.stop,
            threads=1,
            memory_bytes=memory_bytes,
            wall_seconds=float(params.SEGMENT_SECONDS_MAX * len(segments)),
            checkpoint_bytes_max=self._checkpoint_size(task.program),
        )

    def _training_order(self, order: StartWork, suspended: Path | None) -> WorkOrder:
        assert isinstance(order.task, TaskSpec), "scripts and profiles have orders of their own"
        segments = range(order.first_segment, order.last_segment)
        plain = self._work_order(order.work, order.task, order.base, segments, order.memory_bytes)
        return replace(
            plain,
            base=suspended or plain.base,
            checkpoint_bytes_max=min(order.checkpoint_bytes, plain.checkpoint_bytes_max),
            cheat=order.cheat or None,
            ordered=order.ordered if order.ordered and order.ordered[0] >= order.first_segment else None,
            gauges=order.gauges,
            claimed=self.blobs.path(order.compare) if order.compare else None,
            tapes=tuple(map(self.blobs.path, order.tapes)),
        )

    async def _script(self, order: StartWork, script: ScriptSpec, workshop: Workshop) -> WorkDone:
        """Run a script; its result becomes the one segment of its deal. A pause ends it, and it starts again after."""

        def said(text: str, used_ns: int) -> None:
            try:
                self.inbox.send_nowait(ScriptSaid(order.work, text, used_ns))
            except trio.WouldBlock:
                self.counters["steps-untold"] += 1  # news for people only; the result holds the end of the log

        inputs = {file.name: self.blobs.path(file.blob) for file in script.files}
        done = await run_script(
            ScriptOrder(_work_id(order.work), script, inputs),
            level=workshop.report.level,
            scratch_dir=workshop.scratch_dir,
            on_news=said,
        )
        blob = await self.blobs.put_file(done.file)
        self.blobs.pin(blob, order.work.hex())
        done.file.unlink(missing_ok=True)
        start, end = task_id(script), done.result.root
        await self.inbox.send(SegmentMade(order.work, 0, start, end, (), done.used_ns, blob, done.file_bytes))
        return WorkDone(_work_id(order.work), 1, None, done.used_ns / 1e9, done.memory_peak_bytes, "", None)

    async def _profile(self, order: StartWork, spec: ProfileSpec, workshop: Workshop) -> WorkDone:
        """Run a profile; what it finds is the answer. A pause ends it, and it starts again after."""
        whole = self._work_order(order.work, spec.of, order.base, range(1), order.memory_bytes)
        done = await run_profile(whole, spec.of, workshop, lambda step, loss: self._step(order.work, step, loss))
        await self.inbox.send(ProfileMade(order.work, done.findings, done.operations_per_second))
        return WorkDone(_work_id(order.work), 1, None, done.seconds, done.memory_peak_bytes, "", None)

    def _checkpoint_size(self, program: bytes) -> int:
        layout = state_layout(Program.from_bytes(self.blobs.path(program).read_bytes()))
        held = sum(TensorType(dtype, shape).size_bytes for dtype, shape in layout.values())
        return held + params.SAFETENSORS_HEADER_BYTES_MAX

    def _step(self, work: bytes, step: int, loss: float | None) -> None:
        if loss is not None:
            try:
                self.inbox.send_nowait(StepMade(work, step, loss))
            except trio.WouldBlock:
                self.counters["steps-untold"] += 1  # news for people only

    async def _segment(self, work: bytes, keys: Keys | None, done: SegmentDone) -> None:
        blob = await self.blobs.put_file(done.checkpoint, keys=keys)
        self.blobs.pin(blob, work.hex())
        done.checkpoint.unlink(missing_ok=True)
        if done.diverged_step is not None:
            raise WorkFailed("diverged", f"diverged at step {done.diverged_step}: the loss or a weight is not finite")
        ends = await self.units.ended(work, self.blobs.path(blob), done.tape, keys) if done.tape is not None else None
        false = done.false_end
        false_blob = b""
        if false is not None:
            false_blob = await self.blobs.put_file(false.checkpoint, keys=keys)
            self.blobs.pin(false_blob, work.hex())
            false.checkpoint.unlink(missing_ok=True)
        await self.inbox.send(  # awaited: segments reach the node in their order
            SegmentMade(
                work,
                done.segment,
                done.in_root,
                done.out_root,
                tuple(loss for loss in done.losses if loss is not None),
                done.operations,
                blob,
                done.checkpoint_bytes,
                false.root if false else b"",
                false_blob,
                false.checkpoint_bytes if false else 0,
                done.distance,
                ends,
            )
        )
        self.states.drop(work)  # its segment is over


def _no_step(step: int, loss: float | None) -> None:
    """A question has no steps to tell."""


async def _no_segment(done: SegmentDone) -> None:
    """A question has no segments; a worker that says one has broken the protocol before this."""


def _work_id(work: bytes) -> str:
    """The name of a piece of work in the workshop."""
    return work.hex()[:32]
