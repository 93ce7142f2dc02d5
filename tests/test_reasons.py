"""Why nothing happens: what is said is true, and who follows the advice is helped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from market.feasibility import refuse_ask
from market.own_terms import Demand, Own, explain_own
from market.reasons import Advice, Capacity, explain_offer
from peer.simulator import Faults, Simulation
from protocol.keys import peer_name
from protocol.records import Ask, Offer
from tests.swarm_scenario import job_state, make_swarm, submit
from tests.test_market import NOW, ask, offer

CALM = Faults(loss=0, duplication=0, crash=0, delay_ns_max=20_000_000)


def relock(given: Offer) -> Offer:
    """As the rules lock: a tenth of the price limit."""
    return msgspec.structs.replace(given, lock_micro=given.unit_price_max // 10)


def capacity(number: int, *, stake: int = 10**6, reachable: bool = True, barred: str = "", **changes: Any) -> Capacity:
    return Capacity(ask(number, **{"unit_price": 500, "memory_bytes": 2**31, **changes}), reachable, stake, barred)


def explained(given: Offer, capacities: list[Capacity]) -> tuple[int, dict[str, int], list[Advice]]:
    able, reasons, advice = explain_offer(given, capacities, now_ns=NOW, relock=relock)
    return able, {reason.code: reason.count for reason in reasons}, advice


# --- an offer ----------------------------------------------------------------------------------------------
def test_each_who_cannot_is_counted_under_its_reason_and_told_what_would_bring_it() -> None:
    given = offer(unit_price_max=1000, memory_bytes=2**30, lock_micro=100, sandbox=3)
    able, counts, advice = explained(
        given,
        [
            capacity(10, sandbox=3),
            *(capacity(20 + i, unit_price=1100 + 10 * i, sandbox=3) for i in range(7)),
            capacity(30, memory_bytes=2**29, sandbox=3),
            capacity(31, memory_bytes=2**28, sandbox=3),
            capacity(40, sandbox=2),
            capacity(50, reachable=False, sandbox=3),
            capacity(60, roles=2),
            capacity(70, barred="excluded"),
        ],
    )
    assert able == 1
    assert counts == {
        "price": 7, "memory": 2, "sandbox": 1, "unreachable": 1, "role": 1, "excluded": 1,
    }  # fmt: skip
    words = [one.words for one in advice]
    assert "raise the limit by 10 % (--price 0.0011): 1 more" in words
    assert "raise the limit by 16 % (--price 0.00116): 7 more" in words
    assert "need no more than 512 MiB of memory: 1 more" in words
    assert "need no more than 256 MiB of memory: 2 more" in words
    assert any(word.startswith("accept sandbox level FILTERED") for word in words)


def test_where_no_one_change_is_enough_the_changes_are_told_together() -> None:
    given = offer(unit_price_max=1000, memory_bytes=2**30)
    able, counts, advice = explained(given, [capacity(1 + i, unit_price=2000, memory_bytes=2**29) for i in range(2, 5)])
    assert (able, counts) == (0, {"price": 3, "memory": 3})
    (only,) = advice
    assert only.words == "raise the limit by 100 % (--price 0.002) and need no more than 512 MiB of memory: 3 more"
    assert only.changes == {"unit_price_max": 2000, "memory_bytes": 2**29}


def test_a_higher_limit_that_locks_more_than_a_solver_has_is_not_advised() -> None:
    given = relock(offer(unit_price_max=1000))
    able, counts, advice = explained(given, [capacity(2, unit_price=2000, stake=150)])
    assert able == 0
    assert set(counts) == {"price", "stake"}
    assert advice == [], "at a limit of 2000 it would have to lock 200, and at 1500 it is too dear"


def test_a_solver_short_of_stake_is_reached_by_a_lower_limit() -> None:
    given = relock(offer(unit_price_max=1000))
    able, _, advice = explained(given, [capacity(2, unit_price=300, stake=50)])
    assert able == 0
    assert advice[0].changes == {"unit_price_max": 500}
    assert "lower the limit by 50 %" in advice[0].words


def test_whom_a_higher_limit_loses_is_said_with_whom_it_brings() -> None:
    given = relock(offer(unit_price_max=1000))
    able, _, advice = explained(given, [capacity(2, unit_price=300, stake=150), capacity(3, unit_price=2000)])
    assert able == 1
    assert advice[0].words == "raise the limit by 100 % (--price 0.002): 1 more, 1 fewer"


def test_a_deadline_and_a_card_are_terms_too() -> None:
    given = offer(device="gpu", device_memory_bytes=24 << 30, deadline_ns=NOW + 10**9)
    able, counts, advice = explained(given, [capacity(2, device="gpu", device_memory_bytes=16 << 30)])
    assert able == 0
    assert set(counts) >= {"deadline"}
    (only,) = advice
    assert "16.0 GiB on the card" in only.words
    assert int(only.changes["deadline_ns"]) > NOW


TERMS = st.fixed_dictionaries(
    {
        "unit_price": st.sampled_from([100, 700, 1200, 3000]), "sandbox": st.integers(0, 4),
        "memory_bytes": st.sampled_from([2**28, 2**29, 2**31]),
        "roles": st.sampled_from([1, 1, 3, 2]), "device": st.sampled_from(["cpu", "gpu"]),
        "device_memory_bytes": st.sampled_from([0, 2**33, 2**35]), "operations_per_second": st.integers(0, 10**11),
    }
)  # fmt: skip
WANTS = st.fixed_dictionaries(
    {
        "unit_price_max": st.integers(1, 2000), "memory_bytes": st.integers(0, 2**31), "sandbox": st.integers(0, 4),
        "mode": st.sampled_from(["exact", "script", "profile"]), "device": st.sampled_from(["any", "cpu", "gpu"]),
        "device_memory_bytes": st.sampled_from([0, 0, 2**34]),
        "deadline_ns": st.sampled_from([0, NOW + 1, NOW + 10**14]),
    }
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    WANTS,
    st.lists(st.tuples(TERMS, st.integers(0, 300), st.booleans()), max_size=8),
)
def test_advice_that_is_followed_brings_what_it_promised(
    wants: dict[str, Any], asks: list[tuple[dict[str, Any], int, bool]]
) -> None:
    """For any offer and any book: the changes, made to the offer, let exactly so many more peers take it."""
    given_offer = relock(offer(**wants))
    capacities = [
        capacity(10 + i, stake=stake, reachable=reachable, **terms) for i, (terms, stake, reachable) in enumerate(asks)
    ]

    def takers(changed: Offer, *, connected: bool) -> set[bytes]:
        return {
            c.ask.peer
            for c in capacities
            if refuse_ask(
                changed, c.ask, now_ns=NOW, reachable=c.reachable or connected, free_stake_micro=c.free_stake_micro
            )
            is None
        }

    able, counts, advice = explained(given_offer, capacities)
    before = takers(given_offer, connected=False)
    assert able == len(before)
    assert bool(counts) == (able < len(capacities))
    for one in advice:
        changes = dict(one.changes)
        connected = bool(changes.pop("connect", ""))
        changed = msgspec.structs.replace(given_offer, **changes)
        changed = relock(changed) if "unit_price_max" in changes else changed
        assert len(takers(changed, connected=connected) - before) == one.gain > 0


# --- a solver ----------------------------------------------------------------------------------------------
OWN = Own(roles=1, unit_price=1000, memory_bytes=2**30, sandbox=3, stake_micro=200, slots_free=1)


def demand(price: int = 1000, **changes: Any) -> Demand:
    return Demand(offer(**{"unit_price_max": 2000, **changes}), price)


def test_a_solver_hears_which_of_its_terms_keeps_which_offers_away() -> None:
    demands = [
        demand(),
        demand(unit_price_max=920),
        demand(unit_price_max=950),
        demand(unit_price_max=990),
        demand(memory_bytes=3 << 30),
        demand(sandbox=4),
        demand(lock_micro=1200),
    ]
    able, reasons, advice = explain_own(OWN, demands)
    assert able == 1
    assert {r.code: r.count for r in reasons} == {"price": 3, "memory": 1, "sandbox": 1, "stake": 1}
    words = [one.words for one in advice]
    assert "ask 8 % less (--price 0.00092): 3 offers would take you" in words
    assert "ask 1 % less (--price 0.00099): 1 offer would take you" in words
    assert "allow a job 3.0 GiB (--memory 3072M): 1 offer would take you" in words
    assert "lock 0.001 credits more (`ichiba wallet stake 0.001`): 1 offer would take you" in words
    for one in advice:
        if "unit_price" in one.changes:
            cheaper = int(one.changes["unit_price"])
            now_able, _, _ = explain_own(replace(OWN, unit_price=cheaper), [replace(d, price=cheaper) for d in demands])
            assert now_able == able + one.gain


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "unit_price_max": st.sampled_from([0, 1, 333, 900, 2000]), "sandbox": st.integers(0, 4),
                "memory_bytes": st.sampled_from([2**20, 2**31, 2**33]), "lock_micro": st.sampled_from([100, 500, 9000]),
                "mode": st.sampled_from(["exact", "script", "profile"]),
            }
        ),
        max_size=8,
    ),
    st.integers(1, 3),
    st.integers(0, 1),
)  # fmt: skip
def test_a_solver_that_follows_its_advice_gets_at_least_what_it_was_told(
    offers: list[dict[str, Any]], roles: int, slots_free: int
) -> None:
    own = replace(OWN, roles=roles, slots_free=slots_free, checker_stake_min_micro=1000)
    demands = [demand(**wants) for wants in offers]

    def bids(mine: Own) -> int:
        return sum(mine.refuse(one, mine.unit_price) is None for one in demands)

    able, reasons, advice = explain_own(own, demands)
    assert able == bids(own)
    assert bool(reasons) == (able < len(demands))
    for one in advice:
        changed = replace(own, **{name: value for name, value in one.changes.items() if name != "percent_less"})
        assert bids(changed) - able >= one.gain > 0


def test_a_solver_that_is_outbid_hears_by_how_much() -> None:
    outbid = replace(demand(), bids=(900, 1500), bid_on=True)
    able, reasons, advice = explain_own(OWN, [outbid])
    assert able == 1
    assert [(r.code, r.count) for r in reasons] == [("outbid", 1)]
    assert advice[0].words == "ask 11 % less (--price 0.00089): the cheapest bid on 1"


def test_every_slot_taken_and_another_role_are_reasons_too() -> None:
    _, reasons, advice = explain_own(replace(OWN, slots_free=0), [demand()])
    assert [r.code for r in reasons] == ["busy"]
    assert "wait until a slot is free" in advice[0].words
    _, reasons, _ = explain_own(replace(OWN, roles=2, checker_stake_min_micro=500), [demand(mode="profile")])
    assert [r.code for r in reasons] == ["stake"]


# --- the node ----------------------------------------------------------------------------------------------
def asked(simulation: Simulation, name: str, verb: str, **arguments: Any) -> dict[str, Any]:
    reply = simulation.command(name, verb, arguments)
    assert reply.error is None, reply.error
    return reply.result


def codes(found: dict[str, Any]) -> dict[str, int]:
    return {reason["code"]: reason["count"] for reason in found["reasons"]}


def test_an_unmatched_job_says_why_and_following_the_advice_matches_it() -> None:
    simulation = make_swarm(5, CALM)
    simulation.run(seconds=3)
    job = submit(simulation, unit_price_max=900)
    simulation.run(seconds=10)
    found = asked(simulation, "alice", "why", of=job[:8])
    assert (found["able"], found["heard"]) == (0, 2)
    assert codes(found)["price"] == 2
    assert found["reasons"][0]["severity"] == 1
    first, all_of_them = found["advice"]
    assert first["words"].startswith("raise the limit by 12 % (--price 0.001): 1 more")
    assert all_of_them["words"].startswith("raise the limit by 23 % (--price 0.0011): 2 more")
    asked(simulation, "alice", "cancel", job=job)
    budget = max(10_000_000, first["changes"].get("budget_micro", 0))
    better = submit(simulation, unit_price_max=first["changes"]["unit_price_max"], budget_micro=budget)
    simulation.run(seconds=600, until=lambda: job_state(simulation, better)["state"] == "running")
    (deal,) = asked(simulation, "alice", "job", job=better)["deals"]
    assert deal["solver"] == peer_name(simulation.peers["bob"].key.public), "the one that the advice promised"
    running = asked(simulation, "alice", "why", of=better)
    assert codes(running).keys() & {"running", "proposed"}
    simulation.run(seconds=900, until=lambda: job_state(simulation, better)["state"] == "done")
    assert "done" in codes(asked(simulation, "alice", "why", of=better))


def test_a_limit_that_outgrows_the_budget_says_the_budget_it_takes() -> None:
    simulation = make_swarm(6, CALM)
    simulation.run(seconds=3)
    job = submit(simulation, unit_price_max=500, budget_micro=60_000)
    simulation.run(seconds=5)
    first = asked(simulation, "alice", "why", of=job)["advice"][0]
    assert "--budget" in first["words"]
    asked(simulation, "alice", "cancel", job=job)
    changes = first["changes"]
    terms = {"unit_price_max": changes["unit_price_max"]}
    with pytest.raises(AssertionError, match="can cost"):
        submit(simulation, **terms, budget_micro=changes["budget_micro"] - 1)
    better = submit(simulation, **terms, budget_micro=changes["budget_micro"])
    simulation.run(seconds=60, until=lambda: job_state(simulation, better)["state"] == "running")
    assert job_state(simulation, better)["state"] == "running"


def test_a_peer_that_earns_nothing_says_why_and_asking_less_earns() -> None:
    simulation = make_swarm(7, CALM)
    simulation.run(seconds=3)
    job = submit(simulation, unit_price_max=950)
    simulation.run(seconds=5)
    found = asked(simulation, "bob", "why", of="me")
    assert (found["able"], found["heard"]) == (0, 1)
    assert codes(found)["price"] == 1
    assert codes(found)["no-card"] == 1
    (cheaper,) = found["advice"]
    assert cheaper["words"] == "ask 5 % less (--price 0.00095): 1 offer would take you"
    bob = simulation.peers["bob"]
    bob.means = replace(bob.means, unit_price=cheaper["changes"]["unit_price"])
    simulation.crash("bob", for_ns=10**9)
    simulation.run(seconds=120, until=lambda: job_state(simulation, job)["state"] == "running")
    assert job_state(simulation, job)["state"] == "running"
    simulation.run(seconds=2)
    assert codes(asked(simulation, "bob", "why", of="me"))["working"] == 1


def test_a_peer_alone_paused_or_without_a_role_says_so_first() -> None:
    simulation = make_swarm(8, CALM)
    alone = asked(simulation, "bob", "why", of="me")
    assert alone["reasons"][0]["code"] == "nobody-connected"
    assert alone["reasons"][0]["severity"] == 1
    simulation.run(seconds=3)
    asked(simulation, "bob", "pause", within_ms=0)
    assert codes(asked(simulation, "bob", "why", of="me"))["paused"] == 1
    assert codes(asked(simulation, "alice", "why", of="me")) == {"no-role": 1}
    verifier = asked(simulation, "victor", "why", of="me")
    assert codes(verifier) == {"draws": 0}, "no offer is for it, and it is not told that it should solve"
    assert asked(simulation, "alice", "why")["headline"] == "nothing is in the way here"
    reply = simulation.command("alice", "why", {"of": "ffff"})
    assert reply.error is not None
    assert reply.error["exit_code"] == 4


def test_what_is_wrong_here_names_the_job_and_the_worst_first() -> None:
    simulation = make_swarm(9, CALM)
    simulation.run(seconds=3)
    job = submit(simulation, unit_price_max=900)
    simulation.run(seconds=3)
    found = asked(simulation, "alice", "why")
    assert found["headline"] == "1 thing in the way"
    assert found["reasons"][0]["words"] == f"job {job[:8]}: ask more than the limit"
    assert found["advice"][0]["words"].startswith(f"job {job[:8]}: raise the limit by 12 %")


def test_bids_of_a_weak_sandbox_and_a_lost_solver_are_told_at_their_step() -> None:
    simulation = make_swarm(10, CALM, bobs_sandbox=1)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=60, until=lambda: job_state(simulation, job)["segments_done"] == 2)
    simulation.crash("carol", for_ns=0)
    simulation.run(seconds=3)
    found = codes(asked(simulation, "alice", "why", of=job))
    assert found["unreachable"] == 1, "the solver is gone and its grace runs"
    simulation.run(seconds=200, until=lambda: job_state(simulation, job)["state"] == "offered")
    simulation.run(seconds=2)
    found = asked(simulation, "alice", "why", of=job)
    assert codes(found)["sandbox"] == 1
    (lost,) = [reason for reason in found["reasons"] if reason["code"] == "lost"]
    assert (lost["step"], lost["words"].split(": ")[1]) == ("work", "the connection to the solver is gone")
    assert lost["counterfactual"] == "2 segments of it are kept and paid"
    assert any(one["words"].startswith("accept sandbox level LIMITS") for one in found["advice"])


def test_a_declined_proposal_says_who_and_why() -> None:
    simulation = make_swarm(15, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    alice = simulation.peers["alice"]
    simulation.run(seconds=5, until=lambda: alice.node is not None and any(alice.node.desk.book.bids.values()))
    for name in ("bob", "carol"):
        asked(simulation, name, "pause", within_ms=0)
    simulation.run(seconds=8)
    found = asked(simulation, "alice", "why", of=job)
    declined = [reason for reason in found["reasons"] if reason["code"] == "declined"]
    assert declined
    assert all(reason["step"] == "proposal" and "paused" in reason["words"] for reason in declined)
    assert codes(found)["resting"] >= 1


@pytest.mark.parametrize(("off_s", "word"), [(-1000, "behind"), (4000, "ahead of")])
def test_a_wrong_clock_is_named_when_most_of_the_others_disagree(off_s: int, word: str) -> None:
    simulation = make_swarm(11, CALM)
    simulation.run(seconds=3)
    bob = simulation.peers["bob"]
    assert bob.node is not None
    others = [peer for name, peer in simulation.peers.items() if name != "bob"]
    for other in others:
        assert other.node is not None
        asks = [a for a in other.node.desk.book.asks if a.peer == other.key.public]
        for one in asks:
            bob.node.commands.answers.clocks.note(one, simulation.now_ns + off_s * 10**9)
    found = asked(simulation, "bob", "why", of="me")
    (clock,) = [reason for reason in found["reasons"] if reason["code"] == "clock"]
    assert word in clock["words"]
    assert found["reasons"][0]["severity"] == 1


def test_a_stranger_cannot_make_a_peer_doubt_its_clock() -> None:
    simulation = make_swarm(12, CALM)
    simulation.run(seconds=3)
    bob = simulation.peers["bob"]
    assert bob.node is not None
    for number in range(1000, 2000):
        forged: Ask = ask(number, created_ns=simulation.now_ns + 10**13, expires_ns=simulation.now_ns + 2 * 10**13)
        bob.node.commands.answers.clocks.note(forged, simulation.now_ns)
    assert not codes(asked(simulation, "bob", "why", of="me")).keys() & {"clock", "others-clock"}
    assert len(bob.node.commands.answers.clocks.off_s) <= 256


def test_trades_quote_and_price_of_a_node_rest_on_what_was_agreed() -> None:
    simulation = make_swarm(13, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=900, until=lambda: job_state(simulation, job)["state"] == "done")
    found = asked(simulation, "victor", "trades")
    (trade,) = found["trades"]
    assert (trade["unit_price"], trade["mode"], trade["mine"]) == (1000, "exact", False)
    assert (found["statistics"]["count"], found["statistics"]["vwap"], found["statistics"]["enough"]) == (
        1,
        1000,
        False,
    )
    assert asked(simulation, "victor", "trades", where="price>0.001")["statistics"]["count"] == 0
    assert asked(simulation, "alice", "trades", where="mine=yes")["trades_matching"] == 1
    bad = simulation.command("alice", "trades", {"where": "prise>1"})
    assert bad.error is not None
    assert (bad.error["code"], bad.error["exit_code"]) == ("bad-filter", 2)
    assert simulation.command("alice", "trades", {"sort": "colour"}).error is not None
    quoted = asked(simulation, "alice", "quote", operations=10**12, unit_price_max=1050, segments=10,
                   operations_per_segment=10**11)  # fmt: skip
    assert [(r["unit_price_max"], r["solvers"]) for r in quoted["rungs"]] == [(1000, 1), (1050, 1), (1100, 2)]
    assert all(r["budget_micro"] > r["work_micro"] for r in quoted["rungs"])
    buy = asked(simulation, "alice", "price")
    assert (buy["basis"], buy["unit_price"], buy["asks"]) == ("asks", 1000, 2)
    sell = asked(simulation, "carol", "price", sell=True, watts=3600, kwh_micro=5_000_000)
    assert (sell["basis"], sell["floor"], sell["unit_price"]) == ("power", 5000, 5000)
    assert asked(simulation, "carol", "price", sell=True)["floor"] is None
    assert simulation.command("carol", "price", {"watts": -1}).error is not None


def test_book_and_offers_of_a_node_are_picked_sorted_and_cut() -> None:
    simulation = make_swarm(14, CALM)
    simulation.run(seconds=3)
    submit(simulation, unit_price_max=900)
    simulation.run(seconds=3)
    assert len(asked(simulation, "alice", "book")["asks"]) == 4
    found = asked(simulation, "alice", "book", where="role=solver", sort="-price", limit=1)
    assert [a["unit_price"] for a in found["asks"]] == [1100]
    assert (found["asks_matching"], found["asks_heard"], found["offers"]) == (2, 4, [])
    (offered,) = asked(simulation, "bob", "offers", where="refused=price mode=exact price<0.001")["offers"]
    assert offered["no_bid"]["code"] == "price"
    assert asked(simulation, "bob", "offers", where="bids>0")["offers"] == []
