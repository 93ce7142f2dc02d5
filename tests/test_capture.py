"""Ordinary PyTorch in, a Program out: same numbers as eager torch, or a refusal that names operation and line."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from torch import Tensor, nn

from protocol.errors import LocalProtocolError, MalformedRecord, UnsupportedModel
from protocol.operations import OPERATIONS, TensorType, result_type
from protocol.program import Program
from worker import executor
from worker.capture import Captured, Training, capture, capture_built
from worker.char_gpt import CharGPT
from worker.char_gpt import loss as text_loss
from worker.executor import DTYPES, Executor, native_kernels

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> ModuleType:
    """The module examples/<name>/model.py."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / name / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_gpt(dropout: float = 0.0) -> Training:
    torch.manual_seed(0)
    model = CharGPT(symbols=16, context=8, width=16, heads=2, layers=2, dropout=dropout)
    x = torch.randint(0, 16, (3, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    return Training(model, text_loss, optimizer, {"x": x, "y": x.roll(-1, 1)})


@cache
def dropped_gpt() -> Captured:
    return capture_built(lambda: tiny_gpt(dropout=0.1))


def spirals() -> Training:
    torch.manual_seed(0)
    built = example("mlp").build()
    batch = {"x": torch.randn(32, 2), "y": torch.randint(0, 2, (32,))}
    return Training(built.model, built.loss, built.optimizer, batch)


def shapes() -> Training:
    torch.manual_seed(0)
    built = example("cnn").build()
    batch = {"x": torch.randn(32, 1, 16, 16), "y": torch.randint(0, 4, (32,))}
    return Training(built.model, built.loss, built.optimizer, batch)


def run(captured: Captured, batch: dict[str, Tensor], rate: float, steps: int) -> tuple[dict[str, Tensor], list[float]]:
    runner = Executor(captured.program, "native")
    state, losses = captured.initial_state, []
    for step in range(steps):
        state, loss = runner.step(state, batch, rate, 7, step)
        losses.append(loss)
    return state, losses


def eager(job: Training, rate: float, steps: int) -> tuple[dict[str, Tensor], list[float]]:
    losses = []
    for group in job.optimizer.param_groups:
        group["lr"] = rate
    for _ in range(steps):
        x, y = job.example.values()
        loss = job.loss(job.model(x), y)
        job.optimizer.zero_grad()
        loss.backward()
        job.optimizer.step()
        losses.append(float(loss.detach()))
    return {**dict(job.model.named_parameters()), **dict(job.model.named_buffers())}, losses


@pytest.mark.parametrize("build", [spirals, shapes, tiny_gpt])
def test_a_captured_step_computes_what_eager_torch_does(build: Callable[[], Training]) -> None:
    job = build()
    captured = capture(job.model, job.loss, job.optimizer, job.example)
    assert Program.from_bytes(captured.program.to_bytes()) == captured.program
    state, losses = run(captured, dict(job.example), 1e-2, 4)
    expected, expected_losses = eager(job, 1e-2, 4)
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor.detach(), rtol=1e-5, atol=1e-5, msg=name)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.01),
    "maximize": lambda p: torch.optim.Adam(p, lr=0.1, maximize=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "groups": lambda p: torch.optim.AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 0.05, "weight_decay": 0.0}],
                                          lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_each_optimizer_is_torchs(kind: str) -> None:
    torch.manual_seed(1)
    model = nn.Linear(3, 2)
    reference = nn.Linear(3, 2)
    reference.load_state_dict(model.state_dict())
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    theirs = OPTIMIZERS[kind](list(reference.parameters()))
    batch = {"x": torch.randn(5, 3), "y": torch.randint(0, 2, (5,))}
    captured = capture(model, F.cross_entropy, optimizer, batch)
    state, _ = run(captured, batch, 0.1, 12)
    for _ in range(12):
        theirs.zero_grad()
        F.cross_entropy(reference(batch["x"]), batch["y"]).backward()
        theirs.step()
    for name, tensor in reference.named_parameters():
        torch.testing.assert_close(state[name], tensor.detach(), rtol=2e-5, atol=2e-5)


