"""The other side of a bench card: challenge, time, check, probe, sign; and what the cards heard are worth.

A challenge is open from its sending until its window closes, and is used once: an answer to any other is declined.
Time is counted here, on this peer's clock, from the first sending to the first answer, so what the network takes
counts against the prover. Peers that look alike are challenged at the same moment, as soon as all are ready: one
machine behind two names then shares its time between them, and one that does not come forward is believed no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from market.matching import Proven
from peer.desk import Desk
from peer.events import CheckWork, Release, WorkChecked
from peer.messages import (
    BenchAsk,
    BenchDecline,
    BenchDone,
    BenchInvite,
    BenchOffer,
    BenchProbe,
    BenchProbed,
    BenchStart,
    BenchTimed,
    BenchWitness,
)
from protocol import params
from protocol.bench_card import (
    Figures,
    OpenCard,
    chain_operations,
    chain_size,
    check_opening,
    open_card,
    open_challenge,
    open_unwitnessed,
)
from protocol.errors import IchibaError, LocalProtocolError, RemoteProtocolError, VerificationFailed
from protocol.keys import short
from protocol.records import BenchCard, BenchChallenge, add_signature

__all__ = ["Challenger"]


@dataclass
class _Challenge:
    """One that is open, and how far its answer has come."""

    id: bytes
    challenge: BenchChallenge
    device: tuple[str, int, int]  # what its peer said it is
    absent: list[bytes]  # look-alikes that did not come forward: their cards are void if this peer proves itself
    envelope: bytes
    issued_ns: int
    resend_ns: int
    elapsed_ns: int = 0
    evidence: bytes = b""
    checked: bool = False
    card: bytes = b""
    indices: tuple[int, ...] = ()
    probed: bool = False
    deadline_ns: int = 0  # of what comes next


@dataclass
class Challenger:
    """See the module docstring."""

    desk: Desk
    on_proven: Callable[[OpenCard], None] = lambda _: None
    waiting: dict[bytes, tuple[BenchAsk, int]] = field(default_factory=dict)  # peer -> its ask, and since when
    met: dict[frozenset[bytes], int] = field(default_factory=dict)  # look-alikes challenged together -> until when
    open: dict[bytes, _Challenge] = field(default_factory=dict)  # challenge id -> it
    rest: dict[bytes, int] = field(default_factory=dict)  # peer -> when it may be challenged again
    proven: dict[bytes, OpenCard] = field(default_factory=dict)  # peer -> the card we timed and checked ourselves
    heard: dict[bytes, OpenCard] = field(default_factory=dict)  # peer -> the newest card it gossips
    witnessed: dict[bytes, bytes] = field(default_factory=dict)  # challenge id -> the signed card, for a repetition

    # --- what cards are worth ------------------------------------------------------------------------------
    def speed_of(self, peer: bytes) -> Proven:
        """What matching may believe of a peer's speed."""
        if (own := self.proven.get(peer)) is not None:
            return Proven("witnessed", own.operations_per_second)
        if (heard := self.heard.get(peer)) is not None:
            return Proven("self-timed", heard.operations_per_second)  # another's clock is as good as its own
        return Proven("none", 0)

    def on_card(self, envelope: bytes) -> None:
        """A gossiped card. Kept if it is its peer's newest. Raises RemoteProtocolError."""
        opened = open_card(envelope, network=self.desk.network.id, now_ns=self.desk.wall_ns)
        peer = opened.card.peer
        old = self.heard.pop(peer, None)
        self.heard[peer] = opened if old is None or opened.card.created_ns > old.card.created_ns else old
        while len(self.heard) > params.BENCH_CARDS_MAX:
            del self.heard[next(iter(self.heard))]

    def lookalikes(self, peer: bytes, figures: Figures) -> list[bytes]:
        """Connected peers with a card of ours for the same device as `figures` describe, that may be `peer`'s machine.

        Without those that were challenged together with it while such a card lives: once tells, and more would let
        anybody who copies a description keep its victim at benches.
        """
        return [
            other
            for other, opened in sorted(self.proven.items())
            if other != peer
            and other in self.desk.peers
            and frozenset((peer, other)) not in self.met
            and _device(opened.card) == _device(figures)
        ]

    # --- challenging ---------------------------------------------------------------------------------------
    def on_ask(self, peer: bytes, message: BenchAsk) -> None:
        """A peer is ready for a challenge: it gets one, together with those that look like it."""
        if any(c.challenge.peer == peer for c in self.open.values()) or peer in self.waiting:
            return  # it is on its way, and repeated by itself
        called = any(peer in self.lookalikes(other, wish.figures) for other, (wish, _) in self.waiting.items())
        rests = self.desk.now_ns < self.rest.get(peer, 0) and not called
        if rests or len(self.open) + len(self.waiting) >= params.BENCH_OPEN_MAX:
            self.desk.send(peer, BenchDecline(bytes(32), "busy", "challenged a moment ago, or too many are open here"))
            return
        self.waiting[peer] = (message, self.desk.now_ns)
        for other in self.lookalikes(peer, message.figures):
            if other not in self.waiting:
                self.desk.send(other, BenchInvite())
        self._issue_ready()

    def invite(self, peer: bytes) -> None:
        """Our own wish to know: have a connected peer ask us. Raises LocalProtocolError."""
        if peer not in self.desk.peers:
            raise LocalProtocolError(f"{short(peer)} is not connected", next_step="see `ichiba status`")
        self.desk.send(peer, BenchInvite())

    def _issue_ready(self) -> None:
        """Challenge every waiting peer whose look-alikes wait too, all of them now, or have let us wait long enough."""
        for peer, (wish, since_ns) in list(self.waiting.items()):
            if peer not in self.waiting:
                continue  # gone with its group
            group = self.lookalikes(peer, wish.figures)
            absent = [p for p in group if p not in self.waiting]
            if absent and self.desk.now_ns < since_ns + params.BENCH_GATHER_NS:
                continue
            for other in group:
                self.met[frozenset((peer, other))] = self.desk.now_ns + params.BENCH_CARD_LIFETIME_NS
            for one in sorted({peer, *group} & self.waiting.keys()):
                self._issue(one, self.waiting.pop(one)[0], absent=absent if one == peer else [])

    def _issue(self, peer: bytes, wish: BenchAsk, *, absent: list[bytes]) -> None:
        now = self.desk.now_ns
        before = self.proven[peer].operations_per_second if peer in self.proven else 0
        speed = min(wish.operations_per_second, max(params.BENCH_FIRST_SPEED_MAX, 4 * before))
        side, links = chain_size(speed)
        blocks = min(wish.memory_bytes // params.BENCH_MEMORY_BLOCK_BYTES, params.BENCH_MEMORY_BLOCKS_MAX)
        expected_ns = chain_operations(side, links) * 10**9 // speed
        window_ns = min(
            params.BENCH_WINDOW_FACTOR * expected_ns + params.BENCH_WINDOW_SLACK_NS, params.BENCH_WINDOW_NS_MAX
        )
        challenge = BenchChallenge(
            network=self.desk.network.id,
            challenger=self.desk.me,
            peer=peer,
            nonce=self.desk.rng.randbytes(32),
            side=side,  # type: ignore[arg-type]  # one of the five
            links=links,
            memory_blocks=blocks,
            window_ns=window_ns,
            created_ns=self.desk.wall_ns,
            expires_ns=self.desk.wall_ns + window_ns + self._fill_ns(blocks) + 2 * params.BENCH_PROBE_NS,
        )
        envelope = self.desk.seal(challenge)
        challenge_id = open_challenge(envelope, network=self.desk.network.id)[1]
        self.open[challenge_id] = _Challenge(
            id=challenge_id,
            challenge=challenge,
            device=_device(wish.figures),
            absent=absent,
            envelope=envelope,
            issued_ns=now,
            resend_ns=now + params.RESEND_NS,
            deadline_ns=now + window_ns,
        )
        self.rest[peer] = now + params.BENCH_REST_NS
        self.desk.send(peer, BenchStart(envelope))
        self.desk.emit("challenge", peer=peer, side=side, links=links, memory_blocks=blocks, window_ns=window_ns)

    @staticmethod
    def _fill_ns(blocks: int) -> int:
        size = blocks * params.BENCH_MEMORY_BLOCK_BYTES
        return size * 10**9 // params.BENCH_FILL_BYTES_PER_SECOND_MIN + params.BENCH_WINDOW_SLACK_NS

    def _of(self, challenge_id: bytes, peer: bytes) -> _Challenge | None:
        """The open challenge of this peer; anything else is told that there is none."""
        found = self.open.get(challenge_id)
        if found is not None and found.challenge.peer == peer:
            return found
        if challenge_id not in self.witnessed:
            why = "no such challenge is open here: it was used, it lapsed, or it is another peer's"
            self.desk.send(peer, BenchDecline(challenge_id, "unknown-challenge", why))
        return None

    # --- answers -------------------------------------------------------------------------------------------
    def on_done(self, peer: bytes, message: BenchDone) -> None:
        """The chain's result exists: stop the clock, fetch and check it. Raises VerificationFailed for two results."""
        one = self._of(message.challenge, peer)
        if one is None:
            return
        if one.evidence and one.evidence != message.evidence:
            self._refuse(one, VerificationFailed("a second, other answer to one challenge"))
            return
        if not one.evidence:
            elapsed_ns = max(1, self.desk.now_ns - one.issued_ns)
            if elapsed_ns > one.challenge.window_ns:
                self._late(one)
                return
            one.elapsed_ns, one.evidence = elapsed_ns, message.evidence
            one.deadline_ns = self.desk.now_ns + self._fill_ns(one.challenge.memory_blocks)
            self.desk.add(CheckWork(one.id, one.challenge, one.evidence))
        self.desk.send(peer, BenchTimed(one.id, one.elapsed_ns))

    def on_offer(self, peer: bytes, message: BenchOffer) -> None:
        """The card: it must say what we saw. Then probe its memory."""
        opened = open_unwitnessed(message.card, network=self.desk.network.id, now_ns=self.desk.wall_ns)
        one = self._of(opened.challenge_id, peer)
        if one is None:
            if opened.challenge_id in self.witnessed and opened.card.peer == peer:
                self.desk.send(peer, BenchWitness(self.witnessed[opened.challenge_id]))
            return
        card = opened.card
        if (card.evidence, card.elapsed_ns, _device(card)) != (one.evidence, one.elapsed_ns, one.device):
            self._refuse(one, VerificationFailed("the card names another result, time or device than was seen"))
            return
        if one.card not in (b"", message.card):
            self._refuse(one, VerificationFailed("a second, other card for one challenge"))
            return
        if not one.card:
            one.card = message.card
            count = one.challenge.memory_blocks
            if count:
                draws = min(count, params.BENCH_PROBES)
                one.indices = tuple(self.desk.rng.sample(range(count), draws))
                one.deadline_ns = self.desk.now_ns + params.BENCH_PROBE_NS
            else:
                one.probed = True
                one.deadline_ns = self.desk.now_ns + self._fill_ns(0)
        if one.indices and not one.probed:
            self.desk.send(peer, BenchProbe(one.id, one.indices))
        self._sign(one)

    def on_probed(self, peer: bytes, message: BenchProbed) -> None:
        """The opened blocks: in time, under the card's root, and made as they must be."""
        one = self._of(message.challenge, peer)
        if one is None or not one.card or one.probed:
            self._repeat(message.challenge, peer)
            return
        opened = open_unwitnessed(one.card, network=self.desk.network.id, now_ns=self.desk.wall_ns)
        try:
            if len(message.openings) != len(one.indices):
                raise VerificationFailed(f"{len(message.openings)} blocks opened, {len(one.indices)} were probed")
            for index, opening in zip(one.indices, message.openings, strict=True):
                check_opening(
                    opening,
                    index=index,
                    root=opened.card.memory_root,
                    count=one.challenge.memory_blocks,
                    challenge_id=one.id,
                )
        except VerificationFailed as error:
            self._refuse(one, error)
            return
        one.probed = True
        one.deadline_ns = self.desk.now_ns + self._fill_ns(0)
        self._sign(one)

    def _repeat(self, challenge_id: bytes, peer: bytes) -> None:
        """Our signature was lost on its way."""
        card = self.witnessed.get(challenge_id)
        if card is not None and peer in self.proven and self.proven[peer].challenge_id == challenge_id:
            self.desk.send(peer, BenchWitness(card))

    def on_checked(self, event: WorkChecked) -> None:
        """The evidence is fetched and checked, or not."""
        one = self.open.get(event.challenge)
        self.desk.add(Release(event.challenge))
        if one is None:
            return
        if not event.error:
            one.checked = True
            self._sign(one)
        elif event.forged:
            self._refuse(one, VerificationFailed(event.error[:300]))
        else:
            self._drop(one, "no-evidence", event.error[:300])

    def _sign(self, one: _Challenge) -> None:
        """Both halves are right: put our name under the card."""
        if not (one.checked and one.probed and one.card):
            return
        envelope = add_signature(one.card, self.desk.key, network=self.desk.network.id)
        opened = open_card(envelope, network=self.desk.network.id, now_ns=self.desk.wall_ns)
        peer = one.challenge.peer
        del self.open[one.id]
        self.proven[peer] = opened
        self.witnessed[one.id] = envelope
        while len(self.witnessed) > params.BENCH_OPEN_MAX:
            del self.witnessed[next(iter(self.witnessed))]
        self.desk.save("proven", peer, envelope)
        self.desk.send(peer, BenchWitness(envelope))
        for other in one.absent:
            self._forget(other, "absent", "a peer that looks like it was challenged, and it did not come forward")
        self.on_proven(opened)
        self.desk.emit("proven", peer=peer, card=opened.id, speed=opened.operations_per_second)

    # --- refusing ------------------------------------------------------------------------------------------
    def _late(self, one: _Challenge) -> None:
        took, window = ((ns / 1e9) for ns in (self.desk.now_ns - one.issued_ns, one.challenge.window_ns))
        self._drop(one, "late", f"no answer {took:.1f} s after the challenge; its window is {window:.1f} s")

    def _refuse(self, one: _Challenge, error: RemoteProtocolError) -> None:
        """A lie: drop the challenge and what was believed of its peer, and tell its sender once."""
        self._drop(one, error.code, error.what)
        self.desk.penalise(one.challenge.peer, f"bench: {error.what}"[:200])

    def _drop(self, one: _Challenge, code: str, why: str) -> None:
        """No card; an older one of ours is void too, or a look-alike would just not answer."""
        peer = one.challenge.peer
        del self.open[one.id]
        self.desk.send(peer, BenchDecline(one.id, code, why[:500]))
        self._forget(peer, code, why)

    def _forget(self, peer: bytes, code: str, why: str) -> None:
        if self.proven.pop(peer, None) is not None:
            self.desk.save("proven", peer, None)
        self.desk.emit("unproven", peer=peer, code=code, why=why)

    def on_decline(self, peer: bytes, message: BenchDecline) -> None:
        """The peer does not take the challenge."""
        one = self.open.get(message.challenge)
        if one is not None and one.challenge.peer == peer:
            self._drop(one, message.code, message.why)

    def tick(self) -> None:
        """Repeat challenges that nobody took up yet, close windows, forget cards past their time."""
        now = self.desk.now_ns
        for peer in [p for p in self.waiting if p not in self.desk.peers]:
            del self.waiting[peer]
        self._issue_ready()
        for one in list(self.open.values()):
            if now > one.deadline_ns:
                if not one.evidence:
                    self._late(one)
                elif one.card and not one.probed:
                    self._drop(one, "probe-late", "the memory was not opened in time: it may not be there")
                else:
                    self._drop(one, "late", "the memory was not filled, or the evidence not fetched, in time")
            elif not one.evidence and now >= one.resend_ns:
                one.resend_ns = now + params.RESEND_NS
                self.desk.send(one.challenge.peer, BenchStart(one.envelope))
        for table in (self.heard, self.proven):
            for peer in [p for p, opened in table.items() if opened.card.expires_ns <= self.desk.wall_ns]:
                del table[peer]
                if table is self.proven:
                    self.desk.save("proven", peer, None)
        for peer in [p for p, until in self.rest.items() if until <= now]:
            del self.rest[peer]
        for pair in [p for p, until in self.met.items() if until <= now]:
            del self.met[pair]

    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """The cards this peer signed before a restart, if they still hold."""
        for peer, envelope in rows("proven"):
            try:
                self.proven[peer] = open_card(envelope, network=self.desk.network.id, now_ns=self.desk.wall_ns)
            except IchibaError:
                continue  # expired meanwhile


def _device(told: BenchCard | Figures) -> tuple[str, int, int]:
    """What two names of one machine can hardly say differently of it, and be believed."""
    return told.device, told.cores, told.memory_bytes
