"""Put a damaged store aside and a backup in its place: `python -m peer.store_restore DIRECTORY [BACKUP]`.

Promises to delete nothing: the damaged files move to a numbered folder beside the new ones. Without a
backup the next start makes an empty store and fetches the swarm's ledger from other peers; what only this
peer held is lost, above all vouchers it received and has not claimed.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from peer.store_lock import DirectoryLock
from peer.store_schema import DATABASE_NAME
from peer.store_sqlite import refuse_strange_file, synchronise, translated
from protocol.errors import IchibaError, NotFound

__all__ = ["restore"]


def restore(directory: Path, backup: Path | None) -> Path:
    """Move the store's files aside and copy `backup`, if any, to their place; returns the folder they are
    in.

    The next `Store.open` verifies the copy. Raises AlreadyRunning while a daemon holds the directory,
    NotFound, CorruptStore for a backup that is no store, DiskFull, StoreFailed.
    """
    directory = directory.absolute()
    if not directory.is_dir() or (backup is not None and not backup.is_file()):
        raise NotFound(f"no directory {directory}" if not directory.is_dir() else f"no file {backup}")
    with translated(directory):
        lock = DirectoryLock(directory)
        try:
            draft = directory / f"{DATABASE_NAME}.restored"
            if backup is not None:
                refuse_strange_file(backup.absolute())
                shutil.copyfile(backup, draft)
                draft.chmod(0o600)
                synchronise(draft)
            number = 1 + len(list(directory.glob("damaged-*")))
            aside = directory / f"damaged-{number}"
            aside.mkdir(mode=0o700)
            # The database moves first: stopped half-way, a log without its database is refused, while a database
            # without its log would open in an older state.
            for suffix in ("", "-wal", "-shm", "-journal"):
                file = directory / f"{DATABASE_NAME}{suffix}"
                if file.exists():
                    file.rename(aside / file.name)
            synchronise(directory)
            if backup is not None:
                draft.rename(directory / DATABASE_NAME)
                synchronise(directory)
        finally:
            lock.release()
    return aside


def main(arguments: list[str]) -> int:
    """The command line: prints where the damaged files went. Returns the exit code."""
    if not 1 <= len(arguments) <= 2:
        print("usage: python -m peer.store_restore DIRECTORY [BACKUP]", file=sys.stderr)
        return 2
    try:
        aside = restore(Path(arguments[0]), Path(arguments[1]) if len(arguments) == 2 else None)
    except IchibaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"the old files are in {aside}; start the daemon: it verifies the store before it uses it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
