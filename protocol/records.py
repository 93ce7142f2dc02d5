"""The signed records of the market and the money (DESIGN §10), and the envelope that carries them.

A record is a msgpack array beginning with its domain tag and the network id, holds integers, hashes and short
names only, and has one id: the hash of its bytes. An Envelope adds the signatures of its parties; `open_record`
is the only way in, and raises unless every byte and every signature is right.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, TypeAlias

import msgspec

from protocol import params
from protocol.codec import Digest, PeerKey, Signature, Uint, blake, decode, encode
from protocol.errors import MalformedRecord, VerificationFailed, WrongNetwork
from protocol.keys import SigningKey, verify

__all__ = [
    "Agreement",
    "Ask",
    "BenchCard",
    "BenchChallenge",
    "Bid",
    "Claim",
    "Envelope",
    "Offer",
    "Proof",
    "Receipt",
    "Record",
    "Reveal",
    "Settlement",
    "Slash",
    "Verdict",
    "Voucher",
    "add_signature",
    "amount_for",
    "decode_body",
    "open_record",
    "parties",
    "record_id",
    "seal",
]

Amount = Annotated[int, msgspec.Meta(ge=0, le=params.AMOUNT_MICRO_MAX)]
Price = Annotated[int, msgspec.Meta(ge=0, le=10**12)]  # micro-credits per giga-operation
Permille = Annotated[int, msgspec.Meta(ge=0, le=1000)]  # of segments re-executed; 0 for a script: none can be
Roles = Annotated[int, msgspec.Meta(ge=0, le=7)]
Share = tuple[PeerKey, Amount]
Sealed = Annotated[bytes, msgspec.Meta(max_length=2048)]

ROLE_SOLVER, ROLE_VERIFIER, ROLE_WHISTLEBLOWER = 1, 2, 4


class _Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    network: Digest


class Offer(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/offer/1"):
    """Work wanted: terms only. Prices in micro-credits per giga-operation, times in ns since the epoch."""

    submitter: PeerKey
    nonce: Uint
    task: Digest
    program: Digest
    data: Digest
    mode: Literal["exact", "native", "script"]
    first_segment: Uint
    last_segment: Uint  # exclusive
    operations: Uint
    memory_bytes: Uint
    checkpoint_bytes: Uint
    sandbox: Annotated[int, msgspec.Meta(ge=0, le=4)]
    unit_price_max: Price
    budget_micro: Amount
    check_permille: Permille
    lock_micro: Amount
    created_ns: Uint
    expires_ns: Uint


class Ask(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/ask/1"):
    """Standing capacity of one slot; the newest sequence number replaces. `roles` is a bit set."""

    peer: PeerKey
    slot: Uint
    sequence: Uint
    roles: Roles
    unit_price: Price
    memory_bytes: Uint
    sandbox: Annotated[int, msgspec.Meta(ge=0, le=4)]
    operations_per_second: Uint
    created_ns: Uint
    expires_ns: Uint


class Bid(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/bid/1"):
    """A solver's answer to one offer. `seed_commitment` is blake of the seed it reveals after the proof."""

    offer: Digest
    solver: PeerKey
    unit_price: Price
    operations_cap: Uint
    lock_micro: Amount
    eta_ns: Uint
    sandbox: Annotated[int, msgspec.Meta(ge=0, le=4)]
    seed_commitment: Digest
    nonce: Uint
    created_ns: Uint
    expires_ns: Uint


class Agreement(
    _Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/agreement/1"
):
    """Both parties' word, and, with both signatures, the opening of a channel and the locking of a stake.

    `sequence` orders the openings of one submitter: two agreements of one number prove a double reservation.
    Freeze rule: once a wrong verdict of the quorum is known, nothing of the channel is paid to the solver.
    """

    offer: Digest
    bid: Digest
    task: Digest
    submitter: PeerKey
    solver: PeerKey
    sequence: Uint
    first_segment: Uint
    last_segment: Uint  # exclusive
    base_root: Digest
    operations: Uint
    unit_price: Price
    channel_micro: Amount
    lock_micro: Amount
    check_permille: Permille
    submitter_commitment: Digest
    solver_commitment: Digest
    accept_before_ns: Uint
    segment_deadline_ns: Uint  # the longest silence between two receipts, a duration
    created_ns: Uint


