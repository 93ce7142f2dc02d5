"""Random numbers that any peer derives alone: Philox 4x32-10, a counter-based generator. DESIGN §4.

A draw is a pure function of (seed, step, stream, index): nothing is carried from one draw to the next, so a
referee recomputes the batch of step 9,000,000 without the steps before it. Integers only: the same words on
every machine. It refuses to know what a stream number means; callers agree on that.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), §5.3; known
answers in the Random123 library's `kat_vectors`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from protocol import params
from protocol.errors import LocalProtocolError

__all__ = ["blocks", "integers", "words"]

_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = 10
_MASK: Final = np.uint64(0xFFFFFFFF)
_SHIFT: Final = np.uint64(32)
_LANE_BLOCKS: Final = 8192  # six working arrays of 64 KiB stay inside a 1 MiB second-level cache


def _bounded(name: str, value: int, below: int) -> int:
    if not 0 <= value < below:
        raise LocalProtocolError(f"generator {name} {value} is not in [0, {below})")
    return value


def blocks(counter: NDArray[np.uint64], key: tuple[int, int]) -> None:
    """Ten rounds of Philox 4x32, in place.

    counter: uint64 (4, n), each value below 2**32; on return it holds the n output blocks, word by word.
    key: two 32-bit words.
    """
    c0, c1, c2, c3 = (counter[i].copy() for i in range(4))
    high0, high1 = np.empty_like(c0), np.empty_like(c0)
    k0, k1 = key
    for _ in range(_ROUNDS):
        np.multiply(c0, _MULTIPLIERS[0], out=c0)  # product 0: c0 now holds hi:lo
        np.multiply(c2, _MULTIPLIERS[1], out=c2)  # product 1
        np.right_shift(c0, _SHIFT, out=high0)
        np.right_shift(c2, _SHIFT, out=high1)
        high1 ^= c1
        high1 ^= np.uint64(k0)
        high0 ^= c3
        high0 ^= np.uint64(k1)
        c0 &= _MASK
        c2 &= _MASK
        # New words (hi1^c1^k0, lo1, hi0^c3^k1, lo0); the arrays trade places instead of being copied.
        c0, c1, c2, c3, high0, high1 = high1, c2, high0, c0, c1, c3
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    counter[0], counter[1], counter[2], counter[3] = c0, c1, c2, c3


def words(seed: int, step: int, stream: int, count: int) -> NDArray[np.uint32]:
    """`count` random 32-bit words, uint32 (count,).

    The key is the 64-bit `seed`, low word first; the counter is (block index, stream, step low, step high).
    A longer draw begins with the shorter one. Raises LocalProtocolError for a seed or step outside 64 bits, a
    stream outside 32 bits or a count above 2**34.
    """
    key = _bounded("seed", seed, 2**64)
    _bounded("step", step, 2**64)
    _bounded("stream", stream, 2**32)
    _bounded("count", count, params.RANDOM_WORDS_MAX + 1)
    total = -(-count // 4)
    out = np.empty((total, 4), dtype="<u4")
    lane = np.empty((4, min(total, _LANE_BLOCKS)), dtype=np.uint64)
    for first in range(0, total, _LANE_BLOCKS):
        last = min(first + _LANE_BLOCKS, total)
        counter = lane[:, : last - first]
        counter[0] = np.arange(first, last, dtype=np.uint64)
        counter[1] = stream
        counter[2] = step & 0xFFFFFFFF
        counter[3] = step >> 32
        blocks(counter, (key & 0xFFFFFFFF, key >> 32))
        out[first:last] = counter.T
    return out.reshape(-1)[:count]


def integers(seed: int, step: int, stream: int, count: int, below: int) -> NDArray[np.int64]:
    """`count` integers in [0, below), int64 (count,).

    Each is the high half of (64 random bits) * below, the random bits being two successive words, low first.
    No value is more likely than another by more than below / 2**64 of its probability: under 2**-24 for the
    longest array a task may name. Source: Lemire, "Fast random integer generation in an interval" (2019), §3,
    without the rejection step, which would make the number of words drawn depend on their values.
    Raises LocalProtocolError for `below` outside [1, 2**63).
    """
    if not 1 <= below < 2**63:
        raise LocalProtocolError(f"cannot draw integers below {below}", next_step="give at least one row of data")
    drawn = words(seed, step, stream, 2 * count).astype(np.uint64).reshape(count, 2)
    low, high = drawn[:, 0], drawn[:, 1]
    below_low, below_high = np.uint64(below & 0xFFFFFFFF), np.uint64(below >> 32)
    # The schoolbook 64 x 64 -> 128-bit product, of which the high 64 bits are kept; no partial sum overflows.
    middle = high * below_low + ((low * below_low) >> _SHIFT)
    cross = low * below_high + (middle & _MASK)
    result: NDArray[np.uint64] = high * below_high + (middle >> _SHIFT) + (cross >> _SHIFT)
    return result.astype(np.int64)
