"""A notary sets money aside before it signs, keeps that over a restart, and lets go of it only for a proof."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations, count

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from market import entries as money
from market.ledger import Ledger
from peer.certificate_messages import CertificateMessage, Certified, CertifyAsk, CertifyRefuse, CertifyRelease, Voided
from peer.desk import Desk, Means
from peer.events import Post, Publish, Save
from peer.notary import Notary
from peer.settler import Settler
from peer.witness import Witness
from protocol import params
from protocol.certificate import Order, attach, ordered_by, provable, takes
from protocol.codec import decode
from protocol.errors import VerificationFailed
from protocol.keys import SigningKey, peer_name
from protocol.network import Deposit, Network, Rules
from protocol.records import Agreement, Equivocation, StakeMove, add_signature, open_record, seal

SECOND, NOW_NS = 10**9, 10**18
SUBMITTERS = [SigningKey.from_seed(f"submitter-{n}".encode().ljust(32, b".")) for n in range(2)]
SOLVERS = [SigningKey.from_seed(f"solver-{n}".encode().ljust(32, b".")) for n in range(3)]
NOTARIES = [SigningKey.from_seed(f"notary-{n}".encode().ljust(32, b".")) for n in range(4)]
FREE_MICRO, STAKE_MICRO = 1_000, 2_000
NETWORK = Network(
    "notaries",
    Rules(),
    (
        *(Deposit(peer_name(key.public), FREE_MICRO, 0) for key in SUBMITTERS),
        *(Deposit(peer_name(key.public), 0, STAKE_MICRO) for key in SOLVERS),
    ),
    notaries=tuple(peer_name(key.public) for key in NOTARIES),
)
TOTAL_MICRO = sum(deposit.free_micro + deposit.stake_micro for deposit in NETWORK.deposits)
KEYS = {key.public: key for key in (*SUBMITTERS, *SOLVERS)}
LATE_NS = params.CERTIFY_LATE_NS + 1


def agreed(
    channel: int = 600, lock: int = 900, *, sequence: int = 1, submitter: int = 0, solver: int = 0, now_ns: int = NOW_NS
) -> bytes:
    """An agreement with both parties' signatures."""
    fields: dict[str, object] = {f.name: bytes(32) for f in msgspec.structs.fields(Agreement)}
    fields |= dict.fromkeys(("operations", "unit_price", "segment_deadline_ns", "last_segment"), 1)
    fields |= {"network": NETWORK.id, "first_segment": 0, "check_permille": 200, "sequence": sequence}
    fields |= {"submitter": SUBMITTERS[submitter].public, "solver": SOLVERS[solver].public, "created_ns": now_ns}
    fields |= {"channel_micro": channel, "lock_micro": lock, "accept_before_ns": now_ns}
    terms = Agreement(**fields)  # type: ignore[arg-type]
    return add_signature(seal(terms, SUBMITTERS[submitter]), SOLVERS[solver], network=NETWORK.id)


def moving(kind: str, micro: int, *, owner: SigningKey = SOLVERS[0], sequence: int = 1, now_ns: int = NOW_NS) -> bytes:
    """A move of stake with its owner's signature."""
    move = StakeMove(
        network=NETWORK.id, owner=owner.public, sequence=sequence, kind=kind, amount_micro=micro,  # type: ignore[arg-type]
        created_ns=now_ns,
    )  # fmt: skip
    return seal(move, owner)


def named(envelope: bytes) -> tuple[Agreement, bytes]:
    terms, agreement_id, _ = open_record(envelope, network=NETWORK.id)
    assert isinstance(terms, Agreement)
    return terms, agreement_id


def order_of(envelope: bytes) -> tuple[Order, bytes]:
    order, order_id, _ = open_record(envelope, network=NETWORK.id)
    assert isinstance(order, Agreement | StakeMove)
    return order, order_id


