"""A Program is data that a stranger sends: what is accepted, and that nothing else is."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import params
from protocol.errors import IchibaError, LimitExceeded, MalformedRecord
from protocol.operations import OPERATIONS, TensorType, cost_of, result_type
from protocol.program import (
    Constant,
    Init,
    Input,
    Items,
    Node,
    Program,
    Real,
    Ref,
    Type,
    Update,
    operations_per_step,
    peak_bytes,
    program_id,
    state_layout,
)

F32 = "float32"


def regression() -> Program:
    """One gradient step of a linear regression with a dropped-out input, by hand."""
    inputs = (
        Input("w", "parameter", F32, (3, 1), Init.of("uniform", -1.0, 1.0)),
        Input("steps", "buffer", "int64", (), Init.of("constant", 0.0)),
        Input("x", "batch", F32, (4, 3), None),
        Input("y", "batch", F32, (4, 1), None),
        Input("rate", "learning_rate", F32, (), None),
        Input("key", "step_key", "int64", (2,), None),
    )
    constants = (Constant(F32, (4, 1), struct.pack("<4f", 1, 1, 1, 1)),)
    nodes = (
        Node("ichiba.uniform", (Ref(5), 0, Items((4, 3))), F32, (4, 3), "m.py:1"),  # 7
        Node("lt.Tensor", (Ref(7), Real.of(0.9)), "bool", (4, 3), "m.py:1"),  # 8
        Node("to.dtype", (Ref(8), Type(F32)), F32, (4, 3), "m.py:1"),  # 9
        Node("mul.Tensor", (Ref(2), Ref(9)), F32, (4, 3), "m.py:1"),  # 10
        Node("mm.default", (Ref(10), Ref(0)), F32, (4, 1), "m.py:2"),  # 11
        Node("sub.Tensor", (Ref(11), Ref(3)), F32, (4, 1), "m.py:3"),  # 12
        Node("mul.Tensor", (Ref(12), Ref(6)), F32, (4, 1), "m.py:3"),  # 13
        Node("mul.Tensor", (Ref(13), Ref(13)), F32, (4, 1), "m.py:3"),  # 14
        Node("sum.dim_IntList", (Ref(14), Items((0, 1)), False), F32, (), "m.py:3"),  # 15
        Node("permute.default", (Ref(10), Items((1, 0))), F32, (3, 4), ""),  # 16
        Node("mm.default", (Ref(16), Ref(13)), F32, (3, 1), ""),  # 17
        Node("mul.Tensor", (Ref(17), Ref(4)), F32, (3, 1), ""),  # 18
        Node("sub.Tensor", (Ref(0), Ref(18)), F32, (3, 1), ""),  # 19
        Node("add.Tensor", (Ref(1), 1), "int64", (), ""),  # 20
    )
    return Program(inputs, constants, nodes, (Update("steps", 20), Update("w", 19)), 15)


def test_a_program_survives_its_bytes() -> None:
    program = regression()
    data = program.to_bytes()
    assert Program.from_bytes(data) == program
    assert len(program_id(data)) == 32
    assert state_layout(program) == {"steps": ("int64", ()), "w": (F32, (3, 1))}
    assert program_id(data) != program_id(data[:-1])


def test_operations_are_counted_by_the_published_rule() -> None:
    program = regression()
    products = 2 * 4 * 3 * 1 + 2 * 3 * 4 * 1
    rest = 12 * 16 + 12 + 12 + 12 + 4 + 4 + 4 + 2 * (4 + 1) + 1 + 3 + 3 + 1
    assert operations_per_step(program) == products + rest
    assert (
        cost_of("bmm.default", [TensorType(F32, (2, 3, 4)), TensorType(F32, (2, 4, 5))], TensorType(F32, (2, 3, 5)))
        == 2 * 2 * 3 * 4 * 5
    )


def test_memory_counts_what_lives_at_once_not_all_there_ever_was() -> None:
    size = 1 << 20

    def chain(length: int) -> Program:
        inputs = (Input("w", "parameter", F32, (size,), Init.of("given")), Input("x", "batch", F32, (size,), None))
        nodes = [Node("add.Tensor", (Ref(0), Ref(1)), F32, (size,), "")]
        for number in range(length):
            nodes.append(Node("add.Tensor", (Ref(2 + number), Ref(1)), F32, (size,), ""))
        nodes.append(Node("sum.dim_IntList", (Ref(2 + length), Items((0,)), False), F32, (), ""))
        return Program(inputs, (), tuple(nodes), (Update("w", 2 + length),), 3 + length)

    assert peak_bytes(chain(3)) == peak_bytes(chain(300))
    # Two inputs and two results in float32, and float64 scratch twice for three tensors.
    assert peak_bytes(chain(3)) == size * (4 * 4 + 16 * 3)


def test_a_view_keeps_alive_what_it_looks_at() -> None:
    inputs = (Input("w", "parameter", F32, (8, 8), Init.of("given")), Input("x", "batch", F32, (8, 8), None))
    big = Node("mm.default", (Ref(0), Ref(1)), F32, (8, 8), "")
    view = Node("slice.Tensor", (Ref(2), 0, 0, 1, 1), F32, (1, 8), "")
    tail = [
        Node("mul.Tensor", (Ref(0), Ref(1)), F32, (8, 8), ""),
        Node("sum.dim_IntList", (Ref(3), Items((0, 1)), False), F32, (), ""),
    ]
    late = Program(inputs, (), (big, view, *tail), (Update("w", 4),), 5)
    early = Program(
        inputs,
        (),
        (big, Node("sum.dim_IntList", (Ref(2), Items((0, 1)), False), F32, (), ""), tail[0]),
        (Update("w", 4),),
        3,
    )
    assert peak_bytes(late) == peak_bytes(early) + 8 * 8 * 4 - 4  # the product still lives at `mul`, the sum not yet


Change = Callable[[dict[str, Any]], None]


def _node(number: int, **fields: Any) -> Change:
    def change(program: dict[str, Any]) -> None:
        nodes = list(program["nodes"])
        nodes[number] = msgspec.structs.replace(nodes[number], **fields)
        program["nodes"] = tuple(nodes)

    return change


def _input(number: int, **fields: Any) -> Change:
    def change(program: dict[str, Any]) -> None:
        inputs = list(program["inputs"])
        inputs[number] = msgspec.structs.replace(inputs[number], **fields)
        program["inputs"] = tuple(inputs)

    return change


def _set(**fields: Any) -> Change:
    return lambda program: program.update(fields)


LIES: dict[str, Change] = {
    "an operation outside the list": _node(3, op="mul_.Tensor"),
    "an empty operation": _node(3, op=""),
    "a value from the future": _node(3, args=(Ref(2), Ref(10))),
    "a value that never comes": _node(3, args=(Ref(2), Ref(2**40))),
    "a value in a list from the future": _node(3, op="cat.default", args=(Items((Ref(2), Ref(99))), 0)),
    "too few arguments": _node(3, args=(Ref(2),)),
    "too many arguments": _node(3, args=(Ref(2), Ref(9), Ref(9))),
    "a float for a list": _node(9, args=(Ref(10), Real.of(1.0))),
    "an integer beyond 63 bits": _node(13, args=(Ref(1), 2**63)),
    "a bool for an integer": _node(0, args=(Ref(5), True, Items((4, 3)))),
    "a dtype it has not": _node(3, dtype="int64"),
    "a shape it has not": _node(4, shape=(4, 3)),
    "operands that do not multiply": _node(4, args=(Ref(10), Ref(3))),
    "operands that do not broadcast": _node(5, args=(Ref(11), Ref(0))),
    "a mixture of dtypes": _node(5, args=(Ref(11), Ref(1))),
    "a permutation that is none": _node(9, args=(Ref(10), Items((1, 1)))),
    "a sum over a dimension it has not": _node(8, args=(Ref(14), Items((0, 2)), False)),
    "a sum over one dimension twice": _node(8, args=(Ref(14), Items((0, 0)), False)),
    "a random node beyond its streams": _node(0, args=(Ref(5), 2**31, Items((4, 3)))),
    "random numbers from another key": _node(0, args=(Ref(1), 0, Items((4, 3)))),
    "a tensor of 2^60 elements": _node(
        13, op="full.default", args=(Items((2**30, 2**30)), 1, Type("int64")), dtype="int64", shape=(2**30, 2**30)
    ),
    "a negative size": _node(13, op="full.default", args=(Items((-1,)), 1, Type("int64")), dtype="int64", shape=()),
    "a conversion to uint8": _node(2, args=(Ref(8), Type("uint8")), dtype="uint8"),
    "two inputs of one name": _input(3, name="x"),
    "state without an init rule": _input(0, init=None),
    "a batch with an init rule": _input(2, init=Init.of("given")),
    "two learning rates": _input(3, role="learning_rate", shape=()),
    "a learning rate of the wrong shape": _input(4, shape=(1,)),
    "no batch": _set(inputs=tuple(item for item in regression().inputs if item.role != "batch")),
    "an init rule of NaN": _input(0, init=Init.of("normal", float("nan"), 1.0)),
    "a negative deviation": _input(0, init=Init.of("normal", 0.0, -1.0)),
    "an empty interval": _input(0, init=Init.of("uniform", 1.0, -1.0)),
    "a rule with an unused number": _input(0, init=Init.of("given", 1.0)),
    "an integer drawn from a normal": _input(1, init=Init.of("normal", 0.0, 1.0)),
    "a literal of the wrong size": _set(constants=(Constant(F32, (4, 1), bytes(12)),)),
    "a literal bool of 2": _set(constants=(Constant("bool", (4, 1), bytes([0, 1, 2, 0])),)),
    "a state that is never written": _set(updates=(Update("w", 19),)),
    "a state written twice": _set(updates=(Update("steps", 20), Update("w", 19), Update("w", 19))),
    "states out of order": _set(updates=(Update("w", 19), Update("steps", 20))),
    "a new state of another shape": _set(updates=(Update("steps", 20), Update("w", 16))),
    "a new state from nowhere": _set(updates=(Update("steps", 20), Update("w", 21))),
    "a loss that is no number": _set(loss=14),
    "a loss from nowhere": _set(loss=21),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_program_that_lies_is_refused(lie: str) -> None:
    fields = {name: getattr(regression(), name) for name in ("inputs", "constants", "nodes", "updates", "loss")}
    LIES[lie](fields)
    with pytest.raises(MalformedRecord):
        Program.from_bytes(Program(**fields).to_bytes())


def test_a_program_above_the_limits_of_size_is_refused() -> None:
    with pytest.raises(LimitExceeded):
        Program.from_bytes(bytes(params.PROGRAM_BYTES_MAX + 1))


def test_an_integer_that_no_int64_holds_is_no_argument() -> None:
    x = TensorType("float32", (2,))
    assert result_type("add.Tensor", (x, 2**63 - 1)) == x
    for number in (2**63, -(2**63), 2**64 - 1):
        with pytest.raises(MalformedRecord):
            result_type("add.Tensor", (x, number))


def test_a_random_tensor_longer_than_a_draw_is_refused() -> None:
    key = TensorType("int64", (2,))
    assert result_type("ichiba.uniform", (key, 0, (2**34,))).elements == 2**34
    with pytest.raises(MalformedRecord):
        result_type("ichiba.uniform", (key, 0, (2**33 + 1, 2)))


def test_a_program_that_needs_more_memory_than_any_machine_is_refused() -> None:
    size = 2**40
    inputs = (Input("w", "parameter", F32, (size,), Init.of("given")), Input("x", "batch", F32, (size,), None))
    nodes = (
        Node("add.Tensor", (Ref(0), Ref(1)), F32, (size,), ""),
        Node("sum.dim_IntList", (Ref(2), Items((0,)), False), F32, (), ""),
    )
    with pytest.raises(MalformedRecord, match="bytes at the peak"):
        Program.from_bytes(Program(inputs, (), nodes, (Update("w", 2),), 3).to_bytes())


def _accepts_or_refuses(data: bytes) -> None:
    """The one promise about hostile bytes: a checked Program of just these bytes, or one of our errors."""
    try:
        program = Program.from_bytes(data)
    except IchibaError:
        return
    assert program.to_bytes() == data
    assert operations_per_step(program) <= params.PROGRAM_OPERATIONS_MAX
    assert peak_bytes(program) <= params.PROGRAM_PEAK_BYTES_MAX


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_random_bytes_never_crash_the_decoder(data: bytes) -> None:
    _accepts_or_refuses(data)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_flipped_bytes_never_crash_the_decoder(data: st.DataObject) -> None:
    mutated = bytearray(regression().to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 3))
    _accepts_or_refuses(bytes(mutated[: len(mutated) - cut]))


SMALL = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1]),
    st.booleans(),
    st.none(),
    st.floats(),
    st.binary(max_size=9),
    st.sampled_from([*OPERATIONS, *("float32", "int64", "bool", "batch")]),
)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_replaced_fields_never_crash_the_decoder(data: st.DataObject) -> None:
    tree = msgspec.msgpack.decode(regression().to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = tree
        while True:
            index = data.draw(st.integers(0, len(place) - 1))
            if isinstance(place[index], list) and place[index] and data.draw(st.integers(0, 9)):
                place = place[index]
                continue
            place[index] = data.draw(st.one_of(SMALL, st.lists(SMALL, max_size=4)))
            break
    _accepts_or_refuses(msgspec.msgpack.encode(tree))


ARGUMENT = st.one_of(
    st.builds(
        TensorType,
        st.sampled_from(["float32", "int64", "bool", "uint8"]),
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
    ),
    st.integers(-2, 9),
    st.floats(),
    st.booleans(),
    st.none(),
    st.sampled_from(["float32", "int64", "bool", "x"]),
    st.lists(st.integers(-2, 9), max_size=4).map(tuple),
    st.lists(
        st.builds(TensorType, st.just("float32"), st.lists(st.integers(0, 3), max_size=3).map(tuple)), max_size=3
    ).map(tuple),
)


@given(st.sampled_from(sorted(OPERATIONS)), st.data())
@settings(max_examples=600, deadline=None)
def test_any_arguments_give_a_bounded_type_or_our_error(name: str, data: st.DataObject) -> None:
    args = [data.draw(ARGUMENT) for _ in OPERATIONS[name].kinds]
    try:
        result = result_type(name, args)
    except MalformedRecord:
        return
    assert result.elements <= params.TENSOR_ELEMENTS_MAX
    assert cost_of(name, args, result) >= 0
