"""Raw system calls for the attacks, and the one exception that means "refused". Runs inside the sandbox: no trio.

Numbers are those of x86_64 that worker/seccomp.py does not name because nothing of ours may ever make the call.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Mapping
from typing import Final

from worker.seccomp import NUMBERS

Decoys = Mapping[str, str | int]
MIB: Final = 1024 * 1024
libc = ctypes.CDLL(None, use_errno=True)

NUMBER: Final = NUMBERS | {
    "semget": 64, "semctl": 66, "flock": 73, "chown": 92, "syslog": 103, "setuid": 105, "setgroups": 116, "capset": 126,
    "mknod": 133, "setpriority": 141, "sched_setscheduler": 144, "mlockall": 151, "modify_ldt": 154, "pivot_root": 155,
    "chroot": 161, "acct": 163, "settimeofday": 164, "umount2": 166, "swapon": 167, "reboot": 169, "sethostname": 170,
    "iopl": 172, "init_module": 175, "quotactl": 179, "setxattr": 188, "timer_create": 222, "clock_settime": 227,
    "mq_open": 240, "mq_unlink": 241, "kexec_load": 246, "ioprio_set": 251, "migrate_pages": 256, "splice": 275,
    "tee": 276, "vmsplice": 278, "signalfd4": 289, "inotify_init1": 294, "fanotify_init": 300,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313,
    "sched_setattr": 314, "execveat": 322, "move_mount": 429, "mount_setattr": 442,
}  # fmt: skip


class Refused(Exception):
    """A raw system call was refused."""


def call(name: str, *arguments: object) -> int:
    """What the raw system call `name` returned. Raises Refused with the errno's name."""
    ctypes.set_errno(0)
    sent = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result: int = libc.syscall(ctypes.c_long(NUMBER[name]), *sent)
    if result < 0:
        raise Refused(f"{name}: {errno.errorcode.get(ctypes.get_errno(), 'refused')}")
    return result


def said(name: str, *arguments: object) -> str:
    """Words if the raw system call worked. Raises Refused."""
    return f"{name} returned {call(name, *arguments)}"


def any_of(*tries: Callable[[], object]) -> str:
    """The words of those of `tries` that got through; if none did, raises Refused with what stopped the first."""
    through, stopped = [], ""
    for attempt in tries:
        try:
            words = attempt()
        except (Refused, OSError) as refusal:
            stopped = stopped or str(refusal)
            continue
        if words:
            through.append(str(words))
    if not through:
        raise Refused(stopped or "no effect")
    return ", ".join(through)


def inputs(decoys: Decoys) -> list[int]:
    """The descriptors that came with the job."""
    import stat

    found = []
    for number in range(3, 256):
        if number == decoys["replies"]:
            continue
        try:
            if stat.S_ISREG(os.fstat(number).st_mode):
                found.append(number)
        except OSError:
            continue
    return found
