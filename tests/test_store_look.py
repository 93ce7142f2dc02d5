"""Looking into a store: it answers while a daemon writes, changes nothing, and no question is without an end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from market import ledger as money
from peer.deals import Deal
from peer.store import Batch, Event, Store
from peer.store_look_sqlite import BadQuery, looking
from peer.store_schema import DATABASE_NAME
from protocol.errors import CorruptStore, NotFound
from protocol.keys import SigningKey
from protocol.records import seal
from tests.cli_scene import ichiba, lines
from tests.test_records import settlement
from tests.test_store import NETWORK, PEER, key

SUBMITTER = SigningKey.from_seed(bytes(32))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in use, with a deal, a record, bytes, an entry and a line in it."""
    deal = Deal(
        id=key(1), side="submitter", state=4, agreement=b"a", task=b"t", base_blob=b"", seed=b"hush" * 8,
        secret=b"hush", created_ns=1,
    )  # fmt: skip
    closing = settlement()
    envelope = seal(closing, SigningKey.from_seed(b"\1" * 32))
    with Store.open(tmp_path, NETWORK, PEER) as opened:
        puts = (
            ("deals", key(1), msgspec.msgpack.encode(deal)), ("settlement", key(2), envelope),
            *(("numbers", key(n), bytes([255, n])) for n in range(50)),
        )  # fmt: skip
        opened.commit([Batch(puts, (money.deposit(key(3), PEER, 1_000),), (Event("job", 1, "line"),))])
        yield opened


def test_tables_and_rows_are_told_while_the_store_is_in_use(store: Store, tmp_path: Path) -> None:
    with looking(tmp_path, timeout_s=10) as look:
        counts = {row["table"]: row["rows"] for row in look.tables()}
        assert counts == {
            "balances": 2, "deals": 1, "entries": 1, "events": 1, "kv": 52, "meta": 5, "numbers": 50, "postings": 2,
            "settlement": 1,
        }  # fmt: skip
        store.commit([Batch((("numbers", b"new", b"x"),))])
        assert {row["table"]: row["rows"] for row in look.tables()} == counts, "one look sees one state"
        assert [row["key"] for row in look.rows("numbers", limit=3, offset=2)] == [
            k.hex() for k in sorted(key(n) for n in range(50))[2:5]
        ]
        assert [row["kind"] for row in look.rows("entries", limit=9)] == ["deposit"]
        with pytest.raises(NotFound):
            look.rows("nothing", limit=1)


def test_records_are_shown_opened_and_secrets_of_deals_are_not(store: Store, tmp_path: Path) -> None:
    with looking(tmp_path, timeout_s=10) as look:
        (deal,) = look.rows("deals", limit=9)
        (record,) = look.rows("settlement", limit=9)
    assert (deal["value"]["seed"], deal["value"]["secret"], deal["value"]["side"]) == (
        "(hidden)",
        "(hidden)",
        "submitter",
    )
    assert record["value"]["record"][0] == "ichiba/settlement/1"


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM kv", "INSERT INTO meta VALUES ('a', x'00', x'00')", "DROP TABLE kv", "VACUUM", "BEGIN", "COMMIT",
        "PRAGMA writable_schema = 1", "ATTACH 'other.db' AS other", "PRAGMA journal_mode = DELETE",
        "CREATE TEMP TABLE t (a)",
        "SELECT 1; DELETE FROM kv", "SELECT load_extension('x')", "SELECT * FROM nothing", "SELEC", "",
        "SELECT zeroblob(1000000000)", "UPDATE kv SET value = x'00' RETURNING *",
    ],
)  # fmt: skip
def test_only_questions_are_taken(store: Store, tmp_path: Path, sql: str) -> None:
    before = (tmp_path / DATABASE_NAME).read_bytes()
    try:
        with looking(tmp_path, timeout_s=10) as look:
            assert look.query(sql, limit=5) == ([], False), "an empty question has an empty answer"
        assert not sql
    except BadQuery as refused:
        assert refused.next_step
    assert (tmp_path / DATABASE_NAME).read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir() if "ichiba" not in f.name) == []
    store.commit([Batch((("numbers", b"after", b"x"),))])


def test_a_question_without_end_is_stopped_and_answers_are_cut(store: Store, tmp_path: Path) -> None:
    endless = "WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT {} FROM c"
    with pytest.raises(BadQuery, match="took more than"), looking(tmp_path, timeout_s=0.01) as look:
        look.query(endless.format("COUNT(*)"), limit=5)
    with looking(tmp_path, timeout_s=60) as look:
        assert look.query(endless.format("x"), limit=3) == ([{"x": 1}, {"x": 2}, {"x": 3}], True)


def test_a_damaged_row_is_refused_not_shown(store: Store, tmp_path: Path) -> None:
    store._connection.execute("UPDATE kv SET value = x'00' WHERE tbl = 'numbers'")
    with pytest.raises(CorruptStore), looking(tmp_path, timeout_s=10) as look:
        look.rows("numbers", limit=1)


def test_the_commands_answer_in_json_and_name_their_problems(store: Store, tmp_path: Path) -> None:
    assert {line["row"]["table"] for line in lines(ichiba(tmp_path, "db", "tables", "--json"))} >= {"deals", "kv"}
    (line,) = lines(ichiba(tmp_path, "db", "query", "SELECT COUNT(*) AS n FROM kv", "--json"))
    assert line["row"] == {"n": 52}
    assert len(lines(ichiba(tmp_path, "db", "rows", "numbers", "--limit", "4", "--json"))) == 4
    refused = ichiba(tmp_path, "db", "query", "DELETE FROM kv", "--json")
    assert (refused.exit_code, json.loads(refused.stderr)["code"]) == (2, "bad-query")
    assert ichiba(tmp_path / "none", "db", "tables").exit_code == 4
