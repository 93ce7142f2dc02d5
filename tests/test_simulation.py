"""Five peers under drawn faults: whatever is lost, doubled, late or killed, the job ends and the money adds up."""

from __future__ import annotations

import pytest

from peer.simulator import SECOND, Faults, Simulation
from tests.swarm_scenario import job_state, make_swarm, over, rest, submit

SEEDS = 80
CALM = Faults(until_ns=0)


def finish(simulation: Simulation, job: str, *, seconds: int = 900) -> dict[str, object]:
    """Run until the job ended, then until everything is at rest."""
    simulation.run(seconds=seconds, until=over(simulation, job))
    state = job_state(simulation, job)
    rest(simulation, seconds=240)
    simulation.check_quiet()
    return state


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_seed_breaks_the_swarm(seed: int) -> None:
    cheat = "skip-step" if seed % 3 == 0 else ""
    simulation = make_swarm(seed, Faults.drawn_from(seed), cheat=cheat)
    simulation.run(seconds=3)
    while simulation.peers["alice"].node is None:
        simulation.run(seconds=3)
    job = submit(simulation)
    state = finish(simulation, job)
    assert state["state"] == "done", f"seed {seed}: {state['state']} {state['reason']}"
    assert state["segments_done"] == 6


def test_an_honest_job_is_paid_and_checked_and_nobody_is_slashed() -> None:
    simulation = make_swarm(1, CALM)
    simulation.run(seconds=3)
    state = finish(simulation, submit(simulation))
    assert (state["state"], state["slashed_micro"], state["retried"]) == ("done", 0, 0)
    assert state["paid_micro"] == 60_000  # 60 Gop at bob's 1000, the cheaper of two


def test_a_job_goes_to_the_dearer_solver_if_the_cheaper_ones_sandbox_is_too_weak() -> None:
    simulation = make_swarm(1, CALM, bobs_sandbox=3)
    simulation.run(seconds=3)
    job = submit(simulation, sandbox=4)
    simulation.run(seconds=3, until=lambda: bool(simulation.command("bob", "book", {}).result["offers"]))
    bob, heard = (simulation.command(name, "book", {}).result for name in ("bob", "alice"))
    (offer,) = bob["offers"]
    assert offer["no_bid"] == {
        "code": "sandbox", "why": "needs sandbox level CONTAINED, this machine has NAMESPACED",
    }  # fmt: skip
    assert sorted(ask["sandbox"] for ask in heard["asks"] if ask["roles"] & 1) == [3, 4], "asks carry the level"
    state = finish(simulation, job)
    assert (state["state"], state["paid_micro"]) == ("done", 66_000), "60 Gop at carol's 1100"


def test_a_cheat_is_slashed_paid_nothing_and_the_honest_solver_finishes() -> None:
    simulation = make_swarm(2, CALM, cheat="skip-step")
    simulation.run(seconds=3)
    state = finish(simulation, submit(simulation))
    # Three times the price is locked by a solver without a history.
    assert (state["state"], state["slashed_micro"], state["retried"]) == ("done", 360_000, 1)
    assert state["paid_micro"] == 66_000
    honest = make_swarm(3, CALM)
    honest.run(seconds=3)
    assert finish(honest, submit(honest))["final_root"] == state["final_root"]


def test_a_killed_solver_is_paid_for_what_it_did_and_another_finishes_from_there() -> None:
    simulation = make_swarm(4, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=60, until=lambda: job_state(simulation, job).get("segments_done") == 3)
    simulation.crash("bob", for_ns=0)
    state = finish(simulation, job)
    assert (state["state"], state["retried"], state["slashed_micro"]) == ("done", 1, 0)
    deals = state["deals"]
    assert isinstance(deals, list)
    assert [deal["paid_micro"] for deal in deals] == [30_000, 33_000]


def test_a_cancelled_job_pays_its_receipts_and_returns_the_rest() -> None:
    simulation = make_swarm(5, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=60, until=lambda: job_state(simulation, job).get("segments_done") == 2)
    simulation.command("alice", "cancel", {"job": job})
    rest(simulation, seconds=240)
    simulation.check_quiet()
    state = job_state(simulation, job)
    assert state["state"] == "cancelled"
    assert state["paid_micro"] == 20_000


def checkers_away(seed: int, cheat: str = "") -> tuple[Simulation, str]:
    """A proved deal that nobody can check: its solver claims alone and is paid after the window."""
    simulation = make_swarm(seed, CALM, cheat=cheat)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=60, until=lambda: job_state(simulation, job).get("segments_done") == 5)
    for name in ("victor", "wendy"):
        simulation.crash(name, for_ns=400 * SECOND)
    rest(simulation, seconds=380)
    node = simulation.peers["alice"].node
    assert node is not None
    assert [channel.closed for channel in node.settler.channels.values()] == ["claimed"]
    return simulation, job


def test_work_paid_before_it_was_checked_is_checked_later_and_not_paid_twice() -> None:
    simulation, job = checkers_away(6)
    state = finish(simulation, job)
    assert (state["state"], state["retried"], state["paid_micro"]) == ("done", 0, 60_000)


def test_wrong_work_paid_before_it_was_checked_is_not_built_upon() -> None:
    simulation, job = checkers_away(7, cheat="skip-step")
    state = finish(simulation, job)
    assert (state["state"], state["retried"]) == ("done", 1)
    assert state["paid_micro"] == 60_000 + 66_000  # the claim stands: the checkers came after the window
    honest = make_swarm(3, CALM)
    honest.run(seconds=3)
    assert finish(honest, submit(honest))["final_root"] == state["final_root"]


def test_one_seed_gives_one_history() -> None:
    first, second = (make_swarm(12, Faults(loss=0.1, duplication=0.3, crash=0.0)) for _ in range(2))
    for simulation in (first, second):
        simulation.run(seconds=3)
        submit(simulation)
        simulation.run(seconds=60)
    assert first.log == second.log
