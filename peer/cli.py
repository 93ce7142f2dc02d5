"""The `ichiba` command: which commands there are, and how an error becomes an exit code.

Commands live in peer/cli_*.py and are imported when they are used, so that `ichiba status` starts without torch,
libp2p or trio. docs/cli.md is printed by `ichiba --help-all-markdown`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, Final

import click

from peer.cli_output import show_error
from protocol.errors import IchibaError

__all__ = ["LazyGroup", "cli", "main"]

# name: (where it is, its first line in the list of commands)
_COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "init": ("peer.cli_node:init", "Make the data directory: a key, and the network to be on."),
    "key": ("peer.cli_key:key", "Protect the file that holds this peer's secret key."),
    "up": ("peer.cli_up:up", "Run the daemon until Ctrl-C."),
    "earn": ("peer.cli_earn:earn", "Run the daemon to earn: by work, by checking it, by finding what others missed."),
    "status": ("peer.cli_node:status", "Show who this peer is, whom it sees and what it does."),
    "connect": ("peer.cli_node:connect", "Connect the running daemon to another peer."),
    "invite": ("peer.cli_node:invite", "Print an invite that brings another peer here."),
    "pause": ("peer.cli_pause:pause", "Free this machine: stop all work at its next step, and keep where it stands."),
    "resume": ("peer.cli_pause:resume", "Go on after a pause."),
    "submit": ("peer.cli_submit:submit", "Offer the job in JOB to the market and follow it."),
    "quote": ("peer.cli_submit:quote", "Show what a job would cost, and how long it would take."),
    "profile": ("peer.cli_profile:profile", "Measure whether tolerant mode would be safe for a job."),
    "job": ("peer.cli_job:job", "List, show, follow, cancel and collect jobs."),
    "dispute": ("peer.cli_dispute:dispute", "List disputes about work, draw how one was decided, check it offline."),
    "why": ("peer.cli_why:why", "Say why a job stands still, why this peer earns nothing, or what is wrong here."),
    "book": ("peer.cli_market:book", "Show the asks and offers this peer has heard of."),
    "offers": ("peer.cli_market:offers", "Show the offers of work this peer has heard of."),
    "trades": ("peer.cli_market:trades", "Show what work was sold for: the co-signed agreements of this network."),
    "price": ("peer.cli_market:price", "Suggest what to pay, or what to ask."),
    "audit": ("peer.cli_audit:audit", "Make a match again from its signed bids, here or elsewhere."),
    "reputation": ("peer.cli_reputation:reputation", "Show what co-signed endings say of peers; export and check it."),
    "wallet": ("peer.cli_wallet:wallet", "Show what this peer holds, locks, earns, owes; move its stake, back it up."),
    "credit": ("peer.cli_credit:credit", "Trust people you know: credit lines, what is owed on them, and netting it."),
    "receipts": ("peer.cli_receipts:receipts", "Check and export the evidence of finished work."),
    "db": ("peer.cli_db:db", "Look into this peer's store, without changing it."),
    "bench": ("peer.cli_bench:bench", "Measure this device and make its bench card, the proof of what it can do."),
    "drops": ("peer.cli_doctor:drops", "Show what was dropped since the start, why, and whose it was."),
    "doctor": ("peer.cli_doctor:doctor", "Check this machine and peer, and say how to mend what is wrong."),
    "simulate": ("peer.cli_simulate:simulate", "Simulate the market before trusting it with money. Asks no daemon."),
    "links": ("peer.cli_links:links", "The links between peers: delay and speed, of both ends' reports the slower."),
    "placement": ("peer.cli_placement:placement", "Plan which device holds which part of a model. Asks no daemon."),
    "swarm": (
        "peer.cli_swarm:swarm",
        "Run a whole swarm on this machine: five peers, a market between them, and a demonstration.",
    ),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def __init__(self, *args: Any, lazy: dict[str, tuple[str, str]] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lazy = lazy or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names, in the order of use."""
        return [*self.lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself."""
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        found = getattr(importlib.import_module(module), attribute)
        assert isinstance(found, click.Command), cmd_name
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.lazy.items()])


class _Root(LazyGroup):
    """The root: here every error becomes words and an exit code."""

    def main(  # type: ignore[override]  # click overloads it by standalone_mode, which is ours to set
        self, args: Any = None, prog_name: str | None = None, **options: Any
    ) -> Any:
        """As click's, but exits with docs/cli.md's codes."""
        options["standalone_mode"] = False
        words = list(sys.argv[1:] if args is None else args)
        as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
        try:
            returned = super().main(words, prog_name, **options)
            # ctx.exit(code) comes back as a number, everything else of a command as None.
            sys.exit(returned if isinstance(returned, int) else 0)
        except IchibaError as error:
            show_error(error, as_json=as_json)
            sys.exit(error.exit_code)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except click.UsageError as error:
            show_error(_usage(error), as_json=as_json)
            sys.exit(2)
        except click.ClickException as error:
            show_error(IchibaError(error.format_message()), as_json=as_json)
            sys.exit(1)
        except click.Abort:
            sys.exit(130)
        except OSError as error:
            show_error(IchibaError(f"{error.strerror}: {error.filename or ''}".rstrip(": ")), as_json=as_json)
            sys.exit(1)


class _Usage(IchibaError):
    code = "usage"
    exit_code = 2


def _usage(error: click.UsageError) -> IchibaError:
    path = error.ctx.command_path if error.ctx is not None else "ichiba"
    return _Usage(error.format_message(), next_step=f"{path} --help")


def _print_markdown(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from peer.cli_markdown import markdown

        click.echo(markdown(ctx.command), nl=False)
        ctx.exit()


@click.group(cls=_Root, lazy=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="The data directory of the peer; else ICHIBA_DATA, else the usual place of this system.",
)
@click.option(
    "--help-all-markdown", is_flag=True, is_eager=True, hidden=True, callback=_print_markdown, expose_value=False
)
@click.version_option(package_name="ichiba", prog_name="ichiba")
def cli(data: Path | None) -> None:
    """A peer-to-peer market for machine-learning compute.

    Start with `ichiba init`, then `ichiba up`, then `ichiba submit examples/mlp`.
    """


def main() -> None:
    """The console script."""
    cli.main(prog_name="ichiba")


if __name__ == "__main__":
    main()
