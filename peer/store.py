"""The daemon's disk: one SQLite file that holds the journal of money, key-value tables and job logs.

Promises: what `commit` returned from survives any crash whole, what it did not return from is there whole
or not at all, and what does not read back as it was written is refused, never repaired in silence. Refuses
to know what the values mean. Crash rule of DESIGN §10: "journal, commit, then send": callers send only
after `commit` returned.

One daemon owns a data directory (a lock file); one thread at a time uses a Store (an internal lock).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

from market.ledger import Entry, Ledger
from peer.store_batch import Batch, Event, Staged, checked_name
from peer.store_lock import DirectoryLock
from peer.store_read_sqlite import (
    check_rows,
    checked_row,
    entries_page,
    rebuild,
    rows_page,
    stored_sums,
    take_snapshot,
)
from peer.store_schema import (
    DATABASE_NAME,
    EMPTY_TAIL,
    MIGRATIONS,
    TABLES_VERSION,
    Snapshot,
    StoreFailed,
    Tables,
    Tail,
    added,
    corrupt,
    event_digest,
    kv_digest,
    next_chain,
)
from peer.store_sqlite import (
    Probe,
    check_meta,
    connect,
    copy_database,
    create,
    meta_row,
    migrate,
    read_meta,
    refuse_damage,
    refuse_strange_file,
    refuse_strange_schema,
    translated,
)
from protocol import params
from protocol.codec import decode, encode
from protocol.errors import IchibaError, LocalProtocolError, RemoteProtocolError

__all__ = ["Batch", "Event", "Store"]

T = TypeVar("T")
PUT_ROWS: Final = 100  # of key-value rows written by one statement: SQLite takes far more values than their 400


def no_probe(point: str) -> None:
    """The probe of a store in use: nothing."""


class Store:
    """The open store. See the module's promises; make one with `Store.open`."""

    def __init__(self, directory: Path, lock: DirectoryLock, connection: sqlite3.Connection, probe: Probe) -> None:
        self._directory, self._directory_lock = directory, lock
        self._connection, self._probe = connection, probe
        self._lock = threading.RLock()
        self._tail, self._tables, self._ledger = EMPTY_TAIL, Tables(), Ledger()
        self._snapshot_entries = 0
        self.checked_whole = False  # by `open`; else it is for `peer.store_check` to do, while the store is in use
        self._closed = False
        self._failure: StoreFailed | None = None

    @classmethod
    def open(cls, directory: Path, network: bytes, peer: bytes, *, probe: Probe = no_probe) -> Store:
        """Open, or create, the store of `peer` (key, 32 bytes) on `network` (id, 32 bytes), and verify it: a small
        one whole, a large one as far as docs/decisions/0015-restart.md says.

        probe: called with a name before and after each statement that writes; tests crash the process
        there. Raises AlreadyRunning, WrongStore, StoreTooNew, CorruptStore, DiskFull, StoreFailed.
        """
        directory = directory.absolute()
        with translated(directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = DirectoryLock(directory)
            try:
                path = directory / DATABASE_NAME
                if not path.exists():
                    create(path, MIGRATIONS, network, peer, probe)
                refuse_strange_file(path)
                store = cls(directory, lock, connect(path), probe)
            except (IchibaError, sqlite3.Error, OSError):
                lock.release()
                raise
        try:
            store._load(network, peer)
        except IchibaError:
            store.close()
            raise
        return store

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write the log back into the file and release the directory. A second call does nothing."""
        with self._lock:
            self._closed = True
            try:
                with translated(self._directory):
                    self._connection.close()
            finally:
                self._directory_lock.release()

    def commit(self, batches: Sequence[Batch]) -> None:
        """Write a group of batches in one transaction: after return all of it is on disk, after an error
        nothing.

        One bad batch refuses the whole group, so check batches before grouping them. Entries already
        applied change nothing. Raises Overdrawn, ConflictingEntry, LimitExceeded, VerificationFailed,
        DiskFull, StoreFailed (after which every call raises: whether the commit reached the disk is known
        after a restart).
        """
        with self._use():
            self._write("begin", "BEGIN IMMEDIATE")
            try:
                staged = Staged(self._ledger)
                for batch in batches:
                    staged.add(batch)
                tables = dict(self._tables)
                tail = self._write_entries(staged, self._write_puts(staged, self._tail, tables))
                self._write_events(staged.events)
                if tables != self._tables:
                    self._write_meta("tables", encode(tables))
                snapshot_due = self._tail.entries - self._snapshot_entries >= params.STORE_SNAPSHOT_ENTRIES
                if snapshot_due:
                    self._write_meta("snapshot", encode(take_snapshot(self._ledger, self._tail)))
                self._write_meta("tail", encode(tail))
                self._write("commit", "COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            if snapshot_due:
                self._snapshot_entries = self._tail.entries
            self._tail, self._tables = tail, tables
            for entry, _ in staged.entries:
                self._ledger.post(entry)

    def get(self, table: str, key: bytes) -> bytes | None:
        """The value under `key`, or None. Raises CorruptStore."""
        with self._use():
            sql = "SELECT key, value, sum FROM kv WHERE tbl = ? AND key = ?"
            row = self._connection.execute(sql, (checked_name(table), key)).fetchone()
            return None if row is None else checked_row(self._directory, table, row)[1]

    def rows(self, table: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Every (key, value) of `table` whose key begins with `prefix`, in order of keys; commits may happen between
        two. Raises CorruptStore, also at the end if rows of the whole table were lost.
        """
        last, found = prefix[:-1], Tables()
        with self._use():
            committed = self._tables.get(checked_name(table))
        while True:
            with self._use():
                page = rows_page(self._connection, self._directory, table, prefix, last)
            if not page:
                break
            for key, value, checksum in page:
                if not prefix:
                    added(found, table, rows=1, delta=int.from_bytes(checksum, "little"))
                yield key, value
            last = page[-1][0]
        with self._use():
            whole = not prefix and self._tables.get(table) == committed
        if whole and found.get(table) != committed:
            raise corrupt(self._directory, f"rows of table {table} are missing, or older ones are in their place")

    def entries(self, since: int = 0) -> Iterator[tuple[int, Entry]]:
        """The journal after entry number `since`: (number from 1, entry), in the order applied.

        Raises CorruptStore for an entry that does not match its digest.
        """
        while True:
            with self._use():
                page = entries_page(self._connection, self._directory, since)
            if not page:
                return
            for seq, entry, _ in page:
                yield seq, entry
            since = page[-1][0]

    def events(self, job: str, since: int = 0, limit: int = 1_000) -> list[Event]:
        """Up to `limit` log lines of `job` after the cursor `since` (an Event.seq), oldest first.

        The newest params.EVENTS_PER_JOB_MAX lines of a job are kept. Raises CorruptStore.
        """
        sql = (
            "SELECT seq, number, at_ns, line, sum FROM events INDEXED BY events_by_job"
            " WHERE job = ? AND seq > ? ORDER BY seq LIMIT ?"
        )
        found = []
        with self._use():
            for seq, number, at_ns, line, checksum in self._connection.execute(sql, (job, since, limit)):
                if event_digest(job, number, at_ns, line) != checksum:
                    raise corrupt(self._directory, f"log line {seq} of job {job} does not match its checksum")
                found.append(Event(job, at_ns, line, seq))
        return found

    def ledger(self) -> Ledger:
        """The ledger as of the last commit, the caller's own. O(accounts + entries): the daemon calls it once."""
        with self._use():
            return self._ledger.copy()

    def backup(self, path: Path) -> None:
        """Copy the store, as of now, to the file `path`, replacing it at once or not at all. Blocks
        commits.

        It holds vouchers, so it is readable by the owner only. An old backup knows nothing of what was
        signed later: restore one only when the store itself cannot be read. Raises DiskFull, StoreFailed,
        CorruptStore.
        """
        path = path.absolute()
        if path.parent == self._directory and path.name.startswith(DATABASE_NAME + "-"):
            raise LocalProtocolError(f"{path} belongs to the store itself")
        if path == self._directory / DATABASE_NAME:
            raise LocalProtocolError(f"{path} is the store itself", next_step="choose another file")
        with self._use():
            copy_database(self._connection, path)

    # --- writing -------------------------------------------------------------------------------------------

    def _write(self, point: str, sql: str, values: Sequence[Any] = ()) -> None:
        self._probe(f"before {point}")
        self._connection.execute(sql, values)
        self._probe(f"after {point}")

    def _write_all(self, point: str, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            self._probe(f"before {point}")
            self._connection.executemany(sql, rows)
            self._probe(f"after {point}")

    def _write_puts(self, staged: Staged, tail: Tail, tables: Tables) -> Tail:
        stored, deleted = [], []
        rows, deltas = dict[str, int](), dict[str, int]()
        names = sorted(staged.puts)  # neighbours share a page
        old = stored_sums(self._connection, names)
        for name in names:
            table, key = name
            value, known = staged.puts[name], old.get(name)
            if known is not None:
                rows[table] = rows.get(table, 0) - 1
                deltas[table] = deltas.get(table, 0) - int.from_bytes(known, "little")
            if value is not None:
                digest = kv_digest(table, key, value)
                rows[table] = rows.get(table, 0) + 1
                deltas[table] = deltas.get(table, 0) + int.from_bytes(digest, "little")
                stored.append((table, key, value, digest))
            elif known is not None:
                deleted.append((table, key))
        for table, delta in deltas.items():
            added(tables, table, rows=rows[table], delta=delta)
        # Rows go in by many: each statement gives the interpreter's lock away, and waits for it among other threads.
        for first in range(0, len(stored), PUT_ROWS):
            page = stored[first : first + PUT_ROWS]
            self._write(
                "put",
                f"INSERT INTO kv (tbl, key, value, sum) VALUES {','.join(('(?,?,?,?)',) * len(page))}"
                " ON CONFLICT (tbl, key) DO UPDATE SET value = excluded.value, sum = excluded.sum",
                [part for row in page for part in row],
            )
        self._write_all("delete", "DELETE FROM kv WHERE tbl = ? AND key = ?", deleted)
        return tail.with_rows(added=sum(rows.values()), delta=sum(deltas.values()))

    def _write_entries(self, staged: Staged, tail: Tail) -> Tail:
        seq, chain = tail.entries, tail.chain
        journal, postings = [], []
        for entry, digest in staged.entries:
            seq, chain = seq + 1, next_chain(chain, digest)
            journal.append((seq, entry.key, entry.kind, entry.memo, digest))
            for position, (account, delta) in enumerate(entry.postings):
                postings.append((seq, position, account.owner, account.bucket, delta))
        self._write_all("entries", "INSERT INTO entries (seq, key, kind, memo, digest) VALUES (?, ?, ?, ?, ?)", journal)
        self._write_all(
            "postings",
            "INSERT INTO postings (entry, position, owner, bucket, delta) VALUES (?, ?, ?, ?, ?)",
            postings,
        )
        changed = sorted(staged.balances.items())
        self._write_all(
            "balances",
            "INSERT INTO balances (owner, bucket, micro) VALUES (?, ?, ?)"
            " ON CONFLICT (owner, bucket) DO UPDATE SET micro = excluded.micro",
            [(account.owner, account.bucket, micro) for account, micro in changed if micro],
        )
        self._write_all(
            "empty balances",
            "DELETE FROM balances WHERE owner = ? AND bucket = ?",
            [(account.owner, account.bucket) for account, micro in changed if not micro],
        )
        return Tail(seq, chain, tail.rows, tail.rows_sum)

    def _write_events(self, events: Sequence[Event]) -> None:
        numbers: dict[str, int] = {}
        rows = []
        edge = "SELECT number FROM events INDEXED BY events_by_job WHERE job = ? ORDER BY seq {} LIMIT 1"
        for event in events:
            if event.job not in numbers:
                last = self._connection.execute(edge.format("DESC"), (event.job,)).fetchone()
                numbers[event.job] = last[0] if last else 0
            number = numbers[event.job] = numbers[event.job] + 1
            digest = event_digest(event.job, number, event.at_ns, event.line)
            rows.append((event.job, number, event.at_ns, event.line, digest))
        self._write_all("events", "INSERT INTO events (job, number, at_ns, line, sum) VALUES (?, ?, ?, ?, ?)", rows)
        for job, last_number in numbers.items():
            first_number = self._connection.execute(edge.format("ASC"), (job,)).fetchone()[0]
            excess = last_number - first_number + 1 - params.EVENTS_PER_JOB_MAX
            if excess > 0:
                sql = "DELETE FROM events WHERE seq IN (SELECT seq FROM events WHERE job = ? ORDER BY seq LIMIT ?)"
                self._write("forget events", sql, (job, excess))
        if numbers:
            sql = "DELETE FROM events WHERE seq <= (SELECT MAX(seq) FROM events) - ?"
            self._write("forget old events", sql, (params.EVENTS_MAX,))

    def _write_meta(self, name: str, value: bytes) -> None:
        self._write(name, *meta_row(name, value))

    # --- reading and checking ------------------------------------------------------------------------------

    @contextmanager
    def _use(self) -> Iterator[None]:
        """Hold the connection. After a failure of the disk the store stays shut: its state is in doubt."""
        with self._lock:
            if self._closed:
                raise LocalProtocolError("the store is closed")
            if self._failure is not None:
                raise StoreFailed(f"the store failed before: {self._failure.what}", next_step="restart the daemon")
            try:
                with translated(self._directory):
                    yield
            except StoreFailed as error:
                self._failure = error
                raise

    def _load(self, network: bytes, peer: bytes) -> None:
        path = self._directory / DATABASE_NAME
        with self._use():
            meta = read_meta(self._connection, self._directory)
            version = check_meta(meta, self._directory, newest=len(MIGRATIONS), network=network, peer=peer)
            refuse_strange_schema(self._connection, self._directory, MIGRATIONS[:version])
            log = path.with_name(f"{path.name}-wal")
            size_bytes = path.stat().st_size + (log.stat().st_size if log.exists() else 0)
            self.checked_whole = version < TABLES_VERSION or size_bytes <= params.STORE_WHOLE_CHECK_BYTES_MAX
            if self.checked_whole:
                refuse_damage(self._connection, self._directory)
            self._tail = self._meta(Tail, meta, "tail")
            snapshot = None
            if self.checked_whole:
                self._tables = check_rows(self._connection, self._directory, self._tail)
                if version >= TABLES_VERSION and self._meta(Tables, meta, "tables") != self._tables:
                    raise corrupt(self._directory, "key-value rows stand in other tables than they were committed to")
            else:
                self._tables = self._meta(Tables, meta, "tables")
                snapshot = self._meta(Snapshot, meta, "snapshot") if "snapshot" in meta else None
            news = {} if version >= TABLES_VERSION else {"tables": encode(self._tables)}
            migrate(self._connection, path, version, MIGRATIONS, news)
            self._ledger = rebuild(self._connection, self._directory, self._tail, snapshot)
            self._snapshot_entries = self._meta(Snapshot, meta, "snapshot").entries if "snapshot" in meta else 0

    def _meta(self, kind: type[T], meta: dict[str, bytes], name: str) -> T:
        if name not in meta:
            raise corrupt(self._directory, f"meta lacks {name}")
        try:
            return decode(kind, meta[name], bytes_max=params.STORE_VALUE_BYTES_MAX)
        except RemoteProtocolError as error:
            raise corrupt(self._directory, f"the {name} does not decode: {error}") from error
