"""What a unit's worker may ask for and hand over: its own crossings, each once, in its step; anything else ends it."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from peer.unit_exchange import UnitExchange
from peer.work_order import SegmentDone, WorkFailed, WorkOrder
from peer.work_progress import Progress
from protocol import params
from protocol.payload import PayloadKey
from tests.unit_scene import MemoryNet, stage_of, unit_program
from worker.conversation import Conversation
from worker.frames import BadReply, CheckpointBytes, Done, Failed, Reply, Segment, Step, frame
from worker.stage_frames import CrossingTalk, Need, Sent

LOCAL: dict[str, Any] = {"replicas": 2, "sync": "local", "outer_rate_nano": 1, "outer_momentum_nano": 1}
FIRST, LAST = 2, 3  # the steps of segment 1


def talk_of(**fields: Any) -> CrossingTalk:
    program, stage = unit_program(stage_of(0, **fields))
    return CrossingTalk.of(stage, program)


def conversation(**fields: Any) -> Conversation:
    return Conversation("train", 1, [range(FIRST, LAST + 1)], 1000, crossings=talk_of(**fields))


def key(flow: str, step: int, micro_batch: int = 0, unit: int = 0) -> PayloadKey:
    return PayloadKey(step, flow, micro_batch, 0, unit)  # type: ignore[arg-type]


def exchanges(step: int) -> list[Any]:
    """What stage 0 of the pair says in one step: it sends two activations, and asks for two gradients."""
    sends = [(Sent(key("forward", step, m), 32), bytes(32)) for m in range(2)]
    return [*sends, *(Need(key("backward", step, m, 1)) for m in range(2))]


SEGMENT = Segment(
    segment=1, first_step=FIRST, last_step=LAST + 1, in_root=bytes(32), out_root=bytes(32), operations=1,
    checkpoint_bytes=5, diverged_step=None,
)  # fmt: skip
END: list[Any] = [(SEGMENT, b"state"), Done()]


def honest() -> list[Any]:
    return [*exchanges(FIRST), Step(FIRST, 1.0), *exchanges(LAST), Step(LAST, 1.0), *END]


def said(words: list[Any]) -> bytes:
    return b"".join(frame(w[0]) + w[1] if isinstance(w, tuple) else frame(w) for w in words)


def hear(words: list[Any], size: int = 10**6, **fields: Any) -> list[Reply | CheckpointBytes]:
    talk, data, found = conversation(**fields), said(words), []
    for place in range(0, len(data), size):
        found += list(talk.take(data[place : place + size]))
    assert talk.finished
    return found


@given(st.integers(1, 200))
def test_an_honest_unit_is_heard_however_its_bytes_are_cut(size: int) -> None:
    heard = hear(honest(), size)
    assert [event for event in heard if isinstance(event, Need | Sent)] == [
        word[0] if isinstance(word, tuple) else word
        for word in honest()
        if isinstance(word, Need) or (isinstance(word, tuple) and isinstance(word[0], Sent))
    ]
    assert sum(len(event.part) for event in heard if isinstance(event, CheckpointBytes)) == 4 * 32 + 5


@pytest.mark.parametrize(
    "words",
    [
        [Need(key("forward", FIRST))],  # its own
        [Need(key("backward", FIRST, 0, 0))],  # of the wrong unit
        [Need(key("backward", LAST, 0, 1))],  # of a later step
        [Need(key("backward", FIRST - 1, 0, 1))],  # of an earlier one
        [Need(key("backward", FIRST, 2, 1))],  # of no micro-batch
        [Need(key("sync", FIRST, 0, 1))],
        [Need(key("backward", FIRST, 0, 1)), Need(key("backward", FIRST, 0, 1))],  # twice
        [(Sent(key("forward", FIRST), 32), bytes(32))] * 2,
        [Sent(key("forward", FIRST, 0, 1), 32)],  # in another unit's name
        [Sent(key("backward", FIRST), 32)],
        [Sent(key("forward", FIRST), 33)],  # too large
        [Sent(key("outer", LAST), 32)],
        [Step(FIRST, 1.0)],  # with nothing exchanged
        [*exchanges(FIRST)[:-1], Step(FIRST, 1.0)],
        [*honest()[:-2], Need(key("backward", LAST + 1, 0, 1))],  # after the last step
        [*honest()[:-1], Need(key("backward", LAST + 1, 0, 1))],  # after the segment
    ],
)
def test_what_a_hostile_unit_says_ends_it(words: list[Any]) -> None:
    with pytest.raises(BadReply) as refused:
        hear(words)
    assert refused.value.code == "wrong-reply"


def test_an_ordinary_job_has_nothing_to_exchange() -> None:
    plain = Conversation("train", 1, [range(FIRST, LAST + 1)], 1000)
    with pytest.raises(BadReply):
        list(plain.take(said(honest()[:1])))


def test_a_payload_larger_than_any_is_no_frame() -> None:
    body = msgspec.msgpack.encode(["sent", [FIRST, "forward", 0, 0, 0], 2**40])
    with pytest.raises(BadReply) as refused:
        list(conversation().take(len(body).to_bytes(4, "little") + body))
    assert refused.value.code == "bad-frame"


def test_the_outer_exchange_belongs_to_the_last_step_of_a_segment() -> None:
    outer = [(Sent(key("outer", LAST), 48), bytes(48)), Need(key("outer", LAST, 0, 1))]
    one = [
        msgspec.structs.replace(word, key=msgspec.structs.replace(word.key, unit=2)) if isinstance(word, Need) else word
        for word in exchanges(FIRST)
    ]
    two = [
        msgspec.structs.replace(word, key=msgspec.structs.replace(word.key, unit=2)) if isinstance(word, Need) else word
        for word in exchanges(LAST)
    ]
    hear([*one, Step(FIRST, 1.0), *two, *outer, Step(LAST, 1.0), *END], **LOCAL)
    early = [(Sent(key("outer", FIRST), 48), bytes(48))]
    for words in (
        [*one, *early],
        [*one, Step(FIRST, 1.0), *two, Step(LAST, 1.0)],
        [*one, Step(FIRST, 1.0), *two, *outer, outer[1]],
        [*one, Step(FIRST, 1.0), *two, *outer[:1], Step(LAST, 1.0)],
    ):
        with pytest.raises(BadReply):
            hear(words, **LOCAL)


def test_a_step_that_diverges_may_leave_its_exchanges_undone() -> None:
    ended = msgspec.structs.replace(SEGMENT, last_step=LAST, diverged_step=LAST)
    hear([*exchanges(FIRST), Step(FIRST, 1.0), *exchanges(LAST)[:1], (ended, b"state"), Done()])


# --- time ----------------------------------------------------------------------------------------------------
class SlowNet(MemoryNet):
    """A port that takes its time."""

    async def send(self, key: PayloadKey, others: tuple[int, ...], payload: bytes) -> None:
        await trio.sleep(1000)


async def test_the_time_that_others_take_is_not_the_workers(autojump_clock: trio.testing.MockClock) -> None:
    exchange = UnitExchange(stage_of(0), SlowNet(), talk_of(), None, "work")  # type: ignore[arg-type]
    with trio.move_on_after(10) as patience:
        exchange.serves(None, patience)  # type: ignore[arg-type]
        await trio.sleep(6)
        for _ in range(3):
            await exchange.heard(Sent(key("forward", 0), 0), 0, 0)
        await trio.sleep(3)
        assert not patience.cancel_called
        await trio.sleep(math.inf)
    assert patience.cancelled_caught
    assert trio.current_time() == pytest.approx(3010)


async def test_no_neighbour_is_waited_for_for_ever(autojump_clock: trio.testing.MockClock, tmp_path: Any) -> None:
    exchange = UnitExchange(stage_of(0), MemoryNet(), talk_of(), tmp_path, "work")
    with trio.fail_after(math.inf) as patience:  # the clock jumps while the tape is opened in a thread
        exchange.serves(None, patience)  # type: ignore[arg-type]
        with pytest.raises(WorkFailed, match="unit 1 did not send") as failed:
            await exchange.heard(Need(key("backward", 0, 0, 1)), 0, 32)
    assert failed.value.code == "no-neighbour"
    assert trio.current_time() == pytest.approx(params.UNIT_WAIT_SECONDS_MAX)
    exchange.close()


async def test_a_payload_larger_than_its_tensor_is_not_fed(tmp_path: Any) -> None:
    net = MemoryNet(sent={key("backward", 0, 0, 1): bytes(33)})
    exchange = UnitExchange(stage_of(0), net, talk_of(), tmp_path, "work")
    with trio.fail_after(10) as patience:
        exchange.serves(None, patience)  # type: ignore[arg-type]
        with pytest.raises(WorkFailed, match="33 bytes") as failed:
            await exchange.heard(Need(key("backward", 0, 0, 1)), 0, 32)
    assert failed.value.code == "bad-payload" and failed.value.unit == 1
    exchange.close()


@pytest.mark.parametrize(
    ("fed", "code", "unit"), [({1}, "bad-payload", 1), ({0}, "bad-payload", -1), ({1}, "bad-data", -1)]
)
async def test_a_worker_blames_only_a_neighbour_that_it_was_fed_something_of(
    fed: set[int], code: Any, unit: int, tmp_path: Any
) -> None:
    exchange = UnitExchange(stage_of(0), MemoryNet(), talk_of(), tmp_path, "work", fed=fed)
    order = WorkOrder("work", b"", tmp_path, {}, None, 1, 2, 1, 1, 1.0, 1)

    async def none(_: SegmentDone) -> None:
        await trio.lowlevel.checkpoint()

    progress = Progress(order, tmp_path, lambda step, loss: None, none, exchange)
    with pytest.raises(WorkFailed) as failed:
        await progress.take(Failed(code, "no", "", 1), conversation())
    assert (failed.value.code, failed.value.unit) == (code, unit)
