"""What the checks of one deal of a bundle share: its envelopes, what is known of it so far, and how a check refuses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import msgspec

from protocol import params
from protocol.arbitration import Judged
from protocol.errors import RemoteProtocolError, VerificationFailed
from protocol.keys import peer_key, short
from protocol.network import Network
from protocol.profile import Tolerance
from protocol.records import Agreement, Forced, Receipt, Record, Verdict, open_record
from protocol.script import AnyTask

__all__ = ["Case", "Deal", "DealReport", "Refused", "check_verdict", "open_as", "unhex"]

_Hex = Annotated[str, msgspec.Meta(max_length=2 * params.GOSSIP_RECORD_BYTES_MAX, pattern="^[0-9a-f]*$")]
_Few = Annotated[list[_Hex], msgspec.Meta(max_length=params.BUNDLE_DEAL_RECORDS_MAX)]
_Shares = Annotated[list[_Hex], msgspec.Meta(max_length=params.NOTARIES_MAX)]
_T = TypeVar("_T", bound=Record)


class Refused(VerificationFailed):
    """A check that failed. `check` is its stable name: "receipt-chain", "draw", "settlement-fees" and so on."""

    def __init__(self, check: str, what: str, *, why: str = "", next_step: str = "") -> None:
        self.check = check
        super().__init__(what, why=why, next_step=next_step)

    def as_dict(self) -> dict[str, str]:
        """With the name of the check."""
        return {**super().as_dict(), "check": self.check}


class Deal(msgspec.Struct, forbid_unknown_fields=True):
    """The envelopes of one deal, in hex; empty where the deal did not get so far.

    beacons, forced_beacons: notaries' shares of the randomness of the draw, and of what ordered the error `forced`.
    profiles: of a tolerant task, those its thresholds follow from. stakes: the moves by which checkers and profilers
    staked what the network file does not give them.
    """

    agreement: _Hex
    receipts: Annotated[list[_Hex], msgspec.Meta(max_length=params.TASK_SEGMENTS_MAX)]
    voucher: _Hex
    proof: _Hex
    reveals: Annotated[list[_Hex], msgspec.Meta(max_length=2)]
    verdicts: _Few
    closing: _Few
    beacons: _Shares = []
    forced: _Hex = ""
    forced_beacons: _Shares = []
    profiles: Annotated[list[_Hex], msgspec.Meta(max_length=params.PROFILES_KEPT_MAX)] = []
    stakes: _Few = []


@dataclass
class DealReport:
    """One deal as its evidence leaves it. Segments are numbered from 0, the last exclusive; amounts in micro-credits.

    verified: a right verdict covers every drawn segment and no majority contradicts it. checked: the segments that
    right verdicts re-executed. closed: "settled", "claimed", "slashed" or "open". counted: the job was built on it.
    earned_micro: what its receipts come to. pool_micro: of what the solver was paid, the pool's. disputes: what
    notaries found, a sentence each. faults: checkers whose right verdict that refutes. unjudged: accusations without a
    finding of notaries. ordered: the segment in whose receipt an error was ordered, or None; the end is then that of
    the work without it, if a checker ran that, else it lies before it. tolerance: how a tolerant deal was judged, a
    sentence.
    """

    number: int
    id: bytes
    sequence: int
    submitter: bytes
    solver: bytes
    first_segment: int
    end_segment: int
    base_root: bytes
    end_root: bytes
    operations: int
    lock_micro: int
    verified: bool = False
    counted: bool = False
    drawn: tuple[int, ...] = ()
    checked: tuple[int, ...] = ()
    checkers: tuple[bytes, ...] = ()
    closed: str = "open"
    paid_micro: int = 0
    fees_micro: int = 0
    pool_micro: int = 0
    earned_micro: int = 0
    disputes: tuple[str, ...] = ()
    faults: tuple[bytes, ...] = ()
    unjudged: int = 0
    ordered: int | None = None
    tolerance: tuple[str, ...] = ()
    credit: bool = False  # it owes, and no channel paid


@dataclass
class Case:
    """One deal while it is checked."""

    number: int
    task: AnyTask
    network: Network
    id: bytes
    agreement: Agreement
    receipts: list[Receipt] = field(default_factory=list)
    last_receipt: bytes = bytes(32)
    proof_id: bytes = b""
    drawn: tuple[int, ...] = ()
    verdicts: list[Verdict] = field(default_factory=list)
    disputes: tuple[Judged, ...] = ()
    forced: Forced | None = None
    forced_id: bytes = b""
    tolerance: Tolerance | None = None
    profilers: tuple[bytes, ...] = ()
    stakes: dict[bytes, int] = field(default_factory=dict)  # micro-credits, of the network file and of moves

    def __post_init__(self) -> None:
        self.stakes = {peer_key(deposit.peer): deposit.stake_micro for deposit in self.network.deposits}

    @property
    def spoiled(self) -> frozenset[int]:
        """The segments whose receipts an ordered error makes wrong: its own, and the next, which starts from it."""
        end = self.agreement.first_segment + len(self.receipts)
        return frozenset(range(self.forced.segment, end)[:2]) if self.forced else frozenset()

    @property
    def earned_micro(self) -> int:
        return sum(receipt.amount_micro for receipt in self.receipts)

    @property
    def parties(self) -> frozenset[bytes]:
        return frozenset((self.agreement.submitter, self.agreement.solver))

    def operations_of(self, segments: tuple[int, ...]) -> int:
        return sum(len(self.task.steps_of(s)) for s in segments) * self.task.operations_per_step

    def refuse(self, check: str, what: str, *, why: str = "") -> Refused:
        return Refused(check, f"deal {self.number}: {what}", why=why)


def unhex(text: str, what: str) -> bytes:
    """Bytes from hex. Raises Refused."""
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise Refused("format", f"the {what} is not hex: {error}") from None


def open_as(text: str, kind: type[_T], noun: str, number: int, network: Network) -> tuple[_T, bytes, frozenset[bytes]]:
    """An envelope as a record of `kind`. Raises Refused named "<noun>-record"."""
    try:
        record, record_id, signers = open_record(unhex(text, noun), network=network.id)
    except RemoteProtocolError as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{noun}-record", f"deal {number}: {noun}: {error.what}", why=error.why) from None
    if not isinstance(record, kind):
        raise Refused(f"{noun}-record", f"deal {number}: a {type(record).__name__.lower()} where the {noun} belongs")
    return record, record_id, signers


def check_verdict(case: Case, verdict: Verdict) -> None:
    """A verdict on this proof, or on the work without an ordered error, by a staked stranger; if not right, on a root
    its receipt really claims. Raises Refused."""
    corrected = case.forced if case.forced is not None and verdict.proof == case.forced_id else None
    if verdict.agreement != case.id or (corrected is None and verdict.proof != case.proof_id):
        raise case.refuse("verdict", "a verdict on another deal or proof")
    if len(set(verdict.segments)) != len(verdict.segments):
        raise case.refuse("verdict", "a verdict names one segment twice")
    if verdict.checker in case.parties:
        raise case.refuse("verdict-checker", "a party of the deal judged it")
    if case.stakes.get(verdict.checker, 0) < case.network.rules.checker_stake_min_micro:
        raise case.refuse("verdict-stake", f"checker {short(verdict.checker)} is not shown to have a stake")
    if verdict.finding != "right":
        place = verdict.wrong_segment - case.agreement.first_segment
        if verdict.wrong_segment not in verdict.segments or not 0 <= place < len(case.receipts):
            raise case.refuse(
                "verdict", f"segment {verdict.wrong_segment} was found {verdict.finding} without being checked"
            )
        claimed = case.receipts[place].out_root
        if corrected is not None and verdict.wrong_segment == corrected.segment:
            claimed = corrected.true_root
        if verdict.claimed_root != claimed or verdict.found_root == verdict.claimed_root:
            raise case.refuse("verdict-root", "a verdict doubts another root than its receipt claims")
