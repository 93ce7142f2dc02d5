"""One dispute before one notary: its file, what each notary says it saw, and when its open round opened."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from peer.dispute_file import DisputeFile, Parts, Seen
from peer.messages import GameAt
from protocol.dispute import SIDES, Side
from protocol.network import Rules

__all__ = ["Hearing"]


@dataclass
class Hearing:
    """One dispute before this notary."""

    file: DisputeFile
    said: dict[tuple[Side, int], dict[bytes, bytes]] = field(default_factory=dict)  # place -> notary -> what it saw
    opened_ns: int = 0  # when the open round opened here; 0: the dispute waits for its turn
    tell_ns: int = 0  # when to say again where it stands
    parts: dict[bytes, Parts] = field(default_factory=dict)
    base_for: set[bytes] = field(default_factory=set)  # players that cannot get the base
    base_here: bool = False
    base_asked_ns: int = 0

    @property
    def number(self) -> int:
        """The open round."""
        return len(self.file.rounds)

    def own(self, me: bytes, number: int) -> Seen:
        """What this notary itself saw in a round, by solver and challenger; empty for nothing yet."""
        solver, challenger = (self.said.get((side, number), {}).get(me, b"") for side in SIDES)
        return solver, challenger

    def agreed(self, side: Side, number: int, *, quorum: int) -> bytes:
        """What a quorum of notaries saw in a place; empty while there is none."""
        said = list(self.said.get((side, number), {}).values())
        return next((value for value in sorted(set(said)) if said.count(value) >= quorum), b"")

    def position(self, me: bytes, *, answer: bool) -> GameAt:
        """Where the dispute stands here."""
        game = self.file.game
        opening = game is not None and game.wants_opening()
        return GameAt(
            self.file.id, self.number, *self.own(me, self.number), closed=False, opening=opening, answer=answer
        )

    def closed(self, number: int) -> GameAt:
        """How a round closed."""
        return GameAt(self.file.id, number, *self.file.rounds[number], closed=True, opening=False, answer=False)

    def clock_ns(self, rules: Rules) -> int:
        """How long the open round may take a player."""
        replay = self.file.game is None or self.file.game.replay
        return (rules.dispute_replay_ms if replay else rules.dispute_move_ms) * 10**6

    def restore(self, rows: Iterable[tuple[bytes, bytes]], me: bytes) -> None:
        """What this notary said before a restart, so that it says nothing else after it."""
        for place, seen in rows:
            if place[:32] == self.file.id:
                self.said.setdefault((SIDES[place[32]], int.from_bytes(place[33:35], "big")), {})[me] = seen
