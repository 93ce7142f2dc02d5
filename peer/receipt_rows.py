"""The co-signed receipts of a peer's deals: those of finished deals stay on the disk until somebody asks for them.

Promises that a deal's list is what was committed, whole and in order, and that a list handed out is the one that is
added to. A million receipts are a gigabyte of rows: neither a start nor the memory pays for those nobody reads.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable
from typing import Protocol

from peer.deals import receipt_key
from peer.desk import Desk
from protocol.errors import CorruptStore

__all__ = ["ReceiptRows", "Rows", "no_rows"]


class Rows(Protocol):
    """Reads a table of the store: its rows (key, value), or those whose key begins with `prefix`, in order of keys."""

    def __call__(self, table: str, prefix: bytes = b"") -> Iterable[tuple[bytes, bytes]]:
        """See the class."""


def no_rows(table: str, prefix: bytes = b"") -> Iterable[tuple[bytes, bytes]]:
    """The rows of an empty store."""
    return ()


class ReceiptRows(UserDict[bytes, list[bytes]]):
    """Deal id -> envelopes of its receipts, in order. `table` names their rows; `count` says how many a deal has."""

    def __init__(self, table: str, count: Callable[[bytes], int]) -> None:
        super().__init__()
        self._table, self._count, self._rows = table, count, no_rows

    def restore(self, rows: Rows) -> None:
        """Read from these rows whatever is asked for and not here."""
        self._rows = rows

    def load(self, deal_id: bytes) -> None:
        """Read a deal's now, so that a lost one is found at the start. Raises CorruptStore."""
        self[deal_id]

    def add(self, desk: Desk, deal_id: bytes, envelope: bytes) -> None:
        """The next receipt of a deal, here and in the journal; before the deal counts it."""
        known = self[deal_id]
        desk.save(self._table, receipt_key(deal_id, len(known)), envelope)
        known.append(envelope)

    def __missing__(self, deal_id: bytes) -> list[bytes]:
        found = [value for _, value in sorted(self._rows(self._table, deal_id))]
        if len(found) < self._count(deal_id):
            raise CorruptStore(
                f"{len(found)} of {self._count(deal_id)} receipts of deal {deal_id.hex()[:12]} are in the store",
                next_step="stop the daemon and restore the last backup of the store",
            )
        self.data[deal_id] = found
        return found
