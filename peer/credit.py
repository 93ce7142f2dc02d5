"""Mutual credit: the lines this peer gives and has, its deals on them, and what each acquaintance owes it.

A deal on credit goes the way of every other, with the same receipts, vouchers and settlement; but its agreement, which
binds a credit line, opens no channel, and its end moves a debt between two peers that only these two keep. The settler
hands every record of such a deal over to here, so none can reach the ledger that all share. Sans-IO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from market.credit import left_micro
from market.matching import Refusal
from peer.channel import Channel
from peer.deals import Deal, agreement_of
from peer.desk import Desk
from peer.evidence import claimed_micro
from peer.messages import Records
from protocol import params
from protocol.credit_records import NO_CREDIT, CreditLine, Settled, check_line
from protocol.credits import credits_of
from protocol.errors import InsufficientFunds, LimitExceeded, LocalProtocolError, NotFound, VerificationFailed
from protocol.keys import peer_name, short
from protocol.lifecycle import TERMINAL
from protocol.records import Agreement, Claim, Envelope, Record, Settlement, decode_body, open_record

__all__ = ["Account", "Credit", "Line"]

_DAY_NS: Final = 86_400 * 10**9
Rows = Callable[[str], Iterable[tuple[bytes, bytes]]]


class _DealRow(msgspec.Struct, kw_only=True):
    """A deal on credit in the store. micro: what its submitter owes for it, once it is closed. closing: the record that
    says so: the settlement that both signed, or this peer's own claim. netted: a netting that both signed covers it, so
    no money rests on this row any more; the proof of its job does."""

    agreement: bytes
    closed: Literal["", "settled", "claimed"] = ""
    micro: int = 0
    closed_ns: int = 0
    closing: bytes = b""
    netted: bool = False


@dataclass(frozen=True)
class Line:
    """A credit line and its envelope."""

    id: bytes
    line: CreditLine
    envelope: bytes


class Account(msgspec.Struct, kw_only=True):
    """What another peer and this one owe each other. owed_micro: what the other owes after their last netting, less
    what this peer owes. settled: what came since, by id; kept in rows of its own."""

    sequence: int = 0
    previous: bytes = bytes(32)
    owed_micro: int = 0
    netting: bytes = b""  # the last, with both signatures
    offered: bytes = b""  # the next, signed here and not yet by the other
    offered_covers: list[Settled] = []
    settled: dict[bytes, Settled] = {}

    def balance_micro(self, other: bytes) -> int:
        """What the other owes, less what this peer owes."""
        return self.owed_micro + sum(s.micro if s.debtor == other else -s.micro for s in self.settled.values())


@dataclass
class Credit:
    """See the module docstring. `opened` and `closed` are the settler's ears; `deals` are the tables of both roles."""

    desk: Desk
    opened: Callable[[bytes], None]
    closed: Callable[[bytes, str], None]
    deals: tuple[Mapping[bytes, Deal], ...] = ()
    given: dict[bytes, Line] = field(default_factory=dict)  # by debtor
    got: dict[bytes, Line] = field(default_factory=dict)  # by creditor
    channels: dict[bytes, Channel] = field(default_factory=dict)  # of all deals on credit
    rows: dict[bytes, _DealRow] = field(default_factory=dict)
    accounts: dict[bytes, Account] = field(default_factory=dict)
    told: dict[bytes, tuple[int, bytes, int]] = field(default_factory=dict)  # debtor -> met, line, again at

    # --- lines ---------------------------------------------------------------------------------------------
    def give(self, debtor: bytes, limit_micro: int, *, days: int) -> Line:
        """Sign a line, which replaces the one before it; 0 closes it for new work. Raises VerificationFailed."""
        old, now = self.given.get(debtor), self.desk.wall_ns
        line = CreditLine(
            network=self.desk.network.id,
            creditor=self.desk.me,
            debtor=debtor,
            sequence=max(self.desk.now_ns, old.line.sequence + 1 if old else 0),  # grows across restarts with the clock
            limit_micro=limit_micro,
            created_ns=now,
            expires_ns=now + days * _DAY_NS,
        )
        check_line(line)
        envelope = self.desk.seal(line)
        self._keep(Line(open_record(envelope, network=self.desk.network.id)[1], line, envelope))
        self._tell(debtor)
        return self.given[debtor]

    def _on_line(self, line: CreditLine, line_id: bytes, envelope: bytes) -> bool:
        """A line from its creditor, or one of our own that an older store forgot. True if it is news."""
        check_line(line)
        if self.desk.me not in (line.creditor, line.debtor):
            raise VerificationFailed("a credit line between two others")
        if line.created_ns > self.desk.wall_ns + params.CLOCK_SKEW_NS_MAX:
            raise VerificationFailed("a credit line from the future")
        known = (self.given if line.creditor == self.desk.me else self.got).get(_other(line, self.desk.me))
        if known is not None and known.id == line_id:
            return False
        if known is not None and known.line.sequence == line.sequence:
            raise VerificationFailed("two credit lines of one number", why="their creditor says one thing and another")
        if line.expires_ns <= self.desk.wall_ns or (known is not None and known.line.sequence > line.sequence):
            raise LocalProtocolError("a credit line that ran out, or that a newer one replaced")
        self._keep(Line(line_id, line, envelope))
        if line.debtor == self.desk.me:
            self.desk.emit("credit-line", peer=line.creditor, limit_micro=line.limit_micro, expires_ns=line.expires_ns)
        return True

    def _keep(self, line: Line) -> None:
        table = self.given if line.line.creditor == self.desk.me else self.got
        other = _other(line.line, self.desk.me)
        for peer in [p for p, old in table.items() if old.line.expires_ns <= self.desk.wall_ns]:
            del table[peer]
            self.desk.save("credit-lines", _line_key(table is self.given, peer), None)
        if other not in table and len(table) >= params.CREDIT_LINES_MAX:
            raise LimitExceeded(f"{params.CREDIT_LINES_MAX} credit lines stand", next_step="ichiba credit revoke PEER")
        table[other] = line
        self.desk.save("credit-lines", _line_key(table is self.given, other), line.envelope)

    def _tell(self, debtor: bytes) -> None:
        line = self.given[debtor]
        self.told[debtor] = (self.desk.peers.get(debtor, 0), line.id, self.desk.now_ns + params.CREDIT_REPEAT_NS)
        self.desk.send(debtor, Records((line.envelope,)))

    def tick(self) -> None:
        """Tell each connected debtor its line: when it comes, when the line changes, and now and then."""
        for debtor, line in self.given.items():
            met = self.desk.peers.get(debtor)
            told = self.told.get(debtor, (0, b"", 0))
            alive = line.line.expires_ns > self.desk.wall_ns
            if met is not None and alive and (told[:2] != (met, line.id) or self.desk.now_ns >= told[2]):
                self._tell(debtor)

    # --- what is left of a line ----------------------------------------------------------------------------
    def line(self, *, creditor: bytes, debtor: bytes) -> Line | None:
        """The live line of a pair that this peer is one of, open for new work."""
        line = self.given.get(debtor) if creditor == self.desk.me else self.got.get(creditor)
        if line is None or not line.line.limit_micro or line.line.expires_ns <= self.desk.wall_ns:
            return None
        return line

    def left_micro(self, *, creditor: bytes, debtor: bytes) -> int:
        """What the debtor may still run up with the creditor; one of them is this peer."""
        line = self.line(creditor=creditor, debtor=debtor)
        if line is None:
            return 0
        other = debtor if creditor == self.desk.me else creditor
        balance = self.balance_micro(other)
        return left_micro(
            limit_micro=line.line.limit_micro,
            owed_micro=balance if debtor == other else -balance,
            open_micro=self.open_micro(creditor=creditor, debtor=debtor),
        )

    def open_micro(self, *, creditor: bytes, debtor: bytes) -> int:
        """What the deals on credit of this direction can still come to, from their proposals on."""
        total = 0
        for deal in (deal for table in self.deals for deal in table.values() if deal.lifecycle not in TERMINAL):
            if deal.id in self.rows and self.rows[deal.id].closed:
                continue  # it is in the balance
            agreement = agreement_of(deal, self.desk.network.id)
            if agreement.credit != NO_CREDIT and (agreement.solver, agreement.submitter) == (creditor, debtor):
                total += agreement.promise_micro
        return total

    def balance_micro(self, other: bytes) -> int:
        """What `other` owes this peer, less what this peer owes it."""
        account = self.accounts.get(other)
        return account.balance_micro(other) if account is not None else 0

    def to_spend(self) -> dict[bytes, int]:
        """What each creditor still lets this peer run up, where that is anything."""
        left = {peer: self.left_micro(creditor=peer, debtor=self.desk.me) for peer in sorted(self.got)}
        return {peer: micro for peer, micro in left.items() if micro}

    def require(self, need_micro: int) -> None:
        """A job that can cost `need_micro` is to be done on credit. Raises InsufficientFunds where no line reaches."""
        left = self.to_spend()
        if max(left.values(), default=0) < need_micro:
            raise InsufficientFunds(
                f"the job can cost {credits_of(need_micro)} credits, and {self.words()}",
                why="a job on credit is done by one solver that gives this peer a line",
                next_step="lower the price limit, or ask an acquaintance for `ichiba credit give`",
            )

    def words(self) -> str:
        """The lines this peer has, for people."""
        left = self.to_spend()
        if not left:
            return "no solver gives this peer credit"
        solvers = f"{len(left)} solver{'' if len(left) == 1 else 's'}"
        return f"credit lines: {solvers}, {credits_of(max(left.values()))} credits left at most with one"

    def refuse(self, agreement: Agreement) -> Refusal | None:
        """Why this peer, the solver, does not work on this agreement on credit, or None."""
        terms = (agreement.channel_micro, agreement.lock_micro, agreement.check_permille)
        if terms != (0, 0, 0):
            return Refusal("terms", "a deal on credit has no channel, no lock and no paid check")
        line = self.line(creditor=self.desk.me, debtor=agreement.submitter)
        if line is None or line.id != agreement.credit:
            return Refusal("credit", "the deal is on no credit line of this peer that stands")
        if sum(len(a.settled) for a in self.accounts.values()) >= params.CREDIT_DEALS_MAX:
            return Refusal("credit", f"{params.CREDIT_DEALS_MAX} deals on credit wait for a netting")
        left = self.left_micro(creditor=self.desk.me, debtor=agreement.submitter)
        if agreement.promise_micro > left:
            need = credits_of(agreement.promise_micro)
            return Refusal("credit", f"the deal can come to {need} credits, {credits_of(left)} of the line are left")
        return None

    # --- the records of deals on credit ----------------------------------------------------------------------
    def takes(self, record: Record) -> bool:
        """Whether a record is this module's, and no ledger's."""
        match record:
            case CreditLine():
                return True
            case Agreement(credit=line):
                return line != NO_CREDIT
            case Settlement(agreement=deal) | Claim(agreement=deal):
                return deal in self.rows
        return False

    def accept(self, record: Record, record_id: bytes, signers: frozenset[bytes], envelope: bytes) -> bool:
        """Verify, journal and apply such a record. True if it is news. Raises RemoteProtocolError for what can never
        be right, LocalProtocolError for what was replaced."""
        match record:
            case CreditLine():
                return self._on_line(record, record_id, envelope)
            case Agreement():
                return self._open(record, record_id, signers, envelope)
            case Settlement():
                return self._settle(record, signers, envelope)
            case Claim():
                return self._claim(record, envelope)
        raise AssertionError(type(record))

    def _open(self, agreement: Agreement, deal_id: bytes, signers: frozenset[bytes], envelope: bytes) -> bool:
        if self.desk.me not in (agreement.submitter, agreement.solver):
            raise VerificationFailed("a deal on credit between two others")
        if signers != {agreement.submitter, agreement.solver}:
            raise VerificationFailed("a deal on credit without both signatures")
        if agreement.channel_micro or agreement.lock_micro or agreement.check_permille:
            raise VerificationFailed("a deal on credit has no channel, no lock and no paid check")
        if deal_id in self.rows:
            return False
        if not any(deal_id in table for table in self.deals):
            raise LocalProtocolError("a deal on credit that this peer has not signed since its store was restored")
        self._save(deal_id, _DealRow(agreement=envelope))
        self.channels[deal_id] = Channel(agreement, locked=False)
        self.opened(deal_id)
        return True

    def _settle(self, record: Settlement, signers: frozenset[bytes], envelope: bytes) -> bool:
        agreement = self.channels[record.agreement].agreement
        parties = (agreement.submitter, agreement.solver)
        if (record.submitter, record.solver) != parties or signers != set(parties):
            raise VerificationFailed("a settlement of a deal on credit takes the signatures of its two parties")
        if record.fees or record.paid_micro > agreement.promise_micro:
            raise VerificationFailed("a settlement on credit owes more than was agreed, or fees to others")
        return self._close(record.agreement, "settled", record.paid_micro, envelope)

    def _claim(self, record: Claim, envelope: bytes) -> bool:
        """This peer closes its own side, the other being silent: what its last voucher says is owed."""
        agreement = self.channels[record.agreement].agreement
        if record.author != self.desk.me:
            raise VerificationFailed("a claim on a deal on credit closes its author's books, not another's")
        worth = claimed_micro(record, agreement, self.desk.network.id)
        return self._close(record.agreement, "claimed", worth, envelope)

    def _close(self, deal_id: bytes, how: Literal["settled", "claimed"], micro: int, closing: bytes) -> bool:
        row, channel = self.rows[deal_id], self.channels[deal_id]
        if row.closed:
            return False
        row.closed, row.micro, row.closed_ns, row.closing = how, micro, self.desk.now_ns, closing
        self._count(deal_id, row, channel)
        self._save(deal_id, row)
        self.closed(deal_id, how)
        return True

    def _count(self, deal_id: bytes, row: _DealRow, channel: Channel) -> None:
        """A closed deal, in the books."""
        channel.closed, channel.paid_micro, channel.closed_ns = row.closed, row.micro, row.closed_ns
        agreement = channel.agreement
        debtor, creditor = agreement.submitter, agreement.solver
        if row.micro and not row.netted:
            account = self.account(creditor if debtor == self.desk.me else debtor)
            account.settled[deal_id] = Settled(deal_id, debtor, row.micro)

    def _save(self, deal_id: bytes, row: _DealRow) -> None:
        self.rows[deal_id] = row
        self.desk.save("credit-deals", deal_id, msgspec.msgpack.encode(row))

    def evidence(self, deal_id: bytes) -> list[bytes]:
        """What closed a deal on credit, for its proof."""
        row = self.rows.get(deal_id)
        return [row.closing] if row is not None and row.closing else []

    # --- accounts ------------------------------------------------------------------------------------------
    def account(self, other: bytes) -> Account:
        """The account with another peer, new if there was none."""
        return self.accounts.setdefault(other, Account(offered_covers=[], settled={}))

    def save_account(self, other: bytes) -> None:
        """Journal an account; what is settled in it has rows of its own."""
        row = msgspec.structs.replace(self.accounts[other], settled={})
        self.desk.save("credit-accounts", other, msgspec.msgpack.encode(row))

    def forget(self, covered: Iterable[Settled]) -> None:
        """These deals are in a netting that both signed: no money rests on them any more."""
        for one in covered:
            row = self.rows.get(one.id)
            if row is not None:
                row.netted = True
                self._save(one.id, row)

    # --- people --------------------------------------------------------------------------------------------
    def describe(self) -> list[dict[str, object]]:
        """A row for each peer there is a line or an account with, in micro-credits."""
        me, found = self.desk.me, []
        for peer in sorted({*self.given, *self.got, *self.accounts}):
            given, got = self.line(creditor=me, debtor=peer), self.line(creditor=peer, debtor=me)
            account = self.accounts.get(peer, Account())
            found.append(
                {
                    "peer": peer_name(peer),
                    "connected": peer in self.desk.peers,
                    "given_micro": given.line.limit_micro if given else 0,
                    "given_left_micro": self.left_micro(creditor=me, debtor=peer),
                    "given_expires_ns": given.line.expires_ns if given else 0,
                    "got_micro": got.line.limit_micro if got else 0,
                    "got_left_micro": self.left_micro(creditor=peer, debtor=me),
                    "got_expires_ns": got.line.expires_ns if got else 0,
                    "owed_micro": self.balance_micro(peer),
                    "open_given_micro": self.open_micro(creditor=me, debtor=peer),
                    "open_got_micro": self.open_micro(creditor=peer, debtor=me),
                    "nettings": account.sequence,
                    "not_netted": len(account.settled),
                }
            )
        return found

    def find(self, debtor: bytes) -> Line:
        """The line given to `debtor`. Raises NotFound."""
        if debtor not in self.given:
            raise NotFound(f"no credit line to {short(debtor)}", next_step="`ichiba credit ls` shows them")
        return self.given[debtor]

    # --- rows ----------------------------------------------------------------------------------------------
    def restore(self, rows: Rows) -> None:
        """Lines, accounts and deals, as they were journalled. Their signatures were checked when they came."""
        network = self.desk.network.id
        for key, envelope in rows("credit-lines"):
            record, line_id, _ = open_record(envelope, network=network)
            assert isinstance(record, CreditLine)
            (self.given if key[:1] == b"g" else self.got)[key[1:]] = Line(line_id, record, envelope)
        for other, value in rows("credit-accounts"):
            self.accounts[other] = msgspec.msgpack.decode(value, type=Account)
        for deal_id, value in rows("credit-deals"):
            row = self.rows[deal_id] = msgspec.msgpack.decode(value, type=_DealRow)
            agreement = decode_body(msgspec.msgpack.decode(row.agreement, type=Envelope).body, network=network)
            assert isinstance(agreement, Agreement)
            channel = self.channels[deal_id] = Channel(agreement, locked=False)
            if row.closed:
                self._count(deal_id, row, channel)


def _other(line: CreditLine, me: bytes) -> bytes:
    return line.debtor if line.creditor == me else line.creditor


def _line_key(given: bool, other: bytes) -> bytes:
    return (b"g" if given else b"h") + other
