"""The generator by scalars: Philox 4x32-10, the batch of a step, uniform and normal draws. docs/exact.md, "Random".

protocol/philox.py draws whole arrays of the same words; this module draws one, as a referee would.
"""

from __future__ import annotations

from protocol.errors import MalformedRecord
from protocol.operations import TensorType
from protocol.program import INIT_STREAM, NODE_STREAM
from protocol.reference_elementary import horner, log
from protocol.reference_movement import Array, Element, Rule, number
from protocol.softfloat import BINARY32, BINARY64

__all__ = ["RANDOM", "initial", "integer", "normal", "normal_of", "rate", "uniform", "word"]

_ADD, _SUB, _MUL, _DIV = BINARY32.add, BINARY32.subtract, BINARY32.multiply, BINARY32.divide
_BILLION = 0x41CDCD6500000000  # 1e9 as binary64


def word(seed: int, step: int, stream: int, index: int) -> int:
    """Word `index` of the draw (seed, step, stream): a 32-bit integer."""
    block, lane = divmod(index, 4)
    c0, c1, c2, c3 = block, stream, step % 2**32, step >> 32
    k0, k1 = seed % 2**32, seed >> 32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return (c0, c1, c2, c3)[lane]


def integer(seed: int, step: int, stream: int, index: int, below: int) -> int:
    """Integer `index` of a draw in [0, below): the row or the window start of a batch."""
    low, high = word(seed, step, stream, 2 * index), word(seed, step, stream, 2 * index + 1)
    return (high << 32 | low) * below >> 64


def uniform(seed: int, step: int, stream: int, index: int) -> int:
    """float32: the upper 24 bits of the word, times 2**-24."""
    return BINARY32.rounded(word(seed, step, stream, index) >> 8, -24)


_CENTRE = (
    (0x426C7000, 0x431F4A88, 0x4249BCB2, 0x4058C6C8),
    (0x42866008, 0x429D83F9, 0x418F294F, 0x3F800000),
)
_TAIL = ((0x3E2E52ED, 0x3FA742E1, 0x40306FAA, 0x3FB63331), (0x3DF6315C, 0x3F3CAC24, 0x3F800000))
_FAR_TAIL = ((0x3C8E06C1, 0x3EDB7C55, 0x404532D0, 0x40D50D8F), (0x3C48D6A1, 0x3E77C954, 0x3F800000))
_HALF, _CENTRE_MAX, _CENTRE_SQUARE = 0x3F000000, 0x3ED9999A, 0x3E38F5C3  # 0.5, 0.425, 0.180625
_NEAR, _FAR = 0x3FCCCCCD, 0x40A00000  # 1.6 and 5


def _ratio(x: int, polynomials: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
    return _DIV(horner(BINARY32, x, polynomials[0]), horner(BINARY32, x, polynomials[1]))


def normal(seed: int, step: int, stream: int, index: int) -> int:
    """float32: element `index` of a normal draw of mean 0 and deviation 1."""
    return normal_of(word(seed, step, stream, index))


def normal_of(drawn: int) -> int:
    """float32: the inverse of the normal distribution at (k + 1/2) * 2**-23, k the upper 23 bits of the word."""
    p = BINARY32.rounded(2 * (drawn >> 9) + 1, -24)
    q = _SUB(p, _HALF)
    if not BINARY32.less(_CENTRE_MAX, BINARY32.magnitude(q)):
        r = _SUB(_CENTRE_SQUARE, _MUL(q, q))
        top = _MUL(horner(BINARY32, r, _CENTRE[0]), q)
        return _DIV(top, horner(BINARY32, r, _CENTRE[1]))
    other = _SUB(BINARY32.one, p)
    tail = BINARY32.square_root(BINARY32.negated(log(p if BINARY32.less(p, other) else other)))
    if BINARY32.less(_FAR, tail):
        z = _ratio(_SUB(tail, _FAR), _FAR_TAIL)
    else:
        z = _ratio(_SUB(tail, _NEAR), _TAIL)
    return BINARY32.negated(z) if q & BINARY32.sign else z


def rate(nano: int) -> int:
    """The learning rate of a step as float32, from its integer in units of 1e-9 (protocol.task.learning_rate)."""
    return BINARY64.convert(BINARY64.divide(BINARY64.from_int(nano), _BILLION), BINARY32)


def initial(kind: str, a: float, b: float, *, seed: int, tensor: int, index: int) -> int:
    """Element `index` of float32 state tensor number `tensor`, in the order of names, before step 0.

    kind, a, b: its init rule, as protocol.program.Init says.
    """
    stream = INIT_STREAM + tensor
    if kind == "constant":
        return number(a, "float32")
    if kind == "normal":
        return _ADD(_MUL(normal(seed, 0, stream, index), number(b, "float32")), number(a, "float32"))
    return _ADD(_MUL(uniform(seed, 0, stream, index), number(b - a, "float32")), number(a, "float32"))


def _uniform(result: TensorType, step_key: Array, node: int, shape: tuple[int, ...]) -> Element:
    seed, step = step_key.elements
    if min(seed, step) < 0:
        raise MalformedRecord(f"a step key of {seed} and {step}, which are not below 2**63 and positive")
    return lambda index: uniform(seed, step, NODE_STREAM + node, index)


RANDOM: dict[str, Rule] = {"ichiba.uniform": _uniform}
