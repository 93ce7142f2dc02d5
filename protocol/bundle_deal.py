"""One deal of a bundle: every signature, link, seed, draw, verdict and amount of it, checked without any peer.

What it cannot know is said by its caller: whether other checkers were connected when these were drawn, and what the
segments nobody re-executed would have given.
"""

from __future__ import annotations

from protocol.bundle_case import Case, Deal, DealReport, Refused, check_verdict, open_as, unhex
from protocol.bundle_closing import check_closing, open_closing
from protocol.bundle_correction import apply_correction, check_ordered, run_by
from protocol.bundle_disputes import finding_words, open_disputes, unanswered
from protocol.bundle_stakes import open_stakes
from protocol.bundle_tolerance import check_distances, cleared_by, open_deal_tolerance, tolerance_words
from protocol.certificate import check_certified
from protocol.credit_records import NO_CREDIT
from protocol.errors import RemoteProtocolError, VerificationFailed
from protocol.forced import draws_from, may_order, open_beacon
from protocol.incentives import lock_needed
from protocol.keys import short
from protocol.merkle import merkle_root
from protocol.network import Network
from protocol.records import Agreement, Arbitration, Proof, Receipt, Reveal, Verdict, Voucher, amount_for
from protocol.sampling import check_reveal, mixed, randomness, select_segments
from protocol.script import AnyTask, ScriptSpec
from protocol.sealing import masked
from protocol.task import TaskSpec

__all__ = ["Deal", "DealReport", "Refused", "check_deal", "unhex"]


def check_deal(deal: Deal, *, number: int, task: AnyTask, task_id: bytes, network: Network) -> DealReport:
    """Check all evidence of one deal. Raises Refused, which names the check."""
    agreement, agreement_id, signers = open_as(deal.agreement, Agreement, "agreement", number, network)
    case = Case(number, task, network, agreement_id, agreement)
    try:
        check_certified(agreement, signers, network)
    except VerificationFailed as error:
        raise case.refuse("agreement-signatures", error.what, why=error.why) from None
    on_credit = agreement.credit != NO_CREDIT
    if (isinstance(task, ScriptSpec) or on_credit) and (agreement.check_permille or deal.verdicts):
        what = "work on credit" if on_credit else "a script"
        raise case.refuse("agreement-checks", f"{what} was to be re-executed, or judged: nothing of it can be")
    _check_terms(case, task_id)
    if isinstance(task, TaskSpec) and task.stage is not None and may_order(agreement):
        raise case.refuse("agreement-errors", "a unit of a parallel job in whose deal an error may be ordered")
    open_stakes(case, deal.stakes)
    open_deal_tolerance(case, deal.profiles)
    _check_receipts(case, deal.receipts)
    _check_voucher(case, deal.voucher)
    if deal.proof:
        _check_proof(case, deal.proof)
        _draw(case, deal.reveals, deal.beacons)
        check_ordered(case, deal)
        _check_verdicts(case, deal.verdicts)
    elif deal.reveals or deal.verdicts:
        raise case.refuse("proof", "reveals or verdicts without a proof")
    closing = [open_closing(case, text) for text in deal.closing]
    _check_disputes(case, [record for record, _ in closing if isinstance(record, Arbitration)])
    report = DealReport(
        number=number,
        id=case.id,
        sequence=agreement.sequence,
        submitter=agreement.submitter,
        solver=agreement.solver,
        first_segment=agreement.first_segment,
        end_segment=agreement.first_segment + len(case.receipts),
        base_root=_start_of(case),
        end_root=case.receipts[-1].out_root if case.receipts else _start_of(case),
        operations=sum(receipt.operations for receipt in case.receipts),
        lock_micro=agreement.lock_micro,
        earned_micro=case.earned_micro,
        verified=_found_right(case),
        drawn=case.drawn,
        checked=tuple(sorted({segment for verdict in case.verdicts for segment in cleared_by(verdict)})),
        checkers=tuple(sorted(verdict.checker for verdict in case.verdicts)),
        disputes=tuple(finding_words(judged, agreement, network) for judged in case.disputes),
        unjudged=len(unanswered(_accusing(case), case.disputes)) if network.notaries else 0,
        tolerance=tolerance_words(case),
    )
    apply_correction(case, report)
    check_closing(case, closing, report)
    if isinstance(task, ScriptSpec) or on_credit:
        # Nobody re-executes it: that both parties signed for its outputs is all that can be known.
        ends = ("settled", "claimed") if on_credit else ("settled",)
        report.verified = bool(case.receipts and case.proof_id) and report.closed in ends
    report.credit = on_credit
    return report


