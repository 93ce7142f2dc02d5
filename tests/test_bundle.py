"""The offline check of a job's evidence: everything honest passes, every single corruption is refused by name."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.simulator import Faults, Simulation
from protocol import merkle, safetensors
from protocol.bundle import BundleReport, verify_bundle, verify_checkpoint, verify_weights
from protocol.bundle_deal import Refused
from protocol.errors import VerificationFailed
from protocol.records import Claim, Slash, StakeMove, Verdict
from protocol.task import TaskSpec
from tests.bundle_forge import Forge, made

HONEST = made(1)
CAUGHT = made(0, cheat="skip-step")


@functools.cache
def faulty(seed: int) -> tuple[dict[str, Any], Simulation, BundleReport]:
    """A swarm with lost messages, crashes and one-sided closings, its bundle and what that proves."""
    bundle, swarm = made(seed, Faults.drawn_from(seed))
    return bundle, swarm, verify_bundle(bundle, swarm.network.id)


def found(what: Callable[[BundleReport], bool]) -> Forge:
    """The first faulty swarm whose job went so. Seeds are searched, so that a change of the node moves no test."""
    bundle, swarm, _ = next(run for seed in range(4, 200) if what((run := faulty(seed))[2]))
    return Forge(bundle, swarm)


def shape(report: BundleReport) -> list[tuple[str, bool]]:
    """How its deals ended, and which count."""
    return [(deal.closed, deal.counted) for deal in report.deals]


@pytest.fixture
def forge() -> Forge:
    return Forge(*HONEST)


def check(forge: Forge) -> BundleReport:
    return verify_bundle(json.loads(json.dumps(forge.bundle)), forge.network)


def refused(forge: Forge) -> str:
    """The name of the check that fails."""
    with pytest.raises(Refused) as told:
        check(forge)
    assert told.value.what
    assert told.value.as_dict()["check"] == told.value.check
    return told.value.check


# --- what is honest passes ---------------------------------------------------------------------------------
def test_an_honest_bundle_proves_its_chain_its_checks_and_its_payments(forge: Forge) -> None:
    report = check(forge)
    assert (report.complete, report.segments_done, report.segments) == (True, 6, 6)
    assert (report.operations, report.operations_checked, report.checked_permille) == (60 * 10**9, 20 * 10**9, 333)
    assert (report.paid_micro, report.fees_micro) == (60_000, 30_000)
    assert report.final_root.hex() == forge.bundle["final_root"]
    (deal,) = report.deals
    assert (deal.closed, deal.verified, deal.counted, deal.drawn == deal.checked) == ("settled", True, True, True)
    assert len(report.proved()) == 3
    assert "4 segment(s) that nobody re-executed" in " ".join(report.not_proved())


def test_a_slashed_deal_is_shown_and_nothing_is_built_on_it() -> None:
    report = check(Forge(*CAUGHT))
    assert report.complete
    assert [(deal.closed, deal.counted) for deal in report.deals] == [("slashed", False), ("settled", True)]
    assert any("slashed" in line for line in report.proved())


@pytest.mark.parametrize("seed", range(4, 40))
def test_the_evidence_of_every_finished_job_verifies(seed: int) -> None:
    """Whatever was lost, doubled, late or killed: what the node calls done, the bundle proves to be done."""
    _, _, report = faulty(seed)
    assert report.complete
    unchecked = [deal for deal in report.deals if deal.closed == "claimed" and not deal.verified and deal.paid_micro]
    assert any("was paid without a check" in line for line in report.not_proved()) == bool(unchecked)


def test_a_bundle_of_an_unfinished_job_is_honest_about_it(forge: Forge) -> None:
    forge.bundle["final_root"] = ""
    deal = forge.deal()
    deal.update(verdicts=[], closing=[])
    report = check(forge)
    assert (report.complete, report.segments_done, report.operations) == (False, 0, 0)
    assert "the job is not finished" in " ".join(report.not_proved())
    forge.bundle["deals"] = []
    assert check(forge).segments_done == 0


# --- single corruptions ------------------------------------------------------------------------------------
def field(path: str, check_name: str, **fields: Any) -> Any:
    """Change fields of the record at `path` and sign it again with its signers' keys."""

    def change(forge: Forge) -> None:
        deal = forge.deal()
        name, _, index = path.partition(".")
        if index:
            deal[name][int(index)] = forge.changed(deal[name][int(index)], **fields)
        else:
            deal[name] = forge.changed(deal[name], **fields)

    return pytest.param(change, check_name, id=f"{path}: {', '.join(fields)} -> {check_name}")


