"""Arguments for every operation, random and adversarial, on which executor and reference must agree bit for bit.

CASES[name] holds the two lists. Tensors are torch's; everything else is as protocol/operations.py lists it, dtypes
by name. tests/test_reference.py demands both kinds for each operation of the list.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["CASES", "LAYOUTS", "SPECIAL"]

Args = tuple[Any, ...]


def from_bits(patterns: list[int]) -> Tensor:
    return torch.from_numpy(np.array(patterns, dtype=np.uint32).view(np.float32))


def random_bits(count: int, seed: int) -> Tensor:
    """Any float32: every exponent as likely as any other, NaN and infinity among them."""
    return from_bits(np.random.default_rng(seed).integers(0, 2**32, count).tolist())


def plain(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


# +-: zero, smallest and largest subnormal, smallest normal, one and its neighbours, odd and even integers where
# the unit is 1, ties of 2**24, the largest numbers, infinity; and NaN with either sign and a payload.
_POSITIVE = [
    0x00000000, 0x00000001, 0x00000002, 0x00000003, 0x00400000, 0x007FFFFE, 0x007FFFFF, 0x00800000, 0x00800001,
    0x0C000000, 0x33800000, 0x34000000, 0x3EFFFFFF, 0x3F000000, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x3FC00000,
    0x40400000, 0x4B000001, 0x4B7FFFFF, 0x4B800000, 0x4B800001, 0x5EFFFFFF, 0x5F000000, 0x7E800000, 0x7F000000,
    0x7F7FFFFE, 0x7F7FFFFF, 0x7F800000, 0x7FC00000,
]  # fmt: skip
SPECIAL = from_bits([*_POSITIVE, *(0x80000000 | p for p in _POSITIVE), 0x7FA00001])
INTEGERS = torch.tensor(
    [0, 1, -1, 2, 3, -7, 2**24 + 1, 2**53 + 2**29 + 1, -(2**53) - 1, 2**62, 2**63 - 1, -(2**63), -(2**63) + 1, 2**39]
)
NUMBERS = [
    0.1, -0.0, 1.5, 1e300, -1e300, 1e-46, -1e-310, math.nan, math.inf, -math.inf, 3.4028235677973366e38,
    3.4028235677973362e38, 2.0**-150, 2.0**-149 * 1.5, 1 + 2.0**-24, 1 + 3 * 2.0**-24, 0, 3, -(2**24) - 1,
    2**53 + 2**29 + 1, 2**63 - 1, -(2**63) + 1,
]  # fmt: skip
EMPTY = torch.empty(0, 3)
SCALAR = torch.tensor(1.25)


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.repeat_interleave(x.numel()), x.repeat(x.numel())


def _near(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pairs whose exponents differ by little, where sums cancel and ties come up."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 2**32, count)
    second = (first + rng.integers(-(2**26), 2**26, count)) % 2**32 ^ (rng.integers(0, 2, count) << 31)
    return from_bits(first.tolist()), from_bits(second.tolist())


def two_floats(*, numbers: bool, integers: bool) -> tuple[list[Args], list[Args]]:
    random: list[Args] = [(random_bits(2000, 1), random_bits(2000, 2)), _near(2000, 3)]
    random.append((plain(4, 5), plain(4, 5, seed=1)))
    adversarial: list[Args] = [
        _pairs(SPECIAL),
        (SPECIAL, SCALAR),
        (SCALAR, SPECIAL[:, None]),
        (SPECIAL[:6].reshape(6, 1), SPECIAL[-7:].reshape(1, 1, 7)),
        (EMPTY, torch.ones(1, 3)),
        (torch.ones(2, 1, 3), torch.empty(0, 3)),
        (SCALAR, -SCALAR),
    ]
    if numbers:
        adversarial += [(SPECIAL, value) for value in NUMBERS]
    if integers:
        random.append((torch.arange(-50, 50).reshape(10, 10), torch.arange(10) * 10**17))
        adversarial += [_pairs(INTEGERS), (INTEGERS[:, None], INTEGERS[:3])]
        if numbers:
            adversarial += [(INTEGERS, value) for value in (0, -1, 3, 2**63 - 1, -(2**63) + 1)]
    return random, adversarial


def one_float(
    *, integers: bool = False, extra: Tensor | None = None, count: int = 4000
) -> tuple[list[Args], list[Args]]:
    random: list[Args] = [(random_bits(count, 4),), (plain(3, 4, 5) * 10,)]
    adversarial: list[Args] = [(SPECIAL,), (EMPTY,), (SCALAR,), (SPECIAL[:60].reshape(3, 4, 5),)]
    if extra is not None:
        adversarial.append((extra,))
    if integers:
        random.append((torch.arange(-6, 6) * 10**17,))
        adversarial.append((INTEGERS,))
    return random, adversarial


def around(*places: float, steps: int = 40) -> Tensor:
    """The floats next to each place, on both sides, of both signs."""
    at = torch.tensor(places, dtype=torch.float32).view(torch.int32)[:, None] + torch.arange(-steps, steps + 1)
    near = at.to(torch.int32).view(torch.float32).reshape(-1)
    return torch.cat([near, -near])


LN2 = math.log(2)
HALF_PI = math.pi / 2
BENDS = {
    "exp": torch.cat(
        [
            around(43.0, 64 * LN2, 88.72283, 89.0, 87.33654, 103.97208, 104.0, LN2 / 2, 1.5 * LN2, 7.5 * LN2),
            torch.linspace(-104.5, 89.5, 700),
        ]
    ),
    "log": torch.cat([around(1.0, 0.5**0.5, 2.0**0.5, 2.0**-126, 2.0**-125.5, steps=60), torch.linspace(0.4, 3, 500)]),
    "erf": torch.cat([around(3.925, 1.0, 2.0**-63), torch.linspace(-4.1, 4.1, 700)]),
    "tanh": torch.cat([around(9.02, 1.0, 2.0**-63), torch.linspace(-9.3, 9.3, 700)]),
    "sin": torch.cat(
        [
            around(*(k * HALF_PI / 2 for k in (1, 2, 3, 4, 5, 1001, 2**20)), 2.0**24, 2.0**25, 3.4e38, steps=25),
            torch.linspace(-40, 40, 400),
            torch.logspace(5, 38, 300),
        ]
    ),
}
BENDS["cos"] = BENDS["sin"]


# --- movement ----------------------------------------------------------------------------------------------
WILD = SPECIAL[:60].reshape(3, 4, 5)
WORDS = torch.arange(24).reshape(2, 3, 4) - 2**63
FLAGS = torch.tensor([[True, False, True], [False, False, True]])
BYTES = torch.arange(250, 256, dtype=torch.uint8).reshape(2, 3)
SHORTS = torch.tensor([-(2**31), -1, 0, 2**31 - 1, 2**24 + 1, 2**25 + 3], dtype=torch.int32).reshape(2, 3)


EVERY = [WILD, WORDS, FLAGS, BYTES, SHORTS]


def views() -> dict[str, tuple[list[Args], list[Args]]]:
    x, y = plain(3, 4, 5), plain(2, 3)
    return {
        "reshape.default": (
            [(x, (5, 12)), (x, (60,))],
            [*((v, (v.numel(), 1)) for v in EVERY), (EMPTY, (3, 0, 7)), (SCALAR, (1, 1)), (SPECIAL[:1], ())],
        ),
        "permute.default": (
            [(x, (2, 0, 1)), (x, (0, 2, 1))],
            [*((v, tuple(range(v.dim()))[::-1]) for v in EVERY), (EMPTY, (1, 0)), (SCALAR, ())],
        ),
        "expand.default": (
            [(y, (4, 2, 3)), (x[:, :1], (3, 6, 5))],
            [
                *((v, (2, *v.shape)) for v in EVERY),
                (SPECIAL[:1], (0,)),
                (SCALAR, ()),
                (SCALAR, (0, 2)),
                (EMPTY, (0, 3)),
            ],
        ),
        "slice.Tensor": (
            [(x, 1, 1, 4, 2), (x, 2, 0, 5, 1)],
            [
                *((v, 1, 1, 3, 1) for v in EVERY),
                (x, 0, 3, 3, 1),
                (x, 2, 1, 5, 100),
                (EMPTY, 1, 0, 3, 3),
                (EMPTY, 0, 0, 0, 1),
            ],
        ),
    }


def joins() -> dict[str, tuple[list[Args], list[Args]]]:
    x, y = plain(3, 4, 5), plain(2, 3)
    return {
        "cat.default": (
            [((x, x[:, :1], x), 1), ((y, y), 0)],
            [
                *(((v, v[:1]), 0) for v in EVERY),
                ((y, torch.empty(0, 3)), 0),
                ((torch.empty(0), SPECIAL), 0),
                ((SPECIAL,), 0),
            ],
        ),
        "constant_pad_nd.default": (
            [(x, (1, 2, 3, 0), 0.5), (y, (0, 1), -1)],
            [
                *((v, (1, 2, 0, 1), 1) for v in EVERY),
                *((SPECIAL, (2, 1), value) for value in NUMBERS),
                (INTEGERS, (1, 1), 2**63 - 1),
                (BYTES, (1, 0), 127),
                (x, (), 1.0),
                (EMPTY, (0, 0, 2, 1), math.nan),
                (EMPTY, (1, 1), 3.0),
            ],
        ),
    }


def choices() -> dict[str, tuple[list[Args], list[Args]]]:
    x = plain(3, 4, 5)
    condition = torch.arange(60).reshape(3, 4, 5).remainder(3).bool()
    rows = torch.tensor([[0, 2, 2], [1, 0, 2]])
    return {
        "embedding.default": (
            [(plain(3, 4), rows)],
            [
                (SPECIAL[:60].reshape(3, 20), rows),
                (WILD[0], torch.tensor(2)),
                (torch.ones(0, 4), torch.empty(0, dtype=torch.int64)),
                (torch.ones(3, 0), rows),
                (WILD[0], torch.empty(2, 0, dtype=torch.int64)),
            ],
        ),
        "gather.default": (
            [(plain(3, 4), 1, rows), (plain(3, 4), 0, rows)],
            [
                *((v[..., :3], v.dim() - 1, torch.zeros_like(v[..., :2], dtype=torch.int64) + 2) for v in EVERY),
                (SPECIAL, 0, torch.arange(62, -1, -1)),
                (EMPTY, 0, torch.empty(0, 2, dtype=torch.int64)),
            ],
        ),
        "where.self": (
            [(condition, x, x.flip(0)), (condition[0], plain(5), plain(4, 1))],
            [
                (condition, WILD, WILD.flip(1)),
                (FLAGS, BYTES, BYTES.flip(0)),
                (FLAGS, SHORTS, SHORTS.flip(0)),
                (FLAGS, FLAGS, ~FLAGS),
                (FLAGS[:, None], WORDS[..., :1], WORDS[:, :1, :3]),
                (torch.tensor(True), SPECIAL, SCALAR),
                (torch.empty(0, 1, dtype=torch.bool), EMPTY, SCALAR),
            ],
        ),
    }


def values() -> dict[str, tuple[list[Args], list[Args]]]:
    return {
        "to.dtype": (
            [(random_bits(800, 5), "int64"), (random_bits(100, 5), "bool"), (WORDS * 999_999_937, "float32")],
            [
                *(
                    (v, dtype)
                    for v in (*EVERY, SPECIAL, INTEGERS, EMPTY, SCALAR)
                    for dtype in ("float32", "int64", "bool")
                ),
                (torch.tensor([0.5, 1.5, 2.5, -0.5, -1.99, 2.0**62, -(2.0**62)]), "int64"),
                (2**24 + torch.arange(-9, 9), "float32"),
                (2**60 + torch.arange(-40, 40) * 2**34, "float32"),
            ],
        ),
        "full.default": (
            [((2, 3), 0.3, "float32"), ((4,), 7, "int64")],
            [
                *(((2,), value, "float32") for value in NUMBERS),
                *(((1,), value, "int64") for value in (0, -(2**63) + 1, 2**63 - 1)),
                ((2, 2), 1, "bool"),
                ((), 0, "bool"),
                ((3, 0), 1.0, "float32"),
            ],
        ),
        "arange.start_step": (
            [(0, 10, 1), (3, 40, 7)],
            [(0, 0, 1), (-(2**63) + 1, 2**63 - 1, 2**62), (2**63 - 3, 2**63 - 1, 1), (5, 6, 2**63 - 1), (-3, 3, 2)],
        ),
    }


# --- reductions and products -------------------------------------------------------------------------------
def reductions() -> dict[str, tuple[list[Args], list[Args]]]:
    x = plain(5, 7, 9)
    spread = plain(6, 40) * torch.logspace(-44, 38, 6)[:, None].clamp(1e-45)
    # The largest values cancel, so that the last bit kept of the others, and its ties, are seen in the result.
    half = 2.0**-31
    top, one = 0.99999994, 2 * half
    tie = torch.tensor(
        [[0.75, half, 5 * half, one, -0.75], [top, 3 * half, 3 * half, one, -top], [1, 3 * one, 3 * one, 2 * one, -1]]
    )
    lone = torch.full((3, 30), 2.0**-60)
    lone[:, 11] = torch.tensor([1.0, -(2.0**127), 2.0**-30])
    poisoned = plain(4, 6)
    poisoned[1, 2], poisoned[2, 0], poisoned[3] = math.inf, math.nan, -math.inf
    zeros = torch.tensor([[0.0, -0.0], [-0.0, -0.0], [-0.0, 0.0], [2.0**-149, -(2.0**-149)], [-1.0, -0.0]])
    rows = [spread, spread * 1e-6, tie, lone, poisoned, zeros, torch.full((2, 5), 3.4e38), torch.full((2, 3), -1e-45)]
    over_rows: list[Args] = [(v, (1,), keep) for v in rows for keep in (False, True)]
    others: list[Args] = [(SPECIAL, (0,), False), (WILD, (0, 2), True), (torch.empty(0, 3), (1,), False)]
    others += [(torch.empty(4, 0, 3), (0, 2), True), (SPECIAL.reshape(-1, 1), (1,), False)]
    everywhere: list[Args] = [(x, dims, keep) for dims in ((0,), (2,), (0, 1), (0, 1, 2)) for keep in (False, True)]
    index = torch.tensor([[0, 3, 3, 1], [3, 0, 0, 3]])
    wild = SPECIAL[:40].reshape(2, 4, 5).nan_to_num(1.0, 2.0, -2.0)
    bad = plain(2, 4, 3)
    bad[0, 1, 0], bad[1, 1, 1], bad[0, 3, 2] = math.nan, math.inf, -math.inf
    gradients: list[Args] = [
        (v, index, 6, padding, False) for v in (wild, bad, spread[:, :8].reshape(2, 4, 6)) for padding in (-1, 3, 5)
    ]
    gradients += [
        (torch.full((2, 4, 1), 3e38), index, 4, -1, False),
        (torch.full((2, 4, 2), -0.0), index, 4, -1, False),
        (torch.stack([tie.t(), tie.t()]), torch.tensor([[0, 3, 3, 3, 0], [1, 2, 1, 2, 1]]), 4, -1, False),
        (torch.empty(0, 4), torch.empty(0, dtype=torch.int64), 3, 0, False),
        (torch.empty(3, 0), torch.tensor([0, 2, 2]), 3, -1, False),
        (SPECIAL[:4], torch.tensor(1), 3, -1, False),
        (SPECIAL[:, None], torch.arange(63).remainder(5), 5, -1, False),
    ]
    return {
        "sum.dim_IntList": (everywhere, [*over_rows, *others]),
        "amax.default": (everywhere, [*over_rows, *others]),
        "embedding_dense_backward.default": (
            [(plain(2, 4, 3), index, 5, -1, False), (plain(2, 4, 3), index, 4, 0, False)],
            gradients,
        ),
    }


def products() -> list[tuple[Tensor, Tensor]]:
    """Pairs of matrices at which a quantisation, a scale or an accumulation is at its limit."""
    a, b = plain(9, 13), plain(13, 7, seed=1)
    ties = [
        torch.tensor([[1.0, u, 3 * u, -u, 5 * u, u / 2, 0.75 * u]])
        for u in (2.0**-7, 2.0**-14, 2.0**-15, 2.0**-21, 2.0**-22)
    ]
    top = torch.tensor(
        [
            [0.99999994, 1.0, -0.99999994],
            [0.9999695, -0.9999695, 0.5],
            [127.5 / 128, 126.5 / 128, -127.49 / 128],
            [1 - 2.0**-22, -(1 - 2.0**-23), 0.5 + 2.0**-22],
            [2.0**-149] * 3,
            [3.4028235e38, -3.4028235e38, 1.0],
        ]
    )
    powers = torch.exp2(torch.arange(-149.0, 128.0, 23.0)[:, None]) * torch.tensor([1.0, -0.5, 0.33, 2.0**-14])
    lone = torch.full((3, 40), 2.0**-60)
    lone[:, 11] = torch.tensor([1.0, -(2.0**127), 2.0**-40])
    zeros = torch.zeros(4, 13)
    zeros[1, 3], zeros[2] = -3.0, -0.0
    spoilt_a, spoilt_b = a.clone(), b.clone()
    spoilt_a[3, 4], spoilt_a[7, 0], spoilt_b[9, 5] = math.nan, math.inf, -math.inf
    spoilt_a[5] = 3e38
    wide_a, wide_b = plain(20, 48), plain(48, 40, seed=1)  # wide enough for vectors of a processor
    wide_a[2, 30], wide_a[17, 0], wide_b[0, 1], wide_b[12, 28], wide_b[47, 39] = (math.nan, -math.inf) + (math.nan,) * 3
    ones = torch.full((1, 5000), 0.99)
    ones[0, ::3] = 0.3337
    return [
        *((tie, torch.eye(7)) for tie in ties),
        (top, top.t().contiguous()),
        (powers, powers.t().contiguous()),
        (a * torch.logspace(-44, 38, 9)[:, None].clamp(1e-45), b * torch.logspace(-44, 38, 7).clamp(1e-45)),
        (a * 1e-40, b * 1e-42),
        (a * 1e-20, b * 1e-21),
        (torch.full((2, 3), 2.0**-149), torch.full((3, 2), -(2.0**-149))),
        (a * 8e37, b * 1e-44),
        (a.sign() * 3.4e38, a.sign().t().contiguous() * 3.4e38),
        (lone, plain(40, 6, seed=2)),
        (zeros, b),
        (torch.zeros(2, 3), -torch.zeros(3, 2)),
        (torch.tensor([[1.0, -1.0]]), torch.tensor([[0.3], [0.3]])),
        (torch.tensor([[-0.0]]), torch.tensor([[5.0]])),
        (spoilt_a, b),
        (a, spoilt_b),
        (spoilt_a, spoilt_b),
        (wide_a, wide_b),
        (SPECIAL[:, None], SPECIAL[None, ::5]),
        (ones, ones.t().contiguous()),
        (ones[:, :2049] * 1e-30, ones[:, :2049].t().contiguous()),
        (torch.empty(0, 3), torch.ones(3, 2)),
        (torch.ones(2, 3), torch.empty(3, 0)),
    ]


def _cases() -> dict[str, tuple[list[Args], list[Args]]]:
    found = {**views(), **joins(), **choices(), **values(), **reductions()}
    for name in ("add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge"):
        found[f"{name}.Tensor"] = two_floats(numbers=True, integers=True)
    found["div.Tensor"] = two_floats(numbers=True, integers=False)
    for name in ("maximum.default", "minimum.default"):
        found[name] = two_floats(numbers=False, integers=True)
    for name in ("neg.default", "abs.default"):
        found[name] = one_float(integers=True)
    for name in ("sqrt.default", "reciprocal.default", "sign.default"):
        found[name] = one_float()
    for name, bend in BENDS.items():
        found[f"{name}.default"] = one_float(extra=bend)
    for name in ("logical_and.default", "logical_or.default"):
        found[name] = (
            [(FLAGS, ~FLAGS), (FLAGS, FLAGS)],
            [(FLAGS[:, :1], FLAGS), (FLAGS, torch.tensor(True)), (FLAGS[:0], FLAGS[0]), (FLAGS[0], FLAGS[:, None])],
        )
    found["logical_not.default"] = ([(FLAGS,)], [(torch.tensor(False),), (FLAGS[:0],)])
    found["mm.default"] = ([(plain(9, 13), plain(13, 7, seed=1)), (plain(20, 70), plain(70, 17, seed=1))], products())
    batches: list[Args] = [(torch.stack([a, a.flip(0)]), torch.stack([b, b.flip(1)])) for a, b in products()]
    found["bmm.default"] = (
        [(plain(3, 9, 13), plain(3, 13, 7, seed=1))],
        [*batches, (torch.empty(0, 2, 3), torch.empty(0, 3, 2)), (plain(3, 4, 1), plain(3, 1, 4))],
    )
    keys = [(0, 0), (1, 2), (2**63 - 1, 2**63 - 1), (2**32, 2**32 - 1)]
    found["ichiba.uniform"] = (
        [(torch.tensor([11, 22]), 3, (40, 5))],
        [
            *((torch.tensor(key), number, (9,)) for key in keys for number in (0, 2**31 - 2)),
            (torch.tensor([1, 1]), 0, ()),
            (torch.tensor([1, 1]), 0, (0, 3)),
        ],
    )
    return found


CASES: dict[str, tuple[list[Args], list[Args]]] = _cases()
Layout = Callable[[Tensor], Tensor]


def spread(x: Tensor) -> Tensor:
    """x with a gap behind each element."""
    return torch.stack([x, x.flip(0) if x.dim() else x], dim=-1)[..., 0]


def turned(x: Tensor) -> Tensor:
    """x with its dimensions in the opposite order in memory."""
    order = tuple(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


LAYOUTS: dict[str, Layout] = {"dense": lambda x: x.contiguous(), "spread": spread, "turned": turned}
