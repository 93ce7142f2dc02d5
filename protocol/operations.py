"""The closed list of operations a Program may use: argument kinds, result type and cost of each.

DESIGN §4: an op outside this list is refused when a task is submitted, and again when a stranger's bytes are
decoded. Names are ATen overloads (without `aten.`) or ours (`ichiba.`). Every operation has one result, and its
dtype and shape follow from the arguments by `result_type`, so a Program cannot lie about a size. This module
knows no torch: the kernels stand in worker/, and a test keeps both lists equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from protocol import params
from protocol.errors import MalformedRecord

__all__ = ["ITEM_BYTES", "OPERATIONS", "Operation", "TensorType", "Value", "cost_of", "result_type"]

ITEM_BYTES = {"float32": 4, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}

INT_MAX = 2**63 - 1


class TensorType(NamedTuple):
    """What is known of a tensor before anything runs: its dtype's name and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """The bytes of the elements, densely stored."""
        return self.elements * ITEM_BYTES[self.dtype]


Scalar: TypeAlias = "int | float | bool | str | TensorType | None"  # a str is the name of a dtype
Value: TypeAlias = "Scalar | tuple[Scalar, ...]"
Infer: TypeAlias = "Callable[..., TensorType]"


@dataclass(frozen=True)
class Operation:
    """One operation.

    kinds: one letter for each argument: t tensor, T tensors, s tensor or number, n number, i integer, I integers,
    b bool, d dtype. weight: operations charged for each element of the result (or, `reduces`, of the first
    argument). view: the result may share its memory with the first argument.
    """

    name: str
    kinds: str
    infer: Infer
    weight: int = 1
    reduces: bool = False
    view: bool = False


OPERATIONS: dict[str, Operation] = {}


def _operation(
    name: str, kinds: str, *, weight: int = 1, reduces: bool = False, view: bool = False
) -> Callable[[Infer], Infer]:
    def add(infer: Infer) -> Infer:
        OPERATIONS[name] = Operation(name, kinds, infer, weight, reduces, view)
        return infer

    return add


def result_type(name: str, args: Sequence[Value]) -> TensorType:
    """The dtype and shape that operation `name` gives for `args`.

    Raises MalformedRecord for an unknown operation, a wrong number or kind of arguments, arguments that do not
    fit each other, and results above the limits of protocol/params.py.
    """
    operation = OPERATIONS.get(name)
    if operation is None:
        raise MalformedRecord(f"operation {name[:64]!r} is not on the allow-list")
    if len(args) != len(operation.kinds):
        raise MalformedRecord(f"{name} takes {len(operation.kinds)} arguments, got {len(args)}")
    for position, (kind, arg) in enumerate(zip(operation.kinds, args, strict=True)):
        if not _is_kind(kind, arg):
            raise MalformedRecord(f"argument {position} of {name} is {str(arg)[:64]}, which is not of kind {kind}")
    result = operation.infer(*args)
    check_type(result)
    return result


def check_type(kind: TensorType) -> None:
    """Refuse a dtype or shape outside the limits. Raises MalformedRecord."""
    if kind.dtype not in ITEM_BYTES:
        raise MalformedRecord(f"dtype {kind.dtype[:32]!r} is not one of {', '.join(ITEM_BYTES)}")
    if len(kind.shape) > params.TENSOR_RANK_MAX or any(size < 0 for size in kind.shape):
        raise MalformedRecord(f"a tensor of {len(kind.shape)} dimensions, at most {params.TENSOR_RANK_MAX}")
    if kind.elements > params.TENSOR_ELEMENTS_MAX:
        raise MalformedRecord(f"a tensor of {kind.elements} elements, at most {params.TENSOR_ELEMENTS_MAX}")


def cost_of(name: str, args: Sequence[Value], result: TensorType) -> int:
    """The operations charged for one execution: 2 a multiply-add, else elements times the operation's weight."""
    operation = OPERATIONS[name]
    if name in ("mm.default", "bmm.default"):
        left = args[0]
        assert isinstance(left, TensorType)
        return 2 * result.elements * left.shape[-1]
    if operation.view:
        return 1
    if operation.reduces:
        first = args[0]
        assert isinstance(first, TensorType)
        return operation.weight * (first.elements + result.elements)
    return operation.weight * result.elements