OTHER = bytes([7]) * 32
RESIGNED = [
    field("agreement", "agreement-task", task=OTHER),
    field("agreement", "agreement-operations", operations=1),
    field("agreement", "agreement-segments", last_segment=7),
    field("agreement", "agreement-checks", check_permille=1),
    field("agreement", "agreement-lock", lock_micro=1),
    field("agreement", "agreement-channel", channel_micro=1),
    field("agreement", "receipt-order", created_ns=1),  # another agreement than the receipts are of
    field("receipts.0", "receipt-order", agreement=OTHER),
    field("receipts.0", "receipt-order", sequence=1),
    field("receipts.0", "receipt-order", segment=3),
    field("receipts.0", "receipt-chain", in_root=OTHER),
    field("receipts.0", "receipt-chain", previous=OTHER),
    field("receipts.3", "receipt-chain", previous=OTHER),
    field("receipts.0", "receipt-operations", operations=1),
    field("receipts.0", "receipt-amount", amount_micro=10_001),
    field("receipts.2", "receipt-chain", out_root=OTHER),  # receipt 3 follows another one
    field("receipts.5", "voucher", out_root=OTHER),  # the voucher pays for another one
    field("voucher", "voucher-amount", cumulative_micro=60_001),
    field("voucher", "voucher-amount", cumulative_operations=1),
    field("voucher", "voucher", sequence=4),
    field("voucher", "voucher", receipt=OTHER),
    field("voucher", "voucher", agreement=OTHER),
    field("proof", "proof-root", root=OTHER),
    field("proof", "proof", receipts=5),
    field("proof", "proof", program=OTHER),
    field("proof", "proof", agreement=OTHER),
    field("proof", "proof", last_receipt=OTHER),
    field("reveals.0", "reveal-commitment", seed=OTHER),
    field("reveals.1", "reveal-commitment", seed=OTHER),
    field("reveals.0", "reveal", proof=OTHER),
    field("reveals.0", "reveal", agreement=OTHER),
    field("verdicts.0", "verdict", proof=OTHER),
    field("verdicts.0", "verdict", agreement=OTHER),
    field("verdicts.0", "verdict", segments=(1, 1)),
    field("verdicts.0", "verdict", finding="wrong", wrong_segment=99),
    field("closing.0", "settlement-amount", paid_micro=59_999),
    field("closing.0", "settlement-amount", paid_micro=60_001),
    field("closing.0", "settlement-fees", fees=()),
    field("closing.0", "settlement-fees", fees=((OTHER, 1),)),
    field("closing.0", "settlement", proof=OTHER),
    field("closing.0", "closing", agreement=OTHER),
]


@pytest.mark.parametrize(("change", "name"), RESIGNED)
def test_a_field_changed_and_signed_again_is_refused_by_name(forge: Forge, change: Any, name: str) -> None:
    change(forge)
    assert refused(forge) == name


def test_a_verdict_on_segments_that_were_not_drawn_is_refused(forge: Forge) -> None:
    drawn = check(forge).deals[0].drawn  # by hashes: of another task, others
    other = min(set(range(6)) - set(drawn))
    deal = forge.deal()
    deal["verdicts"][0] = forge.changed(deal["verdicts"][0], segments=(other,))
    assert refused(forge) == "draw"


PLACES = ["agreement", "receipts.0", "receipts.5", "voucher", "proof", "reveals.0", "verdicts.0", "closing.0"]


@pytest.mark.parametrize("place", PLACES)
def test_a_forged_signature_is_refused_by_name(forge: Forge, place: str) -> None:
    name, _, index = place.partition(".")
    deal = forge.deal()
    text = deal[name][int(index)] if index else deal[name]
    broken = text[:-2] + f"{int(text[-2:], 16) ^ 1:02x}"
    if index:
        deal[name][int(index)] = broken
    else:
        deal[name] = broken
    singular = {"receipts": "receipt", "reveals": "reveal", "verdicts": "verdict"}.get(name, name)
    assert refused(forge) == f"{singular}-record"


