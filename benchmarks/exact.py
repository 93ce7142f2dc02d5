"""What exactness costs: exact against native, as pairs in one run. Prints one JSON line last.

    python benchmarks/exact.py [--threads 1] [--pairs 15]

matmul_ratio: a 1024 x 2048 x 1024 product. step_ratio: a training step of worker/char_gpt.py through the executor.
Each pair runs native and exact one after the other, so that a loaded machine slows both; the ratio is the median of
the pairs' ratios. The rows named by a backend force it: all backends give the same bits.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from worker import checkpoint, exact
from worker.capture import capture_built
from worker.char_gpt import BATCH, CONTEXT, SYMBOLS, build
from worker.exact.memory import keep_freed_memory
from worker.exact.products import Products
from worker.executor import Executor

SIZE = (1024, 2048, 1024)


def processor() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def paired(calls: dict[str, Callable[[], Any]], pairs: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each call, and of its ratio to the call named `native` of the same round."""
    for call in calls.values():
        call()
    rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(pairs)]
    return {
        name: {
            "ms": round(statistics.median(r[name] for r in rounds) * 1e3, 3),
            "ratio": round(statistics.median(r[name] / r["native"] for r in rounds), 3),
        }
        for name in calls
    }


def backends() -> list[str]:
    return ["auto", "float64", *(["int8"] if exact.int8_is_exact() else [])]


def products(pairs: int) -> dict[str, dict[str, dict[str, float]]]:
    """A large product, at each width."""
    rows, inner, columns = SIZE
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    found = {}
    for width in (8, 15, 22):
        calls: dict[str, Callable[[], Any]] = {"native": functools.partial(torch.mm, a, b)}
        for backend in backends():
            calls[backend] = functools.partial(Products(width, backend).mm, a, b)
        found[str(width)] = paired(calls, pairs)
    return found


def training_step(pairs: int, threads: int) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """A step of the demonstration model, and the operations that the exact one spends most time in."""
    torch.manual_seed(0)
    captured = capture_built(build)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, SYMBOLS, (BATCH, CONTEXT), generator=generator)
    batch = {"x": x, "y": x.roll(-1, 1)}
    executors = {"native": Executor(captured.program, "native", threads=threads)}
    for backend in backends():
        executors[backend] = Executor(captured.program, "exact", threads=threads, backend=backend)
    states = dict.fromkeys(executors, captured.initial_state)
    done = dict.fromkeys(executors, 0)

    def one(name: str) -> None:
        states[name], _ = executors[name].step(states[name], batch, 1e-3, 7, done[name])
        done[name] += 1

    times = paired({name: functools.partial(one, name) for name in executors}, pairs)
    roots = {checkpoint.state_root(states[name]) for name in backends()}
    assert len(roots) == 1, "backends gave different states"
    return times, [{"op": op, "ms": ms} for op, ms in by_operation(captured, executors["auto"], batch)]


def by_operation(captured: Any, executor: Executor, batch: dict[str, torch.Tensor]) -> list[tuple[str, float]]:
    """Milliseconds of one exact step by operation, the ten largest, clocked between nodes."""
    spent: dict[str, list[float]] = {}
    last = [time.perf_counter()]

    def on_node(number: int, _: torch.Tensor) -> None:
        now = time.perf_counter()
        spent.setdefault(captured.program.nodes[number].op, []).append(now - last[0])
        last[0] = now

    for step in range(3):
        last[0] = time.perf_counter()
        executor.step(captured.initial_state, batch, 1e-3, 7, step, on_node=on_node)
    totals = [(op, round(sum(values) / 3 * 1e3, 3)) for op, values in spent.items()]
    return sorted(totals, key=lambda item: -item[1])[:10]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    matmul = products(options.pairs)
    step, spent = training_step(options.pairs, options.threads)
    state = {str(i): torch.randn(1024, 1024) for i in range(3)}
    root_ms = statistics.median(seconds(lambda: checkpoint.state_root(state)) for _ in range(options.pairs)) * 1e3
    print(
        json.dumps(
            {
                "benchmark": "exact",
                "machine": {
                    "processor": processor(),
                    "capability": torch.backends.cpu.get_cpu_capability(),
                    "cores": os.cpu_count(),
                    "threads": options.threads,
                    "torch": torch.__version__,
                    "int8_exact": exact.int8_is_exact(),
                    "int8_faster": exact.int8_is_faster(),
                },
                "matmul_size": SIZE,
                "matmul_ratio": matmul["15"]["auto"]["ratio"],
                "matmul_ratio_float64": matmul["15"]["float64"]["ratio"],
                "step_ratio": step["auto"]["ratio"],
                "step_ratio_float64": step["float64"]["ratio"],
                "matmul_by_width": matmul,
                "step": step,
                "step_spent": spent,
                "state_root_12MB_ms": round(root_ms, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
