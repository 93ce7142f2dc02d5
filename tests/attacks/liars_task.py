"""The smallest task there is, for workers that never look at it."""

from __future__ import annotations

from protocol.codec import encode
from protocol.task import ArrayRef, BatchRule, Initial, Schedule, TaskSpec


def task_bytes(steps: int) -> bytes:
    """A task of one segment of `steps` steps."""
    return encode(
        TaskSpec(
            network=bytes(32),
            program=bytes(32),
            program_bytes=1,
            arrays=(ArrayRef("x", "float32", (4, 1), bytes(32), 16),),
            batch=BatchRule("rows", 1, 0),
            initial=Initial("seed", bytes(32), bytes(32)),
            seed=0,
            steps=steps,
            steps_per_segment=steps,
            mode="exact",
            width=15,
            schedule=Schedule("constant", 1, 0, 0),
            operations_per_step=1,
            name="liar",
        )
    )
