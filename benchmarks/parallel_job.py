"""The jobs of benchmarks/parallel.py, cut into units whose files a process of benchmarks/parallel_peer.py reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from protocol import params
from protocol.codec import blake, encode
from protocol.program import Program, operations_per_step, peak_bytes, program_id, state_layout
from protocol.stage import Codec, Stage, replica_seed
from protocol.task import ArrayRef, BatchRule, Initial, Schedule, TaskSpec
from worker import char_gpt, checkpoint
from worker.capture import Captured, Training, capture_built
from worker.crossings import check_unit
from worker.cutting import StagePart, cut
from worker.executor import DTYPES

__all__ = ["FOUR_EIGHT", "RAW", "Codecs", "Job", "UnitFiles", "gpt", "perceptron", "text_rows", "whole_files"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Codecs:
    """How tensors travel forward, backward, and between replicas."""

    forward: Codec
    backward: Codec
    shared: Codec


RAW = Codecs(Codec("float32"), Codec("float32"), Codec("float32"))
FOUR_EIGHT = Codecs(Codec("change", 4), Codec("tile", 8), Codec("tile", 4))
SEED = 7


def gpt(*, rows: int, context: int, width: int, layers: int, heads: int) -> Captured:
    """The step of one micro-batch of a character GPT, without dropout; its first weights are drawn by seed 0."""

    def build() -> Training:
        model = char_gpt.CharGPT(context=context, width=width, heads=heads, layers=layers, dropout=0.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
        example = torch.zeros(rows, context, dtype=torch.int64)
        return Training(model, char_gpt.loss, optimizer, {"x": example, "y": example.clone()})

    return _captured(build)


def perceptron(*, rows: int, width: int, layers: int) -> Captured:
    """The step of a chain of equal layers: activations and gradients are large beside what there is to compute."""

    def build() -> Training:
        parts: list[nn.Module] = []
        for _ in range(layers):
            parts += [nn.Linear(width, width), nn.Tanh()]
        model = nn.Sequential(*parts)
        example = {"x": torch.zeros(rows, width), "y": torch.zeros(rows, width)}
        return Training(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), example)

    return _captured(build)


def _captured(build: Callable[[], Training]) -> Captured:
    torch.manual_seed(0)
    return capture_built(build)


def text_rows(rows: int, context: int) -> dict[str, Array]:
    """`rows` pieces of the demonstration's text, and each one further."""
    text = np.frombuffer(char_gpt.corpus(), np.uint8)
    places = np.arange(rows)[:, None] * context + np.arange(context)
    return {name: (text[places + further] % char_gpt.SYMBOLS).astype("<i8") for further, name in enumerate("xy")}


@dataclass(frozen=True)
class UnitFiles:
    """One unit on disk. told: the file for parallel_peer."""

    told: Path
    task: TaskSpec
    program: Program
    checkpoint_bytes: int


@dataclass(frozen=True)
class Job:
    """A run: a captured micro-batch, its data, and how it is cut."""

    name: str
    captured: Captured
    arrays: dict[str, Array]
    stages: int
    replicas: int
    micro_batches: int
    sync: Literal["none", "step", "local"]
    codecs: Codecs
    steps: int
    steps_per_segment: int
    in_flight: int | None = None
    peak_nano: int = 1_000_000
    twin: str = ""  # the name of the run that this one is again, bit for bit

    @property
    def run(self) -> bytes:
        """Its id."""
        return blake("ichiba/benchmark", (self.twin or self.name).encode())

    @property
    def rows(self) -> int:
        """Of one step of one replica."""
        return int(self.captured.program.inputs_of("batch")[0].shape[0]) * self.micro_batches

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(int(np.prod(item.shape)) for item in self.captured.program.inputs_of("parameter"))

    def write(self, folder: Path) -> list[UnitFiles]:
        """The units, in the order of their numbers, as files below `folder`."""
        folder = folder / self.name
        folder.mkdir(parents=True)
        arrays = {}
        for name, array in self.arrays.items():
            arrays[name] = folder / name
            arrays[name].write_bytes(array.tobytes())
        kept = len(next(iter(self.arrays.values()))) if self.codecs.forward.kind == "change" else 0
        parts = cut(
            self.captured.program, stages=self.stages, micro_batches=self.micro_batches, in_flight=self.in_flight,
            replicas=self.replicas, sync=self.sync, kept_rows=kept,
        )  # fmt: skip
        return [self._unit(folder, part, arrays) for part in parts]

    def _unit(self, folder: Path, part: StagePart, arrays: dict[str, Path]) -> UnitFiles:
        local, codecs = self.sync == "local", self.codecs
        stage = Stage(
            run=self.run, stage=part.stage, stages=self.stages, replica=part.replica, replicas=self.replicas,
            micro_batches=self.micro_batches, forward=codecs.forward, backward=codecs.backward, sync=self.sync,
            shared=codecs.shared if self.sync != "none" else RAW.shared, sends=part.sends, receives=part.receives,
            outer_rate_nano=700_000_000 if local else 0, outer_momentum_nano=900_000_000 if local else 0,
        )  # fmt: skip
        state = {
            name: self.captured.initial_state[name].clone() if name in self.captured.initial_state
            else torch.zeros(shape, dtype=DTYPES[dtype])
            for name, (dtype, shape) in state_layout(part.program).items()
        }  # fmt: skip
        return _write(self, folder, f"unit-{stage.unit}", part.program, state, arrays, stage)


