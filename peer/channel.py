"""One agreement's money, as the records seen so far leave it."""

from __future__ import annotations

from dataclasses import dataclass, field

from market.entries import NULL_KEY
from market.reputation import Ending
from protocol import params
from protocol.arbitration import Judged
from protocol.errors import LimitExceeded
from protocol.money_line import pool_slice
from protocol.network import Network
from protocol.records import Agreement

__all__ = ["Channel"]


@dataclass
class Channel:
    """See the module docstring. Times in ns since the epoch; money in micro-credits."""

    agreement: Agreement
    closed: str = ""  # "", "settled", "slashed" or "claimed"
    closed_ns: int = 0
    locked: bool = True  # the solver's lock is still held
    paid_micro: int = 0
    claim_ends_ns: int = 0
    best_voucher_micro: int = 0
    fees: tuple[tuple[bytes, int], ...] = ()
    moot: int = 0
    frozen: bool = False  # a staked checker found a segment wrong: a claim waits for a quorum
    challenges: dict[bytes, bytes] = field(default_factory=dict)  # the latest id of each challenger that held the lock
    held_until_ns: int = 0  # for the notaries to judge them
    findings: dict[bytes, Judged] = field(default_factory=dict)  # what notaries found, by dispute
    faults: dict[bytes, bytes] = field(default_factory=dict)  # right verdicts that cost a stake -> their checkers
    claimants: set[bytes] = field(default_factory=set)  # the parties that asked to close it alone
    condemners: tuple[bytes, ...] = ()  # the checkers whose verdicts slashed its lock
    records: list[bytes] = field(default_factory=list)  # ids of those that had an effect, in order; b"": a window ended

    def judged(self, network: Network) -> bool:
        """Whether notaries may judge the work: it is re-executed, and the network has some."""
        return bool(network.notaries and self.agreement.check_permille)

    def pool_micro(self, paid_micro: int, network: Network) -> int:
        """What of such a pay goes to the jackpot pool."""
        return pool_slice(paid_micro, pool_permille=network.rules.pool_permille, judged=self.judged(network))

    def count_moot(self) -> None:
        """A valid record that changes nothing. Every log keeps it, or two peers that saw an ending from two sides would
        compare their logs for ever. Raises LimitExceeded."""
        self.moot += 1
        if self.moot > params.MOOT_RECORDS_MAX:
            raise LimitExceeded(f"more than {params.MOOT_RECORDS_MAX} records of one channel that change nothing")

    def ending(self, deal: bytes) -> Ending:
        """How it ended, for market/reputation.py: from the records alone, so every peer with them says the same."""
        assert self.closed, "an agreement that runs is no evidence"
        return Ending(
            deal,
            self.agreement.submitter,
            self.agreement.solver,
            self.agreement.created_ns,
            checked=bool(self.agreement.check_permille),
            how=self.closed,
            paid_micro=self.paid_micro,
            wrong=self.closed == "slashed" or any(judged.finding == "wrong" for judged in self.findings.values()),
            claimants=frozenset(self.claimants),
            checkers=frozenset(peer for peer, _ in self.fees if peer != NULL_KEY),
            condemners=frozenset(self.condemners),
            faulty=frozenset(self.faults.values()),
        )

    def open_challenges(self) -> set[bytes]:
        """The challengers whose latest challenge is not judged."""
        return {challenger for challenger, dispute in self.challenges.items() if dispute not in self.findings}

    def hold(self) -> bytes:
        """What is journalled of the hold: its end and who held, for nobody may hold anew after a restart."""
        return self.held_until_ns.to_bytes(8, "big") + b"".join(a + b for a, b in sorted(self.challenges.items()))

    def restore_hold(self, row: bytes) -> None:
        """Take back what `hold` gave."""
        self.held_until_ns = int.from_bytes(row[:8], "big")
        self.challenges = {row[at : at + 32]: row[at + 32 : at + 64] for at in range(8, len(row), 64)}
