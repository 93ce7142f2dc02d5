"""One confined process: how it is started, spoken to, and proven dead. Torch never comes into this process.

`Cage.start` builds the confinement that a level asks for, or raises: it never starts anything weaker. What a level
is worth on this machine is found out by worker/sandbox.py; what the process does inside is worker/boot.py.

The child is started from the thread that runs trio, not by `trio.lowlevel.open_process`: that one forks in a
short-lived thread, and the kernel's parent-death signal (bubblewrap's --die-with-parent) follows the *thread*, so
every worker died 10.0 s after its start (measured, trio 0.35: the idle time of its thread cache).
"""

from __future__ import annotations

import array
import contextlib
import enum
import functools
import itertools
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

import protocol
from protocol import params
from protocol.errors import IchibaError, harmless
from worker import birth
from worker.cgroups import Cgroup, CgroupUnavailable
from worker.frames import SUSPEND, Request, frame
from worker.room import Room
from worker.seccomp import Tier, filter_program

__all__ = ["Cage", "CageFailed", "Level", "Log", "find_bubblewrap"]

_BUBBLEWRAP_OLDEST: Final = (0, 8)  # has --size, --perms and --disable-userns
_UID_FIRST: Final = 2_000_000_000  # far from any user, system or container number
_uids = itertools.cycle(range(1000))
_HERE: Final = Path(__file__).resolve().parent
_SYSTEM_LIBRARIES: Final = ("/usr/lib", "/usr/lib64")
# Without these torch does not know its processor: slow kernels with other rounding (measured: DEFAULT, not AVX2).
_PROCESSOR: Final = ("/proc/cpuinfo", "/sys/devices/system/cpu")


class Level(enum.IntEnum):
    """How well this machine confines a stranger's work, ascending. Names and order never change."""

    NONE = 0
    LIMITS = 1  # memory, time and files are bounded; the owner's files are not hidden
    FILTERED = 2  # Landlock and seccomp: no network, no file of the owner, no other process
    NAMESPACED = 3  # a view of its own of files, processes and network as well
    CONTAINED = 4  # caps that hold for a whole family of processes as well


class CageFailed(IchibaError):
    """The sandbox could not be started as asked, or did not die."""

    code = "sandbox-failed"


@dataclass
class Log:
    """The last SANDBOX_LOG_KEPT_BYTES of what the worker printed, and how much it was in all."""

    kept: bytearray = field(default_factory=bytearray)
    total: int = 0

    def add(self, data: bytes) -> None:
        """Keep the end. Constant memory."""
        self.total += len(data)
        self.kept += data
        del self.kept[: -params.SANDBOX_LOG_KEPT_BYTES]

    def tail(self) -> str:
        """What is kept, as text that is safe to show."""
        return harmless(self.kept.decode("utf-8", "replace"))


