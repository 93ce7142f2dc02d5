"""The demonstration's parts: the swarm's files and processes, the story it tells, and what it must not pass over."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import peer.lan
from peer.cli_swarm import closing_words
from peer.cli_swarm import demo as demo_command
from peer.demo import DemoFailed, Outcome, Plan
from peer.demo_story import Story, curve, money_rows, sparkline
from peer.lan import LAN_RULES, Lan, LanProblem, Running, alive, born, command, descendants, members
from protocol.keys import peer_key
from protocol.network import load
from protocol.program import Program, program_id
from protocol.records import ROLE_SOLVER, ROLE_VERIFIER, ROLE_WHISTLEBLOWER
from worker.cheats import CHEATS, UNIT_CHEATS
from worker.prepare import prepare
from worker.training import SegmentResult, run_segments

ROOT = Path(__file__).resolve().parent.parent
# A daemon that says something, starts a child, and does not listen to SIGTERM.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def lan(tmp_path: Path) -> Lan:
    return Lan.create(tmp_path / "lan", members(5), seed=1)


def say(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let every daemon be this script."""
    monkeypatch.setattr(
        peer.lan, "command", lambda one, known: [sys.executable, "-u", "-c", script, "up", "--data", one.data]
    )


# --- files -------------------------------------------------------------------------------------------------
def test_five_peers_make_a_market_that_can_convict() -> None:
    kinds = [one.roles for one in members(5)]
    assert kinds == [0, ROLE_SOLVER, ROLE_VERIFIER, ROLE_WHISTLEBLOWER, ROLE_SOLVER]
    cheap, dear = (one for one in members(5, cheat="skip-step") if one.roles == ROLE_SOLVER)
    assert cheap.unit_price < dear.unit_price
    assert (cheap.cheat, dear.cheat) == ("skip-step", "")
    names = [one.name for one in members(12)]
    assert len(set(names)) == 12
    for count in (3, 33):
        with pytest.raises(LanProblem):
            members(count)


def test_notaries_are_peers_beside_the_market(tmp_path: Path) -> None:
    found = members(5, notaries=4)
    assert [one.name for one in found[5:]] == [f"notary-{n}" for n in (1, 2, 3, 4)]
    assert not any(one.roles or one.stake_micro for one in found[5:])  # a judge has no interest in the market
    network = load(Lan.create(tmp_path / "judged", found, seed=1).network_file.read_text())
    assert network.notary_quorum == 3
    assert len(network.notary_keys) == 4


def test_the_network_file_is_one_that_loads_and_names_every_peer(lan: Lan) -> None:
    network = load(lan.network_file.read_text())
    assert network.rules == LAN_RULES
    assert {one.peer for one in network.deposits} == {one.peer for one in lan.peers}
    assert all(peer_key(one.peer) for one in lan.peers)
    for one in lan.peers:
        assert load((Path(one.data) / "network.toml").read_text()).id == network.id
        assert Path(one.data).stat().st_mode & 0o777 == 0o700
    assert Lan.load(lan.path).peers == lan.peers


def test_a_seed_gives_the_same_keys_and_no_seed_gives_others(lan: Lan, tmp_path: Path) -> None:
    again = Lan.create(tmp_path / "again", members(5), seed=1)
    drawn = Lan.create(tmp_path / "drawn", members(5))
    assert [one.peer for one in again.peers] == [one.peer for one in lan.peers]
    assert not {one.peer for one in drawn.peers} & {one.peer for one in lan.peers}


def test_a_swarm_is_never_made_over_another(lan: Lan, tmp_path: Path) -> None:
    with pytest.raises(LanProblem, match="already"):
        Lan.create(lan.path, members(5))
    with pytest.raises(LanProblem, match="no swarm"):
        Lan.load(tmp_path / "nowhere")
    (lan.path / "swarm.json").write_text("{")
    with pytest.raises(LanProblem, match="cannot be read"):
        Lan.load(lan.path)


