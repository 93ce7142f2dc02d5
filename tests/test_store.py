"""The store's promises: whole groups, nothing lost, nothing half, nothing believed that was not written."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from market import ledger as money
from market.ledger import Account, ConflictingEntry, Overdrawn
from peer import store as store_module
from peer.store import Batch, Event, Store
from peer.store_restore import restore
from peer.store_schema import (
    DATABASE_NAME,
    MIGRATIONS,
    AlreadyRunning,
    DiskFull,
    StoreBusy,
    StoreFailed,
    StoreTooNew,
    WrongStore,
)
from protocol import params
from protocol.codec import blake
from protocol.errors import CorruptStore, LimitExceeded, LocalProtocolError, NotFound

NETWORK, PEER, OTHER = (blake("test/store", name) for name in (b"network", b"peer", b"other"))


def key(n: int) -> bytes:
    return blake("test/store/key", n.to_bytes(8, "little"))


def batch(n: int) -> Batch:
    """A batch of every kind of row, whose three parts each carry the number n."""
    number = n.to_bytes(4, "big")
    return Batch(
        puts=(("numbers", b"last", number), ("numbers", b"n" + number, number * 20)),
        entries=(money.deposit(key(n), PEER, 1_000 + n, n),),
        events=(Event("job", n, f"line {n}"),),
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path, NETWORK, PEER) as opened:
        yield opened


def reopened(store: Store) -> Store:
    store.close()
    return Store.open(store._directory, NETWORK, PEER)


def fingerprint(store: Store) -> tuple[object, ...]:
    """Everything a store holds, read through its checks."""
    return (
        tuple(store.rows("numbers")),
        tuple((seq, entry.digest()) for seq, entry in store.entries()),
        tuple(store.events("job")),
        tuple(sorted(store.ledger().balances().items())),
    )


def test_what_was_committed_is_there_after_reopening(store: Store) -> None:
    store.commit([batch(1), batch(2)])
    store.commit([batch(3)])
    before = fingerprint(store)
    with reopened(store) as again:
        assert fingerprint(again) == before
        assert again.get("numbers", b"last") == (3).to_bytes(4, "big")
        assert again.get("numbers", b"never") is None
        assert [seq for seq, _ in again.entries(since=1)] == [2, 3]
        assert again.ledger().total_micro() == 3_000 + 2 * 6
        assert again.ledger() == again.ledger()


def test_rows_come_in_order_of_keys_and_survive_commits_between_them(store: Store) -> None:
    store.commit([Batch(puts=tuple(("numbers", key(n), b"%d" % n) for n in range(600)))])
    found = []
    for number, (row_key, _) in enumerate(store.rows("numbers")):
        found.append(row_key)
        if number % 100 == 0:
            store.commit([Batch(puts=(("others", key(number), b""),))])
    assert found == sorted(key(n) for n in range(600))


def test_a_put_of_none_deletes_and_the_later_put_wins(store: Store) -> None:
    store.commit([Batch(puts=(("numbers", b"a", b"1"), ("numbers", b"b", b"1"), ("numbers", b"a", b"2")))])
    store.commit([Batch(puts=(("numbers", b"b", None), ("numbers", b"c", None)))])
    with reopened(store) as again:
        assert list(again.rows("numbers")) == [(b"a", b"2")]


def test_a_group_is_applied_whole_or_not_at_all(store: Store) -> None:
    store.commit([batch(1)])
    before = fingerprint(store)
    with pytest.raises(Overdrawn):
        store.commit([batch(2), Batch(entries=(money.withdraw(key(3), PEER, 10**9),)), batch(4)])
    assert fingerprint(store) == before
    store.commit([batch(2)])
    with reopened(store) as again:
        assert [entry.key for _, entry in again.entries()] == [key(1), key(2)]


def test_entries_of_one_group_see_each_other(store: Store) -> None:
    spend = money.withdraw(key(2), PEER, 1_001)
    store.commit([batch(1), Batch(entries=(spend,))])
    assert store.ledger().balance_micro(Account(PEER, "free")) == 0
    with pytest.raises(Overdrawn, match="holds 0 micro-credits, 1 are needed"):
        store.commit([Batch(entries=(money.withdraw(key(3), PEER, 1),))])


def test_the_same_entry_again_changes_nothing_and_a_different_one_is_refused(store: Store) -> None:
    store.commit([batch(1), batch(1)])
    store.commit([Batch(entries=batch(1).entries)])
    assert store.ledger().total_micro() == 1_002
    with pytest.raises(ConflictingEntry):
        store.commit([Batch(entries=(money.deposit(key(1), PEER, 1),))])
    with pytest.raises(ConflictingEntry):
        store.commit([Batch(entries=(money.deposit(key(2), PEER, 1), money.deposit(key(2), PEER, 2)))])
    assert [seq for seq, _ in store.entries()] == [1]


def test_the_ledger_handed_out_is_the_callers_own(store: Store) -> None:
    store.commit([batch(1)])
    again = reopened(store)
    first = again.ledger()
    first.post(money.deposit(key(9), PEER, 5))
    assert again.ledger().total_micro() == 1_002
    again.close()


def test_a_second_daemon_is_refused_with_the_pid_and_what_to_do(store: Store, tmp_path: Path) -> None:
    with pytest.raises(AlreadyRunning, match=f"`kill {os.getpid()}`") as refused:
        Store.open(tmp_path, NETWORK, PEER)
    assert refused.value.pid == os.getpid()
    with pytest.raises(AlreadyRunning):
        restore(tmp_path, None)
    store.commit([batch(1)])  # the first goes on, and loses nothing
    before = fingerprint(store)
    store.close()
    with Store.open(tmp_path, NETWORK, PEER) as again:
        assert fingerprint(again) == before


def test_a_store_of_another_network_peer_or_newer_version_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.close()
    with pytest.raises(WrongStore, match="belongs to network"):
        Store.open(tmp_path, OTHER, PEER)
    with pytest.raises(WrongStore, match="belongs to peer"):
        Store.open(tmp_path, NETWORK, OTHER)
    monkeypatch.setattr(store_module, "MIGRATIONS", MIGRATIONS[:-1])
    with pytest.raises(StoreTooNew, match=f"has version {len(MIGRATIONS)}"):
        Store.open(tmp_path, NETWORK, PEER)
    monkeypatch.undo()
    Store.open(tmp_path, NETWORK, PEER).close()  # each refusal gave the directory back


def test_an_older_store_is_migrated_whole_after_a_backup_or_left_as_it_was(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.commit([batch(1)])
    before = fingerprint(store)
    store.close()
    broken = (*MIGRATIONS, ("CREATE TABLE extra (a INTEGER) STRICT", "CREATE TABLE kv (a INTEGER)"))
    monkeypatch.setattr(store_module, "MIGRATIONS", broken)
    with pytest.raises(CorruptStore, match="kv already exists"):
        Store.open(tmp_path, NETWORK, PEER)
    monkeypatch.setattr(store_module, "MIGRATIONS", (*MIGRATIONS, ("CREATE TABLE extra (a INTEGER) STRICT",)))
    with Store.open(tmp_path, NETWORK, PEER) as migrated:
        assert fingerprint(migrated) == before
    monkeypatch.undo()
    with pytest.raises(StoreTooNew):
        Store.open(tmp_path, NETWORK, PEER)
    restore(tmp_path, tmp_path / f"{DATABASE_NAME}.v{len(MIGRATIONS)}")
    with Store.open(tmp_path, NETWORK, PEER) as old:
        assert fingerprint(old) == before


def test_files_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    with Store.open(directory, NETWORK, PEER) as store:
        store.commit([batch(1)])
        store.backup(tmp_path / "backup.db")
        files = [*directory.iterdir(), tmp_path / "backup.db"]
        assert {file.name for file in files} >= {"ichiba.db", "ichiba.db-wal", "ichiba.lock", "backup.db"}
        assert all(stat.S_IMODE(file.stat().st_mode) & 0o077 == 0 for file in files)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_tables_keys_values_and_jobs_are_bounded(store: Store) -> None:
    for put in (
        ("numbers", b"", b""),
        ("numbers", b"k" * (params.STORE_KEY_BYTES_MAX + 1), b""),
        ("numbers", b"k", bytes(params.STORE_VALUE_BYTES_MAX + 1)),
    ):
        with pytest.raises(LimitExceeded):
            store.commit([Batch(puts=(put,))])
    for name in ("", "Numbers", "a;b", "x" * 33):
        with pytest.raises(LocalProtocolError):
            store.commit([Batch(puts=((name, b"k", b""),))])
        with pytest.raises(LocalProtocolError):
            list(store.rows(name))
    for event in (Event("", 1, "x"), Event("j\n", 1, "x"), Event("j", -1, "x"), Event("j", 2**63, "x")):
        with pytest.raises(LimitExceeded):
            store.commit([Batch(events=(event,))])
    store.commit([Batch(puts=(("numbers", b"k" * params.STORE_KEY_BYTES_MAX, bytes(9)),))])


def test_a_log_keeps_the_newest_lines_and_its_cursor_never_repeats(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(params, "EVENTS_PER_JOB_MAX", 5)
    monkeypatch.setattr(params, "EVENTS_MAX", 8)
    for n in range(9):
        store.commit([Batch(events=(Event("a", n, f"a{n}"),))])
    assert [event.line for event in store.events("a")] == ["a4", "a5", "a6", "a7", "a8"]
    cursor = store.events("a")[-1].seq
    store.commit([Batch(events=tuple(Event("b", n, f"b{n}") for n in range(12)))])
    assert [event.line for event in store.events("b")] == ["b7", "b8", "b9", "b10", "b11"]
    assert store.events("a") == []  # the bound over all jobs
    store.commit([Batch(events=(Event("a", 99, "a99"),))])
    assert [event.line for event in store.events("a", since=cursor)] == ["a99"]
    assert [event.line for event in store.events("b", limit=2)] == ["b7", "b8"]


def test_hostile_log_lines_are_cut_and_kept_never_refused(store: Store) -> None:
    store.commit([Batch(events=(Event("job", 1, "x" * 10_000), Event("job", 2, "\udc80\x00end")))])
    long, odd = (event.line for event in store.events("job"))
    assert long == "x" * params.EVENT_LINE_CHARS_MAX + f" [{10_000 - params.EVENT_LINE_CHARS_MAX} characters cut]"
    assert odd == "\\udc80\x00end"


def test_a_backup_restores_to_the_state_it_was_taken_in(store: Store, tmp_path: Path) -> None:
    store.commit([batch(1)])
    before, path = fingerprint(store), tmp_path / "elsewhere" / "backup.db"
    path.parent.mkdir()
    store.backup(path)
    store.commit([batch(2)])
    store.backup(path.with_name("later.db"))
    for own in (DATABASE_NAME, f"{DATABASE_NAME}-wal"):
        with pytest.raises(LocalProtocolError):
            store.backup(tmp_path / own)
    store.close()
    assert restore(tmp_path, path).name == "damaged-1"
    with Store.open(tmp_path, NETWORK, PEER) as old:
        assert fingerprint(old) == before
    assert restore(tmp_path, path.with_name("later.db")).name == "damaged-2"
    with Store.open(tmp_path, NETWORK, PEER) as new:
        assert [seq for seq, _ in new.entries()] == [1, 2]


def test_the_command_that_an_error_names_mends_a_damaged_store(store: Store, tmp_path: Path) -> None:
    store.commit([batch(1)])
    backup = tmp_path / "backup.db"
    store.backup(backup)
    store.close()
    (tmp_path / DATABASE_NAME).write_bytes(b"rubbish")
    with pytest.raises(CorruptStore, match="store_restore") as damaged:
        Store.open(tmp_path, NETWORK, PEER)
    command = damaged.value.next_step.split("`")[1].replace("BACKUP", str(backup)).split()
    assert command[0] == "python"
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, check=True)
    assert "damaged-1" in done.stdout
    assert (tmp_path / "damaged-1" / DATABASE_NAME).read_bytes() == b"rubbish"
    with Store.open(tmp_path, NETWORK, PEER) as mended:
        assert mended.ledger().total_micro() == 1_002
    with pytest.raises(NotFound):
        restore(tmp_path, tmp_path / "no such backup")
    restore(tmp_path, None)
    with Store.open(tmp_path, NETWORK, PEER) as empty:
        assert list(empty.entries()) == []


def test_a_database_missing_beside_its_log_is_lost_not_new(store: Store, tmp_path: Path) -> None:
    store.commit([batch(1)])
    directory = tmp_path / "copy"
    directory.mkdir()
    shutil.copy(tmp_path / f"{DATABASE_NAME}-wal", directory)
    with pytest.raises(CorruptStore, match="is missing but its log"):
        Store.open(directory, NETWORK, PEER)
    (directory / DATABASE_NAME).touch()
    with pytest.raises(CorruptStore, match="0 bytes"):
        Store.open(directory, NETWORK, PEER)


def test_a_full_database_refuses_the_commit_and_keeps_the_rest(store: Store) -> None:
    store.commit([batch(1)])
    before = fingerprint(store)
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DiskFull, match="df -h"):
        store.commit([batch(2), Batch(puts=(("numbers", b"big", bytes(100_000)),))])
    assert fingerprint(store) == before
    store._connection.execute("PRAGMA max_page_count = 1000000")
    store.commit([batch(2), Batch(puts=(("numbers", b"big", bytes(100_000)),))])
    with reopened(store) as again:
        assert [seq for seq, _ in again.entries()] == [1, 2]


def test_after_a_failed_write_the_store_stays_shut_until_it_is_reopened(store: Store) -> None:
    store.commit([batch(1)])
    before = fingerprint(store)
    size_bytes = store._directory.joinpath(f"{DATABASE_NAME}-wal").stat().st_size
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    heeded = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes + 5_000, old[1]))
        with pytest.raises(StoreFailed, match="disk I/O error"):
            store.commit([batch(2)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, heeded)
    with pytest.raises(StoreFailed, match="failed before"):
        store.commit([batch(2)])
    with reopened(store) as again:
        assert fingerprint(again) == before
        again.commit([batch(2)])


def test_a_file_held_by_another_program_is_busy_not_broken(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store._connection.execute("PRAGMA busy_timeout = 0")
    other = sqlite3.connect(tmp_path / DATABASE_NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreBusy):
        store.commit([batch(1)])
    other.execute("ROLLBACK")
    other.close()
    store.commit([batch(1)])


def test_threads_that_commit_and_read_at_once_take_turns(store: Store) -> None:
    def work(worker: int) -> int:
        for n in range(10):
            store.commit([Batch(puts=(("numbers", key(worker * 100 + n), b"x"),))])
        return len(list(store.rows("numbers")))

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(4))) == 40
    with reopened(store) as again:
        assert len(list(again.rows("numbers"))) == 40


def test_a_closed_store_says_so(store: Store) -> None:
    store.close()
    store.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        store.commit([batch(1)])
