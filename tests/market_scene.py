"""A market of many submitters and few solvers for the simulator: everyone has one job at a time, or several."""

from __future__ import annotations

import random

from peer.desk import Means
from peer.simulated_work import CONTENTS, initial_root
from peer.simulator import Faults, Simulation
from protocol.codec import encode
from protocol.keys import SigningKey, peer_name
from protocol.network import Deposit, Network
from tests.swarm_scenario import RULES, make_task

__all__ = ["jobs_of", "make_market", "submit_job"]

CHECKERS = ("victor", "vera")


def make_market(seed: int, *, submitters: int, solvers: int, floors: range) -> Simulation:
    """Solvers s0, s1, ... whose floors are spread over `floors`, submitters a0, a1, ..., and two verifiers."""
    rng = random.Random(seed)
    means = {f"a{i}": Means() for i in range(submitters)}
    for i in range(solvers):
        price = floors.start + (floors.stop - floors.start) * i // solvers
        means[f"s{i}"] = Means(roles=1, unit_price=price, memory_bytes=2**30, sandbox=4)
    means |= {name: Means(roles=2, unit_price=floors.start, memory_bytes=2**30, sandbox=4) for name in CHECKERS}
    keys = {name: SigningKey.from_seed(rng.randbytes(32)) for name in means}
    deposits = tuple(
        Deposit(peer_name(keys[name].public), 100_000_000 if name.startswith("a") else 0, 50_000_000) for name in means
    )
    network = Network("test", RULES, deposits)
    return Simulation(seed=seed, keys=keys, peers=means, network=network, faults=Faults(until_ns=0))


def submit_job(simulation: Simulation, name: str, *, limit: int, seed: int, segments: int = 2) -> str:
    """`name` submits a job of so many segments at a limit per giga-operation. Returns its id."""
    task = make_task(simulation.network, seed=seed, segments=segments)
    simulation.peers[name].blobs |= set(CONTENTS)
    reply = simulation.command(
        name,
        "submit",
        {
            "task": encode(task).hex(),
            "budget_micro": 10_000_000,
            "unit_price_max": limit,
            "base_root": initial_root(task.seed).hex(),
            "checkpoint_bytes": 10_000,
            "memory_bytes": 2**20,
            "sandbox": 2,
        },
    )
    assert reply.error is None, reply.error
    return str(reply.result["job"])


def jobs_of(simulation: Simulation) -> list[dict[str, object]]:
    """Every job of every submitter, as `ichiba job ls` has them."""
    names = [name for name in simulation.peers if name.startswith("a")]
    return [job for name in names for job in simulation.command(name, "jobs", {}).result["jobs"]]
