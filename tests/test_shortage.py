"""More work than machines: what is worth most goes first, all of it is done in the end, and nobody is blamed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from market.audit import check_match, read_match
from peer.simulator import Simulation
from protocol import params
from tests.market_scene import jobs_of, make_market, submit_job
from tests.swarm_scenario import rest


def events(simulation: Simulation, kind: str) -> list[dict[str, Any]]:
    return [data for _, _, name, data in simulation.log if name == kind]


@pytest.fixture(scope="module")
def shortage() -> Simulation:
    """Forty jobs of eight submitters for five solvers, until all are over."""
    simulation = make_market(1, submitters=8, solvers=5, floors=range(800, 1200))
    simulation.run(seconds=3)
    for number in range(40):
        submit_job(simulation, f"a{number % 8}", limit=1300 + number * 37 % 700, seed=number + 1)
    ends = ("done", "failed", "cancelled")
    simulation.run(
        seconds=600,
        until=lambda: simulation.counter % 500 == 0 and all(job["state"] in ends for job in jobs_of(simulation)),
    )
    return simulation


def test_forty_jobs_on_five_solvers_all_settle_and_none_counts_as_fruitless(shortage: Simulation) -> None:
    assert Counter(job["state"] for job in jobs_of(shortage)) == {"done": 40}
    jobs = [job for peer in shortage.peers.values() if peer.node for job in peer.node.jobs.jobs.values()]
    assert max(job.fruitless for job in jobs) <= 0
    assert not events(shortage, "reoffer"), "an offer that was passed over stands, it is not made anew"
    rest(shortage, seconds=240)
    shortage.check_quiet()  # with the check after every event: no slot was taken twice, every channel is closed


def test_a_slot_goes_to_work_that_is_worth_more_and_others_are_told_why(shortage: Simulation) -> None:
    declines = Counter(data["code"] for data in events(shortage, "refused"))
    assert set(declines) <= {"outbid", "busy"}
    assert declines["outbid"] > 0
    assert declines.total() < 4 * 40, "less than four a job; without a window and prices there were eleven"
    assert any("the slot went to work that pays up to" in data["why"] for data in events(shortage, "refused"))


def test_prices_rise_with_the_shortage_and_stay_between_floor_and_limit(shortage: Simulation) -> None:
    sold = [(data["solver"], data["unit_price"]) for data in events(shortage, "matched")]
    floors = {peer.key.public: peer.means.unit_price for peer in shortage.peers.values()}
    assert all(floors[solver] <= price < 2000 for solver, price in sold)
    assert any(price > floors[solver] * 5 // 4 for solver, price in sold)
    for peer in shortage.peers.values():
        if peer.node is not None and peer.means.roles & 1:
            assert peer.node.bidder.pricer.price < peer.means.unit_price * 5 // 4, "idle, it asks less again"


def test_every_match_of_the_shortage_can_be_made_again(shortage: Simulation) -> None:
    made = 0
    for name in (f"a{i}" for i in range(8)):
        for job in shortage.command(name, "jobs", {}).result["jobs"]:
            for one in shortage.command(name, "matches", {"job": job["job"]}).result["matches"]:
                check_match(read_match(bytes.fromhex(one["match"])))
                made += 1
    assert made == 40


def test_why_tells_who_gave_its_slot_to_other_work() -> None:
    simulation = make_market(2, submitters=4, solvers=1, floors=range(800, 801))
    simulation.run(seconds=3)
    jobs = [submit_job(simulation, f"a{i}", limit=1500 + 100 * i, seed=i + 1, segments=10) for i in range(4)]
    simulation.run(seconds=8)
    states = [simulation.command(f"a{i}", "job", {"job": jobs[i]}).result["state"] for i in range(4)]
    assert states == ["offered", "offered", "offered", "running"], "the highest limit"
    found = simulation.command("a0", "why", {"of": jobs[0]}).result["reasons"]
    (reason,) = [one for one in found if one["code"] == "outbid"]
    assert (reason["step"], reason["count"]) == ("proposal", 1)
    assert "pays up to 1800 per Gop, sold at 800" in reason["words"]


def test_who_bids_and_always_takes_other_work_rests() -> None:
    simulation = make_market(3, submitters=1, solvers=1, floors=range(800, 801))
    simulation.run(seconds=3)
    submit_job(simulation, "a0", limit=1500, seed=1)
    node, solver = simulation.peers["a0"].node, simulation.peers["s0"].key.public
    assert node is not None
    (job,) = node.jobs.jobs.values()
    for times in range(1, params.PASSED_OVER_MAX + 1):
        assert solver not in node.jobs.excluded(job)
        job.deal, job.deals, job.solvers = b"deal", [b"deal"], [solver]
        node.jobs.passed_over(job, solver, "outbid", "sold")
        assert (job.fruitless, job.deals, job.solvers) == (0, [], [])
        assert job.passed[solver].times == times % params.PASSED_OVER_MAX
    assert solver in node.jobs.excluded(job)


def test_a_fixed_price_is_asked_whatever_happens() -> None:
    simulation = make_market(4, submitters=6, solvers=1, floors=range(800, 801))
    solver = simulation.peers["s0"]
    assert solver.node is not None
    solver.node.desk.means = replace(solver.means, fixed_price=True)
    simulation.run(seconds=3)
    for i in range(6):
        submit_job(simulation, f"a{i}", limit=2000, seed=i + 1)
    simulation.run(seconds=40)
    assert solver.node.bidder.pricer.price == 800
    assert {data["unit_price"] for data in events(simulation, "bid")} == {800}
    assert len(events(simulation, "agreed")) > 1


def test_an_opening_voids_the_bids_made_before_it() -> None:
    simulation = make_market(5, submitters=2, solvers=1, floors=range(800, 801))
    simulation.run(seconds=3)
    first, second = (submit_job(simulation, f"a{i}", limit=1500 + i, seed=i + 1, segments=10) for i in range(2))
    simulation.run(seconds=6)
    node = simulation.peers["a0"].node
    assert node is not None
    assert simulation.command("a1", "job", {"job": second}).result["state"] == "running"
    assert simulation.command("a0", "job", {"job": first}).result["state"] == "offered"
    assert not any(node.desk.book.bids.values()), "its solver works for another"
