"""Honest noise against fraud in tolerant mode (DESIGN §5.2). One JSON line last.

    python benchmarks/profiling.py [--steps 20] [--json]

A character GPT of two blocks trained by AdamW, with a key bias, which is a gauge parameter. Its first two segments are
profiled as `ichiba profile` does, once with a warmup of the learning rate and once without; then the second segment is
done by each fraud, and told as a multiple of the threshold, with the gauge mask and without.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from protocol.codec import encode
from protocol.profile import Gauge, Tolerance, distance, finding, put_back, refuse_tolerance, tolerance_of
from protocol.profile import ToleranceRefused as Refused
from protocol.program import Program, operations_per_step, program_id
from protocol.task import ArrayRef, BatchRule, Initial, Schedule, TaskSpec
from worker import char_gpt
from worker.capture import Training, capture_built
from worker.executor import Executor, Kernel
from worker.profiling import profile_task
from worker.training import Batches, initial_state, rate_of

State = dict[str, Tensor]
FRAUDS: Final = ("lr x 1.0001", "tf32", "bf16", "wrong label", "batch 7 of 8", "other data", "stale")


def small_gpt(*, blocks: int = 2, width: int = 64, context: int = 32, dropout: float = 0.05) -> Training:
    """A character GPT with the key bias that the demonstration's leaves out."""
    model = char_gpt.CharGPT(context=context, width=width, heads=4, layers=blocks, dropout=dropout)
    for block in model.blocks:
        assert isinstance(block, char_gpt.Block)
        block.query_key_value = nn.Linear(width, 3 * width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    example = torch.zeros(8, context, dtype=torch.int64)
    return Training(model, char_gpt.loss, optimizer, {"x": example, "y": example.clone()})


def task_of(program: bytes, text: bytes, *, context: int, steps: int, segments: int, warmup: int) -> TaskSpec:
    """A tolerant task of so many segments of `steps` steps."""
    decoded = Program.from_bytes(program)
    rate = Schedule("warmup-cosine", 10**6, 10**5, warmup) if warmup else Schedule("constant", 10**6, 0, 0)
    return TaskSpec(
        network=bytes(32), program=program_id(program), program_bytes=len(program),
        arrays=(ArrayRef("text", "uint8", (len(text),), bytes(32), len(text)),),
        batch=BatchRule("windows", 8, context), initial=Initial("seed", bytes(32), bytes(32)), seed=3,
        steps=steps * segments, steps_per_segment=steps, mode="tolerant", width=15, schedule=rate,
        operations_per_step=operations_per_step(decoded), name="profiling",
    )  # fmt: skip


def tf32(x: Tensor) -> Tensor:
    """float32 with the mantissa rounded to 10 bits, as tensor cores read it."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class _Lossy(Executor):
    """An executor whose products read rounded operands."""

    def __init__(self, program: Program, rounded: Callable[[Tensor], Tensor]) -> None:
        self._rounded = rounded
        super().__init__(program, "native")

    def _planned(self, kernels: Mapping[str, Kernel]) -> Any:
        rounded = self._rounded

        def lossy(kernel: Kernel) -> Kernel:
            return lambda a, b: kernel(rounded(a), rounded(b))

        return super()._planned({k: lossy(v) if k in ("mm.default", "bmm.default") else v for k, v in kernels.items()})


def executor_of(program: Program, fraud: str) -> Executor:
    """What computes the steps of a fraud, or of honest work."""
    if fraud == "tf32":
        return _Lossy(program, tf32)
    if fraud == "bf16":
        return _Lossy(program, lambda x: x.bfloat16().float())
    return Executor(program, "native")


def segment_end(
    task: TaskSpec, program: Program, text: bytes, start: State, segment: int, fraud: str, gauges: Sequence[Gauge] = ()
) -> State:
    """The end of `segment` as `fraud` ("" for none) hands it in: with the gauge parts put back, as everybody's are."""
    executor, batches, state = executor_of(program, fraud), Batches(task, program, {"text": text}), dict(start)
    steps = task.steps_of(segment)
    for step in () if fraud == "stale" else steps:
        batch = batches.of(step, seed=task.seed ^ 5 if fraud == "other data" else None)
        if fraud == "wrong label" and step == steps.start:
            batch["y"][0, 0] = (batch["y"][0, 0] + 1) % char_gpt.SYMBOLS
        if fraud == "batch 7 of 8":
            batch = {name: torch.cat([x[:-1], x[:1]]) for name, x in batch.items()}
        rate = rate_of(task, step) * (1.0001 if fraud == "lr x 1.0001" else 1)
        state, _ = executor.step(state, batch, rate, task.seed, step)
    return state | {k: torch.from_numpy(v) for k, v in put_back(arrays_of(start), arrays_of(state), gauges).items()}


def arrays_of(state: State) -> dict[str, NDArray[np.generic]]:
    """As protocol/profile.py reads a state."""
    return {name: tensor.numpy() for name, tensor in state.items()}


def against(task: TaskSpec, program: Program, text: bytes, start: State, tolerance: Tolerance) -> dict[str, Any]:
    """Each fraud in the second segment: its distance, and how often that is the threshold."""
    bare = tolerance.gauges and Tolerance(tolerance.l1_ppb, tolerance.l2_ppb, ())
    found: dict[str, Any] = {}
    base = segment_end(task, program, text, start, 0, "", tolerance.gauges)
    honest = arrays_of(segment_end(task, program, text, base, 1, "", tolerance.gauges))
    for fraud in FRAUDS:
        end = arrays_of(segment_end(task, program, text, base, 1, fraud, tolerance.gauges))
        apart = distance(arrays_of(base), honest, end, tolerance.gauges)
        found[fraud] = {
            "l1_ppb": apart.l1_ppb, "l2_ppb": apart.l2_ppb, "finding": finding(apart, tolerance),
            "thresholds": round(max(apart.l1_ppb / tolerance.l1_ppb, apart.l2_ppb / tolerance.l2_ppb), 1),
        }  # fmt: skip
        if bare:
            raw_honest = arrays_of(segment_end(task, program, text, base, 1, ""))
            raw = arrays_of(segment_end(task, program, text, base, 1, fraud))
            found[fraud]["unmasked_l1_ppb"] = distance(arrays_of(base), raw_honest, raw, ()).l1_ppb
    return found


def main() -> None:
    """Profile, cheat, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of a segment")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    options = parser.parse_args()
    text, program = char_gpt.corpus(), capture_built(small_gpt).program
    told: dict[str, Any] = {"steps": options.steps, "nodes": len(program.nodes)}
    for name, warmup in (("plain", 0), ("warmup", options.steps)):
        task = task_of(program.to_bytes(), text, context=32, steps=options.steps, segments=10, warmup=warmup)
        TaskSpec.from_bytes(encode(task), network=bytes(32))
        with tempfile.TemporaryDirectory() as folder:
            profiled = profile_task(task, program.to_bytes(), {"text": text}, None, Path(folder))
        assert profiled.findings is not None
        tolerance = tolerance_of(profiled.findings)
        unmasked = tolerance_of(profiled.findings.__class__(
            profiled.findings.unmasked, profiled.findings.unmasked, (), profiled.findings.other_seed_ppb
        ))  # fmt: skip
        refused = ""
        try:
            refuse_tolerance(tolerance, task.segments)
        except Refused as error:
            refused = error.what
        told[name] = {
            "threshold_l1_ppb": tolerance.l1_ppb, "threshold_l2_ppb": tolerance.l2_ppb,
            "unmasked_threshold_l1_ppb": unmasked.l1_ppb, "refused": refused,
            "gauges": [f"{g.name} {g.at} of {g.parts}" for g in tolerance.gauges],
            "honest": {m.kernels: [m.l1_ppb, m.l2_ppb] for m in profiled.findings.measured},
            "other_seed_ppb": profiled.findings.other_seed_ppb,
            "frauds": against(task, program, text, initial_state(task, program, None), tolerance),
        }  # fmt: skip
        if not options.json:
            print(name, json.dumps(told[name], indent=1))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
