"""What a submitter keeps of a parallel job beside its job and those of its units, as it stands in the store."""

from __future__ import annotations

import msgspec

__all__ = ["Run"]


class Run(msgspec.Struct, kw_only=True):
    """A row of the store. border_bytes, shared_bytes: as in `submit-run`. segment: so many are signed for by all.
    lineage: the deals that this state rests on and that are not found right yet. cuts: segment -> root and blob of each
    unit's state before it, where one of those began."""

    id: bytes
    units: list[bytes]
    border_bytes: list[tuple[int, int]] = msgspec.field(default_factory=list)
    shared_bytes: list[int] = msgspec.field(default_factory=list)
    epoch: int = 0
    peers: list[bytes] = msgspec.field(default_factory=list)
    since: list[int] = msgspec.field(default_factory=list)  # the epoch in which each of them was given its unit
    segment: int = 0
    lineage: list[bytes] = msgspec.field(default_factory=list)
    cuts: dict[int, list[tuple[bytes, bytes]]] = msgspec.field(default_factory=dict)
    fruitless: int = 0  # times it went back, in a row
    rewinds: int = 0
    quarrels: list[tuple[bytes, bytes]] = msgspec.field(default_factory=list)  # who complained of whom, each once
    failed: str = ""  # why it is being ended
