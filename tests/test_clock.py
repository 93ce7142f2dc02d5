"""A machine's clock that jumps: node time runs on and never back, wall time follows what lasts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.clock import Clock, Reading
from protocol import params

SECOND, DAY = 10**9, 86_400 * 10**9
START_NS = 1_700_000_000 * SECOND


@dataclass
class Machine:
    """The true time, and what is wrong with the machine's clock. `asleep_ns` passes for the steady clock too."""

    true_ns: int = START_NS
    off_ns: int = 0

    def clock(self, last_ns: int = 0) -> Clock:
        return Clock(wall_ns=self.true_ns + self.off_ns, steady_ns=self.true_ns - START_NS, last_ns=last_ns)

    def read(self, clock: Clock, after_ns: int = 0) -> Reading:
        self.true_ns += after_ns
        return clock.read(wall_ns=self.true_ns + self.off_ns, steady_ns=self.true_ns - START_NS)

    def run(self, clock: Clock, seconds: int) -> list[Reading]:
        """Readings for a while, ten a second, as the ticks of a daemon."""
        return [self.read(clock, SECOND // 10) for _ in range(10 * seconds)]


def jumps(readings: list[Reading]) -> list[int]:
    return [one.jumped_ns for one in readings if one.jumped_ns]


def test_a_clock_that_is_right_is_followed_to_the_nanosecond() -> None:
    machine = Machine()
    readings = machine.run(clock := machine.clock(), 60)
    assert jumps(readings) == []
    assert machine.read(clock) == Reading(machine.true_ns, machine.true_ns)


@pytest.mark.parametrize("jump_ns", [DAY, -DAY, 6 * SECOND, -400 * DAY])
def test_a_jump_is_told_once_moves_the_dates_and_no_deadline(jump_ns: int) -> None:
    machine = Machine()
    clock = machine.clock()
    machine.run(clock, 5)
    machine.off_ns = jump_ns
    readings = machine.run(clock, 60)
    assert jumps(readings) == [jump_ns]
    assert readings[-1].wall_ns == machine.true_ns + jump_ns
    drift_ns = 60 * SECOND * params.CLOCK_SLEW_PERMILLE // 1000
    assert abs(readings[-1].now_ns - machine.true_ns) <= drift_ns
    told = next(one for one in readings if one.jumped_ns).words()
    assert f"the clock jumped by {jump_ns // SECOND:+,} s" in told
    assert ("behind it" if jump_ns > 0 else "ahead of it") in told


def test_a_jump_that_is_taken_back_at_once_changes_nothing() -> None:
    machine = Machine()
    clock = machine.clock()
    machine.off_ns = DAY
    readings = machine.run(clock, params.CLOCK_DOUBT_NS // SECOND - 1)
    machine.off_ns = 0
    readings += machine.run(clock, 60)
    assert jumps(readings) == []
    assert all(abs(one.wall_ns - one.now_ns) < SECOND for one in readings)


def test_a_day_ahead_and_back_leaves_no_trace_but_two_events() -> None:
    machine = Machine()
    clock = machine.clock()
    machine.off_ns = DAY
    readings = machine.run(clock, 3600)
    machine.off_ns = 0
    readings += machine.run(clock, 4000)
    assert jumps(readings) == [DAY, -DAY]
    assert abs(machine.read(clock).now_ns - machine.true_ns) <= SECOND


def test_waking_up_is_no_jump_and_the_time_slept_has_passed() -> None:
    machine = Machine()
    clock = machine.clock()
    machine.run(clock, 5)
    reading = machine.read(clock, 8 * 3600 * SECOND)
    assert reading == Reading(machine.true_ns, machine.true_ns)


def test_a_pause_that_no_clock_of_the_machine_saw_ends_windows_late_and_never_early() -> None:
    machine = Machine()
    clock = machine.clock()
    machine.off_ns = 8 * 3600 * SECOND  # the steady clock stood as well; then the time was set right
    readings = machine.run(clock, 20)
    assert jumps(readings) == [8 * 3600 * SECOND]
    assert readings[-1].wall_ns == machine.true_ns + machine.off_ns
    assert readings[-1].now_ns <= machine.true_ns + SECOND


@pytest.mark.parametrize("away_ns", [0, SECOND, DAY])
@pytest.mark.parametrize("back_ns", [0, SECOND, DAY])
def test_a_restart_with_the_clock_set_back_goes_on_above_what_was_committed(away_ns: int, back_ns: int) -> None:
    machine = Machine()
    last = machine.run(machine.clock(), 10)[-1]
    machine.true_ns += away_ns
    machine.off_ns = -back_ns
    clock = machine.clock(last.now_ns)
    first = machine.read(clock)
    assert first.now_ns > last.now_ns
    assert first.wall_ns == machine.true_ns - back_ns, "what others see is the machine's clock"
    set_back_ns = back_ns - away_ns
    assert jumps([first]) == ([-set_back_ns - 1] if set_back_ns > params.CLOCK_STEP_NS else [])
    assert jumps([machine.read(clock)]) == [], "it is told once"


MOVES = st.lists(
    st.tuples(
        st.one_of(st.just(0), st.integers(-DAY, DAY), st.integers(-20 * SECOND, 20 * SECOND)),  # of the clock
        st.integers(0, 100 * SECOND),  # until the next reading
        st.booleans(),  # a restart
    ),
    max_size=40,
)


@given(moves=MOVES)
def test_whatever_the_clock_does_node_time_grows_with_the_true_time(moves: list[tuple[int, int, bool]]) -> None:
    machine = Machine()
    clock, last = machine.clock(), START_NS
    for moved_ns, passed_ns, restart in moves:
        machine.off_ns += moved_ns
        if restart:
            machine.true_ns += passed_ns
            clock, passed_ns = machine.clock(last), 0
            reading = machine.read(clock)
            assert reading.now_ns == max(last + 1, machine.true_ns + machine.off_ns)
            assert reading.wall_ns == machine.true_ns + machine.off_ns
        else:
            reading = machine.read(clock, passed_ns)
            slack_ns = passed_ns * params.CLOCK_SLEW_PERMILLE // 1000
            assert abs(reading.now_ns - last - passed_ns) <= slack_ns
        assert reading.now_ns >= last
        last = reading.now_ns
    machine.run(clock, 25)
    assert machine.read(clock).wall_ns == machine.true_ns + machine.off_ns, "what lasts is followed"


@given(steps_ms=st.lists(st.integers(-4_000, 4_000), max_size=30))
def test_small_steps_are_followed_at_once_and_never_told(steps_ms: list[int]) -> None:
    machine = Machine()
    clock = machine.clock()
    for step_ms in steps_ms:
        machine.off_ns += step_ms * 10**6
        reading = machine.read(clock, 10 * SECOND)
        assert reading.wall_ns == machine.true_ns + machine.off_ns
        assert reading.jumped_ns == 0
