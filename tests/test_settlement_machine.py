"""Peers that hear the same settlement records in different orders hold the same money, but for the stated exceptions.

Three real Settlers, several channels, records late, doubled and out of order. Between two moments of the clock every
peer hears every record, as anti-entropy sees to; what differs is the order. After each step money is conserved and no
bucket is negative; when all have heard all, the ledgers are equal, and a restart changes nothing.
"""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from market.entries import WORLD, deposit
from market.ledger import Ledger
from peer.desk import Desk, Means
from peer.events import Post, Save
from peer.settler import Settler
from protocol.codec import blake
from protocol.errors import RemoteProtocolError
from protocol.keys import SigningKey, peer_name
from protocol.network import Deposit, Network, Rules
from protocol.records import (
    Agreement,
    Arbitration,
    Challenge,
    Claim,
    Fault,
    Proof,
    Reveal,
    Ruling,
    Settlement,
    Slash,
    StakeMove,
    Verdict,
    Voucher,
    add_signature,
    open_record,
    seal,
)
from protocol.sampling import commitment, randomness, select_segments

PEOPLE = ("submitter", "customer", "solver", "worker", "verifier", "whistleblower", "checker")
KEYS = {name: SigningKey.from_seed(name.encode().ljust(32, b"-")) for name in PEOPLE}
NOTARIES = [SigningKey.from_seed(f"notary-{n}".encode().ljust(32, b"-")) for n in range(4)]
CHECKERS = ("verifier", "whistleblower", "checker")
SECOND, FREE_MICRO, STAKE_MICRO = 10**9, 10**10, 10**9
CHANNEL_MICRO, LOCK_MICRO, SEGMENTS = 10_000_000, 3_000_000, 10
RULES = Rules(
    challenge_ms=60_000, claim_window_ms=10_000, reveal_ms=20_000, check_silence_ms=2_000, pool_permille=20,
    forced_ppm=100_000,
)  # fmt: skip
DEPOSITS = tuple(Deposit(peer_name(key.public), FREE_MICRO, STAKE_MICRO) for key in KEYS.values())
FREE_NETWORK = Network("free", RULES, DEPOSITS)
JUDGED_NETWORK = Network("judged", RULES, DEPOSITS, (), tuple(peer_name(key.public) for key in NOTARIES))


class Peer:
    """A Settler and its disk."""

    def __init__(self, network: Network) -> None:
        self.network, self.now_ns = network, 1000 * SECOND
        self.rows: dict[str, dict[bytes, bytes]] = {}
        self.posts: list[Any] = []
        self.settler = self.start()

    def start(self) -> Settler:
        ledger = Ledger()
        for number, key in enumerate(KEYS.values()):
            ledger.post(deposit(bytes([number]) * 32, key.public, FREE_MICRO, STAKE_MICRO))
        for entry in self.posts:
            ledger.post(entry)
        desk = Desk(key=NOTARIES[0], network=self.network, rng=random.Random(1), ledger=ledger, means=Means())
        desk.now_ns = self.now_ns
        settler = Settler(desk)
        settler.restore(lambda table: list(self.rows.get(table, {}).items()))
        return settler

    @property
    def ledger(self) -> Ledger:
        return self.settler.desk.ledger

    def give(self, envelope: bytes) -> None:
        """Hear a record: from gossip, or once more. One that is refused is a move of the game too."""
        record, _, _ = open_record(envelope, network=self.network.id)
        with suppress(RemoteProtocolError):
            if isinstance(record, Verdict):
                self.settler.freeze(record)
            else:
                self.settler.accept(envelope)
        self.commit()

    def wait(self, seconds: int) -> None:
        self.now_ns += seconds * SECOND
        self.settler.desk.now_ns = self.now_ns
        self.settler.tick()
        self.commit()

    def commit(self) -> None:
        for effect in self.settler.desk.effects:
            if isinstance(effect, Save):
                assert effect.value is not None
                self.rows.setdefault(effect.table, {})[effect.key] = effect.value
            elif isinstance(effect, Post):
                self.posts.append(effect.entry)
        self.settler.desk.effects.clear()


