"""The executor gives, bit for bit, what the reference in Python integers gives: every operation, every odd argument."""

from __future__ import annotations

import doctest
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocol import params, philox, reference, reference_elementary, reference_products, reference_random
from protocol.errors import LimitExceeded, LocalProtocolError, MalformedRecord
from protocol.operations import OPERATIONS
from protocol.program import Init, Input, Program
from protocol.reference import Array
from protocol.softfloat import BINARY32
from protocol.task import ArrayRef, BatchRule, Initial, Schedule, TaskSpec, learning_rate
from tests.exact_cases import CASES, LAYOUTS, SPECIAL
from worker import exact, training
from worker.exact import compiled, elementary, random, reductions
from worker.exact.devices import device_kernels
from worker.exact.products import Products
from worker.executor import DTYPES

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = [
    "float64",
    *(["int8"] if exact.int8_is_exact() else []),
    *(["int16"] if compiled.has_products() else []),
]
PATHS = [(width, backend) for width in (8, 15, 22) for backend in BACKENDS if (width, backend) != (22, "int16")]
DEVICE = device_kernels(torch.device("cpu"))  # what a GPU would run
PRODUCTS = ("mm.default", "bmm.default")
OTHERS = sorted(OPERATIONS.keys() - set(PRODUCTS))
NAMES = {torch_dtype: name for name, torch_dtype in DTYPES.items()}
PATTERNS = st.one_of(
    st.integers(0, 2**32 - 1), st.sampled_from(SPECIAL.view(torch.int32).tolist()).map(lambda x: x % 2**32)
)
bounded = settings(derandomize=True, deadline=None, max_examples=120, database=None)


def array_of(x: Tensor) -> Array:
    elements = x.contiguous().reshape(-1)
    if x.dtype == torch.float32:
        return Array("float32", tuple(x.shape), tuple(elements.numpy().view(np.uint32).tolist()))
    return Array(NAMES[x.dtype], tuple(x.shape), tuple(map(int, elements.tolist())))


def tensor_of(patterns: list[int], *shape: int) -> Tensor:
    return torch.from_numpy(np.array(patterns, dtype=np.uint32).view(np.float32)).reshape(shape)


