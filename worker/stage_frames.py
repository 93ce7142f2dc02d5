"""What a unit's worker says of its tensors, and which of them it may speak of at each moment. Sans-IO.

A worker asks for a payload with Need and gets it through its job socket: FEED, then an entry as protocol/tape.py writes
it. It hands one over with Sent and `payload_bytes` raw bytes after it. A stranger's program is run by it, so
nothing it says is believed: each key must be one of its stage's crossings, in the step it is in, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec

from protocol import params
from protocol.errors import MalformedRecord
from protocol.payload import PayloadKey, payload_bytes_max, received_key, sent_key
from protocol.program import Program
from protocol.stage import OUTER_PREFIX, Crossing, Side, Stage, links_in

__all__ = ["FEED", "CrossingTalk", "Need", "Sent", "outer_parameters"]

FEED: Final = b"F"
"""Before each entry that the daemon feeds a unit's worker."""


class Need(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="need"):
    """The worker goes on when it is fed this payload."""

    key: PayloadKey


class Sent(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="sent"):
    """A payload for the unit's neighbours; exactly `payload_bytes` raw bytes follow the frame."""

    key: PayloadKey
    payload_bytes: Annotated[int, msgspec.Meta(ge=0, le=params.CROSSING_BYTES_MAX + params.PAYLOAD_HEAD_BYTES_MAX)]


def outer_parameters(program: Program) -> list[str]:
    """The parameters whose changes replicas exchange at a segment's end, by their index: those with outer momentum."""
    names = (item.name for item in program.inputs_of("buffer") if item.name.startswith(OUTER_PREFIX))
    return sorted(name.removeprefix(OUTER_PREFIX) for name in names)


@dataclass
class CrossingTalk:
    """The payloads that may, and must, come in each step, and beside them in the last of a segment.

    needs, sends, outer_needs, outer_sends: by the key in step 0, the most bytes each may have. Raises MalformedRecord
    for what may not come.
    """

    needs: Mapping[PayloadKey, int]
    sends: Mapping[PayloadKey, int]
    outer_needs: Mapping[PayloadKey, int]
    outer_sends: Mapping[PayloadKey, int]
    _done: set[tuple[str, PayloadKey]] = field(default_factory=set)

    @classmethod
    def of(cls, stage: Stage, program: Program) -> CrossingTalk:
        """What a unit exchanges. Raises MalformedRecord, LimitExceeded for crossings that are not of its program."""
        known = len(program.types)
        if any(crossing.value >= known for crossing in (*stage.sends, *stage.receives)):
            raise MalformedRecord(f"a crossing of a value that the program, of {known} values, does not have")

        def most(crossing: Crossing, side: Side) -> int:
            codec = stage.codec_of(crossing.flow, side)
            return payload_bytes_max(program.types[crossing.value], codec, crossing.flow)

        types = {item.name: item.type for item in program.inputs}
        if any(name not in types for name in outer_parameters(program)):
            raise MalformedRecord("outer momentum of a parameter that the program does not have")
        changed = [payload_bytes_max(types[name], stage.shared, "outer") for name in outer_parameters(program)]
        others = [link.other for link in links_in(stage) if link.flow == "outer"]
        return cls(
            {received_key(stage, crossing, 0): most(crossing, "recv") for crossing in stage.receives},
            {sent_key(stage, crossing, 0): most(crossing, "send") for crossing in stage.sends},
            {PayloadKey(0, "outer", 0, i, unit): size for unit in others for i, size in enumerate(changed)},
            {PayloadKey(0, "outer", 0, i, stage.unit): size for i, size in enumerate(changed) if others},
        )

    def need(self, key: PayloadKey, step: int, last: int) -> int:
        """The worker asks for `key` in `step`, the segment's last being `last`; the most bytes that it may get."""
        return self._take("need", key, step, last, self.outer_needs if key.flow == "outer" else self.needs)

    def sent(self, key: PayloadKey, size_bytes: int, step: int, last: int) -> None:
        """The worker hands over `key`, of `size_bytes`."""
        most = self._take("sent", key, step, last, self.outer_sends if key.flow == "outer" else self.sends)
        if size_bytes > most:
            raise MalformedRecord(f"a payload of {size_bytes} bytes, that of {key} has at most {most}")

    def _take(self, what: str, key: PayloadKey, step: int, last: int, known: Mapping[PayloadKey, int]) -> int:
        plain = msgspec.structs.replace(key, step=0)
        due = key.step == step <= last and (key.flow != "outer" or step == last)
        if not due or plain not in known or (what, plain) in self._done:
            raise MalformedRecord(f"{what} {key} is not what may come in step {step}")
        self._done.add((what, plain))
        return known[plain]

    def step_done(self, step: int, last: int) -> None:
        """A step is over: all that belongs to it must have come."""
        due = len(self.needs) + len(self.sends)
        if step == last:
            due += len(self.outer_needs) + len(self.outer_sends)
        if due != len(self._done):
            raise MalformedRecord(f"step {step} ended with {due - len(self._done)} payloads to come")
        self._done.clear()
