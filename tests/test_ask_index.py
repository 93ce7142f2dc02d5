"""The asks in columns: whatever is put, replaced and dropped, each question has the answer of a scan with the rule."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from market.ask_index import AskIndex
from market.feasibility import refuse_ask
from market.matching import Proven
from protocol.codec import blake
from protocol.records import Ask, Offer
from tests.test_market import NOW, ask, offer

PEERS = [blake("peer", bytes([n])) for n in range(5)] + [bytes(31) + b"\1", bytes(31) + b"\2"]  # two with one head
EDGES = st.sampled_from([0, 1, 10**9, 10**12, 2**62, 2**63 - 1])
ASKS = st.builds(
    lambda **terms: ask(0, **terms),
    peer=st.sampled_from(PEERS), slot=st.sampled_from([0, 1, 2**63 - 1]), roles=st.integers(0, 7),
    unit_price=st.sampled_from([0, 1, 700, 701, 10**12]), sandbox=st.integers(0, 4),
    memory_bytes=EDGES, device=st.sampled_from(["cpu", "gpu"]), device_memory_bytes=EDGES,
    operations_per_second=st.one_of(EDGES, st.integers(0, 10**13)), expires_ns=st.integers(NOW, NOW + 4),
)  # fmt: skip
OFFERS = st.builds(
    offer,
    submitter=st.sampled_from(PEERS), mode=st.sampled_from(["exact", "script", "profile"]),
    operations=st.one_of(st.integers(1, 10**15), EDGES), unit_price_max=st.sampled_from([0, 1, 700, 10**10, 10**12]),
    memory_bytes=EDGES, device_memory_bytes=EDGES, sandbox=st.integers(0, 4), lock_micro=st.integers(0, 200),
    device=st.sampled_from(["any", "cpu", "gpu"]),
    content_bytes=st.sampled_from([0, 1, 10**9, 2**63 - 1]), checkpoint_bytes=st.sampled_from([0, 100, 10**8]),
    deadline_ns=st.one_of(
        st.sampled_from([0, 1, NOW, NOW + 1, NOW + 10**9, NOW + 10**12, 2**63 - 1]), st.integers(NOW, NOW + 10**14)
    ),
)  # fmt: skip


def key(one: Ask) -> tuple[bytes, int]:
    return one.peer, one.slot


def by_price(one: Ask) -> tuple[int, bytes, int]:
    return one.unit_price, one.peer, one.slot


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = AskIndex()
        self.model: dict[tuple[bytes, int], Ask] = {}

    @rule(one=ASKS)
    def put(self, one: Ask) -> None:
        self.index.put(one)
        self.model[key(one)] = one

    @rule(peer=st.sampled_from(PEERS))
    def remove(self, peer: bytes) -> None:
        self.index.remove_peer(peer)
        self.model = {k: one for k, one in self.model.items() if one.peer != peer}

    @rule(after=st.integers(0, 4))
    def expire(self, after: int) -> None:
        left = {k: one for k, one in self.model.items() if one.expires_ns > NOW + after}
        assert self.index.expire(now_ns=NOW + after) == len(self.model) - len(left)
        self.model = left

    @rule(role=st.integers(1, 7), after=st.integers(0, 4), peers=st.lists(st.sampled_from(PEERS), unique=True))
    def ask_for_a_role(self, role: int, after: int, peers: list[bytes]) -> None:
        live = sorted((o for o in self.model.values() if o.roles & role and o.expires_ns > NOW + after), key=key)
        assert self.index.live(role=role, now_ns=NOW + after) == live
        assert self.index.live(role=role, now_ns=NOW + after, peers=peers) == [o for o in live if o.peer in peers]

    @rule(memory=EDGES, sandbox=st.integers(0, 4), count=st.integers(0, 6), without=st.sampled_from(PEERS))
    def look_for_means(self, memory: int, sandbox: int, count: int, without: bytes) -> None:
        shelf = self.index.shelf(role=3, now_ns=NOW, memory_bytes=memory, sandbox=sandbox, without=(without,))
        fit = [
            one for one in self.model.values()
            if one.roles & 3 and one.expires_ns > NOW and one.memory_bytes >= memory and one.sandbox >= sandbox
            and one.peer != without
        ]  # fmt: skip
        assert len(shelf) == len(fit)
        assert sorted(zip(shelf.unit_prices, shelf.speeds, strict=True)) == sorted(
            (one.unit_price, one.operations_per_second) for one in fit
        )
        assert shelf.cheapest(count) == sorted(fit, key=by_price)[:count]

    @invariant()
    def every_author_is_counted(self) -> None:
        counted = Counter(peer for peer, _ in self.model)
        assert len(self.index) == len(self.model)
        assert {peer: self.index.count_of(peer) for peer in PEERS} == {peer: counted[peer] for peer in PEERS}
        assert {key(one): one for one in self.index} == self.model
        assert all(self.index.get(*k) == one for k, one in self.model.items())


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@settings(max_examples=400, deadline=None)
@given(OFFERS, st.lists(ASKS, max_size=20), st.lists(st.sampled_from(PEERS), unique=True), st.integers(0, 5))
def test_a_survey_is_the_rule_held_against_each_ask(
    wanted: Offer, asks: list[Ask], known: list[bytes], count: int
) -> None:
    """Of strangers by their words alone; of peers that are known with what is known of them."""
    index = AskIndex()
    for one in asks:
        index.put(one)
    live = [one for one in index if one.expires_ns > NOW]

    def refuse(one: Ask) -> Any:
        facts: dict[str, Any] = {"reachable": True, "free_stake_micro": 2**63}
        if one.peer in known:
            facts = {"reachable": one.peer != PEERS[0], "free_stake_micro": 100, "bytes_per_second": 10**5}
            facts["proven"] = Proven("witnessed", 10**10)
        return refuse_ask(wanted, one, now_ns=NOW, **facts)

    found = index.survey(wanted, now_ns=NOW, known=known, refuse=refuse, cheapest=count)
    able = [one for one in live if refuse(one) is None]
    assert (found.heard, found.able) == (len(live), len(able))
    assert found.refused == Counter(refusal.code for one in live if (refusal := refuse(one)) is not None)
    assert found.cheapest == tuple(sorted(able, key=by_price)[:count])
