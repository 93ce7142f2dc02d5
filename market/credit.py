"""The arithmetic of mutual credit: what is left of a line, and which debts cancel each other. Pure, integers only.

A debt is (debtor, creditor) -> micro-credits. What a peer is owed less what it owes is its position; netting moves no
position, it only takes debts away (tests/test_credit.py proves it over drawn graphs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from protocol import params
from protocol.errors import InsufficientFunds

__all__ = ["Cycle", "Debts", "cleared", "find_cycles", "left_micro", "netted", "positions"]

Debts: TypeAlias = Mapping[tuple[bytes, bytes], int]
"""(debtor, creditor) -> micro-credits, each above 0."""


@dataclass(frozen=True)
class Cycle:
    """Each of `parties` owes the next, the last the first, at least `amount_micro`. The smallest key comes first."""

    parties: tuple[bytes, ...]
    amount_micro: int

    def edges(self) -> list[tuple[bytes, bytes]]:
        """Its debts, as (debtor, creditor)."""
        return list(zip(self.parties, (*self.parties[1:], self.parties[0]), strict=True))


def left_micro(*, limit_micro: int, owed_micro: int, open_micro: int) -> int:
    """What a debtor may still run up, at least 0. owed_micro: what it owes, less what it is owed (it may be negative: a
    creditor's own debts make room). open_micro: what the deals that still run can come to."""
    return max(0, limit_micro - owed_micro - open_micro)


def positions(debts: Debts) -> dict[bytes, int]:
    """What each peer is owed, less what it owes, in micro-credits."""
    found: dict[bytes, int] = {}
    for (debtor, creditor), micro in debts.items():
        found[debtor] = found.get(debtor, 0) - micro
        found[creditor] = found.get(creditor, 0) + micro
    return found


def netted(debts: Debts) -> dict[tuple[bytes, bytes], int]:
    """The debts with those of each pair set against each other: no two peers owe each other any more."""
    left: dict[tuple[bytes, bytes], int] = {}
    for debtor, creditor in sorted(debts):
        balance = debts[debtor, creditor] - debts.get((creditor, debtor), 0)
        if balance > 0:
            left[debtor, creditor] = balance
    return left


def cleared(debts: Debts, cycle: Cycle) -> dict[tuple[bytes, bytes], int]:
    """The debts after a cycle is cleared. Raises InsufficientFunds where one of them is smaller than its amount."""
    left = dict(debts)
    for edge in cycle.edges():
        if left.get(edge, 0) < cycle.amount_micro:
            raise InsufficientFunds(
                f"a debt of {left.get(edge, 0)} micro-credits cannot fall by {cycle.amount_micro}",
                why="a cycle clears no more than its smallest debt",
            )
        left[edge] -= cycle.amount_micro
        if not left[edge]:
            del left[edge]
    return left


def find_cycles(debts: Debts, *, length_max: int = params.CREDIT_CYCLE_MAX) -> list[Cycle]:
    """Cycles of 3 to `length_max` debts to clear one after the other, the one that takes most away first.

    Greedy: of all cycles the one with the largest amount times length is taken, the shorter of two equals, then the one
    of larger keys, until none is left; each takes away at least one debt whole, so it ends. Deterministic: who knows
    the same debts finds the same cycles. Pairs are netted first, for two who owe each other need nobody else. Not the
    most that could be cleared: that is a flow problem, and every cycle costs the signatures of all its parties.
    """
    left = netted(debts)
    cycles = _cycles(left, length_max)  # clearing one makes no new ones
    found: list[Cycle] = []
    while cycles and len(found) < params.CREDIT_CLEARINGS_MAX:
        best = max(cycles, key=_worth)
        left = cleared(left, best)
        found.append(best)
        cycles = [_shrunk(cycle, left) for cycle in cycles if all(edge in left for edge in cycle.edges())]
    return found


def _shrunk(cycle: Cycle, left: Debts) -> Cycle:
    return Cycle(cycle.parties, min(left[edge] for edge in cycle.edges()))


def _worth(cycle: Cycle) -> tuple[int, int, tuple[bytes, ...]]:
    return cycle.amount_micro * len(cycle.parties), -len(cycle.parties), cycle.parties


def _cycles(debts: Debts, length_max: int) -> list[Cycle]:
    """Every simple cycle of at most `length_max` debts, as far as CREDIT_PATHS_MAX paths show; in order of keys."""
    owes: dict[bytes, list[bytes]] = {}
    for debtor, creditor in sorted(debts):
        owes.setdefault(debtor, []).append(creditor)
    found: list[Cycle] = []
    paths = 0
    for start in sorted(owes):
        stack: list[tuple[bytes, ...]] = [(start,)]
        while stack and paths < params.CREDIT_PATHS_MAX:
            path = stack.pop()
            paths += 1
            for creditor in reversed(owes.get(path[-1], [])):
                if creditor == start and len(path) >= 3:
                    found.append(_shrunk(Cycle(path, 0), debts))
                elif creditor > start and creditor not in path and len(path) < length_max:
                    stack.append((*path, creditor))
    return found
