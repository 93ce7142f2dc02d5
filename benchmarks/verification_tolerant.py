"""The part `tolerant` of benchmarks/verification.py: verdicts by distance, on real floats.

A character GPT of two blocks with AdamW (benchmarks/profiling.py) is profiled as verifiers do, and its thresholds and
gauges follow. Then it is trained --tasks times, with other data each time, by solvers under each of the four judging
kernel configurations, and every segment is re-executed under the three others from the solver's own checkpoint, by the
code that the market's checkers run. None of these verdicts may be "wrong". One solver then commits each fraud of
worker/cheats.py, and, as a sweep, trains with a learning rate that is off by a share of the threshold: how far each
lies is told in thresholds, of all false segments the nearest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import msgspec
from profiling import small_gpt, task_of
from verification_overhead import Part

from protocol.codec import decode, encode
from protocol.profile import KERNELS, Distance, Tolerance, finding, refuse_tolerance, tolerance_of
from protocol.program import Program
from protocol.task import TaskSpec
from worker import char_gpt
from worker.capture import capture_built
from worker.cheats import CHEATS
from worker.profiling import profile_task

__all__ = ["add_options", "measure"]

JUDGES: Final = tuple(kernels for kernels in KERNELS if kernels.judges)
SOLVER, CHECKER = JUDGES[0].name, JUDGES[2].name  # of the frauds: two instruction sets, two BLAS paths
SWEEP: Final = (0.25, 0.5, 1, 2, 5, 10, 20)  # of the threshold: by how much a learning rate is off
CONTEXT: Final = 32
FRAUD_SEGMENTS: Final = 4  # an extrapolation needs two honest ones before it


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--tasks", type=int, default=3, help="tolerant tasks to train under each kernel configuration")
    parser.add_argument("--tolerant-segments", type=int, default=10, help="segments of each")
    parser.add_argument("--tolerant-steps", type=int, default=20, help="steps of a segment")


def measure(options: argparse.Namespace) -> Part:
    """Profile, train, cheat, judge."""
    text, program = char_gpt.corpus(), capture_built(small_gpt).program.to_bytes()
    steps, segments = options.tolerant_steps, options.tolerant_segments
    task = task_of(program, text, context=CONTEXT, steps=steps, segments=segments, warmup=steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "profile").mkdir()
        profiled = profile_task(task, program, {"text": text}, None, folder / "profile")
        assert profiled.findings is not None
        tolerance = tolerance_of(profiled.findings)
        refuse_tolerance(tolerance, segments)
        (folder / "program").write_bytes(program)
        (folder / "gauges").write_bytes(encode(tolerance.gauges))
        honest = _honest(folder, task, options.tasks)
        frauds = _frauds(folder, task, tolerance)
    told = [finding(distance, tolerance) for distance in honest]
    worst = max(_thresholds(distance, tolerance) for distance in honest)
    seen = {name: [finding(d, tolerance) for d in found] for name, found in frauds.items()}
    near = {name: min(_thresholds(d, tolerance) for d in found) for name, found in frauds.items()}
    # An unsure verdict is decided by the threshold alone: above it, so wrong.
    missed = [name for name in CHEATS if "right" in seen[name]]
    details = {
        "threshold_l1_ppb": tolerance.l1_ppb, "threshold_l2_ppb": tolerance.l2_ppb,
        "gauges": [f"{g.name} {list(g.at)} of {g.parts}" for g in tolerance.gauges],
        "honest_verdicts": len(honest), "honest_wrong": told.count("wrong"), "honest_unsure": told.count("unsure"),
        "honest_worst_thresholds": round(worst, 2),
        "frauds_thresholds": {name: round(near[name], 1) for name in CHEATS},
        "frauds_missed": missed, "frauds_unsure": [name for name in CHEATS if "unsure" in seen[name]],
        "rate_sweep": {name: [round(near[name], 2), *sorted(set(seen[name]))] for name in seen if name not in CHEATS},
    }  # fmt: skip
    return Part(
        headline={},
        details=details,
        lines=[
            f"{len(honest)} honest tolerant segments under other kernels: {told.count('wrong')} found wrong, "
            f"{told.count('unsure')} unsure, the farthest at {worst:.2f} thresholds",
            f"{len(CHEATS)} frauds: {len(missed)} missed; the nearest, {min(CHEATS, key=near.__getitem__)}, at "
            f"{min(near[name] for name in CHEATS):.0f} thresholds",
        ],
    )


def _thresholds(distance: Distance, tolerance: Tolerance) -> float:
    return max(distance.l1_ppb / tolerance.l1_ppb, distance.l2_ppb / tolerance.l2_ppb)


def _honest(folder: Path, task: TaskSpec, tasks: int) -> list[Distance]:
    """Each segment of each solver, by each checker with other kernels."""
    found: list[Distance] = []
    for number in range(tasks):
        seeded = msgspec.structs.replace(task, seed=task.seed + number)
        for kernels in JUDGES:
            _child(folder, kernels.name, "solve", seeded, task.segments, [["", 0.0]])
        for kernels in JUDGES:
            others = [[one.name, 0.0] for one in JUDGES if one is not kernels]
            found += _child(folder, kernels.name, "check", seeded, task.segments, others)
    return found


def _frauds(folder: Path, task: TaskSpec, tolerance: Tolerance) -> dict[str, list[Distance]]:
    """The false segments of each fraud, by one checker: all but the first, and of an extrapolation but two."""
    wanted = [[name, 0.0] for name in CHEATS]
    wanted += [[f"rate x (1 + {share:g} thresholds)", share * tolerance.l1_ppb / 1e9] for share in SWEEP]
    _child(folder, SOLVER, "solve", task, FRAUD_SEGMENTS, wanted)
    distances = _child(folder, CHECKER, "check", task, FRAUD_SEGMENTS, wanted)
    ends = {str(name): distances[at * FRAUD_SEGMENTS :][:FRAUD_SEGMENTS] for at, (name, _) in enumerate(wanted)}
    return {name: found[_first_false(name) :] for name, found in ends.items()}


def _first_false(cheat: str) -> int:
    return {"extrapolated-checkpoint": 2, "copied-proof": 0}.get(cheat, 1)


def _child(
    folder: Path, kernels: str, what: str, task: TaskSpec, segments: int, runs: list[list[Any]]
) -> list[Distance]:
    """Solve or check in a process of its own, where torch and its libraries choose their code by the kernels."""
    chosen = next(one for one in KERNELS if one.name == kernels)
    own = {key: value for key, value in os.environ.items() if key not in ("ATEN_CPU_CAPABILITY", "MKL_CBWR")}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(chosen.threads))
    root = Path(__file__).resolve().parent.parent
    order = json.dumps({"task": encode(task).hex(), "segments": segments, "runs": runs})
    done = subprocess.run(
        [sys.executable, __file__, str(folder), kernels, what],
        env=own | threads | dict(chosen.environment) | {"PYTHONPATH": str(root)},
        input=order, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{what} under {kernels} failed: {done.stderr[-2000:]}")
    return [Distance(*pair, "") for pair in json.loads(done.stdout)]


def _run(folder: Path, kernels: str, what: str) -> None:
    """Inside the process: a chain of segments for each run, or the distance of each end of a chain from one's own."""
    from protocol.profile import Gauge
    from worker import frauds
    from worker.training import run_segments

    order = json.loads(sys.stdin.read())
    task = decode(TaskSpec, bytes.fromhex(order["task"]), bytes_max=2**20)
    gauges = decode(tuple[Gauge, ...], (folder / "gauges").read_bytes(), bytes_max=2**20)
    about: dict[str, Any] = {
        "task": task, "program": Program.from_bytes((folder / "program").read_bytes()),
        "arrays": {"text": char_gpt.corpus()}, "gauges": gauges,
        "threads": next(one for one in KERNELS if one.name == kernels).threads,
    }  # fmt: skip
    found = []
    for name, error in order["runs"]:
        chain = name or kernels
        if what == "solve":
            frauds.RATE_ERROR = error or 1e-4
            cheat = None if not name else name if name in CHEATS else "wrong-rate"
            for result in run_segments(**about, base=None, segments=range(order["segments"]), cheat=cheat):
                (folder / f"{chain}-{result.segment}").write_bytes(result.checkpoint)
            continue
        for segment in range(order["segments"]):
            base = (folder / f"{chain}-{segment - 1}").read_bytes() if segment else None
            claimed = (folder / f"{chain}-{segment}").read_bytes()
            (result,) = run_segments(**about, base=base, segments=range(segment, segment + 1), compare=claimed)
            found.append(result.distance)
    print(json.dumps(found))


if __name__ == "__main__":
    _run(Path(sys.argv[1]), *sys.argv[2:])
