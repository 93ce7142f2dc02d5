"""Between namespaces a packet waits as long as rate and delay say, queues are bounded, and none is lost uncounted."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.packet_lines import (
    BURST_BYTES,
    HEADER_BYTES,
    QUEUE_BYTES_MIN,
    Line,
    PacketLines,
    queue_bytes,
    wire_bytes,
)

MS = 10**6
HOSTS = [bytes((10, 77, 0, last)) for last in (1, 2, 3)]


def frame(to: int, size: int, *, mark: int = 0, protocol: int = 17, segment: int = 0) -> bytes:
    """A frame whose packet has `size` bytes, for port `to`; `segment`: as TCP leaves it to be cut."""
    header = struct.pack("<BBHHHH", 0, 1 if segment else 0, 40, segment, 0, 0)
    ip = bytes((0x45, 0)) + size.to_bytes(2, "big") + bytes(5) + bytes((protocol,)) + bytes(2) + HOSTS[0] + HOSTS[to]
    tcp = bytes(12) + bytes((0x50,)) + bytes(7)
    return header + (ip + tcp + mark.to_bytes(4, "big")).ljust(size, b"\0")[:size]


def lines(bits_per_second: int = 10**7, delay_ns: int = 50 * MS) -> PacketLines:
    return PacketLines(HOSTS, bits_per_second=bits_per_second, delay_ns=delay_ns)


def all_of(world: PacketLines) -> list[tuple[int, int, bytes]]:
    """(when, port, frame) of all that is on its way, each taken just when it is due."""
    found = []
    while (next_ns := world.next_ns()) is not None:
        assert world.due(next_ns - 1) == []
        found += [(next_ns, port, one) for port, one in world.due(next_ns)]
    return found


# --- a line ------------------------------------------------------------------------------------------------
def test_a_line_takes_its_time_for_each_byte_after_its_bucket_is_empty() -> None:
    line = Line(10**7, 50 * MS, 10**6)
    first = [line.offer(1500, 0) for _ in range(2)]
    assert first == [50 * MS, 50 * MS], "the bucket holds two"
    assert [line.offer(1500, 0) for _ in range(3)] == [50 * MS + n * 1_200_000 for n in (1, 2, 3)]
    after = 10**9  # the bucket is full again, and holds no more than before
    assert [line.offer(1500, after) for _ in range(3)] == [after + 50 * MS, after + 50 * MS, after + 51_200_000]


def test_a_full_queue_drops_what_comes_and_keeps_what_is_in_it() -> None:
    line = Line(10**6, 0, 10_000)
    out = [line.offer(1000, 0) for _ in range(20)]
    taken = [when for when in out if when is not None]
    assert out == taken + [None] * (20 - len(taken)), "the tail is dropped"
    assert (len(taken), line.packets, line.dropped, line.dropped_bytes) == (13, 13, 7, 7000)
    assert line.waiting_bytes(0) == 10_000
    assert line.offer(1000, 8 * MS) is not None, "after a packet's time there is room for one"
    assert line.offer(1000, 8 * MS) is None
    assert line.queue_bytes_max == 10_000


def test_an_empty_queue_takes_even_what_is_larger_than_it() -> None:
    line = Line(10**6, 0, 1000)
    assert line.offer(60_000, 0) == (60_000 - BURST_BYTES) * 8000
    assert line.offer(60_000, 0) is None


def test_no_rate_is_no_bound() -> None:
    line = Line(0, 7, 0)
    assert [line.offer(60_000, 5) for _ in range(3)] == [12] * 3
    assert (line.packets, line.dropped) == (3, 0)


def test_a_queue_holds_what_its_rate_sends_in_a_round_trip() -> None:
    assert queue_bytes(10**8, 50 * MS) == 1_250_000
    assert queue_bytes(10**6, 50 * MS) == QUEUE_BYTES_MIN


@given(
    rate=st.integers(10**5, 10**9),
    packets=st.lists(st.tuples(st.integers(1, 65_535), st.integers(0, 50 * MS)), min_size=1, max_size=80),
)
def test_no_line_is_ever_faster_than_its_rate_and_a_bucket(rate: int, packets: list[tuple[int, int]]) -> None:
    line, now, passed = Line(rate, 0, 1 << 20), 0, list[tuple[int, int]]()
    for size, pause_ns in packets:
        now += pause_ns
        out_ns = line.offer(size, now)
        if out_ns is not None:
            assert out_ns >= now
            passed.append((out_ns, size))
    assert passed == sorted(passed, key=lambda one: one[0]), "order is kept"
    for start in range(len(passed)):
        for end in range(start, len(passed)):
            sent = sum(size for _, size in passed[start : end + 1])
            # The first of them may have begun before: what is bounded is what comes after it.
            within = sent - passed[start][1]
            assert within * 8 * 10**9 <= (passed[end][0] - passed[start][0] + 1) * rate + BURST_BYTES * 8 * 10**9


# --- all lines ---------------------------------------------------------------------------------------------
def test_a_packet_arrives_at_its_address_after_its_delay_and_not_before() -> None:
    world = lines()
    one = frame(1, 1000)
    world.take(0, one, 5)
    assert world.due(5 + 50 * MS - 1) == []
    assert world.due(5 + 50 * MS) == [(1, one)]
    assert world.due(10**18) == []
    assert world.next_ns() is None


def test_all_that_one_sends_shares_its_uplink_and_all_that_one_gets_its_downlink() -> None:
    for senders, targets in (((0, 0), (1, 2)), ((0, 1), (2, 2))):
        world = lines(bits_per_second=10**7)
        for number in range(40):
            for sender, target in zip(senders, targets, strict=True):
                world.take(sender, frame(target, 1000, mark=number), 0)
        last_ns = all_of(world)[-1][0]
        assert last_ns == 50 * MS + (80_000 - BURST_BYTES) * 800, "80 kB at 10 Mbit/s, whichever way they share"
    world = lines(bits_per_second=10**7)
    for number in range(40):
        world.take(0, frame(1, 1000, mark=number), 0)
        world.take(1, frame(0, 1000, mark=number), 0)
    assert all_of(world)[-1][0] == 50 * MS + (40_000 - BURST_BYTES) * 800, "the two ways do not"


def test_a_late_process_neither_drops_nor_delays_more() -> None:
    prompt, late = lines(10**6), lines(10**6)
    for world in (prompt, late):
        for number in range(50):
            for sender in (0, 1):
                world.take(sender, frame(2, 1000, mark=number), 0)
    told = all_of(prompt)
    assert [(2, one) for _, _, one in told] == late.due(10**12)
    assert late.late_ns_max == 10**12 - told[0][0]


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        bytes(HEADER_BYTES + 19),
        bytes(HEADER_BYTES) + b"\x60" + bytes(60),  # IPv6
        frame(0, 100),  # to itself
        frame(1, 100).replace(HOSTS[1], bytes((224, 0, 0, 251))),  # multicast DNS
    ],
)
def test_what_is_for_nobody_is_counted_and_gone(wrong: bytes) -> None:
    world = lines()
    world.take(0, wrong, 0)
    assert (world.unrouted, world.on_their_way, world.next_ns()) == (1, 0, None)


def test_a_large_segment_costs_what_its_pieces_would() -> None:
    whole = frame(1, 40 + 14_000, protocol=6, segment=1400)
    assert wire_bytes(whole) == 10 * 1440
    assert wire_bytes(frame(1, 40 + 14_001, protocol=6, segment=1400)) == 14_041 + 10 * 40
    assert wire_bytes(frame(1, 1000, protocol=6)) == 1000
    assert wire_bytes(frame(1, 1000, segment=500)) == 1000, "only TCP is cut"
    assert wire_bytes(frame(1, 22, protocol=6, segment=1400)) == 22, "a cut-off header is no reason to fail"


@given(
    rate=st.sampled_from([10**5, 10**6, 10**8]),
    sends=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(44, 20_000), st.integers(0, 5 * MS)), max_size=120
    ),
)
def test_every_packet_is_delivered_once_in_order_or_counted_as_dropped(
    rate: int, sends: list[tuple[int, int, int, int]]
) -> None:
    world, now, taken = lines(rate, 3 * MS), 0, dict[tuple[int, int], list[bytes]]()
    got: dict[tuple[int, int], list[bytes]] = {}

    def note(found: list[Any]) -> None:
        for port, one in found:
            got.setdefault((int.from_bytes(one[-4:], "big"), port), []).append(one)

    for mark, (sender, target, size, pause_ns) in enumerate(sends):
        now += pause_ns
        note(world.due(now))
        one = frame(target, size, mark=mark)[:-8] + mark.to_bytes(4, "big") + sender.to_bytes(4, "big")
        world.take(sender, one, now)
        taken.setdefault((sender, target), []).append(one)
    note([(port, one) for _, port, one in all_of(world)])
    counted = world.counters()
    assert counted["taken"] == len(sends)
    assert counted["delivered"] == sum(map(len, got.values()))
    assert len(sends) == counted["delivered"] + counted["dropped"] + counted["unrouted"]
    assert counted["unrouted"] == sum(len(ones) for (a, b), ones in taken.items() if a == b)
    for pair, ones in got.items():
        rest = iter(taken[pair])
        assert all(one in rest for one in ones), "each once, in the order it was sent"
