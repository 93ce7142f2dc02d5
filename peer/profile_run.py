"""Runs the configurations of a profile, each segment in a fresh sandbox that chooses its kernels at birth.

The program and the data are a stranger's: nothing of them runs outside a sandbox, and what comes out of one is a
checkpoint of a known layout, which is only compared here. It knows nothing of bids, money or peers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import trio

from peer.work_order import SegmentDone, WorkFailed, WorkOrder
from peer.workshop import Workshop
from protocol import params
from protocol.codec import encode
from protocol.errors import IchibaError
from protocol.profile import Findings, Kernels
from protocol.profile_task import MARKET_KERNELS, seeds_of, segments_of
from protocol.task import Initial, TaskSpec
from worker.profiling import compare_ends

__all__ = ["ProfileDone", "run_profile"]


@dataclass(frozen=True)
class ProfileDone:
    """What a profile found. operations_per_second: of the first segment of the first configuration."""

    findings: Findings
    operations_per_second: int
    seconds: float
    memory_peak_bytes: int


@dataclass
class _Run:
    """One profile on its way. Its files end in .part, which a workshop sweeps away when it opens."""

    order: WorkOrder
    task: TaskSpec
    workshop: Workshop
    on_step: Callable[[int, float | None], None]
    opened: ExitStack
    steps_done: int = 0
    loss: float | None = None  # of the last step
    memory_peak_bytes: int = 0

    async def start(self) -> tuple[bytes, Path]:
        """The root and the checkpoint of the initial state. Raises WorkFailed."""
        asked = replace(self.order, work_id=f"{self.order.work_id}-start", want="initial-state")
        done = await self.workshop.run(asked, on_step=self._step, on_segment=_no_segment)
        assert done.root is not None, "a conversation ends with what was asked for"
        assert done.answer is not None, "and so here"
        assert done.answer.state is not None, "and so here"
        return done.root, self._keep(done.answer.state)

    async def segment(
        self, kernels: Kernels, segment: int, base: Path | None, *, other: TaskSpec | None = None
    ) -> tuple[Path, float]:
        """The end of a segment, and how many seconds it took. other: not this task but that. Raises WorkFailed."""
        ends: list[SegmentDone] = []
        name = "other" if other else kernels.name
        task = msgspec.structs.replace(other or self.task, mode=kernels.mode, width=kernels.width)
        asked = replace(
            self.order,
            work_id=f"{self.order.work_id}-{name}",
            task=encode(task),
            base=base,
            first_segment=segment,
            last_segment=segment + 1,
            threads=kernels.threads,
            kernels=kernels,
        )
        done = await self.workshop.run(asked, on_step=self._step, on_segment=partial(_take, ends))
        self.memory_peak_bytes = max(self.memory_peak_bytes, done.memory_peak_bytes)
        (end,) = ends
        kept = self._keep(end.checkpoint)
        if end.diverged_step is not None:
            raise WorkFailed("diverged", f"diverged at step {end.diverged_step}: the loss or a weight is not finite")
        return kept, done.seconds

    async def beating(self, compare: Callable[[], Findings]) -> Findings:
        """What `compare` gives, in a thread. Of a large model that takes minutes, in which its submitter must hear that
        the work goes on: the last step is told again. Raises IchibaError, as `compare` does."""
        found: Findings | IchibaError
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat)
            try:
                found = await trio.to_thread.run_sync(compare)
            except IchibaError as error:
                found = error
            nursery.cancel_scope.cancel()
        if isinstance(found, IchibaError):
            raise found
        return found

    async def _beat(self) -> None:
        while True:
            await trio.sleep(params.SCRIPT_BEAT_SECONDS)
            self.on_step(self.steps_done - 1, self.loss)

    def _step(self, step: int, loss: float | None) -> None:
        self.loss = loss
        self.on_step(self.steps_done, loss)
        self.steps_done += 1

    def _keep(self, path: Path) -> Path:
        kept = path.with_suffix(".part")
        os.replace(path, kept)
        self.opened.callback(kept.unlink, missing_ok=True)
        return kept


async def run_profile(
    order: WorkOrder, task: TaskSpec, workshop: Workshop, on_step: Callable[[int, float | None], None]
) -> ProfileDone:
    """Profile `task`, whose inputs and means `order` names, by MARKET_KERNELS.

    on_step: called with the number of each step of all configurations together, from 0, and its loss. Raises WorkFailed
    as Workshop.run, with code `diverged` too, and LimitExceeded for more gauges than a profile holds. Cancelling kills
    the worker, and returns once it is dead.
    """
    began = trio.current_time()
    with ExitStack() as opened:
        run = _Run(order, task, workshop, on_step, opened)
        root, start = await run.start()
        first, ends = MARKET_KERNELS[0], dict[str, list[Path]]()
        speed = 0
        for kernels in MARKET_KERNELS:
            ends[kernels.name] = []
            for segment in segments_of(task):
                base = ends[first.name][segment - 1] if segment else order.base
                end, seconds = await run.segment(kernels, segment, base)
                ends[kernels.name].append(end)
                speed = speed or int(len(task.steps_of(0)) * task.operations_per_step / max(seconds, 1e-9))
        # Another seed would draw another start too; only its data and its random numbers are wanted.
        other = msgspec.structs.replace(task, seed=seeds_of(task)[1], initial=Initial("state", bytes(32), root))
        other_end, _ = await run.segment(first, 0, start, other=other)
        program = await trio.to_thread.run_sync(order.program.read_bytes)
        findings = await run.beating(partial(compare_ends, program, start, ends, other_end))
    return ProfileDone(findings, speed, trio.current_time() - began, run.memory_peak_bytes)


async def _take(ends: list[SegmentDone], done: SegmentDone) -> None:
    ends.append(done)


async def _no_segment(done: SegmentDone) -> None:
    """An initial state has no segments; a worker that says one has broken the protocol before this."""
