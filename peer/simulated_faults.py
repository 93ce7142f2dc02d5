"""What goes wrong in a simulated swarm, drawn from one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

__all__ = ["SECOND", "Faults"]

SECOND: Final = 10**9


@dataclass(frozen=True)
class Faults:
    """What goes wrong, until `until_ns` after the start. Shares of messages, or of handled events."""

    loss: float = 0.0
    duplication: float = 0.0
    delay_ns_max: int = 50_000_000
    crash: float = 0.0
    until_ns: int = 60 * SECOND

    @classmethod
    def drawn_from(cls, seed: int) -> Faults:
        """Faults of a strength the seed decides, from a calm network to a very bad one."""
        rng = random.Random(seed)
        return cls(
            loss=rng.choice((0.0, 0.02, 0.1, 0.3)),
            duplication=rng.choice((0.0, 0.05, 0.3)),
            delay_ns_max=rng.choice((10_000_000, 200_000_000, 3 * SECOND)),
            crash=rng.choice((0.0, 0.0, 0.002, 0.01)),
        )
