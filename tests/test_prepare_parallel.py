"""From a job.toml with [parallel] to units that run beside each other and train as the whole does."""

from __future__ import annotations

import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.codec import encode
from protocol.errors import LocalProtocolError
from protocol.program import Program, program_id
from protocol.run_sizes import RunChoice, RunSizes, Share, check_sizes
from protocol.stage import KEPT_PREFIX, OUTER_PREFIX, Codec
from protocol.task import TaskSpec
from tests.models import EXAMPLES
from tests.unit_scene import ThreadNet, ThreadWire
from worker import checkpoint
from worker.executor import Executor
from worker.job_file import BadJobFile, read_job_file
from worker.prepare_parallel import PreparedRun, prepare_run
from worker.stage_run import run_unit
from worker.training import Batches, SegmentResult, rate_of
from worker.unrolling import unrolled

pytestmark = pytest.mark.usefixtures("captured_once")
NETWORK = bytes(32)
MODEL = """
import numpy as np
import torch
from worker import char_gpt
from worker.capture import Training

def build():
    model = char_gpt.CharGPT(symbols=16, context=6, width=8, heads=2, layers=2, dropout=DROPOUT)
    x = torch.zeros(2, 6, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Training(model, char_gpt.loss, optimizer, {"x": x, "y": x.clone()})

def data():
    text = (np.arange(24 * 7).reshape(24, 7) * 5 % 16).astype(np.uint8)
    return {"x": text[:, :6], "y": text[:, 1:]}
"""
JOB = """
name = "tiny"
seed = 5
steps = 4
steps_per_segment = 2
budget = "1.50"
price = 2000
[batch]
rule = "rows"
size = 2
[learning_rate]
peak = 0.01
[parallel]
stages = 2
replicas = 1
micro_batches = 3
compress = "none"
"""

Write = Callable[..., Path]


@pytest.fixture
def job(tmp_path: Path) -> Write:
    """Write the job; replace texts in its files."""

    def write(*changes: tuple[str, str], dropout: float = 0.1) -> Path:
        text = JOB
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        (tmp_path / "model.py").write_text(MODEL.replace("DROPOUT", str(dropout)))
        (tmp_path / "job.toml").write_text(text)
        return tmp_path

    return write


def tasks_of(run: PreparedRun) -> list[TaskSpec]:
    """The task of each unit, with ids of arrays that stand for theirs."""
    arrays = {array.name: b"\x07" * 32 for array in run.whole.arrays}
    made = [
        run.make_task(number, program=program_id(unit.program), arrays=arrays, state=b"\x08" * 32)
        for number, unit in enumerate(run.units)
    ]
    return [TaskSpec.from_bytes(encode(task), network=NETWORK) for task in made]


def segments_of(run: PreparedRun) -> list[list[SegmentResult]]:
    """All units run beside each other, each in a thread, as the worker runs them."""
    tasks, net = tasks_of(run), ThreadNet()
    arrays = {array.name: array.data for array in run.whole.arrays}
    found: list[list[SegmentResult]] = [[] for _ in tasks]

    def one(number: int) -> None:
        unit, task = run.units[number], tasks[number]
        whole = False
        try:
            found[number] += run_unit(
                task=task, program=Program.from_bytes(unit.program), base=unit.state, wire=ThreadWire(net),
                arrays={name: arrays[name] for name in unit.reads}, segments=range(task.segments),
            )  # fmt: skip
            whole = True
        finally:
            if not whole:
                net.fail()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
        assert not thread.is_alive()
    assert [len(results) for results in found] == [task.segments for task in tasks]
    return found


