"""The daemon's disk: one SQLite file that holds the journal of money, key-value tables and job logs.

Promises: what `commit` returned from survives any crash whole, what it did not return from is there whole
or not at all, and what does not read back as it was written is refused, never repaired in silence. Refuses
to know what the values mean. Crash rule of DESIGN §10: "journal, commit, then send": callers send only
after `commit` returned.

One daemon owns a data directory (a lock file); one thread at a time uses a Store (an internal lock).
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from market.ledger import Account, Entry, Ledger, apply_entry, refuse_conflict
from peer.store_lock import DirectoryLock
from peer.store_read_sqlite import PAGE_ROWS, check_rows, checked_row, entries_page, rebuild
from peer.store_schema import (
    DATABASE_NAME,
    EMPTY_TAIL,
    MIGRATIONS,
    StoreFailed,
    Tail,
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
    translated,
)
from protocol import params
from protocol.codec import decode, encode
from protocol.errors import IchibaError, LimitExceeded, LocalProtocolError, RemoteProtocolError

__all__ = ["Batch", "Event", "Store"]

TABLE_NAME: Final = re.compile(r"[a-z][a-z0-9_-]*")

Put = tuple[str, bytes, bytes | None]


def no_probe(point: str) -> None:
    """The probe of a store in use: nothing."""


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

    def __init__(self) -> None:
        self.puts: dict[tuple[str, bytes], bytes | None] = {}
        self.entries: list[tuple[Entry, bytes]] = []
        self.digests: dict[bytes, bytes] = {}
        self.balances: dict[Account, int] = {}
        self.events: list[Event] = []

    def put(self, table: str, key: bytes, value: bytes | None) -> None:
        """Note one put. Raises LimitExceeded, LocalProtocolError."""
        checked_name(table)
        if not 1 <= len(key) <= params.STORE_KEY_BYTES_MAX:
            raise LimitExceeded(f"key of {len(key)} bytes in {table}, from 1 to {params.STORE_KEY_BYTES_MAX}")
        if value is not None and len(value) > params.STORE_VALUE_BYTES_MAX:
            raise LimitExceeded(f"value of {len(value)} bytes, at most {params.STORE_VALUE_BYTES_MAX}")
        self.puts[table, key] = value

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


class Store:
    """The open store. See the module's promises; make one with `Store.open`."""

    def __init__(self, directory: Path, lock: DirectoryLock, connection: sqlite3.Connection, probe: Probe) -> None:
        self._directory, self._directory_lock = directory, lock
        self._connection, self._probe = connection, probe
        self._lock = threading.RLock()
        self._tail = EMPTY_TAIL
        self._verified: Ledger | None = None
        self._closed = False
        self._failure: StoreFailed | None = None

    @classmethod
    def open(cls, directory: Path, network: bytes, peer: bytes, *, probe: Probe = no_probe) -> Store:
        """Open, or create, the store of `peer` (key, 32 bytes) on `network` (id, 32 bytes), and verify all
        of it.

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
                staged = self._stage(batches)
                tail = self._write_entries(staged, self._write_puts(staged, self._tail))
                self._write_events(staged.events)
                self._write_meta("tail", encode(tail))
                self._write("commit", "COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            self._tail, self._verified = tail, None

    def get(self, table: str, key: bytes) -> bytes | None:
        """The value under `key`, or None. Raises CorruptStore."""
        with self._use():
            sql = "SELECT key, value, sum FROM kv WHERE tbl = ? AND key = ?"
            row = self._connection.execute(sql, (checked_name(table), key)).fetchone()
            return None if row is None else checked_row(self._directory, table, row)[1]

    def rows(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        """Every (key, value) of `table` in order of keys; commits may happen between two. Raises
        CorruptStore."""
        sql, last = "SELECT key, value, sum FROM kv WHERE tbl = ? AND key > ? ORDER BY key LIMIT ?", b""
        while True:
            with self._use():
                page = self._connection.execute(sql, (checked_name(table), last, PAGE_ROWS)).fetchall()
                checked = [checked_row(self._directory, table, row) for row in page]
            if not checked:
                return
            yield from checked
            last = checked[-1][0]

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
        """The ledger rebuilt from the journal and checked against the chain and the stored balances.

        Raises CorruptStore. O(entries): the daemon calls it once at start (that first call reuses the one
        that `open` verified) and keeps its own from then on.
        """
        with self._use():
            ledger, self._verified = self._verified, None
            return ledger or rebuild(self._connection, self._directory, self._tail)

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

    def _stage(self, batches: Sequence[Batch]) -> Staged:
        staged = Staged()
        for batch in batches:
            for put in batch.puts:
                staged.put(*put)
            for entry in batch.entries:
                self._stage_entry(staged, entry)
            for event in batch.events:
                staged.event(event)
            if staged.size > params.STORE_GROUP_ROWS_MAX:
                raise LimitExceeded(f"more than {params.STORE_GROUP_ROWS_MAX} rows in one commit")
        return staged

    def _stage_entry(self, staged: Staged, entry: Entry) -> None:
        digest, known = entry.digest(), staged.digests.get(entry.key)
        if known is None:
            row = self._connection.execute("SELECT digest FROM entries WHERE key = ?", (entry.key,)).fetchone()
            known = row and row[0]
        if known is not None:
            refuse_conflict(entry, digest, known)
            return

        def held(account: Account) -> int:
            if account not in staged.balances:
                sql = "SELECT micro FROM balances WHERE owner = ? AND bucket = ?"
                row = self._connection.execute(sql, (account.owner, account.bucket)).fetchone()
                staged.balances[account] = row[0] if row else 0
            return staged.balances[account]

        staged.balances.update(apply_entry(entry, held))
        staged.entries.append((entry, digest))
        staged.digests[entry.key] = digest

    def _write_puts(self, staged: Staged, tail: Tail) -> Tail:
        added, delta, stored, deleted = 0, 0, [], []
        for (table, key), value in staged.puts.items():
            sql = "SELECT sum FROM kv WHERE tbl = ? AND key = ?"
            row = self._connection.execute(sql, (table, key)).fetchone()
            if row:
                added, delta = added - 1, delta - int.from_bytes(row[0], "little")
            if value is not None:
                digest = kv_digest(table, key, value)
                added, delta = added + 1, delta + int.from_bytes(digest, "little")
                stored.append((table, key, value, digest))
            elif row:
                deleted.append((table, key))
        self._write_all(
            "put",
            "INSERT INTO kv (tbl, key, value, sum) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (tbl, key) DO UPDATE SET value = excluded.value, sum = excluded.sum",
            stored,
        )
        self._write_all("delete", "DELETE FROM kv WHERE tbl = ? AND key = ?", deleted)
        return tail.with_rows(added=added, delta=delta)

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
        with self._use():
            meta = read_meta(self._connection, self._directory)
            version = check_meta(meta, self._directory, newest=len(MIGRATIONS), network=network, peer=peer)
            refuse_damage(self._connection, self._directory, MIGRATIONS[:version])
            try:
                self._tail = decode(Tail, meta["tail"], bytes_max=params.STORE_KEY_BYTES_MAX)
            except RemoteProtocolError as error:
                raise corrupt(self._directory, f"the tail does not decode: {error}") from error
            migrate(self._connection, self._directory / DATABASE_NAME, version, MIGRATIONS)
            check_rows(self._connection, self._directory, self._tail)
            self._verified = rebuild(self._connection, self._directory, self._tail)


def checked_name(table: str) -> str:
    """`table` if it is the name of a key-value table. Raises LocalProtocolError."""
    if len(table) > params.STORE_TABLE_CHARS_MAX or TABLE_NAME.fullmatch(table) is None:
        raise LocalProtocolError(f"no table {table[:40]!r}: a small letter, then small letters, digits, - and _")
    return table
