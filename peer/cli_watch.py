"""Tables that stay up to date: redrawn in place on a terminal, printed again at each change anywhere else."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, Final

import click

from peer.cli_output import Terminal

__all__ = ["EVERY_SECONDS", "watch"]

EVERY_SECONDS: Final = 1.0  # a matching round


def watch(
    terminal: Terminal, ask: Callable[[], dict[str, Any]], show: Callable[[dict[str, Any]], None], *, watching: bool
) -> None:
    """Ask and show once, or with `watching` again and again until Ctrl-C, which is no error.

    Under --json, and where nobody watches, an answer is shown when it differs from the one before: ages alone do not
    count as a change. Raises as `ask`.
    """
    if not watching:
        show(ask())
        return
    try:
        if terminal.as_json or not _on_terminal():
            _print_changes(ask, show)
        else:
            _redraw(ask, show)
    except (KeyboardInterrupt, click.Abort):
        return


def _on_terminal() -> bool:
    return sys.stdout.isatty()


class _Screen(io.StringIO):
    """What a table takes for a terminal, so that it is as wide as the real one."""

    def isatty(self) -> bool:
        """It will be shown on one."""
        return True


def _print_changes(ask: Callable[[], dict[str, Any]], show: Callable[[dict[str, Any]], None]) -> None:
    before: Any = None
    while True:
        found = ask()
        now = _lasting(found)
        if now != before:
            before = now
            show(found)
            sys.stdout.flush()
        pause(EVERY_SECONDS)


def _redraw(ask: Callable[[], dict[str, Any]], show: Callable[[dict[str, Any]], None]) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            drawn = _Screen()
            with redirect_stdout(drawn):
                show(ask())
            live.update(Text.from_ansi(drawn.getvalue().rstrip("\n"), no_wrap=True, overflow="crop"), refresh=True)
            pause(EVERY_SECONDS)


def _lasting(found: Any) -> Any:
    """An answer without what changes by itself."""
    if isinstance(found, dict):
        return {name: _lasting(value) for name, value in found.items() if name != "age_ns"}
    return [_lasting(value) for value in found] if isinstance(found, list) else found


def pause(seconds: float) -> None:
    """Until the next look."""
    time.sleep(seconds)
