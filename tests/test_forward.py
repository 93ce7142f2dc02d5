"""Evaluation, inference and generation: run by segments in exact mode, and compared with plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

import ichiba
from peer.cli_result import metrics_of, text_of
from protocol import merkle
from protocol.codec import encode
from protocol.errors import MalformedRecord, UnsupportedModel
from protocol.program import NODE_STREAM, Program, operations_per_step, program_id
from protocol.task import PRESENT, ArrayRef, BatchRule, Initial, Schedule, TaskSpec
from tests.models import EXAMPLES
from worker import checkpoint, exact
from worker.capture_forward import capture_forward
from worker.executor import Diverged, Executor
from worker.job_file import BadJobFile, read_job_file
from worker.prepare import Prepared, prepare
from worker.training import Batches, initial_state, run_segments

NETWORK = bytes(32)


def run(prepared: Prepared) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The first and the last state of a prepared job, every segment started from the bytes of the one before."""
    names = {array.name: bytes(32) for array in prepared.arrays}
    base_id = bytes(32) if prepared.base else b""
    task = prepared.make_task(program=program_id(prepared.program), arrays=names, base=base_id)
    arrays = {array.name: array.data for array in prepared.arrays}
    program, base = Program.from_bytes(prepared.program), prepared.base
    first = initial_state(task, program, base)
    roots = []
    for segment in range(task.segments):
        (result,) = run_segments(
            task=task, program=program, arrays=arrays, base=base, segments=range(segment, segment + 1)
        )
        base = result.checkpoint
        roots.append(result.out_root)
    assert len(set(roots)) == len(roots)
    return first, checkpoint.load(base or b"")


def weights_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("result.")}


def test_an_evaluation_is_the_mean_over_every_row_read_once() -> None:
    prepared = prepare(EXAMPLES / "evaluate", NETWORK)
    first, last = run(prepared)
    layers = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    layers.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in weights_of(first).items()})
    arrays = {array.name: np.frombuffer(array.data, array.dtype).reshape(array.shape) for array in prepared.arrays}
    with torch.no_grad():
        scores = layers(torch.from_numpy(arrays["x"].copy()))
    target = torch.from_numpy(arrays["y"].astype(np.int64))
    results = {name.removeprefix("result."): t.numpy() for name, t in last.items() if name.startswith("result.")}
    found = metrics_of(results)
    assert list(found) == ["loss", "accuracy"]
    assert found["loss"] == pytest.approx(float(F.cross_entropy(scores, target)), rel=1e-3)
    assert found["accuracy"] == pytest.approx(float((scores.argmax(1) == target).float().mean()), abs=2e-3)
    for name, tensor in weights_of(first).items():
        assert torch.equal(last[name], tensor), "an evaluation changed a weight"


def test_an_inference_gives_each_rows_output_in_order_in_evaluation_mode() -> None:
    prepared = prepare(EXAMPLES / "infer", NETWORK)
    first, last = run(prepared)
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    model = nn.Sequential(*layers).eval()
    model.load_state_dict(weights_of(first))
    x = torch.from_numpy(np.frombuffer(prepared.arrays[0].data, np.float32).reshape(300, 1, 8, 8).copy())
    with torch.no_grad():
        torch.testing.assert_close(last["result.output"], model(x), rtol=1e-3, atol=2e-3)


def test_weights_handed_on_are_hashed_and_looked_through_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[int, ...]] = []

    def counted(array: NDArray[Any]) -> bytes:
        hashed.append(array.shape)
        return tensor_root(array)

    tensor_root = merkle.tensor_root
    monkeypatch.setattr(merkle, "tensor_root", counted)
    captured = capture_forward(ichiba.Inference(nn.Linear(5, 2), {"x": torch.zeros(3, 5)}, 9))
    executor, state, roots = Executor(captured.program), captured.initial_state, checkpoint.Roots()
    batch = {"x": torch.ones(3, 5), PRESENT: torch.ones(3, dtype=torch.bool)}
    found = [roots.of(state)]
    for step in range(3):
        after, _ = executor.step(state, batch, 0.0, 1, step)
        assert after["weight"] is state["weight"]
        state = after
        found.append(roots.of(state))
    assert hashed.count((2, 5)) == 1
    assert hashed.count((9, 2)) == 4
    assert found[-1] == checkpoint.state_root(state)
    other = {**state, "weight": state["weight"].clone()}
    assert roots.of(other) == found[-1], "another tensor of the same bits has the same root"
    for _ in range(2):  # what is no number is found in weights too, however often it is handed on
        with pytest.raises(Diverged):
            executor.step({**state, "weight": torch.full((2, 5), torch.nan)}, batch, 0.0, 1, 4)


