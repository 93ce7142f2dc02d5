"""Inside the sandbox, beside a script: starts it, ends it when its time is over, and hands its outputs over.

The script runs as the same user in the same sandbox, so it may kill this process; then the daemon ends everything
itself and the outputs are lost. It gains nothing else: what is said here is checked outside (worker/script_talk.py),
and outputs are read only when every process of the script is dead.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

from protocol import params
from protocol.errors import MalformedRecord
from protocol.script import check_path
from worker import frames
from worker.room import ENVIRON, INPUTS, OUTPUTS

__all__ = ["hand_over", "run"]

_PART: Final = 1 << 18
_NOT_FOUND: Final = 127  # a shell's status for a command that is not there
_NOT_STARTED: Final = 126
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def run(job: frames.Script) -> frames.Exited:
    """Run the command to its end or to the end of its time; nothing of it is left running."""
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    environ = {**os.environ, **ENVIRON, "PYTHONPATH": os.pathsep.join(libraries), **job.environ}
    timed_out = False
    try:
        process = subprocess.Popen(job.command, cwd=INPUTS, env=environ, stdin=subprocess.DEVNULL)
    except OSError as error:
        _tell(f"cannot start {job.command[0]!r}: {error.strerror}")
        return frames.Exited(False, _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_STARTED)
    try:
        process.wait(timeout=job.seconds)
    except subprocess.TimeoutExpired:
        timed_out = True
    _end_all()
    status = process.wait()
    return frames.Exited(timed_out, status if status >= 0 else 128 - status)


def _end_all() -> None:
    """Every process of this namespace but its first one and this. None can escape by forking: the kernel holds the
    list of processes while it signals all of it."""
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)


def _tell(text: str) -> None:
    sys.stderr.write(f"ichiba: {text}\n")
    sys.stderr.flush()


def hand_over(
    outputs_bytes_max: int, say: Callable[[frames.Output], None], write: Callable[[memoryview], None]
) -> None:
    """Say each regular file of /outputs, in the order of names, then its bytes; the log tells what is left out."""
    left, kept = outputs_bytes_max, 0
    for name, descriptor in _files():
        size = os.fstat(descriptor).st_size
        if kept == params.SCRIPT_OUTPUTS_MAX or size > left:
            _tell(f"{name} and all after it is left out: at most {params.SCRIPT_OUTPUTS_MAX} outputs are kept")
            os.close(descriptor)
            return
        say(frames.Output(name, size))
        left, kept, due = left - size, kept + 1, size
        while due:
            part = os.read(descriptor, min(_PART, due))
            assert part, "nobody is left who could cut it short"
            write(memoryview(part))
            due -= len(part)
        os.close(descriptor)


def _files() -> Iterator[tuple[str, int]]:
    """(name below /outputs, open descriptor) of each regular file with a usable name. Follows no link: nobody is
    left who could put one where a folder was."""
    waiting, found, seen = [""], list[str](), 0
    while waiting and seen <= params.SCRIPT_ENTRIES_MAX:
        below = waiting.pop()
        try:
            with os.scandir(f"{OUTPUTS}/{below}") as entries:
                for entry in entries:
                    seen += 1
                    if seen > params.SCRIPT_ENTRIES_MAX:
                        _tell(f"more than {params.SCRIPT_ENTRIES_MAX} names in {OUTPUTS}: the rest is left out")
                        break
                    _sort(below, entry, waiting, found)
        except OSError as error:
            _tell(f"{below!r} is left out: {error.strerror}")
    for name in sorted(found):
        try:
            yield name, os.open(f"{OUTPUTS}/{name}", _FILE)
        except OSError as error:
            _tell(f"{name!r} is left out: {error.strerror}")


def _sort(below: str, entry: os.DirEntry[str], folders: list[str], files: list[str]) -> None:
    """Put one entry where it belongs, or tell why it is left out."""
    name = below + entry.name
    try:
        check_path(name)
        mode = entry.stat(follow_symlinks=False).st_mode
    except (MalformedRecord, OSError) as error:
        _tell(f"{name!r} is left out: {error}")
        return
    if stat.S_ISDIR(mode):
        folders.append(f"{name}/")
    elif stat.S_ISREG(mode):
        files.append(name)
    else:
        _tell(f"{name!r} is left out: it is no regular file")
