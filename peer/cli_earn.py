"""`ichiba earn`: `ichiba up` for a person who wants the machine to earn, as a guest that keeps its owner's rules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peer.cli_house import house
from peer.cli_output import CREDITS, SIZE, Terminal, common, credits_of, write_whole
from peer.cli_pause import finishing_line, pause, paused_line
from peer.cli_up import Roles, up

if TYPE_CHECKING:
    from peer.energy import Day
    from peer.guest import GuestRules

__all__ = ["earn"]

_RUN = (
    click.option(
        "--as",
        "roles",
        type=Roles(),
        default="verifier,whistleblower",
        show_default=True,
        help="Of solver,verifier,whistleblower.",
    ),
    click.option("--peer", "peers", multiple=True, metavar="ADDRESS|INVITE", help="A peer to connect to; repeatable."),
    click.option("--price", type=CREDITS, help="What an operation costs you, per Gop; else the rules', or 0.001."),
    click.option("--memory", type=SIZE, default="2G", show_default=True, help="What one job may use."),
)
_DEFAULT_PRICE_MICRO = 1000


def _run_options(command: Any) -> Any:
    for option in reversed(_RUN):
        command = option(command)
    return command


def _serve(
    ctx: click.Context, terminal: Terminal, roles: int, peers: tuple[str, ...], price: int | None, memory: int
) -> None:
    """Run the daemon in the foreground; the price is the option's, else the rules', else a tenth of a cent."""
    price = price if price is not None else _rules(terminal).price_micro
    price = _DEFAULT_PRICE_MICRO if price is None else price
    ctx.invoke(
        up, data=terminal.data_dir, as_json=terminal.as_json, peers=peers, roles=roles, price=price, memory=memory
    )


@click.group(invoke_without_command=True)
@_run_options
@common
@click.pass_context
def earn(
    ctx: click.Context, terminal: Terminal, roles: int, peers: tuple[str, ...], price: int | None, memory: int
) -> None:
    """Run the daemon to earn: by work, by checking it, by finding what others missed.

    The same as `ichiba up --roles`, and that is all there is to type. A verifier is drawn to re-execute segments and
    is paid for each. A whistleblower re-checks verdicts by itself while what it can expect (the solver's lock, the
    jackpot of an ordered error) exceeds what the re-check costs at --price, and stops when it does not; when it finds
    wrong work it stakes a challenge and answers the notaries' questions until they have ruled. `ichiba dispute list`
    shows its disputes, `ichiba wallet` what they earned. It keeps the rules of earn.toml in the data directory, which
    `ichiba earn start` writes.

    \b
    ichiba earn
    ichiba earn --as verifier,whistleblower
    ichiba earn --as solver,verifier,whistleblower --peer ichiba1qyp...
    """
    if ctx.invoked_subcommand is None:
        _serve(ctx, terminal, roles, peers, price, memory)


@earn.command()
@_run_options
@click.option("--schedule", multiple=True, metavar="SPAN", help='As in "22:00-07:00 mon-fri"; repeatable.')
@click.option("--idle", "idle_minutes", type=int, metavar="MINUTES", help="Only when nobody used it for so long.")
@click.option("--load-max", metavar="LOAD", help="Begin nothing above this one-minute load.")
@click.option("--power-max", "power_watts_max", type=int, metavar="WATTS", help="Pause when the GPUs draw more.")
@click.option("--gpu-max", "gpu_celsius_max", type=int, metavar="CELSIUS", help="Pause when a GPU is as hot.")
@click.option("--cpu-max", "cpu_celsius_max", type=int, metavar="CELSIUS", help="Pause when the CPU is as hot.")
@click.option("--battery", metavar="never|PERCENT", help="Off the mains never, or only above so much.")
@click.option("--other-gpu", "other_gpu_processes", type=click.Choice(["pause", "ignore"]), help="When others use it.")
@click.option("--watts", type=int, help="What working draws, for the report where nothing measures it.")
@click.option("--kwh-price", "kwh_price", metavar="CREDITS", help="What a kilowatt-hour costs you.")
@click.option("--no-rules", is_flag=True, help="Forget the rules given before.")
@common
@click.pass_context
def start(
    ctx: click.Context,
    /,
    terminal: Terminal,
    roles: int,
    peers: tuple[str, ...],
    price: int | None,
    memory: int,
    no_rules: bool,
    **given: Any,
) -> None:
    """Earn from now on, by these rules and those given before.

    They are written to earn.toml in the data directory and hold until they are changed; a running daemon takes them
    within seconds, and goes on if it was paused or finishing; else it is started here. A rule that is broken pauses all
    work at its next step, `ichiba status` says which, and work goes on when its cause has been away for a minute.

    \b
    ichiba earn start
    ichiba earn start --as solver,verifier --schedule "22:00-07:00 mon-fri" --schedule "00:00-24:00 sat,sun"
    ichiba earn start --idle 10 --gpu-max 80 --battery never --other-gpu pause
    """
    from peer.client import DaemonNotRunning

    rules = _changed(terminal, no_rules, {**given, "price": None if price is None else credits_of(price)})
    try:
        with terminal.client() as client:
            client.resume()
            found = client.finish(on=False)
    except DaemonNotRunning:
        _serve(ctx, terminal, roles, peers, price, memory)
        return
    terminal.record("ichiba.earn/1", {**found, "rules": _shown(rules)})
    terminal.say(f"it takes work again; rules: {', '.join(_shown(rules)) or 'none'}")


earn.add_command(pause)
earn.add_command(house)


@earn.command()
@common
def finish(terminal: Terminal) -> None:
    """Take no new work, finish and settle what there is, and say when that is done.

    Bids and checks asked for from now on are declined as `finishing`, over a restart too, until `ichiba earn start`.
    `ichiba status` counts what is left.

    \b
    ichiba earn finish
    """
    with terminal.client() as client:
        found = client.finish()
    terminal.record("ichiba.earn/1", found)
    terminal.say(finishing_line(found))
    if found["paused_since_ns"]:
        terminal.note(f"it is paused {paused_line(found)}: nothing is finished before it goes on")


@earn.command()
@common
def rules(terminal: Terminal) -> None:
    """Show the rules, what the sensors read now, what they cannot, and what a rule says to it.

    Asks no daemon.

    \b
    ichiba earn rules
    """
    import time
    from dataclasses import asdict
    from datetime import datetime

    from peer.guest import Guest
    from peer.sensors import Sensors

    held, now = _rules(terminal), time.time()
    reading = Sensors().read(now)
    reason = Guest(held).step(reading, at=datetime.fromtimestamp(now), now_ns=time.monotonic_ns(), working=False)
    terminal.record(
        "ichiba.earn.rules/1",
        {"rules": _shown(held), "reading": asdict(reading), "reason": asdict(reason) if reason else None},
    )
    terminal.pairs({line.split(" = ")[0]: line.split(" = ")[1] for line in _shown(held)} or {"rules": "none"})
    read = {name: value for name, value in asdict(reading).items() if value is not None and name != "cannot"}
    terminal.pairs({"now " + name: value for name, value in read.items()})
    for name, why in sorted(reading.cannot.items()):
        terminal.say(f"cannot read {name}: {why}")
    terminal.say(f"now it would pause ({reason.code}): {reason.why}" if reason else "now it would work")


@earn.command()
@click.option("--days", type=click.IntRange(1, 400), default=7, show_default=True, help="How many, up to today.")
@common
def report(terminal: Terminal, days: int) -> None:
    """Show by day what was earned and settled, what the work drew, and what is left of it.

    Energy is the watts of `ichiba earn start --watts` times the time of work; without them what the graphics cards
    measured, which is not all of a machine. Its price is that of --kwh-price.

    \b
    ichiba earn report
    ichiba earn report --days 30 --json
    """
    from datetime import date, datetime, timedelta

    from peer.energy import Day, read_book
    from peer.guest_watch import ENERGY_FILE

    held, book = _rules(terminal), read_book(terminal.data_dir / ENERGY_FILE)
    first = date.today() - timedelta(days=days - 1)
    since_ns = int(datetime.combine(first, datetime.min.time()).timestamp()) * 10**9
    earned: dict[str, int] = {}
    available: dict[str, int] = {}
    with terminal.client() as client:
        for row in client.earnings(since_ns=since_ns):
            day = datetime.fromtimestamp(row["time_ns"] / 1e9).date().isoformat()
            earned[day] = earned.get(day, 0) + row["micro"]
            if row["role"] == "available":
                available[day] = available.get(day, 0) + row["micro"]
    rows = []
    for day in ((first + timedelta(days=number)).isoformat() for number in range(days)):
        used = book.days.get(day, Day())
        rows.append(_day_row(day, earned.get(day, 0), available.get(day, 0), used, held.kwh_micro))
    for row in rows:
        terminal.record("ichiba.earn.day/1", row)
    _show_report(terminal, rows, held)


def _day_row(day: str, earned_micro: int, available_micro: int, used: Day, kwh_micro: int | None) -> dict[str, Any]:
    """One day; what is not known is None. available_micro: of what was earned, the house's pay for passed challenges.
    Energy costs are rounded up: a net that flatters misleads."""
    joules = used.configured_j + used.measured_j
    sources = [name for name, j in (("configured", used.configured_j), ("measured", used.measured_j)) if j]
    known = kwh_micro is not None and not used.unknown_s
    cost = math.ceil(joules / 3.6e6 * kwh_micro) if known and kwh_micro is not None else None
    return {
        "day": day, "earned_micro": earned_micro, "available_micro": available_micro,
        "work_s": round(used.work_s), "energy_wh": round(joules / 3600, 3),
        "energy_source": " and ".join(sources), "unknown_s": round(used.unknown_s),
        "cost_micro": cost, "net_micro": None if cost is None else earned_micro - cost,
    }  # fmt: skip


def _show_report(terminal: Terminal, rows: list[dict[str, Any]], held: GuestRules) -> None:
    terminal.table(
        "days",
        ("day", ">earned", ">of it available", ">work", ">energy", "from", ">cost", ">net"),
        [
            (
                row["day"],
                credits_of(row["earned_micro"]),
                credits_of(row["available_micro"]),
                f"{row['work_s'] // 60} min",
                f"{row['energy_wh'] / 1000:.3f} kWh",
                {"configured": "configured, not measured", "measured": "the GPUs alone"}.get(
                    row["energy_source"], row["energy_source"] or "-"
                ),
                "-" if row["cost_micro"] is None else credits_of(row["cost_micro"]),
                "-" if row["net_micro"] is None else credits_of(row["net_micro"]),
            )
            for row in rows
        ],
    )
    if held.kwh_micro is None:
        terminal.say("no price of electricity is known: ichiba earn start --kwh-price CREDITS")
    if any(row["unknown_s"] for row in rows):
        terminal.say("of some work nobody knows what it drew: ichiba earn start --watts WATTS")


def _file(terminal: Terminal) -> Path:
    from peer.guest_watch import RULES_FILE

    return terminal.data_dir / RULES_FILE


def _rules(terminal: Terminal) -> GuestRules:
    """The rules that hold. Raises BadRules."""
    from peer.guest import BadRules, GuestRules, read_rules

    try:
        return read_rules(_file(terminal).read_text("utf-8"))
    except FileNotFoundError:
        return GuestRules()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRules(f"{_file(terminal)} cannot be read: {error}") from None


def _changed(terminal: Terminal, no_rules: bool, given: dict[str, Any]) -> GuestRules:
    """The rules with what the options say, written to the file whole or not at all. Raises BadRules."""
    from peer.guest import GuestRules, dump_rules, merged

    held = GuestRules() if no_rules else _rules(terminal)
    made = merged(
        held, {key: list(v) if isinstance(v, tuple) else v for key, v in given.items() if v not in (None, ())}
    )
    if made != held or no_rules:
        terminal.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(_file(terminal), dump_rules(made).encode())
    return made


def _shown(held: GuestRules) -> list[str]:
    from peer.guest import dump_rules

    return dump_rules(held).splitlines()
