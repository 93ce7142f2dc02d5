"""Runs jobs in sandboxed workers: one fresh process for each job, watched, bounded, and proven dead at the end.

A job starts in about 50 ms in a worker that was warmed by `prewarm`, in some seconds without. Every way a worker
can fail or cheat ends as a WorkFailed with a code of its own. It knows nothing of bids, money or peers.
"""

from __future__ import annotations

import os
import re
import signal
import stat
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, TypeVar

import trio

from peer.stage_port import StagePort
from peer.unit_exchange import open_exchange
from peer.work_order import SegmentDone, WorkDone, WorkFailed, WorkOrder, WorkSuspended
from peer.work_progress import OnSegment, OnStep, Progress
from protocol import params
from protocol.codec import decode
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.profile import Kernels
from protocol.task import TaskSpec
from worker.cage import Cage, CageFailed
from worker.cgroups import sweep
from worker.conversation import Conversation
from worker.frames import (
    BadReply,
    CheckpointBytes,
    Failed,
    Frames,
    Ordered,
    Partial,
    Ready,
    Reply,
    Request,
    Work,
)
from worker.sandbox import Level, SandboxReport, SandboxTooWeak, admit, probe

__all__ = ["SegmentDone", "WorkDone", "WorkFailed", "WorkOrder", "WorkSuspended", "Workshop"]

_WORK_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")  # becomes a file name
_LAST_BREATH_SECONDS: Final = 1.0  # how long a worker that ended its replies may take to exit by itself

Failure = TypeVar("Failure", bound=BaseException)


@dataclass(eq=False)
class _Slot:
    """A place in the pool: a worker on its way or warm, until somebody takes it."""

    ready: trio.Event = field(default_factory=trio.Event)
    taken: trio.Event = field(default_factory=trio.Event)
    gone: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    reserved: bool = False
    cage: Cage | None = None


