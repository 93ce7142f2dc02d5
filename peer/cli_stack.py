"""What a job is stacked on: the end of an earlier job, found on this peer or in a folder, its proof checked first."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from peer.cli_output import Terminal, short_id
from protocol.errors import IchibaError

if TYPE_CHECKING:
    from peer.client import Client
    from protocol.bundle import BundleReport
    from worker.job_file import SettledJob

__all__ = ["stacking"]


class _NoBase(IchibaError):
    """The job below cannot be built on."""

    code = "no-base"


@contextmanager
def stacking(terminal: Terminal, client: Client) -> Iterator[Callable[[SettledJob], Path]]:
    """Within, a function that gives the last checkpoint of a finished job, of whose proof every word was checked."""
    found: list[str] = []  # said at the end: until then a bar may be on the screen
    with tempfile.TemporaryDirectory(prefix="ichiba-base-") as folder:

        def find(below: SettledJob) -> Path:
            if below.folder is not None:
                checkpoint, report = _of_folder(terminal, below.folder)
            else:
                checkpoint, report = _of_job(terminal, client, below.job, Path(folder))
            found.append(f"stands on job {short_id(report.job.hex())} ({report.name}), whose proof was checked")
            return checkpoint

        yield find
    for line in found:
        terminal.note(line)


def _of_folder(terminal: Terminal, folder: Path) -> tuple[Path, BundleReport]:
    """The checkpoint in a folder that `ichiba job get` wrote, here or elsewhere."""
    from peer.cli_money import check_proof
    from peer.home import Home

    report, _ = check_proof(folder / "proof.json", Home(terminal.data_dir).network().id)  # its files too
    checkpoint = folder / "checkpoint.safetensors"
    if not report.complete or report.script or not checkpoint.is_file():
        raise _NoBase(
            f"{folder} is no finished job to build on",
            why="its checkpoint.safetensors is gone" if report.complete and not report.script else "see its proof",
            next_step=f"ichiba receipts verify {folder}",
        )
    return checkpoint, report


def _of_job(terminal: Terminal, client: Client, job_id: str, folder: Path) -> tuple[Path, BundleReport]:
    """The checkpoint of a finished job of this peer."""
    from peer.home import Home
    from protocol.bundle import make_bundle, verify_bundle, verify_checkpoint

    found = client.job(job_id)
    name = short_id(found["job"])
    if found["state"] != "done" or found.get("kind") == "script":
        raise _NoBase(
            f"job {name} is {found['state'] if found['state'] != 'done' else 'a script'}, nothing can be built on it",
            why=found["reason"], next_step="ichiba job ls",
        )  # fmt: skip
    home = Home(terminal.data_dir)
    evidence = client.bundle(found["job"])
    report = verify_bundle(make_bundle(evidence, network=home.network_file.read_text(), state={}), home.network().id)
    checkpoint = folder / "checkpoint.safetensors"
    client.get_blob(bytes.fromhex(evidence["checkpoint"]), checkpoint)
    with checkpoint.open("rb") as file:
        verify_checkpoint(report, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    return checkpoint, report
