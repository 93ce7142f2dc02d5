"""One link's two ends, driven by every order of events: each payload is taken once, whole, within the credit."""

from __future__ import annotations

import tracemalloc
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from peer.tensor_state import Incoming, Outgoing, Seat, Waits, expected_of, receivers_of
from peer.tensor_wire import Grant, Greeting, Part
from protocol import params
from protocol.errors import MalformedRecord
from protocol.payload import PayloadKey
from protocol.stage import Codec, Crossing, Stage
from tests.tensor_scene import expected, key

WINDOW = 1 << 16


class LinkMachine(RuleBasedStateMachine):
    """A sender and a receiver, and two queues of what is on its way between them."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.into = Outgoing(), Incoming(0, expected(), WINDOW)
        self.seat, self.session, self.step = Seat(b"a" * 32), b"s" * 16, 0
        self.parts: deque[Part] = deque()
        self.grants: deque[Grant] = deque()
        self.sent: dict[PayloadKey, bytes] = {}
        self.got: dict[PayloadKey, bytes] = {}
        self.given: set[PayloadKey] = set()

    @rule(size=st.sampled_from([0, 1, 700, 40_000, 300_000]))
    def send(self, size: int) -> None:
        one = key(self.step)
        self.step += 1
        self.sent[one] = bytes([one.step % 251]) * size
        self.out.add(one, size)

    @rule()
    def connect(self) -> None:
        self.parts.clear()
        self.grants.clear()
        self.out.lost()
        self.out.welcome(self.into.greet(self.session, self.seat))

    @rule()
    def restart_sender(self) -> None:
        """Its successor makes the same payloads again."""
        self.session = bytes([self.session[0] ^ 1]) * 16
        self.seat = Seat(self.seat.peer, self.seat.epoch + 1)
        self.out = Outgoing()
        self.connect()
        for one, payload in self.sent.items():
            if one.step >= self.into.floor:
                self.out.add(one, len(payload))

    @rule(count=st.integers(1, 8))
    def move(self, count: int) -> None:
        for _ in range(count):
            if (part := self.out.next_part()) is not None:
                self.parts.append(part)
            if self.parts:
                self.take(self.parts.popleft())

    def take(self, part: Part) -> None:
        self.into.begin(part)
        if part.length:
            self.into.feed(self.sent[part.key][part.offset : part.offset + part.length])
        if (whole := self.into.finish()) is not None:
            one, payload, double = whole
            assert not double, "what the receiver has is not sent again"
            assert one not in self.got
            self.got[one] = payload

    @rule(stuck=st.booleans())
    def tell(self, stuck: bool) -> None:
        if (grant := self.into.grant(stuck=stuck)) is not None and self.out.linked:
            self.grants.append(grant)
        if self.grants:
            self.out.granted(self.grants.popleft())

    @rule(count=st.integers(1, 4))
    def work(self, count: int) -> None:
        for one in sorted(set(self.got) - self.given)[:count]:
            self.given.add(one)
            self.into.given(len(self.got[one]))

    @rule()
    def release(self) -> None:
        before = min((one.step for one in self.sent if one not in self.given), default=self.step)
        self.out.release(before)
        self.into.release(before)

    @invariant()
    def what_arrived_is_what_was_sent(self) -> None:
        assert all(self.got[one] == self.sent[one] for one in self.got)

    @invariant()
    def what_is_held_is_bounded(self) -> None:
        most = WINDOW + self.into.extra_bytes + 300_000 + 2 * params.TENSOR_PAYLOAD_COST
        assert 0 <= self.into.held_bytes <= most

    @invariant()
    def what_waits_is_what_was_not_taken(self) -> None:
        assert self.out.waiting_bytes >= 0

    def teardown(self) -> None:
        """Whatever happened: a stream that lasts brings everything, in order."""
        self.connect()
        for _ in range(4 * len(self.sent) + 8):
            self.work(4)
            self.tell(stuck=True)
            self.move(8)
        assert self.got == {one: payload for one, payload in self.sent.items() if one in self.got}
        assert set(self.got) == set(self.sent)
        self.tell(stuck=True)
        self.tell(stuck=True)
        assert self.out.waiting_bytes == 0


TestLink = LinkMachine.TestCase
TestLink.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_receiver_may_not_take_back_or_claim() -> None:
    out = Outgoing()
    out.add(key(0), 10)
    out.welcome(Greeting(credit=1000))
    assert out.next_part() == Part(key(0), 10, 10, 0)
    for wrong in (Grant(999, 0), Grant(1000, 2)):
        with pytest.raises(MalformedRecord):
            out.granted(wrong)
    out.granted(Grant(1000, 1))
    with pytest.raises(MalformedRecord):
        out.granted(Grant(1000, 0))
    with pytest.raises(MalformedRecord):
        fresh = Outgoing()
        fresh.add(key(0), 10)
        fresh.welcome(Greeting(partial=key(0), partial_bytes=11))


def test_a_payload_in_short_parts_keeps_no_message_in_memory() -> None:
    into = Incoming(0, expected(), WINDOW)
    into.greet(b"s" * 16, Seat(b"a" * 32))
    count = 3
    for at in range(count):
        into.begin(Part(key(0), 1, count, at))
        message = bytearray(65_519)
        into.feed(memoryview(message)[:1])
        message.extend(b"a message that nothing refers to can change its size")
    assert into.finish() == (key(0), bytes(count), False)


def test_what_is_released_is_kept_until_it_is_taken() -> None:
    out = Outgoing()
    for step in range(3):
        out.add(key(step), 10)
    assert out.release(2) == []
    out.welcome(Greeting(credit=10_000, have=(key(1),)))
    assert list(out.sizes) == [key(0), key(2)]
    while out.next_part():
        pass
    assert out.granted(Grant(10_000, 2)) == [key(0)]
    assert list(out.sizes) == [key(2)]


def test_a_stage_expects_its_crossings_and_nothing_else() -> None:
    codec = Codec("float32")
    stage = Stage(
        run=b"r" * 32, stage=1, stages=2, replica=0, replicas=2, micro_batches=2, forward=codec, backward=codec,
        sync="step", shared=codec,
        sends=(Crossing("backward", 0, 0, 0, 5), Crossing("sync", 0, 0, 0, 6)),
        receives=(Crossing("forward", 0, 0, 0, 1), Crossing("forward", 0, 1, 0, 2), Crossing("sync", 1, 0, 0, 3)),
    )  # fmt: skip
    found = expected_of(stage, steps=range(10))
    assert set(found) == {0, 3}
    assert receivers_of(stage) == {0, 3}
    found[0].check(key(9, micro_batch=1))
    found[3].check(key(0, unit=3, flow="sync"))
    for unit, wrong in [(0, key(10)), (0, key(0, index=1)), (3, key(0, unit=3)), (3, key(0, unit=3, flow="outer"))]:
        with pytest.raises(MalformedRecord):
            found[unit].check(wrong)


def test_a_deadline_follows_the_longest_waits_of_the_last_steps() -> None:
    waits = Waits()
    assert waits.deadline_s == params.TENSOR_FIRST_WAIT_SECONDS
    waits.add(0, 10.0)
    for _ in range(1000):
        waits.add(1, 0.0)  # many short ones in one step do not hide the long one of the step before
    assert waits.deadline_s == params.TENSOR_WAIT_SECONDS_MIN + 10.0 * params.TENSOR_WAIT_FACTOR
    for step in range(2, 2 + params.TENSOR_WAITS_KEPT):
        waits.add(step, 1.0)
    assert waits.deadline_s == params.TENSOR_WAIT_SECONDS_MIN + 1.0 * params.TENSOR_WAIT_FACTOR


def test_a_payload_in_the_shortest_parts_takes_no_more_memory_than_its_bytes() -> None:
    into, count = Incoming(0, expected(), WINDOW), 40_000
    into.greet(b"s" * 16, Seat(b"a" * 32))
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for at in range(count):
        into.begin(Part(key(0), 1, count, at))
        into.feed(memoryview(b"x"))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 4 * count, "its sender pays a byte of credit for each"
    assert into.finish() == (key(0), b"x" * count, False)
