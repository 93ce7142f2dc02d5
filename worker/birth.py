"""What the process of a worker is born with, before any code of it runs: its limits and its environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from protocol import params
from protocol.errors import LocalProtocolError
from protocol.profile import KERNELS

__all__ = ["environ", "limits", "tasks_max"]

_CHOICES: Final = {choice for kernels in KERNELS for choice in kernels.environment.items()}


def _user_tasks() -> int:
    """Processes and threads of this user now: RLIMIT_NPROC counts them all outside a new user namespace."""
    tasks = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if folder.stat().st_uid == os.getuid():
                    tasks += len(os.listdir(folder / "task"))
    return tasks


def environ(threads: int, kernels: Mapping[str, str]) -> dict[str, str]:
    """All that a worker's environment holds. kernels: the variables of one of protocol.profile.KERNELS.

    Raises LocalProtocolError for any other: a variable may make a library load code.
    """
    strange = sorted(set(kernels.items()) - _CHOICES)
    if strange:
        raise LocalProtocolError(f"{strange[0][0]}={strange[0][1]} is no variable that a profile sets for its worker")
    counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return (
        {"PATH": "/usr/bin", "HOME": "/scratch", "LANG": "C.UTF-8"}
        | dict.fromkeys(counts, str(threads))
        | dict(kernels)
    )


def tasks_max(torch: bool) -> int:
    """Processes and threads of one worker: a job may ask for a thread on each core."""
    return params.SANDBOX_PROCESSES_MAX + (os.cpu_count() or 1 if torch else 0)


def limits(memory_bytes: int, tasks: int, root: bool) -> dict[str, int]:
    """rlimits from the start. A job lowers CPU, DATA and AS to its own when it comes."""
    return {
        "CORE": 0,
        "CPU": 24 * 3600,
        "AS": memory_bytes + params.SANDBOX_ADDRESS_SLACK_BYTES,
        "DATA": memory_bytes,
        "FSIZE": params.SANDBOX_SCRATCH_BYTES,
        "NOFILE": params.SANDBOX_FILES_MAX,
        "NPROC": tasks + (0 if root else _user_tasks()),
        "MEMLOCK": 0,
        "STACK": params.SANDBOX_STACK_BYTES,
        "MSGQUEUE": 0,
        "SIGPENDING": 256,
    }
