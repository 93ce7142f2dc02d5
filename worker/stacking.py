"""The first state of a job that is stacked on another: its end's weights by name, all else from the seed. DESIGN §4.

Anybody who holds the earlier job's last checkpoint derives the same state, and with protocol/stack.py anybody who
holds its proof derives the same root. So nothing is drawn here that the later Program's init rules do not say.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from protocol import safetensors
from protocol.errors import IchibaError
from protocol.program import Program, state_layout
from worker.job_file import BadJobFile
from worker.training import drawn

__all__ = ["Stack", "stacked"]


@dataclass(frozen=True)
class Stack:
    """A first state. taken: its weights from the job below; fresh: its weights from the seed."""

    state: dict[str, Tensor]
    taken: tuple[str, ...]
    fresh: tuple[str, ...]


def stacked(below: Path, program: Program, seed: int) -> Stack:
    """The state a job of `program` and `seed` starts from on the checkpoint `below`.

    An optimizer starts afresh, and so do results. Raises BadJobFile if nothing, or something of another shape, bears
    the name of a weight, or if a weight that is not there has no rule.
    """
    try:
        with below.open("rb") as file:
            # Mapped, for an optimizer's share of it is not wanted. The last array that looks at it unmaps it.
            found = safetensors.parse(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    except (IchibaError, ValueError) as error:  # mmap's, for an empty file
        raise BadJobFile(f"{below.name} of the job below does not read: {error}") from None
    weights = {item.name: item for item in program.inputs_of("parameter", "buffer")}
    taken = sorted(weights.keys() & found.keys())
    if not taken:
        raise BadJobFile(
            "the job below ended with no tensor that bears the name of a weight of this model",
            why=f"it ended with {sorted(found)[:3]}, the model has {sorted(weights)[:3]}",
            next_step="build the model as that job did; what is new may have any other name",
        )
    for name in taken:
        theirs, own = found[name], weights[name]
        if (theirs.dtype.name, theirs.shape) != (own.dtype, own.shape):
            raise BadJobFile(
                f"{name} is {own.dtype} {own.shape}, in the job below it is {theirs.dtype.name} {theirs.shape}",
                next_step="give a new layer a new name, so that a proof can tell what was taken over",
            )
    rules = {item.name: item for item in program.inputs if item.init is not None}
    fresh = sorted(weights.keys() - found.keys())
    for name in fresh:
        init = weights[name].init
        if init is None or init.kind == "given":
            raise BadJobFile(
                f"{name} is not in the job below, and has no init rule a stranger can follow",
                why="it was filled by something else than a constant, normal or uniform draw",
                next_step="fill it in build() with torch.nn.init, torch.zeros or torch.randn",
            )
    state = {name: torch.from_numpy(found[name].copy()) for name in taken}
    for at, name in enumerate(state_layout(program)):
        if name not in state:
            state[name] = drawn(rules[name], seed, at)
    return Stack(state, tuple(taken), tuple(fresh))
