"""The host: who we are connected to, what they may send us, and what we tell the node about it.

Promises: nothing a stranger sends ends the process, and what it can make us hold is bounded; every drop, refusal
and penalty is counted in `stats`; PeerUp and PeerDown are never lost and never contradict each other. Refuses to
know libp2p's code (peer/host.py hands in handshake and gossip) and what the bytes mean (a validator and the node do).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated, Final, Protocol, TypeAlias

import msgspec
import trio

from peer.addresses import Address, parse_address
from peer.book import AddressBook
from peer.drops import AT_TRANSPORT, Drops
from peer.events import GossipIn, MessageIn, PeerDown, PeerUp
from peer.host_config import HostConfig
from peer.links import Link, Links, PeerUnreachable, Secure, Stream, answer
from peer.mdns import discover, interface_addresses
from peer.standing import GossipRates, Rates, Standing
from peer.yamux import MuxStream
from protocol import params
from protocol.codec import decode, encode
from protocol.errors import LimitExceeded, LocalProtocolError, MalformedRecord, RemoteProtocolError, VerificationFailed
from protocol.keys import SigningKey, short

__all__ = ["Gossip", "Handler", "Host", "HostConfig", "HostEvent"]

log = logging.getLogger(__name__)
HostEvent: TypeAlias = PeerUp | PeerDown | GossipIn | MessageIn
Handler: TypeAlias = Callable[[bytes, Stream], Awaitable[None]]
IDENTIFY, PING = "/ipfs/id/1.0.0", "/ipfs/ping/1.0.0"
AddressText: TypeAlias = Annotated[str, msgspec.Meta(max_length=400)]
Told: TypeAlias = Annotated[tuple[AddressText, ...], msgspec.Meta(max_length=params.PEERS_TOLD_MAX)]
TOLD_BYTES_MAX: Final = 64 * 1024
IDENTIFY_SECONDS: Final = 10.0
COUNTERS: Final = (  # what `stats` always shows, so that nobody has to guess a name
    "bytes_in", "bytes_out", "connections_refused", "gossip_published", "gossip_received", "half_open_evicted",
    "handshakes_failed", "links_made", "mdns_works", "messages_received", "messages_sent", "messages_slowed",
    "stream_faults", "streams_broken",
)  # fmt: skip
HOUSEKEEPING_SECONDS: Final = 0.5  # redials and announcements are looked at this often


class Gossip(Protocol):
    """The gossip the host is given."""

    async def publish(self, topic_id: str, data: bytes) -> None:
        """Sign and send to everybody subscribed."""

    async def read(self, peer: bytes, stream: Stream) -> None:
        """Serve a neighbour's stream until it ends."""

    async def linked(self, peer: bytes) -> None:
        """The first link to `peer` is ready."""

    def unlinked(self, peer: bytes) -> None:
        """A link to `peer` is gone."""


@dataclass
class _Outgoing:
    """The kept message stream to one peer, and whose turn it is."""

    turn: trio.Lock = field(default_factory=trio.Lock)
    stream: Stream | None = None


