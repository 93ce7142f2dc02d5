"""Scripts in real contained workers: honest ones with all they need, hostile ones that get nothing but their end."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import trio

from peer.scripting import ScriptDone, ScriptOrder, run_script
from peer.workshop import WorkFailed
from protocol import params
from protocol.script import FileRef, ScriptResult, ScriptSpec, parts_of, result_from
from worker.cage import Cage, CageFailed
from worker.room import Room
from worker.sandbox import Level, probe

MIB = 1024**2
SECOND = 10**9


@pytest.fixture(scope="module")
def level() -> Level:
    found = trio.run(probe).level
    if found < Level.CONTAINED:
        pytest.skip(f"scripts run at CONTAINED only, and this machine proves {found.name}")
    return found


class Bench:
    """Runs commands as script jobs and keeps what they told."""

    def __init__(self, folder: Path, level: Level) -> None:
        self.folder, self.level, self.runs = folder, level, 0
        self.news: list[tuple[str, int]] = []
        self.heard = trio.Event()
        (folder / "scratch").mkdir()

    def hear(self, text: str, used_ns: int) -> None:
        self.news.append((text, used_ns))
        self.heard.set()

    async def run(
        self, *command: str, seconds: int = 20, memory: int = 192 * MIB, outputs: int = MIB, **inputs: bytes
    ) -> tuple[ScriptDone, ScriptResult, dict[str, bytes], str]:
        """(what was done, the result read back, the outputs' bytes, the log)."""
        self.runs += 1
        paths: dict[str, Path] = {}
        for name, data in inputs.items():
            paths[name] = self.folder / f"{self.runs}-{name}"
            paths[name].write_bytes(data)
            paths[name].chmod(0o600)
        spec = ScriptSpec(
            network=bytes(32), command=command, seconds=seconds, memory_bytes=memory, outputs_bytes=outputs, seed=5,
            files=tuple(FileRef(name, bytes(32), len(data)) for name, data in sorted(inputs.items())), name="test",
        )  # fmt: skip
        done = await run_script(
            ScriptOrder(f"job-{self.runs}", spec, paths), level=self.level, scratch_dir=self.folder / "scratch",
            on_news=self.hear,
        )  # fmt: skip
        data = done.file.read_bytes()
        result = result_from(data, outputs_bytes_max=outputs)
        assert result == done.result
        assert done.file_bytes == len(data)
        assert 0 < done.used_ns <= seconds * SECOND
        kept = {file.name: bytes(part) for file, part in parts_of(result, memoryview(data))}
        log = data[result.outputs_bytes : result.outputs_bytes + result.log_bytes].decode()
        return done, result, kept, log

    async def python(self, code: str, **options: int) -> tuple[ScriptDone, ScriptResult, dict[str, bytes], str]:
        return await self.run("python3", "-c", code, **options)  # type: ignore[arg-type]


@pytest.fixture
def bench(tmp_path: Path, level: Level) -> Bench:
    return Bench(tmp_path, level)


# --- honest scripts --------------------------------------------------------------------------------------------
async def test_a_script_reads_its_inputs_and_leaves_outputs_that_are_listed_with_their_hashes(bench: Bench) -> None:
    code = b"""
import os, sys, numpy, helper
os.makedirs("/outputs/model")
open("/outputs/model/weights.bin", "wb").write(numpy.arange(4, dtype="<i4").tobytes() * helper.TIMES)
open(os.environ["ICHIBA_OUTPUTS"] + "/args", "w").write(" ".join(sys.argv[1:]) + os.environ["ICHIBA_SEED"])
open("/outputs/empty", "w")
print("trained on", open("helper.py").read().count("TIMES"), "files")
"""
    done, result, kept, log = await bench.run(
        "python3", "train.py", "--fast", memory=512 * MIB, **{"train.py": code, "helper.py": b"TIMES = 2\n"}
    )
    assert (result.ended, result.status, log) == ("exited", 0, "trained on 1 files\n")
    assert kept == {
        "args": b"--fast5",
        "empty": b"",
        "model/weights.bin": bytes.fromhex("00000000010000000200000003000000") * 2,
    }
    assert {f.name: f.digest for f in result.files} == {
        n: hashlib.blake2b(d, digest_size=32).digest() for n, d in kept.items()
    }
    assert "".join(text for text, _ in bench.news) == log
    again, *_ = await bench.run(
        "python3", "train.py", "--fast", memory=512 * MIB, **{"train.py": code, "helper.py": b"TIMES = 2\n"}
    )
    assert again.result.root == done.result.root
    assert list((bench.folder / "scratch").glob("*.part")) == []


async def test_what_ordinary_programs_need_works_inside(bench: Bench) -> None:
    code = """
import asyncio, fcntl, multiprocessing, shutil, sqlite3, subprocess, tempfile
asyncio.run(asyncio.sleep(0))
with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
    file.write("x"); file.flush(); fcntl.lockf(file, fcntl.LOCK_EX); shutil.copy2(file.name, "/outputs/copied")
base = sqlite3.connect("/scratch/base"); base.execute("create table t (a)"); base.commit()
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(abs, [-1, -2]) == [1, 2]
pipe = "echo a b | awk '{print $2}' | tr b c"
print(subprocess.run(pipe, shell=True, capture_output=True, text=True, check=True).stdout)
"""
    _, result, kept, log = await bench.python(code)
    assert (result.ended, result.status, log) == ("exited", 0, "c\n\n"), log
    assert kept == {"copied": b"x"}


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (("sh", "-c", "echo oh >&2; exit 3"), 3, "oh\n"),
        (("sh", "-c", "kill -SEGV $$"), 128 + 11, ""),
        (("no-such-program", "x"), 127, "ichiba: cannot start 'no-such-program': No such file or directory\n"),
    ],
)
async def test_a_script_that_fails_is_a_result_with_its_status(
    bench: Bench, command: tuple[str, ...], status: int, said: str
) -> None:
    _, result, _, log = await bench.run(*command)
    assert (result.ended, result.status, log) == ("exited", status, said)


