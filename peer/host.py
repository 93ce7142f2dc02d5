"""The host's libp2p side: the only module that imports py-libp2p. `open_host` is how everybody gets a Host.

Promises: nothing a stranger sends gets past here as an exception that is not in PEER_FAULTS, and what gossip can
make us hold is bounded in bytes. py-libp2p 0.8.1 gives the Noise handshake, gossipsub v1.1 and the protobufs; its
swarm, muxer and identify are replaced by peer/links.py, peer/yamux.py and peer/swarm.py, because stock they let
one peer hold unbounded memory, leak a place per accepted connection for the life of the process, and dial what
strangers write (docs/decisions). On the wire this is a plain libp2p peer. Refuses to know what the bytes mean.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, Final

import trio
from cryptography.exceptions import InvalidTag
from google.protobuf.message import DecodeError
from libp2p import create_new_ed25519_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.exceptions import StreamClosed
from libp2p.peer.id import ID
from libp2p.pubsub import gossipsub as gossipsub_module
from libp2p.pubsub import pubsub as pubsub_module
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.rpc_queue import RpcQueue
from libp2p.pubsub.score import ScoreParams, TopicScoreParams
from libp2p.pubsub.validators import signature_validator
from libp2p.security.noise.transport import Transport as Noise
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr
from noise.exceptions import (  # type: ignore[import-untyped]
    NoiseHandshakeError,
    NoiseInvalidMessage,
    NoiseMaxNonceError,
    NoiseValueError,
)

from peer.addresses import Address
from peer.events import GossipIn, MessageIn, PeerDown, PeerUp
from peer.links import Link, PeerUnreachable, Stream
from peer.noise_wire import NoiseWire
from peer.swarm import Host, HostConfig, HostEvent
from peer.yamux import Wire
from protocol import params
from protocol.errors import IchibaError, LimitExceeded, VerificationFailed
from protocol.keys import PEER_ID_PREFIX, short

__all__ = [
    "GossipIn",
    "Host",
    "HostConfig",
    "HostEvent",
    "MessageIn",
    "PeerDown",
    "PeerUnreachable",
    "PeerUp",
    "Stream",
    "open_host",
]

MESHSUB: Final = str(PROTOCOL_ID_V11)
RPC_BYTES_MAX: Final = 1024 * 1024  # what other libp2p implementations send at most
# What py-libp2p, protobuf and the ciphers raise for bytes of strangers; an AssertionError is a bug and stops us.
PEER_FAULTS: Final = (
    IchibaError, BaseLibp2pError, DecodeError, InvalidTag, NoiseHandshakeError, NoiseInvalidMessage,
    NoiseMaxNonceError, NoiseValueError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError,
    RuntimeError, OSError, EOFError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError,
    ExceptionGroup,
)  # fmt: skip


# --- Noise ------------------------------------------------------------------------------------------------------


class _NoiseFace:
    """A Stream as the raw connection py-libp2p's handshake reads and writes."""

    def __init__(self, raw: Stream, initiator: bool) -> None:
        self._raw, self.is_initiator = raw, initiator

    async def read(self, count: int | None = None) -> bytes:
        return await self._raw.receive_exactly(count or 1)

    async def write(self, data: bytes) -> None:
        await self._raw.send_all(data)


async def _secure(noise: Any, raw: Stream, initiator: bool, expected: bytes | None) -> tuple[bytes, Wire]:
    """The Noise XX handshake: who is there, and an encrypted wire. Raises RemoteProtocolError, PeerUnreachable."""
    face = _NoiseFace(raw, initiator)
    try:
        if expected is not None:
            session = await noise.secure_outbound(face, ID(PEER_ID_PREFIX + expected))
        else:
            session = await noise.secure_inbound(face)
    except IchibaError:
        raise
    except PEER_FAULTS as fault:
        raise VerificationFailed("the Noise handshake failed", why=f"{type(fault).__name__} {fault}"[:200]) from None
    peer = _key(session.get_remote_peer().to_bytes())
    if expected is not None and peer != expected:
        raise VerificationFailed(f"{short(peer)} answers instead of {short(expected)}")
    ciphers = session.conn.noise_state.noise_protocol
    return peer, NoiseWire(raw, seal=ciphers.cipher_state_encrypt.k, open=ciphers.cipher_state_decrypt.k)


def _key(identity: bytes) -> bytes:
    if len(identity) != len(PEER_ID_PREFIX) + 32 or not identity.startswith(PEER_ID_PREFIX):
        raise VerificationFailed("a peer whose identity is no Ed25519 key", why="Ichiba signs with Ed25519 only")
    return identity[len(PEER_ID_PREFIX) :]


