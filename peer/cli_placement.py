"""`ichiba placement`: which device would hold which part of a model too big for one, and what that costs. Asks no
daemon."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from peer.cli_output import Terminal, common, write_whole
from protocol.params import PLACEMENT_DEVICES_MAX

if TYPE_CHECKING:
    from market.placement import Plan, Planner

__all__ = ["placement"]

SECONDS_MAX: Final = 86_400.0
MOVES_MAX: Final = 10**12
_ROWS_SHOWN: Final = 40


@click.group()
def placement() -> None:
    """Plan which device holds which part of a model. Asks no daemon."""


@placement.command()
@click.option(
    "--links", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True,
    help="An .npz file with delay_ms and gbps (N x N), and what else is known of the devices.",
)  # fmt: skip
@click.option("--stages", type=click.IntRange(1, PLACEMENT_DEVICES_MAX), required=True, help="Pipeline stages, K.")
@click.option("--replicas", type=click.IntRange(1, PLACEMENT_DEVICES_MAX), required=True, help="Devices a stage, R.")
@click.option("--grad-gb", type=float, default=0.65, help="Gradients of one stage, gigabytes (0.65).")
@click.option("--act-gb", type=float, default=0.4712, help="Activations between two stages, gigabytes (0.4712).")
@click.option("--seconds", type=click.FloatRange(0.01, SECONDS_MAX), default=5.0, help="How long to search (5).")
@click.option(
    "--moves", type=click.IntRange(1, MOVES_MAX), help="Search so many moves instead: the same plan on every machine."
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Decides everything that is drawn (0).")
@click.option("--spare", is_flag=True, help="The file may hold more devices than are placed: choose among them.")
@click.option("--memory-gb", type=float, default=0.0, help="What a device must have, where memory_gb is known (0).")
@click.option("--credit-seconds", type=float, default=0.0, help="Seconds to wait rather than pay a credit (0).")
@click.option("--recovery-seconds", type=float, default=0.0, help="What the failure of a device costs (0).")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the plan into this SVG.")
@common
def plan(
    terminal: Terminal, links: Path, stages: int, replicas: int, grad_gb: float, act_gb: float, seconds: float,
    moves: int | None, seed: int, spare: bool, memory_gb: float, credit_seconds: float, recovery_seconds: float,
    plot: Path | None,
) -> None:  # fmt: skip
    """Place devices into stages and replicas so that an iteration communicates for as short a time as can be.

    The cost is the model of arXiv:2206.01288 in seconds an iteration. The file holds delay_ms (milliseconds) and gbps
    (Gbit/s), from each device (row) to each (column); a link that differs by direction costs the sum of both. It may
    hold work_s, memory_gb, price_credits and failure, one number a device. Ctrl-C gives the best plan so far.

    \b
    ichiba placement plan --links links.npz --stages 8 --replicas 8 --plot map.svg
    """
    from random import Random

    from market.placement import Planner, Traffic, lower_bound, model, random_mean
    from peer.link_file import read_links

    if math.isnan(seconds):
        raise click.BadParameter("nan is no number of seconds", param_hint="--seconds")
    start = time.perf_counter()
    measured, devices = read_links(
        links, memory_needed_gb=memory_gb, seconds_per_credit=credit_seconds, recovery_s=recovery_seconds
    )
    traffic = Traffic(gradient_gb=grad_gb, activation_gb=act_gb)
    problem = model(measured, stages=stages, replicas=replicas, traffic=traffic, devices=devices, spare=spare)
    planner = Planner(problem, seed=seed)
    _search(terminal, planner, moves=moves, seconds=max(0.01, seconds - (time.perf_counter() - start)))
    found = planner.plan()
    took = time.perf_counter() - start
    floor, drawn_mean = lower_bound(problem), random_mean(problem, Random(seed))
    if plot:
        from peer.placement_map import drawn

        title = f"{stages} stages of {replicas} devices"
        write_whole(plot, drawn(found, problem, title=title).encode())
    terminal.record(
        "ichiba.placement/1",
        {
            "cost": found.cost.total_s, "random_mean": drawn_mean, "greedy": found.greedy_s, "lower_bound": floor,
            "seconds": round(took, 3), "assignment": found.assignment, "exact": found.exact, "moves": found.moves,
            "seed": seed, "groups_s": found.cost.sync_s,
            "pipeline_s": found.cost.pipeline_s, "work_s": found.cost.work_s, "toll_s": found.cost.toll_s,
        },
    )  # fmt: skip
    _tell(terminal, found, floor=floor, drawn_mean=drawn_mean, took=took)


def _search(terminal: Terminal, planner: Planner, *, moves: int | None, seconds: float) -> None:
    """Run the search to the end of its budget, or to Ctrl-C, with a line of progress."""
    steps = planner.run(moves=moves) if moves else planner.run(seconds=seconds, clock=time.perf_counter)
    with terminal.progress() as live:
        bar = live.add_task("placing", total=1.0, note="") if live else None
        try:
            for step in steps:
                if live and bar is not None:
                    live.update(bar, completed=step.share, note=f"{step.best_s:.2f} s after {step.moves:,} moves")
        except KeyboardInterrupt:
            terminal.note("Stopped: this is the best plan so far.")


def _tell(terminal: Terminal, found: Plan, *, floor: float, drawn_mean: float, took: float) -> None:
    """The plan in a table and words."""
    cost = found.cost
    rows = [
        (stage, " ".join(map(str, devices)), f"{cost.boundaries_s[stage]:.2f}" if stage < len(cost.boundaries_s) else
        "") for stage, devices in enumerate(found.assignment[:_ROWS_SHOWN])
    ]
    terminal.table("Plan", (">stage", "~devices, one a pipeline", ">seconds to the next"), rows)
    if len(found.assignment) > _ROWS_SHOWN:
        terminal.say(f"... and {len(found.assignment) - _ROWS_SHOWN} more stages: --json has all.")
    extra = f", work {cost.work_s:.2f} s, price and failure {cost.toll_s:.2f} s" if cost.work_s + cost.toll_s else ""
    terminal.say(
        f"{cost.total_s:.2f} s an iteration: groups {cost.sync_s:.2f} s, pipeline {cost.pipeline_s:.2f} s{extra}."
    )
    best = "No plan is better" if found.exact else f"No plan is below {floor:.2f} s"
    terminal.say(f"{best}; the greedy plan costs {found.greedy_s:.2f} s, a random one {drawn_mean:.2f} s on average.")
    if not found.exact:
        terminal.say(f"{found.moves:,} moves in {took:.1f} s.")
