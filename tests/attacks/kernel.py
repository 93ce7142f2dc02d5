"""Attacks on the kernel: calls with a history of holes, and calls that would change the machine."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
from pathlib import Path

from .calls import MIB, Decoys, Refused, any_of, call, libc, said


def user_namespace(_: Decoys) -> str:
    """Most privilege escalations of the last years began with a new user namespace."""
    return any_of(*(lambda flag=flag: said("unshare", flag) for flag in (0x10000000, 0x00020000, 0x40000000)))


def clone3_namespace(_: Decoys) -> str:
    """clone3 takes its flags from memory, where a filter cannot read them."""
    if not call("clone3", struct.pack("8Q", 0x10000000, 0, 0, 0, signal.SIGCHLD, 0, 0, 0), 64):
        os._exit(0)
    os.wait()
    return "clone3 made a user namespace"


def clone_namespace(_: Decoys) -> str:
    if not call("clone", 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0):
        os._exit(0)
    os.wait()
    return "clone made a user namespace"


def mount_tmpfs(decoys: Decoys) -> str:
    places = [b"/scratch", b"/tmp", b"/mnt", str(decoys["outside"]).encode()]
    return any_of(*(lambda place=place: said("mount", b"none", place, b"tmpfs", 0, 0) for place in places))


def remount(_: Decoys) -> str:
    """Make the read-only root writable again, or uncover what lies under a mount."""
    remounting, binding = 32, 4096
    return any_of(
        lambda: said("mount", b"none", b"/", 0, remounting | binding, 0),
        lambda: said("umount2", b"/scratch", 2),
        lambda: said("mount_setattr", -100, b"/", 0, struct.pack("4Q", 0, 1, 0, 0), 32),
    )


def new_mount_calls(_: Decoys) -> str:
    return any_of(
        lambda: said("open_tree", -100, b"/", 1),
        lambda: said("open_tree", -100, b"/", 0),
        lambda: said("fsopen", b"tmpfs", 0),
        lambda: said("setns", 0, 0x10000000),
        lambda: said("move_mount", -100, b"/scratch", -100, b"/dev", 0),
    )


def change_root(_: Decoys) -> str:
    return any_of(lambda: said("chroot", b"/"), lambda: said("pivot_root", b"/", b"/scratch"))


def keyrings(_: Decoys) -> str:
    """Keyrings are not in any namespace but the user's: keys of the owner's session would be in reach."""
    return any_of(lambda: said("keyctl", 0, -4, 1), lambda: said("add_key", b"user", b"ichiba", b"v", 1, -3))


def io_uring(_: Decoys) -> str:
    """Opens, connects and writes without making the system calls that a filter sees."""
    return said("io_uring_setup", 4, ctypes.create_string_buffer(120))


def bpf(_: Decoys) -> str:
    return any_of(
        lambda: said("bpf", 0, ctypes.create_string_buffer(struct.pack("4I", 2, 4, 4, 1) + bytes(112)), 128),
        lambda: said("bpf", 5, ctypes.create_string_buffer(128), 128),
    )


def perf(_: Decoys) -> str:
    """Counters of the processor: a fine clock and a view of other processes for side channels."""
    attributes = struct.pack("IIQ", 1, 112, 0) + bytes(24) + struct.pack("Q", 0x61) + bytes(64)
    return any_of(
        lambda: said("perf_event_open", ctypes.create_string_buffer(attributes), 0, -1, -1, 0),
        lambda: said("perf_event_open", ctypes.create_string_buffer(attributes), -1, 0, -1, 0),
    )


def userfaultfd(_: Decoys) -> str:
    """Stops the kernel in the middle of a copy: the tool that makes races in it winnable."""
    return any_of(lambda: said("userfaultfd", 1), lambda: said("userfaultfd", 0))


def personality(_: Decoys) -> str:
    return said("personality", 0x0040000)  # ADDR_NO_RANDOMIZE


def foreign_abi(_: Decoys) -> str:
    """A call by its x32 number, which a filter of plain numbers lets through. The process must not survive it."""
    result = libc.syscall(ctypes.c_long(0x40000000 | 39))
    if result < 0 and ctypes.get_errno() == 38:
        raise Refused("ENOSYS")
    return "the x32 interface answers"


def write_own_code(_: Decoys) -> str:
    """Write over a read-only page through /proc/self/mem, which ignores protection."""
    first = next(line for line in Path("/proc/self/maps").read_text().splitlines() if " r-xp " in line)
    address = int(first.split("-")[0], 16)
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        held = memory.read(4)
        memory.seek(address)
        return f"{memory.write(held)} bytes over a page of code"


def hidden_memory(_: Decoys) -> str:
    """Shared memory of System V is not the process's: no rlimit counts it, and it stays after death."""

    def segment() -> str:
        number = call("shmget", 0, MIB, 0o1600)
        call("shmctl", number, 0, 0)  # IPC_RMID
        return "a shared segment"

    def queue() -> str:
        number = call("msgget", 0, 0o1600)
        call("msgctl", number, 0, 0)
        return "a message queue"

    def semaphores() -> str:
        number = call("semget", 0, 32, 0o1600)
        call("semctl", number, 0, 0, 0)
        return "semaphores"

    return any_of(segment, queue, semaphores)


