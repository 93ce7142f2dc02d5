"""The last step outside: joins the control group, gives up root, and becomes bubblewrap or the worker.

Run as a script by a fresh interpreter (`python -I -S launch.py CONFIG`), because a threaded daemon must not run
Python between fork and exec. As root it drops to a number of its own *before* bubblewrap, so that nothing inside
is the owner of anything outside; since that number may not walk into the owner's home, the trees to be shown are
first bound to a place it can reach, in a mount namespace of its own. Imports the standard library only.
"""

import ctypes
import json
import os
import signal
import struct
import sys
from typing import Any

_NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
_BIND, _RECURSIVE, _PRIVATE = 4096, 16384, 1 << 18  # MS_BIND, MS_REC, MS_PRIVATE
_NO_SUID, _NO_DEVICES = 2, 4
_STAGE = "/tmp"  # hidden under a private tmpfs meanwhile; exists everywhere and may be walked by everyone


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def stage(sources: list[str]) -> list[str]:
    """Bind each of `sources` (absolute) to a numbered place under a private /tmp; those places, in order."""
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_NEW_MOUNTS), "unshare")
    _check(libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None), "make mounts private")
    # After unshare, for a mount can only be bound where it lives; before /tmp disappears.
    held = [os.open(path, os.O_PATH | os.O_CLOEXEC) for path in sources]
    flags = _NO_SUID | _NO_DEVICES
    _check(libc.mount(b"tmpfs", _STAGE.encode(), b"tmpfs", flags, b"mode=0755,size=1m"), "stage")
    places = []
    for number, path in enumerate(sources):
        place = f"{_STAGE}/{number}"
        if os.path.isdir(f"/proc/self/fd/{held[number]}"):
            os.mkdir(place)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
        link = f"/proc/self/fd/{held[number]}".encode()
        _check(libc.mount(link, place.encode(), None, _BIND, None), f"bind {path}")
        os.close(held[number])
        places.append(place)
    return places


def give_up_capabilities() -> None:
    """Stay root by number, for files that only root may read, without any of its powers, for ever."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; beyond the last one it fails, which is the end
    libc.prctl(47, 4, 0, 0, 0)  # PR_CAP_AMBIENT_CLEAR_ALL
    header = struct.pack("II", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _check(libc.capset(header, bytes(24)), "capset")


def main(config: dict[str, Any]) -> None:
    """Do what `config` says, in this order, and exec. Any failure ends the process: nothing runs less confined."""
    for path in config["joins"]:
        with open(path, "w") as file:
            file.write(str(os.getpid()))
    binds: list[list[str]] = config["binds"]  # [source, place inside]
    sources = [source for source, _ in binds]
    uid = config["uid"]
    if uid is not None:
        if binds:
            sources = stage(sources)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    elif config["powerless"]:
        os.setgroups([])
        give_up_capabilities()
    if config["die_with_parent"]:
        # After the change of user, which clears it. Bubblewrap has its own --die-with-parent.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != config["parent"]:
            raise SystemExit("the daemon is gone")
    shown = [word for source, (_, inside) in zip(sources, binds, strict=True) for word in ("--ro-bind", source, inside)]
    command = [*config["head"], *shown, *config["tail"]]
    os.execve(command[0], command, config["environ"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
