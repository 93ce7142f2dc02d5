"""Payloads between units: once, in whole, from who may send them, whatever happens to streams and peers."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from peer import payload_shelf
from peer.links import PeerUnreachable, Stream
from peer.payload_shelf import ShelfFull
from peer.tensor_links import Seat
from peer.tensor_port import TensorPort
from peer.tensor_wire import Greeting, Hello, Part
from protocol import params
from protocol.codec import decode, encode
from protocol.errors import LocalProtocolError
from tests.tensor_scene import RUN, SECONDS_MAX, Net, NetHost, expected, key, open_net, pair, peer, place


def payload_of(step: int, index: int = 0, size: int = 1000) -> bytes:
    return random.Random(1000 * step + index).randbytes(size)


async def test_what_is_sent_arrives_by_key_in_any_order_of_asking(tmp_path: Path, autojump_clock: object) -> None:
    async with open_net() as net, pair(net, tmp_path) as (one, two):
        for step in range(3):
            for index in range(8):
                await one.send(key(step, index=index), (1,), payload_of(step, index))
        for step in reversed(range(3)):
            for index in (5, 0, 7, 1, 2, 3, 4, 6):
                assert await two.want(key(step, index=index)) == payload_of(step, index)
        assert await two.want(key(1, index=1)) == payload_of(1, 1), "a key may be asked for again"
        assert two.waiting_for() == ()
        assert net.penalties == []


async def test_a_payload_may_be_empty_or_larger_than_every_window(tmp_path: Path) -> None:
    big = payload_of(0, 1, size=3 << 20)
    async with (
        open_net() as net,
        pair(net, tmp_path, window_bytes=1 << 16, queue_bytes=1 << 16, memory_bytes=1 << 18) as (one, two),
        trio.open_nursery() as nursery,
    ):
        nursery.cancel_scope.deadline = trio.current_time() + SECONDS_MAX  # what is spilled is written by threads
        nursery.start_soon(one.send, key(0), (1,), b"")
        nursery.start_soon(one.send, key(0, index=1), (1,), big)
        assert await two.want(key(0)) == b""
        assert await two.want(key(0, index=1)) == big


async def test_a_reader_that_takes_nothing_stops_the_writer_and_memory_stays_bounded(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    window = queue = 1 << 18
    async with open_net() as net, pair(net, tmp_path, window_bytes=window, queue_bytes=queue) as (one, two):
        sent = 0
        with trio.move_on_after(60):
            for step in range(1000):
                await one.send(key(step), (1,), payload_of(step, size=50_000))
                sent = step + 1
        assert sent * 50_000 >= queue, "one that is slow to take is not waited for at once"
        assert (sent - 1) * 50_000 <= window + queue
        assert two.shelf.memory_bytes <= window + 50_000
        (waits,) = one.waiting_for() or [None]
        assert waits is None, "the cancelled send waits no longer"
        for step in range(sent):
            assert await two.want(key(step)) == payload_of(step, size=50_000)


async def test_two_units_that_send_much_before_they_ask_do_not_wait_for_each_other_for_ever(tmp_path: Path) -> None:
    seats = {unit: Seat(peer(unit)) for unit in (0, 1)}
    got: dict[int, bytes] = {}
    over: list[int] = []

    async def average(net: Net, unit: int) -> None:
        other = 1 - unit
        links = net.host(peer(unit), tmp_path)
        where = place(unit, to={other}, comes={other: expected(flow="sync")})
        with links.open(where, seats, window_bytes=1 << 16, queue_bytes=1 << 16, memory_bytes=1 << 19) as port:
            for index in range(8):
                await port.send(key(0, index=index, unit=unit, flow="sync"), (other,), payload_of(unit, index, 1 << 18))
            for index in range(8):
                got[unit] = await port.want(key(0, index=index, unit=other, flow="sync"))
                assert got[unit] == payload_of(other, index, 1 << 18)
            over.append(unit)
            while len(over) < 2:  # noqa: ASYNC110  # the other one may still need what was kept
                await trio.sleep(0.01)

    async with open_net() as net:
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(average, net, 0)
                nursery.start_soon(average, net, 1)
    assert len(got) == 2


async def test_broken_streams_are_made_anew_and_go_on_where_they_were(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_net() as net, pair(net, tmp_path) as (one, two), trio.open_nursery() as nursery:

        async def send() -> None:
            for step in range(40):
                await one.send(key(step), (1,), payload_of(step, size=600_000))
                await trio.sleep(0.1)

        async def break_it() -> None:
            for _ in range(6):
                await trio.sleep(0.4)
                await net.break_streams()

        nursery.start_soon(send)
        nursery.start_soon(break_it)
        for step in range(40):
            assert await two.want(key(step)) == payload_of(step, size=600_000)
        assert net.opened >= 6
        assert two.bytes_in < 41 * 600_000 + 6 * params.TENSOR_PART_BYTES, "what had come was not sent again"
        assert net.penalties == []


async def test_a_replacement_is_sent_everything_since_the_last_release(tmp_path: Path, autojump_clock: object) -> None:
    async with open_net() as net, pair(net, tmp_path) as (one, two):
        for step in range(6):
            await one.send(key(step), (1,), payload_of(step))
            await two.want(key(step))
        one.release(3)
        late = net.host(peer(1, 1), tmp_path)
        with late.open(place(1, comes={0: expected()}, epoch=1), {0: Seat(peer(0))}) as three:
            one.replace(1, peer(1, 1), 1)
            for step in range(3, 6):
                assert await three.want(key(step)) == payload_of(step)
            await one.send(key(6), (1,), payload_of(6))
            assert await three.want(key(6)) == payload_of(6)
            with trio.move_on_after(30) as scope:
                await two.want(key(6))
            assert scope.cancelled_caught, "the one that was replaced gets nothing more"
            three.release(7)
            one.release(7)
            await trio.sleep(5)
            assert one.shelf.memory_bytes == three.shelf.memory_bytes == 0


async def test_a_replaced_sender_is_not_heard_and_its_successor_sends_only_what_is_lacking(
    tmp_path: Path, autojump_clock: object
) -> None:
    async with open_net() as net, pair(net, tmp_path) as (one, two):
        for step in range(4):
            await one.send(key(step), (1,), payload_of(step, size=100_000))
        await two.want(key(3))
        two.replace(0, peer(0, 1), 1)
        await one.send(key(4), (1,), b"from who was replaced")
        links = net.host(peer(0, 1), tmp_path)
        with links.open(place(0, to={1}, epoch=1), {1: Seat(peer(1))}) as successor:
            for step in range(6):
                await successor.send(key(step), (1,), payload_of(step, size=100_000))
                await trio.sleep(1)  # it replays: the link is there before what the other side has
            assert await two.want(key(4)) == payload_of(4, size=100_000)
            assert await two.want(key(5)) == payload_of(5, size=100_000)
            assert successor.bytes_out == 200_000
        assert net.penalties == []
        assert not two.differences


async def test_silence_is_noticed_and_said(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with open_net() as net, pair(net, tmp_path) as (one, two), trio.open_nursery() as nursery:
        for step in range(3):
            await one.send(key(step), (1,), payload_of(step))
            await two.want(key(step))
        nursery.start_soon(two.want, key(3))
        await trio.sleep(1)
        (waits,) = two.waiting_for()
        assert (waits.unit, waits.peer, waits.key, waits.linked, waits.late) == (0, peer(0), key(3), True, False)
        net.cut.add(peer(0))
        await net.break_streams()
        await trio.sleep(20)
        (waits,) = two.waiting_for()
        assert (waits.linked, waits.late) == (False, True)
        assert waits.seconds == pytest.approx(21)
        assert "not connected" in waits.words()
        net.cut.clear()
        await one.send(key(3), (1,), payload_of(3))
        await trio.sleep(5)
        assert two.waiting_for() == ()


async def test_who_waits_says_for_whom(tmp_path: Path, autojump_clock: object) -> None:
    """0 -> 1 -> 2: unit 2 learns that it is unit 0 which everybody waits for."""
    seats = {unit: Seat(peer(unit)) for unit in range(3)}
    async with open_net() as net, trio.open_nursery() as nursery:
        places = [
            place(0, to={1}), place(1, to={2}, comes={0: expected()}), place(2, comes={1: expected()}),
        ]  # fmt: skip
        ports = [net.host(peer(one.unit), tmp_path).open(one, seats) for one in places]
        with ports[0], ports[1] as middle, ports[2] as last:
            nursery.start_soon(middle.want, key(0))
            await trio.sleep(2)
            nursery.start_soon(last.want, key(0, unit=1))
            await trio.sleep(3)
            (waits,) = last.waiting_for()
            assert (waits.unit, waits.behind) == (1, 0)
            assert waits.behind_s == pytest.approx(5, abs=1.5)
            assert "waits for unit 0 itself" in waits.words()
            nursery.cancel_scope.cancel()


@contextmanager
def at_one_peer(net: Net, tmp_path: Path) -> Iterator[tuple[TensorPort, TensorPort]]:
    """Unit 0 and unit 1, which it feeds, both at peer 0."""
    links, seats = net.host(peer(0), tmp_path), {unit: Seat(peer(0)) for unit in (0, 1)}
    with links.open(place(0, to={1}), seats) as one, links.open(place(1, comes={0: expected()}), seats) as two:
        yield one, two


async def test_two_units_at_one_peer_need_no_network(tmp_path: Path) -> None:
    async with open_net() as net:
        with trio.fail_after(SECONDS_MAX):
            with at_one_peer(net, tmp_path) as (one, two):
                await one.send(key(0), (1,), payload_of(0, size=2_000_000))
                assert await two.want(key(0)) == payload_of(0, size=2_000_000)
        assert net.opened == 0


async def test_wrong_calls_are_our_own_errors(tmp_path: Path, autojump_clock: object) -> None:
    async with open_net() as net, pair(net, tmp_path) as (one, two):
        with pytest.raises(LocalProtocolError, match="no link"):
            await one.send(key(0), (2,), b"")
        with pytest.raises(LocalProtocolError, match="no link"):
            await one.send(key(0, unit=1), (1,), b"")
        with pytest.raises(LocalProtocolError, match="gets nothing"):
            await two.want(key(0, unit=1))
        with pytest.raises(LocalProtocolError, match="never sends"):
            await two.want(key(0, index=8))
        two.release(5)
        with pytest.raises(LocalProtocolError, match="tape"):
            await two.want(key(4))
        with pytest.raises(LocalProtocolError, match="a port already"):
            net.hosts[peer(0)].links.open(place(0), {})  # type: ignore[union-attr]


# --- what a peer may not do -------------------------------------------------------------------------------------


def part(step: int = 0, *, index: int = 0, total: int = 4, length: int = 4, offset: int = 0, flow: int = 0) -> bytes:
    """A part by its fields, with bytes that fit its length."""
    packed = bytearray(Part(key(step, index=index), length, total, offset).pack())
    packed[1] = flow
    return bytes(packed) + b"x" * length


ATTACKS: dict[str, tuple[list[bytes], str]] = {
    "a flow that does not exist": ([part(flow=9)], "malformed"),
    "a flow that does not cross here": ([part(flow=1)], "malformed"),
    "a step beyond the task": ([part(step=1000)], "malformed"),
    "a tensor that nobody asked for": ([part(index=8)], "malformed"),
    "a payload larger than the largest": ([part(total=1 << 40)], "limit-exceeded"),
    "a part larger than a part": ([part(length=params.TENSOR_PART_BYTES + 1, total=1 << 20)], "malformed"),
    "a part beyond its payload": ([part(length=5)], "malformed"),
    "a part of nothing": ([part(length=0)], "malformed"),
    "a part that begins in the middle": ([part(offset=2, length=2)], "malformed"),
    "a payload within another": ([part(total=8), part(index=1)], "malformed"),
    "more than was asked for": ([part(i // 8, index=i % 8, total=0, length=0) for i in range(600)], "limit-exceeded"),
    "two payloads under one key": ([part(), part()[:-1] + b"y"], "changed-payload"),
    "an item that does not exist": ([b"\x07"], "malformed"),
    "a grant from who sends": ([b"\x04" + bytes(16)], "malformed"),
}


async def greeted(net: Net, hello: Hello, sender: bytes) -> tuple[Greeting, Stream]:
    """Open a stream to unit 1 as `sender` and greet."""
    stream = await NetHost(net, sender).open_stream(peer(1), "tensor")
    await stream.send_frame(encode(hello))
    said = await stream.receive_frame(params.TENSOR_HELLO_BYTES_MAX)
    return decode(Greeting, said or b"", bytes_max=params.TENSOR_HELLO_BYTES_MAX), stream


@pytest.mark.parametrize("what", ATTACKS)
async def test_what_was_not_promised_is_a_typed_fault_of_its_sender(
    what: str, tmp_path: Path, autojump_clock: object
) -> None:
    sent, code = ATTACKS[what]
    async with open_net() as net:
        links = net.host(peer(1), tmp_path)
        with links.open(place(1, comes={0: expected()}), {0: Seat(peer(0))}, window_bytes=1 << 17) as port:
            _, stream = await greeted(net, Hello(RUN, 0, 1, 0, b"s" * 16), peer(0))
            with suppress(PeerUnreachable):  # it hangs up as soon as it knows
                for item in sent:
                    await stream.send_all(item)
            await trio.sleep(1)
            assert net.penalties == [(peer(0), code)]
            assert port.shelf.memory_bytes <= 1 << 17


@pytest.mark.parametrize(
    ("hello", "sender", "refused"),
    [
        (Hello(b"q" * 32, 0, 1, 0, b"s" * 16), peer(0), "unknown-run"),
        (Hello(RUN, 0, 2, 0, b"s" * 16), peer(0), "unknown-run"),
        (Hello(RUN, 0, 1, 0, b"s" * 16), peer(2), "not-yours"),
        (Hello(RUN, 0, 1, 1, b"s" * 16), peer(0), "not-yours"),
        (Hello(RUN, 2, 1, 0, b"s" * 16), peer(0), "not-yours"),
        (Hello(RUN, 0, 1, 0, b"s" * 16), peer(0), ""),
    ],
)
async def test_only_who_has_a_unit_is_let_in(
    hello: Hello, sender: bytes, refused: str, tmp_path: Path, autojump_clock: object
) -> None:
    async with open_net() as net:
        links = net.host(peer(1), tmp_path)
        with links.open(place(1, comes={0: expected()}), {0: Seat(peer(0)), 2: Seat(peer(2))}):
            greeting, _ = await greeted(net, hello, sender)
            assert greeting.refused == refused
            assert net.penalties == []  # runs begin and end at different times: no crime


async def test_a_receiver_that_claims_what_was_never_sent_is_penalised(tmp_path: Path, autojump_clock: object) -> None:
    async with open_net() as net:
        host = net.hosts[peer(1)] = NetHost(net, peer(1))

        async def lie(_peer: bytes, stream: trio.StapledStream[trio.abc.SendStream, trio.abc.ReceiveStream]) -> None:
            await stream.send_all(len(encode(Greeting())).to_bytes(4, "big") + encode(Greeting()))
            await stream.send_all(b"\x04" + (1).to_bytes(8, "big") + (1).to_bytes(8, "big"))
            await trio.sleep(30)

        host.serve = lie  # type: ignore[method-assign]
        with net.host(peer(0), tmp_path).open(place(0, to={1}), {1: Seat(peer(1))}) as port:
            await port.send(key(0), (1,), b"")
            await trio.sleep(0.05)
        assert [who for who, _ in net.penalties] == [peer(1)]
        assert net.penalties[0][1].startswith("malformed")


async def test_a_port_that_closes_while_it_reads_its_disk_ends_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on, read = threading.Event(), threading.Event(), payload_shelf._read

    def slow(descriptor: int, offset: int, count: int) -> bytes:
        found = read(descriptor, offset, count)
        began.set()
        assert go_on.wait(SECONDS_MAX)
        return found

    monkeypatch.setattr(payload_shelf, "_read", slow)
    with trio.fail_after(SECONDS_MAX):
        async with open_net() as net, pair(net, tmp_path, memory_bytes=1) as (one, _):
            net.cut.add(peer(1))
            await net.break_streams()
            for index in range(2):
                await one.send(key(0, index=index), (1,), payload_of(0, index))
            net.cut.clear()
            assert await trio.to_thread.run_sync(began.wait, SECONDS_MAX)
            one.close()
            go_on.set()
            await trio.testing.wait_all_tasks_blocked()  # a KeyError there would end the daemon


async def test_a_full_disk_of_a_unit_that_is_fed_by_another_here_is_that_units_trouble(tmp_path: Path) -> None:
    async with open_net() as net:
        with trio.fail_after(SECONDS_MAX):
            with at_one_peer(net, tmp_path) as (one, two):
                two.shelf._disk_max, two.shelf._memory_max = 0, 0
                await one.send(key(0), (1,), payload_of(0))
                with pytest.raises(ShelfFull):
                    await two.want(key(0, index=1))
        await trio.testing.wait_all_tasks_blocked()  # the other ports of this daemon go on
