"""Commands about mutual credit: credit give, ls, net, revoke."""

from __future__ import annotations

import click

from peer.cli_output import CREDITS, Terminal, common, credits_of
from protocol import params

__all__ = ["credit"]

_DAY_NS = 86_400 * 10**9


@click.group()
def credit() -> None:
    """Trust people you know: credit lines, what is owed on them, and netting it.

    A line lets a peer have work done by yours without a deposit. Nothing of it is in the ledger that all peers share:
    what is owed is between the two of you, your peer refuses work beyond the limit, and whoever does not pay owes it to
    you alone. Give no more than you would lend.
    """


@credit.command()
@click.argument("peer")
@click.argument("amount", type=CREDITS)
@click.option(
    "--days", type=click.IntRange(1, params.CREDIT_LIFETIME_NS_MAX // _DAY_NS), default=90, show_default=True,
    help="How long the line stands.",
)  # fmt: skip
@common
def give(terminal: Terminal, peer: str, amount: int, days: int) -> None:
    """Let PEER run up debts of at most AMOUNT credits with this one.

    A new line replaces the one before it. PEER uses it with `ichiba submit --credit`; your price still holds.

    \b
    ichiba credit give 12D3KooWGC9253ES1rnmjbyBGj7CEVEEqtkq13RN4DgqLixKLZao 5
    ichiba credit give 12D3KooWGC9253ES1rnmjbyBGj7CEVEEqtkq13RN4DgqLixKLZao 0.5 --days 7
    """
    with terminal.client() as client:
        found = client.credit_give(peer, limit_micro=amount, days=days)
    terminal.record("ichiba.credit-line/1", {**found, "limit_micro": amount})
    terminal.say(f"{found['peer']} may owe this peer up to {credits_of(amount)} credits, for {days} days")
    if not found["connected"]:
        terminal.say("it is not connected, and is told when it is")


@credit.command()
@click.argument("peer")
@common
def revoke(terminal: Terminal, peer: str) -> None:
    """Close the line to PEER for new work. What it owes it still owes, and deals that run go on.

    \b
    ichiba credit revoke 12D3KooWGC9253ES1rnmjbyBGj7CEVEEqtkq13RN4DgqLixKLZao
    """
    with terminal.client() as client:
        found = client.credit_revoke(peer)
    terminal.record("ichiba.credit-line/1", {**found, "limit_micro": 0})
    terminal.say(f"the line to {found['peer']} is closed; it owes {credits_of(found['owed_micro'])} credits")


@credit.command("ls")
@common
def ls(terminal: Terminal) -> None:
    """List the lines this peer gives and has, and what is owed.

    \b
    ichiba credit ls
    ichiba credit ls --json
    """
    with terminal.client() as client:
        found = client.credit()
    for row in found["accounts"]:
        terminal.record("ichiba.credit/1", row)
    if not found["accounts"]:
        terminal.say("no credit is given or had; next: ichiba credit give PEER AMOUNT")
        return
    terminal.table(
        "credit",
        ("peer", ">gives you", ">left", ">you give", ">left", ">it owes you", ">runs", "not netted"),
        [
            (
                row["peer"][-12:],
                credits_of(row["got_micro"]),
                credits_of(row["got_left_micro"]),
                credits_of(row["given_micro"]),
                credits_of(row["given_left_micro"]),
                credits_of(row["owed_micro"]),
                credits_of(row["open_given_micro"] + row["open_got_micro"]),
                str(row["not_netted"]),
            )
            for row in found["accounts"]
        ],
    )
    if any(row["owed_micro"] < 0 for row in found["accounts"]):
        terminal.say("what it owes you below zero is what you owe it")


@credit.command()
@click.argument("peer", required=False, default="")
@common
def net(terminal: Terminal, peer: str) -> None:
    """Net what this peer and PEER owe each other; without PEER with all, and clear cycles of debts.

    Both sign the balance and need the deals behind it no more. Where you owe Ben, Ben owes Cat and Cat owes you, all
    three fall by the smallest of them once all three peers have signed; nobody gains or loses by it.

    \b
    ichiba credit net
    ichiba credit net 12D3KooWGC9253ES1rnmjbyBGj7CEVEEqtkq13RN4DgqLixKLZao
    """
    with terminal.client() as client:
        found = client.credit_net(peer)
    terminal.record("ichiba.credit-net/1", found)
    terminal.say(f"{len(found['asked'])} peer(s) are asked; `ichiba credit ls` shows what became of it")
    for name in found["away"]:
        terminal.say(f"{name} is not connected")
