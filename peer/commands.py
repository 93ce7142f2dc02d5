"""What a person may ask of the node: the verbs behind the control socket, each a plain dict in and out.

Answers carry hex ids and integers only; the command line turns them into words. Every refusal is an IchibaError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from market.entries import Account
from market.ledger import money_table
from market.matching import SANDBOX_CONTAINED
from market.placing import UnitsChosen, UnitsPlaced
from market.rounds import Played
from peer.answers import Answers
from peer.bidding import Bidder
from peer.challenger import Challenger
from peer.control_verbs import Submit
from peer.deals import Deal, Job, JobState, agreement_of, task_of
from peer.desk import Desk
from peer.disputes import Disputes
from peer.drops import merged
from peer.earnings import earnings_of
from peer.events import Command, Reply
from peer.house import House
from peer.house_view import HouseView
from peer.jobs import JobDesk
from peer.link_reports import LinkReports
from peer.market_view import MarketView
from peer.money_lines import line_over
from peer.moves import Moves
from peer.pausing import Pausing
from peer.profiles import Profiles
from peer.prover import Prover
from peer.reputations import ReputationView
from peer.run_commands import BadArguments, check_terms, submit_run
from peer.run_planning import RunPlanning
from peer.runs import RunDesk
from peer.sealing import Sealing
from peer.settler import Settler
from peer.solver import Solver
from peer.submitter import Submitter
from protocol.bench_card import Figures
from protocol.codec import blake
from protocol.credit_records import ON_CREDIT
from protocol.errors import IchibaError, NotFound
from protocol.house import KNOWN_END
from protocol.keys import peer_key, peer_name
from protocol.lifecycle import TERMINAL, State
from protocol.profile import EXACT
from protocol.profile_task import ProfileSpec
from protocol.records import ROLE_SOLVER, open_record
from protocol.script import ASSURANCE, ScriptSpec, compare, read_task
from protocol.task import TaskSpec, task_id

__all__ = ["Commands"]


@dataclass
class Commands:
    """Reads every role, changes jobs only."""

    desk: Desk
    settler: Settler
    jobs: JobDesk
    submitter: Submitter
    bidder: Bidder
    solver: Solver
    pausing: Pausing
    prover: Prover
    challenger: Challenger
    disputes: Disputes
    profiles: Profiles
    sealing: Sealing
    moves: Moves
    runs: RunDesk
    house: House

    def __post_init__(self) -> None:
        self.settler.credit.deals = (self.submitter.deals, self.solver.deals)
        self.reputations = ReputationView(self.settler)
        self.links = LinkReports(self.desk)
        self.runs.market.table = self.links.table
        self.house_view = HouseView(self.desk, self.settler, self.house, self.bidder, self.prover)
        self.planning = RunPlanning(self.desk, self.bidder, self.challenger, self.links.table)
        self.view = MarketView(self.desk, self.settler, self.bidder, self.challenger)
        self.answers = Answers(
            self.desk, self.settler, self.jobs, self.submitter, self.bidder, self.solver, self.prover, self.view,
            self.runs, self._find,
        )  # fmt: skip

    def handle(self, command: Command) -> None:
        """Answer one command with one Reply, now or later, never an exception."""
        verbs: dict[str, Callable[[dict[str, Any]], dict[str, Any] | None]] = {
            "status": self.status,
            "submit": self.submit,
            "plan-run": lambda arguments: self.planning.plan(command.token, arguments),
            "submit-run": lambda arguments: self._job(submit_run(self.runs, self.sealing, arguments)),
            "cancel": self.cancel,
            "jobs": self.list_jobs,
            "job": self.show_job,
            "book": self.view.book,
            "offers": self.view.offers,
            "trades": self.view.trades,
            "quote": self.view.quote,
            "price": self.view.price,
            "why": self.answers.why,
            "wallet": self.wallet,
            "stake": self.moves.stake,
            "unstake": self.moves.unstake,
            "bundle": self.bundle,
            "matches": self._matches,
            "pause": self.pausing.pause,
            "resume": self.pausing.resume,
            "finish": self.pausing.finish,
            "earnings": self.earnings,
            "house": self.house_view.describe,
            "house-want": self.house_view.want,
            "bench": self.bench,
            "challenge": self.challenge,
            "cards": self.cards,
            "disputes": self.disputes.list_disputes,
            "dispute": self.disputes.show_dispute,
            "dispute-bundle": self.disputes.export_dispute,
            "reputation": self.reputations.describe,
            "drops": lambda _: merged(self.desk.drops),  # a daemon adds what its transport dropped
            "links": self.links.describe,
            "reputation-bundle": self.reputations.export,
            **self.settler.netting.verbs(),
        }
        try:
            if command.verb not in verbs:
                raise BadArguments(f"no command {command.verb[:40]!r}", next_step="see docs/cli.md")
            result = verbs[command.verb](command.arguments)
        except IchibaError as error:
            self.desk.add(Reply(command.token, {}, {**error.as_dict(), "exit_code": error.exit_code}))
        else:
            if result is not None:  # else it comes when what it takes is done
                self.desk.add(Reply(command.token, result))

    def played(self, event: Played | UnitsPlaced | UnitsChosen) -> None:
        """A round or a placing that took a thread is over."""
        match event:
            case Played():
                self.jobs.on_played(event)
            case UnitsPlaced():
                self.runs.on_placed(event)
            case UnitsChosen():
                self.planning.on_chosen(event)

    # --- status --------------------------------------------------------------------------------------------
    def status(self, _: dict[str, Any]) -> dict[str, Any]:
        """Who this peer is, whom it sees, what it does."""
        desk = self.desk
        return {
            "peer": peer_name(desk.me),
            "network": desk.network.name,
            "network_id": desk.network.id.hex(),
            "peers": [peer_name(p) for p in sorted(desk.peers)],
            "roles": desk.means.roles,
            "sandbox": desk.means.sandbox,
            "unit_price": desk.means.unit_price,
            "unit_price_asked": self.bidder.pricer.price,
            "operations_per_second": self.bidder.speed(),
            "offers_seen": len(desk.book.offers),
            "asks_seen": len(desk.book.asks),
            "jobs_open": sum(1 for job in self.jobs.jobs.values() if job.open and not job.parent),
            "deals_active": sum(1 for d in self.solver.deals.values() if d.lifecycle not in TERMINAL),
            "free_micro": self.settler.free_micro(desk.me),
            "stake_micro": self.settler.free_stake(desk.me),
            "settlement_records": len(self.settler.log),
            "clock_ns": desk.now_ns,
            **self.pausing.status(),
        }

    # --- jobs ----------------------------------------------------------------------------------------------
    def submit(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Open a job. The blobs it names are in the store already: the control socket saw to that."""
        try:
            given = msgspec.convert(arguments, Submit)
            encoded, base_root = bytes.fromhex(given.task), bytes.fromhex(given.base_root)
        except (msgspec.ValidationError, ValueError) as error:
            raise BadArguments(f"submit: {error}") from None
        task = read_task(encoded, network=self.desk.network.id)
        if isinstance(task, TaskSpec) and task.stage is not None:
            raise BadArguments("a unit of a parallel job alone", next_step="submit the whole job that it is a part of")
        if isinstance(task, ProfileSpec):
            raise BadArguments("a profile is ordered by the job it is for", next_step="submit the tolerant job itself")
        script = isinstance(task, ScriptSpec)
        if script and base_root != task_id(task):
            raise BadArguments("a script starts from its own id", next_step="give base_root the id of the task")
        check_terms(given, now_ns=self.desk.wall_ns)
        task, encoded, key = self.sealing.submitted(task, encoded, sealed=given.sealed)
        other = [bytes([given.replica])] if given.replica else []
        job = Job(
            id=blake("ichiba/job", self.desk.me, encoded, self.desk.now_ns.to_bytes(8, "big"), *other),
            task=encoded,
            name=task.name,
            state=JobState.OFFERED,
            unit_price_max=given.unit_price_max,
            budget_micro=given.budget_micro,
            checkpoint_bytes=given.checkpoint_bytes,
            memory_bytes=given.memory_bytes,
            sandbox=SANDBOX_CONTAINED if script else given.sandbox,
            group=bytes.fromhex(given.group),
            segment=0,
            base_root=base_root,
            base_blob=task.initial.blob if isinstance(task, TaskSpec) and task.initial.kind == "state" else b"",
            created_ns=self.desk.wall_ns,
            key=key,
            device=given.device,
            device_memory_bytes=given.device_memory_bytes,
            deadline_ns=given.deadline_ns,
            credit=given.credit,
        )
        self.sealing.protect(job)
        return self._job(self.jobs.submit(job))

    def cancel(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Stop a job."""
        return self._job(self.submitter.cancel(self._find(arguments).id))

    def list_jobs(self, _: dict[str, Any]) -> dict[str, Any]:
        """All jobs, newest first."""
        newest = sorted((job for job in self.jobs.jobs.values() if not job.parent), key=lambda job: -job.created_ns)
        return {"jobs": [self._job(job) for job in newest]}

    def show_job(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """One job with its deals."""
        job = self._find(arguments)
        return {**self._job(job), "deals": [self._deal(deal) for deal in self._all_deals(job)]}

    def _find(self, arguments: dict[str, Any]) -> Job:
        """A job by any unambiguous prefix of its hex id."""
        prefix = str(arguments.get("job", ""))
        found = [job for job in self.jobs.jobs.values() if prefix and job.id.hex().startswith(prefix)]
        if len(found) != 1:
            raise NotFound(
                f"{len(found) or 'no'} jobs match {prefix[:64]!r}", next_step="`ichiba job ls` lists their ids"
            )
        return found[0]

    def _matches(self, arguments: dict[str, Any]) -> dict[str, Any]:
        job = self._find(arguments)
        return self.jobs.matches.describe(job.deals, job.id)

    def _job(self, job: Job) -> dict[str, Any]:
        task = task_of(job.task)
        deal = self.submitter.deals.get(job.deal)
        # Receipts of the running deal count as progress: they are paid for and in this peer's store.
        done = job.segment + (deal.receipts if deal is not None and job.unit < 0 else 0)
        return {
            "job": job.id.hex(),
            "name": job.name,
            "kind": task.kind if isinstance(task, TaskSpec) else task.mode,
            "checkpoint_bytes": job.checkpoint_bytes,
            **self.sealing.describe(job),
            "assurance": self._assurance(job),
            "credit": job.credit,
            "replicas": self._replicas(job),
            "run": self.runs.watch.describe(job, self.runs.runs.get(job.id)),
            "state": JobState(job.state).name.lower(),
            "stage": deal.lifecycle.name.lower() if deal is not None else "",
            "profiling": self.profiles.describe(job),
            "reason": job.reason,
            "segments": task.segments,
            "segments_done": done,
            "steps": task.steps,
            "steps_done": min(task.steps, done * task.steps_per_segment),
            "budget_micro": job.budget_micro,
            "spent_micro": self.jobs.spent(job),
            "paid_micro": sum(self._paid(d) for one in (job, *self.jobs.children(job)) for d in self._own_deals(one)),
            "money": asdict(line_over(self._all_deals(job), self.settler.channels, self.desk.network)),
            "slashed_micro": sum(one.slashed_micro for one in (job, *self.jobs.children(job))),
            "culprits": [peer_name(p) for p in self._culprits(job)],
            "retried": job.retried,
            "created_ns": job.created_ns,
            "ended_ns": job.ended_ns,
            "device": job.device,
            "device_memory_bytes": job.device_memory_bytes,
            "deadline_ns": job.deadline_ns,
            "final_root": job.base_root.hex() if job.state == JobState.DONE else "",
            "checkpoint": job.base_blob.hex() if job.state == JobState.DONE else "",
        }

    def _all_deals(self, job: Job) -> list[Deal]:
        """Of a run, those of its units."""
        return [deal for one in (self.jobs.children(job) if job.units else [job]) for deal in self._own_deals(one)]

    def _culprits(self, job: Job) -> list[bytes]:
        return sorted({p for one in self.jobs.children(job) for p in one.culprits}) if job.units else job.culprits

    def _assurance(self, job: Job) -> str:
        """What is known of work that no verifier is asked about; empty of any other."""
        if isinstance(task_of(job.task), ScriptSpec):
            return ASSURANCE
        return ON_CREDIT if job.credit else KNOWN_END if job.known else ""

    def _own_deals(self, job: Job) -> list[Deal]:
        return [self.submitter.deals[deal] for deal in job.deals if deal in self.submitter.deals]

    def _replicas(self, job: Job) -> dict[str, Any]:
        """What the replicas of a script say together; `same` is null until two have ended."""
        if not job.group or job.parent:
            return {}
        others = [other for other in self.jobs.jobs.values() if other.group == job.group]
        found = compare([other.base_root if other.state == JobState.DONE else None for other in others])
        return {**asdict(found), "jobs": sorted(other.id.hex() for other in others)}

    def _paid(self, deal: Deal) -> int:
        channel = self.settler.every.get(deal.id)
        return channel.paid_micro if channel is not None else 0

    def _deal(self, deal: Deal) -> dict[str, Any]:
        agreement = agreement_of(deal, self.desk.network.id)
        return {
            "deal": deal.id.hex(),
            "solver": peer_name(agreement.solver),
            "state": deal.lifecycle.name.lower(),
            "segments": [agreement.first_segment, agreement.last_segment],
            "receipts": deal.receipts,
            "vouchers_micro": deal.cumulative_micro,
            "channel_micro": agreement.channel_micro,
            "lock_micro": agreement.lock_micro,
            "paid_micro": self._paid(deal),
            "money": asdict(line_over([deal], self.settler.channels, self.desk.network)),
            "drawn": deal.drawn,
            "checks": [
                {"checker": peer_name(c.peer), "role": c.role, "segments": c.segments, "state": c.state}
                for c in deal.checks
            ],
            "note": deal.note,
        }

    # --- bench cards ---------------------------------------------------------------------------------------
    def bench(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Ask a connected peer, named or drawn, for a challenge; events tell how it goes."""
        peers = sorted(self.desk.peers)
        if not peers:
            raise NotFound("no peer is connected that could time a bench", next_step="ichiba bench --alone")
        name = str(arguments.get("peer") or "")
        peer = peer_key(name) if name else self.desk.rng.choice(peers)
        memory = arguments.get("memory_bytes")
        memory_bytes = self.desk.means.memory_bytes if memory is None else int(memory)
        self.prover.ask(peer, memory_bytes=memory_bytes)
        return {"challenger": peer_name(peer), "memory_bytes": memory_bytes}

    def challenge(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Invite peers, all connected solvers if none is named, to be challenged by this one."""
        here = self.desk.book.live_asks(role=ROLE_SOLVER, now_ns=self.desk.wall_ns, peers=self.desk.peers)
        solvers = {a.peer for a in here}
        named = {peer_key(str(name)) for name in arguments.get("peers", [])}
        for peer in sorted(named or solvers):
            self.challenger.invite(peer)
        return {"invited": [peer_name(p) for p in sorted(named or solvers)]}

    def cards(self, _: dict[str, Any]) -> dict[str, Any]:
        """Every card known here: our own, those we timed, those we only heard of."""
        rows = []
        known = {**self.challenger.heard, **self.challenger.proven}
        if self.prover.opened is not None:
            known[self.desk.me] = self.prover.opened
        for peer in sorted(known):
            opened = known[peer]
            card = opened.card
            ours = peer in self.challenger.proven
            rows.append(
                {
                    "peer": peer_name(peer),
                    "card": opened.id.hex(),
                    "challenger": peer_name(card.challenger),
                    "timed": "by this peer" if ours else opened.grade,
                    "operations_per_second": opened.operations_per_second,
                    "proven_memory_bytes": opened.proven_memory_bytes,
                    **{name: getattr(card, name) for name in Figures.__struct_fields__},
                    "evidence": card.evidence.hex(),
                    "created_ns": card.created_ns,
                    "expires_ns": card.expires_ns,
                }
            )
        return {"cards": rows, "own": self.prover.card.hex(), "own_evidence": self._own_evidence()}

    def _own_evidence(self) -> str:
        return self.prover.opened.card.evidence.hex() if self.prover.opened is not None else ""

    # --- money ---------------------------------------------------------------------------------------------
    def wallet(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """This peer's buckets, and with `all` everybody's, which add up to the deposits."""
        ledger = self.desk.ledger
        ledger.check()
        names = {peer_key(d.peer) for d in self.desk.network.deposits} | {self.desk.me}
        table = money_table(ledger, {peer: peer_name(peer) for peer in names})
        mine = self.desk.me
        deals = list(self.solver.deals.values())
        return {
            "peer": peer_name(mine),
            "free_micro": ledger.balance_micro(Account(mine, "free")),
            "stake_micro": ledger.balance_micro(Account(mine, "stake")),
            **self.moves.wallet(),
            "earned_unsettled_micro": sum(d.cumulative_micro for d in deals if d.lifecycle not in TERMINAL),
            "deals": [
                {
                    "deal": d.id.hex(),
                    "state": State(d.state).name.lower(),
                    "vouchers_micro": d.cumulative_micro,
                    "paid_micro": self._paid(d),
                    "money": asdict(line_over([d], self.settler.channels, self.desk.network)),
                }
                for d in deals
            ],
            "money": asdict(line_over(deals, self.settler.channels, self.desk.network)),
            "total_micro": ledger.total_micro(),
            "table": asdict(table) if arguments.get("all") else {},
        }

    def earnings(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What this peer was paid for work and checks since a time."""
        since_ns = int(arguments.get("since_ns", 0))
        return {"earnings": earnings_of(self.settler, self.desk.me, since_ns=since_ns)}

    def bundle(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """All signed evidence of a job, for protocol.bundle to check offline."""
        job = self._find(arguments)
        deals = []
        for deal_id in job.deals:
            deal = self.submitter.deals.get(deal_id)
            if deal is None or deal_id not in self.settler.every:
                continue
            closing = [e for i, e in sorted(self.settler.log.items()) if self._closes(e, deal_id)]
            closing += self.settler.credit.evidence(deal_id)
            verdicts = [c.verdict for c in deal.checks if c.verdict]
            profiles = deal.profiles if agreement_of(deal, self.desk.network.id).tolerance != EXACT else []
            deals.append(
                {
                    "agreement": deal.agreement,
                    "receipts": self.submitter.receipts[deal_id],
                    "voucher": deal.voucher,
                    "proof": deal.proof,
                    "reveals": [r for r in (deal.own_reveal, deal.other_reveal) if r],
                    "verdicts": verdicts,
                    "closing": closing,
                    "beacons": deal.draw_beacons,
                    "forced": deal.forced,
                    "forced_beacons": deal.beacons if deal.forced else [],
                    "profiles": profiles,
                    "stakes": self.moves.evidence([*verdicts, *profiles, *closing]),
                }
            )
        return {**self._job(job), "task": job.task, "deals": deals}

    def _closes(self, envelope: bytes, deal_id: bytes) -> bool:
        record, _, _ = open_record(envelope, network=self.desk.network.id)
        return getattr(record, "agreement", b"") == deal_id
