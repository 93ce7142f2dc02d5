"""The evidence of one job, checked offline: what its signatures, hashes and amounts prove, and what they do not.

A bundle is the proof.json that `ichiba job get` writes: the network file, the task, and for each deal the agreement,
receipts, voucher, proof, reveals, verdicts and closing records, all in hex. `verify_bundle` believes none of it: it
follows the chain of receipts from the first root to the last, draws the segments again, and recomputes every amount.
It asks no peer and runs no step. What was re-executed is what signed verdicts of drawn, staked checkers say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any

import msgspec

from protocol import merkle, params, safetensors
from protocol.bundle_deal import Deal, DealReport, Refused, check_deal, unhex
from protocol.credit_records import ON_CREDIT
from protocol.credits import credits_of
from protocol.errors import IchibaError
from protocol.keys import short
from protocol.money_line import MoneyLine
from protocol.network import Network, load
from protocol.script import ASSURANCE, AnyTask, ScriptSpec, read_task, result_from
from protocol.sealing import masked
from protocol.task import TaskSpec, task_id

__all__ = [
    "SCHEMA",
    "BundleReport",
    "make_bundle",
    "verify_bundle",
    "verify_checkpoint",
    "verify_outputs",
    "verify_weights",
]

SCHEMA = "ichiba.bundle/1"

_Hex32 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Bundle(msgspec.Struct, forbid_unknown_fields=True):
    """proof.json as decoded JSON. `final_root` is empty while the job is not done; `state` maps names to roots."""

    schema: str
    network: Annotated[str, msgspec.Meta(max_length=params.NETWORK_FILE_BYTES_MAX)]
    job: _Hex32
    task: Annotated[str, msgspec.Meta(max_length=2 * params.MESSAGE_BYTES_MAX)]
    final_root: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]
    deals: Annotated[list[Deal], msgspec.Meta(max_length=params.BUNDLE_DEALS_MAX)]
    state: dict[str, _Hex32] = {}


@dataclass(frozen=True)
class BundleReport:
    """What a bundle proves. Operations and micro-credits are integers; segments are numbered from 0.

    complete: every segment of the task is done in deals whose drawn segments were found right. operations_checked:
    of the counted segments that a right verdict re-executed.
    """

    job: bytes
    network: str
    name: str
    task: bytes
    program: bytes
    seeded: bool
    seed: int
    segments: int
    segments_done: int
    complete: bool
    base_root: bytes
    final_root: bytes
    operations: int
    operations_checked: int
    segments_checked: tuple[int, ...]
    deals: tuple[DealReport, ...]
    script: bool = False
    state: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def checked_permille(self) -> int:
        """The share of the counted operations that was re-executed, rounded down."""
        return self.operations_checked * 1000 // self.operations if self.operations else 0

    @property
    def paid_micro(self) -> int:
        """Paid to solvers, over all deals."""
        return sum(deal.paid_micro for deal in self.deals)

    @property
    def fees_micro(self) -> int:
        """Paid to checkers, over all deals, but for what a slashed stake paid them."""
        return sum(deal.fees_micro for deal in self.deals)

    @property
    def money(self) -> MoneyLine:
        """Where the money stands, as the running peer's line says it."""
        closed = [deal for deal in self.deals if deal.closed in ("settled", "claimed") and not deal.credit]
        return MoneyLine(
            sum(deal.earned_micro for deal in self.deals),
            sum(deal.earned_micro for deal in self.deals if deal.verified),
            sum(deal.paid_micro for deal in closed),
            sum(deal.paid_micro - deal.pool_micro for deal in closed),
        )

    def proved(self) -> list[str]:
        """What follows from the evidence, in sentences."""
        counted = [deal for deal in self.deals if deal.counted]
        lines = []
        if counted and self.script:
            lines.append(
                f"one solver ran the script for {self.operations / 1e9:.3f} s by its own clock, and both parties "
                f"signed for outputs of root {self.final_root.hex()[:12]}"
            )
        elif counted:
            solvers = len({deal.solver for deal in counted})
            lines.append(
                f"{self.segments_done} of {self.segments} segments were done by {solvers} solver(s), in one chain of "
                f"co-signed receipts from state {self.base_root.hex()[:12]} to state {self.final_root.hex()[:12]}"
            )
        if not self.script and not all(deal.credit for deal in counted):
            checkers = {peer for deal in counted for peer in deal.checkers}
            percent = f"{self.checked_permille // 10}.{self.checked_permille % 10}"
            lines.append(
                f"{len(self.segments_checked)} of them, {percent} % of the operations, were drawn after the proof "
                f"and re-executed by {len(checkers)} staked checker(s), who found them right"
            )
        lines += [
            f"deal {deal.number}: that segment {deal.ordered} ended wrong was ordered, by notaries and a secret its "
            f"solver was bound to, and is no fraud; {_corrected(deal)}"
            for deal in counted
            if deal.ordered is not None
        ]
        closed = [deal for deal in self.deals if deal.closed in ("settled", "claimed") and not deal.credit]
        paid_micro = sum(deal.paid_micro for deal in closed)
        pool_micro = sum(deal.pool_micro for deal in closed)
        pool = f", {credits_of(pool_micro)} to the pool" if pool_micro else ""
        if closed:
            lines.append(
                f"{len(closed)} channel(s) closed: {credits_of(paid_micro - pool_micro)} credits to solvers{pool} "
                f"and {credits_of(self.fees_micro)} to checkers, as operations and prices say"
            )
        owed_micro = sum(deal.paid_micro for deal in self.deals if deal.credit)
        if owed_micro:
            lines.append(f"{credits_of(owed_micro)} credits are owed for work on credit, as operations and prices say")
        lines += [f"deal {deal.number}: {said}" for deal in self.deals for said in (*deal.tolerance, *deal.disputes)]
        lines += [
            f"deal {deal.number}: checker {short(checker)} signed that it was right, and loses a stake for it"
            for deal in self.deals
            for checker in deal.faults
        ]
        lines += [
            f"deal {deal.number}: its solver's work was found wrong by a quorum and its stake of "
            f"{credits_of(deal.lock_micro)} credits slashed; nothing was built on it"
            for deal in self.deals
            if deal.closed == "slashed" and not deal.disputes
        ]
        return lines

    def not_proved(self, *, origin_known: bool = False) -> list[str]:
        """What the evidence leaves open, in sentences. origin_known: the origin of the first state is proved apart."""
        if self.script:
            return [f"that the outputs are what the script gives ({ASSURANCE})", "how long it really ran"]
        lines = []
        unchecked = self.segments_done - len(self.segments_checked)
        if unchecked:
            word = ON_CREDIT if any(deal.credit for deal in self.deals) else "a solver's stake vouches for them"
            lines.append(f"{unchecked} segment(s) that nobody re-executed: {word}")
        if any(deal.tolerance for deal in self.deals):
            lines += [
                "that the profiles and distances are what those who signed them measured: floats leave nothing to "
                "recompute but by running a segment again",
                f"that no solver steered {self.segments} segments within the threshold, the most that verdicts by "
                "distance leave unseen",
            ]
        undone = sum(len(set(deal.drawn) - set(deal.checked)) for deal in self.deals if deal.counted)
        if undone:
            lines.append(f"{undone} drawn segment(s) that a refuted verdict left unfinished")
        if not self.complete:
            lines.append(f"the job is not finished: {self.segments_done} of {self.segments} segments count")
        if self.seeded and 0 not in self.segments_checked and self.deals:
            lines.append(f"that seed {self.seed} gives state {self.base_root.hex()[:12]}: no checker ran segment 0")
        if not self.seeded and not origin_known and self.deals:
            lines.append(
                f"where state {self.base_root.hex()[:12]} comes from: its submitter brought it; "
                "`ichiba job proof` follows it to the job it is the end of"
            )
        unchecked_micro = sum(deal.paid_micro for deal in self.deals if not deal.verified and deal.closed == "claimed")
        if unchecked_micro:
            lines.append(
                f"that {credits_of(unchecked_micro)} credits bought right work: it was paid without a check, "
                "on a solver's own claim, and nothing was built on it"
            )
        unjudged = sum(deal.unjudged for deal in self.deals if deal.counted)
        if unjudged:
            lines.append(f"{unjudged} checker(s) found a segment wrong, and no finding of notaries on that lies here")
        still_open = sum(deal.closed == "open" for deal in self.deals)
        if still_open:
            lines.append(f"{still_open} channel(s) without a closing record: who was paid is not shown")
        lines.append("that the checkers were the first of those drawn: who else was connected leaves no trace")
        lines.append("that they had their stakes still: what was taken out, the settlement log alone says")
        return lines


