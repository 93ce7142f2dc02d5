"""A small AdamW transformer in tolerant mode: who runs it honestly, who cheats, and the way to a judged element."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.dispute_tolerant import OTHER_KERNELS, Cheat
from benchmarks.profiling import small_gpt, task_of
from protocol.codec import decode, encode
from protocol.dispute import Game, Pledge, Terms
from protocol.dispute_evidence import Followed, evidence, read_followed, read_states
from protocol.dispute_facts import Facts
from protocol.dispute_following import Apart, Dissent, Dissented, FollowingTracer
from protocol.dispute_player import Tracer
from protocol.dispute_pursuit import Pursuit
from protocol.dispute_wire import Question, ShowDistance, ShowState, ShowStates, ShowTrace
from protocol.profile import Gauge, Tolerance
from protocol.program import Program, state_layout
from protocol.task import ArrayRef, TaskSpec
from tests.dispute_scene import DISPUTE, _blob, play
from worker import checkpoint
from worker.capture import capture_built
from worker.tracing import inspect
from worker.training import run_segments

__all__ = ["ARRAYS", "SEGMENT", "TOLERANCE", "Player", "Recorded", "base", "disputed", "elsewhere", "facts", "honest",
           "program", "pursued", "seen", "task"]  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
CONTEXT, STEPS, SEGMENT = 8, 6, 1
ARRAYS = {"text": bytes((7 * i * i + i // 3) % 90 + 32 for i in range(3000))}
TOLERANCE = Tolerance(20_000, 110_000, (Gauge("blocks.0.query_key_value.bias", 3, (1,)),))  # decision 9


@cache
def program() -> Program:
    """A captured training step."""
    return capture_built(lambda: small_gpt(blocks=1, width=16, context=CONTEXT)).program


@cache
def task() -> TaskSpec:
    """Two segments of six steps."""
    text = ARRAYS["text"]
    made = task_of(program().to_bytes(), text, context=CONTEXT, steps=STEPS, segments=2, warmup=STEPS)
    return msgspec.structs.replace(made, arrays=(ArrayRef("text", "uint8", (len(text),), _blob(text), len(text)),))


@cache
def base() -> bytes:
    """The checkpoint that the disputed segment starts from."""
    given: dict[str, Any] = {"task": task(), "program": program(), "arrays": ARRAYS, "base": None}
    (result,) = run_segments(**given, segments=range(1), gauges=TOLERANCE.gauges)
    return result.checkpoint


def facts() -> Facts:
    """What everybody knows of the disputed segment."""
    return Facts(task(), program(), SEGMENT, TOLERANCE.gauges)


class Player(Cheat):
    """Who computes the segment here, and commits `fraud` in it, at `step` if it is no habit."""

    def __init__(self, fraud: str = "", *, step: int = 2) -> None:
        state = checkpoint.load(base(), state_layout(program()))
        super().__init__(task(), program(), SEGMENT, arrays=ARRAYS, state=state, gauges=TOLERANCE.gauges)
        self.commit(fraud, at=step)


@cache
def honest() -> Player:
    """Who computes the segment as the task says, on this machine."""
    return Player()


class Recorded(FollowingTracer):
    """A solver whose machine is elsewhere: what it showed of one step, and nothing else."""

    def __init__(self, followed: Followed) -> None:
        self.facts, self._followed, self._instead, self._arrays = facts(), followed, {}, dict(ARRAYS)
        self._ends, self._end = list(followed.ends), dict(followed.end)
        self._root = b""

    def step_roots(self) -> Any:
        return self._followed.states


def seen(solver: Tracer, step: int) -> Followed:
    """The solver's files about a step, read as a challenger does."""
    known, claimed = facts(), solver.step_roots()[-1]
    states = read_states(known, evidence(ShowStates(), solver), claimed)
    before = evidence(ShowState(step), solver)
    after = evidence(ShowState(known.ends) if known.puts_back(step) else ShowTrace(step), solver)
    in_root = checkpoint.state_root(checkpoint.load(base()))
    return read_followed(known, step, states, in_root=in_root, before=before, after=after, base=base())


