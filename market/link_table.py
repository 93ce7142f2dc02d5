"""What is known of the links between peers, from their signed reports: bounded, and the slower word counts.

Both ends of a link measure it. A peer that boasts is held to what the other end says; one that slanders a link only
keeps itself out of work. Where one end alone spoke, or nobody, that is said (`known`). Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from protocol import params
from protocol.link_report import LinkReport, MeasuredLink, check_report

__all__ = ["LinkMatrices", "LinkTable", "LinkWord"]


@dataclass(frozen=True)
class LinkWord:
    """What counts of one link. said: how many of its ends spoke, 0 to 2. speed_known: whether one told its speed."""

    delay_us: int
    bytes_per_second: int
    said: int
    speed_known: bool


@dataclass(frozen=True)
class LinkMatrices:
    """delay_ms and gbps float64 (N, N), 0 and the fastest on the diagonal; known int8 (N, N): ends that spoke."""

    delay_ms: npt.NDArray[np.float64]
    gbps: npt.NDArray[np.float64]
    known: npt.NDArray[np.int8]


@dataclass
class LinkTable:
    """The newest report of each peer, at most params.LINK_REPORTS_MAX: the one that expires first gives way."""

    _reports: dict[bytes, LinkReport] = field(default_factory=dict)
    _links: dict[bytes, dict[bytes, MeasuredLink]] = field(default_factory=dict)
    _envelopes: dict[bytes, bytes] = field(default_factory=dict)  # of the reports, as signed: an audit shows them

    def take(self, report: LinkReport, *, now_ns: int, envelope: bytes = b"") -> bool:
        """Enter a report, verified by its signature already; whether it is news. Raises VerificationFailed."""
        check_report(report, now_ns=now_ns)
        old = self._reports.get(report.peer)
        if report.expires_ns <= now_ns or (old is not None and old.sequence >= report.sequence):
            return False
        if old is None and len(self._reports) >= params.LINK_REPORTS_MAX:
            self._forget(min(self._reports, key=lambda peer: (self._reports[peer].expires_ns, peer)))
        self._reports[report.peer], self._envelopes[report.peer] = report, envelope
        self._links[report.peer] = {link.peer: link for link in report.links}
        return True

    def expire(self, *, now_ns: int) -> None:
        """Forget what is out of date."""
        for peer in [peer for peer, report in self._reports.items() if report.expires_ns <= now_ns]:
            self._forget(peer)

    def link(self, one: bytes, other: bytes) -> LinkWord:
        """What counts of the link between two peers: of both words the longer delay and the lower speed; a guess where
        there is none."""
        words = [self._links.get(a, {}).get(b) for a, b in ((one, other), (other, one))]
        said = [word for word in words if word is not None]
        speeds = [word.bytes_per_second for word in said if word.bytes_per_second]
        return LinkWord(
            delay_us=max((word.delay_us for word in said), default=params.LINK_DELAY_GUESS_US),
            bytes_per_second=min(speeds, default=params.LINK_BYTES_PER_SECOND),
            said=len(said),
            speed_known=bool(speeds),
        )

    def links(self) -> list[tuple[bytes, bytes, LinkWord]]:
        """Every link that anybody spoke of, the smaller key first, in order."""
        pairs = {(min(a, b), max(a, b)) for a, links in self._links.items() for b in links}
        return [(one, other, self.link(one, other)) for one, other in sorted(pairs)]

    def matrices(self, peers: Sequence[bytes]) -> LinkMatrices:
        """The links between `peers`, as market.placement.Links takes them."""
        count = len(peers)
        delay = np.full((count, count), params.LINK_DELAY_GUESS_US / 1000)
        gbps = np.full((count, count), params.LINK_BYTES_PER_SECOND * 8 / 1e9)
        known = np.zeros((count, count), np.int8)
        rows: dict[bytes, list[int]] = {}
        for row, peer in enumerate(peers):
            rows.setdefault(peer, []).append(row)
        # Of many peers few links are known: what is said is entered, not every pair asked.
        for one, other in {(min(a, b), max(a, b)) for a in rows for b in self._links.get(a, {}) if b in rows}:
            word = self.link(one, other)
            for at in (np.ix_(rows[one], rows[other]), np.ix_(rows[other], rows[one])):
                delay[at] = word.delay_us / 1000
                gbps[at] = word.bytes_per_second * 8 / 1e9
                known[at] = word.said
        np.fill_diagonal(delay, 0)
        np.fill_diagonal(gbps, params.LINK_SPEED_MAX * 8 / 1e9)
        np.fill_diagonal(known, 2)
        return LinkMatrices(delay, gbps, known)

    def envelopes(self, peers: Sequence[bytes]) -> list[bytes]:
        """The signed reports of `peers`, in order of their keys: what `matrices` of these peers comes from."""
        return [self._envelopes[peer] for peer in sorted(set(peers)) if self._envelopes.get(peer)]

    def as_now(self) -> LinkTable:
        """What is known now, to be read elsewhere while this one goes on. Reports never change: none is copied."""
        return LinkTable(dict(self._reports), dict(self._links), dict(self._envelopes))

    def __len__(self) -> int:
        return len(self._reports)

    def _forget(self, peer: bytes) -> None:
        del self._reports[peer], self._links[peer], self._envelopes[peer]
