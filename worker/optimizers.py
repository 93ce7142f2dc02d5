"""SGD, Adam, AdamW and Lion as functions of their state, so that an update is part of the graph.

The learning rate is an input of the step, and bias correction reads running powers of the betas kept as state:
`pow(beta, step)` gives other bits on other machines (a public bit-reproducible run forked there at its step 15,
NOTES), a product repeated each step does not. The formulas are those of torch.optim; the roundings are not, as
torch computes the scalars of a step in double precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from protocol.errors import UnsupportedModel
from protocol.program import Init

__all__ = ["FunctionalOptimizer", "Lion", "functional"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class _Group:
    """One parameter group: its options, and the names of its parameters in the state."""

    number: int
    options: Mapping[str, Any]
    names: tuple[str, ...]
    rate: float  # its learning rate relative to that of the first group


class FunctionalOptimizer(ABC):
    """An optimizer whose state is a flat dict of float32 tensors named `optimizer.<kind>.<parameter>`."""

    def __init__(self, groups: list[_Group]) -> None:
        self.groups = groups

    def initial(self, parameters: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Init]]:
        """The state before the first step, each tensor with its init rule."""
        state: dict[str, tuple[Tensor, Init]] = {}
        for group in self.groups:
            for name in group.names:
                for kind in self._slots(group):
                    zeros = torch.zeros_like(parameters[name], requires_grad=False)
                    state[f"optimizer.{kind}.{name}"] = (zeros, Init.of("constant", 0.0))
            for kind in self._powers():
                state[f"optimizer.{kind}.{group.number}"] = (torch.ones(()), Init.of("constant", 1.0))
        return state

    def update(
        self, parameters: Mapping[str, Tensor], grads: Mapping[str, Tensor], state: State, rate: Tensor
    ) -> tuple[State, State]:
        """New parameters and new state. `rate`: float32 scalar, the first group's. A parameter without a
        gradient keeps its value and its state, as in torch.optim."""
        new, kept = dict(parameters), dict(state)
        for group in self.groups:
            own_rate = rate if group.rate == 1 else rate * group.rate
            powers = self._advance(group, kept)
            for name in group.names:
                if name in grads:
                    grad = -grads[name] if group.options.get("maximize") else grads[name]
                    new[name] = self._step(group, name, new[name], grad, kept, own_rate, powers)
        return new, kept

    @abstractmethod
    def _slots(self, group: _Group) -> tuple[str, ...]:
        """The names of the state kept for each weight."""

    def _powers(self) -> tuple[str, ...]:
        return ()

    def _advance(self, group: _Group, state: State) -> tuple[Tensor, ...]:
        return ()

    @abstractmethod
    def _step(
        self,
        group: _Group,
        name: str,
        weight: Tensor,
        grad: Tensor,
        state: State,
        rate: Tensor,
        powers: tuple[Tensor, ...],
    ) -> Tensor:
        """The new weight; writes the new state of `name` into `state`."""


class _SGD(FunctionalOptimizer):
    """w -= rate * g, with momentum v = m v + g. Sutskever et al. 2013, as torch.optim.SGD states it."""

    def _slots(self, group: _Group) -> tuple[str, ...]:
        return ("momentum",) if group.options["momentum"] else ()

    def _step(
        self,
        group: _Group,
        name: str,
        weight: Tensor,
        grad: Tensor,
        state: State,
        rate: Tensor,
        powers: tuple[Tensor, ...],
    ) -> Tensor:
        decay, momentum = group.options["weight_decay"], group.options["momentum"]
        if decay:
            grad = grad + weight * decay
        if momentum:
            slot = f"optimizer.momentum.{name}"
            state[slot] = state[slot] * momentum + grad
            grad = grad + state[slot] * momentum if group.options["nesterov"] else state[slot]
        return weight - grad * rate


class _Adam(FunctionalOptimizer):
    """Kingma and Ba 2015, Algorithm 1; with `decoupled`, weight decay of Loshchilov and Hutter 2019."""

    def __init__(self, groups: list[_Group], *, decoupled: bool) -> None:
        super().__init__(groups)
        self.decoupled = decoupled

    def _slots(self, group: _Group) -> tuple[str, ...]:
        return ("mean", "square")

    def _powers(self) -> tuple[str, ...]:
        return ("beta1_power", "beta2_power")

    def _advance(self, group: _Group, state: State) -> tuple[Tensor, ...]:
        corrections = []
        for kind, beta in zip(self._powers(), group.options["betas"], strict=True):
            slot = f"optimizer.{kind}.{group.number}"
            state[slot] = state[slot] * beta
            corrections.append(1 - state[slot])
        # The two scalars every weight of the group shares: step size over the first, root of the second.
        return corrections[0], torch.sqrt(corrections[1])

    def _step(
        self,
        group: _Group,
        name: str,
        weight: Tensor,
        grad: Tensor,
        state: State,
        rate: Tensor,
        powers: tuple[Tensor, ...],
    ) -> Tensor:
        (beta1, beta2), decay = group.options["betas"], group.options["weight_decay"]
        if decay and self.decoupled:
            weight = weight * (1 - rate * decay)
        elif decay:
            grad = grad + weight * decay
        mean_slot, square_slot = f"optimizer.mean.{name}", f"optimizer.square.{name}"
        mean = state[mean_slot] = state[mean_slot] * beta1 + grad * (1 - beta1)
        square = state[square_slot] = state[square_slot] * beta2 + grad * grad * (1 - beta2)
        first, root = powers
        return weight - mean * (rate / first) / (torch.sqrt(square) / root + group.options["eps"])


class Lion(torch.optim.Optimizer):
    """Lion, which torch.optim lacks: w -= lr (sign(b1 m + (1 - b1) g) + decay w), then m = b2 m + (1 - b2) g.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, Algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        """Raises ValueError for numbers out of range."""
        if lr < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Lion with lr={lr}, betas={betas}, weight_decay={weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients that stand."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                new, mean_new = _lion(weight, weight.grad, mean, group["lr"], group["betas"], group["weight_decay"])
                weight.copy_(new)
                mean.copy_(mean_new)
        return loss


def _lion(
    weight: Tensor, grad: Tensor, mean: Tensor, rate: Any, betas: tuple[float, float], decay: float
) -> tuple[Tensor, Tensor]:
    """The new weight and mean. rate: a float, or a scalar tensor."""
    beta1, beta2 = betas
    direction = torch.sign(mean * beta1 + grad * (1 - beta1))
    if decay:
        weight = weight * (1 - rate * decay)
    return weight - direction * rate, mean * beta2 + grad * (1 - beta2)


class _Lion(FunctionalOptimizer):
    def _slots(self, group: _Group) -> tuple[str, ...]:
        return ("mean",)

    def _step(
        self,
        group: _Group,
        name: str,
        weight: Tensor,
        grad: Tensor,
        state: State,
        rate: Tensor,
        powers: tuple[Tensor, ...],
    ) -> Tensor:
        slot, options = f"optimizer.mean.{name}", group.options
        weight, state[slot] = _lion(weight, grad, state[slot], rate, options["betas"], options["weight_decay"])
        return weight


def functional(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> FunctionalOptimizer:
    """`optimizer` as a function. names: the state name of each parameter by its id().

    Raises UnsupportedModel for another optimizer, for one that has already stepped, and for options whose
    arithmetic is not implemented.
    """
    kinds = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, Lion)
    if type(optimizer) not in kinds:
        raise UnsupportedModel(
            f"optimizer {type(optimizer).__module__}.{type(optimizer).__name__} is not supported",
            next_step="use torch.optim.SGD, Adam or AdamW, or ichiba.Lion",
        )
    if optimizer.state:
        raise UnsupportedModel("the optimizer has already taken steps", next_step="return a fresh one from build()")
    groups = []
    first_rate = float(optimizer.param_groups[0]["lr"])
    for number, options in enumerate(optimizer.param_groups):
        for option in ("amsgrad", "dampening", "differentiable"):
            if options.get(option):
                raise UnsupportedModel(
                    f"option {option}={options[option]} of {type(optimizer).__name__} is not supported",
                    next_step=f"leave {option} out",
                )
        unknown = [p for p in options["params"] if id(p) not in names]
        if unknown:
            raise UnsupportedModel(
                f"the optimizer holds a parameter of shape {tuple(unknown[0].shape)} that is not the model's",
                next_step="pass model.parameters() to the optimizer",
            )
        rate = float(options["lr"])
        if rate != first_rate and first_rate == 0:
            raise UnsupportedModel("the first parameter group has the learning rate 0 and others do not")
        members = tuple(names[id(p)] for p in options["params"])
        groups.append(_Group(number, options, members, 1.0 if rate == first_rate else rate / first_rate))
    if isinstance(optimizer, torch.optim.SGD):
        return _SGD(groups)
    if isinstance(optimizer, Lion):
        return _Lion(groups)
    return _Adam(
        groups,
        decoupled=isinstance(optimizer, torch.optim.AdamW)
        or bool(optimizer.param_groups[0].get("decoupled_weight_decay")),
    )
