"""Segments: the same task gives the same roots from any checkpoint, and every fraud gives others."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from protocol import params
from protocol.codec import encode
from protocol.errors import LocalProtocolError, MalformedRecord, VerificationFailed
from protocol.program import Program, operations_per_step, program_id, state_layout
from protocol.task import ArrayRef, BatchRule, Initial, Schedule, TaskSpec
from tests.test_capture import EXAMPLES, example
from worker import char_gpt, checkpoint
from worker.capture import Training, capture_built
from worker.cheats import CHEATS
from worker.executor import Diverged, Executor
from worker.training import Batches, SegmentResult, initial_root, initial_state, rate_of, run_segments

SEED = Initial("seed", bytes(32), bytes(32))


def small_gpt(dropout: float = 0.1) -> Training:
    """A character GPT of 20,000 weights, with everything the large one has."""
    model = char_gpt.CharGPT(context=16, width=32, heads=2, layers=1, dropout=dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    x = torch.zeros(4, 16, dtype=torch.int64)
    return Training(model, char_gpt.loss, optimizer, {"x": x, "y": x.clone()})


@cache
def text() -> bytes:
    return char_gpt.corpus()[:20_000]


@cache
def program_of(name: str) -> Program:
    build = small_gpt if name == "gpt" else example(name).build
    return capture_built(build).program


def task_of(
    program: Program, arrays: Mapping[str, NDArray[Any]], batch: BatchRule, **fields: Any
) -> tuple[TaskSpec, dict[str, bytes]]:
    data = program.to_bytes()
    refs = tuple(
        ArrayRef(name, str(array.dtype), array.shape, bytes(32), array.nbytes)  # type: ignore[arg-type]
        for name, array in arrays.items()
    )
    settings: dict[str, Any] = {
        "network": bytes(32),
        "program": program_id(data),
        "program_bytes": len(data),
        "arrays": refs,
        "batch": batch,
        "initial": SEED,
        "seed": 11,
        "steps": 10,
        "steps_per_segment": 4,
        "mode": "tolerant",
        "width": 15,
        "schedule": Schedule("constant", 3_000_000, 0, 0),
        "operations_per_step": operations_per_step(program),
        "name": "test",
    }
    settings.update(fields)
    return TaskSpec(**settings), {name: array.tobytes() for name, array in arrays.items()}


def gpt_task(**fields: Any) -> tuple[TaskSpec, Program, dict[str, bytes]]:
    program = program_of("gpt")
    arrays = {"text": np.frombuffer(text(), dtype=np.uint8)}
    task, data = task_of(program, arrays, BatchRule("windows", 4, 16), **fields)
    return task, program, data


def rows_task(name: str, **fields: Any) -> tuple[TaskSpec, Program, dict[str, bytes]]:
    program = program_of(name)
    task, data = task_of(program, example(name).data(), BatchRule("rows", 32, 0), **fields)
    return task, program, data


def whole(task: TaskSpec, program: Program, arrays: Mapping[str, bytes], **options: Any) -> list[SegmentResult]:
    given: dict[str, Any] = {"base": None, "segments": range(task.segments), **options}
    return list(run_segments(task=task, program=program, arrays=arrays, **given))


def test_segments_join_and_cover_every_step() -> None:
    task, program, arrays = gpt_task()
    seen: list[int] = []
    results = whole(task, program, arrays, on_step=lambda step, loss: seen.append(step))
    assert seen == list(range(10))
    assert [(r.first_step, r.last_step, len(r.losses)) for r in results] == [(0, 4, 4), (4, 8, 4), (8, 10, 2)]
    assert results[0].in_root == initial_root(task, program, None)
    assert [r.in_root for r in results[1:]] == [r.out_root for r in results[:-1]]
    assert len({r.out_root for r in results}) == 3
    assert sum(r.operations for r in results) == 10 * task.operations_per_step
    for result in results:
        assert checkpoint.state_root(checkpoint.load(result.checkpoint, state_layout(program))) == result.out_root


@pytest.mark.parametrize("mode", ["tolerant", "exact"])
@pytest.mark.parametrize("first", [1, 2])
def test_any_checkpoint_resumes_to_the_same_roots(mode: str, first: int) -> None:
    task, program, arrays = gpt_task(mode=mode)
    results = whole(task, program, arrays)
    again = whole(task, program, arrays, base=results[first - 1].checkpoint, segments=range(first, 3))
    assert again == results[first:]


@pytest.mark.parametrize("cheat", CHEATS)
def test_each_fraud_ends_in_other_roots_than_honest_work(cheat: str) -> None:
    task, program, arrays = gpt_task()
    honest, fraud = whole(task, program, arrays), whole(task, program, arrays, cheat=cheat)
    assert fraud[0].in_root == honest[0].in_root, "a fraud looks right at the start"
    assert [len(r.losses) for r in fraud] == [len(r.losses) for r in honest], "and in its receipts"
    assert [r.operations for r in fraud] == [r.operations for r in honest]
    if cheat != "copied-proof":
        assert fraud[0] == honest[0], "its first segment is honest"
    for segment in (1, 2):
        assert fraud[segment].out_root != honest[segment].out_root
    assert checkpoint.state_root(checkpoint.load(fraud[1].checkpoint)) == fraud[1].out_root


def test_a_product_longer_than_its_width_allows_is_refused_before_anything_runs(monkeypatch: Any) -> None:
    monkeypatch.setattr(params, "PRODUCT_LENGTH_22_MAX", 8)
    task, program, arrays = gpt_task(width=22, mode="exact")
    with pytest.raises(MalformedRecord, match="width 22") as refusal:
        whole(task, program, arrays)
    assert "width 15" in refusal.value.next_step
    assert whole(*gpt_task(width=15, mode="exact"))


def test_an_unknown_fraud_is_refused() -> None:
    task, program, arrays = gpt_task()
    with pytest.raises(LocalProtocolError, match="skip-step"):
        whole(task, program, arrays, cheat="steal")


@pytest.mark.parametrize("name", ["gpt", "cnn", "mlp"])
def test_exact_and_native_training_agree_over_20_steps(name: str) -> None:
    losses = {}
    for mode in ("exact", "tolerant"):
        fields = {"mode": mode, "steps": 20, "steps_per_segment": 20}
        task, program, arrays = gpt_task(**fields) if name == "gpt" else rows_task(name, **fields)
        (result,) = whole(task, program, arrays)
        losses[mode] = result.losses
    assert losses["exact"] == pytest.approx(losses["tolerant"], abs=2e-3)
    assert losses["exact"] != losses["tolerant"], "two arithmetics that agree in every bit are one"
    assert losses["exact"][-1] < losses["exact"][0]


def test_exact_roots_do_not_depend_on_the_number_of_threads() -> None:
    task, program, arrays = rows_task("cnn", mode="exact", steps=3, steps_per_segment=3)
    try:
        roots = {whole(task, program, arrays, threads=threads)[0].out_root for threads in (1, 2)}
    finally:
        torch.set_num_threads(1)
    assert len(roots) == 1


CHILD = """
import sys
from protocol.program import Program
from protocol.task import TaskSpec
from worker.training import run_segments
folder = sys.argv[1]
read = lambda name: open(f"{folder}/{name}", "rb").read()
task = TaskSpec.from_bytes(read("task"), network=bytes(32))
results = run_segments(task=task, program=Program.from_bytes(read("program")), arrays={"text": read("text")},
                       base=None, segments=range(task.segments))
