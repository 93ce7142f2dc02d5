"""A player's machine with torch: answers to the questions of a dispute from a segment's base. DESIGN §7.

The trace of a step is streamed: each node's result is hashed when it is made, its root is kept, and the tensor goes as
in any other step; to show a tensor the step runs once more, up to the last value asked for. So a dispute takes the
memory of training, and no disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from protocol import merkle, safetensors
from protocol.codec import encode
from protocol.dispute_claim import StubbornTracer
from protocol.dispute_evidence import evidence
from protocol.dispute_facts import Facts
from protocol.dispute_following import Apart
from protocol.dispute_player import Tracer, answer, decode_question
from protocol.dispute_wire import ShowDistance, ShowState, ShowStates, ShowTrace
from protocol.errors import LocalProtocolError, MalformedRecord, VerificationFailed
from protocol.profile import Gauge, distance, put_back
from protocol.program import Program, state_layout
from protocol.task import TaskSpec
from worker import checkpoint
from worker.dissent import follow
from worker.executor import Executor
from worker.training import (
    Batches,
    Data,
    arithmetic_of,
    check_task,
    initial_state,
    put_back_gauges,
    rate_of,
)

__all__ = ["TorchTracer", "inspect"]

State = Mapping[str, Tensor]


class _Enough(Exception):  # no error: the values asked for are here, and the rest of the step is not needed
    """Ends a step early."""


class TorchTracer(Tracer):
    """Runs the steps of a segment in the task's arithmetic. state: the one before `step`, numbered within the segment.

    In tolerant mode these are the bits of this machine and no other: the same ones each time, for a solver has to show
    the run that it handed in. gauges: of a tolerant task, put back after the last step. Keeps two states, the one it
    was made with and the one before the step asked for last, and 32 bytes for each step and each node. Raises
    MalformedRecord for a task, program or data that do not fit each other.
    """

    def __init__(
        self,
        task: TaskSpec,
        program: Program,
        segment: int,
        *,
        arrays: Mapping[str, Data],
        state: State,
        step: int = 0,
        threads: int = 1,
        gauges: Sequence[Gauge] = (),
    ) -> None:
        """Runs nothing yet."""
        self.facts = Facts(task, program, segment, gauges)
        self._gauges = tuple(gauges)
        self._arrays = arrays
        self._batches = Batches(task, program, arrays)
        self._executor = Executor(program, arithmetic_of(task), width=task.width, threads=threads)
        self._first = step
        self._states: dict[int, State] = {step: state}
        self._hashing = checkpoint.Roots()
        self._roots: dict[int, bytes] = {}
        self._traces: dict[int, list[bytes]] = {}
        self._ends: dict[int, list[bytes]] = {}

    def state_before(self, step: int) -> State:
        """The state before `step`. Raises LocalProtocolError if that is before the state this was made with."""
        if step < self._first:
            raise LocalProtocolError(f"the state before step {step} is asked of one that starts at {self._first}")
        known = max(at for at in self._states if at <= step)
        state = self._states[known]
        for at in range(known, step):
            state = self._after(at, state)
        self._states = {self._first: self._states[self._first], step: state}
        return state

    def _after(self, step: int, state: State) -> State:
        if self.facts.puts_back(step):
            new: State = put_back_gauges(self._from_start(), dict(state), self._gauges)
        else:
            new, _ = self._run(step, state)
        if step not in self._roots:
            self._roots[step] = self._hashing.of(new)
        return new

    def _from_start(self) -> dict[str, Tensor]:
        """The state that the segment starts from. Raises LocalProtocolError if this starts within the segment."""
        if self._first:
            raise LocalProtocolError(
                f"what the whole segment says is asked of a state before step {self._first}",
                next_step="give the checkpoint that the segment starts from",
            )
        return dict(self._states[0])

    def _run(self, step: int, state: State, on_node: Any = None) -> tuple[State, float]:
        facts, number = self.facts, self.facts.number_of(step)
        rate, seed = rate_of(facts.task, number), facts.task.seed
        return self._executor.step(state, self._batches.of(number), rate, seed, number, on_node=on_node)

    def step_roots(self) -> Sequence[bytes]:
        """See Tracer. Raises LocalProtocolError if this starts within the segment."""
        self._from_start()
        missing = next((at for at in range(self.facts.ends) if at not in self._roots), None)
        if missing is not None:
            known = max(at for at in self._states if at <= missing)
            state = self._states[known]
            for at in range(known, self.facts.ends):
                state = self._after(at, state)
        return [self._roots[at] for at in range(self.facts.ends)]

    def state_roots(self, step: int) -> Sequence[bytes]:
        """See Tracer."""
        if step not in self._ends:
            state = self.state_before(step + 1) if step < self._first else self._after(step, self.state_before(step))
            self._ends[step] = [_root(state[name]) for name in self.facts.names]
        return self._ends[step]

    def trace_roots(self, step: int) -> Sequence[bytes]:
        """See Tracer."""
        if step not in self._traces:
            batch = self._batches.of(self.facts.number_of(step))
            roots = [_root(batch[item.name]) for item in self.facts.program.inputs_of("batch")]
            self._run(step, self.state_before(step), lambda number, result: roots.append(_root(result)))
            self._traces[step] = roots
        return self._traces[step]

    def tensors(self, step: int, values: Collection[int]) -> Mapping[int, NDArray[Any]]:
        """See Tracer."""
        program, state = self.facts.program, self.state_before(step)
        found: dict[int, NDArray[Any]] = {}
        inputs = {value: item for value in values if (item := self.facts.input(value)) is not None}
        of_batch = any(item.role == "batch" for item in inputs.values())
        batch = self._batches.of(self.facts.number_of(step)) if of_batch else {}
        for value, item in inputs.items():
            found[value] = _numpy((batch if item.role == "batch" else state)[item.name])
        wanted = {value - program.first_node: value for value in values if value >= program.first_node}
        if wanted:
            last = max(wanted)

            def keep(number: int, result: Tensor) -> None:
                if number in wanted:
                    found[wanted[number]] = _numpy(result)
                if number == last:
                    raise _Enough

            with contextlib.suppress(_Enough):
                self._run(step, state, keep)
        return found

    def data(self, name: str) -> bytes | memoryview:
        """See Tracer."""
        return self._arrays[name]


def _numpy(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().contiguous().numpy()
    return array


def _root(tensor: Tensor) -> bytes:
    return merkle.tensor_root(_numpy(tensor))


def _apart(tracer: TorchTracer, step: int, theirs: Mapping[str, NDArray[Any]], gauges: Sequence[Gauge]) -> Apart:
    """How far the solver's state before `step` is from this machine's, both with the gauge parts of the start."""
    own, start = ({name: _numpy(x) for name, x in tracer.state_before(at).items()} for at in (step, 0))
    ends = [end | put_back(start, end, gauges) for end in (own, dict(theirs))]
    found = distance(start, ends[0], ends[1], gauges)
    return Apart(found.l1_ppb, found.l2_ppb)


def inspect(
    question: bytes,
    *,
    task: TaskSpec,
    program: Program,
    arrays: Mapping[str, Data],
    base: Data | None,
    claimed: Data | None,
    threads: int = 1,
    gauges: Sequence[Gauge] = (),
    followed: Sequence[Data] = (),
    dissent: bytes = b"",
) -> tuple[bytes, bytes, bytes | None]:
    """The body of the move, the opening, and the state before the step found, to ask on from; as far as asked for. Of
    evidence (protocol/dispute_evidence.py) the last alone: the file.

    question: of protocol/dispute_player.py. base: the checkpoint that the segment starts from, None if it is the task's
    seed; or, for a question about one step, the state that an earlier answer gave. Which of the two it is follows from
    the root in the question. claimed: a checkpoint that the segment is said to end in: see protocol/dispute_claim.py.
    gauges: of a tolerant task. followed: a solver's files about one step, to look for a dissent in, or to play from
    with the dissent found: the roots of all states, the state before the step, and the trace (or where gauges are put
    back the end). Then base is the segment's, and needed only there. For ShowDistance the state alone.
    Raises MalformedRecord, VerificationFailed, LocalProtocolError for a question, task, program, data or states that do
    not fit each other.
    """
    asked = decode_question(question)
    check_task(task, program)
    layout = state_layout(program)
    if followed and not isinstance(asked.ask, ShowDistance):
        if base is None:
            base = checkpoint.dump(initial_state(task, program, None))
        body, opening = follow(
            asked, question, followed, dissent, task=task, program=program, arrays=arrays, base=base, gauges=gauges,
            threads=threads,
        )  # fmt: skip
        return body, opening, None
    state = initial_state(task, program, None) if base is None else checkpoint.load(base, layout)
    at_start = checkpoint.state_root(state) == asked.in_root
    step = 0 if at_start or isinstance(asked.ask, ShowStates) else asked.ask.step
    if step == 0 and not at_start:
        raise VerificationFailed(
            "the state given is not the one that the segment starts from",
            next_step="give the checkpoint before the segment, or the state that an earlier answer about a step gave",
        )
    tracer = TorchTracer(
        task, program, asked.segment, arrays=arrays, state=state, step=step, threads=threads, gauges=gauges
    )
    player: Tracer = tracer
    if claimed is not None:
        player = StubbornTracer(tracer, safetensors.parse(claimed, layout))
    if isinstance(asked.ask, ShowDistance):
        if len(followed) != 1:
            raise MalformedRecord(f"the distance of {len(followed)} states is asked for, of one at a time it is told")
        theirs = safetensors.parse(followed[0], layout)
        return encode(_apart(tracer, asked.ask.step, theirs, gauges)), b"", None
    if isinstance(asked.ask, ShowStates | ShowState | ShowTrace):
        return b"", b"", evidence(asked.ask, player)
    answered = answer(question, player)
    found = checkpoint.dump(tracer.state_before(asked.ask.step)) if answered.wants_state else None
    return answered.body, answered.opening, found
