"""The demonstration: five peers on this machine make a market, train a small GPT, check it, and settle before notaries.

Promises: everything shown is what the daemons said, by the way any user takes (worker.prepare, peer.client, the
proof bundle); `conserved` is computed from the ledgers of all daemons that are alive; and no daemon outlives it.
Refuses to draw anything: a Screen does (peer/cli_swarm.py).
"""

from __future__ import annotations

import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from peer.cli_money import check_proof
from peer.client import Client
from peer.demo_story import Story, held_micro
from peer.lan import Lan, members
from protocol.bundle import BundleReport
from protocol.codec import encode
from protocol.credits import credits_of
from protocol.errors import IchibaError, VerificationFailed
from protocol.network import load

if TYPE_CHECKING:
    from worker.prepare import Prepared

__all__ = ["DemoFailed", "Outcome", "Plan", "Screen", "ichiba", "run_demo"]

STEPS_MIN: Final = 10
CHEAT: Final = "solver-1"  # peer.lan.members makes the cheaper solver cheat: it gets the work
MEET_SECONDS: Final = 60.0
JOB_SECONDS_MAX: Final = 1200.0  # 200 steps take 25 s on an idle core; four workers may share two busy ones
NEWS_SECONDS: Final = 0.5  # how often it is asked whether the daemons are alive while nothing happens
LEDGERS_SECONDS: Final = 60.0  # for the last settlement to reach everybody: gossip takes a tick, anti-entropy 15 s
GENERATED: Final = 320  # characters

MODEL: Final = '''\
"""A character GPT of a million parameters on the Python language reference. The model is in worker/char_gpt.py."""

import numpy as np

from worker.char_gpt import build, corpus


def data():
    """The text as one array of ASCII codes."""
    return {"text": np.frombuffer(corpus(), dtype=np.uint8)}
'''
JOB: Final = """\
name = "char-gpt"
model = "model.py:build"
data = "model.py:data"
initial = "seed"
mode = "exact"
width = 15
seed = {seed}
steps = {steps}
steps_per_segment = {per_segment}
budget = "20.00"
price = 2000

[batch]
rule = "windows"
size = 8
length = 64

[learning_rate]
kind = "warmup-cosine"
peak = 0.002
floor = 0.0002
warmup_steps = {warmup}
"""
# Runs in a process of its own: torch has no place in a command line that should answer to Ctrl-C.
GENERATE: Final = """\
import sys, torch
from safetensors.torch import load_file
from worker.char_gpt import generate
torch.set_num_threads(1)
print(generate(load_file(sys.argv[1]), "The ", int(sys.argv[2]), int(sys.argv[3])), end="")
"""


class DemoFailed(IchibaError):
    """The demonstration did not come to its end."""

    code = "demo"


class Screen(Protocol):
    """Where the demonstration shows itself."""

    def say(self, line: str) -> None:
        """One line that stays."""

    def picture(self, story: Story) -> None:
        """How it stands now, in place of the picture before."""

    def money(self, table: dict[str, Any], name_of: Callable[[str], str]) -> None:
        """The money table."""

    def text(self, title: str, body: str) -> None:
        """A longer text."""


@dataclass(frozen=True)
class Plan:
    """What to show. cheat: of worker/cheats.py; kill: the working solver, half-way; notaries: peers that arbitrate, 0
    for a quorum of checkers; path: None for a fresh one."""

    cheat: str = ""
    kill: bool = False
    steps: int = 200
    seed: int = 3
    keep: bool = False
    path: Path | None = None
    notaries: int = 4

    def __post_init__(self) -> None:
        if self.steps < STEPS_MIN:
            raise DemoFailed(f"{self.steps} steps are too few for ten segments", next_step="use --steps 10 or more")
        if self.cheat and self.kill:
            raise DemoFailed("a cheat that is killed is not caught cheating", next_step="use --cheat or --kill")


