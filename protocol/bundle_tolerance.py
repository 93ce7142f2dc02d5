"""A tolerant deal of a bundle: its thresholds derived again from its profiles, each verdict held against its distances.

That a checker's machine really measured the distance it signed leaves no trace: floats of two machines differ, so
nothing here can be recomputed from roots. What follows from signed numbers is checked; the rest is said by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.bundle_case import Case, unhex
from protocol.errors import RemoteProtocolError
from protocol.keys import short
from protocol.profile import EXACT, PPB, Distance, ToleranceRefused, finding, refuse_tolerance
from protocol.records import Verdict
from protocol.tolerance import open_profiles, open_tolerance

__all__ = ["check_distances", "cleared_by", "open_deal_tolerance", "tolerance_words"]


def open_deal_tolerance(case: Case, profiles: Sequence[str]) -> None:
    """Derive what the agreement binds its work to be judged by, from staked verifiers' profiles. Raises Refused."""
    agreement = case.agreement
    if (case.task.mode == "tolerant") != (agreement.tolerance != EXACT):
        raise case.refuse("tolerance", f"a {case.task.mode} task and an agreement that says otherwise")
    try:
        sealed, network = [unhex(text, "profile") for text in profiles], case.network.id
        case.tolerance = open_tolerance(sealed, network=network, task=agreement.task, expected=agreement.tolerance)
        opened = open_profiles(sealed, network=network, task=agreement.task)
        case.profilers = tuple(sorted(profile.verifier for profile in opened))
    except RemoteProtocolError as error:
        raise case.refuse("tolerance", error.what, why=error.why) from None
    if case.tolerance is None:
        return
    for verifier in case.profilers:
        if case.stakes.get(verifier, 0) < case.network.rules.checker_stake_min_micro:
            raise case.refuse("tolerance", f"profiled by {short(verifier)}, who is not shown to have a stake")
    try:
        refuse_tolerance(case.tolerance, case.task.segments)
    except ToleranceRefused as error:
        raise case.refuse("tolerance", error.what, why=error.why) from None


def check_distances(case: Case, verdicts: Sequence[Verdict]) -> None:
    """Hold each verdict's finding against the distances it states, by the rule of protocol.profile.finding.

    One that may be a second verifier's, on what another was unsure of, may go by the second's rule. Raises Refused.
    """
    doubts = [v for v in verdicts if v.finding == "unsure"]
    for verdict in verdicts:
        far, tolerance = (verdict.l1_ppb, verdict.l2_ppb), case.tolerance
        if tolerance is None:
            if far != (0, 0) or verdict.finding == "unsure":
                raise case.refuse("verdict-distance", "a distance in a verdict on exact work, which is equal or wrong")
            continue
        allowed = {finding(Distance(*far, ""), tolerance)}
        if any(_decides(verdict, doubt) for doubt in doubts):
            allowed.add(finding(Distance(*far, ""), tolerance, asked="second"))
        if verdict.finding not in allowed:
            raise case.refuse(
                "verdict-distance",
                f"{short(verdict.checker)} found {verdict.finding} what lies {far[0]} and {far[1]} ppb from its own",
                why=f"at thresholds of {tolerance.l1_ppb} and {tolerance.l2_ppb} ppb that is "
                f"{' or '.join(sorted(allowed))}",
            )


def _decides(verdict: Verdict, doubt: Verdict) -> bool:
    """Whether a verdict may decide what another checker doubted: a second verifier is asked for just that segment."""
    return verdict.checker != doubt.checker and verdict.segments == (doubt.wrong_segment,)


def cleared_by(verdict: Verdict) -> set[int]:
    """The segments that a verdict speaks well of: of one that is unsure all but the one in doubt."""
    if verdict.finding == "wrong":
        return set()
    return set(verdict.segments) - ({verdict.wrong_segment} if verdict.finding == "unsure" else set())


def tolerance_words(case: Case) -> tuple[str, ...]:
    """How the work was judged, in a sentence without its deal; nothing for exact work."""
    if case.tolerance is None:
        return ()
    right = [v for v in case.verdicts if v.finding == "right"]
    l1, l2 = (max((getattr(v, key) for v in right), default=0) / PPB for key in ("l1_ppb", "l2_ppb"))
    seen = f"; what was found right ended within {l1:.1e} (L2 {l2:.1e})" if right else ""
    return (
        f"{len(case.profilers)} staked verifiers profiled how far honest runs lie apart, which gives a threshold of "
        f"{case.tolerance.l1_ppb / PPB:.1e} of a segment's update (L2 {case.tolerance.l2_ppb / PPB:.1e}){seen}",
    )
