"""Runs a Program step by step, in exact or native arithmetic.

The plan is made once: constants are decoded, and each value is dropped after its last use. Every result is
compared with the dtype and shape its node declares, so a kernel that differs from protocol/operations.py stops
the run. Nothing of a Program is code: an op name selects one of our kernels, and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from protocol.errors import IchibaError, LimitExceeded, LocalProtocolError, MalformedRecord
from protocol.operations import OPERATIONS
from protocol.program import STATE_ROLES, Arg, Input, Items, Program, Real, Ref, Type, peak_bytes
from protocol.stage import Stage
from worker import exact
from worker.exact.devices import checked_device, uniform_kernel

__all__ = ["DTYPES", "Diverged", "Executor", "native_kernels"]

aten = torch.ops.aten
_ALIGNMENT = 64  # bytes: of all that torch allocates on a processor
Kernel = Callable[..., Tensor]
OnNode = Callable[[int, Tensor], None]
Receive = Callable[[int], Tensor]
Send = Callable[[int, Tensor], Tensor]
_Values = Sequence[Tensor | None] | Mapping[int, Tensor]

DTYPES = {
    "float32": torch.float32,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


class Diverged(IchibaError):
    """A state tensor holds NaN or infinity after step `step`: the task ends there. DESIGN §6."""

    code = "diverged"

    def __init__(self, step: int, name: str) -> None:
        self.step = step
        super().__init__(
            f"training diverged at step {step}: {name} holds NaN or infinity",
            next_step="lower the learning rate or lengthen the warmup in job.toml",
        )


@dataclass(frozen=True)
class _Planned:
    """One node ready to run. template: arguments with values' numbers left in; drops: values last used here; asks:
    values to be received that are first used here; sends: whether its result is handed out."""

    kernel: Kernel
    op: str
    template: tuple[Any, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    drops: tuple[int, ...]
    asks: tuple[int, ...] = ()
    sends: bool = False


class Executor:
    """One Program, ready to step.

    mode: `exact` gives the same bits on every machine (DESIGN §6) at `width` bits, whichever `backend` of
    worker/exact/products.py multiplies and with or without the compiled `helper`; `native` is torch's own arithmetic
    with the same random numbers. threads: CPU threads of torch, set for the whole process. device: cpu, cuda or
    cuda:N, where the steps run; a state comes and goes as tensors of any device. stage: of a unit, whose steps receive
    and send what it says. Raises LocalProtocolError for a device that is not there or whose exact arithmetic is not;
    MalformedRecord for a stage that does not fit the program.
    """

    def __init__(
        self,
        program: Program,
        mode: Literal["exact", "native"] = "exact",
        *,
        width: int = 15,
        threads: int = 1,
        backend: str = "auto",
        helper: bool = True,
        device: str = "cpu",
        stage: Stage | None = None,
    ) -> None:
        self.program = program
        self._received = frozenset(crossing.value for crossing in stage.receives) if stage else frozenset()
        self._sent = frozenset(crossing.value for crossing in stage.sends) if stage else frozenset()
        self.threads = threads
        self.device = checked_device(device)
        self._aligned = _aligned if mode == "native" else _as_it_is
        if mode == "exact":
            kernels: Mapping[str, Kernel] = exact.kernels(width, backend, helper=helper, device=device)
        else:
            kernels = native_kernels(self.device)
        torch.set_flush_denormal(False)
        self._plan = self._planned(kernels)
        self._finite: dict[str, Tensor] = {}  # state that a step handed on untouched, and that was looked at
        self._constants = [
            self._aligned(
                torch.from_numpy(np.frombuffer(constant.data, constant.dtype).copy())
                .reshape(constant.shape)
                .to(self.device)
            )
            for constant in program.constants
        ]

    def _planned(self, kernels: Mapping[str, Kernel]) -> list[_Planned]:
        program = self.program
        first = program.first_node
        last = {ref: number for number, node in enumerate(program.nodes) for ref in node.refs()}
        kept = {program.loss, *(update.value for update in program.updates)}
        drops: list[list[int]] = [[] for _ in program.nodes]
        for value, number in last.items():
            if value not in kept:
                drops[number].append(value)
        for number in range(len(program.nodes)):
            if first + number not in last and first + number not in kept:
                drops[number].append(first + number)
        first_use: dict[int, int] = {}
        for number, node in enumerate(program.nodes):
            for ref in node.refs():
                first_use.setdefault(ref, number)
        asks: dict[int, list[int]] = {}
        for value in sorted(self._received):
            if value not in first_use:
                raise MalformedRecord(f"no node reads value {value}, which is to be received")
            asks.setdefault(first_use[value], []).append(value)
        return [
            _Planned(
                kernels[node.op],
                node.op,
                tuple(_template(arg) for arg in node.args),
                DTYPES[node.dtype],
                node.shape,
                tuple(drops[number]),
                tuple(asks.get(number, ())),
                first + number in self._sent,
            )
            for number, node in enumerate(program.nodes)
        ]

    def step(
        self,
        state: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        learning_rate: float,
        seed: int,
        step: int,
        *,
        on_node: OnNode | None = None,
        receive: Receive | None = None,
        send: Send | None = None,
    ) -> tuple[dict[str, Tensor], float]:
        """One training step: the new state, in name order, and the loss before the update.

        learning_rate: float32 value. seed, step: below 2**63. on_node: called with each node's number and result.
        receive, send: of a unit. receive is called with the number of a received input when a node first needs it,
        send with the number and the tensor of a value as soon as it is there, and gives what the nodes after it read in
        its place; neither is held longer than nodes need it. Raises MalformedRecord if tensors do not fit the inputs or
        an index is out of range, Diverged if the new state is not finite.
        """
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        values: list[Tensor | None] = [*self._inputs(state, batch, learning_rate, seed, step), *self._constants]
        with torch.no_grad():
            if self._received or self._sent:
                assert receive is not None, "a unit's step receives"
                assert send is not None, "a unit's step sends"
                self._exchange(values, receive, send, on_node)
            else:
                for number, planned in enumerate(self._plan):
                    result = self._run(number, planned, values)
                    if on_node is not None:
                        on_node(number, result)
                    values.append(result)
                    for value in planned.drops:
                        values[value] = None
        new: dict[str, Tensor] = {}
        for update in self.program.updates:
            tensor = values[update.value]
            assert tensor is not None
            known = tensor is self._finite.get(update.name)
            if tensor.is_floating_point() and tensor.numel() and not known:
                low, high = torch.aminmax(tensor)
                if not bool(torch.isfinite(low) & torch.isfinite(high)):
                    raise Diverged(step, update.name)
                if update.value < len(self.program.inputs):
                    self._finite[update.name] = tensor
            new[update.name] = tensor
        loss = values[self.program.loss]
        assert loss is not None
        return new, float(loss)

    def _exchange(self, values: list[Tensor | None], receive: Receive, send: Send, on_node: OnNode | None) -> None:
        """The nodes of a unit's step, in order, its tensors received as late and sent as early as can be."""
        for value in sorted(self._sent - self._received):
            if value < len(values):
                tensor = values[value]
                assert tensor is not None
                values[value] = send(value, tensor)
        for number, planned in enumerate(self._plan):
            for value in planned.asks:
                tensor = values[value] = self._fitting(self.program.inputs[value], receive(value))
                if value in self._sent:
                    values[value] = send(value, tensor)
            result = self._run(number, planned, values)
            if planned.sends:
                result = send(len(values), result)
            if on_node is not None:
                on_node(number, result)
            values.append(result)
            for value in planned.drops:
                values[value] = None

    def run_node(self, number: int, values: Callable[[int], Tensor]) -> Tensor:
        """The result of one node on operands of the caller's, by their value's number.

        Raises MalformedRecord for operands that it has no result of.
        """
        planned = self._plan[number]
        return self._run(number, planned, {value: values(value) for value in self.program.nodes[number].refs()})

    def _run(self, number: int, planned: _Planned, values: _Values) -> Tensor:
        args = [_filled(item, values) for item in planned.template]
        try:
            result = planned.kernel(*args)
        except (IndexError, RuntimeError, TypeError, ValueError, MemoryError) as error:
            node = self.program.nodes[number]
            if isinstance(error, MemoryError) or "allocate memory" in str(error):
                raise LimitExceeded(
                    f"no memory for node {number} ({planned.op}) of {planned.shape}",
                    why=f"the program needs about {peak_bytes(self.program)} bytes",
                    next_step="give the worker more memory or make the batch smaller",
                ) from error
            raise MalformedRecord(
                f"node {number} ({planned.op}, {node.source or 'line unknown'}) failed: {error}"[:300],
                why="its operands do not fit it",
                next_step="check that the data's labels and tokens are in the range the model was built for",
            ) from error
        if result.dtype != planned.dtype or tuple(result.shape) != planned.shape:
            raise LocalProtocolError(
                f"node {number} ({planned.op}) gave {result.dtype} {tuple(result.shape)}, "
                f"the program declares {planned.dtype} {planned.shape}",
                next_step="report this: the kernel differs from protocol/operations.py",
            )
        return result

    def _inputs(
        self, state: Mapping[str, Tensor], batch: Mapping[str, Tensor], learning_rate: float, seed: int, step: int
    ) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for value, item in enumerate(self.program.inputs):
            if value in self._received:
                found.append(None)
                continue
            if item.role == "learning_rate":
                found.append(torch.tensor(learning_rate, dtype=torch.float32, device=self.device))
                continue
            if item.role == "step_key":
                found.append(torch.tensor([seed, step], dtype=torch.int64, device=self.device))
                continue
            source = state if item.role in STATE_ROLES else batch
            if item.name not in source:
                raise MalformedRecord(f"{item.role} {item.name} is missing")
            found.append(self._fitting(item, source[item.name]))
        return found

    def _fitting(self, item: Input, tensor: Tensor) -> Tensor:
        """`tensor` on this device. Raises MalformedRecord unless it is what the input takes."""
        if tensor.dtype != DTYPES[item.dtype] or tuple(tensor.shape) != item.shape:
            raise MalformedRecord(
                f"{item.role} {item.name} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"the program takes {item.dtype} {item.shape}"
            )
        return self._aligned(tensor.to(self.device))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _aligned(tensor: Tensor) -> Tensor:
    """`tensor` where torch would have put it. A vectorised kernel may add in another order from another address, and
    a solver has to come to its own bits again, whether its state was read from a file or made by the step before."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


class _Slot(int):
    """The number of a value, told apart from an integer constant by its type."""


def _template(arg: Arg) -> Any:
    if isinstance(arg, Ref):
        return _Slot(arg.value)
    if isinstance(arg, Real):
        return arg.value
    if isinstance(arg, Type):
        return DTYPES[arg.name]
    if isinstance(arg, Items):
        return [_Slot(item.value) if isinstance(item, Ref) else item for item in arg.items]
    return arg


def _filled(item: Any, values: _Values) -> Any:
    if type(item) is _Slot:
        return values[item]
    if type(item) is list:
        return [values[part] if type(part) is _Slot else part for part in item]
    return item


def _checked_embedding_backward(grad: Tensor, index: Tensor, rows: int, padding: int, scale: bool) -> Tensor:
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= rows):
        raise IndexError(f"index out of range of {rows} rows")
    return aten.embedding_dense_backward.default(grad, index, rows, padding, scale)


def native_kernels(device: torch.device) -> dict[str, Kernel]:
    """torch's own kernel of each operation on `device`. They are fast, and their bits depend on the machine."""
    drawn = uniform_kernel(exact.uniform)
    special: dict[str, Kernel] = {
        "full.default": lambda shape, value, dtype: torch.full(shape, value, dtype=dtype, device=device),
        "arange.start_step": functools.partial(torch.arange, dtype=torch.int64, device=device),
        "embedding_dense_backward.default": _checked_embedding_backward,
        "ichiba.uniform": lambda *args: drawn(*args).to(device),
    }
    for name in OPERATIONS.keys() - special.keys():
        stem, overload = name.split(".")
        packet = getattr(aten, stem)
        # Comparisons and sums with a Python number have an overload of their own.
        special[name] = packet if overload == "Tensor" and stem != "slice" else getattr(packet, overload)
    return special
