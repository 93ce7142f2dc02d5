"""The command line and jobs: submit, follow, collect, and check the evidence."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peer.cli_events import ENDINGS, line_of
from peer.cli_follow import exit_code_of
from peer.client import Client
from protocol import safetensors
from tests.cli_scene import (
    ACCUSED,
    DONE,
    PEER,
    ROOT,
    SHOWN,
    STEPS,
    ichiba,
    lines,
    say,
)
from tests.fake_daemon import JOB, FakeDaemon, running


# --- following ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("state", "changes", "code"),
    [
        ("done", {}, 0),
        ("failed", {}, 6),
        ("failed", {"slashed_micro": 5}, 9),
        ("failed", {"deals": [ACCUSED]}, 9),
        ("cancelled", {}, 7),
    ],
)
def test_following_ends_with_the_job_and_its_exit_code(
    daemon: FakeDaemon, home: Path, state: str, changes: dict[str, Any], code: int
) -> None:
    daemon.answers["job"] = lambda _: {**SHOWN, "state": state, "reason": "so", **changes}
    say(daemon, *STEPS, {**DONE, "kind": state})
    told = ichiba(home, "job", "logs", "-f", JOB)
    assert told.exit_code == code
    assert "step 60: loss" in told.stderr
    assert f"is {state}" in told.stdout
    told = ichiba(home, "job", "logs", "-f", JOB, "--json")
    assert told.exit_code == code
    assert [line["schema"] for line in lines(told)] == ["ichiba.event/1"] * 61 + ["ichiba.job/1"]


def test_logs_without_follow_print_all_there_is(daemon: FakeDaemon, home: Path) -> None:
    say(daemon, *STEPS[:3])
    told = ichiba(home, "job", "logs", JOB)
    assert told.stdout.count("loss") == 3
    assert len(lines(ichiba(home, "job", "logs", JOB, "--json"))) == 3


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"state": "offered", "deals": []}, 5),
        ({"state": "running"}, 10),
        ({"state": "running", "deals": [{**ACCUSED, "state": "checking"}]}, 9),
    ],
)
def test_a_timeout_says_whether_anybody_wanted_the_job(
    daemon: FakeDaemon, home: Path, changes: dict[str, Any], code: int
) -> None:
    daemon.answers["job"] = lambda _: {**SHOWN, **changes}
    told = ichiba(home, "job", "logs", "-f", JOB, "--timeout", "0.05")
    assert told.exit_code == code
    assert f"ichiba job logs -f {JOB[:12]}" in told.stderr
    assert exit_code_of({**SHOWN, **changes}) == 0  # asked without waiting, it is still on its way


def test_ctrl_c_detaches_and_never_cancels(daemon: FakeDaemon, home: Path) -> None:
    daemon.answers["job"] = lambda _: {**SHOWN, "state": "running"}
    say(daemon, *STEPS[:1])
    command = [sys.executable, "-m", "peer.cli", "job", "logs", "-f", JOB, "--data", str(home)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stderr is not None
        assert "loss" in child.stderr.readline()  # it follows
        child.send_signal(signal.SIGINT)
        _, rest = child.communicate()
    assert child.returncode == 130
    assert "detached; the job goes on. Come back with: ichiba job logs -f abab" in rest
    assert all(verb != "cancel" for verb, _ in daemon.seen)


EVENTS: list[dict[str, Any]] = [
    {"kind": "offer", "operations": 10**9, "unit_price_max": 2000, "segments": [0, 6], "budget_micro": 1},
    {"kind": "round", "ranked": [], "refused": [], "explored": False},
    {"kind": "round", "ranked": [{"solver": PEER, "price": 5, "risk": 0, "wait": 0}], "refused": [], "explored": True},
    {
        "kind": "round",
        "ranked": [],
        "refused": [{"solver": PEER, "code": "x", "why": "is too dear"}],
        "explored": False,
    },
    {"kind": "matched", "deal": "", "solver": PEER, "unit_price": 1000},
    {"kind": "agreed", "deal": "", "solver": PEER, "after_ns": 10**9},
    {"kind": "refused", "solver": PEER, "code": "busy", "why": "every slot is taken"},
    {"kind": "refused", "checker": PEER, "code": "busy", "why": "too many cases"},
    *STEPS[:1],
    {"kind": "paid", "segment": 0, "amount_micro": 5, "cumulative_micro": 5, "out_root": "11" * 32},
    {"kind": "proof", "receipts": 6, "proof": "11"},
    {"kind": "draw", "segments": [1, 3], "of": 6},
    {"kind": "check", "checker": PEER, "role": "verifier", "segments": [1]},
    {"kind": "verdict", "checker": PEER, "role": "verifier", "finding": "wrong", "segments": [1], "wrong_segment": 1},
    {"kind": "challenged", "deal": "cd", "dispute": "ab" * 32, "segment": 1, "challenger": PEER},
    {"kind": "arbitrated", "deal": "cd", "segment": 1, "finding": "wrong"},
    {"kind": "arbitrated", "deal": "cd", "segment": 1, "finding": "forced"},
    {"kind": "waiting", "why": "no live verifier"},
    {"kind": "lost", "solver": PEER, "why": "silent", "receipts": 2},
    {"kind": "reoffer", "why": "lost", "segment": 2},
    {"kind": "slashed", "solver": PEER, "lock_micro": 5},
    {"kind": "settled", "solver": PEER, "paid_micro": 5, "fees": [{"peer": PEER, "micro": 1}]},
    {"kind": "claim", "why": "no answer"},
    {"kind": "problem", "what": "bad checkpoint"},
    {"kind": "forfeit", "why": "no seed"},
    *({**DONE, "kind": kind} for kind in sorted(ENDINGS)),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event["kind"])
def test_every_event_of_a_job_has_a_line_of_its_own(event: dict[str, Any]) -> None:
    line = line_of({"seq": 1, "time_ns": 1, "job": JOB, **event})
    assert "=" not in line, "it fell back to the raw fields"
    assert "\n" not in line


def test_a_step_says_what_its_number_is_and_nothing_where_it_says_nothing() -> None:
    step = {"seq": 1, "time_ns": 1, "job": JOB, "kind": "step", "step": 6, "loss": 0.5}
    assert line_of(step) == "step 7: loss 0.5000"
    assert line_of({**step, "figure": "surprise"}) == "step 7: surprise 0.5000"
    assert line_of({**step, "figure": ""}) == "step 7: done"


def test_show_says_what_an_evaluation_found_unless_its_state_is_too_large_for_a_look(
    daemon: FakeDaemon, home: Path
) -> None:
    state = {
        "weight": np.ones((2, 2), dtype=np.float32),
        "result.loss": np.array([6.0, 0.5], dtype=np.float32),
        "result.accuracy": np.array([3.0, 0.0], dtype=np.float32),
        "result.rows": np.array(4, dtype=np.int64),
    }
    with Client(home) as client:
        blob = client.put_blob(safetensors.write(state))
    found = {**SHOWN, "kind": "evaluate", "checkpoint": blob.hex(), "checkpoint_bytes": 300}
    daemon.answers["job"] = lambda _: found
    told = ichiba(home, "job", "show", JOB)
    assert told.exit_code == 0, told.output
    assert "loss: 1.625" in told.stdout
    assert "accuracy: 0.75" in told.stdout
    as_json = lines(ichiba(home, "job", "show", JOB, "--json"))
    assert as_json[-1]["metrics"] == {"loss": 1.625, "accuracy": 0.75}
    daemon.answers["job"] = lambda _: {**found, "checkpoint_bytes": 2**40}
    assert "its result: ichiba job get" in ichiba(home, "job", "show", JOB).stdout
    daemon.answers["job"] = lambda _: {**found, "kind": "train"}
    assert "result" not in ichiba(home, "job", "show", JOB).stdout


def test_an_event_of_an_unknown_kind_or_shape_is_shown_as_it_is() -> None:
    assert line_of({"seq": 1, "time_ns": 1, "job": JOB, "kind": "new", "x": 1}) == "new: x=1"
    assert line_of({"seq": 1, "time_ns": 1, "job": JOB, "kind": "paid"}) == "paid"
    assert line_of({"seq": 1, "time_ns": 1, "job": JOB, "kind": "round", "ranked": 7}).startswith("round: ranked=7")


# --- submit, get, verify -----------------------------------------------------------------------------------
JOB_TOML = """
name = "line"
seed = 5
steps = 6
steps_per_segment = 3
budget = "1.50"
price = 2000
sandbox = "contained"
[batch]
rule = "rows"
size = 4
[learning_rate]
peak = 0.1
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    from tests.test_prepare import MODEL

    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "model.py").write_text(MODEL)
    (folder / "job.toml").write_text(JOB_TOML)
    return folder


