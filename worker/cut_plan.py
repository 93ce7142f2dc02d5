"""Which stage each value of a step belongs to once it is cut, and what crosses which border. DESIGN §11.

From the places of worker/cut_places.py and the cuts follow the stage of every node, the home of every parameter and
two lists of crossings for each border. worker/cutting.py writes the Programs. Pure: no torch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from protocol.program import Program
from worker.cut_places import SLACK, Places, choose_cuts
from worker.step_parts import NotParallel, StepParts
from worker.unrolling import check_counts

__all__ = ["Cut", "Sync", "ahead_of", "planned"]

Sync = Literal["none", "step", "local"]


def ahead_of(stage: int, *, stages: int, micro_batches: int, in_flight: int | None) -> int:
    """The micro-batches that a stage starts before its first backward pass: 1 of the last stage, `in_flight` of the
    first, evenly between. One more than the stage after it at least, as 1F1B has it, or two where none is given, so
    that a round trip hides behind a micro-batch; never more than there are."""
    behind = stages - 1 - stage
    wanted = 1 + 2 * behind
    if in_flight is not None:
        wanted = max(1 + behind, 1 + round((in_flight - 1) * behind / max(1, stages - 1)))
    return min(wanted, micro_batches)


def planned(
    program: Program,
    *,
    stages: int,
    micro_batches: int,
    in_flight: int | None = None,
    replicas: int = 1,
    sync: Sync = "none",
    keep: Iterable[int] = (),
    speeds: Sequence[float] = (),
    slack: float = SLACK,
    at: Sequence[int] | None = None,
) -> Cut:
    """Where `cut` would cut, before any unit is made. Raises NotParallel."""
    parts = StepParts(program)
    check_counts(parts, micro_batches)
    kept = frozenset(keep)
    places = Places(parts, micro_batches, private=bool(kept))
    cuts = tuple(at) if at is not None else choose_cuts(places, stages, speeds=speeds, slack=slack, kept=kept)
    whole = Cut(places, cuts, in_flight, replicas, sync)
    whole.check(kept)
    return whole


@dataclass(frozen=True)
class Cut:
    """A step, and the places where it is cut. kept_rows: examples that are kept of what crosses forward, over
    kept_borders (all where None): the numbers of the stages before them."""

    places: Places
    cuts: tuple[int, ...]
    in_flight: int | None
    replicas: int
    sync: Sync
    kept_rows: int = 0
    kept_borders: frozenset[int] | None = None

    @property
    def parts(self) -> StepParts:
        """The step."""
        return self.places.parts

    @property
    def stages(self) -> int:
        """How many."""
        return len(self.cuts) + 1

    def stage_at(self, place: int) -> int:
        """The stage a place belongs to."""
        return bisect_right(self.cuts, place)

    @cached_property
    def stage_of(self) -> dict[int, int]:
        """The stage of each forward and backward node."""
        return {number: self.stage_at(place) for number, place in self.places.place.items()}

    @cached_property
    def home(self) -> dict[int, int]:
        """The stage of each changing parameter."""
        return {number: self.stage_at(place) for number, place in self.places.home.items()}

    @cached_property
    def owner(self) -> dict[int, int]:
        """The stage that updates with each gradient. Raises NotParallel if several do."""
        found: dict[int, int] = {}
        for number, gradients in self.places.gradients_of.items():
            for gradient in gradients:
                if found.setdefault(gradient, self.home[number]) != self.home[number]:
                    raise NotParallel(
                        "the update of one parameter reads gradients of another, which is of another stage",
                        why="as where gradients are clipped by one norm over all of them",
                        next_step="use clip_value in place of clip_norm, or stages = 1",
                    )
        return found

    @cached_property
    def ahead(self) -> tuple[tuple[tuple[int, bool], ...], ...]:
        """What crosses forward over the border behind each stage: value, and whether once for each micro-batch."""
        found: list[list[tuple[int, bool]]] = [[] for _ in range(self.stages)]
        for number in self.places.order:
            for stage in range(self.stage_of[number], self.stage_at(self.places.last_use[number])):
                found[stage].append((number, True))
        for number, home in self.home.items():
            for stage in range(home, self.stage_at(self.places.reach[number])):
                found[stage].append((number, False))
        return tuple(tuple(sorted(crossing, key=lambda pair: (not pair[1], pair[0]))) for crossing in found)

    @cached_property
    def back(self) -> tuple[tuple[tuple[int, bool], ...], ...]:
        """What crosses backward over the border before each stage."""
        found: list[list[tuple[int, bool]]] = [[] for _ in range(self.stages)]
        for number, low in self.places.lowest.items():
            for stage in range(self.stage_at(low) + 1, self.stage_of[number] + 1):
                found[stage].append((number, True))
        for gradient, owner in self.owner.items():
            for stage in range(owner + 1, self.made_at(gradient) + 1):
                found[stage].append((gradient, False))
        return tuple(tuple(sorted(crossing, key=lambda pair: (not pair[1], pair[0]))) for crossing in found)

    def example_of(self, number: int) -> tuple[int, ...] | None:
        """The shape of the part of a value that one row of the micro-batch is, if it has rows."""
        rows, (dtype, shape) = self.parts.rows, self.parts.program.types[number]
        if dtype != "float32" or not shape or shape[0] % rows:
            return None
        return shape[1:] if shape[0] == rows else (shape[0] // rows, *shape[1:])

    def example_bytes(self, stage: int) -> int:
        """The bytes of what crosses forward before and behind a stage of one row: what it keeps of each example."""
        borders = ([self.ahead[stage - 1]] if stage else []) + [self.ahead[stage]]
        numbers = [number for border in borders for number, rows in border if rows and self.example_of(number)]
        return sum(self.parts.program.types[number].size_bytes for number in numbers) // self.parts.rows

    def made_at(self, gradient: int) -> int:
        """The stage that computes a gradient."""
        return self.stage_of.get(gradient, self.owner[gradient])

    def check(self, kept: frozenset[int]) -> None:
        """Raises NotParallel if the update does not split, or what is private to kept stages would leave them."""
        parts, owner = self.parts, self.owner
        for number, home in self.home.items():
            for node in parts.cone(parts.new_state[parts.program.inputs[number].name]):
                for ref in parts.node(node).refs():
                    for base in self.places.bases.get(ref, ()):
                        if self.home.get(base, home) != home:
                            raise NotParallel(
                                f"the update of {parts.program.inputs[number].name} reads "
                                f"{parts.program.inputs[base].name}, which is of another stage",
                                next_step="use an optimizer that treats each parameter by itself, or stages = 1",
                            )
        assert all(self.made_at(gradient) >= stage for gradient, stage in owner.items())
        for number, found in self.places.readers.items():
            stages = {self.stage_at(place) for place in found}
            if stages & kept and stages - kept:
                raise NotParallel(
                    f"stage {min(stages - kept)} reads {parts.program.inputs[number].name}, as a kept stage does",
                    next_step='keep = ["first", "last"] in [privacy] of job.toml, or fewer stages',
                )
        for stage in sorted(kept):
            out = self.ahead[stage] if stage + 1 < self.stages and stage + 1 not in kept else ()
            back = self.back[stage] if stage and stage - 1 not in kept else ()
            self._check_private(kept, stage, (*out, *back))

    def _check_private(self, kept: frozenset[int], stage: int, crossing: Iterable[tuple[int, bool]]) -> None:
        """Raises NotParallel where a kept stage would hand to one that is not kept a weight of its own, or rows or
        labels that no such weight hides."""
        inputs = self.parts.program.inputs
        for number, rows in crossing:
            if not rows:
                name = inputs[number].name if number < len(inputs) else "the gradient of a weight"
                raise NotParallel(
                    f"{name} would leave stage {stage}, which you keep",
                    why="a weight that several stages read crosses between them, and so does its gradient",
                    next_step="give each stage weights of its own, as with an untied head, or do not keep the stage",
                )
            if number in self._bare(kept):
                raise NotParallel(
                    f"stage {stage}, which you keep, would hand on rows or labels as they are",
                    why=f"nothing that only kept stages know has touched value {number} where the step is cut",
                    next_step="fewer stages, so that a kept one has the first or the last weights",
                )

    def _bare(self, kept: frozenset[int]) -> set[int]:
        """The values of kept stages that are made of rows or labels, and of no weight that only kept stages read.

        What comes from a stage that is not kept is known there. Joined to others a bare value stays what it is.
        """
        parts, readers = self.parts, dict[int, set[int]]()
        nodes = sorted((*self.places.order, *self.places.backward))
        for number in nodes:
            for ref in parts.node(number).refs():
                for base in self.places.bases.get(ref, ()):
                    readers.setdefault(base, set()).add(self.stage_of[number])
        inputs = enumerate(parts.program.inputs)
        roles = {number: item.role for number, item in inputs}
        secret = {base for base, stages in readers.items() if roles[base] == "parameter" and stages <= kept}
        bare, covered = {number for number, role in roles.items() if role == "batch"}, set[int]()
        for number in nodes:
            if self.stage_of[number] not in kept:
                continue
            refs = set(parts.node(number).refs())
            bases = frozenset[int]().union(*(self.places.bases.get(ref, frozenset()) for ref in refs))
            hidden = bool(refs & covered or bases & secret)
            if refs & bare and (not hidden or parts.node(number).op == "cat.default"):
                bare.add(number)
            elif hidden:
                covered.add(number)
        return bare
