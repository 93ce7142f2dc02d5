"""Who judges what no referee can: a jury that nobody chose, whose members execute the whole segment again.

A referee repeats one operation from operands that it derives itself. Of float work it cannot say what the operation
must give (decisions/0010), of a unit of a parallel job it cannot derive what the neighbours sent (decisions/0023): so
other machines run the segment, by its distance or to the bit. Jurors are drawn by what the notaries' randomness and
both seeds give after the proof, from the stakes of the network file, which are the same to everybody and cannot be
bought for the occasion. What their words come to is decided here, for notaries and for who looks at a file later.

Nobody can say after another what it did not compute: who accuses exact work states the root that it found bound to its
own key (`bound_root`), and jurors tell theirs to the notaries alone until the dispute is over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal

from protocol.codec import blake
from protocol.errors import VerificationFailed
from protocol.keys import peer_key
from protocol.network import Network
from protocol.profile import Distance, Tolerance, finding
from protocol.records import Challenge, Verdict
from protocol.sampling import checker_weight, draw_weighted

__all__ = ["Word", "bound_root", "cause_of", "decided", "heaviest", "jury_of", "open_word"]

_NO_ROOT: Final = b""


@dataclass(frozen=True, order=True)
class Word:
    """What a juror says. root: of exact work that is wrong, the root that the segment ends at: who computed it has that
    one and no other, so only equal ones count together. Empty for float work, which has another on each machine."""

    finding: Literal["right", "wrong"]
    root: bytes = _NO_ROOT


def jury_of(random: bytes, segment: int, network: Network, *, parties: frozenset[bytes]) -> tuple[bytes, ...]:
    """The keys of the jurors of one segment, in the order in which they are asked.

    random: of the deal's draw, 32 bytes. parties: submitter, solver and challenger, who judge nothing of it; nor do
    notaries, who count. Twice the quorum and one more, for some may be away.
    """
    least = network.rules.checker_stake_min_micro
    barred = parties | network.notary_keys
    weights = {
        peer: checker_weight(deposit.stake_micro, stake_min_micro=least, carded=True)
        for deposit in network.deposits
        if (peer := peer_key(deposit.peer)) not in barred
    }
    able = {peer: weight for peer, weight in weights.items() if weight}
    drawn = draw_weighted(random, b"jury" + segment.to_bytes(8, "little"), able)
    return tuple(islice(drawn, 2 * network.rules.tolerant_quorum + 1))


def open_word(verdict: Verdict, challenge: Challenge, tolerance: Tolerance | None) -> Word:
    """What a verdict says of what is challenged, if a juror may say that. Raises VerificationFailed.

    It is on just that segment, proof and claimed root, and its finding follows from what it states: of exact work
    (tolerance None) another root, of float work its distances. That its checker was drawn is the caller's to know.
    """
    about = (verdict.agreement, verdict.proof, verdict.segments)
    if verdict.role != "juror" or about != (challenge.agreement, challenge.proof, (challenge.segment,)):
        raise VerificationFailed("a verdict of no juror, or on other work than is challenged")
    if verdict.finding == "unsure":
        raise VerificationFailed("a juror that is unsure")
    if verdict.finding == "wrong":
        told = (verdict.wrong_segment, verdict.claimed_root)
        if told != (challenge.segment, challenge.claimed_root) or verdict.found_root == verdict.claimed_root:
            raise VerificationFailed("a juror finds another segment or root wrong than is challenged")
    far = (verdict.l1_ppb, verdict.l2_ppb)
    if tolerance is None:
        if far != (0, 0):
            raise VerificationFailed("a juror that measured a distance of exact work")
        return Word(verdict.finding, verdict.found_root if verdict.finding == "wrong" else _NO_ROOT)
    if verdict.finding != finding(Distance(*far, ""), tolerance, asked="juror"):
        raise VerificationFailed(f"a juror finds {verdict.finding} what lies {far[0]} and {far[1]} ppb from its own")
    return Word(verdict.finding)


def heaviest(words: Iterable[Collection[Word]]) -> tuple[Word, int] | None:
    """The word of most jurors, and of how many; None while nobody spoke. words: of each juror all that it signed: one
    who said two has none."""
    count = Counter(word for said in words if len(said) == 1 for word in said)
    return min(count.items(), key=lambda one: (-one[1], one[0])) if count else None


def decided(words: Mapping[bytes, Collection[Word]], quorum: int) -> Word | None:
    """The word of a quorum of jurors, or None. words: by juror."""
    most = heaviest(words.values())
    return most[0] if most is not None and most[1] >= quorum else None


def bound_root(peer: bytes, root: bytes) -> bytes:
    """What `peer` states of exact work that jurors may have to execute again, where it found `root`: 32 bytes that show
    later that it had the root, and are no use to another peer before. peer: 32 bytes; root: 32 bytes."""
    return blake("ichiba/bound-root", peer, root)


def cause_of(word: Word, challenge: Challenge) -> Literal["jury", "both"]:
    """Both: the work is wrong, and so is what its challenger says that it is; who accuses without having computed it
    earns nothing. Of float work nobody can tell."""
    if word.root == _NO_ROOT or bound_root(challenge.challenger, word.root) == challenge.found_root:
        return "jury"
    return "both"
