"""What the notaries' findings make of a channel, a lock, a stake and the pool. protocol/outcomes.py says who gets what.

After a channel's end the solver's lock stays for `challenge_ms`, so that whoever finds the work wrong then still finds
something to take it from; while a challenge is open it stays for as long as a dispute can last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from market import entries as money
from market import penalties
from market.entries import POOL
from market.matching import Record as History
from peer.channel import Channel
from peer.desk import Desk
from peer.stakes import NotYet, Stakes
from protocol import params
from protocol.arbitration import Judged, check_challenge, open_arbitration, refutes
from protocol.equivocation import ordered_twice
from protocol.errors import InsufficientFunds, LimitExceeded, VerificationFailed
from protocol.outcomes import jackpot_micro
from protocol.records import Arbitration, Challenge, Equivocation, Fault, Verdict, amount_for, open_record

__all__ = ["Judgement", "NotYet"]


@dataclass
class Judgement:
    """See the module docstring. `channels`, `histories` and `stakes` are the settler's own."""

    desk: Desk
    stakes: Stakes
    channels: dict[bytes, Channel]
    histories: dict[bytes, History]
    slashed: Callable[[bytes, Channel], None]
    twice: Counter[tuple[bytes, int]] = field(default_factory=Counter)  # proofs, by culprit and sequence number
    judging: bool = True  # False while the journal is folded again: the ledger has those entries
    judged: list[tuple[bytes, Judged]] = field(default_factory=list)  # news for the node

    def arbitrate(self, agreement_id: bytes, channel: Channel, record: Arbitration) -> None:
        """Fold an Arbitration. Raises VerificationFailed for one that does not hold, LimitExceeded."""
        if not channel.agreement.check_permille:
            raise VerificationFailed("an arbitration over a script", why="nothing of it is re-executed")
        judged = open_arbitration(record, channel.agreement, self.desk.network)
        if judged.dispute in channel.findings:
            channel.count_moot()  # two peers published the same
            return
        channel.findings[judged.dispute] = judged
        self.stakes.judged_ns = self.desk.now_ns
        if channel.held_until_ns and channel.challenges and not channel.open_challenges():
            channel.held_until_ns = 0
            self.desk.save("held", agreement_id, channel.hold())
        if judged.finding == "wrong":
            self._convict(agreement_id, channel, judged)
        elif self.judging and judged.finding == "right":
            self._challenge_lost(channel, judged)
        elif self.judging:
            self._ordered(agreement_id, channel, judged)
        self.judged.append((agreement_id, judged))

    def _convict(self, agreement_id: bytes, channel: Channel, judged: Judged) -> None:
        """The work is wrong. After the close only the lock is left, and only while it is held."""
        agreement = channel.agreement
        if not channel.locked:
            return
        cost_micro = amount_for(min(judged.challenge.operations, agreement.operations), agreement.unit_price)
        self.desk.post(
            penalties.convict(
                agreement_id,
                submitter=agreement.submitter,
                solver=agreement.solver,
                channel_micro=0 if channel.closed else agreement.channel_micro,
                lock_micro=agreement.lock_micro,
                refund_micro=channel.paid_micro,
                winner=judged.challenge.challenger,
                rewarded=judged.basis != "both",
                costs=((judged.challenge.challenger, cost_micro), *judged.fees),
            )
        )
        channel.locked = False
        if not channel.closed:
            self.slashed(agreement_id, channel)
            return
        old = self.histories.get(agreement.solver, History())
        self.histories[agreement.solver] = old.after_wrong(taken_back=bool(channel.paid_micro))

    def _challenge_lost(self, channel: Channel, judged: Judged) -> None:
        """The challenger pays the solver for one segment, which it had to execute again, and the referees."""
        agreement, challenger = channel.agreement, judged.challenge.challenger
        segments = agreement.last_segment - agreement.first_segment
        cost_micro = amount_for(agreement.operations // segments, agreement.unit_price)
        costs = ((agreement.solver, cost_micro), *judged.fees)
        self.stakes.penalise(
            penalties.lost_challenge(
                judged.dispute,
                challenger=challenger,
                micro=self._at_stake(challenger),
                costs=costs,
                holdings=self.stakes.holdings(challenger),
            )
        )

    def _ordered(self, agreement_id: bytes, channel: Channel, judged: Judged) -> None:
        """The error was ordered. The first who found it gets the jackpot; nobody is to blame."""
        if any(other.finding == "forced" and other is not judged for other in channel.findings.values()):
            return
        micro = jackpot_micro(channel.agreement, self.desk.network.rules, self.desk.ledger.balance_micro(POOL))
        if micro:
            self.desk.post(money.jackpot(penalties.jackpot_key(agreement_id), judged.challenge.challenger, micro))

    def fault(self, channel: Channel, record: Fault) -> None:
        """Fold a Fault: its checker signed that a segment was right which notaries saw was wrong, or an ordered error.
        A solver that merely gave up refutes nobody: its work may be right.

        Raises NotYet while no such finding is here, VerificationFailed, LimitExceeded.
        """
        verdict, verdict_id, _ = open_record(record.verdict, network=self.desk.network.id)
        if not isinstance(verdict, Verdict) or verdict.finding != "right" or verdict.agreement != record.agreement:
            raise VerificationFailed("a fault without a right verdict on its agreement")
        if not any(refutes(judged, verdict) for judged in channel.findings.values()):
            raise NotYet("no finding against a segment of this verdict is here yet")
        if verdict_id in channel.faults:
            channel.count_moot()  # two peers published the same
            return
        channel.faults[verdict_id] = verdict.checker
        if self.judging:
            # A solver and a challenger in league can lose a dispute on purpose, by a leaf they staged: a verdict of
            # somebody else must not cost more than what that burns of their lock.
            micro = min(self._at_stake(verdict.checker), channel.agreement.lock_micro // 2)
            holdings = self.stakes.holdings(verdict.checker)
            self.stakes.penalise(penalties.fault(verdict_id, checker=verdict.checker, micro=micro, holdings=holdings))

    def ordered_twice(self, proof: Equivocation) -> None:
        """Fold the proof that an owner signed two orders under one number. The amount is fixed, so that it is the same
        on every peer in whatever order. Raises NotYet while the stake is not there, VerificationFailed."""
        culprit, sequence = proof.culprit, ordered_twice(proof)
        if sequence is None:
            raise VerificationFailed("an equivocation that is not about orders moves no money")
        if self.twice[culprit, sequence] > params.MOOT_RECORDS_MAX:
            raise LimitExceeded(f"more than {params.MOOT_RECORDS_MAX} proofs of one number ordered twice")
        if not self.desk.ledger.applied(penalties.equivocation_key(culprit, sequence)):
            micro, holdings = self.desk.network.rules.checker_stake_min_micro, self.stakes.holdings(culprit)
            try:
                self.stakes.penalise(penalties.equivocation(culprit, sequence, micro=micro, holdings=holdings))
            except InsufficientFunds as error:
                raise NotYet(str(error)) from None
        self.twice[culprit, sequence] += 1  # a proof by another pair changes nothing, and every log keeps it

    def _at_stake(self, checker: bytes) -> int:
        """What a checker's word is worth: the least stake a checker must have, as far as its stake still reaches, and
        what it withdrew lately."""
        return min(self.desk.network.rules.checker_stake_min_micro, self.stakes.at_stake(checker))

    def staked(self, challenge: Challenge, challenge_id: bytes) -> int:
        """What its challenger stands to lose, in micro-credits: of one that had the stake when it challenged, what it
        withdrew since as well."""
        channel, who = self.channels.get(challenge.agreement), challenge.challenger
        held = channel is not None and channel.challenges.get(who) == challenge_id
        return self.stakes.at_stake(who) if held else self.stakes.free_micro(who)

    # --- windows -------------------------------------------------------------------------------------------
    def challenged(self, challenge: Challenge, challenge_id: bytes) -> None:
        """A challenge is in the air: what it is about waits for the notaries. One of a peer without the stake, on a
        lock that is gone, that was judged or that no notary can judge holds nothing back, nor does the second of a
        peer whose first is not judged: it would cost its author nothing to hold a lock for ever."""
        channel, rules = self.channels.get(challenge.agreement), self.desk.network.rules
        if channel is None or not channel.locked or challenge_id in channel.findings:
            return
        challenger = challenge.challenger
        try:
            check_challenge(challenge, channel.agreement)
        except VerificationFailed:
            return
        stake = self.stakes.free_micro(challenger)
        if challenger in channel.open_challenges() or stake < rules.checker_stake_min_micro:
            return
        channel.challenges[challenger] = challenge_id
        longest_ms = 2 * rules.dispute_replay_ms + params.DISPUTE_ROUNDS_MAX * rules.dispute_move_ms
        channel.held_until_ns = self.desk.now_ns + longest_ms * 10**6
        self.desk.save("held", challenge.agreement, channel.hold())

    def tick(self, agreement_id: bytes, channel: Channel) -> None:
        """Free the lock of a channel that was closed, when nobody may challenge the work any more."""
        ends_ns = max(channel.closed_ns + self.desk.network.rules.challenge_ms * 10**6, channel.held_until_ns)
        if channel.closed and channel.locked and self.desk.now_ns >= ends_ns:
            self.desk.attempt(self._unlock, agreement_id, channel)

    def _unlock(self, agreement_id: bytes, channel: Channel) -> None:
        agreement = channel.agreement
        channel.locked = False
        self.desk.post(
            penalties.unlock(
                agreement_id,
                submitter=agreement.submitter,
                solver=agreement.solver,
                lock_micro=agreement.lock_micro,
            )
        )
