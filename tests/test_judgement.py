"""What notaries find moves money: by a quorum, once, in time, and the same after a restart."""

from __future__ import annotations

import random
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from market.entries import BURNED, POOL, Account, deposit
from market.ledger import Ledger
from market.reputation import ROLES
from peer.desk import Desk, Means
from peer.events import Post, Save
from peer.settler import Settler
from protocol.codec import blake
from protocol.errors import RemoteProtocolError, VerificationFailed
from protocol.keys import SigningKey, peer_name
from protocol.network import Deposit, Network, Rules
from protocol.outcomes import LOCK, STAKE, jackpot_micro
from protocol.records import (
    Agreement,
    Arbitration,
    Challenge,
    Claim,
    Fault,
    Ruling,
    Settlement,
    Slash,
    Verdict,
    Voucher,
    add_signature,
    open_record,
    seal,
)

PEOPLE = ("submitter", "solver", "verifier", "whistleblower", "stranger")
KEYS = {name: SigningKey.from_seed(name.encode().ljust(32, b".")) for name in PEOPLE}
NOTARIES = [SigningKey.from_seed(f"notary-{n}".encode().ljust(32, b".")) for n in range(4)]
STAKE_MICRO, CHANNEL_MICRO, LOCK_MICRO, SECOND = 50_000_000, 10_000_000, 20_000_000, 10**9
RULES = Rules(challenge_ms=60_000, claim_window_ms=10_000, pool_permille=20, forced_ppm=100_000)
NETWORK = Network(
    "judged",
    RULES,
    tuple(Deposit(peer_name(key.public), 10**8, STAKE_MICRO) for key in KEYS.values()),
    (),
    tuple(peer_name(key.public) for key in NOTARIES),
)
PROOF = blake("proof")
TERMS = Agreement(
    network=NETWORK.id, offer=bytes(32), bid=bytes(32), task=bytes(32), sequence=1, first_segment=0, last_segment=10,
    submitter=KEYS["submitter"].public, solver=KEYS["solver"].public, base_root=bytes(32), operations=5 * 10**9,
    unit_price=1_000_000, channel_micro=CHANNEL_MICRO, lock_micro=LOCK_MICRO, check_permille=200,
    submitter_commitment=bytes(32), solver_commitment=bytes(32), forced_commitment=bytes(32), accept_before_ns=1,
    segment_deadline_ns=1, created_ns=1,
)  # fmt: skip


def certified(terms: Agreement) -> bytes:
    """An agreement with every signature that it can have."""
    envelope = seal(terms, KEYS["submitter"])
    for key in (KEYS["solver"], *NOTARIES):
        envelope = add_signature(envelope, key, network=NETWORK.id)
    return envelope


AGREEMENT = certified(TERMS)
ID = open_record(AGREEMENT, network=NETWORK.id)[1]
DEPOSITED = len(KEYS) * (10**8 + STAKE_MICRO)