# --- gossip -----------------------------------------------------------------------------------------------------


class _Seen:
    """Message ids of the last minutes, bounded, and without the sweeping thread of py-libp2p's cache."""

    def __init__(self, ttl: int, sweep_interval: int = 0) -> None:
        self._ids: OrderedDict[bytes, float] = OrderedDict()
        self._ttl = ttl

    def has(self, key: bytes) -> bool:
        return key in self._ids

    def add(self, key: bytes) -> bool:
        now = time.monotonic()
        self._ids[key] = now
        while len(self._ids) > 100_000 or self._ids[next(iter(self._ids))] < now - self._ttl:
            self._ids.popitem(last=False)
        return True


class _Queue(RpcQueue):
    """What waits for one neighbour, bounded in bytes too: one that reads nothing cannot fill our memory."""

    def __init__(self) -> None:
        super().__init__(max_size=params.GOSSIP_QUEUE_RPCS_MAX, max_message_size=RPC_BYTES_MAX)
        self.waiting_bytes = 0

    def push(self, rpc: Any, priority: bool = False) -> bool:
        size = rpc.ByteSize()
        if self.waiting_bytes + size > params.GOSSIP_QUEUE_BYTES_MAX or not super().push(rpc, priority):
            return False
        self.waiting_bytes += size
        return True

    async def pop(self) -> Any:
        rpc = await super().pop()
        self.waiting_bytes -= rpc.ByteSize() if rpc is not None else 0
        return rpc


# Stock: 32 queued RPCs, a thread per cache, and a signed address record made, sent and verified with every RPC
# (our addresses travel in their own topic).
pubsub_module.RpcQueue = _Queue
pubsub_module.LastSeenCache = _Seen
for _module in (pubsub_module, gossipsub_module):
    _module.env_to_send_in_RPC = lambda host: (b"", False)
    _module.maybe_consume_signed_record = lambda rpc, host, peer_id: True


class _Router(GossipSub):
    def __init__(self) -> None:
        invalid = TopicScoreParams(weight=-10.0, cap=50.0, decay=0.95)
        super().__init__(
            protocols=[PROTOCOL_ID_V11], degree=6, degree_low=4, degree_high=9, heartbeat_interval=1,
            gossip_window=3, gossip_history=6, time_to_live=60, prune_back_off=60, unsubscribe_back_off=10,
            do_px=False, adaptive_gossip_enabled=False, eclipse_protection_enabled=False,
            spam_protection_enabled=False, max_pending_messages_per_peer=16,
            score_params=ScoreParams(
                p4_invalid_messages=invalid, publish_threshold=-50.0, gossip_threshold=-50.0,
                graylist_threshold=-100.0, accept_px_threshold=0.0,
            ),
        )  # fmt: skip

    def send_rpc(self, peer_id: ID, rpc: Any, priority: bool = False) -> None:
        rpc.ClearField("senderRecord")  # an empty one would be refused by stock py-libp2p
        super().send_rpc(peer_id, rpc, priority)

    async def send_recent_messages(self, peer_id: ID, topic: str) -> None:
        """As stock, but queued behind and bounded with all else for that neighbour, where stock writes at once."""
        for message in filter(None, map(self.mcache.get, self.mcache.window(topic))):
            if self.scorer is None or self.scorer.allow_publish(peer_id, [topic]):
                self.send_rpc(peer_id, rpc_pb2.RPC(publish=[message]))

    def _handle_dropped_rpc(self, peer_id: ID, rpc: Any, reason: str) -> None:
        for message in rpc.publish:
            self.pubsub.host.node.drop("slow-neighbour", _key(peer_id.to_bytes()), records=self._records(message))
        super()._handle_dropped_rpc(peer_id, rpc, reason)

    def _records(self, message: Any) -> int:
        """How many records a message in a dropped RPC holds."""
        return max(1, int(self.pubsub.host.node.config.records_in(message.data)))

    def remove_peer(self, peer_id: ID) -> None:
        super().remove_peer(peer_id)
        now = int(time.time())
        for topic, peers in self.back_off.items():
            self.back_off[topic] = {peer: until for peer, until in peers.items() if until > now}


class _GossipStream:
    """A Stream as py-libp2p's pubsub writes to it; its writers take turns, so no two RPCs mix."""

    def __init__(self, link: Link, stream: Stream) -> None:
        self.link, self._stream, self._turn = link, stream, trio.Lock()
        self.muxed_conn = SimpleNamespace(peer_id=ID(PEER_ID_PREFIX + link.peer))

    def get_protocol(self) -> str:
        return PROTOCOL_ID_V11

    async def write(self, data: bytes) -> None:
        try:
            async with self._turn:
                await self._stream.send_all(data)
        except PeerUnreachable as fault:
            raise StreamClosed(str(fault)) from None

    async def reset(self) -> None:
        self._stream.reset()


