"""An Arbitration, opened: which dispute it ends, how, and whose word that is. Nothing here moves money."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import VerificationFailed
from protocol.network import Network
from protocol.outcomes import referee_fee_micro
from protocol.profile import EXACT
from protocol.records import Agreement, Arbitration, Challenge, Ruling, Verdict, open_record

__all__ = ["Judged", "check_challenge", "found_by", "open_arbitration", "refutes"]


@dataclass(frozen=True)
class Judged:
    """What a quorum of notaries found. dispute: the id of the challenge; fees: micro-credits for each notary.

    basis: "leaf", they executed the operation in dispute; "both", neither side is right; "ordered"; "jury", jurors
    measured float work again; "repeated", jurors executed exact work again, to the bit; or "forfeit", one side gave up,
    so nothing is known of the work.
    """

    dispute: bytes
    challenge: Challenge
    finding: str
    basis: str
    fees: tuple[tuple[bytes, int], ...]


_BASIS = {"leaf": "leaf", "both": "both", "forced": "ordered", "jury": "jury"}


def open_arbitration(record: Arbitration, agreement: Agreement, network: Network) -> Judged:
    """Check all that an Arbitration rests on. Raises VerificationFailed, or another RemoteProtocolError.

    The challenge is on a segment of the agreement and not by its solver; the rulings are of a quorum of distinct
    notaries, none of them a party or the challenger, all on this challenge, with one finding. What money depends on is
    the same in every quorum's rulings, whoever of the notaries is in it: two peers may see two arbitrations first.
    """
    challenge, dispute, _ = open_record(record.challenge, network=network.id)
    if not isinstance(challenge, Challenge) or challenge.agreement != record.agreement:
        raise VerificationFailed("an arbitration without a challenge of its agreement")
    check_challenge(challenge, agreement)
    parties = {agreement.submitter, agreement.solver, challenge.challenger}
    rulings: dict[bytes, Ruling] = {}
    for envelope in record.rulings:
        ruling, _, _ = open_record(envelope, network=network.id)
        if not isinstance(ruling, Ruling) or ruling.notary not in network.notary_keys or ruling.notary in parties:
            raise VerificationFailed("a ruling by a peer that is no notary here, or is a party to the dispute")
        if (ruling.dispute, ruling.agreement, ruling.segment) != (dispute, record.agreement, challenge.segment):
            raise VerificationFailed("a ruling on another dispute")
        rulings[ruling.notary] = ruling
    findings = {found_by(ruling) for ruling in rulings.values()}
    if len(findings) != 1 or len(rulings) != len(record.rulings) or len(rulings) < network.notary_quorum:
        raise VerificationFailed(
            f"{len(record.rulings)} rulings with {len(findings)} findings",
            why=f"a dispute ends by one finding of {network.notary_quorum} distinct notaries",
        )
    finding, basis, operations = findings.pop()
    if basis == "jury" and agreement.tolerance == EXACT:
        basis = "repeated"
    fee_micro = referee_fee_micro(operations, agreement)
    fees = tuple((notary, fee_micro) for notary in sorted(network.notary_keys - parties) if fee_micro)
    return Judged(dispute, challenge, finding, basis, fees)


def refutes(judged: Judged, verdict: Verdict) -> bool:
    """Whether notaries saw that what a right verdict covers is wrong, or an error that was ordered.

    A solver that merely gave up refutes nobody: its work may be right. Nor does a jury of float work: near the
    threshold an honest checker may have measured a little less.
    """
    return (
        verdict.finding == "right"
        and judged.finding in ("wrong", "forced")
        and judged.basis not in ("forfeit", "jury")
        and judged.challenge.proof == verdict.proof
        and judged.challenge.segment in verdict.segments
    )


def check_challenge(challenge: Challenge, agreement: Agreement) -> None:
    """Raise VerificationFailed for a challenge that no notary can judge, whatever its evidence."""
    if not agreement.first_segment <= challenge.segment < agreement.last_segment:
        raise VerificationFailed(f"a challenge of segment {challenge.segment}, which is none of the agreement's")
    if challenge.challenger == agreement.solver or challenge.claimed_root == challenge.found_root:
        raise VerificationFailed("a challenge by the solver itself, or of nothing")


def found_by(ruling: Ruling) -> tuple[str, str, int]:
    """What money depends on: finding, basis, and the operations that are paid for: those of a leaf that was run."""
    basis = _BASIS.get(ruling.cause, "forfeit")
    return ruling.finding, basis, ruling.operations if basis in ("leaf", "both") else 0
