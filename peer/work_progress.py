"""What one job has brought so far: its steps told, its checkpoints written to files, its segments handed on."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import trio

from peer import work_order
from peer.unit_exchange import UnitExchange
from peer.work_order import Answer, SegmentDone, WorkFailed, WorkOrder, WorkSuspended
from protocol.errors import harmless
from worker.conversation import Conversation
from worker.frames import (
    Answered,
    CheckpointBytes,
    Failed,
    FalseEnd,
    Handed,
    Reply,
    Root,
    Segment,
    Step,
    Suspended,
)
from worker.stage_frames import Need, Sent

__all__ = ["OnSegment", "OnStep", "Progress"]

OnStep = Callable[[int, float | None], None]
OnSegment = Callable[[SegmentDone], Awaitable[None]]


@dataclass
class Progress:
    """What one job has brought so far, and the file that its current checkpoint goes to. exchange: of a unit that runs
    beside others."""

    order: WorkOrder
    folder: Path
    on_step: OnStep
    on_segment: OnSegment
    exchange: UnitExchange | None = None
    segments: int = 0
    root: bytes | None = None
    suspended: WorkSuspended | None = None
    answer: Answer | None = None
    _opening: bytearray = field(default_factory=bytearray)
    _header: Segment | FalseEnd | Suspended | Answered | Handed | Sent | None = None
    _false: work_order.FalseEnd | None = None
    _losses: tuple[float | None, ...] = ()
    _file: FileIO | None = None

    async def take(self, event: Reply | CheckpointBytes, conversation: Conversation) -> None:
        """Act on one checked event. Raises WorkFailed for what the worker itself gave up on, or a full disk."""
        if isinstance(event, Step):
            self.on_step(event.step, event.loss)
        elif isinstance(event, Segment | FalseEnd | Suspended):
            self._header, self._losses = event, tuple(conversation.losses)
            self._file = FileIO(self._part, "xb")
        elif isinstance(event, Answered):
            self._header, self.answer = event, Answer(event.body, b"", None)
        elif isinstance(event, Handed):
            self._header, self._file = event, FileIO(self._part, "xb")
        elif isinstance(event, Need | Sent) and self.exchange is not None:
            self._header = event if isinstance(event, Sent) else None
            await self.exchange.heard(event, self.order.first_segment + self.segments, conversation.needed_bytes_max)
        elif isinstance(event, CheckpointBytes) and isinstance(self._header, Sent) and self.exchange is not None:
            await self.exchange.bytes_of(self._header, event)
        elif isinstance(event, CheckpointBytes) and isinstance(self._header, Answered):
            self._opening += event.part  # at most params.OPENING_BYTES_MAX, by its frame
            self.answer = Answer(self._header.body, bytes(self._opening), None)
        elif isinstance(event, CheckpointBytes):
            await self._write(event)
        elif isinstance(event, Root):
            self.root = event.root
        elif isinstance(event, Failed):
            fed = self.exchange.fed if self.exchange is not None and event.code == "bad-payload" else ()
            unit = event.unit if event.unit in fed else -1
            raise WorkFailed(event.code, f"the worker gave up: {harmless(event.what)}", harmless(event.why), unit=unit)

    @property
    def _part(self) -> Path:
        return self.folder / f"{self.order.work_id}.part"

    async def _write(self, event: CheckpointBytes) -> None:
        file, header = self._file, self._header
        assert file is not None, "checkpoint bytes come after their header"
        assert header is not None and not isinstance(header, Answered | Sent), "they go to memory"
        left = memoryview(event.part)
        while left:
            left = left[await trio.to_thread.run_sync(file.write, left) :]
        if not event.last:
            return
        file.close()
        self._file = None
        segment = self.order.first_segment if isinstance(header, Handed) else header.segment
        false = "-false" if isinstance(header, FalseEnd) else ""
        path = self.folder / f"{self.order.work_id}-{segment}{false}.safetensors"
        os.replace(self._part, path)
        if isinstance(header, FalseEnd):
            self._false = work_order.FalseEnd(header.out_root, path, header.checkpoint_bytes)
            return
        if isinstance(header, Handed):
            answer = self.answer or Answer(b"", b"", None)  # the initial state comes without one
            self.answer = Answer(answer.body, answer.opening, path)
            return
        if isinstance(header, Suspended):
            where = (header.segment, header.step, header.in_root, self._losses)
            self.suspended = WorkSuspended(*where, path, header.checkpoint_bytes)
            return
        self.segments += 1
        false_end, self._false = self._false, None
        tape = await self.exchange.end_segment(header.segment) if self.exchange is not None else None
        await self.on_segment(
            SegmentDone(
                segment=header.segment,
                first_step=header.first_step,
                last_step=header.last_step,
                in_root=header.in_root,
                out_root=header.out_root,
                losses=self._losses,
                operations=header.operations,
                checkpoint=path,
                checkpoint_bytes=header.checkpoint_bytes,
                diverged_step=header.diverged_step,
                false_end=false_end,
                distance=header.distance,
                tape=tape,
            )
        )

    def close(self) -> None:
        """Leave no half checkpoint behind."""
        if self.exchange is not None:
            self.exchange.close()
        if self._file is not None:
            self._file.close()
            self._file = None
        for path in (self._part, *([self._false.checkpoint] if self._false else [])):
            path.unlink(missing_ok=True)