def whole_of(run: PreparedRun) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The last state and the losses of the uncut job."""
    stage = run.units[0].stage
    executor = Executor(unrolled(Program.from_bytes(run.whole.program), stage.micro_batches, replicas=stage.replicas))
    arrays = {array.name: array.data for array in run.whole.arrays}
    state: dict[str, torch.Tensor] = {}
    batches: list[list[Batches]] = [[] for _ in range(stage.replicas)]
    for unit, task in zip(run.units, tasks_of(run), strict=True):
        state |= checkpoint.load(unit.state)
        program = Program.from_bytes(unit.program)
        batches[unit.stage.replica].append(Batches(task, program, {name: arrays[name] for name in unit.reads}))
    state = {item.name: state[item.name] for item in executor.program.inputs if item.name in state}
    losses = []
    for step in range(task.steps):
        rows: list[dict[str, Any]] = [{k: v for one in mine for k, v in one.of(step).items()} for mine in batches]
        batch = {name: torch.cat([mine[name] for mine in rows]) for name in rows[0]}
        state, loss = executor.step(state, batch, rate_of(task, step), task.seed, step)
        losses.append(loss)
    return state, losses


def check_whole(run: PreparedRun) -> None:
    found, (state, losses) = segments_of(run), whole_of(run)
    seen = set()
    for results in found:
        for name, tensor in checkpoint.load(results[-1].checkpoint).items():
            if name in state:
                assert torch.equal(tensor, state[name]), name
                seen.add(name)
    assert seen == set(state)
    if run.units[0].stage.replicas == 1:
        assert [loss for result in found[-1] for loss in result.losses] == losses


# --- running it --------------------------------------------------------------------------------------------
def test_uncompressed_units_train_as_the_whole_does_bit_for_bit(job: Write) -> None:
    run = prepare_run(job(), NETWORK)
    assert [unit.reads for unit in run.units] == [{"x"}, {"y"}]
    assert not any(unit.kept for unit in run.units)
    assert run.whole.first_loss is not None
    row = 3 * 2 * 6 * 8 * 4  # micro-batches, rows, time, width, bytes
    assert run.border_bytes == ((row, row),)
    assert run.shared_bytes == () and not run.gradient_bytes, "one replica shares with none"
    check_whole(run)


def test_uncompressed_replicas_in_step_train_as_the_whole_does_bit_for_bit(job: Write) -> None:
    changes = (("replicas = 1", 'replicas = 2\nsync = "step"\nshare = "none"'), ("steps = 4", "steps = 2"))
    run = prepare_run(job(*changes, dropout=0.0), NETWORK)
    assert len({task.seed for task in tasks_of(run)}) == 2
    check_whole(run)


def test_kept_stages_alone_read_the_rows_and_the_labels(job: Write) -> None:
    path = job(("stages = 2", "stages = 3"), ("[parallel]", '[privacy]\nkeep = ["first", "last"]\n[parallel]'))
    run = prepare_run(path, NETWORK)
    assert [(unit.kept, set(unit.reads)) for unit in run.units] == [(True, {"x"}), (False, set()), (True, {"y"})]
    assert [len(task.fetched) for task in tasks_of(run)] == [1, 0, 1]
    check_whole(run)


def test_replicas_train_alone_and_compressed_unless_the_job_says_otherwise(job: Write) -> None:
    run = prepare_run(job(("replicas = 1", "replicas = 2"), ('compress = "none"', "")), NETWORK)
    stage = run.units[0].stage
    assert (stage.sync, stage.shared, stage.backward) == ("local", Codec("tile", 4), Codec("tile", 8))
    assert stage.forward == Codec("tile", 4), "24 examples are read once, by 4 steps of 6 rows"
    assert (stage.outer_rate_nano, stage.outer_momentum_nano) == (700_000_000, 900_000_000)
    found = segments_of(run)
    for here, there in zip(found[::2], found[1::2], strict=True):
        first, second = checkpoint.load(here[-1].checkpoint), checkpoint.load(there[-1].checkpoint)
        outer = [name.removeprefix(OUTER_PREFIX) for name in first if name.startswith(OUTER_PREFIX)]
        assert outer
        for name in outer:
            assert torch.equal(first[name], second[name]), "replicas are one after each outer step"
    raw = prepare_run(job(("replicas = 1", 'replicas = 2\nshare = "none"')), NETWORK)
    assert sum(run.border_bytes[0]) * 4.9 < sum(raw.border_bytes[0])
    assert run.gradient_bytes * 7 < raw.gradient_bytes


def test_examples_that_come_again_are_kept(job: Write) -> None:
    changes = (("steps = 4", "steps = 8"), ("steps_per_segment = 2", "steps_per_segment = 8"))
    run = prepare_run(job(('compress = "none"', 'compress = "2/4"'), *changes), NETWORK)
    assert run.units[0].stage.forward == Codec("change", 2)
    names = [sorted(n for n in checkpoint.load(unit.state) if n.startswith(KEPT_PREFIX)) for unit in run.units]
    assert names == [[f"{KEPT_PREFIX}send.forward.0"], [f"{KEPT_PREFIX}recv.forward.0"]]
    first, last = segments_of(run)
    kept = checkpoint.load(first[-1].checkpoint)[names[0][0]]
    assert kept.shape == (24, 6, 8)
    assert kept.any(), "examples went over the link"
    assert torch.equal(kept, checkpoint.load(last[-1].checkpoint)[names[1][0]])
    tiled = prepare_run(job(('compress = "none"', 'compress = "tile 2/4"'), *changes), NETWORK)
    assert tiled.units[0].stage.forward == Codec("tile", 2)


def test_what_a_way_of_travel_would_send_is_what_the_units_send(job: Write) -> None:
    """The sizes that a choice is made from, for each choice."""
    path = job(("stages = 2", "stages = 3"), ("replicas = 1", "replicas = 2"), ('compress = "none"', ""))
    seen: list[RunSizes] = []

    def choose(sizes: RunSizes) -> RunChoice:
        seen.append(sizes)
        way = len(seen) - 1
        return RunChoice([way % 4, (way + 1) % 4], way)

    assert len(_options(path)) == 6
    for way in range(6):
        run, sizes = prepare_run(path, NETWORK, choose=choose), seen[-1]
        check_sizes(sizes)
        borders = [sizes.border_bytes[0][way % 4], sizes.border_bytes[1][(way + 1) % 4]]
        assert list(run.border_bytes) == borders
        assert list(run.shared_bytes) == [stage[way] for stage in sizes.shared_bytes]
        assert run.units[0].stage.sync == sizes.shares[way].sync
        assert run.units[0].stage.shared == sizes.shares[way].codec
    assert (sizes.stages, sizes.replicas, sizes.micro_batches, sizes.steps_per_segment) == (3, 2, 3, 2)
    counted = [unit.operations_per_step for unit in run.units[::2]]
    assert sizes.operations == pytest.approx(counted, rel=0.25), "but for what each stage makes for itself"


def _options(path: Path) -> list[Share]:
    found: list[Share] = []
    prepare_run(path, NETWORK, choose=lambda sizes: (found.extend(sizes.shares), sizes.usual())[1])
    return found


@pytest.mark.parametrize(
    ("said", "compressions", "shares"),
    [
        ("", ["none", "8/8", "4/8", "2/4"], ["step none", "step tile 8", "local none", "local tile 8", "local tile 4",
                                             "local sparse"]),
        ('compress = "3/8"\nshare = "tile 6"', ["3/8"], ["step tile 6", "local tile 6"]),
        ('compress = "none"\nsync = "step"', ["none"], ["step none", "step tile 8"]),
        ('sync = "local"\nshare = "none"', ["none", "8/8", "4/8", "2/4"], ["local none"]),
        ('share = "sparse"', ["none", "8/8", "4/8", "2/4"], ["local sparse"]),
    ],
)  # fmt: skip
def test_what_job_toml_says_is_not_open_any_more(
    job: Write, said: str, compressions: list[str], shares: list[str]
) -> None:
    found: list[RunSizes] = []
    path = job(("replicas = 1", "replicas = 2"), ('compress = "none"', said))
    prepare_run(path, NETWORK, choose=lambda sizes: (found.append(sizes), sizes.usual())[1])
    assert [str(way) for way in found[0].compressions] == compressions
    assert [f"{share.sync} {share}" for share in found[0].shares] == shares


def test_a_choice_that_is_not_open_is_refused(job: Write) -> None:
    with pytest.raises(LocalProtocolError):
        prepare_run(job(), NETWORK, choose=lambda _: RunChoice([1]))


def test_borders_that_travel_each_in_its_way_train_and_remember_where_they_must(job: Write) -> None:
    changes = (("steps = 4", "steps = 8"), ("stages = 2", "stages = 3"), ('compress = "none"', ""))
    run = prepare_run(job(*changes), NETWORK, choose=lambda _: RunChoice([0, 2], in_flight=3))
    raw, change, eight = Codec("float32"), Codec("change", 4), Codec("tile", 8)
    stages = [unit.stage for unit in run.units]
    assert [(s.forward, s.forward_in, s.backward, s.backward_in) for s in stages] == [
        (raw, None, raw, None), (change, raw, raw, eight), (change, None, eight, None),
    ]  # fmt: skip
    kept = [sorted(n for n in checkpoint.load(unit.state) if n.startswith(KEPT_PREFIX)) for unit in run.units]
    assert kept == [[], [f"{KEPT_PREFIX}send.forward.0"], [f"{KEPT_PREFIX}recv.forward.0"]]
    before, sent, came = (checkpoint.load(results[-1].checkpoint) for results in segments_of(run))
    assert sent[kept[1][0]].any(), "examples went over the second border"
    assert torch.equal(sent[kept[1][0]], came[kept[2][0]])
    assert not any(name.startswith(KEPT_PREFIX) for name in before)


def test_auto_takes_as_few_stages_as_memory_asks_for(job: Write) -> None:
    path = job(("stages = 2", 'stages = "auto"'), ("replicas = 1", 'replicas = "auto"'))
    run = prepare_run(path, NETWORK, peers=6)
    assert (run.units[0].stage.stages, run.units[0].stage.replicas) == (1, 6)
    needed = run.whole.memory_bytes - 512 * 1024**2
    run = prepare_run(path, NETWORK, peers=6, unit_memory_bytes=512 * 1024**2 + -(-needed // 3))
    assert (run.units[0].stage.stages, run.units[0].stage.replicas) == (3, 2)


def test_a_unit_needs_less_than_the_whole_and_says_what(job: Write) -> None:
    run = prepare_run(job(), NETWORK)
    whole = len(checkpoint.dump({k: v for unit in run.units for k, v in checkpoint.load(unit.state).items()}))
    for unit in run.units:
        assert unit.checkpoint_bytes == len(unit.state) < whole
        assert unit.root == checkpoint.state_root(checkpoint.load(unit.state))
    assert run.operations == 4 * sum(unit.operations_per_step for unit in run.units)


# --- the file ----------------------------------------------------------------------------------------------
BAD = {
    "a misspelt key": (("stages = 2", "stages = 2\nmicrobatches = 2"), "did you mean 'micro_batches'?"),
    "no micro-batches": (("micro_batches = 3", ""), "has no 'micro_batches'"),
    "one unit": (("stages = 2", "stages = 1"), "no parallel job"),
    "too many units": (("stages = 2\nreplicas = 1", "stages = 64\nreplicas = 64"), "256 units"),
    "a number in words": (("stages = 2", 'stages = "two"'), "a whole number"),
    "a codec of five bits": (('"none"', '"5/8"'), 'compress = "4/8"'),
    "one number of bits": (('"none"', '"4"'), 'compress = "4/8"'),
    "a misspelt sync": (('compress = "none"', 'sync = "lokal"'), "did you mean 'local'?"),
    "sparse gradients of each step": (('compress = "none"', 'sync = "step"\nshare = "sparse"'), "tile 8"),
    "a momentum of one": (('compress = "none"', "outer_momentum = 1.0"), "outer_momentum"),
    "a middle kept": (("[parallel]", '[privacy]\nkeep = ["middle"]\n[parallel]'), '["first", "last"]'),
    "native arithmetic": (("seed = 5", 'mode = "tolerant"'), 'mode = "exact"'),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_in_the_table_is_refused_with_what_to_write(job: Write, name: str) -> None:
    change, hint = BAD[name]
    with pytest.raises(BadJobFile) as told:
        read_job_file(job(change))
    assert hint in str(told.value)


def test_keep_without_stages_means_nothing(job: Write) -> None:
    path = job(("[parallel]", '[privacy]\nkeep = ["first"]\n[parallel]'))
    assert read_job_file(path).keep == ("first",)
    assert not read_job_file(path).sealed
    text = (path / "job.toml").read_text()
    (path / "job.toml").write_text(text[: text.index("[parallel]")])
    with pytest.raises(BadJobFile, match=r"no \[parallel\]"):
        read_job_file(path)


def test_what_nobody_else_may_read_is_refused_to_others(job: Write) -> None:
    keep = ("[parallel]", '[privacy]\nkeep = ["first", "last"]\n[parallel]')
    with pytest.raises(BadJobFile, match="you keep all 2 stages"):
        prepare_run(job(keep), NETWORK)


def test_a_job_without_the_table_is_no_run(job: Write) -> None:
    path = job()
    text = (path / "job.toml").read_text()
    (path / "job.toml").write_text(text[: text.index("[parallel]")])
    with pytest.raises(BadJobFile, match=r"has no \[parallel\]"):
        prepare_run(path, NETWORK)


# --- the example -------------------------------------------------------------------------------------------
def test_the_example_is_cut_between_its_blocks() -> None:
    read = read_job_file(EXAMPLES / "gpt_parallel")
    assert read.parallel is not None
    wide = tomllib.loads((EXAMPLES / "gpt_parallel" / "job.toml").read_text())
    run = prepare_run(EXAMPLES / "gpt_parallel", NETWORK)
    assert run.whole.parameters >= 5_000_000
    assert len(run.units) == wide["parallel"]["stages"] * wide["parallel"]["replicas"]
    ((ahead, back),) = run.border_bytes
    width, length, rows = 272, wide["batch"]["length"], wide["batch"]["size"] * wide["parallel"]["micro_batches"]
    values = width * length * rows  # one tensor of the stream for each micro-batch
    assert values / 2 < ahead < 0.6 * values
    assert values < back < 1.1 * values
    work = [unit.operations_per_step for unit in run.units]
    assert max(work) < 1.2 * min(work)
