"""What the store looks like on disk: file names, tables by version, row checksums, the errors it can raise.

Promises that a store written by any earlier version can be brought to the newest one, step by step. Pure
data and hashing; the code that runs it is peer/store.py.

Every row that money depends on is checked. A key-value row carries the hash of its table, key and value,
and the `tail` in `meta` their count and their sum mod 2**256 (`tables` the same for each table), so a lost row is
noticed as well as a changed one. Journal entries carry the digest of their whole content, and the tail their
count and hash chain. All of them change in the transaction that changes the rows, so any mixture of two states of the
file fails its check. This guards against torn writes and rotten disks; a sum of hashes is no defence against someone
who edits the file on purpose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from protocol.codec import Digest, PeerKey, Uint, blake, encode
from protocol.errors import CorruptStore, IchibaError

__all__ = [
    "DATABASE_NAME",
    "EMPTY_TAIL",
    "LOCK_NAME",
    "MIGRATIONS",
    "TABLES_VERSION",
    "AlreadyRunning",
    "DiskFull",
    "Snapshot",
    "StoreBusy",
    "StoreFailed",
    "StoreTooNew",
    "Tables",
    "Tail",
    "WrongStore",
    "added",
    "corrupt",
    "event_digest",
    "kv_digest",
    "meta_digest",
    "next_chain",
]

DATABASE_NAME: Final = "ichiba.db"
LOCK_NAME: Final = "ichiba.lock"
TABLES_VERSION: Final = 2  # the first whose `meta` has the row `tables`

# One tuple of statements for each schema version, never edited once released: append the next version.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE meta (
            name TEXT NOT NULL PRIMARY KEY,
            value BLOB NOT NULL,
            sum BLOB NOT NULL
        ) STRICT""",
        """CREATE TABLE kv (
            tbl TEXT NOT NULL,
            key BLOB NOT NULL,
            value BLOB NOT NULL,
            sum BLOB NOT NULL,
            PRIMARY KEY (tbl, key)
        ) STRICT""",
        """CREATE TABLE entries (
            seq INTEGER PRIMARY KEY,
            key BLOB NOT NULL UNIQUE,
            kind TEXT NOT NULL,
            memo TEXT NOT NULL,
            digest BLOB NOT NULL
        ) STRICT""",
        """CREATE TABLE postings (
            entry INTEGER NOT NULL REFERENCES entries (seq),
            position INTEGER NOT NULL,
            owner BLOB NOT NULL,
            bucket TEXT NOT NULL,
            delta INTEGER NOT NULL CHECK (delta <> 0),
            PRIMARY KEY (entry, position)
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE balances (
            owner BLOB NOT NULL,
            bucket TEXT NOT NULL,
            micro INTEGER NOT NULL CHECK (micro > 0 OR (bucket = 'world' AND micro < 0)),
            PRIMARY KEY (owner, bucket)
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE events (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            job TEXT NOT NULL,
            number INTEGER NOT NULL,
            at_ns INTEGER NOT NULL,
            line TEXT NOT NULL,
            sum BLOB NOT NULL
        ) STRICT""",
        "CREATE INDEX events_by_job ON events (job, seq)",
    ),
    (),  # version 2: `meta` has the rows `tables` and, in time, `snapshot`
)


class AlreadyRunning(IchibaError):
    """Another process holds the data directory. `pid` is its process id, 0 if it has not written one yet."""

    code = "already-running"

    def __init__(self, directory: Path, pid: int) -> None:
        self.pid = pid
        super().__init__(
            f"process {pid or 'unknown'} uses the data directory {directory}",
            why="two daemons with one key would spend the same money twice",
            next_step=f"stop it with `kill {pid}` or choose another data directory"
            if pid
            else "try again in a second or choose another data directory",
        )


class WrongStore(IchibaError):
    """The store belongs to another network or another peer key."""

    code = "wrong-store"


class StoreTooNew(IchibaError):
    """The store was written by a newer Ichiba than this one."""

    code = "store-too-new"


class DiskFull(IchibaError):
    """No space is left for a commit. Nothing of it was written and all that was committed before is
    intact."""

    code = "disk-full"


class StoreFailed(IchibaError):
    """The operating system refused to read or write the store: permissions, a size limit, a failing disk."""

    code = "store-failed"


class StoreBusy(IchibaError):
    """Another program holds the database. Nothing was written; the call may be made again."""

    code = "store-busy"


def corrupt(directory: Path, what: str) -> CorruptStore:
    """The error for a store that does not read back as written, with the command that mends it."""
    return CorruptStore(
        f"the store {directory / DATABASE_NAME} is damaged: {what}",
        why="the file was changed outside Ichiba, cut short, or the disk gave back other bytes than it got",
        next_step=f"stop the daemon and run `python -m peer.store_restore {directory} BACKUP`; without BACKUP"
        " the damaged files are set aside and the ledger is fetched from other peers anew",
    )


Tables = dict[str, tuple[int, bytes]]
"""Of each key-value table that has rows: their number, and the sum of their hashes mod 2**256, 32 bytes."""


class Tail(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The state of all checked rows: journal length and chain, number of key-value rows and sum of their
    hashes."""

    entries: Uint
    chain: Digest
    rows: Uint
    rows_sum: Digest

    def with_rows(self, *, added: int, delta: int) -> Tail:
        """The tail after `added` more rows whose hashes change the sum by `delta` (an integer, may be
        negative)."""
        total = (int.from_bytes(self.rows_sum, "little") + delta) % 2**256
        return Tail(self.entries, self.chain, self.rows + added, total.to_bytes(32, "little"))


EMPTY_TAIL: Final = Tail(0, bytes(32), 0, bytes(32))


class Snapshot(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The ledger after the first `entries` entries of the journal, so that a start need not fold them again.

    balances: (owner, bucket, micro-credits). flows: (owner, the figures of market.ledger.Flow in their order).
    """

    entries: Uint
    chain: Digest
    balances: tuple[tuple[PeerKey, str, int], ...]
    flows: tuple[tuple[PeerKey, tuple[int, ...]], ...]


def added(tables: Tables, table: str, *, rows: int, delta: int) -> None:
    """Count `rows` more rows of `table`, whose hashes change the sum by `delta` (an integer, may be negative)."""
    held, total = tables.get(table, (0, bytes(32)))
    total_after = (int.from_bytes(total, "little") + delta) % 2**256
    if held + rows:
        tables[table] = (held + rows, total_after.to_bytes(32, "little"))
    else:
        tables.pop(table, None)


def next_chain(chain: bytes, digest: bytes) -> bytes:
    """The journal's chain, 32 bytes, after an entry with this digest."""
    return blake("ichiba/store/chain", chain, digest)


def meta_digest(name: str, value: bytes) -> bytes:
    """The checksum of a row of `meta`, 32 bytes."""
    return blake("ichiba/store/meta", name.encode(), value)


def kv_digest(table: str, key: bytes, value: bytes) -> bytes:
    """The checksum of a key-value row, 32 bytes."""
    return blake("ichiba/store/kv", table.encode(), key, value)


def event_digest(job: str, number: int, at_ns: int, line: str) -> bytes:
    """The checksum of a log line, 32 bytes."""
    return blake("ichiba/store/event", encode((job, number, at_ns, line)))