class Host:
    """This peer on the network, made by `peer.host.open_host`. `peer` is its key, `events` its HostEvents."""

    def __init__(
        self, config: HostConfig, nursery: trio.Nursery, *, secure: Secure,
        faults: tuple[type[Exception], ...], identify: Callable[[list[str], Address], bytes],
    ) -> None:  # fmt: skip
        self.config = config
        self.peer: bytes = SigningKey.from_seed(config.seed).public
        self.addresses: list[str] = []
        self.counters: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self.links = Links(self, secure, nursery, config.shaper, counters=self.counters)
        self.standing, self.book, self.drops = Standing(), AddressBook(self.peer), Drops()
        self._nursery, self._faults, self._identify = nursery, faults, identify
        self._prefix = f"/ichiba/{config.network_tag}/"
        self._address_topic = self._prefix + "addresses/1"
        self.topics = {self._prefix + topic: topic for topic in config.topics} | {self._address_topic: ""}
        self._events_in, self.events = trio.open_memory_channel[HostEvent](params.HOST_EVENTS_MAX)
        self._outgoing: dict[bytes, _Outgoing] = {}
        self._told_up: set[bytes] = set()  # peers the node knows to be up
        self._changed: set[bytes] = set()
        self._wake = trio.Event()
        self._announce_at = trio.current_time() + 1
        self._dialling: set[bytes] = set()
        self._message_rates = Rates(params.MESSAGES_PER_SECOND_MAX)
        self._gossip_rates = GossipRates()
        self._gossip: Gossip | None = None
        self._gossip_readers: Counter[bytes] = Counter()
        self._served: dict[str, tuple[Handler, int | None]] = {PING: (self._pong, 64 * 1024)}
        self.serve("message", self._read_messages)
        self.serve("peers", self._tell_peers, bytes_max=0)

    @asynccontextmanager
    async def running(self, gossip: Gossip, gossip_protocol: str) -> AsyncIterator[None]:
        """Listen and keep house until the block ends. Raises OSError if an address cannot be listened on."""
        self._gossip = gossip
        self._served[gossip_protocol] = (self._read_gossip, None)
        for text in self.config.listen:
            bound = (await self.links.listen(parse_address(text))).of(self.peer)
            hosts = interface_addresses() if bound.wildcard and bound.kind == "ip4" else [bound.host]
            self.addresses += [str(Address(bound.kind, host, bound.port, self.peer)) for host in hosts]
        self._nursery.start_soon(self._tell_changes)
        self._nursery.start_soon(self._housekeeping)
        if self.config.mdns and self.addresses:
            self._nursery.start_soon(self._discover)
        try:
            yield
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                async with trio.open_nursery() as nursery:
                    for link in [link for links in self.links.by_peer.values() for link in links]:
                        nursery.start_soon(link.session.aclose)

    # --- what the daemon calls ---------------------------------------------------------------------------

    async def connect(self, address: str) -> bytes:
        """Link to the peer at `address` and keep linking when it is lost. Returns its key.

        Raises MalformedRecord for a text that is no address with a peer id, PeerUnreachable if nobody answers (it
        is tried again by itself), VerificationFailed if somebody else answers.
        """
        place = parse_address(address)
        if place.peer is None:
            raise MalformedRecord(
                f"{address} does not say which peer answers there",
                next_step="use the whole address, with /p2p/ID, from the other peer's `ichiba status`",
            )
        if place.peer == self.peer:
            raise LocalProtocolError(f"{address} is this peer itself", next_step="give another peer's address")
        self.book.learn(place, now=trio.current_time(), kept=True)
        if self.links.best(place.peer) is None:
            await self._dial(place)
        return place.peer

    def peers(self) -> dict[bytes, tuple[str, ...]]:
        """Linked peers and where their connections really go."""
        return {peer: tuple(str(link.address) for link in links) for peer, links in self.links.by_peer.items()}

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip `data` (at most params.GOSSIP_RECORD_BYTES_MAX) under `topic`, one of the configured names."""
        name = self._prefix + topic
        if name not in self.topics or len(data) > params.GOSSIP_RECORD_BYTES_MAX:
            raise LocalProtocolError(f"cannot gossip {len(data)} bytes under {topic!r}", why="too long, or no topic")
        assert self._gossip is not None
        self.counters["gossip_published"] += 1
        if not self.links.by_peer:
            self.drop("no-neighbour", self.peer, records=self.config.records_in(data))
        await self._gossip.publish(name, data)

    async def send(self, peer: bytes, data: bytes) -> None:
        """Queue one direct message (at most params.MESSAGE_BYTES_MAX). Delivery is not confirmed: repeat what matters.

        Raises PeerUnreachable within params.SEND_SECONDS_MAX if there is no link and none can be made.
        """
        if len(data) > params.MESSAGE_BYTES_MAX:
            raise LocalProtocolError(f"a message of {len(data)} bytes, at most {params.MESSAGE_BYTES_MAX} travel")
        box = self._outgoing.setdefault(peer, _Outgoing())
        with trio.move_on_after(params.SEND_SECONDS_MAX):
            async with box.turn:
                fresh = box.stream is None
                try:
                    return await self._send_on(box, peer, data)
                except PeerUnreachable:
                    if fresh:
                        raise
                return await self._send_on(box, peer, data)  # the kept stream was broken: once more on a new one
        raise PeerUnreachable(f"{short(peer)} took no message within {params.SEND_SECONDS_MAX:.0f} s")

    async def _send_on(self, box: _Outgoing, peer: bytes, data: bytes) -> None:
        stream = box.stream = box.stream or await self.open_stream(peer, "message")
        done = False
        try:
            await stream.send_frame(data)
            self.counters["messages_sent"] += 1
            done = True
        finally:
            if not done:  # half a frame may be out: this stream is of no more use
                stream.reset()
                box.stream = None

    def serve(self, protocol_name: str, handler: Handler, *, bytes_max: int | None = None) -> None:
        """Let peers open streams of /ichiba/<tag>/<protocol_name>/1; each runs `handler(peer, stream)`.

        A handler that raises RemoteProtocolError gets its peer penalised; other faults of the world are counted
        and logged. `bytes_max` bounds what one stream may bring in.
        """
        self._served[f"{self._prefix}{protocol_name}/1"] = (handler, bytes_max)

    async def open_stream(self, peer: bytes, protocol_name: str, *, bytes_max: int | None = None) -> Stream:
        """A stream to `peer`, linking first if it is known where. Raises PeerUnreachable, RemoteProtocolError."""
        link = self.links.best(peer)
        for address in self.book.known(peer) if link is None else []:
            with suppress(PeerUnreachable, RemoteProtocolError):
                link = await self._dial(address)
                break
        if link is None:
            raise PeerUnreachable(
                f"no link to {short(peer)}",
                why="it is not connected and no known address of it answers",
                next_step="`ichiba peers add ADDRESS` with an address from its `ichiba status`",
            )
        with trio.move_on_after(params.NEGOTIATE_SECONDS_MAX):
            return await link.open(f"{self._prefix}{protocol_name}/1", bytes_max=bytes_max)
        raise PeerUnreachable(f"{short(peer)} did not answer a stream in {params.NEGOTIATE_SECONDS_MAX:.0f} s")

    async def measure(self, peer: bytes) -> float:
        """The round trip to `peer` in milliseconds. Raises PeerUnreachable."""
        link = self.links.best(peer)
        with trio.move_on_after(params.SEND_SECONDS_MAX):
            if link is not None:
                with suppress(trio.BrokenResourceError):
                    return 1000 * await link.session.ping()
        raise PeerUnreachable(f"{short(peer)} does not answer a ping", why="there is no link to it, or it hangs")

    def penalise(self, peer: bytes, reason: str) -> None:
        """Count one penalty; params.PENALTIES_MAX close together end all links to `peer` and ban it for a while."""
        log.info("%s penalised: %s", short(peer), reason)
        if self.standing.penalise(peer, reason.split(":")[0][:40], now=trio.current_time()):
            log.warning("%s is banned for %.0f s: %s", short(peer), params.BAN_SECONDS, reason)
            self.links.drop(peer, "banned")

    def drop(self, reason: str, author: bytes, *, records: int = 1) -> bool:
        """Count what was not taken, or not passed on (peer/drops.py). False: it goes no further."""
        self.drops.note(reason, author, now_ns=time.time_ns(), count=records)
        return False

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what is open now; bytes are those on the wire, without encryption."""
        open_links = [link for links in self.links.by_peer.values() for link in links]
        totals = Counter(self.counters)
        totals.update({f"penalties_{kind}": count for kind, count in self.standing.reasons.items()})
        totals.update({f"dropped_{reason}".replace("-", "_"): self.drops.totals[reason] for reason in AT_TRANSPORT})
        totals["bytes_in"] += sum(link.session.bytes_in for link in open_links)
        totals["bytes_out"] += sum(link.session.bytes_out for link in open_links)
        now = {
            "links": len(open_links),
            "peers": len(self.links.by_peer),
            "known_peers": len(self.book),
            "streams": sum(len(link.session.streams) for link in open_links),
            "banned": self.standing.bans(now=trio.current_time()),
            "penalised": self.standing.reasons.total(),
            "dropped": self.drops.totals.total(),
        }
        return {**totals, **now}

    # --- what links call ---------------------------------------------------------------------------------

    def admit(self, peer: bytes) -> None:
        """Refuse ourselves and the banned. Raises RemoteProtocolError."""
        if peer == self.peer or self.standing.banned(peer, now=trio.current_time()):
            self.counters["connections_refused"] += 1
            raise RemoteProtocolError(f"{short(peer)} is this peer itself or banned")

    async def linked(self, link: Link) -> None:
        """A link is ready: tell the gossip and the node, say where we are, ask whom else there is."""
        self.counters["links_made"] += 1
        self._note(link.peer)
        self._announce_at = min(self._announce_at, trio.current_time() + 1)
        if len(self.links.by_peer[link.peer]) == 1 and self._gossip is not None:
            await self._gossip.linked(link.peer)
        if not link.inbound:
            self._nursery.start_soon(self._ask_peers, link)

    async def unlinked(self, link: Link) -> None:
        """A link is gone, and its bytes go into the totals."""
        log.info("link to %s ended: %s", short(link.peer), link.session.reason)
        self.counters["bytes_in"] += link.session.bytes_in
        self.counters["bytes_out"] += link.session.bytes_out
        if link.session.violation:
            self.penalise(link.peer, f"muxer: {link.session.violation}")
        if self._gossip is not None:
            self._gossip.unlinked(link.peer)
        if self.links.best(link.peer) is None:
            self._outgoing.pop(link.peer, None)
        self._note(link.peer)

    async def on_stream(self, link: Link, carrier: MuxStream) -> None:
        """Serve one stream the peer opened; whatever its bytes cause stays in here."""
        stream, done = Stream(carrier, peer=link.peer), False
        try:
            with trio.fail_after(params.NEGOTIATE_SECONDS_MAX):
                protocol = await answer(stream, (*self._served, IDENTIFY))
            if protocol == IDENTIFY:
                with trio.fail_after(IDENTIFY_SECONDS):
                    await stream.send_all(self._identify([*self._served, IDENTIFY], link.address))
            else:
                handler, bytes_max = self._served[protocol]
                stream.limit(bytes_max)
                await handler(link.peer, stream)
            done = True
        except RemoteProtocolError as fault:
            self.drop(f"refused-{fault.code}", link.peer)
            self.penalise(link.peer, f"{fault.code}: {fault}")
        except PeerUnreachable:
            self.counters["streams_broken"] += 1
        except self._faults:
            # A handler's own trouble, such as a disk: not the peer's fault, and no reason to stop.
            self.counters["stream_faults"] += 1
            log.exception("serving a stream of %s failed", short(link.peer))
        finally:
            if done:
                carrier.aclose()
            else:
                carrier.reset()

    # --- gossip ------------------------------------------------------------------------------------------

    def judge(
        self, forwarder: bytes, *, author: bytes, topic: str, data: bytes,
        signed: Callable[[], bool], keep: Callable[[], None],
    ) -> bool:  # fmt: skip
        """Whether a gossiped message new to us is to be passed on; if so, or if it is judged bad, it is `keep`-t as
        seen. Raises RemoteProtocolError for what an honest neighbour never passes on."""
        now = trio.current_time()
        if author == self.peer:
            return False  # our own, come back: nothing is lost
        if topic not in self.topics:
            return self.drop("no-topic", forwarder)
        if len(data) > params.GOSSIP_RECORD_BYTES_MAX:
            raise LimitExceeded(f"a gossiped record of {len(data)} bytes")
        records = max(1, self.config.records_in(data)) if topic != self._address_topic else 1
        if self.standing.banned(author, now=now):
            return self.drop("banned", author, records=records)
        rates = self._gossip_rates
        if refused := rates.refuse_forwarder(forwarder, records=records, size=len(data), now=now):
            return self.drop(refused, forwarder, records=records)
        if not signed():
            raise VerificationFailed(f"a gossiped message with a signature that is not {short(author)}'s")
        if rates.refuse_author(author, records=records, now=now):
            if author == forwarder:  # not raised: the stream would end, and with it what others' messages are in it
                self.penalise(author, f"limit-exceeded: over {params.GOSSIP_RECORDS_PER_SECOND_MAX} records a second")
            return self.drop("author-rate", author, records=records)
        keep()
        self.counters["gossip_received"] += 1
        if topic == self._address_topic:
            self._learn(decode(Told, data, bytes_max=TOLD_BYTES_MAX)[: params.ANNOUNCED_ADDRESSES_MAX], only=author)
            return True
        try:
            self.config.validator(self.topics[topic], author, data)
        except RemoteProtocolError:
            raise
        except self._faults:
            log.exception("the validator of %s failed on a record of %s", topic, short(author))
            return self.drop("validator-fault", author, records=records)
        # Gossip may fill half the queue; messages and the ups and downs of peers wait for room instead.
        if self._events_in.statistics().current_buffer_used * 2 >= params.HOST_EVENTS_MAX:
            self.drop("busy", author, records=records)
        else:
            self._events_in.send_nowait(GossipIn(self.topics[topic], author, data))
        return True

    async def _read_gossip(self, peer: bytes, stream: Stream) -> None:
        if self._gossip_readers[peer] > params.CONNECTIONS_PER_PEER_MAX:
            raise LimitExceeded("more gossip streams than connections")
        self._gossip_readers[peer] += 1
        try:
            assert self._gossip is not None
            await self._gossip.read(peer, stream)
        except (RemoteProtocolError, PeerUnreachable):
            raise
        except self._faults as fault:
            # Malformed protobufs and the like arrive as whatever their decoder raises.
            raise MalformedRecord("a malformed gossip RPC", why=f"{type(fault).__name__} {fault}"[:200]) from None
        finally:
            self._gossip_readers[peer] -= 1
            self._gossip_readers += Counter()

    # --- addresses ---------------------------------------------------------------------------------------

    def _learn(self, texts: tuple[str, ...], *, only: bytes | None = None) -> None:
        """Enter what somebody says about where peers are. Raises MalformedRecord. Only literal addresses: a name
        would have us ask a resolver of the teller's choosing."""
        for address in map(parse_address, texts):
            if address.kind in ("ip4", "ip6") and address.port and (only is None or address.peer == only):
                self.book.learn(address, now=trio.current_time(), wait=2.0)

    async def _ask_peers(self, link: Link) -> None:
        with suppress(PeerUnreachable, trio.TooSlowError):
            try:
                with trio.fail_after(params.NEGOTIATE_SECONDS_MAX):
                    stream = await link.open(f"{self._prefix}peers/1", bytes_max=TOLD_BYTES_MAX)
                    told = await stream.receive_frame(TOLD_BYTES_MAX - 4)
                    await stream.aclose()
                self._learn(decode(Told, told or b"", bytes_max=TOLD_BYTES_MAX))
            except RemoteProtocolError as fault:
                self.penalise(link.peer, f"{fault.code}: {fault}")

    async def _tell_peers(self, peer: bytes, stream: Stream) -> None:
        with trio.fail_after(params.NEGOTIATE_SECONDS_MAX):
            await stream.send_frame(encode(self.book.told([other for other in self.links.by_peer if other != peer])))

    async def _dial(self, address: Address) -> Link:
        try:
            link = await self.links.dial(address)
        except VerificationFailed:
            self.book.forget(address)
            raise
        self.book.reached(address, now=trio.current_time())
        return link

    async def _redial(self, peer: bytes) -> None:
        try:
            for address in self.book.known(peer):
                with suppress(PeerUnreachable, RemoteProtocolError):
                    await self._dial(address)
                    return
            self.book.failed(peer, now=trio.current_time())
        finally:
            self._dialling.discard(peer)

    async def _housekeeping(self) -> None:
        """Dial whom we lost, and say now and then where we are."""
        while True:
            await trio.sleep(HOUSEKEEPING_SECONDS)
            now = trio.current_time()
            for peer in self.book.due(now=now, linked=self.links.by_peer.keys() | self._dialling)[:4]:
                self._dialling.add(peer)
                self._nursery.start_soon(self._redial, peer)
            if now >= self._announce_at and self.addresses and self._gossip is not None:
                self._announce_at = now + params.ANNOUNCE_SECONDS
                told = encode(self.addresses[: params.ANNOUNCED_ADDRESSES_MAX])
                await self._gossip.publish(self._address_topic, told)

    async def _discover(self) -> None:
        def found(address: Address) -> None:
            # Both sides find each other at once: the smaller key dials first.
            wait = 0.0 if self.peer < (address.peer or b"") else 3.0
            self.book.learn(address, now=trio.current_time(), wait=wait)

        own = [parse_address(text) for text in self.addresses]
        async with discover(own, tag=self.config.network_tag, found=found) as works:
            self.counters["mdns_works"] = int(works)
            await trio.sleep_forever()

    # --- events ------------------------------------------------------------------------------------------

    def _note(self, peer: bytes) -> None:
        self._changed.add(peer)
        self._wake.set()

    async def _tell_changes(self) -> None:
        """Tell the node who came and went, in its own time: what changed twice meanwhile is told once or not."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._changed:
                peer = self._changed.pop()
                up = peer in self.links.by_peer
                if up and peer not in self._told_up:
                    self._told_up.add(peer)
                    await self._events_in.send(PeerUp(peer, tuple(map(str, self.book.known(peer)))))
                elif not up and peer in self._told_up:
                    self._told_up.remove(peer)
                    await self._events_in.send(PeerDown(peer))

    async def _read_messages(self, peer: bytes, stream: Stream) -> None:
        while (data := await stream.receive_frame(params.MESSAGE_BYTES_MAX)) is not None:
            while not self._message_rates.take(peer, now=trio.current_time()):
                self.counters["messages_slowed"] += 1
                await trio.sleep(1 / params.MESSAGES_PER_SECOND_MAX)
            self.counters["messages_received"] += 1
            await self._events_in.send(MessageIn(peer, data))

    async def _pong(self, peer: bytes, stream: Stream) -> None:
        while len(probe := await stream.receive_some(32)):
            await stream.send_all(probe)
