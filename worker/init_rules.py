"""How a model's weights started, so that strangers can draw them again from the task's seed.

A dispatch mode watches a `build()` factory run and keeps, for each storage, the rule that filled the whole of it:
a constant, a normal or a uniform draw, also scaled or shifted. What was filled in any other way has no rule; a
task with such a weight must bring a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from protocol.program import Init

__all__ = ["record_init"]

aten = torch.ops.aten

_CREATED: dict[Any, tuple[Any, ...]] = {
    aten.zeros.default: ("constant", 0.0),
    aten.zeros_like.default: ("constant", 0.0),
    aten.new_zeros.default: ("constant", 0.0),
    aten.ones.default: ("constant", 1.0),
    aten.ones_like.default: ("constant", 1.0),
    aten.new_ones.default: ("constant", 1.0),
    aten.randn.default: ("normal", 0.0, 1.0),
    aten.randn_like.default: ("normal", 0.0, 1.0),
    aten.rand.default: ("uniform", 0.0, 1.0),
    aten.rand_like.default: ("uniform", 0.0, 1.0),
}


def record_init(build: Callable[[], Any]) -> tuple[Any, Callable[[Tensor], Init | None]]:
    """What `build()` returns, and a function that gives the init rule of a tensor made in it, or None."""
    with _Recorder() as recorder:
        built = build()
    return built, recorder.rule_of


class _Recorder(TorchDispatchMode):
    """The rule of each storage seen. Tensors are kept alive, so that no storage's identity is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self._rules: dict[int, Init] = {}
        self._alive: list[Tensor] = []

    def rule_of(self, tensor: Tensor) -> Init | None:
        """The rule that filled `tensor`, if it fills its storage and nothing else wrote there."""
        return self._rules.get(_storage(tensor)) if _whole(tensor) else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = self.rule_of(args[0]) if args and isinstance(args[0], Tensor) else None
        out = func(*args, **kwargs)
        written: list[Tensor] = []
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and value is not None:
                written.extend([value] if isinstance(value, Tensor) else value)
        for tensor in written:
            # What is written through `out=` or as one of several has no rule: `before` is not about it.
            self._set(tensor, _rule(func, args, kwargs, before) if args and tensor is args[0] else None)
        if not written and isinstance(out, Tensor) and (not args or out is not args[0]):
            fresh = not any(argument.alias_info for argument in func._schema.arguments)
            if fresh:
                self._set(out, _rule(func, args, kwargs, before))
        return out

    def _set(self, tensor: Tensor, rule: Init | None) -> None:
        self._alive.append(tensor.detach())
        if rule is not None and _whole(tensor) and (tensor.dtype == torch.float32 or _small(rule)):
            self._rules[_storage(tensor)] = rule
        else:
            self._rules.pop(_storage(tensor), None)


def _small(rule: Init) -> bool:
    return rule.kind == "constant" and rule.a.is_integer() and 0 <= rule.a < 128


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _whole(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _rule(func: Any, args: Any, kwargs: Any, before: Init | None) -> Init | None:
    """The rule of the result of one operation; `before`: the rule of its first argument."""
    if func in _CREATED:
        return Init.of(*_CREATED[func])
    if func in (aten.full.default, aten.full_like.default):
        return Init.of("constant", float(args[1]))
    if func == aten.scalar_tensor.default:
        return Init.of("constant", float(args[0]))
    if func in (aten.zero_.default, aten.fill_.Scalar):
        return Init.of("constant", float(args[1]) if len(args) > 1 else 0.0)
    if func in (aten.normal_.default, aten.uniform_.default):
        options = {"mean": 0.0, "std": 1.0} if func == aten.normal_.default else {"from": 0.0, "to": 1.0}
        options.update(zip(options, map(float, args[1:]), strict=False))
        options.update((name, float(value)) for name, value in kwargs.items() if name in options)
        return Init.of("normal" if func == aten.normal_.default else "uniform", *options.values())
    if func in (aten.clone.default, aten.detach.default, aten.alias.default):
        return before
    if before is None or len(args) < 2 or isinstance(args[1], Tensor):
        return None
    return _affine(func, before, float(args[1])) if isinstance(args[1], int | float) else None


def _affine(func: Any, before: Init, number: float) -> Init | None:
    if func in (aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar):
        factor, shift = number, 0.0
    elif func in (aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar) and number != 0:
        factor, shift = 1 / number, 0.0
    elif func in (aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar, aten.add_.Scalar):
        factor, shift = 1.0, number
    elif func in (aten.sub.Tensor, aten.sub_.Tensor, aten.sub.Scalar, aten.sub_.Scalar):
        factor, shift = 1.0, -number
    else:
        return None
    a = before.a * factor + shift
    if before.kind == "normal":
        return Init.of("normal", a, abs(before.b * factor))
    if before.kind == "uniform":
        low, high = sorted((a, before.b * factor + shift))
        return Init.of("uniform", low, high)
    return Init.of("constant", a)
