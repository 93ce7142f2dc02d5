"""The life of a deal as one table: (state, event) -> (next state, what must be signed, who is paid).

A deal is one agreement between a submitter and a solver over a range of segments; a job is a chain of deals.
Both parties, the simulator and the documentation read this table (docs/protocol.md draws it). DESIGN §5.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum

from protocol.errors import LocalProtocolError

__all__ = ["TERMINAL", "TRANSITIONS", "Event", "Row", "State", "diagram", "step"]


class State(IntEnum):
    """Stored on disk: numbered from 1, never renumbered."""

    PROPOSED = 1
    DECLINED = 2
    AGREED = 3
    RUNNING = 4
    PROVED = 5
    CHECKING = 6
    SETTLING = 7
    SETTLED = 8
    SLASHED = 9
    CLAIMING = 10
    CLAIMED = 11
    DISPUTED = 12


class Event(Enum):
    """What moves a deal."""

    ACCEPTED = "both signatures are on the agreement, and those of notaries if the network has any"
    REFUSED = "the solver or the notaries declined, or did not answer in time"
    STARTED = "the solver began to run"
    PROOF_COMMITTED = "the solver committed the roots of all its checkpoints"
    SOLVER_LOST = "the solver fell silent, or the job was cancelled, after at least one receipt"
    NOTHING_DONE = "the solver fell silent, or the job was cancelled, before the first receipt"
    SEEDS_KNOWN = "both seeds are revealed, or one is forfeited"
    FOUND_RIGHT = "every drawn checker found the drawn segments right"
    FOUND_WRONG = "a quorum of checkers found one segment wrong"
    COSIGNED = "both parties signed the settlement"
    PARTNER_SILENT = "the other party does not answer; claim alone"
    CHALLENGED = "a staked checker challenges a segment before the notaries"
    RULED_WRONG = "a quorum of notaries found the challenged segment wrong"
    RULED_RIGHT = "a quorum of notaries found the challenged segment right, or its error ordered"
    LAPSED = "the notaries did not come to a quorum in time"
    WINDOW_CLOSED = "the claim window passed without a better voucher or a wrong verdict"


@dataclass(frozen=True)
class Row:
    """One transition: the next state, what is signed, and who is paid by it."""

    next: State
    signed: str = ""
    paid: str = ""


PAID_WRONG = "channel to submitter; lock to challenger, notaries, burned, submitter"

S, E = State, Event
TRANSITIONS: dict[tuple[State, Event], Row] = {
    (S.PROPOSED, E.ACCEPTED): Row(S.AGREED, "agreement, by both", "channel funded, stake locked"),
    (S.PROPOSED, E.REFUSED): Row(S.DECLINED),
    (S.AGREED, E.STARTED): Row(S.RUNNING),
    (S.AGREED, E.NOTHING_DONE): Row(S.CLAIMING, "claim, by the submitter"),
    (S.AGREED, E.PARTNER_SILENT): Row(S.CLAIMING, "claim, by either"),
    (S.RUNNING, E.PROOF_COMMITTED): Row(S.PROVED, "receipts and vouchers, then the proof, by the solver"),
    (S.RUNNING, E.SOLVER_LOST): Row(S.PROVED, "proof over the co-signed receipts, by the submitter"),
    (S.RUNNING, E.NOTHING_DONE): Row(S.CLAIMING, "claim, by the submitter"),
    (S.RUNNING, E.PARTNER_SILENT): Row(S.CLAIMING, "claim with the last voucher, by the solver"),
    (S.PROVED, E.SEEDS_KNOWN): Row(S.CHECKING, "reveals, by each party"),
    (S.PROVED, E.PARTNER_SILENT): Row(S.CLAIMING, "claim with the last voucher, by the solver"),
    (S.CHECKING, E.FOUND_RIGHT): Row(S.SETTLING, "verdict, by each checker"),
    (S.CHECKING, E.FOUND_WRONG): Row(
        S.SLASHED, "wrong verdicts, by a quorum", "channel to submitter; lock to checkers, burned, submitter"
    ),
    (S.CHECKING, E.PARTNER_SILENT): Row(S.CLAIMING, "claim with the last voucher, by the solver"),
    (S.SETTLING, E.COSIGNED): Row(S.SETTLED, "settlement, by both", "solver, checkers, rest to submitter"),
    (S.SETTLING, E.PARTNER_SILENT): Row(S.CLAIMING, "claim, by either"),
    (S.SETTLING, E.FOUND_WRONG): Row(
        S.SLASHED, "wrong verdicts, by a quorum", "channel to submitter; lock to checkers, burned, submitter"
    ),
    (S.CHECKING, E.CHALLENGED): Row(S.DISPUTED, "challenge, by the checker"),
    (S.CHECKING, E.RULED_WRONG): Row(S.SLASHED, "rulings, by a quorum of notaries", PAID_WRONG),
    (S.DISPUTED, E.RULED_WRONG): Row(S.SLASHED, "rulings, by a quorum of notaries", PAID_WRONG),
    (S.DISPUTED, E.RULED_RIGHT): Row(
        S.CHECKING, "rulings, by a quorum of notaries", "challenger's stake to solver, notaries, burned, pool"
    ),
    (S.DISPUTED, E.LAPSED): Row(S.CHECKING),
    (S.DISPUTED, E.COSIGNED): Row(S.SETTLED, "settlement, by both", "solver, checkers, rest to submitter"),
    (S.DISPUTED, E.WINDOW_CLOSED): Row(S.CLAIMED, "claim, by the other party", "solver by the best voucher"),
    (S.SETTLING, E.RULED_WRONG): Row(S.SLASHED, "rulings, by a quorum of notaries", PAID_WRONG),
    (S.CLAIMING, E.RULED_WRONG): Row(S.SLASHED, "rulings, by a quorum of notaries", PAID_WRONG),
    (S.AGREED, E.WINDOW_CLOSED): Row(S.CLAIMED, "claim, by the other party", "solver by the best voucher"),
    (S.RUNNING, E.WINDOW_CLOSED): Row(S.CLAIMED, "claim, by the other party", "solver by the best voucher"),
    (S.PROVED, E.WINDOW_CLOSED): Row(S.CLAIMED, "claim, by the other party", "solver by the best voucher"),
    (S.CHECKING, E.WINDOW_CLOSED): Row(S.CLAIMED, "claim, by the other party", "solver by the best voucher"),
    (S.SETTLING, E.WINDOW_CLOSED): Row(S.CLAIMED, "claim, by the other party", "solver by the best voucher"),
    (S.CLAIMING, E.WINDOW_CLOSED): Row(S.CLAIMED, "", "solver by the best voucher, checkers, rest to submitter"),
    (S.CLAIMING, E.COSIGNED): Row(S.SETTLED, "settlement, by both", "solver, checkers, rest to submitter"),
    (S.CLAIMING, E.FOUND_WRONG): Row(
        S.SLASHED, "wrong verdicts, by a quorum", "channel to submitter; lock to checkers, burned, submitter"
    ),
}
TERMINAL = frozenset((State.DECLINED, State.SETTLED, State.SLASHED, State.CLAIMED))


def step(state: State, event: Event) -> State:
    """The next state. Raises LocalProtocolError for a pair that is no row."""
    try:
        return TRANSITIONS[state, event].next
    except KeyError:
        raise LocalProtocolError(f"{event.name} in state {state.name}") from None


def diagram() -> str:
    """The table as Markdown, for docs/protocol.md."""
    lines = ["| state | event | next | signed | paid |", "| --- | --- | --- | --- | --- |"]
    for (state, event), row in TRANSITIONS.items():
        lines.append(f"| {state.name} | {event.name}: {event.value} | {row.next.name} | {row.signed} | {row.paid} |")
    return "\n".join(lines)
