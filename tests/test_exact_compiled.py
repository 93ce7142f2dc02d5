"""The compiled helper gives the bits of the Python it stands for: every kind of number, shape, order, thread count."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from protocol.errors import LocalProtocolError
from worker import exact
from worker.exact import compiled
from worker.exact.products import Products

THERE = bool(compiled.compiled_kernels())
pytestmark = pytest.mark.skipif(
    not THERE and shutil.which("cc") is None, reason="no C compiler: the helper was not built, and nothing needs it"
)


@pytest.fixture(autouse=True, params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def bits(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), torch.nan, x).contiguous().view(torch.int32)


def wild(count: int) -> Tensor:
    """Every exponent, both signs, NaN, infinities, subnormals."""
    return torch.arange(-(2**31), 2**31, 2**32 // count, dtype=torch.int64).to(torch.int32).view(torch.float32)


def test_the_helper_is_built_where_there_is_a_compiler() -> None:
    assert THERE, "run setup.sh: a C compiler is here, the helper is not"


@pytest.mark.parametrize("name", ["exp", "log", "erf", "tanh"])
def test_elementary_functions(name: str) -> None:
    plain, fast = (exact.kernels(15, helper=helper)[f"{name}.default"] for helper in (False, True))
    assert fast is not plain
    tame = exact.normal(1, 0, 0, (300, 700), std=3.0)
    for x in (wild(400_009), tame, tame.t(), tame[:, ::3], tame[0, 0], tame[:0], tame.view(torch.int32).float()):
        before = x.clone()
        assert torch.equal(bits(fast(x)), bits(plain(x)))
        assert torch.equal(bits(x), bits(before))
        assert fast(x).shape == x.shape


SHAPES = [
    ((1,), [0]), ((37,), [0]), ((5, 1000), [1]), ((1000, 5), [0]), ((700, 130), [0]), ((700, 130), [0, 1]),
    ((6, 7, 8), [0, 2]), ((6, 7, 8), [1]), ((2, 3, 4, 5), [0, 1]), ((2, 3, 4, 5), [1, 3]), ((90, 1, 800), [1]),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "dims"), SHAPES, ids=str)
@pytest.mark.parametrize("keepdim", [False, True])
def test_sums(shape: tuple[int, ...], dims: list[int], keepdim: bool) -> None:
    plain, fast = (exact.kernels(15, helper=helper)["sum.dim_IntList"] for helper in (False, True))
    count = int(torch.tensor(shape).prod())
    tame = exact.normal(2, 0, 0, shape)
    spread = (wild(count)[:count] if count > 1 else wild(3)[:1]).reshape(shape)
    for x in (tame, tame * 1e-41, -0.0 * tame, spread, tame.masked_fill(tame > 1, torch.inf), tame * 2.0**127):
        assert torch.equal(bits(fast(x, dims, keepdim)), bits(plain(x, dims, keepdim)))
        flipped = x.mT if x.dim() > 1 else x
        assert torch.equal(bits(fast(flipped, dims, keepdim)), bits(plain(flipped, dims, keepdim)))


@pytest.mark.parametrize("count", [0, 1, 3, 4, 31, 32, 33, 1000, 70_001])
def test_random_numbers(count: int) -> None:
    for seed, step, stream in ((0, 0, 0), (2**64 - 1, 2**63 + 5, 2**32 - 1), (7, 3, 2)):
        fast = compiled.uniform(seed, step, stream, (count,))
        assert torch.equal(bits(fast), bits(exact.uniform(seed, step, stream, (count,))))
    with pytest.raises(LocalProtocolError):
        compiled.uniform(-1, 0, 0, (count,))


SIZES = [
    (1, 1, 1), (1, 7, 5), (6, 8, 16), (7, 9, 17), (5, 4096, 3), (13, 4097, 33), (12, 9001, 16), (64, 64, 64),
    (150, 300, 70), (2, 16, 300), (300, 2, 2),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("width", [8, 15])
def test_products(size: tuple[int, int, int], width: int) -> None:
    m, k, n = size
    plain, fast = Products(width, "float64", helper=False), Products(width, "int16")
    a, b = exact.normal(3, 0, 0, (m, k)), exact.normal(3, 0, 1, (k, n))
    steep = torch.exp2((exact.uniform(3, 0, 2, (m, 1)) * 250 - 140).round())
    cases = {
        "normal": (a, b),
        "steep": (a * steep, b * 1e-30),
        "subnormal": (a * 1e-41, b),
        "largest": (torch.full_like(a, 3.4028234e38), b.sign() * 2.0**-100),
        "ties": ((a * 4).round() * 0.5 + 16384.0, b),
        "clamped": (torch.where(a > 0, 1.0, -(1 - 2.0**-24)), torch.ones_like(b)),
        "zeros": (a * -0.0, b),
        "one huge": (torch.where(torch.arange(k) == k // 2, 3e38, a), b),
    }
    for name, (left, right) in cases.items():
        expected = bits(plain.mm(left, right))
        for x in (left, left.t().contiguous().t()):
            for y in (right, right.t().contiguous().t()):
                assert torch.equal(bits(fast.mm(x, y)), expected), name


def test_products_keep_nan_and_infinity_in_their_rows_and_columns() -> None:
    a, b = exact.normal(4, 0, 0, (20, 30)), exact.normal(4, 0, 1, (30, 40))
    a[3, 4], a[5, 6], b[2, 3] = torch.nan, torch.inf, -torch.inf
    found = Products(15, "int16").mm(a, b)
    assert torch.equal(bits(found), bits(Products(15, "float64", helper=False).mm(a, b)))
    assert int(found.isnan().sum()) == 2 * 40 + 20 - 2


def test_batches_of_products_in_every_memory_order() -> None:
    a, b = exact.normal(5, 0, 0, (9, 33, 21)), exact.normal(5, 0, 1, (9, 21, 50))
    plain, fast = Products(15, "float64", helper=False), Products(15, "int16")
    for x in (a, a.mT.contiguous().mT, a.permute(1, 0, 2).contiguous().permute(1, 0, 2), a[:1].expand(9, 33, 21)):
        for y in (b, b.mT.contiguous().mT, b[::1, :, ::2]):
            assert torch.equal(bits(fast.bmm(x, y)), bits(plain.bmm(x, y)))


def test_int16_products_of_22_bits_are_refused() -> None:
    with pytest.raises(LocalProtocolError, match="width 22"):
        Products(22, "int16")
    with pytest.raises(LocalProtocolError, match="compiled helper"):
        Products(15, "int16", helper=False)
