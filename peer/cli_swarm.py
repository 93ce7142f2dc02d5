"""`ichiba swarm`: a whole market on this machine, to try things on, and the demonstration that runs on one."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import click
import platformdirs
from click.core import ParameterSource
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from peer.demo import Outcome, Plan, run_demo
from peer.demo_story import Story, money_rows, sparkline
from peer.lan import LAN_RULES, Lan, LanProblem, members
from protocol.credits import credits_of
from worker.cheats import CHEATS, UNIT_CHEATS

__all__ = ["PlainScreen", "TerminalScreen", "closing_words", "swarm"]

PICTURE_LINES = 9
SPARK_LETTERS = 40
LINKS_HELP = (
    "With --parallel: slow is 50 ms and 100 Mbit/s, by network namespaces where this user may make them, else by a "
    "shaper in each daemon; it is said which."
)
INDENT = " " * 11  # under what a line is about
MEET_SECONDS = 60.0


def _default_dir() -> Path:
    return platformdirs.user_data_path("ichiba") / "swarm"


DIRECTORY = click.option(
    "--dir",
    "path",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the swarm lives; else the usual place of this system.",
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")


NOTARIES = click.option(
    "--notaries",
    type=click.Choice(["0", "1", "4", "7"]),
    default="4",
    show_default=True,
    help="Peers that do nothing but arbitrate, as daemons beside the others; 0: a quorum of checkers judges.",
)


@click.group()
def swarm() -> None:
    """Run a whole swarm on this machine: five peers, a market between them, and a demonstration."""


@swarm.command()
@click.option("--peers", type=click.IntRange(4, 32), default=5, show_default=True, help="How many daemons to start.")
@NOTARIES
@DIRECTORY
@AS_JSON
def up(peers: int, notaries: str, path: Path | None, as_json: bool) -> None:
    """Start a swarm: a submitter with 1,000 credits, solvers, a verifier and a whistleblower.

    They go on until `ichiba swarm down`. A swarm that was stopped is started again, with its keys and money.

    \b
    ichiba swarm up
    ichiba swarm up --peers 8 --dir ./market-test
    """
    path = path or _default_dir()
    lan = Lan.load(path) if (path / "swarm.json").exists() else Lan.create(path, members(peers, notaries=int(notaries)))
    if lan.running():
        raise LanProblem(f"a swarm runs in {path} already", next_step=f"ichiba swarm down --dir {path}")
    ready = False
    try:
        lan.start(lambda name: click.echo(f"{name} is up", err=True))
        lan.meet(seconds=MEET_SECONDS)
        ready = True
    finally:
        if not ready:
            lan.stop()
    rows = [
        {"name": one.member.name, "peer": one.peer, "pid": one.pid, "data": one.data, "log": one.log}
        for one in lan.peers
    ]
    if as_json:
        click.echo(json.dumps({"schema": "ichiba.swarm.up/1", "dir": str(lan.path), "peers": rows}))
        return
    for row in rows:
        click.echo(f"{row['name']:16} process {row['pid']:<8} {row['data']}")
    click.echo(f"\nThey see each other. Next:\n  ichiba --data {lan.of('submitter').data} status")
    click.echo(f"  ichiba swarm down --dir {lan.path}")


@swarm.command()
@DIRECTORY
@AS_JSON
def down(path: Path | None, as_json: bool) -> None:
    """Stop the swarm, all of it.

    It says so only when no process of it is left. Harmless the second time.

    \b
    ichiba swarm down
    """
    path = path or _default_dir()
    stopped = Lan.load(path).stop() if (path / "swarm.json").exists() else 0
    if as_json:
        click.echo(json.dumps({"schema": "ichiba.swarm.down/1", "dir": str(path), "stopped": stopped}))
    else:
        click.echo(f"{stopped} daemons stopped; nothing of the swarm in {path} runs any more")


@swarm.command()
@click.option(
    "--cheat",
    type=click.Choice((*CHEATS, *UNIT_CHEATS)),
    default=None,
    help="The cheapest solver commits this fraud; the last two with --parallel, and no other with it.",
)
@click.option("--kill", type=click.Choice(["solver"]), default=None, help="Kill the working solver half-way.")
@click.option("--steps", type=click.IntRange(10, 100_000), default=200, show_default=True, help="Training steps.")
@click.option("--seed", type=click.IntRange(0, 2**32), default=3, show_default=True, help="Of weights and data order.")
@NOTARIES
@click.option("--parallel", metavar="SxR", help="Instead: one job of S stages by R replicas, a solver for each.")
@click.option("--links", type=click.Choice(["fast", "slow"]), default="fast", help=LINKS_HELP)
@click.option("--keep", is_flag=True, help="Leave the swarm running, to look around.")
@click.option(
    "--dir",
    "path",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to put it, to stay there; else a fresh place that is removed afterwards.",
)
@AS_JSON
def demo(
    cheat: str | None,
    kill: str | None,
    steps: int,
    seed: int,
    notaries: str,
    parallel: str | None,
    links: str,
    keep: bool,
    path: Path | None,
    as_json: bool,
) -> None:
    """Five peers train a small GPT: market, work, payment, checks and settlement, in about two minutes.

    Under --json the story goes to standard error and one JSON object to standard output. Exit code 0 only if the
    model was trained, its proof verifies, the money adds up, a cheat was slashed and a killed solver was paid.

    \b
    ichiba swarm demo
    ichiba swarm demo --cheat skip-step
    ichiba swarm demo --kill solver --json
    ichiba swarm demo --parallel 2x2 --links slow
    ichiba swarm demo --parallel 2x2 --cheat skip-backward
    """
    if parallel is not None:
        _refuse_with_parallel("kill", "steps", "seed", "notaries", "keep")
        _parallel(parallel, slow=links == "slow", cheat=cheat or "", path=path, as_json=as_json)
        return
    if cheat in UNIT_CHEATS:
        raise click.UsageError(f"--cheat {cheat} is a fraud of one unit of many: add --parallel 2x2.")
    if links == "slow":
        raise click.UsageError("--links slow is of the links that tensors travel over: add --parallel 2x2.")
    plan = Plan(
        cheat=cheat or "", kill=bool(kill), steps=steps, seed=seed, keep=keep, path=path, notaries=int(notaries)
    )
    console = Console(stderr=as_json, highlight=False)
    with TerminalScreen(console) if console.is_terminal else PlainScreen(console) as screen:
        outcome = run_demo(plan, screen)
    console.print()
    console.print(closing_words(outcome), soft_wrap=True, markup=False)
    if as_json:
        click.echo(json.dumps(outcome.as_dict()))
    click.get_current_context().exit(1 if outcome.failures else 0)


def _refuse_with_parallel(*options: str) -> None:
    """The demonstration of a parallel job is one story, and takes none of these: say so, and ignore none."""
    context = click.get_current_context()
    for option in options:
        if context.get_parameter_source(option) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"--{option} is not for --parallel: leave one of them out.")


def _parallel(shape: str, *, slow: bool, cheat: str, path: Path | None, as_json: bool) -> None:
    """The demonstration of a parallel job."""
    from peer.demo_parallel import run_parallel_demo, words_of

    stages, _, replicas = shape.lower().partition("x")
    if not (stages.isdecimal() and replicas.isdecimal() and 2 <= int(stages) * int(replicas) <= 16):
        raise click.UsageError(f"--parallel {shape}: write as in 2x2, 2 to 16 units in all.")
    if cheat and cheat not in UNIT_CHEATS:
        raise click.UsageError(f"--cheat {cheat} with --parallel: a unit commits {' or '.join(UNIT_CHEATS)}.")
    outcome = run_parallel_demo(
        stages=int(stages), replicas=int(replicas), steps=8, slow=slow, cheat=cheat, path=path,
        say=lambda line: click.echo(line, err=as_json),
    )  # fmt: skip
    click.echo(words_of(outcome), err=as_json)
    if as_json:
        click.echo(json.dumps({"schema": "ichiba.swarm.parallel/1", **outcome}))
    click.get_current_context().exit(1 if outcome["failures"] else 0)


def closing_words(outcome: Outcome) -> str:
    """What happened, in plain sentences."""
    plan = outcome.plan
    if outcome.failures:
        return "This went wrong: " + "; ".join(outcome.failures) + "."
    words = [
        f"5 peers trained a {outcome.params / 1e6:.2f}M-parameter model for {plan.steps} steps in "
        f"{outcome.seconds:.0f} s, start to end: the loss fell from {outcome.loss_first:.2f} to "
        f"{outcome.loss_last:.2f}.",
        f"{outcome.segments_checked} of {outcome.segments} segments were re-executed by two other peers, drawn after "
        "the proof was committed, and every bit was the same.",
    ]
    if outcome.dispute:
        found = outcome.dispute
        words.append(
            f"The dispute took {found['seconds']:.0f} s and {found['rounds']} rounds: "
            f"{found['message_bytes'] / 1000:.1f} kB of signed moves and {found['opening_bytes'] / 1024:.0f} KiB of "
            f"operands, until {plan.notaries} notaries could repeat the one thing left."
        )
    if plan.cheat:
        words.append(
            f"{outcome.culprit} cheated ({plan.cheat}), was caught, lost {credits_of(outcome.slashed)} credits of "
            "stake and all pay, and an honest solver did the work again."
        )
    if plan.kill:
        words.append(
            f"{outcome.killed} was killed half-way; the job went on from its last agreed checkpoint, and "
            f"{' and '.join(outcome.solvers_paid)} were both paid for what they did."
        )
    share = f", of which {LAN_RULES.pool_permille / 10:g} % fill the jackpot pool" if plan.notaries else ""
    words.append(
        f"Solvers earned {credits_of(outcome.paid_micro)} credits{share}. "
        "The ledgers of all live peers are identical and add up to the deposits."
    )
    return "\n".join(words)


class PlainScreen:
    """Lines, one after the other, for files and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.receipts = 0

    def __enter__(self) -> PlainScreen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def say(self, line: str) -> None:
        """One line that stays."""
        self.console.print(line, soft_wrap=True, markup=False)

    def picture(self, story: Story) -> None:
        """A small curve, once for each segment that is paid."""
        if story.receipts != self.receipts:
            self.receipts = story.receipts
            self.say(f"{INDENT}{sparkline(story.loss_line, SPARK_LETTERS)}  {story.progress}")

    def money(self, table: dict[str, Any], name_of: Callable[[str], str]) -> None:
        """The money table."""
        self.console.print(money_table(table, name_of))

    def text(self, title: str, body: str) -> None:
        """A longer text."""
        self.say(f"{title}:")
        for line in body.splitlines():
            self.say(f"    {line}")