@pytest.mark.parametrize("place", ["agreement", "receipts.0", "closing.0"])
def test_a_record_that_takes_two_signatures_is_refused_with_one(forge: Forge, place: str) -> None:
    name, _, index = place.partition(".")
    deal = forge.deal()
    if index:
        text = deal[name][int(index)]
        deal[name][int(index)] = forge.sign(forge.record(text), forge.signers(text)[0])
    else:
        deal[name] = forge.sign(forge.record(deal[name]), forge.signers(deal[name])[0])
    wanted = {"agreement": "agreement-signatures", "receipts": "receipt-signatures", "closing": "settlement-signatures"}
    assert refused(forge) == wanted[name]


def test_records_that_are_missing_or_too_many_are_refused_by_name(forge: Forge) -> None:
    whole = copy.deepcopy(forge.bundle)
    expected = {
        "voucher": ("", "voucher"),
        "agreement": ("", "agreement-record"),
        "proof": ("", "proof"),
        "receipts": (whole["deals"][0]["receipts"][:5], "voucher"),
        "reveals": ([], "draw"),
        "verdicts": ([], "settlement-fees"),
    }
    for name, (value, check_name) in expected.items():
        forge.bundle = copy.deepcopy(whole)
        forge.deal()[name] = value
        assert refused(forge) == check_name, name
    forge.bundle = copy.deepcopy(whole)
    forge.deal()["receipts"].append(forge.deal()["receipts"][0])
    assert refused(forge) == "receipt-count"
    forge.bundle = copy.deepcopy(whole)
    forge.deal()["verdicts"].append(forge.deal()["verdicts"][0])
    assert refused(forge) == "verdict-checker"
    forge.bundle = copy.deepcopy(whole)
    forge.deal()["voucher"] = forge.deal()["proof"]
    assert refused(forge) == "voucher-record"


def test_work_that_nobody_checked_never_counts_as_done(forge: Forge) -> None:
    """Without its verdicts, and with fees to match, the settlement stands, and the job is not proved to be done."""
    deal = forge.deal()
    deal["verdicts"] = []
    deal["closing"] = [forge.changed(deal["closing"][0], fees=())]
    assert refused(forge) == "final-root"
    forge.bundle["final_root"] = ""
    assert check(forge).segments_done == 0


def test_only_staked_strangers_may_judge(forge: Forge) -> None:
    deal = forge.deal()
    verdict = forge.record(deal["verdicts"][0])
    assert isinstance(verdict, Verdict)
    whole = list(deal["verdicts"])
    stranger = forge.stranger().public
    deal["verdicts"][0] = forge.sign(msgspec.structs.replace(verdict, checker=stranger), stranger)
    assert refused(forge) == "verdict-stake"
    move = StakeMove(
        network=verdict.network, owner=stranger, sequence=1, kind="add", amount_micro=1_000_000, created_ns=1
    )
    staked = forge.sign(move, stranger)
    for wrong in (
        [forge.sign(msgspec.structs.replace(move, amount_micro=999_999), stranger)],
        [forge.sign(move, check_solver(forge))], [staked, staked],
        [forge.sign(msgspec.structs.replace(move, kind="withdraw"), stranger)],
    ):  # fmt: skip
        deal["stakes"] = wrong
        assert refused(forge) in ("verdict-stake", "stake", "move of stake-record")
    deal["stakes"] = [staked]
    assert refused(forge) == "settlement-fees", "it may judge, and is not the one that was paid"
    solver = check_solver(forge)
    deal["verdicts"] = [forge.sign(msgspec.structs.replace(verdict, checker=solver), solver), *whole[1:]]
    assert refused(forge) == "verdict-checker"


def check_solver(forge: Forge) -> bytes:
    agreement = forge.record(forge.deal()["agreement"])
    return bytes(agreement.solver)  # type: ignore[union-attr]


def test_a_wrong_verdict_that_no_quorum_refutes_undoes_the_work(forge: Forge) -> None:
    deal = forge.deal()
    verdict = forge.record(deal["verdicts"][0])
    assert isinstance(verdict, Verdict)
    segment = verdict.segments[0]
    claimed = forge.record(deal["receipts"][segment]).out_root  # type: ignore[union-attr]
    wrong = msgspec.structs.replace(
        verdict, finding="wrong", wrong_segment=segment, claimed_root=claimed, found_root=OTHER
    )
    deal["verdicts"][0] = forge.sign(wrong, verdict.checker)
    assert refused(forge) == "final-root"
    for roots in ({"claimed_root": OTHER}, {"found_root": claimed}):
        deal["verdicts"][0] = forge.sign(msgspec.structs.replace(wrong, **roots), verdict.checker)
        assert refused(forge) == "verdict-root"