@dataclass
class Outcome:
    """What came of it. Money in micro-credits. `seconds` is everything from the first process to the last check."""

    plan: Plan
    state: str = ""
    params: int = 0
    loss_first: float = 0.0
    loss_last: float = 0.0
    segments: int = 0
    segments_checked: int = 0
    verdict: str = ""
    paid_micro: int = 0
    conserved: bool = False
    proof: bool = False
    slashed: int = 0
    culprit: str = ""
    retried: int = 0
    killed: str = ""
    solvers_paid: list[str] = field(default_factory=list)
    agreed_ms: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)  # seconds of each part
    seconds: float = 0.0
    final_root: str = ""
    sample: str = ""
    dispute: dict[str, Any] = field(default_factory=dict)  # how a cheat was convicted by notaries

    @property
    def failures(self) -> list[str]:
        """What did not come out as it must, in words; empty for success."""
        checks = [
            (self.state == "done", f"the job ended as {self.state or 'nothing'}"),
            (self.proof, "the proof bundle does not verify"),
            (self.conserved, "the ledgers differ, or do not add up to the deposits"),
            (not self.plan.cheat or self.culprit == CHEAT, f"{CHEAT} cheated and was not slashed"),
            (
                bool(self.dispute) == bool(self.plan.cheat and self.plan.notaries),
                "no dispute, or one about honest work",
            ),
            (bool(self.plan.cheat) or not self.slashed, f"{self.culprit} is honest and was slashed"),
            (not self.plan.kill or len(self.solvers_paid) == 2, "the two solvers were not both paid"),
        ]
        return [what for held, what in checks if not held]

    def as_dict(self) -> dict[str, Any]:
        """The JSON line."""
        found: dict[str, Any] = {
            "schema": "ichiba.demo/1",
            "state": self.state,
            "steps": self.plan.steps,
            "params": self.params,
            "loss_first": round(self.loss_first, 6),
            "loss_last": round(self.loss_last, 6),
            "segments": self.segments,
            "segments_checked": self.segments_checked,
            "verdict": self.verdict,
            "final_root": self.final_root,
            "paid_micro": self.paid_micro,
            "conserved": self.conserved,
            "proof_verified": self.proof,
            "agreed_ms": [round(ms, 1) for ms in self.agreed_ms],
            "parts": {name: round(seconds, 2) for name, seconds in self.parts.items()},
            "seconds": round(self.seconds, 2),
            "retried": self.retried,
        }
        if self.plan.cheat:
            found |= {"slashed": self.slashed, "culprit": self.culprit, "dispute": self.dispute}
        if self.plan.kill:
            found |= {"killed": self.killed, "solvers_paid": self.solvers_paid}
        return found


def run_demo(plan: Plan, screen: Screen) -> Outcome:
    """Show `plan` on `screen`. Raises IchibaError if a daemon, the capture or the market does not come up.

    Whatever ends it, the swarm is stopped (unless plan.keep and it came to its end) and a directory of its own
    making removed.
    """
    outcome = Outcome(plan)
    started = time.monotonic()
    path = plan.path or Path(tempfile.mkdtemp(prefix="ichiba-demo-"))
    lan = Lan.create(path, members(cheat=plan.cheat, notaries=plan.notaries), seed=None)
    release = lan.guard(remove=plan.path is None)
    kept = False
    try:
        demo = _Demo(plan, screen, lan, outcome)
        demo.run()
        outcome.seconds = time.monotonic() - started
        kept = plan.keep
    finally:
        if not kept:
            lan.stop()
        release()
        if not kept and plan.path is None:
            shutil.rmtree(path)
    if kept:
        screen.say(f"the swarm goes on in {path}; end it with: ichiba swarm down --dir {path}")
    return outcome