def posix_queue(_: Decoys) -> str:
    number = call("mq_open", b"ichiba-attack", os.O_CREAT | os.O_RDWR, 0o600, 0)
    os.close(number)
    call("mq_unlink", b"ichiba-attack")
    return "a message queue that outlives its maker"


def set_clock(_: Decoys) -> str:
    """Time decides who forfeits in this market. Sets it to what no kernel accepts, so that nothing changes."""
    return any_of(
        lambda: said("clock_settime", 0, struct.pack("qq", -1, -1)),
        lambda: said("settimeofday", struct.pack("qq", -1, -1), 0),
    )


def rename_host(_: Decoys) -> str:
    return said("sethostname", b"", 0)


def stop_machine(_: Decoys) -> str:
    """Swap, reboot, a new kernel, a module: each with arguments that must fail even for root."""
    return any_of(
        lambda: said("swapon", b"/nonexistent", 0),
        lambda: said("reboot", 0, 0, 0, 0),
        lambda: said("kexec_load", 0, 1 << 20, 0, 0),
        lambda: said("init_module", bytes(16), 16, b""),
        lambda: said("finit_module", 0, b"", 0),
        lambda: said("acct", b"/nonexistent"),
        lambda: said("quotactl", 0x800002 << 8, 0, 0, 0),
    )


def read_kernel_log(_: Decoys) -> str:
    """Kernel addresses in the log undo its layout randomisation."""
    return any_of(
        lambda: said("syslog", 10, 0, 0),
        lambda: f"{len(Path('/proc/kallsyms').read_bytes())} bytes of symbols",
        lambda: f"{len(Path('/proc/version').read_bytes())} bytes of version",
    )


def port_io(_: Decoys) -> str:
    return any_of(lambda: said("iopl", 3), lambda: said("modify_ldt", 0, ctypes.create_string_buffer(64), 64))


def gain_privileges(_: Decoys) -> str:
    """Capabilities now, or by a set-user-id program, or by asking."""
    sets = ctypes.create_string_buffer(24)
    libc.syscall(125, struct.pack("II", 0x20080522, 0), sets)
    effective, permitted = struct.unpack_from("II", sets.raw)
    if effective | permitted:
        return f"holds capabilities {effective | permitted:#x}"
    if libc.prctl(39, 0, 0, 0, 0) != 1:
        return "may gain privileges by exec"
    return any_of(
        lambda: said("setuid", 0),
        lambda: said("setgroups", 0, 0),
        lambda: said("capset", struct.pack("II", 0x20080522, 0), struct.pack("6I", 1, 1, 0, 0, 0, 0)),
    )


def loosen_filter(_: Decoys) -> str:
    """A filter of one's own that allows everything, and one that answers in the kernel's place."""
    allow = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))
    program = struct.pack("HxxxxxxQ", 1, ctypes.addressof(allow))

    def listener() -> str:
        return said("seccomp", 1, 8, program)

    def undone() -> str:
        call("seccomp", 1, 0, program)  # accepted: a further filter only ever takes away
        return said("mount", b"none", b"/scratch", b"tmpfs", 0, 0)

    return any_of(listener, undone)


def executable_stack(_: Decoys) -> str:
    """Not a way out by itself: native code is assumed. What counts is that new code meets the same filter."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    page = mmap.mmap(-1, 4096, flags=private, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    # mov eax, 41 (socket); mov edi, 1; mov esi, 1; xor edx, edx; syscall; ret
    page.write(bytes.fromhex("b829000000bf01000000be0100000031d20f05c3"))
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    result = ctypes.CFUNCTYPE(ctypes.c_long)(address)()
    if result < 0:
        raise Refused(f"socket from its own machine code: {os.strerror(-result)}")
    os.close(result)
    return f"socket {result} from its own machine code"
