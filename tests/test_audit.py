"""A match can be made again from the signed bids by anybody, and a match that the rule does not make is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from market.audit import Match, check_match, read_match
from peer.simulator import Faults, Simulation
from protocol.codec import encode
from protocol.errors import RemoteProtocolError, VerificationFailed
from protocol.keys import SigningKey
from protocol.records import Agreement, Bid, open_record
from protocol.records import seal as sealed
from tests.swarm_scenario import job_state, make_swarm, submit

CALM = Faults(until_ns=0)


@pytest.fixture(scope="module")
def played() -> tuple[Simulation, str]:
    simulation = make_swarm(3, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=600, until=lambda: job_state(simulation, job).get("state") == "done")
    return simulation, job


def matches_of(played: tuple[Simulation, str]) -> list[Match]:
    simulation, job = played
    reply: Any = simulation.command("alice", "matches", {"job": job})
    return [read_match(bytes.fromhex(one["match"])) for one in reply.result["matches"]]


def test_every_deal_of_a_job_can_be_made_again(played: tuple[Simulation, str]) -> None:
    simulation, job = played
    made = [check_match(match) for match in matches_of(played)]
    assert [simulation.by_key[one.winner.solver].name for one in made] == ["bob"]  # the cheaper of the two
    assert len(made) == len(job_state(simulation, job)["deals"])
    assert len(made[0].choice.ranked) + len(made[0].choice.refused) == 2


def test_it_survives_a_restart(played: tuple[Simulation, str]) -> None:
    simulation, _ = played
    before = matches_of(played)
    simulation.crash("alice", for_ns=10**9)
    simulation.run(seconds=5)
    assert matches_of(played) == before


def test_another_winner_is_refused_and_its_better_is_named(played: tuple[Simulation, str]) -> None:
    (match,) = matches_of(played)
    opened = [open_record(envelope, network=match.network) for envelope in match.bids]
    (loser,) = [record_id for record, record_id, _ in opened if record_id != match.winner]
    with pytest.raises(VerificationFailed, match="the rule gives the work to"):
        check_match(msgspec.structs.replace(match, winner=loser, agreement=b""))


def test_a_hidden_bid_a_forged_one_and_one_of_another_offer_are_refused(played: tuple[Simulation, str]) -> None:
    (match,) = matches_of(played)
    records = {e: open_record(e, network=match.network)[0] for e in match.bids}
    winning = [e for e, record in records.items() if open_record(e, network=match.network)[1] == match.winner]
    others = tuple(e for e in match.bids if e not in winning)
    with pytest.raises(VerificationFailed, match="could not win"):
        check_match(msgspec.structs.replace(match, bids=others))
    torn = bytes([*winning[0][:-1], winning[0][-1] ^ 1])
    with pytest.raises(RemoteProtocolError):
        check_match(msgspec.structs.replace(match, bids=(*others, torn)))
    simulation, _ = played
    bid = records[winning[0]]
    assert isinstance(bid, Bid)
    stray = simulation.by_key[bid.solver].node.desk.seal(msgspec.structs.replace(bid, offer=bytes(32)))  # type: ignore[union-attr]
    with pytest.raises(VerificationFailed, match="another offer"):
        check_match(msgspec.structs.replace(match, bids=(*match.bids, stray)))


def test_facts_that_are_missing_are_asked_for(played: tuple[Simulation, str]) -> None:
    (match,) = matches_of(played)
    with pytest.raises(VerificationFailed, match="no facts"):
        check_match(msgspec.structs.replace(match, known=match.known[:1]))


def test_a_file_of_noise_is_refused(played: tuple[Simulation, str]) -> None:
    data = encode(matches_of(played)[0])
    for broken in (b"", data[:-1], data + b"\x00", bytes(100)):
        with pytest.raises(RemoteProtocolError):
            read_match(broken)


def test_an_agreement_of_somebody_else_or_on_other_terms_is_refused(played: tuple[Simulation, str]) -> None:
    simulation, _ = played
    (match,) = matches_of(played)
    agreement, _, _ = open_record(match.agreement, network=match.network)
    assert isinstance(agreement, Agreement)
    stranger, alice = SigningKey.from_seed(bytes(32)), simulation.peers["alice"].key
    forged = msgspec.structs.replace(agreement, submitter=stranger.public)
    dearer = msgspec.structs.replace(agreement, unit_price=agreement.unit_price + 1)
    for wrong, key, why in ((forged, stranger, "not signed"), (dearer, alice, "other parties, price or lock")):
        with pytest.raises(VerificationFailed, match=why):
            check_match(msgspec.structs.replace(match, agreement=sealed(wrong, key)))


def test_many_jobs_are_matched_together_and_each_match_can_be_made_again() -> None:
    """More jobs than a book once took of one author; that stopped the node, and would have at every start."""
    simulation = make_swarm(5, CALM)
    simulation.run(seconds=3)
    jobs = []
    for number in range(70):
        jobs.append(submit(simulation, budget_micro=1_200_000, unit_price_max=2000 if number < 4 else 1))
        simulation.run(seconds=0.001)  # the id of a job is of its task and its time
    assert len(set(jobs)) == 70
    able = jobs[:4]
    simulation.run(seconds=600, until=lambda: all(job_state(simulation, job).get("state") == "done" for job in able))
    made = [
        check_match(read_match(bytes.fromhex(one["match"])))
        for job in jobs
        for one in simulation.command("alice", "matches", {"job": job}).result["matches"]
    ]
    assert len(made) >= 4
    assert max(one.offers for one in made) > 4
    assert {one.offer.unit_price_max for one in made} == {2000}
    simulation.crash("alice", for_ns=10**9)
    simulation.run(seconds=5)
    assert len(simulation.command("alice", "jobs", {}).result["jobs"]) == 70