def for_reference(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return array_of(arg)
    if isinstance(arg, tuple):
        return tuple(map(for_reference, arg))
    return arg


def for_kernel(arg: Any, layout: str) -> Any:
    """As the executor hands it over: lists, and torch's dtypes."""
    if isinstance(arg, Tensor):
        return LAYOUTS[layout](arg)
    if isinstance(arg, tuple):
        return [for_kernel(item, layout) for item in arg]
    return DTYPES[arg] if isinstance(arg, str) else arg


def tensors_in(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from tensors_in(arg)


def one_nan(found: Array) -> Array:
    """`found` with each NaN made the canonical one: the bits of a NaN are free."""
    if found.dtype != "float32":
        return found
    elements = tuple(BINARY32.nan if BINARY32.is_nan(x) else x for x in found.elements)
    return Array(found.dtype, found.shape, elements)


def agree(name: str, args: tuple[Any, ...], *, width: int = 15, backend: str = "auto") -> None:
    """Hold the kernel, compiled and not, against the reference, in every memory order; and `element` to `evaluate`."""
    expected = reference.evaluate(name, [for_reference(arg) for arg in args], width=width)
    wanted = one_nan(expected)
    kernels = {exact.kernels(width, backend, helper=helper)[name] for helper in {True, backend == "int16"}}
    kernels |= {kernel for there, kernel in DEVICE.items() if there == name}
    if name in PRODUCTS and backend == "int8":
        padded = Products(width, backend, helper=False, padded=True)
        kernels.add(padded.mm if name == "mm.default" else padded.bmm)
    for kernel, layout in itertools.product(kernels, LAYOUTS):
        found = one_nan(array_of(kernel(*(for_kernel(arg, layout) for arg in args))))
        if found == wanted:
            continue
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), f"{name}, {layout}"
        for index, (got, want) in enumerate(zip(found.elements, wanted.elements, strict=True)):
            assert got == want, f"{name}, {layout}, element {index}: executor {got:#x}, reference {want:#x}"
    for index in {0, len(expected.elements) // 2, len(expected.elements) - 1} & set(range(len(expected.elements))):
        alone = reference.element(name, [for_reference(arg) for arg in args], index, width=width)
        assert alone == expected.elements[index]


# --- no operation without reference and cases ----------------------------------------------------------------
def test_every_operation_has_a_reference_and_cases_of_both_kinds() -> None:
    assert set(reference.rules()) == set(OPERATIONS), "write its rule in protocol/reference*.py and docs/exact.md"
    assert set(CASES) == set(OPERATIONS), "give it cases in tests/exact_cases.py"
    for name, (ordinary, adversarial) in CASES.items():
        assert ordinary and adversarial, f"{name} needs a random and an adversarial case"


def test_the_specification_names_every_operation_and_every_constant() -> None:
    page = (ROOT / "docs" / "exact.md").read_text()
    assert [name for name in OPERATIONS if f"`{name}`" not in page] == []
    for module in ("elementary", "random"):
        source = (ROOT / "protocol" / f"reference_{module}.py").read_text()
        constants = set(re.findall(r"0x[0-9A-F]{8,}", source))
        assert len(constants) > 20
        assert constants - set(re.findall(r"0x[0-9A-F]{8,}", page)) == set()
    assert doctest.testfile(str(ROOT / "docs" / "exact.md"), module_relative=False) == (0, 2)


def test_the_executors_constants_are_the_specified_bits() -> None:
    # One unit in a high coefficient changes one result in a hundred thousand: comparing results may miss it.
    def patterns(numbers: Sequence[float], dtype: torch.dtype) -> list[int]:
        bits = torch.tensor(numbers, dtype=dtype).view(torch.int32 if dtype == torch.float32 else torch.int64)
        return [pattern % 2 ** (8 * bits.element_size()) for pattern in bits.tolist()]

    ours, theirs = reference_elementary, elementary
    for name in ("_EXP", "_LOG", "_SIN", "_COS"):
        assert patterns(getattr(theirs, name), torch.float32) == list(getattr(ours, name))
    for name in ("_ERF_NUMERATOR", "_ERF_DENOMINATOR", "_TANH_NUMERATOR", "_TANH_DENOMINATOR"):
        assert patterns(getattr(theirs, name), torch.float64) == list(getattr(ours, name))
    for name in ("_CENTRE", "_TAIL", "_FAR_TAIL"):
        wanted = getattr(reference_random, name)
        assert tuple(tuple(patterns(part, torch.float32)) for part in getattr(random, name)) == wanted
    high, low, parts = elementary._turns()
    for j in range(1, 105):
        assert tuple(patterns([float(high[j]), float(low[j])], torch.float64)) == ours._turned(j)
    assert patterns(parts, torch.float64) == list(ours._PARTS)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_adversarial_floats_hold_every_kind_of_trouble(name: str) -> None:
    floats = [x for args in CASES[name][1] for x in tensors_in(args) if x.dtype == torch.float32 and x.numel()]
    if not any(x.dtype == torch.float32 for args in CASES[name][0] for x in tensors_in(args)):
        assert not floats
        return
    bits = torch.cat([x.reshape(-1) for x in floats]).view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    assert bool((magnitude > 0x7F800000).any()), "no NaN"
    assert bool((magnitude == 0x7F800000).any()), "no infinity"
    assert bool((bits == -(2**31)).any()), "no -0.0"
    assert bool(((magnitude > 0) & (magnitude < 0x00800000)).any()), "no subnormal"
    assert bool(((magnitude >= 0x7F000000) & (magnitude < 0x7F800000)).any()), "nothing huge"
    assert any(not x.numel() for args in CASES[name][1] for x in tensors_in(args)), "nothing empty"


# --- the agreement -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OTHERS)
def test_an_executor_gives_the_bits_of_the_reference(name: str) -> None:
    for args in [*CASES[name][0], *CASES[name][1]]:
        agree(name, args)


@pytest.mark.parametrize(("width", "backend"), PATHS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_gives_the_bits_of_the_reference(name: str, width: int, backend: str) -> None:
    for args in [*CASES[name][0], *CASES[name][1]]:
        agree(name, args, width=width, backend=backend)


matrices = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 4)).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.lists(PATTERNS, min_size=size[0] * size[1], max_size=size[0] * size[1]),
        st.lists(PATTERNS, min_size=size[1] * size[2], max_size=size[1] * size[2]),
    )
)


@bounded
@given(matrices, st.sampled_from(PATHS))
def test_products_of_any_floats_agree(drawn: tuple[Any, list[int], list[int]], path: tuple[int, str]) -> None:
    ((rows, inner, columns), left, right), (width, backend) = drawn, path
    agree("mm.default", (tensor_of(left, rows, inner), tensor_of(right, inner, columns)), width=width, backend=backend)


