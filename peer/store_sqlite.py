"""The parts of the store that are about SQLite rather than about us: files, settings, versions, errors.

Promises that a database file under its final name is always a whole one (it is made under another name and
renamed), that every commit is synchronised before it returns, and that no `sqlite3.Error` or `OSError`
leaves the store.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from peer.store_schema import (
    DATABASE_NAME,
    EMPTY_TAIL,
    DiskFull,
    StoreBusy,
    StoreFailed,
    StoreTooNew,
    WrongStore,
    corrupt,
    meta_digest,
)
from protocol import params
from protocol.codec import encode
from protocol.errors import IchibaError, LocalProtocolError

__all__ = [
    "check_meta",
    "connect",
    "copy_database",
    "create",
    "meta_row",
    "migrate",
    "read_meta",
    "read_only",
    "refuse_damage",
    "refuse_strange_file",
    "refuse_strange_schema",
    "synchronise",
    "translated",
]

Migrations = Sequence[Sequence[str]]
Probe = Callable[[str], None]

MAGIC: Final = b"SQLite format 3\x00"
WAL_VERSIONS: Final = b"\x02\x02"  # bytes 18 and 19 of the header of a database in WAL mode
REFUSED_BY_SYSTEM: Final = frozenset(
    {
        sqlite3.SQLITE_AUTH,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_NOLFS,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
    }
)


def translate(error: sqlite3.Error | OSError, directory: Path) -> IchibaError:
    """The error of ours that says what to do about `error`, met in the store in `directory`."""
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return disk_full(directory)
        return StoreFailed(f"the store in {directory} cannot be used: {error}", next_step=f"see `ls -la {directory}`")
    code = getattr(error, "sqlite_errorcode", None)
    primary = None if code is None else code & 0xFF
    if primary == sqlite3.SQLITE_FULL:
        return disk_full(directory)
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreBusy(
            f"the store in {directory} was locked by another program for {params.STORE_BUSY_MS} ms",
            next_step=f"close what shows up in `fuser {directory / DATABASE_NAME}`, then try again",
        )
    if primary in REFUSED_BY_SYSTEM and code != sqlite3.SQLITE_IOERR_SHORT_READ:
        return StoreFailed(
            f"the system refused to read or write the store in {directory}: {error}",
            why=str(getattr(error, "sqlite_errorname", "")),
            next_step=f"check rights and space: `ls -la {directory}`, `df -h {directory}`; then restart",
        )
    if isinstance(error, sqlite3.ProgrammingError | sqlite3.InterfaceError):
        return LocalProtocolError(f"the store was called wrongly: {error}")
    # What is left cannot come from our own statements on our own tables: the file is not what we wrote.
    return corrupt(directory, str(error))


def disk_full(directory: Path) -> DiskFull:
    """The error for a full disk or a file at its size limit."""
    return DiskFull(
        f"no space is left for the store in {directory}",
        why="the commit was rolled back; everything committed before is intact",
        next_step=f"free space (`df -h {directory}` shows it), then run the command again",
    )


@contextmanager
def translated(directory: Path) -> Iterator[None]:
    """Turn every sqlite3.Error and OSError inside into an error of ours."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise translate(error, directory) from error


