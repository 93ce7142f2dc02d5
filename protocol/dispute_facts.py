"""What everybody knows of a disputed segment before a player says a word: all that follows from task and Program.

Ops, attributes, shapes, dtypes and producers come from here alone, and so do the learning rate, the step key and the
literals; a player supplies roots, values and openings of what it computed, and nothing else. DESIGN §7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.batches import present_of
from protocol.dispute_partials import Chain, chain_of
from protocol.dispute_wire import Tree
from protocol.errors import MalformedRecord
from protocol.merkle import EMPTY, leaf_hash, state_leaf, state_root_over, tensor_root, tensor_root_of, tile_count
from protocol.operations import TensorType
from protocol.profile import Gauge
from protocol.program import STATE_ROLES, Input, Items, Node, Program, Real, Ref, Type, state_layout
from protocol.reference import Argument
from protocol.reference_movement import Array
from protocol.reference_random import rate
from protocol.task import PRESENT, TaskSpec, learning_rate

__all__ = ["Facts", "numpy_of"]


class Facts:
    """One segment of a task. Steps are numbered from 0 within it, values as in the Program.

    gauges: of a tolerant task, which ends each segment with these parts of its state as they were at its start. That
    is one more step, the last, of movement alone: `puts_back`. Its values are the state's inputs.
    """

    def __init__(self, task: TaskSpec, program: Program, segment: int, gauges: Sequence[Gauge] = ()) -> None:
        """Raises MalformedRecord for a segment or a gauge that the task does not have."""
        self.task, self.program, self.segment = task, program, segment
        self._steps = task.steps_of(segment)
        self._gauges = {gauge.name: gauge for gauge in gauges}
        layout = state_layout(program)
        for gauge in gauges:
            dtype, shape = layout.get(gauge.name, ("", ()))
            if dtype != "float32" or not math.prod(shape) or (shape[0] if shape else 1) % gauge.parts:
                raise MalformedRecord(f"{gauge.name}: the state has no such float32 of {gauge.parts} equal parts")
        self._batch = [value for value, item in enumerate(program.inputs) if item.role == "batch"]
        self.names = [update.name for update in program.updates]

    @property
    def steps(self) -> int:
        """The number of training steps of the segment."""
        return len(self._steps)

    @property
    def ends(self) -> int:
        """The number of states that the segment goes through: one after each step, and one with the gauges put back."""
        return len(self._steps) + bool(self._gauges)

    def puts_back(self, step: int) -> bool:
        """Whether `step` is the one after the training, which puts the gauge parts back."""
        return bool(self._gauges) and step == self.steps

    def check_step(self, step: int) -> None:
        """Raises MalformedRecord for a step the segment does not have."""
        if not 0 <= step < self.ends:
            raise MalformedRecord(f"step {step} of a segment of {self.ends}")

    def number_of(self, step: int) -> int:
        """The training step's number within the task. Raises MalformedRecord for one the segment does not have."""
        if not 0 <= step < self.steps:
            raise MalformedRecord(f"step {step} of a segment of {self.steps}")
        return self._steps[step]

    # --- values ----------------------------------------------------------------------------------------------
    def type_of(self, value: int) -> TensorType:
        """Its dtype and shape."""
        return self.program.types[value]

    def input(self, value: int) -> Input | None:
        """The input that it is, if it is one."""
        return self.program.inputs[value] if value < len(self.program.inputs) else None

    def node(self, value: int) -> Node | None:
        """The node whose result it is, if it is one."""
        number = value - self.program.first_node
        return self.program.nodes[number] if number >= 0 else None

    def state_index(self, value: int) -> int | None:
        """Its place in the state's tree, if it is an input of the state."""
        item = self.input(value)
        return self._places[item.name] if item is not None and item.role in STATE_ROLES else None

    def state_value(self, place: int) -> int:
        """The input that the tensor at a place of the state's tree is."""
        return self._state_values[place]

    def is_gauge(self, value: int, element: int) -> bool:
        """Whether that element of a state input belongs to a gauge part."""
        gauge = self._gauge(value)
        return gauge is not None and element * gauge.parts // self.type_of(value).elements in gauge.at

    def gauge_mask(self, value: int) -> NDArray[np.bool_]:
        """`is_gauge` of every element of a state input, flat."""
        gauge, count = self._gauge(value), self.type_of(value).elements
        if gauge is None:
            return np.zeros(count, bool)
        return np.isin(np.arange(count) * gauge.parts // count, gauge.at)

    def _gauge(self, value: int) -> Gauge | None:
        item = self.input(value)
        return self._gauges.get(item.name) if item is not None and item.role in STATE_ROLES else None

    @cached_property
    def _state_values(self) -> dict[int, int]:
        places = ((self.state_index(value), value) for value in range(len(self.program.inputs)))
        return {place: value for place, value in places if place is not None}

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def computed(self, value: int, step: int) -> Array | None:
        """A literal, the learning rate or the step key, which everybody computes; None for any other value."""
        item = self.input(value)
        if item is not None and item.role == "learning_rate":
            nano = learning_rate(self.task.schedule, step=self.number_of(step), steps=self.task.steps)
            return Array("float32", (), (rate(nano),))
        if item is not None and item.role == "step_key":
            return Array("int64", (2,), (self.task.seed, self.number_of(step)))
        if item is not None or value >= self.program.first_node:
            return None
        constant = self.program.constants[value - len(self.program.inputs)]
        stored = "uint32" if constant.dtype == "float32" else constant.dtype
        elements = np.frombuffer(constant.data, np.dtype(stored).newbyteorder("<")).tolist()
        return Array(constant.dtype, constant.shape, tuple(map(int, elements)))

    def computed_numpy(self, value: int, step: int) -> NDArray[Any] | None:
        """What `computed` gives, as numpy holds it."""
        found = self.computed(value, step)
        return numpy_of(found) if found is not None else None

    def computed_root(self, value: int, step: int) -> bytes | None:
        """The root of what `computed` gives."""
        found = self.computed_numpy(value, step)
        return tensor_root(found) if found is not None else None

    def empty_root(self, value: int) -> bytes | None:
        """The root of a tensor without elements, which has no tile to open; None if it has some."""
        kind = self.type_of(value)
        return None if kind.elements else tensor_root_of(EMPTY, shape=kind.shape, dtype=kind.dtype)

    def present_root(self, value: int, step: int) -> bytes | None:
        """The root of the batch input that says which rows are real: it comes from the task, and from no data."""
        item = self.input(value)
        if item is None or item.role != "batch" or item.name != PRESENT or self.task.batch.rule != "sequence":
            return None
        return tensor_root(present_of(self.task, self.number_of(step)))

    def arguments(self, node: Node, operand: Callable[[int], Array]) -> list[Argument]:
        """The arguments of a node as protocol.reference takes them. operand: a value's Array by its number."""

        def of(arg: object) -> Argument:
            if isinstance(arg, Ref):
                return operand(arg.value)
            if isinstance(arg, Real):
                return arg.value
            if isinstance(arg, Type):
                return arg.name
            if isinstance(arg, Items):
                return tuple(operand(item.value) if isinstance(item, Ref) else item for item in arg.items)  # type: ignore[return-value]
            assert isinstance(arg, int), "no operation takes nothing as an argument"
            return arg

        return [of(arg) for arg in node.args]

    def chain(self, value: int, element: int) -> Chain | None:
        """The partial results of one element, if its node is a reduction (protocol/dispute_partials.py)."""
        node = self.node(value)
        return chain_of(self.program, node, element, self.task.width) if node is not None else None

    # --- trees -----------------------------------------------------------------------------------------------
    def trace_leaf(self, value: int) -> int | None:
        """Its leaf in a step's trace, whose leaves are the batch inputs and then the nodes' results."""
        if value >= self.program.first_node:
            return len(self._batch) + value - self.program.first_node
        return self._batch.index(value) if value in self._batch else None

    def trace_value(self, leaf: int) -> int:
        """The value at a leaf of a step's trace."""
        batches = len(self._batch)
        return self._batch[leaf] if leaf < batches else self.program.first_node + leaf - batches

    def leaves(self, tree: Tree, value: int) -> int:
        """How many leaves a tree has. value: whose, of `tiles`."""
        if tree == "steps":
            return self.ends
        if tree == "state":
            return len(self.names)
        if tree == "trace":
            return len(self._batch) + len(self.program.nodes)
        kind = self.type_of(value)
        return tile_count(kind.shape, kind.dtype)

    def hashes(self, tree: Tree, revealed: list[bytes], first: int) -> list[bytes]:
        """The leaf hashes of what stands at leaves `first` and on: of roots by their tree; of tiles they are given."""
        if tree == "tiles":
            return revealed
        if tree == "state":
            return [leaf_hash(state_leaf(self.names[first + at], root)) for at, root in enumerate(revealed)]
        return [leaf_hash(root) for root in revealed]

    def wrapped(self, tree: Tree, value: int, root: bytes) -> bytes:
        """The root that binds what a tree is of: a state's, a tensor's; of `steps` and `trace` the tree's own."""
        if tree == "state":
            return state_root_over(root, count=len(self.names))
        if tree == "tiles":
            kind = self.type_of(value)
            return tensor_root_of(root, shape=kind.shape, dtype=kind.dtype)
        return root


def numpy_of(array: Array) -> NDArray[Any]:
    """An Array as numpy holds it."""
    if array.dtype == "float32":
        return np.array(array.elements, dtype=np.uint32).view(np.float32).reshape(array.shape)
    return np.array(array.elements, dtype=array.dtype).reshape(array.shape)
