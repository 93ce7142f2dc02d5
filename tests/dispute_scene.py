"""A tiny task in which every level of the pinpoint game can be disputed, players who lie in it, and the play itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol import merkle, params
from protocol.blob import blob_id, manifest_of
from protocol.dispute import SIDES, Game, Terms
from protocol.dispute_facts import Facts
from protocol.dispute_partials import Partial
from protocol.dispute_player import Tracer, answer
from protocol.dispute_reference import Alter, ReferenceTracer, start_of
from protocol.operations import result_type
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
    program_id,
    resolved,
)
from protocol.reference_movement import Array
from protocol.task import ArrayRef, BatchRule, Initial, Schedule, TaskSpec

__all__ = [
    "ARRAYS",
    "DISPUTE",
    "SEGMENT",
    "Liar",
    "Misadder",
    "flipped",
    "game_of",
    "honest",
    "play",
    "program",
    "task",
    "task_for",
    "value_of",
]

DISPUTE = bytes(range(32))
SEGMENT = 1
TEXT = bytes((7 * i * i + 3 * i) % 31 for i in range(400))
ARRAYS = {"text": TEXT}
_F32, _I64 = "float32", "int64"


class _Builder:
    """A Program written by hand: each node's type follows from its arguments."""

    def __init__(self, inputs: Sequence[Input], constants: Sequence[Constant]) -> None:
        self.inputs, self.constants = tuple(inputs), tuple(constants)
        self.nodes: list[Node] = []
        self.types = [*(item.type for item in inputs), *(item.type for item in constants)]
        self.names = {item.name: number for number, item in enumerate(inputs)}

    def __call__(self, name: str, op: str, *args: Any) -> Ref:
        kind = result_type(op, resolved(args, self.types))
        self.nodes.append(Node(op, args, kind.dtype, kind.shape, f"model.py:{10 + len(self.nodes)}"))  # type: ignore[arg-type]
        self.types.append(kind)
        self.names[name] = len(self.types) - 1
        return Ref(self.names[name])


def _inputs() -> list[Input]:
    drawn, zero = Init.of("uniform", -1.0, 1.0), Init.of("constant", 0.0)
    return [
        Input("table", "parameter", _F32, (40, 36), drawn),
        Input("w", "parameter", _F32, (36, 34), drawn),
        Input("frozen", "buffer", _F32, (3,), drawn),
        Input("count", "buffer", _I64, (2,), zero),
        Input("gram", "buffer", _F32, (2, 3, 3), zero),
        Input("mixed", "buffer", _F32, (5, 34), zero),
        Input("rate", "buffer", _F32, (), zero),
        Input("key", "buffer", _I64, (2,), zero),
        Input("one", "buffer", _F32, (1,), zero),
        Input("x", "batch", _I64, (2, 3), None),
        Input("y", "batch", _I64, (2, 3), None),
        Input("learning_rate", "learning_rate", _F32, (), None),
        Input("step_key", "step_key", _I64, (2,), None),
    ]


def program() -> Program:
    """A softmax over an embedding, its gradients by hand, and state of every kind that a step can hand on."""
    return _built()[0]


@cache
def _built() -> tuple[Program, dict[str, int]]:
    node = _Builder(_inputs(), [Constant(_F32, (1,), np.float32(1.5).tobytes())])
    table, w, frozen, count = map(Ref, range(4))
    x, y, lr, step_key, constant = map(Ref, range(9, 14))
    h = node("h", "embedding.default", table, x)
    f = node("f", "reshape.default", h, Items((6, 36)))
    z = node("z", "mm.default", f, w)
    m = node("m", "amax.default", z, Items((1,)), True)
    e = node("e", "exp.default", node("s", "sub.Tensor", z, m))
    t = node("t", "sum.dim_IntList", e, Items((1,)), True)
    p = node("p", "div.Tensor", e, t)
    g = node("g", "gather.default", p, 1, node("ly", "reshape.default", y, Items((6, 1))))
    node("loss", "sum.dim_IntList", node("l", "log.default", g), Items((0, 1)), False)
    u = node("u", "ichiba.uniform", step_key, 0, Items((6, 34)))
    kept = node("kept", "gt.Tensor", u, Real.of(0.25))
    zero = node("zero", "full.default", Items(()), Real.of(0.0), Type(_F32))
    d = node("d", "where.self", kept, p, zero)
    dh = node("dh", "mm.default", d, node("wt", "permute.default", w, Items((1, 0))))
    dhr = node("dhr", "reshape.default", dh, Items((2, 3, 36)))
    ge = node("ge", "embedding_dense_backward.default", dhr, x, 40, -1, False)
    gw = node("gw", "mm.default", node("ft", "permute.default", f, Items((1, 0))), d)
    node("table'", "sub.Tensor", table, node("te", "mul.Tensor", ge, lr))
    node("w'", "sub.Tensor", w, node("we", "mul.Tensor", gw, lr))
    node("count'", "add.Tensor", count, 2**33)
    node("gram'", "bmm.default", h, node("ht", "permute.default", h, Items((0, 2, 1))))
    part = node("part", "slice.Tensor", p, 0, 0, 3, 1)
    node("mixed'", "cat.default", Items((part, node("tail", "slice.Tensor", d, 0, 4, 6, 1))), 0)
    names = node.names
    ends = {
        **{name: names[f"{name}'"] for name in ("table", "w", "count", "gram", "mixed")},
        "frozen": frozen.value,
        "rate": lr.value,
        "key": step_key.value,
        "one": constant.value,
    }
    updates = tuple(Update(name, ends[name]) for name in sorted(ends))
    made = Program(node.inputs, node.constants, tuple(node.nodes), updates, names["loss"])
    made.check()
    return made, names


