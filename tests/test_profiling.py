"""`ichiba profile` on a small AdamW transformer: its gauges, a threshold, and the frauds that lie above it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from benchmarks.profiling import FRAUDS, arrays_of, segment_end, small_gpt, task_of
from peer.cli import cli
from peer.profile_run import run_profile
from peer.work_order import WorkOrder
from peer.workshop import Workshop
from protocol.codec import encode
from protocol.errors import MalformedRecord
from protocol.profile import Distance, Gauge, Tolerance, distance, finding
from protocol.profile_task import ProfileSpec
from protocol.program import Program
from protocol.task import TaskSpec
from worker import checkpoint
from worker.capture import capture_built
from worker.training import Partial, initial_state, run_segments

CONTEXT, STEPS = 8, 6
SIZES = {"blocks": 1, "width": 16, "context": CONTEXT}
TEXT = bytes((7 * i * i + i // 3) % 90 + 32 for i in range(3000))
JOB = f"""
model = "step.program"
data = "text.bin"
mode = "tolerant"
seed = 3
steps = {2 * STEPS}
steps_per_segment = {STEPS}
[batch]
rule = "windows"
size = 8
length = {CONTEXT}
[learning_rate]
kind = "warmup-cosine"
peak = 0.001
floor = 0.0001
warmup_steps = {STEPS}
"""


@pytest.fixture(scope="module")
def program() -> Program:
    return capture_built(lambda: small_gpt(**SIZES)).program


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory, program: Program) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("job")
    (folder / "step.program").write_bytes(program.to_bytes())
    (folder / "text.bin").write_bytes(TEXT)
    (folder / "job.toml").write_text(JOB)
    done = CliRunner().invoke(cli, ["profile", str(folder), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def task(program: Program) -> TaskSpec:
    return task_of(program.to_bytes(), TEXT, context=CONTEXT, steps=STEPS, segments=2, warmup=STEPS)


def test_a_transformer_is_profiled_and_accepted(profiled: dict[str, Any]) -> None:
    assert profiled["schema"] == "ichiba.profile/1"
    assert profiled["refused"] is None
    assert {"name": "blocks.0.query_key_value.bias", "parts": 3, "at": [1]} in profiled["gauges"]
    judges = [one for one in profiled["kernels"] if one["kernels"] != "exact-22"]
    assert len(judges) == 4 and max(one["l1_ppb"] for one in judges) * 3 <= profiled["threshold_l1_ppb"]
    assert max(one["l1_ppb"] for one in profiled["unmasked"]) > 100 * max(one["l1_ppb"] for one in judges)
    assert profiled["other_seed_ppb"] > 1000 * profiled["threshold_l1_ppb"]
    assert profiled["operations_per_second"] > 0


def test_every_fraud_lies_above_the_threshold_and_honest_work_below(
    profiled: dict[str, Any], program: Program, task: TaskSpec
) -> None:
    gauges = tuple(msgspec.convert(gauge, Gauge, from_attributes=False) for gauge in map(tuple_of, profiled["gauges"]))
    tolerance = Tolerance(profiled["threshold_l1_ppb"], profiled["threshold_l2_ppb"], gauges)
    base = segment_end(task, program, TEXT, initial_state(task, program, None), 0, "", gauges)
    honest = arrays_of(segment_end(task, program, TEXT, base, 1, "", gauges))
    assert distance(arrays_of(base), honest, honest, gauges) == Distance(0, 0, min(honest))
    for fraud in FRAUDS:
        end = arrays_of(segment_end(task, program, TEXT, base, 1, fraud, gauges))
        found = distance(arrays_of(base), honest, end, gauges)
        assert finding(found, tolerance) in ("unsure", "wrong"), f"{fraud}: {found} against {tolerance}"


def tuple_of(gauge: dict[str, Any]) -> tuple[Any, ...]:
    return gauge["name"], gauge["parts"], gauge["at"]


def test_each_segment_ends_with_the_gauges_it_began_with(program: Program, task: TaskSpec) -> None:
    gauges = (Gauge("blocks.0.query_key_value.bias", 3, (1,)),)
    given: dict[str, Any] = {"task": task, "program": program, "arrays": {"text": TEXT}, "base": None}
    results = list(run_segments(**given, segments=range(2), gauges=gauges))
    start = initial_state(task, program, None)
    for result in results:
        bias = checkpoint.load(result.checkpoint)["blocks.0.query_key_value.bias"].reshape(3, -1)
        assert bias[1].equal(start["blocks.0.query_key_value.bias"].reshape(3, -1)[1])
        assert not bias[0].equal(start["blocks.0.query_key_value.bias"].reshape(3, -1)[0])
    assert results[1].in_root == results[0].out_root == checkpoint.state_root(checkpoint.load(results[0].checkpoint))
    alone = list(run_segments(**{**given, "base": results[0].checkpoint}, segments=range(1, 2), gauges=gauges))
    assert alone == results[1:], "a verifier that begins at the checkpoint goes the same way"
    (compared,) = run_segments(**given, segments=range(1), gauges=gauges, compare=results[1].checkpoint)
    ours, theirs = (arrays_of(checkpoint.load(result.checkpoint)) for result in results)
    found = distance(arrays_of(initial_state(task, program, None)), ours, theirs, gauges)
    assert compared.distance == (found.l1_ppb, found.l2_ppb) > (0, 0)
    with pytest.raises(MalformedRecord, match="can go on"):
        list(run_segments(**given, segments=range(1), gauges=gauges, partial=Partial(1, bytes(32), bytes(32))))


async def test_a_sandboxed_profile_finds_the_same_to_the_bit(
    profiled: dict[str, Any], program: Program, task: TaskSpec, tmp_path: Path
) -> None:
    (tmp_path / "program").write_bytes(program.to_bytes())
    (tmp_path / "text").write_bytes(TEXT)
    order = WorkOrder(
        work_id="profile", task=encode(task), program=tmp_path / "program", arrays={"text": tmp_path / "text"},
        base=None, first_segment=0, last_segment=1, threads=1, memory_bytes=2**30, wall_seconds=60,
        checkpoint_bytes_max=2**20,
    )  # fmt: skip
    steps: list[int] = []
    async with Workshop(tmp_path / "scratch") as workshop:
        done = await run_profile(order, task, workshop, lambda step, loss: steps.append(step))
    judged = [one for one in profiled["kernels"] if one["kernels"] != "exact-22"]
    assert [msgspec.to_builtins(one) for one in done.findings.measured] == [
        [one["kernels"], one["l1_ppb"], one["l2_ppb"]] for one in judged
    ]
    assert [gauge.name for gauge in done.findings.gauges] == [gauge["name"] for gauge in profiled["gauges"]]
    assert steps == list(range(ProfileSpec(network=bytes(32), of=task, number=0).steps_run))
    assert done.operations_per_second > 0
    assert not list((tmp_path / "scratch").iterdir()), "no checkpoint is left"
