"""Attacks on what is finite: memory, processes, threads, descriptors, priority. Bounded, so that a sandbox that stops
nothing survives them."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import threading

from .calls import MIB, Decoys, Refused, any_of, call, inputs, libc, said


def _touch(size: int) -> bytearray:
    block = bytearray(size)
    for place in range(0, size, 4096):
        block[place] = 1
    return block


def memory_bomb(decoys: Decoys) -> str:
    """Twice the cap in one process."""
    held: list[bytearray] = []
    while len(held) * 32 * MIB < 2 * int(decoys["memory"]):
        held.append(_touch(32 * MIB))
    return f"{len(held) * 32} MiB"


def reserve_addresses(_: Decoys) -> str:
    """64 TiB of addresses: page tables are the kernel's memory."""
    libc.mmap.restype = ctypes.c_void_p
    size = ctypes.c_size_t(64 << 40)
    address = libc.mmap(None, size, 3, 0x4022, -1, 0)  # private, anonymous, no reserve
    if address in (None, ctypes.c_void_p(-1).value):
        raise Refused("mmap of 64 TiB")
    libc.munmap(ctypes.c_void_p(address), size)
    return "64 TiB reserved"


def lock_memory(_: Decoys) -> str:
    return any_of(
        lambda: said("mlockall", 3),
        lambda: libc.mlock(ctypes.create_string_buffer(MIB), MIB) == 0 and "locked 1 MiB",
    )


def memfd_bomb(decoys: Decoys) -> str:
    """Anonymous files: memory that neither an rlimit nor a quota of a file system counts."""
    held, written = [], 0
    while written < 2 * int(decoys["memory"]):
        held.append(os.memfd_create("bomb", 0))
        for _ in range(8):
            written += os.write(held[-1], bytes(MIB))
    for number in held:
        os.close(number)
    return f"{written // MIB} MiB in {len(held)} anonymous files"


def uncounted_memory(decoys: Decoys) -> str:
    """Memory that RLIMIT_DATA does not count: a stack that grows, and what is shared without a file."""

    def taken(flags: int) -> str:
        with mmap.mmap(-1, 2 * int(decoys["memory"]), flags=flags | mmap.MAP_ANONYMOUS) as block:
            for place in range(0, len(block), 4096):
                block[place] = 1
            return f"{len(block) // MIB} MiB with flags {flags:#x}"

    return any_of(lambda: taken(mmap.MAP_PRIVATE | 0x100), lambda: taken(mmap.MAP_SHARED))


def thread_bomb(_: Decoys) -> str:
    """Threads are let through by the graph filter: libraries need some. A thousand is no library's need."""
    end = threading.Event()
    started: list[threading.Thread] = []
    threading.stack_size(64 * 1024)
    try:
        while len(started) < 1000:
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError as refusal:
        raise Refused(f"stopped at {len(started)} threads ({refusal})") from None
    finally:
        end.set()
        for thread in started:
            thread.join()
    return f"{len(started)} threads"


def descriptor_bomb(_: Decoys) -> str:
    """Descriptors are the kernel's memory too, and a system-wide table."""
    held: list[int] = []
    try:
        while len(held) < 5000:
            held.append(call("eventfd2", 0, 0))
    finally:
        for number in held:
            os.close(number)
    return f"{len(held)} descriptors"


def grow_pipes(decoys: Decoys) -> str:
    """Pipe buffers are kernel memory that no limit of the process counts."""
    import fcntl

    size = fcntl.fcntl(int(decoys["replies"]), 1031, 1 << 20)  # F_SETPIPE_SZ
    return f"a pipe of {size} bytes"


def raise_limits(_: Decoys) -> str:
    """Its own limits back up, first the soft, then the hard one."""
    through = []
    for name in ("AS", "DATA", "CPU", "FSIZE", "NOFILE", "NPROC", "MEMLOCK", "MSGQUEUE", "SIGPENDING", "CORE"):
        which = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(which)
        if hard == resource.RLIM_INFINITY:
            through.append(f"{name} has none")
            continue
        try:
            resource.setrlimit(which, (hard + 1, hard + 1))
        except (ValueError, OSError):
            continue
        through.append(name)
    if not through:
        raise Refused("no hard limit rises")
    return ", ".join(through)


def take_priority(_: Decoys) -> str:
    """Real-time scheduling or a better nice value starves the owner's own programs."""
    return any_of(
        lambda: said("sched_setscheduler", 0, 1, bytes(4)),
        lambda: said("setpriority", 0, 0, -20),
        lambda: said("setpriority", 0, 0, 0),
        lambda: said("ioprio_set", 1, 0, 1 << 13),
        lambda: said("sched_setattr", 0, bytes(48), 0),
    )


def timers_and_queues(_: Decoys) -> str:
    """Queues of timers and signals that are charged to the user, not to the process."""
    number = ctypes.create_string_buffer(8)
    return any_of(lambda: said("timer_create", 0, 0, number), lambda: said("signalfd4", -1, bytes(8), 8, 0))


def splice_pages(decoys: Decoys) -> str:
    """Pages of a file lent read-only, moved into a pipe: the way of Dirty Pipe (CVE-2022-0847)."""
    (lent, *_) = inputs(decoys)
    return any_of(
        lambda: said("splice", lent, 0, int(decoys["replies"]), 0, 1, 0),
        lambda: said("vmsplice", int(decoys["replies"]), bytes(16), 1, 0),
        lambda: said("tee", int(decoys["replies"]), int(decoys["replies"]), 1, 0),
    )