def test_submit_uploads_the_job_offers_it_and_follows_it(daemon: FakeDaemon, home: Path, job: Path) -> None:
    from protocol.task import TaskSpec

    daemon.answers["submit"] = lambda _: {**SHOWN, "state": "offered", "deals": []}
    say(daemon, *STEPS, DONE)
    told = ichiba(home, "submit", str(job), "--budget", "2.5", "--json")
    assert told.exit_code == 0, told.output
    sent = next(arguments for verb, arguments in daemon.seen if verb == "submit")
    assert (sent["budget_micro"], sent["unit_price_max"], sent["sandbox"]) == (2_500_000, 2000, 4)
    task = TaskSpec.from_bytes(bytes.fromhex(sent["task"]), network=bytes.fromhex("f2" * 32))
    for blob in (task.program, *(array.blob for array in task.arrays)):
        assert daemon.blobs.has(blob)
    assert [line["schema"] for line in lines(told)][:2] == ["ichiba.job/1", "ichiba.event/1"]
    detached = ichiba(home, "submit", str(job), "--detach")
    assert detached.exit_code == 0
    assert "next: ichiba job logs -f" in detached.stdout
    assert "first loss" in detached.stderr


def test_a_sealed_job_is_hidden_from_the_moment_its_bytes_are_here(daemon: FakeDaemon, home: Path, job: Path) -> None:
    from protocol.task import TaskSpec

    daemon.answers["submit"] = lambda _: {**SHOWN, "state": "offered", "deals": []}
    told = ichiba(home, "submit", str(job), "--sealed", "--detach")
    assert told.exit_code == 0 and "sealed: peers see its terms" in told.stdout, told.output
    sent = next(arguments for verb, arguments in daemon.seen if verb == "submit")
    assert sent["sealed"] is True
    task = TaskSpec.from_bytes(bytes.fromhex(sent["task"]), network=bytes.fromhex("f2" * 32))
    for blob in (task.program, *(array.blob for array in task.arrays)):
        assert daemon.blobs.has(blob) and daemon.blobs.secrets.hides(blob)


