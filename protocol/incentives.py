"""The inequalities of DESIGN §8, and the rates and stakes that follow from them. Exact: integers and fractions.

Amounts of the inequalities are in units of a deal's price unless their name says micro. A fraud that touches one
segment is the hard one to find: it is exposed with the share of segments that are re-executed. One that touches all is
always exposed, for no deal is without a check. docs/decisions/0008 says why the rates are as they are.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from protocol import params

if TYPE_CHECKING:
    from protocol.network import Rules

__all__ = [
    "check_rate",
    "checking_margin",
    "collusion_break_even",
    "collusion_profit",
    "exposure",
    "false_positive_bound",
    "lock_needed",
    "margins",
    "rate_of_deal",
    "stake_needed",
    "stake_per_price",
]


# --- the inequalities --------------------------------------------------------------------------------------
def exposure(checked: Fraction, *, caught: Fraction, rechecked: Fraction, found: Fraction) -> Fraction:
    """P = p[a + (1-a)wd]: the chance that a fraud is exposed.

    checked p: that it lies in what is re-executed. caught a: that the check exposes it. rechecked w: that the verdict
    is checked again. found d: that this exposes it. Source: DESIGN §8.
    """
    return checked * (caught + (1 - caught) * rechecked * found)


def stake_needed(*, gain: Fraction, reward: Fraction, exposed: Fraction) -> Fraction:
    """S = ((c-h)+G)/P - R: a solver with more than this at stake loses by cheating; never below 0.

    gain: what faking saves, c - h, and the outside gain G. Source: DESIGN §8.
    """
    return max(Fraction(0), gain / exposed - reward)


def checking_margin(
    *, forced: Fraction, found: Fraction, jackpot: Fraction, stake: Fraction, cost: Fraction
) -> Fraction:
    """f*d*(J + S_v) / C_v: above 1 a verifier earns more by checking than by signing unseen. Source: DESIGN §8.

    found: the chance that the check of a deal with an ordered error meets it: the error's segment must be drawn.
    """
    return forced * found * (jackpot + stake) / cost


def false_positive_bound(*, reward: Fraction, cost: Fraction, checked: Fraction, stake: Fraction) -> Fraction:
    """(R-c)/(p(R+S)): the rate of false positives at which an honest solver earns nothing. Source: DESIGN §8."""
    return (reward - cost) / (checked * (reward + stake))


def collusion_profit(
    share: Fraction, *, gain: Fraction, checked: Fraction, stake: Fraction, verifier: Fraction, audited: Fraction,
    watched: Fraction,
) -> Fraction:  # fmt: skip
    """What a coalition gains by one false segment, in prices: solver, and `share` of all verifiers and whistleblowers.

    The drawn verifier is the coalition's with probability `share`, and signs unseen. Its verdict is checked again by a
    drawn auditor with probability `audited`, which looks at this segment and is the coalition's in `share` of cases,
    and by an open whistleblower outside the coalition with probability `watched`. Exposed, the coalition loses the
    price and `stake`, and `verifier` if its verifier signed.
    """
    again = 1 - (1 - audited * (1 - share)) * (1 - watched)
    exposed = checked * ((1 - share) + share * again)
    return gain - exposed * (1 + stake) - checked * share * again * verifier


def collusion_break_even(
    *, gain: Fraction, checked: Fraction, stake: Fraction, verifier: Fraction, audited: Fraction, watched: Fraction
) -> Fraction:
    """The least share of checkers with which a coalition profits, to a millionth; 1 if none does."""
    for_share = {
        "gain": gain, "checked": checked, "stake": stake, "verifier": verifier, "audited": audited, "watched": watched,
    }  # fmt: skip
    low, high = 0, 1_000_000
    if collusion_profit(Fraction(1), **for_share) <= 0:
        return Fraction(1)
    while low < high:
        middle = (low + high) // 2
        if collusion_profit(Fraction(middle, 1_000_000), **for_share) > 0:
            high = middle
        else:
            low = middle + 1
    return Fraction(low, 1_000_000)


# --- what follows for a deal -------------------------------------------------------------------------------
def check_rate(rules: Rules, streak: int) -> int:
    """The permille of a deal's segments that are re-executed, after `streak` valid deals in a row. Never 0.

    A newcomer's rate below NEWCOMER_DEALS, then 1/streak, at least check_permille. Source: DESIGN §8, BOINC.
    """
    if streak < params.NEWCOMER_DEALS:
        return rules.newcomer_permille
    return min(rules.newcomer_permille, max(rules.check_permille, -(-1000 // streak)))


def stake_per_price(rules: Rules, permille: int) -> Fraction:
    """The stake that makes cheating pay nothing at this rate, in prices of the deal. Without the margin."""
    gain = Fraction(rules.gain_permille, 1000)
    one = stake_needed(gain=gain, reward=Fraction(1), exposed=Fraction(permille, 1000))
    # Everything faked: the whole price is saved, and the chance to be found is 1.
    return max(one, stake_needed(gain=1 + gain, reward=Fraction(1), exposed=Fraction(1)))


def lock_needed(rules: Rules, price_micro: int, permille: int) -> int:
    """The stake that a solver locks on work of this price, checked at this rate: margin included, rounded up."""
    lock = price_micro * stake_per_price(rules, permille) * rules.lock_margin_permille / 1000
    return -(-lock.numerator // lock.denominator)


def rate_of_deal(rules: Rules, *, price_micro: int, lock_micro: int, streak: int) -> int:
    """The rate of a deal: what the solver's history allows, and no lower than what its lock covers.

    So a solver of good standing whose stake is short is checked more, instead of having no work.
    """
    covered = Fraction(rules.lock_margin_permille, 1000) * price_micro
    by_lock = rules.gain_permille * covered / (lock_micro + covered) if covered else Fraction(0)
    least = -(-by_lock.numerator // by_lock.denominator)
    return min(1000, max(check_rate(rules, streak), least))


def margins(rules: Rules) -> dict[str, Fraction]:
    """Each inequality's right side over its left (or left over right), by name: below 1 it is violated.

    solver: what is locked over what must be, at the two ends of the rates. verifier: what an unseen signature loses
    over what it saves, jackpots alone, with its stake counted as nothing. pool: what fees bring over what jackpots
    take, at the rate of good standing. honest: the bearable rate of false positives over the one assumed.
    """
    price = 10**9
    rates = {"good standing": rules.check_permille, "newcomer": rules.newcomer_permille}
    found: dict[str, Fraction] = {}
    for who, rate in rates.items():
        need = stake_per_price(rules, rate)
        stake = Fraction(lock_needed(rules, price, rate), price)
        found[f"solver, {who}"] = stake / need if need else Fraction(rules.lock_margin_permille, 1000)
        bound = false_positive_bound(
            reward=Fraction(1),
            cost=1 - Fraction(params.PROFIT_ASSUMED_PERMILLE, 1000),
            checked=Fraction(1),
            stake=stake,
        )
        found[f"honest, {who}"] = bound * 1_000_000 / params.FALSE_POSITIVES_ASSUMED_PPM
    if rules.forced_ppm:
        drawn, forced = Fraction(rules.check_permille, 1000), Fraction(rules.forced_ppm, 1_000_000)
        jackpot = Fraction(rules.jackpot_permille, 1000) / forced  # in prices of the deal: protocol.outcomes
        found["verifier"] = checking_margin(forced=forced, found=drawn, jackpot=jackpot, stake=Fraction(0), cost=drawn)
        if jackpot:
            found["pool"] = Fraction(rules.pool_permille, 1000) / (forced * drawn * jackpot)
    return found
