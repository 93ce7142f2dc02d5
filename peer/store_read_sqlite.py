"""Reading the store with every check on: rows against their checksums, the journal against chain and
balances.

Promises that a row handed out is the row that was committed, and that a ledger handed out is the fold of
every committed entry and nothing else. Functions raise CorruptStore with what is wrong first, and
sqlite3.Error.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, Final

from market.ledger import Account, Entry, Flow, Ledger
from peer.store_schema import EMPTY_TAIL, Snapshot, Tables, Tail, added, corrupt, event_digest, kv_digest, next_chain
from protocol.errors import IchibaError

__all__ = [
    "check_events",
    "check_rows",
    "checked_row",
    "entries_page",
    "rebuild",
    "resume",
    "rows_page",
    "stored_sums",
    "take_snapshot",
]

PAGE_ROWS: Final = 256  # rows fetched per query of an iterator, so that no read stays open across a commit
EVENTS_SQL: Final = "SELECT seq, job, number, at_ns, line, sum FROM events"
LOOKUP_ROWS: Final = 250  # keys looked up per query

Page = list[tuple[int, Entry, bytes]]


def check_rows(connection: sqlite3.Connection, directory: Path, tail: Tail) -> Tables:
    """Check every key-value row, and that they are together those that `tail` says were committed. Returns what
    `meta` must say of each table."""
    tables: Tables = {}
    found = EMPTY_TAIL
    for table, *row in connection.execute("SELECT tbl, key, value, sum FROM kv"):
        checked_row(directory, table, row)
        delta = int.from_bytes(row[2], "little")
        found = found.with_rows(added=1, delta=delta)
        added(tables, table, rows=1, delta=delta)
    if (found.rows, found.rows_sum) != (tail.rows, tail.rows_sum):
        raise corrupt(directory, f"{tail.rows} key-value rows were committed, {found.rows} others are there")
    return tables


def check_events(connection: sqlite3.Connection, directory: Path) -> int:
    """Check every log line; returns how many there are."""
    count = 0
    for seq, job, number, at_ns, line, checksum in connection.execute(EVENTS_SQL):
        count += 1
        if event_digest(job, number, at_ns, line) != checksum:
            raise corrupt(directory, f"log line {seq} of job {job} does not match its checksum")
    return count


def rows_page(
    connection: sqlite3.Connection, directory: Path, table: str, prefix: bytes, last: bytes
) -> list[tuple[bytes, bytes, bytes]]:
    """The next rows of `table` after the key `last` whose keys begin with `prefix`, checked: (key, value, sum)."""
    sql = "SELECT key, value, sum FROM kv WHERE tbl = ? AND key > ? AND key >= ? ORDER BY key LIMIT ?"
    page = connection.execute(sql, (table, last, prefix, PAGE_ROWS)).fetchall()
    for row in page:
        checked_row(directory, table, row)
    return [row for row in page if row[0].startswith(prefix)]


def stored_sums(connection: sqlite3.Connection, names: Sequence[tuple[str, bytes]]) -> dict[tuple[str, bytes], bytes]:
    """The sums of those rows (table, key) that exist, by one query for many: a query each costs more than the rows."""
    found: dict[tuple[str, bytes], bytes] = {}
    for first in range(0, len(names), LOOKUP_ROWS):
        page = names[first : first + LOOKUP_ROWS]
        # CROSS JOIN keeps SQLite to this order: a look-up in the index for each of ours, never a scan of kv.
        ours = f"WITH ours (t, k) AS (VALUES {','.join(('(?,?)',) * len(page))})"
        sql = f"{ours} SELECT tbl, key, sum FROM ours CROSS JOIN kv ON tbl = t AND key = k"
        for table, key, checksum in connection.execute(sql, [part for name in page for part in name]):
            found[table, key] = checksum
    return found


def checked_row(directory: Path, table: str, row: Sequence[Any]) -> tuple[bytes, bytes]:
    """(key, value) of a row (key, value, sum) of `table`."""
    key, value, checksum = row
    typed = isinstance(key, bytes) and isinstance(value, bytes)
    if not typed or kv_digest(table, key, value) != checksum:
        raise corrupt(directory, f"a row of table {table} does not match its checksum")
    return key, value


def entries_page(connection: sqlite3.Connection, directory: Path, since: int) -> Page:
    """The next journal entries after number `since`, each equal to its digest: (number, entry, digest)."""
    sql = "SELECT seq, key, kind, memo, digest FROM entries WHERE seq > ? ORDER BY seq LIMIT ?"
    heads = connection.execute(sql, (since, PAGE_ROWS)).fetchall()
    if not heads:
        return []
    postings: dict[int, list[tuple[bytes, str, int]]] = {head[0]: [] for head in heads}
    sql = "SELECT entry, owner, bucket, delta FROM postings WHERE entry BETWEEN ? AND ? ORDER BY entry, position"
    for seq, owner, bucket, delta in connection.execute(sql, (heads[0][0], heads[-1][0])):
        if seq not in postings:
            raise corrupt(directory, f"a posting belongs to journal entry {seq}, which is missing")
        postings[seq].append((owner, bucket, delta))
    page = []
    for seq, key, kind, memo, digest in heads:
        try:
            entry = Entry(key, kind, tuple((Account(o, b), delta) for o, b, delta in postings[seq]), memo)
        except IchibaError as error:
            raise corrupt(directory, f"journal entry {seq} is none: {error.what}") from error
        if entry.digest() != digest:
            raise corrupt(directory, f"journal entry {seq} does not match its digest")
        page.append((seq, entry, digest))
    return page


def rebuild(connection: sqlite3.Connection, directory: Path, tail: Tail, snapshot: Snapshot | None = None) -> Ledger:
    """The fold of the whole journal, equal in number and chain to `tail` and in balances to the stored
    ones. With a snapshot only the entries after it are folded; of those before, only the digests are read."""
    ledger, chain, count = Ledger(), EMPTY_TAIL.chain, 0
    if snapshot is not None:
        ledger = resume(connection, directory, snapshot)
        chain, count = snapshot.chain, snapshot.entries
    while page := entries_page(connection, directory, count):
        for seq, entry, digest in page:
            count += 1
            if seq != count:
                raise corrupt(directory, f"journal entry {count} is missing, the next is {seq}")
            try:
                applied = ledger.post(entry)
            except IchibaError as error:
                raise corrupt(directory, f"journal entry {seq} does not apply: {error.what}") from error
            if not applied:
                raise corrupt(directory, f"journal entry {seq} stands there twice")
            chain = next_chain(chain, digest)
    if (count, chain) != (tail.entries, tail.chain):
        raise corrupt(directory, f"{tail.entries} journal entries were committed, {count} others are there")
    sql = "SELECT owner, bucket, micro FROM balances"
    stored = {(owner, bucket): micro for owner, bucket, micro in connection.execute(sql)}
    folded = {(account.owner, account.bucket): micro for account, micro in ledger.balances().items()}
    for owner, bucket in sorted(stored.keys() | folded.keys()):
        found, right = stored.get((owner, bucket), 0), folded.get((owner, bucket), 0)
        if found != right:
            name = f"{owner.hex()[:12]}/{bucket}"
            raise corrupt(directory, f"account {name} is stored with {found} micro-credits, the journal gives {right}")
    ledger.check()
    return ledger


def take_snapshot(ledger: Ledger, tail: Tail) -> Snapshot:
    """The snapshot of `ledger`, which is the fold of the entries that `tail` counts."""
    balances = tuple((account.owner, account.bucket, micro) for account, micro in ledger.balances().items())
    flows = tuple((owner, astuple(flow)) for owner, flow in ledger.flows().items())
    return Snapshot(tail.entries, tail.chain, balances, flows)


def resume(connection: sqlite3.Connection, directory: Path, snapshot: Snapshot) -> Ledger:
    """The ledger of a snapshot, with the digests of its entries, which must be those of the journal's chain."""
    chain, count, digests = EMPTY_TAIL.chain, 0, {}
    sql = "SELECT seq, key, digest FROM entries WHERE seq <= ? ORDER BY seq"
    for seq, key, digest in connection.execute(sql, (snapshot.entries,)):
        count += 1
        if seq != count or not isinstance(digest, bytes):
            raise corrupt(directory, f"journal entry {count} is missing, the next is {seq}")
        digests[key] = digest
        chain = next_chain(chain, digest)
    if (count, chain, len(digests)) != (snapshot.entries, snapshot.chain, snapshot.entries):
        raise corrupt(directory, f"{snapshot.entries} journal entries are in the snapshot, {count} others are there")
    try:
        balances = {Account(owner, bucket): micro for owner, bucket, micro in snapshot.balances}
        return Ledger.resumed(balances, {owner: Flow(*flow) for owner, flow in snapshot.flows}, digests)
    except (IchibaError, TypeError) as error:
        raise corrupt(directory, f"the snapshot of the ledger is none: {error}"[:300]) from error
