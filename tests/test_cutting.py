"""The pieces of a step compute what the whole does, bit for bit, and a step that does not split is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from protocol.program import Program, operations_per_step, state_layout
from protocol.stage import KEPT_PREFIX, OUTER_PREFIX, RECEIVED, RESIDUAL_PREFIX, SEEN_PREFIX, SENT, TAPE
from tests.models import captured, state_of
from tests.parallel_scene import part_of, rows_of, run_units, step_whole, units_step
from worker import char_gpt, exact
from worker.capture import Training, capture_built
from worker.cut_places import Places, choose_cuts
from worker.cut_plan import ahead_of
from worker.cutting import StagePart, cut
from worker.step_parts import NotParallel, StepParts
from worker.unrolling import unrolled

RATE, SEED = 0.0625, 5


def gpt(*, dropout: float = 0.1, tied: bool = False, layers: int = 2, **options: Any) -> Training:
    """A character GPT of a few thousand weights."""
    model = char_gpt.CharGPT(symbols=24, context=8, width=16, heads=2, layers=layers, dropout=dropout)
    if tied:
        model.head.weight = model.embed.weight
    x = torch.zeros(2, 8, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    return Training(model, char_gpt.loss, optimizer, {"x": x, "y": x.clone()}, **options)


def conv() -> Training:
    """A small convolutional net without batch norm, by SGD with momentum and weight decay."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.GELU(),
        nn.Flatten(), nn.Linear(6 * 4, 5),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    example = {"x": torch.zeros(2, 1, 8, 8), "y": torch.zeros(2, dtype=torch.int64)}
    return Training(model, nn.CrossEntropyLoss(), optimizer, example)


def mlp(**options: Any) -> Training:
    """Three layers, by Adam."""
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    example = {"x": torch.zeros(3, 6), "y": torch.zeros(3, dtype=torch.int64)}
    return Training(
        model, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=1e-2), example, **options
    )


BUILDS: dict[str, Callable[[], Training]] = {
    "gpt": gpt,
    "gpt without dropout": lambda: gpt(dropout=0.0),
    "tied": lambda: gpt(tied=True, layers=1),
    "deep gpt": lambda: gpt(layers=4),
    "conv": conv,
    "mlp": mlp,
    "clipped mlp": lambda: mlp(clip_norm=0.05),
    "cut mlp": lambda: mlp(clip_value=0.002),
}
SPLIT = ("gpt without dropout", "tied", "conv", "mlp", "cut mlp")


@cache
def program_of(name: str) -> Program:
    torch.manual_seed(0)
    return capture_built(BUILDS[name]).program


def batch(name: str, seed: int) -> dict[str, Tensor]:
    """A micro-batch of what the program takes, at random."""
    found = {}
    for number, item in enumerate(program_of(name).inputs_of("batch")):
        drawn = exact.uniform(seed, number, 0, item.shape)
        classes = 24 if "gpt" in name or name == "tied" else 3
        found[item.name] = drawn * 2 - 1 if item.dtype == "float32" else (drawn * classes).long()
    return found


def check_same(
    parts: list[StagePart], program: Program, whole: Program, batches: list[dict[str, Tensor]], *, steps: int = 2
) -> None:
    """The units end each step with the bits of the whole, each replica of it reading its own rows."""
    state, units = state_of(program), run_units(parts)
    states = [part_of(part, state) for part in parts]
    everything = rows_of(batches)
    seen: set[str] = set()
    for step in range(steps):
        before = state
        state, loss = step_whole(whole, state, everything, RATE, SEED, step)
        assert any(not torch.equal(before[name], tensor) for name, tensor in state.items()), "the step does something"
        states, losses = units_step(units, states, batches, RATE, SEED, step)
        last = [found for part, found in zip(parts, losses, strict=True) if part.stage == parts[-1].stage]
        assert sum(last) / len(last) == pytest.approx(loss, rel=1e-6)
        assert len(last) > 1 or last == [loss]
        assert all(not found for part, found in zip(parts, losses, strict=True) if part.stage != parts[-1].stage)
        for found in states:
            for name in set(found) & set(state):
                assert torch.equal(found[name], state[name]), (name, step)
                seen.add(name)
    assert seen == set(state)


# --- micro-batches -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["conv", "mlp"])
def test_one_micro_batch_is_the_captured_step_itself(name: str) -> None:
    assert unrolled(program_of(name), 1) is program_of(name)


@pytest.mark.parametrize("name", ["gpt without dropout", "conv", "mlp"])
def test_equal_micro_batches_train_as_one_does(name: str) -> None:
    program = program_of(name)
    state, one = state_of(program), batch(name, 1)
    single, loss = step_whole(program, state, one, RATE, SEED, 0)
    four, mean = step_whole(unrolled(program, 4), state, rows_of([one] * 4), RATE, SEED, 0)
    assert mean == loss
    for key, tensor in single.items():
        assert torch.equal(tensor, four[key]), "four times a number, over four, is that number"


