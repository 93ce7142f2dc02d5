"""A real process killed before, in the middle of and after every effect its node performs, and around its commits.

One peer of a simulated swarm is a process of its own over a real store (tests/crash_node_child.py); the others are
simulated beside it, and stay up. Each of its lives ends at a point where none ended before, until a whole job passes
without a new one. Then every peer has one log and one ledger, every channel is closed, and what was promised is paid,
once: `check_quiet` of the simulator.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peer.events import Effect, Input
from peer.node import Node
from peer.simulator import SECOND, Faults, SimulatedPeer
from peer.store import Store
from tests.crash_node_child import Birth, frame, read_frame
from tests.dispute_swarm import court
from tests.swarm_scenario import job_state, make_swarm, rest, submit

DOWN_NS = 2 * SECOND  # more than a second, or a goodbye could reach the others after the next greeting
JOBS_MAX = 24


class Nursery:
    """The process that lives are forked from."""

    def __init__(self) -> None:
        root = Path(__file__).resolve().parents[1]  # `tests` is a package of the checkout, not of the installation
        command = [sys.executable, "-m", "tests.crash_node_child"]
        self.process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.into, self.out = self.process.stdin.fileno(), self.process.stdout.fileno()

    def tell(self, value: object) -> Any:
        """Send a frame and wait for the answer: "born", "done", or the exit code of a life."""
        data = frame(value) if value is not None else bytes(4)
        os.write(self.into, data)
        return read_frame(self.out)


class Proxy:
    """A node in another process, as far as the simulator needs one."""

    def __init__(self, mortal: Mortal, life: int) -> None:
        self.mortal, self.dead, self.read = mortal, False, 0
        self.world = mortal.root / f"world-{life}"
        birth = mortal.birth(self.world)
        self._answer(mortal.nursery.tell(birth), "born")

    def _answer(self, answer: object, wanted: str) -> None:
        if answer != wanted:
            assert answer == -signal.SIGKILL, f"the life ended with {answer}"
            self.dead = True

    def handle(self, event: Input, now_ns: int) -> list[Effect]:
        """What reached the world; of a torn effect nothing did."""
        if self.dead:
            return []
        self._answer(self.mortal.nursery.tell((event, now_ns)), "done")
        with self.world.open("rb") as file:
            file.seek(self.read)
            found: list[Effect] = []
            while (effect := read_frame(file.fileno())) is not None:
                found.append(effect)
                self.read = os.lseek(file.fileno(), 0, os.SEEK_CUR)
        return found

    def end(self) -> None:
        """A clean end."""
        if not self.dead:
            assert self.mortal.nursery.tell(None) == 0


class Mortal:
    """Makes a simulation in which peer `name` is a real process; keeps the points where its lives ended."""

    def __init__(self, name: str, root: Path, nursery: Nursery) -> None:
        self.name, self.root, self.nursery = name, root, nursery
        self.covered: set[str] = set()
        self.lives = 0
        self.directory = root

    def birth(self, world: Path) -> Birth:
        peer = self.simulation.peers[self.name]
        return Birth(
            self.directory, world, self.root / "died-at", self.seed, self.simulation.network, peer.means,
            self.lives, self.simulation.now_ns, frozenset(self.covered),
        )  # fmt: skip

    def run(self) -> None:
        """Jobs from offer to rest, one after the other, until one ends with no death."""
        self.directory = self.root / "data"
        self.simulation = court(1) if self.name.startswith("notary") else make_swarm(1, Faults(until_ns=0))
        self.seed = bytes(self.simulation.peers[self.name].key._key)
        _MortalRun(self).finish()


class _MortalRun:
    """The simulator with one peer's process outside; the simulator is patched where it loads and checks that peer."""

    def __init__(self, mortal: Mortal) -> None:
        self.mortal, self.simulation = mortal, mortal.simulation
        self.deaths = 0
        self.proxy: Proxy | None = None
        simulation = self.simulation
        self.load, self.check, self.handle = simulation._load, simulation.check, simulation._handle
        simulation._load = self._load  # type: ignore[method-assign]
        simulation.check = self._check  # type: ignore[method-assign]
        peer = simulation.peers[mortal.name]
        simulation.crash(mortal.name, for_ns=DOWN_NS)
        if mortal.name == "bob":
            simulation.crash("carol", for_ns=0)  # or each death would send the job to her
        if mortal.name == "notary0":
            simulation.crash("notary3", for_ns=0)  # or the others could certify without it
        assert peer.node is None

    def _load(self, peer: SimulatedPeer, rng: random.Random) -> Node:
        if peer.name != self.mortal.name:
            return self.load(peer, rng)
        self.mortal.lives += 1
        self.proxy = Proxy(self.mortal, self.mortal.lives)
        return self.proxy  # type: ignore[return-value]

    def _check(self, peer: SimulatedPeer) -> None:
        if peer.name != self.mortal.name:
            self.check(peer)
        if self.proxy is not None and self.proxy.dead:
            point = (self.mortal.root / "died-at").read_text()
            assert point not in self.mortal.covered
            self.mortal.covered.add(point)
            self.deaths += 1
            self.proxy = None
            self.simulation.crash(self.mortal.name, for_ns=DOWN_NS)

    def come_to_rest(self) -> SimulatedPeer:
        """End the mortal's process; what its disk holds takes its place, and is checked as any other peer."""
        assert self.proxy is not None
        self.proxy.end()
        simulation, peer = self.simulation, self.simulation.peers[self.mortal.name]
        with Store.open(self.mortal.directory, simulation.network.id, peer.key.public) as store:
            tables = [row[0] for row in store._connection.execute("SELECT DISTINCT tbl FROM kv")]
            peer.rows = {table: dict(store.rows(table)) for table in tables}
            peer.entries = [entry for _, entry in store.entries()]
        simulation._load, simulation.check = self.load, self.check  # type: ignore[method-assign]
        peer.node = self.load(peer, random.Random(0))
        simulation.check_quiet()
        return peer

    def finish(self) -> None:
        simulation = self.simulation
        simulation.run(seconds=4)
        while simulation.peers["alice"].node is None:
            simulation.run(seconds=3)
        for _ in range(JOBS_MAX):
            before, job_id = self.deaths, submit(simulation)
            for _ in range(20):
                simulation.run(seconds=30)
                if job_state(simulation, job_id).get("state") in ("done", "failed"):
                    break
            simulation.run(seconds=15)
            while simulation.peers["alice"].node is None:
                simulation.run(seconds=3)
            if self.deaths == before:
                break
        else:
            raise AssertionError(f"{JOBS_MAX} jobs, and each met a new point")
        rest(simulation, seconds=120)
        peer = self.come_to_rest()
        assert peer.node is not None
        jobs = simulation.command("alice", "jobs", {}).result["jobs"]
        assert {job["state"] for job in jobs} == {"done"}, [job["reason"] for job in jobs]
        alice, ledger = simulation.peers["alice"].key.public, peer.node.desk.ledger
        closed = peer.node.settler.channels.values()
        fees = sum(micro for channel in closed for _, micro in channel.fees)
        assert ledger.flows()[alice].paid_micro == sum(channel.paid_micro for channel in closed) + fees
        assert sum(job["paid_micro"] for job in jobs) == sum(channel.paid_micro for channel in closed)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.process.kill()
    made.process.communicate()


