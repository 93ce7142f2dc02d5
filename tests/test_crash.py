"""Killed at every write point, a peer loses nothing, pays nothing twice and never says what it did not keep.

The write points are counted, not listed: an undisturbed life reports how many there are, and each is then the last
of another life. A second sweep dies inside SQLite's own writes, at every frame of its log, by the kernel's hand.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from market.ledger import BURNED, Account, Ledger
from peer.store import Store
from peer.store_schema import DATABASE_NAME
from tests.crash_child import CHECKER, NETWORK, SOLVER, SUBMITTER, message, script

STEPS = len(script())
Digest = tuple[object, ...]


class Peer:
    """One peer's data directory, what it sent, and the nursery its lives come from."""

    def __init__(self, root: Path, nursery: subprocess.Popen[str]) -> None:
        self.root, self.nursery = root, nursery
        self.directory, self.sent_file, self.report = root / "data", root / "sent", root / "report"

    def reset(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.sent_file.unlink(missing_ok=True)

    def live(self, **order: object) -> int:
        """One life; returns its exit code, negative for a signal."""
        paths = {"directory": str(self.directory), "sent": str(self.sent_file), "report": str(self.report)}
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        self.nursery.stdin.write(json.dumps({**paths, **order}) + "\n")
        self.nursery.stdin.flush()
        return int(json.loads(self.nursery.stdout.readline())["code"])

    def sent(self) -> list[bytes]:
        return self.sent_file.read_bytes().splitlines(keepends=True) if self.sent_file.exists() else []

    def state(self, directory: Path) -> tuple[list[bytes], Digest]:
        """The outbox and a digest of everything else, read through the checks of a fresh opening."""
        with Store.open(directory, NETWORK, SUBMITTER) as store:
            ledger = store.ledger()
            ledger.check()
            assert ledger.total_micro() in (0, 1_205), "deposits are all there or none is"
            digest = (
                tuple(sorted(ledger.balances().items())),
                tuple(entry.digest() for _, entry in store.entries()),
                tuple(store.rows("vouchers")),
                store.get("progress", b"step"),
            )
            return [value for _, value in store.rows("outbox")], digest

    def inspect_the_dead(self) -> None:
        """Right after a death: what was sent is in the store, and the store is a whole prefix of the script.

        Looked at in a copy, so that the next life finds the very files the dead one left.
        """
        copy = self.root / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        if self.directory.exists():
            shutil.copytree(self.directory, copy)
        outbox, digest = self.state(copy)
        sent = self.sent()
        assert outbox == [message(step) for step in range(1, len(outbox) + 1)]
        assert digest[3] == (b"%d" % len(outbox) if outbox else None)
        assert sorted(set(sent)) == outbox[: len(set(sent))], "something was sent that the store does not know"
        assert len(outbox) - len(set(sent)) in (0, 1), "more than one commit went ahead of its message"
        expected = Ledger()
        for group in script()[: len(outbox)]:
            for batch in group:
                for entry in batch.entries:
                    expected.post(entry)
        assert digest[0] == tuple(sorted(expected.balances().items()))


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    child = Path(__file__).with_name("crash_child.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(child)], text=True, **pipes) as nursery:  # type: ignore[call-overload]
        yield Peer(tmp_path_factory.mktemp("crash"), nursery)
        nursery.stdin.close()


@pytest.fixture(scope="module")
def undisturbed(peer: Peer) -> tuple[Digest, list[str], int]:
    """The final state of a life nobody ended, the write points it passed, and how long its log grew."""
    peer.reset()
    assert peer.live() == 0
    points = json.loads(peer.report.read_text())
    assert peer.sent() == [message(step) for step in range(1, STEPS + 1)]
    digest = peer.state(peer.directory)[1]
    peer.reset()
    assert peer.live(die_at=len(points)) == -signal.SIGKILL  # before close, which would empty the log
    log_bytes = (peer.directory / f"{DATABASE_NAME}-wal").stat().st_size
    return digest, points, log_bytes


def survives(peer: Peer, undisturbed: tuple[Digest, list[str], int]) -> None:
    """Inspect the dead, let the next life finish, and compare with the undisturbed one."""
    peer.inspect_the_dead()
    assert peer.live() == 0
    outbox, digest = peer.state(peer.directory)
    assert outbox == [message(step) for step in range(1, STEPS + 1)]
    assert sorted(set(peer.sent())) == outbox, "a message was lost"
    assert digest == undisturbed[0]


def test_the_undisturbed_life_writes_at_many_points_and_ends_with_the_right_money(
    peer: Peer, undisturbed: tuple[Digest, list[str], int]
) -> None:
    digest, points, log_bytes = undisturbed
    kinds = {point.partition(" ")[2] for point in points}
    assert kinds >= {"create", "rename", "begin", "put", "delete", "entries", "postings", "balances"}
    assert kinds >= {"empty balances", "events", "tail", "commit", "send", "close"}
    assert points.count("after commit") == points.count("before send") == STEPS
    assert log_bytes > 50_000
    balances = dict(digest[0])  # type: ignore[call-overload]
    # Agreement 0 pays 60 and a fee of 2 of 101; agreement 1 is slashed: 4 of its lock of 33 to the checker,
    # of the 29 left 14 to the submitter and 15 burned.
    assert balances[Account(SUBMITTER, "free")] == 1_000 - 62 + 14
    assert balances[Account(SOLVER, "free")] == 5 + 60
    assert balances[Account(SOLVER, "stake")] == 200 - 33
    assert balances[Account(CHECKER, "free")] == 2 + 4
    assert balances[BURNED] == 15


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_death_at_any_write_point_is_survived(peer: Peer, undisturbed: tuple[Digest, list[str], int], how: str) -> None:
    for die_at in range(1, len(undisturbed[1]) + 1):
        if how == "exit" and die_at % 5:
            continue  # os._exit takes the same path through the kernel: a sample shows it
        peer.reset()
        assert peer.live(die_at=die_at, how=how) == (-signal.SIGKILL if how == "kill" else 9)
        survives(peer, undisturbed)


def test_death_of_the_recovering_life_too_is_survived(peer: Peer, undisturbed: tuple[Digest, list[str], int]) -> None:
    points = len(undisturbed[1])
    for first in range(7, points, 23):
        peer.reset()
        assert peer.live(die_at=first) == -signal.SIGKILL
        for next_life in range(1, 12, 2):  # each life gets a little further, or not at all
            assert peer.live(die_at=next_life) in (-signal.SIGKILL, 0)
            peer.inspect_the_dead()
        survives(peer, undisturbed)


def test_death_inside_a_write_of_the_log_is_survived(peer: Peer, undisturbed: tuple[Digest, list[str], int]) -> None:
    """The kernel ends the process in the middle of the write that passes the limit, leaving it torn there."""
    log_bytes, deaths = undisturbed[2], 0
    for frame, boundary in enumerate(range(4_096, log_bytes, 4_120)):
        peer.reset()
        code = peer.live(file_bytes_max=boundary + (frame * 997) % 4_120)
        assert code in (-signal.SIGXFSZ, 0)
        deaths += code != 0
        survives(peer, undisturbed)
    assert deaths > 30
