"""What a script's worker is given beside a graph worker's: its inputs, a place for outputs, and programs to start.

All of it is read-only but /scratch, /outputs and /dev/shm, which lie in the memory that the worker's control group
counts. It knows how the sandbox is told (bubblewrap's words), not who is inside.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol import params

__all__ = ["ENVIRON", "INPUTS", "OUTPUTS", "Room"]

INPUTS: Final = "/inputs"
OUTPUTS: Final = "/outputs"
_PROGRAMS: Final = "/job/bin"
# Debian's programs are links through /etc/alternatives, as awk is.
_SHOWN: Final = ("/usr/bin", "/usr/share/zoneinfo", "/etc/alternatives")
_LINKS: Final = ("/bin",)
ENVIRON: Final = {
    "PATH": f"{_PROGRAMS}:/usr/bin:/bin",
    "TMPDIR": "/scratch",
    "PYTHONUNBUFFERED": "1",  # what it prints is seen while it runs
    "PYTHONDONTWRITEBYTECODE": "1",
    "ICHIBA_INPUTS": INPUTS,
    "ICHIBA_OUTPUTS": OUTPUTS,
}


@dataclass(frozen=True)
class Room:
    """inputs: the name below /inputs of each file, and where it is outside. cores: its share of the processor."""

    inputs: Mapping[str, Path]
    memory_bytes: int
    outputs_bytes: int
    cores: int = 1

    @property
    def scratch_bytes(self) -> int:
        """The most /scratch holds: it is memory too."""
        return min(self.memory_bytes, params.SCRIPT_SCRATCH_BYTES_MAX)

    @property
    def file_bytes_max(self) -> int:
        """The largest single file."""
        return max(self.scratch_bytes, self.outputs_bytes)

    @property
    def readable(self) -> list[str]:
        """Trees it may read and start programs from."""
        return [INPUTS, *_SHOWN]

    @property
    def writable(self) -> list[str]:
        """Trees it may change, beside /scratch."""
        return [OUTPUTS, "/dev/shm"]

    @property
    def binds(self) -> list[list[str]]:
        """[outside, inside] of everything shown read-only."""
        folders = [[path, path] for path in (*_SHOWN, *_LINKS) if os.path.isdir(path) and not os.path.islink(path)]
        return folders + [[str(path), f"{INPUTS}/{name}"] for name, path in sorted(self.inputs.items())]

    @property
    def words(self) -> list[str]:
        """Words for bubblewrap, before it makes / read-only."""
        python = str(Path(sys.executable).resolve())
        words = ["--dir", INPUTS]
        for link in _LINKS:
            if os.path.islink(link):
                words += ["--symlink", os.readlink(link), link]
        for name in ("python", "python3"):
            words += ["--symlink", python, f"{_PROGRAMS}/{name}"]
        return [*words, "--perms", "0700", "--size", str(max(self.outputs_bytes, 4096)), "--tmpfs", OUTPUTS]
