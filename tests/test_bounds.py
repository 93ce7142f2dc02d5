"""Honest float32 machines lie inside the bounds of every operation; lower precision and another rate lie outside."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protocol import bounds
from protocol.bounds import ULPS, bound_of, judge
from protocol.errors import LimitExceeded, LocalProtocolError, VerificationFailed
from protocol.operations import OPERATIONS
from protocol.reference import Array
from tests.exact_cases import CASES
from tests.test_reference import PRODUCTS, array_of, for_kernel, for_reference
from worker.executor import native_kernels

ROOT = Path(__file__).resolve().parent.parent
ELEMENTS = 30  # judged of each result, spread over all of it
ENVIRONMENT = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32) if x.dtype == torch.float32 else x


def cases(name: str) -> list[Any]:
    """Those of tests/exact_cases.py, but numbers beyond float32, which torch refuses to fill with."""
    fills = name in ("full.default", "constant_pad_nd.default")
    most = torch.finfo(torch.float32).max
    return [
        args
        for kind in CASES[name]
        for args in kind
        if not (fills and any(isinstance(arg, float) and most < abs(arg) < math.inf for arg in args))
    ]


def native(name: str) -> list[tuple[Any, Tensor]]:
    """What torch's own kernels make here of each case of an operation, beside it: linspace too has other bits."""
    kernel = native_kernels(torch.device("cpu"))[name]
    return [(args, kernel(*[for_kernel(arg, "dense") for arg in args])) for args in cases(name)]


def compute(path: str) -> None:
    """In a process of its own: all cases and results."""
    torch.set_num_threads(1)
    torch.save({name: native(name) for name in sorted(OPERATIONS)}, path)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Any, Tensor]]]:
    """The results under another instruction set and another BLAS path."""
    path = tmp_path_factory.mktemp("native") / "results"
    words = [sys.executable, "-c", f"from tests.test_bounds import compute; compute({str(path)!r})"]
    subprocess.run(words, env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, check=True)
    found: dict[str, list[tuple[Any, Tensor]]] = torch.load(path)
    return found


def judged(name: str, args: Any, result: Tensor) -> None:
    patterns, given = bits(result).reshape(-1), tuple(map(for_reference, args))
    count = patterns.numel()
    for index in sorted(
        {i * count // ELEMENTS for i in range(min(count, ELEMENTS))} if count > ELEMENTS else range(count)
    ):
        value = int(patterns[index])
        judge(name, given, index, value % 2**32 if result.dtype == torch.float32 else value)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_honest_machines_lie_inside(name: str, elsewhere: dict[str, list[tuple[Any, Tensor]]]) -> None:
    for threads in (1, 2) if OPERATIONS[name].reduces or name in PRODUCTS else (1,):
        torch.set_num_threads(threads)
        for args, result in native(name):
            judged(name, args, result)
    torch.set_num_threads(1)
    for args, result in elsewhere[name]:
        judged(name, args, result)


def outside(a: Tensor, b: Tensor, product: Tensor) -> float:
    """The share of the elements of a product that the referee refuses."""
    given, patterns, refused = (array_of(a), array_of(b)), bits(product).reshape(-1).tolist(), 0
    for index, value in enumerate(patterns):
        try:
            judge("mm.default", given, index, value % 2**32)
        except VerificationFailed:
            refused += 1
    return refused / len(patterns)


def tf32(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize(("inner", "tf32_min", "bf16_min"), [(16, 0.95, 0.99), (64, 0.85, 0.97), (256, 0.4, 0.85)])
def test_lower_precision_lies_outside_up_to_a_length(inner: int, tf32_min: float, bf16_min: float) -> None:
    rng = np.random.default_rng(inner)
    a, b = (torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in ((12, inner), (inner, 12)))
    assert outside(a, b, a @ b) == 0
    assert outside(a, b, tf32(a) @ tf32(b)) >= tf32_min
    assert outside(a, b, a.bfloat16().float() @ b.bfloat16().float()) >= bf16_min


def test_a_rate_off_by_one_in_ten_thousand_lies_outside() -> None:
    move, rate = torch.linspace(0.1, 1, 50), torch.tensor(1e-3)
    honest, fraud = bits(move * rate).tolist(), bits(move * (rate * 1.0001)).tolist()
    for index in range(50):
        judge("mul.Tensor", (array_of(move), array_of(rate)), index, honest[index])
        with pytest.raises(VerificationFailed, match="honest machine"):
            judge("mul.Tensor", (array_of(move), array_of(rate)), index, fraud[index])


@pytest.mark.parametrize("name", sorted(ULPS))
def test_one_more_unit_than_stated_is_refused(name: str) -> None:
    given = (array_of(torch.tensor([0.7])),)
    (right,) = bound_of(name, given, 0).allowed
    for sign in (-1, 1):
        judge(name, given, 0, right + sign * ULPS[name])
        with pytest.raises(VerificationFailed, match=name):
            judge(name, given, 0, right + sign * (ULPS[name] + 1))


def test_sums_are_judged_by_their_magnitudes_not_by_their_result() -> None:
    terms = torch.tensor([1e8, 1.0, -1e8, 1e-3])
    given = (array_of(terms), (0,), False)
    for value in (1.001, 0.0, 8.0):  # each is what some order of additions gives
        judge("sum.dim_IntList", given, 0, int(bits(torch.tensor([value]))[0]))
    with pytest.raises(VerificationFailed):
        judge("sum.dim_IntList", given, 0, int(bits(torch.tensor([50.0]))[0]))


def test_overflow_on_the_way_and_infinite_terms_are_honest_only_where_they_can_be() -> None:
    large, infinity, nan = 0x7F7FFFFF, 0x7F800000, 0x7FC00000
    overflow = (Array("float32", (3,), (large, large, large | 1 << 31)), (0,), False)
    for value in (large, infinity):
        judge("sum.dim_IntList", overflow, 0, value)
    small = (Array("float32", (2,), (0x3F800000, 0x3F800000)), (0,), False)
    for value in (infinity, nan):
        with pytest.raises(VerificationFailed):
            judge("sum.dim_IntList", small, 0, value)
    opposed = (Array("float32", (2,), (infinity, infinity | 1 << 31)), (0,), False)
    judge("sum.dim_IntList", opposed, 0, nan)
    with pytest.raises(VerificationFailed):
        judge("sum.dim_IntList", opposed, 0, 0)


def test_what_cannot_be_judged_is_refused_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Array("float32", (1,), (0x3F800000,))
    with pytest.raises(LocalProtocolError, match="element 1"):
        judge("exp.default", (one,), 1, 0)
    monkeypatch.setattr(bounds, "PRODUCT_TERMS_MAX", 2)
    for count in (2, 3):
        long = Array("float32", (count,), (0,) * count)
        with pytest.raises(LimitExceeded, match="too long") if count > 2 else contextlib.nullcontext():
            judge("sum.dim_IntList", (long, (0,), False), 0, 0)
