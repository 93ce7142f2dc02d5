"""`ichiba doctor`: what is wrong with this machine or peer, and the command that mends each thing."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from peer.cli_output import Terminal, ago, common, size_of
from protocol.errors import IchibaError

__all__ = ["doctor", "drops"]

_DISK_LOW_BYTES: Final = 5 << 30  # a checkpoint of a small job is megabytes, of a large one gigabytes
_DISK_FULL_BYTES: Final = 200 << 20
_TIME_ERROR: Final = 5  # adjtimex(2): the clock is not synchronised
_SIGNS: Final = {"ok": "ok  ", "warn": "warn", "bad": "BAD "}


class _Line(NamedTuple):
    what: str
    level: str
    explanation: str
    fix: str = ""


@click.command()
@common
def doctor(terminal: Terminal) -> None:
    """Check this machine and peer, and say how to mend what is wrong.

    Looks at the data directory, the key, the network file, all of the store, disk, clock, ports, the sandbox (by
    attacking it from inside) and the peers. Works without a daemon too. Exits with 1 if something is bad.

    \b
    ichiba doctor
    ichiba doctor --json
    """
    path = terminal.data_dir
    lines = [*_directory(path), _network(path), *_store(path), _disk(path), _clock()]
    try:
        with terminal.client() as client:
            status, told = client.status(), client.doctor()
    except IchibaError as error:
        lines.append(_Line("daemon", "warn", error.what, error.next_step))
        lines += _sandbox()
    else:
        lines.append(_Line("daemon", "ok", f"runs as {status['peer']}"))
        lines += [_ports(status), *map(_told, told)]
        if not any(line.what == "sandbox" for line in lines):
            lines += _sandbox()
    for line in lines:
        terminal.record("ichiba.doctor/1", line._asdict())
        terminal.say(f"{_SIGNS[line.level]} {line.what}: {line.explanation}")
        if line.fix and line.level != "ok":
            terminal.say(f"       mend: {line.fix}")
    if any(line.level == "bad" for line in lines):
        click.get_current_context().exit(1)


@click.command()
@common
def drops(terminal: Terminal) -> None:
    """Show what was dropped since the start, why, and whose it was.

    Nothing that others sent is lost here without a line in this table: records over a limit, refused, expired, or for
    which there was no room. Counts are records; `ichiba doctor` warns of those that this machine can mend.

    \b
    ichiba drops
    ichiba drops --json
    """
    with terminal.client() as client:
        found = client.drops()
    terminal.record("ichiba.drops/1", found)
    terminal.table(
        f"dropped since the start: {found['total']}",
        ("reason", "whose", ">count", "last", "~what that is"),
        [
            (one["reason"], one["author"][-8:] or "others", one["count"], ago(one["last_ns"]), one["words"])
            for one in found["rows"]
        ],
    )


def _told(line: dict[str, Any]) -> _Line:
    """A line of the daemon. Of the sandbox it says how strong each part is: one with something to mend is a warning."""
    level = str(line["level"])
    if level not in _SIGNS:
        level = "warn" if line["fix"] else "ok"
    return _Line(line["what"], level, line["explanation"], line["fix"])


def _directory(path: Path) -> list[_Line]:
    if not path.is_dir():
        return [_Line("data directory", "bad", f"{path} does not exist", f"ichiba --data {path} init")]
    lines = []
    for file, wanted in ((path, 0o700), (path / "key", 0o600)):
        what = "data directory" if file == path else "key"
        try:
            mode = stat.S_IMODE(file.stat().st_mode)
        except OSError:
            lines.append(_Line(what, "bad", f"there is no {file}", f"ichiba --data {path} init"))
            continue
        if mode & 0o077:
            lines.append(_Line(what, "bad", f"others may read {file} (mode {mode:o})", f"chmod {wanted:o} {file}"))
        elif not os.access(file, os.R_OK):
            lines.append(_Line(what, "bad", f"{file} cannot be read", f"chown $USER {file}"))
        else:
            lines.append(_Line(what, "ok", f"{file}, for you alone"))
    return lines


def _network(path: Path) -> _Line:
    from peer.home import Home

    try:
        network = Home(path).network()
    except IchibaError as error:
        return _Line("network file", "bad", error.what, error.next_step or f"ichiba --data {path} init")
    return _Line("network file", "ok", f"{network.name} ({network.id.hex()[:12]}), {len(network.deposits)} deposits")


def _store(path: Path) -> list[_Line]:
    """Every page and row of the store, also while the daemon uses it. A store of gigabytes takes minutes."""
    from peer.store_check import check
    from protocol.errors import NotFound

    try:
        found = check(path)
    except NotFound:
        return []
    except IchibaError as error:
        return [_Line("store", "bad", error.what, error.next_step)]
    words = f"{found['rows']} rows, {found['entries']} journal entries and {found['events']} log lines are as written"
    return [_Line("store", "ok", words)]


def _disk(path: Path) -> _Line:
    place = next(folder for folder in (path, *path.resolve().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    level = "bad" if free < _DISK_FULL_BYTES else "warn" if free < _DISK_LOW_BYTES else "ok"
    return _Line(
        "disk", level, f"{size_of(free)} are free for checkpoints and data", f"make room on the disk of {place}"
    )


def _clock() -> _Line:
    """Whether the kernel's clock is kept right: a record dated more than five minutes ahead is refused by others."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "adjtimex"):
        return _Line("clock", "warn", "this system does not say whether its clock is right", "compare it with time.is")
    state = libc.adjtimex(ctypes.create_string_buffer(512))  # struct timex has 208 bytes; modes = 0 only reads
    if 0 <= state < _TIME_ERROR:
        return _Line("clock", "ok", "kept right by the system")
    return _Line(
        "clock", "warn", "nothing keeps it right, and peers refuse records from the future", "timedatectl set-ntp true"
    )


def _ports(status: dict[str, Any]) -> _Line:
    addresses = status.get("addresses", [])
    outside = [one for one in addresses if "/127." not in one and "/::1/" not in one]
    fix = "ichiba up --listen /ip4/0.0.0.0/tcp/4747"
    if not addresses:
        return _Line("port", "bad", "this peer listens nowhere", fix)
    if not outside:
        return _Line("port", "warn", f"only this machine can reach {addresses[0]}", fix)
    return _Line("port", "ok", f"listening on {', '.join(outside)}")


def _sandbox() -> list[_Line]:
    """Prove the sandbox here and now; about a second."""
    import trio

    from worker.sandbox import doctor_lines, probe

    report = trio.run(probe)
    return [_told({**line._asdict(), "level": str(line.level)}) for line in doctor_lines(report)]