class Office:
    """One notary: its disk, and the process that reads it."""

    def __init__(self, key: SigningKey) -> None:
        self.key, self.now_ns = key, NOW_NS
        self.rows: dict[str, dict[bytes, bytes]] = {}
        self.posts: list[money.Entry] = []
        self.published: list[bytes] = []
        self.start()

    def start(self) -> None:
        """A process reads the disk."""
        ledger = Ledger()
        for number, deposit in enumerate(NETWORK.deposits):
            owner = (*SUBMITTERS, *SOLVERS)[number].public
            ledger.post(money.deposit(bytes([number]) * 32, owner, deposit.free_micro, deposit.stake_micro))
        for entry in self.posts:
            ledger.post(entry)
        self.desk = Desk(key=self.key, network=NETWORK, rng=random.Random(1), ledger=ledger, means=Means())
        self.desk.now_ns = self.now_ns
        self.settler = Settler(self.desk)
        self.notary = Notary(self.desk, self.settler, Witness(self.desk))
        self.settler.on_open = self.settler.on_moved = self.notary.opened
        self.settler.restore(lambda table: list(self.rows.get(table, {}).items()))
        self.notary.restore(lambda table, prefix=b"": list(self.rows.get(table, {}).items()))
        self.desk.effects.clear()

    def commit(self) -> None:
        self.desk.flush_outbox()
        for effect in self.desk.effects:
            if isinstance(effect, Save):
                table = self.rows.setdefault(effect.table, {})
                if effect.value is None:
                    del table[effect.key]
                else:
                    table[effect.key] = effect.value
            elif isinstance(effect, Post):
                self.posts.append(effect.entry)
            elif isinstance(effect, Publish):
                self.published += decode(list[bytes], effect.data, bytes_max=2**20)
        self.desk.effects.clear()

    def ask(self, envelope: bytes, *, end: bool = False, by: bytes = b"") -> CertificateMessage:
        """What it answers to one of the parties."""
        self.desk.now_ns = self.now_ns
        answer = self.notary.on_ask(by or ordered_by(order_of(envelope)[0])[0], CertifyAsk(envelope, end))
        self.commit()
        return answer

    def take(self, envelope: bytes) -> None:
        """The opening comes by gossip."""
        self.settler.accept(envelope)
        self.commit()

    def release(self, agreement_id: bytes, voids: tuple[bytes, ...], by: bytes) -> None:
        self.notary.message(by, CertifyRelease(agreement_id, voids))
        self.commit()


@pytest.fixture
def offices() -> list[Office]:
    return [Office(key) for key in NOTARIES]


def code_of(answer: CertificateMessage) -> str:
    assert isinstance(answer, CertifyRefuse), answer
    return answer.code


def with_answers(envelope: bytes, offices: list[Office]) -> bytes:
    """The envelope with what these notaries sign."""
    found = {}
    for office in offices:
        answer = office.ask(envelope)
        assert isinstance(answer, Certified), answer
        found[office.key.public] = answer.signature
    return attach(envelope, found)


def voids_of(envelope: bytes, offices: list[Office]) -> tuple[bytes, ...]:
    answers = [office.ask(envelope, end=True) for office in offices]
    assert all(isinstance(answer, Voided) for answer in answers), answers
    return tuple(answer.void for answer in answers if isinstance(answer, Voided))


def test_what_a_quorum_signed_opens_a_channel_and_two_more_cannot_be_paid_from_the_rest(offices: list[Office]) -> None:
    first = agreed()
    certificate = with_answers(first, offices[:3])
    assert code_of(offices[0].ask(agreed(sequence=2, solver=1))) == "funds"
    assert code_of(offices[0].ask(agreed(100, 1200, sequence=3))) == "stake", "900 of 2000 are set aside"
    for office in offices:
        office.take(certificate)
        assert not office.notary.rows and not office.notary.free and not office.notary.stake
        assert code_of(office.ask(agreed(sequence=2, solver=1))) == "funds", "the ledger says so now"
    assert isinstance(offices[3].ask(first), Certified), "what is open may be signed by all"


