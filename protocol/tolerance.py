"""The tolerance that a task's work is judged by, from the signed profiles of its verifiers and from nothing else.

An agreement binds a Tolerance by hash; the profiles travel beside it (Propose, CheckRequest, a bundle), and everybody
derives the thresholds and gauges again. That the verifiers have a stake is for a peer to check, who has a ledger.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol import params
from protocol.errors import LimitExceeded, VerificationFailed
from protocol.profile import EXACT, Profile, ProfilesDisagree, Tolerance, check_profile, combine, tolerance_id
from protocol.records import open_record

__all__ = ["open_profiles", "open_tolerance"]


def open_profiles(sealed: Sequence[bytes], *, network: bytes, task: bytes) -> list[Profile]:
    """The profiles of tolerant mode in envelopes, each of this task and of a verifier of its own.

    Raises VerificationFailed, MalformedRecord or another RemoteProtocolError; LimitExceeded for too many.
    """
    if len(sealed) > params.PROFILES_KEPT_MAX:
        raise LimitExceeded(f"{len(sealed)} profiles of one task, at most {params.PROFILES_KEPT_MAX}")
    found: dict[bytes, Profile] = {}
    for envelope in sealed:
        record, _, signers = open_record(envelope, network=network)
        if not isinstance(record, Profile) or signers != {record.verifier}:
            raise VerificationFailed("a tolerance rests on profiles signed by their verifiers")
        if record.task != task or record.mode != "tolerant":
            raise VerificationFailed("a profile of another task, or of exact work")
        if record.verifier in found:
            raise VerificationFailed("two profiles of one verifier", why="one verifier is one voice")
        check_profile(record)
        found[record.verifier] = record
    return list(found.values())


def open_tolerance(sealed: Sequence[bytes], *, network: bytes, task: bytes, expected: bytes) -> Tolerance | None:
    """What an agreement's `tolerance` stands for; None if it is EXACT, for which there are no profiles.

    Raises VerificationFailed if the profiles give none or another than the agreement says, and as `open_profiles`.
    """
    if expected == EXACT:
        if sealed:
            raise VerificationFailed("profiles beside an agreement on exact work")
        return None
    try:
        tolerance = combine(open_profiles(sealed, network=network, task=task))
    except ProfilesDisagree as error:
        raise VerificationFailed("the profiles give no tolerance", why=str(error)) from None
    if tolerance_id(tolerance) != expected:
        raise VerificationFailed(
            "the profiles give another tolerance than the agreement says",
            why=f"thresholds of {tolerance.l1_ppb} and {tolerance.l2_ppb} ppb, {len(tolerance.gauges)} gauge(s)",
        )
    return tolerance
