"""Randomness that nobody controls alone: a notary's shares of it, and whoever asks for one until it is there.

A notary signs once for each agreement that is open in its log, and once for the draw after the first proof of one: a
second proof, other seeds or other notaries get nothing, so nobody rolls again. Sans-IO.

Notaries that came and went may have signed for different quorums, each of which then waits for the others for ever. So
quorums are ordered, a notary says which one it signed for, and it goes on to a later one when a member of its own did:
that member never signs for the earlier one any more, so nobody has or gets its beacon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from peer.desk import Desk
from peer.evidence import open_seeds
from peer.messages import BeaconAsk, BeaconGiven
from peer.settler import Settler
from protocol import params
from protocol.codec import blake, decode, encode
from protocol.errors import LimitExceeded, VerificationFailed
from protocol.forced import beacon_subject, givers, open_beacon
from protocol.records import Agreement, Beacon, Proof, open_record

__all__ = ["Beacons"]


def _order(target: bytes, notaries: Sequence[bytes]) -> list[bytes]:
    """Sorts notaries, and quorums of them, in an order of the target's own, so that none is the first of all deals."""
    return sorted(blake("ichiba/beacon-order", target, notary) for notary in notaries)


Done = Callable[[list[bytes]], None]


@dataclass
class _Asked:
    """One beacon on its way. notaries: the quorum that was named last."""

    agreement_id: bytes
    agreement: Agreement
    target: bytes
    done: Done
    proof: bytes = b""
    reveals: tuple[bytes, ...] = ()
    notaries: tuple[bytes, ...] = ()
    given: dict[bytes, BeaconGiven] = field(default_factory=dict)  # the latest of each notary, whatever quorum it names
    resend_ns: int = 0

    def lacks(self, notary: bytes, named: tuple[bytes, ...]) -> bool:
        """Whether `notary` has not signed for this quorum, as far as is known."""
        return notary not in self.given or self.given[notary].notaries != named


