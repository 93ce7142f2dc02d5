"""Training across peers: throughput on slow links, failures, placement in fact, and the cost of checks.

    python benchmarks/parallel.py [--json] [--only NAME]... [--repeats N]

Every peer is a process with a real host, sandbox and links; a shaper makes the links slow. NAME is `throughput` (with
bytes on the wire and checks), `kill`, `join`, `placement` or `churn`; churn takes twelve minutes and runs only if it is
asked for. The last line is JSON, its keys the words of the bars; a figure that was not asked for is null. All peers
share this machine's cores, so while one waits for its links another computes: with a machine each, waiting costs more
than here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:1] = [str(HERE.parent), str(HERE)]  # or market.py, beside this file, is taken for the package

import parallel_faults  # noqa: E402
import parallel_placement  # noqa: E402
import parallel_throughput  # noqa: E402
from verification_overhead import processor  # noqa: E402

PARTS = ("throughput", "kill", "join", "placement", "churn")
PLACEMENT_REPEATS = 3
HEADLINE = (
    "throughput_100mbps_50ms_of_unshaped",
    "throughput_10mbps_50ms_of_unshaped",
    "throughput_10mbps_50ms_over_uncompressed",
    "throughput_10mbps_50ms_over_uncompressed_sync_each_step",
    "kill_next_step_seconds",
    "kill_steps_lost",
    "kill_final_loss_ratio",
    "join_10m_parameters_100mbps_seconds",
    "churn_throughput_kept",
    "placement_plan_over_median_random",
    "placement_rank_correlation",
    "verification_overhead_of_a_parallel_job",
)


def measure(name: str, folder: Path, options: argparse.Namespace, say: Any) -> dict[str, Any]:
    """One part."""
    plain: dict[str, Any] = {"tiny": options.tiny, "say": say}
    if name == "throughput":
        sizes = {"local_steps": options.local_steps, "micro_batches": options.micro_batches}
        return parallel_throughput.measure(folder, repeats=options.repeats, **sizes, **plain)
    if name == "placement":
        return parallel_placement.measure(folder, repeats=min(PLACEMENT_REPEATS, options.repeats), **plain)
    if name == "churn":
        return parallel_faults.churn(folder, minutes=options.minutes, **plain)
    return {"kill": parallel_faults.kill, "join": parallel_faults.join}[name](folder, **plain)


def main() -> None:
    """Measure the parts asked for and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this part; may be repeated")
    parser.add_argument("--repeats", type=int, default=5, help="of each figure of throughput")
    parser.add_argument("--local-steps", type=int, default=parallel_throughput.LOCAL_STEPS, help="of throughput")
    parser.add_argument("--micro-batches", type=int, default=parallel_throughput.MICRO_BATCHES, help="of throughput")
    parser.add_argument("--minutes", type=int, default=parallel_faults.CHURN_MINUTES, help="of churn")
    parser.add_argument("--tiny", action="store_true", help="a model too small for the bars, to try the benchmark")
    parser.add_argument("--folder", type=Path, help="where scratch files go, some GB")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, load = time.monotonic(), os.getloadavg()[0]

    def say(words: str) -> None:
        print(f"[{time.monotonic() - began:6.0f} s, load {os.getloadavg()[0]:.1f}] {words}", file=sys.stderr
              if options.json else sys.stdout, flush=True)  # fmt: skip

    figures: dict[str, Any] = dict.fromkeys(HEADLINE)
    for name in options.only or [part for part in PARTS if part != "churn"]:
        with tempfile.TemporaryDirectory(prefix="ichiba-parallel-", dir=options.folder) as folder:
            figures |= measure(name, Path(folder), options, say)
    machine = {
        "processor": processor(), "cores": os.cpu_count(), "system": platform.platform(),
        "python": platform.python_version(), "torch": torch.__version__, "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
    }  # fmt: skip
    if not options.json:
        for key in HEADLINE:
            print(f"{key:60} {figures[key]}")
    figures |= {"tiny": options.tiny, "machine": machine}
    print(json.dumps({"benchmark": "parallel", "schema": "ichiba.benchmark.parallel/1", **figures}))


if __name__ == "__main__":
    main()
