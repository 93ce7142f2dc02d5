"""What the daemon and a sandboxed worker say to each other, byte by byte, and what neither may say.

A frame is a length (u32, little-endian), then that many bytes of one canonical msgpack record. The daemon sends
one Request; the worker answers Ready when it is warm, then Step, Segment (followed by exactly `checkpoint_bytes`
raw bytes), and last Done or Failed, then nothing. All a worker says is hostile until checked: `Frames` bounds
sizes, `Conversation` bounds order, counts and sums. Sans-IO: it knows nothing of pipes, processes or torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

import msgspec

from protocol import params
from protocol.codec import Digest, Uint, decode, encode
from protocol.errors import IchibaError, LimitExceeded, MalformedRecord

__all__ = [
    "SUSPEND",
    "Attempted",
    "BadReply",
    "CheckpointBytes",
    "Conversation",
    "Done",
    "Exited",
    "Failed",
    "Frames",
    "Output",
    "Partial",
    "Ready",
    "Rehearsal",
    "Reply",
    "Request",
    "Root",
    "Script",
    "Segment",
    "Step",
    "Suspended",
    "Work",
    "frame",
    "read_request",
]

Text = Annotated[str, msgspec.Meta(max_length=params.SANDBOX_TEXT_CHARS_MAX)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
WorkerCode = Literal["bad-task", "bad-program", "bad-data", "out-of-memory", "cannot-start", "internal"]


class _Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of every frame: an array with its tag first."""


# --- daemon to worker ----------------------------------------------------------------------------------------
class Partial(_Frame, frozen=True, tag="partial"):
    """The base of this job is no checkpoint but a suspended state, before `step` of the first segment, with state
    root `root`. in_root: that of the segment's start."""

    step: Uint
    in_root: Digest
    root: Digest


SUSPEND: Final = b"S"
"""All that may follow a Work, at any time: stop before the next step and say Suspended."""


class Work(_Frame, frozen=True, tag="work", kw_only=True):
    """One job. Descriptors travel beside the frame: the program, then the arrays in order, then the base.

    segments are first (inclusive) to last (exclusive). memory_bytes caps what the worker allocates itself;
    input_bytes is what it maps of its inputs.
    """

    want: Literal["train", "initial-root"]
    task: Annotated[bytes, msgspec.Meta(max_length=params.MESSAGE_BYTES_MAX)]
    arrays: Annotated[tuple[Name, ...], msgspec.Meta(max_length=params.SANDBOX_ARRAYS_MAX)]
    has_base: bool
    first_segment: Uint
    last_segment: Uint
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    cpu_seconds: Annotated[int, msgspec.Meta(ge=1)]
    memory_bytes: Uint
    input_bytes: Uint
    checkpoint_bytes_max: Uint
    cheat: str | None = None
    partial: Partial | None = None


class Rehearsal(_Frame, frozen=True, tag="rehearsal", kw_only=True):
    """Attempts of worker/canary.py to try from inside, with where the daemon's decoys are."""

    attempts: tuple[str, ...]
    decoys: dict[str, str | int]


class Script(_Frame, frozen=True, tag="script", kw_only=True):
    """One command to run (worker/script.py). environ: what it gets beside the worker's own."""

    command: tuple[str, ...]
    environ: dict[str, str]
    seconds: Annotated[int, msgspec.Meta(ge=1, le=params.SCRIPT_SECONDS_MAX)]
    memory_bytes: Uint
    outputs_bytes_max: Uint


Request = Work | Rehearsal | Script


# --- worker to daemon ----------------------------------------------------------------------------------------
class Ready(_Frame, frozen=True, tag="ready"):
    """Confined and warm. landlock: the version used, 0 for none. torch: its version, and instructions: the set of
    the processor that it uses (as "AVX2"), both "" if torch was not asked for."""

    torch: Annotated[str, msgspec.Meta(max_length=64)]
    landlock: Annotated[int, msgspec.Meta(ge=0, le=1000)]
    instructions: Annotated[str, msgspec.Meta(max_length=64)]


class Step(_Frame, frozen=True, tag="step"):
    """Step `step` is done. loss is finite; None stands for one that is not (the state may still be)."""

    step: Uint
    loss: float | None


class Segment(_Frame, frozen=True, tag="segment", kw_only=True):
    """A finished segment: steps first_step to last_step (exclusive); its checkpoint's bytes follow the frame.

    diverged_step is None, or the step in which the state stopped being finite: it is not done, so last_step is it too.
    """

    segment: Uint
    first_step: Uint
    last_step: Uint
    in_root: Digest
    out_root: Digest
    operations: Uint
    checkpoint_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    diverged_step: Uint | None


