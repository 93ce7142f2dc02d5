"""A peer that dies on command: deposits, opens, vouchers and ends of agreements through a real Store.

Run as `crash_child.py` it is a nursery: each line of JSON on standard input is one life, lived in a forked process
of its own (so a life costs milliseconds, not an import) and reported as one line of JSON. A life opens the store,
repeats what the one before may have left undone, works through the script, and appends each message to `sent` after
the commit that explains it. `die_at` is the write point it dies at; a life that reaches its end reports how many
there were. `file_bytes_max` has the kernel kill it in the middle of the write that would make a file longer.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from market import ledger as money
from market.ledger import Entry
from peer.store import Batch, Event, Store
from protocol.codec import blake

NETWORK = blake("crash", b"network")
SUBMITTER, SOLVER, CHECKER = (blake("crash", name) for name in (b"submitter", b"solver", b"checker"))
NEVER = 0


def agreement(n: int) -> bytes:
    """The id of agreement n."""
    return blake("crash/agreement", b"%d" % n)


def closing_entry(n: int) -> Entry:
    """The end of agreement n: a slash for every odd one."""
    terms = {"channel_micro": 101, "lock_micro": 33}
    if n % 2:
        return money.slash(agreement(n), submitter=SUBMITTER, solver=SOLVER, checker_costs=((CHECKER, 4),), **terms)
    return money.settle(
        agreement(n), submitter=SUBMITTER, solver=SOLVER, paid_micro=60 + n, fees=((CHECKER, 2),), **terms
    )


def script() -> list[list[Batch]]:
    """Groups of batches, one group a commit: every kind of row is written, changed and deleted in it."""
    deposits = (
        money.deposit(blake("crash", b"d1"), SUBMITTER, 1_000),
        money.deposit(blake("crash", b"d2"), SOLVER, 5, 200),
    )
    groups = [[Batch(entries=deposits)]]
    for n in range(2):
        opening = money.open_channel(agreement(n), submitter=SUBMITTER, budget_micro=101, solver=SOLVER, lock_micro=33)
        vouchers = [
            Batch(puts=(("vouchers", agreement(n), b"%d" % amount),), events=(Event("job", amount, "voucher"),))
            for amount in (20, 40, 60)
        ]
        ending = Batch(entries=(closing_entry(n),), puts=(("vouchers", agreement(n), None),))
        groups += [[Batch(entries=(opening,)), vouchers[0]], vouchers[1:], [ending]]
    return groups


def message(step: int) -> bytes:
    """What the peer tells the world after commit `step`: it fits one write."""
    return b"%04d %s\n" % (step, blake("crash/message", b"%d" % step).hex().encode())


def live(directory: Path, sent: Path, probe: Callable[[str], None]) -> None:
    """One life from opening the store to the last message."""
    store = Store.open(directory, NETWORK, SUBMITTER, probe=probe)
    steps = script()
    done = int(store.get("progress", b"step") or b"0")
    descriptor = os.open(sent, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def send(step: int) -> None:
        probe("before send")
        os.write(descriptor, message(step))
        probe("after send")

    if done:
        # The last commit may have been made by a life that did not know it, and its message may not have left.
        store.commit(steps[done - 1])
        send(done)
    for step in range(done + 1, len(steps) + 1):
        note = Batch(puts=(("progress", b"step", b"%d" % step), ("outbox", b"%04d" % step, message(step))))
        store.commit([*steps[step - 1], note])
        send(step)
    probe("before close")
    store.close()


def counter(die_at: int, how: str) -> tuple[Callable[[str], None], list[str]]:
    """A probe that ends the process at write point `die_at` (from 1), and the points it has seen."""
    seen: list[str] = []

    def probe(point: str) -> None:
        seen.append(point)
        if len(seen) == die_at:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(9)

    return probe, seen


def be_born(order: dict[str, object]) -> int:
    """Live as ordered in a new process; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        limit = int(str(order.get("file_bytes_max", 0)))
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and then the write would only fail
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        probe, seen = counter(int(str(order.get("die_at", NEVER))), str(order.get("how", "kill")))
        live(Path(str(order["directory"])), Path(str(order["sent"])), probe)
        Path(str(order["report"])).write_text(json.dumps(seen))
        os._exit(0)
    finally:
        # Reached by an exception only: a life must never return into the nursery's loop.
        traceback.print_exc()
        os._exit(1)


def main() -> None:
    """Serve lives until standard input ends."""
    for line in sys.stdin:
        pid = be_born(json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