def find_bubblewrap() -> tuple[str | None, str]:
    """(path of a usable bubblewrap or None, why there is none and the command that mends it)."""
    path = shutil.which("bwrap")
    if path is None:
        return None, "bubblewrap is not installed; run `apt-get install bubblewrap`"
    return _judged(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _judged(path: str, changed_ns: int) -> tuple[str | None, str]:
    """`find_bubblewrap` of one file, asked once for as long as it is the same: asking takes some milliseconds."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
        version = tuple(int(part) for part in said.split()[-1].split(".")[:2])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        return None, f"{path} does not run ({error}); run `apt-get install --reinstall bubblewrap`"
    if version < _BUBBLEWRAP_OLDEST:
        return None, f"bubblewrap {said.split()[-1]} is too old, 0.8 is needed; run `apt-get install bubblewrap`"
    return path, ""


def _libraries() -> list[Path]:
    """The folders that hold installed packages, in this process's order; never a folder of our own source tree."""
    known = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    found = [Path(entry).resolve() for entry in sys.path if entry]
    return list(dict.fromkeys(p for p in found if p in known or p.name in ("site-packages", "dist-packages")))


def _shown() -> list[tuple[Path, str]]:
    """(what is shown, where inside): the interpreter, its libraries, and our two packages. Nothing else.

    Raises CageFailed if one of them would show the home directory too.
    """
    interpreter = Path(sys.executable).resolve()
    bases = [Path(p).resolve() for p in dict.fromkeys((sys.base_prefix, sys.base_exec_prefix))]
    wanted = [Path(p) for p in _SYSTEM_LIBRARIES]
    wanted += [Path("/" + name) for name in ("lib", "lib64") if not os.path.islink("/" + name)]
    wanted += [base / name for base in bases for name in ("lib", "lib64")]
    wanted += [*_libraries(), interpreter]
    kept: list[Path] = []
    for path in sorted({p for p in wanted if p.exists()}, key=lambda p: len(p.parts)):
        if not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    home = Path.home().resolve()
    for path in kept:
        if home.is_relative_to(path):
            raise CageFailed(
                f"showing {path} to a worker would show the home directory {home}",
                next_step="install Ichiba with a Python of its own, as in `python3 -m venv`",
            )
    kept += [Path(path) for path in _PROCESSOR if os.path.exists(path)]
    packages = [_HERE, Path(str(protocol.__file__)).resolve().parent]
    return [*((p, str(p)) for p in kept), *((p, f"/code/{p.name}") for p in packages)]


def _open_to_all(path: Path) -> bool:
    """Whether a user who owns nothing may walk to `path` and read it."""
    walk = all(parent.stat().st_mode & 0o001 for parent in path.parents)
    return walk and bool(path.stat().st_mode & 0o004)


@dataclass
class _Plan:
    """What the launcher is told, and the descriptors that must reach it."""

    config: dict[str, Any]
    passed: list[int]


def _plan(
    level: Level, *, tier: Tier, torch: bool, memory_bytes: int, environ: dict[str, str], job: int, replies: int,
    info: int, seccomp: int, joins: Sequence[str], room: Room | None,
) -> _Plan:  # fmt: skip
    """The launcher's orders for `level`. Raises CageFailed if this machine lacks what it takes."""
    namespaces, root = level >= Level.NAMESPACED, os.geteuid() == 0
    shown = _shown()
    interpreter = str(Path(sys.executable).resolve())
    boot: dict[str, Any] = {
        "code": "/code" if namespaces else str(_HERE.parent),
        "libraries": [str(path) for path in _libraries()],
        "job": job,
        "replies": replies,
        "limits": birth.limits(memory_bytes, birth.tasks_max(torch), root) if level >= Level.LIMITS else {},
        "filters": level >= Level.FILTERED,
        "namespaces": namespaces,
        "readable": [inside if namespaces else str(path) for path, inside in shown] + (room.readable if room else []),
        "writable": (["/scratch"] if namespaces else []) + (room.writable if room else []),
        "torch": torch,
        "tier": tier.value if level >= Level.FILTERED else "",
    }
    if room:
        boot["limits"]["FSIZE"] = room.file_bytes_max
    script = f"{boot['code']}/{'worker' if namespaces else _HERE.name}/boot.py"
    inner = [interpreter, "-I", "-S", "-B", "-u", script, json.dumps(boot)]
    config: dict[str, Any] = {
        "joins": list(joins),
        "binds": [],
        "uid": None,
        "powerless": root,
        "die_with_parent": not namespaces,
        "parent": os.getpid(),
        "head": inner,
        "tail": [],
        "environ": environ,
    }
    if root and (namespaces or all(_open_to_all(path) for path, _ in shown)):
        config["uid"] = _UID_FIRST + next(_uids)
    if not namespaces:
        return _Plan(config, [job, replies])
    path, why = find_bubblewrap()
    if path is None:
        raise CageFailed(why.split(";")[0], next_step=why.partition("; ")[2])
    config["binds"] = [[str(source), inside] for source, inside in shown] + (room.binds if room else [])
    scratch_bytes = room.scratch_bytes if room else params.SANDBOX_SCRATCH_BYTES
    links = [w for name in ("lib", "lib64") if os.path.islink("/" + name)
             for w in ("--symlink", os.readlink("/" + name).lstrip("/"), "/" + name)]  # fmt: skip
    config["head"] = [
        path, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session",
        "--cap-drop", "ALL", "--uid", "65534", "--gid", "65534", "--hostname", "worker", *links,
    ]  # fmt: skip
    # Without a size a tmpfs takes half the memory, and bubblewrap's / and /dev stay writable unless remounted.
    config["tail"] = [
        "--dev", "/dev", "--size", str(scratch_bytes if room else 1 << 20), "--tmpfs", "/dev/shm",
        "--perms", "0700", "--size", str(scratch_bytes), "--tmpfs", "/scratch", *(room.words if room else ()),
        "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/scratch",
        "--seccomp", str(seccomp), "--info-fd", str(info), "--", *inner,
    ]  # fmt: skip
    return _Plan(config, [job, replies, info, seccomp])


class _Pipes:
    """The ends of every channel of one worker: ours, which stay, and the child's, which close after the start."""

    def __init__(self) -> None:
        with contextlib.ExitStack() as made:
            ours, theirs = socket.socketpair()
            self.job_ours: socket.socket = made.enter_context(ours)
            self.job: socket.socket = made.enter_context(theirs)
            # So that most tensors a unit is fed go in one call; the system grants what it grants.
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, params.SANDBOX_FEED_BYTES)
            self.numbers = [end for _ in range(3) for end in os.pipe2(os.O_CLOEXEC)]
            made.pop_all()
        self.replies_ours, self.replies, self.log_ours, self.log, self.info_ours, self.info = self.numbers
        with contextlib.suppress(OSError):  # beyond this user's share of pipe memory; then it stays at 64 KiB
            import fcntl

            fcntl.fcntl(self.replies_ours, fcntl.F_SETPIPE_SZ, 1 << 20)

    def close_theirs(self) -> None:
        self.job.close()
        for number in (self.replies, self.log, self.info):
            os.close(number)

    def close_ours(self) -> None:
        self.job_ours.close()
        for number in (self.replies_ours, self.log_ours, self.info_ours):
            os.close(number)


