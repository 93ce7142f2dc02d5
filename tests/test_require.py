"""What a job requires: read strictly, told before anybody hears of the job, and met by whoever works on it."""

from __future__ import annotations

import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from market.audit import check_match, read_match
from market.matching import Choice, match_round, refuse_offer, transfer_ns
from market.reputation import Reputation
from peer.device import Device, find_device
from peer.events import Fetched
from peer.link_meter import LinkMeter
from peer.simulator import SECOND, Faults, Simulation
from peer.workshop import Workshop
from protocol import params
from protocol.errors import VerificationFailed
from protocol.records import Bid
from tests.cli_scene import answering, ichiba, made_home
from tests.fake_daemon import JOB
from tests.swarm_scenario import job_state, make_swarm, submit
from tests.test_market import NOW, bid, offer, peer
from tests.test_simulation import finish
from worker.job_file import BadJobFile, read_job_file
from worker.require import BadRequirement, Deadline, Require, read_deadline, read_require
from worker.script_file import read_script_file

CALM = Faults(loss=0, duplication=0, crash=0, delay_ns_max=20_000_000)
HOUR_NS = 3600 * 10**9


# --- what is written ---------------------------------------------------------------------------------------
def test_a_table_is_read_with_its_units() -> None:
    raw = {"device": "gpu", "vram": "24GiB", "memory": "512M", "sandbox": "namespaced", "deadline": "90m"}
    assert read_require(raw) == Require("gpu", 24 << 30, 512 << 20, 3, Deadline(after_ns=90 * 60 * 10**9))
    assert read_require(None) == Require()
    assert read_require({"vram": "8G"}).device == "gpu", "who needs memory of a card needs a card"


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ("gpu", "no table"),
        ({"vramm": "8G"}, "vramm"),
        ({"device": "tpu"}, "tpu"),
        ({"device": ""}, "device"),
        ({"vram": "8"}, "size"),
        ({"vram": 8}, "size"),
        ({"vram": "0G"}, "size"),
        ({"memory": "-1G"}, "size"),
        ({"sandbox": "none"}, "none"),
        ({"device": "cpu", "vram": "8G"}, "vram"),
        ({"device": "any", "vram": "8G"}, "vram"),
        ({"deadline": "0h"}, "ahead"),
        ({"deadline": "400d"}, "ahead"),
        ({"deadline": "soon"}, "neither"),
        ({"deadline": 7200}, "neither"),
        ({"deadline": "2027-01-31T18:00"}, "no time zone"),
        ({"deadline": "1960-01-01T00:00Z"}, "age"),
    ],
)
def test_a_requirement_that_means_nothing_is_refused_with_the_next_step(raw: Any, complaint: str) -> None:
    with pytest.raises(BadRequirement, match=complaint) as caught:
        read_require(raw)
    assert caught.value.next_step


def test_a_deadline_is_a_span_from_its_submission_or_a_moment_of_the_world() -> None:
    assert read_deadline("2h").moment_ns(NOW) == NOW + 2 * HOUR_NS
    moment = read_deadline("2027-01-31T18:00:00+01:00")
    assert moment == read_deadline("2027-01-31T17:00Z")
    assert moment.moment_ns(moment.at_ns - HOUR_NS) == moment.at_ns
    for now_ns in (moment.at_ns, moment.at_ns - params.DEADLINE_NS_MAX - 1):
        with pytest.raises(BadRequirement, match="2027-01-31T17:00:00"):
            moment.moment_ns(now_ns)


MINIMAL = """
steps = 10
model = "model.py:build"
data = "model.py:data"
[batch]
rule = "rows"
size = 2
[learning_rate]
peak = 0.1
"""


