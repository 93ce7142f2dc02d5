"""Errors that are ordered: a solver that has to hand in a wrong state, and the notaries that know of it before.

The solver's side decides when the beacon of its agreement is there, tells the notaries, and offers the false receipt
only when a quorum of them keeps its word: a crash at any point never makes it look like a cheat. The notary's side
keeps those words and says whether what is challenged was ordered. Sans-IO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from peer.beacon import Beacons
from peer.deals import Deal, agreement_of, save
from peer.desk import Desk
from peer.dispute_file import DisputeFile
from peer.events import SegmentMade
from peer.messages import CorrectionAsk, CorrectionGiven, ForcedTaken, ForcedTell
from peer.settler import Settler
from protocol import params
from protocol.codec import blake, decode
from protocol.errors import VerificationFailed
from protocol.forced import check_forced, forced_of, forced_segment, givers, open_beacon, orders_errors
from protocol.lifecycle import TERMINAL, State
from protocol.records import Agreement, Forced, Verdict, open_record
from worker.cheats import FALSE_ENDS

__all__ = ["Forcing", "Ordered"]


class Ordered(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A notary's row: the envelope of a Forced, and those of the shares that ordered it."""

    forced: bytes
    beacons: tuple[bytes, ...]


@dataclass
class Forcing:
    """See the module docstring. `go`: the beacon of a deal is there, or will not come; `offer`: its notaries know."""

    desk: Desk
    settler: Settler
    beacons: Beacons
    go: Callable[[Deal], None] = lambda _: None
    offer: Callable[[Deal], None] = lambda _: None
    deals: dict[bytes, Deal] = field(default_factory=dict)  # the solver's own
    wait_until: dict[bytes, int] = field(default_factory=dict)  # deal -> begin without a beacon then
    taken: dict[bytes, set[bytes]] = field(default_factory=dict)  # deal -> notaries that keep its Forced
    resend: dict[bytes, int] = field(default_factory=dict)
    kept: dict[bytes, Ordered] = field(default_factory=dict)  # agreement -> what a notary was told

    # --- the solver ----------------------------------------------------------------------------------------
    def begin(self, deal: Deal) -> None:
        """A deal of this solver runs: find out whether, and where, it has to be wrong."""
        self.deals[deal.id] = deal
        agreement = agreement_of(deal, self.desk.network.id)
        wanted = orders_errors(self.desk.network, agreement)
        if deal.beacons or not wanted or deal.lifecycle != State.RUNNING or deal.id in self.wait_until:
            return
        self.wait_until[deal.id] = self.desk.now_ns + params.BEACON_WAIT_NS
        self.beacons.ask(deal.id, agreement, lambda shares: self._ordered(deal, shares))

    def waits(self, deal: Deal) -> bool:
        """Whether a deal must not start to work yet."""
        return deal.id in self.wait_until

    def _ordered(self, deal: Deal, shares: list[bytes]) -> None:
        if self.wait_until.pop(deal.id, None) is None or deal.lifecycle in TERMINAL:
            return
        agreement = agreement_of(deal, self.desk.network.id)
        beacon = open_beacon(shares, target=deal.id, agreement=agreement, network=self.desk.network)
        deal.beacons = shares
        deal.ordered = forced_segment(
            deal.secret,
            beacon,
            first=agreement.first_segment,
            last=agreement.last_segment,
            ppm=self.desk.network.rules.forced_ppm,
        )
        save(self.desk, deal)
        self.go(deal)

    def order_of(self, deal: Deal) -> tuple[int, str] | None:
        """What StartWork has to order of the worker. Which fraud it looks like is nobody's choice either."""
        if deal.ordered is None or deal.forced or self.desk.means.cheat:
            return None
        number = blake("ichiba/forced-fraud", deal.secret, *deal.beacons)[0]
        return deal.ordered, FALSE_ENDS[number % len(FALSE_ENDS)]

    def end_of(self, deal: Deal, event: SegmentMade) -> SegmentMade:
        """A segment's end as its receipt has to state it: the false one where that is ordered, and then a Forced."""
        if event.segment != deal.ordered or not event.false_root or deal.forced:
            return event
        record = Forced(
            network=self.desk.network.id,
            solver=self.desk.me,
            agreement=deal.id,
            segment=event.segment,
            secret=deal.secret,
            false_root=event.false_root,
            true_root=event.out_root,
            checkpoint=event.checkpoint,
            checkpoint_bytes=event.checkpoint_bytes,
        )
        deal.forced = self.desk.seal(record)
        self.deals[deal.id] = deal
        self.desk.emit("ordered-error", deal=deal.id, segment=event.segment)
        return _false_end(event)

    def holds(self, deal: Deal, sequence: int) -> bool:
        """Whether a receipt has to wait until a quorum of notaries keeps the Forced that excuses it."""
        if not deal.forced or sequence != self._place(deal):
            return False
        if len(self.taken.get(deal.id, ())) >= self.desk.network.notary_quorum:
            return False
        if self.desk.now_ns >= self.resend.get(deal.id, 0):
            self._tell(deal)
        return True

    def _place(self, deal: Deal) -> int:
        agreement = agreement_of(deal, self.desk.network.id)
        return forced_of(deal.forced, self.desk.network.id)[0].segment - agreement.first_segment

    def _tell(self, deal: Deal) -> None:
        self.resend[deal.id] = self.desk.now_ns + params.RESEND_NS
        for notary in givers(self.desk.network, agreement_of(deal, self.desk.network.id)):
            if notary not in self.taken.get(deal.id, ()):
                self.desk.send(notary, ForcedTell(deal.forced, tuple(deal.beacons)))

    def on_taken(self, peer: bytes, message: ForcedTaken) -> None:
        """A notary keeps it."""
        deal = self.deals.get(message.agreement)
        if deal is None or not deal.forced:
            return
        if peer not in givers(self.desk.network, agreement_of(deal, self.desk.network.id)):
            raise VerificationFailed("an ordered error is kept by the notaries of its deal")
        before = len(self.taken.setdefault(deal.id, set()))
        self.taken[deal.id].add(peer)
        if before < self.desk.network.notary_quorum <= len(self.taken[deal.id]):
            self.offer(deal)

    def tick(self) -> None:
        """Begin what has waited long enough; repeat what some notary has not heard."""
        for deal_id, until in list(self.wait_until.items()):
            deal = self.deals[deal_id]
            if self.desk.now_ns >= until or deal.lifecycle in TERMINAL:
                del self.wait_until[deal_id]
                self.beacons.drop(deal_id)
                self.desk.attempt(self.go, deal)
        for deal in [d for d in self.deals.values() if d.lifecycle in TERMINAL]:
            del self.deals[deal.id]
        for deal in self.deals.values():
            if deal.forced and self.desk.now_ns >= self.resend.get(deal.id, 0):
                self.desk.attempt(self._tell, deal)

    # --- a notary ------------------------------------------------------------------------------------------
    def on_tell(self, peer: bytes, message: ForcedTell) -> None:
        """Keep an ordered error, and tell the other notaries. Raises VerificationFailed for one that was not ordered,
        or for a second of one deal."""
        record, _, _ = open_record(message.forced, network=self.desk.network.id)
        if not isinstance(record, Forced):
            raise VerificationFailed("an ordered error comes as a Forced")
        channel = self.settler.channels.get(record.agreement)
        if channel is None:
            return  # its opening is still on its way; it is told again
        able = givers(self.desk.network, channel.agreement)
        if self.desk.me not in able or (peer != record.solver and peer not in able):
            raise VerificationFailed(
                "an ordered error is told to the notaries of its deal, by its solver or one of them"
            )
        known = self.kept.get(record.agreement)
        if known is not None and known.forced != message.forced:
            raise VerificationFailed("a second ordered error in one deal")
        if known is None:
            check_forced(record, channel.agreement, record.agreement, shares=message.beacons, network=self.desk.network)
            self.kept[record.agreement] = Ordered(message.forced, message.beacons)
            self.desk.save("ordered", record.agreement, self.kept[record.agreement])
            for notary in able:
                if notary not in (peer, self.desk.me):
                    self.desk.send(notary, message)
        if peer == record.solver:
            self.desk.send(peer, ForcedTaken(record.agreement))

    def ordered(self, agreement_id: bytes, segment: int) -> Forced | None:
        """What excuses a wrong end of this segment: an error that was ordered there, or in the segment before, whose
        false end is this one's formal start. None if nothing does."""
        known = self.kept.get(agreement_id)
        if known is None:
            return None
        record, _ = forced_of(known.forced, self.desk.network.id)
        return record if segment in (record.segment, record.segment + 1) else None

    def excuses(self, file: DisputeFile) -> bool:
        """Whether what is disputed was ordered."""
        return self.ordered(file.challenge.agreement, file.challenge.segment) is not None

    def on_correction_ask(self, peer: bytes, message: CorrectionAsk) -> None:
        """Tell the submitter of a checked deal what was ordered in it. Raises VerificationFailed before it is."""
        channel = self.settler.channels.get(message.agreement)
        if channel is None:
            return
        if peer != channel.agreement.submitter or self.desk.me not in givers(self.desk.network, channel.agreement):
            raise VerificationFailed("a notary tells a submitter what was ordered in its own deals")
        found = any(judged.finding == "forced" for judged in channel.findings.values())
        if not found and not any(self._is_check(e, message.agreement, channel.agreement) for e in message.verdicts):
            raise VerificationFailed("nobody has checked this deal yet", why="who knew what was ordered need not look")
        known = self.kept.get(message.agreement)
        given = CorrectionGiven(message.agreement, known.forced, known.beacons) if known else None
        self.desk.send(peer, given or CorrectionGiven(message.agreement, b"", ()))

    def _is_check(self, envelope: bytes, agreement_id: bytes, agreement: Agreement) -> bool:
        verdict, _, _ = open_record(envelope, network=self.desk.network.id)
        if not isinstance(verdict, Verdict) or verdict.agreement != agreement_id:
            raise VerificationFailed("a verdict on another deal")
        if verdict.finding != "right":
            return False
        parties = (agreement.submitter, agreement.solver)
        least = self.desk.network.rules.checker_stake_min_micro
        return verdict.checker not in parties and self.settler.stakes.at_stake(verdict.checker) >= least

    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """What this notary was told."""
        for agreement_id, value in rows("ordered"):
            self.kept[agreement_id] = decode(Ordered, value, bytes_max=params.STORE_VALUE_BYTES_MAX)


def _false_end(event: SegmentMade) -> SegmentMade:
    return SegmentMade(
        event.work,
        event.segment,
        event.in_root,
        event.false_root,
        event.losses,
        event.operations,
        event.false_checkpoint,
        event.false_bytes,
    )
