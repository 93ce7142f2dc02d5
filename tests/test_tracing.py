"""torch answers the questions of a dispute as Python integers do, and finds any lie in a real captured step."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from protocol import safetensors
from protocol.batches import source_of
from protocol.codec import encode
from protocol.dispute import Game
from protocol.dispute_claim import MisaddingTracer, StubbornTracer
from protocol.dispute_partials import REDUCTIONS
from protocol.dispute_player import Tracer, answer, decode_question
from protocol.errors import LocalProtocolError, VerificationFailed
from protocol.program import Program
from protocol.task import BatchRule, TaskSpec
from tests import dispute_scene
from tests.dispute_scene import SEGMENT, flipped, game_of, honest, play, task_for, value_of
from tests.test_training import program_of
from worker import checkpoint
from worker.checkpoint import dump
from worker.tracing import TorchTracer, inspect
from worker.training import Batches, initial_state, run_segments


def tensors(state: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in state.items()}


@cache
def by_torch() -> TorchTracer:
    task, program = dispute_scene.task(), dispute_scene.program()
    return TorchTracer(task, program, SEGMENT, arrays=dispute_scene.ARRAYS, state=tensors(dispute_scene.base()))


# --- the same as the reference -----------------------------------------------------------------------------
def test_torch_and_integers_give_the_same_roots_of_everything() -> None:
    for step in range(3):
        assert list(by_torch().trace_roots(step)) == list(honest().trace_roots(step))
        assert list(by_torch().state_roots(step - 1)) == list(honest().state_roots(step - 1))
    assert list(by_torch().step_roots()) == list(honest().step_roots())


@pytest.mark.parametrize("name", ["x", "h", "z", "m", "t", "ge", "gram'", "count'", "frozen", "kept"])
def test_torch_and_integers_make_the_same_moves_and_openings(name: str) -> None:
    bit = {"x": 0, "kept": 0, "ge": 30}.get(name, 22)
    cheat = flipped(2, value_of(name), 1 if name == "x" else 0, bit=bit)
    for block in (512, 1):
        played = []
        for tracer in (honest(), by_torch()):
            played.append(play(game_of(cheat, tracer, block=block), cheat, tracer))
        assert played[0] == played[1]


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_a_batch_element_is_where_the_worker_reads_it(name: str) -> None:
    task, arrays = real(name)
    batch = Batches(task, program_of(name), arrays).of(1)
    for item in program_of(name).inputs_of("batch"):
        flat = batch[item.name].reshape(-1)
        for element in (0, 1, len(flat) - 1):
            ref, at = source_of(task, item, 1, element)
            assert flat[element].item() == np.frombuffer(arrays[ref.name], ref.dtype)[at]


# --- real models -------------------------------------------------------------------------------------------
@cache
def real(name: str) -> tuple[TaskSpec, dict[str, bytes]]:
    """A task of one segment of two steps on a captured model, and its data."""
    program = program_of(name)
    if name == "gpt":
        text = np.frombuffer(bytes(range(32, 120)) * 4, np.uint8)
        arrays: dict[str, NDArray[Any]] = {"text": text}
        rule = BatchRule("windows", 4, 16)
    else:
        rng = np.random.default_rng(3)
        arrays = {}
        for item in program.inputs_of("batch"):
            shape = (40, *item.shape[1:])
            floats = item.dtype == "float32"
            arrays[item.name] = (
                rng.standard_normal(shape).astype("float32") if floats else rng.integers(0, 2, shape).astype("int64")
            )
        rule = BatchRule("rows", program.inputs_of("batch")[0].shape[0], 0)
    task = task_for(program, arrays, rule, steps=2, steps_per_segment=2)
    return task, {key: array.tobytes() for key, array in arrays.items()}


@cache
def traced(name: str) -> TorchTracer:
    task, arrays = real(name)
    first = next(iter(run_segments(task=task, program=program_of(name), arrays=arrays, base=None, segments=range(1))))
    state = checkpoint.load(dump(start(name)))
    assert checkpoint.state_root(state) == first.in_root
    tracer = TorchTracer(task, program_of(name), 0, arrays=arrays, state=state)
    assert tracer.step_roots()[-1] == first.out_root
    return tracer


def start(name: str) -> dict[str, torch.Tensor]:
    return initial_state(real(name)[0], program_of(name), None)


def changed(array: NDArray[Any], element: int) -> NDArray[Any]:
    """One element of a tensor replaced by another value of its dtype."""
    flat = array.copy().reshape(-1)
    flat[element] = not flat[element] if array.dtype == bool else flat[element] + 1
    if flat[element] == array.reshape(-1)[element]:  # one more is nothing beside a large number
        flat[element] = 2.0
    return flat.reshape(array.shape)


def kinds(name: str) -> list[tuple[str, int]]:
    """Of each operation in a program the first node that a state tensor comes after."""
    program = program_of(name)
    last = max(update.value for update in program.updates)
    found: dict[str, int] = {}
    for number, node in enumerate(program.nodes, program.first_node):
        if number < last and node.type.elements:
            found.setdefault(node.op, number)
    return sorted(found.items())


def lie(name: str, value: int, element: int) -> StubbornTracer:
    """A wrong element in the last step, and a wrong end of the segment that hides where it came from."""
    truth, program = traced(name), program_of(name)
    end = {key: array.numpy() for key, array in truth._after(1, truth.state_before(1)).items()}
    last = max(program.updates, key=lambda update: update.value)
    end[last.name] = changed(end[last.name], 0)
    return StubbornTracer(truth, end, {value: changed(truth.tensors(1, [value])[value], element)})


def finished(solver: Tracer, challenger: Tracer, **fields: int) -> Game:
    game = game_of(solver, challenger, **fields)
    play(game, solver, challenger)
    return game


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_a_wrong_element_of_every_kind_of_node_is_found(name: str) -> None:
    truth = traced(name)
    for turn, (op, value) in enumerate(kinds(name)):
        element = program_of(name).types[value].elements - 1
        cheat = lie(name, value, element)
        pair = (cheat, truth) if turn % 2 else (truth, cheat)
        game = finished(*pair, block=(512, 1)[turn // 2 % 2])
        assert game.result is not None
        level = "block" if op in REDUCTIONS else "element"
        found = (game.result.loser, game.result.cause, game.result.level)
        assert found == ("solver" if turn % 2 else "challenger", "leaf", level), op
        node = next(rung for rung in game.descent() if rung.level == "node")
        assert (node.op, node.source) == (op, program_of(name).nodes[value - program_of(name).first_node].source)


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_a_wrong_tensor_of_every_name_is_found(name: str) -> None:
    truth, program = traced(name), program_of(name)
    for turn, update in enumerate(program.updates):
        end = {key: array.numpy() for key, array in truth._after(1, truth.state_before(1)).items()}
        end[update.name] = changed(end[update.name], end[update.name].size // 2)
        cheat = StubbornTracer(truth, end)
        game = finished(*((cheat, truth) if turn % 2 else (truth, cheat)))
        assert game.result is not None and game.result.cause == "leaf"
        assert game.result.loser == ("solver" if turn % 2 else "challenger"), update.name
        assert any(update.name in rung.where for rung in game.descent())


# --- the sandbox's entry -----------------------------------------------------------------------------------
def test_a_machine_answers_from_the_base_and_then_from_the_state_it_was_given() -> None:
    task, arrays = real("mlp")
    program, truth = program_of("mlp"), traced("mlp")
    cheat = lie("mlp", kinds("mlp")[0][1], 0)
    game = game_of(cheat, truth)
    state: bytes | None = None
    states = 0
    while game.result is None:
        mine, other = game.question("challenger"), game.question("solver")
        assert mine is not None and other is not None
        base = state if not game.replay else dump(start("mlp"))
        body, opening, given = inspect(mine, task=task, program=program, arrays=arrays, base=base, claimed=None)
        assert (body, opening) == (answer(mine, truth).body, answer(mine, truth).opening)
        if given is not None:
            state, states = given, states + 1
            assert checkpoint.state_root(checkpoint.load(given)) == truth.step_roots()[0]
        if game.wants_opening():
            game.open(opening)
            break
        number = game.number
        game.take("challenger", number, body)
        game.take("solver", number, answer(other, cheat).body)
    assert game.result is not None and game.result.loser == "solver"
    assert states == 1


def test_a_stubborn_cheat_loses_at_the_leaf_and_not_by_a_slip() -> None:
    task, arrays = real("mlp")
    program, truth = program_of("mlp"), traced("mlp")
    skipped = safetensors.write({k: v.numpy() for k, v in truth.state_before(1).items()})  # it left the last step out
    cheat = StubbornTracer(truth, safetensors.parse(skipped))
    game = game_of(cheat, truth)
    while game.result is None:
        question = game.question("solver")
        mine = game.question("challenger")
        assert question is not None and mine is not None
        if game.wants_opening():
            game.open(answer(mine, truth).opening)
            break
        body, _, _ = inspect(question, task=task, program=program, arrays=arrays, base=None, claimed=skipped)
        number = game.number
        game.take("challenger", number, answer(mine, truth).body)
        game.take("solver", number, body)
    assert game.result is not None
    assert (game.result.loser, game.result.cause) == ("solver", "leaf")


def test_a_wrong_base_is_refused_with_what_to_give() -> None:
    task, arrays = real("mlp")
    program: Program = program_of("mlp")
    game = game_of(lie("mlp", kinds("mlp")[0][1], 0), traced("mlp"))
    question = game.question("challenger")
    assert question is not None
    wrong = dump(traced("mlp").state_before(1))
    with pytest.raises(VerificationFailed, match="give the checkpoint before the segment"):
        inspect(question, task=task, program=program, arrays=arrays, base=wrong, claimed=None)
    asked = decode_question(question)
    with pytest.raises(LocalProtocolError, match="segment"):
        answer(encode(type(asked)(asked.dispute, asked.side, 0, 9, asked.in_root, asked.ask)), traced("mlp"))


def test_a_step_is_not_run_beyond_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = traced("gpt")
    seen: list[int] = []
    run = TorchTracer._run

    def counting(self: TorchTracer, step: int, state: Any, on_node: Any = None) -> Any:
        def each(number: int, result: torch.Tensor) -> None:
            seen.append(number)
            on_node(number, result)

        return run(self, step, state, each if on_node else None)

    monkeypatch.setattr(TorchTracer, "_run", counting)
    with contextlib.suppress(KeyError):
        tracer.tensors(1, [program_of("gpt").first_node + 3])
    assert seen == [0, 1, 2, 3]


def test_a_cheat_that_knows_its_lie_is_led_to_the_term() -> None:
    truth = traced("gpt")
    end = {name: tensor.numpy() for name, tensor in truth.state_before(2).items()}
    value = next(value for op, value in kinds("gpt") if op == "mm.default")
    chain = truth.facts.chain(value, 5)
    assert chain is not None
    term = chain.terms // 2 + 3  # among the sums
    cheat = MisaddingTracer(truth, value=value, element=5, term=term, by=2**28, end=end)
    game = finished(cheat, truth, block=1)
    assert game.result is not None
    assert (game.result.loser, game.result.cause, game.result.level) == ("solver", "leaf", "block")
    assert game.descent()[-2].where == f"terms {term} to {term + 1} of {chain.terms}"
