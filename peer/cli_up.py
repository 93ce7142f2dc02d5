"""`ichiba up`: the daemon in the foreground, with readable logs, ended cleanly by Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from peer.cli_output import CREDITS, SIZE, Terminal, common
from peer.cli_pause import paused_line
from peer.passphrase import passphrase_file_option, passphrase_for
from protocol.errors import IchibaError

if TYPE_CHECKING:
    from peer.daemon import DaemonConfig

__all__ = ["Roles", "up"]

_LISTEN: Final = "/ip4/0.0.0.0/tcp/4747"
_ROLES: Final = {"solver": 1, "verifier": 2, "whistleblower": 4}
_FORMAT: Final = "%(asctime)s %(levelname)-7s %(message)s"


class Roles(click.ParamType[int]):
    """Names of roles with commas between them, or none."""

    name = "roles"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bit set of protocol.records."""
        if isinstance(value, int):
            return value
        words = [word.strip() for word in str(value).split(",") if word.strip()]
        if words == ["none"]:
            return 0
        unknown = [word for word in words if word not in _ROLES]
        if unknown or not words:
            self.fail(f"{value!r} is not a list of {', '.join(_ROLES)}, or none", param, ctx)
        return sum(_ROLES[word] for word in set(words))


@click.command()
@click.option("--listen", multiple=True, metavar="ADDRESS", help=f"Where to listen; repeatable. Else {_LISTEN}.")
@click.option("--peer", "peers", multiple=True, metavar="ADDRESS|INVITE", help="A peer to connect to; repeatable.")
@click.option(
    "--roles", type=Roles(), default="none", show_default=True, help="Of solver,verifier,whistleblower; or none."
)
@click.option("--price", type=CREDITS, default="0.001", show_default=True, help="The least you work for, per Gop.")
@click.option("--fixed-price", is_flag=True, help="Ask just --price, whatever the market bears above it.")
@click.option("--memory", type=SIZE, default="2G", show_default=True, help="What one job may use.")
@click.option("--slots", type=click.IntRange(1, 64), default=1, show_default=True, help="Jobs at a time.")
@click.option("--no-mdns", is_flag=True, help="Neither look for peers on the local network nor be found there.")
@click.option(
    "--network",
    "network_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The network file; else that of the data directory.",
)
@passphrase_file_option
@click.option("--cheat", default="", hidden=True, help="A fraud to demonstrate (worker/cheats.py).")
@click.option("--shape", default="", envvar="ICHIBA_SHAPE", hidden=True, help="Slow links: `50ms,100mbit,jitter=5ms`.")
@common
def up(
    terminal: Terminal,
    listen: tuple[str, ...],
    peers: tuple[str, ...],
    roles: int,
    price: int,
    fixed_price: bool,
    memory: int,
    slots: int,
    no_mdns: bool,
    network_file: Path | None,
    passphrase_file: Path | None,
    cheat: str,
    shape: str,
) -> None:
    """Run the daemon until Ctrl-C.

    Without --roles this peer submits jobs and does no work for others. With a role, strangers' graphs run here, in
    the sandbox that `ichiba doctor` describes.

    \b
    ichiba up
    ichiba up --roles solver,verifier --price 0.001 --memory 8G
    ichiba up --peer ichiba1qyp... --listen /ip4/0.0.0.0/tcp/4748
    """
    # Before numpy is loaded: a check of a bench card reads memory, and a second thread only waits for it.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import trio

    from peer.daemon import DaemonConfig
    from peer.home import Home

    home = Home(terminal.data_dir)
    _log_to_stderr()
    config = DaemonConfig(
        data_dir=home.path,
        network_file=network_file or home.network_file,
        listen=list(listen) or [_LISTEN],
        peers=peers,
        mdns=not no_mdns,
        roles=roles,
        unit_price=price,
        fixed_price=fixed_price,
        memory_bytes=memory,
        slots=slots,
        cheat=cheat,
        shape=shape,
        passphrase=passphrase_for(home, passphrase_file),
    )
    failures: list[IchibaError] = []
    try:
        trio.run(_run, terminal, config)
    except* IchibaError as group:
        failures = list(_leaves(group))
    if failures:
        raise failures[0]


async def _run(terminal: Terminal, config: DaemonConfig) -> None:
    """The daemon, and beside it whoever waits for the signal to end it."""
    import trio

    from peer.daemon import run_daemon

    async with trio.open_nursery() as nursery:
        # The daemon in a nursery of its own: it is over when the daemon is, whoever still waits for signals.
        async with trio.open_nursery() as running:
            daemon = await running.start(run_daemon, config)
            status = await daemon.command("status", {})
            invite = _invite(daemon)
            terminal.record("ichiba.up/1", {**status, "invite": invite})
            terminal.say(f"peer {status['peer']} on network {status['network']}")
            for address in status.get("addresses", []):
                terminal.say(f"listening on {address}")
            if invite:
                terminal.say(f"invite: {invite}")
            if status["paused_since_ns"]:
                terminal.say(f"paused {paused_line(status)}; next: ichiba resume")
            nursery.start_soon(_end_on_signal, daemon, nursery.cancel_scope)
            await daemon.stopped.wait()
            terminal.note("stopping")
            nursery.cancel_scope.deadline = trio.current_time() + 10
        nursery.cancel_scope.cancel()


def _invite(daemon: Any) -> str:
    """An invite, or nothing where no address can be reached from outside."""
    try:
        return str(daemon.invite())
    except IchibaError:
        return ""


async def _end_on_signal(daemon: Any, scope: Any) -> None:
    """The first signal asks the daemon to end, the second does not ask."""
    import trio

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            if daemon.stopped.is_set():
                scope.cancel()
            daemon.stop()


def _log_to_stderr() -> None:
    """Our own lines at INFO, everybody else's from WARNING on."""
    import logging

    logging.basicConfig(level=logging.WARNING, format=_FORMAT, datefmt="%H:%M:%S")
    for name in ("peer", "market", "worker", "protocol"):
        logging.getLogger(name).setLevel(logging.INFO)


def _leaves(group: BaseExceptionGroup[IchibaError]) -> list[IchibaError]:
    """The errors inside nested groups: nurseries wrap what they raise."""
    found: list[IchibaError] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
