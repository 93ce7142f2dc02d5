"""The frauds of worker/cheats.py in the simulator: what a simulated cheat hands in, and how it defends that.

Half of them change what a step reads or makes and follow it from there, so that a dispute lands where they lied; the
others hand in an end of a segment that no step made, and stand by it (protocol/dispute_claim.py). Each is computed once
in a process.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from peer.simulated_work import ARRAY, ARRAYS, PROGRAM, State, honest, initial_root, kept, plain, state_of
from protocol.batches import batch_of
from protocol.dispute_claim import StubbornTracer
from protocol.dispute_facts import Facts
from protocol.dispute_player import Answer, Tracer, answer
from protocol.dispute_reference import Alter, ReferenceTracer, run_step
from protocol.profile import Gauge, put_back
from protocol.reference_movement import Array
from protocol.task import TaskSpec

__all__ = ["FRAUDS", "STEERED", "UNIT_FRAUDS", "WRONG_END", "WRONG_PRODUCT", "answer_of", "work_of"]

# Of a simulated liar, in every segment: one element of one product; or the truth up to the last value of the last step.
WRONG_PRODUCT: Final = "wrong-product"
WRONG_END: Final = "wrong-end"
# And of one that steers tolerant work: "steered-1500" goes 1500 ppb too far in every segment.
STEERED: Final = "steered-"
_PRODUCTS: Final = [PROGRAM.first_node + at for at, node in enumerate(PROGRAM.nodes) if node.op == "mm.default"]
_RATE: Final = next(at for at, item in enumerate(PROGRAM.inputs) if item.role == "learning_rate")
_BATCH: Final = {at: item.name for at, item in enumerate(PROGRAM.inputs) if item.role == "batch"}
RATE_ERROR: Final = 1.0001
TF32_LOST_BITS: Final = 13


# --- what a step reads or makes --------------------------------------------------------------------------------
def _reading(task: TaskSpec, segment: int, *, seed: int, other: int) -> Alter:
    """Reads the batches of another seed, or those of the step with the number `xor` other."""
    first, arrays = task.steps_of(segment).start, {ARRAY.name: np.frombuffer(ARRAYS[ARRAY.name], np.uint8)}

    def alter(step: int, value: int, array: Array) -> Array:
        if value not in _BATCH:
            return array
        batch = batch_of(task, PROGRAM, arrays, (first + step) ^ other, seed=seed)
        return Array(array.dtype, array.shape, tuple(map(int, batch[_BATCH[value]].reshape(-1).tolist())))

    return alter


def _wrong_label(step: int, value: int, array: Array) -> Array:
    if step or _BATCH.get(value) != "y":
        return array
    return Array(array.dtype, array.shape, (array.elements[0] ^ 1, *array.elements[1:]))


def _low_precision(step: int, value: int, array: Array) -> Array:
    """The products rounded to ten bits of fraction."""
    if value not in _PRODUCTS:
        return array
    rounded = ((bits + (1 << TF32_LOST_BITS - 1)) >> TF32_LOST_BITS << TF32_LOST_BITS for bits in array.elements)
    return Array(array.dtype, array.shape, tuple(rounded))


def _wrong_rate(step: int, value: int, array: Array) -> Array:
    if value != _RATE:
        return array
    (rate,) = struct.unpack("<f", struct.pack("<I", array.elements[0]))
    return Array(array.dtype, array.shape, struct.unpack("<I", struct.pack("<f", rate * RATE_ERROR)))


def _wrong_product(step: int, value: int, array: Array) -> Array:
    if (step, value) != (3, _PRODUCTS[-1]):
        return array
    return Array(array.dtype, array.shape, (array.elements[0] ^ 1 << 20, *array.elements[1:]))


def _wrong_batch(task: TaskSpec, segment: int) -> Alter:
    wrong, last = _reading(task, segment, seed=task.seed ^ 1, other=0), len(task.steps_of(segment)) - 1
    return lambda step, value, array: wrong(step, value, array) if step == last else array


_ALTERS: Final[Mapping[str, Callable[[TaskSpec, int], Alter]]] = {
    "wrong-data": lambda task, segment: _reading(task, segment, seed=task.seed ^ 1, other=0),
    "wrong-batch": _wrong_batch,
    "reordered-batches": lambda task, segment: _reading(task, segment, seed=task.seed, other=1),
    "wrong-label": lambda _, __: _wrong_label,
    "low-precision": lambda _, __: _low_precision,
    "wrong-rate": lambda _, __: _wrong_rate,
    WRONG_PRODUCT: lambda _, __: _wrong_product,
}


@lru_cache(maxsize=512)
def _altered(task: TaskSpec, segment: int, in_root: bytes, cheat: str) -> ReferenceTracer:
    alter = _ALTERS[cheat](task, segment)
    return ReferenceTracer(task, PROGRAM, segment, arrays=ARRAYS, base=state_of(in_root), alter=alter)


# --- an end that no step made ----------------------------------------------------------------------------------
def _moved(start: NDArray[Any], since: NDArray[Any], end: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(start + (end - since), start.dtype)


@lru_cache(maxsize=512)
def _stale_gradient(task: TaskSpec, segment: int, in_root: bytes) -> bytes:
    """Each step's update is taken at the state before the latest step."""
    facts, state, older = Facts(task, PROGRAM, segment), state_of(in_root), state_of(in_root)
    for step in range(facts.steps):
        values = run_step(facts, older, ARRAYS, step)
        ends = {update.name: values[update.value] for update in PROGRAM.updates}
        state, older = {name: _moved(state[name], older[name], end) for name, end in ends.items()}, state
    return kept(state)


