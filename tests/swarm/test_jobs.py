"""Jobs stacked on one another on five real processes: trained, adapted, measured, and followed back to the seed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol import safetensors

pytestmark = [pytest.mark.swarm, pytest.mark.slow]
SECONDS_MAX = 600  # of one command, which would then hang: a job takes about 9 s on two idle cores

MODEL = """
import numpy as np
import torch
from torch import nn
from ichiba import Evaluation, Training

# Large enough that a segment costs a micro-credit.
EXAMPLE = {"x": torch.zeros(40, 512), "y": torch.zeros(40, dtype=torch.int64)}

class Adapted(nn.Linear):
    def __init__(self):
        super().__init__(512, 10)
        self.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 512) * 0.1), nn.Parameter(torch.zeros(10, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T

def training(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Training(model, nn.CrossEntropyLoss(), torch.optim.Adam(trained), EXAMPLE)

def train():
    return training(nn.Linear(512, 10))

def tune():
    return training(Adapted())

def measure():
    accuracy = lambda scores, y: (scores.argmax(1) == y).float().mean()
    return Evaluation(Adapted(), nn.CrossEntropyLoss(), EXAMPLE, {"accuracy": accuracy})

def data():
    x = np.random.default_rng(0).normal(size=(320, 512)).astype(np.float32)
    return {"x": x, "y": x[:, :10].argmax(1).astype(np.uint8)}
"""
JOB = """
kind = "{kind}"
name = "{build}"
model = "model.py:{build}"
initial = "{initial}"
seed = 5
steps = 8
steps_per_segment = 4
budget = "1.00"
price = 2000
[batch]
rule = "{rule}"
size = 40
"""
Ichiba = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def ichiba(tmp_path: Path) -> Iterator[Ichiba]:
    """A command of the submitter in a running swarm, as a person types it, in a directory with the model."""
    swarm = ["--dir", str(tmp_path / "lan")]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "peer.cli", *words],
            capture_output=True, text=True, timeout=SECONDS_MAX, check=False, cwd=tmp_path,
        )  # fmt: skip

    (tmp_path / "model.py").write_text(MODEL)
    try:
        up = run("swarm", "up", *swarm)
        assert up.returncode == 0, up.stderr
        yield lambda *words: run("--data", str(tmp_path / "lan" / "submitter"), *words)
    finally:
        down = run("swarm", "down", *swarm)
        assert down.returncode == 0, down.stderr


def done(ichiba: Ichiba, folder: Path, *, kind: str, build: str, initial: str) -> str:
    """Submit a job, wait for its end, collect it into a directory called as its build(); its id."""
    rule = "rows" if kind == "train" else "sequence"
    text = JOB.format(kind=kind, build=build, initial=initial, rule=rule)
    if kind == "train":
        text += "[learning_rate]\npeak = 0.05\n"
    (folder / f"{build}.toml").write_text(text)
    ended = ichiba("submit", f"{build}.toml", "--json")
    assert ended.returncode == 0, f"{ended.stdout[-2000:]}\n{ended.stderr}"
    jobs = [line for line in map(json.loads, ended.stdout.splitlines()) if line["schema"] == "ichiba.job/1"]
    got = ichiba("job", "get", jobs[-1]["job"], "-o", build)
    assert got.returncode == 0, got.stderr
    return str(jobs[-1]["job"])


def links(ichiba: Ichiba, *folders: str) -> list[dict[str, Any]]:
    proved = ichiba("job", "proof", *folders, "--json")
    assert proved.returncode == 0, proved.stderr
    return [json.loads(line) for line in proved.stdout.splitlines()]


def test_a_job_is_trained_adapted_and_measured_and_its_proof_leads_back_to_the_seed(
    ichiba: Ichiba, tmp_path: Path
) -> None:
    trained = done(ichiba, tmp_path, kind="train", build="train", initial="seed")
    tuned = done(ichiba, tmp_path, kind="train", build="tune", initial=f"job:{trained[:10]}")
    done(ichiba, tmp_path, kind="evaluate", build="measure", initial="tune")  # by the folder of its result
    weights = {
        build: safetensors.parse((tmp_path / build / "weights.safetensors").read_bytes())
        for build in ("train", "tune", "measure")
    }
    for name in ("weight", "bias"):
        assert weights["tune"][name].tobytes() == weights["train"][name].tobytes(), "the base was frozen"
    assert weights["tune"]["up"].any(), "the adapters were trained"
    assert all(weights["measure"][name].tobytes() == array.tobytes() for name, array in weights["tune"].items())
    chain = links(ichiba, "measure", "tune", "train")
    assert [link["tensors_taken"] for link in chain] == [4, 2, None]
    assert [link["seeded"] for link in chain] == [False, False, True]
    assert chain[1]["job"] == tuned
    assert not any("comes from" in line for link in chain for line in link["not_proved"])
    broken = ichiba("job", "proof", "measure", "train")
    assert broken.returncode == 1
    assert "ended without 'down'" in broken.stderr or "started from state" in broken.stderr
    altered = tmp_path / "measure" / "result.safetensors"
    altered.write_bytes(altered.read_bytes()[:-1] + b"\x40")
    refused = ichiba("receipts", "verify", "measure")
    assert refused.returncode == 1
    assert "not the proved one" in refused.stderr
