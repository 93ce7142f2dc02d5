"""One line that says where the money of a deal or a job stands, the same from a running peer and from a proof.

earned: what receipts with both signatures come to. accepted: the part of it whose drawn segments were found right.
settled: what closed channels paid. spendable: what of that is free in solvers' hands, the pool's slice taken off. Whole
micro-credits. Refuses to know peers and records: callers say what they have seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.credits import credits_of

__all__ = ["MoneyLine", "pool_slice"]


@dataclass(frozen=True)
class MoneyLine:
    """See the module docstring."""

    earned_micro: int = 0
    accepted_micro: int = 0
    settled_micro: int = 0
    spendable_micro: int = 0

    def __add__(self, other: MoneyLine) -> MoneyLine:
        return MoneyLine(
            self.earned_micro + other.earned_micro,
            self.accepted_micro + other.accepted_micro,
            self.settled_micro + other.settled_micro,
            self.spendable_micro + other.spendable_micro,
        )

    def words(self) -> str:
        """The line, in credits."""
        return (
            f"earned {credits_of(self.earned_micro)}, accepted {credits_of(self.accepted_micro)}, settled "
            f"{credits_of(self.settled_micro)}, spendable {credits_of(self.spendable_micro)} credits"
        )


def pool_slice(paid_micro: int, *, pool_permille: int, judged: bool) -> int:
    """What of a solver's pay goes to the jackpot pool, rounded down. judged: notaries may judge the work."""
    return paid_micro * pool_permille // 1000 if judged else 0
