"""Commands that keep a wallet: wallet backup, wallet restore."""

from __future__ import annotations

from pathlib import Path

import click

from peer.cli_output import Terminal, ago, common, size_of
from peer.cli_stake import wallet
from peer.passphrase import asked_passphrase, passphrase_file_option, passphrase_for

__all__ = ["wallet"]


@wallet.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@passphrase_file_option
@common
def backup(terminal: Terminal, file: Path, force: bool, passphrase_file: Path | None) -> None:
    """Write key, network file and store to FILE, also while the daemon runs.

    The store is verified, every page and row, before FILE is there. Where a passphrase protects the key it protects the
    backup too. Blobs (programs, data, checkpoints) are not in it. Whoever has FILE, and the passphrase, has the money.

    \b
    ichiba wallet backup wallet.ichiba
    """
    from peer.home import Home
    from peer.wallet_file import backup, describe

    home = Home(terminal.data_dir)
    word = passphrase_for(home, passphrase_file)
    with terminal.moving("packing") as moved:
        header = backup(home, file, passphrase=word, moved=moved, force=force)
    told = describe(header)
    terminal.record("ichiba.wallet-backup/1", {"file": str(file), **told})
    sealed = "sealed by the key's passphrase" if told["sealed"] else "not sealed: keep it as you keep the key"
    terminal.say(f"{file}: the wallet of {told['peer']}, {size_of(header.store_bytes)}, {sealed}")


@wallet.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Set the wallet that lives in the data directory aside.")
@click.option(
    "--alone", is_flag=True, help="Ask no peer what was signed after the backup: there is none, or nothing was."
)
@passphrase_file_option
@common
def restore(terminal: Terminal, file: Path, force: bool, alone: bool, passphrase_file: Path | None) -> None:
    """Put the wallet in FILE into the data directory.

    A living wallet is never overwritten: with --force it is set aside in the data directory. The restored peer first
    listens: until it has the settlement log of each peer it meets it signs nothing, for an old store does not know what
    it signed since. Vouchers it received after the backup come again from those who gave them.

    \b
    ichiba wallet restore wallet.ichiba
    ichiba --data other wallet restore wallet.ichiba
    """
    from peer.home import Home
    from peer.key_file import is_sealed
    from peer.wallet_file import describe, read_header, restore

    header = read_header(file)
    word = asked_passphrase(passphrase_file) if is_sealed(header.key) else None
    with terminal.moving("unpacking") as moved:
        header, aside = restore(Home(terminal.data_dir), file, passphrase=word, force=force, alone=alone, moved=moved)
    told = describe(header)
    terminal.record(
        "ichiba.wallet-restore/1",
        {"data": str(terminal.data_dir), "aside": str(aside or ""), "listens": not alone, **told},
    )
    terminal.say(f"the wallet of {told['peer']}, backed up {ago(header.created_ns)}, is in {terminal.data_dir}")
    if aside is not None:
        terminal.say(f"what was there is in {aside}")
    terminal.say("next: ichiba up" + ("" if alone else ", which signs nothing until it has heard from its peers"))
