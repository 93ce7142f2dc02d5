"""Honest and cheated tasks in the simulator: a part of benchmarks/verification.py.

Whole swarms of ten nodes, four of them notaries, on an event heap: the daemon's own node, a small real Program, real
games to the referee's leaf, under drawn loss, delay, duplication and crashes. Nobody may be slashed in an honest task;
of the cheated ones every sampled false segment must be found.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from verification_overhead import Part

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.adversaries.run import honest_seed
from tests.dispute_swarm import court, settle, told
from tests.swarm_scenario import submit

__all__ = ["add_options", "measure"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--honest", type=int, default=2000, help="honest tasks to simulate")
    parser.add_argument("--honest-tolerant", type=int, default=200, help="honest tolerant tasks to simulate")
    parser.add_argument("--cheated", type=int, default=200, help="cheated tasks to simulate")


def measure(options: argparse.Namespace) -> Part:
    """Simulate all tasks, each from its own seed."""
    harmed = 0
    for seed in range(options.honest):
        harmed += bool(honest_seed(seed))
        if seed % 100 == 99:
            print(f"{seed + 1} honest tasks, in {harmed} somebody lost", file=sys.stderr, flush=True)
    tolerant = sum(bool(honest_seed(seed, noise_ppb=1000)) for seed in range(options.honest_tolerant))
    missed, sampled = 0, 0
    for seed in range(options.cheated):
        swarm = court(seed, cheat="skip-step")
        swarm.run(seconds=3)
        settle(swarm, submit(swarm))
        # Its first segment is honest, the others are false; a deal of bob's whose draw holds one must end convicted.
        drawn = {data["deal"]: data["segments"] for _, data in told(swarm, "draw")}
        alice = swarm.peers["alice"].node
        assert alice is not None, "nothing crashes here"
        bob = swarm.peers["bob"].key.public
        for deal, segments in drawn.items():
            channel = alice.settler.channels[deal]
            if channel.agreement.solver == bob and any(segment > 0 for segment in segments):
                sampled += 1
                missed += channel.closed != "slashed"
    return Part(
        headline={"false_slashes": harmed + tolerant, "missed_in_sampled_segments": missed},
        details={
            "simulated": {
                "honest_tasks": options.honest,
                "honest_tolerant_tasks": options.honest_tolerant,
                "cheated_tasks": options.cheated,
                "sampled_frauds": sampled,
            }
        },
        lines=[
            f"{options.honest} honest tasks under drawn faults: in {harmed} somebody honest lost or the end was wrong; "
            f"of {options.honest_tolerant} tolerant ones in {tolerant}; "
            f"{sampled} sampled frauds, {missed} missed"
        ],
    )
