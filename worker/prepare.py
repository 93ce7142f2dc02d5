"""From a job.toml and ordinary PyTorch to everything a submission needs: program, data, first root, what it costs.

Runs on the submitter's machine only, because it executes the submitter's own code. What goes wrong there is told
with the user's line; what cannot be run by strangers is refused here, before it costs anything.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from protocol import params, safetensors
from protocol.codec import encode
from protocol.errors import IchibaError, MalformedRecord, RemoteProtocolError, UnsupportedModel
from protocol.program import Program, operations_per_step, peak_bytes, program_id, state_layout
from protocol.task import ArrayRef, BatchRule, Initial, TaskSpec
from worker import checkpoint
from worker.capture import Captured, capture_built
from worker.capture_forward import FORWARD_KINDS, PROMPT, RESULT, Generation, steps_of
from worker.executor import DTYPES, Diverged, Executor
from worker.job_file import BadJobFile, JobFile, SettledJob, read_job_file
from worker.stacking import Stack, stacked
from worker.training import Batches, arithmetic_of, check_task, initial_state, rate_of

__all__ = ["Prepared", "PreparedArray", "UserCodeFailed", "explained", "prepare"]

_DTYPES: Final = ("uint8", "int32", "int64", "float32")
# What a person's Python usually raises; anything stranger keeps its own traceback.
_USER_ERRORS: Final = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip


class UserCodeFailed(IchibaError):
    """The submitter's own Python raised."""

    code = "user-code"


@dataclass(frozen=True)
class PreparedArray:
    """One array of the data: raw little-endian bytes, row-major."""

    name: str
    dtype: Literal["uint8", "int32", "int64", "float32"]
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True)
class Prepared:
    """All of a job but the ids of its blobs.

    program: its canonical bytes. base: the checkpoint it starts from, None for a seeded start. base_root: the state
    root before step 0, 32 bytes. checkpoint_bytes: the exact size of every checkpoint. memory_bytes: what a solver
    must have. operations: of the whole job. first_loss: of a trial step, None if the step is too large to try.
    stack: of a job that stands on another, what it took over from there.
    """

    job: JobFile
    network: bytes
    program: bytes
    arrays: tuple[PreparedArray, ...]
    base: bytes | None
    base_root: bytes
    checkpoint_bytes: int
    memory_bytes: int
    operations: int
    operations_per_step: int
    nodes: int
    parameters: int
    first_loss: float | None
    stack: Stack | None

    def make_task(self, *, program: bytes, arrays: Mapping[str, bytes], base: bytes = b"") -> TaskSpec:
        """The task, from the blob id of the program, of each array by name, and of the base if there is one."""
        return _task(
            self.job,
            self.network,
            program=program,
            program_bytes=len(self.program),
            operations=self.operations_per_step,
            arrays=tuple((array, arrays[array.name]) for array in self.arrays),
            initial=Initial("state", base, self.base_root) if self.base is not None else _SEEDED,
        )


_SEEDED: Final = Initial("seed", bytes(32), bytes(32))


