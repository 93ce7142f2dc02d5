"""Placement in fact, of benchmarks/parallel.py: what plans cost by the model, and what they take.

Eight units, four stages of two replicas, on links between three regions. There is little to compute, and activations
and gradients are large: it is the model of communication that is tested, on cores that all units share. A plan says
which device has which unit; here a process stays with its unit and its links get the shapes of the device's, which is
the same. One micro-batch a step and float32, as the model has it; replicas average in each step. A random plan has
random groups in a random order; within them pipelines are paired as the planner pairs them, as the model's cost has it.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from parallel_fleet import Fleet, Process, Run
from parallel_job import RAW, Job, crossing_bytes, perceptron

from market.placement import Links, Planner, Problem, Traffic, cost_of, model
from market.placement_cost import bottleneck
from protocol.keys import peer_name

STAGES, REPLICAS = 4, 2
REGIONS = (0, 0, 0, 1, 1, 1, 2, 2)
DELAY_MS = ((3, 25, 90), (25, 3, 60), (90, 60, 3))  # one way
MBPS = ((150, 40, 12), (40, 150, 20), (12, 20, 150))
ROWS, WIDTH = 256, 256  # activations and gradients of 256 KiB
TINY_ROWS, TINY_WIDTH = 64, 64
STEPS_PER_PLAN = 2
RANDOM_PLANS = 11
SEED = 5

Table = np.ndarray[Any, np.dtype[np.int64]]


def links() -> Links:
    """Between the devices, each pair a little other than its regions say."""
    rng = np.random.default_rng(SEED)
    jitter = np.exp(rng.normal(0, 0.25, (len(REGIONS),) * 2))
    jitter = np.sqrt(jitter * jitter.T)
    where = np.ix_(REGIONS, REGIONS)
    return Links(np.array(DELAY_MS, float)[where] * jitter, np.array(MBPS, float)[where] / 1e3 / jitter)


def perceptron_job(rounds: int, *, tiny: bool) -> Job:
    """A segment for each plan, and one to begin with."""
    rows, width = (TINY_ROWS, TINY_WIDTH) if tiny else (ROWS, WIDTH)
    rng = np.random.default_rng(SEED)
    arrays = {name: rng.standard_normal((rows, width)).astype("<f4") for name in "xy"}
    return Job(
        "placed", perceptron(rows=rows, width=width, layers=STAGES), arrays, STAGES, REPLICAS, 1, "step", RAW,
        steps=(rounds + 1) * STEPS_PER_PLAN, steps_per_segment=STEPS_PER_PLAN,
    )  # fmt: skip


def place(processes: list[Process], measured: Links, table: Table) -> None:
    """Give the link between two units the shape of the link between the devices that a plan puts them on."""
    devices = table.ravel()  # by the number of the unit: stage * replicas + replica
    for unit, process in enumerate(processes):
        words = ";".join(
            f"{peer_name(bytes.fromhex(other.peer))}={measured.delay_ms[devices[unit], devices[there]]:.3f}ms,"
            f"{measured.gbps[devices[unit], devices[there]] * 1e3:.3f}mbit"
            for there, other in enumerate(processes)
            if there != unit
        )
        process.tell("shape", words=words)


def paired(problem: Problem, table: Table) -> Table:
    """The same groups with their devices in the columns of pipelines."""
    rows = [table[0]]
    for group in table[1:]:
        _, order = bottleneck(problem.hop[np.ix_(rows[-1], group)])
        rows.append(group[order])
    return np.array(rows)


def ranks(values: list[float]) -> Table:
    """The place of each in the order of all."""
    return np.argsort(np.argsort(values))


def measure(folder: Path, *, repeats: int, tiny: bool, say: Any) -> dict[str, Any]:
    """The plan of market/placement against random ones, each in its turn."""
    job = perceptron_job((RANDOM_PLANS + 1) * repeats, tiny=tiny)
    measured, rng = links(), Random(SEED)
    with Fleet(folder) as fleet:
        processes = fleet.start(STAGES * REPLICAS)
        run = fleet.launch(job, processes)
        activation, gradient = crossing_bytes(run.units)
        traffic = Traffic(gradient_gb=gradient / 1e9, activation_gb=activation / 1e9)
        problem = model(measured, stages=STAGES, replicas=REPLICAS, traffic=traffic)
        planner = Planner(problem, seed=SEED)
        for _ in planner.run(seconds=1.0, clock=time.perf_counter):
            pass
        plans = [np.array(planner.plan().assignment)]
        every = list(range(STAGES * REPLICAS))
        drawn = [np.array(rng.sample(every, len(every))).reshape(STAGES, REPLICAS) for _ in range(RANDOM_PLANS)]
        plans += [paired(problem, table) for table in drawn]
        modelled = [cost_of(problem, plan).total_s for plan in plans]
        fleet.segment(run, 0)
        took: list[list[float]] = [[] for _ in plans]
        for turn in range(repeats):
            for number in rng.sample(range(len(plans)), len(plans)):
                took[number].append(_step_seconds(fleet, run, processes, measured, plans[number]))
            say(f"turn {turn + 1}: the plan {took[0][-1]:.2f} s a step, by the model {modelled[0]:.2f} s")
    seconds = [statistics.median(times) for times in took]
    ratio = statistics.median(seconds[1:]) / seconds[0]
    rank = float(np.corrcoef(ranks(modelled), ranks(seconds))[0, 1])
    return {
        "placement_plan_over_median_random": round(ratio, 3),
        "placement_rank_correlation": round(rank, 3),
        "placement": {
            "units": STAGES * REPLICAS, "repeats": repeats, "activation_bytes": activation, "gradient_bytes": gradient,
            "modelled_seconds": [round(one, 3) for one in modelled], "measured_seconds": [round(s, 3) for s in seconds],
            "modelled_ratio": round(statistics.median(modelled[1:]) / modelled[0], 3), "load": os.getloadavg()[0],
        },
    }  # fmt: skip


def _step_seconds(fleet: Fleet, run: Run, processes: list[Process], measured: Links, plan: Table) -> float:
    """Of one plan, by one segment."""
    first = len(fleet.heard)
    place(processes, measured, plan)
    fleet.until(
        lambda: sum(event["kind"] == "shaped" for event in fleet.heard[first:]) == len(processes), "links are shaped"
    )
    segment = max(number for number, ends in run.ends.items() if len(ends) == len(processes)) + 1
    return fleet.segment(run, segment) / STEPS_PER_PLAN