async def test_a_script_is_ended_with_its_time_charged_all_of_it_and_keeps_its_outputs(bench: Bench) -> None:
    done, result, kept, _ = await bench.python(
        "import os; open('/outputs/step-1', 'w').write('half'); os.fork(); os.fork()\nwhile True: pass", seconds=2
    )
    assert (result.ended, result.status, done.used_ns) == ("deadline", 0, 2 * SECOND)
    assert kept == {"step-1": b"half"}
    assert left_over() == []


# --- hostile scripts -------------------------------------------------------------------------------------------
def left_over() -> list[str]:
    """Control groups of this process that outlived their worker."""
    return [str(path) for path in Path("/sys/fs/cgroup").rglob(f"ichiba-{os.getpid()}-*")]


async def test_only_regular_files_of_plain_names_come_out(bench: Bench) -> None:
    code = r"""
import os
os.chdir("/outputs")
os.symlink("/etc/passwd", "passwords"); os.symlink("/inputs", "folder"); os.symlink("good", "alias")
for name in ("good", ".hidden", "back\\slash", "-rf", "a:b", "new\nline", "locked"):
    open(name, "w").write(name)
open(b"\xff", "w"); os.link("good", "twin"); os.chmod("locked", 0)
os.makedirs("/".join("abcdefghi")); open("/".join("abcdefghi") + "/deep", "w")
try: os.mkfifo("pipe")
except PermissionError: pass
try: os.truncate("good", 1 << 40)
except OSError as error: print(error.strerror)
"""
    _, result, kept, log = await bench.python(code)
    assert (result.ended, result.status) == ("exited", 0), log
    assert set(kept) == {"good", "twin"}
    assert log.startswith("File too large\n")
    for named in (
        "passwords",
        "folder",
        "alias",
        ".hidden",
        r"back\\slash",
        "-rf",
        "a:b",
        r"new\nline",
        "locked",
        "udcff",
    ):
        assert named in log


async def test_outputs_beyond_their_size_or_number_do_not_come_out(bench: Bench) -> None:
    code = """
import os
for i in range(1500): open(f"/outputs/{i:04}", "w").close()
try: open("/outputs/huge", "wb").write(bytes(4 << 20))
except OSError as error: print(error.strerror)
"""
    _, result, kept, log = await bench.python(code)
    assert len(kept) == params.SCRIPT_OUTPUTS_MAX
    assert list(kept) == [f"{i:04}" for i in range(params.SCRIPT_OUTPUTS_MAX)]
    assert "File too large" in log or "No space left" in log
    assert "left out: at most" in log
    assert result.outputs_bytes == 0