class _Demo:
    """One run over a swarm that is made but not started."""

    def __init__(self, plan: Plan, screen: Screen, lan: Lan, outcome: Outcome) -> None:
        self.plan, self.screen, self.lan, self.outcome = plan, screen, lan, outcome
        self.submitter = lan.of("submitter")
        self.killed = ""

    def run(self) -> None:
        """All of it, in order."""
        with self._timed("start"):
            prepared = self._start()
        self.outcome.params = prepared.parameters
        with self.submitter.client() as client:
            with self._timed("submit"):
                job = self._submit(client, prepared)
            with self._timed("train and verify"):
                story = self._follow(client, job)
            with self._timed("settle everywhere"):
                self._count_money()
            if story.disputes:
                self._show_dispute(story.disputes[0])
            if story.ended == "done":
                with self._timed("fetch, prove and generate"):
                    self._use(job)
        self._sum_up(story)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.outcome.parts[part] = time.monotonic() - started

    # --- before the job ------------------------------------------------------------------------------------
    def _start(self) -> Prepared:
        """Start the daemons, and capture the model meanwhile."""
        folder = self.lan.path / "job"
        folder.mkdir(exist_ok=True)
        (folder / "model.py").write_text(MODEL)
        per_segment = self.plan.steps // 10
        (folder / "job.toml").write_text(
            JOB.format(seed=self.plan.seed, steps=self.plan.steps, per_segment=per_segment, warmup=per_segment)
        )
        judges = f" and {self.plan.notaries} notaries" if self.plan.notaries else ""
        self.screen.say(f"five peers{judges}, each a process of its own with its own key, disk and ledger:")
        pool = ThreadPoolExecutor(1)
        preparing = pool.submit(_prepare, folder / "job.toml", load(self.lan.network_file.read_text()).id)
        pool.shutdown(wait=False)  # it ends by itself: who interrupts us need not wait for torch to stop the swarm
        self.lan.start(self._tell_started)
        self.lan.meet(seconds=MEET_SECONDS)
        self.screen.say("           all see each other, and the submitter has heard what they offer")
        prepared = preparing.result()
        self.screen.say(
            f"captured   one training step as {prepared.nodes} operations; {prepared.parameters:,} parameters, "
            f"{prepared.operations_per_step / 1e9:.2f} giga-operations a step"
        )
        return prepared

    def _tell_started(self, name: str) -> None:
        one = self.lan.of(name)
        price = f", {credits_of(one.member.unit_price)} credits a giga-operation" if one.member.unit_price else ""
        cheat = f", and it will cheat ({one.member.cheat})" if one.member.cheat else ""
        self.screen.say(f"           {name:14} {one.peer[-8:]}  process {one.pid}{price}{cheat}")

    def _submit(self, client: Client, prepared: Prepared) -> str:
        program = client.put_blob(prepared.program)
        arrays = {array.name: client.put_blob(array.data) for array in prepared.arrays}
        task = prepared.make_task(program=program, arrays=arrays)
        self.outcome.segments = task.segments
        size = sum(array.data.nbytes for array in prepared.arrays)
        self.screen.say(f"shared     the program and {size:,} characters of text, by content hash, from the submitter")
        assert prepared.job.budget_micro is not None
        assert prepared.job.unit_price_max is not None
        job = client.submit(
            task=encode(task),
            budget_micro=prepared.job.budget_micro,
            unit_price_max=prepared.job.unit_price_max,
            base_root=prepared.base_root,
            checkpoint_bytes=prepared.checkpoint_bytes,
            memory_bytes=prepared.memory_bytes,
        )
        return str(job["job"])

    # --- the job -------------------------------------------------------------------------------------------
    def _follow(self, client: Client, job: str) -> Story:
        """Tell the job's events until it ends; kill a solver on the way if that is the plan."""
        story = Story(self.lan.name_of, self.plan.steps, self.outcome.segments)
        deadline = time.monotonic() + JOB_SECONDS_MAX
        news = _Events(Path(self.submitter.data), job)
        while not story.ended:
            if time.monotonic() > deadline:
                raise DemoFailed(f"the job has not ended after {JOB_SECONDS_MAX:.0f} s", why=story.stage)
            event = news.next(NEWS_SECONDS)
            if event is None:
                for one in self.lan.peers:
                    if one.member.name != self.killed:
                        self.lan.check(one)
                continue
            for line in story.take(event):
                self.screen.say(line)
            if event["kind"] in ("step", "paid", "draw", "slashed", "done"):
                self.screen.picture(story)
            half_paid = event["kind"] == "paid" and 2 * (event["segment"] + 1) >= self.outcome.segments
            if half_paid and self.plan.kill and not self.killed:
                self._kill(story.solver)
        shown = client.job(job)
        self.outcome.state, self.outcome.final_root = shown["state"], shown["final_root"]
        return story

    def _kill(self, name: str) -> None:
        self.killed = self.outcome.killed = name
        self.lan.kill(name)
        self.screen.say(f"KILLED     {name}: SIGKILL to its whole process group, in the middle of a segment")

    # --- after it ------------------------------------------------------------------------------------------
    def _tables(self) -> list[dict[str, Any]]:
        """The wallet table of every daemon that is alive, each from its own ledger."""
        tables = []
        for one in self.lan.running():
            with one.client() as client:
                tables.append(client.wallet(everybody=True)["table"])
        return tables

    def _count_money(self) -> None:
        """Wait until every ledger has every closing, then compare and add up."""
        deadline = time.monotonic() + LEDGERS_SECONDS
        while True:
            tables = self._tables()
            first = tables[0]
            same = all(table == first for table in tables)
            closed = all(not row["channels_micro"] and not row["locks_micro"] for row in first["rows"])
            if (same and closed) or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        deposits = load(self.lan.network_file.read_text()).deposits
        deposited = sum(one.free_micro + one.stake_micro for one in deposits)
        sums = [sum(map(held_micro, t["rows"])) + t["burned_micro"] + t["pool_micro"] for t in tables]
        alive = len(self.lan.peers) - bool(self.killed)
        self.outcome.conserved = same and closed and len(tables) == alive and all(s == deposited for s in sums)
        self.screen.money(first, self.lan.name_of)
        self.screen.say(
            f"money      {len(tables)} ledgers {'are identical' if same else 'DIFFER'}; all buckets hold "
            f"{credits_of(sums[0])} credits, {credits_of(deposited)} were deposited"
        )
        earned = {self.lan.name_of(row["name"]): row["earned_micro"] for row in first["rows"]}
        solvers = [one.member.name for one in self.lan.peers if one.member.name.startswith("solver")]
        self.outcome.solvers_paid = [name for name in solvers if earned.get(name)]

    def _show_dispute(self, dispute: str) -> None:
        """How far down the notaries followed a quarrel, as one of them has it."""
        notary = self.lan.of("notary-1")
        with notary.client() as client:
            found = client.dispute(dispute)
        result = found.get("result") or {}
        self.outcome.dispute = {
            "finding": found["state"],
            "rounds": found.get("rounds", 0),
            "message_bytes": found.get("message_bytes", 0),
            "opening_bytes": found.get("opening_bytes", 0),
            "seconds": round((found["ended_ns"] - found["opened_ns"]) / 1e9, 2),
            "cause": result.get("cause", ""),
            "level": result.get("level", ""),
        }
        drawn = ichiba(["--data", notary.data, "dispute", "show", dispute])
        self.screen.text("how far down the notaries looked, as `ichiba dispute show` draws it", drawn)

    def _use(self, job: str) -> None:
        """Collect the result as any user does, verify its proof without asking anybody, and let the model write."""
        folder = self.lan.path / "result"
        ichiba(["--data", self.submitter.data, "job", "get", job, "--output", str(folder)])
        network_id = load(self.lan.network_file.read_text()).id
        try:
            report, files = check_proof(folder / "proof.json", network_id)
        except VerificationFailed as error:
            self.screen.say(f"proof      REFUSED: {error}")
            return
        self._report(report, files)
        self.outcome.sample = generated(folder / "weights.safetensors", GENERATED, self.plan.seed)
        self.screen.text("what the trained model writes after 'The '", self.outcome.sample)

    def _report(self, report: BundleReport, files: list[str]) -> None:
        self.outcome.proof = report.complete
        self.outcome.segments_checked = len(report.segments_checked)
        self.outcome.verdict = "right" if report.complete and report.segments_checked else "none"
        self.screen.say("proof      verified offline, from its bundle alone:")
        for line in (*report.proved(), *files):
            self.screen.say(f"           + {line}")
        for line in report.not_proved():
            self.screen.say(f"           - not proved: {line}")

    def _sum_up(self, story: Story) -> None:
        outcome = self.outcome
        losses = story.loss_line
        outcome.loss_first, outcome.loss_last = (losses[0], losses[-1]) if losses else (0.0, 0.0)
        outcome.slashed, outcome.culprit = story.slashed_micro, ", ".join(story.culprits)
        outcome.retried, outcome.agreed_ms = story.retried, story.agreed_ms
        with self.submitter.client() as client:
            outcome.paid_micro = client.jobs()[0]["paid_micro"]


