"""Parallel jobs in simulated swarms: placed together, launched, signed for together, paid, replaced, taken back."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from peer.deals import agreement_of, task_of
from peer.messages import ReceiptOffer
from peer.run_events import LinkEnds
from peer.run_messages import UnitDisputed, UnitWaiting
from peer.simulated_faults import SECOND, Faults
from peer.simulator import Simulation
from protocol import params
from protocol.keys import peer_name
from protocol.lifecycle import State
from protocol.script import content_of
from tests.run_scene import make_run_swarm, run_state, run_until, submit_run, until_over
from tests.swarm_scenario import rest


def kinds(simulation: Simulation, name: str = "alice") -> Counter[str]:
    return Counter(kind for _, peer, kind, _ in simulation.log if peer == name)


def told(simulation: Simulation, kind: str, name: str = "alice") -> list[dict[str, Any]]:
    return [data for _, peer, what, data in simulation.log if (peer, what) == (name, kind)]


def test_a_run_of_two_by_two_is_placed_launched_checked_and_paid() -> None:
    simulation = make_run_swarm(1, solvers=5)
    job = submit_run(simulation)["job"]
    found = until_over(simulation, job)
    simulation.check_quiet()
    assert found["state"] == "done", found
    units = found["run"]["units"]
    solvers = {deal["solver"] for deal in found["deals"]}
    assert len(found["deals"]) == 4 and len(solvers) == 4  # each unit to a peer of its own, and the dearest is spare
    assert [unit["segments_done"] for unit in units] == [4] * 4
    assert found["run"]["epoch"] == 1 and not found["run"]["rewinds"]
    assert all(deal["state"] == "settled" and deal["receipts"] == 4 for deal in found["deals"])
    assert found["paid_micro"] == sum(deal["vouchers_micro"] for deal in found["deals"]) > 0
    assert found["spent_micro"] >= found["paid_micro"]


def launched(simulation: Simulation) -> bool:
    return bool(told(simulation, "launch"))


def segments(simulation: Simulation, count: int) -> bool:
    return len(told(simulation, "segment")) >= count


def solver_of(simulation: Simulation, job: str, unit: int) -> str:
    name = run_state(simulation, job)["run"]["units"][unit]["solver"]
    return next(p.name for p in simulation.peers.values() if peer_name(p.key.public) == name)


def test_a_unit_whose_solver_dies_goes_on_elsewhere_and_the_others_stay() -> None:
    simulation = make_run_swarm(2, solvers=5)
    job = submit_run(simulation, segments=6)["job"]
    run_until(simulation, lambda: segments(simulation, 2), seconds=60)
    dead = solver_of(simulation, job, 1)
    simulation.crash(dead, for_ns=0)
    before = {u: solver_of(simulation, job, u) for u in (0, 2, 3)}
    found = until_over(simulation, job)
    assert found["state"] == "done", found
    assert found["run"]["epoch"] == 2 and not found["run"]["rewinds"]
    (lost,) = told(simulation, "unit-lost")
    assert lost["unit"] == 1 and lost["receipts"] == 2
    assert len(found["deals"]) == 5
    held = {d["solver"]: d for d in found["deals"]}
    assert all(held[peer_name(simulation.peers[name].key.public)]["receipts"] == 6 for name in before.values())
    first = held[peer_name(simulation.peers[dead].key.public)]
    assert first["receipts"] == 2 and first["paid_micro"] == first["vouchers_micro"] > 0  # both are paid for theirs
    simulation.peers[dead].node = None
    simulation.check_quiet()


def test_a_solver_that_was_only_away_for_a_moment_keeps_its_unit() -> None:
    simulation = make_run_swarm(3, solvers=4)
    job = submit_run(simulation, segments=6)["job"]
    run_until(simulation, lambda: segments(simulation, 2), seconds=60)
    simulation.crash(solver_of(simulation, job, 3), for_ns=1 * SECOND)
    found = until_over(simulation, job)
    simulation.check_quiet()
    assert found["state"] == "done" and len(found["deals"]) == 4 and found["run"]["epoch"] == 1


def test_a_cheating_unit_is_slashed_and_the_run_goes_on_without_it() -> None:
    simulation = make_run_swarm(4, solvers=6, s1={"cheat": "skip-step"})
    job = submit_run(simulation)["job"]
    found = until_over(simulation, job, seconds=1200)
    simulation.check_quiet()
    assert found["state"] == "done", found
    cheat = peer_name(simulation.peers["s1"].key.public)
    assert found["culprits"] == [cheat] and found["slashed_micro"] > 0
    assert [d["state"] for d in found["deals"] if d["solver"] == cheat] == ["slashed"]
    assert found["run"]["rewinds"] == 1  # what the others computed beside it rests on what it sent
    assert all(d["paid_micro"] == d["vouchers_micro"] > 0 for d in found["deals"] if d["solver"] != cheat)
    honest = {u["root"] for u in found["run"]["units"]}
    clean = make_run_swarm(5, solvers=4)
    again = until_over(clean, submit_run(clean)["job"])
    assert {u["root"] for u in again["run"]["units"]} == honest


def test_a_unit_whose_solver_declines_is_placed_alone() -> None:
    simulation = make_run_swarm(6, solvers=5)
    job = submit_run(simulation)["job"]
    run_until(simulation, lambda: bool(told(simulation, "unit-matched")), seconds=30)
    victim = told(simulation, "unit-matched")[0]["solver"]
    name = simulation.by_key[victim].name
    simulation.command(name, "pause", {"within_ms": 0})
    found = until_over(simulation, job)
    simulation.check_quiet()
    assert found["state"] == "done", found
    matched = told(simulation, "unit-matched")
    assert len(matched) == 5 and len({m["unit"] for m in matched}) == 4
    assert len(told(simulation, "launch")) == 1  # nobody began before all had agreed


@pytest.mark.parametrize("after", [0, 2])
def test_a_restart_of_the_submitter_changes_nothing(after: int) -> None:
    simulation = make_run_swarm(7, solvers=4)
    job = submit_run(simulation, segments=6)["job"]
    run_until(simulation, lambda: segments(simulation, after) and bool(told(simulation, "unit-step")), seconds=60)
    simulation.crash("alice", for_ns=4 * SECOND)
    simulation.run(seconds=5)
    found = until_over(simulation, job)
    simulation.check_quiet()
    assert found["state"] == "done", found
    assert len(found["deals"]) == 4 and not found["run"]["rewinds"] and found["run"]["epoch"] == 1


def test_with_too_few_peers_it_says_why_it_waits() -> None:
    small = {"memory_bytes": 2**21}
    simulation = make_run_swarm(8, solvers=4, s2=small, s3=small)
    job = submit_run(simulation, memory_bytes=[2**20, 2**22, 2**22, 2**22])["job"]
    simulation.run(seconds=20)
    assert run_state(simulation, job)["state"] == "placing"
    assert not told(simulation, "unit-matched")  # nobody is bound while one is missing
    why = simulation.command("alice", "why", {"of": job}).result
    words = "; ".join(reason["words"] for reason in why["reasons"])
    assert "3 of 4 units have a solver" in words and "unit 3 has bids only of solvers" in words, words
    assert any("memory" in advice["words"] for advice in why["advice"]), why["advice"]
    simulation.command("alice", "cancel", {"job": job})
    assert until_over(simulation, job, seconds=60)["state"] == "cancelled"
    simulation.check_quiet()


def test_units_that_differ_about_a_link_both_make_room() -> None:
    simulation = make_run_swarm(9, solvers=7)
    simulation.peers["s0"].link_lie = True
    job = submit_run(simulation)["job"]
    found = until_over(simulation, job, seconds=1200)
    simulation.check_quiet()
    assert found["state"] == "done", found
    assert found["run"]["rewinds"] >= 1
    liar = peer_name(simulation.peers["s0"].key.public)
    assert not any(d["vouchers_micro"] for d in found["deals"] if d["solver"] == liar)


def name(simulation: Simulation, peer: str) -> str:
    return peer_name(simulation.peers[peer].key.public)


def rests(simulation: Simulation) -> set[str]:
    """Who rested in any unit of alice's runs."""
    alice = simulation.peers["alice"].node
    assert alice is not None
    return {simulation.by_key[peer].name for job in alice.jobs.jobs.values() for peer in job.resting}


