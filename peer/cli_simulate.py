"""`ichiba simulate`: what a market of thousands of strangers comes to under this network's rules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from peer.cli_output import Terminal, common

if TYPE_CHECKING:
    from market.economy import Outcome, Settings

__all__ = ["simulate"]

PLOTTED_PERMILLE: Final = (500, 600, 700, 800, 850, 900, 950, 1000, 1050, 1100, 1150, 1200, 1300, 1500, 1750, 2000)
PEERS_MAX: Final = 100_000
ROUNDS_MAX: Final = 10_000


@click.group()
def simulate() -> None:
    """Simulate the market before trusting it with money. Asks no daemon."""


@simulate.command()
@click.option("--peers", type=click.IntRange(100, PEERS_MAX), default=4000, help="Peers in all (4000).")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Decides everything that is drawn (0).")
@click.option("--rounds", type=click.IntRange(1, ROUNDS_MAX), default=150, help="Rounds of 20 deals a solver (150).")
@click.option(
    "--stake-permille", type=click.IntRange(0, 100_000), help="Stake, of the least needed; else the rules' margin."
)
@click.option(
    "--checking-permille", type=click.IntRange(0, 100_000), help="What checking brings, of its cost; else the rules'."
)
@click.option("--forced-ppm", type=click.IntRange(1, 1_000_000), help="Deals with an ordered error; else the rules'.")
@click.option("--calm", is_flag=True, help="Start with honest solvers, and half of the verifiers lazy.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw honesty over stake into this SVG.")
@common
def economy(
    terminal: Terminal, peers: int, seed: int, rounds: int, stake_permille: int | None, checking_permille: int | None,
    forced_ppm: int | None, calm: bool, plot: Path | None,
) -> None:  # fmt: skip
    """Let strategies compete in a market, and show which are left.

    Solvers, verifiers and whistleblowers of honest and dishonest kinds do deals under the network's default rules and
    copy what pays. docs/economics.md says what is modelled, and what is not.

    \b
    ichiba simulate economy --seed 1 --stake-permille 900
    """
    from dataclasses import replace

    from market import economy as market
    from protocol.network import Rules

    rules = Rules()
    settings = market.Settings(
        peers=peers,
        rounds=rounds,
        seed=seed,
        stake_permille=rules.lock_margin_permille if stake_permille is None else stake_permille,
        checking_permille=rules.jackpot_permille if checking_permille is None else checking_permille,
        forced_ppm=rules.forced_ppm if forced_ppm is None else forced_ppm,
        solver_mix=market.CALM_SOLVERS if calm else market.SOLVER_MIX,
        verifier_mix=market.CALM_VERIFIERS if calm else market.VERIFIER_MIX,
        rules=rules,
    )
    runs = 1 + (len(PLOTTED_PERMILLE) if plot else 0)
    with terminal.progress() as live:
        bar = live.add_task("playing", total=runs * rounds, note="") if live else None

        def played(_: int) -> None:
            if live and bar is not None:
                live.advance(bar)

        found = market.Economy(settings).play(played)
        points = [
            (permille, market.Economy(replace(settings, stake_permille=permille)).play(played).solvers["honest"])
            for permille in (PLOTTED_PERMILLE if plot else ())
        ]
    if plot:
        plot.write_text(_drawn(points, peers=peers, seed=seed))
    terminal.record(
        "ichiba.economy/1",
        {
            "peers": peers, "seed": seed, "rounds": rounds, "stake_permille": settings.stake_permille,
            "checking_permille": settings.checking_permille, "forced_ppm": settings.forced_ppm, "calm": calm,
            "solvers": found.solvers, "verifiers": found.verifiers, "whistleblowers": found.whistleblowers,
            "overhead": round(found.overhead, 5), "false_deals_paid": round(found.false_deals_paid, 5),
            "honest_path": [[round(one, 4) for one in both] for both in found.path],
            "plotted": points,
        },
    )  # fmt: skip
    _tell(terminal, settings, found)


def _tell(terminal: Terminal, settings: Settings, found: Outcome) -> None:
    """The result in tables and words."""
    for title, mix, shares in (
        ("Solvers", settings.solver_mix, found.solvers),
        ("Verifiers", settings.verifier_mix, found.verifiers),
    ):
        rows = [(name, f"{a:.1%}", f"{b:.1%}") for a, (name, b) in zip(mix, shares.items(), strict=True)]
        terminal.table(title, ("strategy", ">at the start", ">at the end"), rows)
    ends, began = found.solvers["honest"], settings.solver_mix[0]
    what = "Honesty spread" if ends > began or ends == 1 else "Cheating spread" if ends < began else "Nothing changed"
    terminal.say(f"{what} among solvers that lock {settings.stake_permille / 1000:g} times the least stake.")
    terminal.say(f"{found.whistleblowers} whistleblowers found it worth their while to look of themselves.")
    terminal.say(f"Re-executed in the last round: {found.overhead:.1%} of the work.")
    terminal.say(f"Paid in the last round though false: {found.false_deals_paid:.1%} of deals.")


def _drawn(points: list[tuple[int, float]], *, peers: int, seed: int) -> str:
    """The honest share of solvers at the end over the multiple of the least stake, as an SVG picture."""
    wide, high, left, top = 560, 260, 60, 40
    most = max(permille for permille, _ in points)
    title = f"Honest solvers at the end, of {peers} peers (seed {seed})"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide + left + 30}" height="{high + 100}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="{top - 14}" font-size="14">{title}</text>',
    ]
    for tick in range(5):
        y = top + high - high * tick / 4
        parts.append(f'<line x1="{left}" x2="{left + wide}" y1="{y}" y2="{y}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{25 * tick} %</text>')
    for permille in range(0, most + 1, 250):
        x = left + wide * permille / most
        parts.append(f'<text x="{x:.1f}" y="{top + high + 18}" text-anchor="middle">{permille / 1000:g}</text>')
    needed = left + wide * 1000 / most
    parts.append(f'<line x1="{needed:.1f}" x2="{needed:.1f}" y1="{top}" y2="{top + high}" stroke="#d08a1d"/>')
    parts.append(f'<text x="{needed + 6:.1f}" y="{top + high - 8}" fill="#d08a1d">least stake of the inequality</text>')
    places = [(left + wide * permille / most, top + high * (1 - share)) for permille, share in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline points="{path}" fill="none" stroke="#1d6fd0" stroke-width="1.6"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#1d6fd0"/>' for x, y in places]
    middle = left + wide / 2
    parts.append(
        f'<text x="{middle}" y="{top + high + 40}" text-anchor="middle">stake, in multiples of the least</text>'
    )
    return "\n".join([*parts, "</svg>\n"])
