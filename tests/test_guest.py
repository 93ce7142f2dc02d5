"""A guest on its owner's machine: its rules, what it can see, and that it goes and comes as they say."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.energy import Day, EnergyBook, read_book, write_book
from peer.guest import BadRules, Guest, GuestRules, Reading, Window, dump_rules, merged, read_rules
from peer.guest_watch import GuestWatch
from peer.sensors import Sensors, belongs_to
from peer.simulator import SECOND
from protocol import params
from protocol.errors import CorruptStore

MONDAY = datetime(2026, 11, 23, 12, 0)
CALM_NS = params.GUEST_CALM_NS
WHOLE = """
schedule = ["22:00-07:00 mon-fri", "00:00-24:00 sat,sun"]
idle_minutes = 10
load_max = 0.5
power_watts_max = 250
gpu_celsius_max = 80
cpu_celsius_max = 90
battery = 40
other_gpu_processes = "pause"
watts = 120
price = "0.002"
kwh_price = "0.30"
"""
FINE = Reading(idle_s=3600.0, load=0.1, cpu_celsius=40.0, gpus=1, gpu_celsius=50.0, power_watts=30.0)


# --- the file ------------------------------------------------------------------------------------------------
def test_rules_read_back_as_they_were_written() -> None:
    rules = read_rules(WHOLE)
    assert (rules.price_micro, rules.kwh_micro, rules.battery, str(rules.load_max)) == (2000, 300_000, 40, "0.5")
    assert read_rules(dump_rules(rules)) == rules and read_rules("") == GuestRules() and dump_rules(GuestRules()) == ""


BAD = {
    "a misspelt key": ("idle_minuts = 5", "known keys"),
    "no toml": ("idle_minutes = = 5", "TOML"),
    "a schedule in words": ('schedule = "at night"', "22:00-07:00"),
    "a schedule of no time": ('schedule = "08:00-08:00"', "whole day"),
    "an hour too late": ('schedule = "24:00-25:00"', "whole day"),
    "a minute too many": ('schedule = "08:60-09:00"', "whole day"),
    "a day from nowhere": ('schedule = "08:00-09:00 mon-fry"', "of mon"),
    "a schedule of numbers": ("schedule = [1]", "schedule ="),
    "no schedule at all": ("schedule = []", "schedule ="),
    "idle for a truth": ("idle_minutes = true", "whole number"),
    "idle for no time": ("idle_minutes = 0", "1 to"),
    "a heat of the sun": ("gpu_celsius_max = 5000", "30 to 110"),
    "a load of nothing": ("load_max = 0", "load"),
    "a load that is none": ("load_max = nan", "load"),
    "a battery in words": ('battery = "sometimes"', "never"),
    "a battery over full": ("battery = 101", "1 to 100"),
    "a price below zero": ('price = "-1"', ""),
    "a price that is a truth": ("price = true", ""),
    "others in words": ('other_gpu_processes = "fight"', "ignore"),
    "too long": ("#" + "x" * params.GUEST_RULES_CHARS_MAX, "at most"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_in_the_rules_is_refused_with_what_to_write(name: str) -> None:
    text, hint = BAD[name]
    with pytest.raises(BadRules) as told:
        read_rules(text)
    assert hint in str(told.value) and len(str(told.value)) < 600


@given(text=st.text(max_size=80))
def test_any_text_is_rules_or_refused(text: str) -> None:
    try:
        rules = read_rules(text)
    except BadRules:
        return
    assert read_rules(dump_rules(rules)) == rules


def test_options_change_the_rules_they_name_and_no_other() -> None:
    rules = merged(read_rules(WHOLE), {"battery": "60", "load_max": "1.5", "schedule": ["10:00-11:00"]})
    assert (rules.battery, str(rules.load_max), rules.idle_minutes) == (60, "1.5", 10)
    for key, value in (("load_max", "much"), ("battery", "low"), ("idle_minutes", 0)):
        with pytest.raises(BadRules):
            merged(GuestRules(), {key: value})


# --- the schedule --------------------------------------------------------------------------------------------
def test_a_night_belongs_to_the_day_it_began_on() -> None:
    night = Window.parse("22:00-07:00 mon-fri")
    inside = {"mon 22:00", "tue 06:59", "fri 23:59", "sat 06:59"}
    outside = {"mon 06:59", "mon 21:59", "tue 07:00", "sat 22:00", "sun 03:00"}
    for text in inside | outside:
        day, hour = text.split()
        at = MONDAY.replace(hour=int(hour[:2]), minute=int(hour[3:])) + timedelta(
            days=("mon", "tue", "wed", "thu", "fri", "sat", "sun").index(day)
        )
        assert night.holds(at) == (text in inside), text


@given(
    start=st.integers(0, 1439), length=st.integers(1, 1439), days=st.sets(st.integers(0, 6), min_size=1),
    minute=st.integers(0, 7 * 1440 - 1),
)  # fmt: skip
def test_a_window_holds_for_just_its_minutes_of_its_days(start: int, length: int, days: set[int], minute: int) -> None:
    window = Window(start, (start + length) % 1440 or 1440, frozenset(days))
    at = MONDAY.replace(hour=0) + timedelta(minutes=minute)
    begins = [day * 1440 + start + week * 7 * 1440 for day in days for week in (-1, 0)]
    assert window.holds(at) == any(begin <= minute < begin + length for begin in begins)
    assert Window.parse(str(window)) == window


def test_days_may_wrap_around_the_week() -> None:
    assert Window.parse("08:00-09:00 sat-mon").days == {5, 6, 0}


# --- reasons -------------------------------------------------------------------------------------------------
BROKEN: dict[str, dict[str, Any]] = {
    "in-use": {"idle_s": 30.0},
    "load": {"load": 0.9},
    "power": {"power_watts": 251.0},
    "gpu-hot": {"gpu_celsius": 80.0},
    "cpu-hot": {"cpu_celsius": 91.5},
    "battery": {"on_battery": True, "battery_percent": 39},
    "gpu-busy": {"other_gpu_pids": (4711,)},
}
ALWAYS = replace(read_rules(WHOLE), schedule=())


@pytest.mark.parametrize("code", BROKEN)
def test_each_broken_rule_pauses_with_its_own_word_and_without_it_nothing_does(code: str) -> None:
    reading = replace(FINE, **BROKEN[code])
    reason = Guest(ALWAYS).step(reading, at=MONDAY, now_ns=1, working=False)
    assert reason is not None and reason.code == code and reason.why
    assert Guest(GuestRules()).step(reading, at=MONDAY, now_ns=1, working=False) is None
    assert Guest(ALWAYS).step(FINE, at=MONDAY, now_ns=1, working=False) is None


@pytest.mark.parametrize(
    ("code", "still", "well"),
    [
        ("gpu-hot", {"gpu_celsius": 76.0}, {"gpu_celsius": 74.0}),
        ("cpu-hot", {"cpu_celsius": 86.0}, {"cpu_celsius": 84.0}),
        ("battery", {"on_battery": True, "battery_percent": 44}, {"on_battery": True, "battery_percent": 45}),
        ("power", {"power_watts": 210.0}, {"power_watts": 199.0}),
    ],
)
def test_a_cause_must_be_well_away_for_a_while_before_work_goes_on(
    code: str, still: dict[str, Any], well: dict[str, Any]
) -> None:
    guest, now = Guest(ALWAYS), 1

    def step(reading: Reading, after_ns: int = 10 * SECOND) -> str:
        nonlocal now
        now += after_ns
        reason = guest.step(reading, at=MONDAY, now_ns=now, working=True)
        return reason.code if reason else ""

    assert step(replace(FINE, **still)) == "", "below the limit nothing pauses"
    assert step(replace(FINE, **BROKEN[code])) == code
    assert step(replace(FINE, **still), CALM_NS * 2) == code, "just below it nothing goes on"
    assert step(replace(FINE, **well)) == code, "the calm begins"
    assert step(replace(FINE, **BROKEN[code]), CALM_NS // 2) == code, "and is broken"
    assert step(replace(FINE, **well), CALM_NS) == code
    assert step(replace(FINE, **well), CALM_NS - 1) == code
    assert step(replace(FINE, **well), 1) == ""


def test_the_clock_and_the_owners_hands_need_no_calm() -> None:
    guest = Guest(read_rules('schedule = "12:00-13:00"\nidle_minutes = 10'))
    for minutes, idle_s, code in (
        (0, 700, None),
        (1, 5, "in-use"),
        (2, 700, None),
        (60, 700, "schedule"),
        (1440, 700, None),
    ):
        at = MONDAY + timedelta(minutes=minutes)
        reason = guest.step(Reading(idle_s=idle_s), at=at, now_ns=1, working=True)
        assert (reason.code if reason else None) == code


def test_a_guests_own_load_is_not_held_against_it() -> None:
    busy = replace(FINE, load=8.0)
    assert Guest(ALWAYS).step(busy, at=MONDAY, now_ns=1, working=True) is None
    assert Guest(ALWAYS).step(busy, at=MONDAY, now_ns=1, working=False) is not None


@pytest.mark.parametrize("name", ["idle_s", "load", "cpu_celsius", "gpu_celsius", "power_watts", "other_gpu_pids"])
def test_what_a_rule_is_about_and_nobody_can_read_keeps_a_guest_away(name: str) -> None:
    blind = replace(FINE, **{name: None}, cannot={name: "no such file"})
    reason = Guest(ALWAYS).step(blind, at=MONDAY, now_ns=1, working=False)
    assert reason is not None and reason.code == "sensor" and name in reason.why
    assert Guest(GuestRules()).step(blind, at=MONDAY, now_ns=1, working=False) is None


def test_rules_about_a_gpu_ask_nothing_of_a_machine_without_one() -> None:
    none = Reading(idle_s=3600.0, load=0.1, cpu_celsius=40.0, other_gpu_pids=())
    assert Guest(ALWAYS).step(none, at=MONDAY, now_ns=1, working=False) is None


def test_never_on_battery_is_never() -> None:
    guest = Guest(GuestRules(battery="never"))
    full = Reading(on_battery=True, battery_percent=100)
    reason = guest.step(full, at=MONDAY, now_ns=1, working=False)
    assert reason is not None and reason.code == "battery"
    assert (
        Guest(GuestRules(battery="never")).step(Reading(battery_percent=5), at=MONDAY, now_ns=1, working=False) is None
    )


# --- the sensors ---------------------------------------------------------------------------------------------
def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


LAPTOP = {
    "proc/loadavg": "0.42 0.30 0.20 1/200 4711\n",
    "sys/class/thermal/thermal_zone0/type": "acpitz\n",
    "sys/class/thermal/thermal_zone0/temp": "99000\n",
    "sys/class/thermal/thermal_zone1/type": "x86_pkg_temp\n",
    "sys/class/thermal/thermal_zone1/temp": "61000\n",
    "sys/class/hwmon/hwmon0/name": "coretemp\n",
    "sys/class/hwmon/hwmon0/temp1_input": "64500\n",
    "sys/class/hwmon/hwmon1/name": "nvme\n",
    "sys/class/hwmon/hwmon1/temp1_input": "80000\n",
    "sys/class/power_supply/AC/type": "Mains\n",
    "sys/class/power_supply/BAT0/type": "Battery\n",
    "sys/class/power_supply/BAT0/status": "Discharging\n",
    "sys/class/power_supply/BAT0/capacity": "57\n",
    "sys/class/power_supply/hidpp_battery_0/type": "Battery\n",
    "sys/class/power_supply/hidpp_battery_0/scope": "Device\n",
    "sys/class/power_supply/hidpp_battery_0/status": "Discharging\n",
    "sys/class/power_supply/hidpp_battery_0/capacity": "3\n",
    "dev/input/event3": "",
    "dev/pts/0": "",
}


def nvidia(gpu: str, apps: str = "") -> Callable[[tuple[str, ...]], str | None]:
    return lambda arguments: apps if "compute-apps" in arguments[0] else gpu


def no_gpu(_: tuple[str, ...]) -> None:
    return None


def test_a_laptop_on_its_battery_is_read_right(tmp_path: Path) -> None:
    import os

    machine(tmp_path, LAPTOP)
    os.utime(tmp_path / "dev/input/event3", (1000, 900))
    os.utime(tmp_path / "dev/pts/0", (400, 1100))
    reading = Sensors(tmp_path, no_gpu).read(1160.0)
    assert (reading.idle_s, reading.load, reading.cpu_celsius) == (60.0, 0.42, 64.5), (
        "no disk's heat, no mouse's battery"
    )
    assert (reading.on_battery, reading.battery_percent, reading.gpus, reading.other_gpu_pids) == (True, 57, 0, ())
    assert set(reading.cannot) == {"gpu"}


def test_an_empty_machine_says_what_it_cannot_read(tmp_path: Path) -> None:
    reading = Sensors(tmp_path, no_gpu).read(1.0)
    assert (reading.idle_s, reading.load, reading.cpu_celsius, reading.on_battery) == (None, None, None, False)
    assert {"idle_s", "input", "load", "cpu_celsius", "gpu"} == set(reading.cannot)


@pytest.mark.parametrize("text", ["", "nan", "inf", "-1e9", "999999999", "hot", "\0\xff", "1" * 100_000, "0x20"])
def test_a_driver_that_says_nonsense_says_nothing(tmp_path: Path, text: str) -> None:
    files = {
        name: text if name.endswith(("temp", "input", "loadavg", "capacity")) else old for name, old in LAPTOP.items()
    }
    reading = Sensors(machine(tmp_path, files), nvidia(f"{text}, {text}\n", text)).read(1.0)
    assert (reading.load, reading.cpu_celsius, reading.battery_percent) == (None, None, None)
    assert {"load", "cpu_celsius", "battery_percent"} <= set(reading.cannot)
    assert reading.gpu_celsius is None and reading.power_watts is None


def test_cards_are_read_together_and_one_that_is_silent_is_not_passed_over(tmp_path: Path) -> None:
    two = Sensors(tmp_path, nvidia("60, 100.5\n71, 20\n", "11\n12\nnonsense\n"), lambda pid: pid == 11).read(1.0)
    assert (two.gpus, two.gpu_celsius, two.power_watts, two.other_gpu_pids) == (2, 71.0, 120.5, (12,))
    half = Sensors(tmp_path, nvidia("60, [N/A]\n[N/A], 20\n")).read(1.0)
    assert (half.gpus, half.gpu_celsius, half.power_watts) == (2, None, None)
    assert {"gpu_celsius", "power_watts"} <= set(half.cannot)


@pytest.mark.parametrize("fault", [subprocess.TimeoutExpired("nvidia-smi", 5), PermissionError("no"), OSError("gone")])
def test_a_driver_that_hangs_or_fails_counts_as_a_card_that_cannot_be_seen(tmp_path: Path, fault: Exception) -> None:
    def ask(_: tuple[str, ...]) -> str:
        raise fault

    reading = Sensors(tmp_path, ask).read(1.0)
    assert reading.gpus == 1 and reading.gpu_celsius is None and reading.other_gpu_pids is None
    reason = Guest(GuestRules(gpu_celsius_max=80)).step(reading, at=MONDAY, now_ns=1, working=False)
    assert reason is not None and reason.code == "sensor"


def test_a_process_belongs_to_its_ancestors(tmp_path: Path) -> None:
    machine(tmp_path, {"30/status": "Name:\tx\nPPid:\t20\n", "20/status": "PPid:\t10\n", "40/status": "PPid:\t1\n",
                       "50/status": "PPid:\t50\n", "60/status": "junk"})  # fmt: skip
    assert belongs_to(30, 10, tmp_path) and belongs_to(10, 10, tmp_path)
    assert not any(belongs_to(pid, 10, tmp_path) for pid in (40, 50, 60, 70))


# --- the watch -----------------------------------------------------------------------------------------------
class Peer:
    """A node that is paused and resumed, as peer/pausing.py does it."""

    def __init__(self) -> None:
        self.by, self.why, self.seen = "", "", list[str]()

    async def command(self, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if verb != "status":
            self.seen.append(f"{verb} {arguments['by']}")
        if verb == "pause":
            self.by, self.why = arguments["by"], arguments["why"]
        elif verb == "resume":
            self.by = self.why = ""
        return {"paused_since_ns": int(bool(self.by)), "paused_by": self.by, "paused_why": self.why, "unfinished": 1}


async def test_the_watch_pauses_by_the_rule_and_lets_go_on_after_and_reads_a_changed_file(tmp_path: Path) -> None:
    root, now = machine(tmp_path / "root", {"sys/class/power_supply/B/type": "Battery"}), [0]
    peer = Peer()
    watch = GuestWatch(
        tmp_path / "earn.toml", peer.command, Sensors(root, no_gpu), lambda: 1e9 + now[0] / SECOND, lambda: 1 + now[0]
    )

    async def later(seconds: int) -> str:
        now[0] += seconds * SECOND
        await watch.look()
        return peer.by

    status = root / "sys/class/power_supply/B/status"
    assert await later(0) == "" and peer.seen == [], "without a file nothing is asked"
    (tmp_path / "earn.toml").write_text('battery = "never"')
    status.write_text("Discharging")
    assert await later(10) == "battery" and peer.why == "the machine runs on its battery"
    status.write_text("Charging")
    assert await later(10) == "battery"
    assert await later(CALM_NS // SECOND) == "" and peer.seen == ["pause battery", "resume guest"]
    (tmp_path / "earn.toml").write_text('batery = "never"')
    assert await later(10) == "rules" and "known keys" in peer.why
    (tmp_path / "earn.toml").unlink()
    assert await later(10) == "", "the owner took the rules away"


async def test_the_watch_notes_what_work_drew_and_who_says_so(tmp_path: Path) -> None:
    now, peer = [0], Peer()
    sensors = Sensors(tmp_path / "root", nvidia("50, 200\n"))
    watch = GuestWatch(tmp_path / "earn.toml", peer.command, sensors, lambda: 1e9 + now[0] / SECOND, lambda: 1 + now[0])

    async def later(seconds: int) -> Day:
        now[0] += seconds * SECOND
        await watch.look()
        (day,) = read_book(tmp_path / "energy.json").days.values()
        return day

    assert (await later(0)).work_s == 0
    assert (await later(10)).measured_j == 2000
    assert (await later(1000)).work_s == 40, "a machine that slept did not work"
    (tmp_path / "earn.toml").write_text("watts = 60")
    day = await later(10)
    assert (day.work_s, day.configured_j, day.measured_j) == (50, 600, 8000)
    peer.by = "owner"
    assert (await later(10)).work_s == 50, "nothing is drawn in a pause"


DAMAGED = ["", "{", '{"days": {"today": {}}}', '{"days": {"2026-01-01": {"work_s": -1}}}', "\xff"]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_book_is_said_and_not_counted_from(tmp_path: Path, text: str) -> None:
    (tmp_path / "energy.json").write_text(text, "latin-1")
    with pytest.raises(CorruptStore, match="does not read back"):
        read_book(tmp_path / "energy.json")


def test_the_book_keeps_the_latest_days_and_reads_back(tmp_path: Path) -> None:
    book = EnergyBook()
    for number in range(params.GUEST_DAYS_KEPT_MAX + 5):
        book.add((MONDAY + timedelta(days=number)).date().isoformat(), 5, configured_w=None, measured_w=None)
    write_book(tmp_path / "energy.json", book)
    assert read_book(tmp_path / "energy.json") == book and len(book.days) == params.GUEST_DAYS_KEPT_MAX
    assert min(book.days) == (MONDAY + timedelta(days=5)).date().isoformat()
    assert all(day.unknown_s == 5 for day in book.days.values())


async def test_what_the_owner_paused_no_rule_undoes(tmp_path: Path) -> None:
    peer = Peer()
    peer.by = "owner"
    watch = GuestWatch(tmp_path / "earn.toml", peer.command, Sensors(tmp_path, no_gpu))
    (tmp_path / "earn.toml").write_text("idle_minutes = 5")
    assert await watch.look() is not None
    assert peer.by == "owner" and peer.seen == []
