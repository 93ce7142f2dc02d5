"""Two peers make a bench card: challenge, clock, check, probe, signature; and every way to cheat on the way.

The simulator runs the nodes as the daemon does; what a liar sends by hand goes in as a message of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from peer import messages as m
from peer.desk import Means
from peer.events import BenchMade, MessageIn, WorkChecked
from peer.node import Node
from peer.simulator import SECOND, Faults, Simulation
from protocol import params
from protocol.bench_card import open_challenge
from protocol.keys import SigningKey, peer_name
from protocol.network import Deposit, Network, Rules
from protocol.records import BenchCard, open_record

CALM = Faults(until_ns=0)
KEYS = {name: SigningKey.from_seed(bytes([i + 40]) * 32) for i, name in enumerate(("alice", "bob", "carol"))}
MEMORY = 40 * params.BENCH_MEMORY_BLOCK_BYTES


def market(seed: int = 1, faults: Faults = CALM) -> Simulation:
    """Alice, who times; bob and carol, who solve."""
    network = Network("bench", Rules(), tuple(Deposit(peer_name(k.public), 0, 10**8) for k in KEYS.values()))
    means = {name: Means(roles=0 if name == "alice" else 1, unit_price=1, memory_bytes=MEMORY) for name in KEYS}
    simulation = Simulation(seed=seed, keys=KEYS, peers=means, network=network, faults=faults)
    simulation.run(seconds=2)
    return simulation


def node(simulation: Simulation, name: str) -> Node:
    found = simulation.peers[name].node
    assert found is not None
    return found


def key(name: str) -> bytes:
    return KEYS[name].public


def bench(simulation: Simulation, name: str = "bob", challenger: str = "alice", **arguments: Any) -> None:
    reply = simulation.command(name, "bench", {"peer": peer_name(key(challenger)), **arguments})
    assert reply.error is None, reply.error


def told(simulation: Simulation, name: str, kind: str) -> list[dict[str, Any]]:
    return [data for _, who, what, data in simulation.log if (who, what) == (name, kind)]


def penalties(simulation: Simulation, accused: str) -> list[str]:
    return [reason for _, who, reason in simulation.penalties if who == accused]


def hear(simulation: Simulation, sender: str, message: m.Message, *, to: str = "alice") -> None:
    """A message made by hand arrives now."""
    peer = simulation.peers[to]
    simulation._handle(peer, MessageIn(key(sender), m.pack(message)))


def open_one(simulation: Simulation) -> bytes:
    """Bob is challenged and multiplies; the id of his challenge."""
    bench(simulation)
    simulation.run(seconds=30, until=lambda: bool(node(simulation, "alice").challenger.open))
    return next(iter(node(simulation, "alice").challenger.open))


# --- honest ------------------------------------------------------------------------------------------------
def test_a_peer_gets_a_card_that_says_what_the_challenger_saw() -> None:
    simulation = market()
    bench(simulation)
    simulation.run(seconds=60)
    (card,) = told(simulation, "bob", "bench-card")
    assert card["grade"] == "witnessed"
    assert 0.95e10 < card["speed"] <= 1e10  # what the network took counts against it
    proven = node(simulation, "alice").challenger.proven[key("bob")]
    assert proven.proven_memory_bytes == MEMORY
    assert penalties(simulation, "bob") == []


def test_the_card_is_gossiped_and_matching_believes_only_who_timed_it() -> None:
    simulation = market()
    bench(simulation)
    simulation.run(seconds=60)
    assert node(simulation, "alice").challenger.speed_of(key("bob")).grade == "witnessed"
    heard = node(simulation, "carol").challenger.speed_of(key("bob"))
    assert (heard.grade, heard.operations_per_second > 0) == ("self-timed", True)
    assert node(simulation, "alice").jobs.speed_of(key("carol")).grade == "none"


def test_cards_survive_a_restart_of_both_and_end_with_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "BENCH_CARD_LIFETIME_NS", 120 * SECOND)
    simulation = market()
    bench(simulation)
    simulation.run(seconds=60)
    for name in ("alice", "bob"):
        simulation.crash(name)
    simulation.run(seconds=30)
    assert node(simulation, "alice").challenger.speed_of(key("bob")).grade == "witnessed"
    assert node(simulation, "bob").prover.card
    simulation.run(seconds=100)
    assert node(simulation, "alice").challenger.speed_of(key("bob")).grade == "none"
    assert not node(simulation, "bob").prover.card


@pytest.mark.parametrize("seed", range(6))
def test_lost_doubled_and_late_messages_end_in_a_card_or_in_a_plain_refusal(seed: int) -> None:
    faults = replace(Faults.drawn_from(seed), loss=0.2, duplication=0.2, crash=0.0, delay_ns_max=SECOND // 2)
    simulation = market(seed, replace(faults, until_ns=300 * SECOND))
    bench(simulation)
    simulation.run(seconds=200)
    ends = told(simulation, "bob", "bench-card") + told(simulation, "bob", "bench-refused")
    assert len(ends) == 1, f"seed {seed}: {ends}"
    assert penalties(simulation, "bob") == penalties(simulation, "alice") == [], f"seed {seed}"
    assert not node(simulation, "alice").challenger.open
    assert node(simulation, "bob").prover.bench is None


def test_who_asks_again_at_once_is_told_to_rest() -> None:
    simulation = market()
    bench(simulation)
    simulation.run(seconds=40)
    bench(simulation)
    simulation.run(seconds=10)
    assert told(simulation, "bob", "bench-refused")[-1]["code"] == "busy"


def test_a_peer_at_work_makes_no_card() -> None:
    simulation = market()
    prover = node(simulation, "bob").prover
    prover.free = lambda: False
    reply = simulation.command("bob", "bench", {"peer": peer_name(key("alice"))})
    assert reply.error is not None
    assert "at work" in reply.error["what"]


def test_an_invited_solver_comes_by_itself() -> None:
    simulation = market()
    reply = simulation.command("alice", "challenge", {"peers": []})
    assert len(reply.result["invited"]) == 2
    simulation.run(seconds=90)
    assert set(node(simulation, "alice").challenger.proven) == {key("bob"), key("carol")}
    cards = simulation.command("alice", "cards", {}).result["cards"]
    assert [card["timed"] for card in cards] == ["by this peer"] * 2


# --- lies --------------------------------------------------------------------------------------------------
def test_a_result_of_another_chain_is_refused_and_penalised() -> None:
    simulation = market()
    simulation.peers["bob"].bench_lie = "result"
    bench(simulation)
    simulation.run(seconds=60)
    assert told(simulation, "bob", "bench-refused")[-1]["code"] == "verification-failed"
    assert len(penalties(simulation, "bob")) == 1
    assert not node(simulation, "alice").challenger.proven


def test_memory_filled_for_another_challenge_is_refused_and_penalised() -> None:
    simulation = market()
    simulation.peers["bob"].bench_lie = "memory"
    bench(simulation)
    simulation.run(seconds=60)
    assert "memory" in told(simulation, "alice", "unproven")[-1]["why"]
    assert len(penalties(simulation, "bob")) == 1


def test_who_claims_ten_times_its_speed_proves_only_what_it_has() -> None:
    simulation = market()
    simulation.peers["bob"].bench_lie = "claim"
    bench(simulation)
    simulation.run(seconds=400)
    proven = node(simulation, "alice").challenger.proven.get(key("bob"))
    assert proven is None or proven.operations_per_second <= 10**10
    assert told(simulation, "alice", "unproven")[-1]["code"] == "late"  # ten times the chain does not fit its window


def test_an_answer_after_the_window_is_refused_and_an_older_card_is_void() -> None:
    simulation = market()
    bench(simulation)
    simulation.run(seconds=100)
    assert key("bob") in node(simulation, "alice").challenger.proven
    bench(simulation)
    simulation.peers["bob"].bench_speed //= 10**4  # the machine is throttled after it measured itself
    simulation.run(seconds=150)
    assert told(simulation, "alice", "unproven")[-1]["code"] == "late"
    assert key("bob") not in node(simulation, "alice").challenger.proven


def test_an_answer_that_comes_one_nanosecond_late_is_late() -> None:
    simulation = market()
    challenge = open_one(simulation)
    challenger = node(simulation, "alice").challenger
    one = challenger.open[challenge]
    simulation.now_ns = one.issued_ns + one.challenge.window_ns + 1
    hear(simulation, "bob", m.BenchDone(challenge, bytes(32)))
    assert challenge not in challenger.open
    assert told(simulation, "alice", "unproven")[-1]["code"] == "late"


def test_a_challenge_is_used_once() -> None:
    """A replay of everything that made a card makes no second one, nor does the same answer to a new challenge."""
    simulation = market()
    bench(simulation)
    simulation.run(seconds=60)
    challenger = node(simulation, "alice").challenger
    old = challenger.proven[key("bob")]
    before = len(told(simulation, "alice", "proven"))
    hear(simulation, "bob", m.BenchDone(old.challenge_id, old.card.evidence))
    hear(simulation, "bob", m.BenchOffer(_half(old.card)))
    assert not challenger.open
    simulation.run(seconds=60)
    bench(simulation)
    simulation.run(seconds=30, until=lambda: bool(challenger.open))
    fresh = next(iter(challenger.open))
    assert fresh != old.challenge_id
    hear(simulation, "bob", m.BenchDone(fresh, old.card.evidence))
    simulation.run(seconds=10)
    assert told(simulation, "alice", "unproven")[-1]["code"] == "verification-failed"
    assert len(told(simulation, "alice", "proven")) == before


def _half(card: BenchCard) -> bytes:
    from protocol.records import seal

    return seal(card, KEYS["bob"])


def test_nobody_answers_anothers_challenge() -> None:
    simulation = market()
    challenge = open_one(simulation)
    hear(simulation, "carol", m.BenchDone(challenge, bytes(32)))
    assert not node(simulation, "alice").challenger.open[challenge].evidence
    simulation.run(seconds=60)
    assert key("bob") in node(simulation, "alice").challenger.proven


def test_a_card_that_names_a_shorter_time_than_was_seen_is_refused() -> None:
    simulation = market()
    challenge = open_one(simulation)
    prover = node(simulation, "bob").prover
    simulation.run(seconds=60, until=lambda: prover.bench is not None and prover.bench.elapsed_ns > 0)
    assert prover.bench is not None
    prover.bench.elapsed_ns //= 2
    simulation.run(seconds=30)
    assert challenge not in node(simulation, "alice").challenger.open
    assert "another result, time" in told(simulation, "alice", "unproven")[-1]["why"]
    assert len(penalties(simulation, "bob")) == 1


def test_a_second_other_answer_is_a_lie() -> None:
    simulation = market()
    challenge = open_one(simulation)
    hear(simulation, "bob", m.BenchDone(challenge, bytes(32)))
    hear(simulation, "bob", m.BenchDone(challenge, b"\1" * 32))
    assert len(penalties(simulation, "bob")) == 1
    assert challenge not in node(simulation, "alice").challenger.open


def test_memory_that_is_opened_too_late_is_not_believed() -> None:
    simulation = market()
    challenge = open_one(simulation)
    bob = simulation.peers["bob"]
    simulation.run(seconds=60, until=lambda: bool(node(simulation, "alice").challenger.open[challenge].card))
    bob.life += 1  # its process hangs: nothing that is under way arrives
    simulation.run(seconds=20)
    assert told(simulation, "alice", "unproven")[-1]["code"] == "probe-late"


def test_a_challenge_nobody_asked_for_is_declined() -> None:
    simulation = market()
    challenge = open_one(simulation)
    envelope = node(simulation, "alice").challenger.open[challenge].envelope
    prover = node(simulation, "bob").prover
    prover.asking, prover.wish = b"", None
    hear(simulation, "alice", m.BenchStart(envelope), to="bob")
    assert prover.bench is None
    simulation.run(seconds=5)
    assert told(simulation, "alice", "unproven")[-1]["code"] == "not-asked"


def test_a_challenge_meant_for_another_is_a_lie_of_its_sender() -> None:
    simulation = market()
    envelope = node(simulation, "alice").challenger.open[open_one(simulation)].envelope
    hear(simulation, "alice", m.BenchStart(envelope), to="carol")
    assert len(penalties(simulation, "alice")) == 1


def test_a_bench_that_nobody_started_makes_nothing() -> None:
    simulation = market()
    simulation._handle(simulation.peers["bob"], BenchMade(bytes(32), bytes(32)))
    assert node(simulation, "bob").prover.bench is None


# --- one machine behind two names --------------------------------------------------------------------------
def twin() -> Simulation:
    """Bob has a card of alice; carol is the same device by its description."""
    simulation = market()
    for name in ("bob", "carol"):
        simulation.peers[name].device = "the same"
    bench(simulation, "bob")
    simulation.run(seconds=100)
    assert set(node(simulation, "alice").challenger.proven) == {key("bob")}
    return simulation


def challenges(simulation: Simulation) -> list[tuple[int, bytes]]:
    return [(at, data["peer"]) for at, who, kind, data in simulation.log if (who, kind) == ("alice", "challenge")]


def test_look_alikes_are_challenged_at_the_same_moment() -> None:
    simulation = twin()
    before = len(challenges(simulation))
    bench(simulation, "carol")
    simulation.run(seconds=60)
    fresh = challenges(simulation)[before:]
    assert {peer for _, peer in fresh} == {key("bob"), key("carol")}
    assert len({at for at, _ in fresh}) == 1
    assert set(node(simulation, "alice").challenger.proven) == {key("bob"), key("carol")}


def test_a_look_alike_that_was_challenged_a_moment_ago_may_come_again() -> None:
    simulation = market()
    for name in ("bob", "carol"):
        simulation.peers[name].device = "the same"
    bench(simulation, "bob")
    simulation.run(seconds=60, until=lambda: bool(told(simulation, "bob", "bench-card")))
    bench(simulation, "carol")
    simulation.run(seconds=60)
    assert set(node(simulation, "alice").challenger.proven) == {key("bob"), key("carol")}
    assert told(simulation, "alice", "unproven") == []


def test_a_look_alike_that_does_not_come_forward_loses_its_card() -> None:
    simulation = twin()
    node(simulation, "bob").prover.free = lambda: False  # it says that it is busy: one machine cannot do both
    bench(simulation, "carol")
    simulation.run(seconds=90)
    assert set(node(simulation, "alice").challenger.proven) == {key("carol")}
    assert told(simulation, "alice", "unproven")[-1]["code"] == "absent"


def test_a_copied_description_without_the_machine_takes_no_card_away() -> None:
    simulation = twin()
    node(simulation, "bob").prover.free = lambda: False
    simulation.peers["carol"].bench_lie = "result"
    bench(simulation, "carol")
    simulation.run(seconds=90)
    assert set(node(simulation, "alice").challenger.proven) == {key("bob")}


def test_invitations_are_followed_at_their_rate() -> None:
    simulation = market()
    for _ in range(5):
        simulation.command("alice", "challenge", {"peers": [peer_name(key("bob"))]})
        simulation.run(seconds=80)
    assert len(told(simulation, "bob", "bench-card")) == 1


def test_a_first_chain_is_not_sized_by_a_boast() -> None:
    simulation = market()
    simulation.peers["bob"].bench_speed = 10**16
    bench(simulation)
    simulation.run(seconds=60)
    (sized,) = told(simulation, "alice", "challenge")
    assert 4 * sized["side"] ** 3 * sized["links"] <= params.BENCH_FIRST_SPEED_MAX * params.BENCH_TARGET_NS // 10**9
    simulation.run(seconds=60)
    bench(simulation)
    simulation.run(seconds=60)
    assert told(simulation, "alice", "challenge")[-1]["links"] > sized["links"]


def test_a_card_that_runs_out_before_it_is_signed_stops_nobody() -> None:
    simulation = market()
    challenge = open_one(simulation)
    one = node(simulation, "alice").challenger.open[challenge]
    simulation.run(seconds=60, until=lambda: bool(one.card))
    record = open_record(one.card, network=simulation.network.id)[0]
    assert isinstance(record, BenchCard)
    one.card = _half(structs.replace(record, expires_ns=record.created_ns + 1))
    one.probed = True
    simulation._handle(simulation.peers["alice"], WorkChecked(challenge))
    assert "expired" in told(simulation, "alice", "problem")[-1]["what"]
    simulation.run(seconds=120)
    assert not node(simulation, "alice").challenger.open


def test_a_copied_description_calls_its_victim_once_and_not_for_ever() -> None:
    simulation = twin()
    bench(simulation, "carol")
    simulation.run(seconds=100)
    before = len(challenges(simulation))
    bench(simulation, "carol")
    simulation.run(seconds=100)
    assert [peer for _, peer in challenges(simulation)[before:]] == [key("carol")]


def test_a_card_of_another_device_than_was_asked_for_is_refused() -> None:
    simulation = market()
    open_one(simulation)
    prover = node(simulation, "bob").prover
    assert prover.figures is not None
    prover.figures = structs.replace(prover.figures, device="another")
    simulation.run(seconds=60)
    assert "device" in told(simulation, "alice", "unproven")[-1]["why"]
    assert len(penalties(simulation, "bob")) == 1


def test_a_challenge_record_is_never_gossiped() -> None:
    simulation = market()
    envelope = node(simulation, "alice").challenger.open[open_one(simulation)].envelope
    hear(simulation, "alice", m.Records((envelope,)), to="carol")
    assert len(penalties(simulation, "alice")) == 1
    record, record_id, _ = open_record(envelope, network=simulation.network.id)
    assert open_challenge(envelope, network=simulation.network.id) == (record, record_id)
