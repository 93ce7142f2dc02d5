"""What a job requires of its solver beside a price: the [require] table of job.toml, and the options that override it.

Read strictly, without torch and without a clock: a deadline stays what its author wrote until somebody says what time
it is. A time without a zone is refused, for it means another moment on another machine.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from protocol import params
from protocol.errors import IchibaError

__all__ = ["GRAPH_KEYS", "SCRIPT_KEYS", "BadRequirement", "Deadline", "Require", "read_deadline", "read_require"]

GRAPH_KEYS: Final = ("device", "vram", "memory", "sandbox", "deadline")
SCRIPT_KEYS: Final = ("device", "vram", "deadline")
_DEVICES: Final = ("any", "cpu", "gpu")
_LEVELS: Final = tuple(name.lower() for name in params.SANDBOX_LEVELS)
_SIZES: Final = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SPANS_NS: Final = {"s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9, "d": 86_400 * 10**9}
_DEADLINE_EXAMPLE: Final = 'write it as in "2h", "90m" or "2027-01-31T18:00+01:00"'


class BadRequirement(IchibaError):
    """A requirement that means nothing, or that no solver can meet."""

    code = "bad-job-file"
    exit_code = 2


@dataclass(frozen=True)
class Deadline:
    """When the work must be done: so long after its submission, or at a moment; the other is 0. In ns."""

    after_ns: int = 0
    at_ns: int = 0

    def moment_ns(self, now_ns: int) -> int:
        """The moment for a job submitted now, in ns since the epoch. Raises BadRequirement if it is not ahead."""
        at_ns = self.at_ns or now_ns + self.after_ns
        if not 0 < at_ns - now_ns <= params.DEADLINE_NS_MAX:
            when = datetime.fromtimestamp(at_ns // 10**9, UTC).isoformat()
            raise BadRequirement(
                f"the deadline {when} is {'past' if at_ns <= now_ns else 'more than a year away'}",
                why="the offer of a job ends with its deadline",
                next_step=_DEADLINE_EXAMPLE,
            )
        return at_ns


@dataclass(frozen=True)
class Require:
    """What a solver must have. memory_bytes: for one job, beside what the job is known to take. sandbox: a level, or
    None. device_memory_bytes: on its graphics card."""

    device: str = "any"
    device_memory_bytes: int = 0
    memory_bytes: int = 0
    sandbox: int | None = None
    deadline: Deadline | None = None

    def terms(self, now_ns: int) -> dict[str, Any]:
        """As the daemon takes them of a job submitted now. Raises BadRequirement for a deadline that is not ahead."""
        made: dict[str, Any] = {"device": self.device, "device_memory_bytes": self.device_memory_bytes}
        return made | ({"deadline_ns": self.deadline.moment_ns(now_ns)} if self.deadline is not None else {})

    def overridden(self, *, device: str | None, device_memory_bytes: int | None, deadline: str | None) -> Require:
        """With what the command line says in place of what the file says. Raises BadRequirement."""
        made = replace(
            self,
            device=device or self.device,
            device_memory_bytes=self.device_memory_bytes if device_memory_bytes is None else device_memory_bytes,
            deadline=read_deadline(deadline) if deadline else self.deadline,
        )
        return made.checked(explicit=device is not None)

    def checked(self, *, explicit: bool) -> Require:
        """Memory of a card needs a card, and asks for one. explicit: whether the device was named. Raises
        BadRequirement."""
        if not self.device_memory_bytes or self.device == "gpu":
            return self
        if explicit:
            raise BadRequirement(
                f"{self.device_memory_bytes >> 20} MiB of vram on the device {self.device!r}",
                why="only a graphics card has memory of its own",
                next_step='ask for device = "gpu", or for no vram',
            )
        return replace(self, device="gpu")


def read_require(raw: Any, keys: tuple[str, ...] = GRAPH_KEYS) -> Require:
    """The [require] table of a job.toml, None for none. Raises BadRequirement."""
    if raw is None:
        return Require()
    if not isinstance(raw, dict):
        raise BadRequirement("require is no table", next_step="write [require] on a line of its own")
    for key in raw:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            raise BadRequirement(
                f"unknown key {key!r} in [require]",
                next_step=f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(keys)}",
            )
    return Require(
        device=_word(raw, "device", _DEVICES) or "any",
        device_memory_bytes=_size(raw, "vram"),
        memory_bytes=_size(raw, "memory"),
        sandbox=_LEVELS.index(level) if (level := _word(raw, "sandbox", _LEVELS[2:])) else None,
        deadline=read_deadline(raw["deadline"]) if "deadline" in raw else None,
    ).checked(explicit="device" in raw)


def read_deadline(value: Any) -> Deadline:
    """A span such as "2h", or a time in ISO 8601 with its zone, as text or as TOML has it. Raises BadRequirement."""
    if isinstance(value, str) and (span := re.fullmatch(r"([0-9]{1,9})([smhd])", value.strip(), re.ASCII)):
        after_ns = int(span[1]) * _SPANS_NS[span[2]]
        if not 0 < after_ns <= params.DEADLINE_NS_MAX:
            raise BadRequirement(f"the deadline {value!r} is no time ahead within a year", next_step=_DEADLINE_EXAMPLE)
        return Deadline(after_ns=after_ns)
    moment = value
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.strip())
        except ValueError:
            moment = None
    if not isinstance(moment, datetime):
        raise BadRequirement(
            f"the deadline {str(value)[:40]!r} is neither a span nor a time", next_step=_DEADLINE_EXAMPLE
        )
    if moment.tzinfo is None:
        raise BadRequirement(
            f"the deadline {moment.isoformat()} names no time zone",
            why="it would be another moment on another machine",
            next_step=f'write it as in "{moment.isoformat()}Z" or "{moment.isoformat()}+01:00"',
        )
    at_ns = int((moment - datetime.fromtimestamp(0, UTC)).total_seconds()) * 10**9
    if not 0 < at_ns < params.FOREVER_NS:
        raise BadRequirement(f"the deadline {moment.isoformat()} is no time of this age", next_step=_DEADLINE_EXAMPLE)
    return Deadline(at_ns=at_ns)


def _word(raw: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> str:
    value = raw.get(key, "")
    if (value and value not in choices) or (key in raw and not value):
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(map(repr, choices))}"
        raise BadRequirement(f"{key} in [require] is {value!r}", next_step=hint)
    return str(value)


def _size(raw: Mapping[str, Any], key: str) -> int:
    """Bytes, as in "24GiB" or "512M"; 0 where the key is not there."""
    if key not in raw:
        return 0
    found = re.fullmatch(r"([0-9]{1,6})\s?([KMGT])(iB|B|)", str(raw[key]), re.ASCII)
    if found is None or not int(found[1]):
        raise BadRequirement(
            f"{key} in [require] is {raw[key]!r}, it must be a size", next_step=f'write it as in {key} = "24GiB"'
        )
    return int(found[1]) * _SIZES[found[2]]
