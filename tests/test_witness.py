"""Who shows one ask to some and another to others is barred by all, and by proof alone."""

from __future__ import annotations

import msgspec
import pytest

from peer.events import GossipIn, Penalise
from peer.simulator import SECOND, Faults, SimulatedPeer, Simulation
from protocol import params
from protocol.codec import encode
from protocol.equivocation import prove
from protocol.keys import peer_name
from protocol.records import Agreement, Ask, open_record, seal
from tests.swarm_scenario import job_state, make_swarm, submit

CALM = Faults(until_ns=0)


@pytest.fixture
def swarm() -> Simulation:
    simulation = make_swarm(1, CALM)
    simulation.run(seconds=3)
    return simulation


def twins(simulation: Simulation, name: str) -> tuple[bytes, bytes]:
    """The ask that `name` shows, and another of the same number that it would show to others."""
    peer = simulation.peers[name]
    assert peer.node is not None
    shown = peer.node.bidder.ask
    ask, _, _ = open_record(shown, network=simulation.network.id)
    assert isinstance(ask, Ask)
    return shown, seal(msgspec.structs.replace(ask, unit_price=ask.unit_price + 1), peer.key)


def hear(simulation: Simulation, listener: str, author: str, envelope: bytes) -> None:
    simulation.at(
        0, simulation.peers[listener], GossipIn("market", simulation.peers[author].key.public, encode([envelope]))
    )


def barring(simulation: Simulation, culprit: SimulatedPeer) -> set[str]:
    return {
        name for name, peer in simulation.peers.items() if peer.node and culprit.key.public in peer.node.witness.barred
    }


def test_one_witness_is_enough_for_all_and_the_work_goes_to_another(swarm: Simulation) -> None:
    bob = swarm.peers["bob"]
    hear(swarm, "alice", "bob", twins(swarm, "bob")[1])
    swarm.run(seconds=5)
    assert barring(swarm, bob) == set(swarm.peers) - {"bob"}
    alice = swarm.peers["alice"].node
    assert alice is not None and not alice.desk.book.asks.count_of(bob.key.public)
    job = submit(swarm)
    swarm.run(seconds=900, until=lambda: job_state(swarm, job).get("state") == "done")
    swarm.run(seconds=240)
    state = job_state(swarm, job)
    assert state["state"] == "done"
    assert [deal["solver"] for deal in state["deals"]] == [peer_name(swarm.peers["carol"].key.public)]  # type: ignore[attr-defined]
    swarm.check_quiet()


def test_a_bar_holds_over_a_restart_and_ends_for_good(swarm: Simulation) -> None:
    bob = swarm.peers["bob"]
    shown, other = twins(swarm, "bob")
    hear(swarm, "alice", "bob", other)
    swarm.run(seconds=2)
    swarm.crash("alice", for_ns=SECOND)
    swarm.run(seconds=5)
    assert "alice" in barring(swarm, bob)
    alice = swarm.peers["alice"].node
    assert alice is not None
    alice.desk.now_ns += params.BAR_NS
    alice.witness.tick()
    alice.witness.on_proof(prove(shown, other, network=swarm.network.id))
    assert "alice" not in barring(swarm, bob)


def test_nobody_is_barred_by_a_word_or_by_the_same_record_twice(swarm: Simulation) -> None:
    shown, other = twins(swarm, "bob")
    hear(swarm, "alice", "bob", shown)
    carol = swarm.peers["carol"].key
    proof = prove(shown, other, network=swarm.network.id)
    forged = msgspec.structs.replace(proof, culprit=swarm.peers["alice"].key.public)
    for lie in (forged, msgspec.structs.replace(proof, second=proof.first)):
        hear(swarm, "alice", "carol", seal(lie, carol))
    swarm.run(seconds=3)
    assert not any(barring(swarm, peer) for peer in swarm.peers.values())


