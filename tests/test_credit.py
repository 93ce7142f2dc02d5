"""Mutual credit: who has no deposit works and lets work by what acquaintances trust it with, and no ledger knows."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from peer.credit_messages import NetBack, NetOffer
from peer.events import Emit, GossipIn, MessageIn, Penalise, Save
from peer.messages import Records, pack
from peer.simulator import SECOND, START_NS, Faults, Simulation
from protocol import params
from protocol.bundle import make_bundle, verify_bundle
from protocol.codec import encode
from protocol.credit_records import ON_CREDIT, CreditLine, Netting
from protocol.keys import SigningKey, peer_name
from protocol.network import dump
from protocol.records import Agreement, Claim, add_signature, open_record, seal
from tests.credit_scene import (
    PRICE_MICRO,
    credit_of,
    done,
    give,
    key_of,
    make_friends,
    make_indebted,
    node_of,
    owed,
    work_for,
)

NUMBERS = itertools.count(1)  # two lines of one number would convict Eve instead
EVE = SigningKey.from_seed(b"e" * 32)


def told(simulation: Simulation, name: str, kind: str) -> list[dict[str, object]]:
    """What a peer told people."""
    return [data for _, who, what, data in simulation.log if (who, what) == (name, kind)]


@pytest.fixture(scope="module")
def indebted() -> Simulation:
    """Ann owes Ben for one job."""
    return make_indebted()


# --- work ----------------------------------------------------------------------------------------------------
def test_who_has_no_deposit_gets_its_job_done_by_who_gives_it_credit() -> None:
    simulation = make_friends(1)
    simulation.run(seconds=3)
    give(simulation, "ben", "ann")
    before = node_of(simulation, "rich").desk.ledger.balances()
    state = done(simulation, "ann", work_for(simulation, "ann"))
    assert (state["state"], state["segments_done"], state["assurance"]) == ("done", 6, ON_CREDIT), state["reason"]
    (deal,) = state["deals"]  # type: ignore[misc]
    assert (deal["channel_micro"], deal["lock_micro"], deal["state"]) == (0, 0, "settled")
    assert owed(simulation, "ben", "ann") == PRICE_MICRO
    for name in simulation.peers:
        assert node_of(simulation, name).desk.ledger.balances() == before, "no deposit moves"
        assert not node_of(simulation, name).settler.log, "and no log that all share knows"
    assert not credit_of(simulation, "cat").rows
    assert not simulation.penalties
    simulation.check_quiet()


def test_its_proof_says_that_it_is_owed_and_that_nobody_checked_it(indebted: Simulation) -> None:
    (job,) = indebted.command("ann", "jobs", {}).result["jobs"]
    evidence = indebted.command("ann", "bundle", {"job": job["job"]}).result
    text = dump(indebted.network)
    as_json = msgspec.json.decode(msgspec.json.encode(_hexed(evidence)))
    report = verify_bundle(make_bundle(as_json, network=text, state={}), indebted.network.id)
    assert report.complete
    assert (report.money.earned_micro, report.money.settled_micro) == (PRICE_MICRO, 0)
    assert "0.06 credits are owed for work on credit, as operations and prices say" in report.proved()
    assert f"6 segment(s) that nobody re-executed: {ON_CREDIT}" in report.not_proved()


def _hexed(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [_hexed(one) for one in value]
    return {key: _hexed(one) for key, one in value.items()} if isinstance(value, dict) else value


def test_only_who_gives_the_submitter_credit_bids_and_others_know_why_not() -> None:
    simulation = make_friends(2)
    simulation.run(seconds=3)
    give(simulation, "ben", "ann")
    job = work_for(simulation, "ann")
    simulation.run(seconds=2)
    assert [refusal.code for refusal in node_of(simulation, "cat").bidder.refusals.values()] in ([], ["credit"])
    assert [data["code"] for data in told(simulation, "cat", "no-bid")] == ["credit"]
    (deal,) = done(simulation, "ann", job)["deals"]  # type: ignore[misc]
    assert deal["solver"] == peer_name(key_of(simulation, "ben"))


def test_a_job_beyond_every_line_is_refused_and_one_within_waits_for_what_is_left() -> None:
    simulation = make_friends(3)
    simulation.run(seconds=3)
    give(simulation, "ben", "ann", 2 * PRICE_MICRO + PRICE_MICRO // 2)
    done(simulation, "ann", work_for(simulation, "ann"))
    arguments = {"peer": peer_name(key_of(simulation, "ann"))}
    simulation.command("ben", "credit-revoke", arguments)
    simulation.run(seconds=2)
    with pytest.raises(AssertionError, match="no solver gives this peer credit"):
        work_for(simulation, "ann", seed=8)
    assert owed(simulation, "ben", "ann") == PRICE_MICRO, "a line that is closed forgives nothing"
    give(simulation, "ben", "ann", 2 * PRICE_MICRO + PRICE_MICRO // 2)
    with pytest.raises(AssertionError, match=r"1 solver, 0\.09 credits left"):
        work_for(simulation, "ann", seed=8)  # at its price limit it could cost twice as much
    with pytest.raises(AssertionError, match="--credit"):
        work_for(simulation, "ann", seed=8, credit=False)


def test_the_creditor_signs_nothing_that_could_take_the_debtor_over_the_limit() -> None:
    """The debtor's peer is patched to believe in a larger line: the creditor's own books decide."""
    simulation = make_friends(4, slots=3)
    simulation.run(seconds=3)
    give(simulation, "ben", "ann", 2 * PRICE_MICRO)
    ann = credit_of(simulation, "ann")
    ann.left_micro = lambda **_: 10**9  # type: ignore[method-assign]
    for seed in (7, 8, 9):
        work_for(simulation, "ann", seed=seed)
    simulation.run(seconds=90)
    states = [job["state"] for job in simulation.command("ann", "jobs", {}).result["jobs"]]
    assert sorted(states) == ["done", "done", "offered"]
    assert owed(simulation, "ben", "ann") == 2 * PRICE_MICRO
    assert "credit" in {data["code"] for data in told(simulation, "ben", "no-bid")}
    ben = credit_of(simulation, "ben")
    proposal = _proposal(simulation, line=ben.given[key_of(simulation, "ann")].id)
    refusal = ben.refuse(proposal)
    assert refusal is not None
    assert (refusal.code, refusal.why) == ("credit", "the deal can come to 0.000001 credits, 0.00 of the line are left")
    assert ben.refuse(msgspec.structs.replace(proposal, lock_micro=1)).code == "terms"  # type: ignore[union-attr]
    assert ben.refuse(msgspec.structs.replace(proposal, credit=b"x" * 32)).code == "credit"  # type: ignore[union-attr]


def _proposal(simulation: Simulation, *, line: bytes, price: int = 1) -> Agreement:
    zero = bytes(32)
    return Agreement(
        network=simulation.network.id, offer=zero, bid=zero, task=zero, submitter=key_of(simulation, "ann"),
        solver=key_of(simulation, "ben"), sequence=1, first_segment=0, last_segment=1, base_root=zero,
        operations=10**9, unit_price=price, channel_micro=0, lock_micro=0, check_permille=0, submitter_commitment=zero,
        solver_commitment=zero, forced_commitment=zero, accept_before_ns=1, segment_deadline_ns=1, created_ns=1,
        credit=line,
    )  # fmt: skip


def test_why_says_what_credit_there_is() -> None:
    simulation = make_friends(5)
    simulation.run(seconds=3)
    give(simulation, "ben", "ann", 3_200_000)
    simulation.crash("ben", for_ns=0)
    simulation.run(seconds=2)
    job = work_for(simulation, "ann")
    simulation.run(seconds=3)
    reasons = {one["code"]: one for one in simulation.command("ann", "why", {"of": job}).result["reasons"]}
    assert "credit lines: 1 solver, 3.20 credits left" in reasons["on-credit"]["words"]
    assert reasons["credit"]["count"] == 1, "cat gives none"


def test_a_solver_whose_friend_falls_silent_keeps_its_last_voucher_as_a_debt() -> None:
    simulation = make_friends(6)
    simulation.run(seconds=3)
    give(simulation, "ben", "ann")
    job = work_for(simulation, "ann")
    simulation.run(
        seconds=60, until=lambda: simulation.command("ann", "job", {"job": job}).result["segments_done"] == 3
    )
    simulation.crash("ann", for_ns=0)
    simulation.run(seconds=400)
    assert credit_of(simulation, "ben").balance_micro(key_of(simulation, "ann")) == PRICE_MICRO // 2
    (row,) = credit_of(simulation, "ben").rows.values()
    assert row.closed == "claimed"
    assert node_of(simulation, "ben").solver.slots_free() == 1


def test_a_cancelled_job_owes_its_receipts_and_frees_the_rest_of_the_line() -> None:
    simulation = make_friends(7)
    simulation.run(seconds=3)
    give(simulation, "ben", "ann", 2 * PRICE_MICRO)
    job = work_for(simulation, "ann")
    simulation.run(
        seconds=60, until=lambda: simulation.command("ann", "job", {"job": job}).result["segments_done"] == 2
    )
    ann, ben = key_of(simulation, "ann"), key_of(simulation, "ben")
    assert credit_of(simulation, "ann").left_micro(creditor=ben, debtor=ann) == PRICE_MICRO
    simulation.command("ann", "cancel", {"job": job})
    simulation.run(seconds=60)
    assert owed(simulation, "ben", "ann") == 20_000
    for name in ("ann", "ben"):
        assert credit_of(simulation, name).left_micro(creditor=ben, debtor=ann) == 2 * PRICE_MICRO - 20_000


# --- hostile ---------------------------------------------------------------------------------------------------
def give_bytes(simulation: Simulation, name: str, *envelopes: bytes, gossip: bool = False) -> list[object]:
    event = (
        GossipIn("market", EVE.public, encode(list(envelopes)))
        if gossip
        else MessageIn(EVE.public, pack(Records(tuple(envelopes))))
    )
    return list(node_of(simulation, name).handle(event, simulation.now_ns))


def outcome(effects: list[object]) -> str:
    kinds = {e.data.get("code", "") if e.kind == "refused-bytes" else e.kind for e in effects if isinstance(e, Emit)}
    return " ".join(sorted(kinds & {"verification-failed", "wrong-network", "malformed", "ignored", "credit-line"}))


def line(simulation: Simulation, **changes: object) -> bytes:
    fields: dict[str, object] = {
        "network": simulation.network.id, "creditor": EVE.public, "debtor": key_of(simulation, "ann"),
        "sequence": next(NUMBERS), "limit_micro": 1, "created_ns": simulation.now_ns,
        "expires_ns": simulation.now_ns + 10 * SECOND,
    }  # fmt: skip
    return seal(CreditLine(**{**fields, **changes}), EVE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"network": bytes(32)}, "wrong-network"),
        ({"creditor": bytes(32)}, "verification-failed"),
        ({"debtor": bytes(32)}, "verification-failed"),
        ({"debtor": EVE.public}, "verification-failed"),
        ({"created_ns": START_NS + 10**16, "expires_ns": START_NS + 2 * 10**16}, "verification-failed"),
        ({"expires_ns": 1}, "verification-failed"),
        ({"expires_ns": START_NS + params.CREDIT_LIFETIME_NS_MAX * 2}, "verification-failed"),
        ({"limit_micro": params.AMOUNT_MICRO_MAX + 1}, "malformed"),
        ({"created_ns": 1, "expires_ns": 2}, "ignored"),
    ],
)
def test_a_line_that_is_not_right_changes_nothing(
    indebted: Simulation, change: dict[str, object], found: str
) -> None:
    for gossip in (False, True):
        effects = give_bytes(indebted, "ann", line(indebted, **change), gossip=gossip)
        assert outcome(effects) == found
        assert not [e for e in effects if isinstance(e, Save)]
        assert bool([e for e in effects if isinstance(e, Penalise)]) == (found != "ignored")


def test_an_older_line_replays_to_nothing_and_two_of_one_number_bar_their_creditor() -> None:
    simulation = make_friends(8)
    simulation.run(seconds=3)
    old, new = line(simulation, sequence=1, limit_micro=9), line(simulation, sequence=2, limit_micro=5)
    assert outcome(give_bytes(simulation, "ann", new)) == "credit-line"
    assert outcome(give_bytes(simulation, "ann", old)) == "ignored"
    assert outcome(give_bytes(simulation, "ann", new)) == ""
    ann = node_of(simulation, "ann")
    assert ann.settler.credit.left_micro(creditor=EVE.public, debtor=ann.desk.me) == 5
    effects = give_bytes(simulation, "ann", line(simulation, sequence=2, limit_micro=7))
    assert [e.data["peer"] for e in effects if isinstance(e, Emit) and e.kind == "barred"] == [EVE.public]
    assert ann.settler.credit.left_micro(creditor=EVE.public, debtor=ann.desk.me) == 5


def test_no_deal_on_credit_enters_the_ledger_or_anothers_books(indebted: Simulation) -> None:
    (row,) = credit_of(indebted, "ben").rows.values()
    effects = give_bytes(indebted, "rich", row.agreement, gossip=True)
    assert outcome(effects) == "verification-failed"
    agreement, _, _ = open_record(row.agreement, network=indebted.network.id)
    assert isinstance(agreement, Agreement)
    # As if there were no line behind it: without a channel no ledger takes it either.
    ann, ben = indebted.peers["ann"].key, indebted.peers["ben"].key
    bare = seal(msgspec.structs.replace(agreement, credit=bytes(32)), ann)
    both = add_signature(bare, ben, network=indebted.network.id)
    assert outcome(give_bytes(indebted, "rich", both, gossip=True)) == "verification-failed"
    assert outcome(give_bytes(indebted, "ben", row.agreement)) == "", "known, and closed: it is not opened again"
    assert owed(indebted, "ben", "ann") == PRICE_MICRO


def test_a_debtor_cannot_close_its_creditors_books() -> None:
    simulation = make_friends(9)
    simulation.run(seconds=3)
    give(simulation, "ben", "ann")
    job = work_for(simulation, "ann")
    simulation.run(
        seconds=60, until=lambda: simulation.command("ann", "job", {"job": job}).result["segments_done"] == 2
    )
    (deal,) = credit_of(simulation, "ben").rows
    ann = simulation.peers["ann"].key
    claim = seal(Claim(network=simulation.network.id, agreement=deal, author=ann.public, voucher=b"", fees=()), ann)
    assert outcome(give_bytes(simulation, "ben", claim)) == "verification-failed"
    assert done(simulation, "ann", job)["state"] == "done"
    assert owed(simulation, "ben", "ann") == PRICE_MICRO


def test_a_netting_that_forgives_is_not_signed(indebted: Simulation) -> None:
    """Whichever of the two is first: it offers a netting in which the debt is gone."""
    pair = sorted(("ann", "ben"), key=lambda name: key_of(indebted, name))
    first, second = (indebted.peers[name] for name in pair)
    books = credit_of(indebted, pair[1])
    (settled,) = books.accounts[first.key.public].settled.values()
    for micro, owes in ((1, 0), (1, 1), (settled.micro, 0)):
        covers = (msgspec.structs.replace(settled, micro=micro),)
        from protocol.credit_records import covered_digest

        netting = Netting(
            network=indebted.network.id, first=first.key.public, second=second.key.public, sequence=1,
            previous=bytes(32), covered=covered_digest(covers), first_owes_micro=0, second_owes_micro=owes,
            created_ns=indebted.now_ns,
        )  # fmt: skip
        offer = NetOffer(seal(netting, first.key), covers)
        effects = node_of(indebted, pair[1]).handle(MessageIn(first.key.public, pack(offer)), indebted.now_ns)
        assert not [e for e in effects if isinstance(e, Save)]
        if settled.debtor == first.key.public or micro == settled.micro:
            assert outcome(list(effects)) == "verification-failed"
    stray = NetBack(seal(netting, first.key))
    effects = node_of(indebted, pair[1]).handle(MessageIn(first.key.public, pack(stray)), indebted.now_ns)
    assert outcome(list(effects)) == "verification-failed"


# --- faults ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(12))
def test_no_loss_delay_or_crash_makes_two_books_differ(seed: int) -> None:
    simulation = make_friends(100 + seed, Faults.drawn_from(seed))
    simulation.run(seconds=3)
    while simulation.peers["ben"].node is None or simulation.peers["ann"].node is None:
        simulation.run(seconds=3)
    give(simulation, "ben", "ann")
    while simulation.peers["ann"].node is None or not credit_of(simulation, "ann").to_spend():
        simulation.run(seconds=5)
    job = work_for(simulation, "ann")
    assert done(simulation, "ann", job, seconds=900)["state"] == "done"
    simulation.run(seconds=300)
    ann, ben = key_of(simulation, "ann"), key_of(simulation, "ben")
    creditor, debtor = credit_of(simulation, "ben").balance_micro(ann), -credit_of(simulation, "ann").balance_micro(ben)
    assert PRICE_MICRO <= creditor <= debtor, "a last voucher may not have come; the debtor knows that it signed it"
    simulation.command("ann", "credit-net", {})
    simulation.run(seconds=30)
    assert owed(simulation, "ben", "ann") == creditor
    assert not simulation.penalties
    simulation.check_quiet()