def test_both_kinds_of_job_files_have_the_table_and_a_level_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("")
    path = tmp_path / "job.toml"
    path.write_text(f'{MINIMAL}[require]\nsandbox = "contained"\ndeadline = 2027-01-31T18:00:00Z\n')
    read = read_job_file(path)
    assert (read.sandbox, read.require.deadline) == (4, read_deadline("2027-01-31T18:00Z"))
    path.write_text(f'sandbox = "filtered"\n{MINIMAL}[require]\nsandbox = "contained"\n')
    with pytest.raises(BadJobFile, match=r"sandbox is in job\.toml and in its"):
        read_job_file(path)
    path.write_text('kind = "script"\nfile = "model.py"\nseconds = 9\n[require]\nvram = "8G"\n')
    assert read_script_file(path).require == Require("gpu", 8 << 30)
    path.write_text('kind = "script"\nfile = "model.py"\nseconds = 9\n[require]\nmemory = "8G"\n')
    with pytest.raises(BadRequirement, match="memory"):
        read_script_file(path)


def test_the_command_line_overrides_the_file_and_is_checked_as_it() -> None:
    written = Require("gpu", 24 << 30, deadline=Deadline(after_ns=HOUR_NS))
    over = written.overridden(device=None, device_memory_bytes=8 << 30, deadline="2h")
    assert (over.device, over.device_memory_bytes, over.deadline) == ("gpu", 8 << 30, Deadline(after_ns=2 * HOUR_NS))
    assert written.overridden(device=None, device_memory_bytes=None, deadline=None) == written
    with pytest.raises(BadRequirement, match="vram"):
        written.overridden(device="cpu", device_memory_bytes=None, deadline=None)
    assert written.terms(NOW) == {"device": "gpu", "device_memory_bytes": 24 << 30, "deadline_ns": NOW + HOUR_NS}


def test_what_is_required_is_told_to_the_daemon_and_a_past_deadline_to_nobody(tmp_path: Path) -> None:
    home, folder = made_home(tmp_path / "home"), tmp_path / "job"
    folder.mkdir()
    (folder / "pi.py").write_text("print(3)")
    (folder / "job.toml").write_text(
        'kind = "script"\nfile = "pi.py"\nseconds = 9\nbudget = "1"\nprice = "0.001"\n[require]\ndeadline = "1h"\n'
    )
    with answering(home) as daemon:
        late = ichiba(home, "submit", str(folder), "--deadline", "2020-01-01T00:00Z", "--detach")
        assert (late.exit_code, [verb for verb, _ in daemon.seen]) == (2, ["status"])
        assert "past" in late.stderr
        assert "2h" in late.stderr
        daemon.answers["submit"] = lambda _: {"job": JOB, "assurance": "output hash only"}
        sent = ichiba(home, "submit", str(folder), "--device", "gpu", "--vram", "24G", "--detach")
        assert sent.exit_code == 0, sent.output
        (given,) = [arguments for verb, arguments in daemon.seen if verb == "submit"]
    assert (given["device"], given["device_memory_bytes"]) == ("gpu", 24 << 30)
    assert 0 < given["deadline_ns"] - time.time_ns() <= HOUR_NS


# --- the device --------------------------------------------------------------------------------------------
CARDS = "NVIDIA A100-SXM4-40GB, 40960\nNVIDIA H100 80GB HBM3, 81559\n"


def test_a_card_that_workers_are_given_is_offered_with_its_memory() -> None:
    assert find_device(("cpu", "gpu"), lambda _: CARDS) == Device("gpu", 81559 << 20, "NVIDIA H100 80GB HBM3")


def test_a_card_that_no_worker_is_given_is_told_to_its_owner_alone() -> None:
    found = find_device(Workshop.devices, lambda _: CARDS)
    assert (found.kind, found.memory_bytes) == ("cpu", 0)
    assert "H100" in found.note
    assert find_device(Workshop.devices, lambda _: None) == Device()


@pytest.mark.parametrize("said", ["", "nonsense", "x, \n", "x, -1", "x, 99999999999999999", f"x, {2**40}"])
def test_a_driver_that_makes_no_sense_gives_no_card(said: str) -> None:
    assert find_device(("gpu",), lambda _: said) == Device()


