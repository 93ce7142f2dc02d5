"""What a challenger of a tolerant segment asks, of whom, until it knows where to dissent or that it cannot. Sans-IO.

The solver is asked for files (protocol/dispute_evidence.py), the challenger's own machine what follows from them: first
how far states are apart, by a binary search for the step that begins near and ends far, then where that step cannot be
honest. Nothing is staked before the end of it, and a solver that shows nothing is judged by a quorum of distances as if
nobody had asked: so no clock is needed here, and nobody's word about what it could not get.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from protocol import params
from protocol.dispute_facts import Facts
from protocol.dispute_following import Apart, Dissented
from protocol.dispute_wire import ShowDissent, ShowDistance, ShowState, ShowStates, ShowTrace
from protocol.errors import LocalProtocolError
from protocol.profile import Distance, Tolerance, finding

__all__ = ["File", "Own", "Pursuit"]

File: TypeAlias = "ShowStates | ShowState | ShowTrace"


@dataclass(frozen=True)
class Own:
    """A question to the challenger's own machine, and the solver's files that it is answered from, in order."""

    ask: ShowDistance | ShowDissent
    files: tuple[File, ...]


class Pursuit:
    """Ask it what to ask next; tell it what came of it. `found` once there is a dissent, `over` at the end of it all.

    Between a state that is near and a later one that is far there is a step that begins near and ends far. A step that
    shows nothing is passed, and the search goes on to its right: in at most PURSUITS_MAX steps.
    """

    def __init__(self, facts: Facts, tolerance: Tolerance) -> None:
        """The segment begins near, for both begin at one state, and ends far: a verdict says so."""
        self._facts, self._tolerance = facts, tolerance
        self._near, self._far, self._tries = 0, facts.ends, 0
        self._here: set[File] = set()
        self.found: Dissented | None = None

    @property
    def over(self) -> bool:
        """Whether nothing is left to ask."""
        return self.found is not None or self._near >= self._facts.ends or self._tries >= params.PURSUITS_MAX

    @property
    def step(self) -> int | None:
        """The step that is looked into; None while it is searched for, or at the end without one."""
        return self._near if not self.over and self._far - self._near == 1 else None

    def due(self) -> Own | None:
        """The question to the own machine that is next, whether or not its files are here; None if it is over."""
        if self.over:
            return None
        if self.step is None:
            middle = (self._near + self._far) // 2
            return Own(ShowDistance(middle), (ShowState(middle),))
        after: File = ShowState(self._facts.ends) if self._facts.puts_back(self.step) else ShowTrace(self.step)
        return Own(ShowDissent(self.step), (ShowStates(), ShowState(self.step), after))

    def wants(self) -> File | None:
        """The next file that the solver has to show; None if all that is due are here."""
        due = self.due()
        return next((file for file in due.files if file not in self._here), None) if due is not None else None

    def shown(self, file: File) -> None:
        """A file is here, under the roots that are known."""
        self._here.add(file)

    def apart(self, told: Apart) -> None:
        """How far the solver's state is. Raises LocalProtocolError if that was not asked."""
        due = self.due()
        if due is None or not isinstance(due.ask, ShowDistance):
            raise LocalProtocolError("a distance that was not asked for")
        far = finding(Distance(told.l1_ppb, told.l2_ppb, ""), self._tolerance) != "right"
        self._near, self._far = (self._near, due.ask.step) if far else (due.ask.step, self._far)

    def dissented(self, told: Dissented) -> None:
        """What the step shows. Raises LocalProtocolError if that was not asked."""
        if self.step is None:
            raise LocalProtocolError("a dissent that was not asked for")
        if told.dissent is not None:
            self.found = told
            return
        self._tries += 1
        self._near, self._far = self._far, self._facts.ends
