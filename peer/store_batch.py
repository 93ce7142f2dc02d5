"""What one commit of the store changes, checked against the store's limits before anything is written.

Promises that a group of batches is folded into one set of rows, the later put winning, and that what is too large or
misnamed is refused whole. Pure: it knows nothing of SQLite.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from market.ledger import Account, Entry, Ledger, apply_entry, refuse_conflict
from protocol import params
from protocol.errors import LimitExceeded, LocalProtocolError

__all__ = ["Batch", "Event", "Staged", "checked_name"]

TABLE_NAME: Final = re.compile(r"[a-z][a-z0-9_-]*")

Put = tuple[str, bytes, bytes | None]


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a job's log. at_ns: wall clock in nanoseconds. seq: its cursor, given by the store."""

    job: str
    at_ns: int
    line: str
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """What one input of the node changes. puts: (table, key, value or None to delete), the later wins."""

    puts: tuple[Put, ...] = ()
    entries: tuple[Entry, ...] = ()
    events: tuple[Event, ...] = ()


class Staged:
    """A group of batches, checked against the rules and folded into one set of rows to write."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.puts: dict[tuple[str, bytes], bytes | None] = {}
        self.entries: list[tuple[Entry, bytes]] = []
        self.digests: dict[bytes, bytes] = {}
        self.balances: dict[Account, int] = {}
        self.events: list[Event] = []
        self._names: set[str] = set()

    def add(self, batch: Batch) -> None:
        """Note a whole batch. Raises LimitExceeded, LocalProtocolError, Overdrawn, ConflictingEntry,
        VerificationFailed."""
        for put in batch.puts:
            self.put(*put)
        for entry in batch.entries:
            self.entry(entry)
        for event in batch.events:
            self.event(event)
        if self.size > params.STORE_GROUP_ROWS_MAX:
            raise LimitExceeded(f"more than {params.STORE_GROUP_ROWS_MAX} rows in one commit")

    def put(self, table: str, key: bytes, value: bytes | None) -> None:
        """Note one put. Raises LimitExceeded, LocalProtocolError."""
        if table not in self._names:
            self._names.add(checked_name(table))
        if not 1 <= len(key) <= params.STORE_KEY_BYTES_MAX:
            raise LimitExceeded(f"key of {len(key)} bytes in {table}, from 1 to {params.STORE_KEY_BYTES_MAX}")
        if value is not None and len(value) > params.STORE_VALUE_BYTES_MAX:
            raise LimitExceeded(f"value of {len(value)} bytes, at most {params.STORE_VALUE_BYTES_MAX}")
        self.puts[table, key] = value

    def entry(self, entry: Entry) -> None:
        """Note one entry, unless it was applied before. Raises as `market.ledger.apply_entry`, ConflictingEntry."""
        digest, known = entry.digest(), self.digests.get(entry.key) or self._ledger.digest_of(entry.key)
        if known is not None:
            refuse_conflict(entry, digest, known)
            return

        def held(account: Account) -> int:
            found = self.balances.get(account)
            return self._ledger.balance_micro(account) if found is None else found

        self.balances.update(apply_entry(entry, held))
        self.entries.append((entry, digest))
        self.digests[entry.key] = digest

    def event(self, event: Event) -> None:
        """Note one log line; a long one is cut and says so. Raises LimitExceeded for a bad job name."""
        if not 1 <= len(event.job) <= params.EVENT_JOB_CHARS_MAX or not event.job.isprintable():
            raise LimitExceeded(f"job name of {len(event.job)} characters or with ones that do not print")
        if not 0 <= event.at_ns < 2**63:
            raise LimitExceeded(f"a log line of {event.at_ns} ns, times are from 0 below 2**63")
        line = event.line.encode("utf-8", "backslashreplace").decode()
        if (over := len(line) - params.EVENT_LINE_CHARS_MAX) > 0:
            line = line[: params.EVENT_LINE_CHARS_MAX] + f" [{over} characters cut]"
        self.events.append(Event(event.job, event.at_ns, line))

    @property
    def size(self) -> int:
        """Rows noted so far."""
        return len(self.puts) + len(self.entries) + len(self.events)


def checked_name(table: str) -> str:
    """`table` if it is the name of a key-value table. Raises LocalProtocolError."""
    if len(table) > params.STORE_TABLE_CHARS_MAX or TABLE_NAME.fullmatch(table) is None:
        raise LocalProtocolError(f"no table {table[:40]!r}: a small letter, then small letters, digits, - and _")
    return table
