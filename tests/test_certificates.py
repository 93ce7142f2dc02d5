"""A party brings what it gave up to an end at every notary, also at one whose answer was lost or comes last."""

from __future__ import annotations

import random

import pytest

from market import entries as money
from market.ledger import Ledger
from peer.certificate_messages import Certified
from peer.certificates import Certificates
from peer.deals import Deal
from peer.desk import Desk, Means
from peer.events import Send
from peer.messages import unpack
from peer.settler import Settler
from peer.witness import Witness
from protocol import params
from protocol.lifecycle import State
from tests.test_notary import (
    LATE_NS,
    NETWORK,
    NOTARIES,
    NOW_NS,
    SOLVERS,
    SUBMITTERS,
    Office,
    agreed,
    code_of,
    named,
    with_answers,
)


class Solver:
    """The solver of an agreement that its submitter left, and the lines to the notaries that are not cut."""

    def __init__(self, envelope: bytes, offices: list[Office]) -> None:
        self.offices = {office.key.public: office for office in offices}
        self.desk = Desk(key=SOLVERS[0], network=NETWORK, rng=random.Random(1), ledger=Ledger(), means=Means())
        self.desk.now_ns, self.desk.peers = NOW_NS, dict.fromkeys(self.offices, NOW_NS)
        self.certificates = Certificates(self.desk, Settler(self.desk), Witness(self.desk))
        self.deal = Deal(
            id=named(envelope)[1], side="solver", state=State.DECLINED, agreement=envelope, task=b"", base_blob=b"",
            seed=b"", created_ns=NOW_NS,
        )  # fmt: skip
        self.certificates.watch(self.deal)
        for office in offices:
            office.desk.peers[self.desk.me] = NOW_NS

    def ends(self, *heard: int, later_ns: int = params.CERTIFY_END_NS) -> None:
        """A round of questions after some time, of which these notaries hear."""
        self.desk.now_ns += later_ns
        self.certificates.tick()
        while sent := [effect for effect in self.desk.effects if isinstance(effect, Send)]:
            self.desk.effects.clear()
            for effect in sent:
                if effect.peer in {NOTARIES[number].public for number in heard}:
                    self._answered(self.offices[effect.peer], effect.data)
        self.desk.effects.clear()

    def _answered(self, office: Office, question: bytes) -> None:
        office.desk.now_ns = office.now_ns = self.desk.now_ns
        office.notary.message(self.desk.me, unpack(question))  # type: ignore[arg-type]
        answers = [effect.data for effect in office.desk.effects if isinstance(effect, Send)]
        office.commit()
        for answer in answers:
            self.certificates.message(office.key.public, unpack(answer))  # type: ignore[arg-type]


@pytest.fixture
def offices() -> list[Office]:
    return [Office(key) for key in NOTARIES]


def test_a_notary_that_signed_and_is_away_when_the_others_promise_lets_go_when_it_is_back(
    offices: list[Office],
) -> None:
    first = agreed()
    with_answers(first, offices[:1])  # of which only the submitter heard
    solver = Solver(first, offices)
    solver.ends(1, 2, 3, later_ns=LATE_NS)
    assert solver.certificates.in_doubt_micro("stake") == 0, "three never sign: it can never open"
    assert offices[0].notary.stake == {SOLVERS[0].public: 900}
    solver.ends(0, 1, 2, 3)
    assert not offices[0].notary.stake and not offices[0].notary.free
    assert not solver.certificates.asked and not solver.deal.doubt


def test_the_solver_of_one_of_many_orders_of_one_number_is_answered_too(
    offices: list[Office], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(params, "MOOT_RECORDS_MAX", 0)
    orders = [agreed(number) for number in (1, 2, 3, 4)]
    for office in offices:
        certificates = Certificates(office.desk, office.settler, office.notary.witness)
        office.notary = certificates.notary
        office.desk.ledger.post(money.deposit(b"s" * 32, SUBMITTERS[0].public, 0, 10**7))
        assert isinstance(office.ask(orders[0]), Certified)
        assert [code_of(office.ask(order)) for order in orders[1:]] == ["sequence"] * 3
    solver = Solver(orders[-1], offices)
    solver.ends(0, 1, 2, 3, later_ns=LATE_NS)
    assert not solver.certificates.asked and not solver.deal.doubt


def test_nobody_is_asked_on_for_ever(offices: list[Office]) -> None:
    solver = Solver(agreed(), offices)
    solver.ends(1, 2, 3, later_ns=LATE_NS)
    assert solver.deal.doubt, "the fourth may have signed"
    solver.ends(1, 2, 3, later_ns=params.CERTIFY_NEVER_NS)
    assert not solver.certificates.asked and not solver.deal.doubt
