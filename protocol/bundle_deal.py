"""One deal of a bundle: every signature, link, seed, draw, verdict and amount of it, checked without any peer.

What it cannot know is said by its caller: whether other checkers were connected when these were drawn, and what the
segments nobody re-executed would have given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import msgspec

from protocol import params
from protocol.errors import RemoteProtocolError, VerificationFailed
from protocol.keys import peer_key, short
from protocol.merkle import merkle_root
from protocol.network import Network
from protocol.records import (
    Agreement,
    Claim,
    Proof,
    Receipt,
    Record,
    Reveal,
    Settlement,
    Slash,
    Verdict,
    Voucher,
    amount_for,
    open_record,
)
from protocol.sampling import check_reveal, randomness, select_segments
from protocol.script import AnyTask, ScriptSpec

__all__ = ["Deal", "DealReport", "Refused", "check_deal", "unhex"]

_Hex = Annotated[str, msgspec.Meta(max_length=2 * params.GOSSIP_RECORD_BYTES_MAX, pattern="^[0-9a-f]*$")]
_Few = Annotated[list[_Hex], msgspec.Meta(max_length=params.BUNDLE_DEAL_RECORDS_MAX)]
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
    """The envelopes of one deal, in hex; empty where the deal did not get so far."""

    agreement: _Hex
    receipts: Annotated[list[_Hex], msgspec.Meta(max_length=params.TASK_SEGMENTS_MAX)]
    voucher: _Hex
    proof: _Hex
    reveals: Annotated[list[_Hex], msgspec.Meta(max_length=2)]
    verdicts: _Few
    closing: _Few


@dataclass
class DealReport:
    """One deal as its evidence leaves it. Segments are numbered from 0, the last exclusive; amounts in micro-credits.

    verified: a right verdict covers every drawn segment and no majority contradicts it. checked: the segments that
    right verdicts re-executed. closed: "settled", "claimed", "slashed" or "open". counted: the job was built on it.
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


@dataclass
class _Case:
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


def check_deal(deal: Deal, *, number: int, task: AnyTask, task_id: bytes, network: Network) -> DealReport:
    """Check all evidence of one deal. Raises Refused, which names the check."""
    agreement, agreement_id, signers = _open(deal.agreement, Agreement, "agreement", number, network)
    case = _Case(number, task, network, agreement_id, agreement)
    if signers != case.parties or len(signers) != 2:
        raise case.refuse("agreement-signatures", "the agreement is not signed by two parties")
    if isinstance(task, ScriptSpec) and (agreement.check_permille or deal.verdicts):
        raise case.refuse("agreement-checks", "a script was to be re-executed, or judged: nothing of it can be")
    _check_terms(case, task_id)
    _check_receipts(case, deal.receipts)
    _check_voucher(case, deal.voucher)
    if deal.proof:
        _check_proof(case, deal.proof)
        _draw(case, deal.reveals)
        _check_verdicts(case, deal.verdicts)
    elif deal.reveals or deal.verdicts:
        raise case.refuse("proof", "reveals or verdicts without a proof")
    right = [verdict for verdict in case.verdicts if verdict.finding == "right"]
    report = DealReport(
        number=number,
        id=case.id,
        sequence=agreement.sequence,
        submitter=agreement.submitter,
        solver=agreement.solver,
        first_segment=agreement.first_segment,
        end_segment=agreement.first_segment + len(case.receipts),
        base_root=agreement.base_root,
        end_root=case.receipts[-1].out_root if case.receipts else agreement.base_root,
        operations=sum(receipt.operations for receipt in case.receipts),
        lock_micro=agreement.lock_micro,
        verified=_found_right(case),
        drawn=case.drawn,
        checked=tuple(sorted({segment for verdict in right for segment in verdict.segments})),
        checkers=tuple(sorted(verdict.checker for verdict in case.verdicts)),
    )
    _check_closing(case, deal.closing, report)
    if isinstance(task, ScriptSpec):
        # Nobody re-executes a script: that both parties signed for its outputs is all that can be known.
        report.verified = bool(case.receipts and case.proof_id) and report.closed == "settled"
    return report


def _open(text: str, kind: type[_T], noun: str, number: int, network: Network) -> tuple[_T, bytes, frozenset[bytes]]:
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


