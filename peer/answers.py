"""Why nothing happens: what one peer knows of a job that stands still, or of itself that earns nothing.

Gathers the facts (asks, bids, the last round, deals, checks, money, this peer's own terms) and has market/reasons.py
and market/own_terms.py say what they mean. Reads every role, changes none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import msgspec

from market.own_terms import Demand, Own, explain_own
from market.quoting import lock_micro
from market.reasons import Advice, Capacity, Reason, explain_offer
from peer.bidding import Bidder
from peer.clock_doubts import Clocks
from peer.deals import Deal, Job, JobState, agreement_of, task_of
from peer.desk import Desk
from peer.jobs import JobDesk
from peer.market_view import MarketView
from peer.prover import Prover
from peer.runs import RunDesk
from peer.settler import Settler
from peer.solver import Solver
from peer.stake_reasons import stake_reasons
from peer.submitter import Submitter
from protocol import params
from protocol.credits import credits_of
from protocol.errors import LocalProtocolError
from protocol.keys import peer_name
from protocol.lifecycle import TERMINAL, State
from protocol.params import SANDBOX_LEVELS
from protocol.records import ROLE_SOLVER, ROLE_VERIFIER, Offer, amount_for

__all__ = ["Answers"]

_SECOND: Final = 10**9
_DEALS_TOLD: Final = 5  # the last deals of a job, of those that brought it no further


class _BadQuestion(LocalProtocolError):
    """`why` of what is no job and not this peer."""

    code = "usage"
    exit_code = 2


@dataclass
class Answers:
    """See the module docstring. `find`: a job by the beginning of its id."""

    desk: Desk
    settler: Settler
    jobs: JobDesk
    submitter: Submitter
    bidder: Bidder
    solver: Solver
    prover: Prover
    view: MarketView
    runs: RunDesk
    find: Callable[[dict[str, Any]], Job]
    clocks: Clocks = field(default_factory=Clocks)

    def why(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """`of`: "me", the beginning of a job's id, or "" for all that is wrong here. Raises NotFound."""
        of = str(arguments.get("of", ""))
        if set(arguments) - {"of"}:
            raise _BadQuestion("why takes one argument", next_step="`ichiba why JOB`, `ichiba why me` or `ichiba why`")
        if of == "me":
            return self._of_me()
        return self._of_job(self.find({"job": of})) if of else self._of_all()

    # --- this peer -----------------------------------------------------------------------------------------
    def _of_me(self) -> dict[str, Any]:
        means = self.desk.means
        reasons = self._peer_reasons()
        if not means.roles:
            words = "this peer has no role: it submits jobs and takes none"
            reasons.append(Reason("peer", "no-role", 1, words, "ichiba earn", severity=1))
            return _answer("me", "this peer takes no work", reasons, [])
        own, demands = self._own(), self._demands()
        able, found, advice = explain_own(own, demands)
        if not means.roles & ROLE_SOLVER:
            reasons.append(self._draws())
        elif not demands:
            words = "no offer of anybody else stands at present"
            reasons.append(Reason("offer", "no-offers", 0, words, "`ichiba trades` shows when work was last sold"))
        reasons += [*self._earning_reasons(demands), *found, *self._money_reasons()]
        head = f"{len(demands)} offer{_s(len(demands))} for this peer's roles heard, it can bid on {able} of them"
        if not means.roles & ROLE_SOLVER:
            head = "this peer checks the work of others: it is drawn for that, or looks by itself"
        return _answer("me", head, reasons, advice, able=able, heard=len(demands))

    def _draws(self) -> Reason:
        """What a peer waits for that solves nothing: to be drawn, or to find what others missed."""
        verifiers = {a.peer for a in self.desk.book.live_asks(role=ROLE_VERIFIER, now_ns=self.desk.wall_ns)}
        running = sum(1 for c in self.settler.channels.values() if not c.closed and c.agreement.check_permille)
        words = f"deals run that will be checked, by verifiers drawn of the {len(verifiers)} that are heard of"
        return Reason("check", "draws", running, words, severity=3)

    def _own(self) -> Own:
        means = self.desk.means
        return Own(
            roles=means.roles,
            unit_price=means.unit_price,
            memory_bytes=means.memory_bytes,
            sandbox=means.sandbox,
            stake_micro=self.settler.free_stake(self.desk.me),
            slots_free=1,  # a taken slot is work, and told as that: what else is in the way counts when it is free
            checker_stake_min_micro=self.desk.network.rules.checker_stake_min_micro,
            device=means.device,
            device_memory_bytes=means.device_memory_bytes,
        )

    def _demands(self) -> list[Demand]:
        made = []
        for offer_id, offer in sorted(self.desk.book.offers.items()):
            role = ROLE_VERIFIER if offer.mode == "profile" else ROLE_SOLVER
            if offer.submitter == self.desk.me or not self.desk.means.roles & role:
                continue
            bids = self.desk.book.live_bids(offer_id, now_ns=self.desk.wall_ns)
            others = tuple(bid.unit_price for _, bid in bids if bid.solver != self.desk.me)
            mine = offer_id in self.bidder.bid_on
            takes_ns, price = self.bidder.takes_ns(offer), self.bidder.price_of(offer, least=True)
            credit_micro = self.bidder.credit_for(offer)
            made.append(Demand(offer, price, others, mine, self.desk.wall_ns, takes_ns, credit_micro))
        return made

    def _peer_reasons(self) -> list[Reason]:
        """What stops a peer whatever it wants."""
        desk, found = self.desk, []
        if not desk.peers:
            words = "nobody is connected, so nothing is heard and nothing is told"
            found.append(Reason("peer", "nobody-connected", 0, words, "ichiba connect INVITE", severity=1))
        if (resting := desk.resting()) is not None:
            words, _, then = resting[1].partition("; ")
            words += f", for {_ago(desk.now_ns - (desk.paused_ns or desk.finishing_ns))}"
            found.append(Reason("peer", resting[0], 1, words, then.strip("`") or "ichiba earn rules", severity=1))
        off = {peer: off_s for peer, off_s in self.clocks.off_s.items() if peer in desk.peers}  # keys are free
        if off and 2 * len(off) > len(desk.peers):
            middle = sorted(off.values())[len(off) // 2]
            words = f"the clock here is some {abs(middle)} s {'behind' if middle > 0 else 'ahead of'} that of others"
            found.append(Reason("peer", "clock", len(off), words, "timedatectl set-ntp true", severity=1))
        elif off:
            words = "date their records wrongly, so what they say is not taken"
            found.append(Reason("peer", "others-clock", len(off), words, "", severity=3))
        return found

    def _earning_reasons(self, demands: Sequence[Demand]) -> list[Reason]:
        """What stops a peer that would earn."""
        desk, means, found = self.desk, self.desk.means, []
        active = sum(1 for d in self.solver.deals.values() if d.lifecycle in (State.AGREED, State.RUNNING))
        if active:
            words = f"runs now, on {active} of {means.slots} slot{_s(means.slots)}"
            found.append(Reason("work", "working", active, words, severity=3))
        found += stake_reasons(desk, self.settler, (demand.offer.lock_micro for demand in demands))
        pricer = self.bidder.pricer
        if means.roles & ROLE_SOLVER and pricer.price > pricer.floor:
            words = f"of the least that its owner works for are asked now ({credits_of(pricer.price)} credits per Gop)"
            then = "it falls while a slot is idle; `ichiba up --fixed-price` keeps it"
            percent = 100 * pricer.price // max(1, pricer.floor)
            found.append(Reason("bids", "asking", percent, f"% {words}", then, severity=3))
        if means.roles & ROLE_SOLVER and means.sandbox < len(SANDBOX_LEVELS) - 1:
            words = f"the sandbox here is {SANDBOX_LEVELS[means.sandbox]}, scripts take {SANDBOX_LEVELS[-1]}"
            found.append(Reason("peer", "sandbox", 1, words, "ichiba doctor", severity=3))
        if means.roles & ROLE_SOLVER and self.prover.opened is None:
            words = "this peer has no bench card, so submitters expect it to be slower than it says"
            found.append(Reason("peer", "no-card", 1, words, "ichiba bench", severity=3))
        away = {
            o.submitter
            for i, o in desk.book.offers.items()
            if i in self.bidder.bid_on and o.submitter not in desk.peers and o.submitter != desk.me
        }
        if away:
            words = "were sent a bid and cannot award it: no connection to them"
            found.append(Reason("bids", "unreachable", len(away), words, "`ichiba invite` on their side or on yours"))
        if means.roles & ROLE_SOLVER and self.settler.history(desk.me).streak < params.NEWCOMER_DEALS:
            streak = self.settler.history(desk.me).streak
            words = f"{streak} of {params.NEWCOMER_DEALS} right deals in a row: others rank a newcomer lower"
            found.append(Reason("bids", "newcomer", 1, words, severity=3))
        return found

    def _open_as_solver(self) -> list[Any]:
        return [c for c in self.settler.channels.values() if c.agreement.solver == self.desk.me]

    def _money_reasons(self) -> list[Reason]:
        """Work that is done and not paid yet, by what it waits for."""
        waiting = Counter(d.lifecycle for d in self.solver.deals.values() if d.lifecycle not in TERMINAL)
        owed = {
            state: sum(d.cumulative_micro for d in self.solver.deals.values() if d.lifecycle == state)
            for state in waiting
        }
        return [
            Reason(
                "settlement",
                code,
                waiting[state],
                f"{words}; {credits_of(owed[state])} credits in vouchers",
                severity=3,
            )
            for state, (code, words) in _UNPAID.items()
            if waiting[state]
        ]

    # --- a job ---------------------------------------------------------------------------------------------
    def _of_job(self, job: Job) -> dict[str, Any]:
        split = job.state == JobState.PROFILING or bool(job.units)
        subjects = [c for c in self.jobs.children(job) if c.open] if split else [job]
        reasons = self._peer_reasons() if job.open else []
        advice: list[Advice] = []
        able = heard = 0
        if job.state == JobState.PROFILING:
            words = "a tolerant job is measured first: verifiers profile it before it is offered"
            reasons.append(Reason("offer", "profiling", len(subjects), words, severity=3))
        reasons += self.runs.reasons(job)
        for one in subjects:
            deal = self.submitter.deals.get(one.deal)
            if one.state == JobState.OFFERED:
                able, heard, found, advice = self._offered(one)
                reasons += found
            elif deal is not None and one.open:
                reasons += self._running(one, deal)
        past = [d for one in (job, *self.jobs.children(job)) for d in one.deals if d != one.deal]
        for deal in (self.submitter.deals[d] for d in past if d in self.submitter.deals):
            if deal.id != job.deal and deal.lifecycle not in TERMINAL:
                reasons += self._running(job, deal)
        if not job.open:
            words = job.reason or f"the job is {JobState(job.state).name.lower()}"
            reasons.append(Reason("end", JobState(job.state).name.lower(), 1, words, severity=3))
        head = f"job {job.id.hex()[:12]} ({job.name}) is {JobState(job.state).name.lower()}"
        return _answer("job", head, reasons, advice, able=able, heard=heard) | {"job": job.id.hex()}

    def _offered(self, job: Job) -> tuple[int, int, list[Reason], list[Advice]]:
        """A job that stands on the market: its way from the asks to an award."""
        offer = self.desk.book.offers.get(job.offer_id)
        if offer is None:
            return 0, 0, [Reason("offer", "renewing", 1, "its offer ran out and is made again in a moment")], []
        now, book = self.desk.wall_ns, self.desk.book
        role = ROLE_VERIFIER if offer.mode == "profile" else ROLE_SOLVER
        barred = dict.fromkeys(self.jobs.excluded(job), "excluded")
        asks = book.asks.shelf(role=role, now_ns=now, without=(self.desk.me,))
        here = book.live_asks(role=role, now_ns=now, peers=self.desk.peers)
        here = sorted((a for a in here if a.peer != self.desk.me), key=lambda a: a.unit_price)
        others = (a for a in asks.cheapest(len(here) + params.WHY_ASKS_MAX) if a.peer not in self.desk.peers)
        looked = [*here, *others][: params.WHY_ASKS_MAX]
        if job.credit:
            left = self.settler.credit.to_spend()
            need = {a.peer: amount_for(offer.operations, a.unit_price) for a in looked}
            barred = {peer: "credit" for peer, micro in need.items() if left.get(peer, 0) < micro} | barred
        capacities = [
            Capacity(
                a,
                a.peer in self.desk.peers,
                self.settler.free_stake(a.peer),
                barred.get(a.peer, ""),
                self.jobs.speed_of(a.peer),
                self.desk.link_speed(a.peer),
            )
            for a in looked
        ]
        able, reasons, advice = explain_offer(offer, capacities, now_ns=now, relock=self._relock)
        heard = len({one.ask.peer for one in capacities})
        if len(asks) > len(capacities):
            survey = book.asks.survey(offer, now_ns=now)
            words = (
                f"asks are not tried with other terms, for {len(capacities)} are connected or cheaper; of all "
                f"{survey.heard} heard, {survey.able} would take it by their words, and so many would not: "
                + ", ".join(f"{code} {count}" for code, count in survey.refused.most_common())
            )
            reasons.append(Reason("offer", "left-out", len(asks) - len(capacities), words, severity=3))
        if not capacities:
            words = f"no {'verifier' if role == ROLE_VERIFIER else 'solver'} has told what it takes"
            reasons.append(Reason("offer", "no-asks", 0, words, "ichiba book", severity=1))
        if job.credit:
            words = f"no deposit pays for it; {self.settler.credit.words()}"
            reasons.append(Reason("offer", "on-credit", len(left), words, severity=3 if left else 1))
        reasons += self._bids(job, offer, able, {one.ask.peer for one in capacities})
        return able, heard, reasons, [self._with_budget(job, one) for one in advice]

    def _relock(self, offer: Offer) -> Offer:
        if not offer.check_permille:
            return offer
        price = amount_for(offer.operations, offer.unit_price_max)
        return msgspec.structs.replace(offer, lock_micro=lock_micro(self.desk.network.rules, price))

    def _with_budget(self, job: Job, advice: Advice) -> Advice:
        """A higher limit may need a larger budget: the job is refused otherwise, so the advice says so."""
        limit = advice.changes.get("unit_price_max")
        if not isinstance(limit, int):
            return advice
        job = self.jobs.jobs.get(job.parent, job)  # a profile is paid out of the budget of its job
        at_limit = msgspec.structs.replace(job, unit_price_max=limit)
        needed = self.jobs.channel_for(at_limit, task_of(job.task).segments)
        needed += params.PROFILES_MIN * self.jobs.profile_micro(at_limit) if job.tolerant else 0
        if needed <= job.budget_micro:
            return advice
        words = f"{advice.words}, with --budget {credits_of(needed)}"
        return replace(advice, words=words, changes=advice.changes | {"budget_micro": needed})

    def _bids(self, job: Job, offer: Offer, able: int, asked: set[bytes]) -> list[Reason]:
        """What became of the bids, and of those who could bid and did not."""
        found: list[Reason] = []
        choice, now = self.jobs.told.get(job.id), self.desk.now_ns
        bids = self.desk.book.live_bids(job.offer_id, now_ns=self.desk.wall_ns)
        busy = (asked & self.view.busy().keys()) - {bid.solver for _, bid in bids}
        if not bids and able:
            words = "could take it by their asks and have not bid (yet)"
            found.append(Reason("bids", "no-bids", able, words, f"offered {_ago(now - job.offered_ns)} ago"))
        if busy:
            words = "have a deal open now, so they may not bid before it ends"
            found.append(Reason("bids", "busy", len(busy), words, "wait"))
        if choice is not None and bids:
            counted = Counter(refusal.code for _, refusal in choice.refused)
            samples = {refusal.code: refusal.why for _, refusal in reversed(choice.refused)}
            found += [
                Reason("bids", code, count, f"bid and cannot win: {samples[code]}")
                for code, count in sorted(counted.items(), key=lambda item: (-item[1], item[0]))
            ]
        for deal in (self.submitter.deals[d] for d in job.deals[-_DEALS_TOLD:] if d in self.submitter.deals):
            solver = peer_name(agreement_of(deal, self.desk.network.id).solver)[-8:]
            if deal.lifecycle == State.DECLINED and deal.uncertified:
                words = f"the opening of a channel with {solver} was not certified: {deal.note}"
                found.append(Reason("proposal", f"uncertified-{deal.uncertified}", 1, words))
            elif deal.lifecycle == State.DECLINED:
                words = f"{solver} declined a proposal: {deal.note or 'no answer in time'}"
                found.append(Reason("proposal", "declined", 1, words))
            elif deal.ended_early:
                words = f"{solver} had it and did not finish: {deal.note or 'it was lost'}"
                found.append(Reason("work", "lost", 1, words, f"{deal.receipts} segments of it are kept and paid"))
        for code, count in sorted(Counter(one.code for one in job.passed.values()).items()):
            last = max((one for one in job.passed.values() if one.code == code), key=lambda one: one.at_ns)
            found.append(Reason("proposal", code, count, f"gave their slot to other work; the last: {last.why}"))
        resting = sum(1 for until in job.resting.values() if now < until)
        if resting:
            words = "declined or failed and are not asked again for a while"
            again = min(until for until in job.resting.values() if now < until) - now
            found.append(Reason("proposal", "resting", resting, words, f"the first again in {_ago(again)}"))
        if job.fruitless:
            words = f"deals brought it no further; at {params.FRUITLESS_DEALS_MAX} it is given up"
            found.append(Reason("work", "fruitless", job.fruitless, words))
        return found

    def _running(self, job: Job, deal: Deal) -> list[Reason]:
        """A deal that is not over: whom it waits for, and until when."""
        agreement, now, rules = agreement_of(deal, self.desk.network.id), self.desk.now_ns, self.desk.network.rules
        solver, gone = peer_name(agreement.solver)[-8:], agreement.solver not in self.desk.peers
        found: list[Reason] = []
        if gone:
            words = f"no connection to {solver}, who has the work"
            then = f"its work goes back to the market after {rules.lost_grace_ms // 1000} s"
            found.append(Reason("work", "unreachable", 1, words, then, severity=1))
        match deal.lifecycle:
            case State.PROPOSED if deal.doubt:
                words = f"{solver} accepted, and the notaries have not certified the opening of the channel yet"
                found.append(Reason("proposal", "certifying", 1, words, severity=3))
            case State.PROPOSED:
                left_ns = agreement.accept_before_ns - self.desk.wall_ns
                words = f"{solver} was proposed to and has {_ago(left_ns)} left to answer"
                found.append(Reason("proposal", "proposed", 1, words, severity=3))
            case State.AGREED | State.RUNNING:
                silent, longest = now - deal.news_ns, agreement.segment_deadline_ns
                words = f"{solver} works on it: {deal.receipts} segments are paid, last news {_ago(silent)} ago"
                then = f"without news it goes back to the market in {_ago(max(0, longest - silent))}"
                found.append(Reason("work", "running", 1, words, then, severity=2 if 2 * silent > longest else 3))
            case State.PROVED:
                words = (
                    f"its work is done; {solver}'s seed (and the notaries') decide what is checked, and is not here yet"
                )
                found.append(Reason("check", "seeds", 1, words, f"at most {rules.reveal_ms // 1000} s"))
            case State.CHECKING | State.DISPUTED:
                found += self._checking(deal)
            case State.SETTLING:
                words = f"{solver} has not signed the settlement yet"
                then = f"after {rules.settle_silence_ms // 1000} s this peer closes it alone"
                found.append(Reason("settlement", "unsigned", 1, words, then, severity=3))
            case State.CLAIMING:
                channel = self.settler.every.get(deal.id)
                left = max(0, channel.claim_ends_ns - now) if channel is not None else 0
                words = f"a one-sided closing waits for objections{f': {deal.note}' if deal.note else ''}"
                found.append(Reason("settlement", "claim", 1, words, f"paid in {_ago(left)}", severity=3))
            case _:
                pass
        return found

    def _checking(self, deal: Deal) -> list[Reason]:
        counted: Counter[str] = Counter(check.state for check in deal.checks)
        patience_ns = self.desk.network.rules.check_silence_ms * 10**6 // 10
        fresh = all(self.desk.now_ns - check.asked_ns < patience_ns for check in deal.checks if check.state == "asked")
        found = [
            Reason("check", state, counted[state], words, severity=3 if state == "asked" and fresh else severity)
            for state, (words, severity) in _CHECKS.items()
            if counted[state]
        ]
        if deal.lifecycle == State.DISPUTED:
            found.append(Reason("check", "dispute", 1, "notaries judge its work", "ichiba dispute list", severity=1))
        verifiers = len(self.desk.book.asks.shelf(role=ROLE_VERIFIER, now_ns=self.desk.wall_ns))
        if not any(counted[state] for state in ("asked", "accepted")) and not verifiers:
            words = "no verifier is heard of, so nobody can check it"
            found.append(Reason("check", "no-verifier", 0, words, "`ichiba earn` on another machine", severity=1))
        return found

    # --- everything ----------------------------------------------------------------------------------------
    def _of_all(self) -> dict[str, Any]:
        """What is wrong here, the worst first."""
        reasons: list[Reason] = list(self._peer_reasons())
        advice: list[Advice] = []
        waiting = [job for job in self.jobs.jobs.values() if job.open and not job.parent]
        for job in sorted(waiting, key=lambda one: one.created_ns)[: params.WHY_JOBS_MAX]:
            found = self._of_job(job)
            name = f"job {job.id.hex()[:8]}"
            own = [Reason(**one) for one in found["reasons"] if one["step"] != "peer" and one["severity"] < 3]
            reasons += [replace(one, words=f"{name}: {one.words}") for one in own]
            advice += [Advice(f"{name}: {a['words']}", a["gain"], a["changes"]) for a in found["advice"][:2]]
        if len(waiting) > params.WHY_JOBS_MAX:
            words = "open jobs are not looked into here"
            reasons.append(Reason("offer", "more-jobs", len(waiting) - params.WHY_JOBS_MAX, words, "ichiba why JOB", 3))
        if self.desk.means.roles:
            me = self._of_me()
            reasons += [Reason(**one) for one in me["reasons"] if one["step"] != "peer" or one["code"] in _OWN_PEER]
            advice += [Advice(**a) for a in me["advice"][:2]]
        serious = [one for one in dict.fromkeys(reasons) if one.severity < 3]
        head = f"{len(serious)} thing{_s(len(serious))} in the way" if serious else "nothing is in the way here"
        return _answer("here", head, reasons, advice)


_OWN_PEER: Final = ("no-stake", "sandbox", "no-card")
_UNPAID: Final = {
    State.PROVED: ("seeds", "wait for the seeds that draw their checks"),
    State.CHECKING: ("checking", "are being checked"),
    State.DISPUTED: ("dispute", "are judged by the notaries"),
    State.SETTLING: ("settling", "wait for the submitter's signature"),
    State.CLAIMING: ("claim", "close one-sidedly, after the window for objections"),
}
_CHECKS: Final[dict[str, tuple[str, int]]] = {
    "asked": ("were asked to check it and have not answered", 2),
    "accepted": ("are re-executing its drawn segments", 3),
    "gone": ("were asked to check it and fell silent", 2),
    "wrong": ("found it wrong", 1),
    "unsure": ("cannot tell, so another checker decides", 2),
    "right": ("found it right", 3),
}


def _answer(
    about: str, head: str, reasons: Iterable[Reason], advice: Iterable[Advice], *, able: int = 0, heard: int = 0
) -> dict[str, Any]:
    ordered = sorted(dict.fromkeys(reasons), key=lambda one: one.severity)
    return {
        "about": about,
        "headline": head,
        "able": able,
        "heard": heard,
        "reasons": [asdict(one) for one in ordered],
        "advice": [asdict(one) for one in advice],
    }


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _ago(span_ns: int) -> str:
    seconds = max(0, span_ns) // _SECOND
    return f"{seconds} s" if seconds < 120 else f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h"
