"""Honesty spreads above the stake of the inequality and cheating below it, whatever the seed. 500 peers, 100 rounds."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from click.testing import CliRunner

from market.economy import CALM_SOLVERS, CALM_VERIFIERS, Economy, Settings, coalition_profit
from peer.cli import cli
from protocol.incentives import collusion_profit

# An error is ordered in a tenth of deals instead of in 0.2 %: the same expected jackpot, seen by a smaller market.
SMALL = Settings(peers=500, rounds=100, forced_ppm=100_000)
CALM = replace(SMALL, solver_mix=CALM_SOLVERS, verifier_mix=CALM_VERIFIERS)
SEEDS = range(10)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_stake_of_the_inequality_decides_whether_honesty_spreads(seed: int) -> None:
    above = Economy(replace(SMALL, seed=seed, stake_permille=1100)).play()
    below = Economy(replace(SMALL, seed=seed, stake_permille=900)).play()
    assert above.solvers["honest"] > 0.95, above
    assert below.solvers["honest"] < 0.05, below
    assert above.verifiers["lazy"] + above.verifiers["false accuser"] < 0.05, above


@pytest.mark.parametrize("seed", SEEDS)
def test_ordered_errors_keep_verifiers_at_work_where_they_outweigh_the_cost(seed: int) -> None:
    above = Economy(replace(CALM, seed=seed, checking_permille=1100)).play()
    below = Economy(replace(CALM, seed=seed, checking_permille=900)).play()
    assert above.verifiers["honest"] > 0.95, above
    assert below.verifiers["honest"] < 0.05, below


def test_whistleblowers_come_where_frauds_are_and_leave_where_none_are() -> None:
    honest = Economy(replace(SMALL, stake_permille=2000)).play()
    assert honest.whistleblowers <= 5, honest
    frauds = replace(SMALL, rounds=20, solver_mix=(0.0, 1.0, 0.0, 0.0, 0.0), verifier_mix=CALM_VERIFIERS)
    before = Economy(frauds).watchers
    assert Economy(frauds).play().whistleblowers > before


def test_one_seed_makes_one_economy() -> None:
    once, again, other = (Economy(replace(SMALL, seed=seed, rounds=10)).play() for seed in (3, 3, 4))
    assert once == again != other


@pytest.mark.parametrize("share", [0.1, 0.4, 0.5, 0.6, 0.9])
@pytest.mark.parametrize("watched", [0.0, 0.3])
def test_a_coalition_earns_what_the_formula_says(share: float, watched: float) -> None:
    terms = {"gain": 0.5, "checked": 0.05, "stake": 18.0, "verifier": 1.0, "audited": 0.25, "watched": watched}
    played = coalition_profit(share, **terms, deals=400_000, seed=1)
    exact = collusion_profit(Fraction(share), **{name: Fraction(value) for name, value in terms.items()})
    assert abs(played - float(exact)) < 0.03  # five standard errors


def test_the_command_says_who_is_left_and_draws_it(tmp_path: Path) -> None:
    few = ["simulate", "economy", "--peers", "100", "--rounds", "3", "--seed", "1"]
    told = CliRunner().invoke(cli, [*few, "--plot", str(tmp_path / "plot.svg"), "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["schema"] == "ichiba.economy/1"
    assert sum(found["solvers"].values()) == pytest.approx(1)
    assert (tmp_path / "plot.svg").read_text().count("<circle") == len(found["plotted"]) == 16
    words = CliRunner().invoke(cli, few).output
    assert "one false segment" in words
    assert "times the least stake" in words
