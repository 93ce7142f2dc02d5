"""Runs the configurations of a profile, each in a process of its own, and hands their ends to protocol/profile.py.

A process of its own, because torch, MKL and oneDNN choose their code when they start. Every run takes whole segments
of the task from the same states, with the same seed and data; one more takes the first with another seed.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from numpy.typing import NDArray

from protocol import params, safetensors
from protocol.codec import decode, encode
from protocol.errors import IchibaError, LocalProtocolError
from protocol.profile import KERNELS, Findings, Kernels, assess
from protocol.profile_task import seeds_of, segments_of
from protocol.program import Program, longest_product, state_layout
from protocol.task import Initial, TaskSpec

__all__ = ["Profiled", "ProfilingFailed", "compare_ends", "profile_task"]

_ROOT: Final = Path(__file__).resolve().parent.parent
_STATE_VARIABLES: Final = ("ATEN_CPU_CAPABILITY", "MKL_CBWR")


class ProfilingFailed(IchibaError):
    """A configuration did not run."""

    code = "profiling-failed"


@dataclass(frozen=True)
class Profiled:
    """findings: None of an exact task. operations_per_second: of the first configuration, or of exact kernels."""

    findings: Findings | None
    operations_per_second: int


def profile_task(
    task: TaskSpec,
    program: bytes,
    arrays: Mapping[str, bytes | memoryview],
    base: bytes | None,
    folder: Path,
    progress: Callable[[str], None] = lambda stage: None,
) -> Profiled:
    """Profile a task on this machine, in processes without a sandbox: for the submitter's own.

    folder: empty; holds some checkpoints for each configuration until the caller removes it. Takes as long as eleven
    segments. Raises ProfilingFailed with the end of what the process said.
    """
    (folder / "task").write_bytes(encode(task))
    (folder / "program").write_bytes(program)
    for index, ref in enumerate(task.arrays):
        (folder / f"array-{index}").write_bytes(arrays[ref.name])
    if base is not None:
        (folder / "base").write_bytes(base)
    chosen = [k for k in KERNELS if task.mode == "tolerant" and _runs(k, program)]
    seconds = 0.0
    for kernels in chosen or [Kernels("exact", "exact", 1, {}, width=task.width)]:
        progress(f"running {len(segments_of(task))} segments with the kernels {kernels.name}")
        spent = _run(kernels, folder)
        seconds = seconds or spent
    operations = len(task.steps_of(0)) * task.operations_per_step
    speed = int(operations / max(seconds, 1e-9))
    if not chosen:
        return Profiled(None, speed)
    progress("comparing")
    ends = {k.name: [folder / f"{k.name}-{segment}" for segment in segments_of(task)] for k in chosen}
    return Profiled(compare_ends(program, folder / "start", ends, folder / "other-seed"), speed)


def compare_ends(program: bytes, start: Path, ends: Mapping[str, Sequence[Path]], other_seed: Path) -> Findings:
    """What a profile finds in its checkpoints: files, which are mapped, not read into memory.

    ends: of each configuration, the first being the one that later segments begin with the ends of. other_seed: the
    end of the first segment with the other seed. Raises RemoteProtocolError for a file that is no checkpoint.
    """
    layout, first = state_layout(Program.from_bytes(program)), next(iter(ends.values()))
    pairs = []
    for segment, base in enumerate((start, *first[:-1])):
        pairs.append((_read(base, layout), {name: _read(paths[segment], layout) for name, paths in ends.items()}))
    return assess(pairs, _read(other_seed, layout))


def _runs(kernels: Kernels, program: bytes) -> bool:
    return kernels.width != 22 or longest_product(Program.from_bytes(program)) <= params.PRODUCT_LENGTH_22_MAX


def _read(path: Path, layout: safetensors.Layout) -> dict[str, NDArray[Any]]:
    with path.open("rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    return dict(safetensors.parse(mapped, layout))


def _run(kernels: Kernels, folder: Path) -> float:
    """One configuration in a fresh process; the seconds of its first segment."""
    own = {key: value for key, value in os.environ.items() if key not in _STATE_VARIABLES}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(kernels.threads))
    environment = own | {"PYTHONPATH": str(_ROOT)} | threads | dict(kernels.environment)
    words = [sys.executable, "-m", "worker.profiling", str(folder), kernels.name]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2][-500:]
        raise ProfilingFailed(f"the kernels {kernels.name} did not run: {last or f'exit code {done.returncode}'}")
    return float((folder / f"{kernels.name}.seconds").read_text())


def _child(folder: Path, name: str) -> None:
    """Inside the process: the segments under one configuration, their ends into `folder`."""
    from worker import checkpoint, training

    task = decode(TaskSpec, (folder / "task").read_bytes(), bytes_max=params.MESSAGE_BYTES_MAX)
    program = Program.from_bytes((folder / "program").read_bytes())
    arrays = {ref.name: (folder / f"array-{i}").read_bytes() for i, ref in enumerate(task.arrays)}
    given = (folder / "base").read_bytes() if (folder / "base").exists() else None
    kernels = next((k for k in KERNELS if k.name == name), Kernels(name, "exact", 1, {}, width=task.width))

    def end_of(task: TaskSpec, segment: int, base: bytes | None) -> bytes:
        (result,) = training.run_segments(
            task=task, program=program, arrays=arrays, base=base, segments=range(segment, segment + 1),
            threads=kernels.threads,
        )  # fmt: skip
        if result.diverged_step is not None:
            raise LocalProtocolError(f"training diverged at step {result.diverged_step} of the profile")
        return result.checkpoint

    own = msgspec.structs.replace(task, mode=kernels.mode, width=kernels.width)
    began = time.perf_counter()
    first_end = end_of(own, 0, given)
    (folder / f"{name}.seconds").write_text(str(time.perf_counter() - began))
    (folder / f"{name}-0").write_bytes(first_end)
    if task.mode == "exact":
        return
    for segment in segments_of(task)[1:]:
        base = (folder / f"{KERNELS[0].name}-{segment - 1}").read_bytes()
        (folder / f"{name}-{segment}").write_bytes(end_of(own, segment, base))
    if kernels is KERNELS[0]:
        state = training.initial_state(task, program, given)
        start = checkpoint.dump(state)
        (folder / "start").write_bytes(start)
        # Another seed would draw another start too; only its data and its random numbers are wanted.
        other = msgspec.structs.replace(
            own, seed=seeds_of(task)[1], initial=Initial("state", bytes(32), checkpoint.state_root(state))
        )
        (folder / "other-seed").write_bytes(end_of(other, 0, start))


if __name__ == "__main__":
    _child(Path(sys.argv[1]), sys.argv[2])
