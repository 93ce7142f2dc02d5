"""The disputes of one deal of a bundle: what a quorum of notaries found, on which segment, and whom that refutes.

Signatures, quorum and agreement are checked as every peer's log does (protocol/arbitration.py); beside that, that the
dispute was about this deal's own proof and receipts. How the notaries came to it is not in a bundle: their signatures
stand for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from protocol.arbitration import Judged, open_arbitration, refutes
from protocol.credits import credits_of
from protocol.errors import VerificationFailed
from protocol.keys import short
from protocol.network import Network
from protocol.records import Agreement, Arbitration, Fault, Verdict, open_record

__all__ = ["faulty_checker", "finding_words", "open_disputes", "unanswered"]


def open_disputes(
    records: Iterable[Arbitration],
    agreement: Agreement,
    network: Network,
    *,
    proof_id: bytes,
    out_roots: Mapping[int, bytes],
) -> tuple[Judged, ...]:
    """What notaries found, once for each dispute, in order of segments.

    out_roots: of the deal's receipts, by segment. Raises VerificationFailed or another RemoteProtocolError for an
    Arbitration that does not hold, is about another proof or root, or contradicts another.
    """
    found: dict[bytes, Judged] = {}
    for record in records:
        judged = open_arbitration(record, agreement, network)
        segment = judged.challenge.segment
        if judged.challenge.proof != proof_id or judged.challenge.claimed_root != out_roots.get(segment):
            raise VerificationFailed(
                f"a dispute of segment {segment} about another proof, or another root than its receipt's"
            )
        if found.setdefault(judged.dispute, judged) != judged:
            raise VerificationFailed(f"notaries found both on one dispute of segment {segment}")
    return tuple(sorted(found.values(), key=lambda judged: (judged.challenge.segment, judged.dispute)))


def unanswered(verdicts: Iterable[Verdict], disputes: Sequence[Judged]) -> list[Verdict]:
    """The wrong verdicts that no dispute was about."""
    judged = {(j.challenge.challenger, j.challenge.segment) for j in disputes}
    judged |= {(b"", j.challenge.segment) for j in disputes if j.finding != "right"}  # whoever brought it
    return [
        v
        for v in verdicts
        if v.finding == "wrong" and not judged & {(v.checker, v.wrong_segment), (b"", v.wrong_segment)}
    ]


def faulty_checker(record: Fault, disputes: Sequence[Judged], network: Network) -> bytes:
    """The checker whose right verdict the disputes refute. Raises VerificationFailed if they do not."""
    verdict, _, _ = open_record(record.verdict, network=network.id)
    if not isinstance(verdict, Verdict) or verdict.agreement != record.agreement:
        raise VerificationFailed("a fault without a verdict on its agreement")
    if not any(refutes(judged, verdict) for judged in disputes):
        raise VerificationFailed(f"no dispute refutes the verdict of checker {short(verdict.checker)}")
    return verdict.checker


_BASIS_WORDS = {
    "leaf": "executed the operation in dispute",
    "both": "executed, or had jurors execute, what is in dispute, where its challenger was wrong as well,",
    "forfeit": "saw one side give up",
    "jury": "had jurors, drawn by their stakes, re-execute it",
    "repeated": "had jurors, drawn by their stakes, re-execute it to the bit",
}


def finding_words(judged: Judged, agreement: Agreement, network: Network) -> str:
    """One finding, in a sentence without its deal."""
    segment, who = judged.challenge.segment, short(judged.challenge.challenger)
    quorum = f"at least {network.notary_quorum} of {len(network.notaries)} notaries"
    if judged.finding == "forced":
        return f"the error in segment {segment} was ordered, and {who} found it, say {quorum}"
    seen = f"{quorum} {_BASIS_WORDS[judged.basis]}"
    if judged.finding == "right":
        return f"{seen} and found {who}'s challenge of segment {segment} false"
    lock = credits_of(agreement.lock_micro)
    return f"{seen} and found segment {segment} wrong, as {who} said: the stake of {lock} credits is lost"