# --- rows that fill the last batch up ----------------------------------------------------------------------
def stepped(built: Any, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The state after these batches, exactly."""
    captured = capture_forward(built)
    executor, state = Executor(captured.program), captured.initial_state
    for step, batch in enumerate(batches):
        state, _ = executor.step(state, batch, 0.0, 5, step)
    return state


def metrics(state: dict[str, Tensor]) -> dict[str, float]:
    return metrics_of({n.removeprefix("result."): t.numpy() for n, t in state.items() if n.startswith("result.")})


def test_rows_that_fill_the_last_batch_up_count_nowhere() -> None:
    x = torch.arange(7 * 4.0).reshape(7, 2, 2)
    real = [torch.ones(3, dtype=torch.bool)] * 2 + [torch.tensor([True, False, False])]
    cut = [x[:3], x[3:6], torch.stack([x[6], x[0], x[0]])]
    batches = [{"x": part, "y": part + 1, PRESENT: here} for part, here in zip(cut, real, strict=True)]
    pair = {"x": torch.zeros(3, 2, 2), "y": torch.zeros(3, 2, 2)}
    by_row = {"off": lambda output, y: y - output, "mean": lambda output, y: output}
    found = metrics(stepped(ichiba.Evaluation(nn.Identity(), nn.MSELoss(reduction="none"), pair, by_row), batches))
    assert found == {"loss": 1.0, "mean": float(x.mean()), "off": 1.0}
    with torch.no_grad():
        doubled = nn.Linear(2, 2, bias=False)
        doubled.weight.copy_(torch.eye(2) * 2)
    inputs = [{"x": batch["x"], PRESENT: batch[PRESENT]} for batch in batches]
    state = stepped(ichiba.Inference(doubled, {"x": torch.zeros(3, 2, 2)}, 7), inputs)
    assert torch.equal(state["result.output"], x * 2)


def test_sums_over_many_batches_keep_what_float32_would_lose() -> None:
    here = torch.tensor([True])
    built = ichiba.Evaluation(nn.Identity(), lambda output: output, {"x": torch.zeros(1)})
    values = [2.0**25, *[1.0] * 40]
    assert float(torch.tensor(2.0**25) + 1) == 2.0**25
    state = stepped(built, [{"x": torch.tensor([value]), PRESENT: here} for value in values])
    assert metrics(state)["loss"] == (2.0**25 + 40) / 41


def test_a_model_that_writes_to_its_buffers_leaves_them_as_they_were() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    model = Counted()
    batch = {"x": torch.ones(2, 3), PRESENT: torch.ones(2, dtype=torch.bool)}
    state = stepped(ichiba.Inference(model, {"x": torch.zeros(2, 3)}, 4), [batch, batch])
    assert float(state["calls"]) == 0 == float(model.calls)
    assert torch.equal(state["result.output"], torch.ones(4, 3))


def test_a_text_is_read_in_windows_once_and_a_last_batch_needs_a_program_that_knows() -> None:
    text = np.arange(100, dtype=np.uint8)
    window = torch.zeros(4, 9, dtype=torch.int64)

    def batches(reduction: str, steps: int = 3) -> Batches:
        loss = nn.CrossEntropyLoss(reduction=reduction)
        scored = ichiba.Evaluation(Spread(), lambda o, y: loss(o.transpose(1, 2), y), {"x": window, "y": window})
        program = capture_forward(scored).program
        array = ArrayRef("text", "uint8", (100,), bytes(32), 100)
        task = a_task(program, array, BatchRule("sequence", 4, 9), steps)
        TaskSpec.from_bytes(encode(task), network=NETWORK)
        return Batches(task, program, {"text": text.tobytes()})

    found = [batches("none").of(step) for step in range(3)]
    read = [symbol for batch in found for row in batch["x"][batch[PRESENT]].tolist() for symbol in row]
    assert read == list(range(99)), "11 windows of 9; nothing follows the last symbol"
    assert [int(batch[PRESENT].sum()) for batch in found] == [4, 4, 3]
    assert torch.equal(found[1]["y"], found[1]["x"] + 1)
    assert torch.equal(found[2]["x"][3], found[0]["x"][0]), "row 0 stands where none is left"
    with pytest.raises(MalformedRecord, match="3 of 4 rows, and the program cannot leave the rest out"):
        batches("mean")
    for steps in (2, 4):
        with pytest.raises(MalformedRecord, match="do not read 11 rows once each"):
            batches("none", steps)


class Spread(nn.Module):
    """Scores of 128 symbols, all alike."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x)


def a_task(program: Program, array: ArrayRef, batch: BatchRule, steps: int) -> TaskSpec:
    encoded = program.to_bytes()
    return TaskSpec(
        network=NETWORK, program=program_id(encoded), program_bytes=len(encoded), arrays=(array,), batch=batch,
        initial=Initial("seed", bytes(32), bytes(32)), seed=1, steps=steps, steps_per_segment=steps, mode="exact",
        width=15, schedule=Schedule("constant", 0, 0, 0), operations_per_step=operations_per_step(program), name="t",
    )  # fmt: skip


class Counting(nn.Module):
    """Scores whose best symbol is the last one plus one: what greedy decoding writes is known."""

    def __init__(self, symbols: int = 7) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(symbols).roll(1, 1) * 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.table)


