"""Which of several proposals a solver signs: the work that is worth most for each second of its time.

Several submitters choose the same free solver at about the same moment, each by its own round. Who comes first says
nothing: gossip decides it. So a solver waits for about a round and takes the best. What the work is worth is the limit
that its submitter signed in its offer, not the price, which is the bid's and often the same for all; as the price
follows what goes without (market/pricing.py), a limit that is not meant costs its author money. Pure and deterministic:
the same proposals in any order give the same choice, and whoever sees their offers and the opening can make it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from market.matching import Refusal

__all__ = ["PASSED_OVER", "Proposal", "choose"]

PASSED_OVER = frozenset(("busy", "outbid"))
"""Codes of a decline that says nothing of the job or of the solver's wish to bid again: the slot went to other work."""


@dataclass(frozen=True)
class Proposal:
    """An award that waits for its solver's signature.

    worth_micro: the most that its submitter would pay for the work, and can, price_micro: what it will pay, by the bid.
    takes_ns: the time that the solver expects it to take. limit, unit_price: the same, per giga-operation.
    """

    id: bytes
    worth_micro: int
    price_micro: int
    takes_ns: int
    limit: int
    unit_price: int

    @property
    def rank(self) -> tuple[int, int, bytes]:
        """Smaller is better: worth a second, then pay a second, both in micro-credits and rounded down; then the id."""
        takes_ns = max(1, self.takes_ns)
        return -(self.worth_micro * 10**9 // takes_ns), -(self.price_micro * 10**9 // takes_ns), self.id


def choose(
    proposals: Sequence[Proposal], *, slots: int
) -> tuple[tuple[Proposal, ...], tuple[tuple[Proposal, Refusal], ...]]:
    """Those to sign, best first and no more than `slots`; and why the others are not."""
    ranked = sorted(proposals, key=lambda one: one.rank)
    signed, passed = ranked[: max(0, slots)], ranked[max(0, slots) :]
    if not signed:
        return (), tuple((one, Refusal("busy", "every slot of this peer is taken")) for one in passed)
    last = signed[-1]
    why = f"the slot went to work that pays up to {last.limit} per Gop, sold at {last.unit_price}"
    return tuple(signed), tuple((one, Refusal("outbid", why)) for one in passed)
