"""The example models as the tests and the published vectors use them: built, and fed by our own generator alone.

torch.randn gives other bits under other instruction sets, so weights, batches and labels come from Philox.
"""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from protocol.program import Program
from worker import exact
from worker.capture import Captured, Training, capture_built
from worker.training import drawn

__all__ = ["EXAMPLES", "MODELS", "batch_of", "captured", "rate_of", "state_of"]

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
_BATCH_SEED, _STATE_SEED = 77, 78


@cache
def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / name / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _built(name: str) -> Callable[[], Training]:
    def build() -> Training:
        torch.manual_seed(0)
        training: Training = _module(name).build()
        return training

    return build


MODELS: dict[str, Callable[[], Training]] = {
    name: _built(name) for name in ("mlp", "cnn", "resnet", "gpt2", "llama", "vit", "lstm", "gru", "lora", "moe")
}


@cache
def captured(name: str) -> Captured:
    """The captured step of an example."""
    return capture_built(MODELS[name])


@cache
def _example(name: str) -> dict[str, Tensor]:
    return dict(MODELS[name]().example)


def batch_of(name: str, step: int) -> dict[str, Tensor]:
    """A batch of the example's shapes: numbers at random, the first classes as labels, that follow from the numbers.

    A float y is the first number of its row squashed; an integer y is where the largest of the row's first four lies;
    tokens count upwards from a random start, so that the next one can be learnt.
    """
    example = _example(name)
    x = example["x"]
    if not x.is_floating_point():
        start = (exact.uniform(_BATCH_SEED, step, 0, (x.shape[0], 1)) * 64).long()
        tokens = start + torch.arange(x.shape[1] + 1)
        return {"x": tokens[:, :-1].contiguous(), "y": tokens[:, 1:].contiguous()}
    x = exact.normal(_BATCH_SEED, step, 0, tuple(x.shape))
    rows = x.reshape(x.shape[0], -1)
    y = example["y"]
    if y.is_floating_point():
        target = (rows[:, 0] > 0).to(torch.float32)
        return {"x": x, "y": target.reshape(y.shape)}
    classes = 2 if name == "mlp" else 4
    return {"x": x, "y": torch.argmax(rows[:, :classes], 1)}


def state_of(program: Program) -> dict[str, Tensor]:
    """The first state: each tensor by its init rule, as a task with the seed _STATE_SEED draws it."""
    rules = {item.name: item for item in program.inputs if item.init is not None}
    return {item: drawn(rules[item], _STATE_SEED, index) for index, item in enumerate(sorted(rules))}


def rate_of(name: str) -> float:
    """The peak learning rate of the example's job.toml, as float32."""
    job = tomllib.loads((EXAMPLES / name / "job.toml").read_text())
    return float(torch.tensor(float(job["learning_rate"]["peak"]), dtype=torch.float32))
