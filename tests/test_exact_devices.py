"""The GPU's functions, run on the CPU: the same code, the same bits, and a device that errs is refused."""

from __future__ import annotations

import pytest
import torch

from protocol.errors import LocalProtocolError
from worker import exact
from worker.exact import devices
from worker.exact.products import Products

CPU = torch.device("cpu")


def device_table(width: int) -> dict[str, exact.Kernel]:
    """What `kernels` would use on a CUDA device, on the CPU."""
    products = Products(width, "int8", helper=False, padded=True)
    table = {**exact.kernels(width, helper=False), **devices.device_kernels(CPU)}
    return {**table, "mm.default": products.mm, "bmm.default": products.bmm}


@pytest.mark.skipif(not exact.int8_is_exact(), reason="torch._int_mm is not exact here, so it cannot stand for a GPU's")
@pytest.mark.parametrize("width", [8, 15, 22])
def test_the_device_functions_prove_themselves_equal(width: int) -> None:
    assert devices.prove(device_table(width), exact.kernels(width), CPU) > 40


FAULTS = {
    "exp.default": torch.exp,
    "div.Tensor": lambda x, y: x * (1 / y),
    "sum.dim_IntList": lambda x, dims, keepdim: x.sum(dims, keepdim),
    "mm.default": torch.mm,
    "sqrt.default": lambda x: torch.sqrt(torch.where(x.abs() < 2.0**-126, 0.0, x)),  # subnormals flushed
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_device_that_rounds_otherwise_is_refused_by_name(name: str) -> None:
    trusted = exact.kernels(15)
    with pytest.raises(LocalProtocolError, match=name):
        devices.prove({**trusted, **devices.device_kernels(CPU), name: FAULTS[name]}, trusted, CPU)


@pytest.mark.parametrize("count", [0, 1, 5, 1001])
def test_random_numbers_of_a_device_are_the_generators(count: int) -> None:
    for seed, step, stream in ((0, 0, 0), (2**63 - 1, 2**62 + 9, 2**32 - 1)):
        found = devices.uniform(seed, step, stream, (count,), CPU)
        assert torch.equal(found, exact.uniform(seed, step, stream, (count,)))


def test_scattered_sums_keep_nan_in_their_column_and_padding_at_zero() -> None:
    grad = exact.normal(1, 0, 0, (50, 6)) * torch.tensor([1e-41, 1e30, 1.0, 1.0, 0.0, 1e-3])
    grad[3, 2] = torch.inf
    index = torch.arange(50) % 7
    plain = exact.kernels(15, helper=False)["embedding_dense_backward.default"]
    for padding in (-1, 3):
        found = devices.embedding_dense_backward(grad, index, 7, padding)
        expected = plain(grad, index, 7, padding, False)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num().view(torch.int32), expected.nan_to_num().view(torch.int32))
    assert int(found.isnan().sum()) == 6


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cuda:x", ""])
def test_a_device_that_is_not_there_is_refused_with_what_to_do(name: str) -> None:
    with pytest.raises(LocalProtocolError) as refused:
        exact.kernels(15, device=name)
    assert refused.value.next_step
