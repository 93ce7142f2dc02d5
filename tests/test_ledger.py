"""The ledger's promises: nothing appears, nothing vanishes, nothing happens twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from market import entries as money
from market import penalties
from market.ledger import (
    BURNED,
    NULL_KEY,
    POOL,
    WORLD,
    Account,
    ConflictingEntry,
    ConservationBroken,
    Entry,
    Ledger,
    Overdrawn,
    UnbalancedEntry,
    money_table,
)
from protocol import params
from protocol.codec import blake
from protocol.errors import InsufficientFunds, LimitExceeded, MalformedRecord, VerificationFailed

ANNA, BORIS, CHIYO, DAVID = (blake("test/peer", name) for name in (b"anna", b"boris", b"chiyo", b"david"))
PEERS = (ANNA, BORIS, CHIYO, DAVID)
NAMES = {ANNA: "anna", BORIS: "boris", CHIYO: "chiyo"}


def key(n: int) -> bytes:
    return blake("test/key", n.to_bytes(8, "little"))


def free(owner: bytes) -> Account:
    return Account(owner, "free")


def stake(owner: bytes) -> Account:
    return Account(owner, "stake")


def funded() -> Ledger:
    """Anna has 1,000 free, Boris 500 staked, and agreement 1 holds 100 of hers against 41 of his."""
    ledger = Ledger()
    ledger.post(money.deposit(key(1), ANNA, 1_000, 0))
    ledger.post(money.deposit(key(2), BORIS, 0, 500))
    ledger.post(money.open_channel(key(9), submitter=ANNA, budget_micro=100, solver=BORIS, lock_micro=41))
    return ledger


def settled(paid_micro: int = 60, **other: object) -> Entry:
    terms = {"channel_micro": 100, "lock_micro": 41, "paid_micro": paid_micro, **other}
    return money.settle(key(9), submitter=ANNA, solver=BORIS, **terms)  # type: ignore[arg-type]


def slashed(**other: object) -> Entry:
    terms = {"channel_micro": 100, "lock_micro": 41, **other}
    return money.slash(key(9), submitter=ANNA, solver=BORIS, **terms)  # type: ignore[arg-type]


def test_opening_moves_budget_and_stake_and_nothing_else() -> None:
    ledger = funded()
    assert ledger.balances() == {
        WORLD: -1_500,
        free(ANNA): 900,
        Account(ANNA, f"channel:{key(9).hex()}"): 100,
        stake(BORIS): 459,
        Account(BORIS, f"lock:{key(9).hex()}"): 41,
    }
    ledger.check()


def test_settling_pays_solver_checkers_and_pool_and_returns_the_rest_to_the_payer() -> None:
    ledger = funded()
    assert ledger.post(settled(60, fees=((CHIYO, 7), (NULL_KEY, 3))))
    assert ledger.balances() == {
        WORLD: -1_500,
        free(ANNA): 930,
        free(BORIS): 60,
        stake(BORIS): 500,
        free(CHIYO): 7,
        POOL: 3,
    }
    assert ledger.post(money.jackpot(key(3), CHIYO, 3))
    assert ledger.balance_micro(POOL) == 0
    ledger.check()


def test_slashing_refunds_the_payer_pays_checkers_first_and_burns_the_odd_half() -> None:
    ledger = funded()
    ledger.post(slashed(checker_costs=((CHIYO, 10),)))
    # 41 - 10 = 31: 15 compensate, 16 burn.
    assert ledger.balances() == {
        WORLD: -1_500,
        free(ANNA): 1_015,
        stake(BORIS): 459,
        free(CHIYO): 10,
        BURNED: 16,
    }
    ledger.check()


def test_costs_above_the_lock_are_shared_downwards_and_the_dust_burns() -> None:
    ledger = funded()
    ledger.post(slashed(checker_costs=((CHIYO, 50), (DAVID, 50), (CHIYO, 1))))
    # 41 * 50 // 101 = 20 twice, 41 * 1 // 101 = 0, and 1 is left: it burns, the submitter gains nothing by it.
    assert [ledger.balance_micro(a) for a in (free(CHIYO), free(DAVID), BURNED)] == [20, 20, 1]
    assert ledger.balance_micro(free(ANNA)) == 1_000


@given(st.integers(0, 10**15), st.lists(st.tuples(st.sampled_from(PEERS), st.integers(0, 10**15)), max_size=5))
def test_slashing_never_pays_a_checker_above_its_cost_and_burns_half_of_the_rest(
    lock_micro: int, costs: list[tuple[bytes, int]]
) -> None:
    eve, agreement = blake("test/peer", b"eve"), key(9)
    entry = money.slash(
        agreement, submitter=eve, solver=BORIS, channel_micro=7, lock_micro=lock_micro, checker_costs=costs
    )
    deltas = dict(entry.postings)
    for peer in PEERS:
        assert deltas.get(free(peer), 0) <= sum(micro for checker, micro in costs if checker == peer)
    rest_micro = lock_micro - sum(deltas.get(free(peer), 0) for peer in PEERS)
    compensation_micro = deltas.get(free(eve), 0) - 7
    assert 0 <= compensation_micro <= deltas.get(BURNED, 0)
    assert compensation_micro + deltas.get(BURNED, 0) == rest_micro
    if sum(micro for _, micro in costs) <= lock_micro:
        assert rest_micro == lock_micro - sum(micro for _, micro in costs)
    else:
        assert rest_micro < max(1, len(costs))


def test_the_same_entry_twice_changes_nothing() -> None:
    ledger = funded()
    assert ledger.post(settled())
    before, table = ledger.balances(), money_table(ledger, NAMES)
    assert not ledger.post(settled())
    assert ledger.balances() == before
    assert money_table(ledger, NAMES) == table


@pytest.mark.parametrize("second", [settled(59), settled(memo="other"), slashed()], ids=["paid", "memo", "slash"])
def test_an_agreement_cannot_end_twice_in_different_ways(second: Entry) -> None:
    ledger = funded()
    ledger.post(settled())
    before = ledger.balances()
    with pytest.raises(ConflictingEntry, match="differs"):
        ledger.post(second)
    assert ledger.balances() == before


def test_overdrawing_names_account_need_and_holding_and_leaves_the_ledger_alone() -> None:
    ledger = funded()
    before = ledger.balances()
    with pytest.raises(Overdrawn, match="holds 900 micro-credits, 901 are needed") as refused:
        ledger.post(money.withdraw(key(3), ANNA, 901))
    assert isinstance(refused.value, InsufficientFunds)
    assert (refused.value.account, refused.value.needed_micro) == (free(ANNA), 901)
    assert "add 1 micro-credits" in refused.value.next_step
    assert ledger.balances() == before
    assert not ledger.applied(key(3))
    assert ledger.post(money.withdraw(key(3), ANNA, 900))
    ledger.check()


def test_a_lock_cannot_be_withdrawn_as_stake() -> None:
    ledger = funded()
    with pytest.raises(Overdrawn):
        ledger.post(money.unbond(key(4), owner=BORIS, micro=460))
    assert ledger.post(money.unbond(key(4), owner=BORIS, micro=459))
    assert (ledger.balance_micro(stake(BORIS)), ledger.balance_micro(free(BORIS))) == (0, 0)
    with pytest.raises(VerificationFailed, match="locked for ever"):
        ledger.post(money.unbonded(key(4), owner=BORIS, micro=458))
    assert ledger.post(money.unbonded(key(4), owner=BORIS, micro=459))
    assert ledger.post(money.stake_add(key(5), BORIS, 459))
    assert ledger.balance_micro(stake(BORIS)) == 459


def test_a_penalty_takes_the_buckets_in_order_and_no_more_than_they_hold() -> None:
    ledger = funded()
    for number, micro in ((4, 100), (5, 50)):
        ledger.post(money.unbond(key(number), owner=BORIS, micro=micro))
    holdings = [(stake(BORIS), 309), (money.unbonding_of(BORIS, key(5)), 50), (money.unbonding_of(BORIS, key(4)), 100)]
    for whole in (460, 10**15):
        with pytest.raises(Overdrawn):
            penalties.fault(key(6), checker=BORIS, micro=whole, holdings=holdings)
    ledger.post(penalties.fault(key(6), checker=BORIS, micro=400, holdings=holdings))
    assert [ledger.balance_micro(account) for account, _ in holdings] == [0, 0, 59]
    assert ledger.flows()[BORIS].slashed_micro == 400
    ledger.check()


@pytest.mark.parametrize("terms", [{"channel_micro": 99}, {"lock_micro": 40}])
def test_no_end_of_an_agreement_strands_money(terms: dict[str, int]) -> None:
    for entry in (settled(**terms), slashed(**terms)):
        ledger = funded()
        with pytest.raises(VerificationFailed, match="locked for ever"):
            ledger.post(entry)
        ledger.check()


def test_nothing_can_be_paid_out_of_a_channel_above_what_it_holds() -> None:
    with pytest.raises(VerificationFailed, match="pays 101 of a channel of 100"):
        settled(60, fees=((CHIYO, 41),))
    with pytest.raises(Overdrawn):
        funded().post(settled(150, channel_micro=150))


@pytest.mark.parametrize("micro", [-1, 1.0, True, None])
def test_amounts_are_whole_and_not_negative(micro: int) -> None:
    with pytest.raises(MalformedRecord):
        money.deposit(key(1), ANNA, micro)
    with pytest.raises(MalformedRecord):
        settled(60, fees=((CHIYO, micro),))


def test_amounts_shares_and_balances_are_bounded() -> None:
    with pytest.raises(LimitExceeded):
        money.withdraw(key(1), ANNA, params.AMOUNT_MICRO_MAX + 1)
    with pytest.raises(LimitExceeded):
        slashed(checker_costs=((CHIYO, 1),) * (params.ENTRY_SHARES_MAX + 1))
    ledger, deposits = Ledger(), params.BALANCE_MICRO_MAX // params.AMOUNT_MICRO_MAX
    for n in range(deposits):
        ledger.post(money.deposit(key(n), PEERS[n % 4], params.AMOUNT_MICRO_MAX))
    with pytest.raises(LimitExceeded, match="world"):
        ledger.post(money.deposit(key(deposits), ANNA, params.AMOUNT_MICRO_MAX))
    ledger.check()


@pytest.mark.parametrize(
    ("owner", "bucket"),
    [
        (ANNA, "burned"),
        (ANNA, "channel:" + "0" * 63),
        (ANNA, "channel:" + "G" * 64),
        (ANNA, "free\n"),
        (NULL_KEY, "free"),
        (NULL_KEY, "lock:" + "0" * 64),
        (b"short", "free"),
    ],
)
def test_accounts_outside_the_list_do_not_exist(owner: bytes, bucket: str) -> None:
    with pytest.raises(MalformedRecord):
        Account(owner, bucket)


def test_an_entry_off_balance_cannot_be_built() -> None:
    with pytest.raises(UnbalancedEntry, match="1 micro-credits off"):
        Entry(key(1), "open", ((free(ANNA), -4), (free(BORIS), 5)))


@pytest.mark.parametrize(
    ("kind", "postings"),
    [
        ("open", ((WORLD, -5), (free(ANNA), 5))),  # money from nowhere
        ("deposit", ((WORLD, 5), (free(ANNA), -5))),  # a deposit that takes
        ("withdraw", ((WORLD, -5), (free(ANNA), 5))),  # a withdrawal that gives
        ("slash", ((BURNED, -5), (free(ANNA), 5))),  # burned credits back
        ("gift", ((free(BORIS), -5), (free(ANNA), 5))),  # no such kind
    ],
)
def test_no_entry_makes_money_or_unburns_it(kind: str, postings: tuple[tuple[Account, int], ...]) -> None:
    with pytest.raises(MalformedRecord):
        Entry(key(1), kind, postings)


def test_the_order_and_split_of_postings_do_not_matter() -> None:
    one = Entry(key(1), "open", ((free(ANNA), -5), (stake(ANNA), 3), (stake(ANNA), 2), (free(BORIS), 0)))
    two = Entry(key(1), "open", ((stake(ANNA), 5), (free(ANNA), -5)))
    assert one == two
    assert one.digest() == two.digest()


@pytest.mark.parametrize("memo", ["x" * 201, "line\nbreak", "\x1b[2J", "\udc80"])
def test_memos_are_short_and_printable(memo: str) -> None:
    with pytest.raises((LimitExceeded, MalformedRecord)):
        money.withdraw(key(1), ANNA, 5, memo=memo)


def test_the_table_shows_who_earned_paid_and_lost_and_adds_up_to_the_deposits() -> None:
    ledger = funded()
    ledger.post(settled(60, fees=((CHIYO, 7), (NULL_KEY, 3))))
    ledger.post(money.open_channel(key(8), submitter=ANNA, budget_micro=50, solver=BORIS, lock_micro=20))
    ledger.post(
        money.slash(key(8), submitter=ANNA, solver=BORIS, channel_micro=50, lock_micro=20, checker_costs=((DAVID, 5),))
    )
    table = money_table(ledger, NAMES)
    anna, boris, chiyo = (next(r for r in table.rows if r.name == name) for name in ("anna", "boris", "chiyo"))
    assert (anna.deposited_micro, anna.paid_micro, anna.awarded_micro, anna.free_micro) == (1_000, 70, 7, 937)
    assert (boris.earned_micro, boris.slashed_micro, boris.stake_micro) == (60, 20, 480)
    assert chiyo.earned_micro == 7
    assert any(row.name == DAVID.hex()[:12] and row.awarded_micro == 5 for row in table.rows)
    assert (table.burned_micro, table.pool_micro) == (8, 3)
    assert table.totals.held_micro + 8 + 3 == table.totals.deposited_micro == 1_500
    assert table.totals.earned_micro + table.pool_micro == table.totals.paid_micro


def test_paying_oneself_is_no_income() -> None:
    ledger = Ledger()
    ledger.post(money.deposit(key(1), ANNA, 100, 100))
    ledger.post(money.open_channel(key(9), submitter=ANNA, budget_micro=100, solver=ANNA, lock_micro=40))
    ledger.post(money.settle(key(9), submitter=ANNA, solver=ANNA, channel_micro=100, lock_micro=40, paid_micro=100))
    row = money_table(ledger, NAMES).rows[0]
    assert (row.earned_micro, row.paid_micro, row.held_micro) == (0, 0, 200)
    ledger.check()


def test_a_ledger_that_lost_a_credit_says_so() -> None:
    ledger = funded()
    ledger._balances[free(ANNA)] -= 1
    with pytest.raises(ConservationBroken, match="hold 1499"):
        ledger.check()
    with pytest.raises(ConservationBroken):
        money_table(ledger, NAMES)
    ledger._balances[stake(BORIS)] += 1  # the sum is right again, the owners are not
    with pytest.raises(ConservationBroken, match="its flows say"):
        ledger.check()
