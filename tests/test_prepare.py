"""From job.toml and ordinary PyTorch to a submission, and refusals that name the line to change."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from protocol import safetensors
from protocol.codec import encode
from protocol.errors import IchibaError, UnsupportedModel
from protocol.program import Program, program_id, state_layout
from protocol.task import TaskSpec
from worker.job_file import BadJobFile, read_job_file
from worker.prepare import Prepared, UserCodeFailed, prepare
from worker.script_file import is_script
from worker.training import run_segments

NETWORK = bytes(32)
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

MODEL = """
import numpy as np
import torch
from torch import nn
from worker.capture import Training

def build():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    example = {"x": torch.zeros(4, 3), "y": torch.zeros(4, dtype=torch.int64)}
    return Training(model, nn.CrossEntropyLoss(), optimizer, example)

def data():
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(20, 3)).astype(np.float32), "y": (np.arange(20) % 2).astype(np.uint8)}
"""
JOB = """
name = "line"
seed = 5
steps = 6
steps_per_segment = 3
budget = "1.50"
price = 2000
[batch]
rule = "rows"
size = 4
[learning_rate]
peak = 0.1
"""


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Path]:
    """Write a job; replace texts in its files."""

    def write(*changes: tuple[str, str], model: str = MODEL) -> Path:
        text = JOB
        for old, new in changes:
            assert old in text or old in model, old
            text, model = text.replace(old, new), model.replace(old, new)
        (tmp_path / "model.py").write_text(model)
        (tmp_path / "job.toml").write_text(text)
        return tmp_path

    return write


# --- job.toml ----------------------------------------------------------------------------------------------
def test_the_examples_read() -> None:
    for example in sorted(EXAMPLES.glob("*/job.toml")):
        if is_script(example):
            continue  # tests/test_script.py reads it
        read = read_job_file(example)
        assert read.budget_micro
        assert read.unit_price_max == 2000


def test_rates_and_amounts_are_read_exactly(job: Callable[..., Path]) -> None:
    read = read_job_file(job(("peak = 0.1", 'kind = "warmup-cosine"\npeak = 0.000000003\nfloor = 1e-9')))
    assert (read.schedule.peak_nano, read.schedule.floor_nano) == (3, 1)
    assert (read.budget_micro, read.unit_price_max) == (1_500_000, 2000)
    assert read_job_file(job(("price = 2000", 'price = "0.0021"'))).unit_price_max == 2100
    assert read_job_file(job(("price = 2000", ""))).unit_price_max is None


def test_a_job_names_the_sandbox_its_solver_must_have(job: Callable[..., Path]) -> None:
    assert read_job_file(job()).sandbox == 2
    for level, name in enumerate(("filtered", "namespaced", "contained"), 2):
        assert read_job_file(job(("seed = 5", f'sandbox = "{name}"'))).sandbox == level


def test_a_job_is_sealed_only_if_it_says_so(job: Callable[..., Path]) -> None:
    assert not read_job_file(job()).sealed
    for word in ("true", "false"):
        said = read_job_file(job(("[batch]", f"[privacy]\nsealed = {word}\n[batch]")))
        assert said.sealed == (word == "true")


BAD = {
    "a privacy that says nothing": (("[batch]", "[privacy]\n[batch]"), "true or false"),
    "a privacy in words": (("[batch]", '[privacy]\nsealed = "yes"\n[batch]'), "true or false"),
    "a misspelt privacy": (("[batch]", "[privacy]\nseald = true\n[batch]"), "did you mean 'sealed'?"),
    "a privacy that is no table": (("seed = 5", 'privacy = "sealed"'), "[privacy]"),
    "a misspelt key": (("seed = 5", "sead = 5"), "did you mean 'seed'?"),
    "a misspelt batch key": (("size = 4", "sise = 4"), "did you mean 'size'?"),
    "a misspelt word": (('"rows"', '"row"'), "did you mean 'rows'?"),
    "a key from nowhere": (("seed = 5", "qqqqqq = 5"), "known keys"),
    "no steps": (("steps = 6", ""), "has no 'steps'"),
    "a truth for a number": (("steps = 6", "steps = true"), "a whole number"),
    "a text for a number": (("steps = 6", 'steps = "6"'), "a whole number"),
    "a sandbox that is none": (("seed = 5", 'sandbox = "limits"'), "'filtered', 'namespaced', 'contained'"),
    "a misspelt sandbox": (("seed = 5", 'sandbox = "contain"'), "did you mean 'contained'?"),
    "steps of zero": (("steps = 6", "steps = 0"), "from 1 to"),
    "too many segments": (("steps = 6\nsteps_per_segment = 3", "steps = 9000\nsteps_per_segment = 1"), "at least 9"),
    "a width of ten": (("seed = 5", "width = 10"), "8, 15 or 22"),
    "a negative rate": (("peak = 0.1", "peak = -0.1"), "positive"),
    "a rate that is no number": (("peak = 0.1", "peak = nan"), "peak"),
    "a rate too fine": (("peak = 0.1", "peak = 0.0000000001"), "multiple"),
    "a budget of too many decimals": (('"1.50"', '"1.5000001"'), "six decimals"),
    "a budget below zero": (('"1.50"', '"-1"'), "no amount"),
    "a length for rows": (("size = 4", "size = 4\nlength = 3"), "windows"),
    "windows without a length": (('"rows"', '"windows"'), "has no 'length'"),
    "a floor of a constant rate": (("peak = 0.1", "peak = 0.1\nfloor = 0.0"), "warmup-cosine"),
    "no rate": (("[learning_rate]\npeak = 0.1", ""), "[learning_rate]"),
    "a model that is no function": (("seed = 5", 'model = "model.py"'), "model.py:function"),
    "a model that is no file": (("seed = 5", 'model = "mode.py:build"'), "is no file"),
    "a start from nowhere": (("seed = 5", 'initial = "zero"'), ".safetensors"),
    "no toml": (("[batch]", "[batch"), "TOML"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_in_the_file_is_refused_with_what_to_write(job: Callable[..., Path], name: str) -> None:
    change, hint = BAD[name]
    with pytest.raises(BadJobFile) as told:
        read_job_file(job(change))
    assert hint in str(told.value)
    assert told.value.exit_code == 2


def test_reading_a_job_file_needs_no_torch(job: Callable[..., Path]) -> None:
    code = f"import sys, worker.job_file as j; from pathlib import Path; j.read_job_file(Path({str(job())!r}))"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)


# --- preparing ---------------------------------------------------------------------------------------------
def ids(prepared: Prepared) -> TaskSpec:
    return prepared.make_task(
        program=program_id(prepared.program), arrays={array.name: bytes(32) for array in prepared.arrays}
    )


def test_what_is_prepared_is_what_a_solver_runs(job: Callable[..., Path]) -> None:
    stages: list[str] = []
    prepared = prepare(job(), NETWORK, stages.append)
    task = ids(prepared)
    assert TaskSpec.from_bytes(encode(task), network=NETWORK) == task
    results = list(
        run_segments(
            task=task,
            program=Program.from_bytes(prepared.program),
            arrays={array.name: array.data for array in prepared.arrays},
            base=None,
            segments=range(task.segments),
        )
    )
    assert results[0].in_root == prepared.base_root
    assert results[0].losses[0] == pytest.approx(prepared.first_loss)
    assert sum(result.operations for result in results) == prepared.operations
    assert {len(result.checkpoint) for result in results} == {prepared.checkpoint_bytes}
    assert len(stages) == 4


def test_preparing_twice_gives_the_same_bytes(job: Callable[..., Path]) -> None:
    first, second = prepare(job(), NETWORK), prepare(job(), NETWORK)
    assert (first.program, first.base_root, encode(ids(first))) == (
        second.program,
        second.base_root,
        encode(ids(second)),
    )


def test_a_changed_model_file_is_loaded_again(job: Callable[..., Path]) -> None:
    assert prepare(job(), NETWORK).parameters == 8
    import os

    changed = job(("nn.Linear(3, 2)", "nn.Linear(3, 3)"))
    os.utime(changed / "model.py", ns=(1, 1))
    assert prepare(changed, NETWORK).parameters == 12


def test_a_job_may_start_from_its_models_weights_or_from_a_checkpoint(job: Callable[..., Path], tmp_path: Path) -> None:
    seeded = prepare(job(), NETWORK)
    own = prepare(job(("seed = 5", 'initial = "model"')), NETWORK)
    assert own.base is not None
    assert own.base_root != seeded.base_root
    task = own.make_task(program=bytes(32), arrays={"x": bytes(32), "y": bytes(32)}, base=b"\7" * 32)
    assert (task.initial.kind, task.initial.blob, task.initial.root) == ("state", b"\7" * 32, own.base_root)
    (tmp_path / "start.safetensors").write_bytes(own.base)
    again = prepare(job(("seed = 5", 'initial = "start.safetensors"')), NETWORK)
    assert again.base_root == own.base_root


def test_weights_alone_start_with_a_fresh_optimizer(job: Callable[..., Path], tmp_path: Path) -> None:
    adam = ("torch.optim.SGD", "torch.optim.Adam")
    whole = prepare(job(("seed = 5", 'initial = "model"'), adam), NETWORK)
    assert whole.base is not None
    tensors = safetensors.parse(whole.base)
    weights = {name: array for name, array in tensors.items() if name in ("weight", "bias")}
    assert len(weights) < len(tensors)
    (tmp_path / "weights.safetensors").write_bytes(safetensors.write(weights))
    tuned = prepare(job(("seed = 5", 'initial = "weights.safetensors"'), adam), NETWORK)
    assert tuned.base == whole.base
    layout = state_layout(Program.from_bytes(tuned.program))
    (tmp_path / "weights.safetensors").write_bytes(safetensors.write({"weight": weights["weight"]}))
    assert len(layout) > 2
    with pytest.raises(BadJobFile, match="another model"):
        prepare(job(("seed = 5", 'initial = "weights.safetensors"'), adam), NETWORK)


def test_bytes_and_files_are_data_too(job: Callable[..., Path], tmp_path: Path) -> None:
    model = MODEL.replace("nn.Linear(3, 2)", "nn.Embedding(256, 256)").replace(
        'example = {"x": torch.zeros(4, 3), "y": torch.zeros(4, dtype=torch.int64)}',
        'example = {"x": torch.zeros(4, 8, dtype=torch.int64), "y": torch.zeros(4, 8, dtype=torch.int64)}',
    )
    model = model.replace(
        "nn.CrossEntropyLoss()", "lambda out, y: nn.functional.cross_entropy(out.flatten(0, 1), y.flatten())"
    )
    (tmp_path / "corpus.txt").write_bytes(b"to be or not to be, that is the question" * 5)
    windows = ('"rows"\nsize = 4', '"windows"\nsize = 4\nlength = 8')
    prepared = prepare(job(windows, ("seed = 5", 'data = "corpus.txt"'), model=model), NETWORK)
    (array,) = prepared.arrays
    assert (array.name, array.dtype, array.shape) == ("text", "uint8", (200,))
    returned = model.split("def data")[0] + "def data():\n    return b'to be or not to be' * 9\n"
    assert prepare(job(windows, model=returned), NETWORK).arrays[0].shape == (162,)


# --- refusals ----------------------------------------------------------------------------------------------
def test_an_operation_nobody_can_verify_is_refused_with_its_name_and_line(job: Callable[..., Path]) -> None:
    model = MODEL.replace("nn.CrossEntropyLoss()", "strange") + (
        "\ndef strange(output, target):\n    odd = torch.linalg.det(output.T @ output)\n    return odd\n"
    )
    with pytest.raises(UnsupportedModel) as told:
        prepare(job(model=model), NETWORK)
    line = next(n for n, text in enumerate(model.splitlines(), 1) if "linalg" in text)
    assert f"model.py:{line}" in str(told.value)
    assert told.value.next_step


USERS = {
    "a syntax error": ("def data():", "def data(:", "model.py:13"),
    "an import that fails": ("import numpy as np", "import numpi as np", "model.py:2"),
    "a build that fails": ("model = nn.Linear(3, 2)", "model = nn.Linear(3, 2) / 0", "model.py:8"),
    "data that fails": ("rng = np.random.default_rng(0)", "rng = [][1]", "model.py:14"),
}


@pytest.mark.parametrize("name", USERS)
def test_errors_of_the_users_own_code_name_the_users_line(job: Callable[..., Path], name: str) -> None:
    old, new, line = USERS[name]
    with pytest.raises(UserCodeFailed) as told:
        prepare(job((old, new)), NETWORK)
    assert line in told.value.what
    assert told.value.__cause__ is not None
    assert str(job().resolve()) not in sys.path


UNFIT = {
    "no such function": (("def build", "def bild"), "no such function"),
    "data of doubles": ((".astype(np.float32)", ""), "float64"),
    "data that is no dict": (('return {"x"', 'return 7 or {"x"'), "returned int"),
    "an array too short": (("np.arange(20)", "np.arange(19)"), "equal"),
    "an input without an array": (('"y": (np', '"z": (np'), "has no array"),
    "another batch size": (("size = 4", "size = 5"), "as large as the batch"),
    "a class too many": (("np.arange(20) % 2", "np.arange(20) % 7"), "first step"),
    "weights nobody can redraw": (("optimizer =", "torch.nn.init.eye_(model.weight); optimizer ="), "initial"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_together_is_refused_before_it_costs_anything(job: Callable[..., Path], name: str) -> None:
    change, hint = UNFIT[name]
    with pytest.raises(IchibaError) as told:
        prepare(job(change), NETWORK)
    assert hint in str(told.value), str(told.value)


def test_a_first_step_that_explodes_is_refused(job: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedModel, match="NaN or infinity"):
        prepare(job(("rng.normal(size=(20, 3))", "np.full((20, 3), np.inf)")), NETWORK)


def test_tensors_are_taken_as_arrays(job: Callable[..., Path]) -> None:
    model = MODEL.replace('"x": rng.normal(size=(20, 3)).astype(np.float32)', '"x": torch.ones(20, 3)')
    arrays = {array.name: array for array in prepare(job(model=model), NETWORK).arrays}
    assert (arrays["x"].dtype, arrays["x"].shape) == ("float32", (20, 3))
    assert bytes(arrays["x"].data[:4]) == torch.ones(1).numpy().tobytes()
    assert replace(arrays["x"], name="z").name == "z"


SAVED = (("seed = 5", 'seed = 5\nmodel = "model.program"\ndata = "data.npz"\ninitial = "initial.safetensors"'),)


def saved(folder: Path) -> None:
    """What a user's own script writes in two lines, and its data."""
    import torch

    import ichiba

    torch.manual_seed(1)
    model = torch.nn.Linear(3, 2)
    example = (torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    captured = ichiba.capture(model, torch.nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), example)
    captured.save(folder)
    rows = np.arange(60, dtype=np.float32).reshape(20, 3) / 60
    np.savez(folder / "data.npz", x=rows, y=(np.arange(20) % 2).astype(np.uint8))


