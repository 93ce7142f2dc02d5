"""A parallel job typed at the command line: how its tensors travel follows from the links that the daemon knows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from peer.simulator import Simulation
from protocol import params
from protocol.codec import encode
from protocol.keys import peer_name
from protocol.link_report import LinkReport, MeasuredLink
from protocol.stage import Codec, Stage
from protocol.task import TaskSpec
from tests.cli_scene import ichiba, lines, serve
from tests.fake_daemon import FakeDaemon
from tests.run_scene import make_run_swarm
from tests.test_prepare_parallel import JOB, MODEL

pytestmark = pytest.mark.usefixtures("captured_once")
SECOND_NS = 10**9
VERBS = ("status", "book", "plan-run", "submit-run", "quote", "links")
AUTO = JOB.replace('compress = "none"\n', "").replace("replicas = 1", "replicas = 2")


def report_links(simulation: Simulation, names: Iterable[str], *, delay_us: int, bytes_per_second: int) -> None:
    """Every pair of these peers told alice of its link."""
    node = simulation.peers["alice"].node
    assert node is not None
    said: dict[bytes, list[MeasuredLink]] = {}
    for one, other in combinations([simulation.peers[name].key.public for name in names], 2):
        said.setdefault(one, []).append(MeasuredLink(other, delay_us, bytes_per_second))
    now = node.desk.wall_ns
    for peer, links in said.items():
        report = LinkReport(
            network=simulation.network.id, peer=peer, sequence=now + delay_us,
            links=tuple(sorted(links, key=lambda link: link.peer)), created_ns=now,
            expires_ns=now + params.LINK_REPORT_LIFETIME_NS,
        )  # fmt: skip
        assert node.commands.links.table.take(report, now_ns=now)


@pytest.fixture
def swarm(daemon: FakeDaemon) -> Simulation:
    """alice and five solvers, whose asks she heard; she answers behind the socket."""
    simulation = make_run_swarm(3, solvers=5)
    simulation.run(seconds=5)
    serve(daemon, simulation, "alice", verbs=VERBS)
    return simulation


def write(folder: Path, text: str = AUTO) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_text(MODEL.replace("DROPOUT", "0.1"))
    (folder / "job.toml").write_text(text)
    return folder


def submitted(home: Path, job: Path, daemon: FakeDaemon, *words: str) -> tuple[dict[str, Any], list[Stage], str]:
    """Submit it: the plan that was told, the stages of the tasks that were offered, and what people read."""
    told = ichiba(home, "submit", str(job), "--budget", "50", "--detach", "--json", *words)
    assert told.exit_code == 0, told.output
    plan, made = lines(told)
    assert (plan["schema"], made["schema"]) == ("ichiba.run-plan/1", "ichiba.job/1")
    arguments = [arguments for verb, arguments in daemon.seen if verb == "submit-run"][-1]
    network = bytes.fromhex(daemon.answers["status"]({})["network_id"])
    tasks = [TaskSpec.from_bytes(bytes.fromhex(unit["task"]), network=network) for unit in arguments["units"]]
    assert all(encode(task).hex() == unit["task"] for task, unit in zip(tasks, arguments["units"], strict=True))
    stages = [task.stage for task in tasks if task.stage is not None]
    assert len(arguments["border_bytes"]) == stages[0].stages - 1
    assert len(arguments["shared_bytes"]) == (stages[0].stages if stages[0].replicas > 1 else 0)
    return plan, stages, told.stderr


def test_what_nobody_measured_is_guessed_and_the_usual_is_taken(
    daemon: FakeDaemon, home: Path, swarm: Simulation, tmp_path: Path
) -> None:
    plan, stages, words = submitted(home, write(tmp_path / "job"), daemon)
    assert plan["guessed"] and (plan["links_known"], plan["links_used"]) == (0, 4)
    assert (plan["compress"], plan["sync"], plan["share"]) == (["4/8"], "local", "tile 4")
    assert {(s.forward, s.backward, s.sync, s.shared) for s in stages} == {
        (Codec("tile", 4), Codec("tile", 8), "local", Codec("tile", 4))
    }
    assert "as usual: nobody measured the links yet, so 50 ms and 10 Mbit/s are guessed" in words


def test_fast_links_that_peers_reported_lead_to_float32_and_slow_ones_do_not(
    daemon: FakeDaemon, home: Path, swarm: Simulation, tmp_path: Path
) -> None:
    job, solvers = write(tmp_path / "job"), [f"s{i}" for i in range(5)]
    report_links(swarm, solvers, delay_us=1, bytes_per_second=10**10)
    plan, stages, words = submitted(home, job, daemon)
    assert not plan["guessed"] and plan["links_known"] == plan["links_used"] == 4
    assert (plan["compress"], plan["sync"], plan["share"]) == (["none"], "step", "none")
    assert {(s.forward, s.backward, s.sync, s.shared) for s in stages} == {
        (Codec("float32"), Codec("float32"), "step", Codec("float32"))
    }
    names = {peer_name(swarm.peers[name].key.public) for name in solvers}
    assert len(set(plan["peers"])) == 4 and set(plan["peers"]) <= names
    assert "the least lossy within 10 % of the quickest" in words and "a step is modelled at" in words
    fast = plan["step_s"]
    report_links(swarm, solvers, delay_us=50, bytes_per_second=1000)
    plan, _, _ = submitted(home, job, daemon)
    assert (plan["compress"], plan["sync"], plan["share"]) == (["4/8"], "local", "tile 4")
    assert plan["step_s"] > fast
    by_way = {way["compress"]: way["step_s"] for way in plan["by_compress"]}
    assert by_way["none"] > by_way["8/8"] > by_way["4/8"] > by_way["2/4"]
    assert [way["automatic"] for way in plan["by_compress"]] == [True, True, True, False]
    assert plan["quickest_s"] <= plan["step_s"] <= 1.1 * plan["quickest_s"]


def test_one_replica_shares_with_nobody(daemon: FakeDaemon, home: Path, swarm: Simulation, tmp_path: Path) -> None:
    plan, stages, words = submitted(home, write(tmp_path / "job", AUTO.replace("replicas = 2", "replicas = 1")), daemon)
    assert (plan["sync"], plan["share"], plan["by_share"]) == ("none", "none", [])
    assert {(s.sync, s.shared) for s in stages} == {("none", Codec("float32"))}
    assert words.splitlines()[1].startswith('compress = "4/8": as usual')


def test_what_job_toml_says_is_taken_over_any_links(
    daemon: FakeDaemon, home: Path, swarm: Simulation, tmp_path: Path
) -> None:
    report_links(swarm, [f"s{i}" for i in range(5)], delay_us=1, bytes_per_second=10**10)
    said = AUTO.replace("replicas = 2", 'replicas = 2\ncompress = "tile 2/4"\nsync = "local"\nshare = "sparse"')
    plan, stages, _ = submitted(home, write(tmp_path / "job", said), daemon)
    assert (plan["compress"], plan["sync"], plan["share"]) == (["2/4"], "local", "sparse")
    assert {(s.forward, s.backward, s.shared) for s in stages} == {
        (Codec("tile", 2), Codec("tile", 4), Codec("sparse", 2))
    }


def test_units_that_are_kept_are_planned_on_this_peer(
    daemon: FakeDaemon, home: Path, swarm: Simulation, tmp_path: Path
) -> None:
    keep = AUTO.replace("stages = 2", "stages = 3").replace(
        "[parallel]", '[privacy]\nkeep = ["first", "last"]\n[parallel]'
    )
    report_links(swarm, ["alice", *(f"s{i}" for i in range(5))], delay_us=1, bytes_per_second=10**10)
    plan, _, _ = submitted(home, write(tmp_path / "job", keep), daemon)
    me = peer_name(swarm.peers["alice"].key.public)
    assert [peer == me for peer in plan["peers"]] == [True, True, False, False, True, True]
    assert plan["links_used"] == plan["links_known"] == 5, "two within one peer are no links"
    assert plan["compress"] == ["none", "none"]


def test_where_too_few_ask_the_rest_is_a_guess_and_said_to_be(
    daemon: FakeDaemon, home: Path, tmp_path: Path
) -> None:
    simulation = make_run_swarm(4, solvers=2)
    simulation.run(seconds=5)
    serve(daemon, simulation, "alice", verbs=VERBS)
    report_links(simulation, ["s0", "s1"], delay_us=1, bytes_per_second=10**10)
    plan, _, words = submitted(home, write(tmp_path / "job"), daemon)
    assert sorted(map(bool, plan["peers"])) == [False, False, True, True]
    assert plan["links_known"] == 1 and plan["links_used"] == 4
    assert "3 of 4 guessed at 50 ms and 10 Mbit/s" in words


def test_a_quote_of_a_parallel_job_is_of_one_of_its_units_and_tells_the_plan(
    daemon: FakeDaemon, home: Path, swarm: Simulation, tmp_path: Path
) -> None:
    told = ichiba(home, "quote", str(write(tmp_path / "job")), "--json")
    assert told.exit_code == 0, told.output
    plan, found = lines(told)
    assert (plan["schema"], found["schema"]) == ("ichiba.run-plan/1", "ichiba.quote/1")
    assert (found["units"], found["solvers"]) == (4, 5)
    assert "one of 4 units" in told.stderr


def test_sizes_that_do_not_fit_are_refused_by_the_daemon(swarm: Simulation) -> None:
    sizes = {
        "replicas": 1, "micro_batches": 1, "steps": 1, "steps_per_segment": 1, "operations": [1, 1], "shares": [],
        "compressions": [{"forward_bits": 0, "backward_bits": 0}], "border_bytes": [], "shared_bytes": [],
    }  # fmt: skip
    for wrong in ({}, {"sizes": sizes}, {"sizes": {**sizes, "replicas": 0}}):
        error = swarm.command("alice", "plan-run", wrong).error
        assert error is not None and error["code"] == "usage"
    right = swarm.command("alice", "plan-run", {"sizes": {**sizes, "border_bytes": [[[5, 5]]]}})
    assert right.error is None and right.result["choice"]["compressions"] == [0]
