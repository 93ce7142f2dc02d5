"""The heart of the daemon, sans-IO: `handle(input, now_ns) -> list[Effect]`.

Exactly two things run it: the daemon (peer/daemon.py) and the simulator (tests/simulator.py). It promises that the
same inputs, times and random numbers give the same effects; that every effect that changes the store comes before
any that leaves the machine; and that bad bytes cost their sender a penalty and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

from market import entries as money
from market.ledger import Ledger
from peer import messages as m
from peer.bidding import Bidder
from peer.challenger import Challenger
from peer.checker import Checker
from peer.checking import CheckDesk
from peer.commands import Commands
from peer.deals import Deal, agreement_of
from peer.desk import Desk, Means
from peer.events import (
    BenchEnded,
    BenchFilled,
    BenchInput,
    BenchMade,
    BenchWarm,
    Command,
    Effect,
    Fetched,
    GossipIn,
    Input,
    MemoryOpened,
    MessageIn,
    PeerDown,
    PeerUp,
    Post,
    Save,
    ScriptSaid,
    SegmentMade,
    StepMade,
    Tick,
    WorkChecked,
    WorkEnded,
)
from peer.jobs import JobDesk
from peer.messages import unpack
from peer.pausing import Pausing
from peer.prover import Prover
from peer.settler import Settler
from peer.solver import Solver
from peer.submitter import Submitter
from protocol import params
from protocol.codec import blake, decode
from protocol.errors import LimitExceeded, LocalProtocolError, MalformedRecord, RemoteProtocolError
from protocol.keys import SigningKey, peer_key
from protocol.network import Network
from protocol.records import Agreement, Ask, BenchCard, Bid, Claim, Offer, Settlement, Slash, Verdict, open_record

__all__ = ["Node"]

Rows = Callable[[str], Iterable[tuple[bytes, bytes]]]


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
        self.solver = Solver(self.desk, self.settler, self.bidder)
        self.bidder.slots_free = self.solver.slots_free
        self.checks = CheckDesk(self.desk, self.settler)
        self.jobs = JobDesk(self.desk, self.settler)
        self.submitter = Submitter(self.desk, self.settler, self.checks, self.jobs)
        self.jobs.on_choice = self.submitter.propose
        self.checks.on_right = self.submitter.checked_right
        self.checks.on_paid_and_wrong = self.submitter.paid_and_wrong
        self.checker = Checker(self.desk, self.settler)
        self.pausing = Pausing(self.desk, self.bidder, self.solver, self.checker)
        self.prover = Prover(self.desk, free=self._idle)
        self.challenger = Challenger(self.desk)
        self.jobs.speed_of = self.challenger.speed_of
        self.bidder.carded = self.prover.speed
        self.commands = Commands(
            self.desk, self.settler, self.jobs, self.submitter, self.bidder, self.solver, self.pausing, self.prover,
            self.challenger,
        )  # fmt: skip
        self.next_sync_ns = now_ns
        self._deposit()
        self.settler.restore(rows("settlement"), rows("frozen"))
        self.jobs.restore(rows)
        self.submitter.restore(rows)
        self.pausing.restore(rows)
        self.solver.restore(rows)
        self.checker.restore(rows)
        self.prover.restore(rows)
        self.challenger.restore(rows)
        self.settler.on_open = self._opened
        self.settler.on_close = self._closed

    def _deposit(self) -> None:
        """The network file's deposits: the ledger's first entries, the same on every peer."""
        for deposit in self.desk.network.deposits:
            owner = peer_key(deposit.peer)
            key = blake("ichiba/genesis", self.desk.network.id, owner)
            self.desk.post(money.deposit(key, owner, deposit.free_micro, deposit.stake_micro, memo="network file"))

    def _opened(self, agreement_id: bytes) -> None:
        # The offer is taken: nobody need bid on it any more, whatever late gossip says.
        agreement = self.settler.channels[agreement_id].agreement
        offer = self.desk.book.offers.get(agreement.offer)
        if offer is not None and offer.submitter == agreement.submitter:  # nobody takes another's offer off the market
            self.desk.book.take_offer(agreement.offer, now_ns=self.desk.now_ns)
        self.submitter.opened(agreement_id)
        self.solver.opened(agreement_id)

    def _closed(self, agreement_id: bytes, how: str) -> None:
        self.submitter.closed(agreement_id, how)
        self.solver.closed(agreement_id, how)

    def _idle(self) -> bool:
        """Whether no job and no check runs here, and none is only paused."""
        return not self.desk.paused_ns and self.solver.slots_free() == self.desk.means.slots and not self.checker.cases

    # --- the one door --------------------------------------------------------------------------------------
    def handle(self, event: Input, now_ns: int) -> list[Effect]:
        """Take one input; return the effects, those of the store first. `now_ns` never goes backwards."""
        self.desk.now_ns = max(self.desk.now_ns, now_ns)
        match event:
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
            case Fetched():
                deal = self.submitter.deals.get(event.token)
                if deal is not None and event.note:
                    self.jobs.note(deal.job, event.note)
                for role in (self.submitter, self.solver, self.checker):
                    self.desk.attempt(role.on_fetched, event)
            case ScriptSaid():
                self.solver.on_said(event)
            case StepMade():
                self.solver.on_step(event)
            case SegmentMade():
                for worker in (self.solver, self.checker):
                    self.desk.attempt(worker.on_segment, event)
            case WorkEnded():
                for worker in (self.solver, self.checker):
                    self.desk.attempt(worker.on_work_ended, event)
            case BenchWarm() | BenchMade() | BenchFilled() | MemoryOpened() | BenchEnded() | WorkChecked():
                self._bench_event(event)
            case Command():
                self.commands.handle(event)
        effects, self.desk.effects = self.desk.effects, []
        return sorted(effects, key=lambda effect: not isinstance(effect, Save | Post))

    def _bench_event(self, event: BenchInput) -> None:
        """What the bench process made, or the check of another's work."""
        acts: dict[type[BenchInput], Callable[..., None]] = {
            BenchWarm: self.prover.on_warm,
            BenchMade: self.prover.on_made,
            BenchFilled: self.prover.on_filled,
            MemoryOpened: self.prover.on_opened,
            BenchEnded: self.prover.on_ended,
            WorkChecked: self.challenger.on_checked,
        }
        self.desk.attempt(acts[type(event)], event)  # a card that ran out meanwhile must not stop the node

    def _guard(self, peer: bytes, act: Callable[..., None], *arguments: Any) -> None:
        """Run `act` on a peer's bytes; what is wrong with them costs the peer, not us."""
        try:
            act(*arguments)
        except LimitExceeded as error:
            # Our own table is full, or somebody else's records filled it: not this peer's crime.
            self.desk.emit("refused-bytes", peer=peer, code=error.code, why=str(error)[:300])
        except RemoteProtocolError as error:
            self.desk.penalise(peer, f"{error.code}: {error.what}"[:200])
            self.desk.emit("refused-bytes", peer=peer, code=error.code, why=str(error)[:300])
        except LocalProtocolError as error:
            # A late or doubled message can ask for a step the deal has passed: that is nobody's crime.
            self.desk.emit("ignored", peer=peer, why=str(error)[:300])

    # --- time ----------------------------------------------------------------------------------------------
    def _tick(self) -> None:
        self.jobs.tick()
        self.submitter.tick()
        self.bidder.tick()
        self.solver.tick()
        self.settler.tick()
        self.prover.tick()
        self.challenger.tick()
        self.desk.book.expire(now_ns=self.desk.now_ns)
        if self.desk.now_ns >= self.next_sync_ns and self.desk.peers:
            self.next_sync_ns = self.desk.now_ns + params.SYNC_NS
            count, digest = self.settler.digest()
            self.desk.send(self.desk.rng.choice(sorted(self.desk.peers)), m.SyncDigest(count, digest))
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
        for envelope in decode(list[bytes], data, bytes_max=params.GOSSIP_RECORD_BYTES_MAX + 4096):
            self._guard(author, self._record, author, envelope)

    def _record(self, sender: bytes, envelope: bytes) -> None:
        """One record, from gossip, from a peer just met, or from anti-entropy."""
        record, record_id, _ = open_record(envelope, network=self.desk.network.id)
        book, now = self.desk.book, self.desk.now_ns
        match record:
            case Offer():
                if record.expires_ns > now and book.add_offer(record_id, record, now_ns=now):
                    self.desk.emit("offer-seen", offer=record_id, submitter=record.submitter)
                    self.bidder.consider(record_id, record)
            case Ask():
                if record.expires_ns > now:
                    book.add_ask(record, now_ns=now)
            case Bid():
                if record.expires_ns > now:
                    book.add_bid(record_id, record, now_ns=now)
            case BenchCard():
                self.challenger.on_card(envelope)
            case Verdict():
                self.settler.freeze(record)
                deal = self.submitter.deals.get(record.agreement)
                if deal is not None:
                    self.checks.on_verdict(deal, record, envelope)
            case Agreement() | Settlement() | Claim() | Slash():
                if record_id not in self.settler.log:
                    self.settler.accept(envelope)
            case _:
                raise MalformedRecord(f"a {type(record).__name__.lower()} is not gossiped")

    def _message(self, peer: bytes, data: bytes) -> None:
        message = unpack(data)
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
                self._progress(peer, message)
            case m.Paused():
                self._paused(peer, message)
            case m.ReceiptOffer():
                self.submitter.on_receipt(peer, message)
            case m.ReceiptBack():
                self.solver.on_receipt_back(peer, message)
            case m.ProofOffer():
                self._by_side(peer, message)
            case m.RevealOffer():
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
                for envelope in message.records:
                    self._guard(peer, self._record, peer, envelope)
            case m.SyncDigest() | m.SyncIds():
                self._sync(peer, message)
            case _:
                self._bench_message(peer, message)

    def _bench_message(self, peer: bytes, message: m.Message) -> None:
        match message:
            case m.BenchInvite():
                self.prover.on_invite(peer)
            case m.BenchAsk():
                self.challenger.on_ask(peer, message)
            case m.BenchStart():
                self.prover.on_start(peer, message)
            case m.BenchDone():
                self.challenger.on_done(peer, message)
            case m.BenchTimed():
                self.prover.on_timed(peer, message)
            case m.BenchOffer():
                self.challenger.on_offer(peer, message)
            case m.BenchProbe():
                self.prover.on_probe(peer, message)
            case m.BenchProbed():
                self.challenger.on_probed(peer, message)
            case m.BenchWitness():
                self.prover.on_witness(peer, message)
            case m.BenchDecline():
                self.prover.on_decline(peer, message)
                self.challenger.on_decline(peer, message)
            case _:
                raise AssertionError(message)

    def _by_side(self, peer: bytes, message: m.ProofOffer | m.RevealOffer) -> None:
        """Proofs and reveals go both ways: the deal says which side we are on."""
        sealed = message.proof if isinstance(message, m.ProofOffer) else message.reveal
        record, _, _ = open_record(sealed, network=self.desk.network.id)
        agreement_id = getattr(record, "agreement", b"")
        role = self.submitter if agreement_id in self.submitter.deals else self.solver
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

    def _progress(self, peer: bytes, message: m.Progress | m.ScriptNews) -> None:
        deal = self.submitter.deals.get(message.agreement)
        if deal is not None and self.submitter.solver_of(deal) == peer:
            deal.news_ns = self.desk.now_ns
            if isinstance(message, m.ScriptNews):
                self.desk.emit("said", deal.job, deal=deal.id, text=message.text, used_ns=message.used_ns)
                return
            self.desk.emit("step", deal.job, deal=deal.id, step=message.step, loss=message.loss_millionths / 1e6)

    def _paused(self, peer: bytes, message: m.Paused) -> None:
        """Told to people, and no news: a solver cannot hold a job longer by saying that it does not work on it."""
        deal = self.submitter.deals.get(message.agreement)
        if deal is not None and self.submitter.solver_of(deal) == peer:
            silence_ns = agreement_of(deal, self.desk.network.id).segment_deadline_ns
            kind = "solver-paused" if message.paused else "solver-resumed"
            self.desk.emit(kind, deal.job, deal=deal.id, solver=peer, silence_s=silence_ns // 10**9)

    # --- anti-entropy --------------------------------------------------------------------------------------
    def _sync(self, peer: bytes, message: m.SyncDigest | m.SyncIds) -> None:
        """Compare settlement logs: digests first, ids where they differ, then the records themselves."""
        if isinstance(message, m.SyncDigest):
            if (message.count, message.digest) != self.settler.digest():
                self.desk.send(peer, m.SyncIds(tuple(sorted(self.settler.log)), answer=True))
            return
        theirs = set(message.ids)
        lacking = [self.settler.log[i] for i in sorted(self.settler.log) if i not in theirs]
        for start in range(0, len(lacking), 64):
            self.desk.send(peer, m.Records(tuple(lacking[start : start + 64])))
        if message.answer and theirs - set(self.settler.log):
            self.desk.send(peer, m.SyncIds(tuple(sorted(self.settler.log)), answer=False))
