"""Caps on memory and processes that hold for a whole family of processes, where this user may set them.

rlimits count one process (or one user), so only a control group stops many processes that each stay below the
limit. Works with version 2 below a delegated parent (systemd delegates `user@UID.service` to its user) and with
version 1 where its directories are writable (root). It knows nothing of namespaces or jobs. Source:
Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Cgroup", "CgroupUnavailable", "sweep"]

_CONTROLLERS: Final = ("memory", "pids")


class CgroupUnavailable(OSError):
    """This user may set no control group here; the words say what would let it."""


@dataclass(frozen=True)
class _Parent:
    """Where groups are made: one directory for version 2, one for each controller for version 1."""

    version: int
    memory: Path
    pids: Path
    cpu: Path | None  # None where this user may not share out processor time

    @property
    def folders(self) -> set[Path]:
        return {self.memory, self.pids} | ({self.cpu} if self.cpu is not None else set())


@dataclass(frozen=True)
class Cgroup:
    """One group for one worker. A process joins by writing its number to each of `joins`."""

    version: int
    memory: Path
    pids: Path
    cpu: Path | None = None

    @classmethod
    def create(cls, *, memory_bytes: int, processes: int, cores: int = 0) -> Cgroup:
        """A new empty group. Raises CgroupUnavailable.

        cores: together its processes get no more time than so many cores; 0 for no cap, and none is set where this
        user may not set it: then a job can make the machine slow, but take nothing from it.
        """
        parent = _find_parent()
        name = f"ichiba-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        capped = parent.cpu / name if parent.cpu is not None and cores else None
        group = cls(parent.version, parent.memory / name, parent.pids / name, capped)
        try:
            for folder in group._folders:
                folder.mkdir()
            group.limit_memory(memory_bytes)
            (group.pids / "pids.max").write_text(str(processes))
            group._limit_cores(cores)
        except OSError as error:
            group.remove()
            raise CgroupUnavailable(error.errno, f"cannot make a control group: {error.strerror}") from None
        return group

    @property
    def _folders(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(folder for folder in (self.memory, self.pids, self.cpu) if folder is not None))

    @property
    def joins(self) -> tuple[str, ...]:
        """The files to write a process's number to."""
        return tuple(str(folder / "cgroup.procs") for folder in self._folders)

    def limit_memory(self, memory_bytes: int) -> None:
        """Set the cap, swap included. Raises OSError."""
        if self.version == 2:
            (self.memory / "memory.max").write_text(str(memory_bytes))
            with contextlib.suppress(FileNotFoundError):  # a kernel without swap accounting
                (self.memory / "memory.swap.max").write_text("0")
            return
        limit, with_swap = self.memory / "memory.limit_in_bytes", self.memory / "memory.memsw.limit_in_bytes"
        # The first may never be above the second, so their order depends on the direction.
        files = [limit, with_swap] if memory_bytes < int(limit.read_text()) else [with_swap, limit]
        for file in files:
            if file == limit or file.exists():  # absent without swap accounting
                file.write_text(str(memory_bytes))

    def _limit_cores(self, cores: int) -> None:
        if self.cpu is None:
            return
        period = 100_000  # microseconds, the kernel's own default
        if self.version == 2:
            (self.cpu / "cpu.max").write_text(f"{cores * period} {period}")
        else:
            (self.cpu / "cpu.cfs_quota_us").write_text(str(cores * period))

    def oom_kills(self) -> int:
        """How many processes of the group the kernel killed for want of memory."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        with contextlib.suppress(OSError):
            for line in (self.memory / name).read_text().splitlines():
                word, _, number = line.partition(" ")
                if word == "oom_kill":
                    return int(number)
        return 0

    def memory_peak_bytes(self) -> int:
        """The most memory the group held; 0 where the kernel does not count it."""
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            with contextlib.suppress(OSError):
                return int((self.memory / name).read_text())
        return 0

    def remove(self) -> bool:
        """Delete the group; whether it is gone. False while a dead process is not yet counted out: ask again."""
        gone = True
        for folder in self._folders:
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                gone = False
        return gone


def sweep() -> int:
    """End what a killed daemon left behind: the processes in its groups, and the groups. How many groups are gone.

    bubblewrap's --die-with-parent misses a daemon that is killed in the first milliseconds of a worker: the new
    namespace's first process then waits for its parent for ever (seen with bubblewrap 0.8).
    """
    try:
        parent = _find_parent()
    except CgroupUnavailable:
        return 0
    swept = 0
    for folder in {child for above in parent.folders for child in above.glob("ichiba-*-*")}:
        owner = folder.name.split("-")[1]
        if not owner.isdigit() or Path("/proc", owner).exists():
            continue
        with contextlib.suppress(OSError):  # another sweep was faster, or a dead process is not yet counted out
            for number in (folder / "cgroup.procs").read_text().split():
                os.kill(int(number), signal.SIGKILL)
            folder.rmdir()
            swept += 1
    return swept


def _mounts() -> list[tuple[str, str, set[str]]]:
    """(root inside the hierarchy, mount point, options and kind) of each mounted control group hierarchy."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, _, options) = left.split(), right.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            found.append((fields[3], fields[4], {kind, *options.split(",")}))
    return found


