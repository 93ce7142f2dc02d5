"""Jobs in real sandboxes: an honest one to its end, and every way a worker can fail or cheat, each with its code."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

import peer.workshop
from peer.workshop import SegmentDone, WorkFailed, WorkOrder, Workshop
from protocol import params
from protocol.codec import encode
from protocol.errors import LocalProtocolError
from protocol.profile import UNBOUNDED, Gauge
from protocol.program import Init, Input, Items, Node, Program, Ref, Update, operations_per_step, program_id
from protocol.task import ArrayRef, BatchRule, Initial, Schedule, TaskSpec
from worker.cage import Cage
from worker.frames import Done, Failed, FalseEnd, Rehearsal, Reply, Root, Segment, Step, frame
from worker.sandbox import Level, SandboxReport, SandboxTooWeak

GIB = 1024**3
F32 = "float32"
ROWS = 16
START = Cage.start


def regression() -> Program:
    """One step of gradient descent on a linear regression: w (3, 1), x (4, 3), y (4, 1)."""
    inputs = (
        Input("w", "parameter", F32, (3, 1), Init.of("uniform", -1.0, 1.0)),
        Input("x", "batch", F32, (4, 3), None),
        Input("y", "batch", F32, (4, 1), None),
        Input("rate", "learning_rate", F32, (), None),
    )
    nodes = (
        Node("mm.default", (Ref(1), Ref(0)), F32, (4, 1), "m.py:1"),  # 4
        Node("sub.Tensor", (Ref(4), Ref(2)), F32, (4, 1), "m.py:2"),  # 5
        Node("mul.Tensor", (Ref(5), Ref(5)), F32, (4, 1), "m.py:2"),  # 6
        Node("sum.dim_IntList", (Ref(6), Items((0, 1)), False), F32, (), "m.py:2"),  # 7
        Node("permute.default", (Ref(1), Items((1, 0))), F32, (3, 4), ""),  # 8
        Node("mm.default", (Ref(8), Ref(5)), F32, (3, 1), ""),  # 9
        Node("mul.Tensor", (Ref(9), Ref(3)), F32, (3, 1), ""),  # 10
        Node("sub.Tensor", (Ref(0), Ref(10)), F32, (3, 1), ""),  # 11
    )
    return Program(inputs, (), nodes, (Update("w", 11),), 7)


@pytest.fixture
def order(tmp_path: Path) -> WorkOrder:
    """Segments 0 and 1 of a task of 5 steps in segments of 2."""
    program = regression().to_bytes()
    (tmp_path / "program").write_bytes(program)
    x = [math.sin(i) for i in range(3 * ROWS)]
    y = [x[3 * i] - 2 * x[3 * i + 1] for i in range(ROWS)]
    (tmp_path / "x").write_bytes(struct.pack(f"<{len(x)}f", *x))
    (tmp_path / "y").write_bytes(struct.pack(f"<{len(y)}f", *y))
    task = TaskSpec(
        network=bytes(32),
        program=program_id(program),
        program_bytes=len(program),
        arrays=(
            ArrayRef("x", F32, (ROWS, 3), bytes(32), 12 * ROWS),
            ArrayRef("y", F32, (ROWS, 1), bytes(32), 4 * ROWS),
        ),
        batch=BatchRule("rows", 4, 0),
        initial=Initial("seed", bytes(32), bytes(32)),
        seed=7,
        steps=5,
        steps_per_segment=2,
        mode="exact",
        width=15,
        schedule=Schedule("constant", 50_000_000, 0, 0),
        operations_per_step=operations_per_step(regression()),
        name="regression",
    )
    return WorkOrder(
        work_id="job-1",
        task=encode(task),
        program=tmp_path / "program",
        arrays={"x": tmp_path / "x", "y": tmp_path / "y"},
        base=None,
        first_segment=0,
        last_segment=2,
        threads=1,
        memory_bytes=GIB,
        wall_seconds=60,
        checkpoint_bytes_max=4096,
    )


class Heard:
    """What a job told its caller."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float | None]] = []
        self.segments: list[SegmentDone] = []

    async def segment(self, done: SegmentDone) -> None:
        assert done.checkpoint.stat().st_size == done.checkpoint_bytes
        self.segments.append(done)

    async def run(self, workshop: Workshop, order: WorkOrder) -> Any:
        return await workshop.run(order, on_step=lambda s, loss: self.steps.append((s, loss)), on_segment=self.segment)


def changed(order: WorkOrder, **fields: Any) -> WorkOrder:
    return WorkOrder(**{**{name: getattr(order, name) for name in order.__dataclass_fields__}, **fields})