@pytest.mark.parametrize(("name", "build"), [("clipped mlp", "clip_norm"), ("cut mlp", "clip_value")])
def test_the_mean_of_the_gradients_is_clipped_and_not_each_of_them(name: str, build: str) -> None:
    value = 0.05 if build == "clip_norm" else 0.002
    accumulated = capture_built(lambda: _wide(mlp(accumulate=2, **{build: value}))).program
    program = program_of(name)
    batches = [batch(name, 1), batch(name, 2)]
    state = state_of(program)
    ours, loss = step_whole(unrolled(program, 2), state, rows_of(batches), RATE, SEED, 0)
    theirs, known = step_whole(accumulated, state, rows_of(batches), RATE, SEED, 0)
    assert loss == pytest.approx(known, rel=1e-6)
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=1e-7)


def _wide(training: Training) -> Training:
    example = {key: torch.cat([tensor, tensor]) for key, tensor in training.example.items()}
    return Training(
        training.model, training.loss, training.optimizer, example, training.accumulate, training.clip_norm,
        training.clip_value,
    )  # fmt: skip


def test_each_micro_batch_draws_random_numbers_of_its_own() -> None:
    program = program_of("gpt")
    parts = StepParts(program)
    whole = unrolled(program, 3)
    numbers = [node.args[1] for node in whole.nodes if node.op == "ichiba.uniform"]
    assert parts.random_nodes == 4
    assert sorted(numbers) == list(range(12))  # type: ignore[type-var]


def test_gradients_are_found_behind_clipping_and_before_the_optimizer() -> None:
    for name in ("gpt", "tied", "conv", "mlp", "clipped mlp", "cut mlp"):
        program = program_of(name)
        shapes = sorted(program.types[number].shape for number in StepParts(program).gradients)
        weights = sorted(item.shape for item in program.inputs_of("parameter"))
        if name == "tied":
            weights = sorted([*weights, (24, 16)])  # one of the embedding, one of the head
        assert shapes == weights, name


# --- stages ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "stages", "micro_batches"),
    [*(("gpt", *counts) for counts in ((1, 2), (2, 1), (3, 3), (4, 4))), *((name, 3, 2) for name in SPLIT)],
)
def test_the_stages_compute_the_bits_of_the_whole(name: str, stages: int, micro_batches: int) -> None:
    program = program_of(name)
    parts = cut(program, stages=stages, micro_batches=micro_batches)
    assert [part.stage for part in parts] == list(range(stages))
    batches = [rows_of([batch(name, 1 + index) for index in range(micro_batches)])]
    check_same(parts, program, unrolled(program, micro_batches), batches)


@settings(max_examples=10)
@given(data=st.data())
def test_any_places_to_cut_at_give_the_same_bits(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["gpt", "tied", "conv", "mlp"]))
    program, micro_batches = program_of(name), data.draw(st.integers(1, 3))
    places = Places(StepParts(program), micro_batches)
    positions = st.sets(st.integers(1, len(places.order) - 1), min_size=1, max_size=3)
    at = sorted(data.draw(positions))
    in_flight = data.draw(st.none() | st.integers(1, 5))
    parts = cut(
        program, stages=len(at) + 1, micro_batches=micro_batches, in_flight=in_flight, at=at,
        keep=[] if data.draw(st.booleans()) else range(len(at) + 1),
    )  # fmt: skip
    batches = [rows_of([batch(name, 1 + index) for index in range(micro_batches)])]
    check_same(parts, program, unrolled(program, micro_batches), batches, steps=1)


@pytest.mark.parametrize(("stages", "replicas", "micro_batches"), [(1, 2, 1), (2, 2, 2), (2, 3, 1)])
@pytest.mark.parametrize("name", ["gpt without dropout", "conv"])
def test_replicas_in_step_compute_the_bits_of_the_whole(
    name: str, stages: int, replicas: int, micro_batches: int
) -> None:
    program = program_of(name)
    parts = cut(program, stages=stages, micro_batches=micro_batches, replicas=replicas, sync="step")
    assert [(part.stage, part.replica) for part in parts] == [(s, r) for s in range(stages) for r in range(replicas)]
    batches = [
        rows_of([batch(name, 1 + replica * micro_batches + index) for index in range(micro_batches)])
        for replica in range(replicas)
    ]
    check_same(parts, program, unrolled(program, micro_batches, replicas=replicas), batches)