SUBMITTERS = {
    "publish Agreement", "publish Offer", "publish Settlement", "send CheckRequest", "send Opened", "send Propose",
    "send ReceiptBack", "send RevealOffer", "send SettleOffer", "Fetch", "Release",
}  # fmt: skip
SOLVERS = {
    "publish Ask", "publish Bid", "send Accept", "send ReceiptOffer", "send ProofOffer", "send RevealOffer",
    "send SettleBack", "Fetch", "StartWork", "StopWork", "Release",
}  # fmt: skip


NOTARIES = {"send Certified", "send BeaconGiven"}


@pytest.mark.parametrize(
    ("name", "kinds", "commits_min"), [("alice", SUBMITTERS, 7), ("bob", SOLVERS, 7), ("notary0", NOTARIES, 2)]
)
def test_a_process_killed_at_every_effect_loses_nothing_and_pays_once(
    tmp_path: Path, nursery: Nursery, name: str, kinds: set[str], commits_min: int
) -> None:
    mortal = Mortal(name, tmp_path, nursery)
    mortal.run()
    torn, commits = (
        {point.removeprefix(when) for point in mortal.covered if point.startswith(when)}
        for when in ("torn ", "before the commit of ")
    )
    assert torn >= kinds, sorted(kinds - torn)
    assert len(commits) >= commits_min
    assert {point.removeprefix("after ") for point in mortal.covered if point.startswith("after ")} >= kinds
