"""The Program: one whole training step as a static graph, in bytes that a stranger may send. DESIGN §4.

`Program.from_bytes` accepts nothing it has not checked: kinds, bounds, references that point backwards only,
operations of the allow-list, and for every node the dtype and shape that follow from its arguments. Length,
operations and memory are therefore known before anything runs. Nothing here imports torch or executes a node.

Values are numbered: first the inputs, then the literals, then the nodes, in their order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Annotated, Literal, TypeAlias

import msgspec

from protocol import params
from protocol.blob import blob_id, manifest_of
from protocol.codec import Uint, decode, encode
from protocol.errors import MalformedRecord
from protocol.operations import ITEM_BYTES, OPERATIONS, TensorType, Value, check_type, cost_of, result_type

__all__ = [
    "BATCH_STREAM",
    "INIT_STREAM",
    "NODE_STREAM",
    "Arg",
    "Constant",
    "Init",
    "Input",
    "Items",
    "Node",
    "Program",
    "Real",
    "Ref",
    "Type",
    "longest_product",
    "operations_per_step",
    "peak_bytes",
    "program_id",
    "resolved",
    "state_layout",
]

# Streams of the counter-based generator, so that no two uses of one (seed, step) share numbers.
BATCH_STREAM = 0
NODE_STREAM = 1  # plus the number of the random node
INIT_STREAM = 2**31  # plus the index of the state tensor in name order; drawn at step 0

DTypeName: TypeAlias = Literal["float32", "int64", "int32", "uint8", "bool"]
Role: TypeAlias = Literal["parameter", "optimizer", "buffer", "batch", "learning_rate", "step_key"]
STATE_ROLES = ("parameter", "optimizer", "buffer")

Size = Annotated[int, msgspec.Meta(ge=0, le=params.TENSOR_ELEMENTS_MAX)]
Shape = Annotated[tuple[Size, ...], msgspec.Meta(max_length=params.TENSOR_RANK_MAX)]
Bits = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class Ref(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=0):
    """The value of that number."""

    value: Uint


class Real(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    """A float64 by its IEEE bits, little-endian, so that no decimal rounding lies between two peers."""

    bits: Bits

    @classmethod
    def of(cls, value: float) -> Real:
        """The float `value`."""
        return cls(struct.pack("<d", value))

    @property
    def value(self) -> float:
        """The float."""
        return float(struct.unpack("<d", self.bits)[0])


class Type(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    """A dtype."""

    name: DTypeName


class Items(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=3):
    """A list of integers or of values; lists do not nest, because no operation takes nested ones."""

    items: Annotated[tuple[int | Ref, ...], msgspec.Meta(max_length=params.NODE_LIST_MAX)]


Arg: TypeAlias = int | bool | Ref | Real | Type | Items | None


class Init(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How a state tensor starts when the task starts from its seed.

    constant a; normal of mean a and deviation b; uniform in [a, b); given: the task must bring a checkpoint.
    """

    kind: Literal["constant", "normal", "uniform", "given"]
    a_bits: Bits = bytes(8)
    b_bits: Bits = bytes(8)

    @classmethod
    def of(cls, kind: Literal["constant", "normal", "uniform", "given"], a: float = 0.0, b: float = 0.0) -> Init:
        """A rule from Python floats."""
        return cls(kind, struct.pack("<d", a), struct.pack("<d", b))

    @property
    def a(self) -> float:
        """The constant, mean or lower bound."""
        return float(struct.unpack("<d", self.a_bits)[0])

    @property
    def b(self) -> float:
        """The deviation or upper bound."""
        return float(struct.unpack("<d", self.b_bits)[0])


