"""Who signed twice what it may sign once, and is barred from this peer's market for it.

A peer that shows one ask to some and another to others, or gives two orders over its money under one number, is caught
by whoever sees both: the two envelopes prove it to everybody (protocol/equivocation.py), so no quorum is needed and
nobody can be barred by a word. What it has running goes on: a bar is about new business only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from peer.desk import MARKET, Desk
from protocol import params
from protocol.equivocation import Placed, check_equivocation, place_of, prove
from protocol.errors import VerificationFailed
from protocol.keys import short
from protocol.records import Agreement, Ask, Bid, Equivocation, Offer, Record, StakeMove

__all__ = ["Witness"]


@dataclass
class Witness:
    """`held` is the first record of each place, the newest WITNESS_PLACES_MAX of them."""

    desk: Desk
    held: dict[tuple[bytes, tuple[object, ...]], tuple[bytes, bytes]] = field(default_factory=dict)
    on_caught: Callable[[Equivocation, bytes], None] = lambda _a, _b: None  # a proof was made here
    barred: dict[bytes, int] = field(default_factory=dict)  # culprit -> until, ns

    def see(self, record: Record, record_id: bytes, signers: frozenset[bytes], envelope: bytes) -> None:
        """Every record goes by here first. Raises VerificationFailed for new business of a barred peer."""
        place = place_of(record)
        # An agreement may come with its solver's signature alone: that says nothing of the submitter it names, and must
        # not stand in the place of the one that it did sign.
        if place is not None and place[0] in signers:
            known = self.held.setdefault(place, (record_id, envelope))
            if known[0] != record_id and (place[0] not in self.barred or isinstance(record, Agreement | StakeMove)):
                self.convict(known[1], envelope)
            while len(self.held) > params.WITNESS_PLACES_MAX:
                del self.held[next(iter(self.held))]
        match record:
            case Offer(submitter=peer) | Ask(peer=peer) | Bid(solver=peer):
                self._refuse(peer)

    def convict(self, first: bytes, second: bytes) -> None:
        """Show two records of one place to everybody. Raises VerificationFailed if they are not.

        Of a peer that is barred already nobody has to be told, but what its stake pays for is taken: the log spreads
        it.
        """
        proof = prove(first, second, network=self.desk.network.id)
        envelope = self.desk.seal(proof)
        if proof.culprit not in self.barred:
            self.desk.publish(MARKET, envelope)
            self.on_proof(proof)
        self.on_caught(proof, envelope)

    def on_proof(self, proof: Equivocation) -> None:
        """Two records of one place, seen here or by somebody else. Raises VerificationFailed, and what `open_record`
        raises.

        The bar counts from when the later one was made, as far as others had to believe that: an old proof that is
        shown again changes nothing.
        """
        if proof.culprit in self.barred:
            return
        one, two = check_equivocation(proof)
        age_ns = max(0, self.desk.wall_ns - max(_dated_ns(one), _dated_ns(two)))
        until_ns = self.desk.now_ns + params.BAR_NS - age_ns
        if until_ns > self.desk.now_ns:
            self._bar(proof.culprit, type(one).__name__.lower(), until_ns)

    def _bar(self, culprit: bytes, what: str, until_ns: int) -> None:
        if culprit == self.desk.me:  # a store that was restored from an old copy may repeat itself; it has to know
            self.desk.emit(
                "problem", what=f"this peer signed two records as one {what}; others will refuse its business"
            )
            return
        if len(self.barred) >= params.BARRED_MAX:
            del self.barred[min(self.barred, key=lambda peer: self.barred[peer])]
        self.barred[culprit] = until_ns
        self.desk.save("barred", culprit, until_ns.to_bytes(8, "big"))
        self.desk.book.remove_peer(culprit)
        self.desk.emit("barred", peer=culprit, why=f"it signed two records as one {what}", until_ns=until_ns)

    def _refuse(self, peer: bytes) -> None:
        until_ns = self.barred.get(peer, 0)
        if until_ns > self.desk.now_ns:
            hours = (until_ns - self.desk.now_ns) // 3_600_000_000_000 + 1
            raise VerificationFailed(
                f"{short(peer)} is barred for another {hours} h", why="it signed two records of which one may exist"
            )

    def tick(self) -> None:
        """Forget bars that are over."""
        for peer in [peer for peer, until_ns in self.barred.items() if until_ns <= self.desk.now_ns]:
            del self.barred[peer]
            self.desk.save("barred", peer, None)

    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """The bars that were journalled."""
        self.barred = {peer: int.from_bytes(until, "big") for peer, until in rows("barred")}


def _dated_ns(record: Placed) -> int:
    """The date in a record that others look at before they take it: nobody asks when an agreement was made."""
    return record.accept_before_ns if isinstance(record, Agreement) else record.created_ns
