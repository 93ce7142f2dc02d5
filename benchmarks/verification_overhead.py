"""The part `overhead` of benchmarks/verification.py: verification of a whole job, in processor time of everybody.

The job is the demonstration's character GPT in exact mode, in segments of --steps steps, of which --segments make the
job. 100 % is what its training steps take, batches included, in a process that does nothing else. On it come, each
measured on the real thing:

- the solver's checkpoints: root, bytes, and the file in its blob store
- their delivery to the submitter: both hosts, both stores, and the root that the submitter computes
- the checks: for each sampled segment a sandboxed worker, started for it; the checkpoint fetched, its root, the steps,
  the root of their end; and the same for a whistleblower's audit of one sampled segment

--swarm then runs one such job among real peers, reads the processor time of all their processes, and compares it
with the sum of the parts.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
import trio

from peer.blobs import BlobStore
from peer.fetching import check_checkpoint
from peer.host import HostConfig, open_host
from peer.lan import LAN_RULES, Lan, members
from peer.workshop import SegmentDone, WorkOrder, Workshop
from protocol.codec import encode
from protocol.incentives import check_rate
from protocol.network import Rules, load
from protocol.params import MICRO_PER_CREDIT
from protocol.program import Program, program_id
from protocol.task import TaskSpec
from worker import checkpoint
from worker.executor import Executor
from worker.prepare import Prepared, prepare
from worker.training import Batches, initial_state, rate_of

JOB = Path(__file__).resolve().parent.parent / "examples" / "char_gpt" / "job.toml"
TICKS = os.sysconf("SC_CLK_TCK")
STORE_BYTES = 4 * 1024**3
RATES_PERMILLE = (50, 100, 200, 500, 1000)
GOOD_STANDING = 10**6  # valid deals in a row
ROUNDS = 3  # of each part; the median counts
POLL_SECONDS = 0.05  # a look takes milliseconds, which are not counted but slow what is
SWARM_POLL_SECONDS = 0.25
BUDGET_MICRO = 100 * MICRO_PER_CREDIT
JOB_SECONDS_MAX = 1200.0


@dataclass
class Part:
    """What a part found. headline: figures of the benchmark's last line; lines: for people."""

    headline: dict[str, object]
    details: dict[str, object]
    lines: list[str] = field(default_factory=list)


@dataclass
class Costs:
    """Processor seconds. segment: the training steps of one; checkpoint, delivery: of one checkpoint; start: of a
    worker until it is ready; check: of one segment, start included."""

    segment: float
    checkpoint: float
    delivery: float
    start: float
    check: float
    checkpoint_bytes: int

    def of_length(self, share: float) -> Costs:
        """The same with segments of `share` times as many steps."""
        more = self.segment * (share - 1)
        return replace(self, segment=self.segment + more, check=self.check + more)

    def overhead(self, *, segments: int, checks: float) -> dict[str, float]:
        """Each part over the job's training steps. checks: segments re-executed, audits included."""
        job = segments * self.segment
        parts = {
            "checkpoints": segments * self.checkpoint / job,
            "delivery": segments * self.delivery / job,
            "checks_steps": checks * self.segment / job,
            "checks_start": checks * self.start / job,
            "checks_rest": checks * (self.check - self.start - self.segment) / job,
        }
        return {**parts, "total": sum(parts.values())}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this part."""
    parser.add_argument("--segments", type=int, default=20, help="segments of the job")
    parser.add_argument("--steps", type=int, default=100, help="steps of a segment")
    parser.add_argument("--swarm", action="store_true", help="also run such a job among real peers")
    parser.add_argument("--swarm-steps", type=int, default=20, help="steps of a segment in the swarm")


def processor() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


class Meter:
    """Processor time of processes that descend from `pid`, itself included if it is another one than this.

    A sandboxed worker is not waited for by its daemon in a way that adds its time to the daemon's, so they are read
    while they live, every `pause` seconds: of each, what it used after the last look is missed.
    """

    def __init__(self, pid: int, pause: float = POLL_SECONDS) -> None:
        self.pid, self.pause, self.own, self.ended = pid, pause, 0.0, threading.Event()
        self.seen: dict[tuple[int, int], float] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Look while the block runs."""
        thread = threading.Thread(target=self._watch)
        self.look()
        thread.start()
        try:
            yield
        finally:
            self.ended.set()
            thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(self.pause):
            self.look()
            self.own = time.thread_time()

    def look(self) -> None:
        """Take what each process has used by now."""
        todo = [self.pid]
        while todo:
            pid = todo.pop()
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                for task in Path(f"/proc/{pid}/task").iterdir():
                    todo.extend(map(int, (task / "children").read_text().split()))
            except (FileNotFoundError, ProcessLookupError):
                continue  # it, or one of its threads, has just ended
            if pid != os.getpid():
                self.seen[pid, int(fields[19])] = (int(fields[11]) + int(fields[12])) / TICKS

    def seconds(self) -> float:
        """So far; this process's own are added, but for those of looking, if it is the one they descend from."""
        own = time.process_time() - self.own if self.pid == os.getpid() else 0.0
        return sum(dict(self.seen).values()) + own