class Deal:
    """The records that can be made of one agreement."""

    def __init__(self, network: Network, number: int, submitter: str, solver: str, *, channel: int = CHANNEL_MICRO):
        self.network, self.submitter, self.solver = network, KEYS[submitter], KEYS[solver]
        self.seeds = {key.public: blake("seed", bytes([number]), key.public) for key in (self.submitter, self.solver)}
        committed = {peer: commitment(seed, agreement_salt=peer) for peer, seed in self.seeds.items()}
        self.terms = Agreement(
            network=network.id, offer=bytes(32), bid=bytes(32), task=bytes(32), sequence=number + 1,
            submitter=self.submitter.public, solver=self.solver.public, first_segment=0, last_segment=SEGMENTS,
            base_root=bytes(32), operations=5 * 10**9, unit_price=1_000_000, channel_micro=channel,
            lock_micro=LOCK_MICRO, check_permille=200, submitter_commitment=committed[self.submitter.public],
            solver_commitment=committed[self.solver.public], forced_commitment=bytes(32), accept_before_ns=1,
            segment_deadline_ns=1, created_ns=1,
        )  # fmt: skip
        self.opening = seal(self.terms, self.submitter)
        for key in (self.solver, *(NOTARIES if network.notaries else ())):
            self.opening = add_signature(self.opening, key, network=network.id)
        self.id = open_record(self.opening, network=network.id)[1]
        proof = Proof(
            network=network.id, agreement=self.id, author=self.solver.public, receipts=SEGMENTS, root=blake("root"),
            last_receipt=bytes(32), program=bytes(32),
        )  # fmt: skip
        self.proof = seal(proof, self.solver)
        self.proof_id = open_record(self.proof, network=network.id)[1]

    def settlement(self, paid_micro: int, fee_micro: int = 0, after: tuple[bytes, ...] = ()) -> bytes:
        fees = ((KEYS["verifier"].public, fee_micro),) if fee_micro else ()
        record = Settlement(
            network=self.network.id, agreement=self.id, submitter=self.submitter.public, solver=self.solver.public,
            paid_micro=paid_micro, fees=fees, proof=self.proof_id, after=after,
        )  # fmt: skip
        return add_signature(seal(record, self.submitter), self.solver, network=self.network.id)

    def claim(self, cumulative_micro: int, *, by_solver: bool, fee_micro: int = 0) -> bytes:
        voucher = Voucher(
            network=self.network.id, agreement=self.id, epoch=0, sequence=1, cumulative_micro=cumulative_micro,
            cumulative_operations=1, receipt=bytes(32), submitter=self.submitter.public,
        )  # fmt: skip
        author = self.solver if by_solver else self.submitter
        record = Claim(
            network=self.network.id, agreement=self.id, author=author.public,
            voucher=seal(voucher, self.submitter) if cumulative_micro else b"",
            fees=((KEYS["checker"].public, fee_micro),) if fee_micro and not by_solver else (),
        )  # fmt: skip
        return seal(record, author)

    def verdict(self, checker: str, segment: int, finding: str = "wrong") -> bytes:
        wrong = finding == "wrong"
        record = Verdict(
            network=self.network.id, agreement=self.id, proof=self.proof_id, checker=KEYS[checker].public,
            role="verifier", segments=(segment,), finding=finding, wrong_segment=segment if wrong else 0,  # type: ignore[arg-type]
            claimed_root=blake("claimed") if wrong else bytes(32), found_root=blake("found") if wrong else bytes(32),
            operations=10**8, done_ns=1,
        )  # fmt: skip
        return seal(record, KEYS[checker])

    def slash(self, checkers: tuple[str, ...] = ("verifier", "whistleblower")) -> bytes:
        seeds = {"submitter_seed": self.seeds[self.submitter.public], "solver_seed": self.seeds[self.solver.public]}
        drawn = select_segments(
            randomness(proof=self.proof_id, **seeds), first=0, last=SEGMENTS, permille=200,
            minimum=RULES.check_segments_min,
        )  # fmt: skip
        reveals = tuple(
            seal(
                Reveal(
                    network=self.network.id, agreement=self.id, proof=self.proof_id, author=key.public,
                    seed=self.seeds[key.public],
                ),
                key,
            )
            for key in (self.submitter, self.solver)
        )  # fmt: skip
        record = Slash(
            network=self.network.id, agreement=self.id, author=KEYS["checker"].public, proof=self.proof,
            reveals=reveals, verdicts=tuple(self.verdict(name, drawn[0]) for name in checkers),
        )  # fmt: skip
        return seal(record, KEYS["checker"])

    def challenge(self, by: str, segment: int) -> tuple[bytes, bytes]:
        record = Challenge(
            network=self.network.id, challenger=KEYS[by].public, agreement=self.id, proof=self.proof_id,
            segment=segment, claimed_root=blake("claimed"), found_root=blake("found"), operations=5 * 10**8,
            created_ns=1,
        )  # fmt: skip
        envelope = seal(record, KEYS[by])
        return envelope, open_record(envelope, network=self.network.id)[1]

    def arbitration(self, finding: str, by: str, segment: int, quorum: tuple[int, ...] = (0, 1, 2)) -> bytes:
        challenge, dispute = self.challenge(by, segment)
        rulings = tuple(
            seal(
                Ruling(
                    network=self.network.id, notary=NOTARIES[n].public, dispute=dispute, agreement=self.id,
                    segment=segment, finding=finding, level="block",  # type: ignore[arg-type]
                    cause="forced" if finding == "forced" else "leaf", operations=10**6, transcript=bytes(32),
                ),
                NOTARIES[n],
            )
            for n in quorum
        )  # fmt: skip
        record = Arbitration(
            network=self.network.id, agreement=self.id, author=KEYS["checker"].public, challenge=challenge,
            rulings=rulings,
        )  # fmt: skip
        return seal(record, KEYS["checker"])

    def fault(self, checker: str, segment: int) -> bytes:
        verdict = self.verdict(checker, segment, "right")
        return seal(
            Fault(network=self.network.id, agreement=self.id, author=KEYS["checker"].public, verdict=verdict),
            KEYS["checker"],
        )


