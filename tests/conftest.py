"""How `pytest -n auto` (pytest-xdist), which `make test` runs, shares the tests among its processes.

A file stays with one process, so that what its tests share is made once. All tests that start peers, cages or
attackers stay with one process: they bring more processes with them, and never run beside another such test. They
take longest and start first. Without `-n` only the order of the files is another one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from torch import Tensor
    from xdist.scheduler import LoadScopeScheduling

    from peer.workshop import Workshop
    from tests.fake_daemon import FakeDaemon
    from worker.capture import Captured
    from worker.job_file import JobFile
    from worker.sandbox import SandboxReport

REAL = (
    "attacks/",
    "swarm/",
    "test_cli.py",
    "test_dispute_worker.py",
    "test_pause.py",
    "test_sandbox.py",
    "test_script_worker.py",
    "test_unit_work.py",
    "test_workshop.py",
)
LONG = ("test_vectors.py", "test_simulation.py", "test_reference.py", "test_exact_", "test_crash.py")
ALONE = ("test_vectors.py",)  # each of its tests is long, and starts a process of its own

CAPTURED: dict[tuple[str, str], Captured] = {}

# A shell starts what runs in its background deaf to Ctrl-C, and so would be the commands that tests send one to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes depends on what runs beside it: no test fails of that.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The data directory of a peer that never ran."""
    from tests.cli_scene import made_home

    return made_home(tmp_path / "peer")


@pytest.fixture
def daemon(home: Path) -> Iterator[FakeDaemon]:
    """What answers the control socket of `home`."""
    from tests.cli_scene import answering

    with answering(home) as fake:
        yield fake


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture each text of a model once in this process, whichever jobs train it: for tests of what comes after. A
    capture takes seconds, and follows from the text alone."""
    import worker.prepare

    capture = worker.prepare._capture

    def remembered(job: JobFile, prompts: list[Tensor]) -> Captured:
        assert job.kind == "train", "a generation's data comes from its build()"
        file, name = job.model
        text = file.read_text()
        if (text, name) not in CAPTURED:
            CAPTURED[text, name] = capture(job, prompts)
        return CAPTURED[text, name]

    monkeypatch.setattr(worker.prepare, "_capture", remembered)


@pytest.fixture(scope="module")
def report() -> SandboxReport:
    """What this machine's sandbox proves, once for a module."""
    import trio

    from worker.sandbox import probe

    return trio.run(probe)


@pytest.fixture
async def workshop(report: SandboxReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Workshop]:
    """A workshop at the level this machine proves."""
    import peer.workshop

    async def proven() -> SandboxReport:
        return report

    monkeypatch.setattr(peer.workshop, "probe", proven)
    async with peer.workshop.Workshop(tmp_path / "scratch") as open_workshop:
        yield open_workshop
    assert not list((tmp_path / "scratch").glob("*.part")), "no half checkpoint is left"


def group_of(node: str) -> str:
    """The tests that run in one process, one after another, by a test's name such as tests/test_book.py::test_x."""
    file = node.partition("::")[0].removeprefix("tests/")
    if file.startswith(REAL):
        return "real"
    return node if file.startswith(ALONE) else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first: a long file that starts last would leave all processes but one idle."""
    for item in items:
        if item.get_closest_marker("swarm") is not None and group_of(item.nodeid) != "real":
            raise pytest.UsageError(f"{item.nodeid} starts real peers: name its file in REAL in tests/conftest.py")
    items.sort(key=lambda item: [not item.nodeid.removeprefix("tests/").startswith(names) for names in (REAL, LONG)])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are cores, for swarms wait for one another much of their time; four hold up to 6 GB."""
    return min(4, 1 + (os.cpu_count() or 1))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Hand out whole groups, in the order of the collection."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)
