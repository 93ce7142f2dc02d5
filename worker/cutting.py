"""Cuts the step of one micro-batch into the Programs of the units of a parallel job. DESIGN §11.

Each stage gets the nodes between two cuts (worker/cut_places.py), once for each micro-batch, in the order of 1F1B; what
crosses a border is an input of the one side and a value that the other sends. Together the pieces compute what
worker/unrolling.py makes of the same step, bit for bit, if nothing is lost on the way. Pure: no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec

from protocol.operations import TensorType
from protocol.program import STATE_ROLES, Constant, Init, Input, Items, Program, Ref
from protocol.stage import (
    IN_PREFIX,
    KEPT_PREFIX,
    OUTER_PREFIX,
    RECEIVED,
    RESIDUAL_PREFIX,
    SEEN_PREFIX,
    SENT,
    TAPE,
    Crossing,
    Flow,
)
from worker.cut_places import SLACK
from worker.cut_plan import Cut, Sync, ahead_of, planned
from worker.program_writer import Handle, ProgramWriter, moved
from worker.unrolling import added, mean, micro_batch_of, numbered

__all__ = ["StagePart", "cut", "received_name", "units_of"]

@dataclass(frozen=True)
class StagePart:
    """One unit: its Program, and what leaves and enters it in each step."""

    stage: int
    replica: int
    program: Program
    sends: tuple[Crossing, ...]
    receives: tuple[Crossing, ...]


def received_name(crossing: Crossing) -> str:
    """The name of the input that a received crossing is."""
    return f"{IN_PREFIX}{crossing.flow}.{crossing.replica}.{crossing.micro_batch}.{crossing.index}"


def cut(
    program: Program,
    *,
    stages: int,
    micro_batches: int,
    in_flight: int | None = None,
    replicas: int = 1,
    sync: Sync = "none",
    keep: Iterable[int] = (),
    kept_rows: int = 0,
    speeds: Sequence[float] = (),
    slack: float = SLACK,
    at: Sequence[int] | None = None,
) -> list[StagePart]:
    """The units of a parallel job in the order of their numbers, stage by stage.

    program: the captured step of one micro-batch. in_flight: see `ahead_of`. keep: stages that the submitter holds:
    no other reads the batches they read. kept_rows: if above 0, forward tensors with rows keep so many examples for the
    codec `change`. speeds, slack: see `choose_cuts`. at: the places to cut at, if they are known. Raises NotParallel
    for what does not split.
    """
    settled = planned(
        program, stages=stages, micro_batches=micro_batches, in_flight=in_flight, replicas=replicas, sync=sync,
        keep=keep, speeds=speeds, slack=slack, at=at,
    )  # fmt: skip
    return units_of(replace(settled, kept_rows=kept_rows))


def units_of(whole: Cut) -> list[StagePart]:
    """The units of a cut step in the order of their numbers."""
    pairs = ((stage, replica) for stage in range(whole.stages) for replica in range(whole.replicas))
    return [_Unit(whole, stage, replica).part() for stage, replica in pairs]


@dataclass
class _Unit:
    """One unit under construction."""

    whole: Cut
    stage: int
    replica: int
    writer: ProgramWriter = field(default_factory=ProgramWriter)
    once: dict[int, Handle] = field(default_factory=dict)  # values that are the same for all micro-batches
    each: list[dict[int, Handle]] = field(default_factory=list)  # of each micro-batch
    sends: list[tuple[Crossing, Handle]] = field(default_factory=list)
    receives: list[tuple[Crossing, Handle]] = field(default_factory=list)
    updates: dict[str, Handle] = field(default_factory=dict)

    def part(self) -> StagePart:
        """The unit, checked."""
        whole = self.whole
        count = whole.places.micro_batches
        self.each = [{} for _ in range(count)]
        for index, (number, rows) in enumerate(whole.ahead[self.stage]):
            if not rows:
                self._send("forward", 0, index, self._again(self._value(number, 0)))
        losses: list[Handle] = []
        sums: dict[int, Handle] = {}
        ahead = ahead_of(self.stage, stages=whole.stages, micro_batches=count, in_flight=whole.in_flight)
        for index in range(ahead):
            self._forward(index, losses)
        for index in range(count):
            self._backward(index, sums)
            if index + ahead < count:
                self._forward(index + ahead, losses)
        self._update({number: mean(self.writer, total, count) for number, total in sums.items()})
        total = losses[0] if losses else self.writer.add(Constant("float32", (), bytes(4)))
        for more in losses[1:]:
            total = added(self.writer, total, more)
        loss = mean(self.writer, total, count) if losses else total
        self._add_state()
        program, numbers = self.writer.finish(self.updates, loss)
        program.check()
        assert all(numbers[handle] >= program.first_node for _, handle in self.sends), "a node is sent"
        return StagePart(
            self.stage,
            self.replica,
            program,
            tuple(msgspec.structs.replace(crossing, value=numbers[handle]) for crossing, handle in self.sends),
            tuple(msgspec.structs.replace(crossing, value=numbers[handle]) for crossing, handle in self.receives),
        )

    # --- micro-batches -----------------------------------------------------------------------------------------
    def _forward(self, index: int, losses: list[Handle]) -> None:
        whole = self.whole
        crossing = whole.ahead[self.stage]
        for place, (number, rows) in enumerate(crossing):
            if rows and whole.stage_of[number] < self.stage:
                self._send("forward", index, place, self._again(self._value(number, index)))
        for number in self._own(whole.places.order):
            self._make(number, index)
        for place, (number, rows) in enumerate(crossing):
            if rows and whole.stage_of[number] == self.stage:
                self._send("forward", index, place, self.each[index][number])
        if self.stage == whole.stages - 1:
            losses.append(self._value(whole.parts.program.loss, index))

    def _backward(self, index: int, sums: dict[int, Handle]) -> None:
        whole = self.whole
        crossing = whole.back[self.stage]
        for place, (number, rows) in enumerate(crossing):
            if rows and whole.stage_of[number] > self.stage:
                self._send("backward", index, place, self._again(self._value(number, index)))
        for number in self._own(whole.places.backward):
            self._make(number, index)
        for place, (number, rows) in enumerate(crossing):
            if rows and whole.stage_of[number] == self.stage:
                self._send("backward", index, place, self.each[index][number])
        for number in whole.parts.gradients:
            if whole.made_at(number) == self.stage:
                found = self._value(number, index)
                sums[number] = added(self.writer, sums[number], found) if number in sums else found

    def _own(self, numbers: tuple[int, ...]) -> list[int]:
        return [number for number in numbers if self.whole.stage_of[number] == self.stage]

    def _value(self, number: int, index: int) -> Handle:
        """A value as micro-batch `index` has it, made or received if it is not there yet."""
        waiting = [number]
        while waiting:
            top = waiting[-1]
            if top in self.once or top in self.each[index]:
                waiting.pop()
                continue
            if self._is_copied(top):
                missing = [ref for ref in self.whole.parts.node(top).refs() if not self._known(ref, index)]
                if missing:
                    waiting += missing
                    continue
            self._make(top, index)
            waiting.pop()
        found = self.once.get(number)
        return self.each[index][number] if found is None else found

    def _is_copied(self, number: int) -> bool:
        return number >= self.whole.parts.program.first_node and self.whole.places.copied[number]

    def _known(self, number: int, index: int) -> bool:
        return number in self.once or number in self.each[index]

    def _make(self, number: int, index: int) -> None:
        """Add one value whose copied operands may still be missing."""
        whole, parts = self.whole, self.whole.parts
        program = parts.program
        if number < len(program.inputs):
            self._input(number, index)
        elif number < program.first_node:
            self.once[number] = self.writer.add(program.constants[number - len(program.inputs)])
        elif number in whole.stage_of and whole.stage_of[number] != self.stage:
            flow: Flow = "forward" if whole.stage_of[number] < self.stage else "backward"
            self.each[index][number] = self._receive(flow, number, index)
        else:
            node = numbered(parts, parts.node(number), index)
            args = moved(node.args, lambda ref: self._value(ref, index))
            values = self.each[index] if parts.varying[number] else self.once
            values[number] = self.writer.node(node.op, args, node.type, node.source)

    def _input(self, number: int, index: int) -> None:
        whole, item = self.whole, self.whole.parts.program.inputs[number]
        if item.role == "batch":
            count = whole.places.micro_batches
            whole_number = -1 - number  # the rows of all micro-batches have no number of their own
            if whole_number not in self.once:
                shape = (item.shape[0] * count, *item.shape[1:])
                self.once[whole_number] = self.writer.add(Input(item.name, "batch", item.dtype, shape, None))
            rows = whole.parts.rows
            self.each[index][number] = micro_batch_of(self.writer, self.once[whole_number], index, rows)
        elif number in whole.home and whole.home[number] != self.stage:
            self.once[number] = self._receive("forward", number, 0)
        else:
            self.once[number] = self.writer.add(item)
            if item.role in STATE_ROLES:
                self.updates[item.name] = self.once[number]  # until the update gives it another value

    # --- what crosses ------------------------------------------------------------------------------------------
    def _again(self, handle: Handle) -> Handle:
        """A node of its own for a value that is sent as it came: senders look at nodes."""
        kind = self.writer.type_of(handle)
        return self.writer.node("reshape.default", (Ref(handle), Items(kind.shape)), kind)

    def _send(self, flow: Literal["forward", "backward", "sync"], index: int, place: int, handle: Handle) -> None:
        self.sends.append((Crossing(flow, self.replica, index, place, 0), handle))

    def _receive(self, flow: Flow, number: int, index: int) -> Handle:
        """The input that a value of a neighbour is."""
        whole = self.whole
        crossing = whole.ahead[self.stage - 1] if flow == "forward" else whole.back[self.stage + 1]
        rows = number in whole.stage_of and (number, True) in crossing
        place = crossing.index((number, rows))
        return self._received(flow, self.replica, index, place, whole.parts.program.types[number])

    def _received(self, flow: Flow, replica: int, index: int, place: int, kind: TensorType) -> Handle:
        assert flow != "outer"
        crossing = Crossing(flow, replica, index, place, 0)
        name = received_name(crossing)
        handle = self.writer.add(Input(name, "batch", kind.dtype, kind.shape, None))  # type: ignore[arg-type]
        self.receives.append((crossing, handle))
        return handle

    # --- the update --------------------------------------------------------------------------------------------
    def _update(self, means: dict[int, Handle]) -> None:
        whole, parts = self.whole, self.whole.parts
        last = whole.places.micro_batches - 1
        if self.stage + 1 < whole.stages:
            for place, (number, rows) in enumerate(whole.back[self.stage + 1]):
                if not rows:
                    kind = parts.program.types[number]
                    means[number] = self._received("backward", self.replica, last, place, kind)
        for place, (number, rows) in enumerate(whole.back[self.stage]):
            if not rows:
                self._send("backward", last, place, self._again(means[number]))
        own = [number for number in parts.gradients if whole.owner[number] == self.stage]
        values = {number: means[number] for number in own}
        if whole.sync == "step" and whole.replicas > 1:
            values = self._averaged(values)
        new = parts.new_state
        waiting = [number for number, home in whole.home.items() if home == self.stage]
        if self.stage == 0:
            waiting += self._homeless()
        updated: set[int] = set()
        needed: set[int] = set()
        while waiting:
            number = waiting.pop()
            if number in updated:
                continue
            updated.add(number)
            self._value(number, 0)
            cone = parts.cone(new[parts.program.inputs[number].name])
            needed.update(cone)
            waiting += sorted(ref for node in cone for ref in parts.node(node).refs() if self._moves(ref))
        for number in sorted(needed):
            node = parts.node(number)
            args = moved(node.args, lambda ref: values[ref] if ref in values else self._value(ref, 0))
            values[number] = self.writer.node(node.op, args, node.type, node.source)
        for number in updated:
            name = parts.program.inputs[number].name
            self.updates[name] = values[new[name]] if new[name] in values else self._value(new[name], 0)

    def _averaged(self, own: dict[int, Handle]) -> dict[int, Handle]:
        """The gradients averaged over the replicas: added in the order of replicas, on every one of them.

        Of its own a replica adds up the value that it sends, which is what the others decode (worker/link_codecs.py).
        """
        whole = self.whole
        # What is sent is what this replica adds too: a codec may have changed it, for all of them alike.
        sent = {number: self._again(handle) for number, handle in own.items()}
        for place, handle in enumerate(sent.values()):
            self._send("sync", 0, place, handle)
        found = {}
        for place, (number, handle) in enumerate(sent.items()):
            kind = self.writer.type_of(handle)
            total: Handle | None = None
            for replica in range(whole.replicas):
                there = handle if replica == self.replica else self._received("sync", replica, 0, place, kind)
                total = there if total is None else added(self.writer, total, there)
            assert total is not None
            found[number] = mean(self.writer, total, whole.replicas)
        return found

    def _moves(self, ref: int) -> bool:
        """Whether it is optimizer state that the update changes."""
        inputs = self.whole.parts.program.inputs
        return ref < len(inputs) and inputs[ref].role in ("parameter", "optimizer")

    def _homeless(self) -> list[int]:
        """State that no stage reads: the first keeps it as it is."""
        whole, parts = self.whole, self.whole.parts
        read = {ref for number in parts.other_nodes for ref in parts.node(number).refs()}
        for number in whole.home:
            read.add(number)
            for node in parts.cone(parts.new_state[parts.program.inputs[number].name]):
                read.update(parts.node(node).refs())
        inputs = enumerate(parts.program.inputs)
        return [number for number, item in inputs if item.role in STATE_ROLES and number not in read]

    # --- state of its own --------------------------------------------------------------------------------------
    def _add_state(self) -> None:
        """What a segment needs to know of the ones before it, beside the weights. See docs/decisions/0023."""
        whole, stage = self.whole, self.stage
        inner = (stage > 0) + (stage + 1 < whole.stages)
        links = inner + (whole.replicas - 1 if whole.sync != "none" else 0)
        if links:
            for name in (SENT, RECEIVED):
                self._state(name, "uint8", (links, 32))
            self._state(TAPE, "uint8", (32,))
        if whole.sync == "local":
            for number, home in whole.home.items():
                if home == stage:
                    item = whole.parts.program.inputs[number]
                    for prefix in (OUTER_PREFIX, RESIDUAL_PREFIX):
                        self._state(prefix + item.name, "float32", item.shape)
        if whole.kept_rows:
            sides = [("send", stage)] if stage + 1 < whole.stages else []
            sides += [("recv", stage - 1)] if stage else []
            for side, border in sides:
                if whole.kept_borders is not None and border not in whole.kept_borders:
                    continue
                for index, (number, rows) in enumerate(whole.ahead[border]):
                    shape = whole.example_of(number) if rows else None
                    if shape is not None:
                        end = f"{side}.forward.{index}"
                        self._state(KEPT_PREFIX + end, "float32", (whole.kept_rows, *shape))
                        self._state(SEEN_PREFIX + end, "uint8", (whole.kept_rows,))

    def _state(self, name: str, dtype: Literal["float32", "uint8"], shape: tuple[int, ...]) -> None:
        self.updates[name] = self.writer.add(Input(name, "buffer", dtype, shape, Init.of("constant", 0.0)))