def _corrected(deal: DealReport) -> str:
    if deal.ordered is not None and deal.end_segment > deal.ordered:
        return "a checker ran the work as it is without that, and the job was built on it"
    return "the work from there on was done again"


def make_bundle(evidence: Mapping[str, Any], *, network: str, state: Mapping[str, bytes]) -> dict[str, Any]:
    """proof.json from the daemon's `bundle` answer (bytes as hex), the network file's text and the tensor roots."""
    return {
        "schema": SCHEMA,
        "network": network,
        "job": evidence["job"],
        "task": evidence["task"],
        "final_root": evidence["final_root"],
        "deals": list(evidence["deals"]),
        "state": {name: root.hex() for name, root in sorted(state.items())},
    }


def verify_bundle(bundle: Mapping[str, Any], network_id: bytes) -> BundleReport:
    """Check all of a decoded proof.json against the network it must belong to (id, 32 bytes).

    Raises VerificationFailed (a Refused that names the failed check) for anything that does not follow; a bundle
    of a job that is still running, or failed, is no error: `complete` is False.
    """
    try:
        given = msgspec.convert(dict(bundle), _Bundle)
    except (msgspec.ValidationError, RecursionError) as error:
        raise Refused("format", f"not a bundle: {error}"[:300]) from None
    if given.schema != SCHEMA:
        raise Refused("format", f"a bundle of schema {given.schema[:40]!r}, this program reads {SCHEMA}")
    network = _network(given.network, network_id)
    try:
        task = read_task(unhex(given.task, "task"), network=network_id)
    except IchibaError as error:
        raise Refused("task", error.what, why=error.why) from None
    reports, ends = _chain(given.deals, task, network)
    _, last_root, done = ends
    complete = done == task.segments
    if given.final_root and (not complete or bytes.fromhex(given.final_root) != last_root):
        raise Refused(
            "final-root",
            f"the bundle claims final root {given.final_root[:12]}, its deals end at {last_root.hex()[:12]} "
            f"after {done} of {task.segments} segments",
        )
    state = {name: bytes.fromhex(root) for name, root in given.state.items()}
    if state and merkle.state_root_of(state) != last_root:
        raise Refused("state", "the tensor roots do not combine to the final state root")
    return _report(given, network, task, reports, ends, state)


