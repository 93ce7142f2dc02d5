"""Where the parts of the market meet: what one of them believes of a record, another must not be cheated with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest

from market import pricing
from market.book import OrderBook
from market.ledger import deposit
from market.pricing import Terms, clearing_price, goes_without
from peer.deals import agreement_of
from protocol import params
from protocol.lifecycle import TERMINAL, State
from protocol.records import amount_for
from tests.credit_scene import give, key_of, make_friends, node_of
from tests.dispute_swarm import court
from tests.market_scene import make_market, submit_job
from tests.swarm_scenario import submit
from tests.test_bidding import START_NS, Solver
from tests.test_house import market as house_market
from tests.test_market import NOW, ask, bid, offer
from tests.test_market import peer as peer_of

RICH = 50_000  # the limit of an offer that nobody means, a hundred times the floor
GIGA = 10**9


def crowd(solver: Solver, *, budget_micro: int, balance_micro: int, lock_micro: int = 0) -> int:
    """Four offers at RICH, of strangers with so much money. What the solver's price follows then."""
    for number in range(4):
        author = (number + 1).to_bytes(32, "big")
        if balance_micro:
            solver.desk.ledger.post(deposit(bytes([number + 1]) * 32, author, balance_micro, 0))
        solver.hear(
            number, unit_price_max=RICH, operations=100 * GIGA, budget_micro=budget_micro, lock_micro=lock_micro,
            check_permille=0,
        )  # fmt: skip
    solver.tick()
    return solver.bidder.pricer.left


def test_a_price_follows_limits_that_are_funded_and_no_others() -> None:
    worth = amount_for(100 * GIGA, RICH)
    assert crowd(Solver(), budget_micro=2 * worth, balance_micro=2 * worth) == RICH
    assert crowd(Solver(), budget_micro=2 * worth, balance_micro=worth) == 0, "more than they have"
    assert crowd(Solver(), budget_micro=1, balance_micro=2 * worth) == 0, "a budget that the limit exceeds"
    assert crowd(Solver(), budget_micro=0, balance_micro=0) == 0, "on credit, from who has no line here"


def test_asks_of_who_has_no_stake_take_no_work_from_anybody() -> None:
    for stake, left in ((0, RICH), (10**6, 0)):
        solver = Solver()
        for number in range(100, 110):
            if stake:
                solver.desk.ledger.post(deposit(bytes([number]) * 32, peer_of(number), 0, stake))
            solver.desk.book.add_ask(ask(number, unit_price=1), now_ns=START_NS)
        worth = amount_for(100 * GIGA, RICH)
        assert crowd(solver, budget_micro=worth, balance_micro=worth, lock_micro=10**6) == left


def test_work_is_worth_no_more_than_its_submitter_can_pay() -> None:
    simulation = make_friends(1)
    simulation.run(seconds=3)
    give(simulation, "ben", "ann", limit_micro=70_000)
    backed = node_of(simulation, "ben").bidder.pricer.backed_micro
    ann, cat, rich = (key_of(simulation, name) for name in ("ann", "cat", "rich"))
    terms = {"operations": 60 * GIGA, "unit_price_max": 2000}  # 120,000
    assert backed(offer(submitter=ann, budget_micro=0, **terms)) == 70_000
    assert backed(offer(submitter=cat, budget_micro=0, **terms)) == 0
    assert backed(offer(submitter=cat, budget_micro=10**9, **terms)) == 0, "it has no deposit"
    assert backed(offer(submitter=rich, budget_micro=1000, **terms)) == 1000
    assert backed(offer(submitter=rich, budget_micro=10**7, **terms)) == 120_000


def test_bids_that_are_void_leave_nothing_behind() -> None:
    book = OrderBook()
    book.add_offer(bytes(32), offer(), now_ns=NOW)
    bid_id, one = bid(1, offer=bytes(32))
    assert book.add_bid(bid_id, one, now_ns=NOW, envelope=b"signed")
    book.void_bids(peer_of(1), until_ns=NOW)
    assert not any(book.bids.values())
    assert (book.envelopes, book.packed) == ({}, {})


def test_a_bid_is_awaited_by_the_clock_that_it_is_dated_by() -> None:
    for off_s in (-7200, 7200):
        solver = Solver()
        solver.desk.wall_off_ns = off_s * GIGA
        solver.desk.peers[(1).to_bytes(32, "big")] = START_NS
        dates = {"created_ns": solver.desk.wall_ns, "expires_ns": solver.desk.wall_ns + 3600 * GIGA}
        one = offer(network=solver.desk.network.id, submitter=(1).to_bytes(32, "big"), **dates)
        solver.desk.book.add_offer(b"o" * 32, one, now_ns=solver.desk.wall_ns)
        solver.bidder.consider(b"o" * 32, one)
        assert solver.bids(), solver.bidder.refusals
        assert solver.bidder.awaited() == {b"o" * 32}
        solver.desk.now_ns += solver.desk.network.rules.bid_lifetime_ms * 10**6 + params.TICK_MS
        assert solver.bidder.awaited() == set(), "it ran out"


