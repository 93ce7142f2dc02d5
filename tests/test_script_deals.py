"""Scripts in the market: offered, bid for by who can contain them, run, paid for the time they took, and not judged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from market.matching import SANDBOX_CONTAINED
from peer.simulator import Faults, Simulation
from protocol.bundle import make_bundle, verify_bundle
from protocol.codec import blake, encode
from protocol.network import dump
from protocol.script import ASSURANCE, FileRef, ScriptSpec
from protocol.task import task_id
from tests.swarm_scenario import job_state, make_swarm, over, rest
from worker.sandbox import Level

CALM = Faults(until_ns=0)
BLOB = blake("test/script", b"s")


def submit(simulation: Simulation, *, seed: int = 0, price: int = 2000, replica: int = 0, group: str = "") -> str:
    """Alice submits a script of 20 s, which takes 10; with a seed its outputs differ from machine to machine."""
    script = ScriptSpec(
        network=simulation.network.id, command=("python3", "x.py"), files=(FileRef("x.py", BLOB, 9),), seconds=20,
        memory_bytes=2**26, outputs_bytes=2**20, seed=seed, name="script",
    )  # fmt: skip
    simulation.peers["alice"].blobs.add(BLOB)
    reply = simulation.command(
        "alice",
        "submit",
        {
            "task": encode(script).hex(), "budget_micro": 100_000, "unit_price_max": price,
            "base_root": task_id(script).hex(), "checkpoint_bytes": 2**21, "memory_bytes": 2**26,
            "group": group, "replica": replica,
        },
    )  # fmt: skip
    assert reply.error is None, reply.error
    return str(reply.result["job"])


def finish(simulation: Simulation, *jobs: str) -> list[dict[str, Any]]:
    simulation.run(seconds=900, until=over(simulation, *jobs))
    rest(simulation, seconds=240)
    simulation.check_quiet()
    return [dict(job_state(simulation, job)) for job in jobs]


def test_a_script_is_paid_for_the_time_it_took_and_nobody_is_asked_to_check_it() -> None:
    simulation = make_swarm(1, CALM)
    simulation.run(seconds=3)
    (state,) = finish(simulation, submit(simulation))
    assert (state["state"], state["kind"], state["assurance"]) == ("done", "script", ASSURANCE)
    assert state["paid_micro"] == state["spent_micro"] == 10_000  # 10 s at bob's 1000 a second
    (deal,) = state["deals"]
    assert (deal["state"], deal["checks"], deal["drawn"], deal["lock_micro"]) == ("settled", [], [], 0)
    assert deal["channel_micro"] == 20_000  # its whole time, and no checks
    kinds = [kind for _, name, kind, _ in simulation.log if name == "alice"]
    assert "unchecked" in kinds
    assert "said" in kinds
    node = simulation.peers["alice"].node
    assert node is not None
    assert node.settler.history(simulation.peers["bob"].key.public).right == 0  # no reputation for what was not checked


@pytest.mark.parametrize("seed", range(20))
def test_no_seed_breaks_a_script(seed: int) -> None:
    simulation = make_swarm(seed, Faults.drawn_from(seed))
    simulation.run(seconds=3)
    while simulation.peers["alice"].node is None:
        simulation.run(seconds=3)
    (state,) = finish(simulation, submit(simulation))
    assert state["state"] == "done", f"seed {seed}: {state['state']} {state['reason']}"


def test_a_machine_below_contained_does_not_bid_and_says_why() -> None:
    assert int(Level.CONTAINED) == SANDBOX_CONTAINED
    simulation = make_swarm(2, CALM)
    node = simulation.peers["bob"].node
    assert node is not None
    node.desk.means = replace(node.desk.means, sandbox=3)
    simulation.run(seconds=3)
    (state,) = finish(simulation, submit(simulation))
    assert state["paid_micro"] == 11_000  # carol's price: bob, the cheaper, cannot contain it
    refusals = [data for _, name, kind, data in simulation.log if (name, kind) == ("bob", "no-bid")]
    assert refusals[0]["code"] == "sandbox"
    assert "CONTAINED" in refusals[0]["why"]


def test_a_second_costs_what_the_machine_earns_in_a_second_with_graphs() -> None:
    simulation = make_swarm(3, CALM)
    for peer in simulation.peers.values():
        assert peer.node is not None
        peer.node.bidder.operations_per_second = 3 * 10**9
    simulation.run(seconds=3)
    (state,) = finish(simulation, submit(simulation, price=4000))
    assert state["paid_micro"] == 30_000


@pytest.mark.parametrize(("seed", "same"), [(0, True), (9, False)])
def test_replicas_run_on_different_machines_and_say_whether_they_agree(seed: int, same: bool) -> None:
    simulation = make_swarm(4, CALM)
    simulation.run(seconds=3)
    jobs = [submit(simulation, seed=seed, replica=i, group="ab" * 16) for i in range(2)]
    states = finish(simulation, *jobs)
    assert len({state["deals"][-1]["solver"] for state in states}) == 2
    assert [state["replicas"]["same"] for state in states] == [same, same]
    assert states[0]["slashed_micro"] == states[1]["slashed_micro"] == 0


def test_the_evidence_of_a_script_proves_who_signed_for_what_and_says_what_it_does_not() -> None:
    simulation = make_swarm(5, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    (state,) = finish(simulation, job)
    evidence = simulation.command("alice", "bundle", {"job": job}).result
    plain = {**evidence, "task": evidence["task"].hex()}
    plain["deals"] = [
        {k: [e.hex() for e in v] if isinstance(v, list) else v.hex() for k, v in deal.items()}
        for deal in evidence["deals"]
    ]
    bundle = make_bundle(plain, network=dump(simulation.network), state={})
    report = verify_bundle(bundle, simulation.network.id)
    assert (report.complete, report.script, report.operations_checked) == (True, True, 0)
    assert report.final_root.hex() == state["final_root"]
    assert report.operations == 10 * 10**9
    assert ASSURANCE in " ".join(report.not_proved())
    assert "re-executed" not in " ".join(report.proved())