print(*(result.out_root.hex() for result in results))
"""


def test_another_instruction_set_gives_the_same_exact_roots(tmp_path: Path) -> None:
    task, program, arrays = gpt_task(mode="exact")
    for name, data in (("task", encode(task)), ("program", program.to_bytes()), ("text", arrays["text"])):
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    plain = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.split() == [result.out_root.hex() for result in whole(task, program, arrays)]


def test_the_initial_state_follows_the_rules_of_the_program() -> None:
    task, program, _ = gpt_task()
    state = initial_state(task, program, None)
    assert {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in state.items()} == state_layout(
        program
    )
    table = state["embed.weight"]
    assert float(table.std()) == pytest.approx(0.02, rel=0.05)
    assert abs(float(table.mean())) < 1e-3
    assert torch.equal(state["norm.weight"], torch.ones(32))
    assert float(state["optimizer.beta1_power.0"]) == 1.0
    assert initial_root(task, program, None) != initial_root(msgspec.structs.replace(task, seed=12), program, None)
    up = state["blocks.0.up.weight"].flatten()
    assert not torch.equal(up[:100], state["blocks.0.query_key_value.weight"].flatten()[:100])


def test_a_task_may_start_from_weights_and_only_from_those_it_names() -> None:
    task, program, arrays = gpt_task()
    base = whole(task, program, arrays)[-1].checkpoint
    root = checkpoint.state_root(checkpoint.load(base))
    tuned = msgspec.structs.replace(task, initial=Initial("state", bytes(32), root), seed=99)
    assert initial_root(tuned, program, base) == root
    assert whole(tuned, program, arrays, base=base)[0].in_root == root
    wrong = msgspec.structs.replace(tuned, initial=Initial("state", bytes(32), bytes(32)))
    with pytest.raises(VerificationFailed):
        whole(wrong, program, arrays, base=base)
    with pytest.raises(MalformedRecord):
        whole(tuned, program, arrays)
    with pytest.raises(MalformedRecord):
        whole(tuned, program, arrays, base=base[:-4])


def test_weights_without_a_rule_must_be_brought() -> None:
    def build() -> Training:
        model = nn.Linear(2, 2)
        with torch.no_grad():
            model.weight[0, 0] = 1.0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        example_batch = {"x": torch.zeros(4, 2), "y": torch.zeros(4, dtype=torch.int64)}
        return Training(model, nn.functional.cross_entropy, optimizer, example_batch)

    program = capture_built(build).program
    arrays = {"x": np.zeros((9, 2), np.float32), "y": np.zeros(9, np.uint8)}
    task, data = task_of(program, arrays, BatchRule("rows", 4, 0))
    with pytest.raises(MalformedRecord, match="weight has no init rule") as refused:
        whole(task, program, data)
    assert 'initial = "model"' in refused.value.next_step


def test_batches_are_windows_of_the_text_and_rows_of_the_arrays() -> None:
    task, program, arrays = gpt_task()
    batches = Batches(task, program, arrays)
    batch = batches.of(3)
    assert torch.equal(batch["x"][:, 1:], batch["y"][:, :-1])
    for x, y in zip(batch["x"].tolist(), batch["y"].tolist(), strict=True):
        assert bytes([*x, y[-1]]) in text()
    assert torch.equal(batches.of(3)["x"], batch["x"])
    assert not torch.equal(batches.of(4)["x"], batch["x"])
    assert not torch.equal(batches.of(3, seed=12)["x"], batch["x"])
    program = program_of("mlp")
    rows = {"x": np.stack([np.arange(50), -np.arange(50)], 1).astype(np.float32), "y": np.arange(50, dtype=np.uint8)}
    task, data = task_of(program, rows, BatchRule("rows", 32, 0))
    batch = Batches(task, program, data).of(0)
    assert torch.equal(batch["x"][:, 0], batch["y"].to(torch.float32))
    assert torch.equal(batch["x"][:, 1], -batch["y"].to(torch.float32))


def test_the_shortest_text_still_has_one_window() -> None:
    task, program, _ = gpt_task()
    short = text()[:17]
    refs = (msgspec.structs.replace(task.arrays[0], shape=(17,), size_bytes=17),)
    task = msgspec.structs.replace(task, arrays=refs)
    batch = Batches(task, program, {"text": short}).of(0)
    assert bytes(batch["x"][0].tolist()) == short[:16]
    assert bytes(batch["y"][0].tolist()) == short[1:]


def test_data_that_does_not_fit_is_refused_before_a_step() -> None:
    task, program, arrays = gpt_task()
    with pytest.raises(MalformedRecord, match="missing"):
        whole(task, program, {})
    with pytest.raises(MalformedRecord, match="bytes"):
        whole(task, program, {"text": arrays["text"][:-1]})
    with pytest.raises(MalformedRecord, match="batch rule gives"):
        whole(msgspec.structs.replace(task, batch=BatchRule("windows", 8, 16)), program, arrays)
    with pytest.raises(VerificationFailed):
        whole(msgspec.structs.replace(task, program=bytes(32)), program, arrays)
    with pytest.raises(MalformedRecord, match="operations"):
        whole(msgspec.structs.replace(task, operations_per_step=5), program, arrays)
    with pytest.raises(LocalProtocolError):
        whole(task, program, arrays, segments=range(2, 4))
    with pytest.raises(MalformedRecord, match="checkpoint"):
        whole(task, program, arrays, segments=range(1, 2))
    task, program, arrays = rows_task("mlp")
    as_float = tuple(
        msgspec.structs.replace(r, dtype="float32", size_bytes=8000) if r.name == "y" else r for r in task.arrays
    )
    with pytest.raises(MalformedRecord, match="its array is float32"):
        whole(msgspec.structs.replace(task, arrays=as_float), program, {**arrays, "y": bytes(8000)})


@pytest.mark.parametrize("mode", ["tolerant", "exact"])
def test_a_token_beyond_the_vocabulary_stops_the_run_with_a_typed_error(mode: str) -> None:
    task, program, arrays = gpt_task(mode=mode)
    with pytest.raises(MalformedRecord):
        whole(task, program, {"text": bytes([200]) * len(arrays["text"])})


@pytest.mark.parametrize("mode", ["tolerant", "exact"])
def test_divergence_ends_the_task_at_its_step_and_keeps_the_last_good_state(mode: str) -> None:
    def build() -> Training:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        example_batch = {"x": torch.zeros(4, 2), "y": torch.zeros(4, 1)}
        return Training(model, nn.functional.mse_loss, optimizer, example_batch)

    program = capture_built(build).program
    arrays = {"x": np.full((8, 2), 3e3, np.float32), "y": np.ones((8, 1), np.float32)}
    task, data = task_of(
        program,
        arrays,
        BatchRule("rows", 4, 0),
        mode=mode,
        steps=40,
        steps_per_segment=4,
        schedule=Schedule("constant", 10**9, 0, 0),
    )
    results = whole(task, program, data)
    last = results[-1]
    assert last.diverged_step == last.last_step < 40
    assert [r.diverged_step for r in results[:-1]] == [None] * (len(results) - 1)
    assert last.operations == (last.last_step - last.first_step) * task.operations_per_step
    state = checkpoint.load(last.checkpoint)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    batch = Batches(task, program, data).of(last.last_step)
    with pytest.raises(Diverged) as diverged:
        Executor(program, mode).step(state, batch, 1.0, task.seed, last.last_step)  # type: ignore[arg-type]
    assert diverged.value.step == last.last_step


def test_the_learning_rate_is_the_schedules_in_float32() -> None:
    task, _, _ = gpt_task(schedule=Schedule("warmup-cosine", 2_000_000, 200_000, 4), steps=100)
    assert rate_of(task, 0) == float(np.float32(0.0005))
    assert rate_of(task, 3) == float(np.float32(0.002))
    assert rate_of(task, 99) < 0.00021


@pytest.mark.parametrize("name", ["mlp", "cnn", "char_gpt"])
def test_each_example_is_a_job_that_fits_its_model_and_data(name: str) -> None:
    job = tomllib.loads((EXAMPLES / name / "job.toml").read_text())
    module = example(name)
    built = getattr(module, job["model"].split(":")[1])()
    arrays: dict[str, NDArray[Any]] = getattr(module, job["data"].split(":")[1])()
    rule = BatchRule(job["batch"]["rule"], job["batch"]["size"], job["batch"].get("length", 0))
    rate = job["learning_rate"]
    schedule = Schedule(
        rate["kind"], round(rate["peak"] * 1e9), round(rate.get("floor", 0) * 1e9), rate.get("warmup_steps", 0)
    )
    assert math.ceil(job["steps"] / job["steps_per_segment"]) <= params.TASK_SEGMENTS_MAX
    if name == "char_gpt":
        parameters: list[Tensor] = list(built.model.parameters())
        assert sum(p.numel() for p in parameters) >= 1_000_000
        assert max(corpus := arrays["text"]) < char_gpt.SYMBOLS
        assert len(corpus) > 100_000
        assert list(built.example["x"].shape) == [rule.size, rule.length]
        return
    program = capture_built(module.build).program
    steps = 100 if name == "cnn" else job["steps"]
    fields = {"seed": job["seed"], "steps": steps, "steps_per_segment": steps}
    task, data = task_of(program, arrays, rule, schedule=schedule, **fields)
    (result,) = whole(task, program, data)
    assert np.mean(result.losses[-10:]) < 0.5 * np.mean(result.losses[:10])


def test_generation_continues_a_prompt_and_depends_on_its_seed() -> None:
    model = char_gpt.CharGPT()
    weights = {**model.state_dict(), "optimizer.mean.head.weight": torch.zeros(1)}
    first = char_gpt.generate(weights, "The ", 5, seed=1)
    assert first.startswith("The ") and len(first) == 9
    assert first == char_gpt.generate(weights, "The ", 5, seed=1)
    assert first != char_gpt.generate(weights, "The ", 5, seed=2)
