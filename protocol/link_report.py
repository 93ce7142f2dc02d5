"""What a peer measured of its links to others: delay and speed, signed, gossiped, soon forgotten.

It binds nobody to anything and moves no money; it says where a parallel job is best placed. Both ends of a link report,
and the slower word counts (market/link_table.py), so nobody gains by boasting.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from protocol import params
from protocol.codec import Digest, PeerKey, Uint
from protocol.errors import VerificationFailed

__all__ = ["LinkReport", "LinkTimed", "MeasuredLink", "check_report"]


class LinkTimed(msgspec.Struct, frozen=True):
    """The network told the node: a round trip to `peer` took so long."""

    peer: bytes
    round_trip_us: int


class MeasuredLink(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One link. delay_us: half a round trip, in microseconds. bytes_per_second: 0 where nothing large was moved yet."""

    peer: PeerKey
    delay_us: Annotated[int, msgspec.Meta(ge=0, le=params.LINK_DELAY_US_MAX)]
    bytes_per_second: Annotated[int, msgspec.Meta(ge=0, le=params.LINK_SPEED_MAX)]


class LinkReport(
    msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True, tag="ichiba/link-report/1"
):
    """The links of `peer`, in the order of their keys. The newest sequence number replaces."""

    network: Digest
    peer: PeerKey
    sequence: Uint
    links: Annotated[tuple[MeasuredLink, ...], msgspec.Meta(max_length=params.LINKS_REPORTED_MAX)]
    created_ns: Uint
    expires_ns: Uint


def check_report(report: LinkReport, *, now_ns: int) -> None:
    """Raise VerificationFailed for a link to itself, one link twice, a report from the future, or one for too long."""
    keys = [link.peer for link in report.links]
    if report.peer in keys or keys != sorted(set(keys)):
        raise VerificationFailed("a report of links to itself, twice to one peer, or out of order")
    if report.created_ns > now_ns + params.CLOCK_SKEW_NS_MAX:
        raise VerificationFailed("a report of links from the future")
    if not report.created_ns < report.expires_ns <= report.created_ns + params.LINK_REPORT_LIFETIME_NS:
        raise VerificationFailed(f"a report of links lives longer than {params.LINK_REPORT_LIFETIME_NS // 10**9} s")
