"""A market of thousands of peers that copy what pays: does honesty spread where the inequalities say so?

Solvers, verifiers and whistleblowers play the deals of one round after another; the money of each outcome is that of
protocol/outcomes.py. Everybody sees what every strategy earns, as the settlement log shows it, and now and then a peer
meets another of its role and takes over its strategy if that earns more (imitation). Amounts are in prices of a deal.
The same settings and seed give the same result. Not modelled: see docs/economics.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from protocol import params
from protocol.incentives import stake_per_price
from protocol.network import Rules
from protocol.outcomes import LOCK

__all__ = [
    "CALM_SOLVERS",
    "CALM_VERIFIERS",
    "SOLVERS",
    "VERIFIERS",
    "Economy",
    "Outcome",
    "Settings",
    "coalition_profit",
]

Floats = NDArray[np.float64]
Kinds = NDArray[np.int64]

# Solvers: one segment false for an outside gain, half of the work not done, nothing done, one segment false in the hope
# of a friend among the verifiers. Verifiers: sign "right" unseen, accuse everybody, sign for friends unseen.
SOLVERS: Final = ("honest", "one false segment", "half faked", "all faked", "colluding")
VERIFIERS: Final = ("honest", "lazy", "false accuser", "colluding")
HONEST, ONE, HALF, ALL, FRIEND = range(5)
CHECKS, LAZY, ACCUSER, COLLUDES = range(4)
SOLVER_MIX: Final = (0.60, 0.10, 0.10, 0.10, 0.10)
VERIFIER_MIX: Final = (0.85, 0.05, 0.05, 0.05)
# Without frauds only ordered errors keep verifiers at work: the mix that f*J alone decides.
CALM_SOLVERS: Final = (1.0, 0.0, 0.0, 0.0, 0.0)
CALM_VERIFIERS: Final = (0.5, 0.5, 0.0, 0.0)
CHECK_COST: Final = 1 - params.PROFIT_ASSUMED_PERMILLE / 1000  # of what work is paid, its cost: of checks the same
DEALS: Final = 20  # of one solver in one round
REVISE: Final = 0.10  # of the peers, in one round
MEMORY: Final = 0.95  # how much of the earnings seen so far is kept from round to round
BRIBE: Final = 0.25  # of the outside gain, to the friend that signs


@dataclass(frozen=True)
class Settings:
    """One economy. Shares in permille of what the inequality asks: 1100 is 1.1 times.

    stake_permille: of the least stake of a solver. checking_permille: of what makes checking pay, the jackpot and the
    verifier's stake together. forced_ppm None: the rules'. solver_mix, verifier_mix: shares at the start.
    """

    peers: int = 4000
    rounds: int = 150
    seed: int = 0
    stake_permille: int = 2000
    checking_permille: int = 2000
    segments: int = 40
    forced_ppm: int | None = None
    solver_mix: tuple[float, ...] = SOLVER_MIX
    verifier_mix: tuple[float, ...] = VERIFIER_MIX
    rules: Rules = field(default_factory=Rules)


@dataclass
class Outcome:
    """How it ended. Shares of each strategy; `path`: the honest share of solvers and of verifiers after each round."""

    solvers: dict[str, float]
    verifiers: dict[str, float]
    whistleblowers: int
    overhead: float  # operations re-executed over operations of the work, in the last round
    false_deals_paid: float  # deals of the last round that were paid although something in them was false
    path: list[tuple[float, float]] = field(default_factory=list)


class Economy:
    """The peers of one market, and `play`, which runs all rounds."""

    def __init__(self, settings: Settings) -> None:
        rules = settings.rules
        self.settings = settings
        self.rng = np.random.default_rng(settings.seed)
        solvers, verifiers = settings.peers // 2, settings.peers * 3 // 10
        self.solver = self._mixed(settings.solver_mix, solvers)
        self.verifier = self._mixed(settings.verifier_mix, verifiers)
        self.watchers_max = settings.peers - solvers - verifiers
        self.watchers = self.watchers_max // 2  # whistleblowers in the market now
        self.drawn = -(-settings.segments * rules.check_permille // 1000)
        self.checked = self.drawn / settings.segments
        needed = stake_per_price(rules, -(-1000 * self.drawn // settings.segments))
        self.stake = float(needed * Fraction(settings.stake_permille, 1000))
        self.gain = (
            rules.gain_permille / 1000 - CHECK_COST / settings.segments
        )  # what one false segment brings from outside
        self.forced = (rules.forced_ppm if settings.forced_ppm is None else settings.forced_ppm) / 1e6
        self.verifier_stake = 1.0
        # f*d*(J + S_v) = checking * C_v, where S_v is lost only if somebody looks again.
        cost = self.checked * CHECK_COST
        wanted = settings.checking_permille / 1000 * cost / (self.forced * self.checked)
        self.jackpot = max(0.0, wanted - rules.audit_permille / 1000 / self.drawn * self.verifier_stake)
        self.earned = [np.zeros(len(SOLVERS)), np.zeros(len(VERIFIERS))]
        self.weight = [np.zeros(len(SOLVERS)), np.zeros(len(VERIFIERS))]
        self.watch = 0.0  # what one look at a right verdict brought, on average, less its cost

    def _mixed(self, mix: tuple[float, ...], count: int) -> Kinds:
        """Exact shares, in a random order; what rounding leaves is of the first strategy."""
        kinds = np.zeros(count, dtype=np.int64)
        at = 0
        for kind, share in enumerate(mix[1:], 1):
            number = int(share * count)
            kinds[at : at + number] = kind
            at += number
        self.rng.shuffle(kinds)
        return kinds

    def play(self, on_round: Callable[[int], None] = lambda _: None) -> Outcome:
        """Every round: deals, earnings, imitation, and whistleblowers that come and go."""
        path: list[tuple[float, float]] = []
        last: tuple[float, float] = (0.0, 0.0)
        for number in range(self.settings.rounds):
            last = self._round()
            self.solver = self._imitate(self.solver, 0)
            self.verifier = self._imitate(self.verifier, 1)
            self._come_and_go()
            path.append((float(np.mean(self.solver == HONEST)), float(np.mean(self.verifier == CHECKS))))
            on_round(number + 1)
        return Outcome(
            solvers=_shares(self.solver, SOLVERS),
            verifiers=_shares(self.verifier, VERIFIERS),
            whistleblowers=self.watchers,
            overhead=last[0],
            false_deals_paid=last[1],
            path=path,
        )

    def _round(self) -> tuple[float, float]:
        """DEALS deals of every solver, each with a drawn verifier. Returns the overhead, and the share of deals that
        were paid though false."""
        rng, count, segments = self.rng, len(self.solver) * DEALS, self.settings.segments
        kind = np.repeat(self.solver, DEALS)
        judge = self.verifier[rng.integers(len(self.verifier), size=count)]
        false = np.array([0.0, 1 / segments, 0.5, 1.0, 1 / segments])[kind]
        ordered = (kind == HONEST) & (rng.random(count) < self.forced)
        one = ordered | (kind == ONE) | (kind == FRIEND)
        # Whether something wrong was drawn; and whether one drawn segment, looked at alone, is wrong.
        hit = rng.random(count) < np.where(one, self.checked, 1 - (1 - false) ** self.drawn)
        shows = np.where(one, 1 / self.drawn, false)
        looks = (judge == CHECKS) | ((judge == COLLUDES) & (kind != FRIEND))
        found = hit & (looks | (judge == ACCUSER))
        # Who signed unseen is found out by the drawn auditor, or by a whistleblower that looks of itself.
        audited = rng.random(count) < self.settings.rules.audit_permille / 1000
        audit = hit & ~found & audited & (rng.random(count) < shows)
        looked = ~found & (rng.random(count) < min(1.0, self.watchers * DEALS / count))
        watch = looked & hit & ~audit & (rng.random(count) < shows)
        exposed = (found | audit | watch) & (kind != HONEST)
        bribe = np.where((kind == FRIEND) & (judge == COLLUDES), BRIBE * self.gain, 0.0)

        # Solver: the price or the stake, less the work that was done, and what the fraud brings, found or not.
        # An ordered error costs its solver nothing, nor a false accusation: the accuser pays what it causes.
        outside = np.where((kind == ONE) | (kind == FRIEND), self.gain, 0.0)
        income = np.where(exposed, -self.stake, 1.0) - CHECK_COST * (1 - false) + outside - bribe
        self._note(0, kind, income)

        # Verifier: the fee, less the work; jackpot or bounty; the stake, if its signature or accusation was wrong.
        prize = np.where(ordered, self.jackpot, self._bounty())
        income = self.checked - np.where(looks, self.checked * CHECK_COST, 0.0) + bribe + np.where(found, prize, 0.0)
        wrong = np.where(judge == ACCUSER, ~found, audit | watch)
        self._note(1, judge, income - np.where(wrong, self.verifier_stake, 0.0))

        if looked.any():
            look = np.where(watch, prize, 0.0)[looked] - CHECK_COST / segments
            self.watch = MEMORY * self.watch + (1 - MEMORY) * float(np.mean(look))
        again = self.checked * float(np.mean(looks)) + float(np.mean(audited) + np.mean(looked)) / segments
        return again, float(np.mean((false > 0) & ~exposed))

    def _bounty(self) -> float:
        """The winner's part of a lock, after what the check cost was paid from it."""
        return max(0.0, self.stake - self.checked) * LOCK.winner / 1000

    def _note(self, role: int, kinds: Kinds, income: Floats) -> None:
        """Into the running means of what each strategy earns by a deal."""
        size = len(self.earned[role])
        self.earned[role] = MEMORY * self.earned[role] + np.bincount(kinds, income, minlength=size)
        self.weight[role] = MEMORY * self.weight[role] + np.bincount(kinds, minlength=size)

    def _imitate(self, kinds: Kinds, role: int) -> Kinds:
        """A tenth of the peers meet another of their role, and take over a strategy that earns more."""
        mean = self.earned[role] / np.maximum(self.weight[role], 1e-9)
        other = kinds[self.rng.integers(len(kinds), size=len(kinds))]
        better = mean[other] > mean[kinds]
        return np.where(better & (self.rng.random(len(kinds)) < REVISE), other, kinds)

    def _come_and_go(self) -> None:
        """Whistleblowers: a tenth more while a look pays, a tenth fewer while it does not; one always tries."""
        step = max(1, self.watchers // 10)
        self.watchers = min(self.watchers_max, max(1, self.watchers + (step if self.watch > 0 else -step)))


def _shares(kinds: Kinds, names: tuple[str, ...]) -> dict[str, float]:
    counts = np.bincount(kinds, minlength=len(names))
    return {name: float(count) / len(kinds) for name, count in zip(names, counts, strict=True)}


def coalition_profit(
    share: float, *, gain: float, checked: float, stake: float, verifier: float, audited: float, watched: float,
    deals: int, seed: int,
) -> float:  # fmt: skip
    """The mean profit of `deals` false deals of a coalition, played; protocol.incentives.collusion_profit is its
    formula."""
    rng = np.random.default_rng(seed)
    hit = rng.random(deals) < checked
    friend = rng.random(deals) < share
    audit = (rng.random(deals) < audited) & (rng.random(deals) >= share)
    again = audit | (rng.random(deals) < watched)
    exposed = hit & (~friend | again)
    lost = np.where(exposed, 1 + stake, 0.0) + np.where(hit & friend & again, verifier, 0.0)
    return float(np.mean(gain - lost))
