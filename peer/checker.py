"""A verifier's or whistleblower's side: take a case, believe nothing in it, re-execute, sign a verdict.

The case carries the evidence that segments and checker were drawn after the proof; a case that fails any check is
declined with a reason, and a case is answered with the same verdict however often it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from peer.deals import task_of
from peer.desk import SETTLEMENT, Desk
from peer.events import Fetch, Fetched, Release, SegmentMade, StartWork, StopWork, WorkEnded
from peer.evidence import open_seeds
from peer.messages import CheckAccept, CheckDecline, CheckRequest, Records
from peer.settler import Settler
from protocol import params
from protocol.codec import blake
from protocol.errors import VerificationFailed
from protocol.merkle import merkle_root
from protocol.records import (
    ROLE_VERIFIER,
    ROLE_WHISTLEBLOWER,
    Agreement,
    Proof,
    Receipt,
    Verdict,
    open_record,
)
from protocol.sampling import select_segments
from protocol.script import blobs_of
from protocol.task import TaskSpec, task_id

__all__ = ["Case", "Checker", "open_case"]


@dataclass
class Case:
    """A checked request, and how far its re-execution got."""

    id: bytes
    submitter: bytes
    agreement_id: bytes
    agreement: Agreement
    proof_id: bytes
    task: bytes
    request: CheckRequest
    receipts: list[Receipt]
    started: bool = False
    missing: set[bytes] = field(default_factory=set)
    next_index: int = 0
    operations: int = 0
    work: bytes = b""
    answered: bool = False
    asked_ns: int = 0
    held: bool = False  # until the end of a pause
    failures: int = 0

    @property
    def segment(self) -> int:
        """The segment being re-executed."""
        return self.request.segments[self.next_index]

    def receipt(self, segment: int) -> Receipt:
        """The receipt of a segment of this deal."""
        return self.receipts[segment - self.agreement.first_segment]

    def base(self, segment: int) -> bytes:
        """The blob a segment starts from; empty for the seeded start."""
        if segment == self.agreement.first_segment:
            return self.request.base_blob
        return self.receipt(segment - 1).checkpoint


def open_case(request: CheckRequest, *, network: bytes, rules_minimum: int, me: bytes, sender: bytes) -> Case:
    """Check all the evidence of a request. Raises VerificationFailed (or another RemoteProtocolError).

    The agreement carries both signatures; the receipts form one chain from its base root, each with both
    signatures; the proof is over their roots; the seeds match their commitments; the segments are the drawn ones
    (a whistleblower may be asked for any of them).
    """
    agreement, agreement_id, signers = open_record(request.agreement, network=network)
    if not isinstance(agreement, Agreement) or len(signers) != 2:
        raise VerificationFailed("a case rests on an agreement with both signatures")
    if sender != agreement.submitter or me in (agreement.submitter, agreement.solver):
        raise VerificationFailed("a case comes from its submitter, to a peer that is no party")
    task = TaskSpec.from_bytes(request.task, network=network)
    if task_id(task) != agreement.task:
        raise VerificationFailed("the case is about another task than the agreement")
    receipts, last_id = _open_chain(request, agreement, agreement_id, network)
    if any(r.operations != task.operations_per_step * len(task.steps_of(r.segment)) for r in receipts):
        raise VerificationFailed("a receipt counts other operations than the task has")
    proof, proof_id, _ = open_record(request.proof, network=network)
    if not isinstance(proof, Proof) or proof.agreement != agreement_id:
        raise VerificationFailed("the case has a proof of another agreement")
    if proof.author not in (agreement.submitter, agreement.solver):
        raise VerificationFailed("the proof is by a stranger")
    if (proof.root, proof.receipts, proof.last_receipt) != (
        merkle_root([r.out_root for r in receipts]),
        len(receipts),
        last_id,
    ):
        raise VerificationFailed("the proof is not over the roots of its receipts")
    drawn = select_segments(
        open_seeds(request.reveals, agreement, agreement_id, proof_id, network),
        first=agreement.first_segment,
        last=agreement.first_segment + len(receipts),
        permille=agreement.check_permille,
        minimum=rules_minimum,
    )
    asked = request.segments
    if (asked != drawn and not (request.role == "whistleblower" or len(asked) == 1)) or not set(asked) <= set(drawn):
        raise VerificationFailed(f"segments {list(asked)} were not drawn, {list(drawn)} were")
    case_id = blake("ichiba/case", agreement_id, proof_id, request.role.encode(), bytes(str(asked), "ascii"))
    return Case(case_id, sender, agreement_id, agreement, proof_id, request.task, request, receipts)


def _open_chain(
    request: CheckRequest, agreement: Agreement, agreement_id: bytes, network: bytes
) -> tuple[list[Receipt], bytes]:
    receipts: list[Receipt] = []
    previous, root = bytes(32), agreement.base_root
    for index, envelope in enumerate(request.receipts):
        receipt, receipt_id, signers = open_record(envelope, network=network)
        if not isinstance(receipt, Receipt) or signers != {agreement.submitter, agreement.solver}:
            raise VerificationFailed("a receipt without both parties' signatures")
        link = (receipt.agreement, receipt.sequence, receipt.previous, receipt.segment, receipt.in_root)
        if link != (agreement_id, index, previous, agreement.first_segment + index, root):
            raise VerificationFailed(f"receipt {index} does not continue the chain")
        receipts.append(receipt)
        previous, root = receipt_id, receipt.out_root
    if len(receipts) > agreement.last_segment - agreement.first_segment:
        raise VerificationFailed("more receipts than the agreement has segments")
    return receipts, previous


@dataclass
class Checker:
    """Cases, one at a time in the worker, and the verdicts already given."""

    desk: Desk
    settler: Settler
    cases: dict[bytes, Case] = field(default_factory=dict)
    verdicts: dict[bytes, bytes] = field(default_factory=dict)  # case id -> envelope

    def on_request(self, peer: bytes, message: CheckRequest) -> None:
        """Open a case, or repeat its verdict. Raises RemoteProtocolError for forged evidence."""
        bit = ROLE_VERIFIER if message.role == "verifier" else ROLE_WHISTLEBLOWER
        case = open_case(
            message,
            network=self.desk.network.id,
            rules_minimum=self.desk.network.rules.check_segments_min,
            me=self.desk.me,
            sender=peer,
        )
        if case.id in self.verdicts:
            self.desk.send(peer, Records((self.verdicts[case.id],)))
            return
        if case.id in self.cases:
            self.desk.send(peer, CheckAccept(case.agreement_id))
            return
        self.settler.accept(message.agreement)  # the request may overtake the gossip
        if case.agreement_id not in self.settler.channels:
            self.desk.send(peer, CheckDecline(case.agreement_id, "not-funded", "the agreement has no open channel"))
        elif self.desk.paused_ns:
            self.desk.send(peer, CheckDecline(case.agreement_id, "paused", "its owner paused this peer"))
        elif not self.desk.means.roles & bit:
            self.desk.send(peer, CheckDecline(case.agreement_id, "role", f"this peer is no {message.role}"))
        elif len(self.cases) >= params.CHECKS_QUEUED_MAX:
            self.desk.send(peer, CheckDecline(case.agreement_id, "busy", "too many cases are queued here"))
        else:
            case.asked_ns = self.desk.now_ns
            self.cases[case.id] = case
            self.desk.send(peer, CheckAccept(case.agreement_id))
            self.desk.emit("case", submitter=peer, role=message.role, segments=list(message.segments))
            self._next()

    def _next(self) -> None:
        """Start the oldest case, if none is running."""
        if self.cases and not any(case.started for case in self.cases.values()):
            self._gather(next(iter(self.cases.values())))

    def _gather(self, case: Case) -> None:
        case.started, case.held = True, False
        task = task_of(case.task)
        wanted = blobs_of(task)
        sources = (case.submitter, case.agreement.solver)
        case.missing = set(wanted)
        for blob, size in wanted.items():
            self.desk.add(Fetch(blob, case.id, sources, size))
        base = case.base(case.segment)
        if base:
            case.missing.add(base)
            root = case.receipt(case.segment).in_root
            self.desk.add(Fetch(base, case.id, sources, params.BLOB_BYTES_MAX, state_root=root, program=task.program))

    def on_fetched(self, event: Fetched) -> None:
        """A blob of the running case is here, or nobody gives it."""
        case = self.cases.get(event.token)
        if case is None or event.blob not in case.missing:
            return
        if event.error:
            self._drop(case, "forged-base" if event.forged else "data-withheld", event.error)
            return
        case.missing.discard(event.blob)
        if not case.missing:
            self._run(case)

    @staticmethod
    def _works(case: Case) -> list[bytes]:
        """The ids of the pieces of work of a case, one for each segment."""
        return [blake("ichiba/check-work", case.id, s.to_bytes(8, "little")) for s in case.request.segments]

    def _run(self, case: Case) -> None:
        case.work, case.held = self._works(case)[case.next_index], bool(self.desk.paused_ns)
        if case.held:
            return
        self.desk.add(
            StartWork(
                work=case.work,
                task=task_of(case.task),
                base=case.base(case.segment),
                first_segment=case.segment,
                last_segment=case.segment + 1,
                checkpoint_bytes=params.BLOB_BYTES_MAX,
                memory_bytes=self.desk.means.memory_bytes,
            )
        )

    def on_segment(self, event: SegmentMade) -> None:
        """The segment is re-executed: compare both ends."""
        case = next((c for c in self.cases.values() if c.work == event.work), None)
        if case is None or event.segment != case.segment:
            return
        receipt = case.receipt(case.segment)
        case.operations += receipt.operations
        if event.in_root != receipt.in_root:
            self._drop(case, "base-mismatch", "the segment does not start from the state its receipt names")
            return
        self.desk.emit("checked", segment=case.segment, right=event.out_root == receipt.out_root, found=event.out_root)
        if event.out_root != receipt.out_root:
            self._conclude(case, "wrong", wrong_segment=case.segment, claimed=receipt.out_root, found=event.out_root)
        elif case.next_index + 1 < len(case.request.segments):
            case.next_index += 1
            case.work = b""
            self._gather(case)
        else:
            self._conclude(case, "right")

    def on_work_ended(self, event: WorkEnded) -> None:
        """A worker that failed is tried again a bounded number of times, then the case is declined."""
        case = next((c for c in self.cases.values() if c.work == event.work), None)
        if case is None or not event.error:
            return
        case.failures += 1
        if case.failures >= params.WORK_FAILURES_MAX:
            self._drop(case, "work-failed", event.error[:300])
        else:
            self._run(case)

    def pause(self) -> dict[bytes, int]:
        """Hold all work. The open cases, and when their submitters ask somebody else."""
        silence_ns = self.desk.network.rules.check_silence_ms * 10**6
        for case in self.cases.values():
            case.held = bool(case.work)
        return {case.work or case.id: case.asked_ns + silence_ns for case in self.cases.values()}

    def waiting_works(self) -> list[bytes]:
        """The pieces of work of the open cases."""
        return [case.work or case.id for case in self.cases.values()]

    def resume(self) -> int:
        """Start what waits; how many."""
        held = [case for case in self.cases.values() if case.held]
        for case in held:
            self._run(case)
        return len(held)

    def _conclude(
        self, case: Case, finding: str, *, wrong_segment: int = 0, claimed: bytes = b"", found: bytes = b""
    ) -> None:
        verdict = Verdict(
            network=self.desk.network.id,
            agreement=case.agreement_id,
            proof=case.proof_id,
            checker=self.desk.me,
            role=case.request.role,
            segments=case.request.segments,
            finding="wrong" if finding == "wrong" else "right",
            wrong_segment=wrong_segment,
            claimed_root=claimed or bytes(32),
            found_root=found or bytes(32),
            operations=min(case.operations, 2**62),
            done_ns=self.desk.now_ns,
        )
        envelope = self.desk.seal(verdict)
        self.verdicts[case.id] = envelope
        self.desk.save("verdicts", case.id, envelope)
        self.desk.send(case.submitter, Records((envelope,)))
        self.desk.publish(SETTLEMENT, envelope)
        self._finish(case)

    def _drop(self, case: Case, code: str, why: str) -> None:
        self.desk.send(case.submitter, CheckDecline(case.agreement_id, code, why[:500]))
        self.desk.emit("problem", what=f"check declined: {why}")
        self._finish(case)

    def _finish(self, case: Case) -> None:
        if case.work:
            self.desk.add(StopWork(case.work))
        for owner in (case.id, *self._works(case)):
            self.desk.add(Release(owner))
        del self.cases[case.id]
        self._next()

    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """Verdicts given before a restart are given again, never another."""
        self.verdicts.update(rows("verdicts"))