class Input(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor that comes from outside the step. `init` stands for state only."""

    name: Name
    role: Role
    dtype: DTypeName
    shape: Shape
    init: Init | None

    @property
    def type(self) -> TensorType:
        """Its dtype and shape."""
        return TensorType(self.dtype, self.shape)


class Constant(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A small literal tensor, its elements little-endian and row-major."""

    dtype: DTypeName
    shape: Shape
    data: Annotated[bytes, msgspec.Meta(max_length=params.LITERAL_BYTES_MAX)]

    @property
    def type(self) -> TensorType:
        """Its dtype and shape."""
        return TensorType(self.dtype, self.shape)


class Node(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One operation. `source` is the base name and line of the user's file it came from; it decides nothing."""

    op: Annotated[str, msgspec.Meta(max_length=64)]
    args: Annotated[tuple[Arg, ...], msgspec.Meta(max_length=8)]
    dtype: DTypeName
    shape: Shape
    source: Annotated[str, msgspec.Meta(max_length=96)]

    @property
    def type(self) -> TensorType:
        """The dtype and shape of the result."""
        return TensorType(self.dtype, self.shape)

    def refs(self) -> Iterator[int]:
        """The numbers of the values it reads, in the order of its arguments."""
        for arg in self.args:
            if isinstance(arg, Ref):
                yield arg.value
            elif isinstance(arg, Items):
                yield from (item.value for item in arg.items if isinstance(item, Ref))


class Update(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """After the step the state tensor `name` is the value of that number."""

    name: Name
    value: Uint


class Program(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ichiba/program/1", dict=True
):
    """A whole training step: state, batch, learning rate and step key in; new state and loss out."""

    inputs: Annotated[tuple[Input, ...], msgspec.Meta(min_length=1, max_length=params.PROGRAM_INPUTS_MAX)]
    constants: Annotated[tuple[Constant, ...], msgspec.Meta(max_length=params.PROGRAM_CONSTANTS_MAX)]
    nodes: Annotated[tuple[Node, ...], msgspec.Meta(min_length=1, max_length=params.PROGRAM_NODES_MAX)]
    updates: Annotated[tuple[Update, ...], msgspec.Meta(min_length=1, max_length=params.PROGRAM_INPUTS_MAX)]
    loss: Uint

    @classmethod
    def from_bytes(cls, data: bytes) -> Program:
        """Decode and check a Program from anybody. Raises MalformedRecord, LimitExceeded."""
        program = decode(cls, data, bytes_max=params.PROGRAM_BYTES_MAX)
        program.check()
        return program

    def to_bytes(self) -> bytes:
        """The one encoding."""
        return encode(self)

    @cached_property
    def types(self) -> tuple[TensorType, ...]:
        """The dtype and shape of every value, by its number."""
        inputs, constants = [item.type for item in self.inputs], [item.type for item in self.constants]
        return (*inputs, *constants, *(node.type for node in self.nodes))

    @property
    def first_node(self) -> int:
        """The value number of node 0."""
        return len(self.inputs) + len(self.constants)

    def inputs_of(self, *roles: Role) -> list[Input]:
        """The inputs of any of these roles, in order."""
        return [item for item in self.inputs if item.role in roles]

    def check(self) -> None:
        """Refuse what a decoder cannot express. Raises MalformedRecord."""
        self._check_inputs()
        for constant in self.constants:
            check_type(constant.type)
            if constant.type.size_bytes != len(constant.data):
                raise MalformedRecord(f"literal of {len(constant.data)} bytes for {constant.type}")
            if constant.dtype == "bool" and set(constant.data) - {0, 1}:
                raise MalformedRecord("a bool literal with other bytes than 0 and 1")
        self._check_nodes()
        self._check_outputs()
        operations = operations_per_step(self)
        if not 1 <= operations <= params.PROGRAM_OPERATIONS_MAX:
            raise MalformedRecord(f"{operations} operations a step, at most {params.PROGRAM_OPERATIONS_MAX}")
        peak = peak_bytes(self)
        if peak > params.PROGRAM_PEAK_BYTES_MAX:
            raise MalformedRecord(f"{peak} bytes at the peak, at most {params.PROGRAM_PEAK_BYTES_MAX}")

    def _check_inputs(self) -> None:
        if len({item.name for item in self.inputs}) != len(self.inputs):
            raise MalformedRecord("two inputs of one name")
        for item in self.inputs:
            check_type(item.type)
            if (item.init is not None) != (item.role in STATE_ROLES):
                raise MalformedRecord(f"input {item.name} of role {item.role}: init rules belong to state alone")
            if item.init is not None:
                _check_init(item, item.init)
        for role, kind in (("learning_rate", TensorType("float32", ())), ("step_key", TensorType("int64", (2,)))):
            found = [item for item in self.inputs if item.role == role]
            if len(found) > 1 or any(item.type != kind for item in found):
                raise MalformedRecord(f"there is at most one {role}, a {kind.dtype} of shape {kind.shape}")
        if not self.inputs_of("batch"):
            raise MalformedRecord("no input of role batch")

    def _check_nodes(self) -> None:
        known = [*(item.type for item in self.inputs), *(item.type for item in self.constants)]
        for number, node in enumerate(self.nodes):
            if any(ref >= len(known) for ref in node.refs()):
                raise MalformedRecord(f"node {number} reads a value that is not computed before it")
            inferred = result_type(node.op, resolved(node.args, known))
            if inferred != node.type:
                raise MalformedRecord(f"node {number} ({node.op}) declares {node.type}, its result is {inferred}")
            known.append(inferred)

    def _check_outputs(self) -> None:
        state = sorted((item.name, item.type) for item in self.inputs if item.role in STATE_ROLES)
        if [update.name for update in self.updates] != [name for name, _ in state]:
            raise MalformedRecord("updates are not exactly the state inputs in the order of their names")
        for update, (name, kind) in zip(self.updates, state, strict=True):
            if update.value >= len(self.types) or self.types[update.value] != kind:
                raise MalformedRecord(f"the new value of {name} is not a {kind}")
        if self.loss >= len(self.types) or self.types[self.loss] != TensorType("float32", ()):
            raise MalformedRecord("the loss is not one float32")


def _check_init(item: Input, init: Init) -> None:
    a, b = init.a, init.b
    if not (math.isfinite(a) and math.isfinite(b)) or max(abs(a), abs(b)) > 2.0**100:
        raise MalformedRecord(f"init of {item.name} with {a}, {b}")
    if (init.kind == "normal" and b < 0) or (init.kind == "uniform" and a > b):
        raise MalformedRecord(f"init of {item.name}: {init.kind} with {a}, {b}")
    if item.dtype != "float32" and init.kind in ("normal", "uniform"):
        raise MalformedRecord(f"init of {item.name}: {init.kind} for a {item.dtype}")
    if item.dtype != "float32" and init.kind == "constant" and not (a.is_integer() and 0 <= a < 128):
        raise MalformedRecord(f"init of {item.name}: constant {a} for a {item.dtype}")
    if item.dtype == "bool" and a > 1:
        raise MalformedRecord(f"init of {item.name}: constant {a} for a bool")
    if (init.kind == "given" and init.a_bits != bytes(8)) or (
        init.kind in ("given", "constant") and init.b_bits != bytes(8)
    ):
        raise MalformedRecord(f"init of {item.name}: a number that {init.kind} does not use")


def resolved(args: tuple[Arg, ...], known: Sequence[TensorType]) -> list[Value]:
    """The arguments with values replaced by their types and floats by their numbers."""
    resolved: list[Value] = []
    for arg in args:
        if isinstance(arg, Ref):
            resolved.append(known[arg.value])
        elif isinstance(arg, Real):
            resolved.append(arg.value)
        elif isinstance(arg, Type):
            resolved.append(arg.name)
        elif isinstance(arg, Items):
            resolved.append(tuple(known[item.value] if isinstance(item, Ref) else item for item in arg.items))
        else:
            resolved.append(arg)
    return resolved


def program_id(data: bytes) -> bytes:
    """The id of an encoded Program: 32 bytes, the name of its blob, so who knows the id can ask for the bytes."""
    parts = (data[i : i + params.BLOB_CHUNK_BYTES] for i in range(0, len(data), params.BLOB_CHUNK_BYTES))
    return blob_id(manifest_of(parts))


def state_layout(program: Program) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each state tensor, in the order of their names."""
    state = [item for item in program.inputs if item.role in STATE_ROLES]
    return {item.name: (item.dtype, item.shape) for item in sorted(state, key=lambda item: item.name)}


def operations_per_step(program: Program) -> int:
    """The operations one step is charged for (protocol.operations.cost_of, summed over the nodes)."""
    types = list(program.types)
    return sum(cost_of(node.op, resolved(node.args, types), node.type) for node in program.nodes)


def longest_product(program: Program) -> int:
    """The largest inner dimension of a matrix product in it, 0 if there is none."""
    products = [node for node in program.nodes if node.op in ("mm.default", "bmm.default")]
    return max((program.types[next(node.refs())].shape[-1] for node in products), default=0)


def peak_bytes(program: Program) -> int:
    """An estimate, from above, of the bytes one step holds at once in exact mode.

    Walks the nodes as the executor does: a value lives until its last use, a view keeps what it looks at, and a
    node needs float64 scratch for its operands and its result (exact kernels quantize to float64).
    """
    types = program.types
    first = program.first_node
    owner = list(range(len(types)))  # the value whose memory this value may share
    dense = [True] * len(types)
    for number, node in enumerate(program.nodes, first):
        if OPERATIONS[node.op].view:
            base = next(node.refs())
            copies = node.op == "reshape.default" and not dense[base]
            owner[number] = number if copies else owner[base]
            dense[number] = node.op == "reshape.default"
    last = dict.fromkeys(range(first), len(types))
    for number, node in enumerate(program.nodes, first):
        for ref in (number, *node.refs()):
            last[owner[ref]] = max(last.get(owner[ref], 0), number)
    for value in (program.loss, *(update.value for update in program.updates)):
        last[owner[value]] = len(types)
    dies: dict[int, list[int]] = {}
    for value, number in last.items():
        dies.setdefault(number, []).append(value)
    held = sum(kind.size_bytes for kind in types[:first])
    peak = held
    for number, node in enumerate(program.nodes, first):
        if owner[number] == number:
            held += types[number].size_bytes
        scratch = 0
        if not OPERATIONS[node.op].view:
            scratch = 2 * ITEM_BYTES["int64"] * sum(types[ref].elements for ref in (number, *node.refs()))
        peak = max(peak, held + scratch)
        held -= sum(types[value].size_bytes for value in dies.get(number, ()))
    return peak
