"""Stacked proofs: a first state that is the end of another job is told from every state that is nearly that."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import ichiba
from protocol.bundle import BundleReport
from protocol.errors import RemoteProtocolError
from protocol.merkle import tensor_root
from protocol.program import Input, Program, program_id
from protocol.stack import verify_stack
from worker import checkpoint
from worker.capture import capture_built
from worker.capture_forward import capture_forward
from worker.job_file import BadJobFile, SettledJob, read_job_file
from worker.prepare import Prepared, prepare
from worker.stacking import stacked
from worker.training import drawn


def report(**changes: object) -> BundleReport:
    zero = bytes(32)
    whole = BundleReport(
        job=zero, network="net", name="job", task=zero, program=zero, seeded=True, seed=1, segments=1, segments_done=1,
        complete=True, base_root=zero, final_root=zero, operations=1, operations_checked=1, segments_checked=(0,),
        deals=(),
    )  # fmt: skip
    return replace(whole, **changes)  # type: ignore[arg-type]


def roots(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor_root(tensor.numpy()) for name, tensor in state.items()}


def pair() -> tuple[BundleReport, bytes, BundleReport, dict[str, torch.Tensor]]:
    """A training job's end, and an evaluation that starts from its weights."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    batch = {"x": torch.zeros(4, 3), "y": torch.zeros(4, dtype=torch.int64)}
    trained = ichiba.capture(model, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()), batch).initial_state
    later = capture_forward(ichiba.Evaluation(model, nn.CrossEntropyLoss(), batch))
    program = later.program.to_bytes()
    earlier = report(final_root=checkpoint.state_root(trained), state=roots(trained))
    started = report(
        program=program_id(program), base_root=checkpoint.state_root(later.initial_state), job=b"\1" * 32, seeded=False
    )
    return started, program, earlier, trained


def test_weights_taken_over_are_found_and_counted() -> None:
    started, program, earlier, _ = pair()
    assert verify_stack(started, program, earlier) == 2


def test_a_job_that_goes_on_with_the_whole_state_is_found() -> None:
    started, program, earlier, trained = pair()
    assert verify_stack(replace(started, base_root=earlier.final_root), program, earlier) == len(trained)


def test_one_bit_of_one_weight_breaks_the_chain() -> None:
    started, program, earlier, trained = pair()
    bits = trained["weight"].clone().view(torch.int32)
    bits[1, 2] ^= 1
    other = {**trained, "weight": bits.view(torch.float32)}
    with pytest.raises(RemoteProtocolError, match="started from state"):
        verify_stack(started, program, replace(earlier, state=roots(other)))


def test_results_that_were_not_empty_at_the_start_break_the_chain() -> None:
    started, program, earlier, trained = pair()
    graph = Program.from_bytes(program)
    state = {item.name: torch.zeros(item.shape) for item in graph.inputs if item.init is not None}
    state |= {"weight": trained["weight"], "bias": trained["bias"], "result.loss": torch.ones(())}
    with pytest.raises(RemoteProtocolError, match="started from state"):
        verify_stack(replace(started, base_root=checkpoint.state_root(state)), program, earlier)


def test_what_cannot_prove_anything_is_refused_by_name() -> None:
    started, program, earlier, _ = pair()
    with pytest.raises(RemoteProtocolError, match="not the one"):
        verify_stack(replace(started, program=bytes(32)), program, earlier)
    with pytest.raises(RemoteProtocolError, match="not proved to its end"):
        verify_stack(started, program, replace(earlier, complete=False))
    without = {name: root for name, root in earlier.state.items() if name != "bias"}
    with pytest.raises(RemoteProtocolError, match="without 'bias'"):
        verify_stack(started, program, replace(earlier, state=without))


# --- adapters beside a base --------------------------------------------------------------------------------
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SEED = 23