def moved(network: Network, owner: str, kind: str, micro: int, *, sequence: int = 1, lost: int = 0) -> bytes:
    """A move of stake with every signature that it takes."""
    record = StakeMove(
        network=network.id, owner=KEYS[owner].public, sequence=sequence, kind=kind, amount_micro=micro,  # type: ignore[arg-type]
        created_ns=1, lost_micro=lost,
    )  # fmt: skip
    envelope = seal(record, KEYS[owner])
    for key in NOTARIES if network.notaries else ():
        envelope = add_signature(envelope, key, network=network.id)
    return envelope


CLAIMS = st.lists(
    st.tuples(st.sampled_from((4_000_001, 0, 1, CHANNEL_MICRO)), st.booleans(), st.sampled_from((50_000, 100_000, 0))),
    max_size=3,
)


def ends_of(peer: Peer) -> dict[bytes, tuple[str, bool, int]]:
    """What a peer says of each channel."""
    return {i: (c.closed, c.locked, c.paid_micro) for i, c in peer.settler.channels.items()}


class Swarm(RuleBasedStateMachine):
    """What both kinds of network share. A deal has one kind of ending, for two that conflict are an exception."""

    network = FREE_NETWORK

    @initialize(seed=st.integers(0, 2**32))
    def opened(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.peers = [Peer(self.network) for _ in range(3)]
        self.deals: list[Deal] = []
        self.endings: set[bytes] = set()
        self.records: list[bytes] = []
        self.moves = 0

    @rule(
        submitter=st.sampled_from(("submitter", "customer")), solver=st.sampled_from(("solver", "worker")),
        how=st.sampled_from(("claimed", "settled", "found", "open")), claims=CLAIMS,
        paid=st.integers(0, CHANNEL_MICRO - 1_000_000), quorum=st.booleans(), segment=st.integers(0, 9),
    )  # fmt: skip
    def deal(
        self, submitter: str, solver: str, how: str, claims: list[tuple[int, bool, int]], paid: int, quorum: bool,
        segment: int,
    ) -> None:  # fmt: skip
        """All records of a deal that ends in this way: claims may stand beside any ending."""
        if len(self.deals) == 8:
            return
        deal = Deal(self.network, len(self.deals), submitter, solver)
        self.deals.append(deal)
        self.records.append(deal.opening)
        if how == "open":
            return
        self.endings.add(deal.id)
        for cumulative, by_solver, fee in claims:
            self.records.append(deal.claim(cumulative, by_solver=by_solver, fee_micro=fee))
        if how == "settled":
            self.records.append(deal.settlement(paid, fee_micro=paid % 2 * 700_001))
        elif how == "found":
            self.records += self.findings(deal, segment, quorum)
        else:
            self.records.append(deal.claim(0, by_solver=quorum))  # at least one

    def findings(self, deal: Deal, segment: int, quorum: bool) -> list[bytes]:
        """Who says in this network that the work is wrong."""
        raise NotImplementedError

    @precondition(lambda self: self.records)
    @rule(peer=st.integers(0, 2), which=st.integers(0, 200))
    def hear(self, peer: int, which: int) -> None:
        """Any record, at any one peer: early, late or once more."""
        self.peers[peer].give(self.records[which % len(self.records)])

    @rule(
        owner=st.sampled_from(("solver", "worker", *CHECKERS)), out=st.booleans(),
        micro=st.sampled_from((10**6, STAKE_MICRO // 4, 2 * STAKE_MICRO)),
    )  # fmt: skip
    def move_stake(self, owner: str, micro: int, out: bool) -> None:
        """Into the stake and out of it, by what the owner's own peer, the first, knows then; heard in any order with
        all else. A solver keeps what its locks take; who takes out all adds nothing, for a stake that is too short for
        what penalties take is an exception."""
        kept, stakes, key = self.kept_of(owner), self.peers[0].settler.stakes, KEYS[owner].public
        if out:
            micro = min(micro, stakes.free_micro(key) - kept)
        if self.moves == 12 or micro < 10**6 or (not out and not kept):
            return
        self.moves += 1
        kind, lost = ("withdraw", stakes.lost[key]) if out else ("add", 0)
        self.records.append(moved(self.network, owner, kind, micro, sequence=100 + self.moves, lost=lost))
        self.peers[0].give(self.records[-1])

    def kept_of(self, owner: str) -> int:
        """What a withdrawal leaves of a stake."""
        return 20 * LOCK_MICRO

    @rule(seconds=st.sampled_from((1, 11, 61, 400, 25_000)))
    def wait(self, seconds: int) -> None:
        self.gossip()
        for peer in self.peers:
            peer.wait(seconds)
        self.agree_on_money()

    @rule(peer=st.integers(0, 2))
    def restart(self, peer: int) -> None:
        one = self.peers[peer]
        before = one.ledger.balances()
        one.settler = one.start()
        one.commit()
        assert one.ledger.balances() == before

    def gossip(self) -> None:
        """Everybody hears everything, each in an order of its own, some of it twice."""
        for peer in self.peers:
            mine = self.records + self.rng.sample(self.records, len(self.records) // 3)
            self.rng.shuffle(mine)
            for envelope in mine:
                peer.give(envelope)
            for envelope in self.records:  # a frozen claim needs its channel first, and verdicts do not wait
                peer.give(envelope)

    def agree_on_money(self) -> None:
        first, *others = self.peers
        for other in others:
            assert other.ledger.balances() == first.ledger.balances()
            assert ends_of(other) == ends_of(first)
        assert all(deal.id in first.settler.channels for deal in self.deals)

    @invariant()
    def no_credit_appears_or_vanishes(self) -> None:
        for peer in getattr(self, "peers", ()):
            peer.ledger.check()
            assert peer.ledger.total_micro() == len(KEYS) * (FREE_MICRO + STAKE_MICRO)
            assert all(micro > 0 for account, micro in peer.ledger.balances().items() if account != WORLD)

    def teardown(self) -> None:
        if hasattr(self, "peers"):
            self.wait(1)
            self.wait(10_000)
            self.wait(25_000)
            for peer in self.peers:
                buckets = peer.ledger.balances()
                assert not [account for account in buckets if account.bucket.startswith("unbonding:")]
                locks = [account for account in buckets if account.bucket.startswith(("channel:", "lock:"))]
                assert {a.bucket[-64:] for a in locks} <= {d.id.hex() for d in self.deals if d.id not in self.endings}


class FreeSwarm(Swarm):
    """Without notaries: a quorum of checkers slashes, and one wrong verdict freezes a claim."""

    def findings(self, deal: Deal, segment: int, quorum: bool) -> list[bytes]:
        return [deal.slash(CHECKERS if quorum else CHECKERS[:2])]

    @precondition(lambda self: self.deals)
    @rule(which=st.integers(0, 7), checker=st.sampled_from(CHECKERS))
    def freeze(self, which: int, checker: str) -> None:
        self.records.append(self.deals[which % len(self.deals)].verdict(checker, 3))


class JudgedSwarm(Swarm):
    """With notaries: challenges are judged, checkers that signed wrongly lose, locks stay for a window."""

    network = JUDGED_NETWORK

    def kept_of(self, owner: str) -> int:
        return 0 if owner in CHECKERS else super().kept_of(owner)

    def findings(self, deal: Deal, segment: int, quorum: bool) -> list[bytes]:
        quorums = ((0, 1, 2), (1, 2, 3) if quorum else (0, 1, 2, 3))
        return [deal.arbitration("wrong", "whistleblower", segment, one) for one in quorums]

    @precondition(lambda self: self.deals)
    @rule(which=st.integers(0, 7), segment=st.integers(0, 2), by=st.sampled_from(CHECKERS))
    def acquit(self, which: int, segment: int, by: str) -> None:
        self.records.append(self.deals[which % len(self.deals)].arbitration("right", by, segment))

    @precondition(lambda self: self.deals)
    @rule(which=st.integers(0, 7), segment=st.integers(0, 9), checker=st.sampled_from(CHECKERS))
    def fault(self, which: int, segment: int, checker: str) -> None:
        self.records.append(self.deals[which % len(self.deals)].fault(checker, segment))


SETTINGS = settings(max_examples=50, stateful_step_count=30, deadline=None, derandomize=True)
TestFreeSwarm, TestJudgedSwarm = FreeSwarm.TestCase, JudgedSwarm.TestCase
TestFreeSwarm.settings = TestJudgedSwarm.settings = SETTINGS
