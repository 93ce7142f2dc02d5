"""Attacks on other processes: the daemon, another worker, and whatever else runs on the machine."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path

from .calls import Decoys, Refused, any_of, call, libc, said


def _each(decoys: Decoys, attempt: Callable[[int], object]) -> str:
    """The daemon, another worker, and this process's parent, where that is not the first of its own namespace."""
    numbers = [int(decoys["pid"]), int(decoys["victim"])]
    if os.getppid() > 1:
        numbers.append(os.getppid())
    return any_of(*(lambda number=number: attempt(number) for number in numbers))


def ptrace(decoys: Decoys) -> str:
    return _each(decoys, lambda pid: said("ptrace", 0x4206, pid, 0, 0))  # PTRACE_SEIZE


def read_memory(decoys: Decoys) -> str:
    """The daemon's key by the address it lies at."""
    taken = ctypes.create_string_buffer(16)
    here = struct.pack("QQ", ctypes.addressof(taken), 16)
    there = struct.pack("QQ", int(decoys["address"]), 16)
    call("process_vm_readv", int(decoys["pid"]), here, 1, there, 1, 0)
    return f"read {taken.raw!r} from the daemon's memory"


def write_memory(decoys: Decoys) -> str:
    given = ctypes.create_string_buffer(b"overwritten")
    here = struct.pack("QQ", ctypes.addressof(given), 8)
    there = struct.pack("QQ", int(decoys["scribble"]), 8)

    def by_file() -> str:
        with open(f"/proc/{decoys['pid']}/mem", "r+b", buffering=0) as memory:
            memory.seek(int(decoys["scribble"]))
            return f"{memory.write(b'overwritten')} bytes through /proc"

    return any_of(lambda: said("process_vm_writev", int(decoys["pid"]), here, 1, there, 1, 0), by_file)


def signal_daemon(decoys: Decoys) -> str:
    return any_of(
        lambda: os.kill(int(decoys["pid"]), signal.SIGCONT) or "signalled the daemon",
        lambda: os.kill(int(decoys["victim"]), signal.SIGCONT) or "signalled another worker",
        lambda: said("pidfd_open", int(decoys["pid"]), 0),
    )


def signal_parent(_: Decoys) -> str:
    """In a namespace of its own the parent is that namespace's first process, which is not the owner's."""
    if os.getppid() <= 1:
        os.kill(1, 0)  # the namespace's own, and nothing else has that number here
        os.kill(os.getpid() + 100_000, 0)
    os.kill(os.getppid(), signal.SIGCONT)
    return "signalled its parent" if os.getppid() > 1 else "signalled a process outside"


def steal_descriptor(decoys: Decoys) -> str:
    def of(pid: int) -> str:
        number = call("pidfd_open", pid, 0)
        try:
            return said("pidfd_getfd", number, 0, 0)
        finally:
            os.close(number)

    return _each(decoys, of)


def read_environ(decoys: Decoys) -> str:
    return _each(decoys, lambda pid: f"{len(Path(f'/proc/{pid}/environ').read_bytes())} bytes of environment")


def list_processes(decoys: Decoys) -> str:
    return _each(decoys, lambda pid: f"{len(Path(f'/proc/{pid}/cmdline').read_bytes())} bytes of a command line")


def walk_descriptors(decoys: Decoys) -> str:
    return _each(decoys, lambda pid: f"{len(os.listdir(f'/proc/{pid}/fd'))} descriptors of process {pid}")


def walk_root(decoys: Decoys) -> str:
    return _each(decoys, lambda pid: f"{len(os.listdir(f'/proc/{pid}/root/'))} names in the root of process {pid}")


def compare_and_advise(decoys: Decoys) -> str:
    """Small calls on other processes: compare kernel objects, page its memory out, move its pages, raise its limits."""
    return _each(
        decoys,
        lambda pid: any_of(
            lambda: said("kcmp", pid, os.getpid(), 0, 0, 0),
            lambda: said("migrate_pages", pid, 8, bytes(8), bytes(8)),
            lambda: said("prlimit64", pid, 7, 0, ctypes.create_string_buffer(16)),
            lambda: os.sched_setaffinity(pid, {0}) or f"moved process {pid} to one core",
            lambda: said("setpriority", 0, pid, 19),
        ),
    )


def inherited_descriptors(decoys: Decoys) -> str:
    """Anything open beside its inputs, its standard streams, the pipe of replies and the socket it reads."""
    found = []
    for number in range(3, 1024):
        try:
            status = os.fstat(number)
        except OSError:
            continue
        lent = (status.st_dev, status.st_ino) == (decoys["lent_device"], decoys["lent_inode"])
        if number not in (decoys["replies"], decoys["job"]) and not lent:
            found.append(str(number))
    if not found:
        raise Refused("nothing is open")
    return "descriptors " + " ".join(found)


def own_environ(_: Decoys) -> str:
    known = {"PATH", "HOME", "LANG", "PWD", "LC_CTYPE", "TMPDIR", "SHLVL", "_"}
    found = sorted(name for name in os.environ if name not in known and not name.endswith("_THREADS"))
    if not found:
        raise Refused("its environment holds nothing of the owner's")
    return ", ".join(found)


def type_into_terminal(_: Decoys) -> str:
    """Push characters into the terminal that the owner started the daemon from: TIOCSTI, also with a high half to slip
    past a filter, and TIOCLINUX."""

    def push(number: int) -> str:
        for request in (0x5412, 0x5412 | 1 << 32, 0x541C):
            if libc.ioctl(number, ctypes.c_ulong(request), ctypes.create_string_buffer(b"x")) >= 0:
                return f"ioctl {request:#x} on {number}"
        raise Refused("ioctl")

    def terminal() -> str:
        number = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
        try:
            return push(number)
        finally:
            os.close(number)

    return any_of(lambda: push(0), lambda: push(1), lambda: push(2), terminal)


def run_program(_: Decoys) -> str:
    """Another program of the machine, in a child where one may be made, else in this process."""
    try:
        child = os.fork()
    except OSError as refusal:
        os.execv("/usr/bin/id", ["id"])
        raise Refused(str(refusal)) from None
    if child == 0:
        try:
            os.execv("/usr/bin/id", ["id"])
        except OSError:
            os._exit(7)
    status = os.waitpid(child, 0)[1]
    if status:
        raise Refused(f"exec ended with {os.waitstatus_to_exitcode(status)}")
    return "ran /usr/bin/id"


def run_from_memory(_: Decoys) -> str:
    """A program that was never a file: what malware does, and what no file rule sees."""
    number = os.memfd_create("program", 0)
    with open("/usr/bin/id", "rb") as real:
        os.write(number, real.read())
    return said("execveat", number, b"/nonexistent", None, None, 0) if number else ""


def leave_grandchild(decoys: Decoys) -> str:
    """A process that leaves its session and closes all it shares; the harness looks for it after the end."""
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() == 0:
            libc.prctl(15, str(decoys["mark"]).encode(), 0, 0, 0)
            os.closerange(0, 1024)
            signal.pause()
        os._exit(0)
    os.waitpid(child, 0)
    return "it was started"