def retasked(order: WorkOrder, **fields: Any) -> WorkOrder:
    import msgspec

    task = msgspec.msgpack.decode(order.task, type=TaskSpec)
    return changed(order, task=encode(msgspec.structs.replace(task, **fields)))


# --- real jobs -------------------------------------------------------------------------------------------------
async def test_real_segments_are_trained_warm_and_go_on_from_their_checkpoint(
    workshop: Workshop, order: WorkOrder, tmp_path: Path
) -> None:
    workshop.prewarm()
    whole = Heard()
    done = await whole.run(workshop, changed(order, last_segment=3))
    assert done.segments == 3
    assert [step for step, _ in whole.steps] == [0, 1, 2, 3, 4]
    assert [(s.segment, s.first_step, s.last_step) for s in whole.segments] == [(0, 0, 2), (1, 2, 4), (2, 4, 5)]
    assert all(a.out_root == b.in_root for a, b in zip(whole.segments, whole.segments[1:], strict=False))
    assert [loss for s in whole.segments for loss in s.losses] == [loss for _, loss in whole.steps]
    assert len({s.out_root for s in whole.segments}) == 3

    again = Heard()
    await again.run(workshop, changed(order, work_id="job-2", base=whole.segments[0].checkpoint, first_segment=1))
    assert [(s.in_root, s.out_root) for s in again.segments] == [(s.in_root, s.out_root) for s in whole.segments[1:2]]
    assert again.segments[0].checkpoint.read_bytes() == whole.segments[1].checkpoint.read_bytes()

    root = await Heard().run(workshop, changed(order, want="initial-root", first_segment=0, last_segment=0))
    assert root.root == whole.segments[0].in_root


async def test_a_solvers_end_is_compared_with_the_one_made_here(workshop: Workshop, order: WorkOrder) -> None:
    gauges = (Gauge("w", 3, (1,)),)
    order = retasked(changed(order, last_segment=1, gauges=gauges), mode="tolerant")
    solver, fraud = Heard(), Heard()
    await solver.run(workshop, order)
    await fraud.run(workshop, changed(order, work_id="job-2", cheat="skip-step", gauges=()))
    assert solver.segments[0].distance is None
    found = []
    for number, end in enumerate((solver, fraud)):
        checker = Heard()
        checked = changed(order, work_id=f"check-{number}", claimed=end.segments[0].checkpoint)
        await checker.run(workshop, checked)
        assert checker.segments[0].out_root == solver.segments[0].out_root
        found.append(checker.segments[0].distance)
    assert found == [(0, 0), (UNBOUNDED, UNBOUNDED)], "who moves a gauge explains it by no noise"


async def test_a_demonstrated_fraud_tells_every_step_and_ends_elsewhere(workshop: Workshop, order: WorkOrder) -> None:
    heard = Heard()
    await heard.run(workshop, changed(order, cheat="skip-step"))
    assert [step for step, _ in heard.steps] == [0, 1, 2, 3]
    assert len(heard.segments) == 2


async def test_an_ordered_error_comes_beside_the_true_end_and_is_the_fraud_it_looks_like(
    workshop: Workshop, order: WorkOrder
) -> None:
    plain, fraud, ordered = Heard(), Heard(), Heard()
    await plain.run(workshop, changed(order, last_segment=3))
    await fraud.run(workshop, changed(order, work_id="job-2", cheat="wrong-batch"))
    await ordered.run(workshop, changed(order, work_id="job-3", last_segment=3, ordered=(1, "wrong-batch")))
    assert [s.out_root for s in ordered.segments] == [s.out_root for s in plain.segments], "the work goes on truly"
    assert [s.false_end is not None for s in ordered.segments] == [False, True, False]
    false, real = ordered.segments[1].false_end, fraud.segments[1]
    assert false is not None
    assert (false.root, false.checkpoint_bytes) == (real.out_root, real.checkpoint_bytes)
    assert false.checkpoint.read_bytes() == real.checkpoint.read_bytes()
    assert ordered.segments[1].losses == real.losses
    assert false.root != ordered.segments[1].out_root


