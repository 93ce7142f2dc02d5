"""`receipts verify` where notaries judge: a dispute counts by its quorum, and is told in words."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from protocol.bundle import BundleReport, make_bundle, verify_bundle
from protocol.bundle_deal import Refused
from protocol.codec import blake
from protocol.keys import SigningKey, short
from protocol.network import Network, Rules, dump
from protocol.records import (
    Arbitration,
    Challenge,
    Envelope,
    Fault,
    Receipt,
    Ruling,
    Slash,
    Verdict,
    add_signature,
    decode_body,
    open_record,
    record_id,
    seal,
)
from tests.bundle_forge import key_of, written
from tests.swarm_scenario import SEGMENTS, make_task

NOTARIES = [SigningKey.from_seed(blake("test/notary", bytes([n]))) for n in range(4)]
ROOTS = [blake("test/root", bytes([n])) for n in range(SEGMENTS + 1)]
OTHER = blake("test/other")
EVIDENCE, NETWORK = written(
    make_task(Network("any", Rules(), ())),
    ROOTS,
    [blake("test/checkpoint", bytes([n])) for n in range(SEGMENTS)],
    notaries=NOTARIES,
)


class Case:
    """The bundle of an honest job in a network with four notaries, and records that could lie beside it."""

    def __init__(self) -> None:
        whole = msgspec.json.decode(msgspec.json.encode(EVIDENCE))
        self.bundle = make_bundle(whole, network=dump(NETWORK), state={})
        self.deal: dict[str, Any] = self.bundle["deals"][0]
        self.id = self.record_id(self.deal["agreement"])
        self.proof = self.record_id(self.deal["proof"])
        verdict = self.record(self.deal["verdicts"][0])
        assert isinstance(verdict, Verdict)
        self.verdict = verdict
        self.segment = verdict.segments[0]

    def record(self, text: str) -> Any:
        return decode_body(msgspec.msgpack.decode(bytes.fromhex(text), type=Envelope).body, network=NETWORK.id)

    @staticmethod
    def record_id(text: str) -> bytes:
        return record_id(msgspec.msgpack.decode(bytes.fromhex(text), type=Envelope).body)

    def arbitration(
        self, finding: str, *, by: str = "walter", cause: str = "leaf", quorum: int = 3, **fields: Any
    ) -> str:
        key = key_of(by)
        terms = Challenge(
            network=NETWORK.id, challenger=key.public, agreement=self.id, proof=self.proof, segment=self.segment,
            claimed_root=ROOTS[self.segment + 1], found_root=OTHER, operations=10**10, created_ns=1,
        )  # fmt: skip
        challenge = seal(msgspec.structs.replace(terms, **fields), key)
        dispute = open_record(challenge, network=NETWORK.id)[1]
        rulings = tuple(
            seal(
                Ruling(
                    network=NETWORK.id, notary=notary.public, dispute=dispute, agreement=self.id,
                    segment=fields.get("segment", self.segment), finding=finding, level="block", cause=cause,
                    operations=1000, transcript=bytes(32),
                ),  # type: ignore[arg-type]
                notary,
            )
            for notary in NOTARIES[:quorum]
        )  # fmt: skip
        record = Arbitration(
            network=NETWORK.id, agreement=self.id, author=key.public, challenge=challenge, rulings=rulings
        )
        return seal(record, key).hex()

    def accusation(self, by: str = "walter") -> str:
        key = key_of(by)
        wrong = msgspec.structs.replace(
            self.verdict, checker=key.public, role="whistleblower", segments=(self.segment,), finding="wrong",
            wrong_segment=self.segment, claimed_root=ROOTS[self.segment + 1], found_root=OTHER, operations=10**10,
        )  # fmt: skip
        return seal(wrong, key).hex()

    def fault(self) -> str:
        record = Fault(
            network=NETWORK.id, agreement=self.id, author=key_of("walter").public,
            verdict=bytes.fromhex(self.deal["verdicts"][0]),
        )  # fmt: skip
        return seal(record, key_of("walter")).hex()

    def check(self) -> BundleReport:
        return verify_bundle(self.bundle, NETWORK.id)

    def unfinished(self) -> BundleReport:
        """As a bundle whose job does not claim to be done."""
        self.bundle["final_root"] = ""
        return self.check()

    def refused(self) -> str:
        with pytest.raises(Refused) as told:
            self.check()
        return told.value.check


@pytest.fixture
def case() -> Case:
    return Case()


def test_an_honest_job_is_proved_and_the_pool_has_its_part(case: Case) -> None:
    report = case.check()
    paid = report.paid_micro
    assert report.complete
    assert report.deals[0].pool_micro == paid * Rules().pool_permille // 1000 > 0
    assert any("to the pool" in line for line in report.proved())


def test_a_false_challenge_is_told_and_the_work_counts(case: Case) -> None:
    case.deal["verdicts"].append(case.accusation())
    case.deal["closing"].append(case.arbitration("right"))
    report = case.check()
    assert report.complete
    line = next(line for line in report.proved() if "challenge" in line)
    assert f"challenge of segment {case.segment} false" in line
    assert short(key_of("walter").public) in line
    assert "at least 3 of 4 notaries executed the operation" in line
    assert not any("no finding of notaries" in line for line in report.not_proved())


@pytest.mark.parametrize("other", ["", "alice"])
def test_an_accusation_that_nobody_judged_is_told(case: Case, other: str) -> None:
    """It counts for nothing, as on the node: its checker did not bring it before the notaries, or it was left out."""
    case.deal["verdicts"].append(case.accusation())
    if other:
        case.deal["closing"].append(case.arbitration("right", by=other))  # another's challenge, of that segment
    report = case.check()
    assert report.complete
    assert any("1 checker(s) found a segment wrong, and no finding" in line for line in report.not_proved())


def test_who_only_accused_needs_no_fee_and_who_checked_does(case: Case) -> None:
    case.deal["verdicts"].append(case.accusation())
    case.check()
    settlement = case.record(case.deal["closing"][0])
    unpaid = seal(msgspec.structs.replace(settlement, fees=()), key_of("alice"))
    case.deal["closing"][0] = add_signature(unpaid, key_of("bob"), network=NETWORK.id).hex()
    assert case.refused() == "settlement-fees"


def test_an_ordered_error_blames_nobody(case: Case) -> None:
    case.deal["closing"].append(case.arbitration("forced", cause="forced"))
    report = case.check()
    assert report.complete
    assert any(f"the error in segment {case.segment} was ordered" in line for line in report.proved())


@pytest.mark.parametrize("cause", ["leaf", "both", "silence"])
def test_work_that_notaries_found_wrong_is_not_built_on(case: Case, cause: str) -> None:
    case.deal["closing"].append(case.arbitration("wrong", cause=cause))
    assert case.refused() == "final-root"
    report = case.unfinished()
    assert (report.deals[0].closed, report.segments_done, report.paid_micro) == ("slashed", 0, 0)
    (line,) = [line for line in report.proved() if "stake" in line]
    assert f"found segment {case.segment} wrong" in line
    assert ("executed" in line) == (cause != "silence")


def test_whose_right_verdict_is_refuted_is_told(case: Case) -> None:
    case.deal["closing"] += [case.arbitration("wrong"), case.fault()]
    report = case.unfinished()
    assert report.deals[0].faults == (case.verdict.checker,)
    assert any(short(case.verdict.checker) in line and "loses a stake" in line for line in report.proved())


def test_a_fault_takes_a_finding_that_refutes_the_verdict(case: Case) -> None:
    case.deal["closing"].append(case.fault())
    assert case.refused() == "fault"
    case.deal["closing"].append(case.arbitration("wrong", cause="withheld"))  # the solver gave up
    assert case.refused() == "fault"


def test_an_arbitration_holds_by_its_quorum_and_what_it_is_about(case: Case) -> None:
    settled = list(case.deal["closing"])
    bad = [
        case.arbitration("wrong", quorum=2),
        case.arbitration("wrong", proof=OTHER),
        case.arbitration("wrong", claimed_root=blake("another")),
        case.arbitration("wrong", segment=SEGMENTS),
        case.arbitration("wrong", by="bob"),
    ]
    for envelope in bad:
        case.deal["closing"] = [*settled, envelope]
        assert case.refused() == "arbitration"
    case.deal["closing"] = [*settled, case.arbitration("right"), case.arbitration("wrong")]
    assert case.refused() == "arbitration", "two findings on one dispute"
    case.deal["closing"] = [*settled, case.arbitration("right"), case.arbitration("right", quorum=4)]
    assert len(case.check().deals[0].disputes) == 1, "two records of one dispute are one"


def test_checkers_slash_nobody_where_notaries_judge(case: Case) -> None:
    slash = Slash(
        network=NETWORK.id, agreement=case.id, author=key_of("walter").public, proof=bytes.fromhex(case.deal["proof"]),
        reveals=tuple(map(bytes.fromhex, case.deal["reveals"])), verdicts=(bytes.fromhex(case.accusation()),),
    )  # fmt: skip
    case.deal["closing"].append(seal(slash, key_of("walter")).hex())
    assert case.refused() == "slash"


def test_what_closes_a_deal_is_a_closing(case: Case) -> None:
    receipt = case.record(case.deal["receipts"][0])
    assert isinstance(receipt, Receipt)
    case.deal["closing"].append(case.deal["receipts"][0])
    assert case.refused() == "closing-record"
