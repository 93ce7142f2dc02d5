"""What the node keeps of its jobs, deals and checks, as it stands in the store.

Rows of the local store only: nothing here crosses the network, so a field may be added with a default.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Literal

import msgspec

from peer.desk import Desk
from peer.events import SegmentMade
from protocol import params
from protocol.codec import blake
from protocol.errors import VerificationFailed
from protocol.lifecycle import Event, State, step
from protocol.merkle import merkle_root
from protocol.profile import EXACT
from protocol.profile_task import ProfileSpec
from protocol.records import (
    Agreement,
    Claim,
    Envelope,
    Proof,
    Receipt,
    amount_for,
    decode_body,
    open_record,
)
from protocol.script import AnyTask, ScriptSpec
from protocol.sealing import masked
from protocol.task import TaskSpec

__all__ = [
    "Check",
    "Deal",
    "Job",
    "JobState",
    "PassedOver",
    "agreement_of",
    "check_receipt",
    "checkpoint_program",
    "losses_root",
    "make_claim",
    "make_proof",
    "make_receipt",
    "move",
    "operations_per_check",
    "proof_root",
    "receipt_key",
    "salt_of",
    "save",
    "task_of",
]


class JobState(IntEnum):
    """Stored on disk: numbered from 1, never renumbered."""

    OFFERED = 1
    RUNNING = 2
    DONE = 3
    FAILED = 4
    CANCELLED = 5
    PROFILING = 6
    PLACING = 7  # of a run, whose units are on the market


class PassedOver(msgspec.Struct):
    """A solver that gave its slot to other work: the last time, and how often in a row."""

    code: str
    why: str
    times: int
    at_ns: int


class Job(msgspec.Struct, kw_only=True):
    """A submitter's job: the task, the money it may cost, how far it got, and the deals that got it there."""

    id: bytes
    task: bytes
    name: str
    state: int
    unit_price_max: int
    budget_micro: int
    checkpoint_bytes: int
    memory_bytes: int
    sandbox: int
    segment: int
    base_root: bytes
    base_blob: bytes
    created_ns: int
    spent_micro: int = 0
    nonce: int = 0
    offer: bytes = b""
    offer_id: bytes = b""
    offered_ns: int = 0
    resting: dict[bytes, int] = msgspec.field(default_factory=dict)  # solver -> not again before, ns
    deal: bytes = b""
    deals: list[bytes] = msgspec.field(default_factory=list)
    retried: int = 0
    fruitless: int = 0  # deals in a row that brought the job no further
    diverged: int = 0  # solvers that say the task diverges
    slashed_micro: int = 0
    culprits: list[bytes] = msgspec.field(default_factory=list)
    cancelled: bool = False
    reason: str = ""
    outcome: str = ""  # how a script ended, in words; empty where it ended well
    group: bytes = b""  # the same for all replicas of one script
    profiles: list[bytes] = msgspec.field(default_factory=list)  # sealed Profiles of a tolerant task
    tolerance: bytes = EXACT  # what they come to (protocol.profile.tolerance_id), once it is known
    parent: bytes = b""  # of a profile: the tolerant job it is for; of a unit: its run
    solvers: list[bytes] = msgspec.field(default_factory=list)  # of its deals, in their order
    key: bytes = b""  # of a sealed job: what its blobs are sealed under
    credit: bool = False  # on a credit line: no channel, no lock and no paid check
    ended_ns: int = 0
    device: Literal["any", "cpu", "gpu"] = "any"
    device_memory_bytes: int = 0
    deadline_ns: int = 0  # when its work must be done; 0: whenever
    only: bytes = b""  # the one solver that it is offered to; empty: to the market
    known: bytes = b""  # the root it ends at, where its submitter ran it before: it pays for no other, and tries once
    passed: dict[bytes, PassedOver] = msgspec.field(default_factory=dict)  # solver -> since the offer was made
    units: list[bytes] = msgspec.field(default_factory=list)  # of a run: the jobs of its units, in their order
    unit: int = -1  # of one of those: its number
    kept: bool = False  # this peer runs the unit itself

    @property
    def tolerant(self) -> bool:
        """Whether its work is judged by distance."""
        return task_of(self.task).mode == "tolerant"

    @property
    def open(self) -> bool:
        """Whether anything is still to happen."""
        return self.state in (JobState.PROFILING, JobState.PLACING, JobState.OFFERED, JobState.RUNNING)


