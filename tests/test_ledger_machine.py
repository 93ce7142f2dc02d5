"""Openings, closings, convictions, lost challenges, faults and jackpots in any order: money is conserved."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from market import entries as money
from market import penalties
from market.ledger import BURNED, NULL_KEY, POOL, WORLD, Account, Entry, Ledger, money_table
from protocol.errors import InsufficientFunds
from tests.test_ledger import NAMES, PEERS, key, stake

AMOUNTS = st.integers(0, 10**6)
SHARES = st.lists(st.tuples(st.sampled_from(PEERS), st.integers(0, 10**5)), max_size=3)


class LedgerMachine(RuleBasedStateMachine):
    """Four peers do anything in any order; a plain dictionary of deposits is the only model needed."""

    agreements = Bundle("agreements")
    locks = Bundle("locks")  # of agreements that are closed and may be challenged
    posted = Bundle("posted")

    def __init__(self) -> None:
        super().__init__()
        self.ledger, self.outside_micro, self.count = Ledger(), 0, 0
        self.leaving: list[tuple[bytes, bytes, int]] = []  # withdrawals under way: owner, move, micro-credits

    def fresh(self) -> bytes:
        self.count += 1
        return key(self.count)

    def attempt(self, entry: Entry) -> bool:
        """Post; on refusal prove that nothing moved."""
        before = self.ledger.balances()
        try:
            return self.ledger.post(entry)
        except InsufficientFunds:
            assert self.ledger.balances() == before
            assert not self.ledger.applied(entry.key)
            return False

    @rule(target=posted, owner=st.sampled_from(PEERS), free_micro=AMOUNTS, stake_micro=AMOUNTS)
    def deposit(self, owner: bytes, free_micro: int, stake_micro: int) -> Entry:
        entry = money.deposit(self.fresh(), owner, free_micro, stake_micro)
        assert self.attempt(entry)
        self.outside_micro += free_micro + stake_micro
        return entry

    @rule(owner=st.sampled_from(PEERS), micro=AMOUNTS)
    def withdraw(self, owner: bytes, micro: int) -> None:
        if self.attempt(money.withdraw(self.fresh(), owner, micro)):
            self.outside_micro -= micro

    @rule(owner=st.sampled_from(PEERS), micro=AMOUNTS, out=st.booleans())
    def move_stake(self, owner: bytes, micro: int, out: bool) -> None:
        move = self.fresh()
        if not out:
            self.attempt(money.stake_add(move, owner, micro))
        elif self.attempt(money.unbond(move, owner=owner, micro=micro)):
            self.leaving.append((owner, move, micro))

    @precondition(lambda self: self.leaving)
    @rule()
    def unbonded(self) -> None:
        owner, move, micro = self.leaving.pop(0)
        assert self.attempt(money.unbonded(move, owner=owner, micro=micro))

    @rule(
        target=agreements,
        submitter=st.sampled_from(PEERS),
        solver=st.sampled_from(PEERS),
        budget_micro=AMOUNTS,
        lock_micro=AMOUNTS,
    )
    def open(self, submitter: bytes, solver: bytes, budget_micro: int, lock_micro: int) -> object:
        agreement = self.fresh()
        entry = money.open_channel(
            agreement, submitter=submitter, budget_micro=budget_micro, solver=solver, lock_micro=lock_micro
        )
        return (agreement, submitter, solver, budget_micro, lock_micro) if self.attempt(entry) else multiple()

    @rule(target=posted, terms=consumes(agreements), share=st.integers(0, 100), fees=SHARES)
    def settle(self, terms: tuple[bytes, bytes, bytes, int, int], share: int, fees: list[tuple[bytes, int]]) -> Entry:
        agreement, submitter, solver, channel_micro, lock_micro = terms
        paid_micro = channel_micro * share // 100
        if paid_micro + sum(micro for _, micro in fees) > channel_micro:
            fees = []
        entry = money.settle(
            agreement,
            submitter=submitter,
            solver=solver,
            channel_micro=channel_micro,
            lock_micro=lock_micro,
            paid_micro=paid_micro,
            fees=fees,
        )
        assert self.attempt(entry)
        return entry

    @rule(target=posted, terms=consumes(agreements), costs=SHARES)
    def slash(self, terms: tuple[bytes, bytes, bytes, int, int], costs: list[tuple[bytes, int]]) -> Entry:
        agreement, submitter, solver, channel_micro, lock_micro = terms
        burned_micro = self.ledger.balance_micro(BURNED)
        entry = money.slash(
            agreement,
            submitter=submitter,
            solver=solver,
            channel_micro=channel_micro,
            lock_micro=lock_micro,
            checker_costs=costs,
        )
        assert self.attempt(entry)
        assert self.ledger.balance_micro(BURNED) >= burned_micro
        return entry

    @rule(target=locks, terms=consumes(agreements), share=st.integers(0, 100), slice_micro=st.integers(0, 10**4))
    def close(self, terms: tuple[bytes, bytes, bytes, int, int], share: int, slice_micro: int) -> object:
        agreement, submitter, solver, channel_micro, lock_micro = terms
        paid_micro = channel_micro * share // 100
        slice_micro = min(slice_micro, channel_micro - paid_micro)
        entry = money.settle(
            agreement,
            submitter=submitter,
            solver=solver,
            channel_micro=channel_micro,
            lock_micro=0,
            paid_micro=paid_micro,
            fees=((NULL_KEY, slice_micro),),
        )
        assert self.attempt(entry)
        assert self.ledger.balance_micro(Account(solver, f"lock:{agreement.hex()}")) == lock_micro
        return (agreement, submitter, solver, lock_micro, paid_micro + slice_micro)

    @rule(target=posted, terms=consumes(locks))
    def unlock(self, terms: tuple[bytes, bytes, bytes, int, int]) -> Entry:
        agreement, submitter, solver, lock_micro, _ = terms
        held = self.ledger.balance_micro(stake(solver))
        entry = penalties.unlock(agreement, submitter=submitter, solver=solver, lock_micro=lock_micro)
        assert self.attempt(entry)
        assert self.ledger.balance_micro(stake(solver)) == held + lock_micro
        return entry

    @rule(target=posted, terms=consumes(agreements), winner=st.sampled_from(PEERS), costs=SHARES, both=st.booleans())
    def convict(
        self, terms: tuple[bytes, bytes, bytes, int, int], winner: bytes, costs: list[tuple[bytes, int]], both: bool
    ) -> Entry:
        agreement, submitter, solver, channel_micro, lock_micro = terms
        return self.convicted(
            lock_micro,
            sum(micro for _, micro in costs),
            penalties.convict(
                agreement,
                submitter=submitter,
                solver=solver,
                channel_micro=channel_micro,
                lock_micro=lock_micro,
                refund_micro=0,
                winner=winner,
                rewarded=not both,
                costs=costs,
            ),
        )

    @rule(target=posted, terms=consumes(locks), winner=st.sampled_from(PEERS), costs=SHARES)
    def convict_late(
        self, terms: tuple[bytes, bytes, bytes, int, int], winner: bytes, costs: list[tuple[bytes, int]]
    ) -> Entry:
        agreement, submitter, solver, lock_micro, paid_micro = terms
        return self.convicted(
            max(0, lock_micro - paid_micro),
            sum(micro for _, micro in costs),
            penalties.convict(
                agreement,
                submitter=submitter,
                solver=solver,
                channel_micro=0,
                lock_micro=lock_micro,
                refund_micro=paid_micro,
                winner=winner,
                costs=costs,
            ),
        )

    def convicted(self, forfeited_micro: int, costs_micro: int, entry: Entry) -> Entry:
        burned_micro = self.ledger.balance_micro(BURNED)
        assert self.attempt(entry)
        assert 2 * (self.ledger.balance_micro(BURNED) - burned_micro) >= forfeited_micro - costs_micro
        return entry

    @rule(target=posted, loser=st.sampled_from(PEERS), micro=AMOUNTS, costs=SHARES, fault=st.booleans())
    def lose_a_stake(self, loser: bytes, micro: int, costs: list[tuple[bytes, int]], fault: bool) -> object:
        pots_micro = self.ledger.balance_micro(BURNED) + self.ledger.balance_micro(POOL)
        if fault:
            entry, costs = penalties.fault(self.fresh(), checker=loser, micro=micro), []
        else:
            entry = penalties.lost_challenge(self.fresh(), challenger=loser, micro=micro, costs=costs)
        if not self.attempt(entry):
            return multiple()
        gained_micro = self.ledger.balance_micro(BURNED) + self.ledger.balance_micro(POOL) - pots_micro
        assert gained_micro == max(0, micro - sum(cost for _, cost in costs)) or gained_micro < len(costs)
        return entry

    @rule(finder=st.sampled_from(PEERS), micro=AMOUNTS)
    def find_an_ordered_error(self, finder: bytes, micro: int) -> None:
        pool_micro = self.ledger.balance_micro(POOL)
        assert self.attempt(money.jackpot(self.fresh(), finder, micro)) == (micro <= pool_micro)

    @rule(entry=posted)
    def replay(self, entry: Entry) -> None:
        before, flows = self.ledger.balances(), money_table(self.ledger, NAMES)
        assert not self.ledger.post(entry)
        assert self.ledger.balances() == before
        assert money_table(self.ledger, NAMES) == flows

    @invariant()
    def no_credit_appears_or_vanishes(self) -> None:
        assert self.ledger.total_micro() == self.outside_micro
        self.ledger.check()

    @invariant()
    def nobody_owes(self) -> None:
        assert all(micro > 0 for account, micro in self.ledger.balances().items() if account != WORLD)


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
