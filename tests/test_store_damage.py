"""Damage to the store's files: cut, flipped, mixed, edited. It opens with a whole prefix or says what to do."""

from __future__ import annotations

import shutil
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

import pytest

from peer.store import Store
from peer.store_schema import DATABASE_NAME
from protocol.errors import CorruptStore
from tests.test_store import NETWORK, PEER, batch, fingerprint

PAGE_BYTES = 4096
FRAME_BYTES = PAGE_BYTES + 24
COMMITS = 6


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[object, ...]]]:
    """A directory as a crash leaves it (two commits in the database, four in the log), and every prefix of
    it."""
    live, crashed = (tmp_path_factory.mktemp(name) for name in ("live", "crashed"))
    prefixes = []
    with Store.open(live, NETWORK, PEER) as store:
        prefixes.append(fingerprint(store))
        for n in range(1, COMMITS + 1):
            store.commit([batch(2 * n), batch(2 * n + 1)])
            prefixes.append(fingerprint(store))
            if n == 2:
                store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for name in (DATABASE_NAME, f"{DATABASE_NAME}-wal"):
            shutil.copy(live / name, crashed / name)
    assert len(set(prefixes)) == COMMITS + 1
    return crashed, prefixes


def outcome(history: tuple[Path, list[tuple[object, ...]]], directory: Path) -> int | None:
    """How many commits a damaged copy opens with; None if it is refused. Anything else fails the test."""
    try:
        with Store.open(directory, NETWORK, PEER) as store:
            return history[1].index(fingerprint(store))
    except CorruptStore as refused:
        assert all((refused.what, refused.why, refused.next_step))
        return None


def damaged(history: tuple[Path, list[tuple[object, ...]]], directory: Path, name: str, data: bytes) -> int | None:
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(history[0], directory)
    (directory / name).write_bytes(data)
    return outcome(history, directory)


def test_a_log_cut_anywhere_opens_with_a_prefix(history: tuple[Path, list[tuple[object, ...]]], tmp_path: Path) -> None:
    name = f"{DATABASE_NAME}-wal"
    data = (history[0] / name).read_bytes()
    cuts = {32 + FRAME_BYTES * frame + off for frame in range(len(data) // FRAME_BYTES + 1) for off in (-9, 0, 1, 30)}
    found = [damaged(history, tmp_path / "d", name, data[:cut]) for cut in sorted(cuts) if 0 <= cut <= len(data)]
    assert None not in found
    assert found == sorted(found, key=int)  # type: ignore[arg-type]
    assert set(found) == {2, 3, 4, 5, 6}


def test_a_database_cut_anywhere_opens_whole_or_is_refused(
    history: tuple[Path, list[tuple[object, ...]]], tmp_path: Path
) -> None:
    data = (history[0] / DATABASE_NAME).read_bytes()
    cuts = range(0, len(data), 1_500)
    found = {damaged(history, tmp_path / "d", DATABASE_NAME, data[:cut]) for cut in cuts}
    assert found <= {None, COMMITS}
    assert None in found


def flipped(data: bytes, position: int, bit: int) -> bytes:
    return data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :]


@pytest.mark.parametrize("with_log", [True, False])
def test_a_flipped_bit_in_the_database_is_refused_or_without_effect(
    history: tuple[Path, list[tuple[object, ...]]], tmp_path: Path, with_log: bool
) -> None:
    data = (history[0] / DATABASE_NAME).read_bytes()
    log = (history[0] / f"{DATABASE_NAME}-wal").read_bytes()
    positions = [*range(100), *range(100, len(data), 293)]
    found = []
    for position in positions:
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / DATABASE_NAME).write_bytes(flipped(data, position, position % 8))
        if with_log:
            (tmp_path / "d" / f"{DATABASE_NAME}-wal").write_bytes(log)
        found.append(outcome(history, tmp_path / "d"))
    assert set(found) <= ({None, COMMITS} if with_log else {None, 2})
    assert found.count(None) > 20


