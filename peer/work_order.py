"""What the workshop is asked and what it answers: an order, its segments, and the three ways it can end.

Plain values: they know of no process, bid, money or peer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from protocol.errors import IchibaError
from protocol.profile import Gauge, Kernels

__all__ = ["Answer", "FalseEnd", "SegmentDone", "WorkDone", "WorkFailed", "WorkOrder", "WorkSuspended"]


class WorkFailed(IchibaError):
    """A job that came to no end. `log_tail` is the end of what the worker printed: a stranger's words.

    Codes: deadline, out-of-memory, killed, filter, no-reply, short-checkpoint, oversize-checkpoint, bad-frame,
    oversize-frame, wrong-reply, extra-bytes, log-flood, disk, missing-input, sandbox-failed; of a unit, no-neighbour,
    bad-payload (a neighbour's fault); and, told by the worker itself, bad-task, bad-program, bad-data, bad-payload,
    bad-tape (of a check: the tape cannot be what the segment received), cannot-start, internal. unit: of bad-payload,
    the neighbour; else -1.
    """

    def __init__(
        self, code: str, what: str, why: str = "", log_tail: str = "", *, next_step: str = "", unit: int = -1
    ) -> None:
        self.code, self.log_tail, self.unit = code, log_tail, unit
        super().__init__(what, why=why, next_step=next_step)


@dataclass(frozen=True)
class WorkOrder:
    """One job for one worker.

    task: canonical TaskSpec. program, arrays (by the names of the task), base: regular files, read-only inside.
    Segments first_segment to last_segment (exclusive) when want is "train". memory_bytes caps what the worker
    allocates beside its inputs. wall_seconds counts from the hand-over to a warm worker. question: of a dispute about
    first_segment, when want is "answer"; claimed: the checkpoint of an end that is to be defended then, and of one that
    is to be compared with the segment's when want is "train". ordered: a segment to make a false end of beside the true
    one, and the fraud it is to look like. gauges: parts of the state that a tolerant task's segments end with as they
    began. kernels: how a fresh worker computes, for a profile; None for one of the pool, which computes as this machine
    does best. followed, dissent: to answer as one who follows a solver's own run (worker/tracing.py): its files about a
    step, and where to differ from it. tapes: of a unit's segments that are to be checked, one for each. tape_folder: of
    a unit that runs beside others, where the tapes of its segments grow, so that it starts again from them; they are
    the caller's to remove when the deal is over.
    """

    work_id: str
    task: bytes
    program: Path
    arrays: dict[str, Path]
    base: Path | None
    first_segment: int
    last_segment: int
    threads: int
    memory_bytes: int
    wall_seconds: float
    checkpoint_bytes_max: int
    cheat: str | None = None
    want: Literal["train", "initial-root", "initial-state", "answer"] = "train"
    question: bytes = b""
    claimed: Path | None = None
    ordered: tuple[int, str] | None = None
    gauges: tuple[Gauge, ...] = ()
    kernels: Kernels | None = None
    followed: tuple[Path, ...] = ()
    dissent: bytes = b""
    tapes: tuple[Path, ...] = ()
    tape_folder: Path | None = None


@dataclass(frozen=True)
class FalseEnd:
    """A wrong end of a segment, ordered beside the true one: a file in the scratch folder, now the caller's."""

    root: bytes
    checkpoint: Path
    checkpoint_bytes: int


@dataclass(frozen=True)
class SegmentDone:
    """A finished segment, steps first_step to last_step (exclusive).

    losses: of each step (the last SANDBOX_LOSSES_KEPT_MAX), None where it is no finite number. checkpoint: a file in
    the scratch folder, now the caller's; its bytes are unchecked. diverged_step: where the state stopped being
    finite, which ends the task. false_end: the wrong end that was ordered. distance:
    of the claimed end from this one, in ppb of the update: L1 and L2. tape: of a unit that ran beside others, what it
    received in the segment: a file in the order's tape_folder, now the caller's.
    """

    segment: int
    first_step: int
    last_step: int
    in_root: bytes
    out_root: bytes
    losses: tuple[float | None, ...]
    operations: int
    checkpoint: Path
    checkpoint_bytes: int
    diverged_step: int | None
    false_end: FalseEnd | None = None
    distance: tuple[int, int] | None = None
    tape: Path | None = None


@dataclass(frozen=True)
class WorkSuspended:
    """A job that stands before `step` of `segment`, whose start has the root in_root.

    losses: as SegmentDone's, of the segment's steps so far. state: a file in the scratch folder, now the caller's;
    its bytes are unchecked.
    """

    segment: int
    step: int
    in_root: bytes
    losses: tuple[float | None, ...]
    state: Path
    state_bytes: int


@dataclass(frozen=True)
class Answer:
    """What a worker answered in a dispute, or the initial state alone; its bytes are unchecked. state: a file in the
    scratch folder, now the caller's."""

    body: bytes
    opening: bytes
    state: Path | None


@dataclass(frozen=True)
class WorkDone:
    """A job that ended as it should, or was suspended. root is set for want="initial-root", answer for "answer", both
    for "initial-state"."""

    work_id: str
    segments: int
    root: bytes | None
    seconds: float
    memory_peak_bytes: int
    log_tail: str
    suspended: WorkSuspended | None
    answer: Answer | None = None
