"""A swarm with a submitter, some solvers and two verifiers for the simulator, and runs of units that it submits."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from peer.desk import Means
from peer.simulated_work import CONTENTS, initial_root
from peer.simulator import Faults, Simulation
from protocol.codec import blake, encode
from protocol.keys import SigningKey, peer_name
from protocol.network import Deposit, Network, Rules
from protocol.script import content_of
from protocol.stage import Codec
from protocol.stage import Stage as Place
from protocol.task import Initial, TaskSpec
from tests.adversaries.stage import Stage, Strategy
from tests.swarm_scenario import RULES, make_task, rest

__all__ = ["make_run_swarm", "run_state", "run_until", "submit_run", "until_over"]

FLOAT32 = Codec("float32")
OVER = ("done", "failed", "cancelled")


def make_run_swarm(
    seed: int, *, solvers: int, faults: Faults | None = None, rules: Rules = RULES, notaries: int = 0,
    cast: Mapping[str, Strategy] | None = None, **changed: Any,
) -> Stage:  # fmt: skip
    """alice, who submits; solvers s0, s1, ..., each a little dearer; verifiers victor and vera, whistleblower wendy;
    notary0, notary1, ..., if any.

    cast: the strategy of each dishonest peer. changed: fields of the Means of single peers, by their names.
    """
    rng = random.Random(seed)
    means = {"alice": Means(sandbox=4, memory_bytes=2**30)}
    means |= {
        f"s{i}": Means(roles=1, unit_price=1000 + i, fixed_price=True, memory_bytes=2**30, sandbox=4)
        for i in range(solvers)
    }
    means |= {name: Means(roles=2, unit_price=1000, memory_bytes=2**30, sandbox=4) for name in ("victor", "vera")}
    means["wendy"] = Means(roles=4, unit_price=1000, memory_bytes=2**30, sandbox=4)
    means |= {f"notary{number}": Means(memory_bytes=2**30, sandbox=4) for number in range(notaries)}
    means |= {name: replace(means[name], **fields) for name, fields in changed.items()}
    keys = {name: SigningKey.from_seed(rng.randbytes(32)) for name in means}
    deposits = tuple(
        Deposit(peer_name(keys[name].public), 100_000_000 if name == "alice" else 0, 50_000_000) for name in means
    )
    court = tuple(peer_name(keys[name].public) for name in means if name.startswith("notary"))
    network = Network("test", rules, deposits, notaries=court)
    return Stage(cast or {}, seed=seed, keys=keys, peers=means, network=network, faults=faults or Faults(until_ns=0))


def unit_task(
    network: Network, *, stage: int, stages: int, replica: int, replicas: int, segments: int, kept: bool
) -> TaskSpec:
    """The task of one unit; what it computes is its own, by its seed. One that is kept has a Program and data of its
    own, too, as a real one has."""
    seed = 7 + stage * replicas + replica
    place = Place(
        run=bytes(32), stage=stage, stages=stages, replica=replica, replicas=replicas, micro_batches=1,
        forward=FLOAT32, backward=FLOAT32, sync="none" if replicas == 1 else "local", shared=FLOAT32,
    )  # fmt: skip
    root = initial_root(seed)
    initial = Initial("state", blake("sim/blob", root), root)
    task = make_task(network, seed=seed, segments=segments)
    if kept:
        arrays = tuple(msgspec.structs.replace(array, blob=blake("sim/kept", array.blob)) for array in task.arrays)
        task = msgspec.structs.replace(task, program=blake("sim/kept", task.program), arrays=arrays)
    return msgspec.structs.replace(task, stage=place, initial=initial, operations_per_step=10**8)


def submit_run(
    simulation: Simulation, *, stages: int = 2, replicas: int = 2, segments: int = 4, budget_micro: int = 20_000_000,
    kept: Sequence[int] = (), memory_bytes: Sequence[int] = (), **terms: Any,
) -> dict[str, Any]:  # fmt: skip
    """alice submits a run; her store has its blobs. Returns the reply: its result, or the error."""
    alice = simulation.peers["alice"]
    alice.blobs |= set(CONTENTS)
    units = []
    for number in range(stages * replicas):
        stage, replica = divmod(number, replicas)
        task = unit_task(
            simulation.network, stage=stage, stages=stages, replica=replica, replicas=replicas, segments=segments,
            kept=number in kept,
        )  # fmt: skip
        simulation.roots[task.initial.blob] = task.initial.root
        alice.blobs |= content_of(task)
        memory = memory_bytes[number] if memory_bytes else 2**20
        units.append(
            {"task": encode(task).hex(), "checkpoint_bytes": 10_000, "memory_bytes": memory, "kept": number in kept}
        )
    arguments = {"units": units, "budget_micro": budget_micro, "unit_price_max": 2000, **terms}
    reply = simulation.command("alice", "submit-run", arguments)
    return reply.error or reply.result


def run_state(simulation: Simulation, job: str) -> dict[str, Any]:
    """What `ichiba job show` would say; {} while alice is down."""
    if simulation.peers["alice"].node is None:
        return {}
    return simulation.command("alice", "job", {"job": job}).result


def run_until(simulation: Simulation, come: Callable[[], bool], *, seconds: float = 60) -> None:
    """Run until `come()`, looked at four times a second, or the time is over."""
    for _ in range(int(4 * seconds)):
        if come():
            return
        simulation.run(seconds=0.25)


def until_over(simulation: Simulation, job: str, *, seconds: float = 600) -> dict[str, Any]:
    """Run until the job is over, then until all is at rest. Returns what is said of it then."""
    run_until(simulation, lambda: run_state(simulation, job).get("state") in OVER, seconds=seconds)
    found = run_state(simulation, job)
    rest(simulation, seconds=120)
    return found
