"""Attacks on our own sandbox, tried from inside by a canary worker: a level is what they prove, not what is installed.

Each attempt is a function that returns words when it got through and raises, or returns "", when it was stopped.
The daemon sets up decoys (a secret file, listeners, its own process) and names the attempts. Bounded on purpose:
a sandbox that stops nothing must survive being probed. It runs no code it was sent, and knows nothing of jobs.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from worker.frames import Attempted
from worker.seccomp import NUMBERS

__all__ = ["ATTEMPTS", "CONTAINED", "FILTERED", "GRAPH", "LIMITS", "NAMESPACED", "WILD", "rehearse"]

Decoys = Mapping[str, str | int]
_MIB: Final = 1024 * 1024
_libc = ctypes.CDLL(None, use_errno=True)


class _Stopped(Exception):
    """A raw system call was refused."""


def _call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char]) -> str:
    """Words if the raw system call `name` worked. Raises _Stopped with the errno's name."""
    ctypes.set_errno(0)
    sent = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = _libc.syscall(ctypes.c_long(NUMBERS[name]), *sent)
    if result < 0:
        raise _Stopped(errno.errorcode.get(ctypes.get_errno(), "refused"))
    return f"{name} returned {result}"


def _any_call(*calls: Callable[[], str]) -> str:
    """The words of those of `calls` that got through."""
    through = []
    for call in calls:
        try:
            through.append(call())
        except (_Stopped, OSError):
            continue
    return ", ".join(word for word in through if word)


# --- files -----------------------------------------------------------------------------------------------------
def read_secret(decoys: Decoys) -> str:
    """The daemon's keys and ledger, by a file that everyone may read."""
    return f"read {len(Path(str(decoys['secret'])).read_bytes())} bytes of a file of the daemon"


def read_passwords(_: Decoys) -> str:
    return f"read {len(Path('/etc/passwd').read_bytes())} bytes of /etc/passwd"


def list_home(decoys: Decoys) -> str:
    return f"{len(os.listdir(str(decoys['home'])))} names in the home directory"


def see_outside(decoys: Decoys) -> str:
    """Even whether a file of the daemon exists is not for a stranger's code."""
    os.stat(str(decoys["secret"]))
    return "the daemon's files are seen, though not read"


def see_host_root(_: Decoys) -> str:
    return ", ".join(sorted({"root", "home", "etc", "var", "boot"} & set(os.listdir("/"))))


def write_outside(decoys: Decoys) -> str:
    through: list[str] = []
    places = ("/", "/tmp", "/var/tmp", "/usr", "/dev", "/run", "/etc", str(decoys["outside"]), str(decoys["home"]))
    for folder in places:
        path = os.path.join(folder, f"ichiba-canary-{os.getpid()}")
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except OSError:
            continue
        os.unlink(path)
        through.append(folder)
    return ", ".join(through)


def fill_disk(_: Decoys) -> str:
    """64 MiB in files of 4 MiB wherever a file can be made; the sized scratch stops it well below."""
    written = 0
    made: list[str] = []
    for folder in ("/scratch", "/dev/shm", "/tmp", "/dev", "/", os.getcwd()):
        try:
            while written < 64 * _MIB:
                path = os.path.join(folder, f"ichiba-fill-{os.getpid()}-{len(made)}")
                with open(path, "xb", buffering=0) as file:
                    made.append(path)
                    for _part in range(4):
                        written += file.write(bytes(_MIB))
        except OSError:
            continue
    for path in made:
        os.unlink(path)
    return f"wrote {written // _MIB} MiB" if written >= 64 * _MIB else ""


# --- network ---------------------------------------------------------------------------------------------------
def connect_tcp(decoys: Decoys) -> str:
    socket.create_connection(("127.0.0.1", int(decoys["tcp"])), 1).close()
    return "connected to the daemon's host"


def send_udp(decoys: Decoys) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("127.0.0.1", int(decoys["udp"])))
    return "sent a datagram"


def connect_abstract(decoys: Decoys) -> str:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect("\0" + str(decoys["abstract"]))
    return "connected to an abstract Unix socket"


def connect_path(decoys: Decoys) -> str:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(decoys["unix"]))
    return "connected to a Unix socket of the daemon"


def raw_sockets(_: Decoys) -> str:
    def opened(family: int, kind: int) -> str:
        socket.socket(family, kind).close()
        return f"family {family}"

    # netlink, packet, vsock, the kernel's ciphers
    return _any_call(*(lambda f=f, k=k: opened(f, k) for f, k in ((16, 3), (17, 3), (40, 1), (38, 5))))