@lru_cache(maxsize=512)
def _wrong_end(task: TaskSpec, segment: int, in_root: bytes) -> bytes:
    end = honest(task, segment, in_root).states[-1]
    return kept({**end, "w": np.asarray(end["w"] * 2, end["w"].dtype)})


@lru_cache(maxsize=512)
def _steered(task: TaskSpec, segment: int, in_root: bytes, ppb: int) -> bytes:
    """The honest end, and its update once more by so many parts per billion."""
    start, end = state_of(in_root), honest(task, segment, in_root).states[-1]
    further = (end["w"].astype(np.float64) - start["w"]) * (ppb / 1e9)
    return kept({**end, "w": np.asarray(end["w"] + further, end["w"].dtype)})


def _claim(cheat: str, task: TaskSpec, segment: int, roots: list[bytes]) -> bytes:
    """The end that a cheat claims; roots: of the states at the start of its run and after each segment."""
    if cheat == "skip-step":
        return kept(honest(task, segment, roots[-1]).states[-2])
    if cheat == "garbage-activations":  # its state holds what it sent, for which the table stands here
        end = honest(task, segment, roots[-1]).states[-1]
        return kept({**end, "table": np.asarray(end["table"] + 1, end["table"].dtype)})
    if cheat == "stale-gradient":
        return _stale_gradient(task, segment, roots[-1])
    if cheat == "unproven-base":
        return kept(honest(task, segment, roots[0]).states[-1])
    if cheat == "extrapolated-checkpoint" and len(roots) > 1:
        now, before = state_of(roots[-1]), state_of(roots[-2])
        return kept({name: _moved(now[name], before[name], now[name]) for name in now})
    if cheat == "extrapolated-checkpoint":
        return kept(honest(task, segment, roots[-1]).states[-1])
    return roots[-1]  # stale-checkpoint; and a unit that skips its backward pass learns nothing


FRAUDS: Final = (
    *(name for name in _ALTERS if name != WRONG_PRODUCT), "skip-step", "stale-gradient", "unproven-base",
    "extrapolated-checkpoint", "stale-checkpoint", "copied-proof",
)  # fmt: skip
UNIT_FRAUDS: Final = ("garbage-activations", "skip-backward")


# --- the worker ------------------------------------------------------------------------------------------------
def work_of(
    task: TaskSpec, segments: range, in_root: bytes, cheat: str, gauges: Sequence[Gauge] = ()
) -> Iterator[tuple[bytes, bytes]]:
    """The root before and after each segment of a run. cheat: of FRAUDS, of UNIT_FRAUDS for a unit, a lie, or nothing.
    gauges: of a tolerant task, which every segment ends with as it began, a fraud's too. Raises ValueError for a
    STEERED without a number."""
    task, roots = plain(task), [in_root]
    if cheat == "copied-proof":
        task = msgspec.structs.replace(task, seed=task.seed ^ 1)
        other = in_root if segments.start else initial_root(task.seed)
        for segment in segments:
            end = kept(honest(task, segment, other).states[-1])
            yield in_root, end
            in_root = other = end
        return
    for segment in segments:
        if cheat == WRONG_END:
            end = _wrong_end(task, segment, roots[-1])
        elif cheat.startswith(STEERED):
            end = _steered(task, segment, roots[-1], int(cheat.removeprefix(STEERED)))
        elif cheat == WRONG_PRODUCT or (cheat in _ALTERS and segment):
            end = kept(_altered(task, segment, roots[-1], cheat).states[-1])
        elif cheat and segment:
            end = _claim(cheat, task, segment, roots)
        else:
            end = kept(honest(task, segment, roots[-1]).states[-1])
        if gauges:
            end = kept({**state_of(end), **put_back(state_of(roots[-1]), state_of(end), gauges)})
        yield roots[-1], end
        roots.append(end)


def answer_of(question: bytes, task: TaskSpec, segment: int, in_root: bytes, *, cheat: str, claimed: bytes) -> Answer:
    """What a simulated sandbox answers to a question of a dispute about a segment that starts from `in_root`.

    claimed: the root of the state that a cheat handed in.
    """
    task = plain(task)
    tracer: Tracer = honest(task, segment, in_root)
    claimed = _wrong_end(task, segment, in_root) if cheat == WRONG_END else claimed
    if cheat == WRONG_PRODUCT or (cheat in _ALTERS and claimed and segment):
        tracer = _altered(task, segment, in_root, cheat)
    elif claimed:
        tracer = _stubborn(task, segment, in_root, claimed)
    return answer(question, tracer)


@lru_cache(maxsize=512)
def _stubborn(task: TaskSpec, segment: int, in_root: bytes, claimed: bytes) -> Tracer:
    state: State = state_of(claimed)
    return StubbornTracer(honest(task, segment, in_root), state)