class Adapted(nn.Linear):
    """A frozen linear layer, under the names it was trained with, and a low-rank change of it."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(1, 3) * 0.1)
        self.up = nn.Parameter(torch.zeros(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


def adapted(model: nn.Module | None = None) -> ichiba.Training:
    batch = {"x": torch.zeros(4, 3), "y": torch.zeros(4, dtype=torch.int64)}
    model = Adapted() if model is None else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return ichiba.Training(model, nn.CrossEntropyLoss(), torch.optim.Adam(trained), batch)


def draw(item: Input, seed: int, number: int) -> NDArray[Any]:
    found: NDArray[Any] = drawn(item, seed, number).numpy()
    return found


def test_adapters_start_from_the_seed_and_the_base_from_the_job_below(tmp_path: Path) -> None:
    _, _, earlier, trained = pair()
    below = tmp_path / "checkpoint.safetensors"
    below.write_bytes(checkpoint.dump({**trained, "weight": trained["weight"] + 1}))
    base = checkpoint.load(below.read_bytes())
    program = capture_built(adapted).program
    stack = stacked(below, program, SEED)
    assert (stack.taken, stack.fresh) == (("bias", "weight"), ("down", "up"))
    assert torch.equal(stack.state["weight"], base["weight"])
    assert not stack.state["up"].any()
    assert 0 < float(stack.state["down"].abs().max()) < 1
    moments = [tensor for name, tensor in stack.state.items() if name.startswith("optimizer.mean")]
    assert moments
    assert not any(bool(tensor.any()) for tensor in moments)
    encoded = program.to_bytes()
    started = report(program=program_id(encoded), base_root=checkpoint.state_root(stack.state), seed=SEED, seeded=False)
    earlier = replace(earlier, final_root=checkpoint.state_root(base), state=roots(base))
    assert verify_stack(started, encoded, earlier, draw) == 2
    for wrong in (replace(started, seed=SEED + 1), replace(started, base_root=earlier.base_root)):
        with pytest.raises(RemoteProtocolError, match="started from state"):
            verify_stack(wrong, encoded, earlier, draw)
    with pytest.raises(RemoteProtocolError, match="'down' is neither"):
        verify_stack(started, encoded, earlier)


def test_what_cannot_be_stacked_is_refused_with_what_to_do(tmp_path: Path) -> None:
    below = tmp_path / "checkpoint.safetensors"
    program = capture_built(adapted).program
    cases: list[tuple[dict[str, Tensor], str, str]] = [
        ({"other": torch.zeros(2)}, "no tensor that bears the name", "build the model as that job did"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "in the job below it is float32", "a new name"),
    ]
    for state, what, next_step in cases:
        below.write_bytes(checkpoint.dump(state))
        with pytest.raises(BadJobFile, match=what) as told:
            stacked(below, program, SEED)
        assert next_step in told.value.next_step
    below.write_bytes(b"")
    with pytest.raises(BadJobFile, match="does not read"):
        stacked(below, program, SEED)
    unruly = Adapted()
    with torch.no_grad():
        unruly.down[0, 0] = 1  # written in part: no rule
    below.write_bytes(checkpoint.dump({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}))
    with pytest.raises(BadJobFile, match="down is not in the job below, and has no init rule"):
        stacked(below, capture_built(partial(adapted, unruly)).program, SEED)


def test_a_job_file_names_what_the_job_stands_on(tmp_path: Path) -> None:
    text = (EXAMPLES / "mlp" / "job.toml").read_text()
    (tmp_path / "model.py").write_text((EXAMPLES / "mlp" / "model.py").read_text())
    old = 'initial = "seed"  '
    assert old in text

    def written(initial: str) -> Path:
        (tmp_path / "job.toml").write_text(text.replace(old, f'initial = "{initial}"'))
        return tmp_path

    assert read_job_file(written("job:3F2a")).initial == SettledJob("3f2a", None)
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "proof.json").write_text("{}")
    assert read_job_file(written("trained")).initial == SettledJob("", tmp_path / "trained")
    for wrong in ("job:", "job:xyz", "nowhere"):
        with pytest.raises(BadJobFile, match="initial is"):
            read_job_file(written(wrong))
    seeded = prepare(EXAMPLES / "mlp", bytes(32))
    base = stated(seeded)
    below = tmp_path / "trained" / "checkpoint.safetensors"
    below.write_bytes(checkpoint.dump(base))
    asked: list[SettledJob] = []

    def settled(ref: SettledJob) -> Path:
        asked.append(ref)
        return below

    tuned = prepare(written("job:3f2a"), bytes(32), settled=settled)
    assert asked == [SettledJob("3f2a", None)]
    assert tuned.stack is not None
    assert tuned.stack.fresh == ()
    assert tuned.base is not None
    state = checkpoint.load(tuned.base)
    assert all(torch.equal(state[name], base[name]) for name in tuned.stack.taken)
    assert tuned.base_root == checkpoint.state_root(state)


def stated(prepared: Prepared) -> dict[str, Tensor]:
    """A state of the prepared job's layout, of ones: not one that its seed gives."""
    program = Program.from_bytes(prepared.program)
    return {item.name: torch.ones(item.shape) for item in program.inputs if item.init is not None}
