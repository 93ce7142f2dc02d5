"""A guest in its node and at the command line: pauses by its rules, finishes what runs, reports what it earned."""

from __future__ import annotations

import time
from datetime import date
from pathlib import Path

import pytest

from peer.energy import EnergyBook, write_book
from peer.guest import read_rules
from peer.simulator import SECOND
from tests.cli_scene import STATUS, answering, ichiba, lines, made_home
from tests.swarm_scenario import job_state, make_swarm, submit
from tests.test_pausing import CALM, asked, kinds, working


# --- the node ------------------------------------------------------------------------------------------------
def test_a_rules_word_is_the_reason_of_the_pause_and_the_owner_overrides_it() -> None:
    simulation, job = working(61)
    asked(simulation, "bob", "pause", by="gpu-hot", why="the GPU is at 84 °C", within_ms=1000)
    status = asked(simulation, "bob", "status")
    assert (status["paused_by"], status["paused_why"]) == ("gpu-hot", "the GPU is at 84 °C")
    other = submit(simulation)
    simulation.run(seconds=5, until=lambda: any(o["no_bid"] for o in asked(simulation, "bob", "book")["offers"]))
    (offer,) = [o for o in asked(simulation, "bob", "book")["offers"] if o["no_bid"]]
    assert offer["no_bid"] == {"code": "paused", "why": "gpu-hot: the GPU is at 84 °C"}
    simulation.crash("bob", for_ns=2 * SECOND)
    simulation.run(seconds=4)
    assert asked(simulation, "bob", "status")["paused_by"] == "gpu-hot", "over a restart"
    (reason,) = [r for r in asked(simulation, "bob", "why", of="me")["reasons"] if r["code"] == "paused"]
    assert "the GPU is at 84 °C" in reason["words"] and reason["counterfactual"] == "ichiba earn rules"
    asked(simulation, "bob", "pause")
    assert not asked(simulation, "bob", "resume", by="guest")["resumed"], "the owner's word counts more"
    assert asked(simulation, "bob", "resume")["resumed"]
    simulation.run(
        seconds=900, until=lambda: all(job_state(simulation, j).get("state") == "done" for j in (job, other))
    )
    assert job_state(simulation, job)["state"] == "done"


@pytest.mark.parametrize("crash", [False, True])
def test_finishing_takes_nothing_new_ends_what_runs_and_says_so(crash: bool) -> None:
    simulation, job = working(62)
    found = asked(simulation, "bob", "finish")
    assert (found["already"], found["unfinished"]) == (False, 1)
    assert "finishing" in {r["code"] for r in asked(simulation, "bob", "why", of="me")["reasons"]}
    assert asked(simulation, "bob", "finish")["already"]
    if crash:
        simulation.crash("bob", for_ns=2 * SECOND)
        simulation.run(seconds=4)
    second = submit(simulation)
    simulation.run(seconds=900, until=lambda: "finished" in kinds(simulation, "bob"))
    status = asked(simulation, "bob", "status")
    assert status["unfinished"] == 0 and status["finishing_since_ns"]
    simulation.run(seconds=900, until=lambda: job_state(simulation, second).get("state") == "done")
    first, other = (job_state(simulation, j)["deals"] for j in (job, second))
    assert first[0]["paid_micro"] == 60_000, "what ran is done and paid"  # type: ignore[index]
    assert {deal["solver"] for deal in other}.isdisjoint({deal["solver"] for deal in first})  # type: ignore[attr-defined]
    assert not asked(simulation, "bob", "finish", on=False)["finishing_since_ns"]
    third = submit(simulation)
    simulation.run(seconds=900, until=lambda: job_state(simulation, third).get("state") == "done")
    assert job_state(simulation, third)["paid_micro"] == 60_000, "bob, the cheaper, is back"


def test_a_checker_that_finishes_declines_with_its_own_word() -> None:
    simulation = make_swarm(63, CALM)
    simulation.run(seconds=3)
    asked(simulation, "victor", "finish")
    job = submit(simulation)
    simulation.run(seconds=120, until=lambda: any(k == "refused" for k in kinds(simulation, "alice")))
    told = [data for _, who, kind, data in simulation.log if who == "alice" and kind == "refused"]
    codes = {data["code"] for data in told}
    asks = [a for a in asked(simulation, "alice", "book")["asks"] if a["roles"]]
    assert codes <= {"finishing"} and len(asks) == 3, "and its ask is for nothing"
    asked(simulation, "victor", "finish", on=False)
    simulation.run(seconds=900, until=lambda: job_state(simulation, job).get("state") == "done")
    assert job_state(simulation, job)["state"] == "done"