def test_replicas_that_train_alone_share_nothing_in_a_step() -> None:
    program = program_of("mlp")
    parts = cut(program, stages=1, micro_batches=2, replicas=2, sync="local")
    assert [(part.sends, part.receives) for part in parts] == [((), ()), ((), ())]
    layout = state_layout(parts[1].program)
    for item in program.inputs_of("parameter"):
        assert layout[OUTER_PREFIX + item.name] == layout[RESIDUAL_PREFIX + item.name] == ("float32", item.shape)
    assert layout[SENT] == layout[RECEIVED] == ("uint8", (1, 32))
    assert layout[TAPE] == ("uint8", (32,))


def test_a_crossing_keeps_what_each_example_was_at_both_ends() -> None:
    parts = cut(program_of("gpt"), stages=3, micro_batches=2, kept_rows=50)
    for before, after in itertools.pairwise(parts):
        sent = {c.index: before.program.types[c.value].shape for c in before.sends if c.flow == "forward"}
        out, into = state_layout(before.program), state_layout(after.program)
        for index, shape in sent.items():
            kept = ("float32", (50, *(shape[1:] if shape[0] == 2 else (shape[0] // 2, *shape[1:]))))
            assert out[f"{KEPT_PREFIX}send.forward.{index}"] == into[f"{KEPT_PREFIX}recv.forward.{index}"] == kept
            assert out[f"{SEEN_PREFIX}send.forward.{index}"] == ("uint8", (50,))
    assert not any(name.startswith(KEPT_PREFIX + "recv") for name in state_layout(parts[0].program))


# --- where it is cut ---------------------------------------------------------------------------------------
def test_one_tensor_crosses_each_way_between_two_blocks() -> None:
    program = program_of("deep gpt")
    places = Places(StepParts(program), 4)
    (place,) = choose_cuts(places, 2)
    ahead, back = places.traffic
    stream = 2 * 8 * 16 * 4  # rows, time and width of one float32
    assert (ahead[place], back[place]) == (stream, stream)
    work = places.operations
    assert 0.4 < work[:place].sum() / work.sum() < 0.6
    parts = cut(program, stages=2, micro_batches=4)
    assert [len(part.sends) for part in parts] == [len(part.receives) for part in parts] == [4, 4]


def test_the_cut_of_least_traffic_is_found_among_the_balanced_ones() -> None:
    places = Places(StepParts(program_of("gpt")), 2)
    work, (ahead, back) = places.operations, places.traffic
    count, total = len(work), places.operations.cumsum()

    def slowest(i: int, j: int) -> float:
        return float(max(total[i - 1], total[j - 1] - total[i - 1], total[-1] - total[j - 1]))

    pairs = [(i, j) for i in range(1, count - 1) for j in range(i + 1, count)]
    limit = 1.1 * min(slowest(*pair) for pair in pairs)
    least = min(ahead[i] + back[i] + ahead[j] + back[j] for i, j in pairs if slowest(i, j) <= limit * (1 + 1e-9))
    i, j = choose_cuts(places, 3, slack=0.1)
    assert slowest(i, j) <= limit * (1 + 1e-9)
    assert ahead[i] + back[i] + ahead[j] + back[j] == least


def test_a_faster_device_gets_more_of_the_work() -> None:
    places = Places(StepParts(program_of("deep gpt")), 4)
    shares = []
    for speeds in ((1.0, 3.0), (1.0, 1.0), (3.0, 1.0)):
        (place,) = choose_cuts(places, 2, speeds=speeds)
        shares.append(places.operations[:place].sum() / places.operations.sum())
    assert shares[0] < 0.35 < 0.4 < shares[1] < 0.6 < 0.65 < shares[2]


def test_no_work_is_done_twice_but_for_what_is_free() -> None:
    program = program_of("gpt")
    whole = operations_per_step(unrolled(program, 4))
    pieces = sum(operations_per_step(part.program) for part in cut(program, stages=3, micro_batches=4))
    assert whole < pieces < 1.15 * whole


@pytest.mark.parametrize(("stages", "in_flight", "ahead"), [(3, None, [5, 3, 1]), (3, 1, [3, 2, 1]), (3, 7, [7, 4, 1])])
def test_micro_batches_in_flight_grow_towards_the_first_stage(
    stages: int, in_flight: int | None, ahead: list[int]
) -> None:
    found = [ahead_of(s, stages=stages, micro_batches=16, in_flight=in_flight) for s in range(stages)]
    assert found == ahead
    assert ahead_of(0, stages=stages, micro_batches=2, in_flight=in_flight) == 2


# --- what a kept stage reads -------------------------------------------------------------------------------
def test_no_stage_between_kept_ones_reads_the_batch() -> None:
    program = program_of("gpt")
    parts = cut(program, stages=3, micro_batches=2, keep=(0, 2))
    read = [
        [item.name for item in part.program.inputs_of("batch") if not item.name.startswith("ichiba.")] for part in parts
    ]
    assert read == [["x"], [], ["y"]]
    check_same(parts, program, unrolled(program, 2), [rows_of([batch("gpt", 1), batch("gpt", 2)])])


def test_rows_that_a_middle_stage_needs_are_refused_it() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(9)])

        def forward(self, x: Tensor) -> Tensor:
            h = x
            for layer in self.layers:
                h = torch.tanh(layer(h)) * x
            return h

    def build() -> Training:
        model = Mixed()
        example = {"x": torch.zeros(4, 6), "y": torch.zeros(4, 6)}
        return Training(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), example)

    program = capture_built(build).program
    with pytest.raises(NotParallel, match="do not keep would read the batch"):
        cut(program, stages=6, micro_batches=1, keep=(0, 5))
    assert len(cut(program, stages=6, micro_batches=1)) == 6


class _Chain(nn.Module):
    """Layers of one width behind a wide one, whose place is all the work, so that a balanced cut is next to it."""

    def __init__(self, *, heavy_first: bool, tied: bool = False) -> None:
        super().__init__()
        widths = [(64, 8), (8, 8), (8, 8)] if heavy_first else [(8, 8), (8, 8), (8, 64)]
        self.layers = nn.ModuleList([nn.Linear(a, b, bias=False) for a, b in widths])
        if tied:
            self.layers[2].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(1)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return h


def _chain(*, heavy_first: bool, tied: bool = False) -> Program:
    def build() -> Training:
        model = _Chain(heavy_first=heavy_first, tied=tied)
        wide = model.layers[2].weight.shape[0]
        example = {"x": torch.zeros(4, 8 if heavy_first else 2, 8 if heavy_first else 4)}
        example["y"] = torch.zeros(4, wide)
        return Training(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), example)

    return capture_built(build).program


