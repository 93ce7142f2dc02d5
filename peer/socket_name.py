"""A name for a Unix socket that fits the kernel's limit, however long the path of its directory is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

__all__ = ["socket_name"]

_NAME_BYTES_MAX: Final = 107  # sun_path of unix(7) has 108, one of them the zero at the end


@contextmanager
def socket_name(path: Path) -> Iterator[str]:
    """A name of the socket at `path`, to bind or connect to inside the block. Raises OSError without a directory."""
    if len(os.fsencode(path)) <= _NAME_BYTES_MAX:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
