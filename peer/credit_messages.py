"""Messages about mutual credit, between two peers that have an account with each other. As peer/messages.py: bounded,
repeated by their senders, and worth nothing but for the signed records inside."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from protocol import params
from protocol.codec import Digest, PeerKey, Uint
from protocol.credit_records import Settled

__all__ = ["ClearingOffer", "CreditMessage", "Debt", "DebtsAsk", "DebtsTold", "NetAsk", "NetBack", "NetOffer"]

Sealed = Annotated[bytes, msgspec.Meta(max_length=4096)]
Covers = Annotated[tuple[Settled, ...], msgspec.Meta(max_length=params.NETTING_COVERS_MAX)]
Debt = tuple[PeerKey, PeerKey, Annotated[int, msgspec.Meta(ge=1, le=params.AMOUNT_MICRO_MAX)]]


class NetAsk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="net-ask"):
    """What the sender has with the receiver since their netting number `sequence`, whose id is `previous`."""

    sequence: Uint
    previous: Digest
    settled: Covers


class NetOffer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="net-offer"):
    """A Netting that the first of the pair signed, and what it covers."""

    netting: Sealed
    settled: Covers


class NetBack(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="net-back"):
    """A Netting with both signatures."""

    netting: Sealed


class DebtsAsk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="debts-ask"):
    """Who owes you, and whom do you owe? Answered to who has an account with the receiver."""


class DebtsTold(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="debts-told"):
    """The sender's debts and claims: (debtor, creditor, micro-credits). A hint: signatures decide what is cleared."""

    debts: Annotated[tuple[Debt, ...], msgspec.Meta(max_length=params.CREDIT_DEBTS_TOLD_MAX)]


class ClearingOffer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="clearing"):
    """Envelopes of one Clearing, each signed by one of its parties: those that the sender has."""

    consents: Annotated[
        tuple[Sealed, ...], msgspec.Meta(min_length=1, max_length=params.CREDIT_CYCLE_MAX)
    ]


CreditMessage: TypeAlias = NetAsk | NetOffer | NetBack | DebtsAsk | DebtsTold | ClearingOffer
