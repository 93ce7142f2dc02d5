"""Commands about the peer itself: init, status, connect, invite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from peer.cli_output import Terminal, common, credits_of, short_id
from peer.cli_pause import finishing_line, paused_line
from peer.passphrase import new_passphrase, passphrase_file_option, passphrase_for
from protocol.params import SANDBOX_LEVELS

__all__ = ["connect", "init", "invite", "roles_of", "status"]

_ROLES = ((1, "solver"), (2, "verifier"), (4, "whistleblower"))


def roles_of(bits: int) -> str:
    """A set of roles in words."""
    return ", ".join(name for bit, name in _ROLES if bits & bit) or "none"


@click.command()
@click.option(
    "--network",
    "network_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The network file of the market to be on; without it a network of your own, named solo.",
)
@click.option("--passphrase", is_flag=True, help="Seal the key by a passphrase, which `ichiba up` will ask for.")
@passphrase_file_option
@common
def init(terminal: Terminal, network_file: Path | None, passphrase: bool, passphrase_file: Path | None) -> None:
    """Make the data directory: a key, and the network to be on.

    What exists already stays as it is: a key is never overwritten, and running it again changes nothing.

    \b
    ichiba init
    ichiba init --passphrase
    ichiba init --network market.toml
    """
    from peer.home import Home
    from protocol.keys import peer_name

    home = Home(terminal.data_dir)
    fresh = not home.key_file.exists()
    word = None
    if not fresh:
        word = passphrase_for(home, passphrase_file)
    elif passphrase or passphrase_file is not None:
        word = new_passphrase(passphrase_file)
    key = home.create(network_file.read_text() if network_file is not None else None, passphrase=word)
    network = home.network()
    name = peer_name(key.public)
    result = {
        "data": str(home.path),
        "peer": name,
        "created": fresh,
        "network": network.name,
        "network_id": network.id.hex(),
    }
    terminal.record("ichiba.init/1", result)
    terminal.say(f"{'made' if fresh else 'kept'} the key in {home.path}")
    terminal.pairs({"peer": name, "network": f"{network.name} ({short_id(network.id.hex())})"})
    if network.deposits and not any(deposit.peer == name for deposit in network.deposits):
        terminal.note("this peer has no deposit in the network file: it can neither pay nor promise a stake")
    terminal.say("next: ichiba up")


@click.command()
@common
def status(terminal: Terminal) -> None:
    """Show who this peer is, whom it sees and what it does.

    \b
    ichiba status
    ichiba status --json
    """
    with terminal.client() as client:
        found = client.status()
    terminal.record("ichiba.status/1", found)
    terminal.pairs(_status_pairs(found))
    if found.get("restored_listens"):
        terminal.note("restored from a backup: it signs nothing until it has its peers' settlement logs")
    if not found["peers"]:
        terminal.note("nobody is connected; bring another peer here with `ichiba invite`")


def _status_pairs(found: dict[str, Any]) -> dict[str, object]:
    return {
        "peer": found["peer"],
        "network": f"{found['network']} ({short_id(found['network_id'])})",
        "addresses": "\n           ".join(found.get("addresses", [])) or "none",
        "peers": f"{len(found['peers'])} connected",
        "roles": roles_of(found["roles"]),
        "sandbox": f"{SANDBOX_LEVELS[found['sandbox']]} (level {found['sandbox']} of 4)",
        "price": f"{credits_of(found['unit_price'])} credits per giga-operation",
        "speed": f"{found['operations_per_second'] / 1e9:.2f} giga-operations per second",
        "market": f"{found['asks_seen']} asks and {found['offers_seen']} offers heard",
        **({"dropped": _dropped(found["drops"])} if found.get("drops") else {}),
        "paused": paused_line(found),
        **({"finishing": finishing_line(found)} if found.get("finishing_since_ns") else {}),
        "work": f"{found['jobs_open']} jobs open, {found['deals_active']} deals for others",
        "free": f"{credits_of(found['free_micro'])} credits",
        "stake": f"{credits_of(found['stake_micro'])} credits free to lock",
    }


def _dropped(reasons: dict[str, int]) -> str:
    most = sorted(reasons.items(), key=lambda item: -item[1])[:3]
    return f"{sum(reasons.values())} records: {', '.join(f'{count} {why}' for why, count in most)}; `ichiba drops`"


@click.command()
@click.argument("address")
@common
def connect(terminal: Terminal, address: str) -> None:
    """Connect the running daemon to another peer.

    ADDRESS is an invite, or a whole address as `ichiba status` prints it.

    \b
    ichiba connect ichiba1qyp...
    ichiba connect /ip4/192.0.2.7/tcp/4747/p2p/12D3KooW...
    """
    with terminal.client() as client:
        found = client.connect(address)
    terminal.record("ichiba.connect/1", found)
    terminal.say(f"connected to {found.get('connected', address)}")


@click.command()
@common
def invite(terminal: Terminal) -> None:
    """Print an invite that brings another peer here.

    It holds this peer's addresses and the network's id, and no secret.

    \b
    ichiba invite
    ichiba up --peer $(ichiba invite --data other)
    """
    with terminal.client() as client:
        word = client.invite()
    terminal.record("ichiba.invite/1", {"invite": word})
    terminal.say(word)
