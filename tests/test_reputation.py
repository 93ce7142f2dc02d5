"""A reputation follows from co-signed endings alone: the same everywhere, in any order, dear to pump or to stain."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from fractions import Fraction
from functools import cache
from math import comb
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from market.reputation import DAY_NS, DEAL, ROLES, WEIGHTS, Ending, Evidence, Outcome, Reputation, Reputations, weigh
from peer.node import Node
from peer.reputation_bundle import CANNOT_KNOW, SCHEMA, verify
from peer.simulator import Faults, Simulation
from protocol import params
from protocol.errors import RemoteProtocolError, VerificationFailed
from protocol.keys import peer_key, peer_name
from protocol.network import dump
from tests.cli_scene import answering, ichiba, lines
from tests.dispute_swarm import court, settle
from tests.swarm_scenario import job_state, make_swarm, submit

TODAY = 20_000
SOLVER = b"s" * 32
CALM = Faults(until_ns=0)
OUTCOMES: tuple[Outcome, ...] = ("settled", "claimed", "unpaid", "wrong")


def other(number: int) -> bytes:
    return number.to_bytes(32, "big")


def one(number: int, pair: int, day: int, outcome: Outcome = "settled") -> Evidence:
    return Evidence(number.to_bytes(32, "big"), "solver", SOLVER, other(pair), day, outcome)


BACKED = frozenset(other(pair) for pair in range(1, 5))
LISTS = st.lists(st.tuples(st.integers(0, 8), st.integers(TODAY - 700, TODAY), st.sampled_from(OUTCOMES)), max_size=40)


def made(drawn: list[tuple[int, int, Outcome]]) -> list[Evidence]:
    return [one(number, pair + 1, day, outcome) for number, (pair, day, outcome) in enumerate(drawn)]


def score(evidence: list[Evidence], today: int = TODAY, **options: bytes) -> Reputation:
    return weigh(evidence, today=today, backed=BACKED, **options).reputation


# --- the rule ----------------------------------------------------------------------------------------------
@given(LISTS, st.randoms(use_true_random=False))
def test_the_order_of_evidence_does_not_matter(drawn: list[tuple[int, int, Outcome]], rng: random.Random) -> None:
    evidence = made(drawn)
    shuffled = evidence.copy()
    rng.shuffle(shuffled)
    assert weigh(shuffled, today=TODAY, backed=BACKED) == weigh(evidence, today=TODAY, backed=BACKED)


@given(LISTS, st.integers(0, 8), st.integers(TODAY - 700, TODAY))
def test_what_went_right_never_lowers_and_what_went_wrong_never_raises(
    drawn: list[tuple[int, int, Outcome]], pair: int, day: int
) -> None:
    evidence = made(drawn)
    before = score(evidence)
    for outcome in OUTCOMES:
        after = score([*evidence, one(99, pair + 1, day, outcome)])
        if WEIGHTS["solver", outcome][0] == "right":
            assert after.bound_ppm >= before.bound_ppm
            assert after.mean_ppm >= before.mean_ppm
        else:
            assert after.bound_ppm <= before.bound_ppm
            assert after.mean_ppm <= before.mean_ppm


@given(LISTS, st.integers(1, 400))
def test_all_evidence_fades_and_nothing_but_time_brings_a_peer_back_to_the_unknown(
    drawn: list[tuple[int, int, Outcome]], days: int
) -> None:
    evidence = [replace(found, day=min(found.day, TODAY)) for found in made(drawn)]
    now, later = score(evidence), score(evidence, TODAY + days)
    assert later.right_ppm <= now.right_ppm
    assert later.wrong_ppm <= now.wrong_ppm
    assert score(evidence, TODAY + 2000) == replace(Reputation(), deals=now.deals)


def test_evidence_halves_in_thirty_days() -> None:
    evidence = [one(1, 1, TODAY, "settled"), one(2, 1, TODAY, "wrong")]
    for months in range(1, 12):
        found = score(evidence, TODAY + 30 * months)
        assert abs(found.right_ppm - DEAL / 2**months) <= 1
        assert found.right_ppm == found.wrong_ppm


@given(st.integers(1, 50), st.integers(1, 4))
def test_a_pair_counts_once_a_day_but_each_wrong_counts(deals: int, pair: int) -> None:
    assert score([one(n, pair, TODAY) for n in range(deals)]).right_ppm == DEAL
    assert score([one(n, pair, TODAY, "wrong") for n in range(deals)]).wrong_ppm == deals * DEAL
    both = weigh([one(n, pair, TODAY) for n in range(deals)], today=TODAY, backed=BACKED)
    assert both.washed == deals - 1


def test_of_a_day_the_weightier_deal_counts_whichever_came_first() -> None:
    light, heavy = one(1, 1, TODAY, "claimed"), one(2, 1, TODAY, "settled")
    assert score([light, heavy]) == score([heavy, light])
    assert score([light, heavy]).right_ppm == DEAL


@pytest.mark.parametrize("sybils", [1, 10, 1000])
def test_any_number_of_submitters_without_a_deposit_pump_as_much_as_one(sybils: int) -> None:
    rings = [one(n, 100 + n % sybils, TODAY - n // sybils) for n in range(60 * sybils)]
    found = score(rings)
    assert found.right_ppm == params.REPUTATION_PAIR_DEALS * DEAL
    assert found.bound_ppm < 700_000
    # Nor do they stain more than one could: what they say of unpaid deals is their own word.
    slurs = [one(n, 100 + n % sybils, TODAY - n // sybils, "unpaid") for n in range(60 * sybils)]
    assert score(slurs).wrong_ppm <= params.REPUTATION_PAIR_LOSSES * DEAL


@given(st.integers(0, 4), st.integers(0, 30))
def test_what_may_be_pumped_is_bounded_by_the_deposits_behind_it(backed: int, unbacked: int) -> None:
    pairs = [*range(1, backed + 1), *range(100, 100 + unbacked)]
    found = score([one(n * 100 + day, pair, TODAY - day) for n, pair in enumerate(pairs) for day in range(60)])
    assert found.right_ppm <= (backed + 1) * params.REPUTATION_PAIR_DEALS * DEAL


def test_what_a_peer_saw_itself_is_not_capped() -> None:
    evidence = [one(day, 100, TODAY - day) for day in range(60)]
    assert score(evidence, viewer=other(100)).right_ppm > 30 * DEAL
    assert score(evidence, viewer=other(101)).right_ppm == params.REPUTATION_PAIR_DEALS * DEAL


def test_what_is_dated_after_today_waits_but_a_wrong_of_it_counts() -> None:
    found = weigh([one(1, 1, TODAY + 1), one(2, 1, TODAY + 9, "wrong")], today=TODAY, backed=BACKED)
    assert (found.reputation.right_ppm, found.reputation.wrong_ppm, found.early) == (0, DEAL, 1)
    assert score([one(1, 1, TODAY + 1)], TODAY + 1).right_ppm == DEAL


def test_the_bound_is_a_low_quantile_of_the_posterior_exactly_computed() -> None:
    def below(a: int, b: int, x: Fraction) -> Fraction:
        """The chance that Beta(a, b) is less than x, for whole a and b: a binomial tail."""
        n = a + b - 1
        return Fraction(sum(comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(a, n + 1)))

    for right in (0, 1, 4, 20, 60):
        for wrong in (0, 1, 3):
            bound = Fraction(Reputation.known(right, wrong).bound_ppm, 1_000_000)
            assert Fraction(12, 100) < below(right + 1, wrong + 1, bound) < Fraction(22, 100), (right, wrong)


@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_a_bound_is_never_above_its_mean_whatever_the_evidence(right: int, wrong: int) -> None:
    found = Reputation(right, wrong)
    assert 0 <= found.bound_ppm <= found.mean_ppm <= 1_000_000


# --- endings -----------------------------------------------------------------------------------------------
def ending(**changes: Any) -> Ending:
    fields: dict[str, Any] = {
        "deal": b"d" * 32, "submitter": other(1), "solver": SOLVER, "created_ns": TODAY * DAY_NS + 5, "checked": True,
        "how": "settled", "paid_micro": 5,
    }  # fmt: skip
    return Ending(**{**fields, **changes})


def said(found: Ending) -> set[tuple[str, bytes, str]]:
    assert all(e.day == TODAY and (e.role, e.outcome) in WEIGHTS for e in found.evidence())
    return {(e.role, e.peer, e.outcome) for e in found.evidence()}


def test_each_way_to_end_says_what_its_signatures_allow() -> None:
    alice, victor = other(1), other(7)
    settled = ("submitter", alice, "settled")
    assert said(ending()) == {("solver", SOLVER, "settled"), settled}
    assert said(ending(checked=False)) == {settled}, "a script says nothing of who ran it"
    assert said(ending(paid_micro=0)) == {("solver", SOLVER, "unpaid")}
    assert said(ending(checkers=frozenset({victor, SOLVER}))) == {
        ("solver", SOLVER, "settled"), ("verifier", victor, "paid"), settled,
    }  # fmt: skip
    assert said(ending(wrong=True, checkers=frozenset({victor}), faulty=frozenset({victor}))) == {
        ("solver", SOLVER, "wrong"), ("verifier", victor, "faulty"), settled,
    }  # fmt: skip
    slashed = ending(how="slashed", paid_micro=0, wrong=True, condemners=frozenset({victor}))
    assert said(slashed) == {("solver", SOLVER, "wrong"), ("verifier", victor, "condemned")}
    claimed = ending(how="claimed", claimants=frozenset({SOLVER}))
    assert said(claimed) == {("solver", SOLVER, "claimed"), ("submitter", alice, "left")}
    assert said(replace(claimed, claimants=frozenset({SOLVER, alice}))) == {("solver", SOLVER, "claimed")}
    assert said(replace(claimed, checkers=frozenset({victor}))) == said(claimed), "one party's word for a checker"


def test_work_that_is_found_wrong_after_it_was_paid_is_no_longer_right() -> None:
    known = Reputations(BACKED)
    known.put(ending())
    assert known.of("solver", SOLVER, today=TODAY).reputation == Reputation(DEAL, 0, 1)
    known.put(ending(wrong=True))
    assert known.of("solver", SOLVER, today=TODAY).reputation == Reputation(0, DEAL, 1)
    assert [e.outcome for e in known.evidence("solver", SOLVER)] == ["wrong"]


# --- a swarm -----------------------------------------------------------------------------------------------
def node_of(simulation: Simulation, name: str) -> Node:
    node = simulation.peers[name].node
    assert node is not None
    return node


def everybodys(simulation: Simulation, name: str) -> dict[tuple[str, str], list[Evidence]]:
    known = node_of(simulation, name).settler.reputations
    return {(role, who): known.evidence(role, p.key.public) for role in ROLES for who, p in simulation.peers.items()}


@cache
def honest() -> Simulation:
    simulation = make_swarm(1, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=600, until=lambda: job_state(simulation, job).get("state") == "done")
    simulation.run(seconds=60)
    return simulation


@cache
def cheated() -> Simulation:
    simulation = make_swarm(2, CALM, cheat="skip-step")
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=900, until=lambda: job_state(simulation, job).get("state") == "done")
    simulation.run(seconds=60)
    return simulation


@cache
def judged() -> Simulation:
    simulation = court(2, cheat="low-precision")
    simulation.run(seconds=3)
    settle(simulation, submit(simulation))
    return simulation


def test_every_peer_finds_the_same_of_everybody() -> None:
    for simulation in (honest(), cheated(), judged()):
        found = [everybodys(simulation, name) for name in simulation.peers]
        assert all(one == found[0] for one in found)
    outcomes = {key: [e.outcome for e in value] for key, value in everybodys(cheated(), "victor").items() if value}
    assert outcomes["solver", "bob"] == ["wrong"]
    assert outcomes["solver", "carol"] == ["settled"]
    assert outcomes["submitter", "alice"] == ["settled"]
    assert {"paid", "condemned"} <= {o for (role, _), all_ in outcomes.items() if role == "verifier" for o in all_}


def test_a_score_after_a_restart_is_the_same_and_needs_no_receipt() -> None:
    for simulation in (cheated(), judged()):
        before = everybodys(simulation, "alice")
        records = {deal: c.records for deal, c in node_of(simulation, "alice").settler.channels.items()}
        simulation.crash("alice", for_ns=10**9)
        simulation.run(seconds=5)
        after = node_of(simulation, "alice")
        assert everybodys(simulation, "alice") == before
        assert {deal: c.records for deal, c in after.settler.channels.items()} == records
        assert not any(len(rows) for rows in after.submitter.receipts.data.values()), "finished deals stay on the disk"


def bundle_of(simulation: Simulation, name: str, peer: str) -> dict[str, Any]:
    reply = simulation.command(name, "reputation-bundle", {"peer": peer_name(simulation.peers[peer].key.public)})
    assert reply.error is None
    made = {"schema": SCHEMA, "network": dump(simulation.network), **reply.result}
    return {**made, "deals": [[envelope.hex() for envelope in deal] for deal in made["deals"]]}


@pytest.mark.parametrize("peer", ["alice", "bob", "carol", "victor", "wendy"])
@pytest.mark.parametrize("scene", [honest, cheated, judged])
def test_exported_evidence_proves_the_score_to_who_has_only_the_network_file(scene: Any, peer: str) -> None:
    simulation = scene()
    report = verify(json.loads(json.dumps(bundle_of(simulation, "victor", peer))), simulation.network.id)
    known = node_of(simulation, "alice").settler.reputations
    for role in ROLES:
        mine = known.of(role, peer_key(report.peer), today=report.day)
        assert report.roles[role].reputation == mine.reputation


def test_evidence_that_was_tampered_with_is_refused() -> None:
    simulation = cheated()
    whole, network = bundle_of(simulation, "alice", "bob"), simulation.network.id
    (deal,) = whole["deals"]
    torn = deal[0][:-2] + f"{int(deal[0][-2:], 16) ^ 1:02x}"
    richer = {**whole["claimed"], "solver": {**whole["claimed"]["solver"], "right_ppm": 9 * DEAL}}
    stray = bundle_of(simulation, "alice", "carol")["deals"][0][1]
    wrong: dict[str, dict[str, Any]] = {
        "the file claims": {"claimed": richer},
        "comes to": {"deals": []},  # a convict that leaves its conviction out cannot claim the same figures
        "signature": {"deals": [[torn, *deal[1:]]]},
        "not ended": {"deals": [[deal[0], ""]]},
        "begins with no agreement": {"deals": [deal, deal]},
        "twice": {"deals": [[*deal, deal[-1]]]},
        "another agreement": {"deals": [[*deal, stray]]},
        "no bundle of a reputation": {"deals": [[deal[0]]]},
        "a file of schema": {"schema": "ichiba.reputation-bundle/9"},
        "the network file in it": {"network": "name = 3"},
    }
    for why, changes in wrong.items():
        with pytest.raises(RemoteProtocolError, match=why):
            verify({**whole, **changes}, network)
    with pytest.raises(VerificationFailed, match="the one you trust"):
        verify(whole, bytes(32))
    for noise in ([], {}, None, 3, "x", {**whole, "more": 1}, {**whole, "day": -1}, {**whole, "peer": "nobody"}):
        with pytest.raises(RemoteProtocolError):
            verify(noise, network)


def test_a_one_sided_closing_travels_with_the_end_of_its_window() -> None:
    simulation = make_swarm(4, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=300, until=lambda: job_state(simulation, job).get("segments_done", 0) == 3)
    simulation.crash("alice", for_ns=10**15)
    settler = node_of(simulation, "bob").settler
    simulation.run(seconds=3000, until=lambda: any(c.closed == "claimed" for c in settler.channels.values()))
    report = verify(bundle_of(simulation, "bob", "bob"), simulation.network.id)
    assert report.roles["solver"].outcomes == {"claimed": 1}
    report = verify(bundle_of(simulation, "bob", "alice"), simulation.network.id)
    assert report.roles["submitter"].outcomes == {"left": 1}


def test_a_match_ranks_by_what_is_left_of_the_evidence_and_not_by_bare_counts() -> None:
    simulation = honest()
    node = node_of(simulation, "alice")
    bob = simulation.peers["bob"].key.public
    assert node.settler.history(bob).right == 1
    assert node.settler.reputation(bob).right_ppm == DEAL
    later = node.settler.reputations.of("solver", bob, today=node.desk.now_ns // DAY_NS + 60).reputation
    assert abs(later.right_ppm - DEAL // 4) <= 1


# --- what people type --------------------------------------------------------------------------------------
def test_people_read_the_score_and_why_and_check_a_file(home: Path, tmp_path: Path) -> None:
    simulation = cheated()
    told = simulation.command("alice", "reputation", {}).result
    refused = simulation.command("alice", "reputation", {"role": "king"})
    assert refused.error is not None and refused.error["code"] == "usage"
    nobody = simulation.command("alice", "reputation", {"peer": "zzzz"})
    assert nobody.error is not None and nobody.error["code"] == "not-found"
    bob = peer_name(simulation.peers["bob"].key.public)
    one_row = simulation.command("alice", "reputation", {"peer": bob[-8:], "role": "solver"}).result["reputations"]
    assert [(row["peer"], row["wrong_ppm"]) for row in one_row] == [(bob, DEAL)]
    network = tmp_path / "network.toml"
    network.write_text(dump(simulation.network))
    file = tmp_path / "bob.json"
    file.write_text(json.dumps(bundle_of(simulation, "alice", "bob")))
    with answering(home) as fake:
        fake.answers["reputation"] = lambda _: told
        shown = ichiba(home, "reputation")
        assert shown.exit_code == 0, shown.output
        assert "1 found wrong" in shown.stdout
        rows = lines(ichiba(home, "reputation", bob[-8:], "--role", "solver", "--json"))
        assert {row["schema"] for row in rows} == {"ichiba.reputation/1"} and all(row["why"] for row in rows)
        assert fake.seen[-1] == ("reputation", {"peer": bob[-8:], "role": "solver"})
    checked = ichiba(home, "reputation", "verify", str(file), "--network", str(network))
    assert checked.exit_code == 0 and CANNOT_KNOW[0] in checked.stdout
    (report,) = lines(ichiba(home, "reputation", "verify", str(file), "--network", str(network), "--json"))
    assert report["roles"]["solver"]["deals"] == 1
    assert ichiba(home, "reputation", "verify", str(file)).exit_code != 0, "another network"
