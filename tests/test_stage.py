"""The record of a unit of a parallel job: its links fit together, and what contradicts itself is refused."""

from __future__ import annotations

import msgspec
import pytest

from protocol.errors import MalformedRecord
from protocol.stage import Codec, Crossing, Link, Stage, check_stage, links_in, links_out, replica_seed

RAW = Codec("float32")


def unit(stage: int, replica: int, *, stages: int = 3, replicas: int = 2, sync: str = "step", **more: object) -> Stage:
    fields = {"forward": RAW, "backward": RAW, "shared": RAW, "micro_batches": 4} | more
    return Stage(
        run=bytes(32), stage=stage, stages=stages, replica=replica, replicas=replicas, sync=sync, **fields  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("sync", ["step", "local"])
def test_each_link_that_leaves_a_unit_ends_at_its_other_end(sync: str) -> None:
    units = {one.unit: one for stage in range(3) for replica in range(2) for one in [unit(stage, replica, sync=sync)]}
    assert sorted(units) == list(range(6))
    for number, one in units.items():
        check_stage(one)
        for link in links_out(one):
            assert Link(link.flow, number) in links_in(units[link.other])
        for link in links_in(one):
            assert Link(link.flow, number) in links_out(units[link.other])
    assert [len(links_out(units[number])) for number in range(6)] == [2, 2, 3, 3, 2, 2]


def test_one_replica_shares_nothing_and_draws_the_batches_of_the_whole() -> None:
    alone = unit(0, 0, stages=1, replicas=1, sync="none")
    check_stage(alone)
    assert links_out(alone) == links_in(alone) == ()
    assert replica_seed(2**62 + 5, 0) == 2**62 + 5
    assert len({replica_seed(7, replica) for replica in range(50)}) == 50
    assert all(0 <= replica_seed(7, replica) < 2**63 for replica in range(50))


def test_what_comes_in_may_come_by_another_codec_than_goes_out() -> None:
    eight, four = Codec("tile", 8), Codec("change", 4)
    one = unit(1, 0, forward=four, backward=eight, backward_in=RAW, shared=eight)
    check_stage(one)
    assert (one.codec_of("forward", "send"), one.codec_of("forward", "recv")) == (four, four)
    assert (one.codec_of("backward", "send"), one.codec_of("backward", "recv")) == (eight, RAW)
    assert one.codec_of("sync", "send") == one.codec_of("sync", "recv") == eight


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (unit(3, 0), "count from 0"),
        (unit(0, 2), "count from 0"),
        (unit(0, 0, stages=200), "units"),
        (unit(0, 0, sync="none"), "sync"),
        (unit(0, 0, replicas=1, sync="local"), "sync"),
        (unit(0, 0, forward=Codec("tile", 5)), "5 bits"),
        (unit(0, 0, forward=Codec("float32", 4)), "4 bits"),
        (unit(0, 0, backward=Codec("change", 4)), "cannot carry"),
        (unit(0, 0, shared=Codec("sparse", 2)), "cannot carry"),
        (unit(1, 0, forward_in=RAW), "said once"),
        (unit(1, 0, backward_in=RAW), "said once"),
        (unit(1, 0, forward_in=Codec("tile", 5)), "5 bits"),
        (unit(1, 0, backward_in=Codec("change", 4)), "cannot carry"),
        (unit(0, 0, forward_in=Codec("tile", 8)), "a border that it does not have"),
        (unit(2, 0, backward_in=Codec("tile", 8)), "a border that it does not have"),
        (unit(0, 0, sends=(Crossing("forward", 0, 0, 0, 5), Crossing("forward", 0, 0, 0, 6))), "twice"),
        (unit(0, 0, sends=(Crossing("backward", 0, 0, 0, 5),)), "no such link"),
        (unit(0, 0, sends=(Crossing("forward", 0, 4, 0, 5),)), "micro-batch 4"),
        (unit(0, 0, sends=(Crossing("forward", 1, 0, 0, 5),)), "replica 1"),
        (unit(0, 0, receives=(Crossing("sync", 0, 0, 0, 5),)), "replica 0"),
        (unit(0, 0, receives=(Crossing("backward", 2, 0, 0, 5),)), "replica 2"),
    ],
)
def test_a_unit_that_contradicts_itself_is_refused(wrong: Stage, words: str) -> None:
    with pytest.raises(MalformedRecord, match=words):
        check_stage(msgspec.msgpack.decode(msgspec.msgpack.encode(wrong), type=Stage))
