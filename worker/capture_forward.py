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
from protocol.task import PRESENT
from worker.capture import Captured, StepInputs, traced_lines
from worker.lowering_indices import TOPK_MAX

__all__ = ["FORWARD_KINDS", "Evaluation", "Generation", "Inference", "capture_forward", "steps_of"]

RESULT = "result."
PROMPT = "prompt"  # the batch input of a generation: the same rows at every step
_GIVEN, _ZERO = Init.of("given"), Init.of("constant", 0.0)
_UNIFORM_MIN = 2.0**-25  # half the generator's step: stands for a draw of 0, whose logarithm is infinite


@dataclass(frozen=True)
class Evaluation:
    """The mean loss, and the means of more metrics, over a data set.

    loss: `loss(output, target)`. example: one batch {"x": ..., "y": ...}. metrics: each `metric(output, target)`. They
    return one value for each row, as with reduction="none" (more dimensions are averaged), or one number for the whole
    batch; with the latter every batch must be full. Results: result.NAME, float32 (2,), the sum over rows of each and
    the rounding errors it left out, and result.rows, int64.
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
    among the `top_k` best if given. context: the latest tokens that the model is shown, as many as it has positions;
    None shows it all. The model is causal, for places not yet written hold 0, and there is no cache of keys: each step
    runs the whole context. Result: result.tokens, int64 (batch, prompt + tokens). Source of the rule: Gumbel 1954;
    Maddison et al. 2014.
    """

    model: nn.Module
    prompt: Tensor
    tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    context: int | None = None


