"""Every adversary of the catalogue over many seeds, or many honest jobs: `python -m tests.adversaries.run --seeds 100`.

`--honest N` runs N honest jobs under drawn faults instead, and counts what any honest peer lost. Prints a table and the
seeds that went wrong, each of which replays alone; exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

from peer.simulator import Faults, InvariantBroken
from tests.adversaries.judge import NAMED, control_of, faults_of, honest_troubles, outcome_of, troubles
from tests.adversaries.stage import play, stage_of
from tests.dispute_swarm import CALM

__all__ = ["honest_seed", "seed_of"]


def seed_of(name: str, seed: int) -> list[str]:
    """What went wrong with one adversary and one seed."""
    calm = faults_of(seed) is CALM
    try:
        return troubles(NAMED[name], outcome_of(name, seed), control_of(name, seed) if calm else None)
    except InvariantBroken as broken:
        return [str(broken)]


def honest_seed(seed: int, *, noise_ppb: int = 0) -> list[str]:
    """What went wrong with one honest job under drawn faults; half of them have every deal audited. noise_ppb: of a
    tolerant job."""
    try:
        audited = 1000 * (seed % 2)
        stage = stage_of(seed, {}, Faults.drawn_from(seed), noise_ppb=noise_ppb, audit_permille=audited)
        return honest_troubles(play(stage))
    except InvariantBroken as broken:
        return [str(broken)]


def _each(pool: ProcessPoolExecutor, label: str, found: Iterable[list[str]]) -> int:
    bad = 0
    started, count = time.monotonic(), 0
    for seed, trouble in enumerate(found):
        count += 1
        if trouble:
            bad += 1
            print(f"  seed {seed}: {'; '.join(trouble)}", flush=True)
    print(f"{label:45} {count - bad:5} of {count} as they must, {time.monotonic() - started:6.1f} s", flush=True)
    return bad


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--honest", type=int, default=0)
    parser.add_argument("--only", default="", help="adversaries with this in their name")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    with ProcessPoolExecutor(asked.workers) as pool:
        if asked.honest:
            bad = _each(pool, "honest jobs under drawn faults", pool.map(honest_seed, range(asked.honest)))
        else:
            bad = sum(
                _each(pool, name, pool.map(seed_of, [name] * asked.seeds, range(asked.seeds)))
                for name in NAMED
                if asked.only in name
            )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
