"""A verifier's or whistleblower's side: take a case, believe nothing in it, re-execute, sign a verdict.

The case carries the evidence that segments and checker were drawn after the proof; a case that fails any check is
declined with a reason, and a case is answered with the same verdict however often it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from peer.deals import task_of
from peer.desk import SETTLEMENT, Desk
from peer.events import Fetch, Fetched, Release, SegmentMade, StartWork, StopWork, WorkEnded
from peer.evidence import open_draw
from peer.messages import CheckAccept, CheckDecline, CheckRequest, JuryAsk, Records
from peer.settler import Settler
from protocol import params
from protocol.certificate import check_certified
from protocol.codec import blake
from protocol.errors import VerificationFailed
from protocol.forced import check_forced
from protocol.jury import jury_of
from protocol.merkle import merkle_root
from protocol.network import Network
from protocol.profile import Distance, Tolerance, finding
from protocol.records import (
    ROLE_VERIFIER,
    ROLE_WHISTLEBLOWER,
    Agreement,
    Challenge,
    Forced,
    Proof,
    Receipt,
    Verdict,
    open_record,
)
from protocol.sampling import select_segments
from protocol.script import blobs_of
from protocol.sealing import masked
from protocol.task import TaskSpec, task_id
from protocol.tolerance import open_tolerance

__all__ = ["Case", "Checker", "open_case", "open_evidence"]


Found: TypeAlias = Literal["right", "unsure", "wrong"]


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
    drawn: tuple[int, ...] = ()
    random: bytes = b""  # of the draw
    own: bool = False  # a whistleblower's own wish: nobody asked, and nobody pays for what is right
    started: bool = False
    missing: set[bytes] = field(default_factory=set)
    next_index: int = 0
    operations: int = 0
    work: bytes = b""
    answered: bool = False
    asked_ns: int = 0
    held: bool = False  # until the end of a pause
    failures: int = 0
    forced: Forced | None = None  # an ordered error: what is checked is the work without it
    tolerance: Tolerance | None = None  # None of exact work, whose end must be the same
    asked: Literal["first", "second", "juror"] = "first"
    doubter: bytes = b""  # the first verifier, whose unsure verdict a second one decides on
    farthest: tuple[int, int] = (0, 0)  # L1 and L2 in ppb, of the segments of tolerant work re-executed so far
    # How far off the farthest of the unsure segments is, which one, and its roots claimed and found.
    doubtful: tuple[int, tuple[int, bytes, bytes]] | None = None

    @property
    def role(self) -> Literal["verifier", "whistleblower", "juror"]:
        """In which its verdict is given."""
        return "juror" if self.asked == "juror" else self.request.role

    @property
    def segment(self) -> int:
        """The segment being re-executed."""
        return self.request.segments[self.next_index]

    def receipt(self, segment: int) -> Receipt:
        """The receipt of a segment of this deal."""
        return self.receipts[segment - self.agreement.first_segment]

    def base(self, segment: int) -> bytes:
        """The blob a segment starts from; empty for the seeded start."""
        if self.forced is not None and segment == self.forced.segment + 1:
            return self.forced.checkpoint
        if segment == self.agreement.first_segment:
            return self.request.base_blob
        return self.receipt(segment - 1).checkpoint

    def end(self, segment: int) -> bytes:
        """The blob of the state that it has to end at."""
        here = self.forced is not None and segment == self.forced.segment
        return self.forced.checkpoint if self.forced and here else self.receipt(segment).checkpoint

    def in_root(self, segment: int) -> bytes:
        """The root of the state a segment starts from."""
        after = self.forced is not None and segment == self.forced.segment + 1
        return self.forced.true_root if self.forced and after else self.receipt(segment).in_root

    def out_root(self, segment: int) -> bytes:
        """The root of the state it has to end at."""
        here = self.forced is not None and segment == self.forced.segment
        return self.forced.true_root if self.forced and here else self.receipt(segment).out_root


def open_case(request: CheckRequest, *, network: Network, me: bytes, sender: bytes) -> Case:
    """Check all the evidence of a request. Raises VerificationFailed (or another RemoteProtocolError).

    As `open_evidence`; and it comes from its submitter, to a peer that is no party, about the drawn segments (a
    whistleblower may be asked for any of them).
    """
    case = open_evidence(request, network=network)
    if sender != case.agreement.submitter or me in (case.agreement.submitter, case.agreement.solver):
        raise VerificationFailed("a case comes from its submitter, to a peer that is no party")
    asked, drawn = request.segments, case.drawn
    if case.doubter == me:
        raise VerificationFailed("a second verifier decides on an unsure verdict, not the first")
    if case.forced is not None:
        spoiled = {case.forced.segment, case.forced.segment + 1}
        if list(asked) != sorted(set(asked)) or not set(asked) <= {*drawn, *spoiled}:
            raise VerificationFailed(f"segments {list(asked)} were neither drawn nor spoiled by an ordered error")
        return case
    if (asked != drawn and not (request.role == "whistleblower" or len(asked) == 1)) or not set(asked) <= set(drawn):
        raise VerificationFailed(f"segments {list(asked)} were not drawn, {list(drawn)} were")
    return case


def open_evidence(request: CheckRequest, *, network: Network) -> Case:
    """The evidence of a deal, whoever gives it to whom. Raises VerificationFailed (or another RemoteProtocolError).

    The agreement is certified; the receipts form one chain from its base root, each with both signatures; the proof is
    over their roots; the seeds match their commitments, the notaries' randomness is for them; the segments have
    receipts. With an ordered error the case is about the work without it, and its verdict is on that, not the proof.
    """
    agreement, agreement_id, signers = open_record(request.agreement, network=network.id)
    if not isinstance(agreement, Agreement):
        raise VerificationFailed("a case rests on an agreement")
    check_certified(agreement, signers, network)
    task = TaskSpec.from_bytes(request.task, network=network.id)
    if task_id(task) != agreement.task:
        raise VerificationFailed("the case is about another task than the agreement")
    receipts, last_id = _open_chain(request, agreement, agreement_id, network.id, task.salt)
    if any(r.operations != task.operations_per_step * len(task.steps_of(r.segment)) for r in receipts):
        raise VerificationFailed("a receipt counts other operations than the task has")
    proof, proof_id, _ = open_record(request.proof, network=network.id)
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
    random = open_draw(request.reveals, request.beacons, agreement, agreement_id, proof_id, network)
    drawn = select_segments(
        random,
        first=agreement.first_segment,
        last=agreement.first_segment + len(receipts),
        permille=agreement.check_permille,
        minimum=network.rules.check_segments_min,
    )
    asked, forced = request.segments, None
    if not all(agreement.first_segment <= s < agreement.first_segment + len(receipts) for s in asked):
        raise VerificationFailed(f"segments {list(asked)} have no receipt in this deal")
    if request.forced:
        forced, proof_id = _open_forced(request, agreement, agreement_id, receipts, network)
    tolerance = open_tolerance(request.profiles, network=network.id, task=agreement.task, expected=agreement.tolerance)
    if (task.mode == "tolerant") != (tolerance is not None):
        raise VerificationFailed(f"an agreement on {task.mode} work with another kind of tolerance")
    doubter = _open_doubt(request, agreement_id, proof_id, network.id) if request.doubt else b""
    said = (request.role.encode(), bytes(str(asked), "ascii"), request.doubt)
    case_id = blake("ichiba/case", agreement_id, proof_id, *said)
    return Case(
        case_id, agreement.submitter, agreement_id, agreement, proof_id, request.task, request, receipts, drawn=drawn,
        random=random, forced=forced, tolerance=tolerance, asked="second" if doubter else "first", doubter=doubter,
    )  # fmt: skip


def _open_doubt(request: CheckRequest, agreement_id: bytes, proof_id: bytes, network: bytes) -> bytes:
    """Who was unsure of just the segment that is asked for. Raises VerificationFailed if nobody was."""
    verdict, _, _ = open_record(request.doubt, network=network)
    if not isinstance(verdict, Verdict) or verdict.finding != "unsure":
        raise VerificationFailed("a second verifier decides on an unsure verdict of a first one")
    if (verdict.agreement, verdict.proof, (verdict.wrong_segment,)) != (agreement_id, proof_id, request.segments):
        raise VerificationFailed("the unsure verdict is on other work than is asked for")
    return verdict.checker


def _open_forced(
    request: CheckRequest, agreement: Agreement, agreement_id: bytes, receipts: list[Receipt], network: Network
) -> tuple[Forced, bytes]:
    """The ordered error of a case, and its id: ordered indeed, and what its receipt says. Raises VerificationFailed."""
    record, record_id, _ = open_record(request.forced, network=network.id)
    if not isinstance(record, Forced):
        raise VerificationFailed("an ordered error comes as a Forced")
    check_forced(record, agreement, agreement_id, shares=request.forced_beacons, network=network)
    place = record.segment - agreement.first_segment
    if place >= len(receipts) or receipts[place].out_root != record.false_root:
        raise VerificationFailed("an ordered error that no receipt shows")
    return record, record_id


def _open_chain(
    request: CheckRequest, agreement: Agreement, agreement_id: bytes, network: bytes, salt: bytes
) -> tuple[list[Receipt], bytes]:
    receipts: list[Receipt] = []
    previous, root = bytes(32), agreement.base_root
    for index, envelope in enumerate(request.receipts):
        receipt, receipt_id, signers = open_record(envelope, network=network)
        if not isinstance(receipt, Receipt) or signers != {agreement.submitter, agreement.solver}:
            raise VerificationFailed("a receipt without both parties' signatures")
        begun = receipt.in_root if index else masked(salt, receipt.in_root)
        link = (receipt.agreement, receipt.sequence, receipt.previous, receipt.segment, begun)
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
    on_wrong: Callable[[Case, bytes], None] = lambda _a, _b: None  # a case, and the root its segment really ends at

    def on_request(self, peer: bytes, message: CheckRequest) -> None:
        """Open a case, or repeat its verdict. Raises RemoteProtocolError for forged evidence."""
        bit = ROLE_VERIFIER if message.role == "verifier" else ROLE_WHISTLEBLOWER
        case = open_case(
            message,
            network=self.desk.network,
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
        elif (resting := self.desk.resting()) is not None:
            self.desk.send(peer, CheckDecline(case.agreement_id, *resting))
        elif not self.desk.means.roles & bit:
            self.desk.send(peer, CheckDecline(case.agreement_id, "role", f"this peer is no {message.role}"))
        elif len(self.cases) >= params.CHECKS_QUEUED_MAX:
            self.desk.send(peer, CheckDecline(case.agreement_id, "busy", "too many cases are queued here"))
        else:
            self.desk.send(peer, CheckAccept(case.agreement_id))
            self._queue(case)

    def _queue(self, case: Case) -> None:
        case.asked_ns = self.desk.now_ns
        self.cases[case.id] = case
        self.desk.emit("case", submitter=case.submitter, role=case.role, segments=list(case.request.segments))
        self._next()

    def on_jury(self, peer: bytes, message: JuryAsk) -> None:
        """A notary has drawn this peer: measure the disputed segment, whatever role it has, and tell all notaries.

        Raises RemoteProtocolError for forged evidence, or if this peer is no juror of this dispute.
        """
        network, me = self.desk.network, self.desk.me
        if peer not in network.notary_keys:  # before the thousand signatures of its evidence
            raise VerificationFailed("a juror is asked by a notary")
        challenge, _, _ = open_record(message.challenge, network=network.id)
        case = open_evidence(message.case, network=network)
        if not isinstance(challenge, Challenge) or case.tolerance is None:
            raise VerificationFailed("a jury is asked about a challenge of tolerant work")
        if (challenge.agreement, challenge.proof, (challenge.segment,)) != (
            case.agreement_id, case.proof_id, message.case.segments,
        ):  # fmt: skip
            raise VerificationFailed("the challenge is of other work than is to be measured")
        parties = frozenset((case.agreement.submitter, case.agreement.solver, challenge.challenger))
        if me not in jury_of(case.random, challenge.segment, network, parties=parties):
            raise VerificationFailed("this peer is no juror of that dispute")
        segment = challenge.segment.to_bytes(8, "little")  # measured once, however often and by whom it is asked for
        case.id, case.asked = blake("ichiba/jury-case", case.agreement_id, case.proof_id, segment), "juror"
        if case.id in self.verdicts:
            self.desk.send(peer, Records((self.verdicts[case.id],)))
        elif case.id not in self.cases and len(self.cases) < params.CHECKS_QUEUED_MAX and not self.desk.paused_ns:
            self._queue(case)

    def recheck(self, case: Case) -> bool:
        """Run a case nobody asked for; a wrong end is challenged, a right one is nobody's business. False if busy."""
        if case.id in self.cases or case.id in self.verdicts or len(self.cases) >= params.CHECKS_QUEUED_MAX:
            return False
        case.own = True
        self._queue(case)
        return True

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
        states = {case.base(case.segment): case.in_root(case.segment)}
        if case.tolerance is not None:
            states[case.end(case.segment)] = case.out_root(case.segment)
        for state, root in states.items():
            if state:
                case.missing.add(state)
                self.desk.add(
                    Fetch(state, case.id, sources, params.BLOB_BYTES_MAX, state_root=root, program=task.program)
                )

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
                gauges=case.tolerance.gauges if case.tolerance else (),
                compare=case.end(case.segment) if case.tolerance else b"",
            )
        )

    def on_segment(self, event: SegmentMade) -> None:
        """The segment is re-executed: compare both ends."""
        case = next((c for c in self.cases.values() if c.work == event.work), None)
        if case is None or event.segment != case.segment:
            return
        claimed = case.out_root(case.segment)
        case.operations += case.receipt(case.segment).operations
        if event.in_root != case.in_root(case.segment):
            self._drop(case, "base-mismatch", "the segment does not start from the state its receipt names")
            return
        found = self._finding(case, event, claimed)
        self.desk.emit(
            "checked", segment=case.segment, right=found == "right", found=event.out_root, distance=event.distance
        )
        at = (case.segment, claimed, event.out_root)
        if found == "wrong":
            self._conclude(case, "wrong", at)
            return
        if found == "unsure":
            # A second verifier is asked about one: who clears the farthest clears the others.
            case.doubtful = max(case.doubtful or (0, at), (self._off(case, event), at))
        if case.next_index + 1 < len(case.request.segments):
            case.next_index += 1
            case.work = b""
            self._gather(case)
        elif case.doubtful is not None:
            self._conclude(case, "unsure", case.doubtful[1])
        else:
            self._conclude(case, "right")

    @staticmethod
    def _finding(case: Case, event: SegmentMade, claimed: bytes) -> Found:
        """Of exact work the roots decide, of tolerant work the distance."""
        if case.tolerance is None:
            return "right" if event.out_root == claimed else "wrong"
        assert event.distance is not None, "a comparison was asked for"
        found = Distance(*event.distance, "")
        case.farthest = max(found.l1_ppb, case.farthest[0]), max(found.l2_ppb, case.farthest[1])
        return finding(found, case.tolerance, asked=case.asked)

    @staticmethod
    def _off(case: Case, event: SegmentMade) -> int:
        """The worse of both distances, each in its own thresholds; as a whole number, to compare."""
        assert case.tolerance is not None and event.distance is not None, "float work was compared"
        l1, l2 = event.distance
        return max(l1 * case.tolerance.l2_ppb, l2 * case.tolerance.l1_ppb)

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

    def _conclude(self, case: Case, told: Found, at: tuple[int, bytes, bytes] = (0, bytes(32), bytes(32))) -> None:
        """Give the verdict. at: the segment that is not right, the root claimed of it and the one found."""
        verdict = Verdict(
            network=self.desk.network.id,
            agreement=case.agreement_id,
            proof=case.proof_id,
            checker=self.desk.me,
            role=case.role,
            segments=case.request.segments,
            finding=told,
            wrong_segment=at[0],
            claimed_root=at[1],
            found_root=at[2],
            operations=min(case.operations, 2**62),
            done_ns=self.desk.wall_ns,
            l1_ppb=case.farthest[0],
            l2_ppb=case.farthest[1],
        )
        # Of an ordered error's correction only the submitter hears, and a juror is no accuser.
        if told == "wrong" and case.forced is None and case.asked != "juror":
            self.on_wrong(case, at[2])
        if case.own:
            self._finish(case)
            return
        envelope = self.desk.seal(verdict)
        self.verdicts[case.id] = envelope
        self.desk.save("verdicts", case.id, envelope)
        for peer in sorted(self.desk.network.notary_keys) if case.asked == "juror" else (case.submitter,):
            self.desk.send(peer, Records((envelope,)))
        self.desk.publish(SETTLEMENT, envelope)
        self._finish(case)

    def _drop(self, case: Case, code: str, why: str) -> None:
        if not case.own and case.asked != "juror":
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