class Receipt(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/receipt/1"):
    """One segment done, signed by the solver and then by the submitter. `losses_root` binds the loss curve."""

    agreement: Digest
    sequence: Uint
    previous: Digest
    segment: Uint
    operations: Uint
    amount_micro: Amount
    in_root: Digest
    out_root: Digest
    losses_root: Digest
    checkpoint: Digest
    checkpoint_bytes: Uint
    done_ns: Uint


class Voucher(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/voucher/1"):
    """The submitter's cumulative promise on one channel; a later one replaces an earlier one."""

    agreement: Digest
    epoch: Uint
    sequence: Uint
    cumulative_micro: Amount
    cumulative_operations: Uint
    receipt: Digest
    submitter: PeerKey


class Proof(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/proof/1"):
    """The solver's commitment to all its checkpoints: the Merkle root of their state roots, in order.

    Signed by the solver; by the submitter instead where the solver is lost, over the receipts both signed.
    """

    agreement: Digest
    author: PeerKey
    receipts: Uint
    root: Digest
    last_receipt: Digest
    program: Digest


class Reveal(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/reveal/1"):
    """One party's seed, revealed after the proof. It must match the commitment in the agreement."""

    agreement: Digest
    proof: Digest
    author: PeerKey
    seed: Digest


class Verdict(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/verdict/1"):
    """A checker's finding on the drawn segments. If wrong: the first wrong segment and both roots."""

    agreement: Digest
    proof: Digest
    checker: PeerKey
    role: Literal["verifier", "whistleblower"]
    segments: Annotated[tuple[Uint, ...], msgspec.Meta(min_length=1, max_length=params.TASK_SEGMENTS_MAX)]
    finding: Literal["right", "wrong"]
    wrong_segment: Uint
    claimed_root: Digest
    found_root: Digest
    operations: Uint
    done_ns: Uint


class Settlement(
    _Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/settlement/1"
):
    """The closing of a channel that both parties sign: what the solver gets and what each checker gets."""

    agreement: Digest
    submitter: PeerKey
    solver: PeerKey
    paid_micro: Amount
    fees: Annotated[tuple[Share, ...], msgspec.Meta(max_length=16)]
    proof: Digest


class Claim(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/claim/1"):
    """A one-sided closing: after the claim window the highest voucher known is paid and the lock released."""

    agreement: Digest
    author: PeerKey
    voucher: Annotated[bytes, msgspec.Meta(max_length=4096)]  # an Envelope of a Voucher, or empty for zero
    fees: Annotated[tuple[Share, ...], msgspec.Meta(max_length=16)]


class Slash(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/slash/1"):
    """Enough wrong verdicts of distinct checkers on one proof. Anybody may publish it; signatures inside decide."""

    agreement: Digest
    author: PeerKey
    proof: Sealed  # an Envelope of the Proof the verdicts are on
    reveals: Annotated[tuple[Sealed, ...], msgspec.Meta(min_length=1, max_length=2)]  # from which the draw follows
    verdicts: Annotated[tuple[Sealed, ...], msgspec.Meta(min_length=1, max_length=8)]  # Envelopes of Verdicts


class BenchChallenge(
    _Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/bench-challenge/1"
):
    """Multiply this chain (protocol/bench_card.py) now. A peer that challenges itself makes a self-timed card."""

    challenger: PeerKey
    peer: PeerKey
    nonce: Digest
    side: Literal[256, 512, 1024, 2048, 4096]
    links: Annotated[int, msgspec.Meta(ge=1, le=params.BENCH_LINKS_MAX)]
    memory_blocks: Annotated[int, msgspec.Meta(ge=0, le=params.BENCH_MEMORY_BLOCKS_MAX)]
    window_ns: Annotated[int, msgspec.Meta(ge=1, le=params.BENCH_WINDOW_NS_MAX)]
    created_ns: Uint
    expires_ns: Uint


class BenchCard(
    _Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/bench-card/1"
):
    """Proof of capacity: signed by its peer, and by the challenger who timed it and probed its memory.

    Proven: the chain's result (the blob `evidence`) and, for who trusts the challenger's clock, `elapsed_ns` and the
    memory under `memory_root`. The peer's word only: the other figures, per second and in bytes.
    """

    peer: PeerKey
    challenger: PeerKey
    challenge: Sealed  # an Envelope of the BenchChallenge
    evidence: Digest
    elapsed_ns: Annotated[int, msgspec.Meta(ge=1, le=params.BENCH_WINDOW_NS_MAX)]
    memory_root: Digest
    float32_per_second: Uint
    memory_bytes: Uint
    memory_bytes_per_second: Uint
    disk_bytes: Uint
    disk_bytes_per_second: Uint
    cores: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    threads: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    device: Annotated[str, msgspec.Meta(max_length=96, pattern=r"^[ -~]*\Z")]  # it is shown on terminals
    created_ns: Uint
    expires_ns: Uint


Record: TypeAlias = (
    Offer
    | Ask
    | Bid
    | Agreement
    | Receipt
    | Voucher
    | Proof
    | Reveal
    | Verdict
    | Settlement
    | Claim
    | Slash
    | BenchChallenge
    | BenchCard
)


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A record's bytes and one or two signatures over them, each with its signer's key, in key order."""

    body: Annotated[bytes, msgspec.Meta(max_length=params.GOSSIP_RECORD_BYTES_MAX)]
    signatures: Annotated[tuple[tuple[PeerKey, Signature], ...], msgspec.Meta(min_length=1, max_length=2)]


_SIGNING_DOMAIN = "ichiba/record"


def record_id(body: bytes) -> bytes:
    """The id of a record: BLAKE2b-256 of its canonical bytes."""
    return blake("ichiba/record-id", body)


def parties(record: Record) -> frozenset[bytes]:
    """The peers whose signatures make the record whole."""
    match record:
        case Offer(submitter=peer) | Voucher(submitter=peer):
            return frozenset((peer,))
        case Ask(peer=peer) | Bid(solver=peer) | Verdict(checker=peer):
            return frozenset((peer,))
        case Proof(author=peer) | Reveal(author=peer) | Claim(author=peer) | Slash(author=peer):
            return frozenset((peer,))
        case BenchChallenge(challenger=peer):
            return frozenset((peer,))
        case Agreement(submitter=a, solver=b) | Settlement(submitter=a, solver=b) | BenchCard(peer=a, challenger=b):
            return frozenset((a, b))
        case Receipt():
            return frozenset()  # its parties are those of its agreement: the caller compares
    raise AssertionError(type(record))


def seal(record: Record, key: SigningKey) -> bytes:
    """The bytes of an Envelope around `record` with one signature."""
    body = encode(record)
    signature = key.sign(_SIGNING_DOMAIN, record.network, body)
    return encode(Envelope(body, ((key.public, signature),)))


def add_signature(envelope: bytes, key: SigningKey, *, network: bytes) -> bytes:
    """The envelope with `key`'s signature added (once), signers in order of their keys."""
    old = decode(Envelope, envelope, bytes_max=params.GOSSIP_RECORD_BYTES_MAX)
    signature = key.sign(_SIGNING_DOMAIN, network, old.body)
    both = dict(old.signatures) | {key.public: signature}
    return encode(Envelope(old.body, tuple(sorted(both.items()))))


def decode_body(body: bytes, *, network: bytes) -> Record:
    """A record from its canonical bytes, of this network. Raises MalformedRecord, WrongNetwork, LimitExceeded."""
    record: Record = decode(Record, body, bytes_max=params.GOSSIP_RECORD_BYTES_MAX)  # type: ignore[arg-type]
    if record.network != network:
        raise WrongNetwork(
            f"{type(record).__name__.lower()} of network {record.network.hex()[:12]}",
            why=f"this peer is on {network.hex()[:12]}",
            next_step="compare the network files with `ichiba status`",
        )
    return record


def open_record(data: bytes, *, network: bytes) -> tuple[Record, bytes, frozenset[bytes]]:
    """Check an envelope completely. Returns (record, id, signers).

    Every signature is verified, every signer must be a party of the record (of its agreement, for a receipt,
    which the caller checks), and bytes must be canonical. Raises RemoteProtocolError subclasses.
    """
    envelope = decode(Envelope, data, bytes_max=params.GOSSIP_RECORD_BYTES_MAX)
    record = decode_body(envelope.body, network=network)
    signers = [peer for peer, _ in envelope.signatures]
    if signers != sorted(set(signers)):
        raise MalformedRecord("signatures are not in strict order of their keys")
    allowed = parties(record)
    if allowed and not allowed.issuperset(signers):
        raise VerificationFailed(f"{type(record).__name__.lower()} signed by a peer that is no party to it")
    for peer, signature in envelope.signatures:
        verify(peer, _SIGNING_DOMAIN, network, envelope.body, signature)
    return record, record_id(envelope.body), frozenset(signers)


def amount_for(operations: int, unit_price: int) -> int:
    """Micro-credits for `operations` at `unit_price` per giga-operation, rounded down: the payer's favour."""
    return operations * unit_price // 10**9


def ids_digest(ids: Iterable[bytes]) -> bytes:
    """An order-free digest of a set of record ids (their XOR), for anti-entropy: equal sets, equal digests."""
    total = 0
    for one in ids:
        total ^= int.from_bytes(one, "little")
    return total.to_bytes(32, "little")
