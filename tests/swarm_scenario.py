"""A five-peer swarm for the simulator: one submitter, two solvers, one verifier, one whistleblower."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import msgspec

from peer.deals import JobState
from peer.desk import Means
from peer.simulated_work import ARRAY, BATCH, CONTENTS, PROGRAM, initial_root
from peer.simulator import SECOND, START_NS, Faults, Simulation
from protocol.codec import encode
from protocol.keys import SigningKey, peer_name
from protocol.network import Deposit, Network, Rules
from protocol.program import program_id
from protocol.task import Initial, Schedule, TaskSpec

RULES = Rules(
    lost_grace_ms=6_000,
    segment_silence_ms=60_000,
    reveal_ms=10_000,
    check_silence_ms=60_000,
    settle_silence_ms=20_000,
    claim_window_ms=10_000,
    audit_permille=1000,
    check_segments_min=2,
)
ROLES = {"alice": 0, "bob": 1, "carol": 1, "victor": 2, "wendy": 4}
SEGMENTS = 6


def make_task(network: Network, *, seed: int = 7, segments: int = SEGMENTS) -> TaskSpec:
    """A task of `segments` segments of ten steps of the simulator's Program."""
    program = PROGRAM.to_bytes()
    return TaskSpec(
        network=network.id,
        program=program_id(program),
        program_bytes=len(program),
        arrays=(ARRAY,),
        batch=BATCH,
        initial=Initial("seed", bytes(32), bytes(32)),
        seed=seed,
        steps=segments * 10,
        steps_per_segment=10,
        mode="exact",
        width=15,
        schedule=Schedule("constant", 1_000_000, 0, 0),
        operations_per_step=10**9,
        name="test",
    )


def make_swarm(
    seed: int, faults: Faults, *, cheat: str = "", rules: Rules = RULES, bobs_sandbox: int = 4
) -> Simulation:
    """The swarm, with funds for everyone; `bob` cheats if asked to (and is the cheaper solver)."""
    rng = random.Random(seed)
    keys = {name: SigningKey.from_seed(rng.randbytes(32)) for name in ROLES}
    deposits = tuple(
        Deposit(peer_name(keys[name].public), 100_000_000 if name == "alice" else 0, 50_000_000) for name in ROLES
    )
    network = Network("test", rules, deposits)
    means = {
        name: Means(roles=role, unit_price=1000 if name == "bob" else 1100, memory_bytes=2**30, sandbox=4)
        for name, role in ROLES.items()
    }
    means["bob"] = replace(means["bob"], cheat=cheat, sandbox=bobs_sandbox)
    return Simulation(seed=seed, keys=keys, peers=means, network=network, faults=faults)


def submit(
    simulation: Simulation, *, budget_micro: int = 10_000_000, unit_price_max: int = 2000, sandbox: int = 2,
    mode: Literal["exact", "tolerant"] = "exact", **terms: object,
) -> str:  # fmt: skip
    """Alice submits; her store has the blobs. terms: others of the command. Returns the job id."""
    task = msgspec.structs.replace(make_task(simulation.network), mode=mode)
    alice = simulation.peers["alice"]
    alice.blobs |= set(CONTENTS)
    reply = simulation.command(
        "alice",
        "submit",
        {
            "task": encode(task).hex(),
            "budget_micro": budget_micro,
            "unit_price_max": unit_price_max,
            "base_root": initial_root(task.seed).hex(),
            "checkpoint_bytes": 10_000,
            "memory_bytes": 2**20,
            "sandbox": sandbox,
            **terms,
        },
    )
    assert reply.error is None, reply.error
    return str(reply.result["job"])


def job_state(simulation: Simulation, job: str) -> dict[str, object]:
    """What `ichiba job show` would say; {} while alice is down."""
    if simulation.peers["alice"].node is None:
        return {}
    return simulation.command("alice", "job", {"job": job}).result


def over(simulation: Simulation, *jobs: str, by: str = "alice") -> Callable[[], bool]:
    """Whether these jobs of `by` are done or have failed, for the `until` of a run: read from the node, for to ask with
    a command after each event costs more than the event."""
    ids = [bytes.fromhex(job) for job in jobs]

    def ended() -> bool:
        node = simulation.peers[by].node
        return node is not None and all(node.jobs.jobs[i].state in (JobState.DONE, JobState.FAILED) for i in ids)

    return ended


def rest(simulation: Simulation, *, seconds: float) -> None:
    """Run on for so long. Once nothing goes wrong any more, peers look at the clock once a second and not four times:
    little happens."""
    noisy_ns = START_NS + simulation.faults.until_ns - simulation.now_ns
    noisy = min(seconds, max(0, noisy_ns) / SECOND)
    simulation.run(seconds=noisy)
    often, simulation.tick_ns = simulation.tick_ns, SECOND
    simulation.run(seconds=seconds - noisy)
    simulation.tick_ns = often