# --- the work ----------------------------------------------------------------------------------------------
def _check_terms(case: _Case, task_id: bytes) -> None:
    """The agreement is about this task and obeys the rules of the network."""
    agreement, task, rules = case.agreement, case.task, case.network.rules
    if agreement.task != task_id:
        raise case.refuse("agreement-task", "the agreement is about another task")
    first, last = agreement.first_segment, agreement.last_segment
    if not first < last <= task.segments:
        raise case.refuse("agreement-segments", f"segments {first} to {last} of a task of {task.segments}")
    operations = case.operations_of(tuple(range(first, last)))
    if agreement.operations != operations:
        raise case.refuse("agreement-operations", f"{agreement.operations} operations, the task has {operations}")
    price_micro = amount_for(operations, agreement.unit_price)
    if agreement.channel_micro < price_micro:
        raise case.refuse("agreement-channel", f"a channel of {agreement.channel_micro} for work of {price_micro}")
    if isinstance(task, ScriptSpec):
        return  # nothing is re-executed, so no stake is at risk
    if agreement.check_permille < rules.check_permille:
        raise case.refuse(
            "agreement-checks", f"{agreement.check_permille} permille are checked, the rules ask {rules.check_permille}"
        )
    # Rounded down like the offer's: protocol.network.check_incentives makes the rest strict.
    if agreement.lock_micro < price_micro * rules.lock_permille // 1000:
        raise case.refuse("agreement-lock", f"a stake of {agreement.lock_micro} for work of {price_micro}")


def _check_receipts(case: _Case, envelopes: list[str]) -> None:
    """One chain from the base root, each link signed by both parties and priced as agreed."""
    agreement = case.agreement
    if len(envelopes) > agreement.last_segment - agreement.first_segment:
        raise case.refuse("receipt-count", f"{len(envelopes)} receipts for fewer segments")
    root = agreement.base_root
    for index, text in enumerate(envelopes):
        receipt, receipt_id, signers = _open(text, Receipt, "receipt", case.number, case.network)
        segment = agreement.first_segment + index
        if signers != case.parties:
            raise case.refuse("receipt-signatures", f"receipt {index} is not signed by both parties")
        if (receipt.agreement, receipt.sequence, receipt.segment) != (case.id, index, segment):
            raise case.refuse("receipt-order", f"receipt {index} is not that of segment {segment}")
        if (receipt.previous, receipt.in_root) != (case.last_receipt, root):
            raise case.refuse("receipt-chain", f"receipt {index} does not continue the one before it")
        operations = case.operations_of((segment,))
        if isinstance(case.task, ScriptSpec) and 0 < receipt.operations <= operations:
            operations = receipt.operations  # a script is charged for the time it took, within what was agreed
        if receipt.operations != operations:
            raise case.refuse(
                "receipt-operations", f"receipt {index} claims {receipt.operations} operations, {operations} are due"
            )
        due = amount_for(operations, agreement.unit_price)
        if receipt.amount_micro != due:
            raise case.refuse("receipt-amount", f"receipt {index} takes {receipt.amount_micro}, {due} are due")
        case.receipts.append(receipt)
        case.last_receipt, root = receipt_id, receipt.out_root


def _check_voucher(case: _Case, text: str) -> None:
    """The last voucher promises exactly the receipts."""
    if not text and not case.receipts:
        return
    if not text or not case.receipts:
        raise case.refuse("voucher", f"{len(case.receipts)} receipts and {'a' if text else 'no'} voucher")
    voucher, _, _ = _open(text, Voucher, "voucher", case.number, case.network)
    if (voucher.submitter, voucher.agreement) != (case.agreement.submitter, case.id):
        raise case.refuse("voucher", "the voucher is not the submitter's on this channel")
    if (voucher.receipt, voucher.sequence) != (case.last_receipt, len(case.receipts) - 1):
        raise case.refuse("voucher", "the voucher is not that of the last receipt")
    operations = sum(receipt.operations for receipt in case.receipts)
    if (voucher.cumulative_micro, voucher.cumulative_operations) != (case.earned_micro, operations):
        raise case.refuse(
            "voucher-amount", f"the voucher promises {voucher.cumulative_micro}, the receipts {case.earned_micro}"
        )


# --- the proof and its checks ------------------------------------------------------------------------------
def _check_proof(case: _Case, text: str) -> None:
    proof, case.proof_id, _ = _open(text, Proof, "proof", case.number, case.network)
    if proof.agreement != case.id or proof.author not in case.parties:
        raise case.refuse("proof", "the proof is of another deal, or by a stranger")
    if not case.receipts or (proof.receipts, proof.last_receipt) != (len(case.receipts), case.last_receipt):
        raise case.refuse("proof", f"the proof is over {proof.receipts} receipts, not these {len(case.receipts)}")
    if proof.root != merkle_root([receipt.out_root for receipt in case.receipts]):
        raise case.refuse("proof-root", "the proof's root is not over the receipts' roots")
    if proof.program != case.task.program:
        raise case.refuse("proof", "the proof is of another program")


