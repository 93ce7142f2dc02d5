"""Profiles in the market: a tolerant job waits for them, pays for them, and is offered by what they come to."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from market.matching import refuse_offer
from peer import messages as m
from peer.desk import Means
from peer.events import MessageIn, ProfileMade, Reply
from peer.simulated_work import CONTENTS, findings_of, initial_root
from peer.simulator import Faults, SimulatedPeer, Simulation
from protocol import params
from protocol.codec import encode
from protocol.errors import LimitExceeded, MalformedRecord, VerificationFailed, WrongNetwork
from protocol.keys import SigningKey, peer_name
from protocol.lifecycle import State
from protocol.network import Deposit, Network, Rules
from protocol.profile import EXACT, Gauge, Profile, combine, tolerance_id
from protocol.profile_task import ProfileSpec, check_answer, profile_from
from protocol.records import Agreement, Offer, amount_for, open_record
from protocol.script import blobs_of, read_task
from protocol.task import TaskSpec, task_id
from protocol.tolerance import open_profiles
from tests.swarm_scenario import RULES, job_state, make_task, over, rest

CALM = Faults(until_ns=0)
ROLES = {"alice": 0, "bob": 1, "carol": 1, "vera": 2, "victor": 2, "viola": 2, "wendy": 4}
PRICE_MAX = 2000
PROFILE_MICRO = 90 * PRICE_MAX  # 4 configurations of two segments and one more, of ten steps of a giga-operation


def make_swarm(seed: int, faults: Faults = CALM, *, verifiers: int = 3, rules: Rules = RULES) -> Simulation:
    rng = random.Random(seed)
    names = [name for name in ROLES if name not in ("victor", "viola")[verifiers - 1 :]]
    keys = {name: SigningKey.from_seed(rng.randbytes(32)) for name in names}
    deposits = tuple(
        Deposit(peer_name(keys[name].public), 100_000_000 if name == "alice" else 0, 50_000_000) for name in names
    )
    means = {
        name: Means(roles=ROLES[name], unit_price=1000 if name == "bob" else 1100, memory_bytes=2**30, sandbox=4)
        for name in names
    }
    network = Network("test", rules, deposits)
    return Simulation(seed=seed, keys=keys, peers=means, network=network, faults=faults)


def tolerant(network: Network, *, segments: int = 6) -> TaskSpec:
    return msgspec.structs.replace(make_task(network, segments=segments), mode="tolerant")


def order(simulation: Simulation, task: TaskSpec, *, budget_micro: int = 10_000_000) -> Reply:
    simulation.peers["alice"].blobs |= set(CONTENTS)
    arguments = {
        "task": encode(task).hex(), "budget_micro": budget_micro, "unit_price_max": PRICE_MAX,
        "base_root": initial_root(task.seed).hex(), "checkpoint_bytes": 10_000, "memory_bytes": 2**20, "sandbox": 2,
    }  # fmt: skip
    return simulation.command("alice", "submit", arguments)


def submit(simulation: Simulation, *, segments: int = 6, budget_micro: int = 10_000_000) -> str:
    reply = order(simulation, tolerant(simulation.network, segments=segments), budget_micro=budget_micro)
    assert reply.error is None, reply.error
    assert reply.result["state"] == "profiling"
    return str(reply.result["job"])


def finish(simulation: Simulation, job: str) -> dict[str, Any]:
    simulation.run(seconds=2000, until=over(simulation, job))
    rest(simulation, seconds=240)
    simulation.check_quiet()
    return dict(job_state(simulation, job))


def told(simulation: Simulation, name: str, kind: str) -> list[dict[str, Any]]:
    return [data for _, who, what, data in simulation.log if (who, what) == (name, kind)]


def node_of(peer: SimulatedPeer) -> Any:
    assert peer.node is not None
    return peer.node


# --- the task ------------------------------------------------------------------------------------------------
def test_a_profile_is_charged_for_the_steps_it_runs() -> None:
    network = make_swarm(0).network
    spec = ProfileSpec(network=network.id, of=tolerant(network), number=0)
    assert spec.steps_run == 90
    assert spec.operations_per_step == 90 * 10**9
    one = ProfileSpec(network=network.id, of=tolerant(network, segments=1), number=0)
    assert one.steps_run == 50
    assert blobs_of(spec) == blobs_of(spec.of)
    assert read_task(encode(spec), network=network.id) == spec


def test_a_profile_of_an_exact_task_or_of_another_network_is_refused() -> None:
    network = make_swarm(0).network
    exact = ProfileSpec(network=network.id, of=make_task(network), number=0)
    with pytest.raises(MalformedRecord, match="exact task"):
        read_task(encode(exact), network=network.id)
    spec = ProfileSpec(network=network.id, of=tolerant(network), number=0)
    with pytest.raises(WrongNetwork):
        read_task(encode(spec), network=bytes(32))
    with pytest.raises(MalformedRecord):
        read_task(encode(msgspec.structs.replace(spec, number=params.PROFILES_KEPT_MAX)), network=network.id)
    with pytest.raises(LimitExceeded):
        read_task(encode(spec) + bytes(params.MESSAGE_BYTES_MAX), network=network.id)


@pytest.mark.parametrize(
    "change",
    [{"task": bytes(32)}, {"verifier": bytes(32)}, {"seeds": (7, 9)}, {"segments": (0,)}, {"measured": ()}],
    ids=lambda change: next(iter(change)),
)
def test_an_answer_to_another_order_is_refused(change: dict[str, Any]) -> None:
    network = make_swarm(0).network
    spec = ProfileSpec(network=network.id, of=tolerant(network), number=0)
    found = findings_of(random.Random(0), 1000, ())
    profile = profile_from(found, spec, verifier=b"v" * 32, operations_per_second=1, now_ns=1)
    check_answer(profile, spec, verifier=b"v" * 32)
    with pytest.raises((VerificationFailed, MalformedRecord)):
        check_answer(msgspec.structs.replace(profile, **change), spec, verifier=b"v" * 32)


# --- the market ----------------------------------------------------------------------------------------------
def test_a_tolerant_job_is_profiled_by_two_verifiers_and_then_done() -> None:
    simulation = make_swarm(1)
    simulation.run(seconds=3)
    job = submit(simulation)
    state = finish(simulation, job)
    assert state["state"] == "done", state["reason"]
    profiling = state["profiling"]
    names = {peer_name(simulation.peers[name].key.public) for name in ("vera", "victor", "viola")}
    assert len(profiling["profiled_by"]) == 2
    assert set(profiling["profiled_by"]) < names
    assert 3000 <= profiling["l1_ppb"] <= 9000
    assert [child["state"] for child in profiling["profiles"]] == ["done", "done"]
    assert [child["spent_micro"] for child in profiling["profiles"]] == [90 * 1100, 90 * 1100]
    assert state["spent_micro"] >= 2 * 90 * 1100 + 60 * 1000
    assert [one["job"] for one in simulation.command("alice", "jobs", {}).result["jobs"]] == [job]
    alice = node_of(simulation.peers["alice"])
    (parent,) = [one for one in alice.jobs.jobs.values() if not one.parent]
    sealed = parent.profiles
    tolerance = combine(
        open_profiles(sealed, network=simulation.network.id, task=task_id(tolerant(simulation.network)))
    )
    (deal,) = [alice.submitter.deals[one] for one in parent.deals]
    agreement = open_record(deal.agreement, network=simulation.network.id)[0]
    assert isinstance(agreement, Agreement)
    assert agreement.tolerance == tolerance_id(tolerance) == parent.tolerance != EXACT
    kinds = {kind for _, name, kind, _ in simulation.log if name == "alice"}
    assert {"profiling", "profile", "profile-agreed", "profile-step", "profile-done", "profiled"} <= kinds
    assert not [one for one in simulation.penalties if "alice" in one[:2]]


def test_a_solver_is_told_the_gauges_and_keeps_the_profiles() -> None:
    simulation = make_swarm(2)
    gauge = Gauge("w", 2, (1,))
    for name in ("vera", "victor", "viola"):
        simulation.peers[name].gauges = (gauge,)
    orders = []
    perform = simulation._work

    def watched(peer: SimulatedPeer, started: Any) -> None:
        orders.append(started)
        perform(peer, started)

    simulation._work = watched  # type: ignore[method-assign]
    simulation.run(seconds=3)
    state = finish(simulation, submit(simulation))
    assert state["state"] == "done", state["reason"]
    assert state["profiling"]["gauges"] == ["w[1 of 2]"]
    trained = [started for started in orders if isinstance(started.task, TaskSpec)]
    bobs = [started for started in trained if started.last_segment - started.first_segment == 6]
    assert bobs
    assert all(started.gauges == (gauge,) for started in bobs)


def test_two_verifiers_that_disagree_bring_a_third() -> None:
    simulation = make_swarm(3)
    simulation.peers["vera"].gauges = (Gauge("w", 2, (0,)),)
    for name in ("victor", "viola"):
        simulation.peers[name].node.desk.means = replace(simulation.peers[name].means, unit_price=1200)  # type: ignore[union-attr]
    simulation.run(seconds=3)
    state = finish(simulation, submit(simulation))
    assert state["state"] == "done", state["reason"]
    assert len(state["profiling"]["profiles"]) == 3
    assert state["profiling"]["gauges"] == []
    assert any("gauge" in data["why"] for data in told(simulation, "alice", "profile"))


def test_verifiers_that_never_agree_end_the_job_and_not_its_budget() -> None:
    simulation = make_swarm(4)
    for at, name in enumerate(("vera", "victor", "viola")):
        simulation.peers[name].gauges = (Gauge(f"w{at}", 2, (0,)),)
    simulation.run(seconds=3)
    job = submit(simulation, budget_micro=PROFILE_MICRO * 3 + 500_000)
    rest(simulation, seconds=400)
    state = dict(job_state(simulation, job))
    # No fourth verifier is there: the job waits for one, as any job waits for a solver.
    assert state["state"] == "profiling"
    assert [child["state"] for child in state["profiling"]["profiles"]] == ["done", "done", "done", "offered"] or (
        len(state["profiling"]["profiles"]) == 3
    )
    simulation.command("alice", "cancel", {"job": job})
    rest(simulation, seconds=240)
    simulation.check_quiet()
    state = dict(job_state(simulation, job))
    assert state["state"] in ("cancelled", "failed")
    assert state["spent_micro"] == 3 * 90 * 1100


def test_a_task_whose_noise_leaves_frauds_room_is_refused_with_advice() -> None:
    simulation = make_swarm(5)
    for name in ("vera", "victor", "viola"):
        simulation.peers[name].noise_ppb = 10**6
    simulation.run(seconds=3)
    state = finish(simulation, submit(simulation))
    assert state["state"] == "failed"
    assert 'mode = "exact"' in state["reason"]
    assert state["spent_micro"] == 2 * 90 * 1100
    assert not state["deals"]


def test_submit_says_what_profiling_takes_when_the_budget_does_not_reach() -> None:
    simulation = make_swarm(6)
    simulation.run(seconds=3)
    reply = order(simulation, tolerant(simulation.network), budget_micro=2 * PROFILE_MICRO)
    assert reply.error is not None
    assert f"{2 * PROFILE_MICRO} of them for profiles" in reply.error["what"]
    spec = ProfileSpec(network=simulation.network.id, of=tolerant(simulation.network), number=0)
    reply = simulation.command("alice", "submit", {
        "task": encode(spec).hex(), "budget_micro": 10**6, "unit_price_max": 1, "base_root": bytes(32).hex(),
        "checkpoint_bytes": 1, "memory_bytes": 1,
    })  # fmt: skip
    assert reply.error is not None
    assert reply.error["code"] == "usage"


def test_a_cancelled_job_cancels_its_profiles_and_frees_the_money() -> None:
    simulation = make_swarm(7)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=60, until=lambda: bool(told(simulation, "alice", "profile-agreed")))
    simulation.command("alice", "cancel", {"job": job})
    rest(simulation, seconds=240)
    simulation.check_quiet()
    state = dict(job_state(simulation, job))
    assert state["state"] == "cancelled"
    assert {child["state"] for child in state["profiling"]["profiles"]} == {"cancelled"}
    alice = node_of(simulation.peers["alice"])
    assert alice.settler.free_micro(simulation.peers["alice"].key.public) == 100_000_000 - state["spent_micro"]


def test_nobody_claims_because_its_own_segment_took_longer_than_an_answer_may() -> None:
    slow = Faults(delay_ns_max=2 * 10**9, until_ns=10**12)
    simulation = make_swarm(13, slow, rules=msgspec.structs.replace(RULES, check_silence_ms=10_000))
    simulation.run(seconds=3)
    submit(simulation)
    simulation.run(seconds=200, until=lambda: bool(told(simulation, "alice", "profile-paid")))
    assert told(simulation, "alice", "profile-paid")
    assert {name for _, name, kind, _ in simulation.log if kind == "claim"} == set()


@pytest.mark.parametrize("seed", range(8))
def test_no_seed_breaks_the_profiling_of_a_job(seed: int) -> None:
    simulation = make_swarm(seed, Faults.drawn_from(seed))
    simulation.run(seconds=3)
    while simulation.peers["alice"].node is None:
        simulation.run(seconds=3)
    state = finish(simulation, submit(simulation, segments=3))
    assert state["state"] == "done", f"seed {seed}: {state['state']} {state['reason']}"
    assert len(state["profiling"]["profiled_by"]) == 2


# --- who may -------------------------------------------------------------------------------------------------
def test_only_verifiers_with_a_stake_bid_on_profiles() -> None:
    simulation = make_swarm(8)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=60, until=lambda: bool(told(simulation, "alice", "profile-agreed")))
    offers = [data for _, name, kind, data in simulation.log if (name, kind) == ("bob", "no-bid")]
    assert {data["code"] for data in offers} == {"role"}
    assert job
    alice = node_of(simulation.peers["alice"])
    child = next(one for one in alice.jobs.jobs.values() if one.parent)
    offer = open_record(child.offer, network=simulation.network.id)[0]
    assert isinstance(offer, Offer)
    means: dict[str, Any] = {"unit_price": 1000, "memory_bytes": 2**30, "sandbox": 4, "slots_free": 1}
    poor = refuse_offer(offer, **means, stake_micro=9, solves=False, verifies=True, checker_stake_min_micro=10)
    assert poor is not None
    assert poor.code == "stake"


def test_a_solver_declines_work_whose_profiles_do_not_fit() -> None:
    simulation = make_swarm(9)
    simulation.run(seconds=3)
    job = submit(simulation)
    alice = node_of(simulation.peers["alice"])
    parent = next(one for one in alice.jobs.jobs.values() if not one.parent)
    simulation.run(seconds=900, until=lambda: bool(parent.profiles))
    good = list(parent.profiles)
    parent.profiles = good[:1]  # of an honest tolerance, but not what it follows from
    simulation.run(seconds=20, until=lambda: bool(told(simulation, "alice", "refused")))
    (refused,) = told(simulation, "alice", "refused")
    assert refused["code"] == "profiles"
    parent.profiles = good
    simulation.run(seconds=20, until=lambda: bool(told(simulation, "alice", "agreed")))
    assert told(simulation, "alice", "agreed")
    assert job


def test_a_forged_profile_is_not_paid_for_and_costs_its_maker() -> None:
    simulation = make_swarm(10, verifiers=2)
    simulation.run(seconds=3)
    submit(simulation)
    simulation.run(seconds=60, until=lambda: len(told(simulation, "alice", "profile-agreed")) == 2)
    simulation.run(seconds=2)
    alice, vera = (simulation.peers[name] for name in ("alice", "vera"))
    node = node_of(vera)
    deal = next(one for one in node.solver.deals.values() if one.lifecycle == State.RUNNING)
    made = ProfileMade(deal.id, findings_of(random.Random(1), 1000, ()), 10**9)
    for effect in node.handle(made, simulation.now_ns):
        if type(effect).__name__ == "Send" and isinstance(m.unpack(effect.data), m.ReceiptOffer):
            offered = m.unpack(effect.data)
    assert isinstance(offered, m.ReceiptOffer)
    profile = open_record(offered.profile, network=simulation.network.id)[0]
    assert isinstance(profile, Profile)
    other = node.desk.seal(msgspec.structs.replace(profile, other_seed_ppb=1))
    for forged in (b"", other, node_of(alice).desk.seal(profile)):
        message = MessageIn(vera.key.public, m.pack(m.ReceiptOffer(offered.receipt, forged)))
        kinds = {type(effect).__name__ for effect in node_of(alice).handle(message, simulation.now_ns)}
        assert "Penalise" in kinds, forged[:8]
        assert node_of(alice).submitter.deals[deal.id].receipts == 0
    node_of(alice).handle(MessageIn(vera.key.public, m.pack(offered)), simulation.now_ns)
    assert node_of(alice).submitter.deals[deal.id].receipts == 1
    assert node_of(alice).submitter.deals[deal.id].cumulative_micro == amount_for(90 * 10**9, 1100)


def test_one_verifier_makes_one_profile_of_a_task() -> None:
    simulation = make_swarm(11, verifiers=1)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=300)
    state = dict(job_state(simulation, job))
    assert state["state"] == "profiling"
    assert sorted(child["state"] for child in state["profiling"]["profiles"]) == ["done", "offered"]
