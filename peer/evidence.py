"""The vouchers, seeds and verdicts of a deal as evidence: whoever judges goes by signed records alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from protocol.errors import VerificationFailed
from protocol.forced import open_beacon
from protocol.network import Network
from protocol.profile import EXACT
from protocol.records import Agreement, Claim, Proof, Reveal, Slash, Verdict, Voucher, open_record
from protocol.sampling import check_reveal, mixed, randomness, select_segments

__all__ = ["claimed_micro", "open_draw", "open_seeds", "wrong_verdicts"]


def claimed_micro(claim: Claim, agreement: Agreement, network: bytes) -> int:
    """What the voucher in a claim on this agreement promises, in micro-credits; 0 without one. Raises
    VerificationFailed for a voucher of another deal, not its submitter's, or above what was agreed."""
    if not claim.voucher:
        return 0
    voucher, _, _ = open_record(claim.voucher, network=network)
    if not isinstance(voucher, Voucher) or voucher.agreement != claim.agreement:
        raise VerificationFailed("claim with a voucher of another channel")
    if voucher.submitter != agreement.submitter:
        raise VerificationFailed("claim with a voucher that the submitter did not sign")
    worth = voucher.cumulative_micro
    if worth > agreement.promise_micro:
        raise VerificationFailed(f"voucher of {worth} on a channel of {agreement.promise_micro} micro-credits")
    return worth


def open_seeds(
    reveals: Sequence[bytes], agreement: Agreement, agreement_id: bytes, proof_id: bytes, network: bytes
) -> bytes:
    """What both seeds and the proof give, 32 bytes, from envelopes of one or two Reveals.

    The submitter's must be there; a solver that did not reveal has an empty seed. Raises VerificationFailed for a
    reveal of another proof, by a stranger, or that does not match its commitment in the agreement.
    """
    seeds: dict[bytes, bytes] = {}
    for envelope in reveals:
        reveal, _, _ = open_record(envelope, network=network)
        if not isinstance(reveal, Reveal) or (reveal.agreement, reveal.proof) != (agreement_id, proof_id):
            raise VerificationFailed("a reveal of another proof")
        seeds[reveal.author] = reveal.seed
    if agreement.submitter not in seeds or not set(seeds) <= {agreement.submitter, agreement.solver}:
        raise VerificationFailed("the submitter's seed is missing, or a stranger's is there")
    check_reveal(seeds[agreement.submitter], agreement.submitter_commitment, agreement_salt=agreement.submitter)
    solver_seed = seeds.get(agreement.solver, b"")
    if solver_seed:
        check_reveal(solver_seed, agreement.solver_commitment, agreement_salt=agreement.solver)
    return randomness(proof=proof_id, submitter_seed=seeds[agreement.submitter], solver_seed=solver_seed)


def open_draw(
    reveals: Sequence[bytes],
    beacons: Sequence[bytes],
    agreement: Agreement,
    agreement_id: bytes,
    proof_id: bytes,
    network: Network,
) -> bytes:
    """The randomness of a deal's checks, 32 bytes: `open_seeds`, mixed with the notaries' beacon for just that.

    beacons: envelopes of their shares; none in a network without notaries. Raises VerificationFailed as `open_seeds`
    and `protocol.forced.open_beacon` do.
    """
    seeds = open_seeds(reveals, agreement, agreement_id, proof_id, network.id)
    return mixed(seeds, open_beacon(beacons, target=seeds, agreement=agreement, network=network))


def wrong_verdicts(
    record: Slash, agreement: Agreement, network: Network, free_stake: Callable[[bytes], int] | None
) -> list[Verdict]:
    """The quorum inside a Slash, in order of their checkers: distinct, staked, no parties, of one proof. free_stake:
    of a peer in micro-credits; None where stakes were judged before. Raises VerificationFailed.

    They may name different segments (each was drawn its own), but not different roots for one segment, unless
    they are of float work, which has other roots on each machine: a cheat that is wrong everywhere must not escape
    because its judges looked in different places.
    """
    rules = network.rules
    proof_id, drawn = _drawn(record, agreement, network)
    verdicts: list[Verdict] = []
    for envelope in record.verdicts:
        verdict, _, _ = open_record(envelope, network=network.id)
        if not isinstance(verdict, Verdict) or verdict.finding != "wrong":
            raise VerificationFailed("a slash rests on wrong verdicts only")
        if verdict.agreement != record.agreement:
            raise VerificationFailed("a slash with a verdict on another agreement")
        if verdict.checker in (agreement.submitter, agreement.solver):
            raise VerificationFailed("a party of the agreement cannot judge it")
        if verdict.proof != proof_id or verdict.wrong_segment not in drawn:
            raise VerificationFailed("a verdict on another proof, or on a segment that was not drawn")
        stake = free_stake(verdict.checker) if free_stake is not None else rules.checker_stake_min_micro
        if stake < rules.checker_stake_min_micro:
            raise VerificationFailed(f"a checker with a stake of {stake} micro-credits cannot slash")
        verdicts.append(verdict)
    if len({v.checker for v in verdicts}) != len(verdicts) or len(verdicts) < rules.wrong_quorum:
        raise VerificationFailed(f"{len(verdicts)} verdicts, a slash takes {rules.wrong_quorum} of distinct checkers")
    found = {(v.wrong_segment, v.claimed_root, v.found_root) for v in verdicts}
    if agreement.tolerance == EXACT and len({segment for segment, _, _ in found}) != len(found):
        raise VerificationFailed("the wrong verdicts do not agree on the roots")
    return sorted(verdicts, key=lambda v: v.checker)


def _drawn(record: Slash, agreement: Agreement, network: Network) -> tuple[bytes, tuple[int, ...]]:
    """The proof a Slash is about and the segments its seeds draw: two liars cannot pick what they condemn."""
    proof, proof_id, _ = open_record(record.proof, network=network.id)
    if not isinstance(proof, Proof) or proof.agreement != record.agreement:
        raise VerificationFailed("a slash with the proof of another agreement")
    if proof.author not in (agreement.submitter, agreement.solver):
        raise VerificationFailed("a slash with a stranger's proof")
    random = open_seeds(record.reveals, agreement, record.agreement, proof_id, network.id)
    segments = select_segments(
        random,
        first=agreement.first_segment,
        last=min(agreement.last_segment, agreement.first_segment + proof.receipts),
        permille=agreement.check_permille,
        minimum=network.rules.check_segments_min,
    )
    return proof_id, segments
