"""Which segments are checked, and by whom: a function of randomness that no party chose alone. DESIGN §5.5."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.codec import blake
from protocol.errors import VerificationFailed

__all__ = ["check_reveal", "commitment", "draw", "randomness", "select_segments"]


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