# --- the slash and the claim -------------------------------------------------------------------------------
def slash_of(forge: Forge) -> Slash:
    record = forge.record(forge.deal()["closing"][0])
    assert isinstance(record, Slash)
    return record


def test_a_slash_takes_a_quorum_of_distinct_checkers_that_agree() -> None:
    forge = Forge(*CAUGHT)
    slash, signer = slash_of(forge), forge.signers(forge.deal()["closing"][0])[0]

    def replaced(*verdicts: bytes) -> str:
        forge.deal()["closing"] = [forge.sign(msgspec.structs.replace(slash, verdicts=verdicts), signer)]
        return refused(forge)

    first, second = slash.verdicts[:2]
    assert replaced(first) == "slash"
    assert replaced(first, first) == "slash"
    right = bytes.fromhex(forge.changed(second.hex(), finding="right"))
    assert replaced(first, right) == "slash"
    named = forge.record(first.hex())
    assert isinstance(named, Verdict)
    place = {name: getattr(named, name) for name in ("segments", "wrong_segment", "claimed_root")}
    assert replaced(first, bytes.fromhex(forge.changed(second.hex(), **place, found_root=OTHER))) == "slash"
    assert replaced(first, bytes.fromhex(forge.changed(second.hex(), claimed_root=OTHER))) == "verdict-root"


def test_a_slash_undoes_the_work_even_if_a_settlement_lies_beside_it() -> None:
    forge = Forge(*CAUGHT)
    forge.bundle["deals"] = forge.bundle["deals"][:1]
    assert refused(forge) == "final-root"


def test_a_claim_pays_no_more_than_its_voucher() -> None:
    forge = found(lambda report: shape(report)[0] == ("claimed", True))
    closing = forge.deal()["closing"]
    claim = next(forge.record(text) for text in closing if isinstance(forge.record(text), Claim))
    assert isinstance(claim, Claim)
    more = bytes.fromhex(forge.changed(claim.voucher.hex(), cumulative_micro=10**9))
    forge.deal()["closing"] = [forge.sign(msgspec.structs.replace(claim, voucher=more), claim.author)]
    assert refused(forge) == "claim"
    other = bytes.fromhex(forge.changed(claim.voucher.hex(), agreement=OTHER))
    forge.deal()["closing"] = [forge.sign(msgspec.structs.replace(claim, voucher=other), claim.author)]
    assert refused(forge) == "claim"
    stranger = forge.stranger().public
    forge.deal()["closing"] = [forge.sign(msgspec.structs.replace(claim, author=stranger), stranger)]
    assert refused(forge) == "claim"


# --- the whole ---------------------------------------------------------------------------------------------
def test_the_whole_must_hang_together(forge: Forge) -> None:
    whole = copy.deepcopy(forge.bundle)
    task = TaskSpec.from_bytes(bytes.fromhex(whole["task"]), network=forge.network)
    for change, name in (
        ({"final_root": OTHER.hex()}, "final-root"),
        ({"deals": [*whole["deals"], *whole["deals"]]}, "sequence"),
        ({"deals": []}, "final-root"),
        ({"network": whole["network"].replace("wrong_quorum = 2", "wrong_quorum = 3")}, "network"),
        ({"network": "name = 1"}, "network"),
        ({"task": msgspec.msgpack.encode(msgspec.structs.replace(task, seed=8)).hex()}, "agreement-task"),
        ({"task": "00"}, "task"),
        ({"schema": "ichiba.bundle/9"}, "format"),
        ({"extra": 1}, "format"),
        ({"deals": [{}]}, "format"),
        ({"job": "xy"}, "format"),
        ({"state": {"a": "11" * 32}}, "state"),
    ):
        forge.bundle = copy.deepcopy(whole) | change
        assert refused(forge) == name, change
    with pytest.raises(Refused) as told:
        verify_bundle(whole, OTHER)
    assert told.value.check == "network"