def generated(**options: Any) -> list[dict[str, Tensor]]:
    """The state before and after each step of a generation."""
    prompt = torch.tensor([[1, 2], [6, 5]])
    captured = capture_forward(ichiba.Generation(Counting(), prompt, 6, **options))
    states = [captured.initial_state]
    executor = Executor(captured.program, "exact")
    for step in range(6):
        states.append(executor.step(states[-1], {"prompt": prompt}, 0.0, 3, step)[0])
    return states


def test_greedy_decoding_takes_the_best_symbol_each_time() -> None:
    tokens = generated(temperature=0.0)[-1]["result.tokens"].tolist()
    assert tokens == [[1, 2, 3, 4, 5, 6, 0, 1], [6, 5, 6, 0, 1, 2, 3, 4]]


def test_sampling_is_seeded_stays_within_the_best_and_keeps_what_it_wrote() -> None:
    states = generated(temperature=1.5, top_k=2)
    again = generated(temperature=1.5, top_k=2)[-1]["result.tokens"]
    last = states[-1]["result.tokens"]
    assert torch.equal(last, again)
    for number, state in enumerate(states):
        assert number == 0 or torch.equal(state["result.tokens"][:, : 2 + number], last[:, : 2 + number])
        assert int(state["result.position"]) == 2 + number


def test_only_the_best_are_drawn_when_top_k_says_so() -> None:
    class Ranked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.arange(5.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scores.expand(x.shape[0], x.shape[1], 5)

    prompt = torch.zeros((200, 1), dtype=torch.int64)
    captured = capture_forward(ichiba.Generation(Ranked(), prompt, 1, temperature=9.0, top_k=2))
    state, _ = Executor(captured.program, "exact").step(captured.initial_state, {"prompt": prompt}, 0.0, 1, 0)
    assert set(state["result.tokens"][:, 1].tolist()) == {3, 4}


def test_the_symbols_drawn_have_the_chances_of_the_softmax() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.log(torch.tensor([0.1, 0.2, 0.7])))

        def forward(self, x: Tensor) -> Tensor:
            return self.scores.expand(x.shape[0], x.shape[1], 3)

    prompt = torch.zeros((2000, 1), dtype=torch.int64)
    captured = capture_forward(ichiba.Generation(Fixed(), prompt, 1))
    state, loss = Executor(captured.program, "exact").step(captured.initial_state, {"prompt": prompt}, 0.0, 11, 0)
    shares = torch.bincount(state["result.tokens"][:, 1], minlength=3) / 2000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.7]), atol=0.03, rtol=0)
    assert loss == pytest.approx(0.8018, abs=0.06)  # the entropy in nats