def test_it_answers_the_same_again_and_after_a_restart(offices: list[Office]) -> None:
    office, first = offices[0], agreed()
    answer = office.ask(first)
    assert office.ask(first, by=named(first)[0].solver) == answer
    office.start()
    assert office.ask(first) == answer
    assert code_of(office.ask(agreed(sequence=2))) == "funds"
    office.now_ns += 10 * params.CERTIFY_NEVER_NS
    office.notary.tick()
    assert office.ask(first) == answer, "no time frees it: whoever has the other signatures may show them late"
    assert code_of(office.ask(agreed(sequence=2, now_ns=office.now_ns))) == "funds"


def test_two_agreements_of_one_number_prove_a_fraud(offices: list[Office]) -> None:
    office = offices[0]
    certificate = with_answers(agreed(10), offices)
    assert code_of(office.ask(agreed(20, solver=1))) == "sequence"
    office.take(certificate)
    assert code_of(office.ask(agreed(30, solver=2))) == "sequence"
    (proof,) = {open_record(envelope, network=NETWORK.id)[0] for envelope in office.published}
    assert isinstance(proof, Equivocation) and proof.culprit == SUBMITTERS[0].public


def test_strangers_notaries_that_are_parties_and_work_of_nothing_are_refused(offices: list[Office]) -> None:
    office, first = offices[0], agreed()
    for wrong, by in ((first, NOTARIES[1].public), (seal(named(first)[0], SUBMITTERS[0]), SUBMITTERS[0].public)):
        with pytest.raises(VerificationFailed):
            office.ask(wrong, by=by)
    with pytest.raises(VerificationFailed):
        office.ask(agreed(0))
    party = Office(SUBMITTERS[0])
    with pytest.raises(VerificationFailed):
        party.ask(first)
    assert not office.rows and not party.rows


def test_nothing_is_signed_first_when_it_is_late_but_what_an_honest_notary_signed_is_completed(
    offices: list[Office],
) -> None:
    first = agreed()
    shown = with_answers(first, offices[:2])
    for office in offices:
        office.now_ns += LATE_NS
    assert code_of(offices[2].ask(first)) == "late"
    one = attach(first, {k: s for k, s in signatures(shown).items() if k == NOTARIES[0].public or k in KEYS})
    assert code_of(offices[2].ask(one)) == "late", "one of f + 1 may lie"
    assert isinstance(offices[2].ask(shown, end=True), Certified), "nobody could prove any more that it never opens"


def signatures(envelope: bytes) -> dict[bytes, bytes]:
    return dict(msgspec.msgpack.decode(envelope)[1])


def test_a_quorum_of_promises_frees_what_fewer_signed(offices: list[Office]) -> None:
    first = agreed()
    with_answers(first, offices[:1])
    assert code_of(offices[1].ask(first, end=True)) == "early", "its submitter may be asking for it still"
    for office in offices:
        office.now_ns += LATE_NS
    voids, name = voids_of(first, offices[1:]), named(first)[1]
    offices[1].start()
    assert isinstance(offices[1].ask(first), Voided), "a promise outlives a restart"
    with pytest.raises(VerificationFailed):
        offices[0].release(name, voids[:2], SUBMITTERS[0].public)
    assert offices[0].notary.free
    offices[0].release(name, voids, SOLVERS[0].public)
    assert not offices[0].notary.free and not offices[0].notary.stake
    assert isinstance(offices[0].ask(first), Voided), "and it never signs it again"
    offices[0].start()
    assert isinstance(offices[0].ask(first), Voided)
    again = agreed(sequence=2, now_ns=offices[0].now_ns)
    assert isinstance(offices[0].ask(again), Certified)


def test_promises_are_forgotten_when_nothing_is_signed_any_more_anyhow(offices: list[Office]) -> None:
    first, office = agreed(), offices[0]
    office.now_ns += LATE_NS
    voids_of(first, [office])
    office.now_ns += 2 * params.CERTIFY_NEVER_NS
    office.desk.now_ns = office.now_ns
    office.notary.tick()
    office.commit()
    assert not office.rows["reservations"]
    shown = attach(first, signatures(with_answers(first, offices[1:3])))
    assert code_of(office.ask(shown)) == "late"
    assert isinstance(office.ask(shown, end=True), Voided)


