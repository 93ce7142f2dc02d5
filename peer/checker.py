"""A verifier's or whistleblower's side: take a case, believe nothing in it, re-execute, sign a verdict.

The case carries the evidence that segments and checker were drawn after the proof; a case that fails any check is
declined with a reason, and a case is answered with the same verdict however often it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from peer.case import Case, Found, open_case, open_evidence
from peer.deals import task_of
from peer.desk import SETTLEMENT, Desk
from peer.events import Fetch, Fetched, Release, SegmentMade, StartWork, StopWork, WorkEnded
from peer.messages import CheckAccept, CheckDecline, CheckRequest, JuryAsk, Records
from peer.settler import Settler
from protocol import params
from protocol.codec import blake
from protocol.errors import VerificationFailed
from protocol.jury import jury_of
from protocol.profile import Distance, finding
from protocol.records import (
    ROLE_VERIFIER,
    ROLE_WHISTLEBLOWER,
    Challenge,
    Verdict,
    open_record,
)
from protocol.script import blobs_of

__all__ = ["Checker"]

BAD_TAPE: Final = "bad-tape"  # the code of a worker that finds no such tensor on the tape of a unit


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
        """A notary has drawn this peer: execute the disputed segment, whatever role it has, and tell all notaries.

        Raises RemoteProtocolError for forged evidence, or if this peer is no juror of this dispute.
        """
        network, me = self.desk.network, self.desk.me
        if peer not in network.notary_keys:  # before the thousand signatures of its evidence
            raise VerificationFailed("a juror is asked by a notary")
        challenge, _, _ = open_record(message.challenge, network=network.id)
        case = open_evidence(message.case, network=network)
        if not isinstance(challenge, Challenge) or not case.by_jury:
            raise VerificationFailed("a jury is asked about a challenge of tolerant work, or of a unit's")
        if (challenge.agreement, challenge.proof, (challenge.segment,)) != (
            case.agreement_id, case.proof_id, message.case.segments,
        ):  # fmt: skip
            raise VerificationFailed("the challenge is of other work than is to be executed")
        parties = frozenset((case.agreement.submitter, case.agreement.solver, challenge.challenger))
        if me not in jury_of(case.random, challenge.segment, network, parties=parties):
            raise VerificationFailed("this peer is no juror of that dispute")
        segment = challenge.segment.to_bytes(8, "little")  # executed once, however often and by whom it is asked for
        case.challenger = challenge.challenger
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
        sources = case.sources
        case.missing, case.tape = set(wanted), b""
        for blob, size in wanted.items():
            self.desk.add(Fetch(blob, case.id, sources, size))
        states = {case.base(case.segment): case.in_root(case.segment)}
        if case.tolerance is not None or case.unit:
            states[case.end(case.segment)] = case.out_root(case.segment)
        for state, root in states.items():
            if state:
                case.missing.add(state)
                links = case.unit and state == case.end(case.segment)  # it names the tape of what the unit received
                fetch = Fetch(state, case.id, sources, params.BLOB_BYTES_MAX, state_root=root, program=task.program)
                self.desk.add(replace(fetch, links=links))

    def on_fetched(self, event: Fetched) -> None:
        """A blob of the running case is here, or nobody gives it."""
        case = self.cases.get(event.token)
        if case is None or event.blob not in case.missing:
            return
        if event.error:
            self._drop(case, "forged-base" if event.forged else "data-withheld", event.error)
            return
        case.missing.discard(event.blob)
        if event.ends is not None and not case.tape:
            case.tape = event.ends.tape
            case.missing.add(case.tape)
            self.desk.add(Fetch(case.tape, case.id, case.sources, params.UNIT_TAPE_BYTES_MAX))
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
                tapes=(case.tape,) if case.tape else (),
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
        if case.unit and event.error.startswith(BAD_TAPE):
            # Both signed that this is what the unit received: with it the segment cannot be what its receipt says.
            case.operations += case.receipt(case.segment).operations
            self._conclude(case, "wrong", (case.segment, case.out_root(case.segment), bytes(32)))
        elif case.failures >= params.WORK_FAILURES_MAX:
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
        network, found = self.desk.network, at[2]
        verdict = Verdict(
            network=network.id,
            agreement=case.agreement_id,
            proof=case.proof_id,
            checker=self.desk.me,
            role=case.role,
            segments=case.request.segments,
            finding=told,
            wrong_segment=at[0],
            claimed_root=at[1],
            found_root=found if told == "right" else case.stated_root(self.desk.me, found, network),
            operations=min(case.operations, 2**62),
            done_ns=self.desk.wall_ns,
            l1_ppb=case.farthest[0],
            l2_ppb=case.farthest[1],
        )
        # Of an ordered error's correction only the submitter hears, and a juror is no accuser.
        if told == "wrong" and case.forced is None and case.asked != "juror":
            self.on_wrong(case, found)
        if case.own:
            self._finish(case)
            return
        envelope = self.desk.seal(verdict)
        self.verdicts[case.id] = envelope
        self.desk.save("verdicts", case.id, envelope)
        for peer in sorted(network.notary_keys) if case.asked == "juror" else (case.submitter,):
            self.desk.send(peer, Records((envelope,)))
        if case.asked != "juror":  # another juror could say the same: notaries tell it when it is over
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