class _Gossip(Pubsub):
    """Pubsub with its reading side replaced: one message at a time per neighbour, each judged before it is kept."""

    def __init__(self, face: _Face) -> None:
        topics = set(face.node.topics)
        super().__init__(face, _Router(), msg_id_constructor=_message_id, seen_ttl=120, allowed_topics=topics)
        self.counter = time.time_ns()  # stock counts seconds: a quick restart would repeat sequence numbers
        self._opened = trio.Event()  # set when the next stream of ours to a neighbour is

    async def _handle_new_peer(self, peer_id: ID) -> None:
        await super()._handle_new_peer(peer_id)
        self._opened.set()
        self._opened = trio.Event()

    def get_hello_packet(self) -> Any:
        ours = [rpc_pb2.RPC.SubOpts(subscribe=True, topicid=topic) for topic in self.topic_ids]
        return rpc_pb2.RPC(subscriptions=ours)

    async def read(self, peer: bytes, stream: Stream) -> None:
        """Serve one neighbour's RPCs until its stream ends. Raises what a malformed one raises."""
        sender = ID(PEER_ID_PREFIX + peer)
        # Whoever subscribes gets what is published from then on, so there must be a stream to it before its word is
        # heard: stock sends to a neighbour without one nothing, and tells nobody.
        with trio.move_on_after(params.NEGOTIATE_SECONDS_MAX):
            while sender not in self.peers:
                await self._opened.wait()
        while head := await stream.receive_some(1):
            size, shift = head[0] & 127, 7
            while head[0] & 128:
                head = await stream.receive_exactly(1)
                size |= (head[0] & 127) << shift
                shift += 7
                if size > RPC_BYTES_MAX or shift > 28:
                    raise LimitExceeded(f"a gossip RPC of more than {RPC_BYTES_MAX} bytes")
            rpc = rpc_pb2.RPC()
            rpc.ParseFromString(await stream.receive_exactly(size) if size else b"")
            for message in rpc.publish:
                await self.push_msg(sender, message)
                await trio.lowlevel.checkpoint()  # the node takes events as fast as they come in
            for subscription in rpc.subscriptions[: params.PENALTIES_MAX * len(self.topic_ids)]:
                await self._take_subscription(sender, subscription)
            if rpc.HasField("control"):
                self._bound(rpc.control)
                await self.router.handle_rpc(rpc, sender)
            await trio.lowlevel.checkpoint()

    async def _take_subscription(self, sender: ID, subscription: Any) -> None:
        """Send a new subscriber the last messages, take it into our mesh and note it, without a pause between.

        Stock notes it first and starts tasks for the rest: what was published before they ran went to nobody.
        """
        topic = subscription.topicid
        if subscription.subscribe and topic in self.topic_ids and sender not in self.peer_topics.get(topic, ()):
            await self._replay_recent_messages(sender, topic)
            await self.router.on_peer_subscribed(sender, topic)
        self.handle_subscription(sender, subscription)

    def _forget_subscription(self, peer_id: ID, topic: str) -> None:
        """As stock, but who comes back to a topic on one connection is not sent the last messages again: to leave and
        come back costs it 40 bytes, and us all of them."""
        told = topic in self._replayed_recent_topics.get(peer_id, ())
        super()._forget_subscription(peer_id, topic)
        if told:
            self._replayed_recent_topics.setdefault(peer_id, set()).add(topic)

    def _bound(self, control: Any) -> None:
        """Keep of a neighbour's wishes what is about our topics and cannot multiply what we store or send."""
        for entries in (control.graft, control.prune, control.ihave):
            ours = [entry for entry in entries if entry.topicID in self.topic_ids][: 2 * len(self.topic_ids)]
            del entries[:]
            entries.extend(ours)
        for prune in control.prune:
            del prune.peers[:]
        for ihave in control.ihave:
            del ihave.messageIDs[params.GOSSIP_CONTROL_IDS_MAX :]
        wanted = list(dict.fromkeys(one for iwant in control.iwant for one in iwant.messageIDs))
        control.ClearField("iwant")
        control.ClearField("idontwant")
        if wanted:
            control.iwant.add(messageIDs=wanted[: params.GOSSIP_WANTED_IDS_MAX])

    async def push_msg(self, msg_forwarder: ID, msg: Any) -> None:
        if self.seen_messages.has(_message_id(msg)):
            return
        if len(msg.topicIDs) != 1:
            self.host.node.drop("no-topic", _key(msg_forwarder.to_bytes()))
            return
        if msg_forwarder == self.my_id:
            self._mark_msg_seen(msg)
        elif not self.host.node.judge(
            _key(msg_forwarder.to_bytes()),
            author=_key(msg.from_id),
            topic=msg.topicIDs[0],
            data=msg.data,
            signed=lambda: signature_validator(msg),
            keep=lambda: self._mark_msg_seen(msg),
        ):
            return
        await self.router.publish(msg_forwarder, msg)

    async def linked(self, peer: bytes) -> None:
        """The first link to `peer` is ready."""
        connection = SimpleNamespace(muxed_conn=SimpleNamespace(peer_id=ID(PEER_ID_PREFIX + peer)))
        for notifee in self.host.notifees:
            await notifee.connected(None, connection)

    def unlinked(self, peer: bytes) -> None:
        """A link to `peer` is gone; our stream to it may have been on another."""
        identity = ID(PEER_ID_PREFIX + peer)
        stream = self.peers.get(identity)
        if stream is not None and stream.link.session.ended.is_set():
            self._handle_dead_peer(identity)


