"""The standing asks of a book in columns, so that 100,000 of them are questioned in milliseconds.

It promises the answers that `refuse_ask` gives ask by ask, and what each author may hold is known without a scan. One
row is one ask; a row that leaves is filled by the last, so the rows have no order: what is handed out is put in order
first, and nothing depends on how the asks came. It knows no limits and no clock: they are the book's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from market.feasibility import DEVICES, Columns, refused_rows
from market.matching import Refusal
from protocol.records import Ask, Offer

__all__ = ["AskIndex", "Shelf", "Survey"]

_FIRST_ROWS: Final = 64
_NEVER: Final = 2**63 - 1

Rows = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Survey:
    """An offer held against every live ask. refused: code -> how many asks have it as their first refusal.

    able: so many asks can take it; cheapest: the cheapest of them, by price, peer and slot.
    """

    heard: int
    able: int
    cheapest: tuple[Ask, ...]
    refused: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Shelf:
    """The asks that have what somebody looks for. unit_prices, speeds: of each, in one order."""

    index: AskIndex
    rows: Rows

    def __len__(self) -> int:
        return self.rows.size

    @property
    def unit_prices(self) -> npt.NDArray[np.int64]:
        """Micro-credits per giga-operation."""
        return self.index.columns.unit_price[self.rows]

    @property
    def speeds(self) -> npt.NDArray[np.int64]:
        """Operations per second, as the asks say."""
        return self.index.columns.operations_per_second[self.rows]

    @property
    def memory_bytes(self) -> npt.NDArray[np.int64]:
        """What each allows a job."""
        return self.index.columns.memory_bytes[self.rows]

    def cheapest(self, count: int) -> list[Ask]:
        """The `count` cheapest asks, by price, peer and slot."""
        return self.index.cheapest(self.rows, count)


class AskIndex:
    """Asks by (peer, slot). Putting, replacing and dropping one costs the same whatever the number of others."""

    def __init__(self) -> None:
        self.columns = Columns.empty(_FIRST_ROWS)
        self._asks: list[Ask] = []
        self._slots: dict[bytes, dict[int, int]] = {}  # peer -> slot -> row
        self._soonest_ns = _NEVER  # no ask ends before this; the one it was of may have been replaced

    def __len__(self) -> int:
        return len(self._asks)

    def __iter__(self) -> Iterator[Ask]:
        return iter(self._asks)

    def get(self, peer: bytes, slot: int) -> Ask | None:
        """The ask that stands in a peer's slot."""
        row = self._slots.get(peer, {}).get(slot)
        return None if row is None else self._asks[row]

    def count_of(self, peer: bytes) -> int:
        """How many slots of this peer have an ask."""
        return len(self._slots.get(peer, ()))

    def put(self, ask: Ask) -> None:
        """Let the ask stand in its slot, in the place of the one before."""
        slots = self._slots.setdefault(ask.peer, {})
        row = slots.get(ask.slot)
        if row is None:
            row = slots[ask.slot] = len(self._asks)
            self._asks.append(ask)
            if row == self.columns.capacity:
                self.columns = self.columns.grown(2 * row)
        self._asks[row] = ask
        self.columns.write(row, ask)
        self._soonest_ns = min(self._soonest_ns, ask.expires_ns)

    def remove_peer(self, peer: bytes) -> None:
        """Drop all asks of a peer."""
        for slot in list(self._slots.get(peer, ())):
            self._drop(peer, slot)

    def expire(self, *, now_ns: int) -> int:
        """Drop what is past its time. Returns how many left."""
        if now_ns < self._soonest_ns:
            return 0
        ends = self.columns.expires_ns[: len(self)]
        gone = [self._asks[row] for row in np.flatnonzero(ends <= now_ns)]
        for ask in gone:
            self._drop(ask.peer, ask.slot)
        self._soonest_ns = int(self.columns.expires_ns[: len(self)].min(initial=_NEVER))
        return len(gone)

    def _drop(self, peer: bytes, slot: int) -> None:
        row = self._slots[peer].pop(slot)
        if not self._slots[peer]:
            del self._slots[peer]
        last = self._asks.pop()
        if row < len(self._asks):
            assert (last.peer, last.slot) != (peer, slot), "the last row was another's"
            self._asks[row] = last
            self._slots[last.peer][last.slot] = row
            self.columns.write(row, last)

    # --- questions -----------------------------------------------------------------------------------------
    def live(self, *, role: int, now_ns: int, peers: Collection[bytes] | None = None) -> list[Ask]:
        """The unexpired asks of peers in `role` (any bit of it), in order of their keys; of `peers` only, if given."""
        if peers is not None:
            of_peers = (self._asks[row] for peer in peers for row in self._slots.get(peer, {}).values())
            found = [ask for ask in of_peers if ask.roles & role and now_ns < ask.expires_ns]
            return sorted(found, key=lambda ask: (ask.peer, ask.slot))
        columns, size = self.columns, len(self)
        return self._in_order(
            np.flatnonzero((columns.expires_ns[:size] > now_ns) & ((columns.roles[:size] & role) != 0))
        )

    def shelf(
        self,
        *,
        role: int,
        now_ns: int,
        memory_bytes: int = 0,
        sandbox: int = 0,
        device: str = "any",
        device_memory_bytes: int = 0,
        without: Collection[bytes] = (),
    ) -> Shelf:
        """The unexpired asks in `role` that have all of this, but those of the peers `without`."""
        columns, size = self.columns, len(self)
        fit = columns.expires_ns[:size] > now_ns
        fit &= (columns.roles[:size] & role) != 0
        fit &= columns.memory_bytes[:size] >= memory_bytes
        fit &= columns.sandbox[:size] >= sandbox
        fit &= columns.device_memory_bytes[:size] >= device_memory_bytes
        if device != "any":
            fit &= columns.device[:size] == DEVICES.index(device)
        fit[self._rows_of(without)] = False
        return Shelf(self, np.flatnonzero(fit))

    def survey(
        self,
        offer: Offer,
        *,
        now_ns: int,
        known: Collection[bytes] = (),
        refuse: Callable[[Ask], Refusal | None] = lambda _: None,
        cheapest: int = 0,
    ) -> Survey:
        """Who can take `offer`, and why the others cannot.

        An ask is judged by its own words, as if its peer were connected and had any stake; those of `known` peers by
        `refuse`, which knows more of them.
        """
        size = len(self)
        left = self.columns.expires_ns[:size] > now_ns
        heard = int(np.count_nonzero(left))
        special = [row for row in self._rows_of(known) if left[row]]
        left[special] = False
        refused: Counter[str] = Counter()
        own = np.zeros(size, np.bool_)
        own[self._rows_of((offer.submitter,))] = True
        tests = [("self", own), *refused_rows(self.columns, size, offer, now_ns=now_ns)]
        before = int(np.count_nonzero(left))
        for code, rows in tests:
            left &= ~rows
            after = int(np.count_nonzero(left))
            if after != before:
                refused[code] += before - after
            before = after
        for row in special:
            refusal = refuse(self._asks[row])
            left[row] = refusal is None
            if refusal is not None:
                refused[refusal.code] += 1
        able = np.flatnonzero(left)
        return Survey(heard, able.size, tuple(self.cheapest(able, cheapest)), refused)

    def cheapest(self, rows: Rows, count: int) -> list[Ask]:
        """The `count` cheapest asks of these rows, by price, peer and slot."""
        if count <= 0:
            return []
        if rows.size > count:
            # Those below the price of the last place are among them for sure; of those at it the least keys fill the
            # places left. Keys that begin with the same eight bytes stay in: as a rule they are the slots of one peer.
            prices = self.columns.unit_price[rows]
            limit = np.partition(prices, count - 1)[count - 1]
            sure, tied = rows[prices < limit], rows[prices == limit]
            places, keys = count - sure.size, self.columns.key_head[tied]
            rows = np.concatenate((sure, tied[keys <= np.partition(keys, places - 1)[places - 1]]))
        found = [self._asks[row] for row in rows]
        return sorted(found, key=lambda ask: (ask.unit_price, ask.peer, ask.slot))[:count]

    def _rows_of(self, peers: Collection[bytes]) -> list[int]:
        return [row for peer in peers for row in self._slots.get(peer, {}).values()]

    def _in_order(self, rows: Rows) -> list[Ask]:
        """These asks in order of (peer, slot)."""
        heads = self.columns.key_head[rows]
        order = np.lexsort((self.columns.slot[rows], heads))
        found = [self._asks[row] for row in rows[order]]
        alike = np.flatnonzero(heads[order][1:] == heads[order][:-1])
        # Two keys with one head do not come by chance; slots of one key do.
        if any(found[place].peer != found[place + 1].peer for place in alike):
            found.sort(key=lambda ask: (ask.peer, ask.slot))
        return found
