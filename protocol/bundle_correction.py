"""An error that was ordered in a deal of a bundle: that it was, and what the deal is worth without it."""

from __future__ import annotations

from protocol.bundle_case import Case, Deal, DealReport, open_as, unhex
from protocol.bundle_tolerance import cleared_by
from protocol.errors import RemoteProtocolError
from protocol.forced import check_forced
from protocol.records import Forced, Verdict

__all__ = ["apply_correction", "check_ordered", "run_by"]


def check_ordered(case: Case, deal: Deal) -> None:
    """Take the ordered error of a deal, if it has one: the committed secret and the notaries' randomness order it, and
    its receipt states it. Raises Refused."""
    if not deal.forced:
        return
    record, record_id, _ = open_as(deal.forced, Forced, "forced", case.number, case.network)
    try:
        shares = [unhex(share, "beacon") for share in deal.forced_beacons]
        check_forced(record, case.agreement, case.id, shares=shares, network=case.network)
    except RemoteProtocolError as error:
        raise case.refuse("forced", error.what, why=error.why) from None
    place = record.segment - case.agreement.first_segment
    if place >= len(case.receipts) or case.receipts[place].out_root != record.false_root:
        raise case.refuse("forced", f"no receipt states the error that was ordered in segment {record.segment}")
    case.forced, case.forced_id = record, record_id


def run_by(case: Case, verdict: Verdict) -> set[int]:
    """The segments that a verdict speaks well of: not one that an ordered error spoiled, unless the verdict is on the
    work without it."""
    return cleared_by(verdict) - (frozenset() if verdict.proof == case.forced_id else case.spoiled)


def apply_correction(case: Case, report: DealReport) -> None:
    """Where a deal with an ordered error ends: as if there were none, if a checker ran it so; else before it."""
    forced = case.forced
    if forced is None:
        return
    right = [v for v in case.verdicts if v.finding == "right"]
    report.ordered = forced.segment
    report.checked = tuple(sorted({segment for v in right for segment in run_by(case, v)}))
    if not case.spoiled <= {s for v in right if v.proof == case.forced_id for s in v.segments}:
        place = forced.segment - case.agreement.first_segment
        report.end_segment, report.end_root = forced.segment, case.receipts[place].in_root
        report.operations = sum(receipt.operations for receipt in case.receipts[:place])
        report.checked = tuple(s for s in report.checked if s < forced.segment)
    elif forced.segment == report.end_segment - 1:
        report.end_root = forced.true_root
