"""The seeds of a deal as evidence: whoever judges a draw re-derives it from the signed reveals alone."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.errors import VerificationFailed
from protocol.forced import open_beacon
from protocol.network import Network
from protocol.records import Agreement, Reveal, open_record
from protocol.sampling import check_reveal, mixed, randomness

__all__ = ["open_draw", "open_seeds"]


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
