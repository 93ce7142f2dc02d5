"""News of a deal's work, for people: unsigned, perhaps lost, believed only as a sign of life. Sans-IO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from peer import messages as m
from peer.deals import agreement_of, task_of
from peer.desk import Desk
from peer.events import ScriptSaid, StepMade
from protocol.profile_task import ProfileSpec
from protocol.task import FIGURES, TaskSpec

if TYPE_CHECKING:
    from peer.submitter import Submitter

__all__ = ["News", "news_of"]

_LOSS_SHOWN_MAX: Final = 1e9  # a screen needs no more, and an integer field holds no more


def news_of(deal: bytes, event: StepMade | ScriptSaid) -> m.Progress | m.ScriptNews:
    """What a solver tells its submitter of a step, or of what a script printed."""
    if isinstance(event, ScriptSaid):
        return m.ScriptNews(deal, event.text, event.used_ns)
    shown = max(-_LOSS_SHOWN_MAX, min(_LOSS_SHOWN_MAX, event.loss))
    return m.Progress(deal, event.step, round(shown * 1_000_000))


@dataclass
class News:
    """What solvers tell a submitter."""

    desk: Desk
    submitter: Submitter

    def progress(self, peer: bytes, message: m.Progress | m.ScriptNews) -> None:
        """A step is done, or a script said something."""
        deal = self.submitter.deals.get(message.agreement)
        if deal is not None and self.submitter.solver_of(deal) == peer:
            deal.news_ns = self.desk.now_ns
            if isinstance(message, m.ScriptNews):
                self.desk.emit("said", deal.job, deal=deal.id, text=message.text, used_ns=message.used_ns)
                return
            task = task_of(deal.task)
            figure = FIGURES[task.kind] if isinstance(task, TaskSpec) else ""
            loss, of = message.loss_millionths / 1e6, task.steps_run if isinstance(task, ProfileSpec) else task.steps
            self.desk.emit("step", deal.job, deal=deal.id, step=message.step, loss=loss, figure=figure, of=of)

    def paused(self, peer: bytes, message: m.Paused) -> None:
        """Told to people, and no news: a solver cannot hold a job longer by saying that it does not work on it."""
        deal = self.submitter.deals.get(message.agreement)
        if deal is not None and self.submitter.solver_of(deal) == peer:
            silence_ns = agreement_of(deal, self.desk.network.id).segment_deadline_ns
            kind = "solver-paused" if message.paused else "solver-resumed"
            self.desk.emit(kind, deal.job, deal=deal.id, solver=peer, silence_s=silence_ns // 10**9)
