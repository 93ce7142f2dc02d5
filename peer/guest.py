"""When a guest may work on its owner's machine: rules in a small file, readings of sensors, and one reason or none.

Pure: times and readings are passed in (peer/sensors.py reads them). A rule that pauses lets go only when its cause has
been well away for a while, so that work does not flap. What a rule asks for and no sensor can tell counts against
working: a guest that cannot see whether it is in the way stays out of it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Final, Literal

from protocol import params
from protocol.credits import credits_of, micro_of
from protocol.errors import IchibaError

__all__ = ["BadRules", "Guest", "GuestRules", "Reading", "Reason", "Window", "dump_rules", "merged", "read_rules"]

_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WINDOW: Final = re.compile(r"(\d\d):(\d\d)-(\d\d):(\d\d)(?: ([a-z,-]+))?")
Code = Literal["rules", "schedule", "in-use", "load", "power", "gpu-hot", "cpu-hot", "battery", "gpu-busy", "sensor"]
_AT_ONCE: Final = frozenset(("schedule", "in-use"))  # these are a clock's own, and need no calm after them


class BadRules(IchibaError):
    """earn.toml, or an option of `ichiba earn`, says no rule."""

    code = "bad-rules"
    exit_code = 2


@dataclass(frozen=True)
class Window:
    """From one minute of the day to another, on these days (0: Monday); past midnight it goes on into the next day."""

    start: int
    end: int
    days: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Window:
        """Of "22:00-07:00 mon-fri", "09:00-24:00 sat,sun", or without days for every day. Raises BadRules."""
        found = _WINDOW.fullmatch(text.strip().lower())
        if found is None:
            raise BadRules(f"{text[:60]!r} is no schedule", next_step='write it as "22:00-07:00 mon-fri"')
        numbers = [int(number) for number in found.groups()[:4]]
        start, end = numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3]
        if numbers[1] > 59 or numbers[3] > 59 or start >= 1440 or end > 1440 or start == end:
            raise BadRules(f"{text[:60]!r} names no span of a day", next_step='for the whole day: "00:00-24:00"')
        return cls(start, end, frozenset(_days(found[5] or "mon-sun", text)))

    def holds(self, at: datetime) -> bool:
        """Whether a local time is inside it."""
        minute, day = at.hour * 60 + at.minute, at.weekday()
        if self.start < self.end:
            return day in self.days and self.start <= minute < self.end
        return (day in self.days and minute >= self.start) or ((day - 1) % 7 in self.days and minute < self.end)

    def __str__(self) -> str:
        days = ",".join(_DAYS[day] for day in sorted(self.days))
        start, end = (f"{minute // 60:02}:{minute % 60:02}" for minute in (self.start, self.end))
        return f"{start}-{end}" + ("" if len(self.days) == 7 else f" {days}")


def _days(text: str, whole: str) -> Iterator[int]:
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if first not in _DAYS or (dash and last not in _DAYS):
            raise BadRules(f"{part[:20]!r} in {whole[:60]!r} is no day", next_step=f"of {', '.join(_DAYS)}")
        a, b = _DAYS.index(first), _DAYS.index(last or first)
        yield from ((a + i) % 7 for i in range((b - a) % 7 + 1))


@dataclass(frozen=True)
class GuestRules:
    """What the owner asks of a guest; None and empty ask nothing.

    idle_minutes: nobody used the machine for so long. battery: "never", or the level in percent above which it may work
    off the mains. watts: what working draws, for the report where nothing measures it. price_micro: the least it works
    for, per giga-operation. kwh_micro: what a kilowatt-hour costs, in micro-credits.
    """

    schedule: tuple[Window, ...] = ()
    idle_minutes: int | None = None
    load_max: Decimal | None = None
    power_watts_max: int | None = None
    gpu_celsius_max: int | None = None
    cpu_celsius_max: int | None = None
    battery: Literal["never"] | int | None = None
    other_gpu_processes: Literal["pause", "ignore"] = "ignore"
    watts: int | None = None
    price_micro: int | None = None
    kwh_micro: int | None = None


_RANGES: Final = {
    "idle_minutes": (1, 24 * 60, "minutes"), "power_watts_max": (1, 100_000, "watts"), "watts": (1, 100_000, "watts"),
    "gpu_celsius_max": (30, 110, "degrees Celsius"), "cpu_celsius_max": (30, 110, "degrees Celsius"),
}  # fmt: skip
_MONEY: Final = {"price": "price_micro", "kwh_price": "kwh_micro"}


def read_rules(text: str) -> GuestRules:
    """The rules of an earn.toml. Raises BadRules, which names the key."""
    if len(text) > params.GUEST_RULES_CHARS_MAX:
        raise BadRules(f"earn.toml has {len(text)} characters, at most {params.GUEST_RULES_CHARS_MAX}")
    try:
        raw = tomllib.loads(text, parse_float=Decimal)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadRules(f"earn.toml is no TOML: {error}"[:300]) from None
    made: dict[str, Any] = {}
    for key, value in raw.items():
        made[_MONEY.get(key, key)] = _value(key, value)
    return GuestRules(**made)


def merged(rules: GuestRules, given: dict[str, Any]) -> GuestRules:
    """Rules with some keys of an earn.toml changed; numbers may be text, as a person types them. Raises BadRules."""
    made = {}
    for key, value in given.items():
        typed = int(value) if key == "battery" and isinstance(value, str) and value.isdecimal() else value
        if key == "load_max" and isinstance(value, str):
            try:
                typed = Decimal(value)
            except InvalidOperation:
                typed = value
        made[_MONEY.get(key, key)] = _value(key, typed)
    return replace(rules, **made)


def _value(key: str, value: Any) -> Any:
    if key in _RANGES:
        low, high, unit = _RANGES[key]
        if type(value) is not int or not low <= value <= high:
            raise BadRules(f"{key} is {value!r}"[:200], next_step=f"a whole number of {unit}, {low} to {high}")
        return value
    if key in _MONEY:
        return _money(key, value)
    if key == "schedule":
        return _windows(value)
    if key == "load_max":
        number = Decimal(value) if isinstance(value, int | Decimal) and not isinstance(value, bool) else Decimal(0)
        if not number.is_finite() or not 0 < number <= 10_000:
            raise BadRules(f"load_max is {value!r}"[:200], next_step="a number such as 0.5: of the one-minute load")
        return number
    if key == "battery":
        if value != "never" and (type(value) is not int or not 1 <= value <= 100):
            raise BadRules(f"battery is {value!r}"[:200], next_step='"never", or the least percent, 1 to 100')
        return value
    if key == "other_gpu_processes":
        if value not in ("pause", "ignore"):
            raise BadRules(f"other_gpu_processes is {value!r}"[:200], next_step='"pause" or "ignore"')
        return value
    known = ", ".join(sorted({*_RANGES, *_MONEY, "schedule", "load_max", "battery", "other_gpu_processes"}))
    raise BadRules(f"unknown key {key[:40]!r} in earn.toml", next_step=f"known keys: {known}")


def _windows(value: Any) -> tuple[Window, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or not 0 < len(texts) <= 32:
        raise BadRules(f"schedule is {value!r}"[:200], next_step='schedule = ["22:00-07:00 mon-fri"]')
    return tuple(Window.parse(text) for text in texts)


def _money(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise BadRules(f"{key} is {value!r}"[:200], next_step=f'{key} = "0.30", in credits')
    try:
        return micro_of(str(value))
    except IchibaError as error:
        raise BadRules(f"{key}: {error.what}", next_step=error.next_step) from None


def dump_rules(rules: GuestRules) -> str:
    """The earn.toml of these rules, which `read_rules` reads back."""
    lines = []
    names = {held: key for key, held in _MONEY.items()}
    for item in fields(rules):
        value = getattr(rules, item.name)
        if value == item.default:
            continue
        if item.name == "schedule":
            value = "[" + ", ".join(f'"{window}"' for window in value) + "]"
        elif item.name in names:
            value = f'"{credits_of(value)}"'
        elif isinstance(value, str):
            value = f'"{value}"'
        lines.append(f"{names.get(item.name, item.name)} = {value}\n")
    return "".join(lines)


@dataclass(frozen=True)
class Reading:
    """What the sensors tell; None where nothing can be read. `cannot`: what is missing, by the name of a field."""

    idle_s: float | None = None
    load: float | None = None
    cpu_celsius: float | None = None
    on_battery: bool = False  # also where there is none
    battery_percent: int | None = None
    gpus: int = 0
    gpu_celsius: float | None = None
    power_watts: float | None = None
    other_gpu_pids: tuple[int, ...] | None = ()
    cannot: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reason:
    """Why a guest does not work now: a word, and a sentence with the values."""

    code: Code
    why: str


@dataclass
class Guest:
    """The rules over time. `holding`: the reason that pauses, or None."""

    rules: GuestRules
    holding: Reason | None = None
    calm_since_ns: int = 0  # since when nothing speaks against working, while it still pauses

    def step(self, reading: Reading, *, at: datetime, now_ns: int, working: bool) -> Reason | None:
        """The reason not to work from now on. at: local time. now_ns: of a clock that does not jump. working: whether
        a guest's work is running, whose load is not held against it."""
        found = self._find(reading, at, working=working, easing=self.holding is not None)
        if found is not None:
            self.holding, self.calm_since_ns = found, 0
            return found
        if self.holding is not None and self.holding.code not in _AT_ONCE:
            self.calm_since_ns = self.calm_since_ns or now_ns
            if now_ns - self.calm_since_ns < params.GUEST_CALM_NS:
                return self.holding
        self.holding, self.calm_since_ns = None, 0
        return None

    def _find(self, reading: Reading, at: datetime, *, working: bool, easing: bool) -> Reason | None:
        """The first rule that is broken. easing: it pauses already, and each limit must be well kept to go on."""
        rules = self.rules
        if rules.schedule and not any(window.holds(at) for window in rules.schedule):
            return Reason("schedule", f"{at:%a %H:%M} is outside {'; '.join(map(str, rules.schedule))}")
        checks = (
            self._battery(reading, easing), self._in_use(reading, working), self._gpu(reading, easing),
            self._heat("cpu-hot", "cpu_celsius", reading.cpu_celsius, rules.cpu_celsius_max, easing),
        )  # fmt: skip
        return next((reason for reason in checks if reason is not None), None)

    def _battery(self, reading: Reading, easing: bool) -> Reason | None:
        rule, level = self.rules.battery, reading.battery_percent
        if rule is None or not reading.on_battery:
            return None
        if rule == "never":
            return Reason("battery", "the machine runs on its battery")
        if level is None:
            return self._blind("battery_percent", reading)
        least = min(100, rule + (params.GUEST_BATTERY_EASE_PERCENT if easing else 0))
        return Reason("battery", f"the battery is at {level} %, the rule asks {least} %") if level < least else None

    def _in_use(self, reading: Reading, working: bool) -> Reason | None:
        rules = self.rules
        if rules.idle_minutes is not None:
            if reading.idle_s is None:
                return self._blind("idle_s", reading)
            if reading.idle_s < rules.idle_minutes * 60:
                return Reason("in-use", f"last used {reading.idle_s:.0f} s ago, {rules.idle_minutes} min are asked")
        if rules.load_max is not None and not working:
            if reading.load is None:
                return self._blind("load", reading)
            if reading.load > rules.load_max:
                return Reason("load", f"the load is {reading.load:.2f}, at most {rules.load_max} is asked")
        return None

    def _gpu(self, reading: Reading, easing: bool) -> Reason | None:
        rules = self.rules
        if rules.power_watts_max is not None and (reading.gpus or reading.power_watts is not None):
            if reading.power_watts is None:
                return self._blind("power_watts", reading)
            most = rules.power_watts_max * (1000 - params.GUEST_POWER_EASE_PERMILLE * easing) / 1000
            if reading.power_watts > most:
                return Reason("power", f"{reading.power_watts:.0f} W are drawn, at most {most:.0f} W are asked")
        if rules.other_gpu_processes == "pause" and reading.gpus:
            if reading.other_gpu_pids is None:
                return self._blind("other_gpu_pids", reading)
            if reading.other_gpu_pids:
                pids = ", ".join(map(str, reading.other_gpu_pids[:5]))
                return Reason("gpu-busy", f"{len(reading.other_gpu_pids)} other processes use the GPU: {pids}")
        limit = rules.gpu_celsius_max if reading.gpus else None
        return self._heat("gpu-hot", "gpu_celsius", reading.gpu_celsius, limit, easing)

    def _heat(
        self, code: Literal["gpu-hot", "cpu-hot"], name: str, found: float | None, limit: int | None, easing: bool
    ) -> Reason | None:
        if limit is None:
            return None
        if found is None:
            return Reason("sensor", f"cannot read {name}, which a rule is about")
        most = limit - (params.GUEST_HEAT_EASE_CELSIUS if easing else 0)
        what = code.split("-")[0].upper()
        return (
            Reason(code, f"the {what} is at {found:.0f} °C, less than {most} °C are asked") if found >= most else None
        )

    @staticmethod
    def _blind(name: str, reading: Reading) -> Reason:
        return Reason(
            "sensor", f"cannot read {name}, which a rule is about: {reading.cannot.get(name, 'nothing says it')}"
        )