def test_a_unit_whose_tensors_nobody_can_decode_makes_room_and_those_who_said_so_do_not() -> None:
    simulation = make_run_swarm(15, solvers=8)
    simulation.peers["s0"].garbles = True
    job = submit_run(simulation)["job"]
    found = until_over(simulation, job, seconds=3000)
    simulation.check_quiet()
    assert found["state"] == "done", found
    assert found["culprits"] in ([], [name(simulation, "s0")]) and not found["slashed_micro"]
    quarrels = told(simulation, "quarrel")
    assert quarrels and {q["sender"] for q in quarrels} == {simulation.peers["s0"].key.public}
    assert {q["what"] for q in quarrels} == {"no-tensor"}
    assert all(d["paid_micro"] == d["vouchers_micro"] for d in found["deals"])
    problems = [data for _, peer, kind, data in simulation.log if kind == "gave-up"]
    assert not problems, "nobody gave its deal up, as who fails does"


def test_a_unit_that_a_second_neighbour_complains_of_is_replaced_alone() -> None:
    simulation = make_run_swarm(16, solvers=5)
    simulation.peers["s0"].garbles = True
    job = submit_run(simulation)["job"]
    found = until_over(simulation, job, seconds=3000)
    simulation.check_quiet()
    assert found["state"] == "done", found
    assert found["culprits"] == [name(simulation, "s0")] and not found["slashed_micro"]
    assert told(simulation, "quarrel")[-1]["guilty"] == simulation.peers["s0"].key.public
    assert rests(simulation) <= {"s0"}, "who complained of it rests no longer"


