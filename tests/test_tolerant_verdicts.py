"""Checkers of tolerant work in a simulated market: what they measure, what they sign, whom they leave in peace."""

from __future__ import annotations

from typing import Any

import pytest

from peer.deals import task_of
from peer.simulated_frauds import STEERED
from protocol.profile import combine
from protocol.task import task_id
from protocol.tolerance import open_profiles
from tests.adversaries.stage import Stage, play, stage_of
from tests.adversaries.strategies import Cheat

LOUD = 100_000  # ppb of noise, so thresholds of 300,000 to 900,000


def told(stage: Stage, name: str, kind: str) -> list[dict[str, Any]]:
    return [data for _, who, what, data in stage.log if (who, what) == (name, kind)]


def steered(ppb: int, *, notaries: int = 0, **rules: int) -> Stage:
    stage = stage_of(0, {"bob": Cheat(f"{STEERED}{ppb}")}, notaries=notaries, noise_ppb=LOUD, **rules)
    play(stage)
    return stage


def test_a_doubt_names_the_segment_that_is_farthest_off() -> None:
    stage = steered(2_250_000, check_segments_min=6)
    doubts = [data for data in told(stage, "alice", "verdict") if data["finding"] == "unsure"]
    assert doubts
    (first,) = [name for name in stage.peers if stage.public(name) == doubts[0]["checker"]]
    # The first six only: the job is trained again by another, whose honest segments it checks afterwards.
    measured = {data["segment"]: data["distance"] for data in told(stage, first, "checked")[:6]}
    assert len(measured) == len(doubts[0]["segments"]) == 6
    (job,) = [one for one in stage.node("alice").jobs.jobs.values() if not one.parent]
    opened = open_profiles(job.profiles, network=stage.network.id, task=task_id(task_of(job.task)))
    most = combine(opened)
    off = {segment: max(l1 / most.l1_ppb, l2 / most.l2_ppb) for segment, (l1, l2) in measured.items()}
    assert len(set(off.values())) == 6, "they differ, or this shows nothing"
    assert doubts[0]["wrong_segment"] == max(off, key=off.__getitem__)
    assert doubts[0]["wrong_segment"] != min(off), "it is not just the first"


@pytest.mark.parametrize("notaries", [0, 4])
def test_who_is_unsure_is_never_asked_to_decide(notaries: int) -> None:
    stage = steered(2_250_000, notaries=notaries)
    verdicts = told(stage, "alice", "verdict")
    unsure = {data["checker"] for data in verdicts if data["finding"] == "unsure"}
    wrong = {data["checker"] for data in verdicts if data["finding"] == "wrong"}
    assert len(unsure) == 1
    assert wrong
    assert not unsure & wrong
    jurors = {data["juror"] for name in stage.peers for data in told(stage, name, "juror")}
    assert bool(jurors) == bool(notaries)
    assert not jurors & wrong, "who accuses is no juror"


def test_nobody_within_the_threshold_is_accused_or_doubted() -> None:
    stage = steered(150_000, notaries=4)
    assert {data["finding"] for data in told(stage, "alice", "verdict")} == {"right"}
