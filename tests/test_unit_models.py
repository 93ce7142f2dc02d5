"""A model that is really cut: its units train as the whole does, by every exchange, and each is checked alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.codec import encode
from protocol.program import STATE_ROLES, Program, operations_per_step, program_id, state_layout
from protocol.stage import Codec, Stage, replica_seed
from protocol.task import ArrayRef, BatchRule, Initial, Schedule, TaskSpec
from tests.models import state_of
from tests.unit_scene import Ran, Unit, checked, run_threads, stage_of
from worker import char_gpt, checkpoint
from worker.capture import Training, capture_built
from worker.cutting import cut
from worker.executor import DTYPES
from worker.training import run_segments
from worker.unrolling import unrolled

MICRO_BATCHES, ROWS, LENGTH = 2, 2, 8
TEXT = bytes((7 * i + i // 3) % 24 for i in range(40))
ARRAY = ArrayRef("text", "uint8", (len(TEXT),), bytes([1]) * 32, len(TEXT))
RAW, CHANGE, TILE = Codec("float32"), Codec("change", 4), Codec("tile", 8)


@cache
def captured_gpt() -> tuple[Program, dict[str, torch.Tensor]]:
    def build() -> Training:
        model = char_gpt.CharGPT(symbols=24, context=LENGTH, width=16, heads=2, layers=2, dropout=0.0)
        x = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
        return Training(model, char_gpt.loss, torch.optim.AdamW(model.parameters()), {"x": x, "y": x.clone()})

    torch.manual_seed(0)
    program = capture_built(build).program
    return program, state_of(program)


def task_of(program: Program, base: bytes, stage: Stage | None, seed: int) -> TaskSpec:
    root = checkpoint.state_root(checkpoint.load(base))
    return TaskSpec(
        network=bytes(32), program=program_id(program.to_bytes()), program_bytes=len(program.to_bytes()),
        arrays=(ARRAY,), batch=BatchRule("windows", MICRO_BATCHES * ROWS, LENGTH),
        initial=Initial("state", bytes(32), root), seed=seed, steps=4, steps_per_segment=2, mode="exact", width=15,
        schedule=Schedule("constant", 1_000_000, 0, 0), operations_per_step=operations_per_step(program), name="gpt",
        stage=stage,
    )  # fmt: skip


def part_of(program: Program) -> bytes:
    _, whole = captured_gpt()
    return checkpoint.dump(
        {
            name: whole[name] if name in whole else torch.zeros(shape, dtype=DTYPES[dtype])
            for name, (dtype, shape) in state_layout(program).items()
        }
    )


def run_cut(folder: Path, stages: int = 2, **fields: Any) -> list[Ran]:
    program, _ = captured_gpt()
    replicas, sync = fields.get("replicas", 1), fields.get("sync", "none")
    kept = len(TEXT) - LENGTH if fields.get("forward", RAW).kind == "change" else 0
    units = []
    for part in cut(program, stages=stages, micro_batches=MICRO_BATCHES, replicas=replicas, sync=sync, kept_rows=kept):
        stage = stage_of(
            part.stage, stages=stages, replica=part.replica, micro_batches=MICRO_BATCHES, sends=part.sends,
            receives=part.receives, **fields,
        )  # fmt: skip
        base = part_of(part.program)
        task = task_of(part.program, base, stage, replica_seed(5, part.replica))
        TaskSpec.from_bytes(encode(task), network=bytes(32))
        units.append(unit_of(folder, task, part.program, base))
    return run_threads(units, arrays={"text": TEXT})


def unit_of(folder: Path, task: TaskSpec, program: Program, base: bytes) -> Unit:
    assert task.stage is not None
    path = folder / f"base-{task.stage.unit}"
    path.write_bytes(base)
    return Unit(task, program, path)


def check_all(found: list[Ran]) -> None:
    assert [mine.error for mine in found] == [None] * len(found)
    for mine in found:
        for segment, result in enumerate(mine.results):
            assert checked(mine, segment).checkpoint == result.checkpoint


@pytest.mark.parametrize("stages", [2, 3])
def test_the_units_of_a_cut_model_train_bit_for_bit_as_the_whole(stages: int, tmp_path: Path) -> None:
    program, state = captured_gpt()
    whole = unrolled(program, MICRO_BATCHES)
    base = checkpoint.dump({name: state[name] for name in state_layout(whole)})
    made = run_segments(
        task=task_of(whole, base, None, 5), program=whole, arrays={"text": TEXT}, base=base, segments=range(2)
    )
    ends = [checkpoint.load(result.checkpoint) for result in made]
    found = run_cut(tmp_path, stages)
    check_all(found)
    for segment, end in enumerate(ends):
        for mine in found:
            for name, tensor in mine.end(segment).items():
                assert name not in end or torch.equal(tensor, end[name]), name
        assert set(end) == {name for mine in found for name in mine.end(segment) if name in end}


@pytest.mark.parametrize(
    "fields",
    [
        {"forward": CHANGE, "backward": TILE},
        {"replicas": 2, "sync": "step"},
        {"replicas": 2, "sync": "step", "forward": CHANGE, "backward": TILE, "shared": TILE},
        {
            "replicas": 2, "sync": "local", "forward": CHANGE, "shared": Codec("tile", 4),
            "outer_rate_nano": 700_000_000, "outer_momentum_nano": 900_000_000,
        },
    ],
    ids=["compressed", "step", "step, compressed", "local, compressed"],
)  # fmt: skip
def test_a_cut_model_trains_by_every_exchange_and_its_replicas_stay_equal(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    found = run_cut(tmp_path, **fields)
    check_all(found)
    if "replicas" not in fields:
        return
    for one, other in (found[:2], found[2:]):
        parameters = [item.name for item in one.unit.program.inputs if item.role in STATE_ROLES[:1]]
        for segment in range(2):
            for name in parameters:
                assert torch.equal(one.end(segment)[name], other.end(segment)[name]), name
        assert not torch.equal(one.end(0)[parameters[0]], one.end(1)[parameters[0]])
