"""What a script job states and leaves, as bytes: every bound of it, and what a hostile worker or peer may not say."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.cli_follow import exit_code_of
from protocol import params
from protocol.codec import encode
from protocol.errors import LimitExceeded, MalformedRecord, RemoteProtocolError, VerificationFailed, WrongNetwork
from protocol.script import (
    FileRef,
    OutputFile,
    ScriptResult,
    ScriptSpec,
    check_path,
    compare,
    read_task,
    result_from,
    result_trailer,
    words_for,
)
from worker.cgroups import Cgroup
from worker.frames import BadReply, Done, Exited, Output, Ready, frame
from worker.job_file import BadJobFile
from worker.script_file import is_script, read_script_file
from worker.script_talk import ScriptTalk

NETWORK = bytes(range(32))
MIB = 1024**2


def spec(**fields: Any) -> ScriptSpec:
    given: dict[str, Any] = {
        "network": NETWORK, "command": ("python3", "train.py"), "files": (FileRef("train.py", bytes(32), 10),),
        "seconds": 60, "memory_bytes": 256 * MIB, "outputs_bytes": MIB, "seed": 0, "name": "x",
    }  # fmt: skip
    return ScriptSpec(**(given | fields))


# --- the job ---------------------------------------------------------------------------------------------------
def test_a_script_is_one_segment_of_as_many_operations_as_nanoseconds_and_comes_back_from_its_bytes() -> None:
    script = spec()
    assert read_task(encode(script), network=NETWORK) == script
    assert (script.segments, script.steps, list(script.steps_of(0))) == (1, 1, [0])
    assert script.operations_per_step == 60 * 10**9
    assert script.program != spec(command=("python3", "other.py")).program
    with pytest.raises(MalformedRecord):
        script.steps_of(1)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"network": bytes(32)}, WrongNetwork),
        ({"command": ()}, MalformedRecord),
        ({"command": ("",)}, MalformedRecord),
        ({"command": ("a\0b",)}, MalformedRecord),
        ({"command": ("x",) * (params.SCRIPT_WORDS_MAX + 1)}, MalformedRecord),
        ({"command": ("x" * 4000,) * 7}, LimitExceeded),
        ({"files": (FileRef("../up", bytes(32), 1),)}, MalformedRecord),
        ({"files": (FileRef("b", bytes(32), 1), FileRef("a", bytes(32), 1))}, MalformedRecord),
        ({"files": (FileRef("a", bytes(32), 1), FileRef("a", bytes(32), 1))}, MalformedRecord),
        ({"files": (FileRef("a", bytes(32), 1), FileRef("a/b", bytes(32), 1))}, MalformedRecord),
        ({"files": (FileRef("a", bytes(32), params.SCRIPT_INPUT_BYTES_MAX + 1),)}, LimitExceeded),
        ({"seconds": 0}, MalformedRecord),
        ({"seconds": params.SCRIPT_SECONDS_MAX + 1}, MalformedRecord),
        ({"memory_bytes": params.SCRIPT_MEMORY_BYTES_MIN - 1}, MalformedRecord),
        ({"outputs_bytes": params.SCRIPT_OUTPUT_BYTES_MAX + 1}, MalformedRecord),
        ({"outputs_bytes": 257 * MIB}, MalformedRecord),
    ],
)
def test_a_script_out_of_bounds_is_refused(fields: dict[str, Any], error: type[RemoteProtocolError]) -> None:
    with pytest.raises(error):
        read_task(encode(spec(**fields)), network=NETWORK)


@pytest.mark.parametrize("name", ["a", "weights.bin", "run_1/Ergebnis größer.txt", "a/b/c/d/e/f/g/h", "_x", "9"])
def test_a_plain_relative_path_is_a_name(name: str) -> None:
    check_path(name)


@pytest.mark.parametrize(
    "name",
    ["", "/", "/etc/passwd", "..", "a/../b", "a//b", "a/", ".hidden", "a/.ssh", "-rf", " a", "a\\b", "c:x", "a\nb",
     "a\0b", "\udcff", "a/b/c/d/e/f/g/h/i", "x" * 256, "\u202egnp"],
)  # fmt: skip
def test_a_name_that_could_mean_another_file_is_none(name: str) -> None:
    with pytest.raises(MalformedRecord):
        check_path(name)


# --- job.toml --------------------------------------------------------------------------------------------------
def written(folder: Path, text: str) -> Path:
    (folder / "data").mkdir(exist_ok=True)
    for name in ("train.py", "data/a.csv", "data/b.csv"):
        (folder / name).write_text("x")
    (folder / "job.toml").write_text('kind = "script"\n' + text)
    return folder


def test_a_job_file_names_command_inputs_and_limits(tmp_path: Path) -> None:
    given = read_script_file(written(tmp_path, 'file = "train.py"\ninputs = ["data"]\nseconds = 60\nmemory = "2GiB"'))
    assert is_script(tmp_path)
    assert (given.command, sorted(given.inputs)) == (("python3", "train.py"), ["data/a.csv", "data/b.csv", "train.py"])
    assert (given.seconds, given.memory_bytes, given.outputs_bytes, given.replicas) == (60, 2 * 2**30, 64 * MIB, 1)
    assert not is_script(Path("examples/mlp"))
    assert read_script_file(Path("examples/script_pi")).unit_price_max == 15000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seconds = 60", "`file` or a `command`"),
        ('file = "train.py"\ncommand = ["true"]\nseconds = 60', "`file` or a `command`"),
        ('file = "train.py"', "seconds is None"),
        ('file = "train.py"\nseconds = true', "seconds is True"),
        ('file = "train.py"\nseconds = 60\nmemory = "2G"', "memory is '2G'"),
        ('file = "train.py"\nseconds = 60\nreplicas = 9', "replicas is 9"),
        ('file = "gone.py"\nseconds = 60', "'gone.py' is no file"),
        ('file = "../x.py"\nseconds = 60', "is no file or folder of"),
        ('command = "true"\nseconds = 60', "must be a list"),
        ('file = "train.py"\nsecond = 60', "unknown key 'second'"),
    ],
)
def test_a_wrong_job_file_is_refused_in_words(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path.parent / "x.py").unlink(missing_ok=True)
    with pytest.raises(BadJobFile, match=re.escape(said)):
        read_script_file(written(tmp_path, text))


def test_a_script_that_did_not_end_well_fails_its_command() -> None:
    job = {"state": "done", "kind": "script", "reason": "", "slashed_micro": 0}
    assert exit_code_of(job) == 0
    assert exit_code_of(job | {"reason": "the script ended with exit status 3"}) == 6


# --- the result ------------------------------------------------------------------------------------------------
def packed(outputs: dict[str, bytes], log: bytes = b"", **fields: Any) -> tuple[ScriptResult, bytes]:
    files = tuple(OutputFile(n, len(d), hashlib.blake2b(d, digest_size=32).digest()) for n, d in outputs.items())
    given: dict[str, Any] = {"ended": "exited", "status": 0, "files": files, "log_bytes": len(log)}
    result = ScriptResult(**(given | fields))
    return result, b"".join(outputs.values()) + log + result_trailer(result)


def test_a_result_reads_back_and_its_root_is_of_the_outputs_not_the_log() -> None:
    result, data = packed({"a": b"one", "b/c": b""}, log=b"said")
    assert result_from(data) == result
    assert packed({"a": b"one", "b/c": b""}, log=b"other")[0].root == result.root
    same = {"a": b"one", "b/c": b""}
    others = [packed({"a": b"two", "b/c": b""}), packed({"a": b"one"}), packed({"x": b"one", "b/c": b""})]
    others += [packed(same, status=1), packed(same, ended="deadline")]
    assert len({result.root, *(other.root for other, _ in others)}) == 6


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", MalformedRecord),
        (bytes(8), MalformedRecord),
        (b"\xff" * 20, MalformedRecord),
        (b"x" + packed({"a": b"one"})[1], MalformedRecord),
        (packed({"a": b"one"})[1][1:], MalformedRecord),
        (b"two" + packed({"a": b"one"})[1][3:], VerificationFailed),
        (packed({"../a": b"one"})[1], MalformedRecord),
        (packed({"a": b"x" * 200})[1], LimitExceeded),
        (packed({"a": b"one"}, files=(OutputFile("a", 1, bytes(32)),) * 2)[1], MalformedRecord),
    ],
)
def test_a_result_that_is_not_what_it_lists_is_refused(data: bytes, error: type[RemoteProtocolError]) -> None:
    with pytest.raises(error):
        result_from(data, outputs_bytes_max=100)


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_no_changed_byte_passes_for_another_output(place: int, change: int) -> None:
    result, data = packed({"a": b"one" * 9, "b": b"two"}, log=b"said")
    changed = bytearray(data)
    changed[place % len(data)] ^= change
    try:
        found = result_from(bytes(changed))
    except RemoteProtocolError:
        return
    assert (
        found.root == result.root
        or found.ended != result.ended
        or found.status != result.status
        or ([f.name for f in found.files] != [f.name for f in result.files])
    )
    assert [f.digest for f in found.files] == [f.digest for f in result.files]


def test_each_end_but_the_good_one_has_words() -> None:
    ends = msgspec.inspect.type_info(ScriptResult).fields[0].type.values  # type: ignore[union-attr]
    told = [words_for(ScriptResult(ended=end, status=0, files=(), log_bytes=0)) for end in ends]
    assert [bool(words) for words in told] == [end != "exited" for end in ends]
    assert "status 3" in words_for(ScriptResult(ended="exited", status=3, files=(), log_bytes=0))


def test_replicas_agree_differ_or_are_not_known_yet() -> None:
    one, two = bytes(32), bytes([1] * 32)
    assert compare([one, None]).same is None
    assert compare([one, one, None]).same is True
    assert compare([one, two, one]).same is False


# --- the supervisor's words ------------------------------------------------------------------------------------
def heard(*said: object, cut: int = 10**6) -> tuple[ScriptTalk, bytes]:
    data = b"".join(one if isinstance(one, bytes) else frame(one) for one in said)  # type: ignore[arg-type]
    talk = ScriptTalk(100)
    kept = b"".join(part for i in range(0, len(data), cut) for part in talk.take(data[i : i + cut]))
    return talk, kept


@given(st.integers(1, 60))
def test_outputs_come_whole_however_the_bytes_are_cut(cut: int) -> None:
    talk, kept = heard(
        Exited(False, 3), Output("a", 5), b"hello", Output("b", 0), Output("c/d", 2), b"!!", Done(), cut=cut
    )
    assert kept == b"hello!!"
    assert [(f.name, f.size_bytes) for f in talk.files] == [("a", 5), ("b", 0), ("c/d", 2)]
    assert talk.files[0].digest == hashlib.blake2b(b"hello", digest_size=32).digest()
    assert (talk.exited, talk.finished, talk.kept_bytes) == (Exited(False, 3), True, 7)


@pytest.mark.parametrize(
    "said",
    [
        [Output("a", 1)],
        [Done()],
        [Ready("", 0, "")],
        [Exited(False, 0), Exited(False, 0)],
        [Exited(False, 0), Output("a", 101)],
        [Exited(False, 0), Output("a", 60), bytes(60), Output("b", 41)],
        [Exited(False, 0), Output("b", 0), Output("a", 0)],
        [Exited(False, 0), Output("a", 0), Output("a", 0)],
        [Exited(False, 0), Output("../a", 0)],
        [Exited(False, 0), Output(".a", 0)],
        [Exited(False, 0), Done(), Done()],
        [Exited(False, 0), Done(), Output("a", 0)],
        [Exited(False, 0), b"\xff\xff\xff\xff"],
        [Exited(False, 0), *(Output(f"{i:05}", 0) for i in range(params.SCRIPT_OUTPUTS_MAX + 1))],
    ],
)
def test_a_supervisor_that_was_taken_over_is_heard_no_further(said: list[object]) -> None:
    with pytest.raises(BadReply):
        heard(*said)


def test_an_output_that_breaks_off_is_not_among_the_files() -> None:
    talk, kept = heard(Exited(False, 0), Output("a", 2), b"ok", Output("b", 9), b"half")
    assert (kept, talk.kept_bytes, [f.name for f in talk.files]) == (b"okhalf", 2, ["a"])


# --- its share of the processor --------------------------------------------------------------------------------
def test_a_control_group_caps_the_cores_of_all_its_processes_in_either_version(tmp_path: Path) -> None:
    Cgroup(2, tmp_path, tmp_path, tmp_path)._limit_cores(2)
    assert (tmp_path / "cpu.max").read_text() == "200000 100000"
    cpu = tmp_path / "cpu"
    cpu.mkdir()
    group = Cgroup(1, tmp_path / "memory", tmp_path / "pids", cpu)
    group._limit_cores(1)
    assert (cpu / "cpu.cfs_quota_us").read_text() == "100000"
    assert group.joins[-1] == str(cpu / "cgroup.procs")