# --- other processes -------------------------------------------------------------------------------------------
def signal_daemon(decoys: Decoys) -> str:
    os.kill(int(decoys["pid"]), signal.SIGCONT)
    return "signalled the daemon"


def move_daemon(decoys: Decoys) -> str:
    os.sched_setaffinity(int(decoys["pid"]), os.sched_getaffinity(0))
    return "chose the daemon's processors"


def ptrace_daemon(decoys: Decoys) -> str:
    return _call("ptrace", 0x4206, int(decoys["pid"]), 0, 0)  # PTRACE_SEIZE


def read_daemon_memory(decoys: Decoys) -> str:
    return _call("process_vm_readv", int(decoys["pid"]), 0, 0, 0, 0, 0)


def steal_descriptor(decoys: Decoys) -> str:
    return _call("pidfd_open", int(decoys["pid"]), 0)


def read_environ(decoys: Decoys) -> str:
    data = Path("/proc", str(decoys["pid"]), "environ").read_bytes()
    return f"{len(data)} bytes of the daemon's environment"


def list_processes(decoys: Decoys) -> str:
    data = Path("/proc", str(decoys["pid"]), "cmdline").read_bytes()
    return f"{len(data)} bytes of the daemon's command line"


def own_environ(_: Decoys) -> str:
    known = {"PATH", "HOME", "LANG", "PWD", "LC_CTYPE", "TMPDIR", "SHLVL", "_"}
    return ", ".join(sorted(name for name in os.environ if name not in known and not name.endswith("_THREADS")))


def inherited_descriptors(decoys: Decoys) -> str:
    """Everything above stderr that is neither the job's socket nor the replies' pipe."""
    ours = {int(decoys["replies"]), int(decoys["job"])}
    found = []
    for number in range(3, 1024):
        try:
            os.fstat(number)
        except OSError:
            continue
        if number not in ours:
            found.append(str(number))
    return " ".join(found)


def leave_grandchild(_: Decoys) -> str:
    """A process that leaves its session and closes all it shares; the daemon looks for it after the end."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            _libc.prctl(15, b"ichiba-left", 0, 0, 0)
            os.closerange(0, 1024)
            signal.pause()
        os._exit(0)
    os.wait()
    return ""


# --- the kernel ------------------------------------------------------------------------------------------------
def user_namespace(_: Decoys) -> str:
    return _call("unshare", 0x10000000)


def clone3_namespace(_: Decoys) -> str:
    words = _call("clone3", struct.pack("8Q", 0x10000000, 0, 0, 0, signal.SIGCHLD, 0, 0, 0), 64)
    if words.endswith(" 0"):
        os._exit(0)
    return words


def mount(_: Decoys) -> str:
    return _any_call(
        lambda: _call("mount", b"none", b"/scratch", b"tmpfs", 0, 0),
        lambda: _call("mount", b"none", b"/tmp", b"tmpfs", 0, 0),
        lambda: _call("open_tree", -100, b"/", 0),
        lambda: _call("fsopen", b"tmpfs", 0),
    )


def keyrings(_: Decoys) -> str:
    return _any_call(lambda: _call("keyctl", 0, -4, 1), lambda: _call("add_key", b"user", b"x", b"v", 1, -3))


def io_uring(_: Decoys) -> str:
    return _call("io_uring_setup", 4, ctypes.create_string_buffer(120))


def bpf(_: Decoys) -> str:
    return _call("bpf", 0, ctypes.create_string_buffer(struct.pack("4I", 2, 4, 4, 1) + bytes(112)), 128)


def perf(_: Decoys) -> str:
    attributes = ctypes.create_string_buffer(struct.pack("IIQ", 1, 112, 0) + bytes(96))
    return _call("perf_event_open", attributes, 0, -1, -1, 0)


def userfaultfd(_: Decoys) -> str:
    return _call("userfaultfd", 1)


def personality(_: Decoys) -> str:
    return _call("personality", 0x0040000)  # ADDR_NO_RANDOMIZE


def foreign_abi(_: Decoys) -> str:
    """A call by its x32 number must end the process, so a child tries."""
    child = os.fork()
    if child == 0:
        _libc.syscall(ctypes.c_long(0x40000000 | NUMBERS["getpid"]))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return "" if os.WIFSIGNALED(status) else "the x32 interface answers"


def hidden_memory(_: Decoys) -> str:
    """Memory that no rlimit and no file system quota counts."""

    def shared(name: str, remove: str, *arguments: int) -> str:
        words = _call(name, *arguments)
        _call(remove, int(words.split()[-1]), 0, 0)  # IPC_RMID, or it would stay until the machine restarts
        return words

    return _any_call(
        lambda: _call("memfd_create", b"x", 0),
        lambda: _call("memfd_secret", 0),
        lambda: shared("shmget", "shmctl", 0, 1 << 20, 0o1600),
        lambda: shared("msgget", "msgctl", 0, 0o1600),
    )


def change_mode(decoys: Decoys) -> str:
    """Of a file lent as a descriptor: the worker of an ordinary owner is, to the kernel, that file's owner too."""

    def times() -> str:
        os.utime(int(decoys["replies"]), (0, 0))
        return "changed the times of a descriptor's file"

    def mode() -> str:
        os.fchmod(int(decoys["replies"]), 0o600)
        return "changed the mode of a descriptor's file"

    return _any_call(mode, times)


