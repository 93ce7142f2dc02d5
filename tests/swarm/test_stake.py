"""Real processes: a newcomer without a deposit is paid for a script, stakes that, wins checked work, and unstakes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from peer.lan import Lan, Member
from protocol.records import ROLE_SOLVER, ROLE_VERIFIER, ROLE_WHISTLEBLOWER
from tests.swarm.test_jobs import JOB, MODEL, SECONDS_MAX
from worker.sandbox import Level, probe

pytestmark = [pytest.mark.swarm, pytest.mark.slow]
SCRIPT = """
kind = "script"
file = "wait.py"
seconds = 30
memory = "128MiB"
outputs = "1MiB"
seed = 1
replicas = 1
budget = "1.00"
price = 15000
"""
WAIT = "import time\ntime.sleep(3)\nopen('/outputs/said', 'w').write('so')\n"
MEMBERS = (
    Member(name="submitter", roles=0, free_micro=50_000_000, stake_micro=0),
    Member(name="newcomer", roles=ROLE_SOLVER, unit_price=1200, stake_micro=0),
    Member(name="verifier", roles=ROLE_VERIFIER, unit_price=1200),
    Member(name="whistleblower", roles=ROLE_WHISTLEBLOWER),
)
Ichiba = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def ichiba(tmp_path: Path) -> Iterator[Ichiba]:
    """A command of one peer, by its name, as a person types it with --json; the lines of its answer."""
    if trio.run(probe).level < Level.CONTAINED:
        pytest.skip("scripts run at CONTAINED only, and this machine does not prove it")
    lan = Lan.create(tmp_path / "lan", MEMBERS, seed=1)
    release = lan.guard(remove=False)

    def run(name: str, *words: str) -> list[dict[str, Any]]:
        told = subprocess.run(
            [sys.executable, "-P", "-m", "peer.cli", "--data", str(tmp_path / "lan" / name), *words, "--json"],
            capture_output=True, text=True, timeout=SECONDS_MAX, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert told.returncode == 0, f"{words}: {told.stdout[-2000:]}\n{told.stderr}"
        return [json.loads(line) for line in told.stdout.splitlines()]

    try:
        lan.start()
        lan.meet(seconds=SECONDS_MAX)
        yield run
    finally:
        lan.stop()
        release()


def test_a_newcomer_earns_stakes_and_wins_work_that_is_checked(ichiba: Ichiba, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "wait.py").write_text(WAIT)
    (tmp_path / "script.toml").write_text(SCRIPT)
    train = JOB.format(kind="train", build="train", initial="seed", rule="rows")
    (tmp_path / "train.toml").write_text(f"{train}[learning_rate]\npeak = 0.05\n")
    (why,) = [line for line in ichiba("newcomer", "why", "me") if line["schema"].startswith("ichiba.why")]
    assert "ichiba wallet stake" in json.dumps(why)
    ichiba("submitter", "submit", "script.toml", "--timeout", str(SECONDS_MAX))
    (wallet,) = ichiba("newcomer", "wallet")
    earned = wallet["free_micro"]
    assert earned >= 3 * 1200 and wallet["stake_micro"] == 0
    (moved,) = ichiba("newcomer", "wallet", "stake", f"{earned / 10**6:.6f}")
    assert (moved["state"], moved["stake_micro"], moved["free_micro"]) == ("done", earned, 0)
    ended = ichiba("submitter", "submit", "train.toml", "--timeout", str(SECONDS_MAX))
    job = [line for line in ended if line["schema"] == "ichiba.job/1"][-1]["job"]
    (shown,) = [line for line in ichiba("submitter", "job", "show", job) if line["schema"] == "ichiba.job/1"]
    (deal,) = shown["deals"]
    assert shown["state"] == "done" and deal["lock_micro"] > 0 and deal["checks"]
    (wallet,) = ichiba("newcomer", "wallet")
    assert deal["solver"] == wallet["peer"] and wallet["free_micro"] > 0
    assert wallet["stake_micro"] == earned, "its lock is back"
    (out,) = ichiba("newcomer", "wallet", "unstake", "0.002")
    assert (out["state"], out["unbonding_micro"], out["stake_micro"]) == ("done", 2000, earned - 2000)
    for name in ("submitter", "verifier"):  # what everybody's ledger says of it
        (theirs,) = [line for line in ichiba(name, "wallet", "--all") if line["schema"] == "ichiba.wallet/1"]
        assert {row["stake_micro"] for row in theirs["table"]["rows"]} >= {earned - 2000}
