"""Who misbehaved and how fast everybody sends: penalties, bans and rates, all bounded and all counted.

Sans-IO: `now` is seconds of any monotonic clock. Refuses to know connections; the host acts on what it says.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from protocol import params

__all__ = ["Rates", "Standing"]


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
    """Token buckets by key: `per_second` each, with a burst of two seconds' worth; at most `keys_max` are kept."""

    def __init__(self, per_second: float, *, keys_max: int = params.STANDINGS_MAX) -> None:
        self.per_second, self.keys_max = per_second, keys_max
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def take(self, key: bytes, *, now: float, cost: float = 1.0) -> bool:
        """Spend `cost` of `key`'s allowance; False, and nothing spent, if there is not enough."""
        burst = 2 * self.per_second
        left, at = self._buckets.get(key, (burst, now))
        left = min(burst, left + (now - at) * self.per_second)
        allowed = left >= cost
        self._buckets[key] = (left - cost if allowed else left, now)
        self._buckets.move_to_end(key)
        if len(self._buckets) > self.keys_max:
            self._buckets.popitem(last=False)
        return allowed
