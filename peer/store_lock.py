"""One daemon for one data directory, held by the kernel for as long as the process lives.

Promises that a crash never leaves a stale lock: the kernel drops a `flock` with its process, and the
process id in the file only serves the message. The file is never deleted: two processes could then hold two
locks of one name.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from peer.store_schema import LOCK_NAME, AlreadyRunning

__all__ = ["DirectoryLock"]


class DirectoryLock:
    """The lock of `directory`, taken when made. Raises AlreadyRunning, OSError."""

    def __init__(self, directory: Path) -> None:
        # Python opens without inheritance across exec, so a worker that outlives the daemon does not hold it.
        self._descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = os.pread(self._descriptor, 32, 0).strip()
            os.close(self._descriptor)
            raise AlreadyRunning(directory, int(said) if said.isdigit() else 0) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, b"%d\n" % os.getpid(), 0)

    def release(self) -> None:
        """Give the directory back. A second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
