"""A large round of a run is played in a thread: it places as the node itself, and leaves out what changed meanwhile."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import trio

from market.placing import ChooseUnits, PlaceUnits, Placing, UnitsChosen, UnitsPlaced, check_placing, read_placing
from peer.effects import Performer
from peer.events import Command, Reply
from peer.node import Node
from peer.simulator import SECOND, Faults, Simulation
from protocol import params
from tests.run_scene import make_run_swarm, run_state, run_until, submit_run, until_over

NEVER = 10**9


@pytest.fixture(autouse=True)
def every_round_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "PLACING_THREAD_MIN", 0)


def alice(simulation: Simulation) -> Node:
    node = simulation.peers["alice"].node
    assert node is not None
    return node


def key_of(simulation: Simulation, name: str) -> bytes:
    return simulation.peers[name].key.public


def placings_of(simulation: Simulation, job: str) -> list[tuple[list[str], Placing]]:
    reply: Any = simulation.command("alice", "matches", {"job": job})
    return [(one["deals"], read_placing(bytes.fromhex(one["placing"]))) for one in reply.result["placings"]]


def proposed(simulation: Simulation) -> list[tuple[int, str]]:
    """Unit and solver of each proposal, in order."""
    node = alice(simulation)
    deals = [data["deal"] for _, who, kind, data in simulation.log if (who, kind) == ("alice", "unit-matched")]
    found = [node.submitter.deals[deal] for deal in deals]
    return [
        (node.jobs.jobs[deal.job].unit, simulation.by_key[node.submitter.solver_of(deal)].name) for deal in found
    ]


def awaiting(seed: int = 5, solvers: int = 6) -> tuple[Simulation, str, PlaceUnits]:
    """Alice waits for a round of a run of four units, in which so many solvers bid on each; and that round."""
    simulation = make_run_swarm(seed, solvers=solvers)
    effects: list[PlaceUnits] = []
    perform = simulation._perform

    def watched(peer: Any, given: Any, **how: Any) -> None:
        effects.extend(effect for effect in given if isinstance(effect, PlaceUnits))
        perform(peer, given, **how)

    simulation._perform = watched  # type: ignore[method-assign]
    simulation.run(seconds=3)
    job = submit_run(simulation)["job"]

    def begun() -> bool:
        whole = bool(effects) and all(len(one.bids) == solvers for one in effects[-1].round.units.values())
        return whole and bytes.fromhex(job) in alice(simulation).runs.market.awaited

    simulation.run(seconds=30, until=begun)
    assert begun()
    return simulation, job, effects[-1]


def expected(simulation: Simulation, effect: PlaceUnits) -> list[tuple[int, str]]:
    """Whom the round asks, if nothing changes."""
    chosen = effect.play().chosen
    assert chosen is not None
    return [(unit, simulation.by_key[one.bid.solver].name) for unit, one in sorted(chosen.items())]


@pytest.mark.parametrize("seed", range(4))
def test_a_thread_places_as_the_node_itself_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation, _, effect = awaiting(seed)
    monkeypatch.setattr(params, "PLACING_THREAD_MIN", NEVER)
    market, now_ns = alice(simulation).runs.market, simulation.now_ns
    fresh = replace(effect, round=replace(effect.round))  # nothing of it is reckoned yet
    here = fresh.play()
    simulation.run(seconds=0.2)
    assert proposed(simulation) == expected(simulation, effect) and len(proposed(simulation)) == 4
    assert here.chosen == effect.play().chosen and here.written == effect.play().written
    assert market.awaited == {} and simulation.now_ns > now_ns


@pytest.mark.parametrize("seed", range(3))
def test_a_run_is_done_over_placings_that_come_late_and_each_can_be_made_again(seed: int) -> None:
    simulation = make_run_swarm(seed, solvers=6, faults=Faults.drawn_from(seed))
    simulation.run(seconds=5)
    run_until(simulation, lambda: simulation.peers["alice"].node is not None)
    job = submit_run(simulation)["job"]
    state = until_over(simulation, job)
    assert state["state"] == "done", f"seed {seed}: {state['state']} {state['reason']}"
    found = placings_of(simulation, job)
    assert found
    for deals, placing in found:
        made = check_placing(placing)
        assert len(deals) == len(made.chosen) and any(deals)


def test_a_bid_that_is_gone_or_replaced_waits_for_the_next_round_and_the_others_are_asked() -> None:
    simulation, job, effect = awaiting()
    node, whole = alice(simulation), expected(simulation, effect)
    (gone, lost), (replaced, other) = whole[1], whole[2]
    book, units = node.desk.book, effect.round.units
    del book.bids[units[gone].offer_id][key_of(simulation, lost)]
    standing = book.bids[units[replaced].offer_id]
    _, bid = standing[key_of(simulation, other)]
    standing[key_of(simulation, other)] = (b"\x01" * 32, bid)
    simulation.run(seconds=0.2)
    assert proposed(simulation) == [whole[0], whole[3]]
    ((deals, placing),) = placings_of(simulation, job)
    assert [bool(deal) for deal in deals] == [True, False, False, True], "the row says whom nobody asked"
    assert len(check_placing(placing).chosen) == 4
    simulation.run(seconds=5)
    assert sorted(unit for unit, _ in proposed(simulation)) == [0, 1, 2, 3], "the next round places them"
    solvers = [name for _, name in proposed(simulation)]
    assert len(set(solvers)) == 4, "and beside the others, each its own"
    (_, again) = placings_of(simulation, job)[-1]
    assert len(again.units) < 4 and check_placing(again)
    assert until_over(simulation, job)["state"] == "done"


@pytest.mark.parametrize("why", ["left", "excluded", "late", "given other work"])
def test_a_solver_who_cannot_have_its_unit_any_more_is_not_asked(why: str) -> None:
    simulation, _, effect = awaiting()
    node, whole = alice(simulation), expected(simulation, effect)
    unit, name = whole[2]
    key, jobs = key_of(simulation, name), node.jobs.jobs
    if why == "left":
        del node.desk.peers[key]
    elif why == "excluded":
        next(job for job in jobs.values() if job.unit == unit).culprits.append(key)
    elif why == "late":
        offer_id = effect.round.units[unit].offer_id
        bid_id, bid = node.desk.book.bids[offer_id][key]
        node.desk.book.bids[offer_id][key] = (bid_id, msgspec.structs.replace(bid, expires_ns=node.desk.wall_ns))
    else:
        (child,) = [job for job in jobs.values() if job.unit == unit]
        other = msgspec.structs.replace(child, id=bytes(32), parent=b"", unit=-1, deal=b"\x07" * 32, solvers=[key])
        jobs[other.id] = other
    simulation.run(seconds=0.15)
    jobs.pop(bytes(32), None)
    assert proposed(simulation) == [one for one in whole if one[0] != unit]


def test_a_run_that_was_cancelled_meanwhile_asks_nobody() -> None:
    simulation, job, _ = awaiting()
    assert simulation.command("alice", "cancel", {"job": job}).error is None
    simulation.run(seconds=10)
    assert proposed(simulation) == []
    assert run_state(simulation, job)["state"] == "cancelled"


def test_a_run_whose_units_were_offered_anew_meanwhile_is_placed_anew() -> None:
    simulation, job, effect = awaiting()
    node = alice(simulation)
    for child in node.jobs.jobs.values():
        if child.unit >= 0:
            node.jobs.offer(child)
    simulation.run(seconds=0.2)
    assert proposed(simulation) == []
    simulation.run(seconds=10)
    assert len(proposed(simulation)) == 4
    assert until_over(simulation, job)["state"] == "done"
    offers = {one.offer_id for one in effect.round.units.values()}
    assert offers.isdisjoint(node.desk.book.offers)


def test_a_crash_between_the_round_and_its_outcome_loses_nothing() -> None:
    simulation, job, effect = awaiting()
    late = effect.play()
    simulation.crash("alice", for_ns=SECOND)
    simulation.run(seconds=3)
    node = alice(simulation)
    assert proposed(simulation) == [] and not placings_of(simulation, job), "nothing was written before it was asked"
    node.runs.on_placed(replace(late, number=NEVER))
    assert proposed(simulation) == [], "an outcome from before counts for nothing"
    assert until_over(simulation, job)["state"] == "done"
    for _, placing in placings_of(simulation, job):
        check_placing(placing)


async def test_the_daemon_places_units_outside_its_own_thread() -> None:
    _, _, effect = awaiting()
    threads: list[int] = []

    class Watched(PlaceUnits):
        def play(self) -> UnitsPlaced:
            threads.append(threading.get_ident())
            return super().play()

    send, receive = trio.open_memory_channel[Any](2)
    performer = object.__new__(Performer)
    performer.placing = trio.Lock()
    async with trio.open_nursery() as nursery:
        performer.nursery, performer.inbox = nursery, send
        for number in (7, 8):
            performer.perform(
                Watched(number, effect.run, effect.network, effect.round, effect.offers, effect.envelopes)
            )
        found = [await receive.receive() for _ in range(2)]
    assert {one.number for one in found} == {7, 8} and threads and threading.get_ident() not in threads
    assert found[0].chosen == effect.play().chosen


def test_a_plan_of_a_large_run_is_answered_when_a_thread_has_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = make_run_swarm(4, solvers=4)
    simulation.run(seconds=5)
    sizes = {
        "replicas": 1, "micro_batches": 1, "steps": 1, "steps_per_segment": 1, "operations": [10**9] * 4, "shares": [],
        "compressions": [{"forward_bits": 0, "backward_bits": 0}], "border_bytes": [[[5, 5]]] * 3, "shared_bytes": [],
    }  # fmt: skip
    node = alice(simulation)
    monkeypatch.setattr(params, "PLACING_THREAD_MIN", NEVER)
    at_once = simulation.command("alice", "plan-run", {"sizes": sizes})
    assert at_once.error is None
    monkeypatch.setattr(params, "PLACING_THREAD_MIN", 0)
    before_ns = simulation.now_ns
    later = simulation.command("alice", "plan-run", {"sizes": sizes})
    assert later == Reply(later.token, at_once.result) and simulation.now_ns > before_ns
    assert not node.commands.planning.asked
    node.commands.planning.on_chosen(UnitsChosen(NEVER, [0]))  # of another process: nobody to answer
    for token in range(params.PLANS_AWAITED_MAX):
        effects = node.handle(Command(token, "plan-run", {"sizes": sizes}), simulation.now_ns)
        assert [type(effect) for effect in effects if isinstance(effect, ChooseUnits | Reply)] == [ChooseUnits]
    error = simulation.command("alice", "plan-run", {"sizes": sizes}).error
    assert error is not None and error["code"] == "limit-exceeded"
