"""The signed records of the market and the money (DESIGN §10), and the envelope that carries them.

A record is a msgpack array beginning with its domain tag and the network id, holds integers, hashes and short
names only, and has one id: the hash of its bytes. An Envelope adds the signatures of its parties; `open_record`
is the only way in, and raises unless every byte and every signature is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Annotated, Literal, TypeAlias

import msgspec

from protocol import params
from protocol.bench_records import BenchCard, BenchChallenge
from protocol.codec import Digest, PeerKey, Signature, Uint, blake, decode, encode
from protocol.credit_records import NO_CREDIT, Clearing, CreditLine, CreditRecord, Netting
from protocol.errors import MalformedRecord, RemoteProtocolError, VerificationFailed, WrongNetwork
from protocol.keys import SigningKey, are_right, check_of, verify
from protocol.lately import Lately
from protocol.link_report import LinkReport
from protocol.notary_records import Beacon, Ruling, Void
from protocol.profile import EXACT, UNBOUNDED, Profile
from protocol.stake_records import StakeMove

__all__ = [
    "SIGNING_DOMAIN", "Agreement", "Arbitration", "Ask", "Beacon", "BenchCard", "BenchChallenge", "Bid", "Challenge",
    "Claim", "Envelope", "Equivocation", "Fault", "Forced", "Move", "Offer", "Profile", "Proof", "Receipt", "Record",
    "Reveal", "Ruling", "Settlement", "Slash", "StakeMove", "Verdict", "Void", "Voucher", "add_signature",
    "amount_for", "decode_body", "open_ahead", "open_record", "parties", "record_id", "seal",
]  # fmt: skip

Amount = Annotated[int, msgspec.Meta(ge=0, le=params.AMOUNT_MICRO_MAX)]
Price = Annotated[int, msgspec.Meta(ge=0, le=10**12)]  # micro-credits per giga-operation
Permille = Annotated[int, msgspec.Meta(ge=0, le=1000)]  # of segments re-executed; 0 for a script: none can be
Roles = Annotated[int, msgspec.Meta(ge=0, le=7)]
Ppb = Annotated[int, msgspec.Meta(ge=0, le=UNBOUNDED)]
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
    mode: Literal["exact", "tolerant", "script", "profile"]
    first_segment: Uint
    last_segment: Uint  # exclusive
    operations: Uint
    memory_bytes: Uint
    checkpoint_bytes: Uint
    sandbox: Annotated[int, msgspec.Meta(ge=0, le=4)]
    unit_price_max: Price
    budget_micro: Amount  # 0: on credit, so only who gives its submitter a line can take it (protocol/credit_records)
    check_permille: Permille
    lock_micro: Amount
    created_ns: Uint
    expires_ns: Uint
    tolerance: Digest = EXACT  # of a tolerant task (protocol.profile.tolerance_id)
    device: Literal["any", "cpu", "gpu"] = "any"
    device_memory_bytes: Uint = 0  # that its graphics card must have
    deadline_ns: Uint = 0  # when the work must be done; 0: whenever
    content_bytes: Uint = 0  # that its solver fetches before it starts: program, data and the state it starts from
    privacy: Literal["open", "sealed"] = "open"  # sealed: only who wins gets the keys of program and data
    units: Uint = 0  # of a unit of a parallel job: how many it has; they are awarded together


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
    device: Literal["cpu", "gpu"] = "cpu"
    device_memory_bytes: Uint = 0  # of its graphics card


class Bid(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/bid/1"):
    """A solver's answer to one offer. `seed_commitment` is blake of the seed it reveals after the proof,
    `forced_commitment` that of the secret which decides whether an error is ordered (protocol/forced.py)."""

    offer: Digest
    solver: PeerKey
    unit_price: Price
    operations_cap: Uint
    lock_micro: Amount
    eta_ns: Uint
    sandbox: Annotated[int, msgspec.Meta(ge=0, le=4)]
    seed_commitment: Digest
    forced_commitment: Digest
    nonce: Uint
    created_ns: Uint
    expires_ns: Uint
    device: Literal["cpu", "gpu"] = "cpu"
    device_memory_bytes: Uint = 0  # of its graphics card


class Agreement(
    _Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/agreement/1"
):
    """Both parties' word, and, with the signatures of protocol/certificate.py, a channel's opening and a stake's lock.

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
    forced_commitment: Digest
    accept_before_ns: Uint
    segment_deadline_ns: Uint  # the longest silence between two receipts, a duration
    created_ns: Uint
    tolerance: Digest = EXACT  # of a tolerant task: what its work is judged by (protocol.profile.tolerance_id)
    credit: Digest = NO_CREDIT  # the solver's CreditLine; then there is no channel and no lock, and no ledger takes it

    @property
    def promise_micro(self) -> int:
        """The most its vouchers may promise: what the channel holds; on credit, the price of all the work."""
        return self.channel_micro or amount_for(self.operations, self.unit_price)


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
    """A checker's finding on the drawn segments, and both roots of the first that is wrong, or the farthest in doubt.

    Of a tolerant task also how far its end lies from the checker's own, in ppb of the segment's update; of work that is
    right, the farthest of its segments. Unsure: between one threshold and ten, so another checker decides.
    """

    agreement: Digest
    proof: Digest
    checker: PeerKey
    role: Literal["verifier", "whistleblower", "juror"]
    segments: Annotated[tuple[Uint, ...], msgspec.Meta(min_length=1, max_length=params.TASK_SEGMENTS_MAX)]
    finding: Literal["right", "wrong", "unsure"]
    wrong_segment: Uint
    claimed_root: Digest
    found_root: Digest
    operations: Uint
    done_ns: Uint
    l1_ppb: Ppb = 0
    l2_ppb: Ppb = 0


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
    after: Annotated[tuple[Digest, ...], msgspec.Meta(max_length=64)] = ()  # the disputes that were judged before


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