def type_into_terminal(_: Decoys) -> str:
    for request in (0x5412, 0x5412 | 1 << 32, 0x541C):  # TIOCSTI, with a high half to slip past a filter, TIOCLINUX
        if _libc.ioctl(0, ctypes.c_ulong(request), ctypes.create_string_buffer(b"x")) >= 0:
            return f"ioctl {request:#x}"
    return ""


def privileges(_: Decoys) -> str:
    sets = ctypes.create_string_buffer(24)
    _libc.syscall(NUMBERS["capget"], struct.pack("II", 0x20080522, 0), sets)
    effective, permitted = struct.unpack_from("II", sets.raw)
    if effective or permitted:
        return f"holds capabilities {effective | permitted:#x}"
    return "" if _libc.prctl(39, 0, 0, 0, 0) == 1 else "may gain privileges by exec"


# --- limits ----------------------------------------------------------------------------------------------------
def no_limits(_: Decoys) -> str:
    capped = ("CPU", "AS", "DATA", "FSIZE", "NOFILE", "NPROC", "CORE", "MEMLOCK")
    infinite = [c for c in capped if resource.getrlimit(getattr(resource, f"RLIMIT_{c}"))[1] == resource.RLIM_INFINITY]
    return ", ".join(infinite)


def uncounted_memory(_: Decoys) -> str:
    """Memory that RLIMIT_DATA does not count: shared without a file, or a stack that grows."""

    def taken(flag: int) -> str:
        mmap.mmap(-1, _MIB, flags=flag | mmap.MAP_ANONYMOUS).close()
        return f"memory with flag {flag:#x}"

    return _any_call(lambda: taken(mmap.MAP_SHARED), lambda: taken(mmap.MAP_PRIVATE | 0x100))  # MAP_GROWSDOWN


def dump_core(_: Decoys) -> str:
    return "" if resource.getrlimit(resource.RLIMIT_CORE) == (0, 0) else "core dumps are on"


def memory_bomb(decoys: Decoys) -> str:
    """Twice the cap in one process."""
    held: list[bytearray] = []
    while len(held) * 32 * _MIB < 2 * int(decoys["memory"]):
        held.append(bytearray(32 * _MIB))
    return f"took {len(held) * 32} MiB"


def _spawn(work: Callable[[], None], wanted: int) -> tuple[list[int], int, int]:
    """Children that `work`, say so on a pipe and wait.

    Their numbers, the pipe of their words, and the pipe whose closing ends them.
    """
    said, say = os.pipe()
    held, hold = os.pipe()
    children: list[int] = []
    try:
        while len(children) < wanted:
            child = os.fork()
            if child == 0:
                os.close(hold)
                try:
                    work()
                    os.write(say, b"x")
                    os.read(held, 1)  # returns when the parent closes its end or dies
                finally:
                    os._exit(0)
            children.append(child)
    except OSError:
        pass
    os.close(say)
    os.close(held)
    return children, said, hold


def fork_bomb(_: Decoys) -> str:
    children, said, hold = _spawn(lambda: None, 200)
    os.close(hold)
    os.close(said)
    for child in children:
        os.waitpid(child, 0)
    return f"{len(children)} processes" if len(children) >= 200 else ""


