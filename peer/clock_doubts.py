"""Whose clock seems wrong, by the dates of their records. Sans-IO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from protocol import params
from protocol.records import Ask, Bid, Offer, parties

__all__ = ["Clocks"]

_SECOND: Final = 10**9


@dataclass
class Clocks:
    """How far the clocks of others seem to be from ours: seconds, by author, of records dated too far off to be taken.
    A right record of the same author takes its entry away."""

    off_s: dict[bytes, int] = field(default_factory=dict)

    def note(self, record: Offer | Ask | Bid, now_ns: int) -> None:
        """A record came in, whether or not it is taken."""
        (author,) = parties(record)
        ahead, past = record.created_ns - now_ns, now_ns - record.expires_ns
        if ahead > params.CLOCK_SKEW_NS_MAX:
            self.off_s[author] = ahead // _SECOND
        elif past > params.CLOCK_SKEW_NS_MAX:
            self.off_s[author] = -past // _SECOND
        else:
            self.off_s.pop(author, None)
        while len(self.off_s) > params.CLOCKS_NOTED_MAX:
            del self.off_s[next(iter(self.off_s))]
