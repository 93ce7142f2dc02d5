"""Certified openings in a swarm: a quorum is enough, fewer are waited for, and nobody's money is held back for ever."""

from __future__ import annotations

import pytest

from market.entries import BURNED, Account
from peer.simulator import SECOND, Simulation
from protocol import params
from protocol.certificate import check_certified
from protocol.records import Agreement, open_record
from tests.adversaries.stage import STAKE_MICRO, Stage, stage_of
from tests.adversaries.strategies import DoubleReservation
from tests.dispute_swarm import court, settle, told
from tests.swarm_scenario import job_state, submit


def openings(simulation: Simulation, name: str = "notary0") -> list[tuple[Agreement, frozenset[bytes]]]:
    """Every opening in a peer's log, with who signed it."""
    node = simulation.peers[name].node
    assert node is not None
    opened = [open_record(envelope, network=simulation.network.id) for envelope in node.settler.log.values()]
    return [(record, signers) for record, _, signers in opened if isinstance(record, Agreement)]


def set_aside(simulation: Simulation) -> dict[str, int]:
    """How many agreements each notary sets money aside for."""
    found = {}
    for name, peer in simulation.peers.items():
        if name.startswith("notary") and peer.node is not None:
            rows = peer.node.certificates.notary.rows.values()
            found[name] = sum(not row.void for row in rows)
    return found


@pytest.mark.parametrize("down", [0, 1])
def test_a_quorum_of_notaries_certifies_every_opening(down: int) -> None:
    simulation = court(3)
    simulation.run(seconds=3)
    for number in range(4 - down, 4):
        simulation.crash(f"notary{number}", for_ns=0)
    state = settle(simulation, submit(simulation))
    assert (state["state"], state["retried"]) == ("done", 0)
    ((agreement, signers),) = openings(simulation)
    check_certified(agreement, signers, simulation.network)
    assert not any(set_aside(simulation).values())
    alice = simulation.peers["alice"].node
    assert alice is not None and not alice.certificates.asked


def test_without_a_quorum_nothing_opens_and_why_says_so() -> None:
    simulation = court(4)
    simulation.run(seconds=3)
    for number in (2, 3):
        simulation.crash(f"notary{number}", for_ns=60 * SECOND)
    job = submit(simulation)
    simulation.run(seconds=40, until=lambda: bool(told(simulation, "reoffer")))
    assert not openings(simulation)
    reasons = simulation.command("alice", "why", {"of": job}).result["reasons"]
    assert "uncertified-silence" in {reason["code"] for reason in reasons}, reasons
    state = settle(simulation, job)
    assert state["state"] == "done"
    simulation.run(seconds=120)
    assert not any(set_aside(simulation).values()), "two had signed what was given up: it was completed, and claimed"
    simulation.check_quiet()


def left_by(stage: Stage) -> Stage:
    """Alice submits, asks as her strategy says, and is gone; then all others come to rest."""
    stage.run(seconds=3)
    submit(stage)
    stage.run(seconds=60, until=lambda: "alice" in stage.gone)
    stage.run(seconds=120)
    return stage


def test_a_balance_that_is_reserved_twice_opens_nothing_and_bars_its_owner() -> None:
    stage = left_by(stage_of(0, {"alice": DoubleReservation()}))
    assert not openings(stage)
    nodes = [peer.node for name, peer in stage.peers.items() if name != "alice"]
    assert all(node is not None and stage.public("alice") in node.witness.barred for node in nodes)
    stage.check_quiet()  # one ledger: it burned once, however many saw it
    ledger, word = stage.node("bob").desk.ledger, stage.network.rules.checker_stake_min_micro
    assert ledger.balance_micro(Account(stage.public("alice"), "stake")) == STAKE_MICRO - word
    assert ledger.balance_micro(BURNED) == word


def test_a_submitter_that_stops_at_two_signatures_holds_no_stake_of_its_solver() -> None:
    stage = left_by(stage_of(0, {"alice": DoubleReservation(2, other="")}))
    assert len(openings(stage)) == 1, "its solver had it certified"
    stage.run(seconds=120)  # a solver claims alone after the time of two checks, and its lock outlasts that
    assert not any(set_aside(stage).values())
    bob = stage.node("bob")
    assert bob.desk.ledger.balance_micro(Account(bob.desk.me, "stake")) == STAKE_MICRO
    assert not bob.certificates.asked
    stage.check_quiet()


def test_nor_does_one_that_stops_at_one() -> None:
    stage = left_by(stage_of(0, {"alice": DoubleReservation(1, other="")}))
    assert sum(set_aside(stage).values()) == 1
    assert stage.node("bob").certificates.in_doubt_micro("stake") > 0
    stage.run(seconds=params.CERTIFY_LATE_NS / SECOND)
    assert not any(set_aside(stage).values()) and not openings(stage)
    assert stage.node("bob").certificates.in_doubt_micro("stake") == 0
    stage.check_quiet()


def test_what_was_in_doubt_is_brought_to_an_end_after_a_restart() -> None:
    stage = left_by(stage_of(0, {"alice": DoubleReservation(1, other="")}))
    for name in ("bob", *(f"notary{number}" for number in range(4))):
        stage.crash(name, for_ns=2 * SECOND)
    stage.run(seconds=params.CERTIFY_LATE_NS / SECOND)
    assert not any(set_aside(stage).values())
    assert stage.node("bob").certificates.in_doubt_micro("stake") == 0
    assert job_state(stage, "") == {}
