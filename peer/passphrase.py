"""Where a passphrase comes from: a file, ICHIBA_PASSPHRASE, or a person at a terminal. It is never an argument, which
every user of the machine could read in its list of processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from protocol import params
from protocol.errors import IchibaError

if TYPE_CHECKING:
    from peer.home import Home

__all__ = ["PassphraseMissing", "asked_passphrase", "new_passphrase", "passphrase_file_option", "passphrase_for"]

_F = TypeVar("_F", bound=Callable[..., Any])
VARIABLE = "ICHIBA_PASSPHRASE"


class PassphraseMissing(IchibaError):
    """A passphrase is needed and nobody can be asked."""

    code = "passphrase-missing"
    exit_code = 2


def passphrase_file_option(function: _F) -> _F:
    """The option --passphrase-file."""
    return click.option(
        "--passphrase-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Read the key's passphrase from the first line of this file; else ICHIBA_PASSPHRASE, else it is asked.",
    )(function)


def passphrase_for(home: Home, file: Path | None = None) -> str | None:
    """The passphrase of this peer's key; None if the key has none. Raises PassphraseMissing, HomeProblem."""
    return asked_passphrase(file) if home.protected else None


def asked_passphrase(file: Path | None = None) -> str:
    """The passphrase of a sealed key. Raises PassphraseMissing."""
    return _told(file, "passphrase of the key", confirm=False)


def new_passphrase(file: Path | None = None) -> str:
    """A passphrase that is to seal the key; a person types it twice. Raises PassphraseMissing."""
    return _told(file, "new passphrase", confirm=True)


def _told(file: Path | None, what: str, *, confirm: bool) -> str:
    if file is not None:
        with file.open("rb") as opened:
            line = opened.readline(params.PASSPHRASE_BYTES_MAX + 2)
        return line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
    if VARIABLE in os.environ:
        return os.environ[VARIABLE]
    if not sys.stdin.isatty():
        raise PassphraseMissing(
            "the passphrase of the key is needed, and there is no terminal to ask at",
            next_step=f"set {VARIABLE} or give --passphrase-file FILE",
        )
    found: str = click.prompt(what, hide_input=True, confirmation_prompt=confirm, err=True)
    return found