def test_a_driver_that_fails_gives_no_card_and_says_so() -> None:
    def broken(_: tuple[str, ...]) -> str:
        raise subprocess.TimeoutExpired("nvidia-smi", 5)

    assert "nvidia-smi failed" in find_device(("gpu",), broken).note


# --- who can ----------------------------------------------------------------------------------------------
MEANS: dict[str, Any] = {
    "unit_price": 1, "memory_bytes": 2**40, "sandbox": 4, "stake_micro": 10**9, "slots_free": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("code", "wants", "has"),
    [
        ("device", {"device": "gpu"}, {}),
        ("device", {"device": "cpu"}, {"device": "gpu"}),
        ("vram", {"device": "gpu", "device_memory_bytes": 2}, {"device": "gpu", "device_memory_bytes": 1}),
        ("deadline", {"deadline_ns": NOW + 9}, {"now_ns": NOW, "takes_ns": 10}),
        ("", {"deadline_ns": NOW + 10}, {"now_ns": NOW, "takes_ns": 10}),
        ("", {"device": "gpu", "device_memory_bytes": 1}, {"device": "gpu", "device_memory_bytes": 1}),
    ],
)
def test_a_solver_that_lacks_the_device_or_the_time_does_not_bid(
    code: str, wants: dict[str, Any], has: dict[str, Any]
) -> None:
    refusal = refuse_offer(offer(**wants), **MEANS, **has)
    assert (refusal.code if refusal is not None else "") == code


