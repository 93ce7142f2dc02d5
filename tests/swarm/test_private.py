"""Real processes: of a job whose first and last stage its submitter keeps, rows, labels and those stages stay with it.

All that the submitter's process sends is written down before it is encrypted (tests/tapped_peer.py) and searched for
what must not be there, and for what must, so that a tap that hears nothing cannot pass.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import trio
from click.testing import CliRunner

import peer.lan
from peer.blobs import BlobStore
from peer.cli import cli
from peer.lan import LAN_RULES, Lan, Member, Running
from protocol import params, safetensors
from protocol.batches import rows_of
from protocol.blob import blob_id, manifest_of
from protocol.errors import NotFound
from protocol.keys import peer_key
from protocol.network import load
from protocol.records import ROLE_SOLVER, ROLE_VERIFIER
from protocol.sealing import locator_of
from tests.swarm.conftest import make_config, start_node

pytestmark = [pytest.mark.swarm, pytest.mark.slow]
SECONDS_MAX = 600  # the run takes about 30 s on two idle cores
BOTH = ROLE_SOLVER | ROLE_VERIFIER
MEMBERS = (
    Member(name="submitter", roles=0, free_micro=50_000_000),
    Member(name="solver-1", roles=BOTH, unit_price=1200),
    Member(name="solver-2", roles=BOTH, unit_price=1210),
)
STAGES, KEPT = 4, (0, 3)
MODEL = """
import numpy as np
import torch
from torch import nn
from ichiba import Training

EXAMPLE = {"x": torch.zeros(16, 48), "y": torch.zeros(16, dtype=torch.int64)}

def build():
    first, *middle, last = nn.Linear(48, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 61)
    model = nn.Sequential(first, nn.ReLU(), middle[0], nn.ReLU(), middle[1], nn.ReLU(), last)
    return Training(model, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()), EXAMPLE)

def data():
    rng = np.random.default_rng(12345)
    return {"x": rng.normal(size=(64, 48)).astype(np.float32), "y": rng.integers(61, size=64).astype(np.uint8)}
