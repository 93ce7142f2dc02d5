"""Looking into a store: a person's questions, answered from the file a daemon uses, without touching it.

Promises to read and nothing else: the file is opened read-only, SQLite itself refuses every statement but SELECT, a
question that takes too long is stopped, and an answer has a bounded number of rows. Secrets of deals (seeds that are
not revealed yet) are not shown decoded; the peer's key is not in the store at all.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
from sqlite_utils import Database

from peer.store_read_sqlite import checked_row
from peer.store_schema import DATABASE_NAME
from peer.store_sqlite import read_only, refuse_strange_file, translated
from protocol import params
from protocol.errors import IchibaError, NotFound
from protocol.records import Envelope

__all__ = ["BadQuery", "Look", "looking"]

READS: Final = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, getattr(sqlite3, "SQLITE_RECURSIVE", 33)}
)
FILE_FAULTS: Final = frozenset(  # of SQLite's errors; all others are the question's
    {
        *(sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN),
        *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_PERM),
    }
)
TABLE_INFO: Final = "table_info"
HIDDEN: Final = frozenset({"seed", "secret", "other_seed"})
STEPS_PER_LOOK: Final = 10_000  # virtual machine instructions between two looks at the clock


class BadQuery(IchibaError):
    """A question the store does not answer: it is no SELECT, or takes too long."""

    code = "bad-query"
    exit_code = 2


class Look:
    """One state of a store, to be asked. Make one with `looking`."""

    def __init__(self, directory: Path, connection: sqlite3.Connection) -> None:
        self._directory, self._connection = directory, connection
        self._database = Database(connection, execute_plugins=False, recursive_triggers=False)

    def tables(self) -> list[dict[str, Any]]:
        """Each table of the file, and each of the key-value tables inside `kv`, with its number of rows."""
        plain = [
            {"table": name, "kind": "table", "rows": self._database[name].count}
            for name in sorted(self._database.table_names())
            if not name.startswith("sqlite_")
        ]
        sql = "SELECT tbl, COUNT(*) AS rows, SUM(LENGTH(value)) AS bytes FROM kv GROUP BY tbl ORDER BY tbl"
        inner = [
            {"table": row["tbl"], "kind": "key-value", "rows": row["rows"], "bytes": row["bytes"]}
            for row in self._dicts(sql)
        ]
        return plain + inner

    def rows(self, table: str, *, limit: int, offset: int = 0) -> list[dict[str, Any]]:
        """Rows of a table in order, values as a person reads them. Raises NotFound, CorruptStore."""
        if table in self._database.table_names():
            found = self._database[table].rows_where(limit=limit, offset=offset)
            return [{name: shown(value) for name, value in row.items()} for row in found]
        sql = "SELECT key, value, sum FROM kv WHERE tbl = ? ORDER BY key LIMIT ? OFFSET ?"
        pages = self._connection.execute(sql, (table, limit, offset)).fetchall()
        if not pages and not any(row["table"] == table for row in self.tables()):
            raise NotFound(f"no table {table[:40]!r} in the store", next_step="ichiba db tables")
        checked = [checked_row(self._directory, table, row) for row in pages]
        return [{"key": key.hex(), "value": opened(value)} for key, value in checked]

    def query(self, sql: str, *, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """The first `limit` rows of a SELECT, and whether there are more. Raises BadQuery."""
        found: list[dict[str, Any]] = []
        for row in self._dicts(sql):
            if len(found) == limit:
                return found, True
            found.append({name: shown(value) for name, value in row.items()})
        return found, False

    def _dicts(self, sql: str) -> Iterator[dict[str, Any]]:
        cursor = self._connection.execute(sql)
        names = [column[0] for column in cursor.description or ()]
        for row in cursor:
            yield dict(zip(names, row, strict=True))


@contextmanager
def looking(directory: Path, *, timeout_s: float) -> Iterator[Look]:
    """A look into the store of `directory`, also while a daemon runs. Raises NotFound, BadQuery, CorruptStore,
    StoreFailed, StoreBusy."""
    path = directory.absolute() / DATABASE_NAME
    if not path.is_file():
        raise NotFound(f"no store in {directory}", next_step="run `ichiba up` once")
    ends = time.monotonic() + timeout_s
    late = False

    def over() -> int:
        nonlocal late
        late = time.monotonic() > ends
        return int(late)

    def allowed(action: int, first: str | None, *_: str | None) -> int:
        harmless = action in READS or (action == sqlite3.SQLITE_PRAGMA and first == TABLE_INFO)
        return sqlite3.SQLITE_OK if harmless else sqlite3.SQLITE_DENY

    with translated(directory):
        refuse_strange_file(path)
        with read_only(path) as connection:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, params.DB_VALUE_BYTES_MAX)
            connection.set_progress_handler(over, STEPS_PER_LOOK)
            connection.set_authorizer(allowed)
            try:
                yield Look(directory, connection)
            except (sqlite3.Error, ValueError) as error:
                if late:
                    raise BadQuery(
                        f"the query took more than {timeout_s:g} s", next_step="ask for less, or raise --timeout"
                    ) from None
                if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in FILE_FAULTS:
                    raise
                raise BadQuery(
                    str(error)[:300], why="the store is only read: one SELECT", next_step="see `ichiba db tables`"
                ) from None


def shown(value: Any) -> Any:
    """A cell as JSON and people take it: bytes in hex, long ones cut."""
    if isinstance(value, bytes):
        text = value[: params.DB_CELL_BYTES].hex()
        return text if len(value) <= params.DB_CELL_BYTES else f"{text}... ({len(value)} bytes)"
    return value


def opened(value: bytes) -> Any:
    """The value of a key-value row: a record, a row of ours, or bytes."""
    try:
        envelope = msgspec.msgpack.decode(value, type=Envelope)
        return {"signers": [peer.hex() for peer, _ in envelope.signatures], "record": _plain(_parsed(envelope.body))}
    except (msgspec.DecodeError, RecursionError):
        pass
    try:
        parsed = _parsed(value)
    except (msgspec.DecodeError, RecursionError):
        return shown(value)
    return _plain(parsed) if isinstance(parsed, dict | list) else shown(value)


def _parsed(data: bytes) -> Any:
    return msgspec.msgpack.decode(data)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(shown(name)): "(hidden)" if name in HIDDEN else _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return shown(value)
