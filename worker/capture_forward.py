"""Jobs that only run a model forward: evaluation, batch inference, generation, as Programs like any other. DESIGN §4.

Each is a step whose state holds the weights, which pass through unchanged, and `result.*` tensors that it fills: sums
of metrics, outputs row by row, tokens one by one. So segments, roots, checks, receipts and payment need nothing new,
and the last checkpoint is the result. The model runs in evaluation mode.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from protocol.errors import UnsupportedModel
from protocol.program import Init
from worker.capture import Captured, StepInputs, traced_lines

__all__ = ["FORWARD_KINDS", "Evaluation", "Generation", "Inference", "capture_forward", "prompts_of", "steps_of"]

RESULT = "result."
PROMPT = "prompt"  # the batch input of a generation: the same rows at every step
_GIVEN, _ZERO = Init.of("given"), Init.of("constant", 0.0)
_UNIFORM_MIN = 2.0**-25  # half the generator's step: stands for a draw of 0, whose logarithm is infinite
_TOP_K_MAX = 32


@dataclass(frozen=True)
class Evaluation:
    """The mean loss, and the means of more metrics, over a data set.

    loss: `loss(output, target)`, one number for the batch. example: one batch {"x": ..., "y": ...}. metrics: each
    `metric(output, target)`, one number for the batch. Results: result.NAME, float32, the sum over batches of each, and
    result.batches; a batch counts as one, so every batch has the same size (the batch rule `sequence` sees to it).
    """

    model: nn.Module
    loss: Callable[..., Tensor]
    example: Mapping[str, Tensor]
    metrics: Mapping[str, Callable[..., Tensor]] | None = None

    def measures(self) -> dict[str, Callable[..., Tensor]]:
        """The loss and the metrics, by name."""
        return {"loss": self.loss, **(self.metrics or {})}


@dataclass(frozen=True)
class Inference:
    """The model's output for each of `rows` rows of x. Result: result.output, float32 (rows, ...), in their order."""

    model: nn.Module
    example: Mapping[str, Tensor]
    rows: int


@dataclass(frozen=True)
class Generation:
    """Tokens after a prompt, one a step: the model maps int64 (batch, length) to scores (batch, length, symbols).

    prompt: int64 (batch, at least 1). tokens: how many to add; the job takes as many steps. temperature 0 takes the
    best symbol (the lowest of equal ones), else symbols are drawn by the Gumbel-max rule from the market's generator,
    among the `top_k` best if given. Without a cache of keys: each step runs the whole length. Result: result.tokens,
    int64 (batch, prompt + tokens). Source of the rule: Gumbel 1954; Maddison et al. 2014.
    """

    model: nn.Module
    prompt: Tensor
    tokens: int
    temperature: float = 1.0
    top_k: int | None = None


