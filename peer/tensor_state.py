"""What is known of the payloads between two units: what is kept, sent, taken, asked for. Sans-IO.

`Outgoing` is one link's sender, `Incoming` its receiver, `Waits` how long a unit usually lets one wait. Promises: a
payload counts as taken only when the receiver said so; what a receiver must hold is bounded by the credit that it gave;
whatever a peer sends that the run did not promise is a typed error, and changes nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from peer.tensor_wire import Grant, Greeting, Part
from protocol import params
from protocol.errors import LimitExceeded, MalformedRecord, VerificationFailed
from protocol.payload import PayloadKey, receivers
from protocol.stage import Flow, Stage, links_in, links_out

__all__ = ["ChangedPayload", "Expected", "Incoming", "Outgoing", "Seat", "Waits", "expected_of", "receivers_of"]


class ChangedPayload(VerificationFailed):
    """A peer sent other bytes under a key that it had sent before."""

    code = "changed-payload"


@dataclass(frozen=True)
class Seat:
    """Who has a unit. epoch: how often the unit was given to somebody before."""

    peer: bytes
    epoch: int = 0


NO_SEAT: Final = Seat(b"")
NOTHING: Final = Grant(0, 0)


@dataclass(frozen=True)
class Expected:
    """What one unit sends another. places: every (flow, micro-batch, index) of one step. outer: how many payloads of
    that flow there are at a segment's end. steps: of the task. payload_bytes_max: of the largest."""

    places: frozenset[tuple[Flow, int, int]]
    outer: int
    steps: range
    payload_bytes_max: int = params.CROSSING_BYTES_MAX + params.PAYLOAD_HEAD_BYTES_MAX

    def check(self, key: PayloadKey) -> None:
        """Raise MalformedRecord for a key that the run has no payload of."""
        if key.step not in self.steps:
            raise MalformedRecord(f"a payload of step {key.step}; the task has {self.steps.start} to {self.steps.stop}")
        if key.flow == "outer":
            if key.micro_batch or key.index >= self.outer:
                raise MalformedRecord(f"outer payload {key.index} of {self.outer}, micro-batch {key.micro_batch}")
        elif (key.flow, key.micro_batch, key.index) not in self.places:
            raise MalformedRecord(f"no {key.flow} tensor {key.index} of micro-batch {key.micro_batch} crosses here")


def expected_of(
    stage: Stage,
    *,
    steps: range,
    outer: int = 0,
    payload_bytes_max: int = params.CROSSING_BYTES_MAX + params.PAYLOAD_HEAD_BYTES_MAX,
) -> dict[int, Expected]:
    """By the number of the unit that sends: all that may come for a unit. outer: tensors of the flow `outer` each."""
    found: dict[int, Expected] = {}
    for link in links_in(stage):
        places = {
            (crossing.flow, crossing.micro_batch, crossing.index)
            for crossing in stage.receives
            if crossing.flow == link.flow
            and (link.flow != "sync" or stage.unit_of(stage.stage, crossing.replica) == link.other)
        }
        count = outer if link.flow == "outer" else 0
        found[link.other] = Expected(frozenset(places), count, steps, payload_bytes_max)
    return found


def receivers_of(stage: Stage) -> frozenset[int]:
    """The units that a unit sends anything."""
    return frozenset(other for link in links_out(stage) for other in receivers(stage, link.flow))


# --- sending --------------------------------------------------------------------------------------------------------


