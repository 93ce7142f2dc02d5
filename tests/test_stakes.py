"""Credits go into a stake at once and out of it after a window, in which a penalty still finds them."""

from __future__ import annotations

from itertools import permutations

import msgspec
import pytest

from market.entries import BURNED, POOL, Account
from protocol import params
from protocol.equivocation import ordered_twice, prove
from protocol.errors import MalformedRecord, VerificationFailed, WrongNetwork
from protocol.keys import SigningKey
from protocol.network import Network, Rules
from protocol.records import StakeMove, add_signature, open_record, seal
from protocol.stake_records import unbonding_ns
from tests.test_settlement_machine import (
    FREE_MICRO,
    FREE_NETWORK,
    JUDGED_NETWORK,
    KEYS,
    LOCK_MICRO,
    NOTARIES,
    RULES,
    SECOND,
    STAKE_MICRO,
    Deal,
    Peer,
    moved,
)

WORD = RULES.checker_stake_min_micro
WINDOW_S = unbonding_ns(JUDGED_NETWORK) // SECOND


def buckets(peer: Peer, owner: str) -> tuple[int, int, int]:
    """Free, stake and unbonding of somebody, in micro-credits."""
    key = KEYS[owner].public
    free = peer.ledger.balance_micro(Account(key, "free"))
    return free, peer.settler.free_stake(key), peer.settler.stakes.unbonding_micro(key)


def restarted(peer: Peer) -> Peer:
    before = peer.ledger.balances()
    peer.settler = peer.start()
    peer.commit()
    assert peer.ledger.balances() == before
    return peer


