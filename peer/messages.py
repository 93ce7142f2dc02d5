"""Direct messages between two peers: small, bounded, repeated by their senders until the state moves on.

Every record inside travels as its Envelope; a message itself proves nothing and is never stored.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from peer.certificate_messages import CertificateMessage, Sealed, Shares, Text
from peer.credit_messages import CreditMessage
from peer.run_messages import Handovers, RunMessage
from protocol import params
from protocol.bench_card import Figures, Opening
from protocol.codec import Digest, PeerKey, Uint, decode, encode
from protocol.lately import Lately

__all__ = [
    "Accept", "BaseAsk", "BaseGiven", "BeaconAsk", "BeaconGiven", "BeaconMessage", "BenchAsk", "BenchDecline",
    "BenchDone", "BenchInvite", "BenchOffer", "BenchProbe", "BenchProbed", "BenchStart", "BenchTimed", "BenchWitness",
    "Cancel", "CaseAsk", "CaseGiven", "CertificateMessage", "CheckAccept", "CheckDecline", "CheckRequest",
    "CorrectionAsk", "CorrectionGiven", "CreditMessage", "Decline", "DisputeAsk", "DisputeDecline", "DisputeMessage",
    "DisputeOpen", "ForcedTaken", "ForcedTell", "GameAt", "HousePay", "JuryAsk", "Message", "MoveOffer", "Opened",
    "OpeningOffer", "Paused", "Progress", "ProofOffer", "Propose", "ReceiptBack", "ReceiptOffer", "Records",
    "RevealOffer", "RunMessage", "ScriptNews", "SettleBack", "SettleOffer", "SyncDigest", "SyncIds", "pack", "unpack",
]  # fmt: skip

Profiles = Annotated[tuple[Sealed, ...], msgspec.Meta(max_length=params.PROFILES_KEPT_MAX)]
Box = Annotated[bytes, msgspec.Meta(max_length=params.GOSSIP_RECORD_BYTES_MAX + 1024)]
Quorum = Annotated[tuple[PeerKey, ...], msgspec.Meta(min_length=1, max_length=params.NOTARIES_MAX)]


class Propose(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="propose"):
    """The submitter's signed agreement and the task it is about; of a tolerant one the profiles that judge it. Of a
    sealed job the task is empty: it comes with Opened."""

    agreement: Sealed
    task: Sealed
    base_blob: Annotated[bytes, msgspec.Meta(max_length=32)]
    profiles: Profiles = ()


class Accept(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="accept"):
    """The agreement with both signatures, from the solver."""

    agreement: Sealed


class Decline(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="decline"):
    """No deal, with a typed reason."""

    agreement: Digest
    code: Text
    why: Text


class Opened(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="opened"):
    """The submitter committed the co-signed agreement: the channel is funded. box: of a sealed job its Contents
    (protocol.sealing) in a sealed box for the solver."""

    agreement: Sealed
    box: Box = b""


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
    """A receipt the solver signed; of a profile also the sealed Profile that it is for."""

    receipt: Sealed
    profile: Sealed = b""
    handovers: Handovers = ()  # of a unit of a run: of each link into it


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
    beacons: Shares = ()  # of the draw
    forced: Annotated[bytes, msgspec.Meta(max_length=2048)] = b""  # an ordered error: check against the true end
    forced_beacons: Shares = ()
    profiles: Profiles = ()  # of a tolerant task
    doubt: Annotated[bytes, msgspec.Meta(max_length=4096)] = b""  # an unsure Verdict, on which a second one decides
    box: Annotated[bytes, msgspec.Meta(max_length=2048)] = b""  # of a sealed job: Keys, for the receiver alone


class JuryAsk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="jury"):
    """A notary asks a juror to execute the disputed segment of tolerant work, or of a unit of a parallel job."""

    challenge: Sealed
    case: CheckRequest


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


class BeaconGiven(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="beacon"):
    """A notary's share, together with just these notaries: those that it was asked for first."""

    share: Sealed
    notaries: Quorum


class BeaconAsk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="beacon-ask"):
    """Give your share of the beacon of an agreement, to its solver, or of a draw, to its submitter, together with just
    these notaries. For a draw: the proof and the reveals that it follows from. seen: what was given for any quorum."""

    agreement: Digest
    notaries: Quorum
    proof: Annotated[bytes, msgspec.Meta(max_length=2048)]
    reveals: Annotated[tuple[Sealed, ...], msgspec.Meta(max_length=2)]
    seen: Annotated[tuple[BeaconGiven, ...], msgspec.Meta(max_length=params.NOTARIES_MAX)] = ()