# --- the work ----------------------------------------------------------------------------------------------
def _check_terms(case: Case, task_id: bytes) -> None:
    """The agreement is about this task and obeys the rules of the network."""
    agreement, task, rules = case.agreement, case.task, case.network.rules
    if agreement.task != task_id:
        raise case.refuse("agreement-task", "the agreement is about another task")
    first, last = agreement.first_segment, agreement.last_segment
    if not first < last <= task.segments:
        raise case.refuse("agreement-segments", f"segments {first} to {last} of a task of {task.segments}")
    operations = case.operations_of(tuple(range(first, last)))
    if agreement.operations != operations:
        raise case.refuse("agreement-operations", f"{agreement.operations} operations, the task has {operations}")
    price_micro = amount_for(operations, agreement.unit_price)
    if agreement.credit != NO_CREDIT:
        if agreement.channel_micro or agreement.lock_micro:
            raise case.refuse("agreement-credit", "a deal on credit with a channel or a lock")
        return
    if agreement.channel_micro < price_micro:
        raise case.refuse("agreement-channel", f"a channel of {agreement.channel_micro} for work of {price_micro}")
    if isinstance(task, ScriptSpec):
        return  # nothing is re-executed, so no stake is at risk
    if agreement.check_permille < rules.check_permille:
        raise case.refuse(
            "agreement-checks", f"{agreement.check_permille} permille are checked, the rules ask {rules.check_permille}"
        )
    # The solver's history is not in the bundle, so its rate cannot be judged; the lock must cover whatever rate it is.
    if agreement.lock_micro < lock_needed(rules, price_micro, agreement.check_permille):
        raise case.refuse("agreement-lock", f"a stake of {agreement.lock_micro} for work of {price_micro}")


def _salt(case: Case) -> bytes:
    """Of a sealed job's task; empty for an open one."""
    return case.task.salt if isinstance(case.task, TaskSpec) else b""


def _start_of(case: Case) -> bytes:
    """The state root a deal starts from. A sealed job's agreement masks it, and its first receipt shows it."""
    return case.receipts[0].in_root if case.receipts else case.agreement.base_root


def _check_receipts(case: Case, envelopes: list[str]) -> None:
    """One chain from the base root, each link signed by both parties and priced as agreed."""
    agreement = case.agreement
    if len(envelopes) > agreement.last_segment - agreement.first_segment:
        raise case.refuse("receipt-count", f"{len(envelopes)} receipts for fewer segments")
    root = b""
    for index, text in enumerate(envelopes):
        receipt, receipt_id, signers = open_as(text, Receipt, "receipt", case.number, case.network)
        segment = agreement.first_segment + index
        if signers != case.parties:
            raise case.refuse("receipt-signatures", f"receipt {index} is not signed by both parties")
        if (receipt.agreement, receipt.sequence, receipt.segment) != (case.id, index, segment):
            raise case.refuse("receipt-order", f"receipt {index} is not that of segment {segment}")
        continues = receipt.in_root == root if index else masked(_salt(case), receipt.in_root) == agreement.base_root
        if receipt.previous != case.last_receipt or not continues:
            raise case.refuse("receipt-chain", f"receipt {index} does not continue the one before it")
        operations = case.operations_of((segment,))
        if isinstance(case.task, ScriptSpec) and 0 < receipt.operations <= operations:
            operations = receipt.operations  # a script is charged for the time it took, within what was agreed
        if receipt.operations != operations:
            raise case.refuse(
                "receipt-operations", f"receipt {index} claims {receipt.operations} operations, {operations} are due"
            )
        due = amount_for(operations, agreement.unit_price)
        if receipt.amount_micro != due:
            raise case.refuse("receipt-amount", f"receipt {index} takes {receipt.amount_micro}, {due} are due")
        case.receipts.append(receipt)
        case.last_receipt, root = receipt_id, receipt.out_root