def test_the_table_has_an_end(offices: list[Office], monkeypatch: pytest.MonkeyPatch) -> None:
    office = offices[0]
    monkeypatch.setattr(params, "RESERVATIONS_PER_SUBMITTER_MAX", 2)
    monkeypatch.setattr(params, "RESERVATIONS_MAX", 3)
    for number in range(2):
        assert isinstance(office.ask(agreed(1, 1, sequence=number)), Certified)
    assert code_of(office.ask(agreed(1, 1, sequence=2))) == "busy"
    assert isinstance(office.ask(agreed(1, 1, submitter=1)), Certified)
    assert code_of(office.ask(agreed(1, 1, sequence=2, submitter=1))) == "busy"


def test_keys_without_money_leave_room_for_who_has_some(
    offices: list[Office], monkeypatch: pytest.MonkeyPatch
) -> None:
    office = offices[0]
    monkeypatch.setattr(params, "RESERVATIONS_MAX", 4)
    monkeypatch.setattr(params, "RESERVATIONS_OF_STRANGERS_MAX", 2)
    first, left = agreed(), agreed(1, 1, sequence=2)
    stranger = [SigningKey.from_seed(f"stranger-{n}".encode().ljust(32, b".")) for n in range(4)]
    office.now_ns += LATE_NS
    answers = []
    for key in stranger:
        terms = msgspec.structs.replace(named(first)[0], submitter=key.public)
        made_up = add_signature(seal(terms, key), SOLVERS[0], network=NETWORK.id)
        answers.append(office.ask(made_up, end=True, by=SOLVERS[0].public))
    assert [type(answer) for answer in answers] == [Voided, Voided, CertifyRefuse, CertifyRefuse]
    assert isinstance(office.ask(left, end=True), Voided)
    office.start()
    assert isinstance(office.ask(agreed(sequence=3, now_ns=office.now_ns)), Certified)
    assert code_of(office.ask(agreed(1, 1, sequence=4, now_ns=office.now_ns))) == "busy", "the table has an end for all"


SUBSETS = [subset for size in (2, 3, 4) for subset in combinations(range(4), size)]


