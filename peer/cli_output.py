"""How the command line speaks: tables and sentences to people, JSON lines to programs, errors with a way out.

Answers go to stdout, everything else (progress, notes, errors) to stderr, so that a pipe carries answers only. Every
JSON object has a `schema` field. Refuses to know any command.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from protocol.credits import credits_of, micro_of
from protocol.errors import IchibaError, harmless

if TYPE_CHECKING:
    from rich.progress import Progress

    from peer.client import Client

__all__ = [
    "CREDITS",
    "EXIT_CODES",
    "SIZE",
    "Terminal",
    "ago",
    "common",
    "credits_of",
    "short_id",
    "show_error",
    "size_of",
    "write_whole",
]

EXIT_CODES: Final[dict[int, str]] = {
    0: "done, and an empty list is done too",
    1: "an error",
    2: "the command line, job.toml, network file or data directory is wrong",
    3: "the daemon is not running",
    4: "there is no such job, blob or peer",
    5: "no solver would take the job at its price in the time given",
    6: "the job failed",
    7: "the job was cancelled",
    8: "not enough credits",
    9: "the job ended, or waited too long, in a dispute about wrong work",
    10: "the time given with --timeout is over; the job goes on",
    130: "detached by Ctrl-C; the job goes on",
}
_ID_CHARS: Final = 12  # of an id in a table: 48 bits, and commands take any unambiguous beginning
_PIPE_COLUMNS: Final = 200  # a table in a pipe is not cut at 80
_F = TypeVar("_F", bound=Callable[..., Any])


# --- values ------------------------------------------------------------------------------------------------
class _Credits(click.ParamType[int]):
    """Credits on the command line, micro-credits inside."""

    name = "credits"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """`value` as micro-credits."""
        if isinstance(value, int):
            return value
        try:
            return micro_of(str(value))
        except IchibaError as error:
            self.fail(f"{error.what}; {error.next_step}", param, ctx)


class _Size(click.ParamType[int]):
    """Bytes, with K, M, G or T."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """`value` as bytes."""
        if isinstance(value, int):
            return value
        text = str(value).upper().removesuffix("B").removesuffix("I")
        shift = {"K": 10, "M": 20, "G": 30, "T": 40}.get(text[-1:], 0)
        digits = text[:-1] if shift else text
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 9:
            self.fail(f"{value!r} is no size; write it like 2G or 512M", param, ctx)
        return int(digits) << shift


CREDITS: Final = _Credits()
SIZE: Final = _Size()


def short_id(text: str) -> str:
    """The beginning of an id, for a table."""
    return text[:_ID_CHARS]


def size_of(count: int) -> str:
    """Bytes for people."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def ago(then_ns: int) -> str:
    """How long ago, for people; empty for never."""
    if not then_ns:
        return ""
    seconds = max(0, (time.time_ns() - then_ns) // 10**9)
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"


# --- the terminal ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Terminal:
    """Where one command reads its daemon and writes its answers."""

    data_dir: Path
    as_json: bool

    def client(self) -> Client:
        """Calls to this data directory's daemon. Raises DaemonNotRunning on the first."""
        from peer.client import Client

        return Client(self.data_dir)

    def record(self, schema: str, values: Mapping[str, Any]) -> None:
        """One JSON object on one line, its schema first; only under --json."""
        if self.as_json:
            click.echo(json.dumps({"schema": schema, **values}))

    def say(self, text: str = "") -> None:
        """A line of the answer, for people. Other peers' words are in it, so nothing in it drives the terminal."""
        if not self.as_json:
            click.echo(harmless(text))

    def note(self, text: str) -> None:
        """A line beside the answer: progress, advice."""
        click.echo(harmless(text), err=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table for people; without rows, its title and `none`. A column named >x stands to the right; one named ~x
        holds sentences, which are folded where the terminal is narrow, so that no figure is cut."""
        if self.as_json:
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        filled = [[Text(harmless(str(cell))) for cell in row] for row in rows]
        if not filled:
            click.echo(f"{title}: none")
            return
        made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column in columns:
            right, folded = column.startswith(">"), column.startswith("~")
            made.add_column(column.lstrip(">~"), justify="right" if right else "left", no_wrap=not folded)
        for row in filled:
            made.add_row(*row)
        width = None if sys.stdout.isatty() else _PIPE_COLUMNS
        Console(file=sys.stdout, width=width).print(made)

    def pairs(self, values: Mapping[str, object]) -> None:
        """Names and values, one a line."""
        wide = max(map(len, values))
        for name, value in values.items():
            self.say(f"{name.ljust(wide)}  {value}")

    @contextmanager
    def progress(self) -> Iterator[Progress | None]:
        """A live progress display on stderr, or None where nobody watches."""
        if self.as_json or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as live:
            yield live

    @contextmanager
    def moving(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A callback for bytes moved and bytes in all, shown as a bar."""
        with self.progress() as live:
            if live is None:
                yield lambda moved, total: None
                return
            bar = live.add_task(what, total=None, note="")

            def moved(done: int, total: int) -> None:
                live.update(bar, completed=done, total=total, note=f"{size_of(done)} of {size_of(total)}")

            yield moved


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that somebody asked for: it is there whole or not at all. Raises OSError."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def show_error(error: IchibaError, *, as_json: bool) -> None:
    """An error on stderr: what, why and what to do, or one JSON object."""
    if as_json:
        told = {"schema": "ichiba.error/1", **error.as_dict(), "exit_code": error.exit_code}
        click.echo(json.dumps(told), err=True)
        return
    click.echo(f"error: {harmless(error.what)}", err=True)
    if error.why:
        click.echo(f"  why:  {harmless(error.why)}", err=True)
    if error.next_step:
        click.echo(f"  next: {harmless(error.next_step)}", err=True)


def default_data_dir() -> Path:
    """The data directory nobody named."""
    import platformdirs

    return platformdirs.user_data_path("ichiba")


def common(function: _F) -> _F:
    """The options every command has; the command gets a Terminal first."""

    @click.option("--data", type=click.Path(path_type=Path, file_okay=False), help="The data directory of the peer.")
    @click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")
    @click.pass_context
    @functools.wraps(function)
    def run(ctx: click.Context, /, data: Path | None, as_json: bool, **options: Any) -> Any:
        named = data or ctx.find_root().params.get("data") or os.environ.get("ICHIBA_DATA")
        terminal = Terminal(Path(named) if named else default_data_dir(), as_json)
        return ctx.invoke(function, terminal, **options)

    return run  # type: ignore[return-value]