Correction = Literal["unknown", "none", "fetching", "checking", "done", "given-up"]
"""How far a submitter is with an ordered error in a deal: not asked, there is none, its true state is on its way, is
re-executed, is what the job builds on; or cannot be had, and the work from that segment on is done again."""


class Check(msgspec.Struct, kw_only=True):
    """One checker asked to re-execute some segments of a deal."""

    peer: bytes
    role: Literal["verifier", "whistleblower"]
    segments: list[int]
    asked_ns: int
    state: Literal["asked", "accepted", "right", "wrong", "unsure", "gone", "overruled", "excused"] = "asked"
    verdict: bytes = b""
    operations: int = 0
    wrong_segment: int = 0
    found_root: bytes = b""
    corrected: bool = False  # it was asked to check against the true end of an ordered error
    doubt: bytes = b""  # the unsure Verdict on which it decides


class Deal(msgspec.Struct, kw_only=True):
    """One agreement as one of its parties sees it. `receipts` counts those with both signatures."""

    id: bytes
    side: Literal["submitter", "solver", "house"]  # house: pay for availability, until it is certified
    state: int
    agreement: bytes
    task: bytes
    base_blob: bytes
    seed: bytes
    created_ns: int
    secret: bytes = b""  # a solver's, that decides whether an error is ordered
    beacons: list[bytes] = msgspec.field(default_factory=list)  # shares of the agreement's beacon: what ordered it
    ordered: int | None = None  # the segment that a solver has to hand in wrong
    forced: bytes = b""  # the Forced that says so
    draw_beacons: list[bytes] = msgspec.field(default_factory=list)  # shares of the draw's beacon
    seeds_closed: bool = False  # a submitter waits for them: no seed counts that comes now
    correction: Correction = "unknown"
    corrected_ns: int = 0  # since when the correction is so
    useful: int = -1  # receipts the job can build on, where that is not all of them
    job: bytes = b""
    receipts: int = 0
    made: int = 0
    last_receipt: bytes = b""
    last_root: bytes = b""
    last_blob: bytes = b""
    cumulative_micro: int = 0
    cumulative_operations: int = 0
    voucher: bytes = b""
    proof: bytes = b""
    proof_id: bytes = b""
    own_reveal: bytes = b""
    other_reveal: bytes = b""
    other_seed: bytes = b""
    drawn: list[int] = msgspec.field(default_factory=list)
    checks: list[Check] = msgspec.field(default_factory=list)
    settlement: bytes = b""
    news_ns: int = 0
    entered_ns: int = 0
    ended_early: bool = False
    paid_out: bool = False  # the channel is closed, whatever the checks still find
    failures: int = 0
    doubt: bool = False  # both parties signed, and it is neither open nor certain that it never will be
    uncertified: str = ""  # why the notaries did not certify it, as a code
    note: str = ""
    key: bytes = b""  # of a sealed job, on the solver's side
    base_root: bytes = b""  # the state it starts from, once it is known: the agreement on a sealed job masks it
    # Sealed Profiles of a tolerant task, which its tolerance is from; of a profile's deal, the one that it made.
    profiles: list[bytes] = msgspec.field(default_factory=list)

    @property
    def lifecycle(self) -> State:
        """The state as the enum."""
        return State(self.state)


def agreement_of(deal: Deal, network: bytes) -> Agreement:
    """The agreement inside a deal's envelope, which was checked when it came in."""
    record = decode_body(msgspec.msgpack.decode(deal.agreement, type=Envelope).body, network=network)
    assert isinstance(record, Agreement)
    return record


def receipt_key(deal_id: bytes, sequence: int) -> bytes:
    """The store key of one receipt: they sort in order."""
    return deal_id + sequence.to_bytes(4, "big")


def task_of(encoded: bytes) -> AnyTask:
    """A task that was checked when it came in."""
    return msgspec.msgpack.decode(encoded, type=TaskSpec | ScriptSpec | ProfileSpec)


def salt_of(task: AnyTask) -> bytes:
    """Of a sealed job's task; empty for an open one."""
    return task.salt if isinstance(task, TaskSpec) else b""


def checkpoint_program(task: AnyTask) -> bytes:
    """The program that says what a checkpoint of the task holds; none for a script's result or a profile."""
    return task.program if isinstance(task, TaskSpec) else b""


def operations_per_check(task: AnyTask) -> int:
    """The operations of re-executing one segment; 0 for a script or a profile, of which nothing is re-executed."""
    return task.operations_per_step * task.steps_per_segment if isinstance(task, TaskSpec) else 0


