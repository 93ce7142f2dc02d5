"""The links of this peer and of others: measured here, reported signed, and what counts of all reports. Sans-IO.

The daemon times round trips (`LinkTimed`); how fast a link is follows from the downloads over it (peer/link_meter.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from market.link_table import LinkTable
from peer.desk import MARKET, Desk
from protocol import params
from protocol.keys import peer_name
from protocol.link_report import LinkReport, LinkTimed, MeasuredLink

__all__ = ["LinkReports"]


@dataclass
class LinkReports:
    """See the module docstring."""

    desk: Desk
    table: LinkTable = field(default_factory=LinkTable)
    _delays_us: dict[bytes, int] = field(default_factory=dict)  # of connected peers: the least of late
    _next_ns: int = 0
    _sequence: int = 0

    def timed(self, event: LinkTimed) -> None:
        """A round trip took so long. The shortest says what the way takes; a longer one waited in a queue, so it counts
        for an eighth."""
        delay_us = min(event.round_trip_us // 2, params.LINK_DELAY_US_MAX)
        old = self._delays_us.get(event.peer, delay_us)
        self._delays_us[event.peer] = delay_us if delay_us < old else (7 * old + delay_us) // 8

    def take(self, report: LinkReport, envelope: bytes) -> None:
        """A report of another, and as it was signed. Raises VerificationFailed."""
        self.table.take(report, now_ns=self.desk.wall_ns, envelope=envelope)

    def tick(self) -> None:
        """Report our own links now and then, and forget the old reports."""
        if self.desk.now_ns < self._next_ns:
            return
        self._next_ns = self.desk.now_ns + params.LINK_REPORT_NS
        self.table.expire(now_ns=self.desk.wall_ns)
        for peer in [peer for peer in self._delays_us if peer not in self.desk.peers]:
            del self._delays_us[peer]
        if not self._delays_us:
            return
        newest = sorted(self._delays_us, key=lambda peer: (-self.desk.link_speeds.get(peer, 0), peer))
        links = tuple(
            MeasuredLink(
                peer, self._delays_us[peer], min(self.desk.link_speeds.get(peer, 0), params.LINK_SPEED_MAX)
            )
            for peer in sorted(newest[: params.LINKS_REPORTED_MAX])
        )  # fmt: skip
        self._sequence = max(self._sequence + 1, self.desk.wall_ns)
        report = LinkReport(
            network=self.desk.network.id, peer=self.desk.me, sequence=self._sequence, links=links,
            created_ns=self.desk.wall_ns, expires_ns=self.desk.wall_ns + params.LINK_REPORT_LIFETIME_NS,
        )  # fmt: skip
        envelope = self.desk.seal(report)
        self.table.take(report, now_ns=self.desk.wall_ns, envelope=envelope)
        self.desk.publish(MARKET, envelope)

    def describe(self, _: dict[str, Any]) -> dict[str, Any]:
        """Every link that a peer reported."""
        links = [
            {
                "one": peer_name(one), "other": peer_name(other), "delay_us": word.delay_us,
                "bytes_per_second": word.bytes_per_second, "said": word.said, "speed_known": word.speed_known,
            }
            for one, other, word in self.table.links()[: params.ROWS_SHOWN_MAX]
        ]  # fmt: skip
        return {"me": peer_name(self.desk.me), "reports": len(self.table), "links": links}