class Disk:
    """What a peer keeps: rows and entries; `start` is the process that reads them."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[bytes, bytes]] = {}
        self.posts: list[Any] = []
        self.now_ns = 1000 * SECOND
        self.settler = self.start()

    def start(self) -> Settler:
        ledger = Ledger()
        for number, key in enumerate(KEYS.values()):
            ledger.post(deposit(bytes([number]) * 32, key.public, 10**8, STAKE_MICRO))
        for entry in self.posts:
            ledger.post(entry)
        desk = Desk(key=KEYS["stranger"], network=NETWORK, rng=random.Random(1), ledger=ledger, means=Means())
        desk.now_ns = self.now_ns
        settler = Settler(desk)
        settler.restore(lambda table: list(self.rows.get(table, {}).items()))
        return settler

    def commit(self) -> None:
        for effect in self.settler.desk.effects:
            if isinstance(effect, Save):
                table = self.rows.setdefault(effect.table, {})
                if effect.value is None:
                    table.pop(effect.key, None)
                else:
                    table[effect.key] = effect.value
            elif isinstance(effect, Post):
                self.posts.append(effect.entry)
        self.settler.desk.effects.clear()

    def give(self, envelope: bytes) -> None:
        try:
            self.settler.accept(envelope)
        finally:
            self.commit()

    def wait(self, seconds: float) -> None:
        self.now_ns += int(seconds * SECOND)
        self.settler.desk.now_ns = self.now_ns
        self.settler.tick()
        self.commit()

    def stake(self, name: str) -> int:
        return self.settler.desk.ledger.balance_micro(Account(KEYS[name].public, "stake"))

    def free(self, name: str) -> int:
        return self.settler.desk.ledger.balance_micro(Account(KEYS[name].public, "free")) - 10**8

    def pot(self, account: Account) -> int:
        return self.settler.desk.ledger.balance_micro(account)


def challenge(by: str = "whistleblower", segment: int = 3) -> bytes:
    record = Challenge(
        network=NETWORK.id, challenger=KEYS[by].public, agreement=ID, proof=PROOF, segment=segment,
        claimed_root=blake("claimed"), found_root=blake("found"), operations=5 * 10**8, created_ns=1,
    )  # fmt: skip
    return seal(record, KEYS[by])


def ruling(finding: str, envelope: bytes, notary: SigningKey, segment: int = 3, cause: str = "") -> bytes:
    cause = cause or ("forced" if finding == "forced" else "leaf")
    record = Ruling(
        network=NETWORK.id, notary=notary.public, dispute=open_record(envelope, network=NETWORK.id)[1], agreement=ID,
        segment=segment, finding=finding, level="block", cause=cause, operations=10**6, transcript=bytes(32),
    )  # type: ignore[arg-type]  # fmt: skip
    return seal(record, notary)


def arbitration(
    finding: str,
    by: str = "whistleblower",
    segment: int = 3,
    notaries: Iterable[int] = (0, 1, 2),
    cause: str = "",
) -> bytes:
    envelope = challenge(by, segment)
    rulings = tuple(ruling(finding, envelope, NOTARIES[n], segment, cause) for n in notaries)
    record = Arbitration(
        network=NETWORK.id, agreement=ID, author=KEYS["stranger"].public, challenge=envelope, rulings=rulings
    )
    return seal(record, KEYS["stranger"])


def settlement(paid_micro: int = 5_000_000, after: tuple[bytes, ...] = ()) -> bytes:
    record = Settlement(
        network=NETWORK.id, agreement=ID, submitter=TERMS.submitter, solver=TERMS.solver, paid_micro=paid_micro,
        fees=((KEYS["verifier"].public, 1_000_000),), proof=PROOF, after=after,
    )  # fmt: skip
    return add_signature(seal(record, KEYS["submitter"]), KEYS["solver"], network=NETWORK.id)


def fault(by: str = "verifier", segments: tuple[int, ...] = (3, 7)) -> bytes:
    verdict = Verdict(
        network=NETWORK.id, agreement=ID, proof=PROOF, checker=KEYS[by].public, role="verifier", segments=segments,
        finding="right", wrong_segment=0, claimed_root=bytes(32), found_root=bytes(32), operations=1, done_ns=1,
    )  # fmt: skip
    record = Fault(network=NETWORK.id, agreement=ID, author=KEYS["stranger"].public, verdict=seal(verdict, KEYS[by]))
    return seal(record, KEYS["stranger"])


@pytest.fixture
def disk() -> Disk:
    one = Disk()
    one.give(AGREEMENT)
    return one


def test_a_convicted_solver_loses_lock_and_pay_and_the_finder_is_paid(disk: Disk) -> None:
    disk.give(arbitration("wrong"))
    assert (disk.stake("solver"), disk.free("solver")) == (STAKE_MICRO - LOCK_MICRO, 0)
    cost, fees = 500_000, 4 * 1_000  # half a giga-operation, and a thousandth for each of four notaries
    rest = LOCK_MICRO - cost - fees
    assert disk.free("whistleblower") == cost + rest * LOCK.winner // 1000
    assert disk.free("submitter") == rest * LOCK.submitter // 1000
    assert disk.pot(BURNED) * 2 >= rest
    assert disk.settler.channels[ID].closed == "slashed"
    assert disk.settler.history(TERMS.solver).wrong == 1


def test_after_the_settlement_the_lock_stays_and_gives_the_pay_back(disk: Disk) -> None:
    disk.give(settlement())
    assert disk.free("solver") == 4_900_000  # a fiftieth went to the pool
    assert disk.pot(POOL) == 100_000
    assert disk.stake("solver") == STAKE_MICRO - LOCK_MICRO
    disk.wait(59)
    disk.give(arbitration("wrong"))
    rest = LOCK_MICRO - 5_000_000 - 500_000 - 4_000
    assert disk.free("submitter") == -1_000_000 + rest // 4  # its money back, but for what its checker earned
    assert disk.settler.history(TERMS.solver).right == 0
    disk.wait(100)
    assert disk.stake("solver") == STAKE_MICRO - LOCK_MICRO


def test_the_lock_is_free_when_the_window_is_over_and_then_nothing_can_be_taken(disk: Disk) -> None:
    disk.give(settlement())
    disk.wait(61)
    assert disk.stake("solver") == STAKE_MICRO
    before = disk.settler.desk.ledger.balances()
    disk.give(arbitration("wrong"))
    assert disk.settler.desk.ledger.balances() == before


def test_an_open_challenge_holds_the_lock_and_a_stakeless_one_does_not(disk: Disk) -> None:
    disk.give(settlement())
    record, record_id, _ = open_record(challenge(), network=NETWORK.id)
    poor = msgspec.structs.replace(record, challenger=SigningKey.from_seed(b"p" * 32).public)
    disk.settler.judgement.challenged(poor, bytes(32))
    assert not disk.settler.channels[ID].challenges
    disk.settler.judgement.challenged(record, record_id)
    disk.commit()
    disk.wait(600)
    assert disk.stake("solver") == STAKE_MICRO - LOCK_MICRO
    disk.settler = disk.start()  # the hold outlives a restart
    disk.wait(1)
    assert disk.stake("solver") == STAKE_MICRO - LOCK_MICRO
    disk.give(arbitration("right"))
    disk.wait(1)
    assert disk.stake("solver") == STAKE_MICRO


def test_a_false_challenge_pays_the_solver_and_fills_the_pool(disk: Disk) -> None:
    disk.give(arbitration("right"))
    at_stake, cost = RULES.checker_stake_min_micro, 500_000
    assert disk.stake("whistleblower") == STAKE_MICRO - at_stake
    assert disk.free("solver") == cost
    assert disk.pot(POOL) == (at_stake - cost - 4_000) * STAKE.pool // 1000
    assert not disk.settler.channels[ID].closed
    disk.give(arbitration("wrong", by="verifier"))  # a lost challenge closes the window to nobody
    assert disk.settler.channels[ID].closed == "slashed"


def test_an_ordered_error_pays_one_jackpot_and_blames_nobody(disk: Disk) -> None:
    disk.give(arbitration("right", by="stranger"))  # fills the pool
    pool = disk.pot(POOL)
    disk.give(arbitration("forced"))
    assert disk.free("whistleblower") == jackpot_micro(TERMS, RULES, pool) > 0
    found = disk.free("whistleblower")
    disk.give(arbitration("forced", by="verifier", segment=4))
    assert (disk.free("verifier"), disk.free("whistleblower")) == (0, found)
    assert disk.settler.history(TERMS.solver).wrong == 0
    assert not disk.settler.channels[ID].closed


def test_a_settlement_waits_for_the_findings_before_it() -> None:
    """A jackpot is what the pool holds, and the settlement fills the pool."""
    found = arbitration("forced")
    settled = settlement(after=(open_record(challenge(), network=NETWORK.id)[1],))
    ends = []
    for order in ((found, settled), (settled, found)):
        disk = Disk()
        for envelope in (AGREEMENT, *order):
            disk.give(envelope)
        assert disk.settler.channels[ID].closed == "settled"
        ends.append(disk.settler.desk.ledger.balances())
    assert ends[0] == ends[1]


def test_whichever_quorum_publishes_the_same_money_moves() -> None:
    ends = []
    for quorum in ((0, 1, 2), (1, 2, 3), (0, 1, 2, 3)):
        disk = Disk()
        disk.give(AGREEMENT)
        disk.give(arbitration("wrong", notaries=quorum))
        ends.append(disk.settler.desk.ledger.balances())
        disk.give(arbitration("wrong", notaries=(0, 2, 3)))
        assert disk.settler.desk.ledger.balances() == ends[-1]
    assert ends[0] == ends[1] == ends[2]


def test_who_was_wrong_at_the_leaf_as_well_gets_its_costs_alone(disk: Disk) -> None:
    disk.give(arbitration("wrong", cause="both"))
    rest = LOCK_MICRO - 500_000 - 4_000
    assert disk.free("whistleblower") == 500_000
    assert disk.free("submitter") == rest * LOCK.submitter // 1000
    assert disk.pot(BURNED) == rest - rest * LOCK.submitter // 1000


@pytest.mark.parametrize("cause", ["silence", "withheld", "malformed", "equivocation"])
def test_a_solver_that_gives_up_loses_and_refutes_no_verdict(disk: Disk, cause: str) -> None:
    """It may have crashed with its work done right: whoever signed that is honest."""
    disk.give(arbitration("wrong", cause=cause))
    assert disk.settler.channels[ID].closed == "slashed"
    rest = LOCK_MICRO - 500_000  # no operation was executed: the notaries get nothing
    assert disk.free("submitter") == rest * LOCK.submitter // 1000
    disk.give(fault())
    assert disk.stake("verifier") == STAKE_MICRO
    disk.give(arbitration("wrong", by="stranger"))  # another dispute of the same segment went to the leaf
    disk.give(fault("verifier"))
    assert disk.stake("verifier") == STAKE_MICRO - RULES.checker_stake_min_micro


def test_rulings_of_several_causes_make_no_quorum(disk: Disk) -> None:
    envelope = challenge()
    causes = ("leaf", "both", "silence")
    mixed = tuple(ruling("wrong", envelope, n, 3, c) for n, c in zip(NOTARIES, causes, strict=False))
    record = Arbitration(
        network=NETWORK.id, agreement=ID, author=KEYS["stranger"].public, challenge=envelope, rulings=mixed
    )
    with pytest.raises(VerificationFailed, match="3 findings"):
        disk.give(seal(record, KEYS["stranger"]))


@pytest.mark.parametrize("finding", ["wrong", "forced"])
def test_who_signed_that_it_was_right_loses_its_stake_once(disk: Disk, finding: str) -> None:
    disk.give(fault())
    assert disk.stake("verifier") == STAKE_MICRO  # no finding yet: it waits
    disk.give(arbitration(finding))
    assert disk.stake("verifier") == STAKE_MICRO - RULES.checker_stake_min_micro
    again = seal(
        msgspec.structs.replace(open_record(fault(), network=NETWORK.id)[0], author=TERMS.solver), KEYS["solver"]
    )
    disk.give(again)
    assert disk.stake("verifier") == STAKE_MICRO - RULES.checker_stake_min_micro
    disk.give(fault("whistleblower", (4, 5)))  # it never looked at that segment
    assert disk.stake("whistleblower") == STAKE_MICRO


def test_a_dispute_lost_on_purpose_takes_no_more_from_a_checker_than_it_burns(disk: Disk) -> None:
    small = msgspec.structs.replace(TERMS, lock_micro=1_000, sequence=2)
    opened = certified(small)
    disk.give(opened)
    agreement = open_record(opened, network=NETWORK.id)[1]

    def about(record: Any, author: SigningKey, **fields: Any) -> bytes:
        return seal(msgspec.structs.replace(record, agreement=agreement, **fields), author)

    accusation = about(open_record(challenge(), network=NETWORK.id)[0], KEYS["whistleblower"])
    found = [open_record(ruling("wrong", accusation, notary), network=NETWORK.id)[0] for notary in NOTARIES[:3]]
    rulings = tuple(about(one, notary) for one, notary in zip(found, NOTARIES, strict=False))
    record = open_record(arbitration("wrong"), network=NETWORK.id)[0]
    disk.give(about(record, KEYS["stranger"], challenge=accusation, rulings=rulings))
    blamed = open_record(fault(), network=NETWORK.id)[0]
    assert isinstance(blamed, Fault)
    verdict = about(open_record(blamed.verdict, network=NETWORK.id)[0], KEYS["verifier"])
    disk.give(about(blamed, KEYS["stranger"], verdict=verdict))
    assert disk.stake("verifier") == STAKE_MICRO - 500


@pytest.mark.parametrize(
    "envelope",
    [
        arbitration("wrong", notaries=(0, 1)),
        arbitration("wrong", notaries=(0, 0, 1)),
        arbitration("wrong", segment=10),
        arbitration("wrong", by="solver"),
    ],
    ids=["two of four", "one twice", "segment of another", "by the solver"],
)
def test_an_arbitration_takes_a_quorum_on_a_challenge_of_the_agreement(disk: Disk, envelope: bytes) -> None:
    before = disk.settler.desk.ledger.balances()
    with pytest.raises(VerificationFailed):
        disk.give(envelope)
    assert disk.settler.desk.ledger.balances() == before


def test_two_findings_make_no_quorum(disk: Disk) -> None:
    envelope = challenge()
    mixed = tuple(ruling(f, envelope, n) for f, n in zip(("wrong", "wrong", "right"), NOTARIES, strict=False))
    record = Arbitration(
        network=NETWORK.id, agreement=ID, author=KEYS["stranger"].public, challenge=envelope, rulings=mixed
    )
    with pytest.raises(VerificationFailed):
        disk.give(seal(record, KEYS["stranger"]))


def test_a_quorum_of_checkers_slashes_nobody_where_notaries_judge(disk: Disk) -> None:
    slash = Slash(
        network=NETWORK.id, agreement=ID, author=TERMS.submitter, proof=b"-", reveals=(b"-",), verdicts=(b"-",)
    )
    with pytest.raises(VerificationFailed, match="notaries"):
        disk.give(seal(slash, KEYS["submitter"]))


class Judged(RuleBasedStateMachine):
    """Any order of settlements, claims, findings, faults, time and restarts: money is conserved, locks end once."""

    @initialize()
    def opened(self) -> None:
        self.disk = Disk()
        self.disk.give(AGREEMENT)

    def offer(self, envelope: bytes) -> None:
        with suppress(RemoteProtocolError):  # a record that is refused is a move of the game too
            self.disk.give(envelope)

    @rule(paid=st.sampled_from((0, 1, 5_000_000, 9_000_000)))
    def settled(self, paid: int) -> None:
        self.offer(settlement(paid))

    @rule(author=st.sampled_from(("submitter", "solver")), cumulative=st.sampled_from((0, 4_000_000, CHANNEL_MICRO)))
    def claimed(self, author: str, cumulative: int) -> None:
        voucher = Voucher(
            network=NETWORK.id, agreement=ID, epoch=0, sequence=1, cumulative_micro=cumulative,
            cumulative_operations=1, receipt=bytes(32), submitter=TERMS.submitter,
        )  # fmt: skip
        sealed = seal(voucher, KEYS["submitter"])
        claim = Claim(network=NETWORK.id, agreement=ID, author=KEYS[author].public, voucher=sealed, fees=())
        self.offer(seal(claim, KEYS[author]))

    @rule(
        finding=st.sampled_from(("wrong", "right", "forced")),
        by=st.sampled_from(("verifier", "whistleblower", "stranger", "submitter")),
        segment=st.integers(0, 4),
        quorum=st.sampled_from(((0, 1, 2), (1, 2, 3), (0, 1, 2, 3))),
        cause=st.sampled_from(("leaf", "both", "silence", "equivocation")),
    )
    def judged(self, finding: str, by: str, segment: int, quorum: tuple[int, ...], cause: str) -> None:
        self.offer(arbitration(finding, by, segment, quorum, "forced" if finding == "forced" else cause))

    @rule(by=st.sampled_from(("verifier", "whistleblower")), segment=st.integers(0, 4))
    def signed_wrongly(self, by: str, segment: int) -> None:
        self.offer(fault(by, (segment,)))

    @rule(by=st.sampled_from(("verifier", "stranger")), segment=st.integers(0, 4))
    def challenged(self, by: str, segment: int) -> None:
        record, record_id, _ = open_record(challenge(by, segment), network=NETWORK.id)
        assert isinstance(record, Challenge)
        self.disk.settler.judgement.challenged(record, record_id)
        self.disk.commit()

    @rule(seconds=st.sampled_from((1, 15, 61, 700, 10_000)))
    def waited(self, seconds: int) -> None:
        self.disk.wait(seconds)

    @rule()
    def restarted(self) -> None:
        before = self.disk.settler
        posts = list(self.disk.posts)
        self.disk.settler = self.disk.start()
        self.disk.commit()
        assert self.disk.posts == posts, "a restart moves no money"
        after = self.disk.settler
        assert after.desk.ledger.balances() == before.desk.ledger.balances()
        assert set(after.log) == set(before.log)
        assert after.history(TERMS.solver) == before.history(TERMS.solver)
        for role in ROLES:
            for key in KEYS.values():
                assert after.reputations.evidence(role, key.public) == before.reputations.evidence(role, key.public)
        mine, theirs = before.channels[ID], after.channels[ID]
        assert (mine.closed, mine.locked, mine.findings) == (theirs.closed, theirs.locked, theirs.findings)
        assert mine.closed_ns == theirs.closed_ns or not mine.closed or not mine.locked, "its window ends at one time"

    @invariant()
    def conserved(self) -> None:
        ledger = self.disk.settler.desk.ledger
        ledger.check()
        assert ledger.total_micro() == DEPOSITED

    @invariant()
    def only_who_was_found_wrong_loses(self) -> None:
        channel = self.disk.settler.channels[ID]
        found = {j.finding for j in channel.findings.values()}
        if "wrong" not in found:
            held = LOCK_MICRO if channel.locked else 0
            assert self.disk.stake("solver") + held == STAKE_MICRO
        if not found:
            assert self.disk.stake("whistleblower") == self.disk.stake("verifier") == STAKE_MICRO


TestJudged = Judged.TestCase
TestJudged.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)
