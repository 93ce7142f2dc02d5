"""`ichiba earn house` as people and programs read it: a simulated house and newcomer answer behind the socket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from protocol.keys import peer_name
from tests.cli_scene import ichiba, lines, serve
from tests.fake_daemon import running
from tests.test_reruns import earned, market, orders, prove

VERBS = ("house", "house-want")


@pytest.fixture(scope="module")
def paid():  # type: ignore[no-untyped-def]
    """A newcomer that one re-run was paid to."""
    simulation = market(1)
    prove(simulation, "new0")
    simulation.run(seconds=90, until=lambda: bool(earned(simulation, "new0")))
    simulation.run(seconds=5, until=lambda: any(row.outcome for row in orders(simulation)))
    return simulation


def test_a_newcomer_sees_what_it_was_paid_and_what_is_left(home: Path, paid) -> None:  # type: ignore[no-untyped-def]
    with running(home) as daemon:
        serve(daemon, paid, "new0", verbs=VERBS)
        told = ichiba(home, "earn", "house")
        assert (told.exit_code, told.stderr) == (0, "")
        assert "0.009" in told.stdout and "0.016" in told.stdout, "paid, and left of 0.025"
        (found,) = lines(ichiba(home, "earn", "house", "--json"))
    assert found["schema"] == "ichiba.earn.house/1"
    assert found["house"] == peer_name(paid.peers["house"].key.public)
    rerun = next(part for part in found["pays"] if part["part"] == "rerun")
    assert (rerun["earned_micro"], rerun["today_micro"], rerun["left_today_micro"]) == (9_000, 9_000, 16_000)


def test_who_opts_out_reads_the_reason_and_how_to_come_back(home: Path, paid) -> None:  # type: ignore[no-untyped-def]
    with running(home) as daemon:
        serve(daemon, paid, "new0", verbs=VERBS)
        told = ichiba(home, "earn", "house", "--off")
        assert told.exit_code == 0
        assert "house-off" in told.stdout and "ichiba earn house --on" in told.stdout
        back = json.loads(ichiba(home, "earn", "house", "--on", "--json").stdout)
    assert back["on"] is True
    assert all((part["reason"] or {}).get("code") != "house-off" for part in back["pays"])


def test_the_house_sees_its_orders(home: Path, paid) -> None:  # type: ignore[no-untyped-def]
    with running(home) as daemon:
        serve(daemon, paid, "house", verbs=VERBS)
        told = ichiba(home, "earn", "house")
    assert told.exit_code == 0
    assert "this peer" in told.stdout and "paid" in told.stdout
    assert peer_name(paid.peers["new0"].key.public)[-8:] in told.stdout