@bounded
@given(st.lists(PATTERNS.filter(lambda x: x & 0x7FFFFFFF < 0x7F800000), min_size=1, max_size=40))
def test_sums_of_any_finite_floats_agree(patterns: list[int]) -> None:
    agree("sum.dim_IntList", (tensor_of(patterns, len(patterns)), (0,), False))


@bounded
@given(
    st.sampled_from(["exp", "log", "erf", "tanh", "sin", "cos", "sqrt", "reciprocal"]), st.lists(PATTERNS, min_size=1)
)
def test_functions_of_any_floats_agree(name: str, patterns: list[int]) -> None:
    agree(f"{name}.default", (tensor_of(patterns, len(patterns)),))


# --- refusals ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [-1, 5, 2**62])
def test_the_reference_refuses_the_indices_that_the_executor_refuses(bad: int) -> None:
    index, table = Array("int64", (2,), (0, bad)), Array("float32", (5, 1), (0,) * 5)
    for name, args in {
        "embedding.default": (table, index),
        "gather.default": (Array("float32", (5,), (0,) * 5), 0, index),
        "embedding_dense_backward.default": (Array("float32", (2, 1), (0, 0)), index, 5, -1, False),
    }.items():
        with pytest.raises(MalformedRecord):
            reference.evaluate(name, args)


def test_the_reference_refuses_what_the_executor_refuses() -> None:
    with pytest.raises(MalformedRecord, match="step key"):
        reference.evaluate("ichiba.uniform", (Array("int64", (2,), (-1, 0)), 0, (2,)))
    inner = params.PRODUCT_LENGTH_22_MAX + 1
    with pytest.raises(LimitExceeded, match="width 22"):
        reference.evaluate("mm.default", (Array("float32", (0, inner), ()), Array("float32", (inner, 0), ())), width=22)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "int16"])
@pytest.mark.parametrize("last", [-1, 0, 1])
def test_one_unit_in_2_to_the_56_decides_a_tie(last: int, backend: str) -> None:
    # At width 22 the integers of 0.5, 2**-5 and 2**-21 are 2**20, 2**16 and 1. Their sum is halfway between two
    # float32, or one unit beside it, and four bits longer than a float64.
    inner = 2**16 + 2
    left, right = torch.full((1, inner), 0.5), torch.full((inner, 1), 0.5)
    left[0, 5], right[5], left[0, 70], right[70] = 2.0**-5, 2.0**-5, 2.0**-21, last * 2.0**-21
    whole = 2**56 + 2**32 + last
    wanted = reference_products.scaled(whole, 0, 0, 22)
    assert wanted == reference_products.scaled(2**56 + (last > 0) * 2**33, 0, 0, 22)
    for sign in (1, -1):
        found = exact.kernels(22, backend)["mm.default"](left, sign * right)
        assert array_of(found).elements == (wanted | (BINARY32.sign if sign < 0 else 0),)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "int16"])
def test_the_longest_product_at_width_22_is_exact(backend: str) -> None:
    inner = params.PRODUCT_LENGTH_22_MAX
    row = torch.full((1, inner), 1 - 2.0**-24)  # each element is the largest integer
    row[0, 0] = 0.75
    found = exact.kernels(22, backend)["mm.default"](row, row.t())
    top = 2**21 - 1
    whole = (inner - 1) * top * top + (3 * 2**19) ** 2
    assert array_of(found).elements == (reference_products.scaled(whole, 0, 0, 22),)


def test_sums_keep_the_bits_that_the_reference_keeps() -> None:
    counts = [1, 2, 3, *(2**power + off for power in range(2, 41) for off in (-1, 0, 1))]
    assert [reductions.sum_bits(count) for count in counts] == [reference_products.sum_bits(count) for count in counts]


def test_arrays_and_calls_that_make_no_sense_are_refused() -> None:
    for bad in (("float32", (2,), (0,)), ("float32", (1,), (2**32,)), ("bool", (1,), (2,)), ("float16", (1,), (0,))):
        with pytest.raises(LocalProtocolError):
            Array(*bad)
    one = Array("float32", (1,), (0,))
    for index in (-1, 1):
        with pytest.raises(LocalProtocolError):
            reference.element("neg.default", (one,), index)
    with pytest.raises(LocalProtocolError):
        reference.evaluate("neg.default", (one,), width=16)
    with pytest.raises(MalformedRecord):
        reference.evaluate("softmax.default", (one,))


