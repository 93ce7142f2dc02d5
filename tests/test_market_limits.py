"""Nobody takes more of a peer's attention than a share: of its window for proposals, of its quotes, of its turns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from market.ledger import deposit
from market.matching import Proven
from peer import messages as m
from peer.acceptance import Acceptance
from peer.events import Emit
from peer.market_view import MarketView
from peer.solver import Solver as SolverSide
from protocol import params
from protocol.errors import VerificationFailed
from protocol.lifecycle import State
from protocol.records import amount_for
from tests.test_bidding import START_NS, Solver
from tests.test_market import ask

GIGA = 10**9


# --- the window for proposals --------------------------------------------------------------------------------
class Window:
    """A solver's window that stays open, and the codes of what it declined."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        solver = Solver()
        bidder: Any = solver.bidder
        monkeypatch.setattr(bidder, "refuse_proposal", lambda *_: None)
        monkeypatch.setattr(bidder, "awaited", lambda: {b"another offer"})
        self.declined: list[str] = []
        monkeypatch.setattr(solver.desk, "send", lambda _, message: self.declined.append(message.code))
        self.acceptance = Acceptance(solver.desk, bidder, lambda: 1, lambda _: None)
        self.count = 0

    def propose(self, submitter: bytes) -> bytes:
        self.count += 1
        name = self.count.to_bytes(32, "big")
        agreement: Any = SimpleNamespace(submitter=submitter, bid=name, offer=name)
        self.acceptance.receive(submitter, m.Propose(b"", b"", b""), agreement, name)
        return name


def test_one_submitter_cannot_fill_the_window_for_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    window, greedy = Window(monkeypatch), bytes(32)
    names = [window.propose(greedy) for _ in range(params.PROPOSALS_WAITING_MAX + 5)]
    assert len(window.acceptance.waiting) == params.PROPOSALS_PER_SUBMITTER_MAX
    others = [n.to_bytes(32, "big") for n in range(1, 1 + params.PROPOSALS_WAITING_MAX)]
    refused = len(window.declined)
    for other in others:
        window.propose(other)
    assert len(window.acceptance.waiting) == params.PROPOSALS_WAITING_MAX, "and all together no more than before"
    assert len(window.declined) - refused == params.PROPOSALS_PER_SUBMITTER_MAX
    assert set(window.declined) == {"busy"}, "which says nothing of the job: it is offered again at once"
    window.acceptance.withdraw(names[0], greedy)
    window.propose(greedy)
    assert len(window.acceptance.waiting) == params.PROPOSALS_WAITING_MAX, "who withdraws one may send another"


# --- quotes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("balance_share", "ahead"), [(0, 0), (1, 1), (2, 2), (9, 4)])
def test_a_quote_counts_the_rivals_that_can_pay_and_no_others(balance_share: int, ahead: int) -> None:
    """Four offers of one author with higher limits, who has money for so many of them."""
    solver, limit = Solver(), 50_000
    worth, author = amount_for(100 * GIGA, limit), (77).to_bytes(32, "big")
    if balance_share:
        solver.desk.ledger.post(deposit(b"money".ljust(32), author, balance_share * worth, 0))
    for number in range(4):
        solver.hear(number, submitter=author, unit_price_max=limit, operations=100 * GIGA, budget_micro=worth)
    for number in range(100, 103):
        solver.desk.book.add_ask(ask(number, unit_price=1000), now_ns=START_NS)
    challenger: Any = SimpleNamespace(speed_of=lambda _: Proven("none", 0))
    view = MarketView(solver.desk, solver.bidder.settler, solver.bidder, challenger)
    rivals = view.bidder.pricer.funded(solver.desk.book.offers.values())
    assert len(rivals) == ahead
    (rung,) = view.quote({"operations": GIGA, "unit_price_max": 1000})["rungs"]
    at_once = 2 * solver.desk.network.rules.round_ms * 10**6
    assert (rung["free"], rung["wait_ns"]) == (3, at_once if ahead < 3 else None)


# --- news of channels ----------------------------------------------------------------------------------------
def test_the_trouble_of_one_listener_is_told_and_hides_nothing_from_the_others() -> None:
    solver = Solver()
    settler, heard = solver.bidder.settler, list[object]()

    def refuse(agreement_id: bytes) -> None:
        heard.append(agreement_id)
        if agreement_id == b"first":
            raise VerificationFailed("a listener's own trouble")

    settler.on_open = refuse
    settler.on_close = lambda agreement_id, how: heard.append((agreement_id, how))
    settler._opened += [b"first", b"second"]
    settler._closed += [(b"third", "settled")]
    settler.tick()
    assert heard == [b"first", b"second", (b"third", "settled")]
    problems = [effect for effect in solver.desk.effects if isinstance(effect, Emit) and effect.kind == "problem"]
    assert [one.data["what"].split(":")[-1].strip() for one in problems] == ["a listener's own trouble"]
    settler.on_open = lambda _: [][0]
    settler._opened.append(b"fourth")
    with pytest.raises(IndexError):  # a bug is no trouble of a listener's: it stops the node
        settler.tick()


# --- a solver's deals ----------------------------------------------------------------------------------------
class Ended:
    """A deal that is over, and counts how often it is looked at."""

    looks = 0
    doubt = False

    @property
    def state(self) -> State:
        Ended.looks += 1
        return State.SETTLED


def test_deals_that_are_over_are_not_counted_for_each_offer() -> None:
    solver = Solver()
    unused: Any = None
    side = SolverSide(solver.desk, solver.bidder.settler, solver.bidder, unused, unused, lambda _: None)
    deals: dict[bytes, Any] = side.deals
    deals |= {n.to_bytes(32, "big"): Ended() for n in range(500)}
    running: Any = SimpleNamespace(state=State.RUNNING, doubt=False)
    deals[b"running"] = running
    slots = solver.desk.means.slots
    assert side.slots_free() == slots - 1
    looks = Ended.looks
    assert [side.slots_free() for _ in range(10)] == [slots - 1] * 10
    assert Ended.looks == looks
    deals[b"another"] = SimpleNamespace(state=State.AGREED, doubt=False)
    assert side.slots_free() == slots - 2
    running.state = State.SETTLED
    assert side.slots_free() == slots - 1
    assert side.promised_micro() == 0
