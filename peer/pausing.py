"""The owner wants the machine back: no work runs and none is sought until told otherwise, and no deal is given up; or
it wants an end: nothing new is taken, and what there is is finished.

Sans-IO, like the roles it stops. That a peer is paused is a row of the store: a restart does not undo it. What the
workers hand over is kept by peer/suspension.py; this knows only how long the others will wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from peer.bidding import Bidder
from peer.checker import Checker
from peer.deals import agreement_of
from peer.desk import Desk
from peer.events import Suspend
from peer.messages import Paused
from peer.solver import Solver
from protocol.lifecycle import TERMINAL, State
from protocol.records import Agreement

__all__ = ["Pausing"]

_TABLE, _KEY, _FINISH = "pause", b"pause", b"finish"


class _Pause(msgspec.Struct, frozen=True):
    """The row. lost_after_ns: work -> when its other side gives it up, as far as was known when it was paused."""

    since_ns: int
    lost_after_ns: dict[bytes, int]
    by: str = "owner"
    why: str = ""


@dataclass
class Pausing:
    """Pauses and resumes the roles that have workers."""

    desk: Desk
    bidder: Bidder
    solver: Solver
    checker: Checker
    lost_after_ns: dict[bytes, int] = field(default_factory=dict)
    told_done: bool = False  # that a peer which finishes has finished

    def pause(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Stop. A worker that has not handed over its state in `within_ms` is killed without.

        by: the owner, who alone ends it then, or the word of a guest rule, with its `why`.
        """
        already, by = bool(self.desk.paused_ns), str(arguments.get("by", "owner"))
        if not already or self.desk.paused_by != "owner":
            changed = (self.desk.paused_by, self.desk.paused_why) != (by, str(arguments.get("why", "")))
            self.desk.paused_by, self.desk.paused_why = by, str(arguments.get("why", ""))
            if already and changed:
                self._save()
        if not already:
            self.desk.paused_ns = self.desk.now_ns
            self.lost_after_ns = self._hold_deals() | self.checker.pause()
            self._save()
            self.bidder.publish_ask()
            self.desk.emit("paused", works=len(self.lost_after_ns), by=by, why=self.desk.paused_why)
            self.desk.add(Suspend(arguments.get("within_ms", 0)))
        return {"already": already, **self.status()}

    def _save(self) -> None:
        row = _Pause(self.desk.paused_ns, self.lost_after_ns, self.desk.paused_by, self.desk.paused_why)
        self.desk.save(_TABLE, _KEY, msgspec.msgpack.encode(row))

    def resume(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Go on. by: a guest's rules never undo what the owner paused."""
        since = self.desk.paused_ns
        if not since or (self.desk.paused_by == "owner" and arguments.get("by", "owner") != "owner"):
            return {"resumed": False, "paused_for_ns": 0, "works": 0}
        self.desk.paused_ns, self.desk.paused_by, self.desk.paused_why = 0, "", ""
        works = self._start_deals() + self.checker.resume()
        self.lost_after_ns = {}
        self.desk.save(_TABLE, _KEY, None)
        self.bidder.publish_ask()
        self.desk.emit("resumed", works=works)
        return {"resumed": True, "paused_for_ns": self.desk.now_ns - since, "works": works}

    def finish(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Take no new work, finish and settle what there is; with `on` false, take new work again."""
        on, was = bool(arguments.get("on", True)), bool(self.desk.finishing_ns)
        if on != was:
            self.desk.finishing_ns = self.desk.now_ns if on else 0
            self.told_done = False
            self.desk.save(_TABLE, _FINISH, msgspec.msgpack.encode(self.desk.finishing_ns) if on else None)
            self.bidder.publish_ask()
            self.desk.emit("finishing" if on else "open-again", works=self._unfinished())
        return {"already": on == was, **self.status()}

    def _unfinished(self) -> int:
        """Deals that are not settled, and checks that are not told."""
        deals = sum(1 for deal in self.solver.deals.values() if deal.lifecycle not in TERMINAL)
        return deals + len(self.checker.cases)

    def tick(self) -> None:
        """Say once that all is finished."""
        if self.desk.finishing_ns and not self.told_done and not self._unfinished():
            self.told_done = True
            self.desk.emit("finished", after_ns=self.desk.now_ns - self.desk.finishing_ns)

    def _open_deals(self) -> dict[bytes, Agreement]:
        """The deals with work still to be done here."""
        running = (d for d in self.solver.deals.values() if d.lifecycle == State.RUNNING and not d.ended_early)
        terms = ((d, agreement_of(d, self.desk.network.id)) for d in running)
        return {d.id: terms for d, terms in terms if d.made < terms.last_segment - terms.first_segment}

    def _hold_deals(self) -> dict[bytes, int]:
        """When the submitter of each deal gives it up: after the silence both signed, counted from our last news."""
        self.solver.waiting |= self.solver.working
        self.solver.working.clear()
        lost_after_ns = {}
        for deal_id, agreement in self._open_deals().items():
            told_ns = self.solver.told_ns.get(deal_id, self.solver.deals[deal_id].entered_ns)
            lost_after_ns[deal_id] = told_ns + agreement.segment_deadline_ns
            self.desk.send(agreement.submitter, Paused(deal_id, paused=True))
        return lost_after_ns

    def _start_deals(self) -> int:
        waiting, self.solver.waiting = self.solver.waiting, set()
        ready = [i for i in self._open_deals() if i in waiting and i not in self.solver.missing]
        for deal_id in ready:
            deal = self.solver.deals[deal_id]
            self.desk.send(agreement_of(deal, self.desk.network.id).submitter, Paused(deal_id, paused=False))
            self.solver.start(deal)
            self.solver.step_times.pop(deal_id, None)
        return len(ready)

    def status(self) -> dict[str, Any]:
        """Since when (0: it is not), and the works that wait."""
        mine = {
            **dict.fromkeys(self._open_deals(), "deal"),
            **dict.fromkeys(self.checker.waiting_works(), "check"),
        }
        works = [
            {"work": work.hex(), "kind": mine[work], "lost_after_ns": lost_after_ns}
            for work, lost_after_ns in sorted(self.lost_after_ns.items())
            if work in mine
        ]
        return {
            "paused_since_ns": self.desk.paused_ns,
            "paused_by": self.desk.paused_by,
            "paused_why": self.desk.paused_why,
            "paused_works": works,
            "finishing_since_ns": self.desk.finishing_ns,
            "unfinished": self._unfinished(),
        }

    def restore(self, rows: Callable[[str], Iterable[tuple[bytes, bytes]]]) -> None:
        """Stay paused over a restart. Call it before the roles restore their work."""
        for key, value in rows(_TABLE):
            if key == _FINISH:
                self.desk.finishing_ns = msgspec.msgpack.decode(value, type=int)
                continue
            pause = msgspec.msgpack.decode(value, type=_Pause)
            self.desk.paused_ns, self.lost_after_ns = pause.since_ns, pause.lost_after_ns
            self.desk.paused_by, self.desk.paused_why = pause.by, pause.why
