"""The published vectors: 150 exact steps of every example model, as state roots that any machine can check.

    python -m tests.vectors.make check [--threads N] [--backend B] [--plain] [--steps N] [--models A,B]
        compare this machine, in all models or in those named
    python -m tests.vectors.make write                                  make them again

`vectors.json` has, for each model, the Program's id, the root of the first state, the root after some steps and the
last losses as float32 bits; `NAME.program.gz` is the Program, for an implementation that captures nothing. The
first state, batches and rates are those of tests/models.py. docs/exact.md says what each operation computes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from protocol.program import Program, program_id
from tests import models
from worker import checkpoint
from worker.executor import Executor

__all__ = ["FOLDER", "STEPS", "published", "run"]

FOLDER = Path(__file__).resolve().parent
STEPS = 150
_TOLD = (1, 2, 15, 50, 100, STEPS)  # of the steps: a public bit-reproducible run forked at its step 15 (NOTES)
_SEED = 7


def run(
    name: str, *, threads: int = 1, backend: str = "auto", helper: bool = True, steps: int = STEPS
) -> dict[str, Any]:
    """What `vectors.json` holds of one model, computed here from the published Program; of its first `steps` only."""
    program = Program.from_bytes(gzip.decompress((FOLDER / f"{name}.program.gz").read_bytes()))
    executor = Executor(program, "exact", threads=threads, backend=backend, helper=helper)
    state, rate = models.state_of(program), models.rate_of(name)
    roots, losses = {"0": checkpoint.state_root(state).hex()}, []
    for step in range(steps):
        state, loss = executor.step(state, models.batch_of(name, step), rate, _SEED, step)
        losses.append(loss)
        if step + 1 in _TOLD:
            roots[str(step + 1)] = checkpoint.state_root(state).hex()
    return {
        "program": program_id(program.to_bytes()).hex(),
        "roots": roots,
        "first_loss": round(losses[0], 4),
        "last_losses": [struct.pack(">f", loss).hex() for loss in losses[-3:]],
    }


def published() -> dict[str, Any]:
    """The vectors."""
    found: dict[str, Any] = json.loads((FOLDER / "vectors.json").read_text())
    return found


def write() -> None:
    """Capture every model again, and make its Program and vectors."""
    for name in models.MODELS:
        # Without a time inside, so that the same Program is the same file.
        data = gzip.compress(models.captured(name).program.to_bytes(), mtime=0)
        (FOLDER / f"{name}.program.gz").write_bytes(data)
    found = {"width": 15, "seed": _SEED, "steps": STEPS, "models": {name: run(name) for name in models.MODELS}}
    (FOLDER / "vectors.json").write_text(json.dumps(found, indent=1) + "\n")


def differing(names: list[str], threads: int, backend: str, helper: bool, steps: int) -> Iterator[str]:
    """Those of the models whose vectors this machine does not give. steps: one of those whose root is told."""
    vectors = published()["models"]
    for name in names:
        expected = vectors[name]
        found = run(name, threads=threads, backend=backend, helper=helper, steps=steps)
        told = {step: root for step, root in expected["roots"].items() if int(step) <= steps}
        first = next((step for step, root in told.items() if found["roots"][step] != root), None)
        if first is not None:
            yield f"{name} differs at step {first} or before"
        elif steps == STEPS and found != expected:
            yield f"{name} has the same states and other losses"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "write"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--plain", action="store_true", help="without the compiled helper")
    parser.add_argument("--steps", type=int, default=STEPS, choices=_TOLD)
    parser.add_argument("--models", default=",".join(models.MODELS))
    options = parser.parse_args()
    if options.what == "write":
        write()
        return
    torch.set_num_threads(options.threads)
    names = options.models.split(",")
    wrong = list(differing(names, options.threads, options.backend, not options.plain, options.steps))
    capability = torch.backends.cpu.get_cpu_capability()
    print(json.dumps({"capability": capability, "threads": torch.get_num_threads(), "wrong": wrong}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
