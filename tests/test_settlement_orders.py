"""Which settlement records make the same money in every order, and which do not: docs/decisions/0001 has the list."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest

from protocol.network import Network
from tests.test_settlement_machine import (
    CHECKERS,
    FREE_MICRO,
    FREE_NETWORK,
    JUDGED_NETWORK,
    STAKE_MICRO,
    Deal,
    Peer,
    moved,
)


def ledgers(network: Network, records: list[bytes], *, between_s: int = 0) -> int:
    """How many different ledgers the orders of these records end in. Money is conserved in each."""
    found = set()
    for order in permutations(records):
        peer = Peer(network)
        for envelope in order:
            peer.give(envelope)
            peer.wait(between_s)
        for seconds in (11, 61, 400):
            peer.wait(seconds)
        peer.ledger.check()
        found.add(tuple(sorted((a.owner, a.bucket, micro) for a, micro in peer.ledger.balances().items())))
    return len(found)


def free(number: int = 0, submitter: str = "submitter", solver: str = "solver", channel: int = 10_000_000) -> Deal:
    return Deal(FREE_NETWORK, number, submitter, solver, channel=channel)


def judged(number: int = 0) -> Deal:
    return Deal(JUDGED_NETWORK, number, *(("submitter", "solver"), ("customer", "worker"))[number])


def found(deal: Deal, finding: str = "wrong", by: str = "whistleblower", segment: int = 3) -> bytes:
    return deal.arbitration(finding, by, segment)


def stakes(network: Network, owner: str, *moves: tuple[str, int]) -> list[bytes]:
    """Moves of somebody's stake, by rising numbers."""
    return [moved(network, owner, kind, micro, sequence=100 + at) for at, (kind, micro) in enumerate(moves)]


def ids(deal: Deal, by: str = "whistleblower", segment: int = 3) -> tuple[bytes, ...]:
    return (deal.challenge(by, segment)[1],)


Records = Callable[[Deal], list[bytes]]

FREE_SAME: dict[str, Records] = {
    "a settlement twice": lambda d: [d.opening, d.settlement(5), d.settlement(5)],
    "a claim beside a settlement": lambda d: [d.opening, d.settlement(5), d.claim(9, by_solver=True)],
    "a claim beside a slash": lambda d: [d.opening, d.slash(), d.claim(9, by_solver=True)],
    "claims of both parties": lambda d: [d.opening, d.claim(9, by_solver=True), d.claim(7, by_solver=False)],
    "claims with other fees": lambda d: [
        d.opening, *(d.claim(9, by_solver=False, fee_micro=fee) for fee in (50_000, 100_000, 7)),
    ],
    "a solver's lock and moves that its stake has room for": lambda d: [
        d.opening, *stakes(FREE_NETWORK, "solver", ("add", 10**6), ("withdraw", STAKE_MICRO // 2)), d.settlement(5),
    ],
    "an add that waits for what is earned": lambda d: [
        d.opening, d.settlement(5_000_000), *stakes(FREE_NETWORK, "solver", ("add", FREE_MICRO + 4_000_000)),
    ],
    "a withdrawal of what is added": lambda _: stakes(
        FREE_NETWORK, "worker", ("withdraw", STAKE_MICRO), ("add", 10**6)
    ) + stakes(FREE_NETWORK, "solver", ("add", 10**6)),
    "a slash by a checker that withdraws": lambda d: [
        d.opening, d.slash(), *stakes(FREE_NETWORK, "verifier", ("withdraw", 2 * STAKE_MICRO)),
    ],
}  # fmt: skip
JUDGED_SAME: dict[str, Records] = {
    "one finding of two quorums": lambda d: [
        d.opening, found(d), d.arbitration("wrong", "whistleblower", 3, (1, 2, 3)),
    ],
    "a lost challenge beside one that was won": lambda d: [d.opening, found(d), found(d, "right", "verifier", 4)],
    "a fault and what it rests on": lambda d: [d.opening, found(d), d.fault("verifier", 3)],
    "a settlement that names the finding before it": lambda d: [d.opening, found(d), d.settlement(5, after=ids(d))],
    "a withdrawal of all and a lost challenge": lambda d: [
        d.opening, found(d, "right", "verifier", 4), *stakes(JUDGED_NETWORK, "verifier", ("withdraw", STAKE_MICRO)),
    ],
    "a withdrawal of all, a fault and what it rests on": lambda d: [
        d.opening, found(d), d.fault("verifier", 3), *stakes(JUDGED_NETWORK, "verifier", ("withdraw", STAKE_MICRO)),
    ],
    "an ordered error and the settlement after it": lambda d: [
        d.opening, found(d, "forced"), d.settlement(5_000_000, after=ids(d)),
    ],
}  # fmt: skip
FREE_APART: dict[str, Records] = {
    "two settlements": lambda d: [d.opening, d.settlement(5), d.settlement(6)],
    "a settlement and a slash": lambda d: [d.opening, d.settlement(5), d.slash()],
    "slashes of two quorums": lambda d: [d.opening, d.slash(), d.slash(CHECKERS)],
    "an opening and a move of one number": lambda d: [
        d.opening, moved(FREE_NETWORK, "submitter", "add", 10**6, sequence=d.terms.sequence),
    ],
    "a withdrawal and a lock that one stake cannot pay": lambda d: [
        d.opening, *stakes(FREE_NETWORK, "solver", ("withdraw", STAKE_MICRO)),
    ],
    "two openings of one number": lambda d: [d.opening, free(solver="worker").opening],
    "two openings that one balance cannot pay": lambda _: [
        free(number, channel=FREE_MICRO * 2 // 3).opening for number in range(2)
    ],
}  # fmt: skip
JUDGED_APART: dict[str, Records] = {
    "a settlement and a later finding": lambda d: [d.opening, d.settlement(5), found(d)],
    "a withdrawal of all, a lost challenge and an add after it": lambda d: [
        d.opening, found(d, "right", "verifier", 4),
        *stakes(JUDGED_NETWORK, "verifier", ("withdraw", STAKE_MICRO), ("add", 10**6)),
    ],
    "two finders of wrong work": lambda d: [d.opening, found(d), found(d, by="verifier", segment=4)],
    "a jackpot and what fills the pool": lambda d: [
        d.opening, judged(1).opening, found(d, "forced"), judged(1).settlement(5_000_000),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", [*FREE_SAME, *JUDGED_SAME])
def test_these_records_make_the_same_money_in_every_order(name: str) -> None:
    if name in FREE_SAME:
        assert ledgers(FREE_NETWORK, FREE_SAME[name](free())) == 1
    else:
        assert ledgers(JUDGED_NETWORK, JUDGED_SAME[name](judged())) == 1


@pytest.mark.parametrize("name", [*FREE_APART, *JUDGED_APART])
def test_these_are_the_exceptions_and_money_is_conserved_in_each(name: str) -> None:
    """Whoever mends one moves it to the other table, and in the decision."""
    if name in FREE_APART:
        assert ledgers(FREE_NETWORK, FREE_APART[name](free())) == 2
    else:
        assert ledgers(JUDGED_NETWORK, JUDGED_APART[name](judged())) == 2


def test_a_voucher_heard_after_the_window_closed_here_and_before_it_there_is_an_exception() -> None:
    deal = free()
    records = [deal.opening, deal.claim(1_000, by_solver=False), deal.claim(5_000, by_solver=True)]
    assert ledgers(FREE_NETWORK, records) == 1
    assert ledgers(FREE_NETWORK, records, between_s=12) == 2
