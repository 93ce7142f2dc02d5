"""The owner's side of its stake: it signs moves of its credits into it and out of it, and says what becomes of them.

Promises that a move is journalled before anybody hears of it, that its number is used for no other order, and that no
more is moved than is free beside what is promised already. In a network with notaries peer/certificates.py has it
certified, across restarts; without any it counts as soon as it is signed. Sans-IO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from peer.desk import Desk
from peer.receipt_rows import Rows
from peer.settler import Settler
from protocol import params
from protocol.certificate import Bucket
from protocol.codec import Digest, decode
from protocol.credits import credits_of
from protocol.errors import InsufficientFunds, LimitExceeded, LocalProtocolError
from protocol.keys import peer_key
from protocol.records import Envelope, Profile, Slash, StakeMove, Verdict, decode_body, open_record
from protocol.stake_records import unbonding_ns

__all__ = ["Moves", "Moving"]


class _BadMove(LocalProtocolError):
    """The arguments of a move do not fit."""

    code = "usage"
    exit_code = 2


def _who_judged(envelope: bytes, network: bytes) -> set[bytes]:
    record, _, _ = open_record(envelope, network=network)
    match record:
        case Verdict(checker=peer) | Profile(verifier=peer):
            return {peer}
        case Slash(verdicts=verdicts):
            return {peer for one in verdicts for peer in _who_judged(one, network)}
        case _:
            return set()


class Moving(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A row: a move that this peer signed. envelope: with the signatures it has. given_up: no certificate came in time,
    for the reason `code` and `why`; it may stand yet, until `void`: notaries never certify it."""

    id: Digest
    envelope: bytes
    entered_ns: int
    doubt: bool = False
    given_up: bool = False
    void: bool = False
    code: str = ""
    why: str = ""


