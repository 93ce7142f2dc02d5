"""A swarm with notaries in which errors are ordered."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec

from peer.desk import Means
from peer.simulator import Faults, Simulation
from protocol.keys import SigningKey, peer_name
from protocol.network import Deposit, Network, Rules
from tests.swarm_scenario import RULES, job_state, over, rest, submit

__all__ = ["CALM", "FORCED_RULES", "run_job", "swarm"]

CALM = Faults(until_ns=0)
ROLES = {"alice": 0, "bob": 1, "carol": 1, "victor": 2, "vera": 2, "wendy": 4}
FORCED_RULES = msgspec.structs.replace(
    RULES, forced_ppm=1_000_000, audit_permille=0, challenge_ms=60_000, dispute_replay_ms=60_000, dispute_move_ms=30_000
)


def swarm(
    seed: int, faults: Faults = CALM, *, rules: Rules = FORCED_RULES, count: int = 4, cheat: str = ""
) -> Simulation:
    """A submitter, two solvers of which bob is cheaper, two verifiers, a whistleblower and `count` notaries."""
    rng = random.Random(seed)
    names = [*ROLES, *(f"notary{number}" for number in range(count))]
    keys = {name: SigningKey.from_seed(rng.randbytes(32)) for name in names}
    deposits = tuple(
        Deposit(peer_name(keys[name].public), 100_000_000 if name == "alice" else 0, 50_000_000) for name in ROLES
    )
    judges = tuple(peer_name(keys[name].public) for name in names if name not in ROLES)
    network = Network("forced", rules, deposits, notaries=judges)
    means = {
        name: Means(roles=ROLES.get(name, 0), unit_price=1000 if name == "bob" else 1100, memory_bytes=2**30, sandbox=4)
        for name in names
    }
    means["bob"] = replace(means["bob"], cheat=cheat)
    return Simulation(seed=seed, keys=keys, peers=means, network=network, faults=faults)


def run_job(simulation: Simulation, *, seconds: int = 1200) -> dict[str, object]:
    """A job of six segments, to its end and until everything is at rest."""
    simulation.run(seconds=3)
    while simulation.peers["alice"].node is None:
        simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=seconds, until=over(simulation, job))
    state = job_state(simulation, job)
    rest(simulation, seconds=300)
    simulation.check_quiet()
    return state