def _network(text: str, network_id: bytes) -> Network:
    try:
        network = load(text)
    except IchibaError as error:
        raise Refused("network", error.what, why=error.why) from None
    if network.id != network_id:
        raise Refused(
            "network",
            f"the bundle is of network {network.name!r} ({network.id.hex()[:12]}), not {network_id.hex()[:12]}",
            next_step="name the network file you trust with --network FILE",
        )
    return network


def _chain(deals: list[Deal], task: AnyTask, network: Network) -> tuple[list[DealReport], tuple[bytes, bytes, int]]:
    """Follow the deals: reports, and (root before segment 0, root after the last counted segment, segments done).

    A deal begins where the one before it ended, if that one's work was found right, or else where it began.
    """
    reports: list[DealReport] = []
    salt = task.salt if isinstance(task, TaskSpec) else b""
    first_root = root = at = b""  # at: the root as an agreement says it, which that of a sealed job masks
    segment = 0
    for number, deal in enumerate(deals):
        report = check_deal(deal, number=number, task=task, task_id=task_id(task), network=network)
        done_nothing = report.end_segment == report.first_segment
        started = report.base_root if salt and done_nothing else masked(salt, report.base_root)
        if not reports:
            first_root, at = report.base_root, started
        elif first_root == at == started:
            first_root = report.base_root  # the deals before it did nothing
        _check_pairs(reports, report)
        ends = [(segment, at)]
        if reports and reports[-1].verified:
            ends.append((reports[-1].end_segment, masked(salt, reports[-1].end_root)))
        if (report.first_segment, started) not in ends:
            raise Refused(
                "deal-chain",
                f"deal {number} starts at segment {report.first_segment} from root {report.base_root.hex()[:12]}, "
                f"the work before it ends at segment {ends[-1][0]} with root {ends[-1][1].hex()[:12]}",
            )
        segment, root, at = report.first_segment, report.base_root, started
        reports.append(report)
    for earlier, later in pairwise(reports):
        earlier.counted = earlier.verified and later.first_segment == earlier.end_segment
    if reports and reports[-1].verified:
        reports[-1].counted = True
        segment, root = reports[-1].end_segment, reports[-1].end_root
    if reports and isinstance(task, ScriptSpec) and first_root != task_id(task):
        raise Refused("base-root", "a script's deal does not start from the script")
    if (
        reports
        and isinstance(task, TaskSpec)
        and task.initial.kind == "state"
        and (first_root not in (task.initial.root, masked(salt, task.initial.root)))
    ):
        raise Refused("base-root", "the first deal does not start from the state the task names")
    return reports, (first_root, root, segment)


