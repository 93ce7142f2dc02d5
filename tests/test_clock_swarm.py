"""A peer whose machine's clock jumps keeps its deals, its numbers and its place on the market."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from peer.clock import Clock
from peer.events import Effect, Input
from peer.jobs import JobState
from peer.node import Node
from peer.simulator import SECOND, Faults, Simulation
from tests.swarm_scenario import job_state, make_swarm, submit

CALM = Faults(loss=0, duplication=0, crash=0, delay_ns_max=20_000_000)
DAY = 86_400 * SECOND


class Machines:
    """The clocks of the machines: each node's time is made of its machine's as the daemon makes it."""

    def __init__(self) -> None:
        self.off_ns: dict[bytes, int] = {}
        self.clocks: dict[bytes, Clock] = {}

    def handle(self, original: Any, node: Node, event: Input, now_ns: int) -> list[Effect]:
        me = node.desk.me
        if me not in self.off_ns:
            return list(original(node, event, now_ns))
        clock = self.clocks.setdefault(me, Clock(wall_ns=now_ns, steady_ns=now_ns))
        reading = clock.read(wall_ns=now_ns + self.off_ns[me], steady_ns=now_ns)
        return list(original(node, event, reading.now_ns, reading.wall_ns))


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    made, original = Machines(), Node.handle
    monkeypatch.setattr(Node, "handle", lambda node, event, now_ns: made.handle(original, node, event, now_ns))
    yield made


def refused(simulation: Simulation, name: str, since_ns: int = 0) -> list[tuple[int, str]]:
    """What others refused of `name`'s."""
    key = simulation.peers[name].key.public
    return [
        (at, data["why"]) for at, _, kind, data in simulation.log
        if kind == "refused-bytes" and data["peer"] == key and at >= since_ns
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["alice", "bob", "victor"])
@pytest.mark.parametrize("jump_ns", [DAY, -DAY, 600 * SECOND])
def test_a_clock_that_jumps_and_comes_back_loses_nothing(machines: Machines, name: str, jump_ns: int) -> None:
    simulation = make_swarm(21, CALM)
    machines.off_ns[simulation.peers[name].key.public] = 0
    first = submit(simulation)
    simulation.run(seconds=5)
    assert job_state(simulation, first)["state"] == "running"
    machines.off_ns[simulation.peers[name].key.public] = jump_ns
    simulation.run(seconds=90)
    assert job_state(simulation, first)["state"] == "done", "a deal that is agreed goes on, whatever the clock says"
    kinds = [kind for _, _, kind, _ in simulation.log]
    assert not {"lost", "slashed", "claimed"} & set(kinds)
    second = submit(simulation, budget_micro=20_000_000)
    simulation.run(seconds=20)
    machines.off_ns[simulation.peers[name].key.public] = 0
    simulation.run(seconds=30)
    back_ns = simulation.now_ns
    simulation.run(seconds=200)
    assert job_state(simulation, second)["state"] == "done", "and after it the peer is on the market again"
    assert refused(simulation, name, back_ns) == []
    simulation.check_quiet()


def test_what_a_peer_dates_follows_its_clock_and_its_numbers_do_not(machines: Machines) -> None:
    simulation = make_swarm(22, CALM)
    bob = simulation.peers["bob"]
    machines.off_ns[bob.key.public] = 0
    simulation.run(seconds=5)
    asks = []
    for off_ns in (DAY, 0, -DAY, 0):
        machines.off_ns[bob.key.public] = off_ns
        simulation.run(seconds=20)
        assert bob.node is not None
        asks.append(next(a for a in bob.node.desk.book.asks if a.peer == bob.key.public))
        assert abs(asks[-1].created_ns - simulation.now_ns - off_ns) < 20 * SECOND
    assert [a.sequence for a in asks] == sorted({a.sequence for a in asks})
    carol = simulation.peers["carol"].node
    assert carol is not None
    heard = [a for a in carol.desk.book.asks if a.peer == bob.key.public]
    assert heard == asks[-1:], "others have the one with the right date, and of the highest number"


@pytest.mark.parametrize("back_ns", [600 * SECOND, DAY])
def test_a_start_with_the_clock_set_back_opens_with_its_offers(back_ns: int) -> None:
    """The offer in the store is dated in the future then; it is made anew."""
    simulation = make_swarm(23, CALM)
    job = submit(simulation, unit_price_max=1)  # nobody takes it
    simulation.run(seconds=3)
    assert job_state(simulation, job)["state"] == "offered"
    alice = simulation.peers["alice"]
    simulation.now_ns -= back_ns
    node = simulation._load(alice, simulation.rng)
    stored = node.jobs.jobs[bytes.fromhex(job)]
    assert stored.state == JobState.OFFERED
    assert stored.offer_id not in node.desk.book.offers
    simulation.now_ns += back_ns
