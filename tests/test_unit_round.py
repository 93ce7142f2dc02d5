"""The units of a run are placed by a rule that anybody can play again from signed bids and signed reports of links."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
import pytest

from market.placing import Placing, check_placing, read_placing
from peer.simulator import Simulation
from protocol import params
from protocol.codec import encode
from protocol.errors import RemoteProtocolError, VerificationFailed
from protocol.keys import peer_name
from protocol.link_report import LinkReport, MeasuredLink
from protocol.records import Bid, open_record
from tests.cli_scene import ichiba, lines, serve
from tests.fake_daemon import FakeDaemon
from tests.run_scene import make_run_swarm, run_state, run_until, submit_run, until_over

NEAR = ("s2", "s3", "s4", "s5")  # the dearer four, in one room; the others are far from everybody


def report_links(simulation: Simulation) -> None:
    """What each solver says of its links, signed."""
    node = simulation.peers["alice"].node
    assert node is not None
    solvers = {name: peer for name, peer in simulation.peers.items() if name.startswith("s")}
    said: dict[str, list[MeasuredLink]] = {name: [] for name in solvers}
    for one, other in combinations(sorted(solvers), 2):
        near = one in NEAR and other in NEAR
        link = (1_000, 10**9) if near else (80_000, 10**5)
        said[one].append(MeasuredLink(solvers[other].key.public, *link))
        said[other].append(MeasuredLink(solvers[one].key.public, *link))
    now = node.desk.wall_ns
    for name, links in said.items():
        peer = solvers[name]
        assert peer.node is not None
        report = LinkReport(
            network=simulation.network.id, peer=peer.key.public, sequence=now,
            links=tuple(sorted(links, key=lambda link: link.peer)), created_ns=now,
            expires_ns=now + params.LINK_REPORT_LIFETIME_NS,
        )  # fmt: skip
        node.commands.links.take(report, peer.node.desk.seal(report))


@pytest.fixture(scope="module")
def played() -> tuple[Simulation, str]:
    simulation = make_run_swarm(5, solvers=6)
    simulation.run(seconds=5)
    report_links(simulation)
    job = submit_run(simulation, border_bytes=[[10**6, 2 * 10**6]], shared_bytes=[10**6, 10**6])["job"]
    assert until_over(simulation, job)["state"] == "done"
    return simulation, job


def placings_of(played: tuple[Simulation, str]) -> list[Placing]:
    simulation, job = played
    reply: Any = simulation.command("alice", "matches", {"job": job})
    return [read_placing(bytes.fromhex(one["placing"])) for one in reply.result["placings"]]


def test_a_placing_is_made_again_and_prefers_near_peers_over_cheap_ones(played: tuple[Simulation, str]) -> None:
    simulation, job = played
    (placing,) = placings_of(played)
    made = check_placing(placing)
    assert {simulation.by_key[one.bid.solver].name for one in made.chosen.values()} == set(NEAR)
    assert made.cost_micro == made.best_micro
    assert len(placing.reports) == 6 and len(placing.units) == 4 and not placing.solvers
    assert (placing.borders, placing.shared, placing.every) == (((10**6, 2 * 10**6),), (10**6, 10**6), 10)
    shown = simulation.command("alice", "job", {"job": job}).result["run"]["units"]
    for one in shown:
        (deal,) = simulation.command("alice", "job", {"job": one["job"]}).result["deals"]
        assert deal["solver"] == peer_name(made.chosen[one["unit"]].bid.solver)
    unit = simulation.command("alice", "matches", {"job": shown[1]["job"]}).result
    assert len(unit["placings"]) == 1 and not unit["matches"], "a unit has the placing of its run"


def test_it_survives_a_restart(played: tuple[Simulation, str]) -> None:
    simulation, _ = played
    before = placings_of(played)
    simulation.crash("alice", for_ns=10**9)
    simulation.run(seconds=5)
    assert placings_of(played) == before


def test_a_unit_that_is_kept_and_one_that_is_given_away_again_are_placed_beside_the_others() -> None:
    simulation = make_run_swarm(6, solvers=5)
    job = submit_run(simulation, segments=6, kept=(0,), border_bytes=[[10**6, 10**6]])["job"]

    def second() -> bool:
        return run_state(simulation, job).get("segments_done", 0) >= 2

    run_until(simulation, second)
    lost = run_state(simulation, job)["run"]["units"][2]["solver"]
    simulation.crash(next(p.name for p in simulation.peers.values() if peer_name(p.key.public) == lost), for_ns=0)
    assert until_over(simulation, job)["state"] == "done"
    first, again = placings_of((simulation, job))
    me = simulation.peers["alice"].key.public
    assert first.solvers == ((0, me),) and [one.unit for one in first.units] == [1, 2, 3]
    assert [one.unit for one in again.units] == [2] and [unit for unit, _ in again.solvers] == [0, 1, 3]
    before, after = check_placing(first), check_placing(again)
    assert {unit: one.bid.solver for unit, one in before.chosen.items() if unit != 2} == dict(again.solvers[1:])
    assert peer_name(after.chosen[2].bid.solver) != lost
    moved = msgspec.structs.replace(again, solvers=(*again.solvers[:2], (3, after.chosen[2].bid.solver)))
    with pytest.raises(VerificationFailed, match="could not have it"):
        check_placing(moved)


def test_dearer_units_two_for_one_and_bids_that_are_not_there_are_refused(played: tuple[Simulation, str]) -> None:
    (placing,) = placings_of(played)
    first, second, *rest = placing.units
    far = next(
        record_id
        for record, record_id, _ in (open_record(e, network=placing.network) for e in first.bids)
        if isinstance(record, Bid) and played[0].by_key[record.solver].name == "s0"
    )
    cheap = msgspec.structs.replace(first, winner=far)
    with pytest.raises(VerificationFailed, match="the rule gives unit 0 to"):
        check_placing(msgspec.structs.replace(placing, units=(cheap, second, *rest)))
    here = {open_record(e, network=placing.network)[0].solver: e for e in first.bids}  # type: ignore[union-attr]
    there = {e: open_record(e, network=placing.network) for e in second.bids}
    won = next(record for record, record_id, _ in there.values() if record_id == second.winner)
    assert isinstance(won, Bid)
    twice = msgspec.structs.replace(first, winner=open_record(here[won.solver], network=placing.network)[1])
    with pytest.raises(VerificationFailed, match="to one solver"):
        check_placing(msgspec.structs.replace(placing, units=(twice, second, *rest)))
    hidden = msgspec.structs.replace(first, bids=())
    with pytest.raises(VerificationFailed, match="could not have it"):
        check_placing(msgspec.structs.replace(placing, units=(hidden, second, *rest)))
    stray = msgspec.structs.replace(first, bids=(*first.bids, second.bids[0]))
    with pytest.raises(VerificationFailed, match="another offer"):
        check_placing(msgspec.structs.replace(placing, units=(stray, second, *rest)))


def test_numbers_facts_and_reports_that_do_not_fit_are_refused(played: tuple[Simulation, str]) -> None:
    (placing,) = placings_of(played)
    torn = bytes([*placing.reports[0][:-1], placing.reports[0][-1] ^ 1])
    for wrong in (
        {"reports": (*placing.reports[1:], torn)},
        {"reports": (*placing.reports, placing.units[0].offer)},
        {"known": placing.known[1:]},
        {"known": (*placing.known, placing.known[0])},
        {"units": placing.units[1:]},
        {"units": (*placing.units, placing.units[0])},
        {"borders": ()},
        {"shared": (1,)},
        {"solvers": ((0, placing.known[0].solver),)},
    ):
        with pytest.raises(RemoteProtocolError):
            check_placing(msgspec.structs.replace(placing, **wrong))  # type: ignore[arg-type]
    without = msgspec.structs.replace(placing, reports=())
    with pytest.raises(VerificationFailed, match="the rule gives"):
        check_placing(without)  # who hides the reports has no reason left to take the dearer four


def test_no_bytes_make_the_reader_do_anything_but_read_or_refuse(played: tuple[Simulation, str]) -> None:
    (placing,) = placings_of(played)
    encoded, rng = encode(placing), random.Random(8)
    assert read_placing(encoded) == placing
    for _ in range(200):
        data = bytearray(encoded)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            check_placing(read_placing(bytes(data)))
        except RemoteProtocolError:
            continue


def test_the_command_makes_it_again_here_and_from_an_export(
    played: tuple[Simulation, str], daemon: FakeDaemon, home: Path, tmp_path: Path
) -> None:
    simulation, job = played
    serve(daemon, simulation, "alice", verbs=("matches",))
    export = tmp_path / "placing.bin"
    told = ichiba(home, "audit", "match", job[:12], "--export", str(export))
    assert told.exit_code == 0, told.output
    assert "made again from the signed bids and 6 reports of links" in told.stdout
    (line,) = lines(ichiba(home, "audit", "match", job[:12], "--json"))
    assert (line["schema"], line["same"], line["reports"]) == ("ichiba.placing/1", True, 6)
    assert [one["placed"] for one in line["units"]] == [True] * 4 and len(line["deals"]) == 4
    (again,) = lines(ichiba(home, "audit", "match", "--file", str(export), "--json"))
    assert {**again, "deals": []} == {**line, "deals": []}
    export.write_bytes(export.read_bytes()[:-1])
    assert ichiba(home, "audit", "match", "--file", str(export)).exit_code != 0
