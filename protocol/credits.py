"""Credits as people write them, micro-credits as everything computes them: 1 credit is 1,000,000 micro-credits.

Exact both ways and free of floats: what is printed reads back to the same integer.
"""

from __future__ import annotations

import re
from typing import Final

from protocol import params
from protocol.errors import MalformedRecord

__all__ = ["credits_of", "micro_of"]

_AMOUNT: Final = re.compile(r"(0|[1-9][0-9]{0,8})(?:\.([0-9]{1,6}))?", re.ASCII)


def credits_of(micro: int) -> str:
    """`micro` as credits, with at least two decimals and no more than it needs: 1.50, -0.000001."""
    whole, part = divmod(abs(micro), params.MICRO_PER_CREDIT)
    decimals = f"{part:06d}".rstrip("0").ljust(2, "0")
    return f"{'-' if micro < 0 else ''}{whole}.{decimals}"


def micro_of(text: str) -> int:
    """Micro-credits from text such as 12, 12.5 or 0.000001. Raises MalformedRecord for anything else."""
    found = _AMOUNT.fullmatch(text)
    if found is None:
        raise MalformedRecord(
            f"{text[:40]!r} is no amount of credits", next_step="write it like 12.50, with at most six decimals"
        )
    return int(found[1]) * params.MICRO_PER_CREDIT + int((found[2] or "").ljust(6, "0"))
