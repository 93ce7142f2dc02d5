"""System-call filters as Berkeley packet filter programs, assembled by hand: an allow-list, all else is refused.

Two tiers. BASE lets Python and torch start, and children run, inside the sandbox. GRAPH is what a stranger's
Program runs under, installed after torch is loaded and warm: no new process, no program start, no file opened
for writing, no socket. GRAPH is a subset of BASE by construction. It knows nothing of namespaces or jobs.

Needs no libseccomp: the program is an array of `struct sock_filter` (8 bytes each: code u16, jump-true u8,
jump-false u8, constant u32). Source: Documentation/userspace-api/seccomp_filter.rst of the Linux kernel.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import platform
import struct
from typing import Final

__all__ = ["NUMBERS", "FilterUnavailable", "Tier", "filter_program", "install"]

# x86_64 numbers of arch/x86/entry/syscalls/syscall_64.tbl. Every call that is allowed, and every call the canary
# tries and must see refused, has its number here; a call without one cannot be allowed by mistake.
NUMBERS: Final[dict[str, int]] = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
    "rt_sigreturn": 15, "ioctl": 16, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21,
    "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25, "msync": 26, "mincore": 27, "madvise": 28,
    "shmget": 29, "shmctl": 31,
    "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35, "getpid": 39, "socket": 41, "sendto": 44,
    "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "getsockname": 51, "getpeername": 52,
    "getsockopt": 55, "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "exit": 60, "wait4": 61, "kill": 62,
    "uname": 63, "msgget": 68, "msgctl": 71, "fcntl": 72, "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77,
    "getcwd": 79, "chdir": 80, "fchdir": 81, "rename": 82, "mkdir": 83, "rmdir": 84, "link": 86, "unlink": 87,
    "symlink": 88, "readlink": 89, "chmod": 90, "fchmod": 91, "umask": 95, "gettimeofday": 96, "getrlimit": 97,
    "getrusage": 98, "sysinfo": 99, "times": 100, "ptrace": 101, "getuid": 102, "getgid": 104, "geteuid": 107,
    "getegid": 108, "setpgid": 109, "getppid": 110, "getpgrp": 111, "setsid": 112, "getgroups": 115,
    "getresuid": 118, "getresgid": 120, "getpgid": 121, "getsid": 124, "capget": 125, "rt_sigpending": 127,
    "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131, "personality": 135, "statfs": 137,
    "fstatfs": 138, "getpriority": 140, "sched_getparam": 143, "sched_getscheduler": 145,
    "sched_get_priority_max": 146, "sched_get_priority_min": 147, "prctl": 157, "arch_prctl": 158,
    "setrlimit": 160, "mount": 165, "gettid": 186, "tkill": 200, "time": 201, "futex": 202,
    "sched_setaffinity": 203, "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218,
    "restart_syscall": 219, "fadvise64": 221, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "tgkill": 234, "waitid": 247, "add_key": 248,
    "keyctl": 250, "openat": 257, "mkdirat": 258, "newfstatat": 262, "unlinkat": 263, "renameat": 264,
    "linkat": 265, "symlinkat": 266, "readlinkat": 267, "fchmodat": 268, "faccessat": 269, "pselect6": 270,
    "ppoll": 271, "unshare": 272, "set_robust_list": 273, "get_robust_list": 274, "utimensat": 280,
    "epoll_pwait": 281, "fallocate": 285, "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293,
    "preadv": 295, "pwritev": 296, "perf_event_open": 298, "prlimit64": 302, "setns": 308, "getcpu": 309,
    "process_vm_readv": 310, "renameat2": 316, "seccomp": 317, "getrandom": 318, "memfd_create": 319, "bpf": 321,
    "userfaultfd": 323, "membarrier": 324, "copy_file_range": 326, "statx": 332, "rseq": 334,
    "io_uring_setup": 425, "open_tree": 428, "fsopen": 430, "pidfd_open": 434, "clone3": 435, "close_range": 436,
    "pidfd_getfd": 438, "faccessat2": 439, "landlock_create_ruleset": 444, "landlock_add_rule": 445,
    "landlock_restrict_self": 446, "memfd_secret": 447, "futex_waitv": 449,
    "getitimer": 36, "alarm": 37, "setitimer": 38, "socketpair": 53, "flock": 73, "getxattr": 191, "lgetxattr": 192,
    "fgetxattr": 193, "listxattr": 194, "llistxattr": 195, "flistxattr": 196,
}  # fmt: skip

# What a running graph needs: memory, threads, time, reading, and writing to descriptors it already holds.
_GRAPH: Final = """read write close fstat lseek munmap mprotect brk mremap madvise mincore msync rt_sigaction
rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack pread64 readv writev access
sched_yield pause nanosleep select poll ppoll pselect6 getpid gettid getppid exit exit_group uname getcwd
gettimeofday getrlimit getrusage sysinfo times time getuid getgid geteuid getegid getgroups getresuid getresgid
getpgrp getpgid getsid statfs fstatfs getpriority sched_getparam sched_getscheduler sched_get_priority_max
sched_get_priority_min sched_getaffinity futex futex_waitv set_tid_address set_robust_list
get_robust_list restart_syscall fadvise64 clock_gettime clock_getres clock_nanosleep stat lstat newfstatat statx
faccessat faccessat2 readlink readlinkat getdents64 epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2
getrandom rseq membarrier getcpu preadv arch_prctl umask"""

# What starting Python and torch, receiving the request, and (in a script job) children and scratch files add.
_BASE_ONLY: Final = """pwrite64 pwritev fork vfork execve wait4 waitid pipe pipe2 dup dup2 dup3 chdir fchdir truncate
ftruncate rename renameat renameat2 mkdir mkdirat rmdir unlink unlinkat link linkat symlink symlinkat chmod
fchmodat fsync fdatasync fallocate copy_file_range setsid setpgid setrlimit capget recvmsg sendmsg sendto
recvfrom shutdown getsockname getpeername getsockopt close_range landlock_create_ruleset landlock_add_rule
landlock_restrict_self alarm getitimer setitimer getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr"""

_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_NAMESPACES: Final = 0x7E020080  # every CLONE_NEW* flag: NS, CGROUP, UTS, IPC, USER, PID, NET, TIME
_CLONE_THREAD: Final = 0x10000
# Mappings that RLIMIT_DATA does not count: stacks, and shared memory without a file. Below a control group it is the
# memory cap, so a graph may have neither; a script, which runs in a control group only, may share memory.
_GROWS_DOWN, _ANONYMOUS, _SHARING, _PRIVATE = 0x100, 0x20, 0x3, 0x2
_LOW_32: Final = 0xFFFFFFFF  # the kernel reads an int argument's low half; the high half must not hide a value
_TTY_IOCTLS: Final = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIO(N)CLEX
_PRCTLS: Final = (15, 16, 22, 38, 39, 0x53564D41)  # SET/GET_NAME, SET_SECCOMP, SET/GET_NO_NEW_PRIVS, SET_VMA
_FCNTLS: Final = (0, 1, 2, 3, 4, 1030)  # DUPFD GETFD SETFD GETFL SETFL DUPFD_CLOEXEC; no leases, locks or owners
_LOCKS: Final = (5, 6, 7, 36, 37, 38)  # GETLK SETLK SETLKW and their OFD forms: databases and caches of scripts

_ARCH_X86_64: Final = 0xC000003E
_X32_BIT: Final = 0x40000000
_KILL: Final = 0x80000000  # SECCOMP_RET_KILL_PROCESS
_ALLOW: Final = 0x7FFF0000
_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06

Condition = tuple[int, int, int]  # argument number, mask, value: (argument & mask) == value


class Tier(enum.Enum):
    """Which allow-list: BASE to start Python and children, GRAPH to execute a Program."""

    BASE = "base"
    GRAPH = "graph"


class FilterUnavailable(OSError):
    """This kernel or processor cannot take the filter. The caller must stop: nothing runs unfiltered."""


def _refuse(number: int) -> int:
    return 0x00050000 | number  # SECCOMP_RET_ERRNO


def _argument_rules(tier: Tier, only_pid: int | None) -> dict[str, list[list[Condition]]]:
    """Calls allowed only with certain arguments: any of the lists must hold whole. 64-bit values by their low half."""
    rules: dict[str, list[list[Condition]]] = {
        "ioctl": [[(1, _LOW_32, request)] for request in _TTY_IOCTLS],
        "prctl": [[(0, _LOW_32, option)] for option in _PRCTLS],
        "fcntl": [[(1, _LOW_32, command)] for command in _FCNTLS],
        "prlimit64": [[(0, _LOW_32, 0)]],  # itself only; raising needs a capability that it lacks
        # SET_MODE_FILTER without a listener (a further filter only ever removes), and GET_ACTION_AVAIL.
        "seccomp": [[(0, _LOW_32, 1), (1, 0x8, 0)], [(0, _LOW_32, 2)]],
        "clone": [[(0, _NAMESPACES, 0)]],
        "mmap": [[(3, _GROWS_DOWN, 0)]],
        "tgkill": [[]] if only_pid is None else [[(0, _LOW_32, only_pid)]],  # abort() signals its own group
    }
    own = [[(0, _LOW_32, 0)], [(0, _LOW_32, only_pid)]] if only_pid is not None else [[]]
    rules["sched_setaffinity"] = own  # or any process of the owner's could be moved
    if tier is Tier.GRAPH:
        rules["clone"] = [[(0, _NAMESPACES | _CLONE_THREAD, _CLONE_THREAD)]]
        rules["mmap"] = [[(3, _GROWS_DOWN | _ANONYMOUS, 0)], [(3, _GROWS_DOWN | _SHARING, _PRIVATE)]]
        rules["openat"] = [[(2, _WRITING, 0)]]
        rules["open"] = [[(1, _WRITING, 0)]]
    else:
        rules["openat"] = rules["open"] = [[]]
        # By path only (some bit of its address is set): the inputs are the owner's files, lent as descriptors, and an
        # ordinary owner's worker is their owner too. For the same reason there is no fchmod.
        rules["utimensat"] = [[(1, 1 << bit, 1 << bit)] for bit in range(32)]
        # sqlite3 locks so; a write lock takes a descriptor open for writing. No flock: that locks the lent inputs.
        rules["fcntl"] += [[(1, _LOW_32, command)] for command in _LOCKS]
        rules["socketpair"] = [[(0, _LOW_32, 1)]]  # AF_UNIX, both ends one's own: asyncio and multiprocessing use it
        rules["kill"] = rules["tkill"] = [[]] if only_pid is None else [[(0, _LOW_32, only_pid)]]
    return rules


def _statement(code: int, constant: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, constant)


def _argument_block(alternatives: list[list[Condition]]) -> list[bytes]:
    """Statements that allow if one of `alternatives` holds, else refuse with EPERM."""
    block: list[bytes] = []
    for conditions in alternatives:
        for place, (argument, mask, value) in enumerate(conditions):
            skip = (len(conditions) - 1 - place) * 3 + 1  # over the rest of this alternative and its allow
            block += [
                _statement(_LOAD, 16 + 8 * argument),  # seccomp_data.args[argument], low half (little-endian)
                _statement(_AND, mask & _LOW_32),
                _statement(_EQUAL, value, 0, skip),
            ]
        block.append(_statement(_RETURN, _ALLOW))
    block.append(_statement(_RETURN, _refuse(errno.EPERM)))
    return block


def filter_program(tier: Tier, *, only_pid: int | None = None) -> bytes:
    """The filter of `tier` for x86_64, at most 4096 statements of 8 bytes.

    only_pid: outside a process namespace, signals may go to this process only. Another architecture (int 0x80)
    and the x32 interface kill the process, because their numbers mean other calls. clone3 answers ENOSYS, so that
    libc falls back to clone, whose flags a filter can read; memfd_create too, because no quota counts its memory.
    """
    program = [
        _statement(_LOAD, 4),  # seccomp_data.arch
        _statement(_EQUAL, _ARCH_X86_64, 1, 0),
        _statement(_RETURN, _KILL),
        _statement(_LOAD, 0),  # seccomp_data.nr
        _statement(_AT_LEAST, _X32_BIT, 0, 1),
        _statement(_RETURN, _KILL),
    ]
    for name in ("clone3", "memfd_create"):
        program += [_statement(_EQUAL, NUMBERS[name], 0, 1), _statement(_RETURN, _refuse(errno.ENOSYS))]
    rules = _argument_rules(tier, only_pid)
    for name in (_GRAPH if tier is Tier.GRAPH else f"{_GRAPH} {_BASE_ONLY}").split():
        assert name not in rules, f"{name} is both free and restricted"
        program += [_statement(_EQUAL, NUMBERS[name], 0, 1), _statement(_RETURN, _ALLOW)]
    for name, alternatives in rules.items():
        block = _argument_block(alternatives)
        assert len(block) <= 255, f"a jump over {len(block)} statements does not fit"
        program += [_statement(_EQUAL, NUMBERS[name], 0, len(block)), *block]
    program.append(_statement(_RETURN, _refuse(errno.EPERM)))
    assert len(program) <= 4096, "BPF_MAXINSNS"
    return b"".join(program)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("statements", ctypes.c_char_p)]  # ctypes wants a list


def install(program: bytes) -> None:
    """Put every thread of this process under `program`, for ever. Raises FilterUnavailable."""
    if platform.machine() != "x86_64" or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise FilterUnavailable(errno.ENOSYS, f"no filter for {platform.machine()}, only for x86_64")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise FilterUnavailable(ctypes.get_errno(), "no_new_privs")
    argument = _Program(len(program) // 8, program)
    # SECCOMP_SET_MODE_FILTER with TSYNC: threads that libraries started earlier come under it too.
    if libc.syscall(NUMBERS["seccomp"], 1, 1, ctypes.byref(argument)) != 0:
        raise FilterUnavailable(ctypes.get_errno(), "seccomp")
