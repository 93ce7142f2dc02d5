"""What the machine can tell about its owner and its state: use, load, heat, battery, power, and who uses the GPU.

Reads files under /proc, /sys and /dev and asks nvidia-smi, all bounded in bytes, count and time; what does not parse or
is out of any sane range is as good as missing, and is named in `cannot`. Linux only; elsewhere all of it is missing.
Call `read` in a thread: a driver may take its time. It knows no rules (peer/guest.py).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from peer.guest import Reading
from protocol import params

__all__ = ["Sensors", "ask_nvidia", "belongs_to"]

_CPU_CHIPS: Final = frozenset(("coretemp", "k10temp", "zenpower", "cpu_thermal", "k8temp"))
_CPU_ZONES: Final = ("x86_pkg_temp", "cpu", "soc")
_QUERY_GPU: Final = ("--query-gpu=temperature.gpu,power.draw", "--format=csv,noheader,nounits")
_QUERY_APPS: Final = ("--query-compute-apps=pid", "--format=csv,noheader,nounits")


def ask_nvidia(arguments: tuple[str, ...]) -> str | None:
    """What nvidia-smi says; None where there is none. Raises OSError or subprocess.SubprocessError if it fails."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, timeout=params.GUEST_SENSOR_SECONDS_MAX, check=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        return None
    return done.stdout[: params.GUEST_SENSOR_BYTES_MAX].decode("ascii", "replace")