def prepare(
    job_toml: Path,
    network: bytes,
    progress: Callable[[str], None] = lambda stage: None,
    settled: Callable[[SettledJob], Path] | None = None,
) -> Prepared:
    """Read job.toml, run the user's build() and data(), capture the step, and check that it all fits together.

    network: id, 32 bytes. progress: told what is going on, in words. settled: finds the last checkpoint of the job
    that this one is stacked on, and checks its proof. Raises BadJobFile, UserCodeFailed, UnsupportedModel (with the
    operation and the user's line).
    """
    job = read_job_file(job_toml)
    with _importable(job.path.resolve().parent):
        progress("capturing one step")
        prompts: list[torch.Tensor] = []
        captured = _capture(job, prompts)
        progress("running the data function")
        if prompts:
            job = replace(job, batch=BatchRule("whole", prompts[0].shape[0], 0))
            arrays: tuple[PreparedArray, ...] = (_array(PROMPT, prompts[0]),)
        else:
            arrays = _arrays(job)
    _check_rows(job, captured, arrays)
    program = captured.program.to_bytes()
    progress("computing the first state")
    stack = _stack(job, captured.program, settled)
    base = checkpoint.dump(stack.state) if stack is not None else _base(job, captured)
    operations = operations_per_step(captured.program)
    base_root = checkpoint.state_root(checkpoint.load(base)) if base is not None else bytes(32)
    task = _task(
        job,
        network,
        program=program_id(program),
        program_bytes=len(program),
        operations=operations,
        arrays=tuple((array, bytes(32)) for array in arrays),
        initial=Initial("state", bytes(32), base_root) if base is not None else _SEEDED,
    )
    with explained(job):
        # The decoder holds rules that a constructor does not (protocol/task.py).
        TaskSpec.from_bytes(encode(task), network=network)
        check_task(task, captured.program)
        batches = Batches(task, captured.program, {array.name: array.data for array in arrays})
        state = initial_state(task, captured.program, base)
    if base is None:
        base_root = checkpoint.state_root(state)
    first_loss = None
    if operations <= params.TRIAL_OPERATIONS_MAX:
        progress("trying one step")
        first_loss = _try_step(job, task, captured.program, batches, state)
    checkpoint_bytes = len(checkpoint.dump(state))
    data_bytes = sum(array.data.nbytes for array in arrays)
    memory = peak_bytes(captured.program) + 2 * checkpoint_bytes + data_bytes + params.WORKER_BASE_BYTES
    return Prepared(
        job=job,
        network=network,
        program=program,
        arrays=arrays,
        base=base,
        base_root=base_root,
        checkpoint_bytes=checkpoint_bytes,
        memory_bytes=max(memory, params.SANDBOX_MEMORY_BYTES_MIN),
        operations=operations * job.steps,
        operations_per_step=operations,
        nodes=len(captured.program.nodes),
        parameters=sum(int(np.prod(item.shape)) for item in captured.program.inputs_of("parameter")),
        first_loss=first_loss,
        stack=stack,
    )


def _task(
    job: JobFile,
    network: bytes,
    *,
    program: bytes,
    program_bytes: int,
    operations: int,
    arrays: tuple[tuple[PreparedArray, bytes], ...],
    initial: Initial,
) -> TaskSpec:
    return TaskSpec(
        network=network,
        program=program,
        program_bytes=program_bytes,
        arrays=tuple(ArrayRef(array.name, array.dtype, array.shape, blob, array.data.nbytes) for array, blob in arrays),
        batch=job.batch,
        initial=initial,
        seed=job.seed,
        steps=job.steps,
        steps_per_segment=job.steps_per_segment,
        mode=job.mode,
        width=job.width,
        schedule=job.schedule,
        operations_per_step=operations,
        name=job.name,
        kind=job.kind,
    )


# --- the user's code ---------------------------------------------------------------------------------------
@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The user's files may import one another, as if Python were started in their directory."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _users(what: str, file: Path) -> Iterator[None]:
    """Errors of the user's code, told with the user's line."""
    try:
        yield
    except _USER_ERRORS as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).parent == file.parent]
        line = f"{file.name}:{own[-1].lineno}" if own and Path(own[-1].filename) == file else ""
        if own and not line:
            line = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        if isinstance(error, SyntaxError):
            line = f"{Path(error.filename or file).name}:{error.lineno}"
        raise UserCodeFailed(
            f"{what} failed{f' at {line}' if line else ''}: {type(error).__name__}: {error}"[:600],
            next_step=f"try it alone: python -c 'import {file.stem}' in {file.parent}",
        ) from error


def _module(file: Path) -> ModuleType:
    """The user's file as a module under a name of its own; loaded again if the file changed."""
    name = f"ichiba_job_{file.stem}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, "ichiba_loaded_from", None) == (file, file.stat().st_mtime_ns):
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, "a .py file always has a loader"
    assert spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of the user's look themselves up here
    whole = False
    try:
        spec.loader.exec_module(module)
        whole = True
    finally:
        if not whole:
            del sys.modules[name]
    module.__dict__["ichiba_loaded_from"] = (file, file.stat().st_mtime_ns)
    return module


