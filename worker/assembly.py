"""From a traced fx graph to a Program: rename, normalise, share equal nodes, drop the dead ones.

The graph holds lowered ATen calls only (worker/lowering.py). What still is not an operation of the allow-list is
refused here with its name, the user's line and what to write instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from protocol import params
from protocol.errors import RemoteProtocolError, UnsupportedModel
from protocol.operations import ITEM_BYTES, OPERATIONS
from protocol.program import Arg, Constant, Input, Items, Node, Program, Real, Ref, Type, Update

__all__ = ["TRANSLATED", "assemble"]

aten = torch.ops.aten
prims = torch.ops.prims

ADVICE = {
    "median": "sort and take the middle: x.sort(dim).values.select(dim, n // 2)",
    "unique": "its shape depends on the data; do it outside the step",
    "nonzero": "its shape depends on the data; use torch.where(mask, x, 0) in place of x[mask]",
    "pow": "write the power as products, or torch.exp(y * torch.log(x)) where x is positive",
    "index": "x[mask] has a shape that depends on the data; use torch.where(mask, x, 0)",
    "index_put": "use torch.where with a mask, or scatter",
    "scatter": "give it an index of the tensor's shape but for the one dimension, or use torch.where",
    "item": "keep values as tensors: a step has no branch that depends on data",
    "prod": "use the exponential of a sum of logarithms",
    "cumprod": "use the exponential of a cumsum of logarithms",
    "remainder": "compute it outside the step and register_buffer the result",
    "_foreach": "return a plain torch.optim optimizer from build()",
    "random": "use torch.rand or nn.Dropout, which become the market's own generator",
    "_fft": "multiply by a matrix of sines and cosines",
    "_cdist": "expand the square: x.square().sum(1)[:, None] - 2 * x @ y.T + y.square().sum(1)",
    "upsample": "use F.interpolate(mode='nearest') with a whole scale_factor",
}
_LONGEST = sorted(ADVICE, key=len, reverse=True)
PASS_THROUGH = {
    aten.clone.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.lift.default,
    aten.contiguous.default,
}
RESHAPES = {
    aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.reshape.default, aten._reshape_alias.default,
}
FILLS: dict[Any, Callable[[fx.Node], Any]] = {
    aten.full.default: lambda node: node.args[1],
    aten.full_like.default: lambda node: node.args[1],
    aten.new_full.default: lambda node: node.args[2],
    aten.scalar_tensor.default: lambda node: node.args[0],
    **{op: lambda node: 0 for op in (
        aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default,
        # Memory without a value is zeros here: a step may not depend on what lay there before.
        aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
        aten.new_empty_strided.default,
    )},
    **{op: lambda node: 1 for op in (aten.ones.default, aten.ones_like.default, aten.new_ones.default)},
}
PAIRS = {
    **{getattr(aten, name).Tensor: f"{name}.Tensor" for name in ("add", "sub", "mul", "div")},
    **{getattr(aten, name).Scalar: f"{name}.Tensor" for name in ("add", "sub", "mul", "div")},
    aten.maximum.default: "maximum.default",
    aten.minimum.default: "minimum.default",
}
COMPARISONS = {
    getattr(getattr(aten, name), kind): f"{name}.Tensor"
    for name in ("eq", "ne", "lt", "le", "gt", "ge") for kind in ("Tensor", "Scalar")
}
LOGIC = {
    aten.logical_and.default: "logical_and.default", aten.bitwise_and.Tensor: "logical_and.default",
    aten.logical_or.default: "logical_or.default", aten.bitwise_or.Tensor: "logical_or.default",
    aten.logical_not.default: "logical_not.default", aten.bitwise_not.default: "logical_not.default",
}
CONVERSIONS = {aten._to_copy.default, aten.to.dtype, prims.convert_element_type.default, aten.type_as.default}
UNARY = {
    getattr(aten, name).default: f"{name}.default"
    for name in ("neg", "abs", "sign", "sqrt", "reciprocal", "exp", "log", "erf", "tanh", "sin", "cos")
}
PLAIN = {aten.mm.default: "mm.default", aten.bmm.default: "bmm.default"}
SHAPED = {
    aten.permute.default, aten.t.default, aten.transpose.int, aten.expand.default, aten.slice.Tensor, aten.select.int,
    aten.constant_pad_nd.default, aten.sum.dim_IntList, aten.amax.default, aten.embedding.default,
    aten.embedding_dense_backward.default, aten.gather.default, aten.where.self, aten.cat.default,
    aten.arange.default, aten.arange.start, aten.arange.start_step,
}
TRANSLATED: frozenset[Any] = frozenset(
    {*PASS_THROUGH, *RESHAPES, *FILLS, *PAIRS, *COMPARISONS, *LOGIC, *CONVERSIONS, *UNARY, *PLAIN, *SHAPED}
)
"""The overloads `assemble` takes as they are: no decomposition may touch them first."""


@dataclass(frozen=True)
class Known:
    """A value of the Program under construction: number, dtype, shape."""

    number: int
    dtype: str
    shape: tuple[int, ...]


def assemble(
    graph: fx.GraphModule,
    inputs: Sequence[Input],
    outputs: Sequence[str],
    source_of: Callable[[fx.Node], str],
) -> Program:
    """The Program of `graph`, whose placeholders are `inputs` and whose outputs are the new state tensors of the
    names `outputs`, then the loss.

    Raises UnsupportedModel for an operation, dtype or literal that a Program cannot hold.
    """
    constants, literals = _constants(graph, source_of)
    builder = _Builder(inputs, constants, source_of)
    values: dict[fx.Node, Known] = {}
    placeholders = iter(range(len(inputs)))
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            number = next(placeholders)
            values[node] = Known(number, inputs[number].dtype, inputs[number].shape)
        elif node.op == "get_attr":
            number, literal = literals[str(node.target)]
            values[node] = Known(len(inputs) + number, literal.dtype, literal.shape)
        elif node.op == "call_function":
            values[node] = builder.translate(node, values)
        elif node.op == "output":
            found = [builder.as_value(item, values, node) for item in node.args[0]]
    updates = sorted(
        (Update(name, value.number) for name, value in zip(outputs, found[:-1], strict=True)),
        key=lambda update: update.name,
    )
    whole = Program(tuple(inputs), tuple(constants), tuple(builder.nodes), tuple(updates), found[-1].number)
    program = _without_dead(whole)
    try:
        return Program.from_bytes(program.to_bytes())
    except RemoteProtocolError as error:
        raise UnsupportedModel(f"the captured step is outside the limits: {error.what}") from error


def _constants(
    graph: fx.GraphModule, source_of: Callable[[fx.Node], str]
) -> tuple[list[Constant], dict[str, tuple[int, Constant]]]:
    constants: list[Constant] = []
    by_target: dict[str, tuple[int, Constant]] = {}
    for node in graph.graph.nodes:
        if node.op != "get_attr" or str(node.target) in by_target:
            continue
        tensor = getattr(graph, str(node.target)).detach().contiguous()
        dtype = _dtype_name(tensor.dtype, node, source_of)
        data = tensor.numpy().tobytes()
        if len(data) > params.LITERAL_BYTES_MAX:
            raise UnsupportedModel(
                f"a tensor of shape {tuple(tensor.shape)} is a literal of the graph ({source_of(node)})",
                why=f"literals are at most {params.LITERAL_BYTES_MAX} bytes",
                next_step="make it a parameter or register_buffer of the model",
            )
        constant = Constant(dtype, tuple(tensor.shape), data)  # type: ignore[arg-type]
        by_target[str(node.target)] = (len(constants), constant)
        constants.append(constant)
    return constants, by_target


def _dtype_name(dtype: torch.dtype, node: fx.Node, source_of: Callable[[fx.Node], str]) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise UnsupportedModel(
            f"{node.target} gives {name} ({source_of(node) or 'line unknown'})",
            why="exact mode computes in float32, int64 and bool", next_step="convert to float32",
        )
    return name


class _Builder:
    """Nodes in order; equal nodes (same operation, same arguments) are one."""

    def __init__(
        self, inputs: Sequence[Input], constants: Sequence[Constant], source_of: Callable[[fx.Node], str]
    ) -> None:
        self.nodes: list[Node] = []
        self.first = len(inputs) + len(constants)
        self.source_of = source_of
        self._seen: dict[tuple[Any, ...], Known] = {}
        self._randoms = 0

    def emit(self, op: str, args: Sequence[Arg], dtype: str, shape: Sequence[int], source: str) -> Known:
        """One node, or the equal one that is there already."""
        key = (op, tuple((type(arg), arg) for arg in args))
        known = self._seen.get(key)
        if known is None:
            node = Node(op, tuple(args), dtype, tuple(shape), source[:96])  # type: ignore[arg-type]
            known = self._seen[key] = Known(self.first + len(self.nodes), dtype, tuple(shape))
            self.nodes.append(node)
        return known

    def as_value(self, arg: Any, values: Mapping[fx.Node, Known], node: fx.Node) -> Known:
        """The value of an fx node; anything else in its place is a bug of the lowering."""
        if not isinstance(arg, fx.Node):
            raise UnsupportedModel(f"{node.target} takes {arg!r} where a tensor belongs ({self.source_of(node)})")
        return values[arg]

    def translate(self, node: fx.Node, values: Mapping[fx.Node, Known]) -> Known:
        """The value of one call. Raises UnsupportedModel."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise self._refusal(node)
        dtype, shape = _dtype_name(value.dtype, node, self.source_of), tuple(value.shape)
        source = self.source_of(node)
        target = node.target
        if target in FILLS:
            return self._full(FILLS[target](node), dtype, shape, source)
        if target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
            return self._arange(node, dtype, shape, source)
        if target == torch.ops.ichiba.uniform.default:
            key = self.as_value(node.args[0], values, node)
            self._randoms += 1
            args: list[Arg] = [Ref(key.number), self._randoms - 1, Items(shape)]
            return self.emit("ichiba.uniform", args, dtype, shape, source)
        if target == aten.cat.default:
            parts = [self.as_value(item, values, node) for item in node.args[0]]
            kept = [self._cast(part, dtype, source) for part in parts if part.shape != (0,) or shape == (0,)]
            dim = int(node.args[1]) if len(node.args) > 1 else 0
            refs = Items(tuple(Ref(part.number) for part in kept))
            return self.emit("cat.default", [refs, dim % len(shape)], dtype, shape, source)
        first = self.as_value(node.args[0], values, node) if isinstance(node.args[0], fx.Node) else None
        if first is None:
            raise self._refusal(node)
        if target in PASS_THROUGH:
            return first
        if target in CONVERSIONS:
            return self._cast(first, dtype, source)
        if target in PAIRS:
            return self._pair(node, values, PAIRS[target], dtype, shape, source)
        if target in COMPARISONS:
            return self._compare(node, values, COMPARISONS[target], shape, source)
        if target in LOGIC:
            operands = [self.as_value(arg, values, node) for arg in node.args]
            if any(operand.dtype != "bool" for operand in operands):
                raise self._refusal(node)
            return self.emit(LOGIC[target], [Ref(item.number) for item in operands], dtype, shape, source)
        if target in UNARY and (first.dtype == dtype == "float32" or target in (aten.neg.default, aten.abs.default)):
            return self.emit(UNARY[target], [Ref(first.number)], dtype, shape, source)
        if target in PLAIN and dtype == "float32":
            refs_of = [Ref(self.as_value(arg, values, node).number) for arg in node.args]
            return self.emit(PLAIN[target], refs_of, dtype, shape, source)
        return self._shaped(node, values, first, dtype, shape, source)

    def _shaped(
        self, node: fx.Node, values: Mapping[fx.Node, Known], x: Known, dtype: str, shape: tuple[int, ...], source: str
    ) -> Known:
        """Movement and reductions: what depends on dimensions."""
        target, args = node.target, node.args
        rank = len(x.shape)
        ref = Ref(x.number)
        if target in RESHAPES:
            return self._reshape(x, shape, source)
        if target in (aten.permute.default, aten.t.default, aten.transpose.int):
            return self._permute(x, _permutation(node, rank), source)
        if target == aten.expand.default:
            return x if shape == x.shape else self.emit("expand.default", [ref, Items(shape)], dtype, shape, source)
        if target == aten.slice.Tensor:
            dim = _argument(node, 1, 0) % rank
            start, _, step = slice(
                _argument(node, 2, None), _argument(node, 3, None), _argument(node, 4, 1)
            ).indices(x.shape[dim])
            end = start + (shape[dim] - 1) * step + 1 if shape[dim] else start
            return self._slice(x, dim, start, end, step, source)
        if target == aten.select.int:
            dim = _argument(node, 1, 0) % rank
            place = _argument(node, 2, 0) % x.shape[dim]
            return self._reshape(self._slice(x, dim, place, place + 1, 1, source), shape, source)
        if target == aten.constant_pad_nd.default:
            return self._pad(x, list(args[1]), _argument(node, 2, 0), source)
        if target in (aten.sum.dim_IntList, aten.amax.default) and dtype == x.dtype == "float32":
            dims = [dim % max(1, rank) for dim in (_argument(node, 1, None) or range(rank))]
            if not dims:
                return x
            items: list[Arg] = [ref, Items(tuple(sorted(dims))), bool(_argument(node, 2, False))]
            name = "amax.default" if target == aten.amax.default else "sum.dim_IntList"
            return self.emit(name, items, dtype, shape, source)
        if target == aten.embedding.default:
            index = self._cast(self.as_value(args[1], values, node), "int64", source)
            return self.emit("embedding.default", [ref, Ref(index.number)], dtype, shape, source)
        if target == aten.embedding_dense_backward.default and not args[4]:
            index = self._cast(self.as_value(args[1], values, node), "int64", source)
            rest: list[Arg] = [int(args[2]), int(args[3]), False]
            return self.emit("embedding_dense_backward.default", [ref, Ref(index.number), *rest], dtype, shape, source)
        if target == aten.gather.default:
            index = self.as_value(args[2], values, node)
            dim = int(args[1]) % rank
            return self.emit("gather.default", [ref, dim, Ref(index.number)], dtype, shape, source)
        if target == aten.where.self:
            sides = [self._cast(self.as_value(arg, values, node), dtype, source) for arg in args[1:]]
            return self.emit("where.self", [ref, *(Ref(side.number) for side in sides)], dtype, shape, source)
        raise self._refusal(node)

    def _refusal(self, node: fx.Node) -> UnsupportedModel:
        name = str(node.target).removeprefix("aten.")
        stem = name.split(".")[0].rstrip("_")
        advice = next((ADVICE[part] for part in _LONGEST if stem == part or stem.startswith(part + "_")), "")
        return UnsupportedModel(
            f"operation {name} is not supported ({self.source_of(node) or 'line unknown'})",
            why="it has no exact kernel and no rule for a referee",
            next_step=advice or f"write it with other operations; supported are {', '.join(_known_names())}",
        )

    def _full(self, value: Any, dtype: str, shape: tuple[int, ...], source: str) -> Known:
        if dtype not in ("float32", "int64", "bool"):
            return self._cast(self._full(value, "int64", shape, source), dtype, source)
        number: Arg = Real.of(float(value)) if dtype == "float32" else int(value)
        return self.emit("full.default", [Items(shape), number, Type(dtype)], dtype, shape, source)  # type: ignore[arg-type]

    def _arange(self, node: fx.Node, dtype: str, shape: tuple[int, ...], source: str) -> Known:
        bounds = list(node.args)
        start, end, step = {1: [0, *bounds, 1], 2: [*bounds, 1]}.get(len(bounds), bounds)
        if any(isinstance(bound, float) and not bound.is_integer() for bound in (start, end, step)) or step < 1:
            raise self._refusal(node)
        whole: list[Arg] = [int(start), max(int(start), int(end)), int(step)]
        return self._cast(self.emit("arange.start_step", whole, "int64", shape, source), dtype, source)

    def _cast(self, x: Known, dtype: str, source: str) -> Known:
        if x.dtype == dtype:
            return x
        return self.emit("to.dtype", [Ref(x.number), Type(dtype)], dtype, x.shape, source)  # type: ignore[arg-type]

    def _number(self, value: Any, dtype: str) -> Arg:
        return Real.of(float(value)) if dtype == "float32" else int(value)

    def _pair(
        self, node: fx.Node, values: Mapping[fx.Node, Known], op: str, dtype: str, shape: tuple[int, ...], source: str
    ) -> Known:
        alpha = node.kwargs.get("alpha", 1)
        rounding = node.kwargs.get("rounding_mode")
        if op == "mul.Tensor" and dtype == "bool":
            sides = [Ref(self.as_value(arg, values, node).number) for arg in node.args]
            return self.emit("logical_and.default", sides, dtype, shape, source)
        if rounding is not None or dtype == "bool":
            raise self._refusal(node)
        left = self._cast(self.as_value(node.args[0], values, node), dtype, source)
        other = node.args[1]
        if not isinstance(other, fx.Node):
            if alpha != 1:
                other = other * alpha
            if op in ("mul.Tensor", "div.Tensor") and other == 1:
                return left
            return self.emit(op, [Ref(left.number), self._number(other, dtype)], dtype, shape, source)
        right = self._cast(values[other], dtype, source)
        if alpha != 1:
            factor = self._number(alpha, dtype)
            right = self.emit("mul.Tensor", [Ref(right.number), factor], dtype, right.shape, source)
        return self.emit(op, [Ref(left.number), Ref(right.number)], dtype, shape, source)

    def _compare(
        self, node: fx.Node, values: Mapping[fx.Node, Known], op: str, shape: tuple[int, ...], source: str
    ) -> Known:
        left = self.as_value(node.args[0], values, node)
        other = node.args[1]
        if isinstance(other, fx.Node):
            right = values[other]
            common = "float32" if "float32" in (left.dtype, right.dtype) else "int64"
            sides = [Ref(self._cast(side, common, source).number) for side in (left, right)]
            return self.emit(op, sides, "bool", shape, source)
        common = "float32" if left.dtype == "float32" or isinstance(other, float) else "int64"
        number = self._number(other, common)
        return self.emit(op, [Ref(self._cast(left, common, source).number), number], "bool", shape, source)

    def _reshape(self, x: Known, shape: tuple[int, ...], source: str) -> Known:
        if shape == x.shape:
            return x
        above = self._node(x)
        if above is not None and above.op == "reshape.default":
            base = next(above.refs())
            if self._shape_of(base) == shape:
                return Known(base, x.dtype, shape)
            return self.emit("reshape.default", [Ref(base), Items(shape)], x.dtype, shape, source)
        return self.emit("reshape.default", [Ref(x.number), Items(shape)], x.dtype, shape, source)

    def _permute(self, x: Known, dims: tuple[int, ...], source: str) -> Known:
        above = self._node(x)
        base = x.number
        if above is not None and above.op == "permute.default":
            base = next(above.refs())
            inner = above.args[1]
            assert isinstance(inner, Items)
            dims = tuple(int(inner.items[dim]) for dim in dims)  # type: ignore[arg-type]
            x = Known(base, x.dtype, tuple(_unpermuted(above.shape, inner)))
        if dims == tuple(range(len(dims))):
            return Known(base, x.dtype, x.shape)
        shape = tuple(x.shape[dim] for dim in dims)
        return self.emit("permute.default", [Ref(base), Items(dims)], x.dtype, shape, source)

    def _slice(self, x: Known, dim: int, start: int, end: int, step: int, source: str) -> Known:
        if (start, step) == (0, 1) and end == x.shape[dim]:
            return x
        shape = (*x.shape[:dim], len(range(start, end, step)), *x.shape[dim + 1 :])
        return self.emit("slice.Tensor", [Ref(x.number), dim, start, end, step], x.dtype, shape, source)

    def _pad(self, x: Known, pads: list[int], value: Any, source: str) -> Known:
        # A negative pad cuts: it becomes a slice, so that the operation itself only adds.
        for axis in range(len(pads) // 2):
            dim = len(x.shape) - 1 - axis
            before, after = min(0, pads[2 * axis]), min(0, pads[2 * axis + 1])
            x = self._slice(x, dim, -before, x.shape[dim] + after, 1, source)
        grown = [max(0, pad) for pad in pads]
        if not any(grown):
            return x
        shape = list(x.shape)
        for axis in range(len(pads) // 2):
            shape[-1 - axis] += grown[2 * axis] + grown[2 * axis + 1]
        args: list[Arg] = [Ref(x.number), Items(tuple(grown)), self._number(value, x.dtype)]
        return self.emit("constant_pad_nd.default", args, x.dtype, shape, source)

    def _node(self, x: Known) -> Node | None:
        return self.nodes[x.number - self.first] if x.number >= self.first else None

    def _shape_of(self, number: int) -> tuple[int, ...] | None:
        return self.nodes[number - self.first].shape if number >= self.first else None


def _argument(node: fx.Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default


def _unpermuted(shape: Sequence[int], dims: Items) -> list[int]:
    before = [0] * len(shape)
    for place, dim in enumerate(dims.items):
        before[int(dim)] = shape[place]  # type: ignore[arg-type]
    return before


def _permutation(node: fx.Node, rank: int) -> tuple[int, ...]:
    if node.target == aten.permute.default:
        return tuple(dim % rank for dim in node.args[1])
    order = list(range(rank))
    if node.target == aten.t.default:
        return tuple(reversed(order))
    a, b = (int(dim) % rank for dim in node.args[1:3])
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def _known_names() -> list[str]:
    return sorted({name.split(".")[0] for name in OPERATIONS if not name.startswith("ichiba")})


def _without_dead(program: Program) -> Program:
    """The same Program without nodes that no output needs; the rest renumbered."""
    first = program.first_node
    needed = {program.loss, *(update.value for update in program.updates)}
    for number in range(len(program.nodes) - 1, -1, -1):
        if first + number in needed:
            needed.update(program.nodes[number].refs())
    used = [number for number in range(len(program.constants)) if len(program.inputs) + number in needed]
    kept = [number for number in range(len(program.nodes)) if first + number in needed]
    order = [*range(len(program.inputs)), *(len(program.inputs) + n for n in used), *(first + n for n in kept)]
    renumbered = {old: new for new, old in enumerate(order)}

    def moved(arg: Arg) -> Arg:
        if isinstance(arg, Ref):
            return Ref(renumbered[arg.value])
        if isinstance(arg, Items):
            return Items(tuple(Ref(renumbered[i.value]) if isinstance(i, Ref) else i for i in arg.items))
        return arg

    nodes = []
    for number in kept:
        node = program.nodes[number]
        nodes.append(Node(node.op, tuple(moved(arg) for arg in node.args), node.dtype, node.shape, node.source))
    return Program(
        program.inputs,
        tuple(program.constants[number] for number in used),
        tuple(nodes),
        tuple(Update(update.name, renumbered[update.value]) for update in program.updates),
        renumbered[program.loss],
    )
