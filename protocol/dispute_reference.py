"""A player's machine in Python integers: training steps and a Tracer without torch, for tests and the simulator.

It costs microseconds to milliseconds an element, so it is for Programs of a few thousand elements. What it gives is
what worker/training.py and worker/tracing.py give, bit for bit; in tolerant mode, what some honest machine gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol import merkle
from protocol.batches import batch_of
from protocol.bounds import ACCUMULATED
from protocol.dispute_facts import Facts, numpy_of
from protocol.dispute_player import Tracer
from protocol.errors import MalformedRecord
from protocol.profile import Gauge, put_back
from protocol.program import Items, Node, Program, state_layout
from protocol.reference import evaluate
from protocol.reference_movement import Array
from protocol.reference_random import initial
from protocol.task import TaskSpec

__all__ = ["Alter", "ReferenceTracer", "run_step", "start_of"]

Arrays = Mapping[str, NDArray[Any]]
Alter = Callable[[int, int, Array], Array]


def start_of(task: TaskSpec, program: Program) -> dict[str, NDArray[Any]]:
    """The state before step 0 of a task that starts from its seed. Raises MalformedRecord if a rule is `given`."""
    rules = {item.name: item for item in program.inputs if item.init is not None}
    state = {}
    for index, (name, (dtype, shape)) in enumerate(state_layout(program).items()):
        init = rules[name].init
        assert init is not None, "state has an init rule"
        if init.kind == "given":
            raise MalformedRecord(f"{name} has no init rule a stranger can follow")
        count = rules[name].type.elements
        if dtype == "float32":
            drawn = [initial(init.kind, init.a, init.b, seed=task.seed, tensor=index, index=at) for at in range(count)]
        else:
            drawn = [int(init.a)] * count
        state[name] = numpy_of(Array(dtype, shape, tuple(drawn)))
    return state


def run_step(
    facts: Facts, state: Arrays, arrays: Mapping[str, bytes], step: int, *, alter: Alter | None = None
) -> list[NDArray[Any]]:
    """Every value of one step, by its number. step: within the segment of `facts`.

    alter: for a demonstration of fraud: it may give another Array for (step, value, Array), and what reads it follows.
    Raises MalformedRecord for an index out of range.
    """
    program, task = facts.program, facts.task
    batch = batch_of(task, program, _read(task, arrays), facts.number_of(step))
    values: list[NDArray[Any]] = []
    held: list[Array] = []
    for value in range(len(program.types)):
        item, node, known = facts.input(value), facts.node(value), facts.computed(value, step)
        if known is None and item is not None:
            known = _array_of((batch if item.role == "batch" else state)[item.name])
        if known is None:
            assert node is not None, "every value is an input, a literal or a node"
            known = _computed(facts, node, held)
        known = known if alter is None else alter(step, value, known)
        held.append(known)
        values.append(numpy_of(known))
    return values


def _computed(facts: Facts, node: Node, held: Sequence[Array]) -> Array:
    """A node's result; in tolerant mode sums and products of finite floats as one honest machine may have them."""
    arguments = facts.arguments(node, held.__getitem__)
    operands = [numpy_of(x) for x in arguments if isinstance(x, Array)]
    finite = all(bool(np.isfinite(x).all()) for x in operands)
    if facts.task.mode == "exact" or node.op not in ACCUMULATED or not finite:
        return evaluate(node.op, arguments, width=facts.task.width)
    rounded = np.array(_sums(node, operands), np.float64).astype(np.float32).reshape(node.shape)
    return _array_of(rounded + np.float32(0))  # a zero is the positive one


