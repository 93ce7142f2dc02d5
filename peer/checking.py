"""The submitter's side of verification: draw segments and checkers, collect verdicts, settle, slash or claim.

Nobody chooses the checkers: they come out of randomness that both seeds and the proof decide, in proportion to their
stakes, and half as often without a bench card (DESIGN §5.5). A single wrong verdict convicts nobody: it freezes the
deal until a quorum of distinct checkers agrees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from market.matching import Proven
from peer.correcting import Corrections
from peer.deals import Check, Deal, make_claim, move, save, task_of
from peer.desk import Desk
from peer.messages import CheckAccept, CheckDecline, CheckRequest, SettleBack, SettleOffer
from peer.settler import Settler
from protocol import params
from protocol.credit_records import NO_CREDIT, ON_CREDIT
from protocol.errors import RemoteProtocolError, VerificationFailed
from protocol.forced import forced_of, open_beacon
from protocol.house import KNOWN_END, is_rerun
from protocol.lifecycle import Event, State
from protocol.records import (
    ROLE_VERIFIER,
    ROLE_WHISTLEBLOWER,
    Agreement,
    Settlement,
    Slash,
    Verdict,
    amount_for,
    open_record,
)
from protocol.sampling import checker_weight, draw, draw_weighted, mixed, randomness, select_segments
from protocol.script import ASSURANCES

__all__ = ["CheckDesk"]


@dataclass
class CheckDesk:
    """Verification of the submitter's proved deals. `on_right` lets the job of an ended deal go on."""

    desk: Desk
    settler: Settler
    corrections: Corrections
    on_right: Callable[[Deal], None] = lambda _: None
    on_paid_and_wrong: Callable[[Deal], None] = lambda _: None
    speed_of: Callable[[bytes], Proven] = lambda _: Proven("none", 0)
    resend: dict[tuple[bytes, bytes], int] = field(default_factory=dict)  # (deal, peer) -> next request at
    told: dict[bytes, str] = field(default_factory=dict)  # deal -> the last reason to wait

    def __post_init__(self) -> None:
        self.corrections.ask = self._ask_corrected

    def begin(self, deal: Deal, agreement: Agreement, receipts: list[bytes]) -> None:
        """Draw the segments and ask the first checkers. Of a script, on credit, and where the house knew the end,
        nothing is drawn: it is settled as it is."""
        if not agreement.check_permille:
            known = KNOWN_END if is_rerun(agreement, self.desk.network) else ""
            why = ASSURANCES.get(task_of(deal.task).mode, known) if agreement.credit == NO_CREDIT else ON_CREDIT
            self.desk.emit("unchecked", deal.job, deal=deal.id, why=why)
            self._found_right(deal, agreement, receipts)
            return
        random = self._randomness(deal, agreement)
        deal.drawn = list(
            select_segments(
                random,
                first=agreement.first_segment,
                last=agreement.first_segment + deal.receipts,
                permille=agreement.check_permille,
                minimum=self.desk.network.rules.check_segments_min,
            )
        )
        self.desk.emit("draw", deal.job, deal=deal.id, segments=deal.drawn, of=deal.receipts)
        self._ask(deal, agreement, receipts, "verifier", deal.drawn)
        if self._audited(random):
            first = draw(random, b"audit", [s.to_bytes(8, "big") for s in deal.drawn])[0]
            self._ask(deal, agreement, receipts, "whistleblower", [int.from_bytes(first, "big")])

    def _randomness(self, deal: Deal, agreement: Agreement) -> bytes:
        seeds = randomness(proof=deal.proof_id, submitter_seed=deal.seed, solver_seed=deal.other_seed)
        network = self.desk.network
        return mixed(seeds, open_beacon(deal.draw_beacons, target=seeds, agreement=agreement, network=network))

    def _audited(self, random: bytes) -> bool:
        number = int.from_bytes(draw(random, b"audit-coin", [i.to_bytes(2, "big") for i in range(1000)])[0], "big")
        return number < self.desk.network.rules.audit_permille

    def _next_checker(self, deal: Deal, agreement: Agreement, role: str, segments: list[int]) -> bytes | None:
        """Who is drawn of the staked, connected peers in `role` that are no party and can say something new."""
        bit = ROLE_VERIFIER if role == "verifier" else ROLE_WHISTLEBLOWER
        asked = {
            check.peer
            for check in deal.checks
            if check.state in ("asked", "accepted", "wrong", "unsure", "overruled")
            or (check.state == "right" and set(segments) <= set(check.segments))
            # Who declined or vanished may be well again later; without this one crash can strand a deal.
            or (check.state == "gone" and self.desk.now_ns - check.asked_ns < params.CHECKER_REST_NS)
        }
        able = {
            ask.peer
            for ask in self.desk.book.live_asks(role=bit, now_ns=self.desk.wall_ns, peers=self.desk.peers)
            if ask.peer not in asked and ask.peer not in (agreement.submitter, agreement.solver)
        }
        weights = {peer: weight for peer in able if (weight := self._weight(peer))}
        return next(draw_weighted(self._randomness(deal, agreement), role.encode(), weights), None)

    def _weight(self, peer: bytes) -> int:
        return checker_weight(
            self.settler.free_stake(peer),
            stake_min_micro=self.desk.network.rules.checker_stake_min_micro,
            carded=self.speed_of(peer).grade != "none",
        )

    def _ask_corrected(self, deal: Deal, agreement: Agreement, receipts: list[bytes], segments: list[int]) -> bool:
        if self._ask(deal, agreement, receipts, "verifier", segments, corrected=True):
            return True
        self._wait(deal, "no live verifier is connected that could check the true end of an ordered error")
        return False

    def _ask(
        self,
        deal: Deal,
        agreement: Agreement,
        receipts: list[bytes],
        role: str,
        segments: list[int],
        *,
        corrected: bool = False,
        doubt: bytes = b"",
    ) -> bool:
        """Ask the next drawn checker of `role`. False if there is none."""
        checker = self._next_checker(deal, agreement, role, segments)
        if checker is None:
            return False
        wanted = (checker, role, segments, corrected, doubt)
        known = (c for c in deal.checks if (c.peer, c.role, c.segments, c.corrected, c.doubt) == wanted)
        check = next(known, None)
        if check is None:
            check = Check(
                peer=checker,
                role="verifier" if role == "verifier" else "whistleblower",
                segments=list(segments),
                asked_ns=self.desk.now_ns,
                corrected=corrected,
                doubt=doubt,
            )
            deal.checks.append(check)
        check.state, check.asked_ns = "asked", self.desk.now_ns
        self._request(deal, receipts, check)
        save(self.desk, deal)
        self.desk.emit("check", deal.job, deal=deal.id, checker=check.peer, role=role, segments=check.segments)
        return True

    def _request(self, deal: Deal, receipts: list[bytes], check: Check) -> None:
        self.resend[deal.id, check.peer] = self.desk.now_ns + params.RESEND_NS
        self.desk.send(
            check.peer,
            CheckRequest(
                agreement=deal.agreement,
                task=deal.task,
                base_blob=deal.base_blob,
                receipts=tuple(receipts),
                proof=deal.proof,
                reveals=tuple(r for r in (deal.own_reveal, deal.other_reveal) if r),
                segments=tuple(check.segments),
                role=check.role,
                beacons=tuple(deal.draw_beacons),
                forced=deal.forced if check.corrected else b"",
                forced_beacons=tuple(deal.beacons) if check.corrected else (),
                profiles=tuple(deal.profiles),
                doubt=check.doubt,
            ),
        )

    # --- answers -------------------------------------------------------------------------------------------
    def on_accept(self, deal: Deal, peer: bytes, _: CheckAccept) -> None:
        """The checker is at work."""
        for check in deal.checks:
            if check.peer == peer and check.state == "asked":
                check.state = "accepted"
                save(self.desk, deal)

    def on_decline(self, deal: Deal, peer: bytes, message: CheckDecline) -> None:
        """The checker will not: the next tick asks another."""
        for check in deal.checks:
            if check.peer == peer and check.state in ("asked", "accepted"):
                check.state = "gone"
                save(self.desk, deal)
                self.desk.emit("refused", deal.job, checker=peer, code=message.code, why=message.why)

    def on_verdict(self, deal: Deal, verdict: Verdict, envelope: bytes) -> None:
        """A checker's signed finding on one of its asked segments. Raises VerificationFailed."""
        if verdict.role == "juror":
            return  # it speaks to the notaries
        corrected = bool(deal.forced) and verdict.proof == forced_of(deal.forced, self.desk.network.id)[1]
        open_states = (State.CHECKING, State.DISPUTED, State.SETTLING)
        if deal.lifecycle not in open_states or not (corrected or verdict.proof == deal.proof_id):
            return
        mine = [c for c in deal.checks if c.peer == verdict.checker and c.corrected == corrected]
        check = next((c for c in mine if (c.segments, c.role) == (list(verdict.segments), verdict.role)), None)
        if mine and check is None:
            raise VerificationFailed("verdict on other segments than those drawn")
        if check is None or check.state in ("right", "wrong", "unsure"):
            return
        if verdict.finding == "unsure" and (check.doubt or not deal.profiles):
            raise VerificationFailed("an unsure verdict of one who has to decide")
        if verdict.finding != "right" and verdict.wrong_segment not in check.segments:
            raise VerificationFailed("verdict against a segment that was not drawn")
        task = task_of(deal.task)
        most = sum(len(task.steps_of(s)) for s in check.segments) * task.operations_per_step
        check.operations = min(verdict.operations, most)
        check.state, check.verdict = verdict.finding, envelope
        check.wrong_segment, check.found_root = verdict.wrong_segment, verdict.found_root
        save(self.desk, deal)
        self.desk.emit(
            "verdict",
            deal.job,
            deal=deal.id,
            checker=verdict.checker,
            role=verdict.role,
            finding=verdict.finding,
            segments=check.segments,
            wrong_segment=verdict.wrong_segment,
        )

    # --- time ----------------------------------------------------------------------------------------------
    def tick(self, deal: Deal, agreement: Agreement, receipts: list[bytes]) -> None:
        """Repeat requests, replace the silent, and decide when enough verdicts are in."""
        if deal.lifecycle == State.SETTLING:
            self._tick_settling(deal, agreement)
            return
        now, rules = self.desk.now_ns, self.desk.network.rules
        for check in deal.checks:
            if check.state not in ("asked", "accepted"):
                continue
            silent = now - check.asked_ns > rules.check_silence_ms * 10**6
            left = (
                check.peer not in self.desk.peers and now - self.desk.left_ns(check.peer) > rules.lost_grace_ms * 10**6
            )
            if silent or left:
                check.state = "gone"
                save(self.desk, deal)
                self.desk.emit("refused", deal.job, checker=check.peer, code="silent", why="the checker is gone")
            elif now >= self.resend.get((deal.id, check.peer), 0):
                self._request(deal, receipts, check)
        self._decide(deal, agreement, receipts)

    def _decide(self, deal: Deal, agreement: Agreement, receipts: list[bytes]) -> None:
        wrong = [c for c in deal.checks if c.state == "wrong" and not c.corrected]
        open_checks = [c for c in deal.checks if c.state in ("asked", "accepted")]
        if wrong and self.corrections.excuse(deal, wrong):
            return
        if wrong and self.desk.network.notaries:
            self._await_ruling(deal, wrong)
            return
        if wrong:
            self._decide_wrong(deal, agreement, receipts, wrong, open_checks)
            return
        if open_checks:
            return
        unsure = [c for c in deal.checks if c.state == "unsure" and not self._cleared(deal, c)]
        if unsure:
            first = unsure[0]
            if not self._ask(deal, agreement, receipts, "verifier", [first.wrong_segment], doubt=first.verdict):
                self._wait(deal, f"segment {first.wrong_segment} is in doubt, and no second verifier is connected")
            return
        excused = any(c.state == "excused" for c in deal.checks)
        if not excused and not any(c.state in ("right", "unsure") and c.segments == deal.drawn for c in deal.checks):
            if not self._ask(deal, agreement, receipts, "verifier", deal.drawn):
                self._wait(deal, "no live verifier with a stake is connected")
            return
        self._found_right(deal, agreement, receipts)

    @staticmethod
    def _cleared(deal: Deal, doubter: Check) -> bool:
        """Whether a second verifier found right what the first was unsure of."""
        return any(c.state == "right" and c.doubt == doubter.verdict for c in deal.checks)

    def _await_ruling(self, deal: Deal, wrong: list[Check]) -> None:
        """In a network with notaries they judge, when the checker presses its finding; one that does not is ignored."""
        silence_ns = self.desk.network.rules.check_silence_ms * 10**6
        for check in wrong:
            if self.desk.now_ns - max(check.asked_ns, deal.entered_ns) > silence_ns:
                check.state = "overruled"
                save(self.desk, deal)
        self._wait(
            deal, f"segment {wrong[0].wrong_segment} was found wrong: its checker has to prove it to the notaries"
        )

    def _decide_wrong(
        self, deal: Deal, agreement: Agreement, receipts: list[bytes], wrong: list[Check], open_checks: list[Check]
    ) -> None:
        """Some checker found a wrong segment: ask others until a quorum convicts, or as many clear it."""
        quorum = self.desk.network.rules.wrong_quorum
        agreeing = self._agreeing(wrong, exact=not deal.profiles)
        if len(agreeing) >= quorum and deal.paid_out:
            self.on_paid_and_wrong(deal)
            return
        if len(agreeing) >= quorum:
            slash = Slash(
                network=self.desk.network.id,
                agreement=deal.id,
                author=self.desk.me,
                proof=deal.proof,
                reveals=tuple(r for r in (deal.own_reveal, deal.other_reveal) if r),
                verdicts=tuple(c.verdict for c in agreeing[:8]),
            )
            try:
                self.settler.accept(self.desk.seal(slash), publish=True)
            except RemoteProtocolError as error:
                self._wait(deal, f"the verdicts do not convict: {error}")
            return
        if open_checks:
            return
        segment = wrong[0].wrong_segment
        against = {c.peer for c in deal.checks if c.state == "right" and segment in c.segments}
        if len(against) >= quorum:
            # That segment is cleared; the rest of the draw still needs somebody who ran all of it.
            if any(c.state in ("right", "unsure") and c.segments == deal.drawn for c in deal.checks):
                self._found_right(deal, agreement, receipts)
            elif not self._ask(deal, agreement, receipts, "verifier", deal.drawn):
                self._wait(deal, "no other verifier with a stake is here to run all drawn segments")
            return
        # Who was unsure of it has said so: the others have to decide, or no quorum would ever be of one word.
        doubt = next((c.verdict for c in deal.checks if c.state == "unsure" and c.wrong_segment == segment), b"")
        for role in ("whistleblower", "verifier"):
            if self._ask(deal, agreement, receipts, role, [segment], doubt=doubt):
                return
        self._wait(deal, f"segment {segment} was found wrong, and no other staked checker is here to confirm it")

    @staticmethod
    def _agreeing(wrong: list[Check], *, exact: bool) -> list[Check]:
        """The largest set of wrong verdicts, one a checker, that does not name two roots for one segment: one liar
        with a made-up root must not spoil the verdicts of the others. Float work has many roots."""
        best: list[Check] = []
        for first in wrong:
            chosen = {first.peer: first}
            for other in sorted(wrong, key=lambda c: c.peer):
                fits = all(
                    not exact or c.wrong_segment != other.wrong_segment or c.found_root == other.found_root
                    for c in chosen.values()
                )
                if other.peer not in chosen and fits:
                    chosen[other.peer] = other
            if len(chosen) > len(best):
                best = sorted(chosen.values(), key=lambda c: c.peer)
        return best

    def _wait(self, deal: Deal, why: str) -> None:
        if self.told.get(deal.id) != why:
            self.told[deal.id] = why
            self.desk.emit("waiting", deal.job, deal=deal.id, why=why)

    # --- closing -------------------------------------------------------------------------------------------
    def fees(self, deal: Deal, agreement: Agreement) -> tuple[tuple[bytes, int], ...]:
        """Each right verdict at the deal's unit price, as far as the channel reaches."""
        left = agreement.promise_micro - deal.cumulative_micro
        fees: dict[bytes, int] = {}
        for check in deal.checks:
            if check.state in ("right", "wrong", "unsure", "excused"):
                fee = min(left, amount_for(check.operations, agreement.unit_price))
                left -= fee
                fees[check.peer] = fees.get(check.peer, 0) + fee
        return tuple(sorted(fees.items())[:16])

    def _found_right(self, deal: Deal, agreement: Agreement, receipts: list[bytes]) -> None:
        if not self.corrections.done(deal, agreement, receipts):
            return
        self.corrections.apply(deal, agreement, receipts)
        settlement = Settlement(
            network=self.desk.network.id,
            agreement=deal.id,
            submitter=agreement.submitter,
            solver=agreement.solver,
            paid_micro=deal.cumulative_micro,
            fees=self.fees(deal, agreement),
            proof=deal.proof_id,
            after=tuple(sorted(self.settler.every[deal.id].findings))[:64],
        )
        deal.settlement = self.desk.seal(settlement)
        move(self.desk, deal, Event.FOUND_RIGHT)
        if not deal.paid_out:
            self._offer_settlement(deal, agreement)
        self.on_right(deal)

    def _offer_settlement(self, deal: Deal, agreement: Agreement) -> None:
        self.resend[deal.id, agreement.solver] = self.desk.now_ns + params.RESEND_NS
        self.desk.send(agreement.solver, SettleOffer(deal.settlement))

    def _tick_settling(self, deal: Deal, agreement: Agreement) -> None:
        now, rules = self.desk.now_ns, self.desk.network.rules
        gone = agreement.solver not in self.desk.peers
        if now - deal.entered_ns > rules.settle_silence_ms * 10**6 or (gone and deal.ended_early):
            move(self.desk, deal, Event.PARTNER_SILENT)
            self.claim(deal)
        elif now >= self.resend.get((deal.id, agreement.solver), 0):
            self._offer_settlement(deal, agreement)

    def on_settled(self, deal: Deal, message: SettleBack) -> None:
        """The solver's signature closes the channel."""
        record, _, signers = open_record(message.settlement, network=self.desk.network.id)
        if not isinstance(record, Settlement) or len(signers) != 2 or record.agreement != deal.id:
            raise VerificationFailed("a settlement comes back with both signatures")
        if deal.lifecycle in (State.SETTLING, State.CLAIMING):
            self.settler.accept(message.settlement, publish=True)

    def claim(self, deal: Deal) -> None:
        """Close alone: publish what this side owes; the claim window decides."""
        channel = self.settler.every[deal.id]
        claim = make_claim(self.desk, deal, self.fees(deal, channel.agreement))
        self.settler.accept(claim, publish=True)
        self.desk.emit("claim", deal.job, deal=deal.id, why=deal.note or "the solver does not answer")
