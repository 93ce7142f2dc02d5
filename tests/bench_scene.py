"""Small challenges, honest cards and their evidence, for the tests of bench cards."""

from __future__ import annotations

from typing import Any

from protocol.bench_card import evidence_id, open_challenge, reference_result
from protocol.codec import blake
from protocol.keys import SigningKey
from protocol.records import BenchCard, BenchChallenge, add_signature, seal

NETWORK = blake("test", b"bench")
SECOND = 10**9
NOW = 1_700_000_000 * SECOND
PROVER, CHALLENGER, EVE = (SigningKey.from_seed(bytes([i]) * 32) for i in (1, 2, 3))


def challenge(**changes: Any) -> BenchChallenge:
    fields: dict[str, Any] = {
        "network": NETWORK,
        "challenger": CHALLENGER.public,
        "peer": PROVER.public,
        "nonce": bytes(32),
        "side": 256,
        "links": 3,
        "memory_blocks": 8,
        "window_ns": 60 * SECOND,
        "created_ns": NOW,
        "expires_ns": NOW + 120 * SECOND,
    }
    return BenchChallenge(**fields | changes)


def challenge_id(one: BenchChallenge, key: SigningKey = CHALLENGER) -> bytes:
    return open_challenge(seal(one, key), network=one.network)[1]


def card(terms: BenchChallenge, evidence: bytes, *, key: SigningKey = CHALLENGER, **changes: Any) -> BenchCard:
    fields: dict[str, Any] = {
        "network": terms.network,
        "peer": terms.peer,
        "challenger": terms.challenger,
        "challenge": seal(terms, key),
        "evidence": evidence_id(evidence),
        "elapsed_ns": 2 * SECOND,
        "memory_root": bytes(32),
        "float32_per_second": 10**11,
        "memory_bytes": 2**34,
        "memory_bytes_per_second": 10**10,
        "disk_bytes": 10**12,
        "disk_bytes_per_second": 10**9,
        "cores": 8,
        "threads": 1,
        "device": "test",
        "created_ns": NOW + 3 * SECOND,
        "expires_ns": NOW + 3600 * SECOND,
    }
    return BenchCard(**fields | changes)


def witnessed(one: BenchCard, *signers: SigningKey) -> bytes:
    first, *others = signers or (PROVER, CHALLENGER)
    envelope = seal(one, first)
    for key in others:
        envelope = add_signature(envelope, key, network=one.network)
    return envelope


def honest() -> tuple[BenchChallenge, bytes, bytes]:
    """(challenge, evidence, the card's envelope with both signatures)."""
    terms = challenge()
    evidence = reference_result(terms, challenge_id(terms))
    return terms, evidence, witnessed(card(terms, evidence))
