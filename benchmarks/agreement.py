"""From an offer gossiped to an agreement signed by both: how long five real peers take.

Run `python benchmarks/agreement.py [--jobs N]`. A submitter, two solvers, a verifier and a whistleblower run as
processes of their own on this machine; jobs are submitted one after another, each cancelled once it is agreed, and
the next waits until both solvers are free. The figure is `after_ns` of the submitter's "agreed" event. The baseline
is the matching round, which every offer waits for by design: what is above it is gossip, two signatures, commits to
two disks and two messages. The last line is JSON, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import msgspec

from peer.client import Client
from peer.lan import LAN_RULES, Lan, members
from protocol.codec import encode
from protocol.network import load
from protocol.program import program_id
from worker.prepare import Prepared, prepare

ROOT = Path(__file__).resolve().parent.parent
JOB_SECONDS_MAX = 60.0
# A cancelled deal closes by a claim without work: at once, or the bench would measure the claim window.
RULES = msgspec.structs.replace(LAN_RULES, claim_window_ms=200, lost_grace_ms=500)


def task_of(prepared: Prepared, client: Client) -> bytes:
    """The encoded task, its blobs in the submitter's store; the segments are longer than any job here lives."""
    program = client.put_blob(prepared.program)
    assert program == program_id(prepared.program)
    arrays = {array.name: client.put_blob(array.data) for array in prepared.arrays}
    task = prepared.make_task(program=program, arrays=arrays)
    return encode(msgspec.structs.replace(task, steps=1_000_000, steps_per_segment=1_000_000))


def one_job(prepared: Prepared, task: bytes, client: Client) -> float:
    """Submit, wait for the agreement, cancel, wait for the end; the milliseconds to the agreement."""
    job = client.submit(
        task=task,
        budget_micro=100_000_000,
        unit_price_max=2000,
        base_root=prepared.base_root,
        checkpoint_bytes=prepared.checkpoint_bytes,
        memory_bytes=prepared.memory_bytes,
    )["job"]
    after_ms = 0.0
    for event in client.events(job, follow=True):
        if event["kind"] == "agreed" and not after_ms:
            after_ms = event["after_ns"] / 1e6
            with Client(client.data_dir) as other:
                other.cancel(job)
        if event["kind"] in ("done", "failed", "cancelled"):
            return after_ms
    raise AssertionError("following ends with the job")


def wait_until_free(lan: Lan) -> None:
    """Return when no solver has a deal that could refuse the next job."""
    deadline = time.monotonic() + JOB_SECONDS_MAX
    for one in lan.peers:
        with one.client() as client:
            while client.status()["deals_active"]:
                assert time.monotonic() < deadline, f"{one.member.name} does not become free"
                time.sleep(0.05)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    return sorted(values)[max(0, -(-int(share * 100) * len(values) // 100) - 1)]


def measure(jobs: int) -> list[float]:
    """Milliseconds to the agreement, for each of `jobs` jobs."""
    with tempfile.TemporaryDirectory() as folder:
        lan = Lan.create(Path(folder) / "lan", members(5), rules=RULES)
        release = lan.guard(remove=False)
        try:
            lan.start()
            lan.meet(seconds=60)
            prepared = prepare(ROOT / "examples" / "mlp" / "job.toml", load(lan.network_file.read_text()).id)
            found = []
            with lan.of("submitter").client() as client:
                task = task_of(prepared, client)
                for _ in range(jobs):
                    found.append(one_job(prepared, task, client))
                    wait_until_free(lan)
            return found
        finally:
            lan.stop()
            release()


def main() -> None:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    found = measure(options.jobs)
    p50, p95 = percentile(found, 0.5), percentile(found, 0.95)
    print(f"{len(found)} jobs: p50 {p50:.0f} ms, p95 {p95:.0f} ms, of which the matching round is {RULES.round_ms} ms")
    print(
        json.dumps(
            {
                "benchmark": "agreement",
                "schema": "ichiba.benchmark.agreement/1",
                "machine": {
                    "processor": platform.machine(),
                    "cores": os.cpu_count(),
                    "python": platform.python_version(),
                    "load_before": round(load_before, 2),
                },
                "jobs": len(found),
                "p50_ms": round(p50, 1),
                "p95_ms": round(p95, 1),
                "max_ms": round(max(found), 1),
                "mean_ms": round(statistics.mean(found), 1),
                "baseline_round_ms": RULES.round_ms,
                "above_round_p50_ms": round(p50 - RULES.round_ms, 1),
                "round_share_p50": round(RULES.round_ms / p50, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
