"""Optimizers, clipping, accumulation and tied weights: the captured step is the one a user's own loop takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import ichiba
from protocol.errors import UnsupportedModel
from protocol.program import Program
from worker import checkpoint, exact
from worker.executor import Executor


class Tied(nn.Module):
    """A bag of tokens whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(x).mean(1))))


def batch(step: int) -> dict[str, Tensor]:
    x = (exact.uniform(5, step, 0, (8, 4)) * 11).long()
    return {"x": x, "y": x[:, 0].clone()}


def model() -> Tied:
    torch.manual_seed(0)
    return Tied()


def eager(
    make: Callable[[Any], torch.optim.Optimizer], steps: int, accumulate: int, clip: Callable[[nn.Module], Any]
) -> tuple[dict[str, Tensor], list[float]]:
    """The user's own loop."""
    trained = model()
    optimizer = make(trained.parameters())
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        whole = batch(step)
        total = 0.0
        for x, y in zip(whole["x"].chunk(accumulate), whole["y"].chunk(accumulate), strict=True):
            loss = F.cross_entropy(trained(x), y) / accumulate
            loss.backward()
            total += float(loss.detach())
        clip(trained)
        optimizer.step()
        losses.append(total)
    return {name: p.detach() for name, p in trained.named_parameters()}, losses


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "lion": lambda p: ichiba.Lion(p, lr=0.01, weight_decay=0.1),
}


def captured_run(
    make: Callable[[Any], torch.optim.Optimizer], steps: int, mode: Any, **options: Any
) -> tuple[dict[str, Tensor], list[float]]:
    trained = model()
    optimizer = make(trained.parameters())
    rate = float(optimizer.param_groups[0]["lr"])
    captured = ichiba.capture(trained, F.cross_entropy, optimizer, batch(0), **options)
    executor, state, losses = Executor(captured.program, mode), captured.initial_state, []
    for step in range(steps):
        state, loss = executor.step(state, batch(step), rate, 0, step)
        losses.append(loss)
    return state, losses


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MAKERS)
def test_each_optimizer_takes_the_steps_of_its_eager_form(name: str) -> None:
    expected, losses = eager(MAKERS[name], 6, 1, lambda m: None)
    found, own = captured_run(MAKERS[name], 6, "native")
    agree(found, expected, 2e-5)
    assert own == pytest.approx(losses, rel=1e-5)
    # Lion's sign turns at a gradient of zero, so its exact run is compared by its losses alone.
    _, exact_losses = captured_run(MAKERS[name], 6, "exact")
    assert exact_losses == pytest.approx(losses, rel=2e-3)


CLIPS: dict[str, tuple[dict[str, float], Callable[[nn.Module], Any]]] = {
    "norm": ({"clip_norm": 0.05}, lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.05)),
    "norm above": ({"clip_norm": 1e6}, lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e6)),
    "value": ({"clip_value": 0.002}, lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.002)),
}


@pytest.mark.parametrize("name", CLIPS)
def test_clipped_gradients_are_torchs(name: str) -> None:
    options, clip = CLIPS[name]
    expected, losses = eager(MAKERS["sgd"], 5, 1, clip)
    found, own = captured_run(MAKERS["sgd"], 5, "native", **options)
    agree(found, expected, 1e-5)
    assert own == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_micro_batches_make_one_step(parts: int) -> None:
    expected, losses = eager(MAKERS["adamw"], 5, parts, lambda m: None)
    found, own = captured_run(MAKERS["adamw"], 5, "native", accumulate=parts)
    agree(found, expected, 2e-5)
    assert own == pytest.approx(losses, rel=1e-5)


def test_a_tied_weight_stands_in_the_state_once_and_trains_as_one() -> None:
    trained = model()
    captured = ichiba.capture(trained, F.cross_entropy, MAKERS["sgd"](trained.parameters()), batch(0))
    weights = {item.name for item in captured.program.inputs_of("parameter")}
    assert weights == {"embed.weight", "mix.weight", "mix.bias"}
    state, _ = Executor(captured.program, "exact").step(captured.initial_state, batch(0), 0.1, 0, 0)
    assert not torch.equal(state["embed.weight"], captured.initial_state["embed.weight"])


REFUSED: dict[str, dict[str, Any]] = {
    "both": {"clip_norm": 1.0, "clip_value": 1.0},
    "clip_norm is 0": {"clip_norm": 0.0},
    "clip_value is nan": {"clip_value": float("nan")},
    "accumulate is 0": {"accumulate": 0},
    "3 equal micro-batches": {"accumulate": 3},
}


@pytest.mark.parametrize("said", REFUSED)
def test_options_that_mean_nothing_are_refused(said: str) -> None:
    trained = model()
    with pytest.raises(UnsupportedModel, match=said) as refused:
        ichiba.capture(trained, F.cross_entropy, MAKERS["sgd"](trained.parameters()), batch(0), **REFUSED[said])
    assert refused.value.next_step


def test_an_optimizer_of_somebody_elses_is_refused_with_what_to_use() -> None:
    class Own(torch.optim.SGD):
        pass

    trained = model()
    with pytest.raises(UnsupportedModel, match="Own") as refused:
        ichiba.capture(trained, F.cross_entropy, Own(trained.parameters(), lr=0.1), batch(0))
    assert "ichiba.Lion" in refused.value.next_step


def test_lion_refuses_numbers_out_of_range() -> None:
    with pytest.raises(ValueError, match="betas"):
        ichiba.Lion(model().parameters(), betas=(0.9, 1.0))


def test_a_capture_is_saved_as_a_program_and_its_first_state(tmp_path: Path) -> None:
    trained = model()
    captured = ichiba.capture(trained, F.cross_entropy, MAKERS["adam"](trained.parameters()), batch(0))
    captured.save(tmp_path / "job")
    program = Program.from_bytes((tmp_path / "job" / "model.program").read_bytes())
    state = checkpoint.load((tmp_path / "job" / "initial.safetensors").read_bytes())
    assert program.to_bytes() == captured.program.to_bytes()
    assert checkpoint.state_root(state) == checkpoint.state_root(captured.initial_state)


def test_the_door_names_what_it_has() -> None:
    assert all(hasattr(ichiba, name) for name in ichiba.__all__)
    with pytest.raises(AttributeError, match="capture"):
        ichiba.nothing  # noqa: B018