def _call(place: tuple[Path, str], key: str) -> Callable[[], Any]:
    file, name = place
    with _users(f"importing {file.name}", file):
        function = getattr(_module(file), name, None)
    if not callable(function):
        raise BadJobFile(f"{key} names {name!r}, and {file.name} has no such function")
    return function


def _capture(job: JobFile, prompts: list[torch.Tensor]) -> Captured:
    """The captured step; the data of a generation goes into `prompts`, for only build() has it."""
    file, name = job.model
    if not name:
        return _saved(job, file)
    build = _call(job.model, "model")

    def built() -> Any:
        with _users(f"{name}()", file):
            found = build()
        kind = FORWARD_KINDS.get(type(found), "train")
        if kind != job.kind:
            raise BadJobFile(
                f"{name}() in {file.name} returned a job of the kind {kind}, {job.path.name} says {job.kind}",
                next_step=f'kind = "{kind}"',
            )
        steps = steps_of(found, job.batch.size)
        if steps is not None and steps != job.steps:
            raise BadJobFile(
                f"steps is {job.steps}, what {name}() in {file.name} returned takes {steps}",
                next_step=f"steps = {steps}",
            )
        if isinstance(found, Generation):
            prompts.append(found.prompt)
        return found

    return capture_built(built)


def _check_rows(job: JobFile, captured: Captured, arrays: tuple[PreparedArray, ...]) -> None:
    """Refuse an inference whose output has other rows than the data."""
    rows = job.batch.rows_of(arrays[0].shape[0])
    for name, (_, shape) in state_layout(captured.program).items():
        if job.kind == "infer" and name.startswith(RESULT) and shape[0] != rows:
            raise BadJobFile(
                f"the output has {shape[0]} rows, the data {rows}", next_step=f"Inference(model, example, rows={rows})"
            )


def _saved(job: JobFile, file: Path) -> Captured:
    """A capture that `Captured.save` wrote: no code of the user's runs."""
    if job.initial == "model":
        raise BadJobFile(
            f'initial is "model", and {file.name} holds no weights',
            next_step='initial = "initial.safetensors", which captured.save() wrote beside it',
        )
    try:
        program = Program.from_bytes(file.read_bytes())
    except RemoteProtocolError as error:
        raise BadJobFile(f"{file.name}: {error.what}", next_step="write it with captured.save()") from None
    state = {
        name: torch.zeros(shape, dtype=DTYPES[dtype], device="meta")
        for name, (dtype, shape) in state_layout(program).items()
    }
    return Captured(program, state)


# --- data --------------------------------------------------------------------------------------------------
def _arrays(job: JobFile) -> tuple[PreparedArray, ...]:
    assert job.data is not None, "a job without data never comes here"
    file, name = job.data
    if not name:
        return _npz(file) if file.suffix == ".npz" else (_array("text", file.read_bytes()),)
    function = _call(job.data, "data")
    with _users(f"{name}()", file):
        found = function()
    if isinstance(found, bytes | bytearray | memoryview):
        found = {"text": found}
    if not isinstance(found, Mapping) or not found:
        raise BadJobFile(
            f"{file.name}:{name}() returned {type(found).__name__}",
            next_step="return a dict of numpy arrays or tensors by name, or bytes",
        )
    return tuple(_array(str(key), value) for key, value in sorted(found.items()))


def _npz(file: Path) -> tuple[PreparedArray, ...]:
    try:
        with np.load(file, allow_pickle=False) as found:
            return tuple(_array(name, found[name]) for name in sorted(found.files))
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise BadJobFile(f"{file.name} is no .npz of arrays: {error}", next_step="write it with numpy.savez") from None