def test_a_flipped_bit_in_the_log_leaves_a_prefix(
    history: tuple[Path, list[tuple[object, ...]]], tmp_path: Path
) -> None:
    name = f"{DATABASE_NAME}-wal"
    data = (history[0] / name).read_bytes()
    positions = [*range(32), *range(32, len(data), 641)]
    found = {damaged(history, tmp_path / "d", name, flipped(data, p, p % 8)) for p in positions}
    assert found <= {2, 3, 4, 5, 6}
    assert {2, 3, 4} <= found


def test_pages_of_two_states_mixed_are_refused(history: tuple[Path, list[tuple[object, ...]]], tmp_path: Path) -> None:
    """As after a checkpoint that stopped half-way, whose log was then lost: no single page is damaged."""
    whole = tmp_path / "whole"
    shutil.copytree(history[0], whole)
    Store.open(whole, NETWORK, PEER).close()
    old, new = (history[0] / DATABASE_NAME).read_bytes(), (whole / DATABASE_NAME).read_bytes()
    changed = [at for at in range(0, len(old), PAGE_BYTES) if old[at : at + PAGE_BYTES] != new[at : at + PAGE_BYTES]]
    assert len(changed) >= 4
    with closing(sqlite3.connect(whole / DATABASE_NAME)) as connection:
        sql = "SELECT rootpage FROM sqlite_schema WHERE name = 'sqlite_sequence'"
        sequence_at = (connection.execute(sql).fetchone()[0] - 1) * PAGE_BYTES
    for at in changed:
        mixed = old[:at] + new[at : at + PAGE_BYTES] + old[at + PAGE_BYTES :]
        # With the log the mixture is an ordinary crash during a checkpoint; without it, it is damage.
        assert damaged(history, tmp_path / "d", DATABASE_NAME, mixed) == COMMITS
        shutil.rmtree(tmp_path / "d")
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / DATABASE_NAME).write_bytes(mixed)
        # The page of sqlite_sequence alone says nothing that is ours: there the old state is whole.
        assert outcome(history, tmp_path / "d") == (2 if at == sequence_at else None), f"page at {at}"


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE balances SET micro = micro + 1 WHERE bucket = 'free'",
        "DELETE FROM balances WHERE bucket = 'stake'",
        "UPDATE postings SET delta = -delta",
        "DELETE FROM postings WHERE entry = 3",
        "UPDATE entries SET memo = 'other' WHERE seq = 2",
        "DELETE FROM postings WHERE entry = 12; DELETE FROM entries WHERE seq = 12",
        "UPDATE entries SET seq = -seq; UPDATE postings SET entry = -entry;"
        " UPDATE entries SET seq = CASE seq WHEN -2 THEN 3 WHEN -3 THEN 2 ELSE -seq END;"
        " UPDATE postings SET entry = CASE entry WHEN -2 THEN 3 WHEN -3 THEN 2 ELSE -entry END",
        "UPDATE kv SET value = x'00' WHERE key = x'6c617374'",
        "DELETE FROM kv WHERE key = x'6c617374'",
        "UPDATE kv SET tbl = 'letters'",
        "UPDATE meta SET value = x'33' WHERE name = 'schema_version'",
        "DELETE FROM meta WHERE name = 'tail'",
        "UPDATE events SET line = 'another'",
        "DROP INDEX events_by_job",
        "CREATE TRIGGER t AFTER INSERT ON kv BEGIN DELETE FROM entries; END",
    ],
)
def test_a_row_changed_by_hand_is_refused(
    history: tuple[Path, list[tuple[object, ...]]], tmp_path: Path, sql: str
) -> None:
    shutil.copytree(history[0], tmp_path / "d")
    connection = sqlite3.connect(tmp_path / "d" / DATABASE_NAME)
    connection.executescript(sql)
    connection.close()
    assert outcome(history, tmp_path / "d") is None


def test_the_history_under_test_is_what_it_claims(history: tuple[Path, list[tuple[object, ...]]]) -> None:
    data = (history[0] / f"{DATABASE_NAME}-wal").read_bytes()
    assert struct.unpack(">I", data[8:12]) == (PAGE_BYTES,)
    assert (len(data) - 32) % FRAME_BYTES == 0
    assert history[1][0] == ((), (), (), ())
