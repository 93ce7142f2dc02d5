"""A dispute in one file: whoever holds it plays the game again and comes to the same end, or refuses the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from peer.client import Client
from peer.dispute_bundle import SCHEMA, verify
from peer.simulated_work import PROGRAM
from peer.simulator import Simulation
from peer.turns import readable
from protocol.errors import RemoteProtocolError
from protocol.network import dump
from tests.cli_scene import ichiba, lines
from tests.dispute_swarm import court, settle
from tests.fake_daemon import FakeDaemon, running
from tests.swarm_scenario import submit

Bundle = dict[str, Any]


@cache
def decided() -> tuple[Simulation, str]:
    """A swarm after a cheat was convicted by the game, and the id of the dispute."""
    simulation = court(2, cheat="low-precision")
    simulation.run(seconds=3)
    settle(simulation, submit(simulation))
    (one,) = simulation.command("alice", "disputes", {}).result["disputes"]
    return simulation, str(one["dispute"])


def exported(who: str) -> Bundle:
    """What `ichiba dispute export` writes at that peer."""
    simulation, dispute = decided()
    reply = simulation.command(who, "dispute-bundle", {"dispute": dispute[:10]})
    assert reply.error is None, reply.error
    found: Bundle = readable(reply.result)
    whole = {"schema": SCHEMA, "network": dump(simulation.network), "program": PROGRAM.to_bytes().hex()}
    return json.loads(json.dumps({**found, **whole}))  # type: ignore[no-any-return]


@pytest.mark.parametrize("who", ["alice", "bob", "notary0"])
def test_submitter_solver_and_notary_export_what_proves_the_cheat(who: str) -> None:
    simulation, dispute = decided()
    report = verify(exported(who), simulation.network.id)
    assert (report.dispute.hex(), report.loser, report.cause, report.finding) == (dispute, "solver", "leaf", "wrong")
    assert report.rounds > 3
    assert not report.by_word


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Bundle], None]:
    def apply(bundle: Bundle) -> None:
        bundle[name] = change(bundle[name])

    return apply


def flipped(text: str, at: int) -> str:
    data = bytearray.fromhex(text)
    data[at] ^= 1
    return data.hex()


FORGERIES: dict[str, Callable[[Bundle], None]] = {
    "a field more": lambda bundle: bundle.update(more=1),
    "another schema": changed("schema", lambda _: "ichiba.dispute-bundle/2"),
    "another network": changed("network", lambda _: 'name = "other"\n'),
    "no network": changed("network", lambda _: "name = "),
    "a changed challenge": changed("challenge", lambda text: flipped(text, -1)),
    "no challenge": changed("challenge", lambda _: ""),
    "changed evidence": changed("case", lambda text: flipped(text, len(text) // 4)),
    "a changed move": changed("moves", lambda moves: [flipped(moves[0], -1), *moves[1:]]),
    "a move less": changed("moves", lambda moves: moves[1:]),
    "a strange record among the moves": lambda bundle: bundle["moves"].append(bundle["challenge"]),
    "a round less": changed("rounds", lambda rounds: rounds[:-1]),
    "rounds in another order": changed("rounds", lambda rounds: [rounds[1], rounds[0], *rounds[2:]]),
    "a round too many": changed("rounds", lambda rounds: [*rounds, rounds[-1]]),
    "sides exchanged": changed("rounds", lambda rounds: [[b, a] for a, b in rounds]),
    "changed operands": changed("opening", lambda text: flipped(text, len(text) // 4)),
    "no operands": changed("opening", lambda _: ""),
    "another Program": changed("program", lambda text: flipped(text, 40)),
    "no Program": changed("program", lambda _: ""),
    "a changed ruling": changed("arbitration", lambda text: flipped(text, -1)),
    "no arbitration but a record": lambda bundle: bundle.update(arbitration=bundle["challenge"]),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_nothing_in_the_file_can_be_changed(name: str) -> None:
    simulation, _ = decided()
    bundle = deepcopy(exported("alice"))
    FORGERIES[name](bundle)
    with pytest.raises(RemoteProtocolError):
        verify(bundle, simulation.network.id)


def test_a_silence_that_somebody_claims_is_the_notaries_word() -> None:
    """Whoever writes the file may say that a player was silent: it is told apart, and needs the ruling to agree."""
    simulation, _ = decided()
    bundle = exported("alice")
    bundle["rounds"] = [[bundle["rounds"][0][0], "00" * 32]]
    with pytest.raises(RemoteProtocolError, match="notaries found the work wrong"):
        verify(bundle, simulation.network.id)
    bundle["arbitration"] = ""
    report = verify(bundle, simulation.network.id)
    assert (report.loser, report.finding, report.by_word) == ("challenger", "", True)


def test_the_commands_write_and_check_the_file(tmp_path: Path) -> None:
    simulation, dispute = decided()
    network, home, file = tmp_path / "market.toml", tmp_path / "home", tmp_path / "dispute.json"
    network.write_text(dump(simulation.network))
    assert ichiba(home, "init", "--network", str(network)).exit_code == 0

    def prepare(daemon: FakeDaemon) -> None:
        daemon.answers["dispute-bundle"] = lambda _: exported_raw()

    def exported_raw() -> Bundle:
        found: Bundle = readable(simulation.command("alice", "dispute-bundle", {"dispute": dispute}).result)
        return found

    with running(home, prepare):
        assert Client(home).put_blob(PROGRAM.to_bytes()).hex() == exported_raw()["program"]
        assert ichiba(home, "dispute", "export", dispute[:8], str(file)).exit_code == 0
    told = ichiba(tmp_path / "nobody", "dispute", "verify", str(file), "--network", str(network))
    assert told.exit_code == 0
    assert "the solver loses by the referee's own result at the leaf" in told.stdout
    (line,) = lines(ichiba(home, "dispute", "verify", str(file), "--json"))
    assert (line["dispute"], line["loser"]) == (dispute, "solver")
    file.write_text("{")
    assert ichiba(home, "dispute", "verify", str(file)).exit_code == 1
