"""What co-signed endings of agreements say of a peer: a Beta posterior that fades, and its pessimistic bound.

Promises: the same endings, in any order, on one UTC day make the same score on every machine (integers only); more
that went right never lowers a bound, more that went wrong never raises it; and what one counterparty, or any number of
counterparties that brought nothing into the network, can say for a peer is bounded. Refuses to know records, stores
and clocks: peer/channel.py says how an agreement ended, docs/decisions/0016-reputation.md why the rule is this one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Final, Literal, TypeAlias

from protocol import params

__all__ = ["DAY_NS", "DEAL", "ROLES", "Ending", "Evidence", "Reputation", "Reputations", "Role", "Weighed", "weigh"]

Role: TypeAlias = Literal["solver", "verifier", "submitter"]
Outcome: TypeAlias = Literal["settled", "claimed", "unpaid", "wrong", "paid", "condemned", "faulty", "left"]
ROLES: Final[tuple[Role, ...]] = ("solver", "verifier", "submitter")
DAY_NS: Final = 86_400 * 10**9
DEAL: Final = 1_000_000  # evidence is counted in millionths of a deal

# (role, outcome) -> (for the peer?, millionths of a deal). What only the other party signed weighs a quarter.
WEIGHTS: Final[Mapping[tuple[Role, Outcome], tuple[Literal["right", "lost", "wrong"], int]]] = {
    ("solver", "settled"): ("right", DEAL),  # both signed what was paid, after the checks
    ("solver", "claimed"): ("right", DEAL // 2),  # the submitter's vouchers paid, but nobody says the checks passed
    ("solver", "unpaid"): ("lost", DEAL // 4),  # nothing was delivered, or its submitter says so
    ("solver", "wrong"): ("wrong", DEAL),  # a quorum of checkers, or of notaries
    ("verifier", "paid"): ("right", DEAL),  # both parties of the agreement signed its fee
    ("verifier", "condemned"): ("right", DEAL),  # its verdict was one of the quorum that slashed
    ("verifier", "faulty"): ("wrong", DEAL),  # it signed that wrong work was right
    ("submitter", "settled"): ("right", DEAL),
    ("submitter", "left"): ("lost", DEAL // 4),  # its solver had to close alone
}


def _decay() -> tuple[int, ...]:
    """What is left of evidence after 0, 1, 2 ... days, in units of 10^-18, until a deal is less than a millionth."""
    left, table = 10**18, []
    while left >= 10**12:
        table.append(left)
        left = left * params.REPUTATION_DAY_ATTO // 10**18
    return tuple(table)


_DECAY: Final = _decay()


@dataclass(frozen=True)
class Ending:
    """How an agreement ended, from its co-signed records alone. Keys are 32 bytes, money is micro-credits.

    created_ns: the agreement's own time, which both parties signed. checked: whether the work could be re-executed.
    wrong: a quorum found it wrong, before the end or after. claimants: who closed one-sidedly. checkers: whose fee both
    signed; condemners: whose verdicts slashed; faulty: whose right verdict was refuted.
    """

    deal: bytes
    submitter: bytes
    solver: bytes
    created_ns: int
    checked: bool
    how: str  # "settled", "claimed" or "slashed"
    paid_micro: int
    wrong: bool = False
    claimants: frozenset[bytes] = frozenset()
    checkers: frozenset[bytes] = frozenset()
    condemners: frozenset[bytes] = frozenset()
    faulty: frozenset[bytes] = frozenset()

    def evidence(self) -> list[Evidence]:
        """What it says, of each of the peers it speaks of, at most once of one peer in one role."""
        parties = {self.submitter, self.solver}
        outcomes: dict[tuple[Role, bytes], Outcome] = {}
        if self.checked:  # of a script nothing is re-executed: that it was paid says nothing of who ran it
            done: Outcome = "settled" if self.how == "settled" else "claimed"
            outcomes["solver", self.solver] = "wrong" if self.wrong else done if self.paid_micro else "unpaid"
            settled = self.checkers if self.how == "settled" else frozenset[bytes]()
            for peers, outcome in ((settled, "paid"), (self.condemners, "condemned"), (self.faulty, "faulty")):
                outcomes |= {("verifier", peer): outcome for peer in peers - parties}  # type: ignore[misc]
        if self.paid_micro and self.how == "settled":
            outcomes["submitter", self.submitter] = "settled"
        elif self.paid_micro and self.how == "claimed" and self.submitter not in self.claimants:
            outcomes["submitter", self.submitter] = "left"
        day = self.created_ns // DAY_NS
        return [
            Evidence(self.deal, role, peer, self.submitter if peer != self.submitter else self.solver, day, outcome)
            for (role, peer), outcome in sorted(outcomes.items())
        ]


@dataclass(frozen=True)
class Evidence:
    """One agreement's word on one peer in one role. other: the counterparty it comes from; day: of UTC, since 1970."""

    deal: bytes
    role: Role
    peer: bytes
    other: bytes
    day: int
    outcome: Outcome