def connect(path: Path) -> sqlite3.Connection:
    """Open the existing database `path` with the settings money needs. Raises sqlite3.Error."""
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw",
        uri=True,
        isolation_level=None,  # transactions are begun and ended by us alone
        check_same_thread=False,  # the daemon commits in worker threads, one at a time
        timeout=params.STORE_BUSY_MS / 1000,
    )
    try:
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",  # a commit returns after fsync of the log
            "fullfsync = ON",  # where fsync does not reach the platter (macOS)
            "foreign_keys = ON",
            "trusted_schema = OFF",  # the file may have been brought by somebody
            "cell_size_check = ON",
            f"journal_size_limit = {params.STORE_WAL_BYTES_MAX}",
            f"wal_autocheckpoint = {params.STORE_CHECKPOINT_PAGES}",
            f"cache_size = -{params.STORE_CACHE_KIB}",
        ):
            connection.execute(f"PRAGMA {pragma}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


@contextmanager
def read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to the existing database `path` that sees one state of it and can write nothing. Raises
    sqlite3.Error."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)) as connection:
        for pragma in ("trusted_schema = OFF", "cell_size_check = ON", f"busy_timeout = {params.STORE_BUSY_MS}"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("BEGIN")
        yield connection


def synchronise(path: Path) -> None:
    """fsync a file or a directory, so that what it holds (names, for a directory) survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create(path: Path, migrations: Migrations, network: bytes, peer: bytes, probe: Probe) -> None:
    """Make the empty store `path`, all or nothing. Raises sqlite3.Error, OSError, CorruptStore.

    A database missing beside its own log is not a new store but a lost one: making an empty one there would
    have SQLite throw the log away, and with it all money committed since the last checkpoint.
    """
    if Path(f"{path}-wal").exists():
        raise corrupt(path.parent, f"{path.name} is missing but its log {path.name}-wal is there")
    draft = path.with_name(f"{path.name}.new")
    for suffix in ("", "-wal", "-shm", "-journal"):
        Path(f"{draft}{suffix}").unlink(missing_ok=True)
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with closing(connect(draft)) as connection:
        probe("before create")
        connection.execute("BEGIN IMMEDIATE")
        for statement in (statement for version in migrations for statement in version):
            connection.execute(statement)
        for name, value in {
            "schema_version": b"%d" % len(migrations),
            "network": network,
            "peer": peer,
            "tail": encode(EMPTY_TAIL),
            "tables": encode({}),
        }.items():
            connection.execute(*meta_row(name, value))
        connection.execute("COMMIT")
        probe("after create")
    synchronise(draft)
    probe("before rename")
    draft.rename(path)
    probe("after rename")
    synchronise(path.parent)


def meta_row(name: str, value: bytes) -> tuple[str, tuple[str, bytes, bytes]]:
    """The statement and its values that store one row of `meta` with its checksum."""
    return "INSERT OR REPLACE INTO meta (name, value, sum) VALUES (?, ?, ?)", (
        name,
        value,
        meta_digest(name, value),
    )


def refuse_strange_file(path: Path) -> None:
    """Raise CorruptStore unless `path` starts like a database in WAL mode; in another mode its log is
    ignored."""
    with path.open("rb") as file:
        header = file.read(100)
    if header[:16] != MAGIC or header[18:20] != WAL_VERSIONS:
        raise corrupt(path.parent, f"it has {path.stat().st_size} bytes and does not start like a store")


def read_meta(connection: sqlite3.Connection, directory: Path) -> dict[str, bytes]:
    """The rows of `meta`, checked and complete. Raises CorruptStore, sqlite3.Error."""
    meta = {}
    for name, value, checksum in connection.execute("SELECT name, value, sum FROM meta"):
        if not isinstance(value, bytes) or meta_digest(name, value) != checksum:
            raise corrupt(directory, f"the row {name} of meta does not match its checksum")
        meta[name] = value
    missing = {"schema_version", "network", "peer", "tail"} - meta.keys()
    if missing:
        raise corrupt(directory, f"meta lacks {', '.join(sorted(missing))}")
    return meta


def check_meta(meta: dict[str, bytes], directory: Path, *, newest: int, network: bytes, peer: bytes) -> int:
    """The schema version of a store that is ours to open. Raises StoreTooNew, WrongStore."""
    version = int(meta["schema_version"])
    if version > newest:
        raise StoreTooNew(
            f"the store in {directory} has version {version}, this program reads up to {newest}",
            next_step="install the newer Ichiba that wrote it, or choose another data directory",
        )
    for name, stored, asked in (("network", meta["network"], network), ("peer", meta["peer"], peer)):
        if stored != asked:
            raise WrongStore(
                f"the store in {directory} belongs to {name} {stored.hex()[:12]}, not to {asked.hex()[:12]}",
                why="money of one network or peer means nothing to another",
                next_step=f"choose another data directory, or the {name} this one was made for",
            )
    return version


def migrate(
    connection: sqlite3.Connection, path: Path, version: int, migrations: Migrations, news: dict[str, bytes]
) -> None:
    """Bring the store from `version` to the newest, each version in a transaction, after a backup beside
    it. news: rows of `meta` that an older version lacks."""
    if version < len(migrations):
        copy_database(connection, path.with_name(f"{path.name}.v{version}"))
    for index in range(version, len(migrations)):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in migrations[index]:
                connection.execute(statement)
            for name, value in {**news, "schema_version": b"%d" % (index + 1)}.items():
                connection.execute(*meta_row(name, value))
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def schema_of(connection: sqlite3.Connection) -> set[tuple[str, ...]]:
    """Every object of a database that has a statement of its own: (type, name, table, sql)."""
    sql = "SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite!_%' ESCAPE '!'"
    return set(connection.execute(sql))


def refuse_strange_schema(connection: sqlite3.Connection, directory: Path, migrations: Migrations) -> None:
    """Raise CorruptStore for another schema than ours."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
        for statement in (statement for version in migrations for statement in version):
            fresh.execute(statement)
        if (differing := schema_of(connection) ^ schema_of(fresh)) != set():
            raise corrupt(directory, f"its tables differ from ours in {sorted({row[1] for row in differing})}")


def refuse_damage(connection: sqlite3.Connection, directory: Path) -> None:
    """Raise CorruptStore for a broken page, index, type, constraint or foreign key. Reads the whole file."""
    found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(3)")]
    if found != ["ok"]:
        raise corrupt(directory, "; ".join(found)[:300])
    if connection.execute("PRAGMA foreign_key_check").fetchone() is not None:
        raise corrupt(directory, "a posting belongs to no entry")


def copy_database(connection: sqlite3.Connection, path: Path) -> None:
    """Copy the database as it stands into one file `path`, replacing that at once. Raises sqlite3.Error,
    OSError."""
    draft = path.with_name(f"{path.name}.partial")
    draft.unlink(missing_ok=True)
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with closing(sqlite3.connect(draft, isolation_level=None)) as target:
        connection.backup(target)
    synchronise(draft)
    draft.replace(path)
    synchronise(path.parent)
