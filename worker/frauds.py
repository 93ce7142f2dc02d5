"""How the frauds of worker/cheats.py are committed, one hook for each place where honest work could be otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protocol.stage import Stage
from worker import exact
from worker.executor import Executor, Kernel

__all__ = ["Fraud", "LowPrecision", "UnitFraud"]

RATE_ERROR = 1e-4  # the least that tolerant mode has to tell from honest noise
TF32_LOST_BITS = 13  # of the 23 of a float32's fraction

State = dict[str, Tensor]


@dataclass
class Fraud:
    """What one run does otherwise than its task says; nothing if `cheat` is None. Segments of one run in order.

    ends: the states at the start of the run and after its latest segments, of which an extrapolation takes two.
    """

    cheat: str | None
    ends: list[State] = field(default_factory=list)
    older: State | None = None  # the state before the latest step

    @property
    def executors(self) -> list[type[Executor]]:
        """What the first segment is computed with, and the others."""
        return [Executor, LowPrecision] if self.cheat == "low-precision" else [Executor]

    def _is(self, cheat: str, segment: int) -> bool:
        return self.cheat == cheat and segment > 0

    def begin(self, segment: int, state: State) -> State:
        """The state that the segment works on, `state` by its receipt.

        unproven-base works on all segments at once, each from the state that the run began with;
        extrapolated-checkpoint goes as far as the segment before it went, and takes no step at all.
        """
        if self.cheat == "unproven-base":
            self.ends = self.ends or [state]
            return self.ends[0]
        if self.cheat == "extrapolated-checkpoint":
            self.ends = [*self.ends[-1:], state]
        if self._extrapolates(segment):
            return {name: _ahead(self.ends[0][name], tensor) for name, tensor in state.items()}
        return state

    def _extrapolates(self, segment: int) -> bool:
        return self._is("extrapolated-checkpoint", segment) and len(self.ends) == 2

    def steps(self, segment: int, steps: range) -> range:
        """The steps that are really taken: skip-step omits the last one, stale-checkpoint all of them."""
        if self._is("stale-checkpoint", segment) or self._extrapolates(segment):
            return steps[:0]
        return steps[:-1] if self._is("skip-step", segment) else steps

    def data_of(self, segment: int, step: int, seed: int, *, last: bool) -> tuple[int, int]:
        """The step and the seed that a batch is drawn with: reordered-batches takes its neighbour's, in the order that
        its own loader gave; wrong-data draws other rows, wrong-batch those of the segment's last step alone."""
        step = step ^ 1 if self._is("reordered-batches", segment) else step
        wrong = self._is("wrong-data", segment) or (self._is("wrong-batch", segment) and last)
        return step, seed ^ 1 if wrong else seed

    def batch(self, segment: int, batch: dict[str, Tensor], *, first: bool) -> dict[str, Tensor]:
        """The batch of a step, with one label of each segment's first batch exchanged for another: wrong-label."""
        if not self._is("wrong-label", segment) or not first:
            return batch
        name = "y" if "y" in batch else [name for name, rows in sorted(batch.items()) if rows.dtype != torch.bool][-1]
        labels = batch[name].clone()
        flat = labels.reshape(-1)
        others = flat[flat != flat[0]]
        flat[0] = others[0] if others.numel() else flat[0] + 1
        return {**batch, name: labels}

    def rate(self, segment: int, rate: float) -> float:
        """The learning rate of a step, as a float32: wrong-rate is off by one in ten thousand."""
        return float(np.float32(rate * (1 + RATE_ERROR))) if self._is("wrong-rate", segment) else rate

    def reads(self, segment: int, state: State) -> State:
        """The state a step's gradient is taken at: with stale-gradient the one before the latest step, as two machines
        that take turns without waiting for each other would."""
        return self.older if self._is("stale-gradient", segment) and self.older is not None else state

    def after(self, read: State, state: State, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state after a step that read `read` where `state` was the latest, and gave `new`."""
        self.older = state if self.cheat == "stale-gradient" else None
        if read is state:
            return new
        return {name: _moved(state[name], read[name], tensor) for name, tensor in new.items()}


@dataclass
class UnitFraud:
    """What a unit of a parallel job does otherwise than its task says, from its second segment on; nothing if `cheat`
    is None. Its neighbours get what they wait for, and its roots tell truly what it sent."""

    cheat: str | None
    stage: Stage

    def sent(self, segment: int, step: int, value: int, tensor: Tensor) -> Tensor:
        """What goes to the neighbours in place of `tensor`, the Program's value of that number."""
        if self.cheat is None or segment == 0 or not tensor.is_floating_point():
            return tensor
        if self.cheat == "garbage-activations":
            return exact.normal(value, step, 0, tuple(tensor.shape))
        flows = {crossing.flow for crossing in self.stage.sends if crossing.value == value}
        return tensor if flows == {"forward"} else torch.zeros_like(tensor)

    def after(self, segment: int, state: State, new: State) -> State:
        """The state after a step from `state` that gave `new`."""
        return state if self.cheat == "skip-backward" and segment else new


def _moved(start: Tensor, since: Tensor, end: Tensor) -> Tensor:
    """`start` and the difference from `since` to `end`."""
    return end if start.dtype == torch.bool else start + (end - since)


def _ahead(before: Tensor, now: Tensor) -> Tensor:
    """The straight line through two tensors, as far again. What was never negative stays so: an optimizer's second
    moments must, or the next checker's step would diverge and tell everybody."""
    further = _moved(now, before, now)
    never = now.dtype != torch.bool and bool((now >= 0).all())
    return further.clamp_min(0) if never else further


class LowPrecision(Executor):
    """Products of operands rounded to TF32, ten bits of fraction, as a GPU's tensor cores do if nobody forbids it.

    Here it is emulated; on such a GPU it is what makes the fraud cheap.
    """

    def _planned(self, kernels: Mapping[str, Kernel]) -> list[Any]:
        return super()._planned({**kernels, **{op: _rounded(kernels[op]) for op in ("mm.default", "bmm.default")}})


def _rounded(product: Kernel) -> Kernel:
    return lambda a, b: product(_tf32(a), _tf32(b))


def _tf32(x: Tensor) -> Tensor:
    """float32 x, any shape, with its fraction rounded to ten bits, to nearest and ties to even."""
    bits = x.contiguous().view(torch.int32)
    half = (1 << (TF32_LOST_BITS - 1)) - 1 + ((bits >> TF32_LOST_BITS) & 1)
    return ((bits + half) >> TF32_LOST_BITS << TF32_LOST_BITS).view(torch.float32)
