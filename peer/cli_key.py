"""Commands about the file that holds this peer's secret: key show, protect, unprotect."""

from __future__ import annotations

from pathlib import Path

import click

from peer.cli_output import Terminal, common
from peer.passphrase import new_passphrase, passphrase_file_option, passphrase_for

__all__ = ["key"]


@click.group()
def key() -> None:
    """Protect the file that holds this peer's secret key."""


@key.command()
@common
def show(terminal: Terminal) -> None:
    """Say where the key is and whether a passphrase protects it. It never shows the secret.

    \b
    ichiba key show
    """
    from peer.home import Home

    home = Home(terminal.data_dir)
    protected = home.protected
    terminal.record("ichiba.key/1", {"file": str(home.key_file), "protected": protected})
    terminal.say(f"{home.key_file}: {'sealed by a passphrase' if protected else 'plain, for its owner alone'}")
    if not protected:
        terminal.say("next: ichiba key protect")


@key.command()
@passphrase_file_option
@common
def protect(terminal: Terminal, passphrase_file: Path | None) -> None:
    """Seal the key by a passphrase, which `ichiba up` will ask for.

    Nobody can open the key without it: keep it, or a backup, somewhere else. A daemon that runs goes on.

    \b
    ichiba key protect
    ichiba key protect --passphrase-file secret.txt
    """
    from peer.home import Home, HomeProblem
    from peer.key_file import seal_seed

    home = Home(terminal.data_dir)
    if home.protected:
        raise HomeProblem(
            f"{home.key_file} is sealed already", next_step="ichiba key unprotect, to change its passphrase"
        )
    home.write_key(seal_seed(home.seed(), new_passphrase(passphrase_file)))
    terminal.record("ichiba.key/1", {"file": str(home.key_file), "protected": True})
    terminal.say(f"{home.key_file} is sealed; `ichiba up` asks for the passphrase")


@key.command()
@passphrase_file_option
@common
def unprotect(terminal: Terminal, passphrase_file: Path | None) -> None:
    """Write the key as plain text again, readable by its owner alone.

    \b
    ichiba key unprotect
    """
    from peer.home import Home

    home = Home(terminal.data_dir)
    home.write_key(home.seed(passphrase_for(home, passphrase_file)).hex())
    terminal.record("ichiba.key/1", {"file": str(home.key_file), "protected": False})
    terminal.say(f"{home.key_file} is plain")
