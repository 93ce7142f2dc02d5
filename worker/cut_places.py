"""Where the work of a step stands along its forward pass, and where to cut it. DESIGN §11.

The nodes that lead to the loss from the first stage to the last have their order; a node of the backward pass gets the
place in it where its operands are, so that a cut of the forward pass cuts all. From that follow the operations of any
stage and the bytes over any border, and the cuts are found that balance the first and, within a tolerance, make the
second least. Pure: no torch.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from protocol.operations import cost_of
from protocol.program import STATE_ROLES, resolved
from worker.step_parts import NotParallel, StepParts

__all__ = ["SLACK", "Places", "choose_cuts"]

SLACK: Final = 0.1
"""How much longer than in the best balanced cut the slowest stage may take, if fewer bytes cross: blocks of a model are
of one size, and between two of them one tensor crosses; within one, several do."""


@dataclass(frozen=True)
class Places:
    """The place of every value of a step of one micro-batch. private: batches are read where they are needed first, and
    what is made of them crosses like anything else; else each stage that needs them derives them for itself."""

    parts: StepParts
    micro_batches: int
    private: bool = False

    # --- kinds of values ---------------------------------------------------------------------------------------
    @cached_property
    def copied(self) -> tuple[bool, ...]:
        """Whether each stage that needs it makes it for itself, out of state, rows and random numbers."""
        parts = self.parts
        own = [not (self.private and rows) for rows in parts.of_rows]
        return tuple(
            not varying or (not stateful and mine)
            for varying, stateful, mine in zip(parts.varying, parts.stateful, own, strict=True)
        )

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The nodes of the forward pass that stand at one place each, in order."""
        return tuple(n for n in self.parts.other_nodes if self.parts.forward[n] and not self.copied[n])

    @cached_property
    def backward(self) -> tuple[int, ...]:
        """The nodes of the backward pass that stand at one place each, in order."""
        return tuple(n for n in self.parts.other_nodes if not self.parts.forward[n] and not self.copied[n])

    @cached_property
    def changing(self) -> tuple[int, ...]:
        """The inputs that are parameters which the update changes."""
        new = self.parts.new_state
        inputs = enumerate(self.parts.program.inputs)
        return tuple(n for n, item in inputs if item.role == "parameter" and new[item.name] != n)

    @cached_property
    def bases(self) -> dict[int, frozenset[int]]:
        """The parameters and buffers that each value which is the same for all micro-batches is made of."""
        parts, found = self.parts, dict[int, frozenset[int]]()
        for number, item in enumerate(parts.program.inputs):
            found[number] = frozenset((number,)) if item.role in STATE_ROLES else frozenset()
        for number in parts.other_nodes:
            if not parts.varying[number]:
                found[number] = frozenset().union(*(found.get(ref, frozenset()) for ref in parts.node(number).refs()))
        return found

    @cached_property
    def gradients_of(self) -> dict[int, tuple[int, ...]]:
        """The gradients that the new value of each changing parameter is made of."""
        parts, gradients = self.parts, set(self.parts.gradients)
        found = {}
        for number in self.changing:
            cone = parts.cone(parts.new_state[parts.program.inputs[number].name])
            found[number] = tuple(sorted({ref for node in cone for ref in parts.node(node).refs()} & gradients))
        return found

    # --- places ------------------------------------------------------------------------------------------------
    @cached_property
    def place(self) -> dict[int, int]:
        """The place of each forward and backward node: an index into `order`."""
        found = {number: place for place, number in enumerate(self.order)}
        latest = dict(found)
        for number in self.backward:
            latest[number] = min(self._available(number, latest), default=len(self.order) - 1)
        wanted = self._wanted()
        ends: dict[int, int] = {}  # nodes that lead to one gradient alone, and to which
        for number in reversed(self.backward):
            readers = self.parts.consumers[number]
            leads = {number if self.parts.updating[reader] else ends.get(reader, -1) for reader in readers}
            if len(leads) == 1 and -1 not in leads:
                ends[number] = leads.pop()
            found[number] = self._pulled(number, latest, found, wanted)
        for number in self.backward:
            if number in ends:  # what was pulled, and its operands were not, had better stay with them
                found[number] = min(self._available(number, found), default=found[number])
        return found

    @cached_property
    def last_use(self) -> dict[int, int]:
        """The last place where the forward pass reads a value, a state tensor or a batch input; its own at least."""
        found: dict[int, int] = {}
        for place, number in enumerate(self.order):
            found[number] = max(place, found.get(number, 0))
            for ref in self.parts.node(number).refs():
                for base in self._seats(ref):
                    found[base] = place
        return found

    @cached_property
    def home(self) -> dict[int, int]:
        """The place of each changing parameter: the first that needs it, or its gradient if that is before."""
        found = dict.fromkeys(self.changing, len(self.order))
        for number in (*self.order, *self.backward):
            for base in self._bases_read(number):
                if base in found:
                    found[base] = min(found[base], self.place[number])
        users = Counter(gradient for gradients in self.gradients_of.values() for gradient in gradients)
        for number, gradients in self.gradients_of.items():
            own = [self.place[g] for g in gradients if g in self.place and users[g] == 1]
            found[number] = min([found[number], *own])
        return {number: place if place < len(self.order) else 0 for number, place in found.items()}

    @cached_property
    def reach(self) -> dict[int, int]:
        """The last place that needs each changing parameter."""
        found = dict(self.home)
        for number in (*self.order, *self.backward):
            for base in self._bases_read(number):
                if base in found:
                    found[base] = max(found[base], self.place[number])
        return found

    @cached_property
    def lowest(self) -> dict[int, int]:
        """The first place where the backward pass reads a value that is made at a later one."""
        found: dict[int, int] = {}
        for number in self.backward:
            for ref in self.parts.node(number).refs():
                if ref in self.place and self.place[number] < self.place[ref]:
                    found[ref] = min(found.get(ref, len(self.order)), self.place[number])
        return found

    # --- what a cut costs --------------------------------------------------------------------------------------
    @cached_property
    def operations(self) -> NDArray[np.float64]:
        """Operations of one micro-batch at each place, with its share of the update: float64 (places,)."""
        found = np.zeros(len(self.order))
        for number in (*self.order, *self.backward):
            found[self.place[number]] += self._cost(number)
        counted: set[int] = set()
        for number, place in self.home.items():
            cone = self.parts.cone(self.parts.new_state[self.parts.program.inputs[number].name])
            found[place] += sum(self._cost(node) for node in cone if node not in counted) / self.micro_batches
            counted.update(cone)
        return found

    @cached_property
    def traffic(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bytes of one micro-batch that cross forward and backward where `order` is cut before a place: float64
        (places + 1,) each. What crosses once a step counts by its share."""
        ahead, back = np.zeros(len(self.order) + 2), np.zeros(len(self.order) + 2)
        for number in self.order:
            _span(ahead, self.place[number], self.last_use[number], self._bytes(number))
        for number, home in self.home.items():
            share = self._bytes(number) / self.micro_batches
            _span(ahead, home, self.reach[number], share)
            for gradient in self.gradients_of[number]:
                _span(back, home, self.place.get(gradient, home), self._bytes(gradient) / self.micro_batches)
        for number, low in self.lowest.items():
            _span(back, low, self.place[number], self._bytes(number))
        return np.cumsum(ahead)[:-1], np.cumsum(back)[:-1]

    @cached_property
    def readers(self) -> dict[int, tuple[int, ...]]:
        """The places that read each batch input, if batches are private."""
        found: dict[int, set[int]] = {}
        for number in (*self.order, *self.backward):
            for ref in self.parts.node(number).refs():
                if ref in self._batch:
                    found.setdefault(ref, set()).add(self.place[number])
        return {number: tuple(sorted(places)) for number, places in found.items()}

    # --- how places are found ----------------------------------------------------------------------------------
    @cached_property
    def _batch(self) -> frozenset[int]:
        inputs = enumerate(self.parts.program.inputs)
        return frozenset(number for number, item in inputs if self.private and item.role == "batch")

    def _seats(self, ref: int) -> Iterable[int]:
        """What a node that reads `ref` has to stand near to: the value, or the state it is made of."""
        if ref in self._batch or (ref >= self.parts.program.first_node and not self.copied[ref]):
            return (ref,)
        return self.bases.get(ref, ())

    def _bases_read(self, number: int) -> Iterator[int]:
        for ref in self.parts.node(number).refs():
            yield from self.bases.get(ref, ())

    def _available(self, number: int, latest: dict[int, int]) -> Iterator[int]:
        """The last place at which each operand of a backward node is there without crossing back."""
        for ref in self.parts.node(number).refs():
            for seat in self._seats(ref):
                if seat in self.last_use:
                    yield self.last_use[seat]
                elif seat in latest:
                    yield latest[seat]

    def _wanted(self) -> dict[int, int]:
        """The first place where the forward pass reads the parameter that each gradient is for."""
        first: dict[int, int] = {}
        for place, number in enumerate(self.order):
            for base in self._bases_read(number):
                first.setdefault(base, place)
        found: dict[int, int] = {}
        for number, gradients in self.gradients_of.items():
            for gradient in gradients:
                if number in first:
                    found[gradient] = min(found.get(gradient, first[number]), first[number])
        return found

    def _pulled(self, number: int, latest: dict[int, int], found: dict[int, int], wanted: dict[int, int]) -> int:
        """The place of a backward node: as late as its operands allow, or as early as its readers do where fewer bytes
        cross so. Its result crosses in the first case, and in the second what its operands are."""
        readers = [found[reader] for reader in self.parts.consumers[number] if reader in found]
        high, low = latest[number], max(readers, default=-1)
        if low < 0:
            low = wanted.get(number, latest[number])
        if low >= high:
            return high
        crossing = 0
        for ref in dict.fromkeys(self.parts.node(number).refs()):
            if ref in self._batch or any(low < self.last_use.get(base, 0) for base in self.bases.get(ref, ())):
                return high
            if ref not in latest or latest[ref] <= low:
                continue
            others = (reader for reader in self.parts.consumers[ref] if reader != number)
            if not any(found.get(reader, latest.get(reader, high)) <= low for reader in others):
                crossing += self._bytes(ref)
        return low if crossing <= self._bytes(number) else high

    def _bytes(self, number: int) -> int:
        return self.parts.program.types[number].size_bytes

    def _cost(self, number: int) -> int:
        node = self.parts.node(number)
        return cost_of(node.op, resolved(node.args, self.parts.program.types), node.type)


def _span(bytes_at: NDArray[np.float64], first: int, last: int, size: float) -> None:
    """A value at `first` and wanted at `last` crosses each cut between them."""
    if first < last:
        bytes_at[first + 1] += size
        bytes_at[last + 1] -= size


def choose_cuts(
    places: Places,
    stages: int,
    *,
    speeds: Sequence[float] = (),
    slack: float = SLACK,
    kept: Iterable[int] = (),
) -> tuple[int, ...]:
    """The places before which to cut, `stages` - 1 of them, ascending.

    speeds: of the devices of each stage, in any unit. slack: see SLACK. kept: stages that the submitter holds; where
    places are private, no other stage reads a batch input, and a kept end of the model has weights of its own. Raises
    NotParallel where that cannot be, or there are fewer nodes than stages.
    """
    count, kept = len(places.order), set(kept)
    if count < stages:
        raise NotParallel(f"{count} nodes of the forward pass in {stages} stages", next_step="lower stages in job.toml")
    total = np.concatenate(([0.0], np.cumsum(places.operations)))
    rates = np.asarray(speeds if len(speeds) else [1.0] * stages, dtype=np.float64)
    assert len(rates) == stages, "one speed for each stage"
    barrier = np.zeros(count + 1, dtype=np.int64)  # the first place of an unkept stage that ends before place j
    for read in sorted({place for found in places.readers.values() for place in found}):
        barrier[read + 1 :] = read + 1

    def starts(stage: int, limit: float) -> NDArray[np.int64]:
        """For each end of a stage, the first place where it may begin."""
        first = np.searchsorted(total, total - limit * rates[stage] * (1 + 1e-12), side="left")
        return first if stage in kept else np.maximum(first, barrier)

    may_end = _may_end(places, stages, kept)

    def feasible(limit: float) -> bool:
        ends = np.zeros(count + 1, dtype=bool)
        ends[0] = True
        for stage in range(stages):
            before = np.concatenate(([0], np.cumsum(ends)))
            # before[j] counts possible ends below j, so a stage of one place or more ends at j if any is in range.
            ends = before[np.arange(count + 1)] > before[np.minimum(starts(stage, limit), np.arange(count + 1))]
            ends &= may_end[stage]
        return bool(ends[count])

    high = float(total[-1] / rates.min())
    if not feasible(high):
        raise NotParallel(
            "a stage that you do not keep would read the batch",
            why="rows or labels are read in the middle of the forward pass",
            next_step="take fewer stages, or read the batch at the beginning and the labels in the loss",
        )
    low = 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if feasible(middle) else (middle, high)
    return _least_traffic(places, [starts(stage, high * (1 + slack)) for stage in range(stages)], may_end)


def _may_end(places: Places, stages: int, kept: Iterable[int]) -> NDArray[np.bool_]:
    """Where each stage may end: bool (stages, places + 1). A first stage that is kept has the first weights that the
    forward pass reads, and a last one the last: without them it would hand on rows or labels as they are."""
    parts = places.parts
    roles = [item.role for item in parts.program.inputs]
    weighted = [
        place
        for place, number in enumerate(places.order)
        if any(roles[base] == "parameter" for ref in parts.node(number).refs() for base in places.bases.get(ref, ()))
    ]
    found = np.ones((stages, len(places.order) + 1), dtype=np.bool_)
    if 0 in kept and weighted and stages > 1:
        found[0, : weighted[0] + 1] = False
    if stages - 1 in kept and weighted and stages > 1:
        found[stages - 2, weighted[-1] + 1 :] = False
    return found


def _least_traffic(places: Places, starts: list[NDArray[np.int64]], may_end: NDArray[np.bool_]) -> tuple[int, ...]:
    """Of the cuts whose stages begin no earlier than `starts` of their end says, those over which the fewest bytes go.

    Dynamic programming over the ends of each stage, with the least of a window that only moves on.
    """
    ahead, back = places.traffic
    crossing = (ahead + back).tolist()
    count = len(places.order)
    best = [0.0] + [float("inf")] * count
    came: list[list[int]] = []
    for stage, first in enumerate(starts):
        following, begun = [float("inf")] * (count + 1), [0] * (count + 1)
        window: deque[int] = deque()
        for end in range(1, count + 1):
            while window and best[window[-1]] >= best[end - 1]:
                window.pop()
            window.append(end - 1)
            while window and window[0] < first[end]:
                window.popleft()
            if window and may_end[stage, end]:
                begun[end] = window[0]
                following[end] = best[window[0]] + (crossing[end] if stage < len(starts) - 1 else 0.0)
        came.append(begun)
        best = following
    cuts, end = [], count
    for begun in reversed(came[1:]):
        end = begun[end]
        cuts.append(end)
    return tuple(reversed(cuts))
