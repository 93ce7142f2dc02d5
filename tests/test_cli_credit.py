"""`ichiba credit`: what people read and what programs get, answered by simulated peers."""

from __future__ import annotations

from pathlib import Path

import pytest

from peer.simulator import Simulation
from protocol.keys import peer_name
from tests.cli_scene import ichiba, lines, serve
from tests.credit_scene import key_of, make_indebted
from tests.fake_daemon import FakeDaemon

VERBS = ("credit", "credit-give", "credit-revoke", "credit-net")


@pytest.fixture(scope="module")
def indebted() -> Simulation:
    """Ann owes Ben for one job and has 0.94 credits left with him."""
    return make_indebted()


def test_both_sides_see_what_is_owed_and_what_is_left(daemon: FakeDaemon, home: Path, indebted: Simulation) -> None:
    serve(daemon, indebted, "ben", verbs=VERBS)
    ben = lines(ichiba(home, "credit", "ls", "--json"))
    assert [(row["given_micro"], row["given_left_micro"], row["owed_micro"]) for row in ben] == [
        (1_000_000, 940_000, 60_000)
    ]
    serve(daemon, indebted, "ann", verbs=VERBS)
    ann = lines(ichiba(home, "credit", "ls", "--json"))
    assert [(row["got_micro"], row["got_left_micro"], row["owed_micro"]) for row in ann] == [
        (1_000_000, 940_000, -60_000)
    ]
    told = ichiba(home, "credit", "ls")
    assert told.exit_code == 0, told.output
    assert "-0.06" in told.stdout
    assert "what it owes you below zero is what you owe it" in told.stdout


def test_a_line_is_given_and_closed_by_name(daemon: FakeDaemon, home: Path, indebted: Simulation) -> None:
    cat = peer_name(key_of(indebted, "cat"))
    serve(daemon, indebted, "ben", verbs=VERBS)
    told = ichiba(home, "credit", "give", cat, "2.5", "--days", "7")
    assert told.exit_code == 0, told.output
    assert f"{cat} may owe this peer up to 2.50 credits, for 7 days" in told.stdout
    (row,) = (row for row in lines(ichiba(home, "credit", "ls", "--json")) if row["peer"] == cat)
    assert row["given_left_micro"] == 2_500_000
    closed = ichiba(home, "credit", "revoke", cat)
    assert closed.exit_code == 0, closed.output
    assert f"the line to {cat} is closed; it owes 0.00 credits" in closed.stdout
    (row,) = (row for row in lines(ichiba(home, "credit", "ls", "--json")) if row["peer"] == cat)
    assert row["given_left_micro"] == 0


def test_what_cannot_be_is_said_with_its_code(daemon: FakeDaemon, home: Path, indebted: Simulation) -> None:
    serve(daemon, indebted, "ben", verbs=VERBS)
    rich = peer_name(key_of(indebted, "rich"))
    for words, code in (
        (("credit", "revoke", rich), 4),
        (("credit", "net", rich), 4),
        (("credit", "give", rich, "-1"), 2),
        (("credit", "give", peer_name(key_of(indebted, "ben")), "1"), 1),
        (("credit", "give", "nobody", "1"), 1),
    ):
        assert ichiba(home, *words).exit_code == code, words


def test_netting_names_whom_it_asked(daemon: FakeDaemon, home: Path, indebted: Simulation) -> None:
    serve(daemon, indebted, "ben", verbs=VERBS)
    (found,) = lines(ichiba(home, "credit", "net", "--json"))
    assert found["asked"] == [peer_name(key_of(indebted, "ann"))]
    indebted.run(seconds=5)
    (row,) = (row for row in lines(ichiba(home, "credit", "ls", "--json")) if row["owed_micro"])
    assert (row["nettings"], row["not_netted"], row["owed_micro"]) == (1, 0, 60_000)
