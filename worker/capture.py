"""Capture: one training step of ordinary PyTorch becomes a Program. DESIGN §4.

The step (forward, backward, optimizer) is traced twice: first as PyTorch runs it, with the user's line at each
operation, then without mutation and lowered to the allow-list. Nothing of the user's Python survives but file
names and line numbers. Runs on the submitter's machine only: it executes the submitter's own code.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, fx, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from protocol.errors import UnsupportedModel
from protocol.operations import ITEM_BYTES
from protocol.program import STATE_ROLES, Init, Input, Program
from worker import (
    checkpoint,
    lowering,
    lowering_images,
    lowering_indices,
    lowering_pointwise,
    lowering_random,
    lowering_sorting,
)
from worker.assembly import TRANSLATED, assemble
from worker.init_rules import record_init
from worker.optimizers import FunctionalOptimizer, functional

__all__ = ["Captured", "StepInputs", "Training", "capture", "capture_built", "traced_lines"]

_GIVEN = Init.of("given")
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LOWERINGS = {
    os.path.abspath(module.__file__ or "")
    for module in (
        lowering, lowering_images, lowering_indices, lowering_pointwise, lowering_random, lowering_sorting
    )
}
_OWN_FILES = {_OURS + name for name in ("capture.py", "capture_forward.py", "optimizers.py")} | _LOWERINGS
_SITE = os.path.join(sys.prefix, "lib") + os.sep
_FRAME = re.compile(r'File "([^"\n]+)", line (\d+)')


@dataclass(frozen=True)
class Training:
    """What a `build()` factory returns: all of one training job but its data.

    loss: `loss(output, target)` or, if its first argument is called `model`, `loss(model, batch)`.
    example: {"x": ..., "y": ...}, one batch of the size and dtypes the job will use.
    accumulate, clip_norm, clip_value: as `capture` has them.
    """

    model: nn.Module
    loss: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer
    example: Mapping[str, Tensor]
    accumulate: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None


@dataclass(frozen=True)
class Captured:
    """A Program and the state its inputs start from when the model's own weights are taken."""

    program: Program
    initial_state: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Write `model.program` and `initial.safetensors`, which a job.toml beside them may name. Raises OSError."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.program").write_bytes(self.program.to_bytes())
        (folder / "initial.safetensors").write_bytes(checkpoint.dump(self.initial_state))


def capture_built(build: Callable[[], Any]) -> Captured:
    """`capture` of what `build()` returns (attributes model, loss, optimizer, example), with its init rules."""
    from worker.capture_forward import FORWARD_KINDS, capture_forward  # which needs this module's trace

    built, rules = record_init(build)
    if type(built) in FORWARD_KINDS:
        return capture_forward(built, rules=rules)
    for name in ("model", "loss", "optimizer", "example"):
        if not hasattr(built, name):
            raise UnsupportedModel(
                f"build() returned a {type(built).__name__} without `{name}`",
                next_step="return worker.capture.Training(model, loss, optimizer, example)",
            )
    options = {name: getattr(built, name) for name in ("accumulate", "clip_norm", "clip_value") if hasattr(built, name)}
    return capture(built.model, built.loss, built.optimizer, built.example, rules=rules, **options)


def capture(
    model: nn.Module,
    loss: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    example_batch: Mapping[str, Tensor] | tuple[Tensor, ...],
    *,
    rules: Callable[[Tensor], Init | None] = lambda tensor: None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    clip_value: float | None = None,
) -> Captured:
    """One step of training `model` as a Program. rules: the init rule of a tensor, if it is known.

    accumulate: micro-batches that the batch is cut into along its first dimension, their gradients averaged before the
    one update. clip_norm: gradients are scaled so that their common 2-norm is at most this, clip_value: each is cut to
    this magnitude, as torch.nn.utils.clip_grad_norm_ and clip_grad_value_ do; not both.
    Raises UnsupportedModel, with the operation and the user's line, for what no Program can hold.
    """
    if isinstance(example_batch, tuple):
        example_batch = dict(zip(("x", "y", "z"), example_batch, strict=False))
    batch = {name: tensor.detach() for name, tensor in example_batch.items()}
    gradients = _Gradients(accumulate, clip_norm, clip_value)
    gradients.check(batch)
    parameters = dict(model.named_parameters())  # a tied weight once, under its first name
    buffers = dict(model.named_buffers())
    functional_optimizer = functional(optimizer, {id(p): name for name, p in parameters.items()})
    slots = functional_optimizer.initial(parameters)
    inputs = StepInputs()
    for name, tensor in parameters.items():
        inputs.add(name, "parameter" if tensor.requires_grad else "buffer", tensor, rules(tensor) or _GIVEN)
    for name, tensor in buffers.items():
        inputs.add(name, "buffer", tensor, rules(tensor) or _GIVEN)
    for name, (tensor, init) in slots.items():
        inputs.add(name, "optimizer", tensor, init)
    inputs.finish(batch, float(optimizer.param_groups[0]["lr"]))
    names = (list(parameters), list(buffers), list(slots), list(batch))
    step = _Step(model, loss, functional_optimizer, gradients, *names)
    return inputs.captured(step)


