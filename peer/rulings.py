"""The rulings of notaries on disputes: a quorum of equal ones becomes the Arbitration that everybody's log takes.

Notaries and players keep them alike, so whoever has a quorum can publish, and a dispute ends though some are down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from peer.desk import Desk
from peer.dispute_file import DisputeFile
from peer.settler import Settler
from protocol import params
from protocol.arbitration import found_by
from protocol.codec import blake
from protocol.errors import VerificationFailed
from protocol.records import Arbitration, Ruling, open_record

__all__ = ["Rulings"]


@dataclass
class Rulings:
    """The rulings on disputes, at a notary or a player: a quorum of equal ones becomes an Arbitration."""

    desk: Desk
    settler: Settler
    found: dict[bytes, str] = field(default_factory=dict)  # dispute -> what an Arbitration in the log says
    take: Callable[[bytes], object] = lambda _: None  # the node's: an Arbitration's envelope into the log
    held: dict[bytes, dict[bytes, tuple[Ruling, bytes]]] = field(default_factory=dict)  # dispute -> notary -> ruling
    since_ns: dict[bytes, int] = field(default_factory=dict)  # dispute -> when its quorum was complete

    def add(self, ruling: Ruling, envelope: bytes, file: DisputeFile) -> bool:
        """Keep one notary's ruling on a dispute; its first counts. True if it is new. Raises VerificationFailed."""
        if ruling.notary not in self.desk.network.notary_keys - file.parties:
            raise VerificationFailed("a ruling by a peer that is no notary of this network, or a party to the dispute")
        if (ruling.agreement, ruling.segment) != (file.challenge.agreement, file.challenge.segment):
            raise VerificationFailed("a ruling on another segment than its dispute's")
        held = self.held.setdefault(file.id, {})
        if ruling.notary in held:
            return False
        held[ruling.notary] = ruling, envelope
        self.desk.save("rulings", file.id + ruling.notary, envelope)
        return True

    def own(self, dispute: bytes) -> str:
        """What this peer, a notary, ruled on a dispute that is not over; empty if it did not."""
        held = self.held.get(dispute, {}).get(self.desk.me)
        return held[0].finding if held is not None else ""

    def quorum(self, dispute: bytes) -> list[bytes]:
        """The envelopes of a quorum that agrees on all that money depends on; none while there is no such quorum."""
        held = self.held.get(dispute, {})
        alike: dict[tuple[str, str, int], list[bytes]] = {}
        for notary in sorted(held):
            ruling, envelope = held[notary]
            alike.setdefault(found_by(ruling), []).append(envelope)
        least = self.desk.network.notary_quorum
        return next((equal[:least] for equal in alike.values() if len(equal) >= least > 0), [])

    def publish(self, file: DisputeFile) -> None:
        """Publish the Arbitration if there is a quorum and it is this peer's turn: notaries in an order that the
        dispute draws, then everybody else, so that one dispute leaves one record in the log."""
        rulings = self.quorum(file.id)
        if not rulings or file.over:
            return
        since = self.since_ns.setdefault(file.id, self.desk.now_ns)
        order = sorted(self.desk.network.notary_keys, key=lambda notary: blake("ichiba/publisher", file.id, notary))
        turn = order.index(self.desk.me) if self.desk.me in order else len(order)
        if self.desk.now_ns - since < turn * 2 * params.RESEND_NS:
            return
        arbitration = Arbitration(
            network=self.desk.network.id,
            agreement=file.challenge.agreement,
            author=self.desk.me,
            challenge=file.kept.challenge,
            rulings=tuple(rulings),
        )
        self.take(self.desk.seal(arbitration))

    def forget(self, dispute: bytes) -> list[tuple[bytes, str, str, str]]:
        """The dispute is over: its Arbitration is in the log. For people: notary, finding, level and cause of each."""
        held = self.held.pop(dispute, {})
        for notary in held:
            self.desk.save("rulings", dispute + notary, None)
        self.since_ns.pop(dispute, None)
        return [(ruling.notary, ruling.finding, ruling.level, ruling.cause) for ruling, _ in held.values()]

    def restore(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Rulings from the store, and what the log says already."""
        for channel in self.settler.channels.values():
            self.found.update({dispute: judged.finding for dispute, judged in channel.findings.items()})
        for key, envelope in rows:
            record, _, _ = open_record(envelope, network=self.desk.network.id)
            assert isinstance(record, Ruling), "only rulings are kept there"
            self.held.setdefault(key[:32], {})[key[32:]] = record, envelope