def _draw(case: _Case, envelopes: list[str]) -> None:
    """The segments that both seeds and the proof decide. Without the submitter's seed nothing was drawn."""
    agreement = case.agreement
    committed = {
        agreement.submitter: agreement.submitter_commitment,
        agreement.solver: agreement.solver_commitment,
    }
    seeds: dict[bytes, bytes] = {}
    for text in envelopes:
        reveal, _, _ = _open(text, Reveal, "reveal", case.number, case.network)
        if (reveal.agreement, reveal.proof) != (case.id, case.proof_id):
            raise case.refuse("reveal", "a reveal of another deal or proof")
        if reveal.author not in committed or reveal.author in seeds:
            raise case.refuse("reveal", "a reveal by a stranger, or two by one party")
        try:
            check_reveal(reveal.seed, committed[reveal.author], agreement_salt=reveal.author)
        except VerificationFailed as error:
            raise case.refuse("reveal-commitment", error.what, why=error.why) from None
        seeds[reveal.author] = reveal.seed
    if agreement.submitter not in seeds or not agreement.check_permille:
        return
    case.drawn = select_segments(
        # A solver that did not reveal forfeits its say: its seed is empty (DESIGN §5.5).
        randomness(
            proof=case.proof_id,
            submitter_seed=seeds[agreement.submitter],
            solver_seed=seeds.get(agreement.solver, b""),
        ),
        first=agreement.first_segment,
        last=agreement.first_segment + len(case.receipts),
        permille=agreement.check_permille,
        minimum=case.network.rules.check_segments_min,
    )


def _check_verdicts(case: _Case, envelopes: list[str]) -> None:
    for text in envelopes:
        verdict, _, _ = _open(text, Verdict, "verdict", case.number, case.network)
        _check_verdict(case, verdict)
        if not set(verdict.segments) <= set(case.drawn):
            raise case.refuse("draw", f"segments {list(verdict.segments)} were checked, {list(case.drawn)} were drawn")
        place = (verdict.checker, verdict.role, verdict.segments)
        if any(place == (other.checker, other.role, other.segments) for other in case.verdicts):
            raise case.refuse("verdict-checker", f"two verdicts of {short(verdict.checker)} on the same segments")
        case.verdicts.append(verdict)


def _check_verdict(case: _Case, verdict: Verdict) -> None:
    """A verdict on this proof by a staked stranger; if wrong, on a root its receipt really claims."""
    if (verdict.agreement, verdict.proof) != (case.id, case.proof_id):
        raise case.refuse("verdict", "a verdict on another deal or proof")
    if len(set(verdict.segments)) != len(verdict.segments):
        raise case.refuse("verdict", "a verdict names one segment twice")
    if verdict.checker in case.parties:
        raise case.refuse("verdict-checker", "a party of the deal judged it")
    # Stake comes from the network file alone, so a checker without a deposit there never had any.
    stakes = {peer_key(d.peer): d.stake_micro for d in case.network.deposits}
    if stakes.get(verdict.checker, 0) < case.network.rules.checker_stake_min_micro:
        raise case.refuse("verdict-stake", f"checker {short(verdict.checker)} has no stake in this network")
    if verdict.finding == "wrong":
        place = verdict.wrong_segment - case.agreement.first_segment
        if verdict.wrong_segment not in verdict.segments or not 0 <= place < len(case.receipts):
            raise case.refuse("verdict", f"segment {verdict.wrong_segment} was found wrong without being checked")
        if verdict.claimed_root != case.receipts[place].out_root or verdict.found_root == verdict.claimed_root:
            raise case.refuse("verdict-root", "a wrong verdict contradicts another root than its receipt claims")


def _found_right(case: _Case) -> bool:
    """Whether the deal's work counts as right, by the rule of peer/checking.py.

    One right verdict covers all that was drawn; or fewer than a quorum found a segment wrong, and a quorum of
    others cleared that segment.
    """
    quorum = case.network.rules.wrong_quorum
    accusers = {v.checker for v in case.verdicts if v.finding == "wrong"}
    if not accusers:
        return any(v.finding == "right" and v.segments == case.drawn for v in case.verdicts)
    refuted = set()
    for accusation in (v for v in case.verdicts if v.finding == "wrong"):
        clearing = {v.checker for v in case.verdicts if v.finding == "right" and accusation.wrong_segment in v.segments}
        if len(clearing) >= quorum:
            refuted.add(accusation.checker)
    return len(accusers) < quorum and refuted == accusers


