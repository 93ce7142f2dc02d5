"""The referee's leaf: each operation alone gives what the whole holds, each batch element has one source; the cost."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest

from protocol import merkle, params, reference
from protocol.batches import batch_of, source_of
from protocol.blob import manifest_of
from protocol.codec import encode
from protocol.dispute_facts import Facts, numpy_of
from protocol.dispute_partials import REDUCTIONS, chain_of
from protocol.dispute_player import Answer, Question, answer
from protocol.dispute_reference import Alter, ReferenceTracer, start_of
from protocol.dispute_wire import (
    DataOpening,
    Opening,
    OpenTensor,
    OpenTile,
    ShowOperands,
)
from protocol.errors import MalformedRecord
from protocol.operations import OPERATIONS, result_type
from protocol.program import Init, Input, Items, Node, Program, Real, Ref, Type, Update
from protocol.referee import Agreed, judge
from protocol.reference_movement import Array, PartialArray
from protocol.task import PRESENT, BatchRule
from tests.dispute_scene import (
    ProductTracer,
    game_of,
    honest,
    play,
    program,
    task,
    task_for,
    value_of,
)
from tests.exact_cases import CASES
from tests.test_reference import for_reference

LAST = 2


# --- the leaf of every operation ---------------------------------------------------------------------------
def as_args(args: tuple[Any, ...], inputs: list[Array]) -> tuple[Any, ...]:
    """A case's arguments as a node's, its tensors as inputs of the Program."""
    found: list[Any] = []
    for arg in args:
        if isinstance(arg, Array):
            inputs.append(arg)
            found.append(Ref(len(inputs) - 1))
        elif isinstance(arg, tuple):
            found.append(Items(tuple(as_args(arg, inputs))))
        elif isinstance(arg, float):
            found.append(Real.of(arg))
        elif isinstance(arg, str):
            found.append(Type(arg))  # type: ignore[arg-type]
        else:
            found.append(arg)
    return tuple(found)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_one_element_alone_is_what_the_whole_result_holds(name: str) -> None:
    """Operands that answer element by element, and partial results, give what protocol.reference gives of all."""
    for case in CASES[name][0] + CASES[name][1]:
        args = for_reference(case)
        kind = result_type(name, [reference.typed(arg) for arg in args])
        if not kind.elements:
            continue
        lazy = tuple(
            PartialArray(arg.dtype, arg.shape, list(arg.elements)) if isinstance(arg, Array) else arg for arg in args
        )
        inputs: list[Array] = []
        node = Node(name, as_args(args, inputs), kind.dtype, kind.shape, "")  # type: ignore[arg-type]
        sources = tuple(
            Input(f"i{n}", "batch", array.dtype, array.shape, None)  # type: ignore[arg-type]
            for n, array in enumerate(inputs)
        )
        made = Program(sources, (), (node,), (), 0)
        widths = (8, 15, 22) if name in ("mm.default", "bmm.default") else (15,)
        for width, element in itertools.product(widths, sorted({0, kind.elements // 2, kind.elements - 1})):
            try:
                expected = reference.element(name, args, element, width=width)
            except MalformedRecord:
                continue
            assert reference.element(name, lazy, element, width=width) == expected
            chain = chain_of(made, node, element, width)
            if chain is None:
                assert name not in REDUCTIONS or not inputs[0].elements, "only what adds nothing reads nothing"
                continue
            partial = chain.start
            seen = [partial]
            for term in range(chain.terms):
                values = [inputs[value].elements[at] for value, at in chain.reads(term)]
                partial = chain.advance(partial, term, values)
                seen.append(partial)
            assert chain.finish(partial) == expected
            arrays = [numpy_of(array) for array in inputs]
            assert chain.partials(arrays.__getitem__, range(chain.terms + 1)) == seen


def test_an_index_out_of_range_is_nobodys_result() -> None:
    """Two players agree on a batch that the data allow and the table does not: no value follows, the solver loses."""
    facts = Facts(task(), program(), 1)
    value, x, table = value_of("h"), value_of("x"), value_of("table")
    held = {x: np.full((2, 3), 99, np.int64), table: honest().states[2]["table"]}
    roots = list(honest().trace_roots(LAST))
    roots[facts.trace_leaf(x) or 0] = merkle.tensor_root(held[x])
    data, path = merkle.tensor_path(held[x], 0)
    leaf = facts.trace_leaf(x) or 0
    opened = OpenTensor(
        x, roots[leaf], merkle.merkle_root(merkle.tiles(held[x])), tuple(merkle.merkle_path(roots, leaf))
    )
    opening = Opening((opened,), (OpenTile(x, 0, data, tuple(path)),))
    agreed = Agreed(bytes(32), (merkle.merkle_root(roots),))
    assert judge(facts, ShowOperands(LAST, value, 0, 0, 0), agreed, encode(opening)).result is None


# --- what a leaf costs -------------------------------------------------------------------------------------
@cache
def long_product(inner: int) -> tuple[Program, dict[str, Any]]:
    made = Program(
        (
            Input("w", "parameter", "float32", (inner, 40), Init.of("given")),
            Input("out", "buffer", "float32", (40, 40), Init.of("constant", 0.0)),
            Input("x", "batch", "float32", (40, inner), None),
        ),
        (),
        (
            Node("mm.default", (Ref(2), Ref(0)), "float32", (40, 40), ""),
            Node("sum.dim_IntList", (Ref(3), Items((0, 1)), False), "float32", (), ""),
        ),
        (Update("out", 3), Update("w", 0)),
        4,
    )
    made.check()
    rng = np.random.default_rng(1)
    x = rng.standard_normal((40, inner)).astype(np.float32)
    return made, {"x": x, "w": rng.standard_normal((inner, 40)).astype(np.float32)}


@pytest.mark.parametrize("term", [17, 4096 + 1234, 4096 + 3])
def test_a_block_of_a_product_over_4096_is_opened_in_200_kib(term: int) -> None:
    made, held = long_product(4096)
    spec = task_for(made, {"x": held["x"]}, BatchRule("sequence", 40, 0), steps=1, steps_per_segment=1)
    truth = ProductTracer(spec, made, held)
    for block, bytes_max in ((512, 200 * 1024), (1, 12 * 1024)):
        cheat = ProductTracer(spec, made, held, lie=(777, term))
        game = game_of(cheat, truth, block=block)
        played = play(game, cheat, truth)
        assert game.result is not None
        assert (game.result.loser, game.result.cause, game.result.level) == ("solver", "leaf", "block")
        (opening,) = (body for side, _, body in played if not side)
        assert len(opening) <= bytes_max
        assert sum(len(body) for side, _, body in played if side) <= 20_000


# --- batches in order --------------------------------------------------------------------------------------
@cache
def in_order() -> Program:
    """w + x where a row is there: a batch in order whose last one is filled up."""
    made = Program(
        (
            Input("w", "buffer", "float32", (4, 3), Init.of("constant", 1.0)),
            Input("x", "batch", "float32", (4, 3), None),
            Input(PRESENT, "batch", "bool", (4,), None),
        ),
        (),
        (
            Node("reshape.default", (Ref(2), Items((4, 1))), "bool", (4, 1), ""),
            Node("add.Tensor", (Ref(0), Ref(1)), "float32", (4, 3), ""),
            Node("where.self", (Ref(3), Ref(4), Ref(0)), "float32", (4, 3), ""),
            Node("sum.dim_IntList", (Ref(5), Items((0, 1)), False), "float32", (), ""),
        ),
        (Update("w", 5),),
        6,
    )
    made.check()
    return made


def test_which_rows_are_there_follows_from_the_task_alone() -> None:
    """The attack: rows of the data left out as if they were filling, or filling taken for rows."""
    made, x = in_order(), np.arange(30, dtype=np.float32).reshape(10, 3)
    spec = task_for(made, {"x": x}, BatchRule("sequence", 4, 0), steps=3, steps_per_segment=3)
    data = {"x": x.tobytes()}

    def run(alter: Alter | None) -> ReferenceTracer:
        return ReferenceTracer(spec, made, 0, arrays=data, base=start_of(spec, made), alter=alter)

    for row in (1, 3):  # of the last batch, in which two rows are real

        def alter(step: int, value: int, array: Array, row: int = row) -> Array:
            flags = [flag ^ (at == row) for at, flag in enumerate(array.elements)]
            return Array("bool", (4,), tuple(flags)) if (step, value) == (2, 2) else array

        truth, cheat = run(None), run(alter)
        game = game_of(truth, cheat)
        assert [side for side, _, _ in play(game, truth, cheat) if not side] == []
        assert game.result is not None
        assert (game.result.loser, game.result.cause, game.result.level) == ("challenger", "leaf", "node")


def test_a_chunk_larger_than_a_message_is_fetched_and_not_answered() -> None:
    made, x = in_order(), np.arange(100_000 * 3, dtype=np.float32).reshape(-1, 3)
    spec = task_for(made, {"x": x}, BatchRule("sequence", 4, 0), steps=25_000, steps_per_segment=1)
    tracer = ReferenceTracer(spec, made, 9, arrays={"x": x.tobytes()}, base=start_of(spec, made))
    ask = ShowOperands(0, 1, 5, 0, 0)
    question = encode(Question(bytes(32), "solver", 7, 9, bytes(32), ask))
    assert answer(question, tracer) == Answer(b"", b"", wants_state=False)
    size = params.BLOB_CHUNK_BYTES
    chunks = [x.tobytes()[at : at + size] for at in range(0, x.nbytes, size)]
    opening = encode(DataOpening(encode(manifest_of(chunks)), chunks[0]))
    assert len(opening) > params.OPENING_BYTES_MAX
    found = judge(tracer.facts, ask, Agreed(bytes(32), ()), opening).result
    assert found == int(x.reshape(-1)[9 * 12 + 5 :].view(np.uint32)[0])


RULES = [("sequence", 4, 0), ("sequence", 4, 3), ("whole", 10, 0), ("rows", 4, 0), ("windows", 4, 3)]


@pytest.mark.parametrize("rule", RULES)
def test_every_element_of_a_batch_has_one_source(rule: tuple[str, int, int]) -> None:
    made = BatchRule(*rule)  # type: ignore[arg-type]
    array = np.arange(31, dtype=np.int32) if made.windows else np.arange(30, dtype=np.int32).reshape(10, 3)
    shape = (made.size, made.length or 3)
    item = Input("x", "batch", "float32", shape, None)
    fields = (Input("y", "batch", "float32", shape, None),) if made.windows else ()
    takes = Program((item, *fields), (), in_order().nodes, (), 0)
    spec = task_for(in_order(), {"x": array}, made, steps=3, steps_per_segment=3)
    for step in range(3):
        cut = batch_of(spec, takes, {"x": array}, step)
        for name, values in cut.items():
            source = msgspec.structs.replace(item, name=name)
            for element, value in enumerate(values.reshape(-1)):
                assert array.reshape(-1)[source_of(spec, source, step, element)[1]] == value
