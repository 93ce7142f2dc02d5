"""What people write in a model beyond matrix products: same value and gradient as eager torch, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from torch import Tensor

from protocol.errors import UnsupportedModel
from tests.test_capture import Applied, run
from worker.capture import Captured, capture

T = torch.tensor
LINE, IMAGE, SERIES = (3, 5), (2, 4, 6, 6), (2, 4, 8)
Function = Callable[[Tensor], Tensor]


def _ramp(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)


def _masked_write(x: Tensor) -> Tensor:
    y = x.clone()
    y[y > 0.5] = 0.0
    return y * 2


def _binary(x: Tensor) -> Tensor:
    return F.binary_cross_entropy(torch.sigmoid(x), (x.detach() > 0.2).float(), reduction="none")


SELECTIONS: dict[str, tuple[tuple[int, ...], Function]] = {
    "one_hot": (LINE, lambda x: x * F.one_hot(T([1, 4, 0]), 5)),
    "topk": (LINE, lambda x: x.topk(2).values + x.topk(2, largest=False).values * 3),
    "topk_dim": (LINE, lambda x: x.topk(2, dim=0).values),
    "topk_many": ((3, 20), lambda x: x.topk(12).values),
    "sort": (LINE, lambda x: x.sort(dim=0).values + 2 * x.sort(-1, descending=True)[0]),
    "argsort": (LINE, lambda x: x * x.argsort(-1)),
    "argmax": (LINE, lambda x: x * (x.argmax(0) + x.argmin(1, keepdim=True) + x.argmax())),
    "max_of_a_dimension": (LINE, lambda x: x.max(1).values + x.min(1).values * 2 + x.max()),
    "any_and_all": (LINE, lambda x: x * ((x > 0).any(1, keepdim=True).float() + (x > 0).all(0) + (x > 0).any())),
    "cumsum": (LINE, lambda x: x.cumsum(0) + x.cumsum(1) * x),
    "scatter": (LINE, lambda x: torch.zeros(3, 5).scatter(1, T([[0, 3], [1, 2], [4, 0]]), x[:, :2]) * x),
    "scatter_value": (LINE, lambda x: x.scatter(1, T([[0, 3], [1, 1], [4, 0]]), 2.0)),
    "scatter_add": (LINE, lambda x: torch.zeros(3, 5).scatter_add(1, T([[0, 0], [1, 2], [4, 0]]), x[:, :2]) * x),
    "gather": (LINE, lambda x: x.gather(1, T([[0, 3], [1, 1], [4, 0]]))),
    "index_rows": (LINE, lambda x: x[T([2, 0, -1, 2])]),
    "index_pairs": (LINE, lambda x: x[torch.arange(3), T([1, 0, 4])]),
    "index_last": ((2, 3, 5), lambda x: x[..., T([1, 0, 4, 4])]),
    "index_middle": ((2, 3, 5), lambda x: x[:, T([[1, 0], [2, 2]])]),
    "masked_write": (LINE, _masked_write),
    "index_select": (LINE, lambda x: x.index_select(1, T([0, 0, 3]))),
    "index_add": (LINE, lambda x: torch.zeros(3, 5).index_add(0, T([0, 0, 2]), x)),
    "roll": (LINE, lambda x: x.roll(1, 0) + x.roll((1, 2), (0, 1)) + x.roll(3)),
    "flip": (LINE, lambda x: x.flip(0) + x.flip((0, 1))),
    "diagonal": ((3, 3), lambda x: torch.diagonal(x) * torch.diag(x) + x @ torch.eye(3)),
    "repeat_interleave": ((2, 3, 4), lambda x: x.repeat_interleave(2, dim=1)),
    "padded_embedding": ((5, 4), lambda x: F.embedding(T([[0, 1], [2, 0]]), x, padding_idx=0)),
}
ARITHMETIC: dict[str, tuple[tuple[int, ...], Function]] = {
    "einsum": ((2, 3, 4), lambda x: torch.einsum("bij,bkj->bik", x, x) + torch.einsum("bij->b", x)[:, None, None]),
    "logsumexp": (LINE, lambda x: x.logsumexp(1)),
    "normalize": (LINE, lambda x: F.normalize(x, dim=1) + F.cosine_similarity(x, x.flip(0) * 2, dim=0)),
    "norms": (LINE, lambda x: x.norm(dim=1) + torch.linalg.vector_norm(x) + x.norm(p=1) + x.norm(p=math.inf)),
    "powers": (LINE, lambda x: x.pow(5) + x**6 + x**8 + (x * x + 1) ** -3 + (x * x + 1) ** 2.5),
    "other_powers": (LINE, lambda x: (x * x + 1) ** 0.3 + 2.0**x + 10000**-x),
    "logarithms": (LINE, lambda x: (x.abs() + 1).log2() + (x.abs() + 1).log10() + torch.exp2(x) + torch.tan(x / 4)),
    "rounding": (LINE, lambda x: x * (x * 3).floor() + x * (x * 3).ceil() + (x * 3).trunc()),
    "variance": (LINE, lambda x: x.var(1) + x.std(1, unbiased=False) + x.var()),
    "masks": (LINE, lambda x: torch.nan_to_num(x) * ((x > 0) ^ (x < 0.5)) * x.isfinite()),
    "elu": (LINE, lambda x: F.elu(x) + F.selu(x) + F.celu(x, 2.0)),
    "softplus": (LINE, lambda x: F.softplus(x, beta=2) + F.mish(x) + F.logsigmoid(x) + F.softsign(x)),
    "hard": (LINE, lambda x: F.hardswish(x * 3) + F.hardsigmoid(x) + F.hardtanh(x) + F.relu6(x * 5)),
    "glu": ((3, 4), F.glu),
    "clamp_between": (LINE, lambda x: x.clamp(min=x.detach() * 0.5)),
    "rms_norm": (LINE, lambda x: F.rms_norm(x, (5,)) ** 2),
    "instance_norm": (IMAGE, lambda x: F.instance_norm(x) ** 3),
    "depthwise": (SERIES, lambda x: F.conv1d(x, _ramp(4, 1, 3), groups=4, padding="same")),
    "pools_1d": (SERIES, lambda x: F.avg_pool1d(x, 2) + F.max_pool1d(x, 2) + F.adaptive_avg_pool1d(x, 4)),
    "average_without_padding": (IMAGE, lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    "nearest": (IMAGE, lambda x: F.interpolate(x, scale_factor=2, mode="nearest")),
    "pixel_shuffle": (IMAGE, lambda x: F.pixel_shuffle(x, 2)),
    "reflection": (IMAGE, lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "boolean_attention": ((2, 2, 4, 4), lambda x: F.scaled_dot_product_attention(x, x, x, torch.ones(4, 4).tril() > 0)),
}
LOSSES: dict[str, tuple[tuple[int, ...], Function]] = {
    "binary": (LINE, _binary),
    "logits": (LINE, lambda x: F.binary_cross_entropy_with_logits(x, torch.full((3, 5), 0.3))),
    "weighted_logits": (
        LINE,
        lambda x: F.binary_cross_entropy_with_logits(x, torch.full((3, 5), 0.3), pos_weight=torch.full((5,), 2.0)),
    ),
    "mse": (LINE, lambda x: F.mse_loss(x, x.detach() * 0.5)),
    "l1": (LINE, lambda x: F.l1_loss(x, x.detach() * 0.5)),
    "smooth_l1": (LINE, lambda x: F.smooth_l1_loss(x, torch.full((3, 5), 0.3))),
    "huber": (LINE, lambda x: F.huber_loss(x, torch.full((3, 5), 0.3), delta=0.5)),
    "kl_div": (LINE, lambda x: F.kl_div(F.log_softmax(x, 1), torch.full((3, 5), 0.2), reduction="batchmean")),
    "nll": (LINE, lambda x: F.nll_loss(F.log_softmax(x, 1), T([0, 3, 2]))),
    "ignored": (LINE, lambda x: F.cross_entropy(x, T([0, -100, 2]), label_smoothing=0.1)),
    "class_weights": (LINE, lambda x: F.cross_entropy(x, T([0, 3, -100]), weight=T([1.0, 2, 3, 4, 5]))),
    "soft_targets": (LINE, lambda x: F.cross_entropy(x, torch.full((3, 5), 0.2))),
    "each_pixel": ((2, 4, 3, 3), lambda x: F.cross_entropy(x, torch.ones(2, 3, 3, dtype=torch.int64))),
    "triplet": (LINE, lambda x: F.triplet_margin_loss(x, x.flip(0), x.roll(1, 0))),
}
FUNCTIONS = {**SELECTIONS, **ARITHMETIC, **LOSSES}


def _weighted(output: Tensor, y: Tensor) -> Tensor:
    return (output * _ramp(*output.shape)).sum() + (output.sum() * 0.1 if output.dim() == 0 else 0) + y.sum()


def _capture(model: Applied, batch: dict[str, Tensor]) -> Captured:
    return capture(model, _weighted, torch.optim.SGD(model.parameters(), lr=1.0), batch)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_has_torchs_value_and_gradient(name: str) -> None:
    shape, function = FUNCTIONS[name]
    model = Applied(shape, function)
    torch.manual_seed(2)
    batch = {"x": torch.randn(shape), "y": torch.zeros(1)}
    captured = _capture(model, batch)
    state, (value,) = run(captured, batch, 1.0, 1)
    expected = _weighted(model(batch["x"]), batch["y"])
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-5)
    grad = model.weight.grad
    assert grad is not None
    assert bool(grad.any())
    torch.testing.assert_close(captured.initial_state["weight"] - state["weight"], grad, rtol=1e-4, atol=2e-5)


def test_ties_go_to_the_lowest_index_and_a_masked_place_is_taken_once() -> None:
    rows = T([[1.0, 3.0, 3.0, 0.0], [-9.0, -9.0, 2.0, -9.0], [7.0, 7.0, 7.0, 7.0]])
    ranks = T([1.0, 10.0, 100.0, 1000.0])

    def chosen(x: Tensor) -> Tensor:
        def code(index: Tensor) -> Tensor:  # the indices of a row as decimal digits
            return (index * ranks[: index.shape[1]]).sum(1)

        masked = x.masked_fill(x < -5, -math.inf)
        best = code(masked.topk(3).indices), code(masked.sort(-1, descending=True).indices), masked.argmax(1).float()
        return torch.stack(best) + x.clamp(0, 0)[:, :3]

    model = Applied((3, 4), chosen)
    torch.nn.init.ones_(model.weight)
    batch = {"x": rows, "y": torch.zeros(3, 3)}

    def told(output: Tensor, y: Tensor) -> Tensor:
        return (output * y).sum()

    found = []
    captured = capture(model, told, torch.optim.SGD(model.parameters(), lr=1.0), batch)
    for what in range(3):
        for row in range(3):
            mask = torch.zeros(3, 3)
            mask[what, row] = 1.0
            _, (value,) = run(captured, {"x": rows, "y": mask}, 0.0, 1)
            found.append(int(value))
    assert found == [21, 102, 210, 3021, 3102, 3210, 1, 2, 0]


def _selected(x: Tensor) -> Tensor:
    return x[x > 0]


def _counted(x: Tensor) -> Tensor:
    return x * F.one_hot(T([1, 4, 0]))


def _distance(x: Tensor) -> Tensor:
    return torch.cdist(x, x * 2)


def _whole(x: Tensor) -> Tensor:
    return x.repeat(1, 1000).cumsum(1)


@pytest.mark.parametrize(
    ("function", "operation", "instead"),
    [
        (_selected, "operation index.Tensor", "torch.where"),
        (_counted, "F.one_hot", "num_classes"),
        (_distance, "operation _cdist_forward.default", "expand the square"),
        (_whole, "cumsum", "in blocks"),
    ],
)
def test_a_refusal_names_operation_line_and_alternative(function: Function, operation: str, instead: str) -> None:
    model = Applied(LINE, function)
    with pytest.raises(UnsupportedModel) as refused:
        _capture(model, {"x": torch.randn(LINE), "y": torch.zeros(1)})
    line = function.__code__.co_firstlineno + 1
    assert f"test_lowering.py:{line}" in str(refused.value)
    assert operation in refused.value.what
    assert instead in (refused.value.next_step or "")