@dataclass
class Beacons:
    """Both sides. `given`: what this notary signed for, by agreement or draw; `draws`: the one draw of an agreement."""

    desk: Desk
    settler: Settler
    given: dict[bytes, tuple[bytes, ...]] = field(default_factory=dict)
    draws: dict[bytes, bytes] = field(default_factory=dict)
    asked: dict[bytes, _Asked] = field(default_factory=dict)  # by target

    # --- who asks ------------------------------------------------------------------------------------------
    def ask(
        self,
        agreement_id: bytes,
        agreement: Agreement,
        done: Done,
        *,
        proof: bytes = b"",
        reveals: Sequence[bytes] = (),
        target: bytes = b"",
    ) -> None:
        """Bring the beacon of an agreement, or with a proof and its reveals that of a draw (target), and call `done`
        with its shares in order. Asking again for what is on its way changes nothing. Raises LimitExceeded."""
        target = target or agreement_id
        if target in self.asked:
            return
        if len(self.asked) >= params.BEACONS_ASKED_MAX:
            raise LimitExceeded(f"{params.BEACONS_ASKED_MAX} beacons are waited for already")
        self.asked[target] = _Asked(agreement_id, agreement, target, done, proof, tuple(reveals))
        self._request(self.asked[target])

    def drop(self, target: bytes) -> None:
        """Wait for it no more."""
        self.asked.pop(target, None)

    def _request(self, asked: _Asked) -> None:
        """(Again) ask the named notaries that have not answered; name others where one of them is gone."""
        asked.resend_ns = self.desk.now_ns + params.RESEND_NS
        here = [n for n in givers(self.desk.network, asked.agreement) if n in self.desk.peers]
        quorum = self.desk.network.notary_quorum
        if not asked.notaries or any(n not in here and asked.lacks(n, asked.notaries) for n in asked.notaries):
            if len(here) < quorum:
                return
            chosen = sorted(here, key=lambda notary: _order(asked.target, (notary,)))[:quorum]
            asked.notaries = tuple(sorted(chosen))
        sets = {asked.notaries, *(given.notaries for given in asked.given.values())}
        for named in sorted(sets, key=lambda named: _order(asked.target, named)):
            seen = tuple(given for _, given in sorted(asked.given.items()))
            for notary in named:
                if asked.lacks(notary, named):
                    self.desk.send(notary, BeaconAsk(asked.agreement_id, named, asked.proof, asked.reveals, seen))

    def on_given(self, peer: bytes, message: BeaconGiven) -> None:
        """A share, for the quorum that was named or for one that was named before. Raises VerificationFailed for what
        is none."""
        share, _, _ = open_record(message.share, network=self.desk.network.id)
        if not isinstance(share, Beacon) or share.notary != peer:
            raise VerificationFailed("a share of a beacon comes from its notary")
        named = message.notaries
        for asked in list(self.asked.values()):
            if share.subject != beacon_subject(asked.target, named):
                continue
            if peer not in named or not self._fits(named, asked.agreement):
                raise VerificationFailed("a share of a beacon that no quorum gives")
            asked.given[peer] = message
            if not any(asked.lacks(notary, named) for notary in named):
                shares = [asked.given[notary].share for notary in named]
                open_beacon(shares, target=asked.target, agreement=asked.agreement, network=self.desk.network)
                del self.asked[asked.target]
                asked.done(shares)

    def _fits(self, named: Sequence[bytes], agreement: Agreement) -> bool:
        """Whether these are a quorum of notaries that are no party, in the order of their keys."""
        able = givers(self.desk.network, agreement)
        return list(named) == sorted(set(named) & set(able)) and len(named) == self.desk.network.notary_quorum

    def tick(self) -> None:
        """Repeat what is unanswered."""
        for asked in list(self.asked.values()):
            if self.desk.now_ns >= asked.resend_ns:
                self.desk.attempt(self._request, asked)

    # --- a notary ------------------------------------------------------------------------------------------
    def on_ask(self, peer: bytes, message: BeaconAsk) -> None:
        """Sign a share, the same as before if asked again. Raises VerificationFailed for what no honest peer asks."""
        channel = self.settler.channels.get(message.agreement)
        if channel is None:
            return  # its opening is still on its way; the asker repeats itself
        agreement = channel.agreement
        able = givers(self.desk.network, agreement)
        if self.desk.me not in able or self.desk.me not in message.notaries:
            raise VerificationFailed("this peer gives no randomness for that deal")
        named = message.notaries
        if not self._fits(named, agreement):
            raise VerificationFailed(
                f"a beacon is given by {self.desk.network.notary_quorum} notaries that are no party"
            )
        target = message.agreement
        if message.proof:
            target = self._draw_of(peer, message, agreement)
        elif peer != agreement.solver or message.reveals:
            raise VerificationFailed("the beacon of an agreement is for its solver")
        known = self.given.get(target)
        if known is not None and known != named and self._answer(known) and not self._dead(target, known, message):
            named = known  # it has, or can have, the shares of these: once more that one
        if known != named:
            self.given[target] = named
            self.desk.save("beacons", target, encode(list(named)))
        share = Beacon(network=self.desk.network.id, notary=self.desk.me, subject=beacon_subject(target, named))
        self.desk.send(peer, BeaconGiven(self.desk.seal(share), named))

    def _answer(self, notaries: Iterable[bytes]) -> bool:
        """Whether all of them are here, as far as this peer sees."""
        return all(notary == self.desk.me or notary in self.desk.peers for notary in notaries)

    def _dead(self, target: bytes, known: tuple[bytes, ...], message: BeaconAsk) -> bool:
        """Whether what the asker shows proves that it has not, and cannot have, the beacon of `known`: it names a later
        quorum, and a member of `known` signed for a later one than that."""
        if _order(target, message.notaries) < _order(target, known):
            return False
        for given in message.seen:
            if _order(target, given.notaries) <= _order(target, known):
                continue
            share, _, _ = open_record(given.share, network=self.desk.network.id)
            subject = beacon_subject(target, given.notaries)
            if isinstance(share, Beacon) and share.notary in known and share.subject == subject:
                return True
        return False

    def _draw_of(self, peer: bytes, message: BeaconAsk, agreement: Agreement) -> bytes:
        """The draw that a proof and its reveals lead to. Raises VerificationFailed for any but an agreement's first."""
        proof, proof_id, _ = open_record(message.proof, network=self.desk.network.id)
        if not isinstance(proof, Proof) or proof.agreement != message.agreement:
            raise VerificationFailed("randomness for the proof of another deal")
        if peer != agreement.submitter or proof.author not in (agreement.submitter, agreement.solver):
            raise VerificationFailed("the randomness of a draw is for its submitter, after a proof by a party")
        target = open_seeds(message.reveals, agreement, message.agreement, proof_id, self.desk.network.id)
        known = self.draws.get(message.agreement)
        if known is not None and known != target:
            raise VerificationFailed(
                "randomness for a second proof or other seeds", why="whoever drew before may not draw again"
            )
        if known is None:
            self.draws[message.agreement] = target
            self.desk.save("draws", message.agreement, target)
        return target

    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """What this notary signed for stands after a restart."""
        self.draws.update(rows("draws"))
        for target, value in rows("beacons"):
            self.given[target] = tuple(decode(list[bytes], value, bytes_max=params.STORE_VALUE_BYTES_MAX))