def _check_voucher(case: Case, text: str) -> None:
    """The last voucher promises exactly the receipts."""
    if not text and not case.receipts:
        return
    if not text or not case.receipts:
        raise case.refuse("voucher", f"{len(case.receipts)} receipts and {'a' if text else 'no'} voucher")
    voucher, _, _ = open_as(text, Voucher, "voucher", case.number, case.network)
    if (voucher.submitter, voucher.agreement) != (case.agreement.submitter, case.id):
        raise case.refuse("voucher", "the voucher is not the submitter's on this channel")
    if (voucher.receipt, voucher.sequence) != (case.last_receipt, len(case.receipts) - 1):
        raise case.refuse("voucher", "the voucher is not that of the last receipt")
    operations = sum(receipt.operations for receipt in case.receipts)
    if (voucher.cumulative_micro, voucher.cumulative_operations) != (case.earned_micro, operations):
        raise case.refuse(
            "voucher-amount", f"the voucher promises {voucher.cumulative_micro}, the receipts {case.earned_micro}"
        )


# --- the proof and its checks ------------------------------------------------------------------------------
def _check_proof(case: Case, text: str) -> None:
    proof, case.proof_id, _ = open_as(text, Proof, "proof", case.number, case.network)
    if proof.agreement != case.id or proof.author not in case.parties:
        raise case.refuse("proof", "the proof is of another deal, or by a stranger")
    if not case.receipts or (proof.receipts, proof.last_receipt) != (len(case.receipts), case.last_receipt):
        raise case.refuse("proof", f"the proof is over {proof.receipts} receipts, not these {len(case.receipts)}")
    if proof.root != merkle_root([receipt.out_root for receipt in case.receipts]):
        raise case.refuse("proof-root", "the proof's root is not over the receipts' roots")
    if proof.program != masked(_salt(case), case.task.program):
        raise case.refuse("proof", "the proof is of another program")


def _draw(case: Case, envelopes: list[str], beacons: list[str]) -> None:
    """The segments that both seeds, the proof and the notaries decide. Without the submitter's seed none was drawn."""
    agreement = case.agreement
    committed = {
        agreement.submitter: agreement.submitter_commitment,
        agreement.solver: agreement.solver_commitment,
    }
    seeds: dict[bytes, bytes] = {}
    for text in envelopes:
        reveal, _, _ = open_as(text, Reveal, "reveal", case.number, case.network)
        if (reveal.agreement, reveal.proof) != (case.id, case.proof_id):
            raise case.refuse("reveal", "a reveal of another deal or proof")
        if reveal.author not in committed or reveal.author in seeds:
            raise case.refuse("reveal", "a reveal by a stranger, or two by one party")
        try:
            check_reveal(reveal.seed, committed[reveal.author], agreement_salt=reveal.author)
        except VerificationFailed as error:
            raise case.refuse("reveal-commitment", error.what, why=error.why) from None
        seeds[reveal.author] = reveal.seed
    if agreement.submitter not in seeds or not agreement.check_permille:
        return
    # A solver that did not reveal forfeits its say: its seed is empty (DESIGN §5.5).
    random = randomness(
        proof=case.proof_id,
        submitter_seed=seeds[agreement.submitter],
        solver_seed=seeds.get(agreement.solver, b""),
    )
    if not beacons and draws_from(case.network, agreement):
        return  # the notaries have not answered yet
    try:
        shares = [unhex(text, "beacon") for text in beacons]
        beacon = open_beacon(shares, target=random, agreement=agreement, network=case.network)
    except RemoteProtocolError as error:
        raise case.refuse("beacon", error.what, why=error.why) from None
    case.drawn = select_segments(
        mixed(random, beacon),
        first=agreement.first_segment,
        last=agreement.first_segment + len(case.receipts),
        permille=agreement.check_permille,
        minimum=case.network.rules.check_segments_min,
    )