def test_a_saved_capture_is_a_job_that_runs_no_code(job: Callable[..., Path], tmp_path: Path) -> None:
    saved(tmp_path)
    prepared = prepare(job(*SAVED, model="raise SystemExit('this file must not run')"), NETWORK)
    assert prepared.base == (tmp_path / "initial.safetensors").read_bytes()
    assert [array.name for array in prepared.arrays] == ["x", "y"]
    assert prepared.first_loss is not None
    assert 0.3 < prepared.first_loss < 2.0


WRONG_SAVED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a program cut short": (lambda p: (p / "model.program").write_bytes(b"\x93\x01"), "model.program"),
    "weights of another": (lambda p: (p / "initial.safetensors").write_bytes(safetensors.write({})), "another model"),
    "a broken archive": (lambda p: (p / "data.npz").write_bytes(b"PK\x03\x04nothing"), "data.npz"),
    "a pickle inside": (lambda p: np.savez(p / "data.npz", x=np.array([{}], dtype=object)), "data.npz"),
}


@pytest.mark.parametrize("name", WRONG_SAVED)
def test_files_that_are_not_what_was_saved_are_refused(job: Callable[..., Path], tmp_path: Path, name: str) -> None:
    spoil, said = WRONG_SAVED[name]
    saved(tmp_path)
    spoil(tmp_path)
    with pytest.raises(BadJobFile, match=said) as refused:
        prepare(job(*SAVED), NETWORK)
    assert refused.value.next_step


def test_a_saved_program_has_no_weights_of_its_own(job: Callable[..., Path], tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(BadJobFile, match="holds no weights"):
        prepare(job((SAVED[0][0], SAVED[0][1].replace("initial.safetensors", "model"))), NETWORK)