async def test_a_state_that_diverges_ends_the_job_where_it_did(workshop: Workshop, order: WorkOrder) -> None:
    heard = Heard()
    order = retasked(order, schedule=Schedule("constant", 10**30 // 10**12, 0, 0), steps=40, steps_per_segment=40)
    done = await heard.run(workshop, changed(order, last_segment=1))
    (segment,) = heard.segments
    assert done.segments == 1
    assert segment.diverged_step == segment.last_step
    assert len(segment.losses) == segment.last_step == len(heard.steps)
    assert segment.last_step > 0


@pytest.mark.parametrize(
    ("name", "fields", "code"),
    [
        ("task", {"steps": 10**7, "steps_per_segment": 1}, "bad-task"),
        ("names another program", {"program": bytes(32)}, "bad-data"),
    ],
)
async def test_a_job_that_does_not_fit_is_refused_with_words(
    workshop: Workshop, order: WorkOrder, name: str, fields: dict[str, Any], code: str
) -> None:
    with pytest.raises(WorkFailed) as failed:
        await Heard().run(workshop, retasked(order, **fields))
    assert failed.value.code == code, failed.value


async def test_a_program_that_is_none_is_refused(workshop: Workshop, order: WorkOrder) -> None:
    order.program.write_bytes(b"\x90 not a program")
    with pytest.raises(WorkFailed) as failed:
        await Heard().run(workshop, order)
    assert failed.value.code == "bad-program", failed.value


# --- workers that cheat or break, each in a real sandbox -------------------------------------------------------
def rehearsing(monkeypatch: pytest.MonkeyPatch, attempt: str, **decoys: str | int) -> None:
    """Let the next jobs' workers try `attempt` instead of working, without loading torch."""
    request = Rehearsal(attempts=(attempt,), decoys=decoys)
    monkeypatch.setattr(peer.workshop, "_request", lambda order, size, partial: request)
    monkeypatch.setattr(peer.workshop.Cage, "start", partial(START, torch=False))


def said(*replies: Reply | bytes) -> bytes:
    return b"".join(reply if isinstance(reply, bytes) else frame(reply) for reply in replies)


SEGMENT = Segment(
    segment=0, first_step=0, last_step=2, in_root=bytes(32), out_root=bytes(32), operations=1, checkpoint_bytes=4000,
    diverged_step=None,
)  # fmt: skip
LARGE = Segment(
    segment=0, first_step=0, last_step=2, in_root=bytes(32), out_root=bytes(32), operations=1, checkpoint_bytes=4097,
    diverged_step=None,
)  # fmt: skip
FALSE = FalseEnd(segment=0, out_root=bytes(32), checkpoint_bytes=1)
TWO = (Step(0, 1.0), Step(1, 1.0))


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (b"\xff\xff\xff\xff", "oversize-frame"),
        (struct.pack("<I", 50_000) + b"\x91" * 50_000, "bad-frame"),
        (struct.pack("<I", 4) + b"\xc1" * 4, "bad-frame"),
        (said(Done()), "wrong-reply"),
        (said(Step(1, 1.0)), "wrong-reply"),
        (said(Step(0, math.nan)), "wrong-reply"),
        (said(SEGMENT), "wrong-reply"),
        (said(*TWO, LARGE), "oversize-checkpoint"),
        (said(*TWO, SEGMENT, bytes(3999)), "short-checkpoint"),
        (said(*TWO, SEGMENT, bytes(4004)), "oversize-frame"),
        (said(*TWO, FALSE), "wrong-reply"),
        (said(Failed("bad-data", "no array", "")), "bad-data"),
        (said(Root(bytes(32)), Done()), "wrong-reply"),
        (b"", "no-reply"),
        (b"\x05\x00", "no-reply"),
    ],
)
async def test_what_a_hostile_worker_says_ends_the_job_with_its_code(
    workshop: Workshop, order: WorkOrder, monkeypatch: pytest.MonkeyPatch, words: bytes, code: str
) -> None:
    rehearsing(monkeypatch, "speak", speak=words.hex())
    with pytest.raises(WorkFailed) as failed:
        await Heard().run(workshop, order)
    assert failed.value.code == code, failed.value
    assert failed.value.log_tail.endswith("last words\n")