def _prepare(job_toml: Path, network: bytes) -> Prepared:
    from worker.prepare import prepare  # imports torch: only when a job is prepared

    return prepare(job_toml, network)


def ichiba(words: list[str]) -> str:
    """Run a command of ours in a process of its own; what it printed. Raises DemoFailed with what it said."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "peer.cli", *words], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise DemoFailed(f"`ichiba {' '.join(words)}` failed", why=done.stderr.strip())
    return done.stdout


def generated(weights: Path, length: int, seed: int) -> str:
    """What the model with these weights writes: `length` characters after "The ". Raises DemoFailed."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", GENERATE, str(weights), str(length), str(seed)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode:
        raise DemoFailed("the trained model does not generate", why=done.stderr.strip().rpartition("\n")[2])
    return done.stdout


class _Events:
    """A job's events from a thread of their own, so that waiting for them can end."""

    def __init__(self, data_dir: Path, job: str) -> None:
        self.queue: queue.Queue[dict[str, Any] | IchibaError] = queue.Queue()
        threading.Thread(target=self._read, args=(data_dir, job), daemon=True).start()

    def _read(self, data_dir: Path, job: str) -> None:
        try:
            with Client(data_dir) as client:
                for event in client.events(job, follow=True):
                    self.queue.put(event)
        except IchibaError as error:
            self.queue.put(error)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next event, or None if none comes in time. Raises what ended the reading."""
        try:
            event = self.queue.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(event, IchibaError):
            raise event
        return event
