"""What the workers of this peer compute on: its processor, or a graphics card that they are given.

A card that no worker can use is no capacity: it is named to the owner (`ichiba doctor`), never to the market. Ask in a
thread: a driver may take its time.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, Literal

from peer.sensors import ask_nvidia

__all__ = ["Device", "find_device"]

_QUERY: Final = ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
_MIB_MAX: Final = 2**24  # 16 TiB: a driver that says more is not believed


@dataclass(frozen=True)
class Device:
    """kind and memory_bytes: what the market is told. note: about a card that workers do not use."""

    kind: Literal["cpu", "gpu"] = "cpu"
    memory_bytes: int = 0
    name: str = ""
    note: str = ""


def find_device(used: Collection[str], ask: Callable[[tuple[str, ...]], str | None] = ask_nvidia) -> Device:
    """The device of this peer. used: the kinds of device that its workers compute on. A machine with several cards is
    as large as the one with the most memory: a job runs on one."""
    try:
        said = ask(_QUERY)
    except (OSError, subprocess.SubprocessError) as error:
        return Device(note=f"nvidia-smi failed, so no graphics card is offered: {error}"[:200])
    cards = [card for line in (said or "").splitlines()[:64] if (card := _card(line)) is not None]
    if not cards:
        return Device()
    memory_bytes, name = max(cards)
    if "gpu" not in used:
        note = f"{name} with {memory_bytes >> 30} GiB is here and is not offered: the sandbox gives workers no card"
        return Device(note=note)
    return Device("gpu", memory_bytes, name)


def _card(line: str) -> tuple[int, str] | None:
    """Bytes and name of one line of nvidia-smi; None for a line that does not tell them."""
    name, comma, mib = line.rpartition(",")
    if not comma or not mib.strip().isdecimal() or not 0 < int(mib.strip()[:12]) <= _MIB_MAX:
        return None
    return int(mib.strip()) << 20, "".join(c for c in name.strip()[:64] if " " <= c <= "~")