@pytest.mark.parametrize("network", [FREE_NETWORK, JUDGED_NETWORK], ids=["free", "judged"])
def test_an_add_counts_at_once_and_a_withdrawal_is_free_after_its_window(network: Network) -> None:
    peer = Peer(network)
    window_s = unbonding_ns(network) // SECOND
    peer.give(moved(network, "solver", "add", 5_000_000))
    assert buckets(peer, "solver") == (FREE_MICRO - 5_000_000, STAKE_MICRO + 5_000_000, 0)
    out = moved(network, "solver", "withdraw", 7_000_000, sequence=2)
    for _ in range(2):  # once more changes nothing
        peer.give(out)
        assert buckets(peer, "solver") == (FREE_MICRO - 5_000_000, STAKE_MICRO - 2_000_000, 7_000_000)
    peer.wait(window_s - 1)
    restarted(peer)
    peer.wait(0)
    assert buckets(peer, "solver") == (FREE_MICRO - 5_000_000, STAKE_MICRO - 2_000_000, 7_000_000)
    peer.wait(RULES.settle_silence_ms // 1000 if network.notaries else 1)  # a start waits for what was just ruled
    assert buckets(peer, "solver") == (FREE_MICRO + 2_000_000, STAKE_MICRO - 2_000_000, 0)
    restarted(peer)
    peer.wait(window_s)
    peer.give(out)
    assert buckets(peer, "solver") == (FREE_MICRO + 2_000_000, STAKE_MICRO - 2_000_000, 0)


def test_what_unbonds_locks_nothing_and_makes_nobody_a_checker() -> None:
    peer, deal = Peer(JUDGED_NETWORK), Deal(JUDGED_NETWORK, 0, "submitter", "solver")
    peer.give(moved(JUDGED_NETWORK, "solver", "withdraw", STAKE_MICRO - LOCK_MICRO + 1))
    peer.give(deal.opening)
    assert deal.id not in peer.settler.channels, "its lock does not find the stake"
    peer.give(moved(JUDGED_NETWORK, "solver", "add", 1_000, sequence=2))
    assert deal.id in peer.settler.channels, "and it waited for it"
    peer.give(moved(JUDGED_NETWORK, "verifier", "withdraw", STAKE_MICRO))
    assert peer.settler.free_stake(KEYS["verifier"].public) == 0
    challenge, dispute = deal.challenge("verifier", 3)
    peer.settler.judgement.challenged(open_record(challenge, network=JUDGED_NETWORK.id)[0], dispute)  # type: ignore[arg-type]
    assert not peer.settler.channels[deal.id].challenges, "it stakes no challenge either"


def test_a_verifier_does_not_escape_a_fault_by_withdrawing() -> None:
    peer, deal = Peer(JUDGED_NETWORK), Deal(JUDGED_NETWORK, 0, "submitter", "solver")
    peer.give(deal.opening)
    peer.give(moved(JUDGED_NETWORK, "verifier", "withdraw", STAKE_MICRO))
    peer.wait(WINDOW_S - 1)
    peer.give(deal.arbitration("wrong", "whistleblower", 3))
    peer.wait(2)  # the window is over, and the ruling is a moment old
    assert buckets(peer, "verifier")[2] == STAKE_MICRO
    restarted(peer)
    peer.give(deal.fault("verifier", 3))
    cost = min(WORD, LOCK_MICRO // 2)
    assert buckets(peer, "verifier") == (FREE_MICRO, 0, STAKE_MICRO - cost)
    assert peer.ledger.balance_micro(POOL) >= cost // 2
    peer.wait(RULES.settle_silence_ms // 1000 + 1)
    assert buckets(peer, "verifier") == (FREE_MICRO + STAKE_MICRO - cost, 0, 0)


def test_a_challenger_does_not_escape_its_loss_and_nobody_holds_withdrawals_for_ever() -> None:
    peer, deal = Peer(JUDGED_NETWORK), Deal(JUDGED_NETWORK, 0, "submitter", "solver")
    peer.give(deal.opening)
    peer.give(moved(JUDGED_NETWORK, "checker", "withdraw", STAKE_MICRO))
    peer.give(moved(JUDGED_NETWORK, "verifier", "withdraw", STAKE_MICRO, sequence=3))
    peer.wait(WINDOW_S - 1)
    challenge, dispute = deal.challenge("whistleblower", 3)
    peer.settler.judgement.challenged(open_record(challenge, network=JUDGED_NETWORK.id)[0], dispute)  # type: ignore[arg-type]
    peer.wait(600)
    restarted(peer)
    peer.wait(1)
    assert buckets(peer, "checker")[2] == STAKE_MICRO, "a dispute is open that may refute its verdict"
    peer.give(deal.arbitration("right", "checker", 4))
    assert buckets(peer, "checker")[2] == STAKE_MICRO - WORD
    peer.wait(WINDOW_S)
    assert buckets(peer, "verifier") == (FREE_MICRO + STAKE_MICRO, 0, 0)


def test_two_orders_of_one_number_burn_what_unbonds_too() -> None:
    opening = Deal(JUDGED_NETWORK, 0, "submitter", "solver").opening
    moves = [moved(JUDGED_NETWORK, "submitter", kind, 100_000) for kind in ("add", "withdraw")]
    for first, second in permutations((opening, *moves), 2):
        proof = prove(first, second, network=JUDGED_NETWORK.id)
        assert ordered_twice(proof) == 1
        peer = Peer(JUDGED_NETWORK)
        peer.give(moved(JUDGED_NETWORK, "submitter", "withdraw", STAKE_MICRO - 400_000, sequence=9))
        peer.give(first)
        with pytest.raises(VerificationFailed, match="two orders with one sequence number"):
            peer.settler.accept(second)
        stakes = peer.settler.stakes
        before = stakes.at_stake(KEYS["submitter"].public)
        for _ in range(2):
            peer.give(seal(proof, KEYS["checker"]))
            assert stakes.at_stake(KEYS["submitter"].public) == before - WORD
        assert peer.ledger.balance_micro(BURNED) == WORD
        peer = restarted(peer)
        assert peer.settler.stakes.at_stake(KEYS["submitter"].public) == before - WORD
        peer.ledger.check()


def test_penalties_and_a_withdrawal_leave_the_same_in_every_order() -> None:
    deal = Deal(JUDGED_NETWORK, 0, "submitter", "solver")
    for micro in (1_000, STAKE_MICRO - WORD // 2, STAKE_MICRO, 2 * STAKE_MICRO):
        records = [
            moved(JUDGED_NETWORK, "verifier", "withdraw", micro), deal.arbitration("wrong", "whistleblower", 3),
            deal.fault("verifier", 3), deal.arbitration("right", "verifier", 5),
        ]  # fmt: skip
        found = set()
        for order in permutations(records):
            peer = Peer(JUDGED_NETWORK)
            peer.give(deal.opening)
            for envelope in order:
                peer.give(envelope)
            found.add(buckets(peer, "verifier"))
        assert len(found) == 1, (micro, found)


def test_a_withdrawal_waits_for_a_stake_that_is_not_here_yet_and_not_for_one_that_a_penalty_took() -> None:
    deal = Deal(JUDGED_NETWORK, 0, "submitter", "solver")
    lost, add = deal.arbitration("right", "verifier", 5), moved(JUDGED_NETWORK, "verifier", "add", 10**6)
    out = moved(JUDGED_NETWORK, "verifier", "withdraw", STAKE_MICRO + 10**6, sequence=2)
    found = set()
    for order in permutations((lost, add, out)):
        peer = Peer(JUDGED_NETWORK)
        peer.give(deal.opening)
        for number, envelope in enumerate(order):
            peer.give(envelope)
            if number == 1:
                restarted(peer)
        peer.give(out)  # what waited in memory comes again
        assert not peer.settler.pending
        found.add(buckets(peer, "verifier"))
    assert found == {(FREE_MICRO - 10**6, 0, STAKE_MICRO + 10**6 - WORD)}
    known = moved(JUDGED_NETWORK, "verifier", "withdraw", STAKE_MICRO, sequence=2, lost=WORD)
    peer = Peer(JUDGED_NETWORK)
    for envelope in (deal.opening, lost, known):
        peer.give(envelope)
    assert buckets(peer, "verifier")[2] == 0, "its owner knew of the penalty, and wants more than it has"


def test_what_penalties_took_is_one_sum_in_every_order_or_the_next_withdrawal_would_wait_for_ever() -> None:
    deal, key = Deal(JUDGED_NETWORK, 0, "submitter", "solver"), KEYS["verifier"].public
    all_of_it = moved(JUDGED_NETWORK, "verifier", "withdraw", STAKE_MICRO)
    penalty = deal.arbitration("right", "verifier", 5)
    found = set()
    for order in permutations((all_of_it, penalty)):
        peer = Peer(JUDGED_NETWORK)
        for envelope in (deal.opening, *order):
            peer.give(envelope)
        found.add(peer.settler.stakes.lost[key])
        peer = restarted(peer)
        assert peer.settler.stakes.lost[key] == WORD
        peer.give(moved(JUDGED_NETWORK, "verifier", "add", 10**6, sequence=2))
        peer.give(moved(JUDGED_NETWORK, "verifier", "withdraw", 10**6, sequence=3, lost=WORD))
        assert not peer.settler.pending
        assert buckets(peer, "verifier") == (FREE_MICRO - 10**6, 0, STAKE_MICRO + 10**6 - WORD)
    assert found == {WORD}


def test_a_withdrawal_of_a_stake_that_penalties_took_whole_ends_and_takes_nothing_that_comes_later() -> None:
    opening = Deal(FREE_NETWORK, 0, "submitter", "solver").opening
    rival = moved(FREE_NETWORK, "submitter", "add", 100_000)
    fraud = seal(prove(opening, rival, network=FREE_NETWORK.id), KEYS["checker"])
    keep = moved(FREE_NETWORK, "submitter", "withdraw", STAKE_MICRO - WORD, sequence=8)
    out, found = moved(FREE_NETWORK, "submitter", "withdraw", WORD, sequence=9), set()
    for order in permutations((out, fraud)):
        peer = Peer(FREE_NETWORK)
        for envelope in (opening, keep, *order):
            peer.give(envelope)
        assert not peer.settler.pending
        peer = restarted(peer)
        peer.give(moved(FREE_NETWORK, "submitter", "add", 10**6, sequence=10))
        found.add(buckets(peer, "submitter"))
        peer.wait(WINDOW_S)
        peer.ledger.check()
    assert len(found) == 1, found


# --- what strangers send -------------------------------------------------------------------------------------
def record(**changes: object) -> StakeMove:
    fields: dict[str, object] = {
        "network": FREE_NETWORK.id, "owner": KEYS["solver"].public, "sequence": 1, "kind": "add",
        "amount_micro": 1_000_000, "created_ns": 1,
    }  # fmt: skip
    return StakeMove(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"amount_micro": 0}, {"amount_micro": params.STAKE_MOVE_MICRO_MIN - 1}, {"amount_micro": -1_000_000},
        {"amount_micro": params.AMOUNT_MICRO_MAX + 1}, {"kind": "burn"}, {"sequence": -1}, {"owner": bytes(31)},
        {"created_ns": 2**64}, {"lost_micro": -1}, {"lost_micro": 2**63},
    ],
)  # fmt: skip
def test_amounts_and_fields_out_of_bounds_are_malformed(changes: dict[str, object]) -> None:
    with pytest.raises((MalformedRecord, OverflowError)):
        Peer(FREE_NETWORK).settler.accept(seal(record(**changes), KEYS["solver"]))


def test_moves_that_are_forged_of_another_network_or_not_certified_change_nothing() -> None:
    other = Network("other", Rules(), FREE_NETWORK.deposits)
    for network, envelope, error in (
        (FREE_NETWORK, seal(record(), KEYS["worker"]), VerificationFailed),
        (FREE_NETWORK, add_signature(seal(record(), KEYS["solver"]), KEYS["worker"], network=FREE_NETWORK.id),
         VerificationFailed),
        (FREE_NETWORK, add_signature(seal(record(), KEYS["worker"]), NOTARIES[0], network=FREE_NETWORK.id),
         VerificationFailed),
        (FREE_NETWORK, seal(record(network=other.id), KEYS["solver"]), WrongNetwork),
        (JUDGED_NETWORK, seal(record(network=JUDGED_NETWORK.id), KEYS["solver"]), VerificationFailed),
    ):  # fmt: skip
        peer = Peer(network)
        with pytest.raises(error):
            peer.settler.accept(envelope)
        assert not peer.settler.pending
        assert buckets(peer, "solver") == (FREE_MICRO, STAKE_MICRO, 0)
    with pytest.raises(VerificationFailed, match="penalties"):
        Peer(FREE_NETWORK).settler.accept(seal(record(lost_micro=1), KEYS["solver"]))
    two = seal(record(network=JUDGED_NETWORK.id), KEYS["solver"])
    for key in NOTARIES[:2]:
        two = add_signature(two, key, network=JUDGED_NETWORK.id)
    with pytest.raises(VerificationFailed, match="certify an order"):
        Peer(JUDGED_NETWORK).settler.accept(two)


def test_a_move_of_the_future_is_taken_when_its_time_comes_and_blames_nobody() -> None:
    peer = Peer(FREE_NETWORK)
    early = seal(record(created_ns=peer.now_ns + params.CLOCK_SKEW_NS_MAX + SECOND), KEYS["solver"])
    assert not peer.settler.accept(early)
    assert not peer.settler.pending
    assert [row["reason"] for row in peer.settler.desk.drops.rows()] == ["early"]
    peer.wait(1)
    assert peer.settler.accept(early)


def test_moves_without_funds_wait_a_few_of_each_and_few_of_made_up_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(params, "PENDING_MOVES_MAX", 6)
    monkeypatch.setattr(params, "PENDING_MOVES_OF_STRANGERS_MAX", 2)
    peer, most = Peer(FREE_NETWORK), params.PENDING_MOVES_OF_OWNER_MAX
    poor = [moved(FREE_NETWORK, "solver", "add", 2 * FREE_MICRO, sequence=n) for n in range(most + 3)]
    for envelope in poor:
        assert not peer.settler.accept(envelope)
    assert len(peer.settler.pending) == most
    strangers = [SigningKey.from_seed(bytes([n]) * 32) for n in range(9)]
    for key in strangers:
        for sequence in range(2):
            peer.settler.accept(seal(record(owner=key.public, sequence=sequence), key))
    assert len(peer.settler.pending) == most + 2
    peer.settler.accept(moved(FREE_NETWORK, "worker", "withdraw", STAKE_MICRO))
    for sequence in (2, 3):
        peer.settler.accept(moved(FREE_NETWORK, "worker", "withdraw", STAKE_MICRO, sequence=sequence))
    assert len(peer.settler.pending) == 6, "and what there is room for in all is full"
    assert not peer.settler.accept(poor[0]), "what waits already may be shown again"


def test_an_owner_has_few_withdrawals_under_way_and_the_next_waits_for_one_to_end() -> None:
    peer, most = Peer(FREE_NETWORK), params.UNBONDINGS_OF_OWNER_MAX
    for number in range(most + 1):
        peer.give(moved(FREE_NETWORK, "worker", "withdraw", 1_000_000, sequence=number))
    assert buckets(peer, "worker")[2] == most * 1_000_000
    peer.wait(unbonding_ns(FREE_NETWORK) // SECOND)
    assert buckets(peer, "worker") == (FREE_MICRO + most * 1_000_000, STAKE_MICRO - (most + 1) * 1_000_000, 1_000_000)


def test_no_network_can_have_a_window_shorter_than_what_it_must_outlast() -> None:
    for field in ("reveal_ms", "check_silence_ms", "settle_silence_ms", "challenge_ms", "dispute_replay_ms"):
        longer = msgspec.structs.replace(RULES, **{field: 10**7})
        assert unbonding_ns(Network("long", longer, (), (), JUDGED_NETWORK.notaries)) > 10**7 * 10**6
