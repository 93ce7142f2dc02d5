"""The host among friends: links, messages, gossip, and who notices when somebody is gone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from libp2p.pubsub.pb import rpc_pb2

from peer.addresses import parse_address
from peer.blobs import BlobStore
from peer.host import GossipIn, MessageIn, PeerDown, PeerUnreachable, PeerUp, Stream, open_host
from peer.links import CannotListen
from peer.mdns import addresses_of, announcement
from protocol import params
from protocol.errors import LocalProtocolError, MalformedRecord, RemoteProtocolError, VerificationFailed
from protocol.keys import SigningKey, peer_name
from tests.swarm.conftest import make_config, start_node, start_nodes, until

pytestmark = pytest.mark.swarm

CHILD = """
import sys, json, time, trio
from peer.host import HostConfig, open_host
async def main(seed, connect):
    config = HostConfig(seed.to_bytes(32, "big"), ["/ip4/127.0.0.1/tcp/0"], ("offers",), False, "test",
                        lambda topic, author, data: None)
    async with open_host(config) as host:
        for address in connect:
            await host.connect(address)
        print(json.dumps(host.addresses), flush=True)
        await trio.sleep_forever()
trio.run(main, {seed}, {connect})
"""
Spawn = Callable[[str], "subprocess.Popen[str]"]


async def child(spawn: Spawn, seed: int, *connect: str) -> tuple[subprocess.Popen[str], str]:
    """A host in a process of its own, and where it listens."""
    process = spawn(CHILD.replace("{seed}", str(seed)).replace("{connect}", repr(list(connect))))
    assert process.stdout is not None
    line = await trio.to_thread.run_sync(process.stdout.readline)
    return process, json.loads(line)[0]


# --- links -----------------------------------------------------------------------------------------------------


async def test_two_hosts_link_talk_and_part() -> None:
    async with start_node() as one:
        async with start_node() as other:
            assert await other.host.connect(one.address) == one.host.peer
            assert (await one.wait_for(PeerUp))[0].peer == other.host.peer
            assert (await other.wait_for(PeerUp))[0] == PeerUp(one.host.peer, (one.address,))
            assert list(one.host.peers()) == [other.host.peer]
            for sender, receiver in ((one, other), (other, one)):
                for number in range(3):
                    await sender.host.send(receiver.host.peer, b"message %d" % number)
                messages = await receiver.wait_for(MessageIn, 3)
                assert messages == [MessageIn(sender.host.peer, b"message %d" % n) for n in range(3)]
            assert 0 < await one.host.measure(other.host.peer) < 1000
        assert (await one.wait_for(PeerDown)) == [PeerDown(other.host.peer)]
        with pytest.raises(PeerUnreachable):
            await one.host.measure(other.host.peer)


async def test_a_message_of_the_greatest_length_arrives_and_a_longer_one_is_refused_here() -> None:
    async with start_nodes(2) as (one, other):
        await one.host.send(other.host.peer, b"x" * params.MESSAGE_BYTES_MAX)
        assert len((await other.wait_for(MessageIn))[0].data) == params.MESSAGE_BYTES_MAX
        with pytest.raises(LocalProtocolError):
            await one.host.send(other.host.peer, b"x" * (params.MESSAGE_BYTES_MAX + 1))
        with pytest.raises(LocalProtocolError):
            await one.host.publish("offers", b"x" * (params.GOSSIP_RECORD_BYTES_MAX + 1))
        with pytest.raises(LocalProtocolError):
            await one.host.publish("unknown", b"x")


async def test_what_cannot_be_connected_says_why() -> None:
    async with start_node() as one, start_node() as other:
        nobody = SigningKey.from_seed(b"n" * 32).public
        with pytest.raises(PeerUnreachable) as refused:
            await one.host.connect(str(parse_address("/ip4/127.0.0.1/tcp/1").of(nobody)))
        assert refused.value.why and refused.value.next_step
        with pytest.raises(VerificationFailed):
            await one.host.connect(str(parse_address(other.address).of(nobody)))
        with pytest.raises(MalformedRecord, match="does not say which peer"):
            await one.host.connect("/ip4/127.0.0.1/tcp/4001")
        with pytest.raises(MalformedRecord):
            await one.host.connect("not an address")
        with pytest.raises(LocalProtocolError):
            await one.host.connect(one.address)
        with pytest.raises(PeerUnreachable) as unknown:
            await one.host.send(nobody, b"hello?")
        assert unknown.value.next_step
        assert one.host.peers() == {}


async def test_a_port_that_is_taken_is_an_error() -> None:
    async with start_node() as one:
        port = parse_address(one.address).port
        with pytest.raises(ExceptionGroup) as refused:
            async with start_node(make_config(listen=[f"/ip4/127.0.0.1/tcp/{port}"])):
                pass
        assert refused.group_contains(CannotListen, match="--listen")


async def test_a_lost_peer_is_linked_again_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "REDIAL_SECONDS_MIN", 0.1)
    async with start_node() as one:
        config = make_config()
        async with start_node(config) as first:
            await one.host.connect(first.address)
            port = parse_address(first.address).port
            await one.wait_for(PeerUp)
        await one.wait_for(PeerDown)
        async with start_node(make_config(seed=config.seed, listen=[f"/ip4/127.0.0.1/tcp/{port}"])) as again:
            await one.wait_for(PeerUp, 2)
            await one.host.send(again.host.peer, b"welcome back")
            assert (await again.wait_for(MessageIn))[0].data == b"welcome back"


async def test_peers_of_one_peer_find_each_other() -> None:
    async with start_node() as hub, start_node() as one, start_node() as other:
        await one.host.connect(hub.address)
        await other.host.connect(hub.address)
        await until(lambda: len(one.host.peers()) == 2 or one.host.book.known(other.host.peer))
        await one.host.send(other.host.peer, b"found you")
        assert (await other.wait_for(MessageIn))[0] == MessageIn(one.host.peer, b"found you")


async def test_other_networks_are_not_spoken_to() -> None:
    async with start_node() as one, start_node(make_config(network_tag="other")) as stranger:
        await stranger.host.connect(one.address)
        with pytest.raises(RemoteProtocolError, match="does not speak"):
            await stranger.host.send(one.host.peer, b"hello")
        await stranger.host.publish("offers", b"for the other network")
        await stranger.host.measure(one.host.peer)
        assert one.of(GossipIn) == [] and one.of(MessageIn) == []


async def test_a_killed_process_is_noticed_at_once(spawn: Spawn) -> None:
    async with start_node() as one:
        process, _ = await child(spawn, 901, one.address)
        await one.wait_for(PeerUp)
        process.send_signal(signal.SIGKILL)
        with trio.fail_after(params.MUX_KEEPALIVE_SECONDS):  # by the end of its connection, not by its silence
            await one.wait_for(PeerDown)


async def test_a_frozen_process_is_noticed_by_its_silence(spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "MUX_KEEPALIVE_SECONDS", 0.2)
    monkeypatch.setattr(params, "MUX_SILENCE_SECONDS_MAX", 0.8)
    async with start_node() as one:
        process, address = await child(spawn, 902)
        await one.host.connect(address)
        await one.wait_for(PeerUp)
        process.send_signal(signal.SIGSTOP)
        await one.wait_for(PeerDown)
        process.send_signal(signal.SIGCONT)


# --- gossip ----------------------------------------------------------------------------------------------------


async def test_gossip_reaches_everybody_once() -> None:
    async with start_nodes(5) as nodes:
        await until(lambda: all(len(topic_peers(node.host)) == 4 for node in nodes))
        for number in range(20):
            await nodes[number % 5].host.publish("offers", b"offer %d" % number)
            for node in nodes:
                if node is not nodes[number % 5]:
                    await until(lambda node=node, n=number: any(e.data == b"offer %d" % n for e in node.of(GossipIn)))
        for place, node in enumerate(nodes):
            expected = [b"offer %d" % n for n in range(20) if n % 5 != place]
            assert [event.data for event in node.of(GossipIn)] == expected
            assert all(event.topic == "offers" for event in node.of(GossipIn))
        assert nodes[0].of(GossipIn)[0].author == nodes[1].host.peer


def topic_peers(host: object) -> set[object]:
    """Who is known to subscribe to the offers (py-libp2p's own table)."""
    found: set[object] = host._gossip.peer_topics.get("/ichiba/test/offers", set())  # type: ignore[attr-defined]
    return found


async def test_gossip_travels_over_hops() -> None:
    async with start_node() as one, start_node() as middle, start_node() as other:
        await one.host.connect(middle.address)
        await other.host.connect(middle.address)
        await until(lambda: len(topic_peers(middle.host)) == 2)
        await one.host.publish("offers", b"far")
        event = (await other.wait_for(GossipIn))[0]
        assert event == GossipIn("offers", one.host.peer, b"far")


async def test_a_peer_that_restarts_is_heard_again() -> None:
    config = make_config()
    async with start_node() as one:
        for turn in range(2):
            async with start_node(config) as other:
                await other.host.connect(one.address)
                await until(lambda other=other: topic_peers(other.host))
                await other.host.publish("offers", b"turn %d" % turn)
                await one.wait_for(GossipIn, turn + 1)
            await one.wait_for(PeerDown, turn + 1)
        assert [event.data for event in one.of(GossipIn)] == [b"turn 0", b"turn 1"]


async def test_nobody_is_known_to_subscribe_before_it_is_sent_what_is_published() -> None:
    noted = {}
    async with start_node() as one, start_node() as other:
        gossip: Any = one.host._gossip
        note = gossip.handle_subscription

        def check(peer: Any, subscription: Any) -> None:
            note(peer, subscription)
            waiting = gossip.peer_queues[peer].waiting_bytes
            noted[subscription.topicid] = peer in gossip.router.mesh[subscription.topicid], waiting > 0

        gossip.handle_subscription = check
        await one.host.publish("offers", b"before")
        await other.host.connect(one.address)
        await other.wait_for(GossipIn)
        assert noted["/ichiba/test/offers"] == (True, True), "in the mesh, and what came before it under way"


async def test_who_leaves_a_topic_and_comes_back_is_not_sent_the_last_messages_again() -> None:
    sent = 0
    async with start_node() as one, start_node() as other:
        gossip: Any = one.host._gossip
        await one.host.publish("offers", b"before")
        await other.host.connect(one.address)
        await other.wait_for(GossipIn)
        send = gossip.router.send_rpc

        def count(peer: Any, rpc: Any, priority: bool = False) -> None:
            nonlocal sent
            sent += len(rpc.publish)
            send(peer, rpc, priority)

        gossip.router.send_rpc = count
        (peer,) = gossip.peers
        for subscribe in (False, True) * 20:
            said = rpc_pb2.RPC.SubOpts(subscribe=subscribe, topicid="/ichiba/test/offers")
            await gossip._take_subscription(peer, said)
        assert topic_peers(one.host) == {peer}
        assert not sent, "each turn cost it 40 bytes"


async def test_an_author_is_held_to_its_records_and_each_one_over_is_counted_as_its_own() -> None:
    bundle = 64
    config = make_config(records_in=lambda _: bundle)
    async with start_node() as sender, start_node(config) as taker:
        await sender.host.connect(taker.address)
        await until(lambda: topic_peers(sender.host))
        passed, sent = params.GOSSIP_BURST_RECORDS // bundle, params.GOSSIP_BURST_RECORDS // bundle + 5
        for number in range(sent):
            await sender.host.publish("offers", b"%d" % number)
        await until(lambda: len(taker.of(GossipIn)) + taker.host.drops.totals["author-rate"] // bundle >= sent)
        assert passed <= len(taker.of(GossipIn)) < sent, "its allowance grows while it sends"
        (row,) = [row for row in taker.host.drops.rows() if row["reason"] == "author-rate"]
        assert row["author"] == peer_name(sender.host.peer)
        assert row["count"] == bundle * (sent - len(taker.of(GossipIn)))
        assert taker.host.stats()["dropped"] == row["count"]
        assert list(taker.host.peers()) == [sender.host.peer], "a few too many are no reason to part"


async def test_what_a_slow_neighbour_has_no_room_for_is_counted_as_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_node() as sender, start_node(make_config(records_in=lambda _: 7)) as slow:
        await slow.host.connect(sender.address)
        await until(lambda: topic_peers(slow.host))
        monkeypatch.setattr(params, "GOSSIP_QUEUE_BYTES_MAX", 1000)
        await slow.host.publish("offers", b"x" * 2000)
        await slow.host.publish("offers", b"small")
        await sender.wait_for(GossipIn)
        assert [event.data for event in sender.of(GossipIn)] == [b"small"]
        (row,) = slow.host.drops.rows()
        assert (row["reason"], row["author"], row["count"]) == ("slow-neighbour", peer_name(sender.host.peer), 7)


async def test_gossip_nobody_takes_is_dropped_and_counted_while_messages_wait() -> None:
    async with start_node() as sender, open_host(make_config()) as busy:
        await sender.host.connect(busy.addresses[0])
        await until(lambda: topic_peers(sender.host))
        # More than fits, but within the author's burst.
        for number in range(params.HOST_EVENTS_MAX // 2 + 50):
            await sender.host.publish("offers", b"%d" % number)
        await sender.host.send(busy.peer, b"important")
        await until(lambda: busy.stats().get("dropped_busy", 0) >= 50)
        assert busy.stats()["dropped"] >= 50
        events = []
        while not events or not isinstance(events[-1], MessageIn):
            events.append(await busy.events.receive())
        assert events[-1].data == b"important"


# --- streams and blobs -----------------------------------------------------------------------------------------


async def test_streams_carry_exact_bytes_and_their_end() -> None:
    async with start_nodes(2) as (one, other):

        async def echo(peer: bytes, stream: Stream) -> None:
            assert peer == one.host.peer
            while (frame := await stream.receive_frame(100)) is not None:
                await stream.send_frame(frame[::-1])

        other.host.serve("echo", echo)
        stream = await one.host.open_stream(other.host.peer, "echo")
        for text in (b"", b"abc", bytes(100)):
            await stream.send_frame(text)
            assert await stream.receive_frame(100) == text[::-1]
        await stream.aclose()
        with pytest.raises(RemoteProtocolError, match="does not speak"):
            await one.host.open_stream(other.host.peer, "nothing")


async def test_a_blob_travels_between_hosts(tmp_path: Path) -> None:
    async with start_nodes(2) as (one, other):
        theirs, ours = BlobStore(tmp_path / "theirs", 2**30), BlobStore(tmp_path / "ours", 2**30)
        other.host.serve("blob", theirs.serve)
        data = bytes(range(256)) * 40_000
        blob = await theirs.put_bytes(data)
        path = await ours.fetch(one.host, blob, [other.host.peer], size_max=len(data))
        assert path.read_bytes() == data
        await until(lambda: not theirs._serving)


# --- what it costs ---------------------------------------------------------------------------------------------


async def test_a_host_alone_is_small() -> None:
    # VmHWM, not getrusage: the latter keeps the peak of this big process across the fork.
    code = "import peer.host; print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    done = await trio.run_process([sys.executable, "-c", code], capture_stdout=True)
    assert int(done.stdout) < 150 * 1024, f"{int(done.stdout) // 1024} MB"


# --- mDNS ------------------------------------------------------------------------------------------------------


async def test_an_announcement_says_who_and_where_to_the_same_network_only() -> None:
    peer = SigningKey.from_seed(b"m" * 32).public
    own = [parse_address(f"/ip4/192.0.2.{i}/tcp/4001/p2p/{peer_name(peer)}") for i in range(1, 4)]
    assert addresses_of(announcement(own, "net"), "net") == own
    assert addresses_of(announcement(own, "net"), "other") == []


async def test_a_network_without_multicast_costs_a_warning_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(interfaces: object) -> None:
        raise OSError("no such device")

    monkeypatch.setattr("peer.mdns.Zeroconf", refuse)
    async with start_node(make_config(mdns=True)) as one, start_node() as other:
        await until(lambda: "mDNS does not work here" in caplog.text)
        assert "--peer" in caplog.text
        await one.host.connect(other.address)
        assert one.host.stats()["mdns_works"] == 0