def test_a_daemon_is_told_its_role_its_price_and_whom_it_knows(lan: Lan) -> None:
    words = command(lan.of("solver-1"), ["/ip4/127.0.0.1/tcp/1/p2p/x"])
    assert words[words.index("--roles") + 1] == "solver"
    assert words[words.index("--price") + 1] == "0.0012"
    assert words[words.index("--peer") + 1] == "/ip4/127.0.0.1/tcp/1/p2p/x"
    assert "--cheat" not in words
    assert "none" in command(lan.of("submitter"), [])


# --- processes ---------------------------------------------------------------------------------------------
def test_a_daemon_that_dies_at_the_start_is_shown_with_its_last_words(
    lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, "print('the port is taken'); raise SystemExit(3)")
    with pytest.raises(LanProblem, match=r"submitter ended with status 3(.|\n)*the port is taken"):
        lan.start()
    assert lan.running() == []


def test_stopping_ends_daemons_that_will_not_and_their_children_too(lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, STUBBORN)
    monkeypatch.setattr(peer.lan, "STOP_SECONDS_MAX", 0.1)
    for one in lan.peers[:2]:
        lan._spawn(one, ())
    known = Lan.load(lan.path)  # as another process finds it
    pids = {(one.pid, one.born) for one in lan.peers[:2]}
    for one in lan.peers[:2]:
        wait_for_log(one)
    everything = pids | descendants([pid for pid, _ in pids])
    assert len(everything) == 4
    assert len(known.running()) == 2
    assert lan.stop() == 2
    assert not [pid for pid, time_ in everything if alive(pid, time_)]
    assert (lan.stop(), Lan.load(lan.path).stop()) == (0, 0)


def wait_for_log(one: Running) -> None:
    """Return once a daemon has said something: read its log until then, without a pause."""
    while not Path(one.log).read_text():
        assert alive(one.pid, one.born)
        os.sched_yield()


def test_a_number_that_is_somebody_elses_by_now_is_left_alone(lan: Lan) -> None:
    me = born(os.getpid())
    assert me is not None
    lan.peers[0].pid, lan.peers[0].born = os.getpid(), me + 1
    assert lan.running() == []
    assert lan.stop() == 0