def _array(name: str, value: Any) -> PreparedArray:
    """Bytes, a numpy array or a tensor as little-endian row-major bytes."""
    array: NDArray[Any]
    if isinstance(value, bytes | bytearray | memoryview):
        array = np.frombuffer(value, dtype=np.uint8)
    elif isinstance(value, torch.Tensor):
        array = value.detach().cpu().numpy()
    else:
        array = np.asarray(value)
    dtype = array.dtype.name
    if dtype not in _DTYPES:
        raise BadJobFile(
            f"array {name!r} of the data is {dtype}",
            why=f"data travels as {', '.join(_DTYPES)}",
            next_step="convert it, for example with .astype(np.float32)",
        )
    if not array.ndim or not array.size or array.ndim > params.TENSOR_RANK_MAX:
        raise BadJobFile(f"array {name!r} of the data has shape {array.shape}")
    flat = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    data = memoryview(flat.reshape(-1).view(np.uint8)).toreadonly()  # type: ignore[arg-type]
    return PreparedArray(name, dtype, array.shape, data)  # type: ignore[arg-type]


# --- where it starts ---------------------------------------------------------------------------------------
def _stack(job: JobFile, program: Program, settled: Callable[[SettledJob], Path] | None) -> Stack | None:
    """The first state of a job that stands on another; None of any other job. Raises BadJobFile."""
    if not isinstance(job.initial, SettledJob):
        return None
    assert settled is not None, "who prepares stacked jobs looks up what they stand on"
    return stacked(settled(job.initial), program, job.seed)


def _base(job: JobFile, captured: Captured) -> bytes | None:
    """The checkpoint the job starts from; None if it starts from its seed. Raises BadJobFile."""
    if job.initial == "seed":
        return None
    state = dict(captured.initial_state)
    if isinstance(job.initial, Path):
        state |= _from_file(job.initial, captured.program, state)
        absent = [name for name, tensor in state.items() if tensor.is_meta]
        if absent:
            raise BadJobFile(
                f"{job.initial.name} lacks {absent[:3]}, and a saved program knows no value for them",
                next_step="use the initial.safetensors that captured.save() wrote, or a checkpoint of the same job",
            )
    return checkpoint.dump(state)


def _from_file(path: Path, program: Program, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, or of weights alone: then the optimizer starts afresh."""
    try:
        found = {name: torch.from_numpy(array.copy()) for name, array in safetensors.parse(path.read_bytes()).items()}
    except IchibaError as error:
        raise BadJobFile(f"{path.name}: {error.what}") from None
    needed = {item.name for item in program.inputs_of("parameter", "buffer")}
    missing, strange = sorted(needed - found.keys()), sorted(found.keys() - own.keys())
    if missing or strange:
        raise BadJobFile(
            f"{path.name} is of another model: it lacks {missing[:3]} and has {strange[:3]}",
            next_step="use the checkpoint of a job with this model and optimizer",
        )
    for name, tensor in found.items():
        if (tensor.shape, tensor.dtype) != (own[name].shape, own[name].dtype):
            raise BadJobFile(
                f"{path.name}: {name} is {tensor.dtype} {tuple(tensor.shape)}, the model's is "
                f"{own[name].dtype} {tuple(own[name].shape)}"
            )
    return found


# --- does it fit -------------------------------------------------------------------------------------------
@contextmanager
def explained(job: JobFile) -> Iterator[None]:
    """Records refuse peers; here the same refusal is about the submitter's own file."""
    try:
        yield
    except MalformedRecord as error:
        raise BadJobFile(f"{job.path.name}: {error.what}", why=error.why, next_step=error.next_step) from None


def _try_step(
    job: JobFile, task: TaskSpec, program: Program, batches: Batches, state: dict[str, torch.Tensor]
) -> float:
    """The loss of step 0 (before its update). Raises UnsupportedModel if the step does not run, or diverges."""
    executor = Executor(program, arithmetic_of(task), width=task.width, threads=min(4, os.cpu_count() or 1))
    try:
        _, loss = executor.step(state, batches.of(0), rate_of(task, 0), task.seed, 0)
    except Diverged:
        raise UnsupportedModel(
            "the first step gives NaN or infinity", next_step="lower the learning rate, or look at the data"
        ) from None
    except (RemoteProtocolError, RuntimeError, IndexError, ValueError) as error:
        what = error.what if isinstance(error, IchibaError) else str(error).splitlines()[0][:300]
        raise UnsupportedModel(
            f"the first step does not run on the first batch: {what}",
            why="the data holds values the model does not take, such as a class it does not have",
            next_step=f"compare data() with the model in {job.model[0].name}",
        ) from error
    return loss