def test_a_deal_must_start_where_checked_work_ended() -> None:
    forge = found(lambda report: [counted for _, counted in shape(report)] == [True, True])
    forge.bundle["deals"].reverse()
    assert refused(forge) == "deal-chain"
    forge.bundle["deals"] = forge.bundle["deals"][:1]
    assert refused(forge) == "deal-chain"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_byte_of_the_evidence_can_be_flipped(data: st.DataObject) -> None:
    """Any nibble of any record, and of the task, is signed or hashed: each flip is refused, and refused typed."""
    forge = Forge(*HONEST)
    deal = forge.deal()
    places = ["task", *(name for name in deal if deal[name])]
    place = data.draw(st.sampled_from(places))
    text = forge.bundle["task"] if place == "task" else deal[place]
    index = None
    if isinstance(text, list):
        index = data.draw(st.integers(0, len(text) - 1))
        text = text[index]
    at = data.draw(st.integers(0, len(text) - 1))
    flipped = text[:at] + f"{int(text[at], 16) ^ data.draw(st.integers(1, 15)):x}" + text[at + 1 :]
    if place == "task":
        forge.bundle["task"] = flipped
    elif index is None:
        deal[place] = flipped
    else:
        deal[place][index] = flipped
    with pytest.raises(VerificationFailed):
        check(forge)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just("00"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(change=st.dictionaries(st.sampled_from([*HONEST[0]]), JSON, min_size=1, max_size=3))
def test_any_json_is_judged_and_never_crashes(change: dict[str, Any]) -> None:
    forge = Forge(*HONEST)
    forge.bundle |= change
    try:
        report = check(forge)
    except VerificationFailed:
        return
    assert report.final_root.hex() == HONEST[0]["final_root"] or not forge.bundle["final_root"]


# --- the files beside it -----------------------------------------------------------------------------------
STATE = {
    "layer.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "optimizer.m.layer.weight": np.ones((3, 4), dtype=np.float32),
    "steps": np.array([7], dtype=np.int64),
}


@pytest.fixture
def report(forge: Forge) -> BundleReport:
    """A report as of a job that ended in STATE."""
    roots = {name: merkle.tensor_root(array) for name, array in STATE.items()}
    return replace(check(forge), final_root=merkle.state_root(STATE), state=roots)


def test_the_checkpoint_must_be_the_proved_state_bit_for_bit(report: BundleReport) -> None:
    verify_checkpoint(report, safetensors.write(STATE))
    bent = {**STATE, "layer.weight": np.nextafter(STATE["layer.weight"], np.float32(9))}
    for wrong in (bent, {name: STATE[name] for name in list(STATE)[:2]}, {**STATE, "x": STATE["steps"]}):
        with pytest.raises(Refused) as told:
            verify_checkpoint(report, safetensors.write(wrong))
        assert told.value.check == "checkpoint"
    with pytest.raises(Refused) as told:
        verify_checkpoint(report, b"not safetensors")
    assert told.value.check == "checkpoint"


def test_the_weights_must_be_tensors_of_the_proved_state(report: BundleReport) -> None:
    assert verify_weights(report, safetensors.write({"layer.weight": STATE["layer.weight"]})) == 1
    for wrong in (
        {"layer.weight": STATE["layer.weight"] + 1},
        {"layer.weight": STATE["layer.weight"].reshape(4, 3)},
        {"other": STATE["layer.weight"]},
    ):
        with pytest.raises(Refused) as told:
            verify_weights(report, safetensors.write(wrong))
        assert told.value.check == "weights"


def test_results_are_checked_under_the_names_they_have_in_the_state(report: BundleReport) -> None:
    results = {"result.loss": np.array(2.5, dtype=np.float32), "result.rows": np.array(7, dtype=np.int64)}
    roots = {name: merkle.tensor_root(array) for name, array in results.items()}
    report = replace(report, state={**report.state, **roots})
    loss = results["result.loss"]
    assert verify_weights(report, safetensors.write({"loss": loss}), prefix="result.") == 1
    for wrong in ({"loss": loss + 1}, {"rows": loss}, {"layer.weight": STATE["layer.weight"]}):
        with pytest.raises(Refused) as told:
            verify_weights(report, safetensors.write(wrong), prefix="result.")
        assert told.value.check == "result"


def test_weights_that_were_brought_along_leave_their_origin_open(report: BundleReport) -> None:
    def origin(of: BundleReport, **options: bool) -> bool:
        return any("comes from: its submitter brought it" in line for line in of.not_proved(**options))

    assert report.seeded
    assert not origin(report)
    assert origin(replace(report, seeded=False))
    assert not origin(replace(report, seeded=False), origin_known=True)