class Applied(nn.Module):
    """A weight of the input's shape, then any function: its gradient reaches the weight."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, torch.Size(shape).numel()).reshape(shape))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * self.weight)


def _in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:3] = y[:, 1:3] * 2
    y[0] = 0.0
    return y.mul_(3).add_(1)


CONV = torch.linspace(-1, 1, 4 * 2 * 3 * 3).reshape(4, 2, 3, 3)
IMAGE = (2, 4, 9, 7)
FUNCTIONS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "softmax": ((3, 5), lambda x: torch.softmax(x, -1) ** 2),
    "log_softmax": ((3, 5), lambda x: F.log_softmax(x, 0)[1]),
    "layer_norm": ((3, 5), lambda x: F.layer_norm(x, (5,)) ** 3),
    "group_norm": (IMAGE, lambda x: F.group_norm(x, 2) ** 3),
    "gelu": ((3, 5), F.gelu),
    "gelu_tanh": ((3, 5), lambda x: F.gelu(x, approximate="tanh")),
    "silu": ((3, 5), F.silu),
    "activations": ((3, 5), lambda x: F.leaky_relu(x) + torch.sigmoid(x) * torch.tanh(x) + F.relu(x)),
    "arithmetic": ((3, 5), lambda x: (1 - x) / (2 + x * x) + x.abs().sqrt().add(1).rsqrt() - 3 * x.exp()),
    "sine": ((3, 5), lambda x: torch.sin(x) + torch.cos(2 * x)),
    "clamp": ((3, 5), lambda x: x.clamp(-0.5, 0.7) + torch.maximum(x, x * 0.5)),
    "mean_and_variance": ((3, 5), lambda x: x.mean(0) + x.var(0) + x.std() + x.mean()),
    "powers": ((3, 5), lambda x: x**2 + x**3 + (x * x + 1) ** 0.5 + (x * x + 1) ** -1),
    "slices": ((6, 5), lambda x: x[::2, 1:4] + x[1::2, 2:] * x[-1, 0]),
    "in_place": ((3, 5), _in_place),
    "joined": ((3, 4), lambda x: torch.cat([x, x[:1]]).unflatten(1, (2, 2)).transpose(0, 2) * 2),
    "stacked": ((3, 4), lambda x: torch.stack([x, -x], 1).sum(1) + torch.cat(x.chunk(2, 1), 0).repeat(1, 2)[:3]),
    "masked": ((4, 4), lambda x: x.masked_fill(torch.ones(4, 4).triu(1).bool(), 0.0) + torch.tril(x, -1)),
    "gathered": ((3, 5), lambda x: torch.log_softmax(x, 1).gather(1, torch.tensor([[1], [4], [0]]))),
    "matrices": ((3, 4), lambda x: (x @ x.T) @ x + torch.einsum("ab,cb->ac", x, x)[:, :1]),
    "attention": ((2, 6, 4), lambda x: F.scaled_dot_product_attention(x, x * 0.5, x, is_causal=True)),
    "literal": ((3, 4), lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0])),
    "losses": ((3, 4), lambda x: F.mse_loss(x, x.detach() * 0.5, reduction="none") + F.softplus(x)),
    "convolution": (IMAGE, lambda x: F.conv2d(x, CONV.repeat(1, 2, 1, 1), padding=1)),
    "strided_convolution": (IMAGE, lambda x: F.conv2d(x, CONV.repeat(1, 2, 1, 1), stride=(2, 3), padding=(2, 1))),
    "dilated_groups": (IMAGE, lambda x: F.conv2d(x, CONV, dilation=2, groups=2, padding=1)),
    "convolution_1d": ((2, 4, 9), lambda x: F.conv1d(x, CONV[:, :, 0].repeat(1, 2, 1), stride=2)),
    "max_pool": (IMAGE, lambda x: F.max_pool2d(x.relu(), 3, stride=2, padding=1)),
    "average_pool": (IMAGE, lambda x: F.avg_pool2d(x, 2, 1) + F.avg_pool2d(x, 3, 1, padding=1)[:, :, 1:, 1:]),
    "adaptive_pool": ((2, 4, 8, 6), lambda x: F.adaptive_avg_pool2d(x, (4, 3))),
    "batch_norm": (IMAGE, lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True) ** 3),
    "batch_norm_fixed": (IMAGE, lambda x: F.batch_norm(x, torch.ones(4), torch.ones(4) * 2, training=False)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_lowering_has_torchs_value_and_gradient(name: str) -> None:
    shape, function = FUNCTIONS[name]
    model = Applied(shape, function)
    torch.manual_seed(2)
    x = torch.randn(shape)

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum() + y.sum()

    batch = {"x": x, "y": torch.zeros(1)}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    captured = capture(model, loss, optimizer, batch)
    state, (value,) = run(captured, batch, 1.0, 1)
    expected = loss(model(x), batch["y"])
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-5)
    grad = model.weight.grad
    assert grad is not None
    torch.testing.assert_close(captured.initial_state["weight"] - state["weight"], grad, rtol=1e-4, atol=2e-5)


def _here() -> int:
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return frame.f_back.f_lineno


LINES: dict[str, int] = {}


def _cumprod(x: Tensor) -> Tensor:
    LINES["cumprod"] = _here() + 1
    return x.cumprod(0)


def _median(x: Tensor) -> Tensor:
    LINES["median"] = _here() + 1
    return x.median(0).values


def _branch(x: Tensor) -> Tensor:
    LINES["branch"] = _here() + 1
    return x if x.sum() > 0 else -x


def _double(x: Tensor) -> Tensor:
    LINES["double"] = _here() + 1
    return x.to(torch.float64).sum().to(torch.float32)


def _transposed(x: Tensor) -> Tensor:
    LINES["transposed"] = _here() + 1
    return F.conv_transpose2d(x.reshape(1, 1, 3, 5), torch.ones(1, 1, 2, 2))


def _large(x: Tensor) -> Tensor:
    return x.sum() * TABLE.sum()


TABLE = torch.ones(20_000)


@pytest.mark.parametrize("function", [_cumprod, _median, _branch, _double, _transposed])
def test_a_refusal_names_the_operation_the_line_and_what_to_write(function: Callable[[Tensor], Tensor]) -> None:
    name = function.__name__[1:]
    model = Applied((3, 5), function)
    batch = {"x": torch.ones(3, 5), "y": torch.zeros(1)}
    with pytest.raises(UnsupportedModel) as refused:
        capture(model, lambda output, y: output.sum(), torch.optim.SGD(model.parameters(), lr=1.0), batch)
    said = str(refused.value)
    assert f"test_capture.py:{LINES[name]}" in said
    assert refused.value.next_step
    if name in ("cumprod", "median"):
        assert f"operation {name}." in said


def test_a_refusal_in_the_backward_pass_names_the_forward_line() -> None:
    def part_of_each(x: Tensor) -> Tensor:
        LINES["gather"] = _here() + 1
        return x.gather(1, torch.tensor([[0, 3]] * 2))

    model = Applied((3, 5), part_of_each)
    batch = {"x": torch.ones(3, 5), "y": torch.zeros(1)}
    with pytest.raises(UnsupportedModel) as refused:
        capture(model, lambda output, y: output.sum(), torch.optim.SGD(model.parameters(), lr=1.0), batch)
    assert "scatter_add" in str(refused.value)
    assert f"test_capture.py:{LINES['gather']}" in str(refused.value)


def test_what_no_program_can_hold_is_refused_before_it_is_offered() -> None:
    batch = {"x": torch.ones(3, 5), "y": torch.zeros(1)}
    model = Applied((3, 5), _large)
    with pytest.raises(UnsupportedModel, match="register_buffer"):
        capture(model, lambda output, y: output, torch.optim.SGD(model.parameters(), lr=1.0), batch)
    model = Applied((3, 5), lambda x: x)
    with pytest.raises(UnsupportedModel, match="Adagrad"):
        capture(model, lambda output, y: output.sum(), torch.optim.Adagrad(model.parameters()), batch)
    with pytest.raises(UnsupportedModel, match="amsgrad"):
        capture(model, lambda output, y: output.sum(), torch.optim.Adam(model.parameters(), amsgrad=True), batch)
    with pytest.raises(UnsupportedModel, match="float64"):
        capture(model.double(), lambda output, y: output.sum(), torch.optim.SGD(model.parameters()), batch)
    model = Applied((3, 5), lambda x: x)
    with pytest.raises(UnsupportedModel, match="not one number"):
        capture(model, lambda output, y: output, torch.optim.SGD(model.parameters(), lr=1.0), batch)


def test_nodes_name_the_users_file_without_its_directory() -> None:
    program = dropped_gpt().program
    sources = {node.source for node in program.nodes}
    assert "optimizer" in sources
    assert any(source.startswith("char_gpt.py:") for source in sources)
    assert not any("/" in source or "\\" in source for source in sources)


def test_dropout_is_drawn_from_seed_and_step_and_rescaled() -> None:
    model = Applied((100, 100), lambda x: F.dropout(x, 0.25))
    with torch.no_grad():
        model.weight.fill_(1.0)
    batch = {"x": torch.ones(100, 100), "y": torch.zeros(1)}

    def weighted(output: Tensor, y: Tensor) -> Tensor:  # weights, so that two masks of equal count differ
        return output.mean() + (output * torch.linspace(-1, 1, 10_000).reshape(100, 100)).mean() * 1e-3

    captured = capture(model, weighted, torch.optim.SGD(model.parameters(), lr=1.0), batch)
    runner = Executor(captured.program, "native")

    def loss(seed: int, step: int) -> float:
        return runner.step(captured.initial_state, batch, 0.0, seed, step)[1]

    assert loss(1, 0) == loss(1, 0)
    assert len({loss(1, 0), loss(2, 0), loss(1, 1)}) == 3
    assert loss(1, 0) == pytest.approx(1.0, abs=0.03)


def test_two_dropouts_draw_from_two_streams() -> None:
    program = dropped_gpt().program
    numbers = [node.args[1] for node in program.nodes if node.op == "ichiba.uniform"]
    assert numbers == [0, 1, 2, 3]


def test_init_rules_are_recorded_and_the_rest_must_be_given() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.table = nn.Embedding(3, 4)
            self.scaled = nn.Parameter(torch.randn(4) * 0.02)
            self.ones = nn.Parameter(torch.ones(4))
            self.cut = nn.Parameter(nn.init.trunc_normal_(torch.empty(1000)))
            self.part = nn.Parameter(torch.zeros(4))
            with torch.no_grad():
                self.part[0] = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scaled * self.ones * self.cut[:4] * self.part + self.table(torch.arange(3))

    def build() -> Training:
        model = Mixed()
        return Training(model, lambda output, y: output.sum(), torch.optim.Adam(model.parameters()),
                        {"x": torch.ones(3, 4), "y": torch.zeros(1)})

    rules = {item.name: item.init for item in capture_built(build).program.inputs}
    assert [(name, rule.kind) for name, rule in rules.items() if rule is not None and "." not in name] == [
        ("scaled", "normal"), ("ones", "constant"), ("cut", "given"), ("part", "given"),
    ]
    scaled, bound, power = rules["scaled"], rules["linear.weight"], rules["optimizer.beta1_power.0"]
    assert scaled is not None and scaled.b == pytest.approx(0.02)
    assert bound is not None and (bound.kind, bound.b) == ("uniform", pytest.approx(0.5))
    assert rules["table.weight"] is not None and rules["table.weight"].kind == "normal"
    assert power is not None and (power.kind, power.a) == ("constant", 1.0)


def test_tied_weights_are_one_input_and_unused_ones_keep_their_value() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.table.weight
            self.idle = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

    torch.manual_seed(3)
    model = Tied()
    x = torch.tensor([0, 1, 4])
    job = Training(model, F.cross_entropy, torch.optim.AdamW(model.parameters(), lr=0.1), {"x": x, "y": x})
    captured = capture(model, job.loss, job.optimizer, job.example)
    assert [item.name for item in captured.program.inputs_of("parameter")] == ["idle", "table.weight"]
    state, _ = run(captured, dict(job.example), 0.1, 3)
    eager(job, 0.1, 3)
    torch.testing.assert_close(state["table.weight"], model.table.weight.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(state["idle"], torch.ones(2))


def test_a_loss_may_take_the_model_itself() -> None:
    torch.manual_seed(4)
    net = nn.Linear(3, 1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]) - batch["target"]).square().mean() + model(batch["x"] * 0).sum() ** 2

    batch = {"x": torch.randn(4, 3), "target": torch.randn(4, 1)}
    captured = capture(net, loss, torch.optim.SGD(net.parameters(), lr=0.1), batch)
    _, (value,) = run(captured, batch, 0.1, 1)
    assert value == pytest.approx(float(loss(net, batch).detach()), rel=1e-5)


def test_a_token_out_of_range_is_a_typed_error_and_never_a_read_beyond_the_table() -> None:
    job, captured = tiny_gpt(), dropped_gpt()
    for name in ("x", "y"):
        for token in (16, -1, 2**62):
            batch = {key: tensor.clone() for key, tensor in job.example.items()}
            batch[name][0, 0] = token
            with pytest.raises(MalformedRecord, match="node"):
                Executor(captured.program, "native").step(captured.initial_state, batch, 0.1, 0, 0)


def test_a_kernel_that_breaks_its_declared_shape_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    job = spirals()
    captured = capture(job.model, job.loss, job.optimizer, job.example)
    broken = {**native_kernels(torch.device("cpu")), "mm.default": lambda a, b: (a @ b)[:1]}
    monkeypatch.setattr(executor, "native_kernels", lambda device: broken)
    with pytest.raises(LocalProtocolError, match=r"mm\.default"):
        Executor(captured.program, "native").step(captured.initial_state, job.example, 0.1, 0, 0)


def test_the_executor_refuses_tensors_that_are_not_the_programs() -> None:
    job = spirals()
    captured = capture(job.model, job.loss, job.optimizer, job.example)
    runner = Executor(captured.program, "native")
    x, y = job.example["x"], job.example["y"]
    for batch in ({"x": x}, {"x": x[:5], "y": y}, {"x": x.double(), "y": y}, {"x": x, "y": y.to(torch.int32)}):
        with pytest.raises(MalformedRecord):
            runner.step(captured.initial_state, batch, 0.1, 0, 0)
    with pytest.raises(MalformedRecord):
        runner.step({}, job.example, 0.1, 0, 0)


def test_a_part_of_the_model_in_evaluation_stays_so() -> None:
    torch.manual_seed(5)
    frozen = nn.BatchNorm1d(3).eval()
    model = nn.Sequential(nn.Linear(3, 3), frozen, nn.Linear(3, 2))
    for weight in frozen.parameters():
        weight.requires_grad_(False)
    job = Training(model, F.cross_entropy, torch.optim.Adam(model.parameters(), lr=0.1),
                   {"x": torch.randn(6, 3), "y": torch.randint(0, 2, (6,))})
    captured = capture(model, job.loss, job.optimizer, job.example)
    state, losses = run(captured, dict(job.example), 0.1, 3)
    expected, expected_losses = eager(job, 0.1, 3)
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    for name in ("1.weight", "1.running_mean", "1.num_batches_tracked"):
        assert torch.equal(state[name], captured.initial_state[name])
        assert torch.equal(state[name], expected[name].detach())


M, V, B = torch.randn(2, 3), torch.arange(3), torch.tensor([[True], [False]])
CALLS: dict[str, list[Any]] = {
    "reshape.default": [M.T, [1, 6]], "permute.default": [M, [1, 0]], "expand.default": [M, [4, 2, 3]],
    "slice.Tensor": [M, 1, 0, 3, 2], "cat.default": [[M, M], 1], "constant_pad_nd.default": [M, [1, 0, 0, 2], -1.5],
    "embedding.default": [M, torch.tensor([[0, 1, 1]])], "gather.default": [M, 1, torch.tensor([[2], [0]])],
    "where.self": [B, M, torch.zeros(())], "to.dtype": [B, torch.float32], "full.default": [[2], 3, torch.int64],
    "arange.start_step": [1, 8, 3], "embedding_dense_backward.default": [M, torch.tensor([4, 1]), 5, -1, False],
    "mm.default": [M, M.T], "bmm.default": [M[None], M.T[None]], "sum.dim_IntList": [M, [1], True],
    "amax.default": [M, [0], False], "ichiba.uniform": [torch.tensor([1, 2]), 0, [2, 3]],
    "logical_not.default": [B], "logical_and.default": [B, B.T], "logical_or.default": [B, B],
    "maximum.default": [M, M[0]], "minimum.default": [V, V],
    **{f"{name}.Tensor": [M, 0.5] for name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge")},
    **{f"{name}.default": [M] for name in ("neg", "abs", "sign", "sqrt", "reciprocal", "exp", "log", "erf", "tanh",
                                           "sin", "cos")},
}


def _typed(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return TensorType(str(arg.dtype).removeprefix("torch."), tuple(arg.shape))
    if isinstance(arg, list):
        return tuple(_typed(item) for item in arg)
    return str(arg).removeprefix("torch.") if isinstance(arg, torch.dtype) else arg


def test_every_operation_has_a_kernel_that_gives_the_type_the_protocol_infers() -> None:
    kernels = native_kernels(torch.device("cpu"))
    assert set(CALLS) == set(OPERATIONS) == set(kernels)
    for name, args in CALLS.items():
        inferred = result_type(name, [_typed(arg) for arg in args])
        result = kernels[name](*args)
        assert (result.dtype, tuple(result.shape)) == (DTYPES[inferred.dtype], inferred.shape), name


def test_the_exact_kernels_are_those_of_the_allow_list() -> None:
    from worker import exact

    for width in (8, 15, 22):
        kernels = exact.kernels(width=width, backend="float64")
        assert set(kernels) == set(OPERATIONS)
        for name, args in CALLS.items():
            inferred = result_type(name, [_typed(arg) for arg in args])
            result = kernels[name](*args)
            assert (result.dtype, tuple(result.shape)) == (DTYPES[inferred.dtype], inferred.shape), name


def test_a_view_of_what_a_convolution_gave_is_captured_whatever_our_memory_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3))
    example = {"x": torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8), "y": torch.tensor([0, 2])}
    captured = capture(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), example)
    _, loss = Executor(captured.program, "native").step(captured.initial_state, example, 0.1, 0, 0)
    assert loss == pytest.approx(float(F.cross_entropy(model(example["x"]), example["y"]).detach()), rel=1e-5)
