"""What durability costs: commits one by one against groups, and opening a store that has grown.

Run `python benchmarks/store.py [DIRECTORY] [--batches N]`; DIRECTORY should be on the disk the daemon will use (the
default is the system's folder for temporary files). A batch is what one receipt costs the daemon: a voucher of 300
bytes and a log line; every tenth also moves money. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from market import ledger as money
from peer.store import Batch, Event, Store
from protocol.codec import blake

NETWORK, PEER = blake("benchmark", b"network"), blake("benchmark", b"peer")
GROUP = 100
ROUNDS = 3


def batches(count: int, salt: bytes) -> list[Batch]:
    """`count` batches no other salt makes."""
    made = []
    for n in range(count):
        key = blake("benchmark/batch", salt, n.to_bytes(8, "little"))
        entries = () if n % 10 else (money.deposit(key, PEER, 1_000),)
        made.append(Batch((("vouchers", key, bytes(300)),), entries, (Event("job", n, "segment done"),)))
    return made


def commits_per_second(store: Store, work: list[Batch], group: int) -> float:
    """Batches made durable per second when `group` of them share a transaction."""
    start = time.perf_counter()
    for first in range(0, len(work), group):
        store.commit(work[first : first + group])
    return len(work) / (time.perf_counter() - start)


def opening_seconds(directory: Path, entries: int) -> float:
    """Seconds to open and verify a store of `entries` journal entries and as many key-value rows."""
    with Store.open(directory, NETWORK, PEER) as store:
        for first in range(0, entries, 1_000):
            group = []
            for n in range(first, first + 1_000):
                key = blake("benchmark/entry", n.to_bytes(8, "little"))
                group.append(Batch((("vouchers", key, bytes(300)),), (money.deposit(key, PEER, 1_000),)))
            store.commit(group)
    start = time.perf_counter()
    with Store.open(directory, NETWORK, PEER) as store:
        assert store.ledger().total_micro() == entries * 1_000
    return time.perf_counter() - start


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=None)
    parser.add_argument("--batches", type=int, default=2_000, help="per measurement")
    parser.add_argument("--entries", type=int, default=10_000, help="journal entries of the store that is opened")
    options = parser.parse_args()
    single: list[float] = []
    grouped: list[float] = []
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        with Store.open(Path(folder) / "commits", NETWORK, PEER) as store:
            # Interleaved, so that a change of the machine's load falls on both.
            for round_number in range(ROUNDS):
                for rates, group in ((single, 1), (grouped, GROUP)):
                    work = batches(options.batches, b"%d of %d" % (round_number, group))
                    rates.append(commits_per_second(store, work, group))
        opening_s = opening_seconds(Path(folder) / "opening", options.entries)
    figures = {
        "benchmark": "store",
        "batches": options.batches,
        "single_per_s": round(statistics.median(single)),
        "grouped_per_s": round(statistics.median(grouped)),
        "group": GROUP,
        "ratio": round(statistics.median(grouped) / statistics.median(single), 1),
        "opening_entries": options.entries,
        "opening_s": round(opening_s, 2),
        "opening_entries_per_s": round(options.entries / opening_s),
    }
    print(f"one commit each:  {figures['single_per_s']:>8} batches/s")
    print(f"groups of {GROUP}:    {figures['grouped_per_s']:>8} batches/s, {figures['ratio']} times as many")
    print(f"open and verify:  {figures['opening_entries_per_s']:>8} entries/s")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