def test_submit_refuses_before_it_loads_torch(daemon: FakeDaemon, home: Path, job: Path, tmp_path: Path) -> None:
    (job / "job.toml").write_text(JOB_TOML.replace("steps =", "stepz =", 1))
    told = ichiba(home, "submit", str(job))
    assert told.exit_code == 2
    assert "did you mean 'steps'?" in told.stderr
    assert ichiba(tmp_path / "absent", "submit", str(job)).exit_code == 3


def test_submit_never_spends_without_a_limit_and_says_when_funds_are_short(
    daemon: FakeDaemon, home: Path, job: Path
) -> None:
    (job / "job.toml").write_text(JOB_TOML.replace('budget = "1.50"\n', ""))
    told = ichiba(home, "submit", str(job))
    assert told.exit_code == 2
    assert "no budget is given" in told.stderr
    assert ichiba(home, "submit", str(job), "--budget", "5").exit_code == 8


@pytest.fixture
def finished(home: Path, job: Path) -> Iterator[FakeDaemon]:
    """A daemon whose job was really trained, two segments of it, with all evidence signed."""
    import trio

    from protocol.network import dump
    from protocol.program import Program, program_id
    from tests.bundle_forge import written
    from worker.prepare import prepare
    from worker.training import run_segments

    prepared = prepare(job, bytes(32))
    task = prepared.make_task(
        program=program_id(prepared.program), arrays={array.name: bytes(32) for array in prepared.arrays}
    )
    results = list(
        run_segments(
            task=task, program=Program.from_bytes(prepared.program), base=None, segments=range(task.segments),
            arrays={array.name: array.data for array in prepared.arrays},
        )
    )  # fmt: skip

    def ready(fake: FakeDaemon) -> None:
        fake.answers["job"] = lambda _: SHOWN

    with running(home, ready) as fake:

        def put(data: bytes) -> bytes:
            with Client(home) as client:
                return client.put_blob(data)

        graph = put(prepared.program)
        blobs = [put(result.checkpoint) for result in results]
        roots = [results[0].in_root, *(result.out_root for result in results)]
        import msgspec

        evidence, network = written(msgspec.structs.replace(task, program=graph), roots, blobs)
        fake.answers["bundle"] = lambda _: evidence
        (home / "network.toml").write_text(dump(network))
        assert trio is not None
        yield fake


