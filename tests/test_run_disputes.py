"""Parallel jobs in networks with notaries: what nobody can play a game about, jurors execute again."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import msgspec
import pytest

from peer.case import open_evidence
from peer.dispute_bundle import SCHEMA, make, verify
from peer.dispute_file import DisputeFile, Kept, open_dispute
from peer.messages import CheckRequest
from peer.simulated_faults import SECOND, Faults
from peer.simulated_frauds import UNIT_FRAUDS, WRONG_END
from peer.turns import readable
from protocol import params
from protocol.bundle import BundleReport, make_bundle, verify_bundle
from protocol.bundle_deal import Refused
from protocol.codec import blake, decode
from protocol.errors import RemoteProtocolError, VerificationFailed
from protocol.keys import peer_name
from protocol.network import dump
from protocol.records import Arbitration, Bid, Verdict, open_record, seal
from tests.adversaries.stage import Stage, Strategy
from tests.adversaries.strategies import Cheat, Lazy, Liar
from tests.bundle_forge import Forge, plain
from tests.dispute_swarm import COURT_RULES, rulings_of, states_of, told
from tests.run_scene import make_run_swarm, run_state, run_until, submit_run, until_over
from tests.swarm_scenario import rest
from worker.cheats import UNIT_CHEATS

RULES = msgspec.structs.replace(COURT_RULES, audit_permille=1000, check_permille=1000, newcomer_permille=1000)
NOTARIES = 4
Found = dict[str, Any]


def court(seed: int, cast: dict[str, Strategy] | None = None, *, faults: Faults | None = None, **rules: int) -> Stage:
    """Six solvers of which s1 gets a unit, and four notaries. Every segment is checked."""
    changed = msgspec.structs.replace(RULES, **rules)
    return make_run_swarm(seed, solvers=6, rules=changed, notaries=NOTARIES, cast=cast, faults=faults)


def over(stage: Stage, *, seconds: float = 1500, **terms: Any) -> Found:
    """A run of two by two units, to its end and to rest."""
    found = until_over(stage, submit_run(stage, **terms)["job"], seconds=seconds)
    stage.check_quiet()
    return found


def of(found: Found, stage: Stage, name: str) -> list[Found]:
    """The deals of one solver."""
    return [deal for deal in found["deals"] if deal["solver"] == peer_name(stage.public(name))]


def honest_roots() -> set[str]:
    return {unit["root"] for unit in over(court(1))["run"]["units"]}


honest = cache(honest_roots)


def stake(stage: Stage, name: str) -> int:
    """What a peer has of the stake that it began with."""
    return stage.node("notary0").settler.free_stake(stage.public(name)) - 50_000_000


def test_an_honest_run_is_settled_and_nobody_disputes_it() -> None:
    stage = court(1)
    found = over(stage)
    assert found["state"] == "done", found
    assert len(found["deals"]) == 4 and all(deal["state"] == "settled" for deal in found["deals"])
    assert all(d["paid_micro"] > 0 for d in found["deals"]) and not found["run"]["rewinds"]
    assert states_of(stage) == []


@pytest.mark.parametrize("fraud", [*UNIT_FRAUDS, "skip-step"])
def test_a_cheating_unit_is_convicted_by_jurors_and_the_others_are_paid(fraud: str) -> None:
    stage = court(2, {"s1": Cheat(fraud)})
    found = over(stage)
    assert found["state"] == "done", found
    assert [deal["state"] for deal in of(found, stage, "s1")] == ["slashed"]
    assert found["culprits"] == [peer_name(stage.public("s1"))] and found["slashed_micro"] > 0
    assert stake(stage, "s1") == -found["slashed_micro"]
    assert set(rulings_of(stage).values()) == {("wrong", "segment", "jury")}
    others = [deal for deal in found["deals"] if deal not in of(found, stage, "s1")]
    assert all(deal["paid_micro"] == deal["vouchers_micro"] > 0 for deal in others)
    assert {unit["root"] for unit in found["run"]["units"]} == honest()
    assert not told(stage, "move"), "nobody played"


def test_a_run_that_is_being_ended_does_not_go_back_for_a_late_conviction() -> None:
    stage = court(2, {"s1": Cheat("skip-step")})
    job = submit_run(stage)["job"]
    run_until(stage, lambda: len(told(stage, "segment")) > 1)
    stage.node("alice").runs.runs[bytes.fromhex(job)].failed = "a unit of it could not be had"
    found = until_over(stage, job, seconds=1500)
    stage.check_quiet()
    assert [deal["state"] for deal in of(found, stage, "s1")] == ["slashed"], "it is convicted all the same"
    assert found["state"] == "failed" and not found["run"]["rewinds"], found


def test_a_run_that_may_not_go_back_again_ends_at_a_late_conviction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "REWINDS_MAX", 1)
    stage = court(2, {"s1": Cheat("skip-step")})
    found = over(stage)
    assert [deal["state"] for deal in of(found, stage, "s1")] == ["slashed"]
    assert found["state"] == "failed" and "was wrong" in found["reason"], found
    assert all(d["paid_micro"] == d["vouchers_micro"] for d in found["deals"] if d not in of(found, stage, "s1"))


def test_the_frauds_of_the_simulator_are_those_of_the_worker() -> None:
    assert set(UNIT_FRAUDS) == set(UNIT_CHEATS)


def test_what_a_tape_does_not_hold_is_wrong_to_jurors_too() -> None:
    stage = court(3)
    stage.peers["s1"].bad_tape = True
    found = over(stage)
    assert found["state"] == "done", found
    assert [deal["state"] for deal in of(found, stage, "s1")] == ["slashed"]
    assert set(rulings_of(stage).values()) == {("wrong", "segment", "jury")}
    assert stake(stage, "s1") < 0
    accusers = {who for who, data in told(stage, "dispute") if data.get("part") == "challenger"}
    assert accusers and all(stake(stage, who) >= 0 for who in accusers)


def test_who_accuses_a_unit_falsely_loses_and_the_unit_is_paid() -> None:
    stage = court(4, {"victor": Liar()})
    found = over(stage)
    assert found["state"] == "done", found
    assert "right" in states_of(stage) and "wrong" not in states_of(stage)
    assert all(deal["state"] == "settled" and deal["paid_micro"] > 0 for deal in found["deals"])
    assert stake(stage, "victor") <= -RULES.checker_stake_min_micro
    assert not found["culprits"] and not found["run"]["rewinds"]
    assert {unit["root"] for unit in found["run"]["units"]} == honest()


def test_who_accuses_a_cheat_of_what_it_did_not_compute_earns_nothing_by_it() -> None:
    """The one verifier that is there lies about a unit that is wrong indeed: its own root is no better."""
    stage = court(5, {"victor": Liar()})
    stage.peers["s1"].liar, stage.peers["s1"].lie = True, WRONG_END
    stage.run(seconds=3)
    for name in ("vera", "wendy"):
        stage.crash(name, for_ns=120 * SECOND)
    job = submit_run(stage)["job"]
    run_until(stage, lambda: bool(told(stage, "unit-slashed")), seconds=300)
    stage.peers["victor"].liar = False  # more lies than it may have open would hold claims until they lapse
    found = until_over(stage, job, seconds=1500)
    stage.check_quiet()
    assert [deal["state"] for deal in of(found, stage, "s1")] == ["slashed"], found
    about = {data["dispute"] for _, data in told(stage, "dispute") if data.get("solver") == stage.public("s1")}
    ruled = {(data["finding"], data["cause"]) for _, data in told(stage, "ruling") if data["dispute"] in about}
    assert ruled == {("wrong", "both")}
    assert stake(stage, "victor") < 0, "it lied about the others as well"


def test_a_verifier_that_signs_unseen_for_a_unit_loses_its_word() -> None:
    """Exact work leaves no room for an honest mistake, as float work does near its threshold."""
    stage = court(6, {"s1": Cheat("skip-backward"), "victor": Lazy(), "vera": Lazy()})
    found = over(stage)
    assert [deal["state"] for deal in of(found, stage, "s1")] == ["slashed"], found
    lost = {name for name in ("victor", "vera") if stake(stage, name) < 0}
    assert lost, "wendy found it, and its verifier is to blame"
    assert stake(stage, "wendy") >= 0


def test_jurors_get_from_the_accuser_what_both_parties_withhold() -> None:
    stage = court(7, {"s1": Cheat("skip-step")})
    job = submit_run(stage)["job"]
    run_until(stage, lambda: bool(told(stage, "dispute")), seconds=300)
    (accuser,) = {who for who, data in told(stage, "dispute") if data.get("part") == "challenger"}
    for name in ("s1", "alice"):
        stage.peers[name].withholds = set(stage.peers) - {accuser}
    run_until(stage, lambda: "wrong" in states_of(stage), seconds=300)
    assert set(rulings_of(stage).values()) == {("wrong", "segment", "jury")}
    stage.peers["alice"].withholds = set()
    found = until_over(stage, job, seconds=1500)
    stage.check_quiet()
    assert found["state"] == "done" and [deal["state"] for deal in of(found, stage, "s1")] == ["slashed"], found


def test_no_error_is_ordered_in_a_unit() -> None:
    stage = court(8, forced_ppm=1_000_000)
    found = over(stage)
    assert found["state"] == "done", found
    assert not told(stage, "ordered-error") and not told(stage, "rewind")
    assert {unit["root"] for unit in found["run"]["units"]} == honest()


class Ordering(Strategy):
    """A solver that would have an error ordered in its unit, for what it may then get wrong unpunished."""

    def plug(self, node: Any, stage: Stage) -> None:
        seal_it = node.desk.seal

        def sealed(record: Any) -> bytes:
            if isinstance(record, Bid):
                record = msgspec.structs.replace(record, forced_commitment=blake("a secret"))
            envelope: bytes = seal_it(record)
            return envelope

        node.desk.seal = sealed


def test_a_bid_that_lets_errors_be_ordered_gets_no_unit() -> None:
    stage = court(9, {"s0": Ordering()})
    found = over(stage)
    assert found["state"] == "done", found
    assert not of(found, stage, "s0")


@pytest.mark.parametrize("seed", range(4))
def test_no_seed_breaks_a_run_with_a_cheat_before_notaries(seed: int) -> None:
    faults = Faults.drawn_from(seed)
    stage = court(seed, {"s1": Cheat("garbage-activations")}, faults=faults)
    found = until_over(stage, submit_run(stage)["job"], seconds=3000)
    rest(stage, seconds=600)
    stage.check_quiet()
    assert found["state"] == "done", (seed, found)
    assert {unit["root"] for unit in found["run"]["units"]} == honest()


# --- offline -------------------------------------------------------------------------------------------------
@cache
def decided() -> tuple[Stage, str, Found]:
    """A run whose cheat was convicted, the dispute, and what is told of the run."""
    stage = court(10, {"s1": Cheat("garbage-activations")})
    found = over(stage)
    listed = [one["dispute"] for one in stage.command("alice", "disputes", {}).result["disputes"]]
    heard = (dispute for dispute in listed if stage.command("alice", "dispute", {"dispute": dispute}).result["jurors"])
    return stage, next(heard), found  # a second challenge of the same segment ended with the first


def exported(who: str) -> Found:
    stage, dispute, _ = decided()
    reply = stage.command(who, "dispute-bundle", {"dispute": dispute})
    assert reply.error is None, reply.error
    return json.loads(json.dumps({**readable(reply.result), "schema": SCHEMA, "network": dump(stage.network)}))  # type: ignore[no-any-return]


@pytest.mark.parametrize("who", ["alice", "s1", "notary0"])
def test_whoever_holds_the_dispute_proves_it_offline(who: str) -> None:
    stage, dispute, _ = decided()
    report = verify(exported(who), stage.network.id)
    assert (report.dispute.hex(), report.loser, report.cause, report.finding) == (dispute, "solver", "jury", "wrong")
    assert len(report.jurors) >= stage.network.rules.tolerant_quorum and not report.by_word


def word(bundle: Found, place: int, *, by: str = "", **fields: Any) -> str:
    """A juror's verdict with other fields, signed again by itself or by another peer."""
    stage, _, _ = decided()
    verdict, _, _ = open_record(bytes.fromhex(bundle["jurors"][place]), network=stage.network.id)
    assert isinstance(verdict, Verdict)
    key = stage.peers[by].key if by else stage.by_key[verdict.checker].key
    return seal(msgspec.structs.replace(verdict, checker=key.public, **fields), key).hex()