def steps_of(built: Any, size: int) -> int | None:
    """The steps that a job of `built` takes at `size` rows a batch; None if its data alone say."""
    if isinstance(built, Generation):
        return built.tokens
    return -(-built.rows // size) if isinstance(built, Inference) else None


def prompts_of(built: Generation) -> Tensor:
    """The data of a generation: its prompt once for every step, int64 (tokens * batch, length)."""
    return built.prompt.repeat(built.tokens, 1)


FORWARD_KINDS: dict[type, str] = {Evaluation: "evaluate", Inference: "infer", Generation: "generate"}
State = dict[str, Tensor]


class _Forward(ABC):
    """The step as a function of flat tensors: weights, results, batch, learning rate (unused), step key."""

    def __init__(self, built: Any, weights: list[str], results: list[str], batch: list[str]) -> None:
        self.built, self.weights, self.results, self.batch = built, weights, results, batch

    def __call__(self, *flat: Tensor) -> list[Tensor]:
        values = dict(zip([*self.weights, *self.results, *self.batch], flat, strict=False))
        weights = {name: values[name] for name in self.weights}
        with torch.no_grad(), traced_lines():
            results, loss = self.run(weights, {n: values[n] for n in self.results}, {n: values[n] for n in self.batch})
        return [*weights.values(), *(results[name] for name in self.results), loss.detach().reshape(())]

    def output(self, weights: State, x: Tensor) -> Tensor:
        """The model's output. Raises UnsupportedModel if it is no float32 tensor."""
        found = functional_call(self.built.model, dict(weights), (x,))
        if not isinstance(found, Tensor) or found.dtype != torch.float32:
            raise UnsupportedModel("the model's output is no float32 tensor", next_step="return one from forward")
        return found

    @abstractmethod
    def run(self, weights: State, results: State, batch: State) -> tuple[State, Tensor]:
        """New results, and the number that stands where a training step has its loss."""


class _Evaluate(_Forward):
    def run(self, weights: State, results: State, batch: State) -> tuple[State, Tensor]:
        """Add each measure of this batch to its sum."""
        x, *targets = batch.values()
        output = self.output(weights, x)
        new = {f"{RESULT}batches": results[f"{RESULT}batches"] + 1}
        measured = {}
        for name, measure in self.built.measures().items():
            value = measure(output, *targets)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise UnsupportedModel(f"metric {name} is not one number", next_step="return the mean over the batch")
            measured[name] = value.to(torch.float32).reshape(())
            new[f"{RESULT}{name}"] = results[f"{RESULT}{name}"] + measured[name]
        return new, measured["loss"]


class _Infer(_Forward):
    def run(self, weights: State, results: State, batch: State) -> tuple[State, Tensor]:
        """Move the rows up and write this batch's at the end: after the last step all stand in order."""
        output, before = self.output(weights, next(iter(batch.values()))), results[f"{RESULT}output"]
        return {f"{RESULT}output": torch.cat([before[output.shape[0] :], output])}, torch.zeros(())


class _Generate(_Forward):
    def run(self, weights: State, results: State, batch: State) -> tuple[State, Tensor]:
        """Write one token at the position; the number is the mean of -log of the chances of those written."""
        tokens, position = results[f"{RESULT}tokens"], results[f"{RESULT}position"]
        prompt = batch[PROMPT]
        places = torch.arange(tokens.shape[1]).reshape(1, -1)
        padded = nn.functional.pad(prompt, (0, tokens.shape[1] - prompt.shape[1]))
        tokens = torch.where(places < prompt.shape[1], padded, tokens)
        scores = self.output(weights, tokens)
        if scores.dim() != 3 or scores.shape[:2] != tokens.shape:
            raise UnsupportedModel(
                f"the model gives {tuple(scores.shape)} for tokens of {tuple(tokens.shape)}",
                next_step="return scores of (batch, length, symbols)",
            )
        at = (position - 1).reshape(1, 1, 1).expand(scores.shape[0], 1, scores.shape[2])
        scores = torch.gather(scores, 1, at).squeeze(1)
        wanted = scores
        if self.built.temperature > 0:
            wanted = scores / self.built.temperature
            if self.built.top_k is not None:
                least = torch.topk(wanted, self.built.top_k, dim=1).values[:, -1:]
                wanted = torch.where(wanted < least, torch.full((), -math.inf), wanted)
            uniform = torch.rand(wanted.shape)
            # Not added to every draw: the largest, 1 - 2**-24, would round to 1, and its noise would be infinite.
            uniform = torch.where(uniform == 0, torch.full_like(uniform, _UNIFORM_MIN), uniform)
            wanted = wanted - torch.log(-torch.log(uniform))
        chosen = torch.argmax(wanted, dim=1, keepdim=True)
        here = places == position
        chance = torch.gather(torch.log_softmax(scores, dim=1), 1, chosen)
        new = {f"{RESULT}tokens": torch.where(here, chosen, tokens), f"{RESULT}position": position + 1}
        return new, -chance.mean()


def _checked(built: Generation) -> Generation:
    prompt = built.prompt
    if prompt.dtype != torch.int64 or prompt.dim() != 2 or not prompt.numel():
        raise UnsupportedModel(
            f"the prompt is {prompt.dtype} {tuple(prompt.shape)}", next_step="give int64 tokens of (batch, length)"
        )
    if built.tokens < 1 or not 0 <= built.temperature < math.inf:
        raise UnsupportedModel(
            f"tokens={built.tokens}, temperature={built.temperature}", next_step="give tokens >= 1 and temperature >= 0"
        )
    if built.top_k is not None and not 1 <= built.top_k <= _TOP_K_MAX:
        raise UnsupportedModel(f"top_k is {built.top_k}", next_step=f"give 1 to {_TOP_K_MAX}, or leave it out")
    return built


def _planned(built: Any) -> tuple[type[_Forward], dict[str, tuple[Tensor, Init]], dict[str, Tensor]]:
    """(step, results with their init rules, batch inputs) of one of FORWARD_KINDS."""
    if isinstance(built, Evaluation):
        sums = {f"{RESULT}{name}": (torch.zeros(()), _ZERO) for name in [*built.measures(), "batches"]}
        return _Evaluate, sums, dict(built.example)
    if isinstance(built, Inference):
        if built.rows < 1:
            raise UnsupportedModel(f"rows is {built.rows}", next_step="give the number of rows of the data")
        with torch.no_grad():
            shape = built.model(next(iter(built.example.values()))).shape
        rows = torch.zeros((built.rows, *shape[1:]))
        return _Infer, {f"{RESULT}output": (rows, _ZERO)}, {"x": next(iter(built.example.values()))}
    _checked(built)
    rows, length = built.prompt.shape
    results = {
        f"{RESULT}tokens": (torch.zeros((rows, length + built.tokens), dtype=torch.int64), _ZERO),
        f"{RESULT}position": (torch.tensor(length), Init.of("constant", float(length))),
    }
    return _Generate, results, {PROMPT: built.prompt}


def capture_forward(built: Any, *, rules: Callable[[Tensor], Init | None] = lambda tensor: None) -> Captured:
    """One step of an Evaluation, Inference or Generation as a Program, like worker.capture.capture.

    Raises UnsupportedModel, with the operation and the user's line, for what no Program can hold.
    """
    built.model.eval()
    step_type, results, batch = _planned(built)
    inputs = StepInputs()
    weights = {**dict(built.model.named_parameters()), **dict(built.model.named_buffers())}
    parameters = {name for name, _ in built.model.named_parameters()}
    for name, tensor in weights.items():
        inputs.add(name, "parameter" if name in parameters else "buffer", tensor, rules(tensor) or _GIVEN)
    for name, (tensor, init) in results.items():
        inputs.add(name, "optimizer", tensor, init)
    inputs.finish(batch, 0.0)
    return inputs.captured(step_type(built, list(weights), list(results), list(batch)))
