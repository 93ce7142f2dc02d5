"""The generator that every peer derives batches, masks and initial weights from."""

from __future__ import annotations

import numpy as np
import pytest

from protocol import philox
from protocol.errors import LocalProtocolError

# Random123, tests/kat_vectors, philox4x32 10: counter, key, expected block.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_blocks_give_the_published_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    state = np.array([counter], dtype=np.uint64).T.copy()
    philox.blocks(state, key)
    assert tuple(int(word) for word in state[:, 0]) == expected


def test_words_lay_out_key_and_counter_as_documented() -> None:
    # Block 0 of stream 0 at step 0 under seed 0 is the first known answer.
    assert philox.words(0, 0, 0, 4).tolist() == list(KNOWN_ANSWERS[0][2])
    seed, step, stream = 0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3
    state = np.array([[5, stream, step & 0xFFFFFFFF, step >> 32]], dtype=np.uint64).T.copy()
    philox.blocks(state, (seed & 0xFFFFFFFF, seed >> 32))
    assert philox.words(seed, step, stream, 24)[20:].tolist() == state[:, 0].tolist()


def test_a_longer_draw_begins_with_the_shorter_one_across_lanes() -> None:
    longer = philox.words(7, 3, 2, 4 * 8192 + 9)
    for count in (0, 1, 5, 4 * 8192 - 1, 4 * 8192 + 1):
        assert np.array_equal(philox.words(7, 3, 2, count), longer[:count])


def test_seed_step_and_stream_each_change_the_words() -> None:
    drawn = {
        philox.words(*at, 4).tobytes()
        for at in [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1 << 32, 1), (1 << 32, 1, 1)]
    }
    assert len(drawn) == 6


@pytest.mark.parametrize("below", [1, 2, 7, 1000, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 12345, 2**63 - 1])
def test_integers_are_the_high_half_of_the_exact_product(below: int) -> None:
    raw = [int(word) for word in philox.words(11, 22, 33, 200)]
    expected = [((raw[2 * i] | raw[2 * i + 1] << 32) * below) >> 64 for i in range(100)]
    got = philox.integers(11, 22, 33, 100, below)
    assert got.dtype == np.int64
    assert got.tolist() == expected


def test_integers_are_spread_evenly() -> None:
    counts = np.bincount(philox.integers(5, 0, 0, 100_000, 10), minlength=10)
    chi_squared = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert chi_squared < 27.9  # the 0.1 % point for 9 degrees of freedom


@pytest.mark.parametrize(
    "bad", [(-1, 0, 0, 1), (2**64, 0, 0, 1), (0, -1, 0, 1), (0, 0, 2**32, 1), (0, 0, 0, -1), (0, 0, 0, 2**34 + 1)]
)
def test_arguments_out_of_range_are_refused(bad: tuple[int, int, int, int]) -> None:
    with pytest.raises(LocalProtocolError):
        philox.words(*bad)


@pytest.mark.parametrize("below", [0, -3, 2**63])
def test_an_empty_or_oversize_range_is_refused(below: int) -> None:
    with pytest.raises(LocalProtocolError):
        philox.integers(0, 0, 0, 1, below)
