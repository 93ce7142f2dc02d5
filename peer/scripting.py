"""Runs script jobs: one contained worker for each, timed, listened to, and proven dead before its outputs count.

Whatever a script does is a result that is paid for the time it took: a failure, an endless loop, too much memory. A
WorkFailed says that this machine could not run it, and is not paid. It knows nothing of bids, money or peers.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Final

import trio

from peer.work_order import WorkFailed
from protocol import params
from protocol.script import Ended, ScriptResult, ScriptSpec, result_trailer
from worker.cage import Cage, CageFailed, Log
from worker.frames import BadReply, Frames, Ready, Script
from worker.room import Room
from worker.sandbox import Level, SandboxTooWeak, admit
from worker.script_talk import ScriptTalk
from worker.seccomp import Tier

__all__ = ["OnNews", "ScriptDone", "ScriptOrder", "run_script"]

_WORK_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")  # becomes a file name
_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

OnNews = Callable[[str, int], None]
"""Called each SCRIPT_NEWS_SECONDS with what it printed, and seldom with nothing, and the nanoseconds used so far."""


@dataclass(frozen=True)
class ScriptOrder:
    """One script for one worker. inputs: a regular file for each input of `script`, by its name. cores: its share."""

    work_id: str
    script: ScriptSpec
    inputs: dict[str, Path]
    cores: int = 1


@dataclass(frozen=True)
class ScriptDone:
    """A script that has ended. used_ns: the wall time from the hand-over to a ready worker until its last process
    was dead, at most its seconds. file: the result (protocol/script.py `result_from`), now the caller's."""

    result: ScriptResult
    used_ns: int
    file: Path
    file_bytes: int
    memory_peak_bytes: int


@dataclass
class _Telling(Log):
    """A log whose news is told as it comes."""

    news: bytearray = field(default_factory=bytearray)
    missed: int = 0

    def add(self, data: bytes) -> None:
        super().add(data)
        self.news += data
        cut = max(0, len(self.news) - params.SCRIPT_NEWS_CHARS_MAX)
        self.missed += cut
        del self.news[:cut]

    def take_news(self) -> str:
        """What was printed since the last call, at most SCRIPT_NEWS_CHARS_MAX of its end."""
        fresh = Log(kept=self.news).tail()
        text = f"[{self.missed} bytes left out] {fresh}" if self.missed else fresh
        self.news, self.missed = bytearray(), 0
        return text


@dataclass
class _Run:
    """One script on its way: its worker, its clock, what it said and where its outputs go."""

    order: ScriptOrder
    cage: Cage
    log: _Telling
    talk: ScriptTalk
    file: FileIO
    on_news: OnNews
    started_ns: int = 0
    used_ns: int = 0
    flooded: bool = False

    def clock(self) -> int:
        """Nanoseconds of metered time so far, at most what was ordered."""
        return min(max(1, time.monotonic_ns() - self.started_ns), self.order.script.operations_per_step)

    async def listen(self) -> None:
        """Take what the worker says until it has ended. Raises BadReply, WorkFailed for a full disk."""
        while not self.talk.finished and (data := await self.cage.receive()):
            for part in self.talk.take(data):
                await self._keep(part)
            if self.talk.exited is not None and not self.used_ns:
                self.used_ns = self.clock()

    async def _keep(self, part: bytes) -> None:
        left = memoryview(part)
        try:
            while left:
                left = left[await trio.to_thread.run_sync(self.file.write, left) :]
        except OSError as error:
            raise WorkFailed("disk", f"cannot write outputs: {error}", next_step="free some disk") from None

    async def tell(self) -> None:
        """News of the log, for people, until cancelled."""
        silent = 0.0
        while True:
            await trio.sleep(params.SCRIPT_NEWS_SECONDS)
            silent += params.SCRIPT_NEWS_SECONDS
            if self.log.news or silent >= params.SCRIPT_BEAT_SECONDS:
                silent = 0.0
                self.on_news(self.log.take_news(), self.used_ns or self.clock())

    async def follow(self) -> None:
        """Listen until the script has ended, its time is over, or it floods its log."""
        spec = self.order.script
        collect = params.SCRIPT_COLLECT_SECONDS_MAX * max(1.0, spec.outputs_bytes / 2**30)
        with trio.move_on_after(spec.seconds + params.SCRIPT_LATE_SECONDS_MAX) as time_left:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._drain, nursery.cancel_scope)
                nursery.start_soon(self.tell)
                nursery.start_soon(self._extend, time_left, collect)
                with suppress(BadReply):  # it took its supervisor's place: what is whole by now is kept
                    await self.listen()
                nursery.cancel_scope.cancel()
        self.used_ns = self.used_ns or self.clock()

    async def _drain(self, scope: trio.CancelScope) -> None:
        try:
            await self.cage.drain_log()
        except CageFailed:
            self.flooded = True
            scope.cancel()

    async def _extend(self, scope: trio.CancelScope, seconds: float) -> None:
        """Handing outputs over takes its own time once the script has ended."""
        while self.talk.exited is None:  # noqa: ASYNC110  # a few looks a second, only while a script runs
            await trio.sleep(0.1)
        scope.deadline = trio.current_time() + seconds

    def ended(self) -> tuple[Ended, int]:
        """How it ended, once its worker is dead."""
        exited = self.talk.exited
        status = exited.status if exited is not None else 0
        if self.cage.oom_kills:
            return "memory", status
        if self.flooded:
            return "log-flood", 0
        if exited is not None:
            return ("deadline", 0) if exited.timed_out else ("exited", status)
        return ("deadline" if self.used_ns >= self.order.script.operations_per_step else "lost"), 0