@dataclass(frozen=True)
class Reputation:
    """The evidence that counts, in millionths of a deal, and how many deals it comes from.

    The posterior is Beta(right + 1, wrong + 1) (Jøsang and Ismail, The Beta Reputation System, 2002).
    """

    right_ppm: int = 0
    wrong_ppm: int = 0
    deals: int = 0  # that went right or wrong, uncapped: who has few is a newcomer

    @classmethod
    def known(cls, right: int, wrong: int) -> Reputation:
        """Of so many whole deals, none of them faded or capped."""
        return cls(right * DEAL, wrong * DEAL, right + wrong)

    @property
    def mean_ppm(self) -> int:
        """The mean of the posterior, in ppm, rounded down."""
        right, wrong = self.right_ppm + DEAL, self.wrong_ppm + DEAL
        return right * 1_000_000 // (right + wrong)

    @property
    def bound_ppm(self) -> int:
        """The mean less one standard deviation, in ppm, rounded down, at least 0: about the 16 % quantile.

        It ranks an unknown peer below a proven one. With a = right + 1, b = wrong + 1 and n = a + b the deviation is
        sqrt(a b / (n + 1)) / n; the square root is taken of integers, rounded up, so every machine finds the same.
        """
        a, b = self.right_ppm + DEAL, self.wrong_ppm + DEAL
        n, scale = a + b, 10**18
        root = isqrt(a * b * DEAL * scale**2 // (n + DEAL)) + 1
        return max(0, (a * scale - root) * 1_000_000 // (n * scale))


@dataclass(frozen=True)
class Weighed:
    """A reputation and what became of the evidence it was made of.

    pairs: counterparties that count; backed: those of them that brought a deposit into the network. washed: deals that
    did not count because their pair had one that day. capped_ppm: what caps took away, after fading. faded_ppm: what
    age took away of what the wash rule left. since_day: of the oldest evidence; None without any.
    """

    reputation: Reputation
    outcomes: Mapping[str, int]
    pairs: int = 0
    backed: int = 0
    washed: int = 0
    capped_ppm: int = 0
    faded_ppm: int = 0
    early: int = 0  # dated after today: they count when their day comes
    since_day: int | None = None


def weigh(evidence: Iterable[Evidence], *, today: int, backed: frozenset[bytes], viewer: bytes = b"") -> Weighed:
    """Put evidence of one peer in one role together, as of the UTC day `today`.

    Of one counterparty and day only the weightiest right counts, and the weightiest loss. Then all fades, and what
    one counterparty says counts at most REPUTATION_PAIR_DEALS; all that are not `backed` count as one. What `viewer`
    saw itself has no cap: nobody cheats himself. Wrong work always counts, and only fades.
    """
    best: dict[tuple[str, bytes, int], int] = {}
    outcomes: Counter[str] = Counter()
    others: set[bytes] = set()
    wrong = deals = washed = faded = early = 0
    since: int | None = None
    for one in evidence:
        kind, weight = WEIGHTS[one.role, one.outcome]
        if kind == "wrong":
            left = _left(weight, today - one.day)
            wrong, faded = wrong + left, faded + weight - left
        elif one.day > today:
            early += 1
            continue
        else:
            place = kind, one.other, one.day
            washed += place in best
            best[place] = max(best.get(place, 0), weight)
        outcomes[one.outcome] += 1
        others.add(one.other)
        deals += kind != "lost"
        since = one.day if since is None else min(since, one.day)
    sums: dict[tuple[str, bytes], int] = defaultdict(int)
    for (of, other, day), weight in best.items():
        left = _left(weight, today - day)
        faded += weight - left
        # Who is not backed is one with all others who are not: keys are free.
        sums[of, other if other in backed or other == viewer else b""] += left
    counted = {of: _capped(sums, of, viewer) for of in ("right", "lost")}
    return Weighed(
        Reputation(counted["right"], wrong + counted["lost"], deals),
        dict(sorted(outcomes.items())),
        len(others),
        len(others & backed),
        washed,
        sum(sums.values()) - sum(counted.values()),
        faded,
        early,
        since,
    )


def _left(weight_ppm: int, age_days: int) -> int:
    """What is left of evidence of that age, in millionths of a deal, rounded down."""
    age = max(0, age_days)
    return weight_ppm * _DECAY[age] // 10**18 if age < len(_DECAY) else 0


def _capped(sums: Mapping[tuple[str, bytes], int], kind: str, viewer: bytes) -> int:
    cap = params.REPUTATION_PAIR_DEALS * DEAL
    if kind == "lost":
        cap = params.REPUTATION_PAIR_LOSSES * DEAL
    own = viewer or None  # no counterparty is b"" but the sum of those who are not backed
    return sum(ppm if other == own else min(ppm, cap) for (of, other), ppm in sums.items() if of == kind)


@dataclass
class Reputations:
    """The evidence of a settlement log, by role and peer. backed: keys with a deposit of their own in the network."""

    backed: frozenset[bytes] = frozenset()
    _endings: dict[bytes, Ending] = field(default_factory=dict)
    _by_peer: dict[tuple[Role, bytes], dict[bytes, Evidence]] = field(default_factory=dict)
    _weighed: dict[tuple[Role, bytes, int, bytes], Weighed] = field(default_factory=dict)

    def put(self, ending: Ending) -> None:
        """Take an ending, in the place of what was known of its deal: work may be found wrong after it was paid."""
        old = self._endings.get(ending.deal)
        if old == ending:
            return
        for one in old.evidence() if old is not None else ():
            del self._by_peer[one.role, one.peer][one.deal]
        self._endings[ending.deal] = ending
        for one in ending.evidence():
            self._by_peer.setdefault((one.role, one.peer), {})[one.deal] = one
        self._weighed.clear()

    def peers(self, role: Role) -> list[bytes]:
        """Of whom there is evidence in a role, in order of their keys."""
        return sorted(peer for (of, peer), found in self._by_peer.items() if of == role and found)

    def evidence(self, role: Role, peer: bytes) -> list[Evidence]:
        """All evidence of a peer in a role, in order of its deals."""
        return sorted(self._by_peer.get((role, peer), {}).values(), key=lambda one: one.deal)

    def of(self, role: Role, peer: bytes, *, today: int, viewer: bytes = b"") -> Weighed:
        """What the evidence comes to on a UTC day, as `viewer` sees it. Kept until an ending or a day is new."""
        place = role, peer, today, viewer
        if place not in self._weighed:
            if len(self._weighed) >= params.STANDINGS_MAX:
                self._weighed.clear()
            found = self._by_peer.get((role, peer), {}).values()
            self._weighed[place] = weigh(found, today=today, backed=self.backed, viewer=viewer)
        return self._weighed[place]
