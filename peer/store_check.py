"""Verify a whole store while its daemon uses it: `python -m peer.store_check DIRECTORY`.

Promises to read one state of the file, the last committed when it began, and to write nothing. It is a process of its
own, at the lowest priority: a store of gigabytes takes minutes of one core, which the daemon must not feel. Exit code
0: every page, row, entry and balance is what was committed; else one line of JSON says what is wrong, as the errors of
peer/store_schema.py do.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from peer.store_read_sqlite import check_events, check_rows, rebuild
from peer.store_schema import DATABASE_NAME, MIGRATIONS, Tables, Tail, corrupt
from peer.store_sqlite import (
    read_meta,
    read_only,
    refuse_damage,
    refuse_strange_file,
    refuse_strange_schema,
    translated,
)
from protocol import params
from protocol.codec import decode
from protocol.errors import IchibaError, NotFound, RemoteProtocolError

__all__ = ["check"]


def check(directory: Path) -> dict[str, int]:
    """Check all of the store in `directory`; returns how many rows of each kind were read.

    Raises NotFound, CorruptStore, StoreFailed, StoreBusy.
    """
    path = directory.absolute() / DATABASE_NAME
    if not path.is_file():
        raise NotFound(f"no store in {directory}", next_step="run `ichiba up` once")
    with translated(directory):
        refuse_strange_file(path)
        with read_only(path) as connection:
            meta = read_meta(connection, directory)
            refuse_strange_schema(connection, directory, MIGRATIONS[: int(meta["schema_version"])])
            refuse_damage(connection, directory)
            try:
                tail = decode(Tail, meta["tail"], bytes_max=params.STORE_VALUE_BYTES_MAX)
                tables = decode(Tables, meta["tables"], bytes_max=params.STORE_VALUE_BYTES_MAX)
            except (RemoteProtocolError, KeyError) as error:
                raise corrupt(directory, f"meta does not decode: {error}") from error
            if check_rows(connection, directory, tail) != tables:
                raise corrupt(directory, "key-value rows stand in other tables than they were committed to")
            rebuild(connection, directory, tail)
            lines = check_events(connection, directory)
    return {"rows": tail.rows, "entries": tail.entries, "events": lines}


def main(arguments: list[str]) -> int:
    """The command line. Returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m peer.store_check DIRECTORY", file=sys.stderr)
        return 2
    os.nice(19)
    try:
        found = check(Path(arguments[0]))
    except IchibaError as error:
        print(json.dumps(error.as_dict()))
        return error.exit_code
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