async def run_script(order: ScriptOrder, *, level: Level, scratch_dir: Path, on_news: OnNews) -> ScriptDone:
    """Run one script to its end in a worker of its own, at CONTAINED and nowhere else.

    Raises WorkFailed if it cannot be run here: code `sandbox-too-weak` below CONTAINED, `sandbox-failed`,
    `missing-input`, `disk`; CageFailed if its death cannot be proven. Cancelling kills it, and returns once it is dead.
    """
    assert _WORK_ID.fullmatch(order.work_id), order.work_id
    try:
        admit("script", level)
    except SandboxTooWeak as error:
        raise WorkFailed(error.code, error.what, error.why, next_step=error.next_step) from None
    _open_to_worker(order)
    part = scratch_dir / f"{order.work_id}.part"
    cage = await _start(order, level)
    log = cage.log = _Telling()
    try:
        with FileIO(part, "xb") as file:
            run = _Run(order, cage, log, ScriptTalk(order.script.outputs_bytes), file, on_news)
            try:
                run.started_ns = time.monotonic_ns()
                await cage.send(_request(order))
                await run.follow()
            except* WorkFailed as group:
                raise group.exceptions[0] from None
            finally:
                await cage.kill()
            on_news(log.take_news(), run.used_ns)
            result = await trio.to_thread.run_sync(_seal, run)
        path = part.with_suffix(".result")
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
    return ScriptDone(result, run.used_ns, path, path.stat().st_size, cage.memory_peak_bytes)


def _seal(run: _Run) -> ScriptResult:
    """Finish the file of the result: whole outputs, the end of the log, the list. The worker is dead by now."""
    ended, status = run.ended()
    tail = bytes(run.log.kept)
    result = ScriptResult(ended=ended, status=status, files=tuple(run.talk.files), log_bytes=len(tail))
    run.file.truncate(run.talk.kept_bytes)
    run.file.seek(run.talk.kept_bytes)
    left = memoryview(tail + result_trailer(result))
    try:
        while left:
            left = left[run.file.write(left) :]
    except OSError as error:
        raise WorkFailed("disk", f"cannot write outputs: {error}", next_step="free some disk") from None
    return result


def _open_to_worker(order: ScriptOrder) -> None:
    """Let a user who owns nothing read the inputs: they lie in a folder that only the owner may enter."""
    for name, path in order.inputs.items():
        try:
            if path.is_symlink() or not path.is_file():
                raise FileNotFoundError(2, "no regular file")
            path.chmod(0o444)
        except OSError as error:
            raise WorkFailed("missing-input", f"cannot give input {name} to the script: {error.strerror}") from None


def _request(order: ScriptOrder) -> Script:
    spec = order.script
    environ = dict.fromkeys(_THREADS, str(order.cores))
    environ |= {"ICHIBA_SEED": str(spec.seed), "PYTHONHASHSEED": str(spec.seed % 2**32)}
    return Script(
        command=spec.command,
        environ=environ,
        seconds=spec.seconds,
        memory_bytes=spec.memory_bytes,
        outputs_bytes_max=spec.outputs_bytes,
    )


async def _start(order: ScriptOrder, level: Level) -> Cage:
    """A contained worker that is ready for the script. Raises WorkFailed."""
    spec = order.script
    room = Room(order.inputs, spec.memory_bytes, spec.outputs_bytes, order.cores)
    try:
        cage = await Cage.start(level, tier=Tier.BASE, torch=False, memory_bytes=spec.memory_bytes, room=room)
    except CageFailed as error:
        raise WorkFailed("sandbox-failed", error.what, error.why, next_step="run `ichiba doctor`") from None
    ready = False
    try:
        frames = Frames()
        with trio.move_on_after(params.SANDBOX_START_SECONDS_MAX):
            while not ready and (data := await cage.receive()):
                ready = any(isinstance(reply, Ready) for reply in frames.feed(data))
    except BadReply:
        ready = False
    finally:
        if not ready:
            await cage.kill()
    if not ready:
        last_words = cage.log.tail().strip().rpartition("\n")[2][-500:]
        raise WorkFailed(
            "sandbox-failed", "a script's worker did not start", last_words, next_step="run `ichiba doctor`"
        )
    return cage