def test_of_two_who_quarrel_the_one_that_was_complained_of_is_tried_again_first() -> None:
    simulation = make_run_swarm(17, solvers=5)
    simulation.peers["s0"].slanders = True
    job = submit_run(simulation)["job"]
    found = until_over(simulation, job, seconds=3000)
    simulation.check_quiet()
    assert found["state"] == "done" and found["run"]["rewinds"] == 1, found
    (quarrel,) = told(simulation, "quarrel")
    assert quarrel["receiver"] == simulation.peers["s0"].key.public and not quarrel["guilty"]
    assert found["culprits"] == [] and not found["slashed_micro"]


def test_a_unit_that_complains_of_one_neighbour_after_the_other_is_the_one_to_go() -> None:
    simulation = make_run_swarm(21, solvers=4)  # all are needed, so they meet again
    simulation.peers["s0"].slanders = True
    job = submit_run(simulation)["job"]
    run_until(simulation, lambda: bool(run_state(simulation, job)["culprits"]), seconds=3000)
    assert run_state(simulation, job)["culprits"] == [name(simulation, "s0")]
    assert {q["receiver"] for q in told(simulation, "quarrel")} == {simulation.peers["s0"].key.public}
    assert rests(simulation) <= {"s0"}
    simulation.command("alice", "cancel", {"job": job})
    found = until_over(simulation, job)
    simulation.check_quiet()
    assert found["state"] == "cancelled" and not found["slashed_micro"]


@pytest.mark.parametrize("fault", ["garbles", "slanders"])
def test_beside_a_unit_that_is_kept_who_is_wrong_is_known_at_once(fault: str) -> None:
    simulation = make_run_swarm(18, solvers=3)
    setattr(simulation.peers["s0"], fault, True)
    job = submit_run(simulation, stages=3, replicas=1, kept=(0, 2))["job"]
    found = until_over(simulation, job, seconds=600)
    simulation.check_quiet()
    assert found["state"] == "done", found
    assert found["run"]["rewinds"] == 1 and found["culprits"] == [name(simulation, "s0")]
    (quarrel,) = told(simulation, "quarrel")
    assert quarrel["guilty"] == simulation.peers["s0"].key.public and not found["slashed_micro"]


def test_a_quarrel_that_never_ends_ends_the_run() -> None:
    simulation = make_run_swarm(19, solvers=2)
    simulation.peers["s0"].garbles = True
    job = submit_run(simulation, stages=2, replicas=1)["job"]
    found = until_over(simulation, job, seconds=6000)
    simulation.check_quiet()
    assert found["state"] == "failed" and "could not decode" in found["reason"], found
    assert len(told(simulation, "quarrel")) <= params.REWINDS_MAX
    assert all(d["paid_micro"] == d["vouchers_micro"] for d in found["deals"]) and not found["slashed_micro"]


@pytest.mark.parametrize("fault", ["garbles", "slanders"])
def test_a_restart_forgets_no_quarrel(fault: str) -> None:
    simulation = make_run_swarm(20, solvers=8)
    setattr(simulation.peers["s0"], fault, True)
    job = submit_run(simulation)["job"]
    run_until(simulation, lambda: bool(told(simulation, "quarrel")), seconds=120)
    node = simulation.peers["alice"].node
    assert node is not None
    before = node.runs.runs[bytes.fromhex(job)].quarrels
    simulation.crash("alice", for_ns=4 * SECOND)
    simulation.run(seconds=5)
    node = simulation.peers["alice"].node
    assert node is not None and before
    assert node.runs.runs[bytes.fromhex(job)].quarrels[: len(before)] == before
    found = until_over(simulation, job, seconds=3000)
    simulation.check_quiet()
    assert found["state"] == "done", found