class Workshop:
    """The workers of this machine. Use as an async context manager; entering proves the sandbox.

    scratch_dir: where checkpoints appear. pool: how many workers `prewarm` keeps warm, 0 to SANDBOX_POOL_MAX, each
    about 350 MB. minimum: entering raises SandboxTooWeak below it, and below what graph jobs need in any case.
    """

    devices: Final = ("cpu",)  # what workers compute on: the sandbox gives none a graphics card

    def __init__(self, scratch_dir: Path, pool: int = 1, minimum: Level = Level.FILTERED) -> None:
        if not 0 <= pool <= params.SANDBOX_POOL_MAX:
            raise LocalProtocolError(f"a pool of {pool} workers, 0 to {params.SANDBOX_POOL_MAX} are kept")
        self.scratch_dir, self.pool, self.minimum = scratch_dir, pool, minimum
        self.warm_failure = ""  # why the last warm-up failed; the next job tries for itself
        self._report: SandboxReport | None = None
        self._slots: list[_Slot] = []
        self._talks: dict[str, tuple[Cage, Conversation]] = {}  # by work id, of what can be suspended
        self._scope = trio.open_nursery()
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> Workshop:
        self.scratch_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        sweep()  # what a killed daemon left, here and below
        for part in self.scratch_dir.glob("*.part"):
            part.unlink()
        report = await probe()
        try:
            admit("graph", report.level, minimum=self.minimum)
        except SandboxTooWeak as error:
            raise SandboxTooWeak(error.what, why="; ".join(report.hints), next_step=error.next_step) from None
        self._report = report
        self._nursery = await self._scope.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._nursery is not None, "entered"
        self._nursery.cancel_scope.cancel()
        return await self._scope.__aexit__(kind, error, trace)

    @property
    def report(self) -> SandboxReport:
        """What the sandbox was proven to be on entering."""
        if self._report is None:
            raise LocalProtocolError("the workshop is not open: use it as `async with`")
        return self._report

    @property
    def warm(self) -> int:
        """Workers that are warm now."""
        return sum(slot.cage is not None and not slot.reserved for slot in self._slots)

    def prewarm(self) -> None:
        """Fill the pool in the background: call it when a job is likely, as after a bid. An idle worker is stopped
        after SANDBOX_WARM_SECONDS_MAX, so a daemon without work stays small."""
        assert self._nursery is not None, "the workshop is open"
        while sum(not slot.reserved for slot in self._slots) < self.pool:
            slot = _Slot()
            self._slots.append(slot)
            self._nursery.start_soon(self._keep_warm, slot)

    async def empty(self) -> None:
        """Stop the workers of the pool that nobody waits for, and see them dead."""
        idle = [slot for slot in self._slots if not slot.reserved]
        for slot in idle:
            slot.reserved = True
            slot.scope.cancel()
        for slot in idle:
            await slot.gone.wait()

    async def _keep_warm(self, slot: _Slot) -> None:
        cage = None
        try:
            with slot.scope:
                cage = slot.cage = await self._start()
                slot.ready.set()
                with trio.move_on_after(params.SANDBOX_WARM_SECONDS_MAX):
                    await slot.taken.wait()
        except CageFailed as error:
            self.warm_failure = str(error)
        finally:
            slot.ready.set()
            self._slots.remove(slot)
            if cage is not None and not slot.taken.is_set():
                slot.cage = None
                await cage.kill()
            slot.gone.set()

    async def _start(self, kernels: Kernels | None = None) -> Cage:
        """A worker that is confined and warm. Raises CageFailed."""
        if kernels is None:
            cage = await Cage.start(self.report.level)
        else:
            cage = await Cage.start(self.report.level, threads=kernels.threads, kernels=kernels.environment)
        said: Reply | CheckpointBytes | None = None
        try:
            with trio.move_on_after(params.SANDBOX_START_SECONDS_MAX) as patience:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cage.drain_log)
                    said = await _first_reply(cage)
                    nursery.cancel_scope.cancel()
        except* (BadReply, CageFailed):
            said = None
        finally:
            if not isinstance(said, Ready):
                await cage.kill()
        if isinstance(said, Ready):
            return cage
        late = f"it was not ready in {params.SANDBOX_START_SECONDS_MAX:.0f} s" if patience.cancelled_caught else ""
        told = said.what if isinstance(said, Failed) else ""
        last_words = cage.log.tail().strip().rpartition("\n")[2][-500:]
        raise CageFailed("a worker did not start", why=late or told or last_words, next_step="run `ichiba doctor`")

    async def _take(self) -> Cage:
        """A warm worker, or one on its way, or a new one."""
        for slot in sorted(self._slots, key=lambda slot: slot.cage is None):
            if slot.reserved:
                continue
            slot.reserved = True
            try:
                await slot.ready.wait()
            except trio.Cancelled:
                slot.reserved = False
                raise
            slot.taken.set()
            if slot.cage is not None and slot.cage.process.poll() is None:
                return slot.cage
            if slot.cage is not None:
                await slot.cage.kill()
        return await self._start()

    async def suspend(self, work_id: str) -> bool:
        """Ask a running job to stop before its next step; its `run` then returns it as suspended, or fails, or is
        done first. False if no worker has it yet, or it is a unit's: then cancelling `run` loses nothing that the
        unit's tape does not bring back."""
        cage, conversation = self._talks.get(work_id, (None, None))
        if cage is None or conversation is None or not cage.sent:
            return False
        conversation.suspending = True
        await cage.suspend()
        return True

    async def run(
        self, order: WorkOrder, *, on_step: OnStep, on_segment: OnSegment, partial: Partial | None = None,
        losses: tuple[float | None, ...] = (), port: StagePort | None = None,
    ) -> WorkDone:  # fmt: skip
        """Run `order` to its end in a worker of its own.

        partial: order.base is not a checkpoint but the state of a job suspended within first_segment, and `losses`
        are those of that segment's steps so far. port: of a unit that runs beside others; one that is checked from
        order.tapes has none.

        Raises WorkFailed; CageFailed if a worker's death cannot be proven. Cancelling kills the worker and returns
        only once it is dead. Calls `on_step(step, loss)` (None: no finite number) and awaits `on_segment`.
        """
        task, steps = _check(order)
        exchange = await open_exchange(task.stage, order, port)
        conversation = Conversation(
            order.want, order.first_segment, steps, order.checkpoint_bytes_max,
            ordered=order.ordered[0] if order.ordered else None,
            compared=order.want == "train" and order.claimed is not None,
            crossings=exchange.talk if exchange else None,
        )  # fmt: skip
        if partial is not None:
            conversation.resume(partial.step, losses)
        with ExitStack() as opened:
            descriptors, input_bytes = _open_inputs(order, opened)
            try:
                cage = await (self._start(order.kernels) if order.kernels is not None else self._take())
            except CageFailed as error:
                raise WorkFailed("sandbox-failed", error.what, error.why, next_step="run `ichiba doctor`") from None
            progress = Progress(order, self.scratch_dir, on_step, on_segment, exchange)
            opened.callback(progress.close)
            request = _request(order, input_bytes, partial)
            return await self._attend(cage, request, descriptors, conversation, progress)

    async def _attend(
        self, cage: Cage, request: Request, descriptors: list[int], conversation: Conversation, progress: Progress
    ) -> WorkDone:
        """Talk with the worker to the end, whatever it does, then see it dead. Raises WorkFailed."""
        order, started = progress.order, trio.current_time()
        failure: WorkFailed | None = None
        if progress.exchange is None:
            self._talks[order.work_id] = (cage, conversation)
        try:
            with trio.fail_after(order.wall_seconds) as patience:
                if progress.exchange is not None:
                    progress.exchange.serves(cage, patience)
                await _converse(cage, request, descriptors, conversation, progress)
        except* trio.TooSlowError:
            failure = WorkFailed("deadline", f"the job did not end in {order.wall_seconds:g} s")
        except* WorkFailed as group:
            failure = _first(group)
        except* (BadReply, CageFailed) as group:
            error = _first(group)
            failure = WorkFailed(error.code, error.what, error.why)
        except* OSError as group:
            failure = WorkFailed("disk", f"cannot write a checkpoint: {_first(group)}", next_step="free some disk")
        finally:
            self._talks.pop(order.work_id, None)
            status = await cage.kill()
        tail = cage.log.tail()
        if cage.oom_kills or (failure is None and not conversation.finished):
            failure = _obituary(status, cage, conversation)
        if failure is not None:
            failure.log_tail = tail
            raise failure
        seconds = trio.current_time() - started
        peak, suspended = cage.memory_peak_bytes, progress.suspended
        root, answer = progress.root, progress.answer
        return WorkDone(order.work_id, progress.segments, root, seconds, peak, tail, suspended, answer)