def _check_verdicts(case: Case, envelopes: list[str]) -> None:
    for text in envelopes:
        verdict, _, _ = open_as(text, Verdict, "verdict", case.number, case.network)
        check_verdict(case, verdict)
        spoiled = case.spoiled if verdict.proof == case.forced_id else frozenset()
        if not set(verdict.segments) <= {*case.drawn, *spoiled}:
            raise case.refuse("draw", f"segments {list(verdict.segments)} were checked, {list(case.drawn)} were drawn")
        place = (verdict.proof, verdict.checker, verdict.role, verdict.segments)
        if any(place == (other.proof, other.checker, other.role, other.segments) for other in case.verdicts):
            raise case.refuse("verdict-checker", f"two verdicts of {short(verdict.checker)} on the same segments")
        case.verdicts.append(verdict)
    check_distances(case, case.verdicts)


def _found_right(case: Case) -> bool:
    """Whether the deal's work counts as right, by the rule of peer/checking.py.

    One verdict covers all that was drawn, and what it was unsure of another found right; or fewer than a quorum found a
    segment wrong, and a quorum of others cleared that segment. With notaries: verdicts speak well of all that was
    drawn, but for an ordered error, and notaries found nothing wrong; an accusation that nobody brought before them
    counts for nothing.
    """
    if case.network.notaries:
        seen = {segment for v in case.verdicts for segment in run_by(case, v)} | case.spoiled
        ordered = {judged.challenge.segment for judged in case.disputes if judged.finding == "forced"}
        lost = any(judged.finding == "wrong" for judged in case.disputes)
        return bool(case.drawn) and set(case.drawn) <= seen | ordered and not lost
    quorum = case.network.rules.wrong_quorum
    accusers = {v.checker for v in case.verdicts if v.finding == "wrong"}
    seen = {segment for v in case.verdicts for segment in cleared_by(v)}
    if not case.drawn or not set(case.drawn) <= seen:
        return False
    if not accusers:
        return any(v.segments == case.drawn for v in case.verdicts)
    refuted = set()
    for accusation in (v for v in case.verdicts if v.finding == "wrong"):
        clearing = {v.checker for v in case.verdicts if v.finding == "right" and accusation.wrong_segment in v.segments}
        if len(clearing) >= quorum:
            refuted.add(accusation.checker)
    return len(accusers) < quorum and refuted == accusers


def _accusing(case: Case) -> list[Verdict]:
    """The verdicts but for those that an ordered error explains, and those on the work without it."""
    return [v for v in case.verdicts if v.proof == case.proof_id and v.wrong_segment not in case.spoiled]


def _check_disputes(case: Case, records: list[Arbitration]) -> None:
    """What notaries found on this deal's proof and receipts, in the way that such work is judged: of a unit of a
    parallel job and of float work no operation was executed, and no jury sat on any other."""
    try:
        case.disputes = open_disputes(
            records,
            case.agreement,
            case.network,
            proof_id=case.proof_id,
            out_roots={receipt.segment: receipt.out_root for receipt in case.receipts},
        )
    except RemoteProtocolError as error:
        raise case.refuse("arbitration", error.what, why=error.why) from None
    unit = isinstance(case.task, TaskSpec) and case.task.stage is not None
    bases = {"repeated", "both"} if unit else {"jury"} if case.tolerance else {"leaf", "both", "forfeit", "ordered"}
    for judged in case.disputes:
        if judged.basis not in bases:
            raise case.refuse("arbitration", f"a finding by {judged.basis} on work that is not judged so")
