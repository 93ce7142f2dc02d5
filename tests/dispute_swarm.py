"""A swarm with notaries for the simulator, and what happens to a dispute in it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from peer.desk import Means
from peer.simulator import Faults, Simulation
from protocol.keys import SigningKey, peer_name
from protocol.network import Deposit, Network, Rules
from tests.swarm_scenario import RULES, job_state

__all__ = ["CALM", "COURT_RULES", "challenger_of", "court", "rulings_of", "settle", "states_of", "told"]

CALM = Faults(until_ns=0)
NOTARIES = 4
ROLES = {"alice": 0, "bob": 1, "carol": 1, "victor": 2, "vera": 2, "wendy": 4}
COURT_RULES = Rules(
    **{
        **{name: getattr(RULES, name) for name in Rules.__struct_fields__},
        "dispute_replay_ms": 60_000,
        "dispute_move_ms": 30_000,
        "challenge_ms": 20_000,
        "forced_ppm": 0,
        "audit_permille": 0,
    }
)


def court(
    seed: int, faults: Faults = CALM, *, cheat: str = "", wendys_price: int = 1100, rules: Rules = COURT_RULES
) -> Simulation:
    """A submitter, two solvers of which bob is cheaper and cheats if asked to, two verifiers, a whistleblower and the
    notaries."""
    rng = random.Random(seed)
    names = [*ROLES, *(f"notary{number}" for number in range(NOTARIES))]
    keys = {name: SigningKey.from_seed(rng.randbytes(32)) for name in names}
    deposits = tuple(
        Deposit(peer_name(keys[name].public), 100_000_000 if name == "alice" else 0, 50_000_000) for name in names
    )
    network = Network(
        "court", rules, deposits, notaries=tuple(peer_name(keys[name].public) for name in names if "notary" in name)
    )
    means = {
        name: Means(roles=ROLES.get(name, 0), unit_price=1000 if name == "bob" else 1100, memory_bytes=2**30, sandbox=4)
        for name in names
    }
    means["bob"] = replace(means["bob"], cheat=cheat)
    means["wendy"] = replace(means["wendy"], unit_price=wendys_price)
    return Simulation(seed=seed, keys=keys, peers=means, network=network, faults=faults)


def settle(simulation: Simulation, job: str, *, seconds: int = 1200) -> dict[str, Any]:
    """Run until the job ended and everything is at rest; the job's state."""
    simulation.run(seconds=seconds, until=lambda: _ended(simulation))
    state = job_state(simulation, job)
    simulation.run(seconds=55)  # the window of challenges, and two comparisons of logs
    simulation.check_quiet()
    return state


def _ended(simulation: Simulation) -> bool:
    node = simulation.peers["alice"].node
    return node is not None and not any(job.open for job in node.jobs.jobs.values())


def told(simulation: Simulation, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Every event of a kind, with who told it."""
    return [(who, data) for _, who, what, data in simulation.log if what == kind]


def rulings_of(simulation: Simulation) -> dict[str, tuple[str, str, str]]:
    """What each notary ruled in the last dispute it ruled on: finding, level, cause."""
    ruled = [(who, data) for who, data in told(simulation, "ruling") if who.startswith("notary")]
    return {who: (data["finding"], data["level"], data["cause"]) for who, data in ruled}


def states_of(simulation: Simulation) -> list[str]:
    """How every dispute ended, in order, as the first notary that is up tells it."""
    for name, peer in sorted(simulation.peers.items()):
        if name.startswith("notary") and peer.node is not None:
            files = [h.file for h in peer.node.disputes.arbiter.hearings.values()]
            return [file.kept.ended for file in sorted(files, key=lambda f: (f.kept.ended_ns, f.kept.opened_ns))]
    return []


def challenger_of(simulation: Simulation) -> str:
    """Who pressed the first challenge; empty while nobody did."""
    return next((who for who, data in told(simulation, "dispute") if data.get("part") == "challenger"), "")