class TerminalScreen(PlainScreen):
    """The same lines, above a loss curve that grows in place."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.live = Live(console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> TerminalScreen:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def say(self, line: str) -> None:
        """One line that stays, folded under its first word; verdicts and losses stand out."""
        word = line.split(" ", 1)[0]
        style = {"SLASHED": "bold red", "KILLED": "bold red", "verdict": "bold", "done": "bold green"}.get(word, "")
        folded = textwrap.wrap(line, self.console.width, subsequent_indent=INDENT, break_on_hyphens=False)
        self.console.print(Text("\n".join(folded) or " ", style=style))

    def picture(self, story: Story) -> None:
        """The loss curve, in place of the one before; it stays on the screen when the job is done."""
        width = min(100, self.console.width)
        rows = [Text(row, style="cyan") for row in story.picture(width, PICTURE_LINES)]
        if story.ended:
            self.live.update(Group())
            for row in rows:
                self.console.print(row)
        else:
            self.live.update(Group(*rows))


def money_table(table: dict[str, Any], name_of: Callable[[str], str]) -> Table:
    """Who put in, earned, paid, lost and holds how many credits."""
    shown = Table(title="credits", title_justify="left", box=None, pad_edge=False)
    shown.add_column("")
    for name in ("deposited", "earned", "awarded", "paid", "slashed", "held"):
        shown.add_column(name, justify="right")
    *rows, total = money_rows(table, name_of)
    for row in rows:
        shown.add_row(*row)
    shown.add_section()
    shown.add_row(*total, style="bold")
    return shown
