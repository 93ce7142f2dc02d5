"""What the node and its surroundings tell each other about units of parallel jobs; part of peer/events.py."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.stage import Stage, links_in, links_out

__all__ = ["LinkEnds", "Relink", "RunOrder", "Settled", "UnitWaits"]

_ROW_BYTES = 32


@dataclass(frozen=True)
class RunOrder:
    """A unit's place among the others, as its submitter launched it. peers: who runs each unit, by its number; since:
    the epoch in which each was given it.

    epoch: grows with each launch of the run; what comes from an older one names peers that may be gone.
    """

    run: bytes
    epoch: int
    unit: int
    peers: tuple[bytes, ...]
    since: tuple[int, ...]


@dataclass(frozen=True)
class LinkEnds:
    """What the end of a unit's segment says of its links: the bytes of the states SENT and RECEIVED, a row of 32 bytes
    a link in the order of protocol.stage.links_out and links_in, and the blob id of the segment's tape (TAPE)."""

    sent: bytes
    received: bytes
    tape: bytes

    def fits(self, stage: Stage) -> bool:
        """Whether there is a row for each link."""
        rows = len(links_out(stage)), len(links_in(stage)), 1
        return (len(self.sent), len(self.received), len(self.tape)) == tuple(_ROW_BYTES * count for count in rows)

    @staticmethod
    def row(rows: bytes, index: int) -> bytes:
        """One of the rows of `sent` or `received`."""
        return rows[_ROW_BYTES * index : _ROW_BYTES * (index + 1)]


@dataclass(frozen=True)
class Relink:
    """Effect: the run was launched anew while this work runs; some units are elsewhere now."""

    work: bytes
    order: RunOrder


@dataclass(frozen=True)
class Settled:
    """Effect: all units have ended the steps before this one, and their submitter signed for it: nobody asks for what
    was sent in them again."""

    work: bytes
    before_step: int


@dataclass(frozen=True)
class UnitWaits:
    """Input: a running unit has waited for tensors of these units for params.UNIT_WAIT_NS; said again while it does."""

    work: bytes
    units: tuple[int, ...]
