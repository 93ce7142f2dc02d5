"""The evidence of one peer's reputation in one file, checked by who has nothing but the network file.

Promises: `verify` believes nothing the file says. The records are folded by the same settler as a daemon's, so every
signature, voucher, verdict and ruling is checked by the same rules, and the score is made again from what is left. What
a file cannot show it says (CANNOT_KNOW). Refuses to know the network and the store.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec

from market import entries as money
from market.ledger import Ledger
from market.reputation import ROLES, Weighed
from peer.desk import Desk, Means
from peer.reputations import WINDOW_OVER, figures
from peer.settler import Settler
from protocol import params
from protocol.codec import blake
from protocol.errors import VerificationFailed
from protocol.keys import SigningKey, peer_key
from protocol.network import Network, load_trusted
from protocol.records import Agreement, open_record

__all__ = ["CANNOT_KNOW", "SCHEMA", "ReputationReport", "verify"]

SCHEMA: Final = "ichiba.reputation-bundle/1"
CANNOT_KNOW: Final = (
    "whether evidence was left out: a peer shows what speaks for it, so compare with a log of your own",
    "whether the money behind an opening was there, and whether a checker's stake was still held: the ledger says that",
    "whether another closing of the same agreement was first: each log keeps the one that it saw first",
)
_LATER_NS: Final = 10**18  # 31 years: past any window that opened at 0, where the clock of these records stands

_Hex = Annotated[str, msgspec.Meta(max_length=2 * params.GOSSIP_RECORD_BYTES_MAX, pattern="^([0-9a-f]{2})*$")]
_Records = Annotated[list[_Hex], msgspec.Meta(min_length=2, max_length=params.BUNDLE_DEAL_RECORDS_MAX)]


class _Bundle(msgspec.Struct, forbid_unknown_fields=True):
    """The file as decoded JSON; envelopes in hex, those of one agreement together, in the order they had effect."""

    schema: str
    network: Annotated[str, msgspec.Meta(max_length=params.NETWORK_FILE_BYTES_MAX)]
    peer: Annotated[str, msgspec.Meta(max_length=128)]
    day: Annotated[int, msgspec.Meta(ge=0, le=10**7)]
    claimed: Annotated[dict[str, dict[str, int]], msgspec.Meta(max_length=len(ROLES))]
    deals: Annotated[list[_Records], msgspec.Meta(max_length=params.SETTLEMENT_LOG_MAX // 2)]


@dataclass(frozen=True)
class ReputationReport:
    """What a file proves. roles: by role, on the UTC day `day`, for somebody who has seen nothing himself."""

    peer: str
    network: str
    day: int
    deals: int
    records: int
    roles: dict[str, Weighed]


def verify(bundle: Any, network_id: bytes, *, day: int | None = None) -> ReputationReport:
    """Check a decoded file against the network it must belong to (id, 32 bytes), as of `day` or of the day it names.

    Raises VerificationFailed, or another RemoteProtocolError, for anything that does not follow.
    """
    try:
        given = msgspec.convert(bundle, _Bundle)
    except (msgspec.ValidationError, RecursionError) as error:
        raise VerificationFailed(f"no bundle of a reputation: {error}"[:300]) from None
    network = _network(given, network_id)
    peer = peer_key(given.peer)
    deals = [[bytes.fromhex(text) for text in records] for records in given.deals]
    settler = _folded(deals, network)
    claimed = {role: settler.reputations.of(role, peer, today=given.day) for role in ROLES}
    for role, found in claimed.items():
        if given.claimed.get(role) != figures(found.reputation):
            raise VerificationFailed(
                f"the file claims {given.claimed.get(role)} as {role}",
                why=f"its evidence comes to {figures(found.reputation)} on day {given.day}",
            )
    today = given.day if day is None else day
    roles = {str(role): settler.reputations.of(role, peer, today=today) for role in ROLES}
    return ReputationReport(given.peer, network.name, today, len(deals), len(settler.log), roles)


def _network(given: _Bundle, network_id: bytes) -> Network:
    if given.schema != SCHEMA:
        raise VerificationFailed(f"a file of schema {given.schema[:40]!r}, this program reads {SCHEMA}")
    return load_trusted(given.network, network_id, what="a reputation")


def _folded(deals: list[list[bytes]], network: Network) -> Settler:
    """The settlement log of these deals alone. Each opening finds the money it reserves: whether it was there is what
    the whole ledger says, and no file can."""
    ledger = Ledger()
    for number, deposit in enumerate(network.deposits):
        key = blake("ichiba/reputation/deposit", number.to_bytes(8, "big"))
        ledger.post(money.deposit(key, peer_key(deposit.peer), deposit.free_micro, deposit.stake_micro))
    desk = Desk(SigningKey.from_seed(bytes(32)), network, random.Random(0), ledger, Means())
    settler = Settler(desk)
    for number, records in enumerate(deals):
        agreement, agreement_id, _ = open_record(records[0], network=network.id)
        if not isinstance(agreement, Agreement) or agreement_id in settler.channels:
            raise VerificationFailed(f"deal {number} of the file begins with no agreement, or with one it had before")
        for name, owner, free_micro, stake_micro in (
            ("channel", agreement.submitter, agreement.channel_micro, 0),
            ("lock", agreement.solver, 0, agreement.lock_micro),
        ):
            key = blake(f"ichiba/reputation/{name}", agreement_id)
            ledger.post(money.deposit(key, owner, free_micro, stake_micro))
        for envelope in records:
            _take(settler, agreement_id, envelope, number)
        if not settler.channels[agreement_id].closed:
            raise VerificationFailed(f"deal {number} of the file has not ended by what is in it")
    return settler


def _take(settler: Settler, agreement_id: bytes, envelope: bytes, number: int) -> None:
    desk = settler.desk
    if envelope == WINDOW_OVER:
        desk.now_ns = _LATER_NS
        settler.lapse(agreement_id)
        desk.now_ns = 0
        return
    record, _, _ = open_record(envelope, network=desk.network.id)
    if getattr(record, "agreement", agreement_id) != agreement_id:
        raise VerificationFailed(f"deal {number} of the file holds a record of another agreement")
    if not settler.accept(envelope):
        raise VerificationFailed(f"deal {number} of the file holds a record twice, or before what it rests on")
    desk.effects.clear()
