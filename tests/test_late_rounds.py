"""A large round is played in a thread: it decides as one that is not, and what changed meanwhile is not proposed on."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from market.audit import check_match, read_match
from market.rounds import Candidate, Played, Round
from peer.effects import Performer
from peer.simulator import SECOND, Faults, Simulation
from protocol import params
from tests.swarm_scenario import job_state, make_swarm, submit
from tests.test_simulation import finish

CALM = Faults(until_ns=0)


@pytest.fixture(autouse=True)
def every_round_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "ROUND_THREAD_MIN", 0)


def matches_of(simulation: Simulation, job: str) -> list[Any]:
    reply: Any = simulation.command("alice", "matches", {"job": job})
    return [read_match(bytes.fromhex(row["match"])) for row in reply.result["matches"]]


def awaiting(seed: int = 1) -> tuple[Simulation, str]:
    """Alice waits for a round in which bob bids, and carol."""
    simulation = make_swarm(seed, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    alice = simulation.peers["alice"]

    def begun() -> bool:
        assert alice.node is not None
        awaited = alice.node.jobs.awaited
        return awaited is not None and awaited.begun.bids == 2

    simulation.run(seconds=30, until=begun)
    assert begun()
    return simulation, job


def proposed(simulation: Simulation) -> list[str]:
    solvers = [data["solver"] for _, who, kind, data in simulation.log if (who, kind) == ("alice", "matched")]
    return [simulation.by_key[solver].name for solver in solvers]


@pytest.mark.parametrize("seed", range(6))
def test_a_job_is_done_over_rounds_that_come_late_and_each_can_be_made_again(seed: int) -> None:
    simulation = make_swarm(seed, Faults.drawn_from(seed))
    simulation.run(seconds=3)
    while simulation.peers["alice"].node is None:
        simulation.run(seconds=3)
    job = submit(simulation)
    state = finish(simulation, job)
    assert state["state"] == "done", f"seed {seed}: {state['state']} {state['reason']}"
    found = matches_of(simulation, job)
    assert found
    for one in found:
        check_match(one)


def test_the_winner_of_a_late_round_is_asked_if_nothing_changed() -> None:
    simulation, _ = awaiting()
    simulation.run(seconds=1)
    assert proposed(simulation) == ["bob"]


def test_a_job_that_was_cancelled_meanwhile_is_not_proposed() -> None:
    simulation, job = awaiting()
    assert simulation.command("alice", "cancel", {"job": job}).error is None
    simulation.run(seconds=5)
    assert proposed(simulation) == []
    assert job_state(simulation, job)["state"] == "cancelled"


def test_a_solver_that_left_meanwhile_is_not_asked_and_the_next_round_finds_another() -> None:
    simulation, _ = awaiting()
    alice = simulation.peers["alice"].node
    assert alice is not None
    del alice.desk.peers[simulation.peers["bob"].key.public]
    simulation.run(seconds=5)
    assert proposed(simulation) == ["carol"]


def test_a_bid_that_is_gone_meanwhile_is_not_proposed_on() -> None:
    simulation, _ = awaiting()
    alice = simulation.peers["alice"].node
    assert alice is not None
    alice.desk.book.remove_peer(simulation.peers["bob"].key.public)
    simulation.run(seconds=0.2)
    assert proposed(simulation) == []


def test_a_solver_that_is_excluded_meanwhile_is_not_asked() -> None:
    simulation, job = awaiting()
    alice = simulation.peers["alice"].node
    assert alice is not None
    alice.jobs.jobs[bytes.fromhex(job)].culprits.append(simulation.peers["bob"].key.public)
    simulation.run(seconds=5)
    assert proposed(simulation) == ["carol"]


def test_a_round_from_before_a_restart_counts_for_nothing() -> None:
    simulation, _ = awaiting()
    alice = simulation.peers["alice"].node
    assert alice is not None
    before = alice.jobs.awaited
    assert before is not None
    alice.jobs.on_played(Played(before.begun.number + 1, {}))
    assert alice.jobs.awaited is before
    simulation.crash("alice", for_ns=SECOND)
    simulation.run(seconds=120, until=lambda: bool(proposed(simulation)))
    assert proposed(simulation)[:1] == ["bob"], "the job goes on with rounds of its own"


async def test_the_daemon_plays_a_round_outside_its_own_thread() -> None:
    import threading

    class Watched(Round):
        def play(self) -> Played:
            threads.append(threading.get_ident())
            return super().play()

    threads: list[int] = []
    send, receive = trio.open_memory_channel[Any](1)
    performer = object.__new__(Performer)
    async with trio.open_nursery() as nursery:
        performer.nursery, performer.inbox = nursery, send
        performer.perform(Watched(7, tuple[Candidate, ...](), {}))
        assert await receive.receive() == Played(7, {})
    assert threads != [threading.get_ident()]
