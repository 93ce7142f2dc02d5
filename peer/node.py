"""The heart of the daemon, sans-IO: `handle(input, now_ns) -> list[Effect]`.

The daemon (peer/daemon.py) and the simulator run it, nothing else. The same inputs, times and random numbers give the
same effects, those on the store before those that leave the machine; bad bytes cost their sender a penalty, no more.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from market import entries as money
from market.ledger import Ledger
from market.placing import UnitsChosen, UnitsPlaced
from market.rounds import Played
from peer import messages as m
from peer import run_messages as rm
from peer.beacon import Beacons
from peer.benches import Benches
from peer.bidding import Bidder
from peer.certificates import Certificates
from peer.challenger import Challenger
from peer.checker import Checker
from peer.checking import CheckDesk
from peer.commands import Commands
from peer.correcting import Corrections
from peer.deals import Deal
from peer.desk import Desk, Means
from peer.disputes import Disputes
from peer.events import (
    BenchEnded,
    BenchFilled,
    BenchMade,
    BenchWarm,
    BlobRead,
    Command,
    Effect,
    Fetched,
    GossipIn,
    Input,
    Inspected,
    MemoryOpened,
    MessageIn,
    PeerDown,
    PeerUp,
    Post,
    ProfileMade,
    Save,
    ScriptSaid,
    SegmentMade,
    StepMade,
    Tick,
    UnitWaits,
    WorkChecked,
    WorkEnded,
)
from peer.forcing import Forcing
from peer.house import House
from peer.intake import Bundle, Intake
from peer.jobs import JobDesk
from peer.messages import unpack
from peer.news import News
from peer.parallel import ParallelDesk
from peer.pausing import Pausing
from peer.profiles import Profiles
from peer.prover import Prover
from peer.receipt_rows import Rows
from peer.restored import Restored
from peer.runs import RunDesk
from peer.sealing import Sealing
from peer.settler import Logged, Settler
from peer.solver import Solver
from peer.submitter import Submitter
from peer.unit_deals import UnitDeals
from peer.units import Units
from peer.witness import Witness
from protocol import params
from protocol.codec import blake, decode
from protocol.credit_records import CreditLine
from protocol.errors import LimitExceeded, LocalProtocolError, MalformedRecord, RemoteProtocolError
from protocol.house import is_availability
from protocol.keys import SigningKey, peer_key
from protocol.link_report import LinkReport, LinkTimed
from protocol.network import Network
from protocol.records import (
    Ask,
    BenchCard,
    Bid,
    Challenge,
    Equivocation,
    Offer,
    Ruling,
    Verdict,
    open_record,
)

__all__ = ["Node"]


class Node:
    """One peer. `rows` reads the store's tables, `ledger` is what the store rebuilt; both may be empty."""

    def __init__(
        self,
        *,
        key: SigningKey,
        network: Network,
        rng: random.Random,
        means: Means,
        ledger: Ledger,
        rows: Rows,
        now_ns: int,
    ) -> None:
        self.desk = Desk(key=key, network=network, rng=rng, ledger=ledger, means=means, now_ns=now_ns)
        self.settler = Settler(self.desk)
        self.bidder = Bidder(self.desk, self.settler)
        self.beacons = Beacons(self.desk, self.settler)
        self.forcing = Forcing(self.desk, self.settler, self.beacons)
        self.witness, self.intake = Witness(self.desk), Intake(self.desk, self.bidder)
        self.certificates = Certificates(self.desk, self.settler, self.witness)
        self.bidder.in_doubt_micro = lambda: self.certificates.in_doubt_micro("stake") + self.solver.promised_micro()
        self.units = Units(self.desk)
        self.solver = Solver(self.desk, self.settler, self.bidder, self.forcing, self.units, self.certificates.watch)
        self.unit_deals = UnitDeals(self.desk, self.units, self.solver)
        self.forcing.go, self.forcing.offer = self.solver.go, self.solver.offer
        self.bidder.slots_free = self.solver.slots_free
        self.checks = CheckDesk(self.desk, self.settler, Corrections(self.desk, self.settler))
        self.jobs = JobDesk(self.desk, self.settler)
        self.submitter = Submitter(self.desk, self.settler, self.checks, self.jobs, self.beacons, self.certificates)
        market = ParallelDesk(self.desk, self.settler, self.jobs, self.submitter.propose)
        self.jobs.on_choice, self.news = self.submitter.propose, News(self.desk, self.submitter)
        self.runs = RunDesk(self.desk, self.settler, self.jobs, self.submitter, self.units, market)
        self.units.on_ready = self._handed_over
        moves = self.certificates.moves
        moves.number, moves.reserved_micro = self.jobs.number, self.jobs.reserved_micro
        moves.promised_micro, self.jobs.moving_micro = self.solver.promised_micro, moves.moving_micro
        self.profiles = Profiles(self.desk, self.settler, self.jobs, self.submitter.deals)
        self.checks.on_right = self.submitter.checked_right
        self.checks.on_paid_and_wrong = self.submitter.paid_and_wrong
        self.checker = Checker(self.desk, self.settler)
        self.pausing = Pausing(self.desk, self.bidder, self.solver, self.checker)
        self.prover = Prover(self.desk, free=self._idle)
        self.challenger = Challenger(self.desk)
        self.benches = Benches(self.desk, self.prover, self.challenger)
        self.house = House(self.desk, self.settler, self.jobs, self.challenger, self.certificates)
        self.bidder.house_wanted = self.prover.wanted = self.house.wanted
        self.disputes = Disputes(self.desk, self.settler, self.checker, self.submitter, self.solver)
        self.sealing = Sealing(self.desk, self.jobs, self.submitter, self.solver, self.disputes)
        self.disputes.arbiter.ordered = self.forcing.excuses
        self.jobs.speed_of = self.checks.speed_of = self.challenger.speed_of
        self.bidder.carded = self.prover.speed
        self.commands = Commands(
            self.desk, self.settler, self.jobs, self.submitter, self.bidder, self.solver, self.pausing, self.prover,
            self.challenger, self.disputes, self.profiles, self.sealing, moves, self.runs, self.house,
        )  # fmt: skip
        self.restored = Restored(self.desk, self.settler, answer=self.commands.handle, on_heard=self._heard)
        self.next_sync_ns = now_ns
        self._deposit()
        for first in (
            self.settler, self.beacons, self.forcing, self.jobs, self.submitter, self.runs, self.pausing, self.units,
            self.solver, self.house,
        ):  # fmt: skip
            first.restore(rows)
        self.certificates.restore(rows, self.submitter.deals, self.solver.deals, self.house.deals)
        for then in (
            self.checker, self.disputes, self.prover, self.challenger, self.restored, self.witness,
        ):  # fmt: skip
            then.restore(rows)
        self.settler.on_open, self.settler.on_moved = self._opened, self.certificates.moved
        self.settler.on_close = self._closed
        self.settler.on_judged = self.disputes.judged

    def _deposit(self) -> None:
        """The network file's deposits: the ledger's first entries, the same on every peer."""
        for deposit in self.desk.network.deposits:
            owner = peer_key(deposit.peer)
            key = blake("ichiba/genesis", self.desk.network.id, owner)
            self.desk.post(money.deposit(key, owner, deposit.free_micro, deposit.stake_micro, memo="network file"))

    def _heard(self) -> None:
        """A restored peer knows what became of its channels: its deals follow."""
        for agreement_id, channel in list(self.settler.channels.items()):
            if channel.closed:
                self.desk.attempt(self.submitter.overtaken, agreement_id, channel.closed)
                self.desk.attempt(self.solver.closed, agreement_id, channel.closed)
            else:
                self._opened(agreement_id)

    def _opened(self, agreement_id: bytes) -> None:
        self.certificates.opened(agreement_id)
        if self.restored.listening:
            return
        # The offer is taken: nobody need bid on it any more, whatever late gossip says.
        agreement = self.settler.every[agreement_id].agreement
        offer = self.desk.book.offers.get(agreement.offer)
        if offer is not None and offer.submitter == agreement.submitter:  # nobody takes another's offer off the market
            self.desk.book.take_offer(agreement.offer, now_ns=self.desk.wall_ns)
        if not is_availability(agreement, self.desk.network):  # pay for standing ready takes no slot
            self.desk.book.void_bids(agreement.solver, until_ns=agreement.created_ns)
        self.desk.attempt(self.submitter.opened, agreement_id)
        self.desk.attempt(self.solver.opened, agreement_id)

    def _closed(self, agreement_id: bytes, how: str) -> None:
        if self.restored.listening:
            return
        self.desk.attempt(self.submitter.closed, agreement_id, how)
        self.desk.attempt(self.solver.closed, agreement_id, how)

    def _handed_over(self, work: bytes) -> None:
        """The neighbours of a unit here have signed: its receipt, or its end if this peer keeps it, may go on."""
        if work in self.solver.deals:
            self.solver.offer(self.solver.deals[work])
        elif work in self.runs.kept.working:
            self.runs.kept.offer(self.jobs.jobs[work])

    def _idle(self) -> bool:
        """Whether no job and no check runs here, and none is only paused."""
        working = self.checker.cases or self.house.reruns.work
        return not self.desk.paused_ns and self.solver.slots_free() == self.desk.means.slots and not working

    # --- the one door --------------------------------------------------------------------------------------
    def handle(self, event: Input, now_ns: int, wall_ns: int | None = None) -> list[Effect]:
        """Take one input; return the effects, those of the store first. The times are those of peer/clock.py."""
        if self.desk.set_time(now_ns, wall_ns) and not self.restored.listening:
            self.jobs.redate()
            self.bidder.redate()
        match event:
            case _ if self.restored.listening:
                self.restored.handle(event)
            case Tick():
                self._tick()
            case GossipIn(author=author, data=data):
                self._guard(author, self._gossip, author, data)
            case MessageIn(peer=peer, data=data):
                self._guard(peer, self._message, peer, data)
            case PeerUp(peer=peer):
                self._peer_up(peer)
            case PeerDown(peer=peer):
                self.desk.peers.pop(peer, None)
                self.desk.lefts[peer] = self.desk.now_ns
            case LinkTimed():
                self.commands.links.timed(event)
            case Fetched():
                if event.bytes_per_second:
                    self.desk.measured(event.peer, event.bytes_per_second)
                deal = self.submitter.deals.get(event.token)
                if deal is not None:
                    self.jobs.note(deal.job, event.note)
                    self.desk.attempt(self.checks.corrections.on_fetched, deal, event)
                for role in (self.submitter.receiving, self.solver, self.checker, self.house):
                    self.desk.attempt(role.on_fetched, event)
                self.desk.attempt(self.disputes.fetched, event)
            case BlobRead():
                self.desk.attempt(self.disputes.read, event)
            case Played() | UnitsPlaced() | UnitsChosen():
                self.desk.attempt(self.commands.played, event)
            case Inspected():
                self.desk.attempt(self.disputes.inspected, event)
            case ScriptSaid():
                self.solver.on_news(event)
            case StepMade():
                self.solver.on_news(event)
                self.runs.kept.on_step(event)
            case UnitWaits():
                self.unit_deals.on_waits(event)
                self.runs.watch.on_kept_waiting(event)
            case SegmentMade():
                for worker in (self.solver, self.checker, self.house, self.runs.kept):
                    self.desk.attempt(worker.on_segment, event)
            case ProfileMade():
                self.desk.attempt(self.solver.on_profile, event)
            case WorkEnded():
                for worker in (self.solver, self.checker, self.house, self.runs.kept):
                    self.desk.attempt(worker.on_work_ended, event)
            case BenchWarm() | BenchMade() | BenchFilled() | MemoryOpened() | BenchEnded() | WorkChecked():
                self.benches.event(event)
            case Command():
                self.commands.handle(event)
        effects, self.desk.effects = self.sealing.keyed(self.profiles.retold(self.desk.effects)), []
        return sorted(effects, key=lambda effect: not isinstance(effect, Save | Post))

    def _guard(self, peer: bytes, act: Callable[..., None], *arguments: Any) -> None:
        """Run `act` on a peer's bytes; what is wrong with them costs the peer, not us."""
        try:
            act(*arguments)
        except LimitExceeded as error:
            # Our own table is full, or somebody else's records filled it: not this peer's crime.
            self.desk.drop(f"refused-{error.code}", peer)
            self.desk.emit("refused-bytes", peer=peer, code=error.code, why=str(error)[:300])
        except RemoteProtocolError as error:
            self.desk.drop(f"refused-{error.code}", peer)
            self.desk.penalise(peer, f"{error.code}: {error.what}"[:200])
            self.desk.emit("refused-bytes", peer=peer, code=error.code, why=str(error)[:300])
        except LocalProtocolError as error:
            # A late or doubled message can ask for a step the deal has passed: that is nobody's crime.
            self.desk.drop("late", peer)
            self.desk.emit("ignored", peer=peer, why=str(error)[:300])

    # --- time ----------------------------------------------------------------------------------------------
    def _tick(self) -> None:
        self.jobs.tick()
        self.profiles.tick()
        self.runs.tick()
        self.submitter.tick()
        self.certificates.tick()
        self.bidder.tick()
        self.beacons.tick()
        self.forcing.tick()
        self.solver.tick()
        self.unit_deals.tick()
        self.runs.kept.tick()
        self.settler.tick()
        self.pausing.tick()
        self.prover.tick()
        self.challenger.tick()
        self.house.tick()
        self.commands.links.tick()
        self.disputes.tick()
        self.witness.tick()
        self.desk.book.expire(now_ns=self.desk.wall_ns)
        if self.desk.now_ns >= self.next_sync_ns and self.desk.peers:
            self.next_sync_ns = self.desk.now_ns + params.SYNC_NS
            self.desk.send(self.desk.rng.choice(sorted(self.desk.peers)), m.SyncDigest(*self.settler.digest()))
        self.desk.flush_outbox()

    def _peer_up(self, peer: bytes) -> None:
        """Tell a peer just met what stands: gossip only reaches those who were there."""
        if peer in self.desk.peers:
            return
        self.desk.peers[peer] = self.desk.now_ns
        standing = tuple(e for e in (self.bidder.ask, self.prover.card, *self.jobs.live_offers()) if e)
        if standing:
            self.desk.send(peer, m.Records(standing[:512]))
        self.desk.send(peer, m.SyncDigest(*self.settler.digest()))

    # --- bytes from peers ----------------------------------------------------------------------------------
    def _gossip(self, author: bytes, data: bytes) -> None:
        for envelope in decode(Bundle, data, bytes_max=params.GOSSIP_RECORD_BYTES_MAX + 4096):
            self._guard(author, self._record, author, envelope)

    def _record(self, sender: bytes, envelope: bytes) -> None:
        """One record, from gossip, from a peer just met, or from anti-entropy."""
        record, record_id, signers = open_record(envelope, network=self.desk.network.id)
        self.witness.see(record, record_id, signers, envelope)
        match record:
            case Offer() | Ask() | Bid():
                self.commands.answers.clocks.note(record, self.desk.wall_ns)
                self.intake.take(sender, record, record_id, envelope)
            case BenchCard():
                self.challenger.on_card(envelope)
            case LinkReport():
                self.commands.links.take(record, envelope)
            case Equivocation():
                self.certificates.caught(record, envelope)
            case Verdict():
                self.settler.freeze(record)
                deal = self.submitter.deals.get(record.agreement)
                if deal is not None:
                    self.checks.on_verdict(deal, record, envelope)
                self.disputes.on_verdict(record, envelope)
            case Challenge():
                self.settler.judgement.challenged(record, record_id)
                self.disputes.challenged(record, record_id, envelope)
            case Ruling():
                self.disputes.ruled(record, envelope)
            case _ if isinstance(record, Logged | CreditLine):
                if record_id not in self.settler.log:
                    self.settler.accept(envelope)
            case _:
                raise MalformedRecord(f"a {type(record).__name__.lower()} is not gossiped")

    def _message(self, peer: bytes, data: bytes) -> None:
        message = self.sealing.incoming(unpack(data))
        match message:
            case m.Propose():
                self.solver.on_propose(peer, message)
            case m.Accept():
                self.submitter.on_accept(peer, message)
            case m.Decline():
                self.submitter.on_decline(peer, message)
                self.solver.on_decline(peer, message)
            case m.Opened():
                self.solver.on_opened(peer, message)
            case m.Progress() | m.ScriptNews():
                self.news.progress(peer, message)
            case m.Paused():
                self.news.paused(peer, message)
            case m.ReceiptOffer():
                self.submitter.receiving.on_receipt(peer, message)
            case m.ReceiptBack():
                self.solver.on_receipt_back(peer, message)
            case m.ProofOffer() | m.RevealOffer():
                self._by_side(peer, message)
            case m.CheckRequest():
                self.checker.on_request(peer, message)
            case m.CheckAccept() | m.CheckDecline():
                self._check_answer(peer, message)
            case m.SettleOffer():
                self.solver.on_settle(peer, message)
            case m.SettleBack():
                deal = self._deal_of_settlement(message)
                if deal is not None:
                    self.checks.on_settled(deal, message)
            case m.Cancel():
                self.solver.on_cancel(peer, message)
            case m.Records():
                for envelope in self.intake.admitted(peer, message.records):
                    self._guard(peer, self._record, peer, envelope)
            case m.SyncDigest() | m.SyncIds():
                self._sync(peer, message)
            case m.CorrectionGiven():
                deal = self.submitter.deals.get(message.agreement)
                if deal is not None:
                    self.checks.corrections.on_given(deal, peer, message, self.submitter.receipts[deal.id])
            case m.BeaconAsk() | m.BeaconGiven() | m.ForcedTell() | m.ForcedTaken() | m.CorrectionAsk():
                self._notary_message(peer, message)
            case _ if isinstance(message, m.CreditMessage):
                self.settler.netting.message(peer, message)
            case _ if isinstance(message, m.RunMessage):
                self._run_message(peer, message)
            case _:
                self._other_message(peer, message)

    def _notary_message(self, peer: bytes, message: m.Message) -> None:
        match message:
            case m.BeaconAsk():
                self.beacons.on_ask(peer, message)
            case m.BeaconGiven():
                self.beacons.on_given(peer, message)
            case m.ForcedTell():
                self.forcing.on_tell(peer, message)
            case m.ForcedTaken():
                self.forcing.on_taken(peer, message)
            case m.CorrectionAsk():
                self.forcing.on_correction_ask(peer, message)

    def _other_message(self, peer: bytes, message: m.Message) -> None:
        match message:
            case _ if self.benches.message(peer, message):
                pass
            case m.HousePay():
                self.house.on_pay(peer, message)
            case _ if isinstance(message, m.CertificateMessage):
                self.certificates.message(peer, message)
            case _:
                assert isinstance(message, m.DisputeMessage), message
                self.disputes.message(peer, message)

    def _by_side(self, peer: bytes, message: m.ProofOffer | m.RevealOffer) -> None:
        """Proofs and reveals go both ways: the deal says which side we are on."""
        sealed = message.proof if isinstance(message, m.ProofOffer) else message.reveal
        record, _, _ = open_record(sealed, network=self.desk.network.id)
        agreement_id = getattr(record, "agreement", b"")
        role = self.submitter.drawing if agreement_id in self.submitter.deals else self.solver
        if isinstance(message, m.ProofOffer):
            role.on_proof(peer, message)
        else:
            role.on_reveal(peer, message)

    def _check_answer(self, peer: bytes, message: m.CheckAccept | m.CheckDecline) -> None:
        deal = self.submitter.deals.get(message.agreement)
        if deal is None:
            return
        if isinstance(message, m.CheckAccept):
            self.checks.on_accept(deal, peer, message)
        else:
            self.checks.on_decline(deal, peer, message)

    def _deal_of_settlement(self, message: m.SettleBack) -> Deal | None:
        record, _, _ = open_record(message.settlement, network=self.desk.network.id)
        return self.submitter.deals.get(getattr(record, "agreement", b""))

    def _run_message(self, peer: bytes, message: m.RunMessage) -> None:
        """Of a parallel job, to its submitter, its solvers or between them."""
        acts: dict[type[m.RunMessage], Callable[..., None]] = {
            rm.Launch: self.unit_deals.on_launch,
            rm.Launched: self.runs.on_launched,
            rm.Held: self.unit_deals.on_held,
            rm.HandoverAsk: self.units.on_ask,
            rm.HandoverGiven: self.units.on_given,
            rm.UnitWaiting: self.runs.watch.on_waiting,
            rm.UnitDisputed: self.runs.quarrels.on_disputed,
        }
        acts[type(message)](peer, message)

    # --- anti-entropy --------------------------------------------------------------------------------------
    def _sync(self, peer: bytes, message: m.SyncDigest | m.SyncIds) -> None:
        """Compare settlement logs: digests first, ids where they differ, then the records themselves."""
        if isinstance(message, m.SyncDigest):
            if (message.count, message.digest) != self.settler.digest():
                self.desk.send(peer, m.SyncIds(tuple(sorted(self.settler.log)), answer=True))
            return
        theirs = set(message.ids)
        # In the order they came here: one who hears of a settlement after what was found later folds other money.
        lacking = [envelope for i, envelope in self.settler.log.items() if i not in theirs]
        for start in range(0, len(lacking), 64):
            self.desk.send(peer, m.Records(tuple(lacking[start : start + 64])))
        if message.answer and theirs - set(self.settler.log):
            self.desk.send(peer, m.SyncIds(tuple(sorted(self.settler.log)), answer=False))