def test_a_bid_from_the_wrong_device_or_too_late_cannot_win_and_is_told_why() -> None:
    gpu = {"device": "gpu", "device_memory_bytes": 24 << 30}
    bids = [bid(2), bid(3, device="gpu", device_memory_bytes=8 << 30), bid(4, **gpu)]
    found = choose(bids, **gpu)
    assert found.winner is not None
    assert found.winner.solver == peer(4)
    assert {solver: why.code for solver, why in found.refused} == {peer(2): "device", peer(3): "vram"}
    # A stranger's hour is believed to be two; a link of a megabyte a second brings 3.6 GB in another.
    bids = [bid(2, eta_ns=HOUR_NS), bid(3, eta_ns=HOUR_NS // 2)]
    slow = {"content_bytes": 3_600_000_000, "checkpoint_bytes": 0, "deadline_ns": NOW + 3 * HOUR_NS - 1}
    found = choose(bids, **slow)
    assert {solver: why.code for solver, why in found.refused} == {peer(2): "deadline"}
    assert found.winner is not None
    assert found.winner.solver == peer(3)


def choose(bids: list[tuple[bytes, Bid]], *, link: int = 10**6, **wants: Any) -> Choice:
    return match_round(
        offer(operations=10**6, **wants), bytes(32), bids, round_number=7, free_stake_micro=lambda _: 1000,
        reputation_of=lambda _: Reputation.known(20, 0), excluded=(), reachable=lambda _: True,
        link=lambda p: link * (10 if p == peer(9) else 1), now_ns=NOW,
    )  # fmt: skip


def test_what_moves_between_two_peers_has_a_price_and_a_fast_link_wins_over_a_small_discount() -> None:
    """Of two alike the one whose link is fast: program, data and ten checkpoints are 11 GB."""
    wants = {"content_bytes": 10**9, "checkpoint_bytes": 10**9, "unit_price_max": 10**6, "last_segment": 10}
    assert transfer_ns(offer(**wants), 10**6) == 11_000 * 10**9
    assert transfer_ns(offer(mode="profile", **wants), 10**6) == 1_000 * 10**9
    bids = [bid(2, unit_price=490_000), bid(9, unit_price=500_000)]
    ranked = choose(bids, **wants).ranked
    assert [scored.solver for scored in ranked] == [peer(9), peer(2)]
    assert [scored.transfer_micro for scored in ranked] == [1000 * 1100 // 3600, 1000 * 11_000 // 3600]
    assert ranked[0].score_micro == sum(
        (ranked[0].price_micro, ranked[0].risk_micro, ranked[0].wait_micro, ranked[0].transfer_micro)
    )


# --- a job in the market -----------------------------------------------------------------------------------
def begun(**terms: Any) -> tuple[Simulation, str]:
    simulation = make_swarm(1, CALM)
    simulation.run(seconds=3)
    if "deadline_s" in terms:
        terms["deadline_ns"] = simulation.now_ns + terms.pop("deadline_s") * SECOND
    return simulation, submit(simulation, **terms)


def why(simulation: Simulation, job: str) -> dict[str, Any]:
    reply = simulation.command("alice", "why", {"of": job})
    assert reply.error is None
    return reply.result


def test_a_job_for_a_card_waits_where_there_is_none_and_why_says_what_would_help() -> None:
    simulation, job = begun(device="gpu", device_memory_bytes=24 << 30)
    simulation.run(seconds=5)
    assert job_state(simulation, job)["state"] == "offered"
    (heard,) = simulation.command("bob", "offers", {"where": "vram>=24 device=gpu"}).result["offers"]
    assert heard["no_bid"]["code"] == "device"
    told = why(simulation, job)
    assert {reason["code"]: reason["count"] for reason in told["reasons"] if reason["step"] == "offer"} == {
        "device": 2, "vram": 2,
    }  # fmt: skip
    assert told["advice"][0]["words"] == "take any device and need no more than 0 MiB on the card: 2 more"


def test_a_job_with_a_card_in_the_market_goes_to_it() -> None:
    simulation = make_swarm(1, CALM)
    carol = simulation.peers["carol"]
    carol.means = replace(carol.means, device="gpu", device_memory_bytes=32 << 30)
    simulation.crash("carol", for_ns=SECOND)
    simulation.run(seconds=6)
    (ask,) = simulation.command("alice", "book", {"where": "vram>=24 device=gpu"}).result["asks"]
    assert ask["device_memory_bytes"] == 32 << 30
    state = finish(simulation, submit(simulation, device="gpu", device_memory_bytes=24 << 30))
    assert (state["state"], state["paid_micro"]) == ("done", 66_000), "60 Gop at carol's 1100"


def test_a_deadline_too_near_for_anybody_is_told_with_the_minutes_that_would_do() -> None:
    simulation, job = begun(deadline_s=60)
    simulation.run(seconds=5)
    told = why(simulation, job)
    assert {reason["code"] for reason in told["reasons"] if reason["step"] == "offer"} == {"deadline"}
    (advice,) = [one for one in told["advice"] if "deadline_ns" in one["changes"]]
    assert advice["words"].startswith("extend the deadline by ")
    assert advice["words"].endswith(" min: 2 more")
    simulation.run(seconds=60)
    state = job_state(simulation, job)
    assert state["state"] == "failed"
    assert "its deadline passed" in str(state["reason"])
    assert "--deadline" in str(state["reason"])
    assert simulation.command("bob", "offers", {}).result["offers"] == [], "an offer is not renewed past its deadline"
    simulation.check_quiet()
    far_ns = int(advice["changes"]["deadline_ns"]) + 65 * SECOND
    again = submit(simulation, deadline_ns=far_ns)
    assert finish(simulation, again)["state"] == "done", "whoever follows the advice is served"


def test_a_job_that_is_late_while_it_runs_fails_and_what_is_done_is_paid() -> None:
    simulation, job = begun(deadline_s=300)
    simulation.run(seconds=60, until=lambda: job_state(simulation, job).get("segments_done") == 2)
    for name in ("bob", "carol"):
        assert simulation.command(name, "pause", {"within_ms": 1000}).error is None
    state = finish(simulation, job)
    assert (state["state"], state["segments_done"]) == ("failed", 2)
    assert "its deadline passed" in str(state["reason"])
    assert state["paid_micro"] == 20_000, "two of six segments"


def test_a_job_that_is_proved_before_its_deadline_is_checked_after_it() -> None:
    simulation, job = begun(deadline_s=180)
    simulation.run(seconds=170, until=lambda: job_state(simulation, job).get("stage") in ("proved", "checking"))
    left_ns = int(str(job_state(simulation, job)["deadline_ns"])) - simulation.now_ns
    assert left_ns > 0
    assert finish(simulation, job)["state"] == "done"


def test_a_tolerant_job_that_is_late_before_its_profiles_are_made_fails() -> None:
    simulation, job = begun(deadline_s=20, mode="tolerant")
    state = finish(simulation, job, seconds=60)
    assert state["state"] == "failed"
    assert "its deadline passed" in str(state["reason"])


@pytest.mark.parametrize(
    ("terms", "complaint"),
    [
        ({"deadline_ns": 1}, "ago"),
        ({"deadline_ns": 2**62}, "days"),
        ({"device": "tpu"}, "device"),
        ({"device_memory_bytes": 1}, "card"),
        ({"device": "cpu", "device_memory_bytes": 1}, "card"),
        ({"device": "gpu", "device_memory_bytes": -1}, "device_memory_bytes"),
    ],
)
def test_terms_that_nobody_can_meet_are_refused_before_anybody_hears_of_them(
    terms: dict[str, Any], complaint: str
) -> None:
    simulation = make_swarm(1, CALM)
    simulation.run(seconds=3)
    with pytest.raises(AssertionError, match=complaint):
        submit(simulation, **terms)
    assert simulation.command("alice", "jobs", {}).result["jobs"] == []


# --- what is known of links ---------------------------------------------------------------------------------
def test_a_match_is_made_again_with_the_link_speeds_its_submitter_knew() -> None:
    simulation = make_swarm(1, CALM)
    simulation.run(seconds=3)
    alice = simulation.peers["alice"]
    assert alice.node is not None
    bob = simulation.peers["bob"].key.public
    simulation.run(seconds=1)
    alice.node.handle(Fetched(bytes(32), bytes(32), peer=bob, bytes_per_second=10), simulation.now_ns)
    job = submit(simulation, deadline_ns=simulation.now_ns + 3600 * SECOND)
    simulation.run(seconds=600, until=lambda: job_state(simulation, job).get("state") == "done")
    (row,) = simulation.command("alice", "matches", {"job": job}).result["matches"]
    found = read_match(bytes.fromhex(row["match"]))
    made = check_match(found)
    speeds = {one.solver: one.bytes_per_second for one in found.known}
    assert speeds[bob] == 10
    assert simulation.by_key[made.winner.solver].name == "carol", "the cheaper one's link would be too late"
    assert dict(made.choice.refused)[bob].code == "deadline"
    forged = [msgspec.structs.replace(one, bytes_per_second=10**9) for one in found.known]
    with pytest.raises(VerificationFailed, match="the rule gives the work to"):
        check_match(msgspec.structs.replace(found, known=tuple(forged)))


def test_one_download_moves_what_is_believed_of_a_link_by_a_quarter() -> None:
    desk = make_swarm(1, CALM).peers["alice"].node.desk  # type: ignore[union-attr]
    assert desk.link_speed(peer(2)) == params.LINK_BYTES_PER_SECOND
    desk.measured(peer(2), 8000)
    desk.measured(peer(2), 4000)
    assert desk.link_speed(peer(2)) == 7000
    for number in range(2 * params.LINK_SPEEDS_MAX):
        desk.measured(peer(number + 10), 1)
    assert len(desk.link_speeds) == params.LINK_SPEEDS_MAX


async def test_a_meter_counts_what_came_over_the_link_of_one_peer(autojump_clock: trio.abc.Clock) -> None:
    size = 4 * params.LINK_SAMPLE_BYTES_MIN
    meter, many, small = LinkMeter([peer(2)]), LinkMeter([peer(2), peer(3)]), LinkMeter([peer(2)])
    for one in (meter, many, small):
        one(size, 10 * size)  # was here before
    await trio.sleep(2)
    meter(3 * size, 10 * size)
    many(3 * size, 10 * size)
    small(size + 100, 10 * size)
    assert meter.told() == (peer(2), size)
    assert many.told() == small.told() == LinkMeter([peer(2)]).told() == (b"", 0)
