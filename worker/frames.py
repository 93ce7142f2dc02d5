"""What the daemon and a sandboxed worker say to each other, byte by byte, and what neither may say.

A frame is a length (u32, little-endian), then that many bytes of one canonical msgpack record. The daemon sends
one Request; the worker answers Ready when it is warm, then Step, Segment (followed by exactly `checkpoint_bytes`
raw bytes), or Answered and Handed to a question of a dispute, and last Done or Failed, then nothing. All a worker says
is hostile until checked: `Frames` bounds sizes, `Conversation` bounds order, counts and sums. Sans-IO: it knows nothing
of pipes, processes or torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

import msgspec

from protocol import params
from protocol.codec import Digest, Uint, decode, encode
from protocol.errors import IchibaError, LimitExceeded, MalformedRecord
from protocol.profile import UNBOUNDED, Gauge
from worker.stage_frames import Need, Sent

__all__ = [
    "SUSPEND",
    "Answered",
    "Attempted",
    "BadReply",
    "CheckpointBytes",
    "Done",
    "Exited",
    "Failed",
    "FalseEnd",
    "Frames",
    "Handed",
    "Ordered",
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
Ppb = Annotated[int, msgspec.Meta(ge=0, le=UNBOUNDED)]
Want = Literal["train", "initial-root", "initial-state", "answer"]
WorkerCode = Literal[
    "bad-task", "bad-program", "bad-data", "bad-payload", "bad-tape", "out-of-memory", "cannot-start", "internal"
]


class _Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of every frame: an array with its tag first."""


# --- daemon to worker ----------------------------------------------------------------------------------------
class Partial(_Frame, frozen=True, tag="partial"):
    """The base of this job is no checkpoint but a suspended state, before `step` of the first segment, with state
    root `root`. in_root: that of the segment's start."""

    step: Uint
    in_root: Digest
    root: Digest


class Ordered(_Frame, frozen=True, tag="ordered"):
    """Make a false end of this segment beside the true one, as this fraud of worker/cheats.py would."""

    segment: Uint
    fraud: Name


SUSPEND: Final = b"S"
"""All that may follow a Work, at any time: stop before the next step and say Suspended."""


class Work(_Frame, frozen=True, tag="work", kw_only=True):
    """One job. Descriptors travel beside the frame: the program, then the arrays in order, then the base, then the
    claimed end, then the files that are followed (worker/tracing.py), then the tapes of a unit's segments, from which
    they are checked.

    segments are first (inclusive) to last (exclusive). memory_bytes caps what the worker allocates itself;
    input_bytes is what it maps of its inputs. question: of a dispute, to be answered from the base (worker/tracing.py).
    The claimed end is defended in answers (protocol/dispute_claim.py), and compared with the end of a segment trained.
    gauges: what every segment of a tolerant task ends with as it began.
    """

    want: Want
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
    question: Annotated[bytes, msgspec.Meta(max_length=params.QUESTION_BYTES_MAX)] = b""
    has_claimed: bool = False
    ordered: Ordered | None = None
    gauges: Annotated[tuple[Gauge, ...], msgspec.Meta(max_length=params.GAUGES_MAX)] = ()
    follows: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0
    dissent: Annotated[bytes, msgspec.Meta(max_length=params.QUESTION_BYTES_MAX)] = b""
    tapes: Annotated[int, msgspec.Meta(ge=0, le=params.TAPES_MAX)] = 0


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
    distance: of the claimed end from this one, in ppb of the update in L1 and L2, where one was to be compared.
    """

    segment: Uint
    first_step: Uint
    last_step: Uint
    in_root: Digest
    out_root: Digest
    operations: Uint
    checkpoint_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    diverged_step: Uint | None
    distance: tuple[Ppb, Ppb] | None = None


class FalseEnd(_Frame, frozen=True, tag="false-end"):
    """As asked, before its Segment: a wrong end of it; that checkpoint's bytes follow the frame."""

    segment: Uint
    out_root: Digest
    checkpoint_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**62)]


class Suspended(_Frame, frozen=True, tag="suspended", kw_only=True):
    """As asked: the job stands before `step` of `segment`; `checkpoint_bytes` of that state follow, then Done.

    in_root: the state root at the segment's start, which a worker that goes on no longer sees.
    """

    segment: Uint
    step: Uint
    in_root: Digest
    checkpoint_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**62)]


class Root(_Frame, frozen=True, tag="root"):
    """The root of the initial state: the whole answer to want="initial-root"; to "initial-state" Handed follows."""

    root: Digest


class Answered(_Frame, frozen=True, tag="answered", kw_only=True):
    """The answer to a question: the body of a move, and after the frame exactly `opening_bytes` raw bytes."""

    body: Annotated[bytes, msgspec.Meta(max_length=params.MOVE_BYTES_MAX)]
    opening_bytes: Annotated[int, msgspec.Meta(ge=0, le=params.OPENING_BYTES_MAX)]


class Handed(_Frame, frozen=True, tag="handed"):
    """The state that later questions start from, the initial one, or the evidence asked for; `checkpoint_bytes` of it
    follow."""

    checkpoint_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**62)]


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
    """The worker gave up. Its words are a stranger's: shown, never acted on.

    unit: whose payload it could not decode; else -1."""

    code: WorkerCode
    what: Text
    why: Text
    unit: Annotated[int, msgspec.Meta(ge=-1, lt=params.PARALLEL_UNITS_MAX)] = -1


class Done(_Frame, frozen=True, tag="done"):
    """All asked for was sent; nothing follows."""


Trained = Step | Segment | FalseEnd | Suspended
Reply = Ready | Trained | Need | Sent | Root | Answered | Handed | Attempted | Exited | Output | Failed | Done


@dataclass(frozen=True)
class CheckpointBytes:
    """The next part of what the reply before it announced. last: it is whole."""

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
        if self._held:
            self._held += data
            size = int.from_bytes(self._held[:4], "little")
            if len(self._held) < 4 or len(self._held) < 4 + size <= 4 + params.SANDBOX_FRAME_BYTES_MAX:
                return
            data, self._held = bytes(self._held), bytearray()
        rest = memoryview(data)
        while rest:
            if self.raw_left:
                part = bytes(rest[: self.raw_left])
                rest = rest[len(part) :]
                self.raw_left -= len(part)
                yield CheckpointBytes(part, self.raw_left == 0)
                continue
            size = int.from_bytes(rest[:4], "little")
            if len(rest) >= 4 and not 1 <= size <= params.SANDBOX_FRAME_BYTES_MAX:
                raise BadReply(
                    "oversize-frame", f"a frame of {size} bytes, 1 to {params.SANDBOX_FRAME_BYTES_MAX} are read"
                )
            if len(rest) < 4 or len(rest) < 4 + size:
                self._held = bytearray(rest)
                return
            body, rest = bytes(rest[4 : 4 + size]), rest[4 + size :]
            try:
                reply: Reply = decode(Reply, body, bytes_max=params.SANDBOX_FRAME_BYTES_MAX)  # type: ignore[arg-type]
            except (MalformedRecord, LimitExceeded) as error:
                raise BadReply("bad-frame", error.what) from None
            yield reply

    @property
    def incomplete(self) -> bool:
        """Whether bytes are still owed: an end of file now cuts a frame or a checkpoint short."""
        return bool(self._held) or self.raw_left > 0