@contextlib.contextmanager
def _filter_file() -> Iterator[int]:
    """A descriptor to read the base filter from, for bubblewrap."""
    number = os.memfd_create("filter", os.MFD_CLOEXEC)
    try:
        os.write(number, filter_program(Tier.BASE))
        os.lseek(number, 0, os.SEEK_SET)
        yield number
    finally:
        os.close(number)


class Cage:
    """One confined process for one job. Made by `start`; `kill` must be awaited exactly once, whatever happened."""

    def __init__(self, process: subprocess.Popen[bytes], pipes: _Pipes, group: Cgroup | None, namespaced: bool) -> None:
        self.process, self.group, self.namespaced = process, group, namespaced
        self.log = Log()
        self.pidfd = os.pidfd_open(process.pid)  # no race: we have not reaped it
        self.initfd: int | None = None
        self._job = trio.socket.from_stdlib_socket(pipes.job_ours)
        self._replies = trio.lowlevel.FdStream(pipes.replies_ours)
        self._log = trio.lowlevel.FdStream(pipes.log_ours)
        self._info = trio.lowlevel.FdStream(pipes.info_ours)
        self.sent = False  # the whole request is out: only now may something else follow it
        self.oom_kills = 0
        self.memory_peak_bytes = 0

    @classmethod
    async def start(
        cls,
        level: Level,
        *,
        tier: Tier = Tier.GRAPH,
        torch: bool = True,
        memory_bytes: int | None = None,
        threads: int = 1,
        kernels: Mapping[str, str] | None = None,
        room: Room | None = None,
    ) -> Cage:
        """Start a process confined as `level` asks; it says Ready on its replies when it is warm.

        memory_bytes: the cap until a job brings its own; by default the group's cap is SANDBOX_MEMORY_BYTES_MIN
        and the process's own the machine's memory, for a job can only lower that one. room: a script's, at CONTAINED
        only. kernels: the variables that a profile chooses the code of torch and MKL by (worker/birth.py). Raises
        CageFailed; then nothing is left running.
        """
        if room is not None and level < Level.CONTAINED:
            raise CageFailed(
                f"a script's worker is never started at level {level.name}", next_step="run `ichiba doctor`"
            )
        if level >= Level.FILTERED and platform.machine() != "x86_64":
            raise CageFailed(f"no system-call filter for {platform.machine()}", why="only x86_64 has one")
        environ, cores = birth.environ(threads, kernels or {}), room.cores if room else 0
        group = _make_group(level, memory_bytes or params.SANDBOX_MEMORY_BYTES_MIN, birth.tasks_max(torch), cores)
        most = memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        pipes = _Pipes()
        try:
            with _filter_file() as seccomp:
                plan = _plan(
                    level, tier=tier, torch=torch, memory_bytes=most, environ=environ, job=pipes.job.fileno(),
                    replies=pipes.replies, info=pipes.info, seccomp=seccomp, joins=group.joins if group else (),
                    room=room,
                )  # fmt: skip
                process = subprocess.Popen(  # noqa: ASYNC220  # vfork, a few ms; see the module's words on threads
                    [sys.executable, "-I", "-S", str(_HERE / "launch.py"), json.dumps(plan.config)],
                    stdin=subprocess.DEVNULL, stdout=pipes.log, stderr=pipes.log, pass_fds=plan.passed, cwd="/",
                    env=plan.config["environ"], start_new_session=True,
                )  # fmt: skip
        except (OSError, CageFailed) as error:
            pipes.close_theirs()
            pipes.close_ours()
            if group is not None:
                group.remove()
            if isinstance(error, CageFailed):
                raise
            raise CageFailed(f"cannot start a process: {error}") from None
        pipes.close_theirs()
        cage = cls(process, pipes, group, level >= Level.NAMESPACED)
        found = not cage.namespaced
        try:
            if not found:
                await cage._find_init()
                found = True
        finally:
            if not found:
                await cage.kill()
        return cage

    async def _find_init(self) -> None:
        """Hold the first process of the new process namespace: when it is dead, all in the namespace are."""
        said = b""
        with trio.move_on_after(params.SANDBOX_START_SECONDS_MAX):
            while not said.rstrip().endswith(b"}"):
                part = await self._info.receive_some(4096)
                if not part:
                    break
                said += part
        try:
            child = int(json.loads(said)["child-pid"])
            self.initfd = os.pidfd_open(child)
            parent = _parent_of(child)
        except (ValueError, KeyError, TypeError, IndexError, OSError):
            with trio.move_on_after(1):  # it is dying, and says why
                await self._read_rest_of_log()
            why = self.log.tail().strip().rpartition("\n")[2][-500:]
            raise CageFailed("bubblewrap did not start", why=why, next_step="run `ichiba doctor`") from None
        if parent != self.process.pid:  # the number was reused: that is somebody else's process
            os.close(self.initfd)
            self.initfd = None
            raise CageFailed("the worker died at once")

    async def send(self, request: Request, descriptors: Sequence[int] = ()) -> None:
        """Hand over the job and read-only copies of `descriptors`. A worker that is gone shows in `receive`."""
        data = frame(request)
        numbers = array.array("i", descriptors).tobytes()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if descriptors else []
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sent = await self._job.sendmsg([data[:4]], rights)
            rest = memoryview(data)[sent:]
            while rest:
                rest = rest[await self._job.send(rest) :]
            self.sent = True

    async def feed(self, head: bytes, payload: bytes) -> None:
        """Hand a payload to a unit's worker, which has asked for it (worker/stage_frames.py)."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sent = await self._job.sendmsg([head, payload])
            rest = memoryview(head)[sent:]
            while rest:
                rest = rest[await self._job.send(rest) :]
            rest = memoryview(payload)[max(0, sent - len(head)) :]
            while rest:
                rest = rest[await self._job.send(rest) :]

    async def suspend(self) -> None:
        """Ask the job to stop before its next step and say Suspended."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await self._job.send(SUSPEND)

    async def receive(self) -> bytes:
        """The next bytes of the replies, at most 1 MiB; empty when the worker closed them or died."""
        return bytes(await self._replies.receive_some(1 << 20))

    async def drain_log(self) -> None:
        """Read what it prints until it ends. Raises CageFailed with code `log-flood` above SANDBOX_LOG_BYTES_MAX."""
        while part := await self._log.receive_some(65536):
            self.log.add(bytes(part))
            if self.log.total > params.SANDBOX_LOG_BYTES_MAX:
                error = CageFailed(f"the worker printed more than {params.SANDBOX_LOG_BYTES_MAX} bytes")
                error.code = "log-flood"
                raise error

    def limit_memory(self, memory_bytes: int) -> None:
        """Set the cap of its control group, if it has one. Raises CageFailed."""
        if self.group is not None:
            try:
                self.group.limit_memory(memory_bytes)
            except OSError as error:
                raise CageFailed(f"cannot cap the worker's memory at {memory_bytes} bytes: {error}") from None

    async def kill(self) -> int | None:
        """End every process inside and prove it. The log is whole afterwards.

        Gives the exit status as subprocess has it if the worker had ended by itself, None if this killed it.

        Raises CageFailed if death cannot be proven within SANDBOX_DEATH_SECONDS_MAX; never leaves early, not even
        when cancelled.
        """
        dead, status = False, self.process.poll()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(params.SANDBOX_DEATH_SECONDS_MAX):
                await self._end_processes()
                await self._read_rest_of_log()
                if self.group is not None:
                    self.oom_kills = self.group.oom_kills()
                    self.memory_peak_bytes = self.group.memory_peak_bytes()
                    while not self.group.remove():  # noqa: ASYNC110  # the kernel counts the dead out a moment later
                        await trio.sleep(0.005)
                dead = True
            for stream in (self._replies, self._log, self._info):
                await stream.aclose()
            self._job.close()
            for number in (self.pidfd, self.initfd):
                if number is not None:
                    os.close(number)
        if not dead:
            raise CageFailed(
                f"worker process {self.process.pid} did not die in {params.SANDBOX_DEATH_SECONDS_MAX:.0f} s",
                why="the kernel holds it in an uninterruptible call",
                next_step="restart the machine if it stays in `ps`",
            )
        return status

    async def _end_processes(self) -> None:
        if self.initfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.initfd, signal.SIGKILL)
            await trio.lowlevel.wait_readable(self.initfd)  # readable once its whole namespace is reaped
        elif self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # its own session: children that stayed in it too
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        await trio.lowlevel.wait_readable(self.pidfd)
        self.process.wait()

    async def _read_rest_of_log(self) -> None:
        """All writers are dead or dying: what is left fits in the pipe."""
        with contextlib.suppress(trio.ClosedResourceError, trio.BrokenResourceError):
            while part := await self._log.receive_some(65536):
                self.log.add(bytes(part))


def _parent_of(number: int) -> int:
    """The parent of process `number`. Raises OSError, ValueError."""
    return int(Path(f"/proc/{number}/status").read_text().partition("\nPPid:")[2].split()[0])


def _make_group(level: Level, memory_bytes: int, tasks: int, cores: int) -> Cgroup | None:
    """A control group: CONTAINED needs one, the levels below take one where they can."""
    if level <= Level.LIMITS:
        return None
    try:
        return Cgroup.create(memory_bytes=memory_bytes, processes=tasks, cores=cores)
    except CgroupUnavailable as error:
        if level >= Level.CONTAINED:
            raise CageFailed(
                f"no control group: {error.strerror}",
                next_step="run `systemd-run --user --scope -p Delegate=yes ichiba up`",
            ) from None
        return None