class Court(RuleBasedStateMachine):
    """Four notaries of which one signs whatever it is shown, or is down; two submitters that order what they do not
    have, three solvers that lock what they do not have: what is certified can always be paid, on every peer alike."""

    @initialize(liar=st.integers(0, 3))
    def opened(self, liar: int) -> None:
        self.offices = [Office(key) for key in NOTARIES]
        self.liar, self.sequence = liar, count(1)
        self.ordered: list[bytes] = []
        self.signed: dict[bytes, dict[bytes, bytes]] = {}
        self.voids: dict[bytes, dict[bytes, bytes]] = {}
        self.folded: dict[bytes, set[int]] = {}
        self.paid: object = None

    @rule(
        channel=st.sampled_from((1, 600)), lock=st.sampled_from((0, 1_100)), submitter=st.integers(0, 1),
        solver=st.integers(0, 1), twice=st.booleans(),
    )  # fmt: skip
    def ordered_by(self, channel: int, lock: int, submitter: int, solver: int, *, twice: bool) -> None:
        number = 1 if twice else next(self.sequence) + 1
        now_ns = self.offices[0].now_ns
        envelope = agreed(channel, lock, sequence=number, submitter=submitter, solver=solver, now_ns=now_ns)
        if envelope not in self.ordered:
            self.ordered.append(envelope)

    @rule(
        add=st.booleans(), micro=st.sampled_from((1_000, 1_900)), owner=st.sampled_from((SUBMITTERS[0], *SOLVERS[:2])),
        twice=st.booleans(),
    )  # fmt: skip
    def moved_by(self, add: bool, micro: int, owner: SigningKey, *, twice: bool) -> None:
        number, now_ns = 1 if twice else next(self.sequence) + 1, self.offices[0].now_ns
        envelope = moving("add" if add else "withdraw", micro, owner=owner, sequence=number, now_ns=now_ns)
        if envelope not in self.ordered:
            self.ordered.append(envelope)

    def chosen(self, which: int) -> Iterator[tuple[bytes, bytes]]:
        if self.ordered:
            envelope = self.ordered[-1 - which % min(3, len(self.ordered))]  # of the latest: or nothing meets
            yield envelope, order_of(envelope)[1]

    @rule(which=st.integers(0, 2), asked=st.sampled_from(SUBSETS), end=st.booleans(), show=st.booleans())
    def asked_for(self, which: int, asked: tuple[int, ...], *, end: bool, show: bool) -> None:
        for envelope, name in self.chosen(which):
            signed, voids = self.signed.setdefault(name, {}), self.voids.setdefault(name, {})
            for at in asked:
                office = self.offices[at]
                if at == self.liar:  # it signs, and it promises not to
                    both = signatures(add_signature(envelope, office.key, network=NETWORK.id))
                    signed[office.key.public] = both[office.key.public]
                    lie = office.notary._promise(name)
                    voids[office.key.public] = lie.void
                    continue
                answer = office.ask(attach(envelope, signed) if show else envelope, end=end)
                if isinstance(answer, Certified):
                    signed[office.key.public] = answer.signature
                elif isinstance(answer, Voided):
                    voids[office.key.public] = answer.void

    @rule(which=st.integers(0, 2), told=st.sampled_from(SUBSETS))
    def published(self, which: int, told: tuple[int, ...]) -> None:
        for envelope, name in self.chosen(which):
            if len(self.signed.get(name, {})) >= NETWORK.notary_quorum:
                for at in told:
                    self.offices[at].take(attach(envelope, self.signed[name]))

    @rule(which=st.integers(0, 2))
    def given_up(self, which: int) -> None:
        for envelope, name in self.chosen(which):
            voids = tuple(self.voids.get(name, {}).values())
            for office in self.offices:
                with suppress(VerificationFailed):  # too few promises are a move of the game too
                    office.release(name, voids, ordered_by(order_of(envelope)[0])[0])

    @rule(at=st.integers(0, 3))
    def restarted(self, at: int) -> None:
        self.offices[at].start()

    @rule(seconds=st.sampled_from((1, LATE_NS // SECOND + 1)))
    def waited(self, seconds: int) -> None:
        for office in self.offices:
            office.now_ns += seconds * SECOND

    @invariant()
    def whatever_is_certified_can_be_paid(self) -> None:
        """A peer that has heard of nothing else folds all of it, in any order."""
        certified = [name for name, signed in self.signed.items() if len(signed) >= NETWORK.notary_quorum]
        terms = {order_of(envelope)[1]: (order_of(envelope)[0], envelope) for envelope in self.ordered}
        now_ns = max(office.now_ns for office in self.offices)  # or what was ordered late comes from its future
        folded = [attach(terms[name][1], self.signed[name]) for name in certified]
        if (now_ns, folded) == self.paid:
            return  # a peer of that time has folded just that: this step certified nothing
        self.paid = now_ns, folded
        outside = Office(SUBMITTERS[0])
        outside.now_ns = now_ns
        outside.start()
        for envelope in folded:
            outside.take(envelope)
        assert not outside.settler.pending, "two orders spend one balance"
        assert len(outside.settler.log) == len(certified)
        places = [ordered_by(terms[name][0]) for name in certified]
        assert len(set(places)) == len(places), "two orders of one number"
        outside.desk.ledger.check()

    @invariant()
    def nothing_is_both_certified_and_void(self) -> None:
        for name, signed in self.signed.items():
            both = len(signed) >= NETWORK.notary_quorum and len(self.voids[name]) >= NETWORK.notary_quorum
            assert not both, "what was to be free is spent"

    @invariant()
    def every_honest_table_adds_up(self) -> None:
        for office in self.offices:
            ledger = office.desk.ledger
            ledger.check()
            assert ledger.total_micro() == TOTAL_MICRO
            held = [office.notary.terms[name] for name, row in office.notary.rows.items() if not row.void]
            taken = [one for terms in held for one in takes(terms)]
            for key in KEYS:
                free = sum(micro for peer, bucket, micro in taken if (peer, bucket) == (key, "free"))
                stake = sum(micro for peer, bucket, micro in taken if (peer, bucket) == (key, "stake"))
                assert (office.notary.free[key], office.notary.stake[key]) == (free, stake)


TestCourt = Court.TestCase
TestCourt.settings = settings(max_examples=300, stateful_step_count=30, deadline=None, derandomize=True)


def test_a_move_and_an_opening_are_not_certified_out_of_one_balance(offices: list[Office]) -> None:
    opening = with_answers(agreed(), offices[:3])  # 600 of 1000 free, 900 of 2000 staked
    office = offices[0]
    assert code_of(office.ask(moving("withdraw", 1_101, sequence=1))) == "stake"
    out = with_answers(moving("withdraw", 1_100, sequence=2), offices[:3])
    assert code_of(office.ask(agreed(1, 1, sequence=2))) == "stake"
    assert code_of(office.ask(moving("add", 1_000, owner=SUBMITTERS[0], sequence=3))) == "funds"
    office.start()
    assert code_of(office.ask(agreed(1, 1, sequence=2))) == "stake", "it set it aside before it signed"
    for envelope in (out, opening):
        office.take(envelope)
    assert not office.notary.rows and not office.notary.stake and not office.notary.free
    assert office.settler.free_stake(SOLVERS[0].public) == 0
    assert code_of(office.ask(agreed(1, 1, sequence=2))) == "stake"


def test_a_move_and_an_opening_of_one_number_prove_a_fraud(offices: list[Office]) -> None:
    office = offices[0]
    assert isinstance(office.ask(agreed(10, 0)), Certified)
    assert code_of(office.ask(moving("add", 1_000, owner=SUBMITTERS[0]))) == "sequence"
    (proof,) = {open_record(envelope, network=NETWORK.id)[0] for envelope in office.published}
    assert isinstance(proof, Equivocation) and proof.culprit == SUBMITTERS[0].public


def test_moves_that_no_honest_owner_asks_for_are_refused(offices: list[Office]) -> None:
    office = offices[0]
    future = NOW_NS + params.CLOCK_SKEW_NS_MAX + 1
    assert code_of(office.ask(moving("add", 1_000, owner=SUBMITTERS[0], now_ns=future))) == "early"
    assert code_of(office.ask(moving("add", 1_000, owner=SUBMITTERS[0], now_ns=NOW_NS - LATE_NS))) == "late"
    with pytest.raises(VerificationFailed, match="for its parties"):
        office.ask(moving("withdraw", 1_000), by=SOLVERS[1].public)
    lying = msgspec.structs.replace(order_of(moving("withdraw", 1_000))[0], lost_micro=1)
    assert code_of(office.ask(seal(lying, SOLVERS[0]))) == "stake", "no penalty took anything of it"
    party = Office(SOLVERS[0])
    with pytest.raises(VerificationFailed):
        party.ask(moving("withdraw", 1_000))
    assert not office.rows and not party.rows


def test_a_move_that_was_given_up_is_void_and_frees_what_fewer_set_aside(offices: list[Office]) -> None:
    out = moving("withdraw", 1_500)
    with_answers(out, offices[:1])
    for office in offices:
        office.now_ns += LATE_NS
    voids = voids_of(out, offices[1:])
    offices[0].release(order_of(out)[1], voids, SOLVERS[0].public)
    assert not offices[0].notary.stake
    assert isinstance(offices[0].ask(moving("withdraw", 2_000, sequence=2, now_ns=offices[0].now_ns)), Certified)


def test_of_four_notaries_two_prove_that_one_is_honest() -> None:
    assert (provable(NETWORK), NETWORK.notary_quorum) == (2, 3)
