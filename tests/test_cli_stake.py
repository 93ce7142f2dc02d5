"""`ichiba wallet stake` and `unstake`: what they say, when they wait, and what `why` says of a peer without a stake."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peer.simulator import Simulation
from tests.cli_scene import answering, ichiba, lines, made_home, serve
from tests.fake_daemon import FakeDaemon
from tests.test_stake_swarm import earn, town

VERBS = ("stake", "unstake", "wallet", "why")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_home(tmp_path_factory.mktemp("stake") / "home")


@pytest.fixture
def daemon(home: Path) -> Iterator[FakeDaemon]:
    with answering(home) as found:
        yield found


def served(daemon: FakeDaemon, simulation: Simulation, *, lets_pass: float) -> Simulation:
    """Nina's node answers; while somebody waits for her wallet, time passes."""
    serve(daemon, simulation, "nina", verbs=VERBS)
    wallet = daemon.answers["wallet"]

    def asked(arguments: dict[str, Any]) -> Any:
        simulation.run(seconds=lets_pass)
        return wallet(arguments)

    daemon.answers["wallet"] = asked
    return simulation


@pytest.fixture(scope="module")
def paid() -> Simulation:
    simulation = town(0)
    earn(simulation)
    return simulation


def test_why_names_the_command_that_stakes_and_it_does_what_it_says(
    daemon: FakeDaemon, home: Path, paid: Simulation
) -> None:
    served(daemon, paid, lets_pass=0.1)
    assert "`ichiba wallet stake AMOUNT`" in ichiba(home, "why", "me").stdout.replace("\n", " ")
    told = ichiba(home, "wallet", "stake", "0.4")
    assert told.exit_code == 0 and "0.40 credits are staked; 0.40 are free to lock now" in told.stdout
    (line,) = lines(ichiba(home, "wallet", "stake", "0.1", "--json"))
    assert (line["schema"], line["state"], line["stake_micro"]) == ("ichiba.stake-move/1", "done", 500_000)
    out = ichiba(home, "wallet", "unstake", "0.2")
    assert out.exit_code == 0 and "0.20 credits leave the stake, free at " in out.stdout, out.stderr
    (line,) = lines(ichiba(home, "wallet", "unstake", "0.1", "--json", "--detach"))
    assert line["unbonding_micro"] == 300_000 and line["frees_ns"] > 0
    shown = ichiba(home, "wallet").stdout
    assert "0.20 credits free at" in shown and "0.10 credits free at" in shown
    assert "unbonding" in ichiba(home, "wallet", "--all").stdout


def test_refusals_say_why_and_what_to_do(daemon: FakeDaemon, home: Path, paid: Simulation) -> None:
    served(daemon, paid, lets_pass=0.1)
    for words, code, part in (
        (("stake", "7"), 8, "no more are free"), (("unstake", "7"), 8, "take out less"),
        (("stake", "0.0005"), 2, "at least"), (("stake", "-1"), 2, ""), (("unstake", "many"), 2, ""),
    ):  # fmt: skip
        refused = ichiba(home, "wallet", *words)
        assert refused.exit_code == code and part in refused.stderr, (words, refused.exit_code, refused.stderr)


def test_with_notaries_it_waits_for_them_or_says_what_is_missing(daemon: FakeDaemon, home: Path) -> None:
    simulation = served(daemon, town(4), lets_pass=1)
    earn(simulation)
    told = ichiba(home, "wallet", "stake", "0.4")
    assert told.exit_code == 0 and "0.40 are free to lock now" in told.stdout, told.stderr
    for number in (1, 2):
        simulation.crash(f"notary{number}", for_ns=0)
    over = ichiba(home, "wallet", "stake", "0.1", "--timeout", "0")
    assert over.exit_code == 10 and "the move goes on" in over.stderr
    assert "0.10 credits into the stake: certifying" in ichiba(home, "wallet").stdout
    simulation.run(seconds=20)
    assert "given-up" in ichiba(home, "wallet").stdout
    refused = ichiba(home, "wallet", "unstake", "0.1")
    assert refused.exit_code == 1 and "no quorum of notaries certified" in refused.stderr


def test_it_waits_until_what_leaves_is_free(daemon: FakeDaemon, home: Path) -> None:
    simulation = town(0)
    earn(simulation)
    assert simulation.command("nina", "stake", {"amount_micro": 500_000}).error is None
    served(daemon, simulation, lets_pass=300)
    (line,) = lines(ichiba(home, "wallet", "unstake", "0.5", "--until-free", "--json"))
    assert (line["free_micro"], line["stake_micro"], line["unbonding_micro"]) == (1_000_000, 0, 0)
