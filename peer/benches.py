"""Which role has what the bench process made, and what a peer says of a bench. Sans-IO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peer import messages as m
from peer.challenger import Challenger
from peer.desk import Desk
from peer.events import BenchEnded, BenchFilled, BenchInput, BenchMade, BenchWarm, MemoryOpened, WorkChecked
from peer.prover import Prover

__all__ = ["Benches"]


@dataclass
class Benches:
    """The two sides of a bench: `prover` is timed, `challenger` times others."""

    desk: Desk
    prover: Prover
    challenger: Challenger

    def event(self, event: BenchInput) -> None:
        """What the bench process made, or the check of another's work."""
        acts: dict[type[BenchInput], Callable[..., None]] = {
            BenchWarm: self.prover.on_warm,
            BenchMade: self.prover.on_made,
            BenchFilled: self.prover.on_filled,
            MemoryOpened: self.prover.on_opened,
            BenchEnded: self.prover.on_ended,
            WorkChecked: self.challenger.on_checked,
        }
        self.desk.attempt(acts[type(event)], event)  # a card that ran out meanwhile must not stop the node

    def message(self, peer: bytes, message: m.Message) -> bool:
        """Act on a message about a bench; False for any other."""
        acts: dict[type[m.Message], Callable[..., None]] = {
            m.BenchInvite: lambda peer, _: self.prover.on_invite(peer),
            m.BenchAsk: self.challenger.on_ask,
            m.BenchStart: self.prover.on_start,
            m.BenchDone: self.challenger.on_done,
            m.BenchTimed: self.prover.on_timed,
            m.BenchOffer: self.challenger.on_offer,
            m.BenchProbe: self.prover.on_probe,
            m.BenchProbed: self.challenger.on_probed,
            m.BenchWitness: self.prover.on_witness,
        }
        if isinstance(message, m.BenchDecline):
            self.prover.on_decline(peer, message)
            self.challenger.on_decline(peer, message)
        elif type(message) in acts:
            acts[type(message)](peer, message)
        else:
            return False
        return True
