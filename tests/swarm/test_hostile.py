"""The host among strangers: everything here is really sent, and the host goes on serving its friends.

Attackers are bare sockets, our own handshake with hand-made frames after it, and stock py-libp2p.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from libp2p import create_new_ed25519_key_pair, new_host
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.security.noise.transport import Transport as Noise
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from peer.addresses import parse_address
from peer.blobs import BlobStore
from peer.host import GossipIn, MessageIn, PeerDown, PeerUnreachable, PeerUp, Stream, _secure
from peer.links import Link, propose
from peer.yamux import DATA, HEADER, SYN, Session, Wire
from protocol import params
from protocol.errors import LimitExceeded, RemoteProtocolError
from protocol.keys import SigningKey
from tests.swarm.conftest import Node, dial_raw, start_node, start_nodes, until
from tests.swarm.test_host import topic_peers

pytestmark = pytest.mark.swarm
HELLO = b"\x13/multistream/1.0.0\n"
OFFERS = "/ichiba/test/offers"
REFUSED = (PeerUnreachable, trio.BrokenResourceError)


async def still_serves(node: Node) -> None:
    """A new honest peer links to `node` and is heard."""
    count = len(node.of(MessageIn))
    async with start_node() as friend:
        await friend.host.connect(node.address)
        await friend.host.send(node.host.peer, b"still there?")
        await node.wait_for(MessageIn, count + 1)


@asynccontextmanager
async def intruder(address: str, seed: bytes = b"e" * 32) -> AsyncIterator[tuple[bytes, Wire]]:
    """The key and the encrypted wire of an attacker, after an honest handshake, before any muxer frame."""
    key_pair = create_new_ed25519_key_pair(seed)
    noise = Noise(key_pair, noise_privkey=create_noise_key_pair().private_key)
    async with await dial_raw(address) as socket:
        raw = Stream(socket)
        await propose(raw, "/noise")
        _, wire = await _secure(noise, raw, True, parse_address(address).peer)
        await wire.send(b"\x13/multistream/1.0.0\n\x0d/yamux/1.0.0\n")
        answer = b""
        while not answer.endswith(b"/yamux/1.0.0\n"):
            answer += (more := await wire.receive())
            if not more:
                raise PeerUnreachable("refused")
        yield SigningKey.from_seed(seed).public, wire


@asynccontextmanager
async def muxed_intruder(address: str, seed: bytes = b"e" * 32) -> AsyncIterator[Link]:
    """An attacker that speaks the muxer correctly and misbehaves on streams."""
    async with intruder(address, seed) as (key, wire), trio.open_nursery() as nursery:
        session = Session(wire, initiator=True)
        nursery.start_soon(session.run)
        yield Link(key, session, parse_address(address), inbound=False)
        nursery.cancel_scope.cancel()


def rpc_frame(rpc: bytes) -> bytes:
    head = bytearray()
    size = len(rpc)
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes(head) + bytes([size]) + rpc


def penalties(node: Node) -> int:
    return node.host.stats()["penalised"]


# --- at the port -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\xff" * 1000, b"", b"\x00" * 100, HELLO, HELLO + b"\xff\xff\xff\x7f",
        HELLO + b"\x07/noise\n\xff\xff" + b"z" * 65_535, HELLO + b"\x07/noise\n\x00\x20" + b"k" * 32 + b"\x00\x00",
        HELLO + b"\x0b/plaintext\n", os.urandom(100_000),
    ],
    ids=["http", "ones", "nothing", "zeros", "half", "huge-line", "big-noise", "empty-noise", "plaintext", "random"],
)  # fmt: skip
async def test_garbage_at_the_port_harms_nobody(garbage: bytes) -> None:
    async with start_node() as node:
        async with await dial_raw(node.address) as socket:
            with suppress(trio.BrokenResourceError):
                await socket.send_all(garbage)
                await socket.send_eof()
        await still_serves(node)
        await until(lambda: node.host.stats()["handshakes_failed"] == 1)


async def test_a_plaintext_peer_cannot_claim_a_key() -> None:
    async with start_node() as node, await dial_raw(node.address) as socket:
        with pytest.raises(RemoteProtocolError, match="does not speak"):
            await propose(Stream(socket), "/plaintext/2.0.0")


async def test_a_flood_of_half_open_connections_is_survived() -> None:
    async with start_node() as node:
        sockets = [await dial_raw(node.address) for _ in range(3 * params.HALF_OPEN_PER_ADDRESS_MAX)]
        for socket in sockets:
            with suppress(trio.BrokenResourceError):
                await socket.send_all(b"\x13/multi")
        await still_serves(node)
        assert node.host.stats()["half_open_evicted"] >= params.HALF_OPEN_PER_ADDRESS_MAX
        for socket in sockets:
            await socket.aclose()


async def test_a_silent_connection_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "HANDSHAKE_SECONDS_MAX", 0.3)
    async with start_node() as node, await dial_raw(node.address) as socket:
        with suppress(trio.BrokenResourceError):
            while await socket.receive_some():
                pass
        await until(lambda: node.host.stats()["handshakes_failed"] == 1)


async def test_one_address_cannot_take_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "INBOUND_PER_ADDRESS_MAX", 3)
    async with start_node() as node, AsyncExitStack() as stack:
        for number in range(3):
            await stack.enter_async_context(intruder(node.address, bytes([number]) * 32))
        for number in range(3, 5):
            with pytest.raises(REFUSED):
                await stack.enter_async_context(intruder(node.address, bytes([number]) * 32))
        assert len(node.host.peers()) == 3 and node.host.stats()["connections_refused"] == 2


async def test_one_peer_cannot_link_without_end() -> None:
    async with start_node() as node, AsyncExitStack() as stack:
        for _ in range(params.CONNECTIONS_PER_PEER_MAX):
            await stack.enter_async_context(intruder(node.address))
        with pytest.raises(REFUSED):
            await stack.enter_async_context(intruder(node.address))
        assert node.host.stats()["links"] == params.CONNECTIONS_PER_PEER_MAX


# --- in the muxer ----------------------------------------------------------------------------------------------


async def test_who_overruns_a_window_is_cut_off_and_penalised() -> None:
    async with start_node() as node:

        async def hold(peer: bytes, stream: Stream) -> None:
            await trio.sleep_forever()

        node.host.serve("hold", hold)
        opening = b"\x13/multistream/1.0.0\n\x14/ichiba/test/hold/1\n"
        async with intruder(node.address) as (_, wire):
            await wire.send(HEADER.pack(0, DATA, SYN, 1, len(opening)) + opening)
            with suppress(trio.BrokenResourceError):
                for _ in range(1000):
                    await wire.send(HEADER.pack(0, DATA, 0, 1, 60_000) + bytes(60_000))
        await node.wait_for(PeerDown)
        assert penalties(node) == 1 and node.host.stats()["bytes_in"] < 1_000_000
        await still_serves(node)


async def test_who_sends_on_after_a_reset_is_cut_off_and_penalised() -> None:
    async with start_node() as node:
        async with intruder(node.address) as (_, wire):
            await wire.send(HEADER.pack(0, DATA, SYN, 1, 8) + b"nonsense")
            with suppress(trio.BrokenResourceError):
                for _ in range(1000):
                    await wire.send(HEADER.pack(0, DATA, 0, 1, 60_000) + bytes(60_000))
        await node.wait_for(PeerDown)
        assert penalties(node) == 2 and node.host.stats()["bytes_in"] < 1_000_000
        await still_serves(node)


async def test_garbage_instead_of_frames_is_cut_off_and_penalised() -> None:
    async with start_node() as node:
        async with intruder(node.address) as (_, wire):
            with suppress(trio.BrokenResourceError):
                await wire.send(b"\xff" * 1000)
                await wire.receive()
        await node.wait_for(PeerDown)
        assert penalties(node) == 1
        await still_serves(node)


# --- on streams ------------------------------------------------------------------------------------------------


async def test_an_oversize_message_is_not_read_and_penalised() -> None:
    async with start_node() as node, muxed_intruder(node.address) as link:
        stream = await link.open("/ichiba/test/message/1")
        await stream.send_all((params.MESSAGE_BYTES_MAX + 1).to_bytes(4, "big") + bytes(1000))
        with pytest.raises(PeerUnreachable):
            await stream.receive_exactly(1)
        assert penalties(node) == 1 and node.of(MessageIn) == []
        await still_serves(node)


async def test_a_truncated_message_is_no_message() -> None:
    async with start_node() as node, muxed_intruder(node.address) as link:
        stream = await link.open("/ichiba/test/message/1")
        await stream.send_all((1000).to_bytes(4, "big") + bytes(10))
        await stream.aclose()
        await still_serves(node)
        assert [event.data for event in node.of(MessageIn)] == [b"still there?"]


async def test_garbage_in_the_negotiation_of_a_stream_is_penalised() -> None:
    async with start_node() as node, muxed_intruder(node.address) as link:
        carrier = await link.session.open_stream()
        await carrier.send_all(b"\xff\xff\xff\xff garbage")
        await until(lambda: penalties(node) == 1)
        await still_serves(node)


async def test_a_handler_that_fails_stops_neither_host_nor_link() -> None:
    async with start_nodes(2) as (one, other):

        async def fail(peer: bytes, stream: Stream) -> None:
            faults = {b"k": KeyError("k"), b"v": ValueError("v"), b"r": LimitExceeded("r")}
            raise faults[await stream.receive_exactly(1)]

        other.host.serve("fail", fail)
        for kind in (b"k", b"v", b"r"):
            stream = await one.host.open_stream(other.host.peer, "fail")
            await stream.send_all(kind)
            with pytest.raises(PeerUnreachable):
                await stream.receive_exactly(1)
        assert penalties(other) == 1 and other.host.stats()["stream_faults"] == 2
        await one.host.send(other.host.peer, b"fine")
        assert (await other.wait_for(MessageIn))[0].data == b"fine"


async def test_a_stream_brings_in_no_more_than_it_may() -> None:
    async with start_nodes(2) as (one, other):

        async def take(peer: bytes, stream: Stream) -> None:
            while await stream.receive_some(1000):
                pass

        other.host.serve("take", take, bytes_max=10_000)
        stream = await one.host.open_stream(other.host.peer, "take")
        with pytest.raises(PeerUnreachable):
            for _ in range(10_000):
                await stream.send_all(bytes(1000))
        await until(lambda: penalties(other) == 1)


async def test_who_goes_on_misbehaving_is_banned_and_refused() -> None:
    async with start_node() as node:
        async with muxed_intruder(node.address) as link:
            with suppress(PeerUnreachable, RemoteProtocolError):
                for _ in range(params.PENALTIES_MAX):
                    stream = await link.open("/ichiba/test/message/1")
                    await stream.send_all(b"\xff" * 4)
                    with suppress(PeerUnreachable):
                        await stream.receive_exactly(1)
            await node.wait_for(PeerDown)
        assert node.host.stats()["banned"] == 1
        with pytest.raises(REFUSED):
            async with intruder(node.address):
                pass
        assert len(node.of(PeerUp)) == 1
        await still_serves(node)


async def test_a_message_flood_is_slowed_not_stored() -> None:
    async with start_node() as node, muxed_intruder(node.address) as link:
        stream = await link.open("/ichiba/test/message/1")
        with trio.move_on_after(2):
            while True:
                await stream.send_frame(bytes(10_000))
        taken = node.host.stats()["messages_received"]
        assert taken <= 5 * params.MESSAGES_PER_SECOND_MAX
        assert node.host.stats()["messages_slowed"] > 0
        await still_serves(node)


async def test_a_wrong_chunk_from_a_server_is_penalised(tmp_path: Path) -> None:
    async with start_nodes(3) as (one, liar, honest):
        data = bytes(range(256)) * 10_000
        stores = {node: BlobStore(tmp_path / str(n), 2**30) for n, node in enumerate((one, liar, honest))}
        blob = await stores[liar].put_bytes(data)
        await stores[honest].put_bytes(data)
        spoiled = bytearray(data)
        spoiled[params.BLOB_CHUNK_BYTES + 5] ^= 1
        stores[liar].path(blob).write_bytes(spoiled)
        for node in (liar, honest):
            node.host.serve("blob", stores[node].serve)
        peers = [liar.host.peer, honest.host.peer]
        path = await stores[one].fetch(one.host, blob, peers, size_max=len(data))
        assert path.read_bytes() == data and penalties(one) == 1


async def test_garbage_to_the_blob_server_is_penalised(tmp_path: Path) -> None:
    async with start_node() as node, muxed_intruder(node.address) as link:
        store = BlobStore(tmp_path, 2**30)
        node.host.serve("blob", store.serve)
        blob = await store.put_bytes(b"small")
        stream = await link.open("/ichiba/test/blob/1")
        await stream.send_all(blob + b"\xff\xff\xff\xff")
        await until(lambda: penalties(node) == 1)
        await until(lambda: not store._serving)
        await still_serves(node)


# --- gossip ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        rpc_frame(b"\xff" * 50), rpc_frame(b"\x12\x05abc"), b"\xff\xff\xff\xff\x0f", b"\xff" * 20,
        rpc_frame(rpc_pb2.RPC(publish=[rpc_pb2.Message(topicIDs=[OFFERS], data=b"x")]).SerializeToString()),
        rpc_frame(
            rpc_pb2.RPC(
                publish=[rpc_pb2.Message(topicIDs=[OFFERS], from_id=bytes(38), data=b"x", signature=b"s")]
            ).SerializeToString()
        ),
    ],
    ids=["ones", "cut", "oversize", "endless-length", "unsigned", "not-a-key"],
)  # fmt: skip
async def test_a_malformed_rpc_is_penalised_and_ends_nothing(sent: bytes) -> None:
    async with start_node() as node, muxed_intruder(node.address) as link:
        stream = await link.open("/meshsub/1.1.0")
        await stream.send_all(sent)
        await until(lambda: penalties(node) == 1)
        await still_serves(node)
        assert node.of(GossipIn) == []


def signed(seed: bytes, data: bytes, number: int, topic: str = OFFERS) -> rpc_pb2.Message:
    """A gossip message as its author signs it."""
    key_pair = create_new_ed25519_key_pair(seed)
    message = rpc_pb2.Message(data=data, topicIDs=[topic], seqno=number.to_bytes(8, "big"))
    message.from_id = b"\x00\x24\x08\x01\x12\x20" + key_pair.public_key.to_bytes()
    message.signature = key_pair.private_key.sign(b"libp2p-pubsub:" + message.SerializeToString())
    return message


async def test_a_forged_author_is_penalised_and_does_not_hide_the_true_message() -> None:
    async with start_node() as node, muxed_intruder(node.address) as link:
        true = signed(b"a" * 32, b"true words", 1)
        forged = rpc_pb2.Message()
        forged.CopyFrom(true)
        forged.signature = bytes(64)
        stream = await link.open("/meshsub/1.1.0")
        await stream.send_all(rpc_frame(rpc_pb2.RPC(publish=[forged]).SerializeToString()))
        await until(lambda: penalties(node) == 1)
        stream = await link.open("/meshsub/1.1.0")
        await stream.send_all(rpc_frame(rpc_pb2.RPC(publish=[true, true]).SerializeToString()))
        event = (await node.wait_for(GossipIn))[0]
        assert event == GossipIn("offers", SigningKey.from_seed(b"a" * 32).public, b"true words")
        await still_serves(node)
        assert len(node.of(GossipIn)) == 1


async def test_a_validator_that_fails_drops_the_message_and_blames_nobody() -> None:
    async with start_node() as node, muxed_intruder(node.address) as link:
        stream = await link.open("/meshsub/1.1.0")
        messages = [signed(b"e" * 32, data, n) for n, data in enumerate((b"crash the validator", b"fine"))]
        await stream.send_all(rpc_frame(rpc_pb2.RPC(publish=messages).SerializeToString()))
        assert [event.data for event in await node.wait_for(GossipIn)] == [b"fine"]
        assert node.host.stats()["dropped_validator_fault"] == 1 and penalties(node) == 0


@pytest.mark.parametrize("data", [b"bad record", bytes(params.GOSSIP_RECORD_BYTES_MAX + 1)])
async def test_rejected_gossip_goes_no_further_and_is_penalised(data: bytes) -> None:
    async with start_nodes(2) as (node, friend), muxed_intruder(node.address) as link:
        await until(lambda: topic_peers(node.host))
        stream = await link.open("/meshsub/1.1.0")
        await stream.send_all(rpc_frame(rpc_pb2.RPC(publish=[signed(b"e" * 32, data, 1)]).SerializeToString()))
        await until(lambda: penalties(node) == 1)
        await node.host.publish("offers", b"good")
        await friend.wait_for(GossipIn)
        assert [event.data for event in friend.of(GossipIn)] == [b"good"] and node.of(GossipIn) == []
        assert penalties(friend) == 0


async def test_a_gossip_flood_is_dropped_counted_and_penalised() -> None:
    # A message of a hundred records is over the limit at any speed that a loaded machine still sends at.
    async with (
        start_nodes(2, records_in=lambda _: 100) as (node, friend),
        muxed_intruder(node.address) as link,
    ):
        await until(lambda: topic_peers(node.host))
        stream: Stream | None = None
        for start in range(0, 5000, 20):
            spam = [signed(b"e" * 32, b"spam %d" % n, n) for n in range(start, start + 20)]
            try:
                stream = stream or await link.open("/meshsub/1.1.0")
                await stream.send_all(rpc_frame(rpc_pb2.RPC(publish=spam).SerializeToString()))
                await node.host.measure(friend.host.peer)  # time for it to be read
            except (PeerUnreachable, RemoteProtocolError):
                stream = None
            if link.session.ended.is_set():
                break
        await until(lambda: node.host.stats()["banned"] == 1)
        assert node.host.stats()["dropped_author_rate"] >= params.PENALTIES_MAX
        await friend.host.publish("offers", b"heard all the same")
        await until(lambda: any(event.data == b"heard all the same" for event in node.of(GossipIn)))


async def test_control_messages_cannot_multiply_what_we_keep_or_send() -> None:
    async with start_node() as node, muxed_intruder(node.address) as link:
        stream = await link.open("/meshsub/1.1.0")
        rpc = rpc_pb2.RPC()
        for number in range(2000):
            rpc.control.prune.add(topicID=f"topic {number}", backoff=10**9)
            rpc.control.graft.add(topicID=f"topic {number}")
            rpc.control.ihave.add(topicID=f"topic {number}", messageIDs=[b"x" * 32])
        rpc.control.iwant.add(messageIDs=[b"y" * 32] * 10_000)
        rpc.subscriptions.extend(rpc_pb2.RPC.SubOpts(subscribe=True, topicid=f"topic {n}") for n in range(2000))
        await stream.send_all(rpc_frame(rpc.SerializeToString()))
        subscribe = rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=OFFERS)])
        await stream.send_all(rpc_frame(subscribe.SerializeToString()))
        await until(lambda: topic_peers(node.host))
        gossip = node.host._gossip
        tables = [gossip.peer_topics, gossip.router.back_off, gossip.router.graft_flood_tracking]  # type: ignore[union-attr]
        assert all(len(table) <= 3 for table in tables)
        await still_serves(node)


# --- stock py-libp2p -------------------------------------------------------------------------------------------


async def test_stock_py_libp2p_gossips_with_us_both_ways() -> None:
    key_pair = create_new_ed25519_key_pair(b"p" * 32)
    noise = Noise(key_pair, noise_privkey=create_noise_key_pair().private_key)
    listen = [Multiaddr("/ip4/127.0.0.1/tcp/0")]
    stock = new_host(
        key_pair=key_pair, listen_addrs=listen, sec_opt={"/noise": noise}, muxer_opt={"/yamux/1.0.0": Yamux}
    )
    router = GossipSub([PROTOCOL_ID_V11], degree=6, degree_low=4, degree_high=9, heartbeat_interval=1)
    pubsub = Pubsub(stock, router, strict_signing=True)
    async with (
        start_node() as node,
        stock.run(listen_addrs=listen),
        background_trio_service(pubsub),
        background_trio_service(router),
    ):
        await pubsub.wait_until_ready()
        heard = await pubsub.subscribe(OFFERS)
        await stock.connect(info_from_p2p_addr(Multiaddr(node.address)))
        await node.wait_for(PeerUp)
        await until(lambda: topic_peers(node.host) and OFFERS in pubsub.peer_topics)
        await node.host.publish("offers", b"from us")
        assert (await heard.get()).data == b"from us"
        await pubsub.publish(OFFERS, b"from stock")
        event = (await node.wait_for(GossipIn))[0]
        assert event == GossipIn("offers", key_pair.public_key.to_bytes(), b"from stock")
        assert penalties(node) == 0