def _message_id(msg: Any) -> bytes:
    topics = "|".join(msg.topicIDs).encode()
    return hashlib.sha256(msg.from_id + msg.seqno + b"|" + topics + b"|" + msg.data).digest()


class _Face:
    """The Host as py-libp2p's pubsub sees it: host and network in one."""

    def __init__(self, node: Host, key_pair: Any) -> None:
        self.node = node
        self.notifees: list[Any] = []
        self.get_id = lambda: ID(PEER_ID_PREFIX + node.peer)
        self.get_private_key = lambda: key_pair.private_key
        self.get_public_key = lambda: key_pair.public_key
        self.get_network = lambda: self
        self.register_notifee = self.notifees.append
        self.set_stream_handler = lambda protocol, handler: None  # the host serves the protocol itself

    def get_connections(self, peer_id: ID) -> list[Any]:
        living = self.node.links.best(_key(peer_id.to_bytes()))
        return [] if living is None else [SimpleNamespace(muxed_conn=SimpleNamespace(is_closed=False))]

    async def new_stream(self, peer_id: ID, protocols: Any) -> _GossipStream:
        link = self.node.links.best(_key(peer_id.to_bytes()))
        if link is None:
            raise SwarmException("not connected")
        try:
            with trio.fail_after(params.NEGOTIATE_SECONDS_MAX):
                return _GossipStream(link, await link.open(MESHSUB))
        except (IchibaError, trio.TooSlowError) as fault:
            raise SwarmException(str(fault)) from None


# --- the host ---------------------------------------------------------------------------------------------------


def _identify(host: Host, protocols: list[str], public_key: bytes, observed: Address) -> bytes:
    """The answer to /ipfs/id/1.0.0: other implementations gossip only with a peer that says it can."""
    said = Identify(
        protocol_version="ipfs/0.1.0",
        agent_version="ichiba",
        public_key=public_key,
        listen_addrs=[Multiaddr(text).decapsulate("/p2p").to_bytes() for text in host.addresses],
        observed_addr=Multiaddr(str(Address(observed.kind, observed.host, observed.port))).to_bytes(),
        protocols=protocols,
    ).SerializeToString()
    return _varint(len(said)) + said


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


@asynccontextmanager
async def open_host(config: HostConfig) -> AsyncIterator[Host]:
    """Listen, join the gossip and keep going until the block ends. Raises OSError if an address is taken.

    Faults of the world inside the block arrive as exception groups: catch them with `except*`.
    """
    key_pair = create_new_ed25519_key_pair(config.seed)
    noise = Noise(key_pair, noise_privkey=create_noise_key_pair().private_key)

    async def secure(raw: Stream, initiator: bool, expected: bytes | None) -> tuple[bytes, Wire]:
        return await _secure(noise, raw, initiator, expected)

    def identify(protocols: list[str], observed: Address) -> bytes:
        return _identify(host, protocols, key_pair.public_key.serialize(), observed)

    async with trio.open_nursery() as nursery:
        host = Host(config, nursery, secure=secure, faults=PEER_FAULTS, identify=identify)
        gossip = _Gossip(_Face(host, key_pair))
        async with background_trio_service(gossip), background_trio_service(gossip.router):
            await gossip.wait_until_ready()
            for topic in host.topics:
                await gossip.subscribe(topic)
            async with host.running(gossip, MESHSUB):
                yield host
        nursery.cancel_scope.cancel()
