"""Every adversary of the market, as data: who it is, what it does, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peer.simulated_frauds import STEERED, WRONG_END
from tests.adversaries.stage import Strategy
from tests.adversaries.strategies import (
    Cheat,
    Colluder,
    Copier,
    DoubleReservation,
    Equivocator,
    ForgedOpenings,
    ForgingChallenger,
    FriendlyFire,
    Lazy,
    Liar,
    NeverSettles,
    Reroller,
    TwoReceipts,
    Unpaying,
    Vanishing,
    Withholder,
    WrongChunks,
)

__all__ = ["ADVERSARIES", "Adversary"]

LOCK = "lock"  # what a convicted solver loses
WORD = "word"  # what a lost challenge costs: checker_stake_min_micro
FAULT = "fault"  # what a right verdict on wrong work costs: half the solver's lock, at most a word
DISPUTE_S = 240  # a deal done again, and a dispute with every clock run out


@dataclass(frozen=True)
class Adversary:
    """One adversary. cast: the strategies, by the name of the peer. scene: of stage_of.

    findings: how each dispute ends, sorted. culprits: who loses what of its stake; nobody else loses any, but that
    `perhaps` may, by the draw. levels, cause: of the ruling that convicts. retried: how often the job goes back to the
    market; None: it depends. unpaid: who earns nothing. late_s: how much longer than its honest control the job may
    take, in simulated seconds. state: of the job; exact: whether its end is that of honest work to the bit.
    """

    name: str
    who: str
    cast: Callable[[], Mapping[str, Strategy]]
    findings: tuple[str, ...] = ()
    culprits: Mapping[str, str] = field(default_factory=dict)
    levels: tuple[str, ...] = ("",)
    cause: str = ""
    perhaps: tuple[str, ...] = ()
    retried: int | None = 0
    unpaid: tuple[str, ...] = ()
    penalised: tuple[str, ...] = ()
    late_s: int = DISPUTE_S
    state: str = "done"
    scene: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = True
    note: str = ""

    @property
    def notaries(self) -> bool:
        """Whether notaries judge it, or a quorum of checkers."""
        return bool(self.scene.get("notaries", 4))


def _fraud(cheat: str, *levels: str, note: str = "") -> tuple[Adversary, Adversary]:
    """A fraud of worker/cheats.py before notaries, and before a quorum of checkers."""
    made = Adversary(
        cheat, "solver", lambda: {"bob": Cheat(cheat)}, ("wrong",), {"bob": LOCK}, levels, "leaf", retried=1,
        unpaid=("bob",), note=note,
    )  # fmt: skip
    alone = Adversary(
        f"{cheat}, no notaries", "solver", made.cast, ("slash",), {"bob": LOCK}, ("segment",), "re-execution",
        retried=1, unpaid=("bob",), scene={"notaries": 0}, note="a quorum of checkers re-executes; there is no dispute",
    )  # fmt: skip
    return made, alone


_FRAUDS = (
    _fraud("skip-step", "element"),
    _fraud("wrong-data", "element"),
    _fraud("wrong-batch", "element"),
    _fraud("stale-checkpoint", "element"),
    _fraud("copied-proof", "element", "state"),
    _fraud("stale-gradient", "element"),
    _fraud("low-precision", "block"),
    _fraud("wrong-label", "element"),
    _fraud("reordered-batches", "element"),
    _fraud("extrapolated-checkpoint", "element"),
    _fraud("unproven-base", "element"),
    _fraud("wrong-rate", "element"),
)
_LATE: Mapping[str, Any] = {"late": ("vera",)}
_AUDITED: Mapping[str, Any] = {"without": ("vera",), "audit_permille": 1000}

# Of tolerant work: profiles find a noise of 1 to 3 ppm of an update, so thresholds of 3 to 9; or 100 times that.
_QUIET: Mapping[str, Any] = {"noise_ppb": 1_000}
_LOUD: Mapping[str, Any] = {"noise_ppb": 100_000}
_LATE_JURORS: Mapping[str, Any] = {**_QUIET, "late": ("vera", "viola", "vincent")}
_BY_DISTANCE = "a quorum of checkers measures; there is no jury"


def _tolerant(name: str, cheat: str, note: str = "", scene: Mapping[str, Any] = _QUIET) -> tuple[Adversary, Adversary]:
    """A cheat in tolerant work, before a jury that notaries draw, and before a quorum of checkers."""
    made = Adversary(
        f"tolerant: {name}", "solver", lambda: {"bob": Cheat(cheat)}, ("wrong",), {"bob": LOCK}, ("segment",), "jury",
        retried=1, unpaid=("bob",), scene=scene, note=note,
    )  # fmt: skip
    alone = Adversary(
        f"tolerant: {name}, no notaries", "solver", made.cast, ("slash",), {"bob": LOCK}, ("segment",), "re-execution",
        retried=1, unpaid=("bob",), scene={**scene, "notaries": 0}, note=_BY_DISTANCE,
    )  # fmt: skip
    return made, alone


_TOLERANT: tuple[Adversary, ...] = (
    *_tolerant("skip-step", "skip-step"),
    *_tolerant("low-precision", "low-precision"),
    *_tolerant("wrong-rate", "wrong-rate"),
    *_tolerant(
        "steers by 2.5 to 7.5 thresholds", f"{STEERED}2250000", "the first verifier is unsure, the second is not", _LOUD
    ),
    Adversary("tolerant: steers by at most half a threshold", "solver", lambda: {"bob": Cheat(f"{STEERED}150000")},
              scene=_LOUD, exact=False, note="not found: it is within what honest machines may differ by"),
    Adversary("tolerant: false accusation", "verifier", lambda: {"victor": Liar()}, ("right",), {"victor": WORD},
              ("segment",), "jury", scene=_LATE_JURORS),
    Adversary("tolerant: lazy verifier", "verifier", lambda: {"bob": Cheat("copied-proof"), "victor": Lazy()},
              ("wrong",), {"bob": LOCK}, ("segment",), "jury", retried=1, unpaid=("bob",),
              scene={**_LATE_JURORS, "audit_permille": 1000},
              note="a whistleblower finds it; the verifier loses nothing, for near a threshold it may be honest"),
)  # fmt: skip

ADVERSARIES: tuple[Adversary, ...] = (
    *(made for made, _ in _FRAUDS),
    *(alone for _, alone in _FRAUDS),
    *_TOLERANT,
    Adversary("re-rolled commitment", "solver", lambda: {"bob": Reroller("skip-step")}, ("wrong",), {"bob": LOCK},
              ("element",), "leaf", retried=1, unpaid=("bob",), penalised=("bob",)),
    Adversary("withheld chunks", "solver", lambda: {"bob": Withholder("alice", "victor", "vera", "wendy")}, retried=1,
              unpaid=("bob",), note="what is not handed over is not co-signed, and not paid"),
    Adversary("wrong chunks", "solver", lambda: {"bob": WrongChunks()}, retried=1, penalised=("bob",)),
    Adversary("two receipts under one number", "solver", lambda: {"bob": TwoReceipts()}, retried=1,
              penalised=("bob",)),
    Adversary("forged operands of a solver", "solver", lambda: {"bob": ForgedOpenings("low-precision")}, ("wrong",),
              {"bob": LOCK}, ("block",), "leaf", retried=1, unpaid=("bob",), penalised=("bob",)),
    Adversary("two moves of one round, solver", "solver", lambda: {"bob": Equivocator(cheat="skip-step")}, ("wrong",),
              {"bob": LOCK}, ("step", "state", "node", "tile", "element"), "equivocation", retried=1, unpaid=("bob",)),
    Adversary("lazy verifier", "verifier", lambda: {"bob": Cheat("copied-proof"), "victor": Lazy()}, ("wrong",),
              {"bob": LOCK, "victor": FAULT}, ("element", "state"), "leaf", retried=1, unpaid=("bob",),
              scene=_AUDITED),
    Adversary("colluding solver and verifier", "solver and verifier",
              lambda: {"bob": Cheat("copied-proof"), "victor": Colluder("bob")}, ("wrong",),
              {"bob": LOCK, "victor": FAULT}, ("element", "state"), "leaf", retried=1, unpaid=("bob",),
              scene=_AUDITED),
    Adversary("false challenge, lying", "verifier", lambda: {"victor": Liar()}, ("right",), {"victor": WORD},
              ("block",), "leaf", scene=_LATE),
    Adversary("false challenge, honest to the leaf", "verifier", lambda: {"victor": Liar(WRONG_END)}, ("right",),
              {"victor": WORD}, ("element",), "leaf", scene=_LATE),
    Adversary("false challenge, silent", "verifier", lambda: {"victor": Liar(silent=True)}, ("right",),
              {"victor": WORD}, ("segment",), "silence", scene=_LATE),
    Adversary("forged operands of a challenger", "verifier", lambda: {"victor": ForgingChallenger()}, ("right",),
              {"victor": WORD}, ("block",), "withheld", penalised=("victor",), scene=_LATE),
    Adversary("two moves of one round, challenger", "verifier",
              lambda: {"victor": Equivocator(lie="wrong-product")}, ("right",), {"victor": WORD},
              ("step", "state", "node", "tile", "element"), "equivocation", scene=_LATE),
    Adversary("copied verdict of a liar", "whistleblower", lambda: {"victor": Liar(), "wendy": Copier()},
              ("right",), {"victor": WORD}, ("block", "segment"), "leaf or malformed", perhaps=("wendy",),
              scene={**_LATE, "audit_permille": 1000}),
    Adversary("sybil challengers", "verifier and whistleblower", lambda: {"victor": Liar(), "wendy": Liar(WRONG_END)},
              ("right", "right"), {"victor": WORD, "wendy": WORD}, ("block", "element"), "leaf",
              scene={**_LATE, "audit_permille": 1000}),
    Adversary("a friend challenges first, to lose", "solver and whistleblower",
              lambda: {"bob": Cheat("skip-step"), "wendy": FriendlyFire("bob")}, ("right", "wrong"),
              {"bob": LOCK, "wendy": WORD}, ("element",), "leaf", retried=1,
              note="its friend pays the solver's defence, and both lose more"),
    Adversary("takes receipts, gives no voucher", "submitter", lambda: {"alice": Unpaying()}, retried=None,
              late_s=1200, note="it pays for what it co-signed, and its job is late"),
    Adversary("never signs the settlement", "submitter", lambda: {"alice": NeverSettles()},
              note="the solver claims with its last voucher"),
    Adversary("reserves its balance twice", "submitter", lambda: {"alice": DoubleReservation()},
              culprits={"alice": WORD}, state="", late_s=600,
              note="no channel opens; both agreements together burn a stake and bar it"),
    Adversary("is gone after the proof", "submitter", lambda: {"alice": Vanishing()}, state="", late_s=600,
              note="the solver claims with its last voucher"),
)  # fmt: skip
