"""What this machine's sandbox is worth: proven by a canary at each start, said in words, never assumed.

`probe` tries each level from the strongest down: a canary worker is started exactly as a job's would be and attacks
its confinement (worker/canary.py). The first level at which nothing gets through is the level. `admit` refuses
what a level is too weak for. It starts no jobs: peer/workshop.py does.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import trio

from protocol import params
from protocol.errors import IchibaError
from worker import canary
from worker.cage import Cage, CageFailed, Level, find_bubblewrap
from worker.frames import Attempted, BadReply, Done, Failed, Frames, Ready, Rehearsal
from worker.landlock import landlock_version
from worker.seccomp import Tier

__all__ = [
    "REQUIRED",
    "DoctorLine",
    "Level",
    "SandboxReport",
    "SandboxTooWeak",
    "admit",
    "doctor_lines",
    "probe",
    "rehearse",
]

REQUIRED: Final[Mapping[str, Level]] = {"graph": Level.FILTERED, "script": Level.CONTAINED}
_CANARY_MEMORY_BYTES: Final = 192 * 1024 * 1024  # without torch a worker takes 20 MB; the bombs take twice this
_MEANINGS: Final[Mapping[Level, str]] = {
    Level.NONE: "nothing confines a stranger's job here, so none is accepted",
    Level.LIMITS: "a job's memory and time are bounded, but it could read your files, so none is accepted",
    Level.FILTERED: "the kernel refuses a job your files, your network and your processes, though it may notice that "
    "they exist; graph jobs are accepted, scripts are not",
    Level.NAMESPACED: "a job lives in a world of its own, where your files, network and processes do not exist; graph "
    "jobs are accepted, scripts are not, because only each process alone is held to its memory",
    Level.CONTAINED: "a job lives in a world of its own, where your files, network and processes do not exist, and all "
    "its processes together are held to its memory; graph jobs and scripts are accepted",
}
_BUBBLEWRAP_FIX: Final = "apt-get install bubblewrap"
_GROUP_FIX: Final = "systemd-run --user --scope -p Delegate=yes ichiba up"


class SandboxTooWeak(IchibaError):
    """This machine proves a weaker level than the job, or the owner, asks for."""

    code = "sandbox-too-weak"


class DoctorLine(NamedTuple):
    """One line of `ichiba doctor`: what, the level it gives, why it matters, and the command that mends it."""

    what: str
    level: Level
    explanation: str
    fix: str


@dataclass(frozen=True)
class SandboxReport:
    """What was proven. attempts: for each level tried, strongest first, what got through; () means none did."""

    level: Level
    attempts: Mapping[Level, tuple[str, ...]]
    seconds: float
    landlock: int = 0
    tried: int = 0
    hints: tuple[str, ...] = field(default=())

    def words(self) -> str:
        """The report in a sentence."""
        text = f"this machine proves sandbox level {self.level.name}: {self.tried} attacks from inside were stopped"
        return "; ".join((text, *self.hints))


def admit(kind: str, level: Level, *, minimum: Level = Level.NONE) -> None:
    """Raise SandboxTooWeak unless `level` may run a job of `kind` ("graph" or "script").

    minimum: the owner's own demand; it can raise what a kind requires, never lower it.
    """
    if kind not in REQUIRED:
        raise SandboxTooWeak(f"no sandbox level is good enough for a job of unknown kind {kind[:40]!r}")
    need = max(REQUIRED[kind], minimum)
    if level < need:
        raise SandboxTooWeak(
            f"a {kind} job needs sandbox level {need.name}, this machine proves {level.name}",
            why="a stranger's code must not reach your files, your network or all your memory",
            next_step="run `ichiba doctor` to see what is missing and how to mend it",
        )


class _Decoys:
    """What a canary tries to reach: a readable secret, listeners of every kind, and this process."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> dict[str, str | int]:
        with self._stack:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ichiba-canary-")))
            folder.chmod(0o755)  # an easy prey: only the sandbox stands before it, not the file's mode
            secret = folder / "secret"
            secret.write_bytes(b"a key that nobody may read")
            secret.chmod(0o644)
            tcp = self._open(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
            udp = self._open(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
            abstract = f"ichiba-canary-{os.getpid()}-{id(self)}"
            self._open(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + abstract)
            path = str(folder / "socket")
            self._open(socket.AF_UNIX, socket.SOCK_STREAM, path)
            os.chmod(path, 0o777)
            self._stack = self._stack.pop_all()
        return {
            "secret": str(secret),
            "outside": str(folder),
            "home": str(Path.home()),
            "tcp": tcp.getsockname()[1],
            "udp": udp.getsockname()[1],
            "abstract": abstract,
            "unix": path,
            "pid": os.getpid(),
            "memory": _CANARY_MEMORY_BYTES,
        }

    def _open(self, family: int, kind: int, address: str | tuple[str, int]) -> socket.socket:
        opened = self._stack.enter_context(socket.socket(family, kind))
        opened.bind(address)
        if kind == socket.SOCK_STREAM:
            opened.listen(8)
        return opened

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _attempts(level: Level, tier: Tier) -> tuple[str, ...]:
    """The names of what must be stopped at `level`. The bombs come last: they may end the canary."""
    wanted = list(canary.LIMITS)
    if level >= Level.FILTERED:
        wanted += canary.FILTERED
        if tier is Tier.GRAPH:
            wanted += canary.GRAPH
    if level >= Level.NAMESPACED:
        wanted += canary.NAMESPACED
    if level >= Level.CONTAINED and tier is Tier.BASE:  # a graph worker has no second process and no file
        wanted += canary.CONTAINED
    return tuple(attempt.__name__.replace("_", "-") for attempt in wanted)


async def rehearse(
    level: Level, tier: Tier, attempts: tuple[str, ...], decoys: Mapping[str, str | int]
) -> tuple[list[Attempted], int, str]:
    """Start a canary at `level` and let it try `attempts`. (what it said, its Landlock version, its last words)

    An attempt without an answer is missing from the list. Raises CageFailed, BadReply; trio.TooSlowError above
    SANDBOX_PROBE_SECONDS_MAX.
    """
    cage = await Cage.start(level, tier=tier, torch=False, memory_bytes=_CANARY_MEMORY_BYTES)
    told: list[Attempted] = []
    landlock, ended = 0, ""
    try:
        with trio.fail_after(params.SANDBOX_PROBE_SECONDS_MAX):
            frames = Frames()
            while not ended:
                data = await cage.receive()
                for reply in frames.feed(data):
                    if isinstance(reply, Ready):
                        landlock = reply.landlock
                        await cage.send(Rehearsal(attempts=attempts, decoys=dict(decoys)))
                    elif isinstance(reply, Attempted):
                        told.append(reply)
                    else:
                        ended = reply.what if isinstance(reply, Failed) else "done"
                        assert isinstance(reply, Done | Failed), f"{reply} from a canary"
                ended = ended or ("" if data else "died")
    finally:
        await cage.kill()
    return told, landlock, cage.log.tail().strip()[-300:]


async def _failures(level: Level, tier: Tier) -> tuple[list[str], int, int]:
    """(what got through at `level`, the Landlock version, how many attempts were stopped)."""
    names = _attempts(level, tier)
    try:
        with _Decoys() as decoys:
            told, landlock, last_words = await rehearse(level, tier, names, decoys)
    except (CageFailed, BadReply, OSError) as error:
        return [str(error)], 0, 0
    except trio.TooSlowError:
        return [f"the canary did not end in {params.SANDBOX_PROBE_SECONDS_MAX:.0f} s"], 0, 0
    said = {one.attempt: one for one in told}
    through = [f"{name}: {said[name].detail}" for name in names if name in said and not said[name].blocked]
    silent = [name for name in names if name not in said]
    if silent:
        through.append(f"the canary died at {silent[0]}: {last_words}" if last_words else f"died at {silent[0]}")
    return through, landlock, len(said) - len(through)


async def probe(strongest: Level = Level.CONTAINED) -> SandboxReport:
    """Find the level, by proof, from `strongest` down. Takes 0.3 to 1 s where the first is proven."""
    started = trio.current_time()
    attempts: dict[Level, tuple[str, ...]] = {}
    level, version, stopped = Level.NONE, 0, 0
    for candidate in sorted(Level, reverse=True):
        if candidate > strongest or candidate is Level.NONE:
            continue
        through: list[str] = []
        stopped = 0
        for tier in (Tier.BASE, Tier.GRAPH) if candidate >= Level.FILTERED else (Tier.BASE,):
            failures, version, count = await _failures(candidate, tier)
            through += failures
            stopped += count
            if failures:
                break
        attempts[candidate] = tuple(through)
        if not through:
            level = candidate
            break
    return SandboxReport(
        level, attempts, trio.current_time() - started, version or landlock_version(), stopped, _hints(level)
    )


def _hints(level: Level) -> tuple[str, ...]:
    """What stands between this machine and the strongest level, each with its command."""
    hints = []
    path, why = find_bubblewrap()
    if level < Level.NAMESPACED and path is None:
        hints.append(f"{why}; script jobs are refused until then")
    elif level == Level.NAMESPACED:
        hints.append(f"no control group may be made here, so script jobs are refused; run `{_GROUP_FIX}`")
    return tuple(hints)


def doctor_lines(report: SandboxReport) -> list[DoctorLine]:
    """The report for a person: one line for each part of the sandbox, the missing ones with their command."""
    path, why = find_bubblewrap()
    version = landlock_version()
    lines = [
        DoctorLine(
            "sandbox",
            report.level,
            f"{report.level.name}, {report.level} of 4: {_MEANINGS[report.level]}"
            + (
                f" (proven in {report.seconds:.1f} s: {report.tried} attacks from inside were stopped)"
                if report.level
                else ""
            ),
            "" if report.level >= REQUIRED["graph"] else "see the next lines",
        )
    ]
    if path is None:
        text = why.partition(";")[0] + "; it hides your files, processes and network from a job altogether"
        lines.append(DoctorLine("bubblewrap", Level.FILTERED, text, _BUBBLEWRAP_FIX))
    elif report.level < Level.NAMESPACED:
        cause = "; ".join(report.attempts.get(Level.NAMESPACED, ())) or "it was not tried"
        fix = "sysctl -w kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0"
        lines.append(DoctorLine("bubblewrap", Level.FILTERED, f"installed, but fails here: {cause}"[:500], fix))
    else:
        lines.append(DoctorLine("bubblewrap", Level.NAMESPACED, "a job sees no file, process or network of yours", ""))
    if version:
        lines.append(
            DoctorLine("Landlock", Level.FILTERED, f"version {version} of the kernel's file rules is used", "")
        )
    else:
        text = "the kernel lacks it (Linux 5.13 has it), so without bubblewrap your files cannot be hidden"
        lines.append(
            DoctorLine("Landlock", Level.LIMITS, text, "upgrade the kernel, or add lsm=landlock to its command line")
        )
    if report.level >= Level.CONTAINED:
        lines.append(
            DoctorLine("control group", Level.CONTAINED, "memory and processes of a job are capped together", "")
        )
    elif report.level >= Level.NAMESPACED:
        cause = "; ".join(report.attempts.get(Level.CONTAINED, ())) or "it was not tried"
        lines.append(DoctorLine("control group", Level.NAMESPACED, f"not available: {cause}"[:500], _GROUP_FIX))
    for kind, need in REQUIRED.items():
        verdict = "accepted" if report.level >= need else f"refused: they need {need.name}"
        lines.append(DoctorLine(f"{kind} jobs", need, verdict, ""))
    return lines
