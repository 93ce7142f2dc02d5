"""What a daemon costs while nothing happens: processor time and memory, against an idle Python with trio.

Run `python benchmarks/idle.py [--seconds N]`. Five daemons on this machine, each connected to the four others, and
beside them a bare `trio.run(trio.sleep_forever)`; all are read from /proc over the same seconds. A warm worker, if
a daemon keeps one, is counted by itself. The last line is JSON: percent of one core, MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from peer.lan import Lan, descendants, members

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time used so far by `pids`, user and system."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def resident_mib(pids: Iterable[int]) -> float:
    """Memory resident in `pids`; pages they share are counted in each."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * PAGE / 2**20


def main() -> None:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--settle", type=float, default=20.0, help="seconds after the start that are not measured")
    options = parser.parse_args()
    bare = subprocess.Popen([sys.executable, "-c", "import trio; trio.run(trio.sleep_forever)"])
    with tempfile.TemporaryDirectory() as folder:
        lan = Lan.create(Path(folder) / "lan", members(5))
        release = lan.guard(remove=False)
        try:
            lan.start()
            lan.meet(seconds=60)
            time.sleep(options.settle)
            groups = {one.member.name: [one.pid] for one in lan.peers} | {"bare trio": [bare.pid]}
            for one in lan.peers:
                workers = sorted(pid for pid, _ in descendants([one.pid]))
                if workers:
                    groups[f"{one.member.name}, its warm worker"] = workers
            before = {name: cpu_seconds(pids) for name, pids in groups.items()}
            started = time.monotonic()
            time.sleep(options.seconds)
            passed = time.monotonic() - started
            figures = {
                name: {
                    "cpu_percent": round(100 * (cpu_seconds(pids) - before[name]) / passed, 3),
                    "rss_mib": round(resident_mib(pids), 1),
                }
                for name, pids in groups.items()
            }
        finally:
            lan.stop()
            release()
            bare.kill()
            bare.wait()
    for name, row in figures.items():
        print(f"{name:32} {row['cpu_percent']:7.3f} % of a core {row['rss_mib']:8.1f} MiB")
    print(
        json.dumps(
            {
                "benchmark": "idle",
                "schema": "ichiba.benchmark.idle/1",
                "machine": {
                    "processor": platform.machine(),
                    "cores": os.cpu_count(),
                    "python": platform.python_version(),
                    "load": round(os.getloadavg()[0], 2),
                },
                "seconds": round(passed, 1),
                "peers_connected": 4,
                "processes": figures,
                "baseline": figures["bare trio"],
            }
        )
    )


if __name__ == "__main__":
    main()
