"""Direct messages between two peers: small, bounded, repeated by their senders until the state moves on.

Every record inside travels as its Envelope; a message itself proves nothing and is never stored.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from protocol import params
from protocol.bench_card import Figures, Opening
from protocol.codec import Digest, Uint, decode, encode

__all__ = [
    "Accept",
    "BenchAsk",
    "BenchDecline",
    "BenchDone",
    "BenchInvite",
    "BenchOffer",
    "BenchProbe",
    "BenchProbed",
    "BenchStart",
    "BenchTimed",
    "BenchWitness",
    "Cancel",
    "CheckAccept",
    "CheckDecline",
    "CheckRequest",
    "Decline",
    "Message",
    "Opened",
    "Paused",
    "Progress",
    "ProofOffer",
    "Propose",
    "ReceiptBack",
    "ReceiptOffer",
    "Records",
    "RevealOffer",
    "ScriptNews",
    "SettleBack",
    "SettleOffer",
    "SyncDigest",
    "SyncIds",
    "pack",
    "unpack",
]

Sealed = Annotated[bytes, msgspec.Meta(max_length=params.GOSSIP_RECORD_BYTES_MAX)]
Text = Annotated[str, msgspec.Meta(max_length=500)]


class Propose(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="propose"):
    """The submitter's signed agreement and the task it is about."""

    agreement: Sealed
    task: Sealed
    base_blob: Annotated[bytes, msgspec.Meta(max_length=32)]


class Accept(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="accept"):
    """The agreement with both signatures, from the solver."""

    agreement: Sealed


class Decline(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="decline"):
    """No deal, with a typed reason."""

    agreement: Digest
    code: Text
    why: Text


class Opened(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="opened"):
    """The submitter committed the co-signed agreement: the channel is funded."""

    agreement: Sealed


class Progress(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="progress"):
    """Unsigned news for people: the step reached and its loss in millionths. May be lost."""

    agreement: Digest
    step: Uint
    loss_millionths: int


class Paused(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="paused"):
    """Unsigned news for people: the solver's owner paused the work, or lets it go on. It buys no time."""

    agreement: Digest
    paused: bool


class ScriptNews(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="script-news"):
    """Unsigned news for people: what a running script printed, and the nanoseconds it has used. May be lost."""

    agreement: Digest
    text: Annotated[str, msgspec.Meta(max_length=params.SCRIPT_NEWS_CHARS_MAX + 100)]
    used_ns: Uint


class ReceiptOffer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="receipt"):
    """A receipt the solver signed."""

    receipt: Sealed


class ReceiptBack(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="receipt-back"):
    """The receipt with both signatures, and the voucher that pays for it."""

    receipt: Sealed
    voucher: Sealed


class ProofOffer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="proof"):
    """The solver's commitment to all its checkpoints."""

    proof: Sealed


class RevealOffer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="reveal"):
    """A party's seed, after the proof."""

    reveal: Sealed


class CheckRequest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="check"):
    """Everything a checker needs to decide what to re-execute and against what."""

    agreement: Sealed
    task: Sealed
    base_blob: Annotated[bytes, msgspec.Meta(max_length=32)]
    receipts: Annotated[tuple[Sealed, ...], msgspec.Meta(min_length=1, max_length=params.TASK_SEGMENTS_MAX)]
    proof: Sealed
    reveals: Annotated[tuple[Sealed, ...], msgspec.Meta(max_length=2)]
    segments: Annotated[tuple[Uint, ...], msgspec.Meta(min_length=1, max_length=params.TASK_SEGMENTS_MAX)]
    role: Literal["verifier", "whistleblower"]


class CheckAccept(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="check-accept"):
    """The checker is at work."""

    agreement: Digest


class CheckDecline(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="check-decline"):
    """The checker cannot or will not, with a typed reason."""

    agreement: Digest
    code: Text
    why: Text


class SettleOffer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="settle"):
    """The settlement with the submitter's signature, and the verdicts it rests on."""

    settlement: Sealed


class SettleBack(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="settle-back"):
    """The settlement with both signatures."""

    settlement: Sealed


class Cancel(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="cancel"):
    """The submitter stops the deal; what is receipted is checked and paid."""

    agreement: Digest


class Records(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="records"):
    """Any records, as in gossip: to a peer just met, or missing from its settlement log."""

    records: Annotated[tuple[Sealed, ...], msgspec.Meta(max_length=512)]


class SyncDigest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="sync-digest"):
    """The settlement log in two numbers: how many records, and the XOR of their ids."""

    count: Uint
    digest: Digest


class SyncIds(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="sync-ids"):
    """The ids in the sender's settlement log: the receiver sends what is missing and asks for what it lacks."""

    ids: Annotated[tuple[Digest, ...], msgspec.Meta(max_length=16_384)]
    answer: bool


class BenchAsk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="bench-ask"):
    """Challenge me: what I think I do in a second, the memory I want to prove, and what I am (as the card will say)."""

    operations_per_second: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    memory_bytes: Uint
    figures: Figures


class BenchInvite(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="bench-invite"):
    """Get ready and ask me for a challenge."""


class BenchStart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="bench-start"):
    """A signed challenge; its clock runs."""

    challenge: Sealed


class BenchDone(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="bench-done"):
    """The chain is multiplied; its result is this blob. The first one stops the clock."""

    challenge: Digest
    evidence: Digest


class BenchTimed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="bench-timed"):
    """How long it took, on the challenger's clock."""

    challenge: Digest
    elapsed_ns: Uint


class BenchOffer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="bench-offer"):
    """The card with its peer's signature: the memory is filled and committed to."""

    card: Sealed


class BenchProbe(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="bench-probe"):
    """Open these blocks of the memory, now."""

    challenge: Digest
    indices: Annotated[tuple[Uint, ...], msgspec.Meta(min_length=1, max_length=params.BENCH_PROBES)]


class BenchProbed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="bench-probed"):
    """The opened blocks, in the order of the probe."""

    challenge: Digest
    openings: Annotated[tuple[Opening, ...], msgspec.Meta(min_length=1, max_length=params.BENCH_PROBES)]


class BenchWitness(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="bench-witness"):
    """The card with both signatures."""

    card: Sealed


class BenchDecline(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="bench-decline"):
    """No challenge, no answer, or no card, with a typed reason. An ask is declined with zeros."""

    challenge: Digest
    code: Text
    why: Text


Message: TypeAlias = (
    Propose
    | Accept
    | Decline
    | Opened
    | Paused
    | Progress
    | ScriptNews
    | ReceiptOffer
    | ReceiptBack
    | ProofOffer
    | RevealOffer
    | CheckRequest
    | CheckAccept
    | CheckDecline
    | SettleOffer
    | SettleBack
    | Cancel
    | Records
    | SyncDigest
    | SyncIds
    | BenchAsk
    | BenchInvite
    | BenchStart
    | BenchDone
    | BenchTimed
    | BenchOffer
    | BenchProbe
    | BenchProbed
    | BenchWitness
    | BenchDecline
)


def pack(message: Message) -> bytes:
    """The bytes of a message."""
    return encode(message)


def unpack(data: bytes) -> Message:
    """A message from hostile bytes. Raises MalformedRecord or LimitExceeded."""
    return decode(Message, data, bytes_max=params.MESSAGE_BYTES_MAX)  # type: ignore[arg-type]
