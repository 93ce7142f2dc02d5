"""A newcomer paid for a script stakes what it got, wins work that is checked, and takes its stake out again."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from market.entries import Account
from peer.desk import Means
from peer.simulator import SECOND, Faults, Simulation
from protocol import params
from protocol.bundle import make_bundle, verify_bundle
from protocol.codec import blake, encode
from protocol.errors import VerificationFailed
from protocol.keys import SigningKey, peer_name
from protocol.network import Deposit, Network, dump
from protocol.records import StakeMove, open_record
from protocol.script import FileRef, ScriptSpec
from protocol.stake_records import unbonding_ns
from protocol.task import task_id
from tests.bundle_forge import plain
from tests.dispute_swarm import COURT_RULES, told
from tests.swarm_scenario import job_state, over, submit

CALM = Faults(until_ns=0)
ROLES = {"alice": 0, "nina": 1, "victor": 2, "wendy": 4}
BLOB = blake("test/script", b"s")
DEAR, USUAL = 100_000, 1_000  # what nina asks for a giga-operation: of the script, and then


def town(notaries: int, seed: int = 5, *, poor: tuple[str, ...] = ()) -> Simulation:
    """A submitter, a solver without a deposit, two checkers, and perhaps notaries. poor: have credits and no stake."""
    rng = random.Random(seed)
    names = [*ROLES, *(f"notary{number}" for number in range(notaries))]
    keys = {name: SigningKey.from_seed(rng.randbytes(32)) for name in names}
    deposits = tuple(
        Deposit(
            peer_name(keys[name].public),
            100_000_000 if name in ("alice", *poor) else 0,
            0 if name in poor else 50_000_000,
        )
        for name in names
        if name != "nina"
    )
    judges = tuple(peer_name(keys[name].public) for name in names if "notary" in name)
    network = Network("town", COURT_RULES, deposits, notaries=judges)
    means = {
        name: Means(roles=ROLES.get(name, 0), unit_price=DEAR, memory_bytes=2**30, sandbox=4, fixed_price=True)
        for name in names
    }
    return Simulation(seed=seed, keys=keys, peers=means, network=network, faults=CALM)


def earn(simulation: Simulation) -> None:
    """Nina is paid for a script, which takes no stake; then she asks for less."""
    script = ScriptSpec(
        network=simulation.network.id, command=("python3", "x.py"), files=(FileRef("x.py", BLOB, 9),), seconds=20,
        memory_bytes=2**26, outputs_bytes=2**20, seed=0, name="script",
    )  # fmt: skip
    simulation.run(seconds=3)
    simulation.peers["alice"].blobs.add(BLOB)
    asked = {
        "task": encode(script).hex(), "budget_micro": 5_000_000, "unit_price_max": 2 * DEAR,
        "base_root": task_id(script).hex(), "checkpoint_bytes": 2**21, "memory_bytes": 2**26,
    }  # fmt: skip
    job = str(simulation.command("alice", "submit", asked).result["job"])
    finish(simulation, job)
    nina = simulation.peers["nina"]
    nina.means = replace(nina.means, unit_price=USUAL)
    simulation.crash("nina", for_ns=2 * SECOND)
    simulation.run(seconds=5)


def finish(simulation: Simulation, job: str) -> dict[str, Any]:
    simulation.run(seconds=900, until=over(simulation, job))
    simulation.run(seconds=60)
    state = dict(job_state(simulation, job))
    assert state["state"] == "done", state
    return state


def asked(simulation: Simulation, verb: str, **arguments: object) -> dict[str, Any]:
    reply = simulation.command("nina", verb, arguments)
    assert reply.error is None, reply.error
    return dict(reply.result)


def codes(simulation: Simulation) -> set[str]:
    return {reason["code"] for reason in asked(simulation, "why", of="me")["reasons"]}


@pytest.mark.parametrize("notaries", [0, 4])
def test_a_newcomer_stakes_what_it_was_paid_wins_checked_work_and_takes_its_stake_out(notaries: int) -> None:
    simulation = town(notaries)
    earn(simulation)
    wallet = asked(simulation, "wallet")
    assert (wallet["free_micro"], wallet["stake_micro"]) == (1_000_000, 0)
    job = submit(simulation)
    simulation.run(seconds=20)
    assert job_state(simulation, job)["state"] == "offered", "nobody has the stake for it"
    assert "no-stake" in codes(simulation)
    moved = asked(simulation, "stake", amount_micro=900_000)
    assert moved["state"] == ("certifying" if notaries else "done")
    state = finish(simulation, job)
    assert [deal["solver"] for deal in state["deals"]] == [peer_name(simulation.peers["nina"].key.public)]
    assert state["deals"][0]["lock_micro"] > 0 and state["deals"][0]["checks"]
    wallet = asked(simulation, "wallet")
    assert wallet["stake_micro"] == 900_000 and [move["state"] for move in wallet["moves"]] == ["done"]
    out = asked(simulation, "unstake", amount_micro=500_000)
    simulation.run(seconds=20)
    wallet = asked(simulation, "wallet")
    assert (wallet["stake_micro"], wallet["unbonding_micro"]) == (400_000, 500_000)
    assert [one["move"] for one in wallet["unbonding"]] == [out["move"]]
    assert wallet["unbonding"][0]["frees_ns"] > simulation.now_ns
    for peer in simulation.peers.values():  # every log has both, and every ledger says the same
        assert peer.node is not None
        key = simulation.peers["nina"].key.public
        assert peer.node.desk.ledger.balance_micro(Account(key, "stake")) == 400_000
        logged = [open_record(e, network=simulation.network.id)[0] for e in peer.node.settler.log.values()]
        assert [one.kind for one in logged if isinstance(one, StakeMove)] == ["add", "withdraw"]
    free = wallet["free_micro"]
    for peer in simulation.peers.values():
        assert peer.node is not None
        peer.node.desk.now_ns += unbonding_ns(simulation.network)
        peer.node.settler.tick()
    wallet = asked(simulation, "wallet")
    assert (wallet["free_micro"], wallet["unbonding_micro"], wallet["unbonding"]) == (free + 500_000, 0, [])


@pytest.mark.parametrize("notaries", [0, 4])
def test_a_verifier_that_staked_is_drawn_and_its_stake_is_shown_offline(notaries: int) -> None:
    simulation = town(notaries, poor=("victor",))
    earn(simulation)
    asked(simulation, "stake", amount_micro=1_000_000)
    assert simulation.command("victor", "stake", {"amount_micro": 2_000_000}).error is None
    simulation.run(seconds=5)
    job = submit(simulation)
    state = finish(simulation, job)
    checkers = {check["checker"] for check in state["deals"][0]["checks"] if check["state"] == "right"}
    assert peer_name(simulation.peers["victor"].key.public) in checkers
    evidence = plain(simulation.command("alice", "bundle", {"job": job}).result)
    (deal,) = evidence["deals"]
    (move,) = [open_record(bytes.fromhex(text), network=simulation.network.id)[0] for text in deal["stakes"]]
    assert isinstance(move, StakeMove) and move.amount_micro == 2_000_000
    bundle = make_bundle(evidence, network=dump(simulation.network), state={})
    report = verify_bundle(bundle, simulation.network.id)
    assert report.complete and any("had their stakes still" in line for line in report.not_proved())
    deal["stakes"] = []
    with pytest.raises(VerificationFailed, match="not shown to have a stake"):
        verify_bundle(make_bundle(evidence, network=dump(simulation.network), state={}), simulation.network.id)


def test_a_move_that_no_quorum_certifies_is_given_up_and_brought_to_an_end() -> None:
    simulation = town(4)
    earn(simulation)
    for number in (1, 2, 3):
        simulation.crash(f"notary{number}", for_ns=60 * SECOND)
    asked(simulation, "stake", amount_micro=900_000)
    reply = simulation.command("nina", "stake", {"amount_micro": 200_000})
    assert reply.error is not None and reply.error["code"] == "insufficient-funds", "it is promised once"
    simulation.run(seconds=15)
    simulation.crash("nina", for_ns=2 * SECOND)
    simulation.run(seconds=5)
    (move,) = asked(simulation, "wallet")["moves"]
    assert (move["state"], move["code"]) == ("given-up", "silence")
    assert told(simulation, "stake-refused")
    simulation.run(seconds=params.CERTIFY_LATE_NS / SECOND + 60)
    wallet = asked(simulation, "wallet")
    assert (wallet["moves"][0]["state"], wallet["free_micro"], wallet["stake_micro"]) == ("void", 1_000_000, 0)
    for number in range(4):
        node = simulation.peers[f"notary{number}"].node
        assert node is not None and not node.certificates.notary.free
    asked(simulation, "stake", amount_micro=1_000_000)
    simulation.run(seconds=5)
    assert asked(simulation, "wallet")["stake_micro"] == 1_000_000
    simulation.check_quiet()


def test_what_cannot_be_moved_is_refused_with_the_reason() -> None:
    simulation = town(0)
    earn(simulation)
    for verb, micro, code in (
        ("stake", 1_000_001, "insufficient-funds"), ("unstake", 1_000, "insufficient-funds"), ("stake", 0, "usage"),
        ("stake", 999, "usage"), ("unstake", params.AMOUNT_MICRO_MAX + 1, "usage"), ("stake", -5, "usage"),
        ("stake", "1", "usage"), ("stake", True, "usage"),
    ):  # fmt: skip
        reply = simulation.command("nina", verb, {"amount_micro": micro})
        assert reply.error is not None and reply.error["code"] == code, (verb, micro, reply)
    assert simulation.command("nina", "stake", {}).error["code"] == "usage"  # type: ignore[index]
    assert not asked(simulation, "wallet")["moves"]
