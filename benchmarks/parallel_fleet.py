"""Starts and drives the processes of benchmarks/parallel.py (parallel_peer.py), and remembers what they tell."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from parallel_job import Job, UnitFiles

CHILD = Path(__file__).resolve().with_name("parallel_peer.py")
ROOT = CHILD.parent.parent
START_SECONDS_MAX = 180.0
WAIT_SECONDS_MAX = 900.0


class Failed(Exception):
    """A process told of a failure, or did not tell what it was waited for."""


@dataclass(eq=False)
class Process:
    """A peer's process."""

    number: int
    process: subprocess.Popen[str]
    folder: Path
    address: str = ""
    peer: str = ""
    alive: bool = True

    def tell(self, do: str, **fields: Any) -> None:
        """Command it."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
        self.process.stdin.flush()


@dataclass(eq=False)
class Run:
    """A job under way: which process has which unit, and what the units told so far."""

    job: Job
    units: list[UnitFiles]
    at: list[Process]
    epochs: list[int]
    losses: dict[int, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))  # unit -> step -> loss
    stepped: dict[int, dict[int, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    ends: dict[int, dict[int, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))  # segment -> unit
    done: set[int] = field(default_factory=set)
    kept: int = 2  # segments whose checkpoints and tapes stay on disk

    @property
    def name(self) -> str:
        """Of its job."""
        return self.job.name

    def seats(self) -> dict[str, tuple[str, int]]:
        """Who has which unit, as parallel_peer takes it."""
        return {str(unit): (process.peer, self.epochs[unit]) for unit, process in enumerate(self.at)}

    def hear(self, event: dict[str, Any]) -> None:
        """Take what a unit told."""
        kind, unit = event["kind"], event["unit"]
        if kind == "step":
            self.stepped[unit][event["step"]].append(event["t"])
            if event["loss"] is not None:
                self.losses[unit][event["step"]] = event["loss"]
        if kind == "segment":
            self.ends[event["segment"]][unit] = event
            old = self.ends.get(event["segment"] - self.kept, {}).get(unit)
            for path in (old["checkpoint"], old["tape"]) if old else ():
                if path:
                    Path(path).unlink(missing_ok=True)
        if kind == "done":
            self.done.add(unit)


class Fleet:
    """Processes, one a peer. Use as a context manager; at the end all are gone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[Process] = []
        self.runs: dict[str, Run] = {}
        self.heard: list[dict[str, Any]] = []  # what is of no run
        self._queue: queue.Queue[tuple[Process, dict[str, Any] | None]] = queue.Queue()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.alive = False
            if process.process.stdin is not None:
                process.process.stdin.close()
        for process in self.processes:
            try:
                process.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.process.kill()
                process.process.wait()

    # --- processes -----------------------------------------------------------------------------------------
    def start(self, count: int) -> list[Process]:
        """More processes, each linked to all others, and none with slow links."""
        made = []
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        for number in range(len(self.processes), len(self.processes) + count):
            folder = self.folder / f"peer-{number}"
            seed = (number + 1).to_bytes(32, "big").hex()
            child = subprocess.Popen(
                [sys.executable, "-P", str(CHILD), seed, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, env=environment,
            )  # fmt: skip
            process = Process(number, child, folder)
            threading.Thread(target=self._read, args=(process,), daemon=True).start()
            made.append(process)
        self.processes += made
        self.until(lambda: all(one.address for one in made), "the processes start", START_SECONDS_MAX)
        for one in made:
            others = [other.address for other in self.processes if other.number < one.number and other.alive]
            self.ask([one], "connect", "connected", addresses=others)
        return made

    def _read(self, process: Process) -> None:
        assert process.process.stdout is not None
        for line in process.process.stdout:
            self._queue.put((process, json.loads(line)))
        self._queue.put((process, None))

    def kill(self, process: Process) -> float:
        """End a process at once, as a power cut does; when."""
        process.alive = False
        process.process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        process.process.wait()
        return killed

    # --- listening -----------------------------------------------------------------------------------------
    def until(self, condition: Callable[[], object], what: str, seconds: float = WAIT_SECONDS_MAX) -> None:
        """Listen until something holds. Raises Failed."""
        deadline = time.monotonic() + seconds
        while not condition():
            try:
                process, event = self._queue.get(timeout=max(0.01, min(1.0, deadline - time.monotonic())))
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise Failed(f"waited {seconds:.0f} s until {what}") from None
                continue
            self._take(process, event)

    def _take(self, process: Process, event: dict[str, Any] | None) -> None:
        if event is None:
            if process.alive:
                raise Failed(f"process {process.number} ended with {process.process.wait()}")
            return
        if event["kind"] == "failed" and process.alive:
            raise Failed(f"process {process.number}, run {event['run']}: {event['what']}\n{event['log']}")
        if event["kind"] == "ready":
            process.address, process.peer = event["address"], event["peer"]
        if (run := self.runs.get(event.get("run", ""))) is not None and process.alive:
            run.hear(event)
        self.heard.append({**event, "process": process.number})

    def ask(self, processes: Iterable[Process], do: str, answer: str, **fields: Any) -> list[dict[str, Any]]:
        """Command processes and wait for the answer of each."""
        asked = {process.number for process in processes}
        first = len(self.heard)
        for process in self.processes:
            if process.number in asked:
                process.tell(do, **fields)

        def answers() -> list[dict[str, Any]]:
            return [event for event in self.heard[first:] if event["kind"] == answer and event["process"] in asked]

        self.until(lambda: len(answers()) >= len(asked), f"`{do}` is done")
        return answers()

    def shape(self, words: str) -> None:
        """The links of all that live, alike."""
        self.ask([process for process in self.processes if process.alive], "shape", "shaped", words=words)

    # --- runs ----------------------------------------------------------------------------------------------
    def launch(self, job: Job, at: list[Process], *, before_step: int = 0) -> Run:
        """Start every unit of a job, behind a gate."""
        run = self.runs[job.name] = Run(job, job.write(self.folder), at, [0] * len(at))
        for unit, process in enumerate(at):
            process.tell(
                "unit", run=job.name, unit=str(run.units[unit].told), seats=run.seats(), before_step=before_step
            )
        return run

    def go(self, run: Run, before_step: int) -> None:
        """Move the gate."""
        for process in set(run.at):
            process.tell("go", run=run.name, before_step=before_step)

    def segment(self, run: Run, segment: int) -> float:
        """Let a run's next segment pass, and wait for its end at all units; the seconds it took."""
        steps = run.units[0].task.steps_of(segment)
        began = time.monotonic()
        self.go(run, steps.stop)
        self.until(lambda: len(run.ends[segment]) == len(run.units), f"segment {segment} of {run.name} ends")
        for process in set(run.at):
            process.tell("release", run=run.name, before_step=steps.start)
        return max(float(end["t"]) for end in run.ends[segment].values()) - began