class Suspended(_Frame, frozen=True, tag="suspended", kw_only=True):
    """As asked: the job stands before `step` of `segment`; `checkpoint_bytes` of that state follow, then Done.

    in_root: the state root at the segment's start, which a worker that goes on no longer sees.
    """

    segment: Uint
    step: Uint
    in_root: Digest
    checkpoint_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**62)]


class Root(_Frame, frozen=True, tag="root"):
    """The root of the initial state, the whole answer to want="initial-root"."""

    root: Digest


class Attempted(_Frame, frozen=True, tag="attempted"):
    """What became of one attempt of a Rehearsal."""

    attempt: Name
    blocked: bool
    detail: Text


class Exited(_Frame, frozen=True, tag="exited"):
    """A script, and every process it started, has ended. status: its exit status, 128 + n after signal n."""

    timed_out: bool
    status: Annotated[int, msgspec.Meta(ge=0, le=255)]


class Output(_Frame, frozen=True, tag="output"):
    """One file of /outputs; exactly `size_bytes` raw bytes follow the frame."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=params.SCRIPT_PATH_CHARS_MAX)]
    size_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Failed(_Frame, frozen=True, tag="failed"):
    """The worker gave up. Its words are a stranger's: shown, never acted on."""

    code: WorkerCode
    what: Text
    why: Text


class Done(_Frame, frozen=True, tag="done"):
    """All asked for was sent; nothing follows."""


Reply = Ready | Step | Segment | Suspended | Root | Attempted | Exited | Output | Failed | Done


@dataclass(frozen=True)
class CheckpointBytes:
    """The next part of the checkpoint of the Segment or Suspended before it. last: the checkpoint is whole."""

    part: bytes
    last: bool


class BadReply(IchibaError):
    """A worker broke the protocol: kill it. `code` names how."""

    def __init__(self, code: str, what: str) -> None:
        self.code = code
        super().__init__(what, why="the sandboxed process was taken over or is broken", next_step="")


def frame(record: Request | Reply) -> bytes:
    """The bytes of one frame. The caller keeps within the limits: the other side refuses what is larger."""
    body = encode(record)
    return len(body).to_bytes(4, "little") + body


def read_request(body: bytes) -> Request:
    """The request in `body`. Raises MalformedRecord, LimitExceeded: a daemon of another version."""
    return decode(Request, body, bytes_max=params.SANDBOX_REQUEST_BYTES_MAX)  # type: ignore[arg-type]


@dataclass
class Frames:
    """Cuts a worker's bytes into replies and checkpoint parts. Feed any cut of them: the same events come.

    Holds at most one incomplete frame. Raises BadReply with code `oversize-frame` or `bad-frame`, after which it
    must not be fed. `raw_left` > 0 while checkpoint bytes are expected: `Conversation.take` sets it.
    """

    raw_left: int = 0
    _held: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> Iterator[Reply | CheckpointBytes]:
        """Events in order. Lazy on purpose: the reader sets `raw_left` on a Segment before the next is cut."""
        self._held += data
        while self._held:
            if self.raw_left:
                part = bytes(self._held[: self.raw_left])
                del self._held[: len(part)]
                self.raw_left -= len(part)
                yield CheckpointBytes(part, self.raw_left == 0)
                continue
            if len(self._held) < 4:
                return
            size = int.from_bytes(self._held[:4], "little")
            if not 1 <= size <= params.SANDBOX_FRAME_BYTES_MAX:
                raise BadReply(
                    "oversize-frame", f"a frame of {size} bytes, 1 to {params.SANDBOX_FRAME_BYTES_MAX} are read"
                )
            if len(self._held) < 4 + size:
                return
            body = bytes(self._held[4 : 4 + size])
            del self._held[: 4 + size]
            try:
                reply: Reply = decode(Reply, body, bytes_max=params.SANDBOX_FRAME_BYTES_MAX)  # type: ignore[arg-type]
            except (MalformedRecord, LimitExceeded) as error:
                raise BadReply("bad-frame", error.what) from None
            yield reply

    @property
    def incomplete(self) -> bool:
        """Whether bytes are still owed: an end of file now cuts a frame or a checkpoint short."""
        return bool(self._held) or self.raw_left > 0