@dataclass
class Moves:
    """See the module docstring. `certify` asks notaries for a move; `in_doubt_micro` of either bucket may be taken by
    orders whose certificate is under way; `number` is the next of this peer's orders; `reserved_micro` of its free
    credits are kept for jobs, `promised_micro` of its stake for deals."""

    desk: Desk
    settler: Settler
    certify: Callable[[Moving], None]
    in_doubt_micro: Callable[[Bucket], int]
    number: Callable[[], int] = lambda: 0
    reserved_micro: Callable[[], int] = lambda: 0
    promised_micro: Callable[[], int] = lambda: 0
    rows: dict[bytes, Moving] = field(default_factory=dict)

    # --- what people ask -------------------------------------------------------------------------------------
    def stake(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Move free credits into the stake. Raises InsufficientFunds, LimitExceeded, LocalProtocolError."""
        micro = self._amount(arguments)
        free = self.settler.free_micro(self.desk.me)
        kept = self.reserved_micro() + self.in_doubt_micro("free")
        if micro > free - kept:
            raise InsufficientFunds(
                f"{credits_of(micro)} credits are to be staked, {credits_of(max(0, free - kept))} can be",
                why=f"of {credits_of(free)} free credits {credits_of(kept)} are kept for jobs and orders under way"
                if kept
                else "no more are free",
                next_step="stake less, or see `ichiba wallet`",
            )
        return self._sign("add", micro)

    def unstake(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Begin to take credits out of the stake. Raises as `stake` does."""
        micro = self._amount(arguments)
        stake = self.settler.free_stake(self.desk.me)
        kept = self.promised_micro() + self.in_doubt_micro("stake")
        if micro > stake - kept:
            locked = sum(c.agreement.lock_micro for c in self.settler.channels.values() if self._locks(c))
            parts = ((kept, "promised to deals that are being agreed on"), (locked, "locked by deals that run"))
            raise InsufficientFunds(
                f"{credits_of(micro)} credits are to leave the stake, {credits_of(max(0, stake - kept))} can",
                why="; ".join(f"{credits_of(part)} are {words}" for part, words in parts if part),
                next_step="take out less, or wait until the deals end: `ichiba wallet`",
            )
        if self.settler.stakes.crowded(self.desk.me):
            raise LimitExceeded(
                f"{params.UNBONDINGS_OF_OWNER_MAX} withdrawals are under way",
                next_step="wait until one is free: `ichiba wallet` says when",
            )
        return self._sign("withdraw", micro)

    def _locks(self, channel: Any) -> bool:
        return bool(channel.agreement.solver == self.desk.me and channel.locked)

    @staticmethod
    def _amount(arguments: dict[str, Any]) -> int:
        micro = arguments.get("amount_micro")
        if set(arguments) != {"amount_micro"} or type(micro) is not int:
            raise _BadMove("a move takes amount_micro, a whole number", next_step="`ichiba wallet stake 2.5`")
        if not params.STAKE_MOVE_MICRO_MIN <= micro <= params.AMOUNT_MICRO_MAX:
            raise _BadMove(
                f"{credits_of(micro)} credits cannot be moved at once",
                why=f"a move is of {credits_of(params.STAKE_MOVE_MICRO_MIN)} credits at least and of "
                f"{credits_of(params.AMOUNT_MICRO_MAX)} at most",
            )
        return micro

    def _sign(self, kind: Literal["add", "withdraw"], micro: int) -> dict[str, Any]:
        lost = self.settler.stakes.lost[self.desk.me] if kind == "withdraw" else 0
        move = StakeMove(
            network=self.desk.network.id, owner=self.desk.me, sequence=self.number(), kind=kind, amount_micro=micro,
            created_ns=self.desk.wall_ns, lost_micro=lost,
        )  # fmt: skip
        envelope = self.desk.seal(move)
        row = Moving(open_record(envelope, network=move.network)[1], envelope, self.desk.now_ns)
        self._forget()
        self.rows[row.id] = row
        self.save(row)
        if self.desk.network.notaries:
            self.certify(row)
        else:
            self.settler.accept(envelope, publish=True)
        return self.describe(row) | {"window_s": -(-unbonding_ns(self.desk.network) // 10**9)}

    def moving_micro(self) -> int:
        """What of the free credits is on its way into the stake."""
        return self.in_doubt_micro("free")

    # --- what becomes of them --------------------------------------------------------------------------------
    def refused(self, row: Moving, code: str, why: str) -> None:
        """No quorum of notaries certified it in time."""
        row.given_up, row.code, row.why = True, code, why
        self.save(row)
        self.desk.emit("stake-refused", move=row.id, code=code, why=why)

    def folded(self, move_id: bytes) -> None:
        """Settler: a move stands, perhaps one of this peer."""
        if move_id in self.rows:
            move = self.move_of(self.rows[move_id])
            self.desk.emit("stake-moved", move=move_id, direction=move.kind, micro=move.amount_micro)

    def move_of(self, row: Moving) -> StakeMove:
        """The record of a row."""
        body = msgspec.msgpack.decode(row.envelope, type=Envelope).body
        move = decode_body(body, network=self.desk.network.id)
        assert isinstance(move, StakeMove), "it was signed here as one"
        return move

    def describe(self, row: Moving) -> dict[str, Any]:
        """One move in words: `state` is done, waiting, certifying, given-up (it may stand yet), or void."""
        move, state = self.move_of(row), "waiting"
        if row.id in self.settler.log:
            state = "done"
        elif row.void:
            state = "void"
        elif row.given_up:
            state = "given-up"
        elif row.doubt:
            state = "certifying"
        return {
            "move": row.id.hex(),
            "kind": move.kind,
            "amount_micro": move.amount_micro,
            "created_ns": move.created_ns,
            "state": state,
            "code": row.code,
            "why": row.why,
        }

    def wallet(self) -> dict[str, Any]:
        """What a wallet says of it: what unbonds and when it is free, by the machine's clock, and the last moves."""
        ahead_ns = self.desk.wall_off_ns
        unbonding = [
            {"move": move.hex(), "amount_micro": micro, "frees_ns": until_ns + ahead_ns}
            for move, micro, until_ns in self.settler.stakes.withdrawals(self.desk.me)
        ]
        return {
            "unbonding_micro": sum(one["amount_micro"] for one in unbonding),
            "unbonding": unbonding,
            "moves": [self.describe(row) for row in self.rows.values()],
        }

    # --- evidence --------------------------------------------------------------------------------------------
    def evidence(self, envelopes: Iterable[bytes]) -> list[bytes]:
        """The moves that show the stakes behind these verdicts, profiles and slashes, where the network file gives none
        to speak of: the largest first, as many as a file may hold."""
        network = self.desk.network
        given = {peer_key(d.peer): d.stake_micro for d in network.deposits}
        words = {peer for envelope in envelopes for peer in _who_judged(envelope, network.id)}
        lacking = {peer for peer in words if given.get(peer, 0) < network.rules.checker_stake_min_micro}
        if not lacking:
            return []
        found = []
        for envelope in self.settler.log.values():
            move, move_id, _ = open_record(envelope, network=network.id)
            if isinstance(move, StakeMove) and move.kind == "add" and move.owner in lacking:
                found.append((-move.amount_micro, move_id, envelope))
        return [envelope for _, _, envelope in sorted(found)[: params.BUNDLE_DEAL_RECORDS_MAX]]

    # --- the table -------------------------------------------------------------------------------------------
    def save(self, row: Moving) -> None:
        """Journal a row."""
        self.desk.save("moves", row.id, row)

    def _forget(self) -> None:
        """Keep the last moves; what is under way stays. Raises LimitExceeded where all of them are."""
        over = [row for row in self.rows.values() if row.void or row.id in self.settler.log]
        while len(self.rows) >= params.MOVES_KEPT_MAX and over:
            gone = over.pop(0)
            del self.rows[gone.id]
            self.desk.save("moves", gone.id, None)
        if len(self.rows) >= params.MOVES_KEPT_MAX:
            raise LimitExceeded(
                f"{len(self.rows)} moves of stake are under way", next_step="wait: `ichiba wallet` shows them"
            )

    def restore(self, rows: Rows) -> None:
        """The moves that were journalled, in the order they were signed."""
        kept = [decode(Moving, value, bytes_max=params.STORE_VALUE_BYTES_MAX) for _, value in rows("moves")]
        self.rows = {row.id: row for row in sorted(kept, key=lambda row: self.move_of(row).sequence)}
