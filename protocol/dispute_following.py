"""The challenger's player in tolerant mode: the solver's own run, but for one place where no honest machine follows it.

It answers with the solver's hashes up to the disputed value and puts there what its own machine makes of the solver's
operands. So the game (protocol/dispute.py) descends to that element, all before it is agreed, and the referee has only
to say whether an honest machine may have the solver's (protocol/bounds.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from protocol import merkle
from protocol.codec import Digest, Uint
from protocol.dispute_evidence import Followed
from protocol.dispute_facts import Facts
from protocol.dispute_player import Tracer
from protocol.errors import LocalProtocolError
from protocol.profile import UNBOUNDED

__all__ = ["Apart", "Dissent", "Dissented", "FollowingTracer", "read_element"]


class Dissent(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ichiba/dissent/1"):
    """Where a solver's step cannot be honest. value: a batch input or a node; or a state input, whose tensor after the
    step is not what the trace or the state before says, and where gauges are put back one element of it.

    element, own: which one, and what the challenger has there, as protocol.reference holds it: bits of a float.
    """

    step: Uint
    value: Uint
    element: Uint
    own: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Apart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ichiba/apart/1"):
    """How far a solver's state is from the challenger's own (protocol/profile.py), with the gauge parts put back."""

    l1_ppb: Annotated[int, msgspec.Meta(ge=0, le=UNBOUNDED)]
    l2_ppb: Annotated[int, msgspec.Meta(ge=0, le=UNBOUNDED)]


class Dissented(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="ichiba/dissented/1"):
    """The end of a search in one step: nothing, or a dissent, the root of the end that who dissents stands by, and what
    the solver is bound to: `Pledge` of protocol/dispute_terms.py."""

    dissent: Dissent | None
    found_root: Digest
    steps: Digest
    trace: Digest


def read_element(array: NDArray[Any], element: int) -> int:
    """One element, as protocol.reference holds it: bits of a float32, every NaN as the canonical one; else a value."""
    one = np.ascontiguousarray(array).reshape(-1)[element : element + 1]
    if array.dtype == np.float32:
        return 0x7FC00000 if bool(np.isnan(one[0])) else int(one.view(np.uint32)[0])
    return int(one[0])


def _with_element(array: NDArray[Any], element: int, own: int) -> NDArray[Any]:
    changed = array.copy()
    flat = changed.reshape(-1)
    if array.dtype == np.float32:
        flat.view(np.uint32)[element] = own
    else:
        flat[element] = own
    return changed


class FollowingTracer(Tracer):
    """See the module. Computes nothing: it hashes what the solver showed."""

    def __init__(
        self, facts: Facts, followed: Followed, dissent: Dissent, arrays: Mapping[str, bytes | memoryview] | None = None
    ) -> None:
        """arrays: the task's data, to open a disputed batch input with.

        Raises LocalProtocolError for a dissent that is no place of the step, or does not differ from the solver.
        """
        self.facts, self._followed, self._dissent = facts, followed, dissent
        self._arrays = dict(arrays or {})
        self._instead: dict[int, NDArray[Any]] = {}
        self._ends = list(followed.ends)
        self._end: dict[str, NDArray[Any]] = dict(followed.end)
        if dissent.step != followed.step or dissent.value >= len(facts.program.types):
            raise LocalProtocolError(f"no value {dissent.value} of step {dissent.step} is followed")
        place = facts.state_index(dissent.value)
        if place is not None:
            self._differ_in_state(place)
        elif facts.trace_leaf(dissent.value) is None or not followed.trace:
            raise LocalProtocolError(f"value {dissent.value} is computed by everybody, or has no trace here")
        else:
            self._differ_in_trace()
        if tuple(self._ends) == followed.ends:
            raise LocalProtocolError("the dissent is no other than the solver's own value")
        self._root = merkle.state_root_of(dict(zip(facts.names, self._ends, strict=True)))

    def _differ_in_state(self, place: int) -> None:
        facts, followed, dissent = self.facts, self._followed, self._dissent
        name = facts.names[place]
        if facts.puts_back(dissent.step):
            self._end[name] = _with_element(self._end[name], dissent.element, dissent.own)
            self._ends[place] = merkle.tensor_root(self._end[name])
            return
        made = facts.program.updates[place].value
        known = facts.computed_root(made, dissent.step)
        handed_on = facts.state_index(made)
        if known is None and handed_on is not None:
            known = merkle.tensor_root(followed.before[facts.names[handed_on]])
        self._ends[place] = known if known is not None else merkle.tensor_root(followed.trace[made])

    def _differ_in_trace(self) -> None:
        """The disputed element, and a state that hides it: the one that is made last, or the value itself."""
        facts, dissent = self.facts, self._dissent
        self._instead[dissent.value] = _with_element(self._followed.trace[dissent.value], dissent.element, dissent.own)
        leaves = {update.value: facts.trace_leaf(update.value) for update in facts.program.updates}
        made = {value: leaf for value, leaf in leaves.items() if leaf is not None}
        latest = dissent.value if dissent.value in made else max(made, key=made.__getitem__, default=-1)
        if made.get(latest, -1) < (facts.trace_leaf(dissent.value) or 0):
            raise LocalProtocolError(f"value {dissent.value} reaches no state")
        if latest not in self._instead:
            old = self._followed.trace[latest]
            other = not old.reshape(-1)[0] if old.dtype == bool else read_element(old, 0) ^ 1
            self._instead[latest] = _with_element(old, 0, int(other))
        root = merkle.tensor_root(self._instead[latest])
        for place, update in enumerate(facts.program.updates):
            if update.value == latest:
                self._ends[place] = root

    @property
    def found_root(self) -> bytes:
        """The root of the segment's end that the challenger stands by."""
        return self._root

    def step_roots(self) -> Sequence[bytes]:
        """See Tracer: the solver's up to the step, then one that is not the solver's."""
        step = self._followed.step
        return [*self._followed.states[:step], *[self._root] * (self.facts.ends - step)]

    def state_roots(self, step: int) -> Sequence[bytes]:
        """See Tracer. Of the states that were shown."""
        if step == self._followed.step:
            return self._ends
        held = self._state(step + 1)
        return [merkle.tensor_root(held[name]) for name in self.facts.names]

    def _state(self, step: int) -> Mapping[str, NDArray[Any]]:
        """The state before `step`."""
        followed = self._followed
        if step == followed.step:
            return followed.before
        if self.facts.puts_back(followed.step) and step in (0, followed.step + 1):
            return self._end if step else followed.base
        raise LocalProtocolError(f"the state before step {step} was not shown")

    def trace_roots(self, step: int) -> Sequence[bytes]:
        """See Tracer."""
        self._followed_only(step)
        leaves = (self.facts.trace_value(leaf) for leaf in range(self.facts.leaves("trace", 0)))
        return [merkle.tensor_root(self._value(value)) for value in leaves]

    def tensors(self, step: int, values: Collection[int]) -> Mapping[int, NDArray[Any]]:
        """See Tracer."""
        found = {}
        for value in values:
            item = self.facts.input(value)
            if self.facts.state_index(value) is not None:
                assert item is not None, "state has a name"
                found[value] = self._state(step)[item.name]
            else:
                self._followed_only(step)
                found[value] = self._value(value)
        return found

    def _value(self, value: int) -> NDArray[Any]:
        return self._instead[value] if value in self._instead else self._followed.trace[value]

    def _followed_only(self, step: int) -> None:
        if step != self._followed.step or not self._followed.trace:
            raise LocalProtocolError(f"the trace of step {step} was not shown")

    def data(self, name: str) -> bytes | memoryview:
        """See Tracer."""
        return self._arrays[name]