def test_the_largest_number_the_generator_gives_does_not_choose_a_symbol_by_itself() -> None:
    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(F.one_hot(torch.tensor(0), 64) * 60.0)  # no finite noise makes up for 60

        def forward(self, x: Tensor) -> Tensor:
            return self.scores.expand(x.shape[0], x.shape[1], 64)

    seed, place = 332, 2244  # where it first gives 1 - 2**-24 within 64 x 64 draws
    assert float(exact.uniform(seed, 0, NODE_STREAM, (64 * 64,))[place]) == 1 - 2**-24
    prompt = torch.zeros((64, 1), dtype=torch.int64)
    for top_k in (None, 8):
        captured = capture_forward(ichiba.Generation(Sure(), prompt, 1, top_k=top_k))
        state, _ = Executor(captured.program, "exact").step(captured.initial_state, {"prompt": prompt}, 0.0, seed, 0)
        assert not state["result.tokens"].any()


class Placed(nn.Module):
    """Scores that depend on the last tokens and on where they stand, with a limited number of places."""

    def __init__(self, positions: int = 8, symbols: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.table = nn.Parameter(torch.randn(symbols, symbols, generator=generator) * 3)
        self.places = nn.Parameter(torch.randn(positions, symbols, generator=generator) * 3)

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x, (1, 0))[:, :-1]
        scores = F.embedding(x, self.table) + 0.5 * F.embedding(before, self.table)
        return scores + F.embedding(torch.arange(x.shape[1]), self.places)


def run_of(built: ichiba.Generation, seed: int) -> Tensor:
    captured = capture_forward(built)
    executor, state = Executor(captured.program), captured.initial_state
    for step in range(built.tokens):
        state, _ = executor.step(state, {"prompt": built.prompt}, 0.0, seed, step)
    return state["result.tokens"]


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, None), (0.7, None), (0.7, 5), (1.3, 50)])
def test_a_text_longer_than_the_models_context_is_that_of_plain_pytorch(temperature: float, top_k: int | None) -> None:
    model, prompt = Placed(), torch.tensor([[3, 1, 4], [1, 5, 9]])
    built = ichiba.Generation(model, prompt, 20, temperature=temperature, top_k=top_k, context=8)
    tokens = prompt
    for step in range(20):
        with torch.no_grad():
            scores = model(tokens[:, -8:])[:, -1]
        best, names = torch.topk(scores, min(top_k or 16, 16)) if top_k == 5 else (scores, None)
        uniform = exact.uniform(23, step, NODE_STREAM, tuple(best.shape)).double().clamp_min(2.0**-25)
        wanted = best / temperature - torch.log(-torch.log(uniform)) if temperature else best.double()
        chosen = wanted.argmax(1, keepdim=True)
        tokens = torch.cat([tokens, chosen if names is None else names.gather(1, chosen)], 1)
    assert torch.equal(run_of(built, 23), tokens)


def test_more_tokens_than_the_model_has_places_for_are_refused_with_what_to_give() -> None:
    with pytest.raises(UnsupportedModel, match="does not take 22 tokens") as told:
        capture_forward(ichiba.Generation(Placed(), torch.tensor([[3, 1, 4]]), 20))
    assert "context=" in told.value.next_step


def test_the_generation_example_is_a_job_that_starts_from_its_prompt() -> None:
    prepared = prepare(EXAMPLES / "generate", NETWORK)
    assert [(array.name, array.shape) for array in prepared.arrays] == [("prompt", (2, 14))]
    assert (prepared.job.steps, prepared.job.batch.rule, prepared.job.batch.size) == (60, "whole", 2)
    assert prepared.parameters == 1_075_200