def value_of(name: str) -> int:
    """The value's number, by the name it has in `program`."""
    return _built()[1][name]


def task_for(made: Program, arrays: Mapping[str, NDArray[Any]], batch: BatchRule, **fields: Any) -> TaskSpec:
    """A task of `made` whose arrays are named by their true blobs."""
    refs = tuple(
        ArrayRef(name, str(array.dtype), array.shape, _blob(array.tobytes()), array.nbytes)  # type: ignore[arg-type]
        for name, array in arrays.items()
    )
    data = made.to_bytes()
    settings: dict[str, Any] = {
        "network": bytes(32),
        "program": program_id(data),
        "program_bytes": len(data),
        "arrays": refs,
        "batch": batch,
        "initial": Initial("seed", bytes(32), bytes(32)),
        "seed": 5,
        "steps": 6,
        "steps_per_segment": 3,
        "mode": "exact",
        "width": 15,
        "schedule": Schedule("warmup-cosine", 10**7, 10**5, 2),
        "operations_per_step": operations_per_step(made),
        "name": "dispute",
    }
    return TaskSpec(**{**settings, **fields})


def _blob(data: bytes) -> bytes:
    size = params.BLOB_CHUNK_BYTES
    return blob_id(manifest_of(data[at : at + size] for at in range(0, len(data), size)))


@cache
def task() -> TaskSpec:
    """Two segments of three steps, over windows of a short text."""
    return task_for(program(), {"text": np.frombuffer(TEXT, np.uint8)}, BatchRule("windows", 2, 3))


@cache
def base() -> dict[str, NDArray[Any]]:
    """The state segment SEGMENT starts from."""
    first = ReferenceTracer(task(), program(), 0, arrays=ARRAYS, base=start_of(task(), program()))
    return first.states[-1]


@cache
def honest() -> ReferenceTracer:
    """Who computed the segment as the task says."""
    return ReferenceTracer(task(), program(), SEGMENT, arrays=ARRAYS, base=base())


class Liar(ReferenceTracer):
    """Who changed something in `step`, and followed it faithfully from there. The steps before are the honest ones."""

    def __init__(self, step: int, alter: Alter, truth: ReferenceTracer | None = None) -> None:
        truth = truth or honest()
        self.facts, self._arrays, self._gauges = truth.facts, ARRAYS, truth._gauges
        self.states, self._values = truth.states[: step + 1], truth._values[:step]
        self._ends, self._traces = {}, {}
        self._go_on(alter)


def flipped(step: int, value: int, element: int, *, bit: int = 0, truth: ReferenceTracer | None = None) -> Liar:
    """Who turned over one bit of one element of one value."""

    def alter(at: int, which: int, array: Array) -> Array:
        if (at, which) != (step, value):
            return array
        elements = list(array.elements)
        elements[element] ^= 1 if array.dtype == "bool" else 1 << bit
        return Array(array.dtype, array.shape, tuple(elements))

    return Liar(step, alter, truth)


def game_of(solver: Tracer, challenger: Tracer, *, block: int = 512, **fields: Any) -> Game:
    """A game between two tracers of one segment."""
    in_root = merkle.state_root_of(dict(zip(solver.facts.names, solver.state_roots(-1), strict=True)))
    facts = solver.facts
    ends = solver.step_roots()[-1], challenger.step_roots()[-1]
    terms = Terms(DISPUTE, facts.task, facts.program, facts.segment, in_root, *ends, block)
    return Game(dataclasses.replace(terms, **fields))


