"""What must go on working where the attacks are stopped, or "blocked" would only mean "broken".

Each does what an honest job does, and raises if it cannot. The last four are what a script may do and a graph may not.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import select
import signal
import sys
import threading

from .calls import MIB, Decoys, call, inputs, libc

LENT = bytes(range(256)) * 64
"""What the input that every cage is lent holds."""


def read_input(decoys: Decoys) -> None:
    """reads the input it was lent"""
    (lent, *_) = inputs(decoys)
    with mmap.mmap(lent, 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == LENT


def read_library(_: Decoys) -> None:
    """reads a file of Python's library"""
    with open(os.__file__, "rb") as file:
        assert b"import" in file.read()


def list_library(_: Decoys) -> None:
    """lists the folder of Python's library"""
    assert "os.py" in os.listdir(os.path.dirname(os.__file__))


def print_log(_: Decoys) -> None:
    """prints to its log"""
    assert os.write(1, b"all is well\n") == 12


def wake(_: Decoys) -> None:
    """wakes itself through epoll"""
    number = call("eventfd2", 1, 0)
    with select.epoll() as waiting:
        waiting.register(number, select.EPOLLIN)
        assert waiting.poll(1)[0][0] == number
    os.close(number)


def thread(_: Decoys) -> None:
    """starts a thread and joins it"""
    done = threading.Event()
    one = threading.Thread(target=done.set)
    one.start()
    one.join()
    assert done.is_set()


def signal_itself(_: Decoys) -> None:
    """sends a signal to itself"""
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]


def take_memory(_: Decoys) -> None:
    """takes and fills 32 MiB"""
    block = bytearray(b"x" * (32 * MIB))
    assert block[-1] == 120


def map_memory(_: Decoys) -> None:
    """maps memory and protects it"""
    page = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page.write(b"kept")
    assert call("madvise", 0, 0, 4) == 0
    page.close()


def name_itself(_: Decoys) -> None:
    """gives its thread a name"""
    assert libc.prctl(15, b"worker", 0, 0, 0) == 0


def ask_flags(decoys: Decoys) -> None:
    """asks for the flags of a descriptor"""
    assert fcntl.fcntl(int(decoys["replies"]), fcntl.F_GETFL) & os.O_WRONLY


def ask_terminal(_: Decoys) -> None:
    """asks whether its input is a terminal"""
    assert not os.isatty(0)


def keep_affinity(_: Decoys) -> None:
    """chooses among its own processors"""
    os.sched_setaffinity(0, os.sched_getaffinity(0))


def ask_priority(_: Decoys) -> None:
    """asks for its priority"""
    assert -20 <= os.getpriority(os.PRIO_PROCESS, 0) <= 19


def ask_time(_: Decoys) -> None:
    """reads the clocks"""
    import time

    assert time.time() > 1_700_000_000
    assert time.monotonic() > 0


def draw_random(_: Decoys) -> None:
    """asks the kernel for random bytes"""
    assert len(os.getrandom(16)) == 16


def ask_limits(_: Decoys) -> None:
    """reads its limits"""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 0


def ask_users(_: Decoys) -> None:
    """asks who it is"""
    assert os.getuid() != 0


def scratch_file(_: Decoys) -> None:
    """writes, renames and removes a file in /scratch"""
    with open("/scratch/one", "xb") as file:
        file.write(b"x" * MIB)
    os.rename("/scratch/one", "/scratch/two")
    os.unlink("/scratch/two")


def scratch_link(_: Decoys) -> None:
    """makes links inside /scratch"""
    with open("/scratch/file", "x") as file:
        file.write("here")
    os.symlink("file", "/scratch/symlink")
    os.link("/scratch/file", "/scratch/link")
    with open("/scratch/symlink") as file:
        assert file.read() == "here"
    for name in ("file", "symlink", "link"):
        os.unlink(f"/scratch/{name}")


def child(_: Decoys) -> None:
    """starts a child and waits for it"""
    number = os.fork()
    if number == 0:
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 3


def program(_: Decoys) -> None:
    """runs Python as a program"""
    number = os.fork()
    if number == 0:
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", "raise SystemExit(4)"])
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 4
