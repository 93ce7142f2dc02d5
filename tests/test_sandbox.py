"""The sandbox: attacks really tried from inside, the level they prove, and what happens when a part is missing."""

from __future__ import annotations

import errno
import os
import re
import select
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from protocol import params
from protocol.errors import LocalProtocolError
from worker import birth, cage, canary, cgroups, sandbox
from worker.cage import CageFailed, find_bubblewrap
from worker.frames import Attempted
from worker.sandbox import REQUIRED, Level, SandboxReport, SandboxTooWeak, admit, doctor_lines, probe
from worker.seccomp import NUMBERS, Tier, filter_program

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
X86_64 = 0xC000003E
SOURCE = Path(cage.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def report() -> SandboxReport:
    return trio.run(probe)


@pytest.fixture(scope="module")
def tried(report: SandboxReport) -> dict[tuple[Tier, str], Attempted]:
    """What became of each attempt at the proven level, in both tiers."""

    async def all_of(tier: Tier) -> list[Attempted]:
        with sandbox._Decoys() as decoys:
            told, _, _ = await sandbox.rehearse(report.level, tier, sandbox._attempts(report.level, tier), decoys)
        return told

    return {(tier, one.attempt): one for tier in Tier for one in trio.run(all_of, tier)}


def names_of_processes() -> list[str]:
    return [path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm") if path.exists()]


def words_of(attempts: tuple[object, ...]) -> list[str]:
    return [attempt.__name__.replace("_", "-") for attempt in attempts]  # type: ignore[attr-defined]


# --- the ladder ------------------------------------------------------------------------------------------------
def test_this_machine_proves_a_level_that_runs_graph_jobs_and_says_it(report: SandboxReport) -> None:
    assert report.level >= Level.FILTERED, report.attempts
    assert report.attempts[report.level] == ()
    assert all(report.attempts[level] for level in report.attempts if level > report.level)
    assert report.level.name in report.words()
    assert report.tried >= 2 * len(canary.LIMITS + canary.FILTERED)


@pytest.mark.parametrize("name", words_of(canary.LIMITS + canary.FILTERED + canary.NAMESPACED + canary.CONTAINED))
def test_an_attack_from_inside_is_stopped(
    name: str, report: SandboxReport, tried: dict[tuple[Tier, str], Attempted]
) -> None:
    if name not in sandbox._attempts(report.level, Tier.BASE):
        pytest.skip(f"level {report.level.name} does not claim to stop it")
    assert tried[Tier.BASE, name].blocked, tried[Tier.BASE, name].detail


@pytest.mark.parametrize("name", words_of(canary.LIMITS + canary.FILTERED + canary.GRAPH))
def test_a_graph_worker_stops_it_too(name: str, tried: dict[tuple[Tier, str], Attempted]) -> None:
    assert tried[Tier.GRAPH, name].blocked, tried[Tier.GRAPH, name].detail


async def test_the_same_attacks_get_through_where_nothing_stops_them() -> None:
    harmless = ["read-secret", "read-passwords", "see-outside", "see-host-root", "write-outside", "connect-tcp",
                "send-udp", "connect-abstract", "connect-path", "signal-daemon", "list-processes", "hidden-memory",
                "no-limits", "memory-bomb", "fork-bomb", "start-process", "start-program", "open-for-writing",
                "any-socket", "change-mode", "own-signals"]  # fmt: skip
    with sandbox._Decoys() as decoys:
        told, _, _ = await sandbox.rehearse(Level.NONE, Tier.BASE, tuple(harmless), decoys)
    assert [one.attempt for one in told if one.blocked] == []
    assert [one.attempt for one in told] == harmless


async def test_a_grandchild_that_left_its_session_dies_with_the_worker(report: SandboxReport) -> None:
    if report.level < Level.NAMESPACED:
        pytest.skip("without a process namespace the graph filter lets no process start at all")
    with sandbox._Decoys() as decoys:
        told, _, _ = await sandbox.rehearse(report.level, Tier.BASE, ("leave-grandchild",), decoys)
    assert [one.attempt for one in told] == ["leave-grandchild"]
    assert "ichiba-left" not in names_of_processes()


def test_the_worker_dies_when_the_daemon_is_killed(report: SandboxReport) -> None:
    script = (
        "import os, signal, trio\n"
        "from worker.cage import Cage, Level\n"
        "async def main():\n"
        f"    cage = await Cage.start(Level({int(report.level)}), torch=False)\n"
        "    await cage.receive()\n"
        "    print(cage.process.pid, flush=True)\n"
        "    input()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "trio.run(main)\n"
    )
    daemon = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert daemon.stdin is not None
    assert daemon.stdout is not None
    number = int(daemon.stdout.readline())
    contained = report.level >= Level.CONTAINED
    groups = list(cgroups._find_parent().memory.glob(f"ichiba-{daemon.pid}-*")) if contained else []
    numbers = {number, *(int(n) for group in groups for n in (group / "cgroup.procs").read_text().split())}
    inside = [os.pidfd_open(n) for n in numbers]
    assert not select.select(inside, [], [], 0)[0], "the worker lives"
    daemon.stdin.write("\n")
    daemon.stdin.close()
    daemon.wait()
    daemon.stdout.close()
    for pidfd in inside:
        assert select.select([pidfd], [], [], 10)[0], "all of the worker died within 10 s"
        os.close(pidfd)
    assert len(groups) == (1 if contained else 0)
    cgroups.sweep()
    assert not any(group.exists() for group in groups), "what nobody was left to remove is swept"


# --- parts that are missing ------------------------------------------------------------------------------------
def fake_bubblewrap(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    (folder / "bwrap").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "bwrap").chmod(0o755)
    folder.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


async def test_without_bubblewrap_the_level_falls_and_the_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    report = await probe()
    assert report.level == Level.FILTERED
    assert "apt-get install bubblewrap" in report.words()
    assert "bubblewrap is not installed" in report.attempts[Level.NAMESPACED][0]
    (line,) = [line for line in doctor_lines(report) if line.what == "bubblewrap"]
    assert line.fix == "apt-get install bubblewrap"
    admit("graph", report.level)
    with pytest.raises(SandboxTooWeak, match="CONTAINED"):
        admit("script", report.level)


async def test_a_bubblewrap_that_fails_is_not_taken_for_one_that_confines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = 'if [ "$1" = --version ]; then echo bubblewrap 0.9.0; exit; fi; echo No permissions to make a namespace >&2'
    fake_bubblewrap(tmp_path, monkeypatch, f"{said}; exit 1")
    report = await probe(Level.NAMESPACED)
    assert report.level == Level.FILTERED
    assert report.attempts[Level.NAMESPACED]


async def test_a_bubblewrap_that_confines_nothing_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts the worker as asked, only without namespaces and filter: the canary's attacks get through."""
    (tmp_path / "fake.py").write_text(
        "import json, os, subprocess, sys\n"
        f"words = [word.replace('/code', {str(SOURCE)!r}) for word in sys.argv[1:]]\n"
        "inner = words[words.index('--') + 1 :]\n"
        "child = subprocess.Popen(inner, close_fds=False)\n"
        "os.write(int(words[words.index('--info-fd') + 1]), json.dumps({'child-pid': child.pid}).encode() + b'\\n')\n"
        "sys.exit(child.wait())\n"
    )
    said = 'if [ "$1" = --version ]; then echo bubblewrap 0.9.0; exit; fi'
    fake_bubblewrap(tmp_path, monkeypatch, f'{said}\nexec {sys.executable} {tmp_path}/fake.py "$@"')
    monkeypatch.setattr(cage.os, "geteuid", lambda: 1)  # or root would be given up, and the fake is ours alone
    report = await probe(Level.NAMESPACED)
    assert report.level < Level.NAMESPACED
    assert any(line.startswith("send-udp") for line in report.attempts[Level.NAMESPACED]), report.attempts


def test_an_old_bubblewrap_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_bubblewrap(tmp_path, monkeypatch, "echo bubblewrap 0.6.1")
    path, why = find_bubblewrap()
    assert path is None
    assert "0.6.1 is too old" in why


async def test_without_a_filter_for_the_processor_graph_jobs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cage.platform, "machine", lambda: "riscv64")
    report = await probe()
    assert report.level == Level.LIMITS
    with pytest.raises(SandboxTooWeak, match="FILTERED"):
        admit("graph", report.level)


def test_nothing_is_shown_that_holds_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [source for source, _ in cage._shown()]
    assert not any(SOURCE.is_relative_to(source) or Path.home().is_relative_to(source) for source in shown)
    assert SOURCE / "market" not in shown
    assert SOURCE / "peer" not in shown
    monkeypatch.setenv("HOME", "/usr/lib/somebody")
    with pytest.raises(CageFailed, match="home directory"):
        cage._shown()


# --- control groups of version 2, which not every machine that runs these tests has -----------------------------
def folder_of_version_2(path: Path, *, hands_down: str, members: str = "") -> Path:
    path.mkdir()
    for name, text in (("subtree_control", hands_down), ("controllers", "cpu memory pids"), ("procs", members)):
        (path / f"cgroup.{name}").write_text(text)
    return path


def test_a_group_is_made_in_the_nearest_folder_that_hands_memory_and_pids_down(tmp_path: Path) -> None:
    user = folder_of_version_2(tmp_path / "user", hands_down="cpu memory pids", members="")
    part = folder_of_version_2(user / "app", hands_down="memory")
    own = folder_of_version_2(part / "scope", hands_down="", members="1\n2\n")
    assert cgroups._version_2_parent(own) == user
    (part / "cgroup.subtree_control").write_text("memory pids")
    assert cgroups._version_2_parent(own) == part


def test_a_daemon_alone_in_a_delegated_group_steps_down_to_hand_controllers_on(tmp_path: Path) -> None:
    own = folder_of_version_2(tmp_path / "scope", hands_down="", members=f"{os.getpid()}\n")
    assert cgroups._version_2_parent(own) == own
    assert (own / "daemon" / "cgroup.procs").read_text() == str(os.getpid())
    assert (own / "cgroup.subtree_control").read_text() == "+memory +pids"
    shared = folder_of_version_2(tmp_path / "session", hands_down="", members=f"{os.getpid()}\n1\n")
    assert cgroups._version_2_parent(shared) is None, "other people's processes are left where they are"
    assert not (shared / "daemon").exists()


def test_a_group_of_version_2_caps_and_counts_in_its_own_files(tmp_path: Path) -> None:
    group = cgroups.Cgroup(2, tmp_path, tmp_path)
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 4\noom 1\noom_kill 3\n")
    (tmp_path / "memory.peak").write_text("12345\n")
    group.limit_memory(1000)
    assert (tmp_path / "memory.max").read_text() == "1000"
    assert (tmp_path / "memory.swap.max").read_text() == "0"
    assert group.joins == (str(tmp_path / "cgroup.procs"),)
    assert (group.oom_kills(), group.memory_peak_bytes()) == (3, 12345)


def test_the_levels_that_records_name_are_those_that_are_proven() -> None:
    assert [level.name for level in sorted(Level)] == list(params.SANDBOX_LEVELS)
    assert [int(level) for level in sorted(Level)] == list(range(len(params.SANDBOX_LEVELS)))


# --- admission -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [*REQUIRED, "notebook"])
@pytest.mark.parametrize("level", Level)
@pytest.mark.parametrize("minimum", Level)
def test_a_job_runs_at_its_level_or_above_and_the_owner_may_only_ask_for_more(
    kind: str, level: Level, minimum: Level
) -> None:
    if kind in REQUIRED and level >= REQUIRED[kind] and level >= minimum:
        admit(kind, level, minimum=minimum)
    else:
        with pytest.raises(SandboxTooWeak):
            admit(kind, level, minimum=minimum)


def test_the_doctor_names_each_part_and_mends_what_is_missing() -> None:
    for level in Level:
        attempts = {tried: ("read-secret: read 26 bytes",) for tried in Level if tried > level} | {level: ()}
        lines = doctor_lines(SandboxReport(level, attempts, 0.5))
        assert lines[0].level == level
        assert lines[0].explanation.startswith(f"{level.name}, {int(level)} of 4: ")
        assert ("graph jobs" in lines[0].explanation) == (level >= REQUIRED["graph"])
        assert ("graph jobs and scripts are accepted" in lines[0].explanation) == (level >= REQUIRED["script"])
        assert bool(lines[0].fix) == (level < REQUIRED["graph"])
        assert {"bubblewrap", "Landlock", "graph jobs", "script jobs"} <= {line.what for line in lines}
        refused = [line.what for line in lines if line.explanation.startswith("refused")]
        assert refused == [f"{kind} jobs" for kind, need in REQUIRED.items() if level < need]
        assert all(line.explanation for line in lines)


# --- the filters, executed here as the kernel does ------------------------------------------------------------
def verdict(program: bytes, number: int, arguments: tuple[int, ...] = (0,) * 6, arch: int = X86_64) -> int:
    """What the filter answers to a call. Interprets the few instructions it is built of."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments)
    statements = [struct.unpack_from("HBBI", program, place) for place in range(0, len(program), 8)]
    held, place = 0, 0
    while True:
        code, if_true, if_false, constant = statements[place]
        place += 1
        if code == 0x20:
            (held,) = struct.unpack_from("<I", data, constant)
        elif code == 0x54:
            held &= constant
        elif code == 0x06:
            return int(constant)
        else:
            assert code in (0x15, 0x35)
            holds = held == constant if code == 0x15 else held >= constant
            place += if_true if holds else if_false


WORDS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2, 0x5412, 1 << 32 | 0x5412, 0x10000000, 0x50F00]))


@given(st.integers(0, 600), st.tuples(*[WORDS] * 6))
def test_the_graph_filter_allows_nothing_that_the_base_filter_refuses(number: int, arguments: tuple[int, ...]) -> None:
    if verdict(filter_program(Tier.GRAPH), number, arguments) == ALLOW:
        assert verdict(filter_program(Tier.BASE), number, arguments) == ALLOW


@pytest.mark.parametrize("tier", Tier)
def test_a_filter_refuses_what_it_does_not_know(tier: Tier) -> None:
    program = filter_program(tier)
    known = set(NUMBERS.values())
    assert {verdict(program, number) for number in range(600) if number not in known} == {EPERM}
    assert verdict(program, NUMBERS["read"]) == ALLOW
    assert verdict(program, NUMBERS["read"], arch=0x40000003) == KILL
    assert verdict(program, NUMBERS["read"] | 0x40000000) == KILL
    assert verdict(program, NUMBERS["clone3"]) == ENOSYS


@pytest.mark.parametrize(
    ("name", "arguments", "base", "graph"),
    [
        ("openat", (0, 0, os.O_RDONLY, 0, 0, 0), True, True),
        ("openat", (0, 0, os.O_WRONLY, 0, 0, 0), True, False),
        ("openat", (0, 0, os.O_RDONLY | os.O_CREAT, 0, 0, 0), True, False),
        ("openat", (0, 0, os.O_RDONLY | os.O_TRUNC, 0, 0, 0), True, False),
        ("clone", (0x3D0F00, 0, 0, 0, 0, 0), True, True),  # a thread, as glibc starts one
        ("clone", (0x11, 0, 0, 0, 0, 0), True, False),  # a process
        ("clone", (0x10000011, 0, 0, 0, 0, 0), False, False),  # a user namespace
        ("clone", (0x103D0F00, 0, 0, 0, 0, 0), False, False),
        ("ioctl", (0, 0x5401, 0, 0, 0, 0), True, True),
        ("ioctl", (0, 0x5412, 0, 0, 0, 0), False, False),  # TIOCSTI
        ("ioctl", (0, 1 << 32 | 0x5412, 0, 0, 0, 0), False, False),
        ("prlimit64", (0, 7, 0, 0, 0, 0), True, True),
        ("prlimit64", (1, 7, 0, 0, 0, 0), False, False),
        ("seccomp", (1, 1, 0, 0, 0, 0), True, True),
        ("seccomp", (1, 8, 0, 0, 0, 0), False, False),  # a listener that answers for the kernel
        ("fcntl", (0, 1030, 0, 0, 0, 0), True, True),
        ("fcntl", (0, 8, 0, 0, 0, 0), False, False),  # F_SETOWN
        ("socket", (2, 1, 0, 0, 0, 0), False, False),
        ("mmap", (0, 4096, 3, 0x22, -1 % 2**64, 0), True, True),  # private memory
        ("mmap", (0, 4096, 1, 0x1, 3, 0), True, True),  # a file lent to it
        ("mmap", (0, 4096, 3, 0x21, -1 % 2**64, 0), True, False),  # shared memory, which RLIMIT_DATA does not count
        ("mmap", (0, 4096, 3, 0x23, -1 % 2**64, 0), True, False),
        ("mmap", (0, 4096, 3, 0x122, -1 % 2**64, 0), False, False),  # nor a stack that grows
        ("recvmsg", (3, 0, 0, 0, 0, 0), True, False),
        ("execve", (0, 0, 0, 0, 0, 0), True, False),
        ("fchmod", (0, 0, 0, 0, 0, 0), False, False),
        ("utimensat", (3, 0, 0, 0, 0, 0), False, False),  # of a descriptor
        ("utimensat", (0, 0x7F0000001000, 0, 0, 0, 0), True, False),  # of a path
    ],
)
def test_a_call_is_judged_by_its_arguments(name: str, arguments: tuple[int, ...], base: bool, graph: bool) -> None:
    for tier, allowed in ((Tier.BASE, base), (Tier.GRAPH, graph)):
        assert verdict(filter_program(tier), NUMBERS[name], arguments) == (ALLOW if allowed else EPERM), tier


def test_outside_a_process_namespace_signals_go_to_oneself_only() -> None:
    for name in ("kill", "tkill", "tgkill"):
        assert verdict(filter_program(Tier.BASE, only_pid=77), NUMBERS[name], (77, 9, 0, 0, 0, 0)) == ALLOW
        assert verdict(filter_program(Tier.BASE, only_pid=77), NUMBERS[name], (78, 9, 0, 0, 0, 0)) == EPERM
        assert verdict(filter_program(Tier.BASE, only_pid=77), NUMBERS[name], (2**64 - 1, 9, 0, 0, 0, 0)) == EPERM


def test_outside_a_process_namespace_only_its_own_processors_are_chosen() -> None:
    number = NUMBERS["sched_setaffinity"]
    for tier in Tier:
        alone = filter_program(tier, only_pid=77)
        assert [verdict(alone, number, (pid, 8, 0, 0, 0, 0)) for pid in (0, 77, 78)] == [ALLOW, ALLOW, EPERM]
        assert verdict(filter_program(tier), number, (78, 8, 0, 0, 0, 0)) == ALLOW


def test_system_call_numbers_are_the_kernels() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no kernel headers here to compare with")
    known = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    assert {name: int(known[name]) for name in NUMBERS if name in known} == {
        name: number for name, number in NUMBERS.items() if name in known
    }
    assert len(set(NUMBERS.values())) == len(NUMBERS)


def test_a_workers_environment_takes_the_kernels_of_a_profile_and_nothing_else() -> None:
    made = birth.environ(2, {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "SSE4_2"})
    assert made["MKL_CBWR"] == "SSE4_2"
    assert made["OMP_NUM_THREADS"] == "2"
    assert set(birth.environ(1, {})) == {
        "PATH", "HOME", "LANG", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"
    }  # fmt: skip
    for strange in ({"LD_PRELOAD": "/tmp/x.so"}, {"MKL_CBWR": "/tmp/x"}, {"PATH": "/tmp"}):
        with pytest.raises(LocalProtocolError, match="no variable that a profile sets"):
            birth.environ(1, strange)
