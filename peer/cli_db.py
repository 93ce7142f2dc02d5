"""Commands that look into the store: db tables, db rows, db query."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import click

from peer.cli_output import Terminal, common
from protocol import params

__all__ = ["db"]

_timeout = click.option(
    "--timeout", type=click.FloatRange(0.1, 600), default=10, show_default=True, help="Seconds the question may take."
)
_limit = click.option(
    "--limit", type=click.IntRange(1, params.DB_ROWS_MAX), default=20, show_default=True, help="Rows at most."
)


@click.group()
def db() -> None:
    """Look into this peer's store, without changing it.

    Works while the daemon runs, and without one. `sqlite-utils` and the sqlite3 shell read the same file, ichiba.db in
    the data directory; open it read-only.
    """


@db.command()
@_timeout
@common
def tables(terminal: Terminal, timeout: float) -> None:
    """List the tables of the store and how many rows they have.

    \b
    ichiba db tables
    """
    from peer.store_look_sqlite import looking

    with looking(terminal.data_dir, timeout_s=timeout) as look:
        found = look.tables()
    _show(terminal, "tables", found)


@db.command()
@click.argument("table")
@_limit
@click.option("--offset", type=click.IntRange(0), default=0, help="Rows to leave out first.")
@_timeout
@common
def rows(terminal: Terminal, table: str, limit: int, offset: int, timeout: float) -> None:
    """Show rows of TABLE, a name that `ichiba db tables` lists.

    Rows of a key-value table are checked against their checksums and shown decoded. Secrets of deals are hidden.

    \b
    ichiba db rows receipts --limit 5
    ichiba db rows entries --json
    """
    from peer.store_look_sqlite import looking

    with looking(terminal.data_dir, timeout_s=timeout) as look:
        found = look.rows(table, limit=limit, offset=offset)
    _show(terminal, table, found)


@db.command()
@click.argument("sql")
@_limit
@_timeout
@common
def query(terminal: Terminal, sql: str, limit: int, timeout: float) -> None:
    """Run one SELECT over the store. Anything else is refused.

    \b
    ichiba db query "SELECT kind, COUNT(*) AS entries FROM entries GROUP BY kind"
    """
    from peer.store_look_sqlite import looking

    with looking(terminal.data_dir, timeout_s=timeout) as look:
        found, more = look.query(sql, limit=limit)
    _show(terminal, "rows", found)
    if more:
        terminal.note(f"there are more than {limit} rows; see --limit")


def _show(terminal: Terminal, title: str, found: Iterable[Mapping[str, Any]]) -> None:
    listed = list(found)
    for row in listed:
        terminal.record("ichiba.db-row/1", {"table": title, "row": dict(row)})
    names = list(dict.fromkeys(name for row in listed for name in row))
    terminal.table(title, names, [[_cell(row.get(name, "")) for name in names] for row in listed])


def _cell(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
