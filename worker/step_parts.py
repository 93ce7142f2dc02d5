"""What each node of a captured step is for: its micro-batch, every micro-batch alike, or the update. DESIGN §11.

A Program says nothing of forward, backward and update; who wants to run it on several micro-batches, or on several
machines, has to know. It follows from what a node depends on: *fixed* nodes on no row and no random number, so they are
the same for every micro-batch; *update* nodes on optimizer state or the learning rate; the others belong to a
*micro-batch*. A *gradient* is a value of a micro-batch that an update node reads. Pure: no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from protocol.errors import UnsupportedModel
from protocol.program import STATE_ROLES, Node, Program

__all__ = ["NotParallel", "StepParts"]

_LINEAR = ("add.Tensor", "sub.Tensor", "neg.default", "mul.Tensor", "div.Tensor")
_LIMITS = ("maximum.default", "minimum.default", "where.self")
_SHARED = ("step_key", "batch")


class NotParallel(UnsupportedModel):
    """A step that cannot be done in micro-batches, or by several peers."""

    code = "not-parallel"


@dataclass(frozen=True)
class StepParts:
    """A Program of one micro-batch, and what its values are for, by their numbers."""

    program: Program

    # --- what a value depends on -------------------------------------------------------------------------------
    @cached_property
    def live(self) -> tuple[bool, ...]:
        """Whether the loss or the new state needs it."""
        return self._needed((self.program.loss, *self.new_state.values()))

    @cached_property
    def varying(self) -> tuple[bool, ...]:
        """Whether it differs between micro-batches: rows or random numbers are among its ancestors."""
        return self._reached(self._inputs(*_SHARED))

    @cached_property
    def stateful(self) -> tuple[bool, ...]:
        """Whether a state tensor is it, or among its ancestors."""
        return self._reached(self._inputs(*STATE_ROLES))

    @cached_property
    def of_rows(self) -> tuple[bool, ...]:
        """Whether a batch input is it, or among its ancestors."""
        return self._reached(self._inputs("batch"))

    @cached_property
    def updating(self) -> tuple[bool, ...]:
        """Whether it is an update node, or one of the inputs only those read."""
        found = list(self._reached(self._inputs("optimizer", "learning_rate")))
        self._absorb(found)
        return tuple(found)

    @cached_property
    def forward(self) -> tuple[bool, ...]:
        """Whether the loss depends on it."""
        return self._needed((self.program.loss,))

    @cached_property
    def gradients(self) -> tuple[int, ...]:
        """The values of a micro-batch that update nodes read, in order."""
        found: set[int] = set()
        for number in self.update_nodes:
            found.update(ref for ref in self.node(number).refs() if self.varying[ref] and not self.updating[ref])
        return tuple(sorted(found))

    # --- its nodes ---------------------------------------------------------------------------------------------
    @cached_property
    def update_nodes(self) -> tuple[int, ...]:
        """The value numbers of the nodes of the update, in order."""
        return tuple(number for number in self._nodes() if self.updating[number])

    @cached_property
    def other_nodes(self) -> tuple[int, ...]:
        """The value numbers of all other nodes that are needed, in order."""
        return tuple(number for number in self._nodes() if not self.updating[number])

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """The needed nodes that read each value."""
        found: list[list[int]] = [[] for _ in self.program.types]
        for number in self._nodes():
            for ref in dict.fromkeys(self.node(number).refs()):
                found[ref].append(number)
        return tuple(tuple(numbers) for numbers in found)

    @cached_property
    def new_state(self) -> dict[str, int]:
        """The value that each state tensor is after the step."""
        return {update.name: update.value for update in self.program.updates}

    @cached_property
    def random_nodes(self) -> int:
        """One more than the largest number of a random node: 0 if there is none."""
        nodes = self.program.nodes
        return max((int(node.args[1]) + 1 for node in nodes if node.op == "ichiba.uniform"), default=0)  # type: ignore[arg-type]

    @cached_property
    def rows(self) -> int:
        """The rows of the micro-batch. Raises NotParallel where its inputs have no common first dimension."""
        shapes = {item.name: item.shape for item in self.program.inputs_of("batch")}
        counts = {shape[0] if shape else 0 for shape in shapes.values()}
        if len(counts) != 1 or 0 in counts:
            raise NotParallel(
                f"the batch inputs have the shapes {shapes}",
                why="micro-batches are cut along one common first dimension",
                next_step="give every input of the example batch its rows first",
            )
        return counts.pop()

    def node(self, number: int) -> Node:
        """The node of a value."""
        return self.program.nodes[number - self.program.first_node]

    def cone(self, value: int) -> list[int]:
        """The update nodes that `value` needs, in order; itself if it is one."""
        if not self._is_update(value):
            return []
        found, waiting = {value}, [value]
        while waiting:
            for ref in self.node(waiting.pop()).refs():
                if self._is_update(ref) and ref not in found:
                    found.add(ref)
                    waiting.append(ref)
        return sorted(found)

    def check(self) -> None:
        """Refuse a step that several micro-batches cannot do in one update. Raises NotParallel."""
        program = self.program
        assert self.rows
        for number, item in enumerate(program.inputs):
            if item.role == "buffer" and self.new_state[item.name] != number:
                raise NotParallel(
                    f"the step changes the buffer {item.name}",
                    why="every micro-batch would change it, and they run at different places",
                    next_step="use layer or group norm in place of batch norm, or leave [parallel] out",
                )
            if item.role in ("parameter", "optimizer") and not self._updated(number, self.new_state[item.name]):
                raise NotParallel(f"the new value of {item.name} is none of an optimizer's", next_step=_PLAIN)
        if self.updating[program.loss] or not self.varying[program.loss]:
            raise NotParallel(
                "the loss does not depend on the batch alone", why="it is averaged over micro-batches", next_step=_PLAIN
            )
        for number in self.gradients:
            kind = program.types[number]
            if number < program.first_node or not self.of_rows[number] or kind.dtype != "float32":
                raise NotParallel(
                    f"the update reads a {kind} that is no gradient",
                    why="it draws random numbers or looks at the batch, which micro-batches each do for themselves",
                    next_step=_PLAIN,
                )

    # --- how it is found ---------------------------------------------------------------------------------------
    def _updated(self, number: int, value: int) -> bool:
        return value == number or not self.varying[value] or self._is_update(value)

    def _is_update(self, value: int) -> bool:
        return value >= self.program.first_node and self.updating[value]

    def _nodes(self) -> Iterator[int]:
        return (n for n in range(self.program.first_node, len(self.program.types)) if self.live[n])

    def _inputs(self, *roles: str) -> Iterable[int]:
        return (number for number, item in enumerate(self.program.inputs) if item.role in roles)

    def _needed(self, ends: Iterable[int]) -> tuple[bool, ...]:
        found = [False] * len(self.program.types)
        for number in ends:
            found[number] = True
        for number in range(len(found) - 1, self.program.first_node - 1, -1):
            if found[number]:
                for ref in self.node(number).refs():
                    found[ref] = True
        return tuple(found)

    def _reached(self, starts: Iterable[int]) -> tuple[bool, ...]:
        found = [False] * len(self.program.types)
        for number in starts:
            found[number] = True
        for number, node in enumerate(self.program.nodes, self.program.first_node):
            found[number] = any(found[ref] for ref in node.refs())
        return tuple(found)

    def _absorb(self, updating: list[bool]) -> None:
        """What stands between a gradient and the optimizer belongs to the update: a square, weight decay, clipping, the
        sum of the gradients of a tied weight. So the sums are of gradients, and what follows sees their mean."""
        program = self.program
        norms: set[int] = set()  # nodes of a norm of gradients, on the way to the factor that clips them
        more = True
        while more:
            more = False
            for number in range(len(program.types) - 1, program.first_node - 1, -1):
                if updating[number] or not self.live[number] or not self.varying[number] or number == program.loss:
                    continue
                if any(not updating[reader] for reader in self.consumers[number]):
                    continue
                if number in norms or self._of_gradients(number, updating) or self._after_gradient(number, norms):
                    updating[number] = more = True

    def _of_gradients(self, number: int, updating: list[bool]) -> bool:
        """Whether it is a function of values that the update reads in any case."""
        operands = [ref for ref in self.node(number).refs() if self.varying[ref]]
        return all(any(updating[reader] for reader in self.consumers[ref]) for ref in operands)

    def _after_gradient(self, number: int, norms: set[int]) -> bool:
        node = self.node(number)
        operands = [ref for ref in node.refs() if self.varying[ref]]
        if node.op == "mul.Tensor" and len(operands) == 2:
            return any(self._clips(a, b, norms) for a, b in (operands, operands[::-1]))
        if node.op not in (*_LINEAR, *_LIMITS):
            return False
        if any(self.program.types[ref].shape != node.shape for ref in operands):
            return False
        if node.op == "div.Tensor":
            return len(operands) == 1 and next(node.refs()) == operands[0]
        if node.op == "where.self":
            return not self.varying[next(node.refs())] and len(operands) == 1
        if len(operands) == 1:
            return True
        # The two gradients of a tied weight may be of different stages. A longer sum, as of a recurrent weight, has its
        # terms at one place, and would keep each of them.
        sums = sum(ref >= self.program.first_node and self.node(ref).op == node.op for ref in operands)
        return node.op in ("add.Tensor", "sub.Tensor") and not sums

    def _clips(self, gradient: int, factor: int, norms: set[int]) -> bool:
        """Whether `factor` is one number that was made of `gradient`: its norm. Marks the nodes between them."""
        if self.program.types[factor].shape or factor <= gradient:
            return False
        above = {factor}
        for number in range(factor, gradient, -1):
            if number in above:
                above.update(ref for ref in self.node(number).refs() if ref >= gradient)
        below = {gradient}
        for number in sorted(above):
            if number > gradient and any(ref in below for ref in self.node(number).refs()):
                below.add(number)
        if factor not in below:
            return False
        norms.update(below - {gradient})
        return True


_PLAIN: Final = "use an optimizer of torch.optim on the gradients of the loss"