def put(made: Callable[[Found], str]) -> Callable[[Found], None]:
    """One word less than a quorum beside this one."""

    def apply(bundle: Found) -> None:
        quorum = decided()[0].network.rules.tolerant_quorum
        bundle["jurors"] = [*bundle["jurors"][: quorum - 1], made(bundle)]

    return apply


def flipped(text: str) -> str:
    data = bytearray.fromhex(text)
    data[len(data) // 4] ^= 1
    return data.hex()


FORGERIES: dict[str, Callable[[Found], None]] = {
    "no words": lambda b: b.update(jurors=[]),
    "a word less than a quorum": lambda b: b.update(jurors=b["jurors"][:2]),
    "one word twice": put(lambda b: b["jurors"][0]),
    "a second word of one juror": put(lambda b: word(b, 0, operations=7)),
    "a notary's word": put(lambda b: word(b, 0, by="notary1")),
    "the accused one's word": put(lambda b: word(b, 0, by="s1")),
    "the submitter's word": put(lambda b: word(b, 0, by="alice")),
    "a verifier's verdict": put(lambda b: word(b, 2, role="verifier")),
    "a word on another segment": put(lambda b: word(b, 2, segments=(0,), wrong_segment=0)),
    "a word on another proof": put(lambda b: word(b, 2, proof=bytes(32))),
    "a word that finds another root": put(lambda b: word(b, 2, found_root=blake("other"))),
    "a word that measured a distance": put(lambda b: word(b, 2, l1_ppb=1)),
    "a word for the work": put(lambda b: word(b, 2, finding="right")),
    "a record that is no verdict": put(lambda b: b["challenge"]),
    "moves": lambda b: b.update(moves=[b["challenge"]]),
    "rounds": lambda b: b.update(rounds=[["00" * 32, "00" * 32]]),
    "a Program": lambda b: b.update(program="00"),
    "no challenge": lambda b: b.update(challenge=""),
    "changed evidence": lambda b: b.update(case=flipped(b["case"])),
    "no arbitration but a record": lambda b: b.update(arbitration=b["challenge"]),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_no_forged_dispute_is_believed(name: str) -> None:
    bundle = deepcopy(exported("alice"))
    FORGERIES[name](bundle)
    with pytest.raises(RemoteProtocolError):
        verify(bundle, decided()[0].network.id)


def test_words_that_say_other_than_the_notaries_are_refused() -> None:
    stage, _, _ = decided()
    bundle = deepcopy(exported("alice"))
    bundle["jurors"] = [word(bundle, place, finding="right") for place in range(stage.network.rules.tolerant_quorum)]
    with pytest.raises(RemoteProtocolError, match="its jurors say the challenger loses"):
        verify(bundle, stage.network.id)
    bundle["arbitration"] = ""
    report = verify(bundle, stage.network.id)
    assert (report.loser, report.finding) == ("challenger", "")


def file_of(bundle: Found) -> DisputeFile:
    """A file of its own of the dispute in a bundle, without its words."""
    stage, case = decided()[0], bytes.fromhex(bundle["case"])
    envelope = bytes.fromhex(bundle["challenge"])
    request = decode(CheckRequest, case, bytes_max=params.MESSAGE_BYTES_MAX)
    kept = Kept(challenge=envelope, case=case, part="observer", opened_ns=0)
    return open_dispute(envelope, request, network=stage.network, kept=kept)


def test_two_words_of_one_juror_are_kept_and_a_third_is_not() -> None:
    stage, _, _ = decided()
    bundle = exported("alice")
    file = file_of(bundle)
    said = [
        bundle["jurors"][0], word(bundle, 0, operations=7), word(bundle, 0, found_root=blake("other")),
        word(bundle, 0, finding="right"), word(bundle, 0, by="s1"),
    ]  # fmt: skip
    taken = []
    for envelope in map(bytes.fromhex, said):
        verdict, _, _ = open_record(envelope, network=stage.network.id)
        assert isinstance(verdict, Verdict)
        taken.append(file.add_word(verdict, envelope, network=stage.network))
    assert taken == [True, False, True, False, False], "the same word again, and what comes after two, prove no more"
    assert [one.hex() for one in make(file, b"")["jurors"]] == [said[0], said[2]]


def test_a_juror_who_signed_two_words_is_told_and_counts_only_where_the_notaries_had_counted_it() -> None:
    stage, _, _ = decided()
    bundle, quorum = deepcopy(exported("alice")), stage.network.rules.tolerant_quorum
    first, _, _ = open_record(bytes.fromhex(bundle["jurors"][0]), network=stage.network.id)
    assert isinstance(first, Verdict)
    other = word(bundle, 0, found_root=blake("other"))
    bundle["jurors"] = [*bundle["jurors"][:quorum], other]
    report = verify(bundle, stage.network.id)
    assert report.two_words == (first.checker,) and report.by_word, "which came first is the notaries' word"
    assert (report.loser, report.finding, len(report.jurors)) == ("solver", "wrong", quorum)
    with pytest.raises(VerificationFailed, match="decide nothing"):
        verify({**bundle, "arbitration": ""}, stage.network.id)
    spoke = {open_record(bytes.fromhex(one), network=stage.network.id)[0].checker for one in bundle["jurors"]}  # type: ignore[union-attr]
    more = next(juror for juror in file_of(bundle).jurors(stage.network) if juror not in spoke)
    bundle["jurors"].append(word(bundle, 0, by=stage.by_key[more].name))
    report = verify(bundle, stage.network.id)
    assert report.two_words == (first.checker,) and not report.by_word and first.checker not in report.jurors
    for again in (other, word(bundle, 0, finding="right")):
        with pytest.raises(VerificationFailed, match="twice, or more than two"):
            verify({**bundle, "jurors": [*bundle["jurors"], again]}, stage.network.id)


def test_words_that_would_have_paid_nobody_are_no_ground_for_a_ruling_that_paid() -> None:
    stage, _, _ = decided()
    bundle = deepcopy(exported("alice"))
    count, other = stage.network.rules.tolerant_quorum, blake("other")
    bundle["jurors"] = [word(bundle, place, found_root=other) for place in range(count)]
    with pytest.raises(VerificationFailed, match="ruled by repeated, the words of the jurors come to both"):
        verify(bundle, stage.network.id)


def proof_of(unit: int) -> tuple[Found, Stage]:
    """proof.json of one unit."""
    stage, _, found = decided()
    job = found["run"]["units"][unit]["job"]
    reply = stage.command("alice", "bundle", {"job": job})
    assert reply.error is None, reply.error
    return make_bundle(plain(reply.result), network=dump(stage.network), state={}), stage


def cheated_unit() -> int:
    stage, _, found = decided()
    (deal,) = of(found, stage, "s1")
    jobs = [run_state(stage, unit["job"]) for unit in found["run"]["units"]]
    return next(n for n, job in enumerate(jobs) if deal["deal"] in {one["deal"] for one in job["deals"]})


def checked(bundle: Found, stage: Stage) -> BundleReport:
    return verify_bundle(bundle, stage.network.id)


def test_the_proof_of_a_unit_says_what_jurors_found_and_counts_nothing_of_it() -> None:
    bundle, stage = proof_of(cheated_unit())
    report = checked(bundle, stage)
    assert report.complete and [deal.closed for deal in report.deals if not deal.counted] == ["slashed"]
    assert any("re-execute it to the bit and found segment" in line for line in report.proved()), report.proved()


def test_a_finding_about_a_unit_by_an_operation_is_refused() -> None:
    bundle, stage = proof_of(cheated_unit())
    forge = Forge(bundle, stage)
    closings = [(deal, place) for deal in forge.bundle["deals"] for place in range(len(deal["closing"]))]
    deal, place = next(
        (deal, place) for deal, place in closings if isinstance(forge.record(deal["closing"][place]), Arbitration)
    )
    record: Any = forge.record(deal["closing"][place])
    played = {"cause": "leaf", "level": "block", "operations": 1}
    rulings = tuple(bytes.fromhex(forge.changed(ruling.hex(), **played)) for ruling in record.rulings)
    deal["closing"][place] = forge.changed(deal["closing"][place], rulings=rulings)
    with pytest.raises(Refused, match="by leaf on work that is not judged so"):
        checked(forge.bundle, stage)


def test_neither_a_proof_nor_a_case_of_a_unit_in_which_an_error_may_be_ordered_is_believed() -> None:
    bundle, stage = proof_of(0)
    forge = Forge(bundle, stage)
    deal = forge.deal()
    deal["agreement"] = forge.changed(deal["agreement"], forced_commitment=blake("a secret"))
    with pytest.raises(Refused) as refused:
        checked(forge.bundle, stage)
    assert refused.value.check == "agreement-errors"
    request = msgspec.msgpack.decode(bytes.fromhex(exported("alice")["case"]), type=CheckRequest)
    open_evidence(request, network=stage.network)
    changed = forge.changed(request.agreement.hex(), forced_commitment=blake("a secret"))
    with pytest.raises(VerificationFailed, match="in whose deal an error may be ordered"):
        open_evidence(msgspec.structs.replace(request, agreement=bytes.fromhex(changed)), network=stage.network)