class ForcedTell(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="forced"):
    """To a notary, from the solver before it hands in the receipt, or from another notary: this error was ordered."""

    forced: Sealed
    beacons: Shares


class ForcedTaken(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="forced-taken"):
    """The notary keeps the ordered error of this agreement."""

    agreement: Digest


class CorrectionAsk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="correction-ask"):
    """The submitter, when its work is checked, asks a notary whether an error was ordered. verdicts: that it is."""

    agreement: Digest
    verdicts: Annotated[tuple[Sealed, ...], msgspec.Meta(max_length=8)]


class CorrectionGiven(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="correction"):
    """The ordered error of an agreement and what proves it, or nothing where this notary was told of none."""

    agreement: Digest
    forced: Annotated[bytes, msgspec.Meta(max_length=2048)]
    beacons: Shares


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


class CaseAsk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="case-ask"):
    """A whistleblower to a party of an agreement: give me the evidence of your deal, I want to check it again."""

    agreement: Digest


class CaseGiven(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="case-given"):
    """The evidence of a deal, as a checker gets it."""

    case: CheckRequest


class DisputeOpen(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="dispute-open"):
    """A challenge and all the evidence of the deal that it is about, for a notary or a player."""

    challenge: Sealed
    case: CheckRequest


class DisputeAsk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="dispute-ask"):
    """You speak of a dispute that I do not know: send its DisputeOpen."""

    dispute: Digest


class DisputeDecline(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="dispute-decline"):
    """The notary does not hear this challenge, with a typed reason."""

    dispute: Digest
    code: Text
    why: Text


class GameAt(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="game-at"):
    """Where the sender stands in round `number` of a dispute.

    solver, challenger: the id of the Move that it saw first, 32 zeros for a player that its clock found silent, 32
    bytes of 255 for a challenger to whom the solver does not give the base, empty for nothing yet. closed: a quorum of
    notaries saw the same. opening: all moves are here, the operands are not. answer: send what I lack.
    """

    dispute: Digest
    number: Annotated[int, msgspec.Meta(ge=0, le=params.DISPUTE_ROUNDS_MAX)]
    solver: Annotated[bytes, msgspec.Meta(max_length=32)]
    challenger: Annotated[bytes, msgspec.Meta(max_length=32)]
    closed: bool
    opening: bool
    answer: bool


class MoveOffer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="move"):
    """A player's signed move, from the player or passed on by a notary."""

    move: Sealed


class OpeningOffer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="opening"):
    """Part `part` of `parts` of the operands of a dispute's leaf. Unsigned: they prove themselves."""

    dispute: Digest
    part: Annotated[int, msgspec.Meta(ge=0, lt=params.OPENING_PARTS_MAX)]
    parts: Annotated[int, msgspec.Meta(ge=1, le=params.OPENING_PARTS_MAX)]
    data: Annotated[bytes, msgspec.Meta(max_length=params.OPENING_PART_BYTES)]


class BaseAsk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="base-ask"):
    """A player to the notaries: nobody gives me the state that the disputed segment starts from."""

    dispute: Digest


class BaseGiven(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="base-given"):
    """The notary has that state now: fetch it from here."""

    dispute: Digest


class HousePay(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="house-pay"):
    """The house pays for a passed challenge: an agreement and its settlement, signed by it; with notaries by both."""

    agreement: Sealed
    settlement: Sealed


DisputeMessage: TypeAlias = (
    JuryAsk
    | CaseAsk
    | CaseGiven
    | DisputeOpen
    | DisputeAsk
    | DisputeDecline
    | GameAt
    | MoveOffer
    | OpeningOffer
    | BaseAsk
    | BaseGiven
)
BeaconMessage: TypeAlias = BeaconAsk | BeaconGiven | ForcedTell | ForcedTaken | CorrectionAsk | CorrectionGiven
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
    | BeaconMessage
    | CertificateMessage
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
    | DisputeMessage
    | CreditMessage
    | HousePay
    | RunMessage
)


def pack(message: Message) -> bytes:
    """The bytes of a message."""
    return encode(message)


def unpack(data: bytes) -> Message:
    """A message from hostile bytes. Raises MalformedRecord or LimitExceeded. A small one is read once: its signatures
    are looked for ahead of the node."""
    message = _unpacked.get(data)
    if message is None:
        message = decode(Message, data, bytes_max=params.MESSAGE_BYTES_MAX)  # type: ignore[arg-type]
        if len(data) <= params.OPENED_BYTES_MAX:
            _unpacked.note(data, message)
    return message


_unpacked: Lately[bytes, Message] = Lately(params.OPENED_REMEMBERED_MAX)
