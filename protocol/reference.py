"""The slow second implementation of every operation of a Program, in Python integers. docs/exact.md is its source.

It shares no arithmetic with worker/exact: no torch, no numpy, no float. The tests hold the two against each other bit
for bit; a referee executes one element with it. It costs microseconds to milliseconds an element, so it is for small
tensors and single elements, never for training.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from protocol.errors import LocalProtocolError
from protocol.operations import TensorType, result_type
from protocol.operations import Value as TypedArg
from protocol.reference_elementary import ELEMENTARY
from protocol.reference_movement import MOVEMENT, Array, Element, Rule
from protocol.reference_pointwise import POINTWISE
from protocol.reference_products import REDUCTIONS, product_rules
from protocol.reference_random import RANDOM

__all__ = ["Argument", "Array", "element", "evaluate", "rules", "typed"]

Argument: TypeAlias = "Array | tuple[Array, ...] | tuple[int, ...] | int | float | bool | str"


@functools.cache
def rules(width: int = 15) -> Mapping[str, Rule]:
    """The rule of each operation, by name. width: 8, 15 or 22, of the operands of products."""
    found = {**MOVEMENT, **POINTWISE, **ELEMENTARY, **REDUCTIONS, **RANDOM, **product_rules(width)}
    return MappingProxyType(found)


def evaluate(name: str, args: Sequence[Argument], *, width: int = 15) -> Array:
    """The whole result of operation `name`. args: as protocol.operations lists them, tensors as Arrays.

    Raises MalformedRecord for arguments that the operation does not take and for an index out of range.
    """
    kind, rule = _prepared(name, args, width)
    return Array(kind.dtype, kind.shape, tuple(rule(index) for index in range(kind.elements)))


def element(name: str, args: Sequence[Argument], index: int, *, width: int = 15) -> int:
    """Element `index`, row-major, of the result of operation `name`, computed alone: see `evaluate`.

    Of a product it reads one row and one column, of a sum what is added up, so an Array of one row and one of one
    column with index 0 do as well as the whole matrices. Raises LocalProtocolError for an index outside the result.
    """
    kind, rule = _prepared(name, args, width)
    if not 0 <= index < kind.elements:
        raise LocalProtocolError(f"element {index} of a result of {kind.elements}")
    return rule(index)


def _prepared(name: str, args: Sequence[Argument], width: int) -> tuple[TensorType, Element]:
    kind = result_type(name, [typed(arg) for arg in args])
    return kind, rules(width)[name](kind, *args)


def typed(arg: Argument) -> TypedArg:
    """An argument as protocol.operations.result_type takes it: a tensor by its type."""
    if isinstance(arg, Array):
        return arg.type
    if isinstance(arg, tuple):
        return tuple(item.type if isinstance(item, Array) else item for item in arg)
    return arg