def test_a_complaint_that_is_repeated_after_its_deal_is_over_keeps_nobody_resting() -> None:
    simulation = make_run_swarm(17, solvers=5)
    simulation.peers["s0"].slanders = True
    job = submit_run(simulation)["job"]
    run_until(simulation, lambda: bool(told(simulation, "quarrel")), seconds=120)
    alice, (quarrel,) = simulation.peers["alice"].node, told(simulation, "quarrel")
    assert alice is not None
    deal = next(d for d in alice.submitter.deals.values() if alice.submitter.solver_of(d) == quarrel["receiver"])
    resting = [dict(child.resting) for child in alice.jobs.jobs.values()]
    unit = next(
        child.unit for child in alice.jobs.jobs.values() for one in child.deals
        if one != deal.id and alice.submitter.solver_of(alice.submitter.deals[one]) == quarrel["sender"]
    )  # fmt: skip
    segment = agreement_of(deal, simulation.network.id).first_segment + deal.receipts
    again = UnitDisputed(deal.id, segment, unit, quarrel["sender"], "no-tensor")
    simulation.run(seconds=1)
    alice.runs.quarrels.on_disputed(quarrel["receiver"], again)
    assert [dict(child.resting) for child in alice.jobs.jobs.values()] == resting
    assert len(told(simulation, "quarrel")) == 1
    assert until_over(simulation, job, seconds=3000)["state"] == "done"
    simulation.check_quiet()


def test_no_receipt_counts_of_a_unit_that_was_not_launched() -> None:
    simulation = make_run_swarm(1, solvers=5)
    job = submit_run(simulation)["job"]
    alice = simulation.peers["alice"].node
    assert alice is not None
    run_until(simulation, lambda: any(deal.lifecycle == State.RUNNING for deal in alice.submitter.deals.values()))
    deal = next(deal for deal in alice.submitter.deals.values() if deal.lifecycle == State.RUNNING)
    alice.runs.runs[bytes.fromhex(job)].peers.clear()  # as before the first launch, and after the run went back
    alice.runs.deliver(
        deal, ReceiptOffer(b""), SimpleNamespace(segment=0, out_root=b"", checkpoint=b""),  # type: ignore[arg-type]
        LinkEnds(b"", b"", b""),
    )  # fmt: skip
    assert not alice.runs.held(deal), "whose the other units are is not known"
    assert until_over(simulation, job)["state"] == "done"


def test_units_that_train_on_while_their_submitter_is_away_hand_in_all_of_it_after() -> None:
    simulation = make_run_swarm(22, solvers=5)
    job = submit_run(simulation, segments=2 * params.HANDOVERS_KEPT)["job"]
    run_until(simulation, lambda: segments(simulation, 1))
    simulation.crash("alice", for_ns=40 * SECOND)
    simulation.run(seconds=40)
    ahead = [seat.ended for peer in simulation.peers.values() if peer.node for seat in peer.node.units.seats.values()]
    assert max(ahead) > params.HANDOVERS_KEPT + 1, ahead
    found = until_over(simulation, job)
    simulation.check_quiet()
    assert found["state"] == "done" and len(found["deals"]) == 4, found
    assert all(deal["receipts"] == 2 * params.HANDOVERS_KEPT for deal in found["deals"])


def test_who_says_that_it_waits_for_a_unit_that_has_handed_in_is_silent_all_the_same() -> None:
    simulation = make_run_swarm(3, solvers=6)
    job = submit_run(simulation)["job"]
    run_until(simulation, lambda: launched(simulation))
    alice = simulation.peers["alice"].node
    assert alice is not None
    children = [alice.jobs.jobs[unit] for unit in alice.jobs.jobs[bytes.fromhex(job)].units]
    deal = alice.submitter.deals[children[0].deal]
    culprit, take = alice.submitter.solver_of(deal), alice.submitter.receiving.on_receipt
    # It hands its tensors over, so the others come on; its receipt it keeps, and says that it waits for one of them.
    receiving: Any = alice.submitter.receiving
    receiving.on_receipt = lambda peer, offer: peer == culprit or take(peer, offer)
    for _ in range(150):
        alice.runs.watch.on_waiting(culprit, UnitWaiting(deal.id, (1,)))
        simulation.run(seconds=1)
        if deal.ended_early:
            break
    assert deal.ended_early, "it holds the others up"
    assert [one.id for one in alice.submitter.deals.values() if one.ended_early] == [deal.id], "and nobody else"
    receiving.on_receipt = take
    assert until_over(simulation, job)["state"] == "done"
    simulation.check_quiet()


