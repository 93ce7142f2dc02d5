"""`receipts verify` of a tolerant job: thresholds from signed profiles, findings from signed distances, a quorum."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from protocol.bundle import BundleReport, make_bundle, verify_bundle
from protocol.bundle_deal import Refused
from protocol.codec import blake
from protocol.keys import SigningKey
from protocol.network import Network, Rules, dump
from protocol.profile import KERNELS, Measured, Profile
from protocol.records import Envelope, Slash, Verdict, decode_body, seal
from protocol.task import TaskSpec, task_id
from tests.bundle_forge import key_of, written
from tests.swarm_scenario import SEGMENTS, make_task

NOTARIES = [SigningKey.from_seed(blake("test/notary", bytes([n]))) for n in range(4)]
ROOTS = [blake("test/root", bytes([n])) for n in range(SEGMENTS + 1)]
FOUND = [blake("test/found", bytes([n])) for n in range(3)]
CHECKERS = ("victor", "walter", "wendy", "vera")
L1, L2 = 30_000, 60_000  # the thresholds that follow from a noise of 10,000 and 20,000 ppb


def profile_of(name: str, about: TaskSpec, network: bytes, **fields: Any) -> bytes:
    """A profile by one of the checkers, in its envelope."""
    measured = tuple(Measured(k.name, L1 // 3, L2 // 3) for k in KERNELS if k.judges)
    profile = Profile(
        network=network, task=task_id(about), verifier=key_of(name).public, mode="tolerant", segments=(0, 1),
        seeds=(7, 6), measured=measured, other_seed_ppb=10**9, gauges=(), operations_per_second=10**9, created_ns=1,
    )  # fmt: skip
    return seal(msgspec.structs.replace(profile, **fields), key_of(name))


def evidence(notaries: list[SigningKey]) -> tuple[dict[str, Any], Network]:
    """An honest tolerant job of the written bundle."""
    task = msgspec.structs.replace(make_task(Network("any", Rules(), ())), mode="tolerant")
    checkpoints = [blake("test/checkpoint", bytes([n])) for n in range(SEGMENTS)]
    return written(task, ROOTS, checkpoints, notaries=notaries, checkers=CHECKERS, profiles=profile_of)


class Case:
    """The bundle, and what else could lie in it."""

    def __init__(self, notaries: list[SigningKey]) -> None:
        made, self.network = evidence(notaries)
        self.bundle = make_bundle(msgspec.json.decode(msgspec.json.encode(made)), network=dump(self.network), state={})
        self.deal: dict[str, Any] = self.bundle["deals"][0]
        self.verdict: Verdict = self.record(self.deal["verdicts"][0])
        self.segment = self.verdict.segments[0]

    def record(self, text: str) -> Any:
        return decode_body(msgspec.msgpack.decode(bytes.fromhex(text), type=Envelope).body, network=self.network.id)

    def judge(self, by: str, finding: str, l1: int, l2: int = 0, **fields: Any) -> str:
        """A verdict on one drawn segment; each machine finds another root."""
        key = key_of(by)
        doubts = finding != "right"
        judged = msgspec.structs.replace(
            self.verdict, checker=key.public, segments=(self.segment,), finding=finding, l1_ppb=l1, l2_ppb=l2,
            wrong_segment=self.segment if doubts else 0, operations=10**10,
            claimed_root=ROOTS[self.segment + 1] if doubts else bytes(32),
            found_root=blake("test/found", key.public) if doubts else bytes(32),
        )  # fmt: skip
        return seal(msgspec.structs.replace(judged, **fields), key).hex()

    def slash(self, *verdicts: str) -> str:
        record = Slash(
            network=self.network.id, agreement=self.verdict.agreement, author=key_of("alice").public,
            proof=bytes.fromhex(self.deal["proof"]),
            reveals=tuple(bytes.fromhex(r) for r in self.deal["reveals"]),
            verdicts=tuple(bytes.fromhex(v) for v in verdicts),
        )  # fmt: skip
        return seal(record, key_of("alice")).hex()

    def check(self) -> BundleReport:
        return verify_bundle(self.bundle, self.network.id)

    def unfinished(self) -> BundleReport:
        """As a bundle whose job does not claim to be done, with no closing yet."""
        self.bundle["final_root"] = ""
        self.deal["closing"] = []
        return self.check()

    def refused(self) -> str:
        with pytest.raises(Refused) as told:
            self.check()
        return told.value.check


@pytest.fixture(params=[0, 4], ids=["no notaries", "notaries"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(NOTARIES[: request.param])


def test_an_honest_tolerant_job_verifies_and_says_how_it_was_judged(case: Case) -> None:
    report = case.check()
    assert report.complete
    words = " ".join(report.proved())
    assert "3 staked verifiers profiled" in words
    assert "threshold of 3.0e-05 of a segment's update (L2 6.0e-05)" in words
    assert "ended within 1.0e-05" in words
    assert "what those who signed them measured" in " ".join(report.not_proved())


def test_the_thresholds_follow_from_the_profiles_and_from_nothing_else(case: Case) -> None:
    whole = case.deal["profiles"]
    task, network = make_task(case.network), case.network.id
    task = msgspec.structs.replace(task, mode="tolerant")
    loud = tuple(Measured(k.name, 50_000, 50_000) for k in KERNELS if k.judges)
    for profiles in (
        [],
        whole[:1],  # one verifier decides nothing
        [whole[0], whole[0]],
        [profile_of(name, task, network, measured=loud).hex() for name in CHECKERS[:3]],  # other thresholds
        [profile_of(name, task, network, task=bytes(32)).hex() for name in CHECKERS[:3]],
        [*whole[:2], case.deal["agreement"]],
        [*whole[:2], profile_of("mallory", task, network).hex()],  # of no stake, though it says the same
    ):
        case.deal["profiles"] = profiles
        assert case.refused() == "tolerance", len(profiles)


def test_a_tolerance_that_the_rules_refuse_is_no_agreement() -> None:
    task = msgspec.structs.replace(make_task(Network("any", Rules(), ())), mode="tolerant")
    loud = tuple(Measured(k.name, 10**6, 10**6) for k in KERNELS if k.judges)

    def shout(name: str, task: TaskSpec, network: bytes) -> bytes:
        return profile_of(name, task, network, measured=loud)

    made, network = written(task, ROOTS, ROOTS[1:], checkers=CHECKERS, profiles=shout)
    bundle = make_bundle(msgspec.json.decode(msgspec.json.encode(made)), network=dump(network), state={})
    with pytest.raises(Refused, match="lower precision passes unseen"):
        verify_bundle(bundle, network.id)


@pytest.mark.parametrize(
    ("finding", "l1", "l2", "fits"),
    [
        ("right", L1, L2, True), ("right", L1 + 1, 0, False), ("right", 0, L2 + 1, False),
        ("unsure", L1 + 1, 0, True), ("unsure", 10 * L1, 10 * L2, True), ("unsure", L1, L2, False),
        ("unsure", 10 * L1 + 1, 0, False), ("wrong", 10 * L1 + 1, 0, True), ("wrong", 0, 10 * L2 + 1, True),
        ("wrong", 10 * L1, 10 * L2, False), ("wrong", 0, 0, False),
    ],
)  # fmt: skip
def test_a_finding_must_follow_from_its_own_distances(finding: str, l1: int, l2: int, fits: bool) -> None:
    case = Case([])
    case.deal["verdicts"].append(case.judge("walter", finding, l1, l2))
    if fits:
        case.unfinished()
    else:
        assert case.refused() == "verdict-distance"


def test_who_decides_a_doubt_goes_by_two_thresholds(case: Case) -> None:
    wrong, right = case.judge("walter", "wrong", 2 * L1 + 1), case.judge("walter", "right", 2 * L1)
    for second in (wrong, right):
        case.deal["verdicts"] = [second]
        assert case.refused() == "verdict-distance", "nobody was in doubt"
        case.deal["verdicts"] = [second, case.judge("walter", "unsure", L1 + 1, role="whistleblower")]
        assert case.refused() == "verdict-distance", "nobody decides its own doubt"
        case.deal["verdicts"] = [case.judge("wendy", "unsure", L1 + 1), second]
        case.unfinished()
    case.deal["verdicts"] = [case.judge("wendy", "unsure", L1 + 1), case.judge("walter", "right", 2 * L1 + 1)]
    assert case.refused() == "verdict-distance"


def test_exact_work_has_no_distances_and_a_tolerant_task_no_exact_agreement() -> None:
    task = make_task(Network("any", Rules(), ()))
    made, network = written(task, ROOTS, ROOTS[1:])
    bundle = make_bundle(msgspec.json.decode(msgspec.json.encode(made)), network=dump(network), state={})
    deal = bundle["deals"][0]
    assert verify_bundle(bundle, network.id).complete
    body = msgspec.msgpack.decode(bytes.fromhex(deal["verdicts"][0]), type=Envelope).body
    verdict = decode_body(body, network=network.id)
    assert isinstance(verdict, Verdict)
    honest = deal["verdicts"]
    deal["verdicts"] = [seal(msgspec.structs.replace(verdict, l1_ppb=1), key_of("victor")).hex()]
    with pytest.raises(Refused) as told:
        verify_bundle(bundle, network.id)
    assert told.value.check == "verdict-distance"
    deal["verdicts"], deal["profiles"] = honest, [profile_of("victor", task, network.id).hex()]
    with pytest.raises(Refused) as told:
        verify_bundle(bundle, network.id)
    assert told.value.check == "tolerance"


def test_a_quorum_of_distances_convicts_though_each_found_another_root() -> None:
    case = Case([])
    far = [case.judge(name, "wrong", 10**8) for name in CHECKERS]
    case.deal["verdicts"], case.deal["closing"] = far[:2], [case.slash(*far[:2])]
    case.bundle["final_root"] = ""
    report = case.check()
    assert report.deals[0].closed == "slashed"
    assert not report.deals[0].verified
    for few in (far[:1], [far[0], far[0]]):
        case.deal["closing"] = [case.slash(*few)]
        assert case.refused() == "slash"
    case.deal["closing"] = [case.slash(far[0], case.judge("wendy", "wrong", L1))]
    assert case.refused() == "verdict-distance"


def test_where_notaries_judge_no_quorum_of_checkers_does() -> None:
    case = Case(NOTARIES)
    far = [case.judge(name, "wrong", 10**8) for name in CHECKERS[1:]]
    case.deal["verdicts"] += far
    assert case.check().complete, "nobody pressed it"
    assert "3 checker(s) found a segment wrong" in " ".join(case.check().not_proved())
    case.deal["closing"] = [case.slash(*far)]
    assert case.refused() == "slash"


def test_a_lone_accusation_is_cleared_by_a_quorum_and_by_no_fewer() -> None:
    case = Case([])
    honest = case.deal["verdicts"]
    lie = case.judge("walter", "wrong", 10**9)
    clear = [case.judge(name, "right", 10) for name in ("wendy", "vera")]
    for verdicts, done in (
        ([*honest, lie], False),
        ([*honest, lie, clear[0]], True),
        ([lie, *clear], False),  # nobody ran the rest of the draw
    ):
        case.deal["verdicts"] = verdicts
        assert case.unfinished().deals[0].verified is done


def test_a_doubt_leaves_the_other_segments_cleared(case: Case) -> None:
    drawn = case.verdict.segments
    assert len(drawn) > 1
    first = drawn[0]
    doubt = case.judge("victor", "unsure", L1 + 1, segments=drawn, wrong_segment=first, claimed_root=ROOTS[first + 1])
    second = case.judge("walter", "right", 10, segments=(first,))
    case.deal["verdicts"] = [doubt]
    assert not case.unfinished().deals[0].verified
    case.deal["verdicts"] = [doubt, second]
    assert case.unfinished().deals[0].verified