def pursued(solver: Tracer) -> tuple[Followed, Dissent] | None:
    """The challenger's search, every question answered as in a worker; None if nothing shows."""
    pursuit, files = Pursuit(facts(), TOLERANCE), {}
    while (due := pursuit.due()) is not None:
        while (file := pursuit.wants()) is not None:
            files[file] = evidence(file, solver)
            pursuit.shown(file)
        body = inspected(due.ask, [files[file] for file in due.files])
        if isinstance(due.ask, ShowDistance):
            pursuit.apart(decode(Apart, body, bytes_max=100))
        else:
            pursuit.dissented(decode(Dissented, body, bytes_max=500))
    if pursuit.found is None or pursuit.found.dissent is None:
        return None
    told, dissent = pursuit.found, pursuit.found.dissent
    followed = seen(solver, dissent.step)
    assert followed.pledge(facts()) == Pledge(told.steps, dissent.step, told.trace)
    assert FollowingTracer(facts(), followed, dissent, ARRAYS).found_root == told.found_root
    return followed, dissent


def inspected(ask: Any, followed: list[bytes]) -> bytes:
    """The body of the challenger's machine's answer."""
    in_root = checkpoint.state_root(checkpoint.load(base()))
    question = encode(Question(DISPUTE, "challenger", 0, SEGMENT, in_root, ask))
    given: dict[str, Any] = {"task": task(), "program": program(), "arrays": ARRAYS, "base": base(), "claimed": None}
    body, _, _ = inspect(question, **given, gauges=TOLERANCE.gauges, followed=followed)
    return body


def disputed(solver: Tracer, followed: Followed, dissent: Dissent, **fields: Any) -> Game:
    """The game that comes of it, played to its end."""
    challenger = FollowingTracer(facts(), followed, dissent, ARRAYS)
    in_root = checkpoint.state_root(checkpoint.load(base()))
    ends = solver.step_roots()[-1], challenger.found_root
    given: dict[str, Any] = {"block": 512, "tolerance": TOLERANCE, "pledge": followed.pledge(facts()), **fields}
    game = Game(Terms(DISPUTE, task(), program(), SEGMENT, in_root, *ends, **given))
    play(game, solver, challenger)
    return game


# --- another machine ---------------------------------------------------------------------------------------
def write_evidence(folder: str) -> None:
    """In a process of its own: an honest solver's files about every step."""
    torch.set_num_threads(1)
    solver = Player()
    (Path(folder) / "states").write_bytes(evidence(ShowStates(), solver))
    for step in range(facts().ends):
        (Path(folder) / f"before-{step}").write_bytes(evidence(ShowState(step), solver))
        if not facts().puts_back(step):
            (Path(folder) / f"trace-{step}").write_bytes(evidence(ShowTrace(step), solver))
    (Path(folder) / f"trace-{STEPS}").write_bytes(evidence(ShowState(facts().ends), solver))


def elsewhere(folder: Path) -> list[Followed]:
    """An honest solver under another instruction set and another BLAS path: what it shows of each step."""
    (folder / "base").write_bytes(base())
    (folder / "program").write_bytes(program().to_bytes())
    words = "from tests import tolerant_scene as s; from pathlib import Path; "
    words += f"s.base = lambda: Path({str(folder / 'base')!r}).read_bytes(); "
    words += f"made = s.Program.from_bytes(Path({str(folder / 'program')!r}).read_bytes()); s.program = lambda: made; "
    words += f"s.write_evidence({str(folder)!r})"
    command = [sys.executable, "-c", words]
    subprocess.run(command, env=os.environ | OTHER_KERNELS | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, check=True)
    known = facts()
    states = read_states(known, (folder / "states").read_bytes(), None)
    in_root = checkpoint.state_root(checkpoint.load(base()))
    files = [[(folder / f"{kind}-{step}").read_bytes() for kind in ("before", "trace")] for step in range(known.ends)]
    return [
        read_followed(known, step, states, in_root=in_root, before=before, after=after, base=base())
        for step, (before, after) in enumerate(files)
    ]
