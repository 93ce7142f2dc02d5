"""A case: the evidence of a deal that a checker, a juror or a player believes once all of it is checked. Sans-IO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from peer.evidence import open_draw
from peer.messages import CheckRequest
from protocol.certificate import check_certified
from protocol.codec import blake
from protocol.errors import VerificationFailed
from protocol.forced import check_forced, may_order
from protocol.jury import bound_root
from protocol.merkle import merkle_root
from protocol.network import Network
from protocol.profile import Tolerance
from protocol.records import Agreement, Forced, Proof, Receipt, Verdict, open_record
from protocol.sampling import select_segments
from protocol.sealing import masked
from protocol.task import TaskSpec, task_id
from protocol.tolerance import open_tolerance

__all__ = ["Case", "Found", "open_case", "open_evidence"]

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
    unit: bool = False  # whether the work is a unit's of a parallel job
    tape: bytes = b""  # of a unit: the blob of what it received in the segment being re-executed
    asked_ns: int = 0
    held: bool = False  # until the end of a pause
    failures: int = 0
    forced: Forced | None = None  # an ordered error: what is checked is the work without it
    tolerance: Tolerance | None = None  # None of exact work, whose end must be the same
    asked: Literal["first", "second", "juror"] = "first"
    challenger: bytes = b""  # of a juror's: who has all that it takes too, and every reason to give it
    doubter: bytes = b""  # the first verifier, whose unsure verdict a second one decides on
    farthest: tuple[int, int] = (0, 0)  # L1 and L2 in ppb, of the segments of tolerant work re-executed so far
    # How far off the farthest of the unsure segments is, which one, and its roots claimed and found.
    doubtful: tuple[int, tuple[int, bytes, bytes]] | None = None

    @property
    def role(self) -> Literal["verifier", "whistleblower", "juror"]:
        """In which its verdict is given."""
        return "juror" if self.asked == "juror" else self.request.role

    @property
    def by_jury(self) -> bool:
        """Whether a dispute about it has no game, but jurors who execute the segment again (protocol/jury.py)."""
        return self.unit or self.tolerance is not None

    def binds(self, network: Network) -> bool:
        """Whether a checker of it states the root that it found in a way that no other can say after it."""
        return self.unit and bool(network.notaries)

    def stated_root(self, peer: bytes, root: bytes, network: Network) -> bytes:
        """What `peer` says in its verdict and its challenge of the root that it found. A juror tells notaries alone."""
        return bound_root(peer, root) if self.binds(network) and self.asked != "juror" else root

    def disputed(self, segment: int) -> int:
        """What one dispute settles: a segment, or -1 for all of a proof that jurors judge. They need no player's moves,
        so nobody can drag that out, and the first segment that is wrong convicts."""
        return -1 if self.by_jury else segment

    @property
    def sources(self) -> tuple[bytes, ...]:
        """Who is asked for the blobs it takes."""
        return tuple(peer for peer in (self.submitter, self.agreement.solver, self.challenger) if peer)

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
    receipts; in a unit no error may be ordered. With an ordered error the case is about the work without it, and its
    verdict is on that, not the proof.
    """
    agreement, agreement_id, signers = open_record(request.agreement, network=network.id)
    if not isinstance(agreement, Agreement):
        raise VerificationFailed("a case rests on an agreement")
    check_certified(agreement, signers, network)
    task = TaskSpec.from_bytes(request.task, network=network.id)
    if task_id(task) != agreement.task:
        raise VerificationFailed("the case is about another task than the agreement")
    if task.stage is not None and may_order(agreement):
        raise VerificationFailed("a unit of a parallel job in whose deal an error may be ordered")
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
        unit=task.stage is not None,
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
