"""The start of a store too large to be verified whole: what it checks at once, what later; nothing is silent."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from market import ledger as money
from peer import store_check
from peer.daemon import _check_store
from peer.store import Batch, Event, Store
from peer.store_schema import DATABASE_NAME
from protocol import params
from protocol.codec import blake
from protocol.errors import CorruptStore, NotFound
from tests.test_store import NETWORK, PEER, fingerprint, key

SOLVER = blake("test/restart", b"solver")
PAGE_BYTES = 4096


@pytest.fixture(autouse=True)
def every_store_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "STORE_WHOLE_CHECK_BYTES_MAX", 0)
    monkeypatch.setattr(params, "STORE_SNAPSHOT_ENTRIES", 8)


def grown(directory: Path, channels: int = 20) -> Path:
    """A store of channels opened and settled, with rows and lines in several tables; closed."""
    with Store.open(directory, NETWORK, PEER) as store:
        funds = money.deposit(key(10**6), PEER, 10**6), money.deposit(key(10**6 + 1), SOLVER, 0, 10**6)
        store.commit([Batch(entries=funds)])
        for n in range(channels):
            parties = {"submitter": PEER, "solver": SOLVER}
            opening = money.open_channel(key(n), budget_micro=100, lock_micro=10, **parties)
            ending = money.settle(key(n), channel_micro=100, lock_micro=10, paid_micro=90, **parties)
            rows = tuple(("receipts", key(n) + bytes([k]), bytes([n, k]) * 40) for k in range(5))
            numbers = (("numbers", key(n), b"%d" % n),)
            store.commit([Batch(rows + numbers, (opening, ending), (Event("job", n, f"line {n}"),))])
    return directory


def test_a_large_store_opens_as_it_was_from_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = grown(tmp_path / "d")
    with Store.open(directory, NETWORK, PEER) as store:
        assert not store.checked_whole
        assert 0 <= store._tail.entries - store._snapshot_entries < 8 + 2, "few entries are folded at a start"
        found, ledger = fingerprint(store), store.ledger()
        assert ledger.total_micro() == 2 * 10**6
        assert ledger.flows()[SOLVER].earned_micro == 20 * 90
        assert not ledger.post(
            money.open_channel(key(3), submitter=PEER, budget_micro=100, solver=SOLVER, lock_micro=10)
        )
        assert [row for row, _ in store.rows("receipts", key(7))] == [key(7) + bytes([k]) for k in range(5)]
        assert list(store.rows("receipts", key(99))) == []
    assert store_check.check(directory) == {"rows": 20 * 6, "entries": 42, "events": 20}
    monkeypatch.setattr(params, "STORE_WHOLE_CHECK_BYTES_MAX", 2**30)
    with Store.open(directory, NETWORK, PEER) as store:
        assert store.checked_whole
        assert fingerprint(store) == found
        assert store.ledger() == ledger


EDITS = {
    # found when the store opens
    "UPDATE balances SET micro = micro + 1 WHERE bucket = 'free'": "open",
    "DELETE FROM balances WHERE bucket = 'stake'": "open",
    "UPDATE entries SET digest = zeroblob(32) WHERE seq = 2": "open",
    "DELETE FROM postings WHERE entry = 42; DELETE FROM entries WHERE seq = 42": "open",
    "UPDATE postings SET delta = -delta WHERE entry = 42": "open",
    "UPDATE meta SET value = zeroblob(9) WHERE name = 'snapshot'": "open",
    "DELETE FROM meta WHERE name = 'tables'": "open",
    "CREATE TRIGGER t AFTER INSERT ON kv BEGIN DELETE FROM entries; END": "open",
    # found when it is read, as every table the node keeps in memory is at its start
    "UPDATE kv SET value = x'00' WHERE tbl = 'numbers'": "read",
    "DELETE FROM kv WHERE tbl = 'numbers' AND key = (SELECT MAX(key) FROM kv WHERE tbl = 'numbers')": "read",
    "UPDATE kv SET value = x'00' WHERE tbl = 'receipts'": "read",
    "UPDATE events SET line = 'another'": "read",
    # found by the check that runs beside the daemon
    "UPDATE postings SET delta = -delta WHERE entry = 3": "check",
    "UPDATE entries SET memo = 'other' WHERE seq = 2": "check",
    "DELETE FROM kv WHERE tbl = 'receipts' AND key = (SELECT MAX(key) FROM kv WHERE tbl = 'receipts')": "check",
}


def found_when(directory: Path) -> str:
    """When damage is refused: "open", "read", "check", or "never". Each refusal must be typed and complete."""
    try:
        store = Store.open(directory, NETWORK, PEER)
    except CorruptStore as refused:
        assert refused.next_step
        return "open"
    with store:
        try:
            list(store.rows("numbers"))
            for n in range(20):
                list(store.rows("receipts", key(n)))
            store.events("job")
        except CorruptStore as refused:
            assert refused.next_step
            return "read"
    try:
        store_check.check(directory)
    except CorruptStore as refused:
        assert refused.next_step
        return "check"
    return "never"


@pytest.mark.parametrize("sql", EDITS)
def test_what_was_changed_is_found_when_the_decision_says(tmp_path: Path, sql: str) -> None:
    directory = grown(tmp_path / "d")
    with closing(sqlite3.connect(directory / DATABASE_NAME)) as connection:
        connection.executescript(sql)
    assert found_when(directory) == EDITS[sql]


def test_no_damaged_page_of_any_kind_stays_unfound(tmp_path: Path) -> None:
    """Each page of the file overwritten by rubbish, and by an older state of itself."""
    whole, old = grown(tmp_path / "whole"), tmp_path / "old"
    shutil.copytree(whole, old)
    with Store.open(whole, NETWORK, PEER) as store:
        store.commit(
            [
                Batch(
                    (("numbers", key(3), b"new"), ("receipts", key(99), b"r" * 99)), (money.withdraw(key(99), PEER, 5),)
                )
            ]
        )
    new_bytes, old_bytes = ((d / DATABASE_NAME).read_bytes() for d in (whole, old))
    seen = set()
    for at in range(0, len(new_bytes), PAGE_BYTES):
        page = new_bytes[at : at + PAGE_BYTES]
        for other in (bytes(PAGE_BYTES), old_bytes[at : at + PAGE_BYTES]):
            if other == page or not other:
                continue
            shutil.rmtree(tmp_path / "d", ignore_errors=True)
            (tmp_path / "d").mkdir()
            (tmp_path / "d" / DATABASE_NAME).write_bytes(new_bytes[:at] + other + new_bytes[at + PAGE_BYTES :])
            seen.add(found_when(tmp_path / "d"))
            assert "never" not in seen, f"page at {at}"
    assert seen == {"open", "read", "check"}


def test_the_check_runs_beside_a_daemon_and_says_in_json_what_it_found(tmp_path: Path) -> None:
    directory = grown(tmp_path / "d")
    command = [sys.executable, "-m", "peer.store_check", str(directory)]
    with Store.open(directory, NETWORK, PEER) as store:
        store.commit([Batch((("numbers", b"more", b"x"),))])
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == {"rows": 121, "entries": 42, "events": 20}
        store.commit([Batch((("numbers", b"more", b"y"),))])
    with closing(sqlite3.connect(directory / DATABASE_NAME)) as connection:
        connection.executescript("UPDATE entries SET memo = 'other' WHERE seq = 2")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] == CorruptStore.code
    with pytest.raises(NotFound):
        store_check.check(tmp_path)


async def test_a_daemon_ends_with_what_the_check_beside_it_finds(tmp_path: Path) -> None:
    directory = grown(tmp_path / "d")
    await _check_store(directory)
    with closing(sqlite3.connect(directory / DATABASE_NAME)) as connection:
        connection.executescript("UPDATE entries SET memo = 'other' WHERE seq = 2")
    with pytest.raises(CorruptStore, match="journal entry 2") as refused:
        await _check_store(directory)
    assert "store_restore" in refused.value.next_step