def whole_files(job: Job, folder: Path) -> UnitFiles:
    """The same model as one ordinary task, of one micro-batch a step."""
    folder = folder / f"{job.name}-whole"
    folder.mkdir(parents=True)
    arrays = {}
    for name, array in job.arrays.items():
        arrays[name] = folder / name
        arrays[name].write_bytes(array.tobytes())
    return _write(job, folder, "whole", job.captured.program, dict(job.captured.initial_state), arrays, None)


def _write(
    job: Job, folder: Path, name: str, program: Program, state: dict[str, torch.Tensor], arrays: dict[str, Path],
    stage: Stage | None,
) -> UnitFiles:  # fmt: skip
    """Files of one task; it is checked as a solver checks it."""
    body, dumped = program.to_bytes(), checkpoint.dump(state)
    read = {item.name for item in program.inputs_of("batch")}
    micro_batches = stage.micro_batches if stage is not None else 1
    task = TaskSpec(
        network=bytes(32), program=program_id(body), program_bytes=len(body),
        arrays=tuple(
            ArrayRef(ref, array.dtype.name, array.shape, bytes([ref in read]) * 32, array.nbytes)
            for ref, array in job.arrays.items()
        ),
        batch=BatchRule("rows", job.rows // job.micro_batches * micro_batches, 0),
        initial=Initial("state", bytes(32), checkpoint.state_root(state)),
        seed=replica_seed(SEED, stage.replica if stage is not None else 0), steps=job.steps,
        steps_per_segment=job.steps_per_segment, mode="exact", width=15,
        schedule=Schedule("constant", job.peak_nano, 0, 0), operations_per_step=operations_per_step(program),
        name=job.name, stage=stage,
    )  # fmt: skip
    TaskSpec.from_bytes(encode(task), network=bytes(32))
    if stage is not None:
        check_unit(task, program)
    files = {"task": encode(task), "program": body, "base": dumped}
    for kind, content in files.items():
        (folder / f"{name}.{kind}").write_bytes(content)
    data = sum(array.nbytes for array in job.arrays.values())
    memory = peak_bytes(program) + 2 * len(dumped) + data + params.WORKER_BASE_BYTES
    told = folder / f"{name}.json"
    told.write_text(json.dumps({
        **{kind: str(folder / f"{name}.{kind}") for kind in files}, "unit": stage.unit if stage is not None else 0,
        "arrays": {ref.name: str(arrays[ref.name]) for ref in task.fetched},
        "memory_bytes": max(memory, params.SANDBOX_MEMORY_BYTES_MIN), "checkpoint_bytes": len(dumped),
    }))  # fmt: skip
    return UnitFiles(told, task, program, len(dumped))


def crossing_bytes(units: list[UnitFiles]) -> tuple[int, int]:
    """What crosses a border one way in a step, both ways and over all borders on average, and the most that a replica
    sends another; both uncompressed."""

    def size(unit: UnitFiles, flows: tuple[str, ...]) -> int:
        assert unit.task.stage is not None
        crossings = [crossing for crossing in unit.task.stage.sends if crossing.flow in flows]
        return sum(unit.program.types[crossing.value].size_bytes for crossing in crossings)

    stage = units[0].task.stage
    assert stage is not None
    ways = 2 * (stage.stages - 1) * stage.replicas
    across = sum(size(unit, ("forward", "backward")) for unit in units)
    return across // max(1, ways), max(size(unit, ("sync",)) for unit in units)