def test_earnings_are_what_the_ledger_paid_for_work_and_checks() -> None:
    simulation = make_swarm(64, CALM)
    simulation.run(seconds=3)
    began = simulation.now_ns
    job = submit(simulation)
    simulation.run(seconds=900, until=lambda: job_state(simulation, job).get("state") == "done")
    simulation.run(seconds=5)
    for name, role in (("bob", "solver"), ("victor", "checker"), ("wendy", "checker")):
        (row,) = asked(simulation, name, "earnings")["earnings"]
        assert row["role"] == role and began < row["time_ns"] <= simulation.now_ns
        assert row["micro"] == asked(simulation, name, "wallet")["free_micro"] > 0, "they had nothing before"
        assert asked(simulation, name, "earnings", since_ns=row["time_ns"] + 1)["earnings"] == []
        simulation.crash(name, for_ns=SECOND)
    simulation.run(seconds=4)
    assert asked(simulation, "bob", "earnings")["earnings"][0]["micro"] == 60_000
    assert asked(simulation, "alice", "earnings")["earnings"] == []


# --- the command line ----------------------------------------------------------------------------------------
PAUSING = {"paused_since_ns": 0, "paused_by": "", "paused_why": "", "finishing_since_ns": 0, "unfinished": 0}


def test_start_writes_the_rules_and_wakes_a_running_daemon(tmp_path: Path) -> None:
    home = made_home(tmp_path)
    with answering(home) as fake:
        fake.answers["finish"] = lambda _: {"already": False, **PAUSING}
        told = ichiba(home, "earn", "start", "--schedule", "22:00-07:00 mon-fri", "--gpu-max", "80", "--json")
        assert told.exit_code == 0, told.output
        (line,) = lines(told)
        assert (line["schema"], len(line["rules"])) == ("ichiba.earn/1", 2)
        assert [verb for verb, _ in fake.seen] == ["resume", "finish"] and fake.seen[1][1] == {"on": False}
        ichiba(home, "earn", "start", "--battery", "30", "--load-max", "0.5", "--kwh-price", "0.3")
        rules = read_rules((home / "earn.toml").read_text())
        assert (rules.gpu_celsius_max, rules.battery, rules.kwh_micro) == (80, 30, 300_000), "given before and now"
        bad = ichiba(home, "earn", "start", "--gpu-max", "9000")
        assert bad.exit_code == 2 and read_rules((home / "earn.toml").read_text()) == rules
        ichiba(home, "earn", "start", "--no-rules")
        assert (home / "earn.toml").read_text() == ""


def test_finish_and_status_say_how_far_it_is(tmp_path: Path) -> None:
    home = made_home(tmp_path)
    with answering(home) as fake:
        fake.answers["finish"] = lambda _: {"already": False, **PAUSING, "finishing_since_ns": 5, "unfinished": 2}
        assert "2 deals and checks are left" in ichiba(home, "earn", "finish").stdout
        paused = {"paused_since_ns": 1, "paused_by": "battery", "paused_why": "the machine runs on its battery"}
        fake.answers["status"] = lambda _: {**STATUS, **PAUSING, **paused, "finishing_since_ns": 5}
        told = ichiba(home, "status").stdout
    assert "by the rule battery: the machine runs on its battery" in told and "all is finished" in told


def test_the_report_takes_electricity_off_and_says_what_is_only_configured(tmp_path: Path) -> None:
    home, today = made_home(tmp_path), date.today().isoformat()
    (home / "earn.toml").write_text('watts = 100\nkwh_price = "0.30"')
    book = EnergyBook()
    for _ in range(360):
        book.add(today, 10, configured_w=100, measured_w=None)
    write_book(home / "energy.json", book)
    with answering(home) as fake:
        paid = {"time_ns": int(time.time() * 1e9), "deal": "cd" * 32, "role": "solver", "micro": 50_000}
        fake.answers["earnings"] = lambda _: {"earnings": [paid]}
        told = ichiba(home, "earn", "report", "--days", "2", "--json")
        yesterday, row = lines(told)
        assert (yesterday["earned_micro"], yesterday["net_micro"]) == (0, 0)
        assert (row["earned_micro"], row["energy_wh"]) == (50_000, 100)
        assert (row["cost_micro"], row["net_micro"]) == (30_000, 20_000)
        assert row["energy_source"] == "configured"
        assert "configured, not measured" in ichiba(home, "earn", "report").stdout
        (home / "earn.toml").unlink()
        shown = ichiba(home, "earn", "report")
        assert shown.exit_code == 0 and "--kwh-price" in shown.stdout


def test_rules_are_shown_with_what_is_read_and_what_cannot(tmp_path: Path) -> None:
    home = made_home(tmp_path)
    (home / "earn.toml").write_text('schedule = "00:00-24:00"')
    told = ichiba(home, "earn", "rules")
    assert told.exit_code == 0 and "00:00-24:00" in told.stdout and "now it would work" in told.stdout
    (line,) = lines(ichiba(home, "earn", "rules", "--json"))
    assert line["schema"] == "ichiba.earn.rules/1" and "load" in line["reading"]