def _is_number(arg: object) -> bool:
    return isinstance(arg, float) or _is_int(arg)


def _is_int(arg: object) -> bool:
    return isinstance(arg, int) and not isinstance(arg, bool) and abs(arg) <= INT_MAX


def _is_kind(kind: str, arg: Value) -> bool:
    if kind == "t":
        return isinstance(arg, TensorType)
    if kind == "s":
        return isinstance(arg, TensorType) or _is_number(arg)
    if kind == "n":
        return _is_number(arg)
    if kind == "i":
        return _is_int(arg)
    if kind == "b":
        return isinstance(arg, bool)
    if kind == "d":
        return isinstance(arg, str)
    if isinstance(arg, TensorType) or not isinstance(arg, tuple):
        return False
    if kind == "I":
        return len(arg) <= 2 * params.TENSOR_RANK_MAX and all(_is_int(item) for item in arg)
    return len(arg) > 0 and all(isinstance(item, TensorType) for item in arg)


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise MalformedRecord(what[:200])


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    _need(len(shape) <= params.TENSOR_RANK_MAX and all(size >= 0 for size in shape), f"shape {shape}")
    return tuple(shape)


def _axis(dim: int, x: TensorType) -> None:
    _need(0 <= dim < len(x.shape), f"dimension {dim} of a tensor of shape {x.shape}")