"""
JOB = """
name = "private"
model = "model.py:build"
data = "model.py:data"
seed = 5
steps = 8
steps_per_segment = 4
budget = "1.00"
price = 20000
[batch]
rule = "rows"
size = 16
[learning_rate]
peak = 0.01
[parallel]
stages = 4
replicas = 1
micro_batches = 2
compress = "4/8"
[privacy]
keep = ["first", "last"]
"""


@dataclass
class Secrets:
    """What must not leave. needles: byte strings that chance does not make. blobs: the ids of what holds them."""

    needles: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, data: bytes, *, starts: Iterable[int], length: int = 32) -> None:
        """Pieces of `data`; those with few different bytes, as of zeros, are left out."""
        for start in starts:
            piece = data[start : start + length]
            if len(set(piece)) >= 12:
                self.needles[f"{name}[{start}]"] = piece

    def add_state(self, name: str, file: bytes) -> None:
        """The tensors of a checkpoint but what is said of links: what a neighbour sent or got is no secret to it."""
        for tensor, array in safetensors.parse(memoryview(file)).items():
            if not tensor.startswith("ichiba."):
                data = array.tobytes()
                self.add(f"{name} {tensor}", data, starts=(0, len(data) // 8 * 4, max(0, len(data) - 32)))


def id_of(data: bytes) -> bytes:
    return blob_id(manifest_of([data]))


def found_in(sent: Sequence[bytes], secrets: Secrets) -> list[str]:
    """The names of the needles that were sent."""
    return [name for name, needle in secrets.needles.items() if any(needle in stream for stream in sent)]


@pytest.fixture
def lan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lan]:
    """The swarm; what its submitter sends goes to tmp_path / "sent"."""
    plain = peer.lan.command

    def command(one: Running, known: Sequence[str]) -> list[str]:
        words = plain(one, known)
        if one.member.name != "submitter":
            return words
        assert words[2:4] == ["-m", "peer.cli"]
        tapped = Path(__file__).parent.parent / "tapped_peer.py"
        return [sys.executable, "-P", str(tapped), str(tmp_path / "sent"), *words[4:]]

    monkeypatch.setattr(peer.lan, "command", command)
    rules = msgspec.structs.replace(LAN_RULES, proposal_ms=15_000)  # what a loaded machine needs to answer
    made = Lan.create(tmp_path / "lan", MEMBERS, seed=1, rules=rules)
    release = made.guard(remove=False)
    try:
        made.start()
        made.meet(seconds=SECONDS_MAX)
        yield made
    finally:
        made.stop()
        release()


def ichiba(lan: Lan, *words: str) -> list[dict[str, Any]]:
    """A command of the submitter, in this process: the capture needs torch, and the test does too."""
    told = CliRunner().invoke(cli, ["--data", lan.of("submitter").data, *words, "--json"], catch_exceptions=False)
    assert told.exit_code == 0, f"{words}: {told.stdout[-2000:]}\n{told.stderr}"
    return [json.loads(line) for line in told.stdout.splitlines()]


def trained(lan: Lan, folder: Path) -> dict[str, Any]:
    """The job as it is shown when it is over."""
    folder.mkdir()
    (folder / "model.py").write_text(MODEL)
    (folder / "job.toml").write_text(JOB)
    ended = ichiba(lan, "submit", str(folder), "--timeout", str(SECONDS_MAX))
    job = [line for line in ended if line["schema"] == "ichiba.job/1"][-1]["job"]
    return [line for line in ichiba(lan, "job", "show", job) if line["schema"] == "ichiba.job/1"][-1]


def secrets_of(lan: Lan, folder: Path) -> tuple[Secrets, Secrets]:
    """What is the submitter's own, and what of it solvers need: from the job itself, and from the submitter's disk."""
    from worker.prepare_parallel import prepare_run

    run = prepare_run(folder / "job.toml", load(lan.network_file.read_text()).id)
    own, given = Secrets(), Secrets()
    arrays = {array.name: np.asarray(array.data) for array in run.whole.arrays}
    own.blobs |= {f"array {name}": id_of(data.tobytes()) for name, data in arrays.items()}
    for row, data in enumerate(arrays["x"].view(np.float32).reshape(64, 48)):
        own.add(f"row {row}", data.tobytes(), starts=(0, 96))
    labels = arrays["y"].reshape(64)
    own.add("labels", labels.tobytes(), starts=range(0, 40, 8), length=24)
    sold = {number: unit for number, unit in enumerate(run.units) if not unit.kept}
    assert [number for number in range(STAGES) if number not in sold] == list(KEPT)
    public = b"".join(unit.program for unit in sold.values())
    for number, unit in enumerate(run.units):
        of = given if number in sold else own
        of.blobs |= {f"program {number}": id_of(unit.program), f"state {number}": id_of(unit.state)}
        of.add_state(f"state {number}", unit.state)
        others = b"" if number in sold else public  # names of operations and lines of the model are in all of them
        pieces = range(0, len(unit.program) - 48, 48)
        starts = [start for start in pieces if unit.program[start : start + 48] not in others]
        of.add(f"program {number}", unit.program, starts=starts, length=48)
    task = run.make_task(0, program=bytes(32), arrays=dict.fromkeys(arrays, bytes(32)), state=bytes(32))
    for step in range(task.steps):
        for half, rows in enumerate(np.split(rows_of(task, step), 2)):
            for dtype in (np.uint8, np.int32, np.int64, np.float32):
                batch = labels[rows].astype(dtype).tobytes()
                own.needles[f"labels of step {step}, micro-batch {half}, as {dtype.__name__}"] = batch
    made = checkpoints(lan, {n: state_names(unit.state) for n, unit in enumerate(run.units) if unit.kept})
    assert sorted(number for number, _, _ in made) == sorted(KEPT * task.segments)
    for index, (number, blob, file) in enumerate(made):
        own.add_state(f"checkpoint {index} of unit {number}", file)
        tape = safetensors.parse(memoryview(file))["ichiba.tape"].tobytes()
        own.blobs |= {f"checkpoint {index} of unit {number}": blob, f"tape {index} of unit {number}": tape}
    return own, given


def state_names(file: bytes) -> set[str]:
    return set(safetensors.parse(memoryview(file)))


def checkpoints(lan: Lan, names: dict[int, set[str]]) -> list[tuple[int, bytes, bytes]]:
    """The checkpoints on the submitter's disk that its units made: unit, blob and bytes."""
    found = []
    for path in sorted(Path(lan.of("submitter").data, "blobs", "blobs").glob("*.data")):
        file = path.read_bytes()
        for number, wanted in names.items():
            head = file[: 8 + int.from_bytes(file[:8], "little")]
            if all(f'"{name}"'.encode() in head for name in wanted) and any(
                safetensors.parse(memoryview(file))["ichiba.tape"]
            ):
                found.append((number, bytes.fromhex(path.stem), file))
    return found