REFUSED: dict[str, tuple[str, tuple[str, str], str]] = {
    "rows at random": ("evaluate", ('"sequence"', '"rows"'), "each row once"),
    "a learning rate": ("infer", ("[batch]", "[learning_rate]\npeak = 0.1\n[batch]"), "trains nothing"),
    "a batch to generate": ("generate", ("price = 2000", 'price = 2000\n[batch]\nrule = "rows"\nsize = 1'), "prompt"),
    "a kind from nowhere": ("infer", ('"infer"', '"inferr"'), "did you mean 'infer'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_job_file_that_does_not_fit_its_kind_is_refused(name: str, tmp_path: Path) -> None:
    folder, (old, new), said = REFUSED[name]
    text = (EXAMPLES / folder / "job.toml").read_text()
    assert old in text
    (tmp_path / "job.toml").write_text(text.replace(old, new))
    (tmp_path / "model.py").write_text((EXAMPLES / folder / "model.py").read_text())
    with pytest.raises(BadJobFile, match=said):
        read_job_file(tmp_path)


MISMATCHED: dict[str, tuple[str, tuple[str, str], str]] = {
    "another kind than build() returns": ("evaluate", ('"evaluate"', '"infer"'), 'kind = "evaluate"'),
    "too few steps": ("infer", ("steps = 15", "steps = 14"), "steps = 15"),
    "rows left over": ("evaluate", ("steps = 32", "steps = 31"), "rounded up: 32"),
    "tokens without steps": ("generate", ("steps = 60 ", "steps = 61 "), "steps = 60"),
}


@pytest.mark.parametrize("name", MISMATCHED)
def test_what_build_returns_and_the_job_file_must_agree(name: str, tmp_path: Path) -> None:
    folder, (old, new), said = MISMATCHED[name]
    text = (EXAMPLES / folder / "job.toml").read_text()
    assert old in text
    (tmp_path / "job.toml").write_text(text.replace(old, new))
    (tmp_path / "model.py").write_text((EXAMPLES / folder / "model.py").read_text())
    with pytest.raises(BadJobFile) as refused:
        prepare(tmp_path, NETWORK)
    assert said in f"{refused.value} {refused.value.next_step}"


def test_an_inference_of_other_rows_than_the_data_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text((EXAMPLES / "infer" / "job.toml").read_text())
    model = (EXAMPLES / "infer" / "model.py").read_text()
    assert "8, 8)}, ROWS)" in model
    (tmp_path / "model.py").write_text(model.replace("8, 8)}, ROWS)", "8, 8)}, ROWS - 1)"))
    with pytest.raises(BadJobFile, match="the output has 299 rows, the data 300") as refused:
        prepare(tmp_path, NETWORK)
    assert "rows=300" in refused.value.next_step


ONE = torch.zeros((1, 1), dtype=torch.int64)
PAIR = {"x": torch.zeros(3, 2), "y": torch.zeros(3, 2)}
BAD: dict[str, Callable[[], Any]] = {
    "prompt is": lambda: ichiba.Generation(Counting(), torch.zeros(3), 2),
    "tokens=0": lambda: ichiba.Generation(Counting(), ONE, 0),
    "top_k is 0": lambda: ichiba.Generation(Counting(), ONE, 1, top_k=0),
    "top_k is 129": lambda: ichiba.Generation(Counting(), ONE, 1, top_k=129),
    "context is 0": lambda: ichiba.Generation(Counting(), ONE, 1, context=0),
    "rows is 0": lambda: ichiba.Inference(nn.Linear(2, 2), {"x": torch.zeros(1, 2)}, 0),
    "not one number": lambda: ichiba.Evaluation(nn.Linear(2, 2), F.mse_loss, PAIR, {"all": lambda o, y: o.T}),
}


@pytest.mark.parametrize("said", BAD)
def test_what_means_nothing_is_refused(said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        capture_forward(BAD[said]())


def test_results_are_shown_harmlessly() -> None:
    assert text_of(np.array([[72, 105, 27, 10, 33]])) == ["Hi\N{REPLACEMENT CHARACTER}\n!"]
    assert text_of(np.array([[72, 300]])) == []
    assert metrics_of({"output": np.zeros(3)}) == {}