GUARDED = """
import os, signal, sys
from pathlib import Path
import peer.lan
from peer.lan import Lan, members
stubborn = sys.argv[2]
peer.lan.command = lambda one, known: [sys.executable, "-c", stubborn, "up", "--data", one.data]
lan = Lan.create(Path(sys.argv[1]), members(5))
lan.guard(remove=True)
lan._spawn(lan.peers[0], ())
lan._spawn(lan.peers[1], ())
print(lan.peers[0].pid, lan.peers[1].pid, flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_daemon_outlives_whoever_started_it_however_it_dies(tmp_path: Path) -> None:
    sleepy = "import time; time.sleep(600)"
    starter = subprocess.Popen(
        [sys.executable, "-c", GUARDED, str(tmp_path / "lan"), sleepy], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert starter.stdin is not None
    assert starter.stdout is not None
    watched = [os.pidfd_open(int(word)) for word in starter.stdout.readline().split()]
    assert len(watched) == 2
    starter.stdin.close()
    assert starter.wait(timeout=120) == -9
    for descriptor in watched:
        ended, _, _ = select.select([descriptor], [], [], 30)
        assert ended, "a daemon lives on without its starter"
        os.close(descriptor)
    starter.stdout.close()


# --- the frauds --------------------------------------------------------------------------------------------
def test_the_command_line_offers_every_fraud_the_worker_knows() -> None:
    (offered,) = [option.type for option in demo_command.params if option.name == "cheat"]
    assert isinstance(offered, click.Choice)
    assert tuple(offered.choices) == (*CHEATS, *UNIT_CHEATS)


@pytest.mark.parametrize(
    "words",
    [
        ["--cheat", "skip-backward"], ["--links", "slow"], ["--cheat", "skip-step", "--parallel", "2x2"],
        *(
            ["--parallel", "2x2", *option]
            for option in (["--kill", "solver"], ["--steps", "20"], ["--seed", "3"], ["--notaries", "4"], ["--keep"])
        ),
    ],
)  # fmt: skip
def test_what_the_demonstration_cannot_do_is_refused(words: list[str]) -> None:
    told = CliRunner().invoke(demo_command, words)
    assert told.exit_code == 2 and "parallel" in told.output, told.output


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_checker_of_any_spoiled_segment_finds_another_state_than_claimed(cheat: str, tmp_path: Path) -> None:
    folder = ROOT / "examples" / "mlp"
    text = (folder / "job.toml").read_text().replace("steps = 400", "steps = 12")
    for old, new in (("steps_per_segment = 50", "steps_per_segment = 4"), ("warmup_steps = 20", "warmup_steps = 2")):
        text = text.replace(old, new)
    (tmp_path / "job.toml").write_text(text)
    (tmp_path / "model.py").write_bytes((folder / "model.py").read_bytes())
    made = prepare(tmp_path / "job.toml", bytes(32))
    task = made.make_task(program=program_id(made.program), arrays={array.name: bytes(32) for array in made.arrays})
    program = Program.from_bytes(made.program)
    arrays = {array.name: array.data for array in made.arrays}

    def run(segments: range, base: bytes | None, cheat: str | None) -> list[SegmentResult]:
        return list(run_segments(task=task, program=program, arrays=arrays, base=base, segments=segments, cheat=cheat))

    claimed = run(range(3), None, cheat)
    assert claimed[0].in_root == made.base_root, "the fraud starts where the agreement says"
    for before, after in pairwise(claimed):
        assert after.in_root == before.out_root, "its chain of receipts is whole"
    for segment in (1, 2):
        # What a checker does: from the solver's own checkpoint, one segment, honestly. copied-proof is a whole honest
        # run of another job, so the segment from the seed is wrong and the batches of every other one are.
        (found,) = run(range(segment, segment + 1), claimed[segment - 1].checkpoint, None)
        assert found.in_root == claimed[segment].in_root
        assert found.out_root != claimed[segment].out_root


# --- the story ---------------------------------------------------------------------------------------------
def told(*events: dict[str, Any]) -> tuple[Story, list[str]]:
    story = Story({"A": "solver-1", "B": "solver-2", "V": "verifier"}.__getitem__, steps=4, segments=2)
    lines: list[str] = []
    for event in events:
        lines += story.take(event)
    return story, lines


AGREED = {"kind": "agreed", "deal": "d1", "solver": "A", "after_ns": 1_029_000_000}
STEPS = [{"kind": "step", "deal": "d1", "step": step, "loss": 4.0 - step} for step in range(2)]
WRONG = {
    "kind": "verdict", "deal": "d1", "checker": "V", "role": "verifier", "finding": "wrong", "segments": [0, 1],
    "wrong_segment": 1,
}  # fmt: skip
SLASHED = {"kind": "slashed", "deal": "d1", "solver": "A", "lock_micro": 2_000_000}


def test_the_story_names_the_peers_and_the_time_to_agreement() -> None:
    story, lines = told(AGREED, *STEPS)
    assert "1,029 ms" in lines[0]
    assert story.solver == "solver-1"
    assert story.loss_line == [4.0, 3.0]
    assert "step 2/4" in story.progress


def test_slashed_work_leaves_the_loss_curve_and_names_the_culprit() -> None:
    story, lines = told(AGREED, *STEPS, WRONG, SLASHED)
    assert story.loss_line == []
    assert (story.culprits, story.slashed_micro) == (["solver-1"], 2_000_000)
    assert any("WRONG" in line and "Segment 1" in line for line in lines)
    assert any(line.startswith("SLASHED") and "solver-1" in line and "2.00" in line for line in lines)


def test_an_event_nobody_explains_is_passed_over() -> None:
    assert told({"kind": "news-of-a-later-version"})[1] == []


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    width=st.integers(1, 40),
    height=st.integers(1, 8),
    total=st.integers(0, 100),
)
def test_a_curve_fits_its_frame_and_shows_every_column(
    values: list[float], width: int, height: int, total: int
) -> None:
    rows = curve(values, width=width, height=height, total=total)
    assert len(rows) == height
    assert len({len(row) for row in rows}) == 1
    assert 1 <= len(rows[0]) <= width
    assert " " not in rows[-1], "the lowest value is seen too"
    assert len(sparkline(values, width)) <= width


def test_a_falling_loss_falls_on_the_screen() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert curve([], width=5, height=2, total=9) == []


ROW = {
    "name": "A", "deposited_micro": 5_000_000, "withdrawn_micro": 0, "free_micro": 1_000_000, "stake_micro": 3_000_000,
    "channels_micro": 0, "locks_micro": 0, "earned_micro": 0, "awarded_micro": 0, "paid_micro": 0,
    "slashed_micro": 1_000_000,
}  # fmt: skip


def test_the_money_table_shows_what_was_burned_and_adds_up() -> None:
    table = {"rows": [ROW], "totals": {**ROW, "name": "total"}, "burned_micro": 600_000, "pool_micro": 400_000}
    rows = money_rows(table, lambda name: f"peer {name}")
    assert rows[0] == ["peer A", "5.00", "", "", "", "1.00", "4.00"]
    assert [row[0] for row in rows] == ["peer A", "(burned)", "(pool)", "total"]
    assert rows[-1][1] == rows[-1][-1] == "5.00"


# --- what is success -----------------------------------------------------------------------------------------
DISPUTE = {"finding": "wrong", "rounds": 7, "message_bytes": 17_190, "opening_bytes": 4_432, "seconds": 40.0}


def good(plan: Plan) -> Outcome:
    return Outcome(
        plan, state="done", params=1_000_000, conserved=True, proof=True, slashed=9 * bool(plan.cheat),
        culprit="solver-1" if plan.cheat else "",
        solvers_paid=["solver-1", "solver-2"] if plan.kill else ["solver-1"],
        dispute=DISPUTE if plan.cheat and plan.notaries else {},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "change", "complaint"),
    [
        (Plan(), {"state": "failed"}, "failed"),
        (Plan(), {"conserved": False}, "ledgers"),
        (Plan(), {"proof": False}, "proof"),
        (Plan(cheat="skip-step"), {"slashed": 0, "culprit": ""}, "not slashed"),
        (Plan(cheat="skip-step"), {"culprit": "solver-2"}, "not slashed"),
        (Plan(cheat="skip-step"), {"dispute": {}}, "no dispute"),
        (Plan(cheat="skip-step", notaries=0), {"dispute": DISPUTE}, "no dispute"),
        (Plan(), {"dispute": DISPUTE}, "honest work"),
        (Plan(), {"slashed": 9, "culprit": "solver-1"}, "honest"),
        (Plan(kill=True), {"solvers_paid": ["solver-2"]}, "both"),
    ],
)
def test_nothing_that_must_hold_is_passed_over(plan: Plan, change: dict[str, Any], complaint: str) -> None:
    outcome = good(plan)
    assert outcome.failures == []
    assert "went wrong" not in closing_words(outcome)
    for name, value in change.items():
        setattr(outcome, name, value)
    assert [what for what in outcome.failures if complaint in what]
    assert "went wrong" in closing_words(outcome)


def test_a_plan_that_shows_nothing_is_refused() -> None:
    for wrong in ({"steps": 9}, {"cheat": "skip-step", "kill": True}):
        with pytest.raises(DemoFailed):
            Plan(**wrong)  # type: ignore[arg-type]


def test_the_json_line_has_what_scripts_read() -> None:
    plain, cheated = good(Plan()).as_dict(), good(Plan(cheat="skip-step")).as_dict()
    wanted = {
        "state", "steps", "params", "loss_first", "loss_last", "segments", "segments_checked", "verdict", "paid_micro",
        "conserved", "seconds",
    }  # fmt: skip
    assert wanted <= plain.keys()
    assert "slashed" not in plain
    assert {"slashed", "culprit", "retried"} <= cheated.keys()
