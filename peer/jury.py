"""A notary's side of a jury: it asks the jurors of a dispute that has no game, counts their words, and rules.

As many jurors are asked as are still needed for a quorum of one word; who stays silent is replaced by the next in the
order of the draw. A juror's first verdict counts, and none of one who signed two. Every notary asks for itself and
hears every verdict, so all come to the same finding; rulings of a quorum of notaries make it count.

Of the challenges of one segment the oldest is heard, and the oldest that has the root which the jurors find is ruled
on: who accuses without having computed it keeps nobody from the finder's share. Of two right challenges of one proof
only one may come to an Arbitration: else which finder is paid would depend on which one a peer heard first. Notaries
hear the older first, and who ruled on one waits before it rules on another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from peer.desk import Desk
from peer.dispute_file import WORDS_OF_A_JUROR_MAX, DisputeFile
from peer.hearing import Hearing
from peer.messages import JuryAsk
from protocol import params
from protocol.errors import VerificationFailed
from protocol.jury import Word, cause_of, decided, heaviest, open_word
from protocol.records import Verdict

__all__ = ["Jury"]


@dataclass
class Jury:
    """The jurors of one hearing. `rule(hearing, word)` ends it. hearings: all of this notary; ruled: its own finding on
    a dispute that is not over, if it ruled on it."""

    desk: Desk
    hearing: Hearing
    rule: Callable[[Hearing, Word], None]
    hearings: Mapping[bytes, Hearing] = field(default_factory=dict)
    ruled: Callable[[bytes], str] = lambda _: ""
    asked: dict[bytes, int] = field(default_factory=dict)  # juror -> when it was first asked
    words: dict[bytes, set[Word]] = field(default_factory=dict)  # juror -> what it said: of an honest one there is one
    others: dict[bytes, int] = field(default_factory=dict)  # disputes found wrong here -> since when that is known
    next_ns: int = 0

    @property
    def jurors(self) -> tuple[bytes, ...]:
        """In the order in which they are asked."""
        return self.hearing.file.jurors(self.desk.network)

    def tick(self) -> None:
        """Ask whom it takes for a quorum, and ask again who has not answered; rule, if that had to wait."""
        self._decide()
        now, rules = self.desk.now_ns, self.desk.network.rules
        if now < self.next_ns:
            return
        self.next_ns = now + params.RESEND_NS
        patience_ns = rules.dispute_replay_ms * 10**6 // 2
        silent = {juror for juror, at in self.asked.items() if juror not in self.words and now - at > patience_ns}
        due = {juror for juror in self.asked if juror not in self.words} - silent
        heard = heaviest(self.words.values())
        most = heard[1] if heard is not None else 0
        for juror in self.jurors:
            if most + len(due) >= rules.tolerant_quorum:
                break
            if juror not in self.asked:
                self.asked[juror] = now
                due.add(juror)
        file = self.hearing.file
        # The same of every challenge of the segment, so that a juror measures once.
        segment = file.challenge.segment
        case = msgspec.structs.replace(file.case.request, segments=(segment,), role="verifier", doubt=b"")
        for juror in sorted(due | silent):
            self.desk.send(juror, JuryAsk(file.kept.challenge, case))

    def on_verdict(self, verdict: Verdict) -> None:
        """A juror's verdict, from itself or in gossip; one of another peer, or on other work, is not for us."""
        file = self.hearing.file
        if file.over or verdict.checker not in self.jurors:
            return
        try:
            word = open_word(verdict, file.challenge, file.case.tolerance)
        except VerificationFailed:
            return
        said = self.words.setdefault(verdict.checker, set())
        if word in said or len(said) >= WORDS_OF_A_JUROR_MAX:
            return  # two words are none: what else it signs is not kept
        said.add(word)
        self.desk.emit("juror", dispute=file.id, juror=verdict.checker, finding=word.finding,
                       l1_ppb=verdict.l1_ppb, l2_ppb=verdict.l2_ppb)  # fmt: skip
        self._decide()

    def _decide(self) -> None:
        """Rule by the word of a quorum, if it is this hearing's turn."""
        found = decided(self.words, self.desk.network.rules.tolerant_quorum)
        if found is None or self.hearing.file.over or not self.hearing.opened_ns:
            return
        if found.finding == "right":
            self.rule(self.hearing, found)
            return
        finder = self._finder(found)
        if not self._waits(finder.file):
            finder.opened_ns = finder.opened_ns or self.desk.now_ns
            self.rule(finder, found)

    def _finder(self, word: Word) -> Hearing:
        """Of a word of wrong, the hearing of the oldest challenge that says the same; this one, if none does."""
        mine = self.hearing.file
        alike = [
            h for h in self.hearings.values()
            if h.file.root == mine.root and h.file.challenge.segment == mine.challenge.segment and not h.file.over
            and cause_of(word, h.file.challenge) == "jury"
        ]  # fmt: skip
        return min(alike, key=lambda h: h.file.age, default=self.hearing)

    def _waits(self, mine: DisputeFile) -> bool:
        """Whether another challenge than `mine`, on which this notary ruled wrong, may still come to a quorum first. If
        notaries are divided, those who ruled on the younger one give way."""
        now = self.desk.now_ns
        for other in [h.file for h in self.hearings.values()]:
            if other is mine or other.over or other.root != mine.root or self.ruled(other.id) != "wrong":
                continue
            since_ns = self.others.setdefault(other.id, now)
            grace_ns = params.DISPUTE_GRACE_NS * (1 if mine.age < other.age else params.JURY_YOUNGER_WAITS)
            if now < since_ns + grace_ns:
                return True
        return False
