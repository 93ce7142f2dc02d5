"""A placing larger than a row is compressed, then kept without the bids that could not win, or said not to be kept."""

from __future__ import annotations

import lzma
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from market.placing import PlaceUnits, Written, check_placing, left_out_of, read_placing
from peer.simulator import SECOND
from protocol import params
from protocol.errors import LimitExceeded, MalformedRecord, RemoteProtocolError
from tests.cli_scene import ichiba, lines, serve
from tests.fake_daemon import FakeDaemon
from tests.run_scene import make_run_swarm, submit_run, until_over
from tests.test_late_placings import awaiting


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda size: monkeypatch.setattr(params, "PLACING_BYTES_MAX", size)


@pytest.fixture
def effect(monkeypatch: pytest.MonkeyPatch) -> PlaceUnits:
    """A round in which one of six bidders on each of two units may not have it."""
    monkeypatch.setattr(params, "PLACING_THREAD_MIN", 0)
    found = awaiting()[2]
    units = dict(found.round.units)
    for unit in (0, 3):
        units[unit] = replace(units[unit], excluded={sorted(units[unit].bids)[0][1].solver})
    return replace(found, round=replace(found.round, units=units))


def written(effect: PlaceUnits) -> Written:
    found = effect.play().written
    assert found is not None
    return found


def test_what_fits_is_kept_as_it_is_and_what_does_not_is_compressed(effect: PlaceUnits, limit: Any) -> None:
    plain = written(effect)
    assert plain.size_bytes == len(plain.data) and not plain.left_out
    limit(plain.size_bytes - 1)
    packed = written(effect)
    assert len(packed.data) == packed.size_bytes < plain.size_bytes and not packed.left_out
    assert read_placing(packed.data) == read_placing(plain.data)
    assert left_out_of(packed.data) == left_out_of(plain.data) == 0


def test_bids_that_could_not_win_are_left_out_before_all_is_and_the_rest_is_made_again(
    effect: PlaceUnits, limit: Any
) -> None:
    whole = check_placing(read_placing(written(effect).data))
    limit(written(effect).size_bytes - 1)
    limit(written(effect).size_bytes - 1)
    less = written(effect)
    assert less.left_out == left_out_of(less.data) == 2
    placing = read_placing(less.data)
    assert [len(one.bids) for one in placing.units] == [5, 6, 6, 5] and not any(one.excluded for one in placing.units)
    again = check_placing(placing)
    assert (again.chosen, again.cost_micro, again.best_micro) == (whole.chosen, whole.cost_micro, whole.best_micro)
    limit(less.size_bytes - 1)
    assert written(effect) == Written(b"", less.size_bytes, 2)


def test_a_placing_that_is_not_kept_is_journalled_as_such_and_told(
    limit: Any, daemon: FakeDaemon, home: Path
) -> None:
    limit(500)
    simulation = make_run_swarm(5, solvers=6)
    simulation.run(seconds=5)
    job = submit_run(simulation)["job"]
    assert until_over(simulation, job)["state"] == "done", "the run does not wait for its journal"
    simulation.crash("alice", for_ns=SECOND)
    simulation.run(seconds=5)
    (one,) = simulation.command("alice", "matches", {"job": job}).result["placings"]
    assert one["placing"] == "" and len(one["deals"]) == 4 and "MiB, limit 0.0 MiB" in one["not_kept"]
    told = [data["why"] for _, who, kind, data in simulation.log if (who, kind) == ("alice", "waiting")]
    assert one["not_kept"] in told
    serve(daemon, simulation, "alice", verbs=("matches",))
    shown = ichiba(home, "audit", "match", job[:12])
    assert shown.exit_code != 0 and "cut the run into fewer units" in shown.output
    record = lines(ichiba(home, "audit", "match", job[:12], "--json"))[0]
    assert (record["schema"], record["why"]) == ("ichiba.placing-not-kept/1", one["not_kept"])


def test_the_command_tells_how_many_bids_were_left_out(
    effect: PlaceUnits, limit: Any, home: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        limit(written(effect).size_bytes - 1)
    export = tmp_path / "placing.bin"
    export.write_bytes(written(effect).data)
    (line,) = lines(ichiba(home, "audit", "match", "--file", str(export), "--json"))
    assert (line["same"], line["left_out"]) == (True, 2)
    assert "2 bids that could not have their unit were left out" in ichiba(
        home, "audit", "match", "--file", str(export)
    ).output


def test_packed_bytes_that_are_cut_changed_or_far_too_long_are_refused(
    effect: PlaceUnits, limit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(written(effect).size_bytes - 1)
    data, rng = written(effect).data, random.Random(3)
    head = data[: data.index(b"\xfd7zXZ")]
    for wrong in (data[:-1], data + b"\x00", head, data[:40]):
        with pytest.raises(MalformedRecord):
            read_placing(wrong)
    for _ in range(100):
        torn = bytearray(data)
        torn[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            check_placing(read_placing(bytes(torn)))
        except RemoteProtocolError:
            continue
    monkeypatch.setattr(params, "PLACING_PLAIN_BYTES_MAX", 2**20)
    bomb = head + lzma.compress(bytes(2**20 + 1))
    assert len(bomb) < 4096
    with pytest.raises(LimitExceeded, match="more than 1048576 bytes"):
        read_placing(bomb)
    with pytest.raises(LimitExceeded, match="at most"):
        read_placing(bytes(params.STORE_VALUE_BYTES_MAX + 1))