def test_what_is_remembered_of_a_run_goes_with_it() -> None:
    simulation = make_run_swarm(2, solvers=5)
    job = submit_run(simulation, segments=3)["job"]
    run_until(simulation, lambda: segments(simulation, 1), seconds=60)
    simulation.crash(solver_of(simulation, job, 1), for_ns=0)
    assert until_over(simulation, job)["state"] == "done"
    alice = simulation.peers["alice"].node
    assert alice is not None
    assert not alice.runs.acks and not alice.runs.again and not alice.runs.delivered
    assert not alice.runs.watch.waits and not alice.runs.watch.launched_ns
    for name in ("s0", "s1", "s2", "s3", "s4"):
        node = simulation.peers[name].node
        assert node is None or not (node.unit_deals.held_ns or node.units.seats or node.units.given)
        assert node is None or not node.runs.watch.waits, "which is of whoever submits"


def test_the_submitter_keeps_the_first_unit_and_the_last() -> None:
    simulation = make_run_swarm(10, solvers=3)
    job = submit_run(simulation, stages=4, replicas=1, kept=(0, 3))["job"]
    found = until_over(simulation, job)
    simulation.check_quiet()
    assert found["state"] == "done", found
    me = peer_name(simulation.peers["alice"].key.public)
    assert [unit["solver"] == me for unit in found["run"]["units"] if unit["kept"]]
    assert len(found["deals"]) == 2 and all(d["receipts"] == 4 for d in found["deals"])
    assert [unit["segments_done"] for unit in found["run"]["units"]] == [4] * 4
    alice = simulation.peers["alice"]
    assert alice.node is not None
    units = [alice.node.jobs.jobs[bytes.fromhex(unit["job"])] for unit in found["run"]["units"]]
    for unit in units:  # what a kept unit is made of, and where it ended, is here and is given to nobody
        for blob in content_of(task_of(unit.task)) | {unit.base_blob}:
            assert blob in alice.blobs and alice.gives(blob, None) == (not unit.kept)


def test_what_a_unit_kept_is_not_served_for_another_job() -> None:
    simulation = make_run_swarm(13, solvers=3)
    first = submit_run(simulation, stages=4, replicas=1, kept=(0, 3))["job"]
    same = submit_run(simulation, stages=4, replicas=1, segments=5, kept=(0, 3))
    assert "job" in same, same  # it keeps the same
    refused = submit_run(simulation, stages=4, replicas=1, kept=(3,))
    assert refused["code"] == "cannot-seal" and "kept here" in refused["what"], refused
    for job in (first, same["job"]):
        simulation.command("alice", "cancel", {"job": job})
        until_over(simulation, job, seconds=60)
    simulation.check_quiet()
    still = submit_run(simulation, stages=4, replicas=1, kept=(3,))
    assert still["code"] == "cannot-seal", still  # its bytes are as private as before
    open_first = make_run_swarm(14, solvers=3)
    running = submit_run(open_first, stages=4, replicas=1)["job"]
    late = submit_run(open_first, stages=4, replicas=1, kept=(0, 3))
    assert late["code"] == "cannot-seal" and "open" in late["what"], late
    open_first.command("alice", "cancel", {"job": running})
    until_over(open_first, running, seconds=60)


def test_a_run_is_cancelled_in_the_middle_and_what_was_done_is_paid() -> None:
    simulation = make_run_swarm(11, solvers=4)
    job = submit_run(simulation, segments=6, kept=(0,))["job"]
    run_until(simulation, lambda: segments(simulation, 2), seconds=60)
    simulation.command("alice", "cancel", {"job": job})
    found = until_over(simulation, job)
    simulation.check_quiet()
    assert found["state"] == "cancelled"
    assert all(d["paid_micro"] == d["vouchers_micro"] > 0 for d in found["deals"])


def test_a_budget_below_the_sum_of_all_units_is_refused_with_the_sum() -> None:
    simulation = make_run_swarm(12, solvers=4)
    refused = submit_run(simulation, budget_micro=1000)
    assert refused["code"] == "insufficient-funds" and "4 units can cost" in refused["what"], refused
    with_less = submit_run(simulation, budget_micro=200_000_000)
    assert with_less["code"] == "insufficient-funds"


@pytest.mark.parametrize("seed", range(6))
def test_no_seed_breaks_a_run(seed: int) -> None:
    faults = Faults.drawn_from(seed)
    simulation = make_run_swarm(seed, solvers=6, faults=faults)
    job = submit_run(simulation)["job"]
    found = until_over(simulation, job, seconds=3000)
    rest(simulation, seconds=600)
    simulation.check_quiet()
    assert found["state"] == "done", (seed, found)