@dataclass
class Conversation:
    """Which reply may come next in one job, and what its numbers must be.

    steps: the step numbers of each segment asked for, in order, the first being segment `first_segment`; empty
    when the initial root is asked for. `losses` holds those of the latest segment: of each step done, or the
    last SANDBOX_LOSSES_KEPT_MAX of them. `resume` starts it within the first segment. A worker may say Suspended only
    once `suspending` is set.
    Raises BadReply with code `wrong-reply`, `oversize-checkpoint` or `extra-bytes`, beside those of `Frames`.
    """

    want: Literal["train", "initial-root"]
    first_segment: int
    steps: Sequence[range]
    checkpoint_bytes_max: int
    frames: Frames = field(default_factory=Frames)
    losses: deque[float | None] = field(default_factory=lambda: deque(maxlen=params.SANDBOX_LOSSES_KEPT_MAX))
    finished: bool = False
    suspending: bool = False
    suspended: bool = False
    _done: int = 0
    _next_step: int = -1
    _root_seen: bool = False

    def __post_init__(self) -> None:
        assert bool(self.steps) == (self.want == "train"), "segments are asked for in training, and only there"
        self._next_step = self.steps[0].start if self.steps else -1

    def resume(self, step: int, losses: Iterable[float | None]) -> None:
        """Expect `step` of the first segment next; `losses` are those of its steps before."""
        assert step in self.steps[0], "a suspended state is checked when it is kept"
        self._next_step = step
        self.losses.extend(losses)

    def take(self, data: bytes) -> Iterator[Reply | CheckpointBytes]:
        """The checked events in `data`, lazily: use each before asking for the next."""
        for event in self.frames.feed(data):
            if self.finished:
                raise BadReply("extra-bytes", "the worker went on talking after it had ended the job")
            if not isinstance(event, CheckpointBytes):
                self._check(event)
            yield event
        if self.finished and self.frames.incomplete:
            raise BadReply("extra-bytes", "the worker went on talking after it had ended the job")

    def _check(self, reply: Reply) -> None:
        """Raises BadReply unless `reply` may come now."""
        training = self.want == "train" and self._done < len(self.steps) and not self.suspended
        if isinstance(reply, Failed) or (isinstance(reply, Done) and self._complete):
            self.finished = True
        elif isinstance(reply, Root) and self.want == "initial-root" and not self._root_seen:
            self._root_seen = True
        elif isinstance(reply, Step) and training:
            self._check_step(reply)
        elif isinstance(reply, Segment) and training:
            self._check_segment(reply)
        elif isinstance(reply, Suspended) and training and self.suspending:
            self._check_suspended(reply)
        else:
            raise BadReply("wrong-reply", f"{type(reply).__name__.lower()} is not what may come next")

    @property
    def _complete(self) -> bool:
        return self._root_seen if self.want == "initial-root" else self.suspended or self._done == len(self.steps)

    def _check_step(self, reply: Step) -> None:
        due = self.steps[self._done]
        if reply.step != self._next_step or reply.step not in due:
            raise BadReply("wrong-reply", f"step {reply.step} where {self._next_step} of {due} was due")
        if reply.loss is not None and not math.isfinite(reply.loss):
            raise BadReply("wrong-reply", f"loss {reply.loss} of step {reply.step} is not finite")
        if reply.step == due.start:
            self.losses.clear()
        self.losses.append(reply.loss)
        self._next_step += 1

    def _check_size(self, reply: Segment | Suspended) -> None:
        if reply.checkpoint_bytes > self.checkpoint_bytes_max:
            raise BadReply(
                "oversize-checkpoint",
                f"a checkpoint of {reply.checkpoint_bytes} bytes, at most {self.checkpoint_bytes_max} are expected",
            )

    def _check_suspended(self, reply: Suspended) -> None:
        self._check_size(reply)
        steps = self.steps[self._done]
        due = (self.first_segment + self._done, self._next_step)
        if (reply.segment, reply.step) != due or reply.step not in steps:
            raise BadReply(
                "wrong-reply", f"suspended at segment, step {(reply.segment, reply.step)} where {due} was due"
            )
        if reply.step == steps.start:
            self.losses.clear()
        self.suspended = True
        self.frames.raw_left = reply.checkpoint_bytes

    def _check_segment(self, reply: Segment) -> None:
        self._check_size(reply)
        steps = self.steps[self._done]
        diverged = self._next_step if reply.diverged_step is not None else None
        last = steps.stop if diverged is None else diverged
        told = (reply.segment, reply.first_step, reply.last_step, reply.diverged_step)
        due = (self.first_segment + self._done, steps.start, last, diverged)
        if told != due or self._next_step != last or diverged == steps.stop:
            raise BadReply("wrong-reply", f"segment, first, last, diverged step {told} where {due} were due")
        if self._next_step == steps.start:  # diverged at once
            self.losses.clear()
        # A diverged segment is the last: no step follows a state that is not finite.
        self._done = len(self.steps) if diverged is not None else self._done + 1
        self.frames.raw_left = reply.checkpoint_bytes