async def _first_reply(cage: Cage) -> Reply | CheckpointBytes | None:
    frames = Frames()
    while data := await cage.receive():
        for reply in frames.feed(data):
            return reply
    return None


async def _converse(
    cage: Cage, request: Request, descriptors: list[int], conversation: Conversation, progress: Progress
) -> None:
    """Hand over the job and take its replies until it has ended or died; keep its log drained meanwhile."""
    cage.limit_memory(progress.order.memory_bytes + progress.order.memory_bytes // 8)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cage.drain_log)
        await cage.send(request, descriptors)
        while data := await cage.receive():
            for event in conversation.take(data):
                await progress.take(event, conversation)
            if conversation.finished:
                break
        with trio.move_on_after(_LAST_BREATH_SECONDS):
            while data := await cage.receive():
                list(conversation.take(data))  # raises: nothing may follow
            await trio.lowlevel.wait_readable(cage.pidfd)  # so that its own exit status is seen, not our kill
        nursery.cancel_scope.cancel()


def _first(group: BaseExceptionGroup[Failure]) -> Failure:
    """The first error of a nursery's group: they all come of one."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _check(order: WorkOrder) -> tuple[TaskSpec, list[range]]:
    """The task, and the steps of each segment asked for. Raises LocalProtocolError for what our daemon got wrong."""
    if not _WORK_ID.fullmatch(order.work_id):
        raise LocalProtocolError(f"work id {order.work_id[:140]!r} is no plain name")
    most = max(os.cpu_count() or 1, order.kernels.threads if order.kernels else 1)  # a profile's have two anywhere
    if not 1 <= order.threads <= most:
        raise LocalProtocolError(f"{order.threads} threads, this machine has {os.cpu_count()} cores")
    if order.memory_bytes < params.SANDBOX_MEMORY_BYTES_MIN:
        raise LocalProtocolError(
            f"{order.memory_bytes} bytes of memory, a worker needs {params.SANDBOX_MEMORY_BYTES_MIN}"
        )
    try:
        task = decode(TaskSpec, order.task, bytes_max=params.MESSAGE_BYTES_MAX)
        if order.want in ("initial-root", "initial-state"):
            return task, []
        if order.want == "answer":
            task.steps_of(order.first_segment)
            return task, []
        if not order.first_segment < order.last_segment:
            raise LocalProtocolError(f"segments {order.first_segment} to {order.last_segment} are none")
        return task, [task.steps_of(segment) for segment in range(order.first_segment, order.last_segment)]
    except RemoteProtocolError as error:
        raise WorkFailed("bad-task", error.what, error.why) from None


def _open_inputs(order: WorkOrder, opened: ExitStack) -> tuple[list[int], int]:
    """Read-only descriptors of the program, the arrays and the base, in this order, and their size in bytes."""
    descriptors, size = [], 0
    states = [path for path in (order.base, order.claimed, *order.followed, *order.tapes) if path is not None]
    for path in (order.program, *order.arrays.values(), *states):
        try:
            number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise WorkFailed("missing-input", f"cannot read {path.name}: {error.strerror}") from None
        opened.callback(os.close, number)
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise WorkFailed("missing-input", f"{path.name} is no regular file")
        descriptors.append(number)
        size += status.st_size
    return descriptors, size


def _request(order: WorkOrder, input_bytes: int, partial: Partial | None) -> Work:
    return Work(
        want=order.want,
        task=order.task,
        arrays=tuple(order.arrays),
        has_base=order.base is not None,
        first_segment=order.first_segment,
        last_segment=order.last_segment,
        threads=order.threads,
        cpu_seconds=int(order.wall_seconds * order.threads) + 10,
        memory_bytes=order.memory_bytes,
        input_bytes=input_bytes,
        checkpoint_bytes_max=order.checkpoint_bytes_max,
        cheat=order.cheat,
        partial=partial,
        question=order.question,
        has_claimed=order.claimed is not None,
        ordered=Ordered(*order.ordered) if order.ordered else None,
        gauges=order.gauges,
        follows=len(order.followed),
        dissent=order.dissent,
        tapes=len(order.tapes),
    )


def _obituary(status: int | None, cage: Cage, conversation: Conversation) -> WorkFailed:
    """Why a worker ended without ending its job. status: as of Cage.kill; bubblewrap says 128 + signal."""
    if cage.oom_kills:
        return WorkFailed("out-of-memory", "the kernel killed the worker at its memory limit")
    if status is None:
        return WorkFailed("no-reply", "the worker closed its replies and went on running")
    number = -status if status < 0 else status - 128 if cage.namespaced and status > 128 else 0
    if number == signal.SIGSYS:
        return WorkFailed("filter", "the worker made a forbidden system call and was killed")
    if number:
        cause = "its limit of processor time" if number in (signal.SIGXCPU, signal.SIGKILL) else ""
        return WorkFailed("killed", f"the worker died of signal {number}", cause)
    left = conversation.frames.raw_left
    if left:
        return WorkFailed("short-checkpoint", f"the worker ended with {left} bytes of a checkpoint to come")
    return WorkFailed("no-reply", f"the worker ended with status {status} before its job was done")