# --- the money ---------------------------------------------------------------------------------------------
def _check_closing(case: _Case, envelopes: list[str], report: DealReport) -> None:
    """How the channel closed: a slash beats a settlement, a settlement beats claims.

    Which came first leaves no trace, but work that a quorum found wrong is never counted as right.
    """
    claims: list[Claim] = []
    slashed = False
    for text in envelopes:
        record, _, signers = _open(text, Settlement | Claim | Slash, "closing", case.number, case.network)  # type: ignore[arg-type]
        if record.agreement != case.id:
            raise case.refuse("closing", "a closing of another deal")
        if isinstance(record, Claim):
            claims.append(record)
            continue
        if isinstance(record, Slash):
            _check_slash(case, record)
            slashed = True
            continue
        if signers != case.parties:
            raise case.refuse("settlement-signatures", "the settlement is not signed by both parties")
        _check_settlement(case, record)
        report.closed, report.paid_micro = "settled", record.paid_micro
        report.fees_micro = sum(micro for _, micro in record.fees)
    _check_claims(case, claims, report)
    if slashed:
        report.closed, report.verified, report.checked = "slashed", False, ()
        report.paid_micro = report.fees_micro = 0


def _check_settlement(case: _Case, record: Settlement) -> None:
    agreement = case.agreement
    if (record.submitter, record.solver) != (agreement.submitter, agreement.solver):
        raise case.refuse("settlement", "a settlement of other parties")
    if record.proof != case.proof_id:
        raise case.refuse("settlement", "a settlement of another proof")
    if record.paid_micro != case.earned_micro:
        raise case.refuse(
            "settlement-amount", f"{record.paid_micro} micro-credits are paid, the receipts say {case.earned_micro}"
        )
    _check_fees(case, record.fees, record.paid_micro)


def _check_fees(case: _Case, fees: tuple[tuple[bytes, int], ...], paid_micro: int) -> None:
    """Each checker gets its work at the deal's price, as far as the channel reaches."""
    price = case.agreement.unit_price
    due: dict[bytes, int] = {}
    for v in case.verdicts:
        fee = amount_for(min(v.operations, case.operations_of(v.segments)), price)
        due[v.checker] = due.get(v.checker, 0) + fee
    given = dict(fees)
    left = case.agreement.channel_micro - paid_micro
    if len(given) != len(fees) or not set(given) <= set(due):
        raise case.refuse("settlement-fees", "a fee for a peer that gave no verdict, or two for one")
    enough = sum(due.values()) <= left
    if sum(given.values()) > left or any(micro > due[peer] for peer, micro in given.items()):
        raise case.refuse("settlement-fees", f"fees of {sum(given.values())}, {sum(due.values())} are due")
    if enough and given != due:
        raise case.refuse("settlement-fees", "a checker is paid less than its work at the agreed price")


def _check_claims(case: _Case, claims: list[Claim], report: DealReport) -> None:
    """One-sided closings: the best voucher among them is paid."""
    best = 0
    fees: tuple[tuple[bytes, int], ...] = ()
    for claim in claims:
        if claim.author not in case.parties:
            raise case.refuse("claim", "a claim by a stranger")
        if claim.author == case.agreement.solver and claim.fees:
            raise case.refuse("claim", "a solver cannot give away the submitter's channel")
        if claim.voucher:
            voucher, _, _ = _open(claim.voucher.hex(), Voucher, "voucher", case.number, case.network)
            if (voucher.submitter, voucher.agreement) != (case.agreement.submitter, case.id):
                raise case.refuse("claim", "a claim with a voucher of another channel")
            best = max(best, voucher.cumulative_micro)
        if claim.fees:
            _check_fees(case, claim.fees, case.earned_micro)
            fees = claim.fees
    if best > case.earned_micro:
        raise case.refuse("claim", f"a claim of {best} micro-credits, the receipts say {case.earned_micro}")
    if claims and report.closed == "open":
        report.closed, report.paid_micro, report.fees_micro = "claimed", best, sum(micro for _, micro in fees)


def _check_slash(case: _Case, record: Slash) -> None:
    """A quorum of distinct staked checkers that agree on one wrong segment of this proof."""
    verdicts = []
    for envelope in record.verdicts:
        verdict, _, _ = _open(envelope.hex(), Verdict, "verdict", case.number, case.network)
        _check_verdict(case, verdict)
        if verdict.finding != "wrong":
            raise case.refuse("slash", "a slash rests on wrong verdicts only")
        verdicts.append(verdict)
    if len({v.checker for v in verdicts}) != len(verdicts) or len(verdicts) < case.network.rules.wrong_quorum:
        raise case.refuse("slash", f"{len(verdicts)} verdicts, a slash takes {case.network.rules.wrong_quorum}")
    # They may accuse different segments (each was drawn its own), but not find two roots for one.
    found = {(v.wrong_segment, v.found_root) for v in verdicts}
    if len({segment for segment, _ in found}) != len(found):
        raise case.refuse("slash", "the wrong verdicts do not agree")
