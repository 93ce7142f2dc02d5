"""Acquaintances on the simulator: peers without a deposit that give each other credit."""

from __future__ import annotations

import random
from dataclasses import replace

from peer.credit import Credit
from peer.desk import Means
from peer.node import Node
from peer.simulated_work import CONTENTS, initial_root
from peer.simulator import Faults, Simulation
from protocol.codec import encode
from protocol.keys import SigningKey, peer_name
from protocol.network import Deposit, Network
from tests.swarm_scenario import RULES, make_task, over

CALM = Faults(until_ns=0)
PRICE_MICRO = 60_000  # of a job of six segments, 60 giga-operations at 1000


def make_friends(seed: int, faults: Faults = CALM, *, names: str = "ann ben cat", slots: int = 1) -> Simulation:
    """Peers that all solve at 1000 a giga-operation; none has a deposit but `rich`, which is nobody's friend."""
    rng = random.Random(seed)
    keys = {name: SigningKey.from_seed(rng.randbytes(32)) for name in [*names.split(), "rich"]}
    deposits = (Deposit(peer_name(keys["rich"].public), 100_000_000, 50_000_000),)
    solver = Means(roles=1, unit_price=1000, memory_bytes=2**30, sandbox=4, slots=slots)
    means = {name: solver if name != "rich" else replace(solver, roles=2) for name in keys}
    return Simulation(seed=seed, keys=keys, peers=means, network=Network("friends", RULES, deposits), faults=faults)


def node_of(simulation: Simulation, name: str) -> Node:
    """A peer that is up."""
    node = simulation.peers[name].node
    assert node is not None, f"{name} is down"
    return node


def credit_of(simulation: Simulation, name: str) -> Credit:
    """Its books."""
    return node_of(simulation, name).settler.credit


def key_of(simulation: Simulation, name: str) -> bytes:
    """Its key."""
    return simulation.peers[name].key.public


def give(simulation: Simulation, creditor: str, debtor: str, limit_micro: int = 1_000_000) -> None:
    """`ichiba credit give`, and the line arrives."""
    arguments = {"peer": peer_name(key_of(simulation, debtor)), "limit_micro": limit_micro, "days": 30}
    reply = simulation.command(creditor, "credit-give", arguments)
    assert reply.error is None, reply.error
    simulation.run(seconds=1)


def work_for(
    simulation: Simulation, submitter: str, *, seed: int = 7, credit: bool = True, segments: int = 6
) -> str:
    """`ichiba submit --credit`. Returns the job."""
    simulation.peers[submitter].blobs |= set(CONTENTS)
    task = make_task(simulation.network, seed=seed, segments=segments)
    arguments = {
        "task": encode(task).hex(), "budget_micro": 10_000_000, "unit_price_max": 2000,
        "base_root": initial_root(task.seed).hex(), "checkpoint_bytes": 10_000, "memory_bytes": 2**20, "sandbox": 2,
        "credit": credit,
    }  # fmt: skip
    reply = simulation.command(submitter, "submit", arguments)
    assert reply.error is None, reply.error
    return str(reply.result["job"])


def done(simulation: Simulation, submitter: str, job: str, *, seconds: int = 600) -> dict[str, object]:
    """Run until the job ended; its state."""
    simulation.run(seconds=seconds, until=over(simulation, job, by=submitter))
    simulation.run(seconds=5)
    return simulation.command(submitter, "job", {"job": job}).result


def owed(simulation: Simulation, creditor: str, debtor: str) -> int:
    """What `debtor` owes `creditor` by the books of both, which agree."""
    one = credit_of(simulation, creditor).balance_micro(key_of(simulation, debtor))
    other = credit_of(simulation, debtor).balance_micro(key_of(simulation, creditor))
    assert one == -other, f"{creditor} says {one}, {debtor} {other}"
    return one


def make_indebted() -> Simulation:
    """Ann owes Ben for one job and has 0.94 credits left with him."""
    simulation = make_friends(1)
    simulation.run(seconds=3)
    give(simulation, "ben", "ann")
    done(simulation, "ann", work_for(simulation, "ann"))
    return simulation