def steps_of(built: Any, size: int) -> int | None:
    """The steps that a job of `built` takes at `size` rows a batch; None if its data alone say."""
    if isinstance(built, Generation):
        return built.tokens
    return -(-built.rows // size) if isinstance(built, Inference) else None


FORWARD_KINDS: dict[type, str] = {Evaluation: "evaluate", Inference: "infer", Generation: "generate"}
State = dict[str, Tensor]


class _Forward(ABC):
    """The step as a function of flat tensors: weights, results, batch, learning rate (unused), step key."""

    def __init__(self, built: Any, weights: list[str], results: list[str], batch: list[str]) -> None:
        self.built, self.weights, self.results, self.batch = built, weights, results, batch

    def __call__(self, *flat: Tensor) -> list[Tensor]:
        values = dict(zip([*self.weights, *self.results, *self.batch], flat, strict=False))
        # A model may write to its buffers even in evaluation mode: it writes to copies, and the weights stay.
        weights = {name: values[name].clone() for name in self.weights}
        batch = {name: values[name] for name in self.batch}
        with torch.no_grad(), traced_lines():
            results, loss = self.run(weights, {name: values[name] for name in self.results}, batch, flat[-1][1])
        after = [*(values[name] for name in self.weights), *(results[name] for name in self.results)]
        return [*after, loss.detach().reshape(())]

    def output(self, weights: State, x: Tensor) -> Tensor:
        """The model's output. Raises UnsupportedModel if it is no float32 tensor."""
        found = functional_call(self.built.model, dict(weights), (x,))
        if not isinstance(found, Tensor) or found.dtype != torch.float32:
            raise UnsupportedModel("the model's output is no float32 tensor", next_step="return one from forward")
        return found

    @abstractmethod
    def run(self, weights: State, results: State, batch: State, step: Tensor) -> tuple[State, Tensor]:
        """New results, and the number that stands where a training step has its loss. step: its number, int64 ()."""


class _Evaluate(_Forward):
    def run(self, weights: State, results: State, batch: State, step: Tensor) -> tuple[State, Tensor]:
        """Add each measure of this batch's rows to its sum; the number is the mean loss of the batch."""
        present = batch.pop(PRESENT, None)
        x, *targets = batch.values()
        output, size = self.output(weights, x), x.shape[0]
        here = torch.full((), size) if present is None else present.sum()
        new, sums = {f"{RESULT}rows": results[f"{RESULT}rows"] + here}, {}
        for name, measure in self.built.measures().items():
            value = measure(output, *targets)
            _measured(name, value, size)
            value = value.to(torch.float32)
            if value.dim():
                each = value.reshape(size, -1).mean(1)
                sums[name] = (each if present is None else torch.where(present, each, torch.zeros_like(each))).sum()
            else:
                sums[name] = value * float(size)
            new[f"{RESULT}{name}"] = _two_sum(results[f"{RESULT}{name}"], sums[name])
        return new, sums["loss"] / here.to(torch.float32)


def _measured(name: str, value: Any, size: int) -> bool:
    """Whether a measure gave a value for each of `size` rows, or one number. Raises UnsupportedModel for neither."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == size:
        return True
    if isinstance(value, Tensor) and value.numel() == 1:
        return False
    raise UnsupportedModel(
        f"metric {name} is not one number, and not one for each of {size} rows",
        next_step='return a tensor of (rows,), as with reduction="none", or the mean over the batch',
    )


def _two_sum(sums: Tensor, added: Tensor) -> Tensor:
    """(sum, error) with `added` on it, without loss. Source: Knuth, TAOCP 2, 4.2.2, theorem B."""
    high, low = sums[0], sums[1]
    total = high + added
    part = total - high
    error = (high - (total - part)) + (added - part)
    return torch.stack([total, low + error])


class _Infer(_Forward):
    def run(self, weights: State, results: State, batch: State, step: Tensor) -> tuple[State, Tensor]:
        """Write each row's output to its place. Of a batch that is filled up only the real rows have one."""
        del batch[PRESENT]  # taken so that a program says it leaves the filling out
        output, before = self.output(weights, next(iter(batch.values()))), results[f"{RESULT}output"]
        size = output.shape[0]
        place = torch.arange(before.shape[0]) - step * size
        here = torch.logical_and(place >= 0, place < size)
        place = torch.where(here, place, torch.zeros_like(place))
        moved = nn.functional.embedding(place, output.reshape(size, -1)).reshape(before.shape)
        return {f"{RESULT}output": torch.where(here.reshape([-1] + [1] * (before.dim() - 1)), moved, before)}, (
            torch.zeros(())
        )


class _Generate(_Forward):
    def run(self, weights: State, results: State, batch: State, step: Tensor) -> tuple[State, Tensor]:
        """Write one token at the position; the number is the mean of -log of the chances of those written."""
        tokens, position = results[f"{RESULT}tokens"], results[f"{RESULT}position"]
        prompt = batch[PROMPT]
        places = torch.arange(tokens.shape[1]).reshape(1, -1)
        padded = nn.functional.pad(prompt, (0, tokens.shape[1] - prompt.shape[1]))
        tokens = torch.where(places < prompt.shape[1], padded, tokens)
        seen, at = self.shown(tokens, position)
        scores = self.output(weights, seen)
        if scores.dim() != 3 or scores.shape[:2] != seen.shape:
            raise UnsupportedModel(
                f"the model gives {tuple(scores.shape)} for tokens of {tuple(seen.shape)}",
                next_step="return scores of (batch, length, symbols)",
            )
        scores = torch.gather(scores, 1, at.reshape(1, 1, 1).expand(scores.shape[0], 1, scores.shape[2])).squeeze(1)
        chosen = self.chosen(scores)
        here = places == position
        chance = torch.gather(torch.log_softmax(scores, dim=1), 1, chosen)
        new = {f"{RESULT}tokens": torch.where(here, chosen, tokens), f"{RESULT}position": position + 1}
        return new, -chance.mean()

    def shown(self, tokens: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that the model is shown, int64 (batch, n), and the place of the last written among them."""
        length = min(self.built.context or tokens.shape[1], tokens.shape[1] - 1)  # the last is only ever written
        if length == tokens.shape[1] - 1:
            return tokens[:, :length], position - 1
        first = torch.maximum(position - length, torch.zeros_like(position))
        places = (first + torch.arange(length)).expand(tokens.shape[0], length)
        return torch.gather(tokens, 1, places), position - 1 - first

    def chosen(self, scores: Tensor) -> Tensor:
        """The symbol to write after each row: int64 (batch, 1). scores: float32 (batch, symbols)."""
        if self.built.temperature == 0:
            return torch.argmax(scores, dim=1, keepdim=True)
        best, names = scores, None
        if self.built.top_k is not None and self.built.top_k < scores.shape[1]:
            best, names = torch.topk(scores, self.built.top_k, dim=1)
        uniform = torch.rand(best.shape)
        # Not added to every draw: the largest, 1 - 2**-24, would round to 1, and its noise would be infinite.
        uniform = torch.where(uniform == 0, torch.full_like(uniform, _UNIFORM_MIN), uniform)
        drawn = torch.argmax(best / self.built.temperature - torch.log(-torch.log(uniform)), dim=1, keepdim=True)
        return drawn if names is None else torch.gather(names, 1, drawn)


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
    if built.top_k is not None and not 1 <= built.top_k <= TOPK_MAX:
        raise UnsupportedModel(f"top_k is {built.top_k}", next_step=f"give 1 to {TOPK_MAX}, or leave it out")
    if built.context is not None and built.context < 1:
        raise UnsupportedModel(f"context is {built.context}", next_step="give the model's number of positions")
    shown = min(built.context or prompt.shape[1] + built.tokens, prompt.shape[1] + built.tokens - 1)
    try:
        _tried(built.model, torch.zeros((prompt.shape[0], shown), dtype=torch.int64))
    except (IndexError, RuntimeError) as error:
        raise UnsupportedModel(
            f"the model does not take {shown} tokens: {str(error).splitlines()[0][:160]}",
            next_step="give context=, the number of its positions: it is then shown the latest so many tokens",
        ) from error
    return built


def _tried(model: nn.Module, x: Tensor) -> Any:
    """The model's output for the example, on copies of its buffers."""
    held = {name: tensor.clone() for name, tensor in model.named_buffers()}
    with torch.no_grad():
        return functional_call(model, held, (x,))


def _planned(built: Any) -> tuple[type[_Forward], dict[str, tuple[Tensor, Init]], dict[str, Tensor]]:
    """(step, results with their init rules, batch inputs) of one of FORWARD_KINDS."""
    if isinstance(built, Evaluation):
        measures, batch = built.measures(), dict(built.example)
        sums: dict[str, tuple[Tensor, Init]] = {f"{RESULT}{name}": (torch.zeros(2), _ZERO) for name in measures}
        sums[f"{RESULT}rows"] = (torch.zeros((), dtype=torch.int64), _ZERO)
        x, *targets = batch.values()
        output = _tried(built.model, x)
        by_row = [_measured(name, measure(output, *targets), x.shape[0]) for name, measure in measures.items()]
        if all(by_row):
            batch[PRESENT] = torch.ones(x.shape[0], dtype=torch.bool)
        return _Evaluate, sums, batch
    if isinstance(built, Inference):
        if built.rows < 1:
            raise UnsupportedModel(f"rows is {built.rows}", next_step="give the number of rows of the data")
        x = next(iter(built.example.values()))
        rows = torch.zeros((built.rows, *_tried(built.model, x).shape[1:]))
        batch = {"x": x, PRESENT: torch.ones(x.shape[0], dtype=torch.bool)}
        return _Infer, {f"{RESULT}output": (rows, _ZERO)}, batch
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