def test_get_writes_checked_weights_and_a_proof_that_verifies_without_the_daemon(
    finished: FakeDaemon, home: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    out = tmp_path / "result"
    told = ichiba(home, "job", "get", JOB, "-o", str(out))
    assert told.exit_code == 0, told.output
    assert "bit for bit" in told.stdout
    written = {"checkpoint.safetensors", "model.program", "proof.json", "weights.safetensors"}
    assert {path.name for path in out.iterdir()} == written
    assert sorted(load_file(out / "weights.safetensors")) == ["bias", "weight"]
    finished.soon(finished.stop)
    told = ichiba(home, "receipts", "verify", str(out))
    assert told.exit_code == 0
    assert "2 of 2 segments" in told.stdout
    assert "1 of them, 50.0 % of the operations" in told.stdout
    (found,) = lines(ichiba(home, "receipts", "verify", str(out / "proof.json"), "--json"))
    assert (found["schema"], found["complete"], len(found["segments_checked"])) == ("ichiba.proof/1", True, 1)
    (out / "checkpoint.safetensors").unlink()
    assert "all 2 tensors" in ichiba(home, "receipts", "verify", str(out)).stdout


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda out: bent(out / "weights.safetensors"), "weights"),
        (lambda out: bent(out / "checkpoint.safetensors"), "checkpoint"),
        (lambda out: swap(out / "proof.json", '"final_root": "', '"final_root": "00'), "format"),
        (lambda out: swap(out / "proof.json", "name = ", "name = 5 #"), "network"),
    ],
)
def test_a_result_that_was_tampered_with_is_refused_by_name(
    finished: FakeDaemon, home: Path, tmp_path: Path, spoil: Callable[[Path], None], name: str
) -> None:
    out = tmp_path / "result"
    assert ichiba(home, "job", "get", JOB, "-o", str(out)).exit_code == 0
    spoil(out)
    told = ichiba(home, "receipts", "verify", str(out), "--json")
    assert told.exit_code == 1
    assert json.loads(told.stderr)["check"] == name


def bent(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swap(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_proof_of_another_network_or_no_proof_at_all_is_refused(
    finished: FakeDaemon, home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "result"
    assert ichiba(home, "job", "get", JOB, "-o", str(out)).exit_code == 0
    (tmp_path / "other.toml").write_text('name = "other"\n')
    told = ichiba(home, "receipts", "verify", str(out), "--network", str(tmp_path / "other.toml"))
    assert told.exit_code == 1
    assert "--network" in told.stderr
    (out / "proof.json").write_bytes(b"[" * 100_000)
    assert ichiba(home, "receipts", "verify", str(out)).exit_code == 1
    (out / "proof.json").unlink()
    assert ichiba(home, "receipts", "verify", str(out)).exit_code == 4


def test_a_job_without_a_result_says_where_it_stands(daemon: FakeDaemon, home: Path) -> None:
    for state, code in (("running", 1), ("failed", 6), ("cancelled", 7)):
        daemon.answers["job"] = lambda _, state=state: {**SHOWN, "state": state, "reason": ""}  # type: ignore[misc]
        told = ichiba(home, "job", "get", JOB)
        assert told.exit_code == code
        assert f"is {state}" in told.stderr
