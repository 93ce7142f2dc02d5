"""How a deal of a bundle was closed: each amount recomputed from the receipts and verdicts it rests on."""

from __future__ import annotations

from typing import TypeAlias

from protocol.bundle_case import Case, DealReport, check_verdict, open_as
from protocol.bundle_disputes import faulty_checker
from protocol.bundle_tolerance import check_distances
from protocol.errors import RemoteProtocolError
from protocol.money_line import pool_slice
from protocol.records import (
    Arbitration,
    Claim,
    Fault,
    Settlement,
    Slash,
    Verdict,
    Voucher,
    amount_for,
)

__all__ = ["Closing", "check_closing", "open_closing"]

Closing: TypeAlias = Settlement | Claim | Slash | Arbitration | Fault


def open_closing(case: Case, text: str) -> tuple[Closing, frozenset[bytes]]:
    """A closing record of the deal, and who signed it. Raises Refused."""
    found: tuple[Closing, bytes, frozenset[bytes]]
    found = open_as(text, Closing, "closing", case.number, case.network)  # type: ignore[arg-type]
    record, _, signers = found
    if record.agreement != case.id:
        raise case.refuse("closing", "a closing of another deal")
    return record, signers


def check_closing(case: Case, records: list[tuple[Closing, frozenset[bytes]]], report: DealReport) -> None:
    """How the channel closed: a slash or a lost dispute beats a settlement, a settlement beats claims. Raises Refused.

    Which came first leaves no trace, but work that was found wrong is never counted as right.
    """
    claims: list[Claim] = []
    slashed = any(judged.finding == "wrong" for judged in case.disputes)
    for record, signers in records:
        match record:
            case Claim():
                claims.append(record)
            case Slash():
                _check_slash(case, record)
                slashed = True
            case Fault():
                report.faults = (*report.faults, _check_fault(case, record))
            case Settlement():
                if signers != case.parties:
                    raise case.refuse("settlement-signatures", "the settlement is not signed by both parties")
                _check_settlement(case, record)
                report.closed, report.paid_micro = "settled", record.paid_micro
                report.fees_micro = sum(micro for _, micro in record.fees)
    _check_claims(case, claims, report)
    if slashed:
        report.closed, report.verified, report.checked = "slashed", False, ()
        report.paid_micro = report.fees_micro = 0
    else:
        judged = bool(case.network.notaries and case.agreement.check_permille)
        rate = case.network.rules.pool_permille
        report.pool_micro = pool_slice(report.paid_micro, pool_permille=rate, judged=judged)


def _check_fault(case: Case, record: Fault) -> bytes:
    try:
        return faulty_checker(record, case.disputes, case.network)
    except RemoteProtocolError as error:
        raise case.refuse("fault", error.what, why=error.why) from None


def _check_settlement(case: Case, record: Settlement) -> None:
    agreement = case.agreement
    if (record.submitter, record.solver) != (agreement.submitter, agreement.solver):
        raise case.refuse("settlement", "a settlement of other parties")
    if record.proof != case.proof_id:
        raise case.refuse("settlement", "a settlement of another proof")
    if record.paid_micro != case.earned_micro:
        raise case.refuse(
            "settlement-amount", f"{record.paid_micro} micro-credits are paid, the receipts say {case.earned_micro}"
        )
    _check_fees(case, record.fees, record.paid_micro)


def _check_fees(case: Case, fees: tuple[tuple[bytes, int], ...], paid_micro: int) -> None:
    """Each checker gets its work at the deal's price, as far as the channel reaches. Where notaries judge, a submitter
    owes nothing for an accusation: who was right is paid by them."""
    price = case.agreement.unit_price
    due: dict[bytes, int] = {}
    owed: dict[bytes, int] = {}
    for v in case.verdicts:
        fee = amount_for(min(v.operations, case.operations_of(v.segments)), price)
        due[v.checker] = due.get(v.checker, 0) + fee
        if v.finding != "wrong" or not case.network.notaries:
            owed[v.checker] = owed.get(v.checker, 0) + fee
    given = dict(fees)
    left = case.agreement.promise_micro - paid_micro
    if len(given) != len(fees) or not set(given) <= set(due):
        raise case.refuse("settlement-fees", "a fee for a peer that gave no verdict, or two for one")
    enough = sum(due.values()) <= left
    if sum(given.values()) > left or any(micro > due[peer] for peer, micro in given.items()):
        raise case.refuse("settlement-fees", f"fees of {sum(given.values())}, {sum(due.values())} are due")
    if enough and any(given.get(peer, 0) < micro for peer, micro in owed.items()):
        raise case.refuse("settlement-fees", "a checker is paid less than its work at the agreed price")


def _check_claims(case: Case, claims: list[Claim], report: DealReport) -> None:
    """One-sided closings: the best voucher among them is paid."""
    best = 0
    fees: tuple[tuple[bytes, int], ...] = ()
    for claim in claims:
        if claim.author not in case.parties:
            raise case.refuse("claim", "a claim by a stranger")
        if claim.author == case.agreement.solver and claim.fees:
            raise case.refuse("claim", "a solver cannot give away the submitter's channel")
        if claim.voucher:
            voucher, _, _ = open_as(claim.voucher.hex(), Voucher, "voucher", case.number, case.network)
            if (voucher.submitter, voucher.agreement) != (case.agreement.submitter, case.id):
                raise case.refuse("claim", "a claim with a voucher of another channel")
            best = max(best, voucher.cumulative_micro)
        if claim.fees:
            _check_fees(case, claim.fees, case.earned_micro)
            fees = claim.fees
    if best > case.earned_micro:
        raise case.refuse("claim", f"a claim of {best} micro-credits, the receipts say {case.earned_micro}")
    if claims and report.closed == "open":
        report.closed, report.paid_micro, report.fees_micro = "claimed", best, sum(micro for _, micro in fees)


def _check_slash(case: Case, record: Slash) -> None:
    """A quorum of distinct staked checkers that agree on what is wrong in this proof: on its roots, or by distances."""
    if case.network.notaries:
        raise case.refuse("slash", "a slash by checkers in a network whose notaries judge")
    verdicts = []
    for envelope in record.verdicts:
        verdict, _, _ = open_as(envelope.hex(), Verdict, "verdict", case.number, case.network)
        check_verdict(case, verdict)
        if verdict.finding != "wrong":
            raise case.refuse("slash", "a slash rests on wrong verdicts only")
        verdicts.append(verdict)
    if len({v.checker for v in verdicts}) != len(verdicts) or len(verdicts) < case.network.rules.wrong_quorum:
        raise case.refuse("slash", f"{len(verdicts)} verdicts, a slash takes {case.network.rules.wrong_quorum}")
    check_distances(case, [*case.verdicts, *(v for v in verdicts if v not in case.verdicts)])
    # They may accuse different segments (each was drawn its own), but not find two roots for one; of floats a machine
    # finds its own.
    found = {(v.wrong_segment, v.found_root) for v in verdicts}
    if case.tolerance is None and len({segment for segment, _ in found}) != len(found):
        raise case.refuse("slash", "the wrong verdicts do not agree")
