"""`ichiba dispute` and `ichiba earn`: what people type and read about a dispute that a simulated swarm decided."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trio

from protocol.errors import NotFound
from tests.adversaries.stage import play, stage_of
from tests.adversaries.strategies import Cheat
from tests.cli_scene import answering, ichiba, lines
from tests.dispute_swarm import court, settle
from tests.fake_daemon import FakeDaemon
from tests.swarm_scenario import submit


@cache
def decided() -> tuple[dict[str, Any], dict[str, Any]]:
    """What the submitter's daemon answers to `disputes` and `dispute` after a cheat was convicted."""
    simulation = court(2, cheat="low-precision")
    simulation.run(seconds=3)
    settle(simulation, submit(simulation))
    listed = simulation.command("alice", "disputes", {}).result
    shown = simulation.command("alice", "dispute", {"dispute": listed["disputes"][0]["dispute"][:8]})
    assert shown.error is None
    unknown = simulation.command("alice", "dispute", {"dispute": "ffff"})
    assert unknown.error is not None and unknown.error["exit_code"] == 4
    return listed, shown.result


@pytest.fixture
def daemon(home: Path) -> Iterator[FakeDaemon]:
    listed, shown = decided()

    def show(arguments: dict[str, Any]) -> dict[str, Any]:
        if not shown["dispute"].startswith(arguments["dispute"]):
            raise NotFound("no disputes match", next_step="`ichiba dispute list` lists their ids")
        return shown

    with answering(home) as fake:
        fake.answers |= {"disputes": lambda _: listed, "dispute": show}
        yield fake


def test_a_list_of_disputes_says_who_quarrels_about_what_and_how_it_ended(home: Path, daemon: FakeDaemon) -> None:
    told = ichiba(home, "dispute", "list")
    assert told.exit_code == 0
    for word in ("observer", "wrong", decided()[0]["disputes"][0]["dispute"][:12]):
        assert word in told.stdout
    (line,) = lines(ichiba(home, "dispute", "list", "--json"))
    assert (line["schema"], line["state"], line["part"]) == ("ichiba.dispute/1", "wrong", "observer")
    daemon.answers["disputes"] = lambda _: {"disputes": []}
    assert ichiba(home, "dispute", "list").stdout == "disputes: none\n"


def test_the_descent_is_drawn_down_to_the_referees_value(home: Path, daemon: FakeDaemon) -> None:
    dispute = decided()[1]["dispute"]
    told = ichiba(home, "dispute", "show", dispute[:8]).stdout
    levels = [line.strip().partition(":")[0] for line in told.splitlines()]
    assert [w for w in levels if w in ("step", "state", "node", "element", "block")] == [
        "step", "state", "node", "element", "block",
    ]  # fmt: skip
    assert "mm.default  linear.py:14" in told, "the operation, and the line of the model it came from"
    leaf = decided()[1]["descent"][-1]
    assert leaf["referee"] == leaf["challenger"] != leaf["solver"]
    assert f"0x{leaf['solver']:08x}" in told and f"0x{leaf['referee']:08x}" in told
    assert "the solver loses by the referee's own result at the leaf" in told
    (line,) = lines(ichiba(home, "dispute", "show", dispute, "--json"))
    assert line["schema"] == "ichiba.dispute.story/1"
    assert line["result"]["loser"] == "solver" and line["message_bytes"] < 50_000


def test_a_dispute_nobody_knows_is_not_found(home: Path, daemon: FakeDaemon) -> None:
    told = ichiba(home, "dispute", "show", "ff00")
    assert told.exit_code == 4
    assert "ichiba dispute list" in told.stderr


def test_earn_is_up_with_the_roles_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(trio, "run", lambda main, *arguments: started.append(arguments[1]))
    assert ichiba(home, "earn").exit_code == 0
    assert ichiba(home, "earn", "--as", "solver,whistleblower", "--price", "0.002").exit_code == 0
    assert [(config.roles, config.unit_price) for config in started] == [(6, 1000), (5, 2000)]
    assert [config.data_dir for config in started] == [home, home]
    assert ichiba(home, "earn", "--as", "referee").exit_code == 2


def test_of_a_jury_each_jurors_word_and_measure_is_told(home: Path) -> None:
    stage = stage_of(0, {"bob": Cheat("skip-step")}, noise_ppb=1000)
    play(stage)
    listed = stage.command("alice", "disputes", {}).result["disputes"]
    shown = stage.command("alice", "dispute", {"dispute": listed[0]["dispute"]}).result
    with answering(home) as fake:
        fake.answers["dispute"] = lambda _: shown
        told = ichiba(home, "dispute", "show", shown["dispute"][:8]).stdout
        fake.answers["dispute"] = lambda _: {**shown, "root_bound": True}
        assert "found another end, bound to its key as " in ichiba(home, "dispute", "show", shown["dispute"][:8]).stdout
    assert "none: jurors execute the segment again" in told and ", bound to its key as " not in told
    quorum = stage.network.rules.tolerant_quorum
    assert len(shown["jurors"]) >= quorum and told.count(" finds it wrong: ") == len(shown["jurors"])
    assert "of an update from its own end" in told and "the work was wrong" in told
