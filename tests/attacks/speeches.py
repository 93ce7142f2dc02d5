"""What a hostile worker says to the daemon: bytes for each lie of the catalogue, and what it does afterwards."""

from __future__ import annotations

import json
import math
import struct

from worker.frames import Done, Failed, Reply, Segment, Step, frame

CHECKPOINT_BYTES_MAX = 4096
STEPS = 2
"""Of the job that the liars are given: one segment of two steps."""


def _said(*replies: Reply | bytes) -> bytes:
    return b"".join(reply if isinstance(reply, bytes) else frame(reply) for reply in replies)


def _segment(checkpoint_bytes: int) -> Segment:
    return Segment(
        segment=0, first_step=0, last_step=STEPS, in_root=bytes(32), out_root=bytes(32), operations=1,
        checkpoint_bytes=checkpoint_bytes, diverged_step=None,
    )  # fmt: skip


def safetensors(*names: str) -> bytes:
    """A checkpoint of one float32 for each of `names`, as the format has it, repeated names and all."""
    parts = [
        f'{json.dumps(name)}:{{"dtype":"F32","shape":[1],"data_offsets":[{4 * i},{4 * i + 4}]}}'
        for i, name in enumerate(names)
    ]
    header = ("{" + ",".join(parts) + "}").encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + struct.pack(f"<{len(names)}f", *range(1, len(names) + 1))


FIRST, SECOND = Step(0, 1.0), Step(1, 1.0)
HONEST = safetensors("weight")
TWICE = safetensors("weight", "weight")
ESCAPE = "\x1b]0;owned\x07\x1b[2J"

WORDS: dict[str, tuple[bytes, str]] = {
    "honest": (_said(FIRST, SECOND, _segment(len(HONEST)), HONEST, Done()), "exit"),
    "endless": (_said(FIRST), "loop"),
    "flood": (_said(FIRST), "flood"),
    "giant": (_said(FIRST, b"\xff\xff\xff\xff" + bytes(100)), "wait"),
    "deep": (_said(FIRST, struct.pack("<I", 30_000), b"\x91" * 30_000), "wait"),
    "silence": (_said(FIRST), "exit"),
    "never": (_said(FIRST), "wait"),
    "disorder": (_said(FIRST, Done()), "wait"),
    "nan": (_said(FIRST, Step(1, math.nan)), "wait"),
    "oversize": (_said(FIRST, SECOND, _segment(CHECKPOINT_BYTES_MAX + 1)), "wait"),
    "short": (_said(FIRST, SECOND, _segment(4000), bytes(3999)), "exit"),
    "after": (_said(FIRST, SECOND, _segment(len(HONEST)), HONEST, Done(), Step(2, 1.0)), "exit"),
    "closed": (_said(FIRST), "close"),
    "twice": (_said(FIRST, SECOND, _segment(len(TWICE)), TWICE, Done()), "exit"),
    "escape": (_said(FIRST, Failed("bad-data", ESCAPE, ESCAPE)), "exit"),
}
"""Name -> (all it says, then: "exit", "wait" for ever, "loop" for ever, "flood" the log, "close" the replies)."""
