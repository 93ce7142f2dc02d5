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
from market.matching import SANDBOX_CONTAINED, trust_ppm
from market.quoting import quote
from peer.bidding import Bidder
from peer.challenger import Challenger
from peer.deals import Deal, Job, JobState, agreement_of, task_of
from peer.desk import Desk
from peer.events import Command, Reply
from peer.jobs import JobDesk
from peer.pausing import Pausing
from peer.prover import Prover
from peer.settler import Settler
from peer.solver import Solver
from peer.submitter import Submitter
from protocol.bench_card import Figures
from protocol.codec import blake
from protocol.errors import IchibaError, LocalProtocolError, NotFound
from protocol.keys import peer_key, peer_name
from protocol.lifecycle import TERMINAL, State
from protocol.records import ROLE_SOLVER, open_record
from protocol.script import ASSURANCE, ScriptSpec, compare, read_task
from protocol.task import TaskSpec, task_id

__all__ = ["Commands"]


class BadArguments(LocalProtocolError):
    """The arguments of a command do not fit."""

    code = "usage"
    exit_code = 2


class SubmitArguments(msgspec.Struct, forbid_unknown_fields=True):
    """Of `submit`: the encoded TaskSpec and the money. All ids hex, all money micro-credits."""

    task: str
    budget_micro: int
    unit_price_max: int
    base_root: str
    checkpoint_bytes: int
    memory_bytes: int
    sandbox: int = 2
    group: str = ""  # of replicas of one script
    replica: int = 0


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

    def handle(self, command: Command) -> None:
        """Answer one command with one Reply, never an exception."""
        verbs: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "status": self.status,
            "submit": self.submit,
            "cancel": self.cancel,
            "jobs": self.list_jobs,
            "job": self.show_job,
            "book": self.book,
            "quote": self.quote,
            "wallet": self.wallet,
            "bundle": self.bundle,
            "pause": self.pausing.pause,
            "resume": self.pausing.resume,
            "bench": self.bench,
            "challenge": self.challenge,
            "cards": self.cards,
        }
        try:
            if command.verb not in verbs:
                raise BadArguments(f"no command {command.verb[:40]!r}", next_step="see docs/cli.md")
            result = verbs[command.verb](command.arguments)
        except IchibaError as error:
            self.desk.add(Reply(command.token, {}, {**error.as_dict(), "exit_code": error.exit_code}))
        else:
            self.desk.add(Reply(command.token, result))

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
            "operations_per_second": self.bidder.speed(),
            "offers_seen": len(desk.book.offers),
            "asks_seen": len(desk.book.asks),
            "jobs_open": sum(1 for job in self.jobs.jobs.values() if job.open),
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
            given = msgspec.convert(arguments, SubmitArguments)
            encoded, base_root = bytes.fromhex(given.task), bytes.fromhex(given.base_root)
        except (msgspec.ValidationError, ValueError) as error:
            raise BadArguments(f"submit: {error}") from None
        task = read_task(encoded, network=self.desk.network.id)
        if task.mode == "native":
            raise BadArguments(
                "a native-mode job cannot be verified yet",
                why="tolerant verification needs a profiled threshold",
                next_step='set mode = "exact" in job.toml',
            )
        if len(base_root) != 32:
            raise BadArguments("base_root must be 32 bytes in hex")
        script = isinstance(task, ScriptSpec)
        if script and base_root != task_id(task):
            raise BadArguments("a script starts from its own id", next_step="give base_root the id of the task")
        if given.budget_micro <= 0 or given.unit_price_max <= 0:
            raise BadArguments("budget and price limit must be positive")
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
            created_ns=self.desk.now_ns,
        )
        return self._job(self.jobs.submit(job))

    def cancel(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Stop a job."""
        return self._job(self.submitter.cancel(self._find(arguments).id))

    def list_jobs(self, _: dict[str, Any]) -> dict[str, Any]:
        """All jobs, newest first."""
        newest = sorted(self.jobs.jobs.values(), key=lambda job: -job.created_ns)
        return {"jobs": [self._job(job) for job in newest]}

    def show_job(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """One job with its deals."""
        job = self._find(arguments)
        deals = [self.submitter.deals[d] for d in job.deals if d in self.submitter.deals]
        return {**self._job(job), "deals": [self._deal(deal) for deal in deals]}

    def _find(self, arguments: dict[str, Any]) -> Job:
        """A job by any unambiguous prefix of its hex id."""
        prefix = str(arguments.get("job", ""))
        found = [job for job in self.jobs.jobs.values() if prefix and job.id.hex().startswith(prefix)]
        if len(found) != 1:
            raise NotFound(
                f"{len(found) or 'no'} jobs match {prefix[:64]!r}", next_step="`ichiba job ls` lists their ids"
            )
        return found[0]

    def _job(self, job: Job) -> dict[str, Any]:
        task = task_of(job.task)
        deal = self.submitter.deals.get(job.deal)
        # Receipts of the running deal count as progress: they are paid for and in this peer's store.
        done = job.segment + (deal.receipts if deal is not None else 0)
        return {
            "job": job.id.hex(),
            "name": job.name,
            "kind": "script" if isinstance(task, ScriptSpec) else "graph",
            "assurance": ASSURANCE if isinstance(task, ScriptSpec) else "",
            "replicas": self._replicas(job),
            "state": JobState(job.state).name.lower(),
            "stage": deal.lifecycle.name.lower() if deal is not None else "",
            "reason": job.reason,
            "segments": task.segments,
            "segments_done": done,
            "steps": task.steps,
            "steps_done": min(task.steps, done * task.steps_per_segment),
            "budget_micro": job.budget_micro,
            "spent_micro": job.spent_micro,
            "paid_micro": sum(self._paid(self.submitter.deals[d]) for d in job.deals if d in self.submitter.deals),
            "slashed_micro": job.slashed_micro,
            "culprits": [peer_name(p) for p in job.culprits],
            "retried": job.retried,
            "created_ns": job.created_ns,
            "ended_ns": job.ended_ns,
            "final_root": job.base_root.hex() if job.state == JobState.DONE else "",
            "checkpoint": job.base_blob.hex() if job.state == JobState.DONE else "",
        }

    def _replicas(self, job: Job) -> dict[str, Any]:
        """What the replicas of a script say together; `same` is null until two have ended."""
        if not job.group:
            return {}
        others = [other for other in self.jobs.jobs.values() if other.group == job.group]
        found = compare([other.base_root if other.state == JobState.DONE else None for other in others])
        return {**asdict(found), "jobs": sorted(other.id.hex() for other in others)}

    def _paid(self, deal: Deal) -> int:
        channel = self.settler.channels.get(deal.id)
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
            "drawn": deal.drawn,
            "checks": [
                {"checker": peer_name(c.peer), "role": c.role, "segments": c.segments, "state": c.state}
                for c in deal.checks
            ],
            "note": deal.note,
        }

    # --- the market ----------------------------------------------------------------------------------------
    def book(self, _: dict[str, Any]) -> dict[str, Any]:
        """What this peer has heard: asks, offers, bids, and why it does not bid on an offer."""
        book, now = self.desk.book, self.desk.now_ns
        return {
            "asks": [
                {
                    "peer": peer_name(a.peer),
                    "roles": a.roles,
                    "unit_price": a.unit_price,
                    "memory_bytes": a.memory_bytes,
                    "sandbox": a.sandbox,
                    "operations_per_second": a.operations_per_second,
                    "proven": asdict(self.challenger.speed_of(a.peer)),
                    "stake_micro": self.settler.free_stake(a.peer),
                    "trust_ppm": trust_ppm(self.settler.history(a.peer)),
                    "connected": a.peer in self.desk.peers or a.peer == self.desk.me,
                }
                for a in book.live_asks(role=7, now_ns=now)
            ],
            "offers": [
                {
                    "offer": i.hex(),
                    "submitter": peer_name(o.submitter),
                    "operations": o.operations,
                    "unit_price_max": o.unit_price_max,
                    "lock_micro": o.lock_micro,
                    "bids": [
                        {"solver": peer_name(b.solver), "unit_price": b.unit_price, "eta_ns": b.eta_ns}
                        for _, b in book.live_bids(i, now_ns=now)
                    ],
                    "no_bid": asdict(self.bidder.refusals[i]) if i in self.bidder.refusals else None,
                }
                for i, o in sorted(book.offers.items())
            ],
        }

    def quote(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Price and speed of a job of `operations`, from the asks heard."""
        try:
            operations = msgspec.convert(arguments.get("operations"), int)
            limit = msgspec.convert(arguments.get("unit_price_max"), int | None)
            memory_bytes = msgspec.convert(arguments.get("memory_bytes", 0), int)
            sandbox = msgspec.convert(arguments.get("sandbox", 2), int)
        except msgspec.ValidationError as error:
            raise BadArguments(f"quote: {error}") from None
        asks = [
            a for a in self.desk.book.live_asks(role=ROLE_SOLVER, now_ns=self.desk.now_ns) if a.peer != self.desk.me
        ]
        made = quote(
            asks,
            operations=operations,
            memory_bytes=memory_bytes,
            sandbox=sandbox,
            unit_price_max=limit,
        )
        return {**asdict(made), "operations": operations, "round_ms": self.desk.network.rules.round_ms}

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
        book = self.desk.book.live_asks(role=ROLE_SOLVER, now_ns=self.desk.now_ns)
        solvers = {a.peer for a in book if a.peer in self.desk.peers}
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
            "earned_unsettled_micro": sum(d.cumulative_micro for d in deals if d.lifecycle not in TERMINAL),
            "deals": [
                {
                    "deal": d.id.hex(),
                    "state": State(d.state).name.lower(),
                    "vouchers_micro": d.cumulative_micro,
                    "paid_micro": self._paid(d),
                }
                for d in deals
            ],
            "total_micro": ledger.total_micro(),
            "table": asdict(table) if arguments.get("all") else {},
        }

    def bundle(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """All signed evidence of a job, for protocol.bundle to check offline."""
        job = self._find(arguments)
        deals = []
        for deal_id in job.deals:
            deal = self.submitter.deals.get(deal_id)
            if deal is None or deal_id not in self.settler.channels:
                continue
            closing = [e for i, e in sorted(self.settler.log.items()) if self._closes(e, deal_id)]
            deals.append(
                {
                    "agreement": deal.agreement,
                    "receipts": self.submitter.receipts[deal_id],
                    "voucher": deal.voucher,
                    "proof": deal.proof,
                    "reveals": [r for r in (deal.own_reveal, deal.other_reveal) if r],
                    "verdicts": [c.verdict for c in deal.checks if c.verdict],
                    "closing": closing,
                }
            )
        return {**self._job(job), "task": job.task, "deals": deals}

    def _closes(self, envelope: bytes, deal_id: bytes) -> bool:
        record, _, _ = open_record(envelope, network=self.desk.network.id)
        return getattr(record, "agreement", b"") == deal_id
