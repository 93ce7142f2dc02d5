"""What a bench card costs to make and to check. Prints one JSON line last.

    python benchmarks/bench_card.py [--side 2048] [--seconds 30] [--threads 1]

make_s: the chain of a challenge, exact products by the fastest way here. check_s: the whole of protocol's check_work,
drawing the matrix included, by numpy on the same number of threads. ratio: check by make; the baseline is making,
which is also what checking by doing it again would cost.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--side", type=int, default=2048)
parser.add_argument("--seconds", type=float, default=30)
parser.add_argument("--threads", type=int, default=1)
options = parser.parse_args()
os.environ["OPENBLAS_NUM_THREADS"] = str(options.threads)  # read when numpy is imported

import torch  # noqa: E402

from protocol.bench_card import chain_operations, check_work  # noqa: E402
from protocol.records import BenchChallenge  # noqa: E402
from worker.bench import Memory, chain_result, measure  # noqa: E402

BLOCKS = 4096


def main() -> None:
    speed = measure(Path.cwd(), options.threads)
    links = max(1, round(speed.exact_per_second * options.seconds / chain_operations(options.side, 1)))
    challenge = BenchChallenge(
        network=bytes(32), challenger=bytes(32), peer=bytes(32), nonce=bytes(32), side=options.side, links=links,
        memory_blocks=0, window_ns=1, created_ns=0, expires_ns=1,
    )  # fmt: skip
    seed = os.urandom(32)
    start = time.perf_counter()
    evidence = chain_result(seed, options.side, links, threads=options.threads)
    make_s = time.perf_counter() - start
    checks = []
    for _ in range(3):
        start = time.perf_counter()
        check_work(challenge, seed, evidence, randbytes=os.urandom)
        checks.append(time.perf_counter() - start)
    start = time.perf_counter()
    Memory(seed, BLOCKS)
    fill_s = time.perf_counter() - start
    check_s = statistics.median(checks)
    print(
        json.dumps(
            {
                "benchmark": "bench_card",
                "machine": {
                    "processor": speed.figures.device,
                    "cores": speed.figures.cores,
                    "torch": torch.__version__,
                },
                "side": options.side,
                "links": links,
                "threads": options.threads,
                "make_s": round(make_s, 3),
                "check_s": round(check_s, 4),
                "ratio": round(check_s / make_s, 5),
                "exact_gops": round(chain_operations(options.side, links) / make_s / 1e9, 2),
                "float32_gops": round(speed.figures.float32_per_second / 1e9, 2),
                "memory_gb_per_s": round(speed.figures.memory_bytes_per_second / 1e9, 2),
                "fill_mb_per_s": round(BLOCKS * 8192 / fill_s / 1e6, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