async def answers(lan: Lan, blobs: dict[str, bytes], folder: Path) -> dict[str, str]:
    """What the submitter says to a stranger who knows the ids of these blobs: "" for giving it."""
    said: dict[str, str] = {}
    network = load(lan.network_file.read_text())
    one = lan.of("submitter")
    with trio.fail_after(SECONDS_MAX), one.client() as client:
        status = client.status()
        async with start_node(make_config(network_tag=network.id.hex()[:16])) as stranger:
            await stranger.host.connect(status["addresses"][0])
            store = BlobStore(folder, params.BLOB_STORE_BYTES_MAX)
            for name, blob in blobs.items():
                try:
                    await store.fetch(stranger.host, blob, [peer_key(one.peer)], size_max=params.BLOB_BYTES_MAX)
                except NotFound as error:
                    said[name] = str(error)
                else:
                    said[name] = ""
    return said


def test_nothing_of_what_a_submitter_keeps_leaves_its_process(lan: Lan, tmp_path: Path) -> None:
    job = trained(lan, tmp_path / "job")
    assert job["state"] == "done", job
    assert [unit["unit"] for unit in job["run"]["units"] if unit["kept"]] == list(KEPT)
    assert [unit["segments_done"] for unit in job["run"]["units"]] == [2] * STAGES
    assert sorted(lan.name_of(deal["solver"]) for deal in job["deals"]) == ["solver-1", "solver-2"]
    for deal in job["deals"]:
        assert deal["state"] == "settled" and deal["checks"] and deal["paid_micro"] == deal["vouchers_micro"] > 0, deal
    ichiba(lan, "job", "get", job["job"], "-o", str(tmp_path / "result"))
    weights = safetensors.parse((tmp_path / "result" / "weights.safetensors").read_bytes())
    assert {"0.weight", "2.weight", "4.weight", "6.weight"} <= set(weights), sorted(weights)

    own, given = secrets_of(lan, tmp_path / "job")
    sent = [path.read_bytes() for path in (tmp_path / "sent").iterdir()]
    heard = found_in(sent, given)
    assert len(heard) > 0.9 * len(given.needles), "the tap hears what is given to solvers, but where frames cut it"
    assert len(own.needles) > 200
    assert found_in(sent, own) == []
    theirs = {path.name for name in ("solver-1", "solver-2") for path in (lan.path / name / "blobs").rglob("*.data")}
    assert not {name for name, blob in own.blobs.items() if f"{blob.hex()}.data" in theirs}
    assert all(any(blob.hex() in name for name in theirs) for blob in given.blobs.values())

    said = trio.run(answers, lan, own.blobs | {"no key": locator_of(bytes(32))}, tmp_path / "stranger")
    assert all("does not have it" in words for words in said.values()), said
    said = trio.run(answers, lan, given.blobs, tmp_path / "stranger")
    assert not any(said.values()), said