async def test_nothing_of_the_owner_is_reached(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    code = f"""
import os, socket
def tried(what):
    try: return what()
    except OSError as error: return error.strerror
print(tried(lambda: open("/inputs/in", "w")), tried(lambda: open("/inputs/new", "w")))
print(tried(lambda: open({str(tmp_path / "secret")!r})), tried(lambda: os.listdir({str(Path.home())!r})))
print(tried(lambda: socket.socket()), tried(lambda: socket.socket(socket.AF_UNIX)))
print(tried(lambda: open("/usr/bin/evil", "w")), tried(lambda: os.listdir("/proc")), os.path.exists("/etc/passwd"))
"""
    *_, log = await bench.run("python3", "-c", code, **{"in": b"mine"})
    refused = {"Read-only file system", "Permission denied", "No such file or directory", "Operation not permitted"}
    words = log.split("\n")
    assert len(words) == 5, log
    for word in refused:
        log = log.replace(word, "")
    assert log.split() == ["False"]
    assert (bench.folder / "1-in").read_bytes() == b"mine"


async def test_a_fork_bomb_and_what_left_its_session_are_dead_at_the_end(bench: Bench) -> None:
    code = """
import os, signal
if os.fork() == 0:
    os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()
made = 0
try:
    while made < 1000:
        if os.fork() == 0: signal.pause()
        made += 1
except OSError: pass
print(made < 100)
"""
    _, result, _, log = await bench.python(code)
    assert (result.ended, log) == ("exited", "True\n")
    assert left_over() == []


async def test_memory_taken_in_parts_is_ended_at_the_limit_of_all_together(bench: Bench) -> None:
    code = """
import os
for _ in range(4):
    if os.fork() == 0: break
held = [bytearray(b"x" * (1 << 20)) for _ in range(128)]
os.wait()
"""
    _, result, _, _ = await bench.python(code, memory=128 * MIB)
    assert result.ended == "memory"
    fill = "with open('/scratch/fill', 'wb') as file:\n    while True: file.write(bytes(1 << 20))"
    _, result, _, log = await bench.python(fill, memory=128 * MIB)  # what it writes is memory too
    assert result.ended == "memory", log


@pytest.mark.parametrize(("signal", "ended"), [("SIGKILL", "lost"), ("SIGSTOP", "deadline")])
async def test_a_script_that_takes_its_supervisor_down_loses_its_outputs_only(
    bench: Bench, signal: str, ended: str
) -> None:
    code = f"import os, signal, time; open('/outputs/x', 'w'); os.kill(os.getppid(), signal.{signal}); time.sleep(60)"
    done, result, kept, _ = await bench.python(code, seconds=2)
    assert (result.ended, kept) == (ended, {})
    assert (done.used_ns == 2 * SECOND) == (ended == "deadline")
    assert left_over() == []


async def test_a_flood_of_words_is_ended_and_its_news_stay_small(bench: Bench) -> None:
    _, result, _, log = await bench.python("while True: print('x' * 1000)")
    assert (result.ended, len(log)) == ("log-flood", params.SANDBOX_LOG_KEPT_BYTES)
    assert all(len(text) < params.SCRIPT_NEWS_CHARS_MAX + 100 for text, _ in bench.news)
    assert "bytes left out" in bench.news[-1][0]


async def test_cancelling_ends_the_script_and_leaves_nothing(bench: Bench) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.python, "print('here', flush=True)\nwhile True: pass")
            with trio.fail_after(30):
                await bench.heard.wait()
            scope.cancel()
    assert scope.cancelled_caught
    assert list((bench.folder / "scratch").iterdir()) == []
    assert left_over() == []


# --- refusals --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weak", [Level.NONE, Level.LIMITS, Level.FILTERED, Level.NAMESPACED])
async def test_below_contained_a_script_is_refused_with_the_way_out(tmp_path: Path, weak: Level) -> None:
    (tmp_path / "scratch").mkdir()
    with pytest.raises(WorkFailed, match="needs sandbox level CONTAINED") as caught:
        await Bench.run(_bench_at(tmp_path / "bench", weak), "true")
    assert caught.value.code == "sandbox-too-weak"
    assert "ichiba doctor" in caught.value.next_step
    with pytest.raises(CageFailed, match=weak.name):
        await Cage.start(weak, room=Room({}, 64 * MIB, MIB))


def _bench_at(folder: Path, level: Level) -> Bench:
    folder.mkdir()
    return Bench(folder, level)


async def test_an_input_that_is_a_link_or_gone_is_not_given(bench: Bench, tmp_path: Path) -> None:
    spec = ScriptSpec(
        network=bytes(32), command=("true",), files=(FileRef("in", bytes(32), 1),), seconds=1, memory_bytes=64 * MIB,
        outputs_bytes=0, seed=0, name="x",
    )  # fmt: skip
    (tmp_path / "link").symlink_to("/etc/passwd")
    for path in (tmp_path / "gone", tmp_path / "link"):
        with pytest.raises(WorkFailed) as caught:
            await run_script(
                ScriptOrder("w", spec, {"in": path}), level=bench.level, scratch_dir=tmp_path, on_news=lambda *_: None
            )
        assert caught.value.code == "missing-input"
