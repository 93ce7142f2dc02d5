"""The challenger's machine in tolerant mode: the first value of a solver's step that no honest machine can have.

Every node is run on the solver's own operands by the kernels of this machine. Where the bits are equal, or the
difference lies within a float64 estimate of the bound, the solver is honest there; what is left is asked of the
referee's own rule (protocol/bounds.py), element by element, the worst first. So a dissent is one that the referee will
confirm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protocol import merkle, params
from protocol.bounds import check_within
from protocol.codec import decode, encode
from protocol.dispute_evidence import Followed, read_followed, read_states
from protocol.dispute_facts import Facts
from protocol.dispute_following import Dissent, Dissented, FollowingTracer, read_element
from protocol.dispute_partials import fits_opening
from protocol.dispute_player import Question, answer
from protocol.dispute_wire import ShowDissent
from protocol.errors import MalformedRecord, VerificationFailed
from protocol.merkle import tile_of
from protocol.profile import Gauge
from protocol.program import Items, Program, Ref
from protocol.referee import bound_at
from protocol.task import TaskSpec
from worker.executor import Executor
from worker.training import Batches, Data

__all__ = ["Dissenter", "follow"]

_JUDGED: Final = 8  # elements of one value that the referee's rule is asked of: the worst by estimate
_SCANNED: Final = 1 << 16  # elements that are looked through for the one that reads a bad index, 50 us each
_NEAR: Final = 0.999  # of the bound: a float64 sum of 2**23 products is off by 2e-9 of it
_ROUNDOFF: Final = 2.0**-24
_SUBNORMAL_HALF: Final = 2.0**-150


class Dissenter:
    """Looks for a dissent in what a solver showed of one step. threads: of the kernels."""

    def __init__(
        self, task: TaskSpec, program: Program, facts: Facts, arrays: Mapping[str, Data], *, threads: int = 1
    ) -> None:
        """Raises MalformedRecord for a task, program or data that do not fit each other."""
        self.facts = facts
        self._batches = Batches(task, program, arrays)
        self._executor = Executor(program, "native", threads=threads)

    def first(self, followed: Followed) -> Dissent | None:
        """The first value outside that can be judged, in the order of the game; None if all may be honest."""
        if self.facts.puts_back(followed.step):
            return self._put_back(followed)
        return self._in_batch(followed) or self._in_nodes(followed) or self._in_state(followed)

    # --- what is exact ---------------------------------------------------------------------------------------
    def _in_batch(self, followed: Followed) -> Dissent | None:
        batch = self._batches.of(self.facts.number_of(followed.step))
        for value, item in enumerate(self.facts.program.inputs):
            if item.role == "batch":
                own, theirs = batch[item.name].numpy(), followed.trace[value]
                places = np.flatnonzero(_patterns(own) != _patterns(theirs))
                if places.size:
                    at = int(places[0])
                    return Dissent(followed.step, value, at, read_element(own, at))
        return None

    def _in_state(self, followed: Followed) -> Dissent | None:
        """A tensor whose root after the step is not that of its value in the trace, or of what it was before."""
        facts = self.facts
        for place, update in enumerate(facts.program.updates):
            known, before = facts.computed_root(update.value, followed.step), facts.state_index(update.value)
            if known is None and before is not None:
                known = merkle.tensor_root(followed.before[facts.names[before]])
            if known is None:
                known = merkle.tensor_root(followed.trace[update.value])
            if known != followed.ends[place]:
                return Dissent(followed.step, facts.state_value(place), 0, 0)
        return None

    def _put_back(self, followed: Followed) -> Dissent | None:
        for place, name in enumerate(self.facts.names):
            value = self.facts.state_value(place)
            theirs, raw, base = (x[name].reshape(-1) for x in (followed.end, followed.before, followed.base))
            gauge = self.facts.gauge_mask(value)
            places = np.flatnonzero(_patterns(np.where(gauge, base, raw)) != _patterns(theirs))
            if places.size:
                at = int(places[0])
                return Dissent(followed.step, value, at, read_element(base if gauge[at] else raw, at))
        return None

    # --- what has bounds -------------------------------------------------------------------------------------
    def _in_nodes(self, followed: Followed) -> Dissent | None:
        facts = self.facts
        leaves = {update.value: facts.trace_leaf(update.value) for update in facts.program.updates}
        last = max((value for value, leaf in leaves.items() if leaf is not None), default=-1)
        for value in range(facts.program.first_node, last + 1):
            found = self._in_node(followed, value)
            if found is not None:
                return found
        return None

    def _in_node(self, followed: Followed, value: int) -> Dissent | None:
        operands = _Operands(self.facts, followed)
        theirs = followed.trace[value]
        if not theirs.size:
            return None
        try:
            own = self._executor.run_node(value - self.facts.program.first_node, operands.tensor).numpy()
        except MalformedRecord:
            return self._without_result(followed, value, operands)
        differs = _differs(own, theirs).reshape(-1)
        if not differs.any():
            return None
        excess = self._excess(value, operands, own.reshape(-1), theirs.reshape(-1))
        excess = np.where(differs, excess, 0)
        worst = np.argsort(-excess, kind="stable")[:_JUDGED]
        for at in sorted(int(place) for place in worst if excess[place] > _NEAR):
            if self._outside(followed.step, value, at, operands, read_element(theirs, at)):
                return Dissent(followed.step, value, at, read_element(own, at))
        return None

    def _without_result(self, followed: Followed, value: int, operands: _Operands) -> Dissent | None:
        """An index out of range among the operands: the first element that reads it, for there nothing follows."""
        for at in range(min(followed.trace[value].size, _SCANNED)):
            try:
                bound_at(self.facts, followed.step, value, at, operands.element)
            except MalformedRecord:
                return Dissent(followed.step, value, at, read_element(followed.trace[value], at) ^ 1)
        return None

    def _outside(self, step: int, value: int, element: int, operands: _Operands, theirs: int) -> bool:
        chain, kind = self.facts.chain(value, element), self.facts.type_of(value)

        def tile(place: tuple[int, int]) -> tuple[int, int]:
            read = self.facts.type_of(place[0])
            return place[0], tile_of(place[1], shape=read.shape, dtype=read.dtype)[0]

        if chain is not None and not fits_opening(chain, tile):
            return False  # more than a leaf may open: the quorum's distance decides alone
        try:
            bound = bound_at(self.facts, step, value, element, operands.element)
            check_within(theirs, bound, kind.dtype, "")
        except (VerificationFailed, MalformedRecord):
            return True
        return False

    def _excess(self, value: int, operands: _Operands, own: NDArray[Any], theirs: NDArray[Any]) -> NDArray[Any]:
        """How far each element lies out, in units of an estimate of its bound; infinite where nothing is allowed."""
        node = self.facts.node(value)
        assert node is not None, "a node's value"
        if theirs.dtype != np.float32:
            return np.full(theirs.shape, np.inf)
        if node.op not in _SUMS:
            return np.abs(_order(theirs) - _order(own)).astype(np.float64)  # 1 or more wherever they differ
        arguments = [operands.tensor(arg.value) if isinstance(arg, Ref) else _plain(arg) for arg in node.args]
        exact, error = (x.reshape(-1).numpy() for x in _SUMS[node.op](*arguments))
        with np.errstate(all="ignore"):
            excess = np.abs(theirs.astype(np.float64) - exact) / error
        return np.where(np.isfinite(excess), excess, np.inf)


class _Operands:
    """The solver's values of one step, and those that everybody computes."""

    def __init__(self, facts: Facts, followed: Followed) -> None:
        self._facts, self._followed = facts, followed
        self._known: dict[int, NDArray[Any]] = {}

    def array(self, value: int) -> NDArray[Any]:
        if value not in self._known:
            known = self._facts.computed_numpy(value, self._followed.step)
            place = self._facts.state_index(value)
            if known is None:
                held = self._followed.trace[value] if place is None else None
                known = held if held is not None else self._followed.before[self._facts.names[place or 0]]
            self._known[value] = known
        return self._known[value]

    def element(self, value: int, at: int) -> int:
        return read_element(self.array(value), at)

    def tensor(self, value: int) -> Tensor:
        return torch.from_numpy(self.array(value).copy())


