"""Landlock: takes from this process, for ever, every file and every network port it was not given.

Works for an ordinary user without namespaces, so it is what hides the home, the keys and the ledger when
bubblewrap is missing. It knows nothing of jobs. Source: Documentation/userspace-api/landlock.rst; rights by
version of its interface (1 = Linux 5.13, 4 = network, 6 = signals and abstract sockets).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from typing import Final

__all__ = ["LandlockUnavailable", "landlock_version", "restrict"]

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same numbers on every architecture
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL = 1, 2, 4, 8, 1 << 14, 1 << 15
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_RIGHTS_OF: Final = {1: 13, 2: 14, 3: 15, 4: 15}  # how many file rights a version knows; 16 from version 5 on
_READING: Final = _EXECUTE | _READ_FILE | _READ_DIR
_ON_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL


class LandlockUnavailable(OSError):
    """The kernel has no Landlock, or refused the rules. The caller decides whether it may go on without."""


def landlock_version() -> int:
    """The version of the kernel's Landlock interface; 0 where there is none."""
    found: int = ctypes.CDLL(None, use_errno=True).syscall(_CREATE, None, 0, 1)
    return max(found, 0)


def restrict(*, readable: Iterable[str], writable: Iterable[str], devices: Iterable[str] = ()) -> int:
    """Leave this thread and its later children only these trees (absolute paths; absent ones are skipped).

    readable: read and execute. writable: also create, change and remove, but no devices or sockets. devices:
    existing files to read and write, such as /dev/null. All TCP ports, signals to outside and outside abstract
    sockets are refused too where the kernel can. Returns the version used. Call while single-threaded: older
    versions restrict the calling thread only. Raises LandlockUnavailable.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = landlock_version()
    if not version:
        raise LandlockUnavailable(errno.ENOSYS, "this kernel has no Landlock (Linux 5.13 and later have)")
    handled = (1 << _RIGHTS_OF.get(version, 16)) - 1
    # struct landlock_ruleset_attr grew twice: a kernel refuses fields it does not know.
    attributes = struct.pack("QQQ", handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    attributes = attributes[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = libc.syscall(_CREATE, attributes, len(attributes), 0)
    if rules < 0:
        raise LandlockUnavailable(ctypes.get_errno(), "landlock_create_ruleset")
    changing = handled & ~(_IOCTL | _MAKE_CHAR | _MAKE_BLOCK | _MAKE_SOCK)
    try:
        for paths, rights in (
            (readable, _READING),
            (writable, changing),
            (devices, _READ_FILE | _WRITE_FILE),
        ):
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    _allow(libc, rules, path, rights & handled)
        if libc.prctl(38, 1, 0, 0, 0) or libc.syscall(_RESTRICT, rules, 0):
            raise LandlockUnavailable(ctypes.get_errno(), "landlock_restrict_self")
    finally:
        os.close(rules)
    return version


def _allow(libc: ctypes.CDLL, rules: int, path: str, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(path):
            rights &= _ON_FILES  # the rights of a directory on a file are EINVAL
        # struct landlock_path_beneath_attr is packed: u64 allowed_access, s32 parent_fd.
        if libc.syscall(_ADD, rules, 1, struct.pack("=Qi", rights, place), 0):
            raise LandlockUnavailable(ctypes.get_errno(), f"landlock_add_rule {path}")
    finally:
        os.close(place)
