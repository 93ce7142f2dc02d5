"""The `reputation` group: what co-signed endings say of peers, and that evidence in a file that proves itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from peer.cli_money import read_evidence, trusted_network
from peer.cli_output import Terminal, common, write_whole

__all__ = ["reputation"]


class _Reputation(click.Group):
    """`ichiba reputation PEER` shows one peer; `export` and `verify` are commands, and no peer ends in that."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take a first word that is no command as the peer to show."""
        words = [word for word in args if not word.startswith("-")]
        if not words or words[0] not in self.commands:
            args = args if {"-h", "--help"} & set(args) and not words else ["show", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Reputation)
def reputation() -> None:
    """Show what co-signed endings say of peers; export and check it.

    Without a command it shows: `ichiba reputation`, `ichiba reputation PEER`. The score is the pessimistic
    bound of a Beta posterior; evidence halves in 30 days, a pair counts once a day, and what one counterparty says is
    capped (docs/decisions/0016-reputation.md).
    """


@reputation.command()
@click.argument("peer", required=False, default="")
@click.option("--role", type=click.Choice(["solver", "verifier", "submitter"]), help="Only this role.")
@common
def show(terminal: Terminal, peer: str, role: str | None) -> None:
    """Show the reputation of PEER (its name, or the end of it), or of every peer there is evidence of.

    \b
    ichiba reputation show
    ichiba reputation show pyXR1Tdn --json
    ichiba reputation --role verifier      # `show` may be left out
    """
    with terminal.client() as client:
        found = client.reputation(peer, role=role or "")
    for one in found["reputations"]:
        terminal.record("ichiba.reputation/1", {"day": found["day"], **one})
    terminal.table(
        "reputation, the best bound first",
        ("peer", "role", ">bound", ">mean", ">right", ">wrong", ">pairs", ">oldest", "~why"),
        [_row(one, found["day"]) for one in found["reputations"]],
    )
    if found["left_out"]:
        terminal.note(f"{found['left_out']} more are not shown; name a role or a peer")


def _row(one: dict[str, Any], day: int) -> tuple[str, ...]:
    since = one["since_day"]
    return (
        one["peer"][-8:],
        one["role"],
        f"{one['bound_ppm'] / 10_000:.1f} %",
        f"{one['mean_ppm'] / 10_000:.1f} %",
        f"{one['right_ppm'] / 1e6:.2f}",
        f"{one['wrong_ppm'] / 1e6:.2f}",
        str(one["pairs"]),
        "" if since is None else f"{day - since} d",
        "; ".join(one["why"]),
    )


@reputation.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("peer", required=False, default="")
@common
def export(terminal: Terminal, file: Path, peer: str) -> None:
    """Write the co-signed evidence of PEER (without it, of this peer) to FILE, for anybody to check.

    \b
    ichiba reputation export mine.json
    ichiba reputation export theirs.json pyXR1Tdn
    """
    import json

    from peer.home import Home
    from peer.reputation_bundle import SCHEMA, verify

    home = Home(terminal.data_dir)
    with terminal.client() as client:
        found = client.reputation_bundle(peer)
    bundle = {"schema": SCHEMA, "network": home.network_file.read_text(), **found}
    report = verify(bundle, home.network().id)
    write_whole(file, json.dumps(bundle, indent=1).encode() + b"\n")
    terminal.record("ichiba.reputation-export/1", {"file": str(file), "peer": report.peer, "deals": report.deals})
    terminal.say(f"wrote {report.deals} deals of {report.peer[-8:]} to {file}")
    terminal.say(f"check it with: ichiba reputation verify {file}")


@reputation.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@trusted_network
@common
def verify(terminal: Terminal, file: Path, network_file: Path | None) -> None:
    """Check a file that `ichiba reputation export` wrote: every signature, and the score made again.

    Needs no daemon and asks nobody. The score is shown as of the file's day and of today.

    \b
    ichiba reputation verify theirs.json
    ichiba reputation verify theirs.json --network market.toml
    """
    from market.reputation import DAY_NS
    from peer.home import Home
    from peer.reputation_bundle import CANNOT_KNOW, verify
    from peer.reputations import figures, reasons

    bundle = read_evidence(file)
    network = Home(terminal.data_dir).network(network_file)
    report = verify(bundle, network.id, day=time.time_ns() // DAY_NS)
    roles: dict[str, dict[str, Any]] = {
        role: {**figures(found.reputation), "pairs": found.pairs, "why": reasons(found, report.day)}
        for role, found in report.roles.items()
    }
    told = {"peer": report.peer, "network": report.network, "file_day": bundle["day"], "day": report.day}
    terminal.record(
        "ichiba.reputation-report/1",
        {**told, "deals": report.deals, "records": report.records, "roles": roles, "cannot_know": list(CANNOT_KNOW)},
    )
    terminal.say(f"{report.deals} deals of {report.peer[-8:]}, {report.records} records: all signatures hold")
    terminal.say(f"the score that the file claims for day {bundle['day']} follows; as of today:")
    for role, one in roles.items():
        if one["pairs"]:
            terminal.say(f"  {role}: bound {one['bound_ppm'] / 10_000:.1f} %, mean {one['mean_ppm'] / 10_000:.1f} %")
            for words in one["why"]:
                terminal.say(f"    {words}")
    terminal.say("what this file cannot show:")
    for words in CANNOT_KNOW:
        terminal.say(f"  {words}")
