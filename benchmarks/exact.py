"""What exactness costs: exact against native, as pairs in one run. Prints one JSON line last.

    python benchmarks/exact.py [--threads 1] [--pairs 15] [--steps 7]

matmul_ratio: a 1024 x 2048 x 1024 product at width 15. step_ratio: a training step of a GPT (width 512, 4 layers,
context 256, batch 4, dropout, AdamW) against the same step in eager PyTorch with torch.optim. verify_ratio: a segment
at the default checkpoint interval re-executed by a checker, from the checkpoint's bytes to the compared root,
against the same number of eager steps. memory_ratio: the peak of a process that takes exact steps against one that
takes eager ones, each without what Python and torch hold before. checkpoint_share: root, bytes and file of a checkpoint
against the steps of the default interval. Each pair runs native and exact one after the other, so that a loaded
machine slows both; a ratio is the median of the pairs' ratios. A backend slower than SLOW native products is named and
left out.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from protocol.program import Program, state_layout
from worker import capture, char_gpt, checkpoint, exact
from worker.exact.compiled import has_products
from worker.exact.memory import keep_freed_memory
from worker.exact.products import Products
from worker.executor import Executor

SIZE = (1024, 2048, 1024)
SLOW = 20
INTERVAL = 100  # steps between checkpoints, the default of job.toml
CONTEXT, BATCH = 256, 4


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


def products(pairs: int) -> tuple[dict[str, Any], list[str]]:
    """Ratios by width and backend, and the backends that are left out."""
    generator = torch.Generator().manual_seed(0)
    m, k, n = SIZE
    a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    native = min(seconds(lambda: a @ b) for _ in range(3))
    wanted, left_out = ["auto", "float64"], []
    if has_products():
        wanted.append("int16")
    if exact.int8_is_exact():
        eighth = Products(15, "int8")  # on an eighth of the work, for where it takes minutes
        fast = seconds(lambda: eighth.mm(a[: m // 8], b)) * 8 < SLOW * native
        (wanted if fast else left_out).append("int8")
    found = {}
    for width in (8, 15, 22):
        calls: dict[str, Callable[[], Any]] = {"native": functools.partial(torch.mm, a, b)}
        for backend in wanted:
            if backend != "int16" or width <= 15:
                calls[backend] = functools.partial(Products(width, backend).mm, a, b)
        calls["float64, no helper"] = functools.partial(Products(width, "float64", helper=False).mm, a, b)
        found[str(width)] = paired(calls, pairs)
    return found, left_out


def gpt() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model of the step figures and its optimizer."""
    torch.manual_seed(0)
    model = char_gpt.CharGPT(context=CONTEXT, width=512, heads=8, layers=4, dropout=0.1)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def batch() -> dict[str, Tensor]:
    """One batch of numbers, the same in every process."""
    x = torch.randint(0, char_gpt.SYMBOLS, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(0))
    return {"x": x, "y": x.roll(-1, 1)}


class Eager:
    """The baseline: the user's own loop."""

    def __init__(self) -> None:
        self.model, self.optimizer = gpt()
        self.batch = batch()

    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad(set_to_none=True)
        char_gpt.loss(self.model(self.batch["x"]), self.batch["y"]).backward()
        self.optimizer.step()


class Exact:
    """The same steps through the executor."""

    def __init__(self, program: Program, state: dict[str, Tensor], threads: int, **options: Any) -> None:
        self.executor = Executor(program, "exact", threads=threads, **options)
        self.state, self.batch, self.done = state, batch(), 0

    def step(self) -> None:
        """One training step."""
        self.state, _ = self.executor.step(self.state, self.batch, 1e-3, 7, self.done)
        self.done += 1


