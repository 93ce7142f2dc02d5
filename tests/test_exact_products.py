"""Exact products: the formula of DESIGN §6 to the last bit, by any backend, in any memory order."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from protocol import params
from protocol.errors import LimitExceeded, LocalProtocolError
from worker import exact
from worker.exact.products import Products

BACKENDS = ["float64", *(["int8"] if exact.int8_is_exact() else [])]
WIDTHS = [8, 15, 22]


def nearest_float32(value: Fraction) -> float:
    """`value` rounded once to float32, ties to even, by integers alone."""
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - 23, -149)
    rounded = round(magnitude / unit) * unit  # Fraction rounds ties to even
    if rounded >= Fraction(2) ** 128:
        return math.copysign(math.inf, value)
    return math.copysign(float(rounded), value) if rounded else 0.0


def quantised(values: list[float], width: int) -> tuple[list[int], int]:
    exponent = math.frexp(max(abs(v) for v in values))[1]
    bound = 2 ** (width - 1) - 1
    scaled = [round(Fraction(v) * Fraction(2) ** (width - 1 - exponent)) for v in values]
    return [max(-bound, min(bound, a)) for a in scaled], exponent


def slow_product(a: Tensor, b: Tensor, width: int) -> Tensor:
    """The definition, in Python integers."""
    rows = [quantised(row, width) for row in a.tolist()]
    columns = [quantised(column, width) for column in b.t().tolist()]
    return torch.tensor(
        [
            [
                nearest_float32(
                    sum(x * y for x, y in zip(p, q, strict=True)) * Fraction(2) ** (ep + eq - 2 * (width - 1))
                )
                for q, eq in columns
            ]
            for p, ep in rows
        ]
    )


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def adversarial() -> dict[str, tuple[Tensor, Tensor]]:
    a, b = random((9, 13)), random((13, 7), 1)
    tie = torch.tensor([[1.0, 2.0**-15, 3 * 2.0**-15, -(2.0**-15), 5 * 2.0**-15]])
    top = torch.tensor([[0.99999994, 1.0, -0.99999994], [0.9999695, -0.9999695, 0.5], [2.0**-149] * 3])
    mixed = a * torch.logspace(-44, 38, 9, base=10)[:, None].clamp(1e-45)
    lone = torch.full((3, 40), 2.0**-60)
    lone[:, 11] = 1.0
    zeros = torch.zeros(4, 13)
    zeros[1, 3], zeros[2] = -3.0, -0.0
    return {
        "plain": (a, b),
        "ties": (tie, torch.eye(5)),
        "rounds up to the bound": (top, top.t().contiguous()),
        "subnormal": (a * 1e-40, b),
        "both subnormal": (a * 1e-40, b * 1e-42),
        "subnormal results": (a * 1e-20, b * 1e-21),
        "smallest": (torch.full((2, 3), 2.0**-149), torch.full((3, 2), -(2.0**-149))),
        "largest": (a * 3.3e38, b),
        "largest times smallest": (a * 3.3e38, b * 1e-44),
        "overflow": (a.sign() * 3.4e38, a.sign().t().contiguous() * 3.4e38),
        "rows of every size": (mixed, b),
        "one huge element": (lone, random((40, 6), 2)),
        "zero rows": (zeros, b),
        "all zero": (torch.zeros(2, 3), torch.zeros(3, 2)),
        "cancelling": (torch.tensor([[1.0, -1.0]]), torch.tensor([[0.3], [0.3]])),
        "one": (torch.tensor([[-0.0]]), torch.tensor([[5.0]])),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", adversarial())
def test_a_product_is_the_definition_in_integers(case: str, width: int, backend: str) -> None:
    a, b = adversarial()[case]
    assert torch.equal(bits(Products(width, backend).mm(a, b)), bits(slow_product(a, b, width)))


@pytest.mark.skipif("int8" not in BACKENDS, reason="int8 products are not exact on this machine")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (1, 300, 5), (64, 1, 64), (130, 70, 33), (200, 40, 1100), (70, 2047, 20), (20, 5000, 17)]
)
def test_int8_and_float64_give_the_same_bits(size: tuple[int, int, int], width: int) -> None:
    rows, inner, columns = size
    a, b = random((rows, inner)) ** 3, random((inner, columns), 1) ** 3
    assert torch.equal(bits(Products(width, "int8").mm(a, b)), bits(Products(width, "float64").mm(a, b)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_longer_than_float64_or_int32_holds_are_exact(backend: str) -> None:
    # Every product is the largest: a sum that lost one unit anywhere would show in the tail of the result.
    for width, inner in [(22, 10_000), (15, 2**17 + 3)]:
        a = torch.full((1, inner), 0.99)
        a[0, ::3] = 0.3337
        expected = slow_product(a, a.t(), width)
        assert torch.equal(bits(Products(width, backend).mm(a, a.t().contiguous())), bits(expected))


def test_a_sum_that_no_int64_holds_is_refused() -> None:
    long = torch.zeros(1, params.PRODUCT_LENGTH_22_MAX + 1)
    with pytest.raises(LimitExceeded, match="width 22"):
        Products(22).mm(long, long.t())
    assert Products(15).mm(long, long.t()).tolist() == [[0.0]]


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_the_order_of_the_inner_index_and_of_memory_moves_no_bit(backend: str) -> None:
    product = Products(15, backend)
    a, b = random((65, 200)), random((200, 90), 1)
    expected = bits(product.mm(a, b))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bits(product.mm(a[:, order], b[order])), expected)
    turned_a, turned_b = a.t().contiguous().t(), b.t().contiguous().t()
    spread = torch.stack([a, a], dim=-1)[..., 0]
    for left in (a, turned_a, spread):
        for right in (b, turned_b, torch.stack([b, b])[1]):
            assert torch.equal(bits(product.mm(left, right)), expected)
    assert torch.equal(bits(product.mm(b.t(), a.t()).t()), expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_a_batch_is_its_matrices_one_by_one(backend: str) -> None:
    product = Products(15, backend)
    a, b = random((5, 33, 64)), random((5, 64, 30), 1)
    a[2] = 0.0
    a[3] *= 1e-40
    result = product.bmm(a, b)
    for index in range(5):
        assert torch.equal(bits(result[index]), bits(product.mm(a[index], b[index])))
    turned = product.bmm(a.mT.contiguous().mT, b.permute(1, 0, 2).contiguous().permute(1, 0, 2))
    assert torch.equal(bits(turned), bits(result))


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_nan_and_infinity_stay_visible_and_spoil_only_their_row_and_column(backend: str) -> None:
    a, b = random((40, 50)), random((50, 60), 1)
    clean = Products(15, backend).mm(a, b)
    a[3, 4], a[7, 0], b[9, 11] = torch.nan, torch.inf, -torch.inf
    result = Products(15, backend).mm(a, b)
    expected = torch.zeros(40, 60, dtype=torch.bool)
    expected[[3, 7]] = True
    expected[:, 11] = True
    assert torch.equal(result.isnan(), expected)
    assert torch.equal(bits(result[~expected]), bits(clean[~expected]))
    batch = Products(15, backend).bmm(a[None].contiguous(), b[None].contiguous())
    assert torch.equal(batch[0].isnan(), expected)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_error_stays_within_the_stated_bound_and_can_come_near_it(width: int) -> None:
    bound = 2.0 ** (2 - width)
    a, b = random((64, 300)), random((300, 64), 1)
    error = (Products(width).mm(a, b).double() - a.double() @ b.double()).abs().max()
    assert error <= 300 * bound + 1e-5
    for value, share in ((1 - 2.0**-24, 0.9), (1 - 2.0**-width, 0.45)):  # clamped, and as far off as without
        worst = torch.full((1, 1), value)
        found = abs(float(Products(width).mm(worst, worst)) - value * value)
        assert share * bound <= found + 2.0**-24
        assert found <= bound + 2.0**-24


def test_operands_are_left_as_they_were() -> None:
    a, b = random((64, 64)), random((64, 64), 1)
    kept = a.clone(), b.clone()
    for backend in BACKENDS:
        Products(15, backend).mm(a, b)
    assert torch.equal(a, kept[0]) and torch.equal(b, kept[1])


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 3), (2, 3, 0)])
def test_empty_products_have_their_shape_and_zeros(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    result = Products(15).mm(torch.ones(rows, inner), torch.ones(inner, columns))
    assert result.shape == (rows, columns) and not result.any()


@pytest.mark.parametrize(("width", "backend"), [(16, "auto"), (15, "bfloat16"), (0, "float64")])
def test_an_unknown_width_or_backend_is_refused(width: int, backend: str) -> None:
    with pytest.raises(LocalProtocolError):
        exact.kernels(width, backend)


def test_the_reference_itself_rounds_as_ieee_says() -> None:
    for pattern in (1, 0x00800000, 0x3F800001, 0x7F7FFFFF, 0x007FFFFF):
        value = struct.unpack("<f", struct.pack("<I", pattern))[0]
        assert nearest_float32(Fraction(value)) == value
    assert nearest_float32(Fraction(2**24 + 1)) == 2**24
    assert nearest_float32(Fraction(2**24 + 3)) == 2**24 + 4
    assert nearest_float32(Fraction(1, 2**150)) == 0.0
    assert nearest_float32(Fraction(2) ** 128) == math.inf
