"""A player who stands by a state it cannot derive: true up to the last step, and there what it claims.

It is how a cheat that cannot find its own lie plays the game, and how demonstrations and tests play one: it never
contradicts itself, so it loses at the deepest level and not by a slip.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol import merkle
from protocol.dispute_partials import Partial
from protocol.dispute_player import Tracer
from protocol.errors import LocalProtocolError

__all__ = ["MisaddingTracer", "StubbornTracer"]

StateArrays = Mapping[str, NDArray[Any]]


class StubbornTracer(Tracer):
    """`truth`, but that the segment ends in `claimed` and, of its last step, the values `also` are what they say.

    claimed: the whole state by name. also: node results and batch inputs by their value's number.
    """

    def __init__(self, truth: Tracer, claimed: StateArrays, also: Mapping[int, NDArray[Any]] | None = None) -> None:
        """Asks `truth` for the roots of its last state."""
        self.facts, self._truth = truth.facts, truth
        self._last = self.facts.ends - 1
        self._claimed = claimed
        self._ends = [merkle.tensor_root(claimed[name]) for name in self.facts.names]
        self._instead: dict[int, NDArray[Any]] = dict(also or {})
        true_ends = truth.state_roots(self._last)
        for update, end, true_end in zip(self.facts.program.updates, self._ends, true_ends, strict=True):
            if end != true_end:  # of two names for one value the first that differs, as the game finds it
                self._instead.setdefault(update.value, claimed[update.name])

    def step_roots(self) -> Sequence[bytes]:
        """See Tracer."""
        end = merkle.state_root_of(dict(zip(self.facts.names, self._ends, strict=True)))
        return [*self._truth.step_roots()[:-1], end]

    def state_roots(self, step: int) -> Sequence[bytes]:
        """See Tracer."""
        return self._ends if step == self._last else self._truth.state_roots(step)

    def trace_roots(self, step: int) -> Sequence[bytes]:
        """See Tracer."""
        roots = list(self._truth.trace_roots(step))
        if step == self._last:
            for value, array in self._instead.items():
                leaf = self.facts.trace_leaf(value)
                if leaf is not None:
                    roots[leaf] = merkle.tensor_root(array)
        return roots

    def tensors(self, step: int, values: Collection[int]) -> Mapping[int, NDArray[Any]]:
        """See Tracer. State that the step reads is the true one, whatever the claim says of it afterwards."""
        if step > self._last:  # the state after the segment
            named = {v: item.name for v in values if (item := self.facts.input(v)) is not None}
            return {v: self._claimed[name] for v, name in named.items()}
        instead = self._instead if step == self._last else {}
        own = {v: instead[v] for v in values if v in instead and self.facts.trace_leaf(v) is not None}
        return {**self._truth.tensors(step, [v for v in values if v not in own]), **own}

    def data(self, name: str) -> bytes | memoryview:
        """See Tracer."""
        return self._truth.data(name)

    def partials(self, step: int, value: int, element: int, positions: Sequence[int]) -> list[Partial]:
        """See Tracer: the true ones, for it has no others."""
        return self._truth.partials(step, value, element, positions)


class MisaddingTracer(StubbornTracer):
    """A cheat that knows its lie: the sum of one element of a product or a sum in the last step, `by` too much from
    `term` on. Its partial results end in its element, so the search goes down to that term.

    It claims the true end of the segment but for one element of the state tensor that is made last.
    """

    def __init__(self, truth: Tracer, *, value: int, element: int, term: int, by: int, end: StateArrays) -> None:
        """value: of a reduction that is summed. end: the true state after the segment, by name."""
        facts = truth.facts
        self._place, self._term, self._by = (value, element), term, by
        self._truth, self._last = truth, facts.ends - 1
        chain = facts.chain(value, element)
        if chain is None:
            raise LocalProtocolError(f"value {value} is no reduction")
        wrong = truth.tensors(self._last, [value])[value].copy()
        (partial,) = self.partials(self._last, value, element, [chain.terms])
        wrong.reshape(-1).view(np.uint32)[element] = chain.finish(partial)
        latest = max(facts.program.updates, key=lambda update: update.value).name
        claimed = end[latest].copy()
        claimed.reshape(-1)[:1] += 1
        super().__init__(truth, {**end, latest: claimed}, {value: wrong})

    def partials(self, step: int, value: int, element: int, positions: Sequence[int]) -> list[Partial]:
        """See Tracer."""
        true = self._truth.partials(step, value, element, positions)
        if (step, value, element) != (self._last, *self._place):
            return true
        return [
            self._shifted(partial) if at > self._term else partial for at, partial in zip(positions, true, strict=True)
        ]

    def _shifted(self, partial: Partial) -> Partial:
        return (*partial[:-1], partial[-1] + self._by)
