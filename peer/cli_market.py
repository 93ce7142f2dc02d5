"""Commands about the market: book, offers, trades, price suggest; and the table of a quote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from market.filters import ASK_KEYS, OFFER_KEYS, TRADE_KEYS, Key, read_filter
from peer.cli_node import roles_of
from peer.cli_output import CREDITS, Terminal, common, credits_of, short_id, size_of
from peer.cli_watch import watch
from protocol import params
from protocol.errors import IchibaError
from protocol.params import SANDBOX_LEVELS

__all__ = ["book", "offers", "price", "show_ladder", "trades"]

_F = TypeVar("_F", bound=Callable[..., Any])


def _keys_of(keys: Mapping[str, Key]) -> str:
    return ", ".join(keys)


def _picked(function: _F) -> _F:
    """The argument and the options of every table."""
    function = click.option("--watch", "watching", is_flag=True, help="Keep it up to date until Ctrl-C.")(function)
    function = click.option(
        "--limit", type=click.IntRange(min=1, max=params.ROWS_SHOWN_MAX), help="Show no more rows than this."
    )(function)
    function = click.option(
        "--sort", metavar="KEY", default="", help="By a key of the filter; -KEY for the most first."
    )(function)
    return click.argument("where", metavar="[FILTER]", nargs=-1)(function)


@click.command()
@_picked
@common
def book(terminal: Terminal, where: tuple[str, ...], sort: str, limit: int | None, watching: bool) -> None:
    """Show the asks and offers this peer has heard of.

    cr/Gop: credits per giga-operation, which an ask wants and an offer pays at most. stake: what an ask's peer can
    lock, and what an offer wants locked.

    A FILTER picks asks: comparisons of a key, one of < <= = != >= >, and a value, that must all hold. Its keys: price,
    memory, vram, device, speed, sandbox, role, stake, trust, card, here, peer, age. Bytes are GiB or end in K, M, G, T;
    prices are credits per giga-operation; trust is 0 to 1. Without a filter the offers are shown too, and for each
    that this peer would not bid on, the reason (`ichiba offers` filters those).

    \b
    ichiba book
    ichiba book 'vram>=24 price<0.3 sandbox>=namespaced' --sort price --limit 10
    ichiba book role=verifier 'trust>0.8' --json
    ichiba book --watch
    """
    text = _checked(where, ASK_KEYS)

    def show(found: dict[str, Any]) -> None:
        for ask in found["asks"]:
            terminal.record("ichiba.ask/1", ask)
        for offer in found["offers"]:
            terminal.record("ichiba.offer/1", offer)
        _asks(terminal, found)
        if not text:
            _offers(terminal, found)

    with terminal.client() as client:
        watch(terminal, lambda: client.book(text, sort=sort, limit=limit or 0), show, watching=watching)


@click.command()
@_picked
@common
def offers(terminal: Terminal, where: tuple[str, ...], sort: str, limit: int | None, watching: bool) -> None:
    """Show the offers of work this peer has heard of.

    For each that this peer would not bid on, the reason. The keys of a FILTER: price, operations, memory, vram, device,
    sandbox, mode, lock, budget, privacy, deadline (the time left), bids, refused, peer, age; how it is written:
    `ichiba book --help`.

    \b
    ichiba offers
    ichiba offers 'price>=0.001 memory<8 mode=exact' --sort -price
    ichiba offers refused=price --json
    ichiba offers 'deadline<2h device=gpu'
    ichiba offers bids=0 --watch
    """
    text = _checked(where, OFFER_KEYS)

    def show(found: dict[str, Any]) -> None:
        for offer in found["offers"]:
            terminal.record("ichiba.offer/1", offer)
        _offers(terminal, found)

    with terminal.client() as client:
        watch(terminal, lambda: client.offers(text, sort=sort, limit=limit or 0), show, watching=watching)


@click.command()
@_picked
@common
def trades(terminal: Terminal, where: tuple[str, ...], sort: str, limit: int | None, watching: bool) -> None:
    """Show what work was sold for: the co-signed agreements of this network.

    The newest first, from this peer's copy of the settlement log, and what those picked say of the price. In the
    statistics trades of the same two peers count once a day, and scripts and profiles not at all: theirs is a price of
    another thing. The keys of a FILTER: price, operations, total, mode, submitter, solver, mine, age; how it is
    written: `ichiba book --help`.

    \b
    ichiba trades --limit 20
    ichiba trades 'age<1d mine=no' --json
    ichiba trades --watch
    """
    text = _checked(where, TRADE_KEYS)

    def show(found: dict[str, Any]) -> None:
        for trade in found["trades"]:
            terminal.record("ichiba.trade/1", trade)
        terminal.record("ichiba.prints/1", found["statistics"])
        _trades(terminal, found)

    with terminal.client() as client:
        watch(terminal, lambda: client.trades(text, sort=sort, limit=limit or 0), show, watching=watching)


def _checked(words: tuple[str, ...], keys: Mapping[str, Key]) -> str:
    """The filter as one text, read once here: a wrong one needs no daemon to be refused. Raises BadFilter."""
    text = " ".join(words)
    read_filter(text, keys)
    return text


# --- tables ------------------------------------------------------------------------------------------------
def _asks(terminal: Terminal, found: dict[str, Any]) -> None:
    cards = any(_device(ask) != "cpu" for ask in found["asks"])  # 80 columns are few
    terminal.table(
        _title("asks", found),
        ("peer", "roles", ">cr/Gop", ">Gop/s", ">memory", *(["device"] if cards else []), "sandbox", ">stake", ">trust",
         "here"),
        [
            (
                ask["peer"][-8:],
                roles_of(ask["roles"]),
                credits_of(ask["unit_price"]),
                f"{ask['operations_per_second'] / 1e9:.2f}",
                size_of(ask["memory_bytes"]),
                *([_device(ask)] if cards else []),
                SANDBOX_LEVELS[ask["sandbox"]],
                credits_of(ask["stake_micro"]),
                f"{ask['trust_ppm'] / 10_000:.1f} %",
                "yes" if ask["connected"] else "no",
            )
            for ask in found["asks"]
        ],
    )  # fmt: skip


def _offers(terminal: Terminal, found: dict[str, Any]) -> None:
    terminal.table(
        _title("offers", found),
        ("offer", "by", "mode", ">Gop", ">cr/Gop", ">memory", ">stake", ">bids", "~no bid of this peer because"),
        [
            (
                short_id(offer["offer"]),
                offer["submitter"][-8:],
                offer.get("mode", ""),
                f"{offer['operations'] / 1e9:.1f}",
                credits_of(offer["unit_price_max"]),
                size_of(offer.get("memory_bytes", 0)),
                credits_of(offer["lock_micro"]),
                len(offer["bids"]),
                offer["no_bid"]["why"] if offer["no_bid"] else "",
            )
            for offer in found["offers"]
        ],
    )


def _trades(terminal: Terminal, found: dict[str, Any]) -> None:
    terminal.table(
        _title("trades", found),
        ("agreement", "mode", ">cr/Gop", ">Gop", ">credits", "submitter", "solver", ">ago", ""),
        [
            (
                short_id(trade["agreement"]),
                trade["mode"],
                credits_of(trade["unit_price"]),
                f"{trade['operations'] / 1e9:.1f}",
                credits_of(trade["price_micro"]),
                trade["submitter"][-8:],
                trade["solver"][-8:],
                span(trade["age_ns"]),
                "mine" if trade["mine"] else "",
            )
            for trade in found["trades"]
        ],
    )
    said = found["statistics"]
    if said["count"]:
        terminal.pairs(
            {
                "mean": f"{credits_of(said['vwap'])} credits per giga-operation, by volume",
                "low, high": f"{credits_of(said['low'])} to {credits_of(said['high'])}, half of them between "
                f"{credits_of(said['quartile'])} and {credits_of(said['upper_quartile'])}",
                "dispersion": f"{said['dispersion_permille'] / 10:g} % of the median between the quartiles",
                "sample": _sample(said),
            }
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _sample(said: dict[str, Any]) -> str:
    sample = f"{_count(said['raw'], 'trade')} of {_count(said['pairs'], 'pair')} of peers"
    words = f"{sample}, counted as {said['count']} (a pair once a day)"
    return words if said["enough"] else words + "; too few to lean on"


def _title(name: str, found: dict[str, Any]) -> str:
    matching, heard = found.get(f"{name}_matching"), found.get(f"{name}_heard")
    shown = len(found[name])
    if heard is None or (shown == matching == heard):
        return name
    return f"{name}, {shown} of {matching} that match, {heard} in all"


def _device(ask: dict[str, Any]) -> str:
    memory = ask.get("device_memory_bytes", 0)
    return f"{ask.get('device', 'cpu')} {size_of(memory)}" if memory else ask.get("device", "cpu")


def span(span_ns: int | None) -> str:
    """A time span for people; ? for one that nothing tells."""
    if span_ns is None:
        return "?"
    seconds = span_ns / 1e9
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def show_ladder(terminal: Terminal, found: dict[str, Any]) -> None:
    """Price against waiting, of a quote."""
    terminal.table(
        "price against waiting",
        (">cr/Gop limit", ">solvers", ">free", ">connected", ">wait", ">run", ">work", ">with checks, most"),
        [
            (
                credits_of(rung["unit_price_max"]),
                rung["solvers"],
                rung["free"],
                rung["connected"],
                span(rung["wait_ns"]),
                span(rung["run_ns"]),
                credits_of(rung["work_micro"]),
                credits_of(rung["budget_micro"]) if found["checks_included"] else "?",
            )
            for rung in found["rungs"]
        ],
    )
    if not found["checks_included"]:
        terminal.say("checking is paid from the budget too: leave about as much again for small jobs")


# --- price -------------------------------------------------------------------------------------------------
class _NoPower(IchibaError):
    """A floor was asked for and only half of what it needs is given."""

    code = "usage"
    exit_code = 2


@click.group()
def price() -> None:
    """Suggest what to pay, or what to ask."""


@price.command()
@click.argument("job", type=click.Path(exists=True, path_type=Path), required=False)
@click.option("--sell", is_flag=True, help="An ask for a solver; without it, a limit for a submitter.")
@click.option("--watts", type=click.IntRange(1, 10**7), help="With --sell: what the machine draws at work.")
@click.option("--kwh", type=CREDITS, help="With --sell: what a kilowatt-hour costs you, in credits.")
@click.option("--with-own", is_flag=True, help="Count this peer's own trades too.")
@common
def suggest(
    terminal: Terminal, job: Path | None, sell: bool, watts: int | None, kwh: int | None, with_own: bool
) -> None:
    """Suggest a price limit or, with --sell, an ask, and say what it rests on.

    From what work was sold for in the last week; with too few trades, from what solvers ask now, and it says so. A JOB
    leaves out solvers that could not run it. A solver's floor is the electricity of a giga-operation at the speed this
    peer has; nothing below it is suggested.

    \b
    ichiba price suggest
    ichiba price suggest examples/mlp
    ichiba price suggest --sell --watts 350 --kwh 0.30
    """
    if (watts is None) != (kwh is None):
        raise _NoPower(
            "a floor takes both --watts and --kwh",
            why="the cost of power is watts x time x the price of a kilowatt-hour",
            next_step="ichiba price suggest --sell --watts 350 --kwh 0.30",
        )
    needs: dict[str, int] = {"with_own": with_own}
    with terminal.client() as client:
        if job is not None:
            from peer.cli_submit import prepare_job

            prepared = prepare_job(terminal, client, job, bytes.fromhex(client.status()["network_id"]))
            needs |= {"memory_bytes": prepared.memory_bytes, "sandbox": prepared.job.sandbox}
        found = client.price(sell=sell, watts=watts or 0, kwh_micro=kwh or 0, **needs)
    terminal.record("ichiba.price/1", found)
    _suggested(terminal, found)


def _suggested(terminal: Terminal, found: dict[str, Any]) -> None:
    sell, said = found["side"] == "sell", found["statistics"]
    what = "ask" if sell else "a limit of"
    if found["basis"] == "none":
        terminal.say("nothing to go by: no trade of the last week and no ask of another solver is known here")
    else:
        basis = {
            "prints": "from what work was sold for",
            "asks": "from what solvers ask now: there are too few trades to go by",
            "power": "what the electricity costs: the market pays less than that, or nothing is known of it",
        }[found["basis"]]
        terminal.say(f"{what} {credits_of(found['unit_price'])} credits per giga-operation, {basis}")
        terminal.say(f"  reasonable: {credits_of(found['low'])} to {credits_of(found['high'])}")
    age = f", the newest {span(found['newest_age_ns'])} old" if said["count"] else ""
    terminal.say(
        f"  sample: {_count(said['raw'], 'trade')} of {_count(said['pairs'], 'pair')} in {span(found['within_ns'])}, "
        f"counted as {said['count']}{age} ({found['prints_min']} of {found['pairs_min']} pairs or more are enough); "
        f"beside it {_count(found['asks'], 'ask')}"
    )
    if sell and found["floor"] is None:
        terminal.note("the cost of power is not known: give --watts and --kwh, and nothing below it is suggested")
    elif sell:
        terminal.say(
            f"  power: {credits_of(found['floor'])} credits per giga-operation at "
            f"{found['operations_per_second'] / 1e9:.2f} giga-operations a second"
        )
    if sell and found["basis"] != "none" and found["own_unit_price"] != found["unit_price"]:
        terminal.say(f"  this peer asks {credits_of(found['own_unit_price'])}; change it with `ichiba up --price`")
