"""A peer whose store is an old backup listens before it speaks: it signs nothing until it has the settlement log of
every peer it meets.

What an old store does not know is what this peer signed after the backup: openings that reserve its money, endings,
vouchers. The openings and endings are in everybody's log, and a peer that reserved money twice would be refused by all
of them; so the log is asked for first, and no offer, bid, agreement or receipt is made meanwhile. Vouchers this peer
gave are cumulative and made from the same receipts, so giving one again gives the same; vouchers it was given come
again when it offers their receipts again. Sequence numbers of asks, bids and agreements grow with the clock, so none is
used twice. Refuses to know files: peer/wallet_file.py puts the row there that starts all this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from peer import messages as m
from peer.desk import Desk
from peer.events import Command, GossipIn, Input, MessageIn, PeerDown, PeerUp, Reply, Tick
from peer.messages import unpack
from peer.receipt_rows import Rows
from peer.settler import Logged, Settler
from protocol import params
from protocol.codec import decode
from protocol.errors import IchibaError, LocalProtocolError, RemoteProtocolError
from protocol.records import open_record

__all__ = ["RESTORED_KEY", "RESTORED_TABLE", "Restored", "RestoredListens"]

RESTORED_TABLE, RESTORED_KEY = "restored", b"since"  # value: the clock at the restoring, 8 bytes big-endian, ns
_READS = frozenset({"status", "wallet", "jobs", "job", "book", "bundle", "drops", "reputation", "reputation-bundle"})


class RestoredListens(IchibaError):
    """A restored peer is asked to sign something before it knows what it signed after its backup."""

    code = "restored"


@dataclass
class Restored:
    """See the module docstring. `answer` answers the commands that sign nothing; `on_heard` ends the listening."""

    desk: Desk
    settler: Settler
    answer: Callable[[Command], None]
    on_heard: Callable[[], None]
    since_ns: int = 0  # 0: this store is no backup
    met_ns: int = 0  # when the first peer came
    asked_ns: int = 0
    agreed: set[bytes] = field(default_factory=set)
    theirs: dict[bytes, frozenset[bytes]] = field(default_factory=dict)

    def restore(self, rows: Rows) -> None:
        """Read whether the store is a backup."""
        for _, value in rows(RESTORED_TABLE):
            self.since_ns = int.from_bytes(value, "big")

    @property
    def listening(self) -> bool:
        """Whether nothing may be signed yet."""
        return bool(self.since_ns)

    def handle(self, event: Input) -> None:
        """Take an input in the node's place. Bytes that are wrong are left: there is time to judge them later."""
        try:
            self._handle(event)
        except (RemoteProtocolError, LocalProtocolError) as error:  # as peer/node.py does
            self.desk.drop(f"refused-{error.code}", b"")
            self.desk.emit("ignored", why=str(error)[:300])

    def _handle(self, event: Input) -> None:
        match event:
            case PeerUp(peer=peer):
                self.met_ns = self.met_ns or self.desk.now_ns
                self.desk.peers[peer] = self.desk.now_ns
                self._ask(peer)
            case PeerDown(peer=peer):
                self.desk.peers.pop(peer, None)
                self.agreed.discard(peer)
            case GossipIn(data=data):
                for envelope in decode(list[bytes], data, bytes_max=params.GOSSIP_RECORD_BYTES_MAX + 4096):
                    self._take(envelope)
            case MessageIn(peer=peer, data=data):
                self._message(peer, unpack(data))
            case Tick():
                self._tick()
            case Command(token=token, verb=verb):
                if verb in _READS:
                    self.answer(event)
                    return
                error = RestoredListens(
                    "this peer was restored from a backup and does not know yet what it signed after it",
                    why=f"{len(self.agreed)} of {len(self.desk.peers)} connected peers have told their settlement log",
                    next_step="connect it to peers of its network, `ichiba up --peer INVITE`, and wait a minute",
                )
                self.desk.add(Reply(token, {}, {**error.as_dict(), "exit_code": error.exit_code}))
            case _:
                pass  # no work runs yet

    def _message(self, peer: bytes, message: m.Message) -> None:
        match message:
            case m.Records(records=records):
                for envelope in records:
                    self._take(envelope)
            case m.SyncDigest(count=count, digest=digest):
                if not count or (count, digest) == self.settler.digest():
                    self.agreed.add(peer)
                else:
                    self.desk.send(peer, m.SyncIds(tuple(sorted(self.settler.log)), answer=True))
            case m.SyncIds(ids=ids, answer=answer):
                self.theirs[peer] = frozenset(ids)
                if answer and self.theirs[peer] - self.settler.log.keys():
                    self.desk.send(peer, m.SyncIds(tuple(sorted(self.settler.log)), answer=False))
            case _:
                pass

    def _take(self, envelope: bytes) -> None:
        record, record_id, _ = open_record(envelope, network=self.desk.network.id)
        if isinstance(record, Logged) and record_id not in self.settler.log:
            self.settler.accept(envelope)

    def _ask(self, peer: bytes) -> None:
        # That of an empty log, whatever ours is: any other answers with its ids, an equal one would say nothing.
        self.desk.send(peer, m.SyncDigest(0, bytes(32)))

    def _tick(self) -> None:
        now = self.desk.now_ns
        self.settler.tick()
        self.agreed |= {p for p, ids in self.theirs.items() if p in self.desk.peers and ids <= self.settler.log.keys()}
        if now >= self.asked_ns + params.RESEND_NS:
            self.asked_ns = now
            for peer in sorted(self.desk.peers.keys() - self.agreed):
                self._ask(peer)
        waited = self.met_ns and now >= self.met_ns + params.RESTORED_LISTEN_NS
        if waited and self.desk.peers and self.desk.peers.keys() <= self.agreed:
            self.desk.save(RESTORED_TABLE, RESTORED_KEY, None)
            self.desk.emit("restored", peers=len(self.agreed), records=len(self.settler.log))
            self.since_ns = 0
            self.on_heard()