@dataclass
class Outgoing:
    """What goes to one unit. `sizes`: all that is kept for it, in the order it was sent in; `waiting_bytes`: what it
    has not taken."""

    sizes: dict[PayloadKey, int] = field(default_factory=dict)
    waiting_bytes: int = 0
    linked: bool = False
    _taken: set[PayloadKey] = field(default_factory=set)
    _todo: deque[PayloadKey] = field(default_factory=deque)
    _at: int = 0  # bytes of the first of _todo that are on their way
    _sent: deque[PayloadKey] = field(default_factory=deque)  # whole, not yet said to be taken
    _credit: int = 0
    _spent: int = 0
    _done: int = 0
    _released: int = 0
    _had: frozenset[PayloadKey] = frozenset()  # by the receiver, when it greeted; and all before _floor
    _floor: int = 0

    def add(self, key: PayloadKey, size: int) -> None:
        """One more payload. A unit that replays its segment makes again what the other side has."""
        self.sizes[key] = size
        if self.linked and (key.step < self._floor or key in self._had):
            self._taken.add(key)
            return
        self.waiting_bytes += size
        self._todo.append(key)

    def welcome(self, greeting: Greeting) -> list[PayloadKey]:
        """A stream is open: go on from what the other side has. Returns what need not be kept for it any more. Raises
        MalformedRecord."""
        self._had, self._floor = frozenset(greeting.have), greeting.floor
        self.waiting_bytes = 0
        self._todo.clear()
        self._sent.clear()
        self._taken.clear()
        self._at = self._spent = self._done = 0
        self._credit, self.linked = greeting.credit, True
        for key, size in list(self.sizes.items()):
            if key.step < self._floor or key in self._had:
                self._taken.add(key)
            else:
                self._todo.append(key)
                self.waiting_bytes += size
        first = greeting.partial
        if first is not None and first in self.sizes and first not in self._taken:
            if greeting.partial_bytes > self.sizes[first]:
                raise MalformedRecord(f"the peer has {greeting.partial_bytes} of {self.sizes[first]} bytes")
            self._todo.remove(first)
            self._todo.appendleft(first)
            self._at = greeting.partial_bytes if greeting.partial_bytes < self.sizes[first] else 0
        return self.release(self._released)

    def lost(self) -> None:
        """The stream broke: nothing moves before the next `welcome`."""
        self.linked = False

    def reset(self) -> None:
        """Another peer has the unit: it needs all that is kept."""
        self.linked = False
        self._taken.clear()
        self.waiting_bytes = sum(self.sizes.values())

    def next_part(self) -> Part | None:
        """What to send now, if there is something and the other side takes it. Counted as sent."""
        if not self.linked or not self._todo:
            return None
        key = self._todo[0]
        total = self.sizes[key]
        room = self._credit - self._spent - (0 if self._at else params.TENSOR_PAYLOAD_COST)
        length = min(total - self._at, params.TENSOR_PART_BYTES, room)
        if room < 0 or (not length and total):
            return None
        part = Part(key, length, total, self._at)
        self._spent += cost(part)
        self._at += length
        if self._at == total:
            self._sent.append(self._todo.popleft())
            self._at = 0
        return part

    def granted(self, grant: Grant) -> list[PayloadKey]:
        """The other side's word; returns what need not be kept for it any more.

        Raises MalformedRecord for one that takes back, or says it has what was never sent.
        """
        newly = grant.done - self._done
        if grant.credit < self._credit or not 0 <= newly <= len(self._sent):
            raise MalformedRecord(
                f"a grant of {grant.credit} bytes and {grant.done} payloads",
                why=f"{self._credit} bytes were granted, {self._done + len(self._sent)} payloads sent",
            )
        self._credit, self._done = grant.credit, grant.done
        gone = []
        for _ in range(newly):
            key = self._sent.popleft()
            self.waiting_bytes -= self.sizes[key]
            self._taken.add(key)
            if key.step < self._released:
                gone.append(key)
                self._forget(key)
        return gone

    def release(self, before_step: int) -> list[PayloadKey]:
        """Nobody will ask for the steps before again: what of them is dropped now. The rest goes when it is taken."""
        self._released = max(self._released, before_step)
        gone = [key for key in self._taken if key.step < self._released]
        for key in gone:
            self._forget(key)
        return gone

    def _forget(self, key: PayloadKey) -> None:
        self._taken.discard(key)
        del self.sizes[key]


def cost(part: Part) -> int:
    """What a part takes of the receiver's credit, in bytes."""
    return part.length + (0 if part.offset else params.TENSOR_PAYLOAD_COST)


# --- receiving ------------------------------------------------------------------------------------------------------


@dataclass
class _Partial:
    part: Part
    double: bool
    chunks: list[bytearray | memoryview] = field(default_factory=list)  # views of messages, and short pieces joined
    bytes_here: int = 0


