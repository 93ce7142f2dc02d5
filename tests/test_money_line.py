"""One money line: the submitter's, the solver's and the proof's are the same, from the first receipt to the last."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from peer.simulator import Faults, Simulation
from peer.turns import readable
from protocol.bundle import make_bundle, verify_bundle
from protocol.money_line import MoneyLine
from protocol.network import dump
from tests.cli_scene import ichiba, lines
from tests.fake_daemon import FakeDaemon, running
from tests.swarm_scenario import job_state, make_swarm, submit

CALM = Faults(until_ns=0)


def evidence_of(simulation: Simulation, job: str) -> dict[str, Any]:
    found: dict[str, Any] = readable(simulation.command("alice", "bundle", {"job": job}).result)
    return found


def proved(simulation: Simulation, job: str) -> MoneyLine:
    bundle = make_bundle(evidence_of(simulation, job), network=dump(simulation.network), state={})
    return verify_bundle(bundle, simulation.network.id).money


def finished(cheat: str = "") -> tuple[Simulation, str]:
    simulation = make_swarm(2, CALM, cheat=cheat)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=900, until=lambda: job_state(simulation, job).get("state") == "done")
    simulation.run(seconds=60)
    return simulation, job


def test_the_line_grows_with_receipts_checks_and_the_settlement() -> None:
    simulation = make_swarm(1, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    seen = []
    for segments in (1, 6):
        simulation.run(seconds=60, until=lambda want=segments: job_state(simulation, job).get("segments_done") == want)
        seen.append(MoneyLine(**simulation.command("alice", "job", {"job": job}).result["money"]))
        assert proved(simulation, job) == seen[-1]
    assert seen == [MoneyLine(10_000), MoneyLine(60_000)]
    simulation.run(seconds=60, until=lambda: job_state(simulation, job).get("state") == "done")
    simulation.run(seconds=30)
    final = MoneyLine(60_000, 60_000, 60_000, 60_000)
    assert MoneyLine(**simulation.command("alice", "job", {"job": job}).result["money"]) == final
    assert MoneyLine(**simulation.command("bob", "wallet", {}).result["money"]) == final
    assert proved(simulation, job) == final
    assert final.words() == "earned 0.06, accepted 0.06, settled 0.06, spendable 0.06 credits"


def test_slashed_work_is_earned_by_receipts_but_neither_accepted_nor_settled() -> None:
    simulation, job = finished(cheat="skip-step")
    line = MoneyLine(**simulation.command("alice", "job", {"job": job}).result["money"])
    assert line == MoneyLine(60_000 + 66_000, 66_000, 66_000, 66_000)
    assert proved(simulation, job) == line


def test_receipts_are_exported_as_they_were_signed(tmp_path: Path) -> None:
    simulation, job = finished()
    network = tmp_path / "market.toml"
    network.write_text(dump(simulation.network))
    home = tmp_path / "home"
    assert ichiba(home, "init", "--network", str(network)).exit_code == 0
    out = tmp_path / "out"

    def prepare(daemon: FakeDaemon) -> None:
        daemon.answers["bundle"] = lambda _: evidence_of(simulation, job)
        daemon.answers["jobs"] = lambda _: readable(simulation.command("alice", "jobs", {}).result)

    with running(home, prepare) as daemon:
        (told,) = lines(ichiba(home, "receipts", "export", job[:8], str(out), "--json"))
        assert (told["jobs"], told["receipts"]) == (1, 6)
        (exported,) = json.loads(out.read_text())["jobs"]
        assert exported["money"]["settled_micro"] == 60_000
        assert [row["segment"] for row in exported["receipts"]] == list(range(6))
        assert verify_bundle(exported["proof"], simulation.network.id).money == MoneyLine(**exported["money"])
        proof = tmp_path / "proof.json"
        proof.write_text(json.dumps(exported["proof"]))
        verified = ichiba(home, "receipts", "verify", str(proof))
        assert "earned 0.06, accepted 0.06, settled 0.06, spendable 0.06 credits" in verified.stdout
        assert ichiba(home, "receipts", "export", "--all", "--format", "csv", str(out)).exit_code == 0
        rows = list(csv.DictReader(out.read_text().splitlines()))
        assert [int(row["cumulative_micro"]) for row in rows] == [10_000 * n for n in range(1, 7)]
        assert ichiba(home, "receipts", "export", str(out)).exit_code == 2
        forged = evidence_of(simulation, job)
        receipt = bytearray.fromhex(forged["deals"][0]["receipts"][2])
        receipt[-1] ^= 1
        forged["deals"][0]["receipts"][2] = receipt.hex()
        daemon.answers["bundle"] = lambda _: forged
        before = out.read_text()
        refused = ichiba(home, "receipts", "export", job[:8], str(out))
        assert (refused.exit_code, "does not verify" in refused.stderr) == (1, True)
        assert out.read_text() == before
