"""The outcome table: every possible cell is played with the ledger's own entries and keeps the promises of DESIGN."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from market import ledger as money
from market import penalties
from market.ledger import BURNED, NULL_KEY, POOL, Account, Entry, Ledger
from protocol.codec import blake
from protocol.outcome_drawing import markdown
from protocol.outcome_table import (
    BEHAVIOURS,
    CHANCES,
    FINDINGS,
    MEANINGS,
    PARTIES,
    TRUTH,
    Cell,
    Move,
    Step,
    cells,
    impossible,
    moves,
    paid_checkers,
    steps,
)

HOLDERS = (*PARTIES, "next verifier", "referees")
KEYS = {name: blake("test/party", name.encode()) for name in HOLDERS}
AGREEMENT = blake("test/agreement")
FEES = ("verifier fee", "next verifier fee", "whistleblower fee")
CONVICTIONS = frozenset({"convicted", "forfeited", "both wrong"})

# In micro-credits. As the default rules have it for a newcomer's work of 1 credit; odd amounts; and a lock, a stake and
# a pool that do not reach.
USUAL = {
    "channel": 1_500_000, "lock": 3_000_000, "stake": 1_000_000, "pool": 300_000_000, "pay": 900_000, "slice": 100_000,
    "check cost": 200_000, "defence cost": 100_000, "referee cost": 4_000, "jackpot": 200_000_000,
    "verifier fee": 200_000, "next verifier fee": 200_000, "whistleblower fee": 100_000,
}  # fmt: skip
ODD = {name: micro * 7 // 11 + 3 for name, micro in USUAL.items()} | {"channel": 1_000_003}
SHORT = USUAL | {"lock": 150_001, "stake": 50_003, "pool": 7}
AMOUNTS = {"usual": USUAL, "odd": ODD, "short": SHORT}

POSSIBLE = [cell for cell in cells() if not impossible(cell)]


def amounts_of(cell: Cell, base: dict[str, int]) -> dict[str, int]:
    """`base` with the fees that were earned, and the jackpot as far as the pool reaches."""
    earned = {f"{who} fee" for who in paid_checkers(cell)}
    amounts = base | {fee: base[fee] if fee in earned else 0 for fee in FEES}
    return amounts | {"pay and slice": base["pay"] + base["slice"], "jackpot": min(base["jackpot"], base["pool"])}


def entry_of(step: Step, number: int, paid: bool, amounts: dict[str, int]) -> Entry:
    """The entry that the market posts for a finding. paid: whether the closing paid the solver."""
    both = {"submitter": KEYS["submitter"], "solver": KEYS["solver"]}
    channel, lock = amounts["channel"], amounts["lock"]
    referees = (KEYS["referees"], amounts["referee cost"])
    key = blake("test/step", number.to_bytes(2, "big"))
    who = KEYS.get(step.who, b"")
    late = step.finding.endswith(" late")
    match step.finding.removesuffix(" late"):
        case "settled" | "solver lost":
            fees = [(KEYS[fee.removesuffix(" fee")], amounts[fee]) for fee in FEES]
            fees.append((NULL_KEY, amounts["slice"]))
            return money.settle(
                AGREEMENT, **both, channel_micro=channel, lock_micro=0, paid_micro=amounts["pay"], fees=fees
            )
        case "claimed" | "old voucher" as how:
            pay, share = (amounts["pay"], amounts["slice"]) if how == "claimed" else (0, 0)
            fees = [(NULL_KEY, share)]
            return money.settle(AGREEMENT, **both, channel_micro=channel, lock_micro=0, paid_micro=pay, fees=fees)
        case "unlocked":
            return penalties.unlock(AGREEMENT, **both, lock_micro=lock)
        case "convicted" | "forfeited" | "both wrong" as how:
            return penalties.convict(
                AGREEMENT,
                **both,
                channel_micro=0 if late else channel,
                lock_micro=lock,
                refund_micro=amounts["pay and slice"] if late and paid else 0,
                winner=who,
                rewarded=how != "both wrong",
                costs=((who, amounts["check cost"]), referees),
            )
        case "challenge lost":
            costs = ((KEYS["solver"], amounts["defence cost"]), referees)
            return penalties.lost_challenge(key, challenger=who, micro=amounts["stake"], costs=costs)
        case "ordered error found":
            return money.jackpot(key, who, amounts["jackpot"])
        case "fault":
            return penalties.fault(key, checker=who, micro=amounts["stake"])
    raise AssertionError(step)


@dataclass(frozen=True)
class End:
    """How a cell ends. net: what each holder has more than at the start, over all its buckets; stakes: of that, what
    its stake and lock have; both micro-credits."""

    steps: tuple[Step, ...]
    net: dict[str, int]
    stakes: dict[str, int]
    amounts: dict[str, int]

    @property
    def convicted(self) -> bool:
        return any(step.finding.removesuffix(" late") in CONVICTIONS for step in self.steps)


def held(ledger: Ledger, name: str) -> tuple[int, int]:
    """All that a holder has, and what of it is staked or locked."""
    mine = {account: micro for account, micro in ledger.balances().items() if account.owner == KEYS[name]}
    staked = sum(micro for account, micro in mine.items() if account.bucket.startswith(("stake", "lock")))
    return sum(mine.values()), staked


def start(amounts: dict[str, int]) -> Ledger:
    """Everybody has stakes, the pool is filled, and the channel is open."""
    ledger = Ledger()
    pool = blake("test/pool")
    ledger.post(money.deposit(pool, KEYS["referees"], 2 * amounts["pool"], 0))
    ledger.post(
        Entry(
            blake("test/fill"),
            "settle",
            ((Account(KEYS["referees"], "free"), -amounts["pool"]), (POOL, amounts["pool"])),
        )
    )
    for name in PARTIES:
        stake = amounts["lock"] if name == "solver" else amounts["stake"]
        ledger.post(money.deposit(KEYS[name], KEYS[name], amounts["channel"], stake))
    ledger.post(money.deposit(KEYS["next verifier"], KEYS["next verifier"], 0, amounts["stake"]))
    ledger.post(
        money.open_channel(
            AGREEMENT, submitter=KEYS["submitter"], budget_micro=amounts["channel"],
            solver=KEYS["solver"], lock_micro=amounts["lock"],
        )
    )  # fmt: skip
    return ledger


@cache
def play(cell: Cell, kind: str) -> End:
    """Play a cell on a ledger, and compare every entry with what the table says moves."""
    amounts = amounts_of(cell, AMOUNTS[kind])
    ledger = start(amounts)
    before = {name: held(ledger, name) for name in HOLDERS}
    todo = steps(cell)
    paid = any(step.finding in ("settled", "claimed", "solver lost") for step in todo)
    for number, step in enumerate(todo):
        balances = ledger.balances()
        if FINDINGS[step.finding].lines:
            ledger.post(entry_of(step, number, paid, amounts))
        told = told_balances(balances, step, moves(step.finding, amounts))
        assert {a: m for a, m in told.items() if m} == ledger.balances(), step
        ledger.check()
    after = {name: held(ledger, name) for name in HOLDERS}
    net = {name: after[name][0] - before[name][0] for name in HOLDERS}
    lost = sum(net.values())
    gone = ledger.balance_micro(BURNED) + ledger.balance_micro(POOL) - amounts["pool"]
    assert lost == -gone, "what nobody has was burned or is in the pool"
    return End(todo, net, {name: after[name][1] - before[name][1] for name in HOLDERS}, amounts)


def told_balances(balances: dict[Account, int], step: Step, told: tuple[Move, ...]) -> dict[Account, int]:
    """The balances after the moves that the table tells."""
    after = Counter(balances)
    for move in told:
        to, source = (step.who if place == "who" else place for place in (move.to, move.source))
        owner = {"channel": "submitter", "lock": "solver", "stake": step.who}.get(source, "")
        bucket = source if source == "stake" else f"{source}:{AGREEMENT.hex()}"
        after[Account(KEYS[owner], bucket) if owner else POOL] -= move.micro
        if to in ("burned", "pool"):
            after[BURNED if to == "burned" else POOL] += move.micro
        elif to == "solver stake":
            after[Account(KEYS["solver"], "stake")] += move.micro
        else:
            after[Account(KEYS[to], "free")] += move.micro
    return dict(after)


def behaviour(cell: Cell, party: str) -> str:
    return "honest" if party == "next verifier" else str(getattr(cell, party))


@pytest.mark.parametrize("kind", AMOUNTS)
def test_every_possible_cell_conserves_money_and_moves_what_the_table_says(kind: str) -> None:
    assert len(list(cells())) == 6**4 * 3 == 3888
    assert len(POSSIBLE) == 2160
    for cell in POSSIBLE:
        play(cell, kind)  # asserts


def test_every_other_cell_says_why_it_cannot_be_and_is_another_one() -> None:
    rest = [cell for cell in cells() if impossible(cell)]
    assert len(rest) == 3888 - 2160
    for cell in rest:
        assert "`seen`" in impossible(cell)
        assert not impossible(cell._replace(chance="seen"))


@pytest.mark.parametrize("kind", AMOUNTS)
def test_an_honest_party_never_loses_a_stake_or_more_than_it_owes(kind: str) -> None:
    for cell in POSSIBLE:
        end = play(cell, kind)
        for party in ("solver", "verifier", "whistleblower", "next verifier"):
            if behaviour(cell, party) == "honest":
                closed = end.steps[-1].finding != "left open"
                assert end.stakes[party] == 0 or not closed, (cell, party)
                assert end.net[party] >= 0, (cell, party)
        if cell.solver == "honest":
            assert not end.convicted, cell
            assert end.net["solver"] >= end.amounts["pay"], cell
        if cell.submitter == "honest":
            owed = end.amounts["pay and slice"] + sum(end.amounts[fee] for fee in FEES)
            assert end.net["submitter"] >= -owed, cell


@pytest.mark.parametrize("kind", AMOUNTS)
def test_an_honest_submitter_gets_a_right_result_or_its_money_back(kind: str) -> None:
    """Unless everybody who looked lied: who is drawn next, and any one whistleblower, is enough."""
    missed = 0
    for cell in POSSIBLE:
        truth, end = TRUTH[cell.solver, cell.chance], play(cell, kind)
        if cell.submitter != "honest" or truth not in ("wrong", "lost"):
            continue
        if end.convicted:
            fees = sum(end.amounts[fee] for fee in FEES)
            assert end.net["submitter"] >= (-fees if kind != "usual" else 0) or kind == "short", cell
        elif truth == "wrong":
            missed += 1
            assert cell.verifier in ("wrong", "lazy", "colluding"), cell
            assert cell.whistleblower not in ("honest", "wrong"), cell
        else:
            assert end.net["solver"] >= end.amounts["pay"], "what both signed before it vanished is right, and paid"
    assert missed == 3 * 3 * 4 - 3  # a colluding solver's colluding whistleblower convicts it, to lose less


@pytest.mark.parametrize("kind", ["usual", "odd"])
def test_no_cheat_ends_better_than_its_honest_control_when_the_work_was_found_wrong(kind: str) -> None:
    """Friends count as one owner. Of the checkers alone those are compared that lied about wrong work."""
    for cell in POSSIBLE:
        end = play(cell, kind)
        if not end.convicted:
            continue
        friends = [p for p in PARTIES if behaviour(cell, p) == "colluding"] if cell.solver == "colluding" else []
        control = cell._replace(**dict.fromkeys(["solver", *friends], "honest"), chance="seen")
        owners = ["solver", *(p for p in friends if p != "solver")]
        ours, honest = (sum(e.net[p] for p in owners) for e in (end, play(control, kind)))
        assert ours < honest, cell
        assert ours < 0, cell
        if TRUTH[cell.solver, cell.chance] != "wrong":
            continue
        for party in ("verifier", "whistleblower"):
            if behaviour(cell, party) not in ("honest", "colluding"):
                control = cell._replace(**{party: "honest"})
                assert end.net[party] <= play(control, kind).net[party], (cell, party)


@pytest.mark.parametrize("kind", AMOUNTS)
def test_at_least_half_of_what_costs_leave_of_a_lock_or_stake_is_burned_or_pooled(kind: str) -> None:
    forfeits = 0
    for cell in POSSIBLE:
        end = play(cell, kind)
        for step in end.steps:
            row = FINDINGS[step.finding]
            for source in {line.source for line in row.lines if line.source in ("lock", "stake")} - {"channel"}:
                if step.finding == "unlocked":
                    continue
                shares = {line.to for line in row.lines if line.source == source and line.how == "share"}
                told = [move for move in moves(step.finding, end.amounts) if move.source == source]
                costs = sum(end.amounts[str(line.what)] for line in row.lines
                            if line.source == source and line.how != "share")  # fmt: skip
                rest = max(0, end.amounts[source] - costs)
                kept = sum(move.micro for move in told if move.to in ("burned", "pool") and move.to in shares)
                assert 2 * kept >= rest, (cell, step)
                forfeits += 1
    assert forfeits > 1000


@pytest.mark.parametrize("kind", ["usual", "odd"])
@pytest.mark.parametrize("submitter", BEHAVIOURS)
@pytest.mark.parametrize("verifier", BEHAVIOURS)
def test_challenging_oneself_loses(kind: str, submitter: str, verifier: str) -> None:
    end = play(Cell(submitter, "colluding", verifier, "colluding", "seen"), kind)
    assert end.steps[0] == Step("convicted", "whistleblower") or end.steps[0].finding == "forfeited"
    owners = {"solver", "whistleblower"} | {
        p for p, b in (("submitter", submitter), ("verifier", verifier)) if b == "colluding"
    }
    rest = end.amounts["lock"] - end.amounts["check cost"] - end.amounts["referee cost"]
    assert 2 * sum(end.net[owner] for owner in owners) <= -rest


@pytest.mark.parametrize("kind", AMOUNTS)
def test_losing_a_challenge_to_oneself_loses(kind: str) -> None:
    """A sybil that challenges right work of its own solver, to close the window for others: it does not, and costs."""
    for behaviour_ in ("wrong", "withholding"):
        end = play(Cell("honest", "honest", "lazy", behaviour_, "seen"), kind)
        quiet = play(Cell("honest", "honest", "lazy", "silent", "seen"), kind)
        gained = sum(end.net[p] - quiet.net[p] for p in ("solver", "whistleblower"))
        assert gained <= -(end.amounts["stake"] - end.amounts["defence cost"]) if kind != "short" else gained <= 0


def test_a_lost_challenge_closes_the_window_for_nobody() -> None:
    ends = [play(Cell("honest", solver, "withholding", "honest", "seen"), "usual") for solver in ("wrong", "lazy")]
    for end in ends:
        assert [step.finding for step in end.steps] == ["challenge lost", "convicted"]


def test_who_paid_checkers_is_not_to_blame_when_the_solver_only_fell_silent() -> None:
    end = play(Cell("honest", "silent", "honest", "wrong", "seen"), "usual")
    assert [step.finding for step in end.steps] == ["forfeited"]
    assert end.stakes["verifier"] == 0


def test_everybody_and_every_finding_is_described_and_reached() -> None:
    assert set(MEANINGS) == {(party, b) for party in PARTIES for b in BEHAVIOURS}
    assert set(CHANCES) == {chance for _, chance in TRUTH} - set() | {"unseen"}
    reached = {step.finding for cell in POSSIBLE for step in steps(cell)}
    assert reached == set(FINDINGS) - {"slashed", "ordered twice"}  # in no cell: of other networks, and of no deal


def test_two_orders_of_one_number_burn_what_the_table_says() -> None:
    amounts = {"stake": 1_000_000}
    (move,) = moves("ordered twice", amounts)
    entry = penalties.equivocation(b"k" * 32, 7, micro=amounts["stake"])
    assert dict(entry.postings) == {BURNED: move.micro, Account(b"k" * 32, "stake"): -move.micro}
    assert (move.to, move.micro) == ("burned", 1_000_000)


def test_a_quorum_without_notaries_moves_what_the_table_says() -> None:
    for base in AMOUNTS.values():
        amounts = amounts_of(POSSIBLE[0], base)
        ledger = start(amounts)
        balances = ledger.balances()
        entry = money.slash(
            AGREEMENT, submitter=KEYS["submitter"], solver=KEYS["solver"], channel_micro=amounts["channel"],
            lock_micro=amounts["lock"], checker_costs=((KEYS["verifier"], amounts["check cost"]),),
        )  # fmt: skip
        ledger.post(entry)
        told = [move._replace(to="verifier") if move.to == "checkers" else move for move in moves("slashed", amounts)]
        after = told_balances(balances, Step("slashed"), tuple(told))
        assert {a: m for a, m in after.items() if m} == ledger.balances()


MICRO = st.integers(0, 10**12)


@given(st.sampled_from(sorted(FINDINGS)), st.fixed_dictionaries(dict.fromkeys(amounts_of(POSSIBLE[0], USUAL), MICRO)))
def test_a_finding_never_moves_more_than_its_source_holds(finding: str, amounts: dict[str, int]) -> None:
    for source in ("channel", "lock", "stake", "pool"):
        lines = [line for line in FINDINGS[finding].lines if line.source == source]
        moved = [move.micro for move in moves(finding, amounts) if move.source == source]
        assert all(micro > 0 for micro in moved)
        if lines and lines[-1].how == "share":
            assert sum(moved) == amounts[source]
        else:
            assert sum(moved) <= amounts[source]


def test_the_documentation_shows_the_table() -> None:
    page = Path(__file__).parents[1] / "docs" / "outcomes.md"
    assert page.read_text(encoding="utf-8") == markdown(), "run `python -m protocol.outcome_drawing > docs/outcomes.md`"
