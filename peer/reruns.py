"""Re-runs: the house orders newcomers to run its own finished, public work on, and pays for an end it computed before.

An order is one segment from the settled end of a job of this house, under a seed that nobody knew before: no root of
it was ever published, and no two orders have the same one, so there is nothing to copy, from whoever. The house runs it
first; then it is an ordinary job (peer/jobs.py) for one solver alone, with no lock and no check, whose receipt is
co-signed if it names the root that the house found. Journalled before anything leaves, so that no restart orders or
pays twice. Sans-IO. Why it is so: docs/decisions/0022-reruns.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from market.matching import Refusal
from market.newcomers import Newcomer, refuse_newcomer, steps_for
from peer.challenger import Challenger
from peer.deals import Job, JobState, task_of
from peer.desk import Desk
from peer.events import Fetch, Fetched, Release, SegmentMade, StartWork, StopWork, WorkEnded
from peer.jobs import JobDesk
from peer.settler import Settler
from protocol import params
from protocol.codec import blake, encode
from protocol.errors import IchibaError
from protocol.keys import short
from protocol.network import Reruns as Terms
from protocol.records import ROLE_SOLVER, Ask, amount_for
from protocol.script import blobs_of
from protocol.task import Initial, TaskSpec

__all__ = ["DAY_NS", "Rerun", "Reruns"]

DAY_NS: Final = 86_400 * 10**9
_SEED_BITS: Final = 63  # of a task's seed


class Rerun(msgspec.Struct, kw_only=True):
    """A row: one order. id: of its job, and of the house's own run. source: the job that it runs on from. micro: the
    most it costs, and once it has ended what it cost. root: its right end, once the house knows it."""

    id: bytes
    peer: bytes
    source: bytes
    task: bytes
    day: int
    ordered_ns: int
    micro: int
    root: bytes = b""
    outcome: Literal["", "paid", "wrong", "unanswered", "failed"] = ""
    ended_ns: int = 0


@dataclass
class Reruns:
    """See the module docstring. `unpaid`: why nothing is ordered of a peer, as of the last look."""

    desk: Desk
    settler: Settler
    jobs: JobDesk
    challenger: Challenger
    rows: dict[bytes, Rerun] = field(default_factory=dict)
    unpaid: dict[bytes, Refusal] = field(default_factory=dict)
    lacking: Refusal | None = None  # why nothing is ordered of anybody
    spoiled: set[bytes] = field(default_factory=set)  # jobs that nothing can be run on from
    work: bytes = b""  # the house's own run under way
    missing: set[bytes] = field(default_factory=set)  # of its blobs
    again_ns: int = 0

    @property
    def terms(self) -> Terms | None:
        """What this peer pays for re-runs, if it is the network's house and pays for any."""
        return self.desk.network.reruns if self.desk.network.house_key == self.desk.me else None

    # --- money ---------------------------------------------------------------------------------------------
    def spent_micro(self, peer: bytes | None = None) -> int:
        """What the orders of today cost, or can still cost: all of them, or those of one peer."""
        today = self.desk.wall_ns // DAY_NS
        return sum(row.micro for row in self.rows.values() if row.day == today and peer in (None, row.peer))

    # --- ordering ------------------------------------------------------------------------------------------
    def tick(self) -> None:
        """Follow what is ordered, begin a run that a restart or a pause cut, order one more."""
        if self.terms is None:
            return
        for row in [row for row in self.rows.values() if not row.outcome and row.root]:
            self.desk.attempt(self._follow, row)
        self._forget()
        if self.desk.paused_ns:
            self.work = b""  # its worker was told to end, and says no more
        elif not self.work and (cut := next((r for r in self.rows.values() if not r.root and not r.outcome), None)):
            self._begin(cut)
        elif not self.work and not self.desk.finishing_ns and self.desk.now_ns >= self.again_ns:
            self.again_ns = self.desk.now_ns + params.RERUN_EVERY_NS
            self._order(self.terms)

    def _order(self, terms: Terms) -> None:
        """Draw who is ordered the next re-run, by the speeds they proved: many names of one machine that share its
        speed get no more together than one would."""
        able = self._able(terms)
        sources = self._sources()
        self.lacking = None if sources else Refusal("no-source", "the house has no finished public exact training job")
        if sum(1 for row in self.rows.values() if not row.outcome) >= params.RERUNS_OPEN_MAX:
            self.lacking = Refusal("busy", f"{params.RERUNS_OPEN_MAX} re-runs are under way")
        if not able or self.lacking is not None:
            return
        peers = sorted(able)
        (peer,) = self.desk.rng.choices(peers, weights=[able[p].proven for p in peers])
        source = self.desk.rng.choice(sources)
        task = task_of(source.task)
        assert isinstance(task, TaskSpec)
        steps = steps_for(terms, able[peer], steps=task.steps_per_segment, operations_per_step=task.operations_per_step)
        if not steps:
            self.unpaid[peer] = Refusal("size", "no step of it is worth a micro-credit and within the budget")
            return
        spec = msgspec.structs.replace(
            task,
            initial=Initial("state", source.base_blob, source.base_root),
            seed=self.desk.rng.getrandbits(_SEED_BITS),
            steps=steps,
            steps_per_segment=steps,
            name=f"re-run of {task.name}"[:256],
        )
        row = Rerun(
            id=blake("ichiba/rerun", encode(spec), peer, self.desk.now_ns.to_bytes(8, "big")),
            peer=peer,
            source=source.id,
            task=encode(spec),
            day=self.desk.wall_ns // DAY_NS,
            ordered_ns=self.desk.now_ns,
            micro=amount_for(steps * task.operations_per_step, terms.unit_price),
        )
        self.rows[row.id] = row
        self._save(row)
        self._begin(row)

    def _able(self, terms: Terms) -> dict[bytes, Newcomer]:
        """Those that a re-run can be ordered of now; why not of the others is kept."""
        asks = self.desk.book.live_asks(role=ROLE_SOLVER, now_ns=self.desk.wall_ns, peers=self.desk.peers)
        able, self.unpaid = {}, {}
        for ask in asks:
            if ask.peer == self.desk.me:
                continue
            one = self.newcomer(ask)
            least = self.desk.network.rules.checker_stake_min_micro
            refusal = refuse_newcomer(one, terms, stake_min_micro=least) or self._resting(ask.peer)
            if refusal is None:
                able[ask.peer] = one
            else:
                self.unpaid[ask.peer] = refusal
        return able

    def newcomer(self, ask: Ask) -> Newcomer:
        """What is known here of a peer that asks for work."""
        card = self.challenger.proven.get(ask.peer)
        return Newcomer(
            history=self.settler.history(ask.peer),
            stake_micro=self.settler.free_stake(ask.peer),
            unit_price=ask.unit_price,
            proven=card.operations_per_second if card is not None else 0,
            spent_micro=self.spent_micro(),
            spent_on_it_micro=self.spent_micro(ask.peer),
        )

    def _resting(self, peer: bytes) -> Refusal | None:
        """Why a peer that could have one has to wait."""
        if peer in self.settler.busy() or any(r.peer == peer and not r.outcome for r in self.rows.values()):
            return Refusal("busy", "it is at work")
        ended = [row for row in self.rows.values() if row.peer == peer and row.outcome]
        if any(row.outcome == "wrong" for row in ended):
            return Refusal("wrong", "a re-run of it ended at another root than the house's own run")
        failed_ns = max((row.ended_ns for row in ended if row.outcome in ("unanswered", "failed")), default=0)
        if failed_ns and self.desk.now_ns < failed_ns + params.RERUN_REST_NS:
            return Refusal("rests", "it did not do the last one; others go first")
        return None

    def _sources(self) -> list[Job]:
        """Finished, settled, public jobs of this peer that can be run on from their last checkpoint."""
        return [job for _, job in sorted(self.jobs.jobs.items()) if job.id not in self.spoiled and _runs_on(job)]

    # --- the house's own run -------------------------------------------------------------------------------
    def _begin(self, row: Rerun) -> None:
        task = task_of(row.task)
        assert isinstance(task, TaskSpec)
        wanted = {**blobs_of(task), task.initial.blob: params.BLOB_BYTES_MAX}
        self.work, self.missing = row.id, set(wanted)
        for blob, size in wanted.items():
            self.desk.add(Fetch(blob, row.id, (), size))  # they are here, or nothing can be run: and kept from now on

    def on_fetched(self, event: Fetched) -> None:
        """One of the blobs of the own run is found, or is not here any more."""
        row = self.rows.get(event.token)
        if row is None or event.token != self.work or event.blob not in self.missing:
            return
        if event.error:
            self._spoil(row, f"a blob of its source is gone: {event.error}")
            return
        self.missing.discard(event.blob)
        if self.missing:
            return
        task, source = task_of(row.task), self.jobs.jobs[row.source]
        assert isinstance(task, TaskSpec)
        self.desk.add(
            StartWork(
                work=row.id,
                task=task,
                base=task.initial.blob,
                first_segment=0,
                last_segment=1,
                checkpoint_bytes=params.BLOB_BYTES_MAX,
                memory_bytes=source.memory_bytes,
            )
        )

    def on_segment(self, event: SegmentMade) -> None:
        """The house knows the right end: offer the same work to the peer that it is for."""
        row = self.rows.get(event.work)
        if row is None or event.work != self.work or row.root or row.outcome:
            return
        task, source = task_of(row.task), self.jobs.jobs[row.source]
        assert isinstance(task, TaskSpec)
        if event.in_root != task.initial.root:
            self._spoil(row, "the last checkpoint of its source has another root than was settled")
            return
        row.root, row.ordered_ns = event.out_root, self.desk.now_ns
        job = Job(
            id=row.id,
            task=row.task,
            name=f"{task.name} for {short(row.peer)}"[:256],
            state=JobState.OFFERED,
            unit_price_max=self._unit_price(),
            budget_micro=row.micro,
            checkpoint_bytes=source.checkpoint_bytes,
            memory_bytes=source.memory_bytes,
            sandbox=source.sandbox,
            segment=0,
            base_root=task.initial.root,
            base_blob=task.initial.blob,
            created_ns=self.desk.wall_ns,
            device=source.device,
            device_memory_bytes=source.device_memory_bytes,
            deadline_ns=self.desk.wall_ns + params.RERUN_DEADLINE_NS,
            only=row.peer,
            known=row.root,
        )
        try:
            self.jobs.submit(job)
        except IchibaError as error:
            self._end(row, "failed", 0, error.what)
            return
        self._save(row)
        self.desk.emit("rerun", job.id, peer=row.peer, micro=row.micro, steps=task.steps)

    def _unit_price(self) -> int:
        assert self.terms is not None, "it was ordered"
        return self.terms.unit_price

    def on_work_ended(self, event: WorkEnded) -> None:
        """The own run is over."""
        row = self.rows.get(event.work)
        if row is None or event.work != self.work:
            return
        self.work = b""
        if not row.root and not row.outcome:
            self._spoil(row, f"the house's own run failed: {event.error or 'it made nothing'}")

    def _spoil(self, row: Rerun, why: str) -> None:
        self.spoiled.add(row.source)
        self.desk.add(StopWork(row.id))
        self.work = b""
        self._end(row, "failed", 0, why)

    # --- what becomes of it --------------------------------------------------------------------------------
    def _follow(self, row: Rerun) -> None:
        job = self.jobs.jobs[row.id]
        if job.state == JobState.OFFERED and self.desk.now_ns >= row.ordered_ns + params.RERUN_PATIENCE_NS:
            self.jobs.end(job, JobState.FAILED, "the newcomer that it is for does not take it")
        channels = [self.settler.channels[deal] for deal in job.deals if deal in self.settler.channels]
        if job.open or not all(channel.closed for channel in channels):
            return
        if job.state == JobState.DONE:
            self._end(row, "paid", job.spent_micro, "")
        elif job.culprits:
            self._end(row, "wrong", job.spent_micro, job.reason)
        else:
            self._end(row, "failed" if channels else "unanswered", job.spent_micro, job.reason)

    def _end(self, row: Rerun, outcome: Literal["paid", "wrong", "unanswered", "failed"], micro: int, why: str) -> None:
        assert micro <= row.micro, "its channel held no more"
        row.outcome, row.micro, row.ended_ns = outcome, micro, self.desk.now_ns
        self._save(row)
        self.desk.add(Release(row.id))
        self.desk.emit("rerun-paid" if outcome == "paid" else "rerun-unpaid", peer=row.peer, micro=micro,
                       code=outcome, why=why)  # fmt: skip

    def _forget(self) -> None:
        oldest = self.desk.wall_ns // DAY_NS - params.RERUN_DAYS_KEPT
        for row in [row for row in self.rows.values() if row.outcome and row.day < oldest]:
            del self.rows[row.id]
            self.desk.save("reruns", row.id, None)
            if self.jobs.jobs.pop(row.id, None) is not None:  # there are many of them; the ledger knows what was paid
                self.desk.save("jobs", row.id, None)

    def _save(self, row: Rerun) -> None:
        self.desk.save("reruns", row.id, msgspec.msgpack.encode(row))

    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """What was ordered before a restart."""
        for key, value in rows("reruns"):
            self.rows[key] = msgspec.msgpack.decode(value, type=Rerun)


def _runs_on(job: Job) -> bool:
    """Whether a job is done, was settled and public, and can be trained on from its end. A re-run is no source: its end
    is not kept."""
    if job.state != JobState.DONE or job.key or job.credit or job.only or not job.base_blob:
        return False
    task = task_of(job.task)
    exact = isinstance(task, TaskSpec) and task.mode == "exact" and task.kind == "train"
    return exact and isinstance(task, TaskSpec) and task.batch.rule != "sequence"
