"""The demonstration on real processes: a whole job, a cheat, a cheating unit, a solver that dies, and nothing left."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from peer.lan import Lan, born

pytestmark = [pytest.mark.swarm, pytest.mark.slow]
STEPS = 30  # ten segments of three steps, about half a second each
SECONDS_MAX = 600  # a run takes 25-35 s on two idle cores; a hang ends here, and its swarm with it


def ichiba(*words: str) -> subprocess.CompletedProcess[str]:
    """One command, as a person types it."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "peer.cli", *words],
        capture_output=True, text=True, timeout=SECONDS_MAX, check=False,
    )  # fmt: skip


@cache
def demo(*words: str) -> tuple[dict[str, Any], str]:
    """The JSON line and the story of one demonstration that succeeded."""
    done = ichiba("swarm", "demo", "--json", "--steps", str(STEPS), *words)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    line = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(line, dict)
    return line, done.stderr


def check_common(line: dict[str, Any]) -> None:
    """What every demonstration must come to."""
    assert (line["state"], line["steps"], line["segments"]) == ("done", STEPS, 10)
    assert line["params"] >= 1_000_000
    assert line["loss_last"] < line["loss_first"] - 1
    assert line["segments_checked"] >= 2
    assert line["verdict"] == "right"
    assert line["conserved"] is True
    assert line["proof_verified"] is True
    assert line["paid_micro"] > 0
    assert all(1000 <= ms < 10_000 for ms in line["agreed_ms"]), "a matching round, and little more"


def test_five_peers_train_check_pay_and_settle() -> None:
    line, story = demo("--notaries", "0")
    check_common(line)
    assert (line["retried"], len(line["agreed_ms"])) == (0, 1)
    assert story.count("\npaid ") == 10
    assert "match      solver-1" in story, "the cheaper solver gets the work"
    assert "5 ledgers are identical" in story
    assert "verdict    verifier: right" in story
    assert "verdict    whistleblower: right" in story
    assert "what the trained model writes" in story


def test_a_cheat_is_caught_slashed_and_replaced() -> None:
    line, story = demo("--cheat", "skip-step")
    check_common(line)
    assert line["culprit"] == "solver-1"
    assert line["slashed"] > 5 * line["paid_micro"] // 2, "the lock is a multiple of the price"
    assert line["retried"] >= 1
    assert "WRONG" in story
    assert "9 ledgers are identical" in story, "five peers and four notaries"
    assert (line["dispute"]["finding"], line["dispute"]["cause"]) == ("wrong", "leaf")
    assert line["dispute"]["message_bytes"] < 50_000
    assert line["dispute"]["opening_bytes"] <= 200 * 1024
    assert story.count(" rules wrong ") >= 3
    assert "the solver loses by the referee's own result at the leaf" in story
    assert line["final_root"] == demo("--notaries", "0")[0]["final_root"], (
        "the same model comes out as if nobody had cheated"
    )


def test_a_killed_solver_is_paid_and_another_goes_on_from_its_checkpoint() -> None:
    line, story = demo("--kill", "solver", "--notaries", "0")
    check_common(line)
    assert line["killed"] == "solver-1"
    assert line["solvers_paid"] == ["solver-1", "solver-2"]
    assert "again      from segment 0" not in story, "what was agreed is not done twice"
    assert "4 ledgers are identical" in story
    assert line["final_root"] == demo("--notaries", "0")[0]["final_root"], (
        "the same model comes out as if nobody had died"
    )


def test_a_swarm_goes_up_answers_and_goes_down_for_good(tmp_path: Path) -> None:
    where = str(tmp_path / "lan")
    up = ichiba("swarm", "up", "--peers", "4", "--notaries", "0", "--dir", where, "--json")
    try:
        assert up.returncode == 0, up.stderr
        started = json.loads(up.stdout.splitlines()[-1])
        assert [one["name"] for one in started["peers"]] == ["submitter", "solver-1", "verifier", "whistleblower"]
        assert len(Lan.load(tmp_path / "lan").running()) == 4
        twice = ichiba("swarm", "up", "--dir", where)
        assert (twice.returncode, "runs in" in twice.stderr) == (1, True)
        wallet = ichiba("--data", started["peers"][0]["data"], "wallet", "--json")
        assert json.loads(wallet.stdout.splitlines()[-1])["free_micro"] == 1000 * 10**6
    finally:
        down = ichiba("swarm", "down", "--dir", where, "--json")
    assert json.loads(down.stdout)["stopped"] == 4
    for one in started["peers"]:
        assert born(one["pid"]) is None
    again = ichiba("swarm", "down", "--dir", where, "--json")
    assert (again.returncode, json.loads(again.stdout)["stopped"]) == (0, 0)


def test_a_cheating_unit_is_found_named_and_slashed_and_the_run_comes_to_its_end() -> None:
    done = ichiba("swarm", "demo", "--parallel", "2x1", "--cheat", "skip-backward", "--json")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["failures"] == [] and line["cheat"] == "skip-backward"
    (caught,) = line["caught"]
    assert caught["solver"] == "solver-1" and caught["cheat"] == "skip-backward"
    assert caught["stage"] in (0, 1) and caught["replica"] == 0
    assert 1 <= caught["segment"] < line["segments"], "the first segment of a cheat is honest"
    assert len(set(caught["checkers"])) >= 2 and "solver-1" not in caught["checkers"]
    assert line["slashed_micro"] > 0 and line["rewinds"] == 1
    assert line["proofs"] == 2, "the weights of both stages are here, with a proof each"
    assert line["paid_micro"] > 0
    told = f"Caught: solver-1 had stage {caught['stage']} of replica 0, and its segment {caught['segment']} is wrong"
    assert done.stderr.count(told) == 2, "when it is known, and at the end"
    assert "lost" in done.stderr.splitlines()[-1]
