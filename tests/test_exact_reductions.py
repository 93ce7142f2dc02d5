"""Sums are exact sums of rounded integers: order, threads and layout move no bit. Kernels keep torch's meaning."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.errors import IchibaError, MalformedRecord
from protocol.operations import OPERATIONS
from worker import exact
from worker.exact.reductions import embedding_dense_backward, sum_bits, sum_over

KERNELS = exact.kernels()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_sum(values: list[float], bits: int) -> float:
    """The definition, in Python integers; the result is checked to fit a float64 before it is rounded to float32."""
    exponent = math.frexp(max(abs(v) for v in values))[1]
    total = sum(round(Fraction(v) * Fraction(2) ** (bits - exponent)) for v in values)
    exact_value = total * Fraction(2) ** (exponent - bits)
    assert Fraction(float(exact_value)) == exact_value
    return float(torch.tensor(float(exact_value), dtype=torch.float64).float()) + 0.0


@pytest.mark.parametrize(
    "values",
    [
        [1.0, 2.0**-31, 2.0**-31, -(2.0**-30)],
        [1.0, 3 * 2.0**-31, 5 * 2.0**-31],
        [2.0**-149, -(2.0**-148), 2.0**-140],
        [3.0e38, 3.0e38, -3.0e38, -2.9e38, 1.0],
        [-0.0, -0.0],
        [0.0, 0.0, 0.0],
        [1e30, 1.0, -1e30],
        [-1e-45],
        [0.99999994] * 7,
    ],
)
def test_a_sum_is_the_definition_in_integers(values: list[float]) -> None:
    found = sum_over(torch.tensor(values), [0])
    expected = torch.tensor(slow_sum(torch.tensor(values).tolist(), sum_bits(len(values))))
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("dims", [[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]])
@pytest.mark.parametrize("keepdim", [False, True])
def test_sums_have_the_shape_and_nearly_the_value_of_torch(dims: list[int], keepdim: bool) -> None:
    x = random(5, 7, 9)
    found, true = sum_over(x, dims, keepdim), x.double().sum(dims, keepdim)
    assert found.shape == true.shape and found.dtype == torch.float32
    assert float((found - true).abs().max()) < 1e-5


def test_the_order_of_a_sum_moves_no_bit() -> None:
    x = random(3000, 4) * torch.logspace(-6, 6, 3000)[:, None]
    expected = sum_over(x, [0])
    for seed in range(3):
        order = torch.randperm(3000, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(sum_over(x[order], [0]), expected)
    assert torch.equal(sum_over(x.t().contiguous(), [1]), expected)
    assert torch.equal(sum_over(x.t().contiguous().t(), [0]), expected)


def test_bits_fall_only_where_a_sum_would_leave_float64() -> None:
    assert [sum_bits(n) for n in (1, 2, 2**23, 2**23 + 1, 2**24, 2**30)] == [30, 30, 30, 29, 29, 23]
    for count in (1, 3, 2**23, 2**23 + 1, 2**31):
        assert count * 2 ** sum_bits(count) <= 2**53


def test_nan_and_infinity_spoil_only_their_own_sum() -> None:
    x = random(4, 6)
    x[1, 2], x[2, 0] = math.inf, math.nan
    assert sum_over(x, [1]).isnan().tolist() == [False, True, True, False]
    grad = torch.ones(3, 2)
    grad[1, 1] = math.nan
    found = embedding_dense_backward(grad, torch.tensor([0, 1, 0]), 3)
    assert bool(found[1, 1].isnan()) and not found[:, 0].isnan().any()


def test_embedding_gradients_add_rows_exactly_in_any_order() -> None:
    grad, index = random(40, 50, 8), torch.randint(0, 11, (40, 50), generator=torch.Generator().manual_seed(1))
    found = embedding_dense_backward(grad, index, 12)
    true = torch.zeros(12, 8, dtype=torch.float64).index_add_(0, index.flatten(), grad.reshape(-1, 8).double())
    assert float((found - true).abs().max()) < 1e-5
    assert not found[11].any()
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(2))
    assert torch.equal(embedding_dense_backward(grad.reshape(-1, 8)[order], index.flatten()[order], 12), found)
    padded = embedding_dense_backward(grad, index, 12, 3)
    assert not padded[3].any() and torch.equal(padded[4:], found[4:])


@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**63)])
@pytest.mark.parametrize("name", ["embedding", "gather", "gradient"])
def test_an_index_out_of_range_is_a_typed_refusal(name: str, bad: int) -> None:
    index = torch.tensor([0, bad])
    with pytest.raises(MalformedRecord) as refusal:
        if name == "embedding":
            KERNELS["embedding.default"](torch.ones(5, 2), index)
        elif name == "gather":
            KERNELS["gather.default"](torch.ones(5), 0, index)
        else:
            KERNELS["embedding_dense_backward.default"](torch.ones(2, 3), index, 5, -1, False)
    assert isinstance(refusal.value, IchibaError) and refusal.value.next_step


def test_there_is_an_exact_kernel_for_each_operation_and_no_other() -> None:
    assert set(KERNELS) == set(OPERATIONS)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("maximum.default", ([-0.0, 0.0, 2.0], [0.0, -0.0, 1.0]), [0.0, 0.0, 2.0]),
        ("maximum.default", ([-0.0], [-0.0]), [0.0]),
        ("minimum.default", ([-0.0, 0.0, 2.0], [0.0, -0.0, 1.0]), [0.0, 0.0, 1.0]),
        ("sign.default", ([-0.0, 0.0, -3.0, 1e-45, math.inf],), [0.0, 0.0, -1.0, 1.0, 1.0]),
        ("reciprocal.default", ([3.0, -0.0],), [1 / 3, -math.inf]),
        ("div.Tensor", ([1.0, 7.0], 49.0), [1 / 49, 7 / 49]),
        ("mul.Tensor", ([1.0, 3.0], 0.1), [0.1, 3 * float(torch.tensor(0.1))]),
        ("sqrt.default", ([2.0, 0.0],), [math.sqrt(2), 0.0]),
    ],
)
def test_element_wise_kernels_round_once_and_fix_the_sign_of_zero(
    name: str, args: tuple[Any, ...], expected: list[float]
) -> None:
    found = KERNELS[name](*(torch.tensor(arg) if isinstance(arg, list) else arg for arg in args))
    assert torch.equal(found.view(torch.int32), torch.tensor(expected, dtype=torch.float64).float().view(torch.int32))


def test_the_largest_element_has_a_fixed_zero() -> None:
    for row in ([-0.0, 0.0], [0.0, -0.0], [-0.0, -1.0]):
        found = KERNELS["amax.default"](torch.tensor([row * 40]), [1], False)
        assert found.view(torch.int32).tolist() == [0]


def test_conversions_have_one_meaning_for_every_value() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 2.7, -2.7, -0.0])
    top = 9223371487098961920
    assert KERNELS["to.dtype"](x, torch.int64).tolist() == [0, top, -top, top, -top, 2, -2, 0]
    assert KERNELS["to.dtype"](x, torch.bool).tolist() == [True] * 7 + [False]
    # 2**53 + 2**29 + 1 rounds up; by way of float64 it would be a tie and round down.
    wide = [2**53 + 2**29 + 1, -(2**53 + 2**29 + 1), 2**24 + 1, 2**63 - 1] * 8
    rounded = [2**53 + 2**30, -(2**53 + 2**30), 2**24, 2**63] * 8
    assert KERNELS["to.dtype"](torch.tensor(wide), torch.float32).double().tolist() == rounded


def test_a_number_beyond_float32_is_infinite_wherever_it_stands() -> None:
    one = torch.ones(2)
    for number, infinite in ((1e300, math.inf), (-1e300, -math.inf), (2.0**128 - 2.0**103, math.inf)):
        assert KERNELS["full.default"]([1], number, torch.float32).tolist() == [infinite]
        assert KERNELS["constant_pad_nd.default"](one, [1, 0], number).tolist() == [infinite, 1.0, 1.0]
        assert KERNELS["add.Tensor"](one, number).tolist() == [infinite, infinite]
        assert KERNELS["div.Tensor"](one, number).tolist() == [0.0, 0.0]
    assert KERNELS["full.default"]([1], 2.0**128 - 2.0**103 - 2.0**75, torch.float32).isfinite().all()


def test_a_range_wider_than_an_int64_keeps_its_elements() -> None:
    found = KERNELS["arange.start_step"](-(2**63) + 1, 2**63 - 1, 2**62)
    assert found.tolist() == [-(2**63) + 1, -(2**62) + 1, 1, 2**62 + 1]


def test_gradients_of_rows_without_columns_are_empty() -> None:
    found = KERNELS["embedding_dense_backward.default"](torch.empty(3, 0), torch.tensor([0, 1, 0]), 4, -1, False)
    assert found.shape == (4, 0)


def test_a_step_key_below_zero_is_the_programs_fault() -> None:
    with pytest.raises(MalformedRecord, match="step key"):
        KERNELS["ichiba.uniform"](torch.tensor([-1, 0]), 0, [2])
