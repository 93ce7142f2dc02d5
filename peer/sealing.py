"""Who is told what of a sealed job: the one door through which its content leaves this peer. docs/decisions/0014.

Every message passes `outgoing` and every effect passes `keyed`, so nothing else needs to know whether a job is sealed.
The winner gets the job's key and its task with Opened, in a box to its key; a drawn checker gets the job's key with its
CheckRequest; a notary gets, with a dispute, the task and the keys of two blobs, the Program and the state that the
disputed segment starts from. Nobody else is sent anything that names a blob.
What a unit that its submitter keeps is made of goes to nobody. Sans-IO.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgspec

from peer import messages as m
from peer.deals import Deal, Job, agreement_of, move, salt_of, save, task_of
from peer.desk import Desk
from peer.disputes import Disputes
from peer.events import Effect, Fetch, Inspect, Protect, StartWork
from peer.jobs import JobDesk
from peer.solver import Solver
from peer.submitter import Submitter
from protocol import params
from protocol.codec import decode, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError, VerificationFailed
from protocol.keys import peer_name
from protocol.lifecycle import Event, State
from protocol.records import Challenge, Receipt, open_record
from protocol.script import AnyTask, content_of, read_task
from protocol.sealing import Contents, Keys, box_for, box_of, masked, read_keys
from protocol.task import TaskSpec

__all__ = ["Sealing"]


class CannotSeal(LocalProtocolError):
    """What a job asks for cannot be kept from others, or would take a blob from another job."""

    code = "cannot-seal"
    exit_code = 2


class Sealing:
    """See the module docstring."""

    def __init__(self, desk: Desk, jobs: JobDesk, submitter: Submitter, solver: Solver, disputes: Disputes) -> None:
        self.desk, self.jobs, self.submitter, self.solver = desk, jobs, submitter, solver
        self.checker, self.disputes = disputes.checker, disputes
        desk.sealer, solver.unlock = self.outgoing, self.unlock

    # --- a new job -------------------------------------------------------------------------------------------
    def submitted(self, task: AnyTask, encoded: bytes, *, sealed: bool) -> tuple[AnyTask, bytes, bytes]:
        """The task of a job to be, salted if it is sealed, its encoding, and its key; empty of an open one.

        Raises CannotSeal where an open and a sealed job would need the same blob: it is served as it is, or it is not.
        """
        self._check_shared(content_of(task), hidden=sealed)
        if not sealed:
            return task, encoded, b""
        if not isinstance(task, TaskSpec) or task.mode != "exact":
            raise CannotSeal(
                f"a {task.mode} job cannot be sealed",
                why="profiles of a tolerant task are made by strangers, and a script's files have no task to check",
                next_step='make it exact (mode = "exact"), or submit it open',
            )
        task = msgspec.structs.replace(task, salt=self.desk.rng.randbytes(32))
        return task, encode(task), self.desk.rng.randbytes(32)

    def split(self, units: Iterable[Job]) -> None:
        """The units of a run to be: what those that are kept here name is served to nobody, what the others name to
        anybody. Raises CannotSeal where one blob would have to be both."""
        content: dict[bool, set[bytes]] = {True: set(), False: set()}
        for unit in units:
            content[unit.kept] |= content_of(task_of(unit.task))
        if both := content[True] & content[False]:
            raise CannotSeal(
                f"blob {min(both).hex()[:12]} is of a unit that is kept and of one that is not",
                why="the solver of the one would fetch what the other keeps from everybody",
                next_step="keep both, or neither",
            )
        for kept, blobs in content.items():
            self._check_shared(blobs, hidden=kept)

    def _check_shared(self, blobs: set[bytes], *, hidden: bool) -> None:
        """Raises CannotSeal where another job serves to anybody what is to be hidden, or hides what is to be served."""
        for other in self.jobs.jobs.values():
            if other.units:  # its units are jobs of their own
                continue
            hides = bool(other.key) or other.kept
            shared = blobs & content_of(task_of(other.task))
            if shared and hides != hidden and (other.open or not hidden):
                same = "keep the same stages of this job" if other.kept else "submit this job sealed too"
                raise CannotSeal(
                    f"blob {min(shared).hex()[:12]} belongs to job {other.id.hex()[:12]}, which is "
                    f"{'kept here' if other.kept else 'sealed' if other.key else 'open'}",
                    why="its bytes are served to anybody, or to nobody without a key",
                    next_step=same if hides else "wait for that job's end, or cancel it",
                )

    def protect(self, job: Job) -> None:
        """Serve what a sealed job names only to who has its keys. Before its offer leaves."""
        if job.key:
            self.desk.add(Protect(tuple(sorted(content_of(task_of(job.task)))), Keys(job.key)))

    # --- what leaves -----------------------------------------------------------------------------------------
    def outgoing(self, peer: bytes, message: m.Message) -> m.Message | None:
        """The message as `peer` may have it; None if it may not have it at all."""
        match message:
            case m.Propose(task=task) if task and self._salted(task):
                return m.Propose(message.agreement, b"", b"")
            case m.Opened(agreement=agreement):
                deal = next((d for d in self.submitter.deals.values() if d.agreement == agreement), None)
                key = self.jobs.jobs[deal.job].key if deal is not None else b""
                return m.Opened(agreement, self._contents(peer, deal, key)) if deal is not None and key else message
            case m.CheckRequest(task=task) if self._salted(task):
                return self._with_keys(message, peer, self._keys_of_case(message))
            case m.DisputeOpen(case=case) if self._salted(case.task):
                return self._for_dispute(peer, message)
            case m.CaseGiven(case=case) | m.JuryAsk(case=case) if self._salted(case.task):
                return None  # no draw chose who asks; and no sealed job is tolerant
            case _:
                return message

    @staticmethod
    def _salted(task: bytes) -> bool:
        return bool(salt_of(task_of(task)))

    def _contents(self, peer: bytes, deal: Deal, key: bytes) -> bytes:
        start = deal.base_root
        return box_for(
            peer, encode(Contents(deal.id, key, deal.task, deal.base_blob, start)), ephemeral=self._ephemeral()
        )

    def _ephemeral(self) -> bytes:
        return self.desk.rng.randbytes(32)

    def _with_keys(self, case: m.CheckRequest, peer: bytes, keys: Keys | None) -> m.CheckRequest:
        box = box_of(keys, peer, ephemeral=self._ephemeral()) if keys is not None else b""
        return msgspec.structs.replace(case, box=box)

    def _for_dispute(self, peer: bytes, message: m.DisputeOpen) -> m.DisputeOpen | None:
        """To a notary with the keys of two blobs; to a party, which has the job's, without; to nobody else."""
        case = message.case
        agreement, _, _ = open_record(case.agreement, network=self.desk.network.id)
        if peer in (getattr(agreement, "submitter", b""), getattr(agreement, "solver", b"")):
            return m.DisputeOpen(message.challenge, msgspec.structs.replace(case, box=b""))
        if peer not in self.desk.network.notary_keys:
            return None
        keys = self._keys_of_case(case)
        wanted = tuple(blob for blob in (task_of(case.task).program, self._base_of(message)) if blob)
        return m.DisputeOpen(message.challenge, self._with_keys(case, peer, keys.only(wanted) if keys else None))

    def _base_of(self, message: m.DisputeOpen) -> bytes:
        """The state that the disputed segment starts from, if a receipt names it."""
        challenge, _, _ = open_record(message.challenge, network=self.desk.network.id)
        ends = [open_record(envelope, network=self.desk.network.id)[0] for envelope in message.case.receipts]
        assert isinstance(challenge, Challenge), "the file was opened with one"
        before = (r for r in ends if isinstance(r, Receipt) and r.segment == challenge.segment - 1)
        return next((receipt.checkpoint for receipt in before), b"")

    # --- what comes in ---------------------------------------------------------------------------------------
    def incoming(self, message: m.Message) -> m.Message:
        """The message, whose box, if it has one, is ours to open. Raises VerificationFailed."""
        match message:
            case m.CheckRequest(box=box) | m.DisputeOpen(case=m.CheckRequest(box=box)) if box:
                read_keys(self.desk.key.open_box(box))
            case _:
                pass
        return message

    def unlock(self, deal: Deal, message: m.Opened) -> None:
        """Solver: take the task and the key of a sealed job, or refuse them. Raises RemoteProtocolError if the box is
        not for this deal; the submitter is asked again until the proposal lapses."""
        if deal.task or deal.lifecycle != State.PROPOSED:
            return
        if not message.box:
            raise VerificationFailed("a sealed job was opened without its contents")
        network = self.desk.network.id
        given = decode(Contents, self.desk.key.open_box(message.box), bytes_max=params.MESSAGE_BYTES_MAX)
        agreement = agreement_of(deal, network)
        if given.agreement != deal.id:
            raise VerificationFailed("the contents of another sealed job")
        try:
            task = read_task(given.task, network=network)
            refusal = self.solver.bidder.refuse_task(agreement, task)
            code, why = (refusal.code, refusal.why) if refusal is not None else ("", "")
        except RemoteProtocolError as error:
            task, code, why = None, error.code, str(error)[:400]
        salted = isinstance(task, TaskSpec) and bool(task.salt)
        if not code and (not salted or masked(salt_of(task), given.base_root) != agreement.base_root):  # type: ignore[arg-type]
            code, why = "task", "what was sealed is not what was agreed"
        if code:
            move(self.desk, deal, Event.REFUSED)
            self.desk.emit("gave-up", deal=deal.id, code=code, why=why)
            self.desk.send(agreement.submitter, m.Decline(deal.id, code, why))
            return
        deal.task, deal.key, deal.base_blob, deal.base_root = given.task, given.key, given.base_blob, given.base_root
        deal.last_blob, deal.last_root = given.base_blob, given.base_root
        save(self.desk, deal)

    # --- what is done ----------------------------------------------------------------------------------------
    def keyed(self, effects: Iterable[Effect]) -> list[Effect]:
        """The effects, with the keys of the sealed jobs that they are about."""
        return [
            self._keyed(effect) if isinstance(effect, Fetch | StartWork | Inspect) else effect for effect in effects
        ]

    def _keyed(self, effect: Fetch | StartWork | Inspect) -> Effect:
        keys = self._keys_of(effect.token if isinstance(effect, Fetch) else effect.work)
        return replace(effect, keys=keys) if keys is not None else effect

    def _keys_of(self, owner: bytes) -> Keys | None:
        """The keys for a deal, a case, a dispute, or a piece of their work; None where nothing is sealed."""
        own = self._keys_of_deal(owner)
        if own is not None:
            return own
        cases = self.checker.cases.values()
        case = self.checker.cases.get(owner) or next((c for c in cases if c.work and c.work == owner), None)
        if case is not None:
            return self._keys_of_case(case.request)
        plays, hearings = self.disputes.disputant.plays, self.disputes.arbiter.hearings
        play = plays.get(owner) or next((p for p in plays.values() if p.work == owner), None)
        held = play or hearings.get(owner)
        return self._keys_of_case(held.file.case.request) if held is not None else None

    def _keys_of_deal(self, deal_id: bytes) -> Keys | None:
        if deal_id in self.submitter.deals:
            key = self.jobs.jobs[self.submitter.deals[deal_id].job].key
        else:
            key = self.solver.deals[deal_id].key if deal_id in self.solver.deals else b""
        return Keys(key) if key else None

    def _keys_of_case(self, case: m.CheckRequest) -> Keys | None:
        """A party has its own; another peer those in the box, which `incoming` has opened once."""
        if case.box:
            return read_keys(self.desk.key.open_box(case.box))
        return self._keys_of_deal(open_record(case.agreement, network=self.desk.network.id)[1])

    # --- for people ------------------------------------------------------------------------------------------
    def describe(self, job: Job) -> dict[str, Any]:
        """Whether the job is sealed, and who was given what to open it."""
        if not job.key:
            return {"privacy": "open", "keys": []}
        keys: list[dict[str, str]] = []
        for deal in (self.submitter.deals[d] for d in job.deals if d in self.submitter.deals):
            if deal.lifecycle not in (State.PROPOSED, State.DECLINED):
                keys.append({"peer": peer_name(self.submitter.solver_of(deal)), "role": "solver", "opens": "all"})
            keys += [{"peer": peer_name(c.peer), "role": c.role, "opens": "all"} for c in deal.checks]
            if any(p.file.challenge.agreement == deal.id for p in self.disputes.disputant.plays.values()):
                notaries = sorted(peer_name(k) for k in self.desk.network.notary_keys)
                keys += [{"peer": n, "role": "notary", "opens": "program and one state"} for n in notaries]
        return {"privacy": "sealed", "keys": [k for i, k in enumerate(keys) if k not in keys[:i]]}