class StepInputs:
    """What a step takes, in order: the state, then the batch, the learning rate and the step key."""

    def __init__(self) -> None:
        self.inputs: list[Input] = []
        self.tensors: list[Tensor] = []

    def add(self, name: str, role: Any, tensor: Tensor, init: Init | None) -> None:
        """One input. Raises UnsupportedModel for a dtype that no Program has."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in ITEM_BYTES:
            raise UnsupportedModel(f"{role} {name} is {dtype}", next_step="convert it to float32 or int64")
        self.inputs.append(Input(name, role, dtype, tuple(tensor.shape), init))  # type: ignore[arg-type]
        self.tensors.append(tensor.detach().clone())

    def finish(self, batch: Mapping[str, Tensor], rate: float) -> None:
        """The inputs that are no state. Raises UnsupportedModel if one has the name of a state tensor."""
        known = {item.name for item in self.inputs}
        for name, tensor in batch.items():
            if name in known:
                raise UnsupportedModel(
                    f"{name} names both a tensor of the model and one of the batch", next_step="rename the batch's"
                )
            self.add(name, "batch", tensor, None)
        self.add("ichiba.learning_rate", "learning_rate", torch.tensor(rate), None)
        self.add("ichiba.step_key", "step_key", torch.zeros(2, dtype=torch.int64), None)

    def captured(self, step: Callable[..., list[Tensor]]) -> Captured:
        """`step`, which gives the new state in the order it was added and then the loss, as a Program."""
        state = [item.name for item in self.inputs if item.role in STATE_ROLES]
        program = assemble(_trace(step, self.tensors), self.inputs, state, _source_of)
        return Captured(program, dict(zip(state, self.tensors, strict=False)))


@dataclass(frozen=True)
class _Gradients:
    """What lies between the losses' gradients and the optimizer; see `capture`."""

    accumulate: int
    clip_norm: float | None
    clip_value: float | None

    def check(self, batch: Mapping[str, Tensor]) -> None:
        """Raises UnsupportedModel for numbers that mean nothing and batches that cannot be cut."""
        if self.clip_norm is not None and self.clip_value is not None:
            raise UnsupportedModel("clip_norm and clip_value are both given", next_step="leave one out")
        for name in ("clip_norm", "clip_value"):
            limit = getattr(self, name)
            if limit is not None and not 0 < limit < float("inf"):
                raise UnsupportedModel(f"{name} is {limit}", next_step=f"give a positive number, or leave {name} out")
        if self.accumulate < 1:
            raise UnsupportedModel(f"accumulate is {self.accumulate}", next_step="give the number of micro-batches")
        for name, tensor in batch.items():
            if self.accumulate > 1 and (not tensor.dim() or tensor.shape[0] % self.accumulate):
                raise UnsupportedModel(
                    f"batch input {name} of shape {tuple(tensor.shape)} is not {self.accumulate} equal micro-batches",
                    next_step="make the batch size a multiple of accumulate",
                )

    def cut(self, batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The micro-batches."""
        if self.accumulate == 1:
            return [dict(batch)]
        parts = {name: tensor.chunk(self.accumulate) for name, tensor in batch.items()}
        return [{name: tensors[i] for name, tensors in parts.items()} for i in range(self.accumulate)]

    def clip(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradients within their limit. Pascanu et al. 2013, as torch.nn.utils.clip_grad_norm_ states it."""
        if self.clip_value is not None:
            return {name: grad.clamp(-self.clip_value, self.clip_value) for name, grad in grads.items()}
        if self.clip_norm is None:
            return grads
        squares = [(grad * grad).sum() for grad in grads.values()]
        norm = torch.sqrt(torch.stack(squares).sum())
        scale = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        return {name: grad * scale for name, grad in grads.items()}


def traced_lines() -> TorchDispatchMode:
    """Within, each operation that is traced keeps the user's line that called it."""
    return _Lines()


class _Step:
    """The whole step as a function of flat tensors: parameters, buffers, slots, batch, rate, step key."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        optimizer: FunctionalOptimizer,
        gradients: _Gradients,
        parameters: list[str],
        buffers: list[str],
        slots: list[str],
        batch: list[str],
    ) -> None:
        self.model, self.loss, self.optimizer, self.gradients = model, loss, optimizer, gradients
        self.trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self.names = [*parameters, *buffers, *slots, *batch]
        self.parameters, self.buffers, self.slots, self.batch = parameters, buffers, slots, batch

    def __call__(self, *flat: Tensor) -> list[Tensor]:
        values = dict(zip(self.names, flat, strict=False))
        rate = flat[-2]
        leaves = {name: values[name].detach() for name in self.parameters}
        for name in self.trained:
            leaves[name].requires_grad_()
        # Batch norm and its like change buffers in place: let them change copies.
        buffers = {name: values[name].clone() for name in self.buffers}
        batch = {name: values[name] for name in self.batch}
        losses: list[Tensor] = []
        grads: dict[str, Tensor] = {}
        for part in self.gradients.cut(batch):
            value = self._loss(leaves, buffers, part)
            trained = [name for name in self.parameters if name in self.trained]
            with _backward_lines(value):
                found = torch.autograd.grad(value, [leaves[name] for name in trained], allow_unused=True)
            for name, grad in zip(trained, found, strict=True):
                if grad is not None:
                    grads[name] = grads[name] + grad if name in grads else grad
            losses.append(value.detach().reshape(()))
        count = len(losses)
        if count > 1:
            grads = {name: grad / count for name, grad in grads.items()}
        with _Lines():
            grads = self.gradients.clip(grads)
        mean = losses[0] if count == 1 else torch.stack(losses).sum() / count
        old = {name: values[name] for name in self.parameters}
        slots = {name: values[name] for name in self.slots}
        with _Lines():
            new, slots = self.optimizer.update(old, grads, slots, rate)
        state = [*(new[n] for n in self.parameters), *(buffers[n] for n in self.buffers), *slots.values()]
        return [*state, mean]

    def _loss(self, leaves: dict[str, Tensor], buffers: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        whole = _WithLoss(self.model, self.loss)
        placed = {f"model.{name}": tensor for name, tensor in {**leaves, **buffers}.items()}
        with _Lines():
            value = functional_call(whole, placed, (batch,))
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise UnsupportedModel(
                "the loss is not one number that depends on the parameters",
                next_step="return a scalar tensor from the loss",
            )
        return value


class _WithLoss(nn.Module):
    """The model with its loss behind one `forward(batch)`, so that one functional_call reaches both."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss_function = loss

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of one batch."""
        if _takes_model(self.loss_function):
            return self.loss_function(self.model, dict(batch))
        x, *targets = batch.values()
        return self.loss_function(self.model(x), *targets)


def _takes_model(loss: Callable[..., Tensor]) -> bool:
    if isinstance(loss, nn.Module):
        return False
    try:
        names = list(inspect.signature(loss).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    return bool(names) and names[0] == "model"


class _Lines(TorchDispatchMode):
    """Gives each operation traced within the user's line that called it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        line = _calling_line()
        # Only around this one call: autograd, above us, must still record real tracebacks for the gradients.
        with fx_traceback.preserve_node_meta():
            fx_traceback.current_meta["stack_trace"] = line
            return func(*args, **(kwargs or {}))


def _calling_line() -> str:
    """Base name and line of the innermost frame of the user's within the step; `optimizer` within an update."""
    frame, library = sys._getframe(2), ""
    while frame is not None and frame.f_code is not _Step.__call__.__code__:
        name = frame.f_code.co_filename
        if name == _OURS + "optimizers.py":
            return "optimizer"
        if name not in _OWN_FILES and not name.startswith((_TORCH, "<")):
            line = f"{os.path.basename(name)}:{frame.f_lineno}"
            if not name.startswith(_SITE):
                return line
            library = library or line
        frame = frame.f_back  # type: ignore[assignment]
    return library


@contextmanager
def _backward_lines(loss: Tensor) -> Iterator[None]:
    """While the gradients of `loss` are traced, give each operation the line of its forward operation."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        lines = _line_of_text("".join(node.metadata.get("traceback_", ())))
        node.register_prehook(lambda grads, lines=lines: fx_traceback.current_meta.update(stack_trace=lines))
        waiting.extend(following for following, _ in node.next_functions)
    with fx_traceback.preserve_node_meta():
        yield


class _Replay(fx.Interpreter):
    """Runs the first trace again, remembering which of its nodes is at work."""

    at: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        """One node, remembered while it runs."""
        self.at = n
        return super().run_node(n)


def _trace(step: Callable[..., list[Tensor]], tensors: list[Tensor]) -> fx.GraphModule:
    # The tracer describes each value in the fake mode at hand; without one it makes one for each value, each with the
    # stack at that moment: a fifth of a capture.
    shapes = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng(devices=[]), tracing(shapes):
        warnings.simplefilter("ignore")
        try:
            with (
                torch.autograd.set_detect_anomaly(True, check_nan=False),
                torch.backends.mkldnn.flags(enabled=False),  # its fused LSTM is one opaque operation
                lowering_indices.shape_known_functions(),
            ):
                # Batch norm writes its running sums; only our form of it says so in a way functionalize sees.
                table: dict[Any, Callable[..., Any]] = {torch.ops.aten.native_batch_norm.default: lowering.batch_norm}
                first = make_fx(step, decomposition_table=table)(*tensors)
        except UnsupportedModel as error:
            line = _line_of_error(error)
            if not line:  # about the loss or the batch, not about a line of the model
                raise
            raise UnsupportedModel(f"{error.what} ({line})", why=error.why, next_step=error.next_step) from error
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise UnsupportedModel(
                f"the step cannot be traced: {str(error).splitlines()[0][:200]}",
                why=f"raised at {_line_of_error(error) or 'an unknown line'}",
                next_step="run model and loss once on the example batch; a step may not branch on tensor values",
            ) from error
        replay = _Replay(first)

        def lowered(*flat: Tensor) -> Any:
            with lowering_random.random_key(flat[-1]):
                return functionalize(replay.run, remove="mutations")(*flat)

        try:
            with fx_traceback.preserve_node_meta():
                graph = make_fx(lowered, decomposition_table=_table())(*tensors)
        except UnsupportedModel as error:
            line = _source_of(replay.at) if replay.at is not None else ""
            raise UnsupportedModel(
                f"{error.what} ({line or 'line unknown'})", why=error.why, next_step=error.next_step
            ) from error
    graph.graph.eliminate_dead_code()
    return graph


def _table() -> dict[Any, Callable[..., Any]]:
    """Our lowerings over PyTorch's core decompositions."""
    from torch._decomp import core_aten_decompositions

    core = {op: rule for op, rule in core_aten_decompositions().items() if op not in TRANSLATED}
    return {**core, **lowering.LOWERINGS}


def _user_frame(frames: list[tuple[str, int]]) -> str:
    """The innermost frame that is the user's, as base name and line; frames outside our step do not count."""
    frames = [frame for frame in frames if frame[0] not in _LOWERINGS]  # those stand between the user's and torch's
    inside = [place for place, (name, _) in enumerate(frames) if name in _OWN_FILES]
    if inside:
        if frames[inside[-1]][0].endswith("optimizers.py"):
            return "optimizer"
        frames = frames[inside[-1] + 1 :]
    own = [frame for frame in frames if not frame[0].startswith((_TORCH, "<"))]
    outside = [frame for frame in own if not frame[0].startswith(_SITE)]
    for name, line in reversed(outside or own):
        return f"{os.path.basename(name)}:{line}"
    return ""


def _source_of(node: fx.Node) -> str:
    return str(node.meta.get("stack_trace") or "")


def _line_of_text(text: str) -> str:
    return _user_frame([(name, int(line)) for name, line in _FRAME.findall(text)])


def _line_of_error(error: BaseException) -> str:
    frames = [
        (frame.filename, frame.lineno or 0)
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.name not in ("__torch_dispatch__", "__torch_function__")  # ours lie inside the user's frame
    ]
    return _user_frame(frames)