@pytest.mark.parametrize("heavy_first", [True, False])
def test_a_kept_end_of_the_model_has_weights_that_hide_what_it_reads(heavy_first: bool) -> None:
    program = _chain(heavy_first=heavy_first)
    parts = cut(program, stages=3, micro_batches=2, keep=(0, 2))
    for stage in (0, 2):
        assert parts[stage].program.inputs_of("parameter")
    bare = [
        at
        for at in range(1, len(Places(StepParts(program), 2, private=True).order) - 1)
        if not _cuts_at(program, at, keep=(0,))
    ]
    assert bare, "before the first weights rows would cross as they are"


def _cuts_at(program: Program, at: int, *, keep: tuple[int, ...]) -> bool:
    try:
        cut(program, stages=2, micro_batches=2, keep=keep, at=[at])
    except NotParallel as error:
        assert "as they are" in str(error) or "as a kept stage does" in str(error), error
        return False
    return True


def test_a_weight_that_a_kept_stage_shares_is_refused() -> None:
    program = _chain(heavy_first=False, tied=True)
    with pytest.raises(NotParallel, match="would leave stage"):
        cut(program, stages=3, micro_batches=2, keep=(0, 2), at=_between(program))


def _between(program: Program) -> list[int]:
    """Cuts before the second and before the third product of the forward pass."""
    places = Places(StepParts(program), 2, private=True)
    products = [place for place, number in enumerate(places.order) if places.parts.node(number).op == "mm.default"]
    return products[1:3]


# --- what does not split -----------------------------------------------------------------------------------
def _unlike_rows() -> Training:
    def loss(found: Tensor, wanted: Tensor) -> Tensor:
        return ((found.mean(0) - wanted.mean(0)) ** 2).sum()

    model = nn.Linear(3, 3)
    example = {"x": torch.zeros(4, 3), "y": torch.zeros(2, 3)}
    return Training(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), example)


def test_what_does_not_split_is_refused_with_what_to_do() -> None:
    with pytest.raises(NotParallel, match=r"changes the buffer 1.running_mean.*layer or group norm"):
        unrolled(captured("cnn").program, 2)
    with pytest.raises(NotParallel, match="common first dimension"):
        unrolled(capture_built(_unlike_rows).program, 2)
    with pytest.raises(NotParallel, match="clip_value in place of clip_norm"):
        cut(program_of("clipped mlp"), stages=2, micro_batches=2)
    with pytest.raises(NotParallel, match="lower stages"):
        cut(program_of("mlp"), stages=200, micro_batches=1)
    with pytest.raises(NotParallel, match="lower micro_batches"):
        unrolled(program_of("gpt"), 256)


def test_a_clipped_norm_is_no_hindrance_to_replicas_of_one_stage() -> None:
    program = program_of("clipped mlp")
    parts = cut(program, stages=1, micro_batches=2, replicas=2, sync="step")
    batches = [rows_of([batch("mlp", 4 * r + m) for m in range(2)]) for r in range(2)]
    check_same(parts, program, unrolled(program, 2, replicas=2), batches)
