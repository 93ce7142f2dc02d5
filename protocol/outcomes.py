"""How money that somebody forfeits is divided. DESIGN §7 and §8.

Whoever loses pays first the costs of those who were right: what the submitter had paid for wrong work, what the winner
metered, what the referees metered. Of the rest at least half burns, so that losing on purpose to a friend costs at
least a quarter of what was at stake, and challenging oneself never pays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol import params
from protocol.network import Rules
from protocol.records import Agreement, amount_for

__all__ = ["FAULT", "LOCK", "STAKE", "Split", "jackpot_micro", "referee_fee_micro"]


@dataclass(frozen=True)
class Split:
    """Shares in permille of what is left of a forfeited amount after costs; what rounding leaves burns."""

    winner: int = 0
    submitter: int = 0
    pool: int = 0

    @property
    def burned(self) -> int:
        """The rest."""
        return 1000 - self.winner - self.submitter - self.pool


LOCK: Final = Split(winner=250, submitter=250)  # a solver whose work was wrong
STAKE: Final = Split(pool=500)  # a challenger that was wrong: false challenges fill the pool of the jackpots
FAULT: Final = Split(pool=500)  # a checker that signed for work that was wrong, or missed an ordered error


def referee_fee_micro(operations: int, agreement: Agreement) -> int:
    """What one notary gets for a dispute: its metered operations, bounded, at the deal's price."""
    return amount_for(min(operations, params.REFEREE_OPERATIONS_MAX), agreement.unit_price)


def jackpot_micro(agreement: Agreement, rules: Rules, pool_micro: int) -> int:
    """What who finds an ordered error gets: jackpot_permille of the deal's price, over how often one is ordered, as
    far as the pool reaches. A check meets the error with the share of the work that it re-executes, so a checker
    expects jackpot_permille of its costs from jackpots alone, whatever the rate."""
    if not rules.forced_ppm:
        return 0
    price_micro = amount_for(agreement.operations, agreement.unit_price)
    wanted = price_micro * rules.jackpot_permille * 1000 // rules.forced_ppm
    return min(wanted, pool_micro)