def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The common shape of `shapes` by the rule of NumPy: sizes must be equal or 1, aligned at the right."""
    rank = max(len(shape) for shape in shapes)
    out = []
    for axis in range(rank):
        sizes = {shape[axis - rank + len(shape)] for shape in shapes if axis - rank + len(shape) >= 0} - {1}
        _need(len(sizes) <= 1, f"shapes {shapes} do not broadcast")
        out.append(sizes.pop() if sizes else 1)
    return tuple(out)


# --- movement ----------------------------------------------------------------------------------------------
@_operation("reshape.default", "tI", view=True)
def _reshape(x: TensorType, shape: tuple[int, ...]) -> TensorType:
    _need(math.prod(_sizes(shape)) == x.elements, f"reshape of {x.shape} to {shape}")
    return TensorType(x.dtype, shape)


@_operation("permute.default", "tI", view=True)
def _permute(x: TensorType, dims: tuple[int, ...]) -> TensorType:
    _need(sorted(dims) == list(range(len(x.shape))), f"permute of {x.shape} by {dims}")
    return TensorType(x.dtype, tuple(x.shape[dim] for dim in dims))


@_operation("expand.default", "tI", view=True)
def _expand(x: TensorType, shape: tuple[int, ...]) -> TensorType:
    _need(broadcast(x.shape, _sizes(shape)) == shape, f"expand of {x.shape} to {shape}")
    return TensorType(x.dtype, shape)


@_operation("slice.Tensor", "tiiii", view=True)
def _slice(x: TensorType, dim: int, start: int, end: int, step: int) -> TensorType:
    _axis(dim, x)
    _need(0 <= start <= end <= x.shape[dim] and step >= 1, f"slice {start}:{end}:{step} of {x.shape}")
    size = -(-(end - start) // step)
    return TensorType(x.dtype, (*x.shape[:dim], size, *x.shape[dim + 1 :]))


@_operation("cat.default", "Ti")
def _cat(tensors: tuple[TensorType, ...], dim: int) -> TensorType:
    first = tensors[0]
    _axis(dim, first)
    for tensor in tensors:
        same = tensor.dtype == first.dtype and len(tensor.shape) == len(first.shape)
        _need(same, "cat of tensors of unequal dtype or rank")
        rest = tensor.shape[:dim] + tensor.shape[dim + 1 :]
        _need(rest == first.shape[:dim] + first.shape[dim + 1 :], f"cat of {first.shape} and {tensor.shape}")
    size = sum(tensor.shape[dim] for tensor in tensors)
    return TensorType(first.dtype, (*first.shape[:dim], size, *first.shape[dim + 1 :]))


@_operation("constant_pad_nd.default", "tIn")
def _pad(x: TensorType, pads: tuple[int, ...], value: float) -> TensorType:
    _need(len(pads) % 2 == 0 and len(pads) // 2 <= len(x.shape), f"{len(pads)} pads of {x.shape}")
    _need(all(pad >= 0 for pad in pads), f"negative padding {pads}")
    _need(_fills(value, x.dtype), f"padding a {x.dtype} with {value}")
    shape = list(x.shape)
    for axis in range(len(pads) // 2):
        shape[-1 - axis] += pads[2 * axis] + pads[2 * axis + 1]
    return TensorType(x.dtype, tuple(shape))


@_operation("embedding.default", "tt")
def _embedding(weight: TensorType, index: TensorType) -> TensorType:
    _need(len(weight.shape) == 2 and weight.dtype == "float32", f"embedding weight {weight}")
    _need(index.dtype == "int64", f"embedding index of {index.dtype}")
    return TensorType("float32", (*index.shape, weight.shape[1]))


@_operation("gather.default", "tit")
def _gather(x: TensorType, dim: int, index: TensorType) -> TensorType:
    _axis(dim, x)
    _need(index.dtype == "int64" and len(index.shape) == len(x.shape), f"gather of {x.shape} by {index}")
    fits = all(i <= s for a, (i, s) in enumerate(zip(index.shape, x.shape, strict=True)) if a != dim)
    _need(fits, f"gather of {x.shape} by {index.shape}")
    return TensorType(x.dtype, index.shape)


@_operation("where.self", "ttt")
def _where(condition: TensorType, x: TensorType, y: TensorType) -> TensorType:
    _need(condition.dtype == "bool" and x.dtype == y.dtype, f"where of {condition.dtype}, {x.dtype}, {y.dtype}")
    return TensorType(x.dtype, broadcast(condition.shape, x.shape, y.shape))


@_operation("to.dtype", "td")
def _to(x: TensorType, dtype: str) -> TensorType:
    _need(dtype in ("float32", "int64", "bool"), f"conversion to {dtype[:32]}")
    return TensorType(dtype, x.shape)


def _fills(value: float, dtype: str) -> bool:
    if dtype == "float32":
        return True
    return _is_int(value) and (dtype != "bool" or value in (0, 1)) and (dtype == "int64" or 0 <= value < 128)


@_operation("full.default", "Ind")
def _full(shape: tuple[int, ...], value: float, dtype: str) -> TensorType:
    _need(dtype in ("float32", "int64", "bool") and _fills(value, dtype), f"a {dtype[:32]} filled with {value}")
    return TensorType(dtype, _sizes(shape))


@_operation("arange.start_step", "iii")
def _arange(start: int, end: int, step: int) -> TensorType:
    _need(step >= 1 and start <= end, f"arange {start}:{end}:{step}")
    return TensorType("int64", (-(-(end - start) // step),))


# --- element-wise ------------------------------------------------------------------------------------------
def _pair(x: TensorType, y: TensorType | float, dtypes: tuple[str, ...]) -> TensorType:
    _need(x.dtype in dtypes, f"arithmetic on {x.dtype}")
    if isinstance(y, TensorType):
        _need(y.dtype == x.dtype, f"arithmetic on {x.dtype} and {y.dtype}")
        return TensorType(x.dtype, broadcast(x.shape, y.shape))
    _need(x.dtype == "float32" or _is_int(y), f"arithmetic on {x.dtype} and {y}")
    return x


def _numeric(x: TensorType, y: TensorType | float) -> TensorType:
    return _pair(x, y, ("float32", "int64"))


def _float_pair(x: TensorType, y: TensorType | float) -> TensorType:
    return _pair(x, y, ("float32",))


def _compare(x: TensorType, y: TensorType | float) -> TensorType:
    return TensorType("bool", _numeric(x, y).shape)


def _logic(x: TensorType, y: TensorType | None = None) -> TensorType:
    _need(x.dtype == "bool" and (y is None or y.dtype == "bool"), "logic on what is not bool")
    return TensorType("bool", x.shape if y is None else broadcast(x.shape, y.shape))


def _float(x: TensorType) -> TensorType:
    _need(x.dtype == "float32", f"float operation on {x.dtype}")
    return x


def _signed(x: TensorType) -> TensorType:
    _need(x.dtype in ("float32", "int64"), f"signed operation on {x.dtype}")
    return x


for _name in ("add.Tensor", "sub.Tensor", "mul.Tensor"):
    _operation(_name, "ts")(_numeric)
_operation("div.Tensor", "ts", weight=4)(_float_pair)
for _name in ("maximum.default", "minimum.default"):
    _operation(_name, "tt")(_numeric)
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _operation(f"{_name}.Tensor", "ts")(_compare)
for _name in ("logical_and.default", "logical_or.default"):
    _operation(_name, "tt")(_logic)
_operation("logical_not.default", "t")(_logic)
for _name in ("neg.default", "abs.default"):
    _operation(_name, "t")(_signed)
_operation("sign.default", "t")(_float)
for _name in ("sqrt.default", "reciprocal.default"):
    _operation(_name, "t", weight=4)(_float)
for _name in ("exp.default", "log.default", "erf.default", "tanh.default", "sin.default", "cos.default"):
    _operation(_name, "t", weight=16)(_float)  # a range reduction and a polynomial of about 8 terms


# --- reductions and products -------------------------------------------------------------------------------
def _reduce(x: TensorType, dims: tuple[int, ...], keepdim: bool) -> TensorType:
    _float(x)
    _need(len(dims) > 0 and sorted(set(dims)) == list(dims), f"reduction over dimensions {dims}")
    for dim in dims:
        _axis(dim, x)
        _need(x.shape[dim] > 0, "reduction over an empty dimension")
    if keepdim:
        return TensorType(x.dtype, tuple(1 if axis in dims else size for axis, size in enumerate(x.shape)))
    return TensorType(x.dtype, tuple(size for axis, size in enumerate(x.shape) if axis not in dims))


_operation("sum.dim_IntList", "tIb", weight=2, reduces=True)(_reduce)
_operation("amax.default", "tIb", reduces=True)(_reduce)


@_operation("mm.default", "tt")
def _mm(x: TensorType, y: TensorType) -> TensorType:
    _need(x.dtype == y.dtype == "float32" and len(x.shape) == len(y.shape) == 2, f"mm of {x} and {y}")
    _need(0 < x.shape[1] == y.shape[0] <= params.PRODUCT_LENGTH_MAX, f"mm of {x.shape} and {y.shape}")
    return TensorType("float32", (x.shape[0], y.shape[1]))


@_operation("bmm.default", "tt")
def _bmm(x: TensorType, y: TensorType) -> TensorType:
    _need(x.dtype == y.dtype == "float32" and len(x.shape) == len(y.shape) == 3, f"bmm of {x} and {y}")
    _need(0 < x.shape[2] == y.shape[1] <= params.PRODUCT_LENGTH_MAX, f"bmm of {x.shape} and {y.shape}")
    _need(x.shape[0] == y.shape[0], f"bmm of {x.shape} and {y.shape}")
    return TensorType("float32", (x.shape[0], x.shape[1], y.shape[2]))


@_operation("embedding_dense_backward.default", "ttiib", weight=2, reduces=True)
def _embedding_backward(grad: TensorType, index: TensorType, rows: int, padding: int, scale: bool) -> TensorType:
    _need(grad.dtype == "float32" and index.dtype == "int64", f"embedding gradient of {grad} and {index}")
    _need(len(grad.shape) >= 1 and grad.shape[:-1] == index.shape, f"{grad.shape} and {index.shape}")
    _need(rows >= 1 and -1 <= padding < rows and not scale, "embedding gradient of other than plain rows")
    return TensorType("float32", (rows, grad.shape[-1]))


@_operation("ichiba.uniform", "tiI", weight=16)
def _uniform(step_key: TensorType, number: int, shape: tuple[int, ...]) -> TensorType:
    _need(step_key == TensorType("int64", (2,)), f"step key of type {step_key}")
    _need(0 <= number < params.RANDOM_NODES_MAX, f"random node number {number}")
    _need(math.prod(_sizes(shape)) <= params.RANDOM_WORDS_MAX, f"a random tensor of shape {shape}")
    return TensorType("float32", shape)
