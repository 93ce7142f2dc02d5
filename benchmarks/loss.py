"""Whether exact arithmetic learns as well as float32: 1,000 steps of two models at each width. One JSON line last.

    pip install 'ichiba[benchmarks]'; python benchmarks/loss.py [--steps 1000] [--svg docs/loss.svg]

text: the demonstration's character GPT on the Python language reference. digits: a small convolutional network on
scikit-learn's 8 x 8 handwritten digits. Native float32 (torch's own kernels, through the same executor) and widths
8, 15 and 22 take the same batches and the same random numbers, so their losses differ by arithmetic alone. The
figure is the mean loss of the last tenth of the steps, and its ratio to native's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from torch import nn

from protocol.codec import encode
from protocol.program import operations_per_step, program_id
from protocol.task import ArrayRef, BatchRule, Initial, Schedule, TaskSpec
from worker import char_gpt
from worker.capture import Captured, Training, capture_built
from worker.training import run_segments

NETWORK, NOWHERE = bytes(32), bytes(32)
RUNS: dict[str, tuple[Literal["exact", "tolerant"], Literal[8, 15, 22]]] = {
    "native": ("tolerant", 15),
    "width 8": ("exact", 8),
    "width 15": ("exact", 15),
    "width 22": ("exact", 22),
}
COLOURS = {"native": "#444444", "width 8": "#d08a1d", "width 15": "#1d6fd0", "width 22": "#2a9d5c"}


def digits() -> tuple[Training, dict[str, np.ndarray[Any, Any]]]:
    """The network and its data: x float32 (1797, 1, 8, 8) in [0, 1], y uint8."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    found = load_digits()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    example = {"x": torch.zeros(32, 1, 8, 8), "y": torch.zeros(32, dtype=torch.int64)}
    images = (found.images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    data = {"x": images, "y": found.target.astype(np.uint8)}
    return Training(model, nn.functional.cross_entropy, optimizer, example), data


def task_of(
    name: str,
    captured: Captured,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    batch: BatchRule,
    schedule: Schedule,
    steps: int,
) -> TaskSpec:
    """The task that trains `captured`; its blobs have no ids, for nothing travels."""
    program = captured.program.to_bytes()
    return TaskSpec(
        network=NETWORK,
        program=program_id(program),
        program_bytes=len(program),
        arrays=tuple(
            ArrayRef(name, array.dtype.name, array.shape, NOWHERE, array.nbytes)  # type: ignore[arg-type]
            for name, array in sorted(arrays.items())
        ),
        batch=batch,
        initial=Initial("seed", NOWHERE, NOWHERE),
        seed=3,
        steps=steps,
        steps_per_segment=min(steps, 100),
        mode="exact",
        width=15,
        schedule=schedule,
        operations_per_step=operations_per_step(captured.program),
        name=name,
    )


def curve(captured: Captured, task: TaskSpec, arrays: Mapping[str, np.ndarray[Any, Any]]) -> tuple[list[float], float]:
    """The loss of each step, and the seconds they took."""
    losses: list[float] = []
    start = time.perf_counter()
    data = {name: memoryview(np.ascontiguousarray(array)).cast("B") for name, array in arrays.items()}
    for _ in run_segments(
        task=task, program=captured.program, arrays=data, base=None, segments=range(task.segments),
        on_step=lambda step, loss: losses.append(loss),
    ):  # fmt: skip
        pass
    return losses, time.perf_counter() - start


def compared(captured: Captured, task: TaskSpec, arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Each run's curve, the mean of its last tenth, and that against native's."""
    found: dict[str, Any] = {}
    for name, (mode, width) in RUNS.items():
        changed = TaskSpec.from_bytes(_encoded(task, mode=mode, width=width), network=NETWORK)
        losses, seconds = curve(captured, changed, arrays)
        last = statistics.fmean(losses[-max(1, len(losses) // 10) :])
        found[name] = {"losses": losses, "last": last, "seconds": round(seconds, 1)}
        print(f"{task.name}: {name}: first {losses[0]:.4f}, last {last:.4f}, {seconds:.0f} s", flush=True)
    for run in found.values():
        run["ratio"] = run["last"] / found["native"]["last"]
    return found


def _encoded(task: TaskSpec, **changes: Any) -> bytes:
    return encode(msgspec.structs.replace(task, **changes))


def told(run: Mapping[str, Any]) -> dict[str, float]:
    """What the JSON line says of one run."""
    return {"last": round(run["last"], 5), "ratio": round(run["ratio"], 5), "seconds": run["seconds"]}


def smooth(losses: list[float], over: int) -> list[float]:
    """Means of `over` steps in a row."""
    return [statistics.fmean(losses[at : at + over]) for at in range(0, len(losses), over)]


def drawn(results: Mapping[str, Mapping[str, Any]], over: int) -> str:
    """Both comparisons as one SVG picture: a panel a model, a line a run."""
    wide, high, left, top = 420, 260, 50, 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * (wide + left) + 30}" height="{high + 100}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for panel, (title, runs) in enumerate(results.items()):
        x0 = left + panel * (wide + left + 10)
        curves = {name: smooth(run["losses"], over) for name, run in runs.items()}
        most = max(max(points) for points in curves.values())
        words = f"{title}: training loss (means of {over} steps)"
        parts.append(f'<text x="{x0}" y="{top - 14}" font-size="14">{words}</text>')
        for tick in range(5):
            y = top + high - high * tick / 4
            parts.append(f'<line x1="{x0}" x2="{x0 + wide}" y1="{y}" y2="{y}" stroke="#dddddd"/>')
            parts.append(f'<text x="{x0 - 6}" y="{y + 4}" text-anchor="end">{most * tick / 4:.2f}</text>')
        for row, (name, points) in enumerate(curves.items()):
            step = wide / max(1, len(points) - 1)
            path = " ".join(f"{x0 + i * step:.1f},{top + high * (1 - p / most):.1f}" for i, p in enumerate(points))
            dash = ' stroke-dasharray="5 4"' if name == "native" else ""
            parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="1.6"{dash}/>')
            words = f"{name}: {runs[name]['last']:.4f} ({(runs[name]['ratio'] - 1) * 100:+.2f} %)"
            parts.append(f'<text x="{x0 + 190}" y="{top + 20 + 17 * row}" fill="{COLOURS[name]}">{words}</text>')
        steps = len(next(iter(runs.values()))["losses"])
        parts.append(f'<text x="{x0}" y="{top + high + 20}">0</text>')
        parts.append(f'<text x="{x0 + wide}" y="{top + high + 20}" text-anchor="end">step {steps}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--svg", type=Path, help="draw the curves into this file")
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}

    captured = capture_built(lambda: digits()[0])
    arrays: dict[str, np.ndarray[Any, Any]] = digits()[1]
    schedule = Schedule("warmup-cosine", 50_000_000, 5_000_000, 20)
    task = task_of("digits", captured, arrays, BatchRule("rows", 32, 0), schedule, options.steps)
    results["digits"] = compared(captured, task, arrays)

    captured = capture_built(char_gpt.build)
    arrays = {"text": np.frombuffer(char_gpt.corpus(), dtype=np.uint8)}
    batch = BatchRule("windows", char_gpt.BATCH, char_gpt.CONTEXT)
    schedule = Schedule("warmup-cosine", 1_000_000, 100_000, 20)
    results["text"] = compared(captured, task_of("text", captured, arrays, batch, schedule, options.steps), arrays)

    if options.svg:
        options.svg.write_text(drawn(results, max(1, options.steps // 50)))
    print(
        json.dumps(
            {
                "benchmark": "loss",
                "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
                "steps": options.steps,
                "baseline": "native float32, the same batches and random numbers",
                **{model: {name: told(run) for name, run in runs.items()} for model, runs in results.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
