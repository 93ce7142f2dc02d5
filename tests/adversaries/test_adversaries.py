"""Each adversary comes to the end that the catalogue says, and no honest peer loses anything beside it."""

from __future__ import annotations

import pytest

from peer.simulated_frauds import FRAUDS
from tests.adversaries.judge import NAMED, honest_troubles, outcome_of, troubles
from tests.adversaries.run import honest_seed, seed_of
from tests.adversaries.table import PAGE, SEED, row
from worker.cheats import CHEATS


def test_the_simulator_and_the_catalogue_know_every_fraud_of_the_worker() -> None:
    assert set(FRAUDS) == set(CHEATS)
    assert set(CHEATS) < set(NAMED)


# Frauds that take one way are played once here, all of them in the page and in tests.adversaries.run: before a quorum
# of checkers, and before a jury.
ALIKE = ("tolerant: skip-step", "tolerant: wrong-rate")
PLAYED = [
    name
    for name in NAMED
    if name not in ALIKE and (not name.endswith("no notaries") or name.startswith(("wrong-label", "tolerant: steers")))
]


@pytest.mark.parametrize("name", PLAYED)
def test_an_adversary_ends_as_the_table_says(name: str) -> None:
    assert seed_of(name, SEED) == []
    assert row(NAMED[name], outcome_of(name, SEED)) in PAGE.read_text(), "run `python -m tests.adversaries.table`"


@pytest.mark.parametrize("seed", [1])
@pytest.mark.parametrize("name", [name for name in PLAYED if name not in CHEATS and not name.endswith("no notaries")])
def test_no_fault_of_the_world_helps_an_adversary(name: str, seed: int) -> None:
    assert seed_of(name, seed) == []


# 73, 453: notaries signed for several quorums, and the draw never came. 1017: a settlement heard of late.
@pytest.mark.parametrize("seed", [*range(4), 73, 453, 1017])
def test_nobody_honest_loses_anything(seed: int) -> None:
    assert honest_seed(seed) == []


@pytest.mark.parametrize("seed", range(2))
def test_nobody_honest_loses_anything_by_tolerant_work(seed: int) -> None:
    assert honest_seed(seed, noise_ppb=1000) == []


def test_the_judge_sees_an_adversary_that_got_away() -> None:
    """A cheat judged as if it were honest, and an honest market judged as if it had a cheat."""
    caught, control = outcome_of("skip-step", SEED), outcome_of("never signs the settlement", SEED)
    assert honest_troubles(caught)
    assert len(troubles(NAMED["skip-step"], control, control)) >= 3