def test_offers_of_ever_other_sizes_do_not_take_a_solvers_time(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def counted(limits: Sequence[int], asks: Sequence[int]) -> int:
        looks.append(len(limits))
        return clearing_price(limits, asks)

    monkeypatch.setattr(pricing, "clearing_price", counted)
    rng = random.Random(1)
    wanted = [Terms(1000 - number, rng.randrange(1, 2**30)) for number in range(1000)]
    free = [Terms(number, rng.randrange(2**30)) for number in range(300)]
    found = goes_without(wanted, free, memory_bytes=2**30)
    assert len(looks) <= params.PRICE_NEEDS_MAX
    monkeypatch.setattr(params, "PRICE_NEEDS_MAX", 1000)
    exact = goes_without(wanted, free, memory_bytes=2**30)
    assert len(looks) > 900
    assert exact * 95 // 100 < found <= exact


def test_a_deadline_that_passes_while_a_proposal_waits_ends_the_job_and_frees_the_solver() -> None:
    simulation = make_market(6, submitters=1, solvers=1, floors=range(800, 801))
    simulation.run(seconds=3)
    job_id = submit_job(simulation, "a0", limit=1500, seed=1)
    node, solver = simulation.peers["a0"].node, simulation.peers["s0"].node
    assert node is not None
    assert solver is not None
    simulation.run(seconds=60, until=lambda: any(deal.side == "submitter" for deal in node.submitter.deals.values()))
    (deal,), (job,) = node.submitter.deals.values(), node.jobs.jobs.values()
    assert deal.lifecycle == State.PROPOSED
    job.deadline_ns = node.desk.wall_ns  # it is now
    simulation.run(seconds=20)
    assert deal.lifecycle == State.DECLINED
    state = simulation.command("a0", "job", {"job": job_id}).result
    assert (state["state"], "deadline" in state["reason"]) == ("failed", True)
    assert not node.settler.channels, "no stake is locked for work that nobody can use"
    assert all(deal.lifecycle in TERMINAL for deal in solver.solver.deals.values())


def test_pay_for_standing_ready_takes_no_slot_and_voids_no_bid() -> None:
    simulation = house_market(2)
    simulation.run(seconds=7200, until=lambda: any(kind == "house-pays" for _, _, kind, _ in simulation.log))
    (paid,) = [data["peer"] for _, _, kind, data in simulation.log if kind == "house-pays"]
    witness = next(peer.node for peer in simulation.peers.values() if peer.node and peer.key.public != paid)
    now, book = witness.desk.wall_ns, witness.desk.book
    life = {"network": witness.desk.network.id, "created_ns": now - 10 * GIGA, "expires_ns": now + 3600 * GIGA}
    book.add_offer(b"o" * 32, offer(**life), now_ns=now)
    _, one = bid(1, offer=b"o" * 32, **life)
    assert book.add_bid(b"b" * 32, msgspec.structs.replace(one, solver=paid), now_ns=now)
    simulation.run(seconds=10)
    assert paid in {channel.agreement.solver for channel in witness.settler.channels.values()}, "it heard of the pay"
    assert paid in book.bids[b"o" * 32]


def test_a_bid_locks_no_stake_that_an_opening_in_doubt_may_take() -> None:
    solver = Solver()
    stake = solver.bidder.settler.free_stake(solver.desk.me)
    solver.bidder.in_doubt_micro = lambda: stake - 700
    solver.hear(1, check_permille=200, lock_micro=100, operations=10**15, unit_price_max=500)
    (one,) = solver.bids()
    assert 100 <= one.lock_micro <= 700, "a proposal on more would be declined for want of stake"


@pytest.mark.parametrize("certified", [False, True])
def test_what_is_signed_and_not_open_yet_is_promised_once(certified: bool) -> None:
    simulation = court(1) if certified else make_market(7, submitters=1, solvers=1, floors=range(800, 801))
    simulation.run(seconds=3)
    if certified:
        submit(simulation)
    else:
        submit_job(simulation, "a0", limit=1500, seed=1)
    node = simulation.peers["bob" if certified else "s0"].node
    assert node is not None
    simulation.run(seconds=60, until=lambda: bool(node.solver.deals))
    (deal,) = node.solver.deals.values()
    lock = agreement_of(deal, simulation.network.id).lock_micro
    assert (deal.lifecycle, node.bidder.in_doubt_micro()) == (State.PROPOSED, lock)
    simulation.run(seconds=60, until=lambda: deal.lifecycle == State.RUNNING)
    assert node.bidder.in_doubt_micro() == 0, "the ledger has locked it"


def test_a_slot_that_the_best_cannot_take_for_want_of_stake_goes_to_the_next() -> None:
    simulation = make_market(8, submitters=3, solvers=1, floors=range(800, 801))
    node = simulation.peers["s0"].node
    assert node is not None
    node.desk.means = replace(node.desk.means, slots=2, fixed_price=True)
    simulation.run(seconds=3)
    jobs = [
        submit_job(simulation, f"a{i}", limit=limit, seed=i + 1, segments=segments)
        for i, (limit, segments) in enumerate(((3000, 2), (2500, 3), (2000, 2)))
    ]
    simulation.run(seconds=10, until=lambda: len(node.bidder.seeds) == 3)
    small, best, large = sorted(one.lock_micro for _, _, one in node.bidder.seeds.values())
    assert best < large < small + best < large + best
    held = node.bidder.settler.free_stake(node.desk.me) - best - small  # enough for these two, and for no other two
    node.bidder.in_doubt_micro = lambda: held + node.solver.promised_micro()
    simulation.run(seconds=10, until=lambda: len(node.solver.acceptance.waiting) == 2)
    simulation.run(seconds=2)
    codes = {data["code"] for _, _, kind, data in simulation.log if kind == "refused"}
    states = [simulation.command(f"a{i}", "job", {"job": jobs[i]}).result["state"] for i in range(3)]
    assert (codes, states) == ({"stake"}, ["running", "offered", "running"])