# --- estimates in float64 ----------------------------------------------------------------------------------
def _gamma(roundings: float | Tensor) -> Any:
    return roundings * _ROUNDOFF / (1 - roundings * _ROUNDOFF)


def _product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Exact result and bound of a (..., M, K) by b (..., K, N), float64."""
    terms, a, b = a.shape[-1], a.double(), b.double()
    return a @ b, _gamma(terms) * (a.abs() @ b.abs()) + terms * _SUBNORMAL_HALF


def _sum(x: Tensor, dims: Sequence[int], keep: bool) -> tuple[Tensor, Tensor]:
    wide, over = x.double(), list(dims)
    terms = max(1, x.numel() // max(1, wide.sum(over, keepdim=True).numel())) if over else 1
    return wide.sum(over, keepdim=keep), _gamma(terms - 1) * wide.abs().sum(over, keepdim=keep)


def _embedding_gradient(grad: Tensor, index: Tensor, rows: int, padding: int, scale: bool) -> tuple[Tensor, Tensor]:
    kernel: Callable[..., Tensor] = torch.ops.aten.embedding_dense_backward.default
    wide = grad.double()
    counts = torch.bincount(index.reshape(-1), minlength=rows).double()
    error = _gamma((counts - 1).clamp_min(0)).unsqueeze(-1) * kernel(wide.abs(), index, rows, padding, scale)
    return kernel(wide, index, rows, padding, scale), error


_SUMS: Final[Mapping[str, Callable[..., tuple[Tensor, Tensor]]]] = {
    "mm.default": _product,
    "bmm.default": _product,
    "sum.dim_IntList": _sum,
    "embedding_dense_backward.default": _embedding_gradient,
}


def _plain(arg: Any) -> Any:
    return list(arg.items) if isinstance(arg, Items) else arg


def _order(x: NDArray[Any]) -> NDArray[np.int64]:
    """float32 as integers in their order, neighbours one apart."""
    bits = np.ascontiguousarray(x).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _patterns(x: NDArray[Any]) -> NDArray[Any]:
    """Bits, as a root is over them: every NaN is one, either zero itself."""
    if x.dtype != np.float32:
        return x
    return np.where(np.isnan(x), np.uint32(0x7FC00000), np.ascontiguousarray(x).view(np.uint32))


def _differs(own: NDArray[Any], theirs: NDArray[Any]) -> NDArray[np.bool_]:
    """Where two arrays hold different values: bit for bit, but that every NaN is one and zero has one sign."""
    if own.dtype != np.float32:
        return own != theirs
    return (own != theirs) & ~(np.isnan(own) & np.isnan(theirs))


# --- questions of a challenger -----------------------------------------------------------------------------
def follow(
    asked: Question,
    question: bytes,
    followed: Sequence[Data],
    dissent: bytes,
    *,
    task: TaskSpec,
    program: Program,
    arrays: Mapping[str, Data],
    base: Data | None,
    gauges: Sequence[Gauge],
    threads: int,
) -> tuple[bytes, bytes]:
    """The body and the opening of a player who follows; for ShowDissent the body is a Dissented.

    Raises MalformedRecord, VerificationFailed for files that do not fit the task or their roots.
    """
    if len(followed) != 3:
        raise MalformedRecord(f"{len(followed)} files are followed, of a step there are three")
    facts = Facts(task, program, asked.segment, gauges)
    known = decode(Dissent, dissent, bytes_max=params.QUESTION_BYTES_MAX) if dissent else None
    step = known.step if known is not None else getattr(asked.ask, "step", 0)
    states = read_states(facts, followed[0], None)
    seen = read_followed(facts, step, states, in_root=asked.in_root, before=followed[1], after=followed[2], base=base)
    if isinstance(asked.ask, ShowDissent):
        found = Dissenter(task, program, facts, arrays, threads=threads).first(seen)
        root = FollowingTracer(facts, seen, found).found_root if found is not None else bytes(32)
        pledge = seen.pledge(facts)
        return encode(Dissented(found, root, pledge.steps, pledge.trace)), b""
    if known is None:
        raise MalformedRecord("a solver is followed without a dissent")
    answered = answer(question, FollowingTracer(facts, seen, known, arrays))
    return answered.body, answered.opening
