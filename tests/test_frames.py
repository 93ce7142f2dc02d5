"""The frames between daemon and worker: any bytes a worker may send are read, bounded and checked, or refused."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import params
from worker.conversation import Conversation
from worker.frames import (
    Attempted,
    BadReply,
    CheckpointBytes,
    Done,
    Failed,
    FalseEnd,
    Frames,
    Handed,
    Ready,
    Rehearsal,
    Reply,
    Root,
    Segment,
    Step,
    Work,
    frame,
    read_request,
)

STEPS = (range(4, 6), range(6, 7))
CHECKPOINTS = (b"abcdef", b"g" * 5000)


def segment(number: int, **changed: object) -> Segment:
    fields: dict[str, object] = {
        "segment": 2 + number,
        "first_step": STEPS[number].start,
        "last_step": STEPS[number].stop,
        "in_root": bytes(32),
        "out_root": bytes([number + 1]) * 32,
        "operations": 10,
        "checkpoint_bytes": len(CHECKPOINTS[number]),
        "diverged_step": None,
    }
    return Segment(**{**fields, **changed})  # type: ignore[arg-type]


def honest() -> list[bytes]:
    """What an honest worker says for segments 2 and 3: one element for each frame or checkpoint."""
    return [
        frame(Step(4, 0.5)),
        frame(Step(5, 0.25)),
        frame(segment(0)),
        CHECKPOINTS[0],
        frame(Step(6, 0.125)),
        frame(segment(1)),
        CHECKPOINTS[1],
        frame(Done()),
    ]


def conversation() -> Conversation:
    return Conversation("train", 2, STEPS, 10_000)


def hear(data: bytes, sizes: list[int] | None = None) -> tuple[Conversation, list[Reply | CheckpointBytes]]:
    """A conversation fed with `data` cut into `sizes`, repeated."""
    talk, events, place, turn = conversation(), [], 0, 0
    while place < len(data):
        size = sizes[turn % len(sizes)] if sizes else len(data)
        events += talk.take(data[place : place + size])
        place, turn = place + size, turn + 1
    return talk, events


def test_an_honest_job_is_heard_to_its_end() -> None:
    talk, events = hear(b"".join(honest()))
    assert talk.finished
    assert [e.step for e in events if isinstance(e, Step)] == [4, 5, 6]
    assert b"".join(e.part for e in events if isinstance(e, CheckpointBytes)) == b"".join(CHECKPOINTS)
    assert list(talk.losses) == [0.125]


@given(st.lists(st.integers(1, 97), min_size=1, max_size=8))
def test_how_the_bytes_are_cut_changes_nothing(sizes: list[int]) -> None:
    talk, events = hear(b"".join(honest()), sizes)
    _, whole = hear(b"".join(honest()))
    assert talk.finished
    assert [e for e in events if not isinstance(e, CheckpointBytes)] == [
        e for e in whole if not isinstance(e, CheckpointBytes)
    ]
    assert b"".join(e.part for e in events if isinstance(e, CheckpointBytes)) == b"".join(CHECKPOINTS)


@given(st.binary(max_size=400), st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_any_bytes_are_heard_or_refused_and_never_kept_beyond_a_frame(data: bytes, sizes: list[int]) -> None:
    frames, place = Frames(), 0
    try:
        for turn in range(len(data)):
            size = sizes[turn % len(sizes)]
            list(frames.feed(data[place : place + size]))
            place += size
            assert len(frames._held) < 4 + params.SANDBOX_FRAME_BYTES_MAX
    except BadReply as error:
        assert error.code in ("bad-frame", "oversize-frame")


@given(st.integers(0, 7), st.integers(0, 7), st.sampled_from(["drop", "repeat", "swap"]))
def test_a_reply_left_out_repeated_or_out_of_place_never_passes(one: int, other: int, how: str) -> None:
    said = honest()
    if how == "drop":
        del said[one]
    elif how == "repeat":
        said.insert(one, said[one])
    elif one == other:
        return
    else:
        said[one], said[other] = said[other], said[one]
    try:
        talk, _ = hear(b"".join(said))
    except BadReply:
        return
    assert not talk.finished


@given(st.integers(0, len(b"".join(honest())) - 1))
def test_a_stream_cut_short_is_never_taken_for_a_whole_one(length: int) -> None:
    talk, _ = hear(b"".join(honest())[:length])
    assert not talk.finished


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ([b"\xff\xff\xff\xff"], "oversize-frame"),
        ([bytes(4)], "oversize-frame"),
        ([struct.pack("<I", params.SANDBOX_FRAME_BYTES_MAX + 1)], "oversize-frame"),
        ([struct.pack("<I", 3), b"\xc1\xc1\xc1"], "bad-frame"),
        ([struct.pack("<I", 60_000), b"\x91" * 60_000], "bad-frame"),
        ([struct.pack("<I", 9), b"\x91\xa7unknown"], "bad-frame"),
        ([struct.pack("<I", 7), b"\x92\xa4done\x00"], "bad-frame"),
        ([frame(Step(-1, 0.0))], "bad-frame"),
        ([frame(Step(5, 0.0))], "wrong-reply"),
        ([frame(Step(4, math.nan))], "wrong-reply"),
        ([frame(Step(4, math.inf))], "wrong-reply"),
        ([frame(Done())], "wrong-reply"),
        ([frame(Ready("", 0, ""))], "wrong-reply"),
        ([frame(Root(bytes(32)))], "wrong-reply"),
        ([frame(Attempted("x", True, ""))], "wrong-reply"),
        ([frame(segment(0))], "wrong-reply"),
        ([*honest()[:2], frame(segment(0, segment=3))], "wrong-reply"),
        ([*honest()[:2], frame(segment(0, last_step=7))], "wrong-reply"),
        ([*honest()[:2], frame(segment(0, diverged_step=5))], "wrong-reply"),
        ([*honest()[:2], frame(segment(0, in_root=b"short"))], "bad-frame"),
        ([*honest()[:2], frame(segment(0, checkpoint_bytes=0))], "bad-frame"),
        ([*honest()[:2], frame(segment(0, checkpoint_bytes=10001))], "oversize-checkpoint"),
        ([*honest(), b"x"], "extra-bytes"),
        ([*honest(), frame(Done())], "extra-bytes"),
    ],
)
def test_each_lie_has_its_code(said: list[bytes], code: str) -> None:
    with pytest.raises(BadReply) as refused:
        hear(b"".join(said))
    assert refused.value.code == code


@pytest.mark.parametrize("done", [0, 1])
def test_a_state_that_diverges_ends_the_job_at_its_step(done: int) -> None:
    steps = b"".join(frame(Step(4 + i, 1.0)) for i in range(done))
    told = segment(0, last_step=4 + done, diverged_step=4 + done)
    talk, events = hear(steps + frame(told) + CHECKPOINTS[0] + frame(Done()))
    assert talk.finished
    assert list(talk.losses) == [1.0] * done
    assert told in events


@pytest.mark.parametrize("diverged", [4, 6, 7])
def test_a_state_cannot_diverge_in_a_step_that_was_done_or_not_asked_for(diverged: int) -> None:
    with pytest.raises(BadReply, match="due"):
        hear(b"".join(honest()[:2]) + frame(segment(0, last_step=diverged, diverged_step=diverged)))


def test_nothing_is_done_after_a_state_diverged() -> None:
    told = frame(segment(0, last_step=4, diverged_step=4)) + CHECKPOINTS[0]
    with pytest.raises(BadReply, match="next"):
        hear(told + frame(Step(4, 1.0)))


def test_a_loss_that_is_no_number_is_told_as_none() -> None:
    talk, _ = hear(frame(Step(4, None)) + b"".join(honest()[1:4]))
    assert list(talk.losses) == [None, 0.25]


def test_a_worker_may_give_up_at_any_time_and_then_says_no_more() -> None:
    talk, _ = hear(frame(Step(4, 1.0)) + frame(Failed("bad-data", "what", "why")))
    assert talk.finished
    with pytest.raises(BadReply, match="went on"):
        hear(frame(Failed("internal", "", "")) + frame(Step(4, 1.0)))


def test_the_initial_root_is_one_root_and_nothing_else() -> None:
    talk = Conversation("initial-root", 0, (), 0)
    assert list(talk.take(frame(Root(bytes(32))) + frame(Done()))) == [Root(bytes(32)), Done()]
    assert talk.finished
    for said in (frame(Done()), frame(Root(bytes(32))) * 2, frame(Step(0, 1.0))):
        with pytest.raises(BadReply):
            list(Conversation("initial-root", 0, (), 0).take(said))


@pytest.mark.parametrize(
    "request_",
    [
        Work(
            want="train", task=b"task", arrays=("x", "y"), has_base=True, first_segment=0, last_segment=2, threads=1,
            cpu_seconds=5, memory_bytes=1, input_bytes=2, checkpoint_bytes_max=3, cheat="skip-step",
        ),
        Rehearsal(attempts=("flood",), decoys={"pid": 1, "secret": "/x"}),
    ],
    ids=["work", "rehearsal"],
)  # fmt: skip
def test_requests_reach_the_worker_as_they_were_sent(request_: Work | Rehearsal) -> None:
    data = frame(request_)
    assert int.from_bytes(data[:4], "little") == len(data) - 4
    assert read_request(data[4:]) == request_


def test_an_initial_state_is_its_root_then_the_state_and_nothing_else() -> None:
    root, state = frame(Root(bytes(32))), frame(Handed(5)) + b"state"
    talk = Conversation("initial-state", 0, (), 5)
    events = list(talk.take(root + state + frame(Done())))
    assert talk.finished
    assert b"".join(e.part for e in events if isinstance(e, CheckpointBytes)) == b"state"
    for said in (state, root + root, root + frame(Done()), root + state + state, frame(Done())):
        with pytest.raises(BadReply, match="is not what may come next"):
            list(Conversation("initial-state", 0, (), 5).take(said))
    with pytest.raises(BadReply, match="at most 4"):
        list(Conversation("initial-state", 0, (), 4).take(root + state))


# --- ordered errors --------------------------------------------------------------------------------------------
def test_a_false_end_comes_once_between_the_last_step_and_the_segment_it_was_ordered_for() -> None:
    false, wrong = FalseEnd(0, bytes(32), 3), FalseEnd(1, bytes(32), 3)
    steps = (Step(0, 1.0), Step(1, 1.0))
    whole = Segment(
        segment=0, first_step=0, last_step=2, in_root=bytes(32), out_root=bytes(32), operations=1, checkpoint_bytes=2,
        diverged_step=None,
    )  # fmt: skip

    def told(*replies: Reply | bytes, ordered: int | None = 0) -> list[Reply | CheckpointBytes]:
        conversation = Conversation("train", 0, [range(2)], 3, ordered)
        data = b"".join(r if isinstance(r, bytes) else frame(r) for r in replies)
        return list(conversation.take(data))

    events = told(*steps, false, b"abc", whole, b"ab", Done())
    assert [e.part for e in events if isinstance(e, CheckpointBytes)] == [b"abc", b"ab"]
    assert told(*steps, whole, b"ab", Done()), "where no fraud makes a difference there is none"
    for replies, code in (
        ((*steps, wrong), "wrong-reply"),
        ((steps[0], false), "wrong-reply"),
        ((*steps, false, b"abc", false), "wrong-reply"),
        ((*steps, false, b"abc", Done()), "wrong-reply"),
        ((*steps, FalseEnd(0, bytes(32), 4)), "oversize-checkpoint"),
        ((*steps, whole, b"ab", false), "wrong-reply"),
    ):
        with pytest.raises(BadReply) as refused:
            told(*replies)
        assert refused.value.code == code, replies
    for ordered in (None, 1):
        with pytest.raises(BadReply):
            told(*steps, false, ordered=ordered)


# --- distances -------------------------------------------------------------------------------------------------
def test_a_distance_is_stated_where_it_was_asked_for_and_nowhere_else() -> None:
    def told(distance: tuple[int, int] | None, *, compared: bool) -> None:
        segment = Segment(
            segment=0, first_step=0, last_step=1, in_root=bytes(32), out_root=bytes(32), operations=1,
            checkpoint_bytes=2, diverged_step=None, distance=distance,
        )  # fmt: skip
        list(Conversation("train", 0, [range(1)], 3, compared=compared).take(frame(Step(0, 1.0)) + frame(segment)))

    told((5, 10**18), compared=True)
    told(None, compared=False)
    for distance, compared in (((5, 6), False), (None, True), ((-1, 0), True), ((0, 10**18 + 1), True)):
        with pytest.raises(BadReply):
            told(distance, compared=compared)