def save(desk: Desk, deal: Deal) -> None:
    """Journal a deal."""
    desk.save("deals", deal.id, msgspec.msgpack.encode(deal))


def move(desk: Desk, deal: Deal, event: Event) -> None:
    """Take one row of the lifecycle table. Raises LocalProtocolError where there is none."""
    deal.state, deal.entered_ns = step(deal.lifecycle, event), desk.now_ns
    save(desk, deal)


def proof_root(receipts: list[bytes], network: bytes) -> bytes:
    """The Merkle root of the end states of co-signed receipts, which were checked when they came in."""
    roots = []
    for envelope in receipts:
        receipt = decode_body(msgspec.msgpack.decode(envelope, type=Envelope).body, network=network)
        assert isinstance(receipt, Receipt)
        roots.append(receipt.out_root)
    return merkle_root(roots)


def check_receipt(deal: Deal, receipt: Receipt, network: bytes, now_ns: int) -> None:
    """Raise VerificationFailed unless `receipt` is the next link of the deal's chain, at the agreed price.

    A script's receipt states the nanoseconds it ran: no more than agreed, nor than have passed here since it was
    agreed, for the submitter's own clock is all that can contradict it.
    """
    agreement, task = agreement_of(deal, network), task_of(deal.task)
    segment = agreement.first_segment + deal.receipts
    operations = task.operations_per_step * len(task.steps_of(segment))
    if isinstance(task, ScriptSpec):
        passed_ns = now_ns - deal.created_ns
        passed_ns += passed_ns * params.SCRIPT_CLOCK_SLACK_PERMILLE // 1000 + params.SCRIPT_CLOCK_SLACK_NS
        if not 0 < receipt.operations <= min(operations, passed_ns):
            raise VerificationFailed(
                f"receipt charges {receipt.operations} ns of a script",
                why=f"{operations} were agreed, at most {passed_ns} have passed",
            )
        operations = receipt.operations
    wanted = (deal.last_receipt or bytes(32), segment, deal.last_root, operations)
    given = (receipt.previous, receipt.segment, receipt.in_root, receipt.operations)
    if wanted != given:
        raise VerificationFailed("receipt does not continue the chain of its deal", why=f"at segment {segment}")
    if receipt.amount_micro != amount_for(operations, agreement.unit_price):
        raise VerificationFailed(f"receipt asks {receipt.amount_micro} micro-credits, the price says otherwise")


def make_proof(desk: Desk, deal: Deal, receipts: list[bytes]) -> tuple[bytes, bytes]:
    """This peer's Proof over the co-signed receipts of a deal: its envelope and its id."""
    task = task_of(deal.task)
    proof = Proof(
        network=desk.network.id,
        agreement=deal.id,
        author=desk.me,
        receipts=deal.receipts,
        root=proof_root(receipts, desk.network.id),
        last_receipt=deal.last_receipt,
        program=masked(salt_of(task), task.program),
    )
    envelope = desk.seal(proof)
    return envelope, open_record(envelope, network=desk.network.id)[1]


def make_claim(desk: Desk, deal: Deal, fees: tuple[tuple[bytes, int], ...] = ()) -> bytes:
    """This peer's Claim on a deal, to close its channel alone: what the last voucher promises, in its envelope."""
    return desk.seal(Claim(network=desk.network.id, agreement=deal.id, author=desk.me, voucher=deal.voucher, fees=fees))


def losses_root(losses: Iterable[float]) -> bytes:
    """The hash a receipt binds its losses with: float32, little-endian, in step order."""
    return blake("ichiba/losses", b"".join(struct.pack("<f", loss) for loss in losses))


def make_receipt(
    desk: Desk, deal: Deal, end: SegmentMade, *, in_root: bytes, operations: int, earlier: list[bytes]
) -> bytes:
    """The solver's Receipt of a segment that ended so, in its envelope. earlier: the receipts made before it."""
    return desk.seal(
        Receipt(
            network=desk.network.id,
            agreement=deal.id,
            sequence=deal.made,
            previous=open_record(earlier[-1], network=desk.network.id)[1] if earlier else bytes(32),
            segment=end.segment,
            operations=operations,
            amount_micro=amount_for(operations, agreement_of(deal, desk.network.id).unit_price),
            in_root=in_root,
            out_root=end.out_root,
            losses_root=losses_root(end.losses),
            checkpoint=end.checkpoint,
            checkpoint_bytes=end.checkpoint_bytes,
            done_ns=desk.wall_ns,
        )
    )
