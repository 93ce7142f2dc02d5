"""Writes a Program piece by piece: inputs, literals and nodes in the order they are thought of.

A Program numbers its inputs first, then its literals, then its nodes. Whoever makes one out of others knows its last
input only at the end, so values have handles here, which `finish` turns into numbers. Pure: no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from protocol.operations import TensorType
from protocol.program import Arg, Constant, Input, Items, Node, Program, Ref, Update

__all__ = ["Handle", "ProgramWriter", "moved"]

Handle: TypeAlias = int


def moved(args: tuple[Arg, ...], number: Callable[[int], int]) -> tuple[Arg, ...]:
    """The arguments of a node with other numbers of values."""

    def one(arg: Arg) -> Arg:
        if isinstance(arg, Ref):
            return Ref(number(arg.value))
        if isinstance(arg, Items):
            return Items(tuple(Ref(number(i.value)) if isinstance(i, Ref) else i for i in arg.items))
        return arg

    return tuple(one(arg) for arg in args)


class ProgramWriter:
    """A Program under construction. References in the arguments of nodes are handles."""

    def __init__(self) -> None:
        self._made: list[Input | Constant | Node] = []

    def add(self, item: Input | Constant | Node) -> Handle:
        """One more input, literal or node."""
        self._made.append(item)
        return len(self._made) - 1

    def node(self, op: str, args: tuple[Arg, ...], kind: TensorType, source: str = "") -> Handle:
        """One more node."""
        return self.add(Node(op, args, kind.dtype, kind.shape, source))  # type: ignore[arg-type]

    def type_of(self, handle: Handle) -> TensorType:
        """The dtype and shape of a value."""
        return self._made[handle].type

    def finish(self, updates: Mapping[str, Handle], loss: Handle) -> tuple[Program, dict[Handle, int]]:
        """The Program, unchecked, and the number that each handle became."""
        kinds = (Input, Constant, Node)
        order = [handle for kind in kinds for handle, item in enumerate(self._made) if isinstance(item, kind)]
        numbers = {handle: number for number, handle in enumerate(order)}
        inputs = tuple(item for item in self._made if isinstance(item, Input))
        constants = tuple(item for item in self._made if isinstance(item, Constant))
        nodes = tuple(
            Node(item.op, moved(item.args, numbers.__getitem__), item.dtype, item.shape, item.source)
            for item in self._made
            if isinstance(item, Node)
        )
        named = tuple(Update(name, numbers[updates[name]]) for name in sorted(updates))
        return Program(inputs, constants, nodes, named, numbers[loss]), numbers
