"""What this process dropped, by reason and by whom: nothing that others sent is lost without being counted here.

Promises: a reason's total is exact; of authors the DROP_AUTHORS_MAX that were dropped last are told apart and the rest
is counted as one, so a stranger with many keys cannot fill memory; `news` says what is new in as many lines as there
are reasons.
Refuses to know clocks: times are ns since the epoch, as the caller reads them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any, Final

from protocol import params
from protocol.keys import peer_name

__all__ = ["AT_TRANSPORT", "OURS", "REASONS", "Drops", "merged"]

AT_TRANSPORT: Final = {  # before anything is passed on
    "author-rate": f"an author sent more than {params.GOSSIP_RECORDS_PER_SECOND_MAX} records a second",
    "neighbour-rate": "a neighbour passed on more messages, records or bytes a second than it may",
    "all-bytes": "all neighbours together sent more bytes a second than are taken",
    "banned": "its author is banned for what it sent before",
    "no-topic": "it is of a topic nobody subscribed to here",
    "validator-fault": "the cheap check failed by our own fault",
    "busy": "the node had no room for it; it was passed on",
    "slow-neighbour": "a neighbour reads too slowly: the queue to it is full",
    "no-neighbour": "we published while nobody was connected",
}
REASONS: Final = AT_TRANSPORT | {
    # at the node
    "connection-rate": f"a peer sent more than {params.DIRECT_RECORDS_PER_SECOND_MAX} records a second directly",
    "expired": "it came after its own time",
    "no-offer": "a bid on an offer that does not stand here",
    "superseded": "a newer record of its author stands, or its offer is taken",
    "late": "a late or doubled message about a step that has passed",
    "early": "a move of stake dated too far ahead; it is taken when its time has come",
    "unfunded": "a move of stake without funds, while enough of them wait",
    "outbox-full": "we made more than we may publish for too long",
    # on the way out
    "outgoing-full": "too many direct messages waited for a peer that reads slowly",
    "unsent": "a direct message to a peer that could not be reached",
}
OURS: Final = ("busy", "slow-neighbour", "validator-fault", "outbox-full", "outgoing-full", "all-bytes")
"""What a person can do something about; the rest is what others did."""
_REFUSED: Final = "refused-"  # and the code of the error


@dataclass
class Drops:
    """See the module docstring. An author is a 32-byte key; b"" counts as nobody in particular."""

    totals: Counter[str] = field(default_factory=Counter)
    _rows: OrderedDict[tuple[str, bytes], tuple[int, int]] = field(default_factory=OrderedDict)  # -> count, last ns
    _told: Counter[str] = field(default_factory=Counter)

    def note(self, reason: str, author: bytes, *, now_ns: int, count: int = 1) -> None:
        """`count` more were dropped. A reason is one of REASONS, or `refused-` and an error's code."""
        assert reason in REASONS or reason.startswith(_REFUSED), f"{reason!r} is no reason that people can look up"
        self.totals[reason] += count
        known, _ = self._rows.pop((reason, author), (0, 0))
        self._rows[reason, author] = known + count, now_ns
        while len(self._rows) > params.DROP_AUTHORS_MAX:
            oldest = next((place for place in self._rows if place[1]), None)
            if oldest is None:
                break
            gone, last_ns = self._rows.pop(oldest)
            others, later_ns = self._rows.pop((oldest[0], b""), (0, 0))
            self._rows[oldest[0], b""] = others + gone, max(last_ns, later_ns)
            self._rows.move_to_end((oldest[0], b""), last=False)

    def rows(self) -> list[dict[str, Any]]:
        """Reason, author (its name; empty for all that are not told apart), count, time of the last; most first."""
        found = [
            {
                "reason": reason,
                "author": peer_name(author) if author else "",
                "count": count,
                "last_ns": last_ns,
                "words": REASONS.get(reason, "its bytes are wrong, or a table for it is full"),
            }
            for (reason, author), (count, last_ns) in self._rows.items()
        ]
        return sorted(found, key=lambda row: (-int(str(row["count"])), row["reason"], row["author"]))

    def news(self) -> list[str]:
        """One line for each reason that grew since the last call: as many lines as there are reasons, however much was
        dropped."""
        grown = {reason: total - self._told[reason] for reason, total in sorted(self.totals.items())}
        self._told = Counter(self.totals)
        return [
            f"dropped {more} ({reason}, {self.totals[reason]} in all): {REASONS.get(reason, 'refused')}"
            for reason, more in grown.items()
            if more
        ]


def merged(*many: Drops) -> dict[str, Any]:
    """The drops of several places of one process as one answer: `total`, `reasons` and `rows`."""
    reasons = sum((one.totals for one in many), Counter[str]())
    rows = sorted((row for one in many for row in one.rows()), key=lambda row: -row["count"])
    return {"total": reasons.total(), "reasons": dict(sorted(reasons.items())), "rows": rows}
