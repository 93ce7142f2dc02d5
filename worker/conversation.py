"""What may come next in a worker's replies, frame by frame, and what its numbers must be. Sans-IO.

A worker is a stranger's: whatever it says out of turn, twice, or beyond what it was asked ends it. How frames are cut
out of its bytes is worker/frames.py.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from protocol import params
from protocol.errors import MalformedRecord
from worker.frames import (
    Answered,
    BadReply,
    CheckpointBytes,
    Done,
    Failed,
    FalseEnd,
    Frames,
    Handed,
    Reply,
    Root,
    Segment,
    Step,
    Suspended,
    Want,
)
from worker.stage_frames import CrossingTalk, Need, Sent

__all__ = ["Conversation"]


@dataclass
class Conversation:
    """Which reply may come next in one job, and what its numbers must be.

    steps: the step numbers of each segment asked for, in order, the first being segment `first_segment`; empty
    when the initial root, the initial state or an answer is asked for. `losses` holds those of the latest segment: of
    each step done, or the last SANDBOX_LOSSES_KEPT_MAX of them. `resume` starts it within the first segment. A worker
    may say Suspended only once `suspending` is set, and one FalseEnd, between the last step of segment `ordered` and
    its Segment. The Segment states a distance if, and only if, it was to be `compared` with another end. crossings: of
    a unit that runs beside others, what it may ask for and send.
    Raises BadReply with code `wrong-reply`, `oversize-checkpoint` or `extra-bytes`, beside those of `Frames`.
    """

    want: Want
    first_segment: int
    steps: Sequence[range]
    checkpoint_bytes_max: int
    ordered: int | None = None
    compared: bool = False
    crossings: CrossingTalk | None = None
    frames: Frames = field(default_factory=Frames)
    losses: deque[float | None] = field(default_factory=lambda: deque(maxlen=params.SANDBOX_LOSSES_KEPT_MAX))
    finished: bool = False
    suspending: bool = False
    suspended: bool = False
    needed_bytes_max: int = 0  # of the payload that the latest Need asks for
    _done: int = 0
    _next_step: int = -1
    _root_seen: bool = False
    _answered: bool = False
    _handed: bool = False
    _false_seen: bool = False

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
        elif isinstance(reply, Root) and self.want in ("initial-root", "initial-state") and not self._root_seen:
            self._root_seen = True
        elif isinstance(reply, Need | Sent) and training and self.crossings is not None:
            self._check_crossing(reply, self.crossings)
        elif isinstance(reply, Step) and training:
            self._check_step(reply)
        elif isinstance(reply, Segment) and training:
            self._check_segment(reply)
        elif isinstance(reply, FalseEnd) and training and not self._false_seen:
            self._check_false(reply)
        elif isinstance(reply, Suspended) and training and self.suspending and not self._false_now:
            self._check_suspended(reply)
        elif isinstance(reply, Answered) and self.want == "answer" and not self._answered:
            self._answered = True
            self.frames.raw_left = reply.opening_bytes
        elif isinstance(reply, Handed) and self._hands_over and not self._handed:
            self._check_size(reply)
            self._handed = True
            self.frames.raw_left = reply.checkpoint_bytes
        else:
            raise BadReply("wrong-reply", f"{type(reply).__name__.lower()} is not what may come next")

    @property
    def _complete(self) -> bool:
        if self.want == "train":
            return self.suspended or self._done == len(self.steps)
        if self.want == "initial-state":
            return self._handed
        return self._root_seen or self._answered

    @property
    def _hands_over(self) -> bool:
        """Whether a state may follow now."""
        return self._root_seen if self.want == "initial-state" else self._answered

    def _check_step(self, reply: Step) -> None:
        due = self.steps[self._done]
        if reply.step != self._next_step or reply.step not in due:
            raise BadReply("wrong-reply", f"step {reply.step} where {self._next_step} of {due} was due")
        if reply.loss is not None and not math.isfinite(reply.loss):
            raise BadReply("wrong-reply", f"loss {reply.loss} of step {reply.step} is not finite")
        self._end_crossings(reply.step, due.stop - 1)
        if reply.step == due.start:
            self.losses.clear()
        self.losses.append(reply.loss)
        self._next_step += 1

    @property
    def _false_now(self) -> bool:
        """Whether a false end was told whose Segment is due now."""
        return self._false_seen and self.first_segment + self._done == self.ordered

    def _check_false(self, reply: FalseEnd) -> None:
        self._check_size(reply)
        due = (self.ordered, self.steps[self._done].stop)
        if reply.segment != self.first_segment + self._done or (reply.segment, self._next_step) != due:
            raise BadReply("wrong-reply", f"a false end of segment {reply.segment} where none was due")
        self._false_seen = True
        self.frames.raw_left = reply.checkpoint_bytes

    def _check_size(self, reply: Segment | FalseEnd | Suspended | Handed) -> None:
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

    def _check_crossing(self, reply: Need | Sent, crossings: CrossingTalk) -> None:
        step, last = self._next_step, self.steps[self._done].stop - 1
        try:
            if isinstance(reply, Need):
                self.needed_bytes_max = crossings.need(reply.key, step, last)
            else:
                crossings.sent(reply.key, reply.payload_bytes, step, last)
                self.frames.raw_left = reply.payload_bytes
        except MalformedRecord as error:
            raise BadReply("wrong-reply", error.what) from None

    def _end_crossings(self, step: int, last: int) -> None:
        if self.crossings is None:
            return
        try:
            self.crossings.step_done(step, last)
        except MalformedRecord as error:
            raise BadReply("wrong-reply", error.what) from None

    def _check_segment(self, reply: Segment) -> None:
        self._check_size(reply)
        steps = self.steps[self._done]
        diverged = self._next_step if reply.diverged_step is not None else None
        last = steps.stop if diverged is None else diverged
        told = (reply.segment, reply.first_step, reply.last_step, reply.diverged_step)
        due = (self.first_segment + self._done, steps.start, last, diverged)
        if told != due or self._next_step != last or diverged == steps.stop:
            raise BadReply("wrong-reply", f"segment, first, last, diverged step {told} where {due} were due")
        if (reply.distance is not None) != self.compared:
            raise BadReply("wrong-reply", f"a distance of {reply.distance} where {int(self.compared)} was due")
        if self._next_step == steps.start:  # diverged at once
            self.losses.clear()
        # A diverged segment is the last: no step follows a state that is not finite.
        self._done = len(self.steps) if diverged is not None else self._done + 1
        self.frames.raw_left = reply.checkpoint_bytes