def training(program: Program, state: dict[str, Tensor], steps: int, threads: int) -> dict[str, Any]:
    """Everything measured on the GPT's step."""
    runs = {"exact": Exact(program, state, threads), "exact, no helper": Exact(program, state, threads, helper=False)}
    calls = {"native": Eager().step, **{name: run.step for name, run in runs.items()}}
    times = paired(calls, steps)
    roots = {checkpoint.state_root(run.state) for run in runs.values()}
    assert len(roots) == 1, "the helper moved a bit"
    data = checkpoint.dump(state)
    loading = statistics.median(seconds(lambda: checkpoint.load(data, state_layout(program))) for _ in range(3))
    rooting = statistics.median(seconds(lambda: checkpoint.state_root(state)) for _ in range(3))
    with tempfile.NamedTemporaryFile() as file:

        def write() -> None:
            file.seek(0)
            file.write(checkpoint.dump(state))
            file.flush()
            os.fsync(file.fileno())

        writing = statistics.median(seconds(write) for _ in range(3))
    native, own = times["native"]["ms"] / 1e3, times["exact"]["ms"] / 1e3
    ratio = times["exact"]["ratio"]
    return {
        "step_ratio": ratio,
        "step_ratio_no_helper": times["exact, no helper"]["ratio"],
        "verify_ratio": round(ratio + (loading + rooting) / (INTERVAL * native), 3),
        "checkpoint_share": round((rooting + writing) / (INTERVAL * own), 4),
        "checkpoint_bytes": len(data),
        "root_ms": round(rooting * 1e3, 1),
        "dump_and_write_ms": round(writing * 1e3, 1),
        "step": times,
        "step_spent": by_operation(program, runs["exact"]),
    }


def by_operation(program: Program, run: Exact) -> list[dict[str, Any]]:
    """Milliseconds of one exact step by operation, the twelve largest, clocked between nodes."""
    spent: dict[str, float] = {}
    last = time.perf_counter()

    def on_node(number: int, _: Tensor) -> None:
        nonlocal last
        now = time.perf_counter()
        op = program.nodes[number].op
        spent[op] = spent.get(op, 0.0) + now - last
        last = now

    for step in range(3):
        last = time.perf_counter()
        run.executor.step(run.state, run.batch, 1e-3, 7, step, on_node=on_node)
    totals = sorted(spent.items(), key=lambda item: -item[1])
    return [{"op": op, "ms": round(total / 3 * 1e3, 2)} for op, total in totals[:12]]


def peak_of(kind: str, folder: Path) -> float:
    """MiB that three steps add to a fresh process: peak, less what Python and torch held before."""
    command = [sys.executable, __file__, "--alone", kind, "--folder", str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(said.splitlines()[-1])


def high_water() -> int:
    """The most memory this process ever held, KiB. Not getrusage's figure, which begins with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def alone(kind: str, folder: Path) -> None:
    """In a process of its own: three steps, and the memory they took."""
    torch.set_num_threads(1)
    torch.ones(64, 64) @ torch.ones(64, 64)
    before = high_water()
    if kind == "native":
        run: Eager | Exact = Eager()
    else:
        program = Program.from_bytes((folder / "program").read_bytes())
        with (folder / "state").open("rb") as file:  # as a worker reads it: without a second copy
            run = Exact(program, checkpoint.load(memoryview(file.read()), state_layout(program)), 1)
    for _ in range(3):
        run.step()
    print((high_water() - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--alone", choices=["native", "exact"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        alone(options.alone, options.folder)
        return
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    matmul, left_out = products(options.pairs)
    model, optimizer = gpt()
    captured = capture.capture(model, char_gpt.loss, optimizer, batch())
    step = training(captured.program, captured.initial_state, options.steps, options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "program").write_bytes(captured.program.to_bytes())
        (folder / "state").write_bytes(checkpoint.dump(captured.initial_state))
        peaks = {kind: peak_of(kind, folder) for kind in ("native", "exact")}
    machine = {
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "torch": torch.__version__,
        "helper": has_products(),
        "int8_exact": exact.int8_is_exact(),
        "int8_faster": exact.int8_is_faster(),
    }
    found = {
        "benchmark": "exact",
        "machine": machine,
        "matmul_size": SIZE,
        "matmul_ratio": matmul["15"]["auto"]["ratio"],
        **step,
        "memory_ratio": round(peaks["exact"] / peaks["native"], 3),
        "memory_mib": {kind: round(peak, 1) for kind, peak in peaks.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "nodes": len(captured.program.nodes),
        "matmul_by_width": matmul,
        "too_slow_here": left_out,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
