"""A peer whose owner wants the machine back: what it promises, what it tells the others, and what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peer.cli_events import line_of
from peer.simulator import SECOND, Faults, Simulation
from tests.cli_scene import STATUS, ichiba, lines
from tests.fake_daemon import FakeDaemon
from tests.swarm_scenario import RULES, job_state, make_swarm, submit
from tests.test_simulation import finish

CALM = Faults(until_ns=0)


def asked(simulation: Simulation, name: str, verb: str, **arguments: Any) -> dict[str, Any]:
    reply = simulation.command(name, verb, arguments)
    assert reply.error is None
    return reply.result


def working(seed: int) -> tuple[Simulation, str]:
    """Bob, the cheaper solver, has done two of six segments."""
    simulation = make_swarm(seed, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=60, until=lambda: job_state(simulation, job).get("segments_done") == 2)
    return simulation, job


def kinds(simulation: Simulation, name: str) -> list[str]:
    return [kind for _, who, kind, _ in simulation.log if who == name]


@pytest.mark.parametrize("crash", [False, True])
def test_a_short_pause_costs_no_deal_even_over_a_crash(crash: bool) -> None:
    simulation, job = working(1)
    silence_ns = RULES.segment_silence_ms * 10**6
    paused = asked(simulation, "bob", "pause", within_ms=1000)
    assert not paused["already"]
    (work,) = paused["paused_works"]
    assert work["kind"] == "deal"
    assert simulation.now_ns < work["lost_after_ns"] <= simulation.now_ns + silence_ns
    if crash:
        simulation.crash("bob", for_ns=3 * SECOND)  # back before lost_grace_ms is over
        simulation.run(seconds=4)
    simulation.run(seconds=40)
    status = asked(simulation, "bob", "status")
    assert status["paused_since_ns"] == paused["paused_since_ns"]
    assert status["paused_works"] == paused["paused_works"]
    assert job_state(simulation, job)["segments_done"] == 2, "nothing is done meanwhile"
    resumed = asked(simulation, "bob", "resume")
    assert (resumed["resumed"], resumed["works"]) == (True, 1)
    assert resumed["paused_for_ns"] >= 40 * SECOND
    before = asked(simulation, "bob", "status")["operations_per_second"]
    simulation.run(seconds=30, until=lambda: job_state(simulation, job)["segments_done"] == 3)
    assert asked(simulation, "bob", "status")["operations_per_second"] == before, "a cut segment measures no speed"
    state = finish(simulation, job)
    assert (state["state"], state["retried"], state["paid_micro"]) == ("done", 0, 60_000)
    assert {"solver-paused", "solver-resumed"} <= set(kinds(simulation, "alice"))
    straight = make_swarm(9, CALM)
    straight.run(seconds=3)
    assert finish(straight, submit(straight))["final_root"] == state["final_root"]


def test_the_deal_is_lost_when_the_pause_said_it_would_be_and_not_before() -> None:
    simulation, job = working(2)
    (work,) = asked(simulation, "bob", "pause")["paused_works"]
    left = (work["lost_after_ns"] - simulation.now_ns) / SECOND
    simulation.run(seconds=left - 1)
    assert "lost" not in kinds(simulation, "alice")
    state = finish(simulation, job)
    assert "lost" in kinds(simulation, "alice")
    deals = state["deals"]
    assert isinstance(deals, list)
    assert [deal["paid_micro"] for deal in deals] == [20_000, 44_000], "bob's two segments, carol's four"
    assert state["slashed_micro"] == 0
    assert asked(simulation, "bob", "status")["paused_works"] == []
    assert asked(simulation, "bob", "resume")["works"] == 0


def test_saying_that_it_is_paused_buys_a_solver_no_time() -> None:
    simulation, _ = working(3)
    (work,) = asked(simulation, "bob", "pause")["paused_works"]
    while simulation.now_ns < work["lost_after_ns"] + 2 * SECOND:
        simulation.run(seconds=5)
        asked(simulation, "bob", "resume")
        node = simulation.peers["bob"].node
        assert node is not None
        node.solver.working.clear()  # an owner who toggles, and a worker that never gets anywhere
        simulation.peers["bob"].working.clear()
        asked(simulation, "bob", "pause")
    simulation.run(seconds=3)
    assert "lost" in kinds(simulation, "alice")


def test_a_paused_peer_seeks_no_work_and_says_why() -> None:
    simulation = make_swarm(4, CALM)
    simulation.run(seconds=3)
    asked(simulation, "bob", "pause")
    simulation.run(seconds=3)
    bob = asked(simulation, "bob", "status")["peer"]
    for name in ("bob", "alice"):
        assert all(a["peer"] != bob for a in asked(simulation, name, "book")["asks"]), "its ask is withdrawn"
    job = submit(simulation)
    simulation.run(seconds=10, until=lambda: "no-bid" in kinds(simulation, "bob"))
    (offer,) = asked(simulation, "bob", "book")["offers"]
    assert offer["no_bid"]["code"] == "paused"
    assert "ichiba resume" in offer["no_bid"]["why"]
    state = finish(simulation, job)
    assert state["paid_micro"] == 66_000, "carol, the dearer one, had the job"
    asked(simulation, "bob", "resume")
    simulation.run(seconds=3)
    assert any(a["peer"] == bob for a in asked(simulation, "alice", "book")["asks"])


def test_a_proposal_on_a_bid_from_before_the_pause_is_declined() -> None:
    simulation = make_swarm(5, CALM)
    simulation.run(seconds=3)
    job = submit(simulation)
    simulation.run(seconds=10, until=lambda: "bid" in kinds(simulation, "bob"))
    asked(simulation, "bob", "pause")
    state = finish(simulation, job)
    assert (state["state"], state["paid_micro"]) == ("done", 66_000)
    declined = [data for _, who, kind, data in simulation.log if (who, kind) == ("alice", "refused")]
    assert [data["code"] for data in declined] == ["paused"]


def test_a_checker_that_is_paused_declines_or_goes_on_where_it_was() -> None:
    simulation, job = working(6)
    simulation.run(seconds=60, until=lambda: "case" in kinds(simulation, "victor"))
    paused = asked(simulation, "victor", "pause")
    assert [work["kind"] for work in paused["paused_works"]] == ["check"]
    simulation.run(seconds=20)
    assert "checked" not in kinds(simulation, "victor")
    assert asked(simulation, "victor", "resume")["works"] == 1
    state = finish(simulation, job)
    assert (state["state"], state["retried"]) == ("done", 0)
    asked(simulation, "victor", "pause")
    second = submit(simulation)
    simulation.run(seconds=60)
    assert job_state(simulation, second)["segments_done"] == 6
    assert kinds(simulation, "victor").count("case") == 1, "a paused verifier is not even asked"
    asked(simulation, "victor", "resume")
    assert finish(simulation, second)["state"] == "done"


def test_pausing_twice_resuming_unpaused_and_pausing_idle_are_no_errors() -> None:
    simulation = make_swarm(7, CALM)
    simulation.run(seconds=3)
    assert asked(simulation, "bob", "resume") == {"resumed": False, "paused_for_ns": 0, "works": 0}
    first = asked(simulation, "bob", "pause")
    assert (first["already"], first["paused_works"]) == (False, [])
    simulation.run(seconds=2)
    again = asked(simulation, "bob", "pause")
    assert (again["already"], again["paused_since_ns"]) == (True, first["paused_since_ns"])
    assert asked(simulation, "bob", "resume")["resumed"]
    assert not asked(simulation, "bob", "resume")["resumed"]


@pytest.mark.parametrize("seed", range(12))
def test_pauses_at_any_moment_break_nothing(seed: int) -> None:
    simulation = make_swarm(seed, Faults.drawn_from(seed))
    simulation.run(seconds=3)
    while simulation.peers["alice"].node is None:
        simulation.run(seconds=3)
    job = submit(simulation)
    for _ in range(12):
        name = simulation.rng.choice(("bob", "carol", "victor", "wendy"))
        if simulation.peers[name].node is not None:
            asked(simulation, name, "pause")
        simulation.run(seconds=simulation.rng.choice((0.1, 2, 9)))
        if simulation.peers[name].node is not None:
            asked(simulation, name, "resume")
        simulation.run(seconds=simulation.rng.choice((0.1, 3)))
    simulation.run(seconds=9)
    for name in ("bob", "carol", "victor", "wendy"):
        asked(simulation, name, "resume")
    state = finish(simulation, job)
    assert (state["state"], state["slashed_micro"]) == ("done", 0), f"seed {seed}: {state['reason']}"


# --- the command line --------------------------------------------------------------------------------------
WORKS = [
    {"work": "ab" * 32, "kind": "deal", "lost_after_ns": 2**62},
    {"work": "cd" * 32, "kind": "check", "lost_after_ns": 1},
]
PAUSED: dict[str, Any] = {
    "already": False, "paused_since_ns": 10**18, "paused_works": WORKS, "freed_ms": 234,
    "fates": {
        "ab" * 32: {"fate": "kept", "why": "", "segment": 1, "step": 33, "bytes": 12914000},
        "cd" * 32: {"fate": "restarts", "why": "its worker did not hand over its state in 10 s"},
        "ef" * 32: {"fate": "finished", "why": ""},
    },
}  # fmt: skip


def test_pause_says_what_became_of_each_work_and_how_long_it_may_last(daemon: FakeDaemon, home: Path) -> None:
    daemon.answers["pause"] = lambda _: PAUSED
    told = ichiba(home, "pause")
    assert told.exit_code == 0
    assert "3 workers ended, their memory free after 0.23 s" in told.stdout
    assert "deal abababababab stands after step 33, 12.3 MiB kept; resume by " in told.stdout
    assert "check cdcdcdcdcdcd starts again from its last checkpoint: its worker did not hand over" in told.stdout
    assert "may have given it up" in told.stdout
    assert "work efefefefefef was finished first" in told.stdout
    assert daemon.seen[-1] == ("pause", {"within_ms": 10_000})
    (line,) = lines(ichiba(home, "pause", "--within", "5", "--json"))
    assert daemon.seen[-1] == ("pause", {"within_ms": 5000})
    assert line == {"schema": "ichiba.pause/1", **PAUSED}


def test_pause_and_resume_answer_clearly_when_there_is_nothing_to_do(daemon: FakeDaemon, home: Path) -> None:
    daemon.answers["pause"] = lambda _: {**PAUSED, "fates": {}, "paused_works": []}
    assert "no work was running" in ichiba(home, "pause").stdout
    daemon.answers["pause"] = lambda _: {**PAUSED, "already": True}
    told = ichiba(home, "pause")
    assert (told.exit_code, told.stdout.startswith("paused already, since 2001-09-09")) == (0, True)
    daemon.answers["resume"] = lambda _: {"resumed": False, "paused_for_ns": 0, "works": 0}
    told = ichiba(home, "resume")
    assert (told.exit_code, told.stdout) == (0, "this peer is not paused\n")
    daemon.answers["resume"] = lambda _: {"resumed": True, "paused_for_ns": 65 * 10**9, "works": 2}
    assert "after 1 min 5 s; 2 works go on" in ichiba(home, "resume").stdout
    assert lines(ichiba(home, "resume", "--json"))[0]["schema"] == "ichiba.resume/1"


@pytest.mark.parametrize("within", ["-1", "61", "nan", "0.5"])
def test_a_time_that_is_none_is_refused(daemon: FakeDaemon, home: Path, within: str) -> None:
    told = ichiba(home, "pause", "--within", within)
    assert told.exit_code == 2
    assert not daemon.seen


def test_pausing_without_a_daemon_says_how_to_start_it(home: Path) -> None:
    told = ichiba(home, "pause")
    assert told.exit_code == 3
    assert "ichiba up" in told.stderr


def test_status_says_since_when_it_is_paused(daemon: FakeDaemon, home: Path) -> None:
    assert "paused     no" in ichiba(home, "status").stdout
    daemon.answers["status"] = lambda _: {**STATUS, "paused_since_ns": 10**18, "paused_works": WORKS[:1]}
    told = ichiba(home, "status").stdout
    assert "paused     since 2001-09-09" in told
    assert "1 works wait, resume by" in told


def test_a_pause_is_told_to_the_submitter_in_words() -> None:
    told = line_of({"kind": "solver-paused", "solver": "12D3KooWabcdefgh", "silence_s": 600})
    assert told == "solver abcdefgh is paused by its owner; it is lost if nothing comes for 600 s"
    assert line_of({"kind": "solver-resumed", "solver": "12D3KooWabcdefgh"}) == "solver abcdefgh goes on"
