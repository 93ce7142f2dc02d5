"""Which segments are checked, and by whom: a function of randomness that no party chose alone. DESIGN §5.5."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from protocol import params
from protocol.codec import blake
from protocol.errors import LocalProtocolError, VerificationFailed

__all__ = [
    "check_reveal",
    "checker_weight",
    "commitment",
    "draw",
    "draw_weighted",
    "mixed",
    "randomness",
    "select_segments",
]


def commitment(seed: bytes, *, agreement_salt: bytes) -> bytes:
    """What a party publishes before it may reveal `seed`. The salt (its own key) stops copied commitments."""
    return blake("ichiba/seed-commitment", agreement_salt, seed)


def check_reveal(seed: bytes, committed: bytes, *, agreement_salt: bytes) -> None:
    """Raise VerificationFailed unless `seed` is the one committed to."""
    if commitment(seed, agreement_salt=agreement_salt) != committed:
        raise VerificationFailed("revealed seed does not match its commitment", why="it was chosen after the proof")


def randomness(*, proof: bytes, submitter_seed: bytes, solver_seed: bytes) -> bytes:
    """32 bytes from the proof and both seeds. A party that does not reveal forfeits its say: its seed is empty."""
    return blake("ichiba/randomness", proof, submitter_seed, solver_seed)


def mixed(seeds: bytes, beacon: bytes) -> bytes:
    """The randomness of a draw, 32 bytes: that of `randomness`, mixed with the beacon that notaries gave for it, so
    that a submitter and a solver in league do not choose it either. Without a beacon it is `seeds`."""
    return blake("ichiba/mixed-randomness", seeds, beacon) if beacon else seeds


def _uniform(random: bytes, label: bytes, index: int, below: int) -> int:
    """An integer below `below`; the bias of reducing 256 bits is under 2^-192 for any count used here."""
    return int.from_bytes(blake("ichiba/draw", random, label, index.to_bytes(8, "little")), "little") % below


def draw(random: bytes, label: bytes, candidates: Sequence[bytes]) -> list[bytes]:
    """`candidates` in an order decided by `random` (Fisher-Yates over the sorted list)."""
    order = sorted(set(candidates))
    for i in range(len(order) - 1, 0, -1):
        j = _uniform(random, label, i, i + 1)
        order[i], order[j] = order[j], order[i]
    return order


def checker_weight(stake_micro: int, *, stake_min_micro: int, carded: bool) -> int:
    """How often a checker is drawn, in proportion: its stake, of which `params.CHECKER_STAKES_MAX` times the least one
    counts, so that one whale does not judge everything; half of it for a peer without a valid bench card.

    Proportional below the cap, so that splitting a stake among many names is no gain. 0: it has less than the least.
    """
    if stake_micro < stake_min_micro:
        return 0
    counted = min(stake_micro, max(1, stake_min_micro) * params.CHECKER_STAKES_MAX)
    return max(1, counted) * (2 if carded else 1)


def draw_weighted(random: bytes, label: bytes, weights: Mapping[bytes, int]) -> Iterator[bytes]:
    """The keys of `weights` one after another, each with a chance in proportion to its weight among those left.

    weights: whole numbers from 1 up. The same weights give the same order, however they are listed. One draw costs the
    number of keys left, so take as many as are needed. Raises LocalProtocolError for a weight that is no such number.
    """
    if bad := [key for key, weight in weights.items() if type(weight) is not int or weight < 1]:
        raise LocalProtocolError(f"a candidate of weight {weights[bad[0]]!r}, it is a whole number from 1 up")
    left = sorted(weights)
    for index in range(len(left)):
        ends = list(accumulate(weights[key] for key in left))
        yield left.pop(bisect_right(ends, _uniform(random, label, index, ends[-1])))


def select_segments(random: bytes, *, first: int, last: int, permille: int, minimum: int) -> tuple[int, ...]:
    """The segments of [first, last) to re-execute, ascending: max(minimum, rate), without replacement.

    Never a function of the size of an update: a solver that cheats a little must be as likely caught.
    """
    count = last - first
    wanted = min(count, max(minimum, -(-count * permille // 1000)))
    chosen: list[int] = []
    pool = list(range(first, last))
    for i in range(wanted):
        chosen.append(pool.pop(_uniform(random, b"segments", i, len(pool))))
    return tuple(sorted(chosen))