def play(game: Game, solver: Tracer, challenger: Tracer, *, opener: str = "challenger") -> list[tuple[str, int, bytes]]:
    """Play to the end; the moves, and the opening as a move of ("", number)."""
    players = {"solver": solver, "challenger": challenger}
    moves: list[tuple[str, int, bytes]] = []
    while game.result is None:
        if game.wants_opening():
            question = game.question(opener)
            assert question is not None
            opening = answer(question, players[opener]).opening
            moves.append(("", game.number, opening))
            game.open(opening)
            break
        number = game.number
        for side in SIDES:
            question = game.question(side)
            if question is None:
                continue
            body = answer(question, players[side]).body
            moves.append((side, number, body))
            game.take(side, number, body)
    return moves


class Misadder(Liar):
    """Who changes one partial result of one element, in any phase, and goes on from it faithfully."""

    def __init__(self, step: int, value: int, element: int, term: int, change: Callable[[Partial], Partial]) -> None:
        truth = honest()
        chain = truth.facts.chain(value, element)
        assert chain is not None
        self._place = (step, value, element)
        self._own = truth.partials(step, value, element, range(term))
        partial = change(truth.partials(step, value, element, [term])[0])
        self._own.append(partial)

        def read(place: tuple[int, int]) -> int:
            array = truth.tensors(step, [place[0]])[place[0]].reshape(-1)
            return int(array.view(np.uint32)[place[1]] if array.dtype == np.float32 else array[place[1]])

        for at in range(term, chain.terms):
            partial = chain.advance(partial, at, [read(place) for place in chain.reads(at)])
            self._own.append(partial)
        end = chain.finish(partial)

        def alter(at: int, which: int, array: Array) -> Array:
            if (at, which) != (step, value):
                return array
            elements = list(array.elements)
            elements[element] = end
            return Array(array.dtype, array.shape, tuple(elements))

        super().__init__(step, alter)

    def partials(self, step: int, value: int, element: int, positions: Sequence[int]) -> list[Partial]:
        if (step, value, element) == self._place:
            return [self._own[at] for at in positions]
        return super().partials(step, value, element, positions)


class ProductTracer(Tracer):
    """A machine for a step of one product out = x @ w, by numpy's partial results alone. lie: (element, term): one term
    of one element counts too much."""

    def __init__(
        self, spec: TaskSpec, made: Program, held: Mapping[str, NDArray[Any]], lie: tuple[int, int] | None = None
    ) -> None:
        self.facts = Facts(spec, made, 0)
        self._lie = lie
        x, w = held["x"], held["w"]
        out = np.zeros((x.shape[0], w.shape[1]), np.float32)
        self._values: dict[int, NDArray[Any]] = {0: w, 1: out, 2: x, 3: (x @ w).astype(np.float32)}
        self._values[4] = np.zeros((), np.float32)
        element = 777
        chain = self.facts.chain(3, element)
        assert chain is not None
        end = chain.finish(self.partials(0, 3, element, [chain.terms])[0])
        product = self._values[3].copy()
        product.reshape(-1)[element] = np.uint32(end).view(np.float32)
        self._values[3] = product
        self._ends = {"out": product, "w": w}

    def step_roots(self) -> Sequence[bytes]:
        return [merkle.state_root(self._ends)]

    def state_roots(self, step: int) -> Sequence[bytes]:
        state = self._ends if step == 0 else {"out": self._values[1], "w": self._values[0]}
        return [merkle.tensor_root(state[name]) for name in self.facts.names]

    def trace_roots(self, step: int) -> Sequence[bytes]:
        return [merkle.tensor_root(self._values[value]) for value in (2, 3, 4)]

    def tensors(self, step: int, values: Collection[int]) -> Mapping[int, NDArray[Any]]:
        return {value: self._values[value] for value in values}

    def data(self, name: str) -> bytes:
        return self._values[2].tobytes()

    def partials(self, step: int, value: int, element: int, positions: Sequence[int]) -> list[Partial]:
        found = super().partials(step, value, element, positions)
        if self._lie is None or self._lie[0] != element:
            return found
        term, inner = self._lie[1], self._values[2].shape[1]
        chain = self.facts.chain(value, element)
        assert chain is not None
        if term >= inner:  # among the sums
            return [
                (row, column, whole + 2**30) if at > term else (row, column, whole)
                for at, (row, column, whole) in zip(positions, found, strict=True)
            ]
        last = super().partials(step, value, element, [2 * inner])[0]
        return [
            (max(row, last[0] + 9), column, whole >> 9) if at > term else (row, column, whole)
            for at, (row, column, whole) in zip(positions, found, strict=True)
        ]