def _sums(node: Node, operands: Sequence[NDArray[Any]]) -> list[float]:
    """The elements of a sum or product in row-major order, added without error and rounded to float64 once."""
    x = operands[0].astype(np.float64)
    if node.op in ("mm.default", "bmm.default"):
        columns = operands[1].astype(np.float64).swapaxes(-1, -2)
        pairs = [(x, columns)] if x.ndim == 2 else zip(x, columns, strict=True)
        return [math.fsum(row * column) for rows, other in pairs for row in rows for column in other]
    if node.op == "sum.dim_IntList":
        dims = node.args[1]
        assert isinstance(dims, Items), "refused by result_type"
        over = [dim for dim in dims.items if isinstance(dim, int)]
        kept = [axis for axis in range(x.ndim) if axis not in over]
        count = math.prod(x.shape[axis] for axis in over)
        return (
            [math.fsum(row) for row in x.transpose(*kept, *over).reshape(-1, count)]
            if count
            else [0.0] * node.type.elements
        )
    padding = node.args[3]
    rows, index = x.reshape(-1, x.shape[-1]), operands[1].reshape(-1)
    found = [rows[index == row] for row in range(node.shape[0])]
    return [0.0 if row == padding else math.fsum(column) for row, cut in enumerate(found) for column in cut.T]


def _read(task: TaskSpec, arrays: Mapping[str, bytes]) -> dict[str, NDArray[Any]]:
    return {
        ref.name: np.frombuffer(arrays[ref.name], np.dtype(ref.dtype).newbyteorder("<")).reshape(ref.shape)
        for ref in task.arrays
    }


def _array_of(array: NDArray[Any]) -> Array:
    flat = np.ascontiguousarray(array).reshape(-1)
    elements = flat.view(np.uint32) if array.dtype == np.float32 else flat
    return Array(array.dtype.name, array.shape, tuple(map(int, elements.tolist())))


class ReferenceTracer(Tracer):
    """A Tracer that holds every value of its segment. base: the state the segment starts from. alter: as `run_step`.

    gauges: of a tolerant task, put back after the last step."""

    def __init__(
        self,
        task: TaskSpec,
        program: Program,
        segment: int,
        *,
        arrays: Mapping[str, bytes],
        base: Arrays,
        alter: Alter | None = None,
        gauges: Sequence[Gauge] = (),
    ) -> None:
        """Runs the segment. Raises MalformedRecord for an index out of range."""
        self.facts = Facts(task, program, segment, gauges)
        self._arrays, self._gauges = arrays, tuple(gauges)
        self.states: list[dict[str, NDArray[Any]]] = [dict(base)]
        self._values: list[list[NDArray[Any]]] = []
        self._ends: dict[int, list[bytes]] = {}
        self._traces: dict[int, list[bytes]] = {}
        self._go_on(alter)

    def _go_on(self, alter: Alter | None) -> None:
        for step in range(len(self._values), self.facts.steps):
            values = run_step(self.facts, self.states[-1], self._arrays, step, alter=alter)
            self._values.append(values)
            self.states.append({update.name: values[update.value] for update in self.facts.program.updates})
        if self.facts.puts_back(len(self._values)):
            self.states.append(self.states[-1] | put_back(self.states[0], self.states[-1], self._gauges))

    def step_roots(self) -> Sequence[bytes]:
        """See Tracer."""
        ends = (self.state_roots(step) for step in range(self.facts.ends))
        return [merkle.state_root_of(dict(zip(self.facts.names, roots, strict=True))) for roots in ends]

    def state_roots(self, step: int) -> Sequence[bytes]:
        """See Tracer."""
        if step not in self._ends:
            state = self.states[step + 1]
            self._ends[step] = [merkle.tensor_root(state[name]) for name in self.facts.names]
        return self._ends[step]

    def trace_roots(self, step: int) -> Sequence[bytes]:
        """See Tracer."""
        if step not in self._traces:
            facts, values = self.facts, self._values[step]
            leaves = (facts.trace_value(leaf) for leaf in range(facts.leaves("trace", 0)))
            self._traces[step] = [merkle.tensor_root(values[value]) for value in leaves]
        return self._traces[step]

    def tensors(self, step: int, values: Collection[int]) -> Mapping[int, NDArray[Any]]:
        """See Tracer."""
        found = {}
        for value in values:
            item = self.facts.input(value)
            of_state = item is not None and self.facts.state_index(value) is not None
            found[value] = self.states[step][item.name] if item is not None and of_state else self._values[step][value]
        return found

    def data(self, name: str) -> bytes:
        """See Tracer."""
        return self._arrays[name]
