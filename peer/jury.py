"""A notary's side of a jury: it asks the jurors of a dispute about float work, counts their verdicts, and rules.

As many jurors are asked as are still needed for a quorum of one word; who stays silent is replaced by the next in the
order of the draw. A juror's first verdict counts, and none of one who signed two. Every notary asks for itself and
hears every verdict, so all come to the same finding; rulings of a quorum of notaries make it count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from peer.desk import Desk
from peer.hearing import Hearing
from peer.messages import JuryAsk
from protocol import params
from protocol.records import Verdict

__all__ = ["Jury"]


@dataclass
class Jury:
    """The jurors of one hearing. `rule(hearing, finding)` ends it."""

    desk: Desk
    hearing: Hearing
    rule: Callable[[Hearing, str], None]
    asked: dict[bytes, int] = field(default_factory=dict)  # juror -> when it was first asked
    words: dict[bytes, set[str]] = field(default_factory=dict)  # juror -> its findings: of an honest one there is one
    next_ns: int = 0

    @property
    def jurors(self) -> tuple[bytes, ...]:
        """In the order in which they are asked."""
        return self.hearing.file.jurors(self.desk.network)

    def tick(self) -> None:
        """Ask whom it takes for a quorum, and ask again who has not answered."""
        now, rules = self.desk.now_ns, self.desk.network.rules
        if now < self.next_ns:
            return
        self.next_ns = now + params.RESEND_NS
        patience_ns = rules.dispute_replay_ms * 10**6 // 2
        silent = {juror for juror, at in self.asked.items() if juror not in self.words and now - at > patience_ns}
        due = {juror for juror in self.asked if juror not in self.words} - silent
        most = max(self._count("wrong"), self._count("right"))
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
        challenge, file = self.hearing.file.challenge, self.hearing.file
        about = (verdict.agreement, verdict.proof, verdict.segments)
        if about != (challenge.agreement, challenge.proof, (challenge.segment,)) or verdict.role != "juror":
            return
        if verdict.checker not in self.jurors or verdict.finding == "unsure" or file.over:
            return
        self.words.setdefault(verdict.checker, set()).add(verdict.finding)
        self.desk.emit("juror", dispute=file.id, juror=verdict.checker, finding=verdict.finding,
                       l1_ppb=verdict.l1_ppb, l2_ppb=verdict.l2_ppb)  # fmt: skip
        for finding in ("wrong", "right"):
            if self._count(finding) >= self.desk.network.rules.tolerant_quorum:
                self.rule(self.hearing, finding)
                return

    def _count(self, finding: str) -> int:
        return sum(words == {finding} for words in self.words.values())