def median_cpu(call: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Processor seconds of this process for one `call`, all threads."""
    found = []
    for _ in range(rounds):
        started = time.process_time()
        call()
        found.append(time.process_time() - started)
    return statistics.median(found)


# --- the parts ---------------------------------------------------------------------------------------------------
class Steps:
    """The job's training, and nothing else."""

    def __init__(self, task: TaskSpec, prepared: Prepared) -> None:
        program = Program.from_bytes(prepared.program)
        self.task, self.batches = task, Batches(task, program, {a.name: a.data for a in prepared.arrays})
        self.executor, self.state = Executor(program, task.mode, width=task.width), initial_state(task, program, None)
        self.done = 0

    def run(self, count: int) -> None:
        """Take `count` more steps."""
        for step in range(self.done, self.done + count):
            batch = self.batches.of(step)
            self.state, _ = self.executor.step(self.state, batch, rate_of(self.task, step), self.task.seed, step)
        self.done += count


async def put_cpu(folder: Path, data: bytes) -> float:
    """Processor seconds of writing `data` to a file and taking it into a blob store."""
    found = []
    for number in range(ROUNDS):
        store = BlobStore(folder / f"put-{number}", STORE_BYTES)
        started = time.process_time()
        (folder / "part").write_bytes(data)
        await store.put_file(folder / "part")
        found.append(time.process_time() - started)
    return statistics.median(found)


async def fetch_cpu(folder: Path, data: bytes) -> float:
    """Processor seconds of two hosts, here both in this process, while one gives the other a blob of `data`."""

    def config(seed: bytes) -> HostConfig:
        return HostConfig(seed, ["/ip4/127.0.0.1/tcp/0"], (), False, "benchmark", lambda topic, author, data: None)

    found = []
    held = BlobStore(folder / "held", STORE_BYTES)
    blob = await held.put_bytes(data)
    async with open_host(config(b"s" * 32)) as server, open_host(config(b"t" * 32)) as other:
        server.serve("blob", held.serve)
        peer = await other.connect(server.addresses[0])
        for number in range(ROUNDS):
            store = BlobStore(folder / f"got-{number}", STORE_BYTES)
            started = time.process_time()
            await store.fetch(other, blob, [peer], size_max=len(data))
            found.append(time.process_time() - started)
    return statistics.median(found)


async def check_cpu(folder: Path, order: WorkOrder, steps: Steps, count: int) -> tuple[float, float, float]:
    """(`count` steps alone; a worker until it is ready; one until it has handed in `order` and ended), in turns.

    Of a worker, its own processor seconds and the daemon's part.
    """
    alone, starts, wholes = [], [], []

    async def keep(done: SegmentDone) -> None:
        done.checkpoint.unlink()

    async with Workshop(folder / "workshop") as workshop:
        for number in range(ROUNDS):
            alone.append(median_cpu(lambda: steps.run(count), rounds=1))
            meter = Meter(os.getpid())
            with meter.watch():
                before = meter.seconds()
                workshop.prewarm()
                while not workshop.warm:
                    assert not workshop.warm_failure, workshop.warm_failure
                    await trio.sleep(POLL_SECONDS)
                await trio.sleep(2 * POLL_SECONDS)
                starts.append(meter.seconds() - before)
                await workshop.run(replace(order, work_id=f"check-{number}"), on_step=lambda *_: None, on_segment=keep)
                wholes.append(meter.seconds() - before)
    return statistics.median(alone), statistics.median(starts), statistics.median(wholes)


def sized(task: TaskSpec, segments: int, steps: int) -> TaskSpec:
    """`task` with as many segments, of as many steps."""
    return msgspec.structs.replace(task, steps=segments * steps, steps_per_segment=steps)


def costs_of(prepared: Prepared, task: TaskSpec, folder: Path) -> Costs:
    """All of them, for segments as `task` has them."""
    steps = Steps(task, prepared)
    per_segment = task.steps_per_segment
    steps.run(min(5, per_segment))
    state, roots = steps.state, checkpoint.Roots()
    data = checkpoint.dump(state)
    rooting = median_cpu(lambda: checkpoint.Roots().of(state))
    assert roots.of(state) == checkpoint.state_root(state)
    dumping = median_cpu(lambda: checkpoint.dump(state))
    (folder / "program").write_bytes(prepared.program)
    (folder / "base").write_bytes(data)
    for array in prepared.arrays:
        (folder / f"array-{array.name}").write_bytes(array.data)
    storing, fetching = trio.run(put_cpu, folder, data), trio.run(fetch_cpu, folder, data)
    root = roots.of(state)
    receiving = median_cpu(lambda: check_checkpoint(folder / "base", folder / "program", root))
    order = WorkOrder(
        work_id="check", task=encode(task), program=folder / "program", base=folder / "base",
        arrays={array.name: folder / f"array-{array.name}" for array in prepared.arrays}, first_segment=1,
        last_segment=2, threads=1, memory_bytes=prepared.memory_bytes, wall_seconds=JOB_SECONDS_MAX,
        checkpoint_bytes_max=prepared.checkpoint_bytes,
    )  # fmt: skip
    segment, start, whole = trio.run(check_cpu, folder, order, steps, per_segment)
    # The checker takes the base as the submitter took it, and its own end state into its store.
    return Costs(
        segment, rooting + dumping + storing, fetching + receiving, start, whole + fetching + receiving + storing,
        len(data),
    )  # fmt: skip


def checks_at(permille: int, segments: int, rules: Rules) -> float:
    """Segments of a job re-executed on average: as protocol.sampling.select_segments, and one of them for an audit."""
    drawn = min(segments, max(rules.check_segments_min, -(-segments * permille // 1000)))
    return drawn + rules.audit_permille / 1000


# --- a whole job among real peers --------------------------------------------------------------------------------
def swarm_job(segments: int, steps: int, rules: Rules, folder: Path) -> tuple[dict[str, float], int]:
    """One job among four peers: processor seconds of each until it was paid, and how many segments were checked."""
    lan = Lan.create(folder / "lan", members(4), rules=rules)
    release = lan.guard(remove=False)
    try:
        lan.start()
        lan.meet(seconds=60)
        prepared = prepare(JOB, load(lan.network_file.read_text()).id)
        meters = {one.member.name: Meter(one.pid, SWARM_POLL_SECONDS) for one in lan.peers}
        with ExitStack() as watched, lan.of("submitter").client() as client:
            for meter in meters.values():
                watched.enter_context(meter.watch())
            before, checked = {name: meter.seconds() for name, meter in meters.items()}, 0
            program = client.put_blob(prepared.program)
            assert program == program_id(prepared.program)
            arrays = {array.name: client.put_blob(array.data) for array in prepared.arrays}
            job = client.submit(
                task=encode(sized(prepared.make_task(program=program, arrays=arrays), segments, steps)),
                budget_micro=BUDGET_MICRO,
                unit_price_max=prepared.job.unit_price_max,
                base_root=prepared.base_root,
                checkpoint_bytes=prepared.checkpoint_bytes,
                memory_bytes=prepared.memory_bytes,
            )["job"]
            for event in client.events(job, follow=True):
                if event["kind"] == "verdict":
                    checked += len(event["segments"])
                if event["kind"] in ("done", "failed", "cancelled"):
                    break
            after = {name: meter.seconds() for name, meter in meters.items()}
        assert event["kind"] == "done", event
        return {name: after[name] - before[name] for name in after}, checked
    finally:
        lan.stop()
        release()


def against_swarm(options: argparse.Namespace, costs: Costs, rules: Rules, folder: Path) -> dict[str, object]:
    """What a real job took, beside what the parts say of it."""
    segments, steps = options.segments, options.swarm_steps
    rate = check_rate(rules, GOOD_STANDING)
    lan_rules = msgspec.structs.replace(
        LAN_RULES,
        check_permille=rate,
        newcomer_permille=rate,  # nobody has a history there
        check_segments_min=rules.check_segments_min,
        audit_permille=rules.audit_permille,
    )
    started = time.monotonic()
    took, checked = swarm_job(segments, steps, lan_rules, folder)
    costs = costs.of_length(steps / options.steps)
    job = segments * (costs.segment + costs.checkpoint + costs.delivery)
    expected = job + costs.start + checked * costs.check
    return {
        "segments": segments,
        "steps": steps,
        "seconds": round(time.monotonic() - started, 1),
        "segments_checked": checked,
        "cpu_seconds": {name: round(seconds, 2) for name, seconds in took.items()},
        "measured": round(sum(took.values()), 2),
        "expected": round(expected, 2),
        "ratio": round(sum(took.values()) / expected, 3),
    }


def measure(options: argparse.Namespace) -> Part:
    """All of it."""
    torch.set_num_threads(1)
    rules, segments = Rules(), options.segments
    with tempfile.TemporaryDirectory(prefix="ichiba-verification-") as name:
        folder = Path(name)
        prepared = prepare(JOB, bytes(32))
        arrays = {array.name: bytes(32) for array in prepared.arrays}
        task = sized(prepared.make_task(program=program_id(prepared.program), arrays=arrays), segments, options.steps)
        costs = costs_of(prepared, task, folder)
        swarm = against_swarm(options, costs, rules, folder) if options.swarm else None
    permille, newcomer = check_rate(rules, GOOD_STANDING), check_rate(rules, 0)
    curve = {
        str(rate / 10): costs.overhead(segments=segments, checks=checks_at(rate, segments, rules))
        for rate in sorted({*RATES_PERMILLE, permille, newcomer})
    }
    found = curve[str(permille / 10)]
    by_segments = {
        str(count): costs.overhead(segments=count, checks=checks_at(permille, count, rules))
        for count in (10, 20, 50, 200)
    }
    by_length = {
        str(seconds): costs.of_length(seconds / costs.segment).overhead(
            segments=segments, checks=checks_at(permille, segments, rules)
        )
        for seconds in (3, 10, 60, 600)
    }
    details = {
        "parameters": prepared.parameters,
        "segments": segments,
        "steps": options.steps,
        "cpu_seconds": {name: round(value, 4) for name, value in vars(costs).items() if isinstance(value, float)},
        "checkpoint_bytes": costs.checkpoint_bytes,
        "stored_bytes": segments * costs.checkpoint_bytes,
        "audit_permille": rules.audit_permille,
        "check_segments_min": rules.check_segments_min,
        "rate_percent": permille / 10,
        "newcomer_rate_percent": newcomer / 10,
        "by_rate_percent": {rate: rounded(parts) for rate, parts in curve.items()},
        "by_segments": {count: rounded(parts) for count, parts in by_segments.items()},
        "by_segment_seconds": {seconds: rounded(parts) for seconds, parts in by_length.items()},
        "swarm": swarm,
    }
    lines = [
        f"a segment of {options.steps} steps takes {costs.segment:.2f} s of a processor; its checkpoint of "
        f"{costs.checkpoint_bytes / 1e6:.1f} MB {costs.checkpoint * 1e3:.0f} ms, its delivery "
        f"{costs.delivery * 1e3:.0f} ms; a check {costs.check:.2f} s, of which {costs.start:.2f} s start the worker",
        *(f"checking {rate:>5} %: overhead {parts['total']:7.1%}" for rate, parts in curve.items()),
        *(
            f"checking {permille / 10} %, {count:>3} segments: {parts['total']:7.1%}"
            for count, parts in by_segments.items()
        ),
        *(
            f"checking {permille / 10} %, segments of {seconds:>3} s: {parts['total']:7.1%}"
            for seconds, parts in by_length.items()
        ),
    ]
    if swarm is not None:
        lines.append(f"a job among four peers: {swarm['measured']} s, from the parts {swarm['expected']} s")
    return Part({"overhead_ratio": round(found["total"], 4)}, details, lines)


def rounded(parts: dict[str, float]) -> dict[str, float]:
    """For the last line."""
    return {name: round(value, 4) for name, value in parts.items()}
