"""What a simulated worker computes: the steps of a tiny real Program, by protocol.reference.

States are real, so a dispute between two simulated peers is a real game, down to the multiply-add that a simulated
fraud got wrong. Whatever was computed once is kept: a thousand simulated jobs of one task cost one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Final

import msgspec
from numpy.typing import NDArray

from protocol import merkle
from protocol.blob import blob_id, manifest_of
from protocol.dispute_reference import ReferenceTracer, start_of
from protocol.operations import TensorType, result_type
from protocol.profile import Findings, Gauge, Measured, distance
from protocol.profile_task import MARKET_KERNELS
from protocol.program import Init, Input, Items, Node, Program, Ref, Update, program_id
from protocol.task import ArrayRef, BatchRule, Initial, Schedule, TaskSpec

__all__ = [
    "ARRAY", "ARRAYS", "BATCH", "CONTENTS", "PROGRAM", "State", "findings_of", "honest", "initial_root", "kept",
    "plain", "start_state", "state_of",
]  # fmt: skip

State = dict[str, NDArray[Any]]
TOKENS: Final = bytes((5 * i * i + 3 * i) % 8 for i in range(1000))
BATCH: Final = BatchRule("windows", 2, 2)


def _program() -> Program:
    """A linear map between the embeddings of a token and of the next: w -= rate * h^T (h w - t), written by hand."""
    inputs = (
        Input("table", "buffer", "float32", (8, 2), Init.of("uniform", -1.0, 1.0)),
        Input("w", "parameter", "float32", (2, 2), Init.of("uniform", -1.0, 1.0)),
        Input("x", "batch", "int64", (2, 2), None),
        Input("y", "batch", "int64", (2, 2), None),
        Input("learning_rate", "learning_rate", "float32", (), None),
    )
    table, w, x, y, rate = map(Ref, range(5))
    nodes: list[Node] = []
    types: list[TensorType] = [item.type for item in inputs]

    def node(op: str, *args: Any) -> Ref:
        held: Any = [types[a.value] if isinstance(a, Ref) else a.items if isinstance(a, Items) else a for a in args]
        kind = result_type(op, held)
        nodes.append(Node(op, args, kind.dtype, kind.shape, f"linear.py:{10 + len(nodes)}"))  # type: ignore[arg-type]
        types.append(kind)
        return Ref(len(types) - 1)

    h = node("reshape.default", node("embedding.default", table, x), Items((4, 2)))
    t = node("reshape.default", node("embedding.default", table, y), Items((4, 2)))
    error = node("sub.Tensor", node("mm.default", h, w), t)
    loss = node("sum.dim_IntList", node("mul.Tensor", error, error), Items((0, 1)), False)
    gradient = node("mm.default", node("permute.default", h, Items((1, 0))), error)
    new = node("sub.Tensor", w, node("mul.Tensor", gradient, rate))
    made = Program(inputs, (), tuple(nodes), (Update("table", table.value), Update("w", new.value)), loss.value)
    made.check()
    return made


PROGRAM: Final = _program()
ARRAY: Final = ArrayRef("tokens", "uint8", (len(TOKENS),), blob_id(manifest_of([TOKENS])), len(TOKENS))
ARRAYS: Final[Mapping[str, bytes]] = {ARRAY.name: TOKENS}
CONTENTS: Final[Mapping[bytes, bytes]] = {
    program_id(PROGRAM.to_bytes()): PROGRAM.to_bytes(),
    ARRAY.blob: TOKENS,
}


@cache
def start_state(seed: int) -> State:
    """The state of a simulated task before its first step."""
    task = TaskSpec(
        network=bytes(32), program=bytes(32), program_bytes=1, arrays=(ARRAY,), batch=BATCH,
        initial=Initial("seed", bytes(32), bytes(32)), seed=seed, steps=1, steps_per_segment=1, mode="exact", width=15,
        schedule=Schedule("constant", 0, 0, 0), operations_per_step=1, name="start",
    )  # fmt: skip
    return start_of(task, PROGRAM)


def initial_root(seed: int) -> bytes:
    """The state root of a simulated task's start."""
    return kept(start_state(seed))


_states: dict[bytes, State] = {}


def kept(state: State) -> bytes:
    """The root of a state, which `state_of` finds it by from now on."""
    root = merkle.state_root(state)
    _states[root] = state
    return root


def state_of(root: bytes) -> State:
    """The state of a root that was computed in this process."""
    return _states[root]


def distance_of(base: bytes, ours: bytes, theirs: bytes, gauges: Sequence[Gauge]) -> tuple[int, int]:
    """How far the end with the root `theirs` lies from `ours`, in ppb of the update: L1 and L2."""
    found = distance(state_of(base), state_of(ours), state_of(theirs), gauges)
    return found.l1_ppb, found.l2_ppb


def plain(task: TaskSpec) -> TaskSpec:
    """The same task on no network, in the only arithmetic there is here: what it computes depends on neither."""
    return msgspec.structs.replace(task, network=bytes(32), mode="exact", salt=b"", stage=None)


@lru_cache(maxsize=512)
def honest(task: TaskSpec, segment: int, in_root: bytes) -> ReferenceTracer:
    """A segment of a plain task from `in_root`, as the task says."""
    return ReferenceTracer(task, PROGRAM, segment, arrays=ARRAYS, base=_states[in_root])


def findings_of(rng: random.Random, noise_ppb: int, gauges: tuple[Gauge, ...]) -> Findings:
    """What a simulated profile finds: exact arithmetic has no noise, so distances of once to three times `noise_ppb`
    are drawn."""
    measured = tuple(
        Measured(kernels.name, *(noise_ppb + rng.randrange(2 * noise_ppb + 1) for _ in range(2)))
        for kernels in MARKET_KERNELS
    )
    return Findings(measured, measured, gauges, other_seed_ppb=10**9)