@dataclass
class Incoming:
    """What comes from one unit. `have`: every payload since `floor`, and whose it was; `held_bytes`: of those that the
    worker has not been given."""

    unit: int
    expected: Expected
    window_bytes: int = params.TENSOR_WINDOW_BYTES
    floor: int = 0
    have: dict[PayloadKey, Seat] = field(default_factory=dict)
    held_bytes: int = 0
    extra_bytes: int = 0  # beyond the window, while the worker could not go on
    _session: bytes = b""
    _partial: _Partial | None = None
    _spent: int = 0
    _credit: int = 0
    _done: int = 0
    _told: Grant = NOTHING
    _seat: Seat = NO_SEAT

    def greet(self, session: bytes, seat: Seat) -> Greeting:
        """A stream was opened by who has the unit. A half payload of the same session goes on."""
        if session != self._session or (self._partial is not None and self._partial.double):
            self._drop_partial()
        self._session, self._seat = session, seat
        self._spent = self._done = 0
        self._credit = max(0, self._room())
        self._told = Grant(self._credit, 0)
        newest = sorted(self.have, key=lambda key: key.step)[-params.TENSOR_HAVE_MAX :]
        partial = self._partial
        if partial is not None and not partial.bytes_here:
            partial = self._partial = None
        return Greeting(
            floor=self.floor, credit=self._credit, have=tuple(newest),
            partial=partial.part.key if partial else None, partial_bytes=partial.bytes_here if partial else 0,
        )  # fmt: skip

    def begin(self, part: Part) -> None:
        """The head of a part. Raises RemoteProtocolError for one that was not asked for."""
        key, partial = part.key, self._partial
        self._spent += cost(part)
        if self._spent > self._credit:
            raise LimitExceeded(f"{self._spent} bytes of payloads on a credit of {self._credit}")
        if part.offset == 0:
            if partial is not None and partial.bytes_here and partial.part.key != key:
                raise MalformedRecord("a payload begins before the one before it has ended")
            self._drop_partial()
            self.expected.check(key)
            if part.total > self.expected.payload_bytes_max:
                raise LimitExceeded(
                    f"a payload of {part.total} bytes, the largest has {self.expected.payload_bytes_max}"
                )
            double = key.step < self.floor or key in self.have
            if not double and len(self.have) >= params.TENSOR_KEYS_MAX:
                raise LimitExceeded(f"more than {params.TENSOR_KEYS_MAX} payloads that nobody released")
            self._partial = _Partial(part, double)
        elif partial is None or (partial.part.key, partial.part.total) != (key, part.total):
            raise MalformedRecord("a part of a payload that has not begun")
        elif part.offset != partial.bytes_here:
            raise MalformedRecord(f"a part at {part.offset} of a payload of which {partial.bytes_here} bytes are here")

    def feed(self, chunk: bytes | memoryview) -> None:
        """Bytes of the part that began."""
        partial = self._partial
        assert partial is not None
        last = partial.chunks[-1] if partial.chunks else None
        if len(chunk) >= params.MUX_SHORT_BYTES:
            partial.chunks.append(memoryview(chunk))
        elif isinstance(last, bytearray) and len(last) < params.TENSOR_PART_BYTES:
            last += chunk  # an object for each byte would take fifty times as much
        else:
            partial.chunks.append(bytearray(chunk))
        partial.bytes_here += len(chunk)
        self.held_bytes += len(chunk)

    def finish(self) -> tuple[PayloadKey, bytes, bool] | None:
        """The payload that is whole now, and whether it is a double; None while there is more to come.

        One that is no double counts as had, and is to be kept at once.
        """
        partial = self._partial
        assert partial is not None
        if partial.bytes_here < partial.part.total:
            return None
        payload, key = b"".join(partial.chunks), partial.part.key
        self._drop_partial()
        self._done += 1
        if not partial.double:
            self.have[key] = self._seat
            self.held_bytes += len(payload) + params.TENSOR_PAYLOAD_COST
        return key, payload, partial.double

    def doubled(self, key: PayloadKey, same: bool) -> bool:
        """Whether a double differs from what another peer sent before. Raises ChangedPayload if it was this peer."""
        if same:
            return False
        if self.have.get(key) == self._seat:
            what = f"{key.flow} tensor {key.index} of step {key.step}, micro-batch {key.micro_batch}"
            raise ChangedPayload(f"two payloads that differ for the {what}")
        return True

    def given(self, size: int) -> None:
        """The worker was given a payload of `size` bytes for the first time."""
        self.held_bytes -= size + params.TENSOR_PAYLOAD_COST

    def grant(self, *, stuck: bool) -> Grant | None:
        """What to tell the sender, if it is worth telling. stuck: our worker cannot go on before something comes or
        goes, so a full window may be what everybody waits for."""
        if stuck and self._room() < params.TENSOR_PART_BYTES:
            lacks = params.TENSOR_PART_BYTES - self._room()
            more = -(-lacks // self.window_bytes) * self.window_bytes
            self.extra_bytes = min(self.extra_bytes + more, params.TENSOR_STARVED_BYTES_MAX)
        elif not stuck and self.held_bytes < self.window_bytes // 2:
            self.extra_bytes = 0
        self._credit = max(self._credit, self._spent + self._room())
        step = self.window_bytes // params.TENSOR_GRANT_SHARE
        worth = self._credit - self._told.credit >= step or self._told.credit - self._spent < step
        grant = Grant(self._credit, self._done)
        if grant == self._told or (grant.done == self._told.done and not worth):
            return None
        self._told = grant
        return grant

    def release(self, before_step: int) -> list[PayloadKey]:
        """The steps before are over: what of them was here."""
        self.floor = max(self.floor, before_step)
        gone = [key for key in self.have if key.step < self.floor]
        for key in gone:
            del self.have[key]
        return gone

    def _room(self) -> int:
        """Bytes to take now: what the window leaves, at least the rest of a payload that has begun."""
        room = self.window_bytes + self.extra_bytes - self.held_bytes
        if self._partial is not None:
            room = max(room, self._partial.part.total - self._partial.bytes_here)
        return room

    def _drop_partial(self) -> None:
        if self._partial is not None:
            self.held_bytes -= self._partial.bytes_here
            self._partial = None


# --- waiting --------------------------------------------------------------------------------------------------------


@dataclass
class Waits:
    """How long one unit lets another wait: the longest wait of each of the last steps."""

    _longest: dict[int, float] = field(default_factory=dict)

    def add(self, step: int, seconds: float) -> None:
        """A wait in `step` is over."""
        if len(self._longest) >= params.TENSOR_WAITS_KEPT and step not in self._longest:
            del self._longest[min(self._longest)]
        self._longest[step] = max(seconds, self._longest.get(step, 0.0))

    @property
    def deadline_s(self) -> float:
        """A longer wait is not usual."""
        if not self._longest:
            return params.TENSOR_FIRST_WAIT_SECONDS
        return params.TENSOR_WAIT_SECONDS_MIN + params.TENSOR_WAIT_FACTOR * max(self._longest.values())
