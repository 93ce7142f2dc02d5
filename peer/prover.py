"""A peer's own bench card: ask to be challenged, answer a challenge, show memory, keep and gossip the card.

One bench at a time, and none while a job runs: a card measured beside other work would say too little. Everything
is repeated until it is answered; a restart forgets a bench that was under way, and the challenger lets it lapse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from peer.desk import MARKET, Desk
from peer.events import (
    BenchEnded,
    BenchFilled,
    BenchMade,
    BenchWarm,
    MemoryOpened,
    OpenMemory,
    Release,
    StartBench,
    StopBench,
    WarmBench,
)
from peer.messages import (
    BenchAsk,
    BenchDecline,
    BenchDone,
    BenchOffer,
    BenchProbe,
    BenchProbed,
    BenchStart,
    BenchTimed,
    BenchWitness,
    Message,
)
from protocol import params
from protocol.bench_card import Figures, OpenCard, open_card, open_challenge
from protocol.errors import IchibaError, LocalProtocolError, VerificationFailed
from protocol.keys import short
from protocol.records import BenchCard, BenchChallenge

__all__ = ["Prover"]

NOTHING = bytes(32)


@dataclass
class _Bench:
    """A challenge under way. `say` is the message repeated until the next one comes."""

    id: bytes
    challenge: BenchChallenge
    envelope: bytes
    deadline_ns: int
    evidence: bytes = b""
    elapsed_ns: int = 0
    root: bytes = b""
    card: bytes = b""
    indices: tuple[int, ...] = ()
    say: Message | None = None
    resend_ns: int = 0


@dataclass
class Prover:
    """See the module docstring. `free` says that no job or check of this peer runs."""

    desk: Desk
    free: Callable[[], bool] = lambda: True
    wanted: Callable[[bytes], bool] = lambda _: True  # whether the owner lets a peer challenge this one by surprise
    bench: _Bench | None = None
    asking: bytes = b""  # the peer we want a challenge of
    wish: BenchAsk | None = None  # what we say to it, once the process is warm
    memory_bytes: int = 0
    figures: Figures | None = None
    ask_until_ns: int = 0
    ask_again_ns: int = 0
    invited_ns: dict[bytes, int] = field(default_factory=dict)  # peer -> when we last followed its invitation
    card: bytes = b""  # our newest card, with both signatures
    opened: OpenCard | None = None
    publish_ns: int = 0

    def speed(self) -> int:
        """Operations per second of our card; 0 without one."""
        return self.opened.operations_per_second if self.opened is not None else 0

    # --- asking --------------------------------------------------------------------------------------------
    def ask(self, peer: bytes, *, memory_bytes: int) -> None:
        """Warm up, then ask a connected peer for a challenge. Raises LocalProtocolError where that is no use now."""
        if peer not in self.desk.peers:
            raise LocalProtocolError(f"{short(peer)} is not connected", next_step="see `ichiba status`")
        if self.bench is not None or self.asking:
            raise LocalProtocolError("a bench is under way", next_step="wait for its end, a minute or two")
        if not self.free():
            raise LocalProtocolError("this peer is at work", why="a bench beside a job would measure too little")
        self.asking, self.wish, self.memory_bytes = peer, None, memory_bytes
        self.ask_until_ns = self.desk.now_ns + params.BENCH_ASK_NS
        self.desk.add(WarmBench())
        self.desk.emit("bench", stage="warm", peer=peer)

    def on_invite(self, peer: bytes) -> None:
        """A peer that looks like us is challenged, or somebody wants to know: ask, unless we are at work."""
        now, means = self.desk.now_ns, self.desk.means
        newest = max(self.invited_ns.values(), default=0)
        rested = peer not in self.invited_ns and now >= newest + params.BENCH_ANY_INVITED_REST_NS
        if means.roles and rested and self.wanted(peer) and self.free() and self.bench is None and not self.asking:
            self.invited_ns[peer] = now
            self.ask(peer, memory_bytes=means.memory_bytes)

    def on_warm(self, event: BenchWarm) -> None:
        """The process runs: nothing of its start will count."""
        if self.asking and self.wish is None:
            self.figures = event.figures
            self.wish = BenchAsk(max(1, event.operations_per_second), self.memory_bytes, event.figures)
            self._ask()

    def _ask(self) -> None:
        assert self.wish is not None
        self.ask_again_ns = self.desk.now_ns + params.RESEND_NS
        self.desk.send(self.asking, self.wish)

    def _stop_asking(self, code: str, why: str) -> None:
        peer, self.asking, self.wish = self.asking, b"", None
        self.desk.add(StopBench())
        self.desk.emit("bench-refused", peer=peer, code=code, why=why)

    # --- answering -----------------------------------------------------------------------------------------
    def on_start(self, peer: bytes, message: BenchStart) -> None:
        """The challenge we asked for; any other is declined. Raises VerificationFailed for one that is not to us."""
        challenge, challenge_id = open_challenge(message.challenge, network=self.desk.network.id)
        if challenge.challenger != peer or challenge.peer != self.desk.me:
            raise VerificationFailed("a challenge comes from its challenger, to the peer it names")
        if self.bench is not None and self.bench.id == challenge_id:
            return
        if peer != self.asking or self.wish is None:
            self._decline(peer, challenge_id, "not-asked", "this peer did not ask for a challenge, or is at another")
            return
        if challenge.memory_blocks * params.BENCH_MEMORY_BLOCK_BYTES > self.memory_bytes:
            self._decline(peer, challenge_id, "memory", "more memory than this peer asked to prove")
            return
        if challenge.expires_ns <= self.desk.wall_ns:
            self._decline(peer, challenge_id, "expired", "the challenge is past its time")
            return
        self.asking, self.wish = b"", None
        self.bench = _Bench(challenge_id, challenge, message.challenge, deadline_ns=challenge.expires_ns)
        self.desk.add(StartBench(challenge_id, challenge))
        self.desk.emit("bench", stage="chain", peer=peer, side=challenge.side, links=challenge.links)

    def _decline(self, peer: bytes, challenge_id: bytes, code: str, why: str) -> None:
        self.desk.send(peer, BenchDecline(challenge_id, code, why))

    def _of(self, challenge_id: bytes, peer: bytes | None = None) -> _Bench | None:
        """The bench under way, if it is this one (and this peer its challenger)."""
        bench = self.bench
        if bench is None or bench.id != challenge_id or peer not in (None, bench.challenge.challenger):
            return None
        return bench

    def _say(self, bench: _Bench, message: Message) -> None:
        bench.say, bench.resend_ns = message, self.desk.now_ns + params.RESEND_NS
        self.desk.send(bench.challenge.challenger, message)

    def on_made(self, event: BenchMade) -> None:
        """The chain is done: stop the challenger's clock."""
        if (bench := self._of(event.challenge)) is not None:
            bench.evidence = event.evidence
            self._say(bench, BenchDone(bench.id, event.evidence))

    def on_timed(self, peer: bytes, message: BenchTimed) -> None:
        """The challenger has the answer and says how long it took."""
        bench = self._of(message.challenge, peer)
        if bench is not None and bench.evidence and not bench.elapsed_ns and message.elapsed_ns:
            bench.elapsed_ns, bench.say = message.elapsed_ns, None
            self.desk.emit("bench", stage="memory", peer=peer, elapsed_ns=bench.elapsed_ns)
            self._offer(bench)

    def on_filled(self, event: BenchFilled) -> None:
        """The memory is filled."""
        if (bench := self._of(event.challenge)) is not None:
            bench.root = event.root
            self._offer(bench)

    def _offer(self, bench: _Bench) -> None:
        if not bench.elapsed_ns or not bench.root:
            return
        now, figures = self.desk.wall_ns, self.figures
        assert figures is not None, "warm before it was challenged"
        card = BenchCard(
            network=self.desk.network.id,
            peer=self.desk.me,
            challenger=bench.challenge.challenger,
            challenge=bench.envelope,
            evidence=bench.evidence,
            elapsed_ns=bench.elapsed_ns,
            memory_root=bench.root,
            float32_per_second=figures.float32_per_second,
            memory_bytes=figures.memory_bytes,
            memory_bytes_per_second=figures.memory_bytes_per_second,
            disk_bytes=figures.disk_bytes,
            disk_bytes_per_second=figures.disk_bytes_per_second,
            cores=figures.cores,
            threads=figures.threads,
            device=figures.device,
            created_ns=now,
            expires_ns=now + params.BENCH_CARD_LIFETIME_NS,
        )
        bench.card = self.desk.seal(card)
        self._say(bench, BenchOffer(bench.card))
        self.desk.emit("bench", stage="probe", peer=bench.challenge.challenger)

    def on_probe(self, peer: bytes, message: BenchProbe) -> None:
        """Open blocks. Only one draw is answered: more would be somebody's free reading of our disk and time."""
        bench = self._of(message.challenge, peer)
        if bench is None or not bench.card:
            return
        if bench.indices and bench.indices != message.indices:
            raise VerificationFailed("a second, other probe of one memory")
        count = bench.challenge.memory_blocks
        if not all(index < count for index in message.indices):
            raise VerificationFailed(f"a probe beyond the {count} blocks of the challenge")
        if bench.indices and isinstance(bench.say, BenchProbed):
            self._say(bench, bench.say)
        elif not bench.indices:
            bench.indices, bench.say = message.indices, None
            self.desk.add(OpenMemory(bench.id, message.indices))

    def on_opened(self, event: MemoryOpened) -> None:
        """The blocks are read: show them."""
        if (bench := self._of(event.challenge)) is not None:
            self._say(bench, BenchProbed(bench.id, event.openings))

    def on_witness(self, peer: bytes, message: BenchWitness) -> None:
        """The card with both signatures: keep it and tell the market."""
        opened = open_card(message.card, network=self.desk.network.id, now_ns=self.desk.wall_ns)
        bench = self._of(opened.challenge_id, peer)
        if bench is None or opened.card.peer != self.desk.me:
            return
        self._release()
        self.card, self.opened, self.bench = message.card, opened, None
        self.desk.save("bench", b"own", message.card)
        self.desk.add(StopBench())
        self.desk.add(Release(bench.id, keep=opened.card.evidence))
        self.publish()
        self.desk.emit("bench-card", card=opened.id, peer=peer, grade=opened.grade, speed=opened.operations_per_second)

    def on_decline(self, peer: bytes, message: BenchDecline) -> None:
        """No challenge, or no card."""
        if message.challenge == NOTHING and peer == self.asking:
            self._stop_asking(message.code, message.why)
        elif (bench := self._of(message.challenge, peer)) is not None:
            self._end(bench, message.code, message.why)

    def on_ended(self, event: BenchEnded) -> None:
        """The process is gone by itself."""
        if self.asking:
            self._stop_asking("bench-failed", event.error)
        elif self.bench is not None:
            self._decline(self.bench.challenge.challenger, self.bench.id, "bench-failed", event.error[:500])
            self._end(self.bench, "bench-failed", event.error)

    def _end(self, bench: _Bench, code: str, why: str) -> None:
        self.bench = None
        self.desk.add(StopBench())
        self.desk.add(Release(bench.id))
        self.desk.emit("bench-refused", peer=bench.challenge.challenger, code=code, why=why)

    def _release(self) -> None:
        """Let the evidence of our last card go: it was kept for whoever wants to check it."""
        if self.opened is not None:
            self.desk.add(Release(self.opened.challenge_id))

    # --- time ----------------------------------------------------------------------------------------------
    def publish(self) -> None:
        """Gossip our card; it travels beside the ask."""
        self.publish_ns = self.desk.now_ns + params.BENCH_REPEAT_NS
        self.desk.publish(MARKET, self.card)

    def tick(self) -> None:
        """Repeat what is unanswered, give up what is past its time, gossip the card again."""
        now, bench = self.desk.now_ns, self.bench
        if self.asking and now >= self.ask_until_ns:
            self._stop_asking("no-answer", "no challenge came in time")
        elif self.wish is not None and now >= self.ask_again_ns:
            self._ask()
        if bench is not None and self.desk.wall_ns >= bench.deadline_ns:
            self._end(bench, "expired", "the challenge is past its time")
        elif bench is not None and bench.say is not None and now >= bench.resend_ns:
            self._say(bench, bench.say)
        if self.opened is not None and self.desk.wall_ns >= self.opened.card.expires_ns:
            self._release()
            self.card, self.opened = b"", None
            self.desk.save("bench", b"own", None)
        if self.card and now >= self.publish_ns:
            self.publish()
        for peer in [p for p, at in self.invited_ns.items() if now >= at + params.BENCH_INVITED_REST_NS]:
            del self.invited_ns[peer]

    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """Our card from before a restart, if it still holds."""
        for key, value in rows("bench"):
            if key == b"own":
                try:
                    self.opened = open_card(value, network=self.desk.network.id, now_ns=self.desk.wall_ns)
                except IchibaError:
                    continue  # expired meanwhile
                self.card = value
