"""Reading the store with every check on: rows against their checksums, the journal against chain and
balances.

Promises that a row handed out is the row that was committed, and that a ledger handed out is the fold of
every committed entry and nothing else. Functions raise CorruptStore with what is wrong first, and
sqlite3.Error.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from market.ledger import Account, Entry, Ledger
from peer.store_schema import EMPTY_TAIL, Tail, corrupt, kv_digest, next_chain
from protocol.errors import IchibaError

__all__ = ["PAGE_ROWS", "check_rows", "checked_row", "entries_page", "rebuild"]

PAGE_ROWS: Final = 256  # rows fetched per query of an iterator, so that no read stays open across a commit

Page = list[tuple[int, Entry, bytes]]


def check_rows(connection: sqlite3.Connection, directory: Path, tail: Tail) -> None:
    """Check every key-value row, and that they are together those that `tail` says were committed."""
    found = EMPTY_TAIL
    for table, *row in connection.execute("SELECT tbl, key, value, sum FROM kv"):
        checked_row(directory, table, row)
        found = found.with_rows(added=1, delta=int.from_bytes(row[2], "little"))
    if (found.rows, found.rows_sum) != (tail.rows, tail.rows_sum):
        raise corrupt(directory, f"{tail.rows} key-value rows were committed, {found.rows} others are there")


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


def rebuild(connection: sqlite3.Connection, directory: Path, tail: Tail) -> Ledger:
    """The fold of the whole journal, equal in number and chain to `tail` and in balances to the stored
    ones."""
    ledger, chain, count = Ledger(), EMPTY_TAIL.chain, 0
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
