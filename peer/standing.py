"""Who misbehaved and how fast everybody sends: penalties, bans and rates, all bounded and all counted.

Sans-IO: `now` is seconds of any monotonic clock. Refuses to know connections; the host acts on what it says.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from protocol import params

__all__ = ["GossipRates", "Rates", "Standing"]


@dataclass
class _Record:
    score: float = 0.0
    at: float = 0.0
    banned_until: float = 0.0


class Standing:
    """Penalties per peer: one is forgiven a minute; params.PENALTIES_MAX at once is a ban of params.BAN_SECONDS."""

    def __init__(self) -> None:
        self._records: OrderedDict[bytes, _Record] = OrderedDict()
        self.reasons: Counter[str] = Counter()  # first words only, so that a stranger cannot fill it

    def penalise(self, peer: bytes, kind: str, *, now: float) -> bool:
        """Add one penalty of `kind` (one of our own few words). True if the peer is banned from now on."""
        record = self._records.get(peer) or _Record(at=now)
        self._records[peer] = record
        self._records.move_to_end(peer)
        if len(self._records) > params.STANDINGS_MAX:
            self._records.popitem(last=False)
        self.reasons[kind] += 1
        record.score = max(0.0, record.score - (now - record.at) / 60) + 1
        record.at = now
        # Forgiveness is continuous, so the last of PENALTIES_MAX finds a little less than the whole number.
        if record.score > params.PENALTIES_MAX - 1 and record.banned_until <= now:
            record.banned_until = now + params.BAN_SECONDS
            record.score = 0.0
            return True
        return False

    def banned(self, peer: bytes, *, now: float) -> bool:
        """Whether `peer` is to be refused."""
        record = self._records.get(peer)
        return record is not None and record.banned_until > now

    def bans(self, *, now: float) -> int:
        """How many peers are banned."""
        return sum(record.banned_until > now for record in self._records.values())


class Rates:
    """Token buckets by key: `per_second` each, with a burst of `burst` (two seconds' worth, if it is not said); at most
    `keys_max` are kept, and a key that comes back after it was forgotten has its burst again."""

    def __init__(self, per_second: float, *, burst: float = 0, keys_max: int = params.STANDINGS_MAX) -> None:
        self.per_second, self.burst, self.keys_max = per_second, burst or 2 * per_second, keys_max
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def take(self, key: bytes, *, now: float, cost: float = 1.0) -> bool:
        """Spend `cost` of `key`'s allowance; False, and nothing spent, if there is not enough."""
        left, at = self._buckets.get(key, (self.burst, now))
        left = min(self.burst, left + max(0.0, now - at) * self.per_second)
        allowed = left >= cost
        self._buckets[key] = (left - cost if allowed else left, now)
        self._buckets.move_to_end(key)
        if len(self._buckets) > self.keys_max:
            self._buckets.popitem(last=False)
        return allowed


class GossipRates:
    """How much gossip is taken: of an author, of the neighbour that passes it on, and in all. Costs are spent in the
    order asked, so what a neighbour may not pass on costs its author nothing."""

    def __init__(self) -> None:
        self._authors = Rates(params.GOSSIP_RECORDS_PER_SECOND_MAX, burst=params.GOSSIP_BURST_RECORDS)
        self._messages = Rates(params.GOSSIP_PER_FORWARDER_MAX)
        self._records = Rates(params.GOSSIP_RECORDS_PER_FORWARDER_MAX)
        self._bytes = Rates(params.GOSSIP_BYTES_PER_SECOND_MAX / 8)  # one neighbour cannot use it all
        self._all_bytes = Rates(params.GOSSIP_BYTES_PER_SECOND_MAX)

    def refuse_forwarder(self, forwarder: bytes, *, records: int, size: int, now: float) -> str:
        """Why a message of `size` bytes is not taken of this neighbour, a reason of peer/drops.py; "" if it is."""
        allowed = (
            self._messages.take(forwarder, now=now)
            and self._records.take(forwarder, now=now, cost=records)
            and self._bytes.take(forwarder, now=now, cost=size)
        )
        if not allowed:
            return "neighbour-rate"
        return "" if self._all_bytes.take(b"", now=now, cost=size) else "all-bytes"

    def refuse_author(self, author: bytes, *, records: int, now: float) -> str:
        """Why so many records are not taken of their author; "" if they are."""
        return "" if self._authors.take(author, now=now, cost=records) else "author-rate"
