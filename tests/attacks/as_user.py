"""Becomes an ordinary user and goes on as the harness: `python as_user.py UID GROUP ARGUMENTS...`, as root.

Root's interpreter often lies where no user may walk (/root/.pyenv). Then, in a mount namespace of its own, each
folder on the way is covered by an empty one that may be walked, and only what Python needs is bound into it: the
user sees less than before, never more. GROUP "group" also hands the user a control group, as systemd does for its
users; "none" does not. Each harness takes a UID of its own: RLIMIT_NPROC counts a user's tasks, so the bombs of one
would leave no task to the threads of another that runs at the same time. Ends with status 77 and one line if this
machine does not let it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from worker import cgroups

UIDS = range(54321, 54324)  # no users of this machine; ordinary ones to the kernel
CANNOT = 77
_NEW_MOUNTS, _BIND, _RECURSIVE, _PRIVATE = 0x00020000, 4096, 16384, 1 << 18
libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raises OSError if a call of libc failed."""
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def uncover(needed: list[Path]) -> None:
    """Let everybody walk to `needed` and nowhere else below the closed folders on the way."""
    check(libc.unshare(_NEW_MOUNTS), "unshare")
    check(libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None), "make mounts private")
    closed: dict[Path, list[Path]] = {}
    for path in needed:
        for folder in reversed(path.parents):
            if not folder.stat().st_mode & 0o001:
                closed.setdefault(folder, []).append(path)
                break
    for folder, paths in closed.items():
        held = [os.open(path, os.O_PATH) for path in paths]
        check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"mode=0755,size=1m"), f"cover {folder}")
        for path, number in zip(paths, held, strict=True):
            path.mkdir(parents=True, exist_ok=True)
            link = f"/proc/self/fd/{number}".encode()
            check(libc.mount(link, os.fsencode(path), None, _BIND | _RECURSIVE, None), f"bind {path}")
            os.close(number)


def hand_over_group(name: str, uid: int) -> None:
    """A control group of the user's own, with this process in it."""
    parent = cgroups._find_parent()
    if parent.version != 1:
        raise OSError(0, "control groups of version 2 are handed over by systemd here, not by this script")
    for controller in (parent.memory, parent.pids):
        folder = controller / name
        folder.mkdir()
        for file in (folder, folder / "cgroup.procs", folder / "tasks"):
            os.chown(file, uid, uid)
        (folder / "cgroup.procs").write_text(str(os.getpid()))


def become(uid: int, group: str, home: str, arguments: list[str]) -> None:
    """Turn this process into the harness of an ordinary user. Never returns."""
    source = Path(__file__).resolve().parents[2]
    prefixes = {Path(p).resolve() for p in (sys.prefix, sys.base_prefix, sysconfig.get_path("purelib"), str(source))}
    needed = [p for p in sorted(prefixes) if not any(p != other and p.is_relative_to(other) for other in prefixes)]
    try:
        if group == "group":
            hand_over_group(Path(home).name, uid)
        uncover(needed)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        print(f"cannot become an ordinary user here: {error}", file=sys.stderr)
        raise SystemExit(CANNOT) from None
    environ = {"PATH": os.environ["PATH"], "HOME": home, "TMPDIR": home, "PYTHONPATH": str(source), "LANG": "C.UTF-8"}
    os.chdir(source)
    os.execve(sys.executable, [sys.executable, "-m", "tests.attacks.harness", *arguments], environ)


def main(uid: int, group: str, arguments: list[str]) -> None:
    """Run the harness in a child, and remove what it was given."""
    home = tempfile.mkdtemp(prefix="ichiba-user-")
    os.chown(home, uid, uid)
    child = os.fork()
    if child == 0:
        become(uid, group, home, arguments)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shutil.rmtree(home)
    if group == "group":
        parent = cgroups._find_parent()
        for controller in {parent.memory, parent.pids}:
            with contextlib.suppress(FileNotFoundError):
                (controller / Path(home).name).rmdir()
    raise SystemExit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