def _own_folder(controller: str) -> Path | None:
    """This process's folder in the hierarchy of `controller`, or in version 2 for ""."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        wanted = {"cgroup", controller} if controller else {"cgroup2"}
        for root, point, options in _mounts():
            if not wanted <= options:
                continue
            inside = os.path.relpath(path, root)
            folder = Path(point) if inside.startswith("..") else Path(point, inside)
            # A container may show another root than the path counts from; its mount point is then our folder.
            return folder if folder.is_dir() else Path(point)
    return None


def _find_parent() -> _Parent:
    try:
        folder = _own_folder("")
        if folder is not None and (below := _version_2_parent(folder)) is not None:
            shared = "cpu" in (below / "cgroup.subtree_control").read_text().split()
            return _Parent(2, below, below, below if shared else None)
        memory, pids, cpu = (_own_folder(controller) for controller in (*_CONTROLLERS, "cpu"))
    except (OSError, ValueError) as error:
        raise CgroupUnavailable(0, f"cannot read this process's control groups: {error}") from None
    if memory is not None and pids is not None and os.access(memory, os.W_OK) and os.access(pids, os.W_OK):
        return _Parent(1, memory, pids, cpu if cpu is not None and os.access(cpu, os.W_OK) else None)
    raise CgroupUnavailable(
        0, "this user may not limit memory and processes of a group: no control group is delegated to it"
    )


def _version_2_parent(own: Path) -> Path | None:
    """The nearest folder above us whose children get memory and pids, and into which this user may move processes.

    A process may move where the user can write `cgroup.procs` of the common ancestor, which is that folder.
    """
    for folder in (own, *own.parents):
        handed_down = folder / "cgroup.subtree_control"
        if not handed_down.exists():
            return None
        enabled = set(handed_down.read_text().split())
        allowed = os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK)
        if allowed and set(_CONTROLLERS) <= enabled:
            return folder
        if allowed and folder == own and _hand_down(own):
            return folder
    return None


def _hand_down(own: Path) -> bool:
    """Step into a child of a folder delegated to us alone, so that it may have limited children beside us.

    A folder with processes cannot hand controllers to children ("no internal processes"), so the daemon of
    `systemd-run --user --scope -p Delegate=yes` moves itself one down. Only done when it is alone there.
    """
    available = set((own / "cgroup.controllers").read_text().split())
    members = (own / "cgroup.procs").read_text().split()
    if not set(_CONTROLLERS) <= available or members != [str(os.getpid())]:
        return False
    try:
        leaf = own / "daemon"
        leaf.mkdir(exist_ok=True)
        (leaf / "cgroup.procs").write_text(str(os.getpid()))
        with contextlib.suppress(OSError):  # a job can be capped without it, only not in its cores
            (own / "cgroup.subtree_control").write_text("+cpu")
        (own / "cgroup.subtree_control").write_text("+memory +pids")
    except OSError:
        return False
    return True