# --- what surrounds a step -----------------------------------------------------------------------------------
def test_one_word_is_the_word_of_the_whole_draw() -> None:
    for seed, step, stream in ((0, 0, 0), (2**64 - 1, 2**64 - 2, 2**32 - 1), (7, 2**40, 3)):
        drawn = philox.words(seed, step, stream, 23).tolist()
        assert [reference_random.word(seed, step, stream, index) for index in range(23)] == drawn
        for below in (1, 1000, 2**63 - 1):
            rows = philox.integers(seed, step, stream, 9, below).tolist()
            assert [reference_random.integer(seed, step, stream, index, below) for index in range(9)] == rows


def test_normal_draws_agree_in_the_centre_and_in_both_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = exact.normal(5, 0, 2**31 + 2, (1500,))
    found = [reference_random.normal(5, 0, 2**31 + 2, index) for index in range(1500)]
    assert array_of(drawn).elements == tuple(found)
    # Wherever a formula begins or ends: |q| = 0.425, tail = 5, the ends and the middle.
    edges = [0, 1, 2, 57, 58, 59, 116, 117, 118, 2**22 - 1, 2**22, 2**22 + 1, 2**23 - 1]
    edges += [int(0.075 * 2**23) + i for i in range(-3, 4)] + [int(0.925 * 2**23) + i for i in range(-3, 4)]
    words = np.array(edges, dtype=np.uint32) << np.uint32(9)
    monkeypatch.setattr(philox, "words", lambda seed, step, stream, count: words)
    wanted = tuple(reference_random.normal_of(word) for word in words.tolist())
    assert array_of(exact.normal(0, 0, 0, (len(edges),))).elements == wanted


def test_the_learning_rate_is_rounded_twice_as_specified() -> None:
    schedule = Schedule("warmup-cosine", peak_nano=3_000_000, floor_nano=1, warmup_steps=7)
    rates = [(schedule, step) for step in range(0, 200, 3)]
    rates += [(Schedule("constant", peak_nano=n, floor_nano=0, warmup_steps=0), 0) for n in (0, 1, 10**9, 2**63 - 1)]
    for rule, step in rates:
        task = a_task(schedule=rule, steps=200)
        found = array_of(torch.tensor(training.rate_of(task, step), dtype=torch.float32)).elements[0]
        assert found == reference_random.rate(learning_rate(rule, step=step, steps=200))


def test_initial_states_follow_their_rules() -> None:
    rules = [
        Init.of("normal", 0.1, 0.02), Init.of("uniform", -0.3, 0.1), Init.of("constant", 1 / 3),
        Init.of("normal", -0.0, 1e-41), Init.of("uniform", 0.0, 1.0),
    ]  # fmt: skip
    inputs = tuple(Input(f"w{index}", "parameter", "float32", (3, 20), rule) for index, rule in enumerate(rules))
    program = Program(inputs=inputs, constants=(), nodes=(), updates=(), loss=0)
    state = training.initial_state(a_task(seed=99), program, None)
    for at, (name, rule) in enumerate(zip(state, rules, strict=True)):
        one = functools.partial(reference_random.initial, rule.kind, rule.a, rule.b, seed=99, tensor=at)
        assert array_of(state[name]).elements == tuple(one(index=index) for index in range(60)), rule


def test_a_batch_is_drawn_as_specified() -> None:
    data = np.arange(1000, dtype=np.int64) * 3
    array = ArrayRef("a", "int64", (1000,), bytes(32), 8000)
    inputs = tuple(Input(name, "batch", "int64", (5, 8), None) for name in ("x", "y"))
    program = Program(inputs=inputs, constants=(), nodes=(), updates=(), loss=0)
    task = a_task(seed=2**63 - 1, arrays=(array,), batch=BatchRule("windows", 5, 8))
    batch = training.Batches(task, program, {"a": data.tobytes()}).of(41)
    for row in range(5):
        start = reference_random.integer(2**63 - 1, 41, 0, row, 992)
        assert batch["x"][row].tolist() == [3 * (start + i) for i in range(8)]
        assert batch["y"][row].tolist() == [3 * (start + i + 1) for i in range(8)]


def a_task(**changes: Any) -> TaskSpec:
    digest = bytes(32)
    plain = {
        "network": digest, "program": digest, "program_bytes": 1, "arrays": (), "batch": BatchRule("rows", 1, 0),
        "initial": Initial("seed", digest, digest), "seed": 1, "steps": 1, "steps_per_segment": 1, "mode": "exact",
        "width": 15, "schedule": Schedule("constant", 1, 1, 0), "operations_per_step": 1, "name": "a task",
    }  # fmt: skip
    return TaskSpec(**{**plain, **changes})
