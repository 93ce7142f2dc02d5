"""Attacks on files: reading the owner's, writing where nothing may be written, and filling what is finite."""

from __future__ import annotations

import mmap
import os
import struct
import sys
from pathlib import Path

from .calls import MIB, Decoys, Refused, any_of, call, inputs, said


def read_shadow(_: Decoys) -> str:
    return f"{len(Path('/etc/shadow').read_bytes())} bytes of password hashes"


def read_passwd(_: Decoys) -> str:
    return f"{len(Path('/etc/passwd').read_bytes())} bytes of the list of users"


def read_ssh_key(decoys: Decoys) -> str:
    return Path(str(decoys["home"]), ".ssh", "id_ed25519").read_text()[:20]


def read_ledger(decoys: Decoys) -> str:
    return f"{len(Path(str(decoys['secret'])).read_bytes())} bytes of the daemon's own file"


def list_folders(decoys: Decoys) -> str:
    def names(folder: str) -> str:
        return ",".join(sorted(os.listdir(folder))[:3])

    def host() -> str:
        return ",".join(sorted({"root", "home", "etc", "var", "boot"} & set(os.listdir("/"))))

    return any_of(host, lambda: names(str(decoys["home"])), lambda: names("/etc"), lambda: names("/proc/self"))


def write_outside(decoys: Decoys) -> str:
    def made(folder: str) -> str:
        path = os.path.join(folder, f"ichiba-attack-{os.getpid()}")
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        os.unlink(path)
        return folder

    places = ["/", "/tmp", "/var/tmp", "/usr", "/usr/lib", "/dev", "/run", "/etc", "/code", str(decoys["outside"])]
    return any_of(*(lambda place=place: made(place) for place in (*places, str(decoys["home"]))))


def _fill(folders: tuple[str, ...], wanted: int) -> str:
    """Files of 4 MiB until `wanted` bytes are written or nothing goes any more; all are removed."""
    written, made = 0, []
    try:
        for folder in folders:
            while written < wanted:
                path = os.path.join(folder, f"ichiba-fill-{os.getpid()}-{len(made)}")
                try:
                    with open(path, "xb", buffering=0) as file:
                        made.append(path)
                        for _ in range(4):
                            written += file.write(bytes(MIB))
                except OSError:
                    break
    finally:
        for path in made:
            os.unlink(path)
    if written >= wanted:
        return f"{written // MIB} MiB written"
    raise Refused(f"stopped at {written // MIB} MiB")


def fill_shared_memory(_: Decoys) -> str:
    return _fill(("/dev/shm", "/dev", "/tmp", "/"), 32 * MIB)


def fill_scratch(_: Decoys) -> str:
    return _fill(("/scratch", os.getcwd()), 64 * MIB)


def core_dump(_: Decoys) -> str:
    """A core dump is written by the kernel, outside every namespace, where core_pattern says."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_CORE)
    if limits != (0, 0):
        return f"core dumps of up to {limits[1]} bytes"
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except ValueError as refusal:
        raise Refused(str(refusal)) from None
    return "raised its limit again"


def link_out(decoys: Decoys) -> str:
    """A symlink, then a hard link, from the scratch folder to what lies outside it."""

    def through_symlink() -> str:
        os.symlink(str(decoys["secret"]), "/scratch/way-out")
        try:
            return Path("/scratch/way-out").read_text()
        finally:
            os.unlink("/scratch/way-out")

    def hard() -> str:
        os.link(sys.executable, "/scratch/python")
        return "hard link of the interpreter"

    def plain() -> str:
        return Path("/scratch/../" + str(decoys["secret"])).read_text()

    return any_of(through_symlink, hard, plain)


def device_nodes(_: Decoys) -> str:
    def made(number: int) -> str:
        call("mknod", b"/scratch/disk", 0o60600, number)
        return "a device node"

    def opened(path: str) -> str:
        os.close(os.open(path, os.O_RDONLY))
        return path

    real = ("/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/sda", "/dev/nvme0n1", "/dev/port", "/dev/kvm")
    return any_of(lambda: made(0x800), lambda: made(0x0101), *(lambda path=path: opened(path) for path in real))


def poison_code(_: Decoys) -> str:
    """Change what the next worker, or the owner's next Python, will load."""
    import worker

    def touched(path: str) -> str:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
        return path

    own = os.path.join(os.path.dirname(str(worker.__file__)), "boot.py")
    return any_of(*(lambda path=path: touched(path) for path in (own, os.__file__, os.path.realpath(sys.executable))))


def change_mode_or_owner(_: Decoys) -> str:
    import worker

    path = os.fsencode(str(worker.__file__))
    return any_of(
        lambda: os.chmod(path, 0o777) or "chmod of our code",
        lambda: said("chown", path, os.getuid(), os.getgid()),
        lambda: said("setxattr", path, b"user.x", b"x", 1, 0),
    )


def change_inputs(decoys: Decoys) -> str:
    """The inputs are files of the daemon's store, lent read-only."""
    (lent, *_) = inputs(decoys)

    def mapped() -> str:
        with mmap.mmap(lent, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE) as shared:
            shared[0] ^= 0xFF
        return "a shared writable map of an input"

    return any_of(
        lambda: os.pwrite(lent, b"x", 0) and "wrote an input",
        lambda: os.ftruncate(lent, 0) or "truncated an input",
        lambda: os.fchmod(lent, 0o777) or "changed an input's mode",
        lambda: os.close(os.open(f"/proc/self/fd/{lent}", os.O_RDWR)) or "opened an input again for writing",
        lambda: os.close(os.open(f"/dev/fd/{lent}", os.O_RDWR)) or "opened an input again for writing",
        lambda: os.utime(lent, (0, 0)) or "changed an input's times",
        lambda: said("flock", lent, 2 | 4),
        mapped,
    )


def open_by_handle(_: Decoys) -> str:
    """The way out of containers that keep CAP_DAC_READ_SEARCH: a file by its inode number, no path needed."""
    handle = struct.pack("Ii8s", 8, 1, struct.pack("II", 2, 0))
    return any_of(
        lambda: said("open_by_handle_at", 0, handle, os.O_RDONLY),
        lambda: said("name_to_handle_at", -100, b"/", struct.pack("Ii", 128, 0) + bytes(128), bytes(8), 0),
    )


def watch_files(_: Decoys) -> str:
    """Watches cost the kernel memory that no limit of the process counts."""

    def watches() -> str:
        made = [call("inotify_init1", 0) for _ in range(64)]
        for number in made:
            os.close(number)
        return f"{len(made)} inotify queues"

    return any_of(watches, lambda: said("fanotify_init", 0, 0))
