"""What all roles of one node share: its key, its clock reading, its ledger and book, and the effects of this turn.

A role changes its state, says what to save, and says what to send; the node returns the lot, and whoever runs the
node commits all Saves and Posts before it performs anything else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from market.book import OrderBook
from market.entries import Entry
from market.ledger import Ledger
from peer.drops import Drops
from peer.events import Effect, Emit, Penalise, Post, Publish, Save, Send
from peer.messages import Message, pack
from protocol import params
from protocol.codec import encode
from protocol.errors import IchibaError
from protocol.keys import SigningKey
from protocol.network import Network
from protocol.records import Record, seal

__all__ = ["MARKET", "SETTLEMENT", "Desk", "Means"]

MARKET, SETTLEMENT = "market", "settlement"


@dataclass(frozen=True)
class Means:
    """What this peer puts into the market: its roles and the terms of its owner."""

    roles: int = 0
    unit_price: int = 0  # micro-credits per giga-operation, the least it works for
    fixed_price: bool = False  # it asks just that, whatever the market does (else peer/pricing.py)
    memory_bytes: int = 0
    sandbox: int = 0
    device: Literal["cpu", "gpu"] = "cpu"  # what its workers compute on
    device_memory_bytes: int = 0  # of its graphics card
    operations_per_second: int = 10**9  # first guess; replaced by what finished segments measured
    slots: int = 1
    cheat: str = ""  # the demo's fraudulent solver; see worker/cheats.py


@dataclass
class Desk:
    """Shared by the roles of one node; see the module docstring."""

    key: SigningKey
    network: Network
    rng: random.Random
    ledger: Ledger
    means: Means
    book: OrderBook = field(default_factory=OrderBook)
    peers: dict[bytes, int] = field(default_factory=dict)  # connected peers -> since when, ns
    lefts: dict[bytes, int] = field(default_factory=dict)  # peers gone -> since when, ns
    now_ns: int = 0  # node time (peer/clock.py): of deadlines, windows and sequence numbers; never backwards
    wall_off_ns: int = 0  # how far the time that records are dated by is ahead of it
    paused_ns: int = 0  # since when this peer is paused; 0: it is not
    paused_by: str = ""  # "owner", or the word of the guest rule that paused it (peer/guest.py)
    paused_why: str = ""
    finishing_ns: int = 0  # since when it takes no new work; 0: it does
    effects: list[Effect] = field(default_factory=list)
    link_speeds: dict[bytes, int] = field(default_factory=dict)  # peer -> bytes per second, as downloads went
    outbox: dict[str, list[bytes]] = field(default_factory=dict)
    paced_ns: int = 0  # the allowance of what was published is used up until then
    drops: Drops = field(default_factory=Drops)
    # What a peer may be sent of a message that speaks of a sealed job, or nothing (peer/sealing.py).
    sealer: Callable[[bytes, Message], Message | None] = lambda _, message: message

    @property
    def me(self) -> bytes:
        """This peer's key."""
        return self.key.public

    @property
    def wall_ns(self) -> int:
        """The time that records are dated by, and that the dates of others are compared with."""
        return self.now_ns + self.wall_off_ns

    def set_time(self, now_ns: int, wall_ns: int | None) -> bool:
        """It is `now_ns`, or later where that was said before; records are dated `wall_ns`, the same if None. True if
        that jumped: what stands on the market bears dates which others refuse, or nobody lets run out."""
        old_ns, self.now_ns = self.wall_off_ns, max(self.now_ns, now_ns)
        self.wall_off_ns = 0 if wall_ns is None else wall_ns - now_ns
        return abs(self.wall_off_ns - old_ns) > params.CLOCK_STEP_NS

    def resting(self) -> tuple[str, str] | None:
        """Why this peer takes no new work at all, as a typed reason; None if it does."""
        if self.paused_ns and self.paused_by not in ("", "owner"):
            return "paused", f"{self.paused_by}: {self.paused_why}"
        if self.paused_ns:
            return "paused", "its owner paused this peer; `ichiba resume`"
        if self.finishing_ns:
            return "finishing", "it finishes what it has and takes nothing new; `ichiba earn start`"
        return None

    def left_ns(self, peer: bytes) -> int:
        """When `peer` was last seen leaving; for one never seen since the start, when this node started."""
        return self.lefts.setdefault(peer, self.now_ns)

    def link_speed(self, peer: bytes) -> int:
        """Bytes per second between this peer and `peer`: measured, else what is usual."""
        return self.link_speeds.get(peer, params.LINK_BYTES_PER_SECOND)

    def measured(self, peer: bytes, bytes_per_second: int) -> None:
        """A download from `peer` went so fast. One sample moves what is believed by a quarter."""
        before = self.link_speeds.pop(peer, bytes_per_second)
        if len(self.link_speeds) >= params.LINK_SPEEDS_MAX:
            del self.link_speeds[next(iter(self.link_speeds))]
        self.link_speeds[peer] = (3 * before + bytes_per_second) // 4

    def save(self, table: str, key: bytes, value: Any) -> None:
        """Journal a row (a Struct, bytes, or None to delete it)."""
        data = value if value is None or isinstance(value, bytes) else encode(value)
        self.effects.append(Save(table, key, data))

    def post(self, entry: Entry) -> bool:
        """Apply an entry to the ledger and journal it. False if it was there already. Raises InsufficientFunds."""
        applied = self.ledger.post(entry)
        if applied:
            self.effects.append(Post(entry))
        return applied

    def seal(self, record: Record) -> bytes:
        """An envelope around a record, signed by this peer."""
        return seal(record, self.key)

    def send(self, peer: bytes, message: Message) -> None:
        """A direct message; dropped by the world if `peer` is not connected."""
        if peer in self.peers and (sealed := self.sealer(peer, message)) is not None:
            self.effects.append(Send(peer, pack(sealed)))

    def publish(self, topic: str, envelope: bytes) -> None:
        """Gossip an envelope with the next tick's bundle: a hop costs per message, not per record."""
        waiting = self.outbox.setdefault(topic, [])
        if len(waiting) >= params.OUTBOX_RECORDS_MAX:
            self.drop("outbox-full", self.me)
            return
        waiting.append(envelope)

    def drop(self, reason: str, author: bytes, *, count: int = 1) -> None:
        """Count what was not taken (peer/drops.py)."""
        self.drops.note(reason, author, now_ns=self.wall_ns, count=count)

    def attempt(self, act: Callable[..., None], *arguments: Any) -> None:
        """One deal's or channel's turn of the clock: its trouble is told, and must not stop the others."""
        try:
            act(*arguments)
        except IchibaError as error:
            self.emit("problem", what=f"{error.code}: {error}"[:300])

    def emit(self, kind: str, job: bytes = b"", **data: Any) -> None:
        """Tell people."""
        self.effects.append(Emit(kind, job, data))

    def penalise(self, peer: bytes, reason: str) -> None:
        """Lower a peer's score."""
        self.effects.append(Penalise(peer, reason))

    def add(self, effect: Effect) -> None:
        """Any other effect."""
        self.effects.append(effect)

    def flush_outbox(self) -> None:
        """Turn queued envelopes into bundles of bounded size, the money's before the market's, and no more than others
        take of one author: what is over that waits for the next ticks."""
        cost_ns = 10**9 // params.GOSSIP_RECORDS_PER_SECOND_MAX
        self.paced_ns = max(self.paced_ns, self.now_ns)
        may = (self.now_ns - self.paced_ns) // cost_ns + params.GOSSIP_OWN_BURST_RECORDS
        for topic in sorted(self.outbox, key=lambda topic: topic != SETTLEMENT):
            waiting = self.outbox.pop(topic)
            self._bundle(topic, waiting[:may])
            if waiting[may:]:
                self.outbox[topic] = waiting[may:]
            self.paced_ns += cost_ns * len(waiting[:may])
            may -= len(waiting[:may])

    def _bundle(self, topic: str, envelopes: Iterable[bytes]) -> None:
        bundle: list[bytes] = []
        size = 0
        for envelope in envelopes:
            if bundle and (
                size + len(envelope) > params.GOSSIP_RECORD_BYTES_MAX - 1024
                or len(bundle) >= params.BUNDLE_RECORDS_MAX
            ):
                self.effects.append(Publish(topic, encode(bundle)))
                bundle, size = [], 0
            bundle.append(envelope)
            size += len(envelope) + 8
        if bundle:
            self.effects.append(Publish(topic, encode(bundle)))
