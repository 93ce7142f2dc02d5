"""The time a peer goes by, whatever is done to the clock of its machine: sans-IO, from two readings of the world.

Two times, in nanoseconds since the epoch. Node time (`now_ns`) is of everything that is this peer's own: deadlines,
windows, sequence numbers. It runs with a steady clock and never backwards, not across a restart either, so a jump ends
no window early and repeats no number. Wall time (`wall_ns`) is what records are dated by and what the dates of others
are compared with, for their clocks know nothing of our jump: it follows the machine's clock, a jump of it as soon as
that has lasted `params.CLOCK_DOUBT_NS`. Node time closes in on wall time by `params.CLOCK_SLEW_PERMILLE`.

The steady clock must go on while the machine sleeps (CLOCK_BOOTTIME): then waking up is no jump. A paused virtual
machine sees neither, so its pause is told as a jump forwards, and its windows end late by the pause: later than for
others, never earlier.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol import params

__all__ = ["Clock", "Reading"]


@dataclass(frozen=True)
class Reading:
    """What time it is. jumped_ns: by how much wall time was set anew at this reading, 0 if it was not."""

    now_ns: int
    wall_ns: int
    jumped_ns: int = 0

    def words(self) -> str:
        """The jump, for people."""
        off_s = (self.now_ns - self.wall_ns) / 1e9
        return (
            f"the clock jumped by {self.jumped_ns / 1e9:+,.0f} s: records are dated by the new time from now on,"
            f" deadlines go on as before, {abs(off_s):,.0f} s {'ahead of' if off_s > 0 else 'behind'} it"
        )


class Clock:
    """See the module docstring."""

    def __init__(self, *, wall_ns: int, steady_ns: int, last_ns: int = 0) -> None:
        """last_ns: the node time of the last commit of this peer's earlier life, 0 if there was none. A machine's clock
        that is behind it was set back meanwhile; one ahead is believed, for how long we were away nobody knows."""
        self._steady_ns, self._wall_ns = steady_ns, wall_ns
        self._now_ns = max(wall_ns, last_ns + 1 if last_ns else 0)
        behind_ns = wall_ns - self._now_ns
        self._untold_ns = behind_ns if -behind_ns > params.CLOCK_STEP_NS else 0
        self._doubt: tuple[int, int] | None = None  # a jump that may be one: its size, and since when (steady)

    @property
    def now_ns(self) -> int:
        """Node time at the last reading."""
        return self._now_ns

    def read(self, *, wall_ns: int, steady_ns: int) -> Reading:
        """The time at a moment when the machine's two clocks say this."""
        passed_ns = max(0, steady_ns - self._steady_ns)
        self._steady_ns += passed_ns
        self._wall_ns += passed_ns
        jumped_ns = self._follow(wall_ns) or self._untold_ns
        self._untold_ns = 0
        ahead_ns = self._now_ns + passed_ns - self._wall_ns
        most_ns = passed_ns * params.CLOCK_SLEW_PERMILLE // 1000
        self._now_ns += passed_ns - max(-most_ns, min(most_ns, ahead_ns))
        return Reading(self._now_ns, self._wall_ns, jumped_ns)

    def _follow(self, wall_ns: int) -> int:
        """Bring wall time to what the machine's clock says, unless that is a jump nobody can believe yet. Returns by
        how much it jumped, 0 for a step that any clock makes when it is corrected."""
        off_ns = wall_ns - self._wall_ns
        if abs(off_ns) <= params.CLOCK_STEP_NS:
            self._wall_ns, self._doubt = wall_ns, None
            return 0
        if self._doubt is None or abs(off_ns - self._doubt[0]) > params.CLOCK_STEP_NS:
            self._doubt = off_ns, self._steady_ns
        if self._steady_ns - self._doubt[1] < params.CLOCK_DOUBT_NS:
            return 0
        self._wall_ns, self._doubt = wall_ns, None
        return off_ns
