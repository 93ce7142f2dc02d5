"""What a dispute over floats costs, which frauds it convicts, and how near honest machines come to the bounds.

Run `python benchmarks/dispute_tolerant.py [--json]`. Two models: the transformer of `benchmarks/profiling.py` (two
blocks, 64 channels) and the demonstration's (1.07 million parameters). A solver commits each fraud in one step of a
segment and shows what it did; a challenger looks for the first value that no honest machine can have and plays the game
about it. An honest solver computes the same steps in a process under another instruction set and another BLAS path; of
every sum and product in its trace the difference to a float64 result is told in parts of its bound. Last a product over
640, the longest that a leaf opens. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.dispute import product_of, task_of
from benchmarks.profiling import small_gpt
from protocol.dispute import SIDES, Game, Terms
from protocol.dispute_evidence import Followed, evidence, read_followed, read_states
from protocol.dispute_facts import Facts
from protocol.dispute_following import Dissent, FollowingTracer
from protocol.dispute_player import Tracer, answer
from protocol.dispute_wire import ShowState, ShowStates, ShowTrace
from protocol.profile import Tolerance
from protocol.program import Program
from protocol.task import BatchRule, TaskSpec
from worker import char_gpt, checkpoint
from worker.capture import capture_built
from worker.dissent import Dissenter
from worker.executor import Executor, Kernel
from worker.frauds import RATE_ERROR, LowPrecision
from worker.tracing import TorchTracer
from worker.training import Batches, initial_state, rate_of

ROOT: Final = Path(__file__).resolve().parent.parent
STEPS, AT = 3, 1
FRAUDS: Final = ("tf32", "bf16", "rate", "label", "other data", "skip")
OTHER_KERNELS: Final = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
TOLERANCE: Final = Tolerance(20_000, 110_000, ())
REPEATS: Final = 10


# --- who cheats --------------------------------------------------------------------------------------------
class Cheat(TorchTracer):
    """Who does its work otherwise, and shows truly what it did. fraud: of FRAUDS, "gauges", which puts none back, or ""
    for honest work; at: the step it is committed in, but for those that are a habit."""

    fraud, at = "", AT

    def commit(self, fraud: str, *, at: int = AT) -> Cheat:
        """Cheat from now on."""
        self.fraud, self.at = fraud, at
        kinds: dict[str, type[Executor]] = {"tf32": LowPrecision, "bf16": Bfloat16}
        if fraud in kinds:
            self._executor = kinds[fraud](self.facts.program, "native")
        self._batches = _OtherBatches(self, self._batches)  # type: ignore[assignment]
        return self

    def _run(
        self, step: int, state: Mapping[str, Tensor], on_node: Callable[[int, Tensor], None] | None = None
    ) -> tuple[Mapping[str, Tensor], float]:
        task, program, number = self.facts.task, self.facts.program, self.facts.number_of(step)
        rate = rate_of(task, number) * (1 + RATE_ERROR if self.fraud == "rate" else 1)
        batch = self._batches.of(number)
        if self.fraud != "skip" or step != self.at:
            return self._executor.step(state, batch, rate, task.seed, number, on_node=on_node)
        kept = {update.value - program.first_node: update.name for update in program.updates}

        def stale(node: int, result: Tensor) -> None:
            if on_node is not None:
                on_node(node, state[kept[node]] if node in kept else result)

        _, loss = self._executor.step(state, batch, rate, task.seed, number, on_node=stale)
        return state, loss

    def _after(self, step: int, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.facts.puts_back(step) and self.fraud == "gauges":
            self._roots[step] = self._hashing.of(state)
            return state
        return super()._after(step, state)


class _OtherBatches:
    """The batches of a cheat."""

    def __init__(self, cheat: Cheat, true: Batches) -> None:
        self._cheat, self._true = cheat, true

    def of(self, number: int) -> dict[str, Tensor]:
        fraud, task = self._cheat.fraud, self._cheat.facts.task
        now = number == self._cheat.facts.number_of(self._cheat.at)
        batch = self._true.of(number, seed=task.seed ^ 1 if fraud == "other data" and now else None)
        if fraud == "label" and now:
            batch["y"][0, 0] = (batch["y"][0, 0] + 1) % char_gpt.SYMBOLS
        return batch


class Bfloat16(Executor):
    """Products of operands rounded to bfloat16."""

    def _planned(self, kernels: Mapping[str, Kernel]) -> list[Any]:
        def rounded(product: Kernel) -> Kernel:
            return lambda a, b: product(a.bfloat16().float(), b.bfloat16().float())

        return super()._planned({**kernels, **{op: rounded(kernels[op]) for op in ("mm.default", "bmm.default")}})


# --- one model ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Model:
    """A task of one segment, its data, and the state it starts from."""

    task: TaskSpec
    program: Program
    arrays: Mapping[str, bytes]

    @property
    def facts(self) -> Facts:
        """What everybody knows."""
        return Facts(self.task, self.program, 0)

    def tracer(self) -> Cheat:
        """Who computes it here."""
        state = initial_state(self.task, self.program, None)
        return Cheat(self.task, self.program, 0, arrays=self.arrays, state=state)

    def in_root(self) -> bytes:
        """The root of its start."""
        return checkpoint.state_root(initial_state(self.task, self.program, None))

    def dissenter(self) -> Dissenter:
        """Who looks for a dissent here."""
        return Dissenter(self.task, self.program, self.facts, self.arrays)


@cache
def model_of(name: str) -> Model:
    """`small`, of the profiling benchmark; `1M`, of the demonstration; `product`, over 640."""
    if name == "product":
        return long_product()
    text = char_gpt.corpus()
    batch, context = (8, 32) if name == "small" else (char_gpt.BATCH, char_gpt.CONTEXT)
    program = capture_built(small_gpt if name == "small" else char_gpt.build).program
    made = task_of(program, {"text": np.frombuffer(text, np.uint8)}, BatchRule("windows", batch, context), STEPS)
    return Model(msgspec.structs.replace(made, mode="tolerant"), program, {"text": text})


def long_product(inner: int = 640, side: int = 64) -> Model:
    """One product, of a batch with a weight."""
    program, x = product_of(inner, side)
    made = task_of(program, {"x": x}, BatchRule("sequence", side, 0), 1)
    return Model(msgspec.structs.replace(made, mode="tolerant"), program, {"x": x.tobytes()})


def files_of(solver: Tracer, step: int) -> tuple[bytes, bytes, bytes]:
    """What a solver shows about a step."""
    return tuple(evidence(ask, solver) for ask in (ShowStates(), ShowState(step), ShowTrace(step)))  # type: ignore[return-value]


def followed_of(model: Model, step: int, files: tuple[bytes, bytes, bytes]) -> Followed:
    """As a challenger reads it."""
    states = read_states(model.facts, files[0], None)
    given = {"before": files[1], "after": files[2], "base": None}
    return read_followed(model.facts, step, states, in_root=model.in_root(), **given)  # type: ignore[arg-type]


def disputed(model: Model, solver: Tracer, followed: Followed, dissent: Dissent) -> dict[str, Any]:
    """The game, played to its end, and the leaf on the clock."""
    challenger = FollowingTracer(model.facts, followed, dissent, model.arrays)
    ends = solver.step_roots()[-1], challenger.found_root
    pledge = followed.pledge(model.facts)
    terms = Terms(bytes(32), model.task, model.program, 0, model.in_root(), *ends, 512, TOLERANCE, pledge)
    game, players, moves = Game(terms), {"solver": solver, "challenger": challenger}, []
    opening = b""
    while game.result is None:
        if game.wants_opening():
            question = game.question("challenger")
            assert question is not None, "an opening is wanted"
            opening = answer(question, challenger).opening
            break
        number = game.number
        asked = {side: game.question(side) for side in SIDES}
        for side, question in asked.items():
            assert question is not None, "both sides owe a move"
            moves.append((side, number, answer(question, players[side]).body))
            game.take(*moves[-1])
    times = []
    for _ in range(REPEATS):
        game = Game(terms)
        for move in moves:
            game.take(*move)
        begun = time.perf_counter()
        if opening:
            game.open(opening)
        times.append(time.perf_counter() - begun)
    assert game.result is not None, "the opening proves"
    node = model.facts.node(dissent.value)
    return {
        "loser": game.result.loser, "cause": game.result.cause, "op": node.op if node is not None else "batch",
        "rounds": game.number, "move_bytes": sum(len(body) for *_, body in moves), "opened_bytes": len(opening),
        "leaf_ms": round(1e3 * min(times), 2),
    }  # fmt: skip


def convicted(model: Model, fraud: str) -> dict[str, Any]:
    """One fraud: what it comes to."""
    solver = model.tracer().commit(fraud)
    step = AT if fraud in ("label", "other data", "skip") else 0
    begun = time.perf_counter()
    files = files_of(solver, step)
    shown = time.perf_counter()
    followed = followed_of(model, step, files)
    dissent = model.dissenter().first(followed)
    found = time.perf_counter()
    times = {"evidence_bytes": len(files[2]), "show_s": round(shown - begun, 2), "search_s": round(found - shown, 2)}
    if dissent is None:
        return {**times, "loser": None}
    return {**disputed(model, solver, followed, dissent), **times}


# --- honest machines ---------------------------------------------------------------------------------------
class _Nearest(Dissenter):
    """Keeps how far every sum and product lies from a float64 result, in parts of its bound."""

    most, nodes, differing = 0.0, 0, 0

    def _excess(self, value: int, operands: Any, own: NDArray[Any], theirs: NDArray[Any]) -> NDArray[Any]:
        excess = super()._excess(value, operands, own, theirs)
        node = self.facts.node(value)
        if node is not None and self.facts.chain(value, 0) is not None:
            self.nodes, self.most = self.nodes + 1, max(self.most, float(excess.max(initial=0)))
        self.differing += int((own != theirs).sum())
        return excess


def honest_elsewhere(name: str) -> dict[str, Any]:
    """An honest solver under other kernels, looked at here."""
    model, values, dissents, nearest = model_of(name), 0, 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        words = f"from benchmarks.dispute_tolerant import write; write({name!r}, {folder!r})"
        environment = os.environ | OTHER_KERNELS | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", words], env=environment, cwd=ROOT, check=True)
        told = []
        for step in range(STEPS):
            files = tuple((Path(folder) / f"{step}-{n}").read_bytes() for n in range(3))
            followed = followed_of(model, step, files)  # type: ignore[arg-type]
            looking = _Nearest(model.task, model.program, model.facts, model.arrays)
            dissents += looking.first(followed) is not None
            values += sum(array.size for array in followed.trace.values())
            nearest = max(nearest, looking.most)
            told.append(looking.differing)
    return {
        "values": values,
        "differing": sum(told),
        "largest_part_of_a_bound": round(nearest, 4),
        "dissents": dissents,
    }


def write(name: str, folder: str) -> None:
    """In a process of its own: an honest solver's files about every step."""
    torch.set_num_threads(1)
    solver = model_of(name).tracer()
    for step in range(STEPS):
        for number, data in enumerate(files_of(solver, step)):
            (Path(folder) / f"{step}-{number}").write_bytes(data)


def longest_leaf() -> dict[str, Any]:
    """A lie about an honest product over 640: the most a leaf opens and takes."""
    model = model_of("product")
    solver = model.tracer()
    followed = followed_of(model, 0, files_of(solver, 0))
    return disputed(model, solver, followed, Dissent(0, 3, 777, 0x3F800000))


def main() -> None:
    """Commit, look, play, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the last line alone")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    for name in ("small", "1M"):
        result[name] = {"frauds": {}, "honest": honest_elsewhere(name)}
        for fraud in FRAUDS:
            result[name]["frauds"][fraud] = convicted(model_of(name), fraud)
            if not as_json:
                print(f"{name:>6} {fraud:>11}: {result[name]['frauds'][fraud]}")
        if not as_json:
            print(f"{name:>6}      honest: {result[name]['honest']}")
    result["product_640"] = longest_leaf()
    if not as_json:
        print(f"product over 640: {result['product_640']}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