class Forced(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/forced/1"):
    """The solver tells the notaries, before it hands in the receipt: this segment's root is an error that was ordered,
    `secret` proves it, and this is the true end."""

    solver: PeerKey
    agreement: Digest
    segment: Uint
    secret: Digest
    false_root: Digest
    true_root: Digest
    checkpoint: Digest
    checkpoint_bytes: Uint


class Challenge(
    _Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/challenge/1"
):
    """A checker stakes that a receipted segment does not end where its receipt says. Its id names the dispute."""

    challenger: PeerKey
    agreement: Digest
    proof: Digest
    segment: Uint
    claimed_root: Digest
    found_root: Digest
    operations: Uint  # metered: what the challenger is owed if it is right
    created_ns: Uint


class Move(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/move/1"):
    """One player's answer in round `number` of a dispute. Two of one player and number prove a fraud by themselves."""

    dispute: Digest
    player: PeerKey
    number: Uint
    body: Annotated[bytes, msgspec.Meta(max_length=params.MOVE_BYTES_MAX)]


class Arbitration(
    _Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/arbitration/1"
):
    """A dispute's end: its Challenge and one finding of a quorum of notaries. Anybody may publish it."""

    agreement: Digest
    author: PeerKey
    challenge: Sealed
    rulings: Annotated[tuple[Sealed, ...], msgspec.Meta(min_length=1, max_length=params.NOTARIES_MAX)]


class Fault(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/fault/1"):
    """A checker's right verdict on what notaries found wrong, or an ordered error. Anybody may publish it."""

    agreement: Digest
    author: PeerKey
    verdict: Sealed


class Equivocation(
    _Record, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/equivocation/1"
):
    """Two records that one peer must not both have signed (protocol/equivocation.py). Anybody may sign and publish it,
    and whoever does, it is the same record."""

    culprit: PeerKey
    first: Sealed  # Envelopes, the one with the smaller id first
    second: Sealed


Record: TypeAlias = (
    Offer
    | Ask
    | LinkReport
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
    | Beacon
    | Void
    | Forced
    | Challenge
    | Move
    | Ruling
    | Arbitration
    | Fault
    | Equivocation
    | BenchChallenge
    | BenchCard
    | Profile
    | CreditRecord
    | StakeMove
)


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A record's bytes and signatures over them, in key order: of its parties, and of the notaries that certify it."""

    body: Annotated[bytes, msgspec.Meta(max_length=params.GOSSIP_RECORD_BYTES_MAX)]
    signatures: Annotated[
        tuple[tuple[PeerKey, Signature], ...], msgspec.Meta(min_length=1, max_length=2 + params.NOTARIES_MAX)
    ]


SIGNING_DOMAIN = "ichiba/record"
_opened: Lately[tuple[bytes, bytes], tuple[Record, bytes, frozenset[bytes]]] = Lately(params.OPENED_REMEMBERED_MAX)


def record_id(body: bytes) -> bytes:
    """The id of a record: BLAKE2b-256 of its canonical bytes."""
    return blake("ichiba/record-id", body)


def parties(record: Record) -> frozenset[bytes]:
    """The peers whose signatures make the record whole."""
    match record:
        case Offer(submitter=peer) | Voucher(submitter=peer):
            return frozenset((peer,))
        case LinkReport(peer=peer):
            return frozenset((peer,))
        case Ask(peer=peer) | Bid(solver=peer) | Verdict(checker=peer) | Profile(verifier=peer):
            return frozenset((peer,))
        case Proof(author=peer) | Reveal(author=peer) | Claim(author=peer) | Slash(author=peer):
            return frozenset((peer,))
        case Beacon(notary=peer) | Void(notary=peer) | Ruling(notary=peer) | CreditLine(creditor=peer):
            return frozenset((peer,))
        case Challenge(challenger=peer) | Forced(solver=peer) | BenchChallenge(challenger=peer):
            return frozenset((peer,))
        case Move(player=peer) | Arbitration(author=peer) | Fault(author=peer) | StakeMove(owner=peer):
            return frozenset((peer,))
        case Clearing(parties=peers):
            return frozenset(peers)
        case Agreement(submitter=a, solver=b) | Settlement(submitter=a, solver=b) | BenchCard(peer=a, challenger=b):
            return frozenset((a, b))
        case Netting(first=a, second=b):
            return frozenset((a, b))
        case Receipt() | Equivocation():
            return frozenset()  # its parties are those of its agreement: the caller compares. Or anybody's word will do
    raise AssertionError(type(record))


def seal(record: Record, key: SigningKey) -> bytes:
    """The bytes of an Envelope around `record` with one signature."""
    body = encode(record)
    signature = key.sign(SIGNING_DOMAIN, record.network, body)
    return encode(Envelope(body, ((key.public, signature),)))


def add_signature(envelope: bytes, key: SigningKey, *, network: bytes) -> bytes:
    """The envelope with `key`'s signature added (once), signers in order of their keys."""
    old = decode(Envelope, envelope, bytes_max=params.GOSSIP_RECORD_BYTES_MAX)
    signature = key.sign(SIGNING_DOMAIN, network, old.body)
    every = dict(old.signatures) | {key.public: signature}
    return encode(Envelope(old.body, tuple(sorted(every.items()))))


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
    which the caller checks), and bytes must be canonical. The other signers of an Agreement or a StakeMove must be
    notaries, which protocol/certificate.py checks. Raises RemoteProtocolError subclasses.

    A small envelope is opened once: peer/verifying.py does it ahead of the node, which then does it at each step.
    """
    known = _opened.get((network, data))
    if known is not None:
        return known
    envelope, record = _read(data, network)
    for peer, signature in envelope.signatures:
        verify(peer, SIGNING_DOMAIN, network, envelope.body, signature)
    return _note(data, network, envelope, record)


def open_ahead(many: Iterable[bytes], *, network: bytes, compute: Callable[[list[bytes]], None]) -> None:
    """Open small envelopes for who will ask `open_record`; what is wrong with the others it will find by itself.

    compute: as `verify_ahead`, all checks at once. More signatures than parties are left too, for opening stops at the
    first that is wrong: nobody makes us compute more than by signing well.
    """
    read = []
    for data in many:
        if _opened.get((network, data)) is not None:
            continue
        with suppress(RemoteProtocolError):
            envelope, record = _read(data, network)
            if len(envelope.signatures) <= 2:
                body = envelope.body
                checks = [check_of(peer, SIGNING_DOMAIN, network, body, one) for peer, one in envelope.signatures]
                read.append((data, envelope, record, checks))
    compute([check for *_, checks in read for check in checks])
    for data, envelope, record, checks in read:
        if are_right(checks):
            _note(data, network, envelope, record)


def _read(data: bytes, network: bytes) -> tuple[Envelope, Record]:
    """An envelope and its record, checked in all but the signatures themselves."""
    envelope = decode(Envelope, data, bytes_max=params.GOSSIP_RECORD_BYTES_MAX)
    record = decode_body(envelope.body, network=network)
    signers = [peer for peer, _ in envelope.signatures]
    if signers != sorted(set(signers)):
        raise MalformedRecord("signatures are not in strict order of their keys")
    strangers = set(signers) - (parties(record) or set(signers[:2]))
    if strangers and not isinstance(record, Agreement | StakeMove):
        raise VerificationFailed(f"{type(record).__name__.lower()} signed by a peer that is no party to it")
    return envelope, record


def _note(data: bytes, network: bytes, envelope: Envelope, record: Record) -> tuple[Record, bytes, frozenset[bytes]]:
    """What opening an envelope gives whose signatures are right."""
    opened = record, record_id(envelope.body), frozenset(peer for peer, _ in envelope.signatures)
    if len(data) <= params.OPENED_BYTES_MAX:
        _opened.note((network, data), opened)
    return opened


def amount_for(operations: int, unit_price: int) -> int:
    """Micro-credits for `operations` at `unit_price` per giga-operation, rounded down: the payer's favour."""
    return operations * unit_price // 10**9