def _check_pairs(before: list[DealReport], report: DealReport) -> None:
    """What one deal may not share with another."""
    for other in before:
        if other.submitter != report.submitter:
            raise Refused("parties", "two deals of one job have different submitters")
        if other.id == report.id or other.sequence == report.sequence:
            raise Refused("sequence", "two deals of one sequence number: one balance was reserved twice")


def _report(
    given: _Bundle,
    network: Network,
    task: AnyTask,
    deals: list[DealReport],
    ends: tuple[bytes, bytes, int],
    state: Mapping[str, bytes],
) -> BundleReport:
    first_root, last_root, done = ends
    counted = [deal for deal in deals if deal.counted]
    checked = tuple(sorted({segment for deal in counted for segment in deal.checked}))
    return BundleReport(
        job=bytes.fromhex(given.job),
        network=network.name,
        name=task.name,
        task=task_id(task),
        program=task.program,
        seeded=isinstance(task, TaskSpec) and task.initial.kind == "seed",
        script=isinstance(task, ScriptSpec),
        seed=task.seed,
        segments=task.segments,
        segments_done=done,
        complete=done == task.segments,
        base_root=first_root,
        final_root=last_root,
        operations=sum(deal.operations for deal in counted),
        operations_checked=sum(len(task.steps_of(segment)) for segment in checked) * task.operations_per_step,
        segments_checked=checked,
        deals=tuple(deals),
        state=state,
    )


def verify_checkpoint(report: BundleReport, data: bytes | memoryview) -> None:
    """Raise VerificationFailed unless `data` (safetensors) is the whole state at the end of the proved work."""
    found = merkle.state_root(_tensors(data, "checkpoint"))
    if found != report.final_root:
        raise Refused(
            "checkpoint",
            f"the checkpoint has state root {found.hex()[:12]}, the proved work ends at {report.final_root.hex()[:12]}",
        )


def verify_outputs(report: BundleReport, data: bytes | memoryview) -> int:
    """Raise VerificationFailed unless `data` is the script's result that both parties signed for; its outputs."""
    try:
        result = result_from(data)
    except IchibaError as error:
        raise Refused("outputs", f"the result does not read: {error.what}") from None
    if not report.script or result.root != report.final_root:
        raise Refused("outputs", f"outputs of root {result.root.hex()[:12]}, {report.final_root.hex()[:12]} is proved")
    return len(result.files)


def verify_weights(report: BundleReport, data: bytes | memoryview, *, prefix: str = "") -> int:
    """Raise VerificationFailed unless each tensor of `data` (safetensors) is that of the proved final state.

    prefix: what stands before their names there. Returns how many there are. Needs the tensor roots that the bundle
    carries in `state`.
    """
    noun = "result" if prefix else "weights"
    tensors = _tensors(data, noun)
    for name, array in tensors.items():
        if prefix + name not in report.state:
            raise Refused(noun, f"tensor {name[:80]!r} is not in the proved final state")
        if merkle.tensor_root(array) != report.state[prefix + name]:
            raise Refused(noun, f"tensor {name[:80]!r} is not the proved one")
    return len(tensors)


def _tensors(data: bytes | memoryview, noun: str) -> dict[str, Any]:
    try:
        return safetensors.parse(data)
    except IchibaError as error:
        raise Refused(noun, f"the {noun} file does not read: {error.what}") from None
