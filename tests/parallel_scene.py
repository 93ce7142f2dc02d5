"""The units of a parallel job in one process: an exchange in memory, and runs that wait for what they need.

Each unit runs the nodes of its Program in their order and waits where an input is not there yet; if all wait, that is a
deadlock, and the test fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protocol.program import STATE_ROLES, Program, state_layout
from protocol.stage import Crossing, replica_seed
from worker.cutting import StagePart
from worker.executor import DTYPES, Executor

__all__ = ["Key", "State", "part_of", "rows_of", "run_units", "step_whole", "units_step"]

State = dict[str, Tensor]
Key = tuple[str, int, int, int, int, int]  # flow, from stage, to stage, replica it comes from, micro-batch, index


@dataclass(frozen=True)
class Unit:
    """A unit ready to step."""

    part: StagePart
    executor: Executor


def rows_of(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Micro-batches one after the other."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def part_of(part: StagePart, state: Mapping[str, Tensor]) -> State:
    """A unit's part of the whole's state, and zeros for what it has of its own."""
    return {
        name: state[name].clone() if name in state else torch.zeros(shape, dtype=DTYPES[dtype])
        for name, (dtype, shape) in state_layout(part.program).items()
    }


def step_whole(
    program: Program, state: Mapping[str, Tensor], batch: Mapping[str, Tensor], rate: float, seed: int, step: int
) -> tuple[State, float]:
    """One exact step of a whole Program."""
    return Executor(program).step(state, batch, rate, seed, step)


def run_units(parts: Sequence[StagePart]) -> list[Unit]:
    """Units with their executors."""
    return [Unit(part, Executor(part.program)) for part in parts]


def units_step(
    units: Sequence[Unit],
    states: Sequence[Mapping[str, Tensor]],
    batches: Sequence[Mapping[str, Tensor]],
    rate: float,
    seed: int,
    step: int,
) -> tuple[list[State], list[float]]:
    """One step of all units at once: their new states and losses. batches: of each replica, all its micro-batches."""
    sent: dict[Key, Tensor] = {}
    ends: dict[int, tuple[State, float]] = {}
    running = {
        number: _nodes(unit, number, states[number], batches[unit.part.replica], rate, seed, step, sent, ends)
        for number, unit in enumerate(units)
    }
    while running:
        moved = False
        for number in list(running):
            try:
                moved |= next(running[number])
            except StopIteration:
                del running[number]
                moved = True
        assert moved, f"units {sorted(running)} wait for one another; {len(sent)} tensors were sent"
    return [ends[number][0] for number in range(len(units))], [ends[number][1] for number in range(len(units))]


def _nodes(
    unit: Unit,
    number: int,
    state: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    rate: float,
    seed: int,
    step: int,
    sent: dict[Key, Tensor],
    ends: dict[int, tuple[State, float]],
) -> Iterator[bool]:
    """Runs one unit; yields whether it got on since the last time, where it has to wait."""
    part, program = unit.part, unit.part.program
    values = _given(program, part, state, batch, rate, replica_seed(seed, part.replica), step)
    receives = {crossing.value: crossing for crossing in part.receives}
    sends: dict[int, list[Crossing]] = {}
    for crossing in part.sends:
        sends.setdefault(crossing.value, []).append(crossing)
    moved = True
    for place, node in enumerate(program.nodes):
        for ref in node.refs():
            while ref not in values:
                found = sent.get(_key(part, receives[ref], out=False))
                if found is None:
                    yield moved
                    moved = False
                else:
                    values[ref] = found
                    moved = True
        result = unit.executor.run_node(place, values.__getitem__)
        values[program.first_node + place] = result
        moved = True
        for crossing in sends.get(program.first_node + place, ()):
            key = _key(part, crossing, out=True)
            assert key not in sent, f"{key} is sent twice"
            sent[key] = result
    ends[number] = ({u.name: values[u.value] for u in program.updates}, float(values[program.loss]))


def _key(part: StagePart, crossing: Crossing, *, out: bool) -> Key:
    step = {"forward": 1, "backward": -1, "sync": 0}[crossing.flow]
    here = part.stage
    ends = (here, here + step) if out else (here - step, here)
    return (crossing.flow, *ends, crossing.replica, crossing.micro_batch, crossing.index)


def _given(
    program: Program,
    part: StagePart,
    state: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    rate: float,
    seed: int,
    step: int,
) -> dict[int, Tensor]:
    received = {crossing.value for crossing in part.receives}
    values: dict[int, Tensor] = {}
    for number, item in enumerate(program.inputs):
        if item.role == "learning_rate":
            values[number] = torch.tensor(rate, dtype=torch.float32)
        elif item.role == "step_key":
            values[number] = torch.tensor([seed, step], dtype=torch.int64)
        elif number not in received:
            values[number] = (state if item.role in STATE_ROLES else batch)[item.name]
    for number, constant in enumerate(program.constants, len(program.inputs)):
        data = np.frombuffer(constant.data, constant.dtype).copy()
        values[number] = torch.from_numpy(data).reshape(constant.shape)
    return values
