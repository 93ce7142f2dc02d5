"""Netting: two peers forget the deals whose balance both have signed; a cycle of them clears what each owes the next.

Of a pair only the first signs first, so no two nettings of one number can have both signatures. A clearing is agreed by
the signatures of all its parties; who lacks one asks for it until it comes, and whoever has all of them hands them on,
so in the end each party has lowered its two debts or none has. It moves nobody's position. Sans-IO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from market.credit import find_cycles, netted
from peer.credit import Account, Credit
from peer.credit_messages import ClearingOffer, CreditMessage, DebtsAsk, DebtsTold, NetAsk, NetBack, NetOffer
from peer.desk import Desk
from protocol import params
from protocol.credit_records import (
    Clearing,
    Netting,
    Settled,
    check_clearing,
    check_netting,
    covered_digest,
    pair_of,
)
from protocol.errors import NotFound, VerificationFailed
from protocol.keys import peer_key, peer_name, short
from protocol.records import add_signature, open_record

__all__ = ["Nettings"]

_EAGER_NS: Final = 60 * 10**9  # after its signature a party repeats itself every RESEND_NS, later now and then


class _Pending(msgspec.Struct, kw_only=True):
    """A clearing that this peer signed, in the store for ever: who shows it again must not clear twice. consents: the
    envelopes by party. netted: the neighbours with whom a netting covers it."""

    clearing: bytes
    consents: dict[bytes, bytes]
    signed_ns: int
    applied: bool = False
    netted: list[bytes] = []


@dataclass
class Nettings:
    """See the module docstring. `credit` has the books; `on_open` and `on_close` hear of its deals."""

    desk: Desk
    on_open: Callable[[bytes], None]
    on_close: Callable[[bytes, str], None]
    credit: Credit = field(init=False)
    clearings: dict[bytes, _Pending] = field(default_factory=dict)
    opened: dict[bytes, Clearing] = field(default_factory=dict)
    heard: dict[bytes, tuple[tuple[bytes, bytes, int], ...]] = field(default_factory=dict)  # debts told, by teller
    resend: dict[bytes, int] = field(default_factory=dict)  # clearing, or peer with an offered netting -> next at

    def __post_init__(self) -> None:
        self.credit = Credit(self.desk, self.on_open, self.on_close)

    def message(self, peer: bytes, message: CreditMessage) -> None:
        """One message from a peer. Raises RemoteProtocolError for what is wrong with it."""
        match message:
            case NetAsk():
                self._on_ask(peer, message)
            case NetOffer():
                self._on_offer(peer, message)
            case NetBack():
                self._on_back(peer, message)
            case DebtsAsk():
                if peer in self.credit.accounts:
                    self.desk.send(peer, DebtsTold(self._own_debts()))
            case DebtsTold():
                if peer in self.credit.accounts and all(peer in debt[:2] for debt in message.debts):
                    self.heard[peer] = message.debts
                    self._propose()
            case ClearingOffer():
                self._on_clearing(peer, message)

    # --- a pair --------------------------------------------------------------------------------------------
    def request(self, peer: bytes) -> None:
        """Begin a netting with a peer: tell it what there is."""
        account = self.credit.account(peer)
        if account.offered:
            self._send_offer(peer, account)
        else:
            covers = _first(account.settled.values())
            self.desk.send(peer, NetAsk(account.sequence, account.previous, covers))

    def _on_ask(self, peer: bytes, message: NetAsk) -> None:
        """The first of the pair signs what both have; the second answers with what it has."""
        account = self.credit.accounts.get(peer)
        if account is None:
            return  # nothing was ever done on credit with it
        if message.sequence < account.sequence:
            self.desk.send(peer, NetBack(account.netting))  # the one before never came back to it
        elif account.offered:
            self._send_offer(peer, account)
        elif self.desk.me > peer:
            both = [one for one in message.settled if one.id in account.settled]
            if both and message.sequence == account.sequence:
                mine = (account.settled[one.id] for one in both)
                self.desk.send(peer, NetAsk(account.sequence, account.previous, _first(mine)))
        else:
            self._sign(peer, account, message)

    def _sign(self, peer: bytes, account: Account, message: NetAsk) -> None:
        covers = _first(one for one in message.settled if self._agreed(peer, account, one))
        if not covers or (message.sequence, message.previous) != (account.sequence, account.previous):
            return
        covers = tuple(min(one, account.settled[one.id], key=lambda s: s.micro) for one in covers)
        netting = self._netting(peer, account, covers)
        account.offered, account.offered_covers = self.desk.seal(netting), list(covers)
        self.credit.save_account(peer)
        self._send_offer(peer, account)

    def _netting(self, peer: bytes, account: Account, covers: tuple[Settled, ...]) -> Netting:
        """The netting that follows from what both agree on."""
        first, second = pair_of(self.desk.me, peer)
        after = account.owed_micro + sum(s.micro if s.debtor == peer else -s.micro for s in covers)
        first_owes = after if peer == first else -after
        return Netting(
            network=self.desk.network.id,
            first=first,
            second=second,
            sequence=account.sequence + 1,
            previous=account.previous,
            covered=covered_digest(covers),
            first_owes_micro=max(0, first_owes),
            second_owes_micro=max(0, -first_owes),
            created_ns=self.desk.wall_ns,
        )

    def _agreed(self, peer: bytes, account: Account, theirs: Settled) -> bool:
        """Whether what the other says of a deal is what this peer can sign: a creditor can prove no more than its
        vouchers, and the last may not have reached it, so what it says is right if the debtor says no less."""
        mine = account.settled.get(theirs.id)
        if mine is None or mine.debtor != theirs.debtor:
            return False
        if mine.micro < 0 or theirs.micro < 0:
            return mine == theirs
        return theirs.micro >= mine.micro if mine.debtor == peer else theirs.micro <= mine.micro

    def _send_offer(self, peer: bytes, account: Account) -> None:
        self.resend[peer] = self.desk.now_ns + params.RESEND_NS
        self.desk.send(peer, NetOffer(account.offered, tuple(account.offered_covers)))

    def _on_offer(self, peer: bytes, message: NetOffer) -> None:
        """The first signed: check every figure against our own books, sign too, and forget what it covers."""
        record, netting_id, signers = open_record(message.netting, network=self.desk.network.id)
        if not isinstance(record, Netting) or signers != {peer} or record.first != peer:
            raise VerificationFailed("a netting comes from the first of its pair, with that signature alone")
        account = self.credit.accounts.get(peer)
        if record.second != self.desk.me or account is None:
            raise VerificationFailed("a netting with a peer that has no account here")
        check_netting(record)
        if account.previous == netting_id:
            self.desk.send(peer, NetBack(account.netting))
            return
        if (record.sequence, record.previous) != (account.sequence + 1, account.previous):
            raise VerificationFailed(f"netting {record.sequence} does not follow {account.sequence}")
        if not all(self._agreed(peer, account, one) for one in message.settled) or not message.settled:
            raise VerificationFailed("a netting of deals that stand otherwise in this peer's books")
        wanted = self._netting(peer, account, message.settled)
        if msgspec.structs.replace(wanted, created_ns=record.created_ns) != record:
            raise VerificationFailed("a netting whose balance is not that of its deals")
        both = add_signature(message.netting, self.desk.key, network=self.desk.network.id)
        self._apply(peer, account, record, netting_id, both, message.settled)
        self.desk.send(peer, NetBack(both))

    def _on_back(self, peer: bytes, message: NetBack) -> None:
        """Both signatures are on the netting that this peer, the first, had offered."""
        record, netting_id, signers = open_record(message.netting, network=self.desk.network.id)
        if not isinstance(record, Netting) or signers != {peer, self.desk.me}:
            raise VerificationFailed("a netting comes back with both signatures")
        account = self.credit.accounts.get(peer)
        if account is None or not account.offered:
            return
        if open_record(account.offered, network=self.desk.network.id)[1] == netting_id:
            self._apply(peer, account, record, netting_id, message.netting, tuple(account.offered_covers))

    def _apply(
        self,
        peer: bytes,
        account: Account,
        record: Netting,
        netting_id: bytes,
        envelope: bytes,
        covers: tuple[Settled, ...],
    ) -> None:
        first_owes = record.first_owes_micro - record.second_owes_micro
        account.sequence, account.previous, account.netting = record.sequence, netting_id, envelope
        account.owed_micro = first_owes if peer == record.first else -first_owes
        account.offered, account.offered_covers = b"", []
        for one in covers:
            account.settled.pop(one.id)
            if one.id in self.clearings:
                self.clearings[one.id].netted.append(peer)
                self._save(one.id)
        self.credit.forget(covers)
        self.credit.save_account(peer)
        self.desk.emit("netted", peer=peer, deals=len(covers), owed_micro=account.owed_micro)

    # --- a cycle -------------------------------------------------------------------------------------------
    def _own_debts(self) -> tuple[tuple[bytes, bytes, int], ...]:
        """This peer's debts and claims that no clearing has a hand on."""
        found: list[tuple[bytes, bytes, int]] = []
        for other in sorted(self.credit.accounts):
            balance = self.credit.balance_micro(other)
            debtor, creditor = (other, self.desk.me) if balance > 0 else (self.desk.me, other)
            free = abs(balance) - self._held_micro(debtor, creditor)
            if free > 0:
                found.append((debtor, creditor, free))
        return tuple(found[: params.CREDIT_DEBTS_TOLD_MAX])

    def _held_micro(self, debtor: bytes, creditor: bytes) -> int:
        """What clearings that are signed here and not complete may take off this debt. Not for ever: who never signs
        must not hold its neighbours' debts. If it signs after all, the debt has turned round, and no position moved."""
        edges = (
            self.opened[i].amount_micro
            for i, pending in self.clearings.items()
            if not pending.applied
            and self.desk.now_ns < pending.signed_ns + params.CREDIT_HOLD_NS
            and (debtor, creditor) in _edges(self.opened[i])
        )
        return sum(edges)

    def _propose(self) -> None:
        """Look for cycles in what is known here, and sign those that go through this peer."""
        debts: dict[tuple[bytes, bytes], int] = {}
        for told in (*(self.heard[teller] for teller in sorted(self.heard)), self._own_debts()):
            debts.update({(debtor, creditor): micro for debtor, creditor, micro in told})
        own = {(debtor, creditor) for debtor, creditor, _ in self._own_debts()}
        debts = {edge: m for edge, m in debts.items() if self.desk.me not in edge or edge in own}
        for cycle in find_cycles(netted(debts)):
            if self.desk.me in cycle.parties and self._open_count() < params.CREDIT_CLEARINGS_MAX:
                number = self._number(cycle.parties)
                network, amount = self.desk.network.id, cycle.amount_micro
                self._consent(Clearing(network=network, parties=cycle.parties, amount_micro=amount, number=number))

    def _number(self, parties: tuple[bytes, ...]) -> int:
        """Of the next clearing of these parties."""
        return sum(1 for i, pending in self.clearings.items() if pending.applied and self.opened[i].parties == parties)

    def _open_count(self) -> int:
        return sum(1 for pending in self.clearings.values() if not pending.applied)

    def _consent(self, clearing: Clearing) -> None:
        """Sign a clearing, journal that, and tell the other parties."""
        envelope = self.desk.seal(clearing)
        clearing_id = open_record(envelope, network=self.desk.network.id)[1]
        if clearing_id in self.clearings:
            return
        self.opened[clearing_id] = clearing
        self.clearings[clearing_id] = _Pending(
            clearing=envelope, consents={self.desk.me: envelope}, signed_ns=self.desk.now_ns, netted=[]
        )
        self._save(clearing_id)
        self._tell_all(clearing_id)

    def _tell_all(self, clearing_id: bytes) -> None:
        pending, clearing = self.clearings[clearing_id], self.opened[clearing_id]
        eager = self.desk.now_ns < pending.signed_ns + _EAGER_NS
        self.resend[clearing_id] = self.desk.now_ns + (params.RESEND_NS if eager else params.CREDIT_REPEAT_NS)
        for party in clearing.parties:
            if party != self.desk.me:
                self.desk.send(party, ClearingOffer(tuple(sorted(pending.consents.values()))))

    def _on_clearing(self, peer: bytes, message: ClearingOffer) -> None:
        """Consents of some parties: sign too if both our debts are that large, and apply when all have signed."""
        record, clearing_id, consents = self._opened(message)
        if self.desk.me not in record.parties or peer not in record.parties:
            raise VerificationFailed("consents to a clearing of others")
        if clearing_id not in self.clearings:
            if not self._fits(record):
                self.desk.emit("clearing-refused", peer=peer, clearing=clearing_id, amount_micro=record.amount_micro)
                return
            self._consent(record)
        pending = self.clearings[clearing_id]
        if pending.applied:
            if len(consents) < len(record.parties):  # it lacks what is here
                self.desk.send(peer, ClearingOffer(tuple(sorted(pending.consents.values()))))
            return
        pending.consents |= consents
        if len(pending.consents) == len(record.parties):
            self._clear(clearing_id)
        self._save(clearing_id)

    def _opened(self, message: ClearingOffer) -> tuple[Clearing, bytes, dict[bytes, bytes]]:
        """The one clearing that all the consents are to, its id, and the consents by party."""
        found: tuple[Clearing, bytes] | None = None
        consents: dict[bytes, bytes] = {}
        for envelope in message.consents:
            record, record_id, signers = open_record(envelope, network=self.desk.network.id)
            if not isinstance(record, Clearing) or len(signers) != 1:
                raise VerificationFailed("a clearing is signed by each party in an envelope of its own")
            if found is not None and found[1] != record_id:
                raise VerificationFailed("consents to more than one clearing")
            found = record, record_id
            consents[next(iter(signers))] = envelope
        assert found is not None, "a message has at least one"
        check_clearing(found[0])
        return *found, consents

    def _fits(self, clearing: Clearing) -> bool:
        """Whether this peer's two debts in it are free and as large, and it is the next of its parties."""
        if clearing.number != self._number(clearing.parties):
            return False
        own = {(debtor, creditor): micro for debtor, creditor, micro in self._own_debts()}
        mine = [edge for edge in _edges(clearing) if self.desk.me in edge]
        open_count = self._open_count()
        return open_count < params.CREDIT_CLEARINGS_MAX and all(own.get(e, 0) >= clearing.amount_micro for e in mine)

    def _clear(self, clearing_id: bytes) -> None:
        """All have signed: both debts of this peer fall."""
        clearing, pending = self.opened[clearing_id], self.clearings[clearing_id]
        pending.applied = True
        self._count(clearing_id)
        self.resend.pop(clearing_id, None)
        self.desk.emit("cleared", clearing=clearing_id, amount_micro=clearing.amount_micro, peers=len(clearing.parties))

    def _count(self, clearing_id: bytes) -> None:
        clearing, pending = self.opened[clearing_id], self.clearings[clearing_id]
        for debtor, creditor in _edges(clearing):
            other = creditor if debtor == self.desk.me else debtor
            if self.desk.me in (debtor, creditor) and other not in pending.netted:
                settled = Settled(clearing_id, debtor, -clearing.amount_micro)
                self.credit.account(other).settled[clearing_id] = settled

    def _save(self, clearing_id: bytes) -> None:
        self.desk.save("credit-clearings", clearing_id, msgspec.msgpack.encode(self.clearings[clearing_id]))

    # --- time and rows -------------------------------------------------------------------------------------
    def tick(self) -> None:
        """Repeat what is unanswered."""
        self.credit.tick()
        now = self.desk.now_ns
        for peer, account in self.credit.accounts.items():
            if account.offered and now >= self.resend.get(peer, 0):
                self._send_offer(peer, account)
        for clearing_id, pending in self.clearings.items():
            if not pending.applied and now >= self.resend.get(clearing_id, 0):
                self._tell_all(clearing_id)

    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """The books, and the clearings that were signed."""
        self.credit.restore(rows)
        for clearing_id, value in rows("credit-clearings"):
            pending = self.clearings[clearing_id] = msgspec.msgpack.decode(value, type=_Pending)
            record, _, _ = open_record(pending.clearing, network=self.desk.network.id)
            assert isinstance(record, Clearing)
            self.opened[clearing_id] = record
            if pending.applied:
                self._count(clearing_id)

    # --- people --------------------------------------------------------------------------------------------
    def verbs(self) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        """What a person may ask about credit."""
        return {
            "credit": lambda _: {"accounts": self.credit.describe(), "clearings_open": self._open_count()},
            "credit-give": self._give,
            "credit-revoke": self._revoke,
            "credit-net": self._net,
        }

    def _give(self, arguments: dict[str, Any]) -> dict[str, Any]:
        debtor = peer_key(str(arguments["peer"]))
        line = self.credit.give(debtor, int(arguments["limit_micro"]), days=int(arguments.get("days", 90)))
        return self._told(debtor) | {"line": line.id.hex(), "expires_ns": line.line.expires_ns}

    def _revoke(self, arguments: dict[str, Any]) -> dict[str, Any]:
        debtor = peer_key(str(arguments["peer"]))
        old = self.credit.find(debtor).line
        days = -(-(old.expires_ns - old.created_ns) // (86_400 * 10**9))  # as long as the line that it closes
        line = self.credit.give(debtor, 0, days=days)
        return self._told(debtor) | {"line": line.id.hex(), "expires_ns": line.line.expires_ns}

    def _told(self, debtor: bytes) -> dict[str, Any]:
        owed = max(0, self.credit.balance_micro(debtor))
        return {"peer": peer_name(debtor), "connected": debtor in self.desk.peers, "owed_micro": owed}

    def _net(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Net with one peer; without a name with all, and look for cycles among their debts."""
        name = str(arguments.get("peer", ""))
        if name and peer_key(name) not in self.credit.accounts:
            raise NotFound(f"nothing was done on credit with {short(peer_key(name))}", next_step="ichiba credit ls")
        peers = [peer_key(name)] if name else sorted(self.credit.accounts)
        asked = [peer for peer in peers if peer in self.desk.peers]
        for peer in asked:
            self.request(peer)
            if not name:
                self.desk.send(peer, DebtsAsk())
        away = [peer_name(peer) for peer in peers if peer not in self.desk.peers]
        return {"asked": [peer_name(peer) for peer in asked], "away": away}


def _first(settled: Iterable[Settled]) -> tuple[Settled, ...]:
    """As many as one netting covers, in order of ids."""
    return tuple(sorted(settled, key=lambda one: one.id)[: params.NETTING_COVERS_MAX])


def _edges(clearing: Clearing) -> list[tuple[bytes, bytes]]:
    """Its debts, as (debtor, creditor)."""
    parties = clearing.parties
    return list(zip(parties, (*parties[1:], parties[0]), strict=True))