async def test_bytes_after_the_end_of_a_job_are_a_fraud(
    workshop: Workshop, order: WorkOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsing(monkeypatch, "speak", speak=said(Root(bytes(32)), Done(), b"x").hex())
    with pytest.raises(WorkFailed) as failed:
        await Heard().run(workshop, changed(order, want="initial-root"))
    assert failed.value.code == "extra-bytes", failed.value


async def test_a_workers_words_cannot_drive_the_terminal_they_are_shown_on(
    workshop: Workshop, order: WorkOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsing(monkeypatch, "speak", speak=said(Failed("bad-data", "\x1b]0;mine\x07", "\x1b[2J")).hex())
    with pytest.raises(WorkFailed) as failed:
        await Heard().run(workshop, order)
    assert str(failed.value) == "the worker gave up: \ufffd]0;mine\ufffd; \ufffd[2J"


async def test_a_worker_that_never_answers_is_ended_at_the_deadline(
    workshop: Workshop, order: WorkOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsing(monkeypatch, "speak", speak=said(*TWO).hex(), then="hang")
    heard = Heard()
    with pytest.raises(WorkFailed) as failed:
        await heard.run(workshop, changed(order, wall_seconds=2.0))
    assert failed.value.code == "deadline", failed.value
    assert heard.steps == [(0, 1.0), (1, 1.0)], "what it did before was told"


async def test_a_worker_that_prints_without_end_is_killed_and_its_last_lines_are_kept(
    workshop: Workshop, order: WorkOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsing(monkeypatch, "flood")
    with pytest.raises(WorkFailed) as failed:
        await Heard().run(workshop, order)
    assert failed.value.code == "log-flood", failed.value
    assert len(failed.value.log_tail) == params.SANDBOX_LOG_KEPT_BYTES


async def test_a_worker_that_takes_all_memory_is_killed_at_its_limit(
    workshop: Workshop, order: WorkOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    if workshop.report.level < Level.CONTAINED:
        pytest.skip("no control group here; the limit of each process is tried in test_sandbox")
    monkeypatch.setattr(params, "SANDBOX_MEMORY_BYTES_MIN", 64 * 1024**2)
    rehearsing(monkeypatch, "starve")
    with pytest.raises(WorkFailed) as failed:
        await Heard().run(workshop, changed(order, memory_bytes=96 * 1024**2))
    assert failed.value.code == "out-of-memory", failed.value


async def test_a_forbidden_call_kills_and_is_named(
    workshop: Workshop, order: WorkOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsing(monkeypatch, "call-foreign-abi")
    with pytest.raises(WorkFailed) as failed:
        await Heard().run(workshop, order)
    assert failed.value.code == "filter", failed.value


async def test_cancelling_a_job_kills_its_worker_before_it_returns(
    workshop: Workshop, order: WorkOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsing(monkeypatch, "speak", speak=said(Step(0, 1.0)).hex(), then="hang")
    started: list[Cage] = []

    async def start(level: Level) -> Cage:
        started.append(await START(level, torch=False))
        return started[-1]

    monkeypatch.setattr(peer.workshop.Cage, "start", start)
    with trio.CancelScope() as scope:
        await workshop.run(order, on_step=lambda step, loss: scope.cancel(), on_segment=Heard().segment)
    assert scope.cancelled_caught
    (cage,) = started
    assert cage.process.returncode is not None
    assert cage.group is None or not cage.group.memory.exists()


# --- orders and the pool ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fields",
    [
        {"work_id": "../job"},
        {"work_id": ""},
        {"memory_bytes": 1000},
        {"threads": 0},
        {"threads": 100_000},
        {"first_segment": 2, "last_segment": 2},
    ],
)
async def test_an_order_of_our_own_making_that_makes_no_sense_is_our_error(
    workshop: Workshop, order: WorkOrder, fields: dict[str, Any]
) -> None:
    with pytest.raises(LocalProtocolError):
        await Heard().run(workshop, changed(order, **fields))


async def test_inputs_are_regular_files_and_nothing_else(workshop: Workshop, order: WorkOrder, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "x", tmp_path / "link")
    for name in ("pipe", "link", "absent", "scratch"):
        with pytest.raises(WorkFailed) as failed:
            await Heard().run(workshop, changed(order, arrays={"x": tmp_path / name, "y": tmp_path / "y"}))
        assert failed.value.code == "missing-input", failed.value


async def test_a_workshop_opens_at_its_owners_minimum_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def weak() -> SandboxReport:
        return SandboxReport(Level.LIMITS, {Level.LIMITS: ()}, 0.1, hints=("bubblewrap is not installed",))

    monkeypatch.setattr(peer.workshop, "probe", weak)
    with pytest.raises(SandboxTooWeak, match="bubblewrap is not installed"):
        async with Workshop(tmp_path, minimum=Level.NONE):
            pass


async def test_the_pool_fills_when_told_and_empties_when_unused(
    workshop: Workshop, order: WorkOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsing(monkeypatch, "speak", speak=said(Failed("bad-data", "", "")).hex())
    assert workshop.warm == 0, "an idle daemon has no worker"
    workshop.prewarm()
    workshop.prewarm()
    assert len(workshop._slots) == 1
    (slot,) = workshop._slots
    await slot.ready.wait()
    assert workshop.warm == 1
    with pytest.raises(WorkFailed):
        await Heard().run(workshop, order)
    assert slot.cage is not None
    assert slot.cage.process.returncode is not None
    assert workshop.warm == 0, "nothing refills it by itself"

    monkeypatch.setattr(params, "SANDBOX_WARM_SECONDS_MAX", 0.0)
    workshop.prewarm()
    (slot,) = workshop._slots
    await slot.ready.wait()
    while workshop._slots:
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert slot.cage is None, "an unused worker was stopped"


def test_the_daemons_side_never_loads_torch() -> None:
    import subprocess

    script = "import sys, peer.workshop, worker.canary, json; print(json.dumps('torch' in sys.modules))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) is False
