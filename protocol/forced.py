"""Randomness that notaries give, and the errors it orders. DESIGN §5.5, §8.

A beacon is the hash of the signatures of a quorum of notaries, which the asker names before it sees the first: so it
cannot pick the shares it likes. A solver's secret, committed to in its bid, and the beacon of its agreement decide
together whether it has to hand in one wrong state, and which: nobody but the solver can know before it says so, and
nobody, the solver included, can choose. It assumes of a notary that it signs as RFC 8032 says, one signature for one
message; one in league with a solver could try several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from protocol import params
from protocol.codec import blake, decode
from protocol.errors import VerificationFailed
from protocol.network import Network
from protocol.profile import EXACT
from protocol.records import Agreement, Beacon, Envelope, Forced, decode_body, open_record, record_id
from protocol.sampling import commitment

__all__ = [
    "NO_ERRORS",
    "beacon_subject",
    "check_forced",
    "draws_from",
    "forced_of",
    "forced_segment",
    "givers",
    "may_order",
    "open_beacon",
    "orders_errors",
]

NO_ERRORS: Final = bytes(32)
"""The commitment of a bid on work in which no error is ordered: nobody knows a secret that opens it."""


def givers(network: Network, agreement: Agreement) -> tuple[bytes, ...]:
    """The notaries that give randomness for an agreement, sorted: all but its parties. Empty where they are too few
    for a quorum: then there is no beacon, the seeds alone decide, and no error is ordered."""
    return network.impartial(agreement.submitter, agreement.solver)


def draws_from(network: Network, agreement: Agreement) -> bool:
    """Whether the draw of this deal's checks mixes a beacon. Of a script nothing is drawn."""
    return bool(givers(network, agreement)) and agreement.check_permille > 0


def may_order(agreement: Agreement) -> bool:
    """Whether an agreement lets an error be ordered. Never in tolerant work: that it lies above what honest machines
    may differ by, its solver alone could measure, and a checker near it would be to blame for a right verdict.
    Never in a unit of a parallel job, by NO_ERRORS: its neighbours would go on from what it sent, and all be undone."""
    return agreement.tolerance == EXACT and agreement.forced_commitment != NO_ERRORS


def orders_errors(network: Network, agreement: Agreement) -> bool:
    """Whether an error may be ordered in this deal: `may_order`, where notaries give randomness for its checks."""
    return draws_from(network, agreement) and network.rules.forced_ppm > 0 and may_order(agreement)


def beacon_subject(target: bytes, notaries: Sequence[bytes]) -> bytes:
    """What `notaries` (sorted keys) sign for the beacon of `target`, an agreement's id or a draw: 32 bytes."""
    return blake("ichiba/beacon-subject", target, *notaries)


def open_beacon(shares: Sequence[bytes], *, target: bytes, agreement: Agreement, network: Network) -> bytes:
    """The beacon of `target`, 32 bytes, from envelopes of its notaries' shares; empty where there can be none.

    Raises VerificationFailed unless they are a quorum of distinct notaries, no parties, in the order of their keys, and
    each signed for this very quorum. Source: DESIGN §5.5.
    """
    able = givers(network, agreement)
    if not able:
        if shares:
            raise VerificationFailed("shares of a beacon where no quorum of notaries can give one")
        return b""
    found: list[tuple[bytes, bytes, bytes]] = []
    for envelope in shares[: params.NOTARIES_MAX]:
        share, _, _ = open_record(envelope, network=network.id)
        if not isinstance(share, Beacon) or share.notary not in able:
            raise VerificationFailed("a share of a beacon by a peer that is no notary of this deal")
        signed = decode(Envelope, envelope, bytes_max=params.GOSSIP_RECORD_BYTES_MAX)
        found.append((share.notary, share.subject, signed.signatures[0][1]))
    notaries = [notary for notary, _, _ in found]
    if len(notaries) != network.notary_quorum or notaries != sorted(set(notaries)):
        raise VerificationFailed(
            f"{len(shares)} shares of a beacon", why=f"{network.notary_quorum} distinct notaries, by key, make one"
        )
    subject = beacon_subject(target, notaries)
    if any(given != subject for _, given, _ in found):
        raise VerificationFailed("a share of another beacon, or for other notaries than those that gave it")
    return blake("ichiba/beacon", subject, *(signature for _, _, signature in found))


def forced_segment(secret: bytes, beacon: bytes, *, first: int, last: int, ppm: int) -> int | None:
    """The segment of [first, last) whose end has to be wrong, or None: with probability ppm in a million one.

    secret: 32 bytes, committed to in the bid. beacon: that of the agreement; empty orders nothing.
    """
    if not beacon or last <= first:
        return None
    drawn = blake("ichiba/forced", secret, beacon)
    if int.from_bytes(drawn[:16], "little") % 1_000_000 >= ppm:
        return None
    return first + int.from_bytes(drawn[16:], "little") % (last - first)


def check_forced(
    record: Forced, agreement: Agreement, agreement_id: bytes, *, shares: Sequence[bytes], network: Network
) -> None:
    """Raise VerificationFailed unless this error was ordered: by this solver's committed secret, the beacon of its
    agreement, and the network's rate, for this segment. shares: as `open_beacon`."""
    if record.agreement != agreement_id or record.solver != agreement.solver:
        raise VerificationFailed("an ordered error of another deal")
    if commitment(record.secret, agreement_salt=agreement.solver) != agreement.forced_commitment:
        raise VerificationFailed("the secret is not the one its solver committed to", why="the error was not ordered")
    if not agreement.check_permille:
        raise VerificationFailed("an ordered error in a script", why="nothing of it is re-executed")
    if not may_order(agreement):
        raise VerificationFailed("an ordered error in tolerant work, or a unit's", why="none is ordered there")
    ordered = forced_segment(
        record.secret,
        open_beacon(shares, target=agreement_id, agreement=agreement, network=network),
        first=agreement.first_segment,
        last=agreement.last_segment,
        ppm=network.rules.forced_ppm,
    )
    if ordered != record.segment:
        raise VerificationFailed(
            f"the error in segment {record.segment} was not ordered",
            why="none was" if ordered is None else f"segment {ordered} was",
        )
    if record.false_root == record.true_root:
        raise VerificationFailed("an ordered error that is none: both ends are the same")


def forced_of(envelope: bytes, network: bytes) -> tuple[Forced, bytes]:
    """The Forced inside an envelope that was checked when it came in, and its id."""
    body = decode(Envelope, envelope, bytes_max=params.GOSSIP_RECORD_BYTES_MAX).body
    record = decode_body(body, network=network)
    assert isinstance(record, Forced)
    return record, record_id(body)
