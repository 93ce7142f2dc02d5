"""Twenty peers on this machine and two hundred tiny jobs: each settles or says why, and what a trade costs the network.

Run `python benchmarks/swarm20.py [--peers 20] [--jobs 200] [--minutes 60] [--json]`. Every peer is a daemon of its own
(peer/lan.py) with its own key, disk and ledger; one submits, the others solve, verify and look for what was missed. A
job is 8 steps of a small network in 2 segments: it is the market, the messages and the money that are measured, not the
work, although most of the time goes into starting a sandbox for each. A trade is one deal that was agreed. Messages,
bytes and signatures are summed over all daemons, gossip counted once where it is published (libp2p relays it on), and
divided by trades. The last line with --json is one object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from peer.lan import Lan, members
from protocol.codec import encode
from protocol.network import load

JOB: Final = """name = "tiny"
model = "model.py:build"
data = "model.py:data"
seed = {seed}
steps = 8
steps_per_segment = 4
budget = "1.00"
price = 4000
{rest}"""
OPEN_AT_ONCE: Final = 64  # jobs that wait or run; a submitter's daemon takes 256
POLL_SECONDS: Final = 2.0
ENDED: Final = ("done", "failed", "cancelled")


def prepared_job(folder: Path, example: Path, network: bytes) -> Any:
    """The example's model, shrunk to 8 steps."""
    from worker.prepare import prepare

    shutil.copytree(example, folder)
    text = (folder / "job.toml").read_text()
    rest = text[text.index("[batch]") :].replace("warmup_steps = 20", "warmup_steps = 2")
    (folder / "job.toml").write_text(JOB.format(seed=1, rest=rest))
    return prepare(folder / "job.toml", network, lambda _: None)


def traffic(lan: Lan) -> Counter[str]:
    """What all daemons sent and checked since their start."""
    found: Counter[str] = Counter()
    for one in lan.peers:
        with one.client() as client:
            status = client.status()
        found.update({name: count for name, count in status["traffic"].items() if isinstance(count, int)})
        found.update({f"signatures-{name}": count for name, count in status["signature_checks"].items()})
    return found


def run(lan: Lan, jobs: int, minutes: float, example: Path) -> dict[str, Any]:
    """Submit all jobs, wait until each has ended, and count."""
    prepared = prepared_job(lan.path / "job", example, load(lan.network_file.read_text()).id)
    lan.start()
    lan.meet(seconds=300)
    idle, began = traffic(lan), time.monotonic()
    with lan.of("submitter").client() as client:
        program = client.put_blob(prepared.program)
        arrays = {array.name: client.put_blob(array.data) for array in prepared.arrays}
        task = encode(prepared.make_task(program=program, arrays=arrays))
        submitted = 0
        while True:
            listed = client.jobs()
            waiting = sum(one["state"] not in ENDED for one in listed)
            while submitted < jobs and waiting < OPEN_AT_ONCE:
                client.submit(
                    task=task, budget_micro=prepared.job.budget_micro, unit_price_max=prepared.job.unit_price_max,
                    base_root=prepared.base_root, checkpoint_bytes=prepared.checkpoint_bytes,
                    memory_bytes=prepared.memory_bytes,
                )  # fmt: skip
                submitted, waiting = submitted + 1, waiting + 1
            if (submitted == jobs and not waiting) or time.monotonic() > began + 60 * minutes:
                break
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - began
        listed = client.jobs()
        shown = [client.job(one["job"]) for one in listed]
    used = traffic(lan) - idle
    trades = sum(deal["state"] not in ("proposed", "declined") for one in shown for deal in one["deals"])
    sent = used["messages"] + used["gossip"]
    size = used["message-bytes"] + used["gossip-bytes"]
    return {
        "peers": len(lan.peers),
        "jobs": len(listed),
        "done": sum(one["state"] == "done" for one in listed),
        "settled_deals": sum(deal["state"] == "settled" for one in shown for deal in one["deals"]),
        "trades": trades,
        "declined": sum(deal["state"] == "declined" for one in shown for deal in one["deals"]),
        "without_end_or_reason": sum(one["state"] != "done" and not one["reason"] for one in listed),
        "reasons": dict(Counter(one["reason"] for one in listed if one["state"] != "done")),
        "seconds": round(seconds),
        "messages_per_trade": round(sent / max(1, trades), 1),
        "bytes_per_trade": round(size / max(1, trades)),
        "signatures_computed_per_trade": round(used["signatures-computed"] / max(1, trades), 1),
        "signatures_remembered_per_trade": round(used["signatures-remembered"] / max(1, trades), 1),
        "dropped": used["messages-dropped"],
    }


def main() -> None:
    """Run, print what was counted, and end every daemon."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60, help="at most; jobs not done by then are told")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args()
    example = Path(__file__).resolve().parent.parent / "examples" / "mlp"
    with tempfile.TemporaryDirectory() as folder:
        lan = Lan.create(Path(folder) / "swarm", members(options.peers))
        release = lan.guard(remove=False)
        try:
            found = run(lan, options.jobs, options.minutes, example)
        finally:
            lan.stop()
            release()
    for name, value in found.items():
        print(f"{name.replace('_', ' '):34} {value}")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