@dataclass(frozen=True)
class Sensors:
    """`root`: where proc, sys and dev lie; `nvidia`: asks nvidia-smi; `ours`: whether a process is this peer's."""

    root: Path = Path("/")
    nvidia: Callable[[tuple[str, ...]], str | None] = ask_nvidia
    ours: Callable[[int], bool] = lambda pid: belongs_to(pid, os.getpid())

    def read(self, now_s: float) -> Reading:
        """One reading. now_s: seconds since the epoch, which the times of the devices are counted from."""
        cannot: dict[str, str] = {}
        on_battery, percent = self._battery(cannot)
        gpus, gpu_celsius, power_watts = self._gpus(cannot)
        return Reading(
            idle_s=self._idle(now_s, cannot),
            load=self._load(cannot),
            cpu_celsius=self._cpu(cannot),
            on_battery=on_battery,
            battery_percent=percent,
            gpus=gpus,
            gpu_celsius=gpu_celsius,
            power_watts=power_watts,
            other_gpu_pids=self._others(cannot) if gpus else (),
            cannot=cannot,
        )

    # --- its owner -------------------------------------------------------------------------------------------
    def _idle(self, now_s: float, cannot: dict[str, str]) -> float | None:
        """Seconds since a terminal or an input device was last used, as its inode tells: the newest of all.

        A kernel notes the use of terminals to 8 s and that of input devices not everywhere, so a desktop may be in
        use unseen; `cannot` says so where no input device tells anything.
        """
        inputs = [*self._times("dev/input", "event*")]
        if not inputs:
            cannot["input"] = "no device in /dev/input can be seen: a mouse or keyboard in use may go unseen"
        times = [*inputs, *self._times("dev", "tty[0-9]*"), *self._times("dev/pts", "[0-9]*")]
        if not times:
            cannot["idle_s"] = "neither /dev/input nor a terminal can be seen"
            return None
        return max(0.0, now_s - max(times))

    def _times(self, folder: str, pattern: str) -> Iterable[float]:
        for path in self._files(folder, pattern):
            try:
                status = path.stat()
            except OSError:
                continue
            yield max(status.st_atime, status.st_mtime)

    def _load(self, cannot: dict[str, str]) -> float | None:
        found = _number(self._text(self.root / "proc/loadavg").split(" ")[0], 0, 1e6)
        if found is None:
            cannot["load"] = "/proc/loadavg tells none"
        return found

    # --- the machine -----------------------------------------------------------------------------------------
    def _cpu(self, cannot: dict[str, str]) -> float | None:
        """The hottest sensor of a processor, in degrees Celsius."""
        found: list[float] = []
        for zone in self._files("sys/class/thermal", "thermal_zone*"):
            if self._text(zone / "type").strip().lower().startswith(_CPU_ZONES):
                found += self._degrees(zone / "temp")
        for chip in self._files("sys/class/hwmon", "hwmon*"):
            if self._text(chip / "name").strip() in _CPU_CHIPS:
                for path in self._files(str(chip.relative_to(self.root)), "temp*_input"):
                    found += self._degrees(path)
        if not found:
            cannot["cpu_celsius"] = "no sensor of a processor in /sys/class/thermal or /sys/class/hwmon"
        return max(found, default=None)

    def _degrees(self, path: Path) -> list[float]:
        milli = _number(self._text(path), -50_000, 150_000)
        return [] if milli is None else [milli / 1000]

    def _battery(self, cannot: dict[str, str]) -> tuple[bool, int | None]:
        """Whether the machine runs on a battery of its own, and the level of the emptiest in percent."""
        discharging, levels = False, list[int]()
        for supply in self._files("sys/class/power_supply", "*"):
            kind, scope = (self._text(supply / name).strip().lower() for name in ("type", "scope"))
            if kind != "battery" or scope == "device":  # a mouse has one too
                continue
            discharging |= self._text(supply / "status").strip().lower() == "discharging"
            level = _number(self._text(supply / "capacity"), 0, 100)
            levels += [] if level is None else [int(level)]
        if discharging and not levels:
            cannot["battery_percent"] = "no battery in /sys/class/power_supply tells its level"
        return discharging, min(levels, default=None)

    # --- graphics cards --------------------------------------------------------------------------------------
    def _gpus(self, cannot: dict[str, str]) -> tuple[int, float | None, float | None]:
        """How many there are, the hottest in degrees Celsius, and what they draw together in watts."""
        try:
            said = self.nvidia(_QUERY_GPU)
        except (OSError, subprocess.SubprocessError) as error:
            cannot["gpu_celsius"] = cannot["power_watts"] = f"nvidia-smi failed: {error}"[:200]
            return 1, None, None  # there is a driver, so there may be a card
        if said is None:
            cannot["gpu"] = "no nvidia-smi: no graphics card that this peer could watch"
            return 0, None, None
        rows = [[part.strip() for part in line.split(",")] for line in said.splitlines()[:64] if line.strip()]
        degrees = [_number(row[0], -50, 150) for row in rows]
        watts = [_number(row[1], 0, 10_000) if len(row) > 1 else None for row in rows]
        known, drawn = [d for d in degrees if d is not None], [w for w in watts if w is not None]
        if rows and len(known) < len(rows):
            cannot["gpu_celsius"] = "nvidia-smi tells no temperature of a card"
        if rows and len(drawn) < len(rows):
            cannot["power_watts"] = "nvidia-smi tells no power of a card"
        whole_heat, whole_power = len(known) == len(rows) > 0, len(drawn) == len(rows) > 0
        return len(rows), max(known) if whole_heat else None, sum(drawn) if whole_power else None

    def _others(self, cannot: dict[str, str]) -> tuple[int, ...] | None:
        """Processes of others that compute on a card."""
        try:
            said = self.nvidia(_QUERY_APPS)
        except (OSError, subprocess.SubprocessError) as error:
            cannot["other_gpu_pids"] = f"nvidia-smi failed: {error}"[:200]
            return None
        pids = {int(line) for line in (said or "").splitlines()[:4096] if line.strip().isdecimal() and len(line) < 12}
        return tuple(sorted(pid for pid in pids if not self.ours(pid)))

    # --- files -----------------------------------------------------------------------------------------------
    def _files(self, folder: str, pattern: str) -> list[Path]:
        try:
            return sorted((self.root / folder).glob(pattern))[: params.GUEST_SENSOR_FILES_MAX]
        except OSError:
            return []

    @staticmethod
    def _text(path: Path) -> str:
        try:
            with path.open("rb") as file:
                return file.read(params.GUEST_SENSOR_BYTES_MAX).decode("ascii", "replace")
        except OSError:
            return ""


def _number(text: str, low: float, high: float) -> float | None:
    """A plain decimal number in a sane range, or None: nan, inf and 1e9 degrees are none."""
    try:
        found = float(text.strip()[:32])
    except ValueError:
        return None
    return found if low <= found <= high else None


def belongs_to(pid: int, ancestor: int, proc: Path = Path("/proc")) -> bool:
    """Whether a process is `ancestor` or descends from it, as far as /proc tells."""
    for _ in range(64):
        if pid == ancestor:
            return True
        try:
            lines = (proc / str(pid) / "status").read_text("ascii", "replace").splitlines()
        except OSError:
            return False
        parent = next((line[5:].strip() for line in lines if line.startswith("PPid:")), "")
        if not parent.isdecimal() or int(parent) <= 1:
            return False
        pid = int(parent)
    return False
