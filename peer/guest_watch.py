"""Keeps a running peer a good guest: looks at the sensors every few seconds, pauses it by a rule, lets it go on after.

The rules are the data directory's earn.toml, read again whenever it changed. A file that does not read any more changes
nothing but what is told: a misspelt limit must never become no limit. What the owner paused stays paused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import trio

from peer.energy import read_book, write_book
from peer.guest import BadRules, Guest, GuestRules, Reading, Reason, read_rules
from peer.sensors import Sensors
from protocol import params
from protocol.errors import IchibaError

__all__ = ["ENERGY_FILE", "RULES_FILE", "GuestWatch"]

RULES_FILE: Final = "earn.toml"
_FIELDS: Final = ("idle_s", "load", "cpu_celsius", "battery_percent", "gpu_celsius", "power_watts", "other_gpu_pids")
ENERGY_FILE: Final = "energy.json"
log = logging.getLogger(__name__)


@dataclass
class GuestWatch:
    """`command`: a verb of the node, answered. `wall_s` and `steady_ns`: the clocks."""

    path: Path
    command: Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
    sensors: Sensors = field(default_factory=Sensors)
    wall_s: Callable[[], float] = time.time
    steady_ns: Callable[[], int] = time.monotonic_ns
    guest: Guest = field(default_factory=lambda: Guest(GuestRules()))
    text: str = ""
    trouble: Reason | None = None  # with the file
    told: frozenset[str] = frozenset()  # what cannot be read
    looked_ns: int = 0

    async def run(self) -> None:
        """Look, for as long as the daemon lives."""
        while True:
            try:
                await self.look()
            except IchibaError as error:
                log.warning("the rules of earn.toml were not applied: %s", error)
            await trio.sleep(params.GUEST_READ_SECONDS)

    async def look(self) -> Reason | None:
        """One look: read the file and the sensors, decide, and pause the peer or let it go on."""
        await self._reload()
        status = await self.command("status", {})
        asked = self.guest.rules != GuestRules() or _works(status)
        reading = await self._read(self.wall_s()) if asked else Reading()
        reason = self.trouble or self._judge(status, reading)
        by = str(status["paused_by"])
        if reason is not None:
            if not status["paused_since_ns"] or (by != "owner" and by != reason.code):
                order = {"within_ms": params.SUSPEND_SECONDS * 1000, "by": reason.code, "why": reason.why}
                await self.command("pause", order)
        elif status["paused_since_ns"] and by != "owner":
            await self.command("resume", {"by": "guest"})
        await self._account(status, reading)
        return reason

    def _judge(self, status: dict[str, Any], reading: Reading) -> Reason | None:
        if self.guest.rules == GuestRules():
            self.guest.holding = None
            return None
        at = datetime.fromtimestamp(self.wall_s())
        return self.guest.step(reading, at=at, now_ns=self.steady_ns(), working=_works(status))

    async def _account(self, status: dict[str, Any], reading: Reading) -> None:
        """Note what the work since the last look drew."""
        now_ns = self.steady_ns()
        seconds, self.looked_ns = (now_ns - self.looked_ns) / 1e9 if self.looked_ns else 0.0, now_ns
        if not _works(status):
            return
        day = datetime.fromtimestamp(self.wall_s()).date().isoformat()
        path = self.path.with_name(ENERGY_FILE)
        try:
            book = await trio.to_thread.run_sync(read_book, path)
            watts, drawn = self.guest.rules.watts, reading.power_watts if reading.gpus else None
            book.add(day, seconds, configured_w=watts, measured_w=drawn)
            await trio.to_thread.run_sync(write_book, path, book)
        except OSError as error:
            log.warning("what the work drew is not noted: %s", error)

    async def _read(self, now: float) -> Reading:
        """The sensors' reading; a driver that hangs costs its reading, never the daemon."""
        reading = Reading(gpus=1, other_gpu_pids=None, cannot=dict.fromkeys(_FIELDS, "the sensors do not answer"))
        with trio.move_on_after(3 * params.GUEST_SENSOR_SECONDS_MAX):
            # mypy loses the keywords of run_sync behind its unpacked arguments.
            reading = await trio.to_thread.run_sync(self.sensors.read, now, abandon_on_cancel=True)  # type: ignore[call-arg]
        if fresh := frozenset(reading.cannot) - self.told:
            log.info("not to be read here: %s", "; ".join(f"{n} ({reading.cannot[n]})" for n in sorted(fresh)))
            self.told |= fresh
        return reading

    async def _reload(self) -> None:
        try:
            text = await trio.to_thread.run_sync(self._file)
        except (OSError, UnicodeDecodeError) as error:
            self.trouble = Reason("rules", f"earn.toml cannot be read: {error}"[:300])
            return
        if text == self.text and self.trouble is None:
            return
        try:
            rules = read_rules(text)
        except BadRules as error:
            self.trouble = Reason("rules", f"{error}"[:300])
            if text != self.text:
                log.error("earn.toml: %s", error)
        else:
            self.trouble, self.guest.rules = None, rules
        self.text = text

    def _file(self) -> str:
        if not self.path.exists():
            return ""
        with self.path.open("rb") as file:
            return file.read(params.GUEST_RULES_CHARS_MAX + 1).decode("utf-8")


def _works(status: dict[str, Any]) -> bool:
    """Whether work of others is on its way here, as far as the node tells."""
    return not status["paused_since_ns"] and bool(status["unfinished"])
