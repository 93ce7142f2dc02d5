"""Stacked proofs: a first state that is the end of another job is told from every state that is nearly that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import ichiba
from protocol.bundle import BundleReport
from protocol.errors import RemoteProtocolError
from protocol.merkle import tensor_root
from protocol.program import Program, program_id
from protocol.stack import verify_stack
from worker import checkpoint
from worker.capture_forward import capture_forward


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