def memory_bomb_in_parts(decoys: Decoys) -> str:
    """Twice the cap over four processes, each below it: only a cap on the family stops this."""
    cap = int(decoys["memory"])
    children, said, hold = _spawn(lambda: None if _touch(cap // 2) else os._exit(1), 4)
    filled, dead, until = 0, 0, time.monotonic() + 10
    while len(children) == 4 and filled < 4 and not dead and time.monotonic() < until:
        if select.select([said], [], [], 0.02)[0]:
            filled += len(os.read(said, 4))
        dead += sum(os.waitpid(child, os.WNOHANG) != (0, 0) for child in children)
    os.close(hold)
    os.close(said)
    return f"{filled} processes hold {cap // 2 // _MIB} MiB each" if filled == 4 else ""


def _touch(size: int) -> bool:
    block = bytearray(size)
    for place in range(0, size, 4096):
        block[place] = 1
    return True


def flood(_: Decoys) -> str:
    """More output than the daemon puts up with."""
    for _part in range(20 * 16):
        os.write(1, b"x" * (_MIB // 16))
    return "wrote 20 MiB of log"


# --- what only the graph tier must stop ------------------------------------------------------------------------
def start_process(_: Decoys) -> str:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return "forked"


def start_program(_: Decoys) -> str:
    """A call that fails for its argument, not with EPERM, was let through by the filter."""
    _libc.syscall(ctypes.c_long(NUMBERS["execve"]), b"/nonexistent", None, None)
    number = ctypes.get_errno()
    return "" if number == errno.EPERM else f"execve reached the kernel ({errno.errorcode.get(number)})"


def open_for_writing(_: Decoys) -> str:
    os.close(os.open("/dev/null", os.O_WRONLY))
    return "opened a file for writing"


def any_socket(_: Decoys) -> str:
    left, right = socket.socketpair()
    left.close()
    right.close()
    return "made a socket"


def own_signals(decoys: Decoys) -> str:
    fcntl.fcntl(int(decoys["replies"]), fcntl.F_SETOWN, os.getpid())
    return "set the owner of a descriptor"


def call_foreign_abi(_: Decoys) -> str:
    """A call by its x32 number in this very process, which must not survive it."""
    _libc.syscall(ctypes.c_long(0x40000000 | NUMBERS["getpid"]))
    return "the x32 interface answers"


def starve(_: Decoys) -> str:
    """Take and touch memory without end, to be stopped by the kernel."""
    held: list[bytearray] = []
    while len(held) < 256:
        held.append(bytearray(b"x" * (16 * _MIB)))
    return f"took {len(held) * 16} MiB"


def speak(decoys: Decoys) -> str:
    """Say what the rehearsal wants said on the pipe of replies, and end: how the daemon's reader is tested."""
    words = bytes.fromhex(str(decoys["speak"]))
    sys.stderr.write("last words\n")
    sys.stderr.flush()
    while words:
        words = words[os.write(int(decoys["replies"]), words) :]
    if decoys.get("then") == "hang":
        signal.pause()
    os._exit(int(decoys.get("exit", 0)))


LIMITS: Final = (no_limits, dump_core, memory_bomb, own_environ, inherited_descriptors)
FILTERED: Final = (
    read_secret, read_passwords, list_home, see_host_root, write_outside, connect_tcp, send_udp, connect_abstract,
    connect_path, raw_sockets, signal_daemon, move_daemon, ptrace_daemon, read_daemon_memory, steal_descriptor,
    read_environ, list_processes, user_namespace, clone3_namespace, mount, keyrings, io_uring, bpf, perf, userfaultfd,
    personality, foreign_abi, hidden_memory, type_into_terminal, privileges, change_mode,
)  # fmt: skip
NAMESPACED: Final = (see_outside,)
CONTAINED: Final = (fill_disk, fork_bomb, memory_bomb_in_parts)
GRAPH: Final = (start_process, start_program, open_for_writing, any_socket, own_signals, uncounted_memory)
WILD: Final = (leave_grandchild, flood, starve, call_foreign_abi, speak)
ATTEMPTS: Final = {
    attempt.__name__.replace("_", "-"): attempt
    for attempt in (*LIMITS, *FILTERED, *NAMESPACED, *CONTAINED, *GRAPH, *WILD)
}


def rehearse(names: tuple[str, ...], decoys: Decoys) -> Iterator[Attempted]:
    """Try `names` one after the other. An unknown name counts as got through: never proof of anything."""
    for name in names:
        attempt = ATTEMPTS.get(name)
        if attempt is None:
            yield Attempted(name[:256], False, "no such attempt")
            continue
        try:
            words = attempt(decoys)
        except (_Stopped, OSError, MemoryError) as stopped:
            yield Attempted(name, True, f"{type(stopped).__name__.strip('_')}: {stopped}"[:200])
            continue
        yield Attempted(name, not words, words[:200])
