"""Netting takes debts away and moves nobody's position: by arithmetic, between two peers, and round a cycle."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from market.credit import Cycle, cleared, find_cycles, left_micro, netted, positions
from peer.credit_messages import ClearingOffer
from peer.events import Emit, MessageIn, Save
from peer.messages import pack
from peer.simulator import START_NS, Faults, Simulation
from protocol import params
from protocol.credit_records import Clearing
from protocol.errors import InsufficientFunds
from protocol.records import seal
from tests.credit_scene import PRICE_MICRO, credit_of, done, give, key_of, make_friends, node_of, owed, work_for
from tests.swarm_scenario import rest

PEERS = [bytes([number]) * 32 for number in range(1, 8)]
DEBTS = st.dictionaries(
    st.tuples(st.sampled_from(PEERS), st.sampled_from(PEERS)).filter(lambda pair: pair[0] != pair[1]),
    st.integers(1, 10**9),
    max_size=30,
)
FRIENDS = ("ann", "ben", "cat")


# --- the arithmetic --------------------------------------------------------------------------------------------
def without_zeros(found: dict[bytes, int]) -> dict[bytes, int]:
    return {peer: micro for peer, micro in found.items() if micro}


@given(DEBTS)
def test_no_netting_moves_a_position_or_adds_a_debt(debts: dict[tuple[bytes, bytes], int]) -> None:
    before, left = without_zeros(positions(debts)), netted(debts)
    assert without_zeros(positions(left)) == before
    found = find_cycles(debts)
    for cycle in found:
        smaller = cleared(left, cycle)
        assert without_zeros(positions(smaller)) == before
        assert sum(smaller.values()) == sum(left.values()) - cycle.amount_micro * len(cycle.parties)
        assert set(smaller) < set(left), "each takes at least one debt away whole"
        left = smaller
    assert len(found) == params.CREDIT_CLEARINGS_MAX or not find_cycles(left), "and in the end there is none left"


@given(DEBTS, st.randoms(use_true_random=False))
def test_who_knows_the_same_debts_finds_the_same_cycles(
    debts: dict[tuple[bytes, bytes], int], order: random.Random
) -> None:
    shuffled = list(debts.items())
    order.shuffle(shuffled)
    found = find_cycles(debts)
    assert find_cycles(dict(shuffled)) == found
    for cycle in found:
        assert 3 <= len(cycle.parties) == len(set(cycle.parties))
        assert cycle.parties[0] == min(cycle.parties)


def test_a_cycle_falls_by_its_smallest_debt_and_no_more() -> None:
    a, b, c = PEERS[:3]
    debts = {(a, b): 5, (b, c): 3, (c, a): 4}
    assert find_cycles(debts) == [Cycle((a, b, c), 3)]
    assert cleared(debts, Cycle((a, b, c), 3)) == {(a, b): 2, (c, a): 1}
    with pytest.raises(InsufficientFunds, match="a debt of 3 micro-credits cannot fall by 4"):
        cleared(debts, Cycle((a, b, c), 4))
    assert find_cycles(debts, length_max=2) == []


def test_what_is_left_of_a_line_counts_what_still_runs_and_what_is_owed_the_other_way() -> None:
    assert left_micro(limit_micro=10, owed_micro=4, open_micro=3) == 3
    assert left_micro(limit_micro=10, owed_micro=4, open_micro=7) == 0
    assert left_micro(limit_micro=10, owed_micro=-5, open_micro=0) == 15


# --- two peers -------------------------------------------------------------------------------------------------
def mutual(seed: int, faults: Faults) -> Simulation:
    """Ann owes Ben for two jobs and Ben owes Ann for one."""
    simulation = make_friends(seed, faults)
    simulation.run(seconds=3)
    give(simulation, "ben", "ann")
    give(simulation, "ann", "ben")
    for submitter, task in (("ann", 7), ("ben", 8), ("ann", 9)):
        assert done(simulation, submitter, work_for(simulation, submitter, seed=task))["state"] == "done"
    return simulation


@pytest.mark.parametrize("asks", ["ann", "ben"])
def test_two_who_worked_for_each_other_sign_what_is_left_and_forget_the_deals(asks: str) -> None:
    simulation = mutual(1, Faults(until_ns=0))
    assert owed(simulation, "ben", "ann") == PRICE_MICRO
    simulation.command(asks, "credit-net", {"peer": ""})
    simulation.run(seconds=5)
    for name, other in (("ann", "ben"), ("ben", "ann")):
        account = credit_of(simulation, name).accounts[key_of(simulation, other)]
        assert (account.sequence, account.settled) == (1, {})
        assert all(row.netted for row in credit_of(simulation, name).rows.values())
    assert owed(simulation, "ben", "ann") == PRICE_MICRO
    assert done(simulation, "ben", work_for(simulation, "ben", seed=10))["state"] == "done"
    assert owed(simulation, "ben", "ann") == 0
    simulation.command(asks, "credit-net", {"peer": ""})
    simulation.run(seconds=5)
    assert credit_of(simulation, "ann").accounts[key_of(simulation, "ben")].sequence == 2
    assert not simulation.penalties
    simulation.check_quiet()


def books(simulation: Simulation, name: str) -> dict[str, object]:
    """All that a peer knows of debts."""
    credit = credit_of(simulation, name)
    return {
        "accounts": credit.accounts, "rows": credit.rows, "given": credit.given, "got": credit.got,
        "described": [row | {"connected": None} for row in credit.describe()],
        "clearings": node_of(simulation, name).settler.netting.clearings,
    }  # fmt: skip


def check_restarts(simulation: Simulation) -> None:
    """Every peer starts again from its disk into the books that it has."""
    for name in FRIENDS:
        peer = simulation.peers[name]
        if peer.node is not None:
            before = books(simulation, name)
            peer.node = simulation._load(peer, random.Random(0))
            assert books(simulation, name) == before, name


class Killer:
    """Kills a peer at its `at`-th turn that changes the store: before the commit, or after it and before the sends."""

    def __init__(self, simulation: Simulation, name: str, at: int, *, committed: bool) -> None:
        self.simulation, self.name, self.at, self.committed = simulation, name, at, committed
        self.turns = 0
        self.commit = simulation._commit
        simulation._commit = self._commit  # type: ignore[method-assign, assignment]

    def _commit(self, peer: object, effects: list[object]) -> None:
        mine = peer is self.simulation.peers[self.name] and any(isinstance(e, Save) for e in effects)
        self.turns += mine
        if not mine or self.turns != self.at:
            self.commit(peer, effects)  # type: ignore[arg-type]
            return
        if self.committed:
            self.commit(peer, effects)  # type: ignore[arg-type]
        effects.clear()
        self.simulation.crash(self.name)


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("name", ["ann", "ben"])
def test_killed_at_every_write_nothing_is_lost_or_doubled(name: str, committed: bool) -> None:
    at, turns = 0, 1
    while at < turns:
        at += 1
        simulation = make_friends(11)
        simulation.run(seconds=3)
        give(simulation, "ben", "ann")
        job = work_for(simulation, "ann", segments=2)
        killer = Killer(simulation, name, at, committed=committed)
        assert done(simulation, "ann", job)["state"] == "done", (at, committed)
        rest(simulation, seconds=250)  # whoever lost the other's last word closes alone by then
        simulation.command("ann", "credit-net", {})
        rest(simulation, seconds=30)
        ann, ben = key_of(simulation, "ann"), key_of(simulation, "ben")
        if not credit_of(simulation, "ann").accounts[ben].sequence:  # it was the netting that was killed
            simulation.command("ann", "credit-net", {})
            rest(simulation, seconds=30)
        assert owed(simulation, "ben", "ann") == PRICE_MICRO // 3, (at, committed)
        assert [credit_of(simulation, n).accounts[o].sequence for n, o in (("ann", ben), ("ben", ann))] == [1, 1]
        check_restarts(simulation)
        turns = max(turns, killer.turns)
    assert turns >= 10


# --- a cycle ---------------------------------------------------------------------------------------------------
def ring(seed: int, faults: Faults = Faults(until_ns=0)) -> Simulation:  # noqa: B008  # frozen
    """Ann owes Ben one job, Ben owes Cat two, Cat owes Ann one."""
    simulation = make_friends(seed, faults)
    simulation.run(seconds=3)
    for creditor, debtor in (("ben", "ann"), ("cat", "ben"), ("ann", "cat")):
        give(simulation, creditor, debtor)
    for number, debtor in enumerate(("ann", "ben", "ben", "cat")):
        assert done(simulation, debtor, work_for(simulation, debtor, seed=20 + number))["state"] == "done"
    return simulation


def position(simulation: Simulation, name: str) -> int:
    """What a peer is owed, less what it owes, by its own books."""
    return sum(credit_of(simulation, name).balance_micro(key_of(simulation, other)) for other in FRIENDS)


def test_a_cycle_of_debts_falls_by_the_smallest_once_all_three_have_signed() -> None:
    simulation = ring(12)
    before = {name: position(simulation, name) for name in FRIENDS}
    simulation.command("cat", "credit-net", {})
    simulation.run(seconds=10)
    assert (owed(simulation, "ben", "ann"), owed(simulation, "cat", "ben"), owed(simulation, "ann", "cat")) == (
        0, PRICE_MICRO, 0,
    )  # fmt: skip
    assert {name: position(simulation, name) for name in FRIENDS} == before
    simulation.command("ann", "credit-net", {})
    simulation.command("ben", "credit-net", {})
    simulation.run(seconds=10)
    for name in FRIENDS:
        assert not any(account.settled for account in credit_of(simulation, name).accounts.values())
    assert {name: position(simulation, name) for name in FRIENDS} == before
    check_restarts(simulation)
    assert not simulation.penalties


@pytest.mark.parametrize("seed", range(6))
def test_a_clearing_ends_alike_on_all_peers_whatever_is_lost(seed: int) -> None:
    simulation = ring(30 + seed)
    before = {name: position(simulation, name) for name in FRIENDS}
    until_ns = simulation.now_ns - START_NS + 60 * 10**9
    simulation.faults = Faults(loss=0.4, duplication=0.3, crash=0.02, until_ns=until_ns)
    simulation.command("ann", "credit-net", {})
    simulation.run(seconds=200)
    for name in FRIENDS:
        simulation.command(name, "credit-net", {})
    simulation.run(seconds=200)
    assert (owed(simulation, "ben", "ann"), owed(simulation, "cat", "ben"), owed(simulation, "ann", "cat")) == (
        0, PRICE_MICRO, 0,
    )  # fmt: skip
    assert {name: position(simulation, name) for name in FRIENDS} == before
    check_restarts(simulation)


def test_without_one_signature_nothing_falls_and_the_debts_are_free_again_in_time() -> None:
    simulation = ring(13)
    simulation.crash("cat", for_ns=0)
    keys = [key_of(simulation, name) for name in FRIENDS]
    start = keys.index(min(keys))
    clearing = Clearing(
        network=simulation.network.id, parties=(*keys[start:], *keys[:start]), amount_micro=PRICE_MICRO,
        number=0,
    )  # fmt: skip
    ann, ben = simulation.peers["ann"].key, node_of(simulation, "ben")
    offer = pack(ClearingOffer((seal(clearing, ann),)))
    ben.handle(MessageIn(ann.public, offer), simulation.now_ns)
    assert owed(simulation, "ben", "ann") == PRICE_MICRO
    edge = (ann.public, ben.desk.me)
    assert ben.settler.netting._held_micro(*edge) == PRICE_MICRO
    rest(simulation, seconds=700)
    assert ben.settler.netting._held_micro(*edge) == 0
    assert owed(simulation, "ben", "ann") == PRICE_MICRO


@pytest.mark.parametrize(
    "wrong", ["too much", "a stranger", "twice the same", "not in order", "of another number", "of two clearings"]
)
def test_a_clearing_that_is_not_right_is_not_signed(wrong: str) -> None:
    simulation = ring(14)
    keys = [key_of(simulation, name) for name in FRIENDS]
    start = keys.index(min(keys))
    parties = [*keys[start:], *keys[:start]]
    amount, number = PRICE_MICRO, 0
    if wrong == "too much":
        amount += 1
    elif wrong == "a stranger":
        parties[parties.index(key_of(simulation, "cat"))] = key_of(simulation, "rich")
        parties = parties[parties.index(min(parties)) :] + parties[: parties.index(min(parties))]
    elif wrong == "twice the same":
        parties[parties.index(key_of(simulation, "cat"))] = key_of(simulation, "ann")
    elif wrong == "not in order":
        parties = [*parties[1:], parties[0]]
    elif wrong == "of another number":
        number = 1
    ann, ben = simulation.peers["ann"].key, node_of(simulation, "ben")

    def signed(by_micro: int) -> bytes:
        network = simulation.network.id
        return seal(Clearing(network=network, parties=tuple(parties), amount_micro=by_micro, number=number), ann)

    consents = (signed(amount), signed(amount - 1)) if wrong == "of two clearings" else (signed(amount),)
    effects = ben.handle(MessageIn(ann.public, pack(ClearingOffer(consents))), simulation.now_ns)
    assert not [e for e in effects if isinstance(e, Save)]
    kinds = {e.kind for e in effects if isinstance(e, Emit)}
    assert kinds & {"clearing-refused", "refused-bytes"}
    assert not ben.settler.netting.clearings