def test_an_agreement_that_its_submitter_did_not_sign_takes_no_place(swarm: Simulation) -> None:
    """Or a stranger could keep a true one out: it would be the second of its number, and prove nothing."""
    submit(swarm)
    swarm.run(seconds=10)
    alice, carol, wendy = (swarm.peers[name] for name in ("alice", "carol", "wendy"))
    assert alice.node is not None and wendy.node is not None
    (envelope,) = [
        e for e in alice.node.settler.log.values()
        if isinstance(open_record(e, network=swarm.network.id)[0], Agreement)
    ]  # fmt: skip
    agreement, agreement_id, _ = open_record(envelope, network=swarm.network.id)
    assert isinstance(agreement, Agreement)
    wendy.node.witness.held.clear()
    forged = msgspec.structs.replace(agreement, solver=carol.key.public)
    hear(swarm, "wendy", "carol", seal(forged, carol.key))
    swarm.run(seconds=1)
    effects = wendy.node.handle(GossipIn("settlement", carol.key.public, encode([envelope])), swarm.now_ns)
    assert not [effect for effect in effects if isinstance(effect, Penalise)]
    assert [held for held, _ in wendy.node.witness.held.values() if held == agreement_id]
    assert not any(barring(swarm, peer) for peer in swarm.peers.values())


def two_orders(simulation: Simulation, name: str, **changes: int) -> list[bytes]:
    """Two agreements of `name` under one number, of now, to work for it by two others."""
    fields: dict[str, object] = {field.name: bytes(32) for field in msgspec.structs.fields(Agreement)}
    ones = ("operations", "unit_price", "segment_deadline_ns", "last_segment", "channel_micro", "sequence")
    fields |= dict.fromkeys(ones, 1) | {"first_segment": 0, "check_permille": 200, "lock_micro": 0}
    fields |= {"created_ns": simulation.now_ns, "accept_before_ns": simulation.now_ns + SECOND}
    fields |= {"network": simulation.network.id, "submitter": simulation.peers[name].key.public, **changes}
    solvers = (simulation.peers[other].key.public for other in ("carol", "wendy"))
    return [seal(Agreement(**{**fields, "solver": one}), simulation.peers[name].key) for one in solvers]  # type: ignore[arg-type]


def test_who_dates_its_orders_back_is_barred_no_less(swarm: Simulation) -> None:
    alice = swarm.peers["alice"]
    for envelope in two_orders(swarm, "alice", created_ns=1):
        hear(swarm, "wendy", "carol", envelope)
    swarm.run(seconds=2)
    assert barring(swarm, alice) == set(swarm.peers) - {"alice"}


def test_a_bar_does_not_save_the_stake_of_who_opens_twice(swarm: Simulation) -> None:
    bob, wendy = swarm.peers["bob"], swarm.peers["wendy"].node
    assert wendy is not None
    hear(swarm, "wendy", "bob", twins(swarm, "bob")[1])
    swarm.run(seconds=2)
    before = wendy.settler.free_stake(bob.key.public)
    for envelope in two_orders(swarm, "bob"):
        hear(swarm, "wendy", "carol", envelope)
    swarm.run(seconds=2)
    assert wendy.settler.free_stake(bob.key.public) == before - swarm.network.rules.checker_stake_min_micro
    swarm.run(seconds=60)
    swarm.check_quiet()  # all others heard of it with the next comparison of logs


def test_a_flood_of_places_keeps_the_newest(swarm: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "WITNESS_PLACES_MAX", 4)
    bob, alice = swarm.peers["bob"], swarm.peers["alice"].node
    assert alice is not None
    ask, _, _ = open_record(twins(swarm, "bob")[0], network=swarm.network.id)
    assert isinstance(ask, Ask)
    for number in range(10):
        made = msgspec.structs.replace(ask, sequence=ask.sequence + 1 + number)
        alice.handle(GossipIn("market", bob.key.public, encode([seal(made, bob.key)])), swarm.now_ns)
    assert [place[1][2] for place in alice.witness.held] == [ask.sequence + number for number in range(7, 11)]
